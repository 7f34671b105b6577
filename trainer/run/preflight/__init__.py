"""Everything that is loaded and checked before a run starts a process.

`inputs.prepare` does it all -> `RunInputs`. `code` checks rows against the agents, tools, reward
and interactions that they name, which needs no model.
"""

from trainer.run.preflight.code import RowChecks
from trainer.run.preflight.inputs import RunInputs, load_split, prepare

__all__ = ["RowChecks", "RunInputs", "load_split", "prepare"]
