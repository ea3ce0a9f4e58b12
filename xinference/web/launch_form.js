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
  const more = moreFields(family);
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
    h("details", {}, h("summary", {}, t("more_options")), h("div", { class: "grid" }, more.elements)),
    problems,
    h("div", { class: "actions" }, launchButton),
  );

  const body = () => ({
    model_engine: variant.engine.value,
    model_name: family.model_name,
    ...(family.model_type !== "LLM" && { model_type: family.model_type }),
    ...variant.values(),
    ...options.values(),
    ...more.values(),
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

  function values() {
    const given = {};
    if (directory.value.trim()) given.model_path = directory.value.trim();
    if (uid.value.trim()) given.model_uid = uid.value.trim();
    if (Number(replica.value) > 1) given.replica = Number(replica.value);
    if (gpus.value !== "auto") given.n_gpu = gpus.value === "none" ? null : Number(gpus.value);
    if (context.value) given.context_length = Number(context.value);
    if (sequences.value) given.max_num_seqs = Number(sequences.value);
    return given;
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
    ],
  };
}

/** What few launches want: where, how many with the load, its environment, any option by name. */
function moreFields(family) {
  const text = (properties) => h("input", { autocomplete: "off", spellcheck: "false", ...properties });
  const number = (properties) => h("input", { type: "number", min: 1, step: 1, ...properties });
  const lines = () => h("textarea", { rows: 2, spellcheck: "false" });
  const inputs = {
    worker_ip: text(),
    gpu_idx: text({ placeholder: "0, 1" }),
    download_hub: select([["", t("any")], "huggingface", "modelscope"]),
    min_replicas: number(),
    max_replicas: number(),
    idle_timeout: number(),
    request_limits: number(),
    enable_thinking: select([["", "–"], ["true", t("on")], ["false", t("off")]]),
  };
  const [autoload, trusts] = [0, 1].map(() => h("input", { type: "checkbox" }));
  const [packages, envs, extra] = [lines(), lines(), lines()];

  function values() {
    const filled = Object.entries(inputs).filter(([, input]) => input.value.trim());
    const given = Object.fromEntries(filled.map(([name, input]) => [name, jsonOrText(input.value.trim())]));
    if (given.gpu_idx !== undefined) given.gpu_idx = inputs.gpu_idx.value.split(",").map(Number);
    if (autoload.checked) given.autoload = true;
    if (trusts.checked) given.trust_remote_code = true;
    if (packages.value.trim()) given.virtual_env_packages = linesOf(packages.value);
    if (envs.value.trim()) given.envs = pairsOf(t("envs"), envs.value, String);
    return { ...given, ...pairsOf(t("other_options"), extra.value, jsonOrText) };
  }

  const isHybrid = (family.model_ability ?? []).includes("hybrid");
  const check = (box, label) => h("label", { class: "check" }, box, " ", label);
  return {
    values,
    elements: [
      field(t("worker"), inputs.worker_ip, t("worker_hint")),
      field(t("gpu_indices"), inputs.gpu_idx, t("gpu_indices_hint")),
      field(t("download_hub"), inputs.download_hub),
      field(t("min_replicas"), inputs.min_replicas, t("scaling_hint")),
      field(t("max_replicas"), inputs.max_replicas, t("scaling_hint")),
      field(t("idle_timeout"), inputs.idle_timeout, t("idle_hint")),
      field(t("request_limits"), inputs.request_limits, t("unlimited_hint")),
      isHybrid && field(t("thinking"), inputs.enable_thinking),
      field(t("packages"), packages, t("packages_hint")),
      field(t("envs"), envs, t("envs_hint")),
      field(t("other_options"), extra, t("other_options_hint")),
      h("div", {}, check(autoload, t("autoload")), check(trusts, t("trust_remote_code"))),
    ],
  };
}

const linesOf = (text) => text.split("\n").map((line) => line.trim()).filter(Boolean);

/** "name = value" lines, each value as `read` takes it. */
function pairsOf(label, text, read) {
  return Object.fromEntries(
    linesOf(text).map((line) => {
      const [, name, value] = /^(\w+)\s*=\s*(.*)$/.exec(line) ?? [];
      if (!name) throw new Error(t("bad_option", { label, line }));
      return [name, read(value)];
    }),
  );
}

/** A value that is JSON is what it says, any other is a text. */function jsonOrText(value) {
  try {
    return JSON.parse(value);
  } catch {
    return value;
  }
}
