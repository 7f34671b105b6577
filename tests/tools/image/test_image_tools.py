"""Tools that make images: coordinates in every form, clamped sizes that the model reads, drawings."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from agentloop.errors import ToolConfigError
from agentloop.images import open_image
from agentloop.tool.loading import load_toolset
from agentloop.tool.session import ToolSession, Toolset
from agentloop.types import Task, ToolCall, ToolResult


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def quarters() -> bytes:
    """An image of 640 x 480 pixels with a red quarter at the top left and a blue one at the bottom right."""
    image = Image.new("RGB", (640, 480), "white")
    image.paste("red", (0, 0, 320, 240))
    image.paste("blue", (320, 240, 640, 480))
    return png(image)


def toolset(folder: Path, **config: Any) -> Toolset:
    names = ("tools.image.ImageZoomIn", "tools.image.DrawOnImage")
    entries = [{"class_name": name, "config": {"type": "native", **config}} for name in names]
    (folder / "tools.yaml").write_text(yaml.safe_dump({"tools": entries}))
    return load_toolset(folder / "tools.yaml")


def session(folder: Path, *images: Any, **config: Any) -> ToolSession:
    parts = [{"type": "image", "image": image} for image in images or (quarters(),)]
    prompt: Any = [{"role": "user", "content": [*parts, {"type": "text", "text": "Look."}]}]
    return toolset(folder, **config).session(Task("0", "a", prompt))


async def zoom(session: ToolSession, *box: Any, **arguments: Any) -> ToolResult:
    return await session.call(ToolCall("image_zoom_in", {"bbox_2d": list(box), **arguments}), 10)


async def draw(session: ToolSession, *shapes: Any, **arguments: Any) -> ToolResult:
    return await session.call(ToolCall("draw_on_image", {"shapes": list(shapes), **arguments}), 10)


def colors(result: ToolResult) -> np.ndarray:
    assert result.error is None, result.text
    return np.asarray(open_image(result.images[0]).convert("RGB")).astype(int)


async def test_a_box_is_shown_enlarged_and_the_text_says_what_it_is(tmp_path: Path) -> None:
    tools = session(tmp_path)
    result = await zoom(tools, 300, 220, 340, 260, label="the middle")
    shown = colors(result)
    assert shown.shape == (336, 336, 3)
    assert shown[5, 5].tolist() == [255, 0, 0] and shown[-5, -5].tolist() == [0, 0, 255]
    assert result.text == (
        "Image 1: the region [300, 220, 340, 260] of image 0 (the middle), which has 640 x 480 pixels, shown at "
        "336 x 336 pixels."
    )


@pytest.mark.parametrize(
    ("coordinates", "box"),
    [
        ("auto", (320, 240, 640, 480)),
        ("auto", (0.5, 0.5, 1, 1)),
        ("pixels", (320, 240, 640, 480)),
        ("relative", (0.5, 0.5, 1.0, 1.0)),
        ("thousandths", (500, 500, 1000, 1000)),
        ("auto", (640, 480, 320, 240)),  # corners in another order
    ],
)
async def test_coordinates_are_pixels_or_relative(tmp_path: Path, coordinates: str, box: Any) -> None:
    result = await zoom(session(tmp_path, coordinates=coordinates), *box)
    assert "[320, 240, 640, 480]" in result.text and (colors(result) == [0, 0, 255]).all()


async def test_a_box_beyond_the_border_is_cut_and_a_tiny_one_grows_and_the_model_reads_both(tmp_path: Path) -> None:
    tools = session(tmp_path)
    result = await zoom(tools, -50, -50, 100, 9999)
    assert "[0, 0, 100, 480]" in result.text and result.text.endswith("The box was cut at the image's border.")
    result = await zoom(tools, 639, 479, 640, 480)
    assert "[612, 452, 640, 480]" in result.text and result.text.endswith("enlarged around its center.")
    result = await zoom(tools, 10, 10, 10, 10)
    assert "[0, 0, 28, 28]" in result.text and result.error is None
    result = await zoom(tools, 0, 0, 640, 480)
    assert "shown at 640 x 480 pixels." in result.text


async def test_sizes_stay_within_the_limits(tmp_path: Path) -> None:
    tools = session(tmp_path, png(Image.new("RGB", (3000, 40), "red")), max_side=500)
    result = await zoom(tools, 0, 10, 3000, 11)
    height, width, _ = colors(result).shape
    assert width == 500 and height >= 7 and "[0, 0, 3000, 40]" in result.text
    result = await draw(tools, {"type": "point", "point_2d": [5, 5]})
    assert "shown at 500 x 7 pixels" in result.text and colors(result).shape[1] == 500


@pytest.mark.parametrize("size", [(16, 3000), (3000, 16), (1, 1), (1, 65535)])
async def test_a_strip_is_shown_so_that_processors_take_it(tmp_path: Path, size: tuple[int, int]) -> None:
    tools = session(tmp_path, png(Image.new("RGB", size, "red")))
    label = {"type": "label", "point_2d": [0, 0], "label": "A" * 100}
    for result in (await zoom(tools, 0, 0, 1, 1), await draw(tools, label)):
        height, width, _ = colors(result).shape
        assert max(height, width) <= 150 * min(height, width) and max(height, width) <= 1024
    assert not tools.faults


async def test_an_image_that_the_tool_made_can_be_used_again(tmp_path: Path) -> None:
    tools = session(tmp_path)
    await zoom(tools, 320, 240, 640, 480)
    result = await zoom(tools, 0, 0, 50, 50, img_idx=1)
    assert (
        result.text.startswith("Image 2: the region [0, 0, 50, 50] of image 1")
        and (colors(result) == [0, 0, 255]).all()
    )
    result = await zoom(tools, 0, 0, 50, 50, img_idx=3)
    assert result.error == "image 3 does not exist: the images are 0 to 2"
    assert (await zoom(tools, 0, 0, 50, 50, img_idx=-1)).error == "image -1 does not exist: the images are 0 to 2"


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ((700, 0, 800, 10), "lies outside the image of 640 x 480 pixels"),
        ((1, 2, 3), "has to be a list of 4 numbers"),
        ((1, 2, 3, "four"), "'bbox_2d[3]' of image_zoom_in has to be of type number"),
        ((1, 2, 3, True), "'bbox_2d[3]' of image_zoom_in has to be of type number"),
        ((1, 2, 3, float("nan")), "has to be a list of 4 numbers, not nan"),
        ((1, 2, 3, 1e300), "too large"),
        ((1, 2, 3, 10**400), "too large"),
    ],
)
async def test_a_wrong_box_is_an_error_that_the_model_reads(tmp_path: Path, box: Any, reason: str) -> None:
    result = await zoom(session(tmp_path), *box)
    assert result.error is not None and reason in result.error and not result.images
    assert "Error: " not in result.error  # not an exception of the tool


async def test_a_row_without_images_and_one_with_a_broken_image(tmp_path: Path) -> None:
    tools = toolset(tmp_path).session(Task("0", "a", [{"role": "user", "content": "x"}]))
    assert (await zoom(tools, 0, 0, 1, 1)).error == "the question has no image"
    broken = await zoom(session(tmp_path, quarters()[:900]), 0, 0, 1, 1)
    assert broken.error is not None and "cannot be decoded" in broken.error


async def test_shapes_are_drawn_where_they_belong(tmp_path: Path) -> None:
    tools = session(tmp_path, png(Image.new("RGB", (400, 200), "white")))
    result = await draw(
        tools,
        {"type": "line", "bbox_2d": [0, 100, 400, 100], "color": "blue"},
        {"type": "box", "bbox_2d": [0.25, 0.1, 0.75, 0.3]},
        {"type": "point", "point_2d": [50, 50], "color": "green"},
        {"type": "label", "point_2d": [300, 150], "label": "Q", "color": "black"},
    )
    shown = colors(result)
    assert shown[100, 200].tolist() == [0, 0, 255] and shown[50, 50].tolist() == [0, 128, 0]
    assert shown[20, 200].tolist() == [255, 0, 0] and shown[40, 200].tolist() == [255, 255, 255]
    assert (shown[150:175, 300:330] == 0).all(axis=-1).any()
    assert result.text == "Image 1: image 0 with 1 line, 1 box, 1 point, 1 label, 400 x 200 pixels."
    again = await draw(tools, {"type": "line", "bbox_2d": [0, 0, 0, 999]}, img_idx=1)
    assert again.text.endswith("Coordinates beyond the border were moved to it.")
    assert colors(again)[100, 200].tolist() == [0, 0, 255], "it is drawn on the drawing"


async def test_the_rows_image_is_not_changed(tmp_path: Path) -> None:
    image = Image.new("RGB", (100, 100), "white")
    tools = session(tmp_path, image)
    await draw(tools, {"type": "line", "bbox_2d": [0, 0, 99, 99], "label": "a long label " * 7})
    assert image.getextrema() == ((255, 255),) * 3


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ("line", "has to be of type object"),
        ({"type": "circle"}, "type' of draw_on_image has to be one of"),
        ({"type": "line"}, "bbox_2d has to be a list of 4 numbers"),
        ({"type": "point", "point_2d": [1]}, "point_2d has to be a list of 2 numbers"),
        ({"type": "label", "point_2d": [1, 1]}, "label has to be text"),
        ({"type": "label", "point_2d": [1, 1], "label": "x" * 101}, "label has to be text"),
        ({"type": "box", "bbox_2d": [900, 0, 950, 1]}, "lies outside"),
        ({"type": "point", "point_2d": [1, 1], "color": "#12"}, "color' of draw_on_image has to be one of"),
        ({"type": "point", "point_2d": [1, 1], "size": 3}, "'size' is not one of"),
    ],
)
async def test_a_wrong_shape_is_named_by_its_place(tmp_path: Path, shape: Any, reason: str) -> None:
    result = await draw(session(tmp_path), {"type": "point", "point_2d": [1, 1]}, shape)
    assert result.error is not None and "shapes[1]" in result.error and reason in result.error
    assert (await draw(session(tmp_path))).error == "shapes has 0 entries: give 1 to 64"
    point = {"type": "point", "point_2d": [1, 1]}
    assert (await draw(session(tmp_path), *[point] * 65)).error == "shapes has 65 entries: give 1 to 64"


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"coordinates": "inches"}, "config.coordinates is 'inches'"),
        ({"max_side": 0}, "config.max_side is 0"),
        ({"max_sides": 9}, "unknown key 'max_sides'"),
    ],
)
def test_a_wrong_config_is_refused(tmp_path: Path, config: dict[str, Any], reason: str) -> None:
    with pytest.raises(ToolConfigError, match=reason):
        toolset(tmp_path, **config)


def test_the_schemas_are_those_that_models_know(tmp_path: Path) -> None:
    zoom_in, draw_on = toolset(tmp_path).schemas
    assert zoom_in["function"]["name"] == "image_zoom_in"
    assert list(zoom_in["function"]["parameters"]["properties"]) == ["bbox_2d", "label", "img_idx"]
    assert draw_on["function"]["name"] == "draw_on_image"
