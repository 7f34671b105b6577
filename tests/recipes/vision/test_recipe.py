"""The recipe as a newcomer uses it, and the model that comes with it: small, from its own files, with eyes."""

from __future__ import annotations

import io
import json
import random
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import recipes.bounds
from agentloop.commands.recipes import copy_recipe
from agentloop.config import Recipe, SftModel
from agentloop.config.loading import load_config
from agentloop.report.picture import write_picture
from recipes.vision import data
from trainer.console.console import Console
from trainer.run.preflight import prepare
from trainer.sft.tokenizing import SftTokenizer

SMALL = [
    "run.steps=1", "rollout.batch_size=2", "rollout.group_size=2", "eval.before_train=false", "eval.every=null",
    "data.val=null",
]  # fmt: skip
"""Shorten a run; the path stays the same."""

FEW_ROWS = """
from recipes.vision.data import rows, sft_rows

def see():
    return sft_rows("see", 12)

def act():
    return sft_rows("act", 12)

def train():
    return list(rows("train", 4))
"""


@pytest.fixture
def model(repo: Path) -> Path:
    return repo / "recipes/vision/model"


def readme(repo: Path) -> list[list[str]]:
    """The README's commands, without their comments."""
    blocks = re.findall(r"^```\n(.*?)^```", (repo / "recipes/vision/README.md").read_text(), re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line.split("  #")[0]) for line in lines]
    return [command for command in commands if command and command[0] in ("agentloop", "python")]


@pytest.mark.recipe
def test_the_readmes_commands_run_in_order(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The two trainings run at once; the control's folder is then a copy, and its own rows are checked below."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bounds"])
    Path("few.py").write_text(FEW_ROWS)
    copy, train, control, report, bounds, bounds_of_control, pictures, call, model, sft = readme(repo)
    assert copy == ["agentloop", "recipes", "copy", "vision", "my-vision"]
    copy_recipe("vision", Path("my-vision"))

    for command in ([sys.executable, *pictures[1:]], [sys.executable, "-m", *call]):
        assert subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    (shown,) = Path("my-vision/shown").iterdir()
    assert Image.open(shown).size == (56, 56)

    assert train[1] == "train" and sft[1] == "sft" and model[1] == "my-vision/model.py"
    few = ["stages.0.steps=1", "stages.1.steps=1", "stages.0.data=few.py:see", "stages.1.data=few.py:act"]
    running = [
        subprocess.Popen([sys.executable, "-m", *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for command in ([*train, *SMALL, "data.train=few.py:train"], [*sft, *few])
    ]
    for process in running:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output[-3000:]
    (line,) = Path("outputs/vision/metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 1 and json.loads(line)["mismatch/logprob_abs_mean"] < 1e-4
    assert Path("outputs/vision-sft/model/model.safetensors").is_file()

    assert control[1] == "train"
    recipe = load_config(Recipe, Path(control[3]), control[4:])
    shutil.copytree("outputs/vision", recipe.run_dir)
    assert report[:2] == ["agentloop", "report"] and report[-2] == "--picture"
    write_picture([Path(run) for run in report[2:-2]], "Reward", Path(report[-1]))
    for command in (bounds, bounds_of_control):
        assert command[1:3] == ["-m", "recipes.bounds"]
        sys.argv[1:] = command[3:4]  # one step keeps no bounds
        assert recipes.bounds.main() == 0
    assert Path("curve.svg").read_text().startswith("<svg ") and "outputs/vision-blank" in capsys.readouterr().out


def test_the_control_passes_the_checks_before_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy_recipe("vision", tmp_path / "mine")
    blank = [f"data.{split}={tmp_path}/mine/data.py:blank_val_rows" for split in ("train", "val")]
    with Console() as console:
        inputs = prepare(load_config(Recipe, tmp_path / "mine/recipe.yaml", blank), console)
    assert len(inputs.train) == 128 and "warning" not in "".join(capsys.readouterr())


def test_the_model_is_small_and_comes_from_its_own_files(
    repo: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.numpy import load_file

    tensors = load_file(model / "model.safetensors")
    assert sum(tensor.size for tensor in tensors.values()) <= 1_200_000
    assert sum(file.stat().st_size for file in (repo / "recipes/vision").rglob("*") if file.is_file()) < 5_000_000

    monkeypatch.setitem(sys.modules, "data", data)  # the program imports the file beside it
    runpy.run_path(str(repo / "recipes/vision/model.py"))["write_model_folder"](tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json"):
        assert (tmp_path / name).read_bytes() == (model / name).read_bytes(), name
    built, shipped = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, model))
    for key in ("text_config", "vision_config"):
        built |= built.pop(key)
        shipped |= shipped.pop(key)
    assert built == shipped


def test_the_model_reads_and_points_but_does_not_yet_look_where_it_should(model: Path) -> None:
    """What RL starts from: all the parts, and a random choice of the place."""
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

    lm = Qwen2_5_VLForConditionalGeneration.from_pretrained(model).eval()
    processor = Qwen2VLImageProcessorPil.from_pretrained(model)
    tokenizer = SftTokenizer.load(SftModel(path=str(model)), 1024)

    def likelihoods(row: dict[str, Any]) -> torch.Tensor:
        """Return the probability of each trained token."""
        found = tokenizer.row(row, "row")
        assert found is not None
        ids = torch.from_numpy(found.token_ids).long()[None]
        pads = (ids == lm.config.image_token_id).int()
        images = processor([Image.open(io.BytesIO(image.tobytes())) for image in found.images], return_tensors="pt")
        with torch.no_grad():
            logits = lm(input_ids=ids, mm_token_type_ids=pads, **images).logits[0, :-1]
        return logits.softmax(-1).gather(1, ids[0, 1:, None])[torch.from_numpy(found.loss_mask)[1:], 0]

    rng = random.Random("test")
    read = [likelihoods(data.read(rng)).min() > 0.5 for _ in range(24)]
    pointed = [likelihoods(data.point(rng)).min() > 0.5 for _ in range(24)]
    assert sum(read) >= 22 and sum(pointed) >= 22

    # The call is about 38 tokens long; its probability is nearly that of the choice among four.
    zoomed = [likelihoods(data.zoom(rng))[:30].prod().item() for _ in range(24)]
    assert 0.15 < sum(zoomed) / len(zoomed) < 0.35
