"""An episode as calls of weave: tree, texts, errors, bounds; never ids."""

from __future__ import annotations

import json
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from agentloop.config import WeaveConfig
from agentloop.errors import ConfigError
from agentloop.trace.exporting import ExportRun, TracedEpisode
from agentloop.trace.record import TraceRecord
from agentloop.trace.weave import WeaveExporter
from agentloop.trace.weave.bounds import MOST_BYTES, bound, size_of
from agentloop.trace.weave.calls import EpisodeCall, calls_of
from agentloop.trace.weave.images import Images
from agentloop.types import EpisodeStatus
from agentloop.wire import is_local
from tests.agentloop.trace.made_episodes import record


def episode_of(made: TraceRecord, tmp_path: Path = Path("run")) -> TracedEpisode:
    return TracedEpisode(ExportRun("demo", tmp_path, "model", rollout_n=2), (made,))


def calls(made: TraceRecord, *, texts: bool = True) -> list[EpisodeCall]:
    return calls_of(episode_of(made), texts=texts, image=lambda _: None)


def numbers(value: Any) -> list[Any]:
    """Lists of numbers anywhere in a value."""
    if isinstance(value, dict):
        return [found for item in value.values() for found in numbers(item)]
    if isinstance(value, list):
        own = [value] if value and all(isinstance(item, int | float) for item in value) else []
        return own + [found for item in value for found in numbers(item)]
    return []


def test_the_tree_has_the_texts_of_the_conversation_and_no_ids() -> None:
    made = record()
    found = calls(made)
    ids = {call.id: call for call in found}
    shape = [(call.op, ids[call.parent].op if call.parent else None) for call in found]
    assert shape == [
        ("episode", None), ("turn", "episode"), ("generate", "turn"), ("tool", "episode"),
        ("turn", "episode"), ("generate", "turn"), ("reward", "episode"),
    ]  # fmt: skip
    episode, first, tool, last, reward = found[0], found[2], found[3], found[5], found[6]
    assert episode.name == "tool_agent train/1/g0/0"
    assert episode.inputs["messages"] == [
        {"role": "system", "content": "Answer."}, {"role": "user", "content": "What is 12 * 34?"}
    ]  # fmt: skip
    assert (episode.output["answer"], episode.output["reward"]) == ("408", 1.0)
    assert episode.output["reward_parts"] == {"format": 0.5}
    arguments = {"expression": "12 * 34"}
    assert first.inputs["messages"] == episode.inputs["messages"]
    assert first.output["tool_calls"][0]["function"] == {"name": "calculator", "arguments": arguments}
    assert first.usage == (5, 6)
    assert (tool.inputs, tool.output) == ({"tool": "calculator", "arguments": arguments}, {"result": "408"})
    assert [message["role"] for message in last.inputs["messages"]] == ["tool"], "only what came since the turn before"
    assert (last.output["content"], last.output["reasoning_content"]) == ("408", "easy")
    assert (reward.output, reward.inputs["answer"]) == ({"score": 1.0, "parts": {"format": 0.5}}, "408")
    for call in found:
        assert (call.attributes["step"], call.attributes["agent_name"]) == (1, "tool_agent")
        assert call.attributes["rollout_n"] == 2 and call.attributes["key"] == "train/1/g0/0"
        assert not numbers([call.inputs, call.output, call.attributes])
        json.dumps([call.inputs, call.output, call.attributes])


def test_ids_follow_from_the_episode() -> None:
    made = record()
    found = [call.id for call in calls(made)]
    assert found == [call.id for call in calls(made)]
    assert found[0] == str(uuid.UUID(made.trajectory.trace_id)), "weave finds a trace by the id of its first call"
    assert len(set(found)) == len(found)
    assert not set(found) & {call.id for call in calls(record())}


def test_without_texts_only_names_and_numbers_are_sent() -> None:
    shown = json.dumps([[call.inputs, call.output, call.attributes] for call in calls(record(), texts=False)])
    for text in ("12 * 34", "408", "easy", "Answer."):
        assert text not in shown
    assert "calculator" in shown


def test_errors_and_cancellations_end_their_call() -> None:
    made = record()
    spans = {span.name: span for span in made.trajectory.spans}
    spans["tool"].status, spans["tool"].error = "error", "ValueError: no: \ud800"
    spans["reward"].status = "cancelled"
    spans["parse"].status, spans["parse"].error = "error", "what"
    made.trajectory.status, made.trajectory.error = EpisodeStatus.FAILED, "the tool server is gone"
    errors = {call.op: call.error for call in calls(made) if call.error}
    assert errors == {
        "episode": ("EpisodeFailed", "the tool server is gone"),
        "parse": ("Error", "what"),
        "tool": ("ValueError", "no: ?"),
        "reward": ("Cancelled", "the call was cancelled"),
    }


def test_an_agents_own_span_is_an_op_under_its_name() -> None:
    made = record()
    made.trajectory.spans[4].name = "look up / plan: \u202e"
    call = calls(made)[3]
    assert (call.op, call.name) == ("look-up-plan", "look up / plan: \u202e")


def test_an_interaction_has_what_was_said_and_what_came_back() -> None:
    made = record()
    span = made.trajectory.spans[4]
    span.name, span.attributes = "interaction", {"interaction": "teacher", "score": 0.25}
    made.trajectory.messages[2:4] = [
        {"role": "assistant", "content": "407"},
        {"role": "user", "content": "look again"},
    ]
    call = calls(made)[3]
    assert call.inputs == {"interaction": "teacher", "message": "407"}
    assert call.output == {"reward": 0.25, "message": "look again"}


def test_images_are_opened_once() -> None:
    made = record()
    picture = Image.new("RGB", (2, 2), (255, 0, 0))
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": "what is this?"}]
    made.trajectory.messages[1]["content"] = parts
    images = Images()
    found = calls_of(episode_of(made), texts=True, image=images.image)
    shown = [call.inputs["messages"][1]["content"] for call in (found[0], found[2])]
    assert shown[0][0]["image"] is shown[1][0]["image"]
    assert shown[0][0]["image"].getpixel((1, 1)) == (255, 0, 0)
    assert shown[0][1] == "what is this?"
    parts[0]["image"] = {"sha256": "0" * 64, "path": "missing.png"}
    content = calls_of(episode_of(made), texts=True, image=images.image)[0].inputs["messages"][1]["content"]
    assert content == "[image]what is this?", "an image that cannot be read is named"


@pytest.mark.parametrize("text", ["x" * 9_000_000, "語" * 2_000_000, '"' * 3_000_000])
def test_a_call_that_weave_would_drop_is_cut_with_the_way_to_the_whole(text: str) -> None:
    made = record()
    made.trajectory.messages[3]["content"] = text
    for call in calls(made):
        bound(call, "all of it is in outputs/demo, episode train/1/g0/0")
        assert len(json.dumps([call.inputs, call.output, call.attributes])) <= MOST_BYTES < 3_670_016
        if call.op == "tool":
            result = call.output["result"]
            assert result.endswith(
                f"[cut: {len(text):,} characters; all of it is in outputs/demo, episode train/1/g0/0]"
            )
            assert len(result) > 200_000, "as much as fits is kept"
            assert call.inputs["arguments"] == {"expression": "12 * 34"}, "short texts stay"


def test_a_call_of_very_many_small_values_is_replaced_by_a_mark() -> None:
    call = calls(record())[0]
    call.inputs = {"messages": [{"role": "user", "content": str(n)} for n in range(110_000)]}
    assert size_of(call.inputs) > MOST_BYTES
    bound(call, "elsewhere")
    assert size_of(call.inputs) < 1000 and "elsewhere" in call.inputs["cut"]


def test_numbers_that_json_has_not_and_half_surrogates_anywhere_are_sent_as_text() -> None:
    made, nan = record(group="g \ud800"), float("nan")
    made.trajectory.turns[0].tool_calls[0].arguments = {"x": nan, "deep": [{"y": float("-inf")}]}
    made.trajectory.reward_parts = {"format": nan}
    for span in made.trajectory.spans:
        span.attributes["half \ud800"] = nan
    made.trajectory.spans[-2].status = "error"
    made.trajectory.agent_name = made.trajectory.task_id = "\ud800"
    found = calls(made)
    json.dumps([asdict(call) for call in found], allow_nan=False, ensure_ascii=False).encode()
    tool = next(call for call in found if call.op == "tool")
    assert tool.inputs["arguments"] == {"x": "nan", "deep": [{"y": "-inf"}]}
    assert found[0].output["reward_parts"] == {"format": "nan"} and tool.attributes["half ?"] == "nan"
    parse = next(call for call in found if call.op == "parse")
    assert parse.output == {"half ?": "nan"}


def test_long_attributes_are_cut_as_well() -> None:
    made = record()
    made.trajectory.task_id = "t" * MOST_BYTES
    for call in calls(made):
        bound(call, "elsewhere")
        assert size_of(call.inputs, call.output, call.attributes) <= MOST_BYTES
        assert "elsewhere" in call.attributes["task_id"] and call.attributes["group_id"] == "g0"


@pytest.mark.parametrize("config", [{"project": "a/b/c"}, {"project": "a/"}, {"project": "a/b", "entity": "c"}])
def test_a_wrong_project_is_refused_before_the_start(config: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="not the name of a project"):
        WeaveExporter(WeaveConfig(**config), ExportRun("demo", Path("run")))


def test_the_destination_names_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WF_TRACE_SERVER_URL", "http://user:secret@127.0.0.1:8777/")
    exporter = WeaveExporter(WeaveConfig(project="lab/runs"), ExportRun("demo", Path("run")))
    assert "secret" not in exporter.destination and exporter.destination.endswith(" lab/runs")


@pytest.mark.parametrize(
    ("url", "local"),
    [("http://127.0.0.1:1", True), ("http://localhost", True), ("http://[::1]:2", True),
     ("https://trace.wandb.ai", False), ("http://127.0.0.1.example.com", False)],
)  # fmt: skip
def test_only_this_machine_is_local(url: str, local: bool) -> None:
    assert is_local(url) is local
