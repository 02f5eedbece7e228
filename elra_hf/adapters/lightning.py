"""Lightning: ``configure_elra`` for a module's ``configure_optimizers``, `ElraMonitor`, which logs the rate, and `RateFinder`.

None is needed: an ELRA optimizer may be returned from ``configure_optimizers`` like any other, and `LightningCLI` and
Fabric take it as it is. ``configure_elra`` works without Lightning, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .configure import configure_elra

if TYPE_CHECKING:
    from .monitor import ElraMonitor, RateFinder

__all__ = ["ElraMonitor", "RateFinder", "configure_elra"]


def __getattr__(name: str) -> Any:
    """Import what needs Lightning on first use."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from . import monitor
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "lightning":
            raise
        raise ImportError(f"{name} needs Lightning, which is not installed: pip install 'elra_hf[lightning]'") from error
    return getattr(monitor, name)
