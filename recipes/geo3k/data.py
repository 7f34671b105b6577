"""Rows of geometry3k: a problem with its diagram, alone or with the tool that checks an answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from agentloop.data import open_rows, write_rows
from agentloop.errors import DataError
from agentloop.model_folder import download
from agentloop.text import counted

DATA_SOURCE = "hiyouga/geometry3k"
INSTRUCTION = (
    r"Think first, as an inner monologue between <think> and </think>. Then give the final answer in \boxed{}, for "
    r"instance <think> ... </think> \boxed{12}."
)
SYSTEM_PROMPT = (
    "You are an expert in geometry. Solve the problem step by step before you call a tool. Then check your answer at "
    "least once with the tool `calc_geo3k_reward`, and correct yourself if the check fails. Put the final answer in "
    r"\boxed{}."
)
TOOL = "calc_geo3k_reward"

GENERATED = "generated"
"""The `--source` that needs no files: problems of `problems.py`, for a first try."""

HUB = "hub"
"""The `--source` that stands for `hiyouga/geometry3k` of the hub."""

HELD_OUT = 5
"""One in this many problems becomes a test row if the source has no test problems."""


class Problem(NamedTuple):
    """A problem in the columns of the published data set."""

    text: str
    """With one `<image>` for each image."""
    images: list[dict[str, Any]]
    """`{bytes, path}` each."""
    answer: str


def prepare(source: str, out: Path) -> dict[str, int]:
    """Write `train.parquet` and `test.parquet`, and with the tool `tools_train.parquet` and
    `tools_test.parquet`, into folder `out`.

    Args:
        source: a folder with geometry3k's own layout (a folder with `data.json` and
            `img_diagram.png` for each problem, at any depth), or with parquet files of the
            published data set (columns images, problem, answer); an id of the hub; `hub`:
            hiyouga/geometry3k; `generated`.

    Returns:
        Number of rows by file name.

    Raises:
        DataError: a file is missing, or a problem has no text, image or answer.
    """
    splits = _problems(source)
    files = {
        f"{prefix}{split}.parquet": [
            make_row(problem, split, index, tool=bool(prefix)) for index, problem in enumerate(problems)
        ]
        for prefix in ("", "tools_")
        for split, problems in splits.items()
    }
    return write_rows(out, files)


def make_row(problem: Problem, split: str, index: int, *, tool: bool) -> dict[str, Any]:
    """Make one training row; `tool`: with the system prompt and the tool's ground truth."""
    prompt = [{"role": "user", "content": f"{problem.text} {INSTRUCTION}"}]
    extra_info: dict[str, Any] = {
        "split": split,
        "index": index,
        "question": problem.text,
        "answer": problem.answer,
    }
    if tool:
        prompt.insert(0, {"role": "system", "content": SYSTEM_PROMPT})
        extra_info |= {
            "need_tools_kwargs": True,
            "tools_kwargs": {TOOL: {"create_kwargs": {"ground_truth": problem.answer}}},
        }
    return {
        "data_source": DATA_SOURCE,
        "agent_name": "tool_agent" if tool else "single_turn_agent",
        "prompt": prompt,
        "images": problem.images,
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": problem.answer},
        "extra_info": extra_info,
    }


def _problems(source: str) -> dict[str, list[Problem]]:
    """Return the problems of a source as `train` and `test`, neither of them empty."""
    if source == GENERATED:
        from .problems import problems

        return {split: [Problem(*found) for found in problems(split)] for split in ("train", "test")}

    folder = Path(source)
    if not folder.is_dir():
        if folder.is_absolute() or source.startswith("."):
            raise DataError(f"--source {source} is not a folder", "give a folder with data.json or parquet files")
        folder = _download(DATA_SOURCE if source == HUB else source)
    splits = _from_folders(folder) or _from_parquet(folder)
    if splits is None:
        raise DataError(
            f"{folder} has neither */data.json nor train*.parquet", "give the folder of geometry3k, in either layout"
        )

    train = splits.get("train", [])
    test = splits.get("test") or splits.get("val") or splits.get("validation") or []
    if not test:
        test, train = train[HELD_OUT - 1 :: HELD_OUT], [p for i, p in enumerate(train) if i % HELD_OUT < HELD_OUT - 1]
    if not train or not test:
        raise DataError(
            f"{folder} has {len(train)} problems for training and {len(test)} for tests", f"give at least {HELD_OUT}"
        )
    return {"train": train, "test": test}


def _from_folders(folder: Path) -> dict[str, list[Problem]] | None:
    """Read geometry3k's own layout; None if the folder has another."""
    files = sorted(folder.rglob("data.json"), key=_in_order)
    splits: dict[str, list[Problem]] = {}
    for file in files:
        try:
            row = orjson.loads(file.read_bytes())
        except orjson.JSONDecodeError as exc:
            raise DataError(f"{file} is not valid JSON: {exc}", "correct or remove that folder") from exc
        split, problem = _from_json(row, file)
        splits.setdefault(split, []).append(problem)
    return splits or None


def _from_json(row: Any, file: Path) -> tuple[str, Problem]:
    """Return split and problem of a data.json: the answer is the text of the correct choice."""
    row = row if isinstance(row, dict) else {}
    text = row.get("annotat_text") or row.get("problem_text")
    choices, letter = row.get("compact_choices") or row.get("choices"), row.get("answer")
    if not isinstance(text, str) or not text:
        raise DataError(f"{file} has no 'annotat_text'", "give geometry3k's own columns")
    place = "ABCDEFGH".find(letter) if isinstance(letter, str) and len(letter) == 1 else -1
    if not isinstance(choices, list) or not 0 <= place < len(choices):
        raise DataError(f"{file}: 'answer' {letter!r} names none of its 'choices'", "give geometry3k's own columns")

    image = file.with_name("img_diagram.png")
    if not image.is_file():
        raise DataError(f"{image} does not exist", "each data.json needs its diagram beside it")
    name = f"{file.parent.name}/{image.name}"
    images = [{"bytes": image.read_bytes(), "path": name}]
    return str(row.get("data_type") or "train"), Problem(f"<image>{text}", images, str(choices[place]))


def _from_parquet(folder: Path) -> dict[str, list[Problem]] | None:
    """Read the layout of the hub, `data/train-00000-of-00001.parquet`; None if there is none."""
    splits: dict[str, list[Problem]] = {}
    for split in ("train", "validation", "val", "test"):
        for file in sorted(folder.rglob(f"{split}*.parquet")):
            splits.setdefault(split, []).extend(_from_rows(open_rows([str(file)], "--source"), file))
    return splits or None


def _from_rows(rows: Iterable[dict[str, Any]], file: Path) -> Iterator[Problem]:
    for number, row in enumerate(rows):
        text, answer, images = row.get("problem"), row.get("answer"), row.get("images")
        whole = {
            "problem": isinstance(text, str) and text != "",
            "answer": isinstance(answer, str | int | float) and str(answer) not in ("", "nan"),
            "images": isinstance(images, list) and images != [],
        }
        missing = [name for name, found in whole.items() if not found]
        if missing:
            raise DataError(f"{file}, row {number} has no {missing[0]!r}", "give the columns images, problem, answer")

        shown = [image if isinstance(image, dict) else {"bytes": image} for image in images or ()]
        for place, image in enumerate(shown, 1):
            if not isinstance(image.get("bytes"), bytes) or not image["bytes"]:
                raise DataError(
                    f"{file}, row {number}: image {place} has no bytes", "give {bytes, path} for each image"
                )
        places = str(text).count("<image>")
        if places != len(shown):
            raise DataError(
                f"{file}, row {number} has {counted(len(shown), 'image')} and {counted(places, 'place')} for them "
                "in its 'problem'",
                "write <image> in the text where each image belongs",
            )
        yield Problem(str(text), shown, str(answer))


def _in_order(file: Path) -> tuple[Any, ...]:
    """Sort folders named by numbers as numbers."""
    return tuple((int(part), "") if part.isdecimal() else (-1, part) for part in file.parts)


def _download(hub_id: str) -> Path:
    try:
        return download(hub_id, ["*.parquet"], repo_type="dataset")
    except OSError as exc:
        raise DataError(
            f"--source {hub_id} is not a folder and could not be downloaded: {exc}",
            "give a folder with the data set, the id of one that can be reached, or `generated`",
        ) from exc
