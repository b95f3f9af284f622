"""The charts of a sweep's report, each a function from rows to a figure, or to None where there is nothing to show.

A row is a trial: `trial`, `name`, `kind`, perhaps `url`, its measures by name, and its values as `v0`, `v1`, ...
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import altair as alt

from dabnn.models import LayerRow
from orchestrator.report_charts import (
    BLUE,
    GREY,
    INK,
    PALE,
    RED,
    SKY,
    WIDTH,
    Figure,
    Rows,
    figure,
    is_long_range,
    is_number,
    key_titles,
    measure_title,
    named,
    scale_of,
    short,
)
from orchestrator.sweep_record import Aim, Limit, SweepRecord

# Kinds of trials: colour, shape.
_KINDS = {
    "on the front": (RED, "diamond"),
    "finished": (BLUE, "circle"),
    "breaks a constraint": (GREY, "cross"),
    "stopped early": (PALE, "circle"),
    "stopped": (PALE, "square"),
    "running": (PALE, "triangle-up"),
    "failed": (GREY, "triangle-down"),
}
_MAX_POINTS = 12_000
_MIN_POINTS_OF_CURVE = 8
_SLICE_COLUMNS = 3
_MAX_LABELLED = 12
_MAX_UPRIGHT = 8
_MAX_TICKS = 10


@dataclass(frozen=True)
class PlanRow:
    """A trial and the layers of its network."""

    label: str
    layers: Sequence[LayerRow]


def trade_off(rows: Rows, aims: Sequence[Aim], limits: Sequence[Limit]) -> list[Figure]:
    """Return one figure for each pair of measures, the front of all of them marked; none for a single one."""
    pairs = list(combinations(aims, 2))
    return [
        figure(
            "front" if len(pairs) == 1 else f"front-{y.metric}-{x.metric}".replace("_", "-"),
            _capital(f"{measure_title(y.metric)} against {measure_title(x.metric)}"),
            f"Each mark is a trial. Nothing beats the diamonds: {_goal(y)}, {_goal(x)}"
            + (" and the other objectives." if len(aims) > 2 else ".")
            + " Point at a mark for its values; click to open its run.",
            _scatter(rows, x, y, limits, joins=len(aims) == 2),
            trials=rows,
        )
        for y, x in pairs
    ]


def history(rows: Rows, aim: Aim) -> Figure | None:
    """Return the first objective in the order of trials, with the best so far; None for a single trial."""
    if len(rows) < 2:
        return None
    best: float | None = None
    steps: Rows = []
    for row in rows:
        value = row[aim.metric]
        if row["kind"] in ("finished", "on the front") and (best is None or aim.sign * value < aim.sign * best):
            best = value
        if best is not None:
            steps.append({"trial": row["trial"], "best": best})
    title = measure_title(aim.metric)
    x = alt.X("trial:Q", title="trial", axis=alt.Axis(tickMinStep=1, grid=False))
    points = _marks(rows, aim).encode(x=x, y=alt.Y(f"{aim.metric}:Q", title=title, scale=_scale(rows, aim.metric)))
    line = (
        alt.Chart(named("best"))
        .mark_line(interpolate="step-after", color=INK, strokeWidth=1.5)
        .encode(x="trial:Q", y="best:Q")
    )
    text = "In the order in which they were proposed. The line is the best that had finished by then."
    return figure(
        "history",
        "How the search went on",
        text,
        (line + points).properties(width=WIDTH - 70, height=240),
        trials=rows,
        best=steps,
    )


def parallel(rows: Rows, record: SweepRecord) -> Figure | None:
    """Return parallel coordinates: an axis for each key and objective, a line for each trial."""
    titles = key_titles(record.keys)
    axes = [(titles[key], f"v{index}", key) for index, key in enumerate(record.keys)]
    axes += [(measure_title(aim.metric).replace(" (", "|("), aim.metric, "") for aim in record.aims]
    rows = [row for row in rows if all(is_number(row.get(aim.metric)) for aim in record.aims)]
    axes = [axis for axis in axes if len({repr(row.get(axis[1])) for row in rows}) > 1]
    if len(axes) < 2 or len(rows) < 2:
        return None
    lines, ticks = [], []
    for title, column, key in axes:
        values = [row.get(column) for row in rows]
        place, marks = _axis(values, is_log=all(map(is_number, values)) and _is_log(record, key, values))
        ticks += [{"axis": title, "at": at, "label": label} for at, label in marks]
        lines += [
            {
                "trial": row["trial"],
                "axis": title,
                "of": title.replace("|", " "),
                "at": place[repr(row.get(column))],
                "value": short(row.get(column)),
                "score": row[record.aims[0].metric],
                "kind": _simple(row["kind"]),
            }
            for row in rows
        ]
    score = measure_title(record.aims[0].metric)
    chart = _parallel_chart([axis[0] for axis in axes], score, _ends(lines))
    text = (
        "Each line is a trial, coloured by the first objective; thick lines are the front, grey ones did not finish or "
        "break a constraint. Point at a line to follow it."
    )
    return figure("parallel", "Parameters and objectives together", text, chart, lines=lines, ticks=ticks)


def importance(shares: Mapping[str, float], aim: Aim) -> Figure | None:
    """Return the importance of each parameter; None where there were too few trials to tell."""
    if not shares:
        return None
    rows = [{"key": key, "share": 100 * share, "label": f"{100 * share:.0f} %"} for key, share in shares.items()]
    y = alt.Y("key:N", title=None, sort=None, axis=alt.Axis(labelLimit=260))
    base = alt.Chart(named("shares")).encode(y=y, x=alt.X("share:Q", title="share of the variance (%)"))
    labels = base.mark_text(align="left", dx=4, color=INK).encode(text="label:N")
    chart = base.mark_bar(color=BLUE, size=16) + labels
    text = (
        f"How much of the differences in {measure_title(aim.metric)} each parameter explains alone, by fANOVA "
        "over the finished trials. With few trials this is a hint at best."
    )
    chart = chart.properties(width=WIDTH - 320, height=alt.Step(26))
    return figure("importance", "Which parameters decide", text, chart, shares=rows)


def slices(rows: Rows, record: SweepRecord) -> Figure | None:
    """Return the first objective against each parameter."""
    aim, titles = record.aims[0], key_titles(record.keys)
    columns = {key: f"v{index}" for index, key in enumerate(record.keys)}
    columns = {key: column for key, column in columns.items() if len({repr(row.get(column)) for row in rows}) > 1}
    if not columns:
        return None
    charts = []
    for index, (key, column) in enumerate(columns.items()):
        values = _column(rows, column)
        if all(map(is_number, values)):
            known = sorted(set(values))
            is_few = len(known) <= _MAX_TICKS and all(isinstance(value, int) for value in known)
            whole = {"values": known, "format": "d"} if is_few else {}
            axis = alt.Axis(tickCount=5, grid=False, labelOverlap=True, **whole)
            scale = scale_of(is_log=_is_log(record, key, values))
            x: Any = alt.X(f"{column}:Q", title=titles[key], scale=scale, axis=axis)
        else:
            x = alt.X(f"{column}:N", title=titles[key], axis=alt.Axis(labelAngle=-30, labelLimit=110))
        title = measure_title(aim.metric) if index % _SLICE_COLUMNS == 0 else None
        y = alt.Y(f"{aim.metric}:Q", title=title, scale=_scale(rows, aim.metric))
        width = WIDTH // _SLICE_COLUMNS - 62
        charts.append(_marks(rows, aim, legend=False).encode(x=x, y=y).properties(width=width, height=170))
    text = "The first objective against each parameter alone. Marks as above."
    return figure("slices", "Parameter by parameter", text, alt.concat(*charts, columns=_SLICE_COLUMNS), trials=rows)


def curves(record: SweepRecord, front: set[int]) -> Figure | None:
    """Return how each trial learned: the first objective by epoch, or top-1 where that is none of the epochs'."""
    metric = record.aims[0].metric
    if not any(metric in metrics for trial in record.trials for _, metrics in trial.curve):
        metric = "val_top1"
    learned = [trial for trial in record.trials if any(is_number(metrics.get(metric)) for _, metrics in trial.curve)]
    if not learned:
        return None
    most = max(_MIN_POINTS_OF_CURVE, _MAX_POINTS // len(learned))
    rows: Rows = []
    for trial in learned:
        kind = "on the front" if trial.number in front else _simple(trial.state)
        points = [(epoch, metrics[metric]) for epoch, metrics in trial.curve if is_number(metrics.get(metric))]
        rows += [
            {"trial": trial.number, "epoch": epoch, "at": value, "kind": kind}
            for epoch, value in _thinned(points, most)
        ]
    text = "A line is a trial and ends where the trial ended. Point at one for its number."
    title = f"Learning curves: {measure_title(metric)}"
    return figure("curves", title, text, _curves_chart(metric, rows), points=rows)


def layer_plans(plans: Sequence[PlanRow], num_front: int) -> Figure | None:
    """Return which layers are binary in each trial of the front."""
    if not plans:
        return None
    rows = [
        {
            "trial": plan.label,
            "layer": f"{layer.index} {layer.path}",
            "is": _layer_kind(layer),
            "weights": layer.out_channels * layer.in_channels * layer.kernel[0] * layer.kernel[1],
            "bytes": layer.packed_bytes,
        }
        for plan in plans
        for layer in plan.layers
    ]
    kinds = {"real": PALE, "binary inputs": "#f0e442", "binary weights": SKY, "binary weights and inputs": BLUE}
    chart = (
        alt.Chart(named("layers"))
        .mark_rect(stroke="white", strokeWidth=2)
        .encode(
            x=alt.X("layer:N", sort=None, title="layer", axis=alt.Axis(labelAngle=-40, labelLimit=140)),
            y=alt.Y("trial:N", sort=None, title=None, axis=alt.Axis(labelLimit=240)),
            color=alt.Color(
                "is:N",
                title=None,
                scale=alt.Scale(domain=list(kinds), range=list(kinds.values())),
                legend=alt.Legend(orient="top", labelLimit=220),
            ),
            tooltip=[
                "trial:N",
                "layer:N",
                "is:N",
                alt.Tooltip("weights:Q", format=","),
                alt.Tooltip("bytes:Q", format=","),
            ],
        )
        .properties(width=min(WIDTH - 240, 46 * len(plans[0].layers)), height=alt.Step(24))
    )
    cut = f" The first {len(plans)} of {num_front}." if num_front > len(plans) else ""
    text = f"What is binary in the network of each trial of the front, with its objectives.{cut}"
    return figure("layers", "Layer plans of the front", text, chart, layers=rows)


def _scatter(rows: Rows, x: Aim, y: Aim, limits: Sequence[Limit], *, joins: bool) -> Any:
    size = {"width": WIDTH - 70, "height": 360}
    axes = {
        "x": alt.X(
            f"{x.metric}:Q",
            title=f"{measure_title(x.metric)}, {_better(x, 'left', 'right')}",
            scale=_scale(rows, x.metric),
            axis=alt.Axis(tickCount=8, labelOverlap=True),
        ),
        "y": alt.Y(
            f"{y.metric}:Q",
            title=f"{measure_title(y.metric)}, {_better(y, 'below', 'above')}",
            scale=_scale(rows, y.metric),
        ),
    }
    front = alt.Chart(named("trials")).transform_filter("datum.kind == 'on the front'").encode(**axes)
    layers = [_marks(rows, y, x).encode(**axes)]
    if joins:
        # What the front covers ends in steps: between two of its trials nothing better is known.
        step = "step-after" if x.mode == "min" else "step-before"
        layers.insert(0, front.mark_line(color=RED, strokeWidth=1.5, interpolate=step))
    layers += [
        _limit_rule(limit, axis) for limit in limits for axis, aim in (("x", x), ("y", y)) if aim.metric == limit.metric
    ]
    if sum(row["kind"] == "on the front" for row in rows) <= _MAX_LABELLED:
        layers.append(front.mark_text(dy=-13, fontSize=11, color=INK).encode(text="trial:Q"))
    return alt.layer(*layers).properties(**size)


def _limit_rule(limit: Limit, axis: str) -> Any:
    place = {axis: alt.datum(limit.bound)}
    return alt.Chart(alt.InlineData(values=[{}])).mark_rule(color=GREY, strokeDash=[5, 4]).encode(**place)


def _marks(rows: Rows, *aims: Aim, legend: bool = True) -> Any:
    """Return the marks of trials, without axes: colour and shape by kind, values on hover, a click opens the run."""
    kinds = [kind for kind in _KINDS if any(row["kind"] == kind for row in rows)]
    looks = [_KINDS[kind] for kind in kinds]
    place = alt.Legend(title=None, orient="top", labelLimit=200) if legend else None
    tooltip = [alt.Tooltip("name:N", title="run"), alt.Tooltip("kind:N", title="trial is")]
    tooltip += [alt.Tooltip(f"{aim.metric}:Q", title=measure_title(aim.metric), format=",.6~g") for aim in aims]
    extra = {"href": "url:N"} if any("url" in row for row in rows) else {}
    return (
        alt.Chart(named("trials"))
        .mark_point(filled=True, opacity=0.85)
        .encode(
            color=alt.Color("kind:N", scale=alt.Scale(domain=kinds, range=[look[0] for look in looks]), legend=place),
            shape=alt.Shape("kind:N", scale=alt.Scale(domain=kinds, range=[look[1] for look in looks]), legend=place),
            size=alt.condition("datum.kind == 'on the front'", alt.value(130), alt.value(42)),
            tooltip=tooltip,
            **extra,
        )
    )


def _parallel_chart(axes: list[str], score: str, scores: list[float]) -> Any:
    hover = alt.selection_point(name="hover", fields=["trial"], on="pointerover", clear="pointerout", empty=False)
    x = alt.X(
        "axis:N",
        sort=axes,
        title=None,
        scale=alt.Scale(domain=axes),
        axis=alt.Axis(
            orient="top",
            labelAngle=0 if len(axes) <= _MAX_UPRIGHT else -20,
            labelExpr="split(datum.label, '|')",
            grid=True,
            gridColor="#999999",
            domain=False,
            ticks=False,
            labelLimit=190,
            labelPadding=24 if any("|" in axis for axis in axes) else 8,
        ),
    )
    y = alt.Y("at:Q", axis=None, scale=alt.Scale(domain=[-0.03, 1.03], nice=False))
    lines = alt.Chart(named("lines")).encode(x=x, y=y, detail="trial:N")
    is_grey = "datum.kind == 'other'"
    color = alt.condition(
        is_grey,
        alt.value(PALE),
        alt.Color(
            "score:Q",
            title=score,
            scale=alt.Scale(scheme="viridis", domain=scores),
            legend=alt.Legend(gradientLength=200),
        ),
    )
    others = lines.transform_filter("datum.kind != 'on the front'").mark_line(strokeWidth=1)
    front = lines.transform_filter("datum.kind == 'on the front'").mark_line(strokeWidth=3.5)
    followed = (
        lines.mark_line(strokeWidth=3.5, color=RED)
        .encode(opacity=alt.condition(hover, alt.value(1), alt.value(0)))
        .properties(name="live_line")
    )
    tooltip = [
        alt.Tooltip("trial:Q"),
        alt.Tooltip("of:N"),
        "value:N",
        alt.Tooltip("score:Q", title=score, format=".6~g"),
    ]
    points = (
        lines.mark_point(filled=True, size=70, opacity=0)
        .encode(tooltip=tooltip)
        .add_params(hover)
        .properties(name="live_points")
    )
    labels = alt.Chart(named("ticks")).encode(x=x, y=y, text="label:N")
    layers = [
        others.encode(color=color, strokeOpacity=alt.condition(is_grey, alt.value(0.7), alt.value(0.45))),
        front.encode(color=color),
        followed,
        labels.mark_text(align="left", dx=5, fontSize=11, stroke="white", strokeWidth=4),
        labels.mark_text(align="left", dx=5, fontSize=11, color=INK),
        points,
    ]
    return alt.layer(*layers).properties(width=WIDTH - 150, height=340)


def _ends(lines: Rows) -> list[float]:
    """Return the least and the greatest score of the lines that are coloured."""
    scores = [line["score"] for line in lines if line["kind"] != "other"] or [line["score"] for line in lines]
    return [min(scores), max(scores)]


def _curves_chart(metric: str, rows: Rows) -> Any:
    hover = alt.selection_point(name="hover", fields=["trial"], on="pointerover", clear="pointerout", empty=False)
    kinds = {"on the front": RED, "finished": BLUE, "other": "#b0b0b0"}
    kinds = {kind: color for kind, color in kinds.items() if any(row["kind"] == kind for row in rows)}
    names = {"other": "stopped early or not finished"}
    base = alt.Chart(named("points")).encode(
        x=alt.X("epoch:Q", title="epoch", axis=alt.Axis(tickMinStep=1, grid=False)),
        y=alt.Y("at:Q", title=measure_title(metric), scale=alt.Scale(zero=False)),
        detail="trial:N",
    )
    legend = alt.Legend(orient="top", labelExpr=f"{names!r}[datum.label] || datum.label", labelLimit=220)
    color = alt.Color(
        "kind:N", title=None, legend=legend, scale=alt.Scale(domain=list(kinds), range=list(kinds.values()))
    )
    others = (
        base.transform_filter("datum.kind != 'on the front'")
        .mark_line(strokeWidth=1, strokeOpacity=0.45)
        .encode(color=color)
    )
    front = base.transform_filter("datum.kind == 'on the front'").mark_line(strokeWidth=2.2).encode(color=color)
    followed = (
        base.mark_line(strokeWidth=3, color=INK)
        .encode(opacity=alt.condition(hover, alt.value(1), alt.value(0)))
        .properties(name="live_line")
    )
    tooltip = ["trial:Q", "epoch:Q", alt.Tooltip("at:Q", title=measure_title(metric), format=".5~g")]
    points = (
        base.mark_point(filled=True, size=45, opacity=0)
        .encode(tooltip=tooltip)
        .add_params(hover)
        .properties(name="live_points")
    )
    return alt.layer(others, front, followed, points).properties(width=WIDTH - 70, height=320)


def _axis(values: Sequence[Any], *, is_log: bool) -> tuple[dict[str, float], list[tuple[float, str]]]:
    """Return where each value stands on an axis from 0 to 1, by its `repr`, and the labels of that axis."""
    known = {repr(value): value for value in values}
    if not all(map(is_number, known.values())) or len(known) <= 2:
        ordered = sorted(
            known, key=lambda text: (not is_number(known[text]), known[text] if is_number(known[text]) else 0, text)
        )
        places = {text: index / max(1, len(ordered) - 1) for index, text in enumerate(ordered)}
        return places, [(at, short(known[text])) for text, at in places.items()]
    coded = {text: math.log(value) if is_log else float(value) for text, value in known.items()}
    low, high = min(coded.values()), max(coded.values())
    places = {text: (value - low) / (high - low) for text, value in coded.items()}
    if len(known) <= 6:
        return places, [(at, short(known[text])) for text, at in places.items()]
    ends = [low + (high - low) * step / 4 for step in range(5)]
    is_whole = all(isinstance(value, int) for value in known.values())
    labels = [math.exp(end) if is_log else end for end in ends]
    return places, [
        (step / 4, short(round(label) if is_whole else float(f"{label:.3g}"))) for step, label in enumerate(labels)
    ]


def _thinned(points: list[tuple[int, float]], most: int) -> list[tuple[int, float]]:
    """Return at most `most` points, the first and the last among them, evenly over the epochs."""
    if len(points) <= most:
        return points
    return [points[round(index * (len(points) - 1) / (most - 1))] for index in range(most)]


def _simple(kind: str) -> str:
    return kind if kind in ("on the front", "finished") else "other"


def _layer_kind(layer: LayerRow) -> str:
    if layer.binary_weights and layer.binary_inputs:
        return "binary weights and inputs"
    if layer.binary_weights:
        return "binary weights"
    return "binary inputs" if layer.binary_inputs else "real"


def _scale(rows: Rows, column: str) -> Any:
    return scale_of(is_log=is_long_range([value for value in _column(rows, column) if is_number(value)]))


def _is_log(record: SweepRecord, key: str, values: Sequence[Any]) -> bool:
    """Whether a key was drawn by its logarithm, or, where that is unknown, spans decades."""
    domain = record.space.get(key)
    return "log" in domain if domain else is_long_range(values)


def _column(rows: Rows, column: str) -> list[Any]:
    return [row[column] for row in rows if row.get(column) is not None]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _goal(aim: Aim) -> str:
    return f"{'more' if aim.mode == 'max' else 'less'} {measure_title(aim.metric)}"


def _better(aim: Aim, less: str, more: str) -> str:
    return f"better {more if aim.mode == 'max' else less}"
