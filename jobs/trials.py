"""Trials as runs: their folders, what they tell Ray Tune, and how the sweep records each as a child run in MLflow."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from ray import tune

from dabnn.errors import InvalidInputError
from dabnn.run_folder import RunFolder
from jobs.record import FLUSH_TIMEOUT_S, leave_result, record_best, tell_end, tell_start
from jobs.train import say
from orchestrator import tracking
from orchestrator.config import alone, flatten, to_dict, to_yaml, with_overrides
from orchestrator.config_search import Search
from orchestrator.job import Job
from orchestrator.search import trial_config
from orchestrator.tracking import MetricFollower

NESTED_POLL_S = 0.5


def trial_folder(job: Job, trial_id: str) -> RunFolder:
    """Return the folder of a trial, under the sweep's."""
    return job.run_folder.child(f"trials/{trial_id}")


class ReportToTune:
    """Tells Ray Tune about each finished epoch of a trial."""

    def __init__(self, packed_bytes: float) -> None:
        self._packed_bytes = packed_bytes

    def epoch_finished(self, epoch: int, metrics: dict[str, float]) -> None:
        """Report the epoch's metrics and the size of the packed model."""
        tune.report(metrics | {"epoch": epoch, "packed_bytes": self._packed_bytes})


def follow_nested(folder: RunFolder, observer: ReportToTune, run: Callable[[], dict[str, Any]]) -> None:
    """Call `run` in a thread and report the epochs that appear in `folder` from this one, as Tune wants it.

    Raises:
        DabError: What `run` raised.
    """
    errors: list[BaseException] = []

    def target() -> None:
        try:
            run()
        except BaseException as error:  # noqa: BLE001 - carried to the thread of the trial, which raises it
            errors.append(error)

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    reported = 0
    is_over = False
    while not is_over:
        is_over = not thread.is_alive()
        for line in folder.metrics()[reported:]:
            observer.epoch_finished(line["step"], line["metrics"])
            reported += 1
        thread.join(NESTED_POLL_S)
    for error in errors:
        raise error


class TrialRecorder(tune.Callback):
    """Creates a child run for each trial, follows its metrics, and marks how it ended.

    Tune calls it in the driver and waits, so MLflow is asked by the follower's thread, and again where it is away. The
    folders of the trials are the record: the best is chosen from them. Tune also pickles its callbacks; only the
    description of the sweep travels.
    """

    def __init__(self, job: Job, search: Search) -> None:
        self._job, self._search = job, search
        self._started: dict[str, Job] = {}
        self._run_ids: dict[str, str] = {}
        self._ended: set[str] = set()
        self._follower: MetricFollower | None = MetricFollower(job.tracking_uri)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_follower": None, "_run_ids": dict(self._run_ids)}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        """Have the child run created."""
        if trial.trial_id in self._started:
            return
        number = len(self._started) + 1
        say(f"trial {number}/{self._search.num_trials} started: {describe_point(_point(trial))}")
        base, point = trial_config(self._job.parsed_config()), _point(trial)
        try:
            config = with_overrides(base, point)
        except InvalidInputError:  # the trial meets it, too, and ends with it; an error here would end the sweep
            config = None
        child = replace(
            self._job,
            kind="train",
            run_id="",
            name=f"{self._job.name}-t{number:02d}",
            folder=trial_folder(self._job, trial.trial_id).location,
            attempt=1,
            config=to_dict(base if config is None else config),
        )
        self._started[trial.trial_id] = child
        params = flatten(base) | point if config is None else flatten(config)
        self._owe(
            lambda: self._create(trial.trial_id, child, params, None if config is None else to_yaml(alone(config)))
        )

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        """Mark the child run as finished, or as stopped early."""
        self._end(trial, "finished", "")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        """Mark the child run as failed; the sweep goes on."""
        lines = str(trial.get_error() or "the trial's process died").strip().splitlines()
        self._end(trial, "failed", lines[-1] if lines else "")

    def close(self) -> dict[str, Any]:
        """Flush metrics and return the result of the sweep: status, message, metrics and run of the best trial."""
        for trial_id in self._started:
            self._end_child(trial_id)
        if self._follower is not None:
            self._follower.close(timeout_s=FLUSH_TIMEOUT_S)
        missing = [child.name for trial_id, child in self._started.items() if trial_id not in self._run_ids]
        if missing:
            say(f"not in MLflow, which was away or refused: {', '.join(missing)} (their folders keep the record)")
        objective = self._search.objectives[0]
        sign = 1.0 if objective.mode == "max" else -1.0
        scored = [(sign * metrics[objective.metric], trial_id, metrics) for trial_id, metrics in self._last_metrics()
                  if objective.metric in metrics]  # fmt: skip
        was_stopped = self._job.run_folder.is_stop_requested()
        if not scored:
            status = "stopped" if was_stopped else "failed"
            return {"status": status, "message": "no trial finished an epoch", "metrics": {}}
        _, best_id, metrics = max(scored, key=lambda entry: entry[0])
        best = replace(self._started[best_id], run_id=self._run_ids.get(best_id, ""))
        record_best(self._job, best, metrics, step=len(self._ended))
        message = f"best trial {best.name}" + (" (stopped before all trials ran)" if was_stopped else "")
        status = "stopped" if was_stopped else "finished"
        return {"status": status, "message": message, "metrics": metrics, "best": best.run_id or None}

    def _last_metrics(self) -> Iterator[tuple[str, dict[str, float]]]:
        for trial_id, child in self._started.items():
            epochs = child.run_folder.metrics()
            if epochs:
                yield trial_id, epochs[-1]["metrics"]

    def _owe(self, call: Callable[[], None]) -> None:
        if self._follower is not None:
            self._follower.owe(call)

    def _create(self, trial_id: str, child: Job, params: dict[str, Any], config: str | None) -> None:
        """Create a child run and follow its metrics; `config` is that of a trial that can be resumed."""
        folder = child.run_folder
        tags = {"dab.kind": "trial", "dab.folder": child.folder, "dab.job_id": self._job.job_id}
        uri, parent = self._job.tracking_uri, self._job.run_id
        run_id = tracking.create_run(
            uri, child.experiment, child.name, params=params, tags=tags | child.whereabouts, parent=parent,
            key=f"{parent}-{trial_id}",
        )  # fmt: skip
        child = replace(child, run_id=run_id)
        if config is not None:
            child.save()
            folder.leave("config.yaml", config)
        tell_start(child)
        if self._follower is not None:
            self._follower.follow(folder, run_id)
        self._run_ids[trial_id] = run_id

    def _end(self, trial: Any, status: str, message: str) -> None:
        folder = trial_folder(self._job, trial.trial_id)
        if not folder.result() or status == "failed":
            leave_result(folder, {"status": status, "message": message or "stopped early"})
        if trial.trial_id in self._started:
            self._end_child(trial.trial_id)

    def _end_child(self, trial_id: str) -> None:
        if trial_id in self._ended:
            return
        self._ended.add(trial_id)
        child = self._started[trial_id]
        result = child.run_folder.result() or {"status": "stopped", "message": "stopped with the sweep"}
        self._owe(lambda: self._tell_end(trial_id, child, result))
        epochs = child.run_folder.metrics()
        shown = f", val top-1 {epochs[-1]['metrics']['val_top1']:.2f} % after {len(epochs)} epochs" if epochs else ""
        say(f"trial {child.name}: {result['message'] or result['status']}{shown}")

    def _tell_end(self, trial_id: str, child: Job, result: dict[str, Any]) -> None:
        run_id = self._run_ids.get(trial_id)
        if run_id is None:  # MLflow refused to create it
            return
        tell_end(replace(child, run_id=run_id), result)
        if self._follower is not None:
            self._follower.rest(run_id)


def _point(trial: Any) -> dict[str, Any]:
    """Return what the trial tries; a grid hands it over under one key."""
    return dict(trial.config.get("point", trial.config))


def describe_point(values: dict[str, Any]) -> str:
    """Return a point of the search space on one line."""
    shown = {key: f"{value:.4g}" if isinstance(value, float) else str(value) for key, value in values.items()}
    return ", ".join(f"{key.rpartition('.')[2]}={text}" for key, text in shown.items())
