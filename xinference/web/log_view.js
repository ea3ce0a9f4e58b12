// SPDX-License-Identifier: Apache-2.0
// Lines of a log: kept up to a limit, searched, paused and copied. Knows nothing of where they come
// from.

import { notify } from "./dialog.js";
import { fill, h } from "./dom.js";
import { t } from "./i18n.js";

const MAX_LINES = 3000;
const NEAR_END = 40;

/** A view of lines; `add` takes more of them, `clear` forgets all. */
export function logView() {
  const list = h("div", { class: "lines", role: "log", "aria-live": "off", tabindex: 0,
    "aria-label": t("log_lines") });
  const search = h("input", { type: "search", placeholder: t("search_lines"), oninput: showAll,
    "aria-label": t("search") });
  const pause = h("button", { type: "button", "aria-pressed": "false", onclick: switchPause }, t("pause"));
  const copy = h("button", { type: "button", onclick: copyShown }, t("copy"));
  const about = h("p", { class: "quiet", role: "status" });
  const element = h("div", { class: "stack" },
    h("div", { class: "toolbar" }, search, pause, copy), list, about);
  let lines = [];
  let waiting = [];
  let isPaused = false;

  function add(more) {
    if (isPaused) {
      waiting = [...waiting, ...more].slice(-MAX_LINES);
    } else {
      const isAtEnd = list.scrollHeight - list.scrollTop - list.clientHeight < NEAR_END;
      lines = [...lines, ...more].slice(-MAX_LINES);
      list.append(...more.filter(isWanted).map(lineElement));
      while (list.childElementCount > MAX_LINES) list.firstChild.remove();
      // Why not always: who has scrolled back reads something.
      if (isAtEnd) list.scrollTop = list.scrollHeight;
    }
    tell();
  }

  function clear() {
    lines = [];
    waiting = [];
    fill(list);
    tell();
  }

  function switchPause() {
    isPaused = !isPaused;
    pause.setAttribute("aria-pressed", String(isPaused));
    const more = waiting;
    waiting = [];
    add(more);
  }

  function showAll() {
    fill(list, lines.filter(isWanted).map(lineElement));
    list.scrollTop = list.scrollHeight;
    tell();
  }

  const wanted = () => search.value.trim().toLowerCase();
  const isWanted = (line) => textOf(line).toLowerCase().includes(wanted());

  function lineElement(line) {
    const [when, level, who, what] = partsOf(line);
    return h("div", { class: "line", "data-level": line.level },
      h("time", {}, when), ` ${level} `, h("b", {}, marked(who, wanted())), " ", marked(what, wanted()), "\n");
  }

  function tell() {
    const count = { shown: list.childElementCount, count: lines.length };
    const words = lines.length === 0 && waiting.length === 0 ? [t("nothing_logged")] : [t("num_lines", count)];
    if (isPaused) words.push(t("paused", { count: waiting.length }));
    about.textContent = words.join(" · ");
  }

  async function copyShown() {
    if (navigator.clipboard) {
      await navigator.clipboard.writeText(lines.filter(isWanted).map(textOf).join("\n"));
      notify(t("copied"));
      return;
    }
    // Browsers have no clipboard for pages that come over plain HTTP from afar.
    getSelection().selectAllChildren(list);
    notify(t("selected"));
  }

  tell();
  return { element, add, clear };
}

const textOf = (line) => partsOf(line).join(" ");

function partsOf(line) {
  const who = line.replica ?? line.process;
  const about = line.request_id ? ` [${line.request_id}]` : "";
  return [timeOf(line.time), line.level, who, `${line.logger}${about}: ${line.message}`];
}

function timeOf(seconds) {
  const date = new Date(seconds * 1000);
  const local = new Date(date - date.getTimezoneOffset() * 60_000);
  return local.toISOString().slice(0, 23).replace("T", " ");
}

/** A text with what was searched for marked in it. */
function marked(text, wanted) {
  if (!wanted) return text;
  const parts = [];
  const lower = text.toLowerCase();
  let end = 0;
  for (let found = lower.indexOf(wanted); found >= 0; found = lower.indexOf(wanted, end)) {
    parts.push(text.slice(end, found), h("mark", {}, text.slice(found, found + wanted.length)));
    end = found + wanted.length;
  }
  return [...parts, text.slice(end)];
}
