"""Commands that measure what a layer is worth."""

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.arguments import Json, Run, TrackingUri
from orchestrator.output import Output

app = typer.Typer()


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
