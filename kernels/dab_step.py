"""What a layer with DAB weights does in every training step, forward and backward, as one operator each.

Forward: c = w - mean, the exact optimum of each filter (`kernels.dab`), and y = alpha where c >= threshold, else beta.
Backward: the straight-through gradient of y by w. Both work on one filter at a time, so on CUDA each is one launch, and
a filter stays in the cache from its first to its last use; the parts, one after the other, are some 25 and 3 to 20
launches a layer. The CPU gains nothing from it: its parts are fused already, so `dabnn.layers` calls them singly. Left
out: other quantizers, the search from a known threshold and the other estimators, which `dabnn.gradients` composes.
"""

import torch
from torch import Tensor

from kernels.dab import has_block_filters, has_triton


def dab_step(weight: Tensor, center: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Centres each filter, finds its best two-valued approximation, and writes that out; no gradient.

    Args:
        weight: (F, C, ...), float32 or float64, not empty.
        center: what is subtracted: "none", "filter" (the mean of the filter) or "tap" (the mean over the C channels at
            each kernel position).

    Returns:
        dense: alpha where real >= threshold, else beta; shape, type and, where each filter is one block of memory,
            strides of `weight`.
        real: the centred weight, likewise; the weight itself without centring.
        threshold: (F,) as `kernels.dab_threshold` of `real`, as are the others.
        alpha: (F,); alpha or beta is not finite where a weight of the filter is not.
        beta: (F,).
    """
    block = weight.detach()
    if not has_block_filters(block):
        block = block.contiguous()
    dense, real, threshold, alpha, beta = torch.ops.dab.dab_step(block, center)
    return dense, block if center == "none" else real, threshold, alpha, beta


def dab_step_backward(
    grad: Tensor,
    real: Tensor,
    threshold: Tensor,
    alpha: Tensor,
    beta: Tensor,
    *,
    center: str,
    width: float,
    is_about_threshold: bool,
    has_means: bool,
) -> Tensor:
    r"""Returns the gradient by the weight for one by `dense`.

    For each filter of n weights c (`real`), K of them at or above the threshold, e = [c >= threshold], g the gradient:

        h = g [|c - middle| <= width]  ( + e sum(g e) / K + (1 - e) sum(g (1 - e)) / (n - K)  with `has_means`)

    and the result is h less its mean over what `center` took the mean of, the chain rule of centring. The sums are
    the exact gradient of alpha and beta as means of their groups.

    Args:
        grad: shape and type of `real`.
        real: (F, C, ...) from `dab_step`, as are the next three.
        threshold: (F,).
        alpha: (F,).
        beta: (F,).
        center: as `dab_step` had it.
        width: half width of the window in which the gradient passes, rounded to float32; infinite for none.
        is_about_threshold: whether its middle is (alpha + beta) / 2 rather than 0.
        has_means: whether alpha and beta pass the gradient on to their groups.

    Returns:
        Shape, type and strides of `real`.
    """
    if grad.stride() != real.stride():
        grad = torch.empty_like(real).copy_(grad)
    options = (center, width, is_about_threshold, has_means)
    to_weight: Tensor = torch.ops.dab.dab_step_backward(grad, real, threshold, alpha, beta, *options)
    return to_weight


def dab_step_reference(weight: Tensor, center: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Plain-torch `dab_step`; `real` is empty without centring."""
    real = _centered(weight, center)
    threshold, alpha, beta = torch.ops.dab.dab_threshold(real)
    dense = torch.where(real >= _per_row(threshold, real), _per_row(alpha, real), _per_row(beta, real))
    kept = weight.new_empty(0) if center == "none" else torch.empty_like(weight).copy_(real)
    return torch.empty_like(weight).copy_(dense), kept, threshold, alpha, beta


def dab_step_backward_reference(
    grad: Tensor,
    real: Tensor,
    threshold: Tensor,
    alpha: Tensor,
    beta: Tensor,
    center: str,
    width: float,
    is_about_threshold: bool,
    has_means: bool,
) -> Tensor:
    """Plain-torch `dab_step_backward`."""
    middle = _per_row((alpha + beta) / 2, real) if is_about_threshold else 0.0
    edge = torch.tensor(width, dtype=torch.float32, device=real.device)
    passed = torch.where((real - middle).abs() <= edge, grad, 0)
    if has_means:
        is_upper = real >= _per_row(threshold, real)
        for is_member in (is_upper, ~is_upper):
            mean = torch.where(is_member, grad, 0).flatten(1).sum(1) / is_member.flatten(1).sum(1).clamp_min(1)
            passed = passed + torch.where(is_member, _per_row(mean, real), 0)
    return torch.empty_like(real).copy_(_centered(passed, center))


def _centered(values: Tensor, center: str) -> Tensor:
    if center == "none":
        return values
    return values - values.mean((1,) if center == "tap" else tuple(range(1, values.dim())), keepdim=True)


def _per_row(values: Tensor, like: Tensor) -> Tensor:
    return values.view((-1,) + (1,) * (like.dim() - 1))


def _dab_step_fake(weight: Tensor, center: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    real = weight.new_empty(0) if center == "none" else torch.empty_like(weight)
    threshold = weight.new_empty(weight.shape[0])
    return torch.empty_like(weight), real, threshold, torch.empty_like(threshold), torch.empty_like(threshold)


def _dab_step_backward_fake(grad: Tensor, real: Tensor, *_rest: object) -> Tensor:  # noqa: ARG001 - as the operator's
    return torch.empty_like(real)


def _dab_step_cuda(weight: Tensor, center: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if not has_triton():
        return dab_step_reference(weight, center)
    from kernels import dab_step_triton

    outputs = _dab_step_fake(weight, center)
    dab_step_triton.launch(weight, center, *outputs)
    return outputs


def _dab_step_backward_cuda(
    grad: Tensor,
    real: Tensor,
    threshold: Tensor,
    alpha: Tensor,
    beta: Tensor,
    center: str,
    width: float,
    is_about_threshold: bool,
    has_means: bool,
) -> Tensor:
    scalars = (threshold, alpha, beta)
    if not has_triton():
        return dab_step_backward_reference(grad, real, *scalars, center, width, is_about_threshold, has_means)
    from kernels import dab_step_triton

    to_weight = torch.empty_like(real)
    window = dab_step_triton.Window(width, is_about_threshold, has_means)
    dab_step_triton.launch_backward(grad, real, *scalars, to_weight, center, window)
    return to_weight


torch.library.define(
    "dab::dab_step",
    "(Tensor weight, str center) -> (Tensor dense, Tensor real, Tensor threshold, Tensor alpha, Tensor beta)",
)
torch.library.impl("dab::dab_step", "CompositeExplicitAutograd", dab_step_reference)
torch.library.impl("dab::dab_step", "CUDA", _dab_step_cuda)
torch.library.register_fake("dab::dab_step", _dab_step_fake)
torch.library.define(
    "dab::dab_step_backward",
    "(Tensor grad, Tensor real, Tensor threshold, Tensor alpha, Tensor beta, str center, float width, "
    "bool is_about_threshold, bool has_means) -> Tensor",
)
torch.library.impl("dab::dab_step_backward", "CompositeExplicitAutograd", dab_step_backward_reference)
torch.library.impl("dab::dab_step_backward", "CUDA", _dab_step_backward_cuda)
torch.library.register_fake("dab::dab_step_backward", _dab_step_backward_fake)
