"""Model card of a finished run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from elra_hf.adapters.found import sentence

PACKAGES = ("elra_hf", "torch", "transformers", "accelerate", "lightning", "peft", "datasets")

TEMPLATE = """\
---
{{ card_data }}
---

# {{ model_name }}

{{ summary }}

## Results

{{ table(metrics, "metric", "value") }}

{{ found }}

![loss, applied rate and cosine over the steps]({{ picture }})

## Train it

```bash
{{ command }}
```

{{ table(settings, "setting", "value") }}

## Data

{{ dataset }}

{{ table(splits, "split", "rows") }}

## Use it

```python
{{ usage }}
```

## Versions

{{ table(versions, "package", "version") }}
"""


def write_card(
    folder: str | Path,
    *,
    model_name: str,
    summary: str,
    task: str,
    dataset: str,
    dataset_id: str,
    splits: Mapping[str, int],
    metrics: Mapping[str, float],
    settings: Mapping[str, object],
    command: str,
    usage: str,
    split: str = "test",
    picture: str = "rate.png",
    base_model: str | None = None,
    license: str | None = None,
    found: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``folder/README.md``, the model card of a run, with metadata that the Hugging Face hub reads.

    Args:
        folder: the run's output folder.
        model_name: heading of the card.
        summary: one or two sentences on what was trained how.
        task: a task of the hub, as "text-classification".
        dataset: where the data come from and how they were cut, in prose.
        dataset_id: name of the data set in the metadata.
        splits: rows of each split.
        metrics: name and value of each metric, measured on ``split``.
        settings: what somebody needs to know beside the command.
        command: the exact command of the run.
        usage: Python code that loads and calls the model.
        split: the split that ``metrics`` were measured on.
        picture: file name of the picture in ``folder``.
        base_model: name of the pretrained model on the hub, if it has one.
        license: licence of the model.
        found: what `elra_hf.adapters.found.facts` tells of the rate that the run found; goes into the metadata under ``elra``.

    Returns:
        The path of the card.

    Raises:
        ImportError: huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import EvalResult, ModelCard, ModelCardData
    except ModuleNotFoundError as error:
        raise ImportError("write_card needs huggingface_hub: pip install 'elra_hf[recipes]'") from error

    results = [
        EvalResult(
            task_type=task,
            dataset_type=dataset_id,
            dataset_name=dataset_id,
            dataset_split=split,
            metric_type=name,
            metric_value=round(float(value), 4),  # of NumPy's the hub reads none
        )
        for name, value in metrics.items()
    ]
    data = ModelCardData(
        base_model=base_model,
        license=license,
        pipeline_tag=task,
        metrics=list(metrics),
        tags=["elra"],
        eval_results=results,
        model_name=model_name,
    )
    if found:
        data["elra"] = dict(found)
    card = ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        model_name=model_name,
        summary=summary,
        dataset=dataset,
        splits=splits,
        metrics={f"{name} ({split})": f"{value:.4f}" for name, value in metrics.items()},
        settings=settings,
        command=command,
        usage=usage,
        found=sentence(f"`{found['optimizer']}`", "adamw_lr" in found, (found["found_rate"],), found["schedule"])
        if found
        else "",
        picture=picture,
        versions=versions(),
        table=_table,
    )
    path = Path(folder) / "README.md"
    card.save(path)
    return path


def explained(lr: float, horizon: float | None) -> str:
    """``lr`` as the settings of a card show it.

    Args:
        lr: as it was given to the optimizer.
        horizon: that of the optimizer's rule; None where the optimizer is none of ours.
    """
    notes = {None: "", math.inf: " (the first rate)"}
    return f"{lr:g}{notes.get(horizon, ' (only what the schedule refers to)')}"


def versions() -> dict[str, str]:
    """The installed versions of the packages that decide what a run does."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _table(rows: Mapping[str, object], *header: str) -> str:
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    return "\n".join(lines + [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items()])


def _cell(value: object) -> str:
    """``value`` as a table of Markdown takes it: a bar would begin the next cell, an end of line the next row."""
    return " ".join(str(value).split()).replace("|", r"\|")
