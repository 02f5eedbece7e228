"""A step on an accelerator waits for nothing and mixes no devices. Without one: tensors that have a device but no numbers."""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode, unset_fake_temporarily

from elra_hf import averaged, gather, kernels
from tests.core.problems import VARIANTS

DEVICE = "meta"  # which torch treats as one that cannot be read from, and refuses to mix with the CPU
KINDS = (((30, 40), torch.bfloat16), ((7,), torch.bfloat16), ((1000,), torch.float32))


def test_what_waits_or_mixes_is_seen():
    with FakeTensorMode():
        x = torch.empty(3, device=DEVICE)
        with pytest.raises(DataDependentOutputException):
            float(x[0])
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.empty(3)


def train(cls, scope, after_step=lambda: None, **options):
    """Five steps, of groups of different rates; one parameter is late, one gradient absent."""
    params = [torch.nn.Parameter(torch.empty(shape, device=DEVICE, dtype=dtype)) for shape, dtype in KINDS]
    optimizer = cls([{"params": params[:2], "weight_decay": 0.1}, {"params": params[2:], "lr": 1e-4}], scope=scope)
    for t in range(5):
        for k, p in enumerate(params):
            p.grad = None if (k, t) == (1, 0) else torch.empty_like(p)
        optimizer.step(**options)
        after_step()
    return optimizer


@pytest.mark.parametrize("scope", ["global", "group", "tensor"])
@pytest.mark.parametrize("cls", VARIANTS.values(), ids=VARIANTS)
def test_in_plain_torch(cls, scope, monkeypatch):
    monkeypatch.setenv("ELRA_KERNELS", "plain")
    with FakeTensorMode(), averaged(train(cls, scope, loss=torch.empty((), device=DEVICE))):
        pass


class Launch:
    """Stands for a kernel, and looks at what it is given."""

    def __init__(self, name, launched):
        self.name, self.launched = name, launched

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
            assert all(x.device.type == DEVICE and x.is_contiguous() for x in tensors), self.name
            self.launched.append(self.name)

        return launch


@pytest.mark.parametrize("scope", ["global", "group", "tensor"])
@pytest.mark.parametrize("cls", VARIANTS.values(), ids=VARIANTS)
def test_around_the_kernels(cls, scope, monkeypatch):
    fuse, triton = pytest.importorskip("elra_hf.kernels.fuse"), pytest.importorskip("elra_hf.kernels.triton")
    sheets = pytest.importorskip("elra_hf.kernels.sheets")
    launched: list[str] = []
    for name in ("_measure", "_total", "_update"):
        monkeypatch.setattr(triton, name, Launch(name, launched))
    monkeypatch.setattr(fuse, "_load", lambda source: Launch("fused", launched))
    trace = fuse.Fused.__init__

    def traced(*arguments):
        with unset_fake_temporarily():
            trace(*arguments)

    monkeypatch.setattr(fuse.Fused, "__init__", traced)
    monkeypatch.setattr(kernels, "choose", lambda *_: "triton")
    monkeypatch.setattr(gather, "PLAIN_TENSORS", (*gather.PLAIN_TENSORS, FakeTensor))
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda tensor: 16 * id(tensor))
    monkeypatch.setattr(torch.autograd.graph, "increment_version", lambda tensors: None)
    for cached in (sheets._uploaded, sheets._chunks):
        cached.cache_clear()
    with FakeTensorMode():
        train(cls, scope, lambda: launched.append("|"))
    for cached in (sheets._uploaded, sheets._chunks):  # they hold what has no numbers
        cached.cache_clear()
    last = " ".join(launched).split("|")[-2].split()
    if scope != "tensor":
        dtypes = 2
        passing = ["_total", "fused"] if cls is VARIANTS["adamw"] else []
        assert last == [*["_measure"] * dtypes, "_total", "fused", *["_update"] * dtypes, *passing]
    assert "_update" in last
