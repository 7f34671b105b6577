"""Rows of supervised fine-tuning become token ids and a mask, in the pieces in which a rollout would see them.

A conversation `system, user, assistant, tool, assistant` is rendered by the model's chat template, cut where the model
starts and stops to speak, and each piece is tokenized by itself (`E` is the end-of-turn token):

    piece  ..user question..<|im_start|>assistant\\n | 12 + 3 E | \\n..tool result..<|im_start|>assistant\\n | #### 15 E
    mask   0                                         | 1        | 0                                        | 1

That is what an agent loop does: the prompt is tokenized, the model samples the ids of its turn, what follows is
tokenized and appended. The ids of a turn are therefore those that the model has to produce in a rollout, never ones
that were merged across the border of a piece.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agentloop.errors import DataError, ModelError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)

MIN_SHARED_PREFIX = 8
"""A shorter common beginning is not worth a separate attention call."""


@dataclass(slots=True)
class SftRow:
    """One tokenized row: `token_ids` int64 and `loss_mask` bool of one length; token 0 is never trained."""

    token_ids: np.ndarray
    loss_mask: np.ndarray


class SftTokenizer:
    """Tokenizes rows of both kinds with the tokenizer of a model folder."""

    def __init__(self, path: str, max_tokens: int) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(path)
        except (OSError, ValueError) as exc:
            raise ModelError(f"{path} has no tokenizer that can be loaded: {exc}", "check model.path") from exc
        self._path = path
        self._end_of_turn = self._tokenizer.eos_token
        self._max_tokens = max_tokens

    def row(self, row: dict[str, Any], where: str) -> SftRow:
        """Tokenize `{messages, tools?}` or `{text, loss_from?}`.

        Args:
            where: file and line, for the error.

        Raises:
            DataError: the row is neither kind, too long, or cannot be rendered.
        """
        if "messages" in row:
            pieces = list(self._conversation(row["messages"], row.get("tools"), where))
        elif "text" in row:
            pieces = self._text(row["text"], int(row.get("loss_from", 0)))
        else:
            raise DataError(f"{where}: a row needs the column 'messages' or 'text', this one has {sorted(row)}")
        ids = np.array([token for tokens, _ in pieces for token in tokens], dtype=np.int64)
        mask = np.array([trained for _, flags in pieces for trained in flags], dtype=bool)
        if len(ids) > self._max_tokens:
            raise DataError(
                f"{where} has {len(ids)} tokens, more than max_tokens {self._max_tokens}", "raise it, or drop the row"
            )
        mask[:1] = False  # nothing comes before the first token to predict it from
        if not mask.any():
            raise DataError(f"{where} has no token to train", 'it needs an assistant message without "train": false')
        return SftRow(ids, mask)

    def save(self, folder: Path) -> None:
        """Put the tokenizer beside the weights in `folder`: byte for byte where it came from a folder."""
        source = Path(self._path)
        if not source.is_dir():
            self._tokenizer.save_pretrained(folder)
            return
        for file in source.iterdir():
            if file.name in TOKENIZER_FILES or file.suffix == ".jinja":
                shutil.copyfile(file, folder / file.name)

    def _text(self, text: str, loss_from: int) -> list[tuple[list[int], list[bool]]]:
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return [(encoded["input_ids"], [start >= loss_from for start, _ in encoded["offset_mapping"]])]

    def _conversation(
        self, messages: Sequence[dict[str, Any]], tools: list[dict[str, Any]] | None, where: str
    ) -> Iterator[tuple[list[int], list[bool]]]:
        done = ""
        plain = [{key: value for key, value in message.items() if key != "train"} for message in messages]
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._render(plain[:index], tools, generation=True, where=where)
            whole = self._render(plain[: index + 1], tools, generation=False, where=where)
            if not prompt.startswith(done) or not whole.startswith(prompt):
                raise DataError(
                    f"{where}: the chat template renders message {index} differently when more of the conversation is "
                    "known, so that its tokens cannot be told apart",
                    "use a template that leaves earlier turns as they were",
                )
            turn = whole[len(prompt) :]
            if self._end_of_turn and self._end_of_turn in turn:
                turn = turn[: turn.rindex(self._end_of_turn) + len(self._end_of_turn)]
            yield self._encode(prompt[len(done) :], trained=False)
            yield self._encode(turn, trained=message.get("train", True))
            done = prompt + turn

    def _render(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, *, generation: bool, where: str
    ) -> str:
        from jinja2 import TemplateError

        try:
            return self._tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=generation
            )
        except (TemplateError, ValueError, TypeError, KeyError) as exc:
            raise DataError(f"{where}: the chat template cannot render it: {exc}", "check roles and columns") from exc

    def _encode(self, text: str, *, trained: bool) -> tuple[list[int], list[bool]]:
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        return ids, [trained] * len(ids)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a jsonl file.

    Raises:
        DataError: naming file and line.
    """
    if not path.is_file():
        raise DataError(f"data file {path} does not exist", "check stages[].data, or name a function in `prepare`")
    rows = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as exc:
                raise DataError(f"{path}:{number} is not JSON: {exc}", "one JSON object a line") from exc
            if not isinstance(row, dict):
                raise DataError(f"{path}:{number} is not a JSON object", "one JSON object a line")
            rows.append(row)
    if not rows:
        raise DataError(f"{path} is empty", "it needs at least one row")
    return rows


def shared_prefix(rows: Sequence[SftRow]) -> np.ndarray:
    """The untrained beginning of more than half of the rows: a system message with its tools, most often. May be empty.

    Rows that start with it are packed as one group, and it is computed once for each micro-batch.
    """
    firsts: dict[bytes, list[np.ndarray]] = {}
    for row in rows:
        context = row.token_ids[: int(np.argmax(row.loss_mask))]
        if len(context) >= MIN_SHARED_PREFIX:
            firsts.setdefault(context[:MIN_SHARED_PREFIX].tobytes(), []).append(context)
    members = max(firsts.values(), key=len, default=[])
    if 2 * len(members) <= len(rows):
        return np.zeros(0, dtype=np.int64)
    length = min(len(context) for context in members)
    same = np.logical_and.reduce([context[:length] == members[0][:length] for context in members])
    return members[0][: length if same.all() else int(np.argmin(same))]
