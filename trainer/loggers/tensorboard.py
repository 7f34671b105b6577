"""Logger for TensorBoard. Writes event files without importing torch."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

from trainer.loggers.base import LoggerRun


class TensorboardLogger:
    """Write event files to `<run>/loggers/tensorboard`. View: `tensorboard --logdir outputs`.

    Steps that a resumed run does again are replaced: TensorBoard drops the points after the step
    that the run continues from.

    Args:
        folder: another folder to write to, relative to the working directory.
    """

    library = "tensorboard"

    def __init__(self, run: LoggerRun, folder: str | None = None) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.text.summary import text_pb
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = Event, Summary
        self.where = str(Path(folder) / run.name if folder else run.folder)
        self._writer = EventFileWriter(self.where)

        if run.resumed_at is not None:
            purge = Event(
                wall_time=time.time(), step=run.resumed_at + 1, session_log=SessionLog(status=SessionLog.START)
            )
            self._writer.add_event(purge)
        else:
            text = "".join(f"    {line}\n" for line in json.dumps(run.config, indent=2).splitlines())
            self._writer.add_event(Event(wall_time=time.time(), step=0, summary=text_pb("config", text)))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        values = [self._summary.Value(tag=key, simple_value=value) for key, value in metrics.items()]
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=self._summary(value=values)))
        self._writer.flush()

    def close(self, *, failed: bool) -> None:
        self._writer.close()
