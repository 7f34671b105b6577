"""Every command with hostile values in every place: exit code 0, 1 or 2 and a sentence, never a traceback."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from agentloop.commands import main as program
from agentloop.commands import provenance
from agentloop.commands.main import build_app, main
from rollout_server import __main__ as server_program

Run = Callable[..., tuple[int, str]]

TEXTS = [
    "", " ", "-1", "0", "nan", "inf", "1e999", "9" * 400, "-" * 50, "x" * 300, "a/" * 3000, "\x1b[31mred", "..",
    "../..", "null", "[", "{a: ", "!!python/object:x", "=", "a=b=c", "run.steps", "run.steps=x", "\u2603", "\u202e",
    "--", "--x", "*", "[a-", "~nobody/x", "hub:", "hub:x", "hub:a/b:c@d", ".py:", "x.py:", "x.py:y", ":", "http://[",
    "\udcff\udcfe",
]  # fmt: skip


def leaves(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if getattr(command, "commands", None):
        for name, child in command.commands.items():
            yield from leaves(child, (*path, name))
    else:
        yield path, command


APP = build_app()
COMMANDS = dict(leaves(typer.main.get_command(APP)))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Files that no command expects."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "empty").write_text("")
    (folder / "binary.yaml").write_bytes(bytes(range(256)) * 9)
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "list.yaml").write_text("- 1\n")
    (folder / "loop.yaml").symlink_to(folder / "loop.yaml")
    (folder / "code.py").write_text("raise SystemExit(3)\n")
    (folder / "unreadable.jsonl").write_text("{}")
    run = folder / "run"
    (run / "metrics.jsonl").mkdir(parents=True)
    garbage = folder / "garbage"
    garbage.mkdir()
    (garbage / "metrics.jsonl").write_bytes(
        b'\xff\xfe{"step": 1}\n[]\n{"step": "x"}\nnull\n{"step": 1, "reward/mean": {}}\n'
    )
    os.mkfifo(folder / "fifo.yaml")
    return [*map(str, sorted(folder.iterdir())), str(folder), "/dev/null", "/dev/zero", "/proc/self/mem", "/"]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run a program in this process and an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    command = typer.main.get_command(APP)
    monkeypatch.setattr(program, "build_app", lambda: command)  # built once
    monkeypatch.setattr(provenance, "check_packages", lambda: None)
    monkeypatch.setattr(program, "importing", contextlib.nullcontext)
    monkeypatch.setattr("agentloop.trace.push.PAUSES_S", ())
    # A viewer starts with nearly any word, and ends only with Ctrl-C.
    monkeypatch.setattr("agentloop.viewer.serving._Server.run", lambda self, sockets: sockets[0].close())
    monkeypatch.setattr("agentloop.viewer.serving.os.nice", lambda niceness: niceness)  # of the tests that follow
    for command_module in ("train", "sft", "eval"):
        monkeypatch.setattr(f"trainer.commands.{command_module}.early_programs", lambda _: contextlib.nullcontext())

    def run(program: Callable[[], None], *words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["agentloop", *words])
        code: Any = 0
        try:
            program()
        except SystemExit as ended:
            code = ended.code
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err, f"{words}: {out + err}"
        assert code in (0, 1, 2, None), f"{words}: exit code {code}"
        assert code == 0 or code is None or err or out, f"{words}: says nothing"
        return code or 0, err

    return run


BASES: dict[str, list[str]] = {
    "train": ["quickstart", "model.path=/nowhere"],
    "eval": ["quickstart", "model.path=/nowhere"],
    "check": ["quickstart", "model.path=/nowhere"],
    "sft": ["quickstart", "model.path=/nowhere", "prepare=null"],
    "prepare": ["nowhere", "--out", "rows"],
    "export": ["nowhere", "--out", "model"],
    "report": ["nowhere"],
    "template": ["/nowhere"],
    "serve": ["--model", "/nowhere"],
    "copy": ["nowhere", "folder"],
    "trace serve": ["runs", "--port", "0"],
    "sandbox serve": ["--port", "0", "--python", "/nowhere"],
    "search serve": ["nowhere"],
    "search index": ["nowhere", "--out", "index"],
    "tools call": ["nowhere", "{}"],
}
"""Words with which a command fails late, so that no hostile value makes it do its work."""


def base_of(path: tuple[str, ...]) -> list[str]:
    return BASES.get(" ".join(path), BASES.get(path[-1], []))


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_no_word_makes_a_command_fail_with_a_traceback(path: tuple[str, ...], run: Run, files: list[str]) -> None:
    base = base_of(path)
    for value in [*TEXTS, *files]:
        if path != ("sandbox", "serve"):  # which starts without any word
            run(main, *path, value)
        if path[-1] not in ("list",):
            run(main, *path, *base, value)
            run(main, *path, value, *base[1:])


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_no_option_makes_a_command_fail_with_a_traceback(path: tuple[str, ...], run: Run, files: list[str]) -> None:
    base = base_of(path)
    for option in COMMANDS[path].params:
        if option.param_type_name != "option" or option.is_flag or "--help" in option.opts:
            continue
        for value in [*TEXTS[::2], *files[::2]] if path[-1] == "serve" else [*TEXTS, *files]:
            run(main, *path, *base, option.opts[0], value)


def test_the_servers_own_program(run: Run, files: list[str]) -> None:
    for value in [*TEXTS, *files]:
        code, _ = run(server_program.main, "--settings", value, "--model", "/nowhere")
        assert code in (1, 2)
        run(server_program.main, value)


def test_settings_that_are_wrong_are_named(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "settings.json"
    for text, says in (
        ('{"model": "/nowhere", "device": "banana"}', "device"),
        ('{"model": "a\\u0000b"}', "NUL"),
        ('{"model": "/nowhere", "weights_roots": ["a\\u0000b"]}', "NUL"),
        ('{"model": "/nowhere", "port": 99999999999999999999}', "64 bits"),
        ('{"model": "/nowhere", "port": 1e400}', "port"),
        ('{"model": "/nowhere", "threads": 100000}', "threads"),
        ("[" * 100_000, "deep"),
        (" " * (2**20 + 1), "more than 1 MB"),
        ("[]", "JSON object"),
    ):
        file.write_text(text)
        code, err = run(server_program.main, "--settings", str(file))
        assert code == 2 and says in err, (text[:80], err)
    code, err = run(server_program.main, "--settings", "/dev/zero", "--model", "/nowhere")
    assert code == 2 and "not an existing file" in err
