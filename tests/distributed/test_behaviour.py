"""What is refused, what ``check_sync`` finds, and the ways in which a step is delayed, skipped or uneven. 2 ranks."""

import re
import sys

import pytest
import torch

from .harness import launch, run, shared
from .setups import SETUPS, VARIANTS, train_alone
from .workers import BAD, with_a_nan


@pytest.fixture
def results(tmp_path_factory):
    return lambda name: [
        rank[name] for rank in shared(tmp_path_factory, "behaviour", worker="tests.distributed.workers:behaviour", world=2)
    ]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("fsdp1_step", "slices made by FSDP1.*process_group=elra_hf.adapters.accelerate.sharding_group"),
        ("bare", "slices made by DeepSpeed ZeRO.*torch.nn.Parameter"),
        ("fsdp2_with_group", "DTensors.*leave it out"),
        ("mixed_strategies", r"\(0, 1\).*the same sharding strategy"),
    ],
)
def test_refused(case, message, results):
    for said in results(f"refusals: {case}"):
        assert re.search(message, said), said


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("not_prepared", r"different gradient .* accelerator.prepare\(model\)"),
        ("one_rank_skips_its_all_reduce", "different gradient .* skips the all-reduce"),
        ("one_rank_has_no_gradient", "different gradient"),
        ("no_sync", r"different gradient .* no_sync\(\)"),
        ("other_seeds", "different parameters .* different seeds"),
        ("other_rates", "different rate .* optimizer state loaded on some ranks"),
        ("unmanaged_parameters", "different gradient"),
    ],
)
def test_check_sync_raises_on_every_rank(case, message, results):
    for said in results(f"check_sync: {case}"):
        assert re.search(message, said), said


def test_check_sync_lets_equal_nans_pass(results):
    assert results("check_sync: nan_everywhere") == ["", ""]


@pytest.mark.parametrize(("kind", "number"), [("DDP", "1"), ("FSDP2", "2")])
def test_check_sync_costs_one_collective(kind, number, results):
    assert results(f"check_sync: collectives, {kind}") == [number, number]


@pytest.mark.parametrize("variant", VARIANTS)
def test_join_with_uneven_inputs(variant, results):
    assert results(f"join: {variant}") == [3, 6]


def test_skipped_step_teaches_nothing(results):
    first, second = results("scaler: alphas")
    assert first == second
    assert first[3] == first[2]
    assert first[4] != first[3]
    assert results("scaler: restarts") == [0.0, 0.0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_accelerate_with_accumulation(variant, results):
    truth = train_alone(SETUPS["DDP"], variant)
    for outcome in results(f"accelerated: {variant}"):
        torch.testing.assert_close(outcome.alphas, truth.alphas, rtol=1e-9, atol=0.0)
        torch.testing.assert_close(outcome.x, truth.x, rtol=1e-9, atol=1e-9)


def test_accelerate_without_fsdp1_needs_no_group(results):
    assert results("accelerated: group") == [None, None]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["FSDP2", "FSDP1"])
def test_a_nan_in_one_ranks_shard_is_one_of_all(kind, variant, results):
    """All ranks leave out the step and go on, as one process with the whole gradient does."""
    alphas, x, restarts = with_a_nan(kind, variant)
    assert alphas[BAD] == pytest.approx(alphas[BAD - 1] / 3, rel=1e-9)
    assert torch.isfinite(x).all()
    for found, x_found, restarts_found in results(f"bad_shards: {kind}, {variant}"):
        assert restarts_found == restarts
        torch.testing.assert_close(found, alphas, rtol=1e-9, atol=0.0)
        torch.testing.assert_close(x_found, x, rtol=1e-9, atol=1e-9)


def test_a_rank_that_has_stopped_is_an_error_of_the_other_one(results):
    """After the group's time limit, and with nothing changed."""
    step, said, kept = results("hung: stopped")[0]
    assert step == 4
    assert re.search("(?i)timed out", said), said
    assert kept


def test_hanging_ranks_are_killed_and_heard():
    with pytest.raises(AssertionError, match=r"silent for more than 25 s(.|\n)*rank 1 waits"):
        launch("tests.distributed.workers:hang", world=2, timeout=25)


def test_slow_ranks_that_talk_are_left_alone():
    code = "import time\nfor i in range(8): print(i, flush=True); time.sleep(1)"
    (said,) = run([[sys.executable, "-c", code]], timeout=5)
    assert said.split()[-1] == "7"
