"""`VariantsFormat`: one family of models that writes calls in several ways."""

from __future__ import annotations

from typing import ClassVar

from agentloop.chat.formats.base import BaseFormat, TaggedFormat, Tools
from agentloop.chat.sampled import SampledText
from agentloop.types import ParsedTurn


class VariantsFormat(BaseFormat):
    """A format with several grammars: the one whose opening tag comes first reads the turn.

    Attributes:
        variants: the grammars; of two with the same opening tag the first is taken.
    """

    variants: ClassVar[tuple[TaggedFormat, ...]]

    @property
    def tags(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(tag for variant in self.variants for tag in variant.tags))

    def read(self, turn: SampledText, parsed: ParsedTurn, tools: Tools) -> str:
        found = turn.find_first([variant.opening for variant in self.variants])
        opening = found[1] if found else self.variants[0].opening
        form = next(variant for variant in self.variants if variant.opening == opening)
        return form.read(turn, parsed, tools)
