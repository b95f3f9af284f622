"""Where this machine has sent runs: which tracker knows a run, and which cluster its job is on.

Runs of the embedded cluster are recorded by this machine's tracker and need no entry. The file `sent.jsonl` of DAB_HOME
only saves typing: `dab status RUN` finds a run elsewhere without `--address`; the tracker stays the record.
"""

import json
from dataclasses import asdict, dataclass

from dabnn.errors import InvalidInputError
from orchestrator.home import home, home_path
from orchestrator.target import Target, resolve_target
from orchestrator.tracking import RunRecord

_FILE = "sent.jsonl"


@dataclass(frozen=True)
class SentRun:
    """A run that was sent elsewhere.

    Attributes:
        run_id: MLflow run.
        name: Its name.
        tracking_uri: MLflow server that knows it.
        target: Name of the cluster.
        jobs_url: URL of its Jobs API.
    """

    run_id: str
    name: str
    tracking_uri: str
    target: str
    jobs_url: str


def remember(run: SentRun) -> None:
    """Add a run to the file; an entry of before counts no more."""
    with (home() / _FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(run)) + "\n")


def sent_runs() -> list[SentRun]:
    """Return the runs that were sent elsewhere, the newest last; lines that cannot be read are left out."""
    try:
        lines = (home_path() / _FILE).read_text(encoding="utf-8").splitlines()
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
    """Return the tracker of a run that was sent elsewhere, by id, beginning of an id, or name; None if none was.

    Raises:
        InvalidInputError: Runs on several trackers match.
    """
    matching = [run for run in sent_runs() if reference and (run.run_id.startswith(reference) or run.name == reference)]
    trackers = list(dict.fromkeys(run.tracking_uri for run in matching))
    if len(trackers) > 1:
        raise InvalidInputError(
            f"run: {reference!r} fits runs on {len(trackers)} trackers: {', '.join(trackers)}. Use an id, or "
            "--tracking-uri."
        )
    return trackers[0] if trackers else None


def tracker_at(target: Target) -> str:
    """Return where the runs of a cluster elsewhere are recorded.

    Raises:
        InvalidInputError: `clusters.toml` does not say, and no run was sent there from here.
    """
    sent = [run.tracking_uri for run in sent_runs() if target.jobs_url == run.jobs_url]
    uri = target.tracking_uri or (sent[-1] if sent else None)
    if uri is None:
        raise InvalidInputError(
            f"--tracking-uri: where the runs of {target} are recorded is not known here. Give its MLflow server, or "
            "set tracking in clusters.toml."
        )
    return uri


def target_of(record: RunRecord) -> Target:
    """Return the cluster that a run was sent to; a cluster of `clusters.toml` is found by its URL."""
    return resolve_target(record.tags.get("dab.jobs_url") or None)
