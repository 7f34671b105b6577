"""What each route answers on a small run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from agentloop.trace.store import TraceStore
from agentloop.types import EpisodeStatus
from tests.agentloop.viewer.api.conftest import Get, getter
from tests.agentloop.viewer.api.material import HOSTILE, episode, make_run, png, record, write_step

KEY = "train/2/train/2/1/1/0"


async def test_a_run_is_described(get: Get) -> None:
    runs = (await get("/api/runs")).json()["runs"]
    assert [run["id"] for run in runs] == ["sums"]
    found = (await get("/api/runs/sums")).json()
    assert (found["kind"], found["steps"], found["total_steps"], found["live"]) == ("train", 3, 5, False)
    assert found["reward_last"] == pytest.approx(0.3)
    assert found["spark"] == pytest.approx([0.1, 0.2, 0.3])
    assert (found["episodes"], found["failed"], found["has_text"]) == (24, 3, True)
    assert found["traces"]["splits"] == {"train": {"episodes": 24, "first_step": 1, "last_step": 3, "steps": 3}}
    assert found["config"]["trainer"]["hub_token"] == "(hidden)"
    assert (await get("/api/runs")).json()["runs"][0]["episodes"] == 24


async def test_metrics_are_thinned_to_what_a_plot_shows(get: Get) -> None:
    answer = (await get("/api/runs/sums/metrics", keys="reward/mean,unknown", points=2)).json()
    assert answer["keys"] == ["reward/mean", "train/loss"]
    assert (answer["steps"], answer["every"]) == ([2, 3], 2)
    assert list(answer["series"]) == ["reward/mean"]
    assert answer["series"]["reward/mean"] == pytest.approx([0.15, 0.3])


async def test_a_row_of_the_table_has_what_the_episode_has(get: Get) -> None:
    answer = (await get("/api/runs/sums/episodes", step=2, sort="-reward", limit=1)).json()
    assert answer["total"] == 8
    (row,) = answer["rows"]
    assert row["key"] == "train/2/train/2/0/1/0"
    full = (await get("/api/runs/sums/episode", key=row["key"])).json()
    shared = [
        "step", "split", "version", "group_id", "sample_index", "task_id", "agent_name", "data_source", "status",
        "stop_reason", "reward", "parts", "outcome", "staleness", "turns", "tool_calls", "length", "prompt_length",
        "sampled", "answer", "error", "trace_id",
    ]  # fmt: skip
    assert {name: row[name] for name in shared} == {name: full[name] for name in shared}
    for name in ("mismatch", "advantage", "latency_s"):
        assert row[name] == pytest.approx(full[name])
    assert (row["mismatch"], row["staleness"], row["preview"]) == (pytest.approx(0.25), 1, "What is 0+1?")
    assert row["reply"] == "The answer is 1"


@pytest.mark.parametrize(
    ("parameters", "total"),
    [
        ({}, 24),
        ({"status": "failed"}, 3),
        ({"status": ["failed", "ok"]}, 24),
        ({"status": "rejected"}, 0),
        ({"split": "eval"}, 0),
        ({"step": "2"}, 8),
        ({"step": "2-3"}, 16),
        ({"step": "2-"}, 16),
        ({"step": "-1"}, 8),
        ({"min_reward": "0.5"}, 9),
        ({"max_reward": "0.5"}, 12),
        ({"min_turns": "3"}, 0),
        ({"task_id": "task-1", "step": "1"}, 4),
        ({"group_id": "train/3/0"}, 4),
        ({"cause": "ServerError: replica # is gone"}, 3),
        ({"tool": "calculator"}, 24),
        ({"tool": "search"}, 0),
        ({"q": "answer is 4"}, 3),
        ({"q": '"answer is 4"'}, 3),
        ({"q": "ANSW"}, 24),
        ({"q": "error:replica -prompt:1"}, 0),
        ({"q": "call:calculator prompt:0 -prompt:1", "step": "1"}, 3),
        ({"q": "result:3", "status": "ok"}, 6),
        ({"q": "tool:calculator OR x"}, 0),
        ({"q": '") OR words MATCH ("answer'}, 0),
    ],
)
async def test_filters_and_search(get: Get, parameters: dict[str, Any], total: int) -> None:
    answer = await get("/api/runs/sums/episodes", limit=0, **parameters)
    assert answer.status_code == 200, answer.text
    assert answer.json()["total"] == total


async def test_facets_count_what_another_choice_would_find(get: Get) -> None:
    facets = (await get("/api/runs/sums/episodes", status="failed", step="1-2")).json()["facets"]
    assert facets["status"] == {"ok": 14, "failed": 2}
    assert facets["stop_reason"] == {"stop": 2}
    assert facets["step"] == [1, 3]
    assert (await get("/api/runs/sums/episodes", facets=0)).json()["facets"] is None


async def test_pages_and_neighbours_are_of_one_order(get: Get) -> None:
    asked = {"sort": "-reward", "status": "ok"}
    rows = []
    for offset in range(0, 21, 5):
        rows += (await get("/api/runs/sums/episodes", offset=offset, limit=5, **asked)).json()["rows"]
    keys = [row["key"] for row in rows]
    assert len(set(keys)) == 21
    assert [row["reward"] for row in rows] == sorted((row["reward"] for row in rows), reverse=True)
    around = (await get("/api/runs/sums/around", key=keys[7], **asked)).json()
    assert around == {"total": 21, "index": 7, "previous": keys[6], "next": keys[8]}
    ends = [(await get("/api/runs/sums/around", key=key, **asked)).json() for key in (keys[0], keys[-1])]
    assert (ends[0]["previous"], ends[1]["next"]) == (None, None)
    other = (await get("/api/runs/sums/around", key=keys[0], status="failed")).json()
    assert other == {"total": 3, "index": -1, "previous": None, "next": None}


async def test_unknown_values_come_last_in_both_directions(get: Get) -> None:
    for sort in ("reward", "-reward"):
        rows = (await get("/api/runs/sums/episodes", sort=sort)).json()["rows"]
        assert [row["reward"] for row in rows[-3:]] == [None] * 3


async def test_an_episode_is_a_conversation(get: Get) -> None:
    found = (await get("/api/runs/sums/episode", key=KEY)).json()
    user, first, tool, last = found["conversation"]
    assert (user["role"], user["text"], user["turn"], user["tokens"][0]) == ("user", "What is 1+1?", None, 0)
    assert first["tool_calls"] == [{"id": "c0", "name": "calculator", "arguments": {"expression": "1+1"}}]
    assert first["rewards"] == [{"name": "calculator", "value": 0.1}]
    assert (first["turn"], first["version"], first["latency_s"], first["trained"]) == (0, 1, 0.25, True)
    assert first["logprob"] == pytest.approx(-0.5)
    assert first["advantage"] == pytest.approx(0.5)
    assert (tool["text"], tool["latency_s"], tool["error"]) == ("2", pytest.approx(0.1), None)
    assert tool["tokens"] == [first["tokens"][1], last["tokens"][0]]
    assert (last["text"], last["turn"], last["tokens"][1]) == ("The answer is 2", 1, found["length"])
    assert found["prompt_text"].startswith("<|im_start|>user\nWhat is 1+1?")
    assert [span["start_s"] for span in found["spans"]] == [0.0, pytest.approx(0.1)]
    assert (found["row"], found["trajectories"], found["version"]) == (7, [KEY], 2)


async def test_tokens_come_in_parts_that_fit_together(get: Get) -> None:
    whole = (await get("/api/runs/sums/tokens", key=KEY)).json()
    length = whole["length"]
    assert whole["end"] == length == len(whole["ids"])
    assert "I use the tool. é" in "".join(whole["pieces"])
    parts = [
        (await get("/api/runs/sums/tokens", key=KEY, start=start, end=start + 7)).json()
        for start in range(0, length, 7)
    ]
    columns = ("ids", "pieces", "mask", "logprobs", "trainer_logprobs", "advantages", "versions")
    for name in columns:
        assert [value for part in parts for value in part[name]] == whole[name]
    assert whole["special"]
    for mask, logprob, trainer, version in zip(
        whole["mask"], whole["logprobs"], whole["trainer_logprobs"], whole["versions"], strict=True
    ):
        assert (logprob, trainer, version) == ((-0.5, -0.25, 1) if mask else (None, None, None))
    beyond = (await get("/api/runs/sums/tokens", key=KEY, start=length + 5, end=length + 9)).json()
    assert beyond["ids"] == []


async def test_a_character_of_several_tokens_is_the_piece_of_the_last(tmp_path: Path, quickstart_model: Path) -> None:
    run = make_run(tmp_path / "run", quickstart_model, steps=1)
    key = "train/1/train/1/0/0/0"
    ask = getter(run)
    whole = (await ask("/api/runs/run/tokens", key=key)).json()
    at = next(i for i, piece in enumerate(whole["pieces"]) if "é" in piece)
    for end in (at, at + 1):
        part = (await ask("/api/runs/run/tokens", key=key, start=at - 1, end=end)).json()
        assert part["pieces"] == whole["pieces"][at - 1 : end]


async def test_without_its_tokenizer_a_run_has_ids_only(tmp_path: Path, quickstart_model: Path) -> None:
    run = make_run(tmp_path / "run", quickstart_model, steps=1)
    (run / "config" / "resolved.json").write_text('{"model": {"path": "/nowhere/model"}}')
    ask, key = getter(run), "train/1/train/1/0/0/0"
    tokens = (await ask("/api/runs/run/tokens", key=key)).json()
    assert (tokens["has_text"], tokens["pieces"], tokens["special"]) == (False, None, [])
    assert len(tokens["ids"]) == tokens["length"]
    found = (await ask("/api/runs/run/episode", key=key)).json()
    assert (found["has_text"], found["prompt_text"]) == (False, None)
    assert (await ask("/api/runs/run")).json()["has_text"] is False


async def test_a_group_side_by_side_and_a_task_over_the_steps(get: Get) -> None:
    group = (await get("/api/runs/sums/group", step=2, split="train", group_id="train/2/1")).json()
    assert [sample["sample_index"] for sample in group["samples"]] == [0, 1, 2, 3]
    assert [sample["advantage"] for sample in group["samples"]] == pytest.approx([0.5] * 4)
    assert group["samples"][2]["conversation"][-1]["text"] == "The answer is 3"
    assert [message["text"] for message in group["prompt"]] == ["What is 1+0?"]
    assert group["reward_mean"] == pytest.approx(1 / 3)

    task = (await get("/api/runs/sums/task", task_id="task-1")).json()
    assert [(point["step"], point["count"]) for point in task["steps"]] == [(1, 4), (2, 4), (3, 4)]
    assert task["steps"][0]["reward_mean"] == pytest.approx(1 / 3)
    assert len(task["steps"][0]["samples"]) == 4


async def test_failures_are_counted_by_cause(get: Get) -> None:
    (cause,) = (await get("/api/runs/sums/failures")).json()["causes"]
    assert (cause["status"], cause["count"], cause["first_step"], cause["last_step"]) == ("failed", 3, 1, 3)
    assert cause["error"] == "ServerError: replica 3 is gone"
    found = (await get("/api/runs/sums/episode", key=cause["keys"][0])).json()
    assert found["faults"][0]["where"] == "tool.py:3"


async def test_signals_name_their_rules(get: Get) -> None:
    answer = (await get("/api/runs/sums/signals")).json()
    assert {"rule", "title", "bound", "severity"} <= answer["rules"][0].keys()
    assert {signal["rule"] for signal in answer["signals"]} <= {rule["rule"] for rule in answer["rules"]}


async def test_forks_of_an_episode_are_its_trajectories(tmp_path: Path, quickstart_model: Path) -> None:
    from agentloop.chat import load_tokenizer

    run = make_run(tmp_path / "run", quickstart_model, steps=1)
    tokenizer = load_tokenizer(str(quickstart_model))
    fork = episode(tokenizer, "g", 0, task=5, version=1, spans=[])
    fork.messages = [{"role": "user", "content": "only in the fork: zebra"}, *fork.messages[1:]]
    main = episode(tokenizer, "g", 0, task=6, version=1)
    TraceStore(run).write(2, "train", [record(2, fork, part=0, parts=2), record(2, main, part=1, parts=2)])
    ask = getter(run)
    answer = (await ask("/api/runs/run/episodes", q="zebra")).json()
    assert [(row["key"], row["trajectories"]) for row in answer["rows"]] == [("train/2/g/0/1", 2)]
    found = (await ask("/api/runs/run/episode", key="train/2/g/0/0")).json()
    assert found["trajectories"] == ["train/2/g/0/0", "train/2/g/0/1"]
    assert found["conversation"][0]["text"] == "only in the fork: zebra"
    around = (await ask("/api/runs/run/around", key="train/2/g/0/0")).json()
    assert around["index"] == 0


async def test_hostile_text_is_plain_text_in_json(tmp_path: Path, quickstart_model: Path) -> None:
    from agentloop.chat import load_tokenizer

    run = make_run(tmp_path / "run", quickstart_model, steps=1)
    made = episode(load_tokenizer(str(quickstart_model)), "</script>", 0, task=1, version=0, answer=HOSTILE)
    made.messages[0]["content"] = HOSTILE + "\ud800"
    made.logprobs = [math.nan if value is not None else None for value in made.logprobs]
    TraceStore(run).write(2, "train", [record(2, made)])
    ask = getter(run)
    key = "train/2/</script>/0/0"
    for path, asked in (("episodes", {"q": "script"}), ("episode", {"key": key}), ("tokens", {"key": key})):
        answer = await ask(f"/api/runs/run/{path}", **asked)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["x-content-type-options"] == "nosniff"
        answer.json()
    assert (await ask("/api/runs/run/episode", key=key)).json()["answer"] == HOSTILE


async def test_images_are_sent_as_images_and_as_nothing_else(tmp_path: Path, quickstart_model: Path) -> None:
    from agentloop.chat import load_tokenizer

    run = make_run(tmp_path / "run", quickstart_model, steps=1)
    made = episode(load_tokenizer(str(quickstart_model)), "g", 0, task=1, version=0)
    made.messages[0]["content"] = [{"type": "image", "image": png()}, {"type": "text", "text": "see"}]
    TraceStore(run).write(2, "train", [record(2, made)])
    ask = getter(run)
    message = (await ask("/api/runs/run/episode", key="train/2/g/0/0")).json()["conversation"][0]
    (digest,) = message["images"]
    assert message["text"] == "see"
    answer = await ask(f"/api/runs/run/image/{digest}")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
    assert answer.content.startswith(b"\x89PNG")
    assert "sandbox" in answer.headers["content-security-policy"]

    script = run / "traces" / "images" / f"{'0' * 64}.svg"
    script.write_text("<svg onload='alert(1)'/>")
    answer = await ask(f"/api/runs/run/image/{'0' * 64}")
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["content-disposition"].startswith("attachment")
    secret = tmp_path / "secret.png"
    secret.write_text("secret")
    (run / "traces" / "images" / f"{'1' * 64}.png").symlink_to(secret)
    assert (await ask(f"/api/runs/run/image/{'1' * 64}")).status_code == 404
    assert (await ask(f"/api/runs/run/image/{'2' * 64}")).status_code == 404
    assert (await ask("/api/runs/run/image/nothing")).status_code == 400


@pytest.mark.parametrize(
    ("path", "parameters", "says"),
    [
        ("episodes", {"lim": "3"}, "no parameter 'lim'"),
        ("episodes", {"limit": "501"}, "limit=501 is out of bounds"),
        ("episodes", {"limit": "1e3"}, "not a whole number"),
        ("episodes", {"offset": "-1"}, "out of bounds"),
        ("episodes", {"sort": "reward; DROP TABLE episodes"}, "cannot be sorted by"),
        ("episodes", {"sort": ["reward", "step"]}, "given 2 times"),
        ("episodes", {"status": "broken"}, "status='broken' is not a choice"),
        ("episodes", {"step": "two"}, "neither a step nor a range"),
        ("episodes", {"min_reward": "nan"}, "not a finite number"),
        ("episodes", {"q": "..."}, "no word to look for"),
        ("episodes", {"q": "x" * 401}, "401 characters"),
        ("episodes", {"q": "-only"}, "no word to look for"),
        ("episodes", {"task_id": "x" * 2001}, "2001 characters"),
        ("episodes", {"task_id": ["x"] * 101}, "given 101 times"),
        ("episode", {}, "key is missing"),
        ("episode", {"key": "../../etc/passwd"}, "not the key"),
        ("episode", {"key": "train/1"}, "not the key"),
        ("episode", {"key": "train/-1/g/0/0"}, "not the key"),
        ("episode", {"key": "train/99999999999999/g/0/0"}, "not the key"),
        ("tokens", {"key": KEY, "start": "5", "end": "4"}, "out of bounds"),
        ("tokens", {"key": KEY, "end": "20000"}, "at most 16384"),
        ("metrics", {"points": "0"}, "out of bounds"),
        ("group", {"group_id": "g"}, "step is missing"),
        ("group", {"step": "1", "group_id": "g", "split": "test"}, "not a choice"),
        ("task", {}, "task_id is missing"),
        ("failures", {"x": "1"}, "no parameter"),
    ],
)
async def test_a_wrong_request_is_refused_with_its_reason(
    get: Get, path: str, parameters: dict[str, Any], says: str
) -> None:
    answer = await get(f"/api/runs/sums/{path}", **parameters)
    assert answer.status_code == 400, answer.text
    found = answer.json()
    assert says in f"{found['detail']} {found['fix']}"


@pytest.mark.parametrize(
    ("path", "parameters"),
    [
        ("/api/runs/other", {}),
        ("/api/runs/..", {}),
        ("/api/runs/%2e%2e%2fsums/failures", {}),
        ("/api/runs/sums/episode", {"key": "train/1/nothing/0/0"}),
        ("/api/runs/sums/episode", {"key": "train/1/../../../../etc/passwd/0/0"}),
        ("/api/runs/sums/episode", {"key": "eval/1/g/0/0"}),
        ("/api/runs/sums/group", {"step": "1", "group_id": "nothing"}),
        ("/api/runs/sums/task", {"task_id": "nothing"}),
        ("/api/runs/sums/unknown", {}),
    ],
)
async def test_what_is_not_there_is_not_found(get: Get, path: str, parameters: dict[str, Any]) -> None:
    assert (await get(path, **parameters)).status_code == 404


async def test_a_cut_file_is_named_and_the_others_are_served(tmp_path: Path, quickstart_model: Path) -> None:
    run = make_run(tmp_path / "run", quickstart_model)
    path = run / "traces" / "step_2" / "train.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    ask = getter(run)
    answer = (await ask("/api/runs/run/episodes", limit=500)).json()
    assert answer["total"] == 16
    assert [problem["file"] for problem in answer["problems"]] == ["step_2/train.parquet"]
    assert "damaged" in answer["problems"][0]["problem"]
    found = await ask("/api/runs/run/episode", key="train/2/train/2/0/0/0")
    assert (found.status_code, "cut or damaged" in found.json()["detail"]) == (404, True)


async def test_new_steps_appear_and_rewound_ones_vanish(
    tmp_path: Path, quickstart_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentloop.viewer.api.run.REFRESH_EVERY_S", 0.0)
    run = make_run(tmp_path / "run", quickstart_model, steps=2)
    ask = getter(run)
    assert (await ask("/api/runs/run/episodes", limit=0)).json()["total"] == 16
    write_step(run, 3, quickstart_model)
    assert (await ask("/api/runs/run/episodes", limit=0)).json()["total"] == 24
    TraceStore(run).rewind(1)
    answer = (await ask("/api/runs/run/episodes", limit=0, q="answer")).json()
    assert (answer["total"], answer["facets"]["step"]) == (8, [1, 1])


async def test_a_trajectory_whose_columns_differ_in_length_is_shown(tmp_path: Path, quickstart_model: Path) -> None:
    from agentloop.chat import load_tokenizer
    from agentloop.trace.record import TraceRecord

    run = make_run(tmp_path / "run", quickstart_model, steps=1)
    made = episode(load_tokenizer(str(quickstart_model)), "g", 0, task=1, version=0, status=EpisodeStatus.REJECTED)
    made.error, made.broken_rule = "columns differ", "columns"
    made.loss_mask, made.logprobs, made.versions = made.loss_mask[:-3], [*made.logprobs, None], []
    TraceStore(run).write(2, "train", [TraceRecord(2, "train", 2, 0, 1, made)])
    ask = getter(run)
    (row,) = (await ask("/api/runs/run/episodes", status="rejected")).json()["rows"]
    assert (row["broken_rule"], row["cause"]) == ("columns", "columns differ")
    found = (await ask("/api/runs/run/episode", key=row["key"])).json()
    tokens = (await ask("/api/runs/run/tokens", key=row["key"])).json()
    for name in ("ids", "pieces", "mask", "logprobs", "versions"):
        assert len(tokens[name]) == found["length"] == len(made.token_ids)
    assert tokens["mask"][-3:] == [0, 0, 0]
    assert (tokens["trainer_logprobs"], tokens["advantages"]) == (None, None)
