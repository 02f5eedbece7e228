"""The nets and the LightningModule that trains them."""

from __future__ import annotations

from typing import Literal

from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix


def conv(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
    """A 3x3 convolution and its norm."""
    return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)]


def cnn(channels: int, classes: int, width: int) -> nn.Sequential:
    """Three times convolution, norm and pooling, then one linear layer; 29,178 parameters for width 16 and grey images."""
    layers: list[nn.Module] = []
    for inputs, outputs in [(channels, width), (width, 2 * width), (2 * width, 4 * width)]:
        layers += [*conv(inputs, outputs), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(4 * width * 9, classes))


class Residual(nn.Module):
    """x + f(x), with f two convolutions; the first may halve the image."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(*conv(inputs, outputs, stride), nn.ReLU(), *conv(outputs, outputs))
        self.skip: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.skip = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(self.body(x) + self.skip(x))


def resnet(channels: int, classes: int, width: int) -> nn.Sequential:
    """Three residual blocks; 77,754 parameters for width 16 and grey images."""
    blocks = [Residual(width, width), Residual(width, 2 * width, 2), Residual(2 * width, 4 * width, 2)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, classes)]
    return nn.Sequential(*conv(channels, width), nn.ReLU(), nn.MaxPool2d(2), *blocks, *head)


NETS = {"cnn": cnn, "resnet": resnet}


class ImageClassifier(LightningModule):
    """Classifies images given as uint8 tensors of shape (batch, channels, height, width).

    Args:
        classes: names of the classes, in the order of the labels.
        channels: of the images: 1 or 3.
        net: "resnet" with three residual blocks, or the plain "cnn".
        width: channels after the first layer.
        schedule: the multiplier of the rate: "linear" falls from 1 to 0 over the training, "constant" stays 1.
    """

    def __init__(
        self,
        classes: list[str],
        channels: int = 1,
        net: Literal["cnn", "resnet"] = "resnet",
        width: int = 16,
        schedule: Literal["linear", "constant"] = "linear",
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.schedule = schedule
        self.net = NETS[net](channels, len(classes), width)
        self.accuracies = nn.ModuleDict({part: MulticlassAccuracy(len(classes), average="micro") for part in ("val_", "test_")})
        self.confusion = MulticlassConfusionMatrix(len(classes))

    def forward(self, images: Tensor) -> Tensor:
        """The scores, shape (batch, classes)."""
        return self.net(images.float() / 127.5 - 1)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = cross_entropy(self(images), labels)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.confusion.update(self._evaluate(batch, "test"), batch[1])

    def on_test_epoch_end(self) -> None:
        """Keep the confusion matrix over all ranks, shape (classes, classes): how many of each were taken for which."""
        self.matrix = self.confusion.compute()
        self.confusion.reset()

    def _evaluate(self, batch: tuple[Tensor, Tensor], part: str) -> Tensor:
        images, labels = batch
        scores = self(images)
        accuracy = self.accuracies[f"{part}_"]  # the underscore, since a ModuleDict must not hold names like "train"
        accuracy.update(scores, labels)
        self.log(f"{part}/loss", cross_entropy(scores, labels), batch_size=len(labels), sync_dist=True)
        self.log(f"{part}/accuracy", accuracy, prog_bar=True, batch_size=len(labels))
        return scores
