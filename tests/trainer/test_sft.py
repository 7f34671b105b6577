"""Supervised fine-tuning: which tokens are trained, what a stage sees, and stopping and going on."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentloop.config import SftStage
from agentloop.errors import ConfigError, DataError, RunDirError
from trainer.rundir import RunDir
from trainer.sft import _Stage
from trainer.sft_command import sft_command
from trainer.sft_data import SftRow, SftTokenizer, read_rows, shared_prefix

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


def decoded(model: Path, row: SftRow, trained: bool) -> str:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model).decode(row.token_ids[row.loss_mask == trained])


def test_the_loss_is_on_assistant_turns_with_their_end(chat_model: Path) -> None:
    row = SftTokenizer(str(chat_model), 1000).row({"messages": CHAT}, "here")
    assert decoded(chat_model, row, True) == "call<|im_end|>It is 3<|im_end|>"
    whole = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in CHAT).removesuffix("\n")
    every = SftRow(row.token_ids, np.ones(len(row.token_ids), dtype=bool))
    assert decoded(chat_model, every, True) == whole


def test_a_message_marked_not_to_train_is_context(chat_model: Path) -> None:
    messages = [CHAT[0], CHAT[1] | {"train": False}, *CHAT[2:]]
    row = SftTokenizer(str(chat_model), 1000).row({"messages": messages}, "here")
    assert decoded(chat_model, row, True) == "It is 3<|im_end|>"


def test_text_has_its_loss_from_the_given_character(chat_model: Path) -> None:
    tokenizer = SftTokenizer(str(chat_model), 1000)
    row = tokenizer.row({"text": "12\n12\n", "loss_from": 3}, "here")
    assert decoded(chat_model, row, True) == "12\n"
    assert tokenizer.row({"text": "abc"}, "here").loss_mask.tolist() == [False, True, True]


def test_bad_rows_name_file_and_line(chat_model: Path, tmp_path: Path) -> None:
    tokenizer = SftTokenizer(str(chat_model), 8)
    with pytest.raises(DataError, match=r"rows:3 has \d+ tokens, more than max_tokens 8"):
        tokenizer.row({"messages": CHAT}, "rows:3")
    with pytest.raises(DataError, match="needs the column 'messages' or 'text'"):
        tokenizer.row({"prompt": "x"}, "rows:3")
    with pytest.raises(DataError, match="no token to train"):
        tokenizer.row({"text": "a"}, "rows:3")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text"\n')
    with pytest.raises(DataError, match=r"bad\.jsonl:2 is not JSON"):
        read_rows(tmp_path / "bad.jsonl")
    with pytest.raises(DataError, match="does not exist"):
        read_rows(tmp_path / "none.jsonl")


def test_a_template_that_rewrites_earlier_turns_is_refused(chat_model: Path, tmp_path: Path) -> None:
    shutil.copytree(chat_model, tmp_path / "model")
    kept = "(message.content if loop.last or message.role != 'assistant' else '...')"
    rewriting = TEMPLATE.replace("message.content", kept)
    (tmp_path / "model" / "chat_template.jinja").write_text(rewriting)
    with pytest.raises(DataError, match="renders message 3 differently"):
        SftTokenizer(str(tmp_path / "model"), 1000).row({"messages": CHAT}, "here")


def test_a_row_has_the_ids_that_a_rollout_would_have() -> None:
    """On the quickstart's template: `start`, the turn, `extend`, the turn, as an agent loop puts them together."""
    from transformers import AutoTokenizer

    from agentloop.chat import ChatRenderer

    model = Path(__file__).parents[2] / "recipes" / "quickstart" / "model"
    call = {"name": "calculator", "arguments": {"expression": "12 + 345"}}
    messages: list[Any] = [
        {"role": "system", "content": "Answer with #### and the number."},
        {"role": "user", "content": "What is 12 + 345?"},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "content": "357"},
        {"role": "assistant", "content": "#### 357"},
    ]
    parameters = {"type": "object", "properties": {"expression": {"type": "string"}}}
    tools = [{"type": "function", "function": {"name": "calculator", "description": "", "parameters": parameters}}]
    row = SftTokenizer(str(model), 1000).row({"messages": messages, "tools": tools}, "here")

    renderer = ChatRenderer(AutoTokenizer.from_pretrained(model))
    edges = np.flatnonzero(np.diff(row.loss_mask.astype(np.int8))) + 1
    first, between, _ = (row.token_ids[a:b].tolist() for a, b in itertools.pairwise([*edges, len(row.token_ids)]))
    start = renderer.start(messages[:2], tools)
    assert row.token_ids[: edges[0]].tolist() == start
    assert renderer.parse(first).tool_calls[0].arguments == {"expression": "12 + 345"}
    assert between == renderer.extend(start + first, "stop", messages[3:4], tools)
    assert first[-1] == row.token_ids[-1] == renderer.end_of_turn


def rows_of(*ids: list[int], untrained: int = 10) -> list[SftRow]:
    return [SftRow(np.array(row, dtype=np.int64), np.arange(len(row)) >= untrained) for row in ids]


def test_the_shared_prefix_is_that_of_most_rows() -> None:
    system = [7] * 9
    rows = rows_of([*system, 1, 2, 3], [*system, 1, 4, 5], [*system, 2, 4, 5], [9] * 12)
    assert shared_prefix(rows).tolist() == system
    assert len(shared_prefix(rows_of([9] * 12, list(range(12))))) == 0
    assert len(shared_prefix([])) == 0


def test_rows_with_the_shared_prefix_are_packed_as_one_group() -> None:
    rows = rows_of([7] * 9 + [1, 2, 3], [7] * 9 + [1, 4, 5], [9] * 12)
    stage = _Stage(SftStage(name="s", data="-", steps=4, batch_size=3), 0, 0, rows, np.array([7] * 9), 0.0)
    samples = stage.batch(0, seed=0)
    assert sorted((s.prompt_length, s.token_ids[0], s.group_key == 0) for s in samples) == [
        (1, 9, False), (9, 7, True), (9, 7, True),
    ]  # fmt: skip
    for sample in samples:
        sample.check()


def test_each_epoch_sees_every_row_once_in_an_order_of_its_own() -> None:
    rows = rows_of(*[[n] * 12 for n in range(10)])
    stage = _Stage(SftStage(name="s", data="-", steps=4, batch_size=5), 0, 0, rows, np.zeros(0, dtype=np.int64), 0.0)
    seen = [[int(s.token_ids[0]) for s in stage.batch(step, seed=3)] for step in range(4)]
    assert sorted(seen[0] + seen[1]) == sorted(seen[2] + seen[3]) == list(range(10))
    assert seen[0] + seen[1] != seen[2] + seen[3]
    assert [int(s.token_ids[0]) for s in stage.batch(2, seed=3)] == seen[2], "a pure function of the step"


def write_recipe(tmp_path: Path, chat_model: Path, **changes: Any) -> Path:
    drills = [{"text": f"{n}{n}\n" * 3, "loss_from": 3} for n in range(10)]
    chats = [{"messages": [CHAT[0], {"role": "assistant", "content": str(n)}]} for n in range(8)]
    (tmp_path / "drills.jsonl").write_text("".join(json.dumps(row) + "\n" for row in drills))
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    recipe = {
        "run": {"name": "sft", "dir": str(tmp_path / "run"), "epochs": 1},
        "model": {"path": str(chat_model), "init": "random"},
        "log_every": 2,
        "checkpoint_every": 3,
        "stages": [
            {"name": "copy", "data": "drills.jsonl", "steps": 4, "batch_size": 4, "optim": {"lr": 0.01}},
            {
                "name": "chat",
                "data": "chats.jsonl",
                "steps": 5,
                "batch_size": 4,
                "optim": {"lr": 0.02, "schedule": "cosine", "lr_end": 0.0},
            },
        ],
    } | changes
    path = tmp_path / "sft.yaml"
    path.write_text(json.dumps(recipe))
    return path


def test_stages_run_and_a_stopped_run_goes_on_to_the_bit(chat_model: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, chat_model)
    assert sft_command(path, [], resume=False) == 0
    run_dir = RunDir(tmp_path / "run")
    rows = run_dir.read_metrics()
    assert [(row["stage"], row["step"]) for row in rows] == [
        ("copy", 2), ("copy", 4), ("chat", 6), ("chat", 8), ("chat", 9),
    ]  # fmt: skip
    assert rows[0]["lr"] == 0.01
    assert rows[-1]["lr"] == 0.0
    assert rows[1]["loss"] < rows[0]["loss"]
    whole = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    for file in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "run" / "model" / file).is_file(), file
    assert [c.step for c in run_dir.list_checkpoints()] == [6, 9]

    with pytest.raises(RunDirError, match="holds a run already"):
        sft_command(path, [], resume=False)
    shutil.rmtree(run_dir.checkpoint_of(9))  # as if it had been killed after step 6
    shutil.rmtree(tmp_path / "run" / "model")
    assert sft_command(path, [], resume=True) == 0
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() == whole
    timing = ("time_s", "tokens_per_s")
    again = [{key: value for key, value in row.items() if key not in timing} for row in run_dir.read_metrics()]
    # The window of the log line at step 8 lost its first half; everything after is the same.
    assert again[-1] == {key: value for key, value in rows[-1].items() if key not in timing}


def test_a_run_stopped_between_two_stages_goes_on_with_a_fresh_optimizer(chat_model: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, chat_model, checkpoint_every=4)
    recipe = json.loads(path.read_text())
    recipe["stages"][1]["steps"] = 4
    path.write_text(json.dumps(recipe))
    assert sft_command(path, [], resume=False) == 0
    run_dir = RunDir(tmp_path / "run")
    whole = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(run_dir.checkpoint_of(8))
    assert [c.step for c in run_dir.list_checkpoints()] == [4]
    assert sft_command(path, [], resume=True) == 0
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() == whole


def test_prepare_is_called_with_the_data_folder(
    chat_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_recipe(tmp_path, chat_model, prepare="./prepare.py:make")
    (tmp_path / "prepare.py").write_text("def make(folder):\n    raise SystemExit(str(folder))\n")
    with pytest.raises(SystemExit, match=str(tmp_path)):
        sft_command(path, [], resume=False)
    with pytest.raises(ConfigError, match="has no 'mkae'"):
        sft_command(path, [f"prepare={tmp_path / 'prepare.py'}:mkae"], resume=False)
    assert sft_command(path, [], resume=False, dry_run=True) == 0
    assert '"stages"' in capsys.readouterr().out
