"""The harness: a planted mix fails in product code, and what CUDA takes does not."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rollout_server.engines.torch_engine.model.attention import DecodePass
from rollout_server.engines.torch_engine.model.head import FullPrecisionHead
from rollout_server.engines.torch_engine.model.models import slow_runner
from tests.fakecuda.cards import RANK, FakeCards
from tests.fakecuda.conftest import ModelFactory
from tests.fakecuda.material import generation, samples_of
from tests.fakecuda.test_engine import CARD, STEADY, add, core_of, loaded_model
from tests.fakecuda.test_trainer import small
from trainer.learner.model.policy import DeviceBatch
from trainer.types import LossSpec

pytestmark = pytest.mark.fakecuda

Plant = Callable[[pytest.MonkeyPatch], None]


def positions_on_the_host(patch: pytest.MonkeyPatch) -> None:
    of = DeviceBatch.of

    def planted(batch: Any, device: torch.device) -> DeviceBatch:
        made = of(batch, device)
        made.positions = torch.from_numpy(batch.positions)
        return made

    patch.setattr(DeviceBatch, "of", planted)


def targets_on_another_card(patch: pytest.MonkeyPatch) -> None:
    of = DeviceBatch.of

    def planted(batch: Any, device: torch.device) -> DeviceBatch:
        made = of(batch, device)
        made.targets = made.targets.to("cuda:0")
        return made

    patch.setattr(DeviceBatch, "of", planted)


def columns_on_the_host(patch: pytest.MonkeyPatch) -> None:
    of = DeviceBatch.of

    def planted(batch: Any, device: torch.device) -> DeviceBatch:
        made = of(batch, device)
        made.columns = {name: torch.from_numpy(column) for name, column in batch.columns.items()}
        return made

    patch.setattr(DeviceBatch, "of", planted)


@pytest.mark.parametrize("plant", [positions_on_the_host, targets_on_another_card, columns_on_the_host])
def test_a_planted_device_fails_the_trainer(
    cards: FakeCards, rank: None, model: ModelFactory, monkeypatch: pytest.MonkeyPatch, plant: Plant
) -> None:
    plant(monkeypatch)
    with pytest.raises(Exception, match=f"devices.*cuda:{RANK}|tensors on .*cuda:{RANK}"):
        small(model, {}).accumulate(samples_of(), 1.0, LossSpec())


def test_a_planted_float32_weight_fails_the_engine(cards: FakeCards, model: ModelFactory) -> None:
    loaded = loaded_model(model, "Qwen2.5-0.5B", num_hidden_layers=2)
    block = loaded.model.model.layers[1]
    block.mlp.down_proj.weight = torch.nn.Parameter(block.mlp.down_proj.weight.float(), requires_grad=False)
    core = core_of(loaded, slow_runner(loaded))
    add(core, loaded, generation("a", 40, max_new_tokens=2))
    with pytest.raises(Exception, match=r"dtype|tensors of torch\.bfloat16 and torch\.float32"):
        core.step()


def test_a_planted_bfloat16_state_fails_the_engine(
    cards: FakeCards, model: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    attend = DecodePass.attend

    def planted(self: DecodePass, layer: int, q: torch.Tensor, *rest: Any) -> torch.Tensor:
        return attend(self, layer, q, *rest).float()

    monkeypatch.setattr(DecodePass, "attend", planted)
    loaded = loaded_model(model, "Qwen2.5-0.5B", num_hidden_layers=2)
    core = core_of(loaded, slow_runner(loaded))
    add(core, loaded, generation("a", 40, max_new_tokens=2))
    with pytest.raises(Exception, match=r"dtype|tensors of torch\.bfloat16 and torch\.float32"):
        core.step()


def test_a_planted_read_shows_among_the_transfers(
    cards: FakeCards, model: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = FullPrecisionHead.forward
    monkeypatch.setattr(FullPrecisionHead, "forward", lambda self, hidden: forward(self, hidden.cpu().to(CARD)))
    loaded = loaded_model(model, "Qwen2.5-0.5B", num_hidden_layers=2)
    core = core_of(loaded, slow_runner(loaded))
    add(core, loaded, generation("a", 40, max_new_tokens=4))
    core.step()
    with cards.watch() as transfers:
        core.step()
    assert {direction for direction, _ in transfers - STEADY} == {"to card", "to host"}


def test_what_lands_on_the_default_card_shows_among_the_devices(cards: FakeCards) -> None:
    torch.ones(2, device="cuda")
    assert cards.devices == {torch.device("cuda", 0)}


def test_whole_numbers_are_real_and_floats_are_not(cards: FakeCards) -> None:
    ids = torch.arange(6, device=CARD)
    ids[ids > 3] = 0
    assert ids.tolist() == [0, 1, 2, 3, 0, 0] and int(ids.sum()) == 6
    assert ids[ids > 1].shape == (2,) and ids.nonzero().tolist() == [[1], [2], [3]]
    assert torch.repeat_interleave(ids[:3], torch.tensor([2, 1, 3], device=CARD)).tolist() == [0, 0, 1, 2, 2, 2]
    assert (ids * 1.5).tolist() == [0.0] * 6
    ids.copy_((ids * 1.5).long())
    assert ids.tolist() == [0] * 6  # written to with values that nobody knows


def test_a_card_runs_nothing(fake_runtime: None) -> None:
    """What escapes the fake tensors is an error, not a computation."""
    with pytest.raises(RuntimeError, match="not supported"):
        torch.ones(2, device="cuda")
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.empty(2, device="cuda").cpu()


def test_each_thread_begins_on_the_first_card(fake_runtime: None) -> None:
    found: list[int] = []
    torch.cuda.set_device(RANK)
    try:
        thread = threading.Thread(target=lambda: found.append(torch.cuda.current_device()))
        thread.start()
        thread.join()
        assert (found, torch.cuda.current_device()) == ([0], RANK)
    finally:
        torch.cuda.set_device(0)
