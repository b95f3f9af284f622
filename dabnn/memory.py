"""Too little memory for a step: recognised, and told with the batch size to try.

The kernel's own measure ends a process without a word; only its count of them tells.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dabnn.errors import DabError

_FEWEST_SAMPLES = 2  # of a worker in a step, for BatchNorm
# torch's words for an allocation on the CPU that failed, which is a RuntimeError like any other.
_CPU_ALLOCATOR = ("DefaultCPUAllocator", "can't allocate memory")


class MemoryLimitError(DabError):
    """A step needs more memory than there is.

    Attributes:
        is_gpu: Whether it is that of a GPU.
    """

    def __init__(self, message: str, *, is_gpu: bool = False) -> None:
        """Take the message, and which memory it is about."""
        super().__init__(message)
        self.is_gpu = is_gpu

    def __reduce__(self) -> tuple[object, ...]:
        """Return how to build it again in another process."""
        return _rebuild, (str(self), self.is_gpu)


def _rebuild(message: str, is_gpu: bool) -> MemoryLimitError:
    return MemoryLimitError(message, is_gpu=is_gpu)


def batch_size_to_try(batch_size: int, num_workers: int) -> int | None:
    """Return the largest multiple of `num_workers` up to half of `batch_size`; None below 2 samples a worker."""
    half = batch_size // 2 // num_workers * num_workers
    return half if half >= _FEWEST_SAMPLES * num_workers else None


def advice(batch_size: int, num_workers: int) -> str:
    """Return what to do about too little memory, with the user's own numbers."""
    smaller = batch_size_to_try(batch_size, num_workers)
    if smaller is None:
        return "Use more workers (cluster.num_workers), a smaller model.width or model.input_size, or another machine."
    over = f"now {batch_size} over {num_workers} worker{'s' if num_workers > 1 else ''}"
    return f"Try data.batch_size={smaller} ({over}), or more workers on more machines."


def kernel_kills() -> int:
    """Return how many processes the kernel of this machine has ended for want of memory since it was started."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


@contextmanager
def telling_of_memory(batch_size: int, num_workers: int, rank: int) -> Iterator[None]:
    """Within the block an error that says that memory is short is raised as `memory_error` has it."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        told = memory_error(error, batch_size, num_workers, rank)
        if told is None:
            raise
        raise told from error


def memory_error(error: BaseException, batch_size: int, num_workers: int, rank: int) -> MemoryLimitError | None:
    """Return what to raise instead of an error that says that memory is short; None for any other error.

    Args:
        error: As torch or Python raised it.
        batch_size: Samples of a step over all ranks.
        num_workers: Ranks.
        rank: Which one it was.
    """
    import torch

    is_gpu = isinstance(error, torch.OutOfMemoryError)
    if not is_gpu and not isinstance(error, MemoryError) and not all(word in str(error) for word in _CPU_ALLOCATOR):
        return None
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    kind = "GPU memory" if is_gpu else "memory"
    share = -(-batch_size // num_workers)
    return MemoryLimitError(
        f"data.batch_size: rank {rank} ran out of {kind} with {share} samples a step ({first}). "
        f"{advice(batch_size, num_workers)}",
        is_gpu=is_gpu,
    )
