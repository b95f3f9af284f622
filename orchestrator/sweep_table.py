"""The table that a person watches while a sweep runs: trials that run, the best or the front, and how long it takes.

It is made of what the tracker knows, so that it is the same for a sweep on another machine.
"""

import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dabnn.errors import DabError
from dabnn.run_folder import RunFolder
from orchestrator import tracking
from orchestrator.config_search import Search
from orchestrator.job import Job
from orchestrator.output import Table, duration_text
from orchestrator.sweep_record import Aim, Limit, TrialRecord, has_all, pareto
from orchestrator.tracking import RunRecord

if TYPE_CHECKING:
    from rich.console import RenderableType

_POLL_S = 2.0
_NUM_RECENT, _NUM_BEST, _NUM_KEYS = 6, 8, 4
_LINES_OF_TRIALS = ("trial ",)  # of the job's log, which say what the table shows


@dataclass(frozen=True)
class Standing:
    """Where a sweep stands.

    Attributes:
        num_ended: Trials that have ended.
        num_running: Trials that run.
        num_trials: Trials that the sweep may have.
        left_s: Seconds that the rest will take, from the trials so far; None before one has ended.
        table: The trials that a person looks at: best, running, newest.
    """

    num_ended: int
    num_running: int
    num_trials: int
    left_s: float | None
    table: Table

    @property
    def line(self) -> str:
        """All but the table in one line."""
        left = "" if self.left_s is None or not self.num_running else f", about {duration_text(self.left_s)} left"
        return f"{self.num_ended} of {self.num_trials} trials ended, {self.num_running} running{left}"


def standing(records: Iterable[RunRecord], search: Search) -> Standing:
    """Return where a sweep stands.

    Args:
        records: Its trials, as the tracker has them.
        search: What is searched.
    """
    runs = {record.run_id: record for record in records}
    aims = [Aim(each.metric, each.mode) for each in search.objectives]
    limits = [Limit.parse(text) for text in search.constraints]
    trials = sorted((_trial(record) for record in runs.values()), key=lambda trial: trial.number)
    over = [runs[str(trial.run_id)] for trial in trials if trial.state not in ("running", "queued")]
    running = [trial for trial in trials if trial.state == "running"]
    took = [record.end_time - record.start_time for record in over if record.end_time]
    allowed = [trial for trial in trials if trial.state == "finished" and has_all(trial, aims)]
    allowed = [trial for trial in allowed if all(limit.holds(trial.measures) for limit in limits)]
    best = pareto(allowed, aims)
    remaining = max(0, search.num_trials - len(over))
    left_s = sum(took) / len(took) * remaining / max(1, len(running)) if took else None
    recent = [trial for trial in trials if trial not in best and trial not in running][-_NUM_RECENT:]
    shown = [*best[:_NUM_BEST], *sorted([*running, *recent], key=lambda trial: trial.number)]
    numbers = {trial.number for trial in best}
    rows = [_row(trial, runs[str(trial.run_id)], aims, _keys(search), numbers) for trial in shown]
    styles = ["bold" if trial.number in numbers else "" for trial in shown]
    columns = ["", "trial", "state", *(aim.metric for aim in aims), *(_short(key) for key in _keys(search))]
    return Standing(len(over), len(running), search.num_trials, left_s, Table(columns, rows, styles))


def watch(job: Job, chunks: Iterable[str]) -> None:
    """Show a sweep on the terminal until its log ends; lines that are not about trials stand above.

    Args:
        job: The sweep.
        chunks: Its log, as it grows.
    """
    from rich.console import Console
    from rich.live import Live

    search = job.parsed_config().search
    if search is None:
        raise DabError(f"{job.name}: has no search, so there are no trials to show.")
    over = threading.Event()
    with Live(console=Console(stderr=True), auto_refresh=False, transient=False) as live:
        thread = threading.Thread(target=_poll, args=(job, search, live.update, over), name="table", daemon=True)
        thread.start()
        try:
            for line in (line for chunk in chunks for line in chunk.splitlines()):
                if not line.startswith(_LINES_OF_TRIALS):
                    live.console.print(line, markup=False, highlight=False)
        finally:
            over.set()
            thread.join()


def _poll(job: Job, search: Search, show: Callable[..., Any], over: threading.Event) -> None:
    is_last = False
    while True:
        with suppress(DabError):  # the tracker is away: what was seen last stays
            records = tracking.find_runs(job.tracking_uri, parent=job.run_id)
            show(_drawn(standing(records, search)), refresh=True)
        if is_last:
            return
        is_last = over.wait(_POLL_S)


def _drawn(found: Standing) -> "RenderableType":
    from rich.console import Group
    from rich.text import Text

    return Group(found.table, Text(found.line))


def _trial(record: RunRecord) -> TrialRecord:
    number = record.tags.get("dab.trial", "")
    state: Any = record.status
    if record.status == "finished" and record.tags.get("dab.message") == "stopped early":
        state = "stopped early"
    return TrialRecord(
        number=int(number) if number.isdecimal() else 0,
        name=record.name,
        run_id=record.run_id,
        folder=RunFolder(Path(record.tags.get("dab.folder", ""))),
        state=state,
        message=record.tags.get("dab.message", ""),
        values={},
        measures=dict(record.metrics),
    )


def _row(
    trial: TrialRecord, record: RunRecord, aims: Sequence[Aim], keys: Sequence[str], best: set[int]
) -> list[object]:
    scores: list[object] = [trial.measures.get(aim.metric, "") for aim in aims]
    values: list[object] = [_value(record.params.get(key, "")) for key in keys]
    return ["*" if trial.number in best else "", trial.name, trial.state, *scores, *values]


def _value(text: str) -> str:
    try:
        return text if text.lstrip("-").isdecimal() else f"{float(text):.4g}"
    except ValueError:
        return text


def _keys(search: Search) -> list[str]:
    return list(search.space)[:_NUM_KEYS]


def _short(key: str) -> str:
    return key.rpartition(".")[2] if not key.endswith(".name") else key.split(".")[-2]
