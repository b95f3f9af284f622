"""A report as files: one HTML page that needs nothing else, a PNG of every chart, tables as CSV.

The page (`report_template`) holds its scripts, data and pictures; it asks no server for anything. PNG is drawn without
a browser. Leaves out what is in it.
"""

import base64
import csv
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert

from dabnn.errors import InvalidInputError
from orchestrator.report_charts import Figure, short, still
from orchestrator.report_template import PAGE

_PNG_SCALE = 1.5
# As in `<script>`: text in it ends at the first `</`.
_ESCAPES = {"<": "\\u003c", "\u2028": "\\u2028", "\u2029": "\\u2029"}


@dataclass(frozen=True)
class Cell:
    """A cell of a table that is more than its value: a link, or a mark."""

    value: object
    link: str | None = None


@dataclass(frozen=True)
class Grid:
    """A table on the page; a click on a heading sorts it.

    Attributes:
        name: Name of its CSV file.
        title: Heading.
        text: How to read it.
        columns: Headings.
        rows: Values or cells, as many as columns.
        marked: Rows that stand out, by position.
    """

    name: str
    title: str
    text: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    marked: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Tiles:
    """Small pictures with captions.

    Attributes:
        name: Name of its place on the page.
        title: Heading.
        text: What they are.
        tiles: (PNG, caption) of each.
    """

    name: str
    title: str
    text: str
    tiles: Sequence[tuple[bytes, str]]


@dataclass(frozen=True)
class Page:
    """A report.

    Attributes:
        title: Its heading.
        summary: Sentences below it.
        facts: What it is about, each with its value.
        parts: From top to bottom.
        tables: Tables that are files only, by name.
    """

    title: str
    summary: str
    facts: Mapping[str, object]
    parts: Sequence[Figure | Grid | Tiles]
    tables: Sequence[Grid] = field(default=())


def write(page: Page, folder: Path) -> dict[str, Any]:
    """Write a report into a folder, which is made: `report.html`, and PNG and CSV files by the names of their parts.

    Returns:
        `html`, `png` and `csv`: paths; `html_bytes`.

    Raises:
        InvalidInputError: The folder cannot be written to.
    """
    figures = [part for part in page.parts if isinstance(part, Figure)]
    grids = [*(part for part in page.parts if isinstance(part, Grid)), *page.tables]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        pictures = [_write_png(figure, folder / f"{figure.name}.png") for figure in figures]
        tables = [_write_csv(grid, folder / f"{grid.name}.csv") for grid in grids]
        file = folder / "report.html"
        file.write_text(render(page), encoding="utf-8")
    except OSError as error:
        raise InvalidInputError(f"{folder}: cannot be written to ({error}). Name another folder with -o.") from error
    return {"html": str(file), "html_bytes": file.stat().st_size, "png": pictures, "csv": tables}


def render(page: Page) -> str:
    """Return the page as HTML."""
    figures = {part.name: part.spec for part in page.parts if isinstance(part, Figure)}
    facts = "".join(f"<dt>{_text(key)}</dt><dd>{_text(short(value))}</dd>" for key, value in page.facts.items())
    body = "\n".join(_section(part) for part in page.parts)
    return PAGE.substitute(
        title=_text(page.title),
        summary="".join(f"<p>{_text(line)}</p>" for line in page.summary.splitlines()),
        facts=facts,
        body=body,
        script=_scripts() if figures else "",
        specs=_json(figures),
    )


def _section(part: Figure | Grid | Tiles) -> str:
    head = f"<h2>{_text(part.title)}</h2><p>{_text(part.text)}</p>"
    if isinstance(part, Figure):
        inner = f'<div class="chart" id="{_text(part.name)}"></div>'
    elif isinstance(part, Grid):
        inner = _grid(part)
    else:
        inner = (
            f'<div class="tiles" id="{_text(part.name)}">'
            + "".join(_tile(picture, caption) for picture, caption in part.tiles)
            + "</div>"
        )
    return f"<section>{head}{inner}</section>"


def _grid(grid: Grid) -> str:
    heads = "".join(f"<th>{_text(column)}</th>" for column in grid.columns)
    rows = "".join(
        f"<tr{' class=mark' if index in grid.marked else ''}>{''.join(_cell(value) for value in row)}</tr>"
        for index, row in enumerate(grid.rows)
    )
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'


def _cell(value: object) -> str:
    cell = value if isinstance(value, Cell) else Cell(value)
    text = _text(short(cell.value))
    if cell.link:
        text = f'<a href="{_text(cell.link)}" target="_blank" rel="noopener">{text}</a>'
    is_number = isinstance(cell.value, int | float) and not isinstance(cell.value, bool)
    return f'<td class=n data-v="{cell.value}">{text}</td>' if is_number else f"<td>{text}</td>"


def _tile(picture: bytes, caption: str) -> str:
    data = base64.b64encode(picture).decode()
    words = _text(caption)
    return f'<figure><img src="data:image/png;base64,{data}" alt="{words}"><figcaption>{words}</figcaption></figure>'


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _json(value: object) -> str:
    text = json.dumps(value, separators=(",", ":"))
    for character, escape in _ESCAPES.items():
        text = text.replace(character, escape)
    return text


def _scripts() -> str:
    """Return Vega, Vega-Lite and vega-embed as one script."""
    bundle: str = vl_convert.javascript_bundle(vl_version=_version())  # type: ignore[call-arg] # its stub is wrong
    return bundle


def _version() -> str:
    """Return the version of Vega-Lite that the charts are written for, as vl-convert names it."""
    return ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])


def _write_png(figure: Figure, file: Path) -> str:
    file.write_bytes(vl_convert.vegalite_to_png(still(figure.spec), vl_version=_version(), scale=_PNG_SCALE))
    return str(file)


def _write_csv(grid: Grid, file: Path) -> str:
    with file.open("w", encoding="utf-8", newline="") as opened:
        writer = csv.writer(opened)
        writer.writerow(grid.columns)
        writer.writerows([cell.value if isinstance(cell, Cell) else cell for cell in row] for row in grid.rows)
    return str(file)
