"""Groups carry what wrappers and users put there; ours lies beside it, and all of it goes into JSON."""

import copy
import json
import math

import pytest
import torch

from elra_hf import rate

from .problems import VARIANTS, flat, net, train

every = pytest.mark.parametrize("cls", VARIANTS.values(), ids=VARIANTS)
scopes = pytest.mark.parametrize("scope", ["global", "group", "tensor"])
PUBLIC = ("alpha", "cos", "restarts", "clamps", "scale", "effective_lr")
# those that users read, those that older versions kept their state under, and those of other optimizers and wrappers
KEYS = (*PUBLIC, "peak", "clock", "idle", "steps", "step", "loss", "skipped", "base", "kind", "rho", "lr_scale")
VALUES = {"number": 16.0, "whole": 3, "flag": False, "text": "mine", "nothing": None, "list": [1, 2]}


def groups(model, **keys):
    first, *others = model.parameters()
    return [{"params": [first], **copy.deepcopy(keys)}, {"params": others}]


@every
@scopes
@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_keys_of_others_stay_what_they_are(cls, scope, value):
    """The run is that without them, to the last digit; also after a checkpoint."""
    keys = dict.fromkeys(KEYS, value)
    model, plain = net(), net()
    optimizer, expected = cls(groups(model, **keys), scope=scope), cls(groups(plain), scope=scope)
    assert train(model, optimizer, range(8)) == train(plain, expected, range(8))
    again = cls(groups(model, **keys), scope=scope)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert train(model, again, range(8, 16)) == train(plain, expected, range(8, 16))
    assert torch.equal(flat(model), flat(plain))
    for mine in (optimizer, again):
        assert {key: mine.param_groups[0][key] for key in KEYS} == keys
    for group, clean in zip(again.param_groups, expected.param_groups, strict=True):
        for name in ("alpha", "cos", "restarts", "clamps", "scale"):
            assert torch.equal(group[f"elra_{name}"], clean[f"elra_{name}"])
            assert torch.equal(clean[name], clean[f"elra_{name}"])
    assert rate(again) == rate(expected) > 0.0
    assert torch.equal(again.param_groups[1]["alpha"], again.param_groups[1]["elra_alpha"])  # that group brought none


@every
@pytest.mark.parametrize("key", KEYS)
def test_a_key_that_comes_later_breaks_nothing(cls, key):
    """As wrappers do that are built around an optimizer."""
    model, plain = net(), net()
    optimizer, expected = cls(model.parameters()), cls(plain.parameters())
    losses = []
    for step in range(6):
        optimizer.param_groups[0][key] = 0.5
        losses += train(model, optimizer, [step])
        json.dumps(optimizer.state_dict()["param_groups"])
    assert losses == train(plain, expected, range(6))
    assert rate(optimizer) == rate(expected)


@every
@scopes
def test_groups_go_into_json_and_come_back(cls, scope):
    """At any moment; the numbers are those of the run, and a checkpoint of them goes on as the run does."""
    model = net()
    optimizer = cls(groups(model, note="mine"), scope=scope)
    late = torch.ones(3, requires_grad=True)
    for step in range(4):
        text = json.dumps(optimizer.state_dict()["param_groups"])
        if step == 2:
            optimizer.add_param_group({"params": [late]})
        train(model, optimizer, [step])
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    saved = optimizer.state_dict()
    text = json.dumps(saved["param_groups"])
    read = json.loads(text)
    for group, mine in zip(optimizer.param_groups, read, strict=True):
        for name in PUBLIC:
            assert mine[name] == group[name].item()
            assert math.isfinite(mine[name])
    twin_model = copy.deepcopy(model)
    twin = cls([*groups(twin_model), {"params": [late.detach().clone().requires_grad_()]}], scope=scope)
    twin.load_state_dict({"state": copy.deepcopy(saved["state"]), "param_groups": read})
    assert train(twin_model, twin, range(4, 9)) == train(model, optimizer, range(4, 9))
    assert torch.equal(flat(twin_model), flat(model))
