"""The count of operations is torch's own count of the same micro-batch."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.flops import ModelShape, attention_pairs, packed_flops
from tests.trainer.conftest import make_samples
from trainer.learner.model.kernels import Kernels
from trainer.learner.model.policy import DeviceBatch, load_policy
from trainer.packing.layout import PackedLayout, pack
from trainer.packing.units import plan_units


def test_pairs_are_those_that_the_mask_leaves() -> None:
    assert attention_pairs(PackedLayout(runs=[(0, 1, 3), (3, 1, 1), (4, 1, 2)], prefixes=[(3, 3, 0, 3)])) == 6 + 4 + 9


def test_matmuls_are_counted_as_torch_counts_them(tiny_model: Path) -> None:
    samples = make_samples()
    batch = pack(samples, plan_units(samples, 10_000), "token_mean")
    policy = load_policy(
        str(tiny_model), init="weights", seed=0, logprob_chunk=10_000, device=torch.device("cpu"), kernels=Kernels()
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        policy(DeviceBatch.of(batch, torch.device("cpu")), 1.0)
    by_operator = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    matmuls = by_operator["aten.mm"] + by_operator.get("aten.addmm", 0)
    shape = ModelShape.of(tiny_model)
    attention = 4 * attention_pairs(batch.layout) * shape.heads * shape.head_dim * shape.layers
    # The rotary frequencies are one more matmul, of a rank-one matrix.
    assert abs(packed_flops(shape, batch, training=False) - attention - matmuls) < 1e-3 * matmuls
    assert packed_flops(shape, batch) == 3 * packed_flops(shape, batch, training=False)


def test_the_text_part_of_a_vision_language_model_is_counted(tmp_path: Path) -> None:
    text = {
        "num_hidden_layers": 1,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "vocab_size": 9,
    }
    (tmp_path / "config.json").write_text(json.dumps({"text_config": text, "vision_config": {}}))
    shape = ModelShape.of(tmp_path)
    assert (shape.head_dim, shape.key_heads, shape.block_weights) == (4, 2, 4 * 64 + 3 * 128)
