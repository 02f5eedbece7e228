"""c2min, p2min, the paper's and by the average, and tracked Adam in plain NumPy, float64, from the formulas alone.

Each takes a function t, x -> gradient and returns the visited x and the rates, so that it serves both a recorded
sequence of gradients and a closed loop.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Gradient = Callable[[int, np.ndarray], np.ndarray]


def clamp(alpha: float, low: float = 1e-30, high: float = 1e30) -> float:
    return min(max(alpha, low), high)


def constant(t: int) -> float:
    return 1.0


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    return a @ b / norms if norms else 0.0


def heading(c: float, along: float) -> float:
    """The cosine with the way back, unless the loss falls along the momentum."""
    u = max(along, 0.0)
    return c if c >= 0 else (1 - u - u * u) * c


def weight_of(shares: list[float], fading: bool) -> float:
    """How much the last of the steps, whose shares of the full rate these are, says."""
    left = shares[-1] / max(shares) if shares and max(shares) else 0.0
    return shares[-1] * (max(2 * left - 1, 0) if fading else left > 0.5)


def papers_method(factor, gradient: Gradient, x0, steps: int, alpha0: float, betas, schedule=constant):
    """x, α of a method with quasi-hyperbolic momentum and the paper's memory; ``factor(g, g_prev, d_prev)`` is its rule."""
    beta1, beta2 = betas
    x, alpha = np.array(x0, dtype=np.float64), alpha0
    g_prev = m = d_prev = None
    longest, share, peak = 0.0, 0.0, 0.0
    xs, alphas = [], []
    for t in range(1, steps + 1):
        g = np.asarray(gradient(t - 1, x), dtype=np.float64)
        size = np.linalg.norm(g)
        if g_prev is not None and size > 10.0 * longest:
            x = x + alpha * share * d_prev
            alpha = clamp(alpha * min(1 / 3, longest / size))
            g_prev, share = None, 0.0
        else:
            if g_prev is None:
                m = d = g
            else:
                alpha = clamp(alpha * factor(g, g_prev, d_prev, peak))
                m = beta1 * m + (1 - beta1) * g_prev
                d = (1 - beta2) * g + beta2 * m
            share = schedule(t)
            peak = max(peak, share)
            x = x - alpha * share * d
            g_prev, d_prev = g, d
            longest = max(np.sqrt(0.98) * longest, size)
        xs.append(x.copy())
        alphas.append(alpha)
    return np.array(xs), np.array(alphas)


def average_method(factor, first: float, gradient: Gradient, x0, steps: int, betas, schedule=constant):
    """The same momentum; ``factor(signal, clock, weight)`` is the rule, and the average of the iterates its memory.

    The first step is ``first`` of the weights long.
    """
    beta1, beta2 = betas
    x = np.array(x0, dtype=np.float64)
    iterates, shares, m, alpha, clock, longest, lasting, calm = [x.copy()], [], None, None, 0.0, 0.0, 0.0, 0.0
    xs, alphas = [], []
    for t in range(1, steps + 1):
        g = np.asarray(gradient(t - 1, x), dtype=np.float64)
        size = np.linalg.norm(g)
        if alpha is None:
            alpha = clamp(first * np.linalg.norm(x) / size)
        moving = bool(shares) and shares[-1] > 0
        overshot = g @ (np.mean(iterates, axis=0) - x) < 0
        if moving and (
            size > 10.0 * longest or (overshot and (size > 5.0 * longest or min(size, 3.0 * lasting) > 10.0 * calm))
        ):
            x = np.mean(iterates, axis=0)
            alpha = clamp(alpha * min(1 / 3, longest / size))
            iterates, m = [x.copy()], None
            shares.append(0.0)
        else:
            if shares:
                way = np.mean(iterates, axis=0) - x
                w = weight_of(shares, fading=True)
                along = cosine(g, m) if m is not None and beta2 else 0.0
                alpha = clamp(alpha * factor(heading(cosine(g, way), along), clock, w))
                clock += w
            m = g if m is None else m
            d = (1 - beta2) * g + beta2 * m
            m = beta1 * m + (1 - beta1) * g
            shares.append(schedule(t))
            x = x - alpha * shares[-1] * d
            iterates.append(x.copy())
            longest = max(np.sqrt(0.98) * longest, size)
            lasting = min(size, 3.0 * lasting) if moving else size
            calm = max(np.sqrt(0.98) * calm, min(size, 1.1 * calm)) if moving else size
        xs.append(x.copy())
        alphas.append(alpha)
    return np.array(xs), np.array(alphas)


def c2min(gradient: Gradient, x0, steps, alpha0=1e-5, betas=(0.8, 0.7), gain=(0.5, 0.5), horizon=20.0, schedule=constant):
    def signed(signal):
        return 1 + (gain[0] if signal < 0 else gain[1]) * signal

    if np.isinf(horizon):
        return papers_method(lambda g, p, d, share: signed(share * cosine(g, p)), gradient, x0, steps, alpha0, betas, schedule)
    return average_method(
        lambda c, clock, w: signed(w * c * horizon / (horizon + clock)), 0.003, gradient, x0, steps, betas, schedule
    )


def p2min(gradient: Gradient, x0, steps, alpha0=1e-5, betas=(0.8, 0.7), growth_limit=2.0, horizon=5.0, schedule=constant):
    def parabola(q):
        return 1 / (1 - q) if 1 - q > 1 / growth_limit else growth_limit

    def papers(g, g_prev, d_prev, share):
        start, end = g_prev @ d_prev, g @ d_prev
        return 1.0 if start <= 0 else parabola(end / start) ** share

    if np.isinf(horizon):
        return papers_method(papers, gradient, x0, steps, alpha0, betas, schedule)
    return average_method(
        lambda c, clock, w: parabola(c) ** (w * horizon / (horizon + clock)), 0.0015, gradient, x0, steps, betas, schedule
    )


def adamw(
    gradient: Gradient,
    x0,
    steps: int,
    alpha0: float = 1e-5,
    betas=(0.9, 0.999),
    eps: float = 1e-8,
    schedule: Callable[[int], float] = constant,
):
    """Step t moves α·``schedule(t)``, ≤ α, by what step t - 1 saw."""
    beta1, beta2 = betas
    x = np.array(x0, dtype=np.float64)
    alpha = 0.005 * np.exp(np.mean(np.log(np.abs(x0[x0 != 0]))))
    iterates, shares, clock, signal, mean_weight, total = [x.copy()], [], 0.0, 0.0, 0.0, 0.0
    m, v = np.zeros_like(x), np.zeros_like(x)
    xs, alphas = [], []
    for t in range(1, steps + 1):
        g = np.asarray(gradient(t - 1, x), dtype=np.float64)
        if shares:
            w = weight_of(shares, fading=False)
            alpha = clamp(alpha * np.exp(max(0.03, 7 / (10 + clock)) * w * signal), 1e-8, 1e6)
            clock += w
        shares.append(schedule(t))
        rate = alpha * shares[-1]
        total = beta2 * total + rate
        fresh = max(rate / (beta1 * mean_weight + rate), 1 - beta1)  # no longer a memory than Adam's where the rate falls
        mean_weight = rate / fresh
        v = v + rate / total * (g * g - v)
        root = np.sqrt(np.sqrt(v) + eps)  # cosines in the metric are those of g / root and way · root
        way = np.average(iterates, axis=0, weights=np.arange(1, t + 1)) - x
        signal = heading(cosine(g / root, way * root), cosine(g / root, m / root))
        m = m + fresh * (g - m)
        x = x - rate * m / (np.sqrt(v) + eps)
        iterates.append(x.copy())
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
