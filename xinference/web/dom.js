// SPDX-License-Identifier: Apache-2.0
// Elements are made here and nowhere else: text goes in as text, so nothing that a model or a
// server says can become markup.

/**
 * Make an element. Properties that start with "on" are listeners; null and undefined are left out;
 * children are nodes, texts, or lists of them.
 */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "value") element.value = value;
    else if (name === "checked") element.checked = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  append(element, children);
  return element;
}

function append(element, children) {
  for (const child of children.flat(Infinity)) {
    if (child !== null && child !== undefined && child !== false) element.append(child);
  }
}

/** Put other children into an element. */
export function fill(element, ...children) {
  element.replaceChildren();
  append(element, children);
  return element;
}

let numFields = 0;

/** A labelled control, with a hint under it if there is one. */
export function field(label, control, hint) {
  control.id ||= `field-${++numFields}`;
  const about = hint && h("small", { id: `${control.id}-hint` }, hint);
  if (about) control.setAttribute("aria-describedby", about.id);
  return h("div", { class: "field" }, h("label", { for: control.id }, label), control, about);
}

/** A drop-down list of texts, or of [value, label] pairs. */
export function select(choices, properties = {}) {
  const options = choices.map((choice) => {
    const [value, label] = Array.isArray(choice) ? choice : [choice, choice];
    return h("option", { value }, label);
  });
  return h("select", properties, options);
}

/** Ask until the page is left: `poll` is awaited, then again after `seconds`. */
export async function every(seconds, signal, poll) {
  while (!signal.aborted) {
    await poll();
    await pause(seconds, signal);
  }
}

/** Wait, but no longer than the page is shown. */
export function pause(seconds, signal) {
  return new Promise((resolve) => {
    const done = () => {
      clearTimeout(timer);
      signal.removeEventListener("abort", done);
      resolve();
    };
    const timer = setTimeout(done, seconds * 1000);
    signal.addEventListener("abort", done);
  });
}
