// Line plots in SVG: several series, hover and arrow keys, smoothing, log scale, one cursor in all plots of a page.
import { h, replace, svg } from "../core/dom.js";
import { compact, number } from "../core/format.js";
import { say } from "../core/text.js";
import { hideTip, showTip } from "./tip.js";

const WIDTH = 1000;
const HEIGHT = 300;
const finite = (value) => typeof value === "number" && Number.isFinite(value);

/** Exponential moving average without the bias of its start; gaps stay gaps. */
export function smoothed(values, weight) {
  if (!weight) return values;
  let mean = 0;
  let debt = 1;
  return values.map((value) => {
    if (!finite(value)) return null;
    mean = weight * mean + (1 - weight) * value;
    debt *= weight;
    return mean / (1 - debt);
  });
}

export function ticks(low, high, most = 5) {
  if (!(high > low)) return [low];
  const raw = (high - low) / most;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((one) => one * power).find((one) => one >= raw);
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9) * step; at <= high + step * 1e-9; at += step) found.push(Math.abs(at) < step * 1e-9 ? 0 : at);
  return found;
}

/** Decimals that a multiple of `step` needs: 2 for 0.25. */
function decimals(step) {
  let digits = 0;
  while (digits < 5 && Math.abs(step * 10 ** digits - Math.round(step * 10 ** digits)) > 1e-6) digits += 1;
  return digits;
}

function tickLabel(value, step) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 10_000) return compact(value);
  if (step < 1e-3) return value.toExponential(1).replace(".0e", "e");
  return value.toFixed(decimals(step));
}

function scaleOf(series, { log, low, high }) {
  const values = series.flatMap((one) => one.drawn).filter((value) => finite(value) && (!log || value > 0));
  if (!values.length) return null;
  let bottom = values.reduce((a, b) => Math.min(a, b));
  let top = values.reduce((a, b) => Math.max(a, b));
  if (log) {
    const from = Math.floor(Math.log10(bottom));
    const to = Math.max(from + 1, Math.ceil(Math.log10(top)));
    const every = Math.ceil((to - from) / 5);
    const marks = [];
    for (let power = from; power <= to; power += every) marks.push(10 ** power);
    return { marks, label: (value) => (value >= 0.01 && value < 1e4 ? String(Number(value.toPrecision(2))) : value.toExponential(0)), y: (value) => (value > 0 ? (Math.log10(value) - from) / (to - from) : 0) };
  }
  if (low !== undefined) bottom = Math.min(bottom, low);
  if (high !== undefined) top = Math.max(top, high);
  if (bottom === top) [bottom, top] = bottom === 0 ? [0, 1] : [Math.min(0, bottom * 2), Math.max(0, top * 2)];
  else if (bottom > 0 && bottom < 0.4 * top) bottom = 0;
  const marks = ticks(bottom, top, 4);
  const step = marks.length > 1 ? marks[1] - marks[0] : top - bottom;
  if (marks[0] > bottom + step * 1e-6) marks.unshift(marks[0] - step);
  if (marks[marks.length - 1] < top - step * 1e-6) marks.push(marks[marks.length - 1] + step);
  [bottom, top] = [marks[0], marks[marks.length - 1]];
  return { marks, label: (value) => tickLabel(value, step), y: (value) => (value - bottom) / (top - bottom) };
}

function pathOf(steps, values, x, y) {
  let d = "";
  let drawing = false;
  let alone = 0;
  for (let i = 0; i < steps.length; i++) {
    if (!finite(values[i])) {
      if (drawing && alone === 1) d += "h0.01";
      drawing = false;
      continue;
    }
    alone = drawing ? alone + 1 : 1;
    d += `${drawing ? "L" : "M"}${(x(steps[i]) * WIDTH).toFixed(1)} ${((1 - y(values[i])) * HEIGHT).toFixed(1)}`;
    drawing = true;
  }
  return drawing && alone === 1 ? `${d}h0.01` : d;
}

/** Plots of one page that share their cursor. */
export class PlotGroup {
  constructor() {
    this.plots = new Set();
  }

  moveTo(step) {
    for (const plot of this.plots) plot.moveCursor(step);
  }
}

/**
 * A plot of `series: [{label, steps, values, colour: 1..8, dash, marks, href}]`. `element` is the figure; `set` draws
 * again in place, so that the page does not move. `onPick(step)` is called for a click or Enter.
 */
export class Plot {
  constructor({ title, note, wide = false, group, onPick, pickHint, low, high, show = number }) {
    Object.assign(this, { title, onPick, show, low, high, group: group ?? new PlotGroup() });
    this.group.plots.add(this);
    this.series = [];
    this.at = -1;
    this.legend = h("ul", { class: "legend" });
    this.area = h("div", {
      class: "area", tabindex: "0", role: "img",
      "aria-label": `${title}: a plot over the steps. Arrow keys read the values.${onPick && pickHint ? ` Enter: ${pickHint}.` : ""}`,
      on: {
        pointermove: (event) => this.hover(event), pointerdown: (event) => this.hover(event), pointerleave: () => this.leave(), blur: () => this.leave(),
        click: () => this.pick(), keydown: (event) => this.key(event),
      },
    });
    if (onPick) this.area.classList.add("pickable");
    this.element = h("figure", { class: `card plot${wide ? " wide" : ""}` },
      h("figcaption", null, h("h3", null, title), note ? h("p", null, note) : null), this.legend, h("div", { class: "frame" }, this.area));
  }

  set(series, { log = false, smooth = 0 } = {}) {
    this.series = series.map((one) => ({ ...one, drawn: one.marks ? one.values : smoothed(one.values, smooth) }));
    this.steps = [...new Set(this.series.flatMap((one) => one.steps.filter((_, i) => finite(one.values[i]))))].sort((a, b) => a - b);
    const scale = scaleOf(this.series, { log, low: log ? undefined : this.low, high: log ? undefined : this.high });
    replace(this.legend, this.series.map((one) => this.legendEntry(one)));
    if (!scale || !this.steps.length) {
      replace(this.area, h("p", { class: "nothing" }, log ? "No positive value yet." : "No value yet."));
      return;
    }
    let [from, to] = [this.steps[0], this.steps[this.steps.length - 1]];
    if (from === to) [from, to] = [from - 0.5, to + 0.5];
    this.x = (step) => (step - from) / (to - from);
    const drawing = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", "aria-hidden": "true" });
    const dots = [];
    for (const one of this.series) {
      const colour = `c${one.colour}`;
      if (smooth && !one.marks) drawing.append(svg("path", { class: `line raw ${colour}`, d: pathOf(one.steps, one.values, this.x, scale.y) }));
      drawing.append(svg("path", { class: `${one.marks ? "thin dashed" : one.dash ? "line dashed" : "line"} ${colour}`, d: one.marks ? this.markPath(one, scale) : pathOf(one.steps, one.drawn, this.x, scale.y) }));
      if (one.marks) one.steps.forEach((step, i) => finite(one.values[i]) && dots.push(h("span", { class: `diamond ${colour}`, vars: { left: `${this.x(step) * 100}%`, top: `${(1 - scale.y(one.values[i])) * 100}%` } })));
    }
    const across = ticks(from, to, 6).filter((step) => Number.isInteger(step) && step >= from && step <= to);
    this.cursor = h("span", { class: "cursor", hidden: true });
    replace(this.area,
      scale.marks.map((value) => h("span", { class: "ytick", vars: { top: `${(1 - scale.y(value)) * 100}%` } }, h("em", null, scale.label(value)))),
      across.map((step) => h("span", { class: "xtick", vars: { left: `${this.x(step) * 100}%` } }, h("em", null, compact(step)))),
      drawing, dots, this.cursor);
  }

  /** Marks are joined over the steps between them. */
  markPath(one, scale) {
    const known = one.steps.map((step, i) => [step, one.drawn[i]]).filter(([, value]) => finite(value));
    return pathOf(known.map(([step]) => step), known.map(([, value]) => value), this.x, scale.y);
  }

  legendEntry(one) {
    let last = one.values.length - 1;
    while (last >= 0 && !finite(one.values[last])) last -= 1;
    const kind = one.marks ? "diamond" : one.dash ? "dash" : "";
    return h("li", null, h("span", { class: `key ${kind} c${one.colour}`, "aria-hidden": "true" }), one.href ? h("a", { href: one.href }, say(one.label)) : say(one.label), " ", h("b", null, last >= 0 ? this.show(one.values[last]) : "–"));
  }

  nearest(event) {
    const frame = this.area.getBoundingClientRect();
    const wanted = (event.clientX - frame.left) / frame.width;
    let best = 0;
    this.steps.forEach((step, i) => Math.abs(this.x(step) - wanted) < Math.abs(this.x(this.steps[best]) - wanted) && (best = i));
    return best;
  }

  hover(event) {
    if (!this.cursor?.isConnected || !this.steps.length) return;
    this.at = this.nearest(event);
    const frame = this.area.getBoundingClientRect();
    this.tell(frame.left + this.x(this.steps[this.at]) * frame.width, event.clientY);
  }

  tell(x, y) {
    const step = this.steps[this.at];
    this.group.moveTo(step);
    const lines = this.series.map((one) => {
      const index = one.steps.indexOf(step);
      if (index < 0 || !finite(one.values[index])) return null;
      const soft = one.drawn[index] !== one.values[index] ? h("span", { class: "soft" }, ` ${this.show(one.drawn[index])} smoothed`) : null;
      return h("p", { class: "line" }, h("span", { class: `key c${one.colour}` }), say(one.label, 60), h("b", null, this.show(one.values[index]), soft));
    });
    showTip(x, y, h("p", { class: "head" }, `step ${step}`), lines);
  }

  key(event) {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Enter") this.pick();
    if (!by || !this.steps.length) return;
    event.preventDefault();
    this.at = this.at < 0 ? (by > 0 ? 0 : this.steps.length - 1) : Math.max(0, Math.min(this.steps.length - 1, this.at + by));
    const frame = this.area.getBoundingClientRect();
    this.tell(frame.left + this.x(this.steps[this.at]) * frame.width, frame.top + frame.height / 2);
  }

  moveCursor(step) {
    if (!this.cursor?.isConnected) return;
    const x = this.x(step);
    this.cursor.hidden = !(x >= 0 && x <= 1);
    this.cursor.style.left = `${x * 100}%`;
  }

  leave() {
    hideTip();
    for (const plot of this.group.plots) if (plot.cursor) plot.cursor.hidden = true;
  }

  pick() {
    if (this.onPick && this.at >= 0 && this.steps.length) this.onPick(this.steps[this.at]);
  }
}

/** A line without axes, for a row of a table. */
export function sparkline(values, colour = 1) {
  const known = (values ?? []).filter(finite);
  if (known.length < 2) return h("span", { class: "spark" });
  const low = Math.min(...known);
  const span = Math.max(...known) - low || 1;
  const d = pathOf(values.map((_, i) => i), values, (i) => i / (values.length - 1), (value) => 0.08 + (0.84 * (value - low)) / span);
  return h("span", { class: "spark" }, svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", "aria-hidden": "true" }, svg("path", { class: `line c${colour}`, d })));
}
