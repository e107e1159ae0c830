"""A PT step of `Training` does what a plain loop does, for at most a tenth more operations."""

from pathlib import Path

import pytest
import torch

from bench.costs import counting, pretrain_step

# The network of electrocardiograms is as deep as ever, so that its operations are those of a run.
SMALL = {"ecg": {"width": 1, "batch_size": 8, "unroll_batch_size": 8}}
AT_MOST = 1.1


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return pretrain_step.make_up(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("name", pretrain_step.PAIRS)
def test_both_loops_move_theta_and_psi_alike(name, data):
    training, plain = pretrain_step.both_loops(name, data, **SMALL.get(name, {}))
    at_the_start = {key: value.clone() for key, value in plain.network.state_dict().items()}
    for draw in range(5):
        torch.manual_seed(draw)
        training.pretrain_step()
        torch.manual_seed(draw)
        plain.step()
    ours = training.network.state_dict()
    for key, value in plain.network.state_dict().items():
        assert torch.equal(ours[key], value), key
    for key, p in plain.network.named_parameters():
        assert not torch.equal(at_the_start[key], p), key
    for key, value in plain.head.named_parameters():
        torch.testing.assert_close(training.psi[key], value.detach())
    losses = training.losses
    assert torch.equal(losses["pretrain_loss"], plain.pretrain_value)
    torch.testing.assert_close(losses["finetune_loss"], plain.finetune_value)


@pytest.mark.parametrize("name", pretrain_step.PAIRS)
def test_a_step_takes_at_most_a_tenth_more_operations_than_the_plain_loop(name, data):
    row = pretrain_step.counts(name, data, **SMALL.get(name, {}))
    assert row["operations"]["training"] <= AT_MOST * row["operations"]["plain"], row
    assert row["flops"]["training"] == row["flops"]["plain"]


def test_operations_by_name_are_those_that_are_counted():
    t = torch.ones(3)

    def work():
        return (t + t).detach() * t

    found = counting.operations_by_name(work)
    assert found == {"aten::add": 1, "aten::detach": 1, "aten::mul": 1}
    assert counting.operations(work) == 3
