"""LightningCLI: optimizers by short name and by class path, their help, and configurations in YAML."""

import sys

import pytest
from lightning.pytorch.cli import LightningCLI

import elra_hf  # noqa: F401
from tests.core.problems import VARIANTS
from tests.distributed.harness import run

from .modules import Classifier, loader, optimizer_of

SCRIPT = (sys.executable, "-m", "tests.lightning.cli_script")


@pytest.mark.parametrize(
    ("imports", "name"),
    [
        ("elra_hf", "ElraC2Min"),
        ("pytorch_lightning.cli,elra_hf", "ElraC2Min"),
        ("", "elra_hf.ElraC2Min"),
    ],
    ids=["elra_hf first", "the other package, first", "class path without import"],
)
def test_a_process_finds_the_optimizer(imports, name):
    (said,) = run([[*SCRIPT, imports, f"--optimizer={name}", "--optimizer.gain=0.4"]], timeout=100)
    assert said.splitlines()[-1] == "ElraC2Min 1e-05 C2Min(gain=0.4, horizon=20.0)"


class Model(Classifier):
    def __init__(self) -> None:
        super().__init__(lambda module: optimizer_of("elra_c2min", module))

    def train_dataloader(self):
        return loader()


def cli(*argv, monkeypatch, **options):
    quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_steps": 3}
    monkeypatch.setattr(sys, "argv", ["script", *argv])
    return LightningCLI(Model, seed_everything_default=0, trainer_defaults=quiet, save_config_callback=None, **options)


@pytest.mark.parametrize("cls", VARIANTS.values())
def test_fit_by_short_name(cls, monkeypatch):
    done = cli("fit", f"--optimizer={cls.__name__}", "--optimizer.lr=0.01", "--optimizer.scope=tensor", monkeypatch=monkeypatch)
    (optimizer,) = done.trainer.optimizers
    assert type(optimizer) is cls
    assert (optimizer.scope, optimizer.defaults["lr"]) == ("tensor", 0.01)
    assert optimizer.param_groups[0]["alpha"] != 0.01


@pytest.mark.parametrize("cls", VARIANTS.values())
def test_help_explains_every_argument(cls, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli("fit", "--optimizer.help", cls.__name__, monkeypatch=monkeypatch)
    assert stopped.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "α_0 > 0" in shown
    assert "decoupled weight decay, >= 0. (type: float, default: 0.0)" in shown
    assert '"global" (one rate), "group" or "tensor"' in shown
    assert "default: 1e-05" in shown


@pytest.mark.parametrize("cls", VARIANTS.values())
def test_configuration_makes_the_round_trip(cls, monkeypatch, capsys, tmp_path):
    given = (f"--optimizer={cls.__name__}", "--optimizer.betas=[0.5,0.4]", "--optimizer.bounds=[1e-7,1e3]")
    with pytest.raises(SystemExit):
        cli("fit", *given, "--print_config", monkeypatch=monkeypatch)
    config = tmp_path / "config.yaml"
    config.write_text(printed := capsys.readouterr().out)
    with pytest.raises(SystemExit):
        cli("fit", f"--config={config}", "--print_config", monkeypatch=monkeypatch)
    assert capsys.readouterr().out == printed
    (optimizer,) = cli("fit", f"--config={config}", monkeypatch=monkeypatch).trainer.optimizers
    assert type(optimizer) is cls
    assert optimizer.bounds == (1e-7, 1e3)
    assert tuple(optimizer.direction.betas) == (0.5, 0.4)


def test_pair_of_gains(monkeypatch):
    done = cli("fit", "--optimizer=ElraC2Min", "--optimizer.gain=[0.1,0.2]", monkeypatch=monkeypatch)
    assert tuple(done.trainer.optimizers[0].rule.gain) == (0.1, 0.2)


def test_unknown_option_is_named(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli("fit", "--optimizer=ElraC2Min", "--optimizer.gian=0.4", monkeypatch=monkeypatch)
    assert stopped.value.code == 2
    assert "'gian' is not accepted" in capsys.readouterr().err
