"""The average of the iterates, from all of them."""

import torch


def average(iterates):
    """Of tensors of one shape, in their order: the k-th weighs k. In float64."""
    stacked = torch.stack([x.detach().double() for x in iterates])
    weights = torch.arange(1, len(stacked) + 1, dtype=torch.float64)
    return torch.tensordot(weights / weights.sum(), stacked, 1)
