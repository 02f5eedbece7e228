"""Real Trainer runs with --optim elra_*."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import HfArgumentParser, Trainer, TrainingArguments

from elra_hf import ElraAdamW, ElraC2Min, ElraP2Min, rate
from elra_hf.optimizer import unwrap

from .jobs import Rows, arguments, bert, logs, run

ROOT = Path(__file__).parents[2]
NAMES = {"elra_c2min": ElraC2Min, "elra_p2min": ElraP2Min, "elra_adamw": ElraAdamW}
every = pytest.mark.parametrize("optim", NAMES)


@pytest.fixture(autouse=True)
def own_environment():
    """TrainingArguments of transformers 4 leave bf16 and torch_compile in the environment, and later ones obey it."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)


# ---- the name ----------------------------------------------------------------------------------------------------------------


@every
def test_parser_and_arguments_accept_the_name(optim, tmp_path):
    [args] = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--optim", optim])
    assert args.optim == optim
    assert args.to_dict()["optim"] == optim


def test_an_unknown_name_is_still_refused(tmp_path):
    with pytest.raises(ValueError, match="elra_c3min"):
        TrainingArguments(str(tmp_path), optim="elra_c3min")


@pytest.mark.parametrize(
    "imports",
    [
        "import elra_hf; from transformers import TrainingArguments, Trainer",
        "from transformers import TrainingArguments, Trainer; import elra_hf",
        "import transformers; import elra_hf; from transformers import TrainingArguments, Trainer",
        "from transformers import TrainingArguments; import elra_hf; from transformers import Trainer",
    ],
)
def test_import_order_does_not_matter(imports, tmp_path):
    code = f"""{imports}
args = TrainingArguments({str(tmp_path)!r}, optim="elra_adamw", use_cpu=True)
print(Trainer.get_optimizer_cls_and_kwargs(args)[0].__name__)"""
    done = python(code)
    assert done.stdout.strip() == "ElraAdamW", done.stderr


def test_importing_is_cheap_and_needs_no_transformers():
    code = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("transformers", "lightning", "accelerate"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import elra_hf
assert "torch" not in sys.modules
elra_hf.ElraC2Min
assert "torch" in sys.modules
"""
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_training_args_load_where_elra_hf_is_not_installed(tmp_path):
    run(tmp_path, max_steps=1).save_model(str(tmp_path / "model"))
    code = f"""
import sys
sys.modules["elra_hf"] = None
import torch, transformers
args = torch.load({str(tmp_path / "model" / "training_args.bin")!r}, weights_only=False)
assert args.optim == "elra_c2min" and type(args.optim) is str, repr(args.optim)
"""
    done = python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("optim", ["adamw_torch", "elra_adamw"])
def test_a_trainer_pickles_and_loads_elsewhere(optim, tmp_path):
    """Also one that has nothing to do with us."""
    path = tmp_path / "trainer"
    code = f"""
import pickle
from transformers import Trainer
from {__package__}.jobs import Rows, arguments, bert
trainer = Trainer(bert(), arguments({str(tmp_path)!r}, {optim!r}), train_dataset=Rows())
open({str(path)!r}, "wb").write(pickle.dumps(trainer))"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    code = f"""
import pickle
trainer = pickle.load(open({str(path)!r}, "rb"))
print([type(each).__name__ for each in trainer.callback_handler.callbacks].count("ElraLogs"))"""
    done = python(code)
    assert done.stdout == "1\n", done.stderr


# ---- training ----------------------------------------------------------------------------------------------------------------


@every
def test_trains(optim, tmp_path):
    trainer = run(tmp_path, optim, max_steps=80, learning_rate=1e-3, per_device_train_batch_size=32)
    assert isinstance(unwrap(trainer.optimizer), NAMES[optim])
    losses = [loss for _, loss in logs(trainer, "loss")]
    assert sum(losses[-8:]) < 0.5 * sum(losses[:8])


@every
def test_logs_show_the_applied_rate(optim, tmp_path, capsys):
    """In trainer_state.json, in the TensorBoard file and on the console; under warm-up and decay."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    applied = []
    trainer_step = NAMES[optim].step

    def step(self, *args, **kwargs):
        result = trainer_step(self, *args, **kwargs)
        applied.append((rate(self), self.param_groups[0]["alpha"].item()))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NAMES[optim], "step", step)
        trainer = run(tmp_path, optim, report_to="tensorboard", learning_rate=1e-3, warmup_steps=3, save_strategy="steps")
    trainer.save_state()
    logged = logs(trainer, "learning_rate", "elra_alpha", "elra_cos", "elra_restarts")
    assert [(r, a) for _, r, a, _, _ in logged][1:] == [pytest.approx(pair) for pair in applied[1:]]
    [written] = tmp_path.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(written)).Reload()
    for tag, column in (("learning_rate", 1), ("elra_alpha", 2), ("elra_cos", 3), ("elra_restarts", 4)):
        values = [event.value for event in events.Scalars(f"train/{tag}")]
        assert values == pytest.approx([row[column] for row in logged])
    assert "elra_alpha" in capsys.readouterr().out


def test_a_groups_own_keys_are_not_taken_for_ours(tmp_path):
    """A trainer of others names its groups as it likes; the logs show the rate all the same."""

    class Naming(Trainer):
        def create_optimizer(self, *_):
            keys = {"alpha": "encoder", "cos": None, "restarts": 16.0}
            self.optimizer = ElraAdamW([{"params": self.model.parameters(), **keys}])
            return self.optimizer

    trainer = Naming(bert(), arguments(tmp_path, "elra_adamw", max_steps=3), train_dataset=Rows())
    trainer.train()
    group = unwrap(trainer.optimizer).param_groups[0]
    _, alpha, cos, restarts = logs(trainer, "elra_alpha", "elra_cos", "elra_restarts")[-1]
    assert [alpha, cos, restarts] == [group["elra_alpha"], group["elra_cos"], 0.0]
    assert group["alpha"] == "encoder"


def test_a_log_that_a_subclass_does_not_keep_is_shown_all_the_same(tmp_path):
    """It calls the callbacks itself; the history has no such entry, or another's."""
    seen = []

    class Mine(Trainer):
        def log(self, entry, *args):
            self.callback_handler.on_log(self.args, self.state, self.control, entry)
            seen.append(entry)

    trainer = Mine(bert(), arguments(tmp_path, max_steps=3), train_dataset=Rows())
    trainer.state.log_history.append({"kept": 1})
    trainer.train()
    assert [("elra_alpha" in entry, "loss" in entry) for entry in seen] == 3 * [(True, True)] + [(False, False)]
    assert all("elra_alpha" not in entry for entry in trainer.state.log_history)


def test_other_optimizers_logs_are_left_alone(tmp_path):
    trainer = run(tmp_path, "adamw_torch", max_steps=3)
    assert all("elra_alpha" not in entry for entry in trainer.state.log_history)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "constant_with_warmup", "inverse_sqrt"])
def test_schedulers_multiply(kind, tmp_path):
    """What is applied is α times the schedule's shape, of whatever kind."""
    trainer = run(tmp_path, lr_scheduler_type=kind, learning_rate=1e-3, max_steps=6)
    reference = run(tmp_path, "sgd", lr_scheduler_type=kind, learning_rate=1.0, max_steps=6)
    shape = [lr for _, lr in logs(reference, "learning_rate")]
    for (_, applied, alpha), multiplier in zip(logs(trainer, "learning_rate", "elra_alpha"), shape, strict=True):
        assert applied == pytest.approx(alpha * multiplier, rel=1e-5)


@every
@pytest.mark.parametrize(
    "options",
    [
        {"max_grad_norm": 0.0},
        {"gradient_accumulation_steps": 3},
        {"bf16": True},
        {"weight_decay": 0.1},
        {"torch_compile": True, "torch_compile_backend": "aot_eager", "max_steps": 4},
        {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4, "load_best_model_at_end": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_trainer_options(optim, options, tmp_path):
    trainer = run(tmp_path, optim, learning_rate=1e-3, **options)
    alphas = [alpha for _, alpha in logs(trainer, "elra_alpha")]
    assert len(set(alphas)) > 1
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


@every
def test_lora(optim, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(bert(), LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"]))
    still = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    trainer = run(tmp_path, optim, model, learning_rate=1e-3)
    assert len({alpha for _, alpha in logs(trainer, "elra_alpha")}) > 1
    for name, p in trainer.model.named_parameters():
        if name in still:
            assert torch.equal(p, still[name])


@every
def test_killed_and_resumed_equals_not_stopping(optim, tmp_path):
    """Digit for digit: losses, applied rates, α, cosine. The first process is killed at step 9, saves every 4."""
    keys = ("loss", "learning_rate", "elra_alpha", "elra_cos", "elra_restarts")
    whole = logs(run(tmp_path / "whole", optim), *keys)
    command = [sys.executable, "-m", "tests.transformers.jobs", str(tmp_path / "cut"), optim]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120)
    assert killed.returncode == -9, killed.stderr.decode()
    # another learning rate changes nothing: α_0 is in the checkpoint
    resumed = run(tmp_path / "cut", optim, resume=str(tmp_path / "cut" / "checkpoint-8"), learning_rate=0.3)
    assert logs(resumed, *keys)[8:] == whole[8:]


# ---- options -----------------------------------------------------------------------------------------------------------------


def built(folder, optim, optim_args, **options):
    trainer = Trainer(bert(), arguments(folder, optim, optim_args=optim_args, **options))
    return trainer.create_optimizer()


def test_optim_args_reach_the_constructor_in_its_types(tmp_path):
    optimizer = built(tmp_path, "elra_c2min", "gain=(0.5,0.6),betas=(0.9, 0.7),scope=tensor,check_sync=true,bounds=(1e-7,10)")
    assert optimizer.rule.gain == (0.5, 0.6)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.7)
    assert optimizer.check_sync is True
    assert (optimizer.scope, optimizer.bounds) == ("tensor", (1e-7, 10.0))


def test_optim_args_of_a_configuration_file(tmp_path):
    config = tmp_path / "train.yaml"
    config.write_text(
        f"output_dir: {tmp_path}\noptim: elra_adamw\nuse_cpu: true\noptim_args: {{scope: group, betas: [0.9, 0.99]}}"
    )
    (args,) = HfArgumentParser(TrainingArguments).parse_yaml_file(str(config))
    optimizer = Trainer(bert(), args).create_optimizer()
    assert (optimizer.scope, optimizer.param_groups[0]["betas"]) == ("group", (0.9, 0.99))


@pytest.mark.parametrize("text", ["horizon=inf", "horizon = INF", "horizon=math.inf"])
def test_the_papers_own_rule_is_reached_from_the_command_line(text, tmp_path):
    argv = [
        "--output_dir",
        str(tmp_path),
        "--optim",
        "elra_c2min",
        "--optim_args",
        text,
        "--max_steps",
        "3",
        "--use_cpu",
        "True",
    ]
    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses([*argv, "--report_to", "none"])
    trainer = Trainer(bert(), args, train_dataset=Rows())
    trainer.train()
    assert unwrap(trainer.optimizer).rule.horizon == math.inf


def test_the_trainers_own_options_reach_it_too(tmp_path):
    optimizer = built(tmp_path, "elra_adamw", None, learning_rate=3e-4, weight_decay=0.1, adam_beta2=0.95, adam_epsilon=1e-6)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["betas"], group["eps"]) == (3e-4, 0.1, (0.9, 0.95), 1e-6)
    assert built(tmp_path, "elra_adamw", "betas=(0.8,0.9)").param_groups[0]["betas"] == (0.8, 0.9)


@pytest.mark.parametrize(
    ("optim", "text", "message"),
    [
        ("elra_c2min", "gian=0.3", r"unknown key 'gian'.*did you mean 'gain'.*valid keys are betas, gain, horizon, scope"),
        ("elra_c2min", "growth_limit=3", r"unknown key 'growth_limit' .*ElraC2Min.*valid keys"),
        ("elra_c2min", "gain", r"'gain' has no value"),
        ("elra_c2min", "gain=much", r"gain=much.*wrong type.*a number or \(a number, a number\)"),
        ("elra_c2min", "scope=layer", r"scope=layer.*global or group or tensor"),
        ("elra_c2min", "betas=(1,2,3)", r"betas=\(1,2,3\).*\(a number, a number\)"),
        ("elra_c2min", "check_sync=3", r"check_sync=3.*true or false"),
        ("elra_c2min", "lr=3", r"'lr=3'.*--learning_rate"),
        ("elra_c2min", "weight_decay=0.1", r"--weight_decay"),
        ("elra_c2min", "gain=1.5", r"gain=1.5"),
        ("elra_p2min", "growth_limit=0.5", r"growth_limit=0.5.*above 1"),
        ("elra_adamw", "eps=-3.0", r"eps=-3.0"),
    ],
)
def test_bad_optim_args_stop_the_run(optim, text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        built(tmp_path, optim, text)


def test_all_groups_of_the_trainer_share_one_rate(tmp_path):
    trainer = run(tmp_path, weight_decay=0.1)
    first, second = unwrap(trainer.optimizer).param_groups
    assert first["weight_decay"] != second["weight_decay"]
    assert first["alpha"] == second["alpha"]
