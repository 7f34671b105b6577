"""The token ledger: append-only, the only writer of ids, masks, logprobs and versions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agentloop.columns import Logprobs, LossMask, TokenIds, Versions
from agentloop.episode.law import extend_digest
from agentloop.errors import LawRule, TokenLawError
from agentloop.types import Trajectory, Turn


class TokenLedger:
    """The tokens of one trajectory. It grows with the episode; entries are never changed.

    Example, prompt `a b`, a sampled turn `c d`, an observation `e`:

        token_ids  a     b     c     d     e
        loss_mask  0     0     1     1     0
        logprobs   None  None  -0.2  -0.1  None
        versions   None  None  3     3     None
    """

    __slots__ = ("_digest", "_logprobs", "_mask", "_prompt_length", "_token_ids", "_versions", "turns")

    def __init__(self) -> None:
        self._token_ids = TokenIds()
        self._mask = LossMask()
        self._logprobs = Logprobs()
        self._versions = Versions()
        self._digest = 0
        self._prompt_length = 0
        self.turns: list[Turn] = []

    def __len__(self) -> int:
        return len(self._token_ids)

    @property
    def token_ids(self) -> TokenIds:
        """The trajectory so far: the column itself, which grows with it."""
        return self._token_ids

    @property
    def digest(self) -> int:
        """`law.extend_digest` of the trajectory so far, updated with each append."""
        return self._digest

    @property
    def prompt_length(self) -> int:
        return self._prompt_length

    @property
    def response_length(self) -> int:
        """Tokens after the first prompt."""
        return len(self._token_ids) - self._prompt_length

    def add_prompt(self, ids: Sequence[int]) -> None:
        """Write the first prompt.

        Raises:
            TokenLawError: the prompt is empty, or there is one already.
        """
        if self._token_ids:
            raise TokenLawError("the ledger already has a prompt", rule=LawRule.PROMPT)
        if not ids:
            raise TokenLawError("the prompt is empty", rule=LawRule.EMPTY)
        self._append_unsampled(ids, extend_digest(self._digest, ids))
        self._prompt_length = len(ids)

    def add_observed(self, ids: Sequence[int]) -> None:
        """Append tokens that were not sampled: tool output, user turns, template text."""
        if not self._token_ids:
            raise TokenLawError("an observation needs a prompt before it", rule=LawRule.PROMPT)
        self._append_unsampled(ids, extend_digest(self._digest, ids))

    def add_sampled(self, turn: Turn, ids: Sequence[int], logprobs: Sequence[float], versions: Sequence[int]) -> None:
        """Append a sampled turn with the engine's logprobs and versions; set its span and digest.

        Raises:
            TokenLawError: the three columns differ in length, or there is no prompt.
        """
        if not self._token_ids:
            raise TokenLawError("a sampled turn needs a prompt before it", rule=LawRule.PROMPT)
        if not len(ids) == len(logprobs) == len(versions):
            raise TokenLawError(
                f"{len(ids)} sampled ids have {len(logprobs)} logprobs and {len(versions)} versions",
                "the server must return one logprob and one version per sampled id",
                LawRule.COLUMNS,
            )
        digest = extend_digest(self._digest, ids)

        # Whatever may be refused comes first, and is undone: no column is longer than another.
        start, tokens = len(self._token_ids), len(ids)
        self._token_ids.extend(ids)
        try:
            self._logprobs.extend(logprobs)
        except BaseException:
            self._token_ids.truncate(start)
            raise

        self._mask.extend(1, tokens)
        self._versions.extend(versions)
        turn.start, turn.end = start, start + tokens
        self._digest = turn.sampled_digest = digest
        self.turns.append(turn)

    def copy(self) -> TokenLedger:
        """Return a copy with all tokens masked: sampled tokens train only in the original."""
        other = TokenLedger()
        other._append_unsampled(self._token_ids, self._digest)
        other._prompt_length = len(self._token_ids)
        return other

    def trajectory(self, **fields: Any) -> Trajectory:
        """Return the trajectory so far; the columns are handed over, not copied.

        Args:
            fields: the fields of `Trajectory` that the ledger does not know.
        """
        return Trajectory(
            token_ids=self._token_ids,
            loss_mask=self._mask,
            logprobs=self._logprobs,
            versions=self._versions,
            prompt_length=self._prompt_length,
            turns=self.turns,
            **fields,
        )

    def _append_unsampled(self, ids: Sequence[int], digest: int) -> None:
        self._token_ids.extend(ids)
        self._mask.extend(0, len(ids))
        self._logprobs.extend_none(len(ids))
        self._versions.extend_run(None, len(ids))
        self._digest = digest
