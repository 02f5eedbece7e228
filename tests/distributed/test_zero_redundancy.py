"""torch's ZeroRedundancyOptimizer, which deals whole parameters out: 2 and 4 ranks against one process."""

import functools

import pytest
import torch

from .dealt import OPTIONS, SHAPES, alone
from .harness import launch, shared

CASES = [(shape, variant, scope) for shape in SHAPES for variant, scope in OPTIONS]
TOLERANCE = 1e-9  # float64; the order of sums is all that differs


@functools.cache
def expected(shape, variant, scope):
    return alone(shape, variant, scope)


@pytest.fixture
def outcomes(tmp_path_factory):
    def get(world, *key):
        ranks = shared(tmp_path_factory, f"dealt{world}", worker="tests.distributed.dealt:rows", world=world)
        found = [rank[key] for rank in ranks]
        for rank, outcome in enumerate(found):
            assert not isinstance(outcome, str), f"rank {rank}:\n{outcome}"
        return found

    return get


@pytest.mark.parametrize("kind", ["right", "checked", "resumed"])
@pytest.mark.parametrize(("shape", "variant", "scope"), CASES)
@pytest.mark.parametrize("world", [2, 4])
def test_same_as_one_process(world, shape, variant, scope, kind, outcomes):
    """With a restart on the way, and with ranks that hold nothing of a group, or nothing at all."""
    truth = expected(shape, variant, scope)
    for outcome in outcomes(world, shape, variant, scope, kind):
        torch.testing.assert_close(outcome.x, truth.x, rtol=TOLERANCE, atol=TOLERANCE)
        assert outcome.restarts == truth.restarts
        assert min(truth.restarts) >= 1.0
        if scope != "tensor":  # there a rank knows only the rates of its own
            for mine, theirs in zip(outcome.alphas, truth.alphas, strict=True):
                assert mine == pytest.approx(theirs, rel=TOLERANCE)


def test_some_ranks_hold_nothing(outcomes):
    """Of a group with two ranks, and of the whole model with four."""
    held = [outcome.held for outcome in outcomes(2, "lopsided", "elra_c2min", "global", "right")]
    assert [0 in groups for groups in held] == [True, True]
    held = [outcome.held for outcome in outcomes(4, "lopsided", "elra_c2min", "global", "right")]
    assert [sum(groups) for groups in held].count(0) == 2


@pytest.mark.parametrize("variant", ["elra_c2min", "elra_p2min", "elra_adamw"])
def test_the_rate_moves(variant):
    rates = [step[0] for step in expected("net", variant, "global").alphas]
    assert len(set(rates)) > 10


def test_wrappers_of_torch_show_the_rate_and_refuse_what_one_rank_alone_cannot_do():
    for rank in launch("tests.distributed.dealt:wrapped", world=2):
        for name, (seen, applied, (average, search)) in rank.items():
            assert seen == pytest.approx(applied)
            assert 0.0 < seen != 1e-3
            assert f"averaged: {name} gives each rank an optimizer of its own" in average
            # PostLocalSGDOptimizer leaves every rank all of its weights
            assert ("ZeroRedundancyOptimizer gives each rank an optimizer of some" in search) == name.startswith("Zero")
