"""The kernel of real inputs and one-bit weights compiled for a CUDA device that is not there; see `compile_only`.

python tests/kernels/compile_only_weight.py
"""

import json

import torch
from compile_only import Driver, describe
from triton.runtime import driver

from kernels import weight_only_triton


def launch_all():
    """Launches the kernel in its largest blocks."""
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.zeros(1, 56, 56, 128, dtype=dtype).expand(64, -1, -1, -1).permute(0, 3, 1, 2)
        bits, scalars = torch.zeros(128, 3, 3, 4, dtype=torch.int32), torch.zeros(128)
        out = torch.zeros(1, dtype=dtype).expand(64, 56, 56, 128)
        weight_only_triton.launch(x, bits, scalars, scalars, None, (1, 1, 1, 1, 1, 1), 1, out)


if __name__ == "__main__":
    device = Driver()
    driver.set_active(device)
    launch_all()
    print(json.dumps([describe(*code) for code in device.codes], indent=1))
