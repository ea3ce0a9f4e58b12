// SPDX-License-Identifier: Apache-2.0
// A launch that is under way: how far it is, what went wrong, and a button to cancel it.

import { call, path } from "./api.js";
import { notify, problem } from "./dialog.js";
import { every, fill, h } from "./dom.js";
import { t } from "./i18n.js";

const POLL_SECONDS = 1;
const ENDS = ["completed", "error", "cancelled"];

/** An element that follows a launch until it has ended or `signal` is aborted. */
export function launchProgress(uid, signal) {
  const stage = h("span", { role: "status" }, t("stage_pending"));
  const bar = h("progress", { max: 1, "aria-label": t("progress_of", { uid }) });
  const cancel = h("button", { type: "button", onclick: () => cancelLaunch() }, t("cancel_launch"));
  const element = h("div", { class: "launching" }, stage, bar, cancel);
  const ended = new AbortController();

  async function cancelLaunch() {
    cancel.disabled = true;
    try {
      await call(path`v1/models/${uid}/cancel`, { method: "POST" });
      notify(t("launch_cancelled", { uid }));
    } catch (error) {
      element.append(problem(error));
      cancel.disabled = false;
    }
  }

  async function poll() {
    try {
      const launch = await call(path`v1/models/${uid}/progress`, { signal });
      stage.textContent = `${t(`stage_${launch.stage}`)} · ${Math.round(launch.progress * 100)} %`;
      bar.value = launch.progress;
      if (!ENDS.includes(launch.stage)) return;
      ended.abort();
      if (launch.stage === "completed") {
        fill(element, h("span", { role: "status" }, t("ready", { uid })), useLink(uid));
      } else if (launch.stage === "error") {
        fill(element, problem(new Error(launch.info || (await causeOf(uid, signal)))));
      } else {
        fill(element, stage);
      }
    } catch (error) {
      if (!signal.aborted) fill(stage, problem(error));
    }
  }

  every(POLL_SECONDS, AbortSignal.any([signal, ended.signal]), poll);
  return element;
}

const useLink = (uid) =>
  h("a", { class: "button", href: `#/playground?model=${encodeURIComponent(uid)}` }, t("use_it"));

async function causeOf(uid, signal) {
  const query = new URLSearchParams({ model_uid: uid });
  const models = await call(`v1/models/instances?${query}`, { signal });
  const causes = models.flatMap((model) => model.replica_statuses.map((one) => one.error_message));
  return causes.filter(Boolean).join("; ") || t("cause_in_log");
}
