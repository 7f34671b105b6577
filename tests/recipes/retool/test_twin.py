"""The twin of retool: what its problems are, what its warm start leaves to learn, and the README's commands."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from agentloop.commands.recipes import copy_recipe
from agentloop.config import Recipe, SftModel
from agentloop.config.loading import load_config
from agentloop.trace.store import TraceStore
from agentloop.types import Task, Trajectory
from recipes.retool.smollm2.reward import score
from recipes.retool.twin import data
from recipes.retool.twin.tokenizer import write_model_folder
from trainer.console.console import Console
from trainer.run.preflight import prepare
from trainer.sft.tokenizing import SftTokenizer

SHORT = {
    "train": [
        "run.steps=1", "rollout.batch_size=2", "rollout.group_size=2", "eval.before_train=false", "eval.every=null",
        "data.val=null",
    ],
    "sft": ["stages.0.steps=1", "stages.1.steps=1", "stages.0.data=few.py:copy", "stages.1.data=few.py:form"],
}  # fmt: skip

FEW_ROWS = """
import random
from recipes.retool.twin.data import conversations, copying

def copy():
    return [copying(random.Random(seed)) for seed in range(64)]

def form():
    return list(conversations(32))
"""


@pytest.fixture(scope="module")
def warm_start() -> list[dict[str, Any]]:
    return list(data.conversations(4000))


@pytest.fixture
def model(repo: Path) -> Path:
    return repo / "recipes/retool/twin/model"


def code_of(row: dict[str, Any]) -> str | None:
    """Return the program of a conversation of the warm start, if it has one."""
    if len(row["messages"]) == 3:
        return None
    return str(row["messages"][2]["tool_calls"][0]["function"]["arguments"]["code"])


def numbers_in(text: str) -> tuple[int, int]:
    """Return the two numbers of a problem from its text."""
    numbers = re.findall(r"\d+", text.replace("99991", ""))
    return int(numbers[0]), int(numbers[-1])


def kind_asked(text: str) -> str:
    """Return the kind of a problem from its text."""
    a, b = numbers_in(text)
    asked = [name for name, kind in data.KINDS.items() for wording in kind.wordings if wording.format(a=a, b=b) == text]
    assert len(asked) == 1, text
    return asked[0]


def kind_written(code: str) -> str:
    """Return the kind of a program, whatever its numbers are."""
    forms = {kind.program.format(a="N", b="N"): name for name, kind in data.KINDS.items()}
    return forms[re.sub(r"\b\d{2,3}\b", "N", code)]


# -- problems --------------------------------------------------------------------------------------


def test_each_program_prints_the_answer() -> None:
    rng = random.Random(0)
    found = [data.problem(rng, "train") for _ in range(60)]
    programs = [(problem, kind) for problem in found for kind in data.KINDS]
    code = "\n".join(problem.program(kind) for problem, kind in programs)
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.split() == [str(problem.printed(kind)) for problem, kind in programs]
    assert {problem.kind for problem in found} == set(data.KINDS)
    for problem in found:
        task = Task("row", "tool_agent", [], ground_truth=str(problem.answer))
        text = f"\\boxed{{{problem.printed(problem.kind)}}}"
        assert score(task, text, Trajectory([], [], [], [], 0)) == 1.0


def test_no_problem_is_in_two_splits_and_all_wordings_are_in_each(warm_start: list[dict[str, Any]]) -> None:
    train, val = ([row["prompt"][1]["content"] for row in rows] for rows in (data.train_rows(), data.val_rows()))
    warm = {row["messages"][1]["content"] for row in warm_start}
    assert len(set(train)) == data.TRAIN_ROWS and len(set(val)) == data.TEST_ROWS
    assert not set(train) & set(val) and not warm & set(train) and not warm & set(val)
    assert train == [row["prompt"][1]["content"] for row in data.train_rows()]
    for texts in (train, val):
        wordings = {re.sub(r"\d+", "", text) for text in texts}
        assert len(wordings) == sum(len(kind.wordings) for kind in data.KINDS.values())


def test_only_the_words_of_a_problem_tell_its_kind() -> None:
    """Numbers of one kind are those of any other, and another kind's program gives another answer."""
    found = list(data.problems("train", 1500))
    means = {}
    for kind in data.KINDS:
        own = [problem for problem in found if problem.kind == kind]
        assert len(own) > 180
        means[kind] = sum(problem.a for problem in own) / len(own), sum(problem.b for problem in own) / len(own)
    for a, b in means.values():
        assert abs(a - 55) < 7 and abs(b - 175) < 11
    other = [
        problem.printed(kind) == problem.answer for problem in found for kind in data.KINDS if kind != problem.kind
    ]
    assert sum(other) / len(other) < 0.001


# -- the warm start --------------------------------------------------------------------------------


def test_the_warm_start_mostly_guesses_and_its_programs_mostly_solve_another_problem(
    warm_start: list[dict[str, Any]],
) -> None:
    programs, right, guessed = 0, Counter[str](), 0
    for row in warm_start:
        asked, code = kind_asked(row["messages"][1]["content"]), code_of(row)
        answer = row["messages"][-1]["content"].removeprefix("\\boxed{").removesuffix("}")
        a, b = numbers_in(row["messages"][1]["content"])
        if code is None:
            guessed += int(answer) == data.KINDS[asked].answer(a, b)
            continue
        programs += 1
        written = kind_written(code)
        right[asked] += written == asked
        assert code == data.KINDS[written].program.format(a=a, b=b)
        assert row["messages"][3]["content"] == answer == str(data.KINDS[written].answer(a, b))
    share = data.HINT_SHARE + (1 - data.HINT_SHARE) / len(data.KINDS)
    assert abs(programs / len(warm_start) - data.PROGRAM_SHARE) < 0.03
    assert abs(right.total() / programs - share) < 0.04
    assert guessed / (len(warm_start) - programs) < 0.01
    assert set(right) == set(data.KINDS)


def test_copying_shows_the_same_numbers_in_another_order() -> None:
    rng = random.Random(1)
    for _ in range(200):
        row = data.copying(rng)
        first, second = row["text"].splitlines()
        assert sorted(first.rstrip(".").split(", ")) == sorted(second.rstrip(".").split(", "))
        assert row["text"][: row["loss_from"]] == first


# -- the model -------------------------------------------------------------------------------------


def test_the_tokenizer_is_built_again_the_same_and_a_digit_is_a_token(model: Path, tmp_path: Path) -> None:
    write_model_folder(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (model / name).read_bytes(), name
    made, saved = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, model))
    same = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "tie_word_embeddings")
    assert {key: saved[key] for key in same} == {key: made[key] for key in same}
    assert sum(file.stat().st_size for file in model.iterdir()) < 5_000_000

    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode("4711").tokens == list("4711")
    words = {word for kind in data.KINDS.values() for text in kind.wordings for word in re.findall(r" [a-z]+", text)}
    assert [word for word in words if len(tokenizer.encode(word).ids) > 1] == []


def test_the_model_guesses_or_runs_any_program_and_copies_numbers(model: Path) -> None:
    """What reinforcement learning starts from."""
    from transformers import Qwen2ForCausalLM

    lm = Qwen2ForCausalLM.from_pretrained(model).eval()
    assert sum(tensor.numel() for tensor in lm.parameters()) <= 1_000_000
    tokenizer = SftTokenizer.load(SftModel(path=str(model)), 1024)

    def likelihood(messages: list[dict[str, Any]]) -> float:
        """Return the probability of the last turn, given what is before it."""
        found = tokenizer.row({"messages": messages, "tools": data.tool_schemas()}, "row")
        assert found is not None
        ids = torch.from_numpy(found.token_ids).long()[None]
        with torch.no_grad():
            logits = lm(input_ids=ids).logits[0, :-1]
        chances = logits.softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        trained = torch.from_numpy(found.loss_mask)[1:]
        last = int(torch.nonzero(~trained)[-1]) + 1
        return float(chances[last:].prod())

    any_program, right_program, copied = [], [], []
    for problem in data.problems("test", 40):
        opening = data.opening(problem.text)
        chances = {kind: likelihood([*opening, data.call(problem.program(kind))]) for kind in data.KINDS}
        any_program.append(sum(chances.values()))
        right_program.append(chances[problem.kind])
        result = {"role": "tool", "content": str(problem.answer)}
        boxed = {"role": "assistant", "content": f"\\boxed{{{problem.answer}}}"}
        copied.append(likelihood([*opening, data.call(problem.program(problem.kind)), result, boxed]))
    assert 0.25 < sum(any_program) / 40 < 0.5
    assert 0.05 < sum(right_program) / 40 < 0.25
    assert sum(copied) / 40 > 0.75


# -- the recipe ------------------------------------------------------------------------------------


def readme(repo: Path) -> list[list[str]]:
    """The words of the README's commands that name the twin."""
    blocks = re.findall(r"^```\n(.*?)^```", (repo / "recipes/retool/README.md").read_text(), re.MULTILINE | re.DOTALL)
    (block,) = [block for block in blocks if "twin/recipe.yaml" in block]
    return [line.split("  #")[0].split() for line in block.splitlines() if line.strip()]


@pytest.mark.recipe
@pytest.mark.usefixtures("bubblewrap")
def test_the_readmes_commands_train_the_twin_against_the_real_sandbox(repo: Path, tmp_path: Path) -> None:
    (tmp_path / "few.py").write_text(FEW_ROWS)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ran = []
    with ExitStack() as stack:
        for words in readme(repo):
            ran.append(" ".join(words[1:3]))
            command = [sys.executable, *(["-m"] if words[0] == "agentloop" else []), *words[words[0] == "python" :]]
            if words[-1] == "&":
                command[-2:] = ["0"]  # --port 8080 &
                server = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, env=environment)
                stack.callback(server.wait)
                stack.callback(server.kill)
                assert server.stdout is not None
                environment["SANDBOX_URL"] = server.stdout.readline().removeprefix("sandbox:").strip()
                continue
            if "recipes.bounds" in words:
                command = command[:4]  # one step keeps no bounds
            done = subprocess.run(
                [*command, *SHORT.get(words[1], [])], cwd=tmp_path, capture_output=True, text=True, env=environment
            )
            assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert len(ran) == 7 and ran[0] == "recipes copy"

    (line,) = (tmp_path / "outputs/retool-twin/metrics.jsonl").read_text().splitlines()
    step = json.loads(line)
    assert step["step"] == 1 and step["episode/failed"] == 0 and step["mismatch/logprob_abs_mean"] < 1e-4
    records = list(TraceStore(tmp_path / "outputs/retool-twin").records(1, "train"))
    assert len(records) == 4 and {record.trajectory.reward for record in records} <= {0.0, 1.0}
    assert (tmp_path / "curve.svg").read_text().startswith("<svg ")
    assert (tmp_path / "outputs/retool-twin-sft/model/model.safetensors").is_file()


def test_the_twin_passes_the_checks_before_a_run_without_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy_recipe("retool", tmp_path / "mine")
    with Console() as console:
        inputs = prepare(load_config(Recipe, tmp_path / "mine/twin/recipe.yaml"), console)
    assert len(inputs.train) == data.TRAIN_ROWS and "warning" not in "".join(capsys.readouterr())
