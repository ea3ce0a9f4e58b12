// SPDX-License-Identifier: Apache-2.0
// The last hour: what the gateway has seen, kept here so that only what is new is asked for.

import { ApiError, call } from "./api.js";

const SECONDS = 3600;
let samples = [];

/** Resolves to the samples of the last hour, oldest first; none if the key may not see them. */
export async function lastHour(signal) {
  const since = samples.at(-1)?.time ?? 0;
  try {
    const { data } = await call(`v1/cluster/history?since=${since}`, { signal });
    // Why: several pages, or several gateway processes, may have asked at once.
    const newest = samples.at(-1)?.time ?? 0;
    samples.push(...data.filter((sample) => sample.time > newest));
  } catch (error) {
    if (!(error instanceof ApiError && [403, 404].includes(error.status))) throw error;
  }
  samples = samples.filter((sample) => sample.time > Date.now() / 1000 - SECONDS);
  return samples;
}
