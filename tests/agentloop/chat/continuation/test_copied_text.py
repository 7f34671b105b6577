"""Contents are filled in without rendering only if the template copies them exactly."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentloop.chat import ChatRenderer
from agentloop.chat.continuation.copied_text import COMPARED, MOST_SHAPES, PROBES, SIGHTINGS, TemplateTextCache
from agentloop.types import Message

Renderers = Callable[..., ChatRenderer]
TEMPLATES = [
    *("gemma3", "glm4moe", "gptoss", "llama3_1", "phi3_5"),
    *("qwen2_5", "qwen2_5_vl", "qwen3", "qwen3_instruct_2507", "qwen3_vl"),
]
WITHOUT_TOOLS = {"gemma3", "phi3_5"}


def says(content: str) -> Message:
    return {"role": "user", "content": content}


def warm(cache: TemplateTextCache, render: Callable[[Message], str]) -> None:
    for _ in range(SIGHTINGS):
        cache.fill("shape", says("anything"), render)


@pytest.fixture(scope="module", params=TEMPLATES)
def pair(request: pytest.FixtureRequest, renderer_of: Renderers) -> tuple[ChatRenderer, ChatRenderer]:
    """A renderer that fills contents in, and one that renders all of them."""
    filling, rendering = renderer_of(request.param), renderer_of(request.param)
    rendering._continuations._text_cache.fill = lambda *_: None  # type: ignore[method-assign]
    filling.name = rendering.name = request.param  # type: ignore[attr-defined]
    return filling, rendering


PIECES = ["</think>", "/nothink", "content", "tool", "x", " ", "\n", "{", '"', "é", "12", "text", "json", "\t", "."]


@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=5).map("".join), st.booleans())
@settings(max_examples=60, deadline=None)
def test_what_is_filled_in_is_what_would_be_rendered(
    pair: tuple[ChatRenderer, ChatRenderer], content: str, is_tool: bool
) -> None:
    filling, rendering = pair
    message: Any = says(content)
    if is_tool and filling.name not in WITHOUT_TOOLS:  # type: ignore[attr-defined]
        message = {"role": "tool", "name": "look_up", "tool_call_id": "c00000000", "content": content}
    for number in range(SIGHTINGS):
        filling.extend([], "stop", [{**message, "content": f"warm {number}"}])
    assert filling.extend([], "stop", [message]) == rendering.extend([], "stop", [message])


def test_most_contents_are_filled_in(renderer_of: Renderers) -> None:
    cache = renderer_of("qwen2_5")._continuations._text_cache
    before = cache._filled
    renderer = renderer_of("qwen2_5")
    cache = renderer._continuations._text_cache
    for number in range(10):
        renderer.extend([], "stop", [says(f"The value is {number}.")])
    assert cache._filled == before + 10 - SIGHTINGS + 1


@pytest.mark.parametrize(
    "render",
    [
        lambda m: f"<{m['content'].upper()}>",
        lambda m: f"<{m['content'][:1000]}>",
        lambda m: f"<{m['content']}{m['content']}>",
        lambda m: f"<{m['content'].replace('<', '&lt;')}>",
        lambda m: f"<{' '.join(m['content'].split())}>",
        lambda m: f"<{m['content']}>" if not m["content"].lstrip("-").isdecimal() else "<number>",
        lambda m: f"<{m['content']}>" if m["content"].startswith(("PROBE", "x")) else "<other>",
        lambda m: "<nothing>",
    ],
)
def test_a_template_that_changes_contents_is_not_cached(render: Callable[[Message], str]) -> None:
    cache = TemplateTextCache(frozenset())
    warm(cache, render)
    assert cache.fill("shape", says("anything"), render) is None


@pytest.mark.parametrize("content", ["", " ", " x", "x\n", "a secret", "secretly"])
def test_what_a_template_could_tell_from_others_is_rendered(content: str) -> None:
    def render(message: Message) -> str:
        text = str(message["content"]).strip()
        return f"<{text}>" if "secret" not in text else "<hidden>"

    cache = TemplateTextCache(frozenset({"secret", "\n", ""}))
    warm(cache, render)
    assert cache.fill("shape", says("plain"), render) == "<plain>"
    assert cache.fill("shape", says(content), render) is None


def test_one_in_64_is_compared_and_an_unexpected_text_ends_it() -> None:
    def render(message: Message) -> str:
        return f"<{message['content']}>" if len(message["content"]) != 7 else "<seven>"

    cache = TemplateTextCache(frozenset())
    warm(cache, render)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = [cache.fill("shape", says("sevenly"), render) for _ in range(COMPARED)]
    assert "<seven>" in found and found[-1] in (None, "<seven>")
    assert len(said) == 1 and "looks into contents" in str(said[0].message)
    assert cache.fill("shape", says("other"), render) is None


def test_shapes_that_are_seen_once_cost_nothing_and_are_forgotten() -> None:
    rendered: list[str] = []

    def render(message: Message) -> str:
        rendered.append(str(message["content"]))
        return f"<{message['content']}>"

    cache = TemplateTextCache(frozenset())
    for number in range(3 * MOST_SHAPES):
        assert cache.fill(number, says("x"), render) is None
    assert rendered == [] and len(cache._seen) <= MOST_SHAPES
    warm(cache, render)
    assert len(rendered) == len(PROBES) + 1


def test_the_strings_of_a_template_are_those_it_can_look_for(renderer_of: Renderers) -> None:
    glm = renderer_of("glm4moe").template.strings()
    assert {"/nothink", "</think>"} <= glm
    assert not {"content", "role", "user", "assistant"} & glm
    kept = renderer_of("qwen3", chat_template_kwargs={"enable_thinking": "calm"}).template.strings()
    assert "calm" in kept
