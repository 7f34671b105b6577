"""The retrieval server: Search-R1's protocol, wrong requests, batches, caches, who may ask."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from tests.tools.search.support import PASSAGES, WordEncoder, silent, write_corpus
from tools.search.corpus import open_corpus
from tools.search.index.base import Hits
from tools.search.index.bm25 import Bm25Builder
from tools.search.index.building import build_index
from tools.search.index.dense import VectorsIndex
from tools.search.index.folder import Opened, open_folder
from tools.search.server.app import create_app
from tools.search.server.batching import Batcher
from tools.search.server.cache import Lru
from tools.search.server.service import Retrieval


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("index")
    build_index(write_corpus(folder / "c"), folder / "i", Bm25Builder(), progress=silent)
    return folder / "i"


def client_of(retrieval: Retrieval, host: str = "127.0.0.1", **options: Any) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(create_app(retrieval, **options))
    return httpx.AsyncClient(transport=transport, base_url=f"http://{host}:8000")


@pytest.fixture
async def server(index: Path) -> AsyncIterator[httpx.AsyncClient]:
    retrieval = Retrieval(open_folder(index))
    async with client_of(retrieval) as client:
        yield client
    await retrieval.close()


async def test_the_protocol_is_that_of_search_r1(server: httpx.AsyncClient) -> None:
    body = {"queries": ["lobbyist for Genentech", "cathedral 1488"], "topk": 2, "return_scores": True}
    answer = await server.post("/retrieve", json=body)
    assert answer.status_code == 200
    first, second = answer.json()["result"]
    assert first[0]["document"] == {"id": "4", "contents": '"Evan Morris"\n' + PASSAGES[4][1]}
    assert isinstance(first[0]["score"], float)
    assert [found["document"]["id"] for found in second] == ["0", "5"]
    assert second[0]["score"] > second[1]["score"]

    bare = (await server.post("/retrieve", json={**body, "return_scores": False})).json()["result"]
    assert bare[0][0] == first[0]["document"]
    plain = (await server.post("/retrieve", json={"queries": ["road closed in 1488"], "topk": None})).json()["result"]
    assert [found["id"] for found in plain[0]] == ["5", "0"]
    assert (await server.post("/retrieve", json={"queries": ["zzz"]})).json() == {"result": [[]]}


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "queries is not a list of texts"),
        ({"queries": []}, "queries is not a list of texts"),
        ({"queries": "text"}, "queries is not a list of texts"),
        ({"queries": ["a", 5]}, "queries is not a list of texts"),
        ({"queries": ["a"] * 1025}, "queries has 1025 texts"),
        ({"queries": ["a" * 10_001]}, "a query has 10001 characters"),
        ({"queries": ["a"], "topk": 0}, "topk is 0"),
        ({"queries": ["a"], "topk": 1001}, "topk is 1001"),
        ({"queries": ["a"] * 1000, "topk": 1000}, "1000 queries with topk 1000 are too many"),
        ({"queries": ["a"], "topk": True}, "topk is True"),
        ({"queries": ["a"], "topk": "3"}, "topk is '3'"),
        ({"queries": ["a"], "return_scores": "yes"}, "return_scores is 'yes'"),
        ({"queries": ["a"], "top_k": 3}, "the field 'top_k' is not known"),
    ],
)
async def test_a_wrong_request_is_named(server: httpx.AsyncClient, body: dict[str, Any], says: str) -> None:
    answer = await server.post("/retrieve", json=body)
    assert answer.status_code == 422
    assert says in answer.json()["error"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"queries": ["\xff"]}', b"[" * 100_000])
async def test_a_body_that_is_not_json_is_refused(server: httpx.AsyncClient, body: bytes) -> None:
    answer = await server.post("/retrieve", content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 422)
    assert (await server.get("/health")).json()["status"] == "ok"


async def test_a_huge_body_is_refused_before_it_is_read(server: httpx.AsyncClient) -> None:
    answer = await server.post("/retrieve", content=b"x" * (17 * 2**20), headers={"content-type": "application/json"})
    assert answer.status_code == 413


async def test_without_a_token_only_this_machine_is_answered(index: Path) -> None:
    retrieval = Retrieval(open_folder(index))
    async with client_of(retrieval, "evil.example") as client:
        assert (await client.post("/retrieve", json={"queries": ["a"]})).status_code == 403
    async with client_of(retrieval) as client:
        answer = await client.post("/retrieve", json={"queries": ["a"]}, headers={"origin": "http://evil.example"})
        assert answer.status_code == 403
        assert (
            await client.post("/retrieve", content=b"{}", headers={"content-type": "text/plain"})
        ).status_code == 415
    async with client_of(retrieval, "host.example", token="secret") as client:
        assert (await client.post("/retrieve", json={"queries": ["a"]})).status_code == 401
        assert (await client.get("/metrics")).status_code == 401
        assert (await client.get("/health")).status_code == 200
        right = {"authorization": "Bearer secret"}
        assert (await client.post("/retrieve", json={"queries": ["a"]}, headers=right)).status_code == 200
    await retrieval.close()


class Counting:
    """An index that counts its batches, and waits while `gate` is closed."""

    passages = len(PASSAGES)

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.gate = threading.Event()
        self.gate.set()

    def search(self, queries: Sequence[str], k: int) -> list[Hits]:
        self.gate.wait(10)
        self.batches.append(list(queries))
        if "fail" in queries:
            raise ValueError("broken")
        return [Hits(list(range(k))[: self.passages], [1.0] * min(k, self.passages)) for _ in queries]


async def until(condition: Any) -> None:
    while not condition():  # noqa: ASYNC110  # no event tells it
        await asyncio.sleep(0.001)


async def test_queries_that_wait_become_one_batch() -> None:
    index = Counting()
    batcher = Batcher(index, largest=64)
    index.gate.clear()
    first = batcher.submit("0", 3)
    await asyncio.sleep(0.01)
    others = [batcher.submit(str(number), 1 + number % 5) for number in range(1, 101)]
    others[4].cancel()
    index.gate.set()
    found = [await future for future in others if not future.cancelled()]
    assert [len(batch) for batch in index.batches] == [1, 63, 36]
    assert [len(hits.numbers) for hits in found[:4]] == [2, 3, 4, 5]
    assert (await first).numbers == [0, 1, 2]
    await batcher.close()


async def test_a_query_that_comes_as_the_last_batch_ends_is_answered() -> None:
    batcher = Batcher(Counting())
    second: asyncio.Future[asyncio.Future[Hits]] = asyncio.get_running_loop().create_future()
    batcher.submit("one", 1).add_done_callback(lambda _: second.set_result(batcher.submit("two", 1)))
    async with asyncio.timeout(10):
        await (await second)
    await batcher.close()


async def test_a_failing_batch_fails_its_queries_only() -> None:
    batcher = Batcher(Counting(), largest=1)
    good, bad, after = (batcher.submit(query, 1) for query in ("a", "fail", "b"))
    with pytest.raises(ValueError, match="broken"):
        await bad
    assert (await good).numbers == (await after).numbers == [0]
    await batcher.close()


async def test_caches_and_metrics(tmp_path: Path) -> None:
    index = Counting()
    retrieval = Retrieval(Opened(index, open_corpus(write_corpus(tmp_path / "c")), "dense"), cache_queries=2)
    async with client_of(retrieval) as client:
        index.gate.clear()
        same = [asyncio.create_task(client.post("/retrieve", json={"queries": ["same"]})) for _ in range(20)]
        await until(lambda: len(retrieval._in_flight) == 1)
        index.gate.set()
        assert len({(await answer).content for answer in same}) == 1
        assert index.batches == [["same"]]
        await client.post("/retrieve", json={"queries": ["same", "same"]})
        assert len(index.batches) == 1
        await client.post("/retrieve", json={"queries": ["b", "c"]})
        await client.post("/retrieve", json={"queries": ["same"]})
        assert [sorted(batch) for batch in index.batches] == [["same"], ["b"], ["c"], ["same"]] or len(
            index.batches
        ) == 3

        text = (await client.get("/metrics")).text
        assert 'search_requests_total{status="200"} 23.0' in text
        assert 'search_documents_total{source="corpus"} 3.0' in text
        assert "search_passages 6.0" in text and "search_batch_queries_count" in text
    await retrieval.close()


async def test_long_queries_take_the_place_of_several(tmp_path: Path) -> None:
    """100,000 queries of 10,000 characters would be gigabytes."""
    retrieval = Retrieval(Opened(Counting(), open_corpus(write_corpus(tmp_path / "c")), "bm25"), cache_queries=40)
    for number in range(50):
        await retrieval.retrieve([f"{number} " + "é" * 2_000], 1, False)
    assert 1 <= len(retrieval._queries) <= 3
    for number in range(50):
        await retrieval.retrieve([f"short {number}"], 1, False)
    assert len(retrieval._queries) == 40
    await retrieval.close()


async def test_a_failed_query_is_not_remembered(tmp_path: Path) -> None:
    index = Counting()
    retrieval = Retrieval(Opened(index, open_corpus(write_corpus(tmp_path / "c")), "bm25"))
    for _ in range(2):
        with pytest.raises(ValueError, match="broken"):
            await retrieval.retrieve(["fail"], 3, True)
    assert len(index.batches) == 2 and not retrieval._in_flight
    await retrieval.close()


async def test_a_caller_that_leaves_does_not_take_the_answer_from_others(tmp_path: Path) -> None:
    index = Counting()
    retrieval = Retrieval(Opened(index, open_corpus(write_corpus(tmp_path / "c")), "bm25"))
    index.gate.clear()
    leaving, staying = (asyncio.create_task(retrieval.retrieve(["q"], 1, False)) for _ in range(2))
    await asyncio.sleep(0.01)
    leaving.cancel()
    index.gate.set()
    assert len(orjson.loads(await staying)["result"][0]) == 1
    await retrieval.close()


async def test_too_many_waiting_queries_are_refused_with_retry_after(tmp_path: Path) -> None:
    index = Counting()
    retrieval = Retrieval(Opened(index, open_corpus(write_corpus(tmp_path / "c")), "bm25"))
    retrieval.batcher._most_waiting = 2
    index.gate.clear()
    async with client_of(retrieval) as client:
        waiting = asyncio.create_task(client.post("/retrieve", json={"queries": ["a"]}))
        await asyncio.sleep(0.05)
        answer = await client.post("/retrieve", json={"queries": ["b", "c", "d"]})
        assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
        index.gate.set()
        assert (await waiting).status_code == 200
    await retrieval.close()


async def test_a_broken_line_of_a_published_corpus_is_named(tmp_path: Path) -> None:
    corpus = tmp_path / "c"
    corpus.write_bytes(b'{"contents": "a"}\n{"broken"\n{"contents": "c"}\n')
    encoder = WordEncoder()
    vectors = VectorsIndex(encoder.encode(["a", "b", "c"], query=False), encoder)
    retrieval = Retrieval(Opened(vectors, open_corpus(corpus), "dense"))
    async with client_of(retrieval) as client:
        answer = await client.post("/retrieve", json={"queries": ["b"], "topk": 1})
        assert answer.status_code == 500 and "passage 1 is not JSON" in answer.json()["error"]
        assert (await client.post("/retrieve", json={"queries": ["a"], "topk": 1})).status_code == 200
    await retrieval.close()


def test_a_cache_keeps_what_was_used_last() -> None:
    cache: Lru[str, int] = Lru(10)
    cache.put("a", 1, 4)
    cache.put("b", 2, 4)
    assert cache.get("a") == 1
    cache.put("c", 3, 4)
    assert (cache.get("b"), cache.get("a"), cache.get("c"), cache.weight) == (None, 1, 3, 8)
    cache.put("a", 5, 1)
    assert (cache.get("a"), cache.weight) == (5, 5)
    cache.put("large", 6, 11)
    assert cache.get("large") is None and len(cache) == 2
    nothing: Lru[str, int] = Lru(0)
    nothing.put("a", 1)
    assert nothing.get("a") is None
