"""The charts of a run's report: learning curves, confusion matrix, instruments of the layers, histograms of filters."""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import altair as alt

from dabnn.answers import Answers
from dabnn.filters import FilterHistogram, LayerHistogram
from orchestrator.report_charts import (
    BLUE,
    GREEN,
    GREY,
    INK,
    RED,
    WIDTH,
    Figure,
    Rows,
    figure,
    is_number,
    named,
)

# Titles of the curves of one kind -> metric of each line.
_CURVES = {
    "loss (nats)": {"training": "train_loss", "validation": "val_loss"},
    "accuracy (%)": {"training top-1": "train_top1", "validation top-1": "val_top1", "validation top-5": "val_top5"},
    "learning rate": {"learning rate": "learning_rate"},
}
_COLORS = {
    "training": BLUE,
    "validation": RED,
    "training top-1": BLUE,
    "validation top-1": RED,
    "validation top-5": GREEN,
}
_INSTRUMENTS = {
    "flipped_share": "bits flipped by a step (share)",
    "flipped_share_epoch": "bits flipped in an epoch (share)",
    "threshold_drift": "drift of the thresholds (half gaps)",
    "upper_share": "weights at alpha (share)",
    "gap": "gap alpha - beta",
    "offset": "offset of the two values",
    "weight_error": "weight error / scatter",
    "positive_inputs": "inputs at +1 (share)",
    "input_imbalance": "imbalance of the inputs",
    "gradient_norm": "gradient norm",
    "dead_filters": "dead filters (share)",
}
_MAX_CLASSES, _MAX_COUNTED = 40, 16
_MAX_LAYERS = 24
_COLUMNS = 3


def learning(lines: Sequence[Mapping[str, Any]]) -> Figure:
    """Return loss, accuracy and learning rate by epoch."""
    rows, charts = [], []
    for title, metrics in _CURVES.items():
        shown = {
            line: metric
            for line, metric in metrics.items()
            if any(is_number(one["metrics"].get(metric)) for one in lines)
        }
        if not shown:
            continue
        rows += [
            {"of": title, "line": line, "epoch": one["step"], "at": one["metrics"].get(metric)}
            for one in lines
            for line, metric in shown.items()
        ]
        charts.append(_curve_chart(title, list(shown)))
    text = "Training and validation by epoch. Training figures are means over the epoch while it was learning."
    chart = alt.hconcat(*charts).resolve_scale(color="independent")
    return figure("curves", "Learning curves", text, chart, points=rows)


def confusion_matrix(found: Answers, classes: Sequence[str]) -> Figure:
    """Return which classes are taken for which; of more than 40 classes those that are confused most."""
    chosen = _most_confused(found) if len(classes) > _MAX_CLASSES else list(range(len(classes)))
    totals = found.confusion.sum(1).tolist()
    rows: Rows = []
    for label in chosen:
        for answer in chosen:
            count = int(found.confusion[label, answer])
            if count:
                share = 100 * count / totals[label]
                row = {"class": classes[label], "answer": classes[answer], "images": count, "share": share}
                rows.append(row | {"right": label == answer})
    order = [classes[label] for label in chosen]
    cut = f" The {len(chosen)} of {len(classes)} classes that are confused most." if len(chosen) < len(classes) else ""
    text = (
        "A row is a class, a column an answer. Blue: answered rightly; orange: taken for another class; in per cent "
        f"of the row's images, darker is more.{cut}"
    )
    return figure("confusion", "Confusion matrix", text, _confusion_chart(order), cells=rows)


def instruments(lines: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Return each instrument by epoch, a line for each layer; None where they were off."""
    rows: Rows = []
    for line in lines:
        for key, value in line["metrics"].items():
            place, _, what = key.rpartition("/")
            if place.startswith("layers/") and what in _INSTRUMENTS:
                rows.append({"what": what, "layer": int(place[7:]), "epoch": line["step"], "at": value})
    present = [what for what in _INSTRUMENTS if any(row["what"] == what for row in rows)]
    if not present:
        return None
    layers = sorted({row["layer"] for row in rows})
    charts = [_instrument_chart(what, layers) for what in present]
    text = (
        "One line a layer, from the first (dark) to the last (bright). docs/instruments.md says what each one means, "
        "and what is healthy."
    )
    return figure("instruments", "Instruments of the layers", text, alt.concat(*charts, columns=_COLUMNS), points=rows)


def filters(layers: Sequence[LayerHistogram]) -> list[Figure]:
    """Return the histograms of the binary layers, all filters at once, and those of single filters."""
    if not layers:
        return []
    layers = layers[:_MAX_LAYERS]
    whole = [_bins(f"{one.number} {one.path}", one.edges, [100 * share for share in one.shares]) for one in layers]
    text = (
        "The weights of all filters of a layer, measured from each filter's own threshold in half gaps: alpha stands "
        "at 1 (red), beta at -1 (green), the threshold at 0 (dashed). Two humps at the two values lose least by "
        "binarization; weights near 0 flip."
    )
    charts = [_layer_chart(one, index) for index, one in enumerate(layers)]
    first = figure(
        "layer-weights",
        "Weights of the binary layers",
        text,
        alt.concat(*charts, columns=_COLUMNS),
        bins=chain(*whole),
    )
    singles = [(f"{one.number} {one.path}", single) for one in layers for single in one.filters]
    rows = [_bins(_single(layer, one), one.edges, list(map(float, one.counts))) for layer, one in singles]
    text = (
        "Of each layer the filter that two values fit best, a middling one, and the one they fit worst, in their own "
        "units, with alpha (red), beta (green) and threshold (dashed). The error is relative to the weights' scatter."
    )
    charts = [_filter_chart(layer, one, index) for index, (layer, one) in enumerate(singles)]
    second = figure("filters", "Single filters", text, alt.concat(*charts, columns=_COLUMNS), bins=chain(*rows))
    return [first, second]


def _curve_chart(title: str, shown: list[str]) -> Any:
    color = alt.Color(
        "line:N",
        title=None,
        scale=alt.Scale(domain=shown, range=[_COLORS.get(line, INK) for line in shown]),
        legend=alt.Legend(orient="top", columns=2) if len(shown) > 1 else None,
    )
    is_log = title == "learning rate"
    scale = alt.Scale(type="log") if is_log else alt.Scale(zero=False)
    return (
        alt.Chart(named("points"))
        .transform_filter(alt.datum.of == title)
        .mark_line(point=alt.OverlayMarkDef(size=14))
        .encode(
            x=alt.X("epoch:Q", axis=alt.Axis(tickMinStep=1, grid=False)),
            y=alt.Y("at:Q", title=title, scale=scale, axis=alt.Axis(grid=not is_log)),
            color=color,
            tooltip=["line:N", "epoch:Q", alt.Tooltip("at:Q", format=".5~g", title=title)],
        )
        .properties(width=WIDTH // 3 - 66, height=210)
    )


def _confusion_chart(order: list[str]) -> Any:
    cell = 34 if len(order) <= _MAX_COUNTED else max(12, 620 // len(order))
    base = alt.Chart(named("cells")).encode(
        x=alt.X(
            "answer:N",
            sort=order,
            scale=alt.Scale(domain=order),
            axis=alt.Axis(orient="top", labelAngle=-40, labelLimit=120),
        ),
        y=alt.Y("class:N", sort=order, scale=alt.Scale(domain=order), axis=alt.Axis(labelLimit=160)),
        tooltip=["class:N", "answer:N", "images:Q", alt.Tooltip("share:Q", title="% of the class", format=".1f")],
    )
    right = base.transform_filter(alt.datum.right).mark_rect().encode(color=_shades("blues", "right (%)", [0, 100]))
    wrong = (
        base.transform_filter("!datum.right")
        .mark_rect()
        .encode(color=_shades("oranges", "taken for another (%)", None))
    )
    layers = [right, wrong]
    if len(order) <= _MAX_COUNTED:
        ink = alt.condition("datum.right && datum.share > 60", alt.value("white"), alt.value(INK))
        layers.append(base.mark_text(fontSize=11).encode(text="images:Q", color=ink))
    side = alt.Step(cell)
    return alt.layer(*layers).resolve_scale(color="independent").properties(width=side, height=side)


def _shades(scheme: str, title: str, domain: list[int] | None) -> Any:
    scale = alt.Scale(scheme=scheme, domain=domain) if domain else alt.Scale(scheme=scheme, zero=True)
    return alt.Color("share:Q", title=title, scale=scale, legend=alt.Legend(gradientLength=110))


def _instrument_chart(what: str, layers: list[int]) -> Any:
    legend = alt.Legend(title="layer", orient="right", symbolLimit=60, columns=1 + len(layers) // 14)
    return (
        alt.Chart(named("points"))
        .transform_filter(alt.datum.what == what)
        .mark_line(strokeWidth=1.6)
        .encode(
            x=alt.X("epoch:Q", axis=alt.Axis(tickMinStep=1, grid=False, tickCount=5)),
            y=alt.Y("at:Q", title=None, scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=5)),
            color=alt.Color("layer:O", scale=alt.Scale(scheme="viridis", domain=layers), legend=legend),
            tooltip=["layer:O", "epoch:Q", alt.Tooltip("at:Q", format=".4~g", title=what)],
        )
        .properties(width=WIDTH // _COLUMNS - 70, height=140, title=_INSTRUMENTS[what])
    )


def _layer_chart(layer: LayerHistogram, index: int) -> Any:
    name = f"{layer.number} {layer.path}"
    error = "" if layer.error is None else f", error {layer.error:.2f}"
    title = alt.Title(name, subtitle=f"{layer.num_filters} filters, gap {layer.gap:.3g}{error}", subtitleColor=GREY)
    y = "weights (%)" if index % _COLUMNS == 0 else None
    return _histogram(name, "half gaps from the threshold", y, {-1: GREEN, 0: None, 1: RED}, title)


def _filter_chart(layer: str, one: FilterHistogram, index: int) -> Any:
    title = alt.Title(f"{layer}, filter {one.number}", subtitle=f"error {one.error:.2f}", subtitleColor=GREY)
    marks = {one.beta: GREEN, one.threshold: None, one.alpha: RED}
    return _histogram(_single(layer, one), "weight", "weights" if index % _COLUMNS == 0 else None, marks, title)


def _histogram(name: str, x: str, y: str | None, marks: Mapping[float, str | None], title: Any) -> Any:
    bars = (
        alt.Chart(named("bins"))
        .transform_filter(alt.datum.of == name)
        .mark_rect(color="#7fa8c9")
        .encode(
            x=alt.X("low:Q", title=x, axis=alt.Axis(grid=False, tickCount=5)),
            x2="high:Q",
            y=alt.Y("at:Q", title=y, axis=alt.Axis(tickCount=4)),
            y2=alt.datum(0),
            tooltip=[alt.Tooltip(f"{end}:Q", format=".4~g", title=word) for end, word in _ENDS.items()],
        )
    )
    rules = [
        alt.Chart(alt.InlineData(values=[{"x": at}]))
        .mark_rule(color=color or INK, strokeWidth=2 if color else 1.2, strokeDash=[1, 0] if color else [4, 3])
        .encode(x="x:Q")
        for at, color in marks.items()
    ]
    return alt.layer(bars, *rules).properties(width=WIDTH // _COLUMNS - 70, height=110, title=title)


_ENDS = {"low": "from", "high": "to", "at": "weights"}


def _bins(name: str, edges: Sequence[float], heights: Sequence[float]) -> Rows:
    return [
        {"of": name, "low": low, "high": high, "at": height}
        for low, high, height in zip(edges, edges[1:], heights, strict=False)
        if height
    ]


def _single(layer: str, one: FilterHistogram) -> str:
    return f"{layer}, filter {one.number}"


def _most_confused(found: Answers) -> list[int]:
    """Return the 40 classes with the most images that belong to them or are taken for them wrongly, in their order."""
    wrong = found.confusion.clone().fill_diagonal_(0)
    ranked = (wrong.sum(0) + wrong.sum(1)).argsort(descending=True, stable=True)[:_MAX_CLASSES]
    return sorted(ranked.tolist())
