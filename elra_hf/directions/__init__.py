"""Directions: along what a step moves, and in which metric angles are measured. The definition, in plain torch.

Letters: g the gradient G_t; s the way back to the average of the iterates, x̄_t - x_t, which is what is stored of it, since it
is small beside x and needs no digits of it; for the paper's rules p the gradient G_{t-1} and d the direction of step t-1.
`measure` looks at a piece before the step, `update` takes it. Numbers that depend on the run are floats on the CPU and 0-dim
tensors elsewhere, so that nothing waits for a device.
"""

from .adam import Adam
from .base import PRODUCTS, Counts, Direction, Move, Numbers, check_betas, gradient, share
from .momentum import Momentum
from .successive import SuccessiveGradients

__all__ = [
    "PRODUCTS",
    "Adam",
    "Counts",
    "Direction",
    "Momentum",
    "Move",
    "Numbers",
    "SuccessiveGradients",
    "check_betas",
    "gradient",
    "share",
]
