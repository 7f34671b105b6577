"""The discrete-event simulation of `scale_model.py`: the pipeline of a run with queues, long tails and publishes.

    worker -> router -> engine slot -> router -> worker -> tool ... -> driver -> step: driver, ranks ... -> publish

Each station serves in order of arrival; a station is one or several processes of one core. Groups are admitted and
trained as `trainer/rollouts/producer.py` and `trainer/run/step.py` do: a step's groups in their order, the next step's
admitted when a version is served, `max_staleness` steps ahead. Equal seeds give equal runs.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from scale_capacity import Plan
from scale_costs import COSTS

Then = Callable[[], None]

GROUP = 8
MICRO_BATCH_TOKENS = 8192
"""`trainer.tokens_per_micro_batch` by default: the tokens of each rank in a chunk."""

PIECES = 2
"""Jobs of the router into which the streamed events of an answer are gathered, over the time of its decoding."""

SLICE = 64
"""Episodes of a trace that are written in one piece: the thread gives the interpreter back in between."""

SIGMA = 0.8
"""Of the lognormal lengths of turns; a fifth of its variance belongs to the episode. The longest of 10,000 is 14 times
the mean."""


def _nothing() -> None:
    pass


class Clock:
    """Events in the order of their time, and then of their making."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events = 0
        self._heap: list[tuple[float, int, Then]] = []
        self._numbers = itertools.count()

    def after(self, seconds: float, then: Then) -> None:
        heapq.heappush(self._heap, (self.now + seconds, next(self._numbers), then))

    def run(self) -> None:
        while self._heap:
            self.now, _, then = heapq.heappop(self._heap)
            self.events += 1
            then()


class Station:
    """Processes with one queue, first come, first served.

    Attributes:
        busy_s: of all processes together.
        waits: seconds that each job waited before it was served.
    """

    def __init__(self, clock: Clock, processes: int) -> None:
        self._clock = clock
        self._free = processes
        self._queue: deque[tuple[float, float, Then, Then]] = deque()
        self.processes = processes
        self.busy_s = 0.0
        self.waits: list[float] = []

    def ask(self, seconds: float, then: Then, begun: Then = _nothing) -> None:
        """Serve a job that takes `seconds`, then go on.

        Args:
            begun: called when its turn has come.
        """
        if self._free:
            self._free -= 1
            self._begin(self._clock.now, seconds, then, begun)
        else:
            self._queue.append((self._clock.now, seconds, then, begun))

    def _begin(self, asked: float, seconds: float, then: Then, begun: Then) -> None:
        self.waits.append(self._clock.now - asked)
        self.busy_s += seconds
        begun()
        self._clock.after(seconds, lambda: self._end(then))

    def _end(self, then: Then) -> None:
        if self._queue:
            self._begin(*self._queue.popleft())
        else:
            self._free += 1
        then()


class Engine(Station):
    """The slots of all replicas. A publish stops all of them for its time: `stall`."""

    def __init__(self, clock: Clock, slots: int) -> None:
        super().__init__(clock, slots)
        self.stalled_s = 0.0

    def stall(self, seconds: float) -> None:
        self.stalled_s += seconds

    def _begin(self, asked: float, seconds: float, then: Then, begun: Then) -> None:
        self.waits.append(self._clock.now - asked)
        self.busy_s += seconds
        begun()
        seen = self.stalled_s

        def end() -> None:
            nonlocal seen
            if self.stalled_s > seen:  # a stall meanwhile: its time is added at the end
                more, seen = self.stalled_s - seen, self.stalled_s
                self._clock.after(more, end)
                return
            self._end(then)

        self._clock.after(seconds, end)


@dataclass
class Result:
    """What a simulated run did.

    Attributes:
        rate: episodes a second over the steps between the first two and the last.
        trained: how often each episode was trained.
        share: how busy the processes of each kind were, over the same time.
        waits: seconds that jobs waited, sorted, by station.
    """

    rate: float
    trained: list[int]
    finished: int
    share: dict[str, float]
    waits: dict[str, list[float]]
    stale: int
    events: int

    def wait(self, station: str, quantile: float) -> float:
        values = self.waits[station]
        return values[min(len(values) - 1, int(quantile * len(values)))]


@dataclass
class Run:
    """A run to simulate.

    Args:
        gpus: of engine and trainer together, divided as in the capacity model.
        groups: of a step, 8 episodes each.
        publish_s: seconds of a publish.
    """

    plan: Plan
    gpus: float
    groups: int
    steps: int
    workers: int
    routers: int = 1
    drivers: int = 1
    publish_s: float = 0.0
    staleness: int = 1
    seed: int = 0
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        costs = self.plan.gpus
        share = costs.rollout_s / costs.episode_s
        self.ranks_tokens_s = self.gpus * (1 - share) * costs.trainer_tokens_s
        self.chunk_tokens = MICRO_BATCH_TOKENS * max(1, round(self.gpus * (1 - share)))
        self.slots = max(1, round(self.gpus * share * costs.slots))
        # A GPU that decodes several sequences gives each its part.
        self.slot_s = self.slots / (self.gpus * share)
        self.driver = Station(self.clock, self.drivers)
        self.worker = Station(self.clock, self.workers)
        self.router = Station(self.clock, self.routers)
        self.engine = Engine(self.clock, self.slots)
        self.random = random.Random(self.seed)
        self.admitted = 0
        self.version = 0
        self.stale = 0
        self.missing = [GROUP] * (self.groups * self.steps)
        self.tokens = [0.0] * (self.groups * self.steps)
        self.trained = [0] * (self.groups * self.steps * GROUP)
        self.finished = 0
        self.begun: list[int] = [0] * (self.groups * self.steps)  # version at admission
        self.next = 0
        self.waiting = False
        self.marks: list[tuple[float, dict[str, float]]] = []

    def simulate(self) -> Result:
        """Run all steps to the end."""
        self._admit()
        self._take([], 0.0)
        self.clock.run()
        stations = {"driver": self.driver, "worker": self.worker, "router": self.router, "engine": self.engine}
        # The first steps fill the pipeline, and the last one runs while it empties.
        (begin, before), (end, after) = self.marks[1], self.marks[-2]
        share = {
            name: (after[name] - before[name]) / (end - begin) / station.processes for name, station in stations.items()
        }
        episodes = (len(self.marks) - 3) * self.groups * GROUP
        waits = {name: sorted(station.waits) for name, station in stations.items()}
        return Result(
            episodes / (end - begin), self.trained, self.finished, share, waits, self.stale, self.clock.events
        )

    # -- rollout --------------------------------------------------------------------------------------

    def _admit(self) -> None:
        limit = min(len(self.missing), (self.version + self.staleness + 1) * self.groups)
        while self.admitted < limit:
            group = self.admitted
            self.admitted += 1
            self.begun[group] = self.version
            for _ in range(GROUP):
                _Episode(self, group).turn()

    def arrived(self, group: int, tokens: float) -> None:
        """Count a finished episode; go on with training if it was waited for."""
        self.finished += 1
        self.missing[group] -= 1
        self.tokens[group] += tokens
        if self.waiting and group == self.next and not self.missing[group]:
            self.waiting = False
            self._take(*self._chunk)

    # -- training -------------------------------------------------------------------------------------

    def _take(self, chunk: list[int], tokens: float) -> None:
        """Take finished groups in their order until a chunk is full, then train it."""
        last = (self.version + 1) * self.groups - 1
        while True:
            if self.missing[self.next]:
                self.waiting, self._chunk = True, (chunk, tokens)
                return
            chunk.append(self.next)
            tokens += self.tokens[self.next]
            self.next += 1
            if tokens >= self.chunk_tokens or self.next > last:
                break
        count = len(chunk) * GROUP
        seconds = sum(
            count * COSTS[name].seconds + tokens * COSTS[f"{name}_token"].seconds for name in ("prepare", "send")
        )
        self.driver.ask(seconds, lambda: self.clock.after(tokens / self.ranks_tokens_s, lambda: self._done(chunk)))

    def _done(self, chunk: list[int]) -> None:
        for group in chunk:
            self.stale = max(self.stale, self.version - self.begun[group])
            for episode in range(group * GROUP, (group + 1) * GROUP):
                self.trained[episode] += 1
        if self.next < (self.version + 1) * self.groups:
            self._take([], 0.0)
            return
        self.engine.stall(self.publish_s)
        self.clock.after(self.publish_s, self._published)

    def _published(self) -> None:
        self.version += 1
        self._admit()
        count, tokens = self.groups * GROUP, sum(self.tokens[self.next - self.groups : self.next])

        def seconds(name: str) -> float:
            return count * COSTS[name].seconds + tokens * COSTS[f"{name}_token"].seconds

        self.driver.ask(seconds("report"), self._reported)
        in_threads = seconds("signals") + self.plan.assumed.traced * seconds("trace")
        pieces = max(1, count // SLICE)

        def write(left: int) -> None:
            if left:
                self.driver.ask(in_threads / pieces, lambda: write(left - 1))

        write(pieces)

    def _reported(self) -> None:
        busy = {"driver": self.driver.busy_s, "worker": self.worker.busy_s, "router": self.router.busy_s}
        self.marks.append((self.clock.now, {**busy, "engine": self.engine.busy_s}))
        if self.version < self.steps:
            self._take([], 0.0)


class _Episode:
    """One episode on its way."""

    def __init__(self, run: Run, group: int) -> None:
        self._run, self._group = run, group
        self._left = run.plan.work.turns
        self._length = float(run.plan.work.prompt)
        self._new = self._length
        # The mean of exp(normal(-s^2/2, s)) is 1.
        own = SIGMA * 0.2**0.5
        self._factor = run.random.lognormvariate(-own * own / 2, own)

    def turn(self) -> None:
        """Sample a turn: render and ask, decode, read the answer."""
        run, work = self._run, self._run.plan.work
        spread = SIGMA * 0.8**0.5
        sampled = work.sampled * self._factor * run.random.lognormvariate(-spread * spread / 2, spread)
        prompt, new = self._length, self._new
        self._length += sampled
        self._left -= 1

        half = COSTS["generation"].seconds / 2
        asking = half + prompt * COSTS["client_prompt_token"].seconds
        reading = half + sampled * COSTS["generation_token"].seconds
        request = COSTS["request"].seconds + prompt * COSTS["router_prompt_token"].seconds
        answer = sampled * COSTS["router_answer_token"].seconds

        slot_s = self._slot_s(new, sampled)

        def decode() -> None:
            run.engine.ask(slot_s, answered, streaming)

        def streaming() -> None:
            every = run.plan.assumed.stream_tokens
            if 0 < every < sampled:
                events = sampled / every * COSTS["event"].seconds / PIECES
                for piece in range(PIECES):
                    run.clock.after(slot_s * (piece + 1) / (PIECES + 1), lambda: run.router.ask(events, _nothing))

        def answered() -> None:
            run.router.ask(answer, lambda: run.worker.ask(reading, self._after_turn))

        run.worker.ask(asking, lambda: run.router.ask(request, decode))

    def _slot_s(self, new: float, sampled: float) -> float:
        costs, sizes = self._run.plan.gpus, self._run.plan.sizes
        prefill = (costs.rollout_s - sizes.sampled / costs.engine_tokens_s) / sizes.new
        return (sampled / costs.engine_tokens_s + new * prefill) * self._run.slot_s

    def _after_turn(self) -> None:
        run, work = self._run, self._run.plan.work
        if self._left:
            self._length += work.observed
            self._new = float(work.observed)
            run.clock.after(work.tool_s * run.random.expovariate(1.0), self.turn)
            return
        run.driver.ask(COSTS["boundary"].seconds, lambda: run.arrived(self._group, self._length))
