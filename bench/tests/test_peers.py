"""The same estimates by other libraries: where they are installed (bench/requirements.txt), they
agree with ours.
"""

import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import metapt
from bench.accuracy import gradients, peers, problems
from bench.costs import libraries

# Not betty's cg: its next direction is made from the residual before the step, so it is not
# conjugate gradients.
SAME = [
    "higher, published procedure",
    "betty neumann",
    "torchopt neumann",
    "torchopt cg",
    "metapt neumann, finite",
    "metapt cg, finite",
    "higher, published procedure, Adam",
    "torchopt neumann, Adam",
]


@pytest.mark.parametrize("name", SAME)
def test_libraries_agree(name):
    task = libraries.Task("small")
    library = name.split()[0].rstrip(",")
    if library != "metapt":
        pytest.importorskip(library)
    function, method = libraries.ENTRIES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = function(task).detach()
    truth = libraries.ours(task, method)
    # TorchOpt takes Adam's 1 − β₂ᵗ in the default dtype, float32: off by 1e-5, with float64 as
    # default by 1e-15.
    assert ((found - truth).norm() / truth.norm()).item() < (
        1e-4 if name == "torchopt neumann, Adam" else 1e-5
    )


def test_sama_is_identity_preconditioned_by_all_of_adams_step():
    """And the Adam metric, which is its first term, is near it; without the metric the direction is
    another.
    """
    task = libraries.Task("small")
    whole, metric, identity = (
        libraries.ours(task, which) for which in ("sama", "Adam metric", "identity")
    )
    assert (
        F.cosine_similarity(whole, metric, 0) > 0.98
        and F.cosine_similarity(whole, identity, 0) < 0.9
    )
    hypergradient = pytest.importorskip("betty.hypergradient")
    if "sama" not in hypergradient.jvp_fn_mapping:
        pytest.skip("betty-ml 0.2 has it")
    assert ((libraries.betty(task, "sama") - whole).norm() / whole.norm()).item() < 1e-5


@pytest.mark.parametrize("steps", [1, 4])
def test_the_scales_are_derivatives_of_adams_step(steps):
    """By autograd through the rule written out, from the moments before the last of `steps`
    gradients.
    """
    draw = torch.Generator().manual_seed(0)
    theta, gradients = (
        {"w": torch.zeros(6).double()},
        torch.randn(steps, 6, generator=draw).double(),
    )
    optimizer = torch.optim.Adam(theta.values(), 0.1, eps=1e-12)
    for theta["w"].grad in gradients:
        optimizer.step()
    g, m, s = gradients[-1].clone().requires_grad_(), 0, 0
    for each in (*gradients[:-1], g):
        m, s = 0.9 * m + 0.1 * each, 0.999 * s + 0.001 * each**2
    root = (s / (1 - 0.999**steps)).sqrt()
    (whole,) = torch.autograd.grad((m / (1 - 0.9**steps) / root).sum(), g)
    torch.testing.assert_close(peers.adam_scale(optimizer, theta), 1 / root.detach())
    torch.testing.assert_close(peers.adam_scale(optimizer, theta, whole=True), whole)


def quadratic() -> tuple[problems.Problem, dict[str, torch.Tensor]]:
    """L_PT = ½ (θ − Bφ)ᵀA(θ − Bφ), L_V = ½ (θ − c)ᵀC(θ − c), without FT; and these matrices."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    def positive(size):
        root = normal(size, size)
        return root @ root.T / size + 0.5 * torch.eye(size, dtype=torch.float64)

    of = {"A": positive(5), "B": normal(5, 3), "C": positive(5), "c": normal(5), "φ": normal(3)}
    of |= {"start": normal(5)}

    def pretrain_loss(theta, phi):
        away = theta["w"] - of["B"] @ phi["f"]
        return away @ of["A"] @ away / 2

    def validation_loss(theta, psi):
        away = theta["w"] - of["c"]
        return away @ of["C"] @ away / 2

    p = problems.Problem(
        name="quadratic",
        pretrain_loss=pretrain_loss,
        finetune_loss=validation_loss,
        validation_loss=validation_loss,
        start={"w": of["start"]},
        theta={"w": of["B"] @ of["φ"]},
        psi={},
        phi={"f": of["φ"]},
        ft_lr=0.1,
        ft_steps=0,
        pt_lr=0.05,
        pt_steps=None,
        examples=1,
        exact=of["B"].T @ of["C"] @ (of["B"] @ of["φ"] - of["c"]),
    )
    return p, of


def off(found: torch.Tensor, truth: torch.Tensor) -> float:
    return ((found - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("strength", [1.0, 30.0])
def test_the_penalty_gradient_on_a_quadratic_is_that_of_its_closed_form(strength):
    """θ_λ = (A + C/λ)⁻¹(ABφ + Cc/λ) at the minimum of both terms together."""
    p, of = quadratic()
    both = of["A"] + of["C"] / strength
    pulled = of["A"] @ of["B"] @ of["φ"] + of["C"] @ of["c"] / strength
    theta = torch.linalg.solve(both, pulled)
    truth = -strength * of["B"].T @ of["A"] @ (theta - of["B"] @ of["φ"])
    assert off(peers.penalty(p, 2000, strength), truth) < 1e-9


def test_the_penalty_gradient_tends_to_the_hypergradient_as_its_inverse_strength():
    p, _ = quadratic()
    errors = [off(peers.penalty(p, 2000, strength), p.exact) for strength in (1e2, 1e3, 1e4)]
    assert errors[0] < 0.1
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(10, rel=0.1)


def test_both_copies_of_the_penalty_method_take_their_steps_from_where_pretraining_began():
    """θ_T = θ_∞ + (I − lr·M)ᵀ(θ_0 − θ_∞) of plain steps on a quadratic of Hessian M."""
    p, of = quadratic()
    steps = 7
    strength = 3.0
    reached = []
    for share in (0.0, 1 / strength):
        hessian = of["A"] + share * of["C"]
        pulled = of["A"] @ of["B"] @ of["φ"] + share * of["C"] @ of["c"]
        end = torch.linalg.solve(hessian, pulled)
        step = torch.eye(5, dtype=torch.float64) - p.pt_lr * hessian
        reached.append(end + torch.linalg.matrix_power(step, steps) @ (of["start"] - end))
    truth = -strength * of["B"].T @ of["A"] @ (reached[1] - reached[0])
    found = peers.penalty(p, steps, strength, momentum=0.0, from_start=True)
    assert off(found, truth) < 1e-10


@pytest.mark.parametrize("through", [True, False])
def test_a_few_plain_steps_of_the_penalty_method_are_a_neumann_series(through):
    """J + 1 steps from a minimum are J terms with the steps' size as α, for a large λ; without the
    way through FT, of the v that belongs to a ψ that is held.
    """
    p = problems.ridge()
    held = p._replace(psi=peers._finetuned(p, p.theta), ft_steps=0)
    truth = gradients.ours(p if through else held, metapt.Solver("neumann", 5, alpha=p.pt_lr))
    found = peers.penalty(p, 6, 1e6, momentum=0.0, through=through)
    assert off(found, truth) < 1e-4


def test_a_loop_of_ones_own_takes_kronecker_factors():
    """As bench/docs/kronecker.md says; layers of a network whose PT loss is a mean of
    cross-entropies.
    """
    curvlinops = pytest.importorskip("curvlinops")
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 5)).double()
    (x, xf), (y, yf) = torch.randn(2, 200, 8).double(), torch.randint(5, (2, 200))
    theta = {name: p.detach() for name, p in network.named_parameters()}
    phi, damping = {"log_weights": torch.zeros(200).double()}, 0.01

    def kronecker(network, inputs, targets, damping):
        curvature = curvlinops.EKFACLinearOperator(
            network,
            nn.CrossEntropyLoss(),
            list(network.parameters()),
            [(inputs, targets)],
            check_deterministic=False,
            separate_weight_and_bias=False,
        )
        inverse = curvlinops.KFACInverseLinearOperator(
            curvature, damping=damping, use_exact_damping=True
        )
        return lambda r: dict(zip(r, inverse @ list(r.values()), strict=True))

    def pretrain_loss(theta, phi):
        losses = F.cross_entropy(functional_call(network, theta, (x,)), y, reduction="none")
        return (phi["log_weights"].exp() * losses).mean() + damping / 2 * sum(
            p.square().sum() for p in theta.values()
        )

    theta = problems.minimise(SimpleNamespace(pretrain_loss=pretrain_loss, name="own"), phi, theta)
    problems.holding(network, theta)

    def found(solver, **options):
        def validation_loss(theta, psi):
            return F.cross_entropy(functional_call(network, theta, (xf,)) * psi["scale"], yf)

        result = metapt.hypergradient(
            pretrain_loss,
            validation_loss,
            validation_loss,
            theta,
            {"scale": torch.ones(5).double()},
            phi,
            solver=solver,
            **options,
        )
        return result.phi["log_weights"]

    exact = found(metapt.Solver("cg", 2000))
    cosine = {
        name: F.cosine_similarity(found(solver, **options), exact, 0).item()
        for name, solver, options in (
            ("identity", metapt.Solver("identity"), {}),
            ("cg", metapt.Solver("cg", 5), {}),
            (
                "alone",
                metapt.Solver("identity"),
                {"preconditioner": kronecker(network, x, y, damping)},
            ),
            (
                "within cg",
                metapt.Solver("cg", 5),
                {"preconditioner": kronecker(network, x, y, damping)},
            ),
        )
    }
    assert cosine["alone"] > cosine["identity"] and cosine["within cg"] > cosine["cg"], cosine


def test_a_library_that_fails_is_named_with_its_error(monkeypatch):
    def broken(task):
        raise RuntimeError("it does not run here")

    monkeypatch.setitem(libraries.ENTRIES, "betty cg", (broken, "cg"))
    row = next(row for row in libraries.compare("small", repeats=1) if row["name"] == "betty cg")
    assert row["error"] == "RuntimeError: it does not run here"


@pytest.mark.parametrize("name", list(libraries.ENTRIES))
def test_time(benchmark, name):
    library = name.split()[0].rstrip(",")
    if library != "metapt":
        pytest.importorskip(library)
    made, (function, _) = libraries.Task("small"), libraries.ENTRIES[name]
    benchmark.group = "libraries"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            function(made)
        except Exception as error:
            pytest.skip(f"{type(error).__name__}: {error}")
        benchmark(function, made)
