// Small things that say a state: reward, status, live, severity. Colour never says it alone.
import { h } from "../core/dom.js";
import { fixed, signed } from "../core/format.js";
import { say } from "../core/text.js";

export function reward(value, { title } = {}) {
  if (typeof value !== "number") return h("span", { class: "pill none", title: title ?? "no reward" }, "no reward");
  const kind = value > 0 ? "good" : value < 0 ? "bad" : "";
  return h("span", { class: `pill num ${kind}`, title }, fixed(value, 3));
}

/** A reward as a plain number, for a column of them. */
export function points(value) {
  return h("b", { class: value > 0 ? "points good" : value < 0 ? "points bad" : "points" }, fixed(value, 3));
}

export function status(value) {
  if (!value || value === "ok") return null;
  return h("span", { class: `pill ${value === "running" ? "" : "bad"}` }, value);
}

/** A part of the reward, where it fell: its name and its value with the sign. */
export function part(name, value) {
  return h("span", { class: `part ${value > 0 ? "good" : value < 0 ? "bad" : ""}` }, say(name, 60), " ", h("b", null, signed(value)));
}

/** Whether a run goes on, or was stopped before its end; nothing for one that is complete. */
export function live(run) {
  if (run.live) return h("span", { class: "live" }, h("span", { class: "dot", "aria-hidden": "true" }), "live");
  if (run.finished) return null;
  return h("span", { class: "pill sev-warn not-finished", title: "No process works on this run, and it has not reached its end" }, "not finished");
}

export function severity(value) {
  const name = { bad: "problem", warn: "warning", info: "note" }[value] ?? value;
  return h("span", { class: `pill sev-${value}` }, name);
}

/** Facts as a description list; rows of `[label, value]`, missing values left out. */
export function facts(rows, className = "facts") {
  const present = rows.filter((row) => row && row[1] !== null && row[1] !== undefined && row[1] !== "" && row[1] !== "–");
  return h("dl", { class: className }, present.map(([label, value]) => h("div", null,
    h("dt", null, label), h("dd", null, value instanceof Node || Array.isArray(value) ? value : say(value, 2000)))));
}

export function problem(error) {
  return h("div", { class: "empty wrong", role: "alert" }, h("b", null, "This could not be shown. "), say(error?.message ?? String(error), 2000));
}

/** Files that could not be read, as `[{file, problem}]`; null when all could. */
export function unread(problems) {
  if (!problems?.length) return null;
  return h("details", { class: "unread" }, h("summary", null, problems.length === 1 ? "One file could not be read" : `${problems.length} files could not be read`),
    h("ul", null, problems.slice(0, 50).map((one) => h("li", null, h("b", null, say(one.file, 200)), " ", say(one.problem, 600)))));
}

export function empty(...content) {
  return h("p", { class: "empty" }, content);
}
