// Light or dark: as the system has it, until the button says otherwise.
const root = document.documentElement;
const systemDark = matchMedia("(prefers-color-scheme: dark)");

function isDark() {
  return root.dataset.theme ? root.dataset.theme === "dark" : systemDark.matches;
}

function showTheme() {
  const button = document.querySelector(".theme");
  button.textContent = isDark() ? "☀ Light" : "☾ Dark";
  button.setAttribute("aria-label", isDark() ? "Change to light colours" : "Change to dark colours");
  document.dispatchEvent(new Event("theme"));
}

try {
  const kept = localStorage.getItem("prolu-theme");
  if (kept) root.dataset.theme = kept;
} catch { /* a page from the disk may have no storage */ }

addEventListener("DOMContentLoaded", () => {
  showTheme();
  document.querySelector(".theme").addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    try { localStorage.setItem("prolu-theme", root.dataset.theme); } catch { /* then it is for this page only */ }
    showTheme();
  });
});
systemDark.addEventListener("change", showTheme);
