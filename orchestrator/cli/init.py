"""`dab init`: a configuration for a folder of images."""

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.arguments import Address, Json, ValFraction
from orchestrator.output import Output

app = typer.Typer()


@app.command("init", epilog="Example: dab init photos -o photos.yaml")
def init(
    images: Annotated[
        str,
        typer.Argument(metavar="DIR", help="Folder of images: DIR/CLASS/IMAGE or DIR/{train,val}/CLASS/IMAGE."),
    ],
    file: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The file to write.")] = Path("dab.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it is there.")] = False,
    val_fraction: ValFraction = None,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Look at a folder of images and write a configuration for it, with a reason for each value."""
    from orchestrator import own_images

    out = Output(is_json=as_json)
    out.result(*own_images.init(images, file, val_fraction=val_fraction, address=address, force=force))
    out.hint("dab", "submit", str(file), "--images", images)
