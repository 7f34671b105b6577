"""A real encoder, all-MiniLM-L6-v2: fetched, and its neighbours make sense to a reader."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agentloop.errors import ModelError
from recipes.search.encoder import write_encoder
from tools.search.encoder import Encoder
from tools.search.index.building import build_index
from tools.search.index.dense import DenseBuilder, Kind
from tools.search.index.folder import open_folder

pytestmark = pytest.mark.real

NEIGHBOURS = {
    "an Italian church whose construction took centuries": {"Pavia Cathedral"},
    "a corporate lobbyist for the pharmaceutical industry": {"Evan Morris"},
    "nineteenth century scholar of native languages": {"Horatio Hale"},
    "colonial fortress in Arabia": {"Dibba Al-Hisn"},
    "a Japanese horror movie with a monster": {"Ao Oni (film)"},
    "friendly alien visits children": {"E.T. the Extra-Terrestrial"},
}
"""Questions that share few words with the passage that answers them."""


@pytest.fixture(scope="module")
def encoder(repo: Path) -> Path:
    folder = Path(os.environ.get("AGENTLOOP_REAL_ENCODER", repo / "outputs/models/all-minilm-l6-v2"))
    try:
        write_encoder(folder)
    except ModelError as exc:
        pytest.skip(f"all-MiniLM-L6-v2 cannot be fetched: {exc.message}")
    return folder


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
def test_neighbours_make_sense_to_a_reader(shared: Path, encoder: Path, tmp_path: Path, kind: Kind) -> None:
    made = Encoder(str(encoder))
    assert (made.size, made.pooling, made.prefixes) == (384, "mean", ("", ""))
    corpus = shared / "data/search_r1/corpus.jsonl"
    build_index(corpus, tmp_path / "i", DenseBuilder(made, str(encoder), kind), progress=lambda *_: None)
    opened = open_folder(tmp_path / "i")
    for query, hits in zip(NEIGHBOURS, opened.index.search(list(NEIGHBOURS), 1), strict=True):
        title = opened.corpus.document(hits.numbers[0])["contents"].split("\n")[0].strip('"')
        assert title in NEIGHBOURS[query] or any(title.startswith(name[:10]) for name in NEIGHBOURS[query]), query
