"""`agentloop template`: print the verdict, the differences, and one conversation with its ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from agentloop.chat.proof.proof import Proof, Verdict, prove
from agentloop.chat.renderer import ChatRenderer
from agentloop.chat.template import read_template
from agentloop.chat.tokenizer import load_tokenizer
from agentloop.errors import ConfigError, ModelError
from agentloop.imports import compose

STYLES = {"prompt": "", "model": "bold cyan", "template": "yellow"}
PLAIN_WIDTH = 120


def template_command(
    model: str,
    *,
    chat_template: Path | None,
    tool_format: str | None,
    tool_role: str,
    variables: Sequence[str],
    tools: Path | None,
    count: int,
    seed: int,
) -> int:
    """Run `agentloop template`; return the exit code: 0, or 1 for a refused template.

    Raises:
        UserError: the model, a file or an option is not usable.
    """
    tokenizer = load_tokenizer(model, model=False)
    console = Console(highlight=False, soft_wrap=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PLAIN_WIDTH)

    try:
        renderer = ChatRenderer(
            tokenizer,
            chat_template=read_template(chat_template, "--chat-template"),
            tool_format=tool_format,
            chat_template_kwargs=_variables(variables),
            tool_role=tool_role,
        )
    except ModelError as exc:
        console.print(Text.assemble(("refused", "bold red"), f": {exc}"))
        return 1

    schemas = None
    if tools is not None:
        from agentloop.tool.loading import load_toolset

        schemas = load_toolset(tools).schemas

    proof = prove(renderer, schemas, count=count, seed=seed)
    for line in summary(proof, renderer):
        console.print(line)
    if proof.example:
        console.print()
        console.print(_example(proof))
    return 1 if proof.verdict is Verdict.REFUSED else 0


def summary(proof: Proof, renderer: ChatRenderer) -> list[Text]:
    """Return the verdict and its details, one line each."""
    colour = {Verdict.EXACT: "bold green", Verdict.KEPT: "bold yellow", Verdict.REFUSED: "bold red"}[proof.verdict]
    tried = f" ({proof.conversations} conversations, {proof.turns} turns)"
    lines = [Text.assemble(("template     ", "dim"), (proof.verdict.value, colour), tried)]
    if proof.reason:
        lines.append(_line("reason", proof.reason))

    stops = " ".join(renderer.encoder.spelling[token] for token in renderer.stop_token_ids)
    lines.append(_line("turns end in", stops + ("" if renderer.end_of_turn is not None else " (opens the next turn)")))
    lines.append(_line("tool calls", f"{renderer.tool_format.name} format"))
    if renderer.opens_reasoning:
        lines.append(_line("reasoning", "opened by the generation prompt"))

    for ability, reason in proof.abilities.missing.items():
        lines.append(_line("not rendered", f"{ability}: {reason.splitlines()[0]}"))
    for difference in proof.differences:
        lines.append(_line("sampled", repr(difference.sampled)))
        lines.append(
            _line("rewritten", f"{difference.rewritten!r} (when the conversation continues; the sampled ids stay)")
        )
    return lines


def _line(label: str, text: str) -> Text:
    return Text.assemble((f"{label:13}", "dim"), text)


def _example(proof: Proof) -> Table:
    table = Table(show_lines=True, title="example conversation", title_justify="left")
    table.add_column("written by")
    table.add_column("text", ratio=3, overflow="fold")
    table.add_column("ids", ratio=2, overflow="fold")
    for piece in proof.example:
        style = STYLES[piece.author]
        table.add_row(Text(piece.author, style), Text(piece.text, style), Text(" ".join(map(str, piece.ids)), "dim"))
    return table


def _variables(assignments: Sequence[str]) -> dict[str, Any]:
    """Read the template variables of the `--set` options."""
    import yaml

    values: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not name:
            raise ConfigError(f"--set {assignment} is not an assignment", "write it as name=value")
        compose(value, f"--set {name}", ConfigError)
        try:
            values[name] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError) as exc:
            raise ConfigError(f"--set {assignment}: the value cannot be read", "quote it as in YAML") from exc
    return values
