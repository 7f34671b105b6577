// The token view: every token of a trajectory, shaded, with its facts under the pointer and under the keyboard.
// Blocks of tokens end at line breaks and are drawn when they come near, so that 64,000 tokens open at once.
import { announce, h, replace } from "../core/dom.js";
import { integer } from "../core/format.js";
import { hasHidden, shown, symbol } from "../core/text.js";
import { problem } from "../parts/badges.js";
import { TokenColumns } from "../parts/column.js";
import { MODES, tokenFacts } from "../parts/shades.js";
import { Strip } from "../parts/strip.js";
import { hideTip, showTipAt } from "../parts/tip.js";

const BLOCK = 320;
const LONGEST_BLOCK = 640;

/** Text of a token with what cannot be seen made visible: `↵`, `→`, `·` for spaces at its ends, symbols of controls. */
export function seen(text) {
  if (text === "") return "∅";
  let value = hasHidden(text) ? shown(text) : text;
  if (/^ +$/.test(value)) return "·".repeat(value.length - 1) || "";
  value = value.replace(/^ +/, (run) => "·".repeat(run.length - 1)); // the first one is drawn by the style sheet
  return value.replaceAll("\t", "→\t").replaceAll("\n", "↵\n");
}

export class TokenView {
  /** `at`: the position to open at. `changed(position, mode)` is told where the reader is. */
  constructor({ run, key, mode, at, changed, saysTrained = true }) {
    Object.assign(this, { changed, cursor: -1, blocks: [], wanted: at ?? -1 });
    this.mode = MODES.find((one) => one.name === mode) ?? MODES[0];
    this.columns = new TokenColumns(run, key);
    this.columns.scale.saysTrained = saysTrained;
    this.strip = new Strip(this.columns, (position) => this.select(position));
    this.legend = h("div", { class: "scale" });
    this.buttons = h("div", { class: "modes", role: "group", "aria-label": "Shade tokens by" }, MODES.map((mode_) => h("button", {
      type: "button", "aria-pressed": String(mode_ === this.mode), title: `key ${mode_.key}`, data: { mode: mode_.name }, on: { click: () => this.shade(mode_) } }, mode_.label)));
    this.count = h("span", { class: "quiet", role: "status" });
    this.warning = h("p", { class: "warn", hidden: true }, "No tokenizer was found for this run: tokens are shown as ids.");
    this.text = h("div", { class: "tokens", tabindex: "0", role: "application", "aria-roledescription": "tokens",
      "aria-label": "Tokens. Arrow keys walk along them, [ and ] jump between sampled parts, x goes to the most surprising one." });
    this.element = h("div", { class: "token-view" }, h("div", { class: "token-bar" }, this.buttons, this.legend, this.count), this.strip.element, this.warning, this.text);
    this.near = new IntersectionObserver((entries) => entries.forEach((entry) => entry.isIntersecting && this.draw(entry.target)), { rootMargin: "1200px 0px" });
    this.text.addEventListener("pointerover", (event) => this.point(event));
    this.text.addEventListener("pointerleave", () => this.unpoint());
    this.text.addEventListener("click", (event) => this.pick(event));
    this.text.addEventListener("keydown", (event) => this.key(event));
    this.text.addEventListener("wheel", () => clearTimeout(this.settling), { passive: true });
    this.text.addEventListener("pointerdown", () => clearTimeout(this.settling));
    this.text.addEventListener("copy", (event) => this.copy(event));
    this.redraw = () => this.strip.draw(this.mode);
    window.addEventListener("resize", this.redraw);
    this.themed = new MutationObserver(this.redraw);
    this.themed.observe(document.documentElement, { attributeFilter: ["data-theme"] });
  }

  async load() {
    try {
      await this.columns.load((start, end) => this.arrived(start, end));
    } catch (error) {
      this.text.append(problem(error));
    }
  }

  dispose() {
    clearTimeout(this.settling);
    this.columns.stop();
    this.near.disconnect();
    this.themed.disconnect();
    window.removeEventListener("resize", this.redraw);
    hideTip();
  }

  arrived(start, end) {
    const { columns } = this;
    let from = this.pending ?? start;
    while (from < end) {
      const stop = this.blockEnd(from, end);
      if (stop === end && end < columns.length) break; // the next window may continue this block
      this.addBlock(from, stop);
      from = stop;
    }
    this.pending = from;
    const loading = columns.loaded < columns.length;
    this.count.textContent = `${integer(columns.length)} tokens${loading ? `, ${integer(columns.loaded)} loaded` : ""}`;
    this.warning.hidden = columns.hasText;
    this.showLegend();
    this.strip.draw(this.mode);
    if (this.wanted >= 0 && this.wanted < this.pending) {
      const position = this.wanted;
      this.wanted = -1;
      this.select(position, { quiet: true });
    }
  }

  /** A block is of one kind (prompt, shown, sampled) and ends at a line break, if one comes soon. */
  blockEnd(from, end) {
    const { columns } = this;
    const kind = this.kindOf(from);
    for (let i = from; i < end; i++) {
      if (i > from && this.kindOf(i) !== kind) return i;
      const size = i + 1 - from;
      if (size >= LONGEST_BLOCK || (size >= BLOCK && columns.pieces[i].includes("\n"))) return i + 1;
    }
    return end;
  }

  kindOf(i) {
    return i < this.columns.prompt ? "prompt" : this.columns.mask[i] ? "sampled" : "observed";
  }

  addBlock(start, end) {
    const kind = this.kindOf(start);
    const begins = start === 0 || this.kindOf(start - 1) !== kind;
    const text = h("div", { class: "token-text", dir: "auto" });
    let letters = 0;
    for (let i = start; i < end; i++) letters += this.columns.pieces[i].length;
    const element = h("div", { class: `tokens-block ${kind}${begins ? " begins" : ""}`, data: { start: String(start), end: String(end) }, vars: { "--lines": String(Math.ceil(letters / 90) + 1) } },
      begins ? h("p", { class: "who" }, this.headOf(kind, start)) : null, text);
    this.blocks.push({ start, end, element, text, filled: false });
    this.text.append(element);
    this.near.observe(element);
  }

  headOf(kind, start) {
    const name = { prompt: "Prompt, shown to the model", observed: "Shown to the model", sampled: "Sampled by the model" }[kind];
    return `${name} · from token ${integer(start)}`;
  }

  blockOf(position) {
    let low = 0;
    let high = this.blocks.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (this.blocks[middle].start <= position) low = middle;
      else high = middle - 1;
    }
    return this.blocks[low];
  }

  draw(element) {
    const block = this.blockOf(Number(element.dataset.start));
    if (!block || block.filled) return;
    block.filled = true;
    this.near.unobserve(element);
    const nodes = document.createDocumentFragment();
    for (let i = block.start; i < block.end; i++) nodes.append(this.node(i));
    block.text.replaceChildren(nodes);
    element.classList.add("drawn");
  }

  node(i) {
    const token = this.columns.token(i);
    const node = document.createElement("i");
    node.textContent = this.columns.hasText ? seen(token.text) : `${token.id} `;
    node.className = this.classOf(token);
    return node;
  }

  classOf(token) {
    let name = this.mode.shade(token, this.columns.scale);
    const space = this.columns.hasText && token.text.startsWith(" ");
    if (space) name += " sp";
    if (token.special) name += " x";
    else if (this.columns.hasText && (!token.text || !token.text.trim())) name += " ws";
    return name;
  }

  shade(mode) {
    this.mode = mode;
    for (const button of this.buttons.children) button.setAttribute("aria-pressed", String(button.dataset.mode === mode.name));
    for (const block of this.blocks) {
      if (!block.filled) continue;
      let i = block.start;
      for (const node of block.text.children) node.className = this.classOf(this.columns.token(i++));
    }
    const lit = this.cursor >= 0 ? this.nodeAt(this.cursor) : null;
    lit?.classList.add("lit");
    this.showLegend();
    this.strip.draw(mode);
    this.changed?.(this.cursor, mode.name);
    announce(`Shaded by ${mode.label}`);
  }

  showLegend() {
    const lacks = this.mode.needs && this.columns.loaded >= this.columns.length && !this.columns.known[this.mode.needs];
    replace(this.legend, lacks ? h("span", { class: "warn" }, this.mode.lacks) : this.mode.legend(this.columns.scale).map(([name, label]) => h("i", { class: name }, label || "\u00a0\u00a0")));
  }

  nodeAt(position) {
    const block = this.blockOf(position);
    if (!block) return null;
    this.draw(block.element);
    return block.text.children[position - block.start] ?? null;
  }

  positionOf(node) {
    const block = this.blockOf(Number(node.closest(".tokens-block").dataset.start));
    return block.start + [...block.text.children].indexOf(node);
  }

  tip(position) {
    const token = this.columns.token(position);
    const kind = token.special ? "special token" : this.kindOf(position) === "sampled" ? (token.trained ? "sampled and trained" : this.columns.scale.saysTrained ? "sampled, not trained" : "sampled by the model") : "shown to the model";
    return [h("p", { class: "tip-token" }, h("bdi", null, this.columns.hasText ? JSON.stringify(shown(token.text)).slice(0, 200) : `token ${token.id}`)), h("p", { class: "head" }, kind),
      tokenFacts(token).map(([label, value]) => h("p", { class: "line" }, h("span", null, label), h("b", null, value)))];
  }

  point(event) {
    const node = event.target.closest?.(".token-text > i");
    if (!node) return this.unpoint();
    showTipAt(node, this.tip(this.positionOf(node)));
  }

  unpoint() {
    if (this.cursor >= 0 && document.activeElement === this.text) showTipAt(this.nodeAt(this.cursor), this.tip(this.cursor));
    else hideTip();
  }

  pick(event) {
    const node = event.target.closest?.(".token-text > i");
    if (node && !String(getSelection())) this.select(this.positionOf(node));
  }

  /** Put the cursor on a token; its facts are shown, and said to screen readers. */
  select(position, { quiet = false } = {}) {
    if (position < 0 || position >= this.columns.length) return;
    if (position >= (this.pending ?? 0)) {
      this.wanted = position;
      return;
    }
    if (this.cursor >= 0) this.nodeAt(this.cursor)?.classList.remove("lit");
    this.cursor = position;
    const node = this.nodeAt(position);
    if (!node) return;
    node.classList.add("lit");
    this.bringNear(node);
    this.strip.at(position);
    if (!quiet) {
      showTipAt(node, this.tip(position));
      announce(this.spoken(position));
      this.changed?.(position, this.mode.name);
    }
  }

  /**
   * Scroll to a token. Blocks on the way get their true height only when they are drawn, so it is looked at again for
   * a moment, until the reader scrolls or goes on.
   */
  bringNear(node, again = 14) {
    const box = node.getBoundingClientRect();
    if (box.top < 160 || box.bottom > innerHeight - 40) node.scrollIntoView({ block: "center" });
    clearTimeout(this.settling);
    if (again) this.settling = setTimeout(() => node.isConnected && this.bringNear(node, again - 1), 50);
  }

  spoken(position) {
    const token = this.columns.token(position);
    return `${token.text.trim() ? shown(token.text) : JSON.stringify(token.text)}. ${tokenFacts(token).map(([label, value]) => `${label} ${value}`).join(", ")}`;
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const last = this.columns.loaded - 1;
    const moves = {
      ArrowRight: () => this.cursor + 1, ArrowLeft: () => (this.cursor < 0 ? 0 : this.cursor - 1), ArrowDown: () => this.lineMove(1), ArrowUp: () => this.lineMove(-1),
      Home: () => 0, End: () => last, "]": () => this.nextPart(1), "[": () => this.nextPart(-1), x: () => this.surprise(),
    };
    if (!moves[event.key]) return;
    event.preventDefault();
    event.stopPropagation();
    this.select(Math.max(0, Math.min(last, moves[event.key]())));
  }

  /** The token above or below the cursor. */
  lineMove(by) {
    if (this.cursor < 0) return 0;
    const from = this.nodeAt(this.cursor).getClientRects()[0];
    let best = this.cursor;
    for (let i = this.cursor + by, steps = 0; i >= 0 && i < (this.pending ?? 0) && steps < 600; i += by, steps++) {
      const box = this.nodeAt(i)?.getClientRects()[0];
      if (!box || Math.abs(box.top - from.top) < 4) continue;
      best = i;
      if (by > 0 ? box.right >= from.left + 1 : box.left <= from.left + 1) break;
    }
    return best;
  }

  nextPart(by) {
    for (let i = Math.max(0, this.cursor) + by; i > 0 && i < this.columns.loaded; i += by) if (this.columns.mask[i] && !this.columns.mask[i - 1]) return i;
    return Math.max(0, this.cursor);
  }

  /** The token that stands out most in the current shading. */
  surprise() {
    const measure = {
      difference: (token) => Math.abs(token.difference ?? 0), advantage: (token) => Math.abs(token.advantage ?? 0),
    }[this.mode.name] ?? ((token) => -(token.logprob ?? 0));
    let best = 0;
    let most = -1;
    for (let i = 0; i < this.columns.loaded; i++) {
      if (!this.columns.mask[i]) continue;
      const value = measure(this.columns.token(i));
      if (value > most) [best, most] = [i, value];
    }
    return best;
  }

  /** Copy what was sampled, not the marks that make whitespace visible. */
  copy(event) {
    const range = getSelection()?.rangeCount ? getSelection().getRangeAt(0) : null;
    const nodes = range ? [...this.text.querySelectorAll(".token-text > i")].filter((node) => range.intersectsNode(node)) : [];
    if (!nodes.length) return;
    event.preventDefault();
    event.clipboardData.setData("text/plain", nodes.map((node) => this.columns.pieces[this.positionOf(node)]).join(""));
  }
}
