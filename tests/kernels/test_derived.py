import gc

import torch

from kernels import derived as module
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
