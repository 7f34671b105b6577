"""`agentloop trace diff`: two episodes of a group against each other."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from agentloop.trace.record import TraceRecord
    from agentloop.viewer.api.decoder import Decoder

FACTS = ("reward", "status", "stop_reason", "turns", "tool_calls", "length", "sampled", "latency_s", "answer")

CONTEXT = 3
"""Equal lines that are shown around different ones."""


def diff(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a run directory, e.g. outputs/quickstart")],
    one: Annotated[str, typer.Argument(metavar="KEY", help="a key of `agentloop trace list`")],
    other: Annotated[str, typer.Argument(metavar="KEY", help="another one")],
    json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Compare two episodes: outcome, where their tokens part, and their conversations.

    Example:

      agentloop trace diff outputs/quickstart train/1/g0/0 train/1/g0/1
    """
    from agentloop.commands.trace.printing import Printer, print_json
    from agentloop.commands.trace.reading import find_episode, open_store
    from agentloop.commands.trace.settings import read_config, setting
    from agentloop.text import clean, number
    from agentloop.viewer.api.conversation import episode_json
    from agentloop.viewer.api.decoder import Decoder

    store = open_store(run)
    records = [find_episode(store, key) for key in (one, other)]
    a, b = (episode_json(record, None) for record in records)
    decoder = Decoder.load(setting(read_config(run), "model.path"), run)
    facts = {name: [a[name], b[name]] for name in FACTS}
    facts |= {f"part {name}": [e["parts"].get(name) for e in (a, b)] for name in sorted({*a["parts"], *b["parts"]})}
    parting = _parting(records, decoder)
    lines = _difference(a, b)
    if json:
        data = {"keys": [a["key"], b["key"]], "same_task": a["task_id"] == b["task_id"], "facts": facts}
        print_json(data | {"tokens": parting, "conversation": [text for text, _ in lines]})
        return

    def cell(value: Any) -> str:
        return number(value) if isinstance(value, float) else "–" if value is None else clean(value, 80)

    printer = Printer()
    shown = [[name, cell(left), cell(right), "" if left == right else "*"] for name, (left, right) in facts.items()]
    printer.table(("", a["key"], b["key"], ""), shown)
    if a["task_id"] != b["task_id"]:
        printer.line((f"different tasks: {clean(a['task_id'], 60)} and {clean(b['task_id'], 60)}", "yellow"))
    printer.line()
    printer.line(_parting_text(parting))
    printer.line()
    for line in lines:
        printer.line(line)
    if not lines:
        printer.line("the conversations are equal")


def _parting(records: list[TraceRecord], decoder: Decoder | None) -> dict[str, Any]:
    """Return how many tokens are equal, and the first ones that are not."""
    a, b = (list(record.trajectory.token_ids) for record in records)
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return {
        "same": same,
        "same_sampled": sum(value == 1 for value in records[0].trajectory.loss_mask[:same]),
        "next": [_token(record, same, decoder) for record in records],
    }


def _token(record: TraceRecord, at: int, decoder: Decoder | None) -> dict[str, Any] | None:
    import math

    from agentloop.text import finite

    t = record.trajectory
    if at >= len(t.token_ids):
        return None
    token, logprob = int(t.token_ids[at]), finite(t.logprobs[at])
    try:
        text = decoder.text([token]) if decoder is not None else None
    except (OverflowError, TypeError):  # not a possible id of any tokenizer
        text = None
    probability = None if logprob is None else math.exp(min(0.0, logprob))
    return {"id": token, "text": text, "sampled": t.loss_mask[at] == 1, "probability": probability}


def _parting_text(parting: dict[str, Any]) -> str:
    from agentloop.text import clean, number

    def token(found: dict[str, Any] | None) -> str:
        if found is None:
            return "the end"
        text = f"token {found['id']}" if found["text"] is None else repr(clean(found["text"], 40))
        return text + (f" (p {number(found['probability'])})" if found["probability"] is not None else "")

    first, second = parting["next"]
    begin = f"the first {parting['same']:,} tokens are equal, {parting['same_sampled']:,} of them sampled"
    return begin if first is second is None else f"{begin}; then {token(first)} and {token(second)}"


def _difference(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the lines in which two conversations differ, with some equal ones around them."""
    from agentloop.commands.trace.episode_text import message_lines

    old, new = (
        [text for message in episode["conversation"] for text, _ in message_lines(message)] for episode in (a, b)
    )
    styles = {"-": "red", "+": "green", "@": "dim"}
    found = difflib.unified_diff(old, new, a["key"], b["key"], n=CONTEXT, lineterm="")
    return [(line, styles.get(line[:1], "")) for line in found]
