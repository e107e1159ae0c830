"""How often a step would make the host wait for an accelerator, counted on the CPU for every
domain.
"""

from pathlib import Path

import pytest
import torch

import metapt
from bench.costs import counting, made_up

SMALL = {
    "ecg": {
        "width": 1,
        **dict.fromkeys(
            ("batch_size", "meta_batch_size", "unroll_batch_size", "validation_batch_size"), 8
        ),
    },
    "ppi": {"width": 8, "meta_batch_size": 16, "validation_batch_size": 16},
}


# Of a PT step. The sentences of `sources` are drawn by φ, on the host.
PT_WAITS = {"sources": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    made_up.ecg(folder, 60)
    made_up.ppi(folder)
    made_up.mnist(folder)
    made_up.sources(folder)
    return folder


def training_of(name: str, data: Path, **given) -> metapt.Training:
    """One that has made its first steps, in the middle of a round."""
    kind = metapt.find_domain(name)
    domain = kind(
        kind.Settings(warmup=0, **{**SMALL.get(name, {}), **given}), torch.device("cpu"), data
    )
    if name == "ppi":
        domain.graphs.check()  # as it is on an accelerator from the start
    training = metapt.Training(domain, learn=True)
    domain.begin_episode(training.meta)
    training.pretrain_step()
    training.meta_step()
    return training


@pytest.mark.parametrize("name", metapt.DOMAINS)
@pytest.mark.parametrize(
    "hvp, unroll_hvp", [("exact", "exact"), ("finite", "exact"), ("finite", "finite")]
)
def test_no_wait_in_a_pt_step_and_two_in_a_meta_step(name, hvp, unroll_hvp, data):
    ways = {
        "hvp": hvp,
        "unroll_hvp": unroll_hvp,
        "unroll_steps": 2 if unroll_hvp == "finite" else 1,
    }
    training = training_of(name, data, solver="identity", damping=0.0, **ways)
    for _ in range(3):
        found = counting.waits(lambda: training.pretrain_step())
        assert found.total() == PT_WAITS.get(name, 0), found
    found = counting.waits(lambda: training.meta_step())  # where φ is averaged, too
    assert training.skipped == 0 and found.total() == 2, found


@pytest.mark.parametrize("name", metapt.DOMAINS)
@pytest.mark.parametrize("hvp", ["exact", "finite"])
def test_a_cg_iteration_is_one_wait_more(name, hvp, data):
    training = training_of(name, data, solver="cg", terms=4, damping=30.0, hvp=hvp)
    found = counting.waits(lambda: training.meta_step())
    assert training.skipped == 0 and found.total() == 3 + 4, found


def test_the_adam_metric_waits_for_nothing(data):
    training = training_of(
        "digits-noise", data, solver="identity", preconditioner="adam", unroll_hvp="exact"
    )
    found = counting.waits(lambda: training.meta_step())
    assert training.skipped == 0 and found.total() == 2, found


def test_a_new_epoch_is_no_wait():
    batches = metapt.Batches(10, 4)
    assert not counting.waits(
        lambda: [metapt.to_device(batches.next(), torch.device("cpu")) for _ in range(7)]
    )


def waiting(t: torch.Tensor) -> dict:
    """What should be counted once, of a tensor with 1, 0, 2."""
    return {
        "bool": lambda: bool(t[0]),
        "item": lambda: t[0].item(),
        "mask": lambda: t[t > 0],
        "nonzero": lambda: t.nonzero(),
        "any": lambda: 1 if (t > 0).any() else 0,
        "equal": lambda: torch.equal(t, t),
        "tolist": lambda: t.tolist(),
        "to": lambda: t.to("cpu"),
        "tensor": lambda: torch.tensor([1.0], device=t.device),
        "cpu": lambda: t.cpu(),
        "put": lambda: t.clone().index_put_((t > 0,), torch.tensor(1.0)),
        "repeat": lambda: t.repeat_interleave(t.long()),
        "unique": lambda: t.unique(),
    }


@pytest.mark.parametrize("name", waiting(torch.ones(3)))
def test_what_waits_is_counted(name):
    assert counting.waits(waiting(torch.tensor([1.0, 0, 2]))[name]).total() == 1


def test_what_does_not_wait_is_not_counted():
    t, index = torch.tensor([1.0, 0, 2]), torch.tensor([0, 1])
    for work in (
        lambda: t[index],
        lambda: t.to("cpu", non_blocking=True),
        lambda: t.to(torch.float64),
        lambda: t[1:] + 1,
        lambda: t.repeat_interleave(index.new_ones(3), output_size=3),
        lambda: torch.randn(()).item(),
        lambda: torch.where(t > 0, t, 0),
    ):
        assert not counting.waits(work)
