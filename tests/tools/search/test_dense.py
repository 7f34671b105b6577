"""Dense indexes: flat against numpy, ivf and hnsw, published files, wrong encoders."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from agentloop.errors import ConfigError, DataError, ModelError
from tests.tools.search.support import PASSAGES, WordEncoder, silent, write_corpus
from tools.search.encoder import Encoder
from tools.search.index import building, dense, folder
from tools.search.index.building import build_index
from tools.search.index.dense import DenseBuilder, Kind, VectorsIndex
from tools.search.index.folder import DenseOptions, open_folder, open_published
from tools.search.server.service import Retrieval


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> WordEncoder:
    """Stands for a model, whatever name is given."""
    made = WordEncoder()
    monkeypatch.setattr(dense, "Encoder", lambda *_, **__: made)
    return made


def many(count: int = 300) -> list[tuple[str, str]]:
    return [(f"t{number}", f"w{number} v{number % 17} u{number % 5}") for number in range(count)]


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
def test_an_index_finds_the_nearest_vectors(
    tmp_path: Path, encoder: WordEncoder, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "PART_PASSAGES", 64)
    monkeypatch.setattr(dense, "ROWS_AT_ONCE", 100)
    passages = many()
    corpus = write_corpus(tmp_path / "c", passages)
    build_index(corpus, tmp_path / "i", DenseBuilder(encoder, "e", kind), progress=silent)
    options = {"flat": {}, "ivf": {"nprobe": 64}, "hnsw": {"ef_search": 200}}
    opened = open_folder(tmp_path / "i", dense=DenseOptions(**options[kind]))
    for other in ({"nprobe": 64}, {"ef_search": 200}):
        if other != options[kind]:
            with pytest.raises(ConfigError, match=r"--(nprobe|ef-search) has no effect: .* is (not an|a flat)"):
                open_folder(tmp_path / "i", dense=DenseOptions(**other))
    assert opened.index.passages == 300

    vectors = encoder.encode([f'"{title}"\n{text}' for title, text in passages], query=False)
    queries = ["w7 v7", "u3 v11 w45", "t299"]
    expected = encoder.encode(queries, query=True) @ vectors.T
    for hits, scores in zip(opened.index.search(queries, 10), expected, strict=True):
        np.testing.assert_allclose(hits.scores, np.sort(scores)[::-1][:10], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(hits.scores, scores[hits.numbers], rtol=1e-4, atol=1e-5)
    assert opened.index.search(["w7"], 1)[0].numbers == [7]


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
def test_a_corpus_smaller_than_what_is_asked_for(tmp_path: Path, encoder: WordEncoder, kind: Kind) -> None:
    build_index(write_corpus(tmp_path / "c"), tmp_path / "i", DenseBuilder(encoder, "e", kind), progress=silent)
    hits = open_folder(tmp_path / "i").index.search(["lobbyist genentech"], 100)[0]
    assert hits.numbers[0] == 4 and 1 <= len(hits.numbers) <= len(PASSAGES)
    assert -1 not in hits.numbers


def test_vectors_that_are_not_finite_have_no_place(tmp_path: Path, encoder: WordEncoder) -> None:
    def vectors(texts: Sequence[str], *, query: bool) -> Any:
        found = WordEncoder.encode(encoder, texts, query=query)
        found[["genentech" in text.lower() for text in texts]] = np.nan
        return found

    whole = VectorsIndex(vectors([text for _, text in PASSAGES], query=False), encoder)
    found = whole.search(["portuguese lobbyist"], len(PASSAGES))[0]
    assert 4 not in found.numbers and found.numbers[0] == 2
    assert min(found.numbers) >= 0 and np.isfinite(found.scores).all()

    encoder.encode = vectors  # type: ignore[method-assign]
    assert whole.search(["genentech"], 3)[0].numbers == []
    with pytest.raises(DataError, match='not finite of the passage \'"Evan Morris"'):
        build_index(write_corpus(tmp_path / "c"), tmp_path / "i", DenseBuilder(encoder, "e"), progress=silent)


def test_parts_of_a_flat_index_do_not_shift_what_was_not_found(
    encoder: WordEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "ROWS_AT_ONCE", 3)
    vectors = encoder.encode([text for _, text in PASSAGES], query=False)
    vectors[3:] = np.nan
    found = VectorsIndex(vectors, encoder).search(["portuguese cathedral languages"], 6)[0]
    assert sorted(found.numbers) == [0, 1, 2]


async def test_numbers_of_the_indexs_own_are_refused(tmp_path: Path, encoder: WordEncoder) -> None:
    corpus = write_corpus(tmp_path / "wiki.jsonl")
    index = faiss.IndexIDMap(faiss.IndexFlatIP(encoder.size))
    index.add_with_ids(encoder.encode([text for _, text in PASSAGES], query=False), np.arange(1, 7) * 1000)
    faiss.write_index(index, str(tmp_path / "own.index"))
    retrieval = Retrieval(open_published(tmp_path / "own.index", corpus, DenseOptions(encoder="e")))
    with pytest.raises(DataError, match=r"the index names passage \d000, and the corpus has 6 from 0 on"):
        await retrieval.retrieve(["portuguese"], 3, True)
    await retrieval.close()


def test_the_published_files_are_served_as_they_are(tmp_path: Path, encoder: WordEncoder) -> None:
    """`e5_Flat.index` is an IndexFlatIP, and `wiki-18.jsonl` lines with `id` and `contents`."""
    corpus = write_corpus(tmp_path / "wiki-18.jsonl")
    index = faiss.IndexFlatIP(encoder.size)
    index.add(encoder.encode([f'"{title}"\n{text}' for title, text in PASSAGES], query=False))
    faiss.write_index(index, str(tmp_path / "e5_Flat.index"))
    opened = open_published(tmp_path / "e5_Flat.index", corpus, DenseOptions(encoder="intfloat/e5-base-v2"))
    found = opened.index.search(["fort portuguese"], 2)[0]
    assert opened.corpus.document(found.numbers[0])["contents"].startswith('"Dibba Al-Hisn"\n')

    with pytest.raises(ConfigError, match="without a corpus"):
        open_published(tmp_path / "e5_Flat.index", None, DenseOptions(encoder="e"))
    with pytest.raises(ConfigError, match="--encoder"):
        open_published(tmp_path / "e5_Flat.index", corpus, DenseOptions())
    write_corpus(corpus, PASSAGES[:2])
    with pytest.raises(DataError, match=r"has 6 vectors, and .* has 2 passages"):
        open_published(tmp_path / "e5_Flat.index", corpus, DenseOptions(encoder="e"))
    encoder.size = 32
    with pytest.raises(ConfigError, match="vectors of 64 numbers, and the encoder makes 32"):
        open_published(tmp_path / "e5_Flat.index", corpus, DenseOptions(encoder="e"))


def test_a_flat_file_of_faiss_is_mapped_and_not_loaded(tmp_path: Path) -> None:
    index = faiss.IndexFlatIP(256)
    index.add(np.zeros((50_000, 256), np.float32))  # 51 MB
    faiss.write_index(index, str(tmp_path / "f"))
    program = (
        "import sys, pathlib; from tools.search.index.dense import open_faiss_file, DenseOptions\n"
        "class E: size = 256\n"
        "def anonymous(): return int(open('/proc/self/status').read().split('RssAnon:')[1].split()[0])\n"
        "import faiss; before = anonymous()\n"
        "index = open_faiss_file(pathlib.Path(sys.argv[1]), DenseOptions(), E())\n"
        "assert index.passages == 50_000; print(anonymous() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "f")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 20_000, "kB"


@pytest.mark.parametrize("content", [b"", b"not an index", b"IxFI" + bytes(100)])
def test_a_file_that_faiss_cannot_read_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "f").write_bytes(content)
    with pytest.raises((DataError, ConfigError), match=r"f cannot be read by faiss|the index has vectors of"):
        dense.open_faiss_file(tmp_path / "f", DenseOptions(), WordEncoder())


def test_a_gpu_that_is_not_there_is_named(tmp_path: Path, encoder: WordEncoder) -> None:
    if faiss.get_num_gpus():
        return
    build_index(write_corpus(tmp_path / "c"), tmp_path / "i", DenseBuilder(encoder, "e"), progress=silent)
    with pytest.raises(ConfigError, match="--gpu needs a GPU"):
        open_folder(tmp_path / "i", dense=DenseOptions(gpu=True))


def test_an_encoder_of_another_size_is_refused(tmp_path: Path, encoder: WordEncoder) -> None:
    build_index(write_corpus(tmp_path / "c"), tmp_path / "i", DenseBuilder(encoder, "e"), progress=silent)
    encoder.size = 32
    with pytest.raises(ConfigError, match="vectors of 64 numbers, and the encoder makes 32"):
        open_folder(tmp_path / "i", dense=DenseOptions(encoder="other"))


def test_vectors_may_be_given(encoder: WordEncoder) -> None:
    index = VectorsIndex(encoder.encode(["a1 b", "c d"], query=False), encoder)
    assert [hits.numbers for hits in index.search(["c", "b"], 1)] == [[1], [0]]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random encoder of a few thousand parameters with a word tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    out = tmp_path_factory.mktemp("encoder") / "tiny-e5"
    words = ["[PAD]", "[UNK]", "query", "passage", ":", *[f"w{number}" for number in range(50)]]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(out)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=40,
    )  # fmt: skip
    BertModel(config).save_pretrained(out)
    return out


def test_an_encoder_pools_and_normalizes_and_batches_do_not_matter(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    encoder = Encoder(str(bert))
    assert (encoder.prefixes, encoder.pooling) == (("query: ", "passage: "), "mean")
    texts = ["w1 w2 w3", "w4", "", "\ud800 w5", "w6 " * 500]
    vectors = encoder.encode(texts, query=True)
    assert vectors.shape == (5, 16)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)

    tokenizer, model = AutoTokenizer.from_pretrained(bert), AutoModel.from_pretrained(bert).eval()
    with torch.no_grad():
        hidden = model(**tokenizer("query: w1 w2 w3", return_tensors="pt")).last_hidden_state[0].mean(0)
    np.testing.assert_allclose(vectors[0], (hidden / hidden.norm()).numpy(), rtol=1e-4, atol=1e-5)

    monkeypatch.setattr("tools.search.encoder.BATCH_TOKENS", 1)
    np.testing.assert_allclose(encoder.encode(texts, query=True), vectors, rtol=1e-4, atol=1e-5)
    assert np.abs(encoder.encode(["w1"], query=False) - encoder.encode(["w1"], query=True)).max() > 1e-3
    assert Encoder(str(bert), pooling="cls").pooling == "cls"


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./none"])
def test_a_missing_encoder_is_named(name: str) -> None:
    with pytest.raises(ModelError, match="--encoder"):
        Encoder(name)


def test_an_encoder_that_brings_code_is_refused(bert: Path, tmp_path: Path) -> None:
    import json
    import shutil

    shutil.copytree(bert, tmp_path / "e")
    config: dict[str, Any] = json.loads((tmp_path / "e/config.json").read_text())
    config |= {"auto_map": {"AutoModel": "evil.Model", "AutoConfig": "evil.Config"}, "model_type": "evil"}
    (tmp_path / "e/config.json").write_text(json.dumps(config))
    (tmp_path / "e/evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ModelError):
        Encoder(str(tmp_path / "e"))


def test_the_folder_module_is_light() -> None:
    assert "torch" not in vars(folder) and "faiss" not in vars(folder)
