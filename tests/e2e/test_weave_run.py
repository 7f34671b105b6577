"""A run with `trace.weave` and no account, as docs/traces.md shows it: the trace server is killed on the
way, `agentloop trace push` completes the record, and weave's own client reads it back."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.agentloop.viewer.trace_server import TraceServer
from tests.forked_programs import ForkedPrograms

from .conftest import SMALL, agentloop_command, waiting_reward

PAGE = Path(__file__).resolve().parents[2] / "docs" / "traces.md"

STEPS = 3

READ = """
import json, sys, weave
client = weave.init("lab/agents")
def plain(value):
    return json.loads(json.dumps(value, default=dict))
def calls(step):
    query = {"$expr": {"$eq": [{"$getField": "attributes.step"}, {"$literal": step}]}}
    return [
        {"id": c.id, "parent": c.parent_id, "trace": c.trace_id, "op": c.op_name.split("/")[-1].split(":")[0],
         "inputs": plain(c.inputs), "output": plain(c.output),
         "attributes": {k: v for k, v in c.attributes.items() if k != "weave"}, "exception": c.exception,
         "latency_ms": (c.ended_at - c.started_at).total_seconds() * 1000}
        for c in client.get_calls(query=query)
    ]
print(json.dumps({step: calls(step) for step in range(1, int(sys.argv[1]) + 1)}))
"""


def of_the_page(heading: str) -> list[str]:
    """The commands below a heading of the page."""
    section = PAGE.read_text().split(f"\n{heading}\n")[1].split("\n#")[0]
    return [line for block in re.findall(r"^```\n(.*?)^```$", section, re.M | re.S) for line in block.splitlines()]


def read(programs: ForkedPrograms, server: TraceServer, steps: int, folder: Path) -> dict[str, list[dict[str, Any]]]:
    done = programs.run(READ, str(steps), environment=server.variables(), cwd=folder, timeout=180)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[dict[str, Any]]] = json.loads(done.stdout.splitlines()[-1])
    return found


def lists_of_numbers(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [found for item in value.values() for found in lists_of_numbers(item)]
    if isinstance(value, list):
        own = [value] if value and all(isinstance(item, int | float) for item in value) else []
        return own + [found for item in value for found in lists_of_numbers(item)]
    return []


@pytest.mark.slow
def test_the_record_is_complete_after_an_outage_and_has_no_call_twice(
    repo: Path, tmp_path: Path, weave_programs: ForkedPrograms
) -> None:
    serve, export, train = of_the_page("### Without an account")
    (push,) = of_the_page("## weave")
    assert serve == "agentloop trace serve outputs --port 8777"
    server = TraceServer(tmp_path / "outputs")
    port = int(server.url.rpartition(":")[2])
    export = export.replace("8777", str(port))
    assert dict(word.split("=", 1) for word in export.split()[1:]).items() <= server.variables().items()

    # What is sent waits for idle cores: the second step ends when the server has something of the first.
    keys = [
        f"run.steps={STEPS}",
        "eval.before_train=false",
        "reward_timeout_s=300",
        waiting_reward(repo, tmp_path, calls=4 * 4 + 4),
    ]
    command = agentloop_command(*shlex.split(train)[1:], *SMALL, *keys)
    environment = {**os.environ, **server.variables()}
    run = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        with httpx.Client(trust_env=False, timeout=60) as http:  # one: to make it takes more CPU than to ask
            while not http.get(f"{server.url}/api/external/calls").json()["total"]:
                assert run.poll() is None, run.communicate()[0]
                time.sleep(0.1)
    finally:
        server.stop()
        (tmp_path / "go").touch()
    printed, _ = run.communicate(timeout=300)
    assert run.returncode == 0, printed

    again = TraceServer(tmp_path / "outputs", port=port)
    try:
        first = pushed(weave_programs, tmp_path, push, environment)
        assert re.search(r"[1-9]\d* episodes sent", first.stdout), (first.stdout, printed)
        assert " 0 episodes sent" in pushed(weave_programs, tmp_path, push, environment).stdout
        steps = read(weave_programs, again, STEPS, tmp_path)
    finally:
        again.stop()

    for step in range(1, STEPS + 1):
        calls = steps[str(step)]
        trained = [call for call in calls if not call["attributes"]["validate"]]
        roots = [call for call in trained if call["parent"] is None]
        assert len({call["id"] for call in calls}) == len(calls)
        assert len(roots) == 4 * 4, "every episode of the step, once"
        known = {call["id"]: call for call in calls}
        assert all(call["parent"] in known for call in calls if call["parent"] is not None)
        assert all(call["inputs"]["messages"][-1]["content"].startswith("What is") for call in roots)
        assert all(call["output"]["message"]["role"] == "assistant" for call in roots)
        assert {call["output"]["reward"] for call in roots} <= {0.0, 1.0}
        assert {call["op"] for call in trained} >= {"episode", "turn", "generate", "reward"}
        assert all(call["latency_ms"] > 0 for call in trained if call["op"] == "generate")
        assert lists_of_numbers([[call["inputs"], call["output"], call["attributes"]] for call in calls]) == []


def pushed(
    programs: ForkedPrograms, folder: Path, command: str, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    code = "from agentloop.commands.main import main; main()"
    done = programs.run(code, *shlex.split(command)[1:], environment=environment, cwd=folder, timeout=300)
    assert done.returncode == 0, done.stderr
    return done
