"""Every set-up against one process on the same global batches: α and x after 20 steps; and wrong reductions are noticed."""

import functools

import pytest
import torch

from .harness import shared
from .setups import SETUPS, VARIANTS, train_alone

SHARDED = [(name, wrong) for name, setup in SETUPS.items() for wrong in setup.wrong]


@functools.cache
def expected(name, variant):
    return train_alone(SETUPS[name], variant)


@pytest.fixture
def outcomes(tmp_path_factory):
    def get(name, variant, kind="right"):
        world = SETUPS[name].world
        ranks = shared(tmp_path_factory, f"rows{world}", worker="tests.distributed.workers:rows", world=world)
        found = [rank[name, variant, kind] for rank in ranks]
        for rank, outcome in enumerate(found):
            assert not isinstance(outcome, str), f"rank {rank}:\n{outcome}"
        return found

    return get


def error(outcome, reference):
    """The largest relative error of α in any step, and of x at the end."""
    alphas, truth = torch.tensor(outcome.alphas).double(), torch.tensor(reference.alphas).double()
    return max(
        ((alphas - truth).abs() / truth).max().item(),
        ((outcome.x - reference.x).abs().max() / reference.x.abs().max()).item(),
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", SETUPS)
def test_same_as_one_process(name, variant, outcomes):
    ranks = outcomes(name, variant)
    for outcome in ranks:
        assert error(outcome, expected(name, variant)) < SETUPS[name].tolerance
        assert outcome.alphas == ranks[0].alphas, "the rate is not the same bits on all ranks"
        assert outcome.collectives == SETUPS[name].collectives


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", SETUPS)
def test_comparison_is_worth_something(name, variant):
    """α moves both ways, and x as well, so that agreement says something."""
    outcome = expected(name, variant)
    changes = torch.tensor(outcome.alphas).diff()
    assert (changes != 0).sum() >= 15
    start = train_alone.__globals__["build"](SETUPS[name].model, SETUPS[name].dtype)
    assert torch.isfinite(outcome.x).all()
    assert any(p.numel() for p in start.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("name", "wrong"), SHARDED)
def test_wrong_reduction_is_noticed(name, wrong, variant, outcomes):
    """The tests above bite: with a local sum, or a world sum where some parameters are whole, they fail."""
    ranks = outcomes(name, variant, wrong)
    assert max(error(outcome, expected(name, variant)) for outcome in ranks) > 1e3 * SETUPS[name].tolerance
