"""What the shortened ways through weave's client send, beside weave's own ways."""

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
from agentloop.trace.weave import client, exporter as module

run = ExportRun("demo", Path(), "policy")
exporter = load_exporter("weave")(WeaveConfig(project="lab/runs"), run)
sent = []

def way(plain, encoded):
    def calls_of(*args, **options):
        found = original(*args, **options)
        for call in found:
            call.plain = call.plain and plain
        return found

    module.calls_of, client.encoded = calls_of, encoded
    exporter.export(list(episodes_of(run, TraceStore(run.folder).records(7, "train"))))
    exporter._client._collector.post = lambda entity, project, batch: sent.append([json.loads(call) for call in batch])

original, quick = module.calls_of, client.encoded
from agentloop.trace.weave.encoding import _by_weave
way(True, quick)  # connects
way(True, quick)
way(False, _by_weave)
print("SENT", json.dumps(sent))
for encode in (quick, _by_weave):
    try:
        encode({"id": "x", "output": {"score": float("nan")}})
    except ValueError as exc:
        print("REFUSED", exc)
"""
"""Sends episodes as they are, and as if no call were plain, in a process into which weave is imported."""


def strange() -> list[TraceRecord]:
    odd = record(7, "odd", text="語 \ud800 <script> \x01")
    picture = {"type": "image", "image": Image.new("RGB", (3, 3), (0, 128, 0))}
    odd.trajectory.messages[1]["content"] = [picture, {"type": "text", "text": "how many?"}]
    arguments = {"api_key": "mine-0815", "deep": {"Api_Key": 1, "list": [None, 2.5, True]}, "big": 2**70}
    odd.trajectory.turns[0].tool_calls[0].arguments = arguments
    odd.trajectory.messages[2]["tool_calls"][0]["function"]["arguments"] = arguments
    tool = next(span for span in odd.trajectory.spans if span.name == "tool")
    tool.status, tool.error = "error", "ValueError: division by zero"
    return [*step_of(7, 2), odd]


def test_plain_calls_arrive_as_weaves_own_ways_send_them(fake_server: Server, tmp_path: Path) -> None:
    TraceStore(tmp_path).write(7, "train", strange())
    printed = fake_server.run(BOTH_WAYS, tmp_path)
    quick, by_weave = json.loads(next(line for line in printed if line.startswith("SENT"))[5:])
    assert quick == by_weave and len(quick) == 5 * 7
    (tool,) = (call for call in quick if call["exception"] and call["inputs"].get("tool"))
    assert tool["inputs"]["arguments"]["api_key"] == "REDACTED"
    assert tool["inputs"]["arguments"]["deep"]["Api_Key"] == "REDACTED" and tool["inputs"]["arguments"]["big"] == 2**70
    assert "mine-0815" not in json.dumps([call["inputs"] for call in quick if call["inputs"].get("tool")])
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
