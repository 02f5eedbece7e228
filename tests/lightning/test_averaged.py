"""`ElraMonitor(averaged=True)`: what Lightning validates, keeps and ends with is the average of the iterates."""

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging

from elra_hf.adapters.lightning import ElraMonitor

from ..iterates import average
from .modules import STEPS, Classifier, flat, loader, optimizer_of, trainer
from .test_training import Gan


class Watched(Classifier):
    """Keeps the weights after each step and in each validation."""

    def __init__(self, name="elra_adamw", fail=False):
        super().__init__(lambda module: optimizer_of(name, module))
        self.iterates, self.validated, self.fail = [flat(self).clone()], [], fail

    def on_train_batch_end(self, *args):
        super().on_train_batch_end(*args)
        self.iterates.append(flat(self).clone())

    def on_validation_epoch_end(self):
        self.validated.append(flat(self).clone())
        if self.fail and not self.trainer.sanity_checking:
            raise RuntimeError("a validation that fails")

    def on_load_checkpoint(self, checkpoint):
        self.loaded = True


@pytest.mark.parametrize("name", ["elra_adamw", "elra_c2min"])
def test_validations_and_the_end_are_of_the_average(name):
    module, plain = Watched(name), Watched(name)
    run = trainer(callbacks=[ElraMonitor(averaged=True)], max_epochs=2, num_sanity_val_steps=1)
    run.fit(module, loader(), loader())
    trainer(max_epochs=2).fit(plain, loader(), loader())
    assert all(torch.equal(a, b) for a, b in zip(module.iterates, plain.iterates, strict=True))
    for validated, steps in zip(module.validated, (0, STEPS, 2 * STEPS), strict=True):
        torch.testing.assert_close(validated, average(module.iterates[: steps + 1], name).float(), rtol=1e-4, atol=1e-6)
    assert torch.equal(flat(module), module.validated[-1])
    assert not torch.equal(flat(plain), flat(module))


def test_a_checkpoint_holds_both(tmp_path):
    def fit(module, epochs, resume=None, folder=tmp_path / "kept"):
        keep = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        run = trainer(tmp_path, callbacks=[ElraMonitor(averaged=True), keep], max_epochs=epochs, enable_checkpointing=True)
        run.fit(module, loader(), loader(), ckpt_path=resume)
        return run

    whole, resumed = Watched(), Watched()
    fit(whole, 2)
    first = tmp_path / "kept/epoch=0.ckpt"
    run = fit(resumed, 2, first, tmp_path / "again")
    assert torch.equal(resumed.iterates[-1], whole.iterates[-1])
    assert torch.equal(flat(resumed), flat(whole))
    loaded = Watched()
    loaded.load_state_dict(torch.load(first, weights_only=True)["state_dict"])
    assert torch.equal(flat(loaded), whole.validated[0])  # what others load is the average
    run.validate(loaded, loader(), ckpt_path=first, verbose=False)
    assert torch.equal(flat(loaded), whole.validated[0])


def test_a_checkpoint_of_the_end_holds_both(tmp_path):
    """Lightning writes last.ckpt at the very end where none was due before."""

    def fit(module, epochs, resume=None):
        keep = ModelCheckpoint(tmp_path / "kept", every_n_epochs=9, save_last=True)
        run = trainer(tmp_path, callbacks=[ElraMonitor(averaged=True), keep], max_epochs=epochs, enable_checkpointing=True)
        run.fit(module, loader(), loader(), ckpt_path=resume)

    whole, first, resumed = Watched(), Watched(), Watched()
    fit(first, 1)
    last = tmp_path / "kept/last.ckpt"
    loaded = Watched()
    loaded.load_state_dict(torch.load(last, weights_only=True)["state_dict"])
    assert torch.equal(flat(loaded), flat(first))
    fit(resumed, 2, last)
    fit(whole, 2)
    assert torch.equal(resumed.iterates[-1], whole.iterates[-1])
    assert torch.equal(flat(resumed), flat(whole))


def test_a_finished_run_that_is_resumed_ends_with_the_average(tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="end")
    module, again = Watched(), Watched()
    for each, resume in ((module, None), (again, tmp_path / "end.ckpt")):
        run = trainer(tmp_path, callbacks=[ElraMonitor(averaged=True), keep], max_epochs=1, enable_checkpointing=True)
        run.fit(each, loader(), loader(), ckpt_path=resume)
    assert len(again.iterates) == 1
    assert torch.equal(flat(again), flat(module))


def test_a_checkpoint_of_weights_alone_is_of_the_average(tmp_path):
    """Lightning does not ask callbacks for it."""
    module, keep = Watched(), ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_weights_only=True)
    run = trainer(tmp_path, callbacks=[ElraMonitor(averaged=True), keep], max_epochs=2, enable_checkpointing=True)
    run.fit(module, loader(), loader())
    for epoch, validated in enumerate(module.validated):
        loaded = Watched()
        loaded.load_state_dict(torch.load(tmp_path / f"{epoch=}.ckpt", weights_only=True)["state_dict"])
        assert torch.equal(flat(loaded), validated)
    assert "save_checkpoint" not in vars(run.strategy)


def test_weights_that_are_saved_as_a_run_fails_are_of_the_average(tmp_path):
    class Failing(Watched):
        def on_train_batch_end(self, *args):
            super().on_train_batch_end(*args)
            if self.trainer.global_step == 5:
                raise RuntimeError("a step that fails")

    keep = ModelCheckpoint(tmp_path, filename="failed", save_on_exception=True, save_weights_only=True)
    module = Failing()
    run = trainer(tmp_path, callbacks=[ElraMonitor(averaged=True), keep], enable_checkpointing=True)
    with pytest.raises(RuntimeError, match="a step that fails"):
        run.fit(module, loader())
    loaded = Watched()
    loaded.load_state_dict(torch.load(tmp_path / "failed.ckpt", weights_only=True)["state_dict"])
    expected = average(module.iterates, "elra_adamw").float()
    torch.testing.assert_close(flat(loaded), expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(flat(module), module.iterates[-1])


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_checkpoint_that_is_saved_in_a_validation_is_the_same(weights_only, tmp_path):
    class Saving(Watched):
        def on_validation_epoch_end(self):
            super().on_validation_epoch_end()
            self.trainer.save_checkpoint(tmp_path / f"inside{len(self.validated)}.ckpt", weights_only=weights_only)
            assert torch.equal(flat(self), self.validated[-1])

    keep = ModelCheckpoint(tmp_path, filename="outside", save_weights_only=weights_only)
    module, plain = Saving(), Watched()
    run = trainer(tmp_path, callbacks=[ElraMonitor(averaged=True), keep], max_epochs=2, enable_checkpointing=True)
    run.fit(module, loader(), loader())
    trainer(max_epochs=2).fit(plain, loader(), loader())
    assert torch.equal(module.iterates[-1], plain.iterates[-1])
    inside, outside = (
        torch.load(tmp_path / f"{name}.ckpt", weights_only=True, map_location="cpu") for name in ("inside2", "outside")
    )
    assert ("elra_iterate" in inside) != weights_only
    for name in ("state_dict", "elra_iterate"):
        one, other = inside.get(name, {}), outside.get(name, {})
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_a_validation_that_fails_leaves_the_iterate():
    module = Watched(fail=True)
    with pytest.raises(RuntimeError, match="a validation that fails"):
        trainer(callbacks=[ElraMonitor(averaged=True)]).fit(module, loader(), loader())
    assert torch.equal(flat(module), module.iterates[-1])
    assert not torch.equal(flat(module), module.validated[-1])


def test_several_optimizers_are_averaged():
    module = Gan()
    run = trainer(callbacks=[ElraMonitor(averaged=True)])
    run.fit(module, loader())
    for optimizer in run.optimizers:
        assert all(not state["way"].any() for state in optimizer.state.values())


@pytest.mark.parametrize("other", [StochasticWeightAveraging(1e-2), EMAWeightAveraging()], ids=lambda each: type(each).__name__)
def test_another_average_is_refused(other):
    """The model would end as neither: its weights would be moved as if they were the iterate."""
    with pytest.raises(ValueError, match=f"does not go with {type(other).__name__}"):
        trainer(callbacks=[ElraMonitor(averaged=True), other], max_epochs=3).fit(Watched(), loader())


def test_the_papers_rule_is_refused():
    import math

    from elra_hf import ElraC2Min

    module = Classifier(lambda module: ElraC2Min(module.parameters(), horizon=math.inf))
    with pytest.raises(ValueError, match="keeps no average"):
        trainer(callbacks=[ElraMonitor(averaged=True)]).fit(module, loader())


@pytest.mark.parametrize("normed", [True, False])
def test_running_statistics_are_warned_of(normed, recwarn):
    """Nobody averages them."""
    module = Watched()
    if normed:
        module.net[1] = torch.nn.BatchNorm1d(8)
    trainer(callbacks=[ElraMonitor(averaged=True)], max_steps=2).fit(module, loader())
    said = [str(each.message) for each in recwarn if "running statistics of BatchNorm" in str(each.message)]
    assert len(said) == normed
    assert all("update_bn(batches, model)" in each for each in said)
