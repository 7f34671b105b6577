"""`agentloop trace list`: filters, order, text that is neutral, what is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import orjson
import pytest

from agentloop.errors import TraceError
from agentloop.trace.store import TraceStore
from tests.agentloop.commands.trace.support import command, write_run
from tests.agentloop.trace.store.support import step_records


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "small")


def keys(*words: object) -> list[str]:
    shown = command("list", *words, "--json")
    assert shown.exception is None, shown.exception
    return [row["key"] for row in orjson.loads(shown.stdout)["rows"]]


def test_every_episode_has_one_line_and_the_newest_step_is_first(run_dir: Path) -> None:
    found = keys(run_dir)
    assert len(found) == len(set(found)) == 3 * 3 * 2 + 2 + 1
    assert found[0] == "train/3/g3-0/0/0" and found[-1] == "train/1/g1-2/1/0"
    assert "train/3/g3-2/1/1" in found and "train/3/g3-2/1/0" not in found, "the main trajectory stands for its episode"


def test_filters(run_dir: Path) -> None:
    assert {key.split("/")[1] for key in keys(run_dir, "--step", "1-2")} == {"1", "2"}
    assert keys(run_dir, "--split", "eval") == ["eval/3/g3-0/0/0"]
    assert keys(run_dir, "--status", "failed") == ["train/3/g3-3/1/0"]
    assert {key.split("/")[3] for key in keys(run_dir, "--min-reward", "0.5")} == {"1"}
    assert {key.split("/")[3] for key in keys(run_dir, "--max-reward", "0.5")} == {"0"}
    assert len(keys(run_dir, "--task", "row1")) == 6


def test_search_reads_messages_answers_and_errors(run_dir: Path) -> None:
    assert keys(run_dir, "--search", "what is 2 + 1?") == ["train/1/g1-2/0/0", "train/1/g1-2/1/0"]
    assert keys(run_dir, "--search", "SERVICE IS DOWN") == ["train/3/g3-3/1/0"]
    assert keys(run_dir, "--search", "alert(1)</script>") == ["train/3/g3-3/0/0"]
    assert keys(run_dir, "--search", ".*") == []


def test_steps_of_a_run_are_named_once(run_dir: Path) -> None:
    failure = command("list", run_dir, "--step", "7").exception
    assert isinstance(failure, TraceError) and failure.hint == "steps that have one: 1, 2, 3"


def test_a_run_of_sft_has_no_episodes(tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "resolved.json").write_bytes(orjson.dumps({"stages": [{"name": "a", "data": "rows.jsonl"}]}))
    with pytest.raises(TraceError, match=r"is a run of `agentloop sft`.*it has no episodes"):
        raise command("list", tmp_path).exception or AssertionError


def test_order_and_limit(run_dir: Path) -> None:
    assert {key.split("/")[3] for key in keys(run_dir, "--sort", "-reward", "--limit", "5")} == {"1"}
    assert keys(run_dir, "--sort", "step", "--limit", "1") == ["train/1/g1-0/0/0"]
    shown = command("list", run_dir, "--limit", "2")
    assert "2 of 21 episodes" in shown.stdout
    with pytest.raises(TraceError, match="did you mean 'reward'"):
        raise command("list", run_dir, "--sort", "rewrd").exception or AssertionError


def test_text_of_models_is_neutral_and_complete_in_a_pipe(run_dir: Path) -> None:
    shown = command("list", run_dir, "--search", "alert").stdout
    assert "\x1b" not in shown and "\u202e" not in shown
    assert "<script>alert(1)</script>␛[31mred" in shown and "[bold]not markup[/bold] :smile:" in shown
    assert len(shown.strip().splitlines()) == 2


def test_without_an_answer_the_last_words_are_shown(run_dir: Path, tmp_path: Path) -> None:
    store, copy = TraceStore(run_dir), TraceStore(tmp_path)
    records = store.records(1, "train")
    for made in records:
        made.trajectory.answer = None
    copy.write(1, "train", records)
    assert "#### 12" in command("list", tmp_path).stdout


def test_a_cut_trace_is_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    path = TraceStore(run).path(2, "train")
    path.write_bytes(path.read_bytes()[:-20])
    left = path.with_name("eval.parquet.tmp")
    left.write_bytes(b"half")
    shown = command("list", run, "--json")
    data = orjson.loads(shown.stdout)
    assert {row["step"] for row in data["rows"]} == {1, 3}
    assert [str(path) in problem or str(left) in problem for problem in data["problems"]] == [True, True]
    shown = command("list", run)
    assert (
        "cut or damaged" in shown.stderr
        and "is not complete: it is being written, or the process was killed" in shown.stderr
    )


@pytest.mark.parametrize(
    ("words", "message", "fix"),
    [
        (("nowhere",), "nowhere does not exist", "directory of a run"),
        (("{empty}",), "holds no traces", "trace.train_every"),
        (("{run}", "--step", "9"), "no trace of step 9", "1, 2, 3"),
        (("{run}", "--step", "1", "--split", "eval"), "no eval trace of step 1", "that have one: 3"),
        (("{run}", "--step", "x"), "is not a step", "--step 3-9"),
    ],
)
def test_what_cannot_be_listed_is_said(
    run_dir: Path, tmp_path: Path, words: tuple[str, ...], message: str, fix: str
) -> None:
    shown = command("list", *(word.format(run=run_dir, empty=tmp_path) for word in words))
    assert isinstance(shown.exception, TraceError)
    assert message in shown.exception.message
    assert shown.exception.hint is not None and any(part in shown.exception.hint for part in fix.split("|"))


COMMANDS = [
    ("list",),
    ("show", "train/1/g1-0/0"),
    ("diff", "train/1/g1-0/0", "train/1/g1-0/1"),
    ("export", "--format", "jsonl", "--out", "-"),
    ("rescore",),
    ("import",),
    ("push", "--to", "otlp"),
]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[0])
def test_the_runs_around_a_path_that_is_not_one_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    runs = [write_run(tmp_path / "runs" / name, steps=1) for name in ("one", "two")]
    (tmp_path / "file").touch()
    (tmp_path / "runs" / ".agentloop-traces").mkdir()

    def refusal(path: str) -> TraceError:
        name, *options = words
        at = 0 if name != "push" else 2
        failure = command(name, *options[:at], path, *options[at:]).exception
        assert isinstance(failure, TraceError), failure
        return failure

    for path, message, hint in [
        ("runs", "runs is a folder of runs", "give one of them: runs/"),
        ("runs/one/traces", "runs/one/traces is inside a run", "give the run: runs/one"),
        ("runs/one/traces/step_1/train.parquet", "is inside a run", "give the run: runs/one"),
        ("runs/one/step_9", "runs/one/step_9 does not exist", "give the run: runs/one"),
        ("runs/three", "runs/three does not exist", "runs/one"),
        ("file", "file is a file", "directory of a run"),
    ]:
        found = refusal(path)
        assert message in found.message and found.hint is not None and hint in found.hint, path
    monkeypatch.chdir(runs[0] / "traces")
    assert refusal(".").hint == f"give the run: {runs[0]}"


def test_an_error_ends_with_2_and_a_sentence_and_a_pipe_has_no_colours(run_dir: Path) -> None:
    environment = os.environ | {"FORCE_COLOR": "", "COLUMNS": "20"}
    code = "from agentloop.commands.main import main; main()"

    def program(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code, "trace", *words], capture_output=True, text=True, env=environment, check=False
        )

    wrong = program("list", "nowhere")
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: nowhere does not exist\n  fix: ")
    right = program("list", str(run_dir))
    assert right.returncode == 0 and "\x1b" not in right.stdout and "answer or last words" in right.stdout


def test_a_reward_that_found_no_answer_does_not_hide_what_the_model_wrote(tmp_path: Path) -> None:
    records = step_records(1, groups=1, samples=2)
    records[0].trajectory.answer, records[1].trajectory.answer = " ", "42"
    TraceStore(tmp_path).write(1, "train", records)
    shown = command("list", str(tmp_path)).stdout
    assert records[0].trajectory.turns[-1].text in shown and "42" in shown
