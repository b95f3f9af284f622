"""Commands that show results: the report of a sweep or a run, and runs side by side."""

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.arguments import Json, TrackingUri
from orchestrator.output import Output

app = typer.Typer()
Folder = Annotated[
    Path | None, typer.Option("-o", "--output", metavar="DIR", help="Folder for the files; default one named after it.")
]


@app.command("report", epilog="Example: dab report digits-sweep -o report")
def report(
    run: Annotated[str, typer.Argument(metavar="SWEEP|RUN", help="Id, the beginning of one, or a name.")],
    folder: Folder = None,
    uri: TrackingUri = None,
    as_json: Json = False,
) -> None:
    """Write the report of a sweep or a run: an HTML page that needs no network, its charts as PNG, tables as CSV."""
    from orchestrator import commands
    from orchestrator.report import report as write

    out = Output(is_json=as_json)
    with out.progress(f"report {run}", "images") as bar:
        view = write(commands.tracking_uri(uri, out.note, run), run, folder, bar.update)
    out.result(*view)
    front = view[0].get("front")
    out.hint("dab", *(["export", front[0]["name"], "-o", "model.safetensors"] if front else ["compare", run, "RUN"]))


@app.command("compare", epilog="Example: dab compare 3f2a 9c1d -o comparison")
def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN RUN...", help="Two runs or more.")],
    folder: Folder = None,
    uri: TrackingUri = None,
    as_json: Json = False,
) -> None:
    """Show runs side by side: results, learning curves, and what differs in their configurations."""
    from orchestrator import commands
    from orchestrator.report import compare as write

    out = Output(is_json=as_json)
    view = write(commands.tracking_uri(uri, out.note, runs[0]), runs, folder)
    out.result(*view)
    out.hint("dab", "report", runs[0])
