"""The report's parts: reading, decoding, geometry, choice of samples, numbers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agentloop.files import read_json_lines
from agentloop.report.figures import trend
from agentloop.report.page import config_groups
from agentloop.report.plots import LinearScale, LogScale, Plot, Series
from agentloop.report.reading import RunRecord, Traced
from agentloop.report.samples import failures, pairs, spread, typical
from agentloop.report.tokens import Shader, load_decoder, shade, stream_pieces
from agentloop.text import clean, finite, hide_override, hide_secrets, number, seconds

Make = Callable[..., dict[str, Any]]


def traced(make: Make, seed: int = 0, **values: Any) -> Traced:
    line = make("q", reward=values.pop("reward", 1.0), tool=False, version=0, rng=random.Random(seed)) | values
    found = Traced.from_json(line, values.get("step", 1))
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        *((0.9341, "0.934"), (38.24, "38.2"), (12.0, "12"), (1234.5, "1234"), (-0.5, "-0.500"), (0.0, "0")),
        *((18_400, "18.4k"), (123_456, "123k"), (2.5e6, "2.5M"), (1.23e-7, "1.2e-7"), (None, "–"), (float("nan"), "–")),
    ],
)
def test_numbers_are_short(value: float | None, shown: str) -> None:
    assert number(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.421, "0.42s"), (1.55, "1.6s"), (59.7, "60s"), (125, "2m 05s"), (3725, "1h 02m"), (None, "–")],
)
def test_durations_are_short(value: float | None, shown: str) -> None:
    assert seconds(value) == shown


def test_clean_text_can_be_encoded_and_moves_no_cursor() -> None:
    text = clean("a\x1b[2J\ud800\u202eb\r\n\tc\x00\x9b")
    assert text == "a␛[2J\ufffd⟨U+202E⟩b␍\n\tc␀\ufffd"
    text.encode()


def test_clean_cuts() -> None:
    assert clean("abcdef", 4) == "abc…"
    assert clean("abcd", 4) == "abcd"


@pytest.mark.parametrize("value", [True, "1", None, float("inf"), 10**400])
def test_only_finite_numbers_are_numbers(value: object) -> None:
    assert finite(value) is None


def test_lines_of_other_writers_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": NaN}\n{"a": "\\ud800"}\n[1]\nnonsense\n\xff\xfe\n{"a": 2}\n{"a": ')
    assert [next(iter(line.values())) for line in read_json_lines(path)][1:] == ["\ud800", 2]


def test_a_step_written_twice_counts_once_and_the_later_line_wins(tmp_path: Path) -> None:
    rows = [{"step": 2, "reward/mean": 0.1}, {"step": 1, "reward/mean": 0.2}, {"step": 2, "reward/mean": 0.3}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row["reward/mean"] for row in RunRecord.read(tmp_path).rows] == [0.2, 0.3]


def test_a_trajectory_with_broken_columns_is_still_shown(make_trajectory: Make) -> None:
    broken = traced(make_trajectory, logprobs=[-1.0, None, "x"], versions=None, loss_mask=[1] * 99, prompt_length=9999)
    n = len(broken.token_ids)
    assert len(broken.mask) == len(broken.logprobs) == len(broken.versions) == n == broken.prompt_length
    assert "model, turn 1" in Shader(None).show(broken).segments[0].label
    assert Traced.from_json({"token_ids": "no"}, 1) is None


def test_unlikely_tokens_have_darker_shades() -> None:
    assert [shade(lp) for lp in (0.0, -0.2, -0.7, -1.6, -3.0, -9.0, None)] == [0, 1, 2, 3, 4, 5, 0]


def test_pieces_join_to_the_decoded_text() -> None:
    raw = "aé🧮".encode() + b"\xff" + b"b"

    def decode(ids: Any) -> str:
        return bytes(ids).decode("utf-8", "replace")

    pieces = stream_pieces(list(raw), decode)
    assert len(pieces) == len(raw)
    assert "".join(pieces) == decode(raw)
    assert pieces[:3] == ["a", "", "é"]


def test_no_tokenizer_is_no_error(tmp_path: Path) -> None:
    assert load_decoder(None, tmp_path) is None
    assert load_decoder(str(tmp_path / "missing"), tmp_path) is None
    assert load_decoder("no such / model", tmp_path) is None
    (tmp_path / "tokenizer.json").write_text("{}")
    assert load_decoder(str(tmp_path), tmp_path) is None


def test_ids_of_no_tokenizer_are_shown_as_ids(make_trajectory: Make) -> None:
    def decode(ids: Any) -> list[str]:
        raise OverflowError

    line = traced(make_trajectory, pieces=None, prompt_length=1)
    assert f"⟨{line.token_ids[0]}⟩" in str(Shader(decode).show(line).segments[0].html)


def test_the_middle_of_a_long_trajectory_is_left_out_and_positions_stay_true(make_trajectory: Make) -> None:
    n = 2000
    long = traced(make_trajectory, token_ids=list(range(n)), loss_mask=[0] * 5 + [1] * (n - 5), logprobs=[-0.1] * n,
                  versions=[1] * n, pieces=None, prompt_length=5)  # fmt: skip
    shown = Shader(None).show(long)
    head, skipped = shown.data["skip"]
    assert [segment.kind for segment in shown.segments] == ["prompt", "sampled", "cut", "sampled"]
    assert shown.data["ids"] == [*range(head), *range(head + skipped, n)]
    assert [segment.label for segment in shown.segments][3] == "model, turn 1 · v1"


def test_turns_are_counted_across_observed_tokens(make_trajectory: Make) -> None:
    line = make_trajectory("q", reward=1.0, tool=True, version=3, rng=random.Random(0))
    found = Traced.from_json(line, 1)
    assert found is not None
    labels = [segment.label for segment in Shader(None).show(found).segments]
    assert labels == ["prompt", "model, turn 1 · v3", "observed", "model, turn 2 · v3"]


def test_linear_ticks_are_round() -> None:
    scale = LinearScale.over(0.03, 0.97, fixed=(False, False), integer=False)
    assert [label for _, label in scale.ticks("")] == ["0.00", "0.25", "0.50", "0.75", "1.00"]
    assert [label for _, label in LinearScale.over(0, 18_500, fixed=(True, False), integer=False).ticks("")][:2] == [
        "0",
        "5k",
    ]
    assert [label for _, label in LinearScale.over(0, 1, fixed=(True, False), integer=True).ticks("")] == ["0", "1"]


def test_the_log_scale_puts_zero_at_the_bottom() -> None:
    scale = LogScale.over([2e-7, 4e-7])
    assert scale(0.0) == 0.0 < scale(2e-7) < scale(4e-7) < 1.0
    assert [label for _, label in scale.ticks("")] == ["1e-7", "1e-6"]
    assert LogScale.over([])(1e-8) > 0


@pytest.mark.parametrize(
    ("values", "before", "value", "note"),
    [
        ([], None, "–", "none"),
        ([1], None, "1", "the only step"),
        ([1, 2], "1", "2", "first step → last step"),
        ([1, 2, 4], "1", "3", "first step → last 2 steps"),
        ([1, 1, 1, 2, 2, 2], "1", "2", "first 3 steps → last 3 steps"),
        ([1] * 3 + [5] * 40 + [2] * 10, "1", "2", "first 3 steps → last 10 steps"),
    ],
)
def test_the_windows_of_a_headline_do_not_overlap(values: list[float], before: str, value: str, note: str) -> None:
    found = trend("Reward", values, "none")
    assert (found.before, found.value, found.note) == (before, value, note)


def test_the_settings_of_an_sft_run_are_compared_with_its_own_defaults() -> None:
    groups = config_groups({"stages": [{"name": "a"}], "shuffle": True, "max_tokens": 77, "loggers": []})
    entries = {entry["key"]: entry["changed"] for group in groups for entry in group["entries"]}
    assert entries["stages"] and entries["max_tokens"] and not entries["shuffle"] and not entries["loggers"]


def test_a_line_breaks_where_values_are_missing_and_a_lone_point_is_a_dot() -> None:
    plot = Plot("t", "", [1, 2, 3, 4, 5], [Series("a", [0.0, 1.0, None, 1.0, None], 1)])
    d = plot.draw()["shapes"][0]["d"]
    assert d.count("M") == 2 and d.endswith("h0")


def test_stacked_areas_add_up_to_the_top() -> None:
    plot = Plot(
        "t", "", [1, 2], [Series("a", [1.0, 2.0], 1, stacked=True), Series("b", [3.0, 2.0], 2, stacked=True)], low=0
    )
    assert plot.draw()["y_ticks"][-1]["label"] == "4"
    assert plot.draw()["shapes"][1]["d"].startswith("M0.0 0.0L1000.0 0.0")


def test_typical_trajectories_span_the_rewards_and_differ_in_task(make_trajectory: Make) -> None:
    lines = [traced(make_trajectory, seed, reward=seed / 11, task_id=f"t{seed // 2}") for seed in range(12)]
    chosen = typical(lines)
    assert len({t.task_id for t in chosen}) == 3
    rewards = [t.reward or 0.0 for t in chosen]
    assert rewards[0] > 0.7 and 0.3 < rewards[1] < 0.7 and rewards[2] < 0.3
    assert typical([]) == []
    assert len(typical(lines[:1])) == 1


def test_the_same_task_is_the_best_match(make_trajectory: Make) -> None:
    first = [traced(make_trajectory, seed, reward=seed / 2, task_id=f"t{seed}") for seed in range(3)]
    last = [traced(make_trajectory, seed + 50, reward=1.0, task_id=f"t{seed}") for seed in range(3)]
    assert [(a and a.task_id, b and b.task_id) for a, b in pairs(first, last)] == [
        ("t2",) * 2,
        ("t1",) * 2,
        ("t0",) * 2,
    ]
    assert pairs(first, [])[0][1] is None


def test_steps_between_leave_out_the_ends() -> None:
    assert spread(list(range(1, 31)), 4) == [5, 12, 19, 26]
    assert spread([1, 2, 3], 4) == [2]
    assert spread([1], 4) == []


def test_causes_that_differ_in_numbers_are_one(make_trajectory: Make) -> None:
    bad = [traced(make_trajectory, seed, status="failed", error=f"port {seed} closed") for seed in range(3)]
    bad.append(traced(make_trajectory, status="rejected", error="short"))
    found = failures(bad)
    assert [(f.status, f.count, f.reason) for f in found] == [("failed", 3, "port 0 closed"), ("rejected", 1, "short")]


def test_settings_that_are_not_the_default_are_marked() -> None:
    groups = config_groups(
        {"seed": 0, "rollout": {"group_size": 99, "batch_size": 32, "token": None}, "odd": {"key": 1}}
    )
    entries = {(group["title"], entry["key"]): entry for group in groups for entry in group["entries"]}
    assert entries["rollout", "group_size"]["changed"] and not entries["rollout", "batch_size"]["changed"]
    assert not entries["recipe", "seed"]["changed"] and entries["odd", "key"]["changed"]
    assert entries["rollout", "token"]["value"] == "null"


def test_line_separators_are_shown_by_their_codes() -> None:
    assert clean("a\u2028b\u2029c") == "a⟨U+2028⟩b⟨U+2029⟩c"


def test_secrets_are_hidden_in_a_config_that_is_nested_deeply() -> None:
    config: Any = {"token": "hidden-one"}
    for _ in range(900):
        config = {"a": config}
    secret = {"headers": config}
    assert "hidden-one" not in repr(hide_secrets(config)) and "hidden-one" not in repr(hide_secrets(secret))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://bob:hidden-one@host:1/x", "http://(hidden)@host:1/x"),
        ("https://hidden-one@host", "https://(hidden)@host"),
        ("http://bob:hidden@hidden-one@host", "http://(hidden)@host"),
        ("http://bob:hidden?one@host", "http://(hidden)@host"),
        ("two: //hidden-one@a, //b:hidden-one@c", "two: //(hidden)@a, //(hidden)@c"),
        ("https://host/@scope/package@1", "https://host/@scope/package@1"),
        ("https://host/?mail=a@b", "https://host/?mail=a@b"),
        ("https://host#a@b", "https://host#a@b"),
        ("a // b@c", "a // b@c"),
    ],
)
def test_users_and_passwords_of_urls_are_hidden(text: str, shown: str) -> None:
    assert hide_secrets({"a": [text]}) == {"a": [shown]}
    assert ("hidden-one" in hide_override(f"url={text}")) is ("hidden-one" in shown)
