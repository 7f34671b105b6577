"""Rows of gsm8k: a word problem, the tool that checks an answer, and the ground truth."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from agentloop.errors import DataError
from agentloop.files import open_atomic
from agentloop.model_folder import download

SYSTEM_PROMPT = (
    "You solve math word problems. Reason step by step. Before you give the final answer, check it at least once "
    "with the tool `calc_gsm8k_reward` and correct yourself if the check fails. Then give the final answer as "
    "`#### <answer>`."
)
INSTRUCTION = "Think step by step and give the final answer after `####`."
SPLITS = ("train", "test")


def prepare(source: str, out: Path) -> dict[str, int]:
    """Write `out/train.parquet` and `out/test.parquet`.

    Args:
        source: a folder with `train.jsonl` and `test.jsonl` (or `.parquet`), or a data set id of
            the hub (`openai/gsm8k`).

    Returns:
        Number of rows by file name.

    Raises:
        DataError: a file is missing, or a row has no question or no `#### ` answer.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = Path(source)
    if not folder.is_dir():
        if folder.is_absolute() or source.startswith("."):
            raise DataError(f"--source {source} is not a folder", "give a folder with train.jsonl and test.jsonl")
        folder = _download(source)
    tables = {
        split: [make_row(row, split, index) for index, row in enumerate(_read(folder, split))] for split in SPLITS
    }

    out.mkdir(parents=True, exist_ok=True)
    for split, rows in tables.items():
        with open_atomic(out / f"{split}.parquet") as file:
            pq.write_table(pa.Table.from_pylist(rows), file)
    return {f"{split}.parquet": len(rows) for split, rows in tables.items()}


def make_row(row: dict[str, Any], split: str, index: int) -> dict[str, Any]:
    """Make one training row from gsm8k's `question` and `answer`.

    The ground truth is the number after `####`, without thousands separators.

    Raises:
        DataError: naming split, row and the missing column.
    """
    question, solution = row.get("question"), row.get("answer")
    found = re.search(r"#### (-?[0-9.,]+)", solution or "")
    if not question or not found:
        missing = "'question'" if not question else "'answer' with `#### <number>`"
        raise DataError(f"gsm8k {split}, row {index} has no {missing}", "give gsm8k's own question and answer columns")

    ground_truth = found.group(1).replace(",", "")
    return {
        "data_source": "openai/gsm8k",
        "agent_name": "tool_agent",
        "prompt": [
            {"role": "system", "content": SYSTEM_PROMPT},
            {"role": "user", "content": f"{question} {INSTRUCTION}"},
        ],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": ground_truth},
        "extra_info": {
            "split": split,
            "index": index,
            "question": question,
            "answer": solution,
            "need_tools_kwargs": True,
            "tools_kwargs": {"calc_gsm8k_reward": {"create_kwargs": {"ground_truth": ground_truth}}},
        },
    }


def _read(folder: Path, split: str) -> Iterator[dict[str, Any]]:
    jsonl = folder / f"{split}.jsonl"
    if jsonl.is_file():
        for number, line in enumerate(jsonl.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines()):
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

    import pyarrow.parquet as pq

    for file in files:
        yield from pq.read_table(file).to_pylist()


def _download(hub_id: str) -> Path:
    try:
        return download(hub_id, ["*.parquet", "*.jsonl"], repo_type="dataset")
    except OSError as exc:
        raise DataError(
            f"--source {hub_id} is not a folder and could not be downloaded: {exc}",
            "give a folder with train.jsonl and test.jsonl, or the id of a data set that can be reached",
        ) from exc
