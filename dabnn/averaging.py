"""The moving average of a network's weights, which is evaluated and exported in place of the weights themselves."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    r"""The exponential moving average of the parameters and floating buffers of a network.

    After step t = 1, 2, ...: average <- d_t average + (1 - d_t) weights, with d_t = min(decay, (1 + t) / (10 + t)): the
    first steps count for more, so that the initial weights do not linger in short runs (the rule of TensorFlow's
    `ExponentialMovingAverage` with `num_updates`). BatchNorm's running statistics are averaged with the weights that
    they belong to; whole-number buffers are copied. The average of latent weights is latent: it is binarized afresh.

    Attributes:
        decay: The limit of d_t, in (0, 1).
        num_updates: t.
        weights: Name -> average, the names of the network's state dictionary.
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        self.decay, self.num_updates = decay, 0
        self.weights = {name: tensor.clone() for name, tensor in net.state_dict().items()}

    @torch.no_grad()
    def update(self, net: nn.Module) -> None:
        """Take in the weights of `net` after a step."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        for name, tensor in net.state_dict().items():
            if tensor.is_floating_point():
                self.weights[name].lerp_(tensor, 1 - decay)
            else:
                self.weights[name].copy_(tensor)

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor], num_updates: int) -> None:
        """Continue an average that was saved."""
        self.num_updates = num_updates
        for name, tensor in self.weights.items():
            tensor.copy_(weights[name])

    @contextmanager
    def applied_to(self, net: nn.Module) -> Iterator[None]:
        """Within the block `net` holds the average; afterwards its own weights again."""
        own = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        net.load_state_dict(self.weights)
        try:
            yield
        finally:
            net.load_state_dict(own)
