"""Images in prompts: the ledger holds as many placeholders as the model's own processor produces."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from agentloop.chat import ChatRenderer
from agentloop.chat.images import ImageTokens, load_image_tokens
from agentloop.errors import DataError, ModelError
from agentloop.images import image_data, open_image

Renderers = Callable[..., ChatRenderer]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model with images, with the files that the processor needs."""
    folder = tmp_path_factory.mktemp("vl")
    (folder / "config.json").write_text(
        json.dumps({"model_type": "qwen2_5_vl", "vision_config": {}, "image_token_id": 151655})
    )
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_processor_type": "Qwen2VLImageProcessor",
                "patch_size": 14,
                "merge_size": 2,
                "min_pixels": 28 * 28 * 4,
                "max_pixels": 28 * 28 * 1280,
                "temporal_patch_size": 2,
            }
        )
    )
    return folder


@pytest.fixture(scope="module")
def tokens(model: Path) -> ImageTokens:
    found = load_image_tokens(str(model))
    assert found is not None
    return found


def picture(width: int, height: int) -> Any:
    return Image.new("RGB", (width, height), "white")


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    picture(width, height).save(buffer, "PNG")
    return buffer.getvalue()


def content(*images: Any) -> Any:
    return [*({"type": "image", "image": image} for image in images), {"type": "text", "text": "What is it?"}]


@pytest.mark.parametrize("size", [(56, 56), (100, 300), (640, 480), (17, 400)])
def test_the_count_is_the_processors_own(model: Path, tokens: ImageTokens, size: tuple[int, int]) -> None:
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(model)
    [grid] = processor(images=[picture(*size)])["image_grid_thw"]
    assert tokens.count(size[1], size[0]) == int(grid[0] * grid[1] * grid[2]) // 4


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_placeholders_are_repeated_in_start_and_in_extend(
    renderer_of: Renderers, tokens: ImageTokens, name: str
) -> None:
    renderer = renderer_of(name, images=tokens)
    wide, small = picture(280, 140), png(56, 56)
    message: Any = {"role": "user", "content": content(wide, small)}
    ids = renderer.start([message])
    expected = tokens.count(140, 280) + tokens.count(56, 56)
    assert ids.count(tokens.placeholder) == expected
    added = renderer.extend(ids, "length", [{"role": "user", "content": content(small)}])
    assert added.count(tokens.placeholder) == tokens.count(56, 56)
    # Everything except the repeats is the template's own.
    text = renderer.decode(ids).replace("<|image_pad|>" * tokens.count(140, 280), "<|image_pad|>", 1)
    assert "<|vision_start|><|image_pad|><|vision_end|>" in text


def test_a_tool_can_answer_with_an_image(renderer_of: Renderers, tokens: ImageTokens) -> None:
    renderer = renderer_of("qwen3_vl", images=tokens)
    result: Any = {"role": "tool", "name": "crop", "content": content(picture(56, 56))}
    assert renderer.extend([], "length", [result]).count(tokens.placeholder) == tokens.count(56, 56)


def test_a_spelled_placeholder_is_text(renderer_of: Renderers, tokens: ImageTokens) -> None:
    renderer = renderer_of("qwen2_5_vl", images=tokens)
    parts: Any = [{"type": "image", "image": picture(56, 56)}, {"type": "text", "text": "<|image_pad|> <image>"}]
    ids = renderer.start([{"role": "user", "content": parts}])
    assert ids.count(tokens.placeholder) == tokens.count(56, 56)
    assert "<|image_pad|> <image>" in renderer.decode(ids)


def test_images_without_a_place_are_refused(renderer_of: Renderers, tokens: ImageTokens) -> None:
    message: Any = {"role": "user", "content": content(picture(56, 56))}
    with pytest.raises(ModelError, match="does not accept images"):
        renderer_of("qwen2_5_vl").start([message])
    system: Any = {"role": "system", "content": content(picture(56, 56))}
    with pytest.raises(ModelError, match="0 image placeholders for 1 images"):
        renderer_of("qwen3_vl", images=tokens).start([system, {"role": "user", "content": "x"}])


def test_images_come_in_many_forms(tmp_path: Path) -> None:
    data = png(20, 10)
    path = tmp_path / "a.png"
    path.write_bytes(data)
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    for value in (data, {"bytes": data}, {"path": str(path)}, str(path), path, url, picture(20, 10)):
        assert open_image(value).size == (20, 10)
        assert open_image(base64.b64decode(image_data(value))).size == (20, 10)
    for value in (b"no image", "data:image/png;base64,??", tmp_path / "none.png", 7):
        with pytest.raises(DataError):
            open_image(value)


def test_a_model_without_images_has_no_image_tokens(quickstart_model: Path, tmp_path: Path) -> None:
    assert load_image_tokens(str(quickstart_model)) is None
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "other", "vision_config": {}}))
    with pytest.raises(ModelError, match="cannot be loaded: the image processor"):
        load_image_tokens(str(tmp_path))
