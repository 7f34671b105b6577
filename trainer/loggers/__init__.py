"""Metric loggers beside the console and `metrics.jsonl`: tensorboard, wandb, mlflow, trackio.

A run's metrics come in, one step at a time, and go to a service or to files. `threads.py` runs each
logger in its own thread, so that a slow service never delays an episode. `base.py` defines the two
methods of a logger; each other file is one logger. A logger is a class registered in the
entry-point group `agentloop.loggers`; its library is imported in the logger's thread.
"""

from trainer.loggers.base import LoggerRun, MetricLogger
from trainer.loggers.threads import Loggers, check_loggers

__all__ = ["LoggerRun", "Loggers", "MetricLogger", "check_loggers"]
