"""torch.distributed.checkpoint: saved by 2 ranks, loaded into 2, 4 and 1; going on equals not having stopped."""

import pytest
import torch

from .harness import shared, shared_folder
from .workers import CASES, SAVED_AFTER


@pytest.fixture
def runs(tmp_path_factory):
    """The run that did not stop, and those that went on from its checkpoints with as many ranks."""

    def get(world):
        folder = str(shared_folder(tmp_path_factory) / "checkpoints")
        saved = shared(tmp_path_factory, "saved", worker="tests.distributed.workers:save", world=2, folder=folder)
        return saved, shared(
            tmp_path_factory, f"resumed{world}", worker="tests.distributed.workers:resume", world=world, folder=folder
        )

    return get


@pytest.mark.parametrize(("kind", "variant", "style"), CASES)
@pytest.mark.parametrize("world", [2, 4, 1])
def test_resumed_equals_not_stopped(world, kind, variant, style, runs):
    saved, resumed = runs(world)
    straight = saved[0][kind, variant]
    rounding = 0.0 if world == 2 else 1e-9
    for rank in resumed:
        outcome = rank[kind, variant, style]
        assert not isinstance(outcome, str), outcome
        torch.testing.assert_close(outcome.alphas, straight.alphas[SAVED_AFTER:], rtol=rounding, atol=0.0)
        torch.testing.assert_close(outcome.x, straight.x, rtol=rounding, atol=rounding)
