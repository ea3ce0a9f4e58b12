// SPDX-License-Identifier: Apache-2.0
// What a model wrote, as elements: code between fences stands apart, all else is text as it is.

import { h } from "./dom.js";

const FENCE = /^```([\w+-]*)[^\n]*\n([\s\S]*?)^```[ \t]*$/gm;

/** Return the elements of a text. */
export function rendered(text) {
  const parts = [];
  let end = 0;
  for (const found of text.matchAll(FENCE)) {
    parts.push(prose(text.slice(end, found.index)));
    parts.push(h("pre", { tabindex: 0 }, h("code", {}, found[2])));
    end = found.index + found[0].length;
  }
  parts.push(prose(text.slice(end)));
  return parts;
}

const prose = (text) => text.trim() && h("p", { class: "prose" }, text.trim());
