"""One plot as an SVG file: of a run, of several over each other, or refused with the titles there are."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from agentloop.errors import ConfigError
from agentloop.report.picture import write_picture

SVG = "{http://www.w3.org/2000/svg}"


def run(root: Path, rewards: list[float], name: str = "run") -> Path:
    folder = root / name
    folder.mkdir()
    rows = [{"step": 0, "eval/reward_mean": 0.0}]
    rows += [{"step": step, "reward/mean": reward, "reward/std": 0.1} for step, reward in enumerate(rewards, 1)]
    rows[-1]["eval/reward_mean"] = 1.0
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def elements(file: Path, kind: str) -> list[ElementTree.Element]:
    return list(ElementTree.parse(file).iter(SVG + kind))  # noqa: S314  # the file is our own


def texts(file: Path) -> list[str]:
    return [element.text or "" for element in elements(file, "text")]


def test_a_run_as_a_picture(tmp_path: Path) -> None:
    file = write_picture([run(tmp_path, [0.2, 0.5, 0.9], "a<b>&c")], "reward", tmp_path / "curve.svg")
    shown = texts(file)
    assert {"Reward", "training 0.900", "evaluation 1", "step", "0.00", "1.00", "3"} <= set(shown), shown
    lines = [element for element in elements(file, "path") if element.get("stroke-width") == "2.5"]
    assert len(lines) == 1
    # 0.2, 0.5 and 0.9 of a frame of 300, at steps 1, 2 and 3 of 0 to 3.
    assert lines[0].get("d") == "M333.3 240.0L666.7 150.0L1000.0 30.0"
    marks = [e for e in elements(file, "path") if str(e.get("d")).endswith("z")]
    assert [str(mark.get("d")).partition("l")[0] for mark in marks] == ["M0.0 294.0", "M1000.0 -6.0"]


def test_several_runs_have_a_curve_each(tmp_path: Path) -> None:
    first, second = run(tmp_path, [0.2, 0.5, 0.9], "seed<0>"), run(tmp_path, [0.3, 0.4], "seed1")
    file = write_picture([first, second], "Reward", tmp_path / "curves.svg")
    assert {"seed<0>: training 0.900", "seed1: training 0.400"} <= set(texts(file))
    strokes = [e.get("stroke") for e in elements(file, "path") if e.get("stroke-width") == "2.5"]
    assert len(strokes) == len(set(strokes)) == 2


@pytest.mark.filterwarnings("error")
def test_a_run_that_diverged_and_a_folder_of_any_name(tmp_path: Path) -> None:
    diverged, named = run(tmp_path, [1e308, -1e308, 0.5]), run(tmp_path, [0.3, 0.4], "a\nb\x1b[31m")
    file = write_picture([diverged, named], "Reward", tmp_path / "curves.svg")
    assert "a\nb\u241b[31m: training 0.400" in texts(file)
    assert all("nan" not in str(e.get("d")) and "inf" not in str(e.get("d")) for e in elements(file, "path"))


def test_the_legend_of_three_runs_takes_a_second_line(tmp_path: Path) -> None:
    runs = [run(tmp_path, [0.2, 0.5, 0.9], f"seed{seed}") for seed in range(3)]
    file = write_picture(runs, "Reward", tmp_path / "curves.svg")
    named = {e.text: (float(e.get("x", "")), float(e.get("y", ""))) for e in elements(file, "text")}
    first, third = (named[f"seed{seed}: training 0.900"] for seed in (0, 2))
    assert third[0] == first[0] and first[1] < third[1] < 52.0  # the frame begins there


def test_an_unknown_plot_is_refused_with_the_titles(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no plot 'rewards'") as raised:
        write_picture([run(tmp_path, [0.2, 0.5])], "rewards", tmp_path / "curve.svg")
    assert "Reward" in str(raised.value.hint) and not (tmp_path / "curve.svg").exists()
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "metrics.jsonl").touch()
    with pytest.raises(ConfigError, match="no plot"):
        write_picture([tmp_path / "new"], "Reward", tmp_path / "curve.svg")
