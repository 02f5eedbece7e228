"""Every set-up against one process on the same global batches: α and x after 20 steps; and wrong reductions are noticed."""

import functools
import importlib.util
from dataclasses import replace

import pytest
import torch

from .harness import shared
from .setups import FAR, FUSED, SETUPS, VARIANTS, train_alone

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
    """The largest relative error of α in any step taken, and of x at the end."""
    alphas = torch.tensor(outcome.alphas, dtype=torch.float64)  # a list alone becomes float32, which hides what is below 1e-7
    truth = torch.tensor(reference.alphas, dtype=torch.float64)[: len(alphas)]
    worst = ((alphas - truth).abs() / truth).max().item()
    if len(alphas) == len(reference.alphas):
        worst = max(worst, ((outcome.x - reference.x).abs().max() / reference.x.abs().max()).item())
    return worst


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", SETUPS)
def test_same_as_one_process(name, variant, outcomes):
    ranks = outcomes(name, variant)
    for outcome in ranks:
        assert error(outcome, expected(name, variant)) < SETUPS[name].tolerance
        assert outcome.alphas == ranks[0].alphas, "the rate is not the same bits on all ranks"
        sums = 2 if variant == "elra_adamw" else 1  # before the update, and of what that takes in passing
        assert outcome.collectives == sums * SETUPS[name].collectives


@pytest.mark.parametrize("variant", VARIANTS)
def test_comparison_says_something(variant):
    """The rate moves in every step, so that agreement is no accident."""
    assert (torch.tensor(expected("FSDP2", variant).alphas).diff() != 0).sum() >= 15


@pytest.mark.parametrize("variant", ["elra_c2min", "elra_p2min"])
def test_comparison_holds_a_restart(variant):
    """After the batch with far targets the rate is that much lower at least, so that all set-ups restart as one process."""
    alphas = expected("FSDP2", variant).alphas
    assert alphas[FAR] <= alphas[FAR - 1] / 3 * (1 + 1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("name", "wrong"), SHARDED)
def test_wrong_reduction_is_noticed(name, wrong, variant, outcomes):
    """The tests above bite: with a local sum, or a world sum where some parameters are whole, they fail."""
    ranks = outcomes(name, variant, wrong)
    assert max(error(outcome, expected(name, variant)) for outcome in ranks) > 1e3 * SETUPS[name].tolerance


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", SETUPS)
def test_check_sync_finds_nothing_wrong(name, variant, outcomes):
    ranks = outcomes(name, variant, "checked")
    assert max(error(outcome, expected(name, variant)) for outcome in ranks) < SETUPS[name].tolerance


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="no Triton")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("name", "variant"), FUSED)
def test_few_launches_give_the_same(name, variant, tmp_path_factory):
    """Through the kernels for accelerators in Triton's interpreter, where a sum lies between two programs."""
    ranks = shared(tmp_path_factory, "launched", worker="tests.distributed.workers:launched", world=2)
    for outcome, few in (rank[name, variant] for rank in ranks):
        assert few >= 17  # of 20 and those in which the collectives are counted
        assert error(outcome, train_alone(replace(SETUPS[name], dtype=torch.float32), variant)) < 1e-3
        assert outcome.alphas == ranks[0][name, variant][0].alphas
