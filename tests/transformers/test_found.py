"""The rate that a run found: at the end of every run, and as the whole purpose of one."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from elra_hf import ElraAdamW, ElraC2Min
from elra_hf.adapters.found import KEPT, Found, Trace, sentence
from elra_hf.adapters.transformers import RateFinder

from .jobs import Rows, arguments, run

ROOT = Path(__file__).parents[2]
LINES = {
    "elra_adamw": "ElraAdamW found the rate {0:.2g}. The same for AdamW: lr {0:.2g}, schedule as here ({1}).",
    "elra_c2min": "ElraC2Min found the rate {0:.2g}. It is a rate for SGD (with momentum 0.9: lr {2:.2g}, schedule as here, ",
}


def geometric(values) -> float:
    return torch.tensor(values, dtype=torch.float64).log().mean().exp().item()


# ---- at the end of every run -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", LINES)
@pytest.mark.parametrize("options", [{}, {"warmup_steps": 10}, {"lr_scheduler_type": "constant", "warmup_steps": 10}])
def test_the_end_of_a_run_says_what_was_found(optim, options, tmp_path, capsys):
    trainer = run(tmp_path, optim, max_steps=120, report_to="tensorboard", **options)
    trainer.save_state()
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in history if "loss" in entry]
    assert len(steps) == 120
    alphas = torch.tensor([entry["elra_alpha"] for entry in steps[60:]]).double()
    shares = torch.tensor([entry["learning_rate"] for entry in steps[60:]]).double() / alphas
    expected = ((alphas.log() * shares).sum() / shares.sum()).exp().item()
    assert history[-1]["elra_found_rate"] == pytest.approx(expected, rel=1e-4)

    schedule = options.get("lr_scheduler_type", "linear")
    if schedule == "linear" and options:
        schedule += ", 10 steps of warm-up"
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "found the rate" in line]
    assert line.startswith(LINES[optim].format(expected, schedule, 0.1 * expected))

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [written] = tmp_path.rglob("events.out.tfevents.*")
    [event] = EventAccumulator(str(written)).Reload().Scalars("train/elra_found_rate")
    assert event.value == pytest.approx(expected, rel=1e-4)


def test_adamw_at_that_rate_takes_steps_as_long(tmp_path):
    """Why it is a rate for AdamW: the way of a constant run is as long, in Adam's units, as AdamW's would be."""
    trainer = run(tmp_path, "elra_adamw", max_steps=120, lr_scheduler_type="constant")
    *entries, summary = trainer.state.log_history
    assert summary["elra_found_rate"] == pytest.approx(geometric([e["elra_alpha"] for e in entries[60:]]), rel=1e-4)


def test_other_optimizers_find_nothing(tmp_path, capsys):
    trainer = run(tmp_path, "adamw_torch", max_steps=3)
    assert "elra_found_rate" not in trainer.state.log_history[-1]
    assert "found the rate" not in capsys.readouterr().out


def trace_of(alphas, optimizer=None, shares=None) -> Trace:
    """A trace of given rates."""
    optimizer = optimizer or ElraAdamW([nn.Parameter(torch.ones(1))])
    trace = Trace()
    for step, alpha in enumerate(alphas):
        for group in optimizer.param_groups:
            group.update(elra_full=group["lr"], elra_base=optimizer.defaults["lr"])
            group.update(elra_alpha=torch.tensor(alpha), elra_multiplier=torch.tensor(shares[step] if shares else 1.0))
        trace.add(optimizer)
    return trace


def test_a_long_run_takes_no_more_memory():
    trace = trace_of([1e-3] * 100 + [1e-2] * 30_000)
    assert len(trace._rows) < 2 * KEPT
    found = trace.found()
    assert found.rate == pytest.approx(1e-2)
    assert (found.steps, found.settled) == (30_100, True)


@pytest.mark.parametrize(
    ("alphas", "settled", "said"),
    [
        ([1e-3] * 200, True, None),
        ([1e-3 * 1.01**step for step in range(200)], False, "still rising at the end"),
        ([1e-3 * 0.99**step for step in range(200)], False, "still falling at the end"),
        ([1e-3] * 40, False, "These were 40 steps; of fewer than 100 the rate is a first guess"),
    ],
)
def test_a_rate_that_has_not_settled_is_called_so(alphas, settled, said):
    found = trace_of(alphas).found()
    assert found.settled == settled
    line = found.line("linear")
    assert line.endswith("(linear).") if said is None else said in line


def test_a_decay_does_not_hide_that_the_rate_still_rose():
    """Once the schedule has fallen to its half, the rate stands still because the search is over."""
    shares = [min(1.0, (step + 1) / 20) * (1.0 - step / 200) for step in range(200)]  # a warm-up, then a linear decay
    rising = [1e-3 * 1.02 ** min(step, 100) for step in range(200)]
    assert "still rising at the end" in trace_of(rising, shares=shares).found().line("linear")
    level = [1e-3 * 1.02 ** min(step, 40) for step in range(200)]
    assert trace_of(level, shares=shares).found().settled


def test_steps_that_hardly_move_hardly_count():
    found = trace_of([1e-3] * 100 + [1e-2] * 100, shares=[1.0] * 150 + [0.0] * 50).found()
    assert found.rate == pytest.approx(1e-2)
    late = trace_of([1e-3] * 150 + [1e-2] * 50, shares=[1.0] * 150 + [1e-6] * 50).found()
    assert late.rate == pytest.approx(1e-3, rel=1e-4)


def test_groups_with_a_ratio_are_told_apart():
    one, two = (nn.Parameter(torch.ones(1)) for _ in range(2))
    optimizer = ElraAdamW([{"params": [one]}, {"params": [two], "lr": 16e-5}], lr=1e-5)
    found = trace_of([1e-3] * 200, optimizer).found()
    assert found.rates == pytest.approx((1e-3, 16e-3))
    assert "found the rate 0.001, 0.016 by parameter group. The same for AdamW: lr 0.001, 0.016" in found.line("constant")


def test_nothing_is_found_before_a_step():
    assert Trace().found() is None


def test_a_rate_of_momentum_is_not_sold_as_adamws():
    found = trace_of([0.1] * 200, ElraC2Min([nn.Parameter(torch.ones(1))])).found()
    assert not found.adamw
    assert "lr 0.01" in found.line("linear")
    assert "none for AdamW" in sentence("elra_p2min", False, (0.1,), "linear")


# ---- RateFinder --------------------------------------------------------------------------------------------------------------


class Remembering(nn.Module):
    """Has a buffer that training changes, a frozen weight, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(40, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 2, bias=False)
        self.still = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, input_ids, attention_mask, labels):
        logits = self.head(self.drop(self.norm(self.embed(input_ids).mean(1)))) * self.still
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def state_of_chance():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


@pytest.mark.parametrize("steps", [30, None])
def test_the_finder_leaves_no_trace(steps, tmp_path, capsys):
    model, finder, chance = Remembering(), RateFinder(steps), []

    class Watching(RateFinder):  # before the finder, as it is the first of the callbacks
        def __init__(self):
            super().__init__(1)

        def on_train_begin(self, *_, **__):
            chance.append(state_of_chance())

        def on_step_begin(self, *_, **__):
            random.random()
            np.random.rand()

        def on_step_end(self, *_, **__):
            pass

        on_epoch_end = on_train_end = on_step_end

    before = {name: value.clone() for name, value in model.state_dict().items()}
    options = {"eval_strategy": "steps", "eval_steps": 5, "save_strategy": "steps", "save_steps": 10, "warmup_steps": 500}
    trainer = run(
        tmp_path, "elra_adamw", model, max_steps=1000, weight_decay=0.1, callbacks=[Watching(), finder], **options,
        load_best_model_at_end=True,
    )  # fmt: skip
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert state_of_chance() == chance[0]
    assert not list(tmp_path.glob("checkpoint-*"))
    assert not [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.state.global_step == finder.found.steps
    assert (finder.found.steps == steps) if steps else (finder.found.settled and finder.found.steps < 1000)
    group = trainer.optimizer.param_groups[0]
    assert not trainer.optimizer.state
    assert float(group["alpha"]) == pytest.approx(5e-5)  # as before the first step
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert entries[-1]["learning_rate"] == entries[-1]["elra_alpha"]  # no warm-up
    out = capsys.readouterr().out.splitlines()
    assert len([line for line in out if "found the rate" in line]) == 1
    assert f"RateFinder: {finder.found.steps} steps; weights, optimizer and random numbers are as before." in out


def test_the_run_after_the_finder_is_the_run_without_it(tmp_path):
    def losses(find: bool) -> list[float]:
        model = Remembering()
        if find:
            run(tmp_path, "elra_adamw", model, callbacks=[RateFinder(7)])
        trainer = run(tmp_path, "adamw_torch", model, learning_rate=1e-2)
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    assert losses(True) == losses(False)


class Failing(TrainerCallback):
    """Fails at a step, once, as memory that runs out or somebody who presses Ctrl-C."""

    def __init__(self, error: BaseException) -> None:
        self.errors = [error]

    def on_step_end(self, args, state, control, **_):
        if state.global_step == 4 and self.errors:
            raise self.errors.pop()


def test_a_search_that_fails_leaves_no_trace(tmp_path):
    model, finder = Remembering(), RateFinder(7)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = Trainer(
        model,
        arguments(tmp_path, "elra_adamw"),
        train_dataset=Rows(),
        callbacks=[finder, Failing(KeyboardInterrupt())],
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    trainer.train()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert finder.found.steps == 7


def test_a_search_that_begins_anew_with_smaller_batches_begins_with_the_same_weights(tmp_path):
    def search(**options):
        model, finder = Remembering(), RateFinder(7)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        failing = [Failing(RuntimeError("CUDA out of memory."))] if "auto_find_batch_size" in options else []
        trainer = run(tmp_path, "elra_adamw", model, callbacks=[finder, *failing], **options)
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        return finder.found, trainer.state.train_batch_size

    found, size = search(auto_find_batch_size=True)
    assert size < 8
    assert search(per_device_train_batch_size=size) == (found, size)


def test_a_run_shorter_than_the_search_is_searched_whole(tmp_path):
    finder = RateFinder(50)
    run(tmp_path, "elra_adamw", callbacks=[finder], max_steps=5)
    assert finder.found.steps == 5


@pytest.mark.parametrize("steps", [0, -3, 2.5, "200"])
def test_a_bad_number_of_steps_is_refused(steps):
    with pytest.raises(ValueError, match=r"steps=.* is invalid: give a positive whole number"):
        RateFinder(steps)


def test_an_optimizer_that_finds_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"AdamW finds no rate: train with ElraAdamW \(optim=elra_adamw\)"):
        run(tmp_path, "adamw_torch", callbacks=[RateFinder()])


def test_slices_of_deepspeed_are_refused():
    from elra_hf.adapters.found import Snapshot

    module = nn.Linear(2, 2)
    slices = [torch.ones(3, requires_grad=True)]
    with pytest.raises(ValueError, match="find the rate without DeepSpeed"):
        Snapshot(module, ElraAdamW(slices))


def test_the_finder_names_the_extra_that_it_needs():
    code = "import sys; sys.modules['transformers'] = None; from elra_hf.adapters.transformers import RateFinder"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    assert (
        "ImportError: RateFinder needs transformers, which is not installed: pip install 'elra_hf[transformers]'" in done.stderr
    )


def test_found_has_the_first_groups_rate():
    assert Found("ElraAdamW", True, (1e-3, 2e-3), 1.0, 200).rate == 1e-3
