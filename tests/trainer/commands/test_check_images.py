"""`agentloop check`, and what else reads rows, of rows with images for a vision-language model."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from agentloop import rollout
from agentloop.errors import DataError, ImageError
from trainer.commands import check as check_module
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


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (
            "none/a.png",
            "/none/a.png: No such file or directory\n  fix: correct 'none/a.png': paths are relative",
        ),
        ("empty.png", "/empty.png: it is not an image"),
        ("text.png", "/text.png: it is not an image"),
        ("https://example.org/a.png", "images are not downloaded: https://...\n  fix: download them first"),
    ],
)
def test_a_row_whose_image_cannot_be_read_is_a_warning_and_the_report_is_complete(
    vision: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, reason: str
) -> None:
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("text")
    rows = write(tmp_path, row("good.png"), row("good.png", name, text="<image><image>Which?"), row("good.png"))
    assert check(vision, rows) == 0
    out, err = capsys.readouterr()
    said = " ".join((out + err).split())
    for split in ("train", "val"):
        assert f"warning: data.{split}: 1 of 3 rows have an image that cannot be read" in said
        assert f"{split} 3 rows; tokens of the first prompt" in said
    assert "rows.jsonl, row 1 (line 2): column 'images', image 2: " in said
    assert " ".join(reason.split()) in said and "no problem found" in said

    with pytest.raises(ImageError, match=r"none of the 2 rows has .*row 0 \(line 1\): column 'images', image 1"):
        check(vision, write(tmp_path, row(name), row(name)))


def test_a_report_without_a_prompt_that_can_be_measured(
    vision: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_module, "MEASURED_ROWS", 1)
    assert check(vision, write(tmp_path, row("none.png"), row("good.png"))) == 0
    assert "train        2 rows\n" in capsys.readouterr().out
