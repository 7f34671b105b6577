"""Rows of gsm8k: a word problem, and a tool or a simulated user that checks the answer."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import orjson

from agentloop.data import open_rows, write_rows
from agentloop.errors import DataError
from agentloop.model_folder import download
from agentloop.numbers import parse_number

from .reward import STRICT, normalize_number

SYSTEM_PROMPT = (
    "You solve math word problems. Reason step by step. Before you give the final answer, check it at least once "
    "with the tool `calc_gsm8k_reward` and correct yourself if the check fails. Then give the final answer as "
    "`#### <answer>`."
)
INSTRUCTION = "Think step by step and give the final answer after `####`."
USER_SYSTEM_PROMPT = (
    "You solve math word problems. Reason step by step, then give the final answer as `#### <answer>`. If the user "
    "says that it is wrong, look for the mistake and answer again."
)
SPLITS: tuple[Literal["train", "test"], ...] = ("train", "test")

GENERATED = "generated"
"""The `--source` that needs no files: rows of `problems.py` in gsm8k's form, for a first try."""

GENERATED_SOURCE = "gsm8k/twin"
"""`data_source` of those rows."""

GENERATED_ROWS = {"train": 64, "test": 16}


def prepare(source: str, out: Path) -> dict[str, int]:
    """Write the rows with the tool, `train.parquet` and `test.parquet`, and those with the
    simulated user, `user_train.parquet` and `user_test.parquet`, into folder `out`.

    Args:
        source: a folder with `train.jsonl` and `test.jsonl` (or `.parquet`), a data set id of the
            hub (`openai/gsm8k`), or `generated`.

    Returns:
        Number of rows by file name.

    Raises:
        DataError: a file is missing, damaged or empty, or a row has no question or no `#### `
            answer.
    """
    tables: dict[str, list[dict[str, Any]]] = {}
    for split, columns in _columns(source).items():
        tables[f"{split}.parquet"] = [make_row(row, split, index) for index, row in enumerate(columns)]
        tables[f"user_{split}.parquet"] = [make_user_row(row, split, index) for index, row in enumerate(columns)]

    if source == GENERATED:  # evaluations report each source by its name
        for rows in tables.values():
            for row in rows:
                row["data_source"] = GENERATED_SOURCE

    return write_rows(out, tables)


def make_row(row: dict[str, Any], split: str, index: int) -> dict[str, Any]:
    """Make one training row from gsm8k's `question` and `answer`, with the checking tool.

    The ground truth is the number after the last `####`, without thousands separators.

    Raises:
        DataError: naming split, row and the missing column.
    """
    made = _common(row, split, index, SYSTEM_PROMPT)
    create_kwargs = {"ground_truth": made["reward_model"]["ground_truth"]}
    made["extra_info"] |= {
        "need_tools_kwargs": True,
        "tools_kwargs": {"calc_gsm8k_reward": {"create_kwargs": create_kwargs}},
    }
    return made


def make_user_row(row: dict[str, Any], split: str, index: int) -> dict[str, Any]:
    """Make one training row with the simulated user of `interaction.py` in place of the tool.

    Raises:
        DataError: as `make_row`.
    """
    made = _common(row, split, index, USER_SYSTEM_PROMPT)
    ground_truth = made["reward_model"]["ground_truth"]
    made["extra_info"] |= {
        "need_tools_kwargs": False,
        "interaction_kwargs": {"name": "gsm8k", "query": row["question"], "ground_truth": ground_truth},
    }
    return made


def _common(row: dict[str, Any], split: str, index: int, system: str) -> dict[str, Any]:
    columns = row if isinstance(row, dict) else {}
    question, solution = columns.get("question"), columns.get("answer")
    if not isinstance(question, str) or not question.strip():
        raise _unusable(split, index, "'question'")
    found = STRICT.findall(solution) if isinstance(solution, str) else []
    truth = normalize_number(found[-1]) if found else ""
    if parse_number(truth) is None:  # a row that cannot be right would only cost episodes
        raise _unusable(split, index, "'answer' with `#### <number>`")

    return {
        "data_source": "openai/gsm8k",
        "agent_name": "tool_agent",
        "prompt": [
            {"role": "system", "content": system},
            {"role": "user", "content": f"{question} {INSTRUCTION}"},
        ],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": truth},
        "extra_info": {"split": split, "index": index, "question": question, "answer": solution},
    }


def _unusable(split: str, index: int, missing: str) -> DataError:
    return DataError(f"gsm8k {split}, row {index} has no {missing}", "give gsm8k's own question and answer columns")


def _columns(source: str) -> dict[str, list[dict[str, Any]]]:
    """Return gsm8k's own rows by split."""
    if source == GENERATED:
        from .problems import problems

        return {split: [found.row for found in problems(split, GENERATED_ROWS[split])] for split in SPLITS}
    folder = Path(source)
    if not folder.is_dir():
        if folder.is_absolute() or source.startswith("."):
            raise DataError(f"--source {source} is not a folder", "give a folder with train.jsonl and test.jsonl")
        folder = _download(source)
    return {split: list(_read(folder, split)) for split in SPLITS}


def _read(folder: Path, split: str) -> Iterator[dict[str, Any]]:
    jsonl = folder / f"{split}.jsonl"
    if jsonl.is_file():
        for number, line in enumerate(jsonl.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines()):
            if not line.strip():
                continue
            try:
                yield orjson.loads(line)
            except orjson.JSONDecodeError as exc:
                raise DataError(
                    f"{jsonl}, row {number} (line {number + 1}) is not valid JSON: {exc}", "correct or remove that line"
                ) from exc
        return

    # The hub's layout is main/train-00000-of-00001.parquet.
    files = sorted(folder.glob(f"main/{split}-*.parquet")) or sorted(folder.glob(f"**/{split}*.parquet"))
    if not files:
        raise DataError(f"{folder} has neither {split}.jsonl nor {split}*.parquet", "give the folder of the data set")

    yield from open_rows([str(file) for file in files], "--source")


def _download(hub_id: str) -> Path:
    try:
        return download(hub_id, ["*.parquet", "*.jsonl"], repo_type="dataset")
    except OSError as exc:
        raise DataError(
            f"--source {hub_id} is not a folder and could not be downloaded: {exc}",
            "give a folder with train.jsonl and test.jsonl, or the id of a data set that can be reached",
        ) from exc
