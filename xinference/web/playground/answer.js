// SPDX-License-Identifier: Apache-2.0
// One answer as it grows: thoughts, text, calls of tools, and at the end its figures.

import { fill, h } from "../dom.js";
import { t } from "../i18n.js";
import { rendered } from "../rendered.js";

/** The view of one answer to a chat; `add` takes its chunks, `message` is what it said. */
export function answerView() {
  const thoughts = h("p", { class: "prose" });
  const thinking = h("details", { class: "thoughts", open: true, hidden: true },
    h("summary", {}, t("thoughts")), thoughts);
  const body = h("div", {}, h("p", { class: "quiet" }, t("waiting")));
  const tools = h("div");
  const figures = h("p", { class: "figures" });
  const element = h("article", { class: "turn assistant", "aria-label": t("model") },
    thinking, body, tools, figures);
  const clock = stopwatch();
  const calls = [];
  let content = "";
  let growing = null;

  function add(chunk) {
    clock.count(chunk.usage);
    const delta = chunk.choices?.[0]?.delta ?? {};
    if (!delta.content && !delta.reasoning_content && !delta.tool_calls) return;
    clock.tick();
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
    for (const part of delta.tool_calls ?? []) addCall(part);
  }

  function addCall({ index, id, function: part }) {
    calls[index] ??= { id, type: "function", function: { name: "", arguments: "" } };
    calls[index].function.name += part.name ?? "";
    calls[index].function.arguments += part.arguments ?? "";
    if (content === "") fill(body);
    fill(tools, calls.map((call) =>
      h("pre", { tabindex: 0 }, `${call.function.name}(${call.function.arguments})`)));
  }

  function end(note) {
    fill(body, rendered(content), note);
    figures.textContent = clock.figures();
  }

  const message = () => {
    if (!content && calls.length === 0) return null;
    const said = { role: "assistant", content: content || null };
    return calls.length ? { ...said, tool_calls: calls } : said;
  };
  return { element, add, end, message };
}

/** Measures an answer from now on: when the first token came, and how fast the others. */
export function stopwatch() {
  const sent = performance.now();
  let first = null;
  let usage = null;

  return {
    tick() {
      first ??= performance.now();
    },
    count(counted) {
      usage = counted ?? usage;
    },
    figures() {
      if (first === null) return "";
      const last = performance.now();
      const words = [t("first_token", { ms: Math.round(first - sent) })];
      if (usage) {
        // The first token was there when the clock of the others started.
        const speed = (1000 * (usage.completion_tokens - 1)) / (last - first);
        words.push(t("num_tokens", { asked: usage.prompt_tokens, made: usage.completion_tokens }));
        if (usage.completion_tokens > 1) words.push(t("speed", { speed: speed.toFixed(1) }));
      }
      return words.join(" · ");
    },
  };
}
