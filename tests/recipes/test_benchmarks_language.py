"""The bench's language models, on a text and nets made for the test."""

import pytest
import torch

from recipes.benchmarks import language, tasks
from recipes.benchmarks.language import LANGUAGE, Size
from recipes.benchmarks.run import TASKS

TINY = Size(vocabulary=300, layers=1, width=32, rows=4, length=16, kept_steps=3)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(language, "library_files", lambda: [f"def f{i}(x):\n    return x * {i}\n" for i in range(400)])
    monkeypatch.setattr(language, "shakespeare_text", lambda: "To be, or not to be, that is the question:\n" * 200)
    for cached in (language.tokenizer, language.tokens):
        cached.cache_clear()
    yield
    for cached in (language.tokenizer, language.tokens):
        cached.cache_clear()


def test_any_text_survives_the_tokenizer_and_its_ids_fit_the_vocabulary():
    bpe = language.tokenizer(300)
    told = "def naïve(x): return '☃' # To be\n\t"
    assert bpe.decode(bpe.encode(told).ids) == told
    assert len(bpe.encode("    return x * 7\n").ids) < len("    return x * 7\n")
    for text in ("python", "shakespeare"):
        assert int(language.tokens(text, 300).max()) < 300


def test_the_parts_of_a_text_share_no_token():
    cut = language.parts(torch.arange(1000))
    assert [len(part) for part in cut.values()] == [800, 100, 100]
    assert torch.equal(torch.cat([*cut.values()]), torch.arange(1000))


@pytest.mark.parametrize("build", [language.from_scratch(TINY), language.fine_tuned(TINY), language.fine_tuned(TINY, 2)])
def test_a_seed_fixes_weights_and_batches_and_nothing_else(build):
    one, two, other = (build(seed) for seed in (1, 1, 2))
    assert torch.equal(next(one.batches)[0], next(two.batches)[0])
    assert not torch.equal(next(one.batches)[0], next(other.batches)[0])
    assert all(map(torch.equal, one.model.state_dict().values(), two.model.state_dict().values()))
    assert torch.equal(one.splits["test"][0][0], other.splits["test"][0][0])
    assert next(one.batches)[0].shape == (4, 16)


def test_a_net_that_is_kept_is_trained_once(monkeypatch):
    first = TINY.trained().state_dict()
    monkeypatch.setattr(language, "next_token", None)  # training would fail
    assert all(map(torch.equal, first.values(), TINY.trained().state_dict().values()))
    assert not torch.equal(first["transformer.wte.weight"], TINY.net(0).state_dict()["transformer.wte.weight"])


def test_adapters_alone_are_trained_and_leave_the_net_as_it_is_at_first():
    adapted, whole = language.fine_tuned(TINY, 2)(1), language.fine_tuned(TINY)(1)
    trained = {name: p for name, p in adapted.model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    assert sum("lora_B" in name for name in trained) == 4  # attention, its projection, two of the MLP
    assert not any(p.any() for name, p in trained.items() if "lora_B" in name)
    batch = adapted.splits["test"][0]
    torch.testing.assert_close(adapted.loss(adapted.model, batch), whole.loss(whole.model, batch))


def test_the_head_is_tied_and_the_base_net_has_three_million_parameters():
    net = language.BASE.net(0)
    assert net.lm_head.weight is net.transformer.wte.weight
    assert sum(p.numel() for p in net.parameters()) > 3e6


def test_the_probe_starts_at_zero(monkeypatch):
    rows = torch.randn(100, 5, 384), torch.ones(100, 5, dtype=torch.long), torch.arange(100) % 6
    monkeypatch.setattr(language, "half_way", lambda name, length, frozen: rows)
    probe = language.probe(1)
    assert not any(p.any() for p in probe.model.parameters())
    assert probe.loss(probe.model, next(probe.batches)).item() == pytest.approx(torch.log(torch.tensor(6.0)).item())


def test_the_long_task_predicts_the_character_that_follows():
    problem = LANGUAGE["python-ngram"].build(1)
    before, character = next(problem.batches)
    assert before.shape == (32, 8)
    row = torch.cat([before[0], character[:1]])
    text = tasks.python_source()
    assert (text.unfold(0, 9, 1) == row).all(1).any()
    assert LANGUAGE["python-ngram"].steps == 10_000


def test_the_suites_have_them():
    assert {*LANGUAGE} <= {*TASKS}
    assert {name for name, task in LANGUAGE.items() if task.quick} == {"gpt-small", "gpt-small-lora"}
