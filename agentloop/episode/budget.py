"""The limits of an episode, shared by its trajectories, and the reason for ending at one."""

from __future__ import annotations

from dataclasses import dataclass

from agentloop.config import AgentConfig
from agentloop.types import StopReason


class EpisodeEnd(Exception):
    """A budget is used up; the runner ends the episode with this reason. Not an error."""

    def __init__(self, reason: StopReason) -> None:
        super().__init__(reason.value)
        self.reason = reason


@dataclass(slots=True)
class Budget:
    """The limits of an episode and its usage so far, forks included.

    Attributes:
        generations: started so far.
        tokens: sampled so far, plus those that running generations may still sample.
        user_turns: observed after the first prompt.
        calls: tool calls run so far.
        calls_refused: the model was informed that `max_calls_per_episode` is used up.
    """

    config: AgentConfig
    context_length: int
    generations: int = 0
    tokens: int = 0
    user_turns: int = 0
    calls: int = 0
    calls_refused: bool = False

    def room(self, length: int, response_length: int) -> tuple[int, StopReason]:
        """Return the most tokens of the next generation, and the stop reason if it uses them all.

        Args:
            length: tokens of the trajectory that it continues.
            response_length: those of them after the first prompt.

        Raises:
            EpisodeEnd: no further generation is allowed.
        """
        config = self.config
        if self.generations >= config.max_assistant_turns:
            raise EpisodeEnd(StopReason.MAX_TURNS)

        # The tightest limit gives the reason; on a tie, the first one checked.
        room, reason = config.max_response_tokens - response_length, StopReason.LENGTH
        if self.context_length - length < room:
            room, reason = self.context_length - length, StopReason.CONTEXT
        if config.max_episode_tokens is not None and config.max_episode_tokens - self.tokens < room:
            room, reason = config.max_episode_tokens - self.tokens, StopReason.EPISODE_TOKENS
        if room <= 0:
            raise EpisodeEnd(reason)
        return room, reason

    def add_user_turn(self) -> None:
        """Count one turn of the user.

        Raises:
            EpisodeEnd: it would exceed `max_user_turns`.
        """
        limit = self.config.max_user_turns
        if limit is not None and self.user_turns >= limit:
            raise EpisodeEnd(StopReason.MAX_USER_TURNS)
        self.user_turns += 1

    def admit_calls(self, wanted: int) -> tuple[int, list[str]]:
        """Return how many of a turn's first calls to run, and the answer to each of the others.

        Raises:
            EpisodeEnd: the model called again after the message that the calls are used up.
        """
        if wanted and self.calls_refused:
            raise EpisodeEnd(StopReason.MAX_TOOL_CALLS)

        per_turn, limit = self.config.max_calls_per_turn, self.config.max_calls_per_episode
        allowed = min(wanted, per_turn)
        admitted = allowed if limit is None else min(allowed, limit - self.calls)
        self.calls += admitted
        self.calls_refused = admitted < allowed

        used_up = f"all {limit} tool calls are used up; this one was not run. Answer without a tool"
        too_many = f"only {per_turn} calls are run in one turn; this one was not"
        return admitted, [used_up] * (allowed - admitted) + [too_many] * (wanted - allowed)
