"""A broken entry point is named with its reason; a listing still shows the others."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

from agentloop import registry
from agentloop.agent import loading
from agentloop.errors import RegistryError

GROUP = registry.AGENTS


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> list[EntryPoint]:
    """The entry points that count as installed during the test."""
    entries: list[EntryPoint] = []
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry for entry in entries if entry.group == group])
    uncached = registry.registered.__wrapped__
    monkeypatch.setattr(registry, "registered", uncached)
    monkeypatch.setattr(loading, "registered", uncached)
    return entries


def test_two_packages_with_one_name_are_named(installed: list[EntryPoint]) -> None:
    installed += [EntryPoint("mine", "a:A", GROUP), EntryPoint("mine", "b:B", GROUP)]
    with pytest.raises(RegistryError, match=r"'mine' is registered twice in agentloop.agents: a:A and b:B"):
        registry.registered(GROUP)


def test_the_same_entry_found_twice_is_one(installed: list[EntryPoint]) -> None:
    installed += [EntryPoint("mine", "a:A", GROUP)] * 2  # an editable install beside its build folder
    assert list(registry.registered(GROUP)) == ["mine"]


def test_an_entry_point_that_cannot_be_imported_says_why(installed: list[EntryPoint]) -> None:
    installed.append(EntryPoint("mine", "no_such_package:Agent", GROUP))
    with pytest.raises(RegistryError, match=r"'mine' \(no_such_package:Agent\) .* ModuleNotFoundError"):
        loading.load_agent("mine")


def test_an_agent_has_to_be_an_agent_loop(installed: list[EntryPoint]) -> None:
    installed.append(EntryPoint("mine", "pathlib:Path", GROUP))
    with pytest.raises(RegistryError, match="subclass of"):
        loading.load_agent("mine")


def test_an_agent_has_to_say_what_it_does(installed: list[EntryPoint]) -> None:
    installed.append(EntryPoint("mine", "agentloop:AgentLoop", GROUP))
    with pytest.raises(RegistryError, match=r"AgentLoop is abstract\n.*write its method run\(\)"):
        loading.load_agent("mine")


def test_the_list_shows_a_broken_agent_beside_the_others(installed: list[EntryPoint]) -> None:
    installed += [
        EntryPoint("broken", "no_such_package:Agent", GROUP),
        EntryPoint("good", "agentloop.agent.tool_agent:ToolAgent", GROUP),
    ]
    rows = {name: summary for name, _, summary in loading.list_agents()}
    assert rows["broken"].startswith("BROKEN: ") and rows["good"].startswith("Offer the recipe's tools")
