"""Networks with BatchNorm as training leaves it."""

import torch
from torch.nn.modules.batchnorm import _BatchNorm

SIZE = (16, 12)


def with_statistics(network, seed=0):
    """Norms as training leaves them: statistics of what they see, and an affine map that does something."""
    generator = torch.Generator().manual_seed(seed)
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.momentum = None
        for parameter in norm.parameters():
            parameter.data.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
    with torch.no_grad():
        network.train()(torch.randn(16, 3, *(4 * side for side in SIZE), generator=generator))
    return network


def norms_of(network):
    return [module for module in network.modules() if isinstance(module, _BatchNorm)]
