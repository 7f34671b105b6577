// Two texts with what differs marked, side by side.
import { diff } from "../core/diff.js";
import { h } from "../core/dom.js";
import { visible } from "../core/text.js";

const MOST = 60_000;

const side = (parts, kind) => h("div", { class: "text", dir: "auto" }, parts.filter((one) => one.kind === "same" || one.kind === kind)
  .map((one) => (one.kind === "same" ? visible(one.text) : h(kind === "old" ? "del" : "ins", null, visible(one.text)))));

/** `[left, right]`: blocks of both texts. Beyond 60,000 characters only their beginnings are compared. */
export function sides(before, after) {
  const parts = diff(before.slice(0, MOST), after.slice(0, MOST));
  const cut = (text) => (text.length > MOST ? h("p", { class: "quiet" }, `the first ${MOST.toLocaleString("en")} of ${text.length.toLocaleString("en")} characters are compared`) : null);
  return [[side(parts, "old"), cut(before)], [side(parts, "new"), cut(after)]];
}
