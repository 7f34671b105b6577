"""What a template takes: contents as text or as parts, system messages or none, and a file that is a
template at all.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agentloop.chat import ChatRenderer, load_tokenizer
from agentloop.chat.proof.conversations import TOOLS
from agentloop.chat.proof.proof import Verdict, prove
from agentloop.chat.template import Template, read_template
from agentloop.errors import ModelError
from agentloop.types import Message

OWN = Path(__file__).parent / "templates"
USER: Message = {"role": "user", "content": "Why?"}
SYSTEM: Message = {"role": "system", "content": "Be brief."}
RESULT: Message = {"role": "tool", "name": "look_up", "content": "408"}
PARTS = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PARTS_FOR_USERS = CHATML.replace(
    "+ m.content +",
    "+ (m.content if m.role != 'user' else (m.content | selectattr('type', 'equalto', 'text') | first).text) +",
)
PRINTS_PARTS = CHATML.replace("+ m.content +", "~ m.content ~")


@pytest.fixture
def own(quickstart_model: Path) -> Callable[..., ChatRenderer]:
    """Makes the renderer of one of our own templates, or of a template as text."""

    def make(template: str, **options: Any) -> ChatRenderer:
        path = OWN / f"{template}.jinja"
        text = path.read_text(encoding="utf-8") if len(template) < 40 and path.is_file() else template
        tokenizer = load_tokenizer(str(quickstart_model))
        tokenizer.add_tokens(["<start_of_turn>", "<end_of_turn>", "<tool_call>", "</tool_call>"], special_tokens=True)
        return ChatRenderer(tokenizer, chat_template=text, **options)

    return make


def test_a_template_that_takes_only_parts_gets_text_as_one_part(own: Callable[..., ChatRenderer]) -> None:
    renderer = own("parts_only")
    renderer.check(TOOLS)
    text = renderer.decode(renderer.start([SYSTEM, USER]))
    assert "system\nBe brief.<|im_end|>" in text and "user\nWhy?<|im_end|>" in text
    assert "tool\n408<|im_end|>" in renderer.decode(renderer.extend([], "length", [RESULT], TOOLS))
    assert (renderer.tool_format.name, renderer.unread_call) == ("hermes", None)
    proof = prove(renderer, TOOLS, count=30)
    proof.require(tools=True, users=True, system=True)
    assert proof.verdict is Verdict.EXACT


@pytest.mark.parametrize("template", [PARTS_FOR_USERS, CHATML, PRINTS_PARTS, "parts_only", "no_tool_role"])
def test_text_and_parts_are_written_alike(own: Callable[..., ChatRenderer], template: str) -> None:
    renderer = own(template)
    for role in ("user", "assistant", "system"):
        start: list[Any] = [USER] if role == "assistant" else []
        text = renderer.template.render([*start, {"role": role, "content": "one "}], None, generate=False)
        parts = renderer.template.render([*start, {"role": role, "content": PARTS[:1]}], None, generate=False)
        assert text == parts and f"{role}\none <|im_end|>" in text
    if template is not PARTS_FOR_USERS:  # it shows the first part alone
        assert "one two<|im_end|>" in renderer.decode(renderer.start([{"role": "user", "content": PARTS}]))


@pytest.mark.parametrize("name", ["mistral_v3", "deepseek_v3_1"])
def test_parts_of_a_result_are_joined_although_the_template_wants_more_of_its_call(
    quickstart_model: Path, name: str
) -> None:
    tokenizer = load_tokenizer(str(quickstart_model))
    template = Template(tokenizer, (OWN / f"{name}.jinja").read_text(encoding="utf-8"), {})
    call = {"id": "abcd00000", "type": "function", "function": {"name": "look_up", "arguments": {}}}
    result: Any = {**RESULT, "tool_call_id": "abcd00000", "content": PARTS}
    messages: list[Any] = [USER, {"role": "assistant", "content": "", "tool_calls": [call]}, result]
    assert "one two" in template.render(messages, None, generate=False)


def test_parts_that_become_one_text_spell_no_control_token(own: Callable[..., ChatRenderer]) -> None:
    parts = [{"type": "text", "text": "<|im_"}, {"type": "text", "text": "end|>"}]
    renderer = own(CHATML)
    ids = renderer.start([{"role": "user", "content": parts}])
    assert ids.count(renderer.encoder.added["<|im_end|>"]) == 1
    assert "<|im_end|><|im_end|>" in renderer.decode(ids)


def test_without_a_system_role_the_tools_lead_the_first_user_message(own: Callable[..., ChatRenderer]) -> None:
    renderer = own("no_system_role", tool_role="user")
    renderer.check(TOOLS)
    prompt = renderer.decode(renderer.start([USER], TOOLS))
    assert prompt.startswith("<start_of_turn>user\nYou can use these tools:")
    assert prompt.endswith("\n\nWhy?<end_of_turn>\n<start_of_turn>model\n")
    prompt = renderer.decode(renderer.start([SYSTEM, USER], TOOLS))
    assert prompt.startswith("<start_of_turn>user\nBe brief.\n\nYou can use these tools:")
    added = renderer.decode(renderer.extend([], "length", [RESULT], TOOLS))
    assert added.count("<start_of_turn>user") == 1 and "You can use" not in added
    proof = prove(renderer, TOOLS, count=30)
    proof.require(tools=True, users=True, system=True)
    assert proof.verdict is Verdict.EXACT


def test_tools_lead_a_first_message_of_parts_too(own: Callable[..., ChatRenderer]) -> None:
    prompt = own("no_system_role", tool_role="user").start([{"role": "user", "content": PARTS}], TOOLS)
    assert own("no_system_role").decode(prompt).endswith("\n\none two<end_of_turn>\n<start_of_turn>model\n")


def test_a_template_that_drops_system_messages_gets_the_tools_in_the_users_message(
    own: Callable[..., ChatRenderer],
) -> None:
    template = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    renderer = own(template, tool_role="user")
    assert '"look_up"' in renderer.decode(renderer.start([USER], TOOLS))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        (" \n\t\n", "is empty"),
        ("{# only a comment #}", "renders nothing"),
        ("{% for m in messages %}{% endfor %}", "renders nothing"),
    ],
)
def test_a_template_that_writes_nothing_is_an_error(own: Callable[..., ChatRenderer], text: str, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        own(text)


def test_the_empty_template_of_a_tokenizer_is_an_error(quickstart_model: Path) -> None:
    tokenizer = load_tokenizer(str(quickstart_model))
    tokenizer.chat_template = ""
    with pytest.raises(ModelError, match="the chat template is empty"):
        ChatRenderer(tokenizer)
    tokenizer.chat_template = {"default": CHATML, "tool_use": " "}
    with pytest.raises(ModelError, match="the chat template 'tool_use' is empty"):
        ChatRenderer(tokenizer)
    assert ChatRenderer(tokenizer, chat_template=CHATML).end_of_turn is not None


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "is not an existing file"),
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"\xef\xbb\xbf \n", "is empty"),
        ("{{ 'é' }}".encode("latin-1"), "cannot be read: .*utf-8"),
    ],
)
def test_a_file_that_is_no_template_is_named(tmp_path: Path, content: bytes | None, says: str) -> None:
    path = tmp_path / "my.jinja"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=says) as caught:
        read_template(path, "model.chat_template")
    assert f"model.chat_template {path}" in str(caught.value) and "fix:" in str(caught.value)


def test_a_folder_and_an_unreadable_name_are_no_template(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "x\0y", tmp_path / ("n" * 300)):
        with pytest.raises(ModelError, match=r"is not an existing file|cannot be read"):
            read_template(path, "--chat-template")


def test_the_mark_at_the_start_of_a_file_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "my.jinja"
    path.write_bytes(b"\xef\xbb\xbf" + CHATML.encode())
    assert read_template(path, "model.chat_template") == CHATML
    assert read_template(None, "model.chat_template") is None
