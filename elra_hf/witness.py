"""When a run has exploded: by its gradient, always, and by its loss where somebody hands that over. All numbers are 0-dim."""

from __future__ import annotations

import torch
from torch import Tensor

# A gradient this many times longer than the longest of late is taken for an explosion: a run with growth limit 2 cannot reach
# it in one step on a quadratic before the rate has passed the edge of stability. Not than the one before: where most of the
# data are learnt, a batch now and then has a gradient that is ten times as long as that of the others.
NORM_EXPLOSION = 10.0
# The same where it points back. On a quadratic, a stable rate that doubles makes it three times as long; with 3 in place of 5,
# runs that had all but converged went back to an average that is worse.
NORM_OVERSHOOT = 5.0
# And where it has grown step by step and points back: two lengths that no step may raise by more than these factors, the
# first so that one long gradient is no explosion, the second so that what it is compared with does not keep up with one.
LASTING_RISE = 3.0
CALM_RISE = 1.1
# What is left of the longest gradient's square after a step.
NORM_MEMORY = 0.98
# What is kept of the gradients' squares: the longest of late, and these two lengths.
NORMS = ("longest", "lasting", "calm")
# A loss above the mean of late by this many times that mean, or its spread if that is more. Source: the method's authors (25
# times the best); the mean ours, since with small batches the best loss is one that swung far down.
LOSS_EXPLOSION = 25.0
# What is left of mean and spread after a loss, and how many losses they must have seen.
LOSS_MEMORY = 0.9
LOSSES = 10
# What is kept of the losses: their mean, spread and number.
WITNESS = ("loss", "spread", "losses")


def norms(square: Tensor, known: Tensor, longest: Tensor, lasting: Tensor, calm: Tensor, moving: Tensor) -> tuple[Tensor, ...]:
    """`NORMS` after a gradient of that square, ``known`` without tensors that have only come or come back.

    The last two start anew with such tensors, and where x had not moved, as after an explosion.
    """
    goes_on = moving & (calm > 0) & (known >= square)
    lasting = torch.where(goes_on, torch.minimum(square, LASTING_RISE**2 * lasting), square)
    calm = torch.where(goes_on, torch.maximum(NORM_MEMORY * calm, torch.minimum(square, CALM_RISE**2 * calm)), square)
    return torch.maximum(NORM_MEMORY * longest, square), lasting, calm


def exploded_norm(square: Tensor, longest: Tensor, lasting: Tensor, calm: Tensor, overshot: Tensor) -> Tensor:
    """Whether ‖G_t‖² is that of an explosion, beside `NORMS`: at once, or past the minimum, there also step by step."""
    limit = NORM_EXPLOSION**2
    grown = (torch.minimum(square, LASTING_RISE**2 * lasting) > limit * calm) & (calm > 0)
    past = overshot & (grown | (square > NORM_OVERSHOOT**2 * longest))
    return torch.isfinite(square) & ((square > limit * longest) | past)


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
