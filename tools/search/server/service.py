"""`Retrieval`: the queries of a request, answered from the caches or the index."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import orjson

from agentloop.errors import DataError
from tools.search.corpus import Corpus
from tools.search.index.base import Hits, Index
from tools.search.index.folder import Opened
from tools.search.server.batching import Batcher
from tools.search.server.cache import Lru
from tools.search.server.metrics import Metrics

OVERHEAD_BYTES = 200
"""What a kept passage costs beside its text."""

SHORT_QUERY, SHORT_BYTES = 512, 64
"""Bytes of a query, with those of its hits, that counts as one in the cache; and bytes of a hit. A
longer one counts as several, so that the cache is bounded in bytes too."""


class _WithPages:
    """An index whose threads also read the pages of the passages that they find.

    The event loop then finds them in memory: a page that comes from a disk would stop it.
    """

    def __init__(self, index: Index, corpus: Corpus) -> None:
        self._index, self._corpus = index, corpus

    @property
    def passages(self) -> int:
        return self._index.passages

    def search(self, queries: Sequence[str], k: int) -> list[Hits]:
        found = self._index.search(queries, k)
        for number in {number for hits in found for number in hits.numbers}:
            if not number < len(self._corpus):  # numbers of its own, which faiss keeps on request
                raise DataError(
                    f"the index names passage {number}, and the corpus has {len(self._corpus)} from 0 on",
                    "build the index without numbers of its own, in the order of the corpus",
                )
            self._corpus.raw(number)
        return found


class Retrieval:
    """Answers queries with passages as JSON.

    Args:
        threads: batches at once; the encoder of a dense index uses several cores itself.
        cache_queries: queries whose passages are remembered; those of more than `SHORT_QUERY` bytes
            count as several.
        cache_bytes: passages that are kept as JSON.
    """

    def __init__(
        self,
        opened: Opened,
        *,
        threads: int = 1,
        largest_batch: int = 64,
        cache_queries: int = 100_000,
        cache_bytes: int = 256 * 2**20,
    ) -> None:
        self.opened = opened
        self.metrics = Metrics()
        self.batcher = Batcher(
            _WithPages(opened.index, opened.corpus),
            threads=threads if opened.kind == "bm25" else 1,
            largest=largest_batch,
            on_batch=self.metrics.batches.observe,
        )
        self._queries: Lru[tuple[str, int], Hits] = Lru(cache_queries)
        self._documents: Lru[int, bytes] = Lru(cache_bytes)
        self._in_flight: dict[tuple[str, int], asyncio.Future[Hits]] = {}
        self.metrics.watch("search_passages", "Passages in the index", lambda: opened.index.passages)
        self.metrics.watch("search_waiting", "Queries that wait for a batch", lambda: self.batcher.waiting)
        self.metrics.watch("search_cached_queries", "Queries that are remembered", lambda: len(self._queries))
        self.metrics.watch("search_cached_bytes", "Bytes of passages that are kept", lambda: self._documents.weight)

    async def retrieve(self, queries: Sequence[str], k: int, scores: bool) -> bytes:
        """Return `{"result": [...]}` as JSON: for each query its passages, best first.

        Args:
            scores: write `{"document": ..., "score": ...}` instead of the bare passages.

        Raises:
            Overloaded: too many queries wait.
            DataError: a line of the corpus is not a passage, or its file has changed.
        """
        found = await asyncio.gather(*[self._hits(query, k) for query in queries])
        lists = []
        for hits in found:
            documents = [self._document(number) for number in hits.numbers]
            if scores:
                documents = [
                    b'{"document":%b,"score":%b}' % (document, orjson.dumps(score))
                    for document, score in zip(documents, hits.scores, strict=True)
                ]
            lists.append(b"[%b]" % b",".join(documents))
        return b'{"result":[%b]}' % b",".join(lists)

    async def _hits(self, query: str, k: int) -> Hits:
        key = (query, k)
        hits = self._queries.get(key)
        if hits is not None:
            self.metrics.queries.labels("cache").inc()
            return hits

        future = self._in_flight.get(key)
        if future is None or future.cancelled():
            future = self._in_flight[key] = self.batcher.submit(query, k)
            future.add_done_callback(lambda done: self._keep(key, done))
            self.metrics.queries.labels("index").inc()
        else:
            self.metrics.queries.labels("joined").inc()
        return await asyncio.shield(future)  # others may wait for the same query

    def _keep(self, key: tuple[str, int], done: asyncio.Future[Hits]) -> None:
        if self._in_flight.get(key) is done:
            del self._in_flight[key]
        if not done.cancelled() and done.exception() is None:
            hits = done.result()
            size = len(key[0]) * (1 if key[0].isascii() else 4) + SHORT_BYTES * len(hits.numbers)
            self._queries.put(key, hits, max(1, -(-size // SHORT_QUERY)))

    def _document(self, number: int) -> bytes:
        kept = self._documents.get(number)
        if kept is None:
            kept = orjson.dumps(self.opened.corpus.document(number))
            self._documents.put(number, kept, len(kept) + OVERHEAD_BYTES)
            self.metrics.documents.labels("corpus").inc()
        else:
            self.metrics.documents.labels("cache").inc()
        return kept

    async def close(self) -> None:
        await self.batcher.close()
        self.opened.corpus.close()
