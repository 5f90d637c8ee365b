"""MLflow (https://mlflow.org/docs/latest/ml/tracking): a tracking server, or a database in the run's folder."""

from __future__ import annotations

import logging
import math
import os
import re
import shlex
import time
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from deepseek_v3.utils.redaction import redact
from deepseek_v3.utils.trackers.tracker import RemoteRun, Scalars, Status, TrackedRun, Tracker

_STATUSES = {Status.FINISHED: "FINISHED", Status.STOPPED: "KILLED", Status.FAILED: "FAILED"}
# Limits of MLflow's REST API.
_MOST_METRICS, _MOST_PARAMETERS, _LONGEST_VALUE, _LONGEST_NAME = 1000, 100, 6000, 250
_Item = TypeVar("_Item")


class MlflowTracker(Tracker):
    """Logs to the server of MLFLOW_TRACKING_URI; without it, to `mlflow/mlflow.db` in the run's folder.

    A project is an experiment. MLFLOW_EXPERIMENT_NAME, MLFLOW_EXPERIMENT_ID and MLFLOW_RUN_ID choose it and the
    run, unless the config does. Steps that are run again appear twice. Infinity is logged as NaN, because databases
    store another number for it.
    """

    _client: Any
    _run_id: str

    def start(self, run: TrackedRun) -> RemoteRun:
        """Starts or continues a run, and logs the config as its parameters."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read on import
        import mlflow
        from mlflow.tracking import MlflowClient

        if "MLFLOW_LOGGING_LEVEL" not in os.environ:
            logging.getLogger("mlflow").setLevel(logging.WARNING)
        is_local = not mlflow.is_tracking_uri_set()
        uri = _local_store(run) if is_local else mlflow.get_tracking_uri()
        self._client = MlflowClient(tracking_uri=uri)
        experiment = self._experiment(run, is_local)
        previous = run.previous_in(experiment.name)
        found = self._find(previous.id if previous else os.environ.get("MLFLOW_RUN_ID"))
        if found is None:
            found = self._client.create_run(experiment.experiment_id, run_name=run.name_or("MLFLOW_RUN_NAME"))
        else:
            self._client.update_run(found.info.run_id, status="RUNNING")
        self._run_id = found.info.run_id
        self._log_parameters(run, set(found.data.params))
        return RemoteRun(
            id=self._run_id,
            project=experiment.name,
            name=found.info.run_name or run.default_name,
            place=_place(uri, experiment.experiment_id, self._run_id),
            continued=previous is not None and self._run_id == previous.id,
        )

    def log_scalars(self, step: int, scalars: Scalars) -> None:
        """Logs values of a step with the present time."""
        from mlflow.entities import Metric

        now = time.time_ns() // 1_000_000
        metrics = [
            Metric(_name(name), math.nan if math.isinf(value) else float(value), now, step)
            for name, value in scalars.items()
        ]
        for part in _parts(metrics, _MOST_METRICS):
            self._client.log_batch(self._run_id, metrics=part)

    def log_text(self, step: int, name: str, text: str) -> None:
        """Logs a text as an artifact of its own."""
        self._client.log_text(self._run_id, text, f"{_name(name)}/step_{step:09d}.txt")

    def finish(self, status: Status) -> None:
        """Sets the status of the run."""
        self._client.set_terminated(self._run_id, _STATUSES[status])

    def _experiment(self, run: TrackedRun, is_local: bool) -> Any:
        """The experiment of the project, which is created if it does not exist."""
        chosen = os.environ.get("MLFLOW_EXPERIMENT_ID")
        if chosen and run.project is None:
            return self._client.get_experiment(chosen)
        name = run.project_or("MLFLOW_EXPERIMENT_NAME")
        found = self._client.get_experiment_by_name(name)
        if found is None:
            artifacts = (run.folder / "mlflow" / "artifacts").as_uri() if is_local else None
            found = self._client.get_experiment(self._client.create_experiment(name, artifacts))
        return found

    def _find(self, run_id: str | None) -> Any:
        """The run of an id; None without an id, or if the store has no such run."""
        from mlflow.exceptions import MlflowException

        if run_id is None:
            return None
        try:
            found = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return found if found.info.lifecycle_stage == "active" else None

    def _log_parameters(self, run: TrackedRun, known: set[str]) -> None:
        """Logs the fields of the config, except those that the run has: MLflow refuses to change a parameter."""
        from mlflow.entities import Param

        values = {_name(name): str(value)[:_LONGEST_VALUE] for name, value in run.config.items()}
        new = [Param(name, value) for name, value in values.items() if name not in known]
        for part in _parts(new, _MOST_PARAMETERS):
            self._client.log_batch(self._run_id, params=part)


def _local_store(run: TrackedRun) -> str:
    folder = run.folder / "mlflow"
    folder.mkdir(exist_ok=True)
    return f"sqlite:///{folder / 'mlflow.db'}"


def _name(name: str) -> str:
    """The name with `_` for every character that MLflow refuses."""
    return re.sub(r"[^\w\-. /:]", "_", name, flags=re.ASCII)[:_LONGEST_NAME]


def _parts(items: Sequence[_Item], size: int) -> Iterator[Sequence[_Item]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _place(uri: str, experiment_id: str, run_id: str) -> str:
    if uri.startswith(("http://", "https://")):
        return redact(f"{uri.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}")
    return redact(f"open it with: mlflow ui --backend-store-uri {shlex.quote(uri)}")
