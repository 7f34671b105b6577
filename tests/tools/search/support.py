"""Small corpora, and an encoder without a model."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import orjson

from tools.search.index.bm25 import words_of

PASSAGES = [
    ("Pavia Cathedral", "The cathedral was begun in 1488 under Cristoforo Rocchi."),
    ("Horatio Hale", "Hale was an ethnologist and studied languages of Polynesia."),
    ("Dibba Al-Hisn", "The Portuguese built a fort and a wall in Oman in 1648."),
    ("Ao Oni", "A game in which a blue monster hunts four friends through a mansion."),
    ("Evan Morris", "Morris was a lobbyist for Genentech and Roche in Washington."),
    ("Iowa Highway 17", "Highway 17 is a road; road works on the road closed the road in 1488."),
]


def write_corpus(path: Path, passages: Sequence[tuple[str, str]] = PASSAGES) -> Path:
    lines = [{"id": str(i), "contents": f'"{title}"\n{text}'} for i, (title, text) in enumerate(passages)]
    path.write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    return path


def silent(_what: str, _done: int, _total: int) -> None:
    """Progress that nobody sees."""


class WordEncoder:
    """A text is the sum of a random direction for each of its words."""

    def __init__(self, size: int = 64) -> None:
        self.size = size
        self.calls: list[int] = []

    def encode(self, texts: Sequence[str], *, query: bool) -> npt.NDArray[np.float32]:
        self.calls.append(len(texts))
        vectors = np.zeros((len(texts), self.size), np.float32)
        for row, text in enumerate(texts):
            for word in words_of(text):
                vectors[row] += np.random.default_rng(zlib.crc32(word.encode())).normal(size=self.size)
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
