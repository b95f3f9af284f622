"""How the Numba kernels share the machine with torch: as many threads as torch uses, one parallel region at a time."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numba
import torch

# Numba's fallback threading layer (workqueue) aborts the process when two Python threads launch at once.
_one_launch = threading.Lock()


@contextmanager
def torch_threads() -> Iterator[None]:
    """Runs Numba's parallel regions on `torch.get_num_threads()` threads and restores the caller's number."""
    with _one_launch:
        before = numba.get_num_threads()
        numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
        try:
            yield
        finally:
            numba.set_num_threads(before)
