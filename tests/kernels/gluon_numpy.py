"""Runs the Gluon kernels of this repository on numpy, one thread block after the other, for machines without a GPU.

Tensors are numpy arrays and layouts are ignored, but for one thing: inline assembly runs on registers and lanes, which
in our kernels are the last axis and the two before it (8 x 4). `run_assembly` knows the few PTX instructions that they
use and follows the register places that the PTX manual gives for m16n8k256.
"""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import numpy as np

NUM_LANES = 32


class Array(np.ndarray):
    """A tensor of the kernel language."""

    def to(self, dtype):
        return self.astype(dtype)


class Pointer:
    """An array in memory with the place of each element that a tensor points to."""

    def __init__(self, memory, place=0):
        self.memory, self.place = memory, place
        self.dtype = SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, offset):
        return Pointer(self.memory, self.place + offset)


class Language:
    """What `triton.experimental.gluon.language` offers, as far as our kernels use it."""

    constexpr = object
    int32, uint32, uint8, float32 = np.int32, np.uint32, np.uint8, np.float32
    static_range = range
    minimum = staticmethod(np.minimum)
    maximum = staticmethod(np.maximum)
    expand_dims = staticmethod(np.expand_dims)
    reshape = staticmethod(np.reshape)
    program = (0, 0)

    def BlockedLayout(self, *_layout):  # noqa: N802
        return None

    def SliceLayout(self, *_layout):  # noqa: N802
        return None

    def program_id(self, axis):
        return self.program[axis]

    def arange(self, start, end, layout):
        return np.arange(start, end, dtype=np.int32).view(Array)

    def full(self, shape, value, dtype, layout):
        return np.full(shape, value, dtype).view(Array)

    def convert_layout(self, value, layout):
        return value

    def split(self, value):
        return value[..., 0], value[..., 1]

    def where(self, condition, first, second):
        chosen = np.where(condition, first, second)
        return chosen.astype(np.int32).view(Array)  # ours choose between integers only

    def sum(self, value, axis):
        return np.sum(value, axis=axis, dtype=value.dtype).view(Array)

    def load(self, pointer, mask=True, other=None):
        place, mask = np.broadcast_arrays(pointer.place, mask)
        assert other is not None or mask.all()
        assert ((pointer.place >= 0) & (pointer.place < pointer.memory.size))[mask].all(), "read beyond the tensor"
        found = pointer.memory[np.where(mask, place, 0)]
        return (found if other is None else np.where(mask, found, other).astype(found.dtype)).view(Array)

    def store(self, pointer, value, mask):
        place, value, mask = np.broadcast_arrays(pointer.place, value, mask)
        assert ((place >= 0) & (place < pointer.memory.size))[mask].all(), "write beyond the tensor"
        pointer.memory[place[mask]] = value[mask]

    def inline_asm_elementwise(self, asm, constraints, args, dtype, is_pure, pack):
        if pack == 1:
            assert asm == "popc.b32 $0, $1;"
            return np.bitwise_count(args[0].view(np.uint32)).astype(np.int32).view(Array)
        shape = np.broadcast_shapes(*(arg.shape for arg in args))
        assert shape[-1] == pack
        registers = [np.broadcast_to(arg, shape).reshape(-1, NUM_LANES, pack) for arg in args]
        outs = np.empty((len(dtype), *registers[0].shape), np.int32)
        for warp in range(registers[0].shape[0]):
            inputs = [group[warp, :, register] for group in registers for register in range(pack)]
            found = run_assembly(asm, constraints, inputs)
            outs[:, warp] = np.stack(found).reshape(len(dtype), pack, NUM_LANES).transpose(0, 2, 1)
        return tuple(out.reshape(shape).view(Array) for out in outs)


def run_assembly(asm, constraints, inputs):
    """Returns the output registers, each (32,) int32, of one warp that runs `asm` on its input registers."""
    places = constraints.split(",")
    num_outputs = sum(place.startswith("=") for place in places)
    registers = {}
    for number, (place, value) in enumerate(zip(places[num_outputs:], inputs, strict=True)):
        registers[f"${int(place) if place.isdigit() else num_outputs + number}"] = value.astype(np.int32)
    for line in filter(None, (line.strip(" {}") if line in "{}" else line.strip() for line in asm.split("\n"))):
        name, _, rest = line.rstrip(";").partition(" ")
        if name.startswith("mma"):
            _multiply(registers, [group.split(", ") for group in re.findall(r"\{(.*?)\}", rest)])
        elif name != ".reg":
            target, *sources = rest.split(", ")
            registers[target] = SIMPLE[name](*(_value(registers, source) for source in sources))
    return [registers[f"${number}"] for number in range(num_outputs)]


def _value(registers, source):
    if source == "%laneid":
        return np.arange(NUM_LANES, dtype=np.int32)
    return registers[source] if source in registers else np.int32(source)


SIMPLE = {
    "mov.u32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "shl.b32": lambda a, b: a << b,
    "add.s32": lambda a, b: a + b,
    "shfl.sync.idx.b32": lambda value, lane, clamp, members: value[lane & clamp],
}


def _multiply(registers, operands):
    """mma.m16n8k256, b1, and.popc: the rows and columns of lane 4 * g + t as the PTX manual lists them."""
    names, firsts, seconds, sums = operands
    assert names == sums
    g, t = np.divmod(np.arange(NUM_LANES), 4)
    first, second = np.zeros((16, 8), np.uint32), np.zeros((8, 8), np.uint32)  # rows x words, columns x words
    for index, name in enumerate(firsts):
        first[g + 8 * (index % 2), t + 4 * (index // 2)] = registers[name].view(np.uint32)
    for index, name in enumerate(seconds):
        second[g, t + 4 * index] = registers[name].view(np.uint32)
    product = np.bitwise_count(first[:, None] & second[None]).sum(-1, dtype=np.int32)
    for index, name in enumerate(names):
        registers[name] = registers[name] + product[g + 8 * (index // 2), 2 * t + index % 2]


def load_kernels(path: Path) -> ModuleType:
    """Returns the module at path with the language of its kernels replaced by numpy."""
    gluon, language = ModuleType("gluon"), Language()
    gluon.language = language
    gluon.jit = lambda function=None, **_options: function or (lambda f: f)
    gluon.constexpr_function = lambda function: function
    specification = importlib.util.spec_from_file_location(f"{path.stem}_on_numpy", path)
    module = importlib.util.module_from_spec(specification)
    with mock.patch.dict(sys.modules, {"triton.experimental.gluon": gluon}):
        specification.loader.exec_module(module)
    module.language = language
    return module


def run(module, kernel, grid, *args, **options):
    """Runs a kernel of `load_kernels` for every block of the grid; arrays among the arguments are memory."""
    pointers = [Pointer(arg) if isinstance(arg, np.ndarray) else arg for arg in args]
    for column in range(grid[1]):
        for row in range(grid[0]):
            module.language.program = (row, column)
            getattr(module, kernel)(*pointers, **options)
