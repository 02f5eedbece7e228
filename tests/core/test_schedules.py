"""Every scheduler of torch and transformers: a run is not lost, and a schedule can only hold the rate down."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR
from transformers import SchedulerType, get_scheduler

from .problems import VARIANTS, flat, loss_of, net, train

STEPS = 160
every = pytest.mark.parametrize("cls", VARIANTS.values(), ids=VARIANTS)
pytestmark = pytest.mark.filterwarnings("ignore:a schedule raised lr", "ignore:.*lr_scheduler.step", "ignore:.*epoch parameter")


def chained(optimizer):
    return schedulers.ChainedScheduler([schedulers.ConstantLR(optimizer, 0.1, 20), schedulers.ExponentialLR(optimizer, 0.99)])


def sequential(optimizer):
    """Warm-up, stable, decay."""
    parts = [
        schedulers.LinearLR(optimizer, 1e-3, 1.0, STEPS // 10),
        schedulers.ConstantLR(optimizer, 1.0, 1),
        schedulers.LinearLR(optimizer, 1.0, 0.0, STEPS // 5),
    ]
    return schedulers.SequentialLR(optimizer, parts, [STEPS // 10, STEPS - STEPS // 5])


# With the numbers that users of AdamW give, which are far above the lr of 1e-5, and with the group's own lr.
TORCH = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda t: 1.0 - t / STEPS),
    "LambdaLR from 0": lambda o: schedulers.LambdaLR(o, lambda t: min(1.0, t / 20)),
    "LambdaLR above 1": lambda o: schedulers.LambdaLR(o, lambda t: 1.0 + t),
    "LambdaLR cycle of zeros": lambda o: schedulers.LambdaLR(o, lambda t: float(t % 3 > 0)),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda t: 0.98),
    "StepLR": lambda o: schedulers.StepLR(o, 40, 0.3),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [50, 120], 0.1),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, 0.1, 30),
    "LinearLR": lambda o: schedulers.LinearLR(o, 0.1, 1.0, 30),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.98),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, STEPS, 2.0),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, STEPS),
    "CosineAnnealingLR eta_min": lambda o: schedulers.CosineAnnealingLR(o, STEPS, eta_min=1e-4),
    "CosineAnnealingLR, three times": lambda o: schedulers.CosineAnnealingLR(o, STEPS // 3),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 30, 2),
    "CosineAnnealingWarmRestarts eta_min": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 30, 2, eta_min=1e-3),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 1e-5, total_steps=STEPS + 1),
    "OneCycleLR 0.1": lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=STEPS + 1),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 1e-6, 1e-5, 20, cycle_momentum=False),
    "CyclicLR 0.1": lambda o: schedulers.CyclicLR(o, 1e-4, 0.1, 20, mode="triangular2", cycle_momentum=False),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=3, factor=0.5),
    "SWALR": lambda o: SWALR(o, swa_lr=0.05, anneal_epochs=10),
    "ChainedScheduler": chained,
    "SequentialLR": sequential,
}
SPECIFIC = {
    "cosine_with_restarts": {"num_cycles": 3},
    "polynomial": {"power": 2.0},
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": STEPS // 4},
    "greedy": {"patience": 5, "factor": 0.7},
}


def of_transformers(kind):
    def make(optimizer):
        specific = {} if kind in ("reduce_lr_on_plateau",) else SPECIFIC.get(kind, {})
        return get_scheduler(kind, optimizer, 8, STEPS, scheduler_specific_kwargs=specific)

    return make


# reduce_lr_on_plateau and greedy watch a loss; the others count
ALL = {**TORCH, **{f"transformers {kind.value}": of_transformers(kind.value) for kind in SchedulerType}}


@every
@pytest.mark.parametrize("name", ALL)
def test_no_schedule_loses_the_run_or_raises_the_rate(cls, name):
    model = net()
    optimizer = cls(model.parameters())
    schedule = ALL[name](optimizer)
    losses = []
    for step in range(STEPS):
        losses += train(model, optimizer, [step % 20])
        group = optimizer.param_groups[0]
        alpha, applied = group["alpha"].item(), group["effective_lr"].item()
        assert 0.0 <= applied <= alpha * (1.0 + 1e-5)
        assert math.isfinite(alpha)
        schedule.step(*([losses[-1]] if "plateau" in name.lower() or "greedy" in name else []))
    assert max(losses[-20:]) < losses[0] + 0.1
    assert sum(losses[-20:]) / 20 < 0.75 * losses[0]


@every
@pytest.mark.parametrize("scope", ["global", "group", "tensor"])
def test_late_unfreezing_and_a_late_group_under_a_schedule(cls, scope):
    """The body is freed, and a group added, in the middle of a decay with restarts."""
    model, late = net(), nn.Parameter(torch.ones(4))
    model[0].requires_grad_(False)
    optimizer = cls([{"params": model[0].parameters()}, {"params": model[2].parameters()}], scope=scope)
    schedule = schedulers.CosineAnnealingWarmRestarts(optimizer, 40)
    losses = []
    for step in range(STEPS):
        if step == 50:
            model[0].requires_grad_(True)
        if step == 70:
            optimizer.add_param_group({"params": [late], "initial_lr": 1e-5})
            schedule.base_lrs.append(1e-5)
        late.grad = (late.detach() - 2.0) if step >= 70 else None
        for p in model.parameters():
            p.grad = None
        loss = loss_of(model, step % 20)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        schedule.step()
        for group in optimizer.param_groups:
            assert group["effective_lr"].item() <= group["alpha"].item() * (1.0 + 1e-5)
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])
    assert torch.isfinite(late).all()
    assert (late - 2.0).abs().max() < 1.0  # it has come closer


@every
@pytest.mark.parametrize("kind", ["float", "tensor"])
def test_the_highest_lr_seen_survives_a_checkpoint(cls, kind):
    """A one-cycle schedule whose rates are absolute, cut on its way up: the share of the full rate goes on."""

    def begin():
        model = net()
        optimizer = cls(model.parameters(), lr=torch.tensor(1e-5) if kind == "tensor" else 1e-5)
        return model, optimizer, schedulers.LambdaLR(optimizer, lambda t: 1.0 + 0.1 * t if t < 20 else 0.5)

    model, optimizer, schedule = begin()
    for step in range(30):
        if step == 10:
            other, resumed, again = begin()
            other.load_state_dict(model.state_dict())
            resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            again.load_state_dict(schedule.state_dict())
        for each, its, plan in [(model, optimizer, schedule), *([(other, resumed, again)] if step >= 10 else [])]:
            train(each, its, [step])
            plan.step()
        if step >= 10:
            ours, theirs = optimizer.param_groups[0], resumed.param_groups[0]
            assert ours["effective_lr"] == theirs["effective_lr"]
            assert theirs["effective_lr"] <= theirs["alpha"] * (1.0 + 1e-5)
    assert float(ours["effective_lr"] / ours["alpha"]) == pytest.approx(0.5 / 2.9, rel=1e-5)


@every
def test_a_raised_lr_is_warned_of_once_with_the_remedy(cls):
    model = net()
    optimizer = cls(model.parameters())
    schedule = schedulers.LambdaLR(optimizer, lambda t: 1.0 + t)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for step in range(6):
            train(model, optimizer, [step])
            schedule.step()
    (said,) = [str(each.message) for each in seen if "raised lr" in str(each.message)]
    assert "from 1e-05 to 2e-05" in said
    assert "max_lr=1e-05 or eta_min=1e-07" in said
    assert "a warm-up written by hand, set initial_lr" in said


@every
def test_a_warm_up_written_by_hand_is_one_where_it_says_its_highest_lr(cls):
    """As in nanoGPT, which writes lr before each step, the first included; nothing else tells that lr from the full one."""
    model, other = net(), net()
    optimizer, scheduled = cls(model.parameters(), lr=1e-3), cls(other.parameters(), lr=1e-3)
    schedule = schedulers.LambdaLR(scheduled, lambda t: min(1.0, (t + 1) / 20))
    optimizer.param_groups[0]["initial_lr"] = 1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(40):
            optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, (step + 1) / 20)
            train(model, optimizer, [step])
            train(other, scheduled, [step])
            schedule.step()
    assert torch.equal(flat(model), flat(other))


@every
@pytest.mark.parametrize("kind", ["float", "tensor"])
def test_groups_of_one_and_the_same_lr_are_as_if_it_were_the_optimizers(cls, kind):
    """lr=1.0 in every group, as users of Prodigy write it."""
    losses = []
    for lr in (None, 1.0):
        model = net()
        own = {} if lr is None else {"lr": torch.tensor(lr) if kind == "tensor" else lr}
        halves = list(model.parameters())
        groups = [{"params": halves[:2], **own}, {"params": halves[2:], **own}]
        losses.append(train(model, cls(groups, lr=1e-5), range(30)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@every
def test_a_late_group_with_a_lr_far_above_is_held_and_told(cls):
    """lr=1.0 beside groups of 1e-5: a multiplier of 100,000 of a rate that is right would tear it apart."""
    model, late = net(), nn.Parameter(torch.ones(3))
    optimizer = cls(model.parameters(), lr=1e-5)
    train(model, optimizer, range(20))
    optimizer.add_param_group({"params": [late], "lr": 1.0})
    late.grad = torch.full((3,), 0.01)
    with pytest.warns(
        UserWarning, match=r"lr=1 of a parameter group that came late is 1e\+05 times lr=1e-05.*counts as 100 times"
    ):
        train(model, optimizer, [20])
    first, second = optimizer.param_groups
    assert float(second["effective_lr"]) == pytest.approx(100 * float(first["effective_lr"]), rel=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, range(21, 24))


@every
@pytest.mark.parametrize("lr", [math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 5])
def test_a_lr_that_is_no_number_is_refused_and_nothing_has_happened(cls, lr, at):
    """As of a schedule that divides by 0; AdamW's weights would be lost."""
    model, other = net(), net()
    optimizer, plain = (
        cls([{"params": layer.parameters()} for layer in (each[0], each[2])], lr=1e-3) for each in (model, other)
    )
    train(model, optimizer, range(at))
    before = flat(model).clone()
    optimizer.param_groups[1]["lr"] = lr
    with pytest.raises(ValueError, match=f"lr={lr} of a parameter group.*finite numbers"):
        train(model, optimizer, [at])
    assert torch.equal(flat(model), before)
    optimizer.param_groups[1]["lr"] = 1e-3
    train(model, optimizer, range(at, 20))
    train(other, plain, range(20))
    assert torch.equal(flat(model), flat(other))


@every
@pytest.mark.parametrize("make", [float, torch.tensor], ids=["float", "tensor"])
def test_a_lr_below_zero_counts_as_zero(cls, make):
    """As of ``1 - step / total`` that goes on beyond total: uphill, and with a rate that rises."""
    model, other = net(), net()
    optimizer, held = cls(model.parameters(), lr=make(1e-3)), cls(other.parameters(), lr=make(1e-3))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        for step in range(30):
            for each, its, lowest in ((model, optimizer, -1e-3), (other, held, 0.0)):
                its.param_groups[0]["lr"] = make(max(1e-3 * (1.0 - step / 20), lowest))
                train(each, its, [step])
    assert torch.equal(flat(model), flat(other))
    assert len([each for each in seen if "fall below 0" in str(each.message)]) == (make is float)
