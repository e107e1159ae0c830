"""--precision bf16: the networks' passes in losses run under autocast, and those alone."""

import pytest
import torch
import torch.nn.functional as F
from tools import Toy, flat, training

import metapt


def hypergradient_of(run: metapt.Training, solver: metapt.Solver) -> metapt.Hypergradient:
    """On all examples of the parts."""
    domain = run.domain
    torch.manual_seed(0)
    index = {part: torch.arange(n) for part, n in domain.sizes.items()}
    return metapt.hypergradient(
        domain.pretrain_loss(run.network, run.meta, index["pretrain"], 1.0, live=False),
        domain.finetune_loss(run.network, run.head, "finetune", index["finetune"]),
        domain.finetune_loss(run.network, run.head, "validation", index["validation"]),
        metapt.detached(run.network),
        run.psi,
        metapt.detached(run.meta),
        unroll=domain.settings.unroll,
        solver=solver,
    )


@pytest.fixture
def dtypes(monkeypatch) -> list:
    """Those of what the encoder gives, as PT's head or whoever asked for features gets it."""
    seen = []
    real = Toy.network

    def network(self):
        made = real(self)
        first = made.encoder[0]
        first.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
        return made

    monkeypatch.setattr(Toy, "network", network)
    return seen


@pytest.mark.parametrize("precision, dtype", [("bf16", torch.bfloat16), ("float32", torch.float32)])
def test_losses_have_the_precision_and_all_that_is_kept_is_float32(precision, dtype, dtypes):
    run = training(precision=precision)
    dtypes.clear()
    run.run()
    assert set(dtypes) == {dtype}
    assert run.skipped == 0 and run.meta_steps
    q = hypergradient_of(run, metapt.Solver("cg", 2, damping=5.0)).q
    moments = [t for state in run.optimizer.state.values() for t in state.values()]
    kept = [
        *run.network.state_dict().values(),
        *run.meta.state_dict().values(),
        *run.psi.values(),
        *moments,
        run.ft_states["head"]["exp_avg"],
        *q.values(),
    ]
    assert {t.dtype for t in kept if t.is_floating_point()} == {torch.float32}
    points = run.domain.points["test"]
    assert metapt.call(run.network, metapt.detached(run.network), points).dtype == torch.float32


def test_what_measures_an_encoder_runs_in_float32(dtypes):
    run = training(precision="bf16", measure_scope="all").run()
    dtypes.clear()
    metapt.finetune(run.domain, run.network, 10, 0)
    assert set(dtypes) == {torch.float32}


@pytest.mark.parametrize("hvp", ["exact", "finite"])
@pytest.mark.parametrize("method", ["identity", "cg"])
def test_hypergradients_under_bf16_are_those_of_float32(method, hvp):
    settings = {"hvp": hvp, "solver": method, "damping": 5.0, "jitter": 0.0}
    run = training(precision="bf16", **settings).run()
    lower = hypergradient_of(run, run.settings.inverse).phi
    run.network.precision = "float32"
    plain = hypergradient_of(run, training(**settings).settings.inverse).phi
    assert not torch.equal(flat(lower), flat(plain))
    assert F.cosine_similarity(flat(lower), flat(plain), dim=0) > 0.95


def test_finite_products_under_bf16_step_further_unless_they_are_told_how_far():
    def step_of(**given):
        return training(hvp="finite", **given).settings.inverse.step

    assert step_of() is None
    assert step_of(precision="bf16") == metapt.BF16_STEP
    assert step_of(precision="bf16", hvp_step=0.5) == 0.5
    message = "--hvp-step is 0.01, expected 0.1 or more with --precision bf16"
    with pytest.raises(metapt.BadInput, match=message):
        step_of(precision="bf16", hvp_step=0.01)
