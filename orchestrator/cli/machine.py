"""Commands about this machine: the experiment browser, the demo, and what is wrong with the installation."""

from typing import Annotated

import typer

from orchestrator.cli.arguments import Json, TrackingUri
from orchestrator.output import DabError, Output

app = typer.Typer()


@app.command("ui", epilog="Example: dab ui digits-sweep")
def ui(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN|SWEEP]", help="What to show; default the experiment that ran last.")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port on loopback; default a free one.")] = None,
    opens: Annotated[
        bool | None, typer.Option("--open/--no-open", help="Open the web browser; default where there is a desktop.")
    ] = None,
    uri: TrackingUri = None,
    as_json: Json = False,
) -> None:
    """Start the experiment browser, open it and print its address. `dab cluster down` ends it."""
    from orchestrator.browser import start_browser

    out = Output(is_json=as_json)
    out.result(*start_browser(run, uri, port, opens=opens, say=out.note, is_json=as_json))


@app.command("demo", epilog="Example: dab demo")
def demo(as_json: Json = False) -> None:
    """Shards, training, search and a packed model on real digits, in a few minutes."""
    from orchestrator import commands

    out = Output(is_json=as_json)
    data, text = commands.demo(out.note)
    out.result(data, text)
    for command in commands.after_demo(data):
        out.hint(*command)


@app.command("doctor", epilog="Example: dab doctor")
def doctor(as_json: Json = False) -> None:
    """Check installation, devices, store and servers, and say what to do. The exit code is 1 on a problem."""
    from orchestrator.doctor import doctor as look

    out = Output(is_json=as_json)
    is_ok, view = look()
    out.result(*view)
    if not is_ok:
        raise typer.Exit(DabError.exit_code)
    out.hint("dab", "demo")
