"""Trials as runs: what they tell Ray Tune, and how the sweep records each as a child run in MLflow."""

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ray import tune

from dabnn.errors import InvalidInputError
from dabnn.run_folder import RunFolder, headline
from jobs.ledger import Ledger, trial_folder, trial_name
from jobs.record import FLUSH_TIMEOUT_S, tell_end, tell_start
from jobs.train import say
from orchestrator import tracking
from orchestrator.config import alone, flatten, to_dict, to_yaml, with_overrides
from orchestrator.config_search import Search
from orchestrator.job import Job
from orchestrator.record_tags import record_of
from orchestrator.search import trial_config
from orchestrator.study import StudyTrial
from orchestrator.tracking import MetricFollower

NESTED_POLL_S = 0.5


class ReportToTune:
    """Tells Ray Tune about each finished epoch of a trial, once.

    Args:
        folder: The trial's.
        metrics: What Tune is told beside the headline.
    """

    def __init__(self, folder: RunFolder, metrics: tuple[str, ...] = ()) -> None:
        self._folder, self._metrics, self._reported = folder, metrics, 0

    def catch_up(self) -> None:
        """Report the epochs that the folder holds: of the trial before it was interrupted, or on other workers."""
        for line in self._folder.metrics():
            self.epoch_finished(line["step"], line["metrics"])

    def epoch_finished(self, epoch: int, metrics: dict[str, float]) -> None:
        """Report the epoch's metrics; returns when Tune has decided that the trial goes on, else ends this thread."""
        if epoch <= self._reported:
            return
        self._reported = epoch
        wanted = {name: metrics[name] for name in self._metrics if name in metrics}
        tune.report(headline(metrics) | wanted | {"epoch": epoch})


def follow_nested(observer: ReportToTune, run: Callable[[], object]) -> None:
    """Call `run` in a thread and report the epochs that appear in the trial's folder from this one, as Tune wants it.

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
    is_over = False
    while not is_over:
        is_over = not thread.is_alive()
        observer.catch_up()
        thread.join(NESTED_POLL_S)
    for error in errors:
        raise error


class TrialRecorder:
    """Creates a child run for each trial, follows its metrics, and marks how it ended.

    The driver does not wait for MLflow: it is asked by the follower's thread, and again where it is away. The folders
    of the trials are the record.
    """

    def __init__(self, job: Job, search: Search, ledger: Ledger) -> None:
        self._job, self._search, self._ledger = job, search, ledger
        self._base = trial_config(job.parsed_config())
        self._children: dict[int, Job] = {}  # until MLflow knows their end
        self._begun: set[int] = set()
        self._ended: set[int] = set()
        self._follower = MetricFollower(job.tracking_uri)

    def catch_up(self, trials: list[StudyTrial]) -> None:
        """Have MLflow told what it does not know yet of trials that ended under another driver."""
        ended = {trial_name(self._job, trial.number): trial for trial in trials if trial.state != "running"}

        def compare() -> None:
            known = {run.name: run for run in tracking.find_runs(self._job.tracking_uri, parent=self._job.run_id)}
            for name, trial in ended.items():
                if name not in known or known[name].status in ("queued", "running"):
                    self._begin(trial.number, trial.values)
                    left = trial_folder(self._job, trial.number).result()
                    self._end(trial.number, left or {"status": "failed", "message": trial.reason})

        if ended:
            self._follower.owe(compare)

    def started(self, number: int, values: dict[str, Any]) -> None:
        """Have the child run of a trial created; nothing happens when it was."""
        if number in self._begun:
            return
        say(f"trial {number + 1}/{self._search.num_trials} started: {describe_point(values)}")
        self._begin(number, values)

    def ended(self, number: int, left: dict[str, Any]) -> None:
        """Mark the child run of a trial with how it ended."""
        if number not in self._begun or number in self._ended:
            return
        self._end(number, left)
        epochs = trial_folder(self._job, number).metrics()
        shown = f", {self._score(epochs[-1]['metrics'])} after {len(epochs)} epochs" if epochs else ""
        say(f"trial {trial_name(self._job, number)}: {left.get('message') or left['status']}{shown}")

    def close(self) -> None:
        """Mark the trials that go on no more as stopped, and tell MLflow all, as long as it takes something."""
        for number in self._begun - self._ended:
            left = trial_folder(self._job, number).result()
            self._end(number, left or {"status": "stopped", "message": "stopped with the sweep"})
        self._follower.settle(stall_s=FLUSH_TIMEOUT_S)
        self._follower.close(timeout_s=FLUSH_TIMEOUT_S)
        missing = [trial_name(self._job, number) for number in sorted(self._begun) if not self._ledger.run_of(number)]
        if missing:
            say(f"not in MLflow, which was away or refused: {', '.join(missing)} (their folders keep the record)")

    def _begin(self, number: int, values: dict[str, Any]) -> None:
        try:
            config = with_overrides(self._base, values)
        except InvalidInputError:  # the trial meets it, too, and ends with it; an error here would end the sweep
            config = None
        child = replace(
            self._job,
            kind="train",
            run_id="",
            name=trial_name(self._job, number),
            folder=trial_folder(self._job, number).location,
            attempt=1,
            config=to_dict(self._base if config is None else config),
        )
        self._begun.add(number)
        self._children[number] = child
        params = flatten(self._base) | values if config is None else flatten(config)
        self._follower.owe(
            lambda: self._create(number, child, params, None if config is None else to_yaml(alone(config)))
        )

    def _create(self, number: int, child: Job, params: dict[str, Any], config: str | None) -> None:
        """Create a child run and follow its metrics; `config` is that of a trial that can be resumed."""
        folder = child.run_folder
        tags = {
            "dab.kind": "trial",
            "dab.trial": str(number),
            "dab.folder": child.folder,
            "dab.job_id": self._job.job_id,
        }
        uri, parent = self._job.tracking_uri, self._job.run_id
        record = record_of(child.parsed_config())
        run_id = tracking.create_run(
            uri,
            child.experiment,
            child.name,
            params=params,
            tags=record.tags | tags | child.whereabouts,
            inputs=record.inputs,
            parent=parent,
            key=f"{parent}-{number:04d}",
        )
        child = replace(child, run_id=run_id)
        static = self._ledger.static_of(number)
        if static:
            tracking.log_metrics(uri, run_id, static, step=0)
        if config is not None:
            child.save()
            folder.leave("config.yaml", config)
        tell_start(child)
        self._follower.follow(folder, run_id)
        self._ledger.name_run(number, run_id)

    def _end(self, number: int, left: dict[str, Any]) -> None:
        self._ended.add(number)
        self._follower.owe(lambda: self._tell_end(number, left))

    def _tell_end(self, number: int, left: dict[str, Any]) -> None:
        run_id = self._ledger.run_of(number)
        if run_id is None:  # MLflow refused to create it
            return
        if latency := {key: value for key, value in self._ledger.static_of(number).items() if key == "latency_ms"}:
            tracking.log_metrics(self._job.tracking_uri, run_id, latency, step=0)
        tell_end(replace(self._children[number], run_id=run_id), left)
        self._follower.rest(run_id)
        del self._children[number]

    def _score(self, metrics: dict[str, float]) -> str:
        static = {name: metrics[name] for name in ("val_top1",) if name in metrics}
        names = [each.metric for each in self._search.objectives if each.metric in metrics]
        shown = {name: metrics[name] for name in names} or static
        return ", ".join(
            f"val top-1 {value:.2f} %" if name == "val_top1" else f"{name} {value:.4g}" for name, value in shown.items()
        )


def describe_point(values: dict[str, Any]) -> str:
    """Return a point of the search space on one line."""
    shown = {key: f"{value:.4g}" if isinstance(value, float) else str(value) for key, value in values.items()}
    return ", ".join(f"{key.rpartition('.')[2]}={text}" for key, text in shown.items())
