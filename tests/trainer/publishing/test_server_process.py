"""The server's process: its token, and what happens when it is killed while it starts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from agentloop.config import ModelConfig, RolloutConfig
from agentloop.errors import ServerStartError
from agentloop.launch import local
from agentloop.runtime.child import ChildKilled
from trainer.publishing import server_process
from trainer.publishing.server_process import TOKEN_VARIABLE, ServerProcess


class FakeChild:
    """A server that serves at once, or is killed before."""

    killed = 0
    """Number of the next starts that are killed."""
    environments: list[dict[str, str]] = []  # noqa: RUF012  # of all starts, for the test

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], log_file: Path) -> None:
        self.environments.append(dict(environment))
        self._settings = json.loads(Path(command[command.index("--settings") + 1]).read_text())
        self.pid, self.code, self.stopped = 1, None, False
        self.end: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        children.append(self)

    async def until_ready(self, ready: Callable[[], Awaitable[bool]], timeout_s: float, **_: Any) -> None:
        if FakeChild.killed:
            FakeChild.killed -= 1
            raise ChildKilled("the rollout server ended with code -9 before it served", "see the log")
        Path(self._settings["ready_file"]).write_text(json.dumps({"url": "http://127.0.0.1:31000"}))

    async def ended(self) -> int:
        return await self.end

    async def stop(self) -> None: ...

    def log_tail(self) -> str:
        return "    its last line"


children: list[FakeChild] = []


@pytest.fixture
def process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ServerProcess]:
    monkeypatch.setattr(local, "Child", FakeChild)
    monkeypatch.setattr(server_process, "FIRST_BACKOFF_S", 0.0)
    FakeChild.killed, FakeChild.environments = 0, []
    children.clear()

    def make(**rollout: Any) -> ServerProcess:
        return ServerProcess(
            model_path="m", model=ModelConfig(path="m"), rollout=RolloutConfig(**rollout), seed=1,
            log_file=tmp_path / "server.log", weights_roots=[], on_restart=lambda _: None,
        )  # fmt: skip

    return make


async def test_a_server_has_a_random_token_that_is_in_its_environment_only(
    process: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    first, second = process(), process()
    await first.start(0, None)
    assert len(first.token) > 30 and first.token != second.token
    assert FakeChild.environments[0][TOKEN_VARIABLE] == first.token
    for file in tmp_path.iterdir():
        assert first.token not in file.read_text()
    await first.stop()
    assert process(token="mine").token == "mine"


async def test_a_server_that_is_killed_while_it_starts_is_started_again(process: Callable[..., ServerProcess]) -> None:
    server = process(max_restarts=3)
    FakeChild.killed = 2
    assert await server.start(0, None) == "http://127.0.0.1:31000"
    assert server.restarts == 2
    # Later it dies, and its next start is killed as well.
    FakeChild.killed = 1
    assert server.died is not None
    children[-1].end.set_result(-9)
    with pytest.raises(ServerStartError, match=r"(?s)died 4 times, last while it started.*its last line"):
        await asyncio.wait_for(server.died, 10)
    assert len({environment[TOKEN_VARIABLE] for environment in FakeChild.environments}) == 1
    await server.stop()


async def test_more_kills_than_restarts_end_the_start(process: Callable[..., ServerProcess]) -> None:
    server = process(max_restarts=1)
    FakeChild.killed = 2
    with pytest.raises(ServerStartError, match="died 2 times"):
        await server.start(0, None)
