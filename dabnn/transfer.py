"""Weights from a checkpoint into a network: the same network again, the next stage's, or another run's.

Networks of one architecture that differ in what is binary have the same tensors, but for those of the quantizers
themselves. `transfer` takes over everything else and refuses any other difference by the tensor's name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dabnn.checkpoints import load_state, stage_end
from dabnn.errors import InvalidInputError
from dabnn.layers import EXTRA_STATE, BinaryConv2d
from dabnn.models import ModelSpec, Network, build
from dabnn.plans import numbered_convs
from dabnn.run_folder import RunFolder

_STAGE = "stage:"


def load_trained(checkpoint: str | Path) -> Network:
    """Return the network of a checkpoint, in evaluation mode on the CPU.

    Raises:
        InvalidInputError: The file is missing or is no checkpoint.
    """
    state = load_state(checkpoint)
    net = build(**state["model"], seed=0)
    net.load_state_dict(state["net"])
    return net.eval()


def load_teacher(source: str, folder: RunFolder, stages: Sequence[str]) -> Network:
    """Return the network that a stage learns from.

    Args:
        source: A checkpoint, or `stage:NAME`.
        folder: The run's folder.
        stages: Names of the stages that are over.

    Raises:
        InvalidInputError: There is no such checkpoint or stage.
    """
    if not source.startswith(_STAGE):
        return load_trained(source)
    name = source.removeprefix(_STAGE)
    if name not in stages:
        raise InvalidInputError(f"train.distill.teacher: {source} is none of the earlier stages ({list(stages)}).")
    return load_trained(stage_end(folder, stages.index(name) + 1).path)


def transfer(state: Mapping[str, Any], net: Network, source: str) -> None:
    """Give `net` the weights and buffers of a network that may differ from it in its layer plan and quantizers.

    A quantizer's tensors that the source lacks are set by the layer for the new weights: learned alpha and beta and the
    start of a warm search at the optimum, a shift of the inputs at 0. Alpha, beta and start are set so, too, where the
    layer centres its weights otherwise than the source did: they are values of other numbers. Those that `net` lacks
    are left behind.

    Args:
        state: Of the source, as a checkpoint holds it: `net`, its state dictionary, and `model`, what it was built from
            (the arguments of `build`).
        net: Changed in place.
        source: What error messages start with: the field or file that the weights come from.

    Raises:
        InvalidInputError: The networks differ in anything else; names the first tensor.
    """
    check_transfer(state, net, source)
    own = net.state_dict()
    net.load_state_dict({name: tensor for name, tensor in state["net"].items() if name in own})
    for layer in _recentered(state["model"], net):
        layer.reset_code()


def check_transfer(state: Mapping[str, Any], net: Network, source: str) -> None:
    """Refuse what `transfer` refuses, without changing `net`, which may be on torch's device meta.

    Args:
        state: As for `transfer`.
        net: The network that would get the weights.
        source: As for `transfer`.

    Raises:
        InvalidInputError: As `transfer` does.
    """
    weights: Mapping[str, Tensor] = state["net"]
    own, paths = net.state_dict(), {path for path, _ in numbered_convs(net).values()}
    for name in [*own, *weights]:
        path, _, leaf = name.rpartition(".")
        if name in own and name in weights:
            if own[name].shape != weights[name].shape:
                theirs, ours = tuple(weights[name].shape), tuple(own[name].shape)
                raise _other_network(source, f"{name} is {theirs} there and {ours} in {net.spec.name}")
        elif path not in paths or leaf not in EXTRA_STATE:
            verb = "lacks" if name in own else "has"
            who = "needs" if name in own else "does not know"
            raise _other_network(source, f"it {verb} {name}, which {net.spec.name} {who}")


def check_same(saved: Mapping[str, Any], spec: ModelSpec, source: str) -> None:
    """Refuse to continue a checkpoint with another network than it was saved from.

    Args:
        saved: What the checkpoint says of its network.
        spec: The network that would go on.
        source: The checkpoint.

    Raises:
        InvalidInputError: Names the first difference.
    """
    wanted = asdict(spec)
    for key, value in saved.items():
        if _plain(value) != _plain(wanted.get(key)):
            raise InvalidInputError(
                f"{source}: was saved with {key}={_plain(value)}, the run now has {_plain(wanted.get(key))}. Resume "
                "with the configuration that the run began with, or start a new run with these weights: "
                "train.init_from."
            )


def check_teacher(teacher: ModelSpec, student: ModelSpec, source: str) -> None:
    """Refuse a teacher that answers another question than the student is asked.

    Args:
        teacher: Network of the teacher.
        student: Network that learns.
        source: Where the teacher comes from.

    Raises:
        InvalidInputError: It has another number of classes, or takes other images.
    """
    for key in ("num_classes", "in_channels", "input_size"):
        theirs, ours = getattr(teacher, key), getattr(student, key)
        if theirs != ours:
            raise InvalidInputError(
                f"train.distill.teacher: {source} has {key}={theirs}, the network that learns from it {ours}. Take a "
                "teacher that was trained on the same data at the same size."
            )


def _recentered(model: Mapping[str, Any], net: Network) -> list[BinaryConv2d]:
    """Return the binary layers of `net` that subtract another centre than the same layers of a model do."""
    with torch.device("meta"):  # the layers' defaults are all that is asked for
        source = _binary_layers(build(**model))
    return [
        layer for path, layer in _binary_layers(net).items() if path in source and layer.center != source[path].center
    ]


def _binary_layers(net: Network) -> dict[str, BinaryConv2d]:
    return {path: conv for path, conv in numbered_convs(net).values() if isinstance(conv, BinaryConv2d)}


def _other_network(source: str, difference: str) -> InvalidInputError:
    return InvalidInputError(
        f"{source}: holds another architecture: {difference}. Only what is binary, and how, may differ; use the same "
        "model.name, model.width, model.input_size, model.block and model.activation."
    )


def _plain(value: Any) -> Any:
    """Return what JSON would make of a value, so that tuples and lists compare as equal."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
