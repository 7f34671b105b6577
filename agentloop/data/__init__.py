"""Turn rows into tasks, and decide the order in which training sees them.

`data.train` of a recipe names rows: files, folders, globs, the hub, functions. `sources` opens them
(`hub` through the `datasets` library) without reading them. `tasks` makes a task from a row:
columns checked, messages read (`messages`), images put in place (`image_columns` says why one has
no image). `overlong` makes and measures every task once before the run, and drops or cuts prompts
that are too long. `order` maps the i-th group to its row.

Rows stay on disk or in Arrow's columns: a task is made when an episode needs it.
"""

from agentloop.data.image_columns import IMAGE_MARK, ImageMarks
from agentloop.data.messages import ROLES, without_nulls
from agentloop.data.order import RowOrder
from agentloop.data.overlong import ValidatedRows, check_tasks
from agentloop.data.sources import open_rows
from agentloop.data.tasks import Tasks, load_tasks, located_part, row_images, with_images
from agentloop.data.writing import write_rows

__all__ = [
    "IMAGE_MARK",
    "ROLES",
    "ImageMarks",
    "RowOrder",
    "Tasks",
    "ValidatedRows",
    "check_tasks",
    "load_tasks",
    "located_part",
    "open_rows",
    "row_images",
    "with_images",
    "without_nulls",
    "write_rows",
]  # fmt: skip
