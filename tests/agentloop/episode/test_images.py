"""Images of rows and tools: decoded off the event loop, in the ids, the requests and the trajectory."""

from __future__ import annotations

import asyncio
import base64
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from agentloop.agent.runner import EpisodeRunner
from agentloop.chat import ChatRenderer
from agentloop.chat.images import ImageTokens
from agentloop.config import SamplingConfig
from agentloop.data import load_tasks
from agentloop.episode import images as episode_images
from agentloop.episode.images import ImageLoader, named_images
from agentloop.errors import ImageError
from agentloop.images import ImageFile
from agentloop.testing import FakeGenerator
from agentloop.tool.base import Tool
from agentloop.tool.session import Toolset
from agentloop.types import EpisodeStatus, StopReason, Task, ToolResult, Trajectory
from tools.image import ImageZoomIn

Renderers = Callable[..., ChatRenderer]

COUNT = 28 * 28
PAD = "<|image_pad|>"
CALL = '<tool_call>\n{"name": "image_zoom_in", "arguments": {"bbox_2d": [0, 0, 56, 56]}}\n</tool_call><|im_end|>'


def png(width: int, height: int, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(buffer, "PNG", **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def vision(renderer_of: Renderers) -> Callable[..., ChatRenderer]:
    """A renderer of a template, which counts one token for each 28 x 28 pixels."""

    def make(name: str = "qwen3_vl", **options: Any) -> ChatRenderer:
        plain = renderer_of(name)
        pad = plain.tokenizer.convert_tokens_to_ids(PAD)
        count = ImageTokens(pad, lambda height, width: max(1, height * width // COUNT))
        return renderer_of(name, images=count, **options)

    return make


def row(*images: Any) -> Task:
    parts = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": "Look."}]
    return Task("3", "tool_agent", [{"role": "user", "content": parts}])


async def run(
    make_runner: Callable[..., EpisodeRunner], renderer: ChatRenderer, task: Task, *turns: str, **changes: Any
) -> tuple[list[Trajectory], FakeGenerator]:
    ids = [renderer.tokenizer.backend_tokenizer.encode(turn, add_special_tokens=False).ids for turn in turns]
    generator = FakeGenerator(ids, stop_ids=frozenset({renderer.end_of_turn or -1}))
    zoom = Toolset([ImageZoomIn({}, ImageZoomIn.default_schema)])
    config = changes.pop("config", {}) | {"max_response_tokens": changes.pop("response", 2000)}
    runner = make_runner(generator, renderer=renderer, toolset=changes.pop("toolset", zoom), config=config, **changes)
    found = await runner.run(task, group_id="g", sample_index=0, sampling=SamplingConfig(max_new_tokens=100))
    return found, generator


def runs_of(trajectory: Trajectory, pad: int) -> list[int]:
    """The lengths of the runs of image placeholders."""
    found, before = [], None
    for token in trajectory.token_ids:
        if token == pad:
            found[-1:] = [found[-1] + 1] if before == pad else [*found[-1:], 1]
        before = token
    return found


@pytest.mark.parametrize(("template", "role"), [("qwen3_vl", "tool"), ("qwen2_5", "tool"), ("qwen2_5", "user")])
async def test_images_of_rows_and_tools_are_in_ids_requests_and_trajectory(
    make_runner: Any, vision: Any, template: str, role: str
) -> None:
    """Also for a template whose tool turns, or whose turns at all, show text only (qwen2_5: see `shows_images`)."""
    renderer = vision("qwen3_vl") if template == "qwen3_vl" else vision_without_tool_images(vision, role)
    exif = Image.Exif()
    exif[0x0112] = 6
    sideways = png(56, 112, exif=exif)
    [trajectory], generator = await run(
        make_runner, renderer, row(sideways, png(56, 56)), f"Closer.\n{CALL}", CALL, "Done.<|im_end|>"
    )
    assert trajectory.status is EpisodeStatus.OK, trajectory.error
    assert [len(images) for images in generator.images] == [2, 3, 4]
    assert trajectory.images and all(isinstance(image, ImageFile) for image in trajectory.images)
    assert [(i.width, i.height) for i in trajectory.images] == [(112, 56), (56, 56), (336, 336), (336, 336)]
    pad = renderer.tokenizer.convert_tokens_to_ids(PAD)
    assert runs_of(trajectory, pad) == [8, 4, 144, 144]
    sent = [Image.open(io.BytesIO(base64.b64decode(data))).size for data in generator.images[-1]]
    assert sent == [(112, 56), (56, 56), (336, 336), (336, 336)]
    assert isinstance(trajectory.messages[2]["content"], list)
    text = renderer.decode([token for token in trajectory.token_ids if token != pad])
    if template == "qwen3_vl":
        assert text.count("<tool_response>\n<|vision_start|><|vision_end|>Image 2: ") == 1
    elif role == "tool":
        assert (
            text.count("<|im_start|>user\n<|vision_start|><|vision_end|>Image returned by image_zoom_in.<|im_end|>")
            == 2
        )
    else:
        assert text.count("<|im_start|>user\n<tool_response>\n<|vision_start|><|vision_end|>Image 2: ") == 1


def vision_without_tool_images(vision: Any, role: str) -> ChatRenderer:
    """Qwen3-VL's template, whose tool turns write text only."""
    renderer = vision("qwen3_vl", tool_role="tool")
    text = renderer.template.text
    head, tool = text.split('{%- elif message.role == "tool" %}')
    shown = "<|vision_start|><|image_pad|><|vision_end|>"
    assert shown in tool
    changed = head + '{%- elif message.role == "tool" %}' + tool.replace(shown, "")
    return ChatRenderer(renderer.tokenizer, changed, tool_role=role, images=renderer._rendering._images)


async def test_several_results_with_images_are_folded_into_one_user_turn(vision: Any) -> None:
    renderer = vision_without_tool_images(vision, "tool")

    def result(name: str, *images: bytes) -> Any:
        parts = [{"type": "image", "image": image} for image in images]
        return {"role": "tool", "name": name, "content": [*parts, {"type": "text", "text": f"by {name}"}]}

    user: Any = {"role": "user", "content": "Go on."}
    ids = renderer.extend([], "length", [result("a", png(28, 28), png(56, 28)), result("b", png(28, 28)), user])
    pad = renderer.tokenizer.convert_tokens_to_ids(PAD)
    text = renderer.decode(ids)
    assert ids.count(pad) == 4 and text.count("<|im_start|>user") == 2
    assert text.index("by a") < text.index("by b") < text.index("<|vision_start|>")
    assert "Images returned by a, b.\nGo on.<|im_end|>" in text


async def test_a_broken_image_fails_its_episode_and_no_other(make_runner: Any, vision: Any) -> None:
    renderer = vision()
    good, cut = png(200, 200), png(200, 200)[:-30]
    [failed], generator = await run(make_runner, renderer, row(good, cut), "Done.<|im_end|>")
    assert (
        failed.status is EpisodeStatus.FAILED
        and "row 3: column 'prompt', image 2: an image cannot be decoded" in str(failed.error)
    )
    assert failed.reward is None and not generator.prompts
    [fine], _ = await run(make_runner, renderer, row(good), "Done.<|im_end|>")
    assert fine.status is EpisodeStatus.OK


async def test_a_broken_image_of_a_row_is_no_fault_of_the_agent(make_runner: Any, vision: Any, tmp_path: Path) -> None:
    """The frames of the library that decodes images are not those of user code."""
    (tmp_path / "cut.png").write_bytes(png(200, 200)[:-30])
    (tmp_path / "rows.jsonl").write_text(
        '{"prompt": [{"role": "user", "content": "<image>?"}], "images": ["cut.png"], "agent_name": "tool_agent"}'
    )
    [task] = load_tasks(str(tmp_path / "rows.jsonl"), "data.train", "d")
    faults: list[Any] = []
    [failed], _ = await run(make_runner, vision(), task, on_fault=lambda *fault: faults.append(fault))
    assert failed.error is not None and not faults and not failed.faults
    assert failed.error.startswith("ImageError: row 0: column 'images', image 1: an image cannot be decoded: ")
    assert f"{tmp_path / 'cut.png'}: image file is truncated" in failed.error


class Returns(Tool):
    """Returns images that may be none."""

    def __init__(self, images: Any) -> None:
        super().__init__({}, ImageZoomIn.default_schema)
        self._images = images

    async def execute(self, state: Any, arguments: dict[str, Any], **execute_kwargs: Any) -> ToolResult:
        return ToolResult("see", images=self._images)


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        ([png(28, 28), 3], "whose image 2 cannot be used: an int is not an image"),
        ([png(28, 28), b"no image"], "whose image 2 cannot be used: cannot read an image: it is not an image"),
        ([png(200, 200)[:-30]], "whose image 1 cannot be used: an image cannot be decoded: image file is truncated"),
        (["none.png"], "whose image 1 cannot be used: cannot read an image: none.png: No such file"),
        ([None], "whose image 1 cannot be used: a NoneType is not an image"),
        (Image.new("RGB", (28, 28)), "whose images are of type Image, not a list"),
        ("a.png", "whose images are of type str, not a list"),
        (np.zeros((2, 2)), "whose images are of type ndarray, not a list"),
    ],
)
async def test_a_tool_that_returns_a_broken_image_is_named_and_its_call_is_an_error(
    make_runner: Any, vision: Any, images: Any, reason: str
) -> None:
    [failed], _ = await run(make_runner, vision(), row(png(56, 56)), CALL, toolset=Toolset([Returns(images)]))
    assert failed.status is EpisodeStatus.FAILED
    assert f"ToolError: image_zoom_in returned a ToolResult {reason}" in str(failed.error)
    [call] = [span for span in failed.spans if span.name == "tool"]
    assert call.error is not None and reason in call.error


async def test_an_image_of_an_agent_or_a_tool_that_the_model_refuses_is_named(make_runner: Any, vision: Any) -> None:
    def count(height: int, width: int) -> int:
        if height > 100 * width:
            raise ValueError("a strip")
        return 1

    renderer = vision()
    renderer._rendering._images = ImageTokens(renderer.image_token, count)
    strip = Toolset([Returns([png(28, 28), png(2, 280)])])
    [failed], _ = await run(make_runner, renderer, row(png(56, 56)), CALL, toolset=strip)
    assert "ImageError: an image of the tool image_zoom_in: the model does not take an image of" in str(failed.error)
    message: Any = {"role": "user", "content": [{"type": "image", "image": b"x"}]}
    with pytest.raises(ImageError, match="image 1 of these messages: cannot read"), named_images([message], row()):
        await ImageLoader().load([message])


async def test_an_image_without_room_is_not_in_the_trajectory(make_runner: Any, vision: Any) -> None:
    """Its placeholders are not in the ids, so the trainer must not get the image."""
    [cut], generator = await run(make_runner, vision(), row(png(56, 56)), CALL, response=60)
    assert cut.status is EpisodeStatus.OK and cut.stop_reason is StopReason.LENGTH
    assert len(generator.prompts) == 1 and len(cut.images) == 1
    assert cut.messages[-1]["role"] == "tool", "the trace shows what the tool returned"


async def test_decoding_leaves_the_event_loop_free(monkeypatch: pytest.MonkeyPatch) -> None:
    reading = episode_images.read_image

    def slow(value: Any) -> ImageFile:
        time.sleep(0.2)
        return reading(value)

    monkeypatch.setattr(episode_images, "read_image", slow)
    loader, ticks = ImageLoader(), 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0.005)

    ticking = asyncio.create_task(tick())
    image = png(28, 28)
    message: Any = row(image).prompt
    loaded = await asyncio.gather(*(loader.load(message) for _ in range(8)))
    ticking.cancel()
    assert ticks > 10, "the event loop stood still"
    assert len({id(one[0]["content"][0]["image"]) for one in loaded}) == 1, "a group decodes an image once"
    assert message[0]["content"][0]["image"] is image, "the row is not changed"


async def test_few_images_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(episode_images, "REMEMBERED", 2)
    loader = ImageLoader()
    await loader.load(row(*(png(28, 28 * number) for number in range(1, 6))).prompt)
    assert len(loader._known) == 2


async def test_parts_of_an_agents_message_may_be_texts() -> None:
    message: Any = {"role": "user", "content": ["Look:", {"type": "image", "image": png(28, 28)}]}
    [loaded] = await ImageLoader().load([message])
    assert loaded["content"][0] == "Look:" and isinstance(loaded["content"][1]["image"], ImageFile)  # type: ignore[index]


async def test_a_cancelled_episode_leaves_the_image_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    loader, message = ImageLoader(), row(png(28, 28)).prompt
    reading = episode_images.read_image
    monkeypatch.setattr(episode_images, "read_image", lambda value: time.sleep(0.1) or reading(value))
    first, second = asyncio.create_task(loader.load(message)), asyncio.create_task(loader.load(message))
    await asyncio.sleep(0.02)
    first.cancel()
    assert isinstance((await second)[0]["content"][0]["image"], ImageFile)
