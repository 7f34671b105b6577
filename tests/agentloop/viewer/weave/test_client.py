"""An unmodified weave client uses the trace server as its backend."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

Client = Callable[..., dict[str, Any]]


def test_ops_calls_feedback_and_images(client: Client, server: Any) -> None:
    found = client("ops.py")
    assert found["answer"] == "[3, 7] [3, 7]"

    tree = {call: (parent, name) for call, parent, name, _ in found["tree"]}
    assert sorted(name for _, name in tree.values()) == ["add"] * 4 + ["agent"] + ["plan"] * 2
    assert found["traces"] == 1
    assert tree[found["call"]] == (None, "agent")
    plans = [call for call, (_, name) in tree.items() if name == "plan"]
    assert all(tree[plan][0] == found["call"] for plan in plans)
    assert sorted(parent for parent, name in tree.values() if name == "add") == sorted(plans * 2)

    assert (found["inputs"], found["output"], found["status"]) == ({"question": "why"}, "[3, 7] [3, 7]", "success")
    assert found["latency_ms"] >= 10
    assert json.loads(found["exception"])["message"] == "no 7"
    assert found["failed"] == "error"
    assert found["image"] == [[4, 4], [255, 0, 0]]
    assert found["roots"] == found["root_ids"] == 203, "200 at once, the agent, the failure and the image"
    assert found["big"] == [194, 193, 192, 191, 190]
    assert found["contains"] == ["why?"]
    assert found["pages"] == [10, 11, 12, 13, 14]
    assert found["feedback"] == [
        ["wandb.reaction.1", {"emoji": "👍"}],
        ["wandb.note.1", {"note": "a good one"}],
        ["score", {"value": 0.5}],
    ]
    assert found["with_feedback"] == 3
    assert found["renamed"] == "renamed"
    assert f"{server.url}/lab/ops/r/call/{found['call']}" in found["printed"], "weave prints a link to this server"


def test_the_base_url_alone_is_enough(client: Client, server: Any) -> None:
    found = client("base_url.py", without=["WF_TRACE_SERVER_URL"])
    assert found["server"] == f"{server.url}/traces"
    assert (found["calls"], found["object"]) == ([5], {"turns": 4})


def test_objects_datasets_and_an_evaluation(client: Client) -> None:
    found = client("objects.py")
    assert found["same"], "the same value has the same version"
    assert (found["first"], found["latest"]) == ({"turns": 4}, {"turns": 5})
    assert (found["rows"], found["length"]) == ([1, 2, 3, 4, 5], 5)
    assert (found["right"], found["solved"]) == ({"true_count": 1, "true_fraction": 0.2}, 5)
    assert found["expanded"] == ["0 + 1", "1 + 1", "2 + 1", "3 + 1", "4 + 1"], "refs to rows are followed"
    assert found["left"] == 4, "one call is deleted"
    assert found["gone"] == "ValueError", "a deleted version cannot be read"
