"""The columns of a trace file, one row a trajectory.

`docs/traces.md` has the same table for readers without our code.
"""

from __future__ import annotations

import pyarrow as pa

FORMAT = 1
"""Version of the columns; raised by one with each incompatible change."""

METADATA_KEY = b"agentloop"
"""Key of the file's metadata: a JSON object with `format` and what was left out."""

_LIST_I32, _LIST_F32, _LIST_F64 = (pa.list_(pa.field("element", kind())) for kind in (pa.int32, pa.float32, pa.float64))
_NUMBERS = pa.map_(pa.string(), pa.float64())
_SPANS = pa.list_(pa.field("element", pa.struct([("start", pa.int32()), ("end", pa.int32()), ("version", pa.int64())])))

SCHEMA = pa.schema(
    [
        # what a record knows
        ("step", pa.int32()),
        ("split", pa.string()),
        ("version", pa.int64()),
        ("part", pa.int32()),
        ("parts", pa.int32()),
        ("row", pa.int64()),
        # the episode
        ("trace_id", pa.string()),
        ("group_id", pa.string()),
        ("sample_index", pa.int64()),
        ("task_id", pa.string()),
        ("agent_name", pa.string()),
        ("data_source", pa.string()),
        ("status", pa.string()),
        ("stop_reason", pa.string()),
        ("reward", pa.float64()),
        ("reward_parts", _NUMBERS),
        ("outcome", pa.float64()),
        ("answer", pa.string()),
        ("error", pa.string()),
        ("broken_rule", pa.string()),
        ("metrics", _NUMBERS),
        # counts, derived: cheap to filter by
        ("length", pa.int64()),
        ("prompt_length", pa.int64()),
        ("sampled", pa.int64()),
        ("turn_count", pa.int32()),
        ("tool_calls", pa.int32()),
        ("malformed_calls", pa.int32()),
        ("min_version", pa.int64()),
        ("max_version", pa.int64()),
        # tokens
        ("token_ids", _LIST_I32),
        ("sampled_spans", _SPANS),
        ("logprobs", _LIST_F32),
        ("logprobs64", _LIST_F64),
        ("trainer_logprobs", _LIST_F32),
        ("advantages", _LIST_F32),
        # JSON texts
        ("messages", pa.string()),
        ("turns", pa.string()),
        ("step_rewards", pa.string()),
        ("faults", pa.string()),
        ("spans", pa.string()),
        ("images", pa.list_(pa.field("element", pa.string()))),
        ("other", pa.string()),
    ]
)

CHEAP = (
    "step", "split", "version", "part", "parts", "row", "trace_id", "group_id", "sample_index", "task_id", "agent_name",
    "data_source", "status", "stop_reason", "reward", "reward_parts", "outcome", "answer", "error", "broken_rule",
    "metrics", "length", "prompt_length", "sampled", "turn_count", "tool_calls", "malformed_calls", "min_version",
    "max_version",
)  # fmt: skip
"""Columns without tokens and long texts: reading them costs about 100 bytes a trajectory."""

KEY = ("step", "split", "group_id", "sample_index", "part")

DICTIONARY = ("split", "group_id", "task_id", "agent_name", "data_source", "status", "stop_reason")
"""Columns with few values."""

STATISTICS = ("step", "version", "row", "sample_index", "reward", "length", "status", "task_id", "group_id")
"""Columns whose smallest and largest values are kept, so that other programs can skip row groups.
Of texts and tokens they would only fill the end of the file."""

SPLIT_BYTES = (
    "token_ids.list.element", "logprobs.list.element", "logprobs64.list.element", "trainer_logprobs.list.element",
    "advantages.list.element",
)  # fmt: skip
"""Columns whose values are stored byte by byte (BYTE_STREAM_SPLIT): the high bytes of ids and the
exponents of logprobs compress, their low bytes do not."""
