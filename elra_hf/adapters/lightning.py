"""Lightning: ``configure_elra`` for a module's ``configure_optimizers``, and ``ElraMonitor``, which logs the adapted rate.

Neither is needed: an ELRA optimizer may be returned from ``configure_optimizers`` like any other, and `LightningCLI` and
Fabric take it as it is. ``configure_elra`` works without Lightning, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .configure import configure_elra

if TYPE_CHECKING:
    from .monitor import ElraMonitor

__all__ = ["ElraMonitor", "configure_elra"]


def __getattr__(name: str) -> Any:
    """Import what needs Lightning on first use."""
    if name != "ElraMonitor":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from .monitor import ElraMonitor
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "lightning":
            raise
        raise ImportError("ElraMonitor needs Lightning, which is not installed: pip install 'elra_hf[lightning]'") from error
    return ElraMonitor
