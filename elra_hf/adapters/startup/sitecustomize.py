"""What a Python that ``elra_hf.run``'s script starts runs first: it learns what the launcher was told. See `children`."""

import importlib
import json
import os
import sys


def _learn() -> None:
    """Register the optimizers, and do what the launcher was asked for. Nothing that goes wrong may stop another program."""
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [each for each in sys.path if os.path.abspath(each) != here]
    this = sys.modules.pop("sitecustomize")
    root = os.path.dirname(os.path.dirname(os.path.dirname(here)))
    sys.path.append(root)  # behind everything else, for a package that is not installed
    try:
        from elra_hf.adapters.children import learn

        learn(**json.loads(os.environ["ELRA_HF_RUN"]))
    except Exception as error:  # another environment's Python, for one
        print(f"elra_hf.run: a Python that the script started does not know elra_hf: {error}", file=sys.stderr)
        sys.path.remove(root)
    try:
        importlib.import_module("sitecustomize")  # the one that ours hid
    except ModuleNotFoundError:
        sys.modules["sitecustomize"] = this  # where Python's import looks for it in the end


if "ELRA_HF_RUN" in os.environ:
    _learn()
