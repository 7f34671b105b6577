"""Whatever a file holds, the count of tokens, the engine and the trainer see one plain picture."""

from __future__ import annotations

import base64
import contextlib
import copy
import io
import json
import os
import pickle
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from agentloop.errors import DataError, ImageError
from agentloop.images import MAX_PIXELS, ImageFile, RowPath, image_data, image_size, open_image, read_image


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(value: Any) -> np.ndarray:
    return np.asarray(open_image(read_image(value)).convert("RGB")).astype(int)


def split(mode: str = "RGB", left: Any = (255, 0, 0), right: Any = (0, 0, 255)) -> Image.Image:
    """An image of 40 x 20 pixels whose halves differ."""
    image = Image.new(mode, (40, 20), left)
    image.paste(right, (20, 0, 40, 20))
    return image


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_plain_file_stays_as_it_is(kind: str, tmp_path: Path) -> None:
    data = saved(split(), kind)
    (tmp_path / "a").write_bytes(data)
    url = f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode()}"
    for value in (data, {"bytes": data, "path": "x"}, tmp_path / "a", f"file://{tmp_path / 'a'}", url, {"url": url}):
        assert read_image(value) == ImageFile(data, 40, 20)
        assert base64.b64decode(image_data(value)) == data
    file = read_image(data)
    assert read_image(file) is file and file.digest in repr(file) and len(repr(file)) < 80


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_rotated_image_stands_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = np.zeros((20, 40, 3), np.uint8)
    upright[:10, :20], upright[10:, 20:] = (255, 0, 0), (0, 255, 0)
    image = Image.fromarray(upright)
    undone = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    if orientation in undone:
        image = image.transpose(Image.Transpose(undone[orientation]))
    data = saved(image, "PNG", exif=exif)
    assert image_size(data) == (read_image(data).width, read_image(data).height) == (40, 20)
    assert (pixels(data) == upright).all()


def test_transparency_shows_white_and_cmyk_becomes_rgb() -> None:
    clear = split("RGBA", (255, 0, 0, 255), (0, 0, 0, 0))
    assert pixels(saved(clear, "PNG"))[0, -1].tolist() == [255, 255, 255]
    assert pixels(saved(clear, "PNG"))[0, 0].tolist() == [255, 0, 0]
    palette = clear.convert("P")
    palette.info["transparency"] = palette.getpixel((30, 5))
    assert pixels(saved(palette, "PNG", transparency=palette.getpixel((30, 5))))[0, -1].tolist() == [255, 255, 255]
    gray = split("LA", (9, 255), (0, 0))
    assert pixels(saved(gray, "PNG"))[0, -1].tolist() == [255, 255, 255]
    ink = saved(split("CMYK", (0, 255, 255, 0), (255, 255, 0, 0)), "JPEG", quality=100)
    assert np.abs(pixels(ink)[0, 0] - [255, 0, 0]).max() < 8 and np.abs(pixels(ink)[0, -1] - [0, 0, 255]).max() < 8


@pytest.mark.parametrize(("mode", "color"), [("RGB", (5, 5, 5)), ("L", 5), ("P", 0)])
def test_a_color_that_stands_for_transparency_shows_white(mode: str, color: Any) -> None:
    assert (pixels(saved(Image.new(mode, (4, 4), color), "PNG", transparency=color)) == 255).all()


def test_gray_of_16_bits_keeps_its_range() -> None:
    values = np.linspace(0, 65535, 800, dtype=np.uint16).reshape(20, 40)
    shown = pixels(saved(Image.fromarray(values), "PNG"))
    assert shown[0, 0, 0] == 0 and shown[-1, -1, 0] == 255 and abs(shown[10, 0, 0] - 128) < 2


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_shows_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (30, 10), color) for color in ("red", "blue")]
    data = saved(
        frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
    )
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 2
    file = read_image(data)
    assert file.data.startswith(b"\x89PNG") and getattr(open_image(file), "n_frames", 1) == 1
    assert pixels(data)[0, 0].tolist() == [255, 0, 0] and image_size(data) == (30, 10)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 30), (3, 2)])
def test_a_tiny_image_is_an_image(width: int, height: int) -> None:
    file = read_image(saved(Image.new("RGB", (width, height), "red"), "PNG"))
    assert (file.width, file.height) == (width, height)


def test_a_very_large_image_is_scaled_down_and_counted_so() -> None:
    data = saved(Image.new("L", (8000, 4000), 7), "PNG")
    file = read_image(data)
    assert (file.width, file.height) == image_size(data) and file.width * file.height <= MAX_PIXELS
    assert abs(file.width - 2 * file.height) <= 2 and len(file.data) < 1_000_000


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("width", "height"), [(10_000, 9_000), (60_000, 60_000)])
def test_a_pixel_bomb_is_refused_by_its_header(width: int, height: int) -> None:
    for read in (image_size, read_image, open_image):
        with pytest.raises(ImageError, match="too large to decode"):
            read(png_header(width, height))


def test_a_cut_or_damaged_file_is_an_image_error() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8))
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP"):
        data = saved(noise, kind)
        with pytest.raises(ImageError):
            read_image(data[: len(data) // 2])
    rng = np.random.default_rng(1)
    for _ in range(200):  # whatever the damage: an image, or an ImageError
        data = bytearray(saved(noise, str(rng.choice(["PNG", "JPEG", "GIF", "TIFF", "WEBP"]))))
        for place in rng.integers(0, len(data), 6):
            data[place] = int(rng.integers(256))
        with contextlib.suppress(ImageError):
            assert read_image(bytes(data)).width


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("https://example.org/a.png", "not downloaded"),
        ("data:video/mp4;base64,AAAA", "a data URL of video"),
        ("data:image/png,abc", "not in base64"),
        ("data:image/png;base64,??", "not valid base64"),
        ("data:image/png;base64,\u00e4", "not valid base64"),
        ("HTTPS://example.org/a.png", "not downloaded"),
        ("ftp://name:password@host/a.png", "not downloaded: ftp://\\.\\.\\.\\n"),
        ("/dev/zero", "/dev/zero is not a plain file"),
        ("a\0b.png", "null byte"),
        ("a\x1b[31m.png", "a\u241b\\[31m.png: No such file"),
        (b"no image", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        ("none.png", "none.png: No such file"),
        ("", "a str is not an image"),
        (7, "an int is not an image"),
        (Image.new("RGB", (0, 5)), "an image of 0 x 5 pixels is empty"),
        ({"bytes": None, "path": None}, "a NoneType is not an image"),
    ],
)
def test_what_is_no_image_is_named(value: Any, reason: str) -> None:
    for read in (image_size, read_image):
        with pytest.raises(DataError, match=reason):
            read(value)


def test_the_file_of_a_fault_is_named(tmp_path: Path) -> None:
    data = saved(Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8)), "PNG")
    for name, held, fault in (
        ("cut.png", data[:200], "an image cannot be decoded: {}: image file is truncated"),
        ("text.png", b"text", "cannot read an image: {}: it is not an image"),
        ("bomb.png", png_header(60_000, 60_000), "{}: an image of more than 178 million pixels is too large"),
    ):
        (tmp_path / name).write_bytes(held)
        for value in (str(tmp_path / name), tmp_path / name, f"file://{tmp_path / name}", {"path": tmp_path / name}):
            with pytest.raises(ImageError) as caught:
                read_image(value)
            assert caught.value.message.startswith(fault.format(tmp_path / name))
        with pytest.raises(ImageError, match=fault.format("a.png")):
            read_image({"bytes": held, "path": "a.png"})


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda path: pickle.loads(pickle.dumps(path))])
def test_a_path_of_a_row_remembers_where_it_came_from(copied: Any, tmp_path: Path) -> None:
    path = copied(RowPath("a/b.png", tmp_path))
    assert path == str(tmp_path / "a" / "b.png") and json.loads(json.dumps([path])) == [path]
    with pytest.raises(ImageError, match=rf"b.png: No such file or directory\n  fix: correct 'a/b.png': .*{tmp_path}"):
        read_image(path)
    with pytest.raises(ImageError, match=r"File name too long\n  fix: give bytes"):
        read_image(RowPath("A" * 10_000, tmp_path))


def test_an_image_error_keeps_its_number_in_another_process() -> None:
    error = pickle.loads(pickle.dumps(ImageError("a", "b", 3)))
    assert (error.message, error.hint, error.number) == ("a", "b", 3)


def test_a_named_pipe_and_a_folder_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, reason in (("pipe", "pipe is not a plain file"), ("", "is a folder")):
        with pytest.raises(ImageError, match=reason):
            read_image(tmp_path / name)


def test_text_that_is_not_a_path_is_not_repeated_whole() -> None:
    for value in ("A" * 100_000, {"bytes": "A" * 100_000}):
        with pytest.raises(ImageError, match="File name too long") as caught:
            read_image(value)
        assert len(str(caught.value)) < 500


def test_addresses_have_any_case(tmp_path: Path) -> None:
    data = saved(split(), "PNG")
    (tmp_path / "a").write_bytes(data)
    for value in (f"FILE://{tmp_path / 'a'}", f"DATA:IMAGE/PNG;BASE64,{base64.b64encode(data).decode()}"):
        assert read_image(value).data == data


@pytest.mark.parametrize("tag", [0x100, 0x103, 0xA005])
def test_damage_in_the_rest_of_the_exif_data_does_not_matter(tag: int) -> None:
    fields = struct.pack("<HHHIIHHI4s", 2, 0x0112, 3, 1, 6, tag, 2, 4, b"abc\0")
    exif = b"Exif\0\0II*\0\x08\0\0\0" + fields + bytes(4)
    data = saved(split(), "JPEG")
    file = read_image(data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:])
    assert (file.width, file.height) == (20, 40)


@pytest.mark.filterwarnings("error")
def test_brightness_that_is_not_a_number_is_black() -> None:
    values = np.full((4, 4), np.nan, np.float32)
    values[0] = 200
    assert pixels(saved(Image.fromarray(values), "TIFF"))[:, 0, 0].tolist() == [200, 0, 0, 0]
