"""What is minimised: cross-entropy with smoothed labels, distillation from a teacher, a penalty on latent weights.

Pure functions; the loss of a sample is a number, so that ranks with different shares of a batch can weight it.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dabnn.layers import BinaryConv2d


def smoothed_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    r"""Return the cross-entropy of each sample with smoothed labels.

    -sum_c q_c log p_c with p = softmax(logits) and q = (1 - smoothing) onehot(label) + smoothing / classes (Szegedy et
    al., arXiv 1512.00567, section 7).

    Args:
        logits: (n, classes), floating.
        labels: (n,), int64.
        smoothing: Share of the target that is spread evenly, in [0, 1).

    Returns:
        (n,) float32.
    """
    return F.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=smoothing)


def mixed_cross_entropy(
    logits: Tensor, labels: Tensor, smoothing: float, partner_labels: Tensor, weights: Tensor
) -> Tensor:
    r"""Return the cross-entropy of each sample that is a mixture of two.

    w CE(label) + (1 - w) CE(partner's label), both smoothed as in `smoothed_cross_entropy`: the cross-entropy with
    the mixture of the two targets (mixup, arXiv 1710.09412; CutMix, arXiv 1905.04899).

    Args:
        logits: (n, classes), floating.
        labels: (n,), int64.
        smoothing: Share of the target that is spread evenly, in [0, 1).
        partner_labels: (n,), int64: of the images that were mixed in.
        weights: (n,), float: w, the share of the first label.

    Returns:
        (n,) float32.
    """
    own = smoothed_cross_entropy(logits, labels, smoothing)
    return weights * own + (1 - weights) * smoothed_cross_entropy(logits, partner_labels, smoothing)


def distillation(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    r"""Return the distance of each sample's softened answer from the teacher's.

    T^2 KL(softmax(teacher_logits / T) || softmax(logits / T)). The factor T^2 keeps the size of the gradient when T
    changes (Hinton et al., arXiv 1503.02531, section 2). No gradient reaches the teacher.

    Args:
        logits: (n, classes), floating.
        teacher_logits: (n, classes), floating.
        temperature: T > 0.

    Returns:
        (n,) float32.
    """
    target = F.log_softmax(teacher_logits.detach().float() / temperature, dim=1)
    answer = F.log_softmax(logits.float() / temperature, dim=1)
    return temperature**2 * F.kl_div(answer, target, reduction="none", log_target=True).sum(dim=1)


def kurtosis_penalty(weights: list[Tensor], target: float) -> Tensor:
    r"""Return how far the latent weights of the layers are from a wanted shape of distribution.

    (1/L) sum_l (Kurt(w_l) - target)^2 over L layers, Kurt(w) = mean(((w - mean(w)) / std(w))^4) with the biased std.
    Kurt is 3 for normal weights, 1.8 for uniform ones and 1, its least value, for two equal peaks, which two values
    represent without error. Gradient: the exact one. A layer whose weights are all equal counts as having the target:
    its shape is not defined. Sources: KURE, arXiv 2002.07686; for binary networks arXiv 2204.02004.

    Args:
        weights: Latent weights, one tensor of any shape a layer; at least one.
        target: Kurtosis aimed at.

    Returns:
        A scalar, float32.
    """
    return torch.stack([(_kurtosis(weight.float(), target) - target) ** 2 for weight in weights]).mean()


def _kurtosis(weight: Tensor, of_constant: float) -> Tensor:
    centered = weight - weight.mean()
    variance = centered.square().mean()
    if not variance > 0:
        return weight.new_full((), of_constant)
    return (centered / variance.sqrt()).pow(4).mean()


def latent_weights(net: nn.Module) -> list[Tensor]:
    """Return the latent weights of the layers with binary weights, in the order of the modules."""
    layers = (module for module in net.modules() if isinstance(module, BinaryConv2d))
    return [layer.weight for layer in layers if layer.weight_quantizer is not None]
