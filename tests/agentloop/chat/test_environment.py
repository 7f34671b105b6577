"""Templates are compiled in their own environment; transformers' cached templates do not change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import _compile_jinja_template

from agentloop.chat import ChatRenderer
from agentloop.chat.environment import compile_template
from agentloop.errors import ModelError

TOOLS: list[dict[str, Any]] = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


def state(compiled: Any) -> dict[str, Any]:
    """Return the parts of a compiled template and its environment in which a change would show."""
    environment = compiled.environment
    return {
        "environment": dict(vars(environment)),
        "filters": dict(environment.filters),
        "tests": dict(environment.tests),
        "globals": dict(environment.globals),
        "extensions": dict(environment.extensions),
        "getattr": environment.getattr.__func__,
        "template globals": compiled.globals,
        "template names": dict(compiled.globals),
        "template": {key: value for key, value in vars(compiled).items() if key != "_module"},
    }


def test_a_renderer_leaves_the_template_that_transformers_caches_untouched(shared: Path, qwen: Any) -> None:
    text = (shared / "chat_templates" / "qwen3.jinja").read_text(encoding="utf-8")
    theirs, empty = _compile_jinja_template(text), _compile_jinja_template("")
    before = state(theirs), state(empty)

    renderer = ChatRenderer(qwen, chat_template=text)
    ids = renderer.start([{"role": "user", "content": "Two and two?"}], TOOLS)
    renderer.extend(
        [*ids, *renderer.turn_ids({"role": "assistant", "content": "4"})],
        "stop",
        [
            {"role": "tool", "name": "add", "content": "4"},
        ],
        TOOLS,
    )

    assert _compile_jinja_template(text) is theirs
    assert (state(theirs), state(empty)) == before
    ours = compile_template(text).environment
    assert ours is not theirs.environment
    assert ours.filters is not theirs.environment.filters
    assert ours.globals is not theirs.environment.globals


def test_the_environment_has_transformers_settings() -> None:
    theirs, ours = _compile_jinja_template("{{ 1 }}").environment, compile_template("{{ 1 }}").environment
    assert type(ours) is type(theirs)
    assert ours.globals.keys() == theirs.globals.keys()
    added = {"agentloop_counted", "agentloop_weighed", "agentloop_sized"}
    assert ours.filters.keys() == theirs.filters.keys() | added
    assert ours.extensions.keys() == theirs.extensions.keys()
    for setting in ("trim_blocks", "lstrip_blocks", "autoescape", "undefined", "sandboxed"):
        assert getattr(ours, setting) == getattr(theirs, setting), setting


def test_the_sandbox_holds() -> None:
    from jinja2.exceptions import SecurityError

    with pytest.raises(SecurityError):
        compile_template("{{ ''.__class__.__mro__ }}").render()
    with pytest.raises(SecurityError):
        compile_template("{{ messages.append(1) }}").render(messages=[])


@pytest.mark.parametrize(
    "text",
    [
        "{% generation %}a{% endgeneration %}b",
        "{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}",
        "{{ value | tojson }} {{ value | tojson(indent=2) }} {{ value.items | string | length > 0 }}",
        "{{ value.a }} {{ value['é'] }} {{ value.keys() | list }} {{ value.missing is defined }}",
        "{{ strftime_now('%Y') }}",
        "{% for i in value.é %}{{ loop.index }} of {{ loop.length }} {{ loop.last }} {{ i ~ '~' ~ 1 }}{% endfor %}",
        "{% for i in value.é if i %}{{ loop.revindex }}{{ loop.nextitem }}{{ i }}{% else %}none{% endfor %}",
        "{% for i in value.é|select %}{{ loop.length }}{% endfor %}{% for k, v in value|items %}{{ k }}{% endfor %}",
        "{% for i in [[1, [2, [3]]]] recursive %}{{ loop(i) if i is sequence else i }}{% endfor %}",
        "{% for i in missing %}{% else %}nothing{% endfor %}",
        "{{ '%03d' % 7 }}{{ 'a' + 'b' }}{{ [1] + [2] }}{{ 'a' * 3 }}{{ 2 ** 3 * 4 % 5 }}{{ 0.5 * 2 }}",
    ],
)
def test_templates_render_as_in_transformers(text: str) -> None:
    value = {"a": "<b>", "é": [1, None, "漢字"], "items": 3}
    assert compile_template(text).render(value=value) == _compile_jinja_template(text).render(value=value)


def test_a_template_that_is_not_jinja_is_refused_with_its_line() -> None:
    with pytest.raises(ModelError, match="not valid Jinja: line 2"):
        compile_template("a\n{% if %}")
