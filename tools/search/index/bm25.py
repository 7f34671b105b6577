"""BM25 over words: needs neither a GPU nor an encoder, and is less precise than a dense index.

bm25s keeps the score of each word in each passage, and a query adds up those of its words. Its own
`index()` holds the whole corpus as Python lists; here the same files are made part by part, so that
memory does not grow with the corpus (only the vocabulary does). `bm25s.BM25.load` reads them.

    score(q, d) = sum over the words t of q:  idf(t) * tf / (tf + k1 * (1 - b + b * |d| / mean |d|))

`lucene` (k1 0.9, b 0.4 as Pyserini has it): idf = ln(1 + (N - n + 0.5) / (n + 0.5)), N passages, n
with t. `okapi` (k1 1.5, b 0.75 as rank_bm25 has it): idf = ln((N - n + 0.5) / (n + 0.5)), a
negative one replaced by a quarter of the mean idf, and the whole times k1 + 1.
(Robertson & Zaragoza 2009, "The Probabilistic Relevance Framework", equation 3.15; Kamphuis et al.
2020, "Which BM25 Do You Mean?", table 1.)
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import orjson

from tools.search.index.arrays import new_array, save_array
from tools.search.index.base import Hits, library
from tools.search.index.building import Arrays, Parts, Progress

Formula = Literal["lucene", "okapi"]

DEFAULTS: dict[Formula, tuple[float, float]] = {"lucene": (0.9, 0.4), "okapi": (1.5, 0.75)}
"""k1 and b."""

OKAPI_FLOOR = 0.25

LONGEST_WORD = 64
MOST_QUERY_WORDS = 512

_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+")

STOP_WORDS = frozenset(
    [
        "a",
        "an",
        "and",
        "are",
        "as",
        "at",
        "be",
        "but",
        "by",
        "for",
        "if",
        "in",
        "into",
        "is",
        "it",
        "no",
        "not",
        "of",
        "on",
        "or",
        "such",
        "that",
        "the",
        "their",
        "then",
        "there",
        "these",
        "they",
        "this",
        "to",
        "was",
        "will",
        "with",
    ]
)
"""Lucene's English list."""

VOCABULARY, DATA, INDICES, INDPTR, PARAMS = (
    "vocab.index.json", "data.csc.index.npy", "indices.csc.index.npy", "indptr.csc.index.npy", "params.index.json",
)  # fmt: skip
"""bm25s's own names."""


def words_of(text: str) -> list[str]:
    """Return the words of a text that count, in order.

    Case and the form of Unicode characters do not matter. Chinese and Japanese characters are a
    word each, since nothing separates words there.

    >>> words_of("The Apollo 11 crew: Armstrong & Collins")
    ['apollo', '11', 'crew', 'armstrong', 'collins']
    """
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return [word[:LONGEST_WORD] for word in _WORD.findall(text.lower()) if word not in STOP_WORDS]


class Bm25Builder:
    """Makes a BM25 index. See `building.Builder`."""

    kind = "bm25"

    def __init__(self, formula: Formula = "lucene", k1: float | None = None, b: float | None = None) -> None:
        library("bm25s")  # report that it is missing before hours of work
        self.formula = formula
        self.k1, self.b = (
            given if given is not None else default for given, default in zip((k1, b), DEFAULTS[formula], strict=True)
        )
        self.options: dict[str, Any] = {"formula": formula, "k1": self.k1, "b": self.b}
        self._vocabulary: dict[str, int] = {}

    def part(self, texts: list[str]) -> Arrays:
        """Return the postings of a part: each word of each passage once, with its count."""
        vocabulary = self._vocabulary
        known = len(vocabulary)
        ids: list[int] = []
        lengths = np.zeros(len(texts), np.int32)
        for row, text in enumerate(texts):
            words = words_of(text)
            lengths[row] = len(words)
            ids += [vocabulary.setdefault(word, len(vocabulary)) for word in words]

        size = max(1, len(vocabulary))
        rows = np.repeat(np.arange(len(texts), dtype=np.int64), lengths)
        keys, counts = np.unique(rows * size + np.array(ids, np.int64), return_counts=True)
        rows, found = np.divmod(keys, size)
        fresh = "\n".join(list(vocabulary)[known:])  # a word has no line end
        return {
            "words": found.astype(np.int32),
            "rows": rows.astype(np.int32),
            "counts": counts.astype(np.int32),
            "lengths": lengths,
            "fresh": np.frombuffer(fresh.encode(), np.uint8),
        }

    def resume(self, arrays: Arrays) -> None:
        fresh = arrays["fresh"].tobytes().decode()
        for word in fresh.split("\n") if fresh else ():
            self._vocabulary.setdefault(word, len(self._vocabulary))

    def finish(self, parts: Parts, folder: Path, progress: Progress) -> dict[str, Any]:
        size, passages = len(self._vocabulary), parts.passages
        frequency, total = np.zeros(size, np.int64), 0
        for _, arrays in parts.arrays():
            frequency += np.bincount(arrays["words"], minlength=size)
            total += int(arrays["lengths"].sum(dtype=np.int64))
        idf = self._idf(frequency, passages)
        mean_length = total / passages or 1.0

        # The passages of word t are at `indptr[t]` to `indptr[t + 1]`, ascending.
        indptr = np.concatenate([[0], np.cumsum(frequency)]).astype(np.int64)
        postings = int(indptr[-1])
        data = new_array(folder / DATA, np.float32, postings)
        indices = new_array(folder / INDICES, np.int32, postings)
        cursor = indptr[:-1].copy()
        for number, (part, arrays) in enumerate(parts.arrays(), 1):
            order = np.argsort(arrays["words"], kind="stable")
            words, rows = arrays["words"][order], arrays["rows"][order]
            tf = arrays["counts"][order].astype(np.float64)
            norm = self.k1 * (1 - self.b + self.b * arrays["lengths"][rows] / mean_length)

            begins = np.flatnonzero(np.diff(words, prepend=-1))
            sizes = np.diff(begins, append=len(words))
            places = cursor[words] + np.arange(len(words)) - np.repeat(begins, sizes)
            data[places] = idf[words] * tf / (tf + norm)
            indices[places] = part.first + rows
            cursor[words[begins]] += sizes
            progress("writing scores (parts)", number, len(parts.list))
        for array in (data, indices):
            if isinstance(array, np.memmap):
                array.flush()

        with (folder / INDPTR).open("wb") as file:
            save_array(file, indptr)
        (folder / VOCABULARY).write_bytes(orjson.dumps(self._vocabulary))
        params = {
            "k1": self.k1, "b": self.b, "delta": 0.5, "method": "lucene", "idf_method": "lucene", "dtype": "float32",
            "int_dtype": "int32", "num_docs": passages, "version": library("bm25s").__version__, "backend": "numpy",
        }  # fmt: skip
        (folder / PARAMS).write_bytes(orjson.dumps(params))
        return {"words": size, "postings": postings, "mean_length": mean_length}

    def _idf(self, frequency: npt.NDArray[np.int64], passages: int) -> npt.NDArray[np.float64]:
        odds = (passages - frequency + 0.5) / (frequency + 0.5)
        if self.formula == "lucene":
            return np.asarray(np.log1p(odds))
        idf = np.log(odds)
        floor = OKAPI_FLOOR * float(idf.mean()) if len(idf) else 0.0
        return np.asarray(np.where(idf < 0, floor, idf) * (self.k1 + 1))


class Bm25Index:
    """An index of `Bm25Builder`, mapped into memory. See `base.Index`."""

    def __init__(self, folder: Path) -> None:
        self._bm25 = library("bm25s").BM25.load(str(folder), mmap=True, show_progress=False)
        self._vocabulary: dict[str, int] = self._bm25.vocab_dict

    @property
    def passages(self) -> int:
        return int(self._bm25.scores["num_docs"])

    def search(self, queries: Sequence[str], k: int) -> list[Hits]:
        """Return passages with a word of the query; equal scores in the order of the corpus."""
        return [self._one(query, k) for query in queries]

    def _one(self, query: str, k: int) -> Hits:
        words = [self._vocabulary[word] for word in words_of(query)[:MOST_QUERY_WORDS] if word in self._vocabulary]
        if not words:
            return Hits([], [])

        scores = self._bm25.get_scores_from_ids(words)
        found = np.flatnonzero(scores > 0)  # most passages have none of the words
        if len(found) > k:
            # Not argpartition, which is slow where many scores are equal.
            least = np.partition(scores[found], -k)[-k]
            found = found[scores[found] >= least]
        best = found[np.lexsort((found, -scores[found]))][:k]
        return Hits(best.tolist(), scores[best].astype(float).tolist())
