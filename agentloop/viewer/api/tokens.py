"""The tokens of a trajectory, in parts: ids, text, mask, logprobs, advantages, versions."""

from __future__ import annotations

from typing import Any

import numpy as np

from agentloop.trace.record import TraceRecord
from agentloop.viewer.api.conversation import Columns
from agentloop.viewer.api.decoder import Decoder

MOST_TOKENS = 16_384
"""Tokens in one answer."""

CONTEXT = 8
"""Tokens before and after a part that are decoded with it: the bytes of a character may be spread
over several tokens."""


def tokens_json(record: TraceRecord, start: int, end: int, decoder: Decoder | None) -> dict[str, Any]:
    """Return the columns of tokens `start` to `end`; each is a list of one length, or null if the
    trace does not have it.

    `pieces` is the text that each token adds. If the bytes of a character are spread over several
    tokens, the last one has the character, and the others have an empty text.
    """
    t = record.trajectory
    length = len(t.token_ids)
    start, end = min(start, length), min(end, length)
    columns = Columns(record)
    ids = [int(token) for token in t.token_ids[start:end]]
    pieces = _pieces(record, start, end, decoder)
    trainer, advantages = columns.trainer_logprobs, columns.advantages
    return {
        "key": record.key,
        "start": start,
        "end": end,
        "length": length,
        "prompt_length": t.prompt_length,
        "ids": ids,
        "has_text": pieces is not None,
        "pieces": pieces,
        "special": sorted(decoder.special.intersection(ids)) if decoder is not None else [],
        "mask": columns.mask[start:end].astype(int).tolist(),
        "logprobs": _numbers(columns.logprobs[start:end]),
        "trainer_logprobs": None if trainer is None else _numbers(trainer[start:end]),
        "advantages": None if advantages is None else _numbers(advantages[start:end]),
        "versions": columns.versions[start:end],
    }


def _pieces(record: TraceRecord, start: int, end: int, decoder: Decoder | None) -> list[str] | None:
    if decoder is None:
        return None
    begin = max(0, start - CONTEXT)
    ids = [int(token) for token in record.trajectory.token_ids[begin : end + CONTEXT]]
    try:
        pieces = decoder.pieces(ids)
    except (OverflowError, TypeError):  # not a possible id of any tokenizer
        return None
    return pieces[start - begin : end - begin]


def _numbers(values: np.ndarray) -> list[float | None]:
    return [round(float(value), 5) if np.isfinite(value) else None for value in values]
