// SPDX-License-Identifier: Apache-2.0
// API keys: make one, see it once, revoke it; and what was used with each.

import { call, path, useKey } from "../api.js";
import { isConfirmed, notify, problem } from "../dialog.js";
import { field, fill, h } from "../dom.js";
import { t } from "../i18n.js";

const SCOPES = ["invoke", "monitor", "admin"];
const DAY_SECONDS = 86_400;

export async function show(root, { signal }) {
  const name = h("input", { required: true, autocomplete: "off" });
  const scopes = SCOPES.map((scope) =>
    h("input", { type: "checkbox", value: scope, checked: scope === "invoke" }));
  const models = h("input", { autocomplete: "off", spellcheck: "false" });
  const whole = () => h("input", { type: "number", min: 1, step: 1 });
  const [days, requests, tokens] = [whole(), whole(), whole()];
  const made = h("div");
  const trouble = h("div");
  const list = h("div", { class: "scroll" });

  function body() {
    const uids = models.value.split(/[\s,]+/).filter(Boolean);
    const number = (input, unit = 1) => (input.value ? Number(input.value) * unit : null);
    return {
      name: name.value.trim(),
      scopes: scopes.filter((box) => box.checked).map((box) => box.value),
      models: uids.length ? uids : null,
      expires_in_seconds: number(days, DAY_SECONDS),
      requests_per_minute: number(requests),
      tokens_per_minute: number(tokens),
    };
  }

  async function make(event) {
    event.preventDefault();
    try {
      const key = await call("v1/admin/keys", { method: "POST", body: body() });
      form.reset();
      fill(trouble);
      fill(made, h("div", { class: "card", role: "status" }, h("p", {}, t("key_made", { name: key.name })),
        h("pre", { tabindex: 0 }, key.key),
        h("button", { type: "button", onclick: () => use(key.key) }, t("key_use_here"))));
      // Why: from the first key on this page, too, needs one to read the list.
      await refresh(key.scopes.includes("admin") ? key.key : undefined);
    } catch (error) {
      if (!signal.aborted) fill(trouble, problem(error));
    }
  }

  function use(key) {
    useKey(key);
    notify(t("key_used"));
  }

  async function revoke(key) {
    if (!(await isConfirmed(t("revoke_title", { name: key.name }), t("revoke_about"), t("revoke")))) {
      return;
    }
    try {
      await call(path`v1/admin/keys/${key.id}`, { method: "DELETE" });
      await refresh();
    } catch (error) {
      fill(trouble, problem(error));
    }
  }

  async function refresh(key) {
    if (key) useKey(key);
    const [{ data: keys }, { data: used }] = await Promise.all([
      call("v1/admin/keys", { signal }),
      call("v1/usage", { signal }),
    ]);
    fill(list, keys.length ? table(keys, used, revoke) : h("p", { class: "empty" }, t("no_keys")));
  }

  const form = h(
    "form",
    { onsubmit: make },
    h("div", { class: "grid" },
      field(t("name"), name),
      h("fieldset", {}, h("legend", {}, t("scopes")),
        scopes.map((box) => h("label", { class: "check" }, box, ` ${box.value} – ${t(`scope_${box.value}`)}`))),
      field(t("page_models"), models, t("models_hint")),
      field(t("expires_in_days"), days, t("never_hint")),
      field(t("requests_per_minute"), requests, t("unlimited_hint")),
      field(t("tokens_per_minute"), tokens, t("unlimited_hint"))),
    trouble,
    h("div", { class: "actions" }, h("button", { class: "primary" }, t("make_key"))),
  );
  fill(root, list, h("h2", {}, t("make_key")), form, made);
  await refresh();
}

function table(keys, used, revoke) {
  const heads = [t("name"), t("scopes"), t("page_models"), t("expires"), t("requests"), t("tokens")];
  const sum = (id, column) =>
    used.filter((row) => row.key_id === id).reduce((total, row) => total + row[column], 0);
  const date = (seconds) => (seconds ? new Date(seconds * 1000).toLocaleDateString() : t("never"));
  return h(
    "table",
    {},
    h("thead", {}, h("tr", {}, heads.map((head) => h("th", { scope: "col" }, head)), h("td"))),
    h("tbody", {}, keys.map((key) => h("tr", {},
      h("th", { scope: "row" }, key.name),
      h("td", {}, key.scopes.join(", ")),
      h("td", {}, key.models?.join(", ") ?? t("all")),
      h("td", {}, date(key.expires_at)),
      h("td", {}, sum(key.id, "requests").toLocaleString()),
      h("td", {}, sum(key.id, "total_tokens").toLocaleString()),
      h("td", {}, h("button", { type: "button", class: "danger small",
        "aria-label": `${t("revoke")} ${key.name}`, onclick: () => revoke(key) }, t("revoke")))))),
  );
}
