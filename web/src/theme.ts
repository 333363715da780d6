// Light, dark, or as the system has it, which is where the page begins.

const KEY = "vllm-theme";
const THEMES = ["system", "light", "dark"] as const;
export type Theme = (typeof THEMES)[number];

export const theme = (): Theme => THEMES.find((one) => one === localStorage.getItem(KEY)) ?? "system";

export function applyTheme(): void {
  document.documentElement.dataset.theme = theme();
}

export function nextTheme(): Theme {
  const next = THEMES[(THEMES.indexOf(theme()) + 1) % THEMES.length]!;
  localStorage.setItem(KEY, next);
  applyTheme();
  return next;
}
