"""How fast and how large a packed model is beside its float peer: time, whole and layer by layer, memory, bytes.

The float peer is the same architecture in torch, channels-last, in the same type, its binary filters as ordinary
numbers (`dabnn.bench_networks`). Both run the same random images in inference mode, in turns (`dabnn.turns`). A packed
form that disagrees with its float twin is not timed (`dabnn.bench_check`).

The whole takes longer than the sum of its layers (`dabnn.bench_layers`) by additions of shortcuts, joined branches and
slower memory: that is given apart. Left out: accuracy.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from dabnn.bench_check import refuse_if_wrong
from dabnn.bench_layers import LayerResult, layer_paths, time_layers
from dabnn.bench_memory import MemoryResult, measure_memory
from dabnn.bench_networks import float_peer, random_images
from dabnn.bench_place import Place
from dabnn.errors import InvalidInputError
from dabnn.machine import Machine, machine
from dabnn.models import Network
from dabnn.packed import PackedModel
from dabnn.turns import Times, in_turns

_BUDGET_S = 10.0

OnProgress = Callable[[int, int, str], None]
"""Told how many measurements of how many are done, and which is next."""


@dataclass(frozen=True)
class FormResult:
    """One form of the whole network.

    Attributes:
        median_ms: Of one batch.
        best_ms: Of one batch.
        images_per_s: At the median.
        peak_bytes: Of a process that loads this form and runs it: resident memory, or on CUDA that of torch's tensors.
        base_bytes: Of the same before it loaded the model: python, torch, compiled kernels; 0 on CUDA.
        first_answer_s: From loaded torch to the first logits, in that process.
        file_bytes: Of the packed file, or of the weights in float32.
    """

    median_ms: float
    best_ms: float
    images_per_s: float
    peak_bytes: int
    base_bytes: int
    first_answer_s: float
    file_bytes: int


@dataclass(frozen=True)
class BenchResult:
    """What `bench` measured.

    Attributes:
        model: Name of the architecture.
        input_shape: Of one image.
        place: Where both ran, and how many images at once.
        machine: What that machine is.
        turns: Rounds of the whole networks.
        num_checked: Layers with binary weights that were compared with their float twin before.
        packed_form: The packed form.
        float_form: The float peer.
        speedup: Of the medians; below 1 float wins.
        float_share: Of the time of the packed form's layers, the share that works on ordinary numbers: what bounds the
            gain.
        layers: In the order of the network.
        rest_packed_ms: What the whole packed network takes beyond its layers.
        rest_float_ms: Likewise.
    """

    model: str
    input_shape: tuple[int, int, int]
    place: Place
    machine: Machine
    turns: int
    num_checked: int
    packed_form: FormResult
    float_form: FormResult
    speedup: float
    float_share: float
    layers: tuple[LayerResult, ...]
    rest_packed_ms: float
    rest_float_ms: float


def bench(
    packed: PackedModel, place: Place, *, turns: int | None = None, on_progress: OnProgress | None = None
) -> BenchResult:
    """Measure a packed model beside its float peer.

    Args:
        packed: From `pack` or `load_packed`.
        place: Where, and how many images at once.
        turns: Rounds of every measurement; None for as many as fit into half a minute together, at least 5.
        on_progress: Told what is done.

    Raises:
        InvalidInputError: The device or the type cannot be used here, or a number is less than 1.
        DabError: The packed form disagrees with its float twin, or a process that measures memory failed.
    """
    for name, value in (("batch", place.batch), ("threads", place.threads), ("turns", turns)):
        if value is not None and value < 1:
            raise InvalidInputError(f"{name}: {value} must be at least 1.")
    with _settings(place.threads):
        moved = packed.to(place.device, place.torch_dtype())
        peer = float_peer(packed, place.device, place.torch_dtype())
        images = random_images(packed.spec, place.batch, place.device, place.torch_dtype())
        steps = _Steps(on_progress, 4 + len(layer_paths(peer)))
        steps.begin("comparing with the float twin")
        num_checked = refuse_if_wrong(moved, images).num_layers
        memory, file_bytes = _memory(packed, place, steps)
        steps.begin("whole networks")
        whole, num_turns = _time_whole(moved.running(), peer, images, turns)
        layers = []
        for layer in time_layers(moved.running(), peer, images, turns=turns):
            steps.begin(layer.path)
            layers.append(layer)
        steps.end()
    sizes = {"packed": file_bytes, "float": packed.float_bytes}
    forms = {name: _form_result(whole[name], place.batch, memory[name], sizes[name]) for name in sizes}
    return BenchResult(
        model=packed.spec.name,
        input_shape=(packed.spec.in_channels, packed.spec.input_size, packed.spec.input_size),
        place=place,
        machine=machine(place.device),
        turns=num_turns,
        num_checked=num_checked,
        packed_form=forms["packed"],
        float_form=forms["float"],
        speedup=forms["float"].median_ms / forms["packed"].median_ms,
        float_share=sum(row.packed_float_ms for row in layers) / sum(row.packed_ms for row in layers),
        layers=tuple(layers),
        rest_packed_ms=forms["packed"].median_ms - sum(row.packed_ms for row in layers),
        rest_float_ms=forms["float"].median_ms - sum(row.float_ms for row in layers),
    )


class _Steps:
    """Counts measurements for a progress bar."""

    def __init__(self, on_progress: OnProgress | None, total: int) -> None:
        self._on_progress, self._total, self._done = on_progress, total, 0

    def begin(self, text: str) -> None:
        if self._on_progress is not None:
            self._on_progress(self._done, max(self._total, self._done), text)
        self._done += 1

    def end(self) -> None:
        self.begin("done")


@contextmanager
def _settings(threads: int) -> Iterator[None]:
    """Within the block torch uses so many threads, and cuDNN the fastest algorithm for each convolution."""
    before = torch.get_num_threads(), torch.backends.cudnn.benchmark
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.backends.cudnn.benchmark = before[1]


def _memory(packed: PackedModel, place: Place, steps: _Steps) -> tuple[dict[str, MemoryResult], int]:
    """Return what a process of each form takes, and the bytes of the packed file."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        file_bytes = packed.save(file)
        for name in ("packed", "float"):
            steps.begin(f"memory of the {name} form")
            found[name] = measure_memory(file, name, place)
    return found, file_bytes


@torch.inference_mode()
def _time_whole(packed: Network, peer: Network, images: Tensor, turns: int | None) -> tuple[dict[str, Times], int]:
    forms = {"packed": lambda: packed(images), "float": lambda: peer(images)}
    return in_turns(forms, images.device, turns=turns, budget_s=_BUDGET_S)


def _form_result(times: Times, batch: int, memory: MemoryResult, file_bytes: int) -> FormResult:
    return FormResult(
        median_ms=1e3 * times.median_s,
        best_ms=1e3 * times.best_s,
        images_per_s=batch / times.median_s,
        **asdict(memory),
        file_bytes=file_bytes,
    )
