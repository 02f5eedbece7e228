"""``python -m elra_hf.run SCRIPT ARGS…`` or ``-m MODULE ARGS…``: a script that never heard of us learns ``--optim elra_*``.

Also under launchers: ``torchrun … -m elra_hf.run SCRIPT …``, ``accelerate launch … -m elra_hf.run SCRIPT …`` and
``deepspeed --module elra_hf.run SCRIPT …``. Whatever Python the script starts knows the names, too.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
from types import ModuleType
from zipfile import is_zipfile

import elra_hf  # noqa: F401  registers the optimizers
from elra_hf.adapters.children import learn
from elra_hf.adapters.find import read_steps, searched
from elra_hf.adapters.replace import NAMES, built

USAGE = f"""\
usage: python -m elra_hf.run [OPTIONS] SCRIPT [ARGS...]
       python -m elra_hf.run [OPTIONS] -m MODULE [ARGS...]

Runs a training script that knows nothing of elra_hf, so that its --optim takes {", ".join(NAMES)}.
Options of ours stand before SCRIPT or -m; everything after is the script's.

  --find-rate N         train N steps with elra_adamw (HF Trainer), print the rate for AdamW, and end: nothing is saved
  --replace AdamW=NAME  put one of them in the place of torch.optim.AdamW, for scripts that build their own AdamW
  -h, --help            show this and exit

Under a launcher: torchrun ... -m elra_hf.run SCRIPT ..., accelerate launch ... -m elra_hf.run SCRIPT ...,
deepspeed ... --module elra_hf.run SCRIPT ...
A command that is a Python script works, too, with all that it starts: python -m elra_hf.run "$(which trl)" sft ...
"""


def main() -> None:
    """Run the script or module named on the command line as ``__main__``, with the arguments after it."""
    args = sys.argv[1:]
    launchers: list[str] = []
    replaced, steps = "", 0
    while args and args[0].startswith("-") and args[0] not in ("-", "-m"):
        option, _, value = args.pop(0).partition("=")
        if option in ("-h", "--help"):
            print(USAGE, end="")
            sys.exit(0)
        if option not in ("--local_rank", "--local-rank", "--replace", "--find-rate"):
            _stop(f"unknown option {option} before SCRIPT; the script's own options stand after it. See --help")
        if not value:
            value = args.pop(0) if args else _stop(f"{option} has no value: give {option}=VALUE")
        if option == "--replace":
            replaced = value
        elif option == "--find-rate":
            try:
                steps = read_steps(value)
            except ValueError as error:
                _stop(str(error))
        else:  # deepspeed and torch.distributed.launch put it before the script, for the script
            launchers.append(f"{option}={value}")
    as_module = args[:1] == ["-m"]
    args = args[1:] if as_module else args
    if not args:
        print(USAGE, end="", file=sys.stderr)
        sys.exit(2)
    if not as_module and args[0] != "-" and not os.path.exists(args[0]):
        _stop(f"no script {args[0]!r}. For a module: python -m elra_hf.run -m {args[0]}", 1)
    if not as_module and os.path.isdir(args[0]) and not os.path.exists(os.path.join(args[0], "__main__.py")):
        _stop(f"{args[0]!r} is a folder without __main__.py: name the script in it", 1)
    try:
        learn(replaced, steps)
    except ValueError as error:
        _stop(str(error))
    sys.argv = [args[0], *launchers, *args[1:]]
    if as_module:
        if not _exists(args[0]):
            _stop(f"no module {args[0]!r}. For a script leave out -m, and give its path", 1)
        sys.modules["__main__"] = ModuleType("__main__")
        runpy._run_module_as_main(args[0])  # type: ignore[attr-defined]
    else:
        # as `python SCRIPT` does: __file__ holds also after a chdir, and the script's folder is where -m put the current one
        script = os.path.abspath(args[0])
        if not getattr(sys.flags, "safe_path", False):  # with -P neither is there
            sys.path[0] = os.path.dirname(script) if args[0] != "-" else ""
        if os.path.isdir(script) or (os.path.isfile(script) and (script.endswith(".pyc") or is_zipfile(script))):
            runpy.run_path(script, run_name="__main__")
        else:
            _run_source(args[0])
    if replaced and not built():
        print(f"elra_hf.run: --replace {replaced}: this process built no torch.optim.AdamW", file=sys.stderr)
    if steps and not searched():
        print("elra_hf.run: --find-rate: this process itself trained with no Trainer of transformers", file=sys.stderr)


def _run_source(name: str) -> None:
    """Run the file ``name``, a pipe, or standard input (``-``).

    runpy would read a pipe twice, and take ``__main__`` away at the end, in which threads and exit handlers look up classes.
    """
    module = ModuleType("__main__")
    if name != "-" and os.path.isfile(name):
        name = module.__file__ = os.path.abspath(name)
    with open(0 if name == "-" else name, "rb") as file:
        code = compile(file.read(), "<stdin>" if name == "-" else name, "exec", dont_inherit=True)
    sys.modules["__main__"] = module
    exec(code, vars(module))


def _exists(module: str) -> bool:
    """Whether there is ``module``; imports the packages around it, as running it does."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):  # something that the package needs
            raise
        return False


def _stop(message: str, status: int = 2) -> str:
    print(f"elra_hf.run: {message}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
