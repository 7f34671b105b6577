// The table of episodes: filters at the side, sorting, full-text search; 100,000 rows and more.
import { api } from "../core/api.js";
import { h, replace } from "../core/dom.js";
import { fixed, integer, number, plural, seconds } from "../core/format.js";
import { subscribe } from "../core/live.js";
import { episodeLink, link, rewrite, values } from "../core/route.js";
import { say, shown } from "../core/text.js";
import { points, unread } from "../parts/badges.js";
import { Facets } from "../parts/facets.js";
import { Rows } from "../parts/rows.js";

export const SCOPES = { task_id: "task", group_id: "group", cause: "cause", tool: "tool", version: "version" };

const parts = (row) => {
  const entries = Object.entries(row.parts ?? {});
  return h("span", { class: "cut parts-cell", title: entries.map(([name, value]) => `${shown(name)} ${fixed(value)}`).join("\n") }, entries.map(([name, value], i) => [i ? " " : null, h("span", null, say(name, 24), " ", h("b", null, fixed(value, 2)))]));
};

export const COLUMNS = [
  { name: "episode", label: "Episode", sort: "step", width: "11rem", cell: (row) => [h("span", { class: "at-step" }, row.split === "train" ? integer(row.step) : `${row.split} ${integer(row.step)}`), " ", say(row.task_id || row.group_id, 60), h("span", { class: "quiet" }, ` #${row.sample_index}`)] },
  { name: "reward", label: "Reward", sort: "reward", num: true, width: "4.8rem", cell: (row) => points(row.reward) },
  { name: "parts", label: "Parts", width: "9.5rem", cell: parts },
  { name: "turns", label: "Turns", sort: "turns", num: true, width: "4rem", cell: (row) => integer(row.turns) },
  { name: "tool_calls", label: "Calls", title: "tool calls", sort: "tool_calls", num: true, width: "3.9rem", cell: (row) => integer(row.tool_calls) },
  { name: "stop_reason", label: "Stop", title: "stop reason", sort: "stop_reason", first: "up", width: "6rem", cell: (row) => h("span", { class: row.stop_reason === "stop" ? "quiet" : "warnish" }, say(row.stop_reason, 40)) },
  { name: "staleness", label: "Stale", title: "versions behind when trained", sort: "staleness", num: true, width: "3.9rem", cell: (row) => integer(row.staleness) },
  { name: "length", label: "Tokens", title: "length in tokens", sort: "length", num: true, width: "4.6rem", cell: (row) => integer(row.length) },
  { name: "mismatch", label: "Mismatch", title: "mean |engine − trainer| log probability", sort: "mismatch", num: true, width: "5.6rem", cell: (row) => (typeof row.mismatch === "number" ? number(row.mismatch) : h("span", { title: "No logprobs of the trainer before the update are stored for this episode" }, "–")) },
  { name: "latency", label: "Time", title: "seconds the episode took", sort: "latency_s", num: true, width: "4.9rem", cell: (row) => seconds(row.latency_s) },
  { name: "status", label: "Status", sort: "status", first: "up", width: "5.2rem", cell: (row) => (row.status === "ok" ? h("span", { class: "quiet" }, "ok") : h("span", { class: "pill bad" }, say(row.status))) },
  { name: "preview", label: "Answer", cell: (row) => h("span", { class: "cut preview" }, row.error ? h("span", { class: "alarm" }, say(row.error, 200)) : say(row.answer?.trim() || row.reply || row.preview || "", 200)) },
];

export class EpisodesView {
  title = "Episodes";

  constructor({ run, params }) {
    Object.assign(this, { run, filters: values(params) });
    this.rows = new Rows({
      columns: COLUMNS, label: "Episodes", noun: "episodes", sort: this.filters.sort,
      load: (offset, limit, signal) => this.ask(offset, limit, signal),
      href: (row) => episodeLink(run, row.key, this.filters),
      onSort: (sort) => this.change({ ...this.filters, sort }),
      onTotal: (answer) => this.arrived(answer),
    });
    this.facets = new Facets({
      fields: [{ name: "split", label: "Split" }, { name: "status", label: "Status" }, { name: "stop_reason", label: "Stop reason" }, { name: "agent_name", label: "Agent" }, { name: "data_source", label: "Data" }],
      ranges: [{ label: "Step", low: "step_from", high: "step_to", step: 1, min: 0 }, { label: "Reward", low: "min_reward", high: "max_reward" }, { label: "Turns", low: "min_turns", high: "max_turns", step: 1, min: 0 }, { label: "Tool errors", low: "min_tool_errors", high: "max_tool_errors", step: 1, min: 0 }, { label: "Tokens", low: "min_length", high: "max_length", step: 1, min: 0 }],
      get: () => this.forFields(), change: (next) => this.change(this.fromFields(next)), label: "Filters", placeholder: "Search the text",
    });
    this.count = h("span", { class: "total" });
    this.scope = h("span", { class: "scope" });
    this.notice = h("div");
    this.fresh = h("button", { type: "button", class: "fresh", hidden: true, on: { click: () => this.showFresh() } });
    this.element = h("div", { class: "episodes-page" }, this.facets.element, h("section", { class: "episodes-main", "aria-label": "Episodes" },
      h("div", { class: "table-head" }, h("h1", null, "Episodes"), this.count, this.scope, this.fresh), this.notice, this.rows.element));
    this.stop = subscribe(() => this.heard(), run);
  }

  /** Counts of the filters come with the first rows, and not when only the order changed. */
  ask(offset, limit, signal) {
    const counted = offset === 0 && !this.sortOnly ? null : 0;
    return api.episodes(this.run, { ...this.filters, offset, limit, facets: counted }, { signal });
  }

  bindings() {
    const move = (by) => () => void this.rows.move(by);
    return [
      { keys: ["j", "ArrowDown"], what: "next row", run: move(1) }, { keys: ["k", "ArrowUp"], what: "previous row", run: move(-1) },
      { keys: ["PageDown"], run: move(20) }, { keys: ["PageUp"], run: move(-20) }, { keys: ["G", "End"], what: "last row", run: move(Infinity) }, { keys: ["Home"], what: "first row", run: move(-Infinity) },
      { keys: ["Enter", "o"], what: "open the row", run: (event) => (event.target.closest?.("a, button, summary") ? false : this.rows.element.querySelector("tr.active a")?.click()) },
      { keys: ["r"], what: "show new episodes", run: () => !this.fresh.hidden && this.showFresh() },
    ];
  }

  dispose() {
    this.stop();
    clearTimeout(this.timer);
    this.rows.dispose();
  }

  async load() {
    this.facets.set(null);
    await this.rows.reload();
  }

  /** The address says `step=3-9`; the fields are two numbers. */
  forFields() {
    const { step, ...rest } = this.filters;
    const [from, to] = String(step ?? "").split("-");
    return { ...rest, ...(step ? { step_from: from, step_to: to ?? from } : {}) };
  }

  fromFields({ step_from: from, step_to: to, ...rest }) {
    if (from || to) rest.step = from === to ? from : `${from ?? 0}-${to ?? ""}`;
    return rest;
  }

  change(next) {
    this.sortOnly = next.sort !== this.filters.sort;
    this.filters = next;
    rewrite(link(["run", this.run, "episodes"], next));
    if (!this.sortOnly) this.facets.set(this.lastFacets);
    this.rows.reload();
  }

  /** Another address of this view (back, forward, a link): no need to build it again. */
  update(params) {
    this.sortOnly = false;
    this.filters = values(params);
    this.rows.sort = this.filters.sort;
    this.rows.drawHead();
    return this.rows.reload();
  }

  arrived({ total, rows, facets, indexing, problems }) {
    if (rows.length) this.rows.table.classList.toggle("no-parts", !rows.some((row) => Object.keys(row.parts ?? {}).length));
    if (facets) this.lastFacets = facets;
    this.facets.set(this.lastFacets);
    this.count.textContent = `${integer(total)}${indexing ? ", indexing the trace" : ""}`;
    replace(this.notice, unread(problems));
    if (indexing) this.heard(1500);
    const scopes = Object.entries(SCOPES).filter(([name]) => this.filters[name]);
    replace(this.scope, scopes.map(([name, label]) => h("span", { class: "chip" }, `${label} `, say([this.filters[name]].flat().join(", "), 60),
      h("button", { type: "button", "aria-label": `remove the filter ${label}`, on: { click: () => this.change(Object.fromEntries(Object.entries(this.filters).filter(([one]) => one !== name))) } }, "×"))));
  }

  /** New episodes wait behind a button: what is being read does not move. */
  heard(wait = 250) {
    clearTimeout(this.timer);
    this.timer = setTimeout(async () => {
      const { total, indexing } = await api.episodes(this.run, { ...this.filters, offset: 0, limit: 1, facets: 0 });
      const more = total - this.rows.total;
      if (indexing) this.heard(1500);
      else this.count.textContent = integer(this.rows.total);
      if (this.rows.total === 0 && more > 0) return this.rows.reload();
      this.fresh.hidden = more <= 0;
      this.fresh.textContent = `Show ${plural(more, "new episode")}`;
    }, wait);
  }

  showFresh() {
    this.sortOnly = false;
    this.fresh.hidden = true;
    this.rows.reload();
  }
}
