"""The runs that this machine has sent: which tracker knows a run, and which cluster its job is on.

The file `sent.jsonl` of DAB_HOME only saves typing: `dab status RUN` finds a run that is recorded elsewhere without
`--address`; the tracker stays the record.
"""

import json
import time
from dataclasses import asdict, dataclass, replace

from dabnn.errors import InvalidInputError
from orchestrator.clusters_file import FILE, known_clusters
from orchestrator.home import home, home_path
from orchestrator.job import Job
from orchestrator.target import Target, jobs_url, resolve_target
from orchestrator.tracking import RunRecord

_SENT = "sent.jsonl"
_SENT_AT = "dab.sent_at"


@dataclass(frozen=True)
class SentRun:
    """A run that was sent from here.

    Attributes:
        run_id: MLflow run.
        name: Its name.
        tracking_uri: MLflow server that knows it; empty for this machine's own, whose address may change.
        target: Name of the cluster.
        jobs_url: URL of its Jobs API; empty for the embedded one.
    """

    run_id: str
    name: str
    tracking_uri: str
    target: str
    jobs_url: str


def sent_run(job: Job, tracking_uri: str | None) -> SentRun:
    """Return the entry for a job.

    Args:
        job: The run.
        tracking_uri: MLflow server that the user named; None for this machine's own.
    """
    return SentRun(job.run_id, job.name, tracking_uri or "", job.target, job.whereabouts["dab.jobs_url"])


def remember(run: SentRun) -> None:
    """Add a run to the file; an entry of before counts no more."""
    with (home() / _SENT).open("a", encoding="utf-8") as file:
        file.write("\n" + json.dumps(asdict(run)) + "\n")  # a line that was torn by a kill must not swallow this one


def sent_runs() -> list[SentRun]:
    """Return the runs that were sent from here, the newest last; lines that cannot be read are left out."""
    try:
        lines = (home_path() / _SENT).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    found: dict[str, SentRun] = {}
    for line in lines:
        try:
            run = SentRun(**json.loads(line))
        except (ValueError, TypeError):
            continue
        found.pop(run.run_id, None)
        found[run.run_id] = run
    return list(found.values())


def tracker_of(reference: str) -> str | None:
    """Return the tracker of a run that was sent from here, by id, beginning of an id, or name.

    Returns:
        None for this machine's own tracker, or when no run matches.

    Raises:
        InvalidInputError: Runs on several trackers match.
    """
    matching = [run for run in sent_runs() if reference and (run.run_id.startswith(reference) or run.name == reference)]
    trackers = {run.tracking_uri: run for run in matching}
    if len(trackers) > 1:
        known = ", ".join(f"{run.run_id[:8]} on {uri or 'this machine'}" for uri, run in trackers.items())
        raise InvalidInputError(f"run: {reference!r} fits runs of {len(trackers)} trackers: {known}. Use an id.")
    return next(iter(trackers), None) or None


def tracker_at(target: Target) -> str:
    """Return where the runs of a cluster elsewhere are recorded.

    Raises:
        InvalidInputError: `clusters.toml` does not say, and no run was sent there from here.
    """
    sent = [run.tracking_uri for run in sent_runs() if target.jobs_url == run.jobs_url and run.tracking_uri]
    uri = target.tracking_uri or (sent[-1] if sent else None)
    if uri is None:
        raise InvalidInputError(
            f"--tracking-uri: where the runs of {target} are recorded is not known here. Give its MLflow server, or "
            "set tracking in clusters.toml."
        )
    return uri


def target_of(record: RunRecord) -> Target:
    """Return the cluster that a run was sent to; a cluster of `clusters.toml` is found by its URL.

    Whoever may write to the tracker chooses the URL: one that is not known here gets no token.
    """
    target = resolve_target(record.tags.get("dab.jobs_url") or None)
    named = (jobs_url(f"{FILE}: [{name}] address", entry.address) for name, entry in known_clusters().items())
    known = {*named, *(run.jobs_url for run in sent_runs())}
    return target if target.is_embedded or target.jobs_url in known else replace(target, token=None)


def being_sent() -> dict[str, str]:
    """Return the tag of a run that is about to be handed to a cluster, which does not know it yet."""
    return {_SENT_AT: f"{time.time():.0f}"}


def sent_at(record: RunRecord) -> float:
    """Return when a run was about to be handed to its cluster, in seconds since 1970; 0 where that was not noted."""
    return float(record.tags.get(_SENT_AT, "0"))
