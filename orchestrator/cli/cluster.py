"""`dab cluster`: the embedded cluster on this machine, those elsewhere, and scripts that make one."""

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.arguments import Address, ConfigFile, Json, Set, group
from orchestrator.output import Output

app = group("The cluster on this machine, and those elsewhere.")


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


@app.command("status", epilog="Example: dab cluster status --address lab")
def status(address: Address = None, as_json: Json = False) -> None:
    """Show whether cluster and experiment tracker run; of a cluster elsewhere, its nodes and who runs what."""
    from orchestrator import commands

    Output(is_json=as_json).result(*commands.show_cluster(address))


@app.command(
    "add", epilog="Example: dab cluster add lab --address https://head.lab:8265 --token-file ~/.ray/auth_token"
)
def add(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What --address calls it from now on.")],
    address: Annotated[str, typer.Option(metavar="URL", help="Its Jobs API, such as http://127.0.0.1:8265.")],
    token_file: Annotated[str | None, typer.Option(help="File with its token; default where Ray looks.")] = None,
    tracking: Annotated[str | None, typer.Option(metavar="URL", help="MLflow server of runs sent there.")] = None,
    storage: Annotated[str | None, typer.Option(help="Folder or URL of runs sent there, seen by every node.")] = None,
    verify: Annotated[str | None, typer.Option(help="File of the authority that signed its certificate.")] = None,
    max_running: Annotated[int | None, typer.Option(min=1, help="Runs of one user at a time; more wait.")] = None,
    python: Annotated[str | None, typer.Option(help="Interpreter of its jobs; default `python` of its nodes.")] = None,
    is_open: Annotated[bool, typer.Option("--open", help="Accept that it takes commands without a token.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Replace a cluster of this name.")] = False,
    no_check: Annotated[bool, typer.Option("--no-check", help="Do not ask whether it answers.")] = False,
    as_json: Json = False,
) -> None:
    """Give a cluster elsewhere a name, kept in clusters.toml; it is asked whether it takes the token."""
    from orchestrator import cluster_view
    from orchestrator.clusters_file import Entry

    entry = Entry(address, token_file, None, tracking, storage, verify or True, max_running, python, is_open)
    out = Output(is_json=as_json)
    out.result(*cluster_view.add(name, entry, replace=replace, is_checked=not no_check))
    out.hint("dab", "submit", "CONFIG", "--address", name)


@app.command("list", epilog="Example: dab cluster list")
def list_clusters(as_json: Json = False) -> None:
    """List the clusters elsewhere that have a name here."""
    from orchestrator import cluster_view

    Output(is_json=as_json).result(*cluster_view.list_clusters())


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
