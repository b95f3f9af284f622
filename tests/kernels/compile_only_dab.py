"""The kernels of the DAB quantizer compiled for a CUDA device that is not there; see `compile_only`.

python tests/kernels/compile_only_dab.py
"""

import json

import torch
from compile_only import Driver, describe
from triton.runtime import driver

from kernels import dab_step_triton, dab_triton, dab_warm_triton


def launch_all():
    """Launches every kernel for a layer of ResNet-18."""
    weight = torch.zeros(2, 512, 3, 3)
    rows, scalars = weight.flatten(1), [torch.zeros(2) for _ in range(3)]
    dab_triton.launch(rows, *scalars)
    dab_triton.launch_many([rows], torch.zeros(weight.shape.numel(), dtype=torch.bool), *scalars)
    dab_warm_triton.launch(rows, scalars[0], *scalars)
    dab_step_triton.launch(weight, "tap", torch.zeros_like(weight), torch.zeros_like(weight), *scalars)
    window = dab_step_triton.Window(1.0, True, True)
    dab_step_triton.launch_backward(weight, weight, *scalars, weight, "tap", window)


if __name__ == "__main__":
    device = Driver()
    driver.set_active(device)
    launch_all()
    print(json.dumps([describe(*code) for code in device.codes], indent=1))
