"""The transports of a rank publish the same tensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from agentloop.weights.layout import checksum, digest_of, read_layout
from agentloop.weights.shared import Progress, SharedReader
from trainer.learner.weights.base import PublishedTensors
from trainer.learner.weights.disk import DiskTransport
from trainer.learner.weights.publisher import WeightPublisher

pytestmark = pytest.mark.usefixtures("process_group")


def publisher(model: Path, dtype: str = "float32") -> WeightPublisher:
    return WeightPublisher(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), dtype)


def checksum_of(folder: Path) -> str:
    digests = {}
    for file in sorted(folder.glob("*.safetensors")):
        data = file.read_bytes()
        for spec in read_layout(file):
            digests[spec.name] = digest_of(np.frombuffer(data[spec.begin : spec.end], np.uint8), spec.dtype).value
    return checksum(digests)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_folder_and_a_shared_file_hold_the_same(tiny_model: Path, tmp_path: Path, dtype: str) -> None:
    of = publisher(tiny_model, dtype)
    first = of.disk.publish(folder=tmp_path / "v_1").checksum
    Progress(_made(tmp_path / "even"), create=True).begin("1")
    second = of.shared.publish(folder=tmp_path / "even").checksum
    assert first == second == checksum_of(tmp_path / "v_1") == checksum_of(tmp_path / "even")
    assert SharedReader(tmp_path / "even").checksum() == first
    tensors = load_file(tmp_path / "even" / "model.safetensors")
    assert {str(t.dtype) for t in tensors.values()} == {f"torch.{dtype}"}
    own = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).state_dict()
    assert all(torch.equal(tensor, own[name].to(tensor.dtype)) for name, tensor in tensors.items())
    for folder in ("v_1", "even"):
        AutoModelForCausalLM.from_pretrained(tmp_path / folder)


def test_a_large_model_is_written_in_several_files(tiny_model: Path, tmp_path: Path) -> None:
    lm = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    tensors = PublishedTensors(lm, "float32")
    whole = DiskTransport(tensors).publish(folder=tmp_path / "one").checksum
    many = DiskTransport(tensors, shard_bytes=20_000).publish(folder=tmp_path / "many").checksum
    assert many == whole == checksum_of(tmp_path / "many")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "many").state_dict()
    one = AutoModelForCausalLM.from_pretrained(tmp_path / "one").state_dict()
    assert all(torch.equal(loaded[name], one[name]) for name in one)


def test_a_broadcast_without_a_group_says_so_and_still_writes_its_copy(tiny_model: Path, tmp_path: Path) -> None:
    of = publisher(tiny_model)
    Progress(_made(tmp_path / "even"), create=True).begin("1")
    published = of.broadcast.publish(group="nobody", bucket_bytes=1000, folder=tmp_path / "even")
    assert "not joined" in published.error and published.checksum == checksum_of(tmp_path / "even")


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_options_from_the_wire_are_checked(tiny_model: Path, tmp_path: Path) -> None:
    of = publisher(tiny_model)
    published = of.publish("disk", {"folder": str(tmp_path / "v_1")})
    assert published.checksum == checksum_of(tmp_path / "v_1")
    with pytest.raises(ValueError, match="slot"):
        of.publish("shared", {"slot": str(tmp_path)})
