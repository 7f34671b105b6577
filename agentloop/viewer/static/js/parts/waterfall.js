// Spans of an episode (or calls of a trace) as bars over time, nested by parent.
import { h } from "../core/dom.js";
import { seconds } from "../core/format.js";
import { block, say, shown } from "../core/text.js";
import { tree } from "./values.js";

const MOST = 400;

/** `[{id, parent, name, start, end, failed, kind, href, note, error, attributes}]` in seconds -> the same in the order of the tree, with `depth`. */
export function nested(items) {
  const ids = new Set(items.map((one) => one.id));
  const children = new Map();
  for (const one of items) {
    const parent = one.parent && ids.has(one.parent) && one.parent !== one.id ? one.parent : null;
    if (!children.has(parent)) children.set(parent, []);
    children.get(parent).push(one);
  }
  const ordered = [];
  const seen = new Set();
  const visit = (parent, depth) => {
    for (const one of (children.get(parent) ?? []).sort((a, b) => a.start - b.start)) {
      if (seen.has(one)) continue;
      seen.add(one);
      ordered.push({ ...one, depth });
      if (depth < 40) visit(one.id, depth + 1);
    }
  };
  visit(null, 0);
  for (const one of items) if (!seen.has(one)) ordered.push({ ...one, depth: 0 }); // a circle of parents
  return ordered;
}

/** What a row holds beside its time: why it failed, and its attributes. Null when there is nothing. */
function detail({ error, attributes }) {
  const some = Object.keys(attributes ?? {}).length;
  if (!error && !some) return null;
  return h("div", { class: "span-detail" }, error ? block(error, "reason alarm") : null, some ? tree(attributes) : null);
}

/** `details`: rows open to show their error and attributes in full. */
export function waterfall(items, { label = "Spans", details = false } = {}) {
  const rows = nested(items);
  if (!rows.length) return null;
  const start = Math.min(...rows.map((one) => one.start));
  const end = Math.max(...rows.map((one) => one.end ?? one.start));
  const whole = end - start || 1e-9;
  return h("div", { class: "waterfall" }, h("ol", { "aria-label": label }, rows.slice(0, MOST).map((one) => {
    const length = (one.end ?? end) - one.start;
    const bar = h("span", { class: `bar kind-${one.kind ?? "other"}${one.failed ? " failed" : ""}`, vars: { left: `${((one.start - start) / whole) * 100}%`, width: `${Math.max(0.4, (length / whole) * 100)}%` } });
    const name = h("span", { class: "span-name", vars: { "--depth": String(Math.min(one.depth, 8)) } }, one.href ? h("a", { href: one.href, "aria-current": one.current ? "true" : null }, say(one.name, 80)) : say(one.name, 80), one.note ? h("small", null, say(one.note, 160)) : null);
    const row = [name, h("span", { class: "bar-box", "aria-hidden": "true" }, bar), h("span", { class: "span-time" }, one.end === null ? "open" : seconds(length), one.failed ? h("span", { class: "sr" }, " failed") : null)];
    const more = details ? detail(one) : null;
    return h("li", { title: `${shown(one.name)} ${seconds(length)}${one.failed ? " failed" : ""}${one.note ? `\n${shown(one.note)}` : ""}`, class: one.current ? "current" : null }, more ? h("details", null, h("summary", { class: "span-row" }, row), more) : h("div", { class: "span-row" }, row));
  })), rows.length > MOST ? h("p", { class: "quiet" }, `and ${rows.length - MOST} more spans`) : null);
}

const KINDS = { episode: "episode", turn: "turn", generate: "generate", parse: "parse", tool: "tool", interaction: "interaction", reward: "reward" };

/** Attributes that the rest of the page shows: they refer to the conversation. */
const REFERENCES = new Set(["request_id", "call_id", "tool", "reward", "interaction"]);

/** A span in a few words: whose it is, why it failed, and what was set on it. */
function noteOf({ attributes = {}, status, error }) {
  const own = Object.entries(attributes).filter(([name]) => !REFERENCES.has(name)).map(([name, value]) => `${name}=${value}`);
  const subject = attributes.tool ?? attributes.reward ?? attributes.interaction;
  return [subject, status === "ok" ? null : error || status, ...own].filter(Boolean).join(" · ") || null;
}

/** Spans of the store as items of a waterfall. */
export function spanItems(spans, linkOf) {
  const first = Math.min(...spans.map((span) => span.start_ns ?? 0));
  return spans.map((span) => ({
    id: span.span_id, parent: span.parent_id, name: span.name, kind: KINDS[span.name],
    start: span.start_s ?? (span.start_ns - first) / 1e9, end: span.end_s ?? (span.end_ns - first) / 1e9,
    failed: span.status === "error" || span.status === "cancelled", href: linkOf?.(span) ?? null,
    note: noteOf(span), error: span.error, attributes: span.attributes,
  }));
}
