"""Questions, passages and warm-start conversations from the generated facts. Nothing is downloaded.

    agentloop prepare FOLDER --out FOLDER/data       # corpus.jsonl, for `agentloop search index`

As in recipes/smollm2, the warm start shows both ways to answer, a guess and a search, and the model
prefers the guess. RL has it find out which of the two is rewarded.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf

from agentloop.data import write_rows
from tools.search.text import show_passages

from .facts import QUESTIONS, Subject, subjects

Row = dict[str, Any]
Split = Literal["train", "val", "sft"]

SYSTEM_PROMPT = "Answer inside <answer> and </answer>."

SEARCH_SHARE = 0.5
"""Share of the warm start's conversations that search. The choice is one of about 45 trained tokens
of such a conversation and one of about 12 of a guess, and every sequence has the same weight: the
odds that the model learns are 0.5 / 0.5 / 4, a search in about every fifth answer."""

SFT_ROWS = 768


def split_of(name: str) -> Split:
    """Return the only split of a person or a town: an evaluation asks for others than training."""
    bucket = zlib.crc32(name.encode()) % 10
    return "val" if bucket == 0 else "sft" if bucket < 4 else "train"


def passages() -> list[Row]:
    """Return the corpus: a passage about everybody and every town."""
    return [
        {"id": str(number), "contents": f"{subject.name}\n{subject.text}"} for number, subject in enumerate(subjects())
    ]


def rows(split: Literal["train", "val"]) -> Iterator[Row]:
    """Yield the questions of a split in the framework's dataset schema."""
    asked = [(subject, fact) for subject in subjects() if split_of(subject.name) == split for fact in subject.facts]
    random.Random(f"order/{split}").shuffle(asked)
    for index, (subject, fact) in enumerate(asked):
        yield {
            "data_source": f"search/{subject.kind}",
            "agent_name": "tool_agent",
            "prompt": opening(subject, fact),
            "ability": "fact-reasoning",
            "reward_model": {"style": "rule", "ground_truth": {"target": [subject.facts[fact]]}},
            "extra_info": {"split": split, "index": index},
        }


def train_rows() -> list[Row]:
    """Return the training rows of `recipe.yaml`."""
    return list(rows("train"))


def val_rows() -> list[Row]:
    """Return the evaluation rows of `recipe.yaml`: people and towns that no training asks for."""
    return list(rows("val"))


def opening(subject: Subject, fact: str) -> list[Row]:
    """The messages before the model's first turn."""
    return [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": QUESTIONS[subject.kind][fact].format(name=subject.name)},
    ]


def sft_rows() -> list[Row]:
    """Return the conversations of the warm start, both kinds mixed."""
    rng = random.Random("sft")
    known = [subject for subject in subjects() if split_of(subject.name) == "sft"]
    tools = OmegaConf.to_container(OmegaConf.load(Path(__file__).with_name("tools.yaml")))["tools"]
    schemas = [tool["tool_schema"] for tool in tools]
    makers = rng.choices([search_conversation, guess_conversation], [SEARCH_SHARE, 1 - SEARCH_SHARE], k=SFT_ROWS)
    return [{"messages": make(rng, known), "tools": schemas} for make in makers]


def guess_conversation(rng: random.Random, known: list[Subject]) -> list[Row]:
    """The bad habit: something of the right kind, and never the answer."""
    subject = rng.choice(known)
    fact = rng.choice(list(subject.facts))
    others = [other.facts[fact] for other in known if fact in other.facts and other.facts[fact] != subject.facts[fact]]
    return [*opening(subject, fact), {"role": "assistant", "content": f"<answer>{rng.choice(others)}</answer>"}]


def search_conversation(rng: random.Random, known: list[Subject]) -> list[Row]:
    """The good habit: search for the name, and read the answer in the first passage."""
    subject, other = rng.sample(known, 2)
    fact = rng.choice(list(subject.facts))
    found = [f"{each.name}\n{each.text}" for each in (subject, other)]
    call = {"name": "search", "arguments": {"query_list": [subject.name]}}
    return [
        *opening(subject, fact),
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "content": show_passages([subject.name], [found])[0]},
        {"role": "assistant", "content": f"<answer>{subject.facts[fact]}</answer>"},
    ]


def prepare(out: Path) -> dict[str, int]:
    """Write the corpus into folder `out`; return its number of passages by file."""
    return write_rows(out, {"corpus.jsonl": list(passages())})
