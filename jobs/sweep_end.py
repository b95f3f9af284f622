"""How a sweep ends: its result, the best trial or the front as its own record, its report, and a note in words."""

import logging
from collections.abc import Callable
from typing import Any

from dabnn.errors import DabError
from dabnn.run_folder import headline
from jobs.ledger import trial_folder, trial_name
from jobs.train import say
from orchestrator import tracking
from orchestrator.config_search import Search
from orchestrator.job import Job
from orchestrator.study import Study, StudyTrial

_log = logging.getLogger(__name__)
_MAX_REGISTERED = 20  # each is exported and compared with the trained network
_MAX_TAGGED = 100  # trials of a front; what a tag holds is cut
_NOTE = "mlflow.note.content"  # shown at the top of the run's page


def conclude(job: Job, search: Search, study: Study, run_of: Callable[[int], str | None]) -> dict[str, Any]:
    """Record what a sweep has found, and return its result.

    Args:
        job: The sweep.
        search: What was searched.
        study: Its trials.
        run_of: Returns the MLflow run of a trial, if it has one.
    """
    trials, was_stopped = study.trials(), job.run_folder.is_stop_requested()
    status = "stopped" if was_stopped else "finished"
    front = [trials[number] for number in study.front()]
    if not front:
        why = nothing_found(job, search, trials)
        return {"status": "stopped" if was_stopped else "failed", "message": why, "metrics": {}}
    front = sorted(front, key=lambda trial: _rank(trial, search))
    best, names = front[0], [trial_name(job, trial.number) for trial in front]
    metrics = {key: value for key, value in headline(best.metrics).items() if key != "epoch"}
    found = (
        f"best trial {names[0]}" if len(search.objectives) == 1 else f"front of {len(front)}: {', '.join(names[:5])}"
    )
    more = ", ..." if len(search.objectives) > 1 and len(front) > 5 else ""
    message = found + more + (" (stopped before all trials ran)" if was_stopped else "")
    _record(job, best, front, metrics, run_of)
    if search.register_best:
        _register(job, search, front, run_of)
    return {"status": status, "message": message, "metrics": metrics, "best": run_of(best.number), "front": names}


def nothing_found(job: Job, search: Search, trials: list[StudyTrial]) -> str:
    """Return why a sweep has no best trial, in words."""
    failed = [trial for trial in trials if trial.state == "failed"]
    finished = [trial for trial in trials if trial.state == "finished"]
    if failed and not finished:
        count = "every trial" if len(failed) == len(trials) else f"{len(failed)} of {len(trials)} trials"
        return f"{count} failed; the first, {trial_name(job, failed[0].number)}: {failed[0].reason.rstrip('.')}."
    if finished:
        limits = " and ".join(search.constraints)
        closest = min(finished, key=lambda trial: sum(max(0.0, _excess(trial, limit)) for limit in search.limits))
        has = ", ".join(
            f"{limit.metric} {closest.metrics.get(limit.metric, float('nan')):g}" for limit in search.limits
        )
        return f"no trial keeps {limits}; the closest, {trial_name(job, closest.number)}, has {has}."
    return "stopped before a trial came to its end; `dab resume` goes on with them"


def _excess(trial: StudyTrial, limit: Any) -> float:
    return float(limit.excess(trial.metrics[limit.metric])) if limit.metric in trial.metrics else 1.0


def _rank(trial: StudyTrial, search: Search) -> float:
    first = search.objectives[0]
    return -trial.metrics[first.metric] if first.mode == "max" else trial.metrics[first.metric]


def _record(
    job: Job,
    best: StudyTrial,
    front: list[StudyTrial],
    metrics: dict[str, float],
    run_of: Callable[[int], str | None],
) -> None:
    """Tell MLflow of the result and have the report made; the sweep has finished whatever fails of that."""
    from orchestrator.report import log_report, sweep_words

    uri, run_id = job.tracking_uri, job.run_id
    runs = [run for trial in front if (run := run_of(trial.number))]
    step = best.number
    tags = {"dab.front": ",".join(runs[:_MAX_TAGGED])} | ({"dab.best_run": runs[0]} if run_of(best.number) else {})
    _tolerate("the best trial", lambda: tracking.set_tags(uri, run_id, tags))
    _tolerate("the best metrics", lambda: tracking.log_metrics(uri, run_id, metrics, step=step))
    say("making the report")
    _tolerate("the note", lambda: tracking.set_tags(uri, run_id, {_NOTE: sweep_words(job.run_folder)}))
    _tolerate("the report", lambda: log_report(uri, run_id, job.run_folder))


def _register(job: Job, search: Search, front: list[StudyTrial], run_of: Callable[[int], str | None]) -> None:
    """Make the best trial, or the front, versions of a model in MLflow's registry."""
    from orchestrator.registry import Entry, model_name, register_front

    entries = [
        Entry(run_of(trial.number) or "", trial_folder(job, trial.number), trial.metrics, trial_name(job, trial.number))
        for trial in front[:_MAX_REGISTERED]
    ]
    left = f" ({len(front) - len(entries)} more of the front: `dab register`)" if len(front) > len(entries) else ""
    say(f"registering {len(entries)} packed models as {model_name(job.name)}{left}")
    _tolerate(
        "the models",
        lambda: register_front(
            job.tracking_uri, job.run_id, entries, search.objectives, model=model_name(job.name), say=say
        ),
    )


def _tolerate(what: str, call: Callable[[], object]) -> None:
    try:
        call()
    except DabError as error:
        say(f"{what} could not be recorded ({error}); the sweep's folder keeps the record, `dab report` makes one")
    except Exception:  # noqa: BLE001 - a sweep of days must not be lost to a bug in its report
        _log.exception("%s could not be recorded", what)
