// Calls that came from elsewhere: of a weave client, or spans by OTLP. A table, newest first.
import { api } from "../core/api.js";
import { h, replace } from "../core/dom.js";
import { clock, integer, seconds } from "../core/format.js";
import { subscribe } from "../core/live.js";
import { link, rewrite, values } from "../core/route.js";
import { exceptionText, say } from "../core/text.js";
import { Facets } from "../parts/facets.js";
import { Rows } from "../parts/rows.js";

/** `filters()`: those of the list, which the address of a call keeps. */
const columns = (filters) => [
  { name: "name", label: "Call", sort: "op_name", first: "up", width: "14rem", cell: (row) => say(row.display_name || row.op_name, 80) },
  { name: "status", label: "Status", sort: "status", first: "up", width: "8.2rem", cell: (row) => (row.status === "ok" ? h("span", { class: "quiet" }, "ok") : h("span", { class: `pill ${row.status.startsWith("error") ? "bad" : ""}` }, say(row.status))) },
  { name: "started", label: "Started", sort: "started_at", width: "10.8rem", cell: (row) => h("span", { class: "quiet num" }, clock(row.started_at)) },
  { name: "took", label: "Took", sort: "duration_s", num: true, width: "6rem", cell: (row) => seconds(row.duration_s) },
  { name: "children", label: "Inside", title: "calls inside it", num: true, width: "4.5rem", cell: (row) => integer(row.children) },
  { name: "project", label: "Project", width: "9rem", cell: (row) => h("span", { class: "cut quiet" }, say([row.entity, row.project].filter(Boolean).join("/"), 60)) },
  { name: "source", label: "From", width: "5rem", cell: (row) => h("span", { class: "quiet" }, say(row.source, 20)) },
  { name: "preview", label: "Output", cell: (row) => h("span", { class: "cut preview" }, row.hit ? [h("a", { href: link(["call", row.hit.id], filters()) }, say(row.hit.name, 60)), " ", say(row.hit.text, 240)] : row.exception ? h("span", { class: "alarm" }, say(exceptionText(row.exception), 200)) : say(row.preview ?? "", 200)) },
];

export class CallsView {
  title = "Calls";

  constructor({ params }) {
    this.filters = values(params);
    this.rows = new Rows({
      columns: columns(() => this.listed()), label: "Calls", noun: "calls", whenEmpty: () => this.howTo(), sort: this.filters.sort ?? "-started_at",
      load: (offset, limit, signal) => api.calls({ ...this.asked(), offset, limit }, { signal }),
      href: (row) => link(["call", row.id], this.listed()), onSort: (sort) => this.change({ ...this.filters, sort }), onTotal: (answer) => this.arrived(answer),
    });
    this.facets = new Facets({ fields: [{ name: "project", label: "Project", most: 20 }, { name: "status", label: "Status" }], ranges: [], get: () => this.listed(), change: (next) => this.change(next), label: "Filters", placeholder: "Search the calls" });
    this.count = h("span", { class: "total" });
    this.fresh = h("button", { type: "button", class: "fresh", hidden: true, on: { click: () => this.showFresh() } }, "Show new calls");
    this.note = h("div");
    this.element = h("div", { class: "episodes-page" }, this.facets.element, h("section", { class: "episodes-main", "aria-label": "Calls" }, h("div", { class: "table-head" }, h("h1", null, "Calls"), this.count, h("span", { class: "quiet" }, "from weave clients and OTLP senders"), this.fresh), this.note, this.rows.element));
    this.drawNote();
    this.stop = subscribe((event) => event.kind === "call" && (this.fresh.hidden = false));
  }

  /** Weave's client prints addresses of pages that are not here. */
  drawNote() {
    const { other } = this.filters;
    replace(this.note, other ? h("p", { class: "quiet list-note" }, "Weave's page of ", h("b", null, say(other, 60)), " is not part of this viewer. These are the calls of the project.") : null);
  }

  bindings() {
    const move = (by) => () => void this.rows.move(by);
    return [{ keys: ["j", "ArrowDown"], what: "next row", run: move(1) }, { keys: ["k", "ArrowUp"], what: "previous row", run: move(-1) }, { keys: ["r"], what: "show new calls", run: () => this.showFresh() },
      { keys: ["Enter", "o"], what: "open the row", run: (event) => (event.target.closest?.("a, button, summary") ? false : this.rows.element.querySelector("tr.active a")?.click()) }];
  }

  dispose() {
    this.stop();
    this.rows.dispose();
  }

  /** The filters but the one that weave's address adds. */
  listed() {
    const { other: _, ...rest } = this.filters;
    return rest;
  }

  asked() {
    const { project, ...rest } = this.listed();
    return { sort: "-started_at", ...rest, place: [project ?? []].flat()[0] };
  }

  async load() {
    this.facets.set(null);
    await this.rows.reload();
  }

  update(params) {
    this.filters = values(params);
    this.drawNote();
    return this.rows.reload();
  }

  change(next) {
    if (Array.isArray(next.project)) next.project = next.project[next.project.length - 1]; // one project at a time
    this.filters = next;
    this.drawNote();
    rewrite(link(["calls"], this.listed()));
    this.rows.reload();
  }

  showFresh() {
    this.fresh.hidden = true;
    this.rows.reload();
  }

  arrived({ total, projects, facets }) {
    this.count.textContent = integer(total);
    this.projects = (projects ?? []).map((one) => [one.entity, one.project].filter(Boolean).join("/"));
    const counts = Object.fromEntries((projects ?? []).map((one) => [[one.entity, one.project].filter(Boolean).join("/"), one.calls]));
    this.facets.set({ status: facets?.status ?? { ok: null, error: null, running: null }, project: counts });
  }

  /** How to send calls, as long as none has come. */
  howTo() {
    const [project] = [this.filters.project ?? []].flat();
    if (project && this.projects && !this.projects.includes(project)) {
      const meant = this.projects.filter((one) => one.endsWith(`/${project}`));
      return h("div", { class: "empty" }, h("p", null, "No project ", h("b", null, say(project, 120)), " has sent calls here. A project is named with its first part, as ", h("code", null, "lab/agents"), "."),
        meant.length ? h("p", null, "Do you mean ", meant.map((one, i) => [i ? ", " : null, h("a", { href: link(["calls"], { ...this.listed(), project: one }) }, say(one, 120))]), "?") : null);
    }
    if (Object.keys(this.filters).some((name) => name !== "sort")) return null;
    return h("div", { class: "empty" }, h("p", null, "No call has come yet. An unmodified weave client writes here with:"),
      h("pre", { tabindex: "0" }, `export WANDB_BASE_URL=${location.origin} WF_TRACE_SERVER_URL=${location.origin} WANDB_API_KEY=local`), h("p", null, "and OTLP senders with:"), h("pre", { tabindex: "0" }, `export OTEL_EXPORTER_OTLP_ENDPOINT=${location.origin}`));
  }
}
