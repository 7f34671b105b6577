"""What an episode may use, and the reason why it ends when that is used up. Shared by all of its trajectories."""

from __future__ import annotations

from dataclasses import dataclass

from agentloop.config import AgentConfig
from agentloop.types import StopReason


class EpisodeEnd(Exception):
    """A budget has run out; the runner ends the episode with this reason. Not an error."""

    def __init__(self, reason: StopReason) -> None:
        super().__init__(reason.value)
        self.reason = reason


@dataclass(slots=True)
class Budget:
    """An episode's limits and what it has used of them, forks included.

    Attributes:
        generations: begun so far.
        tokens: sampled so far, and those that running generations may still sample.
        user_turns: observed after the first prompt.
        calls: tool calls that were run.
        calls_refused: the model has been told that `max_calls_per_episode` is used up.
    """

    config: AgentConfig
    context_length: int
    generations: int = 0
    tokens: int = 0
    user_turns: int = 0
    calls: int = 0
    calls_refused: bool = False

    def room(self, length: int, response_length: int) -> tuple[int, StopReason]:
        """Tokens that the next generation may have at most, and the reason to give when it uses them all.

        Args:
            length: of the trajectory that it continues.
            response_length: of that, what stands after the first prompt.

        Raises:
            EpisodeEnd: there may be no further generation.
        """
        config = self.config
        if self.generations >= config.max_assistant_turns:
            raise EpisodeEnd(StopReason.MAX_TURNS)
        room, reason = config.max_response_tokens - response_length, StopReason.LENGTH
        if self.context_length - length < room:
            room, reason = self.context_length - length, StopReason.CONTEXT
        if config.max_episode_tokens is not None and config.max_episode_tokens - self.tokens < room:
            room, reason = config.max_episode_tokens - self.tokens, StopReason.EPISODE_TOKENS
        if room <= 0:
            raise EpisodeEnd(reason)
        return room, reason

    def add_user_turn(self) -> None:
        """Count a turn of the user.

        Raises:
            EpisodeEnd: it would be one more than `max_user_turns`.
        """
        limit = self.config.max_user_turns
        if limit is not None and self.user_turns >= limit:
            raise EpisodeEnd(StopReason.MAX_USER_TURNS)
        self.user_turns += 1

    def admit_calls(self, wanted: int) -> tuple[int, list[str]]:
        """How many of a turn's calls are run, the first ones, and what each of the others is answered.

        Raises:
            EpisodeEnd: the model has been told that the calls are used up, and called again.
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
