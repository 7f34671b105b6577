"""The tables of an index."""

from __future__ import annotations

INDEX_FORMAT = 2
"""Version of the tables; an index of another version is rebuilt."""

EPISODE_COLUMNS = (
    "file", "class", "step", "split", "version", "dataset_row", "group_id", "sample_index", "part", "parts", "task_id",
    "agent_name", "data_source", "status", "stop_reason", "reward", "outcome", "staleness", "turns", "tool_calls",
    "malformed_calls", "tool_errors", "length", "prompt_length", "sampled", "mismatch", "advantage", "latency_s",
    "broken_rule", "cause",
)  # fmt: skip
"""Columns to filter and sort by, one row an episode."""

TEXT_COLUMNS = ("id", "trace_id", "answer", "error", "preview", "reply", "reward_parts")
"""Columns that are only shown: a table of their own, so that a scan of the episodes is short."""

SEARCHED = ("prompt", "answer", "calls", "results", "errors")
"""Columns of the full-text table."""

FACETS = ("split", "status", "stop_reason", "agent_name", "data_source")
"""Columns whose values are counted for a filter's choices. Episodes that agree in all of them are
of one class: counting classes is much cheaper than counting texts."""

SORTED_OFTEN = ("reward", "length", "mismatch", "latency_s")
"""Columns of many values that readers sort by: with an index, all episodes need not be sorted."""

# `words` keeps no text of its own, and sqlite before 3.43 cannot delete its rows. Those of removed
# files stay behind without an episode, and no id is given twice (AUTOINCREMENT).
STATEMENTS = (
    "CREATE TABLE state (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID",
    """CREATE TABLE files (
        id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, step INTEGER NOT NULL, split TEXT NOT NULL,
        size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, episodes INTEGER NOT NULL,
        failed INTEGER NOT NULL, problem TEXT
    )""",
    """CREATE TABLE episodes (
        id INTEGER PRIMARY KEY AUTOINCREMENT, file INTEGER NOT NULL, class INTEGER NOT NULL,
        step INTEGER NOT NULL, split TEXT NOT NULL, version INTEGER, dataset_row INTEGER, group_id TEXT NOT NULL,
        sample_index INTEGER NOT NULL, part INTEGER NOT NULL, parts INTEGER NOT NULL, task_id TEXT NOT NULL,
        agent_name TEXT NOT NULL, data_source TEXT NOT NULL, status TEXT NOT NULL, stop_reason TEXT NOT NULL,
        reward REAL, outcome REAL, staleness INTEGER, turns INTEGER NOT NULL, tool_calls INTEGER NOT NULL,
        malformed_calls INTEGER NOT NULL, tool_errors INTEGER NOT NULL, length INTEGER NOT NULL,
        prompt_length INTEGER NOT NULL, sampled INTEGER NOT NULL, mismatch REAL, advantage REAL, latency_s REAL,
        broken_rule TEXT, cause TEXT
    )""",
    f"CREATE TABLE classes (id INTEGER PRIMARY KEY, {', '.join(FACETS)}, UNIQUE ({', '.join(FACETS)}))",
    """CREATE TABLE texts (
        id INTEGER PRIMARY KEY, trace_id TEXT, answer TEXT, error TEXT, preview TEXT, reply TEXT, reward_parts TEXT
    )""",
    "CREATE INDEX texts_by_trace ON texts (trace_id)",
    "CREATE INDEX episodes_by_file ON episodes (file)",
    "CREATE INDEX episodes_by_group ON episodes (step, split, group_id, sample_index)",
    "CREATE INDEX episodes_by_task ON episodes (task_id, step)",
    "CREATE INDEX episodes_unhealthy ON episodes (status, cause) WHERE status != 'ok'",
    "CREATE INDEX episodes_by_class ON episodes (class)",
    *(f"CREATE INDEX episodes_by_{column} ON episodes ({column})" for column in SORTED_OFTEN),
    f"""CREATE VIRTUAL TABLE words USING fts5(
        {", ".join(SEARCHED)}, content='', tokenize='unicode61 remove_diacritics 2', prefix='3'
    )""",
)
