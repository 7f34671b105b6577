"""A sandbox server that is killed under episodes, and a run that is killed under its sandboxes."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from agentloop.agent.runner import EpisodeRunner
from agentloop.agent.tool_agent import ToolAgent
from agentloop.chat import ChatRenderer, load_tokenizer
from agentloop.config import AgentConfig, SamplingConfig
from agentloop.testing import FakeGenerator
from agentloop.tool.session import Toolset
from agentloop.types import EpisodeStatus, Task, Trajectory
from tools.code import CodeInterpreter

SMALL = ("--warm", "1", "--max-running", "4", "--memory-mb", "192", "--session-idle-s", "2")


pytestmark = pytest.mark.usefixtures("bubblewrap")


class Server:
    """`agentloop sandbox serve` on one port."""

    def __init__(self, folder: Path) -> None:
        # A killed server leaves its folder.
        self._environment = {**os.environ, "TMPDIR": str(folder)}
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.port = int(sock.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "agentloop", "sandbox", "serve", "--port", str(self.port), *SMALL]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=self._environment
        )
        assert self.process.stdout is not None
        assert self.url in self.process.stdout.readline()

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            assert self.process.stdout is not None
            self.process.stdout.close()
            self.process = None

    async def wait_for(self, what: Callable[[dict[str, Any]], bool], cells: int = 0) -> None:
        """Wait until `cells` cells of sessions have succeeded, and `/health` is as wanted."""
        done = f'sandbox_programs_total{{language="session",outcome="Success"}} {cells}.0'
        deadline = time.monotonic() + 60
        health: dict[str, Any] = {}
        while time.monotonic() < deadline:
            async with httpx.AsyncClient() as client:
                text = (await client.get(f"{self.url}/metrics")).text
                health = (await client.get(f"{self.url}/health")).json()
            if what(health) and (not cells or done in text):
                return
            await asyncio.sleep(0.02)
        raise AssertionError(health)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    found = Server(tmp_path)
    found.start()
    yield found
    found.kill()


@pytest.fixture(scope="module")
def renderer(quickstart_model: Path) -> ChatRenderer:
    return ChatRenderer(load_tokenizer(str(quickstart_model)))


def tool_of(server: Server, **config: Any) -> CodeInterpreter:
    return CodeInterpreter({"sandbox_url": server.url, **config}, CodeInterpreter.default_schema)


async def printed_42(task: Task, text: str, trajectory: Trajectory) -> float:
    shown = [message["content"] for message in trajectory.messages if message["role"] == "tool"]
    return float(bool(shown) and shown[-1] == "42")


async def episode(renderer: ChatRenderer, tool: CodeInterpreter, programs: Sequence[str], **limits: Any) -> Trajectory:
    """Run an episode that calls the tool with one program after another."""
    calls = [json.dumps({"name": tool.name, "arguments": {"code": program}}) for program in programs]
    texts = [*[f"<tool_call>\n{call}\n</tool_call><|im_end|>" for call in calls], "done<|im_end|>"]
    encode = renderer.tokenizer.backend_tokenizer.encode
    turns = [encode(text, add_special_tokens=False).ids for text in texts]
    runner = EpisodeRunner(
        renderer=renderer,
        generator=FakeGenerator(turns, stop_ids=frozenset({renderer.end_of_turn})),
        agents={"tool_agent": ToolAgent},
        toolset=Toolset([tool]),
        reward=printed_42,
        context_length=8192,
        limits={"tool_agent": AgentConfig(max_response_tokens=8000, max_assistant_turns=9, **limits)},
    )
    task = Task("0", "tool_agent", [{"role": "user", "content": "Compute."}])
    sampling = SamplingConfig(max_new_tokens=2000)
    return (await runner.run(task, group_id="g", sample_index=0, sampling=sampling, seed=0))[-1]


SLOW = "import time\ntime.sleep(0.3)\nprint(6 * 7)"


async def test_programs_of_a_killed_sandbox_run_again(server: Server, renderer: ChatRenderer) -> None:
    """Six episodes: programs that ran, programs that waited, and calls that found nobody."""
    tool = tool_of(server)
    running = [asyncio.create_task(episode(renderer, tool, [SLOW, SLOW], episode_timeout_s=30)) for _ in range(6)]
    await server.wait_for(lambda health: health["running"] == 4)
    server.kill()
    await asyncio.sleep(0.5)
    await asyncio.to_thread(server.start)
    for trajectory in await asyncio.gather(*running):
        assert (trajectory.status, trajectory.reward, trajectory.error) == (EpisodeStatus.OK, 1.0, None)
        assert trajectory.metrics["tool_errors"] == 0


async def test_an_episode_whose_variables_are_lost_is_not_scored(server: Server, renderer: ChatRenderer) -> None:
    wait = "import os, time\nif 'x' in globals(): time.sleep(60)\n"
    begun = wait + "x = 41"
    use = wait + "print(x + 1)"
    tool, told = tool_of(server, stateful=True), tool_of(server, stateful=True, on_failure="tell")
    running = [
        asyncio.create_task(episode(renderer, tool, [begun, use])),
        asyncio.create_task(episode(renderer, told, [begun, use])),
        asyncio.create_task(episode(renderer, tool, ["import time\ntime.sleep(2.5)\nprint(6 * 7)"])),
    ]
    await server.wait_for(lambda health: health["sessions"] == 3 and health["running"] == 3, cells=2)
    server.kill()
    await asyncio.to_thread(server.start)
    lost, tell, fresh = await asyncio.gather(*running)
    assert (lost.status, lost.reward) == (EpisodeStatus.FAILED, None)
    assert f"code_interpreter at {server.url}/run_code has lost the variables of an episode" in str(lost.error)
    assert (tell.status, tell.reward) == (EpisodeStatus.OK, 0.0)
    assert "[the interpreter was restarted: variables of earlier calls are gone]" in str(tell.messages)
    assert "NameError" in str(tell.messages)
    assert fresh.status is EpisodeStatus.OK, "it had none yet"


async def test_a_sandbox_that_stays_away_is_named_and_nothing_is_scored(
    server: Server, renderer: ChatRenderer, caplog: pytest.LogCaptureFixture
) -> None:
    tool = tool_of(server, outage_s=0.5)
    running = [asyncio.create_task(episode(renderer, tool, [SLOW, SLOW])) for _ in range(6)]
    await server.wait_for(lambda health: health["running"] == 4)
    server.kill()
    for trajectory in await asyncio.gather(*running):
        assert (trajectory.status, trajectory.reward) == (EpisodeStatus.FAILED, None)
        assert f"ToolUnavailable: code_interpreter at {server.url}/run_code has been unavailable" in str(
            trajectory.error
        )
        assert "last error: ConnectError" in str(trajectory.error)
        away = [span for span in trajectory.spans if span.attributes.get("unavailable")]
        assert [span.attributes["tool"] for span in away] == ["code_interpreter"]
    said = [record.getMessage() for record in caplog.records if record.name == "tools.http.service"]
    assert len(said) == 1 and "is away (ConnectError" in said[0] and "0.5 s at most" in said[0]


RUN = """
import asyncio, sys
from agentloop.types import Task
from tools.code import CodeInterpreter

async def main():
    config = {"sandbox_url": sys.argv[1], "stateful": True, "timeout": 3}
    tool = CodeInterpreter(config, CodeInterpreter.default_schema)
    idle, busy = [await tool.open(Task("0", "a", [])) for _ in range(2)]
    await tool.execute(idle, {"code": "import subprocess\\nchild = subprocess.Popen(['sleep', '600'])"})
    await tool.execute(busy, {"code": "x = 1"})
    work = asyncio.create_task(tool.execute(busy, {"code": "import os, time\\nos.fork()\\ntime.sleep(600)"}))
    alone = asyncio.create_task(
        CodeInterpreter({"sandbox_url": sys.argv[1]}, CodeInterpreter.default_schema).execute(
            await tool.open(Task("1", "a", [])), {"code": "import os, time\\nos.fork()\\ntime.sleep(600)"}
        )
    )
    print("calls", flush=True)
    await asyncio.gather(work, alone)

asyncio.run(main())
"""


def test_nothing_is_left_in_the_sandbox_of_a_run_that_was_killed(server: Server) -> None:
    """Its connections break, which ends programs; a session ends with its cell's time limit and with its lease."""
    with subprocess.Popen([sys.executable, "-c", RUN, server.url], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "calls\n"
        asyncio.run(server.wait_for(lambda health: health["sessions"] == 2 and health["running"] == 2))
        run.kill()
    asyncio.run(server.wait_for(lambda health: health["sessions"] == health["running"] == 0 and health["idle"] == 1))
    assert server.process is not None
    sleeping = [p for p in psutil.Process(server.process.pid).children(recursive=True) if "sleep" in p.name()]
    assert sleeping == []
