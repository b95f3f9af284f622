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
Dataset = Annotated[Path, typer.Argument(metavar="DEST", help="Folder of the dataset: shards and manifest.json.")]
BinStart = Annotated[int | None, typer.Option(help="First layer with binary weights, counted from 1.")]
BinEnd = Annotated[int | None, typer.Option(help="Last layer with binary weights.")]


def _group(help_text: str) -> typer.Typer:
    return typer.Typer(
        help=help_text,
        no_args_is_help=True,
        rich_markup_mode=None,
        add_completion=False,
        pretty_exceptions_enable=False,
    )


app = _group("Train, search and ship distribution-aware binarized networks.")
data_app = _group("Build and check datasets.")
models_app = _group("The models that can be trained.")
config_app = _group("What can be configured, and what a configuration means.")
app.add_typer(data_app, name="data")
app.add_typer(models_app, name="models", no_args_is_help=False)
app.add_typer(config_app, name="config")


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


@data_app.command("build", epilog="Example: dab data build photos/ shards/photos")
def data_build(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder SRC/{train,val}/CLASS/*, or builtin:digits.")],
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="Folder for shards and manifest.json.")],
    layout: Annotated[str, typer.Option("--format", help="Layout of SRC: auto, folder or digits.")] = "auto",
    shard_mb: Annotated[int, typer.Option(min=1, help="About how large a shard becomes, MiB.")] = 64,
    as_json: Json = False,
) -> None:
    """Turn images into shards with a manifest."""
    from orchestrator import datasets

    out = Output(is_json=as_json)
    with out.progress(f"build {dest}", "images") as bar:
        view = datasets.build(source, dest, layout=layout, shard_mb=shard_mb, on_progress=bar.update)
    out.result(*view)
    out.hint("dab", "data", "check", str(dest))


@data_app.command("check", epilog="Example: dab data check shards/photos")
def data_check(dest: Dataset, as_json: Json = False) -> None:
    """Compare every shard with the manifest. The exit code is 1 when something is wrong."""
    from orchestrator import datasets

    out = Output(is_json=as_json)
    with out.progress(f"check {dest}", "images") as bar:
        is_ok, view = datasets.check(dest, on_progress=bar.update)
    out.result(*view)
    if not is_ok:
        raise typer.Exit(DabError.exit_code)
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


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    out = Output(is_json="--json" in arguments)
    try:
        # With standalone_mode off, Typer returns the exit code (None for a plain end) and lets its own errors through.
        code = app(args=list(arguments), prog_name="dab", standalone_mode=False) or 0
        sys.stdout.flush()
    except DabError as error:
        out.error(str(error), error.exit_code)
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
        out.error(message + how, error.exit_code)


def main() -> None:
    """Run the program; the entry point of `dab`."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
