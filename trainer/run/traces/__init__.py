"""What a run does with the episodes of a step beside training on them, while the next step runs.

`writing.py` writes them into the run directory (`agentloop.trace.store`), `signals.py` says what
looks wrong in them (`agentloop.trace.signals`).
"""

from trainer.run.traces.signals import RunSignals
from trainer.run.traces.writing import RunTraces

__all__ = ["RunSignals", "RunTraces"]
