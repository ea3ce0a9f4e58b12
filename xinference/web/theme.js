// SPDX-License-Identifier: Apache-2.0
// Dark or light: as the system says, until the user chooses.

const CHOICE = "xinference.theme";

export function useTheme() {
  const chosen = localStorage.getItem(CHOICE);
  if (chosen) document.documentElement.dataset.theme = chosen;
}

export function switchTheme() {
  const isSystemDark = matchMedia("(prefers-color-scheme: dark)").matches;
  const now = document.documentElement.dataset.theme ?? (isSystemDark ? "dark" : "light");
  localStorage.setItem(CHOICE, now === "dark" ? "light" : "dark");
  useTheme();
}
