"""Vector code for real inputs and binary weights, written as LLVM vector operations for the Numba version.

A word holds one bit of 16 filters. It becomes the mask of an addition in registers: where a filter's bit is set, the
input is added to that filter's sum. On a processor with AVX-512 such an addition is one instruction, as fast as the
multiply-add of an ordinary convolution; every second one is written as a product with one, which rounds alike and runs
on other units of processors that have separate ones for sums and products (AMD Zen 5: 185 against 120 billion weights
a second, one core).
"""

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

# Filters of one word.
LANES = 16
# Rows of 16 float32 that follow the bits of a word's filters.
SCALAR_ROWS = 4

_BIT, _I16, _I32, _I64 = (ir.IntType(width) for width in (1, 16, 32, 64))
_F32 = ir.FloatType()
_FLOATS, _DOUBLES = ir.VectorType(_F32, LANES), ir.VectorType(ir.DoubleType(), LANES)
_MASK, _PLACES = ir.VectorType(_BIT, LANES), ir.VectorType(_I32, LANES)
_FLOAT_BYTES, _WORD_BYTES, _ADDRESS_BYTES = 4, 2, 8
_VECTOR_BYTES = LANES * _FLOAT_BYTES


def _load(builder: ir.IRBuilder, address: Any, kind: Any, align: int = _FLOAT_BYTES) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=align)


def _beyond(builder: ir.IRBuilder, address: Any, offset: int) -> Any:
    return builder.add(address, ir.Constant(_I64, offset))


def _splat(builder: ir.IRBuilder, value: Any) -> Any:
    nothing = ir.Constant(_FLOATS, ir.Undefined)
    first = builder.insert_element(nothing, value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, nothing, ir.Constant(_PLACES, None))


def _multiply_add(builder: ir.IRBuilder, x: Any, factor: Any, addend: Any) -> Any:
    name = "llvm.fma.v16f32"
    module = builder.module
    function = module.globals.get(name) or ir.Function(module, ir.FunctionType(_FLOATS, [_FLOATS] * 3), name)
    return builder.call(function, [x, factor, addend])


def _loop(
    builder: ir.IRBuilder, count: Any, starts: Sequence[Any], body: Callable[[Any, Sequence[Any]], Sequence[Any]]
) -> list[Any]:
    """Builds `for index in range(count): values = body(index, values)`, at least once; returns the last values."""
    before, block = builder.block, builder.append_basic_block()
    builder.branch(block)
    builder.position_at_end(block)
    index = builder.phi(_I64)
    values = [builder.phi(start.type) for start in starts]
    results = body(index, values)
    end, following = builder.block, _beyond(builder, index, 1)
    first = [ir.Constant(_I64, 0), *starts]
    for phi, start, later in zip([index, *values], first, [following, *results], strict=True):
        phi.add_incoming(start, before)
        phi.add_incoming(later, end)
    after = builder.append_basic_block()
    builder.cbranch(builder.icmp_signed("<", following, count), block, after)
    builder.position_at_end(after)
    return list(results)


def _elements(builder: ir.IRBuilder, values: Any) -> list[Any]:
    return [builder.extract_value(values, index) for index in range(values.type.count)]


def _build_sums(
    builder: ir.IRBuilder, table: Any, window: Any, weights: Any, num_pixels: int, one: Any | None
) -> list[Any]:
    """Adds up the inputs of each pixel where a filter's bit is set; returns the vectors pixel by pixel.

    `one` is a vector of ones that LLVM does not know for such, or None where products with it do not pay.
    """
    num_taps, num_channels = _elements(builder, window)
    num_words = weights.type.count

    def add_tap(index: Any, values: Sequence[Any]) -> list[Any]:
        row = builder.add(table, builder.mul(index, ir.Constant(_I64, num_pixels * _ADDRESS_BYTES)))
        pixels = [
            _load(builder, _beyond(builder, row, pixel * _ADDRESS_BYTES), _I64, _ADDRESS_BYTES)
            for pixel in range(num_pixels)
        ]

        def add_channel(channel: Any, values: Sequence[Any]) -> list[Any]:
            words, sums = values[:num_words], list(values[num_words:])
            masks = [builder.bitcast(_load(builder, word, _I16, _WORD_BYTES), _MASK) for word in words]
            offset = builder.mul(channel, ir.Constant(_I64, _FLOAT_BYTES))
            for pixel, address in enumerate(pixels):
                x = _splat(builder, _load(builder, builder.add(address, offset), _F32))
                for word, mask in enumerate(masks):
                    place = pixel * num_words + word
                    is_product = one is not None and (pixel + word) % 2 == 0
                    added = _multiply_add(builder, x, one, sums[place]) if is_product else builder.fadd(sums[place], x)
                    sums[place] = builder.select(mask, added, sums[place])
            return [*(_beyond(builder, word, _WORD_BYTES) for word in words), *sums]

        return _loop(builder, num_channels, values, add_channel)

    zeros = [ir.Constant(_FLOATS, None)] * (num_pixels * num_words)
    return _loop(builder, num_taps, [*_elements(builder, weights), *zeros], add_tap)[num_words:]


def _build_tile(context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[Any]) -> Any:
    table, window, weights, scalars, totals, outputs = arguments
    places = _elements(builder, scalars)
    has_pairs = "+avx512f" in context.codegen().magic_tuple()[2] and outputs.type.count > 1
    one = _load(builder, _beyond(builder, places[0], (SCALAR_ROWS - 1) * _VECTOR_BYTES), _FLOATS) if has_pairs else None
    sums = _build_sums(builder, table, window, weights, outputs.type.count, one)
    rows = [
        [_load(builder, _beyond(builder, place, row * _VECTOR_BYTES), _FLOATS) for row in range(SCALAR_ROWS - 1)]
        for place in places
    ]
    pairs = zip(_elements(builder, totals), _elements(builder, outputs), strict=True)
    for pixel, (total, output) in enumerate(pairs):
        everything = _splat(builder, total)
        for word, (scale, base, bias) in enumerate(rows):
            value = builder.fmul(scale, sums[pixel * len(rows) + word])
            value = builder.fadd(builder.fadd(value, builder.fmul(base, everything)), bias)
            target = builder.inttoptr(_beyond(builder, output, word * _VECTOR_BYTES), _FLOATS.as_pointer())
            builder.store(value, target, align=_FLOAT_BYTES)
    return context.get_dummy_value()


def _type_tile(_typing: Any, table: Any, window: Any, weights: Any, scalars: Any, totals: Any, outputs: Any) -> Any:
    """`convolve_real_tile(table, window, weights, scalars, totals, outputs)` convolves p windows with 16 w filters.

    Nothing is checked; at most 7 x 4 sums stay in registers.

        table: address of (taps, p) int64, the address of the first input channel at each tap of each window.
        window: (taps, channels), both at least 1.
        weights: w addresses, each of (taps, channels) uint16: bit i is that of filter i of the word.
        scalars: w addresses, each of (4, 16) float32: scale, base, bias and ones.
        totals: p float32, the sum of all inputs of the window.
        outputs: p addresses, each of (16 w,) float32, overwritten: (scale * (sum of the inputs where the bit is 1)
            + base * total) + bias, each operation rounded.
    """
    return types.void(table, window, weights, scalars, totals, outputs), _build_tile


def _build_total(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[Any]) -> Any:
    address, count = arguments

    def add(index: Any, values: Sequence[Any]) -> list[Any]:
        offset = builder.mul(index, ir.Constant(_I64, _VECTOR_BYTES))
        x = _load(builder, builder.add(address, offset), _FLOATS)
        return [builder.fadd(values[0], builder.fpext(x, _DOUBLES))]

    (total,) = _loop(builder, count, [ir.Constant(_DOUBLES, None)], add)
    width = LANES
    while width > 1:
        width //= 2
        halves = (
            builder.shuffle_vector(
                total, total, ir.Constant(ir.VectorType(_I32, width), [_I32(start + i) for i in range(width)])
            )
            for start in (0, width)
        )
        total = builder.fadd(*halves)
    return builder.extract_element(total, ir.Constant(_I32, 0))


def _type_total(_typing: Any, _address: Any, _count: Any) -> Any:
    """`sum_of_16s(address, count)` is the sum of 16 * count float32, count at least 1, in float64."""
    return types.float64(types.int64, types.int64), _build_total


# Numba gives these no types.
convolve_real_tile: Any = intrinsic(_type_tile)
sum_of_16s: Any = intrinsic(_type_total)
