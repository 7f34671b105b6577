"""Assemble the page and write it."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from agentloop.config import Recipe, SftRecipe
from agentloop.files import write_atomic
from agentloop.report.reading import RunRecord, Traced
from agentloop.text import SECRET_KEY, clean, hide_override, plain_json

EVALUATED = 4
"""Evaluation tasks on the page."""

SHOWN_PROBLEMS = 5
"""Missing or damaged trace files that are named."""

SHOWN_KEYS = 4
"""Episodes that are named for a signal."""

BETWEEN = 4
"""Training steps between the first and the last with samples on the page."""


def write_report(run_dir: Path) -> Path:
    """Write the self-contained `report.html` of a run: finished, killed or still running.

    Args:
        run_dir: has `metrics.jsonl` and, depending on how far the run came, `config/resolved.json`,
            `env.json` and `traces/` (`agentloop.trace.store`; the JSON lines of earlier versions
            are read too, in which `"pieces"` may hold the text of each token). Ids are decoded with
            the tokenizer of `model.path`, or shown as numbers if there is none.

    Returns:
        The path of the page. It is renamed into place when it is complete.
    """
    path = run_dir / "report.html"
    write_atomic(path, render(run_dir).encode(), durable=False)
    return path


def render(run_dir: Path) -> str:
    """Return the page as HTML."""
    import jinja2  # a run imports this package at its start, and needs the template engine only at its end

    from agentloop.report.figures import plots, verdicts
    from agentloop.report.samples import failures
    from agentloop.report.sft_figures import sft_plots, sft_verdicts
    from agentloop.report.tokens import Shader, load_decoder
    from agentloop.trace.signals import RULES, signals_and_note

    record = RunRecord.read(run_dir)
    decode = load_decoder(record.setting("model.path"), run_dir)
    shader = Shader(decode)
    unhealthy, searched_all = record.unhealthy()
    steps = [int(row["step"]) for row in record.rows]
    signals, note = ([], "") if record.is_sft else signals_and_note(run_dir)
    script = _resource("report.js")
    drawn = [plot.draw() for plot in (sft_plots if record.is_sft else plots)(record)]
    sections = _sample_sections(record, shader)
    trajectories = [shown for section in sections for shown in _shown(section)]
    for index, shown in enumerate(trajectories):
        shown["key"] = index

    data = {
        "plots": [plot["data"] for plot in drawn],
        "trajectories": [shown["data"] for shown in trajectories],
    }
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["clean"] = clean
    return environment.from_string(_resource("report.html.j2")).render(
        name=clean(record.setting("run.name") or run_dir.resolve().name, 80),
        subtitle=_subtitle(record),
        verdicts=(sft_verdicts if record.is_sft else verdicts)(record),
        has_episodes=not record.is_sft,
        plots=drawn,
        signals=[_signal(signal) for signal in signals],
        signals_note=note,
        rules=len(RULES),
        steps=steps,
        sections=sections,
        shows_ids=decode is None and any(shown["ids_only"] for shown in trajectories),
        model_path=clean(record.setting("model.path") or "", 200),
        failures=failures(unhealthy),
        searched_all=searched_all,
        trace_problems=[clean(problem, 300) for problem in record.trace_problems()[:SHOWN_PROBLEMS]],
        config=config_groups(record.config),
        environment=_environment(record.env),
        style=_resource("report.css"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=_json_for_script(data),
    )


def _sample_sections(record: RunRecord, shader: Any) -> list[dict[str, Any]]:
    """Return the sections with trajectories; empty ones are omitted."""
    from agentloop.report.samples import pairs, same_tasks, spread, typical

    sections: list[dict[str, Any]] = []

    def column(step: int, traced: Traced | None, what: str) -> dict[str, Any]:
        return {"step": step, "what": what, "shown": _for_template(shader.show(traced)) if traced is not None else None}

    train = record.trace_steps("train")
    if len(train) > 1:
        first, last = train[0], train[-1]
        matched = pairs(record.trajectories(first, "train"), record.trajectories(last, "train"))
        rows = [[column(first, a, "first step"), column(last, b, "last step")] for a, b in matched]
        note = (
            f"Training steps {first} and {last}: an episode from the upper, middle and lower third of the first "
            "step's rewards, each next to the last step's episode of the same task, or of similar rank and prompt."
        )
        sections.append(_section("first-last", "First and last step", note, rows))

    evals = record.trace_steps("eval")
    if evals:
        first, last = evals[0], evals[-1]
        later = record.trajectories(last, "eval")
        if first == last:
            rows = [[column(last, traced, "evaluation")] for traced in later[:EVALUATED]]
            note = f"The first tasks of the evaluation at step {last}."
        else:
            matched = same_tasks(record.trajectories(first, "eval"), later, EVALUATED)
            rows = [[column(first, a, "first evaluation"), column(last, b, "last evaluation")] for a, b in matched]
            note = f"The same tasks at the evaluations of step {first} and step {last}."
        sections.append(_section("evaluation", "Evaluation", note, rows))

    between = spread(train, BETWEEN) if len(train) > 1 else train
    rows = [
        [
            column(step, traced, half)
            for half, traced in zip(
                ("upper half", "lower half"), typical(record.trajectories(step, "train"), 2), strict=False
            )
        ]
        for step in between
    ]
    note = "Two episodes each, from the upper and the lower half of the step's rewards."
    sections.append(
        _section("between", "Training samples" if len(train) == 1 else "Steps between", note, rows, folded=True)
    )
    return [section for section in sections if section["rows"]]


def _section(
    anchor: str, title: str, note: str, rows: Sequence[list[dict[str, Any]]], *, folded: bool = False
) -> dict[str, Any]:
    return {"id": anchor, "title": title, "note": note, "rows": [row for row in rows if row], "folded": folded}


def _signal(signal: Any) -> dict[str, Any]:
    return {
        "title": signal.title,
        "sentence": clean(signal.sentence, 1000),
        "warning": signal.severity == "warning",
        "step": signal.step,
        "episodes": [clean(key, 120) for key in signal.keys[:SHOWN_KEYS]],
        "more": max(0, len(signal.keys) - SHOWN_KEYS),
    }


def _for_template(shown: Any) -> dict[str, Any]:
    traced: Traced = shown.traced
    return {
        "title": shown.title,
        "segments": shown.segments,
        "data": shown.data,
        "facts": shown.facts,
        "reward": traced.reward,
        "status": clean(traced.status, 20),
        "error": clean(traced.error, 400) if traced.error else None,
        "ids_only": traced.pieces is None,
    }


def _shown(section: dict[str, Any]) -> Iterable[dict[str, Any]]:
    return (column["shown"] for row in section["rows"] for column in row if column["shown"] is not None)


def _subtitle(record: RunRecord) -> list[str]:
    parts: list[str] = []
    if model := record.setting("model.path"):
        parts.append("model " + clean(str(model).rstrip("/").removesuffix("/model").rsplit("/", 1)[-1], 60))
    if record.is_sft:
        from agentloop.report.sft_figures import sft_subtitle

        parts += sft_subtitle(record)
    algorithm = record.setting("trainer.algorithm.advantage")
    if algorithm:
        parts.append(f"{clean(algorithm, 20)} / {clean(record.setting('trainer.algorithm.loss'), 20)}")
    batch, group = record.setting("rollout.batch_size"), record.setting("rollout.group_size")
    if batch and group:
        parts.append(f"{clean(batch, 10)} prompts × {clean(group, 10)} episodes a step")
    if engine := record.setting("rollout.engine"):
        parts.append(f"{clean(engine, 30)} engine")
    if record.setting("seed") is not None:
        parts.append(f"seed {clean(record.setting('seed'), 20)}")
    return parts


def config_groups(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Group the flattened config by top-level key; hide secrets, mark non-default values."""
    defaults = dict(_flat(_default_sft() if "stages" in config else _default_recipe()))
    groups: dict[str, list[dict[str, Any]]] = {}
    for key, value in _flat(config):
        section = key.split(".", 1)[0]
        hidden = value not in (None, "") and SECRET_KEY.search(key) is not None
        groups.setdefault(section if isinstance(config.get(section), dict) else "recipe", []).append(
            {
                "key": clean(key.removeprefix(section + "."), 80),
                "value": "(hidden)" if hidden else clean(plain_json(value), 300),
                "changed": key not in defaults or defaults[key] != value,
            }
        )
    return [
        {"title": clean(title, 40), "entries": entries} for title, entries in sorted(groups.items(), key=_recipe_order)
    ]


def _recipe_order(group: tuple[str, Any]) -> int:
    names = ["recipe", *Recipe.model_fields, *SftRecipe.model_fields]
    return names.index(group[0]) if group[0] in names else len(names)


def _default_recipe() -> dict[str, Any]:
    minimal: dict[str, dict[str, Any]] = {"run": {"epochs": 1}, "model": {"path": ""}, "data": {"train": ""}}
    defaults = Recipe.model_validate(minimal).model_dump(mode="json")
    for section, keys in minimal.items():
        for key in keys:
            del defaults[section][key]
    return defaults


def _default_sft() -> dict[str, Any]:
    minimal = {"model": {"path": ""}, "stages": [{"name": "one", "data": "", "steps": 1}]}
    defaults = SftRecipe.model_validate(minimal).model_dump(mode="json")
    del defaults["stages"], defaults["model"]["path"]
    return defaults


def _flat(data: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _environment(env: dict[str, Any]) -> list[dict[str, str]]:
    entries: list[dict[str, str]] = []
    for key, value in env.items():
        if key == "argv" and isinstance(value, list):
            value = " ".join(hide_override(str(part)) for part in value)
        if isinstance(value, dict):
            entries += [
                {"key": clean(f"{key} · {name}", 60), "value": clean(plain_json(v), 300)} for name, v in value.items()
            ]
        else:
            entries.append({"key": clean(key, 60), "value": clean(plain_json(value), 300)})
    return entries


def _json_for_script(data: Any) -> str:
    """Return ASCII JSON for a `<script>` element, without a `<` that could end it."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _resource(name: str) -> str:
    return resources.files("agentloop.report").joinpath(name).read_text(encoding="utf-8")
