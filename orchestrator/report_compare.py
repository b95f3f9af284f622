"""The comparison of runs: what differs in their configurations, where they ended, and how they learned."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from dabnn.errors import InvalidInputError
from dabnn.run_folder import RunFolder, headline
from orchestrator.report_charts import (
    BLUE,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    WIDTH,
    Figure,
    figure,
    measure_title,
    named,
)
from orchestrator.report_page import Grid, Page, Tiles

_COLORS = [BLUE, RED, GREEN, PURPLE, ORANGE, SKY, INK]
_DASHES = [[1, 0], [6, 3], [2, 2]]
_CURVES = ("val_top1", "val_loss", "train_loss")
_SHOWN = ("val_top1", "val_top5", "val_loss", "train_loss", "images_per_s", "epoch_s")


@dataclass(frozen=True)
class Compared:
    """A run beside others.

    Attributes:
        name: Its name, or the beginning of its id beside it where two have one name.
        run_id: MLflow run.
        config: Its configuration, dotted key -> value.
        curve: (epoch, metrics) of each finished epoch.
    """

    name: str
    run_id: str
    config: dict[str, Any]
    curve: tuple[tuple[int, dict[str, float]], ...]

    @property
    def last(self) -> dict[str, float]:
        """Metrics of the last epoch."""
        return self.curve[-1][1]

    @property
    def best_top1(self) -> float | None:
        """The best `val_top1` of any epoch."""
        found = [metrics["val_top1"] for _, metrics in self.curve if math.isfinite(metrics.get("val_top1", math.nan))]
        return max(found, default=None)


def read_runs(folders: Sequence[RunFolder]) -> list[Compared]:
    """Return the runs in these folders.

    Raises:
        InvalidInputError: There are fewer than two different ones, or one has not finished an epoch.
    """
    if len({folder.location for folder in folders}) < 2:
        raise InvalidInputError("RUN: a comparison needs two runs or more. Name another one; `dab runs` lists them.")
    jobs = [folder.load_json("job.json") for folder in folders]
    names = [str(job.get("name", folder.root.name)) for job, folder in zip(jobs, folders, strict=True)]
    runs = []
    for folder, job, name in zip(folders, jobs, names, strict=True):
        curve = tuple((int(line["step"]), headline(line["metrics"])) for line in folder.metrics())
        if not curve:
            raise InvalidInputError(f"{name}: has not finished an epoch, so there is nothing to compare.")
        run_id = str(job.get("run_id", ""))
        shown = name if names.count(name) == 1 else f"{name} ({run_id[:8]})"
        runs.append(Compared(shown, run_id, dict(_flat(job.get("config") or {})), curve))
    return runs


def differences(runs: Sequence[Compared]) -> Grid:
    """Return the keys in which the configurations differ, with the value of each run; the name is not one of them."""
    keys = [key for key in dict.fromkeys(key for run in runs for key in run.config) if key != "name"]
    rows = [
        [key, *(run.config.get(key) for run in runs)]
        for key in keys
        if len({repr(run.config.get(key)) for run in runs}) > 1
    ]
    text = "Every key in which they differ." if rows else "They have one and the same configuration."
    return Grid("differences", "Configurations", text, ["key", *(run.name for run in runs)], rows)


def results(runs: Sequence[Compared]) -> Grid:
    """Return the metrics of each run's last epoch."""
    shown = [metric for metric in _SHOWN if any(metric in run.last for run in runs)]
    rows = [[run.name, len(run.curve), run.best_top1, *(run.last.get(metric) for metric in shown)] for run in runs]
    best = [run.best_top1 for run in runs]
    marked = frozenset(
        index for index, value in enumerate(best) if value is not None and value == max(filter(None, best))
    )
    text = "Metrics of the last epoch, and the best top-1 of any epoch, the highest of which is marked."
    return Grid("results", "Results", text, ["run", "epochs", "best val_top1", *shown], rows, marked)


def compare_page(runs: Sequence[Compared]) -> Page:
    """Return the comparison of runs as a page."""
    ranked = sorted(runs, key=lambda run: -(run.best_top1 or 0.0))
    lead = (ranked[0].best_top1 or 0.0) - (ranked[1].best_top1 or 0.0)
    summary = f"{ranked[0].name} has the best validation top-1, {ranked[0].best_top1 or 0:.2f} %"
    summary += f", {lead:.2f} points before {ranked[1].name}." if lead else f", as has {ranked[1].name}."
    curves = _curves(runs)
    parts: list[Figure | Grid | Tiles] = [results(runs), *([curves] if curves else []), differences(runs)]
    return Page(" and ".join(run.name for run in runs) if len(runs) < 4 else f"{len(runs)} runs", summary, {}, parts)


def _curves(runs: Sequence[Compared]) -> Figure | None:
    rows = [
        {"run": run.name, "epoch": epoch, "metric": metric, "at": metrics[metric]}
        for run in runs
        for epoch, metrics in run.curve
        for metric in _CURVES
        if metric in metrics
    ]
    metrics = [metric for metric in _CURVES if any(row["metric"] == metric for row in rows)]
    if not metrics:
        return None
    names = [run.name for run in runs]
    colors = [_COLORS[index % len(_COLORS)] for index in range(len(names))]
    dashes = [_DASHES[index // len(_COLORS) % len(_DASHES)] for index in range(len(names))]
    legend = alt.Legend(title=None, orient="top", columns=2, labelLimit=360)
    charts = [
        alt.Chart(named("points"))
        .transform_filter(alt.datum.metric == metric)
        .mark_line(strokeWidth=2, point=alt.OverlayMarkDef(size=16))
        .encode(
            x=alt.X("epoch:Q", axis=alt.Axis(tickMinStep=1, grid=False)),
            y=alt.Y("at:Q", title=measure_title(metric), scale=alt.Scale(zero=False)),
            color=alt.Color("run:N", scale=alt.Scale(domain=names, range=colors), legend=legend),
            strokeDash=alt.StrokeDash("run:N", scale=alt.Scale(domain=names, range=dashes), legend=legend),
            tooltip=["run:N", "epoch:Q", alt.Tooltip("at:Q", title=measure_title(metric), format=".5~g")],
        )
        .properties(width=WIDTH // 3 - 66, height=240)
        for metric in metrics
    ]
    return figure("curves", "Learning curves", "Point at a line for its run.", alt.hconcat(*charts), points=rows)


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in values.items():
        pairs += _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
    return pairs
