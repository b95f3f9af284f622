"""Draws the pictures of docs/quantizers.md from the code itself: quantizers on three filters, estimators, their error.

    PYTHONPATH=. python tools/plot_quantizers.py [FOLDER]

It writes PNG files into `docs/images/` by default. Weights are seeded, so that the same code draws the same pictures.
"""

import sys
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from dabnn.gradients import Estimator
from dabnn.quantizers import QUANTIZERS, binarize

# Those that are the same function of the weight as `dab` share its picture.
_DRAWN = [name for name in QUANTIZERS if name not in ("dab_warm", "dab_learned")]
_SIZE = 4608


def filters() -> dict[str, Tensor]:
    """Returns one filter each of a symmetric, a skewed and a two-peaked distribution, (1, n)."""
    generator = torch.Generator().manual_seed(0)
    normal, other = (torch.randn(1, _SIZE, generator=generator, dtype=torch.float64) for _ in range(2))
    skewed = (0.5 * normal).exp() - 1
    is_upper = torch.rand(1, _SIZE, generator=generator) < 0.3
    return {
        "symmetric": normal,
        "skewed": skewed,
        "two peaks": torch.where(is_upper, 1.2 + 0.3 * other, -0.5 + 0.3 * other),
    }


def relative_error(weight: Tensor, method: str) -> float:
    """Returns the squared error over the scatter about the mean."""
    scatter = (weight - weight.mean()).square().sum()
    return float(binarize(weight, method).error.sum() / scatter)


def draw_quantizer(axes: Axes, weight: Tensor, method: str) -> None:
    """Draws the histogram of a filter with the two values and the threshold of one quantizer."""
    code = binarize(weight, method)
    threshold = float(weight[code.mask].min()) if bool(code.mask.any()) else float(weight.max())
    axes.hist(weight.flatten().numpy(), bins=60, range=(-3, 3.5), color="0.8", histtype="stepfilled")
    axes.axvline(threshold, color="0.3", linestyle=":", linewidth=1)
    for value, color in ((float(code.alpha), "tab:red"), (float(code.beta), "tab:blue")):
        axes.axvline(value, color=color, linewidth=1.8)
    axes.set_title(f"{method}: error {relative_error(weight, method):.3f}", fontsize=8)
    axes.set_yticks([])
    axes.tick_params(labelsize=7)


def draw_quantizers(path: Path) -> None:
    """Draws every quantizer on every filter."""
    figure, grid = plt.subplots(3, len(_DRAWN), figsize=(2.1 * len(_DRAWN), 4.6), sharex=True, layout="constrained")
    for row, (name, weight) in zip(grid, filters().items(), strict=True):
        row[0].set_ylabel(name, fontsize=9)
        for axes, method in zip(row, _DRAWN, strict=True):
            draw_quantizer(axes, weight, method)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def draw_estimators(path: Path) -> None:
    """Draws the factor of every estimator, for two widths or three moments of the annealing."""
    x = torch.linspace(-2.5, 2.5, 501)
    variants = {
        "clipped": [("width 1", Estimator("clipped", 1.0)), ("width 2", Estimator("clipped", 2.0))],
        "polynomial": [("width 1", Estimator("polynomial", 1.0)), ("width 2", Estimator("polynomial", 2.0))],
        "ede": [(f"progress {p}", Estimator("ede", 1.0, p)) for p in (0.0, 0.5, 0.75)],
        "identity": [("any width", Estimator("identity"))],
    }
    figure, row = plt.subplots(1, len(variants), figsize=(10, 2.3), sharey=True, layout="constrained")
    for axes, (name, estimators) in zip(row, variants.items(), strict=True):
        for label, estimator in estimators:
            axes.plot(x.numpy(), estimator.backward(torch.ones_like(x), x).numpy(), label=label, linewidth=1.4)
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("x - middle", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.legend(fontsize=6, loc="upper left", frameon=False)
    row[0].set_ylabel("F, factor of the gradient", fontsize=8)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def draw_errors(path: Path) -> None:
    """Draws the error of every quantizer as a filter's distribution grows more skewed."""
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(8, _SIZE, generator=generator, dtype=torch.float64)
    skews = np.linspace(0.02, 1.0, 25)
    figure, axes = plt.subplots(figsize=(5.2, 3), layout="constrained")
    for method in _DRAWN:
        if method == "sign":
            continue
        errors = []
        for skew in skews:
            weight = ((skew * normal).exp() - 1) / skew
            weight = weight - weight.mean(1, keepdim=True)
            scatter = weight.square().sum(1)
            errors.append(float((binarize(weight, method).error / scatter).mean()))
        axes.plot(skews, errors, label=method, linewidth=1.4, linestyle="--" if method == "lsbq" else "-")
    axes.set_xlabel("s of centred log-normal weights (0: Gaussian)", fontsize=8)
    axes.set_ylabel("squared error / scatter", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main(folder: Path) -> None:
    """Writes all pictures into `folder`."""
    mpl.use("agg")
    folder.mkdir(parents=True, exist_ok=True)
    draw_quantizers(folder / "quantizers.png")
    draw_estimators(folder / "estimators.png")
    draw_errors(folder / "quantizer_errors.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "docs" / "images")
