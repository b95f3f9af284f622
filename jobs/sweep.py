"""The program of a sweep on the cluster: `python -m jobs.sweep`, started by `dab submit --sweep`.

Ray Tune proposes and stops trials; each trial is an ordinary run with its own folder, checkpoints and MLflow run
under the sweep's. A trial of one worker trains in the trial's own process; with more workers the trial starts a
nested trainer and takes no CPU itself.
"""

import logging
import sys
import uuid
from tempfile import TemporaryDirectory
from typing import Any

import ray
from ray import tune

from dabnn.errors import DabError, PassingError
from dabnn.run_folder import RunFolder
from dabnn.watch import HangError
from jobs.connect import connect
from jobs.launch import check_capacity, launch, train_here
from jobs.record import leave_result, record_end, record_start
from jobs.train import say
from jobs.trials import ReportToTune, TrialRecorder, follow_nested, trial_folder
from orchestrator.config import Config, with_overrides
from orchestrator.job import Job
from orchestrator.resolve import model_table, train_spec
from orchestrator.search import make_scheduler, make_searcher, trial_config


def main() -> int:
    """Run the sweep described in the environment; return 0 when it finished or was stopped, 1 when it failed."""
    job = Job.from_environment()
    config = job.parsed_config()
    connect()
    # Tune's own result files are off: the run folders hold the metrics.
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
    record_start(job)
    try:
        result = _search(job, config)
    except DabError as error:
        result = {"status": "failed", "message": str(error)}
    leave_result(job.run_folder, result)
    record_end(job, result)
    say(f"sweep {job.name}: {result['status']}{': ' + result['message'] if result['message'] else ''}")
    return 1 if result["status"] == "failed" else 0


def _search(job: Job, config: Config) -> dict[str, Any]:
    search, base = config.search, trial_config(config)
    if search is None:
        raise DabError("search: the configuration of this job has no search; `dab submit --sweep` checks that.")
    check_capacity(base.cluster)
    searcher, space, num_samples = make_searcher(search, config.seed)
    recorder = TrialRecorder(job, search)
    # Tune reads pickles back from where it keeps its state, so that is no folder that other machines or users write to.
    with TemporaryDirectory(prefix="dab-tune-", ignore_cleanup_errors=True) as private:
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(_run_trial, job=job), _trial_resources(base)),
            param_space=space,
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=make_scheduler(search, base.train.epochs),
                num_samples=num_samples,
                max_concurrent_trials=_concurrency(search.max_concurrent, base),
            ),
            run_config=tune.RunConfig(
                name=job.job_id,
                storage_path=private,
                callbacks=[recorder],
                stop=_StopWhenAsked(job.folder),
                failure_config=tune.FailureConfig(max_failures=base.cluster.max_failures),
                verbose=0,
            ),
        )
        tuner.fit()
    return recorder.close()


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
        if not folder.is_stop_requested():
            return False
        trials = folder.children("trials")
        return all(trial.result() for trial in trials if trial.attempts())


def _run_trial(values: dict[str, Any], job: Job) -> None:
    """Train one point; Tune calls this in a process of its own, and again when that process died.

    A failure that a restart would meet again is left as the trial's result, not raised.

    Raises:
        HangError: The trial hangs.
        PassingError: Another try may well not meet what ended this one.
    """
    folder = trial_folder(job, tune.get_context().get_trial_id())
    if job.run_folder.is_stop_requested():
        if not folder.result():
            leave_result(folder, {"status": "stopped", "message": "stopped with the sweep"})
        return
    try:
        config = with_overrides(trial_config(job.parsed_config()), values.get("point", values))
        _train_trial(config, folder)
    except (HangError, PassingError):
        raise  # Tune calls it again, as `cluster.max_failures` allows
    except DabError as error:
        leave_result(folder, {"status": "failed", "message": str(error)})


def _train_trial(config: Config, folder: RunFolder) -> None:
    observer = ReportToTune(float(model_table(config).packed_bytes))
    if config.cluster.num_workers > 1:
        name = f"{folder.root.name}-{uuid.uuid4().hex[:8]}"  # a name used before would continue Ray's own state
        follow_nested(folder, observer, lambda: launch(train_spec(config), folder, config, name))
    else:
        train_here(train_spec(config), folder, config.cluster, observer)


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
