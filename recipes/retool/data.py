r"""Rows of ReTool: conversations with an interpreter for `sft.yaml`, problems for `recipe.yaml`.

The four published sets and the file that each becomes:

    JoeYing/ReTool-SFT                  sft.jsonl          {messages, tools}, for `agentloop sft`
    BytedTsinghua-SIA/DAPO-Math-17k     train.parquet      each problem once, not a hundred times
    Maxwell-Jia/AIME_2024               aime_2024.parquet  for evaluation
    yentinglin/aime_2025                aime_2025.parquet
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from agentloop.data import open_rows, write_rows
from agentloop.errors import DataError
from agentloop.model_folder import download

from .conversations import read_conversations

Row = dict[str, Any]

GENERATED = "generated"
"""The `--source` that needs no files: the problems of `problems.py`, in the published columns."""

HUB = "hub"
"""The `--source` that stands for the four published sets."""

INSTRUCTION = r"Run Python code where it helps. Give the final answer in \boxed{}, for instance \boxed{12}."
"""Ends the user's text of every row, so that both stages of training ask for the same."""

SFT = "sft"
DAPO = "dapo"
HUB_IDS = {
    SFT: "JoeYing/ReTool-SFT",
    DAPO: "BytedTsinghua-SIA/DAPO-Math-17k",
    "aime_2024": "Maxwell-Jia/AIME_2024",
    "aime_2025": "yentinglin/aime_2025",
}
NAMES = {
    SFT: re.compile(r"retool", re.IGNORECASE),
    DAPO: re.compile(r"dapo", re.IGNORECASE),
    "aime_2024": re.compile(r"aime[^a-z0-9]*(?:20)?24", re.IGNORECASE),
    "aime_2025": re.compile(r"aime[^a-z0-9]*(?:20)?25", re.IGNORECASE),
}
"""What the name of a file, of a folder or of a hub's set has if it belongs to a set."""

DATA_SOURCES = {DAPO: "math_dapo", "aime_2024": "aime_2024", "aime_2025": "aime_2025"}


class Problem(NamedTuple):
    text: str
    answer: str


class Placed(NamedTuple):
    """A row of a source, and its place in words."""

    where: str
    row: Any


def prepare(source: str, out: Path) -> dict[str, int]:
    """Write the rows of each set that a source has into folder `out`.

    How many rows were dropped, and why, is printed.

    Args:
        source: a folder with some of the sets, as `.parquet` or `.jsonl` files whose names, or
            those of whose folders, say which set they belong to; an id of the hub; `hub`: all four;
            `generated`.

    Returns:
        Number of rows by file name.

    Raises:
        DataError: no set was found, or a row does not have the columns of its set.
    """
    files: dict[str, list[Row]] = {}
    for name, rows in _sets(source).items():
        if name == SFT:
            files["sft.jsonl"] = sft_rows(rows)
        elif name == DAPO:
            files["train.parquet"] = _rows(distinct(read_dapo(rows)), name, "train")
        else:
            files[f"{name}.parquet"] = _rows((read_aime(*placed) for placed in rows), name, "test")
    return write_rows(out, files)


def _rows(problems: Iterable[Problem], name: str, split: str) -> list[Row]:
    return [make_row(problem, DATA_SOURCES[name], split, index) for index, problem in enumerate(problems)]


def make_row(problem: Problem, data_source: str, split: str, index: int) -> Row:
    """Make one row of reinforcement learning or evaluation."""
    return {
        "data_source": data_source,
        "agent_name": "tool_agent",
        "prompt": [{"role": "user", "content": user_text(problem.text)}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": problem.answer},
        "extra_info": {"split": split, "index": index, "question": problem.text, "answer": problem.answer},
    }


def sft_rows(rows: Iterable[Placed]) -> list[Row]:
    """Return `{messages, tools}` for the rows of ReTool-SFT, for `agentloop sft`.

    Raises:
        DataError: as `read_conversations`.
    """
    tools = tool_schemas()
    return [
        {"messages": [{"role": "user", "content": user_text(question)}, *turns], "tools": tools}
        for question, turns in read_conversations(rows)
    ]


def user_text(problem: str) -> str:
    return f"{problem}\n\n{INSTRUCTION}"


def tool_schemas() -> list[Row]:
    """Return the schemas of `tools.yaml`, which conversations show to the model."""
    file = Path(__file__).with_name("tools.yaml")
    return [entry["tool_schema"] for entry in yaml.safe_load(file.read_text())["tools"]]


# -- DAPO-Math-17k and AIME ------------------------------------------------------------------------


def read_dapo(rows: Iterable[Placed]) -> Iterator[Problem]:
    """Yield the problems of DAPO-Math-17k's rows: `prompt`, and `reward_model.ground_truth`.

    Raises:
        DataError: a row has none; it is named.
    """
    for where, row in rows:
        columns = row if isinstance(row, dict) else {}
        prompt, model = columns.get("prompt"), columns.get("reward_model")
        message = prompt[0] if isinstance(prompt, list) and len(prompt) == 1 else None
        text = message.get("content") if isinstance(message, dict) and message.get("role") == "user" else None
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{where} has no 'prompt' with one text of a user", "give the columns of DAPO-Math-17k")
        answer = _answer(model.get("ground_truth") if isinstance(model, dict) else None)
        if answer is None:
            raise DataError(f"{where} has no 'reward_model.ground_truth'", "give the columns of DAPO-Math-17k")
        yield Problem(without_frame(text), answer)


def without_frame(text: str) -> str:
    """Return a problem without the paragraphs around it that ask for a line `Answer:`.

    They would contradict `INSTRUCTION`.
    """
    paragraphs = text.strip().split("\n\n")
    if len(paragraphs) > 1 and "Answer:" in paragraphs[-1]:
        paragraphs.pop()
    if len(paragraphs) > 1 and "Answer:" in paragraphs[0]:
        paragraphs.pop(0)
    return "\n\n".join(paragraphs).strip()


def distinct(problems: Iterable[Problem]) -> Iterator[Problem]:
    """Yield each problem once, in the order of the first appearances; say how many were dropped.

    Texts that differ in white space only are one problem. A problem that appears with several
    answers is left out: nobody can tell which of them is right.
    """
    found: dict[str, Problem] = {}
    ambiguous: set[str] = set()
    total = 0
    for total, problem in enumerate(problems, 1):  # noqa: B007  # counted
        key = " ".join(problem.text.split())
        if found.setdefault(key, problem).answer != problem.answer:
            ambiguous.add(key)
    kept = len(found) - len(ambiguous)
    print(
        f"DAPO-Math-17k: {kept:,} of {total:,} rows kept; {total - len(found):,} repeat a problem, "
        f"{len(ambiguous):,} problems with several answers left out"
    )
    yield from (problem for key, problem in found.items() if key not in ambiguous)


def read_aime(where: str, row: Any) -> Problem:
    """Return the problem of an AIME row: `Problem` and `Answer` (2024), or the same in lower case.

    Raises:
        DataError: a column is missing; the row is named.
    """
    columns = {str(key).lower(): value for key, value in row.items()} if isinstance(row, dict) else {}
    text, answer = columns.get("problem"), _answer(columns.get("answer"))
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where} has no text 'problem'", "give rows with `problem` and `answer`")
    if answer is None:
        raise DataError(f"{where} has no 'answer'", "give rows with `problem` and `answer`")
    return Problem(text.strip(), answer)


def _answer(value: Any) -> str | None:
    """Return an answer as text; None if there is none."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    text = str(value).strip()
    return None if text in ("", "nan") else text.removesuffix(".0")


# -- sources ---------------------------------------------------------------------------------------


def _sets(source: str) -> dict[str, Iterator[Placed]]:
    """Return the rows of each set that a source has; at least one."""
    if source == GENERATED:
        from .problems import sets

        return {
            name: (Placed(f"generated {name}, row {number}", row) for number, row in enumerate(rows))
            for name, rows in sets().items()
        }

    folder = Path(source)
    if folder.is_dir():
        files = _files(folder)
    elif folder.is_absolute() or source.startswith("."):
        raise DataError(f"--source {source} is not a folder", "give a folder of .jsonl or .parquet files")
    elif source == HUB:
        files = {name: _data_files(_download(hub_id)) for name, hub_id in HUB_IDS.items()}
    else:
        name = _set_of(source)
        files = {name: _data_files(_download(source))} if name is not None else {}

    found = {name: _placed(listed) for name in HUB_IDS if (listed := files.get(name))}
    if not found:
        raise DataError(
            f"--source {source} has no .jsonl or .parquet file of ReTool-SFT, DAPO-Math-17k or AIME",
            f"give a folder with folders named like {', '.join(HUB_IDS.values())}",
        )
    return found


def _files(folder: Path) -> dict[str, list[Path]]:
    """Return the files of each set below a folder: by their path, else by the folder's name."""
    files: dict[str, list[Path]] = {}
    for file in _data_files(folder):
        name = _set_of(str(file.relative_to(folder))) or _set_of(folder.resolve().name)
        if name is not None:
            files.setdefault(name, []).append(file)
    return files


def _set_of(path: str) -> str | None:
    """Return the set that a path names; of several the last one: `retool/dapo.parquet` is DAPO."""
    places = {name: match.start() for name, pattern in NAMES.items() for match in pattern.finditer(path)}
    return max(places, key=lambda name: places[name], default=None)


def _data_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix in (".jsonl", ".parquet") and file.is_file())


def _placed(files: list[Path]) -> Iterator[Placed]:
    rows = open_rows([str(file) for file in files], "--source")
    for number, row in enumerate(rows):
        yield Placed(rows.where(number), row)


def _download(hub_id: str) -> Path:
    try:
        return download(hub_id, ["*.parquet", "*.jsonl"], repo_type="dataset")
    except OSError as exc:
        raise DataError(
            f"--source {hub_id} is not a folder and could not be downloaded: {exc}",
            "give a folder with the data sets, the id of one that can be reached, or `generated`",
        ) from exc
