"""Two processes on halves of a batch learn what one process learns on the whole of it."""

import pytest
import torch
from lightning.fabric import Fabric

from tests.distributed.harness import shared

from .modules import NAMES, loader, lowering, plain
from .workers import DOUBLE, fabric_run


@pytest.fixture
def results(tmp_path_factory):
    ranks = shared(tmp_path_factory, "lightning", worker="tests.lightning.workers:everything", world=2)
    return lambda name: [rank[name] for rank in ranks]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("strategy", ["ddp", "fully_shard", "fabric"])
def test_two_processes_equal_one(strategy, name, results):
    (x, alphas), (other_x, other_alphas) = results(f"{strategy} {name}")
    assert alphas == other_alphas
    assert torch.equal(x, other_x)
    truth = {"clip": 1.0} if strategy == "fabric" else {"schedule": lowering}
    expected, expected_alphas, _ = plain(name, dtype=DOUBLE, **truth)
    torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-9)
    assert alphas == pytest.approx(expected_alphas, rel=1e-9)
    assert len(set(alphas)) > 6


@pytest.mark.parametrize("name", NAMES)
def test_fabric_with_one_process(name):
    x, alphas = fabric_run(name, Fabric(accelerator="cpu", devices=1), loader(dtype=DOUBLE))
    expected, expected_alphas, _ = plain(name, dtype=DOUBLE, clip=1.0)
    assert torch.equal(x, expected)
    assert alphas == expected_alphas


def test_the_loss_is_shared_only_when_asked_for(results):
    for restarts, _, _, losses in results("spike False"):
        assert restarts == losses == 0


def test_a_loss_that_explodes_on_one_rank_restarts_all(results):
    first, second = results("spike True")
    assert first[0] == second[0] == 1
    assert first[1] == second[1]
    assert torch.equal(first[2], second[2])
