// SPDX-License-Identifier: Apache-2.0
// The playground: one tab for each way to use a model. The address names the tab and the model.

import { call } from "../api.js";
import { fill, h } from "../dom.js";
import { t } from "../i18n.js";
import { showChat } from "../playground/chat.js";
import { showCompletion } from "../playground/completion.js";
import { showRerank } from "../playground/rerank.js";
import { showSimilarity } from "../playground/similarity.js";

const can = (ability) => (model) => (model.model_ability ?? []).includes(ability);
const isOf = (type) => (model) => model.model_type === type;

const TABS = {
  chat: { show: showChat, takes: can("chat") },
  completion: { show: showCompletion, takes: isOf("LLM") },
  similarity: { show: showSimilarity, takes: isOf("embedding") },
  rerank: { show: showRerank, takes: isOf("rerank") },
};

export async function show(root, { signal, query }) {
  const { data } = await call("v1/models", { signal });
  const named = data.find((model) => model.id === query.get("model"));
  const fits = (tab) => TABS[tab].takes(named);
  const tab =
    [query.get("tab"), named && Object.keys(TABS).find(fits)].find((name) => name in TABS) ?? "chat";
  const links = Object.keys(TABS).map((name) => {
    const address = new URLSearchParams({ tab: name, ...(named && { model: named.id }) });
    const current = name === tab ? "page" : null;
    return h("a", { href: `#/playground?${address}`, "aria-current": current }, t(`tab_${name}`));
  });
  const body = h("div");
  fill(root, h("nav", { class: "tabs", "aria-label": t("ways_to_use") }, links), body);

  const models = data.filter(TABS[tab].takes);
  if (models.length === 0) {
    fill(body, nothingThere(tab));
    return;
  }
  const chosen = models.includes(named) ? named : models[0];
  TABS[tab].show(body, { models, chosen, signal });
}

const nothingThere = (tab) =>
  h(
    "div",
    { class: "empty" },
    h("p", {}, t(`nothing_${tab}`)),
    h("a", { class: "button primary", href: "#/launch" }, t("launch_a_model")),
  );
