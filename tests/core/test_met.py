"""Entries that meet their first gradient late, as rows of an embedding do: they must not drown what the others say."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from elra_hf import ElraAdamW

WORDS, STEPS = 2000, 200


def rates(turn_about, scope):
    """α of each step: of two embeddings with a head in common, whose words are new most of the time."""
    torch.manual_seed(0)
    embeddings = [nn.Embedding(WORDS, 16) for _ in range(2)]
    head = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
    classes = torch.randint(0, 4, (2, WORDS))
    groups = [{"params": embeddings[0].parameters()}, {"params": [*embeddings[1].parameters(), *head.parameters()]}]
    optimizer = ElraAdamW(groups, lr=1e-3, scope=scope)
    found = []
    for step in range(STEPS):
        optimizer.zero_grad()
        for k in [step % 2] if turn_about else [0, 1]:
            x = (WORDS * torch.rand(16) ** 3).long()
            cross_entropy(head(embeddings[k](x)), classes[k][x]).backward()
        optimizer.step()
        found.append(float(optimizer.param_groups[0]["alpha"]))
    return torch.tensor(found)


@pytest.mark.parametrize("scope", ["global", "group"])
def test_tensors_that_move_turn_about_let_the_rate_rise_as_where_all_move(scope):
    expected, found = rates(False, scope), rates(True, scope)
    assert expected[-1] > 2 * expected[0]
    assert found[-1] > 0.5 * expected[-1]
