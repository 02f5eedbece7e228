"""Parameter groups that are stepped one at a time, as DeepSpeed ZeRO does, keep to themselves."""

import copy

import pytest
import torch

from elra_hf import ElraAdamW, ElraC2Min, ElraP2Min

VARIANTS = {"c2min": ElraC2Min, "p2min": ElraP2Min, "adamw": ElraAdamW}
STATE = ("alpha", "cos", "restarts", "clamps", "elra_multiplier")


def slices(groups=3):
    """Bare leaves, as ZeRO makes them, and gradients that agree in one group and explode in another."""
    torch.manual_seed(0)
    params = [torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(groups)]
    grads = [[torch.randn(6, dtype=torch.float64) + 1.0 for _ in params] for _ in range(9)]
    grads[5][1] *= 1000.0
    return params, grads


def swapped(optimizer, index):
    """One step of one group as ZeRO-1 and 2 take it: there is no other."""
    groups, optimizer.param_groups = optimizer.param_groups, [optimizer.param_groups[index]]
    optimizer.step()
    optimizer.param_groups = groups


def emptied(optimizer, index):
    """As ZeRO-3 takes it: the others have no parameters."""
    held = [group["params"] for group in optimizer.param_groups]
    for i, group in enumerate(optimizer.param_groups):
        group["params"] = held[i] if i == index else []
    optimizer.step()
    for group, params in zip(optimizer.param_groups, held, strict=True):
        group["params"] = params


@pytest.mark.parametrize("cls", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("one", [swapped, emptied])
def test_groups_stepped_apart_equal_optimizers_of_their_own(one, cls):
    params, grads = slices()
    own, _ = slices()
    together = cls([{"params": [p]} for p in params], lr=1e-3, scope="group")
    apart = [cls([p], lr=1e-3) for p in own]
    for step, row in enumerate(grads):
        for p, q, grad in zip(params, own, row, strict=True):
            p.grad, q.grad = grad.clone(), grad.clone()
        for index, optimizer in enumerate(apart):
            one(together, index)
            optimizer.step()
        if step == 3:  # a checkpoint loses nothing of that
            saved = copy.deepcopy(together.state_dict())
            together = cls([{"params": [p]} for p in params], lr=1e-3, scope="group")
            together.load_state_dict(saved)
        for group, optimizer in zip(together.param_groups, apart, strict=True):
            assert [group[name] for name in STATE] == [optimizer.param_groups[0][name] for name in STATE]
    for p, q in zip(params, own, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("one", [swapped, emptied])
def test_one_rate_for_groups_that_never_meet_is_refused(one):
    params, grads = slices(2)
    optimizer = ElraC2Min([{"params": [p]} for p in params])
    for p, grad in zip(params, grads[0], strict=True):
        p.grad = grad
    one(optimizer, 0)
    with pytest.raises(RuntimeError, match=r'sees 1 of 2 parameters.*scope="group"'):
        one(optimizer, 1)


def test_what_is_taken_out_for_good_is_let_go_with_its_state():
    """Of leaves that are no nn.Parameter, as in a fit of a few numbers."""
    params, grads = slices(2)
    optimizer = ElraC2Min([{"params": [p]} for p in params])
    for row in grads[:3]:
        for p, grad in zip(params, row, strict=True):
            p.grad = grad.clone()
        optimizer.step()
    (out,) = optimizer.param_groups.pop()["params"]
    with pytest.raises(RuntimeError, match=r"del optimizer\.state\[parameter\]"):
        optimizer.step()
    del optimizer.state[out]
    before = [p.detach().clone() for p in params]
    optimizer.step()
    assert [torch.equal(p, old) for p, old in zip(params, before, strict=True)] == [False, True]


@pytest.mark.parametrize("scope", ["group", "tensor"])
def test_a_group_without_parameters_stays_as_it_is(scope):
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = ElraC2Min([{"params": []}, {"params": [p]}], lr=1e-3, scope=scope)
    for _ in range(3):
        p.grad = torch.ones(3)
        optimizer.step()
    assert optimizer.param_groups[0]["alpha"] == pytest.approx(1e-3)
    assert optimizer.param_groups[1]["alpha"] > 2e-3
