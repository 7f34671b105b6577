// JSON as people read it: one line a key, long strings as the text they are (a program keeps its lines).
import { h } from "../core/dom.js";
import { block, say } from "../core/text.js";

const DEEPEST = 8;
const MOST = 200;

function scalar(value) {
  if (value === null || value === undefined) return h("span", { class: "v-null" }, "null");
  if (typeof value === "string") return h("span", { class: "v-text" }, say(value, 4000));
  return h("span", { class: `v-${typeof value}` }, String(value));
}

const flat = (value) => Array.isArray(value) && value.length <= 24 && value.every((one) => typeof one !== "object" && short(one)) && JSON.stringify(value).length < 120;
function short(value) {
  if (typeof value === "string") return value.length <= 200 && !value.includes("\n");
  return value === null || typeof value !== "object" || !Object.keys(value).length || flat(value);
}

const PICTURE = /\.(png|jpe?g|gif|webp)$/i;

/** Pictures of a value that a weave client stored as files; null when it is not one. */
function pictures(value) {
  if (value._type !== "CustomWeaveType" || typeof value.files !== "object" || value.files === null) return null;
  const shown = Object.entries(value.files).filter(([name]) => PICTURE.test(name));
  return shown.length ? h("div", { class: "images" }, shown.map(([name, digest]) => h("img", { src: `/api/external/file/${encodeURIComponent(digest)}`, loading: "lazy", alt: name }))) : null;
}

/** A value as nodes. `depth` bounds the nesting: what is deeper is shown as JSON text. */
export function tree(value, depth = 0) {
  if (typeof value === "string" && !short(value)) return block(value, "v-block");
  if (value === null || typeof value !== "object") return scalar(value);
  const list = Array.isArray(value);
  const seen = list ? null : pictures(value);
  if (seen) return seen;
  const entries = list ? value.map((one, i) => [String(i), one]) : Object.entries(value);
  if (!entries.length) return h("span", { class: "v-null" }, list ? "[ ]" : "{ }");
  if (depth >= DEEPEST) return block(JSON.stringify(value, null, 2), "v-block");
  if (flat(value)) {
    return h("span", { class: "v-list" }, "[", value.map((one, i) => [i ? ", " : null, scalar(one)]), "]");
  }
  const rows = entries.slice(0, MOST).map(([key, one]) => h("div", { class: short(one) ? null : "tall" }, h("dt", null, list ? h("span", { class: "v-index" }, key) : say(key, 200)), h("dd", null, tree(one, depth + 1))));
  if (entries.length > MOST) rows.push(h("div", null, h("dt", null, "…"), h("dd", null, `${entries.length - MOST} more`)));
  return h("dl", { class: "values" }, rows);
}

/** Arguments that came as text are parsed when they are JSON, and shown as they are when not. */
export function argumentsOf(given) {
  if (typeof given !== "string") return given ?? {};
  try {
    return JSON.parse(given);
  } catch {
    return given;
  }
}
