"""The step on a GPU: TRITON_INTERPRET=0 python -m pytest tests/kernels/test_cuda.py."""

import os

import pytest
import torch

from elra_hf import ElraAdamW, averaged
from tests.core.problems import VARIANTS

from .test_launches import groups

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or os.environ["TRITON_INTERPRET"] == "1", reason="no GPU, or TRITON_INTERPRET is not 0"
)
every = pytest.mark.parametrize("cls", VARIANTS.values(), ids=VARIANTS)


def data(t):
    return torch.randn(64, 20, generator=torch.Generator().manual_seed(t)).cuda()


class Run:
    """A net and its optimizer, on a GPU."""

    def __init__(self, cls, dtype=torch.float32, **options):
        torch.manual_seed(0)
        layers = [
            torch.nn.Linear(20, 130),
            torch.nn.Tanh(),
            torch.nn.Linear(130, 130),
            torch.nn.Tanh(),
            torch.nn.Linear(130, 1),
        ]
        self.model = torch.nn.Sequential(*layers).to("cuda", dtype)
        self.optimizer = cls(groups(self.model), **options)
        self.x = data(0).to(dtype)

    def backward(self):
        self.optimizer.zero_grad()
        self.model(self.x).sub(self.x[:, :1]).square().mean().backward()

    def step(self, t, bad=False):
        self.x.copy_(data(t))
        self.backward()
        if bad:
            self.model[0].weight.grad[0, 0] = torch.nan
        self.optimizer.step()

    def weights(self):
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])

    def kept(self):
        return torch.stack([v for group in self.optimizer.param_groups for v in group.values() if torch.is_tensor(v)])


@pytest.mark.parametrize("scope", ["global", "group"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every
def test_the_same_numbers_as_plain_torch(cls, dtype, scope, monkeypatch):
    ours = Run(cls, dtype, scope=scope)
    monkeypatch.setenv("ELRA_KERNELS", "plain")
    theirs = Run(cls, dtype, scope=scope)
    for t in range(12):
        monkeypatch.delenv("ELRA_KERNELS")
        ours.step(t, bad=t == 6)
        monkeypatch.setenv("ELRA_KERNELS", "plain")
        theirs.step(t, bad=t == 6)
    assert ours.optimizer._programs[1]
    assert not theirs.optimizer._programs[1]
    near = {"rtol": 1e-3, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 1e-2}
    torch.testing.assert_close(ours.weights(), theirs.weights(), **near)
    torch.testing.assert_close(ours.kept(), theirs.kept(), rtol=1e-3 if dtype == torch.float32 else 0.1, atol=1e-4)


@every
def test_waits_for_nothing(cls):
    run = Run(cls)
    for t in range(4):
        run.step(t)
    for _ in range(4):
        run.backward()
        run.optimizer.param_groups[0]["lr"] *= 0.9
        torch.cuda.set_sync_debug_mode("error")
        try:
            run.optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@every
def test_six_kernels(cls):
    run = Run(cls)
    for t in range(4):
        run.step(t)
    run.backward()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run.optimizer.step()
        torch.cuda.synchronize()
    on_device = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len([name for name in on_device if not name.startswith(("Memcpy", "Memset"))]) <= 6, on_device


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every
def test_two_runs_are_the_same(cls, dtype):
    runs = [Run(cls, dtype) for _ in range(2)]
    for t in range(8):
        for run in runs:
            run.step(t)
    assert torch.equal(runs[0].weights(), runs[1].weights())
    assert torch.equal(runs[0].kept(), runs[1].kept())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every
def test_replays_of_a_captured_step_are_steps(cls, dtype):
    """Forward, backward and step, with a schedule, bit for bit; the gradients lie elsewhere than before."""

    def made():
        run = Run(cls, dtype, lr=torch.tensor(1e-3, device="cuda"))
        return run, torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda t: 1 - t / 40)

    (eager, slower), (captured, schedule) = made(), made()
    for t in range(5):
        eager.step(t)
        slower.step()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for t in range(5):
            captured.step(t)
            schedule.step()
    torch.cuda.current_stream().wait_stream(side)
    captured.optimizer.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.model(captured.x).sub(captured.x[:, :1]).square().mean().backward()
        captured.optimizer.step()
    rates = set()
    for t in range(5, 25):
        eager.step(t)
        captured.x.copy_(data(t))
        graph.replay()
        rates.add(float(captured.optimizer.param_groups[0]["alpha"]))
        for one in (slower, schedule):
            one.step()
    assert torch.equal(eager.weights(), captured.weights())
    assert torch.equal(eager.kept(), captured.kept())
    assert len(rates) > 10
    for run in (eager, captured):  # and on without the graph
        for t in range(25, 28):
            run.step(t)
    assert torch.equal(eager.weights(), captured.weights())
    with averaged(eager.optimizer), averaged(captured.optimizer):
        assert torch.equal(eager.weights(), captured.weights())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every
def test_a_resumed_run_goes_on(cls, dtype, tmp_path):
    whole, first = Run(cls, dtype), Run(cls, dtype)
    for t in range(12):
        whole.step(t)
        if t < 6:
            first.step(t)
    torch.save((first.model.state_dict(), first.optimizer.state_dict()), tmp_path / "checkpoint.pt")
    second = Run(cls, dtype)
    weights, state = torch.load(tmp_path / "checkpoint.pt", map_location="cpu")
    second.model.load_state_dict(weights)
    second.optimizer.load_state_dict(state)
    for t in range(6, 12):
        second.step(t)
    close = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-2}
    torch.testing.assert_close(second.weights(), whole.weights(), **close)
    with averaged(second.optimizer), averaged(whole.optimizer):
        torch.testing.assert_close(second.weights(), whole.weights(), **close)


@every
def test_sharded_parameters_meet_the_kernels(cls):
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    store = dist.TCPStore("localhost", 0, is_master=True)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=torch.device("cuda", 0))
    try:
        whole, sharded = Run(cls), Run(cls)
        fully_shard(sharded.model)
        sharded.optimizer = cls(groups(sharded.model))
        for t in range(8):
            whole.step(t)
            sharded.step(t)
        assert sharded.optimizer._programs[1]
        local = torch.cat([p.to_local().detach().flatten() for p in sharded.model.parameters()])
        torch.testing.assert_close(local, whole.weights(), rtol=1e-4, atol=1e-6)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("fault", ["too early", "loss", "a schedule of floats", "lr on the CPU"])
def test_what_a_replay_would_not_repeat_is_refused(fault):
    run = Run(ElraAdamW, lr=torch.tensor(1e-3) if fault == "lr on the CPU" else 1e-3)
    if fault == "a schedule of floats":
        torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda t: 1.0)
    for t in range(1 if fault == "too early" else 4):
        run.step(t)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="cannot be captured"), torch.cuda.graph(graph):
        run.optimizer.step(loss=torch.ones((), device="cuda") if fault == "loss" else None)
    for t in range(4, 6):  # nothing is lost
        run.step(t)
    assert torch.isfinite(run.weights()).all()
