r"""The one place that knows whether a person, a program or a terminal reads the output.

Data goes to stdout, everything else to stderr. With `--json` stdout holds exactly one JSON document. Commands say what
they found; how it looks is decided here. Names that come out of files may hold anything: characters that would steer a
terminal are shown as escapes, such as \x1b.
"""

import json
import math
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Protocol

from dabnn.errors import DabError as DabError  # the command line meets our failures here; it may not import dabnn

_SECONDS_BETWEEN_LINES = 2.0
# Control characters but for tab and line feed, lines and directions of Unicode, and halves of characters.
_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@dataclass(frozen=True)
class Table:
    """Rows for a person to read.

    Attributes:
        columns: Headings.
        rows: One sequence of cells a row, as long as `columns`.
        styles: How a terminal shows each row, as rich names it, such as "yellow"; fewer than rows: plain.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    styles: Sequence[str] = ()

    @classmethod
    def of(cls, records: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> "Table":
        """Return a table of the keys `columns` of each record."""
        return cls(columns, [[record.get(column) for column in columns] for record in records])

    def __str__(self) -> str:
        cells = [list(self.columns), *([_cell(value) for value in row] for row in self.rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.columns))]
        lines = (
            "  ".join(
                cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, self._is_right(), strict=True)
            )
            for row in cells
        )
        return "\n".join(line.rstrip() for line in lines)

    def __rich__(self) -> Any:
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
        for column, is_right in zip(self.columns, self._is_right(), strict=True):
            table.add_column(Text(shown(column)), justify="right" if is_right else "left")
        for row, style in zip_longest(self.rows, self.styles, fillvalue=""):
            table.add_row(*(Text(shown(_cell(value))) for value in row), style=str(style))
        return table

    def _is_right(self) -> list[bool]:
        return [bool(self.rows) and all(_is_number(row[i]) for row in self.rows) for i in range(len(self.columns))]


@dataclass(frozen=True)
class Report:
    """What a person reads of one result: lines and tables, which a terminal shows with colours.

    Attributes:
        parts: Text and tables, from top to bottom.
    """

    parts: Sequence[str | Table]

    def __str__(self) -> str:
        return "\n".join(str(part) for part in self.parts)


# The JSON document of a result, and what a person reads instead.
View = tuple[dict[str, Any], str | Report]


class Progress(Protocol):
    """Where a long task says how far it is."""

    def update(self, done: float, total: float | None = None, text: str = "") -> None:
        """Report `done` of `total` units (None: unknown) and what else there is to say, such as the loss."""


class Output:
    """Writes results, notes and progress of one command."""

    def __init__(self, *, is_json: bool = False) -> None:
        self.is_json = is_json

    def result(self, data: object, human: object = None) -> None:
        """Write what the command found; call it once.

        Args:
            data: The JSON document: plain values, dataclasses and paths.
            human: What a person reads instead, `str()` of it; None writes one `key: value` line for each key of `data`.
        """
        if self.is_json:
            text = json.dumps(_finite(data), default=lambda value: _finite(_plain(value)), ensure_ascii=False)
            text = _STEERING.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
        else:
            if isinstance(human, Report) and sys.stdout.isatty():
                _print_rich(human)
                return
            text = shown(_key_lines(_plain_mapping(data)) if human is None else str(human))
        print(text, file=sys.stdout, flush=True)  # noqa: T201 - before a hint, wherever that goes

    def stream(self, chunks: Iterable[str]) -> None:
        """Write text that arrives bit by bit, as it arrives; as JSON `{"text": ...}` when all of it is there."""
        if self.is_json:
            self.result({"text": "".join(chunks)})
            return
        for chunk in chunks:
            sys.stdout.write(chunk)
            sys.stdout.flush()

    def note(self, text: str) -> None:
        """Tell a person something that is not data."""
        print(shown(text), file=sys.stderr, flush=True)  # noqa: T201

    def hint(self, *command: str) -> None:
        """End a success by naming the next command, word by word, with the user's own names; programs are not told."""
        if not self.is_json:
            self.note(f"next: {shlex.join(command)}")

    def error(self, message: str, exit_code: int, details: Mapping[str, object] | None = None) -> None:
        """Write why the command failed; as JSON with `details` beside the error."""
        self.note(f"error: {message}")
        if self.is_json:
            self.result({**(details or {}), "error": {"message": message, "exit_code": exit_code}})

    @contextmanager
    def progress(self, description: str, unit: str = "") -> Iterator[Progress]:
        """Show on stderr how far a task is: a bar on a terminal, else a plain line every two seconds at most.

        Args:
            description: What is going on.
            unit: What is counted, for the rate.
        """
        if not sys.stderr.isatty():
            lines = _Lines(description, unit, self.note)
            yield lines
            lines.finish()
            return
        from rich.console import Console  # 0.1 s that only a bar has to cost
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as RichProgress

        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[status]}"))
        with RichProgress(*columns, console=Console(stderr=True)) as bars:
            yield _Bar(bars, description, unit)


def shown(text: str) -> str:
    """Return a text with escapes for the characters that would steer a terminal; lines and tabs stay."""
    return _STEERING.sub(lambda found: _escape(found[0]), text)


def one_line(text: str) -> str:
    """Return what comes out of a file, such as a name, for the middle of a line."""
    return shown(text).replace("\n", r"\x0a").replace("\t", r"\x09")


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def progress_text(done: float, total: float | None, rate: float, unit: str, text: str = "") -> str:
    """Return how far a task is, such as `512/2,048 images (25 %), 1,024 images/s, 2 s left, loss 0.31`.

    Args:
        done: Finished units.
        total: All units, or None when that is unknown.
        rate: Units a second; 0 when nothing was measured yet.
        unit: What is counted.
        text: What else there is to say.
    """
    of_total = f"/{total:,.0f}" if total else ""
    parts = [f"{done:,.0f}{of_total} {unit}".rstrip() + (f" ({100 * done / total:.0f} %)" if total else "")]
    if rate > 0:
        parts.append(f"{rate:,.0f} {unit}/s" if rate >= 10 else f"{rate:.2g} {unit}/s")
        if total and done < total:
            parts.append(f"{duration_text((total - done) / rate)} left")
    return ", ".join([*parts, text] if text else parts)


def duration_text(seconds: float) -> str:
    """Return a length of time as a person says it: `42 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class _Rate:
    """Units a second since the first update, so that a resumed task does not count what was done before."""

    def __init__(self) -> None:
        self._first: tuple[float, float] | None = None

    def after(self, done: float) -> float:
        now = time.monotonic()
        if self._first is None:
            self._first = (now, done)
        start, start_done = self._first
        return (done - start_done) / (now - start) if now > start else 0.0


class _Lines:
    """Progress as plain lines."""

    def __init__(self, description: str, unit: str, write: Callable[[str], None]) -> None:
        self._description, self._unit, self._write = description, unit, write
        self._rate, self._written_at = _Rate(), time.monotonic()
        self._unwritten: tuple[float, float | None, float, str] | None = None

    def update(self, done: float, total: float | None = None, text: str = "") -> None:
        self._unwritten = (done, total, self._rate.after(done), text)
        if time.monotonic() - self._written_at >= _SECONDS_BETWEEN_LINES:
            self.finish()

    def finish(self) -> None:
        if self._unwritten is not None:
            done, total, rate, text = self._unwritten
            self._write(f"{self._description}: {progress_text(done, total, rate, self._unit, text)}")
            self._unwritten, self._written_at = None, time.monotonic()


class _Bar:
    """Progress as a bar of rich."""

    def __init__(self, bars: Any, description: str, unit: str) -> None:
        self._bars, self._unit, self._rate = bars, unit, _Rate()
        self._task = bars.add_task(shown(description), total=None, status="")

    def update(self, done: float, total: float | None = None, text: str = "") -> None:
        status = progress_text(done, total, self._rate.after(done), self._unit, shown(text))
        self._bars.update(self._task, completed=done, total=total, status=status)


def _print_rich(report: Report) -> None:
    from rich.console import Console

    console = Console(file=sys.stdout)
    for part in report.parts:
        console.print(shown(part) if isinstance(part, str) else part, markup=False, highlight=False)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return "x".join(str(part) for part in value)
    return str(value)


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _plain(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} is no JSON value")


def _finite(value: object) -> object:
    """Return plain `value` with null for what JSON has no number for: NaN and the infinities."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _plain_mapping(data: object) -> Mapping[str, object]:
    if isinstance(data, Mapping):
        return data
    if is_dataclass(data) and not isinstance(data, type):
        return asdict(data)
    raise TypeError(f"{type(data).__name__} has no keys to print; give result() a text for people too")


def _key_lines(data: Mapping[str, object]) -> str:
    width = max((len(key) for key in data), default=0)
    return "\n".join(f"{key.ljust(width)}  {_cell(value)}" for key, value in data.items())
