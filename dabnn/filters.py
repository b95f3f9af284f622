r"""How the weights of each binary layer lie about the two values that stand for them.

Filters differ in their alpha and beta. To look at all of a layer at once, a weight c of filter f is measured from the
filter's threshold t_f = (alpha_f + beta_f) / 2 in units of its half gap: z = 2 (c - t_f) / (alpha_f - beta_f). So
alpha stands at 1, beta at -1 and the border between them at 0 in every filter. Filters with alpha = beta are left out.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dabnn.instruments import code_metrics, threshold
from dabnn.layers import BinaryConv2d
from dabnn.plans import numbered_convs
from dabnn.quantizers import subtract_center

_NUM_BINS = 48
_LIMIT = 4.0
_NUM_BINS_OF_FILTER = 24
_NUM_FILTERS = 3


@dataclass(frozen=True)
class FilterHistogram:
    """One filter in its own units.

    Attributes:
        number: Of the filter in its layer, from 0.
        edges: Borders of the bins, one more than counts.
        counts: Weights in each bin.
        alpha: Upper value.
        beta: Lower value.
        threshold: Border between the weights nearer to either.
        error: Squared error over scatter, as the instrument `weight_error`.
    """

    number: int
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    alpha: float
    beta: float
    threshold: float
    error: float


@dataclass(frozen=True)
class LayerHistogram:
    """One layer with binary weights.

    Attributes:
        number: Layer number.
        path: Name inside the network.
        num_filters: Filters.
        edges: Borders of the bins of z, one more than shares; beyond the outermost lie the rest.
        shares: Share of the layer's weights in each bin.
        gap: Mean of alpha - beta over the filters.
        upper_share: Share of the weights at alpha.
        error: Squared error over scatter.
        filters: The filters that the code fits best, middling and worst.
    """

    number: int
    path: str
    num_filters: int
    edges: tuple[float, ...]
    shares: tuple[float, ...]
    gap: float
    upper_share: float
    error: float | None
    filters: tuple[FilterHistogram, ...]


@torch.no_grad()
def layer_histograms(net: nn.Module) -> list[LayerHistogram]:
    """Return the histograms of every layer with binary weights, in order.

    Raises:
        InvalidInputError: The weights of a layer are not finite.
    """
    return [
        _layer(number, path, conv)
        for number, (path, conv) in numbered_convs(net).items()
        if isinstance(conv, BinaryConv2d) and conv.weight_quantizer is not None
    ]


def _layer(number: int, path: str, conv: BinaryConv2d) -> LayerHistogram:
    code, centered = conv.code(), subtract_center(conv.weight, conv.center)
    flat, middle = centered.flatten(1).double(), threshold(code.alpha, code.beta).double()
    half = (code.alpha - code.beta).double() / 2
    lives = half > 0
    z = ((flat - middle[:, None]) / half[:, None])[lives].clamp(-_LIMIT, _LIMIT)
    counts = torch.histc(z, _NUM_BINS, -_LIMIT, _LIMIT)
    metrics = code_metrics(code, centered)
    scatter = (flat - flat.mean(1, keepdim=True)).square().sum(1)
    errors = torch.where(scatter > 0, code.error.double() / scatter.clamp_min(1e-30), torch.inf)
    order = errors.argsort(stable=True)
    chosen = dict.fromkeys(int(order[place]) for place in _places(len(order)))
    return LayerHistogram(
        number=number,
        path=path,
        num_filters=len(flat),
        edges=_edges(-_LIMIT, _LIMIT, _NUM_BINS),
        shares=tuple((counts / max(1, z.numel())).tolist()),
        gap=metrics["gap"],
        upper_share=metrics["upper_share"],
        error=metrics.get("weight_error"),
        filters=tuple(
            _filter(index, flat[index], float(code.alpha[index]), float(code.beta[index]), float(errors[index]))
            for index in chosen
        ),
    )


def _filter(number: int, weights: Tensor, alpha: float, beta: float, error: float) -> FilterHistogram:
    low, high = min(float(weights.min()), beta), max(float(weights.max()), alpha)
    high = high if high > low else low + 1e-6
    counts = torch.histc(weights, _NUM_BINS_OF_FILTER, low, high)
    return FilterHistogram(
        number=number,
        edges=_edges(low, high, _NUM_BINS_OF_FILTER),
        counts=tuple(int(count) for count in counts),
        alpha=alpha,
        beta=beta,
        threshold=(alpha + beta) / 2,
        error=error,
    )


def _places(size: int) -> list[int]:
    return [round(share * (size - 1) / (_NUM_FILTERS - 1)) for share in range(_NUM_FILTERS)]


def _edges(low: float, high: float, num_bins: int) -> tuple[float, ...]:
    return tuple(low + (high - low) * step / num_bins for step in range(num_bins + 1))
