"""Every rule with its bound and its sentence, in one table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

Severity = Literal["warning", "notice"]

MOST_KEYS = 20
"""Episodes that a signal names."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule of the table.

    Attributes:
        bound: the value from which on the rule fires; its meaning is in the sentence.
        sentence: for the reader; `{value}`, `{bound}` and the rule's own numbers are filled in.
    """

    name: str
    bound: float
    title: str
    sentence: str
    severity: Severity = "warning"


@dataclass(frozen=True, slots=True)
class Signal:
    """One thing that looks wrong.

    Attributes:
        rule: name of the rule, as in `RULES`.
        sentence: what was seen, why it matters, and what to look at.
        step: the latest step that was judged.
        keys: `TraceRecord.key` of episodes behind it, the most telling first; may be empty.
    """

    rule: str
    title: str
    sentence: str
    value: float
    bound: float
    severity: Severity
    step: int
    keys: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the signal as JSON data."""
        return {**asdict(self), "keys": list(self.keys)}


_TABLE = (
    Rule(
        "reward_without_eval",
        0.2,
        "Training reward rises, evaluation does not",
        "From step {first} to step {step} the training reward rose by {gain:.3g} and the evaluation by "
        "{eval_gain:.3g}, less than {bound:.0%} of it. The policy learns its training rows by heart, or exploits the "
        "reward: read episodes of high reward",
    ),
    Rule(
        "format_reward",
        0.8,
        "The reward comes from format alone",
        "{value:.0%} of the gain in reward since step {first} comes from {format_parts}, and {other_gain:.1%} from "
        "{other_parts}. The policy learns the form of an answer, not the answer: lower the weight of the form",
    ),
    Rule(
        "length_runaway",
        2.0,
        "Responses grow without a gain in reward",
        "Responses have {late:.0f} tokens, {value:.1f} times as many as at their shortest ({early:.0f}), and the "
        "reward did not rise. Look for repetition at the end of the longest episodes",
    ),
    Rule(
        "calls_runaway",
        2.0,
        "Tool calls multiply without a gain in reward",
        "An episode makes {late:.1f} tool calls, {value:.1f} times as many as at the fewest ({early:.1f}), and the "
        "reward did not rise. Check what a call can earn, and max_calls_per_episode",
    ),
    Rule(
        "repeated_answer",
        0.3,
        "One answer is given to different tasks",
        "{value:.0%} of the groups answer {what} most often, over {tasks} different tasks. The policy has collapsed to "
        "one answer, or the reward accepts it everywhere",
    ),
    Rule(
        "repeated_call",
        0.5,
        "One tool call is made for different tasks",
        "{value:.0%} of all tool calls are {what}, over {tasks} different tasks. The call does not depend on the task",
    ),
    Rule(
        "call_loop",
        0.2,
        "Episodes repeat one tool call",
        "{value:.0%} of the episodes make the same tool call {times} times or more in a row, most often {what}. The "
        "result is not used, or the tool's answer does not say what to do instead",
    ),
    Rule(
        "fewer_answers",
        0.5,
        "Answers within a group become the same",
        "A group that is not solved gives {late:.0%} distinct answers, where it gave {early:.0%} in the first steps, "
        "and the reward did not rise. The policy stops exploring: raise the temperature, add an entropy bonus, "
        "lower the learning rate",
    ),
    Rule(
        "equal_groups",
        0.8,
        "Groups without variance",
        "{value:.0%} of the groups have equal rewards, so that a group baseline learns nothing from them. {cause}",
    ),
    Rule(
        "length_stops",
        0.2,
        "Turns end because their tokens ran out",
        "{value:.0%} of the {unit} end in `length`, before the model ended them (first steps: {early:.0%}). Their "
        "answers are cut: raise max_new_tokens or max_response_tokens, or read why they do not end",
    ),
    Rule(
        "tool_failures",
        0.15,
        "Tools fail more often than before",
        "{late:.0%} of the calls{tool} fail; in the first steps {early:.0%} did. Either the policy calls wrongly, or "
        "the tool's service has changed",
    ),
    Rule(
        "failed_episodes",
        0.1,
        "Episodes fail",
        "{failed:.0f} of the latest {count:.0f} episodes failed or were rejected ({value:.0%}), and nothing is learned "
        "from them. Read the errors: `agentloop trace list {run} --status failed`{log}",
    ),
    Rule(
        "mismatch_growth",
        3.0,
        "Engine and trainer drift apart",
        "The mean |logprob difference| between engine and trainer is {late:.3g}, {value:.1f} times that of the first "
        "steps ({early:.3g}){fresh}. Check dtypes, the weights' publishing, and the learning rate",
    ),
    Rule(
        "mismatch_by_turn",
        3.0,
        "Mismatch grows from turn to turn",
        "In turn {turn} the mean |logprob difference| is {late:.3g}, {value:.1f} times that of the first turn "
        "({early:.3g}). The engine and the trainer see different tokens in later turns: check the chat template's "
        "continuation and prefix caching",
    ),
    Rule(
        "mismatch_by_position",
        3.0,
        "Mismatch grows along the response",
        "From token {position} of the response on the mean |logprob difference| is {late:.3g}, {value:.1f} times that "
        "of its first tokens ({early:.3g}). Check position encoding (rope scaling) and the precision of the KV cache",
    ),
    Rule(
        "mismatch_by_token",
        0.3,
        "A few tokens carry the mismatch",
        "{value:.0%} of the mismatch lies on {tokens}, which are {share:.1%} of the sampled tokens: their mean "
        "|logprob difference| is {late:.3g}, that of all tokens {early:.3g}. Check special tokens, the vocabulary's "
        "padding and masked logits",
    ),
    Rule(
        "stale_groups",
        2.0,
        "Groups are trained late",
        "The oldest token of a group is {value:.1f} policy versions behind on average. Lower rollout.max_staleness, or "
        "choose a correction (trainer.algorithm.correction)",
        "notice",
    ),
)

RULES: dict[str, Rule] = {rule.name: rule for rule in _TABLE}


def signal(
    name: str, value: float, step: int, keys: Iterable[str] = (), severity: Severity | None = None, **numbers: object
) -> Signal:
    """Return the signal of a rule that fires.

    Args:
        keys: episodes behind it, the most telling first.
        numbers: what the rule's sentence names beside `value` and `bound`.
    """
    rule = RULES[name]
    sentence = rule.sentence.format(value=value, bound=rule.bound, step=step, **numbers)
    chosen = tuple(dict.fromkeys(keys))[:MOST_KEYS]
    return Signal(name, rule.title, sentence, float(value), rule.bound, severity or rule.severity, step, chosen)
