"""What the ranks of a launch do. Each function is called by name, see `harness`."""

from __future__ import annotations

import time
import traceback
from typing import Any

import torch.distributed as dist

from .setups import SETUPS, VARIANTS, train


def rows() -> dict[tuple[str, str, str], Any]:
    """Every set-up of this world size, by (set-up, variant, reduction); a traceback where one failed on this rank."""
    results: dict[tuple[str, str, str], Any] = {}
    for name, setup in SETUPS.items():
        if setup.world != dist.get_world_size():
            continue
        start = time.monotonic()
        for variant in VARIANTS:
            for kind in ("right", *setup.wrong):
                try:
                    results[name, variant, kind] = train(setup, variant, kind)
                except Exception:
                    results[name, variant, kind] = traceback.format_exc()
                    print(name, variant, kind, results[name, variant, kind], flush=True)
        print(f"{name}: {time.monotonic() - start:.1f} s", flush=True)
    return results
