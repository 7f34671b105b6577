"""`Places`: how many episodes have a session with a server at a time."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Hashable
from weakref import WeakKeyDictionary

_numbers = itertools.count()
_held: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[Hashable, list[int]]] = WeakKeyDictionary()
"""By event loop and episode: the numbers of the servers with which it has a session."""


class Places:
    """Places of one server. Episodes wait for them in order of arrival.

    An episode that has a session with one server and waits for another's could wait for one that
    does the reverse, for ever. So servers have numbers, and only episodes whose sessions are all
    with servers of lower numbers wait; others get a place at once, even if it is one too many.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._number = next(_numbers)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._taken = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def enter(self, episode: Hashable) -> None:
        loop = asyncio.get_running_loop()
        if loop is not self._loop:  # tools outlive the event loop of a test or an evaluation
            self._loop, self._taken, self._waiting = loop, 0, deque()
        held = _held.setdefault(loop, {}).setdefault(episode, [])
        if self._taken < self._most or any(number >= self._number for number in held):
            self._taken += 1
        else:
            turn: asyncio.Future[None] = loop.create_future()
            self._waiting.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._release()
                if not held:
                    _held[loop].pop(episode, None)
                raise
        _held[loop].setdefault(episode, held).append(self._number)

    def leave(self, episode: Hashable) -> None:
        loop = asyncio.get_running_loop()
        held = _held.get(loop, {}).get(episode)
        if loop is not self._loop or held is None or self._number not in held:
            return
        held.remove(self._number)
        if not held:
            del _held[loop][episode]
        self._release()

    def _release(self) -> None:
        self._taken -= 1
        while self._waiting and self._taken < self._most:
            turn = self._waiting.popleft()
            if not turn.done():
                self._taken += 1  # its place, before it runs
                turn.set_result(None)
