"""How the Numba kernels share the machine with torch: as many threads as torch uses, one parallel region at a time."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numba
import torch

# Numba's own thread pool. Its OpenMP layer loads a second OpenMP runtime beside torch's, after which torch's operators
# on the CPU take 5 to 25 times as long (AMD EPYC Milan, 2 cores, torch 2.13, numba 0.68).
_LAYER = "workqueue"
# That pool aborts the process when two Python threads launch at once.
_one_launch = threading.Lock()


@contextmanager
def torch_threads() -> Iterator[None]:
    """Runs Numba's parallel regions on `torch.get_num_threads()` threads and restores the caller's number."""
    with _one_launch:
        numba.config.THREADING_LAYER = _LAYER  # type: ignore[attr-defined] # read at the first launch of the process
        before = numba.get_num_threads()
        numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
        try:
            yield
        finally:
            numba.set_num_threads(before)
