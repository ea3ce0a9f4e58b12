// SPDX-License-Identifier: Apache-2.0
// A text, and how a model goes on with it.

import { stream } from "../api.js";
import { problem } from "../dialog.js";
import { field, fill, h } from "../dom.js";
import { t } from "../i18n.js";
import { stopwatch } from "./answer.js";
import { modelList, samplingFields, settingsBox } from "./settings.js";

export function showCompletion(root, { models, chosen, signal }) {
  const model = modelList(models, chosen);
  const sampling = samplingFields();
  const text = h("textarea", { rows: 14, required: true });
  const figures = h("p", { class: "figures", role: "status" });
  const trouble = h("div");
  const goButton = h("button", { class: "primary" }, t("go_on"));
  const stopButton = h("button", { type: "button", disabled: true, onclick: stop }, t("stop"));
  let running = null;

  function stop() {
    running?.abort();
  }

  function setRunning(controller) {
    running = controller;
    goButton.disabled = text.readOnly = controller !== null;
    stopButton.disabled = controller === null;
  }

  async function go(event) {
    event.preventDefault();
    fill(trouble);
    figures.textContent = t("waiting");
    const controller = new AbortController();
    const clock = stopwatch();
    setRunning(controller);
    try {
      const chunks = stream("v1/completions", {
        method: "POST",
        body: { model: model.value, prompt: text.value, stream: true,
          stream_options: { include_usage: true }, ...sampling.values() },
        signal: AbortSignal.any([signal, controller.signal]),
      });
      for await (const chunk of chunks) {
        clock.count(chunk.usage);
        const more = chunk.choices?.[0]?.text;
        if (!more) continue;
        clock.tick();
        text.value += more;
        text.scrollTop = text.scrollHeight;
      }
    } catch (error) {
      if (signal.aborted) return;
      if (!controller.signal.aborted) fill(trouble, problem(error));
    } finally {
      setRunning(null);
    }
    figures.textContent = clock.figures();
  }

  fill(root, h("div", { class: "columns chat" },
    h("section", {}, field(t("model"), model), settingsBox(sampling.elements)),
    h("section", {}, h("form", { onsubmit: go }, field(t("text"), text, t("text_hint")), trouble,
      figures, h("div", { class: "actions" }, goButton, stopButton)))));
  text.focus();
}
