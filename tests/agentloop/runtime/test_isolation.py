"""Blocking functions run in threads that may be abandoned, or in processes that are killed."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from agentloop.config import RewardConfig
from agentloop.errors import CallFailed, ConfigError, FunctionHangs, ToolConfigError
from agentloop.registry import TOOLS
from agentloop.reward.loading import close_reward, load_reward
from agentloop.runtime.event_loop import run_loops
from agentloop.runtime.processes import ProcessWorkers
from agentloop.runtime.threads import MOST_ABANDONED, ThreadWorkers
from agentloop.tool.function import FunctionTool
from agentloop.tool.loading import load_toolset
from agentloop.tool.session import Toolset
from agentloop.trace.spans import Recorder
from agentloop.types import StopReason, Task, ToolCall, Trajectory, Turn

FUNCTIONS = '''
import os, signal, sys, time
from agentloop import ToolResult

def work(what: str, n: int = 0) -> str:
    """Do what the argument names.

    Args:
        what: what to do
        n: how much
    """
    if what == "pid": return str(os.getpid())
    if what == "traceparent":
        from agentloop.trace import traceparent
        return str(traceparent())
    if what == "hang": time.sleep(600)
    if what == "exit": os._exit(3)
    if what == "quit": raise SystemExit("bye")
    if what == "crash": os.kill(os.getpid(), signal.SIGSEGV)
    if what == "print":
        print("x" * n, flush=True)
        print("err", file=sys.stderr)
        return sys.stdin.read() + "printed"
    if what == "last words":
        print("out of cheese", file=sys.stderr, flush=True)
        os._exit(1)
    if what == "memory": return str(len(bytearray(n)))
    if what == "raise": raise ValueError("no such thing")
    if what == "result": return ToolResult("fine", reward=0.5, error="odd")
    if what == "set": return ToolResult("fine", metrics={"a": {1, 2}})
    if what == "threads": return os.environ["OMP_NUM_THREADS"]
    if what == "child":
        if (pid := os.fork()) == 0:
            time.sleep(600)
        print(pid, file=sys.stderr, flush=True)
        open(os.path.join(os.path.dirname(__file__), "child"), "w").write(str(pid))
        time.sleep(600)
    if what.startswith("daemon"):
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                file = os.path.join(os.path.dirname(__file__), "child")
                open(file + "~", "w").write(str(os.getpid()))
                os.rename(file + "~", file)
                time.sleep(600)
            os._exit(0)
        os.wait()
        while not os.path.exists(os.path.join(os.path.dirname(__file__), "child")): time.sleep(0.001)
        if what == "daemon, exit": os._exit(3)
        if what == "daemon, return": return "done"
        time.sleep(600)
    if what.startswith("junk"):  # as a program does that closes, or writes to, files which it did not open
        if what == "junk, child" and os.fork() != 0:
            os.wait()
            return "done"
        for file in range(3, 12):
            try: os.write(file, b"junk" * 100)
            except OSError: pass
        if what == "junk, child": os._exit(0)
        return "done"
    if what == "pipes":
        for file in map(int, os.listdir("/proc/self/fd")):
            if file > 11:
                try: os.write(file, (6).to_bytes(4) + b"no one")
                except OSError: pass
    if what == "count and crash":
        open(os.path.join(os.path.dirname(__file__), "calls"), "a").write("x")
        os.kill(os.getpid(), signal.SIGKILL)
    return what * (n or 1)

def alarm(task, text, trajectory):
    """Limit its own time with a signal, like math-verify: only the main thread may."""
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError("alarm")))
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        time.sleep(600)
    except TimeoutError:
        return {"score": 1.0, "turns": len(trajectory.turns), "truth": float(task.ground_truth == "ß")}

async def slow_score(task, text, trajectory):
    return float(len(text))

def nothing(task, text, trajectory):
    return object()

def numbers(task, text, trajectory):
    import numpy
    return {"score": numpy.float32(0.5), "nan": float("nan")}
'''


@pytest.fixture
def functions(tmp_path: Path) -> Path:
    path = tmp_path / "functions.py"
    path.write_text(FUNCTIONS)
    return path


@pytest.fixture
async def in_process(functions: Path) -> Any:
    pools = []

    def make(**options: Any) -> ProcessWorkers:
        options = {"workers": 1, "memory_mb": None, **options}
        pools.append(ProcessWorkers("functions.py:work", functions.parent, TOOLS, form="tool", name="work", **options))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()
    await asyncio.sleep(0.05)  # their pipes close


async def ask(pool: ProcessWorkers, what: str, n: int = 0) -> Any:
    return await pool({"arguments": {"what": what, "n": n}})


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


async def gone(pid: int) -> bool:
    for _ in range(500):
        if not lives(pid):
            return True
        await asyncio.sleep(0.01)
    return False


# -- threads


async def test_a_thread_serves_many_calls_and_hands_on_what_they_raise() -> None:
    seen = set()

    def work(n: int) -> int:
        seen.add(threading.get_ident())
        if n == 7:
            raise StopIteration("seven")
        return n

    pool = ThreadWorkers(work, workers=2, name="work")
    results = await asyncio.gather(*(pool(n) for n in range(64)), return_exceptions=True)
    assert results[:7] == list(range(7)) and results[8:] == list(range(8, 64))
    assert "seven" in str(results[7])
    assert len(seen) <= 2 and threading.get_ident() not in seen
    pool.close()


async def test_a_call_that_hangs_in_a_thread_holds_up_no_other() -> None:
    free = threading.Event()
    pool = ThreadWorkers(lambda wait: free.wait() if wait else "quick", workers=1, name="work")
    for _ in range(MOST_ABANDONED):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001):
                await pool(True)
        if _ == 0:
            assert await pool(False) == "quick"
    with pytest.raises(FunctionHangs, match="run_in: process"):
        await pool(False)
    free.set()  # those that come back are threads no more, and calls are taken again
    for _ in range(500):
        await asyncio.sleep(0.01)
        if not pool._abandoned:
            break
    assert await pool(False) == "quick"


def test_a_thread_that_hangs_does_not_keep_the_process() -> None:
    code = """
    import asyncio, time
    from agentloop.runtime.threads import ThreadWorkers
    async def main():
        pool = ThreadWorkers(time.sleep, workers=1, name="sleep")
        try:
            async with asyncio.timeout(0.05):
                await pool(600)
        except TimeoutError:
            print("left behind")
    asyncio.run(main())
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60, check=True
    )
    assert run.stdout == "left behind\n"


# -- processes


async def test_a_process_serves_many_calls(in_process: Any) -> None:
    pool = in_process(workers=2)
    pids = {(await ask(pool, "pid"))["text"] for _ in range(4)}
    assert len(pids) == 1 and pids != {str(os.getpid())}
    assert (await ask(pool, "Zürich 漢字 🙂"))["text"] == "Zürich 漢字 🙂"
    assert len((await ask(pool, "x", 1 << 19))["text"]) == 1 << 19
    assert (await ask(pool, "threads"))["text"] == "1"
    answers = await asyncio.gather(*(ask(pool, str(n)) for n in range(64)))
    assert [answer["text"] for answer in answers] == [str(n) for n in range(64)]


async def test_a_process_knows_the_span_of_its_call(in_process: Any) -> None:
    pool = in_process(workers=1)

    async def asked() -> Any:
        return (await pool({"arguments": {"what": "traceparent"}}))["text"]

    recorder = Recorder()
    with recorder, recorder.span("tool"):
        inside = await asked()
    assert inside == f"00-{recorder.trace_id}-{recorder.finish()[1].span_id}-01"
    assert await asked() == "None"  # not that of the call before


async def test_what_is_printed_and_read_does_not_disturb(in_process: Any) -> None:
    pool = in_process()
    assert (await ask(pool, "print", 1 << 18))["text"] == "printed"
    assert (await ask(pool, "a"))["text"] == "a"


async def test_a_call_that_is_cancelled_is_killed_with_all_that_it_started(in_process: Any, functions: Path) -> None:
    pool = in_process()
    pid = int((await ask(pool, "pid"))["text"])
    hanging = asyncio.create_task(ask(pool, "child"))
    said = functions.parent / "child"
    for _ in range(3000):
        if said.exists() and said.read_text():
            break
        await asyncio.sleep(0.01)
    hanging.cancel()
    with pytest.raises(asyncio.CancelledError):
        await hanging
    child = int(said.read_text())
    assert await gone(pid) and await gone(child)
    other = int((await ask(pool, "pid"))["text"])
    assert other != pid


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("what", ["junk", "junk, child"])
def test_what_a_function_writes_to_files_of_others_does_not_disturb(
    functions: Path, loop: str, what: str, capfd: pytest.CaptureFixture[str]
) -> None:
    async def main() -> None:
        pool = ProcessWorkers(
            "functions.py:work", functions.parent, TOOLS, form="tool", workers=1, memory_mb=None, name="work"
        )
        try:
            pid = (await ask(pool, "pid"))["text"]
            assert (await ask(pool, what))["text"] == "done"
            assert (await ask(pool, "pid"))["text"] == pid
        finally:
            pool.close()
            await asyncio.sleep(0.05)  # their pipes close

    (run_loops if loop == "uvloop" else asyncio.run)(main())
    assert capfd.readouterr().err == ""


@pytest.mark.skipif(sys.platform != "linux", reason="lists its descriptors")
async def test_an_answer_that_is_not_one_is_named_and_the_next_call_works(in_process: Any) -> None:
    pool = in_process()
    with pytest.raises(CallFailed, match="wrote something other than its answer to its pipe"):
        await ask(pool, "pipes")
    assert (await ask(pool, "a"))["text"] == "a"


async def daemon_of(functions: Path) -> int:
    """The process id that `work("daemon ...")` writes once its double fork is complete."""
    file = functions.parent / "child"
    for _ in range(3000):
        if file.exists():
            return int(file.read_text())
        await asyncio.sleep(0.01)
    raise AssertionError("no daemon was started")


@pytest.mark.skipif(sys.platform != "linux", reason="a subreaper is Linux's")
@pytest.mark.parametrize("what", ["daemon, hang", "daemon, exit", "daemon, return"])
async def test_a_daemon_ends_with_its_worker(in_process: Any, functions: Path, what: str) -> None:
    """`setsid` and a double fork leave the process group, but not the worker's keeper."""
    pool = in_process()
    call = asyncio.create_task(ask(pool, what))
    daemon = await daemon_of(functions)
    if what == "daemon, exit":
        with pytest.raises(CallFailed, match="exit code 3"):
            await call
        assert not lives(daemon)  # before the failure is reported
    elif what == "daemon, return":
        assert (await call)["text"] == "done"
        assert lives(daemon)  # as long as its worker
        pool.close()
    else:
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    assert await gone(daemon)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("noticed", [True, False])
def test_an_idle_worker_that_dies_loses_no_call(functions: Path, loop: str, noticed: bool) -> None:
    """The kernel kills processes for memory. The next call has not begun there: it runs in a new worker."""

    async def main() -> None:
        pool = ProcessWorkers(
            "functions.py:work", functions.parent, TOOLS, form="tool", workers=1, memory_mb=None, name="work"
        )
        try:
            pid = int((await ask(pool, "pid"))["text"])
            for _ in range(2):
                os.kill(pid, signal.SIGKILL)
                if noticed:
                    assert await gone(pid)
                    await asyncio.sleep(0.05)
                other = int((await ask(pool, "pid"))["text"])
                assert other != pid
                pid = other
        finally:
            pool.close()
            await asyncio.sleep(0.05)  # their pipes close

    if loop == "uvloop":
        run_loops(main())
    else:
        asyncio.run(main())


@pytest.mark.parametrize("deaths", [2, 3])
@pytest.mark.parametrize("when", ["while it starts", "before its call"])
async def test_a_new_worker_that_dies_loses_no_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str, deaths: int
) -> None:
    """Three workers in a row that die end the call; otherwise the next one does it."""
    mortal = deaths if when == "while it starts" else 0
    (tmp_path / "functions.py").write_text(
        textwrap.dedent(f'''
            import os, pathlib, signal
            starts = pathlib.Path(__file__).with_name("starts")
            with starts.open("a") as file:
                file.write("x")
            if len(starts.read_text()) <= {mortal}:
                os.kill(os.getpid(), signal.SIGKILL)

            def work() -> str:
                """Do it."""
                return "done"
        ''')
    )
    pool = ProcessWorkers("functions.py:work", tmp_path, TOOLS, form="tool", workers=1, memory_mb=None, name="work")
    start, killed = pool._start, 0
    started: list[Any] = []

    async def start_and_kill() -> Any:
        nonlocal killed
        process = await start()
        started.append(process._process)
        if killed < deaths - mortal:
            killed += 1
            keeper = psutil.Process(process._process.pid)
            victims = [*keeper.children(recursive=True), keeper]
            for victim in victims:
                victim.kill()
            assert not psutil.wait_procs(victims[:-1], timeout=60)[1]
        return process

    monkeypatch.setattr(pool, "_start", start_and_kill)
    try:
        if deaths < 3:
            assert (await pool({"arguments": {}}))["text"] == "done"
        else:
            with pytest.raises(CallFailed, match="the process of work was killed by SIGKILL"):
                await pool({"arguments": {}})
            assert (await pool({"arguments": {}}))["text"] == "done"
    finally:
        pool.close()
        for process in started:
            await process.wait()
        await asyncio.sleep(0.05)  # their pipes close


async def test_a_call_that_has_begun_is_not_repeated(in_process: Any, functions: Path) -> None:
    pool = in_process()
    assert (await ask(pool, "a"))["text"] == "a"
    with pytest.raises(CallFailed, match="was killed by SIGKILL"):
        await ask(pool, "count and crash")
    assert (functions.parent / "calls").read_text() == "x"


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("exit", "the process of work ended with exit code 3"),
        ("crash", "the process of work was killed by SIGSEGV"),
        ("last words", "exit code 1; its last output: out of cheese"),
        ("quit", "SystemExit: bye"),
        ("raise", "ValueError: no such thing"),
        ("set", "TypeError: the result holds set, which is not JSON"),
    ],
)
async def test_a_failure_is_named_and_the_next_call_works(in_process: Any, what: str, says: str) -> None:
    pool = in_process()
    with pytest.raises(CallFailed) as failed:
        await ask(pool, what)
    assert failed.value.message.startswith(says) or says in failed.value.message
    assert (await ask(pool, "a"))["text"] == "a"


async def test_memory_has_a_limit(in_process: Any) -> None:
    pool = in_process(memory_mb=1500)
    with pytest.raises(CallFailed, match="MemoryError"):
        await ask(pool, "memory", 2 << 30)
    assert (await ask(pool, "memory", 1 << 20))["text"] == str(1 << 20)


async def test_arguments_that_are_no_json_are_refused(in_process: Any) -> None:
    with pytest.raises(CallFailed, match="arguments of work are not JSON"):
        await in_process()({"arguments": {"what": object()}})


def test_processes_die_with_the_run(functions: Path) -> None:
    code = f"""
    import asyncio, os, signal
    from pathlib import Path
    from agentloop.runtime.processes import ProcessWorkers
    async def main():
        pool = ProcessWorkers("functions.py:work", Path({str(functions.parent)!r}), "agentloop.tools", form="tool",
                              workers=1, memory_mb=None, name="work")
        print((await pool({{"arguments": {{"what": "pid"}}}}))["text"], flush=True)
        asyncio.create_task(pool({{"arguments": {{"what": "daemon, hang"}}}}))
        while not Path({str(functions.parent / "child")!r}).exists():
            await asyncio.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    asyncio.run(main())
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60, check=False
    )
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert asyncio.run(gone(int(run.stdout)))
    assert asyncio.run(gone(int((functions.parent / "child").read_text())))


# -- tools and rewards


async def test_a_function_tool_in_a_process_is_killed_and_the_model_told(functions: Path) -> None:
    path = functions.parent / "tools.yaml"
    path.write_text("tools: [{class_name: functions.py:work, config: {run_in: process, workers: 1}}]\n")
    toolset = load_toolset(path)
    session = toolset.session(Task("0", "tool_agent", []))
    assert (await session.call(ToolCall("work", {"what": "result"}), 30)).reward == 0.5
    told = await session.call(ToolCall("work", {"what": "hang"}), 0.2)
    assert told.text == "Error: work took longer than 0.2 s and was stopped"
    told = await session.call(ToolCall("work", {"what": "exit"}), 30)
    assert told.text == "Error: the process of work ended with exit code 3"
    told = await session.call(ToolCall("work", {"what": "raise"}), 30)
    assert told.text == "Error: ValueError: no such thing"
    pid = int((await session.call(ToolCall("work", {"what": "pid"}), 30)).text)
    toolset.close()
    assert await gone(pid)


async def test_a_plain_function_runs_in_a_thread_or_inline() -> None:
    def where() -> str:
        """Report where it runs."""
        return threading.current_thread().name

    for run_in, name in (("thread", "agentloop where"), ("inline", threading.current_thread().name)):
        toolset = Toolset([FunctionTool(where, {"run_in": run_in})])
        result = await toolset.session(Task("0", "a", [])).call(ToolCall("where", {}), 10)
        assert result.text == name
        toolset.close()


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("{run_in: cloud}", "run_in is 'cloud'"),
        ("{workers: 0}", "workers is 0"),
        ("{worker: 1}", "unknown key 'worker'"),
    ],
)
def test_a_wrong_config_is_named(functions: Path, config: str, says: str) -> None:
    path = functions.parent / "tools.yaml"
    path.write_text(f"tools: [{{class_name: functions.py:work, config: {config}}}]\n")
    with pytest.raises(ToolConfigError, match=says):
        load_toolset(path)


def test_a_tool_that_would_block_the_loop_is_refused(tmp_path: Path) -> None:
    (tmp_path / "blocking.py").write_text(
        "from agentloop import Tool\nclass Blocking(Tool):\n    def execute(self, state, arguments):\n        pass\n"
    )
    path = tmp_path / "tools.yaml"
    schema = "{function: {name: b}}"
    path.write_text(f"tools: [{{class_name: blocking.py:Blocking, tool_schema: {schema}}}]\n")
    with pytest.raises(ToolConfigError, match=r"execute\(\) is not an `async def`"):
        load_toolset(path)


def trajectory() -> Trajectory:
    return Trajectory([1, 2], [0, 1], [None, -0.5], [None, 0], 1, turns=[Turn(1, 2, "hi", StopReason.STOP)])


async def reward(functions: Path, name: str, **options: Any) -> Any:
    function = load_reward(RewardConfig(function=f"{functions}:{name}", run_in="process", workers=1, **options))
    assert function is not None
    try:
        return await function(Task("0", "a", [], ground_truth="ß", images=[b"x"]), "text", trajectory())
    finally:
        close_reward(function)
        await asyncio.sleep(0.05)  # its pipes close


async def test_a_reward_in_a_process_has_the_main_thread_for_itself(functions: Path) -> None:
    assert await reward(functions, "alarm") == {"score": 1.0, "turns": 1, "truth": 1.0}
    assert await reward(functions, "slow_score") == 4.0
    numbers = await reward(functions, "numbers")
    assert numbers["score"] == 0.5 and numbers["nan"] != numbers["nan"]


async def test_a_reward_that_is_no_number_is_named(functions: Path) -> None:
    with pytest.raises(CallFailed, match="the result holds object, which is not JSON"):
        await reward(functions, "nothing")


def test_a_reward_that_is_not_there_is_found_before_the_run(functions: Path) -> None:
    with pytest.raises(ConfigError, match="does not define 'nobody'"):
        load_reward(RewardConfig(function=f"{functions}:nobody", run_in="process"))


async def test_a_reward_may_run_inline_or_in_a_thread(functions: Path) -> None:
    for run_in in ("thread", "inline"):
        function = load_reward(RewardConfig(function="gsm8k", run_in=run_in))
        assert function is not None
        begin = time.perf_counter()
        scored = await function(Task("0", "a", [], ground_truth="4"), "#### 4", trajectory())
        assert scored == {"score": 1.0, "correct": 1.0, "answer": "4"}
        assert time.perf_counter() >= begin
        close_reward(function)
