"""Turn token ids into shaded text: what the model read, and how likely each sampled token was."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from agentloop.model_folder import cached_file
from agentloop.report.reading import Traced
from agentloop.text import clean

Decode = Callable[[Sequence[int]], list[str]]
"""Maps token ids to one piece of text each."""

SHOWN_TOKENS = 600
"""Tokens shown of one trajectory; the middle of a longer one is omitted."""

PIECE_CHARACTERS = 120
"""Longer pieces are cut. Real tokens are shorter, but a trace can contain anything."""

LIKELY = (0.9, 0.6, 0.3, 0.1, 0.02)
"""Probability bounds of the shades p0 (likely, unshaded) to p5."""

_SPECIAL = re.compile(r"<[|｜].{1,60}[|｜]>|</?s>|\[/?INST\]", re.DOTALL)


def show_ids(ids: Sequence[int]) -> list[str]:
    """Show ids as numbers, if the tokenizer cannot be loaded."""
    return [f"⟨{token}⟩" for token in ids]


def load_decoder(model_path: Any, run_dir: Path) -> Decode | None:
    """Return a decoder from a model's `tokenizer.json`, without torch and without downloads.

    None for a model without that file (an old slow tokenizer), and for a hub model that is not in
    the local cache.
    """
    if not isinstance(model_path, str) or not model_path:
        return None
    from tokenizers import Tokenizer

    found = next((f for base in (Path(), run_dir) if (f := base / model_path / "tokenizer.json").is_file()), None)
    found = found or cached_file(model_path, "tokenizer.json")
    if found is None:
        return None
    try:
        tokenizer = Tokenizer.from_file(str(found))
    except Exception:  # noqa: BLE001 - the library raises bare Exception for a file it cannot read
        return None
    return lambda ids: stream_pieces(ids, lambda part: tokenizer.decode(list(part), skip_special_tokens=False))


def stream_pieces(ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[str]:
    """Return one piece per id; the joined pieces are the decoded text, where that is valid.

    A piece is what its token adds to the text of the few tokens before it, so spaces survive in
    vocabularies that drop a leading one. If the bytes of a character are spread over several
    tokens, the character is the piece of the last one, and the others get `""`. Worked example: `é`
    as two byte tokens gives `["", "é"]`. Bytes that never become a character are `\\ufffd`.
    """
    pieces: list[str] = []
    start = 0  # decoding starts here, for a few tokens of context
    read = 0  # pieces exist for the ids before this position
    for index in range(len(ids)):
        before = decode(ids[start:read])
        text = decode(ids[start : index + 1])
        if text.endswith("\ufffd") and index - read < 4 and index + 1 < len(ids):
            pieces.append("")  # perhaps the first bytes of a character: wait for the next token
            continue
        pieces.append(text[len(before) :])
        start, read = read, index + 1
    return pieces


@dataclass(slots=True)
class Segment:
    """Consecutive tokens of a trajectory from one source."""

    kind: str
    """`prompt`, `sampled` (the model's own tokens) or `observed` (tool output, template text)."""
    label: str
    html: Markup
    tokens: int


@dataclass(slots=True)
class Shown:
    """A trajectory, ready for the template."""

    traced: Traced
    title: str
    segments: list[Segment]
    data: dict[str, Any]
    facts: list[str]


class Shader:
    """Turn trajectories into shaded text, and collect the numbers of their tooltips.

    Args:
        decode: for trajectories whose trace has no pieces.
        budget: tokens of the whole page; beyond it, trajectories show only their head and tail.
    """

    def __init__(self, decode: Decode | None, budget: int = 24_000) -> None:
        self._decode = decode or show_ids
        self._left = budget

    def show(self, traced: Traced) -> Shown:
        """Shade one trajectory."""
        n = len(traced.token_ids)
        allowed = min(SHOWN_TOKENS, max(60, self._left))
        head = n if n <= allowed else allowed // 2
        tail = 0 if n <= allowed else allowed - head
        self._left -= head + tail
        positions = [*range(head), *range(n - tail, n)]
        pieces = self._pieces(traced, range(head)) | self._pieces(traced, range(n - tail, n))
        segments = self._segments(traced, positions, pieces, head if tail else None)
        return Shown(
            traced=traced,
            title=f"row {clean(traced.task_id, 60)}" if traced.task_id else "episode",
            segments=segments,
            data={
                "skip": [head, n - head - tail],
                "ids": [traced.token_ids[i] for i in positions],
                "lp": [None if (lp := traced.logprobs[i]) is None else round(lp, 4) for i in positions],
                "v": [traced.versions[i] for i in positions],
            },
            facts=_facts(traced),
        )

    def _pieces(self, traced: Traced, positions: range) -> dict[int, str]:
        if traced.pieces is not None:
            return {position: traced.pieces[position] for position in positions}
        ids = [traced.token_ids[position] for position in positions]
        try:
            pieces = self._decode(ids)
        except (OverflowError, TypeError):  # not a possible id of any tokenizer
            pieces = show_ids(ids)
        return dict(zip(positions, pieces, strict=True))

    def _segments(
        self, traced: Traced, positions: Sequence[int], pieces: dict[int, str], cut_after: int | None
    ) -> list[Segment]:
        segments: list[Segment] = []
        turn = 0
        run: list[int] = []

        def flush() -> None:
            nonlocal turn
            if not run:
                return
            kind = _kind(traced, run[0])
            turn += kind == "sampled" and (run[0] == 0 or not traced.mask[run[0] - 1])
            versions = sorted({v for i in run if (v := traced.versions[i]) is not None})
            label = {"prompt": "prompt", "observed": "observed", "sampled": f"model, turn {turn}"}[kind]
            if versions:
                label += f" · v{versions[0]}" + (f"–{versions[-1]}" if len(versions) > 1 else "")
            html = Markup("").join(_token(traced, i, pieces[i]) for i in run)
            segments.append(Segment(kind, label, html, len(run)))
            run.clear()

        for count, position in enumerate(positions):
            if run and _kind(traced, position) != _kind(traced, run[0]):
                flush()
            if count == cut_after:
                flush()
                skipped = range(positions[count - 1] + 1, position)
                turn += sum(traced.mask[i] and not traced.mask[i - 1] for i in skipped)
                segments.append(Segment("cut", "", Markup("{} tokens left out").format(f"{len(skipped):,}"), 0))
            run.append(position)
        flush()
        return segments


def _kind(traced: Traced, position: int) -> str:
    if traced.mask[position]:
        return "sampled"
    return "prompt" if position < traced.prompt_length else "observed"


def shade(logprob: float | None) -> int:
    """Return the shade of a sampled token: 0 if likely, 5 for the least likely."""
    if logprob is None:
        return 0
    probability = math.exp(min(0.0, logprob))
    return sum(probability < bound for bound in LIKELY)


def _token(traced: Traced, position: int, piece: str) -> Markup:
    text = clean(piece, PIECE_CHARACTERS)
    names = [f"p{shade(traced.logprobs[position])}"] if traced.mask[position] else []
    if _SPECIAL.fullmatch(piece):
        names.append("x")
    if not piece:  # the first bytes of a character: show a dot
        names.append("e")
    text = text.replace("\n", "↵\n").replace("\t", "⇥\t")
    # Unquoted attribute values are safe here, and make a page of 20,000 tokens a tenth smaller.
    if not names:
        return Markup("<i>{}</i>").format(text)
    if len(names) == 1:
        return Markup("<i class={}>{}</i>").format(names[0], text)
    return Markup('<i class="{}">{}</i>').format(" ".join(names), text)


def _facts(traced: Traced) -> list[str]:
    sampled = sum(traced.mask)
    known = [lp for lp, mask in zip(traced.logprobs, traced.mask, strict=True) if mask and lp is not None]
    facts = [
        f"{traced.turns} turn{'s' if traced.turns != 1 else ''}",
        f"{sampled} of {len(traced.mask)} tokens sampled",
    ]
    if known:
        facts.append(f"mean logprob {sum(known) / len(known):.3f}")
    if traced.stop_reason:
        facts.append(f"ended by {clean(traced.stop_reason, 24)}")
    facts += [f"{clean(name, 24)} {value:.3g}" for name, value in list(traced.reward_parts.items())[:4]]
    return facts
