"""``python -m recipes.benchmarks run …`` measures, ``python -m recipes.benchmarks report …`` writes tables and pictures."""

import sys

USAGE = "usage: python -m recipes.benchmarks {run,report} [OPTIONS]; --help after either lists its options"


def main() -> None:
    """Hand the rest of the command line to the subcommand."""
    if sys.argv[1:2] == ["run"]:
        from recipes.benchmarks import run as command
    elif sys.argv[1:2] == ["report"]:
        from recipes.benchmarks import report as command
    else:
        wanted = sys.argv[1:2] in (["-h"], ["--help"])
        print(USAGE, file=sys.stdout if wanted else sys.stderr)
        sys.exit(0 if wanted else 2)
    command.main(sys.argv[2:])


if __name__ == "__main__":  # workers import this file, too
    main()
