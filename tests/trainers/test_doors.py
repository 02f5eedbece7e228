"""The doors of trainers that do not run on a CPU: the part of the package that opens, else what its source does there."""

import ast
import copy
import importlib
import os
import re
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from torch import nn

import elra_hf

ROOT = Path(__file__).parents[2]


def snippet(trainer):
    """The page's Python block for a trainer."""
    page = (ROOT / "docs/other-trainers.md").read_text()
    [block] = re.findall(rf"^```python\n(# needs {trainer}\b.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    return block


def yaml_of(trainer):
    """The first YAML block under the page's title for a trainer."""
    _, section = (ROOT / "docs/other-trainers.md").read_text().split(f"## {trainer}\n")
    return section.split("```yaml\n")[1].split("```")[0]


def python(folder, *command, paths):
    """A Python of its own, which has imported nothing of ours."""
    paths = os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def train(net, optimizer, scheduler=None):
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (net(torch.ones(8, 4)) - 3.0).square().mean()
        loss.backward()
        optimizer.step()
        if scheduler:
            scheduler.step()
        losses.append(loss.item())
    return losses


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))


@pytest.mark.parametrize("name", ["elra_hf.ElraAdamW", "elra_hf.ElraC2Min", "elra_hf.ElraP2Min"])
def test_kohya_and_musubi(name):
    """--optimizer_type is imported by its dots, --optimizer_args go through literal_eval; each part has an lr of its own."""
    arguments = ["weight_decay=0.01", "betas=(0.9, 0.99)", "scope='group'"]
    options = {key: ast.literal_eval(value) for key, value in (pair.split("=") for pair in arguments)}
    *module, cls = name.split(".")
    cls = getattr(importlib.import_module(".".join(module)), cls)
    model = net()
    rates = (5e-5, 1e-4, 1e-3)
    groups = [{"params": list(layer.parameters()), "lr": lr} for layer, lr in zip(model[::2], rates, strict=True)]
    optimizer = cls(groups, lr=1e-4, **options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 60)
    losses = train(model, optimizer, scheduler)
    assert losses[-1] < 0.2 * losses[0]
    # what their displays read
    assert all(float(group["effective_lr"]) > 0 for group in optimizer.param_groups)


def test_llm_foundry():
    """``optimizer: {name: elra_adamw, …}``, by way of entry points."""
    tomllib = pytest.importorskip("tomllib")
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["llmfoundry_optimizers"]
    assert set(declared) == {"elra_c2min", "elra_p2min", "elra_adamw"}
    for name, value in declared.items():
        model = net()
        cls = EntryPoint(name, value, "llmfoundry_optimizers").load()
        losses = train(model, cls(params=[{"params": list(model.parameters())}], lr=1e-4, weight_decay=0.0))
        assert losses[-1] < losses[0]


def test_litgpt_and_lightning_cli():
    """A class path with arguments."""
    declared = {"class_path": "elra_hf.ElraAdamW", "init_args": {"lr": 1e-4, "weight_decay": 0.1}}
    module, cls = declared["class_path"].rsplit(".", 1)
    optimizer = getattr(importlib.import_module(module), cls)(net().parameters(), **declared["init_args"])
    assert isinstance(optimizer, elra_hf.ElraAdamW)


def test_torchtitan():
    """Its own container with the page's subclass: trained, saved under the parameters' names, and gone on from there."""
    pytest.importorskip("torchtitan", reason="torchtitan is not installed: make test-trainers")
    from torchtitan.components.optimizer import ParamGroupConfig

    namespace = {"__name__": "snippet"}
    exec(snippet("torchtitan"), namespace)
    groups = [
        ParamGroupConfig(pattern=f"{name}$", optimizer_name="elra_adamw", optimizer_kwargs={"lr": 1e-4, "weight_decay": decay})
        for name, decay in (("bias", 0.0), ("weight", 0.1))
    ]
    config = namespace["ElraOptimizers"].Config(param_groups=groups)
    model, other = net(), net()
    container, resumed = config.build(model_parts=[model]), config.build(model_parts=[other])
    [optimizer] = container.optimizers
    assert isinstance(optimizer, elra_hf.ElraAdamW)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.1]
    losses = train(model, container)
    assert losses[-1] < 0.2 * losses[0]
    weights, state = copy.deepcopy((model.state_dict(), container.state_dict()))
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    assert train(other, resumed) == train(model, container)


@pytest.mark.parametrize("name", ["elraadamw", "adamw"])
def test_timm(name, tmp_path):
    """Model, factory and schedule are timm's; ours by the name that the page registers, or in the place of its AdamW."""
    folder = Path(sys.prefix) / "timm"
    folder.exists() or pytest.skip("timm is not installed: make test-trainers")
    script = (ROOT / "tests/trainers/images.py").read_text()
    assert "elra" not in script
    if name == "elraadamw":
        registering = snippet("timm").split("model =")[0]
        script = script.replace("torch.manual_seed(0)", f"{registering}\ntorch.manual_seed(0)", 1)
    (tmp_path / "images.py").write_text(script)
    replace = [] if name == "elraadamw" else ["--replace", "AdamW=elra_adamw"]
    done = python(tmp_path, "-m", "elra_hf.run", *replace, "images.py", name, paths=(ROOT, folder))
    kind, *figures = done.stdout.split()
    assert kind == "ElraAdamW"
    decay, scale, first_rate, top, last_rate, first, last = map(float, figures)
    assert (decay, top) == (0.05, 1.0)
    assert scale < 0.1  # of the first layers; top: of the last
    assert first_rate == pytest.approx(scale * last_rate)  # timm's schedule writes lr_scale into lr
    assert last < 0.5 * first


RUN = """
from transformers import Trainer
from tests.transformers.jobs import Rows, bert
trainer = Trainer(bert(), args, train_dataset=Rows())
trainer.train()
print(type(trainer.optimizer.optimizer).__name__, trainer.optimizer.optimizer.scope)
"""


def test_axolotl(tmp_path):
    """Its plug-in manager takes the page's class, its schema the page's YAML; they go where its builder puts them."""
    pytest.importorskip("axolotl", reason="axolotl is not installed: make test-trainers")
    (tmp_path / "elra_plugin.py").write_text(snippet("axolotl"))
    (tmp_path / "config.yaml").write_text(yaml_of("axolotl"))
    code = """
import sys, yaml
from axolotl.integrations.base import PluginManager
from axolotl.utils.schemas.training import HyperparametersConfig
from transformers import TrainingArguments
given = yaml.safe_load(open("config.yaml"))
for name in given["plugins"]:
    PluginManager.get_instance().register(name)
assert list(PluginManager.get_instance().plugins) == given["plugins"]
config = HyperparametersConfig(**given)
pairs = ",".join(f"{key}={value}" for key, value in config.optim_args.items())
args = TrainingArguments("out", optim=config.optimizer, optim_args=pairs, max_steps=3, use_cpu=True, report_to="none")
"""
    done = python(tmp_path, "-c", code + RUN, paths=(ROOT, tmp_path))
    assert done.stdout.splitlines()[-1] == "ElraAdamW group"


def test_ms_swift(tmp_path):
    """A file named on the command line is imported before arguments derived from Hugging Face's are read."""
    (tmp_path / "elra_plugin.py").write_text("import elra_hf\n")
    code = """
import runpy
from transformers import HfArgumentParser, Seq2SeqTrainingArguments
runpy.run_path("elra_plugin.py")
class Arguments(Seq2SeqTrainingArguments):
    pass
given = ["--output_dir=out", "--optim=elra_adamw", "--optim_args=scope=group", "--max_steps=3", "--use_cpu", "--report_to=none"]
[args] = HfArgumentParser(Arguments).parse_args_into_dataclasses(given)
"""
    done = python(tmp_path, "-c", code + RUN, paths=(ROOT, tmp_path))
    assert done.stdout.splitlines()[-1] == "ElraAdamW group"
