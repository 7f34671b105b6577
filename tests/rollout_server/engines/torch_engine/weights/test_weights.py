"""A new policy version in the middle of generations: every token's version and logprob stay true."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rollout_server.engines.base import FolderWeights
from rollout_server.engines.torch_engine.core import Core
from rollout_server.engines.torch_engine.model.models import LoadedModel
from rollout_server.engines.torch_engine.running import Running
from rollout_server.engines.torch_engine.weights.loader import WeightLoader
from rollout_server.errors import WeightsError
from tests.rollout_server.support import TOLERANCE, Reference, load, make_core, random_ids, request, run


def read_weights(folder: Path, model: Any) -> dict[str, torch.Tensor]:
    return WeightLoader(model).stage(FolderWeights(folder)).tensors


def update(core: Core, loaded: LoadedModel, folder: Path, version: str, mode: str = "retract") -> None:
    loader = WeightLoader(loaded.model)
    loader.swap_in(loader.stage(FolderWeights(folder)))
    core.weights_changed(version, mode)  # type: ignore[arg-type]


def spans(running: Running) -> list[tuple[str, int, int]]:
    assert running.result is not None
    return [(s.version, s.start, s.end) for s in running.result.spans]


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "transformers"])
def test_each_span_was_sampled_by_its_version(model_dir: Path, other_weights: Path, fast: bool) -> None:
    loaded = load(model_dir)
    core = make_core(loaded, fast=fast, max_running=2)
    requests = [request(random_ids(20 + i, seed=i), new=30, sampling_seed=i, ignore_eos=True) for i in range(3)]
    running = [core.add(generation) for generation in requests]
    for _ in range(8):
        core.step()
    update(core, loaded, other_weights, "1")
    for _ in range(5):
        core.step()
    update(core, loaded, model_dir, "2")
    while core.busy:
        core.step()
    assert spans(running[0]) == spans(running[1]) == [("0", 0, 8), ("1", 8, 13), ("2", 13, 30)]
    assert spans(running[2]) == [("2", 0, 30)]  # it waited for a row: no other version has touched it
    references = {"0": Reference(model_dir), "1": Reference(other_weights), "2": Reference(model_dir)}
    for one in running:
        result = one.result
        assert result is not None
        for span in result.spans:
            expected = references[span.version].logprobs(one.ids, one.prompt_length, 1.0)[span.start : span.end]
            got = result.logprobs[span.start : span.end]
            assert max(abs(a - b) for a, b in zip(got, expected, strict=True)) < TOLERANCE


def test_in_place_keeps_the_cache_and_retract_computes_it_anew(model_dir: Path, other_weights: Path) -> None:
    prefilled = {}
    for mode in ("retract", "in_place"):
        loaded = load(model_dir)
        core = make_core(loaded)
        running = core.add(request(random_ids(40, seed=1), new=20, ignore_eos=True))
        for _ in range(10):
            core.step()
        update(core, loaded, other_weights, "1", mode)
        while core.busy:
            core.step()
        prefilled[mode] = core.stats.prefilled_tokens
        assert spans(running) == [("0", 0, 10), ("1", 10, 20)]
        # Rows that old weights computed are not shared, finished or not.
        (again,) = run(core, [request(random_ids(40, seed=1), new=5, ignore_eos=True)])
        assert again.result.cached_tokens == (39 if mode == "retract" else 0)
        assert Reference(other_weights).worst([again]) < TOLERANCE
    assert prefilled == {"retract": 39 + 49, "in_place": 39}


def test_kept_prefixes_do_not_outlive_their_weights(model_dir: Path, other_weights: Path) -> None:
    loaded = load(model_dir)
    core = make_core(loaded)
    run(core, [request(random_ids(40, seed=1))])
    update(core, loaded, other_weights, "1")
    assert all(row is None for pool in core.cache.pools for row in pool.rows)
    (again,) = run(core, [request(random_ids(40, seed=1), ignore_eos=True)])
    assert again.result.cached_tokens == 0
    assert Reference(other_weights).worst([again]) < TOLERANCE


def break_shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = torch.ones(3)


def break_value(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"][0] = float("nan")


def drop_one(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.norm.weight"]


def add_one(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.nrom.weight"] = torch.ones(3)


@pytest.mark.parametrize("fault", [break_shape, break_value, drop_one, add_one])
def test_weights_that_do_not_fit_are_refused_by_name(model_dir: Path, tmp_path: Path, fault: object) -> None:
    tensors = load_file(model_dir / "model.safetensors")
    fault(tensors)  # type: ignore[operator]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"model\.n[or]+m\.weight"):
        read_weights(tmp_path, load(model_dir).model)


def test_a_truncated_file_and_an_empty_folder_are_refused(model_dir: Path, tmp_path: Path) -> None:
    model = load(model_dir).model
    with pytest.raises(WeightsError, match="safetensors files"):
        read_weights(tmp_path, model)
    data = (model_dir / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(WeightsError, match="cannot be read"):
        read_weights(tmp_path, model)


def test_sharded_weights_are_read_by_their_index(other_weights: Path, model_dir: Path, tmp_path: Path) -> None:
    tensors = load_file(other_weights / "model.safetensors")
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    found = read_weights(tmp_path, load(model_dir).model)
    assert all(torch.equal(found[name], tensors[name]) for name in names)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"lacks b\.safetensors"):
        read_weights(tmp_path, load(model_dir).model)
    index["weight_map"][names[0]] = "../a.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match="outside"):
        read_weights(tmp_path, load(model_dir).model)
