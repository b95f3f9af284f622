"""Trials as runs: their folders, what they tell Ray Tune, and how the sweep records each as a child run in MLflow."""

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ray import tune

from dabnn.errors import DabError, InvalidInputError
from dabnn.run_folder import RunFolder
from jobs.record import FLUSH_TIMEOUT_S, leave_result, record_best, record_end, record_start
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

    Tune calls it in the driver. Tune also pickles its callbacks; only the description of the sweep travels.
    """

    def __init__(self, job: Job, search: Search) -> None:
        self._job, self._search = job, search
        self._numbers: dict[str, int] = {}
        self._children: dict[str, Job] = {}
        self._ended: dict[str, str] = {}
        self._follower: MetricFollower | None = MetricFollower(job.tracking_uri)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_follower": None}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        """Create the child run."""
        if trial.trial_id not in self._numbers:
            self._numbers[trial.trial_id] = len(self._numbers) + 1
            number = self._numbers[trial.trial_id]
            say(f"trial {number}/{self._search.num_trials} started: {describe_point(_point(trial))}")
        self._track(trial)

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:  # noqa: ARG002
        """Create the child run if the tracker was away when the trial started."""
        self._track(trial)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        """Mark the child run as finished, or as stopped early."""
        self._end(trial, "finished", "")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        """Mark the child run as failed; the sweep goes on."""
        lines = str(trial.get_error() or "the trial's process died").strip().splitlines()
        self._end(trial, "failed", lines[-1] if lines else "")

    def close(self) -> dict[str, Any]:
        """Flush metrics and return the result of the sweep: status, message, metrics and run of the best trial."""
        for trial_id, child in self._children.items():
            if trial_id not in self._ended:
                self._end_child(trial_id, child)
        if self._follower is not None:
            self._follower.close(timeout_s=FLUSH_TIMEOUT_S)
        objective = self._search.objectives[0]
        sign = 1.0 if objective.mode == "max" else -1.0
        scored = [(sign * metrics[objective.metric], child) for child, metrics in self._finished(objective.metric)]
        was_stopped = self._job.run_folder.is_stop_requested()
        if not scored:
            status = "stopped" if was_stopped else "failed"
            return {"status": status, "message": "no trial finished an epoch", "metrics": {}}
        _, best = max(scored, key=lambda pair: pair[0])
        metrics = best.run_folder.metrics()[-1]["metrics"]
        record_best(self._job, best, metrics, step=len(self._ended))
        message = f"best trial {best.name}" + (" (stopped before all trials ran)" if was_stopped else "")
        status = "stopped" if was_stopped else "finished"
        return {"status": status, "message": message, "metrics": metrics, "best": best.run_id}

    def _finished(self, metric: str) -> list[tuple[Job, dict[str, float]]]:
        pairs = []
        for child in self._children.values():
            epochs = child.run_folder.metrics()
            if epochs and metric in epochs[-1]["metrics"]:
                pairs.append((child, epochs[-1]["metrics"]))
        return pairs

    def _track(self, trial: Any) -> None:
        """Create the trial's child run; a tracker that is away is asked again at the trial's next report."""
        if trial.trial_id in self._children:
            return
        base, point = trial_config(self._job.parsed_config()), _point(trial)
        try:
            config = with_overrides(base, point)
        except InvalidInputError:  # the trial meets it, too, and ends with it; an error here would end the sweep
            config = None
        folder = trial_folder(self._job, trial.trial_id)
        name = f"{self._job.name}-t{self._numbers[trial.trial_id]:02d}"
        tags = {"dab.kind": "trial", "dab.folder": folder.location, "dab.job_id": self._job.job_id}
        tags |= self._job.whereabouts
        uri, parent = self._job.tracking_uri, self._job.run_id
        try:
            params = flatten(base) | point if config is None else flatten(config)
            run_id = tracking.create_run(uri, self._job.experiment, name, params=params, tags=tags, parent=parent)
        except DabError as error:
            say(f"trial {name} is not in MLflow yet: {error}")
            return
        child = replace(
            self._job,
            kind="train",
            run_id=run_id,
            name=name,
            folder=folder.location,
            attempt=1,
            config=to_dict(base if config is None else config),
        )
        if config is not None:  # what cannot run is not resumed either
            try:
                child.save()
                folder.leave("config.yaml", to_yaml(alone(config)))
            except (OSError, DabError) as error:  # raised here, it would end the sweep
                say(f"trial {name} cannot be resumed by itself: {error}")
        self._children[trial.trial_id] = child
        record_start(child)
        if self._follower is not None:
            self._follower.follow(folder.metrics_file, run_id)

    def _end(self, trial: Any, status: str, message: str) -> None:
        self._track(trial)
        folder = trial_folder(self._job, trial.trial_id)
        if not folder.result() or status == "failed":
            leave_result(folder, {"status": status, "message": message or "stopped early"})
        child = self._children.get(trial.trial_id)
        if child is not None and trial.trial_id not in self._ended:
            self._end_child(trial.trial_id, child)

    def _end_child(self, trial_id: str, child: Job) -> None:
        result = child.run_folder.result() or {"status": "stopped", "message": "stopped with the sweep"}
        self._ended[trial_id] = result["status"]
        record_end(child, result)
        epochs = child.run_folder.metrics()
        shown = f", val top-1 {epochs[-1]['metrics']['val_top1']:.2f} % after {len(epochs)} epochs" if epochs else ""
        say(f"trial {child.name}: {result['message'] or result['status']}{shown}")


def _point(trial: Any) -> dict[str, Any]:
    """Return what the trial tries; a grid hands it over under one key."""
    return dict(trial.config.get("point", trial.config))


def describe_point(values: dict[str, Any]) -> str:
    """Return a point of the search space on one line."""
    shown = {key: f"{value:.4g}" if isinstance(value, float) else str(value) for key, value in values.items()}
    return ", ".join(f"{key.rpartition('.')[2]}={text}" for key, text in shown.items())
