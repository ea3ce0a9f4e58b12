// SPDX-License-Identifier: Apache-2.0
// The words of the page, in the language of the user: words/en.json and words/zh.json.

export const LANGUAGES = { en: "English", zh: "中文" };

const CHOICE = "xinference.language";
let words = {};

/** The language that is shown. */
export function language() {
  const chosen = localStorage.getItem(CHOICE) ?? navigator.language.slice(0, 2);
  return chosen in LANGUAGES ? chosen : "en";
}

/** Load the words of a language, and remember it if the user chose it. */
export async function useLanguage(chosen) {
  if (chosen) localStorage.setItem(CHOICE, chosen);
  const answer = await fetch(new URL(`words/${language()}.json`, import.meta.url));
  words = await answer.json();
  document.documentElement.lang = language();
}

/** The text of a key; `{name}` in it is replaced by the value of that name. */
export function t(key, values = {}) {
  return words[key].replace(/\{(\w+)\}/g, (_, name) => values[name]);
}
