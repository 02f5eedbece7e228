"""The average of the iterates, from all of them."""

import torch

from elra_hf import ElraAdamW


def average(iterates, optimizer="elra_adamw"):
    """Of tensors of one shape, in their order, in float64. Of elra_adamw the k-th weighs k, of others it is the mean."""
    stacked = torch.stack([x.detach().double() for x in iterates])
    weights = torch.arange(1, len(stacked) + 1, dtype=torch.float64) ** (optimizer in ("elra_adamw", ElraAdamW))
    return torch.tensordot(weights / weights.sum(), stacked, 1)
