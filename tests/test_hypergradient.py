"""`hypergradient` against truths worked out here by other means: closed forms, dense algebra,
central differences.

Nothing of the core but its public names is used. What a test compares with is autograd through
plain code with `create_graph=True`, dense matrices, or the whole pipeline run again at φ ± h.
"""

import dataclasses
import inspect
import math
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.func import functional_call

import metapt
from bench.accuracy import problems
from bench.accuracy.problems import leaves
from bench.costs import counting, scaling
from metapt import Hypergradient, Solver, Unroll, finetune_step, hypergradient

pytestmark = pytest.mark.filterwarnings(
    "ignore:‖Hq − v‖"
)  # few terms on hard systems; one test asks for it

METHODS = ("identity", "neumann", "cg", "nystrom")
WARM_AND_COLD = [*((method, False) for method in METHODS), ("cg", True), ("neumann", True)]
FULL_RANK = 10**6  # a Nyström rank that is cut down to the number of parameters
LOSSES = ("pretrain_loss", "finetune_loss", "validation_loss")
GROUPS = ("theta", "psi", "phi")
FIELDS = ("phi", "psi0", "psi", "q")


# Tools


def draw(*shape, seed, dtype=torch.float64):
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def run(problem, **options) -> Hypergradient:
    return hypergradient(*(getattr(problem, name) for name in LOSSES + GROUPS), **options)


def changed(problem, **fields):
    return SimpleNamespace(**{**vars(problem), **fields})


def flat(x):
    return (
        torch.cat([t.detach().reshape(-1) for t in x.values()])
        if isinstance(x, dict)
        else x.detach().reshape(-1)
    )


def error(found, truth) -> float:
    """Relative error of a tensor or of a dict of tensors taken as one vector."""
    found, truth = flat(found), flat(truth)
    return ((found - truth).norm() / truth.norm()).item()


def errors(found: Hypergradient, truth) -> dict:
    """The relative errors of whatever tensors `truth` has."""
    return {
        f: error(getattr(found, f), getattr(truth, f))
        for f in (*FIELDS, "value")
        if hasattr(truth, f)
    }


def same(left, right) -> bool:
    """Bitwise equality of nested dicts of tensors and numbers."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    return torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


def counted(loss):
    def wrapped(first, second):
        wrapped.calls += 1
        return loss(first, second)

    wrapped.calls = 0
    return wrapped


def plain_finetuning(losses, theta, psi, unroll, state=None):
    """K FT steps as textbooks write them, differentiable from end to end: nothing is detached."""
    t, m, s = state or (0, {}, {})
    m, s, (beta1, beta2) = dict(m), dict(s), unroll.betas
    for loss in losses:
        params = {("psi", name): p for name, p in psi.items()}
        if unroll.scope == "all":
            params |= {("theta", name): p for name, p in theta.items()}
        grads = torch.autograd.grad(
            loss(theta, psi), list(params.values()), create_graph=True, allow_unused=True
        )
        t += 1
        for (key, p), g in zip(params.items(), grads, strict=True):
            if g is None:
                continue
            if unroll.optimizer == "sgd":
                params[key] = p - unroll.lr * g
                continue
            m[key] = beta1 * m.get(key, 0) + (1 - beta1) * g
            s[key] = beta2 * s.get(key, 0) + (1 - beta2) * g**2
            m_hat, s_hat = m[key] / (1 - beta1**t), s[key] / (1 - beta2**t)
            params[key] = p - unroll.lr * m_hat / (s_hat**0.5 + unroll.eps)
        psi = {name: params["psi", name] for name in psi}
        theta = {name: params.get(("theta", name), p) for name, p in theta.items()}
    return theta, psi, (t, m, s)


def plain_moments(problem, unroll):
    """The state that Adam is left in by an earlier, separate stretch of FT."""
    losses = [problem.finetune_loss] * unroll.steps
    _, _, (t, m, s) = plain_finetuning(losses, leaves(problem.theta), leaves(problem.psi), unroll)
    return t, {key: x.detach() for key, x in m.items()}, {key: x.detach() for key, x in s.items()}


def plain_truth(problem, unroll, state=None, losses=None):
    """v, dL_V/dψ_0, L_V and ψ_K, by autograd straight through the plain FT."""
    theta, psi = leaves(problem.theta), leaves(problem.psi)
    losses = losses or [problem.finetune_loss] * unroll.steps
    theta_k, psi_k, _ = plain_finetuning(losses, theta, psi, unroll, state)
    value = problem.validation_loss(theta_k, psi_k)
    grads = torch.autograd.grad(value, [*theta.values(), *psi.values()], materialize_grads=True)
    v, psi0 = dict(zip(theta, grads)), dict(zip(psi, grads[len(theta) :]))
    return SimpleNamespace(
        v=v, psi0=psi0, value=value.detach(), psi={n: t.detach() for n, t in psi_k.items()}
    )


# 1. Ridge regression as PT: θ*(φ) is a differentiable formula, so autograd through it gives dL_V/dφ
# without the theorem


def ridge():
    """PT on three tasks, φ being their weights and each row's log-regulariser; FT fits a linear
    head on inputs @ θ.
    """
    inputs, targets = draw(3, 12, 4, seed=1), draw(3, 12, 3, seed=2)
    padded = torch.cat([inputs, torch.ones(3, 12, 1, dtype=torch.float64)], dim=2)
    finetune_data = draw(8, 4, seed=3), draw(8, seed=4)
    validation_data = draw(8, 4, seed=5), draw(8, seed=6)

    def pretrain_loss(theta, phi):
        misfit = (inputs @ theta["weight"] + theta["bias"] - targets).square().sum(2).mean(1)
        rows = torch.cat([theta["weight"], theta["bias"][None]]).square().sum(1)
        return phi["task"] @ misfit + phi["log_l2"].exp() @ rows

    def normal_equations(phi):
        """Aθ = B at the minimum; the Hessian is 2A for each of the three outputs."""
        gram = torch.einsum("t,tni,tnj->ij", phi["task"], padded, padded) / 12
        return gram + phi["log_l2"].exp().diag(), torch.einsum(
            "t,tni,tnj->ij", phi["task"], padded, targets
        ) / 12

    def minimum(phi):
        solution = torch.linalg.solve(*normal_equations(phi))
        return {"weight": solution[:-1], "bias": solution[-1]}

    def head_loss(data, theta, psi):  # theta's bias is PT's alone: FT and validation ignore it
        return (data[0] @ theta["weight"] @ psi["a"] + psi["b"] - data[1]).square().mean()

    phi = {
        "task": torch.tensor([0.7, 1.3, 0.4], dtype=torch.float64),
        "log_l2": draw(5, seed=7) / 3 - 1,
    }
    return SimpleNamespace(
        pretrain_loss=pretrain_loss,
        finetune_loss=lambda theta, psi: (
            head_loss(finetune_data, theta, psi) + 0.1 * psi["a"].square().sum()
        ),
        validation_loss=lambda theta, psi: head_loss(validation_data, theta, psi),
        theta=minimum(phi),
        psi={"a": draw(3, seed=8), "b": draw(1, seed=9).squeeze()},
        phi=phi,
        minimum=minimum,
        normal_equations=normal_equations,
    )


def ridge_hessian(problem):
    return torch.kron(
        2 * problem.normal_equations(problem.phi)[0], torch.eye(3, dtype=torch.float64)
    )


def ridge_mixed_product(problem, q):
    """qᵀ∇²_θφ L_PT from ∇_θ L_PT = 2(Aθ − B)."""
    phi, theta = (
        leaves(problem.phi),
        torch.cat([problem.theta["weight"], problem.theta["bias"][None]]),
    )
    a, b = problem.normal_equations(phi)
    return dict(
        zip(
            phi, torch.autograd.grad((q.view(5, 3) * 2 * (a @ theta - b)).sum(), list(phi.values()))
        )
    )


def ridge_truth(problem, unroll, state=None):
    """dL_V/dφ by autograd through the solve and the FT steps: neither v, nor q, nor the implicit
    function theorem.
    """
    phi = leaves(problem.phi)
    losses = [problem.finetune_loss] * unroll.steps
    theta_k, psi_k, _ = plain_finetuning(
        losses, problem.minimum(phi), leaves(problem.psi), unroll, state
    )
    grads = torch.autograd.grad(problem.validation_loss(theta_k, psi_k), list(phi.values()))
    truth = plain_truth(problem, unroll, state)
    return SimpleNamespace(
        phi=dict(zip(phi, grads)), psi0=truth.psi0, value=truth.value, psi=truth.psi, v=truth.v
    )


UNROLLS = [  # small decays and few steps, so that bias correction and moments carry weight
    pytest.param(
        Unroll(steps, 0.1, (0.8, 0.95), 1e-4, optimizer, scope),
        carried,
        id=f"{optimizer}-{scope}-K{steps}{'-carried' if carried else ''}",
    )
    for scope in ("head", "all")
    for optimizer, steps, carried in (
        ("sgd", 0, 0),
        ("sgd", 1, 0),
        ("sgd", 3, 0),
        ("adam", 0, 0),
        ("adam", 1, 0),
        ("adam", 3, 0),
        ("adam", 1, 2),
        ("adam", 3, 2),
    )
]


def with_steps(unroll, steps):
    return dataclasses.replace(unroll, steps=steps)


def carried_state(problem, unroll, carried):
    """The FT state after `carried` earlier steps, as an earlier call hands it over."""
    return (
        run(problem, unroll=with_steps(unroll, carried), solver=Solver("identity")).ft_state
        if carried
        else None
    )


@pytest.mark.parametrize("unroll, carried", UNROLLS)
@pytest.mark.parametrize("hvp", ["exact", "finite"])
@pytest.mark.parametrize("method, terms", [("cg", 5), ("nystrom", FULL_RANK)])
def test_ridge_equals_autograd_through_the_closed_form(unroll, carried, method, terms, hvp):
    problem = ridge()  # five cg iterations: the Hessian has five distinct eigenvalues
    state = plain_moments(problem, with_steps(unroll, carried)) if carried else None
    truth = ridge_truth(problem, unroll, state)
    ft_state = carried_state(problem, unroll, carried)
    found = run(problem, unroll=unroll, solver=Solver(method, terms, hvp=hvp), ft_state=ft_state)
    tolerance = 1e-8 if hvp == "exact" else 1e-6
    assert all(e < tolerance for e in errors(found, truth).values()), errors(found, truth)
    assert found.residual < tolerance


@pytest.mark.parametrize("scope", ["head", "all"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_ridge_with_another_loss_at_each_step(optimizer, scope):
    problem = ridge()
    unroll = Unroll(3, 0.1, (0.8, 0.95), 1e-4, optimizer, scope)
    losses = [
        lambda theta, psi, k=k: (1 + k) * problem.finetune_loss(theta, psi) + k * psi["b"]
        for k in range(3)
    ]
    truth = plain_truth(problem, unroll, losses=losses)
    found = run(changed(problem, finetune_loss=losses), unroll=unroll, solver=Solver("identity"))
    assert (
        max(error(found.q, truth.v), error(found.psi0, truth.psi0), error(found.psi, truth.psi))
        < 1e-10
    )


# 2. Solvers, on ½ θᵀHθ − φᵀθ with a chosen H and v: there θ* = H⁻¹φ, so dL_V/dφ is q itself


def spd(n, seed, condition=20.0):
    """A symmetric matrix with eigenvalues from 1 to `condition`, evenly spread in logarithm."""
    basis = torch.linalg.qr(draw(n, n, seed=seed)).Q
    return basis @ torch.logspace(0, math.log10(condition), n, dtype=torch.float64).diag() @ basis.T


def quadratic(hessian, v, dtype=torch.float64):
    """θ in two pieces, so that a solver has to take dicts apart and put them together."""
    n = len(v)
    hessian, v = hessian.to(dtype), v.to(dtype)

    def joined(theta):
        return torch.cat([theta["a"].reshape(-1), theta["b"]])

    def pretrain_loss(theta, phi):
        return joined(theta) @ hessian @ joined(theta) / 2 - phi["target"] @ joined(theta)

    return SimpleNamespace(
        pretrain_loss=pretrain_loss,
        finetune_loss=lambda theta, psi: psi["head"].square().sum(),
        validation_loss=lambda theta, psi: v @ joined(theta),
        theta={"a": draw(2, 2, seed=11, dtype=dtype), "b": draw(n - 4, seed=12, dtype=dtype)},
        psi={"head": torch.ones(2, dtype=dtype)},
        phi={"target": draw(n, seed=13, dtype=dtype)},
    )


def residual_of(q, hessian, v):
    return ((hessian @ flat(q) - v).norm() / v.norm()).item()


def krylov_solution(hessian, v, terms, inverse=None):
    """What `terms` iterations of (preconditioned) cg reach: the minimum of ½qᵀHq − vᵀq over the
    Krylov space.
    """
    inverse = torch.eye(len(v), dtype=v.dtype) if inverse is None else inverse
    space = [inverse @ v]
    for _ in range(terms - 1):
        space.append(inverse @ hessian @ space[-1])
    basis = torch.linalg.qr(torch.stack([d / d.norm() for d in space], dim=1)).Q
    return basis @ torch.linalg.solve(basis.T @ hessian @ basis, basis.T @ v)


@pytest.mark.parametrize("hvp, tolerance", [("exact", 1e-10), ("finite", 1e-7)])
@pytest.mark.parametrize("damping", [0.0, 0.7])
@pytest.mark.parametrize(
    "method, terms",
    [
        ("identity", 1),
        ("neumann", 0),
        ("neumann", 1),
        ("neumann", 6),
        ("cg", 1),
        ("cg", 3),
        ("cg", 8),
        ("nystrom", 8),
    ],
)
def test_solver_equals_its_dense_formula(method, terms, damping, hvp, tolerance):
    hessian, v, alpha = spd(8, seed=21), draw(8, seed=22), 0.03
    damped = hessian + damping * torch.eye(8, dtype=torch.float64)
    truth = {
        "identity": lambda: v,
        "neumann": lambda: (
            alpha
            * sum(
                torch.linalg.matrix_power(torch.eye(8) - alpha * damped, j) @ v
                for j in range(terms + 1)
            )
        ),
        "cg": lambda: krylov_solution(damped, v, terms),
        "nystrom": lambda: torch.linalg.solve(damped, v),
    }[method]()
    found = run(
        quadratic(hessian, v), solver=Solver(method, terms, alpha=alpha, damping=damping, hvp=hvp)
    )
    assert error(found.q, truth) < tolerance
    assert error(found.phi, truth) < tolerance
    if method in ("identity", "neumann"):
        assert math.isnan(found.residual)
    else:
        assert found.residual == pytest.approx(
            residual_of(truth, damped, v), rel=1e-6, abs=10 * tolerance
        )


def test_cg_stops_at_its_tolerance():
    hessian, v = spd(8, seed=21), draw(8, seed=22)
    loose = run(quadratic(hessian, v), solver=Solver("cg", 100, tol=0.1))
    assert 1e-4 < loose.residual <= 0.1
    problem = quadratic(hessian, v)
    problem.pretrain_loss = counted(problem.pretrain_loss)
    assert run(problem, solver=Solver("cg", 100, tol=1e-5, hvp="finite")).residual <= 1e-5
    assert (
        problem.pretrain_loss.calls <= 2 * 9
    )  # eight distinct eigenvalues: eight iterations, nine with rounding


@pytest.mark.parametrize("hvp, tolerance", [("exact", 1e-8), ("finite", 1e-6)])
@pytest.mark.parametrize("method, terms", [("identity", 0), ("cg", 1), ("cg", 3)])
def test_a_preconditioner_is_the_metric_of_identity_and_of_the_krylov_space(
    method, terms, hvp, tolerance
):
    scale = torch.logspace(-1, 1, 8, dtype=torch.float64)
    hessian, v = scale[:, None] * spd(8, seed=25, condition=5) * scale, draw(8, seed=26)
    inverse, problem = 1 / hessian.diagonal(), quadratic(hessian, v)

    def jacobi(r):
        assert {name: t.shape for name, t in r.items()} == {
            name: t.shape for name, t in problem.theta.items()
        }
        return {"b": inverse[4:] * r["b"], "a": inverse[:4].view(2, 2) * r["a"]}  # in any order

    truth = (
        inverse * v if method == "identity" else krylov_solution(hessian, v, terms, inverse.diag())
    )
    found = run(problem, solver=Solver(method, terms, hvp=hvp), preconditioner=jacobi)
    assert max(error(found.q, truth), error(found.phi, truth)) < tolerance
    assert math.isnan(found.residual) == (method == "identity")
    assert (
        error(run(problem, solver=Solver(method, terms, hvp=hvp)).q, truth) > 0.1
    )  # and without it does not


@pytest.mark.parametrize(
    "hvp, dtype, tolerance",
    [
        ("exact", torch.float64, 1e-8),
        ("finite", torch.float64, 1e-7),
        ("finite", torch.float32, 3e-3),
    ],
)
def test_nystrom_is_exact_once_its_rank_reaches_that_of_the_hessian(hvp, dtype, tolerance):
    # Differences leave noise where the sketched Hessian has nothing: it must not be taken for
    # curvature.
    factor, v = draw(60, 3, seed=27), draw(60, seed=28)
    truth = torch.linalg.solve(factor @ factor.T + torch.eye(60, dtype=torch.float64), v)
    problem = quadratic(factor @ factor.T, v, dtype)
    for rank in (3, 5, 20, *([60] if dtype == torch.float64 else [])):
        assert (
            error(run(problem, solver=Solver("nystrom", rank, damping=1.0, hvp=hvp)).q, truth)
            < tolerance
        )
    assert error(run(problem, solver=Solver("nystrom", 1, damping=1.0, hvp=hvp)).q, truth) > 1e-2


def test_nystrom_comes_closer_to_the_truth_with_its_rank():
    hessian, v = spd(16, seed=29, condition=1e5) / 1e3, draw(16, seed=30)
    truth = torch.linalg.solve(hessian + 0.1 * torch.eye(16, dtype=torch.float64), v)
    found = [
        run(quadratic(hessian, v), solver=Solver("nystrom", rank, damping=0.1))
        for rank in (1, 4, 8, 12, 16)
    ]
    for f in found:
        residual = residual_of(f.q, hessian + 0.1 * torch.eye(16, dtype=torch.float64), v)
        assert f.residual == pytest.approx(residual, rel=1e-6, abs=1e-8)
    distances = [error(f.q, truth) for f in found]
    assert distances == sorted(distances, reverse=True)
    assert distances[-2] < 0.3 and distances[-1] < 1e-8


def test_nystrom_sketch_follows_its_seed():
    problem = quadratic(spd(8, seed=21), draw(8, seed=22))
    q = [run(problem, solver=Solver("nystrom", 3, damping=0.1, seed=seed)).q for seed in (0, 0, 1)]
    assert same(q[0], q[1]) and not same(q[0], q[2])


@pytest.mark.parametrize("hvp", ["exact", "finite"])
@pytest.mark.parametrize("sign", [1, -1])
def test_neumann_estimates_its_step_from_the_largest_curvature(sign, hvp):
    hessian, v = spd(8, seed=21, condition=100), draw(8, seed=22)
    found = run(quadratic(sign * hessian, v), solver=Solver("neumann", 0, hvp=hvp))
    alpha = (flat(found.q) @ v / (v @ v)).item()
    assert error(found.q, alpha * v) < 1e-10
    assert 1 / 100 * (1 - 1e-6) < alpha < 1 / 100 * 1.2


def test_neumann_step_size_without_any_curvature():
    v = draw(8, seed=22)
    found = run(quadratic(torch.zeros(8, 8, dtype=torch.float64), v), solver=Solver("neumann", 1))
    assert error(found.q, 2 * v) < 1e-12


# 3. Finite against exact, on a small network with BatchNorm in training mode and dropout


class Net(nn.Module):
    def __init__(self, dropout=0.2):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(4, 5), nn.Tanh(), nn.Dropout(dropout), nn.Linear(5, 4), nn.BatchNorm1d(4)
        )
        self.head = nn.Linear(4, 3)

    def forward(self, inputs):
        return self.head(nn.functional.softplus(self.encoder(inputs)))


def network(dtype=torch.float64, dropout=0.2, device="cpu"):
    """φ weighs the classes and shifts the inputs of PT; ψ is a head of the same shape as PT's."""
    torch.manual_seed(31)
    net = Net(dropout).to(device, dtype)
    inputs = draw(3, 24, 4, seed=32, dtype=dtype).to(device)
    labels = torch.randint(3, (3, 24), generator=torch.Generator().manual_seed(33)).to(device)
    theta = {name: p.detach().clone() for name, p in net.named_parameters()}
    buffers = dict(net.named_buffers())

    def logits(
        theta, inputs
    ):  # in training mode BatchNorm writes to its buffers: each pass gets copies
        return functional_call(
            net, {**theta, **{name: b.clone() for name, b in buffers.items()}}, (inputs,)
        )

    def pretrain_loss(theta, phi):
        scores = logits(theta, inputs[0] + phi["shift"])
        weighed = phi["weight"][labels[0]] * nn.functional.cross_entropy(
            scores, labels[0], reduction="none"
        )
        return weighed.mean() + 0.01 * sum(p.square().sum() for p in theta.values())

    def head_loss(split, theta, psi):
        own_head = {"head.weight": psi["weight"], "head.bias": psi["bias"]}
        return nn.functional.cross_entropy(
            logits({**theta, **own_head}, inputs[split]), labels[split]
        )

    return SimpleNamespace(
        pretrain_loss=pretrain_loss,
        finetune_loss=lambda theta, psi: head_loss(1, theta, psi),
        validation_loss=lambda theta, psi: head_loss(2, theta, psi),
        theta=theta,
        psi={
            n: draw(*s, seed=34, dtype=dtype).to(device) / 2
            for n, s in (("weight", (3, 4)), ("bias", (3,)))
        },
        phi={
            n: t.to(device, dtype)
            for n, t in (("weight", draw(3, seed=35).exp()), ("shift", draw(4, seed=36) / 5))
        },
    )


SOLVERS = [  # away from a minimum the Hessian is indefinite: the damping makes up for it
    pytest.param({"method": "identity"}, id="identity"),
    pytest.param({"method": "neumann", "terms": 3, "alpha": 0.2}, id="neumann"),
    pytest.param({"method": "neumann", "terms": 1, "damping": 0.1}, id="neumann-own-alpha"),
    pytest.param({"method": "cg", "terms": 4, "damping": 0.5}, id="cg"),
    pytest.param({"method": "nystrom", "terms": FULL_RANK, "damping": 0.5}, id="nystrom-full"),
    pytest.param({"method": "nystrom", "terms": 5, "damping": 0.5}, id="nystrom"),
]


@pytest.mark.parametrize("unroll, carried", UNROLLS)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-3), (torch.float64, 1e-6)])
def test_finite_equals_exact(unroll, carried, solver, dtype, tolerance):
    problem = network(dtype)
    torch.manual_seed(37)
    ft_state = carried_state(problem, unroll, carried)
    torch.manual_seed(38)
    exact = run(problem, unroll=unroll, solver=Solver(**solver), ft_state=ft_state)
    torch.manual_seed(38)
    finite = run(problem, unroll=unroll, solver=Solver(**solver, hvp="finite"), ft_state=ft_state)
    assert all(e < tolerance for e in errors(finite, exact).values()), errors(finite, exact)


@pytest.mark.parametrize("unroll, carried", UNROLLS)
@pytest.mark.parametrize("other", ["exact", "finite"])
def test_the_unroll_may_go_another_way_than_the_solver(unroll, carried, other):
    """Its own part is then what it is where both go that way, to the last bit; the mixed product
    stays the solver's.
    """
    problem, ways = network(), {"exact": "finite", "finite": "exact"}
    ft_state = carried_state(problem, unroll, carried)

    def found(of_unroll, of_solver):
        torch.manual_seed(38)
        solver = Solver("identity", hvp=of_solver)
        return run(
            problem,
            unroll=dataclasses.replace(unroll, hvp=of_unroll),
            solver=solver,
            ft_state=ft_state,
        )

    mixed, same, solvers = found(other, ways[other]), found(None, other), found(None, ways[other])
    assert torch.equal(flat(mixed.q), flat(same.q)) and torch.equal(
        flat(mixed.psi0), flat(same.psi0)
    )
    if unroll.steps:
        assert not torch.equal(flat(mixed.q), flat(solvers.q))
    assert error(mixed.phi, flat(same.phi)) < 1e-6
    assert not torch.equal(flat(mixed.phi), flat(same.phi))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-3), (torch.float64, 1e-6)])
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_finite_does_not_mind_the_scale_of_the_validation_loss(scale, dtype, tolerance):
    problem = network(dtype, dropout=0.0)
    loss = problem.validation_loss
    options = {
        "unroll": Unroll(2, 0.1, scope="all"),
        "solver": Solver("cg", 3, damping=0.5, hvp="finite"),
    }
    one = run(problem, **options)
    scaled = run(
        changed(problem, validation_loss=lambda theta, psi: scale * loss(theta, psi)), **options
    )
    assert error(scaled.phi, scale * flat(one.phi)) < tolerance
    assert error(scaled.psi0, scale * flat(one.psi0)) < tolerance


@pytest.mark.parametrize("step", [1e-3, 0.1])
def test_finite_steps_as_far_as_it_is_told_and_both_ways(step):
    problem, seen = network(dropout=0.0), []
    loss = problem.pretrain_loss

    def pretrain_loss(theta, phi):
        seen.append(flat(theta) - flat(problem.theta))
        return loss(theta, phi)

    found = run(
        changed(problem, pretrain_loss=pretrain_loss),
        solver=Solver("identity", hvp="finite", step=step),
    )
    direction = flat(found.q) / flat(found.q).norm()
    assert len(seen) == 2
    assert error(seen[0], step * direction) < 1e-8 and error(seen[1], -step * direction) < 1e-8


# 4. Central differences of everything: PT to its minimum, FT, validation


def shallow(activation, bias):
    """Non-convex, one hidden layer; φ weighs examples, shifts inputs, and is the logarithm of the
    weight decay.
    """
    units, inputs, targets = len(bias), draw(3, 10, 3, seed=61), draw(3, 10, seed=62)

    def features(theta, x):
        return activation(x @ theta["w"] + theta["b"])

    def pretrain_loss(theta, phi):
        misfit = (features(theta, inputs[0] + phi["shift"]) @ theta["out"] - targets[0]).square()
        return phi["weight"] @ misfit + phi["log_decay"].exp() * sum(
            p.square().sum() for p in theta.values()
        )

    def head_loss(split, theta, psi):
        return (
            (features(theta, inputs[split]) @ psi["out"] + psi["bias"] - targets[split])
            .square()
            .mean()
        )

    return SimpleNamespace(
        name="shallow",
        pretrain_loss=pretrain_loss,
        finetune_loss=lambda theta, psi: head_loss(1, theta, psi),
        validation_loss=lambda theta, psi: head_loss(2, theta, psi),
        theta={
            "w": draw(3, 6, seed=63)[:, :units] / 5,
            "b": bias,
            "out": draw(6, seed=64)[:units] / 3,
        },
        psi={"out": draw(6, seed=65)[:units] / 3, "bias": torch.zeros((), dtype=torch.float64)},
        phi={
            "weight": draw(10, seed=66).exp() / 10,
            "shift": draw(3, seed=67) / 5,
            "log_decay": draw(1, seed=68)[0] - 2.3,
        },
    )


@pytest.fixture(scope="module")
def pretrained():
    """The network at its minimum, and the minima for each φ_i ± h."""
    problem, h = shallow(torch.tanh, draw(4, seed=69) / 2), 1e-5
    problem.theta = problems.minimise(problem, problem.phi, problem.theta)
    centre = flat(problem.phi)
    shifts = [sign * h * e for e in torch.eye(len(centre), dtype=torch.float64) for sign in (1, -1)]
    phis = [problems.unflat(centre + shift, problem.phi) for shift in shifts]
    problem.neighbours = [problems.minimise(problem, phi, problem.theta) for phi in phis]
    problem.h = h
    return problem


@pytest.mark.parametrize("scope", ["head", "all"])
@pytest.mark.parametrize(
    "optimizer, lr, steps", [("sgd", 0.5, 1), ("sgd", 0.5, 4), ("adam", 0.05, 1), ("adam", 0.05, 4)]
)
def test_central_differences_of_the_whole_pipeline(pretrained, optimizer, lr, steps, scope):
    unroll = Unroll(steps, lr, optimizer=optimizer, scope=scope)

    def value(theta):
        return plain_truth(changed(pretrained, theta=theta), unroll).value

    values = torch.stack([value(theta) for theta in pretrained.neighbours]).view(-1, 2)
    truth = (values[:, 0] - values[:, 1]) / (2 * pretrained.h)
    for solver in (
        Solver("cg", 200, tol=1e-12),
        Solver("nystrom", FULL_RANK),
        Solver("cg", 200, tol=1e-7, hvp="finite"),
        Solver("nystrom", FULL_RANK, hvp="finite"),
    ):
        assert error(run(pretrained, unroll=unroll, solver=solver).phi, truth) < 1e-5, solver


# 5. The contract


def copies(problem):
    return {group: {n: t.clone() for n, t in getattr(problem, group).items()} for group in GROUPS}


@pytest.mark.parametrize("hvp", ["exact", "finite"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("as_parameters", [False, True])
def test_arguments_are_left_as_they_were(method, hvp, as_parameters):
    problem = network()
    if as_parameters:  # as `dict(module.named_parameters())` hands them over
        for group in GROUPS:
            setattr(
                problem, group, {n: nn.Parameter(t) for n, t in getattr(problem, group).items()}
            )
    before = copies(problem)
    identities = {
        group: {n: (id(t), t._version) for n, t in getattr(problem, group).items()}
        for group in before
    }
    solver = Solver(method, 5, damping=1.0, hvp=hvp)
    found = run(problem, unroll=Unroll(2, 0.1, optimizer="adam", scope="all"), solver=solver)
    assert same(before, copies(problem))
    for group, tensors in identities.items():
        params = getattr(problem, group)
        assert {n: (id(t), t._version) for n, t in params.items()} == tensors
        assert all(t.grad is None and t.requires_grad == as_parameters for t in params.values())
    results = [found.value, *(t for field in FIELDS for t in getattr(found, field).values())]
    assert not any(t.requires_grad for t in results)


@pytest.mark.parametrize("method", ["identity", "cg"])
def test_results_are_detached_where_what_a_preconditioner_gives_is_not(method):
    problem, scale = network(), torch.tensor(2.0, dtype=torch.float64, requires_grad=True)

    def scaled(r):
        return {name: scale * t for name, t in r.items()}

    found = run(problem, solver=Solver(method, 3, damping=1.0), preconditioner=scaled)
    assert not any(t.requires_grad for field in FIELDS for t in getattr(found, field).values())


@pytest.mark.parametrize("hvp", ["exact", "finite"])
@pytest.mark.parametrize("which", LOSSES)
def test_a_loss_that_raises_leaves_arguments_as_they_were_and_the_generator_after_one_pass(
    which, hvp
):
    problem = network(dropout=0.0)
    before, loss = copies(problem), counted(getattr(problem, which))
    last = (
        {"pretrain_loss": 4, "finetune_loss": 5, "validation_loss": 1}[which]
        if hvp == "finite"
        else 1
    )

    def failing(first, second):
        torch.rand(5)
        value = loss(first, second)
        if loss.calls == last:  # in the middle of a pair of passes, where there are pairs
            raise RuntimeError("out of memory")
        return value

    setattr(problem, which, failing)
    torch.manual_seed(73)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(
            problem,
            unroll=Unroll(2, 0.1, scope="all"),
            solver=Solver("cg", 3, damping=1.0, hvp=hvp),
        )
    assert same(before, copies(problem))
    after = torch.get_rng_state()
    torch.manual_seed(73)
    torch.rand(5)
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("hvp", ["exact", "finite"])
@pytest.mark.parametrize("method", METHODS)
def test_results_have_keys_shapes_and_dtypes_of_the_parameters(method, hvp, dtype):
    problem = network(dtype)
    unroll = Unroll(1, 0.1, optimizer="adam")
    found = run(problem, unroll=unroll, solver=Solver(method, 3, damping=1.0, hvp=hvp))
    for field, group in zip(FIELDS, ("phi", "psi", "psi", "theta"), strict=True):
        result, params = getattr(found, field), getattr(problem, group)
        assert {n: (t.shape, t.dtype) for n, t in result.items()} == {
            n: (t.shape, t.dtype) for n, t in params.items()
        }
        assert list(result) == list(params)
    assert found.value.shape == () and found.value.dtype == dtype
    assert isinstance(found.residual, float)


@pytest.mark.parametrize("hvp", ["exact", "finite"])
@pytest.mark.parametrize("method", METHODS)
def test_phi_may_have_a_dtype_of_its_own(method, hvp):
    hessian, v = spd(8, seed=21), draw(8, seed=22)
    problem = quadratic(hessian, v, torch.float32)
    single = run(problem, solver=Solver(method, 8, alpha=0.03, hvp=hvp))
    problem.phi = {"target": problem.phi["target"].double()}
    loss = problem.pretrain_loss
    problem.pretrain_loss = lambda theta, phi: loss(theta, {"target": phi["target"].float()})
    found = run(problem, solver=Solver(method, 8, alpha=0.03, hvp=hvp))
    assert found.phi["target"].dtype == torch.float64 and found.q["a"].dtype == torch.float32
    assert error(found.phi, single.phi["target"].double()) < 1e-3


def test_result_is_named_as_in_the_contract():
    assert Hypergradient._fields == ("phi", "psi0", "value", "psi", "q", "ft_state", "residual")
    assert all(field in Hypergradient.__doc__ for field in Hypergradient._fields)
    parameters = inspect.signature(hypergradient).parameters
    names = ["pretrain_loss", "finetune_loss", "validation_loss", "theta", "psi", "phi"]
    assert list(parameters)[:6] == names
    keywords = {name for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert keywords == {
        "unroll",
        "solver",
        "q0",
        "ft_state",
        "preconditioner",
        "reduce",
        "allow_unused",
    }
    assert list(inspect.signature(Unroll).parameters) == [
        "steps",
        "lr",
        "betas",
        "eps",
        "optimizer",
        "scope",
        "hvp",
    ]
    fields = ["method", "terms", "alpha", "damping", "tol", "seed", "hvp", "step"]
    assert list(inspect.signature(Solver).parameters) == fields


def test_what_is_returned_shares_no_memory_with_the_arguments():
    problem = (
        network()
    )  # with K = 0, ψ_K is ψ_0: the caller's next in-place step on ψ must not reach it
    found = run(problem, unroll=Unroll(0), solver=Solver("identity"))
    kept = {name: t.clone() for name, t in found.psi.items()}
    for t in problem.psi.values():
        t.add_(1)
    assert same(found.psi, kept)


@pytest.mark.parametrize("hvp", ["exact", "finite"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("method", METHODS)
def test_unused_parameters_get_zeros(method, optimizer, hvp):
    problem, unused = ridge(), {"unused": torch.ones(2, dtype=torch.float64)}
    problem = changed(problem, **{group: getattr(problem, group) | unused for group in GROUPS})
    unroll = Unroll(2, 0.1, optimizer=optimizer, scope="all")
    solver = Solver(method, 5, damping=0.1, hvp=hvp, alpha=0.05)
    found = run(problem, unroll=unroll, solver=solver)
    assert not found.phi["unused"].any() and not found.psi0["unused"].any()
    assert (
        found.q["unused"].norm() < 1e-9 * found.q["weight"].norm()
    )  # nystrom's random directions leave rounding
    assert torch.equal(found.psi["unused"], problem.psi["unused"])
    assert found.phi["task"].all()


@pytest.mark.parametrize("hvp", ["exact", "finite"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_finetuning_loss_of_nothing_leaves_psi(optimizer, hvp):
    problem = changed(
        ridge(), finetune_loss=lambda theta, psi: torch.tensor(1.0, dtype=torch.float64)
    )
    unroll = Unroll(2, 0.1, optimizer=optimizer, scope="all")
    found = run(problem, unroll=unroll, solver=Solver("cg", 5, hvp=hvp))
    truth = run(problem, unroll=Unroll(0), solver=Solver("cg", 5, hvp=hvp))
    assert same(found.psi, problem.psi) and error(found.phi, truth.phi) < 1e-12


UNCONNECTED = {
    "theta": ("pretrain_loss", lambda p, theta, phi: p.pretrain_loss(p.theta, phi)),
    "phi": ("pretrain_loss", lambda p, theta, phi: p.pretrain_loss(theta, p.phi)),
    "theta or psi": ("validation_loss", lambda p, theta, psi: p.validation_loss(p.theta, p.psi)),
}


@pytest.mark.parametrize("hvp", ["exact", "finite"])
@pytest.mark.parametrize("method, terms", [*((m, 3) for m in METHODS), ("nystrom", FULL_RANK)])
@pytest.mark.parametrize("group", UNCONNECTED)
@pytest.mark.parametrize("zero_v", [False, True])
@pytest.mark.parametrize("own_parameters", [False, True])
def test_a_loss_without_a_path_is_the_likeliest_mistake(
    group, method, terms, zero_v, own_parameters, hvp
):
    problem = ridge()
    if zero_v:
        problem.validation_loss = lambda theta, psi: psi["a"].square().sum()
    if own_parameters:  # as a module that is called by itself has them
        problem.theta = {name: nn.Parameter(t) for name, t in problem.theta.items()}
    which, loss = UNCONNECTED[group]
    broken = changed(problem, **{which: lambda first, second: loss(problem, first, second)})
    damping = 0.1 if terms == 3 else 0.0
    solver = Solver(method, terms, damping=damping, hvp=hvp, alpha=0.05)
    with pytest.raises(ValueError, match=f"{which} .*{group}.*functional_call.*allow_unused"):
        run(broken, unroll=Unroll(0), solver=solver)
    found = run(broken, unroll=Unroll(0), solver=solver, allow_unused=True)
    assert not flat(found.phi).any()


@pytest.mark.parametrize("hvp", ["exact", "finite"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("which", ["pretrain_loss", "validation_loss"])
def test_a_connected_zero_stays_zero(which, method, hvp):
    problem = ridge()
    loss = getattr(problem, which)
    problem = changed(problem, **{which: lambda first, second: 0 * loss(first, second)})
    assert not flat(run(problem, solver=Solver(method, 2, damping=0.1, hvp=hvp)).phi).any()


@pytest.mark.parametrize("scope", ["head", "all"])
@pytest.mark.parametrize("hvp", ["exact", "finite"])
def test_ft_may_have_no_head_of_its_own(scope, hvp):
    def loss(theta, psi):
        return theta["weight"].square().sum()

    problem = changed(ridge(), psi={}, finetune_loss=loss, validation_loss=loss)
    found = run(problem, unroll=Unroll(2, 0.1, scope=scope), solver=Solver("cg", 5, hvp=hvp))
    shrunk = 1 - 2 * 0.1 if scope == "all" else 1
    v = torch.cat(
        [2 * shrunk**4 * flat(problem.theta["weight"]), torch.zeros(3, dtype=torch.float64)]
    )
    assert error(found.q, torch.linalg.solve(ridge_hessian(problem), v)) < 1e-6
    assert found.psi == found.psi0 == {}


@pytest.mark.parametrize("hvp", ["exact", "finite"])
def test_a_loss_that_is_linear_has_no_curvature_to_go_through(hvp):
    problem = ridge()
    problem.finetune_loss = lambda theta, psi: psi["a"].sum() + theta["weight"].sum()
    unroll = Unroll(2, 0.1, optimizer="adam", scope="all")
    found = run(problem, unroll=unroll, solver=Solver("identity", hvp=hvp))
    truth = plain_truth(problem, unroll)
    assert error(found.q, truth.v) < 1e-8 and error(found.psi0, truth.psi0) < 1e-8


@pytest.mark.parametrize("unroll, carried", [p for p in UNROLLS if "adam" in p.id])
@pytest.mark.parametrize("hvp, tolerance", [("exact", 1e-8), ("finite", 1e-6)])
def test_dead_units_do_as_if_they_were_not_there(unroll, carried, hvp, tolerance):
    bias = torch.tensor([3.0, 3, 3, 3, -50, -50], dtype=torch.float64)  # relu: always on, never on
    found, without = {}, shallow(torch.relu, bias[:4])
    for units in (4, 6):
        problem = shallow(torch.relu, bias[:units])
        ft_state = carried_state(problem, unroll, carried)
        found[units] = run(
            problem, unroll=unroll, solver=Solver("cg", 20, hvp=hvp, damping=1.0), ft_state=ft_state
        )
    assert error(found[6].phi, found[4].phi) < tolerance
    for field in ("psi0", "psi"):
        alive = getattr(found[6], field)["out"]
        assert error(alive[:4], getattr(found[4], field)["out"]) < tolerance
    assert not found[6].psi0["out"][4:].any()
    assert not found[6].q["w"][:, 4:].any() and not found[6].q["out"][4:].any()
    assert torch.equal(found[6].psi["out"][4:], problem.psi["out"][4:])
    # And against plain FT of the network without the dead units.
    truth = plain_truth(without, unroll, plain_moments(without, with_steps(unroll, carried)))
    assert error(found[4].psi0, truth.psi0) < tolerance


@pytest.mark.parametrize("hvp", ["exact", "finite"])
def test_a_first_gradient_of_exactly_zero(hvp):
    # Nothing flows through that step itself (its slope there is infinite), but what goes through
    # the moments does.
    draws = {name: draw(3, seed=seed) for name, seed in (("w", 67), ("a", 68), ("phi", 69))}
    zero = torch.tensor([False, False, True])
    losses = [
        lambda theta, psi: (psi["a"] - theta["w"]).square().sum(),
        lambda theta, psi: (psi["a"] * theta["w"]).square().sum() + psi["a"].sum(),
    ]
    problem = SimpleNamespace(
        pretrain_loss=lambda theta, phi: (theta["w"] - phi["w"]).square().sum(),
        finetune_loss=losses,
        validation_loss=lambda theta, psi: (psi["a"] * theta["w"].sin()).sum(),
        theta={"w": draws["w"]},
        psi={"a": torch.where(zero, draws["w"], draws["a"])},
        phi={"w": draws["phi"]},
    )
    unroll = Unroll(2, 0.1, (0.8, 0.95), 1e-4, "adam", "head")
    found = run(problem, unroll=unroll, solver=Solver("identity", hvp=hvp))

    theta, psi = leaves(problem.theta), leaves(problem.psi)
    (g,) = torch.autograd.grad(losses[0](theta, psi), psi["a"], create_graph=True)
    assert torch.equal(g == 0, zero)
    m, s = 0.2 * g, 0.05 * g**2
    step = 0.1 * (m / 0.2) / (torch.where(zero, 1, s / 0.05).sqrt() + 1e-4)
    middle = psi["a"] - torch.where(zero, 0, step)
    (g,) = torch.autograd.grad(losses[1](theta, {"a": middle}), middle, create_graph=True)
    m, s = 0.8 * m + 0.2 * g, 0.95 * s + 0.05 * g**2
    last = middle - 0.1 * (m / (1 - 0.8**2)) / ((s / (1 - 0.95**2)).sqrt() + 1e-4)
    truth = torch.autograd.grad(problem.validation_loss(theta, {"a": last}), [psi["a"], theta["w"]])
    assert error(found.psi, last) < 1e-12
    assert error(found.psi0, truth[0]) < 1e-8 and error(found.q, truth[1]) < 1e-8


@pytest.mark.parametrize("hvp", ["exact", "finite"])
@pytest.mark.parametrize("method, warm", WARM_AND_COLD)
@pytest.mark.parametrize("steps", [0, 2])
def test_zero_v_gives_zeros(method, warm, hvp, steps):
    problem = ridge()
    problem.finetune_loss = lambda theta, psi: psi["a"].square().sum()
    problem.validation_loss = lambda theta, psi: (psi["a"] - 1).square().sum()
    unroll, solver = Unroll(steps, 0.1, optimizer="adam"), Solver(method, 5, damping=0.1, hvp=hvp)
    found = run(problem, unroll=unroll, solver=solver, q0=problem.theta if warm else None)
    assert not flat(found.phi).any() and not flat(found.q).any()
    assert all(t.isfinite().all() for t in (flat(found.phi), flat(found.q)))
    assert flat(found.psi0).any()
    assert found.residual == 0 or math.isnan(found.residual)


def state_of(problem, scope):
    return run(problem, unroll=Unroll(1, optimizer="adam", scope=scope)).ft_state


@pytest.mark.parametrize(
    "kind, match, call",
    [
        (ValueError, "q0", lambda p: run(p, solver=Solver("identity"), q0=p.theta)),
        (ValueError, "q0", lambda p: run(p, solver=Solver("nystrom", FULL_RANK), q0=p.theta)),
        (
            ValueError,
            "preconditioner",
            lambda p: run(p, solver=Solver("neumann"), preconditioner=lambda r: r),
        ),
        (
            ValueError,
            "preconditioner",
            lambda p: run(p, solver=Solver("nystrom", 99), preconditioner=lambda r: r),
        ),
        (ValueError, "damping", lambda p: run(p, solver=Solver("nystrom", 14))),  # of 15 parameters
        *(
            (
                ValueError,
                "finetune_loss",
                lambda p, n=n: run(
                    changed(p, finetune_loss=[p.finetune_loss] * n), unroll=Unroll(3)
                ),
            )
            for n in (0, 2, 4)
        ),
        (
            ValueError,
            "scalar",
            lambda p: run(changed(p, validation_loss=lambda theta, psi: theta["bias"])),
        ),
        *(
            (
                ValueError,
                "ft_state",
                lambda p, scopes=scopes: run(
                    p,
                    unroll=Unroll(1, optimizer="adam", scope=scopes[0]),
                    ft_state=state_of(p, scopes[1]),
                ),
            )
            for scopes in (("all", "head"), ("head", "all"))
        ),
        (ValueError, "phi is empty", lambda p: run(changed(p, phi={}))),
        *(
            (
                TypeError,
                f"{name} is (Tensor|Linear).*named_parameters",
                lambda p, name=name, given=given: run(changed(p, **{name: given})),
            )
            for name in ("theta", "psi", "phi")
            for given in (torch.ones(2), nn.Linear(2, 2))
        ),
        *(
            (
                TypeError,
                f"{name}.w is float, expected a tensor",
                lambda p, name=name: run(changed(p, **{name: {"w": 1.0}})),
            )
            for name in ("theta", "psi", "phi")
        ),
        (TypeError, "q0 is Linear", lambda p: run(p, q0=nn.Linear(2, 2))),
        *(
            (ValueError, "(Solver|Unroll)[.]", lambda p, make=make: make())
            for make in (
                lambda: Solver("adjoint"),
                lambda: Solver(hvp="complex"),
                lambda: Solver(terms=-1),
                lambda: Solver("nystrom", 0),
                lambda: Solver(damping=-1.0),
                lambda: Solver(alpha=0.0),
                lambda: Solver(step=0.0),
                lambda: Unroll(-1),
                lambda: Unroll(optimizer="lion"),
                lambda: Unroll(hvp="complex"),
                lambda: Unroll(scope="theta"),
            )
        ),
    ],
)
def test_what_does_not_fit_is_named(kind, match, call):
    with pytest.raises(kind, match=match):
        call(ridge())


INDEFINITE = torch.tensor(
    [6.0, 5, 4, 3, 2, 1, 0.5, -2], dtype=torch.float64
).diag()  # along the third cg direction
CURVED_ALONG = torch.tensor([1.0, 1, 1, 1, 1, 1, 1, 0.35], dtype=torch.float64)


@pytest.mark.parametrize("hvp", ["exact", "finite"])
@pytest.mark.parametrize("hessian, made", [(INDEFINITE, 2), (-spd(8, seed=21), 0)])
def test_cg_that_meets_negative_curvature_returns_its_last_iterate(hessian, made, hvp):
    truth = (
        krylov_solution(hessian, CURVED_ALONG, made)
        if made
        else torch.zeros(8, dtype=torch.float64)
    )
    found = run(quadratic(hessian, CURVED_ALONG), solver=Solver("cg", 20, hvp=hvp))
    assert (
        max((flat(found.q) - truth).norm(), (flat(found.phi) - truth).norm()) <= 1e-6 * truth.norm()
    )
    assert found.residual == pytest.approx(residual_of(truth, hessian, CURVED_ALONG), rel=1e-5)


def rough(problem):
    """L_PT with finite value and slope, zero, and infinite curvature at this θ."""
    loss, weight = problem.pretrain_loss, problem.theta["weight"]
    return lambda theta, phi: loss(theta, phi) + (theta["weight"] - weight).abs().pow(1.5).sum()


NOT_FINITE = [
    ("L_V", lambda p: {"validation_loss": lambda theta, psi: psi["a"].sum() * math.inf}, Solver()),
    (
        r"\bv\b.*weight",
        lambda p: {"validation_loss": lambda theta, psi: (theta["weight"] * 0).sqrt().sum()},
        Solver(),
    ),
    *(
        (
            r"\bq\b",
            lambda p: {"pretrain_loss": rough(p)},
            Solver(method, terms, alpha=0.1, damping=0.1),
        )
        for method, terms in (
            ("neumann", 4),
            ("neumann", 20),
            ("cg", 4),
            ("nystrom", 4),
            ("nystrom", FULL_RANK),
        )
    ),
    *(
        (r"\bq\b", lambda p: {}, Solver("neumann", 60, alpha=1e10, hvp=hvp))
        for hvp in ("exact", "finite")
    ),
    *(
        (
            r"\bphi\b.*root",  # the root is finite, its slope is not
            lambda p: {
                "phi": {**p.phi, "root": torch.zeros((), dtype=torch.float64)},
                "pretrain_loss": lambda theta, phi: (
                    p.pretrain_loss(theta, phi) + phi["root"].sqrt() * theta["weight"].sum()
                ),
            },
            Solver(method, terms, alpha=0.1),
        )
        for method, terms in (("identity", 1), ("neumann", 1), ("cg", 3), ("nystrom", FULL_RANK))
    ),
]


@pytest.mark.parametrize("name, change, solver", NOT_FINITE)
def test_what_is_not_finite_is_named(name, change, solver):
    problem = ridge()
    with pytest.raises(FloatingPointError, match=name):
        run(changed(problem, **change(problem)), solver=solver)


@pytest.mark.parametrize("hvp", ["exact", "finite"])
@pytest.mark.parametrize("scales, warned", [((10, 20), 1), ((1, 1.1), 0)])
def test_a_solve_that_is_no_better_than_nothing_warns_once_and_names_the_caller(
    scales, warned, hvp
):
    problem = quadratic(spd(8, seed=21), draw(8, seed=22))
    truth = run(problem, solver=Solver("nystrom", 8)).q
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for scale in scales:  # q0 is off by its multiple of v, and the calls are made on one line
            q0 = {name: scale * t for name, t in truth.items()}
            found = run(problem, solver=Solver("neumann", 1, alpha=0.01, hvp=hvp), q0=q0)
            assert found.residual == pytest.approx(scale - 1, abs=1e-6)
    assert [w.filename for w in caught] == [__file__] * warned


@pytest.mark.parametrize("scope", ["head", "all"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_two_calls_of_one_step_are_one_call_of_two(optimizer, scope):
    problem = ridge()
    losses = [problem.finetune_loss] * 2
    if (
        scope == "all"
    ):  # θ_K is discarded between calls: a first step that leaves θ alone makes the two alike
        losses[0] = lambda theta, psi: losses[1]({n: t.detach() for n, t in theta.items()}, psi)
    one = Unroll(1, 0.1, optimizer=optimizer, scope=scope)
    half = run(changed(problem, finetune_loss=losses[0]), unroll=one)
    two_calls = run(
        changed(problem, finetune_loss=losses[1], psi=half.psi), unroll=one, ft_state=half.ft_state
    )
    one_call = run(changed(problem, finetune_loss=losses), unroll=with_steps(one, 2))
    assert (
        error(two_calls.psi, one_call.psi) < 1e-12
        and error(two_calls.value, one_call.value) < 1e-12
    )
    assert two_calls.ft_state.keys() == one_call.ft_state.keys()
    assert all(
        error(two_calls.ft_state[k], t) < 1e-12 for k, t in one_call.ft_state.items() if k != "step"
    )


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_steps_beside_pretraining_and_those_of_a_call_go_on_from_each_other(optimizer):
    """`finetune_step` on ψ by name, and ft_state of scope "head": the same numbers, to the last
    bit.
    """
    problem, unroll = ridge(), Unroll(1, 0.1, (0.8, 0.95), optimizer=optimizer)

    def beside(psi, state):
        moving = leaves(psi)
        grads = torch.autograd.grad(
            problem.finetune_loss(problem.theta, moving), list(moving.values())
        )
        return finetune_step(psi, dict(zip(psi, grads)), unroll, state)

    def within(psi, state):
        found = run(changed(problem, psi=psi), unroll=unroll, ft_state=state)
        return found.psi, found.ft_state

    ends = []
    for ways in ((beside, beside, beside), (within, within, within), (beside, within, beside)):
        psi, state = problem.psi, None
        for way in ways:
            psi, state = way(psi, state)
        ends.append((psi, state))
    assert all(same(psi, ends[0][0]) and same(state, ends[0][1]) for psi, state in ends)
    assert optimizer == "sgd" or ends[0][1]["step"] == 3


def test_ft_state_is_left_as_it_was_and_an_empty_one_is_fresh():
    problem, unroll = ridge(), Unroll(2, 0.1, optimizer="adam")
    fresh = run(problem, unroll=unroll)
    copy = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in fresh.ft_state.items()}
    run(problem, unroll=unroll, ft_state=fresh.ft_state)
    assert same(fresh.ft_state, copy)
    assert same(run(problem, unroll=unroll, ft_state={}).phi, fresh.phi)


@pytest.mark.parametrize("hvp, tolerance", [("exact", 1e-12), ("finite", 1e-7)])
@pytest.mark.parametrize("scope", ["head", "all"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize(
    "solver, warm",
    [*((p.values[0], False) for p in SOLVERS), *((p.values[0], True) for p in SOLVERS[1:4])],
)
def test_sums_over_ranks_of_shares_are_the_whole(solver, warm, optimizer, scope, hvp, tolerance):
    """Two ranks with half of each loss, played by one: a place that is not summed is half of what
    it should be.
    """
    problem = network(dropout=0.0)
    halves = {name: lambda *at, name=name: getattr(problem, name)(*at) / 2 for name in LOSSES}
    unroll = Unroll(2, 0.1, (0.8, 0.95), 1e-2, optimizer, scope)
    options = {
        "unroll": unroll,
        "solver": Solver(**solver, hvp=hvp),
        "q0": problem.theta if warm else None,
    }
    options["ft_state"] = carried_state(problem, unroll, 2)
    whole = run(problem, **options)
    for double in (
        lambda d: {n: 2 * t for n, t in d.items()},
        lambda d: {n: t.mul_(2) for n, t in d.items()},
    ):
        found = run(changed(problem, **halves), reduce=double, **options)
        assert all(e < tolerance for e in errors(found, whole).values()), errors(found, whole)
        assert found.residual == pytest.approx(whole.residual, rel=1e-6, abs=1e-9, nan_ok=True)


def test_what_is_summed_in_place_is_memory_of_its_own():
    problem = ridge()
    problem.validation_loss = lambda theta, psi: (
        theta["weight"] + psi["b"]
    ).sum()  # gradients that are views of one 1

    def double(d):
        return {name: t.mul_(2) for name, t in d.items()}

    found = run(problem, reduce=double, unroll=Unroll(0), solver=Solver("identity"))
    assert (
        torch.equal(found.q["weight"], torch.full((4, 3), 2.0, dtype=torch.float64))
        and found.psi0["b"] == 24
    )


@pytest.mark.parametrize("hvp", ["exact", "finite"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_the_callers_grad_mode_does_not_matter(mode, hvp):
    problem = network()
    options = {
        "unroll": Unroll(2, 0.1, scope="all"),
        "solver": Solver("cg", 2, damping=1.0, hvp=hvp),
    }
    torch.manual_seed(0)
    expected = run(problem, **options)
    torch.manual_seed(0)
    with mode():
        found = run(problem, **options)
        assert torch.is_grad_enabled() == (mode is torch.enable_grad)
    assert same(found.phi, expected.phi) and same(found.psi0, expected.psi0)


@pytest.mark.parametrize("hvp", ["exact", "finite"])
def test_losses_of_one_element_are_scalars_too(hvp):
    problem, options = ridge(), {"unroll": Unroll(2, 0.1), "solver": Solver("cg", 5, hvp=hvp)}
    losses = {name: lambda *at, name=name: getattr(problem, name)(*at).view(1) for name in LOSSES}
    found = run(changed(problem, **losses), **options)
    assert same(found.phi, run(problem, **options).phi)
    assert found.value.shape == ()


# 6. The random state


def noisy(problem, masks, one):
    """Each loss draws as many numbers as only it does, depends on them, and notes them. `one`: of
    FT for all steps.
    """

    def with_mask(name, size, loss):
        def wrapped(first, second):
            masks.setdefault(name, []).append(torch.rand(size) < 0.8)
            return loss(first, second) * (0.5 + masks[name][-1].double().mean())

        return wrapped

    finetune = [
        with_mask(f"finetune {k}", 17 + k, problem.finetune_loss) for k in range(1 if one else 3)
    ]
    return changed(
        problem,
        pretrain_loss=with_mask("pretrain", 31, problem.pretrain_loss),
        finetune_loss=finetune[0] if one else finetune,
        validation_loss=with_mask("validation", 23, problem.validation_loss),
    )


@pytest.mark.parametrize("hvp", ["exact", "finite"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("zero_v", [False, True])
@pytest.mark.parametrize("one", [False, True])
def test_every_pass_over_the_same_data_draws_the_same_and_the_generator_moves_by_one_pass(
    method, hvp, zero_v, one
):
    problem, masks, truth = ridge(), {}, {}
    if zero_v:
        problem.finetune_loss = problem.validation_loss = lambda theta, psi: psi["a"].square().sum()
    torch.manual_seed(71)
    alone = noisy(problem, truth, one)
    for loss in ([alone.finetune_loss] if one else alone.finetune_loss) + [alone.validation_loss]:
        loss(problem.theta, problem.psi)
    alone.pretrain_loss(problem.theta, problem.phi)
    after = torch.get_rng_state()

    torch.manual_seed(71)
    solver = Solver(method, 3, damping=0.1, hvp=hvp)
    run(noisy(problem, masks, one), unroll=Unroll(3, 0.1), solver=solver, allow_unused=True)
    assert torch.equal(torch.get_rng_state(), after)
    assert masks.keys() == truth.keys()
    for name, seen in masks.items():
        assert all(torch.equal(mask, truth[name][0]) for mask in seen), name
    if hvp == "finite" and not zero_v:
        assert all(len(seen) >= 2 for name, seen in masks.items() if name != "validation")
    assert len(masks["finetune 0"]) >= (3 if one else 1)


# 7. Warm starts, and how many passes a call takes


def counting_pretraining(problem):
    return changed(problem, pretrain_loss=counted(problem.pretrain_loss))


def test_cg_from_the_solution_stops_at_once():
    problem = ridge()
    first = run(problem, solver=Solver("cg", 50, tol=1e-12))
    problem = counting_pretraining(problem)
    again = run(problem, solver=Solver("cg", 50, tol=1e-6, hvp="finite"), q0=first.q)
    assert same(again.q, first.q)
    assert error(again.phi, first.phi) < 1e-6
    assert problem.pretrain_loss.calls == 2  # one product, to learn where q0 stands


@pytest.mark.parametrize("hvp, tolerance", [("exact", 1e-8), ("finite", 1e-6)])
def test_cg_spread_over_calls_reaches_the_dense_solution(hvp, tolerance):
    problem, unroll = ridge(), Unroll(1, 0.1)
    damped = ridge_hessian(problem) + 0.2 * torch.eye(15, dtype=torch.float64)
    truth = torch.linalg.solve(damped, flat(plain_truth(problem, unroll).v))
    q, distances = None, []
    for _ in range(12):
        found = run(problem, unroll=unroll, solver=Solver("cg", 2, damping=0.2, hvp=hvp), q0=q)
        q = found.q
        distances.append(error(q, truth))
    assert distances[0] > 1e-3 and distances[-1] < tolerance
    assert error(found.phi, -flat(ridge_mixed_product(problem, truth))) < tolerance


@pytest.mark.parametrize("method", ["cg", "neumann"])
def test_q0_may_be_in_any_order(method):
    hessian, v = spd(8, seed=21), draw(8, seed=22)
    q0 = {"a": draw(2, 2, seed=74), "b": draw(4, seed=75)}
    problem = quadratic(hessian, v)
    found = [
        run(problem, solver=Solver(method, 2, alpha=0.03), q0=q)
        for q in (q0, {"b": q0["b"], "a": q0["a"]})
    ]
    assert same(found[0].phi, found[1].phi)


@pytest.mark.parametrize("hvp, tolerance", [("exact", 1e-10), ("finite", 1e-7)])
@pytest.mark.parametrize("damping", [0.0, 0.7])
@pytest.mark.parametrize("terms", [0, 1, 3])
def test_warm_neumann_goes_on_and_reports_the_last_q_it_took_a_product_of(
    terms, damping, hvp, tolerance
):
    hessian, v, alpha = spd(8, seed=21), draw(8, seed=22), 0.03
    damped = hessian + damping * torch.eye(8, dtype=torch.float64)
    q0 = {"a": draw(2, 2, seed=74), "b": draw(4, seed=75)}
    iterates = [flat(q0)]
    for _ in range(max(terms, 1)):
        iterates.append(iterates[-1] + alpha * (v - damped @ iterates[-1]))
    found = run(
        quadratic(hessian, v),
        solver=Solver("neumann", terms, alpha=alpha, damping=damping, hvp=hvp),
        q0=q0,
    )
    assert error(found.q, iterates[-1]) < tolerance
    assert error(found.phi, iterates[-2]) < tolerance  # φ's gradient is q itself in this problem
    assert found.residual == pytest.approx(residual_of(iterates[-2], damped, v), rel=1e-6)


def test_neumann_carried_over_calls_converges_at_two_passes_a_call():
    problem, unroll = counting_pretraining(ridge()), Unroll(1, 0.1)
    hessian = ridge_hessian(problem)
    truth = torch.linalg.solve(hessian, flat(plain_truth(problem, unroll).v))
    solver = Solver(
        "neumann", 1, alpha=1 / torch.linalg.eigvalsh(hessian).max().item(), hvp="finite"
    )
    q = {name: torch.zeros_like(t) for name, t in problem.theta.items()}
    for call in range(150):
        problem.pretrain_loss.calls = 0
        found = run(problem, unroll=unroll, solver=solver, q0=q)
        q = found.q
        assert (
            problem.pretrain_loss.calls == 2 or call == 0
        )  # from q = 0 there is nothing to take differences along
    assert error(q, truth) < 1e-6
    assert error(found.phi, -flat(ridge_mixed_product(problem, truth))) < 1e-6
    assert found.residual < 1e-6


@pytest.mark.parametrize("terms", [1, 4, 20])
@pytest.mark.parametrize("alpha", [0.05, None])
@pytest.mark.parametrize("method", METHODS)
def test_exact_takes_one_pass_for_any_number_of_terms(method, terms, alpha):
    problem = counting_pretraining(ridge())
    run(problem, solver=Solver(method, terms, damping=0.1, alpha=alpha))
    assert problem.pretrain_loss.calls == 1


@pytest.mark.parametrize(
    "method, terms, warm, passes",
    [
        ("identity", 1, False, 2),
        ("neumann", 0, False, 2),
        ("neumann", 1, False, 4),
        ("neumann", 4, False, 10),
        ("neumann", 3, True, 6),
        ("cg", 1, False, 2),
        ("cg", 3, False, 6),
        ("cg", 5, False, 10),
        ("cg", 3, True, 8),
    ],
)
def test_finite_takes_two_passes_a_product(method, terms, warm, passes):
    problem = counting_pretraining(quadratic(spd(8, seed=21), draw(8, seed=22)))
    run(
        problem,
        solver=Solver(method, terms, alpha=0.05, hvp="finite"),
        q0=problem.theta if warm else None,
    )
    assert problem.pretrain_loss.calls == passes


# 8. Cost: what is saved for backward at the same time, and whether anything builds a second-order
# graph


def wide_network():
    """Activations outweigh parameters; the FT and validation batches are as large as PT's."""
    work = scaling.Workload(scaling.Size(width=32, weights=256, batch=256))
    return SimpleNamespace(**{name: getattr(work, name) for name in LOSSES + GROUPS})


def ordinary_step_peak(problem):
    return counting.peak(
        lambda: problem.pretrain_loss(leaves(problem.theta), problem.phi).backward()
    )


def hypergradient_peak(problem, **options):
    return counting.peak(lambda: run(problem, **options))


@pytest.mark.parametrize("scope", ["head", "all"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(
    "method, terms, alpha",
    [("neumann", 1, 0.1), ("neumann", 1, None), ("cg", 3, None), ("nystrom", 4, None)],
)
def test_finite_saves_no_more_than_an_ordinary_step_and_exact_does(
    method, terms, alpha, steps, optimizer, scope
):
    problem = wide_network()
    ordinary = ordinary_step_peak(problem)
    unroll = Unroll(steps, 0.01, optimizer=optimizer, scope=scope)
    solver = {"method": method, "terms": terms, "alpha": alpha, "damping": 1.0}
    assert (
        hypergradient_peak(problem, unroll=unroll, solver=Solver(**solver, hvp="finite"))
        <= 1.1 * ordinary
    )
    assert (
        hypergradient_peak(problem, unroll=unroll, solver=Solver(**solver, hvp="exact"))
        > 1.5 * ordinary
    )


@pytest.mark.parametrize("steps", [1, 4])
def test_an_exact_unroll_of_the_head_costs_a_pass_a_step_and_keeps_each(steps):
    problem, seen = wide_network(), []
    loss = problem.finetune_loss
    noting = changed(
        problem, finetune_loss=lambda theta, psi: (seen.append(1), loss(theta, psi))[1]
    )
    one = hypergradient_peak(problem, unroll=Unroll(0), solver=Solver("identity", hvp="finite"))
    for hvp, passes, kept in (("exact", 1, steps + 1), ("finite", 3, 1)):
        options = {
            "unroll": Unroll(steps, 0.01, hvp=hvp),
            "solver": Solver("identity", hvp="finite"),
        }
        assert hypergradient_peak(problem, **options) == pytest.approx(kept * one, rel=0.25)
        seen.clear()
        run(noting, **options)
        assert len(seen) == passes * steps


@pytest.mark.parametrize("method, warm", WARM_AND_COLD)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_finite_never_builds_a_second_order_graph(method, optimizer, warm, monkeypatch):
    problem, seen = network(), []

    def recorded(function):
        def wrapper(*args, **kwargs):
            bound = inspect.signature(function).bind(*args, **kwargs)
            seen.append(bool(bound.arguments.get("create_graph")))
            return function(*args, **kwargs)

        return wrapper

    for owner, name in (
        (torch.autograd, "grad"),
        (torch.autograd, "backward"),
        (torch.Tensor, "backward"),
    ):
        monkeypatch.setattr(owner, name, recorded(getattr(owner, name)))
    unroll = Unroll(2, 0.1, optimizer=optimizer, scope="all")
    options = {"unroll": unroll, "q0": problem.theta if warm else None}
    run(problem, solver=Solver(method, 3, damping=1.0, hvp="finite"), **options)
    assert seen and not any(seen)
    run(problem, solver=Solver(method, 3, damping=1.0, hvp="exact"), **options)
    assert any(seen)  # so the recording works


# 9. On a GPU


@pytest.mark.cuda
@pytest.mark.parametrize("unroll, carried", [p for p in UNROLLS if "K3" in p.id])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    "hvp, tolerance", [("exact", 1e-4), ("finite", 2e-3)]
)  # each side has its own rounding
def test_cuda_equals_cpu(unroll, carried, solver, hvp, tolerance):
    found = {}
    for device in ("cpu", "cuda"):
        problem = network(torch.float32, dropout=0.0, device=device)
        ft_state = carried_state(problem, unroll, carried)
        found[device] = run(
            problem, unroll=unroll, solver=Solver(**solver, hvp=hvp), ft_state=ft_state
        )
    assert all(t.is_cuda for field in FIELDS for t in getattr(found["cuda"], field).values())
    on_cuda = {f: {n: t.cuda() for n, t in getattr(found["cpu"], f).items()} for f in FIELDS}
    truth = SimpleNamespace(**on_cuda, value=found["cpu"].value.cuda())
    assert all(e < tolerance for e in errors(found["cuda"], truth).values())


@pytest.mark.cuda
def test_cuda_replays_dropout_and_leaves_both_generators_after_one_pass():
    problem = network(torch.float64, dropout=0.5, device="cuda")
    unroll, states, found = Unroll(2, 0.1, scope="all"), {}, {}
    for hvp in ("exact", "finite"):
        torch.manual_seed(91)
        found[hvp] = run(problem, unroll=unroll, solver=Solver("cg", 4, damping=0.5, hvp=hvp))
        states[hvp] = torch.get_rng_state(), torch.cuda.get_rng_state()
    torch.manual_seed(91)
    problem.finetune_loss(problem.theta, problem.psi)  # one loss for all steps: one pass
    problem.validation_loss(problem.theta, problem.psi)
    problem.pretrain_loss(problem.theta, problem.phi)
    states["alone"] = torch.get_rng_state(), torch.cuda.get_rng_state()
    for cpu, cuda in states.values():
        assert torch.equal(cpu, states["alone"][0]) and torch.equal(cuda, states["alone"][1])
    assert all(e < 1e-6 for e in errors(found["finite"], found["exact"]).values())


# --------------------------------------------------------------------------------------------------
# 10. To be copied: the section stands alone
# --------------------------------------------------------------------------------------------------

ALONE = """
import sys
import torch
space, known = {}, sys.stdlib_module_names | {name.partition(".")[0] for name in sys.modules}
exec(sys.stdin.read(), space)
H, b, w = torch.tensor([2.0, 4.0]), torch.tensor([1.0, 1.0]), torch.tensor([3.0, 5.0])
for hvp in ("exact", "finite"):
    for optimizer in ("sgd", "adam"):
        found = space["hypergradient"](
            lambda theta, phi: (H * theta["w"] ** 2).sum() / 2 - (phi["b"] * theta["w"]).sum(),
            lambda theta, psi: (psi["h"] ** 2).sum(),
            lambda theta, psi: (w * theta["w"]).sum() + (psi["h"] ** 2).sum(),
            {"w": b / H}, {"h": torch.ones(1)}, {"b": b},
            unroll=space["Unroll"](2, 0.1, optimizer=optimizer),
            solver=space["Solver"]("cg", 2, hvp=hvp),
        )
        assert torch.allclose(found.phi["b"], w / H, rtol=1e-3), found
known |= {"sympy", "mpmath"}  # torch's own, which it imports when they are needed
assert not {name.partition(".")[0] for name in sys.modules} - known
print("done")
"""


def test_the_section_can_be_cut_out_and_run_with_torch_alone():
    lines = inspect.getsource(metapt).splitlines(keepends=True)
    start = next(i for i, line in enumerate(lines) if line.startswith("# 2. "))
    end = next((i for i, line in enumerate(lines) if line.startswith("# 3. ")), len(lines))
    section = "".join(lines[start:end])
    assert "bench" not in section
    result = subprocess.run(
        [sys.executable, "-c", ALONE], input=section, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0 and result.stdout.strip() == "done", result.stderr
