// What looks wrong, by rule, with the episodes behind it.
import { api } from "../core/api.js";
import { h, replace } from "../core/dom.js";
import { number, plural } from "../core/format.js";
import { subscribe } from "../core/live.js";
import { episodeLink } from "../core/route.js";
import { say } from "../core/text.js";
import { severity } from "../parts/badges.js";

const ORDER = { bad: 0, warn: 1, info: 2 };
const MOST_KEYS = 12;

/** "train/12/g-3/4/0" -> "step 12 · g-3 · sample 4". */
export function keyLabel(key) {
  const parts = String(key).split("/");
  if (parts.length < 5) return key;
  const [split, step] = parts;
  const [sample] = parts.slice(-2);
  return `${split === "train" ? "" : `${split} `}step ${step} · ${parts.slice(2, -2).join("/")} · ${sample}`;
}

export function keyLinks(run, keys) {
  if (!keys?.length) return null;
  return h("ul", { class: "key-links" }, keys.slice(0, MOST_KEYS).map((key) => h("li", null, h("a", { href: episodeLink(run, key) }, say(keyLabel(key), 80)))),
    keys.length > MOST_KEYS ? h("li", { class: "quiet" }, `and ${keys.length - MOST_KEYS} more`) : null);
}

/** What is said below the cards: that rules could not judge yet, or that nothing was found. */
export function verdict(signals, note) {
  if (note) return h("p", { class: "empty" }, `${note}.`);
  return signals.length ? null : h("p", { class: "empty fine" }, "Nothing looks wrong by the rules that are checked.");
}

export function signalCards(run, signals) {
  const ordered = [...signals].sort((a, b) => (ORDER[a.severity] ?? 3) - (ORDER[b.severity] ?? 3));
  return h("div", { class: "signals" }, ordered.map((one) => h("article", { class: `card signal sev-${one.severity}` },
    h("header", null, severity(one.severity), h("h3", null, say(one.title, 200)), typeof one.value === "number" ? h("span", { class: "measured" }, number(one.value), typeof one.bound === "number" ? h("small", null, ` bound ${number(one.bound)}`) : null) : null),
    h("p", null, say(one.sentence, 1200)), keyLinks(run, one.keys))));
}

export class SignalsView {
  title = "Signals";

  constructor({ run }) {
    this.run = run;
    this.body = h("div");
    this.element = h("div", { class: "page" }, h("header", { class: "page-head" }, h("h1", null, "Signals"), h("p", { class: "sub" }, "What looks wrong in this run, and the episodes behind it. Each rule is a bound on numbers of the run.")), this.body);
    this.stop = subscribe(() => this.load(), run);
  }

  dispose() {
    this.stop();
  }

  async load() {
    const { signals, rules, note } = await api.signals(this.run);
    const quiet = (rules ?? []).filter((rule) => !signals.some((one) => one.rule === rule.rule));
    const next = JSON.stringify([signals, quiet, note]);
    if (next === this.shown) return;
    this.shown = next;
    replace(this.body, h("h2", { class: "sr" }, "Found"), signals.length ? signalCards(this.run, signals) : null, verdict(signals, note),
      quiet.length ? h("section", null, h("h2", null, `${plural(quiet.length, "rule")} found nothing`), h("div", { class: "card" }, h("dl", { class: "rules" }, quiet.map((rule) => h("div", null, h("dt", null, say(rule.title, 200)), h("dd", null, rule.sentence ? say(rule.sentence, 600) : null, typeof rule.bound === "number" ? h("span", { class: "quiet" }, ` bound ${number(rule.bound)}`) : null)))))) : null);
  }
}
