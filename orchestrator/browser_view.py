"""How the experiment browser shows runs: the columns, order and charts that `dab ui` opens its table with.

A view is what MLflow calls a saved view: JSON in the experiment tag `mlflow.sharedViewState.KEY`, which an address with
`viewStateShareKey=KEY` opens and the menu "Views" of the experiment offers. Its fields are those of the frontend of
MLflow 3.17 (`ExperimentPageUIState`); another version leaves out what it does not know. What a user arranged is kept
apart, in the web browser, and not changed.
"""

import base64
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.sweep_record import Aim

TAG = "mlflow.sharedViewState."
TOP1 = Aim("val_top1", "max")
METRICS = ("val_top1", "packed_bytes", "bit_ops", "latency_ms")
PARAMS = ("optim.max_lr", "binarize.bin_start", "binarize.bin_end", "schedule.name")
_SIZE = Aim("packed_bytes", "min")
_MAX_PARAMS = 8
_BEFORE = {"attributes.`Run Name`": 240, "runDateAndNestInfo": 150}  # columns that are always shown, and their widths
_AFTER = {"duration": 90}
_PX_PER_CHAR, _PX_BESIDE = 6.8, 40  # of a heading, and for its mark of the order
_CURVES = ("val_top1", "val_loss", "train_loss")
_WITHOUT_LAYERS = "^(?!.*/)"  # what the instruments of single layers are named by holds a slash
_MAX_CURVES, _MAX_POINTS = 20, 100


def newest() -> dict[str, Any]:
    """Return the view of an experiment, newest run first: MLflow nests trials below sweeps in this order alone."""
    return _view([TOP1], PARAMS) | {"orderByKey": "attributes.start_time", "orderByAsc": False}


def best(aims: Sequence[Aim] = (TOP1,), params: Sequence[str] = PARAMS, parent: str | None = None) -> dict[str, Any]:
    """Return a view in the order of the first objective, best run first, trials among all others.

    Args:
        aims: Objectives.
        params: Parameters that get a column.
        parent: Sweep whose trials are shown alone; None for all runs of the experiment.
    """
    where = "" if parent is None else f"tags.`mlflow.parentRunId` = '{parent}'"
    order = {"orderByKey": _metric(aims[0].metric), "orderByAsc": aims[0].mode == "min"}
    return _view(aims, params) | order | {"searchFilter": where}


def tag_of(name: str, view: Mapping[str, Any], now_s: float) -> str:
    """Return the value of the tag that keeps a view.

    Args:
        name: As the menu shows it.
        view: The view.
        now_s: Seconds since 1970; the menu lists the latest view first.
    """
    state = "deflate;" + base64.b64encode(zlib.compress(json.dumps(view).encode())).decode()
    return json.dumps(
        {"name": name, "createdAt": round(now_s * 1000), "updatedAt": round(now_s * 1000), "state": state}
    )


def varied(trials: Sequence[Mapping[str, str]]) -> list[str]:
    """Return the parameters in which trials differ, in the order of their configurations."""
    keys = dict.fromkeys(key for trial in trials for key in trial)
    return [key for key in keys if len({trial.get(key) for trial in trials}) > 1]


def _view(aims: Sequence[Aim], params: Sequence[str]) -> dict[str, Any]:
    params = params[:_MAX_PARAMS]
    metrics = list(dict.fromkeys([*(aim.metric for aim in aims), *METRICS]))
    names = {_metric(metric): metric for metric in metrics} | {f"params.`{param}`": param for param in params}
    own = {column: round(_PX_PER_CHAR * len(name) + _PX_BESIDE) for column, name in names.items()}
    return {
        "selectedColumns": list(names),
        "columnOrder": [*_BEFORE, *names, *_AFTER],
        "columnWidths": _BEFORE | own | _AFTER,
        "runsHiddenMode": f"FIRST_{_MAX_CURVES}_RUNS",
        "compareRunSections": [
            _section("results", "Results", 2),
            _section("parameters", "Parameters", 1),
            _section("curves", "Model metrics", 3),
        ],
        "isAccordionReordered": True,  # else by name
        "compareRunCharts": _charts(aims, params),
        "chartsSearchFilter": _WITHOUT_LAYERS,
    }


def _charts(aims: Sequence[Aim], params: Sequence[str]) -> list[dict[str, Any]]:
    other = next((aim for aim in [*aims, _SIZE, TOP1] if aim.metric != aims[0].metric), _SIZE)
    against = {"xaxis": _axis(other.metric), "yaxis": _axis(aims[0].metric), "runsCountToCompare": _MAX_POINTS}
    # Coloured by the last one.
    lines = {
        "selectedParams": list(params),
        "selectedMetrics": [aim.metric for aim in reversed(aims)],
        "showAllRuns": False,
    }
    curves = list(dict.fromkeys([*(aim.metric for aim in aims if aim.metric.startswith("val_")), *_CURVES]))
    return [
        _curve("results", curves[0]),
        _chart("SCATTER", "results", f"{aims[0].metric} against {other.metric}", against),
        _chart("PARALLEL", "parameters", "parameters", lines),
        *(_curve("curves", metric) for metric in curves[1:]),
    ]


def _curve(section: str, metric: str) -> dict[str, Any]:
    scales = {"xAxisKey": "step", "xAxisScaleType": "linear", "scaleType": "linear", "range": {}}
    shared = {"lineSmoothness": 0, "useGlobalXaxisKey": True, "useGlobalLineSmoothing": True}
    return _chart("LINE", section, metric, {"metricKey": metric, "selectedMetricKeys": [metric]} | scales | shared)


def _chart(kind: str, section: str, name: str, rest: dict[str, Any]) -> dict[str, Any]:
    about: dict[str, Any] = {"type": kind, "uuid": f"{section}-{name}", "metricSectionId": section, "displayName": name}
    return {"runsCountToCompare": _MAX_CURVES, "deleted": False, "isGenerated": False} | about | rest


def _section(uuid: str, name: str, columns: int) -> dict[str, Any]:
    shown = {"display": True, "isReordered": True, "deleted": False, "isGenerated": True}
    return {"uuid": uuid, "name": name, "columns": columns} | shown


def _axis(metric: str) -> dict[str, str]:
    return {"key": metric, "type": "METRIC"}


def _metric(name: str) -> str:
    return f"metrics.`{name}`"
