// The shell: addresses to views, the bar on top, keys of every page, light and dark.
import { announce, h, replace } from "./core/dom.js";
import { bindGlobal, bindView, showHelp } from "./core/keys.js";
import { start, subscribe, watchState } from "./core/live.js";
import { current, go, link } from "./core/route.js";
import { say, shown as plain } from "./core/text.js";
import { problem } from "./parts/badges.js";
import { CallView } from "./views/call.js";
import { CallsView } from "./views/calls.js";
import { EpisodeView } from "./views/episode.js";
import { EpisodesView } from "./views/episodes.js";
import { FailuresView } from "./views/failures.js";
import { GroupView } from "./views/group.js";
import { ObjectView } from "./views/object.js";
import { RunView } from "./views/run.js";
import { RunsView } from "./views/runs.js";
import { SignalsView } from "./views/signals.js";
import { TaskView } from "./views/task.js";

const OF_RUN = { episodes: EpisodesView, episode: EpisodeView, group: GroupView, task: TaskView, failures: FailuresView, signals: SignalsView };
const TABS = [["", "Overview", "o"], ["episodes", "Episodes", "e"], ["failures", "Failures", "f"], ["signals", "Signals", "s"]];
const THEMES = ["auto", "light", "dark"];

const main = document.getElementById("main");
const top = document.getElementById("top");
let view = null;
let round = 0;

function chosen({ parts, params }) {
  const [first, second, third] = parts;
  if (first === "calls") return { View: CallsView, given: { params }, name: "calls" };
  if (first === "call") return { View: CallView, given: { id: second, params }, name: `call ${second}` };
  if (first === "object" && parts.length === 5) return { View: ObjectView, given: { parts: parts.slice(1) }, name: "call object" };
  if (first === "run" && second) {
    const View = third ? OF_RUN[third] : RunView;
    if (View) return { View, given: { run: second, params }, name: `run ${second} ${third ?? ""}`, run: second, tab: third ?? "" };
  }
  if (!first) return { View: RunsView, given: { params }, name: "runs" };
  return null;
}

async function route() {
  const address = current();
  const next = chosen(address);
  const now = (round += 1);
  const sameTable = view?.update && next && view instanceof next.View && view.run === next.run;
  if (sameTable) return show(() => view.update(next.given.params), now, next);
  view?.dispose?.();
  announce(""); // what was true of the page before
  if (!next) {
    view = null;
    bindView([]);
    drawTop(null);
    return replace(main, h("div", { class: "page" }, h("p", { class: "empty" }, "There is no such page. ", h("a", { href: link([]) }, "All runs"))));
  }
  view = new next.View(next.given);
  bindView(view.bindings?.() ?? []);
  drawTop(next);
  await show(() => view.load(), now, next, true);
}

async function show(load, now, next, fresh = false) {
  const shown = view;
  if (fresh) {
    main.setAttribute("aria-busy", "true");
    if (shown.rows) putIn(shown); // tables fill themselves; the others are put in place when their data is there
  }
  try {
    await load();
    if (now !== round) return;
    if (fresh && !shown.rows) putIn(shown);
  } catch (error) {
    if (now !== round || error.name === "AbortError") return;
    if (!(error.status >= 0)) console.error(error);
    replace(main, h("div", { class: "page" }, problem(error), h("p", null, h("a", { href: next?.run ? link(["run", next.run]) : link([]) }, next?.run ? "The run" : "All runs"))));
  }
  main.removeAttribute("aria-busy");
  document.title = plain(`${shown.title}${next?.run && shown.title !== next.run ? ` · ${next.run}` : ""} · agentloop`);
}

function putIn(shown) {
  replace(main, shown.element);
  window.scrollTo(0, 0);
  shown.placed?.();
}

function drawTop(next) {
  const theme = document.documentElement.dataset.choice ?? "auto";
  const themeButton = h("button", { type: "button", class: "icon", title: `Colours: ${theme}`, "aria-label": `Colours: ${theme}. Change`, on: { click: () => nextTheme() } }, { auto: "◐", light: "○", dark: "●" }[theme]);
  const tab = ([path, label]) => {
    const on = next.tab === path || (path === "episodes" && ["episode", "group", "task"].includes(next.tab));
    return h("a", { href: link(path ? ["run", next.run, path] : ["run", next.run]), "aria-current": on ? "page" : null }, label);
  };
  replace(top,
    h("nav", { class: "crumbs", "aria-label": "Place" }, h("a", { class: "brand", href: link([]), "aria-current": next?.name === "runs" ? "page" : null }, h("img", { src: "/static/icon.svg", alt: "", width: "20", height: "20" }), "agentloop"),
      next?.run ? [h("span", { class: "slash", "aria-hidden": "true" }, "/"), h("a", { class: "crumb-run", href: link(["run", next.run]) }, say(next.run, 60))] : null),
    next?.run ? h("nav", { class: "run-tabs", "aria-label": "Run" }, TABS.map(tab), h("a", { href: link(["calls"]) }, "Calls")) : h("nav", { class: "run-tabs", "aria-label": "Viewer" }, h("a", { href: link([]), "aria-current": next?.name === "runs" ? "page" : null }, "Runs"), h("a", { href: link(["calls"]), "aria-current": next?.name.startsWith("call") ? "page" : null }, "Calls")),
    h("div", { class: "top-right" }, connection, themeButton, h("button", { type: "button", class: "icon", title: "Keys (?)", "aria-label": "Keys", on: { click: showHelp } }, "?")));
}

const connection = h("span", { class: "connection", role: "status" });
const STATES = { connecting: ["", ""], events: ["", ""], polling: ["polling", "asks every few seconds: events do not come through"], lost: ["server lost", "the server does not answer; the page keeps trying"] };

function nextTheme() {
  const now = document.documentElement.dataset.choice ?? "auto";
  try {
    localStorage.setItem("agentloop.theme", THEMES[(THEMES.indexOf(now) + 1) % THEMES.length]);
  } catch {
    return;
  }
  document.dispatchEvent(new Event("agentloop:theme"));
  drawTop(chosen(current()));
  top.querySelector(".top-right .icon").focus();
}

const toRun = (path) => () => {
  const run = chosen(current())?.run;
  return run ? go(link(path ? ["run", run, path] : ["run", run])) : false;
};

bindGlobal([
  { keys: ["/"], what: "search", run: () => (document.getElementById("search") ? document.getElementById("search").focus() : toRun("episodes")()) },
  { keys: ["?"], what: "this help", run: showHelp },
  { keys: ["g r"], what: "all runs", run: () => go(link([])) },
  ...TABS.map(([path, label, key]) => ({ keys: [`g ${key}`], what: label.toLowerCase(), run: toRun(path) })),
  { keys: ["g c"], what: "calls of weave clients and OTLP senders", run: () => go(link(["calls"])) },
  { keys: ["d"], what: "light, dark, as the system", run: nextTheme },
]);

document.getElementById("skip").addEventListener("click", () => {
  main.focus();
  main.scrollIntoView();
});
watchState((state) => {
  const [text, title] = STATES[state];
  replace(connection, text);
  connection.title = title;
  connection.classList.toggle("alarm", state === "lost");
});
subscribe(() => (document.documentElement.dataset.heard = String(Date.now())));
window.addEventListener("hashchange", route);
start();
route();
