"""The Triton versions of the DAB kernels, under the interpreter where there is no CUDA device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.dab import dab_threshold_reference
from kernels.dab_step import dab_step_backward_reference, dab_step_reference
from kernels.dab_warm import dab_threshold_warm_reference

SIZES = [1, 2, 31, 32, 33, 63, 100, 147, 300]
LAYOUTS = [
    ((3, 1, 1, 1), torch.contiguous_format),
    ((2, 5), torch.contiguous_format),
    ((3, 7, 3, 2), torch.contiguous_format),
    ((3, 7, 3, 2), torch.channels_last),
    ((1, 150, 1, 2), torch.contiguous_format),
]
CENTERS = ["none", "filter", "tap"]


def random_rows(num_filters, size, dtype=torch.float32):
    """Rows whose second one is constant and whose third one is full of ties, if there are so many."""
    generator = torch.Generator().manual_seed(size)
    rows = torch.randn(num_filters, size, generator=generator, dtype=dtype)
    rows[1:2] = 3.3
    rows[2:3] = torch.randint(-2, 3, rows[2:3].shape, generator=generator).to(dtype)
    return rows


def poisoned(count, like, device):
    return [torch.full((count,), torch.nan, dtype=like.dtype, device=device) for _ in range(3)]


def split(rows, device="cpu"):
    from kernels import dab_triton

    outputs = poisoned(len(rows), rows, device)
    dab_triton.launch(rows.to(device), *outputs)
    return [output.cpu() for output in outputs]


def assert_close(ours, reference, scale=1.0):
    """Equal but for the rounding of sums in another order: 64 units in the last place of the largest term."""
    tolerance = 64 * torch.finfo(reference.dtype).eps * scale
    torch.testing.assert_close(ours.cpu(), reference, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("size", SIZES)
def test_the_search_finds_the_threshold_and_values_of_the_reference(size, triton_device):
    rows = random_rows(4, size)
    for ours, reference in zip(split(rows, triton_device), dab_threshold_reference(rows), strict=True):
        assert torch.equal(ours, reference)


@pytest.mark.parametrize("size", [1, 33, 147])
def test_the_search_in_float64_differs_by_the_order_of_sums_alone(size, triton_device):
    rows = random_rows(3, size, torch.float64)
    (threshold, *values), (expected, *references) = split(rows, triton_device), dab_threshold_reference(rows)
    assert torch.equal(threshold, expected)
    for ours, reference in zip(values, references, strict=True):
        assert_close(ours, reference)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 12).flatmap(lambda n: st.lists(st.integers(-8, 8), min_size=n, max_size=n)))
def test_sums_that_are_exact_give_equal_bits_and_ties_the_fewest_ones(rows):
    weight = torch.tensor([rows]).float() / 4
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for ours, reference in zip(split(weight, device), dab_threshold_reference(weight), strict=True):
        assert torch.equal(ours, reference)


@pytest.mark.parametrize("kind", ["heavy tails", "flat", "tiny and huge", "far from zero"])
def test_the_search_finds_the_optimum_of_filters_that_are_hard_to_search(kind, triton_device):
    generator = np.random.default_rng(0)
    share = (np.arange(100) + 0.5) / 100
    values = {
        "heavy tails": generator.standard_t(2, 100),
        "flat": (1 - 2 * share) / (2 * np.sqrt(share * (1 - share))),  # every split is equally good
        "tiny and huge": 2.0 ** -generator.uniform(0, 100, 100),
        "far from zero": 1000 + generator.normal(size=100),
    }[kind]
    rows = torch.tensor(np.array([values])).float()
    (threshold, *found), (expected, *references) = split(rows, triton_device), dab_threshold_reference(rows)
    gains = [split_gain(rows.double(), edge) for edge in (threshold, expected)]
    assert gains[0] >= gains[1] * (1 - 1e-12)
    if kind != "flat":
        assert torch.equal(threshold, expected)
        assert all(torch.equal(*pair) for pair in zip(found, references, strict=True))


def split_gain(rows, threshold):
    is_upper = rows >= threshold.view(-1, 1)
    ones = is_upper.sum()
    between = rows[is_upper].sum() - ones * rows.mean()
    return between**2 / (ones * (rows.numel() - ones))


def test_a_full_stack_of_ranges_costs_no_result(triton_device, monkeypatch):
    import triton.language as tl

    from kernels import dab_triton

    monkeypatch.setattr(dab_triton, "NUM_SLOTS", tl.constexpr(1 if triton_device == "cpu" else 32))
    rows = torch.tensor(np.array([np.random.default_rng(0).standard_t(2, 100)])).float()
    for ours, reference in zip(split(rows, triton_device), dab_threshold_reference(rows), strict=True):
        assert torch.equal(ours, reference)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_filter_with_a_weight_that_is_not_finite_shows_it_and_no_other_does(bad, triton_device):
    rows = random_rows(4, 37)
    rows[1, 20] = bad
    start = torch.zeros(4)
    warm = poisoned(4, rows, triton_device)
    from kernels import dab_warm_triton

    dab_warm_triton.launch(rows.to(triton_device), start.to(triton_device), *warm)
    for _, alpha, beta in (split(rows, triton_device), warm):
        assert (torch.isfinite(alpha) & torch.isfinite(beta)).tolist() == [True, False, True, True]


def test_many_weights_are_searched_together(triton_device):
    from kernels import dab_triton

    weights = [random_rows(count, size) for count, size in [(3, 1), (2, 147), (1, 1400), (3, 64), (0, 5), (2, 7)]]
    mask = torch.ones(sum(weight.numel() for weight in weights), dtype=torch.bool, device=triton_device)
    outputs = poisoned(sum(map(len, weights)), mask.new_empty(0, dtype=torch.float32), triton_device)
    for _ in range(2):
        dab_triton.launch_many([weight.to(triton_device) for weight in weights], mask, *outputs)
    expected = [dab_threshold_reference(weight) for weight in weights if len(weight)]
    for ours, reference in zip(outputs, zip(*expected, strict=True), strict=True):
        assert torch.equal(ours.cpu(), torch.cat(reference))
    pairs = zip((weight for weight in weights if len(weight)), expected, strict=True)
    masks = [(weight >= parts[0].unsqueeze(1)).flatten() for weight, parts in pairs]
    assert torch.equal(mask.cpu(), torch.cat(masks))


@pytest.mark.parametrize("size", [1, 33, 147])
def test_the_warm_search_splits_like_the_reference(size, triton_device):
    from kernels import dab_warm_triton

    rows = random_rows(4, size)
    start = torch.tensor([0.1, 3.3, torch.nan, -100.0])
    outputs = poisoned(4, rows, triton_device)
    dab_warm_triton.launch(rows.to(triton_device), start.to(triton_device), *outputs)
    for ours, reference in zip(outputs, dab_threshold_warm_reference(rows, start), strict=True):
        assert_close(ours, reference)


@pytest.mark.parametrize("center", CENTERS)
@pytest.mark.parametrize(("shape", "memory_format"), LAYOUTS)
def test_a_training_step_gives_the_results_of_the_reference(shape, center, memory_format, triton_device):
    from kernels import dab_step_triton

    weight = random_rows(shape[0], int(np.prod(shape[1:]))).view(shape).to(memory_format=memory_format)
    reference = dab_step_reference(weight, center)
    outputs = [torch.full_like(part, torch.nan, device=triton_device) for part in reference]
    dab_step_triton.launch(weight.to(triton_device), center, *outputs)
    assert outputs[0].stride() == weight.stride()
    for ours, expected in zip(outputs, reference, strict=True):
        assert_close(ours, expected, scale=4)


@pytest.mark.parametrize("center", CENTERS)
@pytest.mark.parametrize(("shape", "memory_format"), LAYOUTS)
def test_the_gradient_of_a_training_step_is_that_of_the_reference(shape, center, memory_format, triton_device):
    from kernels import dab_step_triton

    generator = torch.Generator().manual_seed(0)
    real, grad = (torch.randn(shape, generator=generator).to(memory_format=memory_format) for _ in range(2))
    saved = [real, *dab_threshold_reference(real)]
    on_device = [tensor.to(triton_device) for tensor in (grad, *saved)]
    for width, is_about_threshold, has_means in [(0.7, False, False), (0.7, True, True), (torch.inf, False, True)]:
        to_weight = torch.full_like(real, torch.nan, device=triton_device)
        window = dab_step_triton.Window(width, is_about_threshold, has_means)
        dab_step_triton.launch_backward(*on_device, to_weight, center, window)
        expected = dab_step_backward_reference(grad, *saved, center, width, is_about_threshold, has_means)
        assert_close(to_weight, expected, scale=4)


def test_compiled_kernels_leave_room_for_five_warps_a_scheduler(tmp_path):
    """Compiled for compute capability 9.0, in a process of its own; 65536 registers make 21 warps of 96."""
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": str(here.parent.parent), "TRITON_INTERPRET": "0"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, here / "compile_only_dab.py"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    kernels = json.loads(result.stdout)
    assert len(kernels) == 5
    for each in kernels:
        assert each["registers"] <= 96
        assert each["stack_bytes"] <= 16
