import pytest
import torch
from torch import nn

from dabnn.errors import DabError, InvalidInputError
from dabnn.models import build
from dabnn.optim import make_optimizer, parameter_groups, set_learning_rate, take_step
from dabnn.spec import OptimSpec

NAMES = ["sgd", "adam", "adamw", "adagrad", "adamax", "adadelta"]


def small_net(**options: object) -> nn.Module:
    return build(
        "bincifarfbin", num_classes=3, in_channels=1, input_size=16, width=0.0625, seed=1,
        options={"input_quantizer": "rsign"}, activation="rprelu", weights="dab_learned", **options,
    )  # fmt: skip


def test_weight_decay_acts_on_weights_of_layers_and_on_nothing_else() -> None:
    net = small_net()
    names = {parameter: name for name, parameter in net.named_parameters()}
    decayed, others = parameter_groups(net, OptimSpec(weight_decay=0.1))
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert {names[parameter].rpartition(".")[0] for parameter in decayed["params"]} == {
        f"conv{index}" for index in range(1, 9)
    }
    assert all(names[parameter].endswith(".weight") for parameter in decayed["params"])
    left = {names[parameter].rpartition(".")[2] for parameter in others["params"]}
    assert {"alpha", "beta", "input_shift", "bias", "weight"} <= left, "weight of BatchNorm"
    assert len(decayed["params"]) + len(others["params"]) == len(names)


def test_decay_all_puts_every_parameter_into_one_group() -> None:
    net = small_net()
    (group,) = parameter_groups(net, OptimSpec(weight_decay=0.1, decay_all=True))
    assert len(group["params"]) == len(list(net.parameters()))


@pytest.mark.parametrize("name", NAMES)
def test_each_optimizer_moves_weights_against_the_gradient_and_continues_from_its_state(name: str) -> None:
    def run(steps: int, start: tuple[dict, dict] | None = None) -> tuple[dict, dict]:
        layer = nn.Linear(3, 1, bias=False)
        nn.init.ones_(layer.weight)
        optimizer = make_optimizer(layer, OptimSpec(name, weight_decay=0.01))
        if start is not None:
            layer.load_state_dict(start[0])
            optimizer.load_state_dict(start[1])
        for _ in range(steps):
            set_learning_rate(optimizer, 0.1)
            optimizer.zero_grad()
            (layer(torch.tensor([[1.0, 2.0, 3.0]])) ** 2).sum().backward()
            take_step(optimizer)
        return layer.state_dict(), optimizer.state_dict()

    whole = run(4)[0]["weight"]
    assert (whole < 1).all()
    assert torch.equal(run(2, run(2))[0]["weight"], whole)


def test_decay_alone_shrinks_a_convolution_and_leaves_batchnorm() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2))
    optimizer = make_optimizer(net, OptimSpec("sgd", weight_decay=0.5, momentum=0.0))
    set_learning_rate(optimizer, 0.1)
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    take_step(optimizer)
    after = dict(net.named_parameters())
    assert torch.allclose(after["0.weight"], 0.95 * before["0.weight"])
    assert torch.equal(after["1.weight"], before["1.weight"])


def test_a_step_beyond_the_range_of_float32_is_an_error_that_says_what_to_do() -> None:
    layer = nn.Linear(2, 1)
    optimizer = make_optimizer(layer, OptimSpec("adam"))
    set_learning_rate(optimizer, 1e38)
    layer(torch.ones(1, 2)).sum().backward()
    with pytest.raises(DabError, match=r"^optim\.max_lr: a step at the rate 1e\+38 is not finite"):
        take_step(optimizer)


def test_an_unknown_optimizer_is_refused_and_the_nearest_named() -> None:
    with pytest.raises(InvalidInputError, match="adadelta"):
        make_optimizer(nn.Linear(1, 1), OptimSpec("adadleta"))
