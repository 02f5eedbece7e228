"""What other hands do with an optimizer, and odd tensors: each gives what the plain way gives."""

import copy
import itertools
import re

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from elra_hf import rate

from .problems import VARIANTS, batch, flat, loss_of, net, same, snapshot, train

every = pytest.mark.parametrize("cls", VARIANTS.values(), ids=VARIANTS)
scopes = pytest.mark.parametrize("scope", ["global", "group", "tensor"])


# ---- hands -----------------------------------------------------------------------------------------------------------------


@every
@scopes
def test_lora_plus_with_groups_that_are_empty(cls, scope):
    """peft makes four groups of which two are empty; B moves 16 times as far as A where they share a rate."""
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer

    def begin():
        torch.manual_seed(0)
        model = peft.get_peft_model(net(), peft.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights="gaussian"))
        return model, create_loraplus_optimizer(model, optimizer_cls=cls, lr=1e-4, loraplus_lr_ratio=16, scope=scope)

    model, optimizer = begin()
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 0, 2, 0]
    losses = train(model, optimizer, range(40))
    assert sum(losses[-5:]) < sum(losses[:5])
    a, _, b, _ = optimizer.param_groups
    if scope == "global":
        assert b["effective_lr"].item() == pytest.approx(16 * a["effective_lr"].item(), rel=1e-6)
    assert a["effective_lr"].item() > 0.0
    again, resumed = begin()
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert train(again, resumed, range(40, 50)) == train(model, optimizer, range(40, 50))
    assert torch.equal(flat(again), flat(model))


@every
def test_a_step_for_each_parameter_during_the_backward_pass(cls):
    """One optimizer a parameter, called by a hook once its gradient is there, which saves the memory of gradients."""
    hooked, plain = net(), net()
    for p in hooked.parameters():
        own = cls([p])

        def step(p, own=own):
            own.step()
            own.zero_grad()

        p.register_post_accumulate_grad_hook(step)
    optimizers = [cls([p]) for p in plain.parameters()]
    losses = []
    for k in range(30):
        loss_of(hooked, k).backward()
        assert all(p.grad is None for p in hooked.parameters())
        plain.zero_grad()
        loss = loss_of(plain, k)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        assert torch.equal(flat(hooked), flat(plain))
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


@every
@scopes
@pytest.mark.parametrize("given", [True, False], ids=["given", "left out"])
@pytest.mark.parametrize("flatten", [True, False], ids=["flat", "nested"])
def test_a_distributed_checkpoint_with_frozen_parameters(cls, scope, given, flatten):
    """Resumed equals not stopped, also a second time in the same process."""

    def begin():
        model = net()
        model[0].requires_grad_(False)
        return model, cls([p for p in model.parameters() if given or p.requires_grad], scope=scope)

    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, optimizer = begin()
    still = model[0].weight.clone()
    train(model, optimizer, range(8))
    weights, saved = copy.deepcopy(model.state_dict()), get_optimizer_state_dict(model, optimizer, options=options)
    saved, expected = copy.deepcopy(saved), train(model, optimizer, range(8, 14))
    again, resumed = begin()
    for _ in range(2):
        again.load_state_dict(weights)
        set_optimizer_state_dict(again, resumed, copy.deepcopy(saved), options=options)
        assert train(again, resumed, range(8, 14)) == expected
    assert torch.equal(flat(again), flat(model))
    assert torch.equal(again[0].weight, still)
    assert not any(optimizer.state.get(p) for p in model[0].parameters())


@every
def test_a_gradient_scaler(cls):
    """A step that it skips leaves everything; the others are those of unscaled gradients, since scales are powers of two."""
    model, plain = net(), net()
    optimizer, expected = cls(model.parameters()), cls(plain.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for k in range(10):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, k)).backward()
        if k == 4:
            model[0].weight.grad[0, 0] = torch.inf
        else:
            train(plain, expected, [k])
        scaler.step(optimizer)
        scaler.update()
    assert torch.equal(flat(model), flat(plain))
    assert same(snapshot(optimizer), snapshot(expected))
    assert optimizer.param_groups[0]["restarts"].item() == 0
    assert scaler.get_scale() == 512.0


# ---- tensors ---------------------------------------------------------------------------------------------------------------


@every
@scopes
def test_tied_weights_are_one_tensor(cls, scope):
    """One that two layers use moves once, along the sum of both gradients."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embedding, self.head = nn.Embedding(11, 5), nn.Linear(5, 11, bias=False)
            self.head.weight = self.embedding.weight

    tokens = torch.randint(11, (30,), generator=torch.Generator().manual_seed(0))
    model = Tied()
    x = model.embedding.weight.detach().clone().requires_grad_()
    optimizer, expected = cls(model.parameters(), scope=scope), cls([x], scope=scope)
    for _ in range(15):
        for each, logits in (
            (optimizer, lambda: model.head(model.embedding(tokens))),
            (expected, lambda: x[tokens] @ x.t()),
        ):
            each.zero_grad()
            nn.functional.cross_entropy(logits(), tokens.roll(1)).backward()
            each.step()
    assert len(optimizer.state) == 1
    assert model.head.weight is model.embedding.weight
    torch.testing.assert_close(model.head.weight, x, rtol=1e-3, atol=1e-5)  # gradients are summed in another order
    assert rate(optimizer) == pytest.approx(rate(expected), rel=1e-3)


def alike(cls, scope, views, x0=None):
    """Where runs on one and the same problem in tensors of different make arrive; ``views`` turn x0 into a parameter."""
    x0 = torch.randn(6, generator=torch.Generator().manual_seed(0)) if x0 is None else x0
    curvature, ends = torch.linspace(0.5, 3.0, x0.numel()).view(x0.shape), []
    for view in views:
        x, grad_of = view(x0.clone())
        optimizer = cls([x], scope=scope)
        for _ in range(20):
            x.grad = grad_of(curvature * x.detach().reshape(x0.shape) - 1.0)
            optimizer.step()
        ends.append((x.detach().reshape(x0.shape), rate(optimizer)))
    return ends


@every
@scopes
def test_a_tensor_without_a_dimension_is_one_of_one_number(cls, scope):
    views = [lambda x: (nn.Parameter(x), lambda g: g), lambda x: (nn.Parameter(x.view(1)), lambda g: g.view(1))]
    (x, a), (y, b) = alike(cls, scope, views, torch.tensor(0.3))
    assert torch.equal(x, y)
    assert a == b


@every
@scopes
def test_gradients_that_are_expanded_or_not_contiguous(cls, scope):
    """One number with strides of 0, or a view of something larger."""

    def within(g):
        larger = torch.zeros(3 * g.numel())
        larger[::3] = g
        return larger[::3]

    ends = alike(cls, scope, [lambda x: (nn.Parameter(x), lambda g: g), lambda x: (nn.Parameter(x), within)])
    assert torch.equal(ends[0][0], ends[1][0])
    x, y = (nn.Parameter(torch.arange(1.0, 7.0).view(2, 3)) for _ in range(2))
    a, b = cls([x], scope=scope), cls([y], scope=scope)
    for _ in range(5):
        x.grad, y.grad = torch.ones(1).expand(2, 3), torch.ones(2, 3)
        a.step()
        b.step()
    assert x.grad.stride() == (0, 0)
    assert torch.equal(x, y)
    assert torch.equal(x.grad, torch.ones(2, 3))


@every
def test_a_parameter_that_is_expanded_is_refused_by_torch_and_stays(cls):
    """Its numbers share one place, where AdamW fails, too."""
    x = torch.ones(1).expand(3).requires_grad_()
    x.grad = torch.ones(3)
    optimizer = cls([x])
    with pytest.raises(RuntimeError, match="single memory location"):
        optimizer.step()
    assert torch.equal(x, torch.ones(3))


@every
@scopes
@pytest.mark.parametrize("make", [lambda x: x[::2], lambda x: x.view(3, 4).t()], ids=["every other", "transposed"])
def test_parameters_that_are_views(cls, scope, make):
    """Only the numbers of the view move."""
    whole = torch.arange(12.0)
    part = make(whole).detach().requires_grad_()
    plain = part.detach().clone().requires_grad_()
    others = whole.clone()
    a, b = cls([part], scope=scope), cls([plain], scope=scope)
    for _ in range(6):
        part.grad, plain.grad = 0.1 * part.detach() + 1.0, 0.1 * plain.detach() + 1.0
        a.step()
        b.step()
    torch.testing.assert_close(part, plain, rtol=1e-5, atol=1e-6)
    assert (whole != others).sum().item() == part.numel()


@every
def test_nothing_is_kept_of_what_is_not_used(cls):
    """Parameters of length 0, and such that never have a gradient."""
    model, empty, idle = net(), nn.Parameter(torch.empty(0, 3)), nn.Parameter(torch.ones(3))
    plain = net()
    optimizer, expected = cls([empty, *model.parameters(), idle]), cls(plain.parameters())
    losses = []
    for k in range(10):
        optimizer.zero_grad()
        empty.grad = torch.empty(0, 3)
        x, y = batch(k)
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx(train(plain, expected, range(10)), rel=1e-6)
    assert idle not in optimizer.state


@every
@scopes
@pytest.mark.parametrize(("old", "new"), [((3,), (5,)), ((70000,), (3,)), ((3, 4), (4, 3))], ids=str)
def test_the_state_of_other_shapes_is_refused(cls, scope, old, new):
    """Kernels would read and write beyond it."""
    saved, other = (nn.Parameter(torch.ones(shape)) for shape in (old, new))
    optimizer, fresh = cls([saved], scope=scope), cls([other], scope=scope)
    saved.grad, other.grad = torch.ones(old), torch.ones(new)
    optimizer.step()
    with pytest.raises(ValueError, match=f"{re.escape(str(old))} for a parameter of shape {re.escape(str(new))}.*Load it into"):
        fresh.load_state_dict(optimizer.state_dict())
    assert not fresh.state
    fresh.step()


@pytest.mark.parametrize("cls", [VARIANTS["c2min"], VARIANTS["p2min"]], ids=["c2min", "p2min"])
def test_a_momentum_that_was_never_kept_is_refused_until_the_state_is_gone(cls):
    """betas=(0, 0) saves its memory; somebody asks for it in mid-run."""
    model = net()
    optimizer = cls(model.parameters(), betas=(0.0, 0.0))
    train(model, optimizer, range(5))
    optimizer.param_groups[0]["betas"] = (0.8, 0.7)
    before = flat(model).clone()
    with pytest.raises(RuntimeError, match=r"no 'momentum' in its state, which betas=\(0.8, 0.7\).*del optimizer.state"):
        train(model, optimizer, [5])
    assert torch.equal(flat(model), before)
    for p in model.parameters():
        del optimizer.state[p]
    train(model, optimizer, range(5, 10))
    assert all("momentum" in optimizer.state[p] for p in model.parameters())


@every
@scopes
def test_a_parameter_that_was_resized_is_refused_until_its_state_is_gone(cls, scope):
    x, y = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    optimizer = cls([x, y], scope=scope)
    for _ in range(3):
        x.grad, y.grad = x.detach().clone(), y.detach().clone()
        optimizer.step()
    x.data, x.grad = torch.ones(5), None
    x.grad = torch.ones(5)
    before = y.detach().clone()
    with pytest.raises(RuntimeError, match=r"shape \(5,\) has a state of shape \(3,\).*del optimizer.state\[parameter\]"):
        optimizer.step()
    assert torch.equal(x, torch.ones(5))
    assert torch.equal(y, before)
    del optimizer.state[x]
    optimizer.step()
    assert (x < 1.0).all()


@every
@pytest.mark.parametrize(("old", "new"), list(itertools.permutations(["global", "group", "tensor"], 2)))
def test_a_checkpoint_goes_on_under_another_scope(cls, old, new):
    """With the rate that it has found, and as a run of that scope from then on."""
    model, other = net(), net()
    groups = [[{"params": layer.parameters()} for layer in (each[0], each[2])] for each in (model, other)]
    optimizer, resumed = cls(groups[0], scope=old), cls(groups[1], scope=new)
    losses = train(model, optimizer, range(40))
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    found = [group["alpha"].item() for group in optimizer.param_groups]
    train(other, resumed, range(40, 41))
    first, second = (group["alpha"].item() for group in resumed.param_groups)
    assert first == pytest.approx(found[0], rel=0.5)
    assert second == pytest.approx(found[0 if new == "global" else 1], rel=0.5)
    assert sum(train(other, resumed, range(41, 81))[-10:]) < sum(losses[:10])
    assert all(("elra" in state) == (new == "tensor") for state in resumed.state.values())


@every
@scopes
def test_tensors_without_numbers(cls, scope):
    """Estimators of memory take steps under FakeTensorMode or on the device "meta": the state is as large as that of a run."""

    def state_of(device):
        params = [nn.Parameter(torch.ones(shape, device=device)) for shape in ((4, 3), (4,), ())]
        optimizer = cls(params, scope=scope, weight_decay=0.1)
        for _ in range(3):
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
        return [{name: (t.shape, t.dtype) for name, t in optimizer.state[p].items()} for p in params]

    expected = state_of("cpu")
    assert state_of("meta") == expected
    with FakeTensorMode():
        assert state_of("cpu") == expected


@every
def test_others_may_keep_what_they_like_in_the_state(cls):
    """As torch's optimizers let them: an entry that is no parameter's, and one of a parameter that is no tensor."""
    (model, optimizer), (other, plain) = ((model, cls(model.parameters())) for model in (net(), net()))
    optimizer.state["calls"] = 3
    train(model, optimizer, range(2))
    optimizer.state[model[0].weight]["name"] = "first"
    assert train(model, optimizer, range(2, 6))[-1] == train(other, plain, range(6))[-1]
    assert torch.equal(flat(model), flat(other))


@every
@pytest.mark.parametrize(("old", "new"), list(itertools.permutations(["global", "group"])))
def test_the_scope_may_change_between_two_steps(cls, old, new):
    """The buckets of the step before have their rates elsewhere."""
    rates = []
    for forgets in (False, True):
        model = net()
        optimizer = cls([{"params": layer.parameters()} for layer in (model[0], model[2])], scope=old)
        train(model, optimizer, range(5))
        optimizer.scope = new
        if forgets:
            optimizer._plan = None
        train(model, optimizer, range(5, 15))
        rates.append([group["alpha"].item() for group in optimizer.param_groups])
    assert rates[0] == rates[1]


@every
def test_a_state_that_comes_back_to_its_place_in_another_dtype(cls):
    """As from an offloader with a buffer of its own: the kernels would read beyond what it takes there."""
    runs = [torch.nn.Parameter(torch.linspace(-1.0, 1.0, 64)) for _ in range(2)]
    for p, forgets in zip(runs, (False, True), strict=True):
        optimizer, room = cls([p]), torch.zeros(512, dtype=torch.uint8)
        for t in range(6):
            p.grad = p.detach() * torch.linspace(0.1, 1.0, 64)
            if t == 2:
                way = optimizer.state[p]["way"]
                way.data = room[:256].view(torch.float32).copy_(way)
            if t == 4:
                half = way.bfloat16()
                way.data = room[:128].view(torch.bfloat16).copy_(half)
            if forgets:
                optimizer._plan = None
            optimizer.step()
    assert torch.equal(*runs)


@every
def test_states_that_change_places_are_found(cls):
    """Those of two parameters of one shape, in the order that they had: only whose they are has changed."""
    ends = []
    for forgets in (False, True):
        params = [torch.nn.Parameter(torch.linspace(-1.0, 1.0, 8) * k) for k in (1, 2)]
        optimizer = cls(params)
        for t in range(8):
            if t == 5:
                first, second = (optimizer.state.pop(p) for p in params)
                optimizer.state[params[1]], optimizer.state[params[0]] = first, second
            if forgets:
                optimizer._plan = None
            for p in params:
                p.grad = p.detach() * torch.linspace(0.1, 1.0, 8)
            optimizer.step()
        ends.append(torch.cat([p.detach() for p in params]))
    assert torch.equal(*ends)
