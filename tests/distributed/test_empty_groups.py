"""torch's distributed checkpoint state of an optimizer with a group without parameters, wherever that stands."""

import copy

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from .setups import VARIANTS

STYLES = {"sharded": {}, "full": {"full_state_dict": True, "cpu_offload": True}}


def begin(variant, order, scope):
    torch.manual_seed(3)
    model = torch.nn.Linear(4, 2).double()
    cls, lr = VARIANTS[variant]
    groups = {
        "empty": {"params": [], "lr": lr / 4},
        "weight": {"params": [model.weight], "lr": lr},
        "bias": {"params": [model.bias], "lr": lr / 2},
    }
    return model, cls([groups[name] for name in order], lr=lr, scope=scope)


def advance(model, optimizer, steps):
    rates = []
    for step in steps:
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step)).double()
        (model(x) - x[:, :2].sin() - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        rates.append([(float(group["alpha"]), float(group["effective_lr"])) for group in optimizer.param_groups])
    return rates


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    "order", [("empty", "weight", "bias"), ("weight", "empty", "bias"), ("weight", "bias", "empty")], ids="-".join
)
@pytest.mark.parametrize(("variant", "scope"), [*((name, "global") for name in VARIANTS), ("elra_adamw", "group")])
def test_resumed_equals_not_stopped(variant, scope, order, style):
    options = StateDictOptions(**STYLES[style])
    model, optimizer = begin(variant, order, scope)
    advance(model, optimizer, range(8))
    weights = copy.deepcopy(get_model_state_dict(model))
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    expected = advance(model, optimizer, range(8, 16))

    again, resumed = begin(variant, order, scope)
    again.load_state_dict(weights)
    set_optimizer_state_dict(again, resumed, state, options=options)
    rates = advance(again, resumed, range(8, 16))
    for group, name in enumerate(order):
        if scope == "global" or name != "empty":  # a rate that moves nothing is not kept
            assert [step[group] for step in rates] == [step[group] for step in expected]
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
