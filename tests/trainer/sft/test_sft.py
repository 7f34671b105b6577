"""Supervised fine-tuning: trained tokens, batches of a stage, stop and resume."""

from __future__ import annotations

import functools
import itertools
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agentloop.chat import ChatRenderer, load_tokenizer
from agentloop.config import SftModel, SftRecipe, SftStage
from agentloop.config.loading import load_config
from agentloop.errors import ConfigError, DataError, RunDirError
from trainer.checkpoint_files import read_state, seal
from trainer.commands.export import export_command
from trainer.commands.sft import sft_command
from trainer.run.rundir import RunDir
from trainer.sft.rows import read_rows
from trainer.sft.stage import Stage, TokenizedRows
from trainer.sft.tokenizing import SftRow, SftTokenizer, shared_prefix

TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""

CHAT = [
    {"role": "user", "content": "What is 1 + 2?"},
    {"role": "assistant", "content": "call"},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "It is 3"},
]


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder without weights: a byte-level tokenizer, a ChatML template and a very small Qwen2 config."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config

    folder = tmp_path_factory.mktemp("chat_model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True) for text in ("<|im_start|>", "<|im_end|>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", chat_template=TEMPLATE)
    tokenizer.save_pretrained(folder)
    Qwen2Config(
        vocab_size=260, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, tie_word_embeddings=True,
        architectures=["Qwen2ForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    return folder


@functools.cache
def tokenizer_of(model: Path, max_tokens: int = 1000, **options: Any) -> SftTokenizer:
    return SftTokenizer.load(SftModel(path=str(model)), max_tokens, **options)


def row_of(model: Path, messages: list[Any], **columns: Any) -> SftRow:
    row = tokenizer_of(model).row({"messages": messages} | columns, "here")
    assert row is not None
    return row


def decoded(model: Path, row: SftRow, trained: bool) -> str:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model).decode(row.token_ids[row.loss_mask == trained])


def test_the_loss_is_on_assistant_turns_with_their_end(chat_model: Path) -> None:
    row = row_of(chat_model, CHAT)
    assert decoded(chat_model, row, True) == "call<|im_end|>It is 3<|im_end|>"
    whole = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in CHAT).removesuffix("\n")
    every = SftRow(row.token_ids, np.ones(len(row.token_ids), dtype=bool))
    assert decoded(chat_model, every, True) == whole


@pytest.mark.parametrize("flag", [{"train": False}, {"weight": 0}])
def test_a_message_marked_not_to_train_is_context(chat_model: Path, flag: dict[str, Any]) -> None:
    row = row_of(chat_model, [CHAT[0], CHAT[1] | flag, *CHAT[2:]])
    assert decoded(chat_model, row, True) == "It is 3<|im_end|>"
    assert row.token_ids.tolist() == row_of(chat_model, CHAT).token_ids.tolist(), "no template sees the flag"


def test_text_has_its_loss_from_the_given_character(chat_model: Path) -> None:
    tokenizer = tokenizer_of(chat_model)
    row = tokenizer.row({"text": "12\n12\n", "loss_from": 3}, "here")
    assert row is not None
    assert decoded(chat_model, row, True) == "12\n"
    row = tokenizer.row({"text": "abc"}, "here")
    assert row is not None
    assert row.loss_mask.tolist() == [False, True, True]


def test_a_control_token_that_is_spelled_in_a_content_stays_text(chat_model: Path) -> None:
    row = row_of(chat_model, [{"role": "user", "content": "<|im_end|>"}, CHAT[3] | {"content": "<|im_start|>"}])
    calm = row_of(chat_model, [{"role": "user", "content": "x"}, CHAT[3] | {"content": "x"}])
    assert [token for token in row.token_ids if token >= 256] == [token for token in calm.token_ids if token >= 256]
    assert decoded(chat_model, row, True) == "<|im_start|><|im_end|>"


def test_a_row_over_the_limit_is_an_error_left_out_or_cut_behind_a_turn(chat_model: Path) -> None:
    first = row_of(chat_model, CHAT[:2])
    limit = len(row_of(chat_model, CHAT).token_ids) - 1
    with pytest.raises(DataError, match=rf"here has {limit + 1} tokens, more than max_tokens {limit}"):
        tokenizer_of(chat_model, limit).row({"messages": CHAT}, "here")
    dropping = tokenizer_of(chat_model, limit, overlong="drop")
    assert dropping.row({"messages": CHAT}, "here") is None
    cutting = tokenizer_of(chat_model, limit, overlong="truncate")
    cut = cutting.row({"messages": CHAT}, "here")
    assert cut is not None
    assert cut.token_ids.tolist() == first.token_ids.tolist()
    assert cutting.row({"messages": [CHAT[0] | {"content": "x" * limit}, *CHAT[1:]]}, "here") is None
    assert cutting.row({"messages": [CHAT[0], CHAT[1] | {"train": False}, *CHAT[2:]]}, "here") is None
    assert (dropping.dropped, cutting.dropped, cutting.truncated) == (1, 2, 1)
    text = cutting.row({"text": "y" * 2 * limit}, "here")
    assert text is not None
    assert len(text.token_ids) == limit


USER, ANSWER = CHAT[0], CHAT[3]
BAD_ROWS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "x"}, "here has neither column 'messages' nor 'text'"),
    ({"text": "a"}, "here has no token to train"),
    ({"messages": []}, "is not a list of messages"),
    ({"messages": [USER]}, "no token to train"),
    ({"messages": [USER, ANSWER], "tools": "{"}, "here: column 'tools' is text that is not JSON"),
    ({"messages": [USER, ANSWER], "images": ["a.png"]}, "has 1 image and 0 places"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]}, "has 0 images and 1 place"),
    ({"messages": [{"role": "human", "content": "x"}, ANSWER]}, "message 1 has the role 'human'"),
    ({"messages": [USER | {"train": True}, ANSWER]}, "message 1 of role user is marked for training"),
    ({"messages": [USER, ANSWER | {"weight": 0.5}]}, "weight to 0 or 1"),
    ({"messages": [USER, ANSWER | {"tool_calls": [{"function": {}}]}]}, "message 2 has a tool call without a name"),
    (
        {"messages": [USER, ANSWER | {"tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}]},
        "the arguments of f are not an object",
    ),
    ({"messages": [USER, ANSWER | {"function_call": {"name": "f"}}]}, "message 2 has a function_call"),
    ({"messages": [USER, ANSWER | {"reasoning_content": "hm"}]}, "here: the row needs reasoning"),
    (
        {"messages": [USER, ANSWER], "tools": [{"type": "function", "function": {"name": "f"}}]},
        "here: the row needs tool schemas",
    ),
    ({"messages": [USER, ANSWER], "tools": [{"type": "function"}]}, "column 'tools' has no function with a name"),
    ({"messages": [USER, ANSWER], "tools": [1]}, "column 'tools' has no function with a name"),
    ({"messages": [USER, ANSWER | {"content": None}]}, "message 2 has no content"),
    ({"messages": [USER, ANSWER | {"content": ""}]}, "message 2 is an answer without content"),
    ({"messages": [USER, ANSWER | {"content": [{"type": "text", "text": " "}]}]}, "message 2 is an answer without"),
    ({"messages": [USER | {"content": None}, ANSWER]}, "message 1 has no content"),
    ({"messages": 3}, "is not a list of messages"),
    ({"messages": [3, ANSWER]}, "message 1 has the role 3"),
    ({"text": 3}, "column 'text' is of type int"),
    ({"text": None}, "column 'text' is of type NoneType"),
    ({"text": "abc", "loss_from": "x"}, "column 'loss_from' is 'x'"),
    ({"text": "abc", "loss_from": -1}, "column 'loss_from' is -1"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS)
def test_bad_rows_are_refused_with_their_place(chat_model: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        tokenizer_of(chat_model).row(row, "here")
    assert message in str(caught.value)


def test_a_tokenizer_without_a_chat_template_serves_plain_text_alone(chat_model: Path, tmp_path: Path) -> None:
    shutil.copytree(chat_model, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    tokenizer = tokenizer_of(tmp_path / "model")
    assert tokenizer.row({"text": "abc"}, "here") is not None
    with pytest.raises(DataError, match=r"here has messages: the tokenizer has no chat template(.|\n)*chat_template"):
        tokenizer.row({"messages": CHAT}, "here")


def test_ids_that_the_model_does_not_have_are_refused(chat_model: Path, tmp_path: Path) -> None:
    shutil.copytree(chat_model, tmp_path / "model")
    config = json.loads((chat_model / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"vocab_size": 257}))
    with pytest.raises(
        DataError, match=r"here: the tokenizer encodes '<\|im_end\|>' as id 257, but the model has only 257"
    ):
        row_of(tmp_path / "model", CHAT)


def test_bad_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text"\n')
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "rows.csv").write_text("a")
    for name, message in (
        ("bad.jsonl", r"bad\.jsonl, row 1 \(line 2\) is not valid JSON"),
        ("none.jsonl", r"stages\[0\]\.data: .* does not exist"),
        ("empty.jsonl", "has no rows"),
        ("rows.csv", r"neither \.jsonl nor \.parquet"),
    ):
        with pytest.raises(DataError, match=message):
            list(read_rows(str(tmp_path / name), "stages[0].data"))


def test_a_template_that_rewrites_earlier_turns_leaves_them_as_they_were_sampled(
    chat_model: Path, tmp_path: Path
) -> None:
    shutil.copytree(chat_model, tmp_path / "model")
    kept = "(message.content if loop.last or message.role != 'assistant' else message.content.split('#')[-1])"
    (tmp_path / "model" / "chat_template.jinja").write_text(TEMPLATE.replace("message.content", kept))
    row = row_of(tmp_path / "model", [CHAT[0], CHAT[1] | {"content": "so#call"}, *CHAT[2:]])
    assert decoded(tmp_path / "model", row, True) == "so#call<|im_end|>It is 3<|im_end|>"


def test_a_template_that_cannot_carry_several_turns_is_refused_with_the_reason(
    chat_model: Path, tmp_path: Path
) -> None:
    shutil.copytree(chat_model, tmp_path / "model")
    counting = TEMPLATE.replace("message.content", "(messages | length) ~ message.content")
    (tmp_path / "model" / "chat_template.jinja").write_text(counting)
    with pytest.raises(DataError, match="here: the chat template cannot carry several turns"):
        row_of(tmp_path / "model", CHAT)
    row_of(tmp_path / "model", CHAT[:2])


CALL = {"name": "calculator", "arguments": {"expression": "12 + 345"}}
CALLING: list[Any] = [
    {"role": "system", "content": "Answer with #### and the number."},
    {"role": "user", "content": "What is 12 + 345?"},
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]},
    {"role": "tool", "content": "357"},
    {"role": "assistant", "content": "#### 357"},
]
PARAMETERS = {"type": "object", "properties": {"expression": {"type": "string"}}}
TOOLS = [{"type": "function", "function": {"name": "calculator", "description": "", "parameters": PARAMETERS}}]


def test_a_row_has_the_ids_that_a_rollout_would_have(quickstart_model: Path) -> None:
    """Assemble `start`, turn, `extend`, turn on the quickstart's template, as an agent loop does."""
    row = row_of(quickstart_model, CALLING, tools=TOOLS)
    renderer = ChatRenderer(load_tokenizer(str(quickstart_model)))
    edges = np.flatnonzero(np.diff(row.loss_mask.astype(np.int8))) + 1
    first, between, _ = (row.token_ids[a:b].tolist() for a, b in itertools.pairwise([*edges, len(row.token_ids)]))
    start = renderer.start(CALLING[:2], TOOLS)
    assert row.token_ids[: edges[0]].tolist() == start
    assert renderer.parse(first).tool_calls[0].arguments == {"expression": "12 + 345"}
    assert between == renderer.extend(start + first, "stop", CALLING[3:4], TOOLS)
    assert first[-1] == row.token_ids[-1] == renderer.end_of_turn


def test_rows_may_be_written_in_all_the_ways_that_data_sets_have(quickstart_model: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    written = {"name": "calculator", "arguments": json.dumps(CALL["arguments"])}
    loose = [
        CALLING[0] | {"content": [{"type": "text", "text": text} for text in ("Answer with #### ", "and the number.")]},
        CALLING[1] | {"tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [written], "weight": 1},
        *CALLING[3:],
    ]  # fmt: skip
    expected = row_of(quickstart_model, CALLING, tools=TOOLS).token_ids.tolist()
    assert row_of(quickstart_model, loose, tools=json.dumps(TOOLS)).token_ids.tolist() == expected
    assert row_of(quickstart_model, json.dumps(loose), tools=TOOLS).token_ids.tolist() == expected  # type: ignore[arg-type]
    rows = [{"messages": CALLING, "tools": TOOLS}, {"messages": CALLING[:2] + CALLING[4:], "tools": TOOLS}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (tmp_path / "rows.py").write_text(f"def rows():\n    return {rows!r}\n")
    from_parquet = list(read_rows(str(tmp_path / "rows.parquet"), "data"))
    from_function = list(read_rows([f"{tmp_path / 'rows.py'}:rows"], "data"))
    assert from_function[1][1] == rows[1], "nothing is changed where no column fills what is missing"
    assert [place for place, _ in from_parquet] == [f"{tmp_path / 'rows.parquet'}, row {n}" for n in (0, 1)]
    for (_, one), (_, other) in zip(from_parquet, from_function, strict=True):
        assert (
            row_of(quickstart_model, **one).token_ids.tolist() == row_of(quickstart_model, **other).token_ids.tolist()
        )


def test_the_example_of_the_docs_is_a_row_and_a_recipe(repo: Path, quickstart_model: Path, tmp_path: Path) -> None:
    blocks = re.findall(r"```(\w+)\n(.*?)```", (repo / "docs" / "sft.md").read_text(), re.DOTALL)
    examples = {language: text for language, text in blocks if language}
    row = tokenizer_of(quickstart_model).row(json.loads(examples["json"]), "here")
    assert row is not None
    said = decoded(quickstart_model, row, True)
    assert said.startswith("<tool_call>") and said.endswith("-4 degrees in Kyiv.<|im_end|>")
    (tmp_path / "sft.yaml").write_text(examples["yaml"])
    recipe = load_config(SftRecipe, tmp_path / "sft.yaml")
    assert recipe.stages[0].data == str(tmp_path / "train.jsonl")
    assert recipe.eval_data == str(tmp_path / "held_out.jsonl")


def rows_of(*ids: list[int], untrained: int = 10) -> list[SftRow]:
    return [SftRow(np.array(row, dtype=np.int32), np.arange(len(row)) >= untrained) for row in ids]


def test_the_shared_prefix_is_that_of_most_rows() -> None:
    system = [7] * 9
    rows = rows_of([*system, 1, 2, 3], [*system, 1, 4, 5], [*system, 2, 4, 5], [9] * 12)
    assert shared_prefix(rows).tolist() == system
    assert len(shared_prefix(rows_of([9] * 12, list(range(12))))) == 0
    assert len(shared_prefix([])) == 0


def test_the_digest_of_rows_is_of_ids_and_masks() -> None:
    digests = {stage_of(rows_of([1, 2, 3], untrained=n)).data.digest for n in (1, 2)}
    assert len(digests) == 2
    assert stage_of(rows_of([1, 2, 3], untrained=1)).data.digest in digests


def stage_of(rows: list[SftRow], prefix: list[int] | None = None, **config: Any) -> Stage:
    config = {"steps": 4} | config if "epochs" not in config else config
    data = TokenizedRows(rows, np.array(prefix or [], dtype=np.int32), 0, 0, 0.0)
    return Stage(SftStage(name="s", data="-", **config), number=0, first=3, data=data, seed=3)


def test_rows_with_the_shared_prefix_are_packed_as_one_group() -> None:
    rows = rows_of([7] * 9 + [1, 2, 3], [7] * 9 + [1, 4, 5], [9] * 12)
    samples = stage_of(rows, prefix=[7] * 9, steps=4, batch_size=3).batch(4)
    assert sorted((s.prompt_length, s.token_ids[0], s.group_key == 0) for s in samples) == [
        (1, 9, False), (9, 7, True), (9, 7, True),
    ]  # fmt: skip
    for sample in samples:
        sample.check()


def test_each_epoch_sees_every_row_once_in_an_order_of_its_own() -> None:
    rows = rows_of(*[[n] * 12 for n in range(10)])
    stage = stage_of(rows, steps=4, batch_size=5)
    seen = [[int(s.token_ids[0]) for s in stage.batch(step)] for step in range(4, 8)]
    assert sorted(seen[0] + seen[1]) == sorted(seen[2] + seen[3]) == list(range(10))
    assert seen[0] + seen[1] != seen[2] + seen[3]
    assert [int(s.token_ids[0]) for s in stage.batch(6)] == seen[2], "a pure function of the step"


def test_epochs_see_every_row_exactly_so_often() -> None:
    stage = stage_of(rows_of(*[[n] * 12 for n in range(10)]), epochs=2, batch_size=8)
    assert (stage.steps, stage.end) == (3, 6)
    batches = [[int(s.token_ids[0]) for s in stage.batch(step)] for step in range(4, 7)]
    assert [len(batch) for batch in batches] == [8, 8, 4]
    assert sorted(itertools.chain(*batches)) == sorted([*range(10), *range(10)])


def write_recipe(folder: Path, chat_model: Path, **changes: Any) -> Path:
    """24 steps of text, then three passes over 8 conversations: 12 steps."""
    drills = [{"text": f"{n}{n}\n" * 3, "loss_from": 3} for n in range(10)]
    chats = [{"messages": [CHAT[0], {"role": "assistant", "content": str(n)}]} for n in range(8)]
    for name, rows in (("drills", drills), ("chats", chats), ("held_out", chats[:3])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    decaying = {"lr": 0.02, "schedule": "cosine", "lr_end": 0.0}
    recipe = {
        "run": {"name": "sft", "dir": str(folder / "run")},
        "model": {"path": str(chat_model), "init": "random"},
        "log_every": 5,
        "checkpoint_every": 12,
        "eval_data": "held_out.jsonl",
        "eval_every": 16,
        "stages": [
            {"name": "copy", "data": "drills.jsonl", "steps": 24, "batch_size": 4, "optim": {"lr": 0.01}},
            {"name": "chat", "data": ["chats.jsonl"], "epochs": 3, "batch_size": 2, "optim": decaying},
        ],
    } | changes
    path = folder / "sft.yaml"
    path.write_text(json.dumps(recipe))
    return path


@pytest.fixture(scope="module")
def whole(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    assert sft_command(write_recipe(folder, chat_model), [], resume=False) == 0
    return folder


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run without the timings."""
    timing = ("time_s", "tokens_per_s", "eta_s", "eval/time_s")
    rows = RunDir(folder / "run").read_metrics()
    return [{key: value for key, value in row.items() if key not in timing} for row in rows]


def weights_of(folder: Path) -> bytes:
    return (folder / "run" / "model" / "model.safetensors").read_bytes()


def test_stages_are_trained_evaluated_and_written(whole: Path) -> None:
    rows = metrics_of(whole)
    trained = [row for row in rows if "loss" in row]
    assert [(row["stage"], row["step"]) for row in trained] == [
        ("copy", 5), ("copy", 10), ("copy", 15), ("copy", 20), ("copy", 24), ("chat", 25), ("chat", 30), ("chat", 35),
        ("chat", 36),
    ]  # fmt: skip
    assert {row["steps"] for row in rows} == {36}
    assert (trained[0]["lr"], trained[-1]["lr"]) == (0.01, 0.0)
    assert trained[4]["loss"] < trained[0]["loss"]
    evals = [row for row in rows if "eval/loss" in row]
    assert [row["step"] for row in evals] == [0, 16, 32, 36]
    assert evals[-1]["eval/loss"] < evals[0]["eval/loss"]
    assert {row["eval/tokens"] for row in evals} == {6}, "three answers of a character, with their end"
    for file in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (whole / "run" / "model" / file).is_file(), file
    assert [c.step for c in RunDir(whole / "run").list_checkpoints()] == [24, 36]


def test_a_run_has_a_report_of_its_losses(whole: Path) -> None:
    page = (whole / "run" / "report.html").read_text(encoding="utf-8")
    for said in ("supervised fine-tuning", "stages copy, chat", "Training loss", "Evaluation loss", "36 of 36"):
        assert said in page
    for unsaid in ("Training reward", "no numbers that could be plotted", "How episodes end", 'id="failures"'):
        assert unsaid not in page
    assert page.count('class="card plot') == 5


def test_the_loss_of_an_evaluation_is_the_mean_over_its_tokens(whole: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(whole / "run" / "model")
    losses = []
    for line in (whole / "held_out.jsonl").read_text().splitlines():
        row = row_of(whole / "run" / "model", json.loads(line)["messages"])
        ids = torch.from_numpy(row.token_ids)
        with torch.no_grad():
            logprobs = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        losses.append(-logprobs[torch.from_numpy(row.loss_mask[1:])])
    assert metrics_of(whole)[-1]["eval/loss"] == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)


def run_until(folder: Path, step: int, end: signal.Signals, *arguments: str) -> int:
    """Run the command until it has logged `step`, then send a signal; return the exit code."""
    command = [sys.executable, "-m", "agentloop.commands.main", "sft", "--config", str(folder / "sft.yaml"), *arguments]
    metrics = folder / "run" / "metrics.jsonl"
    with (folder / "out.txt").open("ab") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        while process.poll() is None:
            lines = metrics.read_text().splitlines() if metrics.is_file() else []
            if lines and lines[-1].endswith("}") and json.loads(lines[-1])["step"] >= step:
                process.send_signal(end)
                break
            time.sleep(0.002)
        return process.wait()


def test_a_run_that_is_stopped_and_killed_comes_to_the_same_bits(
    chat_model: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_recipe(tmp_path, chat_model)
    run_dir = RunDir(tmp_path / "run")
    run_dir.open({}, {}, resume=False)
    run_dir.append_metrics({"step": 0, "eval/loss": 9.9})  # as if it had been killed before its first checkpoint
    first, second = random.Random().sample(range(1, 30), 2)
    assert run_until(tmp_path, min(first, second), signal.SIGINT, "--resume") == 130, (tmp_path / "out.txt").read_text()
    assert "--resume" in (tmp_path / "out.txt").read_text()
    stopped = run_dir.list_checkpoints()[-1].step
    assert stopped >= min(first, second), "Ctrl-C saves the step that it ends with"
    assert run_until(tmp_path, max(stopped, first, second), signal.SIGKILL, "--resume") == -signal.SIGKILL
    with pytest.raises(RunDirError, match="already holds a run"):
        sft_command(path, [], resume=False)
    assert sft_command(path, [], resume=True) == 0
    assert "changed since" not in capsys.readouterr().out
    assert sft_command(path, [], resume=True) == 0
    assert "is finished: 36 of 36 steps" in capsys.readouterr().out
    assert metrics_of(tmp_path) == metrics_of(whole), f"stopped at {first} and {second}"
    assert weights_of(tmp_path) == weights_of(whole)


def test_a_run_stopped_between_two_stages_goes_on_with_a_fresh_optimizer(
    chat_model: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], install: Any
) -> None:
    install("writes_lines", LOGGER, "[agentloop.loggers]\nlines = writes_lines:Lines\n")
    shutil.copytree(whole / "run", tmp_path / "run")
    path = write_recipe(tmp_path, chat_model, loggers=["lines"])
    shutil.rmtree(RunDir(tmp_path / "run").checkpoint_of(36))
    shutil.rmtree(tmp_path / "run" / "model")
    checkpoint = RunDir(tmp_path / "run").checkpoint_of(24)
    seal(checkpoint, read_state(checkpoint) | {"data": {"1": "other rows"}})
    assert sft_command(path, [], resume=True) == 0
    assert "changed since the run was started: the rows of stage chat" in capsys.readouterr().out
    assert metrics_of(tmp_path) == metrics_of(whole)
    assert weights_of(tmp_path) == weights_of(whole)
    logged = (tmp_path / "run" / "loggers" / "lines" / "lines.txt").read_text().splitlines()
    assert logged == ["25 loss", "30 loss", "32 eval/loss", "35 loss", "36 loss", "36 eval/loss", "False"]


LOGGER = """
class Lines:
    def __init__(self, run):
        self.file = (run.folder / "lines.txt").open("a")
    def log(self, step, metrics):
        print(step, "loss" if "loss" in metrics else "eval/loss", file=self.file)
    def close(self, *, failed):
        print(failed, file=self.file, flush=True)
"""


def test_two_ranks_in_bfloat16_write_the_model_that_their_checkpoint_exports(
    chat_model: Path, whole: Path, tmp_path: Path
) -> None:
    path = write_recipe(tmp_path, chat_model)
    short = ["ranks=2", "model.dtype=bfloat16", "stages.0.steps=3", "stages.1.epochs=1", f"out={tmp_path / 'out'}"]
    short += ["checkpoint_every=2", "eval_every=1", "checkpoint_keep=1", "checkpoint_keep_best=1"]
    assert sft_command(path, short, resume=False) == 0
    losses = {
        row["eval/loss"]: row["step"]
        for row in metrics_of(tmp_path)
        if row["step"] in (2, 4, 6, 7) and "eval/loss" in row
    }
    assert {c.step for c in RunDir(tmp_path / "run").list_checkpoints()} == {7, losses[min(losses)]}
    assert export_command(
        tmp_path / "run", tmp_path / "exported", step=None, dtype=None, model=None, force=False
    ) == 0  # fmt: skip
    for file in (tmp_path / "out").iterdir():
        assert (tmp_path / "exported" / file.name).read_bytes() == file.read_bytes(), file.name
    mine, one = metrics_of(tmp_path), metrics_of(whole)
    assert mine[0]["eval/loss"] == pytest.approx(one[0]["eval/loss"], rel=0.02)


def test_prepare_is_called_with_the_data_folder(
    chat_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_recipe(tmp_path, chat_model, prepare="./prepare.py:make")
    (tmp_path / "prepare.py").write_text("def make(folder):\n    raise SystemExit(str(folder))\n")
    with pytest.raises(SystemExit, match=str(tmp_path)):
        sft_command(path, [], resume=False)
    with pytest.raises(ConfigError, match="does not define 'mkae'"):
        sft_command(path, [f"prepare={tmp_path / 'prepare.py'}:mkae"], resume=False)
    assert sft_command(path, [], resume=False, dry_run=True) == 0
    assert '"stages"' in capsys.readouterr().out


def test_a_recipe_names_the_key_that_is_wrong(chat_model: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, chat_model)
    with pytest.raises(ConfigError, match=r"unknown key 'eval_dat'(.|\n)*did you mean 'eval_data'"):
        sft_command(path, ["eval_dat=x"], resume=False)
    with pytest.raises(ConfigError, match="set either steps or epochs"):
        sft_command(path, ["stages.0.epochs=2"], resume=False)
    for stages in ({"name": "a", "data": "b"}, ["b.jsonl"]):
        with pytest.raises(ConfigError, match="stages"):
            sft_command(write_recipe(tmp_path, chat_model, stages=stages), [], resume=False)
    write_recipe(tmp_path, chat_model)
    with pytest.raises(ConfigError, match="holds something other than a model"):
        sft_command(path, [f"out={tmp_path}"], resume=False)


def test_an_empty_answer_may_be_context_and_a_gap_in_loss_from_means_zero(chat_model: Path) -> None:
    row = row_of(chat_model, [CHAT[0], CHAT[1] | {"content": "", "train": False}, *CHAT[2:]])
    assert decoded(chat_model, row, True) == "It is 3<|im_end|>"
    tokenizer = tokenizer_of(chat_model)
    for loss_from in (None, 0, 0.0):
        text = tokenizer.row({"text": "abc", "loss_from": loss_from}, "here")
        assert text is not None and text.loss_mask.tolist() == [False, True, True]


def test_a_row_over_the_models_context_is_too_long_whatever_max_tokens_says(chat_model: Path) -> None:
    with pytest.raises(DataError, match="here has 300 tokens, more than the model's context of 256 tokens"):
        tokenizer_of(chat_model, 1000).row({"text": "y" * 300}, "here")
    cut = tokenizer_of(chat_model, 1000, overlong="truncate").row({"text": "y" * 300}, "here")
    assert cut is not None and len(cut.token_ids) == 256
