// SPDX-License-Identifier: Apache-2.0
// What runs: status, replicas, load and story of each model; launches that are under way.

import { call, path } from "../api.js";
import { isConfirmed, notify, problem } from "../dialog.js";
import { every, fill, h } from "../dom.js";
import { t } from "../i18n.js";
import { modelMetrics } from "../metrics.js";
import { launchProgress } from "../progress.js";

const POLL_SECONDS = 2;
const LAUNCHING = ["CREATING", "LOADING"];

export async function show(root, { signal }) {
  const trouble = h("div");
  const list = h("div", { class: "cards" });
  const cards = new Map();
  fill(root, trouble, list);

  await every(POLL_SECONDS, signal, async () => {
    try {
      const [models, metrics] = await Promise.all([
        call("v1/models/instances", { signal }),
        modelMetrics(signal),
      ]);
      fill(trouble, models.length === 0 && nothingRuns());
      update(models, metrics);
    } catch (error) {
      if (!signal.aborted) fill(trouble, problem(error));
    }
  });

  // Why cards are kept: what has the focus, or is opened, must not be replaced under the user.
  function update(models, metrics) {
    const uids = new Set(models.map((model) => model.model_uid));
    for (const [uid, card] of cards) {
      if (uids.has(uid)) continue;
      card.element.remove();
      cards.delete(uid);
    }
    for (const model of models) {
      const uid = model.model_uid;
      if (!cards.has(uid)) {
        cards.set(uid, modelCard(model, signal));
        list.append(cards.get(uid).element);
      }
      cards.get(uid).update(model, metrics.get(uid));
    }
  }
}

const nothingRuns = () =>
  h(
    "div",
    { class: "empty" },
    h("p", {}, t("nothing_runs")),
    h("a", { class: "button primary", href: "#/launch" }, t("launch_a_model")),
  );

function modelCard(first, signal) {
  const uid = first.model_uid;
  const status = h("span", { class: "status" });
  const load = h("p", { class: "load" });
  const replicas = h("ul", { class: "replicas" });
  const launch = h("div");
  const trouble = h("div");
  const events = h("ol", { class: "events" });
  const chat = h(
    "a",
    { class: "button", href: `#/chat?model=${encodeURIComponent(uid)}` },
    t("page_chat"),
  );
  const stop = h("button", { type: "button", class: "danger", onclick: terminate }, t("terminate"));
  const story = h("details", { ontoggle: tell }, h("summary", {}, t("events")), events);
  const element = h(
    "article",
    { class: "card", "aria-label": uid },
    h("h2", {}, uid, " ", status),
    h("p", { class: "quiet" }, first.model_version.replaceAll("--", " · ").replaceAll("_", ".")),
    h("p", {}, first.model_ability.map((ability) => h("span", { class: "tag" }, ability))),
    launch,
    load,
    replicas,
    story,
    trouble,
    h("div", { class: "actions" }, chat, stop),
  );
  const speed = speedometer();
  let isLaunchShown = false;

  async function terminate() {
    const title = t("terminate_title", { uid });
    if (!(await isConfirmed(title, t("terminate_about"), t("terminate")))) return;
    stop.disabled = true;
    try {
      await call(path`v1/models/${uid}`, { method: "DELETE" });
      notify(t("terminated", { uid }));
    } catch (error) {
      fill(trouble, problem(error));
      stop.disabled = false;
    }
  }

  async function tell() {
    if (!story.open) return;
    try {
      const told = await call(path`v1/models/${uid}/events`, { signal });
      fill(events, told.reverse().map(eventLine));
    } catch (error) {
      fill(trouble, problem(error));
    }
  }

  function update(model, metrics) {
    status.textContent = model.status;
    status.dataset.status = model.status;
    chat.hidden = model.status !== "READY" || !model.model_ability.includes("chat");
    fill(replicas, model.replica_statuses.map(replicaLine));
    load.textContent = metrics ? loadOf(metrics, speed(metrics)) : "";
    const isLaunching = LAUNCHING.includes(model.status);
    if (isLaunching && !isLaunchShown) fill(launch, launchProgress(uid, signal));
    if (!isLaunching) fill(launch);
    isLaunchShown = isLaunching;
  }

  return { element, update };
}

function loadOf(metrics, tokensPerSecond) {
  const blocks = metrics.engine_num_blocks;
  const share = blocks ? Math.round((100 * (metrics.engine_num_blocks_used ?? 0)) / blocks) : 0;
  return t("load", {
    running: metrics.engine_num_running ?? 0,
    waiting: metrics.engine_num_waiting ?? 0,
    kv: share,
    speed: tokensPerSecond.toFixed(0),
  });
}

/** A function that takes metrics in turn and returns tokens per second since it was last called. */
function speedometer() {
  let last = null;
  return (metrics) => {
    const now = { seconds: performance.now() / 1000, tokens: metrics.engine_generated_tokens_total };
    const passed = last && now.seconds - last.seconds;
    const made = last && now.tokens - last.tokens;
    last = now;
    // A restarted replica counts from 0 again.
    return passed && made > 0 ? made / passed : 0;
  };
}

const replicaLine = (replica) =>
  h(
    "li",
    {},
    `${replica.replica_model_uid} · ${replica.state} · ${replica.worker_address ?? "–"}`,
    replica.gpu_idx?.length ? ` · GPU ${replica.gpu_idx.join(", ")}` : "",
    replica.num_restarts ? ` · ${t("restarts", { count: replica.num_restarts })}` : "",
    replica.error_message && h("div", { class: "problem" }, replica.error_message),
  );

const eventLine = (event) =>
  h(
    "li",
    {},
    h("time", {}, new Date(event.event_ts * 1000).toLocaleString()),
    ` ${event.event_type === "INFO" ? "" : `${event.event_type}: `}${event.event_content}`,
  );
