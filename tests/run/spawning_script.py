"""Starts its processes itself, and they theirs; prints what each knows. The first argument is the start method."""

import multiprocessing
import sys


def main(depth: int, method: str) -> None:
    import torch
    from transformers import HfArgumentParser, TrainingArguments

    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(sys.argv[2:])
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])
    print(depth, args.optim.value, type(optimizer).__name__, flush=True)
    if depth < 2:
        child = multiprocessing.get_context(method).Process(target=main, args=(depth + 1, method))
        child.start()
        child.join()
        assert child.exitcode == 0


if __name__ == "__main__":
    main(0, sys.argv[1])
