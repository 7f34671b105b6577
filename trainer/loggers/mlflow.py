"""Logger for MLflow."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping

from trainer.loggers.base import LoggerRun, flat

NOT_IN_NAMES = re.compile(r"[^\w./ :-]")
"""Characters that MLflow refuses in names: `eval/pass@4` becomes `eval/pass_4`."""

PARAMS_AT_ONCE = 100
LONGEST_PARAM = 500


class MlflowLogger:
    """A run of an MLflow experiment.

    A resumed run keeps its id. For steps that are done again, MLflow keeps both values and shows
    the later one as the latest.

    Args:
        experiment: created if it does not exist.
        tracking_uri: server, `sqlite:///file.db`, ...; null: MLFLOW_TRACKING_URI, or the default.
    """

    library = "mlflow"

    def __init__(self, run: LoggerRun, experiment: str = "agentloop", tracking_uri: str | None = None) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric = Metric
        self._client = MlflowClient(tracking_uri=tracking_uri)  # the client may be used from any thread
        self.where = f"experiment {experiment}, run {run.name}"  # an address may hold a password
        self._id = run.remembered.get("id", "")
        if self._id:
            self._client.update_run(self._id, status="RUNNING")
            return

        found = self._client.get_experiment_by_name(experiment)
        number = found.experiment_id if found else self._client.create_experiment(experiment)
        self._id = self._client.create_run(number, run_name=run.name).info.run_id
        run.remember(id=self._id)

        params = [Param(_name(key), str(value)[:LONGEST_PARAM]) for key, value in flat(run.config).items()]
        for begin in range(0, len(params), PARAMS_AT_ONCE):
            self._client.log_batch(self._id, params=params[begin : begin + PARAMS_AT_ONCE])

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(
            self._id, metrics=[self._metric(_name(key), value, now, step) for key, value in metrics.items()]
        )

    def close(self, *, failed: bool) -> None:
        self._client.set_terminated(self._id, status="FAILED" if failed else "FINISHED")


def _name(key: str) -> str:
    return NOT_IN_NAMES.sub("_", key)
