"""ELRA: gradient optimizers whose learning rate adapts itself. The public names, imported on first use."""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from .adapters.configure import configure_elra
    from .average import averaged
    from .directions import Adam, Momentum, SuccessiveGradients
    from .optimizer import Elra, rate
    from .rules import C2Min, P2Min, Tracking
    from .variants import ElraAdamW, ElraC2Min, ElraP2Min

__version__ = "0.2.0"

_HOME = {
    "Elra": "optimizer",
    "rate": "optimizer",
    "ElraC2Min": "variants",
    "ElraP2Min": "variants",
    "ElraAdamW": "variants",
    "Momentum": "directions",
    "SuccessiveGradients": "directions",
    "Adam": "directions",
    "C2Min": "rules",
    "P2Min": "rules",
    "Tracking": "rules",
    "configure_elra": "adapters.configure",
    "averaged": "average",
}
__all__ = [
    "Adam",
    "C2Min",
    "Elra",
    "ElraAdamW",
    "ElraC2Min",
    "ElraP2Min",
    "Momentum",
    "P2Min",
    "SuccessiveGradients",
    "Tracking",
    "averaged",
    "configure_elra",
    "rate",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that ``import elra_hf`` alone does not import torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'elra_hf' has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    """The public names, also those not imported yet."""
    return sorted({*globals(), *__all__})


# Frameworks learn our names when they are imported, or now if they have been; nothing is imported for it.


@wrapt.when_imported("transformers.training_args")
def _names(module: ModuleType) -> None:
    from .adapters.transformers import add_names

    add_names(module)


@wrapt.when_imported("transformers.trainer")
def _trainer(module: ModuleType) -> None:
    from .adapters.transformers import add_optimizers

    add_optimizers(module)


@wrapt.when_imported("torch.distributed.optim.zero_redundancy_optimizer")
def _dealt(module: ModuleType) -> None:
    from .adapters.zero_redundancy import join_rates

    join_rates(module)


@wrapt.when_imported("lightning.pytorch.cli")
@wrapt.when_imported("pytorch_lightning.cli")
def _cli(module: ModuleType) -> None:
    # LightningCLI offers the subclasses of Optimizer that have been imported
    import_module(".variants", __name__)
