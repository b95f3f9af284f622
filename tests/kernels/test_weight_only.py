import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from kernels import pack_signs, packed_weight_conv2d, weight_only, weight_only_numba, weight_only_triton

SIZES = [1, 31, 32, 33, 63, 100]
# kernel, stride, padding, dilation, groups, image: square and not, steps that skip pixels, windows wholly in padding.
GEOMETRIES = [
    ((3, 3), (1, 1), (1, 1), (1, 1), 1, (5, 6)),
    ((1, 1), (1, 1), (0, 0), (1, 1), 1, (4, 3)),
    ((3, 2), (2, 1), (1, 2), (1, 2), 1, (7, 4)),
    ((2, 3), (3, 2), (4, 3), (2, 1), 2, (3, 3)),
    ((4, 4), (1, 1), (0, 0), (1, 1), 1, (4, 4)),
]
UNIT = 2.0**-24


def poisoned_rows(case):
    batch, _, height, width = expected_and_magnitude(case)[0].shape
    return torch.full((batch, height, width, len(case["weight_bits"])), float("nan"))


def arguments_of(case):
    return case["x"], case["weight_bits"], case["alpha"], case["beta"], case["bias"]


def conv_by_reference(case, device):
    return weight_only.packed_weight_conv2d_reference(*arguments_of(case), *case["steps"], case["groups"])


def conv_in_registers(case, device):
    out = poisoned_rows(case)
    steps = [number for pair in case["steps"] for number in pair]
    weight_only_numba.launch(*arguments_of(case), steps, case["groups"], out)
    return out.permute(0, 3, 1, 2)


def conv_by_dense_parts(case, device):
    out = poisoned_rows(case)
    scalars = (case["alpha"], case["beta"], case["bias"])
    weight_only._dense_cpu(case["x"], case["weight_bits"], scalars, case["steps"], case["groups"], out)
    return out.permute(0, 3, 1, 2)


def conv_by_triton(case, device):
    out = poisoned_rows(case).to(device)
    steps = [number for pair in case["steps"] for number in pair]
    tensors = [None if tensor is None else tensor.to(device) for tensor in arguments_of(case)]
    weight_only_triton.launch(*tensors, steps, case["groups"], out)
    return out.permute(0, 3, 1, 2).cpu()


ON_THE_CPU = [conv_by_reference, conv_in_registers, conv_by_dense_parts]
VERSIONS = [*ON_THE_CPU, conv_by_triton]


def random_case(channels, filters, geometry=GEOMETRIES[0], batch=2, share=0.4, has_bias=True):
    kernel, stride, padding, dilation, groups, image = geometry
    generator = torch.Generator().manual_seed(1000 * channels + filters)
    x = torch.randn(batch, channels * groups, *image, generator=generator)
    mask = torch.rand(filters * groups, channels, *kernel, generator=generator) < share
    alpha, beta, bias = torch.randn(3, filters * groups, generator=generator)
    return {
        "x": x,
        "mask": mask,
        "weight_bits": pack_signs(torch.where(mask, 1.0, -1.0)),
        "alpha": alpha,
        "beta": beta,
        "bias": bias if has_bias else None,
        "steps": (stride, padding, dilation),
        "groups": groups,
    }


def expected_and_magnitude(case):
    """The exact value, and the same sum over magnitudes, both in float64."""
    alpha, beta = (case[name].double().view(-1, 1, 1, 1) for name in ("alpha", "beta"))
    weight, x = torch.where(case["mask"], alpha, beta), case["x"].double()
    bias = None if case["bias"] is None else case["bias"].double()
    where = (*case["steps"], case["groups"])
    exact = F.conv2d(x, weight, bias, *where)
    return exact, F.conv2d(x.abs(), weight.abs(), None if bias is None else bias.abs(), *where)


def assert_within_the_bound(found, case, rounding=0.0):
    exact, magnitude = expected_and_magnitude(case)
    error = (case["mask"][0].numel() + 5) * UNIT
    bound = 3 * error / (1 - error) * magnitude * (1 + rounding) + rounding * exact.abs()
    difference = (found.double() - exact).abs()
    assert found.shape == exact.shape
    assert bool((difference <= bound).all()), float((difference / magnitude).max())


def call(case, **changes):
    stride, padding, dilation = case["steps"]
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": case["groups"]}
    return packed_weight_conv2d(*arguments_of(case), **{**options, **changes})


@pytest.mark.parametrize("conv", VERSIONS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("channels", [1, 33, 100])
def test_the_result_is_as_near_to_the_exact_one_as_rounding_allows(conv, geometry, channels, triton_device):
    case = random_case(channels, 5, geometry)
    assert_within_the_bound(conv(case, triton_device), case)


@pytest.mark.parametrize("conv", ON_THE_CPU)
@pytest.mark.parametrize("channels", SIZES)
@pytest.mark.parametrize("filters", [1, 15, 16, 17, 32, 33, 48, 65, 130])
def test_any_number_of_channels_and_filters_is_covered(conv, channels, filters):
    case = random_case(channels, filters, has_bias=channels % 2 == 0)
    assert_within_the_bound(conv(case, "cpu"), case)


@pytest.mark.parametrize("filters", [17, 65])
def test_blocks_of_filters_that_are_not_full_are_covered_by_triton(filters, triton_device):
    case = random_case(40, filters, GEOMETRIES[1], has_bias=False)
    assert_within_the_bound(conv_by_triton(case, triton_device), case)


@pytest.mark.parametrize("windows", [*range(1, 17), 23])
def test_any_number_of_windows_is_covered(windows):
    case = random_case(20, 70, ((1, 1), (1, 1), (0, 0), (1, 1), 1, (1, windows)), batch=1)
    assert_within_the_bound(conv_in_registers(case, "cpu"), case)


@pytest.mark.parametrize("conv", VERSIONS)
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_filters_of_one_value_are_covered(conv, share, triton_device):
    case = random_case(20, 5, share=share)
    assert_within_the_bound(conv(case, triton_device), case)
    case["beta"] = case["alpha"].clone()
    assert_within_the_bound(conv(case, triton_device), case)


@pytest.mark.parametrize("conv", VERSIONS)
@pytest.mark.parametrize(("alpha", "beta"), [(1e-9, 1.0), (1.0, 1e-9), (0.0, -3.0), (-2.0, 0.0)])
def test_a_tiny_value_keeps_its_precision_beside_a_large_one(conv, alpha, beta, triton_device):
    case = random_case(9, 4, GEOMETRIES[1], has_bias=False)
    case["alpha"], case["beta"] = torch.full((4,), alpha), torch.full((4,), beta)
    # The inputs at the large value are nearly zero, so that the sum over all inputs would drown the result.
    case["x"] = case["x"].abs()
    case["mask"][:] = torch.arange(9).view(1, 9, 1, 1) < (4 if abs(alpha) > abs(beta) else 5)
    case["weight_bits"] = pack_signs(torch.where(case["mask"], 1.0, -1.0))
    large = case["mask"][0, :, 0, 0] if abs(alpha) > abs(beta) else ~case["mask"][0, :, 0, 0]
    case["x"][:, large] *= 1e-12
    assert_within_the_bound(conv(case, triton_device), case)


@pytest.mark.parametrize("conv", VERSIONS)
@pytest.mark.parametrize("channels", [1, 31, 33])
def test_bits_beyond_the_last_channel_do_not_count(conv, channels, triton_device):
    case = random_case(channels, 3)
    clean = conv(case, triton_device)
    case["weight_bits"] = case["weight_bits"].clone()
    case["weight_bits"][..., -1] |= torch.full((1,), -1, dtype=torch.int32) << (channels % 32)
    assert torch.equal(clean, conv(case, triton_device))


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_any_geometry_stays_within_the_bound(data):
    pairs = st.tuples(st.integers(1, 4), st.integers(1, 4))
    kernel, stride, dilation = data.draw(pairs), data.draw(pairs), data.draw(pairs)
    padding = data.draw(st.tuples(st.integers(0, 4), st.integers(0, 4)))
    image = tuple(
        data.draw(st.integers(max(1, d * (k - 1) + 1 - 2 * p), 14))
        for k, p, d in zip(kernel, padding, dilation, strict=True)
    )
    groups, filters = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 40))
    case = random_case(data.draw(st.integers(1, 70)), filters, (kernel, stride, padding, dilation, groups, image))
    assert_within_the_bound(call(case), case)
    assert_within_the_bound(conv_in_registers(case, "cpu"), case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_are_rounded_once(dtype):
    case = random_case(33, 20)
    case["x"] = case["x"].to(dtype)
    found = call(case)
    assert found.dtype == dtype
    assert_within_the_bound(found, case, torch.finfo(dtype).eps / 2)


def test_float64_inputs_are_convolved_in_float64():
    case = random_case(33, 20)
    case["x"] = case["x"].double()
    exact, magnitude = expected_and_magnitude(case)
    assert bool(((call(case) - exact).abs() <= 1e-13 * magnitude).all())


@pytest.mark.parametrize("conv", VERSIONS)
def test_inputs_may_lie_in_any_order(conv, triton_device):
    case = random_case(33, 20)
    plain = conv(case, triton_device)
    x = case["x"]
    orders = [
        x.contiguous(memory_format=torch.channels_last),
        x.transpose(2, 3).contiguous().transpose(2, 3),
        torch.cat([x, x], 1)[:, : x.shape[1]],
    ]
    for order in orders:
        assert_within_the_bound(conv({**case, "x": order}, triton_device), case)
    assert torch.equal(conv_in_registers({**case, "x": orders[0]}, "cpu"), conv_in_registers(case, "cpu"))
    assert plain.shape == (2, 20, 5, 6)


def test_a_matrix_is_a_linear_layer():
    case = random_case(100, 33, ((1, 1), (1, 1), (0, 0), (1, 1), 1, (1, 1)), batch=3)
    found = packed_weight_conv2d(case["x"].flatten(1), *arguments_of(case)[1:])
    assert found.shape == (3, 33)
    assert_within_the_bound(found[..., None, None], case)


def test_an_image_has_the_same_bits_alone_and_in_a_batch():
    case = random_case(40, 70, GEOMETRIES[4], batch=9)
    together = conv_in_registers(case, "cpu")
    for index in range(9):
        alone = conv_in_registers({**case, "x": case["x"][index : index + 1]}, "cpu")
        assert torch.equal(alone[0], together[index])


@pytest.mark.parametrize("geometry", [((3, 3), (1, 1), (1, 1), (1, 1), 1, (40, 41)), GEOMETRIES[4]])
def test_threads_give_the_same_bits(geometry):
    case = random_case(600 if geometry is GEOMETRIES[4] else 96, 520 if geometry is GEOMETRIES[4] else 64, geometry)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(conv_in_registers(case, "cpu"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert_within_the_bound(results[0], case)


def test_changed_weights_are_seen_at_once():
    case = random_case(8, 9)
    before = call(case)
    case["alpha"].mul_(2)
    case["weight_bits"].zero_()
    case["mask"].zero_()
    assert not torch.equal(call(case), before)
    assert_within_the_bound(call(case), case)


def test_an_empty_batch_gives_an_empty_result():
    case = random_case(20, 9)
    case["x"] = case["x"][:0]
    assert call(case).shape == (0, 9, 5, 6)


def test_scalars_that_ask_for_a_gradient_are_taken():
    case = random_case(8, 9)
    case["alpha"].requires_grad_()
    case["x"].requires_grad_()
    assert not call(case).requires_grad


def test_sums_in_registers_are_for_avx512_and_few_windows():
    assert weight_only.sums_in_registers("avx512", 49, 64)
    assert weight_only.sums_in_registers("avx2", 1, 4096)
    assert not weight_only.sums_in_registers("avx2", 49, 64)
    assert not weight_only.sums_in_registers("avx512", 49, 1)


def test_dense_filters_are_made_in_parts(monkeypatch):
    case = random_case(33, 20)
    whole = conv_by_dense_parts(case, "cpu")
    monkeypatch.setattr(weight_only, "_DENSE_WEIGHTS", 3 * 33 * 9)
    parts = conv_by_dense_parts(case, "cpu")
    assert_within_the_bound(parts, case)
    assert_within_the_bound(whole, case)


@pytest.mark.parametrize("is_float32", [True, False])
@pytest.mark.parametrize("num_filters", [1, 16, 64, 512])
@pytest.mark.parametrize("num_windows", [1, 49, 3136 * 128])
def test_blocks_are_powers_of_two_that_a_product_takes(num_windows, num_filters, is_float32):
    found = weight_only_triton.blocks(num_windows, num_filters, 2, is_float32)
    assert all(number & (number - 1) == 0 for number in found)
    assert min(found[0], found[1]) >= 16


def changed(**changes):
    arguments = {
        "x": torch.zeros(1, 40, 4, 4),
        "weight_bits": torch.zeros(3, 3, 3, 2, dtype=torch.int32),
        "alpha": torch.ones(3),
        "beta": torch.ones(3),
        "padding": 1,
    }
    return packed_weight_conv2d(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(1, 40, 4, 4, dtype=torch.int32)}, TypeError, "x: torch.int32"),
        ({"x": torch.zeros(40, 4, 4)}, ValueError, "x: shape"),
        ({"weight_bits": torch.zeros(3, 3, 3, 2)}, TypeError, "weight_bits: torch.float32"),
        ({"weight_bits": torch.zeros(3, 3, 2, dtype=torch.int32)}, ValueError, "weight_bits: shape"),
        ({"weight_bits": torch.zeros(3, 3, 3, 1, dtype=torch.int32)}, ValueError, "weight_bits: 1 words a tap"),
        ({"weight_bits": torch.zeros(3, 9, 3, 2, dtype=torch.int32)}, ValueError, "does not fit"),
        ({"weight_bits": torch.zeros(3, 3, 3, 2, dtype=torch.int32, device="meta")}, ValueError, "weight_bits: on"),
        ({"alpha": torch.ones(2)}, ValueError, r"alpha: shape \(2,\) for 3 filters"),
        ({"beta": torch.ones(3, dtype=torch.float64)}, TypeError, "beta: torch.float64"),
        ({"bias": torch.ones(3, device="meta")}, ValueError, "bias: on meta"),
        ({"stride": 0}, ValueError, "stride:"),
        ({"padding": (1, -1)}, ValueError, "padding"),
        ({"dilation": (0, 1)}, ValueError, "dilation"),
        ({"groups": 2}, ValueError, "groups: 2 for 40 channels and 3 filters"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes, error, message):
    with pytest.raises(error, match=message):
        changed(**changes)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_operator_has_a_faithful_fake(groups):
    case = random_case(40, 4, ((3, 2), (2, 1), (1, 0), (1, 2), groups, (8, 7)))
    operator = torch.ops.dab.packed_weight_conv2d.default
    arguments = (*arguments_of(case), *case["steps"], case["groups"])
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_compiled_kernels_keep_their_sums_in_registers(tmp_path):
    """Compiled for compute capability 9.0, in a process of its own."""
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": str(here.parent.parent), "TRITON_INTERPRET": "0"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, here / "compile_only_weight.py"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    kernels = json.loads(result.stdout)
    assert len(kernels) == 2
    assert all(each["stack_bytes"] <= 64 for each in kernels)
