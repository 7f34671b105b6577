"""`VariantsFormat`: one family of models that writes calls in several ways."""

from __future__ import annotations

from typing import ClassVar

from agentloop.chat.formats.base import BaseFormat, TaggedFormat, Tools
from agentloop.chat.sampled import SampledText
from agentloop.types import ParsedTurn


class VariantsFormat(BaseFormat):
    """A format with several grammars: the one whose opening tag comes first reads the turn.

    If the tokenizer has tokens for the tags of some, the others count at the beginning of a turn
    alone: elsewhere they may be quoted.

    Attributes:
        variants: the grammars, each with another opening tag.
    """

    variants: ClassVar[tuple[TaggedFormat, ...]]

    @property
    def tags(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(tag for variant in self.variants for tag in variant.tags))

    def read(self, turn: SampledText, parsed: ParsedTurn, tools: Tools) -> str:
        known = [form for form in self.variants if turn.knows(form.opening)]
        begun = [form for form in self.variants if turn.at(form.opening, turn.skip_space(0))]
        meant = begun or known or list(self.variants)
        found = turn.find_first([form.opening for form in meant])
        form = next((form for form in meant if found is not None and form.opening == found[1]), meant[0])
        return form.read(turn, parsed, tools)
