"""The proof of a template: its verdicts on real templates, and that it finds planted faults."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentloop.chat import ChatRenderer, load_tokenizer
from agentloop.chat.proof.conversations import TOOLS
from agentloop.chat.proof.proof import Verdict, prove
from agentloop.errors import ModelError
from agentloop.types import Message

Renderers = Callable[..., ChatRenderer]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("name", "verdict"),
    [
        ("gemma3", Verdict.EXACT),
        ("glm4moe", Verdict.KEPT),
        ("gptoss", Verdict.KEPT),
        ("llama3_1", Verdict.EXACT),
        ("phi3_5", Verdict.EXACT),
        ("qwen2_5", Verdict.EXACT),
        ("qwen2_5_vl", Verdict.EXACT),
        ("qwen3", Verdict.KEPT),
        ("qwen3_instruct_2507", Verdict.EXACT),
        ("qwen3_vl", Verdict.EXACT),
    ],
)
def test_what_the_proof_finds_of_real_templates(renderer_of: Renderers, name: str, verdict: Verdict) -> None:
    proof = prove(renderer_of(name), count=60)
    assert (proof.verdict, proof.reason, proof.conversations) == (verdict, "", 60)
    assert proof.turns > 100
    assert bool(proof.differences) == (verdict is Verdict.KEPT)
    assert {piece.author for piece in proof.example} == {"prompt", "model", "template"}


OWN = Path(__file__).parents[1] / "templates"
OWN_VERDICTS = {
    "alternation": Verdict.EXACT,
    "apertus": Verdict.EXACT,
    "chatml_no_newline": Verdict.EXACT,
    "cohere_command": Verdict.REFUSED,
    "deepseek_r1": Verdict.KEPT,
    "deepseek_v3": Verdict.EXACT,
    "deepseek_v3_1": Verdict.EXACT,
    "deepseek_v3_2": Verdict.EXACT,
    "gemma4": Verdict.EXACT,
    "granite_3": Verdict.EXACT,
    "hunyuan_hy3": Verdict.EXACT,
    "kimi_k2": Verdict.EXACT,
    "lfm2": Verdict.EXACT,
    "llama2": Verdict.EXACT,
    "magistral": Verdict.EXACT,
    "minimax_m2": Verdict.EXACT,
    "mistral_v11": Verdict.EXACT,
    "mistral_v3": Verdict.EXACT,
    "no_system_role": Verdict.EXACT,
    "no_tool_role": Verdict.EXACT,
    "other_generation_prompt": Verdict.KEPT,
    "parts_only": Verdict.EXACT,
    "phi4_mini": Verdict.EXACT,
    "qwen3_coder": Verdict.EXACT,
    "qwen3_thinking": Verdict.KEPT,
    "seed_oss": Verdict.EXACT,
    "step3": Verdict.EXACT,
    "xlam": Verdict.EXACT,
}


@pytest.mark.parametrize("name", [path.stem for path in sorted(OWN.glob("*.jinja"))])
def test_what_the_proof_finds_of_the_structures_of_other_families(quickstart_model: Path, name: str) -> None:
    template = (OWN / f"{name}.jinja").read_text(encoding="utf-8")
    listed = re.match(r"\{#- control tokens: (.*?) #\}", template)
    assert listed is not None
    tokenizer = load_tokenizer(str(quickstart_model))
    tokenizer.add_tokens(listed[1].split(), special_tokens=True)
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    proof = prove(ChatRenderer(tokenizer, chat_template=template), count=60)
    assert (proof.verdict, proof.conversations) == (OWN_VERDICTS[name], 60 * (proof.verdict is not Verdict.REFUSED))
    # It numbers results over the whole conversation, so a continuation cannot be rendered alone.
    assert ("it may count calls" in proof.reason) == (name == "cohere_command")


class Broken(ChatRenderer):
    """A renderer with a planted fault."""

    fault = ""

    def extend(
        self, token_ids: Sequence[int], stop_reason: Any, messages: Sequence[Message], tools: Any = None
    ) -> list[int]:
        ids = super().extend(token_ids, stop_reason, messages, tools)
        if self.fault == "separator":  # the newline after <|im_end|> is lost
            newline = self.encoder.encode("\n")[0]
            return ids[1:] if ids[0] == newline else ids
        if self.fault == "content" and len(messages) > 1:  # results are in another order
            return super().extend(token_ids, stop_reason, messages[::-1], tools)
        if self.fault == "controls":  # contents are encoded like the template's own text
            return self.encoder.encode(self.decode(ids))
        if self.fault == "repeat":  # a part of the history is appended again
            return [*super().start([{"role": "user", "content": "x"}]), *ids]
        return ids

    def start(self, messages: Sequence[Message], tools: Any = None) -> list[int]:
        return super().start(messages, None if self.fault == "schemas" else tools)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("separator", "the ids appended after a turn do not join it"),
        ("content", "the ids appended after a turn differ"),
        ("controls", "text in a content became a control token|the ids appended after a turn differ"),
        ("repeat", "the ids appended after a turn|later rewrites"),
        ("schemas", "the first prompt differs from"),
    ],
)
def test_planted_faults_are_found(renderer_of: Renderers, fault: str, reason: str) -> None:
    good = renderer_of("qwen2_5")
    broken = Broken(good.tokenizer, chat_template=good.template.text)
    broken.fault = fault
    proof = prove(broken, count=60)
    assert proof.verdict is Verdict.REFUSED
    with pytest.raises(ModelError, match=reason):
        proof.require()


TEMPLATES_THAT_BREAK_THE_LAW = {
    # every turn contains the number of messages
    "counts": CHATML.replace("m.role + '\\n'", "m.role + ' of ' ~ (messages | length) ~ '\\n'"),
    # the system message is shown only with the last message
    "moves the tools": "{% if tools %}{{ tools | length }}{% endif %}"
    + CHATML.replace(
        "{{ '<|im_start|>'", "{% if loop.last and m.role == 'user' %}{{ tools | tojson }}{% endif %}{{ '<|im_start|>'"
    ),
    # results are numbered through the conversation
    "numbers results": CHATML.replace(
        "+ m.content", "+ (m.content if m.role != 'tool' else loop.index ~ m.content) + (loop.index ~ '')"
    ),
}


@pytest.mark.parametrize("name", sorted(TEMPLATES_THAT_BREAK_THE_LAW))
def test_a_template_that_cannot_only_append_is_refused(renderer_of: Renderers, name: str) -> None:
    tokenizer = renderer_of("qwen2_5").tokenizer
    proof = prove(ChatRenderer(tokenizer, chat_template=TEMPLATES_THAT_BREAK_THE_LAW[name]), TOOLS, count=30)
    with pytest.raises(ModelError, match=r"changes earlier turns|depends on the turns before"):
        proof.require(tools=True, users=True)


def test_a_run_is_refused_for_what_it_needs_alone(renderer_of: Renderers) -> None:
    proof = prove(renderer_of("phi3_5"), count=20)
    proof.require(users=True, system=True)
    with pytest.raises(ModelError, match=r"the run needs tool results: .*leaves out a message of role tool") as refused:
        proof.require(tools=True)
    assert "model.tool_role" in str(refused.value)


def test_a_system_message_that_moves_is_refused_where_there_is_one(renderer_of: Renderers) -> None:
    template = CHATML.replace(
        "{% for m in messages %}", "{% set s = messages[0] %}{% for m in messages[first:] %}"
    ).replace("+ m.content", "+ (s.content if first and loop.last else '') + m.content")
    template = "{% set first = 1 if messages[0].role == 'system' else 0 %}" + template
    renderer = ChatRenderer(renderer_of("qwen2_5").tokenizer, chat_template=template)
    proof = prove(renderer, count=20)
    assert proof.verdict is Verdict.EXACT
    with pytest.raises(ModelError, match=r"system messages: .*moves them"):
        proof.require(system=True)
    user: Message = {"role": "user", "content": "x"}
    ids = renderer.start([user])
    renderer.extend(ids, "length", [user])
    ids = renderer.start([{"role": "system", "content": "Obey."}, user])
    with pytest.raises(ModelError, match="changes the system message"):
        renderer.extend(ids, "length", [user])


def test_the_proof_says_what_is_left_out(renderer_of: Renderers) -> None:
    missing = prove(renderer_of("qwen2_5_vl"), count=10).abilities.missing
    assert "describe the tools" in missing["tool schemas"] and "tool calls" in missing


def test_variables_of_the_template_reach_it(renderer_of: Renderers) -> None:
    renderer = renderer_of("qwen3", chat_template_kwargs={"enable_thinking": False})
    assert renderer.decode(renderer.start([{"role": "user", "content": "x"}])).endswith("<think>\n\n</think>\n\n")
    proof = prove(renderer, count=60)
    assert (proof.verdict, proof.reason) == (Verdict.KEPT, "")
    assert "closes it before" in proof.abilities.missing["reasoning"]


WORDS = st.text("ab:#[] \n", max_size=4)
# Things a template may do that cannot be appended; `{}` is the place in the wrapping of a message.
UNLAWFUL = (
    "{{ messages | length }}",
    "{{ loop.index0 }}",
    "{{ 'last' if loop.last }}{{ 'more' if not loop.last }}",
    "{{ messages | selectattr('role', 'equalto', 'assistant') | list | length }}",
)


@given(
    head=WORDS,
    before=st.fixed_dictionaries({role: WORDS for role in ("system", "user", "assistant", "tool")}),
    behind=WORDS,
    prompt=WORDS,
    unlawful=st.sampled_from(["", *UNLAWFUL]),
)
@settings(max_examples=40, deadline=None)
def test_a_template_is_accepted_exactly_if_it_only_appends(
    renderer_of: Renderers, head: str, before: dict[str, str], behind: str, prompt: str, unlawful: str
) -> None:
    """Rule 6 over random templates: random wrappings, with or without a part that depends on other
    turns.
    """
    opening = "<|im_start|>" + before["assistant"] + prompt
    wrapping = {role: f"<|im_start|>{text}" for role, text in before.items()} | {"assistant": opening}
    template = (
        f"{head}{{% set wrapping = {wrapping!r} %}}{{% for m in messages %}}{{{{ wrapping[m.role] }}}}{unlawful}"
        f"{{{{ m.content }}}}<|im_end|>{{{{ {behind!r} }}}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {opening!r} }}}}{{% endif %}}"
    )
    proof = prove(ChatRenderer(renderer_of("qwen2_5").tokenizer, chat_template=template), count=8)
    assert (proof.verdict is Verdict.REFUSED) == bool(unlawful), (proof.verdict, proof.reason)
