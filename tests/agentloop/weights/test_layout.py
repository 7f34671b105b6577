"""Layouts and checksums of published tensors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from agentloop.weights.layout import CHUNK, LayoutError, buckets, checksum, digest_of, plan_file, read_layout

TENSORS = [("b", "bfloat16", (3, 5)), ("a", "float32", (7,)), ("n", "int64", ()), ("e", "float32", (0, 4))]


def write(path: Path, header: bytes, size: int) -> Path:
    path.write_bytes(header + np.random.default_rng(0).bytes(size - len(header)))
    return path


def test_a_planned_file_is_one_that_safetensors_reads(tmp_path: Path) -> None:
    header, specs = plan_file(TENSORS)
    data = write(tmp_path / "x.safetensors", header, max(spec.end for spec in specs)).read_bytes()
    loaded = load_file(tmp_path / "x.safetensors")
    assert {name: tuple(t.shape) for name, t in loaded.items()} == {name: shape for name, _, shape in TENSORS}
    for spec in specs:
        assert loaded[spec.name].reshape(-1).view(torch.uint8).numpy().tobytes() == data[spec.begin : spec.end]
        assert spec.begin % np.dtype("u8").itemsize == 0 or spec.dtype != "int64"
    assert len(header) % 64 == 0
    assert sorted(read_layout(tmp_path / "x.safetensors"), key=str) == sorted(specs, key=str)


def test_a_file_of_safetensors_is_read(tmp_path: Path) -> None:
    tensors = {"w": torch.randn(4, 3), "v": torch.arange(5)}
    save_file(tensors, tmp_path / "x.safetensors")
    data = (tmp_path / "x.safetensors").read_bytes()
    for spec in read_layout(tmp_path / "x.safetensors"):
        got = np.frombuffer(data[spec.begin : spec.end], spec.dtype).reshape(spec.shape)
        assert np.array_equal(got, tensors[spec.name].numpy())


def damaged(header: bytes, size: int, kind: str) -> bytes:
    entries = json.loads(header[8:])
    if kind == "overlap":
        entries["a"]["data_offsets"][0] -= 4
    elif kind == "gap":
        entries["b"]["data_offsets"] = [value + 2 for value in entries["b"]["data_offsets"]]
    elif kind == "shape":
        entries["a"]["shape"] = [8]
    elif kind == "dtype":
        entries["a"]["dtype"] = "F4"
    elif kind == "negative":
        entries["a"]["shape"] = [-7]
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + bytes(size - len(header))


@pytest.mark.parametrize("kind", ["overlap", "gap", "shape", "dtype", "negative"])
def test_a_damaged_header_is_refused(tmp_path: Path, kind: str) -> None:
    header, specs = plan_file(TENSORS)
    path = tmp_path / "x.safetensors"
    path.write_bytes(damaged(header, max(spec.end for spec in specs), kind))
    with pytest.raises(LayoutError, match="cannot be read"):
        read_layout(path)


@pytest.mark.parametrize("keep", [0, 7, 30, -1])
def test_a_part_of_a_file_is_refused(tmp_path: Path, keep: int) -> None:
    header, specs = plan_file(TENSORS)
    path = write(tmp_path / "x.safetensors", header, max(spec.end for spec in specs))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(LayoutError, match="cannot be read"):
        read_layout(path)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_values_that_are_not_finite_are_found_wherever_they_are(dtype: str) -> None:
    kind = getattr(torch, dtype)
    top = torch.finfo(kind).max
    values = torch.linspace(-1, 1, CHUNK // 2 + 77, dtype=torch.float64).to(kind)
    values[0], values[1] = top, -top
    assert digest_of(values.view(torch.uint8).numpy(), dtype).finite
    for place in (0, CHUNK // 4, len(values) - 1):
        for bad in (float("nan"), float("inf"), -float("inf"), -float("nan")):
            broken = values.clone()
            broken[place] = bad
            assert not digest_of(broken.view(torch.uint8).numpy(), dtype).finite


def test_integers_are_always_finite() -> None:
    assert digest_of(np.full(64, 255, np.uint8), "int64").finite


def test_a_checksum_depends_on_bytes_and_names_only() -> None:
    data = np.arange(CHUNK + 1000, dtype=np.uint8)
    one, other = digest_of(data, "uint8").value, digest_of(data[1:], "uint8").value
    changed = data.copy()
    changed[-1] ^= 1
    assert len({one, other, digest_of(changed, "uint8").value}) == 3
    assert checksum({"a": one, "b": other}) == checksum({"b": other, "a": one})
    assert checksum({"a": one, "b": other}) != checksum({"a": other, "b": one})
    assert checksum({"a": one}).startswith("xxh3:")


def test_buckets_hold_neighbours_up_to_a_size() -> None:
    assert buckets([3, 3, 3, 9, 1], 6) == [range(0, 2), range(2, 3), range(3, 4), range(4, 5)]
    assert buckets([3, 3], 100) == [range(0, 2)]
    assert buckets([], 5) == []
