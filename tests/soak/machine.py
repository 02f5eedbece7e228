"""Anything that may happen to an optimizer, in any order: hypothesis looks for an order that breaks it."""

from __future__ import annotations

import copy
import io
import math
import pickle

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import nn

from tests.core.problems import VARIANTS

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
STEPS = {"taken": 0}


class Life(RuleBasedStateMachine):
    """One optimizer; and at any moment a twin from a copy, which must go on alike."""

    @initialize(
        cls=st.sampled_from(list(VARIANTS.values())),
        scope=st.sampled_from(["global", "group", "tensor"]),
        paper=st.booleans(),
        decay=st.sampled_from([0.0, 0.1, 100.0]),
        lr=st.sampled_from([1e-8, 1e-5, 1.0]),
        tensor_lr=st.booleans(),
        maximize=st.booleans(),
    )
    def begin(self, cls, scope, paper, decay, lr, tensor_lr, maximize):
        options = {"horizon": math.inf} if paper and "horizon" in cls.__init__.__annotations__ else {}
        self.generator = torch.Generator().manual_seed(0)
        self.make = lambda groups: cls(
            groups,
            lr=torch.tensor(lr) if tensor_lr else lr,
            scope=scope,
            weight_decay=decay,
            maximize=maximize,
            **options,
        )
        self.optimizer = self.make([{"params": [self.fresh(4, 3), self.fresh(5)]}])
        self.refused = self.frozen = None
        self.schedule = 1.0

    def fresh(self, *shape, dtype=torch.float32):
        return nn.Parameter(torch.randn(shape, generator=self.generator).to(dtype))

    @property
    def params(self):
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def grads(self, kind, size):
        """Gradients of a bowl and noise, of any length, or bad."""
        for i, p in enumerate(self.params):
            p.grad = None
            if self.frozen is not None and i % 3 == self.frozen:
                continue
            noise = torch.randn(p.shape, generator=self.generator)
            grad = (size * (p.detach().double().clamp(-1e3, 1e3) * 0.1 + noise)).to(p.dtype)
            if kind == "zero":
                grad = torch.zeros_like(p)
            elif kind in ("nan", "inf") and i == 0:
                grad.view(-1)[0] = math.nan if kind == "nan" else -math.inf
            p.grad = grad

    def step(self, kind, size=1.0, **options):
        self.grads(kind, size)
        self.go(kind, **options)

    def go(self, kind, **options):
        """Step along the gradients that are there."""
        before = float(self.optimizer.param_groups[0]["elra_restarts"])
        self.optimizer.step(**options)
        STEPS["taken"] += 1
        refused = float(self.optimizer.param_groups[0]["elra_restarts"]) > before
        good = kind == "good" and any(p.grad is not None for p in self.params)
        assert not (good and refused and self.refused), "two good steps in a row are refused"
        self.refused = refused if good else None

    @rule(size=st.sampled_from([1e-20, 1e-3, 1.0, 1.0, 1.0, 30.0, 1e3, 1e12]), times=st.integers(1, 6))
    def good_steps(self, size, times):
        for _ in range(times):
            self.step("good", size)

    @rule(kind=st.sampled_from(["nan", "inf", "zero"]))
    def odd_step(self, kind):
        self.step(kind)

    @rule(loss=st.sampled_from([1.0, 1.0, 0.0, -3.0, 1e6, math.nan, math.inf]), shape=st.sampled_from([(), (1,)]))
    def step_with_a_loss(self, loss, shape):
        self.step("good", loss=torch.full(shape, loss))

    @rule(loss=st.sampled_from([1.0, 1e9, math.nan, None]))
    def step_with_a_closure(self, loss):
        assert self.optimizer.step(lambda: loss) is loss
        self.refused = None
        STEPS["taken"] += 1

    @rule(share=st.sampled_from([0.0, 0.01, 0.5, 1.0, 1.0, 100.0]))
    def a_schedule_writes(self, share):
        for group in self.optimizer.param_groups:
            lr = group.setdefault("initial_lr", float(group["lr"])) * share
            group["lr"].fill_(lr) if isinstance(group["lr"], torch.Tensor) else group.update(lr=lr)

    @rule(which=st.sampled_from([None, 0, 1, 2]))
    def freeze(self, which):
        self.frozen = which

    @rule(lr=st.sampled_from([None, 0.0, 1e-3, 1e4]), dtype=st.sampled_from(DTYPES), zero=st.booleans())
    def add_a_group(self, lr, dtype, zero):
        if len(self.optimizer.param_groups) < 4:
            late = self.fresh(3, 2, dtype=dtype)
            late.data.mul_(0.0 if zero else 1.0)
            self.optimizer.add_param_group({"params": [late], **({} if lr is None else {"lr": lr})})

    @rule(dtype=st.sampled_from(DTYPES), which=st.integers(0, 3))
    def cast(self, dtype, which):
        for i, p in enumerate(self.params):
            if i % 3 == which or which == 3:
                p.grad = None
                p.data = p.data.to(dtype)

    @rule(which=st.integers(0, 3), factor=st.sampled_from([0.5, 0.99, 1.0]), steps=st.integers(1, 3), times=st.integers(1, 4))
    def others_move(self, which, factor, steps, times):
        """As a constraint does, after each step or every few; by nothing at all where it is met."""
        for _ in range(times):
            self.write(which, lambda p: p.mul_(factor))
            for _ in range(steps):
                self.step("good")

    @rule(which=st.integers(0, 3))
    def others_move_and_put_back(self, which):
        kept = {p: p.detach().clone() for p in self.params}
        self.write(which, lambda p: p.fill_(7.0))
        self.write(which, lambda p: p.copy_(kept[p]))

    @torch.no_grad()
    def write(self, which, change):
        for i, p in enumerate(self.params):
            if i % 3 == which or which == 3:
                change(p)

    @rule(sizes=st.lists(st.sampled_from([1e-3, 1.0, 1e3]), min_size=2, max_size=3), to_none=st.booleans())
    def accumulate(self, sizes, to_none):
        """Backward passes add up in the gradients that the step before has seen; a twin gets the sum at once."""
        twin, others = self.twin(copy.deepcopy)
        self.optimizer.zero_grad(set_to_none=to_none)
        for size in sizes:
            sum((p * size * torch.randn(p.shape, generator=self.generator).to(p.dtype)).sum() for p in self.params).backward()
        self.both_go(twin, others)

    @rule(
        how=st.sampled_from([copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))]),
        size=st.sampled_from([1.0, 1e3]),
        times=st.integers(1, 3),
    )
    def copy_goes_on_alike(self, how, size, times):
        self.go_alike(*self.twin(how), size, times)

    @rule(size=st.sampled_from([1.0, 1e3]), times=st.integers(1, 3), to_file=st.booleans())
    def loaded_goes_on_alike(self, size, times, to_file):
        """And takes the place of the one that was saved."""
        saved = copy.deepcopy(self.optimizer.state_dict())
        if to_file:
            file = io.BytesIO()
            torch.save(saved, file)
            saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        others = [nn.Parameter(p.detach().clone()) for p in self.params]
        left = iter(others)
        loaded = self.make([{"params": [next(left) for _ in group["params"]]} for group in self.optimizer.param_groups])
        loaded.load_state_dict(saved)
        self.go_alike(loaded, others, size, times)
        self.optimizer = loaded

    def twin(self, how):
        """A copy of the optimizer, and its parameters."""
        twin = how(self.optimizer)
        return twin, [p for group in twin.param_groups for p in group["params"]]

    def go_alike(self, twin, others, size, times):
        for _ in range(times):
            self.grads("good", size)
            self.both_go(twin, others)

    def both_go(self, twin, others):
        """Both step along the gradients that are there, bit for bit alike."""
        for p, q in zip(self.params, others, strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        self.go("good")
        twin.step()
        STEPS["taken"] += 1
        assert numbers(self.optimizer) == numbers(twin)
        for p, q in zip(self.params, others, strict=True):
            assert same(p, q)
            mine, its = self.optimizer.state.get(p, {}), twin.state.get(q, {})
            assert mine.keys() == its.keys()
            for (
                name,
                value,
            ) in mine.items():  # what a cast parameter without a gradient has is cast when it has one, or is loaded
                assert same(value.to(its[name].dtype) if p.grad is None else value, its[name]), name

    @invariant()
    def healthy(self):
        if not hasattr(self, "optimizer"):
            return
        low, high = self.optimizer.bounds
        for p in self.params:
            assert torch.isfinite(p).all()
        for group in self.optimizer.param_groups:
            assert low * (1 - 1e-5) <= float(group["elra_alpha"]) <= high * (1 + 1e-5)


def same(a, b):
    return a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())


def numbers(optimizer):
    """What the groups of a checkpoint say, to compare, NaN being like NaN."""
    groups = copy.deepcopy(optimizer.state_dict()["param_groups"])
    return [{name: str(value) for name, value in group.items() if name != "params"} for group in groups]
