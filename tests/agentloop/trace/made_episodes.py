"""Records of made-up episodes, with the spans that a tool agent would have."""

from __future__ import annotations

from agentloop.trace.record import TraceRecord
from agentloop.trace.spans import Recorder
from agentloop.types import EpisodeStatus, StopReason, ToolCall, Trajectory, Turn


def record(
    step: int = 1, group: str = "g0", sample: int = 0, *, split: str = "train", text: str = "408"
) -> TraceRecord:
    """An episode of two turns with one call between them."""
    recorder = Recorder()
    call = ToolCall("calculator", {"expression": "12 * 34"}, "call_0_0")
    with recorder:
        for request in ("r0", "r1"):
            with recorder.span("turn", None, request_id=request):
                with recorder.span("generate", None, request_id=request):
                    pass
                with recorder.span("parse"):
                    pass
            if request == "r0":
                with recorder.span("tool", None, tool="calculator", call_id="call_0_0"):
                    pass
        with recorder.span("reward", None, reward="reward", score=1.0):
            pass
    trajectory = Trajectory(
        token_ids=list(range(20)),
        loss_mask=[0] * 5 + [1] * 6 + [0] * 4 + [1] * 5,
        logprobs=[None] * 5 + [-0.5] * 6 + [None] * 4 + [-0.5] * 5,
        versions=[None] * 5 + [3] * 6 + [None] * 4 + [3] * 5,
        prompt_length=5,
        turns=[
            Turn(5, 11, "", StopReason.STOP, [call], request_id="r0", order=0),
            Turn(15, 20, text, StopReason.STOP, request_id="r1", order=1),
        ],
        reward=1.0,
        reward_parts={"format": 0.5},
        answer="408",
        agent_name="tool_agent",
        task_id=f"task {group}",
        group_id=group,
        sample_index=sample,
        messages=[
            {"role": "system", "content": "Answer."},
            {"role": "user", "content": "What is 12 * 34?"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {"type": "function", "id": call.id, "function": {"name": call.name, "arguments": call.arguments}}
                ],
            },
            {"role": "tool", "name": "calculator", "tool_call_id": call.id, "content": "408"},
            {"role": "assistant", "content": text, "reasoning_content": "easy"},
        ],
        status=EpisodeStatus.OK,
        trace_id=recorder.trace_id,
        spans=recorder.finish(),
    )
    return TraceRecord(step, split, step - 1, 0, 1, trajectory)


def step_of(step: int, groups: int, samples: int = 2) -> list[TraceRecord]:
    """The records of a step, group by group."""
    return [record(step, f"{step}-{group}", sample) for group in range(groups) for sample in range(samples)]
