import pytest
import torch
from torch import Tensor, nn

from dabnn.agreement import Agreement, digest, first_difference, is_agreed
from dabnn.distributed import World
from dabnn.layers import BinaryConv2d

TWO = World(0, 2, torch.device("cpu"))


def code(seed: int = 0, shape: tuple[int, ...] = (5, 3, 3, 3)) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(shape, generator=generator) > 0.5, torch.rand(5, generator=generator), torch.zeros(5))


def agreement_of(seed: int) -> Agreement:
    """What watches a network that has taken one step."""
    torch.manual_seed(seed)
    net = nn.Sequential(BinaryConv2d(2, 4, 3, weight_quantizer="dab", binary_input=True))
    agreement = Agreement(net, TWO)
    net(torch.randn(2, 2, 8, 8))
    return agreement


def test_a_digest_repeats_and_tells_every_single_bit_apart() -> None:
    tensors = code()
    before = int(digest(tensors))
    assert before == int(digest(code()))
    seen = {before}
    for position in range(tensors[0].numel()):
        changed = tensors[0].clone()
        changed.view(-1)[position] ^= True
        seen.add(int(digest((changed, *tensors[1:]))))
    for position in range(5):
        changed = tensors[1].clone()
        changed[position] = torch.nextafter(changed[position], torch.tensor(2.0))
        seen.add(int(digest((tensors[0], changed, tensors[2]))))
    assert len(seen) == 1 + tensors[0].numel() + 5


def test_a_digest_tells_apart_what_swaps_places() -> None:
    long = torch.zeros(3 * 8192, dtype=torch.uint8)
    values = set()
    for position in range(0, len(long), 8):
        long.zero_()
        long[position] = 1
        values.add(int(digest([long])))
    assert len(values) == len(long) // 8
    assert int(digest([torch.tensor([0.0, 1.0])])) != int(digest([torch.tensor([1.0, 0.0])]))


def test_a_digest_sees_bit_patterns_not_numbers() -> None:
    assert int(digest([torch.tensor([0.0])])) != int(digest([torch.tensor([-0.0])]))


def test_a_digest_is_equal_in_any_memory_format() -> None:
    mask = code()[0]
    assert int(digest([mask])) == int(digest([mask.contiguous(memory_format=torch.channels_last)]))


def test_maxima_over_the_ranks_agree_only_where_all_digests_do() -> None:
    own, same, other = (agreement_of(seed) for seed in (0, 0, 1))
    assert is_agreed([max(pair) for pair in zip(own.values(), same.values(), strict=True)])
    assert not is_agreed([max(pair) for pair in zip(own.values(), other.values(), strict=True)])
    assert is_agreed(Agreement(nn.Sequential(), TWO).values())


@pytest.mark.parametrize(
    ("per_rank", "expected"),
    [
        ([[1, 2], [1, 3]], "layer b: other bits on rank 0 than on rank 1"),
        ([[1, 2], [4, 3]], "layer a: other bits on rank 0 than on rank 1"),
        ([[1, 2], [1, 2], [1, 9], [1, 2]], "layer b: other bits on rank 2 than on the other 3"),
        ([[7, 2], [1, 2], [1, 9], [5, 2], [1, 2]], "layer a: other bits on ranks 0, 3 than on the other 3"),
        ([[1, 2], [1, 2], [1, 3], [1, 4]], "layer b: other bits on ranks 0, 1 than on rank 2 than on rank 3"),
    ],
)
def test_the_first_layer_that_differs_is_named_with_the_ranks_in_the_minority(
    per_rank: list[list[int]], expected: str
) -> None:
    assert first_difference(["layer a", "layer b"], per_rank) == expected


def test_only_layers_with_binary_weights_are_watched_and_only_among_several_ranks() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), BinaryConv2d(4, 4, 3, weight_quantizer="dab", binary_input=True))
    assert not Agreement(net, World.current()).layers
    assert [(number, path) for number, path, _ in Agreement(net, TWO).layers] == [(2, "1")]


def test_the_bits_compared_are_those_of_the_last_step_until_the_epoch_ends() -> None:
    agreement = agreement_of(0)
    layer = agreement.layers[0][2]
    of_step = agreement.values()
    with torch.no_grad():
        layer.weight.view(-1)[7] *= -1
    assert agreement.values() == of_step
    agreement.settle()
    code = layer.code()
    assert agreement.values()[0] == int(digest([code.mask, code.alpha, code.beta]))
    assert agreement.values() != of_step
