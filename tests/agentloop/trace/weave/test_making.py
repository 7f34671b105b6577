"""Calls as they are sent, beside those that weave's own client makes of the same episodes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from agentloop.trace.record import TraceRecord
from agentloop.trace.store import TraceStore
from agentloop.trace.weave.bounds import MOST_BYTES, bound, size_of
from agentloop.trace.weave.calls import EpisodeCall
from tests.agentloop.trace.made_episodes import record, step_of
from tests.agentloop.trace.weave.fake_server import Server

BOTH_WAYS = """
import json
from pathlib import Path
from agentloop.config import WeaveConfig
from agentloop.trace.exporting import ExportRun, episodes_of, load_exporter
from agentloop.trace.store import TraceStore
from agentloop.trace.weave.encoding import _by_weave, encoded
from agentloop.trace.weave.making import _exception, _time

run = ExportRun("demo", Path(), "policy")
exporter = load_exporter("weave")(WeaveConfig(project="lab/runs"), run)
episodes = list(episodes_of(run, TraceStore(run.folder).records(7, "train")))
exporter.export(episodes[:1])  # connects
connection = exporter._client
client, collector = connection._client, connection._collector
ours = []
collector.post = lambda entity, project, batch: ours.extend(json.loads(call) for call in batch)
for _ in range(2):  # with ops that are known, and new
    exporter.export(episodes)
    connection._maker._ops.clear()

collector.clear()
theirs = []
for calls in map(exporter._calls, episodes):
    made = {}
    for call in calls:
        made[call.id] = client.create_call(
            call.op, call.inputs, parent=made.get(call.parent), attributes=call.attributes, display_name=call.name,
            use_stack=False, _call_id_override=call.id, started_at=_time(call.start_ns),
        )
    for call in reversed(calls):
        if call.usage is not None:
            prompt, answer = call.usage
            tokens = {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
            made[call.id].summary = {"usage": {"policy": {"requests": 1, **tokens}}}
        error = None if call.error is None else _exception(*call.error)
        client.finish_call(made[call.id], call.output, exception=error, ended_at=_time(call.end_ns))
    client.flush()
    complete = collector.complete()
    theirs += [json.loads(_by_weave(complete[call.id])) for call in calls]
print("SENT", json.dumps([ours[:len(theirs)], ours[len(theirs):], theirs]))
for encode in (encoded, _by_weave):
    try:
        encode({"id": "x", "output": {"score": float("nan")}})
    except ValueError as exc:
        print("REFUSED", exc)
"""
"""Sends episodes, and has all of their calls made by weave's client, in a process into which weave is imported."""


def strange() -> list[TraceRecord]:
    odd = record(7, "odd", text="語 \ud800 <script> \x01")
    picture = {"type": "image", "image": Image.new("RGB", (3, 3), (0, 128, 0))}
    odd.trajectory.messages[1]["content"] = [picture, {"type": "text", "text": "how many?"}]
    arguments = {"api_key": "mine-0815", "deep": {"Api_Key": 1, "list": [None, 2.5, True]}, "big": 2**70}
    odd.trajectory.turns[0].tool_calls[0].arguments = arguments
    odd.trajectory.messages[2]["tool_calls"][0]["function"]["arguments"] = arguments
    tool = next(span for span in odd.trajectory.spans if span.name == "tool")
    tool.status, tool.error = "error", "ValueError: division by zero"
    own = record(7, "own")
    own.trajectory.spans[1].attributes |= {"weave": {"mine": 1}, "note": "of the user"}
    return [own, *step_of(7, 2), odd]


@pytest.mark.parametrize("settings", [{}, {"WEAVE_CLIENT_PARALLELISM": "4"}])
def test_calls_are_those_that_weaves_client_makes(
    fake_server: Server, tmp_path: Path, settings: dict[str, str]
) -> None:
    TraceStore(tmp_path).write(7, "train", strange())
    printed = fake_server.run(BOTH_WAYS, tmp_path, **settings)
    known, new, theirs = json.loads(next(line for line in printed if line.startswith("SENT"))[5:])
    assert new == known == theirs and len(theirs) == 6 * 7
    (tool,) = (call for call in known if call["exception"] and call["inputs"].get("tool"))
    assert tool["inputs"]["arguments"]["api_key"] == "REDACTED"
    assert tool["inputs"]["arguments"]["deep"]["Api_Key"] == "REDACTED" and tool["inputs"]["arguments"]["big"] == 2**70
    assert "mine-0815" not in json.dumps([call["inputs"] for call in known if call["inputs"].get("tool")])
    episode = next(call for call in known if call["op_name"] == known[0]["op_name"] and call["exception"] is None)
    assert episode["summary"]["usage"]["policy"]["requests"] == 2 and episode["summary"]["status_counts"]["error"] == 0
    reserved = [call["attributes"] for call in known if call["attributes"].get("note")]
    assert len(reserved) == 1 and reserved[0]["weave"]["mine"] == 1
    assert sum("mine" in call["attributes"]["weave"] for call in known) == 1
    refused = [line for line in printed if line.startswith("REFUSED")]
    assert len(refused) == 2 and "not JSON compliant" in refused[0]


@pytest.mark.parametrize("text", ["x", "é", "語", "\U0001f600", "\x01", '"', "\x7f"])
def test_the_quick_test_of_the_size_lets_nothing_large_pass(text: str) -> None:
    def call(characters: int) -> EpisodeCall:
        output: Any = {"texts": [text * characters], "many": [0] * 1000}
        return EpisodeCall("tool", "tool", "id", None, 0, 1, {}, {}, output)

    below = call(MOST_BYTES // 14)
    bound(below, "here")
    assert below.output == call(MOST_BYTES // 14).output
    above = call(MOST_BYTES // len(json.dumps(text)[1:-1]) + 1)
    bound(above, "here")
    assert size_of(above.inputs, above.output, above.attributes) <= MOST_BYTES and "cut" in above.output["texts"][0]
