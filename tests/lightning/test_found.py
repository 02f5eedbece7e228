"""The rate that a run found: at the end of every run with `ElraMonitor`, and with `RateFinder` as the whole purpose of one."""

import csv
import random

import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from elra_hf import ElraAdamW
from elra_hf.adapters.lightning import ElraMonitor, RateFinder, configure_elra

from .modules import STEPS, Classifier, flat, loader, optimizer_of, trainer
from .test_training import Gan, Manual, Uneven


def warming(optimizer):
    return torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, 1.0, 500)


class Changing(Classifier):
    """Has a buffer that training changes, and plays with chance."""

    def __init__(self, configure):
        super().__init__(configure)
        self.norm = nn.BatchNorm1d(6)
        self.chance = None

    def on_fit_start(self):
        self.chance = random.getstate(), torch.get_rng_state().tolist()

    def training_step(self, batch, batch_idx):
        x, y = batch
        random.random()
        return super().training_step((self.norm(x) + 0.01 * torch.randn_like(x), y), batch_idx)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_monitor_says_what_was_found(accumulate, tmp_path, capsys):
    logger, monitor = CSVLogger(tmp_path), ElraMonitor()
    module = Classifier(lambda module: configure_elra(module, "elra_adamw", scheduler=warming))
    run = trainer(logger=logger, callbacks=[monitor], max_epochs=3, accumulate_grad_batches=accumulate)
    run.fit(module, loader())
    with open(f"{logger.log_dir}/metrics.csv") as file:
        [rate] = [float(row["elra/found_rate"]) for row in csv.DictReader(file) if row["elra/found_rate"]]
    [found] = monitor.found
    assert found.steps == run.global_step == 36 // accumulate
    alphas = torch.tensor(module.alphas[accumulate - 1 :: accumulate][18 // accumulate :]).double()
    shares = torch.arange(18 // accumulate, 36 // accumulate) / 500 * 0.99 + 0.01
    assert rate == pytest.approx(found.rate)
    assert rate == pytest.approx(((alphas.log() * shares).sum() / shares.sum()).exp().item(), rel=1e-3)
    [line] = [line for line in capsys.readouterr().out.splitlines() if "found the rate" in line]
    assert line.startswith(
        f"ElraAdamW found the rate {rate:.2g}. The same for AdamW: lr {rate:.2g}, schedule as here (LinearLR)."
    )


def test_each_of_two_optimizers_is_followed_by_its_own_steps(tmp_path):
    """Of which one takes several in a batch, and the other none in most."""
    logger, monitor, module = CSVLogger(tmp_path), ElraMonitor(), Uneven()
    run = trainer(logger=logger, callbacks=[monitor], max_epochs=2)
    run.fit(module, loader())
    assert [found.steps for found in monitor.found] == [2 * STEPS // 3, 2 * STEPS * 2]
    for found, alphas in zip(monitor.found, module.seen, strict=True):
        half = torch.tensor(alphas[len(alphas) // 2 :]).double()
        assert found.rate == pytest.approx(half.log().mean().exp().item(), rel=1e-4)
    with open(f"{logger.log_dir}/metrics.csv") as file:
        at = {int(row["step"]) for row in csv.DictReader(file) if row["elra/1/found_rate"]}
    assert at == {2 * STEPS}  # Lightning counts batches there


def test_the_finder_sees_each_step_of_a_batch():
    class Twice(Manual):
        def training_step(self, batch, batch_idx):
            for _ in range(2):
                super().training_step(batch, batch_idx)
                self.lr_schedulers().step()

    class Watching(RateFinder):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            super().on_before_optimizer_step(trainer, module, optimizer)
            held.append(optimizer.param_groups[0]["lr"])

    held, finder = [], Watching(7)
    module = Twice(lambda module: configure_elra(module, "elra_adamw", lr=1e-3, scheduler=warming), "nothing")
    before = flat(module).clone()
    trainer(callbacks=[finder]).fit(module, loader())
    assert finder.found.steps == 8  # the batch is finished
    assert held == [1e-3] * 8
    assert torch.equal(flat(module), before)


@pytest.mark.parametrize("steps", [20, None])
@pytest.mark.parametrize("monitors", [[], [{}], [{"averaged": True}]])
def test_the_finder_leaves_no_trace(steps, monitors, tmp_path, capsys):
    finder, checkpoints = RateFinder(steps), ModelCheckpoint(tmp_path / "kept", every_n_train_steps=5, save_top_k=-1)
    module = Changing(lambda module: configure_elra(module, "elra_adamw", weight_decay=0.1, scheduler=warming))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    run = trainer(
        tmp_path,
        callbacks=[*(ElraMonitor(**options) for options in monitors), finder, checkpoints],
        max_epochs=50,
        enable_checkpointing=True,
    )
    run.fit(module, loader(), loader())
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert not (tmp_path / "kept").exists()
    assert checkpoints in run.callbacks
    assert run.global_step == finder.found.steps
    assert finder.found.steps == steps if steps else finder.found.settled
    assert not run.optimizers[0].state
    assert random.getstate() == module.chance[0]
    out = capsys.readouterr().out
    assert out.count("found the rate") == 1
    assert f"RateFinder: {finder.found.steps} steps; weights, optimizer and random numbers are as before." in out


def test_the_schedule_is_held_at_its_full_rate():
    module = Classifier(lambda module: configure_elra(module, "elra_adamw", lr=1e-3, scheduler=warming))
    applied = []

    class Watching(RateFinder):
        def on_train_batch_end(self, trainer, *rest):
            group = trainer.optimizers[0].param_groups[0]
            applied.append((float(group["effective_lr"]), float(group["alpha"])))
            super().on_train_batch_end(trainer, *rest)

    trainer(callbacks=[Watching(5)], max_epochs=2).fit(module, loader())
    assert len(applied) == 5
    assert all(rate == pytest.approx(alpha) for rate, alpha in applied)


def test_the_run_after_the_finder_is_the_run_without_it():
    def trained(find: bool) -> torch.Tensor:
        module = Classifier(lambda module: optimizer_of("elra_adamw", module))
        if find:
            trainer(callbacks=[RateFinder(7)]).fit(module, loader())
        trainer().fit(module, loader())
        return flat(module)

    assert torch.equal(trained(True), trained(False))


class Thawing(Classifier):
    """Its first layer is frozen until the third batch; with ``late`` the optimizer does not know it before."""

    def __init__(self, late: bool) -> None:
        super().__init__(lambda module: ElraAdamW([p for p in module.parameters() if p.requires_grad or not late]))
        self.late = late
        self.net[0].requires_grad_(False)

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == 2:
            self.net[0].requires_grad_(True)
            if self.late:
                self.trainer.optimizers[0].add_param_group({"params": self.net[0].parameters()})


@pytest.mark.parametrize("late", [False, True])
def test_what_is_trained_from_the_middle_on_is_put_back_too(late):
    finder, module = RateFinder(7), Thawing(late)
    before = flat(module).clone()
    run = trainer(callbacks=[finder])
    run.fit(module, loader())
    assert torch.equal(flat(module), before)
    assert finder.found.steps == 7
    assert len(run.optimizers[0].param_groups) == 1
    assert not run.optimizers[0].state


@pytest.mark.parametrize("order", [1, -1])
def test_a_backbone_that_lightning_unfreezes_is_put_back_too(order):
    class Pretrained(Classifier):
        def __init__(self):
            super().__init__(lambda module: ElraAdamW([p for p in module.parameters() if p.requires_grad]))
            self.backbone, self.net = self.net[:3], self.net[3:]

        def training_step(self, batch, batch_idx):
            return super().training_step((self.backbone(batch[0]), batch[1]), batch_idx)

    finder, module = RateFinder(STEPS + 5), Pretrained()
    before = flat(module).clone()
    callbacks = [finder, BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=1e-5)]
    trainer(callbacks=callbacks[::order], max_epochs=3).fit(module, loader())
    assert torch.equal(flat(module), before)
    assert finder.found.steps == STEPS + 5


def test_a_search_that_fails_leaves_no_trace():
    class Failing(Classifier):
        def training_step(self, batch, batch_idx):
            if batch_idx == 5:
                raise ValueError("broken")
            return super().training_step(batch, batch_idx)

    module = Failing(lambda module: optimizer_of("elra_adamw", module))
    before = flat(module).clone()
    failed = trainer(callbacks=[RateFinder(20), ModelCheckpoint()], enable_checkpointing=True)
    callbacks = list(failed.callbacks)
    with pytest.raises(ValueError, match="broken"):
        failed.fit(module, loader())
    assert torch.equal(flat(module), before)
    assert failed.callbacks == callbacks  # a later run writes checkpoints


def test_an_optimizer_of_ours_may_come_in_mid_run(tmp_path):
    class Switching(Classifier):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.trainer.strategy.optimizers = [ElraAdamW(self.parameters())]

    monitor = ElraMonitor()
    module = Switching(lambda module: torch.optim.SGD(module.parameters(), lr=0.1))
    run = trainer(callbacks=[monitor], max_epochs=2, logger=CSVLogger(tmp_path))
    run.fit(module, loader())
    assert [found.steps for found in monitor.found] == [STEPS]
    with open(f"{run.logger.log_dir}/metrics.csv") as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["elra/rate"]]
    assert steps == list(range(STEPS, 2 * STEPS))


def test_another_trainer_keeps_its_callbacks():
    finder, module = RateFinder(3), Classifier(lambda module: optimizer_of("elra_adamw", module))
    trainer(callbacks=[finder]).fit(module, loader())
    other = trainer(callbacks=[finder, EarlyStopping("loss")])
    callbacks = list(other.callbacks)
    other.validate(module, loader(), verbose=False)
    assert other.callbacks == callbacks


def test_what_the_finder_cannot_search_is_refused():
    sgd = Classifier(lambda module: torch.optim.SGD(module.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="SGD finds no rate: train with ElraAdamW"):
        trainer(callbacks=[RateFinder()]).fit(sgd, loader())
    with pytest.raises(ValueError, match="RateFinder finds the rate of one optimizer, and this module has 2"):
        trainer(callbacks=[RateFinder()]).fit(Gan(), loader())


@pytest.mark.parametrize("least", [{"min_epochs": 3}, {"min_steps": STEPS + 2}], ids=str)
def test_a_search_stops_in_time_where_a_run_must_not_stop_early(least):
    finder, module = RateFinder(4), Classifier(lambda module: optimizer_of("elra_adamw", module))
    run = trainer(callbacks=[finder], max_epochs=5, **least)
    run.fit(module, loader())
    assert finder.found.steps == 4
    assert {name: getattr(run.fit_loop, name) for name in least} == least
