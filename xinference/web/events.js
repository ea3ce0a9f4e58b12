// SPDX-License-Identifier: Apache-2.0
// The stories of models, as lists.

import { call, path } from "./api.js";
import { h } from "./dom.js";

/** Resolves to what happened to models, the latest first, each with its `model_uid`. */
export async function eventsOf(uids, signal) {
  const stories = await Promise.all(uids.map(async (uid) => {
    const told = await call(path`v1/models/${uid}/events`, { signal });
    return told.map((event) => ({ ...event, model_uid: uid }));
  }));
  return stories.flat().sort((a, b) => b.event_ts - a.event_ts);
}

/** A line of a list; `uid` is written where events of several models stand together. */
export const eventLine = (event, uid = "") =>
  h(
    "li",
    {},
    h("time", {}, new Date(event.event_ts * 1000).toLocaleString()),
    uid && h("b", {}, ` ${uid}`),
    ` ${event.event_type === "INFO" ? "" : `${event.event_type}: `}${event.event_content}`,
  );
