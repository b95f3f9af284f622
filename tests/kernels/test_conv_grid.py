"""The packed convolution on the CPU against the reference: every shape that a user may bring, with zero tolerance.

Complete in channels, kernel, stride and padding; all else is drawn for each of them, so that every pair of values
occurs. A sample runs again in processes that compile for AVX2 and for plain x86-64, whose tiles are other ones.
"""

import itertools
import os
import platform
import random
import subprocess
import sys
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import llvmlite.binding as llvm
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llvmlite import ir
from numba.core.registry import cpu_target

from kernels import conv_numba, pack_signs, packed_conv2d
from kernels.conv import output_size, packed_conv2d_reference
from kernels.cpu_path import cpu_path
from kernels.packing import pack_signs_reference
from kernels.vector_tile import PAIRS, WORDS, _build_tile, _store_signs, _store_values, tile_form

CHANNELS = (1, 3, 31, 32, 33, 63, 64, 100, 512)
KERNELS = (1, 3, 4, 5, 6, 7, 11)
STRIDES = (1, 2, 3, 4)
PADDINGS = (0, 1, 2, 3, 4, 5)
DRAWN = {
    "batch": (1, 1, 1, 2, 2, 17),
    "filters": (5, 5, 5, 32, 33),
    "has_bias": (False, True),
    "layout": ("contiguous", "channels_last", "strided", "strided_bits"),
    "more_rows": (0, 1, 2, 5),
    "more_columns": (0, 1, 2, 3, 7),
}
# Enough in other processes: what they compile is the tile, not the shapes.
SAMPLE = 100
X86_64 = "+64bit,+cx8,+mmx,+fxsr,+sse,+sse2"
AVX2 = f"{X86_64},+sse3,+ssse3,+sse4.1,+sse4.2,+popcnt,+cx16,+xsave,+avx,+avx2,+bmi,+bmi2,+lzcnt,+f16c,+fma"


@dataclass(frozen=True)
class Case:
    channels: int
    kernel: int
    stride: int
    padding: int
    batch: int
    filters: int
    has_bias: bool
    layout: str
    more_rows: int
    more_columns: int


def all_cases():
    draw = random.Random(0)
    return [
        Case(*given, **{name: draw.choice(values) for name, values in DRAWN.items()})
        for given in itertools.product(CHANNELS, KERNELS, STRIDES, PADDINGS)
    ]


def image_of(case, generator):
    """Returns the packed signs of an image that the smallest window just fits into, or of one a little larger."""
    least = max(1, case.kernel - 2 * case.padding)
    height, width = least + case.more_rows, least + case.more_columns
    step = 2 if case.layout == "strided" else 1
    shape = (case.batch, case.channels, height * step, width * step)
    x = torch.randint(-1, 2, shape, generator=generator, dtype=torch.int8).float()
    if case.layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    bits = pack_signs_reference(x[:, :, ::step, ::step])
    if case.layout == "strided_bits":
        wide = torch.full((*bits.shape[:2], 2 * bits.shape[2], bits.shape[3]), -1, dtype=torch.int32)
        wide[:, :, ::2] = bits
        return wide[:, :, ::2]
    assert torch.equal(bits, pack_signs(x[:, :, ::step, ::step]))
    return bits


def filters_of(case, generator):
    """Returns filters of which one gives the bare E, one the bare S; with masks of ones, of zeros, and alpha = beta."""
    mask = torch.rand(case.filters, case.channels, case.kernel, case.kernel, generator=generator) < 0.4
    mask[1], mask[2] = True, False
    alpha, beta, bias = torch.randn(3, case.filters, generator=generator)
    alpha[0], beta[0] = 1.0, 0.0
    alpha[3], beta[3] = 1.0, 1.0
    alpha[4] = beta[4]
    return pack_signs_reference(torch.where(mask, 1.0, -1.0)), alpha, beta, bias if case.has_bias else None


def check(case):
    """Compares values and signs, written over poison, with the reference."""
    generator = torch.Generator().manual_seed(zlib.crc32(repr(case).encode()))
    bits, filters = image_of(case, generator), filters_of(case, generator)
    steps = ((case.stride,) * 2, (case.padding,) * 2)
    wanted = packed_conv2d_reference(bits, *filters, case.channels, *steps)
    assert wanted.shape[2] == output_size(bits.shape[1], case.kernel, case.stride, case.padding)
    out = torch.full_like(wanted, float("nan"))
    if case.batch == 1:
        out = out.to(memory_format=torch.channels_last)
    conv_numba.launch(bits, *filters, case.channels, *steps, out)
    assert torch.equal(out, wanted), case
    threshold, falls = wanted[0, :, 0, 0].clone(), torch.arange(case.filters) % 3 == 0
    signs = pack_signs_reference(torch.where((wanted >= threshold.view(-1, 1, 1)) ^ falls.view(-1, 1, 1), 1.0, -1.0))
    found = torch.full_like(signs, -1)
    conv_numba.launch_signs(bits, *filters, threshold, falls, case.channels, *steps, found)
    assert torch.equal(found, signs), case


def check_sample(path):
    """Runs in a process of its own."""
    torch.set_num_threads(1)
    assert cpu_path().name == path
    assert tile_form() is (PAIRS if path == "avx2" else WORDS)
    for case in random.Random(1).sample(all_cases(), SAMPLE):
        check(case)
    bits, weight_bits = (torch.full(shape, -1, dtype=torch.int32) for shape in ((1, 1, 2, 30000), (1, 1, 1, 30000)))
    one, total = torch.ones(1), 30000 * 32  # ones, more than 16 bits hold
    out = packed_conv2d(bits, weight_bits, one, one, in_channels=total, padding=0)
    assert out.tolist() == [[[[total, total]]]]


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_shape_equals_the_reference(kernel):
    for case in all_cases():
        if case.kernel == kernel:
            check(case)


def test_every_pair_of_values_occurs():
    rows = [asdict(case) for case in all_cases()]
    for first, second in itertools.combinations(rows[0], 2):
        values = [{row[name] for row in rows} for name in (first, second)]
        assert {(row[first], row[second]) for row in rows} == set(itertools.product(*values)), (first, second)


@pytest.mark.parametrize(("path", "features"), [("avx2", AVX2), ("popcount", X86_64)], ids=["avx2", "popcount"])
def test_other_processors_compute_the_same(path, features):
    host = llvm.get_host_cpu_features()
    if platform.machine() not in ("x86_64", "AMD64") or not all(host.get(name[1:]) for name in features.split(",")):
        pytest.skip(f"this processor cannot run code for {path}")
    folder = Path(__file__).parent
    environment = {
        **os.environ,
        "NUMBA_CPU_NAME": "x86-64",
        "NUMBA_CPU_FEATURES": features,
        "PYTHONPATH": f"{folder.parents[1]}{os.pathsep}{folder}",
    }
    script = f"import test_conv_grid; test_conv_grid.check_sample({path!r})"
    run = subprocess.run([sys.executable, "-W", "error", "-c", script], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("store", [_store_values, _store_signs])
@pytest.mark.parametrize("triple", ["aarch64-unknown-linux-gnu", "arm64-apple-darwin"])
def test_the_tile_of_words_compiles_for_arm(triple, store):
    """As far as it can be seen without such a processor: LLVM makes code of it, with its count of ones."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    try:
        target = llvm.Target.from_triple(triple)
    except RuntimeError:
        pytest.skip(f"this LLVM has no target for {triple}")
    module = ir.Module()
    module.triple = triple
    kinds = [ir.ArrayType(ir.IntType(64), count) for count in (4, 2, 3, 4, 2)]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), kinds), "tile")
    builder = ir.IRBuilder(function.append_basic_block())
    _build_tile(WORDS, store)(cpu_target.target_context, builder, None, [*function.args, None])
    builder.ret_void()
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    machine = target.create_target_machine(cpu="", features="")
    assert "cnt" in machine.emit_assembly(parsed)


small = st.integers(1, 3)


@st.composite
def layers(draw):
    channels, filters, kernel, size = draw(st.integers(1, 70)), draw(st.integers(1, 40)), draw(small), draw(small)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    x = torch.randn(draw(small), channels, kernel + size, kernel + draw(small), generator=generator)
    mask = torch.rand(filters, channels, kernel, kernel, generator=generator) < 0.5
    alpha, beta = torch.randint(-8, 8, (2, filters), generator=generator).float()
    return x, mask, alpha, beta, draw(small), draw(st.integers(0, 2))


def convolve(x, mask, alpha, beta, stride, padding):
    weight_bits = pack_signs(torch.where(mask, 1.0, -1.0))
    return packed_conv2d(
        pack_signs(x), weight_bits, alpha, beta, in_channels=x.shape[1], stride=stride, padding=padding
    )


@settings(max_examples=30, deadline=None)
@given(layers())
def test_the_opposite_image_gives_the_opposite_values(layer):
    x, *rest = layer
    x = torch.where(x == 0, 1.0, x)
    assert torch.equal(convolve(-x, *rest), -convolve(x, *rest))


@settings(max_examples=30, deadline=None)
@given(layers())
def test_the_two_values_may_change_places(layer):
    x, mask, alpha, beta, *steps = layer
    assert torch.equal(convolve(x, ~mask, beta, alpha, *steps), convolve(x, mask, alpha, beta, *steps))


@settings(max_examples=30, deadline=None)
@given(layers(), st.randoms(use_true_random=False))
def test_the_order_of_the_channels_does_not_matter(layer, order):
    x, mask, *rest = layer
    places = list(range(x.shape[1]))
    order.shuffle(places)
    assert torch.equal(convolve(x[:, places], mask[:, places], *rest), convolve(x, mask, *rest))


@settings(max_examples=30, deadline=None)
@given(layers())
def test_images_of_a_batch_do_not_meet(layer):
    x, *rest = layer
    alone = torch.cat([convolve(image[None], *rest) for image in x])
    assert torch.equal(convolve(x, *rest), alone)
