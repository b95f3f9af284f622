"""Commands about packed models: export a run, evaluate a model, look at images with it."""

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.arguments import Json, Run, TrackingUri
from orchestrator.output import DabError, Output

app = typer.Typer()


@app.command("export", epilog="Example: dab export 3f2a -o model.safetensors")
def export(
    run: Run,
    file: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            help="The file to write: .onnx for ONNX, .pt2 for a torch.export program, else a packed model.",
        ),
    ],
    half: Annotated[bool, typer.Option("--half", help="Store scalars and float layers as float16.")] = False,
    form: Annotated[
        str | None, typer.Option("--format", metavar="packed|onnx|pt2", help="Default: by the file's name.")
    ] = None,
    uri: TrackingUri = None,
    as_json: Json = False,
) -> None:
    """Write the packed model of a run's best checkpoint, checked against the trained network."""
    from orchestrator import commands

    out = Output(is_json=as_json)
    out.result(*commands.export(uri, run, file, half=half, form=form, say=out.note))
    out.hint("dab", "predict", str(file), "IMAGE")


@app.command("register", epilog="Example: dab register 3f2a --model digits --alias production")
def register(
    run: Run,
    model: Annotated[
        str | None, typer.Option("--model", metavar="NAME", help="Registered model; default the run's or sweep's name.")
    ] = None,
    alias: Annotated[
        list[str] | None, typer.Option("--alias", metavar="ALIAS", help="Name of this version. May be repeated.")
    ] = None,
    uri: TrackingUri = None,
    as_json: Json = False,
) -> None:
    """Put the packed model of a finished run, or of a sweep's best trial, into MLflow's model registry."""
    from orchestrator import commands

    out = Output(is_json=as_json)
    view, serve = commands.register(uri, run, model=model, aliases=alias or [], say=out.note)
    out.result(*view)
    out.note(f"serve it: {serve}")


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
    """Print the most probable classes of images. The exit code is 1 when one of them cannot be read."""
    from orchestrator import commands

    out = Output(is_json=as_json)
    problems, view = commands.predict(file, images)
    out.result(*view)
    for problem in problems:
        out.note(f"error: {problem}")
    if problems:
        raise typer.Exit(DabError.exit_code)
