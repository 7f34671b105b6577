"""Each rule fires on a planted case, names the episodes behind it, and is silent on a healthy one."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from agentloop.trace.record import TraceRecord
from agentloop.trace.signals import RULES, judge
from agentloop.trace.signals.evidence import Evidence
from agentloop.trace.signals.judge import FUNCTIONS, unjudged
from agentloop.types import Span, StopReason, ToolCall
from tests.agentloop.trace.signals.support import GROUPS, SAMPLES, STEPS, failed, fired, is_late, row, rows, run


def flat(step: int) -> float:
    return 0.4 + 0.01 * (step % 3)


def test_the_table_and_the_functions_have_the_same_rules_in_the_same_order() -> None:
    assert [function.__name__ for function in FUNCTIONS] == list(RULES)


def test_a_healthy_run_has_no_signals() -> None:
    assert judge(run()) == []


# -- rewards


def evals(gain: float) -> list[dict[str, Any]]:
    lines = rows(STEPS, reward__mean=lambda step: 0.2 + 0.03 * step)
    for line in [row(0), *lines]:
        if line["step"] % 5 == 0:
            line["eval/reward_mean"] = 0.2 + gain * line["step"]
    return lines


def test_reward_up_while_evaluation_is_flat() -> None:
    signal = fired(run(lines=evals(0.0)))["reward_without_eval"]
    assert signal.value == 0 and signal.step == STEPS
    assert "the evaluation by 0" in signal.sentence
    assert "reward_without_eval" not in fired(run(lines=evals(0.03)))


def test_reward_that_is_flat_too_says_nothing_about_the_evaluation() -> None:
    lines = evals(0.0)
    assert "reward_without_eval" not in fired(run(lines=[line | {"reward/mean": 0.4} for line in lines]))


def test_an_evaluation_that_was_good_before_training_stalls() -> None:
    """The last half counts: the evaluation rose first, then stood still while the reward rose on."""
    lines = rows(60, reward__mean=lambda step: 0.1 + 0.012 * step)
    for line in lines:
        if line["step"] % 10 == 0:
            line["eval/reward_mean"] = min(0.4, 0.1 + 0.012 * line["step"])
    assert "reward_without_eval" in fired(Evidence(lines))


def by_format(made: TraceRecord, step: int, group: int, sample: int) -> None:
    t = made.trajectory
    has_form = is_late(step) or sample == 0
    correct = float(group == 0 and sample == 0)
    t.reward_parts = {"format_tags": 1.0 if has_form else 0.0, "correct": correct}
    t.reward = 0.2 * t.reward_parts["format_tags"] + correct


def test_reward_from_format_alone() -> None:
    lines = rows(STEPS, reward__mean=lambda step: 0.05 + 0.01 * step, reward__std=lambda step: 0.2)
    signal = fired(run(by_format, lines))["format_reward"]
    assert "format_tags" in signal.sentence and "correct" in signal.sentence
    assert signal.value == pytest.approx(1.0, abs=0.05)


def test_reward_from_both_format_and_correctness_is_healthy() -> None:
    def both(made: TraceRecord, step: int, group: int, sample: int) -> None:
        by_format(made, step, group, sample)
        t = made.trajectory
        t.reward_parts["correct"] = float(is_late(step) and sample > 1)
        t.reward = 0.2 * t.reward_parts["format_tags"] + t.reward_parts["correct"]

    assert "format_reward" not in fired(run(both))


def test_parts_that_do_not_add_up_to_the_reward_say_nothing() -> None:
    def noise(made: TraceRecord, step: int, group: int, sample: int) -> None:
        by_format(made, step, group, sample)
        made.trajectory.reward = float(np.random.default_rng((step, group, sample)).normal())

    assert "format_reward" not in fired(run(noise))


# -- lengths and calls


def test_length_that_runs_away() -> None:
    lines = rows(STEPS, reward__mean=flat, episode__response_tokens_mean=lambda step: 60 * 1.12**step)

    def longer(made: TraceRecord, step: int, group: int, sample: int) -> None:
        made.trajectory.prompt_length = 1 if (group, sample) == (3, 2) else 10

    signal = fired(run(longer, lines))["length_runaway"]
    assert signal.value > 2
    assert signal.keys[0].endswith("-3/2/0")


def test_length_that_grows_with_the_reward_is_healthy() -> None:
    lines = rows(STEPS, episode__response_tokens_mean=lambda step: 60 * 1.12**step)
    assert "length_runaway" not in fired(run(lines=lines))


def test_tool_calls_that_run_away() -> None:
    lines = rows(STEPS, reward__mean=flat, episode__tool_calls_mean=lambda step: 0.5 + 0.3 * step)
    signal = fired(run(lines=lines))["calls_runaway"]
    assert signal.value > 2 and signal.keys
    lines = rows(STEPS, reward__mean=flat, episode__tool_calls_mean=lambda step: 1.0 + 0.02 * step)
    assert "calls_runaway" not in fired(run(lines=lines))


def test_turns_that_end_in_length() -> None:
    def cut(made: TraceRecord, step: int, group: int, sample: int) -> None:
        if is_late(step) and sample < 2:
            made.trajectory.turns[-1].stop_reason = StopReason.LENGTH

    signal = fired(run(cut))["length_stops"]
    assert signal.value == pytest.approx(0.25)
    assert all(key.split("/")[-2] in "01" for key in signal.keys)


def test_length_endings_that_become_rare_are_healthy() -> None:
    def cut_early(made: TraceRecord, step: int, group: int, sample: int) -> None:
        if sample < (1 if is_late(step) else 3):
            made.trajectory.turns[-1].stop_reason = StopReason.LENGTH
            made.trajectory.turns[0].stop_reason = StopReason.LENGTH

    assert "length_stops" not in fired(run(cut_early))


def test_length_endings_are_read_from_the_metrics_without_records() -> None:
    lines = rows(STEPS, stop__length=lambda step: 2 * step)
    signal = fired(Evidence(lines))["length_stops"]
    assert "episodes" in signal.sentence and signal.keys == ()


def failing(rate: float) -> Any:
    def change(made: TraceRecord, step: int, group: int, sample: int) -> None:
        if is_late(step) and (group * SAMPLES + sample) % 100 < rate * 100:
            made.trajectory.spans[0].status = "error"

    return change


def test_a_tool_that_fails_more_than_before() -> None:
    def other(made: TraceRecord, step: int, group: int, sample: int) -> None:
        failing(0.3)(made, step, group, sample)
        made.trajectory.spans.append(Span("tool", "f" * 16, "0" * 16, 0, 1, attributes={"tool": "search"}))

    signal = fired(run(other))["tool_failures"]
    assert "of calc" in signal.sentence and signal.value > 0.25
    assert "tool_failures" not in fired(run(failing(0.05)))


def test_tools_that_fail_less_than_before_are_healthy() -> None:
    lines = rows(STEPS, episode__tool_errors_mean=lambda step: 0.8 - 0.04 * step)
    assert "tool_failures" not in fired(Evidence(lines))
    lines = rows(STEPS, episode__tool_errors_mean=lambda step: 0.04 * step)
    assert "tool_failures" in fired(Evidence(lines))


# -- repetition


def test_one_answer_over_groups() -> None:
    def same(made: TraceRecord, step: int, group: int, sample: int) -> None:
        if group % 2 and is_late(step):
            made.trajectory.answer = "42"

    signal = fired(run(same))["repeated_answer"]
    assert "'42'" in signal.sentence and signal.value == pytest.approx(0.5)
    groups = [key.split("/")[2] for key in signal.keys]
    assert len(set(groups)) == min(len(groups), 25)


def test_a_choice_between_few_answers_is_healthy() -> None:
    def choice(made: TraceRecord, step: int, group: int, sample: int) -> None:
        made.trajectory.answer = "yes" if (group + sample) % 3 else "no"

    assert "repeated_answer" not in fired(run(choice))


def test_always_the_same_of_few_answers_is_not() -> None:
    def yes(made: TraceRecord, step: int, group: int, sample: int) -> None:
        made.trajectory.answer = "yes" if group else "no"

    assert "repeated_answer" in fired(run(yes))


def test_last_words_that_were_always_the_same_are_healthy() -> None:
    def done(made: TraceRecord, step: int, group: int, sample: int) -> None:
        made.trajectory.answer, made.trajectory.turns[-1].text = None, "Done."

    assert "repeated_answer" not in fired(run(done))

    def collapses(made: TraceRecord, step: int, group: int, sample: int) -> None:
        if is_late(step):
            done(made, step, group, sample)

    assert "repeated_answer" in fired(run(collapses))


def test_one_task_sampled_again_and_again_may_have_one_answer() -> None:
    def one_task(made: TraceRecord, step: int, group: int, sample: int) -> None:
        made.trajectory.task_id, made.trajectory.answer = "the only row", "42"

    assert "repeated_answer" not in fired(run(one_task))


def test_one_call_over_groups() -> None:
    def same(made: TraceRecord, step: int, group: int, sample: int) -> None:
        if is_late(step) and sample:
            made.trajectory.turns[0].tool_calls[0].arguments = {"b": 1, "a": 2} if group % 2 else {"a": 2, "b": 1}

    signal = fired(run(same))["repeated_call"]
    assert 'calc({"a": 2, "b": 1})' in signal.sentence and signal.value == pytest.approx(0.75)


def test_a_call_without_arguments_may_be_made_everywhere() -> None:
    def listing(made: TraceRecord, step: int, group: int, sample: int) -> None:
        made.trajectory.turns[0].tool_calls[0].arguments = {}

    assert "repeated_call" not in fired(run(listing))


def test_a_call_repeated_in_a_row() -> None:
    def loops(times: int, *, from_the_start: bool = False) -> Any:
        def change(made: TraceRecord, step: int, group: int, sample: int) -> None:
            if sample == 0 and (is_late(step) or from_the_start):
                made.trajectory.turns[0].tool_calls = [
                    ToolCall("calc", {"x": 1 + group}, f"c{i}") for i in range(times)
                ]

        return change

    signal = fired(run(loops(3)))["call_loop"]
    assert signal.value == pytest.approx(0.25) and all(key.endswith("/0/0") for key in signal.keys)
    assert "call_loop" not in fired(run(loops(2)))
    assert "call_loop" not in fired(run(loops(3, from_the_start=True))), "some tasks need repeated calls"


def collapse(made: TraceRecord, step: int, group: int, sample: int) -> None:
    if is_late(step):
        made.trajectory.answer = f"guess {group} {step}"


def test_fewer_distinct_answers_without_a_gain() -> None:
    signal = fired(run(collapse, rows(STEPS, reward__mean=flat)))["fewer_answers"]
    assert signal.value <= 0.5 and signal.keys
    assert "fewer_answers" not in fired(run(lines=rows(STEPS, reward__mean=flat)))


def test_groups_that_agree_because_they_are_right_are_healthy() -> None:
    def solved(made: TraceRecord, step: int, group: int, sample: int) -> None:
        collapse(made, step, group, sample)
        if is_late(step):
            made.trajectory.reward = 1.0

    assert "fewer_answers" not in fired(run(solved, rows(STEPS, reward__mean=flat)))


# -- groups


def equal(value: float) -> Any:
    def change(made: TraceRecord, step: int, group: int, sample: int) -> None:
        if is_late(step):
            made.trajectory.reward = value

    return change


def test_groups_without_variance() -> None:
    lines = rows(STEPS, reward__zero_std_share=lambda step: 0.9)
    signal = fired(run(equal(0.0), lines))["equal_groups"]
    assert signal.severity == "warning" and signal.value == pytest.approx(0.9) and signal.keys
    assert "equal_groups" not in fired(run(lines=rows(STEPS, reward__zero_std_share=lambda step: 0.5)))


def test_groups_that_are_solved_are_only_a_notice() -> None:
    signal = fired(run(equal(1.0), rows(STEPS, reward__zero_std_share=lambda step: 0.9)))["equal_groups"]
    assert signal.severity == "notice" and "solved" in signal.sentence


def test_equal_rewards_without_a_trace_are_only_a_notice() -> None:
    signal = fired(Evidence(rows(STEPS, reward__zero_std_share=lambda step: 0.9)))["equal_groups"]
    assert signal.severity == "notice" and signal.keys == ()


def test_stale_groups() -> None:
    def old(versions: int) -> Any:
        def change(made: TraceRecord, step: int, group: int, sample: int) -> None:
            t = made.trajectory
            t.versions = [None if v is None else v - versions for v in t.versions]

        return change

    signal = fired(run(old(3)))["stale_groups"]
    assert signal.value == 3 and signal.severity == "notice"
    assert "stale_groups" not in fired(run(old(1)))


# -- mismatch


def drift(made: TraceRecord, at: Any, by: float) -> None:
    assert made.trainer_logprobs is not None
    made.trainer_logprobs[at] += by


def test_mismatch_that_grows_over_the_steps() -> None:
    def grows(made: TraceRecord, step: int, group: int, sample: int) -> None:
        drift(made, slice(None), 0.002 * step)

    signal = fired(run(grows))["mismatch_growth"]
    assert signal.value > 3 and signal.keys


def test_mismatch_that_grows_is_read_from_the_metrics_without_records() -> None:
    lines = rows(STEPS, mismatch__logprob_abs_mean=lambda step: 0.002 * step)
    assert "mismatch_growth" in fired(Evidence(lines))
    stale = [line | {"staleness/max": 1} for line in lines]
    assert "mismatch_growth" not in fired(Evidence(stale)), "older tokens differ because the policy has changed"


def test_noise_of_the_arithmetic_may_grow() -> None:
    def noise(made: TraceRecord, step: int, group: int, sample: int) -> None:
        drift(made, slice(None), 1e-5 * step)

    assert not any("mismatch" in name for name in fired(run(noise)))


def test_tokens_of_older_versions_are_not_compared() -> None:
    def stale(made: TraceRecord, step: int, group: int, sample: int) -> None:
        drift(made, slice(None), 0.01 * step)
        made.trajectory.versions = [None if v is None else v - 1 for v in made.trajectory.versions]

    assert not any("mismatch" in name for name in fired(run(stale)))


def test_mismatch_that_grows_from_turn_to_turn() -> None:
    def second_turn(made: TraceRecord, step: int, group: int, sample: int) -> None:
        drift(made, slice(made.trajectory.turns[1].start, None), 0.05)

    signal = fired(run(second_turn))["mismatch_by_turn"]
    assert "turn 2" in signal.sentence

    def all_turns(made: TraceRecord, step: int, group: int, sample: int) -> None:
        drift(made, slice(None), 0.05)

    assert "mismatch_by_turn" not in fired(run(all_turns))


def test_mismatch_that_grows_along_the_response() -> None:
    def long(by: float) -> Any:
        def change(made: TraceRecord, step: int, group: int, sample: int) -> None:
            if sample:
                return
            t, length = made.trajectory, 700
            t.token_ids, t.loss_mask = [7] * length, [0] * 10 + [1] * (length - 10)
            t.logprobs = [None] * 10 + [-0.5] * (length - 10)
            t.versions = [None] * 10 + [step - 1] * (length - 10)
            t.turns = [t.turns[0]]
            made.trainer_logprobs = np.full(length, -0.501, np.float32)
            drift(made, slice(10 + 512, None), by)

        return change

    signal = fired(run(long(-0.1)))["mismatch_by_position"]
    assert "From token 512" in signal.sentence
    assert signal.keys[0].endswith("/0/0")
    assert "mismatch_by_position" not in fired(run(long(0.0)))


def test_mismatch_that_lies_on_one_token() -> None:
    def one_token(by: float) -> Any:
        def change(made: TraceRecord, step: int, group: int, sample: int) -> None:
            made.trajectory.token_ids[20] = 3
            drift(made, 20, by)

        return change

    signal = fired(run(one_token(0.5)))["mismatch_by_token"]
    assert "token 3" in signal.sentence and signal.value > 0.9
    assert "mismatch_by_token" not in fired(run(one_token(1e-4)))


# -- failures


def failing_groups(tenth: int) -> Any:
    def change(made: TraceRecord, step: int, group: int, sample: int) -> None:
        if group < tenth and is_late(step):
            made.trajectory = failed(made.trajectory)

    return change


def test_episodes_that_fail() -> None:
    signal = fired(run(failing_groups(2)))["failed_episodes"]
    assert signal.value == pytest.approx(0.2) and signal.keys[0].startswith(f"train/{STEPS}/")
    assert fired(run(failing_groups(0))) == {}
    few = rows(STEPS, episode__failed=lambda step: 1)  # the metrics count; a cut trace keeps what failed
    assert "failed_episodes" not in fired(run(failing_groups(2), few))
    one = {"step": 1, "episode/count": 8, "episode/failed": 6, "episode/rejected": 2}
    assert fired(Evidence([one]))["failed_episodes"].value == 1


def test_a_run_that_is_too_short_says_so() -> None:
    assert unjudged(run(steps=2)) == "Too few steps to judge (5 needed, 2 so far)"
    assert "10 needed, 7 so far" in unjudged(run(steps=7))
    assert unjudged(run()) == "" == unjudged(Evidence([{"step": 1, "loss": 0.5}]))


# -- robustness


@pytest.mark.parametrize("steps", [0, 1, 2, 4, 5, 9])
def test_short_runs_are_judged_without_an_error(steps: int) -> None:
    assert judge(run(steps=steps) if steps else Evidence([])) == []


def test_metrics_may_lack_keys_or_hold_no_numbers() -> None:
    broken = [{"step": step} for step in range(30)]
    odd = [{"step": step, "reward/mean": math.nan, "reward/std": None, "eval/reward_mean": "x"} for step in range(30)]
    assert judge(Evidence(broken)) == judge(Evidence(odd)) == []
    steps = run().steps
    for key in row(1):
        lines = rows()
        for line in lines[::2]:
            line[key] = math.nan if key != "step" else line[key]
        for line in lines[1::3]:
            del line[key]
        assert judge(Evidence(lines, steps)) == [], key


def test_episodes_that_failed_or_have_odd_numbers_are_left_out() -> None:
    def odd(made: TraceRecord, step: int, group: int, sample: int) -> None:
        t = made.trajectory
        if sample == 0:
            made.trajectory = failed(t)
            made.trajectory.versions, made.trajectory.turns[0].stop_reason = ["odd"], "odd"
        if sample == 1:
            t.reward_parts = {"format": math.nan}
            t.answer, t.turns = None, []
            made.trainer_logprobs = None
        if sample == 2:
            made.trainer_logprobs = np.zeros(3, np.float32)

    assert list(fired(run(odd))) == ["failed_episodes"]
    assert len(run(odd).late[0].episodes) == GROUPS * SAMPLES
