from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dabnn.data import Batch
from dabnn.diagnose import (
    Place,
    first_not_finite,
    not_finite_gradient,
    not_finite_parameter,
    save_state,
    witness,
)
from dabnn.layers import BinaryConv2d
from dabnn.sync_batchnorm import SyncBatchNorm2d

IMAGES = torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(0))


class Residual(nn.Module):
    """A sum that no module computes, and then a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.after = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(x * 1e30 + self.inner(x) * 3e38 * 3e38)


def network(*more: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    body = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), BinaryConv2d(4, 4, 3, weight_quantizer="dab", binary_input=True)]
    return nn.Sequential(*body, *more, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def look(net: nn.Module, images: Tensor = IMAGES) -> str:
    return first_not_finite(net, lambda copied: copied(images).square().mean())


def test_the_first_layer_whose_output_is_not_finite_is_named() -> None:
    net = network()
    with torch.no_grad():
        net[1].weight.fill_(3e38)
        net[1].bias.fill_(3e38)
    assert look(net).startswith("1: its output holds ")
    assert "of 256 values" in look(net)


def test_layers_are_numbered_as_everywhere() -> None:
    net = network()
    with torch.no_grad():
        net[0].bias[0] = 3e38
        net[0].weight[0] = 3e38
    assert look(net).startswith("layer 1 (0): its output holds ")


def test_a_parameter_that_is_not_finite_is_named_before_what_it_spoils() -> None:
    net = network()
    with torch.no_grad():
        net[2].weight[1, 2] = torch.nan
        net[2].weight[0, 0, 0, 0] = torch.inf
    expected = "layer 2 (2): its weight holds 9 NaN and 1 infinite of 144 values"
    assert look(net) == expected
    assert not_finite_parameter(net) == expected
    assert not_finite_parameter(network()) == ""


def test_images_that_are_not_finite_are_the_input_of_the_first_layer() -> None:
    images = IMAGES.clone()
    images[2, 0, 3, 3] = torch.nan
    assert look(network(), images) == "layer 1 (0): its input holds 1 NaN of 144 values"


def test_a_sum_between_layers_is_the_input_of_the_next() -> None:
    assert look(network(Residual())).startswith("3.after: its input holds ")


def test_finite_weights_whose_code_is_not_are_told_by_their_layer() -> None:
    net = network()
    with torch.no_grad():
        net[2].weight.fill_(3e38)
        net[2].weight[:, 0] *= -1
    assert look(net).startswith("layer 2 (2): ")


def test_a_loss_of_finite_logits_is_told_as_such() -> None:
    found = first_not_finite(network(), lambda copied: copied(IMAGES).square().sum() * torch.inf)
    assert found == "every layer is finite, the loss of their output is inf"


def test_nothing_is_found_in_a_finite_step() -> None:
    assert look(network()) == ""
    assert not_finite_gradient(network()) == ""


def test_the_gradient_nearest_to_the_loss_is_named() -> None:
    net = network()
    net(IMAGES).square().mean().backward()
    net[0].weight.grad[0, 0, 0, 0] = torch.nan
    net[2].weight.grad[1] = torch.inf
    assert not_finite_gradient(net) == "layer 2 (2): its weight's gradient holds 36 infinite of 144 values"


def test_the_sign_swallows_a_value_that_is_not_a_number_but_its_step_is_found() -> None:
    """Why the loss alone does not tell that a step is not finite."""
    net, images = network(), IMAGES.clone()
    images[0, 0, 2, 2] = torch.nan
    loss = net(images).square().mean()
    loss.backward()
    assert bool(loss.isfinite())
    assert not_finite_gradient(net) == "1: its weight's gradient holds 4 NaN of 4 values"
    assert look(net, images) == "layer 1 (0): its input holds 1 NaN of 144 values"


@pytest.mark.parametrize(
    ("findings", "rank"),
    [([None, "", "layer 1"], 2), ([None, "", ""], 1), (["a", "b"], 0), ([None, None], -1)],
)
def test_the_rank_that_found_something_tells_it(findings: list[str | None], rank: int) -> None:
    assert witness(findings) == rank


def test_the_network_is_left_as_it_is() -> None:
    net = network(nn.Dropout(0.5)).train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    look(net)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


@pytest.mark.parametrize("convert", [nn.SyncBatchNorm.convert_sync_batchnorm, SyncBatchNorm2d.of])
def test_synchronised_batch_norm_is_computed_alone(convert: Callable[[nn.Module], nn.Module]) -> None:
    net = network()
    net[1] = convert(net[1])  # either would ask a process group that is not there
    with torch.no_grad():
        net[2].weight[0, 0, 0, 0] = torch.nan
    assert look(net).startswith("layer 2 (2): its weight holds 1 NaN")
    assert type(net[1]) is not nn.BatchNorm2d


def test_the_saved_step_can_be_computed_again_without_running_code_of_the_file(tmp_path: Path) -> None:
    net = network()
    optimizer = torch.optim.Adam(net.parameters())
    net(IMAGES).square().mean().backward()
    optimizer.step()
    batch = Batch(IMAGES, torch.tensor([0, 1, 2, 3]), torch.tensor([9, 8, 7, 6]), 8)
    place = Place(rank=1, epoch=2, step=7, seed=3)
    path = tmp_path / "inspect" / place.file_name
    save_state(path, net, optimizer, batch, place)
    state = torch.load(path, weights_only=True)
    again = network()
    again.load_state_dict(state["net"])
    assert torch.equal(again.eval()(state["images"]), net.eval()(IMAGES))
    assert state["indices"].tolist() == [9, 8, 7, 6]
    assert (state["rank"], state["epoch"], state["step"], state["seed"], state["global_size"]) == (1, 2, 7, 3, 8)
    assert state["optimizer"]["state"][0]["step"] == 1
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("what", ["running_var", "running_mean"])
def test_a_buffer_that_is_not_finite_is_found_by_name(what: str) -> None:
    net = network()
    getattr(net[1], what)[0] = torch.inf
    assert not_finite_parameter(net) == f"1: its {what} holds 1 infinite of 4 values"
