import pytest
import torch

from kernels import two_valued
from kernels.dense import two_valued_reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 31, 32, 33, 63, 100])
def test_both_versions_are_equal(size, dtype):
    generator = torch.Generator().manual_seed(size)
    weight = torch.randn(size, 3, 2, 2, generator=generator).to(dtype)
    threshold, alpha, beta = (torch.randn(size, generator=generator).to(dtype) for _ in range(3))
    threshold[0] = weight[0, 0, 0, 0]
    dense = two_valued(weight, threshold, alpha, beta)
    assert dense.dtype is dtype
    assert dense[0, 0, 0, 0] == alpha[0]
    assert torch.equal(dense, two_valued_reference(weight, threshold, alpha, beta))


def test_other_layouts_of_the_weight_give_the_same_values():
    weight = torch.randn(4, 6, 3, 3)
    scalars = [torch.tensor([0.0, 0.5, -0.5, torch.nan]), torch.arange(4.0), -torch.arange(1.0, 5.0)]
    found = two_valued(weight.to(memory_format=torch.channels_last), *scalars)
    assert found.is_contiguous()
    assert torch.equal(found, two_valued_reference(weight, *scalars))
    assert (found[3] == -4).all()


def test_the_operator_has_a_faithful_fake():
    operator = torch.ops.dab.two_valued.default
    arguments = (torch.randn(3, 4, 3, 3), torch.zeros(3), torch.ones(3), -torch.ones(3))
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
