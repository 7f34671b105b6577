"""MCP servers that are programs."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from agentloop.errors import DataError, ToolConfigError, ToolError
from agentloop.images import ImageFile
from agentloop.trace.spans import Recorder
from agentloop.types import Task
from tests.tools.mcp.support import RAW, SERVER, Load, call, session_of
from tools.mcp import connection
from tools.mcp.places import Places


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


async def test_a_program_serves_an_episode(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVICE_KEY", "s3cret-value")
    monkeypatch.setenv("UNRELATED_KEY", "another-secret")
    before = children()
    toolset = load(
        command=[sys.executable, str(SERVER)], env={"KEY": "${oc.env:SERVICE_KEY}"}, prefix="t_", timeout=5, images=True
    )
    assert children() == before  # the session that listed the tools has ended

    # Schemas are those of the server, whole.
    drawing = toolset.tools["t_draw"].schema["function"]
    assert drawing["description"] == "Draw a shape."
    assert drawing["parameters"]["properties"]["shape"] == {"$ref": "#/$defs/Shape"}
    assert drawing["parameters"]["$defs"]["Shape"]["properties"]["kind"]["enum"] == ["line", "polygon"]

    session = session_of(toolset)
    found = await call(session, "t_draw", shape='{"kind": "line", "points": [{"x": "1"}]}', scale="2.5")
    assert found.text == "line of 1 points at 2.5" and found.metrics == {"converted_arguments": 3.0}
    assert "has no argument 'c'" in (await call(session, "t_add", a=1, c=2)).text

    # One session for all tools of the server, and for the whole episode.
    await asyncio.gather(*[call(session, "t_remember", text=text) for text in "ab"])
    assert sorted((await call(session, "t_remember", text="c")).text.split()) == ["a", "b", "c"]
    assert (await call(session, "t_fail")).error

    # Neither its own secret nor one of the run's.
    assert (await call(session, "t_environment", name="KEY")).text == "(hidden)"
    assert (await call(session, "t_environment", name="UNRELATED_KEY")).text == "not set"

    picture = await call(session, "t_picture")
    assert picture.text == "a picture:"
    assert [(image.width, image.height) for image in picture.images if isinstance(image, ImageFile)] == [(2, 2)]

    # What it started ends with it, although it left its session.
    child = psutil.Process(int((await call(session, "t_leave_child")).text))
    with pytest.raises(ToolError, match=r"remembered of the episode is lost: .*ended with code 3[\s\S]*going to die"):
        await call(session, "t_die")
    await session.close()
    child.wait(10)
    assert children() == before


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("hang", "it did not answer within 0.5 s"),
        ("flood", "more than 1,000 lines on stdout that are not messages"),
        ("twice", "two tools are named 'act'"),
        ("named", "'do it, now' has a name that a model cannot call"),
        ("endless pages", "lists more than 1,000 tools"),
        ("nothing", "the server has no tools"),
    ],
)
def test_a_broken_server_is_named_before_the_run(load: Load, how: str, says: str) -> None:
    with pytest.raises(ToolConfigError) as caught:
        load(raw=how, start_timeout=0.5 if how == "hang" else 20)
    assert says in str(caught.value)


def test_the_output_of_a_program_that_does_not_start_is_shown_without_secrets(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKEN_OF_MINE", "s3cret-value")
    code = "import os, sys; sys.exit('no: ' + os.environ['TOKEN'])"
    with pytest.raises(ToolConfigError, match=r"3 starts failed[\s\S]*ended with code 1[\s\S]*no: \(hidden\)"):
        load(command=[sys.executable, "-c", code], env={"TOKEN": "${oc.env:TOKEN_OF_MINE}"})


def test_a_tool_that_the_server_does_not_have_is_named(load: Load) -> None:
    with pytest.raises(ToolConfigError, match=r"has no tool 'acts'\n  fix: did you mean 'act'\? it has: .*act"):
        load(raw="greets", tools=["acts"])


async def test_answers_that_cannot_be_used_do_not_stop_the_run(load: Load) -> None:
    session = session_of(load(raw="large"))
    for _ in range(2):  # and a new server takes the next call
        assert "the answer was too large" in (await call(session, "act")).text
    await session.close()
    # Servers use -32000 for errors of their own, the library for a connection that was closed.
    session = session_of(load(raw="busy"))
    with pytest.raises(ToolError, match="answered with the error -32000: no free worker"):
        await call(session, "act")
    await session.close()
    session = session_of(load(raw="not a result"))
    with pytest.raises(ToolError, match="gave a wrong answer"):
        await call(session, "act")
    await session.close()


async def test_a_shared_session_serves_all_episodes_and_is_restarted(load: Load) -> None:
    before = children()
    toolset = load(raw="greets", session="shared", tools=["act"])
    sessions = [session_of(toolset) for _ in range(20)]
    assert {(await call(session, "act")).text for session in sessions} == {"acted"}
    started = children() - before
    assert len(started) == 2  # the keeper and the program
    for session in sessions:
        await session.close()
    assert children() - before == started

    program = max((psutil.Process(pid) for pid in started), key=lambda process: len(process.parents()))
    program.kill()
    program.wait(10)
    assert (await call(sessions[0], "act")).text == "acted"
    toolset.close()


async def test_episodes_wait_for_a_place(load: Load) -> None:
    toolset = load(raw="greets", max_sessions=2)
    most = 0

    async def episode() -> None:
        nonlocal most
        with Recorder():
            session = session_of(toolset)
            assert (await call(session, "act")).text == "acted"
            most = max(most, len(toolset.tools["act"]._server._open))  # type: ignore[attr-defined]
            await session.close()

    await asyncio.gather(*[episode() for _ in range(5)])
    assert most <= 2


async def test_places_do_not_lock_each_other() -> None:
    first, second = Places(1), Places(1)
    await first.enter("a")
    await second.enter("b")
    waiting = asyncio.create_task(second.enter("a"))
    await asyncio.sleep(0)
    assert not waiting.done()
    await asyncio.wait_for(first.enter("b"), 5)  # it would wait for a, which waits for b
    first.leave("b")
    second.leave("b")
    await asyncio.wait_for(waiting, 5)
    second.leave("a")
    cancelled = [asyncio.create_task(first.enter(name)) for name in "cd"]
    await asyncio.sleep(0)
    cancelled[0].cancel()
    first.leave("a")
    await asyncio.wait_for(cancelled[1], 5)
    first.leave("d")
    await asyncio.wait_for(first.enter("e"), 5)


async def test_a_server_that_fails_in_every_call_ends_the_episode_and_not_the_run(load: Load) -> None:
    session = session_of(load(raw="floods when called", stateful=False))
    with pytest.raises(ToolError, match=r"the MCP server python.*: the connection was closed; it printed more than"):
        await call(session, "act")
    await session.close()


async def test_a_program_that_answers_nothing_is_ended_and_the_model_told(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "PROBE_S", 0.1)
    session = session_of(load(raw="stops when called", timeout=0.2))
    for _ in range(2):
        result = await call(session, "act")
        assert "took longer than 0.2 s" in result.text and "started again, and remembers nothing" in result.text
    await session.close()


RUN = """
import asyncio, sys
from pathlib import Path
from agentloop.tool.loading import load_toolset
from agentloop.types import Task, ToolCall

async def main():
    toolset = load_toolset(Path(sys.argv[1]))
    for _ in range(2):
        print((await toolset.session(Task("0", "a", [])).call(ToolCall("act", {}), 30)).text, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


def test_nothing_is_left_of_a_run_that_was_killed(tmp_path: Path) -> None:
    program = f"setsid sleep 600 & exec {sys.executable} {RAW} greets"
    entry = {"class_name": "mcp", "config": {"command": ["sh", "-c", program]}}
    (tmp_path / "tools.yaml").write_text(json.dumps({"tools": [entry]}))
    with subprocess.Popen(
        [sys.executable, "-c", RUN, str(tmp_path / "tools.yaml")], stdout=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        assert [run.stdout.readline() for _ in range(2)] == ["acted\n"] * 2
        started = psutil.Process(run.pid).children(recursive=True)
        assert len(started) >= 6  # of two episodes: a keeper, the program and its child
        run.kill()
    _, alive = psutil.wait_procs(started, timeout=20)
    assert alive == []


def test_a_rows_argument_that_the_servers_tool_does_not_take_is_refused(load: Load) -> None:
    toolset = load(raw="plain")
    with pytest.raises(DataError, match=r"act.execute_kwargs: McpTool.execute\(\) got an unexpected .*'cout'"):
        toolset.check(
            Task("0", "a", [], extra_info={"tools_kwargs": {"act": {"execute_kwargs": {"cout": 9}}}}), "row 1"
        )
