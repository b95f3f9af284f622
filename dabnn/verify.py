"""Whether a packed model does what the trained network does: layer by layer on the same inputs, and end to end.

A layer must agree up to rounding. Each of its outputs is a sum of m products plus a bias; floating-point arithmetic
in whatever order errs by at most g(m) * (sum of the magnitudes), g(m) = m * u / (1 - m * u), u = 2**-24 (Higham,
Accuracy and Stability of Numerical Algorithms, section 3.1). Two evaluations differ by at most twice that; both
rounding alike, as they do on one machine, the difference is zero. Where the file rounds its values to float16, each
of them may err by 2**-11 of itself, or 2**-25 near zero, and the output by the sum of these.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dabnn.activations import input_code
from dabnn.errors import InvalidInputError
from dabnn.layers import BinaryConv2d
from dabnn.models import Network
from dabnn.packed import PackedModel, binary_layers
from dabnn.packed_file import encode_mask
from dabnn.packed_weight_conv import PackedWeightConv2d

MIN_SAME_ARGMAX = 0.995
MAX_TOP1_DIFFERENCE = 0.2
_UNIT = 2.0**-24
# alpha - beta, two products and a sum, and the bias: the epilogue after two exact integer sums.
_EPILOGUE_OPS = 5
# What binary weights that stay bits beside real inputs may err by, in parts of what a dense convolution may, and their
# epilogue (`kernels.weight_only`); sums in the tensor cores of a GPU are rounded to two bits less.
_BITS_ERROR, _BITS_ERROR_CUDA, _BITS_OPS = 3, 12, 5
# A product with the scale of the inputs, one with their offset, and the sum.
_SCALED_INPUT_OPS = 3


class Labelled(Protocol):
    """A batch of images (n, C, H, W) with their labels (n,), such as `dabnn.data.Batch`."""

    @property
    def images(self) -> Tensor:
        """Normalized images."""

    @property
    def labels(self) -> Tensor:
        """Class numbers."""


@dataclass(frozen=True)
class Verification:
    """How a packed model compares with its network over some images.

    Attributes:
        num_samples: Images compared.
        same_argmax: Share of the images with the same highest logit in both.
        flipped_signs: Inputs of layers with binary inputs whose sign differs between the two, each network running on
            its own; images, layers and positions added up.
        max_abs_logit_diff: Largest difference of a logit.
        top1_float_path: Top-1 of the trained network in percent.
        top1_packed: Top-1 of the packed model in percent.
        layers_equal: Whether every binary layer has the same mask and, fed with the trained network's own inputs, the
            same output up to rounding.
        max_layer_diff: Largest difference of such an output; 0 where both round alike.
        problems: What is wrong, a sentence each; empty where the packed model may be used.
    """

    num_samples: int
    same_argmax: float
    flipped_signs: int
    max_abs_logit_diff: float
    top1_float_path: float
    top1_packed: float
    layers_equal: bool
    max_layer_diff: float
    problems: tuple[str, ...]


@dataclass
class _Tally:
    """Sums over the batches; `wrong_layers` maps a layer's path to what is wrong with it."""

    num_samples: int = 0
    same_argmax: int = 0
    flipped_signs: int = 0
    hits: int = 0
    hits_packed: int = 0
    max_logit_diff: float = 0.0
    max_layer_diff: float = 0.0
    wrong_layers: dict[str, str] = field(default_factory=dict)

    def add_logits(self, logits: Tensor, logits_packed: Tensor, labels: Tensor) -> None:
        best, best_packed = logits.argmax(1), logits_packed.argmax(1)
        self.num_samples += len(labels)
        self.same_argmax += int((best == best_packed).sum())
        self.hits += int((best == labels).sum())
        self.hits_packed += int((best_packed == labels).sum())
        self.max_logit_diff = _larger(self.max_logit_diff, (logits - logits_packed).abs())

    def add_layer(self, path: str, difference: Tensor, bound: Tensor) -> None:
        self.max_layer_diff = _larger(self.max_layer_diff, difference)
        # Not `difference > bound`: a NaN must count as wrong.
        if not bool((difference <= bound).all()):
            excess = (
                f"differs by {_larger(0.0, difference):.3g} where rounding explains {float(bound.max()):.3g} at most"
            )
            self.wrong_layers[path] = f"{path}: the packed layer {excess}."


@torch.inference_mode()
def verify(net: Network, packed: PackedModel, batches: Iterable[Labelled]) -> Verification:
    """Compares a packed model with the network that it was packed from.

    Both run on the device of the network's parameters; the packed network is moved there. The network is compared in
    evaluation mode and given back in the mode it had.

    Args:
        net: The trained network.
        packed: From `pack(net)`, or loaded from its file.
        batches: Validation images with their labels.

    Returns:
        The figures, and the problems that forbid use of the packed model.

    Raises:
        InvalidInputError: There is not one image, or the two networks are of different architectures.
    """
    if packed.spec != net.spec:
        raise InvalidInputError(
            f"packed: a {packed.spec}, to be compared with a {net.spec}. Give the network it came from."
        )
    device = next(net.parameters()).device
    packed.net.to(device)
    was_training = net.training
    net.eval()
    running = packed.running()
    tally = _Tally(wrong_layers=_wrong_masks(net, packed))
    try:
        with _comparing_layers(net, packed, tally):
            for batch in batches:
                images = batch.images.to(device, memory_format=torch.channels_last)  # as the packed model runs
                logits = net(images)
                packed.net(images)  # as it is before fusion, which gives the same bits: its layers can be looked at
                tally.add_logits(logits, running(images), batch.labels.to(device))
    finally:
        net.train(was_training)
    if not tally.num_samples:
        raise InvalidInputError("data.val: not one image to compare the packed model on. Give a split with images.")
    return _conclude(tally)


def _conclude(tally: _Tally) -> Verification:
    same = tally.same_argmax / tally.num_samples
    top1, top1_packed = (100 * hits / tally.num_samples for hits in (tally.hits, tally.hits_packed))
    problems = list(tally.wrong_layers.values())
    if same < MIN_SAME_ARGMAX:
        problems.append(f"same_argmax: {same:.2%} of the images keep their class; {MIN_SAME_ARGMAX:.1%} must.")
    if abs(top1 - top1_packed) > MAX_TOP1_DIFFERENCE:
        problems.append(
            f"top1_packed: {top1_packed:.2f} % against {top1:.2f} % of the network; "
            f"they may differ by {MAX_TOP1_DIFFERENCE} points."
        )
    if tally.max_logit_diff == float("inf"):
        problems.append("max_abs_logit_diff: a logit is NaN or infinite in one of the two.")
    return Verification(
        num_samples=tally.num_samples,
        same_argmax=same,
        flipped_signs=tally.flipped_signs,
        max_abs_logit_diff=tally.max_logit_diff,
        top1_float_path=top1,
        top1_packed=top1_packed,
        layers_equal=not tally.wrong_layers,
        max_layer_diff=tally.max_layer_diff,
        problems=tuple(problems),
    )


def _wrong_masks(net: Network, packed: PackedModel) -> dict[str, str]:
    """Return a sentence for every layer whose stored bits are not the mask of its current weights."""
    wrong = {}
    for path, layer in binary_layers(net).items():
        if not torch.equal(packed.tensors[f"{path}.weight_bits"], encode_mask(layer.code().mask)):
            wrong[path] = f"{path}: the packed bits are not the mask of the network's weights."
    return wrong


@contextmanager
def _comparing_layers(net: Network, packed: PackedModel, tally: _Tally) -> Iterator[None]:
    """While open, every pass of `net`, then of `packed`, adds what their layers show to the tally."""
    own_signs: dict[str, Tensor] = {}
    handles = []
    for path, layer in net.named_modules():
        if not isinstance(layer, BinaryConv2d):
            continue
        twin = packed.net.get_submodule(path)
        if layer.weight_quantizer is not None:
            handles.append(layer.register_forward_hook(_output_check(path, twin, packed.is_half, tally)))
        if layer.binary_input:
            handles.append(layer.register_forward_pre_hook(_sign_keeper(path, layer, own_signs)))
            handles.append(twin.register_forward_pre_hook(_flip_counter(path, layer, own_signs, tally)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _output_check(
    path: str, twin: nn.Module, is_half: bool, tally: _Tally
) -> Callable[[BinaryConv2d, tuple[Tensor], Tensor], None]:
    def check(layer: BinaryConv2d, inputs: tuple[Tensor], output: Tensor) -> None:
        difference = (twin.forward(*inputs) - output).abs()  # not twin(...), whose hook counts flipped signs
        tally.add_layer(path, difference, _rounding_bound(layer, twin, inputs[0], is_half))

    return check


def _sign_keeper(
    path: str, layer: BinaryConv2d, own_signs: dict[str, Tensor]
) -> Callable[[nn.Module, tuple[Tensor]], None]:
    def keep(_: nn.Module, inputs: tuple[Tensor]) -> None:
        own_signs[path] = _signs(layer, inputs[0])

    return keep


def _flip_counter(
    path: str, layer: BinaryConv2d, own_signs: dict[str, Tensor], tally: _Tally
) -> Callable[[nn.Module, tuple[Tensor]], None]:
    def count(_: nn.Module, inputs: tuple[Tensor]) -> None:
        tally.flipped_signs += int((own_signs.pop(path) != _signs(layer, inputs[0])).sum())

    return count


def _signs(layer: BinaryConv2d, x: Tensor) -> Tensor:
    return input_code(x.float(), layer.options.input_quantizer, layer.input_shift).real >= 0


def _rounding_bound(layer: BinaryConv2d, twin: nn.Module, x: Tensor, is_half: bool) -> Tensor:
    """Return the largest difference that rounding explains, of a shape that broadcasts to the layer's output."""
    code, evaluations = layer.code(), 2
    size = code.mask[0].numel()
    bias = torch.zeros_like(code.alpha) if layer.bias is None else layer.bias.abs()
    if layer.binary_input:
        num_operations = _EPILOGUE_OPS
        ones = code.mask.flatten(1).sum(1)
        magnitude = size * ((code.alpha - code.beta).abs() + code.beta.abs())
        stored = _storage_error(code.alpha, is_half) * ones + _storage_error(code.beta, is_half) * (size - ones)
        magnitude, stored = magnitude.view(-1, 1, 1), stored.view(-1, 1, 1)
        inputs = input_code(x.float(), layer.options.input_quantizer, layer.input_shift)
        if inputs.scale is not None and inputs.offset is not None:
            num_operations += _SCALED_INPUT_OPS
            largest = inputs.scale.abs() + inputs.offset.abs()
            magnitude, stored = largest * magnitude, largest * stored
    else:
        num_operations = size + 1
        if isinstance(twin, PackedWeightConv2d):
            num_operations, evaluations = size + _BITS_OPS, 1 + (_BITS_ERROR_CUDA if x.is_cuda else _BITS_ERROR)
        magnitude = _convolve(layer, x.abs(), code.dense().abs())
        stored = _convolve(layer, x.abs(), _storage_error(code.dense(), is_half))
    magnitude = magnitude + bias.view(-1, 1, 1)
    stored = stored + _storage_error(bias, is_half).view(-1, 1, 1)
    growth = num_operations * _UNIT / (1 - num_operations * _UNIT)
    # Divided by 1 - growth, since the sum of magnitudes is itself a float32 result.
    return evaluations * growth / (1 - growth) * (magnitude + stored) + stored


def _convolve(layer: BinaryConv2d, x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)


def _storage_error(values: Tensor, is_half: bool) -> Tensor:
    """Return how far the stored values may lie from `values`."""
    if not is_half:
        return torch.zeros_like(values)
    return (values.abs() * 2.0**-11).clamp_min(2.0**-25)


def _larger(current: float, values: Tensor) -> float:
    """Return the larger of a figure and the largest of `values`; a NaN counts as infinite."""
    return max(current, float(values.nan_to_num(nan=float("inf")).max())) if values.numel() else current
