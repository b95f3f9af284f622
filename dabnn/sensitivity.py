r"""What binarizing each layer of a trained network costs: errors of inputs and weights, and two figures of accuracy.

Input errors, with x a convolution's real input (before a sign, where it has one), C*H*W values a sample, and N samples,
each of which weighs the same:

- rmse = sqrt((1/N) sum_samples mean (sign(x) - x)^2)
- relative_rmse = sqrt(sum_samples mean (sign(x) - x)^2 / sum_samples mean x^2); None where all inputs are zero
- one_minus_square = (1/N) sum_samples mean (1 - clip(x, -1, 1)^2)
- negative_share = (1/N) sum_samples mean 1[x < 0]: 0 behind a ReLU, whose signs are all the same

The first three are the binarization losses of the reference code of Hybrid Binary Networks (arXiv 1804.03867), with
its accumulation repaired: that averaged over batches, so that a short last batch counted like a full one, and added up
over repeated calls. sign(0) = +1 here as everywhere.

Accuracy: one layer of a trained network is made real, or binary, and everything else stays as trained; only the BN
statistics are estimated again, in a few batches of training data, since they belong to the layer as it was. The
network itself gets its statistics the same way before it is compared. Nothing is trained, so the figures rank layers;
what training with a plan reaches is for a run to show. Leaves out fan-out (`jobs.sensitivity`) and choice of a plan
(`dabnn.planner`).
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn

from dabnn.data import Batch, load_manifest, open_stream
from dabnn.data.transforms import make_transform, normalization_for
from dabnn.errors import InvalidInputError
from dabnn.evaluate import count
from dabnn.gradients import sign
from dabnn.layers import BinaryConv2d, LayerOptions
from dabnn.models import ModelSpec, Network
from dabnn.plans import numbered_convs
from dabnn.quantizers import subtract_center
from dabnn.spec import DataSpec
from dabnn.splits import shard_cache

NUM_BN_BATCHES = 8


class LayerState(Enum):
    """What a layer can be made."""

    REAL = "real"
    BINARY_WEIGHTS = "binary_weights"
    BINARY = "binary"


@dataclass(frozen=True)
class InputError:
    """How badly a layer's inputs are told by their signs; formulas in the module's docstring."""

    rmse: float
    relative_rmse: float | None
    one_minus_square: float
    negative_share: float


@dataclass(frozen=True)
class Samples:
    """The images of a run that are measured on.

    Attributes:
        data: Where the run's samples come from.
        seed: Of their order and augmentation.
        num_images: Validation images: the first ones of a shuffled order.
    """

    data: DataSpec
    seed: int
    num_images: int

    def training(self, spec: ModelSpec) -> Iterator[Tensor]:
        """Yield the images of the first training batches, augmented as in training."""
        for batch in islice(self._batches(spec, "train"), NUM_BN_BATCHES):
            yield batch.images

    def validation(self, spec: ModelSpec) -> Iterator[Batch]:
        """Yield `num_images` validation images, or all there are, one crop each."""
        left = self.num_images
        for batch in self._batches(spec, "val"):
            kept = replace(batch, images=batch.images[:left], labels=batch.labels[:left], indices=batch.indices[:left])
            yield kept
            left -= len(kept.labels)
            if left <= 0:
                return

    def _batches(self, spec: ModelSpec, split: str) -> Iterator[Batch]:
        is_training, data = split == "train", self.data
        image = load_manifest(data.train).image
        mean, std = normalization_for(data.transform, image, spec.in_channels, data.mean, data.std)
        transform = make_transform(
            data.transform,
            input_size=spec.input_size,
            in_channels=spec.in_channels,
            mean=mean,
            std=std,
            training=is_training,
            augment=data.augment,
        )
        with open_stream(
            data.train if is_training else data.val,
            split,
            batch_size=data.batch_size if is_training else data.eval_batch_size,
            seed=self.seed,
            transform=transform,
            window=data.window,
            cache=shard_cache(data),
        ) as stream:
            yield from stream.epoch(0)


@dataclass(frozen=True)
class NetworkFigures:
    """A network as a whole.

    Attributes:
        num_images: Validation images measured on.
        hits: Images whose class has the highest logit, BN statistics as trained.
        hits_reestimated: The same with BN statistics estimated again, which layers are compared with.
        inputs: Number of each convolution -> errors of its inputs.
        weight_errors: Number of each convolution -> relative squared error of its weights as `weight_error` says.
    """

    num_images: int
    hits: int
    hits_reestimated: int
    inputs: dict[int, InputError]
    weight_errors: dict[int, float | None]


@dataclass(frozen=True)
class LayerFigures:
    """One convolution, as `dab sensitivity` shows it. Accuracies are differences of top-1 in points.

    Attributes:
        index: Its number.
        path: Its name inside the network.
        binary_weights: Whether its weights are binary in the run.
        binary_inputs: Whether its inputs are.
        input_rmse: First error of the inputs.
        input_relative_rmse: Second.
        input_one_minus_square: Third.
        weight_error: Relative squared error of the weights, binary or made so; None where they cannot be.
        gain_if_real: What the network gains with this layer made real; None where the layer is real.
        gain_if_real_inputs: The same with real inputs and binary weights; None unless both are binary.
        loss_if_binary: What the float twin loses with this layer made binary; None without a twin.
        loss_if_binary_weights: The same with binary weights and real inputs.
        input_negative_share: Share of the inputs below zero; None in figures of before it was measured.
    """

    index: int
    path: str
    binary_weights: bool
    binary_inputs: bool
    input_rmse: float
    input_relative_rmse: float | None
    input_one_minus_square: float
    weight_error: float | None
    gain_if_real: float | None
    gain_if_real_inputs: float | None
    loss_if_binary: float | None
    loss_if_binary_weights: float | None
    input_negative_share: float | None = None


def is_binary(net: nn.Module) -> bool:
    """Whether any convolution of the network has binary weights or inputs."""
    return any(any(binary_parts(conv)) for _, conv in numbered_convs(net).values())


def binary_parts(conv: nn.Conv2d) -> tuple[bool, bool]:
    """Return whether a convolution's weights, and whether its inputs, are binary."""
    if not isinstance(conv, BinaryConv2d):
        return False, False
    return conv.weight_quantizer is not None, conv.binary_input


def other_states(conv: nn.Conv2d) -> tuple[LayerState, ...]:
    """Return what a layer is measured as: less binary where it is binary, else both binary forms."""
    match binary_parts(conv):
        case (False, False):
            return LayerState.BINARY_WEIGHTS, LayerState.BINARY
        case (True, True):
            return LayerState.REAL, LayerState.BINARY_WEIGHTS
        case _:
            return (LayerState.REAL,)


@torch.no_grad()
def input_errors(net: nn.Module, images: Iterable[Tensor], device: torch.device) -> dict[int, InputError]:
    """Return the errors of the inputs of every convolution, by its number, over images (n, C, H, W)."""
    sums = {index: torch.zeros(5, dtype=torch.float64) for index in numbered_convs(net)}

    def add(index: int, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].float()
        square, excess = (sign(x) - x).square(), 1 - x.clamp(-1, 1).square()
        parts = (value.flatten(1).mean(1).sum().item() for value in (square, x.square(), excess, (x < 0).float()))
        sums[index] += torch.tensor([*parts, len(x)], dtype=torch.float64)

    with ExitStack() as hooks:
        for index, (_, conv) in numbered_convs(net).items():
            hooks.callback(conv.register_forward_pre_hook(partial(add, index)).remove)
        net.eval()
        for batch in images:
            net(batch.to(device))
    return {index: _input_error(*total.tolist()) for index, total in sums.items()}


def _input_error(square: float, power: float, excess: float, negative: float, num_samples: float) -> InputError:
    relative = (square / power) ** 0.5 if power > 0 else None
    return InputError((square / num_samples) ** 0.5, relative, excess / num_samples, negative / num_samples)


def weight_error(conv: nn.Conv2d, like: ModelSpec) -> float | None:
    """Return sum (c - dense)^2 / sum c^2 over all weights of a layer, c the (centred) weight that is quantized.

    Args:
        conv: The layer; real weights are quantized as those of `like` with binary inputs would be.
        like: The model whose quantizer, centre and options real weights take.

    Returns:
        The relative squared error: 0 for filters of two values, 1 where zeros would do as well; None where the layer
        cannot be quantized so, or all of c is zero.
    """
    layer: nn.Conv2d | None = conv
    if not binary_parts(conv)[0]:
        layer = _made_binary(conv, like, binary_input=True)
    if not isinstance(layer, BinaryConv2d):
        return None
    centered = subtract_center(layer.weight.detach(), layer.center)
    error, total = float(layer.code().error.sum()), float(centered.square().sum())
    return error / total if total > 0 else None


def _made_binary(conv: nn.Conv2d, like: ModelSpec, *, binary_input: bool) -> BinaryConv2d | None:
    """Return a layer with the parameters of `conv` and binary weights, or None where the layer refuses that."""
    options = LayerOptions(**like.options)
    try:
        return BinaryConv2d.from_conv(
            conv, weight_quantizer=like.weights, center=like.center, binary_input=binary_input, options=options
        )
    except InvalidInputError:
        return None


def with_layer(net: Network, index: int, state: LayerState, like: ModelSpec) -> Network | None:
    """Return a copy of a network with one layer in another state, everything else as trained.

    Args:
        net: The network.
        index: Number of the layer.
        state: What it becomes. Binary weights that stay binary keep their quantizer, centre and options.
        like: The model whose quantizer, centre and options a real layer takes.

    Returns:
        The copy, or None where the layer refuses the state, such as a centre that would make all its weights zero.
    """
    changed = copy.deepcopy(net)
    path, conv = numbered_convs(changed)[index]
    layer: nn.Conv2d | None
    if state is LayerState.REAL:
        layer = BinaryConv2d.from_conv(conv, weight_quantizer=None, center=None, binary_input=False)
    elif isinstance(conv, BinaryConv2d) and conv.weight_quantizer is not None:
        conv.binary_input = state is LayerState.BINARY
        layer = conv
    else:
        layer = _made_binary(conv, like, binary_input=state is LayerState.BINARY)
    if layer is None:
        return None
    changed.set_submodule(path, layer)
    return changed


@torch.no_grad()
def reestimate_batchnorm(net: nn.Module, batches: Iterable[Tensor], device: torch.device) -> None:
    """Replace, in place, the running statistics of BN by their plain mean over batches; leave evaluation mode set.

    Each BN normalises by the statistics of the batch meanwhile, as in training; dropout is off. Without batches or BN
    nothing changes.
    """
    net.eval()
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    started = False
    for batch in batches if norms else ():
        if not started:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # the mean over all batches, each weighing the same
                norm.train()
            started = True
        net(batch.to(device))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    net.eval()


def count_hits(net: Network, samples: Samples, device: torch.device) -> tuple[int, int]:
    """Return how many validation images a network gets right as it is, and how many images there are."""
    totals = count(net.eval(), samples.validation(net.spec), device)
    return int(totals.top1), int(totals.num_samples)


def measure_network(net: Network, samples: Samples, like: ModelSpec, device: torch.device) -> NetworkFigures:
    """Return what concerns a network as a whole; `net` itself is left as it was."""
    net = copy.deepcopy(net).to(device).eval()
    hits, num_images = count_hits(net, samples, device)
    images = (batch.images for batch in samples.validation(net.spec))
    inputs = input_errors(net, images, device)
    weights = {index: weight_error(conv, like) for index, (_, conv) in numbered_convs(net).items()}
    reestimate_batchnorm(net, samples.training(net.spec), device)
    hits_reestimated, _ = count_hits(net, samples, device)
    return NetworkFigures(num_images, hits, hits_reestimated, inputs, weights)


def measure_layer(
    net: Network, index: int, samples: Samples, like: ModelSpec, device: torch.device
) -> dict[LayerState, int | None]:
    """Return, for each other state of a layer, how many images the network gets right with the layer in that state.

    BN statistics are estimated again each time. `net` itself is left as it was.

    Args:
        net: The network, binary or float.
        index: Number of the layer.
        samples: The images.
        like: The model whose quantizer, centre and options a real layer takes when it is made binary.
        device: Where to compute.

    Returns:
        State -> hits; None where the layer refuses the state.
    """
    hits: dict[LayerState, int | None] = {}
    for state in other_states(numbered_convs(net)[index][1]):
        changed = with_layer(net, index, state, like)
        if changed is None:
            hits[state] = None
            continue
        changed.to(device)
        reestimate_batchnorm(changed, samples.training(net.spec), device)
        hits[state], _ = count_hits(changed, samples, device)
    return hits


Hits = Mapping[int, Mapping[LayerState, int | None]]


def layer_figures(
    net: Network, own: NetworkFigures, hits: Hits, twin: NetworkFigures | None, twin_hits: Hits
) -> list[LayerFigures]:
    """Return one row a convolution from all that was measured.

    Args:
        net: The run's network.
        own: Its figures.
        hits: Layer -> state -> hits in it; layers that were not measured are left out.
        twin: Figures of the float twin; the run's own where it is float; None where there is none.
        twin_hits: The same as `hits` in the float twin.
    """
    rows = []
    for index, (path, conv) in numbered_convs(net).items():
        parts, inputs = binary_parts(conv), own.inputs[index]
        gains = {state: _change(own, hit) for state, hit in hits.get(index, {}).items()}
        losses = {state: _change(twin, hit, direction=-1) for state, hit in twin_hits.get(index, {}).items()}
        rows.append(
            LayerFigures(
                index=index,
                path=path,
                binary_weights=parts[0],
                binary_inputs=parts[1],
                input_rmse=inputs.rmse,
                input_relative_rmse=inputs.relative_rmse,
                input_one_minus_square=inputs.one_minus_square,
                weight_error=own.weight_errors[index],
                gain_if_real=gains.get(LayerState.REAL),
                gain_if_real_inputs=gains.get(LayerState.BINARY_WEIGHTS) if all(parts) else None,
                loss_if_binary=losses.get(LayerState.BINARY),
                loss_if_binary_weights=losses.get(LayerState.BINARY_WEIGHTS),
                input_negative_share=inputs.negative_share,
            )
        )
    return rows


def _change(base: NetworkFigures | None, hits: int | None, *, direction: int = 1) -> float | None:
    """Return the change of top-1 in points, times `direction`."""
    if base is None or hits is None:
        return None
    return 100 * direction * (hits - base.hits_reestimated) / base.num_images
