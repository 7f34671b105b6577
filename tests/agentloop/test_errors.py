"""Errors keep their hint across processes and show it."""

from __future__ import annotations

import pickle

import pytest

from agentloop import errors

ALL = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, errors.AgentloopError)]


@pytest.mark.parametrize("kind", ALL)
def test_an_error_survives_pickling_with_its_hint(kind: type[errors.AgentloopError]) -> None:
    again = pickle.loads(pickle.dumps(kind("what happened", "what to do")))
    assert type(again) is kind
    assert str(again) == "what happened\n  fix: what to do"


def test_every_error_is_in_the_tree_at_the_top_of_the_module() -> None:
    assert errors.__doc__ is not None
    for kind in ALL:
        assert kind.__name__ in errors.__doc__


def test_a_broken_rule_crosses_processes() -> None:
    again = pickle.loads(pickle.dumps(errors.TokenLawError("what", "do", errors.LawRule.TRAINED_TWICE)))
    assert (again.rule, again.hint) == (errors.LawRule.TRAINED_TWICE, "do")
