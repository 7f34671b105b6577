"""Mutated recipes through `agentloop check` in this process: each is accepted, or refused with a named error.

AGENTLOOP_FUZZ_EXAMPLES sets the number of examples of each test.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentloop import model_folder
from agentloop.chat import tokenizer as tokenizers
from agentloop.config import Recipe, SftRecipe
from agentloop.config.keys import known_keys
from agentloop.data import hub
from agentloop.errors import AgentloopError, DataError
from trainer.commands import check
from trainer.run.preflight import inputs as preflight
from trainer.sft import tokenizing

EXAMPLES = int(os.environ.get("AGENTLOOP_FUZZ_EXAMPLES", "120"))
FUZZ = settings(
    max_examples=EXAMPLES,
    derandomize="AGENTLOOP_FUZZ_EXAMPLES" not in os.environ,  # the same examples in every run of the suite
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)

WORDS = [
    "", ".", "..", "~", "no", "1e999", "0x1F", "${run.name}", "${nowhere}", "${", "???", "*", "./x.py:y", "hub:a/b",
    "tool_agent", "gsm8k", "true", "null", "a\0b", "\ud800", "x" * 300, "/", "%s", "{}", "[a-", "- ", "&a", "*a",
]  # fmt: skip
PIECES = [
    "\n---\n", "\n<<: *a\n", " &a ", " *a ", "!!binary ", "!!python/object:os.system ", "!!set {a, b}", "\t",
    "\n<<: [{run: 1}, {run: {name: x}}]\n", "\n? [a]\n: b\n", " !!float ", "2026-01-01", " 1_0 ", " 0o17 ",
    "{" * 80, "[" * 500, "\x85", "\ufeff", "\nrun: 1\n", "!!int x", "\n.inf: .nan\n", "%YAML 9.9\n---\n",
]  # fmt: skip
TEXTS = st.one_of(st.text(max_size=12), st.sampled_from(WORDS))
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.integers(-3, 3),
    st.floats(),
    TEXTS,
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=5,
)
KEYS = st.sampled_from(sorted({*known_keys(Recipe), *known_keys(SftRecipe)}))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, repo: Path) -> Iterator[dict[str, Any]]:
    """A valid recipe of each kind in a folder; the tokenizer is loaded and the template proven once."""
    folder = tmp_path_factory.mktemp("fuzz")
    quickstart = repo / "recipes" / "quickstart"
    row = {"prompt": [{"role": "user", "content": "1 + 1"}], "reward_model": {"ground_truth": "2"}}
    (folder / "rows.jsonl").write_text((json.dumps(row) + "\n") * 4)
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    (folder / "sft.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 4)
    (folder / "agent.py").write_text(
        "from agentloop.agent.tool_agent import ToolAgent\nclass Mine(ToolAgent):\n    pass\n"
    )
    train = {
        "seed": 0,
        "run": {"name": "r", "steps": 2},
        "model": {"path": str(quickstart / "model")},
        "data": {"train": "rows.jsonl", "val": "rows.jsonl", "max_prompt_tokens": 128, "default_agent": "mine"},
        "agents": {"mine": {"class": "./agent.py:Mine", "max_assistant_turns": 2}, "tool_agent": {"tool_timeout_s": 5}},
        "tools": str(quickstart / "tools.yaml"),
        "reward": str(quickstart / "reward.py") + ":score",
        "rollout": {"group_size": 4, "batch_size": 4, "sampling": {"max_new_tokens": 32}},
        "trainer": {"optim": {"lr": 1.0e-4}, "algorithm": {"advantage": "grpo", "shaping": {"overlong_buffer": 8}}},
        "eval": {"every": None, "sampling": {"top_p": 0.9}},
        "checkpoint": {"every": 10, "keep": 1},
        "loggers": ["tensorboard"],
    }
    sft = {
        "run": {"name": "s"},
        "model": {"path": str(quickstart / "model")},
        "stages": [{"name": "a", "data": "sft.jsonl", "steps": 2, "optim": {"lr": 1.0e-3, "betas": [0.9, 0.95]}}],
        "max_tokens": 128,
        "lora": None,
    }
    patch = pytest.MonkeyPatch()
    load, prove = tokenizers.load_tokenizer, preflight.prove
    loaded: dict[str, Any] = {}
    proofs: list[Any] = []

    def cached(path: str, **options: Any) -> Any:
        if path not in loaded:
            loaded[path] = load(path, **options)
        return loaded[path]

    def proven(renderer: Any, tools: Any, **options: Any) -> Any:
        if not proofs:
            proofs.append(prove(renderer, tools, **{**options, "count": 1}))
        return proofs[0]

    def offline(*_: Any, **__: Any) -> Any:
        raise OSError("no network in a test")

    def no_hub(*_: Any, **__: Any) -> Any:
        raise DataError("no network in a test", "give a file")

    for module in (preflight, tokenizing):
        patch.setattr(module, "load_tokenizer", cached)
    patch.setattr(preflight, "prove", proven)
    for module in (preflight, check):
        patch.setattr(module, "check_tensors", lambda *_, **__: None)
    patch.setattr(model_folder, "download", offline)
    patch.setattr("agentloop.data.sources.open_hub", no_hub)
    assert hub.HUB == "hub:"
    patch.chdir(folder)
    yield {"folder": folder, "train": train, "sft": sft}
    patch.undo()


def checked(world: dict[str, Any], text: str | bytes, *overrides: str) -> bool:
    """Check a recipe's text: whether it is accepted. Any error but a named one is a failure."""
    file = world["folder"] / "recipe.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    try:
        check.check_command(file, list(overrides), conversations=1)
    except AgentloopError as exc:
        assert exc.message and exc.hint, f"{exc!r} has no fix"
        return False
    return True


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key in data if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ():
        yield (*path, key)
        yield from places(data[key], (*path, key))


def mutate(draw: Any, data: Any) -> Any:
    """Apply one mutation to plain data."""
    spot = draw(st.sampled_from(list(places(data)) or [None]))
    if spot is None:
        return data
    *parents, last = spot
    holder = data
    for key in parents:
        holder = holder[key]
    kind = draw(st.sampled_from(["value", "rename", "delete", "null", "wrap", "move", "add"]))
    if kind == "value":
        holder[last] = draw(VALUES)
    elif kind == "null":
        holder[last] = None
    elif kind == "wrap":
        holder[last] = draw(st.sampled_from([[holder[last]], {"x": holder[last]}, [holder[last]] * 2]))
    elif kind == "delete":
        del holder[last]
    elif kind == "rename" and isinstance(holder, dict):
        swapped = str(last)[1:] + str(last)[:1]
        holder[draw(st.one_of(TEXTS, st.just(swapped), st.just(str(last) + "s")))] = holder.pop(last)
    elif kind == "move" and isinstance(data, dict):
        data[draw(TEXTS)] = copy.deepcopy(holder[last])
    elif kind == "add" and isinstance(data, dict):
        section = data
        *sections, name = draw(KEYS).replace("*", "mine").split(".")
        for key in sections:
            if not isinstance(section.get(key), dict):
                section[key] = {}
            section = section[key]
        section[name] = draw(VALUES)
    return data


def written(data: Any) -> str:
    try:
        return str(yaml.safe_dump(data, allow_unicode=True, sort_keys=False))
    except (yaml.YAMLError, UnicodeError, ValueError):
        return json.dumps(data)


def test_the_unchanged_recipes_are_accepted(world: dict[str, Any]) -> None:
    assert checked(world, written(world["train"])) and checked(world, written(world["sft"]))


@FUZZ
@given(data=st.data())
def test_mutated_recipes(world: dict[str, Any], data: st.DataObject) -> None:
    recipe = copy.deepcopy(world[data.draw(st.sampled_from(["train", "train", "sft"]))])
    for _ in range(data.draw(st.integers(1, 4))):
        recipe = mutate(data.draw, recipe)
    checked(world, written(recipe))


def test_a_number_without_digits_is_an_error_of_the_recipe(world: dict[str, Any]) -> None:
    """yaml raises an IndexError for it."""
    checked(world, written(world["train"]) + "\nx: !!float _\n")


@FUZZ
@given(data=st.data())
def test_mutated_text(world: dict[str, Any], data: st.DataObject) -> None:
    text = written(world[data.draw(st.sampled_from(["train", "sft"]))])
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(text)))
        end = min(len(text), start + data.draw(st.integers(0, 20)))
        piece = data.draw(
            st.one_of(
                TEXTS,
                st.text(st.sampled_from(" \t\n:-[]{}&*!|>'\"#%@`?,<abc019.~"), max_size=12),
                st.sampled_from(PIECES),
            )
        )
        text = text[:start] + piece + text[end:]
    checked(world, text)


@FUZZ
@given(noise=st.binary(max_size=40), cut=st.integers(0, 400))
def test_broken_bytes(world: dict[str, Any], noise: bytes, cut: int) -> None:
    text = written(world["train"]).encode()
    checked(world, text[:cut] + noise + text[cut + len(noise) :])


@FUZZ
@given(data=st.data())
def test_overrides(world: dict[str, Any], data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["train", "sft"]))
    keys = st.one_of(KEYS.map(lambda key: key.replace("*", "0" if kind == "sft" else "mine")), TEXTS)
    values = st.one_of(TEXTS, VALUES.map(lambda value: json.dumps(value, allow_nan=True)))
    overrides = data.draw(st.lists(st.tuples(keys, values).map("=".join), min_size=1, max_size=3))
    checked(world, written(world[kind]), *overrides)


def test_merged_and_aliased_documents(world: dict[str, Any]) -> None:
    text = written(world["train"])
    bomb = "a0: &a0 {x: y}\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9))
    cycle = "a: &a {b: *a}\n"
    deep = "trainer: " + "{optim: " * 90 + "1" + "}" * 90 + "\n"
    for wrong in (bomb + text, cycle + text, text + deep, text + "---\n" + text, "\n" * 2**21, text * 2):
        assert not checked(world, wrong)
    merged = text.replace("run:\n", "base: &base {steps: 3}\nrun:\n  <<: *base\n")
    assert not checked(world, merged), "`base` is no key of a recipe"
    anchored = text.replace("rollout:\n", "rollout: &rollout\n").replace("eval:\n", "eval:\n  max_rows: 2\n")
    assert checked(world, anchored)
