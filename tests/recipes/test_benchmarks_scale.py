"""The bench's training at scale, with a net and texts made for the test."""

import pytest
import torch

from recipes.benchmarks import scale
from recipes.benchmarks.language import Size
from recipes.benchmarks.run import key
from recipes.sweep import read

TINY = scale.Scale(
    Size(vocabulary=50, layers=1, width=32, rows=4, length=16, kept_steps=2),
    {
        "scratch": scale.Stage("python", 3, 4, 1e-3, tuned=False),
        "tune": scale.Stage("shakespeare", 3, 4, 1e-3),
        "lora": scale.Stage("shakespeare", 3, 4, 1e-2, rank=2),
    },
)


@pytest.fixture(autouse=True)
def tiny(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(scale, "SCALES", {"small": TINY, "large": scale.SCALES["large"]})
    monkeypatch.setattr(scale, "tokens", lambda text, vocabulary: torch.arange(3000) * (7 if text == "python" else 11) % 50)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def go(path, *options: str) -> None:
    scale.main(["--size", "small", "--device", "cpu", "--threads", "1", "--results", str(path), *options])


def test_every_run_of_the_plan_is_a_row_and_a_second_start_has_nothing_to_do(tmp_path, capsys):
    path = tmp_path / "rows.csv"
    go(path)
    rows = read(path)
    assert "complete" in capsys.readouterr().out
    assert all(row["status"] == "ok" for row in rows), [row["error"] for row in rows]
    assert len({key(row) for row in rows}) == len(rows)
    for task in ("small-scratch", "small-tune", "small-lora"):
        of = [row for row in rows if row["task"] == task]
        swept = [row for row in of if (row["optimizer"], row["seed"]) == ("adamw", "0")]
        assert len(swept) >= 5
        best = min(swept, key=lambda row: float(row["validation_loss"]))
        again = [row for row in of if row["optimizer"] == "adamw" and row["seed"] != "0"]
        assert {(row["seed"], row["rate"]) for row in again} == {("1", best["rate"]), ("2", best["rate"])}
        ours = {(row["schedule"], row["seed"]) for row in of if row["optimizer"] == "elra_adamw"}
        assert ours == {(schedule, seed) for schedule in ("linear", "constant") for seed in ("1", "2")}
    counts = {row["task"]: int(row["parameters"]) for row in rows}
    assert counts["small-scratch"] == counts["small-tune"] > counts["small-lora"]
    text = path.with_suffix(".md").read_text()
    assert text.count("| adamw, warmup-linear | 2 |") == 3
    assert text.count("| 1.000 |") == 3
    before = path.read_bytes()
    go(path)
    assert path.read_bytes() == before


def test_it_stops_in_time_and_goes_on(tmp_path, capsys):
    path = tmp_path / "rows.csv"
    go(path, "--minutes", "0")
    first = read(path)
    assert len(first) <= 1
    assert "goes on" in capsys.readouterr().out
    if first:
        path.write_text(path.read_text() + "small-scratch,adamw,warm")  # what a kill in mid-write would leave
    go(path, "--minutes", "0.02")
    assert read(path)[: len(first)] == first
    assert len({key(row) for row in read(path)}) == len(read(path)) > len(first)


def test_the_sweep_comes_first_from_its_centre_outwards():
    done: dict = {}
    order = []
    while (run := scale.wanted(TINY, "small", done)) is not None and run.optimizer == "adamw" and run.seed == 0:
        order.append(float(run.rate))
        loss = abs(float(run.rate) - 1e-2)  # at the edge of the first five
        done[run] = {"reached": "", "status": "ok", "validation_loss": str(loss)}
    assert order[0] == 1e-3
    assert sorted(order[:5]) == [1e-4, 3.16e-4, 1e-3, 3.16e-3, 1e-2]
    assert order[5:] == [3.16e-2]
    assert run.optimizer == "elra_adamw"


def test_the_large_net_has_more_than_a_hundred_million_parameters_and_needs_a_gpu():
    size = scale.SCALES["large"].size
    with torch.device("meta"):
        assert sum(p.numel() for p in size.net(0).parameters()) > 1e8
    with pytest.raises(SystemExit, match="needs a GPU"):
        scale.main(["--device", "cpu"])
