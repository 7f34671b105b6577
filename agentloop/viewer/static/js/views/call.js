// One call of a weave client or one OTLP span: what went in, what came out, and the tree that it is part of.
import { api } from "../core/api.js";
import { h, replace } from "../core/dom.js";
import { clock, moment, seconds } from "../core/format.js";
import { episodeLink, go, link, values } from "../core/route.js";
import { block, exceptionText, say } from "../core/text.js";
import { facts, status } from "../parts/badges.js";
import { tree } from "../parts/values.js";
import { nested, waterfall } from "../parts/waterfall.js";

const KINDS = { llm: "generate", chat: "generate", generate: "generate", tool: "tool", agent: "episode", reward: "reward", turn: "turn", parse: "parse" };

function kindOf(row) {
  const name = (row.op_name ?? "").toLowerCase();
  return Object.entries(KINDS).find(([word]) => name.includes(word))?.[1];
}

export class CallView {
  title = "Call";

  constructor({ id, params }) {
    Object.assign(this, { id, list: values(params) });
    this.head = h("header", { class: "page-head" });
    this.body = h("div", { class: "episode-main" });
    this.episode = h("p", { class: "sub" });
    this.aside = h("aside", { class: "episode-side", "aria-label": "Calls of this trace" });
    this.element = h("div", { class: "episode-page" }, this.head, h("div", { class: "episode-body call-body" }, this.aside, this.body));
  }

  bindings() {
    const move = (by) => () => {
      const index = this.order.findIndex((one) => one.id === this.id) + by;
      if (this.order[index]) location.replace(link(["call", this.order[index].id], this.list));
    };
    return [{ keys: ["j"], what: "next call of the tree", run: move(1) }, { keys: ["k"], what: "previous call of the tree", run: move(-1) }, { keys: ["u", "Escape"], what: "back to the calls", run: () => go(link(["calls"], this.list)) }];
  }

  dispose() {
    clearTimeout(this.timer);
    this.left = true;
  }

  /** Link to the episode that the call is part of, if this server has its run. Names of runs repeat, ids of traces do not. */
  async linkEpisode(trace, tries = 20) {
    const id = (trace ?? "").replaceAll("-", ""); // weave writes it as a UUID
    if (!/^[0-9a-f]{32}$/.test(id)) return;
    const { episodes, indexing } = await api.trace(id).catch(() => ({ episodes: [] }));
    if (this.left) return;
    const named = ({ run, name }) => say(name === run ? name : `${name} (${run})`, 120);
    replace(this.episode, episodes.map((one) => h("a", { href: episodeLink(one.run, one.key) }, "episode ", say(one.key, 200), " of ", named(one))));
    if (indexing && tries) this.timer = setTimeout(() => this.linkEpisode(trace, tries - 1), 1500);
  }

  async load() {
    const { entity, project } = this.list; // the other parameters are the filters of the list that it was opened from
    const { call, tree: calls } = await api.call({ id: this.id, ...(entity && project ? { entity, project } : {}) });
    this.title = call.display_name || call.op_name;
    const seconds_ = (value) => (moment(value) ?? 0) / 1000;
    const items = (calls?.length ? calls : [call]).map((row) => ({
      id: row.id, parent: row.parent_id, name: row.display_name || row.op_name, start: seconds_(row.started_at), kind: kindOf(row),
      end: row.ended_at ? seconds_(row.ended_at) : typeof row.duration_s === "number" ? seconds_(row.started_at) + row.duration_s : null,
      failed: row.status === "error", note: row.status === "error" ? exceptionText(row.exception) : null, href: link(["call", row.id], this.list), current: row.id === this.id,
    }));
    this.order = nested(items);
    replace(this.head, h("h1", null, say(this.title, 200), status(call.status === "error" ? "failed" : call.status)), h("p", { class: "sub" },
      h("a", { href: link(["calls"], { project: [call.entity, call.project].filter(Boolean).join("/") }) }, say([call.entity, call.project].filter(Boolean).join("/") || "calls", 120)),
      h("span", null, clock(call.started_at)), h("span", null, seconds(call.duration_s)), h("span", null, say(call.source, 20))), this.episode);
    void this.linkEpisode(call.trace_id);
    replace(this.aside, h("section", null, h("h2", null, "Tree"), waterfall(items, { label: "Calls of this trace" })));
    const section = (title, value) => (value === null || value === undefined || (typeof value === "object" && !Object.keys(value).length) ? null : h("section", { class: "card part-card" }, h("h2", null, title), tree(value)));
    const { weave: client, ...own } = call.attributes ?? {}; // what the client says of itself comes last
    replace(this.body, call.exception ? h("section", { class: "error-line" }, h("b", null, "Exception "), block(exceptionText(call.exception, true), "reason")) : null,
      section("Inputs", call.inputs), section("Output", call.output), section("Feedback", call.feedback), section("Attributes", own), section("Summary", call.summary),
      h("section", { class: "card part-card" }, h("h2", null, "Identity"), facts([["operation", call.op_name], ["call", h("code", null, say(call.id))], ["trace", call.trace_id ? h("code", null, say(call.trace_id)) : null]])), section("Client", client));
  }
}
