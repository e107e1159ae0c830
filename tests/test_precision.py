"""--precision bf16 and --compile: the network's passes in losses, and those alone."""

import pytest
import torch
import torch.nn.functional as F
from tools import Toy, flat, main_in, refused, strict_json, training
from torch import nn

import metapt

ROTATION = "digits-rotation"
FINITE = {"hvp": "finite", "solver": "identity", "damping": 0.0, "jitter": 0.0}


def hypergradient(learner: metapt.Learner, solver: metapt.Solver) -> metapt.Hypergradient:
    domain, network, head = learner.domain, learner.network, learner.head
    torch.manual_seed(0)
    index = {part: torch.arange(n) for part, n in domain.sizes.items()}
    return metapt.hypergradient(
        domain.pretrain_loss(network, learner.meta, index["pretrain"], 1.0, live=False),
        *(domain.finetune_loss(network, head, part, index[part]) for part in ("finetune", "validation")),
        metapt.detached(network), learner.psi, metapt.detached(learner.meta), unroll=domain.settings.unroll, solver=solver,
    )  # fmt: skip


@pytest.fixture
def dtypes(monkeypatch) -> list:
    """Those of what the encoder gives, as PT's head or whoever asked for features gets it."""
    seen = []
    real = Toy.network

    def network(self):
        made = real(self)
        made.encoder[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
        return made

    monkeypatch.setattr(Toy, "network", network)
    return seen


@pytest.mark.parametrize("precision, dtype", [("bf16", torch.bfloat16), ("float32", torch.float32)])
def test_passes_of_losses_have_the_precision_and_all_that_is_kept_is_float32(precision, dtype, dtypes):
    run = training(precision=precision)
    dtypes.clear()
    learner = run.run().best
    assert set(dtypes) == {dtype} and learner.skipped == 0 and learner.meta_steps
    kept = [*learner.network.state_dict().values(), *learner.meta.state_dict().values(), *learner.psi.values()]
    kept += [t for state in learner.optimizer.state.values() for t in state.values()]
    kept += [
        learner.ft_states["head"]["exp_avg"],
        *hypergradient(learner, metapt.Solver("cg", 2, damping=5.0)).q.values(),
    ]
    assert {t.dtype for t in kept if t.is_floating_point()} == {torch.float32}
    outputs = metapt.call(learner.network, metapt.detached(learner.network), learner.domain.points["test"])
    assert outputs.dtype == torch.float32


def test_what_measures_an_encoder_runs_in_float32(dtypes):
    run = training(precision="bf16", measure_scope="all").run()
    dtypes.clear()
    metapt.finetune(run.domain, run.best.network, 10, 0)
    assert set(dtypes) == {torch.float32}


@pytest.mark.parametrize("hvp", ["exact", "finite"])
@pytest.mark.parametrize("method", ["identity", "cg"])
def test_hypergradients_under_bf16_are_those_of_float32(method, hvp):
    settings = {"hvp": hvp, "solver": method, "damping": 5.0, "jitter": 0.0}
    learner = training(precision="bf16", **settings).run().best
    lower = hypergradient(learner, learner.domain.settings.inverse).phi
    learner.network.precision = "float32"
    plain = hypergradient(learner, training(**settings).domain.settings.inverse).phi
    assert not torch.equal(flat(lower), flat(plain))
    assert F.cosine_similarity(flat(lower), flat(plain), dim=0) > 0.95


def test_finite_products_under_bf16_step_further_unless_they_are_told_how_far():
    of = lambda **given: training(hvp="finite", **given).domain.settings.inverse.step
    assert (of(), of(precision="bf16"), of(precision="bf16", hvp_step=0.5)) == (None, metapt.BF16_STEP, 0.5)
    with pytest.raises(metapt.BadInput, match=r"--hvp-step is 0.01, expected 0.1 or more with --precision bf16"):
        of(precision="bf16", hvp_step=0.01)


def test_compiling_without_finite_products_is_refused(tmp_path):
    assert "--compile needs --hvp finite" in refused(tmp_path, "meta", ROTATION, "--compile")
    both = ("--hvp=finite", "--unroll-hvp=exact", "--unroll-scope=all")
    assert "--compile needs --hvp finite" in refused(tmp_path, "meta", ROTATION, "--compile", *both)
    assert "--precision" in refused(tmp_path, "meta", ROTATION, "--precision=half")
    assert not list(tmp_path.iterdir())


class Dropping(Toy):
    """With dropout, and in float64, where rounding hides nothing."""

    dtype, bias, step = torch.float64, True, None

    def __init__(self, *given):
        super().__init__(*given)
        self.points = {part: points.to(self.dtype) for part, points in self.points.items()}

    def network(self):
        encoder = nn.Sequential(nn.Linear(4, 6, self.bias), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.2))
        return metapt.Network(encoder, nn.Linear(6, 2)).to(self.dtype)

    def head(self):
        return super().head().to(self.dtype)

    def meta(self):
        return super().meta().to(self.dtype)


class Single(Dropping):
    """In float32, without what makes rounding large: a bias before BatchNorm, whose gradient is rounding alone and as good as any
    other to Adam, and short differences.
    """

    dtype, bias, step = torch.float32, False, 0.1


WAYS = {"identity": FINITE | {"unroll_hvp": "exact"}, "cg": FINITE | {"solver": "cg", "terms": 2, "damping": 5.0}}


def require_the_same_run(kind: type[Toy], near: float, solver: str) -> None:
    """Losses, θ, ψ, φ and BatchNorm's statistics, without and with --compile."""
    found = []
    for compiled in (False, True):
        metapt.compiled_call.cache_clear()
        torch._dynamo.reset()
        given = {"steps": 12, "particles": "2:0.9,1", "hvp_step": kind.step, **WAYS[solver]}
        learner = training(kind, compile=compiled, **given).run().best
        assert learner.meta_steps == 2 and learner.skipped == 0
        losses = torch.tensor([float(value) for value in learner.losses.values()][:3], dtype=kind.dtype)
        found.append({"loss": losses, **learner.network.state_dict(), **learner.psi, "phi": flat(learner.meta)})
    metapt.compiled_call.cache_clear()
    torch.testing.assert_close(found[1], found[0], rtol=near, atol=near / 10)


@pytest.mark.parametrize("solver", WAYS)
def test_a_traced_run_has_the_same_numbers(solver, monkeypatch):
    """All of --compile but the code that is made in the end: no compiler of C++ is needed."""
    used, real = [], torch.compile

    def traced(function, options):
        def backend(graph, examples):
            used.append(graph)
            return torch._dynamo.lookup_backend("aot_eager")(graph, examples)

        return real(function, backend=backend)

    monkeypatch.setattr(torch, "compile", traced)
    require_the_same_run(Dropping, 1e-9, solver)
    assert len(used) >= 4  # PT, FT's head, L_V, L_PT of the meta step


@pytest.mark.slow
@pytest.mark.parametrize("kind, near", [(Dropping, 1e-9), (Single, 1e-4)])
@pytest.mark.parametrize("solver", WAYS)
def test_a_compiled_run_has_the_same_numbers(kind, near, solver):
    from torch._inductor import cpp_builder

    try:
        cpp_builder.get_cpp_compiler()
    except RuntimeError as error:
        pytest.skip(f"no C++ compiler: {error}".splitlines()[0])
    require_the_same_run(kind, near, solver)


def test_without_a_compiler_that_is_one_line_and_status_1(tmp_path, monkeypatch):
    def missing(function, options):
        def backend(graph, examples):
            raise RuntimeError("no compiler here\n\nCommand: and so on")

        return real(function, backend=backend)

    real = torch.compile
    monkeypatch.setattr(torch, "compile", missing)
    metapt.compiled_call.cache_clear()
    given = ("--steps=4", "--compare=0", "--json")
    code, out, err = main_in(tmp_path, "pretrain", ROTATION, "--compile", *given)
    metapt.compiled_call.cache_clear()
    assert (code, out, err.splitlines()[-1]) == (1, "", "metapt: no compiler here")
    monkeypatch.undo()
    code, out, _ = main_in(tmp_path, "pretrain", ROTATION, "--precision=bf16", *given)
    assert code == 0 and strict_json(out)["pt_steps"] == 4
