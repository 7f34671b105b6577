"""Matmul through oneDNN: the same numbers as torch's, for any number of rows, and chosen where it is faster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from agentloop.errors import ConfigError
from tests.trainer.conftest import make_samples
from tests.trainer.learner.test_learner import SPEC, gradients, learner, relative
from trainer.learner.model import matmul
from trainer.learner.model.matmul import ROWS, OneDnnMatmul, make_matmul

BLOCKS = "mkldnn::_linear_pointwise"


def blocks_of(profile: Any) -> int:
    return sum(event.count for event in profile.key_averages() if event.key == BLOCKS)


@pytest.mark.parametrize("choice", ["torch", "onednn"])
@pytest.mark.parametrize("rows", [0, 1, ROWS - 1, ROWS, 2 * ROWS + 77])
def test_results_are_those_of_float64(choice: Any, rows: int) -> None:
    of = make_matmul(choice)
    draw = torch.Generator().manual_seed(rows)
    x, w, g, start = (torch.randn(*size, generator=draw) for size in ((rows, 48), (96, 48), (rows, 96), (96, 48)))
    into, out = start.clone(), torch.full((rows, 96), torch.nan)
    with torch.profiler.profile() as profile:
        found = of.linear(x, w, out=out)
        back = of.linear(g, w.T)
        added = of.add_weight_gradient(into, g, x)
    assert found is out
    assert added is into
    assert blocks_of(profile) == (3 * (rows // ROWS) if choice == "onednn" else 0)
    pairs = [(found, x.double() @ w.double().T), (back, g.double() @ w.double())]
    pairs.append((added, start.double() + g.double().T @ x.double()))
    for one, exact in pairs:
        assert one.shape == exact.shape
        torch.testing.assert_close(one.double(), exact, rtol=1e-5, atol=1e-4)


def test_other_types_are_torchs_own() -> None:
    of = make_matmul("onednn")
    x, w = torch.randn(ROWS, 48, dtype=torch.bfloat16), torch.randn(96, 48, dtype=torch.bfloat16)
    with torch.profiler.profile() as profile:
        assert torch.equal(of.linear(x, w), x @ w.T)
        into = of.add_weight_gradient(torch.zeros(48, 96), x, x @ w.T)
    assert into.dtype == torch.float32
    assert not blocks_of(profile)


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_has_torchs_gradients(*, bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 96, bias=bias))
    names = list(model.state_dict())
    layer = model[0]
    x = torch.randn(2, ROWS + 9, 48, requires_grad=True)
    slope = torch.randn(2, ROWS + 9, 96)
    found = []
    for choice in ("torch", "onednn"):
        make_matmul(choice).install(model)  # type: ignore[arg-type]
        assert (model[0] is layer) == (choice == "torch")
        assert list(model.state_dict()) == names and model[0].weight is layer.weight
        model.zero_grad()
        x.grad = None
        with torch.profiler.profile() as profile:
            out = model(x)
            (out * slope).sum().backward()
        assert blocks_of(profile) == (3 * (2 * (ROWS + 9) // ROWS) if choice == "onednn" else 0)
        assert out.shape == (2, ROWS + 9, 96)
        assert x.grad is not None
        kept = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        found.append([out.detach(), x.grad.clone(), *kept])
    assert len(found[1]) == 3 + bias
    for a, b in zip(*found, strict=True):
        assert torch.linalg.norm(a - b) < 1e-6 * torch.linalg.norm(a)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_gradient_of_the_policy_is_the_same(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, *, checkpointing: bool
) -> None:
    monkeypatch.setattr(matmul, "ROWS", 16)
    samples = make_samples(groups=3, size=6)
    found, blocks = [], []
    for choice in ("torch", "onednn"):
        of = learner(tiny_model, matmul=choice, logprob_chunk=64, fsdp={"activation_checkpointing": checkpointing})
        with torch.profiler.profile() as profile:
            of.accumulate(samples, 1.0, SPEC)
        blocks.append(blocks_of(profile))
        found.append(gradients(of))
    assert blocks[0] == 0 < blocks[1]
    assert relative(found[1], found[0]) < 1e-6


@pytest.mark.parametrize(
    ("vendor", "capability", "chosen"),
    [("AuthenticAMD", "AVX512", True), ("GenuineIntel", "AVX512", False), ("AuthenticAMD", "AVX2", False)],
)
def test_auto_is_onednn_where_mkl_does_not_use_avx512(
    monkeypatch: pytest.MonkeyPatch, vendor: str, capability: str, *, chosen: bool
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: f"processor\t: 0\nvendor_id\t: {vendor}\n")
    of = make_matmul("auto")
    assert isinstance(of, OneDnnMatmul) == chosen
    x, w = torch.randn(ROWS, 16), torch.randn(16, 16)
    with torch.profiler.profile() as profile:
        of.linear(x, w)
    assert blocks_of(profile) == int(chosen)


def test_without_onednn_it_cannot_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="has no oneDNN"):
        make_matmul("onednn")
    assert not isinstance(make_matmul("auto"), OneDnnMatmul)
