"""How long the packed form of a network takes, before anybody has trained it: its weights do not matter for that."""

from collections.abc import Mapping
from typing import Any

import torch

from dabnn.bench_networks import random_images, random_network
from dabnn.bench_place import Place
from dabnn.packed import pack
from dabnn.turns import in_turns

_BUDGET_S = 2.0


def packed_latency_ms(model: Mapping[str, Any], place: Place, *, turns: int | None = None) -> float:
    """Return the median time of one batch, images in memory to logits.

    Args:
        model: The network, as `dabnn.models.build` takes it.
        place: Where. With one thread on the CPU it is processor time, which other programs do not lengthen.
        turns: Calls that are measured; None for as many as fit into two seconds, at least 5.

    Raises:
        InvalidInputError: The network has no packed form, or the device is not there.
    """
    packed = pack(random_network(**model)).to(place.device, place.torch_dtype())
    images = random_images(packed.spec, place.batch, place.device, place.torch_dtype())
    before = torch.get_num_threads()
    torch.set_num_threads(place.threads)
    try:
        with torch.inference_mode():
            net = packed.running()
            times, _ = in_turns({"packed": lambda: net(images)}, images.device, turns=turns, budget_s=_BUDGET_S)
    finally:
        torch.set_num_threads(before)
    return 1e3 * times["packed"].median_s
