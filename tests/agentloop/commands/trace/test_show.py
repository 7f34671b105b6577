"""`agentloop trace show` and `diff`: an episode as people read it."""

from __future__ import annotations

import io
from pathlib import Path

import orjson
import pytest

from agentloop.commands.trace.episode_text import span_tree
from agentloop.commands.trace.printing import Printer
from agentloop.errors import TraceError
from agentloop.faults import Fault
from agentloop.trace.store import TraceStore
from tests.agentloop.commands.trace.support import command, cut, record, write_run


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "small")


def shown(*words: object) -> str:
    result = command(*words)
    assert result.exception is None, result.exception
    return result.stdout


def test_an_episode_has_roles_calls_spans_of_trained_tokens_and_rewards_where_they_fell(run_dir: Path) -> None:
    text = shown("show", run_dir, "train/3/g3-1/1/0")
    lines = text.splitlines()
    assert lines[0] == "train/3/g3-1/1/0"
    assert "row 1" in text and "task row1" in text and "reward 1  parts:  format 0.500  calculator 0.250" in text
    assert "sampled: 6–11 v2, 15–18 v2  staleness 0  mismatch 0.0" in text
    roles = [line.split()[1].rstrip(",") for line in lines if line.startswith("── ")]
    assert roles == ["system", "user", "assistant", "tool", "assistant"]
    turn = lines.index(next(line for line in lines if line.startswith("── assistant, turn 1")))
    assert "tokens 6–11, trained  v2  stop" in lines[turn] and lines[turn].endswith("0.25s")
    assert lines[turn + 1 : turn + 5] == [
        "    │ I shall compute it.",
        "    → calculator (c0)",
        "      expression: 1 + 3",
        "    + reward calculator 0.250",
    ]
    assert "── tool (calculator, c0)" in text


def test_spans_are_a_tree_with_latencies(run_dir: Path) -> None:
    text = shown("show", run_dir, "train/3/g3-1/1/0")
    tree = text[text.index("spans\n") :].splitlines()
    assert tree[1] == "└── episode  1.0s  step=3"
    assert tree[2:5] == ["    ├── turn  0.30s", "    │   └── generate  0.20s", "    ├── tool  0.10s  tool=calculator"]


def test_spans_whose_parents_are_lost_or_form_a_ring_are_shown_once() -> None:
    def span(own: str, parent: str | None, begin: int) -> dict[str, object]:
        times = {"start_ns": begin, "end_ns": begin + 1, "status": "error", "error": "bad", "attributes": {}}
        return {"name": own, "span_id": own, "parent_id": parent, **times}

    tree = span_tree([span("b", "gone", 2), span("a", None, 1), span("a", "a", 3)])
    assert [label.split()[0] for label, _, _ in tree] == ["a", "b"]
    assert tree[1][0].endswith("error: bad") and tree[1][1] == "red"


def test_numbers_of_spans_are_rounded() -> None:
    span = {"name": "reward", "span_id": "a", "parent_id": None, "start_ns": 0, "end_ns": 10**9, "status": "ok"}
    ((label, _, _),) = span_tree([span | {"error": None, "attributes": {"score": -0.1 - 0.05, "n": 3}}])
    assert label == "reward  1.0s  score=-0.150  n=3"


def test_every_token_with_its_numbers(run_dir: Path) -> None:
    text = shown("show", run_dir, "train/3/g3-1/1/0", "--all-tokens")
    assert "left out" not in text
    table = text[text.index("at   id") :].splitlines()
    assert table[1].split() == ["0", "100"]
    assert table[8].split() == ["7", "107", "yes", "2", "-0.250", "-0.260", "0.500"]
    assert "no tokenizer could be loaded" in table[-1]


def test_tokens_begin_at_the_first_sampled_one(run_dir: Path) -> None:
    text = shown("show", run_dir, "train/3/g3-1/1/0", "--tokens")
    assert "left out: 6 tokens before the first sampled one; --all-tokens shows them" in text
    table = text[text.index("at   id") :].splitlines()
    assert table[1].split()[:3] == ["6", "106", "yes"] and table[12].split()[0] == "17"


def test_the_text_of_a_malformed_call_is_shown_cut_and_neutral(tmp_path: Path) -> None:
    made = cut(record(1, 0, 0))
    made.trajectory.turns[0].malformed_calls[0].text = 'calculator(\x1b[31m{"a": 1\nrest ' + "x" * 400
    TraceStore(tmp_path / "run").write(1, "train", [made])
    lines = shown("show", tmp_path / "run", "train/1/g1-0/0").splitlines()
    at = lines.index("    malformed call: not JSON")
    assert lines[at + 1] == '      calculator(␛[31m{"a": 1'
    assert lines[at + 2].startswith("      rest xxx") and lines[at + 2].endswith("x…") and len(lines[at + 2]) < 300


def test_a_run_that_is_not_there_is_answered_with_those_that_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hint = str(command("show", "small", "train/1/g1-0/0").exception.hint)  # type: ignore[union-attr]
    assert "e.g. outputs/quickstart" in hint
    write_run(tmp_path / "outputs" / "small", steps=1)
    (tmp_path / "outputs" / "data").mkdir()
    failure = command("show", "small", "train/1/g1-0/0").exception
    assert isinstance(failure, TraceError)
    assert str(failure.hint).endswith("; found: outputs/small")


def test_ids_have_text_where_the_tokenizer_is_there(run_dir: Path, quickstart_model: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=1)
    (run / "config" / "resolved.json").write_bytes(orjson.dumps({"model": {"path": str(quickstart_model)}}))
    data = orjson.loads(shown("show", run, "train/1/g1-0/0", "--json", "--tokens"))
    assert all(isinstance(piece, str) for piece in data["tokens"]["pieces"])
    assert data["key"] == "train/1/g1-0/0/0" and len(data["tokens"]["ids"]) == data["length"] == 18


def test_a_key_may_leave_out_the_number_of_the_trajectory(run_dir: Path) -> None:
    assert shown("show", run_dir, "train/3/g3-2/1").startswith("train/3/g3-2/1/1\n")
    assert "other trajectories of this episode: train/3/g3-2/1/0" in shown("show", run_dir, "train/3/g3-2/1")


def test_failures_and_cut_turns_are_named(run_dir: Path, tmp_path: Path) -> None:
    assert "error: ToolError: the service is down" in shown("show", run_dir, "train/3/g3-3/1")
    TraceStore(tmp_path).write(1, "train", [cut(record(1, 0, 0))])
    text = shown("show", tmp_path, "train/1/g1-0/0")
    assert "malformed call: not JSON" in text and "length" in text


def test_text_of_models_does_nothing(run_dir: Path) -> None:
    text = shown("show", run_dir, "train/3/g3-3/0")
    assert "\x1b" not in text and "\u202e" not in text and "\x07" not in text
    assert "<script>alert(1)</script>␛[31mred␛]0;title␇ ⟨U+202E⟩gnp.exe [bold]not markup[/bold] :smile:" in text


def test_on_a_terminal_there_are_colours_and_text_of_models_still_does_nothing() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    with pytest.MonkeyPatch.context() as patch:
        for name in ("NO_COLOR", "CI"):
            patch.delenv(name, raising=False)
        patch.setenv("TERM", "xterm-256color")
        patch.setenv("COLUMNS", "40")
        stream = Terminal()
        printer = Printer(stream)
        printer.line(("[bold]\x1b[31m\u202ex", "red"))
        printer.table(("a", "b"), [("1", "long " * 20)])
    first, _, row = stream.getvalue().splitlines()
    assert first == "\x1b[31m[bold]␛[31m⟨U+202E⟩x\x1b[0m"
    assert len(row) == 40 and row.endswith("…")


def test_two_episodes_of_a_group_against_each_other(tmp_path: Path) -> None:
    one, other = record(1, 0, 0), record(1, 0, 1, answer="13")
    other.trajectory.token_ids = [*list(one.trajectory.token_ids)[:16], 7, 8]
    TraceStore(tmp_path).write(1, "train", [one, other])
    text = shown("diff", tmp_path, "train/1/g1-0/0", "train/1/g1-0/1")
    assert any(line.split() == ["reward", "0", "1", "*"] for line in text.splitlines())
    assert any(line.split() == ["turns", "2", "2"] for line in text.splitlines())
    assert "the first 16 tokens are equal, 6 of them sampled; then token 116 (p 0.882) and token 7 (p 0.882)" in text
    assert "-    #### 12\n+    #### 13" in text and "different tasks" not in text
    data = orjson.loads(shown("diff", tmp_path, "train/1/g1-0/0", "train/1/g1-0/1", "--json"))
    assert data["tokens"]["same"] == 16 and data["facts"]["reward"] == [0.0, 1.0] and data["same_task"]


def test_equal_episodes_and_different_tasks_are_said(run_dir: Path) -> None:
    text = shown("diff", run_dir, "train/1/g1-0/0", "train/1/g1-0/0")
    assert "the first 18 tokens are equal, 8 of them sampled\n" in text and "conversations are equal" in text
    assert "different tasks: row0 and row1" in shown("diff", run_dir, "train/1/g1-0/0", "train/1/g1-1/0")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("nonsense", "is not the key of a trajectory"),
        ("train/1/g1-0/7", "has no trajectory"),
        ("train/9/g1-0/0/0", "no train trace of step 9"),
        ("test/1/g/0/0", "is not the key"),
    ],
)
def test_a_key_that_does_not_exist_is_refused(run_dir: Path, key: str, message: str) -> None:
    for words in (("show", run_dir, key), ("diff", run_dir, "train/1/g1-0/0", key)):
        error = command(*words).exception
        assert isinstance(error, TraceError) and message in error.message and error.hint


def test_an_exception_is_shown_with_its_place_and_frames(tmp_path: Path) -> None:
    made = record(1, 0, 0)
    made.trajectory.faults = [
        Fault("the agent planner", "KeyError: 'boom'", "/a.py:3", '  File "/a.py", line 3, in run')
    ]
    TraceStore(tmp_path).write(1, "train", [made])
    text = shown("show", tmp_path, "train/1/g1-0/0")
    assert "exception in the agent planner: KeyError: 'boom' at /a.py:3\n" in text and "line 3, in run" in text


def test_the_key_of_a_group_is_answered_with_its_episodes(run_dir: Path) -> None:
    with pytest.raises(TraceError, match="train/3/g3-1 is a group of") as caught:
        raise command("show", run_dir, "train/3/g3-1").exception
    assert caught.value.hint and "train/3/g3-1/0, train/3/g3-1/1" in caught.value.hint


def test_bounds_that_hold_nothing_are_refused(run_dir: Path) -> None:
    with pytest.raises(TraceError, match="backwards"):
        raise command("list", run_dir, "--step", "3-1").exception
    with pytest.raises(TraceError, match="--min-reward nan"):
        raise command("list", run_dir, "--min-reward", "nan").exception
