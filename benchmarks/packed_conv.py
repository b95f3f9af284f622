"""What the packed-convolution benchmarks of CPU and GPU share: layers, the check before timing, the record after.

The layers are the four 3x3 sizes of ResNet-18 at 224 pixels, 115.6 million multiply-accumulates an image each. Peers
do the same convolution in ordinary numbers, so they compute far more precisely; the figures say what the layer costs
in time.
"""

import json
import os
import platform
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import pack_signs, packed_conv2d, quantize_dab

LAYERS = [(64, 56), (128, 28), (256, 14), (512, 7)]


@dataclass(frozen=True)
class Case:
    """One layer with random data.

    Attributes:
        name: Height x width x channels.
        batch: Images.
        x: (N, C, H, W) float32, random.
        sign: Its signs, float32.
        dense: (C, C, 3, 3) float32, the two-valued weight.
        mask: The same shape, 1.0 where the weight is alpha.
        weight_bits: The mask packed.
        alpha: (C,) float32.
        beta: (C,) float32.
    """

    name: str
    batch: int
    x: Tensor
    sign: Tensor
    dense: Tensor
    mask: Tensor
    weight_bits: Tensor
    alpha: Tensor
    beta: Tensor

    def packed(self, bits: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns the layer's output from packed inputs."""
        channels = self.x.shape[1]
        return packed_conv2d(bits, self.weight_bits, self.alpha, self.beta, in_channels=channels, dtype=dtype)

    @property
    def num_macs(self) -> int:
        """Multiply-accumulates of all images."""
        return self.batch * self.dense.numel() * self.x.shape[2] * self.x.shape[3]


def make_case(channels: int, size: int, batch: int, device: str) -> Case:
    """Returns a layer with seeded random weights and inputs."""
    generator = torch.Generator().manual_seed(channels)
    x = torch.randn(batch, channels, size, size, generator=generator).to(device)
    mask, alpha, beta = quantize_dab(torch.randn(channels, channels, 3, 3, generator=generator).to(device))
    real_mask = mask.float()
    dense = torch.where(mask, alpha.view(-1, 1, 1, 1), beta.view(-1, 1, 1, 1))
    sign = torch.where(x >= 0, 1.0, -1.0)
    bits = pack_signs(2 * real_mask - 1)
    return Case(f"{size}x{size}x{channels}", batch, x, sign, dense, real_mask, bits, alpha, beta)


def refuse_if_wrong(case: Case) -> None:
    """Raises RuntimeError unless the packed layer equals float64 convolutions with the same epilogue, bit for bit."""
    selected = F.conv2d(case.sign.double(), case.mask.double(), padding=1).float()
    total = F.conv2d(case.sign.double(), torch.ones_like(case.mask[:1], dtype=torch.float64), padding=1).float()
    expected = (case.alpha - case.beta).view(-1, 1, 1) * selected + case.beta.view(-1, 1, 1) * total
    if not torch.equal(case.packed(pack_signs(case.x)), expected):
        raise RuntimeError(f"{case.name}, batch {case.batch}: the packed convolution is wrong, so it is not timed")


def record(name: str, rows: list[dict[str, Any]], **conditions: Any) -> None:
    """Prints rows as a table and writes them with date, commit, hardware and versions to `OUT/NAME.json`."""
    columns = list(rows[0])
    cells = [columns, *([_cell(row[column]) for column in columns] for row in rows)]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    document = {
        "benchmark": name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "hardware": _hardware(),
        "versions": _versions(),
        "conditions": conditions | {"load_average_1min": os.getloadavg()[0]},
        "rows": rows,
    }
    folder = Path(os.environ.get("OUT", "benchmarks/results"))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(document, indent=2) + "\n")
    print(f"written to {path}")


def _cell(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _commit() -> str:
    described = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    result = subprocess.run(described, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"


def _hardware() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": models[0] if models else platform.processor(), "cores": os.cpu_count(), "gpu": gpu}


def _versions() -> dict[str, str | None]:
    return {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
