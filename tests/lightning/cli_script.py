"""A script with a LightningCLI; the first argument says what it imports, the rest is its command line. Prints the optimizer."""

import importlib
import sys

from torch import nn

for name in sys.argv.pop(1).split(","):
    if name:
        importlib.import_module(name)

package = "pytorch_lightning" if "pytorch_lightning" in sys.modules else "lightning.pytorch"
cli = importlib.import_module(f"{package}.cli")
Base = importlib.import_module(package).LightningModule


class Model(Base):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 1)


if __name__ == "__main__":
    built = cli.LightningCLI(
        Model, run=False, seed_everything_default=0, trainer_defaults={"accelerator": "cpu", "logger": False}
    ).model.configure_optimizers()
    print(type(built).__name__, built.defaults["lr"], built.rule)
