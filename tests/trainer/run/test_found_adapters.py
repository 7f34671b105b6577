"""The adapters of another run are found, or refused with the key to change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agentloop.config import LoraConfig
from agentloop.errors import RunDirError
from trainer.checkpoint_files import seal
from trainer.run.checkpoints import find_adapters

LORA = {"rank": 4, "alpha": 8.0, "target_modules": "all-linear", "exclude": []}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    return tmp_path / "model"


def write_run(root: Path, config: dict[str, Any], *steps: int) -> Path:
    (root / "config").mkdir(parents=True)
    (root / "config" / "resolved.json").write_text(json.dumps(config))
    for step in steps:
        folder = root / "checkpoints" / f"step_{step}"
        (folder / "trainer").mkdir(parents=True)
        (folder / "trainer" / ".metadata").write_bytes(b"tensors")
        seal(folder, {"step": step, "version": step})
    return root


def lora(adapters: Path, **other: Any) -> LoraConfig:
    return LoraConfig.model_validate(LORA | other | {"adapters": adapters})


def test_the_newest_checkpoint_or_a_named_one(tmp_path: Path, model: Path) -> None:
    sft = write_run(tmp_path / "sft", {"stages": [], "model": {"path": str(model)}, "lora": LORA}, 20, 5)
    train = write_run(tmp_path / "rl", {"model": {"path": "org/name"}, "trainer": {"lora": LORA}}, 3)
    assert find_adapters(lora(sft), str(model)) == sft / "checkpoints" / "step_20"
    assert find_adapters(lora(sft / "checkpoints" / "step_5"), str(model)) == sft / "checkpoints" / "step_5"
    assert find_adapters(lora(train), str(model)) == train / "checkpoints" / "step_3"
    assert find_adapters(None, str(model)) is None
    assert find_adapters(LoraConfig(), str(model)) is None


@pytest.mark.parametrize(
    ("config", "wanted", "message"),
    [
        ({"lora": LORA | {"rank": 8}}, {}, "trainer.lora.rank is 4, and .* trained with 8"),
        ({"lora": LORA | {"alpha": 32.0}}, {}, "trainer.lora.alpha is 8.0, and .* trained with 32.0"),
        ({"lora": LORA}, {"exclude": ["down_proj"]}, "trainer.lora.exclude"),
        ({"lora": None}, {}, "trained no adapters"),
        ({"lora": LORA, "model": {"path": "{other}"}}, {}, "belong to model.path="),
    ],
)
def test_adapters_of_another_kind_are_refused(
    tmp_path: Path, model: Path, config: dict[str, Any], wanted: dict[str, Any], message: str
) -> None:
    (tmp_path / "other").mkdir()
    text = json.dumps(config).replace("{other}", str(tmp_path / "other"))
    run = write_run(tmp_path / "sft", json.loads(text), 1)
    with pytest.raises(RunDirError, match=message):
        find_adapters(lora(run, **wanted), str(model))


def test_models_of_the_hub_are_told_apart_by_their_folder_in_its_cache(tmp_path: Path) -> None:
    run = write_run(tmp_path / "sft", {"lora": LORA, "model": {"path": "org/base"}}, 1)
    cache = tmp_path / "hub"
    for name, fits in (("models--Org--base", True), ("models--org--base-instruct", False)):
        model = cache / name / "snapshots" / "0123"
        model.mkdir(parents=True)
        if fits:
            assert find_adapters(lora(run), str(model)) is not None
        else:
            with pytest.raises(RunDirError, match=r"belong to model\.path=org/base"):
                find_adapters(lora(run), str(model))


def test_a_run_of_an_earlier_version_may_lack_keys(tmp_path: Path, model: Path) -> None:
    known = {key: value for key, value in LORA.items() if key != "exclude"}
    assert find_adapters(lora(write_run(tmp_path / "old", {"lora": known}, 1)), str(model)) is not None


def test_a_checkpoint_away_from_its_run_is_refused_for_that(tmp_path: Path, model: Path) -> None:
    run = write_run(tmp_path / "sft", {"lora": LORA}, 1)
    moved = run / "checkpoints" / "step_1"
    (run / "config" / "resolved.json").write_text("{")
    with pytest.raises(RunDirError, match=r"resolved\.json is missing or damaged"):
        find_adapters(lora(moved), str(model))


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path, model: Path) -> None:
    run = write_run(tmp_path / "sft", {"lora": LORA})
    for folder in (run, tmp_path / "nowhere"):
        with pytest.raises(RunDirError, match="has no checkpoint"):
            find_adapters(lora(folder), str(model))


def test_a_damaged_checkpoint_is_refused(tmp_path: Path, model: Path) -> None:
    run = write_run(tmp_path / "sft", {"lora": LORA}, 1)
    (run / "checkpoints" / "step_1" / "trainer" / ".metadata").write_bytes(b"altered")
    with pytest.raises(RunDirError, match="metadata"):
        find_adapters(lora(run), str(model))


@pytest.mark.parametrize("trained", [None, LORA | {"rank": 8}])
def test_the_finished_model_of_fine_tuning_is_named_where_it_is(
    tmp_path: Path, model: Path, trained: dict[str, Any] | None
) -> None:
    def fix(root: Path) -> str:
        with pytest.raises(RunDirError) as caught:
            find_adapters(lora(root), str(model))
        return str(caught.value.hint)

    run = write_run(tmp_path / "sft", {"stages": [], "lora": trained, "out": None}, 1)
    assert f"agentloop export {run} --out <folder>, model.path=<folder>, and" in fix(run)  # it is not finished
    (run / "model").mkdir()
    (run / "model" / "config.json").write_text("{}")
    assert f": model.path={run / 'model'}, and trainer.lora.adapters=null" in fix(run) and "export" not in fix(run)

    elsewhere = write_run(tmp_path / "other", {"stages": [], "lora": trained, "out": str(run / "model")}, 1)
    assert f"model.path={run / 'model'}, and" in fix(elsewhere)
    rl = write_run(tmp_path / "rl", {"trainer": {"lora": trained}}, 1)
    assert "agentloop export" in fix(rl)
