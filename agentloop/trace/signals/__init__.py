"""Signals: name what looks wrong in a run, with the episodes behind it.

In: the lines of `metrics.jsonl` and the trace records of the first and the latest steps. Out:
`Signal`s, each a sentence with its value, its bound and the keys of the episodes behind it.

`table.py` holds every rule with its bound and its sentence. `facts.py` takes from each episode what
the rules read, `evidence.py` keeps the facts of the steps that are compared. A rule is a pure
function of the evidence: `rewards.py` (the reward against the evaluation and against its parts),
`repetition.py` (answers and calls), `lengths.py` (length, tool calls, endings, tools that fail),
`mismatch.py` (engine against trainer), `groups.py` (groups without variance, stale groups).
`judge.py` applies them all: to a run directory (`signals_of`), or step by step during a run
(`SignalWatch`).
"""

from agentloop.trace.signals.judge import SignalWatch, judge, signals_and_note, signals_of
from agentloop.trace.signals.table import RULES, Rule, Signal

__all__ = ["RULES", "Rule", "Signal", "SignalWatch", "judge", "signals_and_note", "signals_of"]
