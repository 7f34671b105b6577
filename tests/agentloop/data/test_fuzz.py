"""Whatever stands in a row: it is used, or an error names its row and column."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentloop.agent.loading import Agents
from agentloop.chat import ChatRenderer
from agentloop.data import check_tasks, load_tasks
from agentloop.errors import DataError, UserError
from agentloop.interaction.loading import Interactions
from agentloop.tool.session import Toolset
from agentloop.types import Task
from tests.mutations import fuzzed, mutated

CALL = {"type": "function", "id": "a", "function": {"name": "calculator", "arguments": {"expression": "1 + 1"}}}
ROWS: list[dict[str, Any]] = [
    {
        "data_source": "t",
        "agent_name": "tool_agent",
        "prompt": [{"role": "system", "content": "Answer."}, {"role": "user", "content": "What is 1 + 1?"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "2"},
        "images": [],
        "extra_info": {
            "index": 5,
            "tools_kwargs": {"calculator": {"create_kwargs": {}, "execute_kwargs": {}}},
            "interaction_kwargs": {"name": "gsm8k", "ground_truth": "2"},
        },
    },
    {
        "prompt": [
            {"role": "user", "content": [{"type": "text", "text": "What is 1 + 1?"}]},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "a", "content": "2"},
        ],
        "reward_model": {"ground_truth": 2},
        "extra_info": {"tools_kwargs": '{"calculator": {"create_kwargs": {}}}'},
    },
]
GOOD: dict[str, Any] = {"prompt": [{"role": "user", "content": "hi"}], "reward_model": {"ground_truth": "1"}}

NAMES = {"prompt", "agent_name", "reward_model", "extra_info", "images", "tools_kwargs", "interaction_kwargs"}


@pytest.fixture(scope="module")
def check(renderer: ChatRenderer, calculator: Toolset) -> Any:
    interactions, agents = Interactions(), Agents({})

    def check_rows(sources: list[str]) -> None:
        def of_row(task: Task, where: str) -> None:
            agents.get(task.agent_name, where)
            interactions.check(task, where)
            calculator.check(task, where)

        tasks = load_tasks(sources, "data.train", "tool_agent")
        options: dict[str, Any] = {"limit": 600, "context": 700, "overlong": "drop", "check": of_row}
        found = check_tasks(tasks, "data.train", renderer=renderer, schemas=calculator.schemas, **options)
        for task in found.tasks:  # what was checked can be used
            assert json.dumps(task.prompt, default=str) and isinstance(task.task_id, str)
            for kwargs in task.tool_kwargs("calculator").values():
                assert None not in kwargs.values()

    return check_rows


def expect(check: Any, sources: list[str], row: str, columns: set[str]) -> None:
    try:
        check(sources)
    except UserError as exc:
        assert row in exc.message and exc.hint, exc
        named = {name for name in NAMES if name in exc.message}
        assert named, f"no column is named: {exc}"
        assert named & columns or (named & {"tools_kwargs", "interaction_kwargs"} and "extra_info" in columns), exc


@fuzzed
@given(case=mutated(ROWS))
def test_rows_of_jsonl(check: Any, tmp_path_factory: pytest.TempPathFactory, case: Any) -> None:
    row, columns = case
    folder = tmp_path_factory.getbasetemp()
    lines = [json.dumps(one, default=lambda value: value.decode()) for one in (GOOD, row)]
    (folder / "fuzz.jsonl").write_text("\n".join(lines))
    if "NaN" in lines[1] or "Infinity" in lines[1]:  # Python writes them, JSON has neither
        with pytest.raises(DataError, match=r"row 1 \(line 2\) is not valid JSON"):
            check([str(folder / "fuzz.jsonl")])
        return
    expect(check, [str(folder / "fuzz.jsonl")], "fuzz.jsonl, row 1 (line 2)", columns)


@fuzzed
@given(case=mutated(ROWS))
def test_rows_of_parquet(check: Any, tmp_path_factory: pytest.TempPathFactory, case: Any) -> None:
    row, columns = case
    folder = tmp_path_factory.getbasetemp()
    (folder / "good.jsonl").write_text(json.dumps(GOOD))
    try:
        pq.write_table(pa.Table.from_pylist([row]), folder / "fuzz.parquet")
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return  # parquet has no column for it
    expect(check, [str(folder / "good.jsonl"), str(folder / "fuzz.parquet")], "fuzz.parquet, row 0", columns)


@fuzzed
@given(case=mutated(ROWS))
def test_rows_of_functions(check: Any, tmp_path_factory: pytest.TempPathFactory, case: Any) -> None:
    """Python objects that no file can hold: numpy's, bytes, tuples."""
    row, _ = case
    from agentloop.data.sources import MadeRows, Rows
    from agentloop.data.tasks import Tasks

    tasks = Tasks(Rows([MadeRows("made", [GOOD, row], {}, "data.train")]), "tool_agent")
    try:
        list(tasks)
    except UserError as exc:
        assert "made, row 1" in exc.message and any(name in exc.message for name in NAMES), exc


@fuzzed
@given(data=st.data())
def test_bytes_of_a_file(check: Any, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    text = "\n".join(json.dumps(row) for row in (GOOD, *ROWS)).encode()
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(text)))
        cut = data.draw(st.integers(0, 3))
        put = data.draw(
            st.sampled_from([b"", b"\n", b'"', b"{", b"}", b"\x00", b"\xff", b"\xef\xbb\xbf", b"9" * 25, b"\\ud800"])
        )
        text = text[:place] + put + text[place + cut :]
    file: Path = tmp_path_factory.getbasetemp() / "bytes.jsonl"
    file.write_bytes(text)
    try:
        check([str(file)])
    except UserError as exc:
        assert "bytes.jsonl, row" in exc.message or "has no rows" in exc.message, exc
