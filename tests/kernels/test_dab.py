from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import dab_threshold, quantize_dab, quantize_dab_many
from kernels.dab import dab_threshold_reference, quantize_dab_reference

GOLDEN = sorted((Path(__file__).parent / "golden").glob("exact_*.npz"))
VERSIONS = [quantize_dab, quantize_dab_reference]


def best_error_of_all_subsets(weights):
    """Least squared error over all 2^n masks, in float64."""
    errors = []
    for mask in product([False, True], repeat=len(weights)):
        groups = [weights[np.array(mask)], weights[~np.array(mask)]]
        errors.append(sum(((group - group.mean()) ** 2).sum() for group in groups if len(group)))
    return min(errors)


def dense(mask, alpha, beta):
    shape = (-1,) + (1,) * (mask.dim() - 1)
    return torch.where(mask, alpha.view(shape), beta.view(shape))


@pytest.mark.parametrize("quantize", VERSIONS)
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
@pytest.mark.parametrize(("prefix", "weight_key"), [("", "clamped"), ("raw_", "W")])
def test_the_golden_optimum_is_found(quantize, path, prefix, weight_key):
    golden = np.load(path)
    mask, alpha, beta = quantize(torch.from_numpy(golden[weight_key]))
    assert mask.flatten(1).sum(1).tolist() == golden[prefix + "k"].tolist()
    assert np.array_equal(alpha.numpy(), golden[prefix + "alpha"].astype(np.float32))
    assert np.array_equal(beta.numpy(), golden[prefix + "beta"].astype(np.float32))


@pytest.mark.parametrize("quantize", VERSIONS)
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
@pytest.mark.parametrize(("prefix", "weight_key"), [("", "clamped"), ("raw_", "W")])
def test_the_golden_approximation_and_its_error_are_reached(quantize, path, prefix, weight_key):
    golden = np.load(path)
    weight = golden[weight_key].astype(np.float64)
    approximation = dense(*quantize(torch.from_numpy(weight))).numpy()
    np.testing.assert_allclose(approximation, golden[prefix + "binarized"], rtol=1e-12, atol=1e-15)
    sse = ((weight - approximation) ** 2).sum((1, 2, 3))
    np.testing.assert_allclose(sse, golden[prefix + "sse"], rtol=1e-12, atol=1e-15)
    rel_error = np.sqrt(sse) / np.linalg.norm(weight.reshape(len(weight), -1), axis=1)
    np.testing.assert_allclose(rel_error, golden[prefix + "rel_error"], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("threshold_of", [dab_threshold, dab_threshold_reference])
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
@pytest.mark.parametrize(("prefix", "weight_key"), [("", "clamped"), ("raw_", "W")])
def test_the_threshold_is_the_smallest_weight_of_the_golden_upper_group(threshold_of, path, prefix, weight_key):
    golden = np.load(path)
    threshold, *_ = threshold_of(torch.from_numpy(golden[weight_key]))
    assert np.array_equal(threshold.numpy(), golden[prefix + "threshold_hi"])
    assert (threshold.numpy() > golden[prefix + "threshold_lo"]).all()


def test_golden_files_are_there():
    assert len(GOLDEN) == 8


@pytest.mark.parametrize("quantize", VERSIONS)
@settings(max_examples=60, deadline=None)
@given(weights=st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=8))
def test_the_threshold_is_the_exact_optimum(quantize, weights):
    row = torch.tensor([weights])
    error = (row.double() - dense(*quantize(row.double()))).square().sum().item()
    assert error <= best_error_of_all_subsets(np.array(weights)) + 1e-12


@pytest.mark.parametrize("quantize", VERSIONS)
@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.lists(st.integers(-2, 2), min_size=6, max_size=6), min_size=1, max_size=5))
def test_equal_weights_are_never_split(quantize, rows):
    weight = torch.tensor(rows, dtype=torch.float32)
    mask, alpha, beta = quantize(weight)
    for row, is_upper in zip(weight, mask, strict=True):
        lower = row[~is_upper]
        assert is_upper.any()
        assert not lower.numel() or lower.max() < row[is_upper].min()
    assert (beta <= alpha).all()


@pytest.mark.parametrize("quantize", VERSIONS)
def test_equally_good_splits_take_the_fewest_ones(quantize):
    mask, alpha, beta = quantize(torch.tensor([[-3.0, 0.0, 3.0, 0.0]]))
    assert mask.tolist() == [[False, False, True, False]]
    assert (alpha.item(), beta.item()) == (3.0, -1.0)


@pytest.mark.parametrize("quantize", VERSIONS)
@pytest.mark.parametrize("size", [1, 2, 33])
@pytest.mark.parametrize("value", [0.0, -0.1, 3.3])
def test_a_constant_filter_is_all_true_with_its_mean(quantize, size, value):
    mask, alpha, beta = quantize(torch.full((2, size), value))
    assert mask.all()
    assert alpha.tolist() == beta.tolist() == [torch.tensor(value).item()] * 2


@pytest.mark.parametrize("quantize", VERSIONS)
def test_zeros_of_either_sign_are_equal_weights(quantize):
    mask, alpha, beta = quantize(torch.tensor([[0.0, -0.0, 0.0, -1.0]]))
    assert mask.tolist() == [[True, True, True, False]]
    assert (alpha.item(), beta.item()) == (0.0, -1.0)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (31, 3, 3, 3), (33, 63, 1, 1), (8, 100, 5, 5), (4, 7)])
def test_both_versions_decide_alike(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(shape[0]))
    for ours, reference in zip(quantize_dab(weight), quantize_dab_reference(weight), strict=True):
        assert torch.equal(ours, reference)


def test_a_large_mean_does_not_hide_the_split():
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask, *_ = quantize_dab(weight)
    assert torch.equal(quantize_dab(weight + 1e6)[0], mask)


def test_half_precision_weights_get_float32_values():
    weight = torch.randn(3, 8, 3, 3, generator=torch.Generator().manual_seed(0)).half()
    narrow, wide = quantize_dab(weight), quantize_dab(weight.float())
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(narrow, wide, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(bad):
    weight = torch.randn(3, 5)
    weight[1, 2] = bad
    with pytest.raises(ValueError, match="weight: holds NaN or infinite"):
        quantize_dab(weight)


def test_shapes_and_types_without_filters_are_refused():
    with pytest.raises(ValueError, match="weight: shape"):
        quantize_dab(torch.ones(3))
    with pytest.raises(ValueError, match="weight: shape"):
        quantize_dab(torch.ones(3, 0))
    with pytest.raises(TypeError, match=r"weight: torch\.int64"):
        quantize_dab(torch.ones(3, 3, dtype=torch.int64))


def test_many_weights_together_give_what_each_gives_alone():
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4, 3, 3), (5, 1), (2, 147), (1, 8, 1, 1)]
    weights = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
    weights[1] = weights[1].half()
    together = quantize_dab_many(weights)
    assert len(together) == len(weights)
    for weight, parts in zip(weights, together, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(parts, quantize_dab(weight), strict=True))
        assert parts[0].shape == weight.shape
    assert quantize_dab_many([]) == []


def test_a_wrong_weight_among_many_is_named():
    good = torch.randn(3, 5)
    with pytest.raises(ValueError, match=r"weights\[1\]: shape"):
        quantize_dab_many([good, torch.ones(3)])
    with pytest.raises(TypeError, match=r"weights\[1\]: torch\.int64"):
        quantize_dab_many([good, torch.ones(3, 3, dtype=torch.int64)])
    with pytest.raises(TypeError, match="weights: float64 and narrower"):
        quantize_dab_many([good, good.double()])
    with pytest.raises(ValueError, match="weights: on several devices"):
        quantize_dab_many([good, torch.empty(3, 5, device="meta")])
    with pytest.raises(ValueError, match="weights: holds NaN"):
        quantize_dab_many([good, torch.full((2, 2), torch.nan)])


def test_the_weight_itself_is_left_alone():
    weight = torch.randn(3, 5, requires_grad=True)
    before = weight.detach().clone()
    mask, alpha, beta = quantize_dab(weight)
    assert torch.equal(weight, before)
    assert not any(tensor.requires_grad for tensor in (mask, alpha, beta))


def test_the_operator_has_a_faithful_fake():
    operator = torch.ops.dab.dab_threshold.default
    torch.library.opcheck(operator, (torch.randn(3, 4, 3, 3),), test_utils=("test_schema", "test_faketensor"))
    many, weights = torch.ops.dab.dab_many.default, [torch.randn(3, 4, 3, 3), torch.randn(2, 7)]
    torch.library.opcheck(many, (weights,), test_utils=("test_schema", "test_faketensor"))
