"""The bench's schedules and fixed baselines."""

import math

import pytest
import torch

from recipes.benchmarks.optimizers import OPTIMIZERS, SCHEDULES


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 20, 1000])
def test_a_schedule_stays_between_0_and_1_and_reaches_1(name, steps):
    factors = [SCHEDULES[name](step, steps) for step in range(steps)]
    assert all(0.0 <= factor <= 1.0 for factor in factors)
    assert max(factors) == 1.0
    assert 0.0 <= SCHEDULES[name](steps + 1, steps + 2) <= 1.0


def test_warm_ups_take_the_share_they_name():
    linear = [SCHEDULES["warmup-linear"](step, 100) for step in range(101)]
    assert linear[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert linear[100] == 0.0
    cosine = [SCHEDULES["warmup-cosine"](step, 100) for step in range(101)]
    assert cosine[:3] == pytest.approx([0.5, 1.0, 1.0])
    assert cosine[51] == pytest.approx(0.5)
    assert [SCHEDULES["warmup-constant"](step, 100) for step in (0, 4, 99)] == pytest.approx([0.2, 1.0, 1.0])


def test_nadamw_is_adam_with_nesterovs_momentum_and_decay_of_its_own():
    """Dozat's formula with a constant momentum, as in AlgoPerf."""
    declared = OPTIMIZERS["nadamw"]
    x = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = declared.make([x], declared.rate)
    b1, b2, decay, rate = 0.93266, 0.99552, 0.0812, 1.749e-3
    wanted, m, v = x.detach().clone(), torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for step in range(1, 6):
        gradient = torch.tensor([math.sin(step), 0.1 * step], dtype=torch.float64)
        x.grad = gradient.clone()
        optimizer.step()
        m, v = b1 * m + (1 - b1) * gradient, b2 * v + (1 - b2) * gradient**2
        ahead = b1 * m / (1 - b1 ** (step + 1)) + (1 - b1) * gradient / (1 - b1**step)
        wanted = wanted * (1 - rate * decay) - rate * ahead / ((v / (1 - b2**step)).sqrt() + 1e-8)
        torch.testing.assert_close(x.detach(), wanted, rtol=1e-7, atol=0.0)  # it keeps a product in fp32
