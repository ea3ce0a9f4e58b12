// SPDX-License-Identifier: Apache-2.0
// The nodes of the cluster: memory, devices, and what runs on each.

import { call, endpoint } from "../api.js";
import { chart, percent } from "../chart.js";
import { problem } from "../dialog.js";
import { every, fill, h } from "../dom.js";
import { lastHour } from "../history.js";
import { t } from "../i18n.js";

const POLL_SECONDS = 3;
const GIB = 2 ** 30;

export async function show(root, { signal }) {
  await every(POLL_SECONDS, signal, async () => {
    try {
      const [status, workers, about, address] = await Promise.all(
        ["status", "v1/workers", "v1/cluster/version", "v1/address"].map((route) =>
          call(route, { signal })),
      );
      const models = new Map(workers.map((worker) => [worker["work-ip"], worker.models]));
      const nodes = Object.entries(status.workers);
      const hour = await lastHour(signal);
      fill(
        root,
        h("p", {}, t("cluster_about", { version: about.version, address,
          uptime: duration(status.uptime) })),
        nodes.length === 0 && h("p", { class: "empty" }, t("no_workers", { endpoint })),
        h("div", { class: "cards" },
          nodes.map(([name, node]) => nodeCard(name, node, models.get(name) ?? {}, hour))),
      );
    } catch (error) {
      if (!signal.aborted) fill(root, problem(error));
    }
  });
}

function nodeCard(name, node, models, hour) {
  const { cpu, ...devices } = node.status;
  const seconds = Math.max(0, Date.now() / 1000 - node.update_time);
  const replicas = Object.keys(models);
  return h(
    "article",
    { class: "card", "aria-label": name },
    h("h2", {}, name),
    h("p", { class: "quiet" }, t("reported", { seconds: seconds.toFixed(0) })),
    gauge(t("cpu", { cores: cpu.total }), cpu.usage, 1, `${Math.round(100 * cpu.usage)} %`),
    gauge(t("memory"), cpu.memory_used, cpu.memory_total),
    Object.entries(devices).map(([index, device]) => [
      h("h3", {}, `GPU ${index} · ${device.name}`),
      gauge(t("memory"), device.mem_used, device.mem_total),
      gauge(t("busy"), device.gpu_util, 1, `${Math.round(100 * device.gpu_util)} %`),
      device.quarantine && h("p", { role: "note" }, device.quarantine),
    ]),
    Object.keys(devices).length === 0 && h("p", { class: "quiet" }, t("no_gpu")),
    h("h3", {}, t("last_hour")),
    charts(name, hour, Object.keys(devices).length > 0),
    h("h3", {}, t("replicas")),
    replicas.length
      ? h("ul", {}, replicas.map((replica) => h("li", {}, replica)))
      : h("p", { class: "quiet" }, t("no_replicas")),
  );
}

function charts(name, hour, hasGpus) {
  const shown = {
    cpu_utilization: "CPU",
    memory_share: t("memory"),
    ...(hasGpus && { gpu_utilization: "GPU", gpu_memory_share: t("gpu_memory") }),
  };
  return Object.entries(shown).map(([reading, label]) =>
    chart(label, hour.map((sample) => [sample.time, sample.workers[name]?.[reading]]),
      { most: 1, format: percent }));
}

function gauge(label, value, max, text = `${gib(value)} / ${gib(max)} GiB`) {
  const meter = h("meter", { min: 0, max, value, "aria-label": `${label}: ${text}` });
  return h("div", { class: "gauge" }, h("span", {}, label), meter, h("span", {}, text));
}

const gib = (bytes) => (bytes / GIB).toFixed(1);

function duration(seconds) {
  const minutes = Math.floor(seconds / 60);
  const hours = Math.floor(minutes / 60);
  const days = Math.floor(hours / 24);
  return t("duration", { days, hours: hours % 24, minutes: minutes % 60 });
}
