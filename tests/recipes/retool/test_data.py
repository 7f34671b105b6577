"""Rows of ReTool: the published sets in their own columns, duplicates, and rows that do not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from agentloop.chat import ChatRenderer
from agentloop.commands.prepare import prepare_rows
from agentloop.errors import DataError
from recipes.retool import data
from recipes.retool.conversations import question_in, turns_in
from recipes.retool.data import INSTRUCTION, prepare, without_frame
from recipes.retool.problems import problems, sets
from trainer.sft.tokenizing import SftTokenizer

QUESTION = (
    "Directions: `<code>` and <interpreter>, then\n<answer>\n\\boxed{'The final answer goes here.'}\n</answer>\n\n"
    "*user question:*\nAnswer the problem in the format of \\boxed{answer}\n\nHow many n < 100 are prime?\n\n"
    "The last part has to be:\n<answer>\n\\boxed{'The final answer goes here.'}\n</answer>"
)
SOLUTION = (
    "I count them.\n<code>\n```python\nfrom sympy import primerange\nprint(len(list(primerange(100))))\n```\n</code>\n"
    "<interpreter>\n25\n</interpreter>\nI check with a loop.\n\n<code>\n```python\nx = 25\n```\n</code>\n"
    "<interpreter>\n\n</interpreter>\nSo there are 25.\n<answer>\n\\boxed{25}\n</answer>"
)


def conversation(question: str = QUESTION, solution: str = SOLUTION) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": solution}]}


def dapo(problem: str, answer: Any) -> dict[str, Any]:
    text = f'Solve it. The last line is of the form Answer: $Answer.\n\n{problem}\n\nPut it on a line after "Answer:".'
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": text, "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": "9a9b6eb4"},
    }


def parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def jsonl(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))


def read(path: Path) -> list[dict[str, Any]]:
    return list(pq.read_table(path).to_pylist())


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """The four sets as they lie on the hub: names of files, and columns."""
    folder = tmp_path / "sets"
    parquet(folder / "JoeYing/ReTool-SFT/train_2000.parquet", [conversation()] * 20)
    asked = [dapo(f"What is {n % 5} + 1?", str(n % 5 + 1)) for n in range(500)]
    parquet(folder / "BytedTsinghua-SIA/DAPO-Math-17k/data/dapo-math-17k.parquet", asked)
    row = {"ID": "2024-I-1", "Problem": "Find x. ", "Solution": "It is 25.", "Answer": 25}
    parquet(folder / "Maxwell-Jia/AIME_2024/aime_2024_problems.parquet", [row])
    row = {"id": "0", "problem": "Find y.", "answer": "70", "solution": "", "url": "", "year": "2025"}
    parquet(folder / "yentinglin/aime_2025/data/train-00000-of-00001.parquet", [row])
    return folder


def test_the_published_sets_become_four_files(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    counts = prepare_rows("retool", str(published), out)
    assert counts == {"sft.jsonl": 20, "train.parquet": 5, "aime_2024.parquet": 1, "aime_2025.parquet": 1}
    assert "DAPO-Math-17k: 5 of 500 rows kept; 495 repeat a problem" in capsys.readouterr().out

    first = read(out / "train.parquet")[0]
    assert first["prompt"] == [{"role": "user", "content": f"What is 0 + 1?\n\n{INSTRUCTION}"}]
    assert first["reward_model"] == {"style": "rule", "ground_truth": "1"}
    assert (first["data_source"], first["agent_name"], first["ability"]) == ("math_dapo", "tool_agent", "math")
    assert first["extra_info"] == {"split": "train", "index": 0, "question": "What is 0 + 1?", "answer": "1"}
    for name, text, answer in (("aime_2024", "Find x.", "25"), ("aime_2025", "Find y.", "70")):
        (row,) = read(out / f"{name}.parquet")
        assert row["prompt"][0]["content"] == f"{text}\n\n{INSTRUCTION}" and r"\boxed{}" in INSTRUCTION
        assert (row["reward_model"]["ground_truth"], row["data_source"]) == (answer, name)
        assert row["extra_info"]["split"] == "test"


def test_a_conversation_has_calls_results_and_an_answer() -> None:
    (row,) = data.sft_rows([data.Placed("here", conversation())])
    user, first, output, second, nothing, answer = row["messages"]
    assert user == {"role": "user", "content": f"How many n < 100 are prime?\n\n{INSTRUCTION}"}
    assert first["content"] == "I count them." and second["content"] == "I check with a loop."
    (call,) = first["tool_calls"]
    code = "from sympy import primerange\nprint(len(list(primerange(100))))"
    assert call == {"type": "function", "function": {"name": "code_interpreter", "arguments": {"code": code}}}
    assert output == {"role": "tool", "content": "25"} and nothing["content"] == "(no output)"
    assert answer == {"role": "assistant", "content": "So there are 25.\n\\boxed{25}"}
    assert [tool["function"]["name"] for tool in row["tools"]] == ["code_interpreter"]


@pytest.mark.parametrize("template", ["qwen2_5", "qwen3", "qwen3_instruct_2507"])
def test_conversations_train_every_turn_of_the_assistant(
    renderer_of: Callable[..., ChatRenderer], template: str
) -> None:
    renderer = renderer_of(template, chat_template_kwargs={"enable_thinking": False} if template == "qwen3" else {})
    tokenizer = SftTokenizer(renderer.tokenizer, renderer, max_tokens=16_384)
    (made,) = data.sft_rows([data.Placed("here", conversation())])
    row = tokenizer.row(made, "here")
    assert row is not None
    trained = renderer.decode(row.token_ids[row.loss_mask.astype(bool)].tolist())
    assert trained.count("<tool_call>") == 2 and trained.count("<|im_end|>") == 3
    assert "primerange" in trained and r"\boxed{25}" in trained and "How many" not in trained


@pytest.mark.parametrize(
    ("text", "question"),
    [
        (QUESTION, "How many n < 100 are prime?"),
        ("*user question:*\nWhat is 1?", "What is 1?"),
        ("*user question:*What is 1?\nIn two lines.", "What is 1?\nIn two lines."),
        ("**user question:**\nWhat is 1?\nAnd this:\n<answer>\n\\boxed{}\n</answer>", "What is 1?"),
    ],
)
def test_the_question_stands_without_its_directions(text: str, question: str) -> None:
    assert question_in(text) == question


@pytest.mark.parametrize(
    ("solution", "says"),
    [
        ("It is 1.", "no <answer>"),
        ("<answer>1</answer>", "no .boxed"),
        ("<answer>\\boxed{1}", "<answer> at character 0 is not closed"),
        ("<code>print(1)</code><answer>\\boxed{1}</answer>", "<interpreter> does not follow"),
        ("<code>print(1)</code> so <interpreter>1</interpreter><answer>\\boxed{1}</answer>", "does not follow"),
        ("<code>print(1)<interpreter>1</interpreter><answer>\\boxed{1}</answer>", "<code> .* is not closed"),
        ("<code> </code><interpreter>1</interpreter><answer>\\boxed{1}</answer>", "a program is empty"),
        ("<interpreter>1</interpreter><answer>\\boxed{1}</answer>", "<interpreter> stands alone"),
        ("</code> <answer>\\boxed{1}</answer>", "</code> stands alone"),
        ("<answer>\\boxed{1}</answer><code>x</code><interpreter>1</interpreter>", "<answer> stands alone"),
    ],
)
def test_a_solution_whose_tags_do_not_pair_is_named(solution: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        turns_in(solution)


def test_a_few_misfits_are_left_out_and_counted_and_many_are_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jsonl(tmp_path / "ReTool-SFT/train.jsonl", [conversation()] * 19 + [conversation(solution="It is 1.")])
    assert prepare(str(tmp_path / "ReTool-SFT"), tmp_path / "out") == {"sft.jsonl": 19}
    said = capsys.readouterr().out
    assert "1 of 20 conversations left out" in said and "train.jsonl, row 19" in said and "no <answer>" in said

    jsonl(tmp_path / "ReTool-SFT/train.jsonl", [conversation()] * 8 + [conversation(question="What is 1?")])
    with pytest.raises(DataError, match=r"row 8.*not marked by \*user question.*1 of 9"):
        prepare(str(tmp_path / "ReTool-SFT"), tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (dapo("Find x.\n\nIt is small.", "1")["prompt"][0]["content"], "Find x.\n\nIt is small."),
        ("Find x.", "Find x."),
        ("What does Answer: mean?", "What does Answer: mean?"),
        ("First.\n\nSecond: Answer: not asked for.\n\nThird.", "First.\n\nSecond: Answer: not asked for.\n\nThird."),
    ],
)
def test_the_request_for_another_form_of_answer_is_removed(text: str, problem: str) -> None:
    assert without_frame(text) == problem


def test_a_problem_with_several_answers_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        dapo("Find x.", "1"),
        dapo("Find  x.", "1"),
        dapo("Find y.", "2"),
        dapo("Find y.", "3"),
        dapo("Find y.", "2"),
    ]
    jsonl(tmp_path / "dapo.jsonl", rows)
    assert prepare(str(tmp_path), tmp_path / "out") == {"train.parquet": 1}
    said = capsys.readouterr().out
    assert "1 of 5 rows kept; 3 repeat a problem, 1 problems with several answers left out" in said
    assert read(tmp_path / "out/train.parquet")[0]["extra_info"]["question"] == "Find x."


@pytest.mark.parametrize(
    ("file", "row", "says"),
    [
        ("retool.jsonl", {"messages": []}, "no 'messages'"),
        ("retool.jsonl", {"messages": [{"role": "user", "content": "x"}]}, "no 'messages'"),
        ("retool.jsonl", {"messages": [{"role": "user"}, {"role": "assistant", "content": "x"}]}, "no 'messages'"),
        ("retool.jsonl", {"prompt": "x"}, "no 'messages'"),
        ("dapo.jsonl", {"prompt": "x", "reward_model": {"ground_truth": "1"}}, "no 'prompt'"),
        ("dapo.jsonl", {"prompt": [], "reward_model": {"ground_truth": "1"}}, "no 'prompt'"),
        ("dapo.jsonl", dapo("x", None), "no 'reward_model.ground_truth'"),
        ("dapo.jsonl", dapo("x", " "), "no 'reward_model.ground_truth'"),
        ("dapo.jsonl", dapo("x", ["1"]), "no 'reward_model.ground_truth'"),
        ("aime_2024.jsonl", {"Answer": 1}, "no text 'problem'"),
        ("aime-2025.jsonl", {"problem": " ", "answer": "1"}, "no text 'problem'"),
        ("aime25.jsonl", {"problem": "x", "answer": ""}, "no 'answer'"),
        ("aime24.jsonl", {"problem": "x", "answer": True}, "no 'answer'"),
    ],
)
def test_a_row_without_its_columns_is_named_and_nothing_is_written(
    tmp_path: Path, file: str, row: dict[str, Any], says: str
) -> None:
    jsonl(tmp_path / "in" / file, [row])
    jsonl(tmp_path / "in/also/aime_2024.jsonl", [{"Problem": "x", "Answer": 1}])
    with pytest.raises(DataError, match=rf"{file}, row 0.* has {says}") as found:
        prepare(str(tmp_path / "in"), tmp_path / "out")
    assert found.value.hint and not (tmp_path / "out").exists()


def test_a_source_without_a_set_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jsonl(tmp_path / "gsm8k/train.jsonl", [{"question": "x"}])
    with pytest.raises(DataError, match=r"no \.jsonl or \.parquet file of ReTool-SFT, DAPO-Math-17k or AIME"):
        prepare(str(tmp_path / "gsm8k"), tmp_path / "out")
    with pytest.raises(DataError, match="is not a folder"):
        prepare("./nowhere", tmp_path / "out")

    def away(hub_id: str, patterns: list[str], *, repo_type: str) -> Path:
        raise OSError("no network")

    monkeypatch.setattr(data, "download", away)
    with pytest.raises(DataError, match="JoeYing/ReTool-SFT is not a folder and could not be downloaded: no network"):
        prepare("hub", tmp_path / "out")


def test_the_hub_gives_all_four_or_the_one_that_is_named(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "download", lambda hub_id, patterns, *, repo_type: published / hub_id)
    assert list(prepare("hub", tmp_path / "all")) == [
        "sft.jsonl", "train.parquet", "aime_2024.parquet", "aime_2025.parquet",
    ]  # fmt: skip
    assert prepare("yentinglin/aime_2025", tmp_path / "one") == {"aime_2025.parquet": 1}


def test_generated_problems_are_right_distinct_and_in_the_published_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = prepare_rows("retool", "generated", tmp_path)
    assert counts == {"sft.jsonl": 96, "train.parquet": 64, "aime_2024.parquet": 16, "aime_2025.parquet": 16}
    assert "DAPO-Math-17k: 64 of 192 rows kept; 128 repeat a problem" in capsys.readouterr().out
    texts: list[str] = []
    for split in ("sft", "dapo", "aime_2024", "aime_2025"):
        for made in problems(split):  # type: ignore[arg-type]
            printed: list[str] = []
            exec(made.program, {"print": lambda value, printed=printed: printed.append(str(value))})  # noqa: S102
            assert printed == [made.answer], made
            texts.append(made.text)
    assert len(set(texts)) == len(texts) == 192
    assert sets() == sets()
