"""When a run has exploded: by its gradient, always, and by its loss where somebody hands that over. All numbers are 0-dim."""

from __future__ import annotations

import torch
from torch import Tensor

# A gradient this many times longer than the longest of late is taken for an explosion: a run with growth limit 2 cannot reach
# it in one step on a quadratic before the rate has passed the edge of stability. Not than the one before: where most of the
# data are learnt, a batch now and then has a gradient that is ten times as long as that of the others.
NORM_EXPLOSION = 10.0
# A loss above the mean of late by this many times that mean, or its spread if that is more. Source: the method's authors (25
# times the best); the mean ours, since with small batches the best loss is one that swung far down.
LOSS_EXPLOSION = 25.0
# What is left of mean and spread after a loss, and how many losses they must have seen.
LOSS_MEMORY = 0.9
LOSSES = 10
# What is kept of the losses: their mean, spread and number.
WITNESS = ("loss", "spread", "losses")


def exploded_norm(square: Tensor, longest: Tensor) -> Tensor:
    """Whether ‖G_t‖² is that of an explosion, beside the square of the longest gradient of late."""
    return torch.isfinite(square) & (square > NORM_EXPLOSION**2 * longest)


def exploded_loss(value: Tensor, mean: Tensor, spread: Tensor, seen: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Whether the loss is beyond what a step may do, and mean, spread and their number of losses after it.

    They forget, and start anew at an explosion, so that no two steps in a row are refused, and a run that goes on with other
    data learns what its losses are.
    """
    finite = torch.isfinite(value)
    limit = mean + LOSS_EXPLOSION * torch.maximum(spread, mean.abs())
    refused = torch.where(finite, (seen >= LOSSES) & (value > limit), seen > 0)
    kept = torch.clamp(seen / (seen + 1.0), max=LOSS_MEMORY)
    value = torch.where(finite, value, mean)
    new_mean = kept * mean + (1.0 - kept) * value
    new_spread = kept * spread + (1.0 - kept) * (value - new_mean).abs()
    zero = torch.zeros_like(mean)
    results = (new_mean, new_spread, seen + finite)
    mean, spread, seen = (torch.where(refused, zero, result) for result in results)
    return refused, mean, spread, seen
