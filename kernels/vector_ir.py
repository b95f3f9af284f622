"""Pieces of LLVM vector code that the Numba kernels are built of, and the two smallest kernels made of them.

Numba compiles loops of scalars, and LLVM does not find in them what the kernels need: accumulators that stay in
registers over the whole of a filter, and a comparison whose result becomes bits. All pieces here are operations that
every target of LLVM has. Addresses are int64, and nothing is checked.
"""

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

# Values of 32 bits in a vector: one register of AVX-512. Other processors split it.
LANES = 16
WORD_BYTES = 4
VECTOR_BYTES = LANES * WORD_BYTES

I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
INTS, FLOATS = ir.VectorType(I32, LANES), ir.VectorType(F32, LANES)


def constant(value: int) -> ir.Constant:
    """Returns an int64."""
    return ir.Constant(I64, value)


def constants(kind: Any, values: Sequence[int]) -> ir.Constant:
    """Returns a vector of these values of the given type."""
    return ir.Constant(ir.VectorType(kind, len(values)), values)


def load(builder: ir.IRBuilder, address: Any, kind: Any, align: int = WORD_BYTES) -> Any:
    """Returns the value of this type at an address."""
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=align)


def store(builder: ir.IRBuilder, value: Any, address: Any, align: int = WORD_BYTES) -> None:
    """Writes the value to an address."""
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=align)


def offset(builder: ir.IRBuilder, address: Any, num_bytes: int) -> Any:
    """Returns the address this many bytes further."""
    return builder.add(address, constant(num_bytes))


def load_vector(builder: ir.IRBuilder, address: Any, index: int, kind: Any = FLOATS) -> Any:
    """Returns vector number `index` of a row of vectors of 16."""
    return load(builder, offset(builder, address, index * VECTOR_BYTES), kind)


def splat(builder: ir.IRBuilder, value: Any, kind: Any) -> Any:
    """Returns a vector of 16 times the same value."""
    nothing = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(nothing, value, ir.Constant(I32, 0))
    return builder.shuffle_vector(first, nothing, ir.Constant(INTS, None))


def call(builder: ir.IRBuilder, name: str, arguments: Sequence[Any]) -> Any:
    """Calls an operation of LLVM, whose result has the type of its first argument."""
    module = builder.module
    kinds = [argument.type for argument in arguments]
    function = module.globals.get(name) or ir.Function(module, ir.FunctionType(kinds[0], kinds), name)
    return builder.call(function, arguments)


def mask_word(builder: ir.IRBuilder, halves: Sequence[Any]) -> Any:
    """Returns the 32 truth values of two comparisons as one word, the first in the lowest bit."""
    low, high = (builder.zext(builder.bitcast(half, I16), I32) for half in halves)
    return builder.or_(low, builder.shl(high, ir.Constant(I32, LANES)))


def loop(
    builder: ir.IRBuilder,
    count: Any,
    starts: Sequence[Any],
    body: Callable[[Any, Sequence[Any]], Sequence[Any]],
    step: int = 1,
) -> list[Any]:
    """Builds `for index in range(0, count, step): values = body(index, values)`, at least once; returns the last."""
    before, block = builder.block, builder.append_basic_block()
    builder.branch(block)
    builder.position_at_end(block)
    index = builder.phi(I64)
    values = [builder.phi(start.type) for start in starts]
    results = body(index, values)
    end, following = builder.block, builder.add(index, constant(step))
    for phi, first, later in zip([index, *values], [constant(0), *starts], [following, *results], strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(later, end)
    after = builder.append_basic_block()
    builder.cbranch(builder.icmp_signed("<", following, count), block, after)
    builder.position_at_end(after)
    return list(results)


def _build_reached(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[Any]) -> Any:
    halves = []
    for vector in range(2):
        values, least = (load_vector(builder, address, vector) for address in arguments)
        halves.append(builder.fcmp_ordered(">=", values, least))
    return mask_word(builder, halves)


def _type_reached(_typing: Any, _values: Any, _thresholds: Any) -> Any:
    """`reached_of_32(values, thresholds)` is the uint32 with bit i set where value i >= threshold i, both float32.

    Both are addresses.
    """
    return types.uint32(types.int64, types.int64), _build_reached


def _type_ones(_typing: Any, _word: Any) -> Any:
    """`count_ones(word)` is the number of ones of a uint32, as int32."""
    return types.int32(types.uint32), lambda _context, builder, _signature, arguments: builder.ctpop(arguments[0])


# Numba gives these no types.
reached_of_32: Any = intrinsic(_type_reached)
count_ones: Any = intrinsic(_type_ones)
