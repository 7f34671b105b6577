// Text of models and tools as it is: control characters, ANSI sequences and bidirectional marks become visible
// symbols that do nothing, and each piece is isolated from the direction of the text around it.
import { h } from "./dom.js";

const NAMES = {
  0x061c: "ARABIC LETTER MARK", 0x200b: "ZERO WIDTH SPACE", 0x200e: "LEFT-TO-RIGHT MARK", 0x200f: "RIGHT-TO-LEFT MARK",
  0x2028: "LINE SEPARATOR", 0x2029: "PARAGRAPH SEPARATOR", 0x202a: "LEFT-TO-RIGHT EMBEDDING", 0x202b: "RIGHT-TO-LEFT EMBEDDING",
  0x202c: "POP DIRECTIONAL FORMATTING", 0x202d: "LEFT-TO-RIGHT OVERRIDE", 0x202e: "RIGHT-TO-LEFT OVERRIDE", 0x2060: "WORD JOINER",
  0x2066: "LEFT-TO-RIGHT ISOLATE", 0x2067: "RIGHT-TO-LEFT ISOLATE", 0x2068: "FIRST STRONG ISOLATE", 0x2069: "POP DIRECTIONAL ISOLATE",
  0xfeff: "BYTE ORDER MARK",
};
const CONTROLS = "NUL SOH STX ETX EOT ENQ ACK BEL BS TAB LF VT FF CR SO SI DLE DC1 DC2 DC3 DC4 NAK SYN ETB CAN EM SUB ESC FS GS RS US".split(" ");
// All of C0 but tab and newline, DEL and C1, soft hyphens, bidirectional and invisible marks, tag characters.
const HIDDEN =
  // eslint-disable-next-line no-control-regex
  /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\u{e0000}-\u{e007f}]|[\ud800-\udfff]/u;
const HIDDEN_ALL = new RegExp(HIDDEN.source, "gu");

/** The visible form of a hidden character: ⟨ESC⟩ for escape, ⟨U+202E⟩ for a mark. */
export function symbol(character) {
  const code = character.codePointAt(0);
  if (code < 0x20) return `⟨${CONTROLS[code]}⟩`;
  if (code === 0x7f) return "⟨DEL⟩";
  return `⟨U+${code.toString(16).toUpperCase().padStart(4, "0")}⟩`;
}

export function hasHidden(text) {
  return HIDDEN.test(text);
}

/** Plain string with symbols, for attributes and titles. */
export function shown(text) {
  return String(text ?? "").replace(HIDDEN_ALL, symbol);
}

/** Nodes of a text: strings, and a marked symbol for each hidden character. */
export function visible(text) {
  const value = String(text ?? "");
  if (!HIDDEN.test(value)) return [value];
  const nodes = [];
  let last = 0;
  for (const match of value.matchAll(HIDDEN_ALL)) {
    if (match.index > last) nodes.push(value.slice(last, match.index));
    const code = match[0].codePointAt(0);
    const name = `U+${code.toString(16).toUpperCase().padStart(4, "0")}${NAMES[code] ? ` ${NAMES[code]}` : ""}`;
    nodes.push(h("span", { class: "ctl", title: name }, symbol(match[0])));
    last = match.index + match[0].length;
  }
  if (last < value.length) nodes.push(value.slice(last));
  return nodes;
}

/** A short text in a line of the page: isolated, hidden characters shown, cut at `most` characters. */
export function say(text, most = 400) {
  const value = String(text ?? "");
  return h("bdi", null, visible(value.length > most ? `${value.slice(0, most)}…` : value));
}

/** The exception of a call in words; weave's client sends it as JSON. `whole`: with its traceback. */
export function exceptionText(text, whole = false) {
  try {
    const { type, message, traceback } = JSON.parse(text);
    if (typeof type === "string") return [`${type}: ${message ?? ""}`, ...(whole && traceback ? [String(traceback)] : [])].join("\n");
  } catch {
    // plain text
  }
  return text;
}

const AT_ONCE = 24_000;

/** A long text as a block. Beyond 24,000 characters the rest waits behind a button. */
export function block(text, className = "text") {
  const value = String(text ?? "");
  const body = h("div", { class: className, dir: "auto" }, visible(value.slice(0, AT_ONCE)));
  if (value.length <= AT_ONCE) return body;
  let at = AT_ONCE;
  const more = h("button", { type: "button", class: "more" });
  const label = () => (more.textContent = `Show more: ${(value.length - at).toLocaleString("en")} of ${value.length.toLocaleString("en")} characters`);
  more.addEventListener("click", () => {
    const next = Math.min(value.length, at + 10 * AT_ONCE);
    body.append(...visible(value.slice(at, next)));
    at = next;
    if (at === value.length) more.remove();
    else label();
  });
  label();
  return h("div", null, body, more);
}
