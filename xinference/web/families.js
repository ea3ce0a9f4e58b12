// SPDX-License-Identifier: Apache-2.0
// The catalogue as the gateway lists it, and the sizes in it.

import { ApiError, call } from "./api.js";

const TYPES = ["LLM", "embedding", "rerank"];

/** Every family, each with its `model_type`. A type that the server does not know has none. */
export async function families(signal) {
  const lists = await Promise.all(TYPES.map((type) => familiesOf(type, signal)));
  return lists.flat();
}

async function familiesOf(type, signal) {
  try {
    const listed = await call(`v1/model_registrations/${type}?detailed=true`, { signal });
    return listed.map((family) => ({ ...family, model_type: type }));
  } catch (error) {
    if (type !== "LLM" && error instanceof ApiError && error.status === 400) return [];
    throw error;
  }
}

/** "0_5", "0.5" and 0.5 are half a billion. */
export const billions = (size) => Number(String(size).replace("_", "."));

/** What a family can do; kinds of models that have one ability are called by it. */
export const abilitiesOf = (family) => family.model_ability ?? [family.model_type];
