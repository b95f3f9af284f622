import gc

import torch

from kernels import derived as module
from kernels import pack_signs, packed_conv2d
from kernels.derived import derived


def test_a_result_is_kept_until_its_tensor_is_written():
    x, made = torch.zeros(2), []

    def make():
        made.append(1)
        return len(made)

    assert [derived("test", [x], 0, make), derived("test", [x], 0, make)] == [1, 1]
    x.add_(1)
    assert derived("test", [x], 0, make) == 2
    assert derived("test", [x], 1, make) == 3


def test_a_result_goes_with_its_tensor():
    x = torch.zeros(2)
    before = len(module._entries)
    derived("test", [x], 0, lambda: 1)
    assert len(module._entries) == before + 1
    del x
    gc.collect()
    assert len(module._entries) == before


def test_nothing_is_kept_of_tensors_that_count_no_writes():
    with torch.inference_mode():
        x = torch.zeros(2)
    results = iter([1, 2])
    assert [derived("test", [x], 0, lambda: next(results)) for _ in range(2)] == [1, 2]


def test_values_in_another_place_are_new_values():
    x = torch.nn.Parameter(torch.full((4096,), 1.1))
    results = iter(range(9))
    layer = torch.nn.Module()
    layer.x = x
    assert derived("test", [x], 0, lambda: next(results)) == 0
    x.data = torch.zeros(4096)
    assert derived("test", [x], 0, lambda: next(results)) == 1
    layer.half()
    layer.float()
    assert derived("test", [x], 0, lambda: next(results)) == 2
    assert derived("test", [x], 0, lambda: next(results)) == 2


def test_results_of_the_last_keys_are_kept():
    x, made = torch.zeros(2), []
    for key in [*range(module.MAX_KEYS + 1), 1, 0]:
        derived("test", [x], key, lambda key=key: made.append(key))
    assert made == [*range(module.MAX_KEYS + 1), 0]


def test_images_of_many_sizes_share_the_arranged_filters():
    weight_bits, alpha, beta = pack_signs(torch.randn(64, 64, 3, 3)), *torch.randn(2, 64)
    for size in range(5, 12):
        packed_conv2d(pack_signs(torch.randn(1, 64, size, size)), weight_bits, alpha, beta, in_channels=64)
    made = module._entries[("conv_numba_filters", id(weight_bits), id(alpha), id(beta))].made
    assert len(made) == 1
