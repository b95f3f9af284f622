"""`dab cluster`: the embedded cluster on this machine, and scripts that make one elsewhere."""

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.arguments import ConfigFile, Json, Set, group
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


@app.command(
    "slurm", epilog="Example: dab cluster slurm examples/digits.yaml --nodes 4 --gpus-per-node 8 --output job.sh"
)
def slurm(
    config: ConfigFile,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of the Slurm job.")],
    gpus_per_node: Annotated[int, typer.Option(min=0, help="GPUs of each node.")] = 0,
    output: Annotated[Path | None, typer.Option(help="File to write; default the script is printed.")] = None,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Write an sbatch script that starts Ray on the nodes of a Slurm job and trains CONFIG there."""
    from orchestrator.slurm import write_script

    out = Output(is_json=as_json)
    view = write_script(config, overrides or [], num_nodes=nodes, gpus_per_node=gpus_per_node, output=output)
    out.result(*view)
    if output is not None:
        out.hint("sbatch", str(output))
