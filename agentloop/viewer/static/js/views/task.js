// The same prompt over the training steps: rewards of every sample, and how the answer changed.
import { api } from "../core/api.js";
import { h, replace, soon } from "../core/dom.js";
import { fixed, integer, plural } from "../core/format.js";
import { episodeLink, go, groupLink, link, listOf, rewrite } from "../core/route.js";
import { say } from "../core/text.js";
import { empty, problem, reward } from "../parts/badges.js";
import { conversation, spokenText } from "../parts/conversation.js";
import { sides } from "../parts/difference.js";
import { Plot } from "../parts/plot.js";

export class TaskView {
  title = "Task";

  constructor({ run, params }) {
    Object.assign(this, { run, params, task: params.get("task_id"), list: listOf(params) });
    this.head = h("header", { class: "page-head" });
    this.prompt = h("section");
    this.chart = h("div", { class: "grid" });
    this.body = h("tbody");
    this.pair = h("section", { class: "pair-section", "aria-label": "First and last step compared" });
    this.table = h("div", { class: "card table" }, h("table", { class: "plain-table task-steps" }, h("caption", { class: "sr" }, "Steps with this prompt"), h("thead", null, h("tr", null, ["Step", "Reward", "Samples"].map((name, i) => h("th", { scope: "col", class: i === 1 ? "n" : null }, name)))), this.body));
    this.element = h("div", { class: "page" }, this.head, this.prompt, this.chart, this.pair, h("section", null, h("h2", null, "Every sample"), this.table));
  }

  bindings() {
    return [{ keys: ["u", "Escape"], what: "back to the list", run: () => go(link(["run", this.run, "episodes"], this.list)) }];
  }

  async load() {
    const task = await api.task(this.run, this.task);
    this.steps = task.steps;
    this.title = `Task ${this.task}`;
    const samples = task.steps.reduce((sum, one) => sum + one.samples.length, 0);
    replace(this.head, h("h1", null, "Task ", h("span", { class: "soft" }, say(this.task, 80))), h("p", { class: "sub" }, h("span", null, plural(samples, "episode")), h("span", null, plural(task.steps.length, "step")),
      task.ground_truth === null || task.ground_truth === undefined ? null : h("span", null, "wanted: ", say(typeof task.ground_truth === "object" ? JSON.stringify(task.ground_truth) : task.ground_truth, 200)), h("a", { href: link(["run", this.run, "episodes"], { task_id: this.task }) }, "in the table")));
    if (!samples) return replace(this.chart, empty("No stored episode has this task."));
    const prompt = Array.isArray(task.prompt) ? task.prompt : typeof task.prompt === "string" && task.prompt ? [{ role: "user", text: task.prompt }] : [];
    replace(this.prompt, prompt.length ? h("details", { class: "fold", open: true }, h("summary", null, "Prompt"), conversation(prompt, { run: this.run })) : null);
    this.draw();
    await soon(this.compare().catch((error) => replace(this.pair, problem(error))));
  }

  draw() {
    const plot = new Plot({ title: "Reward of this prompt", note: "Mean of its samples at each step, best and worst dashed.", wide: true, low: 0, pickHint: "the group of that step", onPick: (step) => {
      const found = this.steps.find((one) => one.step === step);
      if (found) go(groupLink(this.run, found.samples[0], this.list));
    } });
    const series = [];
    const splits = [...new Set(this.steps.map((one) => one.split))];
    for (const [i, split] of splits.entries()) {
      const own = this.steps.filter((one) => one.split === split);
      const numbers = (one) => one.samples.map((sample) => sample.reward).filter((value) => typeof value === "number");
      const of = (pick) => own.map((one) => (numbers(one).length ? pick(numbers(one)) : null));
      const steps = own.map((one) => one.step);
      series.push({ label: split === "train" ? "training" : split, steps, values: of((list) => list.reduce((a, b) => a + b, 0) / list.length), colour: i + 1, marks: split !== "train" });
      if (split === "train") series.push({ label: "best", steps, values: of((list) => Math.max(...list)), colour: 3, dash: true }, { label: "worst", steps, values: of((list) => Math.min(...list)), colour: 5, dash: true });
    }
    plot.set(series);
    replace(this.chart, plot.steps.length > 1 ? plot.element : null);
    replace(this.body, this.steps.map((one) => h("tr", null, h("td", null, one.samples.length ? h("a", { href: groupLink(this.run, one.samples[0], this.list) }, one.split === "train" ? integer(one.step) : `${one.split} ${integer(one.step)}`) : integer(one.step)), h("td", { class: "n" }, fixed(one.reward_mean)),
      h("td", null, h("ol", { class: "siblings" }, one.samples.map((sample) => h("li", null, h("a", { href: episodeLink(this.run, sample.key, this.list), class: sample.status !== "ok" ? "bad" : sample.reward > 0 ? "good" : "", title: `sample ${sample.sample_index}` }, sample.status === "ok" ? fixed(sample.reward, 2) : "failed"))))))));
  }

  /** The best sample of the first step beside that of the last one; both can be chosen. */
  async compare() {
    const usable = this.steps.filter((one) => one.samples.length);
    if (usable.length < 2) return replace(this.pair);
    const index = (name, other) => {
      const found = usable.findIndex((one) => `${one.split}-${one.step}` === this.params.get(name));
      return found >= 0 ? found : other;
    };
    const sideIndex = { left: index("left", 0), right: index("right", usable.length - 1) };
    const best = (one) => one.samples.reduce((a, b) => ((b.reward ?? -Infinity) > (a.reward ?? -Infinity) ? b : a));
    const draw = async () => {
      const chosen = ["left", "right"].map((side) => best(usable[sideIndex[side]]));
      const records = await Promise.all(chosen.map((row) => api.episode(this.run, row.key)));
      const shown = sides(...records.map((record) => spokenText(record.conversation)));
      replace(this.pair, h("div", { class: "section-head" }, h("h2", null, "Best sample of two steps"), h("p", { class: "quiet" }, h("del", null, "only left"), " ", h("ins", null, "only right"))),
        h("div", { class: "pair" }, ["left", "right"].map((side, i) => h("article", { class: "card", "aria-label": `step ${chosen[i].step}` }, h("header", { class: "who" }, pick(side), h("a", { href: episodeLink(this.run, chosen[i].key, this.list) }, `sample ${chosen[i].sample_index}`), reward(chosen[i].reward)), shown[i]))));
    };
    const pick = (side) => h("select", { "aria-label": `step on the ${side}`, on: { change: (event) => {
      sideIndex[side] = Number(event.target.value);
      const named = (name) => `${usable[sideIndex[name]].split}-${usable[sideIndex[name]].step}`;
      rewrite(link(["run", this.run, "task"], { task_id: this.task, list: this.params.get("list"), left: named("left"), right: named("right") }));
      draw();
    } } }, usable.map((one, i) => h("option", { value: String(i), selected: i === sideIndex[side] }, `${one.split === "train" ? "" : `${one.split} `}step ${one.step}`)));
    await draw();
  }
}
