"""What the ranks of a launch under DeepSpeed do. Imported only where DeepSpeed is installed."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from elra_hf import averaged, rate
from elra_hf.adapters.deepspeed import sharding_group
from elra_hf.adapters.found import Snapshot

from .setups import STEPS, VARIANTS, Net, batch, build, flatten, make, reduction

os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed

# it would compile an operator for shared memory, which takes minutes and is not needed over gloo
sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None

STAGES = (1, 2, 3)
SAVED_AFTER = 10


@dataclass
class ZeroOutcome:
    """α and the cosine of every group after every step, x at the end, and the ranks that DeepSpeed cut over."""

    alphas: list[list[float]]
    cosines: list[list[float]]
    x: Tensor
    cut_over: list[int]


def configuration(stage: int, bf16: bool = False, **zero: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 8 // dist.get_world_size(),
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # 1.0 by default
        "bf16": {"enabled": bf16},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, **zero},
    }


def begin(config: dict[str, Any], variant: str, single: bool, **options: Any) -> tuple[Any, Any]:
    """A fresh engine and optimizer; the group is passed unless ``options`` do."""
    model = build(Net, torch.float32)
    if config["zero_optimization"]["stage"] == 3:
        deepspeed.zero.Init(module=model, config_dict_or_path=config)
    if "process_group" not in options:
        options["process_group"] = sharding_group(model, config)
    optimizer = make(variant, list(model.named_parameters()), single, **options)
    before = [float(group["alpha"]) for group in optimizer.param_groups]
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    assert before == [float(group["alpha"]) for group in optimizer.param_groups], "initialize taught something"
    return engine, optimizer


def advance(engine: Any, optimizer: Any, steps: range) -> tuple[list[list[float]], list[list[float]]]:
    """α and cosine of every group after every step."""
    alphas, cosines = [], []
    for step in steps:
        x, y = (part.chunk(dist.get_world_size())[dist.get_rank()] for part in batch(step, Net, torch.float32))
        dtype = next(engine.module.parameters()).dtype
        engine.backward(nn.functional.mse_loss(engine(x.to(dtype)), y.to(dtype)))
        engine.step()
        alphas.append([float(group["alpha"]) for group in optimizer.param_groups])
        cosines.append([float(group["cos"]) for group in optimizer.param_groups])
    return alphas, cosines


def outcome(engine: Any, alphas: list[list[float]], cosines: list[list[float]]) -> ZeroOutcome:
    named = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(named.values()), enabled=engine.zero_optimization_stage() == 3):
        x = flatten({name: p.detach().clone() for name, p in named.items()})
    cut = getattr(engine.optimizer, "dp_process_group", None)
    ranks = dist.get_process_group_ranks(cut) if cut is not None else []
    engine.destroy()
    return ZeroOutcome(alphas, cosines, x, ranks)


def train(stage: int, variant: str, single: bool, kind: str = "right") -> ZeroOutcome:
    engine, optimizer = begin(configuration(stage), variant, single, **({} if single else {"scope": "group"}))
    if kind != "right":
        with reduction(kind):
            return outcome(engine, *advance(engine, optimizer, range(6)))
    seen = advance(engine, optimizer, range(STEPS))
    assert rate(engine.optimizer) == float(optimizer.param_groups[0]["alpha"])
    return outcome(engine, *seen)


def resume(stage: int, variant: str, single: bool, folder: str) -> ZeroOutcome:
    """Saved after 10 steps, loaded into a fresh engine, and gone on."""
    scope = {} if single else {"scope": "group"}
    engine, optimizer = begin(configuration(stage), variant, single, **scope)
    first = advance(engine, optimizer, range(SAVED_AFTER))
    engine.save_checkpoint(folder)
    engine.destroy()
    engine, optimizer = begin(configuration(stage), variant, single, **scope)
    assert engine.load_checkpoint(folder)[0] is not None
    second = advance(engine, optimizer, range(SAVED_AFTER, STEPS))
    return outcome(engine, first[0] + second[0], first[1] + second[1])


def stages() -> dict[tuple[Any, ...], Any]:
    """All stages, by (stage, variant, one group, what is done); a traceback where one failed on this rank."""
    deepspeed.init_distributed("gloo")
    results: dict[tuple[Any, ...], Any] = {}
    cases = [(stage, variant, single) for stage in STAGES for variant in VARIANTS for single in (True, False)]
    for case in cases:
        folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
        dist.broadcast_object_list(folder)
        runs = {
            "right": lambda case=case: train(*case),
            "local": lambda case=case: train(*case, "local"),
            "resumed": lambda case=case, folder=folder: resume(*case, folder[0]),
        }
        for kind, function in runs.items():
            try:
                results[(*case, kind)] = function()
            except Exception:
                results[(*case, kind)] = traceback.format_exc()
                print(case, kind, results[(*case, kind)], flush=True)
    return results


def complaint(function: Any) -> str:
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def behaviour() -> dict[str, Any]:
    """What is refused; stage 0; and Accelerate without the Trainer."""
    deepspeed.init_distributed("gloo")

    def steps(config: dict[str, Any], single: bool = True, **options: Any) -> ZeroOutcome:
        engine, optimizer = begin(config, "elra_c2min", single, **options)
        return outcome(engine, *advance(engine, optimizer, range(STEPS)))

    def swap(inside: bool) -> None:
        engine, optimizer = begin(configuration(2), "elra_adamw", True)
        with averaged(optimizer if inside else engine.optimizer):
            pass

    refused = {
        "no group": lambda: steps(configuration(2), process_group=None),
        **{f"one rate for two groups, ZeRO-{s}": lambda s=s: steps(configuration(s), single=False) for s in STAGES},
        "sub-groups": lambda: steps(configuration(3, sub_group_size=40)),
        "sub-groups, group passed by hand": lambda: steps(configuration(3, sub_group_size=40), process_group=dist.group.WORLD),
        "offload": lambda: steps(configuration(2, offload_optimizer={"device": "cpu"})),
        "AutoTP": lambda: steps({**configuration(2), "tensor_parallel": {"autotp_size": 2}}),
        "averaged": lambda: swap(False),
        "averaged, ours inside": lambda: swap(True),
        "snapshot": lambda: Snapshot(*begin(configuration(2), "elra_adamw", True)),
    }
    results: dict[str, Any] = {name: complaint(function) for name, function in refused.items()}
    trained = {
        "stage 0, float32": lambda: steps(configuration(0), single=False),
        "stage 0, bfloat16": lambda: steps(configuration(0, bf16=True), single=False),
        "accelerate": accelerate,
    }
    for name, function in trained.items():
        try:
            results[name] = function()
        except Exception:
            results[name] = traceback.format_exc()
    return results


def accelerate() -> ZeroOutcome:
    """ZeRO-2 by way of Accelerate."""
    from accelerate import Accelerator, DeepSpeedPlugin

    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=configuration(2)))
    model = build(Net, torch.float32)
    group = sharding_group(model, accelerator.state.deepspeed_plugin.deepspeed_config)
    inner = make("elra_c2min", list(model.named_parameters()), True, process_group=group)
    engine, optimizer = accelerator.prepare(model, inner)
    alphas = []
    for step in range(STEPS):
        x, y = (part.chunk(2)[dist.get_rank()] for part in batch(step, Net, torch.float32))
        accelerator.backward(nn.functional.mse_loss(engine(x), y))
        optimizer.step()
        optimizer.zero_grad()
        alphas.append([float(inner.param_groups[0]["alpha"])])
    return outcome(engine, alphas, [])


def calm() -> nn.Module:
    """The Trainer tests' model without dropout, which would differ from rank to rank."""
    from tests.transformers.jobs import bert

    model = bert()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


KEYS = ("loss", "learning_rate", "elra_alpha", "elra_cos", "elra_restarts")
# the Trainer multiplies the mean loss of a classifier by the number of ranks, unless told not to
OPTIONS = {"learning_rate": 1e-3, "average_tokens_across_devices": False}
TRAINED = {(2, 0.0): None, (2, 0.1): "scope=group", (3, 0.0): None}  # and what a single process is told to do the same


def trainer(folder: str) -> dict[Any, Any]:
    """The Hugging Face Trainer under ZeRO, by (stage, weight decay): logs, rates, warnings, and logs when resumed."""
    from tests.transformers.jobs import logs, run

    results: dict[Any, Any] = {}
    for stage, decay in TRAINED:
        config = {
            "zero_optimization": {"stage": stage},
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_clipping": "auto",
        }
        options = {**OPTIONS, "per_device_train_batch_size": 4, "weight_decay": decay, "deepspeed": config}
        own = f"{folder}/{stage}-{decay}"
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                done = run(own, model=calm(), save_strategy="steps", save_steps=6, **options)
            said = [str(w.message) for w in caught if "ELRA" in str(w.message)]
            groups = [float(group["alpha"]) for group in done.optimizer.param_groups]
            resumed = run(own, model=calm(), resume=f"{own}/checkpoint-6", **options)
            results[stage, decay] = logs(done, *KEYS), groups, said, logs(resumed, *KEYS)
        except Exception:
            results[stage, decay] = traceback.format_exc()
            print(stage, decay, results[stage, decay], flush=True)
    results["one rate asked for"] = complaint(
        lambda: run(f"{folder}/no", optim_args="scope=global", weight_decay=0.1, deepspeed={"zero_optimization": {"stage": 2}})
    )
    return results


def main(folder: str) -> None:
    """Train under `accelerate launch`, and write what rank 0 logged."""
    from tests.transformers.jobs import logs, run

    done = run(folder, model=calm(), per_device_train_batch_size=4, **OPTIONS)
    if dist.get_rank() == 0:
        Path(folder, "logs.json").write_text(json.dumps([type(done.model_wrapped).__name__, logs(done, *KEYS)]))


if __name__ == "__main__":
    main(sys.argv[1])
