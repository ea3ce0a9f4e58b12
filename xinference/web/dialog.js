// SPDX-License-Identifier: Apache-2.0
// Modal dialogs and notices. Escape closes a dialog, and the focus goes back to where it was.

import { h } from "./dom.js";
import { t } from "./i18n.js";

/**
 * Show a dialog with buttons; resolves to the value of the one that was pressed, null if none was.
 * @param {[string, string, string?][]} buttons value, label, class
 */
export function ask(title, content, buttons) {
  // Why: what cannot be undone is not what the Enter key does at once.
  const isGrave = buttons.some(([, , kind]) => kind === "danger");
  return new Promise((resolve) => {
    const dialog = h(
      "dialog",
      { "aria-label": title, onclose: () => {
        dialog.remove();
        resolve(dialog.returnValue || null);
      } },
      h(
        "form",
        { method: "dialog" },
        h("h2", {}, title),
        content,
        h(
          "div",
          { class: "actions" },
          buttons.map(([value, label, kind]) => h("button", { value, class: kind }, label)),
          h("button", { value: "", autofocus: isGrave }, t("cancel")),
        ),
      ),
    );
    document.body.append(dialog);
    dialog.showModal();
  });
}

/** Ask before something that cannot be undone. */
export async function isConfirmed(title, text, action) {
  return (await ask(title, h("p", {}, text), [["yes", action, "danger"]])) === "yes";
}

/** Say something for a few seconds. */
export function notify(text) {
  const notice = h("p", { class: "notice" }, text);
  document.getElementById("notices").append(notice);
  setTimeout(() => notice.remove(), 6000);
}

/** What went wrong, in the server's words, and what to do about it. */
export function problem(error) {
  const hints = { 401: t("hint_401"), 403: t("hint_403") };
  const isOffline = error instanceof TypeError;
  return h(
    "div",
    { class: "problem", role: "alert" },
    h("strong", {}, isOffline ? t("unreachable") : error.message),
    h("p", {}, isOffline ? t("hint_unreachable") : hints[error.status]),
  );
}
