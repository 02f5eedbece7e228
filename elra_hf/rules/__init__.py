"""Rate rules, one file each: how the rate follows from the measured inner products."""

from .base import Decision, Dots, Memory, Rule, check_gain, cosine
from .c2min import C2Min
from .p2min import P2Min
from .tracking import Tracking

__all__ = ["C2Min", "Decision", "Dots", "Memory", "P2Min", "Rule", "Tracking", "check_gain", "cosine"]
