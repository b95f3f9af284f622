"""Training steps of sketchanetfbin at 225 pixels, batch 64, beside the same network without binary layers.

    PYTHONPATH=. python benchmarks/training_cost_cpu.py

At 1 thread and at all; see `training_cost.py` for what is compared and how.
"""

import os

import torch
from packed_conv import record
from training_cost import compare, make_nets, make_trainee, refuse_if_wrong

MODEL, SIZE, BATCH, TURNS = "sketchanetfbin", 225, 64, 9
QUANTIZERS = ["dab", "dab_warm", "xnor"]


def main() -> None:
    """Prints the table and writes `training_cost_cpu.json`."""
    images = torch.randn(BATCH, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    trainees = {name: make_trainee(net, images) for name, net in make_nets(MODEL, QUANTIZERS).items()}
    for name, trainee in trainees.items():
        refuse_if_wrong(name, trainee)
    rows = []
    for num_threads in sorted({1, os.cpu_count() or 1}):
        torch.set_num_threads(num_threads)
        rows += [{"threads": num_threads, **row} for row in compare(trainees, TURNS)]
    record(
        "training_cost_cpu", rows, model=MODEL, batch=BATCH, pixels=SIZE, turns=TURNS, inputs="sign", precision="fp32"
    )


if __name__ == "__main__":
    main()
