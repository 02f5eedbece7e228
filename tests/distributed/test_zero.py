"""DeepSpeed ZeRO, 2 ranks on CPU, against one process on the same global batches. `make test-deepspeed` runs it."""

import functools
import importlib.util
import json
import re
import sys
import tempfile

import pytest
import torch

from elra_hf.adapters.deepspeed import sharding_group

from .harness import run as run_processes
from .harness import shared
from .setups import STEPS, VARIANTS, Net, batch, build, flatten, make

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed is not installed: make test-deepspeed", allow_module_level=True)

STAGES = (1, 2, 3)
GROUPS = {"one group": True, "two groups": False}
TOLERANCE = 1e-4  # float32, and 20 steps of a closed loop


@functools.cache
def alone(variant, single, dtype=torch.float32, scope=None):
    """α and cosine of every group after every step, and x at the end, without DeepSpeed."""
    model = build(Net, dtype)
    named = list(model.named_parameters())
    optimizer = make(variant, named, single, scope=scope or ("global" if single else "group"))
    alphas, cosines = [], []
    for step in range(STEPS):
        x, y = batch(step, Net, dtype)
        torch.nn.functional.mse_loss(model(x), y).backward()
        if single or scope:
            optimizer.step()
        else:  # as ZeRO does, so that a group restarts by itself
            every = optimizer.param_groups
            for group in every:
                optimizer.param_groups = [group]
                optimizer.step()
            optimizer.param_groups = every
        optimizer.zero_grad()
        alphas.append([float(group["alpha"]) for group in optimizer.param_groups])
        cosines.append([float(group["cos"]) for group in optimizer.param_groups])
    return torch.tensor(alphas), torch.tensor(cosines), flatten({name: p.detach() for name, p in named})


@pytest.fixture
def results(tmp_path_factory):
    def get(worker, key, **kwargs):
        ranks = shared(tmp_path_factory, f"zero-{worker}", worker=f"tests.distributed.zero:{worker}", world=2, **kwargs)
        found = [rank[key] for rank in ranks]
        for rank, outcome in enumerate(found):
            assert not (isinstance(outcome, str) and outcome.startswith("Traceback")), f"rank {rank}:\n{outcome}"
        return found

    return get


def error(outcome, expected):
    """The largest relative error of α."""
    alphas = torch.tensor(outcome.alphas)
    truth = expected[0][: len(alphas)]
    return ((alphas - truth).abs() / truth).max().item()


every = [
    pytest.mark.parametrize("groups", GROUPS),
    pytest.mark.parametrize("variant", VARIANTS),
    pytest.mark.parametrize("stage", STAGES),
]


def crossed(test):
    for mark in every:
        test = mark(test)
    return test


@crossed
def test_same_as_one_process(stage, variant, groups, results):
    single = GROUPS[groups]
    expected = alone(variant, single)
    ranks = results("stages", (stage, variant, single, "right"))
    for outcome in ranks:
        assert error(outcome, expected) < TOLERANCE
        torch.testing.assert_close(torch.tensor(outcome.cosines), expected[1], rtol=0.0, atol=1e-4)
        torch.testing.assert_close(outcome.x, expected[2], rtol=TOLERANCE, atol=TOLERANCE)
        assert outcome.alphas == ranks[0].alphas, "the rate is not the same bits on all ranks"
        assert outcome.cosines == ranks[0].cosines
        assert outcome.cut_over == [0, 1]


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_of_two_groups_has_its_own_rate(variant, results):
    [first, second] = results("stages", (2, variant, False, "right"))[0].alphas[-1]
    assert abs(first / second - 1) > 0.1


@crossed
def test_local_sum_is_noticed(stage, variant, groups, results):
    single = GROUPS[groups]
    ranks = results("stages", (stage, variant, single, "local"))
    assert max(error(outcome, alone(variant, single)) for outcome in ranks) > 1e2 * TOLERANCE


@crossed
def test_resumed_equals_not_stopped(stage, variant, groups, results):
    case = (stage, variant, GROUPS[groups])
    for straight, resumed in zip(results("stages", (*case, "right")), results("stages", (*case, "resumed")), strict=True):
        assert resumed.alphas == straight.alphas
        assert torch.equal(resumed.x, straight.x)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no group", r"slices made by DeepSpeed ZeRO.*elra_hf.adapters.deepspeed.sharding_group\(model, config\)"),
        *((f"one rate for two groups, ZeRO-{stage}", 'sees 1 of 2 parameters.*scope="group"') for stage in STAGES),
        ("sub-groups", "sub_group_size=40 .* 193 numbers .* Raise it to 2.1e.02"),
        ("sub-groups, group passed by hand", r"sees 1 of \d parameters.*sub_group_size"),
        ("offload", "offload_optimizer.device='cpu' .* DeepSpeedCPUAdam"),
        ("AutoTP", "autotp_size=2 .* not supported"),
        ("averaged", "DeepSpeed lets the optimizer step copies or slices"),
        ("averaged, ours inside", "DeepSpeed ZeRO lets the optimizer step copies or slices"),
        ("snapshot", "find the rate without DeepSpeed"),
    ],
)
def test_refused(case, message, results):
    for said in results("behaviour", case):
        assert re.search(message, said), said


def test_refused_before_there_are_ranks():
    with pytest.raises(RuntimeError, match=r"call deepspeed.init_distributed\(\)"):
        sharding_group(torch.nn.Linear(2, 2), {"zero_optimization": {"stage": 2}})


@pytest.mark.parametrize(("case", "tolerance"), [("stage 0, float32", TOLERANCE), ("stage 0, bfloat16", 0.2)])
def test_stage_0_is_not_cut_and_shares_one_rate(case, tolerance, results):
    for outcome in results("behaviour", case):
        assert error(outcome, alone("elra_c2min", False, scope="global")) < tolerance


def test_accelerate(results):
    for outcome in results("behaviour", "accelerate"):
        assert error(outcome, alone("elra_c2min", True)) < TOLERANCE
        assert outcome.cut_over == [0, 1]


# ---- the Trainer -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trainer_folder():
    with tempfile.TemporaryDirectory() as folder:
        yield folder


@pytest.mark.parametrize(("stage", "decay"), [(2, 0.0), (2, 0.1), (3, 0.0)])
def test_trainer(stage, decay, results, trainer_folder, tmp_path):
    from tests.transformers.jobs import logs, run

    from .zero import KEYS, OPTIONS, TRAINED, calm

    options = {**OPTIONS, "weight_decay": decay, "optim_args": TRAINED[stage, decay]}
    expected = run(tmp_path, model=calm(), **options)
    ranks = results("trainer", (stage, decay), folder=trainer_folder)
    truth = torch.tensor(logs(expected, *KEYS))
    for rank, (logged, alphas, warned, resumed) in enumerate(ranks):
        torch.testing.assert_close(torch.tensor(logged), truth, rtol=1e-3, atol=1e-4)
        assert alphas == ranks[0][1]
        assert resumed[6:] == logged[6:]
        assert len(alphas) == (2 if decay else 1)
        assert len(warned) == (1 if decay and rank == 0 else 0)


def test_trainer_refuses_one_rate_for_two_groups(results, trainer_folder):
    for said in results("trainer", "one rate asked for", folder=trainer_folder):
        assert re.search("scope=global .* --weight_decay 0.1 .* give --weight_decay 0", said), said


def test_accelerate_launch_with_the_recipes_config(tmp_path):
    from tests.transformers.jobs import logs, run

    from .zero import KEYS, OPTIONS, calm

    config = ("--config_file", "recipes/configs/zero2.yaml", "--main_process_port", "0")
    command = (sys.executable, "-m", "accelerate.commands.launch", *config, "-m", "tests.distributed.zero", str(tmp_path))
    run_processes([command], timeout=150, env={"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"})
    engine, logged = json.loads((tmp_path / "logs.json").read_text())
    assert engine == "DeepSpeedEngine"
    truth = logs(run(tmp_path / "alone", model=calm(), **OPTIONS), *KEYS)
    torch.testing.assert_close(torch.tensor(logged), torch.tensor(truth), rtol=1e-3, atol=1e-4)
