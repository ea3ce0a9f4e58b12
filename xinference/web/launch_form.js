// SPDX-License-Identifier: Apache-2.0
// The form that launches one family: engine → format → size → quantization, and the options.

import { call, hasKey, path } from "./api.js";
import { notify, problem } from "./dialog.js";
import { field, fill, h, select } from "./dom.js";
import { t } from "./i18n.js";
import { launchProgress } from "./progress.js";
import { snippets } from "./snippets.js";

/** Fill `root` with the form of `family`. */
export async function launchForm(root, family, signal) {
  let engines;
  try {
    const type = family.model_type;
    engines = await call(path`v1/engines/${type}/${family.model_name}`, { signal });
  } catch (error) {
    fill(root, problem(error));
    return;
  }
  const usable = Object.keys(engines).filter((name) => Array.isArray(engines[name]));
  const others = Object.entries(engines).filter(([, why]) => !Array.isArray(why));
  const reasons = h(
    "details",
    {},
    h("summary", {}, t("other_engines")),
    h("ul", {}, others.map(([name, why]) => h("li", {}, h("strong", {}, name), ` ${why}`))),
  );
  if (usable.length === 0) {
    fill(root, h("h2", {}, family.model_name), h("p", {}, t("no_engine")), reasons);
    return;
  }

  const variant = variantFields(engines, usable);
  const options = optionFields();
  const problems = h("div");
  const launches = h("div");
  const copies = h("div", { class: "snippets" });
  const launchButton = h("button", { class: "primary" }, t("launch"));

  const form = h(
    "form",
    { oninput: preview, onchange: preview, onsubmit: launch },
    h("h2", {}, family.model_name),
    h("p", { class: "quiet" }, family.model_description),
    h("div", { class: "grid" }, variant.elements),
    reasons,
    h("div", { class: "grid" }, options.elements),
    problems,
    h("div", { class: "actions" }, launchButton),
  );

  const body = () => ({
    model_engine: variant.engine.value,
    model_name: family.model_name,
    ...(family.model_type !== "LLM" && { model_type: family.model_type }),
    ...variant.values(),
    ...options.values(),
  });

  function preview() {
    let texts;
    try {
      texts = snippets(body(), { hasKey: hasKey() });
      fill(problems);
    } catch (error) {
      fill(problems, problem(error));
      return;
    }
    fill(copies, Object.entries(texts).map(([name, text]) => snippet(name, text)));
  }

  async function launch(event) {
    event.preventDefault();
    launchButton.disabled = true;
    try {
      const answer = await call("v1/models?wait_ready=false", { method: "POST", body: body() });
      fill(problems);
      fill(launches, launchProgress(answer.model_uid, signal, { tellsReplicas: true }));
    } catch (error) {
      fill(problems, problem(error));
    } finally {
      launchButton.disabled = false;
    }
  }

  fill(root, form, launches, h("h3", {}, t("same_as")), copies);
  preview();
}

function snippet(name, text) {
  const copy = async () => {
    await navigator.clipboard.writeText(text);
    notify(t("copied"));
  };
  return h(
    "details",
    { name: "snippet", open: name === "CLI" },
    h("summary", {}, name),
    h("pre", { tabindex: 0 }, text),
    // Why not always: browsers have no clipboard for pages that come over plain HTTP from afar.
    navigator.clipboard && h("button", { type: "button", onclick: copy }, t("copy")),
  );
}

/** Four lists, each with what the ones before it leave. */
function variantFields(engines, usable) {
  const engine = select(usable, { onchange: fromEngine });
  const format = select([], { onchange: fromFormat });
  const size = select([], { onchange: fromSize });
  const quantization = select([]);

  const rows = () => engines[engine.value];
  const ofFormat = () => rows().filter((row) => String(row.model_format) === format.value);
  const ofSize = () =>
    ofFormat().filter((row) => String(row.model_size_in_billions) === size.value);

  function offer(list, values) {
    const kept = list.value;
    const known = [...new Set(values.filter((value) => value !== undefined).map(String))];
    fill(list, known.map((value) => h("option", { value }, value.replace(/^(\d+)_(\d+)$/, "$1.$2"))));
    if (known.includes(kept)) list.value = kept;
    list.disabled = known.length === 0;
  }
  function fromEngine() {
    offer(format, rows().map((row) => row.model_format));
    fromFormat();
  }
  function fromFormat() {
    const rows_ = format.value ? ofFormat() : rows();
    offer(size, rows_.map((row) => row.model_size_in_billions));
    fromSize();
  }
  function fromSize() {
    const rows_ = size.value ? ofSize() : rows();
    offer(quantization, rows_.flatMap((row) => row.quantizations ?? row.quantization));
  }
  fromEngine();

  const chosen = { model_format: format, model_size_in_billions: size, quantization };
  return {
    engine,
    elements: [
      field(t("engine"), engine),
      field(t("format"), format),
      field(t("size"), size),
      field(t("quantization"), quantization),
    ],
    values: () =>
      Object.fromEntries(
        Object.entries(chosen)
          .filter(([, list]) => list.value)
          .map(([name, list]) => [name, list.value]),
      ),
  };
}

function optionFields() {
  const whole = (properties) => h("input", { type: "number", min: 1, step: 1, ...properties });
  const uid = h("input", { autocomplete: "off", spellcheck: "false" });
  const directory = h("input", { autocomplete: "off", spellcheck: "false" });
  const replica = whole({ value: 1 });
  const gpus = select([["auto", t("gpu_auto")], ["none", t("gpu_none")], "1", "2", "4", "8"]);
  const context = whole();
  const sequences = whole();
  const extra = h("textarea", { rows: 3, spellcheck: "false" });

  function values() {
    const given = {};
    if (directory.value.trim()) given.model_path = directory.value.trim();
    if (uid.value.trim()) given.model_uid = uid.value.trim();
    if (Number(replica.value) > 1) given.replica = Number(replica.value);
    if (gpus.value !== "auto") given.n_gpu = gpus.value === "none" ? null : Number(gpus.value);
    if (context.value) given.context_length = Number(context.value);
    if (sequences.value) given.max_num_seqs = Number(sequences.value);
    return { ...given, ...pairsOf(extra.value) };
  }

  return {
    values,
    elements: [
      field(t("model_path"), directory, t("model_path_hint")),
      field(t("model_uid"), uid, t("model_uid_hint")),
      field(t("replicas"), replica),
      field(t("gpus"), gpus),
      field(t("context_length"), context, t("default_hint")),
      field(t("max_num_seqs"), sequences, t("default_hint")),
      field(t("more_options"), extra, t("more_options_hint")),
    ],
  };
}

/** "name = value" lines; a value that is JSON is what it says, any other is a text. */
function pairsOf(text) {
  const lines = text.split("\n").filter((line) => line.trim());
  return Object.fromEntries(
    lines.map((line) => {
      const [, name, value] = /^\s*(\w+)\s*=\s*(.*?)\s*$/.exec(line) ?? [];
      if (!name) throw new Error(t("bad_option", { line: line.trim() }));
      return [name, jsonOrText(value)];
    }),
  );
}

function jsonOrText(value) {
  try {
    return JSON.parse(value);
  } catch {
    return value;
  }
}
