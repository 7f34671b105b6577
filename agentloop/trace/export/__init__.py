"""Export: episodes of a run in the forms that other programs read.

`selection.py` chooses episodes by what the store's cheap columns say of them. `turns.py` finds the
messages that the model sampled. Each form is one module, pure functions from an episode (its
trajectories, the main one last) to JSON data: `rows.py` (`jsonl`, `messages`, `sft`), `atif.py`
(the agent trajectory interchange format). `writing.py` writes them, whole or not at all.
"""

from agentloop.trace.export.atif import atif_document
from agentloop.trace.export.rows import Skipped, message_row, record_rows, sft_row
from agentloop.trace.export.selection import Selection
from agentloop.trace.export.writing import FORMATS, ExportRun, export

__all__ = [
    "FORMATS",
    "ExportRun",
    "Selection",
    "Skipped",
    "atif_document",
    "export",
    "message_row",
    "record_rows",
    "sft_row",
]
