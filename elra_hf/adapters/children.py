"""Every Python that a script under ``elra_hf.run`` starts learns what the launcher was told.

Children of multiprocessing, ``trl sft``, which starts ``accelerate launch``, which starts the script: they find a
``sitecustomize`` of ours first on their path, which Python imports before anything else; it hands on to the one it hides.
"""

from __future__ import annotations

import json
import os

import elra_hf  # noqa: F401  registers the optimizers

from .find import find
from .replace import replace

STARTUP = os.path.join(os.path.dirname(os.path.abspath(__file__)), "startup")


def learn(replaced: str, steps: int) -> None:
    """Do in this process, and in all that it starts, what the command line asked for.

    Args:
        replaced: of ``--replace``, or empty.
        steps: of ``--find-rate``, or 0.

    Raises:
        ValueError: ``replaced`` cannot be done.
    """
    if replaced:
        replace(replaced)
    if steps:
        find(steps)
    os.environ["ELRA_HF_RUN"] = json.dumps({"replaced": replaced, "steps": steps})
    given = os.environ.get("PYTHONPATH")
    paths = given.split(os.pathsep) if given else []  # an empty one among others is the current folder
    os.environ["PYTHONPATH"] = os.pathsep.join([STARTUP, *(path for path in paths if path != STARTUP)])
