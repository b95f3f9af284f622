"""Compiled kernels whose code is spread over several files, and Numba's cache of them on disk.

Numba looks for changes only in the file of a function itself. A convolution, compiled once with the tile of another
file inside it, would stay what it was when that file changes, and would then read filters in an order that is no longer
theirs. So the names in the cache say which sources a function was compiled from.
"""

import hashlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, cast

import numba

_Function = TypeVar("_Function", bound=Callable[..., Any])

# Files whose code becomes part of functions of other files.
_SOURCES = ("vector_*.py", "*_ir.py", "conv_numba*.py", "cpu_path.py", "team.py")


def compiled(function: _Function) -> _Function:
    """Decorates as `numba.njit(nogil=True, cache=True)`; what the cache has is never older than a source."""
    return cast(_Function, numba.njit(nogil=True, cache=True)(versioned(function)))


def versioned(function: _Function) -> _Function:
    """Puts the version of the sources into the qualified name of a function, by which Numba names its files."""
    function.__qualname__ = f"{function.__qualname__}_{sources_version(Path(__file__).parent)}"
    return function


@lru_cache(maxsize=1)
def sources_version(folder: Path) -> str:
    """Returns the beginning of a hash of all sources in a folder that become part of functions of other files."""
    paths = sorted(path for pattern in _SOURCES for path in folder.glob(pattern))
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in paths)).hexdigest()[:12]
