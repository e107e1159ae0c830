"""torch.compile: a compiled run has the numbers of one that is not."""

import pytest
import torch
from tools import Toy, domain_of, flat
from torch import nn

import metapt
from bench.studies import compile as study

pytestmark = pytest.mark.filterwarnings("ignore:‖Hq − v‖")


class Dropping(Toy):
    """With dropout, and in float64, where rounding hides nothing."""

    dtype = torch.float64
    bias = True
    step = None

    def __init__(self, settings, device, data):
        super().__init__(settings, device, data)
        self.points = {part: points.to(self.dtype) for part, points in self.points.items()}

    def network(self):
        encoder = nn.Sequential(
            nn.Linear(4, 6, self.bias), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.2)
        )
        return metapt.Network(encoder, nn.Linear(6, 2)).to(self.dtype)

    def head(self):
        return super().head().to(self.dtype)

    def meta(self):
        return super().meta().to(self.dtype)


class Single(Dropping):
    """In float32, without what makes rounding large: short differences, a bias before BatchNorm.

    The gradient of such a bias is rounding alone, and to Adam as good as any other.
    """

    dtype = torch.float32
    bias = False
    step = 0.1


FINITE = {"hvp": "finite", "solver": "identity", "damping": 0.0, "jitter": 0.0}
WAYS = {
    "identity": {**FINITE, "unroll_hvp": "exact"},
    "cg": {**FINITE, "solver": "cg", "terms": 2, "damping": 5.0},
}


@pytest.fixture(autouse=True)
def afresh():
    """Nothing is compiled before a test, and nothing stays after it."""
    study.compiled_call.cache_clear()
    torch._dynamo.reset()
    yield
    study.compiled_call.cache_clear()
    torch._dynamo.reset()


def run(kind: type[Toy], solver: str, compiled: bool) -> dict:
    """Losses, θ, ψ, φ and BatchNorm's statistics."""
    domain = domain_of(kind, steps=12, hvp_step=kind.step, **WAYS[solver])
    training = metapt.Training(domain, learn=True)
    training.network.compiled = compiled
    with study.compiling():
        training.run()
    assert training.meta_steps == 2
    assert training.skipped == 0
    names = ("pretrain_loss", "finetune_loss", "validation_loss")
    losses = torch.tensor([float(training.losses[name]) for name in names], dtype=kind.dtype)
    state = training.network.state_dict()
    return {"losses": losses, **state, **training.psi, "phi": flat(training.meta)}


def require_the_same_run(kind: type[Toy], near: float, solver: str) -> None:
    plain = run(kind, solver, compiled=False)
    compiled = run(kind, solver, compiled=True)
    torch.testing.assert_close(compiled, plain, rtol=near, atol=near / 10)


def with_backend(monkeypatch, backend) -> None:
    """Code is made by a backend, not by a compiler of C++."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, options: real(function, backend=backend))


@pytest.mark.parametrize("solver", ["identity", pytest.param("cg", marks=pytest.mark.slow)])
def test_a_traced_run_has_the_same_numbers(solver, monkeypatch):
    """All of it but the code that is made in the end: no compiler of C++ is needed."""
    graphs = []

    def backend(graph, examples):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, examples)

    with_backend(monkeypatch, backend)
    require_the_same_run(Dropping, 1e-9, solver)
    # PT, FT's head, L_V, L_PT of the meta step.
    assert len(graphs) >= 4


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "near"), [(Dropping, 1e-9), (Single, 1e-4)])
@pytest.mark.parametrize("solver", WAYS)
def test_a_compiled_run_has_the_same_numbers(kind, near, solver):
    from torch._inductor import cpp_builder

    try:
        cpp_builder.get_cpp_compiler()
    except RuntimeError as error:
        pytest.skip(f"no C++ compiler: {error}".splitlines()[0])
    require_the_same_run(kind, near, solver)


def test_networks_that_are_not_marked_are_not_compiled(monkeypatch):
    def refuse(function, options):
        raise AssertionError("compiled")

    monkeypatch.setattr(torch, "compile", refuse)
    plain = torch.func.functional_call
    run(Dropping, "identity", compiled=False)
    assert torch.func.functional_call is plain


def test_differences_and_times_are_told(monkeypatch):
    with_backend(monkeypatch, "aot_eager")
    given = {**study.SETTINGS, "hvp_step": 0.1}
    domain = domain_of(Single, **given)
    taken, first = study.seconds_of_steps(domain, repeats=1)
    assert set(taken) == {(s, c) for s in ("pt_step", "meta_step") for c in (False, True)}
    assert first > 0
    apart = study.differences(metapt.Training(domain, learn=True))
    assert apart.keys() == {"loss_difference", "gradient_difference", "hypergradient_difference"}
    assert all(difference < 1e-4 for difference in apart.values())


def test_without_a_compiler_that_is_one_line_and_status_1(monkeypatch, capsys):
    def backend(graph, examples):
        raise RuntimeError("no compiler here\n\nCommand: and so on")

    with_backend(monkeypatch, backend)
    monkeypatch.setattr(study, "make", lambda *given, **settings: domain_of(Single, **settings))
    with pytest.raises(study.typer.Exit) as ended:
        study.main()
    assert ended.value.exit_code == 1
    assert capsys.readouterr().out == "torch.compile: no compiler here\n"
