"""Where a packed model is measured: device, number type, threads, and what machine that is."""

import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from dabnn.choices import unknown_choice

DTYPES = ("float32", "bfloat16", "float16")
_PACKAGES = ("torch", "numba", "triton")


@dataclass(frozen=True)
class Place:
    """Where and on what forms are measured.

    Attributes:
        batch: Images at once.
        threads: Of torch and of the packed kernels.
        device: cpu or cuda.
        dtype: Of the float layers, by its name in torch.
    """

    batch: int
    threads: int
    device: str
    dtype: str

    def torch_dtype(self) -> torch.dtype:
        """Return the type itself."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


@dataclass(frozen=True)
class Machine:
    """What the figures hold for.

    Attributes:
        cpu: Name of the processor.
        cores: Logical CPUs that this process may use.
        gpu: Name of the device, or None where the CPU was measured.
        versions: Of python and the packages that compute.
    """

    cpu: str
    cores: int
    gpu: str | None
    versions: dict[str, str]


def make_place(batch: int, threads: int | None, device: str, dtype: str) -> Place:
    """Return a place; without `threads` torch's own number.

    Raises:
        InvalidInputError: The type is none that float layers can run in.
    """
    if dtype not in DTYPES:
        raise unknown_choice("dtype", dtype, DTYPES)
    return Place(batch, torch.get_num_threads() if threads is None else threads, device, dtype)


def machine(device: str) -> Machine:
    """Return what this machine is, as far as it says so."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return Machine(
        cpu=cpu or platform.processor() or platform.machine(),
        cores=len(os.sched_getaffinity(0)),
        gpu=torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None,
        versions={"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
