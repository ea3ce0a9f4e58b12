// SPDX-License-Identifier: Apache-2.0
// How busy each model is, from the gateway's metrics.

import { ApiError, callText } from "./api.js";

const LINE = /^xinference:(\w+)\{(.*)\} (\S+)$/;
const UID = /model_uid="([^"]*)"/;

/** Resolves to a Map of model uid → name of a metric → sum over the replicas; empty without them. */
export async function modelMetrics(signal) {
  let page;
  try {
    page = await callText("metrics", { signal });
  } catch (error) {
    // They can be switched off, or be more than the key may see.
    if (error instanceof ApiError && [403, 404].includes(error.status)) return new Map();
    throw error;
  }
  const found = new Map();
  for (const line of page.split("\n")) {
    const [, name, labels, value] = LINE.exec(line) ?? [];
    const uid = UID.exec(labels ?? "")?.[1];
    if (!uid) continue;
    const sums = found.get(uid) ?? {};
    sums[name] = (sums[name] ?? 0) + Number(value);
    found.set(uid, sums);
  }
  return found;
}
