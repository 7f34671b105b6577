// Failed and rejected episodes, by cause.
import { api } from "../core/api.js";
import { h, replace } from "../core/dom.js";
import { integer } from "../core/format.js";
import { subscribe } from "../core/live.js";
import { link } from "../core/route.js";
import { say, shown } from "../core/text.js";
import { empty, unread } from "../parts/badges.js";
import { keyLinks } from "./signals.js";

export class FailuresView {
  title = "Failures";

  constructor({ run }) {
    this.run = run;
    this.body = h("div");
    this.element = h("div", { class: "page" }, h("header", { class: "page-head" }, h("h1", null, "Failures"),
      h("p", { class: "sub" }, "Failed: an exception of the agent, a tool service, the reward or the rollout server ended the episode, which is masked out of the loss; the cause says which. Rejected: the trajectory broke the token law and was not trained. A tool call that failed ends no episode: ", h("a", { href: link(["run", run, "episodes"], { min_tool_errors: 1 }) }, "episodes with tool errors"), ".")), this.body);
    this.stop = subscribe(() => this.load(), run);
  }

  dispose() {
    this.stop();
  }

  async load() {
    const { causes, problems } = await api.failures(this.run);
    const next = JSON.stringify([causes, problems]);
    if (next === this.shown) return;
    this.shown = next;
    if (!causes.length) return replace(this.body, unread(problems), empty("No failed or rejected episode."));
    const open = new Set([...this.body.querySelectorAll("details[open]")].map((one) => one.dataset.cause));
    replace(this.body, unread(problems), h("div", { class: "card table" }, h("table", { class: "plain-table failures" }, h("caption", { class: "sr" }, "Failures by cause"),
      h("thead", null, h("tr", null, h("th", { scope: "col" }, "Status"), h("th", { scope: "col", class: "n" }, "Episodes"), h("th", { scope: "col", class: "n" }, "Tasks"), h("th", { scope: "col", class: "n" }, "Steps"), h("th", { scope: "col" }, "Cause"))),
      h("tbody", null, causes.map((one) => h("tr", null, h("td", null, h("span", { class: "pill bad" }, say(one.status))),
        h("td", { class: "n" }, h("a", { href: link(["run", this.run, "episodes"], { status: one.status, cause: one.cause }) }, integer(one.count))), h("td", { class: "n" }, integer(one.tasks)),
        h("td", { class: "n" }, one.first_step === one.last_step ? integer(one.first_step) : `${one.first_step}–${one.last_step}`),
        h("td", { class: "reason" }, say(one.cause, 4000), one.keys?.length ? h("details", { data: { cause: shown(one.cause) }, open: open.has(shown(one.cause)) }, h("summary", null, one.keys.length < one.count ? `${one.keys.length} of them` : "Episodes"), keyLinks(this.run, one.keys)) : null)))))));
  }
}
