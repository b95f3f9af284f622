"""Commands about this machine: the experiment browser and the demo."""

from typing import Annotated

import typer

from orchestrator.cli.arguments import Json
from orchestrator.output import Output

app = typer.Typer()


@app.command("ui", epilog="Example: dab ui --port 5000")
def ui(
    port: Annotated[int | None, typer.Option(help="Port on loopback; default a free one.")] = None,
    as_json: Json = False,
) -> None:
    """Start the experiment browser and print its address. `dab cluster down` ends it."""
    from orchestrator import commands

    out = Output(is_json=as_json)
    out.result(*commands.start_browser(port, out.note))


@app.command("demo", epilog="Example: dab demo")
def demo(as_json: Json = False) -> None:
    """Shards, training, search and a packed model on real digits, in a few minutes."""
    from orchestrator import commands

    out = Output(is_json=as_json)
    data, text = commands.demo(out.note)
    out.result(data, text)
    for command in commands.after_demo(data):
        out.hint(*command)
