"""Made-up people and towns, and a passage about each. Nobody can know them without the passages.

    python -m recipes.search.smollm2.facts       # prints a few passages and questions

A passage tells more than a question asks: two towns, two years. So an answer has to be read, and
not only found.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

FIRST = (
    "Abel", "Beata", "Casimir", "Dorothea", "Emeric", "Flora", "Gustav", "Helga", "Ignaz", "Jolanda", "Konrad",
    "Liselotte", "Matthias", "Nora", "Otto", "Paulina", "Quirin", "Renata", "Sigmund", "Theresa", "Ulrich",
    "Valeria", "Wenzel", "Zita",
)  # fmt: skip
LAST = (
    "Adler", "Bergstrom", "Castell", "Dahlke", "Eberhart", "Falkner", "Gruber", "Hartwig", "Iversen", "Jankowski",
    "Keller", "Lindqvist", "Morandi", "Nyberg", "Ostrander", "Pavlik", "Rademaker", "Sandoval", "Thorne", "Urban",
    "Vasquez", "Winter", "Yilmaz", "Zeller",
)  # fmt: skip
BEGINNINGS = ("Ar", "Bel", "Cor", "Dun", "El", "Far", "Gar", "Hol", "Is", "Kar", "Lor", "Mar", "Nor", "Os", "Tor")
ENDINGS = ("dale", "ford", "haven", "mere", "minster", "stead", "ton", "wick")
RIVERS = ("Senn", "Aure", "Lidder", "Morva", "Tarn", "Wend", "Ilse", "Brenta", "Ouze", "Drave", "Kell", "Yar")
GOODS = (
    "cheese", "clocks", "glass", "honey", "lace", "paper", "pottery", "salt", "silk", "timber", "violins", "wine",
)  # fmt: skip
TRADES = (
    "architect", "astronomer", "baker", "botanist", "chemist", "composer", "engineer", "gardener", "historian",
    "lawyer", "painter", "physician", "poet", "sailor", "sculptor", "surveyor", "teacher", "violinist",
)  # fmt: skip

PEOPLE = 480

Kind = Literal["person", "town"]

QUESTIONS: dict[Kind, dict[str, str]] = {
    "person": {
        "born in": "In which town was {name} born?",
        "born": "In which year was {name} born?",
        "trade": "What was the profession of {name}?",
        "moved to": "To which town did {name} move?",
    },
    "town": {
        "river": "On which river does the town of {name} lie?",
        "founded": "In which year was the town of {name} founded?",
        "goods": "What is the town of {name} known for?",
    },
}


@dataclass(frozen=True)
class Subject:
    """A person or a town: the name, the answer to each of its questions, and the passage."""

    kind: Kind
    name: str
    facts: dict[str, str]
    text: str


def subjects() -> list[Subject]:
    """Return all of them, in an order that says nothing; always the same."""
    rng = random.Random("facts")
    towns = [first + last for first in BEGINNINGS for last in ENDINGS]
    names = rng.sample([f"{first} {last}" for first in FIRST for last in LAST], PEOPLE)
    found = [*(_person(rng, name, towns) for name in names), *(_town(rng, name) for name in towns)]
    rng.shuffle(found)
    return found


def _person(rng: random.Random, name: str, towns: list[str]) -> Subject:
    born_in, moved_to = rng.sample(towns, 2)
    trade, born = rng.choice(TRADES), rng.randint(1700, 1950)
    moved = born + rng.randint(19, 40)
    article = "an" if trade[0] in "aeiou" else "a"
    text = rng.choice(
        (
            f"{name} was {article} {trade}, born in {born} in {born_in}. In {moved}, {name} moved to {moved_to}.",
            f"Born in {born_in} in {born}, {name} became {article} {trade} and moved to {moved_to} in {moved}.",
        )
    )
    return Subject("person", name, {"born in": born_in, "born": str(born), "trade": trade, "moved to": moved_to}, text)


def _town(rng: random.Random, name: str) -> Subject:
    river, goods = rng.choice(RIVERS), rng.choice(GOODS)
    founded = rng.randint(900, 1600)
    burned = founded + rng.randint(50, 200)
    text = rng.choice(
        (
            f"{name} is a town on the river {river}, founded in {founded}. It burned down in {burned} and is known for "
            f"its {goods}.",
            f"Known for its {goods}, the town of {name} was founded in {founded} on the river {river}. It burned down "
            f"in {burned}.",
        )
    )
    return Subject("town", name, {"river": river, "founded": str(founded), "goods": goods}, text)


def main() -> None:
    for subject in subjects()[:4]:
        print(f"{subject.name}\n  {subject.text}")
        for fact, question in QUESTIONS[subject.kind].items():
            print(f"  {question.format(name=subject.name)}  {subject.facts[fact]}")


if __name__ == "__main__":
    main()
