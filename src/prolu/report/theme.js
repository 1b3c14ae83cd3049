// Light or dark colours: those that the system prefers, until the reader chooses with the button.
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
} catch { /* some browsers give pages from the disk no storage */ }

addEventListener("DOMContentLoaded", () => {
  showTheme();
  document.querySelector(".theme").addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    try { localStorage.setItem("prolu-theme", root.dataset.theme); } catch { /* then the choice holds for this page only */ }
    showTheme();
  });
});
systemDark.addEventListener("change", showTheme);
