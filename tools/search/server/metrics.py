"""What Prometheus reads of a retrieval server."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

LATENCIES_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "search_requests", "Requests to /retrieve, by status", ["status"], registry=self.registry
        )
        self.queries = Counter(
            "search_queries", "Queries, by where the answer came from", ["source"], registry=self.registry
        )
        self.documents = Counter(
            "search_documents", "Passages sent, by where they were read", ["source"], registry=self.registry
        )
        self.latency = Histogram(
            "search_request_seconds", "Duration of a request", buckets=LATENCIES_S, registry=self.registry
        )
        self.batches = Histogram("search_batch_queries", "Queries in a batch", buckets=BATCHES, registry=self.registry)

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Add a number that is read when it is asked for."""
        Gauge(name, text, registry=self.registry).set_function(value)

    def text(self) -> bytes:
        return generate_latest(self.registry)
