"""`agentloop trace show`: one episode, from its prompt to its reward."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def show(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a run directory, e.g. outputs/quickstart")],
    key: Annotated[str, typer.Argument(help="a key of `agentloop trace list`, e.g. train/60/g59/0")],
    tokens: Annotated[
        bool, typer.Option("--tokens", help="also the tokens from the first sampled one: id, text, mask, logprobs")
    ] = False,
    all_tokens: Annotated[bool, typer.Option("--all-tokens", help="also every token, those of the prompt too")] = False,
    json: Annotated[bool, typer.Option("--json", help="print JSON, as the viewer's API answers")] = False,
) -> None:
    """Show an episode: roles, calls, what was trained, rewards where they fell, latencies.

    Example:

      agentloop trace show outputs/quickstart train/60/g1888/0
    """
    from agentloop.commands.trace.episode_text import (
        fact_lines,
        message_lines,
        span_tree,
        token_line,
        token_rows,
        training,
    )
    from agentloop.commands.trace.printing import Printer, print_json
    from agentloop.commands.trace.reading import find_episode, open_store
    from agentloop.commands.trace.settings import read_config, setting
    from agentloop.text import counted
    from agentloop.viewer.api.conversation import episode_json
    from agentloop.viewer.api.decoder import Decoder
    from agentloop.viewer.api.tokens import tokens_json

    tokens = tokens or all_tokens
    record = find_episode(open_store(run), key)
    decoder = Decoder.load(setting(read_config(run), "model.path"), run) if tokens or json else None
    episode = episode_json(record, decoder)
    first = 0 if all_tokens or json else next((at for at, m in enumerate(record.trajectory.loss_mask) if m == 1), 0)
    columns = tokens_json(record, first, len(record.trajectory.token_ids), decoder) if tokens else None
    if json:
        print_json(episode if columns is None else episode | {"tokens": columns})
        return

    printer = Printer()
    for line in fact_lines(episode):
        printer.line(line)
    printer.line(token_line(episode))
    for message in episode["conversation"]:
        printer.line()
        for line in message_lines(message, training(episode)):
            printer.line(line)
    if episode["spans"]:
        printer.line()
        printer.tree("spans", span_tree(episode["spans"]))
    if columns is not None:
        printer.line()
        if first:
            before = f"{counted(first, 'token')} before the first sampled one"
            printer.line((f"left out: {before}; --all-tokens shows them", "dim"))
        titles, rows = token_rows(columns)
        printer.table(titles, rows, right=titles[:-1])
        if decoder is None:
            printer.line(("no tokenizer could be loaded from the run's model.path: ids have no text", "dim"))
