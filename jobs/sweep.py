"""The program of a sweep on the cluster: `python -m jobs.sweep`, started by `jobs.supervise`.

The study proposes points, Ray Tune runs and ends trials; each trial is an ordinary run with its own folder, checkpoints
and MLflow run under the sweep's. A trial of one worker trains in the trial's own process, which the next trial takes
over; with more workers the trial starts a nested trainer and takes no CPU itself. What Tune knows lies in memory: the
book of the sweep (`jobs.ledger`) is what lasts.
"""

import logging
import sys
import uuid
from collections.abc import Callable
from contextlib import suppress
from tempfile import TemporaryDirectory
from typing import Any

import ray
from ray import tune
from ray.tune.search import Searcher

from dabnn.errors import DabError, PassingError
from dabnn.run_folder import RunFolder
from dabnn.watch import HangError
from jobs.connect import connect
from jobs.early_stop import make_scheduler, replay
from jobs.launch import check_capacity, launch, train_here
from jobs.ledger import LATENCY_FILE, TRIAL_FILE, Ledger, trial_folder
from jobs.preflight import wait_for_store
from jobs.record import leave_result, record_end, record_start
from jobs.sweep_end import conclude
from jobs.train import say
from jobs.trials import ReportToTune, TrialRecorder, follow_nested
from orchestrator.config import Config, with_overrides
from orchestrator.config_search import Search
from orchestrator.job import Job
from orchestrator.origin import begin, origin_of
from orchestrator.resolve import train_spec
from orchestrator.search import trial_config, wants_latency

Train = Callable[[Config, RunFolder, ReportToTune], None]


def main() -> int:
    """Run the sweep described in the environment; return 0 when it finished or was stopped, 1 when it failed."""
    job = Job.from_environment()
    config = job.parsed_config()
    connect()
    record_start(job)
    try:
        wait_for_store(job.run_folder, config.train.checkpoint.retry_s, say)
        begin(job.run_folder, origin_of(config))
        result = run_sweep(job, config)
    except DabError as error:
        result = {"status": "failed", "message": str(error)}
    leave_result(job.run_folder, result)
    record_end(job, result)
    say(f"sweep {job.name}: {result['status']}{': ' + result['message'] if result['message'] else ''}")
    return 1 if result["status"] == "failed" else 0


def train_trial(config: Config, folder: RunFolder, observer: ReportToTune) -> None:
    """Train one trial, in this process or on workers of its own.

    Raises:
        DabError: It failed, or another try may not; see `jobs.launch`.
    """
    if config.cluster.num_workers > 1:
        name = f"{folder.root.name}-{uuid.uuid4().hex[:8]}"  # a name used before would continue Ray's own state
        follow_nested(observer, lambda: launch(train_spec(config), folder, config, name))
    else:
        train_here(train_spec(config), folder, config.cluster, observer)


def run_sweep(job: Job, config: Config, train: Train = train_trial) -> dict[str, Any]:
    """Run a sweep to its end, from where its book stands, and return its result.

    Args:
        job: The sweep.
        config: Its configuration, with a search.
        train: Does one trial: leaves metrics and a result in the trial's folder, and tells the observer of each epoch.

    Raises:
        DabError: The cluster cannot hold a trial, the search was changed, or no point can be tried.
    """
    search, base = config.search, trial_config(config)
    if search is None:
        raise DabError("search: the configuration of this job has no search; `dab submit --sweep` checks that.")
    logging.getLogger("ray.tune").setLevel(logging.ERROR)  # of a result table and files of its own, which are off
    check_capacity(base.cluster)
    ledger = Ledger(job, config, search, say)
    trials = ledger.study.trials()
    job.run_folder.begin_attempt(sum(trial.state != "running" for trial in trials), base.cluster.num_processes)
    recorder = TrialRecorder(job, search, ledger)
    recorder.catch_up(trials)
    scheduler = make_scheduler(search, base.train.epochs)
    replay(scheduler, ledger.history())
    # Tune reads pickles back from where it keeps its state, so that is no folder that other machines or users write to.
    with TemporaryDirectory(prefix="dab-tune-", ignore_cleanup_errors=True) as private:
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(_run_trial, job=job, train=train), _trial_resources(base)),
            tune_config=tune.TuneConfig(
                search_alg=_Proposals(ledger),
                scheduler=scheduler,
                num_samples=-1,  # the study says when it is over
                max_concurrent_trials=_concurrency(search.max_concurrent, base),
                reuse_actors=base.cluster.num_workers <= 1,  # a nested trainer ends with the process of its trial
            ),
            run_config=tune.RunConfig(
                name=job.job_id,
                storage_path=private,
                callbacks=[_Book(ledger, recorder)],
                stop=_StopWhenAsked(job.folder),
                failure_config=tune.FailureConfig(max_failures=base.cluster.max_failures),
                verbose=0,
            ),
        )
        tuner.fit()
    recorder.close()
    return conclude(job, search, ledger.study, ledger.run_of)


class _Proposals(Searcher):
    """Hands Tune the numbers of the trials that are next; the copies that Tune pickles are never read."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self._ledger = ledger

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def suggest(self, trial_id: str) -> Any:  # noqa: ARG002 - Tune's signature
        """Return the next trial's number."""
        point = self._ledger.next()
        return Searcher.FINISHED if point is None else {"number": point.number}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Do nothing: `_Book` is told with more."""

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the book is kept all the time."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing."""


class _Book(tune.Callback):
    """Has the book and MLflow told what becomes of trials; Tune calls it in the driver and waits."""

    def __init__(self, ledger: Ledger, recorder: TrialRecorder) -> None:
        self._ledger, self._recorder = ledger, recorder

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        """Have the trial's run created."""
        number = trial.config["number"]
        self._recorder.started(number, self._ledger.study.trials()[number].values)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        """Take down that the trial finished, or was stopped early."""
        self._end(trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        """Take down that the trial failed; the sweep goes on."""
        lines = str(trial.get_error() or "").strip().splitlines()
        self._end(trial, lines[-1] if lines else "the trial's process died")

    def _end(self, trial: Any, error: str = "") -> None:
        number = trial.config["number"]
        self._recorder.ended(number, self._ledger.ended(number, error))


class _StopWhenAsked(tune.Stopper):
    """Ends the sweep when its folder holds a stop request and every trial that runs has taken its last checkpoint.

    The trials hold stop requests of their own by then: see `orchestrator.runs.stop`.
    """

    def __init__(self, folder: str) -> None:
        self._place = folder  # Tune copies what it is given

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:  # noqa: ARG002 - Tune's signature
        return False

    def stop_all(self) -> bool:
        folder = RunFolder.of(self._place)
        with suppress(DabError):  # its store does not answer: it is asked again
            if not folder.is_stop_requested():
                return False
            trials = folder.children("trials")
            return all(trial.result() for trial in trials if trial.attempts())
        return False


def _run_trial(given: dict[str, Any], job: Job, train: Train) -> None:
    """Do one trial; Tune calls this in a process of its own, and again when that process died.

    A failure that a restart would meet again is left as the trial's result, not raised.

    Raises:
        HangError: The trial hangs.
        PassingError: Another try may well not meet what ended this one.
    """
    folder = trial_folder(job, given["number"])
    if job.run_folder.is_stop_requested():
        if not folder.result():
            leave_result(folder, {"status": "stopped", "message": "stopped with the sweep"})
        return
    sweep = job.parsed_config()
    search = sweep.search or Search()
    observer = ReportToTune(folder, tuple(objective.metric for objective in search.objectives))
    try:
        config = with_overrides(trial_config(sweep), folder.load_json(TRIAL_FILE)["values"])
        if wants_latency(search):
            _measure_latency(config, search, folder)
        observer.catch_up()
        train(config, folder, observer)
    except (HangError, PassingError):
        raise  # Tune calls it again, as `cluster.max_failures` allows
    except DabError as error:
        leave_result(folder, {"status": "failed", "message": str(error)})


def _measure_latency(config: Config, search: Search, folder: RunFolder) -> None:
    """Leave how long the packed form of the trial's network takes on this node, once.

    Raises:
        DabError: It has no packed form, or there is no such device.
    """
    from dabnn.bench_place import Place
    from dabnn.latency import packed_latency_ms

    if folder.load_json(LATENCY_FILE):
        return
    section = search.latency
    place = Place(section.batch_size, section.threads, section.device, "float32")
    latency_ms = packed_latency_ms(train_spec(config).model, place)
    folder.leave_json(LATENCY_FILE, {"latency_ms": latency_ms, "place": section.model_dump(mode="json")})


def _trial_resources(config: Config) -> dict[str, float]:
    """What Ray sets aside for a trial; the driver of a nested trainer takes one byte, as nothing at all is refused."""
    cluster = config.cluster
    if cluster.num_workers > 1:
        return {"CPU": 0, "memory": 1}
    return {"CPU": float(cluster.cpus_per_worker), "GPU": float(cluster.gpus_per_worker)}


def _concurrency(asked: int | None, config: Config) -> int:
    """How many trials fit on the cluster at a time; nested trainers are invisible to Tune, so it must be told."""
    cluster = config.cluster
    resources = ray.cluster_resources()
    fits = resources.get("CPU", 1) // (cluster.num_processes * cluster.cpus_per_worker)
    if cluster.gpus_per_worker:
        fits = min(fits, resources.get("GPU", 0) // (cluster.num_processes * cluster.gpus_per_worker))
    return max(1, min(int(fits), asked or int(fits)))


if __name__ == "__main__":
    sys.exit(main())
