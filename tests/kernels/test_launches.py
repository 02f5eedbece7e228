"""The step of an accelerator, in Triton's interpreter: the same numbers as in plain torch, in a handful of launches."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from elra_hf import ElraAdamW, ElraC2Min, ElraP2Min, kernels
from tests.core.problems import VARIANTS

from .test_kernels import DIRECTIONS, TRITON, bucket

pytestmark = [*TRITON.marks, pytest.mark.filterwarnings("ignore::RuntimeWarning")]
# what sends nothing: views, memory, the profiler, and numbers on the host
FREE = {"lift_fresh", "profiler::_record_function_enter_new", "profiler::_record_function_exit"}
FREE |= {"empty", "new_empty", "empty_like", "select", "unbind", "slice", "view", "detach", "alias", "expand"}


def net(width=30, layers=0):
    torch.manual_seed(0)
    inner = [torch.nn.Linear(width, width) for _ in range(layers)]
    return torch.nn.Sequential(torch.nn.Linear(20, width), torch.nn.Tanh(), *inner, torch.nn.Linear(width, 1))


def groups(model):
    """With weight decay and without, as the Trainer makes them."""
    return [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]


def train(optimizer, model, steps, bad=None, before=lambda t: None):
    x = torch.randn(64, 20, generator=torch.Generator().manual_seed(1))
    fused = 0
    for t in range(steps):
        optimizer.zero_grad()
        model(x).sub(x[:, :1]).square().mean().backward()
        if t == bad:
            model[0].weight.grad[0, 0] = torch.nan
        before(t)
        optimizer.step()
        fused += bool(optimizer._programs[1])
    return fused


def run(make, chosen, monkeypatch, **options):
    monkeypatch.setattr(kernels, "choose", lambda *_: chosen)
    model = net()
    optimizer = make(groups(model))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(1.0, (t + 1) / 3) * (1 - t / 20))
    fused = train(optimizer, model, 9, before=lambda t: schedule.step() if t else None, **options)
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    kept = {f"{k} {i}": v.item() for i, g in enumerate(optimizer.param_groups) for k, v in g.items() if torch.is_tensor(v)}
    counts = [float(state["step"]) for state in optimizer.state.values()]
    return weights, kept, counts, fused


@pytest.mark.parametrize("bad", [None, 5])
@pytest.mark.parametrize("scope", ["global", "group"])
@pytest.mark.parametrize("cls", [ElraAdamW, ElraC2Min, ElraP2Min])
def test_the_same_numbers(cls, scope, bad, monkeypatch):
    def make(params):
        return cls(params, scope=scope)

    *ours, fused = run(make, "triton", monkeypatch, bad=bad)
    *theirs, none = run(make, "plain", monkeypatch, bad=bad)
    assert (fused, none) == (7, 0)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-6)
    assert ours[1] == pytest.approx(theirs[1], rel=1e-4, abs=1e-5)
    assert ours[2] == theirs[2]


class Launches(TorchDispatchMode):
    """Counts what an accelerator would be sent."""

    def __init__(self):
        super().__init__()
        self.seen, self.inside = [], False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        if not self.inside and name not in FREE:
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch):
    from triton.runtime.interpreter import InterpretedFunction

    counter, real = Launches(), InterpretedFunction.run

    def spy(self, *args, **kwargs):
        counter.seen.append(self.fn.__name__)
        counter.inside = True
        try:
            return real(self, *args, **kwargs)
        finally:
            counter.inside = False

    monkeypatch.setattr(InterpretedFunction, "run", spy)
    return counter


@pytest.mark.parametrize(("cls", "layers"), [(ElraAdamW, 0), (ElraAdamW, 20), (ElraC2Min, 0), (ElraP2Min, 0)])
def test_few_launches(cls, layers, launches, monkeypatch):
    """At any number of tensors, and with a schedule that writes another lr for every step."""
    monkeypatch.setattr(kernels, "choose", lambda *_: "triton")
    model = net(8, layers)
    optimizer = cls(groups(model))
    train(optimizer, model, 3)
    for group in optimizer.param_groups:
        group["lr"] *= 0.5
    launches.seen.clear()
    with launches:
        optimizer.step()
    passing = ["_total", "program"] if cls is ElraAdamW else []
    assert launches.seen == ["_measure", "_total", "program", "_update", *passing]  # and the upload of the lr


class Tape(TorchDispatchMode):
    """Stands for a CUDA graph: what is launched inside is done again, on the same tensors, and nothing else is."""

    def __init__(self, monkeypatch):
        super().__init__()
        from triton.runtime.interpreter import InterpretedFunction

        self.done, self.inside, real = [], False, InterpretedFunction.run

        def spy(kernel, *args, **kwargs):
            self.done.append((real, (kernel, *args), kwargs, None))
            self.inside = True
            try:
                return real(kernel, *args, **kwargs)
            finally:
                self.inside = False

        self.patches = [(InterpretedFunction, "run", spy)]
        self.patches += [(torch.cuda, name, lambda: True) for name in ("is_initialized", "is_current_stream_capturing")]
        self.monkeypatch = monkeypatch

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not self.inside and not function.is_view:
            self.done.append((function, args, kwargs or {}, result))
        return result

    def record(self, step):
        with self.monkeypatch.context() as patched, self:
            for patch in self.patches:
                patched.setattr(*patch)
            step()

    def replay(self):
        for function, args, kwargs, result in self.done:
            again = function(*args, **kwargs)
            if isinstance(result, torch.Tensor) and again.data_ptr() != result.data_ptr():
                result.copy_(again)


@pytest.mark.parametrize("cls", [ElraAdamW, ElraC2Min, ElraP2Min])
def test_a_step_on_tape_is_a_step(cls, monkeypatch):
    """Bit for bit, with a schedule that fills the tensor lr, also above its first value; no GPU is needed for that."""
    monkeypatch.setattr(kernels, "choose", lambda *_: "triton")

    def made():
        model = net()
        optimizer = cls(groups(model), lr=torch.tensor(1e-3))
        return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(1.5, (t + 1) / 4) * (1 - t / 20))

    (model, optimizer, schedule), (other, taped, slower) = made(), made()
    tape = Tape(monkeypatch)
    x = torch.randn(64, 20, generator=torch.Generator().manual_seed(1))
    rates = set()
    for t in range(12):
        for each, one in ((model, optimizer), (other, taped)):
            one.zero_grad(set_to_none=t == 0)
            each(x + 0.1 * t).sub(x[:, :1]).square().mean().backward()
        optimizer.step()
        if t == 3:  # after three steps, as docs/cost.md says
            tape.record(taped.step)
        elif 3 < t < 10:
            tape.replay()
        else:
            taped.step()
        schedule.step()
        slower.step()
        rates.add(float(taped.param_groups[0]["alpha"]))
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(p, q), t
    assert len(rates) == 12 - optimizer.direction.passing  # where the first step says nothing of the second's
    assert str(optimizer.state_dict()) == str(taped.state_dict())


def test_twins_on_one_tape(monkeypatch):
    """As the two critics of an actor are; and the same step once more is one too many."""
    monkeypatch.setattr(kernels, "choose", lambda *_: "triton")
    models = [net(), net()]
    optimizers = [ElraAdamW(groups(model)) for model in models]
    for optimizer, model in zip(optimizers, models, strict=True):
        train(optimizer, model, 4)
    tape = Tape(monkeypatch)
    tape.record(lambda: [optimizer.step() for optimizer in optimizers])
    for optimizer in optimizers:  # what a graph reads outlives the step
        assert any("sheets" in kept for kept in optimizer._captured)
    tape.replay()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p, q)
    with pytest.raises(RuntimeError, match="twice in a row"):
        tape.record(optimizers[0].step)
    optimizers[0].step()
    tape.record(optimizers[0].step)


@pytest.mark.parametrize("fault", ["too early", "loss", "a schedule of floats", "written to"])
def test_what_a_replay_would_not_repeat_is_refused(fault, monkeypatch):
    monkeypatch.setattr(kernels, "choose", lambda *_: "triton")
    model = net()
    optimizer = ElraAdamW(groups(model))
    if fault == "a schedule of floats":
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1.0)

    def clamp(t):
        if fault == "written to":
            with torch.no_grad():
                model[0].weight.clamp_(-0.1, 0.1)

    train(optimizer, model, 1 if fault == "too early" else 5, before=clamp)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="cannot be captured"):
        Tape(monkeypatch).record(lambda: optimizer.step(loss=torch.ones(()) if fault == "loss" else None))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_what_changes_at_every_step_gets_no_programs(monkeypatch):
    """A schedule of the weight decay would have each step compile its own."""
    monkeypatch.setattr(kernels, "choose", lambda *_: "triton")
    model = net()
    optimizer = ElraAdamW(groups(model))

    def decay(t):
        optimizer.param_groups[0]["weight_decay"] = 0.1 + 0.01 * t

    assert train(optimizer, model, 5, before=decay) == 0
    assert train(optimizer, model, 3) == 3


def test_bounds_may_come_late(monkeypatch):
    monkeypatch.setattr(kernels, "choose", lambda *_: "triton")
    model = net()
    optimizer = ElraC2Min(groups(model))
    train(optimizer, model, 5)
    assert optimizer.param_groups[0]["alpha"] > 2e-6
    optimizer.bounds = (1e-6, 2e-6)
    assert train(optimizer, model, 3) == 2
    assert optimizer.param_groups[0]["alpha"].item() == pytest.approx(2e-6)


def test_the_kind_of_rounding_may_change(monkeypatch):
    """In the middle of a run: steps below the resolution move nothing where they are rounded to the nearest."""
    monkeypatch.setattr(kernels, "choose", lambda *_: "triton")
    p = torch.nn.Parameter(torch.linspace(1.0, 2.0, 3000).bfloat16())
    optimizer = ElraC2Min([p], lr=1e-4, bounds=(1e-4, 2e-4))
    moved = []
    for t in range(8):
        before, p.grad = p.detach().clone(), -p.detach()  # the interpreter cuts off what is below the resolution
        optimizer.param_groups[0]["stochastic_rounding"] = t < 4
        optimizer.step()
        moved.append(not torch.equal(p, before))
    assert moved == [True] * 4 + [False] * 4


def test_goes_the_long_way_where_no_program_can_be_made(monkeypatch):
    from elra_hf.kernels import fuse

    tried = []

    def broken(source):
        tried.append(source)
        raise OSError("no compiler")

    expected = run(ElraAdamW, "plain", monkeypatch)
    monkeypatch.setattr(fuse, "_load", broken)
    found = run(ElraAdamW, "triton", monkeypatch)
    assert found[3] == 0
    assert len(tried) == 1  # and not at every step
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_in_few_launches_is_saved_and_loaded(name, monkeypatch):
    monkeypatch.setattr(kernels, "choose", lambda *_: "triton")
    model, other = net(), net()
    optimizer, loaded = VARIANTS[name](groups(model)), VARIANTS[name](groups(other))
    train(optimizer, model, 4)
    other.load_state_dict(model.state_dict())
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(optimizer, model, 3)
    train(loaded, other, 3)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


COMPILE = """
import triton.language as tl
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import torch
from elra_hf import ElraAdamW
from elra_hf.kernels import fuse, triton as own

def built(function, signature, constants, **options):
    signature |= dict.fromkeys(constants, "constexpr")
    places = {(function.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=function, signature=signature, constexprs=places)
    return compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]

kinds = [(True, True, tl.float32), (True, True, tl.bfloat16), (False, True, tl.float32), (False, False, tl.float32)]
for adam, momentum, dtype in kinds:
    constants = dict(adam=adam, momentum=momentum, dtype=dtype, grad=dtype, of_way=dtype, BLOCK=own.BLOCK)
    tables = {"table": "*i64", "chunks": "*i64", "tensors": "i32", "sums": "*fp32"}
    # 1024 entries are two loads of 16 bytes for each of 128 threads, or one where an entry has two bytes
    each = 2 if dtype == tl.float32 else 1
    measures, updates = each * (1 if adam else 2 + momentum), each * (3 + momentum) + 2 * adam
    for function, more, loads in ((own._measure, "signs", measures), (own._update, "numbers", updates)):
        chance = {} if function is own._measure else {"chance": dtype == tl.bfloat16}
        found = built(function, {**tables, more: "*fp32"}, {**constants, **chance}).count("ld.global.v4")
        assert found == loads, (function, adam, momentum, dtype, found, loads)
built(own._total, {"sums": "*fp32", "bounds": "*i64", "rows": "*fp32"}, {"BLOCK": 512})
program = fuse.Fused(lambda x, y: (torch.where((x > 0.5) & ~torch.isfinite(y), 0.9 ** x, x.clamp(0.0, 1.0)), torch.expm1(y)),
                     [torch.ones(3), torch.ones(())])._kernel
built(program, dict.fromkeys(program.arg_names, "*fp32"), {}, num_warps=1)
"""


def test_compiles_for_a_gpu_with_wide_loads():
    """To machine code of an H100, for which no GPU is needed."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]


def test_a_rate_for_each_layer_takes_few_launches(monkeypatch):
    """As the decay of lr from layer to layer has it: 26 groups."""
    monkeypatch.setattr(kernels, "choose", lambda *_: "triton")
    model = net(8, 11)
    layers = [{"params": [p], "lr": 1e-3 * 0.9**k} for k, p in enumerate(model.parameters())]
    assert len(layers) == 26
    assert train(ElraAdamW(layers), model, 4) == 2


@pytest.mark.parametrize("what", ["weights", "states"])
@pytest.mark.parametrize("cls", [ElraAdamW, ElraC2Min])
def test_what_was_moved_to_another_place_is_found_there(cls, what, monkeypatch):
    """As an offloader does it: the tensor is the same, and its memory is not. The addresses are kept from step to step."""
    monkeypatch.setattr(kernels, "choose", lambda *_: "triton")
    models = [net(), net()]
    optimizers = [cls(groups(model)) for model in models]
    left = []
    for moves, optimizer, model in zip((False, True), optimizers, models, strict=True):
        train(optimizer, model, 5)
        states = [t for state in optimizer.state.values() for t in state.values() if t.ndim]
        for tensor in (list(model.parameters()) if what == "weights" else states) if moves else []:
            left.append(tensor.data)
            tensor.data = tensor.data.clone()
            left[-1].fill_(torch.nan)
        train(optimizer, model, 3)
    assert left
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("off", [None, "params", "grads", "way", "momentum"])
def test_what_lies_off_the_grid_is_not_loaded_wide(off):
    """A GPU faults at a load of 16 bytes from elsewhere; the interpreter does not mind."""
    from elra_hf.kernels.sheets import sheets_of

    made = bucket(DIRECTIONS["momentum"], "triton", shapes=[(64,), (64,)])
    if off:
        tensors = getattr(made, off, None) or made.state[off]
        tensors[1] = torch.zeros(65)[1:].copy_(tensors[1])
    (sheet,), _ = sheets_of(DIRECTIONS["momentum"], [made])
    assert sheet.table[5].tolist() == [1, int(off is None)]
