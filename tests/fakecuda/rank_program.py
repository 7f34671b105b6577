"""A rank of the trainer and a replica of the torch engine, each in a process of its own: which cards does it touch?

    python -m tests.fakecuda.rank_program trainer|engine FOLDER

It prints the numbers of the cards on which the process made streams, memory or a context, as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from agentloop.config import TrainerConfig
from rollout_server.engines.torch_engine.cache.kv import build_cache
from rollout_server.engines.torch_engine.core import Core
from rollout_server.engines.torch_engine.model.models import load_model, slow_runner
from tests.fakecuda.cards import RANK, RANKS, FakeCards, process_group, used_cards
from tests.fakecuda.material import generation, samples_of
from trainer.learner.learner import Learner
from trainer.types import LearnerSettings, LossSpec


def train(folder: Path) -> None:
    config = TrainerConfig.model_validate({"device": "cuda", "ranks": RANKS, "fsdp": {"offload_reference": True}})
    with process_group(RANK, RANKS), FakeCards()():
        learner = Learner(LearnerSettings(str(folder), config, "bfloat16", total_steps=10, seed=0, reference=True))
        learner.accumulate(samples_of(), 1.0, LossSpec(kl_coef=0.01))
        learner.step(1.0)
        learner.move_out(policy=True)


def serve(folder: Path) -> None:
    device = torch.device("cuda", RANK)
    with FakeCards()():
        loaded = load_model(str(folder), dtype=torch.bfloat16, device=device, context_length=512)
        cache = build_cache(loaded.kv, 512, max_running=4, max_kv_tokens=None, memory_bytes=2**34)
        core = Core(slow_runner(loaded), cache, eos_ids=loaded.eos_ids, max_running=4, device=device)
        core.add(generation("a", 40, max_new_tokens=2))
        while core.busy:
            core.step()


if __name__ == "__main__":
    {"trainer": train, "engine": serve}[sys.argv[1]](Path(sys.argv[2]))
    print(json.dumps(sorted(used_cards())))
