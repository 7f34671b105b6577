"""`/metrics`: plain integer counters, rendered in Prometheus' format only on request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from rollout_server.router.router import Router

_COUNTERS = {
    "prompt_tokens": "prompt tokens of accepted requests",
    "cached_tokens": "prompt tokens whose keys and values were reused",
    "prefilled_tokens": "tokens put into the KV cache by prefill, recomputation included",
    "sampled_tokens": "tokens sampled",
    "finished": "generations that ended by stop or length",
    "failed": "generations that the engine failed",
    "aborted": "generations that were aborted",
    "preempted": "running requests that lost their cache because it was full",
    "steps": "engine steps",
    "step_failures": "engine steps that raised",
    "weight_updates": "policy versions loaded",
    "weight_update_s": "seconds spent loading them",
}
_GAUGES = {
    "running": "requests that have a row of the KV cache",
    "waiting": "requests in the queue",
    "kv_tokens": "KV cache memory in use, in tokens",
    "kv_tokens_max": "KV cache budget, in tokens",
}


CLIENT_LEFT = 499
"""Counted as the status of requests whose client left before the answer."""


class Metrics(Collector):
    """The server's metrics."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self._requests: Counter[int] = Counter()
        self._seconds = 0.0
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def count_request(self, status: int, seconds: float = 0.0) -> None:
        """Count one answer of `/generate`."""
        self._requests[status] += 1
        self._seconds += seconds

    def render(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        requests = CounterMetricFamily("rollout_requests", "answers of /generate", labels=["status"])
        for status, count in self._requests.items():
            requests.add_metric([str(status)], count)
        yield requests
        yield CounterMetricFamily(
            "rollout_request_seconds", "wall time of answers with status 200", value=self._seconds
        )

        router = self._router
        for name, text, value in (
            ("resent", "requests sent to another replica because theirs died", router.resent),
            ("resent_kept_tokens", "sampled tokens that these requests kept", router.resent_kept_tokens),
            ("sessions_moved", "sessions that left their replica", router.moved),
        ):
            yield CounterMetricFamily(f"rollout_{name}", text, value=value)

        yield GaugeMetricFamily("rollout_under_way", "requests accepted and not yet answered", value=router.in_flight)
        fenced = CounterMetricFamily("rollout_fenced", "how often a replica was fenced", labels=["replica"])
        for member in router.members:
            fenced.add_metric([member.name], member.fenced)
        yield fenced

        all_stats = [(member.name, member.stats()) for member in router.members]
        for kind, names in ((CounterMetricFamily, _COUNTERS), (GaugeMetricFamily, _GAUGES)):
            for name, text in names.items():
                family = kind(f"rollout_{name}", text, labels=["replica"])
                for replica, stats in all_stats:
                    family.add_metric([replica], getattr(stats, name))
                yield family

        state = GaugeMetricFamily("rollout_replica", "replicas by state", labels=["replica", "state", "version"])
        for member in router.members:
            paused = member.serves and member.stats().paused
            name = "failed" if member.failure else "paused" if paused else member.state
            state.add_metric([member.name, name, member.weight_version], 1)
        yield state
