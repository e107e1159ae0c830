"""How costs grow, by counts that are the same everywhere; timings only with --benchmark-only."""

import functools
import json

import numpy as np
import pytest
import torch

from bench.costs import baseline, scaling
from bench.costs.scaling import Size

SMALL = Size(width=64, weights=100, batch=32)


def cost(**changes) -> dict:
    return scaling.measure(SMALL._replace(**changes), repeats=0)


def test_costs_are_those_of_the_baseline():
    stored = json.loads(baseline.PATH.read_text())
    found = baseline.costs()
    assert list(found) == list(stored["costs"])
    # Another torch saves other tensors
    slack = 1.0 if torch.__version__.split("+")[0] == stored["torch"] else 1.05
    for name, now in found.items():
        for kind, value in now.items():
            before = stored["costs"][name][kind]
            assert before / slack <= value <= before * slack, (
                f"{name}: {kind} {before:,} → {value:,}; "
                "if that is meant, run python -m bench.costs.baseline"
            )


@pytest.mark.parametrize("hvp", ["exact", "finite"])
def test_memory_is_flat_in_terms_and_in_pretraining_steps(hvp):
    plain = cost(hvp=hvp, terms=1)["meta_step_bytes"]
    assert all(cost(hvp=hvp, terms=terms)["meta_step_bytes"] == plain for terms in (2, 10, 50))
    assert all(cost(hvp=hvp, pt_steps=steps)["meta_step_bytes"] == plain for steps in (10, 100))


@pytest.mark.parametrize("scope", ["head", "all"])
def test_memory_is_linear_in_finetuning_steps_and_flat_with_finite(scope):
    steps = np.array([20, 40, 80])
    exact = [cost(ft_steps=int(k), scope=scope)["meta_step_bytes"] for k in steps]
    assert exact[2] - exact[1] == pytest.approx(2 * (exact[1] - exact[0]), rel=0.01)
    rows = [cost(ft_steps=int(k), scope=scope, hvp="finite") for k in steps]
    assert all(row["meta_step_bytes"] <= 1.1 * row["pt_step_bytes"] for row in rows)


@pytest.mark.parametrize("hvp", ["exact", "finite"])
def test_a_term_costs_two_passes_at_most(hvp):
    few, many = cost(hvp=hvp, terms=10), cost(hvp=hvp, terms=60)
    assert (many["meta_step_flops"] - few["meta_step_flops"]) / 50 <= 2.0 * few["pt_step_flops"]


def test_costs_do_not_depend_on_the_number_of_meta_parameters():
    rows = [cost(weights=n) for n in (1, 1000, 1_000_000)]
    assert (
        len({row["meta_step_flops"] for row in rows})
        == len({row["meta_step_bytes"] for row in rows})
        == 1
    )


def test_kronecker_factors_of_one_example_invert_its_gauss_newton_matrix_layer_by_layer(
    monkeypatch,
):
    """There a layer's block is one Kronecker product, so that nothing is approximated: weight and
    scale of the squared error.
    """
    pytest.importorskip("curvlinops")
    monkeypatch.setattr(
        scaling.peers, "kronecker", functools.partial(scaling.peers.kronecker, fisher="type-2")
    )
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        work = scaling.Workload(SMALL._replace(width=5, batch=1, factors=True))
        work.phi["weights"].normal_()
        theta = {name: t.detach() for name, t in work.theta.items()}
        r = {name: torch.randn_like(t) for name, t in theta.items()}
        found, weight = work.kronecker(theta)(r), 2 * work.phi["weights"][work.rows].sigmoid()
        for name, t in theta.items():

            def outputs(w, name=name):
                at = {**theta, name: w}
                return work.hidden(at, work.x) @ at["head"]

            slopes = torch.func.jacrev(outputs)(t).reshape(32, -1)
            # Of the mean over 32 outputs
            block = weight * 2 / 32 * slopes.T @ slopes + 0.1 * torch.eye(t.numel())
            torch.testing.assert_close(
                found[name].flatten(), torch.linalg.solve(block, r[name].flatten())
            )
    finally:
        torch.set_default_dtype(usual)


@pytest.mark.parametrize("step", ["pt_step", "exact", "finite"])
def test_time(benchmark, step):
    work = scaling.Workload(scaling.CENTRE._replace(hvp="exact" if step == "pt_step" else step))
    benchmark.group = "width 256, batch 128"
    benchmark(work.pt_step if step == "pt_step" else work.meta_step)
