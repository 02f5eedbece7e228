"""Parameters that others move between the steps, as constraints do: the average and the rate are those of where they stand."""

import copy

import pytest
import torch

import elra_hf

from ..iterates import average
from .problems import VARIANTS, flat, loss_of, net, train

every = pytest.mark.parametrize("cls", VARIANTS.values(), ids=VARIANTS)


@torch.no_grad()
def clamp(model):
    for p in model.parameters():
        p.clamp_(-0.3, 0.3)


@torch.no_grad()
def normalise(model):
    for layer in (model[0], model[2]):
        layer.weight.div_(layer.weight.norm(dim=1, keepdim=True))


constraints = pytest.mark.parametrize("constrain", [clamp, normalise])


def run(model, optimizer, constrain, steps):
    """Steps with the constraint after each; the losses, and all iterates."""
    losses, iterates = [], [flat(model)]
    for step in steps:
        losses += train(model, optimizer, [step])
        constrain(model)
        iterates.append(flat(model))
    return losses, iterates


def resumes(cls, model, constrain, saved_after):
    """20 steps more are the same with what was saved as without the break."""
    optimizer, other = cls(model.parameters()), net()
    resumed = cls(other.parameters())
    run(model, optimizer, constrain, range(saved_after))
    saved, again = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(constrain)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(saved)
    rest = range(saved_after, saved_after + 20)
    assert run(model, optimizer, constrain, rest)[0] == run(other, resumed, again, rest)[0]
    assert torch.equal(flat(model), flat(other))


@every
@constraints
@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_the_average_is_that_of_where_they_stood(cls, constrain, scope):
    model = net(dtype=torch.float64)
    constrain(model)
    optimizer = cls(model.parameters(), scope=scope)
    _, iterates = run(model, optimizer, constrain, range(150))
    before = flat(model)
    with elra_hf.averaged(optimizer):
        mean = flat(model)
    assert torch.equal(flat(model), before)
    # of the first steps, which are short, it is not seen how far a constraint took them back
    torch.testing.assert_close(mean, average(iterates, cls), rtol=1e-3, atol=1e-3)


class Lookahead:
    """Every fifth step goes back half of the way to where the last such one ended. Source: arXiv 1907.08610."""

    def __init__(self, model):
        self.slow, self.steps = flat(model), 0

    @torch.no_grad()
    def __call__(self, model):
        self.steps += 1
        if self.steps % 5 == 0:
            self.slow = 0.5 * (self.slow + flat(model))
            for p, slow in zip(model.parameters(), self.slow.split([p.numel() for p in model.parameters()]), strict=True):
                p.copy_(slow.view(p.shape))


@every
@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_the_average_under_lookahead(cls, scope):
    model = net(dtype=torch.float64)
    optimizer = cls(model.parameters(), scope=scope)
    _, iterates = run(model, optimizer, Lookahead(model), range(200))
    mean = average(iterates, cls)
    with elra_hf.averaged(optimizer):
        # two moves were not seen, those of the first ten steps
        assert (flat(model) - mean).norm() < 0.05 * (iterates[-1] - mean).norm()


@every
@pytest.mark.parametrize("every_n", [2, 10])
def test_the_rate_does_not_run_away_where_a_constraint_comes_now_and_then(cls, every_n):
    model, other = net(), net()
    optimizer, adam = cls(model.parameters()), torch.optim.AdamW(other.parameters(), lr=1e-2)
    calls = {id(model): 0, id(other): 0}

    def constrain(each):
        calls[id(each)] += 1
        if calls[id(each)] % every_n == 0:
            normalise(each)

    ours, theirs = run(model, optimizer, constrain, range(600))[0], run(other, adam, constrain, range(600))[0]
    assert sum(ours[-50:]) < 1.1 * sum(theirs[-50:])
    free = cls((plain := net()).parameters())
    train(plain, free, range(600))
    assert optimizer.param_groups[0]["alpha"] < 10 * free.param_groups[0]["alpha"]


@every
@pytest.mark.parametrize("saved_after", range(3, 13))
def test_a_run_under_lookahead_resumes_digit_for_digit(cls, saved_after):
    """Wherever it is stopped: before a move is seen, after it, and when it is known that more will come."""
    model = net()
    resumes(cls, model, Lookahead(model), saved_after)


@every
@constraints
def test_the_rate_does_not_run_away(cls, constrain):
    """What a constraint takes back of each step would pile up behind: rates of 1e6, and weights of 1e7 in the average."""
    model, other = net(), net()
    optimizer, adam = cls(model.parameters()), torch.optim.AdamW(other.parameters(), lr=1e-2)
    ours, theirs = run(model, optimizer, constrain, range(600))[0], run(other, adam, constrain, range(600))[0]
    assert sum(ours[-50:]) < 1.1 * sum(theirs[-50:])
    free = cls((plain := net()).parameters())
    train(plain, free, range(600))
    assert optimizer.param_groups[0]["alpha"] < 10 * free.param_groups[0]["alpha"]


@every
def test_a_run_under_a_constraint_resumes_digit_for_digit(cls):
    resumes(cls, net(), clamp, 20)


@every
def test_parameters_that_are_put_back_are_not_moved(cls):
    """The average every step, other weights now and then: neither a digit nor a copy comes of it, also where it is saved."""
    model, plain = net(), net()
    optimizer, expected = cls(model.parameters()), cls(plain.parameters())
    for step in range(20):
        train(model, optimizer, [step])
        with elra_hf.averaged(optimizer):
            loss_of(model, step)
        if step % 5 == 0:
            kept = copy.deepcopy(model.state_dict())
            model.load_state_dict(net(seed=1).state_dict())
            model.load_state_dict(kept)
            optimizer.state_dict()
    train(plain, expected, range(20))
    assert torch.equal(flat(model), flat(plain))
    assert not optimizer._hands._copies


@every
def test_only_what_is_moved_is_copied(cls):
    model = net()
    optimizer = cls(model.parameters())

    @torch.no_grad()
    def half(model):
        model[0].weight.clamp_(-0.3, 0.3)

    run(model, optimizer, half, range(10))
    assert set(optimizer._hands._copies) == {model[0].weight}
