"""Fine-tuning rows with images: the placeholders of a rollout, the files beside them, no shared image."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from agentloop.chat import ChatRenderer
from agentloop.chat.images import ImageTokens
from agentloop.errors import DataError
from trainer.sft.rows import read_rows
from trainer.sft.stage import TokenizedRows
from trainer.sft.tokenizing import SftRow, SftTokenizer, shared_prefix

SYSTEM = {"role": "system", "content": "You answer questions about pictures, briefly."}


def png(width: int, height: int, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(buffer, "PNG", **options)
    return buffer.getvalue()


def chat(*texts: str) -> list[dict[str, Any]]:
    turns = [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(texts)]
    return [SYSTEM, *turns]


@pytest.fixture(scope="module")
def tokenizer(renderer_of: Callable[..., ChatRenderer]) -> Callable[..., SftTokenizer]:
    pad = renderer_of("qwen3_vl").tokenizer.convert_tokens_to_ids("<|image_pad|>")
    renderer = renderer_of("qwen3_vl", images=ImageTokens(pad, lambda height, width: height * width // 784))
    return lambda limit=1000, **options: SftTokenizer(renderer.tokenizer, renderer, limit, **options)


def row_of(tokenizer: SftTokenizer, row: dict[str, Any]) -> SftRow:
    found = tokenizer.row(row, "here")
    assert found is not None
    return found


def test_images_stand_where_they_belong_and_nothing_of_them_is_trained(tokenizer: Any) -> None:
    made = tokenizer()
    exif = Image.Exif()
    exif[0x0112] = 6
    row = {
        "messages": chat("<image>Which?", "Red.", "And <image>?", "Red too."),
        "images": [png(56, 28), png(28, 56, exif=exif)],
    }
    found = row_of(made, row)
    pads = found.token_ids == made._renderer.image_token
    assert pads.sum() == 4 and not (pads & found.loss_mask).any()
    assert found.text_length == int(np.argmax(pads)) and len(found.images) == 2
    sizes = [Image.open(io.BytesIO(image.tobytes())).size for image in found.images]
    assert sizes == [(56, 28), (56, 28)], "the second is upright now"
    assert made._tokenizer.decode(found.token_ids[found.loss_mask]) == "Red.<|im_end|>Red too.<|im_end|>"


def test_a_cut_row_keeps_the_images_that_are_left(tokenizer: Any) -> None:
    row = {
        "messages": chat("<image>Which?", "Red.", "And <image>?", "Red too."),
        "images": [png(56, 28), png(280, 280)],
    }
    cut = row_of(tokenizer(80, overlong="truncate"), row)
    assert len(cut.images) == 1 and (cut.token_ids == tokenizer()._renderer.image_token).sum() == 2


def test_rows_with_different_images_share_only_the_text_before_them(tokenizer: Any) -> None:
    made = tokenizer()
    rows = [row_of(made, {"messages": chat("<image>Which?", "Red."), "images": [png(56, 28 * n)]}) for n in (1, 1, 2)]
    prefix = shared_prefix(rows)
    assert 8 <= len(prefix) <= rows[0].text_length and made._renderer.image_token not in prefix
    data = TokenizedRows(rows, prefix, 0, 0, 0.0)
    samples = [data.sample(index, index + 1) for index in range(3)]
    assert {sample.prompt_length for sample in samples} == {len(prefix)} and all(len(s.images) == 1 for s in samples)
    other = TokenizedRows(
        [row_of(made, {"messages": chat("<image>Which?", "Red."), "images": [png(28, 56)]})], prefix, 0, 0, 0.0
    )
    assert TokenizedRows(rows[:1], prefix, 0, 0, 0.0).digest != other.digest


def test_paths_are_relative_to_the_file(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.png").write_bytes(png(28, 28))
    parts = [[{"type": "image", "image": "a.png"}], [{"type": "image_url", "image_url": {"url": "a.png"}}]]
    rows = [
        {"messages": chat("<image>Which?", "Red."), "images": ["a.png"]},
        *({"messages": [{"role": "user", "content": part}, chat("", "Red.")[2]]} for part in parts),
    ]
    rows.append({"messages": json.dumps(rows[1]["messages"])})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for where, read in read_rows(str(tmp_path / "rows.jsonl"), "data"):
        found = tokenizer().row(read, where)
        assert found is not None and len(found.images) == 1


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": chat("Which?", "Red."), "images": [png(28, 28)]}, "1 image and 0 places"),
        (
            {"messages": chat("<image>Which?", "Red."), "imgs": ["a.png"]},
            r"0 images and 1 place in column 'messages' .*message 2 of role user\); column 'imgs' seems to hold them",
        ),
        (
            {"messages": [*chat("Which?", "Red."), {"role": "user", "content": "And <image>?"}], "images": None},
            r"0 images and 1 place .*message 4 of role user(.|\n)*remove the <image>, or add the missing image",
        ),
        ({"messages": chat("<image>Which?", "Red."), "images": [b"x"]}, "image 1: cannot read an image"),
        (
            {"messages": chat("<image><image>Which?", "Red."), "images": [png(28, 28), png(90, 90)[:120]]},
            "here: column 'images', image 2: an image cannot be decoded: ",
        ),
        (
            {"messages": chat("Which?", "Red.", "<image>And?", "Blue."), "images": ["none/a.png"]},
            r"column 'images', image 1: .*none/a.png: No such file(.|\n)*fix: correct 'none/a.png': paths are relative",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "/none"}]}, chat("", "Red.")[2]]},
            "here: column 'messages', image 1: cannot read an image: /none: No such file or directory",
        ),
        ({"messages": chat("Which?", "<image>"), "images": [png(28, 28)]}, "message 3 of the assistant has an image"),
        ({"messages": chat("Which?", "Red."), "videos": ["a.mp4"]}, "here has videos: only text and images"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tokenizer: Any, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        tokenizer().row(row, "here")


def test_an_image_of_a_shape_that_the_model_refuses_is_named(
    tokenizer: Any, renderer_of: Callable[..., ChatRenderer]
) -> None:
    def count(height: int, width: int) -> int:
        if height > 100 * width:
            raise ValueError("a strip")
        return 1

    renderer = renderer_of("qwen3_vl", images=ImageTokens(tokenizer()._renderer.image_token, count))
    made = SftTokenizer(renderer.tokenizer, renderer, 1000)
    row = {
        "messages": chat("<image>A?", "Red.", "<image><image>B?", "Red."),
        "images": [*[png(28, 28)] * 2, png(2, 280)],
    }
    with pytest.raises(DataError, match="here: column 'images', image 3: the model does not take an image of 2 x 280"):
        made.row(row, "here")


def test_a_mark_is_text_for_a_model_without_images(renderer_of: Callable[..., ChatRenderer]) -> None:
    renderer = renderer_of("qwen3_vl")
    made = SftTokenizer(renderer.tokenizer, renderer, 1000)
    found = row_of(made, {"messages": chat("Write <image>.", "<image>"), "images": None})
    assert "Write <image>." in made._tokenizer.decode(found.token_ids)
