"""The binary convolution: an `nn.Conv2d` whose weights and inputs can each be reduced to two values.

The latent weights stay real parameters under the parent's names, so that checkpoints of the float and the binary
network are interchangeable. What is left out: block order and normalisation (models), choice of layers (plans).
"""

from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from dabnn.errors import InvalidInputError
from dabnn.gradients import clipped_ste, sign, sign_ste
from dabnn.options import LayerOptions as LayerOptions
from dabnn.quantizers import Code, binarize, check_center, check_method, expand, quantize, subtract_center


class BinaryConv2d(nn.Conv2d):
    r"""A 2-D convolution with two-valued weights, sign inputs, both, or neither.

    Input (N, C, H, W), output (N, F, H', W'), in the dtype of the input; padding, stride, dilation and groups as in the
    parent. Zero padding follows the sign, so a padded position contributes nothing.

    Training, with w the latent weight and c = `subtract_center(w, center)`:

    - weight: conv uses y = dense(binarize(c)); dL/dc = dL/dy * 1[|c| <= ste_width], and dL/dw follows from c by the
      exact chain rule of the mean (a straight-through estimator: alpha and beta are constants to it).
    - input: conv uses sign(x), sign(0) = +1; dL/dx = dL/dsign(x) * 1[|x| <= 1].
    - neither: the parent's forward and backward, bit for bit.

    Evaluation with both: (alpha - beta) * conv(sign(x), e) + beta * conv(sign(x), 1), then + bias, as separate float32
    operations in that order, where e is the 0/1 mask. Both convolutions are whole numbers, exact in float32, so a
    packed network can agree bit for bit. With binary weights alone: conv2d with the dense two-valued weight. In
    evaluation the code is kept until the weight changes, and no gradient reaches the weight (with both binary: nor the
    input).

    Source: Distribution-Aware Binarization, arXiv 1804.02941; XNOR-Net, arXiv 1603.05279, for the sign inputs.

    Attributes:
        weight_quantizer: method of `binarize`, or None for real weights.
        center: what is subtracted from the weight before quantizing: none, filter or tap.
        binary_input: whether the input passes through sign.
        options: estimators, gradient rule and input quantizer.
        keeps_step_code: whether a training forward leaves its code in `step_code`; off, since it holds memory.
        step_code: (mask, alpha, beta) of the last training forward, or None.
    """

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
        self._cached: tuple[int, Code] | None = None
        self._check()

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
        return layer.train(conv.training)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the parent's name, callable by keyword
        """Return the convolution of the input (N, C, H, W) as the class says for this mode."""
        if self.weight_quantizer is not None and self.binary_input and not self.training:
            return self._evaluate_both(input)
        x = sign_ste(input) if self.binary_input else input
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
        # The counter of in-place changes that autograd keeps; it has no public name.
        version = self.weight._version  # noqa: SLF001
        if self._cached is None or self._cached[0] != version:
            self._cached = version, binarize(self.weight, self.weight_quantizer, self.center)
        return self._cached[1]

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode; either way the next evaluation quantizes afresh."""
        self._cached = None
        return super().train(mode)

    def extra_repr(self) -> str:
        """Return the parent's description and what is binary."""
        weights = "real" if self.weight_quantizer is None else f"{self.weight_quantizer}, center={self.center}"
        parent = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{parent}, weights={weights}, inputs={'sign' if self.binary_input else 'real'}"

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

    def _effective_weight(self) -> Tensor:
        if self.weight_quantizer is None:
            return self.weight
        if not self.training:
            return self.code().dense().to(self.weight.dtype)
        centered = subtract_center(self.weight, self.center)
        code = quantize(centered, self.weight_quantizer)
        if self.keeps_step_code:
            self.step_code = code
        return clipped_ste(centered, expand(*code), self.options.ste_width)

    @torch.no_grad()
    def _evaluate_both(self, x: Tensor) -> Tensor:
        code = self.code()
        alpha, beta = (scalars.float().view(-1, 1, 1) for scalars in (code.alpha, code.beta))
        x_sign = sign(x.float())
        selected = self._count(x_sign, code.mask.float())
        ones = torch.ones(self.groups, *code.mask.shape[1:], device=x.device)
        # One sum of inputs serves all filters of a group.
        total = self._count(x_sign, ones)
        if self.groups > 1:
            total = total.repeat_interleave(self.out_channels // self.groups, dim=1)
        y = (alpha - beta) * selected + beta * total
        if self.bias is not None:
            y = y + self.bias.float().view(-1, 1, 1)
        return y.to(x.dtype)

    def _count(self, x_sign: Tensor, zero_one: Tensor) -> Tensor:
        """Return the convolution of +-1 inputs with 0/1 weights in float32, rounded.

        Direct convolution is exact as it is; rounding makes it so where a backend picks Winograd or FFT.
        """
        with torch.autocast(x_sign.device.type, enabled=False):
            return cast(Tensor, self._conv_forward(x_sign, zero_one, None).round_())

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self._cached = None
        return cast(Self, super()._apply(*args, **kwargs))  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        # A copy's weight counts its changes from zero, so a copied code could pass for current.
        return {**self.__dict__, "_cached": None, "step_code": None}


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
