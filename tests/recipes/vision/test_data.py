"""Pictures and rows: only the zoomed view shows a number, and the warm start does not give the place away."""

from __future__ import annotations

import io
import json
import random
import re
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from agentloop.images import open_image
from agentloop.tool.loading import load_toolset
from agentloop.types import Task, ToolCall, Trajectory
from recipes.vision import data
from recipes.vision.reward import score


def test_a_seed_gives_the_same_rows_and_the_splits_differ() -> None:
    train = list(data.rows("train", 40))
    assert train == list(data.rows("train", 40))
    assert not {row["images"][0]["bytes"] for row in train} & {
        row["images"][0]["bytes"] for row in data.rows("val", 40)
    }
    assert data.sft_rows("act", 20) == data.sft_rows("act", 20)


def test_a_picture_has_every_colour_and_each_number_lies_in_the_last_token_of_its_region() -> None:
    rng = random.Random(0)
    for _ in range(20):
        things = data.scene(rng)
        picture = data.picture(things)
        assert len({thing.number for thing in things}) == 4
        for quarter, thing in enumerate(things):
            left, top, right, bottom = data.box(quarter)
            middle = picture.getpixel((left - 12, top - 12))
            assert middle == data.COLOURS[thing.colour]

            view = np.asarray(picture.crop((left, top, right, bottom)).convert("L"))
            ink = np.argwhere(view < 40)
            assert view.shape == (56, 56) and len(ink) > 20 and ink.min() >= 28
            # A sixth of that is 3 pixels: what the model sees of a number in the whole picture.
            assert np.ptp(ink[:, 0]) + 1 <= 20


def test_a_blank_row_asks_the_same_and_shows_nothing() -> None:
    for row, blank in zip(data.rows("train", 8), data.rows("train", 8, blank=True), strict=True):
        shown = row.pop("images"), blank.pop("images")
        assert row == blank and shown[0] != shown[1]
        picture = Image.open(io.BytesIO(shown[1][0]["bytes"]))
        assert sorted(colour for _, colour in picture.getcolors() or []) == [data.FRAME_COLOUR, (255, 255, 255)]


async def test_the_warm_start_shows_what_the_tool_returns(repo: Path) -> None:
    """The tool's own text and pixels: after the warm start, RL must meet nothing new."""
    row = data.zoom(random.Random(3))
    call, result = row["messages"][2]["tool_calls"][0]["function"], row["messages"][3]["content"]
    prompt = [{"role": "user", "content": [{"type": "image", "image": row["images"][0]["bytes"]}]}]

    toolset = load_toolset(repo / "recipes/vision/tools.yaml")
    session = toolset.session(Task("0", "a", prompt))  # type: ignore[arg-type]
    found = await session.call(ToolCall(call["name"], call["arguments"]), 10)
    await session.close()
    toolset.close()

    assert found.error is None and result == f"<image>{found.text}"
    expected = Image.open(io.BytesIO(row["images"][1]["bytes"])).convert("RGB")
    assert np.array_equal(np.asarray(open_image(found.images[0]).convert("RGB")), np.asarray(expected))


def test_the_warm_start_zooms_in_on_any_quarter() -> None:
    rng, right = random.Random(0), 0
    for _ in range(200):
        row = data.zoom(rng)
        question, call = row["messages"][1]["content"], row["messages"][2]["tool_calls"][0]["function"]["arguments"]
        colour = re.findall(r"beside the (\w+) ", question)[0]
        left, top = call["bbox_2d"][:2]
        picture = Image.open(io.BytesIO(row["images"][0]["bytes"]))
        right += picture.getpixel((left - 12, top - 12)) == data.COLOURS[colour]
    assert 30 <= right <= 70


def test_a_stage_mixes_its_kinds() -> None:
    kinds = [json.dumps(row["messages"]) for row in data.sft_rows("act", 200)]
    calls = sum("tool_calls" in text for text in kinds)
    assert 70 <= calls <= 110 and any("Which colours?" in text for text in kinds)
    assert all("tool_calls" not in json.dumps(row["messages"]) for row in data.sft_rows("see", 50))


def test_the_answer_is_the_last_number_after_the_marks() -> None:
    (row,) = islice(data.rows("val", 1), 1)
    truth = row["reward_model"]["ground_truth"]
    task, trajectory = Task("0", "a", [], ground_truth=truth), Trajectory.__new__(Trajectory)
    assert score(task, f"#### {truth}", trajectory) == 1.0
    for wrong in ("", truth, f"#### {truth}0", f"#### {truth} or 5", "####", f"#### {(int(truth) + 1) % 10}"):
        assert score(task, wrong, trajectory) == 0.0
