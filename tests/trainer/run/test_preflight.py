"""Preflight over a recipe's rows: what it reports, and what the run then uses."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from agentloop.config import Recipe
from agentloop.errors import ConfigError, DataError
from trainer.console.console import Console
from trainer.run.preflight import RunInputs, prepare


def prepared(repo: Path, folder: Path, rows: list[dict[str, Any]], **sections: Any) -> tuple[RunInputs, str]:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": str(folder / "rows.jsonl"), "default_agent": "single_turn_agent", **sections.pop("data", {})}
    model = {"path": str(repo / "recipes" / "quickstart" / "model")}
    recipe = Recipe.model_validate({"run": {"epochs": 2}, "model": model, "data": data, **sections})
    out = io.StringIO()
    return prepare(recipe, Console(out, terminal=False), conversations=2), out.getvalue()


def rows(*texts: str, **columns: Any) -> list[dict[str, Any]]:
    return [
        {"prompt": [{"role": "user", "content": text}], "reward_model": {"ground_truth": text[:3]}, **columns}
        for text in texts
    ]


def test_rows_that_are_left_out_or_cut_are_counted(repo: Path, tmp_path: Path) -> None:
    some = rows("1", "2" * 300, "3")
    limit = {"max_prompt_tokens": 80}
    kept, said = prepared(repo, tmp_path, some, data=limit, rollout={"batch_size": 2})
    assert "data.train: 3 rows name no agent; they run single_turn_agent" in said
    assert "data.train: 1 of 3 rows left out, their prompts are longer than data.max_prompt_tokens 80" in said
    assert [task.ground_truth for task in kept.train] == ["1", "3"] and kept.total_steps == 2 and len(kept.val) == 0
    cut, said = prepared(repo, tmp_path, some, data=limit | {"overlong": "left"})
    assert "data.train: 1 of 3 rows cut" in said and "left out" not in said
    assert len(cut.train) == 3 and "tokens cut ...]" in str(cut.train[1].prompt)


def test_validation_rows_are_cut_before_they_are_looked_at(repo: Path, tmp_path: Path) -> None:
    (tmp_path / "val.jsonl").write_text('{"prompt": [{"role": "user", "content": "1"}]}\n{"prompt": 7}\n')
    val = {"val": str(tmp_path / "val.jsonl")}
    kept, _ = prepared(repo, tmp_path, rows("1"), data=val, eval={"max_rows": 1})
    assert len(kept.val) == 1
    with pytest.raises(DataError, match=r"val.jsonl, row 1 \(line 2\): column 'prompt' is not a list"):
        prepared(repo, tmp_path, rows("1"), data=val)


def test_a_sample_shows_the_answer_of_its_row(repo: Path, tmp_path: Path) -> None:
    from agentloop.types import Trajectory

    kept, _ = prepared(repo, tmp_path, rows("2" * 300, "123"), data={"max_prompt_tokens": 80})
    trajectory = Trajectory([1], [0], [None], [None], 1, task_id="1")
    assert kept.sample(trajectory, 3)["expected"] == "123"
    trajectory.task_id = "another run's"
    assert kept.sample(trajectory, 3)["expected"] is None


def test_a_row_with_an_unknown_interaction_is_named(repo: Path, tmp_path: Path) -> None:
    some = rows("1") + rows("2", extra_info={"interaction_kwargs": {"name": "nobody"}})
    with pytest.raises(
        ConfigError, match=r"data.train: .*rows.jsonl, row 1 .line 2.: column .* names the interaction 'nobody'"
    ):
        prepared(repo, tmp_path, some)


def reward_in(folder: Path, body: str) -> str:
    (folder / "reward.py").write_text(f"def score(task, text, trajectory):\n    return {body}\n")
    return f"{folder / 'reward.py'}:score"


def test_rows_without_the_ground_truth_that_the_reward_reads_are_found(repo: Path, tmp_path: Path) -> None:
    some = [*rows("1", "2"), {"prompt": [{"role": "user", "content": "3"}]}]
    reads = reward_in(tmp_path, "float(task.ground_truth == text)")
    _, said = prepared(repo, tmp_path, some, reward=reads)
    assert (
        "warning: data.train: 1 of 3 rows have no reward_model.ground_truth" in said
        and "rows.jsonl, row 2 (line 3)" in said
    )
    with pytest.raises(
        DataError, match=r"rows.jsonl, row 0 \(line 1\), and every other row, has no reward_model.ground_truth"
    ):
        prepared(repo, tmp_path, some[2:], reward=reads)
    (tmp_path / "own").mkdir()
    _, said = prepared(repo, tmp_path, some[2:], reward=reward_in(tmp_path / "own", "0.0"))
    assert "ground_truth" not in said


def test_a_batch_larger_than_the_data_is_said(repo: Path, tmp_path: Path) -> None:
    _, said = prepared(repo, tmp_path, rows("1", "2", "3"), rollout={"batch_size": 7})
    assert "batch_size 7 is more than the 3 rows of data.train: each row is in a step 2 or 3 times" in said
    _, said = prepared(repo, tmp_path, rows("1", "2"), rollout={"batch_size": 2})
    assert "batch_size" not in said


def test_arguments_of_rows_for_tools_are_checked(repo: Path, tmp_path: Path) -> None:
    some = rows("1", extra_info={"tools_kwargs": {"calculater": {"create_kwargs": {"unit": "F"}}}})
    tools = str(repo / "recipes" / "quickstart" / "tools.yaml")
    with pytest.raises(
        DataError, match=r"row 0 \(line 1\): column 'extra_info.tools_kwargs' names the tool 'calculater'"
    ):
        prepared(repo, tmp_path, some, tools=tools)
    _, said = prepared(repo, tmp_path, some)
    assert "1 row with extra_info.tools_kwargs, but the run has no tools" in said


def test_prompts_over_the_models_context_are_left_out(repo: Path, tmp_path: Path) -> None:
    some = rows("1", "2" * 300)
    kept, said = prepared(repo, tmp_path, some, data={"max_prompt_tokens": 5000}, rollout={"context_length": 80})
    assert len(kept.train) == 1 and "longer than the model's context of 80 tokens" in said


def test_cheap_checks_come_before_the_comparison_of_tensors(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Compared(Exception): ...

    def compare(*_: Any, **__: Any) -> None:
        raise Compared

    monkeypatch.setattr("trainer.run.preflight.inputs.check_tensors", compare)
    model = {"path": str(repo / "recipes" / "quickstart" / "model")}

    def check(some: list[dict[str, Any]]) -> None:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
        data = {"train": str(tmp_path / "rows.jsonl"), "default_agent": "single_turn_agent"}
        recipe = Recipe.model_validate({"run": {"steps": 1}, "model": model, "data": data})
        prepare(recipe, Console(io.StringIO(), terminal=False), conversations=2, compare_tensors=True)

    with pytest.raises(DataError, match="column 'prompt'"):
        check([{"prompt": 7}])
    with pytest.raises(Compared):
        check(rows("1"))


def test_a_missing_file_that_is_beside_the_recipe_is_named(repo: Path, tmp_path: Path) -> None:
    beside = tmp_path / "recipe"
    beside.mkdir()
    (beside / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows("1")))
    model = {"path": str(repo / "recipes" / "quickstart" / "model")}
    for name, says in (("mine.jsonl", f"set data.train={beside}/mine.jsonl"), ("other.jsonl", "")):
        data = {"train": f"/nowhere/{name}", "default_agent": "single_turn_agent"}
        recipe = Recipe.model_validate({"run": {"steps": 1}, "model": model, "data": data}, context={"folder": beside})
        with pytest.raises(DataError, match=f"data.train: /nowhere/{name} does not exist") as caught:
            prepare(recipe, Console(io.StringIO(), terminal=False), conversations=2)
        assert ("beside the recipe" in (caught.value.hint or "")) == bool(says)
        assert says in (caught.value.hint or "")


def test_limits_that_no_row_uses_are_a_warning(repo: Path, tmp_path: Path) -> None:
    _, said = prepared(repo, tmp_path, rows("1"), agents={"tool_agent": {"max_response_tokens": 64}})
    unused = "warning: agents.tool_agent: rows run single_turn_agent, so these limits are not used; "
    assert f"{unused}set data.default_agent: tool_agent" in said
    agents = {"tool_agent": {"max_response_tokens": 64}}
    named = rows("1", agent_name="single_turn_agent")
    wins = f"{unused}a row's agent_name wins over data.default_agent, so write the rows with agent_name: tool_agent"
    _, said = prepared(repo, tmp_path, named, agents=agents)
    assert wins in said and "without that column" not in said
    _, said = prepared(repo, tmp_path, named, agents=agents, data={"default_agent": "tool_agent"})
    assert f"{wins}, or without that column" in said


def test_rows_that_nothing_rewards_are_said(repo: Path, tmp_path: Path) -> None:
    interactions = str(repo / "recipes" / "gsm8k" / "interactions.yaml")
    named = {"interaction_kwargs": {"name": "gsm8k"}}
    _, said = prepared(repo, tmp_path, rows("1", extra_info=named), interactions=interactions)
    assert "nothing seems" not in said

    misspelt = rows("1", "2", extra_info={"interaction_kwarg": {"name": "gsm8k"}, "answer": "3"})
    _, said = prepared(repo, tmp_path, misspelt, interactions=interactions)
    assert "data.train: nothing seems to give a reward" in said
    assert "2 rows with extra_info.interaction_kwarg, which nothing but your own code reads" in said
    assert "did you mean 'interaction_kwargs'?" in said and "extra_info.answer" not in said

    _, said = prepared(repo, tmp_path, misspelt, interactions=interactions, reward=reward_in(tmp_path, "0.0"))
    assert "nothing seems" not in said


def test_tools_with_step_rewards_reward_rows(repo: Path, tmp_path: Path) -> None:
    some = rows("1", extra_info={"tool_kwargs": {}})
    _, said = prepared(repo, tmp_path, some, tools=str(repo / "recipes" / "gsm8k" / "tools.yaml"))
    assert "nothing seems" not in said and "did you mean 'tools_kwargs'?" in said
    _, said = prepared(repo, tmp_path, some, tools=str(repo / "recipes" / "quickstart" / "tools.yaml"))
    assert "nothing seems to give a reward" in said
