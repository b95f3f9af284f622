"""The binary convolution: an `nn.Conv2d` whose weights and inputs can each be reduced to two values.

The latent weights stay real parameters under the parent's names, so that checkpoints of the float and the binary
network are interchangeable. What is left out: block order and normalisation (models), choice of layers (plans).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from dabnn.activations import binary_input, input_code
from dabnn.errors import InvalidInputError
from dabnn.gradients import Estimator, dab_ste, has_dab_ste, sign, two_valued_reference, two_valued_ste
from dabnn.options import LayerOptions as LayerOptions
from dabnn.quantizers import (
    Code,
    Split,
    binarize,
    check_center,
    check_method,
    check_weight,
    encode,
    split,
    split_learned,
    split_warm,
    subtract_center,
    with_gradient,
)

# What some layers keep besides weight and bias; a float network has none of it, and loading does not need it.
EXTRA_STATE = ("alpha", "beta", "threshold", "num_searches", "input_shift")
# Every step `dab_warm` searches one filter in so many exactly, in turn, so that none strays for longer.
_WARM_PERIOD = 64


class BinaryConv2d(nn.Conv2d):
    r"""A 2-D convolution with two-valued weights, binary inputs, both, or neither.

    Input (N, C, H, W), output (N, F, H', W'), in the dtype of the input; padding, stride, dilation and groups as in the
    parent. Zero padding follows the sign, so a padded position contributes nothing.

    Training, with w the latent weight, c = `subtract_center(w, center)`, t the threshold of each filter,
    e = [c >= t], y = alpha e + beta (1 - e) and F the factor of the weights' estimator (`dabnn.gradients`):

    - weight: conv uses y, and dL/dw follows from dL/dc by the exact chain rule of the mean. By `options.gradient`:
      `straight_through`: dL/dc = dL/dy F(c); alpha and beta are constants to it.
      `means`: dL/dc = dL/dy F(c) + the exact gradient of alpha and beta, for dab the mean of dL/dy over the weight's
      own group (`dabnn.quantizers.with_gradient`).
      `reference`: dL/dw by the factor of the reference code (`dabnn.gradients.two_valued_reference`), without F.
    - `dab_warm`: the search for t starts at the buffer `threshold`, the last training forward's (alpha + beta) / 2, and
      for one filter in 64, in turn, at the exact optimum. So sqrt(error) <= sqrt(least error) + 2 L, L the length of
      the filter's path over at most 64 steps (`kernels.dab_warm`). Evaluation uses the exact optimum.
    - `dab_learned`: alpha and beta are parameters, t = (alpha + beta) / 2, dL/d alpha = sum(dL/dy e),
      dL/d beta = sum(dL/dy (1 - e)). They start at the optimum of the weight that the layer is made with; evaluation
      uses them. Where training lets alpha fall below beta, e still marks the larger weights.
    - input: conv uses its binary form, with the gradients of `dabnn.activations.binary_input`.
    - neither: the parent's forward and backward, bit for bit.

    Quantization runs in float32 at least, also under autocast and for narrower weights.

    Evaluation with both: y = (alpha - beta) * conv(s, e) + beta * conv(s, 1), s the signs of the input, as separate
    float32 operations in that order; for two_valued inputs then scale * y + offset * y1, with y1 the same for s = 1;
    then + bias. The convolutions are whole numbers, exact in float32, so a packed network can agree bit for bit. With
    binary weights alone: conv2d with the dense two-valued weight. In evaluation the code is kept until the weight
    changes, and no gradient reaches the weight (with both binary: nor the input).

    Source: Distribution-Aware Binarization, arXiv 1804.02941; XNOR-Net, arXiv 1603.05279, for the sign inputs.

    Attributes:
        weight_quantizer: method of `binarize`, or None for real weights.
        center: what is subtracted from the weight before quantizing: none, filter or tap.
        binary_input: whether the input is binary.
        options: estimators, gradient rule and input quantizer.
        keeps_step_code: whether a training forward leaves its code in `step_code`; off, since it holds memory.
        step_code: (mask, alpha, beta) of the last training forward, or None.
        progress: share of the training done, as `set_progress` told; for annealed estimators.
        alpha: (F,) learned upper values with dab_learned, else None; as is beta.
        beta: (F,) learned lower values.
        threshold: (F,) where dab_warm starts the next search, else None.
        num_searches: int64 scalar, warm searches so far, else None.
        input_shift: (C,) learned shift before the sign with rsign inputs, else None.
    """

    alpha: nn.Parameter | None
    beta: nn.Parameter | None
    threshold: Tensor | None
    num_searches: Tensor | None
    input_shift: nn.Parameter | None

    def __init__(
        self,
        *args: Any,
        weight_quantizer: str | None = None,
        center: str | None = None,
        binary_input: bool = False,
        options: LayerOptions = LayerOptions(),  # noqa: B008 - frozen
        **kwargs: Any,
    ) -> None:
        """Take the arguments of `nn.Conv2d`, and by keyword what is binary.

        `center=None` means tap where the input is binary and there are several input channels a group, else none:
        un-centred weights with sign inputs train as well and generalise far worse.
        """
        super().__init__(*args, **kwargs)
        self.weight_quantizer = weight_quantizer
        self.binary_input = binary_input
        self.options = options
        self.center = self._default_center() if center is None else center
        self.progress = 0.0
        self.keeps_step_code = False
        self.step_code: tuple[Tensor, Tensor, Tensor] | None = None
        self._cached: tuple[tuple[int, ...], Code] | None = None
        self._weight_ste = Estimator(options.ste, options.ste_width)
        self._input_ste = Estimator(options.input_ste, options.input_ste_width)
        self._check()
        self._add_state()

    @classmethod
    def from_conv(
        cls,
        conv: nn.Conv2d,
        *,
        weight_quantizer: str | None,
        center: str | None,
        binary_input: bool,
        options: LayerOptions = LayerOptions(),  # noqa: B008 - frozen
    ) -> Self:
        """Return a binary layer of the same geometry that takes over the parameters (the same objects) of `conv`."""
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            groups=conv.groups,
            bias=conv.bias is not None,
            padding_mode=conv.padding_mode,
            device="meta",
            weight_quantizer=weight_quantizer,
            center=center,
            binary_input=binary_input,
            options=options,
        )
        layer.weight = conv.weight
        layer.bias = conv.bias
        layer._add_state()
        return layer.train(conv.training)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the parent's name, callable by keyword
        """Return the convolution of the input (N, C, H, W) as the class says for this mode."""
        if self.weight_quantizer is not None and self.binary_input and not self.training:
            return self._evaluate_both(input)
        x = self._binary_input(input) if self.binary_input else input
        return cast(Tensor, self._conv_forward(x, self._effective_weight(), self.bias))

    def code(self) -> Code:
        """Return the code of the current weights (mask, alpha, beta, error), computed afresh only when they changed.

        A change is an in-place one (optimizer, `load_state_dict`), a call of `train` or `eval`, or a move to another
        device or dtype. Assigning to `weight.data` between two evaluations is not seen.

        Raises:
            InvalidInputError: if the layer's weights are real, or hold NaN or infinity.
        """
        if self.weight_quantizer is None:
            raise InvalidInputError("binarize.weights: this layer has real weights, so there is no code to give.")
        # The counters of in-place changes that autograd keeps; they have no public name.
        versions = tuple(t._version for t in (self.weight, self.alpha, self.beta) if t is not None)  # noqa: SLF001
        if self._cached is None or self._cached[0] != versions:
            self._cached = versions, self._current_code(self.weight_quantizer)
        return self._cached[1]

    def reset_code(self) -> None:
        """Put learned alpha and beta, and the start of a warm search, at the exact optimum of the current weight."""
        if self.weight_quantizer is None or (self.alpha is None and self.threshold is None):
            return
        code = binarize(self.weight, self.weight_quantizer, self.center)
        with torch.no_grad():
            if self.alpha is not None and self.beta is not None:
                self.alpha.copy_(code.alpha)
                self.beta.copy_(code.beta)
            if self.threshold is not None and self.num_searches is not None:
                self.threshold.copy_((code.alpha + code.beta) / 2)
                self.num_searches.zero_()

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode; either way the next evaluation quantizes afresh."""
        self._cached = None
        return super().train(mode)

    def extra_repr(self) -> str:
        """Return the parent's description and what is binary."""
        weights = "real" if self.weight_quantizer is None else f"{self.weight_quantizer}, center={self.center}"
        parent = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{parent}, weights={weights}, inputs={self.options.input_quantizer if self.binary_input else 'real'}"

    def _default_center(self) -> str:
        several = self.in_channels // self.groups > 1
        return "tap" if self.weight_quantizer is not None and self.binary_input and several else "none"

    def _check(self) -> None:
        if self.weight_quantizer is not None:
            check_method(self.weight_quantizer)
            check_center(self.center, self.weight.shape)
        elif self.center != "none":
            raise InvalidInputError(
                f"binarize.center: {self.center} has no effect on real weights. Name a quantizer, or leave it out."
            )
        self._check_options()

    def _check_options(self) -> None:
        gradient = self.options.gradient
        if self.weight_quantizer == "dab_learned" and gradient != "straight_through":
            raise InvalidInputError(
                f"binarize.gradient: {gradient} treats alpha and beta as functions of the weight, and with dab_learned "
                "they are parameters. Use gradient=straight_through, or weights=dab."
            )
        if self.weight_quantizer is not None and gradient == "reference" and self.weight.shape[1] == 1:
            raise InvalidInputError(
                "binarize.gradient: reference multiplies by 1 - 1/C, and this layer has C = 1 input channel a group, "
                "so that it would never learn. Use gradient=straight_through or means."
            )
        if self.binary_input and self.options.input_quantizer == "two_valued" and self.in_channels == 1:
            raise InvalidInputError(
                "binarize.input_quantizer: two_valued subtracts the mean over the channels, and this layer has one "
                "input channel, so that every input would become zero. Use input_quantizer=sign or rsign."
            )

    def _add_state(self) -> None:
        """Register what the options need besides weight and bias; nothing for most."""
        scalars = self.weight.new_empty(self.out_channels, dtype=torch.promote_types(self.weight.dtype, torch.float32))
        is_learned = self.weight_quantizer == "dab_learned"
        self.register_parameter("alpha", nn.Parameter(scalars) if is_learned else None)
        self.register_parameter("beta", nn.Parameter(scalars.clone()) if is_learned else None)
        is_warm = self.weight_quantizer == "dab_warm"
        self.register_buffer("threshold", scalars.clone() if is_warm else None)
        counter = torch.zeros((), dtype=torch.int64, device=scalars.device)
        self.register_buffer("num_searches", counter if is_warm else None)
        is_shifted = self.binary_input and self.options.input_quantizer == "rsign"
        shift = torch.zeros(self.in_channels, dtype=scalars.dtype, device=scalars.device)
        self.register_parameter("input_shift", nn.Parameter(shift) if is_shifted else None)
        if not self.weight.is_meta:
            self.reset_code()

    def _effective_weight(self) -> Tensor:
        if self.weight_quantizer is None:
            return self.weight
        if not self.training:
            return self.code().dense().to(self.weight.dtype)
        is_about_threshold, has_means = self.options.ste_center == "threshold", self.options.gradient == "means"
        is_dab = self.weight_quantizer == "dab" and not self.keeps_step_code
        if is_dab and has_dab_ste(self.weight, self._weight_ste, self.options.gradient):
            options = {"is_about_threshold": is_about_threshold, "has_means": has_means}
            return dab_ste(self.weight, self.center, self._weight_ste, **options)
        centered = subtract_center(self.weight, self.center)
        parts = self._split(centered, self.weight_quantizer)
        threshold, alpha, beta = (part.detach() for part in parts)
        if self.keeps_step_code:
            # Copies: learned alpha and beta are the parameters, which the step is about to change.
            self.step_code = centered.detach() >= threshold.view(-1, 1, 1, 1), alpha.clone(), beta.clone()
        if self.options.gradient == "reference":
            return two_valued_reference(self.weight, centered, threshold, alpha, beta)
        if has_means:
            parts = with_gradient(centered, self.weight_quantizer, parts)
        middle = (alpha + beta) / 2 if is_about_threshold else None
        return two_valued_ste(centered, *parts, self._annealed(self._weight_ste), middle)

    def _split(self, centered: Tensor, method: str) -> Split:
        if self.alpha is not None and self.beta is not None:
            return split_learned(centered, self.alpha, self.beta)
        if self.threshold is not None and self.num_searches is not None:
            return self._split_warm(centered, self.threshold, self.num_searches)
        return split(centered, method)

    @torch.no_grad()
    def _split_warm(self, centered: Tensor, start: Tensor, num_searches: Tensor) -> Split:
        """Search from `start`, and put there where the next search begins."""
        share = -(-self.out_channels // _WARM_PERIOD)
        in_turn = (num_searches * share + torch.arange(share, device=start.device)) % self.out_channels
        _, alpha, beta = split(centered[in_turn], "dab")
        parts = split_warm(centered, start.index_copy(0, in_turn, (alpha + beta) / 2))
        start.copy_((parts[1] + parts[2]) / 2)
        num_searches += 1
        return parts

    def _current_code(self, method: str) -> Code:
        if self.alpha is None or self.beta is None:
            return binarize(self.weight, method, self.center)
        check_weight(self.weight)
        centered = subtract_center(self.weight.detach(), self.center)
        return encode(centered, split_learned(centered, self.alpha.detach(), self.beta.detach()))

    def _binary_input(self, x: Tensor) -> Tensor:
        return binary_input(x, self.options.input_quantizer, self.input_shift, self._annealed(self._input_ste))

    def _annealed(self, estimator: Estimator) -> Estimator:
        # Only ede reads the progress, so that a compiled network is not compiled anew with every step.
        return replace(estimator, progress=self.progress) if estimator.name == "ede" else estimator

    @torch.no_grad()
    def _evaluate_both(self, x: Tensor) -> Tensor:
        code = input_code(x.float(), self.options.input_quantizer, self.input_shift)
        y = self._evaluate_signs(sign(code.real))
        if code.scale is not None and code.offset is not None:
            y = code.scale * y + code.offset * self._evaluate_signs(torch.ones_like(code.real[:1]))
        if self.bias is not None:
            y = y + self.bias.float().view(-1, 1, 1)
        return y.to(x.dtype)

    def _evaluate_signs(self, x_sign: Tensor) -> Tensor:
        code = self.code()
        alpha, beta = (scalars.float().view(-1, 1, 1) for scalars in (code.alpha, code.beta))
        selected = self._count(x_sign, code.mask.float())
        ones = torch.ones(self.groups, *code.mask.shape[1:], device=x_sign.device)
        # One sum of inputs serves all filters of a group.
        total = self._count(x_sign, ones)
        if self.groups > 1:
            total = total.repeat_interleave(self.out_channels // self.groups, dim=1)
        return (alpha - beta) * selected + beta * total

    def _count(self, x_sign: Tensor, zero_one: Tensor) -> Tensor:
        """Return the convolution of +-1 inputs with 0/1 weights in float32, rounded.

        Direct convolution is exact as it is; rounding makes it so where a backend picks Winograd or FFT.
        """
        with torch.autocast(x_sign.device.type, enabled=False):
            return cast(Tensor, self._conv_forward(x_sign, zero_one, None).round_())

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self._cached = None
        return cast(Self, super()._apply(*args, **kwargs))  # type: ignore[no-untyped-call]

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load as the parent does; what a network of another quantizer lacks is set from the weights loaded."""
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        absent = [prefix + name for name in EXTRA_STATE if prefix + name in missing_keys]
        if not absent or prefix + "weight" not in state_dict:
            return
        missing_keys[:] = [key for key in missing_keys if key not in absent]
        if absent != [prefix + "input_shift"]:
            self.reset_code()
        if self.input_shift is not None and prefix + "input_shift" in absent:
            nn.init.zeros_(self.input_shift)

    def __getstate__(self) -> dict[str, Any]:
        # A copy's weight counts its changes from zero, so a copied code could pass for current.
        return {**self.__dict__, "_cached": None, "step_code": None}


def has_packed_form(conv: nn.Conv2d) -> bool:
    """Return whether a convolution can run on packed bits where its weights and inputs are binary."""
    return conv.groups == 1 and conv.dilation == (1, 1) and conv.padding_mode == "zeros"


def set_progress(net: nn.Module, fraction: float) -> None:
    """Tell the annealed estimators of a network how far training is.

    Args:
        net: any network; only its `BinaryConv2d` layers take notice.
        fraction: share of the training steps done, from 0 to 1; a pure function of the step, so that a resumed run
            needs nothing else.
    """
    for module in net.modules():
        if isinstance(module, BinaryConv2d):
            module.progress = fraction


def reset_codes(net: nn.Module) -> None:
    """Put every learned alpha and beta, and every start of a warm search, at the exact optimum of its weight.

    Call it after weights were changed by other means than training or `load_state_dict`; the latter does it by itself
    where the state does not hold them.
    """
    for module in net.modules():
        if isinstance(module, BinaryConv2d):
            module.reset_code()
