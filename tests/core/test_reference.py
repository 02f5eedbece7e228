"""The classes against the independent float64 reference: recorded gradients, and closed loops while those are predictable."""

import math

import numpy as np
import pytest
import torch

from elra_hf import ElraAdamW, ElraC2Min, ElraP2Min

from . import reference as ref

# Of steps 1, 2, …: warm-up, then decay. In 64ths, since p2min's 1/(1 - q) makes a thousand of every bit that is rounded.
SCHEDULE = {"schedule": lambda t: min(t / 16, 1.0) * max(1, round(64 * (1 - t / 201))) / 64}
METHODS = {
    "c2min": (ElraC2Min, ref.c2min, {}),
    "c2min-paper": (ElraC2Min, ref.c2min, {"horizon": math.inf}),
    "c2min-scheduled": (ElraC2Min, ref.c2min, SCHEDULE),
    "c2min-pair": (ElraC2Min, ref.c2min, {"gain": (0.5, 0.6)}),
    "p2min": (ElraP2Min, ref.p2min, {}),
    "p2min-paper": (ElraP2Min, ref.p2min, {"horizon": math.inf}),
    "p2min-scheduled": (ElraP2Min, ref.p2min, SCHEDULE),
    "p2min-plain": (ElraP2Min, ref.p2min, {"betas": (0.0, 0.0)}),
    "adamw": (ElraAdamW, ref.adamw, {}),
    "adamw-scheduled": (ElraAdamW, ref.adamw, SCHEDULE),
}
X0 = {
    "rosenbrock": np.array([-1.2, 1.0, 0.4, 0.9]),
    "quadratic": np.linspace(1.0, 2.0, 10),
    "logistic": np.linspace(-1.0, 1.0, 8),
    "spiky": np.linspace(-1.0, 1.0, 8),
    "head": np.append(np.linspace(-0.01, 0.01, 4), np.linspace(5.0, 9.0, 4)),  # one of two tensors starts near 0
}
GRADIENTS = {
    "rosenbrock": ref.rosenbrock_gradient,
    "quadratic": ref.quadratic_gradient(),
    "logistic": ref.logistic_gradient(batch=16),
    "spiky": ref.spiky(ref.logistic_gradient(batch=16)),
    "head": ref.logistic_gradient(batch=16),
}


def run(cls, options, gradient, x0, steps, dtype):
    """Drive ``cls`` with given gradients, the vector cut into two parameters; x and α of every step."""
    params = [torch.tensor(part, dtype=dtype, requires_grad=True) for part in np.array_split(x0, 2)]
    optimizer = cls(params, **{name: value for name, value in options.items() if name != "schedule"})
    schedule = options.get("schedule", ref.constant)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda taken: schedule(taken + 1))
    xs, alphas = [], []
    for t in range(steps):
        g = gradient(t, np.concatenate([p.detach().double().numpy() for p in params]))
        for p, part in zip(params, np.array_split(g, 2), strict=True):
            p.grad = torch.tensor(part, dtype=dtype)
        optimizer.step()
        scheduler.step()
        xs.append(np.concatenate([p.detach().double().numpy() for p in params]))
        alphas.append(float(optimizer.param_groups[0]["alpha"]))
    return np.array(xs), np.array(alphas)


def error_x(actual, expected):
    """Largest error of x in each step, relative to the largest entry so far: rounding of x adds up at that scale."""
    return np.abs(actual - expected).max(1) / np.maximum.accumulate(np.abs(expected).max(1))


def error_alpha(actual, expected):
    return np.abs(actual - expected) / expected


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("problem", X0)
@pytest.mark.parametrize("method", METHODS)
def test_recorded_gradients(method, problem, dtype, tolerance):
    cls, reference, options = METHODS[method]
    x0, steps = X0[problem], 200
    visited = []

    def record(t, x):
        visited.append(GRADIENTS[problem](t, x))
        return visited[-1]

    reference(record, x0, steps, **options)
    visited = [g for g in visited if np.linalg.norm(g) > 1e-15]  # squares that float32 can hold
    steps = len(visited)
    # what a float32 run can be given exactly
    recorded = np.array(visited).astype(np.float32).astype(np.float64)
    x0 = x0.astype(np.float32).astype(np.float64)

    def replay(t, x):
        return recorded[t]

    expected_x, expected_alpha = reference(replay, x0, steps, alpha0=float(np.float32(1e-5)), **options)
    # and what the rounding of the gradients alone makes of the reference: the slope along the way back is a difference
    near = []
    for seed in range(4):  # one draw may be calm by chance
        noise = 1 + np.random.default_rng(seed).uniform(-1, 1, recorded.shape) * torch.finfo(dtype).eps
        near.append(reference(lambda t, x, n=noise: recorded[t] * n[t], x0, steps, alpha0=float(np.float32(1e-5)), **options))
    x, alpha = run(cls, {"lr": float(np.float32(1e-5)), **options}, replay, x0, steps, dtype)
    for error, actual, nearby, expected in (
        (error_alpha, alpha, [alphas for _, alphas in near], expected_alpha),
        (error_x, x, [xs for xs, _ in near], expected_x),
    ):
        rounding = np.maximum.accumulate(np.max([error(each, expected) for each in nearby], axis=0))
        predictable = rounding < 0.01
        assert predictable.sum() >= 50, "the comparison has become empty"
        assert (error(actual, expected) <= tolerance + 30 * rounding)[predictable].all()


@pytest.mark.parametrize("problem", X0)
@pytest.mark.parametrize("method", METHODS)
def test_closed_loop(method, problem):
    """Over as many steps as an error of one ulp in x_0 stays below the tolerance in the reference itself."""
    cls, reference, options = METHODS[method]
    gradient, x0, steps, tolerance = GRADIENTS[problem], X0[problem], 200, 1e-9
    x, alpha = reference(gradient, x0, steps, **options)
    near_x, near_alpha = reference(gradient, x0 + np.spacing(x0), steps, **options)
    apart = np.maximum(error_x(near_x, x), error_alpha(near_alpha, alpha)) > tolerance / 100
    predictable = int(np.argmax(apart)) if apart.any() else steps
    assert predictable >= 15, "the comparison has become empty"
    actual_x, actual_alpha = run(cls, options, gradient, x0, predictable, torch.float64)
    assert error_x(actual_x, x[:predictable]).max() <= tolerance
    assert error_alpha(actual_alpha, alpha[:predictable]).max() <= tolerance
