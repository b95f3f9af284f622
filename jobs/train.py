"""The program of one run on the cluster: `python -m jobs.train`, started by `dab submit` through the Ray Jobs API.

Marks the run as running, trains, prints progress, follows the run's metrics into MLflow, and records how it ended.
MLflow may be away for a while: the run's folder is the durable record, and what could not be sent is sent by the next
attempt.
"""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from dabnn.errors import DabError, PassingError
from dabnn.run_folder import RunFolder
from dabnn.watch import HangError
from jobs.connect import connect
from jobs.launch import launch
from jobs.preflight import wait_for_store
from jobs.record import FLUSH_TIMEOUT_S, leave_result, record_end, record_start
from orchestrator.failure import HUNG, PASSING
from orchestrator.job import Job
from orchestrator.origin import begin, origin_of
from orchestrator.resolve import train_spec
from orchestrator.tracking import MetricFollower

PROGRESS_POLL_S = 1.0
PROGRESS_LINE_S = 5.0


def main() -> int:
    """Run the job described in the environment; return 0 when the run finished or was stopped, 1 when it failed.

    Other codes (`orchestrator.failure`) ask for another driver.
    """
    job = Job.from_environment()
    config = job.parsed_config()
    folder = job.run_folder
    if config.cluster.num_workers:
        connect()
    say(f"run {job.name} ({job.run_id}), attempt {job.attempt}: {config.cluster.num_workers} workers")
    with following(job), printing_progress(folder):
        try:
            wait_for_store(folder, config.train.checkpoint.retry_s, say)
            begin(folder, origin_of(config))
            spec = train_spec(config)
            result = launch(spec, folder, config, job.job_id, tracking_uri=job.tracking_uri, tell=say)
        except HangError as error:  # of a loop in this process, whose thread hangs on: `jobs.supervise` starts another
            say(str(error))
            os._exit(HUNG)
        except PassingError as error:
            say(str(error))
            return PASSING
        except DabError as error:
            result = {"status": "failed", "message": str(error)}
            leave_result(folder, result)
    record_end(job, result)
    say(f"run {job.name}: {result['status']}{': ' + result['message'] if result['message'] else ''}")
    return 1 if result["status"] == "failed" else 0


def say(line: str) -> None:
    """Print one line for whoever follows the job's log."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


@contextmanager
def following(job: Job) -> Iterator[MetricFollower]:
    """Within the block the run counts as running and its metrics go to MLflow; unsent ones are counted at its end."""
    follower = MetricFollower(job.tracking_uri)
    record_start(job, follower)
    follower.follow(job.run_folder, job.run_id)
    try:
        yield follower
    finally:
        with suppress(DabError):
            job.run_folder.fresh()
        unsent = follower.close(timeout_s=FLUSH_TIMEOUT_S)
        if unsent:
            say(f"{unsent} lines of metrics could not be sent to {job.tracking_uri}; they are kept in {job.folder}")


@contextmanager
def printing_progress(folder: RunFolder) -> Iterator[None]:
    """Within the block a line of progress is printed for each epoch, and every few seconds between."""
    done = threading.Event()
    thread = threading.Thread(target=_print_progress, args=(folder, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _print_progress(folder: RunFolder, done: threading.Event) -> None:
    printed_at, printed_epochs, shown = time.monotonic(), -1, dict[str, Any]()
    is_last = False
    while True:
        with suppress(DabError):  # its store refuses: the loop tells of that
            lines, progress = folder.metrics(), folder.progress()
            if printed_epochs < 0:
                printed_epochs, shown = len(lines), progress
            for line in lines[printed_epochs:]:
                say(epoch_line(line))
                printed_epochs += 1
                printed_at = time.monotonic()
            is_due = time.monotonic() - printed_at >= PROGRESS_LINE_S
            if is_due and progress != shown and progress["epoch"] < progress["epochs"]:
                say(progress_line(progress))
                printed_at, shown = time.monotonic(), progress
        if is_last:
            return
        is_last = done.wait(PROGRESS_POLL_S)


def epoch_line(line: dict[str, Any]) -> str:
    """Return the line for a finished epoch."""
    metrics = line["metrics"]
    return (
        f"epoch {line['step']}: train loss {metrics['train_loss']:.4f}, val loss {metrics['val_loss']:.4f}, "
        f"val top-1 {metrics['val_top1']:.2f} %, {metrics['images_per_s']:.0f} images/s"
    )


def progress_line(progress: dict[str, Any]) -> str:
    """Return the line for a place within an epoch."""
    eta = "" if progress["eta_s"] is None else f", {progress['eta_s']:.0f} s left"
    place = f"epoch {progress['epoch'] + 1}/{progress['epochs']}"
    step = f"step {progress['step_in_epoch']}/{progress['steps_per_epoch']}"
    return f"{place}, {step}: loss {progress['loss']:.4f}, {progress['images_per_s']:.0f} images/s{eta}"


if __name__ == "__main__":
    sys.exit(main())
