"""Memory of one form of a packed model, measured in a process that does nothing else.

    python -m dabnn.bench_memory '{"file": "model.safetensors", "form": "packed", "batch": 1, ...}'

is that process: it loads the form, runs it and prints a `MemoryResult` as JSON. `measure_memory` starts it. Memory is
the largest resident size that the kernel has seen, or on CUDA the most that torch's tensors held.
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from dabnn import packed_file
from dabnn.bench_networks import float_network, random_images
from dabnn.bench_place import Place
from dabnn.errors import DabError
from dabnn.models import ModelSpec, Network
from dabnn.packed import load_packed
from kernels import pack_signs, packed_conv2d
from kernels.packing import WORD_BITS

_PASSES = 3


@dataclass(frozen=True)
class MemoryResult:
    """What the process saw.

    Attributes:
        peak_bytes: The most that it held.
        base_bytes: What it held before it read the model: python, torch and, for the packed form, Numba with a kernel
            that has run once; 0 on CUDA.
        first_answer_s: From loaded torch to the first logits: kernels compiled or fetched, model read, first pass.
    """

    peak_bytes: int
    base_bytes: int
    first_answer_s: float


def measure_memory(file: Path, form: str, place: Place) -> MemoryResult:
    """Measure the form `packed` of a packed file, or its `float` peer.

    Raises:
        DabError: The process failed; the message holds the end of what it said.
    """
    command = [sys.executable, "-m", __name__, json.dumps({"file": str(file), "form": form} | asdict(place))]
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise DabError(
            f"bench: the process that measures the memory of the {form} form failed: {said[0]}. With a smaller --batch "
            "it needs less."
        )
    return MemoryResult(**json.loads(done.stdout))


def main(arguments: Sequence[str]) -> None:
    """Load one form, run it, print what it took."""
    wanted = json.loads(arguments[0])
    file, form = Path(wanted.pop("file")), wanted.pop("form")
    place = Place(**wanted)
    torch.set_num_threads(place.threads)
    is_cuda = torch.device(place.device).type == "cuda"
    begin = time.perf_counter()
    if form == "packed":
        _run_a_kernel(place.device)
    base_bytes = 0 if is_cuda else peak_memory(place.device)
    net = _load(file, form, place)
    images = random_images(net.spec, place.batch, place.device, place.torch_dtype())
    with torch.inference_mode():
        net(images).cpu()
        first_answer_s = time.perf_counter() - begin
        for _ in range(_PASSES - 1):
            net(images).cpu()
    result = MemoryResult(peak_memory(place.device), base_bytes, first_answer_s)
    sys.stdout.write(json.dumps(asdict(result)))


def _load(file: Path, form: str, place: Place) -> Network:
    if form == "packed":
        return load_packed(file).to(place.device, place.torch_dtype()).running()
    return float_network(ModelSpec(**packed_file.read(file).spec), place.device, place.torch_dtype())


def _run_a_kernel(device: str) -> None:
    bits = pack_signs(torch.ones(1, WORD_BITS, 3, 3, device=device))
    scalars = torch.ones(1, device=device)
    packed_conv2d(bits, bits, scalars, scalars, in_channels=WORD_BITS)


def peak_memory(device: str) -> int:
    """Return the most bytes that this process has held on a device."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")  # what getrusage says begins with the size of the parent
    if status.exists():
        kilobytes = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    else:
        kilobytes = str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return 1024 * int(kilobytes)


if __name__ == "__main__":
    main(sys.argv[1:])
