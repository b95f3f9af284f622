"""What all charts of a report share: colours that colour-blind readers tell apart, titles with units, one theme.

A chart is a Vega-Lite specification with its data inside. Colours are those of Okabe and Ito (jfly.uni-koeln.de/color);
magnitudes are viridis. Leaves out what is shown (`report_sweep`, `report_run`) and the page (`report_page`).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

Rows = list[dict[str, Any]]

BLUE, ORANGE, GREEN, RED, SKY, PURPLE = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7"
GREY, PALE, INK = "#8c8c8c", "#d0d0d0", "#222222"
WIDTH = 880

# Measure -> what it is, its unit.
_MEASURES = {
    "val_top1": ("validation top-1", "%"),
    "val_top5": ("validation top-5", "%"),
    "val_loss": ("validation loss", "nats"),
    "train_top1": ("training top-1", "%"),
    "train_top5": ("training top-5", "%"),
    "train_loss": ("training loss", "nats"),
    "packed_bytes": ("packed size", "bytes"),
    "bit_ops": ("1-bit operations", "an image"),
    "latency_ms": ("latency", "ms"),
    "learning_rate": ("learning rate", ""),
    "images_per_s": ("training rate", "images/s"),
    "epoch_s": ("time of an epoch", "s"),
}
_LONG_RANGE = 20.0
_CONFIG = {
    "font": "Helvetica, Arial, 'Liberation Sans', sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "gridColor": "#ececec",
        "domainColor": "#999999",
        "tickColor": "#999999",
        "labelColor": INK,
        "titleColor": INK,
    },
    "legend": {"labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal", "symbolOpacity": 1},
    "header": {"labelFontSize": 12, "titleFontSize": 12, "labelColor": INK},
    "title": {"fontSize": 13, "fontWeight": "normal", "anchor": "start", "color": INK},
}


@dataclass(frozen=True)
class Figure:
    """A chart with the words around it.

    Attributes:
        name: Name of its file and of its place on the page: lower case and dashes.
        title: Heading.
        text: What it shows, and how to read it.
        spec: Vega-Lite specification, data included.
    """

    name: str
    title: str
    text: str
    spec: dict[str, Any]


def figure(name: str, title: str, text: str, chart: Any, **data: Iterable[Mapping[str, Any]]) -> Figure:
    """Return a figure of a chart whose data are the named `data`; numbers that are not finite become gaps."""
    spec = chart.to_dict()
    spec["config"] = _CONFIG
    own = {key: [_clean(row) for row in rows] for key, rows in data.items()}
    spec["datasets"] = spec.get("datasets", {}) | own
    return Figure(name, title, text, spec)


def still(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return a specification without the layers that only a pointer brings to life; their names begin with `live`."""
    layers = [layer for layer in spec.get("layer", ()) if not layer.get("name", "").startswith("live")]
    if not layers:
        return dict(spec)
    return {key: value for key, value in spec.items() if key != "params"} | {"layer": layers}


def named(name: str) -> Any:
    """Return the data of that name, see `figure`."""
    return alt.NamedData(name)


def measure_title(metric: str) -> str:
    """Return a measure's name with its unit, as a title."""
    name, unit = _MEASURES.get(metric, (metric.replace("_", " "), ""))
    return f"{name} ({unit})" if unit else name


def measured(metric: str, value: float) -> str:
    """Return a measure with its value, in a sentence: `validation top-1 93.3 %`."""
    name, unit = _MEASURES.get(metric, (metric.replace("_", " "), ""))
    return f"{name} {short(value)} {unit}".rstrip()


def key_titles(keys: Sequence[str]) -> dict[str, str]:
    """Return a short title of each dotted key: its last part, or all of it where that says too little."""
    lasts = [key.rpartition(".")[2] for key in keys]
    return {
        key: last if lasts.count(last) == 1 and last != "name" else key for key, last in zip(keys, lasts, strict=True)
    }


def is_long_range(values: Sequence[float]) -> bool:
    """Whether values are better seen on a logarithmic axis: all positive, the largest 20 times the smallest."""
    return bool(values) and min(values) > 0 and max(values) / min(values) >= _LONG_RANGE


def scale_of(*, is_log: bool, padding: int = 12) -> Any:
    """Return the scale of an axis: without a forced zero, or logarithmic, with so many pixels beyond the values."""
    more = {"type": "log"} if is_log else {"zero": False}
    return alt.Scale(nice=False, padding=padding, **more)


def is_number(value: object) -> bool:
    """Whether a value is a finite number, and no yes or no."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def short(value: object) -> str:
    """Return a value as a label shows it: 0.00123, 12,345, yes, cosine."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if value.is_integer() and abs(value) < 1e12:
            return f"{value:,.0f}"
        if abs(value) >= 1e6 or abs(value) < 1e-3:
            mantissa, _, exponent = f"{value:.2e}".partition("e")
            return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "-" if value is None else str(value)


def _clean(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _rounded(value) for key, value in row.items()}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
