// SPDX-License-Identifier: Apache-2.0
// The dialog for the API key.

import { ask } from "./dialog.js";
import { field, h } from "./dom.js";
import { t } from "./i18n.js";

/** Resolves to the key, to "" if it is to be forgotten, to null if nothing is to change. */
export async function askForKey() {
  const key = h("input", { type: "password", autocomplete: "off", spellcheck: "false" });
  const content = [h("p", {}, t("key_about")), field(t("key"), key)];
  const pressed = await ask(t("key"), content, [
    ["use", t("key_use"), "primary"],
    ["forget", t("key_forget")],
  ]);
  if (pressed === "forget") return "";
  return (pressed === "use" && key.value.trim()) || null;
}
