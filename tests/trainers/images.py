"""A script in the manner of timm's train.py, which knows nothing of us. Argument: the optimizer's name, as in its --opt."""

import re
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

# torchvision from PyPI is built for CUDA. Its compiled operators, which timm's models do not call, need at least a name here
known = Path(find_spec("torchvision").origin).with_name("_meta_registrations.py").read_text()
operators = torch.library.Library("torchvision", "DEF")
for names in set(re.findall(r'register_meta\("(\w+)"|torchvision::(\w+)"', known)):
    operators.define(f"{''.join(names)}(Tensor x) -> Tensor")

import timm  # noqa: E402
from timm.optim import create_optimizer_v2  # noqa: E402
from timm.scheduler import CosineLRScheduler  # noqa: E402

torch.manual_seed(0)
model = timm.create_model("test_vit", num_classes=2, img_size=32)
optimizer = create_optimizer_v2(model, sys.argv[1], lr=1e-3, weight_decay=0.05, layer_decay=0.5)
scheduler = CosineLRScheduler(optimizer, t_initial=60, t_in_epochs=False)
losses = []
for step in range(50):  # the schedule has not come down to 0
    labels = torch.randint(2, (16,))
    images = torch.randn(16, 3, 32, 32) + labels[:, None, None, None]
    optimizer.zero_grad()
    loss = torch.nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    scheduler.step_update(step + 1)
    losses.append(loss.item())
groups = optimizer.param_groups
figures = [max(group["weight_decay"] for group in groups)]
for group in (groups[0], groups[-1]):
    figures += [group["lr_scale"], float(group["effective_lr"])]
print(type(optimizer).__name__, *figures, losses[0], sum(losses[-9:]) / 9)
