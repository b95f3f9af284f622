"""Commands about runs: submit one, list them, look at one, stop it and resume it."""

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.arguments import Address, Detach, Json, Run, Set, TrackingUri, ValFraction, group
from orchestrator.output import Output

app = typer.Typer()
listing = group("The runs, and what they leave behind.")
app.add_typer(listing, name="runs", no_args_is_help=False)


@app.command("submit", epilog="Example: dab submit --sweep --images photos   or: dab submit photos.yaml --set seed=2")
def submit(
    config: Annotated[Path | None, typer.Argument(metavar="[CONFIG]", help="YAML configuration.")] = None,
    overrides: Set = None,
    images: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Train on this folder of images; without CONFIG, as `dab init DIR` would configure it.",
        ),
    ] = None,
    val_fraction: ValFraction = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Search over the section `search` instead.")] = False,
    address: Address = None,
    detach: Detach = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would run, and start nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Train on a cluster: this machine's, started if it does not run, or another. Follows the run to its end."""
    from orchestrator import commands
    from orchestrator.own_images import Images

    if images is None and val_fraction is not None:
        raise typer.BadParameter("has no effect without --images.", param_hint="--val-fraction")
    out = Output(is_json=as_json)
    own = None if images is None else Images(images, val_fraction, out.progress)
    changes = overrides or []
    if dry_run:
        out.result(*commands.dry_run(config, changes, sweep=sweep, say=out.note, address=address, images=own))
        return
    data, text = commands.submit_run(
        config, changes, sweep=sweep, detach=detach, say=out.note, address=address, images=own
    )
    out.result(data, text)
    short = data["run_id"][:8]
    ended = ["ui", short] if sweep else ["export", short, "-o", "model.safetensors"]
    out.hint("dab", *(["logs", short, "--follow"] if detach else ended))


@listing.callback(invoke_without_command=True, epilog="Example: dab runs --experiment dab")
def runs(
    context: typer.Context,
    experiment: Annotated[str | None, typer.Option(help="Only runs of this experiment.")] = None,
    uri: TrackingUri = None,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """List the runs, newest first, trials below their sweep; or free what no run needs."""
    if context.invoked_subcommand is not None:
        return
    from orchestrator import commands

    out = Output(is_json=as_json)
    out.result(*commands.list_runs(uri, experiment=experiment, say=out.note, address=address))
    out.hint("dab", "status", "RUN")


@listing.command("gc", epilog="Example: dab runs gc --dry-run")
def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be freed, and free nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Free more than old partial files, too.")] = False,
    uri: TrackingUri = None,
    as_json: Json = False,
) -> None:
    """Free what no run needs: folders of deleted runs, half-written files, old code, copies of runs behind URLs."""
    from orchestrator import commands, retention

    out = Output(is_json=as_json)
    address = commands.tracking_uri(uri, out.note)
    data, text = retention.collect(address, is_dry=dry_run, has_consent=yes)
    out.result(data, text)
    if data["left"]:
        out.hint("dab", "runs", "gc", "--yes")


@app.command("status", epilog="Example: dab status digits-bincifarfbin")
def status(run: Run, uri: TrackingUri = None, address: Address = None, as_json: Json = False) -> None:
    """Show where a run stands."""
    from orchestrator import commands

    out = Output(is_json=as_json)
    out.result(*commands.show_status(uri, run, out.note, address))


@app.command("logs", epilog="Example: dab logs 3f2a --follow")
def logs(
    run: Run,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until the run has ended.")] = False,
    uri: TrackingUri = None,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Print the log of a run."""
    from orchestrator import commands

    out = Output(is_json=as_json)
    out.stream(commands.logs(uri, run, follow=follow, say=out.note, address=address))


@app.command("stop", epilog="Example: dab stop 3f2a")
def stop(
    run: Run,
    now: Annotated[bool, typer.Option("--now", help="Without a last checkpoint.")] = False,
    grace_s: Annotated[float, typer.Option(help="Seconds to wait for the last checkpoint.")] = 60.0,
    uri: TrackingUri = None,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Stop a run after a checkpoint."""
    from orchestrator import commands

    out = Output(is_json=as_json)
    data, text = commands.stop_run(uri, run, now=now, grace_s=grace_s, say=out.note, address=address)
    out.result(data, text)
    out.hint("dab", *(["export", run, "-o", "model.safetensors"] if data["kind"] == "sweep" else ["resume", run]))


@app.command("resume", epilog="Example: dab resume 3f2a, or of a sweep: dab resume 3f2a --set search.num_trials=+20")
def resume(
    run: Run,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Another limit of a sweep, such as search.num_trials=+20."),
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Accept other code and another environment than the run began with, and that its cluster is away.",
        ),
    ] = False,
    detach: Detach = False,
    uri: TrackingUri = None,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Continue a stopped or failed run from its newest checkpoint, or a sweep, on the cluster it was on by default."""
    from orchestrator import commands

    out = Output(is_json=as_json)
    view = commands.resume_run(
        uri, run, detach=detach, say=out.note, address=address, is_forced=force, changes=changes or []
    )
    out.result(*view)
    out.hint("dab", *(["logs", run, "--follow"] if detach else ["status", run]))
