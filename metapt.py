# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0",
# ]
# ///
"""metapt: hyperparameters of pre-training, learned by gradient from how well the model does after fine-tuning."""

# ---------------------------------------------------------------------------------------------------------------------
# 2. Hypergradients. Needs torch alone: to use it elsewhere, copy this section as it stands.
# ---------------------------------------------------------------------------------------------------------------------

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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

    Raises:
        ValueError: a field has a value that is not listed here.
    """

    steps: int = 1
    lr: float = 1e-3
    betas: tuple = (0.9, 0.999)
    eps: float = 1e-8
    optimizer: str = "sgd"
    scope: str = "head"

    def __post_init__(self):
        _require(self.steps >= 0, "Unroll.steps", self.steps, "0 or more")
        _require(self.optimizer in ("sgd", "adam"), "Unroll.optimizer", self.optimizer, "'sgd' or 'adam'")
        _require(self.scope in ("head", "all"), "Unroll.scope", self.scope, "'head' or 'all'")


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
            the two points count in full there, which hurts Hq (not qᵀ∇²_θφ L_PT) in networks of piecewise linear units.
        step: "finite" only: the norm of the perturbation ε·‖q‖; None: the cube root of the dtype's machine epsilon.
            Set it higher (0.1, say) where the gradients are noisier than the dtype says, as under autocast.

    Raises:
        ValueError: a field has a value that is not listed here.
    """

    method: str = "neumann"
    terms: int = 1
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

    product = pretrain_products(pretrain_loss, theta, phi, solver)
    start = None if q0 is None else _flat({name: q0[name] for name in theta})
    q, mixed, residual = solve(product, _flat(v), start, solver, theta, preconditioner)
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


def pretrain_products(pretrain_loss, theta: Params, phi: Params, solver: Solver):
    """d → ((∇²_θθ L_PT + damping·I) d, dᵀ∇²_θφ L_PT): the two products that the implicit function theorem needs.

    Exact: one graph of ∇_θ L_PT serves all calls. Finite: one pair of passes, at θ ± εd, gives both.
    """
    inner, outer = list(_point(theta=theta)), list(_point(phi=phi))
    derivatives = _derivatives(pretrain_loss, _point(theta=theta, phi=phi), inner, solver)

    def product(d: Tensor, hessian: bool = True, mixed: bool = True) -> tuple[Tensor | None, Tensor | None]:
        wanted = (inner if hessian else []) + (outer if mixed else [])
        change = derivatives.along(_point(theta=_unflat(d, theta)), wanted)
        return (
            _flat({name: change[name] for name in inner}) + solver.damping * d if hessian else None,
            _flat({name: change[name] for name in outer}) if mixed else None,
        )

    return product


def solve(product, v: Tensor, q0: Tensor | None, solver: Solver, theta: Params, preconditioner=None):
    """q, qᵀ∇²_θφ L_PT and the relative residual ‖Hq − v‖ / ‖v‖ (nan where it would cost a product of its own)."""
    if not v.any():
        return torch.zeros_like(v), product(torch.zeros_like(v), hessian=False)[1], 0.0
    if solver.method == "identity":
        return v, product(v, hessian=False)[1], math.nan
    if solver.method == "neumann":
        alpha = solver.alpha or 1 / largest_curvature(product, v, solver.seed)
        return neumann(product, v, q0, solver.terms, alpha)
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
