// SPDX-License-Identifier: Apache-2.0
// The playground: chat with a running model, as its answer comes.

import { call, stream } from "../api.js";
import { problem } from "../dialog.js";
import { field, fill, h, select } from "../dom.js";
import { t } from "../i18n.js";
import { rendered } from "../rendered.js";

export async function show(root, { signal, query }) {
  const { data } = await call("v1/models", { signal });
  const models = data.filter((model) => (model.model_ability ?? []).includes("chat"));
  if (models.length === 0) {
    fill(root, h("div", { class: "empty" }, h("p", {}, t("nothing_to_chat")),
      h("a", { class: "button primary", href: "#/launch" }, t("launch_a_model"))));
    return;
  }

  const turns = [];
  let running = null;
  const model = select(models.map((one) => one.id), { onchange: showThinking });
  if (models.some((one) => one.id === query.get("model"))) model.value = query.get("model");
  const system = h("textarea", { rows: 2 });
  const number = (properties) => h("input", { type: "number", min: 0, ...properties });
  const temperature = number({ max: 2, step: 0.1 });
  const topP = number({ max: 1, step: 0.05 });
  const maxTokens = number({ min: 1, step: 1 });
  const thinking = select([["", t("as_launched")], ["true", t("on")], ["false", t("off")]]);
  const thinkingField = field(t("thinking"), thinking);
  const log = h("div", { class: "log", role: "log", "aria-label": t("conversation"), tabindex: 0 });
  const text = h("textarea", { rows: 3, required: true, onkeydown: sendOnEnter });
  const sendButton = h("button", { class: "primary" }, t("send"));
  const stopButton = h("button", { type: "button", onclick: () => running?.abort() }, t("stop"));
  const clearButton = h("button", { type: "button", onclick: clear }, t("new_chat"));
  const form = h("form", { class: "ask", onsubmit: send }, field(t("message"), text, t("enter_hint")),
    h("div", { class: "actions" }, sendButton, stopButton, clearButton));

  function showThinking() {
    const chosen = models.find((one) => one.id === model.value);
    thinkingField.hidden = !chosen.model_ability.includes("hybrid");
  }

  function sendOnEnter(event) {
    // Why isComposing: Enter also ends the choice of a Chinese character.
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    form.requestSubmit();
  }

  function clear() {
    running?.abort();
    turns.length = 0;
    fill(log);
    text.focus();
  }

  function setRunning(controller) {
    running = controller;
    sendButton.disabled = controller !== null;
    stopButton.disabled = controller === null;
  }

  function requestBody() {
    const body = { model: model.value, stream: true, stream_options: { include_usage: true } };
    if (temperature.value) body.temperature = Number(temperature.value);
    if (topP.value) body.top_p = Number(topP.value);
    if (maxTokens.value) body.max_tokens = Number(maxTokens.value);
    if (thinking.value && !thinkingField.hidden) body.enable_thinking = thinking.value === "true";
    const instructions = system.value.trim();
    const first = instructions ? [{ role: "system", content: instructions }] : [];
    return { ...body, messages: [...first, ...turns] };
  }

  async function send(event) {
    event.preventDefault();
    if (running || !text.value.trim()) return;
    const question = { role: "user", content: text.value };
    turns.push(question);
    const asked = h("article", { class: "turn user", "aria-label": t("you") },
      h("p", { class: "prose" }, text.value));
    const answer = answerView();
    log.append(asked, answer.element);
    text.value = "";
    const controller = new AbortController();
    setRunning(controller);
    try {
      const options = {
        method: "POST",
        body: requestBody(),
        signal: AbortSignal.any([signal, controller.signal]),
      };
      for await (const chunk of stream("v1/chat/completions", options)) {
        answer.add(chunk);
        log.scrollTop = log.scrollHeight;
      }
      answer.end();
    } catch (error) {
      if (signal.aborted) return;
      answer.end(controller.signal.aborted ? h("p", { class: "quiet" }, t("stopped")) : problem(error));
    } finally {
      if (running === controller) setRunning(null);
    }
    if (!turns.includes(question)) return; // The chat was cleared meanwhile.
    if (answer.content()) {
      turns.push({ role: "assistant", content: answer.content() });
    } else {
      // Why: a question without an answer would be asked again with the next one.
      turns.splice(turns.indexOf(question), 1);
      text.value ||= question.content;
    }
    log.scrollTop = log.scrollHeight;
  }

  showThinking();
  setRunning(null);
  const settings = h(
    "details",
    { class: "sampling", open: matchMedia("(min-width: 60rem)").matches },
    h("summary", {}, t("settings")),
    field(t("system_prompt"), system),
    field(t("temperature"), temperature, t("default_hint")),
    field("top_p", topP, t("default_hint")),
    field(t("max_tokens"), maxTokens, t("default_hint")),
    thinkingField,
  );
  fill(root, h("div", { class: "columns chat" },
    h("section", {}, field(t("model"), model), settings), h("section", {}, log, form)));
  text.focus();
}

/** One answer as it grows: thoughts, text, and at the end its figures. */
function answerView() {
  const thoughts = h("p", { class: "prose" });
  const thinking = h("details", { class: "thoughts", open: true, hidden: true },
    h("summary", {}, t("thoughts")), thoughts);
  const body = h("div", {}, h("p", { class: "quiet" }, t("waiting")));
  const figures = h("p", { class: "figures" });
  const element = h("article", { class: "turn assistant", "aria-label": t("model") },
    thinking, body, figures);
  const sent = performance.now();
  let first = null;
  let content = "";
  let usage = null;
  let growing = null;

  function add(chunk) {
    usage = chunk.usage ?? usage;
    const delta = chunk.choices?.[0]?.delta ?? {};
    if (!delta.content && !delta.reasoning_content) return;
    first ??= performance.now();
    if (delta.reasoning_content) {
      if (thinking.hidden) fill(body);
      thinking.hidden = false;
      thoughts.append(delta.reasoning_content);
    }
    if (delta.content) {
      content += delta.content;
      if (growing === null) {
        growing = h("p", { class: "prose" });
        fill(body, growing);
        thinking.open = false;
      }
      growing.append(delta.content);
    }
  }

  function end(note) {
    const last = performance.now();
    fill(body, rendered(content), note);
    if (first === null) return;
    const words = [t("first_token", { ms: Math.round(first - sent) })];
    if (usage) {
      // The first token was there when the clock of the others started.
      const speed = (1000 * (usage.completion_tokens - 1)) / (last - first);
      words.push(t("num_tokens", { asked: usage.prompt_tokens, made: usage.completion_tokens }));
      if (usage.completion_tokens > 1) words.push(t("speed", { speed: speed.toFixed(1) }));
    }
    figures.textContent = words.join(" · ");
  }

  return { element, add, end, content: () => content };
}
