"""What bench.studies.bootstrap counts and measures, where it is known."""

import json

import pytest
import torch

from bench.studies import bootstrap


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_features_along_so_many_directions_alike_have_that_effective_rank(rank):
    torch.manual_seed(0)
    rows = torch.randn(200, rank, dtype=torch.float64)
    rows = torch.linalg.qr(rows - rows.mean(0))[0]  # centred, and as long in each direction
    into = torch.linalg.qr(torch.randn(8, rank, dtype=torch.float64))[0]
    assert bootstrap.effective_rank(rows @ into.T + 5.0) == pytest.approx(rank, rel=1e-6)


def test_what_is_stored_is_of_the_setups_that_there_are():
    found = json.loads(bootstrap.STORED.read_text())
    assert list(found["costs"]) == list(bootstrap.COSTS)
    assert {name: tuple(of["steps"]) for name, of in found["ranks"].items()} == {
        name: steps for name, (_, steps) in bootstrap.RANKS.items()
    }
