"""``python -m elra_hf.run SCRIPT ARGS…`` or ``-m MODULE ARGS…``: a script that never heard of us learns ``--optim elra_*``.

Also under launchers: ``torchrun … -m elra_hf.run SCRIPT …`` and ``accelerate launch … -m elra_hf.run SCRIPT …``.
"""

from __future__ import annotations

import os
import runpy
import sys

import elra_hf  # noqa: F401  registers the optimizers

USAGE = "usage: python -m elra_hf.run SCRIPT [ARGS…]\n       python -m elra_hf.run -m MODULE [ARGS…]"


def main() -> None:
    """Run the script or module named on the command line as ``__main__``, with the arguments after it."""
    args = sys.argv[1:]
    as_module = args[:1] == ["-m"]
    args = args[1:] if as_module else args
    if not args or args[0] in ("-h", "--help"):
        print(USAGE, file=sys.stdout if args else sys.stderr)
        sys.exit(0 if args else 2)
    sys.argv = args
    if as_module:
        runpy.run_module(args[0], run_name="__main__", alter_sys=True)
        return
    if not os.path.exists(args[0]):
        sys.exit(f"elra_hf.run: no script {args[0]!r}. For a module: python -m elra_hf.run -m {args[0]}")
    # as `python SCRIPT` does, which puts the script's folder where -m put the current one
    sys.path[0] = os.path.dirname(os.path.abspath(args[0]))
    runpy.run_path(args[0], run_name="__main__")


if __name__ == "__main__":
    main()
