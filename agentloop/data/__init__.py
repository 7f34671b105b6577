"""Rows: from files, the hub or functions to validated tasks that fit, and the order in which training sees them.

Rows stay where they are, on disk or in Arrow's columns: a task is made when an episode needs it.
"""

from agentloop.data.order import RowOrder
from agentloop.data.overlong import ValidatedRows, check_tasks
from agentloop.data.sources import open_rows
from agentloop.data.tasks import IMAGE_MARK, ROLES, Tasks, load_tasks, without_nulls

__all__ = [
    "IMAGE_MARK",
    "ROLES",
    "RowOrder",
    "Tasks",
    "ValidatedRows",
    "check_tasks",
    "load_tasks",
    "open_rows",
    "without_nulls"
]  # fmt: skip
