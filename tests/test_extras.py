"""What works without the extras, and what is said where one is missing."""

import subprocess
import sys

import pytest

import elra_hf

WITHOUT = "import sys\nfor name in {!r}: sys.modules[name] = None\n"


def python(without: list[str], code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", WITHOUT.format(without) + code], capture_output=True, text=True, timeout=100)


@pytest.mark.parametrize("home", ["elra_hf", "elra_hf.adapters.configure", "elra_hf.adapters.lightning"])
def test_a_plain_loop_is_configured_without_lightning(home):
    code = f"""
import torch
from {home} import configure_elra
model = torch.nn.Linear(3, 2)
lowering = lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer)
configured = configure_elra(model, "elra_adamw", weight_decay=0.1, scheduler=lowering)
print(type(configured["optimizer"]).__name__, [g["weight_decay"] for g in configured["optimizer"].param_groups])
"""
    done = python(["lightning", "pytorch_lightning", "transformers"], code)
    assert done.stdout == "ElraAdamW [0.1, 0.0]\n", done.stderr


@pytest.mark.parametrize(
    ("module", "code", "extra"),
    [
        ("lightning", "from elra_hf.adapters.lightning import ElraMonitor", "lightning"),
        (
            "huggingface_hub",
            "from elra_hf.cards import write_card\n"
            "names = ('model_name', 'summary', 'task', 'dataset', 'dataset_id', 'command', 'usage')\n"
            "write_card('.', **dict.fromkeys(names, ''), splits={}, metrics={}, settings={})",
            "recipes",
        ),
    ],
)
def test_a_missing_extra_names_its_pip_line(module, code, extra):
    done = python([module], code)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert f"pip install 'elra_hf[{extra}]'" in last


def test_dir_lists_the_public_names():
    done = python([], "import elra_hf; print(*dir(elra_hf)); assert 'torch' not in sys.modules")
    assert set(elra_hf.__all__) <= set(done.stdout.split()), done.stderr
    assert all(hasattr(elra_hf, name) for name in dir(elra_hf))
