"""`Encoder`: texts to vectors, with an encoder of the e5, bge or sentence-transformers kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from agentloop.errors import ConfigError
from agentloop.model_folder import ModelFolder, load_pretrained
from agentloop.model_folder.files import read_json

Vectors = npt.NDArray[np.float32]
Pooling = Literal["mean", "cls"]

PREFIXES: dict[str, tuple[str, str]] = {
    "e5": ("query: ", "passage: "),
    "bge": ("Represent this sentence for searching relevant passages: ", ""),
}
"""Family -> what is written before a query and before a passage, as it was trained."""

POOLING_FILE = "1_Pooling/config.json"
"""Where sentence-transformers says how the vectors of tokens become one."""

FILES = ("*.json", "*.safetensors", "*.txt", "*.model", POOLING_FILE)

LONGEST = 256
"""Tokens of a text at most, or the model's own limit: passages of a hundred words have 150."""

BATCH_TOKENS = 16_384
"""Tokens of one forward pass, padding included: bounds its memory."""


class TextEncoder(Protocol):
    """What a dense index needs of an encoder."""

    @property
    def size(self) -> int: ...

    def encode(self, texts: Sequence[str], *, query: bool) -> Vectors:
        """Return unit vectors, [texts, size]."""
        ...


class Encoder:
    """A transformers encoder.

    Args:
        name: a folder in the Hugging Face layout, or a hub id.
        pooling: None: what the folder says, else `mean` (e5), or `cls` for bge.
        device: of torch.
        prefixes: before a query and before a passage; None: those of the family in the name.

    Raises:
        ModelError: the model cannot be loaded. Code that a folder brings is never run.
    """

    def __init__(
        self,
        name: str,
        *,
        pooling: str | None = None,
        device: str = "cpu",
        prefixes: tuple[str, str] | None = None,
    ) -> None:
        import torch
        from transformers import AutoModel, AutoTokenizer

        folder = ModelFolder.resolve(name, FILES, key="--encoder")
        family = next((known for known in PREFIXES if known in str(name).lower().rsplit("/", 1)[-1]), None)
        self.prefixes = prefixes or PREFIXES.get(family or "", ("", ""))
        self.pooling: Pooling = _pooling(folder, pooling, family)
        self._torch = torch
        self._tokenizer = load_pretrained(AutoTokenizer, str(folder.path), "the tokenizer")
        self._model = load_pretrained(AutoModel, str(folder.path), "the encoder", dtype=torch.float32)
        self._model.to(device).eval()
        if device != "cpu":
            self._model.half()
        self._device = device
        self._longest = min(LONGEST, folder.context_length or LONGEST)

    @property
    def size(self) -> int:
        return int(self._model.config.hidden_size)

    def encode(self, texts: Sequence[str], *, query: bool) -> Vectors:
        """Return unit vectors, [texts, size]. Texts of similar length share a forward pass."""
        prefix = self.prefixes[0] if query else self.prefixes[1]
        # A lone surrogate cannot be encoded.
        clean = [(prefix + text).encode("utf-8", "replace").decode() for text in texts]
        ids: list[list[int]] = self._tokenizer(clean, truncation=True, max_length=self._longest)["input_ids"]
        vectors = np.zeros((len(texts), self.size), np.float32)
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        begin = 0
        while begin < len(order):
            end = begin + 1
            while end < len(order) and (end + 1 - begin) * len(ids[order[end]]) <= BATCH_TOKENS:
                end += 1
            rows = order[begin:end]
            vectors[rows] = self._forward([ids[row] for row in rows])
            begin = end
        return vectors

    def _forward(self, ids: list[list[int]]) -> Vectors:
        torch = self._torch
        batch = self._tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(self._device)
        with torch.inference_mode():
            hidden_BTC = self._model(**batch).last_hidden_state
            if self.pooling == "cls":
                pooled_BC = hidden_BTC[:, 0]
            else:
                mask_BT1 = batch["attention_mask"].unsqueeze(-1).to(hidden_BTC.dtype)
                pooled_BC = (hidden_BTC * mask_BT1).sum(1) / mask_BT1.sum(1).clamp(min=1)
            unit: Any = torch.nn.functional.normalize(pooled_BC.float(), dim=-1)
        return np.asarray(unit.cpu().numpy(), np.float32)


def _pooling(folder: ModelFolder, given: str | None, family: str | None) -> Pooling:
    if given is not None:
        if given not in ("mean", "cls"):
            raise ConfigError(f"--pooling is {given!r}", "one of: mean, cls")
        return "cls" if given == "cls" else "mean"
    file = folder.path / POOLING_FILE
    if file.is_file():
        return "cls" if read_json(file).get("pooling_mode_cls_token") else "mean"
    return "cls" if family == "bge" else "mean"
