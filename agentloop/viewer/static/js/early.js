"use strict";
// Runs before the first paint, so that a dark page never flashes white. "auto" follows the system.
(() => {
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const stored = () => {
    try {
      return window.localStorage.getItem("agentloop.theme") ?? "auto";
    } catch {
      return "auto"; // storage is refused in some private windows
    }
  };
  const apply = () => {
    const choice = stored();
    const dark = choice === "dark" || (choice !== "light" && system.matches);
    document.documentElement.dataset.theme = dark ? "dark" : "light";
    document.documentElement.dataset.choice = choice;
  };
  system.addEventListener("change", apply);
  document.addEventListener("agentloop:theme", apply);
  apply();
})();
