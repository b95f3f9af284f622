"""Counts of a tile by table: 4 pairs of windows by 32 filters, for AVX2.

Four bits of two windows side by side are a byte of the input, and select one of 256 tables of 16 bytes. Four bits of a
filter are the index into it; what stands there is the number of ones that the filter selects, of the first window in
the low half of the byte and of the second in the high half. `vpshufb` looks up 32 filters at once, so one shuffle and
one sum are 256 multiplications, without a count of ones and without a sum across a vector.

Sums of three such bytes keep within their halves (3 * 4 < 16). Each sum goes into two vectors of bytes: its high half
by itself, and the whole of it modulo 256, from which the sum of the high halves is taken away at the end. After 7
words they are added to sums of 16 bits, and after 256 times 7 words those to sums of 32 bits.
"""

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

from kernels.vector_ir import I8, I16, I32, I64, INTS, call, constant, constants, load, loop, offset, store

PAIRS = 4
_WINDOWS = 2 * PAIRS
_FILTERS = 32
# Lookups of a word, and those that are summed before the halves are separated.
_NIBBLES = 8
_GROUPS = ((0, 3), (3, 6), (6, 8))
# Words until a byte may be full: 7 * 32 < 256.
_CHUNK_WORDS = 7
# Chunks until 16 bits may be full: 256 * 7 * 32 < 2**16.
_SPILL_CHUNKS = 256
_BYTES, _SHORTS = ir.VectorType(I8, _FILTERS), ir.VectorType(I16, _FILTERS // 2)
_REGISTER_BYTES = 32
_SHORT_SUM_BYTES, _SUM_BYTES = 2 * _FILTERS, 4 * _FILTERS
# Filters as they lie in the two vectors of 16-bit sums of a window: what unpacking bytes makes of them.
_UNPACKED = ([*range(8), *range(16, 24)], [*range(8, 16), *range(24, 32)])
_TABLES = "dab.pair_tables"


def build_counts(builder: ir.IRBuilder, starts: Sequence[Any], window: Any, weights: Any) -> Callable[[int, int], Any]:
    """Counts the ones of (input and weight) for 4 pairs of windows and 32 filters.

    Args:
        builder: where the code goes.
        starts: 4 addresses, of the first byte of each pair.
        window: (bytes from one row of pairs to the next, rows, twice the words of a row of the window).
        weights: address of (rows, words, 8, 32) uint8: for each word the four bits of 32 filters that meet one byte.

    Returns:
        The 16 counts, int32, of a window and of one half of the filters.
    """
    shorts, sums = (_scratch(builder, _WINDOWS * size) for size in (_SHORT_SUM_BYTES, _SUM_BYTES))
    row_bytes, num_rows, row_halves = (builder.extract_value(window, i) for i in range(3))
    row_words = builder.ashr(row_halves, constant(1))
    tables = _tables(builder)

    def add_row(_index: Any, values: Sequence[Any]) -> list[Any]:
        address, num_chunks, *places = values

        def add_chunk(first: Any, state: Sequence[Any]) -> list[Any]:
            left = builder.sub(row_words, first)
            is_last = builder.icmp_signed("<", left, constant(_CHUNK_WORDS))
            count = builder.select(is_last, left, constant(_CHUNK_WORDS))

            def add_word(index: Any, inner: Sequence[Any]) -> list[Any]:
                distance = builder.mul(builder.add(first, index), constant(_NIBBLES))
                inputs = [builder.add(place, distance) for place in places]
                found = _add_word(builder, tables, inputs, inner[0], inner[1:])
                return [offset(builder, inner[0], _NIBBLES * _FILTERS), *found]

            following, *found = loop(builder, count, [state[0], *[ir.Constant(_BYTES, None)] * _WINDOWS], add_word)
            _add_bytes(builder, found, shorts)
            done = builder.add(state[1], constant(1))
            is_full = builder.icmp_unsigned("==", builder.urem(done, constant(_SPILL_CHUNKS)), constant(0))
            with builder.if_then(is_full, likely=False):
                _spill(builder, shorts, sums)
            return [following, done]

        after = loop(builder, row_words, [address, num_chunks], add_chunk, _CHUNK_WORDS)
        return [*after, *(builder.add(place, row_bytes) for place in places)]

    _clear(builder, shorts, _WINDOWS * _SHORT_SUM_BYTES)
    _clear(builder, sums, _WINDOWS * _SUM_BYTES)
    loop(builder, num_rows, [weights, constant(0), *starts], add_row)

    def count_of(number: int, vector: int) -> Any:
        total = load(builder, offset(builder, sums, number * _SUM_BYTES + vector * _SUM_BYTES // 2), INTS)
        return builder.add(total, _shorts_in_order(builder, shorts, number, vector))

    return count_of


def _add_word(
    builder: ir.IRBuilder, tables: Any, inputs: Sequence[Any], weights: Any, totals: Sequence[Any]
) -> list[Any]:
    """Adds one word of each pair; totals are, pair by pair, sums of whole bytes and sums of their high halves."""
    results = list(totals)
    for first, end in _GROUPS:
        places = [offset(builder, weights, number * _FILTERS) for number in range(first, end)]
        indices = [load(builder, place, _BYTES) for place in places]
        for pair, address in enumerate(inputs):
            found = None
            for number, index in zip(range(first, end), indices, strict=True):
                table = _load_table(builder, tables, load(builder, offset(builder, address, number), I8, 1))
                selected = _shuffle_bytes(builder, table, index)
                found = selected if found is None else builder.add(found, selected)
            results[2 * pair] = builder.add(results[2 * pair], found)
            results[2 * pair + 1] = builder.add(results[2 * pair + 1], _high_halves(builder, found))
    return results


def _load_table(builder: ir.IRBuilder, tables: Any, selector: Any) -> Any:
    """Returns table number `selector` twice, as a shuffle of 32 bytes reads each of its halves from its own."""
    half = ir.VectorType(I8, 16)
    place = builder.add(tables, builder.mul(builder.zext(selector, I64), constant(16)))
    table = load(builder, place, half, 16)
    return builder.shuffle_vector(table, ir.Constant(half, ir.Undefined), constants(I32, [*range(16)] * 2))


def _shuffle_bytes(builder: ir.IRBuilder, table: Any, index: Any) -> Any:
    return call(builder, "llvm.x86.avx2.pshuf.b", [table, index])


def _shift(builder: ir.IRBuilder, value: Any, shift: Callable[..., Any]) -> Any:
    """Shifts by four bits; bits cross from one byte of a pair to the other."""
    return builder.bitcast(shift(builder.bitcast(value, _SHORTS), constants(I16, [4] * 16)), _BYTES)


def _high_halves(builder: ir.IRBuilder, value: Any) -> Any:
    return builder.and_(_shift(builder, value, builder.lshr), constants(I8, [15] * _FILTERS))


def _add_bytes(builder: ir.IRBuilder, totals: Sequence[Any], shorts: Any) -> None:
    """Adds the sums of a chunk to the 16-bit sums."""
    for pair in range(PAIRS):
        whole, second = totals[2 * pair : 2 * pair + 2]
        low = builder.and_(second, constants(I8, [15] * _FILTERS))
        first = builder.sub(whole, _shift(builder, low, builder.shl))
        for number, counts in ((2 * pair, first), (2 * pair + 1, second)):
            for half, order in enumerate(_UNPACKED):
                place = offset(builder, shorts, number * _SHORT_SUM_BYTES + half * _REGISTER_BYTES)
                taken = builder.shuffle_vector(counts, ir.Constant(_BYTES, None), constants(I32, order))
                total = builder.add(load(builder, place, _SHORTS, _REGISTER_BYTES), builder.zext(taken, _SHORTS))
                store(builder, total, place, _REGISTER_BYTES)


def _shorts_in_order(builder: ir.IRBuilder, shorts: Any, number: int, vector: int) -> Any:
    """Returns the 16-bit sums of a window and one half of the filters, in the order of the filters, as int32."""
    place = offset(builder, shorts, number * _SHORT_SUM_BYTES)
    low, high = (load(builder, offset(builder, place, i * _REGISTER_BYTES), _SHORTS, _REGISTER_BYTES) for i in (0, 1))
    order = [*range(8 * vector, 8 * vector + 8), *range(16 + 8 * vector, 24 + 8 * vector)]
    return builder.zext(builder.shuffle_vector(low, high, constants(I32, order)), INTS)


def _spill(builder: ir.IRBuilder, shorts: Any, sums: Any) -> None:
    for number in range(_WINDOWS):
        for vector in range(2):
            place = offset(builder, sums, number * _SUM_BYTES + vector * _SUM_BYTES // 2)
            total = builder.add(load(builder, place, INTS), _shorts_in_order(builder, shorts, number, vector))
            store(builder, total, place)
    _clear(builder, shorts, _WINDOWS * _SHORT_SUM_BYTES)


def _scratch(builder: ir.IRBuilder, num_bytes: int) -> Any:
    """Returns the address of room on the stack."""
    with builder.goto_entry_block():
        room = builder.alloca(ir.ArrayType(I8, num_bytes))
        room.align = _REGISTER_BYTES
        return builder.ptrtoint(room, I64)


def _clear(builder: ir.IRBuilder, address: Any, num_bytes: int) -> None:
    for place in range(0, num_bytes, _REGISTER_BYTES):
        store(builder, ir.Constant(_BYTES, None), offset(builder, address, place), _REGISTER_BYTES)


def _tables(builder: ir.IRBuilder) -> Any:
    """Returns the address of the tables: in row `byte`, for each four bits of a filter, the ones that they select."""
    module = builder.module
    found = module.globals.get(_TABLES)
    if found is None:
        values = [
            (byte & 15 & bits).bit_count() | ((byte >> 4) & bits).bit_count() << 4
            for byte in range(256)
            for bits in range(16)
        ]
        found = ir.GlobalVariable(module, ir.ArrayType(I8, len(values)), _TABLES)
        found.linkage, found.global_constant, found.align = "internal", True, 64
        found.initializer = ir.Constant(found.value_type, bytearray(values))
    return builder.ptrtoint(found, I64)
