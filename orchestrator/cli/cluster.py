"""`dab cluster`: the embedded cluster on this machine."""

from typing import Annotated

import typer

from orchestrator.cli.arguments import Json, group
from orchestrator.output import Output

app = group("The embedded cluster on this machine.")


@app.command("up", epilog="Example: dab cluster up --num-cpus 8")
def up(
    num_cpus: Annotated[int | None, typer.Option(min=1, help="CPUs that it hands out.")] = None,
    port: Annotated[int | None, typer.Option(help="Port of Ray's control service; default a free one.")] = None,
    dashboard_port: Annotated[int | None, typer.Option(help="Port of the dashboard; default a free one.")] = None,
    as_json: Json = False,
) -> None:
    """Start the cluster."""
    from orchestrator import commands

    out = Output(is_json=as_json)
    out.result(*commands.bring_cluster_up(num_cpus, port, dashboard_port, out.note))
    out.hint("dab", "cluster", "down")


@app.command("down", epilog="Example: dab cluster down")
def down(as_json: Json = False) -> None:
    """End the cluster with its jobs, and this machine's experiment tracker. What they recorded stays."""
    from orchestrator import commands

    out = Output(is_json=as_json)
    out.result(*commands.bring_cluster_down(out.note))


@app.command("status", epilog="Example: dab cluster status")
def status(as_json: Json = False) -> None:
    """Show whether cluster and experiment tracker run."""
    from orchestrator import commands

    Output(is_json=as_json).result(*commands.show_cluster())
