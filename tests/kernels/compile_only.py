"""A CUDA device that is not there: kernels are compiled for it, their code is kept, a launch does nothing.

    python tests/kernels/compile_only.py       (a process of its own: Triton has one driver, and its interpreter is on
                                               or off from the start)

Prints one JSON list with what was compiled for compute capability 9.0: the name, how often its PTX and its machine code
hold what matters, registers and bytes of the stack.
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from kernels import conv_dense_triton, conv_gluon, conv_triton, packing_triton
from kernels.conv_cuda import arrange
from kernels.conv_fragments import Tile
from kernels.conv_layer import Filters, geometry_of

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Driver:
    """Triton's side of a device of compute capability 9.0."""

    def __init__(self):
        properties = {"max_shared_mem": 232448, "max_num_regs": 65536, "multiprocessor_count": 132, "warpSize": 32}
        self.codes = []
        self.utils = SimpleNamespace(get_device_properties=lambda device: properties, load_binary=self.load)
        self.launcher_cls = lambda source, metadata: lambda *args: None

    def load(self, name, code, shared, device):
        self.codes.append((name, code))
        return None, None, 0, 0, 1024

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def layer(channels, filters, size, kernel=3, stride=1, padding=1, batch=2):
    """Tensors of a layer, on the CPU."""
    bits = torch.zeros(batch, size, size, -(-channels // 32), dtype=torch.int32)
    weight_bits = torch.zeros(filters, kernel, kernel, bits.shape[3], dtype=torch.int32)
    geometry = geometry_of(bits.shape, weight_bits.shape, channels, (stride, stride), (padding, padding))
    return bits, weight_bits, geometry


def launch_all():
    """Launches every kernel of packed convolutions in the forms that layers of ResNet-18 and odd ones use."""
    for case in [(256, 256, 14), (100, 45, 9, 5, 2, 2)]:
        bits, weight_bits, geometry = layer(*case)
        scalars = torch.zeros(geometry.filters)
        shape = (bits.shape[0], geometry.out_height, geometry.out_width)
        values = Filters(weight_bits, scalars, scalars, scalars)
        packed = Filters(weight_bits, scalars, scalars, None, scalars, scalars > 0)
        for filters, out in (
            (values, torch.zeros(*shape, geometry.filters, dtype=torch.bfloat16)),
            (packed, torch.zeros(*shape, geometry.out_words, dtype=torch.int32)),
        ):
            tiles = (Tile(4, 1, 4, 1), Tile(2, 1, 1, 4))
            for tile in tiles if geometry.channels == 256 else tiles[filters is packed :][:1]:
                weights, *counts = arrange(weight_bits, geometry, tile)
                conv_gluon.launch(bits, weights, tuple(counts), filters, geometry, tile, out)
    conv_triton.launch_layer(bits, filters, geometry, out)
    x = torch.zeros(2, 40, 5, 5)
    packing_triton.launch(x, torch.zeros(2, 5, 5, 2, dtype=torch.int32))
    packing_triton.launch_reached(
        x.to(memory_format=torch.channels_last), x[0, :, 0, 0], x[0, :, 0, 0] > 0, torch.zeros(2, 5, 5, 2).int()
    )
    conv_dense_triton.launch(bits, conv_dense_triton.masks(weight_bits, geometry), filters, geometry, out)


def describe(name, code):
    """Counts what the machine code of a kernel holds."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(code)
        listing = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True)
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr).groups())
    instructions = re.findall(r"\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][A-Z0-9.]*)", listing.stdout)
    return {
        "name": name,
        "registers": registers,
        "stack_bytes": stack,
        "instructions": len(instructions),
        "bit_products": instructions.count("BMMA.168256.AND.POPC"),
        "calls": sum(each.startswith("CALL") for each in instructions),
        "population_counts": instructions.count("POPC"),
        "fused_multiply_adds": sum(each.startswith("FFMA") for each in instructions),
        "wide_stores": sum(each in ("STG.E.128", "STG.E.U8") for each in instructions),
    }


if __name__ == "__main__":
    device = Driver()
    driver.set_active(device)
    launch_all()
    print(json.dumps([describe(*code) for code in device.codes], indent=1))
