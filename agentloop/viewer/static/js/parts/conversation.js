// An episode as a conversation: roles, reasoning, tool calls with their results, images, and rewards where they fell.
import { api } from "../core/api.js";
import { h } from "../core/dom.js";
import { integer, seconds } from "../core/format.js";
import { block, say, shown } from "../core/text.js";
import { part } from "./badges.js";
import { argumentsOf, tree } from "./values.js";

const ROLES = { system: "System", user: "User", assistant: "Assistant", tool: "Tool", environment: "Environment" };

/** Tool messages by the call they answer; what answers no known call stays in line. */
function resultsByCall(messages) {
  const calls = new Set(messages.flatMap((one) => (one.tool_calls ?? []).map((call) => call.id)).filter(Boolean));
  const found = new Map();
  for (const one of messages) if (one.role === "tool" && calls.has(one.tool_call_id) && !found.has(one.tool_call_id)) found.set(one.tool_call_id, one);
  return found;
}

function images(run, digests) {
  if (!digests?.length) return null;
  return h("div", { class: "images" }, digests.map((digest, i) => h("a", { href: api.image(run, digest), target: "_blank", rel: "noopener" },
    h("img", { src: api.image(run, digest), loading: "lazy", alt: `Image ${i + 1} of ${digests.length} of this message` }))));
}

function rewards(message) {
  const list = message.rewards?.length ? message.rewards : typeof message.reward === "number" ? [{ name: "reward", value: message.reward }] : [];
  return list.length ? h("span", { class: "parts" }, list.map((one) => part(one.name, one.value))) : null;
}

function meta(message) {
  const [start, end] = message.tokens ?? [];
  return [
    message.stop_reason && message.stop_reason !== "stop" ? h("span", { class: "pill bad" }, say(message.stop_reason)) : null,
    message.version === null || message.version === undefined ? null : h("span", { title: "policy version" }, `v${message.version}`),
    end > start && start > 0 ? h("span", { title: `tokens ${start} to ${end}` }, `${integer(end - start)} tokens`) : null,
    typeof message.latency_s === "number" && message.latency_s > 0 ? h("span", null, seconds(message.latency_s)) : null,
  ];
}

function result(message, run) {
  return h("div", { class: `result${message.error ? " failed" : ""}` },
    h("p", { class: "who" }, h("span", { class: "role" }, message.error ? "Result: error" : "Result"), meta(message), rewards(message)),
    images(run, message.images), message.text ? block(message.text) : h("p", { class: "quiet" }, "(empty)"));
}

function call(one, answer, run) {
  const given = argumentsOf(one.arguments);
  const empty = typeof given === "object" && given !== null && !Object.keys(given).length;
  return h("div", { class: "call" },
    h("p", { class: "call-name" }, h("span", { class: "role" }, "calls"), " ", h("b", null, say(one.name, 200))),
    empty ? h("p", { class: "quiet" }, "(without arguments)") : h("div", { class: "call-arguments" }, tree(given)), answer ? result(answer, run) : null);
}

function turn(message, index, { run, results, tokensLink, trained }) {
  const name = ROLES[message.role] ?? shown(message.role);
  const where = message.turn === null || message.turn === undefined ? "" : ` · turn ${message.turn + 1}`;
  const calls = message.tool_calls ?? [];
  const malformed = message.malformed_calls ?? [];
  const tokens = message.tokens && tokensLink ? h("a", { class: "to-tokens", href: tokensLink(message.tokens[0]), title: "these tokens in the token view" }, "tokens") : null;
  const body = [
    message.reasoning ? h("details", { class: "reasoning", open: message.reasoning.length < 4000 }, h("summary", null, "Reasoning"), block(message.reasoning)) : null,
    images(run, message.images),
    message.text ? block(message.text) : !calls.length && !malformed.length && !message.reasoning ? h("p", { class: "quiet" }, "(empty)") : null,
    calls.map((one) => call(one, results.get(one.id), run)),
    malformed.map((one) => h("div", { class: "call failed" }, h("p", { class: "call-name" }, h("span", { class: "role" }, "malformed call"), " ", say(one.reason, 600)), block(one.text))),
  ];
  const folded = message.role === "system" && (message.text ?? "").length > 1200;
  return h("article", { class: `turn role-${ROLES[message.role] ? message.role : "other"}${message.error ? " failed" : ""}`, id: `m${index}`, data: { turn: message.turn ?? "" }, "aria-label": shown(`${name}${where}`) },
    h("header", { class: "who" }, h("span", { class: "role" }, name), message.name ? say(message.name, 80) : null, where ? h("span", null, where.slice(3)) : null,
      message.role === "assistant" && trained && message.trained === false ? h("span", { class: "pill" }, "not trained") : null, meta(message), tokens, rewards(message)),
    folded ? h("details", null, h("summary", null, `${integer(message.text.length)} characters`), body) : body);
}

/** The conversation as a list of articles; `tokensLink(position)` leads to the token view; `trained`: say of turns that they were not. */
export function conversation(messages, { run, tokensLink, trained } = {}) {
  const results = resultsByCall(messages);
  const nested = new Set(results.values());
  return h("div", { class: "conversation" }, messages.map((one, i) => (nested.has(one) ? null : turn(one, i, { run, results, tokensLink, trained }))));
}

/** All that the model wrote, for a comparison. */
export function spokenText(messages) {
  const lines = [];
  for (const one of messages ?? []) {
    if (one.role !== "assistant") continue;
    if (one.reasoning) lines.push(one.reasoning);
    if (one.text) lines.push(one.text);
    for (const item of one.tool_calls ?? []) lines.push(`${item.name}(${typeof item.arguments === "string" ? item.arguments : JSON.stringify(item.arguments)})`);
  }
  return lines.join("\n\n");
}
