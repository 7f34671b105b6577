"""BM25: the formulas, bm25s's own index, ties, hostile queries."""

from __future__ import annotations

import math
import random
from collections import Counter
from pathlib import Path

import bm25s
import numpy as np
import pytest

from tests.tools.search.support import PASSAGES, silent, write_corpus
from tools.search.index import building
from tools.search.index.bm25 import DEFAULTS, Bm25Builder, Bm25Index, Formula, words_of
from tools.search.index.building import build_index


def plain_scores(passages: list[list[str]], query: list[str], formula: Formula) -> list[float]:
    """The formula of Pyserini's Lucene, or of rank_bm25's BM25Okapi, word by word."""
    k1, b = DEFAULTS[formula]
    counts = [Counter(words) for words in passages]
    total = len(passages)
    mean = sum(map(len, passages)) / total
    containing = Counter(word for count in counts for word in count)
    if formula == "lucene":
        idf = {word: math.log(1 + (total - n + 0.5) / (n + 0.5)) for word, n in containing.items()}
    else:
        idf = {word: math.log(total - n + 0.5) - math.log(n + 0.5) for word, n in containing.items()}
        floor = 0.25 * sum(idf.values()) / len(idf)
        idf = {word: floor if value < 0 else value for word, value in idf.items()}
    scores = []
    for words, count in zip(passages, counts, strict=True):
        score = 0.0
        for word in query:
            tf = count[word]
            part = idf.get(word, 0.0) * tf / (tf + k1 * (1 - b + b * len(words) / mean))
            score += part * (k1 + 1 if formula == "okapi" else 1)
        scores.append(score)
    return scores


@pytest.fixture(scope="module")
def generated() -> list[tuple[str, str]]:
    rng = random.Random(0)
    words = [f"w{number}" for number in range(300)]
    weights = [1 / (number + 1) for number in range(300)]
    return [
        (f"t{number}", " ".join(rng.choices(words, weights, k=rng.randint(1, 60)))) for number in range(400)
    ]  # fmt: skip


@pytest.mark.parametrize("formula", ["lucene", "okapi"])
def test_scores_are_those_of_the_formula(
    tmp_path: Path, generated: list[tuple[str, str]], formula: Formula, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "PART_PASSAGES", 64)  # several parts
    build_index(write_corpus(tmp_path / "c", generated), tmp_path / "i", Bm25Builder(formula), progress=silent)
    index = Bm25Index(tmp_path / "i")
    passages = [words_of(f"{title} {text}") for title, text in generated]
    rng = random.Random(1)
    for _ in range(40):
        query = rng.choices([word for words in passages for word in words], k=rng.randint(1, 6))
        expected = np.array(plain_scores(passages, query, formula))
        numbers, scores = index.search([" ".join(query)], 10)[0]
        np.testing.assert_allclose(scores, np.sort(expected)[::-1][: len(scores)], rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(scores, expected[numbers], rtol=2e-5, atol=1e-6)


def test_the_files_are_those_of_bm25s(tmp_path: Path) -> None:
    build_index(write_corpus(tmp_path / "c"), tmp_path / "i", Bm25Builder("lucene", 1.5, 0.75), progress=silent)
    ours = bm25s.BM25.load(str(tmp_path / "i"), show_progress=False)
    theirs = bm25s.BM25(k1=1.5, b=0.75, method="lucene")
    theirs.index([words_of(f"{title} {text}") for title, text in PASSAGES], show_progress=False)
    for query in ("cathedral 1488", "road highway", "the fort in oman"):
        words = words_of(query)
        np.testing.assert_allclose(ours.get_scores(words), theirs.get_scores(words), rtol=1e-5)


def test_words_and_no_words(tmp_path: Path) -> None:
    assert words_of("The Apollo 11 crew: Armstrong & Collins") == ["apollo", "11", "crew", "armstrong", "collins"]
    assert words_of("北京 Straße ﬁsh é") == ["北", "京", "straße", "fish", "é"]
    assert words_of("") == words_of("the of , !") == []
    assert words_of("a" * 1_000_000) == ["a" * 64]

    build_index(write_corpus(tmp_path / "c"), tmp_path / "i", Bm25Builder(), progress=silent)
    index = Bm25Index(tmp_path / "i")
    for query in ("", "the", "zzz", "\x00", "\ud800", "?" * 10_000):
        assert index.search([query], 3)[0] == ([], [])
    assert index.search(["genentech lobbyist " * 10_000], 3)[0].numbers == [4]
    assert len(index.search(["was"], 100)[0].numbers) == 0
    found = index.search(["in 1488"], 100)[0]
    assert sorted(found.numbers) == [0, 5]


def test_equal_scores_keep_the_order_of_the_corpus(tmp_path: Path) -> None:
    same = [("same", "words here")] * 50
    build_index(write_corpus(tmp_path / "c", same), tmp_path / "i", Bm25Builder(), progress=silent)
    assert Bm25Index(tmp_path / "i").search(["words"], 7)[0].numbers == list(range(7))


def test_a_corpus_without_a_word_has_an_index_that_finds_nothing(tmp_path: Path) -> None:
    build_index(write_corpus(tmp_path / "c", [("", "..."), ("", "")]), tmp_path / "i", Bm25Builder(), progress=silent)
    index = Bm25Index(tmp_path / "i")
    assert index.passages == 2 and index.search(["anything"], 3)[0].numbers == []
