"""The program of `dab sensitivity` on the cluster: `python -m jobs.sensitivity`.

The driver fans out one Ray task for each network as a whole and for each of its layers; a task loads the checkpoint,
measures, and returns a few numbers. The figures go to `sensitivity.json` in the run's folder and to the run in MLflow.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import ray
import torch

from dabnn.deliver import load_trained
from dabnn.errors import DabError
from dabnn.models import ModelSpec, Network
from dabnn.plans import numbered_convs
from dabnn.run_folder import RunFolder
from dabnn.sensitivity import (
    NUM_BN_BATCHES,
    LayerState,
    NetworkFigures,
    Samples,
    binary_parts,
    is_binary,
    layer_figures,
    measure_layer,
    measure_network,
)
from jobs.connect import connect
from jobs.train import say
from orchestrator import tracking
from orchestrator.sensitivity import FILE, Request


@dataclass(frozen=True)
class Part:
    """What one task measures.

    Attributes:
        checkpoint: Of the network.
        index: Number of the layer, or None for the network as a whole.
    """

    checkpoint: str
    index: int | None


@dataclass
class Found:
    """What the tasks of one network have returned.

    Attributes:
        whole: The network as a whole, once it was measured.
        hits: Layer -> state -> images that the network gets right.
    """

    whole: NetworkFigures | None = None
    hits: dict[int, dict[LayerState, int | None]] = field(default_factory=dict)


def main() -> int:
    """Run the job described in the environment; return 0 when the figures are there, 1 when not."""
    request = Request.from_environment()
    folder = RunFolder.of(request.folder)
    connect()
    try:
        figures = measure(request)
    except DabError as error:
        folder.leave_json(FILE, {"job_id": request.job_id, "error": str(error)})
        return 1
    folder.leave_json(FILE, {"job_id": request.job_id, **figures})
    try:
        tracking.log_json(request.tracking_uri, request.run_id, FILE, figures)
    except DabError as error:
        say(f"{error} (the run's folder keeps {FILE})")
    return 0


def measure(request: Request) -> dict[str, Any]:
    """Return all figures of a request, as `sensitivity.json` holds them.

    Raises:
        DabError: A checkpoint or an image cannot be read.
    """
    net, own = load_trained(request.checkpoint), request.checkpoint
    twin = request.twin_checkpoint if is_binary(net) else own
    parts = parts_of(net, own, twin)
    found = {checkpoint: Found() for checkpoint in (own, twin) if checkpoint is not None}
    say(f"measuring {len(parts)} parts on up to {request.measured.num_images} validation images")
    for done, (part, result) in enumerate(fan_out(parts, request.samples, net.spec), start=1):
        if isinstance(result, NetworkFigures):
            found[part.checkpoint].whole = result
        elif part.index is not None:
            found[part.checkpoint].hits[part.index] = result
        say(f"{done}/{len(parts)}: {_name(net, part, own)}")
    return _figures(request, net, found[own], None if twin is None else found[twin])


def parts_of(net: Network, own: str, twin: str | None) -> list[Part]:
    """Return what is to be measured: both networks, the run's binary layers made real, the twin's made binary.

    Args:
        net: The run's network.
        own: Its checkpoint.
        twin: Checkpoint of the float twin, which is `own` for a float run, or None.
    """
    convs = numbered_convs(net)
    parts = [Part(own, None)] + [Part(own, index) for index, (_, conv) in convs.items() if any(binary_parts(conv))]
    if twin is not None:
        parts += [Part(twin, None)] * (twin != own) + [Part(twin, index) for index in convs]
    return parts


def fan_out(
    parts: Sequence[Part], samples: Samples, like: ModelSpec
) -> Iterator[tuple[Part, NetworkFigures | dict[LayerState, int | None]]]:
    """Yield each part with its result as it is done, one task a part, on the GPUs of the cluster if it has any.

    Raises:
        DabError: A part met an error of ours; the others are given up.
    """
    has_gpu = ray.cluster_resources().get("GPU", 0) >= 1
    task = ray.remote(num_cpus=1, num_gpus=int(has_gpu))(measure_part)
    waiting = {task.remote(part, samples, like, "cuda" if has_gpu else "cpu"): part for part in parts}
    while waiting:
        (done,), _ = ray.wait(list(waiting), num_returns=1)
        try:
            yield waiting.pop(done), ray.get(done)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, DabError):
                raise error.cause from None
            raise


def measure_part(
    part: Part, samples: Samples, like: ModelSpec, device: str
) -> NetworkFigures | dict[LayerState, int | None]:
    """Measure one part; this is the task that Ray runs."""
    net = load_trained(part.checkpoint)
    if part.index is None:
        return measure_network(net, samples, like, torch.device(device))
    return measure_layer(net, part.index, samples, like, torch.device(device))


def _figures(request: Request, net: Network, own: Found, twin: Found | None) -> dict[str, Any]:
    if own.whole is None:
        raise DabError("sensitivity: the run's network was not measured.")
    base = None if twin is None else twin.whole
    rows = layer_figures(
        net, own.whole, {} if twin is own else own.hits, twin=base, twin_hits={} if twin is None else twin.hits
    )
    return {
        "measured": asdict(request.measured),
        "checkpoint": request.checkpoint,
        "num_images": own.whole.num_images,
        "num_bn_batches": NUM_BN_BATCHES,
        **_accuracy(own.whole),
        "twin": None
        if base is None
        else {"checkpoint": request.twin_checkpoint or request.checkpoint, **_accuracy(base)},
        "layers": [asdict(row) for row in rows],
    }


def _accuracy(figures: NetworkFigures) -> dict[str, float]:
    return {
        "top1": 100 * figures.hits / figures.num_images,
        "top1_reestimated": 100 * figures.hits_reestimated / figures.num_images,
    }


def _name(net: Network, part: Part, own: str) -> str:
    whose = "" if part.checkpoint == own else " of the float twin"
    return f"the network{whose}" if part.index is None else f"{numbered_convs(net)[part.index][0]}{whose}"


if __name__ == "__main__":
    sys.exit(main())
