// SPDX-License-Identifier: Apache-2.0
// The frame around the pages: navigation, language, theme and key. The address says which page is
// shown: "#/playground?model=guide" shows playground.js with its query.

import { changeKey } from "./api.js";
import { problem } from "./dialog.js";
import { fill, h, select } from "./dom.js";
import { LANGUAGES, language, t, useLanguage } from "./i18n.js";
import { switchTheme, useTheme } from "./theme.js";
import * as cluster from "./pages/cluster.js";
import * as keys from "./pages/keys.js";
import * as launch from "./pages/launch.js";
import * as logs from "./pages/logs.js";
import * as models from "./pages/models.js";
import * as playground from "./pages/playground.js";
import * as register from "./pages/register.js";

const PAGES = { models, launch, playground, register, cluster, logs, keys };

let shown = new AbortController();

function address() {
  const [name, query] = location.hash.replace(/^#\//, "").split("?");
  return { name: name in PAGES ? name : "models", query: new URLSearchParams(query) };
}

function frame() {
  const { name } = address();
  const links = Object.keys(PAGES).map((page) =>
    h("a", { href: `#/${page}`, "aria-current": page === name ? "page" : null }, t(`page_${page}`)),
  );
  const languages = select(Object.entries(LANGUAGES), {
    "aria-label": t("language"),
    onchange: async () => {
      await useLanguage(languages.value);
      show();
      // The list was replaced by one in the new language.
      document.querySelector("#top select").focus();
    },
  });
  languages.value = language();
  fill(
    document.getElementById("top"),
    h("a", { class: "brand", href: "#/models" }, "Xinference"),
    h("nav", { "aria-label": t("pages") }, links),
    h(
      "div",
      { class: "settings" },
      languages,
      h("button", { onclick: switchTheme }, t("theme")),
      h("button", { onclick: async () => (await changeKey()) && show() }, t("key")),
      h("a", { href: "docs" }, "API"),
    ),
  );
}

/** Show the page that the address names; what the last one was doing ends. */
async function show() {
  shown.abort();
  shown = new AbortController();
  const { signal } = shown;
  const { name, query } = address();
  frame();
  document.title = `${t(`page_${name}`)} · Xinference`;
  const root = fill(document.getElementById("page"), h("h1", {}, t(`page_${name}`)));
  const body = h("div");
  root.append(body);
  try {
    await PAGES[name].show(body, { signal, query });
  } catch (error) {
    if (!signal.aborted) fill(body, problem(error));
  }
}

useTheme();
await useLanguage();
addEventListener("hashchange", () => {
  show();
  document.getElementById("page").focus();
});
show();
