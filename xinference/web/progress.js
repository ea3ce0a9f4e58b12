// SPDX-License-Identifier: Apache-2.0
// A launch that is under way: how far it is, what went wrong, and a button to cancel it.

import { call, path } from "./api.js";
import { notify, problem } from "./dialog.js";
import { every, fill, h } from "./dom.js";
import { t } from "./i18n.js";

const POLL_SECONDS = 1;
const MAX_FILES = 8;
const MEGA = 1e6;
const ENDS = ["completed", "error", "cancelled"];

/**
 * An element that follows a launch until it has ended or `signal` is aborted; with `tellsReplicas`
 * it says how each is.
 */
export function launchProgress(uid, signal, { tellsReplicas = false } = {}) {
  const stage = h("span", { role: "status" }, t("stage_pending"));
  const bar = h("progress", { max: 1, "aria-label": t("progress_of", { uid }) });
  const cancel = h("button", { type: "button", onclick: () => cancelLaunch() }, t("cancel_launch"));
  const replicas = h("ul", { class: "replicas" });
  const files = h("ul", { class: "files" });
  const element = h("div", { class: "launching" }, stage, bar, replicas, files, cancel);
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

  function tellFiles(all) {
    // Why not all: what has arrived is of no interest any more, and there can be hundreds.
    const coming = all.filter((file) => file.downloaded_bytes < file.size_bytes);
    const count = { count: all.length - coming.length, all: all.length };
    fill(files, coming.slice(0, MAX_FILES).map(fileLine),
      all.length > 0 && h("li", { class: "quiet" }, t("files_there", count)));
  }

  async function poll() {
    try {
      const launch = await call(path`v1/models/${uid}/progress`, { signal });
      tellFiles(launch.download_files);
      if (tellsReplicas) fill(replicas, (await replicasOf(uid, signal)).map(replicaLine));
      stage.textContent = `${t(`stage_${launch.stage}`)} · ${Math.round(launch.progress * 100)} %`;
      bar.value = launch.progress;
      if (!ENDS.includes(launch.stage)) return;
      ended.abort();
      if (launch.stage === "completed") {
        fill(element, h("span", { role: "status" }, t("ready", { uid })), useLink(uid));
      } else if (launch.stage === "error") {
        fill(element, problem(new Error(launch.info || (await causeOf(uid, signal)))),
          h("a", { class: "button", href: `#/logs?model=${encodeURIComponent(uid)}` }, t("page_logs")));
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

function fileLine({ file_name: name, size_bytes: size, downloaded_bytes: done }) {
  const amount = `${(done / MEGA).toFixed(1)} / ${(size / MEGA).toFixed(1)} MB`;
  return h("li", {}, name, h("progress", { max: size, value: done, "aria-label": `${name}: ${amount}` }), amount);
}

const useLink = (uid) =>
  h("a", { class: "button", href: `#/playground?model=${encodeURIComponent(uid)}` }, t("use_it"));

const replicaLine = (replica) =>
  h("li", {}, [replica.replica_model_uid, replica.state, replica.worker_address].filter(Boolean).join(" · "));

async function replicasOf(uid, signal) {
  const query = new URLSearchParams({ model_uid: uid });
  const models = await call(`v1/models/instances?${query}`, { signal });
  return models.flatMap((model) => model.replica_statuses);
}

async function causeOf(uid, signal) {
  const causes = (await replicasOf(uid, signal)).map((replica) => replica.error_message);
  return causes.filter(Boolean).join("; ") || t("cause_in_log");
}
