"""Two small pieces of vector code for the Numba kernels, written as LLVM vector operations.

Numba compiles loops of scalars, and LLVM does not find the shapes below in them: many accumulators that stay in
registers over the whole of a filter, and a comparison whose result becomes bits. Both are built of operations that
every target of LLVM has (`<16 x i32>` and, or, count of ones, comparison); on a processor with AVX-512 and VPOPCNTDQ
each is one instruction, elsewhere LLVM splits them.
"""

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

# Pixels and filters of a tile: 7 x 2 vectors of accumulators, 2 of weights and 1 of input are 17 of 32 registers.
TILE_PIXELS = 7
TILE_FILTERS = 32
_LANES = 16
_WORD_BYTES = 4
_VECTORS = TILE_FILTERS // _LANES

_I16, _I32, _I64, _F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_INTS, _FLOATS = ir.VectorType(_I32, _LANES), ir.VectorType(_F32, _LANES)
_VECTOR_BYTES = _LANES * _WORD_BYTES

_address = types.int64
_tuple_of: Any = types.Tuple
_addresses = _tuple_of([_address] * TILE_PIXELS)
_numbers = _tuple_of([types.float32] * TILE_PIXELS)


def _constant(value: int) -> ir.Constant:
    return ir.Constant(_I64, value)


def _load(builder: ir.IRBuilder, address: Any, kind: Any) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=_WORD_BYTES)


def _store(builder: ir.IRBuilder, value: Any, address: Any, align: int = _WORD_BYTES) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=align)


def _splat(builder: ir.IRBuilder, value: Any, kind: Any) -> Any:
    """Returns a vector of 16 times the same value."""
    nothing = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(nothing, value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, nothing, ir.Constant(_INTS, None))


def _count_ones(builder: ir.IRBuilder, words: Any) -> Any:
    name = "llvm.ctpop.v16i32"
    module = builder.module
    function = module.globals.get(name) or ir.Function(module, ir.FunctionType(_INTS, [_INTS]), name)
    return builder.call(function, [words])


def _mask_word(builder: ir.IRBuilder, halves: Sequence[Any]) -> Any:
    """Returns the 32 truth values of two comparisons as one word, the first in the lowest bit."""
    low, high = (builder.zext(builder.bitcast(half, _I16), _I32) for half in halves)
    return builder.or_(low, builder.shl(high, ir.Constant(_I32, _LANES)))


def _build_reached(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[Any]) -> Any:
    halves = []
    for vector in range(2):
        values, least = (_vector(builder, address, 0, vector) for address in arguments)
        halves.append(builder.fcmp_ordered(">=", values, least))
    return _mask_word(builder, halves)


def _type_reached(_typing: Any, _values: Any, _thresholds: Any) -> Any:
    """`reached_of_32(values, thresholds)` is the uint32 with bit i set where value i >= threshold i, both float32.

    Both are addresses.
    """
    return types.uint32(_address, _address), _build_reached


def _type_ones(_typing: Any, _word: Any) -> Any:
    """`count_ones(word)` is the number of ones of a uint32, as int32."""
    return types.int32(types.uint32), lambda _context, builder, _signature, arguments: builder.ctpop(arguments[0])


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
    end, following = builder.block, builder.add(index, _constant(1))
    for phi, first, later in zip([index, *values], [_constant(0), *starts], [following, *results], strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(later, end)
    after = builder.append_basic_block()
    builder.cbranch(builder.icmp_signed("<", following, count), block, after)
    builder.position_at_end(after)
    return list(results)


def _build_counts(builder: ir.IRBuilder, pixels: Any, window: Any, weights: Any) -> list[Any]:
    """Counts the ones of (input and weight) for 7 windows and 32 filters; returns 14 vectors, pixel by pixel."""
    row_bytes, num_rows, row_words = (builder.extract_value(window, i) for i in range(3))

    def add_word(index: Any, values: Sequence[Any]) -> list[Any]:
        address, starts, counts = values[0], values[1 : 1 + TILE_PIXELS], values[1 + TILE_PIXELS :]
        places = [builder.add(address, _constant(vector * _VECTOR_BYTES)) for vector in range(_VECTORS)]
        filters = [_load(builder, place, _INTS) for place in places]
        offset = builder.shl(index, _constant(2))
        results = []
        for pixel, start in enumerate(starts):
            bits = _splat(builder, _load(builder, builder.add(start, offset), _I32), _INTS)
            for vector, words in enumerate(filters):
                ones = _count_ones(builder, builder.and_(bits, words))
                results.append(builder.add(counts[pixel * _VECTORS + vector], ones))
        following = builder.add(address, _constant(TILE_FILTERS * _WORD_BYTES))
        return [following, *starts, *results]

    def add_row(_index: Any, values: Sequence[Any]) -> list[Any]:
        inner = _loop(builder, row_words, values, add_word)
        starts = [builder.add(start, row_bytes) for start in inner[1 : 1 + TILE_PIXELS]]
        return [inner[0], *starts, *inner[1 + TILE_PIXELS :]]

    zeros = [ir.Constant(_INTS, None)] * (TILE_PIXELS * _VECTORS)
    first = [builder.extract_value(pixels, pixel) for pixel in range(TILE_PIXELS)]
    return _loop(builder, num_rows, [weights, *first, *zeros], add_row)[1 + TILE_PIXELS :]


def _build_values(builder: ir.IRBuilder, counts: Sequence[Any], scalars: Any, ones: Any, sums: Any) -> list[Any]:
    """Returns scale * (2 count - ones) + beta * sum + bias, each operation rounded, vector by vector like `counts`."""
    scale, beta, bias = ([_vector(builder, scalars, row, vector) for vector in range(_VECTORS)] for row in range(3))
    results = []
    for pixel in range(TILE_PIXELS):
        total = _splat(builder, builder.extract_value(sums, pixel), _FLOATS)
        taken = builder.extract_value(ones, pixel)
        for vector in range(_VECTORS):
            count = counts[pixel * _VECTORS + vector]
            selected = builder.sub(builder.add(count, count), _vector(builder, taken, 0, vector, _INTS))
            value = builder.fmul(scale[vector], builder.sitofp(selected, _FLOATS))
            value = builder.fadd(value, builder.fmul(beta[vector], total))
            results.append(builder.fadd(value, bias[vector]))
    return results


def _vector(builder: ir.IRBuilder, address: Any, row: int, vector: int, kind: Any = _FLOATS) -> Any:
    return _load(builder, builder.add(address, _constant((row * _VECTORS + vector) * _VECTOR_BYTES)), kind)


def _build_tile(context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[Any]) -> Any:
    pixels, window, weights, scalars, ones, sums, outputs = arguments[:-1]
    counts = _build_counts(builder, pixels, window, weights)
    values = _build_values(builder, counts, scalars, ones, sums)
    for pixel in range(TILE_PIXELS):
        target = builder.extract_value(outputs, pixel)
        for vector in range(_VECTORS):
            place = builder.add(target, _constant(vector * _VECTOR_BYTES))
            _store(builder, values[pixel * _VECTORS + vector], place)
    return context.get_dummy_value()


def _build_sign_tile(context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[Any]) -> Any:
    pixels, window, weights, scalars, ones, sums, outputs = arguments[:-1]
    counts = _build_counts(builder, pixels, window, weights)
    values = _build_values(builder, counts, scalars, ones, sums)
    thresholds = [_vector(builder, scalars, 3, vector) for vector in range(_VECTORS)]
    falls = _load(builder, builder.add(scalars, _constant(4 * TILE_FILTERS * _WORD_BYTES)), _I32)
    for pixel in range(TILE_PIXELS):
        own = values[pixel * _VECTORS : (pixel + 1) * _VECTORS]
        reached = [builder.fcmp_ordered(">=", value, least) for value, least in zip(own, thresholds, strict=True)]
        word = builder.xor(_mask_word(builder, reached), falls)
        _store(builder, word, builder.extract_value(outputs, pixel))
    return context.get_dummy_value()


def _type_tile(
    _typing: Any,
    _pixels: Any,
    _window: Any,
    _weights: Any,
    _scalars: Any,
    _ones: Any,
    _sums: Any,
    _outputs: Any,
    like: Any,
) -> Any:
    """`convolve_tile(pixels, window, weights, scalars, ones, sums, outputs, like)` convolves 7 windows with 32 filters.

    All but `window` and `sums` are addresses, and nothing is checked:

        pixels: 7, of the first input word of each window.
        window: (bytes from one input row to the next, rows, words of a row of the window).
        weights: (rows, words, 32) uint32, a word of each filter side by side.
        scalars: (3, 32) float32: scale = alpha - beta, beta, bias. For signs (5, 32): also the thresholds, and a row
            whose first word holds the bits of falls.
        ones: 7, each of (32,) int32: ones of every filter at the taps inside the image.
        sums: 7 float32: sum of signs in each window.
        outputs: 7, each of (32,) float32 or of one uint32, overwritten: the values y = scale * (2 count - ones) +
            beta * sum + bias, or their signs: bit i is (y of filter i >= its threshold) xor falls bit i.
        like: an array of float32 for values, of uint32 for signs.
    """
    window = _tuple_of([types.int64] * 3)
    build = _build_tile if like.dtype == types.float32 else _build_sign_tile
    return types.void(_addresses, window, _address, _address, _addresses, _numbers, _addresses, like), build


# Numba gives these no types.
reached_of_32: Any = intrinsic(_type_reached)
count_ones: Any = intrinsic(_type_ones)
convolve_tile: Any = intrinsic(_type_tile)
