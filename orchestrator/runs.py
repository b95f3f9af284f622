"""Runs seen from outside: list, status, logs, stop, resume.

The Jobs API knows what lives, MLflow and the run's folder what lasts.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from dabnn.checkpoints import list_checkpoints
from dabnn.errors import DabError, InvalidInputError
from dabnn.run_folder import RunFolder
from orchestrator import queue, tracking
from orchestrator.config import to_yaml
from orchestrator.extension import extended
from orchestrator.found_runs import folder_of as folder_of
from orchestrator.home import home_folder
from orchestrator.job import Job, is_job_of
from orchestrator.jobs_api import ENDED_JOBS, LIVING_JOBS, follow_job, job_log, job_status, stop_job
from orchestrator.origin import expect
from orchestrator.reach import reach
from orchestrator.sent_runs import being_sent, remember, sent_at, sent_run, target_of
from orchestrator.story import story
from orchestrator.submit import check_size, ensure_services, submit_job
from orchestrator.target import Target, resolve_target
from orchestrator.tracking import RunRecord, Status

ENDED = ("finished", "failed", "stopped")
UNREACHABLE = "UNREACHABLE"
REFUSED = "REFUSED"
_SEND_TIMEOUT_S = 20.0
_SUBMISSION_S = 120.0  # from the tag `dab.sent_at` until the cluster knows the job; it takes seconds
_EXIT_S = 30.0  # a job ends some seconds after its run


@dataclass(frozen=True)
class RunStatus:
    """What `dab status` shows.

    Attributes:
        run_id: MLflow run.
        name: Name of the run.
        kind: "train", "sweep" or "trial".
        status: "queued", "running", "finished", "failed" or "stopped".
        message: Why it ended, or empty.
        attempts: Starts of the training loop, restarts by Ray included.
        epoch: Finished epochs.
        step: Optimizer steps taken.
        metrics: Newest metrics.
        checkpoints: Kept checkpoints, oldest first.
        progress: Newest progress of a running run.
        folder: The run's folder.
        weights_sha256: Digest of the final weights, or empty.
        tracking_uri: Where the run is recorded.
        story: What happened to it, a sentence each, oldest first; empty for a run that nothing happened to.
        events: The same as it was noted, see `RunFolder.append_event`.
    """

    run_id: str
    name: str
    kind: str
    status: Status
    message: str
    attempts: int
    epoch: int
    step: int
    metrics: dict[str, float]
    checkpoints: list[dict[str, Any]]
    progress: dict[str, Any]
    folder: str
    weights_sha256: str
    tracking_uri: str
    story: list[str]
    events: list[dict[str, Any]]


def decide_status(tracked: Status, job: str | None, left: Status | None) -> tuple[Status, str]:
    """Return (status, reason) of a run.

    A run that the tracker believes alive while its job has ended either could not reach the tracker at its end, or was
    lost without a word: its driver was killed.

    Args:
        tracked: What the tracker says.
        job: What the Jobs API says of the run's job; None when it does not know it, UNREACHABLE when a cluster
            elsewhere does not answer and REFUSED when it wants another token: the run may well go on.
        left: The status that the training loop left in the run's folder; None when it left none.
    """
    if tracked in ENDED:
        return tracked, ""
    if left is not None and job not in LIVING_JOBS:
        return left, ""
    if job == UNREACHABLE:
        return tracked, "its cluster does not answer; this is what was known last"
    if job == REFUSED:
        return tracked, "its cluster asks for a token that is not known here, see `dab cluster add`"
    if job is None:
        return "failed", "its cluster is gone; `dab resume` continues from the last checkpoint"
    if job in ENDED_JOBS:
        advice = "`dab resume` continues from the last checkpoint"
        return (
            ("stopped", f"its job was stopped; {advice}")
            if job == "STOPPED"
            else ("failed", f"its driver died; {advice}")
        )
    return tracked, ""


def list_runs(uri: str, *, experiment: str | None = None) -> list[RunRecord]:
    """Return all runs of the tracker, newest first; one that was lost without a word is shown as what it is."""
    return [as_it_stands(record) for record in tracking.find_runs(uri, experiment)]


def as_it_stands(record: RunRecord) -> RunRecord:
    """Return a run with the status that its job and its folder give it, where the tracker could not be told."""
    if record.status in ENDED or "dab.folder" not in record.tags:
        return record
    state, _ = decide_status(record.status, _job_status(record), folder_of(record).result().get("status"))
    return replace(record, status=state)


def status(uri: str, reference: str) -> RunStatus:
    """Return the status of a run given by id, unique prefix or name.

    The tracker is told what it missed: a run lost without a word is marked as failed there.

    Raises:
        InvalidInputError: No run, or several, match.
    """
    record = tracking.find_run(uri, reference)
    folder = folder_of(record)
    result = folder.result()
    state, reason = decide_status(record.status, _job_status(record), result.get("status"))
    reason = reason or result.get("message", "") or (_why_queued(record) if state == "queued" else "")
    if state != record.status:
        _record_late(uri, record.run_id, folder, state, reason)
    elif state in ENDED and tracking.has_unsent(folder.metrics_file, record.run_id):
        _send_metrics(uri, record.run_id, folder)  # the tracker came back between the run's last metrics and its end
    progress = folder.progress()
    lines = folder.metrics()
    metrics = lines[-1]["metrics"] if lines else record.metrics
    return RunStatus(
        run_id=record.run_id,
        name=record.name,
        kind=record.tags.get("dab.kind", "train"),
        status=state,
        message=reason or record.tags.get("dab.message", ""),
        attempts=len(folder.attempts()),
        epoch=result.get("epoch", progress.get("epoch", 0)),
        step=result.get("step", progress.get("step", 0)),
        metrics=metrics,
        checkpoints=[asdict(checkpoint) for checkpoint in list_checkpoints(folder)],
        progress=progress,
        folder=folder.location,
        weights_sha256=result.get("weights_sha256", ""),
        tracking_uri=uri,
        story=story(folder),
        events=folder.events(),
    )


def _record_late(uri: str, run_id: str, folder: RunFolder, state: Status, reason: str) -> None:
    """Tell the tracker how a run ended that could not tell it itself, and send the metrics that it missed."""
    _send_metrics(uri, run_id, folder)
    checkpoints = [asdict(checkpoint) for checkpoint in list_checkpoints(folder)]
    tracking.log_json(uri, run_id, "checkpoints.json", checkpoints)
    tags = {"dab.message": reason, "dab.weights_sha256": folder.result().get("weights_sha256", "")}
    tracking.set_tags(uri, run_id, tags)
    tracking.set_status(uri, run_id, state)


def _send_metrics(uri: str, run_id: str, folder: RunFolder) -> None:
    follower = tracking.MetricFollower(uri)
    follower.follow(folder.metrics_file, run_id)
    follower.close(timeout_s=_SEND_TIMEOUT_S)


def stop(
    uri: str, reference: str, *, now: bool = False, grace_s: float = 60, on_wait: Callable[[str], None] | None = None
) -> RunStatus:
    """Stop a run after a checkpoint, or with `now` at once; return its status.

    A run that has not ended `grace_s` seconds after being asked is stopped through the Jobs API without a checkpoint.
    A trial is only ever asked, because its job is that of its sweep. With `now`, a run whose cluster does not answer is
    recorded as stopped, and a job that outlives its run is ended.

    Raises:
        InvalidInputError: The run has ended already, or is being stopped already.
        DabError: A trial did not end, or the cluster does not answer.
    """
    current = status(uri, reference)
    record = tracking.find_run(uri, current.run_id)
    if current.status in ENDED and not (now and _has_living_job(record)):
        raise InvalidInputError(f"{current.name}: already {current.status}; there is nothing to stop.")
    # A trial that was resumed has a job of its own.
    is_trial = current.kind == "trial" and not is_job_of(record.tags.get("dab.job_id", ""), record.run_id)
    if is_trial and now:
        raise InvalidInputError(f"--now: {current.name} shares the job of its sweep. Leave it out, or stop the sweep.")
    _refuse_second_stop(current, now=now, is_trial=is_trial)
    if is_trial or (not now and current.status == "running"):
        for folder in _stoppable(current):
            folder.request_stop()
        if _ends_within(uri, current.run_id, grace_s, on_wait):
            return status(uri, current.run_id)
    if is_trial:
        raise DabError(f"{current.name}: did not end within {grace_s:.0f} s; `dab stop` of its sweep ends all trials.")
    how = _end_job(record, now=now, on_wait=on_wait)
    last = status(uri, current.run_id)
    if last.status in ENDED and RunFolder.of(current.folder).result():  # it came to an end of its own in the meantime
        return last
    _record_late(uri, current.run_id, RunFolder.of(current.folder), "stopped", how)
    return status(uri, current.run_id)


def _end_job(record: RunRecord, *, now: bool, on_wait: Callable[[str], None] | None) -> str:
    """End the job of a run, and return how the run so ended."""
    job_id, target = record.tags.get("dab.job_id"), target_of(record)
    if job_id is None or not target.jobs_url:
        return "stopped without a last checkpoint"
    if _job_status(record) == UNREACHABLE:
        if not now:
            raise DabError(
                f"{record.name}: did not end, and {target} does not answer. `dab stop {record.run_id[:8]} --now` "
                "records it as stopped all the same."
            )
        return f"given up: {target} does not answer, so it could not be told to end the run"
    stop_job(target, job_id, on_wait)
    return "stopped without a last checkpoint"


def _refuse_second_stop(current: RunStatus, *, now: bool, is_trial: bool) -> None:
    """Note that a stop is asked for, and refuse one that was asked for before."""
    folder = RunFolder.of(current.folder)
    asked = folder.load_json(folder.control_file.name)
    if asked and not now:
        since_s = time.time() - float(asked.get("time", 0))
        at_once = "" if is_trial else f" `dab stop {current.run_id[:8]} --now` ends it without one."
        raise InvalidInputError(
            f"{current.name}: is being stopped already, since {since_s:.0f} s; it ends when its last checkpoint is "
            f"written.{at_once}"
        )
    what = "it was ended at once" if now else "a stop was asked for"
    folder.append_event({"what": what, "step": current.step, "attempt": current.attempts})


def resume(
    uri: str,
    reference: str,
    on_wait: Callable[[str], None] | None = None,
    *,
    address: str | None = None,
    is_forced: bool = False,
    changes: Sequence[str] = (),
) -> tuple[Job, Target]:
    """Submit the next attempt of a run that stopped or failed; it continues from its newest checkpoint.

    A sweep goes on with the trials that have not ended; one that has finished goes on if `changes` allow more.

    Args:
        uri: Tracking server.
        reference: The run.
        on_wait: Told what is being waited for.
        address: Another cluster than the one it was on, as `orchestrator.target.resolve_target` takes it. A run whose
            own cluster does not answer counts as lost then.
        is_forced: Accept other code and another environment than the run began with, and that its cluster does not
            answer.
        changes: Limits of a sweep that change, see `orchestrator.extension`.

    Raises:
        InvalidInputError: The run is still going or has finished; or something differs from what it began with.
    """
    current = status(uri, reference)
    record = tracking.find_run(uri, current.run_id)
    wanted = resolve_target(address) if address else target_of(record)
    is_elsewhere = wanted.jobs_url != record.tags.get("dab.jobs_url", "")
    is_lost = (is_forced or is_elsewhere) and current.status not in ENDED and _job_status(record) == UNREACHABLE
    is_sweep = current.kind == "sweep"
    is_more = is_sweep and current.status == "finished" and bool(changes)
    if current.status not in ("stopped", "failed") and not is_lost and not is_more:
        advice = _advice(record, current)
        raise InvalidInputError(
            f"{current.name}: is {current.status}; only a stopped or failed run can be resumed. {advice}"
        )
    _await_exit(record, on_wait)
    folder = RunFolder.of(current.folder)
    # The tracker may have come back under another address since the last attempt.
    before = replace(Job.load(folder).next_attempt(), tracking_uri=uri)
    job = extended(before, changes)
    expect(folder, before.parsed_config(), is_here=wanted.is_embedded, is_forced=is_forced, is_sweep=is_sweep)
    target, _ = ensure_services(uri, on_wait, target=wanted)
    reached = reach(target)
    check_size(job.parsed_config().cluster, target, reached)
    job = replace(job, target=target.name, jobs_url=target.jobs_url)
    if job.config != before.config:
        folder.leave("config.yaml", to_yaml(job.parsed_config()))
    folder.clear_stop()
    folder.forget_result()
    tracking.set_tags(uri, job.run_id, {"dab.message": "", "dab.job_id": job.job_id, **being_sent()})
    tracking.set_status(uri, job.run_id, "queued")
    submit_job(job, target, reached)
    is_known = target.token is not None or target.is_open  # else only the tracker named it
    if is_known and not target.is_embedded:
        remember(sent_run(job, uri))
    return job, target


def _advice(record: RunRecord, current: RunStatus) -> str:
    """Return what to do with a run that cannot be resumed."""
    if current.status == "finished" and current.kind == "sweep":
        return "More trials are added with --set search.num_trials=+20."
    if current.status == "finished":
        return "It has nothing left to do."
    if _job_status(record) == UNREACHABLE:
        return "Its cluster does not answer; if it is gone for good, resume it with --address on another."
    return "Stop it first: `dab stop`."


def _await_exit(record: RunRecord, on_wait: Callable[[str], None] | None) -> None:
    """Wait until the job of a run that has ended is over: two attempts must not share a folder.

    Raises:
        InvalidInputError: It goes on.
    """
    deadline = time.monotonic() + _EXIT_S
    while _has_living_job(record):
        if time.monotonic() > deadline:
            raise InvalidInputError(
                f"{record.name}: its job {record.tags['dab.job_id']} still runs. `dab stop {record.run_id[:8]} --now` "
                "ends it."
            )
        if on_wait is not None:
            on_wait("waiting for the last attempt to end")
        time.sleep(0.5)


def _has_living_job(record: RunRecord) -> bool:
    """Whether a run's own job, not that of the sweep it is a trial of, goes on."""
    is_own = is_job_of(record.tags.get("dab.job_id", ""), record.run_id)
    return is_own and _job_status(record) in LIVING_JOBS


def read_logs(
    uri: str, reference: str, *, follow: bool = False, on_note: Callable[[str], None] | None = None
) -> Iterator[str]:
    """Yield the text of the run's job log, with `follow` until the job has ended.

    Args:
        uri: Tracking server.
        reference: The run.
        follow: Go on until the job has ended.
        on_note: Told when the connection to the cluster is lost, and when it is back.

    Raises:
        DabError: The cluster that ran the job is gone.
    """
    record = tracking.find_run(uri, reference)
    job_id, target = record.tags.get("dab.job_id"), target_of(record)
    if job_id is not None and target.jobs_url and job_status(target, job_id) is not None:
        yield from follow_job(target, job_id, on_note) if follow else [job_log(target, job_id)]
        return
    kept = home_folder("logs") / "ray-session" / f"job-driver-{job_id}.log"
    if not kept.exists():
        raise DabError(
            f"{record.name}: its log was kept by a cluster that is gone. Its record is in {folder_of(record).location}."
        )
    yield kept.read_text(errors="replace")


def _job_status(record: RunRecord) -> str | None:
    job_id, target = record.tags.get("dab.job_id"), target_of(record)
    # A queued run gets its job's name a moment before the cluster gets the job.
    is_being_sent = record.status == "queued" and time.time() - sent_at(record) < _SUBMISSION_S
    unknown = "PENDING" if is_being_sent else None
    if job_id is None or not target.jobs_url:
        return unknown
    try:
        return job_status(target, job_id) or unknown
    except DabError as error:
        if target.is_embedded:
            raise
        return REFUSED if isinstance(error, InvalidInputError) else UNREACHABLE


def _why_queued(record: RunRecord) -> str:
    try:
        return queue.reason_of(target_of(record), record.tags.get("dab.job_id", ""))
    except DabError:
        return ""


def _stoppable(current: RunStatus) -> list[RunFolder]:
    folder = RunFolder.of(current.folder)
    return [folder, *(folder.children("trials") if current.kind == "sweep" else [])]


def _ends_within(uri: str, run_id: str, grace_s: float, on_wait: Callable[[str], None] | None) -> bool:
    deadline = time.monotonic() + grace_s
    while time.monotonic() < deadline:
        if tracking.find_run(uri, run_id).status in ENDED:
            return True
        if on_wait is not None:
            on_wait("waiting for the last checkpoint")
        time.sleep(0.5)
    return False
