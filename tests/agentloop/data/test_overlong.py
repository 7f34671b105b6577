"""Every row is checked once: errors are named, prompts that are too long are dropped, refused or cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentloop.chat import ChatRenderer
from agentloop.data import Tasks, ValidatedRows, check_tasks, load_tasks
from agentloop.data.overlong import cut_prompt
from agentloop.errors import DataError, ModelError
from agentloop.types import Message


def tasks_of(folder: Path, *rows: dict[str, Any]) -> Tasks:
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_tasks(str(folder / "a.jsonl"), "data.train", "a")


def user(text: Any, **columns: Any) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": text}], **columns}


def check(tasks: Tasks, renderer: Any, **changes: Any) -> ValidatedRows:
    options: dict[str, Any] = {"schemas": None, "limit": 1000, "overlong": "drop"}
    return check_tasks(tasks, "data.train", renderer=renderer, **{**options, **changes})


def test_the_pass_says_what_it_found(tmp_path: Path, renderer: ChatRenderer) -> None:
    system = {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "1"}], "agent_name": "b"}
    seen: list[tuple[int, int]] = []
    tasks = tasks_of(
        tmp_path, user("1"), system, user("1" * 90, extra_info={"index": 7}), user("2", extra_info={"index": 8})
    )
    limit = len(renderer.start(system["prompt"]))
    found = check(tasks, renderer, limit=limit, on_row=lambda done, total: seen.append((done, total)))
    assert (found.without_agent, found.dropped, found.cut, found.agents, found.system) == (3, 1, 0, {"a", "b"}, True)
    assert found.longest == len(renderer.start(tasks[2].prompt))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [task.task_id for task in found.tasks] == ["0", "1", "8"] and found.places == {"0": 0, "1": 1, "8": 2}


def test_long_prompts_are_dropped_or_refused_tool_schemas_counted(
    tmp_path: Path, renderer: ChatRenderer, calculator: Any
) -> None:
    tasks = tasks_of(tmp_path, user("1"), user("1" * 50))
    limit = len(renderer.start(tasks[0].prompt, calculator.schemas))
    kept = check(tasks, renderer, schemas=calculator.schemas, limit=limit).tasks
    assert [task.task_id for task in kept] == ["0"]
    with pytest.raises(DataError, match=r"row 1 \(line 2\): the prompt has .* tokens"):
        check(tasks, renderer, schemas=calculator.schemas, limit=limit, overlong="error")
    with pytest.raises(DataError, match="every prompt is longer"):
        check(tasks, renderer, schemas=calculator.schemas, limit=limit - 1)


@pytest.mark.parametrize(
    ("side", "shown"),
    [
        ("left", "[... 73 tokens cut ...]\n56789"),
        ("right", "01234\n[... 73 tokens cut ...]"),
        ("middle", "012\n[... 73 tokens cut ...]\n89"),
    ],
)
def test_the_longest_user_text_is_cut_at_the_side_that_is_named(
    tmp_path: Path, renderer: ChatRenderer, calculator: Any, side: str, shown: str
) -> None:
    """Return a prompt of digits: the quickstart's tokenizer has one token per digit."""
    text = "01234" + "7" * 68 + "56789"
    prompt = [
        {"role": "system", "content": "1" * 90},
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "2" * 90},
        {"role": "user", "content": text},
    ]
    fits = [*prompt[:3], {"role": "user", "content": shown}]
    limit = len(renderer.start(fits, calculator.schemas))  # type: ignore[arg-type]
    found = check(
        tasks_of(tmp_path, {"prompt": prompt}), renderer, schemas=calculator.schemas, limit=limit, overlong=side
    )
    assert (found.cut, found.dropped) == (1, 0)
    assert found.tasks[0].prompt == fits


def test_a_prompt_that_no_cut_makes_fit_is_dropped(tmp_path: Path, renderer: ChatRenderer) -> None:
    system = {"prompt": [{"role": "system", "content": "s" * 200}, {"role": "user", "content": "u" * 40}]}
    none = {"prompt": [{"role": "system", "content": "s" * 200}]}
    found = check(tasks_of(tmp_path, user("1"), system, none), renderer, limit=100, overlong="left")
    assert (found.cut, found.dropped) == (0, 2) and [task.task_id for task in found.tasks] == ["0"]


def test_images_stay_when_the_text_beside_them_is_cut(tmp_path: Path) -> None:
    """Use a renderer that counts characters, and a tokenizer with one token per character."""

    class Characters:
        class tokenizer:
            class backend_tokenizer:
                @staticmethod
                def encode(text: str, add_special_tokens: bool) -> Any:
                    return type("E", (), {"offsets": [(i, i + 1) for i in range(len(text))]})

        @staticmethod
        def start(messages: Any, tools: Any = None) -> list[int]:
            return [0] * sum(len(part.get("text", "12345")) for m in messages for part in m["content"])

    tasks = tasks_of(tmp_path, user("look: <image>" + "x" * 200, images=["a.png"]))
    found = check(tasks, Characters(), limit=60, overlong="right")  # type: ignore[arg-type]
    parts: Any = found.tasks[0].prompt[0]["content"]
    assert parts[:2] == [{"type": "text", "text": "look: "}, {"type": "image", "image": str(tmp_path / "a.png")}]
    assert parts[2]["text"].startswith("xxx") and parts[2]["text"].endswith("tokens cut ...]")
    assert tasks[0].prompt[0]["content"][2]["text"] == "x" * 200  # type: ignore[index]


@settings(max_examples=60, deadline=None)
@given(
    text=st.text(alphabet=st.sampled_from("ab 12é😀<|im_end|>\n"), min_size=1, max_size=120),
    room=st.integers(30, 110),
    side=st.sampled_from(["left", "right", "middle"]),
)
def test_whatever_is_cut_fits_and_is_made_of_the_text(renderer: ChatRenderer, text: str, room: int, side: Any) -> None:
    prompt: list[Message] = [{"role": "system", "content": "s"}, {"role": "user", "content": text}]
    if len(renderer.start(prompt)) <= room:
        return
    cut = cut_prompt(prompt, renderer, None, room, side)
    if cut is None:
        return
    assert len(renderer.start(cut.applied(prompt))) <= room
    before, _, rest = cut.text.partition("[... ")
    after = rest.partition(" tokens cut ...]")[2]
    before, after = before.removesuffix("\n"), after.removeprefix("\n")
    assert text.startswith(before) and text.endswith(after) and len(before) + len(after) < len(text)


def test_a_prompt_that_cannot_be_rendered_is_named(tmp_path: Path, renderer: ChatRenderer) -> None:
    tasks = tasks_of(tmp_path, user("1"), user("<image>", images=["a.png"]))
    with pytest.raises(
        ModelError, match=r"data\.train: .*a.jsonl, row 1 \(line 2\): column 'prompt': .* does not accept images"
    ):
        check(tasks, renderer)


def test_a_failure_of_any_kind_while_rendering_names_the_row(tmp_path: Path, renderer: ChatRenderer) -> None:
    class Fails:
        tokenizer = None

        def start(self, *_: Any) -> list[int]:
            raise ZeroDivisionError("in the template")

    with pytest.raises(
        DataError, match=r"a.jsonl, row 0 \(line 1\): column 'prompt' cannot be rendered: ZeroDivisionError"
    ):
        check(tasks_of(tmp_path, user("1")), Fails())  # type: ignore[arg-type]


def test_prompts_over_the_models_context_are_found(tmp_path: Path, renderer: ChatRenderer) -> None:
    """The first prompt and one sampled token have to fit, whatever data.max_prompt_tokens allows."""
    tasks = tasks_of(tmp_path, user("1"), user("1" * 50))
    length = len(renderer.start(tasks[1].prompt))
    assert len(check(tasks, renderer, context=length + 1).tasks) == 2
    found = check(tasks, renderer, context=length)
    assert found.dropped == 1 and f"the model's context of {length} tokens" in found.limit.name
    with pytest.raises(
        DataError, match=rf"row 1 \(line 2\): the prompt has {length} tokens, more than the model's context of"
    ):
        check(tasks, renderer, context=length, overlong="error")
    with pytest.raises(DataError, match="every prompt is longer than the model's context of 5 tokens"):
        check(tasks, renderer, context=5)
    cut = check(tasks, renderer, context=length, overlong="right")
    assert cut.cut == 1 and len(renderer.start(cut.tasks[1].prompt)) < length
    assert check(tasks, renderer, limit=length, context=9999).limit.name == f"data.max_prompt_tokens {length}"


def test_real_geometry_problems_in_the_columns_of_their_parquet(tmp_path: Path, shared: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from agentloop.images import image_data, open_image

    folders = sorted(path for path in (shared / "data" / "geometry3k").iterdir() if path.is_dir())
    problems = [json.loads((folder / "data.json").read_text())["problem_text"] for folder in folders]
    rows = [
        {
            "prompt": [{"role": "user", "content": f"<image>{problem}"}],
            "images": [{"bytes": (folder / "img_diagram.png").read_bytes(), "path": folder.name}],
            "reward_model": {"style": "rule", "ground_truth": "x"},
        }
        for folder, problem in zip(folders, problems, strict=True)
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "geo.parquet")
    tasks = load_tasks(str(tmp_path / "geo.parquet"), "data.train", "a")
    assert len(tasks) == len(folders) >= 1
    for task, row in zip(tasks, rows, strict=True):
        first, second = task.prompt[0]["content"]
        assert first["image"]["bytes"] == row["images"][0]["bytes"]  # type: ignore[index]
        assert second["text"] and open_image(first["image"]).width > 10 and image_data(first["image"])  # type: ignore[index]


def test_rows_with_a_broken_image_stay_and_are_counted(tmp_path: Path, renderer: ChatRenderer) -> None:
    """Their episodes fail alone; a run of which no image can be read does not start."""
    from agentloop.errors import ImageError

    class Reads:
        tokenizer = renderer.tokenizer

        def start(self, messages: Any, tools: Any = None) -> list[int]:
            if "bad" in str(messages):
                raise ImageError("cannot read an image: bad.png")
            return [1, 2, 3]

    tasks = tasks_of(tmp_path, user("<image>", images=["good.png"]), user("<image>", images=["bad.png"]))
    found = check(tasks, Reads())
    assert len(found.tasks) == 2 and found.unreadable == 1 and "row 1 (line 2)" in str(found.first_unreadable)
    with pytest.raises(ImageError, match=r"none of the 1 rows .*bad\.png"):
        check(tasks_of(tmp_path, user("<image>", images=["bad.png"])), Reads())
