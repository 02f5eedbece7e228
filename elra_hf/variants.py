"""The three optimizers: a direction, a rule, and defaults. No mathematics here."""

from __future__ import annotations

import math

import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .directions import Adam, Direction, Momentum, SuccessiveGradients
from .optimizer import Elra, Scope
from .rules import C2Min, P2Min, Tracking

# First rate of ElraAdamW over the typical size of a weight, a start only. The best fixed rates of AdamW were measured at 0.007
# (a pretrained transformer, all layers) to 0.4 (nets of width 64 from scratch) of it, less the wider the net.
ADAM_FIRST = 0.005


def momentum(betas: tuple[float, float], horizon: float, bf16_average: bool) -> Direction:
    """What a rule of c2min or p2min is measured along: the paper's needs the last gradient.

    Raises:
        ValueError: there is no average to keep in bfloat16.
    """
    if horizon != math.inf:
        return Momentum(betas, bf16_average)
    if bf16_average:
        raise ValueError("bf16_average=True does not go with horizon=inf: the paper's rule keeps no average. Leave one out")
    return SuccessiveGradients(betas)


class ElraC2Min(Elra):
    """ELRA c2min: momentum, and a rate that changes by at most ±50 % a step with a cosine; see `C2Min`.

    Source: arXiv 2309.06274, c2min. Memory: 8 bytes a float32 parameter.

    Args:
        params: parameters or parameter groups.
        lr: α_0 > 0, the value that schedules and groups refer to. The first rate follows from the weights: any value trains
            alike. With ``horizon=math.inf`` it is the first rate.
        betas: (β1, β2) of the quasi-hyperbolic momentum, each in [0, 1).
        gain: largest relative change of the rate in one step, in (0, 1); a pair sets (down, up) apart.
        horizon: steps after which half of the gain is gone, > 0. math.inf: the paper's rule, with the cosine of successive
            gradients; such a rate is long on its way up, oscillates and drifts where gradients are noisy.
        weight_decay: decoupled weight decay, >= 0.
        scope: "global" (one rate), "group" or "tensor".
        bounds: (lowest, highest) rate; by default far from all, since a rate along gradients goes with the loss's unit.
        restart_factor: factor on the rate at a restart, in (0, 1); less where the gradient has grown by more.
        maximize: ascend.
        stochastic_rounding: round weights and states in bfloat16 up or down by chance, the same on all ranks, so that steps
            below their resolution move them in the mean.
        bf16_average: keep the average of the iterates, as its distance from x, in bfloat16: 2 bytes less a float32 parameter.
        process_group: ranks that hold other slices of the parameters, for FSDP1 and DeepSpeed ZeRO only.
        check_sync: raise at the step in which parameters, gradient or rate come apart between ranks; for debugging.

    Raises:
        ValueError: an argument is out of range; the message names it and what to give.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-5,
        *,
        betas: tuple[float, float] = (0.8, 0.7),
        gain: float | tuple[float, float] = 0.5,
        horizon: float = 20.0,
        weight_decay: float = 0.0,
        scope: Scope = "global",
        bounds: tuple[float, float] = (1e-30, 1e30),
        restart_factor: float = 1 / 3,
        maximize: bool = False,
        stochastic_rounding: bool = True,
        bf16_average: bool = False,
        process_group: dist.ProcessGroup | None = None,
        check_sync: bool = False,
    ) -> None:
        super().__init__(
            params,
            momentum(betas, horizon, bf16_average),
            C2Min(gain, horizon),
            lr=lr,
            weight_decay=weight_decay,
            scope=scope,
            bounds=bounds,
            restart_factor=restart_factor,
            maximize=maximize,
            stochastic_rounding=stochastic_rounding,
            process_group=process_group,
            check_sync=check_sync,
        )


class ElraP2Min(Elra):
    """ELRA p2min: momentum, and a rate that follows the same cosine as a parabola; see `P2Min`.

    Source: arXiv 2309.06274, p2min. Memory: 8 bytes a float32 parameter, 4 with ``betas=(0, 0)``.

    Args:
        params: parameters or parameter groups.
        lr: α_0 > 0, the value that schedules and groups refer to. The first rate follows from the weights: any value trains
            alike. With ``horizon=math.inf`` it is the first rate.
        betas: (β1, β2) of the quasi-hyperbolic momentum, each in [0, 1).
        growth_limit: largest factor on the rate in one step, > 1.
        horizon: steps after which half of the gain is gone, > 0. math.inf: the paper's rule; such a rate dies where gradients
            are noisy.
        weight_decay: decoupled weight decay, >= 0.
        scope: "global" (one rate), "group" or "tensor".
        bounds: (lowest, highest) rate; by default far from all, since a rate along gradients goes with the loss's unit.
        restart_factor: factor on the rate at a restart, in (0, 1); less where the gradient has grown by more.
        maximize: ascend.
        stochastic_rounding: round weights and states in bfloat16 up or down by chance, the same on all ranks, so that steps
            below their resolution move them in the mean.
        bf16_average: keep the average of the iterates, as its distance from x, in bfloat16: 2 bytes less a float32 parameter.
        process_group: ranks that hold other slices of the parameters, for FSDP1 and DeepSpeed ZeRO only.
        check_sync: raise at the step in which parameters, gradient or rate come apart between ranks; for debugging.

    Raises:
        ValueError: an argument is out of range; the message names it and what to give.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-5,
        *,
        betas: tuple[float, float] = (0.8, 0.7),
        growth_limit: float = 2.0,
        horizon: float = 5.0,
        weight_decay: float = 0.0,
        scope: Scope = "global",
        bounds: tuple[float, float] = (1e-30, 1e30),
        restart_factor: float = 1 / 3,
        maximize: bool = False,
        stochastic_rounding: bool = True,
        bf16_average: bool = False,
        process_group: dist.ProcessGroup | None = None,
        check_sync: bool = False,
    ) -> None:
        super().__init__(
            params,
            momentum(betas, horizon, bf16_average),
            P2Min(growth_limit, horizon),
            lr=lr,
            weight_decay=weight_decay,
            scope=scope,
            bounds=bounds,
            restart_factor=restart_factor,
            maximize=maximize,
            stochastic_rounding=stochastic_rounding,
            process_group=process_group,
            check_sync=check_sync,
        )


class ElraAdamW(Elra):
    """AdamW that finds its learning rate: Adam's direction, and the ELRA idea in Adam's metric.

    Source: ours, after arXiv 2309.06274. Memory: 12 bytes a float32 parameter, 4 more than AdamW.

    Args:
        params: parameters or parameter groups.
        lr: α_0 > 0, the value that schedules and groups refer to. The first rate itself follows from the weights: any value
            trains alike.
        betas: (β1, β2) of Adam's moments, each in [0, 1).
        eps: Adam's ε, > 0 in float32.
        weight_decay: decoupled weight decay, >= 0.
        scope: "global" (one rate), "group" or "tensor".
        bounds: (lowest, highest) rate.
        restart_factor: factor on the rate at a restart, in (0, 1); less where the gradient has grown by more.
        maximize: ascend.
        stochastic_rounding: round weights and states in bfloat16 up or down by chance, the same on all ranks, so that steps
            below their resolution move them in the mean.
        bf16_average: keep the average of the iterates, as its distance from x, in bfloat16: 2 bytes less a float32 parameter.
        process_group: ranks that hold other slices of the parameters, for FSDP1 and DeepSpeed ZeRO only.
        check_sync: raise at the step in which parameters, gradient or rate come apart between ranks; for debugging.

    Raises:
        ValueError: an argument is out of range; the message names it and what to give.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-5,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        scope: Scope = "global",
        bounds: tuple[float, float] = (1e-8, 1e6),
        restart_factor: float = 1 / 3,
        maximize: bool = False,
        stochastic_rounding: bool = True,
        bf16_average: bool = False,
        process_group: dist.ProcessGroup | None = None,
        check_sync: bool = False,
    ) -> None:
        super().__init__(
            params,
            Adam(betas, eps, bf16_average),
            Tracking(first=ADAM_FIRST),
            lr=lr,
            weight_decay=weight_decay,
            scope=scope,
            bounds=bounds,
            restart_factor=restart_factor,
            maximize=maximize,
            stochastic_rounding=stochastic_rounding,
            process_group=process_group,
            check_sync=check_sync,
        )


# What ``--optim`` calls them.
VARIANTS: dict[str, type[Elra]] = {"elra_c2min": ElraC2Min, "elra_p2min": ElraP2Min, "elra_adamw": ElraAdamW}
