"""Publishing from a fake card: whole tensors in the published dtype, gathered on the card of rank 0."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from agentloop.config import TrainerConfig
from agentloop.weights.layout import read_layout
from tests.fakecuda.cards import RANKS, FakeCards, process_group
from tests.fakecuda.conftest import ModelFactory
from trainer.learner.learner import Learner
from trainer.learner.weights import broadcast as broadcasts
from trainer.types import LearnerSettings

pytestmark = pytest.mark.fakecuda

CARD = torch.device("cuda", 0)


@pytest.fixture
def first_rank(fake_runtime: None) -> Iterator[None]:
    """Rank 0, which publishes."""
    with process_group(0, RANKS):
        yield


def learner_of(folder: Path, **changes: object) -> Learner:
    config = TrainerConfig.model_validate({"device": "cuda", "ranks": RANKS} | changes)
    return Learner(LearnerSettings(str(folder), config, "bfloat16", total_steps=10, seed=0))


def test_adapters_are_merged_on_the_card(cards: FakeCards, first_rank: None, model: ModelFactory) -> None:
    folder = model("Qwen2.5-0.5B", num_hidden_layers=2)
    tensors = learner_of(folder, lora={"rank": 8, "alpha": 16}).publisher.tensors
    seen: set[tuple[torch.device, torch.dtype]] = set()
    with cards.watch() as transfers:
        tensors.gather(lambda spec, tensor: seen.add((tensor.device, tensor.dtype)))
    assert (seen, transfers, cards.devices) == ({(CARD, torch.float32)}, set(), {CARD})


def test_a_policy_is_written_to_a_folder_and_to_shared_memory(
    cards: FakeCards, first_rank: None, model: ModelFactory, tmp_path: Path
) -> None:
    publisher = learner_of(model("Qwen2.5-0.5B", num_hidden_layers=2)).publisher
    for transport in ("disk", "shared"):
        with cards.watch() as transfers:
            published = publisher.publish(transport, {"folder": tmp_path / transport})
        assert published.checksum
        written = read_layout(tmp_path / transport / "model.safetensors")
        assert [spec.shape for spec in written] == [spec.shape for spec in publisher.tensors.specs]
        assert transfers == {("to host", "trainer/learner/weights/base.py")}


def test_a_policy_is_broadcast_from_the_card(
    cards: FakeCards, first_rank: None, model: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    # NCCL would open sockets and wait for the engines. What is sent is looked at in its place.
    sent: list[Tensor] = []
    monkeypatch.setattr(broadcasts, "join_group", lambda store, **options: options)
    monkeypatch.setattr(broadcasts, "broadcast", lambda group, tensor: sent.append(tensor))
    publisher = learner_of(model("Qwen2.5-0.5B", num_hidden_layers=2)).publisher
    publisher.broadcast.join_group("weights", 2, "nccl")
    published = publisher.publish("broadcast", {"group": "weights", "bucket_bytes": 2**26, "folder": None})
    assert (published.error, {(tensor.device, tensor.dtype) for tensor in sent}) == ("", {(CARD, torch.uint8)})
    specs = publisher.tensors.specs
    assert sum(tensor.numel() for tensor in sent) == specs[-1].end - specs[0].begin
