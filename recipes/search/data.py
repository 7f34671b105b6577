"""Rows of question answering with a search engine: NQ, HotpotQA, and sets with the same columns."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import yaml

from agentloop.data import write_rows
from agentloop.errors import ConfigError, DataError
from agentloop.model_folder import download

GENERATED = "generated"
"""The `--source` that needs no files: the people of `questions.py`, and a corpus about them."""

HUB = "hub"
HUB_ID = "PeterJinGo/nq_hotpotqa_train"
"""What `--source hub` stands for: NQ and HotpotQA as Search-R1 publishes them."""

TOOL = "search"

SETS = re.compile(r"(nq|hotpotqa|triviaqa|popqa|2wikimultihopqa|musique|bamboogle)", re.IGNORECASE)
TEST_NAMES = ("test", "dev", "validation", "val")

HELD_OUT = 5
"""One in this many questions becomes a test row if a source has no test questions."""

PATTERNS = ["*.parquet", "*.jsonl"]


@dataclass(frozen=True)
class Prompt:
    """The texts around a question."""

    system: str | None
    user: str  # with {question}

    def messages(self, question: str) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": self.user.replace("{question}", question)}]


@dataclass(frozen=True)
class Question:
    text: str
    answers: list[str]
    data_set: str


def prepare(source: str, out: Path, config: Path | None = None) -> dict[str, int]:
    """Write `train.parquet` and `test.parquet` into folder `out`; with `generated`, also the
    `corpus.jsonl` that answers them.

    Args:
        source: a folder of `.jsonl` or `.parquet` files with the columns `question` and
            `golden_answers` (or `answers`, or `answer`); an id of the hub; `hub`; `generated`.
        config: texts of the prompt, as `prompt.yaml`, which is the default.

    Returns:
        Number of rows by file name.

    Raises:
        ConfigError: `config` is not such a file.
        DataError: a file is missing, or a row has no question or no answer.
    """
    prompt = read_prompt(config or Path(__file__).with_name("prompt.yaml"))
    files = {
        f"{split}.parquet": [make_row(question, prompt, split, index) for index, question in enumerate(questions)]
        for split, questions in _questions(source).items()
    }
    if source == GENERATED:
        from .questions import passages

        files["corpus.jsonl"] = list(passages())
    return write_rows(out, files)


def read_prompt(file: Path) -> Prompt:
    """Read the texts of a prompt: `system` and `user` with `{question}`, or the established
    `system_content` and `user_content_prefix`, also below a key `prompt`.

    Raises:
        ConfigError: naming the file and the key.
    """
    try:
        found = yaml.safe_load(file.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as exc:
        raise ConfigError(f"--config {file} cannot be read: {exc}", "give a YAML file such as prompt.yaml") from exc
    if isinstance(found, dict) and isinstance(found.get("prompt"), dict):
        found = found["prompt"]
    if not isinstance(found, dict):
        raise ConfigError(f"--config {file} is not a mapping", 'write system: "...", user: "... {question}"')

    known = ("system", "system_content", "user", "user_content", "user_content_prefix")
    for key, value in found.items():
        if key not in known:
            raise ConfigError(f"--config {file} has the unknown key {key!r}", f"known keys: {', '.join(known)}")
        if value is not None and not isinstance(value, str):
            raise ConfigError(f"--config {file}: {key} is not a text", "put the text in quotation marks")
    user = found.get("user") or found.get("user_content")
    if found.get("user_content_prefix"):
        user = found["user_content_prefix"] + "{question}"
    if not user or "{question}" not in user:
        raise ConfigError(f"--config {file} has no place for the question", 'write user: "... {question}"')
    return Prompt(found.get("system") or found.get("system_content"), user)


def make_row(question: Question, prompt: Prompt, split: str, index: int) -> dict[str, Any]:
    """Make one training row. The tool gets the question and the ground truth, too."""
    data_source = f"searchR1_{question.data_set}"
    ground_truth = {"target": question.answers}
    text = question.text if question.text.endswith("?") else f"{question.text}?"
    create_kwargs = {"ground_truth": ground_truth, "question": question.text, "data_source": data_source}
    return {
        "data_source": data_source,
        "agent_name": "tool_agent",
        "prompt": prompt.messages(text),
        "ability": "fact-reasoning",
        "reward_model": {"style": "rule", "ground_truth": ground_truth},
        "extra_info": {
            "split": split,
            "index": index,
            "question": question.text,
            "need_tools_kwargs": True,
            "tools_kwargs": {TOOL: {"create_kwargs": create_kwargs}},
        },
    }


def _questions(source: str) -> dict[str, list[Question]]:
    """Return the questions of a source as `train` and `test`, neither of them empty."""
    if source == GENERATED:
        from .questions import questions

        return {
            split: [_read(row, "generated", f"row {i}") for i, row in enumerate(questions(split))]
            for split in ("train", "test")
        }

    folder = Path(source)
    if not folder.is_dir():
        if folder.is_absolute() or source.startswith("."):
            raise DataError(f"--source {source} is not a folder", "give a folder of .jsonl or .parquet files")
        folder = _download(HUB_ID if source == HUB else source)
    splits: dict[str, list[Question]] = {"train": [], "test": []}
    for file in sorted(path for path in folder.rglob("*") if path.suffix in (".jsonl", ".parquet")):
        split = _split_of(file.relative_to(folder))
        if split is not None:
            splits[split] += _from_file(file, str(file.relative_to(folder)))

    if bool(splits["train"]) != bool(splits["test"]):
        every = splits["train"] + splits["test"]
        splits = {
            "train": [question for i, question in enumerate(every) if i % HELD_OUT < HELD_OUT - 1],
            "test": every[HELD_OUT - 1 :: HELD_OUT],
        }
    if not splits["train"] or not splits["test"]:
        raise DataError(
            f"{folder} has no .jsonl or .parquet file of questions named train, test or dev, or too few questions",
            f"give files such as train.jsonl and test.jsonl, or at least {HELD_OUT} questions in one of them",
        )
    return splits


def _split_of(file: Path) -> str | None:
    """Return the split that a file belongs to by its name, or that of its folder."""
    words = re.split(r"[^a-z0-9]+", str(file).lower())
    if "train" in words:
        return "train"
    return "test" if any(name in words for name in TEST_NAMES) else None


def _from_file(file: Path, name: str) -> Iterator[Question]:
    found = SETS.search(name)
    data_set = found[1].lower() if found else "qa"
    if file.suffix == ".parquet":
        import pyarrow.parquet as pq

        number = 0
        for batch in pq.ParquetFile(file).iter_batches():
            for row in batch.to_pylist():
                yield _read(row, data_set, f"{file}, row {number}")
                number += 1
        return
    for number, line in enumerate(file.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines()):
        if not line.strip():
            continue
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError as exc:
            raise DataError(f"{file}, line {number + 1} is not valid JSON: {exc}", "correct or remove it") from exc
        yield _read(row, data_set, f"{file}, line {number + 1}")


def _read(row: Any, data_set: str, where: str) -> Question:
    columns = row if isinstance(row, dict) else {}
    question = columns.get("question")
    if not isinstance(question, str) or not question.strip():
        raise DataError(f"{where} has no text 'question'", "give rows with `question` and `golden_answers`")
    answers = next((columns[key] for key in ("golden_answers", "answers", "answer") if columns.get(key)), None)
    listed = [answers] if isinstance(answers, str) else answers
    if not isinstance(listed, list) or not all(isinstance(answer, str) and answer.strip() for answer in listed):
        raise DataError(f"{where} has no list of texts 'golden_answers'", "give each question its accepted answers")

    source = columns.get("data_source")
    name = source.removeprefix("searchR1_") if isinstance(source, str) and source else data_set
    return Question(question.strip(), listed, name)


def _download(hub_id: str) -> Path:
    try:
        return download(hub_id, PATTERNS, repo_type="dataset")
    except OSError as exc:
        raise DataError(
            f"--source {hub_id} is not a folder and could not be downloaded: {exc}",
            "give a folder with train.jsonl and test.jsonl, or the id of a data set that can be reached",
        ) from exc
