"""`dab demo`: the whole product on real handwritten digits, on this machine, in a few minutes.

Shards, training with two workers, a small search, every run in MLflow, a packed model that is checked against the
trained one.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from dabnn.checkpoints import BEST_METRIC
from dabnn.data import build_dataset
from dabnn.errors import DabError
from dabnn.run_folder import RunFolder
from orchestrator import tracking
from orchestrator.config import Config, load_config, with_overrides
from orchestrator.deliver import evaluate_file, export_run
from orchestrator.home import home
from orchestrator.job import Job
from orchestrator.jobs_api import follow_job
from orchestrator.provenance import PROGRAM_ROOT
from orchestrator.resolve import model_table
from orchestrator.runs import RunStatus, status
from orchestrator.submit import submit
from orchestrator.target import Target

EXAMPLE = PROGRAM_ROOT / "examples" / "digits.yaml"


@dataclass(frozen=True)
class DemoRow:
    """One line of the closing table.

    Attributes:
        trial: Name of the run.
        layers: First and last layer with binary weights.
        schedule: Learning-rate schedule.
        top1: Accuracy on held-out digits, percent.
        packed_bytes: Size of the packed model.
    """

    trial: str
    layers: str
    schedule: str
    top1: float
    packed_bytes: int


@dataclass(frozen=True)
class DemoResult:
    """What the demo leaves behind.

    Attributes:
        rows: The trained run and the trials.
        best: Name of the exported run.
        best_run_id: Its id.
        file: The packed model.
        export: What `dab export` reported.
        evaluation: What `dab evaluate` measured on the packed file.
        tracking_uri: Where the runs are recorded.
    """

    rows: list[DemoRow]
    best: str
    best_run_id: str
    file: str
    export: dict[str, Any]
    evaluation: dict[str, Any]
    tracking_uri: str


def run_demo(say: Callable[[str], None], on_wait: Callable[[str], None]) -> DemoResult:
    """Run the demo; `say` takes each line of progress, `on_wait` what is waited for.

    Raises:
        DabError: A part failed; its message says which.
    """
    data = home() / "data" / "digits"
    say("1/5 building shards of 1,797 handwritten digits")
    build_dataset("builtin:digits", data)
    config = with_overrides(load_config(EXAMPLE), {"data.train": str(data)})
    say("2/5 starting the cluster and the experiment tracker, then training with 2 workers")
    trained = _finish(*submit(config, on_wait=on_wait), say)
    say("3/5 searching over layers, schedule and learning rate")
    swept = _finish(*submit(_sweep_config(config), sweep=True, on_wait=on_wait), say)
    runs = [trained, *_trials(swept)]
    best = max(runs, key=_best_top1)
    say(f"4/5 packing the best run, {best.name}")
    file = home() / "demo" / "digits.safetensors"
    export = export_run(best.tracking_uri, best.run_id, file)
    say("5/5 evaluating the packed file on the held-out digits")
    evaluation = evaluate_file(file, data)
    rows = [_row(run) for run in runs]
    return DemoResult(rows, best.name, best.run_id, str(file), export, evaluation, best.tracking_uri)


def _sweep_config(config: Config) -> Config:
    return config.model_copy(
        update={"name": f"{config.name}-sweep", "cluster": config.cluster.model_copy(update={"num_workers": 1})}
    )


def _finish(job: Job, target: Target, say: Callable[[str], None]) -> RunStatus:
    for text in follow_job(target, job.job_id):
        for line in text.splitlines():
            say(f"    {line}")
    ended = status(job.tracking_uri, job.run_id)
    if ended.status != "finished":
        raise DabError(f"{ended.name}: {ended.status}: {ended.message}. `dab logs {ended.run_id[:8]}` shows its log.")
    return ended


def _trials(sweep: RunStatus) -> Iterator[RunStatus]:
    records = tracking.find_runs(sweep.tracking_uri, parent=sweep.run_id)
    for record in sorted(records, key=lambda record: record.name):
        trial = status(sweep.tracking_uri, record.run_id)
        if trial.checkpoints:
            yield trial


def _row(run: RunStatus) -> DemoRow:
    config = Job.load(RunFolder.of(run.folder)).parsed_config()
    table = model_table(config)
    binary = [row.index for row in table.layers if row.binary_weights]
    layers = f"{binary[0]}-{binary[-1]}" if binary else "none"
    return DemoRow(run.name, layers, config.schedule.name, _best_top1(run), table.packed_bytes)


def _best_top1(run: RunStatus) -> float:
    """Return the accuracy of the checkpoint that an export would take, percent."""
    return max(float(checkpoint["metrics"].get(BEST_METRIC, 0.0)) for checkpoint in run.checkpoints)
