"""`agentloop check`, and what else reads rows, of rows with images for a vision-language model."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from agentloop import rollout
from agentloop.errors import DataError
from trainer.commands.check import check_command


@pytest.fixture
def vision(repo: Path) -> Path:
    return repo / "recipes" / "vision"


def write(folder: Path, *rows: dict[str, Any]) -> Path:
    Image.new("RGB", (56, 56), "red").save(folder / "good.png")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


def row(*images: str, column: str = "images", text: str = "<image>Which number?") -> dict[str, Any]:
    prompt = [{"role": "user", "content": text}]
    return {"prompt": prompt, column: list(images), "reward_model": {"ground_truth": "3"}, "data_source": "mine"}


def check(vision: Path, rows: Path, **options: Any) -> int:
    overrides = [f"data.train={rows}", f"data.val={rows}"]
    return check_command(vision / "recipe.yaml", overrides, conversations=2, **{"offline": True, **options})


async def test_images_in_a_misspelt_column_are_named(vision: Path, tmp_path: Path) -> None:
    rows = write(tmp_path, row("good.png"), row("good.png", column="imgs"))
    named = r"row 1 \(line 2\) has 0 images and 1 place .*column 'imgs' seems to hold them"
    with pytest.raises(DataError, match=named):
        check(vision, rows)
    episodes = rollout("http://127.0.0.1:9", str(rows), model=vision / "model")
    async with contextlib.aclosing(episodes):
        with pytest.raises(DataError, match=named):
            await anext(episodes)


def test_a_mark_is_text_for_a_model_without_images(repo: Path, tmp_path: Path) -> None:
    rows = write(tmp_path, row(text="What is an <image> tag?"), row(text="2"))
    assert check(repo / "recipes" / "quickstart", rows) == 0
