"""One tile of the packed convolution: a few windows by 32 filters, from packed words to values or signs.

The counts come from the form that the processor runs (`tile_form`); the epilogue is the same for all of them. No
fast-math: each float32 operation rounds on its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kernels import vector_pairs, vector_words
from kernels.cpu_path import cpu_path
from kernels.vector_ir import F32, FLOATS, I32, I64, INTS, load, load_vector, mask_word, offset, splat, store

TILE_FILTERS = 32
_ROW_BYTES = TILE_FILTERS * 4
_VECTORS = 2
# Numbers of scalars before the thresholds, and before the bits of falls.
_THRESHOLDS, _FALLS = 3, 4

_Count = Callable[[int, int], Any]


@dataclass(frozen=True)
class TileForm:
    """What a tile reads.

    Attributes:
        windows: outputs of a tile.
        is_paired: whether it reads windows in pairs of neighbours, from an image of pairs, and filters by four bits.
        build_counts: builds the code that counts the ones of all windows with all filters.
    """

    windows: int
    is_paired: bool
    build_counts: Callable[[ir.IRBuilder, Sequence[Any], Any, Any], _Count]


WORDS = TileForm(vector_words.WINDOWS, False, vector_words.build_counts)
PAIRS = TileForm(2 * vector_pairs.PAIRS, True, vector_pairs.build_counts)


def tile_form() -> TileForm:
    """Returns the form of tiles that this process compiles."""
    return PAIRS if cpu_path().name == "avx2" else WORDS


def _build_value(
    builder: ir.IRBuilder, counts: Sequence[Any], scalars: Sequence[Any], ones: Any, total: Any
) -> list[Any]:
    """Returns scale * (2 count - ones) + beta * total + bias, each operation rounded, for the filters of a window."""
    results = []
    for vector, count in enumerate(counts):
        scale, beta, bias = scalars[vector::_VECTORS]
        selected = builder.sub(builder.add(count, count), load_vector(builder, ones, vector, INTS))
        value = builder.fmul(scale, builder.sitofp(selected, FLOATS))
        value = builder.fadd(value, builder.fmul(beta, splat(builder, total, FLOATS)))
        results.append(builder.fadd(value, bias))
    return results


def _store_values(builder: ir.IRBuilder, values: Sequence[Any], _scalars: Any, target: Any) -> None:
    for vector, value in enumerate(values):
        store(builder, value, offset(builder, target, vector * _ROW_BYTES // _VECTORS))


def _store_signs(builder: ir.IRBuilder, values: Sequence[Any], scalars: Any, target: Any) -> None:
    reached = []
    for vector, value in enumerate(values):
        threshold = load_vector(builder, scalars, _THRESHOLDS * _VECTORS + vector)
        reached.append(builder.fcmp_ordered(">=", value, threshold))
    falls = load(builder, offset(builder, scalars, _FALLS * _ROW_BYTES), I32)
    store(builder, builder.xor(mask_word(builder, reached), falls), target)


def _element(builder: ir.IRBuilder, address: Any, index: int) -> Any:
    """Returns number `index` of an array of int64."""
    return load(builder, offset(builder, address, 8 * index), I64, 8)


def _build_tile(form: TileForm, store_values: Callable[..., None]) -> Callable[..., Any]:
    def build(context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[Any]) -> Any:
        where, image, window, filters, target = arguments[:5]
        starts, kinds, places, targets = (builder.extract_value(where, i) for i in range(4))
        inputs, sums = (builder.extract_value(image, i) for i in range(2))
        weights, scalars, ones, ones_bytes = (builder.extract_value(filters, i) for i in range(4))
        base, target_bytes = (builder.extract_value(target, i) for i in range(2))
        num_starts = form.windows // (2 if form.is_paired else 1)
        first = [builder.add(inputs, _element(builder, starts, number)) for number in range(num_starts)]
        own_ones, totals, own_targets = [], [], []
        for number in range(form.windows):
            own_ones.append(builder.add(ones, builder.mul(_element(builder, kinds, number), ones_bytes)))
            place = builder.mul(_element(builder, places, number), ir.Constant(I64, 4))
            totals.append(load(builder, builder.add(sums, place), F32))
            own_targets.append(builder.add(base, builder.mul(_element(builder, targets, number), target_bytes)))
        count = form.build_counts(builder, first, window, weights)
        rows = [load_vector(builder, scalars, vector) for vector in range(_THRESHOLDS * _VECTORS)]
        results = []
        for number in range(form.windows):
            counts = [count(number, vector) for vector in range(_VECTORS)]
            results.append(_build_value(builder, counts, rows, own_ones[number], totals[number]))
        for values, own_target in zip(results, own_targets, strict=True):
            store_values(builder, values, scalars, own_target)
        return context.get_dummy_value()

    return build


def _type_tile(_typing: Any, _where: Any, _image: Any, _window: Any, _filters: Any, _target: Any, like: Any) -> Any:
    """`convolve_tile(where, image, window, filters, target, like)` convolves the windows of a tile with 32 filters.

    All but the sizes are addresses, and nothing is checked:

        where: arrays of int64 of this tile: bytes from the first input to each start; and for each window its kind of
            border, its place in the image, and its place in the target.
        image: (the input: packed words or pairs; sums of signs, float32, by place).
        window: (bytes from one input row to the next, rows, words of a row of the window as the filters have them).
        filters: (weights as the form reads them; scalars; ones; bytes from one kind's ones to the next). Scalars are
            (3, 32) float32: scale = alpha - beta, beta, bias. For signs (5, 32): also the thresholds, and a row whose
            first word holds the bits of falls. Ones are int32, of every filter at the taps inside the image.
        target: (first output, bytes from one place to the next). A place is 32 float32 or one uint32, overwritten by
            the values y = scale * (2 count - ones) + beta * sum + bias, or their signs: bit i is (y of filter i >= its
            threshold) xor falls bit i.
        like: an array of float32 for values, of uint32 for signs.
    """
    sizes: Any = types.Tuple
    numbers = {count: sizes([types.int64] * count) for count in (2, 3, 4)}
    store_values = _store_values if like.dtype == types.float32 else _store_signs
    signature = types.void(numbers[4], numbers[2], numbers[3], numbers[4], numbers[2], like)
    return signature, _build_tile(tile_form(), store_values)


# Numba gives it no type.
convolve_tile: Any = intrinsic(_type_tile)
