"""What the Trainer does around training: other batch sizes, several trials, the best checkpoint. Each is the plain run."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback

from .jobs import Rows, arguments, bert, logs, run

KEYS = ("loss", "learning_rate", "elra_alpha", "elra_cos", "elra_restarts")
every = pytest.mark.parametrize("optim", ["elra_c2min", "elra_p2min", "elra_adamw"])


def steady():
    """A model without dropout: to evaluate, or to begin anew, takes from the random numbers."""
    model = bert()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_prob"):  # of attention, in transformers 4
            module.dropout_prob = 0.0
    return model


class Crowded:
    """Has memory for 5 rows, as soon as it has seen ``fits`` batches."""

    def __init__(self, fits: int) -> None:
        self.fits, self.seen = fits, 0

    def __call__(self, module, args, kwargs):
        self.seen += 1
        if self.seen > self.fits and len(kwargs["input_ids"]) > 5:
            raise RuntimeError("CUDA out of memory.")


@every
def test_auto_find_batch_size(optim, tmp_path):
    model = steady()
    model.register_forward_pre_hook(Crowded(0), with_kwargs=True)
    found = run(tmp_path / "found", optim, model, auto_find_batch_size=True)
    size = found.state.train_batch_size
    assert 0 < size <= 5
    plain = run(tmp_path / "plain", optim, steady(), per_device_train_batch_size=size)
    assert logs(found, *KEYS) == logs(plain, *KEYS)


@every
def test_auto_find_batch_size_in_mid_run(optim, tmp_path):
    """Memory runs out when something has been learned: the Trainer begins anew with what it has."""
    model = steady()
    model.register_forward_pre_hook(Crowded(4), with_kwargs=True)
    trainer = run(tmp_path, optim, model, auto_find_batch_size=True)
    assert trainer.state.global_step == 12
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


@every
def test_hyperparameter_search(optim, tmp_path):
    """Each trial is a run of its own: nothing of an optimizer or its rate goes from one to the next."""
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    tried = []

    class Note(TrainerCallback):
        def on_train_end(self, args, state, control, **_):
            tried.append((args.learning_rate, args.max_steps, [*state.log_history]))

    def trainer(folder, **options):
        made = arguments(tmp_path / folder, optim, **options)
        return Trainer(None, made, train_dataset=Rows(), eval_dataset=Rows(16), model_init=steady, callbacks=[Note()])

    def space(trial):
        return {
            "learning_rate": trial.suggest_float("learning_rate", 1e-6, 1e-2, log=True),
            "max_steps": trial.suggest_categorical("max_steps", [6, 9]),
        }

    best = trainer("search").hyperparameter_search(hp_space=space, n_trials=3, direction="minimize", backend="optuna")
    assert best.hyperparameters["learning_rate"] in [lr for lr, *_ in tried]
    assert len(tried) == 3
    for lr, steps, log in tried[:3]:
        plain = trainer("plain", learning_rate=lr, max_steps=steps)
        plain.train()
        found = [tuple(entry[key] for key in ("step", *KEYS)) for entry in log if "loss" in entry]
        assert found == logs(plain, *KEYS)
        assert len(found) == steps


class Worst(TrainerCallback):
    """The first evaluation is the best one."""

    def on_evaluate(self, args, state, control, metrics, **_):
        metrics["eval_loss"] = float(state.global_step)


@every
def test_load_best_model_at_end(optim, tmp_path):
    """The weights of the best checkpoint, which is not the last; and to have looked changes nothing before."""
    options = {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4}
    trainer = run(tmp_path / "best", optim, steady(), callbacks=[Worst()], load_best_model_at_end=True, **options)
    assert logs(trainer, *KEYS) == logs(run(tmp_path / "plain", optim, steady()), *KEYS)
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    best = load_file(tmp_path / "best" / "checkpoint-4" / "model.safetensors")
    last = load_file(tmp_path / "best" / "checkpoint-12" / "model.safetensors")
    weights = trainer.model.state_dict()
    assert all(torch.equal(weights[name], best[name]) for name in best)
    assert any(not torch.equal(best[name], last[name]) for name in best)
