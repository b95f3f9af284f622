"""`dab models`: the models that can be trained."""

from typing import Annotated

import typer

from orchestrator.cli.arguments import Json, group
from orchestrator.output import Output

BinStart = Annotated[int | None, typer.Option(help="First layer with binary weights, counted from 1.")]
BinEnd = Annotated[int | None, typer.Option(help="Last layer with binary weights.")]

app = group("The models that can be trained.")


@app.callback(invoke_without_command=True, epilog="Example: dab models show bincifarfbin --width 0.25")
def models(context: typer.Context, as_json: Json = False) -> None:
    """List the models that can be trained, or show one."""
    if context.invoked_subcommand is not None:
        return
    from orchestrator.zoo import list_models

    out = Output(is_json=as_json)
    out.result(*list_models())
    out.hint("dab", "models", "show", "NAME")


@app.command("show", epilog="Example: dab models show sketchanetfbin --bin-start 2 --bin-end 7")
def show(
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
