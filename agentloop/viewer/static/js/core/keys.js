// Keys: the view's own bindings first, then those of every page. `g` opens a second key. Typing in a field is typing.
import { h } from "./dom.js";

let viewKeys = [];
let globalKeys = [];
let prefix = false;
let prefixTimer = 0;

/** Bindings `{keys: ["j", "ArrowDown"], what: "next episode", run(event)}`; `group` names them in the help. */
export function bindView(bindings) {
  viewKeys = bindings;
}

export function bindGlobal(bindings) {
  globalKeys = bindings;
}

const typing = (target) => target.closest?.("input:not([type=checkbox]):not([type=radio]):not([type=range]), textarea, select, [contenteditable]");

function pressed(event) {
  if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey) return;
  if (document.querySelector("dialog[open]")) return;
  if (typing(event.target)) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const name = prefix ? `g ${event.key}` : event.key;
  if (!prefix && event.key === "g") {
    prefix = true;
    prefixTimer = setTimeout(() => (prefix = false), 1200);
    return;
  }
  prefix = false;
  clearTimeout(prefixTimer);
  const found = [...viewKeys, ...globalKeys].find((one) => one.keys.includes(name));
  if (!found) return;
  if (found.run(event) !== false) event.preventDefault();
}

const shownKey = (key) => ({ ArrowLeft: "←", ArrowRight: "→", ArrowUp: "↑", ArrowDown: "↓", Escape: "Esc", " ": "Space" })[key] ?? key;

/** The keys of a binding that its help names: all, or the first and the last of a range. */
const ends = (keys) => (keys.length > 2 ? [keys[0], keys[keys.length - 1]] : keys);

function section(title, bindings) {
  const rows = bindings.filter((one) => one.what);
  if (!rows.length) return null;
  return h("section", null, h("h3", null, title), h("dl", { class: "keys" }, rows.map((one) => h("div", null,
    h("dt", null, ends(one.keys).map((key, i) => [i ? (one.keys.length > 2 ? " to " : " or ") : null, key.split(" ").map((part, n) => [n ? " " : null, h("kbd", null, shownKey(part))])])),
    h("dd", null, one.what)))));
}

export function showHelp() {
  const close = h("button", { type: "button", class: "plain", on: { click: () => dialog.close() } }, "Close");
  const dialog = h("dialog", { class: "help", "aria-labelledby": "help-title", on: { close: () => dialog.remove(), click: (event) => event.target === dialog && dialog.close() } },
    h("div", { class: "help-body" },
      h("header", null, h("h2", { id: "help-title" }, "Keys"), close),
      section("On this page", viewKeys), section("Everywhere", globalKeys)));
  document.body.append(dialog);
  dialog.showModal();
}

document.addEventListener("keydown", pressed);
