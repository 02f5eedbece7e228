"""`AveragedWeights`: what the Trainer evaluates, keeps and ends with is the average of the iterates."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

from elra_hf import averaged
from elra_hf.adapters.transformers import AveragedWeights

from ..iterates import average
from .jobs import Rows, arguments, bert, logs, run

EVALUATING = {"eval_strategy": "steps", "eval_steps": 3, "learning_rate": 1e-3}
CONSTANT = {"lr_scheduler_type": "constant"}


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Watching(Trainer):
    """Keeps the weights after each step and at each evaluation, and with which the loss was measured."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.iterates, self.evaluated = [weights(self.model)], {}

    def training_step(self, *args, **options):
        loss = super().training_step(*args, **options)
        if self.state.global_step:
            self.iterates.append(weights(self.model))
        return loss

    def evaluation_loop(self, *args, **options):
        self.evaluated[self.state.global_step] = weights(self.model)
        return super().evaluation_loop(*args, **options)


def watched(folder, optim="elra_adamw", resume=None, **options):
    args = arguments(folder, optim, **{**EVALUATING, **CONSTANT, **options})
    trainer = Watching(bert(), args, train_dataset=Rows(), eval_dataset=Rows(16), callbacks=[AveragedWeights()])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("optim", ["elra_adamw", "elra_c2min"])
def test_evaluations_and_the_end_are_of_the_average(optim, tmp_path):
    trainer = watched(tmp_path, optim, max_steps=12)
    plain = run(tmp_path / "plain", optim, **EVALUATING, **CONSTANT, max_steps=12)
    assert logs(trainer, "loss", "elra_alpha") == logs(plain, "loss", "elra_alpha")  # training is none the wiser
    assert list(trainer.evaluated) == [3, 6, 9, 12]
    for step in (3, 6, 9):
        for name, value in trainer.evaluated[step].items():
            mean = average([each[name] for each in trainer.iterates[: step + 1]], optim)
            torch.testing.assert_close(value.double(), mean, rtol=1e-5, atol=1e-6)
    assert equal(weights(trainer.model), trainer.evaluated[12])
    assert not equal(weights(trainer.model), weights(plain.model))
    assert trainer.evaluate()["eval_loss"] == trainer.state.log_history[-3]["eval_loss"]
    trainer.save_model(str(tmp_path / "saved"))
    assert equal(load_file(tmp_path / "saved" / "model.safetensors"), weights(trainer.model))


def test_a_resumed_run_is_the_run_that_was_not_stopped(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 6}
    whole = watched(tmp_path, **saving)
    resumed = watched(tmp_path / "again", resume=str(tmp_path / "checkpoint-6"), **saving)
    assert logs(resumed, "loss", "elra_alpha")[6:] == logs(whole, "loss", "elra_alpha")[6:]
    assert equal(weights(resumed.model), weights(whole.model))


def test_the_best_checkpoints_average_is_the_model(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    trainer = watched(tmp_path, **options, greater_is_better=True)  # the worst, which is not the last
    best = int(trainer.state.best_model_checkpoint.rsplit("-", 1)[1])
    assert best != 12
    for name, value in weights(trainer.model).items():
        torch.testing.assert_close(value, trainer.evaluated[best][name], rtol=0, atol=0)
    [at_best] = [e["eval_loss"] for e in trainer.state.log_history if e["step"] == best and "eval_loss" in e]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(at_best, rel=1e-6)


class Failing(Watching):
    def evaluation_loop(self, *args, **options):
        raise KeyboardInterrupt


def test_an_evaluation_that_fails_leaves_the_iterate(tmp_path):
    plain = run(tmp_path / "plain", "elra_adamw", max_steps=3, learning_rate=1e-3, **CONSTANT)
    args = arguments(tmp_path, "elra_adamw", **EVALUATING, **CONSTANT)
    trainer = Failing(bert(), args, train_dataset=Rows(), eval_dataset=Rows(16), callbacks=[AveragedWeights()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert equal(weights(trainer.model), weights(plain.model))


@pytest.mark.parametrize(
    ("optim", "options", "message"),
    [
        ("adamw_torch", {}, "AdamW keeps no average: train with optim=elra_adamw"),
        ("elra_c2min", {"optim_args": "horizon=inf"}, "keeps no average of the iterates"),
        (
            "elra_adamw",
            {"save_strategy": "steps", "save_steps": 3, "load_best_model_at_end": True, "save_only_model": True},
            "load_best_model_at_end does not go with save_only_model",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_at_the_start(optim, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        watched(tmp_path, optim, **options)


def test_without_the_callback_evaluations_are_of_the_iterate(tmp_path):
    trainer = run(tmp_path, "elra_adamw", **EVALUATING, **CONSTANT)
    last = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry][-1]
    assert trainer.evaluate()["eval_loss"] == last
    with averaged(trainer.optimizer):
        assert trainer.evaluate()["eval_loss"] != last


def test_adapters_alone_are_averaged(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(bert(), LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"]))
    args = arguments(tmp_path, "elra_adamw", **EVALUATING)
    trainer = Watching(model, args, train_dataset=Rows(), eval_dataset=Rows(16), callbacks=[AveragedWeights()])
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 2
    name = next(name for name in saved if "lora_B" in name)
    own = weights(model)[name.replace(".weight", ".default.weight")]
    assert torch.equal(saved[name], own)
    assert torch.equal(own, trainer.evaluated[12][name.replace(".weight", ".default.weight")])


def test_running_statistics_are_warned_of(tmp_path):
    """Nobody averages them."""
    from .test_found import Remembering

    with pytest.warns(UserWarning, match=r"AveragedWeights: the running statistics of BatchNorm.*update_bn\(batches, model\)"):
        run(tmp_path, "elra_adamw", Remembering(), callbacks=[AveragedWeights()], max_steps=2)
