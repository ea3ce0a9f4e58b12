// SPDX-License-Identifier: Apache-2.0
// Chat with a running model, or the same chat with two side by side, as their answers come.

import { stream } from "../api.js";
import { problem } from "../dialog.js";
import { field, fill, h, select } from "../dom.js";
import { t } from "../i18n.js";
import { answerView } from "./answer.js";
import { modelList, samplingFields, sendOnEnter, settingsBox } from "./settings.js";

export function showChat(root, { models, chosen, signal }) {
  const system = h("textarea", { rows: 2 });
  const sampling = samplingFields();
  const tools = h("textarea", { rows: 3, spellcheck: "false" });
  const thinking = select([["", t("as_launched")], ["true", t("on")], ["false", t("off")]]);
  const text = h("textarea", { rows: 3, required: true, onkeydown: sendOnEnter });
  const sendButton = h("button", { class: "primary" }, t("send"));
  const stopButton = h("button", { type: "button", onclick: stop }, t("stop"));
  const clearButton = h("button", { type: "button", onclick: clear }, t("new_chat"));
  const trouble = h("div");
  const form = h("form", { class: "ask", onsubmit: send }, field(t("message"), text, t("enter_hint")),
    trouble, h("div", { class: "actions" }, sendButton, stopButton, clearButton));
  const lanes = h("div", { class: "lanes" });
  const first = conversation(models, chosen, { parameters, onchange: update, signal });
  const second = conversation(models, chosen, { parameters, onchange: update, signal });
  const twice = h("input", { type: "checkbox", onchange: compare });
  let shown = [first];

  function parameters(model) {
    const body = sampling.values();
    if (thinking.value && model.model_ability.includes("hybrid")) {
      body.enable_thinking = thinking.value === "true";
    }
    if (tools.value.trim()) body.tools = JSON.parse(tools.value);
    const instructions = system.value.trim();
    return { body, first: instructions ? [{ role: "system", content: instructions }] : [] };
  }

  function update() {
    const isRunning = shown.some((lane) => lane.isRunning());
    sendButton.disabled = isRunning;
    stopButton.disabled = !isRunning;
  }

  function compare() {
    if (!twice.checked) second.stop();
    shown = twice.checked ? [first, second] : [first];
    fill(lanes, shown.map((lane) => lane.element));
    update();
  }

  function stop() {
    for (const lane of shown) lane.stop();
  }

  function clear() {
    for (const lane of [first, second]) lane.clear();
    text.focus();
  }

  async function send(event) {
    event.preventDefault();
    const question = text.value;
    if (!question.trim() || shown.some((lane) => lane.isRunning())) return;
    try {
      if (tools.value.trim()) JSON.parse(tools.value);
      fill(trouble);
    } catch (error) {
      fill(trouble, problem(new Error(`${t("tools")}: ${error.message}`)));
      return;
    }
    text.value = "";
    const wereAnswered = await Promise.all(shown.map((lane) => lane.ask(question)));
    // Why: a question that nobody answered is to be asked again, maybe in other words.
    if (!wereAnswered.some(Boolean)) text.value ||= question;
  }

  compare();
  const settings = settingsBox(
    field(t("system_prompt"), system),
    sampling.elements,
    models.some((model) => model.model_ability.includes("hybrid")) && field(t("thinking"), thinking),
    field(t("tools"), tools, t("tools_hint")),
    h("label", { class: "check" }, twice, " ", t("two_models")),
  );
  fill(root, h("div", { class: "columns chat" },
    h("section", {}, settings), h("section", {}, lanes, form)));
  text.focus();
}

/** One model and what was said with it. `ask` resolves to whether there was an answer. */
function conversation(models, chosen, { parameters, onchange, signal }) {
  const turns = [];
  let running = null;
  const model = modelList(models, chosen);
  const log = h("div", { class: "log", role: "log", "aria-label": t("conversation"), tabindex: 0 });
  const element = h("div", { class: "lane" }, field(t("model"), model), log);

  const isRunning = () => running !== null;
  const stop = () => running?.abort();

  function clear() {
    stop();
    turns.length = 0;
    fill(log);
  }

  async function ask(question) {
    const turn = { role: "user", content: question };
    turns.push(turn);
    log.append(h("article", { class: "turn user", "aria-label": t("you") },
      h("p", { class: "prose" }, question)));
    const isAnswered = await answer();
    // Why: a question without an answer would be asked again with the next one.
    if (!isAnswered && turns.includes(turn)) turns.splice(turns.indexOf(turn), 1);
    return isAnswered;
  }

  async function answer() {
    const view = answerView();
    log.append(view.element);
    const controller = new AbortController();
    running = controller;
    onchange();
    try {
      const { body, first } = parameters(models.find((one) => one.id === model.value));
      const chunks = stream("v1/chat/completions", {
        method: "POST",
        body: { model: model.value, stream: true, stream_options: { include_usage: true }, ...body,
          messages: [...first, ...turns] },
        signal: AbortSignal.any([signal, controller.signal]),
      });
      for await (const chunk of chunks) {
        view.add(chunk);
        log.scrollTop = log.scrollHeight;
      }
      view.end();
    } catch (error) {
      if (signal.aborted) return false;
      const isStopped = controller.signal.aborted;
      view.end(isStopped ? h("p", { class: "quiet" }, t("stopped")) : problem(error));
    } finally {
      if (running === controller) running = null;
      onchange();
    }
    const message = view.message();
    if (message === null || !log.contains(view.element)) return false;
    turns.push(message);
    if (message.tool_calls) log.append(toolResults(message.tool_calls));
    log.scrollTop = log.scrollHeight;
    return true;
  }

  /** A form that stands for the program: what the tools that were called would return. */
  function toolResults(calls) {
    const inputs = calls.map(() => h("textarea", { rows: 1, required: true }));
    const results = h(
      "form",
      { class: "turn user", "aria-label": t("tool_results"), onsubmit: give },
      calls.map((one, i) => field(t("result_of", { name: one.function.name }), inputs[i])),
      h("div", { class: "actions" }, h("button", {}, t("give_results"))),
    );
    async function give(event) {
      event.preventDefault();
      if (isRunning()) return;
      for (const element of results.elements) element.disabled = true;
      calls.forEach((one, i) =>
        turns.push({ role: "tool", tool_call_id: one.id, content: inputs[i].value }));
      await answer();
    }
    return results;
  }

  return { element, ask, stop, clear, isRunning };
}
