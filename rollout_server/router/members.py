"""The replicas of a router: which of them serve, and calls to all of these."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rollout_server.engines.base import EngineStats
from rollout_server.errors import ReplicaGone
from rollout_server.replica.base import Replica

log = logging.getLogger(__name__)

MemberState = Literal["serving", "starting", "fenced", "failed"]


@dataclass(eq=False)
class Member:
    """A place for a replica, and what the router knows about the replica in it.

    Attributes:
        replica: None until its first start.
        reason: the reason why it does not serve.
        in_flight: (rid, session) of each request it works on, by the number of the call.
        in_flight_tokens: prompt tokens plus new tokens of these requests.
        fenced: how often it was fenced.
        left: set while it is fenced.
    """

    name: str
    replica: Replica | None = None
    state: MemberState = "starting"
    reason: str = ""
    in_flight: dict[int, tuple[str, str | None]] = field(default_factory=dict)
    in_flight_tokens: int = 0
    fenced: int = 0
    left: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def serves(self) -> bool:
        return self.state == "serving"

    @property
    def started(self) -> Replica:
        """The replica of a started member, such as any serving member."""
        assert self.replica is not None, f"replica {self.name} has not been started"
        return self.replica

    @property
    def weight_version(self) -> str:
        return "" if self.replica is None else self.replica.weight_version

    @property
    def ranks(self) -> int:
        return 1 if self.replica is None else self.replica.ranks

    @property
    def failure(self) -> str | None:
        """The reason why it will never serve again, or None."""
        if self.state == "failed":
            return self.reason
        return None if self.replica is None else self.replica.failure

    def stats(self) -> EngineStats:
        return EngineStats() if self.replica is None else self.replica.stats()


class Members:
    """All replicas of a router, in a fixed order.

    Args:
        replicas: those that serve from the start. Others come by `add`, and serve once they are
            admitted.
    """

    def __init__(self, replicas: Sequence[Replica] = ()) -> None:
        self._members = [Member(replica.name, replica, "serving") for replica in replicas]
        self._changed = asyncio.Condition()

    def __iter__(self) -> Iterator[Member]:
        return iter(self._members)

    def __getitem__(self, index: int) -> Member:
        return self._members[index]

    def __len__(self) -> int:
        return len(self._members)

    def add(self, name: str) -> Member:
        """Add a place for a replica that is still to be started."""
        self._members.append(Member(name))
        return self._members[-1]

    @property
    def serving(self) -> list[Member]:
        return [member for member in self._members if member.serves]

    @property
    def failure(self) -> str | None:
        """The first member's failure if no member can ever serve again, else None."""
        failures = [member.failure for member in self._members]
        return failures[0] if failures and all(failures) else None

    async def remove(self, member: Member) -> None:
        """Take a place away; the requests of its replica are sent to others."""
        log.info("replica %s leaves; its %d requests go to other replicas", member.name, len(member.in_flight))
        self._members.remove(member)
        member.state, member.reason = "fenced", "the server has fewer replicas now"
        if member.replica is not None:
            await member.replica.close()
        member.left.set()
        await self.notify()

    async def admit(self, member: Member) -> None:
        """Let a replica that serves the current version take requests."""
        member.state, member.reason = "serving", ""
        member.left.clear()
        await self.notify()

    async def fence(self, member: Member, reason: str, state: MemberState = "fenced") -> None:
        """Stop sending requests to a replica; its requests in flight are sent to others."""
        if member.serves:
            member.fenced += 1
            log.error(
                "replica %s is fenced; its %d requests go to other replicas: %s",
                member.name, len(member.in_flight), reason,
            )  # fmt: skip
        member.state, member.reason = state, reason

        # Closing makes the requests that it still holds raise ReplicaGone: the router sends them
        # elsewhere.
        if member.replica is not None:
            await member.replica.close()
        member.left.set()
        await self.notify()

    async def each(self, call: Callable[[Replica], Awaitable[Any]]) -> list[Any]:
        """Call all serving replicas at once and return the answers. Fence those that do not answer.

        Raises:
            ServingError: the first error that another one raised.
        """
        members = self.serving
        results = await asyncio.gather(*(call(member.started) for member in members), return_exceptions=True)

        errors = []
        for member, result in zip(members, results, strict=True):
            if isinstance(result, ReplicaGone):
                await self.fence(member, str(result))
            elif isinstance(result, BaseException):
                errors.append(result)
        if errors:
            raise errors[0]
        return results

    async def notify(self) -> None:
        """Wake up all tasks that wait for a change."""
        async with self._changed:
            self._changed.notify_all()

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        """Return when `condition` holds; it is evaluated now and after each `notify`."""
        async with self._changed:
            await self._changed.wait_for(condition)

    async def close(self) -> None:
        await asyncio.gather(*(member.replica.close() for member in self._members if member.replica is not None))
