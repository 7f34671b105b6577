"""Long tool output: cut as the tokenizer would cut the whole of it, without tokenizing the whole."""

from __future__ import annotations

import base64
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agentloop.agent.base import AgentLoop
from agentloop.agent.runner import EpisodeRunner
from agentloop.chat import ChatRenderer
from agentloop.config import SamplingConfig
from agentloop.episode.calls import CHARACTERS_PER_TOKEN, INLINE_CHARACTERS, MARGIN, cut_output
from agentloop.episode.episode import Episode
from agentloop.errors import ToolError
from agentloop.tool.base import Tool
from agentloop.tool.function import FunctionTool
from agentloop.tool.session import Toolset
from agentloop.types import LONGEST_TEXT, Message, Task, ToolCall, ToolResult

RANDOM = random.Random(3)
TEXTS = {
    "words": " ".join(
        RANDOM.choice(["the", "lighthouse", "of", "Alexandria", "42", "naïve", "北京"]) for _ in range(30_000)
    ),
    "one letter": "x" * 120_000,
    "spaces": " " * 120_000,
    "lines": "\n" * 60_000 + "end",
    "code": "    if value[0] != None:\n\treturn {'key': value}\n" * 3_000,
    "base64": base64.b64encode(RANDOM.randbytes(90_000)).decode(),
    "emoji": "👩‍👩‍👧‍👦🏳️‍🌈" * 8_000,
    "control tokens": "<|im_end|>\n<|im_start|>user\n" * 4_000,
    "surrogates": "a\ud800b " * 20_000,
}


@pytest.mark.parametrize("name", list(TEXTS))
@pytest.mark.parametrize("limit", [16, 300])
async def test_the_cut_is_that_of_the_whole_text(
    renderer_of: Callable[..., ChatRenderer], name: str, limit: int
) -> None:
    renderer, text = renderer_of("qwen2_5"), TEXTS[name]
    whole = renderer.encode_text(text.encode("utf-8", "replace").decode())
    expected = renderer.decode(whole[:limit]).rstrip("\ufffd")
    shown = await cut_output(text, limit, renderer)
    assert shown == f"{expected}\n[cut: the first {limit} tokens of {len(text)} characters are shown]"


class Spy:
    def __init__(self, renderer: ChatRenderer) -> None:
        self._renderer = renderer
        self.encoded: list[tuple[int, bool]] = []

    def encode_text(self, text: str) -> list[int]:
        self.encoded.append((len(text), threading.current_thread() is threading.main_thread()))
        return self._renderer.encode_text(text)

    def decode(self, ids: list[int]) -> str:
        return self._renderer.decode(ids)


async def test_only_the_beginning_is_tokenized_and_a_long_one_off_the_loop(renderer: ChatRenderer) -> None:
    spy: Any = Spy(renderer)
    shown = await cut_output("7" * 3_000_000, 512, spy)
    assert shown == "7" * 512 + "\n[cut: the first 512 tokens of 3000000 characters are shown]"
    assert spy.encoded == [(CHARACTERS_PER_TOKEN * (512 + MARGIN), True)]
    spy.encoded.clear()
    await cut_output("7" * 3_000_000, 4096, spy)
    [(length, on_the_loop)] = spy.encoded
    assert INLINE_CHARACTERS < length < 100_000 and not on_the_loop
    spy.encoded.clear()
    assert await cut_output("7" * 4, 16, spy) == "7777" and spy.encoded == []
    assert await cut_output("7" * 16, 16, spy) == "7" * 16


class Big(Tool):
    async def execute(self, state: Any, arguments: dict[str, Any], **_: Any) -> ToolResult:
        if arguments["kind"] == "raise":
            raise ValueError("e" * 5_000_000)
        return ToolResult("x" * 5_000_000 if arguments["kind"] == "text" else 3)  # type: ignore[arg-type]


SCHEMA = {"type": "function", "function": {"name": "big", "parameters": {"properties": {"kind": {}}}}}


async def test_the_text_of_a_tool_has_one_bound_wherever_it_runs(tmp_path: Path) -> None:
    (tmp_path / "t.py").write_text(
        'def big(kind: str) -> str:\n    """Big.\n\n    Args:\n        kind: k\n    """\n    return "x" * 5_000_000\n'
    )
    from agentloop.imports import load_from_file

    function = load_from_file(f"{tmp_path / 't.py'}:big", "k")
    process = FunctionTool(function, {"run_in": "process"}, f"{tmp_path / 't.py'}:big")
    try:
        for tool in (Big({}, SCHEMA), FunctionTool(function), process):
            result = await Toolset([tool]).session(Task("0", "a", [])).call(ToolCall("big", {"kind": "text"}), 30)
            assert len(result.text) == LONGEST_TEXT and result.text.startswith("xxx")
            assert result.text.endswith("x\n[cut: 5,000,000 characters are too many; the first of them are kept]")
    finally:
        process.shut_down()
    session = Toolset([Big({}, SCHEMA)]).session(Task("0", "a", []))
    assert len((await session.call(ToolCall("big", {"kind": "raise"}), 30)).text) < LONGEST_TEXT + 100
    with pytest.raises(ToolError, match="a ToolResult whose text is int"):
        await session.call(ToolCall("big", {"kind": "int"}), 30)


@pytest.mark.parametrize("length", [100, 2 * INLINE_CHARACTERS])
async def test_long_messages_of_users_are_tokenized_off_the_loop(
    renderer: ChatRenderer,
    make_runner: Callable[..., EpisodeRunner],
    turn: Callable[[str], list[int]],
    length: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A prompt of the row, and what an agent or an interaction adds."""
    threads: list[bool] = []
    for name in ("start", "extend"):
        plain = getattr(renderer, name)

        def noted(*args: Any, plain: Any = plain) -> list[int]:
            threads.append(threading.current_thread() is threading.main_thread())
            return plain(*args)  # type: ignore[no-any-return]

        monkeypatch.setattr(renderer, name, noted)

    message: Message = {"role": "user", "content": "7 " * (length // 2)}

    class Says(AgentLoop):
        async def run(self, episode: Episode) -> None:
            await episode.generate()
            episode.observe(message)
            await episode.generate()

    runner = make_runner(
        [turn("Yes.<|im_end|>"), turn("No.<|im_end|>")],
        agents={"tool_agent": Says},
        config={"max_response_tokens": 10**6},
        context_length=10**6,
    )
    task = Task(task_id="7", agent_name="tool_agent", prompt=[message])
    [trajectory] = await runner.run(task, group_id="g", sample_index=0, sampling=SamplingConfig(), seed=1)
    assert len(trajectory.turns) == 2
    assert threads == [length == 100] * 2
