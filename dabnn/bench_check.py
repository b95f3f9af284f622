"""Whether the running form of a packed model may be timed: every binary layer must compute what its bits say.

Each is fed with what it gets in a pass of the running form, and compared with a convolution in float64 of the signs
with the two-valued filters. A value of the packed form errs by at most g(k) * (sum of magnitudes), g(k) = k * u / (1 -
k * u), u = 2**-24, where k rounded operations follow the exact sums (`dabnn.verify`), and once more where it is
written in a shorter type. A packed sign may differ only where the value lies that near to its threshold. With
real inputs and weights held as bits the bound is that of `kernels.weight_only`.

A layer that gives or pools signs without a convolution compares and nothing else: there, all bits must be equal. Left
out: layers that are torch's own in both forms, and the comparison with the trained network (`dabnn.verify`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from dabnn.activations import input_code
from dabnn.errors import DabError
from dabnn.fusion import PackReached, PoolBits
from dabnn.packed import PackedModel
from dabnn.packed_conv import PackedConv2d
from dabnn.packed_weight_conv import PackedWeightConv2d
from dabnn.quantizers import expand
from kernels import pack_signs, unpack_signs
from kernels.packing import WORD_BITS

_UNIT = 2.0**-24
# alpha - beta, two products and a sum, and the bias.
_EPILOGUE_OPS = 5
# A product with the scale of the inputs, one with their offset, and the sum.
_SCALED_INPUT_OPS = 3
# What `kernels.weight_only` derives for weights alone, and how coarsely tensor cores sum.
_WEIGHT_ONLY_OPS = 5
_TENSOR_CORE_UNIT = 2.0**-22
_ADVICE = "Export the model again; if that does not help, this is a defect of dab on this machine."


@dataclass
class Checked:
    """What was compared.

    Attributes:
        num_layers: Convolutions with filters held as bits.
        max_error: Largest difference of a value.
        problems: One sentence a wrong layer, by its path.
    """

    num_layers: int = 0
    max_error: float = 0.0
    problems: dict[str, str] = field(default_factory=dict)


@torch.inference_mode()
def refuse_if_wrong(packed: PackedModel, images: Tensor) -> Checked:
    """Compares the running form of a packed model, layer by layer, with what its bits say.

    Args:
        packed: On any device, in any type.
        images: (N, C, H, W) there, in that type.

    Returns:
        What was compared; no problem among it.

    Raises:
        DabError: A layer is wrong, or, in float32 on the CPU, the running form does not give the same signs and logits
            as the form before fusion, bit for bit.
    """
    running = packed.running()
    checked = Checked()
    handles = []
    for path, module in running.named_modules():
        if isinstance(module, PackedConv2d):
            handles.append(module.register_forward_hook(_conv_check(path, checked)))
        elif isinstance(module, PackedWeightConv2d):
            handles.append(module.register_forward_hook(_weight_check(path, checked)))
        elif isinstance(module, PackReached | PoolBits):
            handles.append(module.register_forward_hook(_signs_check(path, checked)))
    try:
        running(images)
    finally:
        for handle in handles:
            handle.remove()
    if checked.problems:
        raise DabError(
            f"bench: the packed form disagrees with its float twin, so it is not timed: "
            f"{' '.join(checked.problems.values())} {_ADVICE}"
        )
    if images.device.type == "cpu" and images.dtype == torch.float32:
        _refuse_other_signs(packed, images)
    return checked


def _refuse_other_signs(packed: PackedModel, images: Tensor) -> None:
    """Compare what binary layers get, and the logits, with the form before fusion, which gives the same bits."""
    running: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    results = []
    for net, signs in ((packed.running(), running), (packed.net, plain)):
        layers = {path: module for path, module in net.named_modules() if isinstance(module, PackedConv2d)}
        handles = [layer.register_forward_pre_hook(_input_keeper(path, signs)) for path, layer in layers.items()]
        try:
            results.append(net(images))
        finally:
            for handle in handles:
                handle.remove()
    differing = [path for path in plain if not torch.equal(running[path], plain[path])]
    if not torch.equal(*(logits.view(torch.int32) for logits in results)):
        differing.append("the logits")
    if differing:
        raise DabError(
            f"bench: the packed form disagrees with itself before signs stay bits between layers, first at "
            f"{differing[0]}, so it is not timed. {_ADVICE}"
        )


def _input_keeper(path: str, signs: dict[str, Tensor]) -> Callable[[PackedConv2d, tuple[Tensor]], None]:
    def keep(layer: PackedConv2d, inputs: tuple[Tensor]) -> None:
        x = inputs[0]
        is_packed = x.dtype == torch.int32
        signs[path] = x if is_packed else pack_signs(input_code(x, layer.input_quantizer, layer.input_shift).real)

    return keep


def _conv_check(path: str, checked: Checked) -> Callable[[PackedConv2d, tuple[Tensor], Tensor], None]:
    def check(layer: PackedConv2d, inputs: tuple[Tensor], output: Tensor) -> None:
        expected, bound = _twin(layer, inputs[0])
        checked.num_layers += 1
        if layer.threshold is not None and layer.falls is not None:
            threshold, falls = layer.threshold.view(-1, 1, 1), layer.falls.view(-1, 1, 1)
            bits = unpack_signs(output, len(layer.alpha)) > 0
            is_wrong = (bits != ((expected >= threshold) ^ falls)) & ((expected - threshold).abs() > bound)
            if bool(is_wrong.any()):
                checked.problems[path] = f"{path}: {int(is_wrong.sum())} signs are wrong."
            return
        _compare(path, output, expected, bound, checked)

    return check


def _weight_check(path: str, checked: Checked) -> Callable[[PackedWeightConv2d, tuple[Tensor], Tensor], None]:
    def check(layer: PackedWeightConv2d, inputs: tuple[Tensor], output: Tensor) -> None:
        x = inputs[0].double()
        mask = unpack_signs(layer.weight_bits, x.shape[1] // layer.groups) > 0
        dense = expand(mask, layer.alpha, layer.beta).double()
        bias = torch.zeros_like(layer.alpha) if layer.bias is None else layer.bias
        geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
        num_operations = dense[0].numel() + _WEIGHT_ONLY_OPS
        unit = _TENSOR_CORE_UNIT if x.is_cuda else _UNIT
        bound = F.conv2d(x.abs(), dense.abs(), bias.double().abs(), *geometry)
        bound = 3 * num_operations * unit / (1 - num_operations * unit) * bound
        checked.num_layers += 1
        _compare(path, output, F.conv2d(x, dense, bias.double(), *geometry), bound, checked)

    return check


def _compare(path: str, output: Tensor, expected: Tensor, bound: Tensor, checked: Checked) -> None:
    """Note a layer whose values err by more than `bound` and the rounding to their type."""
    bound = bound + torch.finfo(output.dtype).eps / 2 * (expected.abs() + bound)
    error = (output.double() - expected).abs()
    checked.max_error = max(checked.max_error, float(error.max()))
    if not bool((error <= bound).all()):  # a NaN is wrong, too
        most = f"where rounding explains {float(bound.max()):.3g} at most"
        checked.problems[path] = f"{path}: differs by {float(error.max()):.3g} {most}."


def _signs_check(path: str, checked: Checked) -> Callable[[PackReached | PoolBits, tuple[Tensor], Tensor], None]:
    def check(layer: PackReached | PoolBits, inputs: tuple[Tensor], output: Tensor) -> None:
        expected = _reached(layer, inputs[0]) if isinstance(layer, PackReached) else _pooled(layer, inputs[0])
        num_wrong = int((unpack_signs(output, expected.shape[1]) != expected).sum())
        if num_wrong:
            checked.problems[path] = f"{path}: {num_wrong} signs are wrong."

    return check


def _reached(layer: PackReached, x: Tensor) -> Tensor:
    is_reached = (x.float() >= layer.threshold.view(-1, 1, 1)) ^ layer.falls.view(-1, 1, 1)
    return torch.where(is_reached, 1.0, -1.0)


def _pooled(layer: PoolBits, bits: Tensor) -> Tensor:
    channels = WORD_BITS * bits.shape[3]
    direction = -unpack_signs(layer.is_and_bits.view(1, 1, 1, -1), channels)  # -1 where the bit is 1 below a threshold
    windows = (layer.kernel, layer.stride, layer.padding)
    return direction * F.max_pool2d(direction * unpack_signs(bits, channels), *windows, ceil_mode=layer.ceil_mode)


def _twin(layer: PackedConv2d, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the layer's values (N, F, H', W') in float64 and how far, a filter, rounding may take packed ones."""
    dense = expand(unpack_signs(layer.weight_bits, layer.in_channels) > 0, layer.alpha, layer.beta).double()
    spread = (layer.alpha - layer.beta).abs() + layer.beta.abs()
    magnitude = dense[0].numel() * spread.double().view(-1, 1, 1)
    num_operations = _EPILOGUE_OPS
    if x.dtype == torch.int32:
        y = _convolve(layer, unpack_signs(x, layer.in_channels).double(), dense)
    else:
        code = input_code(x.float(), layer.input_quantizer, layer.input_shift)
        y = _convolve(layer, torch.where(code.real >= 0, 1.0, -1.0).double(), dense)
        if code.scale is not None and code.offset is not None:
            ones = torch.ones_like(code.real[:1]).double()
            y = code.scale.double() * y + code.offset.double() * _convolve(layer, ones, dense)
            magnitude = (code.scale.abs() + code.offset.abs()) * magnitude
            num_operations += _SCALED_INPUT_OPS
    if layer.bias is not None:
        y = y + layer.bias.double().view(-1, 1, 1)
        magnitude = magnitude + layer.bias.double().abs().view(-1, 1, 1)
    return y, num_operations * _UNIT / (1 - num_operations * _UNIT) * magnitude


def _convolve(layer: PackedConv2d, x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight, None, layer.stride, layer.padding)
