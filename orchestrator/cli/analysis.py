"""Commands that measure: what a layer costs in accuracy, what packing gains in time."""

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


@app.command("bench", epilog="Example: dab bench resnetfbin18 --batch 1 --threads 1")
def bench(
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="Packed model, model of `dab models` (random weights), or run.")
    ],
    batch: Annotated[int, typer.Option(min=1, help="Images at once.")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; default as many as torch takes.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Of the float layers: float32, bfloat16 or float16.")] = "float32",
    turns: Annotated[
        int | None, typer.Option(min=1, help="Rounds of each measurement; default what fits into half a minute.")
    ] = None,
    input_size: Annotated[
        int | None, typer.Option(min=1, help="Side of the images, pixels, of a model without weights.")
    ] = None,
    uri: TrackingUri = None,
    as_json: Json = False,
) -> None:
    """Measure a packed model beside the same network in float: latency, layers, memory, bytes."""
    from orchestrator.bench import bench as measure

    out = Output(is_json=as_json)
    with out.progress(f"bench {target}", "measurements") as bar:
        view = measure(
            uri,
            target,
            batch=batch,
            threads=threads,
            device=device,
            dtype=dtype,
            turns=turns,
            input_size=input_size,
            on_progress=bar.update,
            say=out.note,
        )
    out.result(*view)
    next_command = {"file": ["predict", target, "IMAGE"], "model": ["models", "show", target]}
    out.hint("dab", *next_command.get(view[0]["source"], ["export", target, "-o", "model.safetensors"]))
