"""A run does not start on a server that drops its images."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from agentloop.chat import ChatRenderer
from agentloop.chat.images import load_image_tokens
from agentloop.client.client import GenerateResult
from agentloop.config.server import ServerSettings
from agentloop.errors import ModelError
from agentloop.types import StopReason, Task
from agentloop.wire import SamplingParams
from rollout_server.engines.base import Generation
from rollout_server.engines.torch_engine.create import create_torch_engine
from rollout_server.engines.torch_engine.engine import TorchEngine
from rollout_server.engines.torch_engine.model.vision import VisionRunner
from tests.rollout_server.support import save_vision_model
from trainer.rollouts.image_canary import PROMPTS, check_images_are_seen

TEMPLATE = """{% for message in messages %}{% if message.content is string %}{{ message.content }}{% else %}\
{% for part in message.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>\
{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|video_pad|>{% endfor %}"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vision_model(tmp_path_factory.mktemp("vl"), "qwen2_5_vl", seed=0)


@pytest.fixture(scope="module")
def renderer(model: Path) -> ChatRenderer:
    return ChatRenderer(
        AutoTokenizer.from_pretrained(model), chat_template=TEMPLATE, images=load_image_tokens(str(model))
    )


def row(*images: Any) -> Task:
    text = {"type": "text", "text": "一丁丂"}
    content = [*({"type": "image", "image": image} for image in images), text] if images else "一丁丂"
    return Task(task_id="7", agent_name="a", prompt=[{"role": "user", "content": content}], images=list(images))


def shown(wide: int = 56, high: int = 84) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((wide, high)).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


class Fake:
    """A server whose logprobs change by `seen` with other images, and by `rounding` with each request."""

    def __init__(self, *, seen: float = 0.0, rounding: float = 0.0, tokens: bool = False) -> None:
        self.seen, self.rounding, self.tokens = seen, rounding, tokens
        self.asked: list[list[str]] = []

    async def generate(
        self,
        input_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        session_id: str,
        rid: str,
        image_data: Sequence[str] = (),
    ) -> GenerateResult:
        assert sampling.temperature == 0
        self.asked.append(list(image_data))
        other = image_data != self.asked[0]
        logprobs = [-1.0 - self.rounding * (len(self.asked) % 2) - self.seen * other] * 4
        return GenerateResult([5, 6, 7, 8 + (self.tokens and other)], logprobs, [0] * 4, StopReason.LENGTH)


async def check(server: Any, renderer: ChatRenderer, *rows: Task, context: int = 512) -> None:
    await check_images_are_seen(server, renderer, rows, None, context)


async def test_a_server_that_sees_is_asked_about_one_prompt(renderer: ChatRenderer) -> None:
    server = Fake(seen=1e-3)
    await check(server, renderer, row(), row(shown(), shown(28, 28)), row(shown()))
    first, repeated, swapped = server.asked
    assert first == repeated
    assert all(a != b for a, b in zip(first, swapped, strict=True)), "each image is swapped"


@pytest.mark.parametrize("server", [Fake(), Fake(rounding=0.01, seen=0.005)], ids=["blind", "blind and in bfloat16"])
async def test_a_blind_server_ends_the_run(renderer: ChatRenderer, server: Fake) -> None:
    with pytest.raises(ModelError, match="does not see the images") as caught:
        await check(server, renderer, *[row(shown())] * 9)
    assert "rollout.image_canary=false" in str(caught.value)
    assert len(server.asked) == 3 * PROMPTS


async def test_prompts_without_usable_images_are_not_asked(renderer: ChatRenderer) -> None:
    server = Fake()
    await check(server, renderer, row(), row(b"broken"))
    await check(server, renderer, row(shown(280, 280)), context=100)
    assert not server.asked


class Direct:
    """The torch engine as a generator."""

    def __init__(self, engine: TorchEngine) -> None:
        self._engine = engine

    async def generate(
        self, input_ids: Sequence[int], sampling: SamplingParams, *, rid: str, image_data: Sequence[str], **_: Any
    ) -> GenerateResult:
        result = await self._engine.generate(Generation(rid, list(input_ids), sampling, image_data=list(image_data)))
        return GenerateResult(result.output_ids, result.logprobs, [0] * len(result.logprobs), StopReason.LENGTH)


async def test_the_torch_engine_sees_until_it_is_blinded(
    model: Path, renderer: ChatRenderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = create_torch_engine(ServerSettings(model=str(model)))
    try:
        await check(Direct(engine), renderer, row(shown()))
        blinded = torch.zeros(())
        features = VisionRunner._run_tower

        def blind(self: VisionRunner, patches: Any) -> Any:
            found = features(self, patches)
            return type(found)(found.rows_IE * blinded, tuple(rows * blinded for rows in found.added_IE))

        monkeypatch.setattr(VisionRunner, "_run_tower", blind)
        await engine.flush_cache()
        with pytest.raises(ModelError, match="does not see the images"):
            await check(Direct(engine), renderer, row(shown()), row(shown(28, 56)))
    finally:
        await engine.close()
