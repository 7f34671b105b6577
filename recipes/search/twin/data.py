"""A knowledge base of 10,000 passages, questions that only it answers, and a warm start.

    agentloop prepare search/twin --out DIR       # corpus.jsonl, and shuffled.jsonl of the control

A passage is about one of 8,000 people or 2,000 towns. All of it is drawn from a seed:

    "Aldor Branby"                                        "Port Arford"
    works as a "baker", lives in "Port Arford".           river "Alme", makes "salt".

Half of the questions take one search, the others two, since only a town's own passage names its
river:

    Where does "Aldor Branby" live?                       -> Port Arford
    On which river does "Aldor Branby" live?              -> Alme

Names stand in quotation marks wherever they are read, so that a name is always the same tokens.

The warm start teaches the form alone: to call the tool with a name that was read, or with any
other, to go on or to stop, and to copy a fact out of the last passage; nearly all of it whatever
was asked. Its passages are invented row by row and hold no fact of the knowledge base. What to
search for, when to search again, and what to answer is left to reinforcement learning.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf

from agentloop.data import write_rows

Row = dict[str, Any]
Split = Literal["train", "test"]


def _joined(first: str, second: str) -> tuple[str, ...]:
    """Return each part of `first` with each of `second`."""
    return tuple("".join(pair) for pair in itertools.product(first.split(), second.split()))


FIRST = _joined("Al Be Da Ed Fa Ge Il Ka Lo Mi", "ba dor fin ka len mo na ris ta vi")
LAST = _joined("Bran Cor Esk Hol Jans Kess Lund Mor Stav Tor", "berg by en er gard lin man sen")
NEAR = (
    "Abbey", "Bridge", "Castle", "East", "Far", "Fort", "Great", "High", "Little", "Lower",
    "Market", "Mount", "New", "North", "Old", "Port", "Saint", "South", "Upper", "West",
)  # fmt: skip
PLACES = _joined("Ar Bel Cas Dun El Fen Hart Kings Nor Wil", "bury dale field ford haven mouth stead ton wick worth")
RIVERS = _joined("A Bre Cla Du Em Ga Lo Ora Te U", "lme nna rde sse ven")

TRADES = (
    "actor", "baker", "barber", "brewer", "butcher", "clerk", "cook", "dancer", "doctor", "farmer", "fisher", "guard",
    "hunter", "joiner", "judge", "lawyer", "mason", "miller", "miner", "painter", "pilot", "potter", "sailor", "singer",
    "smith", "tailor", "tanner", "teacher", "weaver", "writer",
)  # fmt: skip
WARES = (
    "amber", "bells", "boats", "bricks", "butter", "candles", "carts", "cheese", "cider", "clocks", "coal", "copper",
    "flour", "glass", "gloves", "hats", "honey", "iron", "lace", "linen", "maps", "nails", "oil", "paper", "rope",
    "salt", "silk", "soap", "tar", "wool",
)  # fmt: skip

PEOPLE = tuple(f"{first} {last}" for first in FIRST for last in LAST)
TOWNS = tuple(f"{near} {place}" for near in NEAR for place in PLACES)

TEST_SHARE = 8
"""One in this many people and towns is asked about in the evaluation, and never in a training."""

SYSTEM_PROMPT = "Search, then answer."

TRAIN_ROWS, TEST_ROWS = 2048, 256

COPY_ROWS, FORM_ROWS = 40_000, 24_000
"""Rows of the stages of the warm start."""

COPY_SHARE = 0.2
"""How many rows of the second stage are those of the first."""

MOST_SEARCHES = 3

NO_SEARCH_SHARE, STOP_SHARE = 0.06, 0.45
"""How often the warm start answers without a search, and after each of them, whatever was asked."""

READ_SHARE = 0.85
"""How often the warm start searches for a name that it has read; else for any name."""

HINT_SHARE = 0.25
"""How often a choice of the warm start is the right one, and not drawn. At 0, RL learned to search
once and to answer with any fact, and never to search again: a reward of 0.3 after 60 steps."""


@dataclass(frozen=True)
class Person:
    trade: str
    town: str

    @property
    def text(self) -> str:
        return f'works as a "{self.trade}", lives in "{self.town}".'


@dataclass(frozen=True)
class Town:
    river: str
    ware: str

    @property
    def text(self) -> str:
        return f'river "{self.river}", makes "{self.ware}".'


@dataclass(frozen=True)
class Question:
    """A form of question, and where its answer is."""

    text: str  # with {name}
    fact: str  # an attribute of the person, or of the town that the person lives in

    @property
    def searches(self) -> int:
        return 1 if self.fact in ("trade", "town") else 2


EASIER = (Question('What is the trade of "{name}"?', "trade"), Question('Where does "{name}" live?', "town"))
HARDER = Question('On which river does "{name}" live?', "river")

WARM_START_QUESTIONS = (*EASIER, HARDER, Question('What is made where "{name}" lives?', "ware"))
"""With one more than RL asks, so that the warm start does not learn that a town's river is always
the answer. (Asked both, a model this small told them apart in 55% of the cases after 80 steps.)"""


# -- the knowledge base ----------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """All facts, by name, and the names of each split."""

    people: dict[str, Person]
    towns: dict[str, Town]
    asked: dict[Split, list[str]]


@cache
def world() -> World:
    """Return the knowledge base. People of a split live in towns of that split, so that the
    evaluation asks about towns, too, that no training asked about."""
    rng = random.Random("world")
    names: dict[Split, list[str]] = {}
    towns: dict[Split, list[str]] = {}
    for found, all_names in ((names, PEOPLE), (towns, TOWNS)):
        mixed = rng.sample(all_names, len(all_names))
        found["test"], found["train"] = mixed[: len(mixed) // TEST_SHARE], mixed[len(mixed) // TEST_SHARE :]

    people = {name: Person(rng.choice(TRADES), rng.choice(towns[split])) for split in names for name in names[split]}
    return World(people, {name: _town(rng) for name in TOWNS}, names)


def _town(rng: random.Random) -> Town:
    return Town(rng.choice(RIVERS), rng.choice(WARES))


def passages(*, shuffled: bool = False) -> list[Row]:
    """Return the corpus.

    Args:
        shuffled: each text stands under the title of another passage, drawn at random: what the
            server of the control finds has nothing to do with the query.
    """
    known = world()
    entries = [(name, known.people.get(name) or known.towns[name]) for name in (*PEOPLE, *TOWNS)]
    texts = {name: entry.text for name, entry in entries}
    if shuffled:
        order = random.Random("shuffled").sample(list(texts), len(texts))
        moved = zip(order, order[1:] + order[:1], strict=True)  # no text stays where it was
        texts = {title: texts[other] for title, other in sorted(moved)}
    return [{"id": str(number), "contents": f'"{title}"\n{text}'} for number, (title, text) in enumerate(texts.items())]


def prepare(out: Path) -> dict[str, int]:
    """Write the corpus, and that of the control, into folder `out`; return their sizes by file."""
    return write_rows(out, {"corpus.jsonl": passages(), "shuffled.jsonl": passages(shuffled=True)})


# -- rows of reinforcement learning ----------------------------------------------------------------


def opening(question: str) -> list[Row]:
    """Return the messages before the model's first turn."""
    return [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": question}]


def rows(split: Split, n: int) -> Iterator[Row]:
    """Yield rows in the framework's schema; each asks about a person of its own, and every second
    one takes two searches."""
    known = world()
    rng = random.Random(f"rows/{split}")
    for index, name in enumerate(known.asked[split][:n]):
        question = HARDER if index % 2 else rng.choice(EASIER)
        person = known.people[name]
        queries = [name, person.town][: question.searches]
        target = getattr(person if question.searches == 1 else known.towns[person.town], question.fact)
        yield {
            "data_source": f"twin/searches_{question.searches}",
            "agent_name": "tool_agent",
            "prompt": opening(question.text.format(name=name)),
            "reward_model": {"style": "rule", "ground_truth": {"target": [target]}},
            "extra_info": {"split": split, "index": index, "queries": queries},
        }


def train_rows() -> list[Row]:
    """Return the training rows of `recipe.yaml`: more than its steps use."""
    return list(rows("train", TRAIN_ROWS))


def val_rows() -> list[Row]:
    """Return the evaluation rows of `recipe.yaml`."""
    return list(rows("test", TEST_ROWS))


# -- the warm start --------------------------------------------------------------------------------


def copying(rng: random.Random) -> Row:
    """Make a list of names, and the same in another order: what a model has to copy, and nothing
    else. A model this small finds out how after some hundred steps, and hardly from conversations,
    where a name is copied now and then."""
    kinds = world().asked["train"], TOWNS, TRADES + RIVERS + WARES
    names = [name for kind in kinds for name in rng.sample(kind, rng.randint(1, 2))]
    first, second = (", ".join(f'"{name}"' for name in rng.sample(names, len(names))) for _ in range(2))
    return {"text": f"Title: {first}.\nTitle: {second}.\n", "loss_from": len(f"Title: {first}.\nTitle:")}


def conversation(rng: random.Random) -> Row:
    """Make a conversation that shows the form of calls and answers. Its choices hardly depend on
    the question: when to stop, what to search for, and which fact to answer with."""
    asked, question = rng.choice(world().asked["train"]), rng.choice(WARM_START_QUESTIONS)
    messages = opening(question.text.format(name=asked))
    read, invented = [asked], dict[str, Person | Town]()
    found: Person | Town | None = None

    def hinted() -> bool:
        return rng.random() < HINT_SHARE

    for _ in range(MOST_SEARCHES):
        answered = found is not None and question.fact in vars(found)
        if answered if hinted() else rng.random() < (STOP_SHARE if found else NO_SEARCH_SHARE):
            break
        if hinted():
            name = read[1] if read[1:] else asked
        else:
            name = rng.choice(read) if rng.random() < READ_SHARE else any_name(rng)
        found = invented.setdefault(name, _passage(rng, name))
        messages += [call(name), {"role": "tool", "content": f'Doc 1 (Title: "{name}")\n{found.text}'}]
        if isinstance(found, Person):
            read.append(found.town)

    facts = vars(found) if found else {"trade": rng.choice(TRADES), "river": rng.choice(RIVERS)}
    fact = facts[question.fact] if question.fact in facts and hinted() else rng.choice(list(facts.values()))
    messages.append({"role": "assistant", "content": answer(fact)})
    return {"messages": messages, "tools": tool_schemas()}


def _passage(rng: random.Random, name: str) -> Person | Town:
    return Person(rng.choice(TRADES), rng.choice(TOWNS)) if name in world().people else _town(rng)


def any_name(rng: random.Random) -> str:
    """Return a person whom no evaluation asks about, or a town."""
    return rng.choice(world().asked["train"] if rng.random() < 0.5 else TOWNS)


def answer(name: str) -> str:
    return f'<answer>"{name}"</answer>'


def call(name: str) -> Row:
    function = {"name": "search", "arguments": {"query_list": [name]}}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


def conversations(n: int) -> Iterator[Row]:
    """Yield `n` conversations of the warm start."""
    rng = random.Random("warm start")
    for _ in range(n):
        yield conversation(rng)


def copy_rows() -> list[Row]:
    """Return the rows of the first stage of `sft.yaml`."""
    rng = random.Random("copying")
    return [copying(rng) for _ in range(COPY_ROWS)]


def form_rows() -> list[Row]:
    """Return the rows of the second stage."""
    rng = random.Random("form")
    return [copying(rng) if rng.random() < COPY_SHARE else conversation(rng) for _ in range(FORM_ROWS)]


@cache
def tool_schemas() -> list[Row]:
    """Return the tool as the model is shown it: the schema of `tools.yaml`."""
    loaded: Any = OmegaConf.to_container(OmegaConf.load(Path(__file__).with_name("tools.yaml")))
    return [tool["tool_schema"] for tool in loaded["tools"]]
