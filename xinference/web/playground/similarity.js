// SPDX-License-Identifier: Apache-2.0
// How alike texts are: their embeddings, and the cosine of each pair.

import { call } from "../api.js";
import { problem } from "../dialog.js";
import { field, fill, h } from "../dom.js";
import { t } from "../i18n.js";
import { modelList } from "./settings.js";

const MAX_TEXTS = 20;

export function showSimilarity(root, { models, chosen, signal }) {
  const model = modelList(models, chosen);
  const texts = h("textarea", { rows: 6, required: true }, t("example_texts"));
  const button = h("button", { class: "primary" }, t("compare"));
  const result = h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": t("tab_similarity") });

  async function compare(event) {
    event.preventDefault();
    const input = linesOf(texts.value).slice(0, MAX_TEXTS);
    if (input.length === 0) return;
    button.disabled = true;
    const sent = performance.now();
    try {
      const body = { model: model.value, input };
      const { data, usage } = await call("v1/embeddings", { method: "POST", body, signal });
      const vectors = data.map((one) => unit(one.embedding));
      const figures = t("vectors", { count: vectors.length, size: vectors[0].length,
        tokens: usage.total_tokens, ms: Math.round(performance.now() - sent) });
      fill(result, table(input, vectors), h("p", { class: "figures" }, figures));
    } catch (error) {
      if (!signal.aborted) fill(result, problem(error));
    } finally {
      button.disabled = false;
    }
  }

  const hint = t("texts_hint", { count: MAX_TEXTS });
  fill(root, h("div", { class: "columns" },
    h("section", {}, h("form", { onsubmit: compare }, field(t("model"), model),
      field(t("texts"), texts, hint), h("div", { class: "actions" }, button))),
    h("section", {}, result)));
  fill(result, h("p", { class: "empty" }, t("nothing_compared")));
}

/** The lines of a text that are not empty. */
export const linesOf = (text) => text.split("\n").map((line) => line.trim()).filter(Boolean);

function unit(vector) {
  const length = Math.hypot(...vector) || 1;
  return vector.map((value) => value / length);
}

const dot = (a, b) => a.reduce((sum, value, i) => sum + value * b[i], 0);

function table(texts, vectors) {
  const cell = (a, b) => {
    const cosine = dot(a, b);
    // Ten shades, of which the strongest are the most alike.
    return h("td", { "data-shade": Math.max(0, Math.min(9, Math.floor(cosine * 10))) }, cosine.toFixed(3));
  };
  return h(
    "table",
    {},
    h("thead", {}, h("tr", {}, h("td"), texts.map((_, i) => h("th", { scope: "col" }, String(i + 1))))),
    h("tbody", {}, texts.map((text, i) =>
      h("tr", {}, h("th", { scope: "row" }, `${i + 1} ${text}`),
        vectors.map((other) => cell(vectors[i], other))))),
  );
}
