"""`dab data`: build, check and show datasets."""

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.arguments import Json, group
from orchestrator.output import DabError, Output

Dataset = Annotated[str, typer.Argument(metavar="DEST", help="Folder or URL of the dataset: where manifest.json is.")]

app = group("Build, check and show datasets.")


@app.command("build", epilog="Example: dab data build photos/ shards/photos --val-fraction 0.2")
def build(
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


@app.command("check", epilog="Example: dab data check shards/photos --source photos/")
def check(
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


@app.command("show", epilog="Example: dab data show shards/photos --transform crop_flip -o sheet.png")
def show(
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
