"""The paper's open questions, each a short study: growth functions, β1 and β2, and success rates in place of a proof.

Rows first, one a run or a block of problems, appended to a CSV file as soon as it has finished; then FILE.md from the rows.
The same command continues after a stop of any kind.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from elra_hf import C2Min, Elra, P2Min, SuccessiveGradients
from elra_hf.rules import Decision, Dots, Memory, Rule, check_gain, cosine
from recipes.sweep import Row

from .cells import geometric_mean, markdown, mean, ratio, spread
from .optimizers import OPTIMIZERS, Optimizer
from .paper import DEFAULTS, OURS, at, attempt, command, own_rate, tuned
from .report import losses
from .run import TUNING_SEED, Done, Run, best_of_sweep, text, train, versions
from .tasks import TASKS

# ---- growth functions ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exponential:
    """α_t = α_{t-1} exp(gain·c_t). Unlike 1 + gain·c it has no downward drift where c is noise around 0. Source: ours.

    Args:
        gain: > 0.
    """

    gain: float = 0.5
    most: ClassVar[float] = math.inf  # gain, exclusive
    needs: ClassVar[frozenset[str]] = frozenset({"gg", "gp", "pp"})
    memory: ClassVar[Mapping[str, float]] = {}

    def __post_init__(self) -> None:
        check_gain(self.gain, below=self.most)

    def __call__(self, alpha: Tensor, dots: Dots, memory: Memory) -> Decision:
        """Return the next rate and the cosine."""
        cos = cosine(dots["gp"], dots["gg"], dots["pp"])
        return Decision(alpha * torch.exp(self.gain * cos), cos, {})


class Norms(Exponential):
    """α_t = α_{t-1} (1 + gain·c_t·min(1, ‖G_t‖/‖G_{t-1}‖)), gain < 1. Source: ours.

    c·‖G_t‖/‖G_{t-1}‖ is what p2min's 1/(1 - q) begins with: along a parabola a gradient that is gone after the step says that
    the rate was right, whatever the angle. The cap keeps c2min's bound on the factor.
    """

    most: ClassVar[float] = 1.0

    def __call__(self, alpha: Tensor, dots: Dots, memory: Memory) -> Decision:
        """Return the next rate and the cosine."""
        cos = cosine(dots["gp"], dots["gg"], dots["pp"])
        norms = torch.where(dots["pp"] > 0, (dots["gg"] / dots["pp"]).sqrt(), torch.ones_like(cos))
        return Decision(alpha * (1.0 + self.gain * cos * norms.clamp(max=1.0)), cos, {})


PAPER = C2Min(horizon=math.inf)

# ---- β1 and β2 -------------------------------------------------------------------------------------------------------------

MOST = 0.98  # β1 and β2 at a cosine of 1
SMOOTHED = 0.9  # share of the cosines so far in the smoothed one


class AdaptedBetas(Elra):
    """c2min whose betas follow the smoothed cosine c̄: 1 - β = (1 - β at the start)·(1 - c̄), β at most 0.98.

    Where successive gradients agree, the past is still true and is remembered for longer; where they oppose one another, it
    is forgotten. Noise around 0 leaves the paper's betas. Source: ours. The cosine of step t sets the betas of step t + 1, so
    that a restart, which takes a step back, weighs its momentum with a β2 of one step later.

    Args:
        params: as for `Elra`.
        adapt: which to adapt, of "β1" and "β2".
        options: as for `Elra`.
    """

    def __init__(self, params: Any, *, adapt: tuple[str, ...], **options: Any) -> None:
        super().__init__(params, SuccessiveGradients(), PAPER, **options)
        self.adapt = adapt
        self.smooth = 0.0

    def step(self, closure: Any = None, *, loss: Any = None) -> Any:
        """Take one step, then set the betas of the next."""
        result = super().step(closure, loss=loss)
        cos = float(self.param_groups[0]["cos"])
        self.smooth = SMOOTHED * self.smooth + (1.0 - SMOOTHED) * cos
        start = dict(zip(("β1", "β2"), SuccessiveGradients().betas, strict=True))
        for group in self.param_groups:
            group["betas"] = tuple(
                min(MOST, 1.0 - (1.0 - beta) * (1.0 - self.smooth)) if name in self.adapt else beta
                for name, beta in start.items()
            )
        return result


RATE = own_rate("elra_c2min")  # α_0


def pieces(path: str, **options: Any) -> Optimizer:
    """A combination of ours, from the usual first rate."""
    return Optimizer(path, RATE, options, schedules=("constant",), package="elra_hf", ours=True)


def momentum(rule: Rule, betas: tuple[float, float] = SuccessiveGradients().betas) -> Optimizer:
    """The paper's momentum with a rule."""
    return pieces("elra_hf:Elra", direction=SuccessiveGradients(betas), rule=rule)


BASE = "c2min"  # constant gain 0.5, betas 0.8 and 0.7: as the paper has it
GROWTH = {
    BASE: momentum(PAPER),
    "pair 0.5 0.6": momentum(C2Min((0.5, 0.6), horizon=math.inf)),
    "exponential 0.5": momentum(Exponential(0.5)),
    "norms 0.5": momentum(Norms(0.5)),
    "p2min": momentum(P2Min(horizon=math.inf)),
    "c2min, average": pieces("elra_hf:ElraC2Min"),
    "p2min, average": pieces("elra_hf:ElraP2Min"),
}
BETAS = {
    BASE: GROWTH[BASE],
    "β 0 0": momentum(PAPER, (0.0, 0.0)),
    "β 0.5 0.5": momentum(PAPER, (0.5, 0.5)),
    "β 0.9 0.9": momentum(PAPER, (0.9, 0.9)),
    "β 0.98 0.9": momentum(PAPER, (0.98, 0.9)),
    "β1 adapted": pieces("recipes.benchmarks.studies:AdaptedBetas", adapt=("β1",)),
    "β1 and β2 adapted": pieces("recipes.benchmarks.studies:AdaptedBetas", adapt=("β1", "β2")),
}
LEARNING = ("digits-mlp", "digits-cnn", "mnist-paper", "mnist-mlp", "mnist-cnn", "mnist-autoencoder")
SEEDS = (1, 2, 3)


def wanted_variants(variants: Mapping[str, Optimizer], done: Done) -> list[Run]:
    """Every variant on every task with every seed."""
    runs = [at(task, name, RATE, seed, TASKS[task].steps) for task in LEARNING for name in variants for seed in SEEDS]
    return [run for run in runs if run not in done]


def measure_variant(run: Run) -> Row:
    """What the bench measures of a run."""
    return train(run, (GROWTH | BETAS)[run.optimizer], None)


# ---- success rates ---------------------------------------------------------------------------------------------------------


@dataclass
class Instance:
    """A random problem.

    Attributes:
        x: the parameters at the start.
        loss: of the parameters.
        lowest: the lowest loss, or a lower bound of it.
    """

    x: list[Tensor]
    loss: Callable[[list[Tensor]], Tensor]
    lowest: float


class Draw:
    """Random numbers in float64 from a seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """Evenly between ``low`` and ``high``."""
        return low + (high - low) * torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def whole(self, low: int, high: int) -> int:
        """A whole number from ``low`` to ``high``."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def rotation(self, n: int) -> Tensor:
        """An orthogonal matrix."""
        return torch.linalg.qr(self.normal(n, n))[0]


def quadratic(draw: Draw) -> Instance:
    """xᵀAx/2 in 2 to 50 dimensions, condition number up to 1e4, largest curvature between 0.01 and 100."""
    n, condition, scale = draw.whole(2, 50), draw.uniform(0, 4), 10 ** draw.uniform(-2, 2)
    curvatures = scale * 10 ** (-condition * torch.cat([torch.tensor([0.0, 1.0]), draw.uniform(0, 1, n - 2)]))
    q = draw.rotation(n)
    matrix = q @ torch.diag(curvatures) @ q.T
    return Instance([draw.normal(n)], lambda x: 0.5 * (x[0] @ matrix @ x[0]), 0.0)


def logistic(draw: Draw) -> Instance:
    """Ridge logistic regression, 2 to 50 features of scales between 0.1 and 10, one label in ten wrong."""
    n = draw.whole(2, 50)
    features = draw.normal(5 * n, n) * 10 ** draw.uniform(-1, 1, n)
    labels = torch.sign(features @ (draw.normal(n) / features.std(0)))
    labels = torch.where(draw.uniform(0, 1, 5 * n) < 0.1, -labels, labels)
    rows = features * labels[:, None]

    def loss(x: list[Tensor]) -> Tensor:
        return nn.functional.softplus(-rows @ x[0]).mean() + 0.5e-3 * x[0].square().sum()

    x = torch.zeros(n, dtype=torch.float64)
    for _ in range(50):  # Newton's method
        p = torch.sigmoid(-rows @ x)
        hessian = (rows * (p * (1 - p))[:, None]).T @ rows / len(rows) + 1e-3 * torch.eye(n)
        x = x - torch.linalg.solve(hessian, -rows.T @ p / len(rows) + 1e-3 * x)
    return Instance([draw.normal(n)], loss, loss([x]).item())


def wells(draw: Draw) -> Instance:
    """Σ λ_i z_i²/2 + q z_i⁴/4 with z = Qx, λ between -1 and 1, in 2 to 50 dimensions, from next to the saddle at the origin."""
    n, quartic, scale = draw.whole(2, 50), 10 ** draw.uniform(-1, 1), 10 ** draw.uniform(-2, 2)
    curvatures = torch.cat([torch.tensor([-0.5]), draw.uniform(-1, 1, n - 1)])
    q, lowest = draw.rotation(n), -(curvatures.clamp(max=0) ** 2).sum() / (4 * quartic)

    def loss(x: list[Tensor]) -> Tensor:
        z = q @ x[0]
        return scale * (0.5 * (curvatures * z**2).sum() + 0.25 * quartic * (z**4).sum())

    return Instance([0.1 * draw.normal(n)], loss, float(scale * lowest))


def rosenbrock(draw: Draw) -> Instance:
    """Σ b (z_{i+1} - z_i²)² + (1 - z_i)² with z = Qx, b between 1 and 100, in 2 to 10 dimensions."""
    n, steepness = draw.whole(2, 10), 10 ** draw.uniform(0, 2)
    q = draw.rotation(n)

    def loss(x: list[Tensor]) -> Tensor:
        z = q @ x[0]
        return (steepness * (z[1:] - z[:-1] ** 2) ** 2 + (1 - z[:-1]) ** 2).sum()

    return Instance([draw.normal(n)], loss, 0.0)


def net(draw: Draw) -> Instance:
    """A tanh net on random inputs, to repeat what another of its shape says: the lowest loss is 0."""
    inputs, hidden = draw.whole(2, 8), draw.whole(2, 8)
    data = draw.normal(64, inputs)

    def weights() -> list[Tensor]:
        return [draw.normal(inputs, hidden) / math.sqrt(inputs), draw.normal(hidden), draw.normal(hidden) / math.sqrt(hidden)]

    def output(w: list[Tensor]) -> Tensor:
        return torch.tanh(data @ w[0] + w[1]) @ w[2]

    target = output(weights())
    return Instance(weights(), lambda w: (output(w) - target).square().mean(), 0.0)


FAMILIES: dict[str, tuple[Callable[[Draw], Instance], int]] = {  # with the number of problems
    "convex quadratic": (quadratic, 500),
    "convex logistic": (logistic, 500),
    "non-convex wells": (wells, 350),
    "non-convex rosenbrock": (rosenbrock, 350),
    "non-convex net": (net, 300),
}
BLOCK = 50  # problems of a row
STEPS = 300  # budget
GOAL = 1e-2  # of the first gap between the loss and the lowest
RIVAL = "adam"


def steps_to_solve(made: Instance, optimizer: str, rate: float, steps: int) -> float:
    """Steps until the gap to the lowest loss is `GOAL` of the first; infinite if that takes more than ``steps``."""
    x = [nn.Parameter(each.clone()) for each in made.x]
    stepped = OPTIMIZERS[optimizer].make(x, rate)
    goal = GOAL * (made.loss(x).item() - made.lowest)
    for step in range(steps + 1):
        loss = made.loss(x)
        if loss.item() - made.lowest <= goal:
            return step
        for p, g in zip(x, torch.autograd.grad(loss, x), strict=True):
            p.grad = g
        stepped.step()
    return math.inf


def measure_block(run: Run) -> Row:
    """How many of a block's problems are solved; ``reached`` is the mean number of steps, with the budget for the others."""
    build, _ = FAMILIES[run.task]
    problems = [build(Draw(run.seed * BLOCK + i)) for i in range(BLOCK)]
    steps = [steps_to_solve(each, run.optimizer, float(run.rate), run.steps) for each in problems]
    return {
        "status": "ok",
        "problems": str(BLOCK),
        "solved": str(sum(value < math.inf for value in steps)),
        "reached": text(statistics.fmean(min(value, run.steps) for value in steps)),
        "validation_loss": "0",
    }


def wanted_blocks(done: Done) -> list[Run]:
    """Ours and Adam at its default rate; Adam swept on a block of its own, and at the family's best rate."""
    runs: list[Run] = []
    for family, (_, problems) in FAMILIES.items():
        blocks = range(TUNING_SEED + 1, TUNING_SEED + 1 + problems // BLOCK)
        runs += [at(family, name, own_rate(name), block, STEPS) for name in (*OURS, RIVAL) for block in blocks]
        runs += tuned(family, RIVAL, 1e-1, blocks, STEPS, done)
    return [run for run in dict.fromkeys(runs) if run not in done]


def wilson(solved: int, problems: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % confidence interval of a share.

    (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n). Source: E. B. Wilson, Probable inference, the law of succession, and
    statistical inference, Journal of the American Statistical Association 22 (1927), 209-212.
    """
    p, n = solved / problems, problems
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


# ---- report ----------------------------------------------------------------------------------------------------------------


def variant_tables(variants: Sequence[str], done: Done) -> str:
    """Last training and test loss, and their geometric mean over the tasks as a multiple of c2min's."""
    parts = []
    for column, title in (("train_loss", "training loss"), ("test_loss", "test loss")):
        cells = {
            (name, task): losses([row for run, row in done.items() if (run.optimizer, run.task) == (name, task)], column)
            for name in variants
            for task in LEARNING
        }
        lowest = {task: min(variants, key=lambda name, t=task: mean(cells[name, t])) for task in LEARNING}
        rows = []
        for name in variants:
            middle = geometric_mean(mean(cells[name, task]) / mean(cells[BASE, task]) for task in LEARNING)
            marks = ["**" if lowest[task] == name else "" for task in LEARNING]
            shown = [f"{m}{spread(cells[name, task])}{m}" for m, task in zip(marks, LEARNING, strict=True)]
            rows.append([name, ratio(middle), *shown])
        parts.append(markdown([title, f"geometric mean over {BASE}'s", *LEARNING], rows))
    return "\n".join(parts)


def report_growth(done: Done, _: Path) -> str:
    """The section on growth functions."""
    return (
        "## Which growth function works where?\n\n"
        "α is multiplied at every step by a function of the cosine c of successive gradients; all else is as c2min has it.\n\n"
        f"- {BASE}: 1 + c/2\n"
        "- pair 0.5 0.6: 1 + c/2 where c < 0, else 1 + 0.6 c\n"
        "- exponential 0.5: exp(c/2)\n"
        "- norms 0.5: 1 + c/2·min(1, ‖G_t‖/‖G_{t-1}‖)\n"
        "- p2min: 1/(1 - q), at most 2; q is the slope at the end of the last step over that at its start\n"
        "- average: the package's defaults, by the cosine of the gradient with the way to the average of the iterates\n\n"
        f"{OF_TASKS}\n\n{variant_tables(tuple(GROWTH), done)}"
    )


def report_betas(done: Done, _: Path) -> str:
    """The section on β1 and β2."""
    return (
        "## β1 and β2, fixed or adapted?\n\n"
        f"c2min has β1 = 0.8 and β2 = 0.7. Adapted: 1 - β = (1 - β of c2min)·(1 - c̄), at most β = {MOST}; c̄ is the cosine "
        f"smoothed with {SMOOTHED}: the past is remembered for longer where gradients agree.\n\n"
        f"{OF_TASKS}\n\n{variant_tables(tuple(BETAS), done)}"
    )


OF_TASKS = (
    f"Last loss, mean ± standard deviation over {len(SEEDS)} seeds, constant rate, as many steps as in the bench. The lowest "
    "mean of a task is bold."
)


def report_success(done: Done, _: Path) -> str:
    """The section on success rates."""
    blocks: dict[str, dict[str, list[Row]]] = {}
    for run, row in done.items():
        if run.task in FAMILIES and run.seed != TUNING_SEED:
            default = run.optimizer != RIVAL or float(run.rate) == DEFAULTS[RIVAL]
            name = run.optimizer + ("" if run.optimizer in OURS else f", default {run.rate}" if default else ", tuned")
            blocks.setdefault(name, {}).setdefault(run.task, []).append(row)
    kinds = list(dict.fromkeys(family.split()[0] for family in FAMILIES))
    columns = {kind: [f for f in FAMILIES if f.split()[0] == kind] for kind in kinds} | {f: [f] for f in FAMILIES}
    shares, steps = [], []
    for name, of in blocks.items():
        rows = {column: [row for family in families for row in of[family]] for column, families in columns.items()}
        shares.append([name, *(share(rows[column]) for column in columns)])
        steps.append([name, *(f"{statistics.fmean(float(row['reached']) for row in rows[f]):.0f}" for f in FAMILIES)])
    rates = ", ".join(f"{family} {best.rate}" for family in FAMILIES if (best := best_of_sweep(done, family, RIVAL, STEPS)))
    totals = [sum(problems for f, (_, problems) in FAMILIES.items() if f.split()[0] == kind) for kind in kinds]
    listed = "".join(f"- {family}, {n} problems: {build.__doc__}\n" for family, (build, n) in FAMILIES.items())
    return (
        f"## How often does it succeed?\n\n{' and '.join(f'{n} {kind}' for n, kind in zip(totals, kinds, strict=True))} random "
        f"problems. Solved: within {STEPS} steps the gap between the loss and the lowest loss falls to "
        f"{GOAL:.0%} of the first gap. Gradients are exact. In brackets: Wilson's 95 % confidence interval.\n\n{listed}\n"
        f"{markdown(['solved', *columns], shares)}\n{markdown(['mean steps, the budget where unsolved', *FAMILIES], steps)}\n"
        f"Adam, tuned: the half-decade with the fewest steps in the mean over {BLOCK} other problems of the family ({rates}).\n"
    )


def share(rows: Sequence[Row]) -> str:
    """Share of solved problems with its interval."""
    solved, problems = (sum(int(row[name]) for row in rows) for name in ("solved", "problems"))
    low, high = wilson(solved, problems)
    return f"{solved / problems:.1%} ({low:.1%} – {high:.1%})"


# ---- the command -----------------------------------------------------------------------------------------------------------

COLUMNS = [
    *Run._fields, "status", "error", "seconds", "versions", "train_loss", "validation_loss", "test_loss", "test_metric",
    "alpha", "restarts", "problems", "solved", "reached",
]  # fmt: skip

PARTS = {
    "growth": (functools.partial(wanted_variants, GROWTH), measure_variant, report_growth),
    "betas": (functools.partial(wanted_variants, BETAS), measure_variant, report_betas),
    "success": (wanted_blocks, measure_block, report_success),
}


def row_of(run: Run, measure: Callable[[Run], Row]) -> Row:
    """The row of a run."""
    declared = (GROWTH | BETAS | OPTIMIZERS)[run.optimizer]
    row = attempt(run, measure, COLUMNS, versions(declared))
    return {name: row[name] for name in COLUMNS}


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    command("questions", "The paper's open questions", PARTS, row_of, argv, __doc__)
