"""What this machine is and which packed kernels it runs; nothing is computed, compiled or started.

Left out: what follows from it (`orchestrator.doctor`).
"""

import os
import platform
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import kernels
from kernels.cpu_path import CpuPath, cpu_path

if TYPE_CHECKING:
    from kernels.gpu_path import GpuPath

_PACKAGES = ("torch", "numba", "triton")


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


@dataclass(frozen=True)
class Device:
    """One CUDA device.

    Attributes:
        name: Of the device.
        capability: Compute capability, such as (9, 0).
        memory_bytes: Of the whole device.
    """

    name: str
    capability: tuple[int, int]
    memory_bytes: int


@dataclass(frozen=True)
class Devices:
    """What torch finds beside the CPU.

    Attributes:
        built_for: CUDA or ROCm version that torch was built for; None for the CPU only.
        has_driver: Whether the machine shows a driver of NVIDIA.
        found: The devices.
        complaint: What torch says about devices that it cannot use.
    """

    built_for: str | None
    has_driver: bool
    found: tuple[Device, ...]
    complaint: str


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


def devices() -> Devices:
    """Return the devices that torch can use."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        all_properties = [torch.cuda.get_device_properties(index) for index in range(count)]
    return Devices(
        built_for=torch.version.cuda or torch.version.hip,
        has_driver=Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidiactl").exists(),
        found=tuple(Device(each.name, (each.major, each.minor), each.total_memory) for each in all_properties),
        complaint=" ".join(str(each.message).split("\n")[0] for each in caught),
    )


def cpu_kernels() -> CpuPath:
    """Return the form of the packed kernels that the processor runs."""
    return cpu_path()


def gpu_kernels(index: int) -> "GpuPath":
    """Return the way that a large packed convolution takes on a CUDA device; needs Triton."""
    from kernels.gpu_path import gpu_path

    return gpu_path(index)


def triton_folder(env: Mapping[str, str]) -> Path:
    """Return the folder in which Triton keeps compiled kernels."""
    if env.get("TRITON_CACHE_DIR"):
        return Path(env["TRITON_CACHE_DIR"]).expanduser()
    return Path(env.get("TRITON_HOME") or "~").expanduser() / ".triton" / "cache"


def compiled_folders(env: Mapping[str, str]) -> tuple[Path, ...]:
    """Return the folders in which Numba keeps compiled kernels: the first of them that it may write to."""
    if env.get("NUMBA_CACHE_DIR"):
        return (Path(env["NUMBA_CACHE_DIR"]).expanduser(),)
    cache = Path(env.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return Path(kernels.__file__).parent / "__pycache__", cache / "numba"


def is_writable(folder: Path) -> bool:
    """Return whether a folder may be written to, or made where it does not exist yet."""
    existing = next(each for each in (folder, *folder.parents) if each.exists())
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
