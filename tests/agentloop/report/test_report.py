"""The report: complete, self-contained, and safe to open whatever a model wrote into the traces."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from agentloop.report import write_report

MakeRun = Callable[..., Path]


class Tags(HTMLParser):
    """Collects the elements of a page, their attributes, and the text outside of scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._raw = False
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._raw = tag in ("script", "style")
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._raw = False

    def handle_data(self, data: str) -> None:
        if not self._raw:
            self.text += data
        elif self.tags[-1][0] == "script":
            self.scripts[-1] += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]

    def classed(self, name: str) -> list[tuple[str, dict[str, str | None]]]:
        return [(tag, attrs) for tag, attrs in self.tags if name in (attrs.get("class") or "").split()]


@pytest.fixture(scope="module")
def page(hostile_run: Path) -> Tags:
    return Tags(write_report(hostile_run).read_text(encoding="utf-8"))


def data_of(page: Tags) -> dict[str, Any]:
    data = json.loads(page.scripts[0])
    assert isinstance(data, dict)
    return data


def test_the_page_is_written_whole_and_small(hostile_run: Path) -> None:
    path = write_report(hostile_run)
    assert path == hostile_run / "report.html"
    assert path.stat().st_size < 1_000_000
    assert not list(hostile_run.glob("*.tmp"))


def test_the_page_refers_to_nothing_outside_itself(page: Tags) -> None:
    references = [
        value
        for _, attrs in page.tags
        for key, value in attrs.items()
        if key in ("src", "href", "action", "data", "xlink:href")
    ]
    assert references
    assert all(value is not None and value.startswith(("#", "data:,")) for value in references)


def test_only_our_own_script_may_run(page: Tags) -> None:
    policy = next(m["content"] for m in page.named("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'")
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "unsafe-inline" not in policy.split("script-src")[1].split(";")[0]


def test_text_of_the_model_stays_text(page: Tags) -> None:
    assert len(page.scripts) == 2
    assert not page.named("img")
    assert not any(key.startswith("on") for _, attrs in page.tags for key in attrs)
    for hostile in ("<script>window.hacked = 1</script>", "]]>", "[bold red]markup[/]", "🧮", "{{ 7 * 7 }}"):
        assert hostile in page.text
    assert "\x1b" not in page.text and "␛[31m" in page.text
    assert "\u202e" not in page.text and "⟨U+202E⟩" in page.text
    assert "quick <b>start</b>" in page.text


def test_every_quantity_is_plotted(page: Tags) -> None:
    titles = ["Reward", "Response length", "Turns and tool calls", "How episodes end", "Mismatch", "Staleness"]
    titles += ["Seconds per step", "Throughput", "Entropy", "Gradient norm", "Clip fraction", "Loss"]
    for title in titles:
        assert title in page.text
    assert "Learning rate" not in page.text and "KL to the initial policy" not in page.text  # they never move
    assert len(page.classed("plot")) == len(titles) == len(data_of(page)["plots"])


def test_the_verdict_has_the_means_of_the_first_three_and_last_ten_steps(make_run: MakeRun, tmp_path: Path) -> None:
    rows = [{"step": step, "reward/mean": step / 20, "step/time_s": 2.0} for step in range(1, 21)]
    rows[19]["eval/reward_mean"] = 0.5
    lines = [{"step": 0, "eval/reward_mean": 0.125}, *rows]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = Tags(write_report(tmp_path).read_text(encoding="utf-8")).text
    assert "0.100→0.775" in text
    assert "0.125→0.500" in text
    assert "40.0s" in text


def test_values_that_are_no_numbers_leave_gaps(page: Tags) -> None:
    plots = data_of(page)["plots"]
    series = {s["label"]: s["text"] for plot in reversed(plots) for s in plot["series"]}  # the first plot is the reward
    assert series["entropy"][5] == series["gradient norm"][5] == series["training"][5] == ""
    assert series["k3"][6] == "" and series["mean |Δ logprob|"][6] == "0"
    assert series["entropy"][4] and series["entropy"][6]


def test_a_torn_last_line_is_left_out(page: Tags) -> None:
    assert data_of(page)["plots"][0]["steps"] == list(range(31))


def test_sampled_tokens_carry_their_own_id_logprob_and_version(hostile_run: Path, page: Tags) -> None:
    lines = [json.loads(line) for line in (hostile_run / "traces/step_1/train.jsonl").read_text().splitlines()]
    shown = data_of(page)["trajectories"][0]
    line = next(line for line in lines if line["token_ids"] == shown["ids"])
    assert shown["v"] == line["versions"]
    assert shown["lp"] == [None if lp is None else round(lp, 4) for lp in line["logprobs"]]


def test_mask_shows_without_colour(page: Tags) -> None:
    labels = re.findall(r"model, turn \d · v\d+|observed|prompt", page.text)
    assert {"observed", "prompt"} <= set(labels) and any(label.startswith("model, turn 2") for label in labels)
    assert page.classed("sampled") and page.classed("observed") and page.classed("prompt")


def test_the_first_step_stands_beside_the_last(page: Tags) -> None:
    section = page.text.split("Training steps 1 and 30")[1].split("The same tasks")[0]
    assert section.count("first step 1") == section.count("last step 30") == 3


def test_an_evaluation_is_set_beside_the_first_on_the_same_task(page: Tags) -> None:
    section = page.text.split("The same tasks at the evaluations of step 0 and step 30")[1].split("On the way")[0]
    for task in ("val-0", "val-1", "val-2", "val-3"):
        assert section.count(task) == 2


def test_failures_are_counted_by_cause(page: Tags) -> None:
    section = " ".join(page.text.split("was not trained.")[1].split("Configuration")[0].split())
    assert "failed227no answer from <http://127.0.0.1:8000>" in section  # 2 episodes of 2 tasks in step 7
    assert "rejected117logprobs has 3 entries for 9 token ids" in section


def test_secrets_of_config_and_command_line_are_hidden(page: Tags) -> None:
    assert "hunter2" not in page.text and "hunter2" not in page.scripts[0]
    assert page.text.count("(hidden)") == 2
    assert "tokens_per_micro_batch" in page.text and "4096" in page.text


def test_a_bare_run_directory_still_gives_a_page(tmp_path: Path) -> None:
    text = Tags(write_report(tmp_path).read_text(encoding="utf-8")).text
    for said in ("could be plotted", "no config/resolved.json", "no env.json", "No failed or rejected trajectory"):
        assert said in text


def test_one_step_alone_is_plotted(make_run: MakeRun, tmp_path: Path) -> None:
    make_run(tmp_path / "one", 1, hostile=False)
    page = Tags(write_report(tmp_path / "one").read_text(encoding="utf-8"))
    assert "Training samples" in page.text
    assert all("nan" not in (attrs.get("d") or "") for attrs in page.named("path"))


def test_a_long_run_with_long_trajectories_stays_small(make_run: MakeRun, make_trajectory: Any, tmp_path: Path) -> None:
    run = make_run(tmp_path / "long", 40, hostile=False)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    many = [rows[1 + step % 40] | {"step": step} for step in range(1, 5001)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in many))
    for path in run.glob("traces/*/*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            for key, value in (
                ("token_ids", 5),
                ("loss_mask", 1),
                ("logprobs", -1.0),
                ("versions", 3),
                ("pieces", "x" * 500),
            ):
                line[key] += [value] * 3000
        path.write_text("".join(json.dumps(line) + "\n" for line in lines[:4]))
    path = write_report(run)
    assert path.stat().st_size < 3_000_000
    text = path.read_text(encoding="utf-8")
    assert "tokens left out" in text and "mean of 10 steps" in text


def test_without_pieces_or_tokenizer_ids_are_shown_and_said(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(tmp_path / "ids", 2, hostile=False)
    for path in run.glob("traces/*/*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps({k: v for k, v in line.items() if k != "pieces"}) + "\n" for line in lines))
    text = Tags(write_report(run).read_text(encoding="utf-8")).text
    assert "No tokenizer could be loaded from /nowhere/recipes/quickstart/model" in text
    assert re.search(r"⟨\d+⟩", text)


def test_without_pieces_ids_are_decoded_with_the_models_tokenizer(
    make_run: MakeRun, quickstart_model: Path, tmp_path: Path
) -> None:
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(quickstart_model / "tokenizer.json")).encode("What is 123 * 45? é🧮").ids
    run = make_run(tmp_path / "decoded", 2, hostile=False)
    config = json.loads((run / "config/resolved.json").read_text())
    config["model"]["path"] = str(quickstart_model)
    (run / "config/resolved.json").write_text(json.dumps(config))
    n = len(ids)
    line = {"format": 1, "token_ids": ids, "prompt_length": 2, "reward": 1.0, "task_id": "t"}
    line |= {"loss_mask": [0, 0] + [1] * (n - 2), "logprobs": [None, None] + [-0.5] * (n - 2)}
    line |= {"versions": [None, None] + [0] * (n - 2)}
    for step in (1, 2):
        (run / f"traces/step_{step}/train.jsonl").write_text(json.dumps(line) + "\n")
    html = write_report(run).read_text(encoding="utf-8")
    text = re.sub(r"<[^>]+>", "", html)
    assert "123 * 45? é🧮" in text
    assert "No tokenizer could be loaded" not in text
