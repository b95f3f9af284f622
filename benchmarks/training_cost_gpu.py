"""Steps of resnetfbin18, batch 256, bfloat16, channels last, compiled, beside the same network in real numbers.

    PYTHONPATH=. python benchmarks/training_cost_gpu.py

See `training_cost.py` for what is compared and how.
"""

import torch
from packed_conv import record
from training_cost import compare, make_nets, make_trainee, refuse_if_wrong

MODEL, SIZE, BATCH, TURNS = "resnetfbin18", 224, 256, 40
QUANTIZERS = ["dab", "dab_warm", "xnor"]


def main() -> None:
    """Prints the table and writes `training_cost_gpu.json`."""
    images = torch.randn(BATCH, 1, SIZE, SIZE, device="cuda").to(memory_format=torch.channels_last)
    trainees = {}
    for name, net in make_nets(MODEL, QUANTIZERS).items():
        on_device = net.to("cuda", memory_format=torch.channels_last)
        trainees[name] = make_trainee(on_device, images, compiled=True, autocast=True)
        refuse_if_wrong(name, trainees[name])
    rows = compare(trainees, TURNS, synchronize=torch.cuda.synchronize)
    record(
        "training_cost_gpu", rows, model=MODEL, batch=BATCH, pixels=SIZE, turns=TURNS, inputs="sign", precision="bf16"
    )


if __name__ == "__main__":
    main()
