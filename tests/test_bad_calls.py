"""Bad calls, one a line: each is refused with the argument, the value that was given, and what to give instead."""

import importlib
import math
import sys

import pytest
import torch
from torch import nn

import elra_hf.run
from elra_hf import (
    Adam,
    C2Min,
    Elra,
    ElraAdamW,
    ElraC2Min,
    ElraP2Min,
    Momentum,
    P2Min,
    SuccessiveGradients,
    Tracking,
    configure_elra,
    rate,
)
from elra_hf.adapters.options import parse_options
from elra_hf.adapters.replace import replace

X = nn.Parameter(torch.ones(2))
Y = nn.Parameter(torch.ones(2))


def group(cls=ElraAdamW, **entries):
    return lambda: cls([{"params": [X], **entries}])


def late(**entries):
    return lambda: ElraC2Min([X]).add_param_group({"params": [Y], **entries})


def stepped(cls, params):
    optimizer = cls(params)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer


def optim_args(text, cls=ElraC2Min):
    return lambda: parse_options(text, cls)


def recipe(module, *argv):
    return lambda: command(f"recipes.{module}", argv)


def command(module, argv):
    main = importlib.import_module(module)
    main.run(main.main, argv) if hasattr(main, "run") else main.main(argv)


def launcher(*argv):
    def call():
        before, sys.argv = sys.argv, ["elra_hf.run", *argv]
        try:
            elra_hf.run.main()
        finally:
            sys.argv = before

    return call


def embed(sparse):
    embedding = nn.Embedding(4, 2, sparse=sparse)
    embedding(torch.tensor([1])).sum().backward()
    stepped_without_grad = ElraC2Min(embedding.parameters())
    stepped_without_grad.step()


# (call, words of the message: the argument, the value, the remedy)
CALLS = {
    # the constructors
    "lr 0": (lambda: ElraC2Min([X], lr=0.0), "lr=0.0", "must be positive", "e.g. 1e-5"),
    "lr negative": (lambda: ElraAdamW([X], lr=-1e-3), "lr=-0.001", "give a", "number"),
    "lr nan": (lambda: ElraP2Min([X], lr=math.nan), "lr=nan", "give a", "number"),
    "lr infinite": (lambda: ElraP2Min([X], lr=math.inf), "lr=inf", "give a finite", "number"),
    "lr a text, as YAML reads 1e-5": (lambda: ElraC2Min([X], lr="1e-5"), "lr='1e-5'", "give a finite number", "invalid"),
    "lr None": (lambda: ElraC2Min([X], lr=None), "lr=None", "give a finite number", "invalid"),
    "lr a list": (lambda: ElraC2Min([X], lr=[1e-5]), "lr=[1e-05]", "give a finite number", "invalid"),
    "lr two numbers": (lambda: ElraC2Min([X], lr=torch.ones(2)), "lr=tensor([1., 1.])", "1-element", "give one number"),
    "betas above": (lambda: ElraC2Min([X], betas=(0.8, 1.0)), "betas=(0.8, 1.0)", "pair", "[0, 1)"),
    "betas one": (lambda: ElraAdamW([X], betas=0.9), "betas=0.9", "pair", "[0, 1)"),
    "betas three": (lambda: ElraAdamW([X], betas=(0.9, 0.9, 0.9)), "betas=(0.9, 0.9, 0.9)", "pair", "[0, 1)"),
    "betas texts": (lambda: ElraAdamW([X], betas=("0.9", "x")), "betas=('0.9', 'x')", "pair", "[0, 1)"),
    "gain above": (lambda: ElraC2Min([X], gain=1.5), "gain=1.5", "(0, 1)", "e.g. gain=(0.5, 0.6)"),
    "gain three": (lambda: ElraC2Min([X], gain=(0.1, 0.2, 0.3)), "gain=(0.1, 0.2, 0.3)", "pair (down, up)", "(0, 1)"),
    "gain text": (lambda: ElraC2Min([X], gain="much"), "gain='much'", "give a number", "(0, 1)"),
    "gain None": (lambda: ElraC2Min([X], gain=None), "gain=None", "give a number", "(0, 1)"),
    "horizon 0": (lambda: ElraC2Min([X], horizon=0), "horizon=0", "positive", "give"),
    "horizon text": (lambda: ElraP2Min([X], horizon="inf"), "horizon='inf'", "positive", "give"),
    "horizon None": (lambda: ElraC2Min([X], horizon=None), "horizon=None", "positive", "give"),
    "growth_limit": (lambda: ElraP2Min([X], growth_limit=0.5), "growth_limit=0.5", "above 1", "e.g. 2.0"),
    "growth_limit text": (lambda: ElraP2Min([X], growth_limit="2"), "growth_limit='2'", "above 1", "e.g. 2.0"),
    "eps": (lambda: ElraAdamW([X], eps=0.0), "eps=0.0", "small positive", "e.g. 1e-8"),
    "eps 0 in float32": (lambda: ElraAdamW([X], eps=1e-50), "eps=1e-50", "small positive", "e.g. 1e-8"),
    "eps None": (lambda: ElraAdamW([X], eps=None), "eps=None", "small positive", "e.g. 1e-8"),
    "weight_decay": (lambda: ElraC2Min([X], weight_decay=-0.1), "weight_decay=-0.1", "give a finite number", ">= 0"),
    "weight_decay None": (lambda: ElraC2Min([X], weight_decay=None), "weight_decay=None", "give a finite number", ">= 0"),
    "scope": (lambda: ElraC2Min([X], scope="layer"), "scope='layer'", "give one of", "'global', 'group', 'tensor'"),
    "scope None": (lambda: ElraC2Min([X], scope=None), "scope=None", "give one of", "'global', 'group', 'tensor'"),
    "bounds turned": (lambda: ElraC2Min([X], bounds=(1.0, 0.1)), "bounds=(1.0, 0.1)", "(lowest, highest)", "lowest < highest"),
    "bounds one": (lambda: ElraC2Min([X], bounds=1e6), "bounds=1000000.0", "(lowest, highest)", "lowest < highest"),
    "bounds texts": (lambda: ElraC2Min([X], bounds=("a", "b")), "bounds=('a', 'b')", "(lowest, highest)", "lowest < highest"),
    "bounds None": (lambda: ElraC2Min([X], bounds=None), "bounds=None", "(lowest, highest)", "lowest < highest"),
    "restart_factor": (lambda: ElraC2Min([X], restart_factor=1.0), "restart_factor=1.0", "(0, 1)", "e.g. 1/3"),
    "restart_factor text": (lambda: ElraC2Min([X], restart_factor="a"), "restart_factor='a'", "(0, 1)", "e.g. 1/3"),
    "positional": (lambda: ElraC2Min([X], 1e-3, (0.9, 0.9)), "positional argument", "3 were given|4 were given", "takes"),
    "unknown option": (lambda: ElraC2Min([X], gian=0.3), "gian", "unexpected keyword", "ElraC2Min|__init__"),
    # a step
    "loss text": (lambda: ElraC2Min([X]).step(loss="0.5"), "loss='0.5'", "give one number", "loss.mean()"),
    "loss of each row": (
        lambda: ElraC2Min([X]).step(loss=torch.ones(8)),
        "loss=of shape (8,)",
        "give one number",
        "loss.mean()",
    ),
    # directions and rules
    "a pair that does not go": (lambda: Elra([X], Adam(), C2Min(horizon=math.inf)), "rule=C2Min", "['gp', 'pp']", "it offers"),
    "another pair": (lambda: Elra([X], SuccessiveGradients(), Tracking()), "rule=Tracking", "direction=Succ", "it offers"),
    "tracking gain": (lambda: Tracking(gain=0.0), "gain=0.0", "positive", "give"),
    "tracking horizon": (lambda: Tracking(horizon=-1.0), "horizon=-1.0", "positive", "give"),
    "tracking first": (lambda: Tracking(first=0.0), "first=0.0", "positive", "give"),
    "momentum betas": (lambda: Momentum(betas=(1.0, 0.5)), "betas=(1.0, 0.5)", "pair", "[0, 1)"),
    "p2min horizon": (lambda: P2Min(horizon=math.nan), "horizon=nan", "positive", "give"),
    # groups
    "group's lr": (group(lr=-1.0), "lr=-1.0", "give a finite number", ">= 0"),
    "group's lr a text": (group(lr="0.1"), "lr='0.1'", "give a finite number", ">= 0"),
    "group's weight_decay": (group(weight_decay=math.nan), "weight_decay=nan", "give a finite number", ">= 0"),
    "group's betas": (group(betas=(2, 0)), "betas=(2, 0)", "pair", "[0, 1)"),
    "group's eps": (group(eps=-1.0), "eps=-1.0", "small positive", "e.g. 1e-8"),
    "group's gain": (group(ElraC2Min, gain=0.3), "gain=0.3", "in a parameter group", "pass gain to the optimizer"),
    "group's scope": (group(scope="tensor"), "scope='tensor'", "in a parameter group", "pass scope to the optimizer"),
    "group's bounds": (group(bounds=(0.1, 1)), "bounds=(0.1, 1)", "in a parameter group", "pass bounds to the optimizer"),
    "late group's lr": (late(lr=math.inf), "lr=inf", "give a finite number", ">= 0"),
    "late group's horizon": (late(horizon=5.0), "horizon=5.0", "in a parameter group", "pass horizon to the optimizer"),
    "sparse gradient": (lambda: embed(True), "sparse gradients", "(4, 2)", "sparse=False"),
    # checkpoints
    "AdamW's state": (
        lambda: ElraAdamW([X]).load_state_dict(stepped(torch.optim.AdamW, [X]).state_dict()),
        "state_dict",
        "another optimizer",
        "Continue with the optimizer that the run was started with",
    ),
    "another of ours": (
        lambda: ElraAdamW([X]).load_state_dict(stepped(ElraC2Min, [X]).state_dict()),
        "state_dict",
        "Momentum/C2Min",
        "delete optimizer.pt",
    ),
    # adapters
    "no ELRA inside": (lambda: rate(torch.optim.SGD([X], lr=0.1)), "SGD", "holds no ELRA optimizer", "pass ElraC2Min"),
    "configure's name": (lambda: configure_elra(nn.Linear(2, 2), "elra_adam"), "'elra_adam'", "did you mean", "elra_c2min"),
    "configure's option": (lambda: configure_elra(nn.Linear(2, 2), gian=1), "'gian'", "did you mean 'gain'", "horizon"),
    "configure nothing": (lambda: configure_elra(nn.Flatten()), "module=Flatten", "no parameter", "nothing to train"),
    "replace": (lambda: replace("SGD=elra_adamw"), "--replace SGD=elra_adamw", "give AdamW=NAME", "elra_adamw"),
    # --optim_args
    "unknown key": (optim_args("gian=0.3"), "'gian'", "did you mean 'gain'", "valid keys are betas"),
    "no value": (optim_args("gain"), "'gain'", "has no value", "give gain=value"),
    "a text for a number": (optim_args("gain=much"), "gain=much", "wrong type", "give a number or (a number, a number)"),
    "no such scope": (optim_args("scope=layer"), "scope=layer", "wrong type", "give global or group or tensor"),
    "three betas": (optim_args("betas=(1,2,3)"), "betas=(1,2,3)", "wrong type", "(a number, a number)"),
    "a tuple without brackets": (optim_args("betas=0.9,0.7"), "betas=0.9", "(a number, a number)", "give"),
    "a bool": (optim_args("check_sync=3"), "check_sync=3", "wrong type", "give true or false"),
    "lr among them": (optim_args("lr=3"), "'lr=3'", "--learning_rate", "leave it out there"),
    "twice": (optim_args("gain=0.1,gain=0.2"), "'gain=0.2'", "twice", "give it once"),
    "not closed": (optim_args("betas=(0.9,0.8"), "')'", "missing", "add it"),
    "not opened": (optim_args("betas=0.9)"), "')'", "closes what was not opened", "take it out"),
    "nan": (optim_args("gain=nan"), "gain=nan", "wrong type", "give a number"),
    "of another class": (optim_args("growth_limit=3"), "'growth_limit'", "ElraC2Min", "valid keys"),
    # command lines of the recipes
    "recipe: option": (recipe("text_classification.train", "--learning_rat", "1"), "--learning_rat", "did you mean", "rate"),
    "recipe: optim": (recipe("text_classification.train", "--optim", "elra_c2mim"), "--optim", "elra_c2mim", "did you mean"),
    "recipe: number": (recipe("language_modeling.train", "--layers", "x"), "--layers", "'x'", "int"),
    "recipe: width": (recipe("language_modeling.train", "--width", "33"), "--width", "33", "give a multiple of"),
    "recipe: rank": (recipe("language_modeling.train", "--lora_rank", "0"), "--lora_rank", "0", "give a number above 0"),
    "recipe: optim_args": (
        recipe("language_modeling.train", "--optim_args", "gian=1"),
        "--optim_args",
        "gian",
        "valid keys are",
    ),
    "recipe: gain": (
        recipe("text_classification.train", "--optim", "elra_c2min", "--optim_args", "gain=9"),
        "--optim_args",
        "gain=9",
        "(0, 1)",
    ),
    "recipe: file": (recipe("text_classification.train", "no.yaml"), "no.yaml", "no such file", "error:"),
    "recipe: checkpoint": (
        recipe("text_classification.train", "--resume_from_checkpoint", "nowhere"),
        "--resume_from_checkpoint",
        "nowhere",
        "no checkpoint there",
    ),
    "recipe: compare": (recipe("text_classification.train", "--compare", "sgdd"), "--optim", "sgdd", "did you mean sgd"),
    "recipe: train file": (
        recipe("text_classification.train", "--train_file", "no.csv"),
        "--train_file",
        "no.csv",
        "no such file",
    ),
    "bench: task": (recipe("benchmarks.run", "--tasks", "mnits"), "--tasks", "mnits", "Known:"),
    "bench: seeds": (recipe("benchmarks.run", "--seeds", "0"), "--seeds", "0 is invalid", "give a number >= 1"),
    "bench: study": (recipe("benchmarks.run", "--study", "nose"), "--study", "nose", "choose from"),
    # the launcher
    "launcher: option": (launcher("--repalce", "x", "a.py"), "--repalce", "the script's own options stand after it", "--help"),
    "launcher: script": (launcher("nowhere.py"), "'nowhere.py'", "no script", "python -m elra_hf.run -m"),
    "launcher: no value": (launcher("--replace"), "--replace", "has no value", "--replace=VALUE"),
    "launcher: replace": (launcher("--replace", "Adam=elra_adamw", __file__), "--replace", "Adam=elra_adamw", "AdamW=NAME"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CALLS)
def test_it_says_what_is_wrong_and_what_to_give(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call, *words = CALLS[name]
    with pytest.raises((ValueError, TypeError, RuntimeError, SystemExit)) as stopped:
        call()
    said = capsys.readouterr().err + str(stopped.value)
    for each in words:
        assert any(word in said for word in each.split("|")), f"{each!r} is not in: {said}"
    assert "Traceback" not in said
    if stopped.type is SystemExit:
        assert stopped.value.code != 0
        assert len([line for line in said.splitlines() if "error" in line.lower() or "elra_hf.run" in line]) <= 2


def test_there_are_sixty():
    assert len(CALLS) >= 60
