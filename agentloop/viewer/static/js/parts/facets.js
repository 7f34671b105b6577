// The filters of a table, at its side: what there is, how often, and ranges. State lives in the address alone.
import { debounce, h, replace } from "../core/dom.js";
import { integer } from "../core/format.js";
import { say, shown } from "../core/text.js";

/**
 * `fields: [{name, label}]` are lists of values with counts, `ranges: [{label, low, high, step}]` pairs of numbers.
 * `get()` returns the current values, `change(values)` takes new ones.
 */
export class Facets {
  constructor({ fields, ranges, get, change, label, placeholder }) {
    Object.assign(this, { fields, ranges, get, change });
    this.search = h("input", { type: "search", id: "search", placeholder, "aria-label": placeholder, autocomplete: "off", spellcheck: "false" });
    const searched = debounce(160, () => this.apply({ q: this.search.value }));
    this.search.addEventListener("input", searched);
    this.search.addEventListener("keydown", (event) => event.key === "Enter" && (searched.cancel(), this.apply({ q: this.search.value })));
    this.lists = h("div", { class: "facet-lists" });
    this.numbers = h("div", { class: "facet-ranges" });
    this.clear = h("button", { type: "button", class: "plain", on: { click: () => this.change({}) } }, "Clear all filters");
    this.inputs = new Map();
    for (const range of ranges) this.addRange(range);
    this.element = h("aside", { class: "facets", "aria-label": label },
      h("div", { class: "facet-search" }, this.search),
      h("details", { class: "facet-fold", open: window.innerWidth > 900 }, h("summary", null, "Filters"), this.lists, this.numbers, this.clear));
  }

  addRange({ label, low, high, step = "any", min }) {
    const field = (name, words) => {
      const input = h("input", { type: "number", step, min, placeholder: words, "aria-label": `${label}, ${words}` });
      input.addEventListener("input", debounce(250, () => this.apply({ [name]: input.value })));
      this.inputs.set(name, input);
      return input;
    };
    this.numbers.append(h("fieldset", { class: "facet range" }, h("legend", null, label), field(low, "from"), h("span", { "aria-hidden": "true" }, "–"), field(high, "to")));
  }

  apply(changed) {
    const values = { ...this.get(), ...changed };
    for (const [name, value] of Object.entries(values)) if (value === "" || (Array.isArray(value) && !value.length)) delete values[name];
    this.change(values);
  }

  /** Show the address's values and the server's counts; the field that is typed in is left alone. */
  set(facets) {
    const values = this.get();
    const write = (input, value) => document.activeElement !== input && input.value !== (value ?? "") && (input.value = value ?? "");
    write(this.search, values.q);
    for (const [name, input] of this.inputs) write(input, values[name]);
    this.clear.hidden = !Object.keys(values).some((name) => name !== "sort");
    const focused = document.activeElement?.dataset?.facet;
    replace(this.lists, this.fields.map((field) => this.list(field, facets?.[field.name], [values[field.name] ?? []].flat())));
    if (focused) [...this.lists.querySelectorAll("input")].find((input) => input.dataset.facet === focused)?.focus({ preventScroll: true });
  }

  list({ name, label, most = 8 }, counts, chosen) {
    const entries = Object.entries(counts ?? {});
    for (const value of chosen) if (!entries.some(([one]) => one === value)) entries.push([value, null]);
    if (entries.length < 2 && !chosen.length) return null;
    entries.sort((a, b) => (b[1] ?? 0) - (a[1] ?? 0));
    const shownEntries = entries.filter(([value], i) => i < most || chosen.includes(value));
    return h("fieldset", { class: "facet" }, h("legend", null, label), shownEntries.map(([value, count]) => {
      const box = h("input", { type: "checkbox", checked: chosen.includes(value), data: { facet: `${name}=${value}` } });
      box.addEventListener("change", () => this.apply({ [name]: box.checked ? [...chosen, value] : chosen.filter((one) => one !== value) }));
      return h("label", { title: shown(value) }, box, h("span", { class: "facet-name" }, value === "" ? h("em", null, "none") : say(value, 60)), h("span", { class: "count" }, count === null ? "" : integer(count)));
    }), entries.length > shownEntries.length ? h("p", { class: "quiet" }, `and ${entries.length - shownEntries.length} more: search for them`) : null);
  }
}
