"""Real chat templates: the model's text is trained, the template's text is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from agentloop.chat import ChatRenderer
from agentloop.chat.proof.conversations import TOOLS, conversations, find_abilities
from agentloop.errors import DataError
from trainer.sft.tokenizing import SftRow, SftTokenizer

Renderers = Callable[..., ChatRenderer]

FAITHFUL = ["gemma3", "llama3_1", "phi3_5", "qwen2_5", "qwen2_5_vl", "qwen3_instruct_2507", "qwen3_vl"]
REWRITING = ["glm4moe", "gptoss", "qwen3"]
"""Templates that render earlier turns differently later: the sampled text is kept."""

WITHOUT_TOOLS = ("gemma3", "phi3_5", "qwen2_5_vl")


def spans_of(row: SftRow) -> list[list[int]]:
    """Return the ids of each run of trained tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], row.loss_mask.astype(np.int8), [0]])))
    return [row.token_ids[a:b].tolist() for a, b in edges.reshape(-1, 2)]


def without_common_start(text: str, other: str) -> str:
    size = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), len(other))
    return text[size:]


def says_nothing(message: Any) -> bool:
    said = message["content"].strip() or message.get("tool_calls") or message.get("reasoning_content")
    return message["role"] == "assistant" and not said


@pytest.mark.parametrize("name", FAITHFUL + REWRITING)
def test_trained_are_the_turns_with_their_end_and_nothing_else(renderer_of: Renderers, name: str) -> None:
    renderer = renderer_of(name)
    hf: Any = renderer.tokenizer
    tools = None if name in WITHOUT_TOOLS else TOOLS
    tokenizer = SftTokenizer(hf, renderer, max_tokens=100_000)

    def rendered(messages: list[Any], tools: Any = None, prompt: bool = False) -> str:
        """transformers' own rendering."""
        text = renderer.template.text
        return hf.apply_chat_template(
            messages, tools=tools, chat_template=text, add_generation_prompt=prompt, tokenize=False
        )

    # Phi ends a conversation, not a turn, with the end-of-text token when nobody is asked to speak.
    conversation_end = hf.eos_token if name == "phi3_5" else ""
    seen = 0
    for conversation in conversations(renderer, find_abilities(renderer, tools), count=20, seed=3):
        if conversation.hostile:  # transformers itself would make control tokens of what is spelled in contents
            continue
        messages = list(conversation.start)
        for exchange in conversation.exchanges:
            messages += [exchange.turn, *exchange.follow]
        if any(says_nothing(message) for message in messages):  # refused in rows: only its end would be trained
            continue
        row = tokenizer.row({"messages": messages, "tools": tools}, "here")
        assert row is not None
        said = [message for message in messages if message["role"] == "assistant"]
        spans = spans_of(row)
        assert len(spans) == len(said)
        for message, span in zip(said, spans, strict=True):
            question = {"role": "user", "content": "?"}
            alone, prompt = rendered([question, message]), rendered([question], prompt=True)
            turn = without_common_start(alone, prompt).rstrip().removesuffix(conversation_end).rstrip()
            assert hf.decode(span).startswith(turn)
            end = hf.decode(span)[len(turn) :].strip()
            assert not end or (name == "glm4moe" and end in ("<|user|>", "<|observation|>"))
            assert span[-1] in renderer.stop_token_ids
            seen += 1
        if name in FAITHFUL:
            last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
            whole = hf(rendered(messages[: last + 1], tools), add_special_tokens=False)["input_ids"]
            size = len(row.token_ids)
            assert whole[:size] == row.token_ids.tolist()
            assert hf.decode(whole[size:]).strip() in ("", conversation_end)
    assert seen > 15


def test_with_thinking_off_the_empty_block_is_the_prompts_and_reasoning_is_refused(renderer_of: Renderers) -> None:
    renderer = renderer_of("qwen3", chat_template_kwargs={"enable_thinking": False})
    tokenizer = SftTokenizer(renderer.tokenizer, renderer, max_tokens=1000)
    answers = [{"role": "assistant", "content": content} for content in ("one", "two")]
    messages = [{"role": "user", "content": "x"}, answers[0], {"role": "user", "content": "y"}, answers[1]]
    row = tokenizer.row({"messages": messages}, "here")
    assert row is not None
    assert [renderer.decode(span) for span in spans_of(row)] == ["one<|im_end|>", "two<|im_end|>"]
    with pytest.raises(DataError, match=r"here: the row needs reasoning: the generation prompt closes it"):
        tokenizer.row({"messages": [messages[0], answers[0] | {"reasoning_content": "hm"}]}, "here")


@pytest.mark.parametrize(
    ("name", "first", "reason"),
    [
        ("qwen2_5", [], "cannot begin with an assistant message"),
        ("gemma3", [{"role": "system", "content": "Obey."}], "leaves out a message of role system"),
        ("llama3_1", [{"role": "system", "content": "Obey."}], None),
        ("phi3_5", [], None),
    ],
)
def test_a_conversation_that_no_user_begins_is_rendered_whole_or_refused(
    renderer_of: Renderers, name: str, first: list[Any], reason: str | None
) -> None:
    renderer = renderer_of(name)
    tokenizer = SftTokenizer(renderer.tokenizer, renderer, max_tokens=1000)
    row = {"messages": [*first, {"role": "assistant", "content": "Yes."}]}
    if reason is None:
        assert tokenizer.row(row, "here") is not None
        return
    with pytest.raises(DataError, match=f"here: the chat template {reason}"):
        tokenizer.row(row, "here")


def test_reasoning_is_trained_under_each_of_its_names(renderer_of: Renderers) -> None:
    renderer = renderer_of("qwen3")
    tokenizer = SftTokenizer(renderer.tokenizer, renderer, max_tokens=1000)
    for key in ("reasoning_content", "reasoning", "thinking"):
        answer = {"role": "assistant", "content": "Yes.", key: "Hm."}
        row = tokenizer.row({"messages": [{"role": "user", "content": "x"}, answer]}, "here")
        assert row is not None
        assert renderer.decode(spans_of(row)[0]) == "<think>\nHm.\n</think>\n\nYes.<|im_end|>"
