"""The recipe, run as a user runs it: what it writes, and what it says to wrong input."""

import json
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from recipes.cli import run
from recipes.sweep import read
from recipes.text_classification.train import main
from tests.recipes.conftest import run_recipe, sentences, write_csv

SMALL = ("--per_device_train_batch_size", "8", "--freeze_layers", "1", "--logging_steps", "1")


@pytest.fixture(scope="module")
def finished(tiny_model: str, rows_csv: str, tmp_path_factory: pytest.TempPathFactory):
    """One run with a comparison: its output folder and what it printed."""
    folder = tmp_path_factory.mktemp("out")
    done = run_recipe(
        *("--model_name_or_path", tiny_model, "--train_file", rows_csv, "--output_dir", str(folder), *SMALL),
        *("--num_train_epochs", "2", "--compare", "adamw_torch"),
    )
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_picture_metrics_and_loadable_model_are_written(finished):
    folder, _ = finished
    assert (folder / "rate.png").read_bytes().startswith(b"\x89PNG")
    metrics = json.loads((folder / "all_results.json").read_text())
    assert {"eval_accuracy", "test_accuracy", "test_macro_f1", "train_loss"} <= set(metrics)
    from transformers import pipeline

    text, _ = sentences(1)[0]
    assert pipeline("text-classification", model=str(folder))(text)[0]["label"] in {"number", "place", "person"}


def test_card_has_metadata_command_and_picture(finished):
    folder, _ = finished
    card = ModelCard.load(folder / "README.md")
    metrics = json.loads((folder / "all_results.json").read_text())
    (accuracy,) = [result for result in card.data.eval_results if result.metric_type == "accuracy"]
    assert accuracy.metric_value == pytest.approx(metrics["test_accuracy"], abs=1e-4)
    assert accuracy.dataset_split == "test"
    assert "-m recipes.text_classification.train --model_name_or_path" in card.text
    assert "(rate.png)" in card.text
    assert "| train | 42 |" in card.text


def test_snippet_of_the_card_runs(finished):
    folder, _ = finished
    snippet = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(snippet, {})


def test_each_epoch_is_evaluated_and_each_step_logged_to_tensorboard(finished):
    folder, _ = finished
    logged = {}
    for file in sorted(Path(folder / "runs").rglob("events*")):
        events = EventAccumulator(str(file)).Reload()
        for tag in events.Tags()["scalars"]:
            logged.setdefault(tag, []).extend(event.value for event in events.Scalars(tag))
    assert len(logged["train/loss"]) == len(logged["train/learning_rate"]) == 12  # 42 rows by 8, twice
    assert len(logged["eval/accuracy"]) >= 2
    assert len(set(logged["train/elra_alpha"])) > 5  # half of the steps, since the rate leaves a decay alone


def test_comparison_trains_both_and_prints_one_table(finished):
    folder, out = finished
    table = out[out.index("measured on the test data") :].splitlines()
    mine, theirs = ([line.split() for line in table if line.split()[:1] == [name]] for name in ("elra_adamw", "adamw_torch"))
    assert len(mine) == len(theirs) == 1
    assert len(mine[0]) == len(theirs[0]) == 8
    assert str(folder / "README.md") in out.replace("\n", "")
    other = folder / "compare_adamw_torch"
    assert (other / "README.md").is_file()
    mine, theirs = (json.loads((f / "trainer_state.json").read_text())["log_history"] for f in (folder, other))
    assert mine[0]["loss"] == pytest.approx(theirs[0]["loss"], abs=1e-4)  # the same start and the same first batch
    assert not any("elra_alpha" in entry for entry in theirs)


def test_options_come_from_a_yaml_file_and_the_command_line_wins(tiny_model: str, rows_csv: str, tmp_path: Path):
    config = tmp_path / "mine.yaml"
    config.write_text(
        f"model_name_or_path: {tiny_model}\ntrain_file: {rows_csv}\noutput_dir: {tmp_path}/no\n"
        "learning_rate: 1e-4\nmax_steps: 3\nfreeze_layers: 0\nlr_scheduler_type: constant\n"
    )
    run(main, [str(config), "--output_dir", str(tmp_path / "yes"), "--max_steps", "2", "--disable_tqdm", "true"])
    state = json.loads((tmp_path / "yes/trainer_state.json").read_text())
    assert state["global_step"] == 2
    assert "| `learning_rate` | 0.0001 (only what the schedule refers to) |" in (tmp_path / "yes/README.md").read_text()
    assert not (tmp_path / "no").exists()
    papers = ["--optim", "elra_c2min", "--optim_args", "horizon=inf", "--max_steps", "1", "--disable_tqdm", "true"]
    run(main, [str(config), "--output_dir", str(tmp_path / "papers"), *papers])
    assert "| `learning_rate` | 0.0001 (the first rate) |" in (tmp_path / "papers/README.md").read_text()


def test_given_splits_are_used_as_they_are(tiny_model: str, tmp_path: Path):
    rows = sentences(60)
    files = {"train": rows[:40], "validation": rows[40:50]}
    options = [part for name, some in files.items() for part in (f"--{name}_file", write_csv(tmp_path / f"{name}.csv", some))]
    run(main, [*options, "--model_name_or_path", tiny_model, "--output_dir", str(tmp_path / "out"), "--max_steps", "1", *SMALL])
    card = (tmp_path / "out/README.md").read_text()
    assert "| train | 40 |\n| validation | 10 |" in card
    assert "accuracy (validation)" in card


def test_what_a_resumed_run_is_compared_with_begins_anew(tiny_model: str, rows_csv: str, tmp_path: Path):
    """The checkpoint is one of another optimizer."""
    given = ["--model_name_or_path", tiny_model, "--train_file", rows_csv, "--output_dir", str(tmp_path), *SMALL]
    given += ["--max_steps", "4", "--save_strategy", "steps", "--save_steps", "2", "--disable_tqdm", "true"]
    run(main, given)
    resumed = ["--resume_from_checkpoint", str(tmp_path / "checkpoint-2"), "--compare", "adamw_torch"]
    run(main, [*given, *resumed])
    assert [row["optimizer"] for row in read(tmp_path / "results.csv")] == ["elra_adamw", "adamw_torch"]


def test_two_processes_write_one_card(tiny_model: str, rows_csv: str, tmp_path: Path):
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m")
    given = ("--model_name_or_path", tiny_model, "--train_file", rows_csv, "--output_dir", str(tmp_path))
    done = run_recipe(*given, "--max_steps", "2", *SMALL, launcher=launcher)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("card ") == 1
    assert "| rows a step | 16 |" in (tmp_path / "README.md").read_text()


WRONG = {
    "missing file": (["--train_file", "nowhere.csv"], "nowhere.csv: no such file"),
    "missing config": (["nowhere.yaml"], "nowhere.yaml: no such file"),
    "ending": (["--train_file", "{tmp}/rows.txt"], "rows.txt: its name must end in .csv"),
    "empty file": (["--train_file", "{tmp}/empty.csv"], "empty.csv is empty"),
    "no rows": (["--train_file", "{tmp}/header.csv"], "header.csv has no rows"),
    "too few rows": (["--train_file", "{tmp}/one.csv"], "give --validation_file"),
    "empty cell": (["--train_file", "{tmp}/hole.csv"], "1 of 3 rows have nothing in column text"),
    "unknown label": (["--train_file", "{rows}", "--validation_file", "{tmp}/one.csv"], "that the training data lack: x"),
    "fractional label": (["--train_file", "{tmp}/score.csv"], "it does not do regression"),
    "one class": (["--train_file", "{tmp}/same.csv"], "column label has one class only"),
    "lists as labels": (["--train_file", "{tmp}/lists.jsonl"], "give one string or whole number a row"),
    "labels as texts": (["--train_file", "{rows}", "--text_column_name", "label"], "that is the column of the labels"),
    "no label column": (["--train_file", "{rows}", "--label_column_name", "lable"], "did you mean label?"),
    "no text column": (["--train_file", "{rows}", "--text_column_name", "txt"], "did you mean text?"),
    "which text column": (["--train_file", "{tmp}/wide.csv"], "--text_column_name is needed"),
    "only validation": (["--validation_file", "{rows}"], "--validation_file needs --train_file"),
    "both sources": (["--train_file", "{rows}", "--dataset_name", "questions"], "exclude each other"),
    "no hub": (["--dataset_name", "some/data"], "--dataset_name some/data cannot be loaded"),
    "no model folder": (["--train_file", "{rows}", "--model_name_or_path", "/nowhere"], "/nowhere: no such folder"),
    "no model": (["--train_file", "{rows}", "--model_name_or_path", "some/model"], "--model_name_or_path some/model"),
    "too many layers": (["--train_file", "{rows}", "--freeze_layers", "3"], "--freeze_layers 3: the model has 2 layers"),
    "option": (["--learning_rat", "1"], "unknown option --learning_rat; did you mean --learning_rate?"),
    "number": (["--num_train_epochs", "many"], "invalid float value: 'many'"),
    "optimizer": (["--optim", "elra_c2mni"], "did you mean elra_c2min?"),
    "compared optimizer": (["--compare", "adamw_trch"], "did you mean adamw_torch?"),
    "schedule": (["--lr_scheduler_type", "lineer"], "did you mean linear?"),
    "no logs": (["--logging_strategy", "no"], "there would be no rate to draw"),
    "optimizer's option": (["--optim", "elra_c2min", "--optim_args", "gian=0.4"], "gain"),
    "optimizer's value": (["--optim_args", "gain=7"], "gain"),
    "optimizer's rate": (["--learning_rate", "0"], "--optim elra_adamw: lr=0.0 is invalid"),
    "batch size": (["--per_device_train_batch_size", "0"], "--per_device_train_batch_size 0: give a number above 0"),
    "accumulation": (["--gradient_accumulation_steps", "0"], "--gradient_accumulation_steps 0: give a number above 0"),
    "no epochs": (["--num_train_epochs", "0"], "--num_train_epochs 0.0: give a number above 0"),
    "seed": (["--seed", "-1"], "--seed -1: give a whole number from 0 to 4294967295"),
    "seed of the cut": (["--split_seed", "-1"], "--split_seed -1: give a whole number from 0 to 4294967295"),
    "no room": (["--max_seq_length", "2"], "--max_seq_length 2: give 3 or more"),
    "optimizer's decay": (["--weight_decay", "-1"], "weight_decay=-1.0 is invalid"),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG)
def test_wrong_input_ends_with_one_line_and_status_2(options, message, tiny_model, rows_csv, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty.csv").touch()
    (tmp_path / "rows.txt").touch()
    write_csv(tmp_path / "header.csv", [])
    write_csv(tmp_path / "one.csv", [("just one", "x")])
    write_csv(tmp_path / "hole.csv", [("one", "x"), ("", "y"), ("two", "y")])
    write_csv(tmp_path / "score.csv", [("one", "0.5"), ("two", "1.5")])
    write_csv(tmp_path / "same.csv", [(text, "x") for text, _ in sentences(40)])
    (tmp_path / "lists.jsonl").write_text('{"text": "one", "label": ["x"]}\n')
    write_csv(tmp_path / "wide.csv", [("one", "two", "x")], header=("a", "b", "label"))
    options = [option.format(tmp=tmp_path, rows=rows_csv) for option in options]
    model = [] if "--model_name_or_path" in options else ["--model_name_or_path", tiny_model]
    with pytest.raises(SystemExit) as stopped:
        run(main, [*options, *model, "--output_dir", str(tmp_path / "out")])
    assert stopped.value.code == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line and not line.startswith("Loading weights")]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]


def test_wrong_input_to_the_real_process_shows_no_traceback():
    done = run_recipe("--train_file", "nowhere.csv")
    assert done.returncode == 2
    assert done.stderr == "error: --train_file nowhere.csv: no such file\n"
