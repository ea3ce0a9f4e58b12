// SPDX-License-Identifier: Apache-2.0
// The catalogue, and the form that launches a family of it.

import { abilitiesOf, billions, families } from "../families.js";
import { fill, h, field, select } from "../dom.js";
import { t } from "../i18n.js";
import { launchForm } from "../launch_form.js";

const SIZES = { "": [0, Infinity], "≤ 1": [0, 1], "1 – 4": [1, 4], "4 – 10": [4, 10],
  "10 – 40": [10, 40], "> 40": [40, Infinity] };

export async function show(root, { signal, query }) {
  fill(root, h("p", { role: "status" }, t("loading")));
  const all = await families(signal);
  const abilities = [...new Set(all.flatMap(abilitiesOf))].sort();

  const search = h("input", { type: "search", oninput: list, placeholder: t("search_hint") });
  const ability = select([["", t("any")], ...abilities], { onchange: list });
  const size = select(
    Object.keys(SIZES).map((name) => [name, name || t("any")]),
    { onchange: list },
  );
  const isCached = h("input", { type: "checkbox", onchange: list });
  const fits = h("input", { type: "checkbox", onchange: list });
  const count = h("p", { class: "quiet", role: "status" });
  const results = h("ul", { class: "families" });
  const chosen = h("section", { "aria-label": t("launch_options") });

  function list() {
    const wanted = search.value.trim().toLowerCase();
    const found = all.filter(
      (family) =>
        `${family.model_name} ${family.model_description ?? ""}`.toLowerCase().includes(wanted) &&
        (!ability.value || abilitiesOf(family).includes(ability.value)) &&
        hasSpec(family),
    );
    count.textContent = found.length ? t("num_found", { count: found.length }) : t("none_found");
    fill(results, found.map((family) => h("li", {}, familyButton(family))));
  }

  /** Whether one and the same variant of a family is as all filters want it. */
  function hasSpec(family) {
    const [above, most] = SIZES[size.value];
    if (!size.value && !isCached.checked && !fits.checked) return true;
    return (family.model_specs ?? []).some((spec) => {
      const billion = billions(spec.model_size_in_billions ?? 0);
      return (!size.value || (billion > above && billion <= most)) &&
        (!isCached.checked || spec.cache_status) && (!fits.checked || spec.fits);
    });
  }

  const familyButton = (family) =>
    h(
      "button",
      { type: "button", class: "family", onclick: () => choose(family) },
      h("strong", {}, family.model_name),
      h("span", {}, abilitiesOf(family).map((name) => h("span", { class: "tag" }, name)),
        (family.model_specs ?? []).some((spec) => spec.cache_status) &&
          h("span", { class: "tag good" }, t("cached"))),
      h("small", {}, family.model_description),
    );

  async function choose(family) {
    fill(chosen, h("p", { role: "status" }, t("loading")));
    await launchForm(chosen, family, signal);
    chosen.scrollIntoView({ block: "nearest" });
    chosen.querySelector("select, input")?.focus();
  }

  const filters = h(
    "div",
    { class: "filters" },
    field(t("search"), search),
    field(t("ability"), ability),
    field(t("size"), size),
    h("div", { class: "checks" }, h("label", { class: "check" }, isCached, " ", t("only_cached")),
      h("label", { class: "check" }, fits, " ", t("only_fitting"))),
  );
  fill(root, h("div", { class: "columns" }, h("section", { "aria-label": t("catalogue") },
    filters, count, results), chosen));
  list();
  fill(chosen, h("p", { class: "empty" }, t("choose_family")));
  const named = all.find((family) => family.model_name === query.get("name"));
  if (named) await choose(named);
}
