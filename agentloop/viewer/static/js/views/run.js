// One run at a glance: figures, signals, curves, failures by cause.
import { api } from "../core/api.js";
import { h, replace, soon } from "../core/dom.js";
import { ago, baseName, clock, compact, fixed, integer, number, percent, plural, seconds } from "../core/format.js";
import { subscribe } from "../core/live.js";
import { go, link, rewrite } from "../core/route.js";
import { say } from "../core/text.js";
import { live, problem, unread } from "../parts/badges.js";
import { Plot, PlotGroup } from "../parts/plot.js";
import { signalCards, verdict } from "./signals.js";

const CURVES = [
  { title: "Reward", note: "Mean of a step's episodes. Click a step for its episodes.", wide: true, keys: [["reward/mean", "training"], ["eval/reward_mean", "evaluation", "marks"]] },
  { title: "Response length", note: "Tokens after the first prompt, tool output included.", keys: [["episode/response_tokens_mean", "mean"], ["episode/response_tokens_max", "longest", "dash"], ["eval/response_tokens_mean", "evaluation", "marks"]] },
  { title: "Turns and tool calls", note: "Per episode.", keys: [["episode/turns_mean", "turns"], ["episode/tool_calls_mean", "tool calls"], ["episode/tool_errors_mean", "tool errors", "dash"]] },
  { title: "Mismatch", note: "Engine against trainer on the same tokens, log scale.", log: true, keys: [["mismatch/logprob_abs_mean", "mean |Δ logprob|"], ["mismatch/k3", "k3", "dash"]] },
  { title: "Staleness", note: "Versions that the oldest trained token was behind.", low: 0, keys: [["staleness/max", "largest"]] },
  { title: "Entropy", note: "Nats a token.", low: 0, keys: [["train/entropy", "entropy"], ["entropy", "entropy"]] },
  { title: "Gradient norm", note: "Before clipping.", low: 0, keys: [["train/grad_norm", "gradient norm"], ["grad_norm", "gradient norm"]] },
  { title: "Loss", note: "Of the step.", keys: [["train/loss", "training"], ["loss", "training"], ["eval/loss", "evaluation", "marks"]] },
  { title: "Throughput", note: "Tokens a second.", low: 0, keys: [["rollout/tokens_per_s", "rollout"], ["train/tokens_per_s", "training"], ["tokens_per_s", "training"]] },
  { title: "Seconds per step", note: "", low: 0, keys: [["step/time_s", "step"], ["rollout/time_s", "rollout", "dash"], ["train/time_s", "training", "dash"], ["time_s", "step"]] },
];

export class RunView {
  constructor({ run, params }) {
    Object.assign(this, { run, params, title: run });
    this.group = new PlotGroup();
    this.head = h("header", { class: "page-head" });
    this.tiles = h("div", { class: "verdicts" });
    this.signals = h("section", { "aria-labelledby": "signals-title" });
    this.failures = h("section", { "aria-labelledby": "failures-title" });
    this.controls = h("div", { class: "controls" });
    this.charts = h("div", { class: "grid" });
    this.plots = CURVES.map((curve) => ({ curve, plot: new Plot({ ...curve, group: this.group, pickHint: "the episodes of that step", onPick: (step) => go(link(["run", run, "episodes"], { step })) }) }));
    this.element = h("div", { class: "page" }, this.head, this.tiles, this.signals,
      h("section", { "aria-labelledby": "curves-title" }, h("div", { class: "section-head" }, h("h2", { id: "curves-title" }, "Over the steps"), this.controls), this.charts), this.failures);
    this.stop = subscribe(() => this.soon(), run);
    this.addControls();
  }

  dispose() {
    this.stop();
    this.left = true;
  }

  soon() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => !this.left && this.load(), 250);
  }

  async load() {
    const keys = CURVES.flatMap((curve) => curve.keys.map(([key]) => key));
    const [entry, metrics] = await Promise.all([api.run(this.run), api.metrics(this.run, [...keys, "reward/std"])]);
    this.metrics = metrics;
    this.title = entry.name;
    this.showHead(entry);
    this.showTiles(entry, metrics);
    this.draw();
    await soon(Promise.all([this.loadSignals(), this.loadFailures()]));
  }

  showHead(entry) {
    replace(this.head, h("h1", null, say(entry.name, 200), live(entry)), h("p", { class: "sub" }, [entry.model ? baseName(entry.model) : null, entry.algorithm, entry.started ? `started ${clock(entry.started)}` : null, entry.last_step_at ? `last step ${ago(entry.last_step_at)}` : null]
      .filter(Boolean).map((text) => h("span", null, say(text, 120)))), unread(entry.problems));
  }

  showTiles(entry, { series }) {
    const known = (key) => (series[key] ?? []).filter((value) => typeof value === "number");
    const mean = (values) => (values.length ? values.reduce((a, b) => a + b, 0) / values.length : null);
    const rewards = known("reward/mean");
    const evals = known("eval/reward_mean");
    const tuned = entry.kind === "sft";
    const losses = known("loss");
    const lossesOfEval = known("eval/loss");
    const change = (first, last) => (first === last || first === undefined ? [fixed(last ?? null)] : [h("span", { class: "before" }, fixed(first)), h("span", { class: "arrow", "aria-label": "to" }, "→"), fixed(last)]);
    const tile = (title, figure, note, alarm) => h("div", { class: `verdict${alarm ? " alarm" : ""}` }, h("h2", null, title), h("p", { class: "figure" }, figure), h("p", { class: "note" }, note));
    const few = Math.min(5, Math.floor(rewards.length / 2)); // as report.html counts them
    const mismatch = known("mismatch/logprob_abs_mean");
    const total = entry.total_steps;
    replace(this.tiles,
      tuned ? tile("Training loss", losses.length ? change(losses[0], losses[losses.length - 1]) : "–", "first → last line") : null,
      tuned ? tile("Evaluation loss", lossesOfEval.length ? change(lossesOfEval[0], lossesOfEval[lossesOfEval.length - 1]) : "–", lossesOfEval.length ? plural(lossesOfEval.length, "evaluation") : "not evaluated") : null,
      tuned ? null : tile("Training reward", few ? change(mean(rewards.slice(0, few)), mean(rewards.slice(few).slice(-5))) : fixed(rewards[0] ?? null), few ? `first ${few} → last ${plural(Math.min(5, rewards.length - few), "step")}` : rewards.length ? "the only step" : "no step yet"),
      tuned ? null : tile("Evaluation reward", evals.length ? change(evals[0], evals[evals.length - 1]) : "–", evals.length ? plural(evals.length, "evaluation") : "not evaluated"),
      tile("Steps", total ? `${integer(entry.steps)} of ${integer(total)}` : integer(entry.steps), entry.live && total > entry.steps && known("step/time_s").length ? `about ${seconds(mean(known("step/time_s").slice(-10)) * (total - entry.steps))} to go` : `${compact(entry.episodes)} episodes stored`),
      tile("Step time", seconds(mean(known(tuned ? "time_s" : "step/time_s").slice(-10))), "mean of the last 10"),
      tuned ? null : tile("Mismatch", mismatch.length ? number(Math.max(...mismatch)) : "–", mismatch.length ? "worst step, mean |Δ logprob|" : "not measured yet"),
      tuned ? null : tile("Failures", entry.failed === undefined || entry.failed === null ? "–" : h("a", { href: link(["run", this.run, "failures"]) }, integer(entry.failed)), entry.failed > 0 && entry.episodes ? `${percent(entry.failed / entry.episodes, 2)} of the episodes` : "failed or rejected episodes", entry.failed > 0));
  }

  addControls() {
    const smooth = h("input", { type: "range", min: "0", max: "0.95", step: "0.05", value: this.params.get("smooth") ?? "0", "aria-label": "Smoothing" });
    const log = h("input", { type: "checkbox", checked: this.params.has("log") });
    const changed = () => {
      rewrite(link(["run", this.run], { smooth: Number(smooth.value) || null, log: log.checked ? 1 : null }));
      this.params = new URLSearchParams(location.hash.split("?")[1] ?? "");
      this.draw();
    };
    smooth.addEventListener("input", changed);
    log.addEventListener("change", changed);
    replace(this.controls, h("label", null, "Smoothing ", smooth), h("label", null, log, " log scale"));
  }

  draw() {
    const { steps, series } = this.metrics;
    const options = { smooth: Number(this.params.get("smooth")) || 0, log: this.params.has("log") };
    const shown = [];
    for (const { curve, plot } of this.plots) {
      const lines = curve.keys.map(([key, label, style], i) => ({ key, label, steps, values: series[key], colour: i + 1, marks: style === "marks", dash: style === "dash" })).filter((one) => one.values?.some((value) => typeof value === "number"));
      if (!lines.length) continue;
      plot.set(lines, { ...options, log: options.log || curve.log });
      shown.push(plot.element);
    }
    if (!shown.length) replace(this.charts, h("p", { class: "empty" }, "The run has written no numbers yet."));
    else if (shown.length !== this.charts.children.length || shown.some((one, i) => this.charts.children[i] !== one)) replace(this.charts, shown);
  }

  async loadSignals() {
    try {
      const { signals, note } = await api.signals(this.run);
      replace(this.signals, h("div", { class: "section-head" }, h("h2", { id: "signals-title" }, "Signals"), h("a", { href: link(["run", this.run, "signals"]) }, "all rules")),
        signals.length ? signalCards(this.run, signals.slice(0, 4)) : null, verdict(signals, note));
    } catch (error) {
      replace(this.signals, h("h2", { id: "signals-title" }, "Signals"), problem(error));
    }
  }

  async loadFailures() {
    try {
      const { causes } = await api.failures(this.run);
      if (!causes.length) return replace(this.failures);
      replace(this.failures, h("div", { class: "section-head" }, h("h2", { id: "failures-title" }, "Failures"), h("a", { href: link(["run", this.run, "failures"]) }, "all causes")),
        h("div", { class: "card table" }, h("table", { class: "plain-table" }, h("thead", null, h("tr", null, h("th", { scope: "col" }, "Status"), h("th", { scope: "col", class: "n" }, "Episodes"), h("th", { scope: "col" }, "Cause"))),
          h("tbody", null, causes.slice(0, 5).map((one) => h("tr", null, h("td", null, h("span", { class: "pill bad" }, say(one.status))), h("td", { class: "n" }, integer(one.count)),
            h("td", { class: "reason" }, h("a", { href: link(["run", this.run, "episodes"], { status: one.status, cause: one.cause }) }, say(one.cause, 300)))))))));
    } catch (error) {
      replace(this.failures, h("h2", { id: "failures-title" }, "Failures"), problem(error));
    }
  }
}
