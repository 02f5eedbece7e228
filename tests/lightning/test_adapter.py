"""`configure_elra`, and what `ElraMonitor` writes and hands over."""

import math
import subprocess
import sys

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from elra_hf import ElraC2Min, rate
from elra_hf.adapters.lightning import ElraMonitor, configure_elra

from ..iterates import average
from .modules import NAMES, STEPS, Classifier, flat, loader, lowering, net, optimizer_of, plain, trainer
from .test_training import Gan, Manual

KEYS = {"elra/rate", "elra/alpha", "elra/cos", "elra/restarts"}


def test_importing_elra_hf_does_not_import_lightning():
    code = "import sys, elra_hf; assert not {'lightning', 'torch', 'jsonargparse'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_matrices_decay_biases_and_norms_do_not_and_frozen_parameters_are_left_out():
    module = net()
    module[3].weight.requires_grad_(False)
    decay, rest = configure_elra(module, "elra_adamw", weight_decay=0.1, eps=1e-6)["optimizer"].param_groups
    assert decay["params"] == [module[0].weight]
    assert rest["params"] == [module[0].bias, module[1].weight, module[1].bias, module[3].bias]
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)


def test_one_kind_of_parameter_is_one_group():
    (group,) = configure_elra(nn.Linear(2, 2, bias=False), weight_decay=0.1)["optimizer"].param_groups
    assert group["weight_decay"] == 0.1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"name": "elra_c2mni"}, "unknown name: 'elra_c2mni'; did you mean 'elra_c2min'"),
        ({"name": "adamw"}, "elra_c2min, elra_p2min, elra_adamw"),
        ({"gian": 0.4}, "unknown option of elra_c2min: 'gian'; did you mean 'gain'"),
        ({"gain": 7}, "gain=7"),
        ({"lr": 0.0}, "lr=0.0"),
    ],
)
def test_wrong_arguments_are_named_with_the_nearest(call, message):
    with pytest.raises(ValueError, match=message):
        configure_elra(net(), **call)


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="Sequential has no parameter that requires a gradient"):
        configure_elra(net().requires_grad_(False))


@pytest.mark.parametrize("name", NAMES)
def test_the_rate_is_logged_as_it_was_applied(name, tmp_path):
    module = Classifier(lambda module: configure_elra(module, name, lr=1e-2, weight_decay=0.01, scheduler=lowering))
    loggers = [TensorBoardLogger(tmp_path), CSVLogger(tmp_path)]
    run = trainer(tmp_path, logger=loggers, callbacks=[ElraMonitor(prog_bar=True)], log_every_n_steps=3)
    run.fit(module, loader())
    _, alphas, rates = plain(name, schedule=lowering)
    events = EventAccumulator(loggers[0].log_dir).Reload()
    assert set(events.Tags()["scalars"]) >= KEYS | {"loss"}
    assert [(e.step, e.value) for e in events.Scalars("elra/rate")] == [
        (step, pytest.approx(rates[step])) for step in range(2, STEPS, 3)
    ]
    assert [e.value for e in events.Scalars("elra/alpha")] == pytest.approx(alphas[2::3])
    assert len({e.value for e in events.Scalars("elra/cos")}) == 4
    (table,) = tmp_path.rglob("metrics.csv")
    assert table.read_text().splitlines()[0].count("elra/") == 5  # with the rate found
    assert "elra/rate" in run.progress_bar_metrics
    assert "elra/alpha" not in run.progress_bar_metrics
    assert rate(run.optimizers[0]) == pytest.approx(float(run.callback_metrics["elra/rate"]))


def test_a_groups_own_keys_are_not_taken_for_ours():
    keys = {"alpha": 7.0, "cos": 7.0, "restarts": 7.0}
    run = trainer(callbacks=[ElraMonitor()])
    run.fit(Classifier(lambda module: ElraC2Min([{"params": module.parameters(), **keys}])), loader())
    group = run.optimizers[0].param_groups[0]
    for name in ("alpha", "cos", "restarts"):
        assert run.callback_metrics[f"elra/{name}"] == group[f"elra_{name}"]
    assert group["alpha"] == 7.0


def test_accumulated_steps_are_logged_once(tmp_path):
    module = Classifier(lambda module: optimizer_of("elra_c2min", module))
    logger = TensorBoardLogger(tmp_path)
    trainer(logger=logger, callbacks=[ElraMonitor()], accumulate_grad_batches=4).fit(module, loader())
    logged = [(e.step, e.value) for e in EventAccumulator(logger.log_dir).Reload().Scalars("elra/alpha")]
    assert logged == list(enumerate(module.alphas[3::4]))


def test_several_optimizers_are_told_apart(tmp_path):
    module = Gan()
    run = trainer(callbacks=[ElraMonitor()])
    run.fit(module, loader())
    logged = {key for key in run.callback_metrics if key.startswith("elra")}
    assert logged == {key.replace("elra/", f"elra/{index}/") for key in KEYS for index in (0, 1)}
    assert len(run.callbacks[0].found) == 2
    assert [run.callback_metrics[f"elra/{i}/alpha"].item() for i in (0, 1)] == module.alphas[-1]


def test_other_optimizers_are_none_of_its_business():
    run = trainer(callbacks=[ElraMonitor(loss_restarts=True)])
    run.fit(Classifier(lambda module: torch.optim.SGD(module.parameters(), lr=0.1)), loader())
    assert not any(key.startswith("elra") for key in run.callback_metrics)


class Exploding(LightningModule):
    """f(x) = |x|²/2 from a first rate that is far too high: the loss grows a hundredfold at once."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.ones(4))

    def training_step(self, batch, batch_idx):
        return (self.x**2).sum() / 2

    def configure_optimizers(self):
        return ElraC2Min(self.parameters(), lr=12.0, betas=(0.0, 0.0), horizon=math.inf)


class Loud(Classifier):
    """The loss of the last step is a thousand times the others', its gradient is not."""

    def __init__(self, configure):
        super().__init__(configure)
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(flat(self).clone())
        loss = super().training_step(batch, batch_idx)
        return loss + (999 * loss.detach() if batch_idx == STEPS - 1 else 0.0)


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_losses_are_means_over_micro_batches_and_leave_no_hook(precision):
    from lightning.pytorch.plugins import MixedPrecision

    # the scaler calls step() without a closure, and scales the loss
    plugins = [MixedPrecision(precision, "cpu", torch.amp.GradScaler("cpu"))] if precision == "16-mixed" else None
    given = []

    def configure(module):
        optimizer = ElraC2Min(module.parameters(), lr=1e-5, horizon=math.inf)
        optimizer.register_step_post_hook(lambda _, args, kwargs: given.append(float(kwargs["loss"])))
        return optimizer

    module = Classifier(configure)
    run = trainer(callbacks=[ElraMonitor(loss_restarts=True)], accumulate_grad_batches=4, plugins=plugins)
    run.fit(module, loader(4))
    with torch.no_grad():
        start = [float(nn.functional.cross_entropy(net()(x), y)) for x, y in loader()]
    assert given == pytest.approx(start, rel=1e-2)  # the rate is too small to learn anything
    assert not run.optimizers[0]._optimizer_step_pre_hooks


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("flag", [False, True])
def test_an_exploded_loss_undoes_the_way_where_it_is_handed_over(flag, name):
    module = Loud(lambda module: optimizer_of(name, module))
    run = trainer(callbacks=[ElraMonitor(loss_restarts=flag)])
    run.fit(module, loader())
    assert run.optimizers[0].param_groups[0]["restarts"] == flag
    # of elra_adamw, whose last step may have gone anywhere, the average of what was before it
    wanted = average(module.seen[:-1] if name == "elra_adamw" else module.seen, name)
    near = (flat(module) - wanted).norm() < 1e-3 * (module.seen[-1] - wanted).norm()
    assert near == flag


@pytest.mark.parametrize("flag", [False, True])
def test_an_exploded_gradient_undoes_the_step_in_any_case(flag):
    module = Exploding()
    run = trainer(callbacks=[ElraMonitor(loss_restarts=flag)])
    run.fit(module, loader())
    assert run.optimizers[0].param_groups[0]["restarts"] >= 1
    assert flat(module).norm() < 2


@pytest.mark.parametrize("name", NAMES)
def test_handing_over_the_loss_changes_nothing_else(name):
    module = Classifier(lambda module: optimizer_of(name, module))
    trainer(callbacks=[ElraMonitor(loss_restarts=True)], gradient_clip_val=1.0).fit(module, loader())
    assert torch.equal(flat(module), plain(name, clip=1.0)[0])


def test_manual_optimization_is_told_to_pass_the_loss_itself():
    module = Manual(lambda module: optimizer_of("elra_c2min", module), "nothing")
    with pytest.raises(ValueError, match=r"needs automatic optimization.*optimizer\.step\(loss=\.\.\.\)"):
        trainer(callbacks=[ElraMonitor(loss_restarts=True)]).fit(module, loader())
