"""An episode as lines of text: facts, conversation, tokens, spans.

In: the JSON data of the viewer's API (`viewer.api.conversation.episode_json`). Out: lines as
(text, style) pairs, which `show` prints and `diff` compares.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from agentloop.text import clean, number, seconds

Line = tuple[str, str]
"""(text, style)."""

INDENT = "    "

LONGEST_CALL = 300
"""Characters shown of the text of a malformed call; `--json` has all of it."""

SHORT_S = 0.1
"""Durations below this are shown in milliseconds."""

ROLE_STYLES = {"assistant": "bold cyan", "tool": "bold yellow", "user": "bold green", "system": "bold"}


def fact_lines(episode: Mapping[str, Any]) -> Iterator[Line]:
    """Yield what is known of an episode as a whole."""
    failed = episode["status"] != "ok"
    yield episode["key"], "bold"
    row = "" if episode["row"] is None else f"row {episode['row']}  "
    yield (
        f"step {episode['step']} ({episode['split']})  {row}task {episode['task_id'] or '–'}  group "
        f"{episode['group_id']}  sample {episode['sample_index']}  agent {episode['agent_name'] or '–'}",
        "",
    )
    parts = "".join(f"  {name} {number(value)}" for name, value in episode["parts"].items())
    yield f"reward {number(episode['reward'])}{parts and f'  parts:{parts}'}", "bold red" if failed else "bold green"
    yield (
        f"status {episode['status']}  stop {episode['stop_reason']}  turns {episode['turns']}  tool calls "
        f"{episode['tool_calls']}  {seconds(episode['latency_s'])}",
        "red" if failed else "",
    )
    if episode["error"]:
        yield f"error: {episode['error']}", "red"
    for fault in episode["faults"]:
        place = f" at {fault['where']}" if fault.get("where") else ""
        yield f"exception in {fault.get('source')}: {fault.get('error') or 'unknown'}{place}", "red"
        for line in str(fault.get("traceback") or "").splitlines():
            yield INDENT + line, "dim"
    if episode["answer"] is not None:
        yield f"answer {episode['answer']}", ""
    if len(episode["trajectories"]) > 1:
        others = [key for key in episode["trajectories"] if key != episode["key"]]
        yield f"other trajectories of this episode: {', '.join(others)}", "dim"


def token_line(episode: Mapping[str, Any]) -> Line:
    """Return which tokens were sampled, by which version, and whether they were trained."""
    spans = ", ".join(f"{span['start']}–{span['end']} v{span['version']}" for span in episode["versions"]) or "none"
    stale = "" if episode["staleness"] is None else f"  staleness {episode['staleness']}"
    gap = "" if episode["mismatch"] is None else f"  mismatch {number(episode['mismatch'])}"
    return (
        f"tokens {episode['length']} (prompt {episode['prompt_length']}, sampled {episode['sampled']}, "
        f"{training(episode)})  sampled: {spans}{stale}{gap}",
        "",
    )


def training(episode: Mapping[str, Any]) -> str:
    """Return whether an episode was trained, as far as its trace knows."""
    if episode["has_advantages"]:
        return "trained"
    return "not trained" if episode["split"] == "eval" or episode["status"] != "ok" else "training not recorded"


def message_lines(message: Mapping[str, Any], trained: str | None = None) -> Iterator[Line]:
    """Yield a message: its role and numbers, then its text, calls and rewards.

    Args:
        trained: `training` of its episode. None: leave out tokens, versions, times and ids of
            calls, which differ between equal messages.
    """
    numbers = trained is not None
    role = str(message["role"])
    title = role if message["turn"] is None else f"{role}, turn {message['turn'] + 1}"
    named = [str(message[key]) for key in ("name", "tool_call_id") if message.get(key) and (numbers or key == "name")]
    title += f" ({', '.join(named)})" if named else ""
    yield f"── {title}{_numbers(message, trained) if trained is not None else ''}", ROLE_STYLES.get(role, "bold")
    if message.get("reasoning"):
        for line in str(message["reasoning"]).splitlines():
            yield f"{INDENT}│ {line}", "dim italic"
    for line in str(message.get("text") or "").splitlines():
        yield INDENT + line, ""
    for digest in message.get("images") or ():
        yield f"{INDENT}[image {digest or 'not in the store'}]", "magenta"
    for call in message.get("tool_calls") or ():
        label = f" ({call['id']})" if call.get("id") and numbers else ""
        yield f"{INDENT}→ {call['name']}{label}", "cyan"
        for line in _arguments(call.get("arguments")):
            yield f"{INDENT}  {line}", "cyan"
    for call in message.get("malformed_calls") or ():
        yield f"{INDENT}malformed call: {call['reason']}", "red"
        for line in clean(call.get("text") or "", LONGEST_CALL).splitlines():
            yield f"{INDENT}  {line}", "red"
    for reward in message.get("rewards") or ():
        yield f"{INDENT}+ reward {reward['name']} {number(reward['value'])}", "green"


def _numbers(message: Mapping[str, Any], trained: str) -> str:
    words = []
    if message["turn"] is not None:
        start, end = message["tokens"]
        versions = message["versions"]
        words.append(f"tokens {start}–{end}, {trained}")
        if versions:
            words.append(f"v{versions[0]}" + ("" if versions[0] == versions[1] else f"–v{versions[1]}"))
        words.append(str(message["stop_reason"]))
        for key, name in (("logprob", "logprob"), ("mismatch", "mismatch"), ("advantage", "advantage")):
            if message.get(key) is not None:
                words.append(f"{name} {number(message[key])}")
    if message.get("latency_s") is not None:
        words.append(_took(message["latency_s"]))
    return "".join(f"  {word}" for word in words)


def _arguments(arguments: Any) -> list[str]:
    """Return a call's arguments, one a line; long texts keep their lines."""
    if not isinstance(arguments, Mapping):
        return str(arguments).splitlines()
    lines: list[str] = []
    for name, value in arguments.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        first, *more = text.splitlines() or [""]
        lines += [f"{name}: {first}", *(f"{' ' * (len(str(name)) + 2)}{line}" for line in more)]
    return lines


def span_tree(spans: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return spans as (label, style, children), by their begin.

    A span whose parent was dropped is a root.
    """
    children: dict[str | None, list[Mapping[str, Any]]] = {}
    known = {span["span_id"] for span in spans}
    for span in sorted(spans, key=lambda span: span["start_ns"]):
        parent = span["parent_id"] if span["parent_id"] in known else None
        children.setdefault(parent, []).append(span)

    def grow(parent: str | None, above: frozenset[str]) -> list[Any]:
        return [
            (_label(span), "red" if span["status"] != "ok" else "", grow(span["span_id"], above | {span["span_id"]}))
            for span in children.get(parent, ())
            if span["span_id"] not in above
        ]

    return grow(None, frozenset())


def _took(duration_s: float) -> str:
    """Return a duration; a short one in milliseconds."""
    return f"{duration_s * 1e3:.1f}ms" if duration_s < SHORT_S else seconds(duration_s)


def _label(span: Mapping[str, Any]) -> str:
    took = _took((span["end_ns"] - span["start_ns"]) / 1e9) if span["end_ns"] else "not ended"
    hidden = ("request_id", "call_id")
    words = [
        f"{key}={number(value) if isinstance(value, float) else clean(value, 60)}"
        for key, value in span["attributes"].items()
        if key not in hidden
    ]
    bad = (
        ""
        if span["status"] == "ok"
        else f"  {span['status']}{': ' + clean(span['error'], 200) if span['error'] else ''}"
    )
    return f"{span['name']}  {took}{bad}{''.join('  ' + word for word in words[:8])}"


def token_rows(tokens: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return titles and rows of a table of tokens (`viewer.api.tokens.tokens_json`)."""
    titles = ["at", "id", "sampled", "version", "logprob", "trainer", "advantage", "text"]
    rows = []
    for i, token in enumerate(tokens["ids"]):
        sampled = bool(tokens["mask"][i])

        def cell(key: str, i: int = i, sampled: bool = sampled) -> str:
            values = tokens[key]
            return number(values[i]) if sampled and values is not None and values[i] is not None else ""

        version = tokens["versions"][i]
        text = "" if tokens["pieces"] is None else json.dumps(tokens["pieces"][i], ensure_ascii=False)[1:-1]
        rows.append(
            [
                str(tokens["start"] + i),
                str(token),
                "yes" if sampled else "",
                "" if version is None else str(version),
                cell("logprobs"),
                cell("trainer_logprobs"),
                cell("advantages"),
                text,
            ]
        )
    return titles, rows
