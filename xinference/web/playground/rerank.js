// SPDX-License-Identifier: Apache-2.0
// Documents in the order in which they answer a question.

import { call } from "../api.js";
import { problem } from "../dialog.js";
import { field, fill, h } from "../dom.js";
import { t } from "../i18n.js";
import { modelList } from "./settings.js";
import { linesOf } from "./similarity.js";

export function showRerank(root, { models, chosen, signal }) {
  const model = modelList(models, chosen);
  const question = h("input", { required: true, value: t("example_query") });
  const documents = h("textarea", { rows: 8, required: true }, t("example_documents"));
  const button = h("button", { class: "primary" }, t("tab_rerank"));
  const result = h("div");

  async function rerank(event) {
    event.preventDefault();
    const given = linesOf(documents.value);
    if (given.length === 0) return;
    button.disabled = true;
    const sent = performance.now();
    try {
      const body = { model: model.value, query: question.value, documents: given };
      const { results } = await call("v1/rerank", { method: "POST", body, signal });
      const lines = results.map(({ index, relevance_score: score }) =>
        h("li", {}, given[index], " ", h("span", { class: "tag" }, score.toFixed(4))));
      const ms = Math.round(performance.now() - sent);
      fill(result, h("ol", {}, lines), h("p", { class: "figures" }, t("took", { ms })));
    } catch (error) {
      if (!signal.aborted) fill(result, problem(error));
    } finally {
      button.disabled = false;
    }
  }

  fill(root, h("div", { class: "columns" },
    h("section", {}, h("form", { onsubmit: rerank }, field(t("model"), model),
      field(t("query"), question), field(t("documents"), documents, t("documents_hint")),
      h("div", { class: "actions" }, button))),
    h("section", { "aria-live": "polite" }, result)));
  fill(result, h("p", { class: "empty" }, t("nothing_ranked")));
}
