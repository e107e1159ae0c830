# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0",
#   "numpy>=2.0,<3",
#   "scikit-learn>=1.5,<2",
#   "matplotlib>=3.9,<4",
#   "typer>=0.16,<1",
#   "rich>=13.9,<16",
#   "wfdb>=4.1,<5",
#   "requests>=2.32,<3",
# ]
# ///
"""metapt: hyperparameters of pre-training, learned by gradient from how well the model does after fine-tuning.

    min over φ of L_V(θ_K, ψ_K),  θ*(φ) = argmin over θ of L_PT(θ, φ),  (θ_K, ψ_K) = K steps of FT from (θ*, ψ_0)

    v       = dL_V(θ_K, ψ_K) / dθ*          backpropagation through the K unrolled FT steps
    q       ≈ (∇²_θθ L_PT)⁻¹ v              an inverse-Hessian-vector product
    dL_V/dφ = −qᵀ ∇²_θφ L_PT                the implicit function theorem

PT is pre-training, FT fine-tuning, V validation; θ the encoder and the PT head, ψ the FT head, φ what is learned.

    python metapt.py download DATA         fetch mnist, ecg or ppi (the digits need nothing)
    python metapt.py pretrain DOMAIN       PT with φ fixed: the baseline
    python metapt.py meta DOMAIN           PT with φ learned along (algorithm 1)
    python metapt.py finetune RUN          FT from a run's encoder, over seeds and sizes of the FT set
    python metapt.py eval RUN...           runs side by side

Raghu, Lorraine, Kornblith, McDermott and Duvenaud, "Meta-Learning to Improve Pre-Training", NeurIPS 2021,
arXiv:2111.01754. Sections: 2 hypergradients, 3 meta-parameters, 4 encoders, 5 data, 6 domains, 7 training, 8 reports,
9 commands; each uses only those above it.
"""

# ---------------------------------------------------------------------------------------------------------------------
# 2. Hypergradients. Needs torch alone: to use it elsewhere, copy this section as it stands.
# ---------------------------------------------------------------------------------------------------------------------

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

Params = dict[str, Tensor]
Loss = Callable[[Params, Params], Tensor]


def _require(condition: bool, name: str, value, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {value!r}, expected {expected}")


@dataclass(frozen=True)
class Unroll:
    """The FT stage: K differentiable steps on psi (and theta) from where PT ended.

    Attributes:
        steps: K, the number of FT steps; 0 means that L_V is read off at (θ*, ψ_0).
        lr: learning rate.
        betas: decay of Adam's first and second moment.
        eps: added to the root of Adam's second moment.
        optimizer: "sgd" or "adam".
        scope: "head": only ψ moves; "all": θ moves too.
        hvp: how the adjoint of a step is found, as in `Solver`; None: as the solver says. Beside a "finite" solver,
            "exact" pays in scope "head" with few steps: its second-order graph ends where ψ does, so that a step costs one
            pass of L_FT instead of two and a part, and no kink of θ's network gets in; but the graphs of all K passes
            are kept until L_V's is there, where finite keeps one at a time.

    Raises:
        ValueError: a field has a value that is not listed here.
    """

    steps: int = 1
    lr: float = 1e-3
    betas: tuple = (0.9, 0.999)
    eps: float = 1e-8
    optimizer: str = "sgd"
    scope: str = "head"
    hvp: str | None = None

    def __post_init__(self):
        _require(self.steps >= 0, "Unroll.steps", self.steps, "0 or more")
        _require(self.optimizer in ("sgd", "adam"), "Unroll.optimizer", self.optimizer, "'sgd' or 'adam'")
        _require(self.scope in ("head", "all"), "Unroll.scope", self.scope, "'head' or 'all'")
        _require(self.hvp in (None, "exact", "finite"), "Unroll.hvp", self.hvp, "'exact', 'finite' or None")


@dataclass(frozen=True)
class Solver:
    """How q ≈ (∇²_θθ L_PT)⁻¹ v is found. H below stands for ∇²_θθ L_PT + damping·I.

    Attributes:
        method: "identity": q = v (DARTS-like; T1-T2 of Luketina et al., ICML 2016).
            "neumann": q = α Σ_{j≤terms} (I − αH)ʲ v (Lorraine et al., AISTATS 2020, algorithm 3). Warm-started, it goes
            on from q0 with one product a term: see `hypergradient`.
            "cg": conjugate gradients (Pedregosa, ICML 2016), `terms` iterations at most.
            "nystrom": H from `terms` random products, inverted by the Woodbury identity (Hataya and Yamada, AISTATS 2023).
        terms: Neumann terms beyond the zeroth, CG iterations, or the Nyström rank.
        alpha: Neumann step size; None: 1 / the largest |eigenvalue| that 8 power iterations find (8 more products).
        damping: added to the diagonal of the Hessian, for every method and in `residual`.
        tol: cg stops when ‖Hq − v‖ ≤ tol·‖v‖.
        seed: of the Nyström sketch and of the power iterations.
        hvp: "exact": double backward; "finite": central differences of first-order gradients. ReLU's kinks between
            the two points count in full there: in networks of piecewise linear units Hq, and often qᵀ∇²_θφ L_PT, is noise
            at the default `step`. A longer one averages over more kinks.
        step: "finite" only: the norm of the perturbation ε·‖q‖; None: the cube root of the dtype's machine epsilon.
            Set it higher (0.1, say) where the gradients are noisier than the dtype says, as under autocast.

    Raises:
        ValueError: a field has a value that is not listed here.
    """

    method: str = "cg"  # by default what came closest to exact for its number of products, see bench/accuracy.py
    terms: int = 10
    alpha: float | None = None
    damping: float = 0.0
    tol: float = 1e-10
    seed: int = 0
    hvp: str = "exact"
    step: float | None = None

    def __post_init__(self):
        methods = ("identity", "neumann", "cg", "nystrom")
        _require(self.method in methods, "Solver.method", self.method, f"one of {', '.join(methods)}")
        _require(self.terms >= (self.method == "nystrom"), "Solver.terms", self.terms, "0 or more (nystrom: 1 or more)")
        _require(self.damping >= 0, "Solver.damping", self.damping, "0 or more")
        _require(self.alpha is None or self.alpha > 0, "Solver.alpha", self.alpha, "positive, or None")
        _require(self.hvp in ("exact", "finite"), "Solver.hvp", self.hvp, "'exact' or 'finite'")
        _require(self.step is None or self.step > 0, "Solver.step", self.step, "positive, or None")


class Hypergradient(NamedTuple):
    """What `hypergradient` returns; nothing in it is attached to a graph."""

    phi: Params  # dL_V/dφ, keys of phi
    psi0: Params  # dL_V/dψ_0
    value: Tensor  # L_V(θ_K, ψ_K), scalar
    psi: Params  # ψ_K
    q: Params  # the solver's q, keys of theta: hand it to the next call as q0
    ft_state: dict  # the FT optimiser's state after K steps: hand it to the next call
    residual: float  # ‖Hq − v‖ / ‖v‖, or nan where the solver did not come by it
    alpha: float = math.nan  # the Neumann step size, given or estimated: hand it to the next call in `Solver`
    pt_gradient: Params | None = None  # ∇_θ L_PT (finite: mean of θ ± εq), for PT's next step; None: not come by


def hypergradient(
    pretrain_loss: Loss,
    finetune_loss: Loss | Sequence[Loss],
    validation_loss: Loss,
    theta: Params,
    psi: Params,
    phi: Params,
    *,
    unroll: Unroll = Unroll(),
    solver: Solver = Solver(),
    q0: Params | None = None,
    ft_state: dict | None = None,
    preconditioner: Callable[[Params], Params] | None = None,
    want_pt_gradient: bool = False,
) -> Hypergradient:
    """dL_V(θ_K, ψ_K)/dφ: how the validation loss after fine-tuning changes with the hyperparameters of pre-training.

    Raghu et al., "Meta-Learning to Improve Pre-Training", NeurIPS 2021, section 3 and algorithm 1:

        v       = dL_V(θ_K, ψ_K)/dθ*        through K unrolled FT steps
        q       ≈ (∇²_θθ L_PT)⁻¹ v          the solver
        dL_V/dφ = −qᵀ ∇²_θφ L_PT            the implicit function theorem

    A loss takes two dicts, returns a scalar and must be a repeatable function of them: its batch is fixed, and what it
    draws from torch's random generators (the CPU's and that of theta's device) is drawn alike in every pass. Afterwards
    those generators stand where one pass of each FT loss, of L_V and of L_PT, in this order, leaves them. A loss may
    read buffers but must not change them for the next pass: hand `functional_call` copies of BatchNorm's.

    Args:
        pretrain_loss: L_PT(theta, phi).
        finetune_loss: L_FT(theta, psi): one callable for all K steps, or a sequence of K.
        validation_loss: L_V(theta, psi).
        theta: θ*, the PT parameters, by name. Like psi and phi it is never changed, not even for a moment.
        psi: ψ_0, the FT parameters.
        phi: the PT hyperparameters.
        unroll: the FT stage.
        solver: how q is found.
        q0: an earlier q to start from ("cg" and "neumann"). "cg" spends one product more to learn where q0 stands.
            "neumann" spends `terms` products (at least one) on as many steps q ← q + α(v − Hq); the hypergradient and
            the residual belong to the last q that a product was taken of, and the step that this product allows is
            already made in the q that is returned (SOBA, Dagréou et al., NeurIPS 2022). With `hvp="finite"` one product
            is two PT passes and brings qᵀ∇²_θφ L_PT along, so a solve that is spread over many calls costs two each.
        ft_state: the FT optimiser's state to start from, as an earlier call returned it; None or {}: a fresh one. From
            fresh moments Adam's first step is lr·g/(|g| + ε), through which next to no gradient flows.
        preconditioner: r → M⁻¹r on dicts keyed as theta, M symmetric positive definite; for "cg".
        want_pt_gradient: whether the passes shall bring ∇_θ L_PT along where they would not by themselves ("identity"
            with `hvp="finite"`): for a third of a PT step more they then save PT's next. It is the mean of the two
            ends: with a long `step` across kinks it is another gradient (a cosine of 0.9 in the ECG domain at 0.3, see
            bench/ecg.py draws).

    Returns:
        Hypergradient, every tensor with the shape, dtype and device of the parameter that it belongs to.

    Raises:
        ValueError: an argument that does not fit the others.
        FloatingPointError: something was not finite; the message names it.
    """
    _require(theta and phi, "theta and phi", "empty", "parameters in both")
    device = next(iter(theta.values())).device
    _require(q0 is None or solver.method in ("cg", "neumann"), "q0", f"with {solver.method}", "for 'cg' and 'neumann'")
    _require(preconditioner is None or solver.method == "cg", "preconditioner", f"with {solver.method}", "for 'cg'")
    if callable(finetune_loss):
        finetune_losses = [_Replayed(finetune_loss, device, "theta", "psi")] * unroll.steps
    else:
        finetune_losses = [_Replayed(loss, device, "theta", "psi") for loss in finetune_loss]
        _require(
            len(finetune_losses) == unroll.steps, "finetune_loss", len(finetune_losses), f"{unroll.steps} callables"
        )
    validation_loss = _Replayed(validation_loss, device, "theta", "psi")
    pretrain_loss = _Replayed(pretrain_loss, device, "theta", "phi")

    value, gradient, psi_k, ft_state = gradient_through_finetuning(
        finetune_losses, validation_loss, _point(theta=theta, psi=psi), unroll, solver, ft_state
    )
    v = _group(gradient, "theta")
    _finite(L_V=value, v=v, psi0=_group(gradient, "psi"))

    derivatives = _derivatives(pretrain_loss, _point(theta=theta, phi=phi), list(_point(theta=theta)), solver)
    product = pretrain_products(derivatives, theta, phi, solver.damping)
    start = None if q0 is None else _flat({name: q0[name] for name in theta})
    if solver.method == "neumann" and solver.alpha is None and _flat(v).any():
        solver = replace(solver, alpha=1 / largest_curvature(product, _flat(v), solver.seed))
    q, mixed, residual = solve(product, _flat(v), start, solver, theta, preconditioner, want_pt_gradient)
    if pretrain_loss.start is None:  # v = 0 can need no pass at all; the random generators still owe one
        with torch.no_grad():
            pretrain_loss(_point(theta=theta, phi=phi))

    result = Hypergradient(
        phi=_unflat(-mixed, phi),
        psi0=_group(gradient, "psi"),
        value=value,
        psi={name: t.clone() for name, t in psi_k.items()},
        q=_unflat(q, theta),
        ft_state=ft_state,
        residual=residual,
        alpha=solver.alpha or math.nan,
        pt_gradient=_group(derivatives.passed, "theta") if derivatives.passed else None,
    )
    _finite(q=result.q, phi=result.phi, psi_K=psi_k)
    return result


# v = dL_V(θ_K, ψ_K)/dθ*: forwards through K FT steps, then backwards through their adjoints.


def gradient_through_finetuning(finetune_losses, validation_loss, point, unroll, solver, state):
    """dL_V(θ_K, ψ_K)/d(θ_0, ψ_0), by the chain rule through K FT steps.

    An FT step is an elementwise rule, whose adjoint is a formula (`finetune_step_adjoint`), applied to a gradient,
    whose adjoint is a Hessian-vector product: λᵀ∇²_ψψ L_FT and λᵀ∇²_θψ L_FT. So nothing but that product tells exact
    from finite, and finite never builds a second-order graph.

    Args:
        finetune_losses: K functions of a point.
        validation_loss: a function of a point.
        point: θ_0 and ψ_0 in one dict, as `_point` joins them.
        unroll, solver: as in `hypergradient`.
        state: the FT optimiser's state, or None.

    Returns:
        L_V, its gradient with respect to `point`, ψ_K and the optimiser's state after K steps.
    """
    solver = replace(solver, hvp=unroll.hvp or solver.hvp)
    everything = list(point)
    moving = everything if unroll.scope == "all" else list(_point(psi=_group(point, "psi")))
    start = {name: t.detach() for name, t in point.items()}
    point, trail = start, []
    for loss in finetune_losses:
        derivatives = _derivatives(loss, point, moving, solver)
        gradient = derivatives.gradient()
        point, state = finetune_step(point, gradient, unroll, state)
        trail.append((derivatives, gradient, state))

    value, adjoint = _value_and_gradient(validation_loss, point, everything)
    moments = None
    while trail:  # popped, so that each step's graph is freed once it has been used
        derivatives, gradient, after = trail.pop()
        adjoint_gradient, moments = finetune_step_adjoint(adjoint, moments, gradient, after, unroll)
        change = derivatives.along(adjoint_gradient, everything)
        adjoint = {name: adjoint[name] + change[name] for name in everything}
    return value, adjoint, _group(point, "psi"), state or {}


def finetune_step(params: Params, gradient: Params, unroll: Unroll, state: dict | None) -> tuple[Params, dict]:
    """One step of SGD or Adam (Kingma and Ba, ICLR 2015, algorithm 1), without side effects.

    Args:
        params: everything; what `gradient` does not name is passed on as it is.
        gradient: of what is to be moved.
        unroll: learning rate, betas and eps.
        state: {"step": int, "exp_avg": Params, "exp_avg_sq": Params}, or None or {} at the start. SGD has none.

    Returns:
        The parameters and the state after the step.

    Raises:
        ValueError: the state belongs to other parameters.
    """
    if unroll.optimizer == "sgd":
        return {**params, **{name: params[name] - unroll.lr * g for name, g in gradient.items()}}, {}
    zeros = {name: torch.zeros_like(g) for name, g in gradient.items()}
    state = state or {"step": 0, "exp_avg": zeros, "exp_avg_sq": zeros}
    missing = [name for name in gradient if name not in state["exp_avg"]]
    _require(not missing, "ft_state", f"without {', '.join(missing)}", "the state of the same parameters and scope")
    (beta1, beta2), step = unroll.betas, state["step"] + 1
    m = {name: beta1 * state["exp_avg"][name] + (1 - beta1) * g for name, g in gradient.items()}
    s = {name: beta2 * state["exp_avg_sq"][name] + (1 - beta2) * g * g for name, g in gradient.items()}
    rate, unbias = unroll.lr / (1 - beta1**step), 1 - beta2**step
    moved = {name: params[name] - rate * m[name] / ((s[name] / unbias).sqrt() + unroll.eps) for name in gradient}
    return {**params, **moved}, {"step": step, "exp_avg": m, "exp_avg_sq": s}


def finetune_step_adjoint(adjoint: Params, moments, gradient: Params, after: dict, unroll: Unroll):
    """The transpose of `finetune_step`'s derivative: from dL_V/d(what a step gave) to dL_V/d(what it was given).

    The parameters themselves pass through with derivative one, so that only gradient and moments need a formula.

    Args:
        adjoint: dL_V/d(parameters after the step).
        moments: dL_V/d(moments after the step) by way of the later steps; None after the last.
        gradient: the gradient that the step was given.
        after: the optimiser's state after the step.
        unroll: the step's learning rate, betas and eps.

    Returns:
        dL_V/d(gradient) and dL_V/d(moments before the step).
    """
    if unroll.optimizer == "sgd":
        return {name: -unroll.lr * adjoint[name] for name in gradient}, None
    (beta1, beta2), step = unroll.betas, after["step"]
    rate, unbias = unroll.lr / (1 - beta1**step), 1 - beta2**step
    to_gradient, to_m, to_s = {}, {}, {}
    for name, g in gradient.items():
        m, s = after["exp_avg"][name], after["exp_avg_sq"][name]
        root = (s / unbias).sqrt()
        # No gradient has ever reached a unit with s = 0: it is dead, and the infinite slope of the root there is no
        # information. Its derivative is taken as zero; with a dead unit's zero Hessian that is exact.
        alive = s > 0
        dm = torch.where(alive, -rate * adjoint[name] / (root + unroll.eps), 0)
        slope = rate * m * adjoint[name] / ((root + unroll.eps) ** 2 * 2 * unbias * torch.where(alive, root, 1))
        ds = torch.where(alive, slope, 0)
        if moments is not None:
            dm, ds = dm + moments[0][name], ds + moments[1][name]
        to_gradient[name] = (1 - beta1) * dm + 2 * (1 - beta2) * g * ds
        to_m[name], to_s[name] = beta1 * dm, beta2 * ds
    return to_gradient, (to_m, to_s)


# q ≈ (∇²_θθ L_PT + damping·I)⁻¹ v, on flat vectors. `product(d)` gives Hd and dᵀ∇²_θφ L_PT, or None for what is not asked.


def pretrain_products(derivatives, theta: Params, phi: Params, damping: float):
    """d → ((∇²_θθ L_PT + damping·I) d, dᵀ∇²_θφ L_PT): the two products that the implicit function theorem needs.

    Exact: one graph of ∇_θ L_PT serves all calls. Finite: one pair of passes, at θ ± εd, gives both.
    """
    inner, outer = list(_point(theta=theta)), list(_point(phi=phi))

    def product(d: Tensor, hessian: bool = True, mixed: bool = True) -> tuple[Tensor | None, Tensor | None]:
        wanted = (inner if hessian else []) + (outer if mixed else [])
        change = derivatives.along(_point(theta=_unflat(d, theta)), wanted)
        return (
            _flat({name: change[name] for name in inner}) + damping * d if hessian else None,
            _flat({name: change[name] for name in outer}) if mixed else None,
        )

    return product


def solve(product, v: Tensor, q0: Tensor | None, solver: Solver, theta: Params, preconditioner=None, passing=False):
    """q, qᵀ∇²_θφ L_PT and the relative residual ‖Hq − v‖ / ‖v‖ (nan where it would cost a product of its own)."""
    if not v.any():
        return torch.zeros_like(v), product(torch.zeros_like(v), hessian=False)[1], 0.0
    if solver.method == "identity":
        # Finite passes that differentiate by θ as well come by PT's gradient; exact ones have it from the start.
        return v, product(v, hessian=passing and solver.hvp == "finite")[1], math.nan
    if solver.method == "neumann":
        return neumann(product, v, q0, solver.terms, solver.alpha)
    if solver.method == "cg":
        precondition = (lambda r: _flat(preconditioner(_unflat(r, theta)))) if preconditioner else (lambda r: r)
        return conjugate_gradients(product, v, q0, solver.terms, solver.tol, precondition)
    return nystrom(product, v, solver.terms, solver.damping, solver.seed)


def neumann(product, v, q0, terms, alpha):
    """q = α Σ_{j≤terms} (I − αH)ʲ v, summed as the iteration q ← q + α(v − Hq) from q = αv, or going on from q0."""
    if q0 is None:
        q = alpha * v
        for _ in range(terms):
            q = q + alpha * (v - product(q, mixed=False)[0])
        return q, product(q, hessian=False)[1], math.nan
    q = q0
    for last in range(max(terms, 1) - 1, -1, -1):
        hessian_q, mixed = product(q, mixed=last == 0)
        r = v - hessian_q
        q = q + alpha * r
    return q, mixed, (r.norm() / v.norm()).item()


def conjugate_gradients(product, v, q0, terms, tol, precondition):
    """Preconditioned conjugate gradients; Hq and qᵀ∇²_θφ L_PT are carried along with q, being linear in it."""
    if q0 is None:
        q, r, mixed = torch.zeros_like(v), v, None
    else:
        hessian_q, mixed = product(q0)
        q, r = q0, v - hessian_q
    p, rz = None, None
    for _ in range(terms):
        if r.norm() <= tol * v.norm():
            break
        z = precondition(r)
        rz, previous = r @ z, rz
        p = z if p is None else z + (rz / previous) * p
        hessian_p, mixed_p = product(p)
        curvature = p @ hessian_p
        if curvature <= 0:  # no minimum this way: the quadratic model ends here, and so does its use
            break
        a = rz / curvature
        q, r = q + a * p, r - a * hessian_p
        mixed = a * mixed_p if mixed is None else mixed + a * mixed_p
    if mixed is None:  # q = 0
        mixed = product(q, hessian=False)[1]
    return q, mixed, (r.norm() / v.norm()).item()


def nystrom(product, v, rank, damping, seed):
    """(UΛUᵀ + damping·I)⁻¹ v, where UΛUᵀ ≈ ∇²_θθ L_PT comes from its products with `rank` random directions.

    At full rank the system in the basis of those directions is solved as it is (a singular Hessian needs damping). Below, what is not positive in the
    sketched Hessian is left to the damping (a Nyström approximation is one of a positive semi-definite matrix).
    """
    n, rank = len(v), min(rank, len(v))
    _require(rank == n or damping > 0, "Solver.damping", damping, f"positive for nystrom of rank {rank} < {n}")
    basis = torch.linalg.qr(_normal(n, rank, like=v, seed=seed)).Q
    sketch = torch.stack([product(d, mixed=False)[0] for d in basis.T], dim=1)
    _finite(q=sketch)  # linalg would say so less clearly
    core = basis.T @ sketch
    core = (core + core.T) / 2
    if rank == n:
        q = basis @ torch.linalg.solve(core, basis.T @ v)
    else:
        core = core - damping * torch.eye(rank, dtype=v.dtype, device=v.device)
        sketch = sketch - damping * basis
        values, vectors = torch.linalg.eigh(core)
        kept = values > values.abs().max() * rank * torch.finfo(v.dtype).eps
        factor = sketch @ (vectors[:, kept] / values[kept].sqrt())
        u, root, _ = torch.linalg.svd(factor, full_matrices=False)
        coefficients = u.T @ v
        q = u @ (coefficients / (root**2 + damping)) + (v - u @ coefficients) / damping
    hessian_q, mixed = product(q)
    return q, mixed, ((hessian_q - v).norm() / v.norm()).item()


def largest_curvature(product, v, seed, iterations=8):
    """The largest |eigenvalue| of H, from below, by power iterations on a seeded random vector."""
    d = _normal(len(v), like=v, seed=seed)
    for _ in range(iterations):
        d = product(d / d.norm(), mixed=False)[0]
        if not d.any():  # no curvature at all: any step will do
            return 1.0
    return d.norm().item()


# Derivatives of one loss at one point: its gradient, and how the gradient changes along a direction.


def _derivatives(loss, point, moving, solver):
    if solver.hvp == "exact":
        return _Exact(loss, point, moving)
    return _Finite(loss, point, moving, solver.step)


class _Exact:
    """By double backward. The graph of the gradient is built once and serves every direction."""

    def __init__(self, loss, point: Params, moving: list[str]):
        self.leaves = {name: t.detach().requires_grad_() for name, t in point.items()}
        with torch.enable_grad():
            value = _scalar(loss(self.leaves))
            self.graph = _grad(value, {name: self.leaves[name] for name in moving}, create_graph=True)
        self.passed = self.gradient()

    def gradient(self) -> Params:
        return {name: g.detach() for name, g in self.graph.items()}

    def along(self, direction: Params, wrt: list[str]) -> Params:
        """d/dε ∇_wrt loss(point + ε·direction) at ε = 0, which is ∇_wrt ⟨direction, ∇loss⟩."""
        outputs = {name: g for name, g in self.graph.items() if g.requires_grad}
        inputs = {name: self.leaves[name] for name in wrt}
        weights = [direction[name] for name in outputs]
        return _grad(list(outputs.values()), inputs, grad_outputs=weights, retain_graph=True)


class _Finite:
    """By central differences of first-order gradients, each pass of its own: memory stays that of plain training."""

    def __init__(self, loss, point: Params, moving: list[str], step: float | None):
        self.loss, self.point, self.moving, self.step = loss, point, moving, step
        self.passed: Params = {}  # the gradient up to O(step²), once a pair of passes has gone by the point

    def gradient(self) -> Params:
        return _value_and_gradient(self.loss, self.point, self.moving)[1]

    def along(self, direction: Params, wrt: list[str]) -> Params:
        """d/dε ∇_wrt loss(point + ε·direction) at ε = 0, up to O(ε²)."""
        norm = torch.stack([d.norm() for d in direction.values()]).norm().item() if direction else 0.0
        if norm == 0 or not wrt:
            return {name: torch.zeros_like(self.point[name]) for name in wrt}
        # The error is about step² from the third derivative and machine epsilon / step from rounding: least at the
        # cube root. It is the length of the whole step, however many parameters share it.
        dtype = next(iter(direction.values())).dtype
        epsilon = (self.step or torch.finfo(dtype).eps ** (1 / 3)) / norm
        ahead, behind = (
            _value_and_gradient(
                self.loss, {**self.point, **{name: self.point[name] + e * d for name, d in direction.items()}}, wrt
            )[1]
            for e in (epsilon, -epsilon)
        )
        if set(self.moving) <= set(wrt):
            self.passed = {name: (ahead[name] + behind[name]) / 2 for name in self.moving}
        return {name: (ahead[name] - behind[name]) / (2 * epsilon) for name in wrt}


def _value_and_gradient(loss, point: Params, wrt: list[str]) -> tuple[Tensor, Params]:
    """A loss and its first-order gradient; only `wrt` is tracked, so that a pass costs no more than it must."""
    leaves = {name: t.detach().requires_grad_(name in wrt) for name, t in point.items()}
    with torch.enable_grad():
        value = _scalar(loss(leaves))
        return value.detach(), _grad(value, {name: leaves[name] for name in wrt})


def _grad(outputs, inputs: Params, **options) -> Params:
    """torch.autograd.grad for a dict, with zeros for inputs that the outputs do not depend on."""
    outputs = outputs if isinstance(outputs, list) else [outputs] if outputs.requires_grad else []
    if not outputs or not inputs:
        return {name: torch.zeros_like(t) for name, t in inputs.items()}
    grads = torch.autograd.grad(outputs, list(inputs.values()), allow_unused=True, materialize_grads=True, **options)
    return dict(zip(inputs, grads, strict=True))


class _Replayed:
    """A loss as a function of a point; it draws the same random numbers at every call as at its first."""

    def __init__(self, loss: Loss, device: torch.device, first: str, second: str):
        self.loss, self.device, self.groups, self.start = loss, device, (first, second), None

    def __call__(self, point: Params) -> Tensor:
        arguments = [_group(point, group) for group in self.groups]
        if self.start is None:
            self.start = self._state()
            return self.loss(*arguments)
        now = self._state()
        self._set_state(self.start)
        try:
            return self.loss(*arguments)
        finally:
            self._set_state(now)

    def _state(self):
        accelerator = (
            None if self.device.type == "cpu" else torch.get_device_module(self.device).get_rng_state(self.device)
        )
        return torch.get_rng_state(), accelerator

    def _set_state(self, state):
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.get_device_module(self.device).set_rng_state(state[1], self.device)


# Dicts of tensors: joined, taken apart, flattened, checked.


def _point(**groups: Params) -> Params:
    """Several dicts in one: _point(theta={"w": t}) is {"theta.w": t}."""
    return {f"{group}.{name}": t for group, params in groups.items() for name, t in params.items()}


def _group(point: Params, group: str) -> Params:
    return {name[len(group) + 1 :]: t for name, t in point.items() if name.startswith(group + ".")}


def _flat(params: Params) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in params.values()])


def _unflat(vector: Tensor, like: Params) -> Params:
    pieces = vector.split([t.numel() for t in like.values()])
    return {name: p.view(t.shape).to(t.dtype) for p, (name, t) in zip(pieces, like.items(), strict=True)}


def _normal(*shape: int, like: Tensor, seed: int) -> Tensor:
    """Standard normal numbers that are the same on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=like.dtype).to(like.device)


def _scalar(value: Tensor) -> Tensor:
    _require(value.numel() == 1, "the loss", f"of shape {tuple(value.shape)}", "a scalar")
    return value.reshape(())


def _finite(**results) -> None:
    """Raises FloatingPointError that names what is not finite."""
    for label, result in results.items():
        tensors = result if isinstance(result, dict) else {"": result}
        bad = [name for name, t in tensors.items() if not t.isfinite().all()]
        if bad:
            raise FloatingPointError(f"{label} is not finite{': ' + ', '.join(bad) if bad != [''] else ''}")


# ---------------------------------------------------------------------------------------------------------------------
# 3. Meta-parameters: φ and what it does to pre-training
# ---------------------------------------------------------------------------------------------------------------------

import ast
import contextlib
import copy
import dataclasses
import errno
import gzip
import hashlib
import inspect
import itertools
import json
import os
import re
import shutil
import signal
import struct
import sys
import tempfile
import time
import zipfile
import zlib
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
import requests
import rich.console
import rich.progress
import rich.table
import torch.nn.functional as F
import typer
from torch import nn
from torch.utils.checkpoint import checkpoint


class BadInput(Exception):
    """Something that the user gave cannot be used. The message is one line: what, and where."""


class NotThere(BadInput):
    """A server says that it has no such file."""


def last_line(error: Exception) -> str:
    """Of its message: torch begins with what it did and ends with what was wrong."""
    return str(error).strip().splitlines()[-1].strip()[:160]


class RotationMean(nn.Module):
    """φ = the mean, in degrees, of the normal distribution that each image's rotation is drawn from.

    Raghu et al. 2021, section 4.1 (the synthetic rotation experiment); the draw is reparameterised, so that dL/dφ goes
    through the resampling of the images.
    """

    def __init__(self, degrees: float):
        super().__init__()
        self.rotation_mean_deg = nn.Parameter(torch.tensor(float(degrees)))

    def forward(self, images: Tensor, spread: float) -> Tensor:
        """Images [n, 1, h, w], each rotated by its own draw from N(φ, spread²) degrees."""
        angles = self.rotation_mean_deg + spread * torch.randn(len(images), device=images.device)
        return rotate(images, angles)


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Images [n, c, h, w] rotated counter-clockwise about their centre by degrees [n]; differentiable in both.

    Bicubic, because bilinear resampling blurs every angle but the multiples of 90°: blurred images are the better
    pre-training, and φ then settles beside them.
    """
    angles = degrees * (math.pi / 180)
    cos, sin, zero = angles.cos(), angles.sin(), torch.zeros_like(angles)
    inverse = torch.stack([torch.stack([cos, -sin, zero], -1), torch.stack([sin, cos, zero], -1)], 1)
    grid = F.affine_grid(inverse, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bicubic", align_corners=False)


class ExampleWeights(nn.Module):
    """φ = a network that gives each PT example, from its image and its label, a weight in (0, 1).

    Raghu et al. 2021, section 4.1 (the noisy-label experiment). The weight is the probability that the network gives
    the label, among all labels: what speaks for one label of an image speaks against the others.

    Args:
        scores: a network of images [n, 1, h, w] → one score a label [n, classes].
    """

    def __init__(self, scores: nn.Module):
        super().__init__()
        self.scores = scores

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Images [n, 1, h, w] and labels [n] to weights [n]."""
        return self.scores(images).softmax(1).gather(1, labels[:, None]).squeeze(1)


class TaskWeights(nn.Module):
    """φ = one number a PT task; the task's weight is 2σ(φ_t), so that every weight begins at 1.

    Raghu et al. 2021, section 5.1 (multitask PT on protein interaction graphs).
    """

    def __init__(self, tasks: int):
        super().__init__()
        self.task_logits = nn.Parameter(torch.zeros(tasks))

    def weights(self) -> Tensor:
        return 2 * self.task_logits.sigmoid()

    def forward(self, losses: Tensor, chosen: Tensor | None = None) -> Tensor:
        """The weighted mean of losses [tasks]; with `chosen` (bool, [tasks]) the mean over the chosen tasks.

        A choice has no derivative: the weights lend it theirs (straight-through, Bengio et al. 2013), so that the tasks
        that were not chosen learn what they would have been worth too.
        """
        weights = self.weights()
        if chosen is not None:
            weights = chosen * (len(chosen) / chosen.sum()) + weights - weights.detach()
        return (weights * losses).mean()

    def draw(self, k: int) -> Tensor:
        """k tasks without replacement, in proportion to exp φ_t (Gumbel top-k): bool, [tasks].

        Drawn, not the k best: at the start all φ_t are equal, and a task that is never chosen would never be tried.
        """
        noise = -torch.rand_like(self.task_logits).clamp_min(1e-20).log()
        chosen = torch.zeros(len(noise), dtype=torch.bool, device=noise.device)
        chosen[(self.task_logits.detach() - noise.log()).topk(k).indices] = True
        return chosen


class WarpAugmentation(nn.Module):
    """φ = a network that says of each signal how far to warp it in time, and a global scale of the warp.

    Raghu et al. 2021, section 5.2 (SimCLR on electrocardiograms). The warp is a random diffeomorphism: white noise is the
    velocity, scaling and squaring integrates it (Arsigny et al., MICCAI 2006), a Gaussian smooths what comes out. Order
    is preserved whatever φ is: the number of squarings is such that the first small step swaps no samples; composition,
    interpolation and smoothing of increasing maps, with borders replicated, are increasing again.

    Args:
        leads: channels of a signal.
        scale: s at the start; the velocity is 100 s² times the signal's magnitude, which is between 0 and 2.
    """

    def __init__(self, leads: int, scale: float, width: int = 32):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(float(scale)))
        self.layers = nn.Sequential(*(
            nn.Sequential(along_time(a, b, 15, 2, bias=True), nn.BatchNorm2d(b, track_running_stats=False), nn.ReLU())
            for a, b in itertools.pairwise([leads, *[width] * 4])
        ))  # fmt: skip
        self.last = nn.Linear(width, 1)

    def magnitudes(self, signals: Tensor) -> Tensor:
        """Signals [n, leads, t] to how far each is to be warped, [n] in (0, 2)."""
        return 2 * self.last(self.layers(as_images(signals)).mean((2, 3))).squeeze(1).sigmoid()

    def displacements(self, magnitudes: Tensor, samples: int) -> Tensor:
        """A random warp a signal: by how many samples each sample is taken from another place, [n, samples]."""
        noise = torch.randn(len(magnitudes), 1, samples, dtype=magnitudes.dtype, device=magnitudes.device)
        # At a quarter of the resolution a displacement is a quarter of the number, so values shrink along (as published).
        noise = F.interpolate(noise, scale_factor=0.25, mode="linear") / 4
        moved = 4 * integrate(100 * self.scale**2 * magnitudes[:, None] * noise.squeeze(1))
        moved = F.interpolate(moved[:, None], size=samples, mode="linear")
        taps = torch.arange(-12, 13, dtype=moved.dtype, device=moved.device)
        kernel = torch.exp(-(taps**2) / (2 * 12**2))
        return F.conv1d(F.pad(moved, (12, 12), mode="replicate"), (kernel / kernel.sum())[None, None]).squeeze(1)

    def forward(self, views: Tensor, magnitudes: Tensor) -> Tensor:
        """Views [n, leads, t], each resampled along its own warp; all leads of a view alike."""
        return resample(views, self.displacements(magnitudes, views.shape[2]))


def resample(signals: Tensor, moved: Tensor) -> Tensor:
    """Signals [n, leads, t], each sample taken `moved` [n, t] samples later; linear, beyond the borders as at them."""
    place = torch.arange(moved.shape[1], dtype=moved.dtype, device=moved.device) + moved
    grid = torch.stack([place * (2 / (moved.shape[1] - 1)) - 1, torch.zeros_like(place)], -1)[:, None]
    return F.grid_sample(signals[:, :, None], grid, padding_mode="border", align_corners=True).squeeze(2)


def integrate(velocity: Tensor, squarings: int = 5) -> Tensor:
    """Displacements [n, t] of the flow of a velocity field [n, t] for one unit of time, by scaling and squaring.

    More squarings than asked for where neighbours would change places in the first step (|Δv| / 2^squarings ≥ 1).
    """
    steepest = velocity.detach().diff(dim=1).abs().max().item()
    if 2**squarings <= 2 * steepest < math.inf:
        squarings = math.ceil(math.log2(steepest)) + 1
    moved, last = velocity / 2**squarings, velocity.shape[1] - 1
    grid = torch.arange(last + 1, dtype=moved.dtype, device=moved.device)
    for _ in range(squarings):  # u ← u + u(x + u), beyond the borders as at the borders
        place = (grid + moved).clamp(0, last)
        left = place.detach().floor().clamp(max=last - 1)
        share, left = place - left, left.long()
        moved = moved + torch.lerp(moved.gather(1, left), moved.gather(1, left + 1), share)
    return moved


class SignalAugmentation(nn.Module):
    """Two views of each signal: leads masked and noise added (the default of SimCLR on ECGs), then warped in time.

    Raghu et al. 2021, section 5.2. Per lead, a random stretch of up to half its length is set to zero and noise of up
    to 10 % of its standard deviation is added: U(0, 1)·σ(mask)·length and U(0, 1)·0.1·exp(noise).

    Args:
        leads: channels of a signal.
        scale: s of the `WarpAugmentation` at the start; None: no warp.
        strengths: whether `mask` and `noise`, 0 at the start, are φ as well.
    """

    def __init__(self, leads: int, scale: float | None, strengths: bool):
        super().__init__()
        for name in ("mask", "noise"):
            if strengths:
                self.register_parameter(name, nn.Parameter(torch.zeros(())))
            else:
                self.register_buffer(name, torch.zeros(()))
        self.warp = None if scale is None else WarpAugmentation(leads, scale)

    def masked(self, signals: Tensor) -> Tensor:
        n, leads, samples = signals.shape
        length, start = torch.rand(2, n, leads, 1, dtype=signals.dtype, device=signals.device)
        length = length * self.mask.sigmoid() * samples
        start = start * (samples - length)
        # The samples at the two ends of a stretch are masked in part, which makes the length differentiable.
        place = torch.arange(samples, dtype=signals.dtype, device=signals.device)
        return signals * (1 - (place + 1 - start).clamp(0, 1) * (start + length - place).clamp(0, 1))

    def forward(self, signals: Tensor) -> list[Tensor]:
        """Signals [n, leads, t] to two views of that shape."""
        deviation = 0.1 * self.noise.exp() * signals.std(2, keepdim=True)
        views = []
        for _ in range(2):
            noise = torch.rand_like(deviation) * deviation * torch.randn_like(signals)
            views.append(self.masked(signals) + noise)
        if self.warp is None:
            return views
        magnitudes = self.warp.magnitudes(signals)  # the signal's, so that both views share one pass
        return [self.warp(view, magnitudes) for view in views]


# ---------------------------------------------------------------------------------------------------------------------
# 4. Encoders
# ---------------------------------------------------------------------------------------------------------------------


class SmallCNN(nn.Module):
    """Two convolutions and a linear layer, for images of 8 x 8 to 28 x 28: [n, 1, h, w] to [n, features]."""

    def __init__(self, height: int, channels: int, features: int, dropout: float):
        super().__init__()
        reduced = math.ceil(height / 2) if height < 16 else math.ceil(math.ceil(height / 2) / 2)
        self.layers = nn.Sequential(
            # Missing pixels keep PT from learning its examples by heart; once it has, its loss says nothing about φ.
            nn.Dropout(dropout),
            nn.Conv2d(1, channels, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, 2 * channels, 3, stride=1 if height < 16 else 2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * channels * reduced**2, features),
            nn.ReLU(),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


class WithLogits(nn.Module):
    """An encoder whose last features are the logits of PT's classifier: what FT needs to take that classifier over."""

    def __init__(self, encoder: nn.Module, features: int, classes: int):
        super().__init__()
        self.encoder, self.classifier = encoder, nn.Linear(features, classes)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.encoder(images)
        return torch.cat([hidden, self.classifier(hidden)], 1)


class Last(nn.Module):
    """The last n of the features, as they are."""

    def __init__(self, n: int):
        super().__init__()
        self.n = n

    def forward(self, features: Tensor) -> Tensor:
        return features[:, -self.n :]


class GraphBatch(NamedTuple):
    """Graphs as one: their nodes in a row, a node's incoming edges in a row."""

    sums: Tensor  # [nodes, 10]: Σ over incoming edges and the self-loop of the 9 edge features, and their number
    source: Tensor  # [edges]: the node that an edge comes from; edges are sorted by the node that they go to
    start: Tensor  # [nodes]: where a node's incoming edges begin
    graph: Tensor  # [nodes]: the graph of a node
    centre: Tensor  # [graphs]: the node that a graph is the neighbourhood of
    size: Tensor  # [graphs]: number of nodes


class NeighbourSum(torch.autograd.Function):
    """x [nodes, d] to Σ_j x_j over each node's neighbours. A is symmetric, so the adjoint of A is A: any order of
    derivative is this function again, and nothing but the indices is kept for it."""

    @staticmethod
    def forward(ctx, x, source, start):
        ctx.save_for_backward(source, start)
        return F.embedding_bag(source, x, start, mode="sum")

    @staticmethod
    def backward(ctx, gradient):
        return NeighbourSum.apply(gradient.contiguous(), *ctx.saved_tensors), None, None


class GINLayer(nn.Module):
    """x_i → MLP(Σ_j [x_j, W e_ij + b]), over the neighbours j and i itself; the MLP is d·2 → d·2 → d with BatchNorm.

    The edge layer is linear, so Σ_j (W e_ij + b) = [W, b] s_i where s_i = Σ_j [e_ij, 1] is known before training. The
    MLP's first layer is linear as well: of its product with [x, e] the second half is one 2d x 10 matrix on s_i.
    """

    def __init__(self, width: int):
        super().__init__()
        self.edge = nn.Linear(9, width)
        self.first, self.norm = nn.Linear(2 * width, 2 * width), nn.BatchNorm1d(2 * width)
        self.second = nn.Linear(2 * width, width)

    def forward(self, x: Tensor, batch: GraphBatch, sums: Tensor) -> Tensor:
        """x [nodes, d], or [d] where all nodes are alike, and sums [nodes, 10] to [nodes, d]."""
        of_x, of_edges = self.first.weight.chunk(2, dim=1)
        edge = of_edges @ torch.cat([self.edge.weight, self.edge.bias[:, None]], 1)
        if x.dim() == 1:  # Σ_j x_j is x times their number, column 9
            edge = edge + F.pad((of_x @ x)[:, None], (9, 0))
            hidden = F.linear(sums, edge, self.first.bias)
        else:
            hidden = F.linear(x + NeighbourSum.apply(x, batch.source, batch.start), of_x, self.first.bias)
            hidden = hidden + F.linear(sums, edge)
        return self.second(self.norm(hidden).relu())


class GIN(nn.Module):
    """The graph isomorphism network of Hu et al. (ICLR 2020), for graphs with edge features and no node features.

    A batch of graphs to [graphs, 2 width]: the mean over nodes, and the centre.
    """

    def __init__(self, width: int, layers: int, dropout: float):
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(width) / math.sqrt(width))  # every node begins alike
        self.layers = nn.ModuleList(GINLayer(width) for _ in range(layers))
        self.dropout = dropout

    def forward(self, batch: GraphBatch) -> Tensor:
        x, sums = self.embedding, batch.sums.to(self.embedding.dtype)
        for i, layer in enumerate(self.layers):
            x = layer(x, batch, sums)
            x = F.dropout(x.relu() if i + 1 < len(self.layers) else x, self.dropout, self.training)
        total = x.new_zeros(len(batch.size), x.shape[1]).index_add(0, batch.graph, x)
        return torch.cat([total / batch.size[:, None], x[batch.centre]], 1)


def along_time(inputs: int, outputs: int, taps: int, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    """A convolution along time of what `as_images` gives: [n, inputs, 1, t] to [n, outputs, 1, ⌈t / stride⌉], `taps` odd."""
    return nn.Conv2d(inputs, outputs, (1, taps), (1, stride), (0, taps // 2), bias=bias)


def as_images(signals: Tensor) -> Tensor:
    """Signals [n, channels, t] as images of height 1 with channels last in memory: on a CPU convolutions are faster so,
    and nn.Conv1d has no such layout."""
    return signals[:, :, None].contiguous(memory_format=torch.channels_last)


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut (the basic block of He et al., CVPR 2016), along time."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.first, self.norm1 = along_time(inputs, outputs, 15, stride), nn.BatchNorm2d(outputs)
        self.second, self.norm2 = along_time(outputs, outputs, 15), nn.BatchNorm2d(outputs)
        self.shortcut = None
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(along_time(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm2(self.second(self.norm1(self.first(x)).relu()))
        return (hidden + (x if self.shortcut is None else self.shortcut(x))).relu()


class ResNet18(nn.Module):
    """ResNet-18 along time with kernels of 15: signals [n, leads, t] to features [n, 8 width].

    Raghu et al. 2021, section 5.2; the paper's width is 32, which makes 32, 64, 128 and 256 channels. Signals of 1,000
    samples are padded to 1,024 with zeros, their mean.
    """

    def __init__(self, leads: int, width: int):
        super().__init__()
        self.stem = nn.Sequential(
            along_time(leads, width, 15, 2), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d((1, 3), (1, 2), (0, 1))
        )
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        self.blocks = nn.Sequential(*(
            block for i in range(4)
            for block in (ResidualBlock(widths[i], widths[i + 1], 1 + (i > 0)),
                          ResidualBlock(widths[i + 1], widths[i + 1], 1))
        ))  # fmt: skip

    def forward(self, signals: Tensor) -> Tensor:
        return self.blocks(self.stem(as_images(F.pad(signals, (0, -signals.shape[2] % 64))))).mean((2, 3))


def nt_xent(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """SimCLR's loss (Chen et al., ICML 2020, equation 1) of two views [n, d]: each should find its other among all 2n."""
    z = F.normalize(torch.cat([a, b]), dim=1)
    similarity = (z @ z.T / temperature).fill_diagonal_(-math.inf)
    return F.cross_entropy(similarity, torch.arange(len(z), device=z.device).roll(len(a)))


def batch_norms(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d))]


def settle(network: nn.Module, inputs) -> None:
    """BatchNorm's statistics from data at once: an encoder without PT is then a baseline, not an overflow."""
    norms = batch_norms(network)
    with torch.no_grad():
        for norm in norms:
            norm.momentum = 1.0
        network.train()(inputs)
        for norm in norms:
            norm.momentum = 0.1


class Network(nn.Module):
    """θ: an encoder and a PT head. With `features=True` it stops at what the encoder gives, for the FT head."""

    def __init__(self, encoder: nn.Module, head: nn.Module):
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, *inputs, features: bool = False):
        hidden = self.encoder(*inputs)
        return hidden if features else self.head(hidden)


def call(module: nn.Module, params: Params, *inputs, train: bool = False, live: bool = False, **options):
    """`module(*inputs)` with other parameters, in training or evaluation mode.

    Buffers (BatchNorm's statistics) are copies, so that no pass changes what the next one sees, unless `live`.
    """
    module.train(train)
    buffers = {name: b if live else b.clone() for name, b in module.named_buffers()}
    return torch.func.functional_call(module, {**params, **buffers}, inputs, options)


# ---------------------------------------------------------------------------------------------------------------------
# 5. Data: download, verify, load
# ---------------------------------------------------------------------------------------------------------------------

MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist"
MNIST_SHA256 = {
    "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}


class Images(NamedTuple):
    """A data set of labelled images, split into disjoint parts."""

    pixels: dict[str, Tensor]  # by part: [n, 1, h, w], uint8
    labels: dict[str, Tensor]  # by part: [n], int64
    scale: float  # pixels / scale lie in [0, 1]
    classes: int


def load_images(source: str, data: Path, seed: int) -> Images:
    """Digits or MNIST in the parts pretrain, finetune, validation and test: stratified by label, drawn by seed.

    digits: 1,000, 300, 250 and the other 247 of scikit-learn's 1,797 scans (8 x 8).
    mnist: 50,000, 1,000 and 1,000 of the 60,000 training images; the published 10,000 test images (28 x 28).
    """
    from sklearn.model_selection import train_test_split

    if source == "digits":
        from sklearn.datasets import load_digits

        bundle = load_digits()
        pixels, labels, sizes, scale = bundle.images.astype(np.uint8), bundle.target, (1000, 300, 250), 16.0
    else:
        pixels, labels = (read_idx(data / "mnist" / f"train-{kind}") for kind in MNIST_KINDS)
        test = tuple(read_idx(data / "mnist" / f"t10k-{kind}") for kind in MNIST_KINDS)
        sizes, scale = (50_000, 1000, 1000), 255.0
        for name, (x, y) in {"train": (pixels, labels), "t10k": test}.items():
            count = 60_000 if name == "train" else 10_000
            if x.shape != (count, 28, 28) or y.shape != (count,) or y.max() > 9:
                raise BadInput(f"{data / 'mnist'}: {name} images {x.shape} and labels {y.shape} are not MNIST's")
    parts, rest = {}, np.arange(len(labels))
    for part, size in zip(("pretrain", "finetune", "validation"), sizes, strict=True):
        chosen, rest = train_test_split(rest, train_size=size, stratify=labels[rest], random_state=seed)
        parts[part] = (pixels[chosen], labels[chosen])
    parts["test"] = (pixels[rest], labels[rest]) if source == "digits" else test
    return Images(
        pixels={part: torch.from_numpy(x.copy()).unsqueeze(1) for part, (x, _) in parts.items()},
        labels={part: torch.from_numpy(y.astype(np.int64)) for part, (_, y) in parts.items()},
        scale=scale,
        classes=10,
    )


MNIST_KINDS = ("images-idx3-ubyte.gz", "labels-idx1-ubyte.gz")


def read_idx(path: Path) -> np.ndarray:
    """A gzip-compressed idx file of unsigned bytes (the format of MNIST's publishers).

    Raises:
        BadInput: the file is missing, not gzip, not idx, or of another length than its header says.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except FileNotFoundError:
        raise BadInput(f"{path} is missing: 'python metapt.py download mnist' fetches it") from None
    except (OSError, EOFError, ValueError) as error:
        raise BadInput(f"{path} is not a whole gzip file: {error}") from None
    if len(content) < 4 or content[:3] != b"\0\0\x08" or len(content) < 4 + 4 * content[3]:
        raise BadInput(f"{path} has no idx header of unsigned bytes")
    shape = struct.unpack(f">{content[3]}I", content[4 : 4 + 4 * content[3]])
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * content[3])
    if len(values) != math.prod(shape) or len(values) == 0:
        raise BadInput(f"{path} holds {len(values)} values, its header says {shape}")
    return values.reshape(shape)


def fetch(url: str, path: Path, sha256: str | None, advance, tries: int = 5, session=requests) -> None:
    """Downloads one file: goes on where an earlier try stopped, verifies, and only then gives the file its name.

    Args:
        url: where it is.
        path: where it goes. What is there and verifies stays; what does not verify is replaced.
        sha256: what it must hash to; None where nobody has published it: the caller checks what came.
        advance: called with (bytes so far, bytes in all or None).
        tries: attempts, with pauses of 1, 2, 4, … seconds between them.
        session: a requests.Session, whose connections are used again.

    Raises:
        BadInput: the address cannot be had, or gives something else; NotThere where the server has no such file.
    """
    if path.exists() and sha256 in (None, digest(path)):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    for attempt in range(tries):
        have = part.stat().st_size if part.exists() else 0
        try:
            # "identity": a compressed answer could not be gone on with, nor its length be known.
            headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
            with session.get(url, headers=headers, stream=True, timeout=30) as response:
                response.raise_for_status()
                response.raw.enforce_content_length = (
                    False  # what came before a cut is kept; the length is checked below
                )
                resumed = response.status_code == 206
                sent = re.fullmatch(rf"bytes {have}-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
                if resumed and not sent:
                    part.unlink(missing_ok=True)
                    raise OSError("it sent another part than was asked for")
                total = int(response.headers.get("Content-Length", 0)) + (have if resumed else 0)
                if resumed and sent[1].isdecimal():
                    total = int(sent[1])  # of the file, of which a server may send less than was asked for
                with part.open("ab" if resumed else "wb") as file:
                    for chunk in response.iter_content(1 << 16):
                        file.write(chunk)
                        advance(file.tell(), total or None)
            if total and part.stat().st_size < total:
                problem = f"{url}: the connection ended early"
            elif sha256 not in (None, digest(part)):
                part.unlink()
                problem = f"{url}: its SHA-256 is not {sha256}; what came was discarded"
            else:
                break
        except requests.HTTPError as error:
            problem, code = str(error), error.response.status_code
            if code == 416:
                # All of it may be here; if more is here than there, or something else: begin again.
                whole = error.response.headers.get("Content-Range") == f"bytes */{have}"
                if have and whole and sha256 in (None, digest(part)):
                    break
                part.unlink(missing_ok=True)
            elif code in (404, 410):
                raise NotThere(problem) from None
            elif code < 500 and code != 429:
                raise BadInput(problem) from None
        except OSError as error:  # what requests raises is one, too
            problem = f"{url}: {error}"
            if isinstance(error, ValueError):  # no address at all
                raise BadInput(problem) from None
        except ValueError as error:  # a header that cannot be
            problem = f"{url}: {error}"
        if attempt + 1 < tries:
            time.sleep(2**attempt)
    else:
        raise BadInput(f"{problem} ({tries} tries)")
    part.replace(path)


def adopt(source: Path, path: Path, sha256: str) -> None:
    """Copies a file that is already at hand, after the same check as `fetch`."""
    if not source.is_file():
        raise BadInput(f"{source} is missing")
    if digest(source) != sha256:
        raise BadInput(f"{source}: its SHA-256 is not {sha256}")
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, path.with_name(path.name + ".part"))
    path.with_name(path.name + ".part").replace(path)


@contextlib.contextmanager
def prepared_folder(folder: Path, form: str):
    """A new folder to fill, which takes the place of `folder` when it is whole.

    Raises:
        BadInput: `folder` holds something else than prepared data of the format `form`, which alone is ever replaced.
    """
    folder = folder.resolve()
    part, old = (folder.with_name(f".{folder.name}.metapt-{what}") for what in ("part", "old"))
    if old.exists() and not folder.exists():  # an earlier run was killed between two renames
        old.replace(folder)
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{folder} is a file, not a folder of prepared data")
    entries = sorted(folder.iterdir()) if folder.exists() else []
    if others := [path.name for path in entries if path.suffix not in (".bin", ".npz", ".json") or not path.is_file()]:
        raise BadInput(f"{folder} holds {others[0]}, which is no prepared data: remove it, or name another folder")
    if entries and (not (folder / "about.json").exists() or load_json(folder / "about.json").get("format") != form):
        raise BadInput(f"{folder} holds something else than prepared data: name another folder")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        yield part
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.replace(old)
        part.replace(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if old.exists() and not folder.exists():
            old.replace(folder)


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Protein interaction graphs. A graph is the neighbourhood of one protein; edges have 9 features: seven kinds of
# evidence, self-loop, masked (Hu et al., ICLR 2020). Whatever the source, it is prepared once into flat arrays.

PPI_URL = "http://snap.stanford.edu/gnn-pretrain/data/bio_dataset.zip"
PPI_FILE = "supervised/processed/geometric_data_processed.pt"
PPI_SOURCES = ("published", "string-yeast")
PPI_FORMAT = "metapt graphs 1"
PPI_ARRAYS = {  # file: type, and which count of about.json says how many rows there are
    "sizes": (np.int32, "graphs"),  # nodes of a graph
    "degrees": (np.int32, "graphs"),  # directed edges of a graph
    "centre": (np.int32, "graphs"),
    "species": (np.int32, "graphs"),
    "labels": (np.uint8, "graphs"),  # one bit a task
    "sums": (np.float32, "nodes"),  # 10 columns: see GraphBatch
    "source": (np.uint16, "edges"),  # node within the graph; edges are sorted by graph and by the node they go to
}
CHANNELS = ("neighborhood", "fusion", "cooccurence", "coexpression", "experimental", "database", "textmining")


class Graphs:
    """Prepared graphs, memory-mapped (on an accelerator: copied there); nothing is done graph by graph.

    Raises:
        BadInput: the folder is missing, or not what `prepare_graphs` writes.
    """

    def __init__(self, folder: Path, device: torch.device):
        if not (folder / "about.json").exists():
            raise BadInput(f"{folder / 'about.json'} is missing: 'python metapt.py download ppi' prepares the graphs")
        self.about, self.device = load_json(folder / "about.json"), device
        arrays = {}
        for name, (kind, count) in PPI_ARRAYS.items():
            path, columns = folder / f"{name}.bin", 1
            try:
                columns = {"labels": -(-self.about["tasks"] // 8), "sums": 10}.get(name, 1)
                shape = (self.about[count], columns)
                if (
                    self.about["format"] != PPI_FORMAT
                    or path.stat().st_size != math.prod(shape) * np.dtype(kind).itemsize
                ):
                    raise ValueError
                values = np.memmap(path, kind, mode="c", shape=shape)
            except (OSError, ValueError, KeyError, TypeError):
                raise BadInput(f"{path} does not fit {folder / 'about.json'}: prepare the graphs anew") from None
            arrays[name] = torch.from_numpy(values if columns > 1 or name == "labels" else values[:, 0]).to(device)
        self.sizes, self.degrees, self.centre = (arrays[n].long() for n in ("sizes", "degrees", "centre"))
        self.species, self.bits, self.sums, self.source = (arrays[n] for n in ("species", "labels", "sums", "source"))
        self.first_node, self.first_edge = (t.cumsum(0) - t for t in (self.sizes, self.degrees))

    def batch(self, index: Tensor) -> GraphBatch:
        """The graphs `index` [graphs] as one."""
        size, degree = self.sizes[index], self.degrees[index]
        first = size.cumsum(0) - size
        sums = self.sums[spans(self.first_node[index], size)]
        source = self.source[spans(self.first_edge[index], degree)].long() + first.repeat_interleave(degree)
        incoming = sums[:, 9].long() - 1  # without the self-loop
        graph = torch.arange(len(index), device=self.device).repeat_interleave(size)
        return GraphBatch(sums, source, incoming.cumsum(0) - incoming, graph, self.centre[index] + first, size)

    def labels(self, index: Tensor, tasks: Tensor | None = None) -> Tensor:
        """0 or 1: [graphs, tasks], for all tasks or for some."""
        tasks = torch.arange(self.about["tasks"], device=self.device) if tasks is None else tasks
        return ((self.bits[index][:, tasks // 8] >> (tasks % 8).to(torch.uint8)) & 1).float()

    def positives(self, index: Tensor, tasks: Tensor | None = None) -> np.ndarray:
        """How many of the graphs `index` have label 1: [tasks]."""
        return sum(self.labels(i, tasks).sum(0) for i in index.split(4096)).cpu().numpy()


def spans(start: Tensor, length: Tensor) -> Tensor:
    """The numbers start_i … start_i + length_i − 1, for one i after the other."""
    shift = (start - (length.cumsum(0) - length)).repeat_interleave(length)
    return torch.arange(len(shift), device=start.device) + shift


class RawGraphs(NamedTuple):
    """Some graphs as a source gives them: numpy arrays, one graph after the other."""

    sizes: np.ndarray  # [graphs]: nodes
    degrees: np.ndarray  # [graphs]: directed edges
    edges: np.ndarray  # [2, edges]: from, to; numbers within the graph
    features: np.ndarray  # [edges, 9]
    centre: np.ndarray  # [graphs]: number within the graph
    species: np.ndarray  # [graphs]: NCBI taxon
    labels: np.ndarray  # [graphs, tasks]: 0 or 1


def prepare_graphs(folder: Path, pieces, terms: list[str], finetune_terms: int) -> dict:
    """Writes `RawGraphs` in the prepared layout; the folder gets its name when it is whole.

    Args:
        folder: where it goes; prepared graphs that are there are replaced.
        pieces: an iterable of RawGraphs, so that a source need not be in memory at once.
        terms: names of the tasks.
        finetune_terms: the last so many of them are FT tasks; 0: they are drawn by seed.

    Returns:
        What about.json says: counts and names.

    Raises:
        BadInput: a graph that cannot be, no graph at all, or a folder that holds something else.
    """
    counts = {"graphs": 0, "nodes": 0, "edges": 0}
    with prepared_folder(folder, PPI_FORMAT) as part:
        with contextlib.ExitStack() as stack:
            files = {name: stack.enter_context((part / f"{name}.bin").open("wb")) for name in PPI_ARRAYS}
            for piece in pieces:
                arrays = flatten_graphs(piece, counts["graphs"], len(terms))
                for name, values in arrays.items():
                    values.astype(PPI_ARRAYS[name][0]).tofile(files[name])
                added = {"graphs": len(piece.sizes), "nodes": piece.sizes.sum(), "edges": piece.degrees.sum()}
                counts = {name: counts[name] + int(n) for name, n in added.items()}
        if not all(counts.values()):
            raise BadInput(f"there is no graph with an edge: {counts['graphs']} graphs, {counts['edges']} edges")
        about = {"format": PPI_FORMAT, **counts, "tasks": len(terms), "finetune_terms": finetune_terms, "terms": terms}
        save_json(part / "about.json", about)
    return about


def flatten_graphs(raw: RawGraphs, before: int, tasks: int) -> dict[str, np.ndarray]:
    """The arrays of the prepared layout, after checks; `before`: graphs before these, to say which one is wrong."""
    whole = {"sizes": (raw.sizes, 1), "degrees": (raw.degrees, 1), "edges": (raw.edges, 2), "centre": (raw.centre, 1),
             "species": (raw.species, 1)}  # fmt: skip
    for name, (values, dimensions) in whole.items():
        if values.ndim != dimensions or not np.issubdtype(values.dtype, np.integer):
            raise BadInput(f"{name} of the graphs: {values.dtype} {list(values.shape)}, expected whole numbers")
    rows = {len(raw.sizes)} | {len(v) for v in (raw.degrees, raw.centre, raw.species, raw.labels)}
    columns = {raw.edges.shape[1], len(raw.features), int(raw.degrees.sum())}
    if (
        len(rows) > 1
        or len(columns) > 1
        or len(raw.edges) != 2
        or raw.features.ndim != 2
        or raw.labels.ndim != 2
        or (raw.degrees < 0).any()
    ):
        raise BadInput(f"arrays of graphs that do not fit each other: {sorted(rows)} graphs, {sorted(columns)} edges")
    if abs(raw.species).max(initial=0) >= 2**31:
        raise BadInput(f"species {abs(raw.species).max()}: expected an NCBI taxon")
    graph = np.repeat(np.arange(len(raw.sizes)), raw.degrees)
    first = (raw.sizes.cumsum() - raw.sizes)[graph]
    source, target = raw.edges

    def require(right, what, graphs=None):
        if not right.all():
            wrong = np.flatnonzero(~right)[0]
            raise BadInput(f"graph {before + (wrong if graphs is None else graphs[wrong])}: {what}")

    require((raw.sizes > 0) & (raw.sizes < 2**16), "it has no nodes, or more than 65,535")
    require((raw.centre >= 0) & (raw.centre < raw.sizes), "its centre is none of its nodes")
    require((raw.edges.min(0) >= 0) & (raw.edges.max(0) < raw.sizes[graph]), "an edge leaves the graph", graph)
    require(((raw.labels == 0) | (raw.labels == 1)).all(1), "a label is neither 0 nor 1")
    require(np.isfinite(raw.features).all(1), "an edge feature is not finite", graph)
    if raw.labels.shape[1] != tasks or raw.features.shape[1] != 9:
        raise BadInput(f"{raw.labels.shape[1]} labels and {raw.features.shape[1]} edge features, not {tasks} and 9")
    order = np.lexsort((source, first + target))
    other = np.lexsort((target, first + source))
    there_and_back = ((first + target)[order] == (first + source)[other]) & (source[order] == target[other])
    require(there_and_back, "an edge has no counterpart in the other direction", graph[order])
    sums = torch.zeros(int(raw.sizes.sum()), 10)
    sums[:, 7] = sums[:, 9] = 1  # the self-loop: feature 7
    columns = np.concatenate([raw.features, np.ones((len(target), 1))], 1).astype(np.float32)
    sums.index_add_(0, torch.from_numpy(first + target), torch.from_numpy(columns))
    return {"sizes": raw.sizes, "degrees": raw.degrees, "centre": raw.centre, "species": raw.species,
            "labels": np.packbits(raw.labels.astype(bool), axis=1, bitorder="little"), "sums": sums.numpy(),
            "source": source[order]}  # fmt: skip


PYG_PARTS = ("edge_index", "edge_attr", "center_node_idx", "species_id", "go_target_pretrain", "go_target_downstream")


class PygData:
    """What a PyG 1.0 `Data` object is restored to: its attributes, none of its code."""


def read_pyg(path: Path) -> tuple[dict, dict]:
    """(attributes, slices) of a pickle `(data, slices)` of torch.save, old container or zip, without running its code.

    Raises:
        BadInput: it cannot be read, or it asks for any class or function but PyG's `Data`, which is named.
    """
    others = torch.serialization.get_safe_globals()  # an imported PyG has put its own Data there, under the same name
    torch.serialization.clear_safe_globals()
    try:
        with torch.serialization.safe_globals([(PygData, "torch_geometric.data.data.Data")]):
            data, slices = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError:
        raise BadInput(f"{path} is missing") from None
    except Exception as error:  # noqa: BLE001 (torch raises half a dozen types for files that are torn or hostile)
        asked = re.search(r"GLOBAL ([\w.]+)|(?:class|function) ([\w.]+\.\w+)", str(error))
        # Never torch's own words: they tell how to load it unsafely.
        reason = (
            f"it asks for {asked[1] or asked[2]}"
            if asked
            else f"it is torn, or no such pickle ({type(error).__name__})"
        )
        raise BadInput(f"{path} is not a data set of Hu et al.: {reason}") from None
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(others)
    if not isinstance(data, PygData) or not isinstance(slices, dict):
        raise BadInput(f"{path} is not a data set of Hu et al.: it is no pair of a Data object and slices")
    return vars(data), slices


def published_graphs(data: dict, slices: dict, at_once: int = 4096):
    """RawGraphs from the attributes of a collated PyG data set; the centre's number is within its own graph."""
    try:
        lengths = {name: len(slices[name]) for name in ("x", *PYG_PARTS)}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"slices of different lengths: {lengths}")
        graphs = lengths["x"] - 1
        for begin in range(0, graphs, at_once):
            end = min(begin + at_once, graphs)

            def cut(name, dim=0, begin=begin, end=end):
                low, high = slices[name][begin].item(), slices[name][end].item()
                return data[name].narrow(dim, low, high - low).numpy()

            sizes, degrees = (slices[n][begin : end + 1].diff().numpy() for n in ("x", "edge_index"))
            labels = [cut(f"go_target_{name}").reshape(end - begin, -1) for name in ("pretrain", "downstream")]
            raw = RawGraphs(sizes, degrees, cut("edge_index", 1), cut("edge_attr"), cut("center_node_idx").reshape(-1),
                            cut("species_id").reshape(-1), np.concatenate(labels, 1))  # fmt: skip
            yield raw
    except (KeyError, IndexError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise BadInput(f"the data set is not laid out as Hu et al.'s: {type(error).__name__} {error}") from None


def prepare_published(source: Path, folder: Path) -> dict:
    """The benchmark of Hu et al. from its zip, its unpacked folder or the file itself, into the prepared layout."""
    if source.is_dir():
        found = [*source.glob("bio_dataset.zip"), *sorted(source.rglob(PPI_FILE))]
        if not found:
            raise BadInput(f"{source} holds neither bio_dataset.zip nor {PPI_FILE}")
        source = found[-1]
    if not source.is_file():
        raise BadInput(f"{source} is missing")
    with contextlib.ExitStack() as stack:
        if source.suffix == ".zip":
            folder.parent.mkdir(parents=True, exist_ok=True)
            own = stack.enter_context(tempfile.TemporaryDirectory(prefix=".metapt-", dir=folder.parent))
            source = unzip_published(source, Path(own))
        data, slices = read_pyg(source)
        try:
            counts = [len(data[f"go_target_{n}"]) // (len(slices["x"]) - 1) for n in ("pretrain", "downstream")]
        except (KeyError, TypeError, ZeroDivisionError) as error:
            raise BadInput(f"{source} is not laid out as Hu et al.'s: {type(error).__name__} {error}") from None
        terms = [f"PT task {i}" for i in range(counts[0])] + [f"FT task {i}" for i in range(counts[1])]
        return prepare_graphs(folder, published_graphs(data, slices), terms, counts[1])


def unzip_published(archive: Path, folder: Path) -> Path:
    """Takes the one file that is needed out of the zip (which checks its CRC) into a folder that the caller removes."""
    path = folder / "geometric_data_processed.pt"
    try:
        with zipfile.ZipFile(archive) as content:
            names = content.namelist()
            if out := [
                n for n in names if n.startswith(("/", "\\")) or ".." in Path(n.replace("\\", "/")).parts or ":" in n
            ]:
                raise BadInput(f"{archive} holds {out[0]!r}, which leaves the folder")
            # "unsupervised/processed" holds a file of the same name
            if not (found := [n for n in names if f"/{n}".endswith(f"/{PPI_FILE}")]):
                raise BadInput(f"{archive} holds no {PPI_FILE}")
            enough_space(folder, 5 * content.getinfo(found[0]).file_size // 4)  # what is prepared from it is small
            with content.open(found[0]) as member, path.open("wb") as file:
                shutil.copyfileobj(member, file, 1 << 20)
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, NotImplementedError) as error:
        raise BadInput(
            f"{archive} is not a whole zip file that can be read, delete it to fetch it anew: {error}"
        ) from None
    return path


def enough_space(folder: Path, needed: int) -> None:
    while not folder.exists():
        folder = folder.parent
    if (free := shutil.disk_usage(folder).free) < needed:
        raise BadInput(f"{folder}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")


def prepare_string(source: Path, folder: Path, cap: int = 64, species: int = 4932) -> dict:
    """Ego networks of radius 1 from STRING's evidence networks and GO annotation, into the prepared layout.

    Args:
        source: a folder (or one whose `original/` does) with *_<channel>_*.txt: "u v score", nodes numbered from 1;
            *_node_dict.txt: {protein: node − 1}; org_*.txt: tab-separated, a protein a row, a GO term a column, 0 or 1.
            Any of them may be gzip-compressed. A channel without a file is zero throughout.
        folder: where the graphs go.
        cap: of more neighbours than would make this many nodes, those with the highest total score stay.
        species: NCBI taxon.

    Raises:
        BadInput: a file is missing or not what it should be.
    """
    source = source / "original" if (source / "original").is_dir() else source
    if cap < 2:
        raise BadInput(f"--cap is {cap}, expected 2 or more: a centre and a neighbour")

    def find(pattern):
        return sorted([*source.glob(pattern + ".txt"), *source.glob(pattern + ".txt.gz")])

    def text(path):
        return (gzip.open if path.suffix == ".gz" else open)(path, "rt")

    if (
        not (dictionary := find("*node_dict"))
        or not (matrices := find("org_*"))
        or not any(find(f"Org*_{c}_*") for c in CHANNELS)
    ):
        raise BadInput(f"{source} holds no *_node_dict.txt, no org_*.txt or no Org*_<channel>_*.txt")
    terms, columns, scores = [], [], {}
    try:
        path = dictionary[0]
        with text(path) as file:
            node_of = dict(ast.literal_eval(file.read()))
        proteins = max(node_of.values()) + 1
        if len(set(node_of.values())) < len(node_of) or min(node_of.values()) < 0 or proteins > 1_000_000:
            raise ValueError("two proteins on one node, or a node that is none of 0 to 999,999")
        for channel in CHANNELS:
            for path in find(f"Org*_{channel}_*"):
                with text(path) as file:
                    u, v, score = np.loadtxt(file, unpack=True, ndmin=2)
                if not np.isfinite([u, v, score]).all() or (u % 1).any() or (v % 1).any():
                    raise ValueError("a node that is no whole number, or a score that is not finite")
                scores[channel] = (u.astype(np.int64) - 1) * proteins + v.astype(np.int64) - 1, score
                if min(u.min(), v.min()) < 1 or max(u.max(), v.max()) > proteins or (u == v).any():
                    raise ValueError("a link to itself, or to a node that the dictionary does not have")
        for path in matrices:
            with text(path) as file:
                names = file.readline().split()[1:]
                rows = [row for row in map(str.split, file) if row[0] in node_of]  # others have no links
            values = np.array([row[1:] for row in rows], np.int64)
            if not ((values == 0) | (values == 1)).all():
                raise ValueError("a label is neither 0 nor 1")
            table = np.zeros((proteins, len(names)), np.uint8)
            table[[node_of[row[0]] for row in rows]] = values
            terms, columns = terms + names, [*columns, table]
    except (OSError, EOFError, zlib.error, ValueError, LookupError, TypeError, ArithmeticError, SyntaxError,
            MemoryError, RecursionError) as error:  # fmt: skip
        raise BadInput(f"{path} cannot be read: {type(error).__name__} {error}") from None

    keys = np.unique(np.concatenate([key for key, _ in scores.values()]))  # sorted by u, then v
    u, v = keys // proteins, keys % proteins
    features, strength = np.zeros((len(keys), 9), np.float32), np.zeros(len(keys))
    for channel, (key, score) in scores.items():
        place = np.searchsorted(keys, key)
        features[place, CHANNELS.index(channel)] = score > 0
        strength[place] += score
    first = np.searchsorted(u, np.arange(proteins + 1))
    centres = np.flatnonzero(np.diff(first))
    position, sizes, degrees, edges, kept_edges = np.full(proteins, -1), [], [], [], []
    for centre in centres:
        own = np.arange(first[centre], first[centre + 1])
        own = np.sort(own[np.argsort(-strength[own], kind="stable")[: cap - 1]])
        nodes = np.concatenate([[centre], v[own]])
        position[nodes] = np.arange(len(nodes))
        inside = np.concatenate([np.arange(first[n], first[n + 1]) for n in nodes])
        inside = inside[position[v[inside]] >= 0]
        edges.append(position[np.stack([u[inside], v[inside]])])
        kept_edges.append(inside)
        sizes.append(len(nodes))
        degrees.append(len(inside))
        position[nodes] = -1
    raw = RawGraphs(np.array(sizes), np.array(degrees), np.concatenate(edges, 1), features[np.concatenate(kept_edges)],
                    np.zeros(len(centres), np.int64), np.full(len(centres), species),
                    np.concatenate(columns, 1)[centres])  # fmt: skip
    return prepare_graphs(folder, [raw], terms, 0)


# ECGs: PTB-XL (Wagner et al., Scientific Data 2020), the 100 Hz files. Read once into flat arrays.

ECG_URL = "https://physionet.org/files/ptb-xl/1.0.3"
ECG_FORMAT = "metapt ecgs 1"
ECG_FILES = ("ptbxl_database.csv", "scp_statements.csv", "LICENSE.txt")
LEADS = ("I", "II", "III", "AVR", "AVL", "AVF", "V1", "V2", "V3", "V4", "V5", "V6")
SUPERCLASSES = ("NORM", "MI", "STTC", "CD", "HYP")
ECG_HERTZ, ECG_SAMPLES = 100, 1000
INVALID = -(2**15)  # what WFDB's format 16 writes for a sample that is not there


class Records:
    """Prepared ECGs: samples memory-mapped (on an accelerator: copied there), and an index in memory.

    Raises:
        BadInput: the folder is missing, or not what `prepare_ecg` writes.
    """

    def __init__(self, folder: Path, device: torch.device):
        if not (folder / "about.json").exists():
            raise BadInput(f"{folder / 'about.json'} is missing: 'python metapt.py download ecg' prepares the records")
        about, shape = load_json(folder / "about.json"), (-1, ECG_SAMPLES, len(LEADS))
        try:
            with np.load(folder / "index.npz", allow_pickle=False) as file:
                index = {name: torch.from_numpy(file[name]).to(device) for name in ECG_INDEX}
            samples = np.memmap(folder / "samples.bin", np.int16, mode="c").reshape(shape)
            lengths = {len(samples), about["records"], *(len(values) for values in index.values())}
            if about["format"] != ECG_FORMAT or len(lengths) > 1:
                raise ValueError("lengths differ")
            columns = {"labels": (len(SUPERCLASSES),), "gain": (len(LEADS),), "baseline": (len(LEADS),), "sums": (2,)}
            if any(values.shape[1:] != columns.get(name, ()) for name, values in index.items()):
                raise ValueError("shapes differ")
            if not all(v.isfinite().all() for v in index.values()) or not (index["gain"] > 0).all():
                raise ValueError("a gain that is not positive, or a number that is not finite")
        except Exception as error:  # noqa: BLE001 (numpy raises half a dozen types for files that are torn)
            raise BadInput(f"{folder} is not what download wrote, prepare the records anew: {error}") from None
        self.ecg_id, self.patient, self.fold = index["ecg_id"], index["patient"], index["fold"]
        self.labels, self.gain, self.baseline = index["labels"], index["gain"], index["baseline"]
        self.sums = index["sums"]
        self.samples = torch.from_numpy(samples).to(device)

    def millivolts(self, index: Tensor) -> Tensor:
        """Signals [n, 12, 1000] in mV."""
        signals = (self.samples[index].float() - self.baseline[index][:, None]) / self.gain[index][:, None]
        return signals.transpose(1, 2).contiguous()  # noise of its shape is drawn 8 x faster than in the other order

    def moments(self, index: Tensor) -> tuple[float, float]:
        """Mean and standard deviation, in mV, over all samples of all leads of these records."""
        total, squares = self.sums[index].sum(0).tolist()
        n = len(index) * ECG_SAMPLES * len(LEADS)
        return total / n, math.sqrt(squares / n - (total / n) ** 2)


ECG_INDEX = ("ecg_id", "patient", "fold", "labels", "gain", "baseline", "sums")


def read_record(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One 100 Hz record of PTB-XL: samples [1000, 12] as they are stored, gain (units a mV) and baseline [12].

    Raises:
        BadInput: a file is missing or torn, or the header says something else than PTB-XL's do.
    """
    import wfdb

    try:
        header = wfdb.rdheader(str(path))
        leads, n = header.sig_name, len(LEADS)
        for what, found, expected in (
            ("leads", leads and [lead.upper() for lead in leads], list(LEADS)),
            ("samples", header.sig_len, ECG_SAMPLES),
            ("samples a second", header.fs, ECG_HERTZ),
            ("units", header.units, ["mV"] * n),
            ("format", header.fmt, ["16"] * n),
            ("signal files", header.file_name, [f"{path.name}.dat"] * n),
        ):
            if found != expected:
                raise BadInput(f"{path}.hea: {what}: {found}, expected {expected}")
        lines = [line.split() for line in path.with_name(f"{path.name}.hea").read_text().splitlines()[1 : n + 1]]
        if any(len(line) < 3 or re.fullmatch("[0.]*", re.split("[(/]", line[2])[0]) for line in lines):
            raise BadInput(f"{path}.hea: a gain of 0, or none")  # which wfdb takes for 200
        if (found := path.with_name(f"{path.name}.dat").stat().st_size) != 2 * n * ECG_SAMPLES:
            raise BadInput(f"{path}.dat holds {found} bytes, its header says {2 * n * ECG_SAMPLES}")
        record = wfdb.rdrecord(str(path), physical=False)
        if record.calc_checksum() != record.checksum:
            raise BadInput(f"{path}.dat: the samples do not add up to the header's checksums")
    except FileNotFoundError as error:
        raise BadInput(f"{error.filename} is missing") from None
    except BadInput:
        raise
    except Exception as error:  # noqa: BLE001 (wfdb raises half a dozen types for headers that are torn)
        raise BadInput(f"{path}.hea is no header of WFDB: {type(error).__name__}: {error}".split("\n")[0]) from None
    samples, gain = record.d_signal, np.array(record.adc_gain, np.float32)
    if (samples == INVALID).any():
        lead = LEADS[(samples == INVALID).any(0).argmax()]
        raise BadInput(f"{path}.dat: NaN in lead {lead}")
    if not (np.isfinite(gain) & (gain > 0)).all():
        raise BadInput(f"{path}.hea: gain {gain.tolist()}, expected positive numbers")
    return samples.astype(np.int16), gain, np.array(record.baseline, np.float32)


def read_records(source: Path, names: list[str], sums: dict[str, str]):
    """Many records, checked: lists of the places and contents of those that are right, and what is wrong with others."""
    places, contents, wrong = [], [], []
    for place, name in enumerate(names):
        try:
            for file in (f"{name}.hea", f"{name}.dat"):
                check_sum(source, file, sums)
            contents.append(read_record(source / name))
            places.append(place)
        except BadInput as error:
            wrong.append(str(error))
    return places, contents, wrong


def check_sum(source: Path, name: str, sums: dict[str, str]) -> None:
    if not (source / name).is_file():
        raise BadInput(f"{source / name} is missing")
    if name not in sums:
        raise BadInput(f"{source / name} is not listed in {source / 'SHA256SUMS.txt'}")
    if digest(source / name) != sums[name]:
        raise BadInput(f"{source / name}: its SHA-256 is not the one in {source / 'SHA256SUMS.txt'}")


def read_sums(path: Path) -> dict[str, str]:
    """What `sha256sum` writes: file → SHA-256."""
    try:
        lines = [line.split(maxsplit=1) for line in path.read_text().splitlines() if line.strip()]
        sums = {name.lstrip("*").removeprefix("./"): sha for sha, name in lines}
        if not all(re.fullmatch(r"[0-9a-f]{64}", sha) for sha in sums.values()):
            raise ValueError
        return sums
    except FileNotFoundError:
        raise BadInput(f"{path} is missing") from None
    except ValueError:
        raise BadInput(f"{path} is not a list of SHA-256 sums") from None


def read_ptbxl(source: Path, sums: dict[str, str]):
    """The rows of ptbxl_database.csv (a pandas DataFrame by ecg_id), and the superclass of each diagnostic SCP code.

    The list of records is its column `filename_lr`: in 1.0.3 the file RECORDS lacks a newline between two of them.
    """
    import pandas

    tables = []
    for file, columns in (("ptbxl_database.csv", ["patient_id", "scp_codes", "strat_fold", "filename_lr"]),
                          ("scp_statements.csv", ["diagnostic", "diagnostic_class"])):  # fmt: skip
        check_sum(source, file, sums)
        try:
            tables.append(pandas.read_csv(source / file, index_col=0)[columns])
        except (ValueError, KeyError, UnicodeDecodeError) as error:
            raise BadInput(f"{source / file} is not PTB-XL's: {error}".split("\n")[0]) from None
    rows, statements = tables
    outside = [name for name in rows.filename_lr if not re.fullmatch(r"records100/\d+/\d+_lr", str(name))]
    if outside:
        raise BadInput(f"{source / 'ptbxl_database.csv'} names {outside[0]!r} as a record")
    whole = pandas.concat([rows.index.to_series(), rows.patient_id, rows.strat_fold], axis=1)
    whole = whole.apply(pandas.to_numeric, errors="coerce")
    if not len(rows) or (whole % 1 != 0).any(axis=None) or not rows.strat_fold.astype(float).between(1, 10).all():
        raise BadInput(
            f"{source / 'ptbxl_database.csv'}: expected records with a whole ecg_id, patient_id and strat_fold"
        )
    if rows.index.has_duplicates or rows.filename_lr.duplicated().any():
        raise BadInput(f"{source / 'ptbxl_database.csv'}: an ecg_id or a record twice")
    classes = statements[statements.diagnostic == 1].diagnostic_class
    if missing := set(SUPERCLASSES) - set(classes):
        raise BadInput(f"{source / 'scp_statements.csv'} has no diagnostic code of {', '.join(sorted(missing))}")
    return rows, {code: name for code, name in classes.items() if name in SUPERCLASSES}


def superclasses(codes: str, classes: dict[str, str]) -> np.ndarray:
    """The five labels of a record, from its SCP codes whatever their likelihood; all 0 where none is diagnostic."""
    try:
        found = {classes.get(code) for code in ast.literal_eval(codes).keys()}  # noqa: SIM118 (a list has none)
    except (ValueError, SyntaxError, TypeError, AttributeError, MemoryError, RecursionError):
        raise BadInput(f"SCP codes {str(codes)[:60]!r} cannot be read") from None
    return np.array([name in found for name in SUPERCLASSES], np.uint8)


def prepare_ecg(
    source: Path, folder: Path, strict: bool = False, advance=lambda done, total: None, at_once: int = 250
) -> dict:
    """Reads PTB-XL's 100 Hz files, in parallel, into one array of samples and an index; `folder` is named when whole.

    Args:
        source: holds SHA256SUMS.txt, ptbxl_database.csv, scp_statements.csv and records100.
        folder: where it goes; what is there is replaced.
        strict: stop at a record that is wrong; otherwise it is left out.
        advance: called with how many records have been read, and `total`.
        at_once: records a process reads in one go.

    Returns:
        What about.json says: how many records, and what is wrong with those left out.

    Raises:
        BadInput: what all records need is missing or wrong, no record is right, or, if strict, one is wrong.
    """
    import concurrent.futures
    import multiprocessing

    sums = read_sums(source / "SHA256SUMS.txt")
    rows, classes = read_ptbxl(source, sums)
    labels, wrong = {}, []
    for ecg_id, codes in rows.scp_codes.items():
        try:
            labels[ecg_id] = superclasses(codes, classes)
        except BadInput as error:
            wrong.append(f"{source / 'ptbxl_database.csv'}: ecg_id {ecg_id}: {error}")
    rows = rows.loc[list(labels)]
    enough_space(folder.parent, 2 * len(rows) * ECG_SAMPLES * len(LEADS))
    pieces = [rows.iloc[i : i + at_once] for i in range(0, len(rows), at_once)]
    jobs = [(source, names := list(piece.filename_lr),
             {f: sums[f] for n in names for f in (f"{n}.hea", f"{n}.dat") if f in sums}) for piece in pieces]  # fmt: skip
    index = {name: [] for name in ECG_INDEX}
    with prepared_folder(folder, ECG_FORMAT) as part, contextlib.ExitStack() as stack:
        file, several = stack.enter_context((part / "samples.bin").open("wb")), len(pieces) > 4
        if several:  # processes take seconds to begin; "spawn", because torch may have begun threads in this one
            spawn = multiprocessing.get_context("spawn")
            pool = stack.enter_context(concurrent.futures.ProcessPoolExecutor(os.cpu_count(), mp_context=spawn))
        run = pool.map if several else map
        for done, (piece, (places, contents, bad)) in enumerate(
            zip(pieces, run(read_records, *zip(*jobs, strict=True)), strict=True), 1
        ):
            wrong += bad
            if strict and wrong:
                raise BadInput(wrong[0])
            for (ecg_id, row), (samples, gain, baseline) in zip(piece.iloc[places].iterrows(), contents, strict=True):
                samples.tofile(file)
                signal = (samples - baseline.astype(np.float64)) / gain
                for name, value in zip(ECG_INDEX, (ecg_id, int(row.patient_id), int(row.strat_fold), labels[ecg_id],
                                       gain, baseline, (signal.sum(), (signal**2).sum())), strict=True):  # fmt: skip
                    index[name].append(value)
            advance(min(done * at_once, len(rows)), total=len(rows))
        if not index["ecg_id"]:
            raise BadInput(f"{source} holds no record that is right; the first: {(wrong or ['there is none'])[0]}")
        np.savez(part / "index.npz", **{name: np.array(values) for name, values in index.items()})
        about = {"format": ECG_FORMAT, "records": len(index["ecg_id"]), "left_out": wrong}
        save_json(part / "about.json", about)
    return about


def fetch_ptbxl(url: str, folder: Path, files_advance, strict: bool, threads: int = 16) -> None:
    """PTB-XL's 100 Hz files from a web server, many at once; what is there and verifies stays.

    Raises:
        BadInput: a file that all records need, or (after all others were fetched) some file, cannot be had. A record
            that the server does not have (404) is no reason unless strict.
    """
    import concurrent.futures

    session = requests.Session()
    session.mount("https://", requests.adapters.HTTPAdapter(pool_maxsize=threads))
    session.mount("http://", requests.adapters.HTTPAdapter(pool_maxsize=threads))

    def get(name: str) -> None:
        fetch(f"{url}/{name}", folder / name, sums.get(name), lambda done, total: None, session=session)

    listed, fresh = folder / "SHA256SUMS.txt", folder / "SHA256SUMS.txt.new"
    partial = fresh.with_name(fresh.name + ".part")
    for left in (fresh, partial):
        left.unlink(missing_ok=True)
    try:  # nothing says what it must hash to, so it is asked for each time; without a server the last one serves
        fetch(f"{url}/{listed.name}", fresh, None, lambda done, total: None, session=session)
        sums = read_sums(fresh)
    except BadInput:
        if not listed.exists():
            raise
        sums = read_sums(listed)
    for name in ECG_FILES:
        if name not in sums and name.endswith(".csv"):
            raise BadInput(f"{url}/{listed.name} does not list {name}: it is not PTB-XL's, or came in part")
        get(name)
    rows, _ = read_ptbxl(folder, sums)
    names = [f"{name}.{kind}" for name in rows.filename_lr for kind in ("hea", "dat")]
    # Only a list that names all files takes the place of the one that was there.
    if unlisted := [name for name in names if name not in sums]:
        raise BadInput(
            f"{url}/{listed.name} does not list {len(unlisted)} of {len(names)} files, as {unlisted[0]}: it came in part"
        )
    if fresh.exists():
        fresh.replace(listed)
    missing = sum(not (folder / name).exists() for name in names)
    enough_space(folder, missing * (ECG_SAMPLES * len(LEADS) + 1000) + 2 * len(rows) * ECG_SAMPLES * len(LEADS))
    failed, pool = [], concurrent.futures.ThreadPoolExecutor(threads)
    try:
        futures = [pool.submit(get, name) for name in names]
        for done, future in enumerate(concurrent.futures.as_completed(futures), 1):
            try:
                future.result()
            except BadInput as error:
                if strict or not isinstance(error, NotThere):
                    failed.append(error)
            files_advance(done, total=len(names))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    if failed:
        raise BadInput(f"{len(failed)} of {len(names)} files are not there yet, run it again to go on: {failed[0]}")


# ---------------------------------------------------------------------------------------------------------------------
# 6. Domains: data, networks, φ, losses and metric of each experiment
# ---------------------------------------------------------------------------------------------------------------------


def _option(default, text: str, only: str = ""):
    return dataclasses.field(default=default, metadata={"help": text, "only": only})


@dataclass(frozen=True)
class Settings:
    """Every knob of Algorithm 1. A domain's preset replaces these defaults, an option on the command line both.

    Raises:
        BadInput: a value that cannot be.
    """

    seed: int = _option(0, "Of everything random: splits, initial weights, batches, augmentation")
    steps: int = _option(1000, "PT steps")
    warmup: int = _option(100, "PT steps before the first meta step")
    meta_every: int = _option(10, "P: PT steps between two meta steps")
    batch_size: int = _option(64, "PT examples a step")
    lr: float = _option(1e-3, "Learning rate of PT (Adam)")
    finetune_batch_size: int = _option(64, "FT examples a step")
    finetune_lr: float = _option(1e-2, "Learning rate of FT (Adam), within the meta step and beside PT")
    unroll_steps: int = _option(1, "K: unrolled FT steps a meta step")
    scope: str = _option("head", "What the unrolled FT moves: head or all")
    meta_batch_size: int = _option(256, "PT examples a meta step")
    validation_batch_size: int = _option(250, "Validation examples a meta step")
    meta_lr: float = _option(1e-3, "Learning rate of φ (Adam)")
    meta_lr_decay: float = _option(1.0, "What the learning rate of φ falls to by the end, as a share")
    average: float = _option(0.0, "Share of the run, from its end, over which φ is averaged")
    solver: str = _option("identity", "identity, neumann, cg or nystrom")
    terms: int = _option(1, "Neumann terms, CG iterations or Nyström rank")
    alpha: float | None = _option(None, "Neumann step size; without it, estimated from the curvature")
    damping: float = _option(0.0, "Added to the diagonal of the PT Hessian")
    hvp: str = _option("exact", "Hessian-vector products: exact or finite")
    finetune_hvp: str = _option("", "Those of the unrolled FT steps, exact or finite; without it, as --hvp")
    hvp_step: float | None = _option(
        None, "Of finite products: norm of the difference's step; without it, the dtype's own"
    )
    share_pass: bool = _option(False, "The last of P PT steps takes its gradient from the meta step's own passes")
    carry_q: bool = _option(False, "Start each solve from the last one's q (neumann, cg)")
    q_momentum: float = _option(0.9, "With --carry-q and neumann: how far the start goes on the way that q last went")
    particles: str = _option("1", "Copies of the whole run that differ in chance alone; '8,3,1' keeps the better ones")
    rounds: str = _option("1", "Shares of the run after which there are fewer particles, as '0.2,0.5,1'")
    init_deg: float = _option(0.0, "φ at the start, in degrees", "rotation")
    spread_deg: float = _option(1.0, "Spread of the rotations at the start; it narrows to 1 degree", "rotation")
    kick_deg: float = _option(0.0, "Noise on φ after a meta step at the start; it fades in the first round", "rotation")
    noise: float = _option(0.5, "Share of the PT examples with a wrong label", "noise")
    dropout: float = _option(0.0, "Share of the input that PT does not get to see")
    source: str = _option("", "published or string-yeast; without it, the one that has been prepared", "ppi")
    width: int = _option(300, "Width of the GIN (ppi), channels of the first quarter of the ResNet (ecg)", "ppi ecg")
    layers: int = _option(5, "Layers of the GIN", "ppi")
    method: str = _option(
        "supervised", "PT tasks alone (supervised), with FT tasks (cotrain), or pcgrad of both", "ppi"
    )
    ft_share: float = _option(1.0, "Share of the FT data that can be had before FT", "ppi ecg")
    unseen_tasks: int = _option(0, "FT tasks that nothing before FT may see; FT is scored on them alone", "ppi")
    fold: int = _option(0, "Which of the FT tasks are unseen: the fold-th of so many", "ppi")
    half: str = _option("unseen", "Test proteins that are scored: unseen (the headline), or broad, in PT's data", "ppi")
    select: int = _option(0, "PT tasks chosen an episode; 0: all, weighted", "ppi")
    agnostic: bool = _option(False, "φ is learned from PT tasks left out of an episode, without FT data", "ppi")
    test_folds: str = _option("10", "Folds (strat_fold) that are the test set, as 1,2,3", "ecg")
    ft_records: int = _option(
        0, "Records of the FT set: 80 % train, 20 % validate; 0: as many as there are, or 2500", "ecg"
    )
    augment: str = _option(
        "warp", "What φ is: the warp; the strengths of mask and noise, without a warp (simclr); or both", "ecg"
    )
    init_scale: float = _option(0.5, "Global scale s of the warp at the start; 0.5 moves samples by 34 ms (rms)", "ecg")
    scale_lr: float = _option(1e-2, "Learning rate of s (Adam)", "ecg")
    temperature: float = _option(0.5, "Of SimCLR's loss", "ecg")
    cosine: bool = _option(False, "The learning rate of PT falls along a cosine to 0")
    compare_lr: float = _option(1e-2, "Learning rate of the FT that measures an encoder")
    compare_scope: str = _option("head", "What the FT that measures an encoder moves: head or all")
    finetune_steps: int = _option(500, "Steps of the FT that measures an encoder")
    finetune_epochs: int = _option(0, "Epochs of that FT, instead of steps; 0: --finetune-steps holds")
    compare_batch_size: int = _option(64, "Examples a step of that FT")
    compare: int = _option(3, "Seeds of the closing comparison; 0: none")
    checkpoint_every: int = _option(20, "Meta steps (or P PT steps) between two checkpoints")

    def __post_init__(self):
        for name in ("steps", "meta_every", "batch_size", "finetune_batch_size", "meta_batch_size",
                     "validation_batch_size", "compare_batch_size", "finetune_steps", "checkpoint_every"):  # fmt: skip
            self._check(getattr(self, name) >= 1, name, "1 or more")
        for name in ("warmup", "unroll_steps", "terms", "damping", "compare", "kick_deg"):
            self._check(getattr(self, name) >= 0, name, "0 or more")
        for name in ("lr", "finetune_lr", "meta_lr", "meta_lr_decay", "compare_lr", "spread_deg"):
            self._check(getattr(self, name) > 0, name, "positive")
        for name in ("noise", "dropout", "q_momentum"):
            self._check(0 <= getattr(self, name) < 1, name, "at least 0 and less than 1")
        for name in ("width", "layers"):
            self._check(getattr(self, name) >= 1, name, "1 or more")
        for name in ("scale_lr", "temperature"):
            self._check(getattr(self, name) > 0, name, "positive")
        for name in ("unseen_tasks", "fold", "select", "finetune_epochs"):
            self._check(getattr(self, name) >= 0, name, "0 or more")
        self._check(self.finetune_hvp in ("", "exact", "finite"), "finetune_hvp", "exact or finite")
        self._check(self.source in ("", *PPI_SOURCES), "source", " or ".join(PPI_SOURCES))
        self._check(self.method in ("supervised", "cotrain", "pcgrad"), "method", "supervised, cotrain or pcgrad")
        self._check(self.compare_scope in ("head", "all"), "compare_scope", "head or all")
        self._check(self.augment in ("warp", "simclr", "both"), "augment", "warp, simclr or both")
        self._check(self.ft_records == 0 or self.ft_records >= 5, "ft_records", "0, or 5 or more")
        self._check(re.fullmatch(r"\d+(,\d+)*", self.test_folds), "test_folds", "numbers such as 1,2,3")
        self._check(self.half in ("unseen", "broad"), "half", "unseen or broad")
        self._check(0 < self.ft_share <= 1, "ft_share", "more than 0 and at most 1")
        self._check(not self.agnostic or self.select, "agnostic", "False without --select")
        self._check(0 <= self.average <= 1, "average", "between 0 and 1")
        self._check(self.warmup <= self.steps, "warmup", f"at most the {self.steps} steps")
        for name, value in dataclasses.asdict(self).items():
            self._check(not isinstance(value, float) or math.isfinite(value), name, "a finite number")
        self._check(0 <= self.seed < 2**32, "seed", "between 0 and 2**32 - 1")
        self._check(not self.carry_q or self.solver in ("neumann", "cg"), "carry_q", "False with this --solver")
        self._check(self.solver != "nystrom" or self.damping > 0, "damping", "positive with --solver nystrom")
        try:
            _, _, plan = self.unroll, self.inverse, self.plan  # the first two check their own fields
        except ValueError as error:
            raise BadInput(str(error)) from None
        counts, shares = [count for count, _ in plan], [share for _, share in plan]
        self._check(
            counts[-1] == 1 and counts == sorted(counts, reverse=True), "particles", "falling numbers down to 1"
        )
        self._check(shares[-1] == 1 and shares == sorted(shares) and shares[0] > 0, "rounds", "rising shares up to 1")

    def _check(self, condition: bool, name: str, expected: str) -> None:
        if not condition:
            raise BadInput(f"--{name.replace('_', '-')} is {getattr(self, name)!r}, expected {expected}")

    @property
    def unroll(self) -> Unroll:
        return Unroll(steps=self.unroll_steps, lr=self.finetune_lr, optimizer="adam", scope=self.scope,
                      hvp=self.finetune_hvp or None)  # fmt: skip

    @property
    def inverse(self) -> Solver:
        return Solver(
            method=self.solver, terms=self.terms, alpha=self.alpha, damping=self.damping, seed=self.seed, hvp=self.hvp,
            step=self.hvp_step,
        )  # fmt: skip

    @property
    def plan(self) -> list[tuple[int, float]]:
        """How many particles there are until which share of the run."""
        counts, shares = self.particles.split(","), self.rounds.split(",")
        return [(int(n), float(share)) for n, share in zip(counts, shares, strict=True)]


# Raghu et al. 2021: algorithm 1 as published; the Neumann step size is the learning rate of PT.
PUBLISHED = {"meta_every": 10, "unroll_steps": 1, "solver": "neumann", "terms": 1, "lr": 1e-3, "alpha": 1e-3}


class Domain:
    """One experiment: what the training loop needs to know of it.

    A domain has three parts of FT data, by name: finetune, validation and test.
    """

    metric = "accuracy"
    presets: ClassVar[dict[str, dict]] = {"default": {}}  # by name: settings that differ from the defaults
    sizes: dict[str, int]  # examples in each part: pretrain, finetune, validation, test
    finetune_sizes: tuple[int, ...]  # numbers of FT examples that reports show
    access: ClassVar[dict[str, int]] = {}  # parts of which nothing before FT may see more than so many examples

    def network(self) -> Network:
        """θ, freshly drawn."""
        raise NotImplementedError

    def head(self) -> nn.Module:
        """ψ, freshly drawn."""
        raise NotImplementedError

    def meta(self) -> nn.Module:
        """φ as it is before anything is learned."""
        raise NotImplementedError

    def random_meta(self) -> nn.Module:
        """φ drawn at random: what a search without gradients would try."""
        raise NotImplementedError

    def pretrain_loss(self, network: Network, meta: nn.Module, index: Tensor, progress: float, live=False) -> Loss:
        """L_PT(θ, φ) on the PT examples `index`, at a share `progress` of the run; `live`: buffers are updated."""
        raise NotImplementedError

    def inputs(self, part: str, index: Tensor) -> Tensor:
        raise NotImplementedError

    def targets(self, part: str, index: Tensor) -> Tensor:
        raise NotImplementedError

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The FT loss, averaged over examples."""
        raise NotImplementedError

    def score(self, outputs: Tensor, targets: Tensor) -> float:
        """The metric."""
        raise NotImplementedError

    def data_digest(self) -> str:
        """Another one for other data or parts: a run is gone on with, or measured, on those it was trained on."""
        return ""

    def explore(self, meta: nn.Module, progress: float) -> None:
        """Noise on φ after a meta step, where a domain wants it."""

    def begin_episode(self, meta: nn.Module) -> None:
        """Called before the P PT steps that belong to one meta step."""

    def backward(self, value: Tensor, theta: Params) -> None:
        """From the PT loss to the gradient of θ."""
        value.backward()

    def phi_rates(self, meta: nn.Module) -> dict[str, float]:
        """The learning rate of each part of φ, by name."""
        return {name: self.settings.meta_lr for name, _ in meta.named_parameters()}

    @property
    def finetune_limits(self) -> tuple[int, int]:
        """The smallest and the largest number of FT examples that there can be."""
        return 1, self.sizes["finetune"]

    def divide(self, examples: int) -> tuple[int, int]:
        """How many examples an FT set of that size takes of the parts finetune and validation."""
        return examples, self.sizes["validation"]

    def transfer(self, network: Network) -> Network:
        """A network in the mode in which FT moves all of it."""
        return network.eval()

    def measure(self, meta: nn.Module) -> dict[str, float]:
        """What a person wants to see of φ."""
        raise NotImplementedError

    def facts(self, meta: nn.Module) -> dict:
        """What the summary says besides φ itself."""
        return {}

    def figures(self, meta: nn.Module, folder: Path) -> None:
        """Figures of φ that only this domain has."""

    def finetune_loss(self, network: Network, head: nn.Module, part: str, index: Tensor) -> Loss:
        """L_FT(θ, ψ), or L_V on the validation part: everything in evaluation mode."""

        def loss(theta, psi):
            hidden = call(network, theta, self.inputs(part, index), features=True)
            return self.loss(call(head, psi, hidden), self.targets(part, index))

        return loss


class ImageDomain(Domain):
    """Classification of small images; PT and FT have the same ten classes."""

    def __init__(self, source: str, settings: Settings, device: torch.device, data: Path):
        self.settings, self.device, self.features = settings, device, 32 if source == "digits" else 64
        images = load_images(source, data, settings.seed)
        self.sizes = {part: len(labels) for part, labels in images.labels.items()}
        self.scale, self.classes = images.scale, images.classes
        self.labels = {part: labels.to(device) for part, labels in images.labels.items()}
        self.pixels = {part: pixels.to(device) for part, pixels in images.pixels.items()}
        self.height = images.pixels["test"].shape[-1]
        self.finetune_sizes = (30, 100, self.sizes["finetune"])
        self.random = np.random.default_rng(settings.seed)

    def encoder(self):
        return SmallCNN(self.height, 16, self.features, self.settings.dropout)

    def network(self):
        return Network(self.encoder(), nn.Linear(self.features, self.classes)).to(self.device)

    def head(self):
        return nn.Linear(self.features, self.classes).to(self.device)

    def inputs(self, part, index):
        return self.pixels[part][index].float() / self.scale

    def targets(self, part, index):
        return self.labels[part][index]

    def loss(self, outputs, targets):
        return F.cross_entropy(outputs, targets)

    def score(self, outputs, targets):
        return (outputs.argmax(1) == targets).double().mean().item()


class Rotation(ImageDomain):
    """PT images are rotated by N(φ, 1°), FT images by N(90°, 1°): φ should arrive at 90°.

    The FT head learns slowly (1e-3) beside PT: once it fits the features there are, dL_V/dθ says what its few examples
    lack and no longer what the encoder does, and the hypergradient turns into noise.
    """

    presets: ClassVar = {
        "default": {
            "steps": 850, "warmup": 50, "meta_every": 4, "lr": 2e-3, "dropout": 0.5, "finetune_lr": 1e-3,
            "finetune_batch_size": 128, "meta_batch_size": 192, "meta_lr": 3.0, "average": 0.5,
            "solver": "cg", "terms": 3, "damping": 1.0,
            "particles": "6,3,1", "rounds": "0.35,0.9,1", "kick_deg": 60.0, "spread_deg": 60.0,
        },
        "paper": {**PUBLISHED, "meta_lr": 1.0},
    }  # fmt: skip

    def __init__(self, *arguments):
        super().__init__(*arguments)
        for part in ("finetune", "validation", "test"):
            degrees = torch.from_numpy(self.random.normal(90, 1, self.sizes[part])).float().to(self.device)
            self.pixels[part] = rotate(self.pixels[part].float(), degrees)  # once and for all: FT data are data

    def meta(self):
        return RotationMean(self.settings.init_deg).to(self.device)

    def random_meta(self):
        return RotationMean(torch.rand(()).item() * 360 - 180).to(self.device)

    def pretrain_loss(self, network, meta, index, progress, live=False):
        images, labels = self.inputs("pretrain", index), self.targets("pretrain", index)
        # A wide spread early averages the loss over angles, which flattens its lesser optima; it is 1° from half-way on.
        spread = max(1.0, self.settings.spread_deg ** (1 - 2 * progress))

        def loss(theta, phi):
            rotated = call(meta, phi, images, spread, train=True)
            return F.cross_entropy(call(network, theta, rotated, train=True, live=live), labels)

        return loss

    def explore(self, meta, progress):
        fading = max(0.0, 1 - progress / self.settings.plan[0][1])
        meta.rotation_mean_deg.data += self.settings.kick_deg * fading**2 * torch.randn(()).item()

    def measure(self, meta):
        return {"rotation_mean_deg": wrap(meta.rotation_mean_deg.item())}


def wrap(degrees: float) -> float:
    """The same angle in [−180, 180)."""
    return (degrees + 180) % 360 - 180


class Noise(ImageDomain):
    """A share of the PT labels is wrong; φ weighs PT examples. FT labels are right.

    L_PT = the mean over all examples of w_i(φ) CE_i; it does not divide by the sum of the weights. The FT head begins as
    PT's own classifier and hardly moves (1e-6). With a head of its own, which follows whatever the features do, FT is as
    well off when PT takes one class for another: the hypergradient then lets φ exchange classes and drop them.
    """

    presets: ClassVar = {
        "default": {
            "steps": 2600, "warmup": 200, "meta_every": 6, "batch_size": 128, "dropout": 0.5, "finetune_lr": 1e-6,
            "finetune_batch_size": 300, "meta_batch_size": 1000, "meta_lr": 1.5e-2, "meta_lr_decay": 0.1,
            "average": 0.15, "solver": "cg", "terms": 5, "damping": 0.1,
        },
        "paper": {**PUBLISHED},
    }  # fmt: skip

    def __init__(self, *arguments):
        super().__init__(*arguments)
        labels = self.labels["pretrain"].cpu().numpy()
        self.noisy = torch.zeros(len(labels), dtype=torch.bool)  # for reports alone: no loss reads it
        wrong = self.random.permutation(len(labels))[: round(self.settings.noise * len(labels))]
        self.noisy[wrong] = True
        labels[wrong] = (labels[wrong] + self.random.integers(1, self.classes, len(wrong))) % self.classes
        self.labels["pretrain"] = torch.from_numpy(labels).to(self.device)

    def network(self):
        encoder = WithLogits(self.encoder(), self.features, self.classes)
        return Network(encoder, Last(self.classes)).to(self.device)

    def head(self):
        head = nn.Linear(self.features + self.classes, self.classes)
        nn.init.zeros_(head.bias)
        with torch.no_grad():
            head.weight.copy_(torch.eye(*head.weight.shape).roll(self.features, 1))  # it passes PT's logits on
        return head.to(self.device)

    def meta(self):
        scores = nn.Sequential(SmallCNN(self.height, 16, 64, 0.0), nn.Linear(64, self.classes))
        return ExampleWeights(scores).to(self.device)

    random_meta = meta

    def pretrain_loss(self, network, meta, index, progress, live=False):
        images, labels = self.inputs("pretrain", index), self.targets("pretrain", index)

        def loss(theta, phi):
            weights = call(meta, phi, images, labels, train=True)
            logits = call(network, theta, images, train=True, live=live)
            return (weights * F.cross_entropy(logits, labels, reduction="none")).mean()

        return loss

    def weights(self, meta, most: int | None = None) -> Tensor:
        """The weight of each PT example (of the first `most`), on the CPU."""
        index = torch.arange(min(most or math.inf, self.sizes["pretrain"]), device=self.device)
        with torch.no_grad():
            batches = index.split(4096)
            return torch.cat([meta(self.inputs("pretrain", i), self.targets("pretrain", i)) for i in batches]).cpu()

    def ratio(self, weights: Tensor) -> float | None:
        noisy = self.noisy[: len(weights)]
        return (weights[~noisy].mean() / weights[noisy].mean()).item() if 0 < noisy.sum() < len(noisy) else None

    def measure(self, meta):
        return {"clean_to_noisy_weight_ratio": self.ratio(self.weights(meta, 2000))}

    def facts(self, meta):
        weights = self.weights(meta)
        return {
            "clean_to_noisy_weight_ratio": self.ratio(weights),
            "mean_weight_clean": weights[~self.noisy].mean().item() if not self.noisy.all() else None,
            "mean_weight_noisy": weights[self.noisy].mean().item() if self.noisy.any() else None,
        }

    def figures(self, meta, folder):
        plot_weights(self.weights(meta).numpy(), self.noisy.numpy(), folder / "weights.png")


HUMAN = 9606


class PPI(Domain):
    """PT: many GO terms of a protein, from the graph of its interactions. FT: 40 other terms. φ: a weight a PT task.

    Parts, drawn by seed (Hu et al., ICLR 2020): test proteins are the human ones, or 30 % where there is one species,
    stratified by their rarest FT term. Half of them ("broad") join PT, the other half, unseen, is what is scored (with
    `--half broad` the first, by runs that are otherwise the same). All other proteins are PT's, and FT's as well: 85 %
    to train, 15 % to validate.
    """

    metric = "mean AUROC"
    presets: ClassVar = {
        "default": {
            **PUBLISHED, "width": 64, "layers": 3, "steps": 2000, "warmup": 100, "dropout": 0.2, "finetune_lr": 1e-3,
            "meta_lr": 1.0, "meta_batch_size": 128, "compare": 2,
            # The published α is so small that its Neumann term changes q by a few per cent: q = v costs a product less.
            "solver": "identity", "alpha": None, "share_pass": True,
        },
        # 100 epochs of the published PT set in batches of 32, about one of them as warm-up.
        "paper": {
            **PUBLISHED, "steps": 250_000, "warmup": 2_500, "batch_size": 32, "meta_batch_size": 32, "dropout": 0.2,
            "finetune_batch_size": 32, "validation_batch_size": 32, "lr": 1e-4, "alpha": 1e-4, "finetune_lr": 1e-4,
            "meta_lr": 1.0, "compare_lr": 1e-4, "finetune_epochs": 50, "compare_batch_size": 32,
        },
    }  # fmt: skip

    def __init__(self, source: str, settings: Settings, device: torch.device, data: Path):
        self.settings, self.device = settings, device
        sources = [settings.source] if settings.source else PPI_SOURCES
        folders = [data / "ppi" / name for name in sources]
        folder = next((f for f in folders if (f / "about.json").exists()), folders[-1])
        self.settings = settings = dataclasses.replace(settings, source=folder.name)  # a run goes on with the same
        self.graphs = graphs = Graphs(folder, device)
        random, everything = np.random.default_rng(settings.seed), torch.arange(len(graphs.sizes), device=device)
        positives = None if graphs.about["finetune_terms"] else graphs.positives(everything)
        tasks = divide_tasks(graphs.about["tasks"], graphs.about["finetune_terms"], positives, random)
        self.pretrain_tasks, self.finetune_tasks = (torch.from_numpy(t).to(device) for t in tasks)
        labels = graphs.labels(everything, self.finetune_tasks).cpu().numpy() > 0
        self.rows = divide_graphs(labels, graphs.species.cpu().numpy(), random)
        if settings.half == "broad":
            self.rows["test"] = self.rows["broad"]
        self.rows = {part: torch.from_numpy(rows).to(device) for part, rows in self.rows.items()}
        self.sizes = {part: len(rows) for part, rows in self.rows.items()}
        self.access = {p: max(1, round(settings.ft_share * self.sizes[p])) for p in ("finetune", "validation")}
        self.finetune_sizes = (self.sizes["finetune"] // 8, self.sizes["finetune"])
        tasks, unseen = np.arange(len(self.finetune_tasks)), settings.unseen_tasks
        self.scored = tasks[settings.fold * unseen :][:unseen] if unseen else tasks
        self.seen = np.setdiff1d(tasks, self.scored) if unseen else tasks
        settings._check(len(self.seen) and len(self.scored) == (unseen or len(tasks)), "unseen_tasks",
                        f"less than the {len(tasks)} FT tasks, and a --fold that there is")  # fmt: skip
        settings._check(settings.select < len(self.pretrain_tasks), "select",
                        f"less than the {len(self.pretrain_tasks)} PT tasks")  # fmt: skip
        self.labelled = torch.zeros_like(graphs.sizes, dtype=torch.bool)  # what CoTrain sees FT labels of
        self.labelled[self.rows["finetune"][: self.access["finetune"]]] = True
        self.chosen = None  # PT tasks of this episode, bool; None: all

    def network(self):
        encoder = GIN(self.settings.width, self.settings.layers, self.settings.dropout)
        outputs = len(self.pretrain_tasks) + (self.settings.method != "supervised") * len(self.seen)
        network = Network(encoder, nn.Linear(2 * self.settings.width, outputs)).to(self.device)
        settle(network, self.inputs("pretrain", torch.randperm(self.sizes["pretrain"])[:256].to(self.device)))
        return network

    def data_digest(self):
        parts = [
            self.pretrain_tasks,
            self.finetune_tasks,
            *(self.rows[p] for p in ("pretrain", "finetune", "validation")),
        ]
        return hashlib.sha256(json.dumps([self.graphs.about, *map(Tensor.tolist, parts)]).encode()).hexdigest()

    def head(self):
        """40 FT tasks; where φ is learned without them, the PT tasks after these."""
        outputs = len(self.finetune_tasks) + self.settings.agnostic * len(self.pretrain_tasks)
        return nn.Linear(2 * self.settings.width, outputs).to(self.device)

    def meta(self):
        return TaskWeights(len(self.pretrain_tasks)).to(self.device)

    def random_meta(self):
        meta = self.meta()
        nn.init.normal_(meta.task_logits)
        return meta

    def begin_episode(self, meta):
        if self.settings.select:
            self.chosen = meta.draw(self.settings.select)

    def pretrain_loss(self, network, meta, index, progress, live=False):
        """Σ_t 2σ(φ_t)·BCE_t / T; "cotrain" adds the FT tasks' mean BCE over the graphs with FT labels that it may see."""
        rows = self.rows["pretrain"][index]
        batch, targets = self.graphs.batch(rows), self.graphs.labels(rows, self.pretrain_tasks)
        known, chosen, tasks = self.labelled[rows], self.chosen, len(self.pretrain_tasks)
        others = self.graphs.labels(rows[known], self.finetune_tasks[self.seen])

        def loss(theta, phi):
            outputs = call(network, theta, batch, train=True, live=live)
            losses = F.binary_cross_entropy_with_logits(outputs[:, :tasks], targets, reduction="none").mean(0)
            value = call(meta, phi, losses, chosen)
            if self.settings.method == "supervised":
                return value
            second = F.binary_cross_entropy_with_logits(outputs[known, tasks:], others, reduction="sum")
            both = torch.stack([value, second / max(1, others.numel())])
            return both if self.settings.method == "pcgrad" else both.sum()

        return loss

    def backward(self, value, theta):
        """PCGrad (Yu et al., NeurIPS 2020): each of two gradients loses what of it goes against the other."""
        if value.dim() == 0:
            return super().backward(value, theta)
        a, b = (_flat(_grad(part, theta, retain_graph=True)) for part in value)
        if (dot := a @ b) < 0:
            a, b = a - dot / (b @ b) * b, b - dot / (a @ a) * a
        for name, gradient in _unflat(a + b, theta).items():
            theta[name].grad = gradient

    def transfer(self, network):
        network.encoder.dropout = 0.5
        return network.train()

    def inputs(self, part, index):
        return self.graphs.batch(self.rows[part][index])

    def targets(self, part, index):
        return self.graphs.labels(self.rows[part][index], self.finetune_tasks)

    def loss(self, outputs, targets):
        return F.binary_cross_entropy_with_logits(outputs[:, self.scored], targets[:, self.scored])

    def score(self, outputs, targets):
        return mean_auroc(outputs[:, self.scored], targets[:, self.scored])

    def finetune_loss(self, network, head, part, index):
        """As before FT: over the FT tasks that may be seen, or over the PT tasks that this episode left out."""
        if self.settings.agnostic:
            left_out = torch.arange(len(self.pretrain_tasks)) if self.chosen is None else (~self.chosen).nonzero()[:, 0]
            columns, tasks = len(self.finetune_tasks) + left_out, self.pretrain_tasks[left_out]
        else:
            columns, tasks = self.seen, self.finetune_tasks[self.seen]
        targets = self.graphs.labels(self.rows[part][index], tasks)
        batch = self.inputs(part, index)

        def loss(theta, psi):
            outputs = call(head, psi, call(network, theta, batch, features=True))
            return F.binary_cross_entropy_with_logits(outputs[:, columns], targets)

        return loss

    def measure(self, meta):
        return {"task_weight_spread": meta.weights().detach().std().item()}

    def figures(self, meta, folder):
        names = [self.graphs.about["terms"][i] for i in self.pretrain_tasks.tolist()]
        positives = self.graphs.positives(self.rows["pretrain"], self.pretrain_tasks)
        plot_tasks(meta.weights().detach().cpu().numpy(), names, positives, folder / "tasks.png")


class ECG(Domain):
    """PT: SimCLR on 12-lead ECGs. FT: five diagnostic superclasses, multilabel. φ: how PT's views are made.

    Parts: the records of --test-folds are the test set, all others are PT's. N of these, drawn by seed, are the FT set: 80 %
    to train, 20 % to validate. A number of FT examples counts both. Each view passes the encoder by itself, with its own
    BatchNorm statistics. Signals are scaled by one mean and one standard deviation, of all of PT's samples and leads.
    """

    metric = "mean AUROC"
    presets: ClassVar = {
        "default": {
            **PUBLISHED, "width": 8, "steps": 150, "warmup": 40, "batch_size": 128, "meta_batch_size": 128,
            "finetune_batch_size": 128, "validation_batch_size": 128, "lr": 3e-3, "meta_lr": 3e-3, "compare": 2,
            # Hypergradients of s scatter by many times their mean (bench/ecg.py draws): many meta steps, and small ones.
            "meta_every": 2, "finetune_lr": 1e-2, "scale_lr": 3e-2,
            # Differences step over thousands of ReLUs' kinks here: a long step averages over them. See bench/ecg.py draws.
            "solver": "identity", "alpha": None, "hvp": "finite", "hvp_step": 0.3, "finetune_hvp": "exact",
        },
        # 50 epochs of folds 1 to 9 in batches of 256, one of them as warm-up; FT is 200 epochs of the whole network.
        "paper": {
            **PUBLISHED, "width": 32, "steps": 3800, "warmup": 76, "batch_size": 256, "meta_batch_size": 256,
            "finetune_batch_size": 256, "validation_batch_size": 256, "lr": 1e-4, "alpha": 1e-4, "finetune_lr": 1e-4,
            "meta_lr": 1e-4, "scale_lr": 1.0, "init_scale": 4.0, "compare_lr": 1e-3, "compare_scope": "all",
            "finetune_epochs": 200,
        },
    }  # fmt: skip

    def __init__(self, source: str, settings: Settings, device: torch.device, data: Path):
        self.settings, self.device = settings, device
        self.records = records = Records(data / "ecg" / "prepared", device)
        fold = records.fold.cpu().numpy()
        settings._check(
            min(settings.batch_size, settings.meta_batch_size) > 1, "batch_size", "2 or more: views are told apart"
        )
        folds = [int(f) for f in settings.test_folds.split(",")]
        of_test = np.isin(fold, folds)
        rest, test = np.flatnonzero(~of_test), np.flatnonzero(of_test)
        settings._check(
            len(rest) >= 5 and np.isin(folds, fold).all(),
            "test_folds",
            f"some, but not all, of {sorted(set(fold.tolist()))}",
        )
        settings._check(settings.ft_records <= len(rest), "ft_records", f"at most the {len(rest)} that are not test's")
        pool = np.random.default_rng(settings.seed).permutation(rest)[: settings.ft_records or ECG_SETS[-1]]
        fifth = np.arange(len(pool)) % 5 == 4
        rows = {"pretrain": rest, "finetune": pool[~fifth], "validation": pool[fifth], "test": test}
        self.rows = {part: torch.from_numpy(rows).to(device) for part, rows in rows.items()}
        self.sizes = {part: len(rows) for part, rows in self.rows.items()}
        self.access = {p: max(1, round(settings.ft_share * self.sizes[p])) for p in ("finetune", "validation")}
        self.pool = len(pool)
        self.finetune_sizes = (*(n for n in ECG_SETS if n < len(pool)), len(pool))
        self.mean, self.deviation = records.moments(self.rows["pretrain"])

    def data_digest(self):
        parts = [self.records.ecg_id[self.rows[part]].tolist() for part in ("pretrain", "test")]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def finetune_limits(self):
        return 5, self.pool

    def divide(self, examples):
        return examples - examples // 5, examples // 5

    def network(self):
        features = 8 * self.settings.width
        head = nn.Sequential(nn.Linear(features, features), nn.ReLU(), nn.Linear(features, features // 2))
        network = Network(ResNet18(len(LEADS), self.settings.width), head).to(self.device)
        settle(network, self.inputs("pretrain", torch.randperm(self.sizes["pretrain"])[:256].to(self.device)))
        return network

    def head(self):
        return nn.Linear(8 * self.settings.width, len(SUPERCLASSES)).to(self.device)

    def meta(self):
        warp = self.settings.init_scale if self.settings.augment in ("warp", "both") else None
        return SignalAugmentation(len(LEADS), warp, self.settings.augment in ("simclr", "both")).to(self.device)

    def random_meta(self):
        meta = self.meta()
        for name, parameter in meta.named_parameters():
            if name == "warp.scale":
                nn.init.uniform_(parameter)
            elif name in ("mask", "noise"):
                nn.init.normal_(parameter)
        return meta

    def phi_rates(self, meta):
        rates = {"warp.scale": self.settings.scale_lr}
        return {name: rates.get(name, self.settings.meta_lr) for name, _ in meta.named_parameters()}

    def pretrain_loss(self, network, meta, index, progress, live=False):
        signals = self.inputs("pretrain", index)

        def loss(theta, phi):
            if any(p.requires_grad for p in phi.values()):
                # Made again when the gradient arrives there: their graph would outweigh what the encoder keeps.
                views = checkpoint(call, meta, phi, signals, train=True, use_reentrant=False)
            else:
                views = call(meta, phi, signals, train=True)
            a, b = (call(network, theta, view, train=True, live=live) for view in views)
            return nt_xent(a, b, self.settings.temperature)

        return loss

    def inputs(self, part, index):
        return (self.records.millivolts(self.rows[part][index]) - self.mean) / self.deviation

    def targets(self, part, index):
        return self.records.labels[self.rows[part][index]].float()

    def loss(self, outputs, targets):
        return F.binary_cross_entropy_with_logits(outputs, targets)

    def score(self, outputs, targets):
        return mean_auroc(outputs, targets)

    def measure(self, meta):
        found = {} if meta.warp is None else {"warp_scale": meta.warp.scale.item()}
        return found | {"mask_share": meta.mask.sigmoid().item(), "noise_share": 0.1 * meta.noise.exp().item()}

    def facts(self, meta):
        return {} if meta.warp is None else {"warp_rms_ms": self.warped(meta)[1].square().mean().sqrt().item()}

    @torch.no_grad()
    def warped(self, meta, draws: int = 16) -> tuple[Tensor, Tensor]:
        """PT records in places [n], and warps of each in ms [draws, n, 1000]; drawn anew by the same seed."""
        index = torch.arange(self.sizes["pretrain"], device=self.device)[:2048]
        with torch.random.fork_rng():
            torch.manual_seed(self.settings.seed)
            magnitudes = meta.train().warp.magnitudes(self.inputs("pretrain", index))
            warps = [meta.warp.displacements(magnitudes, ECG_SAMPLES) for _ in range(draws)]
            return index, torch.stack(warps) * (1000 / ECG_HERTZ)

    def figures(self, meta, folder):
        if meta.warp is None:
            return
        index, moved = self.warped(meta)
        strength = moved[0].square().mean(1).sqrt()
        # The one whose warp is nearest to the mean: not the most striking.
        shown = (strength - strength.mean()).abs().argmin()
        before = self.records.millivolts(self.rows["pretrain"][index[shown, None]])
        after = resample(before, moved[0, shown, None] / (1000 / ECG_HERTZ))
        ecg_id = self.records.ecg_id[self.rows["pretrain"][index[shown]]].item()
        plot_ecg(before[0].cpu().numpy(), after[0].cpu().numpy(), ecg_id, strength[shown].item(), folder / "warp.png")
        labels = self.targets("pretrain", index).cpu().numpy() > 0
        plot_magnitudes(moved.square().mean((0, 2)).sqrt().cpu().numpy(), labels, folder / "magnitudes.png")


ECG_SETS = (100, 250, 500, 1000, 2500)  # sizes of the FT set, as published


def divide_tasks(tasks: int, fixed: int, positives, random, few=60, wanted=40) -> tuple[np.ndarray, np.ndarray]:
    """Columns of the PT and of the FT tasks: the last `fixed` are FT's, or 40 drawn of those with 60 positives."""
    if fixed:
        chosen = np.arange(tasks - fixed, tasks)
    else:
        often = np.flatnonzero(positives >= few)
        if len(often) <= wanted:
            raise BadInput(
                f"{len(often)} GO terms have {few} positives or more: too few to draw {wanted} FT tasks from"
            )
        chosen = random.permutation(often)[:wanted]
    return np.setdiff1d(np.arange(tasks), chosen), random.permutation(chosen)


def divide_graphs(labels: np.ndarray, species: np.ndarray, random) -> dict[str, np.ndarray]:
    """Rows of the parts; `labels` are those of the FT tasks. See `PPI`."""
    from sklearn.model_selection import train_test_split

    def stratified(rows, share):
        rarest = np.where(labels[rows], labels.sum(0), len(labels) + 1)
        group = np.where(labels[rows].any(1), rarest.argmin(1), -1)
        group[np.isin(group, [g for g in set(group) if (group == g).sum() < 10])] = -1
        return train_test_split(rows, test_size=share, stratify=group, random_state=int(random.integers(2**31)))

    everything = np.arange(len(labels))
    if len(set(species)) > 1:
        rest, test = everything[species != HUMAN], everything[species == HUMAN]
        if not len(test) or not len(rest):
            raise BadInput(f"graphs of several species without human ({HUMAN}), which is the test species")
        test, rest = random.permutation(test), random.permutation(rest)
        broad, unseen = np.array_split(test, 2)
        train, validation = np.split(rest, [round(0.85 * len(rest))])
    else:
        rest, test = stratified(everything, 0.3)
        broad, unseen = stratified(test, 0.5)
        train, validation = stratified(rest, 0.15)
    return {"pretrain": np.concatenate([rest, broad]), "finetune": train, "validation": validation, "test": unseen,
            "broad": broad}  # fmt: skip


def mean_auroc(scores: Tensor, labels: Tensor) -> float:
    """Area under the ROC curve, ties counted half, averaged over the tasks that have both classes: [n, tasks] each."""
    from scipy.stats import rankdata

    labels = labels.cpu().numpy() > 0.5
    positive, negative = labels.sum(0), (~labels).sum(0)
    both = (positive > 0) & (negative > 0)
    ranks = rankdata(scores.detach().cpu().numpy()[:, both], axis=0)
    positive, negative = positive[both], negative[both]
    above = (ranks * labels[:, both]).sum(0) - positive * (positive + 1) / 2
    return float((above / (positive * negative)).mean()) if both.any() else math.nan


DOMAINS = {
    f"{source}-{kind.__name__.lower()}": (kind, source) for source in ("digits", "mnist") for kind in (Rotation, Noise)
}
DOMAINS |= {"ppi": (PPI, "ppi"), "ecg": (ECG, "ecg")}


def settings_of(domain: str, given: dict, preset: str = "default") -> Settings:
    """A domain's settings: its preset, and what was given. BadInput where they do not belong together."""
    kind, _ = find_domain(domain)
    if preset not in kind.presets:
        raise BadInput(f"--preset is {preset!r}; {domain} has {', '.join(kind.presets)}")
    fields = {f.name: f for f in dataclasses.fields(Settings)}
    for name in given:
        only = fields[name].metadata["only"]
        if only and not set(only.split()) & set(domain.split("-")):
            others = " and ".join(only.split())
            raise BadInput(f"--{name.replace('_', '-')} belongs to the {others} domains, not to {domain}")
    return Settings(**{**kind.presets[preset], **given})


def find_domain(name: str) -> tuple[type, str]:
    if name not in DOMAINS:
        raise BadInput(f"{name!r} is no domain; there are {', '.join(DOMAINS)}")
    return DOMAINS[name]


def make_domain(name: str, settings: Settings, device: torch.device, data: Path) -> Domain:
    kind, source = find_domain(name)
    return kind(source, settings, device, data)


# ---------------------------------------------------------------------------------------------------------------------
# 7. Training: PT, Algorithm 1, FT, evaluation, checkpoints
# ---------------------------------------------------------------------------------------------------------------------

ALPHA_LASTS = 100  # meta steps between two estimates of the curvature, where the solve is carried on
MANY_SKIPPED = 10  # meta steps in a row without a finite hypergradient: the run has failed


class Failed(Exception):
    """The run cannot go on. The message is one line."""


class Stream:
    """Indices of mini-batches: a new permutation each epoch, every example once an epoch but for an incomplete end."""

    def __init__(self, n: int, batch: int, device: torch.device):
        self.n, self.batch, self.device = n, min(batch, n), device
        self.order, self.position = torch.randperm(n), 0

    def next(self) -> Tensor:
        if self.position + self.batch > self.n:
            self.order, self.position = torch.randperm(self.n), 0
        self.position += self.batch
        return self.order[self.position - self.batch : self.position].to(self.device)

    def state_dict(self) -> dict:
        return {"order": self.order, "position": self.position}

    def load_state_dict(self, state: dict) -> None:
        self.order, self.position = state["order"], state["position"]


def adam(parameters: Sequence[nn.Parameter], lr: float) -> torch.optim.Adam:
    """Adam; for large networks in one pass over memory, where torch's plain one makes nine."""
    return torch.optim.Adam(parameters, lr=lr, fused=sum(p.numel() for p in parameters) > 1_000_000 or None)


def set_gradients(module: nn.Module, gradients: Params) -> None:
    """Gradients to their parameters, each in the layout of its parameter: torch's fused Adam reads any other wrongly."""
    for name, parameter in module.named_parameters():
        parameter.grad = torch.empty_like(parameter).copy_(gradients[name])


class Learner:
    """All that Algorithm 1 carries from step to step: θ, ψ, φ, their optimisers, q, and the place in the data."""

    MODULES = ("network", "head", "meta", "optimizer", "meta_optimizer")
    STREAMS = ("pretrain", "meta", "finetune", "validation")
    VALUES = (
        "psi",
        "ft_state",
        "head_state",
        "q",
        "q_before",
        "alpha",
        "average",
        "averaged",
        "recent",
        "skipped",
        "skipped_in_a_row",
        "meta_steps",
        "number",
    )

    def __init__(self, domain: Domain, settings: Settings, number: int = 0):
        self.domain, self.settings, self.number = domain, settings, number
        self.network, self.head, self.meta = domain.network(), domain.head(), domain.meta()
        self.psi = {name: p.detach().clone() for name, p in self.head.named_parameters()}
        self.optimizer = adam(list(self.network.parameters()), settings.lr)
        rates = domain.phi_rates(self.meta)
        groups = [{"params": [p], "lr": rates[n], "initial_lr": rates[n]} for n, p in self.meta.named_parameters()]
        self.meta_optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
        batches = {"pretrain": settings.batch_size, "meta": settings.meta_batch_size}
        batches |= {"finetune": settings.finetune_batch_size, "validation": settings.validation_batch_size}
        device = next(self.network.parameters()).device
        sizes = {**domain.sizes, "meta": domain.sizes["pretrain"], **domain.access}
        self.streams = {name: Stream(sizes[name], batches[name], device) for name in self.STREAMS}
        self.ft_state = {}  # of the FT optimiser, within the meta step
        self.head_state = {}  # of the FT head's steps beside PT where it is another: in scope all, the former has θ's too
        self.q = self.q_before = self.alpha = None  # what one solve hands to the next
        self.average, self.averaged = {}, 0  # of φ, over the end of the run
        self.recent: list[float] = []  # validation losses of the last meta steps: particles are compared by them
        self.skipped = self.skipped_in_a_row = self.meta_steps = 0
        self.losses = {"pretrain_loss": math.nan, "finetune_loss": math.nan, "validation_loss": math.nan,
                       "residual": math.nan}  # fmt: skip

    def pretrain_step(self, progress: float) -> None:
        """One step on θ with φ fixed, and one on the FT head ψ beside it."""
        theta, phi = dict(self.network.named_parameters()), _detached(self.meta)
        loss = self.domain.pretrain_loss(self.network, self.meta, self.streams["pretrain"].next(), progress, live=True)
        value = loss(theta, phi)
        self.optimizer.zero_grad()
        self.domain.backward(value, theta)
        self.optimizer.step()

        loss = self.domain.finetune_loss(self.network, self.head, "finetune", self.streams["finetune"].next())
        psi = _point(psi={name: p.requires_grad_() for name, p in self.psi.items()})
        head_value = loss(_detached(self.network), _group(psi, "psi"))
        gradient = _grad(head_value, psi)
        with torch.no_grad():
            which = "ft_state" if self.settings.scope == "head" else "head_state"
            state = getattr(self, which)
            moved, state = finetune_step({k: p.detach() for k, p in psi.items()}, gradient, self.settings.unroll, state)
        self.psi = _group(moved, "psi")
        setattr(self, which, state)
        self.losses |= {"pretrain_loss": value.detach().sum(), "finetune_loss": head_value.detach()}

    def meta_step(self, progress: float) -> None:
        """K unrolled FT steps, the hypergradient, one step on φ. Without a finite hypergradient φ stays as it is.

        With `share_pass` it is a PT step, too, by the ∇_θ L_PT that the hypergradient came by.
        """
        settings = self.settings
        theta, phi = _detached(self.network), _detached(self.meta)
        finetune = [
            self.domain.finetune_loss(self.network, self.head, "finetune", self.streams["finetune"].next())
            for _ in range(settings.unroll_steps)
        ]
        try:
            result = hypergradient(
                self.domain.pretrain_loss(self.network, self.meta, self.streams["meta"].next(), progress),
                finetune,
                self.domain.finetune_loss(self.network, self.head, "validation", self.streams["validation"].next()),
                theta,
                self.psi,
                phi,
                unroll=settings.unroll,
                solver=settings.inverse
                if self.alpha is None
                else dataclasses.replace(settings.inverse, alpha=self.alpha),
                q0=self._q0(),
                ft_state=self.ft_state,
                want_pt_gradient=settings.share_pass,
            )
            if result.residual >= 1 and not any(q.any() for q in result.q.values()):
                raise FloatingPointError("q = 0, the PT Hessian curves down along v: --damping may help")
        except FloatingPointError as error:
            self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
            self.q = self.q_before = self.alpha = None
            if self.skipped_in_a_row >= MANY_SKIPPED:
                raise Failed(f"{MANY_SKIPPED} meta steps in a row without a finite hypergradient: {error}") from None
            if settings.share_pass:
                self.pretrain_step(progress)
            return
        self.psi, self.ft_state = result.psi, result.ft_state
        if settings.carry_q:
            self._carry(result)
        if settings.share_pass and result.pt_gradient is None:
            self.pretrain_step(progress)
        elif settings.share_pass:
            set_gradients(self.network, result.pt_gradient)
            self.optimizer.step()
        set_gradients(self.meta, result.phi)
        for group in self.meta_optimizer.param_groups:
            group["lr"] = group["initial_lr"] * settings.meta_lr_decay**progress
        self.meta_optimizer.step()
        self.domain.explore(self.meta, progress)
        if progress >= 1 - settings.average:
            self.averaged += 1
            for name, p in _detached(self.meta).items():
                before = self.average.get(name, torch.zeros_like(p))
                self.average[name] = before + (p - before) / self.averaged
        self.skipped_in_a_row, self.meta_steps = 0, self.meta_steps + 1
        self.losses |= {"validation_loss": result.value, "residual": result.residual}
        self.recent = [*self.recent[-9:], result.value.item()]

    def _q0(self) -> Params | None:
        """Where the next solve starts: the last q, a little further on its way (Nesterov's momentum, one step a call)."""
        if self.q is None or self.q_before is None or self.settings.solver != "neumann":
            return self.q
        return {name: q + self.settings.q_momentum * (q - self.q_before[name]) for name, q in self.q.items()}

    def _carry(self, result: Hypergradient) -> None:
        """Keeps q, and the estimated step size for a while; both are dropped where the iteration runs away."""
        if result.residual > 2 or (self.meta_steps + 1) % ALPHA_LASTS == 0:
            self.alpha = None
        elif math.isfinite(result.alpha):
            self.alpha = result.alpha
        self.q_before, self.q = (None, None) if result.residual > 2 else (self.q, result.q)

    def learned(self) -> nn.Module:
        """φ as the run leaves it: its average over the end, where that was asked for."""
        meta = copy.deepcopy(self.meta)
        if self.averaged:
            meta.load_state_dict({**meta.state_dict(), **self.average})
        return meta

    def state_dict(self) -> dict:
        modules = {name: getattr(self, name).state_dict() for name in self.MODULES}
        values = {name: getattr(self, name) for name in self.VALUES}
        return {**modules, **values, "streams": {name: s.state_dict() for name, s in self.streams.items()},
                "losses": {name: float(value) for name, value in self.losses.items()}}  # fmt: skip

    def load_state_dict(self, state: dict) -> None:
        for name in self.MODULES:
            getattr(self, name).load_state_dict(state[name])
        device = next(self.network.parameters()).device
        for name in (*self.VALUES, "losses"):
            setattr(self, name, _on(device, state[name]))
        for name, stream in self.streams.items():
            stream.load_state_dict(state["streams"][name])


def _on(device: torch.device, value):
    """A value of a checkpoint, with the tensors in it moved to a device."""
    if isinstance(value, dict):
        return {name: _on(device, each) for name, each in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value


def _detached(module: nn.Module) -> Params:
    return {name: p.detach() for name, p in module.named_parameters()}


class Training:
    """Algorithm 1, or PT alone with φ fixed, from its beginning or from a checkpoint.

    Args:
        domain: the experiment.
        settings: every knob.
        learn: whether φ is learned; without it this is the baseline, PT with φ as it is.
        phi: φ to begin with, as a state dict; None: the domain's default.
    """

    def __init__(self, domain: Domain, settings: Settings, learn: bool, phi: dict | None = None):
        torch.manual_seed(settings.seed)
        self.domain, self.settings, self.learn = domain, settings, learn
        first = Learner(domain, settings)
        if learn and settings.share_pass and settings.meta_every == 1 and batch_norms(first.network):
            raise BadInput("--meta-every is 1, expected 2 or more with --share-pass: no PT step is left to take "
                           "BatchNorm's statistics from")  # fmt: skip
        if phi is not None:
            first.meta.load_state_dict(phi)
        self.learners = [first]
        for number in range(1, settings.plan[0][0] if learn else 1):
            other = copy.deepcopy(
                first, {id(domain): domain}
            )  # the same θ, ψ and φ: particles differ by what they draw from here on
            other.number = number
            self.learners.append(other)
        self.step, self.seconds = 0, 0.0

    def run(self, each=lambda training: None, at_checkpoint=lambda training: None) -> "Training":
        """Goes on to the end.

        Args:
            each: called after every P PT steps (and the meta step that follows them, if any).
            at_checkpoint: called every `checkpoint_every` of those, and at the end.
        """
        settings, begun = self.settings, time.perf_counter() - self.seconds
        while self.step < settings.steps:
            # P steps make one round, counted from the end of the warm-up; what does not fit comes first and last.
            until = min(
                self.step + settings.meta_every - (self.step - settings.warmup) % settings.meta_every, settings.steps
            )
            if self.step < settings.warmup:
                until = min(until, settings.warmup)
            whole = until - self.step == settings.meta_every and self.step >= settings.warmup
            meta = self.learn and whole
            for learner in self.learners:
                self.domain.begin_episode(learner.meta)
                for step in range(self.step, until - (meta and settings.share_pass)):
                    self._set_rate(learner, step)
                    learner.pretrain_step(self._progress(step))
                if meta:
                    self._set_rate(learner, until - 1)  # with --share-pass it is a PT step, too
                    learner.meta_step(self._progress(until - 1))
            self.step, self.seconds = until, time.perf_counter() - begun
            for learner in self.learners:
                if not math.isfinite(learner.losses["pretrain_loss"]):
                    raise Failed(f"the PT loss is not finite at PT step {self.step}: a lower --lr may help")
            self._select()
            each(self)
            rounds = -(-self.step // settings.meta_every)
            if rounds % settings.checkpoint_every == 0 or self.step == settings.steps:
                at_checkpoint(self)
        return self

    def _progress(self, step: int) -> float:
        """How much of the run, its warm-up aside, is behind it; all of it where nothing is learned."""
        if not self.learn:
            return 1.0
        return max(0.0, (step - self.settings.warmup) / max(1, self.settings.steps - self.settings.warmup))

    def _set_rate(self, learner: Learner, step: int) -> None:
        """The learning rate of PT. Half a cosine from --lr to 0 (Loshchilov and Hutter, ICLR 2017), if asked for."""
        share = step / self.settings.steps if self.settings.cosine else 0.0
        learner.optimizer.param_groups[0]["lr"] = self.settings.lr * (1 + math.cos(math.pi * share)) / 2

    def _select(self) -> None:
        """Successive halving (Jamieson and Talwalkar, AISTATS 2016): at the end of a round the better particles stay."""
        wanted = next(count for count, share in self.settings.plan if share >= self._progress(self.step))
        if len(self.learners) > wanted:
            self.learners.sort(key=lambda learner: np.mean(learner.recent) if learner.recent else math.inf)
            del self.learners[wanted:]

    @property
    def best(self) -> Learner:
        return self.learners[0]

    def state_dict(self) -> dict:
        state = {"learners": [learner.state_dict() for learner in self.learners]}
        state |= {"step": self.step, "seconds": self.seconds, "random": torch.get_rng_state()}
        if torch.cuda.is_available():
            state["cuda_random"] = torch.cuda.get_rng_state_all()
        return state

    def load_state_dict(self, state: dict) -> None:
        if not state["learners"]:
            raise ValueError("it holds no learner")
        del self.learners[len(state["learners"]) :]
        for learner, saved in zip(self.learners, state["learners"], strict=True):
            learner.load_state_dict(saved)
        self.step, self.seconds = state["step"], state["seconds"]
        torch.set_rng_state(state["random"].cpu())
        if "cuda_random" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state_all([random.cpu() for random in state["cuda_random"]])


class Finetuned(NamedTuple):
    """An encoder after FT."""

    score: float  # the metric on the test part
    validation_loss: float  # where it was lowest, which is what was scored


def finetune(
    domain: Domain, network: Network, examples: int, seed: int, scope: str, lr: float, steps: int | None = None
) -> Finetuned:
    """FT of a fresh head on a pre-trained encoder (Adam), the test score at the best look at the validation loss.

    Args:
        domain: the experiment.
        network: θ; it is not changed.
        examples: how many of the FT examples are used; every method gets the same ones for the same seed.
        seed: of the choice of examples, of the head and of the batches.
        scope: "head": linear evaluation; "all": the encoder moves too.
        lr, steps: of FT; steps=None: as the settings say, and where they say epochs the best is that of all epochs.
    """
    torch.manual_seed(seed)
    settings, (train, validate) = domain.settings, domain.divide(examples)
    chosen = torch.randperm(domain.sizes["finetune"])[:train]  # the first of one order: sets by size are nested
    order = torch.randperm(domain.sizes["validation"], generator=torch.Generator().manual_seed(seed))
    head, network = domain.head(), copy.deepcopy(network).eval()
    device = next(network.parameters()).device
    index = {"finetune": chosen, "validation": order[:validate].sort()[0], "test": torch.arange(domain.sizes["test"])}
    index = {part: rows.to(device) for part, rows in index.items()}
    hidden = {}
    if scope == "head":  # the encoder stands still, so each example passes it once
        with torch.no_grad():
            for part, rows in index.items():
                batches = [network(domain.inputs(part, i), features=True) for i in rows.split(2048)]
                hidden[part] = torch.cat(batches)

    def outputs(part, rows):
        if scope == "head":
            return head(hidden[part][rows])
        return head(network(domain.inputs(part, index[part][rows]), features=True))

    @torch.no_grad()
    def measured(part):
        network.eval()
        rows = torch.arange(len(index[part]), device=device)
        return torch.cat([outputs(part, i) for i in rows.split(2048)]), domain.targets(part, index[part])

    parameters = [*head.parameters(), *(network.parameters() if scope == "all" else [])]
    optimizer = adam(parameters, lr)
    best, kept, batches = math.inf, math.nan, Stream(len(chosen), settings.compare_batch_size, device)
    number = 25 if steps else settings.finetune_epochs or 25
    steps = steps or settings.finetune_epochs * -(-train // settings.compare_batch_size) or settings.finetune_steps
    looks = {round(look * steps / number) for look in range(1, number + 1)}
    for step in range(1, steps + 1):
        rows = batches.next()
        if scope == "all":
            domain.transfer(network)
        loss = domain.loss(outputs("finetune", rows), domain.targets("finetune", index["finetune"][rows]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in looks:
            value = domain.loss(*measured("validation")).item()
            if value < best:
                best, kept = value, domain.score(*measured("test"))
    return Finetuned(kept, best)


def compare(domain: Domain, methods: dict, examples: list[int], seeds: int, scope: str, lr: float, steps, advance):
    """Test scores of several encoders after the same FT.

    Args:
        methods: name → function of a seed that gives a Network.
        examples: sizes of the FT set.
        seeds: FT is repeated with the seeds 0 … seeds − 1.
        advance: called after each (method, seed).

    Returns:
        {(method, number of examples): [Finetuned, one a seed]}.
    """
    results = {(method, n): [] for method in methods for n in examples}
    for seed in range(seeds):
        for method, network_of in methods.items():
            network = network_of(seed)
            for n in examples:
                results[method, n].append(finetune(domain, network, n, seed, scope, lr, steps))
            advance()
    return results


def comparison_rows(domain: Domain, results: dict) -> list[dict]:
    """The rows of `summary.json`: mean and standard error over seeds."""
    rows = []
    for (method, n), outcomes in results.items():
        scores = np.array([outcome.score for outcome in outcomes])
        stderr = float(scores.std(ddof=1) / math.sqrt(len(scores))) if len(scores) > 1 else None
        rows.append({"method": method, "ft_examples": n, "metric": domain.metric, "mean": finite_or_none(scores.mean()),
                     "stderr": stderr and finite_or_none(stderr), "seeds": len(scores)})  # fmt: skip
    return rows


def differences(results: dict, methods: list[str], examples: list[int]) -> list[dict]:
    """Of each method to the first: mean and 95 % interval (Student's t), paired by seed."""
    from scipy.stats import t

    rows = []
    for n in examples:
        base = np.array([outcome.score for outcome in results[methods[0], n]])
        for method in methods[1:]:
            d = np.array([outcome.score for outcome in results[method, n]]) - base
            half = float(t.ppf(0.975, len(d) - 1) * d.std(ddof=1) / math.sqrt(len(d))) if len(d) > 1 else math.nan
            low, high = (None, None) if math.isnan(half) else (float(d.mean()) - half, float(d.mean()) + half)
            rows.append({"method": method, "versus": methods[0], "ft_examples": n, "mean": float(d.mean()),
                         "low": low, "high": high})  # fmt: skip
    return rows


# A run on disk.

FORMAT = "metapt 1"


def save_whole(path: Path, write) -> None:
    """Writes a file under a temporary name, flushes it to the disk, and only then gives it its name."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def save_json(path: Path, content) -> None:
    save_whole(path, lambda file: file.write((json.dumps(content, indent=2) + "\n").encode()))


def load_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise BadInput(f"{path} is missing: {path.parent} is no run, or one that did not get far") from None
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise BadInput(f"{path} is not what metapt writes")
    return content


def load_tensors(path: Path, device="cpu"):
    """A file of torch.save, without running any code that it may hold."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise BadInput(f"{path} is missing") from None
    except Exception as error:  # noqa: BLE001 (torch raises half a dozen types for files that are torn or hostile)
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise BadInput(f"{path} is not a readable checkpoint: {reason}") from None


class Run:
    """A folder: config.json, metrics.jsonl, checkpoint.pt, summary.json and figures."""

    def __init__(self, folder: Path):
        self.folder = folder

    @classmethod
    def create(cls, folder: Path | None, name: str, config: dict) -> "Run":
        """A new folder; BadInput where there is something in it already."""
        if folder is None:
            numbers = ("", *(f"-{n}" for n in range(2, 10_000)))
            folder = next(f for f in (Path("runs") / f"{name}{n}" for n in numbers) if not f.exists())
        try:
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise BadInput(f"{folder} is not empty: name another --out, or go on with --resume {folder}")
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"{folder} cannot be made: {error.strerror}") from None
        save_json(folder / "config.json", config)
        return cls(folder)

    @classmethod
    def open(cls, folder: Path) -> "Run":
        if not folder.is_dir():
            raise BadInput(f"{folder} is no folder of a run")
        return cls(folder)

    def config(self) -> dict:
        """What the run was started with: command, domain, device, phi (a run, or None) and every setting."""
        config = load_json(self.folder / "config.json")
        try:
            find_domain(config["domain"])
            config["settings"] = Settings(**config["settings"])
            if (
                config["format"] != FORMAT
                or config["command"] not in ("pretrain", "meta")
                or not {"phi", "device"} <= set(config)
            ):
                raise KeyError
        except BadInput as error:
            raise BadInput(f"{self.folder / 'config.json'}: {error}") from None
        except (KeyError, TypeError):
            raise BadInput(f"{self.folder / 'config.json'} is not what metapt writes") from None
        return config

    def save(self, training: Training, domain: str) -> None:
        content = {"format": FORMAT, "domain": domain, **training.state_dict()}
        content["phi"] = training.best.learned().state_dict()
        content["metrics_bytes"] = self.metrics.stat().st_size if self.metrics.exists() else 0
        save_whole(self.folder / "checkpoint.pt", lambda file: torch.save(content, file))

    def checkpoint(self, domain: str) -> dict:
        path = self.folder / "checkpoint.pt"
        content = load_tensors(path)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise BadInput(f"{path} is not a checkpoint of metapt")
        if content.get("domain") != domain:
            raise BadInput(f"{path} is of the domain {content.get('domain')}, not {domain}")
        if "phi" not in content:
            raise BadInput(f"{path} is not a checkpoint of metapt")
        return content

    def restore(self, training: Training, domain: str) -> None:
        """Sets a training to where the checkpoint is, and cuts off the metrics that came after it."""
        content = self.checkpoint(domain)
        try:
            kept = self.metrics.read_bytes()[: content["metrics_bytes"]] if self.metrics.exists() else b""
            training.load_state_dict(content)
        except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
            raise BadInput(
                f"{self.folder / 'checkpoint.pt'} does not fit {self.folder / 'config.json'}: {last_line(error)}"
            ) from None
        if self.metrics.exists():
            os.truncate(self.metrics, kept.rfind(b"\n") + 1)  # they can be shorter after a power cut: whole lines only

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    def history(self) -> list[dict]:
        lines = self.metrics.read_text().splitlines() if self.metrics.exists() else []
        return [json.loads(line) for line in lines]


# ---------------------------------------------------------------------------------------------------------------------
# 8. Reports: tables and figures
# ---------------------------------------------------------------------------------------------------------------------

METHODS = {
    "no_pretraining": "no pre-training",
    "default_phi": "pre-training, default φ",
    "random_phi": "pre-training, best of random φ",
    "learned_phi": "pre-training, learned φ",
    "online": "θ of the meta run itself",
}


def show_table(console, title: str, columns: list[str], rows: list[list[str]]) -> None:
    table = rich.table.Table(title=title, title_justify="left", title_style="bold", box=rich.box.SIMPLE_HEAD)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def show_comparison(console, rows: list[dict]) -> None:
    cells = [[*_named(row), _percent(row["mean"]), _percent(row["stderr"]), str(row["seeds"])] for row in rows]
    title = f"Test {rows[0]['metric']} after fine-tuning (%)"
    show_table(console, title, ["", "FT examples", "mean", "± s.e.", "seeds"], cells)


def show_differences(console, rows: list[dict]) -> None:
    cells = [[*_named(row), _percent(row["mean"]), f"{_percent(row['low'])} … {_percent(row['high'])}"] for row in rows]
    title = f"Difference to {METHODS.get(rows[0]['versus'], rows[0]['versus'])} (points, paired by seed)"
    show_table(console, title, ["", "FT examples", "mean", "95 % interval"], cells)


def _named(row: dict) -> list[str]:
    return [METHODS.get(row["method"], row["method"]), str(row["ft_examples"])]


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


@contextlib.contextmanager
def figure(path: Path, panels: int = 1):
    """A figure of half a page's width a panel, written to `path`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
             "lines.linewidth": 1.2, "savefig.dpi": 200}  # fmt: skip
    with plt.rc_context(style):
        drawing, axes = plt.subplots(1, panels, figsize=(3.5 * panels, 2.5), layout="constrained", squeeze=False)
        yield axes[0]
        drawing.savefig(path)
        plt.close(drawing)


def plot_phi(history: list[dict], survivor: int, folder: Path) -> None:
    """The measured value of φ along the run; particles that were given up in grey."""
    name = next(k for k in history[-1] if k in PHI_AXES)
    label, scale = PHI_AXES[name]
    with figure(folder / "phi.png") as (axis,):
        axis.set_yscale(scale)
        for particle in sorted({row["particle"] for row in history}, key=lambda p: p == survivor):
            rows = [row for row in history if row["particle"] == particle]
            x, y = [row["step"] for row in rows], [row[name] for row in rows]
            kept = particle == survivor
            marks = {"ls": "", "marker": ".", "ms": 3} if "deg" in name else {}  # a line would cross the circle's seam
            others = (
                "other particles"
                if particle == min({row["particle"] for row in history} - {survivor}, default=None)
                else None
            )
            axis.plot(x, y, color="C0" if kept else "0.8", label="learned φ" if kept else others, **marks)
        if "deg" in name:
            axis.axhline(90, color="C3", lw=0.8, ls="--", label="rotation of the FT images")
            axis.set_ylim(-180, 180)
            axis.set_yticks([-180, -90, 0, 90, 180])
        axis.set(xlabel="PT steps", ylabel=label)
        axis.legend(loc="best", fontsize=7)


PHI_AXES = {
    "warp_scale": ("global scale s of the warp", "linear"),
    "mask_share": ("longest masked stretch (share of the signal)", "linear"),
    "task_weight_spread": ("standard deviation of the task weights", "linear"),
    "rotation_mean_deg": ("mean rotation φ (degrees)", "linear"),
    "clean_to_noisy_weight_ratio": ("weight of clean / of noisy examples", "log"),
}


def plot_losses(history: list[dict], survivor: int, folder: Path) -> None:
    rows = [row for row in history if row["particle"] == survivor]
    with figure(folder / "losses.png") as (axis,):
        for name, label in (("pretrain_loss", "PT"), ("finetune_loss", "FT"), ("validation_loss", "validation")):
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), label=label, alpha=0.9)
        axis.set(xlabel="PT steps", ylabel="loss (nats)", yscale="log")
        if axis.lines:
            axis.legend()


def plot_comparison(rows: list[dict], path: Path) -> None:
    """The metric by FT-set size, or as bars where there is one size."""
    sizes, methods = sorted({row["ft_examples"] for row in rows}), list(dict.fromkeys(row["method"] for row in rows))
    with figure(path) as (axis,):
        for i, method in enumerate(methods):
            points = sorted(
                (r["ft_examples"], 100 * r["mean"], 100 * (r["stderr"] or 0)) for r in rows if r["method"] == method
            )
            x, mean, stderr = zip(*points, strict=True)
            label = METHODS.get(method, method)
            if len(sizes) == 1:
                axis.errorbar(mean, [-i], xerr=stderr, fmt="o", ms=4, capsize=2, color=f"C{i}")
            else:
                axis.errorbar(x, mean, yerr=stderr, fmt="o-", ms=3, capsize=2, label=label, color=f"C{i}")
        metric = f"test {rows[0]['metric']} (%), mean ± s.e."
        if len(sizes) == 1:
            axis.set_yticks([-i for i in range(len(methods))], [METHODS.get(m, m) for m in methods])
            axis.set(xlabel=metric, ylim=(-len(methods) + 0.5, 0.5))
        else:
            axis.set_xscale("log")
            axis.set_xticks(sizes, [str(n) for n in sizes])
            axis.minorticks_off()
            axis.set(xlabel="FT examples", ylabel=metric)
            axis.figure.legend(loc="outside upper center", ncols=2, fontsize=7)


def plot_weights(weights: np.ndarray, noisy: np.ndarray, path: Path) -> None:
    bins = np.logspace(min(-3.0, math.floor(math.log10(max(weights.min(), 1e-12)))), 0, 40)
    with figure(path) as (axis,):
        axis.hist(weights[~noisy], bins, alpha=0.7, color="C0", label="right label")
        axis.hist(weights[noisy], bins, alpha=0.7, color="C3", label="wrong label")
        axis.set(xscale="log", xlabel="weight that φ gives", ylabel="PT examples")
        axis.legend()


def plot_tasks(weights: np.ndarray, names: list[str], positives: np.ndarray, path: Path, shown: int = 12) -> None:
    """Left: the PT tasks with the highest and the lowest weights, by name. Right: weight by number of positives."""
    order = weights.argsort()
    shown = min(shown, len(order) // 2)
    rows = np.concatenate([order[:shown], order[len(order) - shown :]])
    with figure(path, panels=2) as (axis, other):
        axis.figure.set_size_inches(7, 0.14 * len(rows) + 1)
        axis.barh(range(len(rows)), weights[rows] - 1, color=["C0"] * shown + ["C3"] * shown, left=1)
        axis.set_yticks(range(len(rows)), [names[i] for i in rows], fontsize=6)
        axis.axvline(1, color="0.5", lw=0.6)
        axis.set(xlabel="weight of the PT task (it begins at 1)")
        other.plot(positives, weights, ".", ms=2, color="0.5")
        other.set(xscale="log", xlabel="proteins with the term in the PT part", ylabel="weight")


def plot_ecg(before: np.ndarray, after: np.ndarray, ecg_id: int, rms: float, path: Path) -> None:
    """Twelve leads [12, samples] in mV before and after a warp, on the paper of an electrocardiograph."""
    import matplotlib.ticker

    seconds = slice(250, 750)
    shown = np.stack([before, after])[:, :, seconds]
    lows, highs = shown.min((0, 2)).reshape(2, 6), shown.max((0, 2)).reshape(2, 6)
    apart = max(2.5, math.ceil(2 * (highs[:, 1:] - lows[:, :-1]).max()) / 2)  # so that no lead runs into the next
    time_axis = np.arange(before.shape[1]) / ECG_HERTZ
    with figure(path, panels=2) as axes:
        axes[0].figure.set_size_inches(11, 7)
        for column, axis in enumerate(axes):
            for row in range(6):
                lead = 6 * column + row
                for values, colour, label in ((before, "0.25", "as recorded"), (after, "C3", "after the warp")):
                    axis.plot(
                        time_axis[seconds], values[lead, seconds] - apart * row, color=colour, lw=0.9, label=label
                    )
                axis.text(2.52, 0.55 - apart * row, LEADS[lead].replace("AV", "aV"), fontsize=9, weight="bold")
            axis.set(xlim=(2.5, 7.5), ylim=(-5 * apart - 1.7, highs[:, 0].max() + 0.3), xlabel="time (s)")
            axis.plot([7.3, 7.3], [-5 * apart - 1.5, -5 * apart - 0.5], color="k", lw=1.5)
            axis.text(7.27, -5 * apart - 1.2, "1 mV", fontsize=8, ha="right")
            axis.xaxis.set_major_locator(matplotlib.ticker.MultipleLocator(1))
            axis.xaxis.set_minor_locator(matplotlib.ticker.MultipleLocator(0.2))
            axis.yaxis.set_minor_locator(matplotlib.ticker.MultipleLocator(0.5))
            axis.set_yticks([-apart * row for row in range(6)], ["0"] * 6)
            axis.grid(which="both", color="#f2c6c6", lw=0.4)
        axes[0].set_ylabel("mV; fine lines: 0.2 s by 0.5 mV")
        handles, labels = axes[0].get_legend_handles_labels()
        title = f"PTB-XL record {ecg_id}; this warp moves samples by {rms:.0f} ms (rms)"
        axes[0].figure.legend(handles[:2], labels[:2], loc="outside upper center", ncols=2, fontsize=8, title=title)


def plot_magnitudes(strength: np.ndarray, labels: np.ndarray, path: Path) -> None:
    """How far φ warps signals (ms, rms over draws and time), by superclass: box from quartile to quartile, whiskers from 5 % to 95 %."""
    groups = {f"{name} ({chosen.sum()})": strength[chosen] for name, chosen in zip(SUPERCLASSES, labels.T, strict=True)}
    if (rest := ~labels.any(1)).any():
        groups[f"none ({rest.sum()})"] = strength[rest]
    groups = {name: values for name, values in groups.items() if len(values)}
    with figure(path) as (axis,):
        axis.boxplot(groups.values(), orientation="horizontal", whis=(5, 95), flierprops={"ms": 2, "mec": "0.6"})
        axis.set_yticks(range(1, len(groups) + 1), list(groups))
        axis.set(xlabel="displacement by the warp (ms, rms)", xlim=(0, None))


# ---------------------------------------------------------------------------------------------------------------------
# 9. Commands
# ---------------------------------------------------------------------------------------------------------------------

app = typer.Typer(
    help=__doc__.split("\n\n")[0], add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False
)


def with_settings(command):
    """Gives a command one option for each field of `Settings`; what was given arrives as the dict `given`."""

    def wrapper(**arguments):
        names = {f.name for f in dataclasses.fields(Settings)}
        given = {name: value for name, value in arguments.items() if name in names and value is not None}
        return command(given=given, **{name: value for name, value in arguments.items() if name not in names})

    own = [p for p in inspect.signature(command).parameters.values() if p.name != "given"]
    options = []
    for f in dataclasses.fields(Settings):
        presets = {name.split("-")[-1]: kind.presets["default"] for name, (kind, _) in DOMAINS.items()}
        defaults = [str(f.default), *(f"{name}: {p[f.name]}" for name, p in presets.items() if f.name in p)]
        only = f" ({' and '.join(f.metadata['only'].split())} domains)" if f.metadata["only"] else ""
        text = f"{f.metadata['help']}{only}. \\[default: {'; '.join(defaults)}]"
        kind = Annotated[f.type | None, typer.Option(help=text, show_default=False)]
        options.append(inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind))
    wrapper.__signature__ = inspect.Signature([*own, *options])
    wrapper.__annotations__ = {p.name: p.annotation for p in [*own, *options]}
    wrapper.__name__, wrapper.__doc__ = command.__name__, command.__doc__
    return wrapper


DomainName = Annotated[str | None, typer.Argument(help=f"One of {', '.join(DOMAINS)}", show_default="digits-rotation")]
Preset = Annotated[str, typer.Option(help="Settings to begin with: default, or paper for the published protocol")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")]
Data = Annotated[Path, typer.Option(help="Where downloaded data lie")]
Out = Annotated[
    Path | None, typer.Option(help="Folder of the run \\[default: a new one under runs/]", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object and nothing else")]
Resume = Annotated[Path | None, typer.Option(help="Go on with this run, from its last checkpoint")]
Epochs = Annotated[int | None, typer.Option(help="PT epochs, instead of --steps")]
Sizes = Annotated[str | None, typer.Option(help="Sizes of the FT set, as 30,100,300 \\[default: the domain's]")]
Seeds = Annotated[int, typer.Option(help="FT is repeated with this many seeds", min=1)]
Scope = Annotated[str, typer.Option("--scope", help="What FT moves: head or all")]
Rate = Annotated[
    float | None,
    typer.Option(
        "--lr",
        help="Learning rate of FT \\[default: the run's for its own --compare-scope; else 0.01 (head), 0.001 (all)]",
    ),
]
Half = Annotated[
    str | None, typer.Option(help="ppi: test proteins that are scored, unseen or broad \\[default: the run's]")
]
FtSteps = Annotated[
    int | None,
    typer.Option("--steps", help="Steps of FT, best of 25 looks at the validation loss \\[default: the run's]", min=1),
]


@app.command()
def download(
    dataset: Annotated[str, typer.Argument(help="mnist, ecg or ppi")],
    data: Data = Path("data"),
    url: Annotated[str | None, typer.Option(help="A mirror to fetch it from, in place of its own address")] = None,
    source: Annotated[Path | None, typer.Option("--from", help="A folder that holds the files already")] = None,
    kind: Annotated[str | None, typer.Option("--source", help="ppi: published or string-yeast")] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="ecg: stop at a record that is wrong, leave none out")
    ] = False,
):
    """Fetch a data set, or take it from a folder; every file is verified, an interrupted download goes on."""
    if dataset not in DATASETS:
        raise BadInput(
            f"{dataset!r} cannot be downloaded; there is {', '.join(DATASETS)} (the digits need no download)"
        )
    if kind is not None and (dataset != "ppi" or kind not in PPI_SOURCES):
        raise BadInput(f"--source is {kind!r}; it belongs to ppi, which has {' and '.join(PPI_SOURCES)}")
    if url is not None and source is not None:
        raise BadInput("--url and --from name two places to take the data from: give one")
    if strict and dataset != "ecg":
        raise BadInput("--strict belongs to ecg")
    options = ({"kind": kind} if kind else {}) | ({"strict": True} if strict else {})
    DATASETS[dataset](data, url, source, rich.console.Console(), **options)


def download_mnist(data: Path, url: str | None, source: Path | None, console) -> None:
    columns = (rich.progress.TextColumn("{task.description}"), rich.progress.BarColumn(),
               rich.progress.DownloadColumn(), rich.progress.TransferSpeedColumn(),
               rich.progress.TimeRemainingColumn())  # fmt: skip
    with rich.progress.Progress(*columns, console=console) as bars:
        for name, sha256 in MNIST_SHA256.items():
            path = data / "mnist" / name
            if source is not None:
                adopt(source / name, path, sha256)
            else:
                bar = bars.add_task(name, total=None)
                fetch(f"{(url or MNIST_URL).rstrip('/')}/{name}", path, sha256,
                      lambda done, total, bar=bar: bars.update(bar, completed=done, total=total))  # fmt: skip
    console.print(f"{len(MNIST_SHA256)} files verified in {data / 'mnist'}")


def download_ppi(data: Path, url: str | None, source: Path | None, console, kind: str = "published") -> None:
    """The published benchmark from the network, a zip, a folder or the .pt itself; or STRING's files from a folder."""
    folder, begun = data / "ppi" / kind, time.perf_counter()
    if kind == "string-yeast":
        if source is None or url is not None:
            raise BadInput("--source string-yeast takes STRING's and GO's files from a folder: name it with --from")
        about = prepare_string(source, folder)
    else:
        if source is None:
            source = data / "ppi" / "bio_dataset.zip"
            with rich.progress.Progress(console=console) as bars:
                bar = bars.add_task(source.name, total=None)

                def advance(done: int, total: int | None) -> None:
                    enough_space(data, (total or 0) - done)
                    bars.update(bar, completed=done, total=total)

                fetch(url or PPI_URL, source, None, advance)
        about = prepare_published(source, folder)
    console.print(f"{about['graphs']} graphs, {about['nodes']} nodes and {about['edges']} directed edges, {about['tasks']} "
                  f"tasks in {folder} ({time.perf_counter() - begun:.0f} s)")  # fmt: skip


def download_ecg(data: Path, url: str | None, source: Path | None, console, strict: bool = False) -> None:
    """PTB-XL's 100 Hz files from the network or a folder, read into two files under `data`/ecg/prepared."""
    if source is None:
        source = data / "ecg" / "files"
        with progress_bar(console, "fetching", None) as bar:
            fetch_ptbxl((url or ECG_URL).rstrip("/"), source, bar, strict)
    with progress_bar(console, "reading", None) as bar:
        about = prepare_ecg(source, data / "ecg" / "prepared", strict, bar)
    for problem in about["left_out"][:10]:
        console.print(f"left out: {problem}", highlight=False)
    console.print(f"{about['records']} records in {data / 'ecg' / 'prepared'}, {len(about['left_out'])} left out")


DATASETS = {"mnist": download_mnist, "ecg": download_ecg, "ppi": download_ppi}


@app.command()
@with_settings
def pretrain(
    *,
    domain: DomainName = None,
    preset: Preset = "default",
    phi: Annotated[Path | None, typer.Option(help="Use the φ that this run learned, frozen")] = None,
    epochs: Epochs = None,
    device: Device = "auto",
    data: Data = Path("data"),
    out: Out = None,
    resume: Resume = None,
    json: Json = False,
    given,
):
    """Pre-train with φ fixed: the baseline, or with --phi at what a run has learned."""
    train("pretrain", domain, given, preset, epochs, device, data, out, resume, json, phi)


@app.command()
@with_settings
def meta(
    *,
    domain: DomainName = None,
    preset: Preset = "default",
    epochs: Epochs = None,
    device: Device = "auto",
    data: Data = Path("data"),
    out: Out = None,
    resume: Resume = None,
    json: Json = False,
    given,
):
    """Learn φ while pre-training (algorithm 1), then compare what it is worth."""
    train("meta", domain, given, preset, epochs, device, data, out, resume, json)


def train(command, domain_name, given, preset, epochs, device, data, out, resume, as_json, phi=None):
    """`pretrain` and `meta` from the command line to the summary."""
    console = rich.console.Console(stderr=as_json)
    begun = time.perf_counter()
    device_name, device = device, pick_device(device)
    if resume is not None:
        if out is not None or epochs is not None or phi is not None or preset != "default":
            raise BadInput("--resume goes on with a run as it was started: no --out, --epochs, --phi or --preset")
        run = Run.open(resume)
        config = run.config()
        if config["command"] != command:
            raise BadInput(f"{resume} is a run of {config['command']}: resume it with that command")
        if domain_name not in (None, config["domain"]):
            raise BadInput(f"{resume} is of the domain {config['domain']}, not {domain_name}")
        domain_name, settings = config["domain"], config["settings"]
        for name, value in given.items():
            if value != getattr(settings, name):
                raise BadInput(
                    f"--{name.replace('_', '-')} {value} is not what {resume} was started with: {getattr(settings, name)}"
                )
        phi = Path(config["phi"]) if config["phi"] else None
        if config["device"] == "cpu" and device_name == "auto":  # a run stays where its numbers are the same
            device = pick_device("cpu")
        domain = make_domain(domain_name, settings, device, data)
    else:
        domain_name = domain_name or "digits-rotation"
        settings = settings_of(domain_name, given, preset)
        if command == "meta" and settings.method != "supervised":
            raise BadInput(f"--method {settings.method} belongs to pretrain: meta learns the weights of PT tasks alone")
        domain = make_domain(domain_name, settings, device, data)
        settings = domain.settings
        if epochs is not None:
            if "steps" in given or epochs < 1:
                raise BadInput("--epochs takes 1 or more, and does not go with --steps")
            each = max(1, domain.sizes["pretrain"] // settings.batch_size)
            settings = domain.settings = dataclasses.replace(settings, steps=epochs * each)
    if resume is not None and not same_data(config, domain):
        raise BadInput(f"{resume} was started with other data than {data} holds now")
    state = None
    if phi is not None:
        teacher = Run.open(phi)
        if not same_data(teacher.config(), domain):
            raise BadInput(f"{phi}: its φ was learned on other data, or on other parts of them")
        state = teacher.checkpoint(domain_name)["phi"]
    try:
        training = Training(domain, settings, command == "meta", state)
    except RuntimeError as error:
        raise BadInput(f"{phi}: its φ does not fit {domain_name}: {last_line(error)}") from None
    if resume is None:
        config = {"format": FORMAT, "command": command, "domain": domain_name, "phi": str(phi) if phi else None,
                  "device": str(device), "torch": torch.__version__, "data": domain.data_digest(),
                  "settings": dataclasses.asdict(settings)}  # fmt: skip
        run = Run.create(out, f"{command}-{domain_name}", config)
    elif (run.folder / "checkpoint.pt").exists():
        run.restore(training, domain_name)
        console.print(f"going on at PT step {training.step} of {settings.steps}")
    elif run.metrics.exists():
        os.truncate(run.metrics, 0)

    one_thread(domain_name)
    follow(training, run, domain_name, console)
    learner, learned = training.best, training.best.learned()
    summary = {
        "command": command, "domain": domain_name, "seed": settings.seed, "device": str(device),
        "seconds": 0.0, "training_seconds": training.seconds, "pt_steps": training.step,
        "meta_steps": learner.meta_steps, "skipped_meta_steps": learner.skipped,
        "validation_loss": validation_loss(domain, learner),
        "phi": {name: describe(p) for name, p in _detached(learned).items()}, **domain.facts(learned),
    }  # fmt: skip
    summary["phi"] |= {name: value for name, value in domain.measure(learned).items() if name in summary["phi"]}

    def afresh(state, seed):
        plain = dataclasses.replace(settings, seed=seed, particles="1", rounds="1")
        return Training(domain, plain, learn=False, phi=state).run().best.network

    def untrained(seed):
        torch.manual_seed(seed)
        return domain.network()

    methods = {"no_pretraining": untrained}
    if command == "meta":
        methods["default_phi"] = lambda seed: afresh(None, seed)
        methods["learned_phi"] = lambda seed: afresh(learned.state_dict(), seed)
        methods["online"] = lambda seed: learner.network
    else:
        methods["learned_phi" if phi else "default_phi"] = lambda seed: learner.network
    if settings.compare:
        with progress_bar(console, "comparison", settings.compare * len(methods)) as bar:
            results = compare(domain, methods, domain.finetune_sizes, settings.compare, settings.compare_scope,
                              settings.compare_lr, None, bar)  # fmt: skip
        summary["comparison"] = comparison_rows(domain, results)
    summary["seconds"] = time.perf_counter() - begun
    save_json(run.folder / "summary.json", summary)

    history = run.history()
    plot_losses(history, learner.number, run.folder)
    if command == "meta" and any(name in PHI_AXES for row in history for name in row):
        plot_phi(history, learner.number, run.folder)
    domain.figures(learned, run.folder)
    if settings.compare:
        plot_comparison(summary["comparison"], run.folder / "comparison.png")
        show_comparison(console, summary["comparison"])
        if command == "meta" and len(domain.finetune_sizes) > 1:
            console.print(
                f"(φ was learned with FT labels of {max(domain.finetune_sizes)} examples, whatever the size shown)"
            )
    for name, value in {**domain.measure(learned), **domain.facts(learned)}.items():
        console.print(f"{name.replace('_', ' ')}: {value:.4g}" if value is not None else "")
    if learner.skipped:
        console.print(f"{learner.skipped} meta steps were skipped: their hypergradient was not finite")
    finish(console, run, summary, as_json)


def same_data(config: dict, domain: Domain) -> bool:
    """Whether a run's config.json is of the data and parts that the domain has now; old ones do not say."""
    return config.get("data") in (None, domain.data_digest())


def follow(training: Training, run: Run, domain_name: str, console) -> None:
    """Runs a training with a progress bar, metrics and checkpoints; Ctrl-C saves one and says how to go on."""
    settings, stopped = training.settings, []
    if training.step >= settings.steps:
        return
    handlers = {
        number: signal.signal(number, lambda *_: stopped.append(True)) for number in (signal.SIGINT, signal.SIGTERM)
    }
    label = "learning φ" if training.learn else "pre-training"
    try:
        with progress_bar(console, label, settings.steps) as bar, run.metrics.open("a") as file:

            def each(training):
                for learner in training.learners:
                    row = {"step": training.step, "particle": learner.number, "skipped": learner.skipped}
                    row |= {name: finite_or_none(value) for name, value in learner.losses.items()}
                    row |= training.domain.measure(learner.meta)
                    file.write(json.dumps(row) + "\n")
                file.flush()
                values = {**training.domain.measure(training.best.meta), **training.best.losses}
                status = "  ".join(
                    f"{SHORT[name]} {float(value):.3g}"
                    for name, value in values.items()
                    if name in SHORT and value is not None
                )
                bar(training.step, status)
                if stopped:
                    run.save(training, domain_name)
                    command = "meta" if training.learn else "pretrain"
                    raise Failed(
                        f"stopped at PT step {training.step}; go on with: python metapt.py {command} --resume {run.folder}"
                    )

            def at_checkpoint(training):
                os.fsync(file.fileno())  # the checkpoint says how many bytes of it there are
                run.save(training, domain_name)

            training.run(each, at_checkpoint)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


SHORT = {"rotation_mean_deg": "φ °", "clean_to_noisy_weight_ratio": "clean/noisy", "pretrain_loss": "L_PT",
         "finetune_loss": "L_FT", "validation_loss": "L_V"}  # fmt: skip


@contextlib.contextmanager
def progress_bar(console, label: str, total: int | None):
    """A bar with rate and time left. It yields a function of (steps done or None for one more, what to show beside, of
    how many)."""
    columns = (rich.progress.TextColumn("{task.description}"), rich.progress.BarColumn(bar_width=20),
               rich.progress.MofNCompleteColumn(), rich.progress.TextColumn("{task.fields[rate]}"),
               rich.progress.TimeRemainingColumn(), rich.progress.TextColumn("{task.fields[status]}"))  # fmt: skip
    with rich.progress.Progress(*columns, console=console) as bars:
        task = bars.add_task(label, total=total, status="", rate="")

        def advance(done: int | None = None, status: str = "", total: int | None = None) -> None:
            bars.update(task, total=total, completed=done, advance=1 if done is None else None, status=status)
            speed = bars.tasks[task].speed
            bars.update(task, rate=f"{speed:.3g}/s" if speed else "")

        yield advance


def finite_or_none(value) -> float | None:
    return float(value) if math.isfinite(value) else None  # NaN is no JSON


def validation_loss(domain: Domain, learner: Learner) -> float:
    """L_V over the whole validation part, with the θ and ψ that the run ended with."""
    index = torch.arange(domain.sizes["validation"], device=next(learner.network.parameters()).device)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(domain.settings.seed)
        domain.begin_episode(learner.meta)  # the same after a resume
        loss = domain.finetune_loss(learner.network, learner.head, "validation", index)
        return loss(_detached(learner.network), learner.psi).item()


def describe(tensor: Tensor):
    if tensor.numel() == 1:
        return tensor.item()
    return {
        "shape": list(tensor.shape),
        "mean": tensor.mean().item(),
        "min": tensor.min().item(),
        "max": tensor.max().item(),
    }


def finish(console, run: Run, summary: dict, as_json: bool) -> None:
    """Says where everything is, and prints the summary where that was asked for."""
    names = ", ".join(sorted(path.name for path in run.folder.iterdir()))
    console.print(f"{summary['seconds']:.0f} s; {run.folder}: {names}", highlight=False)
    if as_json:
        print(json.dumps(summary))


def one_thread(domain_name: str) -> None:
    """Networks of 8 x 8 images are over before a second thread has begun, and two that wait for each other are slow."""
    if domain_name.startswith("digits"):
        torch.set_num_threads(1)


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BadInput(f"--device is {name!r}, expected auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise BadInput(f"--device is {name!r}, expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise BadInput(f"--device {name}: there is no such GPU here")
    return device


class Subject(NamedTuple):
    """A pre-trained encoder to be measured, and what it belongs to."""

    method: str
    domain_name: str
    settings: Settings
    domain: Domain
    network: Network
    run: Run | None  # None: a plain encoder file


def load_subject(
    path: Path, domain_name: str | None, device: torch.device, data: Path, half: str | None = None
) -> Subject:
    """An encoder from a run, or from a file with the `state_dict` of one; `half`: instead of the run's."""

    def with_half(settings):
        if half is not None and domain_name != "ppi":
            raise BadInput(f"--half belongs to ppi, {path} is of the domain {domain_name}")
        return settings if half is None else dataclasses.replace(settings, half=half)

    if path.is_dir():
        run = Run.open(path)
        config = run.config()
        if domain_name is not None and config["domain"] != domain_name:
            raise BadInput(f"{path} is of the domain {config['domain']}, not {domain_name}")
        domain_name, settings = config["domain"], config["settings"]
        method = "online" if config["command"] == "meta" else "learned_phi" if config["phi"] else "default_phi"
        settings = with_half(settings)
        domain = make_domain(domain_name, settings, device, data)
        if not same_data(config, domain):
            raise BadInput(f"{path} was trained on other data than {data} holds now")
        content = run.checkpoint(domain_name)
        try:
            module, state = domain.network(), content["learners"][0]["network"]
        except (KeyError, IndexError, TypeError):
            raise BadInput(f"{path / 'checkpoint.pt'} holds no encoder") from None
    else:
        if domain_name is None and path.exists():
            raise BadInput(f"{path} is a plain file: name its --domain")
        state, run, method = load_tensors(path), None, path.stem
        settings = with_half(settings_of(domain_name or "digits-rotation", {}))
        domain = make_domain(domain_name, settings, device, data)
        module = domain.network()
    try:
        (module if run else module.encoder).load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise BadInput(f"{path} holds no encoder of {domain_name}: {last_line(error)}") from None
    return Subject(method, domain_name, domain.settings, domain, module, run)


def parse_sizes(text: str | None, domain: Domain) -> list[int]:
    if text is None:
        return list(domain.finetune_sizes)
    try:
        sizes = sorted({int(n) for n in text.split(",")})
    except ValueError:
        raise BadInput(f"--sizes is {text!r}, expected numbers such as 30,100,300") from None
    smallest, largest = domain.finetune_limits
    if sizes[0] < smallest or sizes[-1] > largest:
        raise BadInput(f"--sizes is {text!r}, expected between {smallest} and the {largest} FT examples there are")
    return sizes


def check_scope(scope: str, lr: float | None) -> None:
    if scope not in ("head", "all"):
        raise BadInput(f"--scope is {scope!r}, expected head or all")
    if lr is not None and not 0 < lr < math.inf:
        raise BadInput(f"--lr is {lr}, expected a positive finite number")


@app.command(name="finetune")
def finetune_command(
    run: Annotated[Path, typer.Argument(help="A run, or a file with an encoder's state_dict")],
    domain: Annotated[str | None, typer.Option(help="The domain of a plain encoder file")] = None,
    sizes: Sizes = None,
    seeds: Seeds = 5,
    scope: Scope = "head",
    lr: Rate = None,
    steps: FtSteps = None,
    half: Half = None,
    export: Annotated[Path | None, typer.Option(help="Also write the encoder's state_dict to this file")] = None,
    device: Device = "auto",
    data: Data = Path("data"),
    out: Out = None,
    json: Json = False,
):
    """Fine-tune from a run's encoder, over seeds and FT-set sizes, beside an encoder without pre-training."""
    measure_runs(
        "finetune", [run], domain, sizes, seeds, scope, lr, steps, half, device, data, out, json, export=export
    )


@app.command(name="eval")
def eval_command(
    runs: Annotated[
        list[Path], typer.Argument(help="Runs of one domain; the first is what the others are compared to")
    ],
    domain: Annotated[str | None, typer.Option(help="The domain of plain encoder files")] = None,
    sizes: Sizes = None,
    seeds: Seeds = 5,
    scope: Scope = "head",
    lr: Rate = None,
    steps: FtSteps = None,
    half: Half = None,
    random_phi: Annotated[
        int,
        typer.Option(
            help="Also PT with this many random φ, best by validation; −1: as many as cost what the first meta run did"
        ),
    ] = 0,
    device: Device = "auto",
    data: Data = Path("data"),
    out: Out = None,
    json: Json = False,
):
    """Test metrics of runs side by side, paired by seed, with differences and their 95 % intervals."""
    measure_runs(
        "eval", runs, domain, sizes, seeds, scope, lr, steps, half, device, data, out, json, random_phi=random_phi
    )


def measure_runs(
    command, paths, domain_name, sizes, seeds, scope, lr, steps, half, device, data, out, as_json, export=None,
    random_phi=0,
):  # fmt: skip
    """`finetune` and `eval` from the command line to the summary."""
    console, begun, device = rich.console.Console(stderr=as_json), time.perf_counter(), pick_device(device)
    check_scope(scope, lr)
    subjects = [load_subject(path, domain_name, device, data, half) for path in paths]
    first = subjects[0]
    agree = dict.fromkeys(("source", "unseen_tasks", "fold", "half", "test_folds"), "other test data")
    agree["width"] = "encoders of one width can be compared"
    # What is not named comes from the runs.
    of_runs = ["compare_batch_size", *(["compare_lr", "compare_scope"] if lr is None else []),
               *(["finetune_steps", "finetune_epochs"] if steps is None else [])]  # fmt: skip
    agree |= dict.fromkeys(of_runs, "name --lr and --steps")
    for path, subject in zip(paths, subjects, strict=True):
        if subject.domain_name != first.domain_name:
            raise BadInput(f"{path} is of the domain {subject.domain_name}, {paths[0]} of {first.domain_name}")
        if subject.settings.seed != first.settings.seed or subject.settings.noise != first.settings.noise:
            raise BadInput(
                f"{path} has other data than {paths[0]}: runs with the same --seed and --noise can be compared"
            )
        for name, why in agree.items():
            if getattr(subject.settings, name) != getattr(first.settings, name):
                raise BadInput(f"{path} has another --{name.replace('_', '-')} than {paths[0]}: {why}")
    if lr is None:
        own = first.run is not None and scope == first.settings.compare_scope
        lr = first.settings.compare_lr if own else {"head": 1e-2, "all": 1e-3}[scope]
    domain, sizes = first.domain, parse_sizes(sizes, first.domain)
    one_thread(first.domain_name)
    if export is not None and not export.parent.is_dir():
        raise BadInput(f"{export} cannot be written: {export.parent} is no folder")
    if random_phi and first.run is None:
        raise BadInput("--random-phi needs a run first: a plain encoder file does not say how it was trained")
    config = {"format": FORMAT, "command": command, "domain": first.domain_name, "runs": [str(path) for path in paths],
              "sizes": sizes, "seeds": seeds, "scope": scope, "lr": lr, "steps": steps, "half": first.settings.half}  # fmt: skip
    run = Run.create(out, f"{command}-{first.domain_name}", config)
    if export is not None:
        state = first.network.encoder.state_dict()
        save_whole(export, lambda file: torch.save(state, file))

    def untrained(seed):
        torch.manual_seed(seed)
        return domain.network()

    methods = {}
    for path, subject in zip(paths, subjects, strict=True):
        alone = [s.method for s in subjects].count(subject.method) == 1
        named_alone = [p.name for p in paths].count(path.name) == 1
        methods[subject.method if alone else path.name if named_alone else str(path)] = (
            lambda seed, network=subject.network: network
        )
    methods["no_pretraining"] = untrained
    candidates = draw_random_phi(first, random_phi, console) if random_phi else []
    named = {**methods, **{f"random {i}": lambda seed, network=n: network for i, n in enumerate(candidates)}}
    with progress_bar(console, "fine-tuning", seeds * len(named)) as bar:
        results = compare(domain, named, sizes, seeds, scope, lr, steps, bar)
    if candidates:  # each FT takes the candidate that its own validation labels prefer
        methods["random_phi"] = None
        for n in sizes:
            outcomes = zip(*(results.pop((f"random {i}", n)) for i in range(len(candidates))), strict=True)
            results["random_phi", n] = [min(o, key=lambda outcome: outcome.validation_loss) for o in outcomes]
    summary = {"command": command, "domain": first.domain_name, "seed": first.settings.seed, "device": str(device),
               "scope": scope, "lr": lr, **({"half": first.settings.half} if first.domain_name == "ppi" else {}),
               "seconds": 0.0, "comparison": comparison_rows(domain, results)}  # fmt: skip
    if candidates:
        summary["random_phi_draws"] = len(candidates)
    if command == "eval":
        summary["differences"] = differences(results, list(methods), sizes)
    summary["seconds"] = time.perf_counter() - begun
    save_json(run.folder / "summary.json", summary)
    plot_comparison(summary["comparison"], run.folder / "comparison.png")
    show_comparison(console, summary["comparison"])
    if summary.get("differences"):
        show_differences(console, summary["differences"])
    finish(console, run, summary, as_json)


def draw_random_phi(subject: Subject, number: int, console) -> list[Network]:
    """Encoders of PT afresh with φ drawn at random: what the same compute buys without gradients."""
    plain = dataclasses.replace(subject.settings, particles="1", rounds="1")
    networks, spent = [], 0.0
    allowed = subject.run.checkpoint(subject.domain_name)["seconds"] if number < 0 else math.inf
    with progress_bar(console, "random φ", number if number > 0 else int(allowed) + 1) as bar:
        while spent < allowed and (number < 0 or len(networks) < number):
            torch.manual_seed(plain.seed + 1 + len(networks))
            phi = subject.domain.random_meta().state_dict()
            training = Training(subject.domain, plain, learn=False, phi=phi).run()
            networks.append(training.best.network)
            spent += training.seconds
            bar(len(networks) if number > 0 else int(spent))
    return networks


def main() -> None:
    """Runs a command; what the user can mend is one line and exit status 2, what they cannot is 1."""
    usage_error = typer.BadParameter.__mro__[1]
    try:
        sys.exit(typer.main.get_command(app).main(standalone_mode=False) or 0)
    except usage_error as error:
        if message := " ".join(error.format_message().split()):  # empty where the help was asked for by saying nothing
            print(f"metapt: {message}", file=sys.stderr)
        sys.exit(2)
    except BadInput as error:
        print(f"metapt: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a file in a folder's place, a disk that is full
        print(f"metapt: {error}", file=sys.stderr)
        sys.exit(1 if error.errno in (errno.ENOSPC, errno.EPIPE, errno.EIO) else 2)
    except (Failed, KeyboardInterrupt, typer.Abort) as error:
        print(f"metapt: {str(error) or 'stopped'}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
