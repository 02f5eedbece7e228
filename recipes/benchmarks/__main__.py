"""The bench's commands; each lists its options with ``--help``."""

import importlib
import sys

COMMANDS = {
    "run": ("run", "measure tasks x optimizers, a row a run"),
    "report": ("report", "tables and pictures of these rows"),
    "paper": ("paper", "the paper's own experiments, rows and report"),
    "questions": ("studies", "the paper's open questions, rows and report"),
    "finder": ("finder", "the rate that a search finds, given to AdamW, rows and report"),
    "ablation": ("ablation", "what each part and constant of the rules is worth, rows and report"),
    "cosines": ("cosines", "what a rate rule can see along fixed rates"),
    "speed": ("speed", "what a step costs next to fused AdamW, rows and table"),
    "scale": ("scale", "a GPT of 105 M parameters against swept AdamW, rows and report"),
}
USAGE = "usage: python -m recipes.benchmarks COMMAND [OPTIONS]; --help after a command lists its options\n\n" + "\n".join(
    f"  {name:10} {purpose}" for name, (_, purpose) in COMMANDS.items()
)


def main() -> None:
    """Hand the rest of the command line to the subcommand."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        wanted = name in ("-h", "--help")
        print(USAGE, file=sys.stdout if wanted else sys.stderr)
        sys.exit(0 if wanted else 2)
    importlib.import_module(f"recipes.benchmarks.{COMMANDS[name][0]}").main(sys.argv[2:])


if __name__ == "__main__":  # workers import this file, too
    main()
