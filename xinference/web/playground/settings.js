// SPDX-License-Identifier: Apache-2.0
// What both ways to write text have: the choice of a model, and how its tokens are drawn.

import { field, h, select } from "../dom.js";
import { t } from "../i18n.js";

/** A list of models by uid. */
export function modelList(models, chosen, properties = {}) {
  const list = select(models.map((model) => model.id), properties);
  list.value = chosen.id;
  return list;
}

/** Fields of sampling parameters: `elements`, and `values()` with those that were filled in. */
export function samplingFields() {
  const number = (properties) => h("input", { type: "number", min: 0, ...properties });
  const inputs = {
    temperature: number({ max: 2, step: 0.1 }),
    top_p: number({ max: 1, step: 0.05 }),
    max_tokens: number({ min: 1, step: 1 }),
    seed: number({ step: 1 }),
    top_k: number({ min: 1, step: 1 }),
    presence_penalty: number({ min: -2, max: 2, step: 0.1 }),
    frequency_penalty: number({ min: -2, max: 2, step: 0.1 }),
  };
  const labels = { temperature: t("temperature"), max_tokens: t("max_tokens") };
  const stop = h("textarea", { rows: 2, spellcheck: "false" });
  return {
    elements: [
      h("div", { class: "pairs" }, Object.entries(inputs).map(([name, input]) =>
        field(labels[name] ?? name, input))),
      h("small", {}, t("default_hint")),
      field("stop", stop, t("stop_hint")),
    ],
    values: () => ({
      ...Object.fromEntries(
        Object.entries(inputs)
          .filter(([, input]) => input.value !== "")
          .map(([name, input]) => [name, Number(input.value)]),
      ),
      ...(stop.value && { stop: stop.value.split("\n").filter(Boolean) }),
    }),
  };
}

/** Settings beside the page's work, folded away where there is no room for them. */
export const settingsBox = (...fields) =>
  h(
    "details",
    { class: "sampling", open: matchMedia("(min-width: 60rem)").matches },
    h("summary", {}, t("settings")),
    fields,
  );

/** Send with Enter; Shift + Enter begins a line. */
export function sendOnEnter(event) {
  // Why isComposing: Enter also ends the choice of a Chinese character.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  event.target.form.requestSubmit();
}
