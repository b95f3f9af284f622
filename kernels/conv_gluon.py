"""Tensor-core version of `kernels.conv.packed_conv2d` for NVIDIA GPUs of compute capability 8.0 to 9.0, in Gluon.

An implicit matrix product on `mma.sync m16n8k256 b1 and.popc`, the one 1-bit product that Hopper has in hardware: it
counts the ones of `b & e`, which is what a two-valued filter needs. Weights are the first factor, in the order that
`kernels.conv_fragments` makes; words of pixels are the second one, read where `pack_signs` put them. The ones of `b`
alone, the same for all filters, are counted beside it by `popc`.

Exactness: counts are int32, and the epilogue is that of `kernels.conv`, rounded operation by operation. Speed: not
measured; compiled for compute capability 9.0, a warp of 64 filters x 32 pixels needs 168 registers and no shared
memory, so that 12 warps share a multiprocessor.
"""

# Triton compiles its kernels itself; their arguments have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"
# Constants of a Triton kernel are upper case, and its tuples know + but not *.
# ruff: noqa: N803, N806, RUF005, SIM108

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kernels.conv_fragments import Tile
from kernels.conv_layer import Filters, Geometry

# Three blocks of four warps share the 65,536 registers of a multiprocessor; two do when a warp holds twice the sums.
MAX_REGISTERS = 168


@dataclass(frozen=True)
class Instructions:
    """Assembly for one size of tile, and which registers it takes; see `instructions`."""

    product: str
    product_registers: str
    spread: str
    spread_registers: str


@gluon.constexpr_function
def instructions(size: int) -> Instructions:
    """Returns the assembly that a warp runs on its registers.

    `product` adds `size` x `size` products to the sums. Operands: sum r of tensor i is $(2 * size * i + r), the results
    of 8 * (i // 2) pixels and on, column i % 2; then 4 * size weights and 2 * size words of pixels.
    `spread` hands a value of each pixel g, in `size` registers, to the lanes that own the results of that pixel:
    first those of column 0, pixel 2 * t, then of column 1.
    """
    num_sums = 4 * size * size
    lines = []
    for n in range(size):
        for m in range(size):
            sums = [f"${2 * size * (2 * n + column) + 2 * m + half}" for half in (0, 1) for column in (0, 1)]
            weights = [f"${num_sums + 4 * m + i}" for i in range(4)]
            words = [f"${num_sums + 4 * size + 2 * n + i}" for i in range(2)]
            operands = ", ".join("{" + ", ".join(group) + "}" for group in (sums, weights, words, sums))
            lines.append(f"mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {operands};")
    spread = ["{", ".reg .b32 even, odd;", "mov.u32 even, %laneid;", "and.b32 even, even, 3;", "shl.b32 even, even, 3;"]
    spread.append("add.s32 odd, even, 4;")
    for n in range(size):
        for column, source in ((0, "even"), (1, "odd")):
            spread.append(f"shfl.sync.idx.b32 ${size * column + n}, ${2 * size + n}, {source}, 31, -1;")
    return Instructions(
        "\n".join(lines),
        ",".join(["=r"] * num_sums + ["r"] * 6 * size + [str(i) for i in range(num_sums)]),
        "\n".join([*spread, "}"]),
        ",".join(["=&r"] * 2 * size + ["r"] * size),
    )


def launch(
    bits: Tensor,
    weights: Tensor,
    counts: tuple[Tensor, Tensor],
    filters: Filters,
    geometry: Geometry,
    tile: Tile,
    out: Tensor,
) -> None:
    """Writes the convolution, or the signs of it, into out; offsets must stay below 2**31 elements.

    Args:
        bits: (N, H, W, words) int32, contiguous.
        weights: From `conv_fragments.arrange_weights` for this tile.
        counts: From `conv_fragments.count_ones`.
        filters: The filters; their weight_bits are not read.
        geometry: The layer.
        tile: The tile.
        out: (N, H', W', F) float32, bfloat16 or float16, or (N, H', W', ceil(F / 32)) int32 of packed results;
            contiguous, overwritten.
    """
    f = filters
    num_pixels = out.shape[0] * geometry.out_height * geometry.out_width
    grid = (triton.cdiv(num_pixels, tile.pixels), triton.cdiv(geometry.filters, tile.filters))
    is_packed = f.threshold is not None
    _product_kernel[grid](
        bits,
        weights,
        f.alpha.contiguous(),
        f.beta.contiguous(),
        f.beta if f.bias is None else f.bias.contiguous(),
        *counts,
        f.beta if f.threshold is None else f.threshold.contiguous(),
        f.beta if f.falls is None else f.falls.contiguous(),
        out.view(torch.uint8) if is_packed and tile.size == 4 else out,
        num_pixels,
        geometry,
        tile,
        HAS_BIAS=f.bias is not None,
        IS_PACKED=is_packed,
        **options(tile),
    )


def options(tile: Tile) -> dict[str, int | bool]:
    """Returns what the kernel is compiled with: no fused multiply-add, which would round once instead of twice."""
    limit = {"maxnreg": MAX_REGISTERS} if tile.size == 4 and tile.steps == 1 else {}
    return {"num_warps": tile.num_warps, "enable_fp_fusion": False, **limit}


@gluon.constexpr_function
def _along(layout, axis, rank):
    """Layout of the indices along one axis of a tensor of that layout."""
    for other in reversed(range(rank)):
        if other != axis:
            layout = gl.SliceLayout(other, layout)
    return layout


@gluon.jit
def _index(size: gl.constexpr, axis: gl.constexpr, rank: gl.constexpr, layout: gl.constexpr):
    """Indices along one axis, of length 1 along the others."""
    x = gl.arange(0, size, layout=_along(layout, axis, rank))
    for other in gl.static_range(rank):
        if other != axis:
            x = gl.expand_dims(x, other)
    return x


@gluon.jit
def _count_ones(word):
    return gl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [word], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _corner(pixel, G: gl.constexpr):
    """Row and column of the first tap of an output pixel's window."""
    inner = pixel % (G.out_height * G.out_width)
    return inner // G.out_width * G.stride_h - G.pad_h, inner % G.out_width * G.stride_w - G.pad_w


@gluon.jit
def _place(step, t, r, G: gl.constexpr):
    """Tap, and word within it, that lane t holds in register r at one step of depth; a pair lies side by side."""
    if G.words % 8 == 0:  # one tap for all lanes
        tap = step // (G.words // 8)
        word = step % (G.words // 8) * 8 + (t * 2 + r % 2)
    elif G.words % 2 == 0:
        pair = step * 4 + t
        tap = pair // (G.words // 2)
        word = pair % (G.words // 2) * 2 + r % 2
    else:
        position = step * 8 + (t * 2 + r % 2)
        tap = position // G.words
        word = position % G.words
    return tap, word


@gluon.jit
def _load_signs(source, top, left, step, t, r, G: gl.constexpr, IS_PADDED: gl.constexpr):
    """Words of pixels at one step of depth: 0 outside the image and beyond the last tap."""
    tap, word = _place(step, t, r, G)
    row = tap // G.kernel_w
    column = tap % G.kernel_w
    place = source + ((row * G.width + column) * G.words + word)
    if G.has_border:
        inside = ((top + row).to(gl.uint32) < G.height) & ((left + column).to(gl.uint32) < G.width)
        if IS_PADDED:
            inside = inside & (tap < G.taps)
        signs = gl.load(place, mask=inside, other=0)
    elif IS_PADDED:
        signs = gl.load(place, mask=tap + top * 0 < G.taps, other=0)
    else:
        signs = gl.load(place)
    if G.tail != -1:
        signs = signs & gl.where(word == G.words - 1, G.tail, -1)
    return signs


@gluon.jit
def _sum_products(
    bits_ptr,
    weight_ptr,
    num_pixels,
    G: gl.constexpr,
    TILE: gl.constexpr,
    ASM: gl.constexpr,
    WIDE: gl.constexpr,
    PAIRED: gl.constexpr,
):
    """Ones of b & e, a tuple of 2 * size tensors a step of pixels, and ones of b, a tensor a step; of each warp."""
    T: gl.constexpr = TILE.size
    R: gl.constexpr = 2 * T
    SHAPE: gl.constexpr = [TILE.depth_warps, TILE.pixel_warps, 8, 4]
    BLOCKS: gl.constexpr = TILE.steps
    UNROLLED: gl.constexpr = TILE.unrolled(G.depth)
    STEPS: gl.constexpr = TILE.depth_steps(G.depth)
    IS_PADDED: gl.constexpr = STEPS * TILE.depth_warps * 8 != G.depth
    SUMS: gl.constexpr = (gl.int32,) * R
    depth_warp = _index(TILE.depth_warps, 0, 5, WIDE)
    g = _index(8, 2, 5, WIDE)
    t = _index(4, 3, 5, WIDE)
    r = _index(R, 4, 5, WIDE)
    first = (gl.program_id(0) * TILE.pixel_warps + _index(TILE.pixel_warps, 1, 5, WIDE)) * TILE.warp_pixels
    weights = weight_ptr + (gl.program_id(1) * STEPS * TILE.depth_warps + depth_warp) * (128 * T)
    weights = weights + (r // 4 * 128 + (g * 4 + t) * 4 + r % 4)
    zeros = gl.full(SHAPE + [R], 0, gl.int32, layout=WIDE)
    sources, tops, lefts, sums, ones = (), (), (), (), ()
    for i in gl.static_range(BLOCKS):
        pixel = gl.minimum(first + ((i * T + r // 2) * 8 + g), num_pixels - 1) + zeros
        top, left = _corner(pixel, G)
        image = pixel // (G.out_height * G.out_width)
        sources = sources + (bits_ptr + ((image * G.height + top) * G.width + left) * G.words,)
        tops = tops + (top,)
        lefts = lefts + (left,)
        sums = sums + ((zeros,) * R,)
        ones = ones + (gl.full(SHAPE + [T], 0, gl.int32, layout=PAIRED),)
    for group in range(STEPS // UNROLLED):
        for inner in gl.static_range(UNROLLED):
            step = (group * UNROLLED + inner) * TILE.depth_warps
            low = gl.load(weights + step * (128 * T))
            high = gl.load(weights + step * (128 * T) + 64 * T)
            new_sums, new_ones = (), ()
            for i in gl.static_range(BLOCKS):
                signs = _load_signs(sources[i], tops[i], lefts[i], step + depth_warp, t, r, G, IS_PADDED)
                args = (low, high, signs) + sums[i]
                added = gl.inline_asm_elementwise(ASM.product, ASM.product_registers, args, SUMS, True, R)
                even, odd = gl.split(gl.reshape(_count_ones(signs), SHAPE + [T, 2]))
                new_sums = new_sums + (added,)
                new_ones = new_ones + (ones[i] + gl.convert_layout(even + odd, PAIRED),)
            sums, ones = new_sums, new_ones
    return sums, ones


@gluon.jit
def _whole_sums(
    ones, first, num_pixels, kind_ptr, G: gl.constexpr, ASM: gl.constexpr, T: gl.constexpr, LAYOUT: gl.constexpr
):
    """S of each result's pixel and its line in the table of ones: each a pair of tensors, of even and odd columns."""
    ones = gl.sum(gl.sum(ones, axis=0), axis=2)
    ones = gl.expand_dims(ones, 2) + gl.full([ones.shape[0], 8, 4, T], 0, gl.int32, layout=LAYOUT)
    pixel = gl.minimum(first + (_index(T, 3, 4, LAYOUT) * 8 + _index(8, 1, 4, LAYOUT)), num_pixels - 1) + ones * 0
    kind = ones * 0
    taps = kind + G.taps
    if G.has_border:
        top, left = _corner(pixel, G)
        rows = gl.minimum(top + G.kernel_h, G.height) - gl.maximum(top, 0)
        columns = gl.minimum(left + G.kernel_w, G.width) - gl.maximum(left, 0)
        taps = gl.maximum(rows, 0) * gl.maximum(columns, 0)
        inner = pixel % (G.out_height * G.out_width)
        kind = gl.load(kind_ptr + inner // G.out_width, mask=taps < G.taps, other=0)
        kind += gl.load(kind_ptr + G.out_height + inner % G.out_width, mask=taps < G.taps, other=0)
    PAIR: gl.constexpr = (gl.int32, gl.int32)
    whole = 2 * ones - taps * G.channels
    wholes = gl.inline_asm_elementwise(ASM.spread, ASM.spread_registers, [whole], PAIR, True, T)
    kinds = gl.inline_asm_elementwise(ASM.spread, ASM.spread_registers, [kind], PAIR, True, T)
    return wholes, kinds


@gluon.jit
def _register(x, n: gl.constexpr, size: gl.constexpr, LAYOUT: gl.constexpr, OUT: gl.constexpr):
    """Register n of each lane as a tensor with a last axis of length 1."""
    one = gl.sum(gl.where(_index(size, 3, 4, LAYOUT) == n, x, 0), axis=3)
    return gl.expand_dims(gl.convert_layout(one, gl.SliceLayout(3, OUT)), 3)


@gluon.jit(do_not_specialize=["num_pixels"])
def _product_kernel(
    bits_ptr,
    weight_ptr,
    alpha_ptr,
    beta_ptr,
    bias_ptr,
    ones_ptr,
    kind_ptr,
    threshold_ptr,
    falls_ptr,
    out_ptr,
    num_pixels,
    G: gl.constexpr,
    TILE: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    IS_PACKED: gl.constexpr,
):
    """See `launch`. Axes of all tensors: warps along depth, warps along pixels, g, t, registers of a lane."""
    T: gl.constexpr = TILE.size
    R: gl.constexpr = 2 * T
    ASM: gl.constexpr = instructions(T)
    BLOCKS: gl.constexpr = TILE.steps
    WARPS: gl.constexpr = [TILE.depth_warps, TILE.pixel_warps, 1, 1, 1]
    WIDE: gl.constexpr = gl.BlockedLayout([1, 1, 1, 1, R], [1, 1, 8, 4, 1], WARPS, [4, 3, 2, 1, 0])
    PAIRED: gl.constexpr = gl.BlockedLayout([1, 1, 1, 1, T], [1, 1, 8, 4, 1], WARPS, [4, 3, 2, 1, 0])
    sums, ones = _sum_products(bits_ptr, weight_ptr, num_pixels, G, TILE, ASM, WIDE, PAIRED)

    # The warps along depth add up; the first axis is gone from here on.
    OUT: gl.constexpr = gl.SliceLayout(0, WIDE)
    PIXELS: gl.constexpr = gl.SliceLayout(0, PAIRED)
    g = _index(8, 1, 4, OUT)
    r = _index(R, 3, 4, OUT)
    feature = gl.program_id(1) * (16 * T) + (g * R + r)
    is_feature = feature < G.filters
    alpha = gl.load(alpha_ptr + feature, mask=is_feature, other=0.0)
    beta = gl.load(beta_ptr + feature, mask=is_feature, other=0.0)
    scale = alpha - beta
    lines = ones_ptr + feature
    all_ones = gl.load(lines, mask=is_feature, other=0)
    if HAS_BIAS:
        bias = gl.load(bias_ptr + feature, mask=is_feature, other=0.0)
    if IS_PACKED:
        # Lanes own 8 filters of a pixel, a byte, or 4, of which all g together are a word.
        shift = r if T == 4 else g * R + r
        threshold = gl.load(threshold_ptr + feature, mask=is_feature, other=float("inf"))
        falls = gl.sum(gl.load(falls_ptr + feature, mask=is_feature, other=0).to(gl.int32) << shift, axis=3)
        unit = gl.program_id(1) * 8 + g if T == 4 else gl.program_id(1) + g * 0
        UNITS: gl.constexpr = G.out_words * (4 if T == 4 else 1)
    block = gl.program_id(0) * TILE.pixel_warps
    for i in gl.static_range(BLOCKS):
        first = (block + _index(TILE.pixel_warps, 0, 4, PIXELS)) * TILE.warp_pixels + i * (8 * T)
        wholes, kinds = _whole_sums(ones[i], first, num_pixels, kind_ptr, G, ASM, T, PIXELS)
        start = (block + _index(TILE.pixel_warps, 0, 4, OUT)) * TILE.warp_pixels + i * (8 * T)
        pixel = start + _index(4, 2, 4, OUT) * 2
        if IS_PACKED:
            target = out_ptr + (pixel * UNITS + unit)
        else:
            target = out_ptr + (pixel * G.filters + feature)
        for pair in gl.static_range(2 * T):  # 8 pixels n, even or odd columns of them
            offset = 8 * (pair // 2) + pair % 2
            is_pixel = pixel + offset < num_pixels
            count = gl.sum(sums[i][pair], axis=0)
            inside = all_ones
            if G.has_border:
                kind = _register(kinds[pair % 2], pair // 2, T, PIXELS, OUT)
                inside = gl.load(lines + kind * G.filters, mask=(kind > 0) & is_feature, other=all_ones)
            whole = _register(wholes[pair % 2], pair // 2, T, PIXELS, OUT)
            value = scale * (2 * count - inside).to(gl.float32) + beta * whole.to(gl.float32)
            if HAS_BIAS:
                value = value + bias
            if IS_PACKED:
                packed = gl.sum(gl.where(value >= threshold, 1 << shift, 0), axis=3) ^ falls
                if T == 2:
                    packed = gl.expand_dims(gl.sum(packed, axis=1), 1)
                packed = gl.expand_dims(packed, 3).to(out_ptr.dtype.element_ty)
                gl.store(target + offset * UNITS, packed, mask=is_pixel & (unit < UNITS))
            else:
                value = value.to(out_ptr.dtype.element_ty)
                gl.store(target + offset * G.filters, value, mask=is_pixel & is_feature)
