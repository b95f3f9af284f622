"""Which form of the packed kernels this processor runs, and why; the choice is a pure function of its features.

The features are those that Numba compiles for, so `NUMBA_CPU_FEATURES` takes part, and since they are in the key of
Numba's cache on disk, code compiled for one path is never run on another.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from kernels.packing import has_numba

_log = logging.getLogger(__name__)

_AVX512 = ("avx512f", "avx512vpopcntdq")


@dataclass(frozen=True)
class CpuPath:
    """One form of the packed kernels on the CPU.

    Attributes:
        name: `avx512` counts ones by AVX-512 VPOPCNTDQ, `avx2` by byte shuffles, `popcount` by whatever LLVM makes of a
            count of ones (plain x86-64, ARM, any other); `reference` is plain torch.
        reason: why this one, and what would give a faster one.
    """

    name: Literal["avx512", "avx2", "popcount", "reference"]
    reason: str


def choose_cpu_path(features: Mapping[str, bool], has_numba: bool) -> CpuPath:
    """Returns the fastest form that a processor can run.

    Args:
        features: LLVM's names of the processor's features, such as "avx2"; one that is missing counts as False.
        has_numba: whether Numba can be imported.
    """
    if not has_numba:
        return CpuPath("reference", "Numba cannot be imported, so plain torch computes; install numba for fast kernels")
    missing = [name for name in _AVX512 if not features.get(name, False)]
    if not missing:
        return CpuPath("avx512", f"the processor has {' and '.join(_AVX512)}")
    if features.get("avx2", False):
        return CpuPath("avx2", f"the processor has avx2, but no {' and no '.join(missing)}")
    return CpuPath("popcount", "the processor has no avx2: results are the same, but nothing is tuned for it")


@lru_cache(maxsize=1)
def cpu_path() -> CpuPath:
    """Returns the form that this process runs; the first call logs it."""
    found = has_numba()
    path = choose_cpu_path(_compiled_features() if found else {}, found)
    _log.info("packed kernels on the CPU: %s (%s)", path.name, path.reason)
    return path


def _compiled_features() -> dict[str, bool]:
    """Returns the features that Numba compiles for, as its cache has them: a list like "+avx2,-avx512f"."""
    from numba.core.registry import cpu_target

    _triple, _name, features = cpu_target.target_context.codegen().magic_tuple()
    return {entry[1:]: entry[0] == "+" for entry in features.split(",") if entry}
