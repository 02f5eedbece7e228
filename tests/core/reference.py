"""c2min, p2min and tracked Adam in plain NumPy, float64, written from the formulas and from nothing else.

Each takes a function t, x -> gradient and returns the visited x and the rates, so that it serves both a recorded
sequence of gradients and a closed loop.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Gradient = Callable[[int, np.ndarray], np.ndarray]


def clamp(alpha: float, low: float = 1e-8, high: float = 1e6) -> float:
    return min(max(alpha, low), high)


def constant(t: int) -> float:
    return 1.0


def momentum_method(
    factor, gradient: Gradient, x0, steps: int, alpha0: float, betas, horizon: float, schedule=constant, parts=2
):
    """x, α of a method with quasi-hyperbolic momentum; ``factor(g, g_prev, d_prev, left, short)`` is its rule.

    ``left`` is the share of it that is left, ``short`` whether no step has been 0.003 of x_1 long, or 0.1 of one of its
    ``parts`` that did not start at 0, had it been along G_1. Step t moves α·``schedule(t)``, ≤ α.
    """
    beta1, beta2 = betas
    x, alpha = np.array(x0, dtype=np.float64), alpha0
    g_prev = m = d_prev = None
    overshoots, trend, longest, straight, share, peak = 0.0, 1.0, 0.0, 0.0, 0.0, 0.0
    xs, alphas = [], []
    long_enough = 0.0
    for t in range(1, steps + 1):
        g = np.asarray(gradient(t - 1, x), dtype=np.float64)
        size = np.linalg.norm(g)
        if t == 1:
            long_enough = 3e-3 * np.linalg.norm(x[g != 0])
            for one in np.array_split(np.arange(len(x)), parts):
                start, part = np.linalg.norm(x[one][g[one] != 0]), np.linalg.norm(g[one])
                if start > 0 and part > 0:
                    long_enough = min(long_enough, 0.1 * start * size / part)
        longer = size if g_prev is None else max(size, np.linalg.norm(g_prev))
        short = alpha * np.sqrt(share) * longer < long_enough and np.isfinite(horizon)
        if g_prev is not None and size > 10.0 * longest:
            x = x + alpha * share * d_prev
            alpha = clamp(alpha * min(1 / 3, longest / size))
            g_prev, overshoots, trend, share = None, 0.0, 1.0, 0.0
        else:
            if g_prev is not None and share > 0 and not short:
                trend = 0.8 * trend + 0.2 * np.sign(g @ d_prev)
            if trend > 0.95:
                straight = max(straight, size)
            if np.isfinite(horizon):
                g = g * min(1.0, 2 * straight / size)
            if g_prev is None:
                m = d = g
            else:
                turned = g @ g_prev < -0.95 * np.linalg.norm(g) * np.linalg.norm(g_prev)
                sure = turned and (trend < -0.95 or size > 2 * longest)
                left = peak if sure else peak / (1 + overshoots / horizon)
                alpha = clamp(alpha * factor(g, g_prev, d_prev, left, short))
                overshoots = overshoots + peak if trend < 0 else overshoots if trend < 0.95 else 0.0
                m = beta1 * m + (1 - beta1) * g_prev
                d = (1 - beta2) * g + beta2 * m
            share = schedule(t)
            peak = max(peak, share)
            x = x - alpha * share * d
            g_prev, d_prev = g, d
            long_enough = long_enough if short else 0.0
            longest = max(np.sqrt(0.98) * longest, size)
        xs.append(x.copy())
        alphas.append(alpha)
    return np.array(xs), np.array(alphas)


def c2min(gradient: Gradient, x0, steps, alpha0=1e-5, betas=(0.8, 0.7), gain=(0.5, 0.5), horizon=2.0, **run):
    def factor(g, g_prev, d_prev, left, short):
        c = g @ g_prev / (np.linalg.norm(g) * np.linalg.norm(g_prev))
        if short:
            c = 1.0
        return 1 + left * (gain[0] if c < 0 else gain[1]) * c

    return momentum_method(factor, gradient, x0, steps, alpha0, betas, horizon, **run)


def p2min(gradient: Gradient, x0, steps, alpha0=1e-5, betas=(0.8, 0.7), growth_limit=2.0, horizon=1.0, **run):
    def factor(g, g_prev, d_prev, left, short):
        start, end = g_prev @ d_prev, g @ d_prev
        if short:
            return growth_limit**left
        if start <= 0:
            return 1.0
        q = end / start
        factor = 1 / (1 - q) if 1 - q > 1 / growth_limit else growth_limit
        return factor**left

    return momentum_method(factor, gradient, x0, steps, alpha0, betas, horizon, **run)


def weighted_median(values: np.ndarray, weights: np.ndarray) -> float:
    """The lowest value such that those up to it have half of the weight."""
    return min(v for v in values if weights[values <= v].sum() >= weights.sum() / 2)


def adamw(
    gradient: Gradient,
    x0,
    steps: int,
    alpha0: float = 1e-5,
    betas=(0.9, 0.999),
    eps: float = 1e-8,
    parts: int | list[int] = 2,
    schedule: Callable[[int], float] = constant,
):
    """The vector is cut into ``parts`` tensors, or at these places; each has a vote. Step t moves α·``schedule(t)``, ≤ α."""
    beta1, beta2 = betas
    x, scale = np.array(x0, dtype=np.float64), np.exp(np.mean(np.log(np.abs(x0[x0 != 0]))))
    tensors = np.array_split(np.arange(len(x)), parts)
    alpha, clock, share, peak = 0.005 * scale, 0.0, 0.0, 0.0
    m, v, d, precondition = np.zeros_like(x), np.zeros_like(x), None, None
    xs, alphas = [], []
    for t in range(1, steps + 1):
        g = np.asarray(gradient(t - 1, x), dtype=np.float64)
        if d is not None:
            votes, weights = [], []
            for i in tensors:
                norms = np.sqrt(g[i] @ (g[i] / precondition[i])) * np.sqrt(d[i] @ (precondition[i] * d[i]))
                votes.append(g[i] @ d[i] / norms if norms else 0.0)
                weights.append(np.sqrt(len(i)) if norms else 0.0)
            strengths = np.array([np.mean(g[i] ** 2 / precondition[i]) for i in tensors])
            weights = np.where(strengths > np.finfo(float).eps * strengths.max(), weights, 0.0)
            young = 10 / (10 + clock)
            gain, target = 1.0 * young + 0.03 * (1 - young), -0.03 * (1 - young)
            weight = max(2 * share / peak - 1, 0) * share
            c = weighted_median(np.array(votes), weights)
            alpha = clamp(min(alpha * np.exp(gain * weight * (c - target)), 0.5 * scale))
            clock += weight
        share = schedule(t)
        peak = max(peak, share)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        precondition = np.sqrt(v / (1 - beta2**t)) + eps
        d = m / (1 - beta1**t) / precondition
        x = x - alpha * share * d
        xs.append(x.copy())
        alphas.append(alpha)
    return np.array(xs), np.array(alphas)


# ---- problems ----------------------------------------------------------------------------------------------------------


def rosenbrock_gradient(_t: int, x: np.ndarray) -> np.ndarray:
    a, b = x[:-1], x[1:]
    g = np.zeros_like(x)
    g[:-1] += -400 * a * (b - a**2) - 2 * (1 - a)
    g[1:] += 200 * (b - a**2)
    return g


def quadratic_gradient(condition: float = 1e4, n: int = 10) -> Gradient:
    curvature = np.logspace(0, np.log10(condition), n) / condition
    return lambda _t, x: curvature * x


def logistic_gradient(n: int = 60, features: int = 8, batch: int | None = None) -> Gradient:
    """Logistic regression; with ``batch``, on a fixed order of mini-batches."""
    rng = np.random.default_rng(3)
    a = rng.normal(size=(n, features))
    y = (a @ rng.normal(size=features) + rng.normal(size=n) > 0).astype(np.float64)

    def gradient(t: int, x: np.ndarray) -> np.ndarray:
        rows = np.arange(n) if batch is None else (np.arange(batch) + t * batch) % n
        p = 1 / (1 + np.exp(-a[rows] @ x))
        return a[rows].T @ (p - y[rows]) / len(rows)

    return gradient


def spiky(gradient: Gradient) -> Gradient:
    """The same, four times as long at every seventh step once steps overshoot."""
    return lambda t, x: gradient(t, x) * (4.0 if t > 30 and t % 7 == 0 else 1.0)
