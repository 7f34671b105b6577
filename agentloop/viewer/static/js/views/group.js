// The samples of one group beside each other; two of them word by word.
import { api } from "../core/api.js";
import { h, replace } from "../core/dom.js";
import { fixed, integer, signed } from "../core/format.js";
import { episodeLink, go, link, listOf, rewrite, taskLink } from "../core/route.js";
import { say } from "../core/text.js";
import { empty, part, reward, status } from "../parts/badges.js";
import { conversation, spokenText } from "../parts/conversation.js";
import { sides } from "../parts/difference.js";

export class GroupView {
  title = "Group";

  constructor({ run, params }) {
    Object.assign(this, { run, params, list: listOf(params) });
    this.head = h("header", { class: "page-head" });
    this.body = h("tbody");
    this.pair = h("section", { class: "pair-section", "aria-label": "Two samples compared" });
    this.prompt = h("section");
    this.element = h("div", { class: "wide-page" }, this.head, this.prompt, h("div", { class: "card table" }, h("table", { class: "samples" }, h("caption", { class: "sr" }, "Samples of the group"),
      h("thead", null, h("tr", null, ["Left", "Right", "Sample", "Reward", "Advantage", "Parts", "Turns", "Calls", "Tokens", "Stop", "Answer"].map((name, i) => h("th", { scope: "col", class: [3, 4, 6, 7, 8].includes(i) ? "n" : null }, name)))), this.body)), this.pair);
  }

  bindings() {
    const move = (side, by) => () => this.choose(side, Math.max(0, Math.min(this.samples.length - 1, this[side] + by)));
    return [
      { keys: ["j"], what: "next sample on the right", run: move("right", 1) }, { keys: ["k"], what: "previous sample on the right", run: move("right", -1) },
      { keys: ["J"], what: "next sample on the left", run: move("left", 1) }, { keys: ["K"], what: "previous sample on the left", run: move("left", -1) },
      { keys: ["u", "Escape"], what: "back to the list", run: () => go(link(["run", this.run, "episodes"], this.list)) },
    ];
  }

  async load() {
    const group = await api.group(this.run, { step: this.params.get("step"), split: this.params.get("split"), group_id: this.params.get("group_id") });
    this.group = group;
    this.samples = group.samples;
    const rewards = this.samples.map((one) => one.reward).filter((value) => typeof value === "number");
    const mean = rewards.reduce((a, b) => a + b, 0) / (rewards.length || 1);
    const spread = Math.sqrt(rewards.reduce((sum, value) => sum + (value - mean) ** 2, 0) / (rewards.length || 1));
    this.title = `Group of ${group.task_id || group.group_id}`;
    replace(this.head, h("h1", null, "Group ", h("span", { class: "soft" }, say(group.task_id || group.group_id, 80))), h("p", { class: "sub" },
      h("a", { href: link(["run", this.run, "episodes"], { step: group.step, split: group.split }) }, `step ${group.step}`), group.task_id ? h("a", { href: taskLink(this.run, group.task_id, this.list) }, "this prompt over the steps") : null,
      h("span", null, `${integer(this.samples.length)} samples`), h("span", null, `mean reward ${fixed(mean)} ± ${fixed(spread)}`), spread === 0 && rewards.length > 1 ? h("span", { class: "warn" }, "without variance: it trains nothing") : null));
    const prompt = Array.isArray(group.prompt) ? group.prompt : [];
    replace(this.prompt, prompt.length ? h("details", { class: "fold", open: prompt.reduce((sum, one) => sum + (one.text ?? "").length, 0) < 700 }, h("summary", null, "Prompt"), conversation(prompt, { run: this.run })) : null);
    if (!this.samples.length) return replace(this.pair, empty("This group holds no sample."));
    const order = this.samples.map((one, i) => [one.reward ?? -Infinity, i]).sort((a, b) => b[0] - a[0]);
    this.left = this.number("left", order[0][1]);
    this.right = this.number("right", order.length > 1 ? order[order.length - 1][1] : order[0][1]);
    this.draw();
  }

  number(name, other) {
    const given = this.params.get(name);
    const index = this.samples.findIndex((one) => String(one.sample_index) === given);
    return index >= 0 ? index : other;
  }

  choose(side, index) {
    this[side] = index;
    const { step, split, group_id } = this.group;
    rewrite(link(["run", this.run, "group"], { step, split, group_id, list: this.params.get("list"), left: this.samples[this.left].sample_index, right: this.samples[this.right].sample_index }));
    this.draw();
  }

  draw() {
    const held = document.activeElement?.name ? [document.activeElement.name, document.activeElement.value] : null;
    replace(this.body, this.samples.map((one, i) => this.row(one, i)));
    if (held) this.body.querySelector(`input[name=${held[0]}][value="${held[1]}"]`)?.focus({ preventScroll: true });
    const [left, right] = [this.samples[this.left], this.samples[this.right]];
    const texts = [left, right].map((one) => spokenText(one.conversation));
    const shown = sides(texts[0], texts[1]);
    replace(this.pair, h("div", { class: "section-head" }, h("h2", null, "What the model wrote"), h("p", { class: "quiet" }, h("del", null, "only left"), " ", h("ins", null, "only right"))),
      h("div", { class: "pair" }, [left, right].map((one, i) => h("article", { class: "card", "aria-label": `sample ${one.sample_index}` },
        h("header", { class: "who" }, h("a", { href: episodeLink(this.run, one.key, this.list) }, `sample ${one.sample_index}`), reward(one.reward), status(one.status)), texts[i] ? shown[i] : h("p", { class: "quiet" }, "The model wrote nothing."))),
      ));
  }

  row(one, i) {
    const radio = (side) => h("input", { type: "radio", name: side, value: String(i), checked: this[side] === i, "aria-label": `sample ${one.sample_index} on the ${side}`, on: { change: () => this.choose(side, i) } });
    return h("tr", { class: i === this.left || i === this.right ? "chosen" : null }, h("td", null, radio("left")), h("td", null, radio("right")), h("td", null, h("a", { href: episodeLink(this.run, one.key, this.list) }, `#${one.sample_index}`), " ", status(one.status)),
      h("td", { class: "n" }, reward(one.reward)), h("td", { class: "n" }, signed(one.advantage, 2)), h("td", null, Object.entries(one.parts ?? {}).map(([name, value]) => part(name, value))),
      h("td", { class: "n" }, integer(one.turns)), h("td", { class: "n" }, integer(one.tool_calls)), h("td", { class: "n" }, integer(one.length)), h("td", { class: "quiet" }, say(one.stop_reason)), h("td", { class: "reason" }, say(one.answer?.trim() || one.reply || "", 160)));
  }
}
