"""Instruments that show, layer by layer and epoch by epoch, why a binary network trains as it does.

Each is a metric `layers/NN/what`, NN being the layer's number as `dab models show` prints it. What needs the bits is
counted at every step, from the codes that the layers made anyway; inputs and gradients are looked at in every eighth
step of an epoch, beginning with its first, so that which ones is a function of the position alone. Instruments only
read: weights are bit for bit the same with and without them.

What is added up within an epoch goes into checkpoints, so that an epoch that was interrupted reports the same figures.
Where the checkpoint has none (instruments were off), the epoch's figures begin at the step of the resume.

Left out: pictures and healthy values (`docs/instruments.md`), and layers that are not convolutions.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dabnn.activations import input_code
from dabnn.distributed import World
from dabnn.layers import BinaryConv2d
from dabnn.plans import numbered_convs
from dabnn.quantizers import Code, subtract_center

SAMPLE_EVERY = 8


@dataclass
class _Bits:
    """What one epoch has seen so far of the bits of a layer with binary weights.

    Attributes:
        start: Mask at the epoch's first step.
        last: Mask at the last step taken.
        start_threshold: (F,) at the epoch's first step.
        num_flipped: Bits that changed from a step to the next one, added up.
        num_pairs: Pairs of steps compared.
    """

    start: Tensor
    last: Tensor
    start_threshold: Tensor
    num_flipped: Tensor
    num_pairs: int = 0

    @classmethod
    def begin(cls, mask: Tensor, alpha: Tensor, beta: Tensor) -> "_Bits":
        return cls(mask, mask, threshold(alpha, beta), torch.zeros((), dtype=torch.int64, device=mask.device))

    def move_to(self, mask: Tensor) -> None:
        self.num_flipped += torch.count_nonzero(mask ^ self.last)
        self.num_pairs += 1
        self.last = mask


@dataclass
class _Layer:
    """A convolution and what this epoch has seen of it.

    Attributes:
        number: Layer number.
        conv: The layer.
        bits: None before the epoch's first step, and where the weights are real.
        num_positive: (C,) how often each input channel was +1 at the sampled steps of this rank.
        num_inputs: Inputs a channel that were looked at on this rank.
        norm_sum: Gradient norms of the sampled steps, added up.
        num_norms: Sampled steps.
        is_alive: (F,) which filters had a gradient at any of them.
    """

    number: int
    conv: nn.Conv2d
    bits: _Bits | None = None
    num_positive: Tensor = field(init=False)
    num_inputs: int = field(init=False)
    norm_sum: Tensor = field(init=False)
    num_norms: int = field(init=False)
    is_alive: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.begin_epoch()

    def begin_epoch(self) -> None:
        device, conv = self.conv.weight.device, self.conv
        self.bits = None
        self.num_positive = torch.zeros(conv.in_channels, dtype=torch.int64, device=device)
        self.num_inputs = 0
        self.norm_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.num_norms = 0
        self.is_alive = torch.zeros(conv.out_channels, dtype=torch.bool, device=device)

    @property
    def has_binary_input(self) -> bool:
        return isinstance(self.conv, BinaryConv2d) and self.conv.binary_input

    @property
    def has_binary_weights(self) -> bool:
        return isinstance(self.conv, BinaryConv2d) and self.conv.weight_quantizer is not None

    def note_input(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        layer = self.conv
        if not isinstance(layer, BinaryConv2d):
            return
        code = input_code(inputs[0], layer.options.input_quantizer, layer.input_shift)
        positive = code.real >= 0
        self.num_positive += positive.sum((0, 2, 3))
        self.num_inputs += positive.numel() // positive.shape[1]

    def note_gradient(self) -> None:
        gradient = self.conv.weight.grad
        if gradient is None:  # frozen
            return
        norms = torch.linalg.vector_norm(gradient.flatten(1), dim=1, dtype=torch.float64)
        self.norm_sum += torch.linalg.vector_norm(norms)
        self.num_norms += 1
        self.is_alive |= norms > 0

    def note_bits(self, *, is_first: bool) -> None:
        code = self.conv.step_code if isinstance(self.conv, BinaryConv2d) else None
        if code is None:
            return
        if is_first or self.bits is None:
            self.bits = _Bits.begin(*code)
        else:
            self.bits.move_to(code[0])


class Instruments:
    """The instruments of one network in training.

    Args:
        net: The network, or None to measure nothing: all methods then do nothing.
    """

    def __init__(self, net: nn.Module | None) -> None:
        convs = numbered_convs(net) if net is not None else {}
        self._layers = [_Layer(number, conv) for number, (_, conv) in convs.items()]
        for layer in self._layers:
            if isinstance(layer.conv, BinaryConv2d) and layer.has_binary_weights:
                layer.conv.keeps_step_code = True

    @contextmanager
    def step(self, step_in_epoch: int) -> Iterator[None]:
        """Measure one training step: within the block its forward and backward pass, the all-reduce included.

        Args:
            step_in_epoch: Steps of the epoch taken before this one.
        """
        is_sampled = step_in_epoch % SAMPLE_EVERY == 0
        watched = [layer for layer in self._layers if is_sampled and layer.has_binary_input]
        hooks = [layer.conv.register_forward_pre_hook(layer.note_input) for layer in watched]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        with torch.no_grad():
            for layer in self._layers:
                layer.note_bits(is_first=step_in_epoch == 0)
                if is_sampled:
                    layer.note_gradient()

    @torch.no_grad()
    def finish_epoch(self, world: World) -> dict[str, float]:
        """Return the epoch's metrics and begin the next epoch; every rank must call it, after the last update.

        A metric that is not defined (the error of a layer of constant filters, say) is left out. The formulas stand at
        `code_metrics`, `bit_metrics`, `input_metrics` and `gradient_metrics`.

        Raises:
            InvalidInputError: The weights of a layer are not finite.
        """
        self._reduce(world)
        metrics: dict[str, float] = {}
        for layer in self._layers:
            metrics |= {f"layers/{layer.number:02d}/{what}": value for what, value in _layer_metrics(layer).items()}
            layer.begin_epoch()
        return metrics

    def state(self, world: World) -> dict[str, Any]:
        """Return what the epoch has added up so far over all ranks, for a checkpoint; every rank must call it."""
        totals = self._input_totals(world)
        return {
            f"{layer.number:02d}": {
                "bits": _pack_bits(layer.bits),
                "num_positive": num_positive,
                "num_inputs": num_inputs,
                "norm_sum": layer.norm_sum,
                "num_norms": layer.num_norms,
                "is_alive": layer.is_alive,
            }
            for layer, (num_positive, num_inputs) in zip(self._layers, totals, strict=True)
        }

    def restore(self, state: dict[str, Any], *, is_main: bool) -> None:
        """Go on from what `state` returned; layers that it lacks begin at the next step."""
        for layer in self._layers:
            saved = state.get(f"{layer.number:02d}")
            if saved is None:
                continue
            device = layer.conv.weight.device
            layer.bits = _unpack_bits(saved["bits"], layer.conv.weight)
            layer.norm_sum, layer.is_alive = saved["norm_sum"].to(device), saved["is_alive"].to(device)
            layer.num_norms = saved["num_norms"]
            if is_main:  # these are sums over all ranks already
                layer.num_positive, layer.num_inputs = saved["num_positive"].to(device), saved["num_inputs"]

    def _reduce(self, world: World) -> None:
        for layer, totals in zip(self._layers, self._input_totals(world), strict=True):
            layer.num_positive, layer.num_inputs = totals

    def _input_totals(self, world: World) -> list[tuple[Tensor, int]]:
        """Return `num_positive` and `num_inputs` of each layer over all ranks, in one all-reduce."""
        own = [[*layer.num_positive.tolist(), layer.num_inputs] for layer in self._layers]
        total = iter(world.total([float(value) for values in own for value in values]))
        sums = [[int(next(total)) for _ in values] for values in own]
        return [(torch.tensor(values[:-1]), values[-1]) for values in sums]


def threshold(alpha: Tensor, beta: Tensor) -> Tensor:
    """Return t = (alpha + beta) / 2 of each filter, (F,): the border between the weights nearer to either value."""
    return (alpha + beta) / 2


def code_metrics(code: Code, centered: Tensor) -> dict[str, float]:
    r"""Return the instruments of a layer's code at the end of an epoch.

    With n weights a filter, K_f of them at alpha, and c the centred weight; sums over filters f and weights i:

    - `upper_share` = sum_f K_f / (F n): share of the weights at alpha.
    - `gap` = mean_f (alpha_f - beta_f): distance of the two values.
    - `offset` = sum_f |alpha_f + beta_f| / sum_f (alpha_f - beta_f): how far the two values are from being symmetric;
      0 for +-alpha, 1 where one of them is 0.
    - `weight_error` = sum_fi (c_fi - code_fi)^2 / sum_fi (c_fi - mean_i c_fi)^2: squared error over scatter. 0.36 for
      Gaussian weights at the optimum, 1 for a code that says nothing; more than 1 for one worse than the mean.

    Args:
        code: The layer's code.
        centered: What was quantized, (F, ...).
    """
    gaps = (code.alpha - code.beta).double()
    flat = centered.flatten(1).double()
    scatter = (flat - flat.mean(1, keepdim=True)).square().sum()
    metrics = {
        "upper_share": float(torch.count_nonzero(code.mask)) / code.mask.numel(),
        "gap": float(gaps.mean()),
    }
    if gaps.sum() > 0:
        metrics["offset"] = float((code.alpha + code.beta).double().abs().sum() / gaps.sum())
    if scatter > 0:
        metrics["weight_error"] = float(code.error.double().sum() / scatter)
    return metrics


def bit_metrics(bits: _Bits, code: Code) -> dict[str, float]:
    r"""Return how far the bits of a layer moved in an epoch of T steps.

    With e_s the mask used at step s of the epoch, e_T the one at its end, N weights:

    - `flipped_share` = mean_s |{i: e_s,i != e_(s+1),i}| / N: share of the bits that one step flips.
    - `flipped_share_epoch` = |{i: e_0,i != e_T,i}| / N: share of the bits that differ from the epoch's beginning.
    - `threshold_drift` = 2 sum_f |t_f(T) - t_f(0)| / sum_f (alpha_f(T) - beta_f(T)), t as in `threshold`: how far the
      thresholds moved, in units of the distance from a threshold to either value.

    Args:
        bits: What the epoch has seen; the end is added here.
        code: The code at the end of the epoch.
    """
    bits.move_to(code.mask)
    size = code.mask.numel()
    metrics = {
        "flipped_share": int(bits.num_flipped) / (bits.num_pairs * size),
        "flipped_share_epoch": int(torch.count_nonzero(code.mask ^ bits.start)) / size,
    }
    gap = (code.alpha - code.beta).double().sum()
    if gap > 0:
        drift = (threshold(code.alpha, code.beta) - bits.start_threshold).double().abs().sum()
        metrics["threshold_drift"] = float(2 * drift / gap)
    return metrics


def input_metrics(num_positive: Tensor, num_inputs: int) -> dict[str, float]:
    r"""Return how balanced the binary inputs of a layer are over the sampled steps and all ranks.

    With p_c the share of +1 (of the upper value, for two-valued inputs) among the inputs of channel c, before padding:

    - `positive_inputs` = mean_c p_c: the activation balance.
    - `input_imbalance` = mean_c |2 p_c - 1|: 0 where each channel is balanced, 1 where every channel is constant, which
      channels stuck at +1 and at -1 would hide in the mean.

    Args:
        num_positive: (C,) how often each channel was +1.
        num_inputs: How many inputs a channel that is out of.
    """
    if num_inputs == 0:
        return {}
    shares = num_positive.double() / num_inputs
    return {"positive_inputs": float(shares.mean()), "input_imbalance": float((2 * shares - 1).abs().mean())}


def gradient_metrics(norm_sum: Tensor, num_norms: int, is_alive: Tensor, code: Code | None) -> dict[str, float]:
    r"""Return what the gradient g of a layer's (latent) weight says, over the sampled steps s.

    g is the one that the optimizer sees: after the straight-through estimator and after the all-reduce, so equal on all
    ranks; weight decay is not in it.

    - `gradient_norm` = mean_s ||g_s||_2.
    - `dead_filters` = share of the filters with alpha_f = beta_f, or with g_s,f = 0 at every sampled step: the
      estimator's window is closed for each of its weights, or nothing comes back from the layers above.

    Args:
        norm_sum: sum_s ||g_s||_2.
        num_norms: Number of sampled steps.
        is_alive: (F,) where g_s,f != 0 at any of them.
        code: The code at the end of the epoch; None for real weights.
    """
    if num_norms == 0:
        return {}
    is_dead = ~is_alive if code is None else ~is_alive | (code.alpha == code.beta)
    return {
        "gradient_norm": float(norm_sum) / num_norms,
        "dead_filters": float(torch.count_nonzero(is_dead)) / len(is_dead),
    }


def _layer_metrics(layer: _Layer) -> dict[str, float]:
    metrics: dict[str, float] = {}
    code = None
    if isinstance(layer.conv, BinaryConv2d) and layer.has_binary_weights:
        code = layer.conv.code()
        metrics |= code_metrics(code, subtract_center(layer.conv.weight, layer.conv.center))
        if layer.bits is not None:
            metrics |= bit_metrics(layer.bits, code)
    metrics |= input_metrics(layer.num_positive, layer.num_inputs)
    return metrics | gradient_metrics(layer.norm_sum, layer.num_norms, layer.is_alive, code)


def _pack_bits(bits: _Bits | None) -> dict[str, Any] | None:
    if bits is None:
        return None
    return {
        "start": _packed(bits.start),
        "last": _packed(bits.last),
        "start_threshold": bits.start_threshold,
        "num_flipped": bits.num_flipped,
        "num_pairs": bits.num_pairs,
    }


def _unpack_bits(saved: dict[str, Any] | None, weight: Tensor) -> _Bits | None:
    if saved is None:
        return None
    return _Bits(
        _unpacked(saved["start"], weight),
        _unpacked(saved["last"], weight),
        saved["start_threshold"].to(weight.device),
        saved["num_flipped"].to(weight.device),
        saved["num_pairs"],
    )


def _packed(mask: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(mask.cpu().numpy()))


def _unpacked(packed: Tensor, weight: Tensor) -> Tensor:
    bits = np.unpackbits(packed.numpy(), count=weight.numel()).astype(bool)
    return torch.from_numpy(bits).view(weight.shape).to(weight.device)
