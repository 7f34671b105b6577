"""Messages and requests of an episode: complete enough for any template and any engine."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import PreTrainedTokenizerFast

from agentloop.agent.runner import EpisodeRunner
from agentloop.chat import ChatRenderer, load_tokenizer
from agentloop.chat.images import ImageTokens
from agentloop.config import SamplingConfig
from agentloop.images import image_data
from agentloop.testing import FakeGenerator
from agentloop.tool.base import Tool
from agentloop.tool.session import Toolset
from agentloop.types import EpisodeStatus, Task, ToolResult, Trajectory

CALL = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "12 * 34"}}\n</tool_call><|im_end|>'
OWN = Path(__file__).parent / "templates"
Make = Callable[..., EpisodeRunner]
Ids = Callable[[str], list[int]]


async def run(runner: EpisodeRunner, task: Task) -> Trajectory:
    sampling = SamplingConfig(max_new_tokens=200)
    return (await runner.run(task, group_id="g0", sample_index=0, sampling=sampling, seed=1))[-1]


def encode(renderer: ChatRenderer, text: str) -> list[int]:
    return list(renderer.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)


async def test_a_call_and_its_result_have_one_id(make_runner: Make, turn: Ids, task: Task) -> None:
    two = CALL.removesuffix("<|im_end|>") + "\n" + CALL
    trajectory = await run(make_runner([turn(two), turn(CALL), turn("#### 408<|im_end|>")]), task)
    calls = [call["id"] for message in trajectory.messages for call in message.get("tool_calls", ())]
    results = [message["tool_call_id"] for message in trajectory.messages if message["role"] == "tool"]
    assert calls == results and len(set(calls)) == 3
    assert all(re.fullmatch("[a-z0-9]{9}", call) for call in calls)


async def test_a_malformed_call_is_answered_under_a_name_and_an_id(make_runner: Make, turn: Ids, task: Task) -> None:
    broken = turn('<tool_call>\n{"name": "calculator"\n</tool_call><|im_end|>')
    trajectory = await run(make_runner([broken, turn("#### 408<|im_end|>")]), task)
    [answer] = [message for message in trajectory.messages if message["role"] == "tool"]
    assert answer["name"] == "unreadable_call" and len(answer["tool_call_id"]) == 9


async def test_reasoning_is_kept_beside_the_text(make_runner: Make, turn: Ids, task: Task) -> None:
    trajectory = await run(make_runner([turn("<think>\nhm\n</think>\n\n#### 408<|im_end|>")]), task)
    assert trajectory.messages[-1]["reasoning_content"] == "hm"
    assert trajectory.messages[-1]["content"] == "#### 408"


async def test_the_engine_is_told_where_a_turn_ends(make_runner: Make, turn: Ids, task: Task) -> None:
    generator = FakeGenerator([turn("#### 408<|im_end|>")], stop_ids=frozenset(turn("<|im_end|>")))
    await run(make_runner(generator), task)
    assert generator.sampling[0].stop_token_ids == turn("<|im_end|>")


@pytest.mark.parametrize(("sampled", "kept"), [("abcdefgh9", True), ("1", False), ("", False), ("[/INST]", False)])
def test_a_sampled_call_id_is_kept_where_the_template_takes_it(
    quickstart_model: Path, sampled: str, kept: bool
) -> None:
    template = (OWN / "mistral_v3.jinja").read_text(encoding="utf-8")
    tokenizer = load_tokenizer(str(quickstart_model))
    listed = re.match(r"\{#- control tokens: (.*?) #\}", template)
    assert listed is not None
    tokenizer.add_tokens(listed[1].split(), special_tokens=True)
    found = ChatRenderer(tokenizer, chat_template=template).call_id(sampled, 3, 1)
    assert found == (sampled if kept else "c00030001")


class Camera(Tool):
    """Returns a picture."""

    async def execute(self, state: Any, arguments: dict[str, Any], **execute_kwargs: Any) -> ToolResult:
        return ToolResult("a photo", images=[Image.new("RGB", (56, 28), "red")])


async def test_images_of_rows_and_tools_are_in_the_ledger_and_go_to_the_engine(make_runner: Make, shared: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(shared / "tokenizers" / "qwen"))
    template = (shared / "chat_templates" / "qwen3_vl.jinja").read_text(encoding="utf-8")
    pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    images = ImageTokens(pad, lambda height, width: (height // 28) * (width // 28))
    renderer = ChatRenderer(tokenizer, chat_template=template, images=images)
    schema = {
        "type": "function",
        "function": {"name": "camera", "description": "d", "parameters": {"type": "object", "properties": {}}},
    }
    first = Image.new("RGB", (84, 28), "blue")
    prompt: Any = [
        {"role": "user", "content": [{"type": "image", "image": first}, {"type": "text", "text": "What is it?"}]}
    ]
    call = encode(renderer, '<tool_call>\n{"name": "camera", "arguments": {}}\n</tool_call><|im_end|>')
    generator = FakeGenerator(
        [call, encode(renderer, "Red.<|im_end|>")], stop_ids=frozenset(encode(renderer, "<|im_end|>"))
    )
    runner = make_runner(generator, renderer=renderer, toolset=Toolset([Camera({}, schema)]))
    trajectory = await run(runner, Task("0", "tool_agent", prompt))
    assert (trajectory.status, trajectory.error) == (EpisodeStatus.OK, None)
    assert [ids.count(pad) for ids in generator.prompts] == [3, 5]
    assert generator.images[0] == [image_data(first)]
    assert generator.images[1] == [image_data(first), image_data(trajectory.images[1])]
    assert image_data(trajectory.images[0]) == image_data(first) and len(trajectory.images) == 2
    assert "a photo" in renderer.decode(trajectory.token_ids)


async def test_without_images_a_generator_is_asked_as_ever(make_runner: Make, turn: Ids, task: Task) -> None:
    class Plain(FakeGenerator):
        async def generate(self, input_ids: Any, sampling: Any, *, session_id: str, rid: str) -> Any:  # type: ignore[override]
            return await super().generate(input_ids, sampling, session_id=session_id, rid=rid)

    trajectory = await run(
        make_runner(Plain([turn("#### 408<|im_end|>")], stop_ids=frozenset(turn("<|im_end|>")))), task
    )
    assert trajectory.status is EpisodeStatus.OK
