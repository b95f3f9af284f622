"""Numba kernels on torch's own threads, for work that is over before another pool of threads would have woken up.

torch's OpenMP threads wait actively for a while after each operator and start in about 1 us; Numba's pool takes 60 to
100 us to wake, longer than a packed convolution runs, and a second OpenMP runtime would take the cores from the first.
So compiled code calls the runtime that torch has loaded: `GOMP_parallel(worker, data, num_threads, flags)`, the entry
that GNU's, LLVM's and Intel's runtimes share, runs `worker(data)` on every thread of a team and returns when all have.

Where torch has no such runtime there is one thread. Left out: kernels that run for milliseconds, which Numba's
`prange` serves (`kernels.numba_threads`).
"""

import ctypes
import os
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numba
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels.compiled import versioned

_I32, _I64, _BYTES = ir.IntType(32), ir.IntType(64), ir.IntType(8).as_pointer()
_WORKER = ir.FunctionType(ir.VoidType(), [_BYTES])
_PARALLEL = ir.FunctionType(ir.VoidType(), [_WORKER.as_pointer(), _BYTES, _I32, _I32])


@lru_cache(maxsize=1)
def runtime_address() -> int:
    """Returns the address of `GOMP_parallel` in the OpenMP runtime that torch has loaded, 0 if there is none."""
    if not hasattr(os, "RTLD_NOLOAD"):
        return 0
    for path in sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*")):
        try:
            library = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
            return ctypes.cast(library.GOMP_parallel, ctypes.c_void_p).value or 0
        except (OSError, AttributeError):  # not loaded, or another kind of library
            continue
    return 0


def team_size() -> int:
    """Returns how many threads a kernel may use: torch's number where torch's threads can be had, else 1."""
    return torch.get_num_threads() if runtime_address() else 1


def team_of(*kinds: Sequence[Any]) -> tuple[Any, ...]:
    """Makes the two halves of a call by all threads, for arguments of one of these lists of Numba types.

    Returns:
        Intrinsics for compiled code. `run(runtime, worker, num_threads, arguments)` takes the addresses of
        `runtime_address` and of a C function `worker(data)`, and a tuple; it returns when every thread has. Then for
        each list `received(data)`, which is that tuple, in the worker. Threads share the arrays of the tuple and have
        its numbers to themselves.
    """
    of_tuple: Any = types.Tuple
    known = [of_tuple(list(kind)) for kind in kinds]

    def type_run(_typing: Any, _runtime: Any, _worker: Any, _num_threads: Any, given: Any) -> Any:
        if given not in known:  # the worker would read something else
            raise TypeError(f"arguments of a team: {given}; its workers expect one of {known}")
        return types.void(types.int64, types.int64, types.int64, given), _build_run

    make: Any = intrinsic
    return (make(type_run), *(make(_type_received(kind)) for kind in known))


def _type_received(kind: Any) -> Any:
    def build(context: Any, builder: ir.IRBuilder, _signature: Any, data: Sequence[Any]) -> Any:
        value = builder.load(builder.bitcast(data[0], context.get_value_type(kind).as_pointer()))
        context.nrt.incref(builder, kind, value)
        return value

    def type_received(_typing: Any, _data: Any) -> Any:
        return kind(types.voidptr), build

    return type_received


def _build_run(context: Any, builder: ir.IRBuilder, _signature: Any, values: Sequence[Any]) -> Any:
    runtime, worker, num_threads, arguments = values
    place = cgutils.alloca_once_value(builder, arguments)  # type: ignore[no-untyped-call]
    data = builder.bitcast(place, _BYTES)
    function = builder.inttoptr(worker, _WORKER.as_pointer())
    builder.call(
        builder.inttoptr(runtime, _PARALLEL.as_pointer()),
        [function, data, builder.trunc(num_threads, _I32), ir.Constant(_I32, 0)],
    )
    return context.get_dummy_value()


def _type_next(_typing: Any, _counter: Any) -> Any:
    """`next_task(address)` adds 1 to the int64 at an address, whatever other threads do, and returns what it was."""

    def build(_context: Any, builder: ir.IRBuilder, _signature: Any, values: Sequence[Any]) -> Any:
        place = builder.inttoptr(values[0], _I64.as_pointer())
        return builder.atomic_rmw("add", place, ir.Constant(_I64, 1), "monotonic")

    return types.int64(types.int64), build


next_task: Any = intrinsic(_type_next)


@cache
def worker_address(work: Callable[[Any], None]) -> int:
    """Returns the address of `work(data)`, a module's function, compiled as a C function when first asked for."""
    compiled = numba.cfunc(types.void(types.voidptr), cache=True)(versioned(work))
    _compiled.append(compiled)
    return int(compiled.address or 0)


# Compiled functions are freed with their objects.
_compiled: list[Any] = []
