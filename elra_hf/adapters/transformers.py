"""The Hugging Face Trainer: `--optim elra_*`, its options, and the rate in the logs. Hooked in by `import elra_hf`.

The three functions take the freshly imported module of transformers that they extend, since neither side imports the other
before the user does. They must not raise: an import hook that fails is not run again.
"""

from __future__ import annotations

import warnings
from types import ModuleType
from typing import Any

NAMES = ("elra_c2min", "elra_p2min", "elra_adamw")


def add_names(training_args: ModuleType) -> None:
    """Make the names members of ``OptimizerNames``, which ``TrainingArguments`` and argument parsers go by."""
    enum = training_args.OptimizerNames
    for value in NAMES:
        if value in enum._value2member_map_:
            continue
        name = value.upper()
        member = str.__new__(enum, value)
        member._name_, member._value_, member.__objclass__ = name, value, enum
        member._sort_order_ = len(enum._member_names_)
        # as a plain string, training_args.bin loads where elra_hf is not installed
        member.__reduce_ex__ = lambda protocol, value=value: (str, (value,))
        member.__deepcopy__ = lambda memo, member=member: member
        enum._member_names_.append(name)
        enum._member_map_[name] = enum._value2member_map_[value] = member
        type.__setattr__(enum, name, member)


def add_optimizers(trainer: ModuleType) -> None:
    """Let ``Trainer`` build the optimizers and log their rate."""
    original = trainer.Trainer.get_optimizer_cls_and_kwargs

    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, Any]:
        # before transformers parses --optim_args, which fails on a tuple
        return build(args, model) if args.optim in NAMES else original(args, model)

    get_optimizer_cls_and_kwargs.__doc__ = original.__doc__
    trainer.Trainer.get_optimizer_cls_and_kwargs = staticmethod(get_optimizer_cls_and_kwargs)
    from .logs import ElraLogs

    trainer.DEFAULT_CALLBACKS.append(ElraLogs)


def build(args: Any, model: Any) -> tuple[type, dict[str, Any]]:
    """Return the optimizer class and its keyword arguments, as ``Trainer.get_optimizer_cls_and_kwargs`` does.

    Args:
        args: the run's ``TrainingArguments``. ``learning_rate`` is α_0; ``weight_decay`` comes with the groups.
        model: the model as the optimizer will see it.

    Raises:
        ValueError: ``args.optim_args`` has an unknown key or a bad value.
    """
    from elra_hf.adapters.accelerate import sharding_group
    from elra_hf.adapters.options import parse_options
    from elra_hf.variants import VARIANTS

    cls = VARIANTS[str(getattr(args.optim, "value", args.optim))]
    options: dict[str, Any] = {"lr": args.learning_rate}
    if args.optim == "elra_adamw":
        options |= {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    options |= parse_options(args.optim_args, cls)
    plugin = args.deepspeed_plugin  # from --deepspeed, or from accelerate launch
    if model is not None and plugin is not None:
        options |= under_deepspeed(model, plugin.deepspeed_config, args, options.get("scope"))
    elif model is not None:
        options["process_group"] = sharding_group(model)
    return cls, options


def under_deepspeed(model: Any, config: dict[str, Any], args: Any, scope: str | None) -> dict[str, Any]:
    """What the optimizer needs to know of ZeRO, which steps each of the Trainer's two groups by itself.

    Args:
        model: the model, not yet wrapped.
        config: DeepSpeed's.
        args: the run's ``TrainingArguments``.
        scope: the one asked for, or None.

    Raises:
        ValueError: DeepSpeed's config does not go with ELRA, or one rate is asked for where there can only be two.
    """
    from elra_hf.adapters.deepspeed import sharding_group, stage

    options: dict[str, Any] = {"process_group": sharding_group(model, config)}
    if stage(config) == 0:
        return options
    if not args.weight_decay:
        # the groups differ in weight decay alone
        return {**options, "params": [p for p in model.parameters() if p.requires_grad]}
    if scope == "global":
        raise ValueError(
            f"optim_args: scope=global does not go with --weight_decay {args.weight_decay:g} under DeepSpeed ZeRO, which steps "
            "the parameters with and those without weight decay apart: give --weight_decay 0, or leave scope out"
        )
    if scope is None:
        options["scope"] = "group"
        if args.process_index == 0:
            warnings.warn(
                "DeepSpeed ZeRO steps the parameters with and those without weight decay apart, so that each of the two groups "
                "has an ELRA rate of its own; the logs show the first one. For one rate, give --weight_decay 0",
                stacklevel=2,
            )
    return options


def schedule(args: Any, steps: int) -> str:
    """The schedule of ``TrainingArguments``, in words."""
    name, warmup = str(args.lr_scheduler_type.value), args.get_warmup_steps(steps)
    # "constant" passes over a warm-up
    return name if not warmup or name == "constant" else f"{name}, {warmup} steps of warm-up"


def say(line: str) -> None:
    """Print a line above the progress bars."""
    from tqdm.auto import tqdm

    tqdm.write(line)


def __getattr__(name: str) -> Any:
    """Import what needs transformers on first use."""
    if name not in ("AveragedWeights", "RateFinder"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from elra_hf.adapters import callbacks
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "transformers":
            raise
        raise ImportError(f"{name} needs transformers, which is not installed: pip install 'elra_hf[transformers]'") from error
    return getattr(callbacks, name)
