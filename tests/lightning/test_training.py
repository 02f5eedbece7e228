"""Training under Lightning's Trainer is the training that a plain loop does."""

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.nn.functional import cross_entropy

from elra_hf import ElraAdamW, ElraC2Min, ElraP2Min, rate
from tests.core.problems import same, snapshot

from .modules import NAMES, STEPS, Classifier, flat, loader, lowering, optimizer_of, plain, trainer

FORMS = {
    "optimizer": lambda optimizer: optimizer,
    "list": lambda optimizer: [optimizer],
    "two lists": lambda optimizer: ([optimizer], []),
    "dictionary": lambda optimizer: {"optimizer": optimizer},
    "tuple of dictionaries": lambda optimizer: ({"optimizer": optimizer},),
}
SCHEDULED = {
    "two lists": lambda o: ([o], [{"scheduler": lowering(o), "interval": "step"}]),
    "dictionary": lambda o: {"optimizer": o, "lr_scheduler": {"scheduler": lowering(o), "interval": "step"}},
}


def fit(name, form=lambda optimizer: optimizer, **options):
    module = Classifier(lambda module: form(optimizer_of(name, module)))
    trainer(**options).fit(module, loader())
    return module


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", FORMS)
def test_every_return_form_trains_like_a_plain_loop(form, name):
    module = fit(name, FORMS[form])
    x, alphas, _ = plain(name)
    assert torch.equal(flat(module), x)
    assert module.alphas == alphas
    assert len(set(alphas)) > 6


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", SCHEDULED)
def test_schedulers_multiply(form, name):
    module = fit(name, SCHEDULED[form])
    x, alphas, rates = plain(name, schedule=lowering)
    assert torch.equal(flat(module), x)
    assert module.alphas == alphas
    assert rates == pytest.approx([alpha * 0.8 ** (step // 4) for step, alpha in enumerate(alphas)])


@pytest.mark.parametrize("name", NAMES)
def test_accumulation_is_one_large_batch(name):
    module = Classifier(lambda module: optimizer_of(name, module), torch.float64)
    trainer(accumulate_grad_batches=4).fit(module, loader(4, torch.float64))
    x, alphas, _ = plain(name, dtype=torch.float64)
    torch.testing.assert_close(flat(module), x, rtol=1e-9, atol=1e-9)
    assert module.alphas[3::4] == pytest.approx(alphas, rel=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_clipped_before_the_step(name):
    module = fit(name, gradient_clip_val=0.1)
    x, alphas, _ = plain(name, clip=0.1)
    torch.testing.assert_close(flat(module), x)
    assert module.alphas == pytest.approx(alphas)
    assert not torch.equal(x, plain(name)[0])


@pytest.mark.parametrize("name", NAMES)
def test_bf16_mixed(name):
    module = fit(name, precision="bf16-mixed")
    x, alphas, _ = plain(name, autocast=True)
    assert torch.equal(flat(module), x)
    assert module.alphas == alphas
    assert all(p.dtype == torch.float32 for p in module.parameters())


def test_early_stopping_on_the_held_out_loss():
    stop = EarlyStopping("val_loss", stopping_threshold=0.9)
    module = Classifier(lambda module: optimizer_of("elra_c2min", module))
    run = trainer(max_epochs=100, callbacks=[stop])
    run.fit(module, loader(), loader())
    assert 0 < stop.stopped_epoch < 60
    assert run.callback_metrics["val_loss"] < 0.9


@pytest.mark.parametrize("name", NAMES)
def test_resuming_from_a_checkpoint_equals_not_stopping(name, tmp_path):
    def module():
        return Classifier(lambda module: SCHEDULED["dictionary"](optimizer_of(name, module)))

    whole, stopped, resumed = module(), module(), module()
    runs = [
        trainer(tmp_path, max_epochs=2),
        trainer(tmp_path, max_epochs=1, enable_checkpointing=True, callbacks=[ModelCheckpoint(tmp_path, filename="stopped")]),
        trainer(tmp_path, max_epochs=2),
    ]
    for run, each, path in zip(runs, (whole, stopped, resumed), (None, None, tmp_path / "stopped.ckpt"), strict=True):
        run.fit(each, loader(), ckpt_path=path)
    assert torch.load(tmp_path / "stopped.ckpt", weights_only=True)["optimizer_states"][0]["param_groups"][0]["alpha"] > 0
    assert torch.equal(flat(resumed), flat(whole))
    assert stopped.alphas + resumed.alphas == whole.alphas
    assert same(snapshot(runs[2].optimizers[0]), snapshot(runs[0].optimizers[0]))


class Manual(Classifier):
    """Manual optimization; ``how`` is what ``step`` gets."""

    def __init__(self, configure, how: str) -> None:
        super().__init__(configure)
        self.automatic_optimization = False
        self.how = how

    def training_step(self, batch, batch_idx):
        x, y = batch
        optimizer = self.optimizers()

        def closure():
            optimizer.zero_grad()
            loss = cross_entropy(self.net(x), y)
            self.manual_backward(loss)
            return loss

        if self.how == "closure":
            optimizer.step(closure)
        else:
            loss = closure()
            optimizer.step(**({"loss": loss.detach()} if self.how == "loss" else {}))
        return None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", ["nothing", "loss", "closure"])
def test_manual_optimization(how, name):
    module = Manual(lambda module: optimizer_of(name, module), how)
    run = trainer()
    run.fit(module, loader())
    x, alphas, _ = plain(name)
    assert torch.equal(flat(module), x)
    assert module.alphas == alphas
    assert run.optimizers[0].param_groups[0]["elra_losses"] == (STEPS if how == "loss" else 0)


class Gan(LightningModule):
    """Two nets against each other, each with an optimizer and a rate of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(5)
        self.generator = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 6))
        self.discriminator = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
        self.alphas, self.cosines = [], []

    def configure_optimizers(self):
        return ElraAdamW(self.generator.parameters(), lr=1e-3), ElraC2Min(self.discriminator.parameters(), lr=1e-3)

    def training_step(self, batch, batch_idx):
        real, _ = batch
        fake = self.generator(torch.randn(len(real), 2))
        before = flat(self.generator).clone(), flat(self.discriminator).clone()
        for index, (optimizer, loss) in enumerate(zip(self.optimizers(), (self._fool, self._tell), strict=True)):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(loss(real, fake))
            optimizer.step()
            self.untoggle_optimizer(optimizer)
            after = flat(self.generator), flat(self.discriminator)
            # each step moves the parameters of its own optimizer alone
            assert [torch.equal(a, b) for a, b in zip(after, before, strict=True)] == [False, index == 0]
        self.alphas.append([float(optimizer.param_groups[0]["alpha"]) for optimizer in self.optimizers()])
        self.cosines.append(float(self.optimizers()[0].param_groups[0]["cos"]))

    def _fool(self, real, fake):
        return nn.functional.softplus(-self.discriminator(fake)).mean()

    def _tell(self, real, fake):
        scores = self.discriminator(torch.cat([real, fake.detach()]))
        return nn.functional.softplus(torch.cat([-scores[: len(real)], scores[len(real) :]])).mean()


def test_two_optimizers_adapt_apart():
    module = Gan()
    trainer(max_epochs=2).fit(module, loader())
    generator, discriminator = zip(*module.alphas, strict=True)
    assert generator != discriminator
    assert len(set(generator)) > 8  # it meets its highest rate, and goes on measuring
    assert len(set(module.cosines)) > 20
    assert len(set(discriminator)) > 10


class Overflowing(Classifier):
    """The gradient of one step is infinite, as when float16 overflows."""

    def __init__(self, configure) -> None:
        super().__init__(configure)
        self.seen = []

    def on_after_backward(self):
        if self.global_step == 3 and len(self.alphas) == 3:
            self.net[0].weight.grad.fill_(torch.inf)

    def on_train_batch_start(self, *_):
        self.seen.append((flat(self).clone(), snapshot(self.trainer.optimizers[0])))


@pytest.mark.parametrize("cls", [ElraC2Min, ElraP2Min, ElraAdamW])
def test_a_step_that_the_scaler_skips_teaches_nothing(cls):
    module = Overflowing(lambda module: cls(module.parameters(), lr=1e-2))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    trainer(plugins=[MixedPrecision("16-mixed", "cpu", scaler)]).fit(module, loader())
    for step in range(3, len(module.seen) - 1):
        (x, state), (x_after, state_after) = module.seen[step : step + 2]
        assert torch.equal(x, x_after) == (step == 3)
        assert same(state, state_after) == (step == 3)
    assert module.trainer.optimizers[0].param_groups[0]["restarts"] == 0
    assert scaler.get_scale() == 4.0


def test_training_step_without_a_loss_is_no_step():
    class Sometimes(Classifier):
        def training_step(self, batch, batch_idx):
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

    module = Sometimes(lambda module: optimizer_of("elra_c2min", module))
    trainer().fit(module, loader())
    assert module.alphas[1::2] == module.alphas[::2]


def test_rate_reads_through_lightnings_wrapper():
    module = fit("elra_p2min")
    wrapped = module.optimizers()
    assert isinstance(wrapped, ElraP2Min)
    assert rate(wrapped) == rate(module.trainer.optimizers[0]) != 1e-2


class Uneven(Gan):
    """The discriminator takes two steps a batch, the generator one at every third."""

    def training_step(self, batch, batch_idx):
        real, _ = batch
        fake = self.generator(torch.randn(len(real), 2))
        generator, discriminator = self.optimizers()
        for optimizer, loss in [(discriminator, self._tell)] * 2 + [(generator, self._fool)] * (batch_idx % 3 == 2):
            optimizer.zero_grad()
            self.manual_backward(loss(real, fake), retain_graph=True)
            optimizer.step()
            self.seen[optimizer is discriminator].append(float(optimizer.param_groups[0]["alpha"]))

    def on_train_start(self):
        self.seen = [[], []]
