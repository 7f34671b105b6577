"""Everything that is loaded and checked before a run starts a process.

`inputs.prepare` does it all -> `RunInputs`. `code` is the part that needs no model: agents, tools,
reward, interactions, and the rows that name them.
"""

from trainer.run.preflight.code import RowChecks, RunCode
from trainer.run.preflight.inputs import RunInputs, load_split, prepare

__all__ = ["RowChecks", "RunCode", "RunInputs", "load_split", "prepare"]
