"""Made-up people, with a passage about each: for a first try without a download.

Nobody can know where they were born; the passages say it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from agentloop.data import write_rows

Row = dict[str, Any]

FIRST = ("Ada", "Bela", "Cleo", "Dario", "Edda", "Falk", "Gerda", "Hugo", "Ines", "Jonas")
LAST = ("Abel", "Brandt", "Conti", "Dorn", "Ekman", "Forst", "Galli", "Holm", "Ivers", "Jansen")
PLACES = ("Arles", "Bergen", "Cadiz", "Delft", "Erfurt", "Fano", "Ghent", "Hamar", "Ivrea", "Jena")
TRADES = ("a painter", "a chemist", "a sailor", "a poet", "an architect", "a baker", "a surveyor", "a violinist")

TRAIN_ROWS, TEST_ROWS, SFT_ROWS = 64, 16, 80
QUESTION = "Where was {name} born?"


def people() -> list[tuple[str, str, str]]:
    """Return (name, place, trade) of a hundred people, in an order that says nothing."""
    rng = random.Random("people")
    names = [f"{first} {last}" for first in FIRST for last in LAST]
    rng.shuffle(names)
    return [(name, rng.choice(PLACES), rng.choice(TRADES)) for name in names]


def passages() -> list[Row]:
    """Return the corpus: a passage about each of them."""
    return [
        {"id": str(number), "contents": f'"{name}"\n{name} was {trade}, born in {place}.'}
        for number, (name, place, trade) in enumerate(people())
    ]


def questions(split: str) -> list[Row]:
    """Return rows with the columns of the published sets; nobody is in both splits."""
    found = people()[:TEST_ROWS] if split == "test" else people()[TEST_ROWS:][:TRAIN_ROWS]
    return [{"question": QUESTION.format(name=name), "golden_answers": [place]} for name, place, _ in found]


def conversations() -> Iterator[Row]:
    """Yield conversations for `smoke_sft.yaml`: a call with the question, a passage, an answer."""
    folder = Path(__file__).parent
    entries = OmegaConf.to_container(OmegaConf.load(folder / "smoke_tools.yaml"))["tools"]
    tools = [entry["tool_schema"] for entry in entries]
    system = OmegaConf.load(folder / "smoke_prompt.yaml").system
    rng = random.Random("conversations")
    known = people()[TEST_ROWS:]
    for _ in range(SFT_ROWS):
        name, place, trade = rng.choice(known)
        question = QUESTION.format(name=name)
        function = {"name": "search", "arguments": {"query_list": [question]}}
        messages = [
            {"role": "system", "content": system},
            {"role": "user", "content": question},
            {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]},
            {"role": "tool", "content": f'Doc 1 (Title: "{name}")\n{name} was {trade}, born in {place}.'},
            {"role": "assistant", "content": f"<answer>{place}</answer>"},
        ]
        yield {"messages": messages, "tools": tools}


def prepare(out: Path, seed: int = 0) -> dict[str, int]:
    """Write the conversations into folder `out`; return their number by file."""
    return write_rows(out, {"sft.jsonl": list(conversations())})
