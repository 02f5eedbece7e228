"""Kernels do what `directions` defines, number for number: the C ones, and the Triton ones in its interpreter."""

import copy
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elra_hf import ElraAdamW, ElraC2Min, ElraP2Min, kernels
from elra_hf.directions import PRODUCTS, Adam, Momentum, Move
from elra_hf.kernels import native
from elra_hf.pieces import Bucket

ROOT = Path(__file__).parents[2]
SIZES = [(1,), (3, 5), (), (0,), (300, 70), (1025,), (17_000,)]
DIRECTIONS = {
    "adam": Adam(),
    "momentum": Momentum(),
    "no momentum": Momentum((0.0, 0.0)),
    "adam, bf16 average": Adam(bf16_average=True),
    "momentum, bf16 average": Momentum(bf16_average=True),
}
NATIVE = pytest.param("native", marks=pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler"))
TRITON = pytest.param(
    "triton",
    marks=pytest.mark.skipif(
        not importlib.util.find_spec("triton") or np.lib.NumpyVersion(np.__version__) >= "2.4.0",
        reason="no Triton, or a numpy that its interpreter does not know",
    ),
)


def bucket(direction, kind, dtype=torch.float32, maximize=False, seed=0, shapes=SIZES):
    generator = torch.Generator().manual_seed(seed)
    group = {**direction.defaults(), "maximize": maximize, "stochastic_rounding": False}
    counts = {name: torch.zeros(()) for name in direction.counters}
    state = {name: [] for name in direction.dtypes(torch.zeros(1, dtype=dtype), group)}
    made = Bucket(0, 0, group, counts, (), False, False, False, kind, state)
    for shape in shapes:
        p, g = torch.randn(shape, generator=generator).to(dtype), torch.randn(shape, generator=generator).to(dtype)
        kept = {name: 0.1 * torch.randn(shape, generator=generator) for name in state}
        dtypes = direction.dtypes(p, group)
        kept = {name: (t.square() if name == "variance" else t).to(dtypes[name]) for name, t in kept.items()}
        made.add(p, g, kept)
    return made


def plain(original):
    made = copy.deepcopy(original)
    return copy.copy(made).__class__(**{**made.__dict__, "kernels": "plain", "tables": {}})


def numbers(kind, **values):
    """As the step hands them over: floats on the CPU, tensors where reading would wait for a device."""
    return {name: torch.tensor(value) if kind == "triton" else value for name, value in values.items()}


@pytest.mark.parametrize("kind", [NATIVE, TRITON])
@pytest.mark.parametrize(("step", "maximize"), [(0.0, False), (7.0, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", DIRECTIONS)
def test_measure(name, dtype, step, maximize, kind):
    direction = DIRECTIONS[name]
    needs = ("gg",) if direction.passing else PRODUCTS
    ours = bucket(direction, kind, dtype, maximize)
    found = kernels.measure(direction, ours, numbers(kind, step=step), needs)
    assert_same_products(needs, found, kernels.measure(direction, plain(ours), {"step": step}, needs))


def assert_same_products(needs, found, truth):
    """Products of many numbers of either sign: their error is that of the squares."""
    scale = {"gm": "gg mm", "gs": "gg ss"}
    by_name = dict(zip(needs, truth.tolist(), strict=True))
    for need, value in zip(needs, found.tolist(), strict=True):
        size = abs(by_name[need])
        if need in scale:
            a, b = scale[need].split()
            size = (by_name[a] * by_name[b]) ** 0.5
        assert value == pytest.approx(by_name[need], abs=2e-5 * size + 1e-12), need


@pytest.mark.parametrize("kind", [NATIVE, TRITON])
@pytest.mark.parametrize(("step", "maximize"), [(0.0, False), (7.0, True)])
@pytest.mark.parametrize("move", ["taken", "decayed", "undone", "refused"])
@pytest.mark.parametrize("name", DIRECTIONS)
def test_update(name, move, step, maximize, kind):
    direction = DIRECTIONS[name]
    ours = bucket(direction, kind, maximize=maximize)
    ours.params[4][0, :2] = torch.tensor([torch.inf, -torch.inf])  # as forbidden transitions have it: they stay
    theirs = plain(ours)
    taken, back = float(move in ("taken", "decayed")), float(move == "undone")
    values = {"rate": 0.01 * taken, "decay": 0.003 * taken, "taken": taken, "back": back, "kept": taken, "last": 0.02}
    counts = {"step": step, "mean_weight": step * 0.007, "variance_weight": step * 0.01}
    if not taken:
        for g in (*ours.grads, *theirs.grads):
            g.fill_(torch.nan)
    mine = numbers(kind, **values)
    if move != "decayed":
        values["decay"] = mine["decay"] = None
    products = kernels.update(direction, ours, numbers(kind, **counts), Move(**mine))
    truths = kernels.update(direction, theirs, counts, Move(**values))
    assert len(products) == len(truths) == (5 if direction.passing else 0)
    if taken and direction.passing:
        assert_same_products(PRODUCTS, products, truths)
    columns = {"x": (ours.params, theirs.params), **{n: (ours.state[n], theirs.state[n]) for n in ours.state}}
    for column, (found, truth) in columns.items():
        for a, b in zip(found, truth, strict=True):
            last_digit = 2**-7 if a.dtype == torch.bfloat16 else 1e-5  # Triton's interpreter cuts off what others round
            torch.testing.assert_close(a, b, rtol=last_digit, atol=1e-6, msg=lambda m, c=column: f"{c}: {m}")


@pytest.mark.parametrize("kind", [NATIVE, TRITON])
@pytest.mark.parametrize("make", [ElraAdamW, ElraC2Min, ElraP2Min, lambda p: ElraP2Min(p, betas=(0.0, 0.0))])
def test_a_run_is_the_same_with_kernels(make, kind, monkeypatch):
    def run(chosen):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Tanh(), torch.nn.Linear(30, 1))
        optimizer = make(net.parameters())
        monkeypatch.setattr(kernels, "choose", lambda *_: chosen)
        x = torch.randn(64, 20)
        for _ in range(5):
            optimizer.zero_grad()
            net(x).sub(x[:, :1]).square().mean().backward()
            optimizer.step()
        return [float(optimizer.param_groups[0]["alpha"]), *(float(p.detach().norm()) for p in net.parameters())]

    assert run(kind) == pytest.approx(run("plain"), rel=1e-3)


def test_the_number_of_threads_changes_no_bit():
    if not shutil.which("cc"):
        pytest.skip("no C compiler")
    made = bucket(Adam(), "native")
    made.add(*(torch.randn(2_000_000) for _ in range(2)), {n: torch.rand(2_000_000) for n in made.state})
    counts, move = {"step": 3.0, "mean_weight": 0.06, "variance_weight": 0.1}, Move(0.01, None, 1.0, 0.0, 1.0, 0.01)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(kernels.update(Adam(), copy.deepcopy(made), counts, move))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


AFTER_A_FORK = """
import os, signal, torch
from elra_hf import ElraAdamW
torch.set_num_threads(2)
p = torch.nn.Parameter(torch.ones(2**21))
p.grad = torch.ones_like(p)
optimizer = ElraAdamW([p])
optimizer.step()
optimizer.step()
child = os.fork()
if not child:
    signal.alarm(20)
    optimizer.step()
    os._exit(0)
raise SystemExit(os.waitpid(child, 0)[1])
"""


@pytest.mark.skipif(not hasattr(os, "fork") or not shutil.which("cc"), reason="no fork, or no C compiler")
def test_a_fork_of_a_process_that_has_taken_steps_takes_some():
    subprocess.run([sys.executable, "-c", AFTER_A_FORK], cwd=ROOT, check=True, timeout=60)


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
@pytest.mark.parametrize(
    "given",
    [
        {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},  # where text is ASCII
        {"XDG_CACHE_HOME": ""},  # which stands for ~/.cache
        {"XDG_CACHE_HOME": "here"},  # which no folder may be, that depends on where one is
        {"HOME": None},
    ],
    ids=str,
)
def test_kernels_are_built_in_any_environment(given, tmp_path):
    environment = {**os.environ, "HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT), **given}
    environment = {name: value for name, value in environment.items() if value is not None}
    code = "from elra_hf.kernels import native; print(native.library() is not None)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "True\n", done.stderr
    assert {each.name for each in tmp_path.iterdir()} <= {"home"}


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
@pytest.mark.parametrize("arguments", ["", " -g", " -DNO_MARCH", " -DNO_MARCH -DNO_MCPU"])
def test_kernels_are_built_by_any_compiler(arguments, tmp_path, monkeypatch):
    """CC may hold arguments; Apple's has no -march=native on ARM, others no -mcpu=native."""
    compiler = tmp_path / "my cc"
    compiler.write_text(
        '#!/bin/sh\ncase "$*" in *NO_MARCH*-march*|*NO_MCPU*-mcpu*) exit 1;; esac\n'
        'for a in "$@"; do shift; case $a in -mcpu=native) ;; *) set -- "$@" "$a";; esac; done\n'
        'exec cc "$@"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", f"'{compiler}'{arguments}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.library.cache_clear()
    try:
        assert native.library() is not None
        assert [path.suffix for path in (tmp_path / "elra_hf").iterdir()] == [".so"]
    finally:
        native.library.cache_clear()


@pytest.mark.parametrize("given", ["", "nowhere-to-be-found -O2", 'gcc "-DX'])
def test_a_compiler_that_is_not_there_is_passed_over(given, monkeypatch):
    monkeypatch.setenv("CC", given)
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}" if name == "clang" else None)
    assert native._compiler() == ["/bin/clang"]
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert native._compiler() == []


def test_without_a_home_plain_torch_does_the_work(monkeypatch):
    """As of a user that only a container's command line knows."""

    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    native.library.cache_clear()
    try:
        assert native.library() is None
        p = torch.nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3)
        ElraAdamW([p]).step()
        assert (p < 1.0).all()
    finally:
        native.library.cache_clear()


@pytest.mark.parametrize("kind", [NATIVE, TRITON])
def test_autograd_notices_the_step(kind, monkeypatch):
    monkeypatch.setattr(kernels, "choose", lambda *_: kind)
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = ElraAdamW([p])
    loss = (p * p).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_layout_that_changes_in_place_is_seen(monkeypatch):
    """A transposed view lies where the parameter lay, under the same name, and must not meet the kernels as it is."""

    def run():
        torch.manual_seed(0)
        p, target = torch.nn.Parameter(torch.randn(5, 5)), torch.randn(5, 5)
        optimizer = ElraAdamW([p])
        for t in range(8):
            if t == 5:
                p.grad, p.data = None, p.data.t()
            p.grad = (p.detach() - target).clone(memory_format=torch.contiguous_format)
            optimizer.step()
        return p.detach().contiguous()

    ours = run()
    monkeypatch.setattr(kernels, "choose", lambda *_: "plain")
    torch.testing.assert_close(ours, run(), rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
@pytest.mark.parametrize("cls", [ElraAdamW, ElraC2Min, ElraP2Min])
def test_weights_of_any_dense_layout_meet_the_kernels(cls, monkeypatch):
    """channels_last of convolutions, where kernels or channels are one, too; weights that are transposed."""
    choose, chosen = kernels.choose, []
    monkeypatch.setattr(kernels, "choose", lambda *args: chosen.append(choose(*args)) or chosen[-1])
    shapes = [(8, 3, 3, 3), (8, 4, 1, 1), (8, 1, 3, 3), (1, 4, 1, 3), (6, 5), (7,)]

    def run(laid):
        generator = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(laid(torch.randn(shape, generator=generator))) for shape in shapes]
        optimizer = cls(params)
        for t in range(6):
            for p in params:
                g = torch.randn(p.shape, generator=generator) + p.detach()
                p.grad = g if t == 3 else torch.empty_like(p).copy_(g)  # once with strides of its own
            optimizer.step()
        return [p.detach() for p in params]

    def other(x):
        return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x.t().contiguous().t() if x.ndim == 2 else x

    for found, truth in zip(run(other), run(torch.clone), strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-6)
    assert set(chosen) == {"native"}


def moved(direction, made, kind, **values):
    """What a step makes of a bucket, in a list: weights, then states by name."""
    values = {"rate": 2.0**-9, "decay": 2.0**-7, "taken": 1.0, "back": 0.0, "kept": 1.0, "last": 0.02, **values}
    counts = {"step": 2.0, "mean_weight": 0.04, "variance_weight": 0.07}
    made = copy.deepcopy(made)
    made = Bucket(**{**made.__dict__, "kernels": kind, "tables": {}, "counts": {n: torch.tensor(c) for n, c in counts.items()}})
    kernels.update(direction, made, numbers(kind, **counts), Move(**numbers(kind, **values)))
    return [*made.params, *(t for tensors in made.state.values() for t in tensors)]


@pytest.mark.parametrize("kind", [NATIVE, TRITON])
@pytest.mark.parametrize("name", DIRECTIONS)
def test_rounds_by_the_same_chance(name, kind):
    """Weights and states in bfloat16: nearly all entries the same bits, since a sum may be rounded otherwise beforehand."""
    made = bucket(DIRECTIONS[name], kind, torch.bfloat16)
    made.group["stochastic_rounding"] = True
    for mine, truth in zip(*(moved(DIRECTIONS[name], made, chosen) for chosen in (kind, "plain")), strict=True):
        if mine.dtype == torch.bfloat16:
            assert (mine != truth).sum() <= 1 + 0.001 * mine.numel()


def lying(x, offset):
    """The same numbers, ``offset`` entries behind an address that is a multiple of 64 bytes."""
    return torch.cat([x.new_zeros(offset), x.flatten()])[offset:].view(x.shape)


@pytest.mark.parametrize("kind", [NATIVE])  # the interpreter of Triton cuts digits off where a processor rounds to the nearest
@given(
    shapes=st.lists(
        st.sampled_from([(), (1,), (3, 5), (31,), (1023,), (1024,), (1025,), (70, 33), (66_001,)]), min_size=1, max_size=3
    ),
    offset=st.integers(0, 3),
    betas=st.sampled_from([(0.5, 0.5), (0.0, 0.0)]),
    chance=st.booleans(),
    wide=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=15, deadline=None)
def test_bfloat16_bit_by_bit(kind, shapes, offset, betas, chance, wide, seed):
    """Numbers of few digits, of which float32 makes no other ones: what differs would be the rounding."""
    direction, made = Momentum(betas), bucket(Momentum(betas), kind, torch.bfloat16, shapes=shapes)
    made.group["stochastic_rounding"] = chance
    generator = torch.Generator().manual_seed(seed)
    for tensors in (made.params, made.grads, *made.state.values()):
        for i, t in enumerate(tensors):
            whole = torch.randint(-127, 128, t.shape, generator=generator)
            tensors[i] = lying((whole / 64).bfloat16(), offset)
    if wide:  # as of parameters whose ``grad_dtype`` says so
        made.grads[:] = [g.float() for g in made.grads]
    before = [*made.params]
    for mine, truth in zip(*(moved(direction, made, chosen) for chosen in (kind, "plain")), strict=True):
        assert torch.equal(mine, truth)
        assert mine.dtype == torch.bfloat16
    assert all(p is old for p, old in zip(made.params, before, strict=True))


@pytest.mark.parametrize("kind", [NATIVE])
@pytest.mark.parametrize("chance", [True, False])
def test_at_the_end_of_bfloat16(kind, chance):
    """Chance makes nothing infinite that is nearer to the largest number."""
    direction, top, gap = Momentum((0.0, 0.0)), torch.finfo(torch.bfloat16).max, 2.0**120
    made = bucket(direction, kind, torch.bfloat16, shapes=[(4000,)])
    made.group["stochastic_rounding"] = chance
    made.params[0].copy_(torch.tensor([top, -top, top, -top]).repeat(1000))
    made.grads[0].copy_(torch.tensor([-0.3 * gap, 0.3 * gap, -0.6 * gap, 0.6 * gap]).repeat(1000))
    found, truth = (moved(direction, made, chosen, rate=1.0, decay=None)[0] for chosen in (kind, "plain"))
    assert torch.equal(found, truth)
    ends = found.float().view(1000, 4)
    assert (ends[:, :2] == torch.tensor([top, -top])).all()
    assert (ends[:, 2:].isinf() | (chance & (ends[:, 2:].abs() == top))).all()
