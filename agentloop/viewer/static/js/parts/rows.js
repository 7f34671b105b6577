// A table over any number of rows: only those in sight are asked for and drawn. Rows are links, so that the keyboard,
// the middle button and screen readers work as on any page.
import { announce, debounce, h, replace } from "../core/dom.js";
import { integer } from "../core/format.js";
import { problem } from "./badges.js";

const PAGE = 100;
const AROUND = 12; // rows drawn above and below what is in sight
const PAGES_KEPT = 60;

/**
 * `columns: [{name, label, title, cell(row) -> node | text, sort, num, width, fill}]`, the first holds the link;
 * `load(offset, limit, signal) -> {total, rows}`, `href(row)`, `onSort(sort)`, `sort` like "-reward".
 */
export class Rows {
  constructor({ columns, load, href, onSort, onTotal, sort, label, noun = "rows", whenEmpty }) {
    Object.assign(this, { columns, load, href, onSort, onTotal, sort, noun, whenEmpty });
    this.pages = new Map();
    this.asked = new Map();
    this.drawn = new Map();
    this.total = 0;
    this.active = 0;
    this.round = 0;
    this.before = h("tr", { class: "gap", "aria-hidden": "true" }, h("td"));
    this.after = h("tr", { class: "gap", "aria-hidden": "true" }, h("td"));
    this.body = h("tbody", null, this.before, this.after);
    this.head = h("tr", { "aria-rowindex": "1" });
    this.table = h("table", { class: "rows", "aria-label": label }, h("colgroup", null, columns.map((one) => h("col", { vars: one.width ? { width: one.width } : {} }))), h("thead", null, this.head), this.body);
    this.note = h("div", { class: "table-note" });
    this.element = h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": `${label}, scrolls` }, this.table, this.note);
    this.element.addEventListener("scroll", () => requestAnimationFrame(() => this.draw()), { passive: true });
    this.element.addEventListener("focusin", (event) => {
      const row = event.target.closest?.("tr[data-index]");
      if (row) this.mark(Number(row.dataset.index));
    });
    this.element.addEventListener("click", (event) => this.click(event));
    this.fetchSoon = debounce(30, () => this.fetchInSight());
    this.resized = new ResizeObserver(() => this.draw());
    this.resized.observe(this.element);
    this.drawHead();
  }

  dispose() {
    this.round += 1;
    this.resized.disconnect();
    for (const control of this.asked.values()) control.abort();
  }

  /** Ask again from the first row on, e.g. for other filters. Keeps what is seen until the answer is there. */
  async reload({ keep = false } = {}) {
    this.round += 1;
    this.failed = false;
    for (const control of this.asked.values()) control.abort();
    this.asked.clear();
    this.stale = this.pages;
    this.pages = new Map();
    this.element.setAttribute("aria-busy", "true");
    if (!keep) {
      this.element.scrollTop = 0;
      this.active = 0;
    }
    await this.fetchPage(keep ? Math.floor(this.range()[0] / PAGE) : 0);
    this.stale = null;
    this.draw(true);
  }

  async fetchPage(page) {
    if (this.pages.has(page) || this.asked.has(page)) return;
    const control = new AbortController();
    const round = this.round;
    this.asked.set(page, control);
    try {
      const answer = await this.load(page * PAGE, PAGE, control.signal);
      if (round !== this.round) return;
      this.pages.set(page, answer.rows);
      if (this.pages.size > PAGES_KEPT) this.pages.delete(this.pages.keys().next().value);
      this.element.removeAttribute("aria-busy");
      this.setTotal(answer.total);
      this.onTotal?.(answer);
      replace(this.note, answer.total === 0 ? (this.whenEmpty?.() ?? h("p", { class: "empty" }, `No ${this.noun} with these filters.`)) : null);
    } catch (error) {
      if (error.name === "AbortError" || round !== this.round) return;
      this.failed = true; // asked again by the reader: a reload, another filter
      this.element.removeAttribute("aria-busy");
      replace(this.note, problem(error));
    } finally {
      if (this.asked.get(page) === control) this.asked.delete(page);
    }
  }

  setTotal(total) {
    if (total !== this.said) announce(`${integer(total)} ${this.noun}`);
    this.said = this.total = total;
    this.active = Math.max(0, Math.min(this.active, total - 1));
    this.table.setAttribute("aria-rowcount", String(total + 1));
  }

  row(index) {
    const page = Math.floor(index / PAGE);
    return (this.pages.get(page) ?? this.stale?.get(page))?.[index % PAGE];
  }

  height() {
    if (!this.rowHeight) {
      const probe = h("tr", { class: "probe" }, h("td", null, "x"));
      this.body.append(probe);
      this.rowHeight = probe.getBoundingClientRect().height || 30;
      probe.remove();
    }
    return this.rowHeight;
  }

  range() {
    const top = Math.max(0, this.element.scrollTop);
    const first = Math.max(0, Math.floor(top / this.height()) - AROUND);
    return [first, Math.min(this.total, Math.ceil((top + this.element.clientHeight) / this.height()) + AROUND)];
  }

  draw(fresh = false) {
    if (!this.element.isConnected) return;
    const [first, end] = this.range();
    const focused = document.activeElement?.closest?.("tr[data-index]");
    const held = focused && this.body.contains(focused) ? Number(focused.dataset.index) : -1;
    const next = new Map();
    for (let index = first; index < end; index++) {
      const row = this.row(index);
      const old = this.drawn.get(index);
      next.set(index, old && old.row === row && !fresh ? old : { row, element: this.line(index, row) });
    }
    this.drawn = next;
    this.before.firstChild.style.height = `${first * this.height()}px`;
    this.after.firstChild.style.height = `${Math.max(0, this.total - end) * this.height()}px`;
    const wanted = [this.before, ...[...next.values()].map((one) => one.element), this.after];
    const same = wanted.length === this.body.children.length && wanted.every((one, i) => this.body.children[i] === one);
    if (!same) {
      this.body.replaceChildren(...wanted);
      if (held >= 0) this.drawn.get(held)?.element.querySelector("a")?.focus({ preventScroll: true });
    }
    this.fetchSoon();
  }

  fetchInSight() {
    if (this.failed) return;
    const [first, end] = this.range();
    const from = Math.floor(first / PAGE);
    const to = Math.floor(Math.max(0, end - 1) / PAGE);
    for (const [page, control] of this.asked) if (page < from || page > to) control.abort();
    for (let page = from; page <= to; page++) {
      if (!this.pages.has(page) && page * PAGE < Math.max(1, this.total)) this.fetchPage(page).then(() => this.draw());
    }
  }

  line(index, row) {
    const line = h("tr", { "aria-rowindex": String(index + 2), data: { index: String(index) }, class: index === this.active ? "active" : null });
    if (!row) {
      line.append(h("td", { colspan: 2, class: "coming" }, h("span", { class: "sr" }, "loading")));
      return line;
    }
    this.columns.forEach((column, i) => {
      const content = column.cell(row);
      line.append(h("td", { class: column.num ? "n" : null }, i === 0 ? h("a", { href: this.href(row), tabindex: index === this.active ? "0" : "-1" }, content) : content));
    });
    return line;
  }

  drawHead() {
    replace(this.head, this.columns.map((column) => {
      const active = column.sort && (this.sort ?? "").replace(/^-/, "") === column.sort;
      const down = active && this.sort.startsWith("-");
      const sorted = active ? (down ? "descending" : "ascending") : null;
      const arrow = h("span", { class: "arrow", "aria-hidden": "true" }, active ? (down ? "↓" : "↑") : "");
      const press = () => {
        this.sort = active ? (down ? column.sort : `-${column.sort}`) : column.first === "up" ? column.sort : `-${column.sort}`;
        this.drawHead();
        this.onSort(this.sort);
      };
      return h("th", { scope: "col", class: column.num ? "n" : null, "aria-sort": sorted, title: column.title },
        column.sort ? h("button", { type: "button", on: { click: press } }, column.label, arrow) : column.label);
    }));
  }

  click(event) {
    const row = event.target.closest("tr[data-index]");
    if (!row || event.target.closest("a, button") || String(window.getSelection())) return;
    const anchor = row.querySelector("a");
    if (!anchor) return;
    if (event.metaKey || event.ctrlKey) window.open(anchor.href);
    else anchor.click();
  }

  mark(index) {
    if (index === this.active) return;
    for (const [at, on] of [[this.active, false], [index, true]]) {
      const line = this.drawn.get(at)?.element;
      line?.classList.toggle("active", on);
      line?.querySelector("a")?.setAttribute("tabindex", on ? "0" : "-1");
    }
    this.active = index;
  }

  /** Move the focus by rows, scrolling as far as needed. */
  async move(by) {
    if (!this.total) return;
    const inTable = this.element.contains(document.activeElement) && document.activeElement.closest("tr[data-index]");
    const index = Math.max(0, Math.min(this.total - 1, inTable ? this.active + by : this.active));
    const top = index * this.height();
    const seen = this.element.clientHeight - this.head.getBoundingClientRect().height;
    if (top < this.element.scrollTop) this.element.scrollTop = top;
    else if (top + this.height() > this.element.scrollTop + seen) this.element.scrollTop = top + this.height() - seen;
    this.draw();
    if (!this.row(index)) {
      await this.fetchPage(Math.floor(index / PAGE));
      this.draw();
    }
    this.mark(index);
    this.drawn.get(index)?.element.querySelector("a")?.focus({ preventScroll: true });
  }
}
