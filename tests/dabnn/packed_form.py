"""What a packed model is compared with bit for bit: the network as it runs, channels-last."""

import torch
from torch import Tensor, nn

from dabnn.layers import BinaryConv2d
from dabnn.models import Network


def channels_last_logits(net: Network, x: Tensor) -> Tensor:
    """Return the logits with images and real-valued weights channels-last, in which float layers round differently.

    Latent weights of binary layers stay: their means would be summed up in another order.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and not (isinstance(module, BinaryConv2d) and module.weight_quantizer):
            module.weight.data = module.weight.data.to(memory_format=torch.channels_last)
    logits: Tensor = net(x.to(memory_format=torch.channels_last))
    return logits
