"""`elra_hf.averaged`: the average of all iterates in the parameters, and the iterate back, bit for bit."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

import elra_hf
from elra_hf import ElraAdamW, ElraC2Min, ElraP2Min
from elra_hf.average import settle

from ..iterates import average

CLASSES = (ElraAdamW, ElraC2Min, ElraP2Min)


class Net(nn.Module):
    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(3)
        self.inner = nn.Linear(5, 6, dtype=dtype)
        self.outer = nn.Linear(6, 2, dtype=dtype)
        self.unused = nn.Parameter(torch.ones(3, dtype=dtype))
        self.frozen = nn.Parameter(torch.ones(3, dtype=dtype), requires_grad=False)

    def forward(self, x):
        return self.outer(torch.tanh(self.inner(x)))


def copies(module):
    """In the order of the parameters: unused, frozen, the inner weight, and the others."""
    return [p.detach().clone() for p in module.parameters()]


def same(module, values):
    return all(torch.equal(p, value) for p, value in zip(module.parameters(), values, strict=True))


def batch(step, dtype=torch.float64):
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(dtype)
    return x, torch.sin(x[:, :2])


def train(net, optimizer, steps, start=0, seen=None):
    """Steps; with ``seen`` all iterates, the first included."""
    for step in range(start, start + steps):
        if seen is not None:
            seen.append(copies(net))
        x, y = batch(step, next(net.parameters()).dtype)
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x), y).backward()
        optimizer.step()
    if seen is not None:
        seen.append(copies(net))


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("cls", CLASSES)
def test_it_is_the_average_of_all_iterates_and_the_iterate_comes_back(cls, scope):
    net, seen = Net(), []
    optimizer = cls(net.parameters(), weight_decay=0.1, scope=scope)
    train(net, optimizer, 30, seen=seen)
    assert float(optimizer.param_groups[0]["restarts"]) == 0
    means = [average(each, cls) for each in zip(*seen, strict=True)]
    with elra_hf.averaged(optimizer):
        for p, mean in zip(net.parameters(), means, strict=True):
            torch.testing.assert_close(p.detach(), mean, rtol=1e-9, atol=1e-12)
        assert not same(net, seen[-1])
    assert same(net, seen[-1])


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_looking_at_the_average_changes_nothing(cls, dtype):
    """Not even the last bit: a run that is looked at all the time is the run that is not."""
    results = []
    for look in (True, False):
        net = Net(dtype)
        optimizer = cls(net.parameters())
        for step in range(12):
            train(net, optimizer, 1, start=step)
            if look:
                with elra_hf.averaged(optimizer):
                    pass
        results.append((copies(net), float(optimizer.param_groups[0]["alpha"])))
    assert results[0][1] == results[1][1]
    assert all(torch.equal(a, b) for a, b in zip(results[0][0], results[1][0], strict=True))


def test_what_is_raised_inside_is_raised_and_the_iterate_is_back():
    net = Net()
    optimizer = ElraAdamW(net.parameters())
    train(net, optimizer, 5)
    before = copies(net)
    with pytest.raises(KeyboardInterrupt), elra_hf.averaged(optimizer):
        raise KeyboardInterrupt
    assert same(net, before)
    train(net, optimizer, 1, start=5)  # and training goes on
    assert not same(net, before)


@pytest.mark.parametrize("there", ["cast", "moved"])
def test_the_iterate_finds_parameters_that_were_cast_or_moved_inside(there):
    """As to save the average in half precision: the tensors that the parameters held are not those that they hold then."""
    net = Net(torch.float32)
    optimizer = ElraAdamW(net.parameters())
    train(net, optimizer, 5)
    before = copies(net)
    with elra_hf.averaged(optimizer):
        if there == "cast":
            net.half().float()
        else:
            for p in net.parameters():
                p.data = p.data.clone()  # what a move to another device and back comes to
    assert same(net, before)


def test_a_step_inside_and_nesting_are_refused():
    net = Net()
    optimizer = ElraAdamW(net.parameters())
    train(net, optimizer, 5)
    before = copies(net)
    with pytest.raises(RuntimeError, match=r"step\(\) inside averaged"), elra_hf.averaged(optimizer):
        optimizer.step()
    with (
        pytest.raises(RuntimeError, match="hold the average already"),
        elra_hf.averaged(optimizer),
        elra_hf.averaged(optimizer),
    ):
        pass
    assert same(net, before)
    with elra_hf.averaged(optimizer):  # the refusals have left nothing behind
        assert not same(net, before)
    assert same(net, before)


def test_before_the_first_step_it_is_the_start():
    net = Net()
    before = copies(net)
    with elra_hf.averaged(ElraAdamW(net.parameters())):
        assert same(net, before)


@pytest.mark.parametrize("cls", [ElraC2Min, ElraP2Min])
def test_the_papers_rule_keeps_none(cls):
    optimizer = cls(Net().parameters(), horizon=math.inf)
    with (
        pytest.raises(ValueError, match=f"{cls.__name__} .* keeps no average .* leave out horizon=inf"),
        elra_hf.averaged(optimizer),
    ):
        pass


def test_other_optimizers_are_refused():
    optimizer = torch.optim.AdamW(Net().parameters())
    with pytest.raises(TypeError, match="AdamW holds no ELRA optimizer"), elra_hf.averaged(optimizer):
        pass


def test_through_accelerates_wrapper():
    from accelerate import Accelerator

    accelerator, net, seen = Accelerator(cpu=True), Net(), []
    net, optimizer = accelerator.prepare(net, ElraAdamW(net.parameters()))
    train(net, optimizer, 5, seen=seen)
    with elra_hf.averaged(optimizer):
        mean = average([each[2] for each in seen])
        torch.testing.assert_close(net.inner.weight.detach(), mean)
    assert same(net, seen[-1])


def test_through_fabrics_wrapper():
    fabric = pytest.importorskip("lightning.fabric").Fabric(accelerator="cpu", devices=1)
    net, seen = Net(), []
    _, optimizer = fabric.setup(net, ElraAdamW(net.parameters()))
    train(net, optimizer, 5, seen=seen)
    with elra_hf.averaged(optimizer):
        mean = average([each[2] for each in seen])
        torch.testing.assert_close(net.inner.weight.detach(), mean)
    assert same(net, seen[-1])


class DeepSpeedLike:
    """Stands for DeepSpeed's wrapper, which needs its package; the real one is in tests/distributed/test_zero.py."""

    __module__ = "deepspeed.runtime.zero.stage_1_and_2"

    def __init__(self, optimizer):
        self.optimizer = optimizer


def test_deepspeeds_is_refused():
    optimizer = DeepSpeedLike(ElraAdamW(Net().parameters()))
    with pytest.raises(ValueError, match="DeepSpeed lets the optimizer step copies or slices"), elra_hf.averaged(optimizer):
        pass


@pytest.mark.parametrize("cls", CLASSES)
def test_the_average_survives_a_checkpoint(cls):
    net, seen = Net(), []
    optimizer = cls(net.parameters())
    train(net, optimizer, 5, seen=seen)
    other = Net()
    other.load_state_dict(net.state_dict())
    resumed = cls(other.parameters())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(net, optimizer, 5, start=5)
    train(other, resumed, 5, start=5)
    with elra_hf.averaged(optimizer), elra_hf.averaged(resumed):
        assert same(other, copies(net))


@pytest.mark.parametrize("cls", CLASSES)
def test_settled_the_average_is_the_iterate(cls):
    net = Net()
    optimizer = cls(net.parameters())
    train(net, optimizer, 9)
    with elra_hf.averaged(optimizer):
        mean = copies(net)
    settle(optimizer)
    assert same(net, mean)
    with elra_hf.averaged(optimizer):
        assert same(net, mean)
    train(net, optimizer, 3, start=9)
    assert all(torch.isfinite(p).all() for p in net.parameters())


def test_state_takes_what_is_documented():
    """Bytes of a float32 parameter, of which 4 are the average."""
    for cls, expected in {ElraAdamW: 12, ElraC2Min: 8, ElraP2Min: 8}.items():
        net = nn.Linear(100, 100)
        optimizer = cls(net.parameters())
        net(torch.ones(1, 100)).sum().backward()
        optimizer.step()
        state = optimizer.state[net.weight]
        own = {name: value for name, value in state.items() if value.shape == net.weight.shape}
        assert sum(value.numel() * value.element_size() for value in own.values()) == expected * net.weight.numel()
        assert own["way"].element_size() == 4


def test_statistics_taken_anew_fit_the_average():
    """As the docstring advises for BatchNorm: those of the iterate do not."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Linear(32, 2)).double()
    optimizer = ElraAdamW(net.parameters())
    train(net, optimizer, 300)
    x, y = batch(1000)

    def loss():
        with torch.no_grad():
            return nn.functional.mse_loss(net.eval()(x), y).item()

    before = {name: value.clone() for name, value in net.state_dict().items()}
    with elra_hf.averaged(optimizer):
        stale = loss()
        update_bn([batch(step)[0] for step in range(100)], net)
        assert loss() < 0.7 * stale
    for name, value in net.named_parameters():
        assert torch.equal(value, before[name])
