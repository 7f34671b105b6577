"""The event loop's lag is measured, and the function that blocks it is named."""

from __future__ import annotations

import asyncio
import gc
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from agentloop.runtime import lag
from agentloop.runtime.event_loop import run_loops
from agentloop.runtime.lag import COLLECTOR, MACHINE, WAITING, LoopLagMonitor
from agentloop.tool.function import FunctionTool
from agentloop.tool.session import Toolset
from agentloop.types import Task, ToolCall


async def blocks_the_loop(text: str) -> str:
    """A tool that sleeps where it should await.

    Args:
        text: anything
    """
    time.sleep(0.3)  # noqa: ASYNC251
    return text


async def call(toolset: Toolset) -> None:
    await toolset.session(Task("0", "a", [])).call(ToolCall("blocks_the_loop", {"text": "x"}), 10)


def calm(bound_s: float = 0.05) -> LoopLagMonitor:
    """Pretend that the machine is idle: tests run beside other processes."""
    return LoopLagMonitor(bound_s, waited_s=lambda: 0.0)


def measured(tool: Any) -> LoopLagMonitor:
    monitor = calm()

    async def main() -> None:
        with monitor:
            await asyncio.sleep(0.05)
            await asyncio.create_task(call(Toolset([tool])), name="group 7 sample 3")
            await asyncio.sleep(0.05)

    run_loops(main())
    return monitor


def test_a_tool_that_blocks_is_named_with_its_task() -> None:
    monitor = measured(FunctionTool(blocks_the_loop))
    culprit = next(found for found in monitor.culprits if "blocks_the_loop" in found.place)
    assert re.search(r"test_lag\.py:\d+ blocks_the_loop$", culprit.place)
    assert culprit.is_code and culprit.task == "group 7 sample 3" and culprit.worst_s >= 0.2
    assert monitor.take()["loop/lag_max_s"] >= 0.2
    assert culprit in monitor.new_culprits() and monitor.new_culprits() == []
    assert "blocked the event loop once" in str(culprit)


def test_the_same_tool_in_a_thread_is_no_culprit() -> None:
    def blocks_the_loop(text: str) -> str:
        """Sleeps.

        Args:
            text: anything
        """
        time.sleep(0.3)
        return text

    monitor = measured(FunctionTool(blocks_the_loop))
    assert not any("blocks_the_loop" in culprit.place for culprit in monitor.culprits)


def test_work_of_the_library_is_put_down_to_who_called_it() -> None:
    def sorts() -> None:
        end = time.monotonic() + 0.3
        while time.monotonic() < end:
            re.sub("(a|b)*c", "", "ab" * 14 + "d")

    monitor = calm()

    async def main() -> None:
        with monitor:
            await asyncio.sleep(0.05)
            asyncio.get_running_loop().call_soon(sorts)
            await asyncio.sleep(0.05)

    run_loops(main())
    culprit = next(found for found in monitor.culprits if "sorts" in found.place)
    assert culprit.task == "a callback"


@pytest.mark.parametrize("computes", [False, True])
def test_the_framework_is_named_only_where_it_computes(computes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting a process waits until the kernel has replaced the program: no code to fix."""
    monkeypatch.setattr(lag, "_OURS", (__file__,))

    def part_of_the_framework() -> None:
        end = time.monotonic() + 0.3
        while computes and time.monotonic() < end:
            pass
        if not computes:
            time.sleep(0.3)

    monitor = calm()

    async def main() -> None:
        with monitor:
            await asyncio.sleep(0.05)
            before = time.thread_time()
            asyncio.get_running_loop().call_soon(part_of_the_framework)
            await asyncio.sleep(0.05)
            spent.append(time.thread_time() - before)

    spent: list[float] = []
    run_loops(main())
    worst = monitor.culprits[0]
    if computes and spent[0] > 0.2:  # on a crowded machine it does not compute all the time
        assert "part_of_the_framework" in worst.place and worst.is_code
    if not computes:
        assert worst.place == WAITING and not worst.is_code


@pytest.mark.parametrize("file", [asyncio.futures.__file__, psutil.__file__])
def test_what_the_framework_calls_is_not_named_while_it_waits(file: str) -> None:
    """A machine that is short of memory stops the loop in whatever it runs: reading a process, a timer."""
    scope: dict[str, Any] = {"time": time}
    exec(compile("def looks_at_a_process(): time.sleep(0.3)", file, "exec"), scope)  # noqa: S102  # our own text
    monitor = calm()

    async def main() -> None:
        with monitor:
            await asyncio.sleep(0.05)
            asyncio.get_running_loop().call_soon(scope["looks_at_a_process"])
            await asyncio.sleep(0.05)

    run_loops(main())
    assert monitor.culprits[0].place == WAITING


def test_waiting_is_no_lag() -> None:
    monitor = LoopLagMonitor(30.0)

    async def main() -> None:
        with monitor:
            await asyncio.sleep(0.3)

    run_loops(main())
    assert monitor.culprits == []
    assert monitor.take()["loop/lag_max_s"] < 30.0
    assert monitor.take() == {"loop/lag_max_s": 0.0, "loop/lag_p99_s": 0.0}


@pytest.mark.parametrize("run", [run_loops, asyncio.run])
def test_an_idle_loop_stands_in_no_code(run: Any) -> None:
    monitor = LoopLagMonitor()
    seen: list[Any] = []

    async def main() -> None:
        with monitor:
            looker = threading.Thread(target=lambda: (time.sleep(0.2), seen.append(monitor._look())))
            looker.start()
            await asyncio.sleep(0.5)
            looker.join()

    run(main())
    assert seen == [None]


def test_a_collection_is_put_down_to_the_collector() -> None:
    monitor = calm()

    def collects() -> None:
        kept = [[number] for number in range(400_000)]
        end = time.monotonic() + 0.3
        while time.monotonic() < end:
            gc.collect()
        kept.clear()

    async def main() -> None:
        with monitor:
            await asyncio.sleep(0.05)
            asyncio.get_running_loop().call_soon(collects)
            await asyncio.sleep(0.05)

    run_loops(main())
    assert COLLECTOR in [culprit.place for culprit in monitor.culprits]
    assert monitor._on_collection not in gc.callbacks


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="Linux counts how long a thread waits for a core")
def test_a_machine_that_is_busy_is_no_fault_of_the_code() -> None:
    """Let the loop share one core with a computing process."""
    monitor = LoopLagMonitor(0.02)
    core = min(os.sched_getaffinity(0))
    rivals = [
        subprocess.Popen([sys.executable, "-c", f"import os; os.sched_setaffinity(0, {{{core}}})\nwhile 1: pass"])
        for _ in range(6)
    ]

    def computes() -> None:
        end = time.thread_time() + 0.2
        while time.thread_time() < end:
            pass

    async def main() -> None:
        with monitor:
            await asyncio.sleep(0.3)
            computes()
            await asyncio.sleep(0.1)

    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        run_loops(main())
    finally:
        os.sched_setaffinity(0, before)
        for rival in rivals:
            rival.kill()
            rival.wait()
    assert monitor.culprits[0].place == MACHINE and not monitor.culprits[0].is_code
