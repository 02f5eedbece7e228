"""`elra_hf.averaged` and the finder's snapshot where parameters are cut over two ranks."""

import pytest
import torch

from .averages import NAMES, REFUSED
from .harness import shared


@pytest.mark.parametrize("variant", ["elra_adamw", "elra_c2min"])
@pytest.mark.parametrize("name", NAMES)
def test_the_average_goes_in_and_out(name, variant, tmp_path_factory):
    for rank in shared(tmp_path_factory, "averages", worker="tests.distributed.averages:rows", world=2):
        result = rank[name, variant]
        assert isinstance(result, dict), result
        for key, wanted in result["wanted"].items():
            tolerance = 0.0 if key in ("after", "restored") else 1e-9
            torch.testing.assert_close(
                result["found"][key], wanted, rtol=tolerance, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}"
            )
        assert not torch.equal(result["found"]["in"], result["found"]["after"])


@pytest.mark.parametrize("name", REFUSED)
def test_fsdp1_is_refused(name, tmp_path_factory):
    for rank in shared(tmp_path_factory, "averages", worker="tests.distributed.averages:rows", world=2):
        assert "ValueError: averaged: FSDP1 lets the optimizer step copies or slices" in rank[name, "elra_adamw"]
