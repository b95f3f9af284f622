"""The report of a sweep: which trials nothing beats, what they have in common, and how each trial learned.

Everything comes from a `SweepRecord`. Leaves out how charts of single things are drawn (`report_sweep_charts`).
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dabnn.errors import DabError
from dabnn.models import ModelTable
from orchestrator.config import Config
from orchestrator.report_charts import Rows, key_titles, measure_title, measured, short
from orchestrator.report_page import Cell, Grid, Page
from orchestrator.report_sweep_charts import (
    PlanRow,
    curves,
    history,
    importance,
    layer_plans,
    parallel,
    slices,
    trade_off,
)
from orchestrator.resolve import model_table
from orchestrator.sweep_importance import importances
from orchestrator.sweep_record import Aim, SweepRecord, TrialRecord, has_all, pareto

_MAX_PLANS = 20
_SIZE = Aim("packed_bytes", "min")
# Of what a trial measures, the columns of the table; the rest is in the run itself.
_SHOWN = ("val_top1", "val_top5", "val_loss", "train_loss", "packed_bytes", "bit_ops", "latency_ms")


def sweep_page(record: SweepRecord, link: str | None = None) -> Page:
    """Return the report of a sweep.

    Args:
        record: The sweep; trials that lack sizes are completed from their configurations.
        link: Address of the tracker, where runs are linked to; None for no links.

    Raises:
        InvalidInputError: No trial has finished.
    """
    record = with_sizes(record)
    record.require_trials()
    aims, shares = _aims_shown(record), importances(record)
    shown = pareto(record.allowed(), aims)
    rows = _rows(record, shown, link)
    figures = [
        *trade_off(rows, aims, record.limits),
        history(rows, record.aims[0]),
        parallel(rows, record),
        importance(shares, record.aims[0]),
        slices(rows, record),
        curves(record, {trial.number for trial in shown}),
        layer_plans(_plan_rows(shown[:_MAX_PLANS], record), len(shown)),
    ]
    counts = ", ".join(f"{number} {state}" for state, number in record.counts().items())
    facts = {
        "trials": f"{len(record.trials)} ({counts})",
        "objectives": ", ".join(f"{aim.mode} {measure_title(aim.metric)}" for aim in record.aims),
        "constraints": ", ".join(map(str, record.limits)) or "none",
        "algorithm": (record.config.get("search") or {}).get("algorithm", "-"),
        "model": (record.config.get("model") or {}).get("name", "-"),
        "data": (record.config.get("data") or {}).get("train", "-"),
    }
    table = _table(record, shown, link)
    return Page(
        f"Sweep {record.name}",
        words(record, shares),
        facts,
        [*(figure for figure in figures if figure is not None), table],
    )


def words(record: SweepRecord, shares: Mapping[str, float] | None = None) -> str:
    """Return what came out of a sweep, in sentences; nothing where no trial has finished.

    Args:
        record: The sweep.
        shares: Its `importances`, where they are known already.
    """
    front, finished = record.front(), record.finished()
    if not finished:
        return ""
    if not front:
        return f"None of the {len(finished)} finished trials keeps {' and '.join(map(str, record.limits))}."
    best, first = front[0], record.aims[0]
    text = f"The best of {len(finished)} finished trials is {best.name}: {_measured(best, record.aims)}."
    if "packed_bytes" in best.measures and "packed_bytes" not in {aim.metric for aim in record.aims}:
        text += f" Its packed model takes {short(best.measures['packed_bytes'])} bytes."
    if len(front) > 1:
        other = front[-1]
        text += (
            f" {len(front)} trials form the Pareto front, in which one objective is only gained by losing "
            f"in another. At its other end stands {other.name}: {_measured(other, record.aims)}."
        )
    for key, share in [*(importances(record) if shares is None else shares).items()][:1]:
        text += f" Of what was tried, {key} decides most: {100 * share:.0f} % of the variance of {first.metric}."
    return text


def with_sizes(record: SweepRecord) -> SweepRecord:
    """Return the sweep with `packed_bytes` and `bit_ops` of each trial whose configuration says them."""
    known: dict[str, dict[str, float]] = {}
    return replace(record, trials=tuple(_with_sizes(trial, known) for trial in record.trials))


def _with_sizes(trial: TrialRecord, known: dict[str, dict[str, float]]) -> TrialRecord:
    if "packed_bytes" in trial.measures or not trial.config:
        return trial
    key = repr((trial.config.get("model"), trial.config.get("binarize"), trial.config.get("stages")))
    if key not in known:
        layers = _layers(trial)
        known[key] = (
            {}
            if layers is None
            else {
                "packed_bytes": float(layers.packed_bytes),
                "bit_ops": float(sum(row.bit_ops for row in layers.layers)),
            }
        )
    return replace(trial, measures=known[key] | trial.measures)


def _layers(trial: TrialRecord) -> ModelTable | None:
    """Return the table of a trial's network; None where this version cannot read its configuration."""
    try:
        return model_table(Config.model_validate_json(json.dumps(trial.config)))
    except (DabError, ValueError):
        return None


def _aims_shown(record: SweepRecord) -> tuple[Aim, ...]:
    """Return the objectives, or the only one against size, where trials differ in it."""
    sizes = {trial.measures.get(_SIZE.metric) for trial in record.finished()}
    is_alone = len(record.aims) == 1 and record.aims[0].metric != _SIZE.metric
    return (*record.aims, _SIZE) if is_alone and None not in sizes and len(sizes) > 1 else record.aims


def _measured(trial: TrialRecord, aims: tuple[Aim, ...]) -> str:
    return ", ".join(measured(aim.metric, trial.measures[aim.metric]) for aim in aims)


def run_link(link: str | None, run_id: str | None) -> str | None:
    """Return the page of a run in the experiment browser."""
    return f"{link.rstrip('/')}/#/runs/{run_id}" if link and run_id else None


def _rows(record: SweepRecord, front: list[TrialRecord], link: str | None) -> Rows:
    """Return a row for each trial that has a value of the first objective: measures, values and what marks it."""
    on_front = {trial.number for trial in front}
    rows = []
    for trial in record.trials:
        if not has_all(trial, record.aims[:1]):
            continue
        is_allowed = all(limit.holds(trial.measures) for limit in record.limits)
        kind = "on the front" if trial.number in on_front else trial.state
        breaks = trial.state == "finished" and not is_allowed
        row: dict[str, Any] = {
            "trial": trial.number,
            "name": trial.name,
            "kind": "breaks a constraint" if breaks else kind,
        }
        url = run_link(link, trial.run_id)
        row |= {"url": url} if url else {}
        rows.append(
            row | trial.measures | {f"v{index}": _plain(trial.values.get(key)) for index, key in enumerate(record.keys)}
        )
    return rows


def _plain(value: object) -> object:
    return value if isinstance(value, int | float | str) and not isinstance(value, bool) else short(value)


def _table(record: SweepRecord, front: list[TrialRecord], link: str | None) -> Grid:
    shown = [
        metric
        for metric in dict.fromkeys([*(aim.metric for aim in record.aims), *_SHOWN])
        if any(metric in trial.measures for trial in record.trials)
    ]
    titles = key_titles(record.keys)
    on_front = {trial.number for trial in front}
    ordered = sorted(record.trials, key=lambda trial: _rank(trial, record.aims[0], on_front))
    rows = [
        [
            trial.number,
            Cell(trial.name, run_link(link, trial.run_id)),
            "on the front" if trial.number in on_front else trial.state,
            len(trial.curve),
            *(trial.measures.get(metric) for metric in shown),
            *(trial.values.get(key) for key in record.keys),
            trial.message,
        ]
        for trial in ordered
    ]
    return Grid(
        "trials",
        "Trials",
        "The front first, then by the first objective. A click on a heading sorts; a name opens the run.",
        ["trial", "run", "state", "epochs", *map(_column, shown), *(titles[key] for key in record.keys), "message"],
        rows,
        frozenset(index for index, trial in enumerate(ordered) if trial.number in on_front),
    )


def _column(metric: str) -> str:
    return metric if metric.startswith(("val_", "train_")) else measure_title(metric)


def _rank(trial: TrialRecord, aim: Aim, on_front: set[int]) -> tuple[bool, bool, float]:
    is_measured = has_all(trial, [aim])
    return trial.number not in on_front, not is_measured, aim.sign * trial.measures[aim.metric] if is_measured else 0.0


def _plan_rows(front: list[TrialRecord], record: SweepRecord) -> list[PlanRow]:
    rows = []
    for trial in front:
        table = _layers(trial)
        if table is not None:
            rows.append(PlanRow(f"trial {trial.number}: {_measured_short(trial, record)}", table.layers))
    return rows


def _measured_short(trial: TrialRecord, record: SweepRecord) -> str:
    return ", ".join(short(trial.measures[aim.metric]) for aim in record.aims)
