"""Inputs as people have them, which once gave wrong hypergradients without a word.

Each test has the smallest input of its kind. What it expects is a closed form or a central
difference of the whole pipeline, or a refusal in one line that names the cause.
"""

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import metapt
from metapt import Solver, Unroll, hypergradient

WAYS = ("exact", "finite")


def solve(pretrain_loss, validation_loss, theta, phi, solver, **options):
    """The hypergradient without fine-tuning: L_V is read off at θ, and ψ plays no part."""
    psi = {"head": torch.zeros(1)}
    options = {"unroll": Unroll(0), **options}
    return hypergradient(
        pretrain_loss,
        lambda theta, psi: psi["head"].square().sum(),
        lambda theta, psi: validation_loss(theta) + 0 * psi["head"].sum(),
        theta,
        psi,
        phi,
        solver=solver,
        **options,
    )


def told(call):
    """What `call` returns, and the texts of its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = call()
    return found, [str(warning.message) for warning in caught]


def shift_loss(theta, phi):
    """½‖w − p‖², whose minimum is w = p: dL_V/dp is the slope of L_V itself."""
    return 0.5 * (theta["w"] - phi["p"]).square().sum()


# Parts of theta that pre-training does not move


def frozen_problem(a, b):
    """½a² + ½(b − p)² + ½ab with a frozen has its minimum at b = p − a/2."""
    return SimpleNamespace(
        theta={
            "a": nn.Parameter(torch.tensor(a), requires_grad=False),
            "b": nn.Parameter(torch.tensor(b)),
        },
        loss=lambda theta, phi: (
            0.5 * theta["a"] ** 2
            + 0.5 * (theta["b"] - phi["p"]) ** 2
            + 0.5 * theta["a"] * theta["b"]
        ),
    )


@pytest.mark.parametrize("hvp", WAYS)
@pytest.mark.parametrize("method", ["cg", "neumann", "nystrom"])
def test_frozen_tensors_are_constants(method, hvp):
    problem = frozen_problem(1.0, -0.5)
    seen = []

    def noting(theta, phi):
        seen.append(list(theta))
        return problem.loss(theta, phi)

    alpha = 1.0 if method == "neumann" else None
    found = solve(
        noting,
        lambda theta: theta["a"] + theta["b"],
        problem.theta,
        {"p": torch.tensor(0.0)},
        Solver(method, 5, alpha=alpha, hvp=hvp),
    )
    assert found.phi["p"].item() == pytest.approx(1.0, abs=1e-4)  # d(a + p − a/2)/dp
    assert list(found.q) == ["a", "b"]
    assert found.q["a"].item() == 0
    assert found.q["b"].item() == pytest.approx(1.0, abs=1e-4)
    assert all(names == ["a", "b"] for names in seen)


def test_a_preconditioner_and_an_unroll_of_everything_meet_the_moving_tensors_alone():
    problem = frozen_problem(1.0, -0.5)
    seen = []

    def halve(r):
        seen.append(list(r))
        return {name: t / 2 for name, t in r.items()}

    found = hypergradient(
        problem.loss,
        lambda theta, psi: (
            0.5 * (theta["a"] - 3) ** 2 + 0.5 * (theta["b"] - 3) ** 2 + psi["h"] ** 2
        ),
        lambda theta, psi: 10 * theta["a"] * theta["b"] + psi["h"],
        problem.theta,
        {"h": torch.tensor(1.0)},
        {"p": torch.tensor(0.0)},
        unroll=Unroll(1, 0.1, scope="all"),
        solver=Solver("identity"),
        preconditioner=halve,
    )
    # One step takes b to b − 0.1(b − 3) and leaves a: dL_V/db = 10·a·0.9, halved by the metric.
    assert seen == [["b"]]
    assert found.q["b"].item() == pytest.approx(4.5)
    assert found.value.item() == pytest.approx(10 * (-0.5 + 0.35) + 0.8)


def test_where_nothing_requires_a_gradient_everything_moves():
    problem = frozen_problem(1.0, -0.5)
    theta = {name: t.detach() for name, t in problem.theta.items()}
    hessian = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    q = torch.linalg.solve(hessian, torch.ones(2))
    found = solve(
        problem.loss,
        lambda theta: theta["a"] + theta["b"],
        theta,
        {"p": torch.tensor(0.0)},
        Solver("cg", 5),
    )
    assert found.phi["p"].item() == pytest.approx(q[1].item())


# The step of finite products


@pytest.mark.parametrize("method", ["identity", "cg"])
@pytest.mark.parametrize(
    "theta_dtype, phi_dtype", [(torch.float64, torch.float32), (torch.float32, torch.float64)]
)
def test_the_default_step_fits_the_coarsest_dtype(theta_dtype, phi_dtype, method):
    found = solve(
        lambda theta, phi: 0.5 * (theta["w"] - 3 * phi["p"]).square().sum(),
        lambda theta: theta["w"].sum(),
        {"w": torch.linspace(-1, 1, 5, dtype=theta_dtype)},
        {"p": torch.ones(5, dtype=phi_dtype)},
        Solver(method, 9, hvp="finite"),
    )
    assert torch.allclose(found.phi["p"], torch.full((5,), 3.0, dtype=phi_dtype), rtol=1e-3)


@pytest.mark.parametrize("norm", [1e4, 1e6])
@pytest.mark.parametrize("size", [1, 1000])
@pytest.mark.parametrize("method", ["identity", "cg"])
def test_the_default_step_is_relative_to_the_size_of_the_point(method, size, norm):
    w = torch.randn(size, generator=torch.Generator().manual_seed(0))
    found = solve(
        shift_loss,
        lambda theta: theta["w"].sum(),
        {"w": w / w.norm() * norm},
        {"p": torch.tensor(0.5)},
        Solver(method, 3, hvp="finite"),
    )
    assert found.phi["p"].item() == pytest.approx(size, rel=1e-3)


def test_a_million_coarse_weights_move():
    w = (torch.randn(10**6, generator=torch.Generator().manual_seed(0)) * 0.1).bfloat16()
    found = solve(
        lambda theta, phi: 0.5 * (theta["w"].float() - phi["p"]).square().sum(),
        lambda theta: theta["w"].float().sum() / 1000,
        {"w": w},
        {"p": torch.tensor(0.0)},
        Solver("identity", hvp="finite"),
    )
    assert found.phi["p"].item() == pytest.approx(1000, rel=0.02)


@pytest.mark.parametrize(
    "method, theta, phi, named",
    [
        ("identity", torch.float32, torch.bfloat16, r"phi\.p is torch\.bfloat16"),
        ("cg", torch.float32, torch.bfloat16, r"phi\.p is torch\.bfloat16"),
        ("cg", torch.bfloat16, torch.float32, r"theta\.w is torch\.bfloat16"),
        ("neumann", torch.float16, torch.float32, r"theta\.w is torch\.float16"),
    ],
)
def test_differences_of_half_precision_gradients_are_refused(method, theta, phi, named):
    parameters = {"bias": torch.zeros(5), "w": torch.linspace(-1, 1, 5, dtype=theta)}
    with pytest.raises(ValueError, match=f"({named}), expected float32.*finite"):
        solve(
            lambda theta, phi: 0.5 * (theta["w"] + theta["bias"] - 3 * phi["p"]).square().sum(),
            lambda theta: theta["w"].sum(),
            parameters,
            {"p": torch.ones(5, dtype=phi)},
            Solver(method, 9, hvp="finite"),
        )


def test_a_given_step_that_numbers_cannot_show_is_refused():
    w = torch.full((100,), 1e3)  # of norm 1e4
    with pytest.raises(ValueError, match=r"Solver\.step is too short for the dtypes"):
        solve(
            shift_loss,
            lambda theta: theta["w"].sum(),
            {"w": w},
            {"p": torch.tensor(0.5)},
            Solver("cg", 3, hvp="finite", step=0.005),
        )
    found = solve(
        shift_loss,
        lambda theta: theta["w"].sum(),
        {"w": w},
        {"p": torch.tensor(0.5)},
        Solver("cg", 3, hvp="finite", step=5.0),
    )
    assert found.phi["p"].item() == pytest.approx(100, rel=1e-3)


# Recomputation in the backward pass


class Checkpointed(nn.Module):
    """tanh(wx), with activations computed anew in the backward pass from the module's own w."""

    def __init__(self, within):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.5], dtype=torch.float64))
        self.within = within

    def block(self, x):
        return torch.tanh(self.w * x)

    def forward(self, x):
        if self.within:
            return checkpoint(self.block, x, use_reentrant=False)
        return self.block(x)


def checkpointed_problem(within):
    """The module, its L_PT, and dL_V/dp = f′/(f′² + (f − p)f″) of f = tanh(w)."""
    net = Checkpointed(within)
    x = torch.ones(1, dtype=torch.float64)

    def output(theta):
        if within:
            return functional_call(net, theta, (x,))
        return checkpoint(
            lambda theta: functional_call(net, theta, (x,)), theta, use_reentrant=False
        )

    f = torch.tanh(torch.tensor(0.5, dtype=torch.float64))
    slope = 1 - f**2
    truth = slope / (slope**2 + (f - 0.3) * (-2 * f * slope))

    def loss(theta, phi):
        return 0.5 * (output(theta) - phi["p"]).square().sum()

    return net, loss, truth.item()


def by_finetuning(loss, theta, solver):
    """The hypergradient where `loss` is that of FT steps, which move theta as well."""
    return hypergradient(
        shift_loss,
        lambda theta, psi: loss(theta, {"p": psi["h"]}),
        lambda theta, psi: theta["w"].sum() + psi["h"].sum(),
        theta,
        {"h": torch.zeros(1, dtype=torch.float64)},
        {"p": torch.tensor(0.3, dtype=torch.float64)},
        unroll=Unroll(2, 0.1, scope="all"),
        solver=solver,
    )


@pytest.mark.parametrize("detached", [False, True])
def test_recomputation_with_a_modules_own_weights_is_refused(detached):
    net, loss, _ = checkpointed_problem(within=True)
    theta = {name: p.detach() if detached else p for name, p in net.named_parameters()}
    phi = {"p": torch.tensor(0.3, dtype=torch.float64)}
    with pytest.raises(ValueError, match="pretrain_loss recomputes .*checkpoint.lambda theta"):
        solve(loss, lambda theta: theta["w"].sum(), theta, phi, Solver("cg", 3, hvp="finite"))
    with pytest.raises(ValueError, match="finetune_loss recomputes"):
        by_finetuning(loss, theta, Solver("identity"))


@pytest.mark.parametrize("hvp", WAYS)
@pytest.mark.parametrize("scope", ["head", "all"])
def test_recomputation_with_a_modules_own_weights_is_refused_where_theta_is_a_copy(scope, hvp):
    """As in a loop that keeps θ by itself, and calls the module for its shape alone."""
    net, loss, _ = checkpointed_problem(within=True)
    theta = {name: p.detach().clone() for name, p in net.named_parameters()}
    nn.init.constant_(net.w, 2.0)
    phi = {"p": torch.tensor(0.3, dtype=torch.float64)}
    if scope == "head":
        with pytest.raises(ValueError, match="pretrain_loss recomputes"):
            solve(loss, lambda theta: theta["w"].sum(), theta, phi, Solver("cg", 3, hvp=hvp))
        return
    with pytest.raises(ValueError, match="finetune_loss recomputes"):
        by_finetuning(loss, theta, Solver("identity", hvp=hvp))


@pytest.mark.parametrize("hvp", WAYS)
def test_recomputation_may_read_parameters_that_are_no_part_of_theta(hvp):
    net, _, truth = checkpointed_problem(within=False)
    other, teacher, frozen = (nn.Linear(1, 1, bias=False).double() for _ in range(3))
    frozen.requires_grad_(False)
    x = torch.ones(1, dtype=torch.float64)

    def block(theta):
        with torch.no_grad():
            target = teacher(x)
        return functional_call(net, theta, (x,)) + 0 * (other(x) + target + frozen(x))

    found = solve(
        lambda theta, phi: (
            0.5 * (checkpoint(block, theta, use_reentrant=False) - phi["p"]).square().sum()
        ),
        lambda theta: theta["w"].sum(),
        {name: p.detach().clone() for name, p in net.named_parameters()},
        {"p": torch.tensor(0.3, dtype=torch.float64)},
        Solver("cg", 3, hvp=hvp),
    )
    assert found.phi["p"].item() == pytest.approx(truth, rel=1e-6)


@pytest.mark.parametrize("within, hvp", [(True, "exact"), (False, "exact"), (False, "finite")])
def test_recomputation_with_the_right_weights_goes_on_working(within, hvp):
    net, loss, truth = checkpointed_problem(within)
    found = solve(
        loss,
        lambda theta: theta["w"].sum(),
        dict(net.named_parameters()),
        {"p": torch.tensor(0.3, dtype=torch.float64)},
        Solver("cg", 3, hvp=hvp),
    )
    assert truth == pytest.approx(1.5708, abs=1e-4)
    assert found.phi["p"].item() == pytest.approx(truth, rel=1e-6)


# Paths that autograd does not find


@pytest.mark.parametrize("hvp", WAYS)
@pytest.mark.parametrize("method", ["identity", "neumann", "cg", "nystrom"])
def test_tensors_of_theta_that_the_pretraining_loss_does_not_reach_are_named(method, hvp):
    head = nn.Linear(2, 1)
    theta = {
        "encoder": torch.eye(2),
        "head.weight": head.weight.detach(),
        "head.bias": head.bias.detach(),
    }
    solver = Solver(method, 2, damping=1.0, alpha=0.1, hvp=hvp)

    def direct(theta, phi):
        return (head(theta["encoder"]) - phi["p"]).square().sum()

    def run(**options):
        phi = {"p": torch.tensor(0.3)}
        return solve(direct, lambda theta: theta["encoder"].sum(), theta, phi, solver, **options)

    _, texts = told(run)
    named = [text for text in texts if text.endswith("Without a path: head.weight, head.bias")]
    assert len(named) == 1 and "functional_call" in named[0]
    _, texts = told(lambda: run(allow_unused=True))
    assert not any("path" in text for text in texts)


def test_a_reentrant_checkpoint_is_told():
    layer = nn.Linear(2, 2, bias=False)
    x = torch.tensor([[1.0, 2.0]], requires_grad=True)

    def output(theta):
        def forward(x):
            return functional_call(layer, {"weight": theta["a"]}, (x,))

        return checkpoint(forward, x, use_reentrant=True)

    _, texts = told(
        lambda: solve(
            lambda theta, phi: 0.5 * (output(theta) @ theta["o"] - phi["p"]).square().sum(),
            lambda theta: theta["a"].sum() * theta["o"].sum(),
            {"a": torch.eye(2), "o": torch.ones(2, 1)},
            {"p": torch.tensor(1.0)},
            Solver("cg", 9, damping=1.0),
        )
    )
    assert any(text.endswith("Without a path: a") for text in texts)


# What torch lacks, and losses that differentiate themselves


@pytest.mark.parametrize("hvp", WAYS)
def test_a_second_derivative_that_torch_lacks_is_one_line(hvp):
    torch.manual_seed(0)
    x = torch.randn(1, 2, 4, 8)

    def attention(theta, phi):
        out = nn.functional.scaled_dot_product_attention(x * theta["w"], x * theta["w"], x)
        return (out - phi["p"]).square().sum()

    def run():
        theta, phi = {"w": torch.ones(8)}, {"p": torch.tensor(0.1)}
        return solve(
            attention, lambda theta: theta["w"].sum(), theta, phi, Solver("identity", hvp=hvp)
        )

    if hvp == "finite":
        assert run().phi["p"].isfinite()
        return
    with pytest.raises(
        NotImplementedError, match="pretrain_loss: .*not implemented.*hvp='finite'"
    ) as caught:
        run()
    assert "\n" not in str(caught.value) and caught.value.__suppress_context__


@pytest.mark.parametrize("hvp", WAYS)
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_loss_may_take_a_gradient_itself(stage, hvp):
    def slope(w):
        return torch.autograd.grad(w.pow(3).sum(), w, create_graph=True)[0]

    theta = {"w": torch.ones(2)}
    if stage == "pretrain":
        found = solve(
            lambda theta, phi: (phi["p"] * slope(theta["w"])).sum(),
            lambda theta: theta["w"].sum(),
            theta,
            {"p": torch.tensor(1.0)},
            Solver("identity", hvp=hvp),
        )
        assert found.phi["p"].item() == pytest.approx(-12, rel=1e-4)  # −Σ 6w
        return
    found = hypergradient(
        shift_loss,
        lambda theta, psi: (psi["h"] * slope(theta["w"])).sum() + torch.rand(()) * 0,
        lambda theta, psi: psi["h"].sum() + 0 * theta["w"].sum(),
        theta,
        {"h": torch.ones(2)},
        {"p": torch.zeros(2)},
        unroll=Unroll(1, 0.5),
        solver=Solver("identity", hvp=hvp),
    )
    # h₁ = h − ½·3w², so dL_V/dw = −3w, and so is dL_V/dp by way of w = p.
    assert torch.allclose(found.phi["p"], torch.full((2,), -3.0), rtol=1e-3)


def test_a_loss_that_takes_a_gradient_itself_leaves_the_generator_after_one_pass():
    def loss(theta, psi):
        noise = torch.rand(2)
        slope = torch.autograd.grad(theta["w"].pow(3).sum(), theta["w"], create_graph=True)[0]
        return (noise * psi["h"] * slope).sum()

    torch.manual_seed(3)
    hypergradient(
        shift_loss,
        loss,
        lambda theta, psi: psi["h"].sum(),
        {"w": torch.ones(2)},
        {"h": torch.ones(2)},
        {"p": torch.zeros(2)},
        solver=Solver("identity", hvp="finite"),
    )
    after = torch.get_rng_state()
    torch.manual_seed(3)
    torch.rand(2)
    assert torch.equal(after, torch.get_rng_state())


# Parameters that are no ordinary numbers


@pytest.mark.parametrize("method", ["identity", "neumann", "cg", "nystrom"])
def test_complex_parameters_are_refused(method):
    with pytest.raises(ValueError, match=r"theta\.z is torch\.complex64, expected real"):
        solve(
            lambda theta, phi: (theta["z"] - phi["p"]).abs().square().sum(),
            lambda theta: theta["z"].real.sum(),
            {"z": torch.ones(2, dtype=torch.complex64)},
            {"p": torch.tensor(1.0)},
            Solver(method, 2),
        )


def lazy_parameter():
    return nn.LazyLinear(3).weight


@torch.inference_mode()
def inference_tensor():
    return torch.ones(2)


@pytest.mark.parametrize(
    "tensor, text",
    [
        (lambda: torch.ones(2, dtype=torch.long), r"theta\.x is torch\.int64, expected real"),
        (lazy_parameter, r"theta\.x has no shape yet"),
        (inference_tensor, r"theta\.x was made in torch\.inference_mode"),
    ],
)
def test_tensors_that_cannot_be_parameters_are_named(tensor, text):
    with pytest.raises(ValueError, match=text):
        solve(
            shift_loss,
            lambda theta: theta["w"].sum(),
            {"w": torch.ones(2), "x": tensor()},
            {"p": torch.tensor(1.0)},
            Solver("cg", 2),
        )


def test_inference_mode_is_named():
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
        solve(
            shift_loss,
            lambda theta: theta["w"].sum(),
            {"w": torch.ones(2)},
            {"p": torch.tensor(1.0)},
            Solver("cg", 2),
        )


@pytest.mark.parametrize("returned", [None, (torch.ones(()), 2)])
def test_a_loss_that_returns_no_tensor_is_named(returned):
    kind = type(returned).__name__
    with pytest.raises(TypeError, match=f"pretrain_loss returned {kind}, expected a scalar tensor"):
        solve(
            lambda theta, phi: returned,
            lambda theta: theta["w"].sum(),
            {"w": torch.ones(2)},
            {"p": torch.tensor(1.0)},
            Solver("cg", 2),
        )


def test_sparse_gradients_are_named():
    words = torch.tensor([0, 2])

    def loss(theta, phi):
        rows = nn.functional.embedding(words, theta["rows"], sparse=True)
        return (rows - phi["p"]).square().sum()

    with pytest.raises(ValueError, match=r"gradient of theta\.rows is sparse: .*sparse=False"):
        solve(
            loss,
            lambda theta: theta["rows"].sum(),
            {"rows": torch.ones(4, 2)},
            {"p": torch.tensor(1.0)},
            Solver("cg", 2, hvp="finite"),
        )


def test_nystrom_works_in_half_precision():
    found = solve(
        lambda theta, phi: (theta["w"].float() - phi["p"]).square().sum(),
        lambda theta: theta["w"].float().sum(),
        {"w": torch.ones(4, dtype=torch.bfloat16)},
        {"p": torch.ones(4)},
        Solver("nystrom", 4),
    )
    assert torch.allclose(found.phi["p"], torch.ones(4), rtol=0.02)
    assert found.q["w"].dtype == torch.bfloat16


@pytest.mark.parametrize("hvp", WAYS)
def test_a_loss_that_changes_theta_in_place_is_told(hvp):
    words = torch.tensor([0, 1])

    def loss(theta, phi):
        rows = nn.functional.embedding(words, theta["rows"], max_norm=1.0)
        return (rows - phi["p"]).square().sum()

    with pytest.raises(ValueError, match=r"pretrain_loss changed theta\.rows in place.*max_norm"):
        solve(
            loss,
            lambda theta: theta["rows"].sum(),
            {"rows": torch.full((2, 2), 5.0)},
            {"p": torch.tensor(1.0)},
            Solver("cg", 2, hvp=hvp),
        )


@pytest.mark.parametrize("hvp", WAYS)
def test_a_loss_that_changes_a_constant_of_theta_in_place_is_told(hvp):
    theta = {
        "w": nn.Parameter(torch.ones(2)),
        "rows": nn.Parameter(torch.full((2, 2), 5.0), requires_grad=False),
    }

    def loss(theta, phi):
        rows = nn.functional.embedding(torch.tensor([0, 1]), theta["rows"], max_norm=1.0)
        return shift_loss(theta, phi) + rows.sum()

    with pytest.raises(ValueError, match=r"pretrain_loss changed theta\.rows in place"):
        solve(
            loss,
            lambda theta: theta["w"].sum(),
            theta,
            {"p": torch.tensor(1.0)},
            Solver("cg", 2, hvp=hvp),
        )


@pytest.mark.parametrize("group", ["theta", "phi"])
def test_a_group_without_parameters_is_named(group):
    params = {"theta": {"w": torch.ones(2)}, "phi": {"p": torch.tensor(1.0)}, group: {}}
    with pytest.raises(ValueError, match=f"^{group} is empty, expected parameters"):
        solve(shift_loss, lambda theta: theta["w"].sum(), **params, solver=Solver("cg", 2))


# Numbers whose squares leave their dtype, and curvature that is not there


@pytest.mark.parametrize("hvp", WAYS)
@pytest.mark.parametrize("method", ["identity", "neumann", "cg", "nystrom"])
@pytest.mark.parametrize("scale", [1e20, 1e-30])
def test_gradients_whose_squares_leave_float32(scale, method, hvp):
    found = solve(
        shift_loss,
        lambda theta: scale * theta["w"].sum(),
        {"w": torch.zeros(3)},
        {"p": torch.zeros(3)},
        Solver(method, 3, hvp=hvp),
    )
    assert torch.allclose(found.phi["p"] / scale, torch.ones(3), rtol=1e-3)
    assert not found.residual > 1e-3


def test_gradients_whose_squares_leave_float32_pass_through_finetuning():
    def after_finetuning(scale, hvp):
        return hypergradient(
            shift_loss,
            lambda theta, psi: (psi["h"] - theta["w"].sin()).square().sum(),
            lambda theta, psi: scale * psi["h"].square().sum(),
            {"w": torch.ones(3)},
            {"h": torch.ones(3)},
            {"p": torch.ones(3)},
            unroll=Unroll(2, 0.1),
            solver=Solver("cg", 3, hvp=hvp),
        )

    truth = after_finetuning(1.0, "exact").phi["p"]
    for hvp in WAYS:
        assert torch.allclose(after_finetuning(1e20, hvp).phi["p"] / 1e20, truth, rtol=1e-3)


def test_a_curvature_beyond_float32_is_refused_and_not_taken_for_none():
    with pytest.raises(FloatingPointError, match="curvature of L_PT leaves torch.float32"):
        solve(
            lambda theta, phi: 1e20 * shift_loss(theta, phi),
            lambda theta: theta["w"].sum(),
            {"w": torch.zeros(3)},
            {"p": torch.zeros(3)},
            Solver("neumann", 0),
        )


def quadratic(eigenvalues):
    """½wᵀHw − pᵀw in float64, H not diagonal; L_V = Σw."""
    n = len(eigenvalues)
    basis = torch.linalg.qr(
        torch.randn(n, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ).Q
    hessian = basis @ torch.tensor(eigenvalues, dtype=torch.float64).diag() @ basis.T

    def run(solver):
        return solve(
            lambda theta, phi: 0.5 * theta["w"] @ hessian @ theta["w"] - phi["p"] @ theta["w"],
            lambda theta: theta["w"].sum(),
            {"w": torch.ones(n, dtype=torch.float64)},
            {"p": torch.zeros(n, dtype=torch.float64)},
            solver,
        )

    return run


@pytest.mark.parametrize("hvp", WAYS)
@pytest.mark.parametrize(
    "eigenvalues, solver, text",
    [
        ((1.0, 2.0, -0.5), {"method": "cg", "terms": 20}, "no positive curvature"),
        ((1.0, 2.0, 0.0), {"method": "cg", "terms": 20}, "no positive curvature"),
        ((1.0, 2.0, -4.0), {"method": "neumann", "terms": 20}, "neumann moves away"),
        ((1.0, 1.0, 1.0), {"method": "neumann", "terms": 20, "alpha": 2.5}, "neumann moves away"),
        (
            (1.0, 2.0, -4.0),
            {"method": "nystrom", "terms": 2, "damping": 0.1},
            "no positive curvature",
        ),
    ],
)
def test_curvature_that_is_not_there_is_told(eigenvalues, solver, text, hvp):
    found, texts = told(lambda: quadratic(eigenvalues)(Solver(**solver, hvp=hvp)))
    assert any(text in each for each in texts), texts
    assert found.phi["p"].isfinite().all()
    if solver["method"] == "cg":
        assert found.phi["p"].abs().max() < 1e3


@pytest.mark.parametrize("hvp", WAYS)
@pytest.mark.parametrize("method", ["neumann", "cg", "nystrom"])
def test_curvature_that_is_there_is_not_doubted(method, hvp):
    _, texts = told(lambda: quadratic((1.0, 2.0, 3.0))(Solver(method, 3, hvp=hvp)))
    assert texts == []


@pytest.mark.parametrize("seed", range(10))
def test_a_singular_hessian_is_told_by_full_nystrom_too(seed):
    def run():
        return solve(
            lambda theta, phi: theta["w"] ** 2 - phi["p"] * theta["w"],
            lambda theta: theta["w"] + theta["none"],
            {"w": torch.ones((), dtype=torch.float64), "none": torch.ones((), dtype=torch.float64)},
            {"p": torch.zeros((), dtype=torch.float64)},
            Solver("nystrom", 2, seed=seed),
            allow_unused=True,
        )

    try:
        found, texts = told(run)
    except FloatingPointError as error:
        assert str(error) == "q is not finite: H is singular, damping helps"
    else:
        assert found.residual > 0.1
        assert any("singular H" in text for text in texts), texts


# Random numbers, devices


def test_other_random_numbers_than_torchs_are_named_among_the_causes():
    own = torch.Generator().manual_seed(0)

    def loss(theta, phi):
        noise = torch.randn(3, generator=own, dtype=torch.float64)
        return 0.5 * (theta["w"] - phi["p"] + noise).square().sum()

    parameters = (
        {"w": torch.zeros(3, dtype=torch.float64)},
        {"p": torch.zeros(3, dtype=torch.float64)},
    )
    for method in ("cg", "neumann", "nystrom"):
        solver = Solver(method, 3, hvp="finite")
        _, texts = told(lambda: solve(loss, lambda theta: theta["w"].sum(), *parameters, solver))
        assert any("random numbers" in text and "torch's" in text for text in texts), texts
    assert "torch's default generators" in hypergradient.__doc__


def test_a_device_without_a_list_of_generators_has_its_numbers_replayed(monkeypatch):
    """torch.mps has one generator and no `default_generators`; it is played here by an own one."""
    own = torch.Generator().manual_seed(5)
    module = SimpleNamespace(get_rng_state=own.get_state, set_rng_state=own.set_state)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    generators = metapt._generators(SimpleNamespace(type="mps", index=0))
    states = [generator.get_state() for generator in generators]
    first = torch.randn(3, generator=own)
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)
    assert torch.equal(torch.randn(3, generator=own), first)
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace())
    assert len(metapt._generators(SimpleNamespace(type="other", index=0))) == 1


# One tensor under two names, and weights of another pass


@pytest.mark.parametrize("detached", [False, True])
def test_one_tensor_under_two_names_is_refused(detached):
    """The minimum of ½(a − p)² + 1.5b² with a = b is p/4, without it p and 0."""
    w = nn.Parameter(torch.ones(()))
    theta = {"a": w.detach() if detached else w, "b": w.detach() if detached else w}

    def loss(theta, phi):
        return 0.5 * (theta["a"] - phi["p"]) ** 2 + 1.5 * theta["b"] ** 2

    def run(theta):
        phi = {"p": torch.tensor(4.0)}
        return solve(loss, lambda theta: theta["a"] + theta["b"], theta, phi, Solver("cg", 5))

    with pytest.raises(ValueError, match=r"theta\.a and theta\.b are one tensor: give it once"):
        run(theta)
    assert run({"a": w, "b": w.detach().clone().requires_grad_()}).phi["p"].item() == 1.0


def test_theta_psi_and_phi_may_begin_with_the_same_numbers():
    w = torch.ones(2)
    found = hypergradient(
        shift_loss,
        lambda theta, psi: (psi["w"] - theta["w"]).square().sum(),
        lambda theta, psi: psi["w"].sum() + theta["w"].sum(),
        {"w": w},
        {"w": w},
        {"p": w},
        unroll=Unroll(1, 0.25),
    )
    assert found.phi["p"].tolist() == [1.5, 1.5]  # ψ₁ = (ψ + θ)/2


class Squared(nn.Module):
    def forward(self, x):
        return x**2


@pytest.mark.parametrize("hvp", WAYS)
def test_weights_that_parametrize_caches_are_refused(hvp):
    """Of finite differences the first pass alone met the weights of its point: 0.2351."""
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).double()
    nn.init.constant_(net[0].weight, 0.5)
    nn.init.constant_(net[1].weight, 1.0)
    parametrize.register_parametrization(net[0], "weight", Squared())
    x = torch.ones(1, 1, dtype=torch.float64)

    def loss(theta, phi):
        norm = sum(p.square().sum() for p in theta.values())
        output = functional_call(net, theta, (x,))
        return 0.5 * (output - phi["p"]).square().sum() + 0.5 * norm

    def run():
        return solve(
            loss,
            lambda theta: sum(p.sum() for p in theta.values()),
            dict(net.named_parameters()),
            {"p": torch.tensor(0.25, dtype=torch.float64)},
            Solver("cg", 5, hvp=hvp),
        )

    with parametrize.cached(), pytest.raises(ValueError, match=r"parametrize\.cached\(\) keeps"):
        run()
    # Of ½(wu² − p)² + ½u² + ½w² at u = ½, w = 1 and p = ¼; ∇²_θφ L is −(1, ¼).
    hessian = torch.tensor([[2.0, 0.25], [0.25, 1.0625]], dtype=torch.float64)
    q = torch.linalg.solve(hessian, torch.ones(2, dtype=torch.float64))
    assert run().phi["p"].item() == pytest.approx((q[0] + q[1] / 4).item(), rel=1e-6)


# What the caller has set


@pytest.mark.parametrize("hvp", WAYS)
@pytest.mark.parametrize("method", ["cg", "neumann", "nystrom"])
def test_the_solver_does_not_compute_under_the_callers_autocast(method, hvp):
    draw = torch.Generator().manual_seed(0)
    root = torch.randn(6, 6, generator=draw)
    hessian = root @ root.T / 6 + torch.eye(6)
    v = torch.randn(6, generator=draw)
    seen = []

    def loss(theta, phi):
        seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        product = (hessian * theta["w"]).sum(1)
        return 0.5 * (theta["w"] * product).sum() - phi["p"] * theta["w"].sum()

    with torch.autocast("cpu", torch.bfloat16):
        found = solve(
            loss,
            lambda theta: (v * theta["w"]).sum(),
            {"w": torch.ones(6)},
            {"p": torch.tensor(0.3)},
            Solver(method, 60 if method == "neumann" else 6, hvp=hvp),
        )
        assert torch.is_autocast_enabled("cpu") and torch.is_autocast_cache_enabled()
    assert set(seen) == {(True, torch.bfloat16)}
    truth = torch.linalg.solve(hessian, v).sum().item()
    assert found.phi["p"].item() == pytest.approx(truth, rel=1e-4)


@pytest.mark.parametrize("method", ["neumann", "nystrom"])
def test_a_default_device_does_not_matter(method):
    """On the device "meta" there are no numbers, so that none can come from there."""
    theta, psi, phi = {"w": torch.ones(2)}, {"h": torch.zeros(1)}, {"p": torch.tensor(0.5)}
    with torch.device("meta"):
        found = hypergradient(
            shift_loss,
            lambda theta, psi: psi["h"].square().sum(),
            lambda theta, psi: theta["w"].sum() + 0 * psi["h"].sum(),
            theta,
            psi,
            phi,
            solver=Solver(method, 2),
        )
    assert found.phi["p"].item() == pytest.approx(2)


@pytest.mark.parametrize("group", ["theta", "phi"])
def test_tensors_on_two_devices_are_named(group):
    away = {"x": torch.zeros(2, device="meta")}
    theta, phi = {"w": torch.ones(2)}, {"p": torch.tensor(1.0)}
    (theta if group == "theta" else phi).update(away)
    text = rf"{group}\.x is on meta, but theta\.w on cpu"
    with pytest.raises(ValueError, match=text):
        solve(shift_loss, lambda theta: theta["w"].sum(), theta, phi, Solver("cg", 2))


def test_sparse_parameters_are_named():
    text = r"theta\.w is torch\.sparse_coo, expected torch\.strided"
    with pytest.raises(ValueError, match=text):
        solve(
            lambda theta, phi: (theta["w"].to_dense() - phi["p"]).square().sum(),
            lambda theta: theta["w"].to_dense().sum(),
            {"w": torch.eye(3).to_sparse()},
            {"p": torch.tensor(1.0)},
            Solver("cg", 2),
        )


def test_names_that_are_numbers_are_named():
    """A list of parameters, as other libraries take it, was numbered."""
    with pytest.raises(TypeError, match="theta has a tensor of the name 0, expected a string"):
        solve(
            lambda theta, phi: (theta[0] - phi["p"]).square().sum(),
            lambda theta: theta[0].sum(),
            {0: torch.ones(2)},
            {"p": torch.tensor(1.0)},
            Solver("cg", 2),
        )


# Losses that cannot be differentiated as they should


def test_compiled_losses_are_one_line_where_they_lack_second_derivatives():
    compiled = torch.compile(lambda w, p: 0.5 * (w.exp() - p).square().sum(), backend="aot_eager")

    def run(hvp):
        return solve(
            lambda theta, phi: compiled(theta["w"], phi["p"]),
            lambda theta: theta["w"].sum(),
            {"w": torch.zeros(1, dtype=torch.float64)},
            {"p": torch.tensor(0.3, dtype=torch.float64)},
            Solver("cg", 2, hvp=hvp),
        )

    with pytest.raises(
        NotImplementedError, match="pretrain_loss: .*compile.*double backward.*hvp='finite'"
    ) as caught:
        run("exact")
    assert "\n" not in str(caught.value)
    assert run("finite").phi["p"].item() == pytest.approx(1 / 1.7, rel=1e-6)  # 1 / (2e^2w − pe^w)


@pytest.mark.parametrize("hvp", WAYS)
def test_a_loss_that_takes_its_own_backward_pass_is_named(hvp):
    def loss(theta, phi):
        value = shift_loss(theta, phi)
        value.backward()
        return value

    with pytest.raises(ValueError, match=r"pretrain_loss: .*used up.*backward\(\)") as caught:
        solve(
            loss,
            lambda theta: theta["w"].sum(),
            {"w": torch.ones(2)},
            {"p": torch.tensor(1.0)},
            Solver("cg", 2, hvp=hvp),
        )
    assert "\n" not in str(caught.value) and caught.value.__suppress_context__


@pytest.mark.parametrize("hvp", WAYS)
@pytest.mark.parametrize("stage", ["L_PT", "L_FT"])
def test_a_mean_over_no_labels_is_refused(stage, hvp):
    """Where all labels are to be ignored the loss is NaN, but its gradient 0."""
    none = torch.full((3,), -100)

    def empty(weights, factor):
        return nn.functional.cross_entropy(weights * factor, none)

    losses = [shift_loss, lambda theta, psi: (psi["h"] - theta["w"].sum()).square()]
    if stage == "L_PT":
        losses[0] = lambda theta, phi: empty(theta["w"], phi["p"])
    else:
        losses[1] = lambda theta, psi: empty(theta["w"], psi["h"])
    with pytest.raises(FloatingPointError, match=f"{stage} is not finite"):
        hypergradient(
            *losses,
            lambda theta, psi: theta["w"].sum() + psi["h"],
            {"w": torch.ones(3, 2)},
            {"h": torch.tensor(1.0)},
            {"p": torch.tensor(1.0)},
            unroll=Unroll(2),
            solver=Solver("identity", hvp=hvp),
        )


@pytest.mark.parametrize("hvp", WAYS)
@pytest.mark.parametrize("method", ["identity", "neumann", "cg", "nystrom"])
def test_tensors_of_phi_that_the_pretraining_loss_does_not_reach_are_named(method, hvp):
    """The minimum of ½(w − st)² is w = st; with s as a number, dL_V/ds is not seen."""

    def run(hidden, **options):
        def loss(theta, phi):
            scale = phi["s"].item() if hidden else phi["s"]
            return 0.5 * (theta["w"] - scale * phi["t"]).square().sum()

        return solve(
            loss,
            lambda theta: theta["w"].sum(),
            {"w": torch.ones(2)},
            {"s": torch.tensor(0.5), "t": torch.tensor(3.0)},
            Solver(method, 2, hvp=hvp),
            **options,
        )

    found, texts = told(lambda: run(hidden=False))
    assert found.phi["s"].item() == pytest.approx(6, rel=1e-3)
    assert texts == []
    found, texts = told(lambda: run(hidden=True))
    assert found.phi["t"].item() == pytest.approx(1, rel=1e-3)
    assert len(texts) == 1 and "item()" in texts[0] and texts[0].endswith("Without a path: s")
    _, texts = told(lambda: run(hidden=True, allow_unused=True))
    assert texts == []


# What was right from the first


def recurrent():
    torch.manual_seed(0)
    net = nn.LSTM(2, 3).double()
    x = torch.randn(4, 1, 2, dtype=torch.float64)
    return net, lambda theta: functional_call(net, theta, (x,))[0]


def in_place():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(inplace=True), nn.Linear(3, 1)).double()
    x = torch.randn(4, 2, dtype=torch.float64)
    return net, lambda theta: functional_call(net, theta, (x,))


def vectorised():
    torch.manual_seed(0)
    net = nn.Linear(2, 1).double()
    x = torch.randn(4, 2, dtype=torch.float64)
    return net, lambda theta: torch.func.vmap(lambda row: functional_call(net, theta, (row,)))(x)


@pytest.mark.parametrize("hvp", WAYS)
@pytest.mark.parametrize("kind", [recurrent, in_place, vectorised])
def test_ordinary_modules_agree_with_the_dense_formula(kind, hvp):
    net, output = kind()
    theta = {name: p.detach() for name, p in net.named_parameters()}

    def loss(theta, phi):
        pull = sum(p.square().sum() for p in theta.values())
        return (output(theta) - phi["p"]).square().sum() + 20 * pull

    def of_vector(vector, p):
        pieces = vector.split([t.numel() for t in theta.values()])
        named = {name: piece.view_as(t) for piece, (name, t) in zip(pieces, theta.items())}
        return loss(named, {"p": p})

    p = torch.tensor(0.3, dtype=torch.float64)
    vector = torch.cat([t.flatten() for t in theta.values()])
    (hessian, mixed), _ = torch.autograd.functional.hessian(of_vector, (vector, p))
    q = torch.linalg.solve(hessian, torch.ones_like(vector))
    found = solve(
        loss,
        lambda theta: sum(t.sum() for t in theta.values()),
        theta,
        {"p": p},
        Solver("cg", 100, hvp=hvp),
    )
    assert found.phi["p"].item() == pytest.approx(-(q @ mixed.flatten()).item(), rel=1e-6)


@pytest.mark.parametrize("hvp", WAYS)
def test_decay_by_the_optimiser_is_damping(hvp):
    """With weight decay λ the end of pre-training is w = p / (1 + λ)."""
    found = solve(
        shift_loss,
        lambda theta: theta["w"].sum(),
        {"w": torch.ones(2)},
        {"p": torch.tensor(1.0)},
        Solver("cg", 2, damping=0.1, hvp=hvp),
    )
    assert found.phi["p"].item() == pytest.approx(2 / 1.1, rel=1e-4)
