"""What only a CUDA device can show: the flash paths, offload, liger. `make gpu-check` runs it."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from agentloop.config import TrainerConfig
from trainer.learner.learner import Learner, LearnerSettings
from trainer.learner.model.attention import portable_attention
from trainer.learner.model.varlen import Kernel, VarlenAttention, VarlenLayout, make_kernel
from trainer.packing.layout import PackedLayout
from trainer.types import LossSpec

from .conftest import make_samples
from .models import save_tiny

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

LAYOUT = PackedLayout(
    runs=[(0, 1, 150), (150, 3, 64), (342, 1, 97), (439, 2, 60), (559, 1, 33)], prefixes=[(150, 289, 0, 150)]
)
TOKENS = 592


def kernels() -> list[Any]:
    found = []
    for name in ("torch", "flash_attn"):
        try:
            found.append(make_kernel(name))
        except ImportError:
            continue
    return found


@pytest.fixture(scope="module")
def nccl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    torch.cuda.set_device(0)
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("key_heads", [4, 2])
def test_flash_kernels_equal_masked_attention_within_bf16(key_heads: int) -> None:
    torch.manual_seed(0)
    device = torch.device("cuda")
    q, k, v = (
        torch.randn(TOKENS, heads, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
        for heads in (4, key_heads, key_heads)
    )
    weights = torch.randn(TOKENS, 4, 64, device=device)
    wide = [tensor.double().repeat_interleave(4 // tensor.shape[1], dim=1) for tensor in (q, k, v)]
    expected = portable_attention(*wide, LAYOUT, 0.125)
    theirs = torch.autograd.grad((expected * weights).sum(), (q, k, v))
    used: list[Kernel] = kernels()
    assert used
    for kernel in used:
        out = VarlenAttention.apply(q, k, v, VarlenLayout.of(LAYOUT, device), kernel, 0.125)
        ours = torch.autograd.grad((out * weights).sum(), (q, k, v))
        for a, b in zip((out, *ours), (expected, *theirs), strict=True):
            assert (a.double() - b.double()).norm() < 1e-2 * b.double().norm(), type(kernel).__name__


def test_a_step_of_the_whole_loop_runs_on_the_card(repo: Path, tmp_path: Path) -> None:
    """Torch engine and trainer in bf16 on one card; what they disagree by is bf16's."""
    options = [
        f"run.dir={tmp_path / 'run'}", "run.steps=1", "model.dtype=bfloat16", "trainer.device=cuda",
        "rollout.device=cuda", "eval.before_train=false", "eval.every=null",
    ]  # fmt: skip
    recipe = repo / "recipes" / "quickstart" / "recipe.yaml"
    program = [sys.executable, "-m", "agentloop.commands.main", "train", "--config", str(recipe), *options]
    done = subprocess.run(program, cwd=repo, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert metrics["train/grad_norm"] > 0
    assert metrics["mismatch/logprob_abs_mean"] < 0.05


@pytest.mark.usefixtures("nccl")
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_on_the_card_is_that_of_the_cpu_within_bf16(tmp_path: Path, offload: bool, checkpointing: bool) -> None:
    model = save_tiny(tmp_path / "model", "qwen2", hidden_size=128, head_dim=32)
    samples = make_samples(groups=4, size=6, prompt=40, longest=80)
    options = {
        "optim": {"lr": 1e-3},
        "fsdp": {
            "offload_policy": offload, "offload_reference": offload, "activation_checkpointing": checkpointing,
        },
    }  # fmt: skip
    found = []
    for device, dtype in (("cuda", "bfloat16"), ("cpu", "float32")):
        config = TrainerConfig.model_validate(options | {"device": device})
        of = Learner(LearnerSettings(str(model), config, dtype, 10, 0, reference=True))
        sums = of.accumulate(copy.deepcopy(samples), 1.0, LossSpec(kl_coef=0.01))
        norm = of.step(sums["tokens"])["grad_norm"]
        found.append((of.logprobs(samples, 1.0)[2], sums, norm))
    (card, card_sums, card_norm), (host, host_sums, host_norm) = found
    assert np.abs(card - host).mean() < 0.02
    assert card_sums["loss_sum"] == pytest.approx(host_sums["loss_sum"], rel=0.05, abs=0.5)
    assert card_norm == pytest.approx(host_norm, rel=0.05)
