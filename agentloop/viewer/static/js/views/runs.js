// All runs: a table, and the curves of the chosen ones over each other.
import { api } from "../core/api.js";
import { h, replace } from "../core/dom.js";
import { ago, baseName, compact, fixed, integer } from "../core/format.js";
import { subscribe } from "../core/live.js";
import { link, rewrite } from "../core/route.js";
import { say, shown } from "../core/text.js";
import { empty, live, problem } from "../parts/badges.js";
import { Plot, PlotGroup, sparkline } from "../parts/plot.js";

const FIRST_KEYS = ["reward/mean", "eval/reward_mean", "episode/response_tokens_mean", "mismatch/logprob_abs_mean", "loss", "eval/loss"];
const COLOURS = 8;
const AT_FIRST = 4;

export class RunsView {
  title = "Runs";

  constructor({ params }) {
    this.params = params;
    this.group = new PlotGroup();
    this.plots = new Map();
    this.metrics = new Map();
    this.colours = new Map();
    this.body = h("tbody");
    this.charts = h("div", { class: "grid" });
    this.controls = h("div", { class: "controls" });
    this.all = h("datalist", { id: "metric-keys" });
    this.table = h("div", { class: "card table" }, h("table", { class: "runs" }, h("caption", { class: "sr" }, "Runs"), h("thead", null, h("tr", null,
      ["Show", "Run", "Reward", "Evaluation", "Steps", "Episodes", "Failed", "Model", "Last step"].map((name, i) => h("th", { scope: "col", class: i >= 2 && i <= 6 ? "n" : null }, name)))), this.body));
    this.whole = [h("header", { class: "page-head" }, h("h1", null, "Runs"), h("p", { class: "sub" }, "Tick runs to lay their curves over each other.")), this.table, this.controls, h("h2", { class: "sr" }, "Curves"), this.charts, this.all];
    this.element = h("div", { class: "wide-page" }, this.whole);
    this.stop = subscribe((event) => this.heard(event));
  }

  dispose() {
    this.stop();
    this.left = true;
  }

  get keys() {
    return this.params.getAll("key").length ? this.params.getAll("key") : FIRST_KEYS;
  }

  get chosen() {
    const named = this.params.getAll("run").filter((id) => this.runs.some((run) => run.id === id));
    return named.length || this.params.has("none") ? named : this.runs.filter((run) => run.steps).slice(0, AT_FIRST).map((run) => run.id);
  }

  address(changed) {
    const next = { run: this.chosen, key: this.params.getAll("key"), smooth: this.params.get("smooth"), log: this.params.get("log"), ...changed };
    if (!next.run.length) next.none = 1;
    rewrite(link([], next));
    this.params = new URLSearchParams(location.hash.split("?")[1] ?? "");
  }

  async load() {
    await this.refresh();
    await this.loadCurves();
    void this.count();
  }

  /** Episodes are counted when a run's trace is indexed: have that done for the runs that are shown. */
  async count() {
    const missing = this.runs.filter((run) => run.has_traces && typeof run.episodes !== "number" && this.chosen.includes(run.id));
    for (const run of missing) await api.run(run.id).catch(() => {}); // its own page shows what is wrong
    if (missing.length && !this.left) await this.refresh();
  }

  async refresh() {
    this.runs = (await api.runs()).runs;
    const names = new Map();
    for (const { name } of this.runs) names.set(name, (names.get(name) ?? 0) + 1);
    this.shared = (run) => names.get(run.name) > 1 && run.name !== run.id; // its id is its folder
    for (const run of this.runs) if (!this.colours.has(run.id)) this.colours.set(run.id, (this.colours.size % COLOURS) + 1);
    if (!this.runs.length) {
      replace(this.element, h("header", { class: "page-head" }, h("h1", null, "Runs")), empty("No run here yet. It appears as soon as `agentloop train` writes its first step into a folder that is served."));
      this.bare = true;
      return;
    }
    if (this.bare) {
      this.bare = false;
      replace(this.element, this.whole);
    }
    const chosen = new Set(this.chosen);
    replace(this.body, this.runs.map((run) => this.row(run, chosen.has(run.id))));
  }

  /** The name of a run; with its folder if others have the same name. */
  label(run) {
    return this.shared(run) ? `${run.name} (${run.id})` : run.name;
  }

  row(run, on) {
    const box = h("input", { type: "checkbox", checked: on, "aria-label": shown(`show the curves of ${this.label(run)}`) });
    box.addEventListener("change", () => {
      this.address({ run: box.checked ? [...this.chosen, run.id] : this.chosen.filter((id) => id !== run.id) });
      this.loadCurves();
    });
    return h("tr", null,
      h("td", null, h("label", { class: "tick" }, box, h("span", { class: `key block c${this.colours.get(run.id)}`, "aria-hidden": "true" }))),
      h("td", { class: "run-name" }, h("a", { href: link(["run", run.id]) }, say(run.name, 80), this.shared(run) ? h("span", { class: "quiet" }, " ", say(run.id, 80)) : null), live(run), run.kind && run.kind !== "train" ? h("span", { class: "pill" }, say(run.kind)) : null),
      h("td", { class: "n" }, sparkline(run.spark, this.colours.get(run.id)), fixed(run.reward_last)),
      h("td", { class: "n" }, fixed(run.eval_last)),
      h("td", { class: "n" }, run.total_steps ? `${integer(run.steps)} of ${integer(run.total_steps)}` : integer(run.steps)),
      h("td", { class: "n" }, compact(run.episodes)),
      h("td", { class: "n" }, run.failed ? h("a", { class: "alarm", href: link(["run", run.id, "failures"]) }, integer(run.failed)) : integer(run.failed)),
      h("td", { class: "quiet cut" }, say([run.model ? baseName(run.model) : null, run.algorithm].filter(Boolean).join(" · "), 60)),
      h("td", { class: "quiet", title: run.path }, ago(run.last_step_at)));
  }

  async loadCurves() {
    if (this.bare) return;
    this.showControls();
    const chosen = this.chosen;
    await Promise.all(chosen.map((id) => this.loadRun(id)));
    if (!this.left) this.draw();
  }

  async loadRun(id) {
    try {
      this.metrics.set(id, await api.metrics(id, this.keys));
    } catch (error) {
      this.metrics.delete(id);
      if (!this.charts.childElementCount) replace(this.charts, problem(error));
    }
  }

  showControls() {
    if (this.controls.childElementCount) return;
    const smooth = h("input", { type: "range", min: "0", max: "0.95", step: "0.05", value: this.params.get("smooth") ?? "0", "aria-label": "Smoothing" });
    smooth.addEventListener("input", () => (this.address({ smooth: Number(smooth.value) || null }), this.draw()));
    const log = h("input", { type: "checkbox", checked: this.params.has("log") });
    log.addEventListener("change", () => (this.address({ log: log.checked ? 1 : null }), this.draw()));
    const pick = h("input", { type: "search", list: "metric-keys", placeholder: "Add a metric", "aria-label": "Add a metric", id: "search", autocomplete: "off" });
    const added = () => {
      if (!this.known?.includes(pick.value) || this.keys.includes(pick.value)) return;
      this.address({ key: [...this.keys, pick.value] });
      pick.value = "";
      this.loadCurves();
    };
    pick.addEventListener("change", added);
    replace(this.controls, h("label", null, "Smoothing ", smooth), h("label", null, log, " log scale"), pick);
  }

  draw() {
    const chosen = this.chosen.filter((id) => this.metrics.has(id));
    this.known = [...new Set(chosen.flatMap((id) => this.metrics.get(id).keys ?? []))].sort();
    replace(this.all, this.known.map((key) => h("option", { value: key })));
    const options = { log: this.params.has("log"), smooth: Number(this.params.get("smooth")) || 0 };
    for (const key of this.plots.keys()) if (!this.keys.includes(key)) this.plots.delete(key);
    for (const key of this.keys) {
      const series = chosen.filter((id) => this.metrics.get(id).series[key]).map((id) => this.series(id, key));
      if (!series.length && !this.params.getAll("key").length) {
        this.plots.delete(key);
        continue;
      }
      if (!this.plots.has(key)) this.plots.set(key, this.plot(key));
      this.plots.get(key).set(series, { ...options, log: options.log || key.startsWith("mismatch/") });
    }
    const wanted = this.keys.map((key) => this.plots.get(key)?.element).filter(Boolean);
    if (wanted.length !== this.charts.children.length || wanted.some((one, i) => this.charts.children[i] !== one)) replace(this.charts, wanted);
  }

  plot(key) {
    const made = new Plot({ title: key, group: this.group });
    const drop = h("button", { type: "button", class: "drop", "aria-label": shown(`remove ${key}`), title: "remove", on: { click: () => {
      const left = this.keys.filter((one) => one !== key);
      this.address({ key: left.length ? left : [] });
      this.draw();
    } } }, "×");
    made.element.querySelector("figcaption").append(drop);
    return made;
  }

  series(id, key) {
    const { steps, series } = this.metrics.get(id);
    const run = this.runs.find((one) => one.id === id);
    return { label: this.label(run), steps, values: series[key], colour: this.colours.get(id), marks: key.startsWith("eval/"), href: link(["run", id]) };
  }

  async heard(event) {
    clearTimeout(this.soon);
    this.soon = setTimeout(async () => {
      await this.refresh();
      if (!event.run || this.chosen.includes(event.run)) await this.loadCurves();
    }, 300);
  }
}
