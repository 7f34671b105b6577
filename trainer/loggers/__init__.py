"""Where a run's numbers go beside the console and `metrics.jsonl`: tensorboard, wandb, mlflow, trackio, or your own.

A logger is a class registered in the entry-point group `agentloop.loggers`. Its library is imported when it is made, in
a thread of its own, where it also writes: nothing that it waits for holds up an episode.
"""

from trainer.loggers.base import LoggerRun, MetricLogger
from trainer.loggers.threads import Loggers, check_loggers

__all__ = ["LoggerRun", "Loggers", "MetricLogger", "check_loggers"]
