"""Counts of a tile word by word: 7 windows by 32 filters, for a processor that counts the ones of a vector.

A word of the input meets the same word of 16 filters at once: and, count of ones, sum; with AVX-512 VPOPCNTDQ one
instruction each. Any other processor runs it too, where LLVM finds other instructions for the count.
"""

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

from kernels.vector_ir import I32, INTS, WORD_BYTES, call, constant, load, load_vector, loop, offset, splat

# 7 x 2 vectors of accumulators, 2 of weights and 1 of input are 17 of 32 registers.
WINDOWS = 7
_VECTORS = 2
_FILTERS_BYTES = 32 * WORD_BYTES


def build_counts(builder: ir.IRBuilder, starts: Sequence[Any], window: Any, weights: Any) -> Callable[[int, int], Any]:
    """Counts the ones of (input and weight) for 7 windows and 32 filters.

    Args:
        builder: where the code goes.
        starts: 7 addresses, of the first input word of each window.
        window: (bytes from one input row to the next, rows, words of a row of the window).
        weights: address of (rows, words, 32) uint32, a word of each filter side by side.

    Returns:
        The 16 counts, int32, of a window and of one half of the filters.
    """
    row_bytes, num_rows, row_words = (builder.extract_value(window, i) for i in range(3))

    def add_word(index: Any, values: Sequence[Any]) -> list[Any]:
        address, places, counts = values[0], values[1 : 1 + WINDOWS], values[1 + WINDOWS :]
        filters = [load_vector(builder, address, vector, INTS) for vector in range(_VECTORS)]
        distance = builder.mul(index, constant(WORD_BYTES))
        results = []
        for number, place in enumerate(places):
            bits = splat(builder, load(builder, builder.add(place, distance), I32), INTS)
            for vector, words in enumerate(filters):
                ones = call(builder, "llvm.ctpop.v16i32", [builder.and_(bits, words)])
                results.append(builder.add(counts[number * _VECTORS + vector], ones))
        return [offset(builder, address, _FILTERS_BYTES), *places, *results]

    def add_row(_index: Any, values: Sequence[Any]) -> list[Any]:
        inner = loop(builder, row_words, values, add_word)
        places = [builder.add(place, row_bytes) for place in inner[1 : 1 + WINDOWS]]
        return [inner[0], *places, *inner[1 + WINDOWS :]]

    zeros = [ir.Constant(INTS, None)] * (WINDOWS * _VECTORS)
    counts = loop(builder, num_rows, [weights, *starts, *zeros], add_row)[1 + WINDOWS :]
    return lambda number, vector: counts[number * _VECTORS + vector]
