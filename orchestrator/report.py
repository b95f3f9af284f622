"""`dab report` and `dab compare`: from the names of runs to files that show them; a sweep logs its report itself."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dabnn.run_folder import RunFolder
from orchestrator import tracking
from orchestrator.found_runs import folder_of
from orchestrator.output import Report, Table, View
from orchestrator.report_compare import compare_page, differences, read_runs, results
from orchestrator.report_page import Grid, Page, write
from orchestrator.report_run import OnBatch, run_page
from orchestrator.report_sweep import sweep_page, with_sizes, words
from orchestrator.sweep_record import SweepRecord

ARTIFACTS = "report"


def report(uri: str, reference: str, folder: Path | None, on_batch: OnBatch | None = None) -> View:
    """Write the report of a sweep or a run.

    Args:
        uri: The tracking store.
        reference: The sweep or run.
        folder: Where the files go; None for one in the current folder, named after it.
        on_batch: Told how many validation images of how many were answered.

    Returns:
        The keys that `dab report --json` prints, and a text.

    Raises:
        InvalidInputError: There is no such run, or nothing to report of it yet.
    """
    record = tracking.find_run(uri, reference)
    place = folder or Path(f"{record.name}-report")
    found = folder_of(record)
    about = {"run_id": record.run_id, "name": record.name, "kind": record.tags.get("dab.kind", "train")}
    if about["kind"] == "sweep":
        page, more = _of_sweep(found, uri)
    else:
        page, more = run_page(found, on_batch), {}
    return _view(page, place, about | more)


def compare(uri: str, references: Sequence[str], folder: Path | None) -> View:
    """Write the comparison of runs.

    Args:
        uri: The tracking store.
        references: The runs.
        folder: Where the files go; None for `comparison` in the current folder.

    Raises:
        InvalidInputError: There are no such runs, they are one and the same, or one has not finished an epoch.
    """
    runs = read_runs([folder_of(tracking.find_run(uri, reference)) for reference in references])
    page, differing, ended = compare_page(runs), differences(runs), results(runs)
    written = write(page, folder or Path("comparison"))
    data = {
        "runs": [
            {"name": run.name, "run_id": run.run_id, "epochs": len(run.curve), "metrics": run.last} for run in runs
        ],
        "differences": [dict(zip(differing.columns, row, strict=True)) for row in differing.rows],
    }
    text = Report(
        [_table(ended), "", _table(differing) if differing.rows else differing.text, "", f"page: {written['html']}"]
    )
    return data | written, text


def log_report(uri: str, run_id: str, folder: RunFolder) -> None:
    """Log the report of a sweep, and of what its folder holds, among the artifacts of its run, under `report/`.

    Raises:
        InvalidInputError: No trial has finished.
        DabError: The tracker refuses it.
    """
    page, _ = _of_sweep(folder.fresh(), uri)
    with TemporaryDirectory(prefix="dab-report-") as place:
        written = write(page, Path(place))
        for file in [written["html"], *written["png"], *written["csv"]]:
            tracking.log_file(uri, run_id, Path(file), ARTIFACTS)


def sweep_words(folder: RunFolder) -> str:
    """Return the result of the sweep in a folder in words.

    Raises:
        InvalidInputError: No trial has finished.
    """
    return words(with_sizes(SweepRecord.read(folder.fresh())))


def _of_sweep(folder: RunFolder, uri: str) -> tuple[Page, dict[str, Any]]:
    record = with_sizes(SweepRecord.read(folder.fresh()))
    page = sweep_page(record, uri)
    front = [
        {"number": trial.number, "name": trial.name, "run_id": trial.run_id} | _measures(trial.measures, record)
        for trial in record.front()
    ]
    return page, {"num_trials": len(record.trials), "trials": record.counts(), "front": front}


def _measures(measures: dict[str, float], record: SweepRecord) -> dict[str, float]:
    return {aim.metric: measures[aim.metric] for aim in record.aims}


def _view(page: Page, folder: Path, about: dict[str, Any]) -> View:
    written = write(page, folder)
    beside = ", ".join(Path(file).name for file in [*written["png"], *written["csv"]])
    text = f"{page.summary}\npage: {written['html']}\nbeside it: {beside}"
    return about | {"summary": page.summary} | written, text


def _table(grid: Grid) -> Table:
    return Table(grid.columns, grid.rows)
