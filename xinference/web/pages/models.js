// SPDX-License-Identifier: Apache-2.0
// What runs: status, replicas, load and story of each model; launches that are under way.

import { call, path } from "../api.js";
import { chart, percent } from "../chart.js";
import { isConfirmed, notify, problem } from "../dialog.js";
import { every, fill, h } from "../dom.js";
import { eventLine, eventsOf } from "../events.js";
import { lastHour } from "../history.js";
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
      const [models, metrics, hour] = await Promise.all([
        call("v1/models/instances", { signal }),
        modelMetrics(signal),
        lastHour(signal),
      ]);
      fill(trouble, models.length === 0 && nothingRuns());
      update(models, metrics, hour);
    } catch (error) {
      if (!signal.aborted) fill(trouble, problem(error));
    }
  });

  // Why cards are kept: what has the focus, or is opened, must not be replaced under the user.
  function update(models, metrics, hour) {
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
      cards.get(uid).update(model, metrics.get(uid), hour);
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
  const charts = h("div");
  const replicas = h("ul", { class: "replicas" });
  const launch = h("div");
  const trouble = h("div");
  const events = h("ol", { class: "events" });
  const use = h(
    "a",
    { class: "button", href: `#/playground?model=${encodeURIComponent(uid)}` },
    t("use_it"),
  );
  const log = h("a", { class: "button", href: `#/logs?model=${encodeURIComponent(uid)}` }, t("page_logs"));
  const add = h("button", { type: "button", onclick: () => act(add, addReplica) }, t("add_replica"));
  const stop = h("button", { type: "button", class: "danger", onclick: () => act(stop, terminate) }, t("terminate"));
  const story = h("details", { ontoggle: tell }, h("summary", {}, t("events")), events);
  const element = h(
    "article",
    { class: "card", "aria-label": uid },
    h("h2", {}, uid, " ", status),
    h("p", { class: "quiet" }, first.model_version.replaceAll("--", " · ").replaceAll("_", ".")),
    h("p", {}, first.model_ability.map((ability) => h("span", { class: "tag" }, ability))),
    launch,
    load,
    charts,
    replicas,
    story,
    trouble,
    h("div", { class: "actions" }, use, add, log, stop),
  );
  const speed = speedometer();
  const lines = new Map();
  let isLaunchShown = false;

  /** Do what a button says, once at a time; what goes wrong is told on the card. */
  async function act(button, action) {
    button.disabled = true;
    fill(trouble);
    try {
      await action();
    } catch (error) {
      if (!signal.aborted) fill(trouble, problem(error));
    } finally {
      button.disabled = false;
    }
  }

  async function terminate() {
    const title = t("terminate_title", { uid });
    if (!(await isConfirmed(title, t("terminate_about"), t("terminate")))) return;
    await call(path`v1/models/${uid}`, { method: "DELETE" });
    notify(t("terminated", { uid }));
  }

  async function addReplica() {
    await call(path`v1/models/${uid}/replicas`, { method: "POST", body: { replica: 1 }, signal });
    notify(t("replica_added", { uid }));
  }

  async function removeReplica(replica) {
    const name = replica.replica_model_uid;
    const title = t("remove_replica_title", { name });
    if (!(await isConfirmed(title, t("remove_replica_about"), t("remove")))) return;
    await call(path`v1/models/${uid}/replicas/${replica.replica_id}`, { method: "DELETE" });
  }

  async function tell() {
    if (!story.open) return;
    try {
      fill(events, (await eventsOf([uid], signal)).map((event) => eventLine(event)));
    } catch (error) {
      fill(trouble, problem(error));
    }
  }

  function update(model, metrics, hour) {
    status.textContent = model.status;
    status.dataset.status = model.status;
    // One that sleeps is woken by its first request.
    use.hidden = !["READY", "ASLEEP"].includes(model.status);
    add.hidden = model.status !== "READY";
    updateReplicas(model.replica_statuses);
    fill(charts, metrics && chartsOf(uid, hour));
    load.textContent = metrics ? loadOf(metrics, speed(metrics)) : "";
    const isLaunching = LAUNCHING.includes(model.status);
    if (isLaunching && !isLaunchShown) fill(launch, launchProgress(uid, signal));
    if (!isLaunching) fill(launch);
    isLaunchShown = isLaunching;
  }

  // Why lines are kept: one of their buttons may have the focus.
  function updateReplicas(statuses) {
    const names = new Set(statuses.map((replica) => replica.replica_model_uid));
    for (const [name, line] of lines) {
      if (names.has(name)) continue;
      line.element.remove();
      lines.delete(name);
    }
    for (const replica of statuses) {
      const name = replica.replica_model_uid;
      if (!lines.has(name)) {
        const line = replicaLine((button) => act(button, () => removeReplica(replica)));
        lines.set(name, line);
        replicas.append(line.element);
      }
      lines.get(name).update(replica, statuses.length > 1);
    }
  }

  return { element, update };
}

function chartsOf(uid, hour) {
  const points = (reading) => hour.map((sample) => [sample.time, sample.models[uid]?.[reading]]);
  return [
    chart(t("tokens_per_second"), points("tokens_per_second"), { format: (value) => value.toFixed(0) }),
    chart(t("kv_cache"), points("kv_share"), { most: 1, format: percent }),
  ];
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

function replicaLine(remove) {
  const text = h("span");
  const trouble = h("div");
  const button = h("button", { type: "button", class: "small", onclick: () => remove(button) }, t("remove"));
  const element = h("li", {}, text, " ", button, trouble);

  function update(replica, isRemovable) {
    text.textContent = [
      replica.replica_model_uid,
      replica.state,
      replica.worker_address ?? "–",
      replica.gpu_idx?.length && `GPU ${replica.gpu_idx.join(", ")}`,
      replica.num_restarts && t("restarts", { count: replica.num_restarts }),
    ].filter(Boolean).join(" · ");
    button.hidden = !isRemovable;
    button.setAttribute("aria-label", `${t("remove")} ${replica.replica_model_uid}`);
    fill(trouble, replica.error_message && h("div", { class: "problem" }, replica.error_message));
  }

  return { element, update };
}
