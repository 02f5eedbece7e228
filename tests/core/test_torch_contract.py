"""What torch asks of each of its own optimizers on a CPU (its test/test_optim.py), with torch's own lists of inputs.

The checks are re-stated here, since a wheel of torch carries the lists (torch.testing._internal, which needs expecttest) and
not the tests. These of torch's checks do not apply, since what they ask about does not exist here: the flags ``foreach``,
``fused``, ``capturable`` and ``differentiable``, and sparse gradients.
"""

import copy
import pickle
import re
import warnings

import pytest
import torch
from torch import nn
from torch.optim import SGD, lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing import assert_close
from torch.testing._internal.common_optimizers import (
    get_error_inputs_for_all_optims,
    optim_db,
    optim_error_inputs_func_adamw,
    optim_inputs_func_adamw,
)

from .problems import VARIANTS

NOT_OURS = {"amsgrad", "capturable", "foreach", "fused", "differentiable"}
INPUTS = [each.kwargs for each in optim_inputs_func_adamw("cpu") if not NOT_OURS & set(each.kwargs)]
INPUTS += [{"lr": torch.tensor(1e-3)}, {"lr": 1e-3, "scope": "group"}, {"lr": 1e-3, "scope": "tensor"}]
# torch's, and those that set rates of their own: at the group's lr, and far above it
(ADAMW,) = (info for info in optim_db if info.optim_cls is torch.optim.AdamW)
SCHEDULES = [
    [],
    *ADAMW.scheduler_inputs,
    [lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=4)],
    [lambda o: lr_scheduler.CyclicLR(o, base_lr=1e-4, max_lr=1e-3, step_size_up=4, cycle_momentum=True)],
    [lambda o: lr_scheduler.OneCycleLR(o, max_lr=1e-3, total_steps=25)],
    [lambda o: lr_scheduler.OneCycleLR(o, max_lr=1.0, total_steps=25)],
]

every = pytest.mark.parametrize("cls", VARIANTS.values(), ids=VARIANTS)
inputs = pytest.mark.parametrize("options", INPUTS, ids=lambda options: "-".join(map(str, options)) or "default")
named = pytest.mark.parametrize("names", [False, True], ids=["plain", "named"])
pytestmark = pytest.mark.filterwarnings("ignore:a schedule raised lr", "ignore:Detected call of", "ignore:Seems like")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def problem(contiguous=True, dtype=torch.float32):
    """A weight, a bias, and a function that takes their gradient and returns the loss."""
    shapes = ((10, 5), (10,))
    tensors = [torch.randn(*shape, *(() if contiguous else (2,)), dtype=dtype) for shape in shapes]
    w, b = (nn.Parameter(t if contiguous else t[..., 0]) for t in tensors)
    x = torch.randn(5, dtype=dtype)

    def loss():
        w.grad = b.grad = None
        value = (w.mv(x) + b).square().sum()
        value.backward()
        return value

    return w, b, loss


def descend(optimizer, loss, schedules=(), steps=20):
    """(loss before, loss after)"""
    before = loss().item()
    for _ in range(steps):
        value = optimizer.step(loss)
        for schedule in schedules:
            schedule.step(value.detach()) if isinstance(schedule, lr_scheduler.ReduceLROnPlateau) else schedule.step()
    return before, loss().item()


def right_way(before, after, maximize=False):
    assert after > before if maximize else after < before


def called(params, names):
    return [(f"name{i}", p) for i, p in enumerate(params)] if names else list(params)


def comparable(state_dict):
    """Without what names of parameters add."""
    return {
        **state_dict,
        "param_groups": [{k: v for k, v in group.items() if k != "param_names"} for group in state_dict["param_groups"]],
    }


def equal(a, b):
    if torch.is_tensor(a) or torch.is_tensor(b):
        assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=0.0, atol=0.0)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            equal(x, y)
    else:
        assert a == b


# ---- inputs ----------------------------------------------------------------------------------------------------------------


# torch checks a tensor of two numbers itself for Adam alone, and it is tried below in its words for all of ours
ERRORS = [*get_error_inputs_for_all_optims("cpu", torch.float32)]
ERRORS += [each for each in optim_error_inputs_func_adamw("cpu", torch.float32)[len(ERRORS) :]]
ERRORS = [each for each in ERRORS if not NOT_OURS & set(each.optimizer_error_input.kwargs)]
# Ours say more than torch's, and betas may be a mixture of floats and tensors of one number: each is read as a float.
WORDS = {"beta1 should be between 0 and 1": r"betas=\(1.0, 0.0\)", "weight_decay should > 0": "weight_decay=-1"}
ERRORS = [each for each in ERRORS if "both floats or both" not in each.error_regex]


@every
@pytest.mark.parametrize("case", ERRORS, ids=lambda case: case.optimizer_error_input.desc)
def test_errors(cls, case):
    given, words = case.optimizer_error_input, WORDS.get(case.optimizer_error_input.desc, case.error_regex)
    params = [nn.Parameter(torch.randn(2, 3))] if given.params is None else given.params
    if issubclass(case.error_type, Warning):
        with pytest.warns(case.error_type, match=words):
            cls(params, **given.kwargs)
    else:
        with pytest.raises(case.error_type, match=words):
            cls(params, **given.kwargs)


@every
def test_no_parameters(cls):
    with pytest.raises(ValueError, match="empty parameter list"):
        cls([])


@every
@inputs
def test_can_be_printed(cls, options):
    assert re.match(cls.__name__, repr(cls([nn.Parameter(torch.randn(2, 3))], **options)))


# ---- steps -----------------------------------------------------------------------------------------------------------------


@every
@inputs
@pytest.mark.parametrize("contiguous", [True, False])
def test_goes_the_right_way(cls, options, contiguous):
    w, b, loss = problem(contiguous)
    right_way(*descend(cls([w, b], **options), loss), options.get("maximize"))


@every
@pytest.mark.parametrize("lr", [1e-5, torch.tensor(1e-3)], ids=["float", "tensor"])
@pytest.mark.parametrize("groups", [False, True], ids=["one", "groups"])
@pytest.mark.parametrize("schedule", range(len(SCHEDULES)))
def test_goes_the_right_way_under_a_schedule(cls, lr, groups, schedule):
    w, b, loss = problem()
    optimizer = cls([{"params": [w]}, {"params": [b], "lr": 0.01}] if groups else [w, b], lr=lr)
    right_way(*descend(optimizer, loss, [make(optimizer) for make in SCHEDULES[schedule]]))


@every
@inputs
def test_a_groups_weight_decay(cls, options):
    w, b, loss = problem()
    own = {key: value for key, value in options.items() if key != "scope"}  # which is the optimizer's
    optimizer = cls([{"params": [w], **own}, {"params": [b], **own, "weight_decay": 0.0}])
    right_way(*descend(optimizer, loss), options.get("maximize"))


@every
@pytest.mark.parametrize("outer", [1e-28, 1e-12, 1e-5, 1.0])
def test_a_groups_lr(cls, outer):
    """Also one that is 25 orders above the optimizer's, where the other group does not move."""
    w, b, loss = problem()
    other = nn.Parameter(torch.randn(2))
    before = other.detach().clone()
    optimizer = cls([{"params": [w, b], "lr": 1e-3}, {"params": [other]}], lr=outer)
    other.grad = torch.rand_like(other)
    right_way(*descend(optimizer, loss))
    if outer == 1e-28:
        assert_close(other.detach(), before)


@every
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_tensor_lr(cls, shape, decay):
    w, b, loss = problem()
    clones = [nn.Parameter(p.detach().clone()) for p in (w, b)]
    one, two = cls([w, b], lr=1e-3, weight_decay=decay), cls(clones, lr=torch.full(shape, 1e-3), weight_decay=decay)
    for _ in range(5):
        loss()
        for p, q in zip((w, b), clones, strict=True):
            q.grad = p.grad.clone()
        one.step()
        two.step()
        assert_close([w, b], clones)


def complex_pairs(scope):
    """Complex tensors, and real ones of the same numbers: in two where one rate has them all."""
    z = torch.randn(2, dtype=torch.complex64, requires_grad=True)
    real = [z.real.detach().clone().requires_grad_(), z.imag.detach().clone().requires_grad_()]
    if scope == "tensor":  # a real and an imaginary part in two tensors would have two rates, where z has one
        real = [torch.view_as_real(z.detach()).clone().requires_grad_()]
    return z, real


@every
@inputs
def test_complex(cls, options):
    z, real = complex_pairs(options.get("scope"))

    def rosenbrock(t):
        return ((1 - t[0]) ** 2 + 100 * (t[1] - t[0] ** 2) ** 2).abs()

    one, two = cls([z], **options), cls(real, **options)
    for _ in range(3):
        one.zero_grad()
        two.zero_grad()
        rosenbrock(z).backward()
        rosenbrock(torch.complex(*real) if len(real) == 2 else torch.view_as_complex(real[0])).backward()
        one.step()
        two.step()
        assert_close(torch.view_as_real(z), torch.stack(real, -1) if len(real) == 2 else real[0], rtol=1e-4, atol=1e-5)


@every
def test_a_gradient_that_is_a_conjugate(cls):
    """Autograd leaves one behind z.conj() that is yet to be taken."""
    z = torch.randn(4, dtype=torch.complex64, requires_grad=True)
    x = torch.view_as_real(z.detach()).clone().requires_grad_()
    one, two = cls([z]), cls([x])
    for _ in range(5):
        one.zero_grad()
        two.zero_grad()
        (z.conj() - 1.0j).abs().square().sum().backward()
        (torch.view_as_complex(x).conj().resolve_conj() - 1.0j).abs().square().sum().backward()
        assert z.grad.is_conj()
        one.step()
        two.step()
    assert_close(torch.view_as_real(z), x)


@every
@pytest.mark.parametrize("n", [1, 3, 5000])
@pytest.mark.parametrize("moved", ["gradient", "parameter", "imaginary part"])
def test_what_torch_only_notes_to_be_negated(cls, n, moved):
    """As autograd leaves the gradient of a lone imaginary part behind z.conj(). Kernels read what lies in memory."""
    x = torch.randn(n)
    y = {"parameter": torch._neg_view(-x), "imaginary part": torch.complex(x, -x).conj().imag}.get(moved, x.clone())
    p, q = nn.Parameter(x), nn.Parameter(y)
    assert q.is_neg() == (moved != "gradient")
    one, two = cls([p]), cls([q])
    for _ in range(5):
        p.grad = torch.randn(n)
        q.grad = torch._neg_view(-p.grad) if moved == "gradient" else p.grad.clone()
        one.step()
        two.step()
    assert_close(p, q.resolve_neg())


@every
def test_an_imaginary_part_behind_a_conjugate(cls):
    """The smallest such run: it went uphill."""
    b = nn.Parameter(torch.tensor(1.0))
    optimizer = cls([b])
    for _ in range(50):
        optimizer.zero_grad()
        loss = (torch.complex(torch.tensor(0.5), b).conj() * (1.0 - 2.0j)).imag.square()
        loss.backward()
        assert b.grad.is_neg()
        optimizer.step()
    assert loss < 1.0  # of 4 at the start


@every
@inputs
def test_nothing_moves_without_a_gradient(cls, options):
    params = [torch.randn(2, 3) for _ in range(2)]
    before = [p.clone() for p in params]
    cls(params, **options).step(lambda: torch.tensor([1.0]))
    assert_close(params, before)


@every
@inputs
def test_nothing_moves_with_a_gradient_of_zero(cls, options):
    """Not for the weight decay either, which begins with the run."""
    p = torch.randn(5, 1, requires_grad=True)
    before, p.grad = p.detach().clone(), torch.zeros_like(p)
    cls([p], **options).step(lambda: torch.tensor([1.0]))
    assert_close(p.detach(), before)


@every
def test_a_closure_may_return_nothing(cls):
    p = nn.Parameter(torch.randn(3))
    p.grad = torch.ones(3)
    assert cls([p]).step(lambda: None) is None


@every
@inputs
def test_gradients_are_not_written_to(cls, options):
    w, b, loss = problem()
    optimizer = cls([w, b], **options)
    for _ in range(3):
        loss()
        before = [(p.grad.clone(), p.grad._version) for p in (w, b)]
        optimizer.step()
        for p, (grad, version) in zip((w, b), before, strict=True):
            assert torch.equal(p.grad, grad)
            assert p.grad._version == version


@every
@inputs
def test_peculiar_tensors_and_gradients_that_come_and_go(cls, options):
    """A 0-dim one among them, one frozen for a while, and a step in which only that has a gradient."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 1), nn.Sigmoid())
    scalar = torch.tensor(0.3, requires_grad=True)
    scalar.grad = torch.tensor(0.7)
    optimizer = cls([*model.parameters(), scalar], **options)
    for k in range(7):
        optimizer.zero_grad()
        model[2].requires_grad_(k not in (3, 4))
        if k != 2:
            model(torch.arange(1.0, 7.0).reshape(3, 2) / 10).sum().backward()
        optimizer.step()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert all(optimizer.state[p] for p in model.parameters())


# ---- state -----------------------------------------------------------------------------------------------------------------


@every
@inputs
@pytest.mark.parametrize("names", [(a, b) for a in (False, True) for b in (False, True)], ids=str)
def test_loaded_equals_saved(cls, options, names):
    """Step by step, and in every number of the state; groups that stand there twice read alike."""
    w, b, loss = problem()
    optimizer = cls(called([w, b], names[0]), **options)
    descend(optimizer, loss, steps=10)
    clones = [nn.Parameter(p.detach().clone()) for p in (w, b)]
    other = cls(called(clones, names[1]), **options)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(10):
        loss()
        for p, q in zip((w, b), clones, strict=True):
            q.grad = p.grad.clone()
        optimizer.step()
        other.step()
        equal([w.detach(), b.detach()], [p.detach() for p in clones])
    equal(comparable(optimizer.state_dict()), comparable(other.state_dict()))
    other.param_groups.extend(other.param_groups)
    equal(*(comparable(each.state_dict())["param_groups"][-1] for each in (optimizer, other)))
    if any(names):
        assert other.state_dict()["param_groups"][0]["param_names"] == ["name0", "name1"]


@every
@inputs
@named
def test_a_file_of_weights_only(cls, options, names, tmp_path):
    w, b, loss = problem()
    optimizer = cls(called([w, b], names), **options)
    descend(optimizer, loss, steps=3)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    equal(torch.load(tmp_path / "state.pt", weights_only=True), optimizer.state_dict())


@every
@inputs
def test_a_checkpoint_without_flags_or_with_plain_numbers(cls, options):
    """As older versions wrote it: no ``maximize``, and numbers for the counters."""
    w, b, loss = problem()
    optimizer = cls([w, b], **options)
    descend(optimizer, loss, steps=3)
    expected, old = optimizer.state_dict(), copy.deepcopy(optimizer.state_dict())
    for group in old["param_groups"]:
        group.pop("maximize")
    for state in old["state"].values():
        state.update({name: state[name].item() for name in optimizer.direction.counters})
    optimizer = cls([w, b], **options)
    optimizer.load_state_dict(old)
    equal(optimizer.state_dict(), expected)
    descend(optimizer, loss, steps=1)


@every
@inputs
def test_loading_leaves_no_key_behind(cls, options):
    w, b, loss = problem()
    optimizer = cls([w, b], **options)
    descend(optimizer, loss, steps=1)
    before = [set(group) for group in optimizer.param_groups]
    for _ in range(2):
        optimizer.load_state_dict(optimizer.state_dict())
    assert [set(group) for group in optimizer.param_groups] == before


@every
@inputs
def test_every_parameter_has_a_state(cls, options):
    w, b, loss = problem()
    optimizer = cls([w, b], **options)
    descend(optimizer, loss, steps=1)
    assert set(optimizer.state) == {w, b}
    assert all(optimizer.state.values())


@every
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))], ids=["deepcopy", "pickle"])
def test_copies_have_all_public_attributes(cls, copier):
    w, b, loss = problem()
    optimizer = cls([w, b])
    descend(optimizer, loss, steps=3)
    public = [{name for name in vars(each) if not name.startswith("_")} for each in (optimizer, copier(optimizer))]
    assert public[0] == public[1]


# ---- hooks -----------------------------------------------------------------------------------------------------------------


@every
def test_hooks_of_the_state_dict(cls):
    """They may put an entry of any kind into the state, and take it out."""

    def fresh():
        return cls([torch.rand(2, 3, requires_grad=True)])

    def before(optimizer):
        optimizer.state["test"] = 1

    def after(optimizer, state_dict):
        return {**state_dict, "ran": state_dict["state"].pop("test", None)}

    optimizer = fresh()
    optimizer.register_state_dict_pre_hook(before)
    assert optimizer.state_dict()["state"]["test"] == 1
    fresh().load_state_dict(optimizer.state_dict())
    optimizer = fresh()
    optimizer.register_state_dict_post_hook(after)
    assert optimizer.state_dict()["ran"] is None
    optimizer.register_state_dict_pre_hook(before)
    assert optimizer.state_dict()["ran"] == 1
    assert "test" not in optimizer.state_dict()["state"]


@every
def test_hooks_of_load_state_dict(cls):
    """One may change the dictionary or hand over another; one that runs later may change that again."""

    def change(optimizer, state_dict):
        state_dict["param_groups"][0]["lr"] = 0.002

    def exchange(optimizer, state_dict):
        state_dict = copy.deepcopy(state_dict)
        state_dict["param_groups"][0]["lr"] = 0.003
        return state_dict

    for hooks, lr in (([change], 0.002), ([exchange], 0.003), ([exchange, change], 0.002), ([change, exchange], 0.003)):
        optimizer, seen = cls([torch.rand(2, 3, requires_grad=True)]), []
        for hook in hooks:
            optimizer.register_load_state_dict_pre_hook(hook)
        optimizer.register_load_state_dict_post_hook(lambda o, seen=seen: seen.append(o.param_groups[0]["lr"]))
        optimizer.load_state_dict(optimizer.state_dict())
        assert seen == [lr]


@every
def test_hooks_of_the_step(cls):
    params, seen = [torch.tensor([1.0, 1.0])], []
    optimizer, sgd = cls(params), SGD(params, lr=0.1)

    def add(number):
        return lambda *_: seen.append(number)

    handles = [
        register_optimizer_step_pre_hook(add(0)),
        register_optimizer_step_post_hook(add(5)),
        *(each.register_step_pre_hook(add(1)) for each in (optimizer, sgd)),
        *(each.register_step_post_hook(add(2)) for each in (optimizer, sgd)),
    ]
    try:
        for each in (optimizer, sgd, optimizer):
            each.step()
    finally:
        for handle in handles:
            handle.remove()
    assert seen == [0, 1, 2, 5] * 3
    optimizer.step()
    assert len(seen) == 12


@every
def test_nothing_is_warned_of(cls):
    w, b, loss = problem()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = cls([w, b], lr=torch.tensor(1e-3))
        descend(optimizer, loss, steps=2)
        optimizer.load_state_dict(optimizer.state_dict())
        descend(optimizer, loss, steps=2)
