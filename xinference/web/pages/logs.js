// SPDX-License-Identifier: Apache-2.0
// What models and hosts log, as it comes, and what happened to them beside it.

import { ApiError, call, path, stream } from "../api.js";
import { problem } from "../dialog.js";
import { every, field, fill, h, pause, select } from "../dom.js";
import { eventLine, eventsOf } from "../events.js";
import { t } from "../i18n.js";
import { logView } from "../log_view.js";

const LEVELS = ["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"];
const COUNTS = ["100", "500", "2000"];
const RETRY_SECONDS = 3;
const EVENT_SECONDS = 5;
const MAX_EVENTS = 50;
const SUPERVISOR = "supervisor";

export async function show(root, { signal, query }) {
  const [models, workers] = await Promise.all([
    call("v1/models/instances", { signal }),
    call("v1/workers", { signal }),
  ]);
  const uids = models.map((model) => model.model_uid);
  // Why: a log is there after its model is gone, and of one that never came up.
  const named = query.get("model");
  if (named && !uids.includes(named)) uids.push(named);
  const hosts = workers.map((worker) => worker["work-ip"]);

  const source = sourceList(uids, hosts);
  const replica = select([]);
  const replicaField = field(t("replica"), replica);
  const level = select(LEVELS, { onchange: begin });
  const count = select(COUNTS, { onchange: begin });
  const follow = h("input", { type: "checkbox", checked: true, onchange: begin });
  const trouble = h("div");
  const silent = h("div");
  const view = logView();
  const events = h("ol", { class: "events", tabindex: 0, "aria-label": t("events") });
  let reading = new AbortController();
  let replicas = "";

  function begin() {
    reading.abort();
    reading = new AbortController();
    view.clear();
    fill(trouble);
    fill(silent);
    remember();
    read(AbortSignal.any([signal, reading.signal]));
    tellEvents();
  }

  const chosen = () => JSON.parse(source.value);

  function asked() {
    const { model, node } = chosen();
    const words = new URLSearchParams({ lines: count.value, level: level.value });
    if (node) words.set("node", node);
    if (model && replica.value) words.set("replica", replica.value);
    return [model ? path`v1/models/${model}/logs` : "v1/cluster/logs", words];
  }

  async function read(stopped) {
    let cursor = null;
    while (!stopped.aborted) {
      const [route, words] = asked();
      if (follow.checked) words.set("follow", "true");
      if (cursor) words.set("cursor", cursor);
      try {
        const batches = follow.checked
          ? stream(`${route}?${words}`, { signal: stopped })
          : [await call(`${route}?${words}`, { signal: stopped })];
        for await (const batch of batches) {
          cursor = batch.cursor;
          fill(trouble);
          take(batch);
        }
        if (!follow.checked) return;
      } catch (error) {
        if (stopped.aborted) return;
        fill(trouble, problem(error));
        if (error instanceof ApiError && error.status < 500) return;
        await pause(RETRY_SECONDS, stopped);
      }
    }
  }

  function take(batch) {
    view.add(batch.lines);
    fill(silent, batch.silent.length > 0 && h("div", { class: "problem", role: "alert" },
      batch.silent.map(({ node, problem: why }) => h("p", {}, t("silent_host", { node, why })))));
  }

  function remember() {
    const { model } = chosen();
    const words = new URLSearchParams(model ? { model } : chosen());
    history.replaceState(null, "", `#/logs?${words}`);
    replicaField.hidden = !model;
  }

  // Why only where they differ: a list that is open must not change under the user.
  function offerReplicas(known) {
    const { model } = chosen();
    const statuses = known.find((one) => one.model_uid === model)?.replica_statuses ?? [];
    const indices = statuses.map((one) => String(one.replica_id));
    if (replicas === `${model} ${indices}`) return;
    replicas = `${model} ${indices}`;
    const kept = replica.value;
    const options = [["", t("all")], ...indices.map((index) => [index, index])];
    fill(replica, options.map(([value, label]) => h("option", { value }, label)));
    replica.value = indices.includes(kept) ? kept : "";
  }

  async function tellEvents() {
    try {
      const known = await call("v1/models/instances", { signal });
      const { model } = chosen();
      offerReplicas(known);
      const running = known.map((one) => one.model_uid);
      const told = await eventsOf(model ? running.filter((uid) => uid === model) : running, signal);
      fill(events, told.length === 0 && h("li", { class: "quiet" }, t("no_events")),
        told.slice(0, MAX_EVENTS).map((event) => eventLine(event, model ? "" : event.model_uid)));
    } catch (error) {
      if (!signal.aborted) fill(events, h("li", { class: "quiet" }, error.message));
    }
  }

  source.addEventListener("change", () => {
    replica.value = "";
    begin();
  });
  replica.addEventListener("change", begin);
  source.value = JSON.stringify(named ? { model: named } : { node: query.get("node") ?? SUPERVISOR });
  // A host that has left, or no choice yet.
  if (!source.value || (!named && !query.has("node"))) source.selectedIndex = 0;
  level.value = "INFO";
  count.value = "500";
  const filters = h("div", { class: "filters" }, field(t("log_of"), source), replicaField,
    field(t("least_level"), level), field(t("last_lines"), count),
    h("div", { class: "checks" }, h("label", { class: "check" }, follow, " ", t("follow"))));
  fill(root, h("div", { class: "columns wide" },
    h("section", { "aria-label": t("page_logs") }, filters, trouble, silent, view.element),
    h("section", { "aria-label": t("events") }, h("h2", {}, t("events")), events)));
  offerReplicas(models);
  begin();
  await every(EVENT_SECONDS, signal, tellEvents);
}

function sourceList(uids, hosts) {
  const option = (value, label) => h("option", { value: JSON.stringify(value) }, label);
  return h("select", {},
    uids.length > 0 && h("optgroup", { label: t("page_models") }, uids.map((model) => option({ model }, model))),
    h("optgroup", { label: t("hosts") },
      option({ node: SUPERVISOR }, t("supervisor")),
      hosts.map((node) => option({ node }, node))));
}
