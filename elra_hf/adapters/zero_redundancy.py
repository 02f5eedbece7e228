"""torch's ``ZeroRedundancyOptimizer(params, optimizer_class=ElraC2Min)`` deals whole parameters out to the ranks.

Each rank then has an optimizer of its own for the parameters that it holds. Their inner products are summed over the ranks, so
that there is one rate as in one process; nothing needs to be passed. With ``scope="tensor"`` the ranks only agree on restarts.
``check_sync`` sees sums over the ranks there, and can tell no rank's parameters or gradient from those of another.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import wrapt


def join_rates(module: ModuleType) -> None:
    """Let the optimizers that a ``ZeroRedundancyOptimizer`` builds know the ranks that hold the other parameters.

    Args:
        module: ``torch.distributed.optim.zero_redundancy_optimizer``.
    """

    def build(wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> None:
        from ..optimizer import Elra

        wrapped(*args, **kwargs)
        if isinstance(instance.optim, Elra):
            instance.optim.process_group = instance.process_group
            instance.optim.dealt = instance.param_groups[0]["params"][0]

    wrapt.wrap_function_wrapper(module, "ZeroRedundancyOptimizer._init_local_optimizer", build)
