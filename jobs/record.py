"""What a job tells MLflow about a run beside its metrics: start, checkpoints, end.

A tracker that is away never ends a run.
"""

import logging
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from dabnn.checkpoints import Checkpoint, list_checkpoints
from dabnn.errors import DabError
from dabnn.run_folder import RunFolder
from orchestrator import tracking
from orchestrator.job import Job

_log = logging.getLogger(__name__)


FLUSH_TIMEOUT_S = (
    20  # how long a job that is over waits for the tracker; the rest is sent by a later attempt or `dab status`
)


def record_start(job: Job, follower: tracking.MetricFollower | None = None) -> None:
    """Mark the run as running and name its attempt.

    Args:
        job: The run's job.
        follower: Tells a tracker that is away when it is back. Without it, such a tracker hears of the run's end only.
    """
    if follower is None:
        _tolerate(lambda: tell_start(job))
    else:
        follower.owe(lambda: tell_start(job))


def tell_start(job: Job) -> None:
    """Mark the run as running and name its attempt.

    Raises:
        DabError: The tracker is away or refuses.
    """
    tracking.set_tags(job.tracking_uri, job.run_id, {"dab.attempt": str(job.attempt)})
    tracking.set_status(job.tracking_uri, job.run_id, "running")


def leave_result(folder: RunFolder, result: dict[str, Any]) -> None:
    """Leave how the run ended in its folder; a full disk must not hide it from whoever reads the log or the tracker."""
    try:
        folder.write_result(result)
    except (OSError, DabError) as error:
        _log.warning("%s: the result cannot be written (%s): %s", folder.location, error, result)


def record_end(job: Job, result: dict[str, Any]) -> None:
    """Record how a run ended; what a tracker that is away misses, `dab status` completes."""
    _tolerate(lambda: tell_end(job, result))


def tell_end(job: Job, result: dict[str, Any]) -> None:
    """Record checkpoints, the digest of the weights, the message, and last the status: with it the record is whole.

    Raises:
        DabError: The tracker is away or refuses.
    """
    checkpoints = [asdict(checkpoint) for checkpoint in _checkpoints(job.run_folder)]
    tags = {"dab.message": result.get("message", ""), "dab.weights_sha256": result.get("weights_sha256", "")}
    uri, run_id = job.tracking_uri, job.run_id
    tracking.log_json(uri, run_id, "checkpoints.json", checkpoints)
    tracking.set_tags(uri, run_id, {key: value for key, value in tags.items() if value})
    tracking.set_status(uri, run_id, result["status"])


def record_best(sweep: Job, best: Job, metrics: dict[str, float], step: int) -> None:
    """Name the best trial of a sweep, if it has a run, and record its metrics as the sweep's own."""
    uri, run_id = sweep.tracking_uri, sweep.run_id
    if best.run_id:
        _tolerate(lambda: tracking.set_tags(uri, run_id, {"dab.best_run": best.run_id}))
    _tolerate(lambda: tracking.log_metrics(uri, run_id, metrics, step=step))


def _tolerate(call: Callable[[], None]) -> None:
    try:
        call()
    except DabError as error:
        _log.warning("%s (the run's folder keeps the record)", error)


def _checkpoints(folder: RunFolder) -> list[Checkpoint]:
    try:
        return list_checkpoints(folder.fresh())
    except DabError as error:
        _log.warning("%s", error)
        return list_checkpoints(folder)
