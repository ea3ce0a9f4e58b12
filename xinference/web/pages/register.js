// SPDX-License-Identifier: Apache-2.0
// Models of one's own: a form that writes the JSON of a family, and the families that were added.

import { call, path } from "../api.js";
import { isConfirmed, notify, problem } from "../dialog.js";
import { field, fill, h, select } from "../dom.js";
import { families } from "../families.js";
import { t } from "../i18n.js";

const ABILITIES = ["chat", "generate", "tools", "reasoning"];

export async function show(root, { signal }) {
  const known = await families(signal);
  const text = (properties) => h("input", { autocomplete: "off", spellcheck: "false", ...properties });
  const kind = select([["LLM", t("language_model")], ["embedding", t("embedding_model")],
    ["rerank", t("rerank_model")]]);
  const name = text({ required: true, pattern: "[^+\\\\\\/?%#&=\\s]+", title: t("name_hint") });
  const directory = text({ required: true, pattern: "/.*", title: t("directory_hint"),
    placeholder: "/models/my-model" });
  const size = text({ placeholder: "0_5" });
  const base = select([
    ["", t("none")],
    ...known.filter((one) => one.is_builtin && one.model_type === "LLM").map((one) => one.model_name),
  ]);
  const whole = () => h("input", { type: "number", min: 1, step: 1 });
  const [context, dimensions, maxTokens] = [whole(), whole(), whole()];
  const abilities = ABILITIES.map((ability) =>
    h("input", { type: "checkbox", value: ability, checked: ability === "chat" }));
  const persist = h("input", { type: "checkbox", checked: true });
  const json = h("textarea", { rows: 14, spellcheck: "false" });
  const problems = h("div");
  const own = h("ul", { class: "families" });

  function written() {
    const isLanguage = kind.value === "LLM";
    for (const one of languageFields) one.hidden = !isLanguage;
    for (const one of encoderFields) one.hidden = isLanguage;
    dimensionsField.hidden = kind.value !== "embedding";
    maxTokens.required = !isLanguage;
    dimensions.required = kind.value === "embedding";
    form.noValidate = false;
    const family = isLanguage ? languageFamily() : encoderFamily();
    json.value = JSON.stringify(family, null, 2);
  }

  function languageFamily() {
    const family = {
      version: 2,
      model_name: name.value.trim(),
      model_ability: abilities.filter((box) => box.checked).map((box) => box.value),
      model_specs: [{
        model_format: "pytorch",
        model_size_in_billions: size.value.trim(),
        quantization: "none",
        model_uri: directory.value.trim(),
      }],
    };
    if (base.value) family.model_family = base.value;
    if (context.value) family.context_length = Number(context.value);
    return family;
  }

  const encoderFamily = () => ({
    version: 2,
    model_name: name.value.trim(),
    ...(kind.value === "embedding" && { dimensions: Number(dimensions.value) }),
    max_tokens: Number(maxTokens.value),
    model_specs: [{ model_format: "pytorch", model_uri: directory.value.trim() }],
  });

  async function register(event) {
    event.preventDefault();
    try {
      await call(path`v1/model_registrations/${kind.value}`, {
        method: "POST",
        body: { model: json.value, persist: persist.checked },
      });
      const { model_name } = JSON.parse(json.value);
      fill(problems, h("p", { role: "status" }, t("registered", { name: model_name }), " ",
        h("a", { href: `#/launch?name=${encodeURIComponent(model_name)}` }, t("launch"))));
      await list();
    } catch (error) {
      fill(problems, problem(error));
    }
  }

  async function remove(family) {
    const title = t("unregister_title", { name: family.model_name });
    if (!(await isConfirmed(title, t("unregister_about"), t("remove")))) return;
    try {
      const { model_type, model_name } = family;
      await call(path`v1/model_registrations/${model_type}/${model_name}`, { method: "DELETE" });
      notify(t("unregistered", { name: model_name }));
      await list();
    } catch (error) {
      fill(problems, problem(error));
    }
  }

  async function list() {
    const added = (await families(signal)).filter((family) => !family.is_builtin);
    fill(own, added.length === 0 && h("li", { class: "quiet" }, t("none_registered")),
      added.map((family) => h("li", { class: "row" }, h("span", {}, family.model_name),
        h("button", { type: "button", class: "danger", onclick: () => remove(family) },
          t("remove")))));
  }

  const checkbox = (box, label) => h("label", { class: "check" }, box, " ", label);
  const languageFields = [
    field(t("size_in_billions"), size),
    field(t("base_family"), base, t("base_family_hint")),
    field(t("context_length"), context, t("default_hint")),
    h("fieldset", {}, h("legend", {}, t("ability")),
      abilities.map((box) => checkbox(box, box.value))),
  ];
  const dimensionsField = field(t("dimensions"), dimensions, t("dimensions_hint"));
  const encoderFields = [dimensionsField, field(t("most_input_tokens"), maxTokens)];
  const fields = h(
    "div",
    { class: "grid", oninput: written },
    field(t("kind"), kind),
    field(t("name"), name, t("name_hint")),
    field(t("directory"), directory, t("directory_hint")),
    languageFields,
    encoderFields,
  );
  // What is written by hand need not be in the fields.
  json.addEventListener("input", () => {
    form.noValidate = true;
  });
  const form = h("form", { onsubmit: register }, fields, checkbox(persist, t("persist")),
    h("details", {}, h("summary", {}, t("as_json")), field("JSON", json, t("json_hint"))),
    problems, h("div", { class: "actions" }, h("button", { class: "primary" }, t("register"))));
  fill(
    root,
    form,
    h("h2", {}, t("own_models")),
    own,
  );
  written();
  await list();
}
