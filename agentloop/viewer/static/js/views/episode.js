// One episode: its conversation, tokens, spans and facts. j and k walk along the list that it was opened from.
import { api } from "../core/api.js";
import { announce, h, replace } from "../core/dom.js";
import { clock, fixed, integer, number, plural, seconds, signed } from "../core/format.js";
import { subscribe } from "../core/live.js";
import { episodeLink, go, groupLink, link, rewrite, taskLink, values } from "../core/route.js";
import { block, say } from "../core/text.js";
import { empty, facts, part, problem, reward, status } from "../parts/badges.js";
import { TokenColumns } from "../parts/column.js";
import { conversation } from "../parts/conversation.js";
import { tree } from "../parts/values.js";
import { spanItems, waterfall } from "../parts/waterfall.js";
import { TokenView } from "./tokens.js";

const TABS = [["conversation", "Conversation", "c"], ["tokens", "Tokens", "t"], ["spans", "Spans", "s"], ["record", "Record", "m"]];
const UNMEASURED = "No logprobs of the trainer are stored: it computes them before the update only for the first minibatch, and not for failed episodes and evaluations";
const OWN = ["key", "view", "mode", "at"];

export class EpisodeView {
  title = "Episode";

  constructor({ run, params }) {
    Object.assign(this, { run, params });
    this.key = params.get("key");
    this.list = Object.fromEntries(Object.entries(values(params)).filter(([name]) => !OWN.includes(name)));
    this.head = h("header", { class: "episode-head" });
    this.tabs = h("div", { class: "tabs", role: "tablist", "aria-label": "Ways to see this episode" });
    this.panel = h("div", { class: "panel", role: "tabpanel", tabindex: "-1", id: "panel" });
    this.aside = h("aside", { class: "episode-side", "aria-label": "About this episode" });
    this.element = h("div", { class: "episode-page" }, this.head, h("div", { class: "episode-body" }, h("div", { class: "episode-main" }, this.tabs, this.panel), this.aside));
    this.stop = subscribe(() => this.loadPlace(), run);
  }

  bindings() {
    return [
      { keys: ["j", "ArrowRight"], what: "next episode of the list", run: () => this.step("next") }, { keys: ["k", "ArrowLeft"], what: "previous episode of the list", run: () => this.step("previous") },
      ...TABS.map(([name, label, key]) => ({ keys: [key], what: label.toLowerCase(), run: () => this.show(name) })),
      { keys: ["n"], what: "next turn", run: () => this.jump(1) }, { keys: ["p"], what: "previous turn", run: () => this.jump(-1) },
      { keys: ["e"], what: "the group, side by side", run: () => go(groupLink(this.run, this.record, this.list)) },
      { keys: ["u", "Escape"], what: "back to the list", run: () => go(link(["run", this.run, "episodes"], this.list)) },
      { keys: ["1", "2", "3", "4", "5"], what: "shading of the tokens", run: (event) => this.tokens?.element.querySelectorAll(".modes button")[Number(event.key) - 1]?.click() },
    ];
  }

  dispose() {
    this.stop();
    this.tokens?.dispose();
  }

  async load() {
    if (this.params.get("view") === "tokens") TokenColumns.first(this.run, this.key);
    this.record = await api.episode(this.run, this.key);
    this.title = this.record.task_id ? `task ${this.record.task_id} · sample ${this.record.sample_index}` : `${this.record.group_id} · sample ${this.record.sample_index}`;
    this.showHead();
    this.showAside();
    this.show(this.params.get("view") ?? "conversation", { first: true });
    void this.loadPlace();
    void this.loadSiblings();
  }

  address(changed = {}) {
    return link(["run", this.run, "episode"], { key: this.key, ...this.list, view: this.name === "conversation" ? null : this.name, mode: this.params.get("mode"), ...changed });
  }

  showHead() {
    const record = this.record;
    this.place = h("span", { class: "place quiet" });
    const walk = (which, label, sign) => h("button", { type: "button", class: "walk", disabled: true, "aria-label": `${label} episode`, title: `${label} (${which === "next" ? "j" : "k"})`, on: { click: () => this.step(which) } }, sign);
    this.buttons = { previous: walk("previous", "previous", "‹"), next: walk("next", "next", "›") };
    replace(this.head,
      h("div", { class: "episode-title" }, h("h1", null, record.task_id ? h("span", { class: "quiet" }, "task ") : null, say(record.task_id || record.group_id, 120), h("span", { class: "quiet" }, ` · sample ${record.sample_index}`)), reward(record.reward), status(record.status),
        record.stop_reason && record.stop_reason !== "stop" ? h("span", { class: "pill bad" }, say(record.stop_reason)) : null,
        h("nav", { class: "walks", "aria-label": "Episodes of the list" }, this.place, this.buttons.previous, this.buttons.next)),
      h("p", { class: "sub" }, h("a", { href: link(["run", this.run, "episodes"], { split: record.split, step: record.step }) }, `${record.split === "train" ? "" : `${record.split}, `}step ${record.step}`),
        h("a", { href: groupLink(this.run, record, this.list) }, "group side by side"), record.task_id ? h("a", { href: taskLink(this.run, record.task_id, this.list) }, "this prompt over the steps") : null,
        h("span", null, say(record.agent_name, 60)), h("span", null, plural(record.turns ?? 0, "turn")), h("span", null, plural(record.tool_calls ?? 0, "tool call")), h("span", null, `${integer(record.length)} tokens`), this.keyWithCopy()),
      record.error ? h("div", { class: "error-line", role: "note" }, h("b", null, record.broken_rule ? "Rejected: " : "Failed: "), block(record.error, "reason"), (record.faults ?? []).map((fault) => h("div", { class: "fault" }, h("p", null, say(fault.source, 200), " raised ", say(fault.error, 2000), fault.where ? [" at ", h("code", null, say(fault.where, 600))] : null), fault.traceback ? block(fault.traceback, "text traceback") : null))) : null,
      this.forks());
    replace(this.tabs, TABS.map(([name, label, key]) => h("button", { type: "button", role: "tab", id: `tab-${name}`, "aria-controls": "panel", title: `key ${key}`, data: { tab: name }, on: { click: () => this.show(name), keydown: (event) => this.tabKey(event) } }, label)));
  }

  /** The key that `agentloop trace show RUN KEY` takes. */
  keyWithCopy() {
    const copy = h("button", { type: "button", class: "plain copy-key", title: "Copy the key, for agentloop trace show RUN KEY", on: { click: async () => {
      try {
        await navigator.clipboard.writeText(this.key);
        copy.textContent = "copied";
      } catch {
        getSelection().selectAllChildren(code); // a page without a clipboard: Ctrl-C copies it
        copy.textContent = "selected";
      }
    } } }, "copy");
    const code = h("code", { class: "episode-key" }, say(this.key, 400));
    return h("span", null, code, " ", copy);
  }

  /** Whether the trace says which tokens were trained: it has advantages, or was an evaluation. */
  get saysTrained() {
    return this.record.has_advantages !== false || this.record.split === "eval" || this.record.status !== "ok";
  }

  forks() {
    const keys = this.record.trajectories ?? [];
    if (keys.length < 2) return null;
    return h("nav", { class: "forks", "aria-label": "Trajectories of this episode" }, "Trajectories: ", keys.map((key, i) => h("a", { href: episodeLink(this.run, key, this.list), "aria-current": key === this.key ? "true" : null }, i === keys.length - 1 ? "main" : `fork ${i + 1}`)));
  }

  tabKey(event) {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!by) return;
    event.preventDefault();
    event.stopPropagation();
    const next = TABS[(TABS.findIndex(([name]) => name === this.name) + by + TABS.length) % TABS.length][0];
    this.show(next);
    this.tabs.querySelector(`[data-tab=${next}]`).focus();
  }

  show(name, { first = false, at } = {}) {
    this.name = TABS.some(([one]) => one === name) ? name : "conversation";
    for (const tab of this.tabs.children) {
      const on = tab.dataset.tab === this.name;
      tab.setAttribute("aria-selected", String(on));
      tab.tabIndex = on ? 0 : -1;
    }
    this.panel.setAttribute("aria-labelledby", `tab-${this.name}`);
    this.tokens?.dispose();
    this.tokens = null;
    if (!first) {
      rewrite(this.address({ at }));
      this.params = new URLSearchParams(location.hash.split("?")[1] ?? "");
    }
    const drawn = { conversation: () => this.conversation(), tokens: () => this.tokenView(), spans: () => this.spans(), record: () => this.facts() }[this.name]();
    replace(this.panel, drawn);
    this.element.classList.toggle("wide", this.name === "tokens");
  }

  conversation() {
    const messages = this.record.conversation ?? [];
    if (!messages.length) return empty("No message is stored for this episode.");
    const made = conversation(messages, { run: this.run, trained: this.saysTrained, tokensLink: (at) => this.linkTo("tokens", at) });
    made.addEventListener("click", (event) => {
      const anchor = event.target.closest("a.to-tokens");
      if (!anchor || event.ctrlKey || event.metaKey) return;
      event.preventDefault();
      this.show("tokens", { at: new URLSearchParams(anchor.hash.split("?")[1]).get("at") });
    });
    return made;
  }

  linkTo(view, at) {
    return link(["run", this.run, "episode"], { key: this.key, ...this.list, view, at });
  }

  tokenView() {
    this.tokens = new TokenView({
      run: this.run, key: this.key, saysTrained: this.saysTrained, mode: this.params.get("mode"), at: this.params.has("at") ? Number(this.params.get("at")) : undefined,
      changed: (position, mode) => {
        rewrite(this.address({ mode: mode === "trained" ? null : mode, at: position >= 0 ? position : null }));
        this.params = new URLSearchParams(location.hash.split("?")[1] ?? "");
      },
    });
    requestAnimationFrame(() => this.tokens?.load());
    return this.tokens.element;
  }

  spans() {
    const spans = this.record.spans ?? [];
    if (!spans.length) return empty("No spans are stored with this trajectory: the main one of the episode has them.");
    return h("div", { class: "card wide-waterfall" }, waterfall(spanItems(spans), { label: "Spans of this episode", details: true }));
  }

  facts() {
    const { conversation: _, ...rest } = this.record;
    return h("div", { class: "card record" }, tree(rest));
  }

  showAside() {
    const record = this.record;
    const parts = Object.entries(record.parts ?? {});
    this.siblings = h("section");
    const spans = record.spans?.length && record.spans.length <= 60 ? waterfall(spanItems(record.spans)) : null;
    replace(this.aside,
      h("section", null, h("h2", null, "Reward"), h("p", { class: "figure" }, fixed(record.reward)), parts.length ? h("ul", { class: "part-list" }, parts.map(([name, value]) => h("li", null, part(name, value)))) : null,
        facts([["answer", record.answer], ["wanted", record.ground_truth === null || record.ground_truth === undefined ? null : typeof record.ground_truth === "object" ? JSON.stringify(record.ground_truth) : String(record.ground_truth)], ["outcome", typeof record.outcome === "number" && record.outcome !== record.reward ? fixed(record.outcome) : null], ["advantage", signed(record.advantage)]])),
      this.siblings,
      spans ? h("section", null, h("h2", null, "Latency", h("button", { type: "button", class: "plain", on: { click: () => this.show("spans") } }, "larger")), spans) : null,
      h("section", null, h("h2", null, "Facts"), facts([
        ["policy version", record.version === undefined ? null : String(record.version)], ["staleness", integer(record.staleness)], ["mismatch", typeof record.mismatch === "number" ? number(record.mismatch) : h("span", { title: UNMEASURED }, "–")], ["sampled tokens", integer(record.sampled)], ["prompt tokens", integer(record.prompt_length)],
        ["took", seconds(record.latency_s)], ["started", clock(record.started)], ["data", record.data_source], ["group", record.group_id], ["row", record.row === null || record.row === undefined ? null : String(record.row)], ["trace", record.trace_id ? h("code", null, record.trace_id) : null]])),
      Object.keys(record.metrics ?? {}).length ? h("section", null, h("h2", null, "Metrics"), facts(Object.entries(record.metrics).map(([name, value]) => [say(name, 60), number(value)]))) : null,
      record.faults?.length ? h("section", null, h("h2", null, "Faults"), tree(record.faults)) : null);
  }

  async loadSiblings() {
    const { split, step, group_id } = this.record;
    try {
      const { rows, total } = await api.episodes(this.run, { split, step, group_id, sort: "sample_index", limit: 64, offset: 0 });
      if (rows.length < 2) return;
      replace(this.siblings, h("h2", null, "Group", h("a", { href: groupLink(this.run, this.record, this.list) }, "compare")),
        h("ol", { class: "siblings", "aria-label": `${total} samples of the group` }, rows.map((row) => h("li", null, h("a", { href: episodeLink(this.run, row.key, this.list), "aria-current": row.key === this.key ? "true" : null, class: row.status !== "ok" ? "bad" : row.reward > 0 ? "good" : "", title: `sample ${row.sample_index}: ${row.status === "ok" ? fixed(row.reward) : row.status}` },
          h("span", { class: "sr" }, `sample ${row.sample_index}: `), row.status === "ok" ? fixed(row.reward, 2) : "failed")))));
    } catch {
      replace(this.siblings);
    }
  }

  async loadPlace() {
    if (!this.buttons) return;
    try {
      const around = await api.around(this.run, this.key, this.list);
      this.around = around;
      this.buttons.previous.disabled = !around.previous;
      this.buttons.next.disabled = !around.next;
      this.place.textContent = around.index >= 0 ? `${integer(around.index + 1)} of ${integer(around.total)}` : "";
      if (around.next) api.episode(this.run, around.next).catch(() => {}); // so that j is instant
    } catch (error) {
      replace(this.place, h("span", { title: error.message }, ""));
    }
  }

  step(which) {
    const key = this.around?.[which];
    if (!key) return announce(which === "next" ? "the last episode of the list" : "the first episode of the list");
    location.replace(link(["run", this.run, "episode"], { key, ...this.list, view: this.name === "conversation" ? null : this.name, mode: this.params.get("mode") }));
  }

  jump(by) {
    if (this.name !== "conversation") return;
    const turns = [...this.panel.querySelectorAll(".turn")];
    const top = 120;
    const now = turns.findLastIndex((one) => one.getBoundingClientRect().top <= top + 1);
    const next = turns[Math.max(0, Math.min(turns.length - 1, now + by))];
    if (!next) return;
    next.tabIndex = -1;
    next.focus({ preventScroll: true });
    window.scrollBy({ top: next.getBoundingClientRect().top - top });
  }

  failed(error) {
    replace(this.panel, problem(error));
  }
}
