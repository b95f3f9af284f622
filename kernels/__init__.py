"""Packed binary arithmetic: sign packing, packed convolution, the DAB weight quantizer.

Each operation stands in one module with its plain-torch reference and its `torch.library` operator; the Numba (CPU)
and Triton (GPU) versions stand beside it in `*_numba.py` and `*_triton.py` and are imported at the first call, so
that importing `kernels` asks nothing of the machine. Left out: gradients (the layers of `dabnn` own them).
"""

from kernels.conv import packed_conv2d, packed_conv2d_signs
from kernels.dab import dab_threshold, quantize_dab, quantize_dab_many
from kernels.dab_warm import dab_threshold_warm
from kernels.dense import two_valued
from kernels.max_pool import max_pool2d
from kernels.packing import pack_reached, pack_signs, unpack_signs
from kernels.pool import pool_bits
from kernels.weight_only import packed_weight_conv2d

__all__ = [
    "dab_threshold",
    "dab_threshold_warm",
    "max_pool2d",
    "pack_reached",
    "pack_signs",
    "packed_conv2d",
    "packed_conv2d_signs",
    "packed_weight_conv2d",
    "pool_bits",
    "quantize_dab",
    "quantize_dab_many",
    "two_valued",
    "unpack_signs",
]
