"""The capacity model of `scale_model.py`: what an episode costs each part, and at how many GPUs a part is full.

Everything is linear: an episode costs each part a mean number of seconds, the GPUs of the trainer and of the engine are
divided so that both are busy all the time (the largest demand on everything else), and a part is full when the episodes
that the GPUs can do cost it a second a second.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from scale_costs import COSTS, Assumed, Model, Workload

CONNECTIONS = 28_232
"""Ports of one address for connections to one server (Linux, net.ipv4.ip_local_port_range); a request in flight takes
one. The server of a run takes as many."""

NODE_GPUS = 8

WAIT_SHARE = 0.1
"""Of the trainer's time: above it, waiting for the driver or for a publish counts as a limit."""


@dataclass(frozen=True)
class Sizes:
    """Tokens of a mean episode.

    Attributes:
        asked: prompt tokens of all its requests together: they grow with the square of the turns.
        new: prompt tokens that no request before had, which the engine computes.
    """

    turns: int
    asked: float
    new: float
    sampled: float
    length: float
    events: float

    @classmethod
    def of(cls, work: Workload, stream_tokens: int) -> Sizes:
        n, step = work.turns, work.sampled + work.observed
        new = work.prompt + (n - 1) * work.observed
        # An answer that fits into one event is not streamed.
        events = n * work.sampled / stream_tokens if 0 < stream_tokens < work.sampled else 0.0
        asked = n * work.prompt + step * n * (n - 1) / 2
        return cls(n, asked, new, n * work.sampled, new + n * work.sampled, events)


@dataclass(frozen=True)
class Gpus:
    """What an episode costs the GPUs, in GPU seconds.

    Attributes:
        slots: sequences that an engine's GPU decodes at once.
    """

    rollout_s: float
    train_s: float
    slots: float
    engine_tokens_s: float
    trainer_tokens_s: float

    @classmethod
    def of(cls, work: Workload, model: Model, assumed: Assumed) -> Gpus:
        sizes = Sizes.of(work, 0)
        context = sizes.asked / sizes.turns + work.sampled / 2
        weights = 2 * model.parameters
        room = 0.9 * assumed.memory_bytes * model.gpus - weights
        slots = min(assumed.running, room / (model.kv_bytes * context) / model.gpus)
        read = weights + slots * model.gpus * model.kv_bytes * context
        step_s = max(assumed.engine_step_s, read / (model.gpus * assumed.memory_share * assumed.memory_bytes_s))
        engine = assumed.engine_tokens_s or slots / step_s
        trainer = assumed.trainer_tokens_s or assumed.trainer_share * assumed.peak_flops / (6 * model.parameters)
        prefill = assumed.prefill_share * assumed.peak_flops / (2 * model.parameters)
        return cls(sizes.sampled / engine + sizes.new / prefill, sizes.length / trainer, slots, engine, trainer)

    @property
    def episode_s(self) -> float:
        return self.rollout_s + self.train_s


@dataclass(frozen=True)
class Cpu:
    """What an episode costs each process, in seconds of one core.

    Attributes:
        driver: all of the main process, threads included, with agent workers.
        serial: its share during which the ranks wait: they are sent a chunk after the one before is trained.
        worker: where the episode runs.
    """

    driver: float
    serial: float
    worker: float
    router: float

    @classmethod
    def of(cls, sizes: Sizes, assumed: Assumed) -> Cpu:
        def cost(name: str) -> float:
            return COSTS[name].seconds + sizes.length * COSTS[f"{name}_token"].seconds

        serial = cost("prepare") + cost("send") + cost("report")
        driver = COSTS["boundary"].seconds + serial + cost("signals") + assumed.traced * cost("trace")
        worker = (
            sizes.turns * COSTS["generation"].seconds
            + sizes.sampled * COSTS["generation_token"].seconds
            + sizes.asked * COSTS["client_prompt_token"].seconds
        )
        router = (
            sizes.turns * COSTS["request"].seconds
            + sizes.asked * COSTS["router_prompt_token"].seconds
            + sizes.sampled * COSTS["router_answer_token"].seconds
            + sizes.events * COSTS["event"].seconds
        )
        return cls(driver, serial, worker, router)


@dataclass(frozen=True)
class Publish:
    """Seconds until every replica serves a version.

    Attributes:
        broadcast: rank 0 gathers, hashes and sends each byte once, to all replicas at once (a ring).
        written: rank 0 writes, and a first reader reads, a folder.
        read_node: a further node reads it from the shared file system, whose bandwidth all readers share; the replicas
            of a node read it once, through its page cache.
    """

    broadcast: float
    written: float
    read_node: float

    @classmethod
    def of(cls, model: Model, assumed: Assumed) -> Publish:
        size = 2 * model.parameters
        sent = size * (COSTS["publish_byte"].seconds + 2 / assumed.network_bytes_s)
        return cls(sent, size * COSTS["folder_byte"].seconds, size / assumed.folder_bytes_s)

    def seconds(self, transport: str, nodes: float) -> float:
        return self.broadcast if transport == "broadcast" else self.written + self.read_node * max(0.0, nodes - 1)


@dataclass(frozen=True)
class Plan:
    """One workload, model and set of assumptions."""

    work: Workload
    model: Model
    assumed: Assumed

    @property
    def sizes(self) -> Sizes:
        return Sizes.of(self.work, self.assumed.stream_tokens)

    @property
    def gpus(self) -> Gpus:
        return Gpus.of(self.work, self.model, self.assumed)

    @property
    def cpu(self) -> Cpu:
        return Cpu.of(self.sizes, self.assumed)

    def demand(self, gpus: float) -> dict[str, float]:
        """Return the demand of this number of GPUs, when nothing else limits them."""
        sizes, rate = self.sizes, gpus / self.gpus.episode_s
        return {
            "episodes_s": rate,
            "requests_s": rate * sizes.turns,
            "sampled_tokens_s": rate * sizes.sampled,
            "trained_tokens_s": rate * sizes.length,
            # JSON of a token id takes about 7 bytes, of a sampled one with its logprob about 35.
            "router_bytes_s": rate * (7 * sizes.asked + 35 * sizes.sampled),
            "rank_bytes_s": rate * sizes.length * 13,  # int32 id, mask, float32 logprob and advantage
            "step_s": gpus * self.assumed.episodes_gpu / rate,
            "in_flight": rate * self.latency_s,
        }

    @property
    def latency_s(self) -> float:
        """Seconds of an episode without waiting: its share of GPUs that decode `slots` at once, and its tools."""
        return self.gpus.rollout_s * self.gpus.slots + (self.work.turns - 1) * self.work.tool_s

    def utilization(self, gpus: float) -> dict[str, float]:
        """Return how busy one process of each kind is; over 1: more than it can do."""
        rate, cpu = gpus / self.gpus.episode_s, self.cpu
        return {
            "driver alone": rate * (cpu.driver - COSTS["boundary"].seconds + cpu.worker),
            "driver": rate * cpu.driver,
            "worker": rate * cpu.worker,
            "router": rate * cpu.router,
        }

    def gpus_at(self, part: str, utilization: float) -> float:
        """Return the GPUs at which one process of a kind is so busy."""
        return utilization / self.utilization(1.0)[part]

    def needed(self, part: str, gpus: float) -> int:
        """Return the processes of a kind, none of them busier than the target."""
        return max(1, -int(-self.utilization(gpus)[part] // self.assumed.target))

    def ranks_wait_at(self) -> float:
        """Return the GPUs at which the trainer's ranks wait for the driver a tenth of the time."""
        ranks_s = self.gpus.episode_s / self.cpu.serial  # GPUs at which the driver takes as long as the ranks
        return ranks_s * WAIT_SHARE / (1 - WAIT_SHARE)

    def connections_at(self) -> float:
        """Return the GPUs at which requests in flight use up the connections of a router."""
        return CONNECTIONS / (self.demand(1.0)["in_flight"] * self._generating)

    @property
    def _generating(self) -> float:
        """Share of an episode's time in which a request of it is in flight."""
        return self.gpus.rollout_s * self.gpus.slots / self.latency_s

    def publish_share(self, gpus: float, episodes: float, transport: str) -> float:
        """Return the share of a step that publishing takes."""
        nodes = gpus * self.gpus.rollout_s / self.gpus.episode_s / NODE_GPUS
        seconds = Publish.of(self.model, self.assumed).seconds(transport, nodes)
        return seconds / (seconds + episodes * self.gpus.episode_s / gpus)

    def publish_at(self, episodes: float | None, transport: str, most: int = 1 << 20) -> float:
        """Return the GPUs at which publishing takes a tenth of a step.

        Args:
            episodes: of a step; None: `episodes_gpu` for each GPU.
            most: where the search ends, with infinity.
        """
        low, high = 1.0, float(most)
        share = lambda n: self.publish_share(n, episodes or n * self.assumed.episodes_gpu, transport)  # noqa: E731
        if share(high) < WAIT_SHARE:
            return float("inf")
        while high / low > 1.001:
            middle = (low * high) ** 0.5
            low, high = (low, middle) if share(middle) >= WAIT_SHARE else (middle, high)
        return high

    def throughput(
        self, gpus: float, *, workers: int, routers: int = 1, publish_s: float = 0.0, episodes: float | None = None
    ) -> Mapping[str, float]:
        """Return the episodes a second that each part allows; the least of them is the run's.

        Args:
            workers: agent workers.
            publish_s: seconds of a publish; the engine stands still as long.
            episodes: of a step.
        """
        costs, cpu = self.gpus, self.cpu
        batch = episodes or gpus * self.assumed.episodes_gpu
        step_s = costs.episode_s / gpus + publish_s / batch
        return {
            "engine": 1 / step_s,
            "trainer": 1 / (step_s + cpu.serial),
            "driver": 1 / cpu.driver,
            "worker": workers / cpu.worker,
            "router": routers / cpu.router,
        }
