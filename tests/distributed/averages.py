"""What the ranks do to try `elra_hf.averaged` and the finder's snapshot on sharded parameters. Each is called by name."""

from __future__ import annotations

import traceback
from typing import Any

import torch
from torch import Tensor

from elra_hf import averaged
from elra_hf.adapters.found import Snapshot

from ..iterates import average
from .setups import SETUPS, Net, advance, batch, build, flatten, make

NAMES = ("DDP", "FSDP2", "FSDP2, ignored_params", "TP", "FSDP1 NO_SHARD")
REFUSED = ("FSDP1 FULL_SHARD", "FSDP1 FULL_SHARD, flat")
STEPS = 6


def rows() -> dict[tuple[str, str], Any]:
    """By (set-up, variant): what was seen, or a traceback."""
    results: dict[tuple[str, str], Any] = {}
    for name in NAMES + REFUSED:
        for variant in ("elra_adamw", "elra_c2min"):
            try:
                results[name, variant] = look(name, variant)
            except Exception:
                results[name, variant] = traceback.format_exc()
                print(name, variant, results[name, variant], flush=True)
    return results


def look(name: str, variant: str) -> dict[str, Any]:
    """Weights and output before, in and after the block and after a snapshot was put back, and what they should be."""
    setup = SETUPS[name]
    wrapped = setup.wrap(build(Net))
    optimizer = make(variant, wrapped.named, setup.single, **wrapped.options)
    before = Snapshot(wrapped.module, optimizer)
    seen = [whole(wrapped)]
    for step in range(STEPS):
        advance(wrapped, optimizer, setup, range(step, step + 1))
        seen.append(whole(wrapped))
    mean = {key: average([each[key] for each in seen], variant) for key in seen[0]}
    x, _ = batch(99, Net)

    def output() -> Tensor:
        with torch.no_grad():
            return wrapped.module(x)

    found = {"out before": output()}  # which leaves FSDP2's root gathered
    with averaged(optimizer):
        found |= {"in": flatten(whole(wrapped)), "out in": output()}
    found |= {"after": flatten(whole(wrapped)), "out after": output()}
    before.restore()
    found |= {"restored": flatten(whole(wrapped)), "out restored": output()}
    wanted = {"in": flatten(mean), "after": flatten(seen[-1]), "restored": flatten(seen[0])}
    for key, weights in {"out before": seen[-1], "out in": mean, "out after": seen[-1], "out restored": seen[0]}.items():
        model = build(Net)
        model.load_state_dict(weights)
        wanted[key] = model(x).detach()
    return {"found": found, "wanted": wanted}


def whole(wrapped: Any) -> dict[str, Tensor]:
    """The parameters of all ranks, copied."""
    return {name: value.clone() for name, value in wrapped.full().items()}
