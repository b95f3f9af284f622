"""The program `dab`: each command is a signature, one call and one output.

Nothing heavy is imported at module level, so that `dab --help` answers at once. Commands raise `DabError`; only `main`
turns it into a message and an exit code: 1 failure, 2 usage or invalid input, 130 interrupted. A bug keeps its
traceback.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from typer.exceptions import TyperException

from orchestrator.output import DabError, Output

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML configuration, such as examples/digits.yaml.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Replace a value, e.g. --set train.epochs=10. May be repeated."),
]
Dataset = Annotated[str, typer.Argument(metavar="DEST", help="Folder or URL of the dataset: where manifest.json is.")]
BinStart = Annotated[int | None, typer.Option(help="First layer with binary weights, counted from 1.")]
BinEnd = Annotated[int | None, typer.Option(help="Last layer with binary weights.")]
Run = Annotated[str, typer.Argument(metavar="RUN", help="Run id, the beginning of one, or a run's name.")]
TrackingUri = Annotated[
    str | None, typer.Option("--tracking-uri", metavar="URL", help="MLflow server; default this machine's own.")
]
Detach = Annotated[bool, typer.Option("--detach", help="Return at once instead of following the log.")]


def _group(help_text: str) -> typer.Typer:
    return typer.Typer(
        help=help_text,
        no_args_is_help=True,
        rich_markup_mode=None,
        add_completion=False,
        pretty_exceptions_enable=False,
    )


app = _group("Train, search and ship distribution-aware binarized networks.")
data_app = _group("Build, check and show datasets.")
models_app = _group("The models that can be trained.")
config_app = _group("What can be configured, and what a configuration means.")
cluster_app = _group("The embedded cluster on this machine.")
app.add_typer(data_app, name="data")
app.add_typer(models_app, name="models", no_args_is_help=False)
app.add_typer(config_app, name="config")
app.add_typer(cluster_app, name="cluster")


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        from importlib.metadata import version

        Output().result({}, f"dab {version('dab')}")
        raise typer.Exit


@app.callback(epilog="Example: dab data build builtin:digits digits")
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    pass


@data_app.command("build", epilog="Example: dab data build photos/ shards/photos --val-fraction 0.2")
def data_build(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder or archive of images, or builtin:digits.")],
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="Folder for shards and manifest.json.")],
    layout: Annotated[str, typer.Option("--format", help="Layout of SRC; docs/data_sources.md lists them.")] = "auto",
    shard_mb: Annotated[int, typer.Option(min=1, help="About how large a shard becomes, MiB.")] = 64,
    val_fraction: Annotated[float | None, typer.Option(help="Share of each class to draw into val.")] = None,
    seed: Annotated[int, typer.Option(help="Of that draw.")] = 0,
    split_lists: Annotated[str | None, typer.Option(metavar="FOLDER", help="Folder of train.txt and val.txt.")] = None,
    resize: Annotated[int | None, typer.Option(help="Make longer shorter sides this many pixels long.")] = None,
    encode: Annotated[str | None, typer.Option(help="Store images as png, jpeg or webp; default as they came.")] = None,
    quality: Annotated[int | None, typer.Option(help="Of jpeg and webp, 1 to 100; default 90.")] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="Processes; default one a CPU.")] = None,
    cluster: Annotated[bool, typer.Option("--cluster", help="Make the shards on the cluster instead.")] = False,
    as_json: Json = False,
) -> None:
    """Turn images into shards with a manifest. The same command goes on with a build that was cut off."""
    from orchestrator import datasets

    out = Output(is_json=as_json)
    options = datasets.BuildOptions(
        source=source,
        dest=str(dest),
        layout=layout,
        shard_mb=shard_mb,
        val_fraction=val_fraction,
        seed=seed,
        split_lists=split_lists,
        resize=resize,
        encode=encode,
        quality=quality,
    )
    if cluster:
        from orchestrator.cluster_build import build_on_cluster

        view = build_on_cluster(options, num_processes=processes, say=out.note)
    else:
        with out.progress(f"build {dest}", "images") as bar:
            view = datasets.build(options, num_processes=processes, say=out.note, on_progress=bar.update)
    out.result(*view)
    out.hint("dab", "data", "check", str(dest))


@data_app.command("check", epilog="Example: dab data check shards/photos --source photos/")
def data_check(
    dest: Dataset,
    source: Annotated[str | None, typer.Option(metavar="SRC", help="Compare with what it was built from.")] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="Processes; default one a CPU.")] = None,
    as_json: Json = False,
) -> None:
    """Compare every shard with the manifest. The exit code is 1 when something is wrong."""
    from orchestrator import datasets

    out = Output(is_json=as_json)
    with out.progress(f"check {dest}", "images") as bar:
        is_ok, view = datasets.check(dest, source=source, num_processes=processes, on_progress=bar.update)
    out.result(*view)
    if not is_ok:
        raise typer.Exit(DabError.exit_code)
    out.hint("dab", "data", "show", dest, "-o", "sheet.png")


@data_app.command("show", epilog="Example: dab data show shards/photos --transform crop_flip -o sheet.png")
def data_show(
    dest: Dataset,
    split: Annotated[str, typer.Option(help="train (as augmented) or val (as evaluated).")] = "train",
    transform: Annotated[str, typer.Option(metavar="NAME", help="As data.transform of a configuration.")] = "auto",
    input_size: Annotated[
        int | None, typer.Option(min=1, help="Side that the network takes; default that of the images, at most 224.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Another one shows other samples.")] = 0,
    file: Annotated[Path | None, typer.Option("-o", "--output", metavar="PNG", help="Draw 64 samples.")] = None,
    as_json: Json = False,
) -> None:
    """Print how many samples each class has, and draw samples as a network sees them."""
    from orchestrator import datasets

    out = Output(is_json=as_json)
    view = datasets.show(dest, split=split, transform=transform, input_size=input_size, seed=seed, file=file)
    out.result(*view)
    out.hint("dab", "submit", "CONFIG", "--set", f"data.train={dest}")


@models_app.callback(invoke_without_command=True, epilog="Example: dab models show bincifarfbin --width 0.25")
def models(context: typer.Context, as_json: Json = False) -> None:
    """List the models that can be trained, or show one."""
    if context.invoked_subcommand is not None:
        return
    from orchestrator.zoo import list_models

    out = Output(is_json=as_json)
    out.result(*list_models())
    out.hint("dab", "models", "show", "NAME")


@models_app.command("show", epilog="Example: dab models show sketchanetfbin --bin-start 2 --bin-end 7")
def models_show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Model; `dab models` lists them.")],
    bin_start: BinStart = None,
    bin_end: BinEnd = None,
    num_classes: Annotated[int | None, typer.Option(help="Number of classes; default that of the publication.")] = None,
    width: Annotated[float, typer.Option(help="Factor on the number of channels of each layer.")] = 1.0,
    input_size: Annotated[int | None, typer.Option(help="Side of the square input, pixels.")] = None,
    in_channels: Annotated[int | None, typer.Option(help="Channels of the images: 1 or 3.")] = None,
    block: Annotated[str | None, typer.Option(help="Order of the blocks: reference or bireal.")] = None,
    activation: Annotated[str | None, typer.Option(help="relu or rprelu.")] = None,
    as_json: Json = False,
) -> None:
    """Show a model's layers and sizes. Layers are numbered as --bin-start and --bin-end count them."""
    from orchestrator.zoo import show_model

    view = show_model(
        name,
        num_classes=num_classes,
        width=width,
        input_size=input_size,
        in_channels=in_channels,
        block=block,
        activation=activation,
        bin_start=bin_start,
        bin_end=bin_end,
    )
    Output(is_json=as_json).result(*view)


@config_app.command("schema", epilog="Example: dab config schema > dab.schema.json")
def config_schema(as_json: Json = False) -> None:
    """Print the JSON schema of a configuration file. Editors complete keys from it; it is JSON without --json too."""
    import json

    from orchestrator.config import config_schema as schema

    Output(is_json=as_json).result(schema(), json.dumps(schema(), indent=2))


@config_app.command("show", epilog="Example: dab config show examples/digits.yaml --set train.epochs=10")
def config_show(config: ConfigFile, overrides: Set = None, as_json: Json = False) -> None:
    """Print what a configuration means, with every default and absolute paths."""
    from orchestrator.config import load_config, resolve_paths, to_dict, to_yaml

    resolved = resolve_paths(load_config(config, overrides or ()))
    Output(is_json=as_json).result(to_dict(resolved), to_yaml(resolved).rstrip())


@config_app.command("spec", epilog="Example: dab config spec examples/digits.yaml --set data.train=digits > spec.json")
def config_spec(config: ConfigFile, overrides: Set = None, as_json: Json = False) -> None:
    """Print the specification that `torchrun -m dabnn.train SPEC FOLDER` reads; it is JSON without --json too."""
    from orchestrator import commands

    Output(is_json=as_json).result(*commands.show_spec(config, overrides or []))


@app.command("submit", epilog="Example: dab submit examples/digits.yaml --set data.train=digits --set train.epochs=10")
def submit(
    config: Annotated[Path | None, typer.Argument(metavar="[CONFIG]", help="YAML configuration.")] = None,
    overrides: Set = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Search over the section `search` instead.")] = False,
    detach: Detach = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would run, and start nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Train on the cluster; started on this machine if it does not run. Follows the run to its end."""
    from orchestrator import commands

    out = Output(is_json=as_json)
    if dry_run:
        out.result(*commands.dry_run(config, overrides or [], sweep=sweep))
        return
    data, text = commands.submit_run(config, overrides or [], sweep=sweep, detach=detach, say=out.note)
    out.result(data, text)
    out.hint(
        "dab",
        *(
            ["logs", data["run_id"][:8], "--follow"]
            if detach
            else ["export", data["run_id"][:8], "-o", "model.safetensors"]
        ),
    )


@app.command("runs", epilog="Example: dab runs --experiment dab")
def runs(
    experiment: Annotated[str | None, typer.Option(help="Only runs of this experiment.")] = None,
    uri: TrackingUri = None,
    as_json: Json = False,
) -> None:
    """List the runs, newest first, trials below their sweep."""
    from orchestrator import commands

    out = Output(is_json=as_json)
    out.result(*commands.list_runs(uri, experiment=experiment, say=out.note))
    out.hint("dab", "status", "RUN")


@app.command("status", epilog="Example: dab status digits-bincifarfbin")
def status(run: Run, uri: TrackingUri = None, as_json: Json = False) -> None:
    """Show where a run stands."""
    from orchestrator import commands

    out = Output(is_json=as_json)
    out.result(*commands.show_status(uri, run, out.note))


@app.command("logs", epilog="Example: dab logs 3f2a --follow")
def logs(
    run: Run,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until the run has ended.")] = False,
    uri: TrackingUri = None,
    as_json: Json = False,
) -> None:
    """Print the log of a run."""
    from orchestrator import commands

    out = Output(is_json=as_json)
    out.stream(commands.logs(uri, run, follow=follow, say=out.note))


@app.command("stop", epilog="Example: dab stop 3f2a")
def stop(
    run: Run,
    now: Annotated[bool, typer.Option("--now", help="Without a last checkpoint.")] = False,
    grace_s: Annotated[float, typer.Option(help="Seconds to wait for the last checkpoint.")] = 60.0,
    uri: TrackingUri = None,
    as_json: Json = False,
) -> None:
    """Stop a run after a checkpoint."""
    from orchestrator import commands

    out = Output(is_json=as_json)
    data, text = commands.stop_run(uri, run, now=now, grace_s=grace_s, say=out.note)
    out.result(data, text)
    out.hint("dab", *(["export", run, "-o", "model.safetensors"] if data["kind"] == "sweep" else ["resume", run]))


@app.command("resume", epilog="Example: dab resume 3f2a")
def resume(run: Run, detach: Detach = False, uri: TrackingUri = None, as_json: Json = False) -> None:
    """Continue a stopped or failed run from its newest checkpoint."""
    from orchestrator import commands

    out = Output(is_json=as_json)
    out.result(*commands.resume_run(uri, run, detach=detach, say=out.note))
    out.hint("dab", *(["logs", run, "--follow"] if detach else ["status", run]))


@app.command("export", epilog="Example: dab export 3f2a -o model.safetensors")
def export(
    run: Run,
    file: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The packed model to write.")],
    half: Annotated[bool, typer.Option("--half", help="Store scalars and float layers as float16.")] = False,
    uri: TrackingUri = None,
    as_json: Json = False,
) -> None:
    """Write the packed model of a run's best checkpoint, checked against the trained network."""
    from orchestrator import commands

    out = Output(is_json=as_json)
    out.result(*commands.export(uri, run, file, half=half, say=out.note))
    out.hint("dab", "predict", str(file), "IMAGE")


@app.command("evaluate", epilog="Example: dab evaluate model.safetensors --data digits")
def evaluate(
    target: Annotated[str, typer.Argument(metavar="RUN-or-FILE", help="A run, or a packed model.")],
    data: Annotated[str | None, typer.Option(metavar="URL", help="Folder or URL whose split val is used.")] = None,
    ten_crop: Annotated[
        bool | None,
        typer.Option(
            "--ten-crop/--centre-crop",
            help="Average ten crops of each image, or take the middle one; default as the run was configured, the "
            "middle one for a file.",
        ),
    ] = None,
    uri: TrackingUri = None,
    as_json: Json = False,
) -> None:
    """Measure accuracy on the split val."""
    from orchestrator import commands

    out = Output(is_json=as_json)
    with out.progress(f"evaluate {target}", "images") as bar:
        view = commands.evaluate(uri, target, data, ten_crop=ten_crop, on_batch=bar.update, say=out.note)
    out.result(*view)


@app.command("predict", epilog="Example: dab predict model.safetensors photo.png")
def predict(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A packed model.")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files.")],
    as_json: Json = False,
) -> None:
    """Print the most probable classes of images."""
    from orchestrator import commands

    Output(is_json=as_json).result(*commands.predict(file, images))


@app.command("sensitivity", epilog="Example: dab sensitivity 3f2a --budget-ops 2e6 -o plan.yaml")
def sensitivity(
    run: Run,
    twin: Annotated[
        str | None, typer.Option(metavar="RUN", help="Float run of the same model, to measure loss_if_binary in.")
    ] = None,
    num_images: Annotated[int, typer.Option(min=1, help="Validation images to measure on, at most.")] = 1000,
    budget_ops: Annotated[
        float | None, typer.Option(help="Operations of the plan; 64 binary multiply-accumulates are one.")
    ] = None,
    budget_bytes: Annotated[int | None, typer.Option(help="Bytes of the packed model, instead.")] = None,
    file: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="PLAN.yaml", help="Write the plan for binarize.plan.")
    ] = None,
    uri: TrackingUri = None,
    as_json: Json = False,
) -> None:
    """Measure what each layer of a run costs in accuracy, on the cluster, and propose which to binarize."""
    from orchestrator import commands

    out = Output(is_json=as_json)
    data, text = commands.sensitivity(
        uri,
        run,
        twin=twin,
        num_images=num_images,
        budget_ops=budget_ops,
        budget_bytes=budget_bytes,
        file=file,
        say=out.note,
    )
    out.result(data, text)
    out.hint(*commands.after_sensitivity(data))


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


@cluster_app.command("up", epilog="Example: dab cluster up --num-cpus 8")
def cluster_up(
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


@cluster_app.command("down", epilog="Example: dab cluster down")
def cluster_down(as_json: Json = False) -> None:
    """End the cluster with its jobs, and this machine's experiment tracker. What they recorded stays."""
    from orchestrator import commands

    out = Output(is_json=as_json)
    out.result(*commands.bring_cluster_down(out.note))


@cluster_app.command("status", epilog="Example: dab cluster status")
def cluster_status(as_json: Json = False) -> None:
    """Show whether cluster and experiment tracker run."""
    from orchestrator import commands

    Output(is_json=as_json).result(*commands.show_cluster())


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    out = Output(is_json="--json" in arguments)
    try:
        # With standalone_mode off, Typer returns the exit code (None for a plain end) and lets its own errors through.
        code = app(args=list(arguments), prog_name="dab", standalone_mode=False) or 0
        sys.stdout.flush()
    except DabError as error:
        out.error(str(error), error.exit_code, error.details)
        return error.exit_code
    except TyperException as error:
        _explain_usage(out, error)
        return error.exit_code
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        # The reader went away, as `head` does; without this, Python complains once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DabError.exit_code
    if code == 130:
        out.error("interrupted", code)
    return int(code)


def _explain_usage(out: Output, error: TyperException) -> None:
    message = error.format_message()
    context: typer.Context | None = getattr(error, "ctx", None)
    if message.startswith("Usage:") and not out.is_json:
        out.note(message)  # a group without a command answers with its help
    else:
        how = f" `{context.command_path} --help` says how." if context else ""
        out.error(message.rstrip(".") + "." + how, error.exit_code)


def main() -> None:
    """Run the program; the entry point of `dab`."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
