// SPDX-License-Identifier: Apache-2.0
// Calls of the gateway: JSON in and out, streams of events, and the API key.

import { askForKey } from "./key_dialog.js";

const BASE = new URL("..", import.meta.url);
const KEY = "xinference.key";

/** The address that programs use, without a slash at the end. */
export const endpoint = BASE.href.replace(/\/$/, "");

export class ApiError extends Error {
  constructor(status, { message, code, param } = {}) {
    super(message || `HTTP ${status}`);
    this.status = status;
    this.code = code;
    this.param = param;
  }
}

export const hasKey = () => Boolean(sessionStorage.getItem(KEY));

/** Let the user enter a key or forget it; false if the dialog was closed without either. */
export async function changeKey() {
  const key = await askForKey();
  if (key !== null) useKey(key);
  return key !== null;
}

/** Send this key from now on; "" sends none. */
export function useKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

let asking = null;
let isDismissed = false;

// Why one promise: a page has several requests under way, and one dialog is enough for all.
async function wasKeyGiven() {
  if (isDismissed) return false;
  asking ??= changeKey().finally(() => {
    asking = null;
  });
  const isGiven = await asking;
  isDismissed = !isGiven;
  return isGiven;
}

async function send(path, { method = "GET", body, signal } = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = key ? { authorization: `Bearer ${key}` } : {};
    if (body !== undefined) headers["content-type"] = "application/json";
    const response = await fetch(new URL(path, BASE), {
      method,
      headers,
      signal,
      body: body === undefined ? undefined : JSON.stringify(body),
    });
    if (response.ok) return response;
    if (response.status === 401) {
      const isNewer = sessionStorage.getItem(KEY) !== key;
      if (isNewer || (await wasKeyGiven())) continue;
    }
    const answer = await response.json().catch(() => ({}));
    throw new ApiError(response.status, answer.error);
  }
}

/** Call a route; returns what its JSON says. Throws ApiError with the server's message. */
export async function call(path, options) {
  return (await send(path, options)).json();
}

/** Call a route that answers text. */
export async function callText(path, options) {
  return (await send(path, options)).text();
}

/** Call a route that streams; yields each event's JSON. An error event is thrown as ApiError. */
export async function* stream(path, options) {
  const response = await send(path, options);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      // What is not data is a comment, by which a silent stream says that it lives.
      if (!event.startsWith("data: ")) continue;
      const data = event.slice("data: ".length);
      if (data === "[DONE]") return;
      const said = JSON.parse(data);
      if (said.error) throw new ApiError(response.status, said.error);
      yield said;
    }
  }
}

/** A path of the API: each value is escaped. */
export function path(parts, ...values) {
  return parts.reduce((whole, part, i) => whole + encodeURIComponent(values[i - 1]) + part);
}
