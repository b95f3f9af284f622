"""Where a packed model is measured: device, number type, threads, images at once."""

from dataclasses import dataclass

import torch

from dabnn.choices import unknown_choice

DTYPES = ("float32", "bfloat16", "float16")


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


def make_place(batch: int, threads: int | None, device: str, dtype: str) -> Place:
    """Return a place; without `threads` torch's own number.

    Raises:
        InvalidInputError: The type is none that float layers can run in.
    """
    if dtype not in DTYPES:
        raise unknown_choice("dtype", dtype, DTYPES)
    return Place(batch, torch.get_num_threads() if threads is None else threads, device, dtype)
