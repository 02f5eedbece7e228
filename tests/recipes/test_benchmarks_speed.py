"""What the bench says that a step costs, on shapes made for the test."""

import itertools
import json
import math

import pytest
import torch

from recipes.benchmarks import speed


@pytest.mark.parametrize(
    ("net", "millions", "tensors"),
    [("20 M", 20.5, 100), ("MiniLM", 22.7, 103), ("GPT-2 small", 124.4, 148), ("1.1 G", 1100, 201)],
)
def test_shapes_are_those_of_the_nets_they_name(net, millions, tensors):
    shapes = speed.NETS[net]
    assert len(shapes) == tensors
    assert sum(map(math.prod, shapes)) / 1e6 == pytest.approx(millions, rel=2e-3)


def test_memory_of_a_step_on_the_cpu_is_what_it_holds_at_most():
    x = torch.zeros(1000)

    def step() -> None:
        a = x + 1  # 4,000 bytes
        b = torch.cat([a, a])  # 8,000 more
        del a
        b.mul_(2)

    extra, largest = speed.memory(step, torch.device("cpu"))
    assert extra == pytest.approx(12_000, abs=200)
    assert largest == pytest.approx(8_000, abs=100)


def test_launches_are_counted_without_views():
    x = torch.zeros(4, 4)
    with speed.Launches() as launches:
        x.view(16).add_(1)
        torch._foreach_mul_([x, x], 2.0)
    assert launches.count == 2


def test_rows_and_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(speed.NETS, "tiny", [(8, 8)] * 3)
    monkeypatch.setitem(speed.NETS, "1.1 G", [(2**20, 2**20)])  # more than any machine has
    options = ("--nets", "tiny", "1.1 G", "--optimizers", "AdamW fused", "ElraAdamW", "--seconds", "0.01", "--device", "cpu")
    speed.main([*options, "--dtypes", "fp32", "--folder", str(tmp_path)])
    (path,) = tmp_path.glob("speed-*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["net"], row["optimizer"]) for row in rows] == [*itertools.product(options[1:3], options[4:6])]
    assert ["error" in row for row in rows] == [False, False, True, True]
    fused, ours = rows[:2]
    assert ours["ratio"][0] <= ours["ratio"][1] <= ours["ratio"][2]
    assert ours["ratio"][1] > 0
    assert fused["state_bytes_per_parameter"] == pytest.approx(8, abs=0.1)  # and a counter a tensor
    assert fused["operations"] < ours["operations"]
    assert fused["kernels"] is None
    table = path.with_suffix(".md").read_text()
    assert "| tiny, 3 tensors, fp32 | ElraAdamW |" in table
    assert "needs up to" in table
    assert "2 rows" not in capsys.readouterr().out


def test_both_contestants_are_timed_on_the_same_gradients_and_move():
    row = speed.compare("ElraP2Min", [(16, 16)] * 2, torch.bfloat16, torch.device("cpu"), speed.Effort(seconds=0, fewest=3))
    assert row["turns"] >= 3
    assert row["host_ms"] == row["device_ms"]
    assert row["state_bytes_per_parameter"] > 0
