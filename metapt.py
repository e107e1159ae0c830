# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy>=2.0,<3", "scikit-learn>=1.5,<2", "matplotlib>=3.9,<4", "typer>=0.16,<1",
#                 "rich>=13.9,<16"]
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
arXiv:2111.01754. Chapters: 2 the hypergradient, 3 settings and domains, 4 Algorithm 1, 5 fine-tuning and comparisons,
6 images, 7 runs on disk, 8 reports, 9 commands; each uses only what stands above it.
"""

# ---------------------------------------------------------------------------------------------------------------------
# 2. The hypergradient. Needs torch alone: to use it elsewhere, copy this section as it stands.
#     v       = dL_V(θ_K, ψ_K)/dθ*    through K unrolled FT steps         gradient_through_finetuning
#     q       ≈ (∇²_θθ L_PT)⁻¹ v      an inverse-Hessian-vector product   solve
#     dL_V/dφ = −qᵀ ∇²_θφ L_PT        the implicit function theorem       hypergradient, which joins the three

import warnings
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
    """The FT stage: K differentiable steps from where PT ended. ValueError: a value that is not listed.

    `hvp` is of the steps' adjoints, as in `Solver`; None: as the solver says. Beside a "finite" solver, "exact" pays in
    scope "head": a step costs one pass of L_FT instead of three, but the graphs of all K are kept, not one at a time.
    """

    steps: int = 1  # K; 0: L_V is read off at (θ*, ψ_0)
    lr: float = 1e-3
    betas: tuple = (0.9, 0.999)  # adam: decay of its moments
    eps: float = 1e-8  # adam: added to the root of the second
    optimizer: str = "sgd"  # or "adam"
    scope: str = "head"  # only ψ moves; "all": θ moves too
    hvp: str | None = None  # or "exact", "finite"

    def __post_init__(self):
        _require(self.steps >= 0, "Unroll.steps", self.steps, "0 or more")
        _require(self.optimizer in ("sgd", "adam"), "Unroll.optimizer", self.optimizer, "'sgd' or 'adam'")
        _require(self.scope in ("head", "all"), "Unroll.scope", self.scope, "'head' or 'all'")
        _require(self.hvp in (None, "exact", "finite"), "Unroll.hvp", self.hvp, "'exact', 'finite' or None")


@dataclass(frozen=True)
class Solver:
    """How q ≈ H⁻¹v is found, where H = ∇²_θθ L_PT + damping·I. ValueError: a value that is not listed.

    "identity" is q = v (T1-T2 of Luketina et al., ICML 2016), or M⁻¹v with a preconditioner M (of PT's Adam moments:
    SAMA, Choe et al., NeurIPS 2023); "neumann" q = α Σ_{j≤terms} (I − αH)ʲ v (Lorraine et al., AISTATS 2020, algorithm
    3); "cg" conjugate gradients (Pedregosa, ICML 2016); "nystrom" H from random products, inverted by the Woodbury
    identity (Hataya and Yamada, AISTATS 2023).

    `hvp` "exact" is double backward, "finite" central differences of first-order gradients. ReLU's kinks between the
    two points count in full there: Hq, and often qᵀ∇²_θφ L_PT, is noise at the default `step`. A longer one (0.1, say)
    averages over more kinks, and over gradients that are noisier than their dtype says, as under autocast.
    """

    method: str = "cg"  # or "neumann", "identity", "nystrom"
    terms: int = 10  # Neumann terms beyond the zeroth | CG iterations at most | Nyström rank
    alpha: float | None = None  # Neumann step size; None: 1 / the largest |eigenvalue|, from 8 products more
    damping: float = 0.0  # "nystrom" below full rank needs it
    tol: float = 1e-10  # cg stops when ‖Hq − v‖ ≤ tol·‖v‖
    seed: int = 0  # of the Nyström sketch and of the power iterations that find alpha
    hvp: str = "exact"  # or "finite"
    step: float | None = None  # finite: norm of the perturbation; None: the cube root of the dtype's machine epsilon

    def __post_init__(self):
        methods = ("identity", "neumann", "cg", "nystrom")
        _require(self.method in methods, "Solver.method", self.method, f"one of {', '.join(methods)}")
        _require(self.terms >= (self.method == "nystrom"), "Solver.terms", self.terms, "0 or more (nystrom: 1 or more)")
        _require(self.damping >= 0, "Solver.damping", self.damping, "0 or more")
        _require(self.alpha is None or self.alpha > 0, "Solver.alpha", self.alpha, "positive, or None")
        _require(self.hvp in ("exact", "finite"), "Solver.hvp", self.hvp, "'exact' or 'finite'")
        _require(self.step is None or self.step > 0, "Solver.step", self.step, "positive, or None")


class Hypergradient(NamedTuple):
    """What `hypergradient` returns, detached; tensors have shape, dtype and device of the parameters they belong to.

    Attributes:
        phi, psi0: dL_V/dφ and dL_V/dψ_0, by the names of phi and psi.
        value, psi: L_V(θ_K, ψ_K), a scalar, and ψ_K.
        q, ft_state: the solver's q, by the names of theta, and the FT optimiser's state: for the next call.
        residual: ‖Hq − v‖ / ‖v‖, or nan where the solver did not come by it.
    """

    phi: Params
    psi0: Params
    value: Tensor
    psi: Params
    q: Params
    ft_state: dict
    residual: float


@torch.enable_grad()  # whatever the caller's mode
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
    reduce: Callable[[Params], Params] | None = None,
    allow_unused: bool = False,
) -> Hypergradient:
    """dL_V(θ_K, ψ_K)/dφ: how the validation loss after fine-tuning changes with the hyperparameters of pre-training.

    Raghu et al., "Meta-Learning to Improve Pre-Training", NeurIPS 2021, section 3. A loss takes two dicts, returns a
    scalar and is a repeatable function of them. Its batch is fixed. What it draws from torch's random generators (the
    CPU's and that of theta's device) is drawn alike in every pass; they end where one pass of each FT loss, of L_V and
    of L_PT leaves them. It may read buffers, but not change them: hand `functional_call` copies of BatchNorm's.

    Args:
        pretrain_loss, validation_loss: L_PT(theta, phi) and L_V(theta, psi).
        finetune_loss: L_FT(theta, psi): one callable for all K steps, or a sequence of K.
        theta, psi, phi: θ*, ψ_0 and φ, by name. They are never changed, not even for a moment.
        q0: an earlier q to start from. "cg" spends one product more to learn where it stands. "neumann" spends `terms`
            products (at least one), a step q ← q + α(v − Hq) each; hypergradient and residual are those of the q before
            the last step, the q returned is that after it (SOBA, Dagréou et al., NeurIPS 2022): one product a call does.
        ft_state: the FT optimiser's state, as an earlier call returned it; None or {}: a fresh one. From fresh moments
            Adam's first step is lr·g/(|g| + ε), through which next to no gradient flows.
        preconditioner: r → M⁻¹r by the names of theta, M symmetric positive definite ("cg" and "identity").
        reduce: sums tensors over ranks, where each rank's losses are its share of the whole: applied to L_V, to each
            gradient, Hessian-vector product and qᵀ∇²_θφ L_PT before anything is decided on them.
        allow_unused: whether a loss may ignore all of theta or phi; parts of them it always may.

    Raises:
        TypeError: parameters that are not tensors by name.
        ValueError: an argument that does not fit the others; or, unless `allow_unused`, autograd finds no path from
            L_PT to theta, from L_PT to phi, or from L_V to either of theta and psi.
        FloatingPointError: something was not finite; the message names it.
    """
    for name, params in {"theta": theta, "psi": psi, "phi": phi, "q0": q0 or {}}.items():
        if not isinstance(params, dict) or not all(isinstance(t, Tensor) for t in params.values()):
            raise TypeError(f"{name} is {type(params).__name__}, expected dict(module.named_parameters()) or such")
    _require(theta and phi, "theta and phi", "empty", "parameters in both")
    method, preconditioned = solver.method, preconditioner is not None
    _require(q0 is None or method in ("cg", "neumann"), "q0", f"with {method}", "'cg' or 'neumann'")
    _require(not preconditioned or method in ("cg", "identity"), "preconditioner", f"with {method}", "cg or identity")
    one = callable(finetune_loss)  # for all K steps: one batch, and the same random numbers
    finetune = [_Function(loss, ("theta", "psi"), reduce) for loss in ([finetune_loss] if one else finetune_loss)]
    finetune = finetune * unroll.steps if one else finetune
    _require(len(finetune) == unroll.steps, "finetune_loss", f"{len(finetune)} losses", f"{unroll.steps}")
    validation = _Function(validation_loss, ("theta", "psi"), reduce)
    pretrain = _Function(pretrain_loss, ("theta", "phi"), reduce)

    # v = dL_V(θ_K, ψ_K)/dθ*
    start = _point(theta=theta, psi=psi)
    value, gradient, end, ft_state = gradient_through_finetuning(finetune, validation, start, unroll, solver, ft_state)
    v, psi0, psi_k = _group(gradient, "theta"), _group(gradient, "psi"), _group(end, "psi")
    largest = _finite(L_V={"": value}, v=v, psi0=psi0)
    if not (largest["v"] or largest["psi0"]):
        validation.require_paths("validation_loss", end, ("theta or psi",), allow_unused)

    # q ≈ (∇²_θθ L_PT)⁻¹ v, from products Hd and dᵀ∇²_θφ L_PT (None for what is not asked)
    point, inner, outer = _point(theta=theta, phi=phi), list(_point(theta=theta)), list(_point(phi=phi))
    derivatives = _Derivatives(pretrain, point, inner, solver)

    def product(d: Tensor, hessian: bool = True, mixed: bool = True) -> tuple[Tensor | None, Tensor | None]:
        change = derivatives.along(d, inner * hessian + outer * mixed)
        hessian_d = _flat(change, inner) if hessian else None
        if hessian and solver.damping:
            hessian_d = hessian_d + solver.damping * d
        return hessian_d, _flat(change, outer) if mixed else None

    q, mixed, residual = _flat(v), 0.0, 0.0
    if largest["v"]:
        q, mixed, residual = solve(product, q, q0, solver, theta, preconditioner)

    # dL_V/dφ = −qᵀ ∇²_θφ L_PT
    q, hyper = _unflat(q, theta), _unflat(torch.zeros_like(_flat(phi)) - mixed, phi)
    if not _finite(q=q, phi=hyper, psi_K=psi_k)["phi"]:  # if v = 0, also the pass that the random generators are owed
        pretrain.require_paths("pretrain_loss", point, ("theta", "phi"), allow_unused)
    if residual >= 1:  # a constant text, so that it is shown once
        warnings.warn("‖Hq − v‖ ≥ ‖v‖: q is no better than 0; where H is indefinite, damping helps", stacklevel=3)
    return Hypergradient(hyper, psi0, value, {name: t.clone() for name, t in psi_k.items()}, q, ft_state, residual)


def gradient_through_finetuning(finetune, validation, point: Params, unroll: Unroll, solver: Solver, state):
    """L_V, its gradient by the point (θ_0, ψ_0), the point (θ_K, ψ_K) and the optimiser's state there.

    An FT step is an elementwise rule, whose adjoint is a formula, of a gradient, whose adjoint is a Hessian-vector
    product: λᵀ∇²_ψψ L_FT and λᵀ∇²_θψ L_FT. That alone tells exact from finite, which builds no second-order graph.
    """
    solver = replace(solver, hvp=unroll.hvp or solver.hvp)
    everything, trail = list(point), []
    moving = [name for name in everything if unroll.scope == "all" or name.startswith("psi.")]
    for loss in finetune:
        derivatives = _Derivatives(loss, point, moving, solver)
        gradient = derivatives.gradient()
        point, state = finetune_step(point, gradient, unroll, state)
        trail.append((derivatives, gradient, state))

    (value, adjoint), moments = validation.gradient(point, everything), (0.0, 0.0)
    while trail:  # popped, so that each step's graph is freed once it has been used
        derivatives, gradient, after = trail.pop()
        direction, moments = finetune_step_adjoint(_flat(adjoint, moving), moments, _flat(gradient), after, unroll)
        change = derivatives.along(direction, everything)
        adjoint = {name: adjoint[name] + change[name] for name in everything}
    return value, adjoint, point, state or {}


def finetune_step(params: Params, gradient: Params, unroll: Unroll, state: dict | None) -> tuple[Params, dict]:
    """One step of SGD or Adam (Kingma and Ba, ICLR 2015, algorithm 1), without side effects: params and state after.

    `gradient` names what moves. Adam's `state` is {"step": int, "exp_avg": vector, "exp_avg_sq": vector}, the moments
    in the order of `gradient` (in `hypergradient` ψ; in scope "all" θ, then ψ), SGD's {}; None or {} is a fresh one.
    ValueError: a state of other parameters.
    """
    g = _flat(gradient)
    if unroll.optimizer == "sgd":
        change, state = unroll.lr * g, {}
    else:
        state = state or {"step": 0, "exp_avg": torch.zeros_like(g), "exp_avg_sq": torch.zeros_like(g)}
        _require(state["exp_avg"].shape == g.shape, "ft_state", "another's", f"one of {len(g)} parameters")
        (beta1, beta2), step = unroll.betas, state["step"] + 1
        m = beta1 * state["exp_avg"] + (1 - beta1) * g
        s = beta2 * state["exp_avg_sq"] + (1 - beta2) * g * g
        rate, unbias = unroll.lr / (1 - beta1**step), 1 - beta2**step
        change = rate * m / ((s / unbias).sqrt() + unroll.eps)
        state = {"step": step, "exp_avg": m, "exp_avg_sq": s}
    return {**params, **{name: params[name] - d for name, d in _unflat(change, gradient).items()}}, state


def finetune_step_adjoint(adjoint: Tensor, moments: tuple, g: Tensor, after: dict, unroll: Unroll):
    """dL_V/d(gradient) and dL_V/d(moments before a step): the transpose of `finetune_step`'s derivative, on vectors.

    `adjoint` and `moments` are dL_V/d(parameters) and, by way of later steps, dL_V/d(moments) after the step, `g` its
    gradient, `after` its state. Parameters pass through with derivative one and need no formula.
    """
    if unroll.optimizer == "sgd":
        return -unroll.lr * adjoint, moments
    (beta1, beta2), m, s = unroll.betas, after["exp_avg"], after["exp_avg_sq"]
    rate, unbias = unroll.lr / (1 - beta1 ** after["step"]), 1 - beta2 ** after["step"]
    root = (s / unbias).sqrt()
    # No gradient has ever reached a unit with s = 0: it is dead, and the infinite slope of the root there is no
    # information. Its derivative is taken as zero; with a dead unit's zero Hessian that is exact.
    alive = s > 0
    dm = moments[0] + torch.where(alive, -rate * adjoint / (root + unroll.eps), 0)
    slope = rate * m * adjoint / ((root + unroll.eps) ** 2 * 2 * unbias * torch.where(alive, root, 1))
    ds = moments[1] + torch.where(alive, slope, 0)
    return (1 - beta1) * dm + 2 * (1 - beta2) * g * ds, (beta1 * dm, beta2 * ds)


def solve(product, v: Tensor, q0: Params | None, solver: Solver, theta: Params, preconditioner):
    """q, qᵀ∇²_θφ L_PT (a plain 0 where q = 0) and ‖Hq − v‖ / ‖v‖ (nan where it would cost a product of its own)."""
    precondition = lambda r: _flat(preconditioner(_unflat(r, theta)), theta).detach() if preconditioner else r
    q0 = None if q0 is None else _flat(q0, theta).detach()
    if solver.method == "identity":
        q = precondition(v)
        return q, product(q, hessian=False)[1], torch.nan
    if solver.method == "neumann":
        return neumann(product, v, q0, solver.terms, solver.alpha or 1 / largest_curvature(product, v, solver.seed))
    if solver.method == "cg":
        return conjugate_gradients(product, v, q0, solver.terms, solver.tol, precondition)
    return nystrom(product, v, solver.terms, solver.damping, solver.seed)


def neumann(product, v, q0, terms, alpha):
    """q = α Σ_{j≤terms} (I − αH)ʲ v, summed as the iteration q ← q + α(v − Hq) from q = αv, or going on from q0."""
    q = alpha * v if q0 is None else q0
    for left in reversed(range(terms if q0 is None else max(terms, 1))):
        hessian_q, mixed = product(q, mixed=q0 is not None and left == 0)
        r = v - hessian_q
        q = q + alpha * r
    if q0 is None:
        return q, product(q, hessian=False)[1], torch.nan
    return q, mixed, (r.norm() / v.norm()).item()


def conjugate_gradients(product, v, q0, terms, tol, precondition):
    """Preconditioned conjugate gradients; Hq and qᵀ∇²_θφ L_PT are carried along with q, being linear in it. What decides
    is brought to the host once an iteration, as it has to wait for the device each time."""
    q, hessian_q, mixed = (torch.zeros_like(v), 0.0, 0.0) if q0 is None else (q0, *product(q0))
    r, p, rz = v - hessian_q, None, None
    done, residual = torch.stack([r.norm() <= tol * v.norm(), r.norm() / v.norm()]).tolist()
    for _ in range(0 if done else terms):
        z = precondition(r)
        rz, previous = r @ z, rz
        p = z if p is None else z + (rz / previous) * p
        hessian_p, mixed_p = product(p)
        a = rz / (curvature := p @ hessian_p)
        r = r - a * hessian_p
        useless, done, after = torch.stack([curvature <= 0, r.norm() <= tol * v.norm(), r.norm() / v.norm()]).tolist()
        if useless:  # no minimum this way: the quadratic model ends here, and so does its use
            break
        q, mixed, residual = q + a * p, mixed + a * mixed_p, after
        if done:
            break
    return q, mixed, residual


def nystrom(product, v, rank, damping, seed):
    """(UΛUᵀ + damping·I)⁻¹ v, where UΛUᵀ ≈ ∇²_θθ L_PT comes from its products with `rank` random directions.

    At full rank the system in their basis is solved as it is (a singular Hessian needs damping). Below, what is not
    positive in the sketched Hessian is left to the damping: UΛUᵀ is to be positive semi-definite.
    """
    n, rank = len(v), min(rank, len(v))
    _require(rank == n or damping > 0, "Solver.damping", damping, f"positive for nystrom of rank {rank} < {n}")
    basis = torch.linalg.qr(_normal(n, rank, like=v, seed=seed)).Q
    sketch = torch.stack([product(d, mixed=False)[0] for d in basis.T], dim=1)
    if not _finite(q={"": sketch})["q"]:  # no curvature at all: nothing to invert (linalg would say so less clearly)
        return torch.zeros_like(v), 0.0, 1.0
    core = basis.T @ sketch
    core = (core + core.T) / 2
    if rank == n:
        q = basis @ torch.linalg.solve(core, basis.T @ v)
    else:
        values, vectors = torch.linalg.eigh(core - damping * torch.eye(rank, dtype=v.dtype, device=v.device))
        kept = values > values.abs().max() * rank * torch.finfo(v.dtype).eps
        factor = (sketch - damping * basis) @ (vectors[:, kept] / values[kept].sqrt())
        u, root, _ = torch.linalg.svd(factor, full_matrices=False)
        coefficients = u.T @ v
        q = u @ (coefficients / (root**2 + damping)) + (v - u @ coefficients) / damping
    hessian_q, mixed = product(q)
    return q, mixed, ((hessian_q - v).norm() / v.norm()).item()


def largest_curvature(product, v, seed, iterations=8):
    """The largest |eigenvalue| of H, from below, by power iterations on a seeded random vector."""
    d = _normal(len(v), like=v, seed=seed)
    for _ in range(iterations):
        d = product(d / (d.norm() or 1), mixed=False)[0]
    return d.norm().item() or 1.0  # no curvature at all: any step will do


class _Function:
    """A loss of two dicts as one of a point, which draws the same random numbers in every pass as in its first."""

    def __init__(self, loss: Loss, groups: tuple[str, str], reduce):
        self.loss, self.groups, self.reduce, self.start = loss, groups, reduce, None

    def graph(self, point: Params, wrt) -> tuple[Tensor, Params]:
        """The loss and its leaves, of which only `wrt` are tracked: a pass costs no more than it must."""
        leaves = {name: t.detach().requires_grad_(name in wrt) for name, t in point.items()}
        device = next(iter(leaves.values())).device
        beside = [] if device.type == "cpu" else [device]  # the CPU's generator is always among those that are kept
        with torch.random.fork_rng(beside, self.start is not None, device_type=device.type):
            kept = [torch.default_generator, *(torch.get_device_module(d).default_generators[d.index] for d in beside)]
            self.start = self.start or [generator.get_state() for generator in kept]
            for generator, state in zip(kept, self.start, strict=True):
                generator.set_state(state)
            value = self.loss(*(_group(leaves, group) for group in self.groups))
            _require(value.numel() == 1, "the loss", f"of shape {tuple(value.shape)}", "a scalar")
            return value.reshape(()), leaves

    def gradient(self, point: Params, wrt) -> tuple[Tensor, Params]:
        """The loss and its first-order gradient, both summed over ranks."""
        value, leaves = self.graph(point, wrt)
        found = self.summed({"value": value.detach(), **_grad(value, {name: leaves[name] for name in wrt})})
        return found["value"], {name: found[name] for name in wrt}

    def summed(self, tensors: Params) -> Params:
        """Over ranks; `reduce` may work in place, on copies."""
        return self.reduce({name: t.clone() for name, t in tensors.items()}) if self.reduce else tensors

    def require_paths(self, label: str, point: Params, groups: tuple[str, ...], allow_unused: bool) -> None:
        """ValueError if autograd finds no path from the loss to one of `groups`, such as "phi" or "theta or psi"."""
        value, leaves = self.graph(point, point)
        for group in groups:
            inputs = [leaf for name, leaf in leaves.items() if name.partition(".")[0] in group.split(" or ")]
            paths = value.requires_grad and torch.autograd.grad(value, inputs, retain_graph=True, allow_unused=True)
            if not allow_unused and not (paths and any(g is not None for g in paths)):
                raise ValueError(f"no path from {label} to {group}: functional_call, not encoder(x)? See allow_unused")


class _Derivatives:
    """The gradient of a function at a point by what moves, and how the gradient changes along a direction."""

    def __init__(self, function: _Function, point: Params, moving: list[str], solver: Solver):
        self.function, self.step, self.graph = function, solver.step, None
        self.point, self.moving = point, {name: point[name] for name in moving}
        if solver.hvp == "exact":  # one graph of the gradient, as a vector, serves every direction
            value, self.leaves = function.graph(point, point)
            gradient = _grad(value, {name: self.leaves[name] for name in moving}, create_graph=True)
            self.graph = _flat(gradient)

    def gradient(self) -> Params:
        if self.graph is None:
            return self.function.gradient(self.point, self.moving)[1]
        return self.function.summed(_unflat(self.graph.detach(), self.moving))

    def along(self, direction: Tensor, wrt: list[str]) -> Params:
        """d/dε ∇_wrt f(point + ε·direction) at ε = 0: exact, ∇_wrt ⟨direction, ∇f⟩; finite, up to O(ε²)."""
        if self.graph is not None:
            inputs = {name: self.leaves[name] for name in wrt}
            return self.function.summed(_grad(self.graph, inputs, grad_outputs=direction, retain_graph=True))
        # The error is about step² from the third derivative and machine epsilon / step from rounding: least at the
        # cube root. It is the length of the whole step, however many parameters share it; nothing waits to know it.
        norm, step = direction.norm(), self.step or torch.finfo(direction.dtype).eps ** (1 / 3)
        epsilon = step / torch.where(norm > 0, norm, 1)
        scale, pieces = torch.where(norm > 0, 0.5 / epsilon, 0), _unflat(direction, self.moving).items()
        ends = ({name: self.point[name] + e * d for name, d in pieces} for e in (epsilon, -epsilon))
        ahead, behind = (self.function.gradient({**self.point, **end}, wrt)[1] for end in ends)
        return {name: (ahead[name] - behind[name]) * scale for name in wrt}


def _grad(output: Tensor, inputs: Params, **options) -> Params:
    """torch.autograd.grad for a dict, with zeros for inputs that the output does not depend on."""
    if not output.requires_grad or not inputs:
        return {name: torch.zeros_like(t) for name, t in inputs.items()}
    grads = torch.autograd.grad(output, list(inputs.values()), allow_unused=True, materialize_grads=True, **options)
    return dict(zip(inputs, grads, strict=True))


def _point(**groups: Params) -> Params:
    """Several dicts in one, detached: _point(theta={"w": t}) is {"theta.w": t}."""
    return {f"{group}.{name}": t.detach() for group, params in groups.items() for name, t in params.items()}


def _group(point: Params, group: str) -> Params:
    return {name[len(group) + 1 :]: t for name, t in point.items() if name.startswith(group + ".")}


def _flat(params: Params, names=None) -> Tensor:
    pieces = [params[name].flatten() for name in (params if names is None else names)]
    return torch.cat(pieces) if pieces else torch.empty(0)


def _unflat(vector: Tensor, like: Params) -> Params:
    pieces = vector.split_with_sizes([t.numel() for t in like.values()])
    return {name: p.view_as(t).to(t.dtype) for p, (name, t) in zip(pieces, like.items(), strict=True)}


def _normal(*shape: int, like: Tensor, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=like.dtype).to(like.device)


def _finite(**results: Params) -> dict[str, float]:
    """The largest |number| in each, by one wait for the device; FloatingPointError that names what is not finite."""
    tensors = {(label, name): t for label, each in results.items() for name, t in each.items() if t.numel()}
    sizes = dict(zip(tensors, torch.stack([t.abs().max() for t in tensors.values()]).tolist(), strict=True))
    if bad := [key for key, size in sizes.items() if not size < torch.inf]:
        names = ", ".join(name for label, name in bad if label == bad[0][0])
        raise FloatingPointError(f"{bad[0][0]} is not finite" + f": {names}" * (names != ""))
    return {label: max([size for (of, _), size in sizes.items() if of == label], default=0.0) for label in results}


# ---------------------------------------------------------------------------------------------------------------------
# 3. Settings and Domain: what an experiment is

import abc
import contextlib
import dataclasses
import errno
import functools
import hashlib
import inspect
import itertools
import json
import math
import re
import reprlib
from pathlib import Path
from types import UnionType
from typing import Annotated, ClassVar, get_args, get_type_hints

import numpy as np
import torch.nn.functional as F
from torch import distributed, nn

UNREADABLE = (OSError, ValueError, RecursionError)  # what a file leads to that is missing, torn, or no JSON
LOST = "(closed|reset) by (remote )?peer|Broken pipe|remote process exit"  # gloo's and NCCL's words for a rank's end
PANELS = ("Run", "Pre-training", "Fine-tuning in the meta step", "Learning φ", "Measuring", "Of this domain")
RUN, PRETRAINING, UNROLLING, LEARNING, MEASURING, OWN = PANELS  # where --help shows a setting


class BadInput(Exception): ...  # something that the user gave cannot be used: one line, what and where


class Failed(Exception): ...  # the run cannot go on: one line


@contextlib.contextmanager
def refusing(problem: str, errors=UNREADABLE, becomes=BadInput, words=""):  # what fails so within becomes one line
    try:
        yield
    except errors as error:
        memory = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
        if memory or not re.search(words, str(error)):
            raise  # the machine's fault, or ours
        # The last line: torch begins with what it did and ends with what was wrong.
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()[:300]
        raise becomes(f"{problem}: {'it is missing' if isinstance(error, FileNotFoundError) else reason}") from None


def flag(setting: str) -> str:  # as an option on the command line
    return f"--{setting.replace('_', '-')}"


def one_of(*values: str):
    return lambda x: x in values, f"one of {', '.join(value or 'nothing' for value in values)}"


AT_LEAST_0, AT_LEAST_1 = (lambda x: x >= 0, "0 or more"), (lambda x: x >= 1, "1 or more")
POSITIVE, BELOW_1 = (lambda x: x > 0, "positive"), (lambda x: 0 <= x < 1, "at least 0 and less than 1")
POSITIVE_IF_GIVEN = (lambda x: x is None or x > 0, "positive")
SHARE, ANYTHING = (lambda x: 0 < x <= 1, "more than 0 and at most 1"), (lambda x: True, "")
PARTS = one_of("validation", "all")
SCOPES, HVPS = one_of("head", "all"), one_of("", "exact", "finite")
PRECISIONS, PRECONDITIONERS = one_of("float32", "bf16"), one_of("", "adam")
BF16_STEP = 0.1  # of finite products: at a shorter one the rounding of gradients tells (bench/precision.py)
SIZES = (re.compile(r"(\d{1,9}(,\d{1,9})*)?").fullmatch, "numbers such as 30,100,300")
PARTICLES = (re.compile(r"\d{1,9}(:0?\.\d+)?(,\d{1,9}(:0?\.\d+)?)*").fullmatch,
             "as 6:0.35,3:0.9,1: falling numbers down to 1, rising shares of the run")  # fmt: skip


def option(default, help: str, panel: str = OWN, check=ANYTHING, learning: bool | None = None, data: bool = False):
    """A field of `Settings`, and an option on the command line with a line of `help` in a panel of --help.

    `check` is (a predicate of the value, words for what it expects); `learning`: whether it matters to `meta` alone;
    `data`: whether it decides what the data are, so that runs that are compared must agree on it."""
    learning = panel in (UNROLLING, LEARNING) if learning is None else learning
    return dataclasses.field(default=default, metadata={"help": help, "panel": panel, "check": check,
                                                        "learning": learning, "data": data})  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Every knob of an experiment; BadInput: a value that cannot be. A domain extends them: `class Settings(
    metapt.Settings, steps=500)` has another default, a field `knob: float = option(0.1, "what it does")` is a knob."""

    seed: int = option(0, "Of everything random", RUN, (lambda x: 0 <= x < 2**32, "0 to 2**32 - 1"), data=True)
    steps: int = option(1000, "PT steps", PRETRAINING, AT_LEAST_1)
    batch_size: int = option(64, "PT examples a step", PRETRAINING, AT_LEAST_1)
    lr: float = option(1e-3, "Learning rate of PT (Adam)", PRETRAINING, POSITIVE)
    cosine: bool = option(False, "That rate falls to 0 along a cosine", PRETRAINING)
    precision: str = option("float32", "Of the network's passes, in losses: float32 or bf16", PRETRAINING, PRECISIONS)
    compile: bool = option(False, "These passes through torch.compile", PRETRAINING)
    warmup: int = option(100, "PT steps before the first meta step", PRETRAINING, AT_LEAST_0, learning=True)
    unroll_lr: float = option(1e-2, "Learning rate of FT, beside PT too (Adam)", UNROLLING, POSITIVE, learning=False)
    unroll_batch_size: int = option(64, "FT examples a step", UNROLLING, AT_LEAST_1, learning=False)
    unroll_steps: int = option(1, "K: unrolled FT steps", UNROLLING, AT_LEAST_0)
    unroll_scope: str = option("head", "What they move: head or all", UNROLLING, SCOPES)
    unroll_hvp: str = option("", "Their products: exact or finite; else as --hvp", UNROLLING, HVPS)
    validation_batch_size: int = option(250, "Validation examples", UNROLLING, AT_LEAST_1)
    validate_on: str = option("validation", "Labels that L_V is over: validation, or all (FT's too)", UNROLLING, PARTS)
    meta_every: int = option(10, "P: PT steps between two meta steps", LEARNING, AT_LEAST_1)
    meta_batch_size: int = option(256, "PT examples a meta step", LEARNING, AT_LEAST_1)
    meta_lr: float = option(1e-3, "Learning rate of φ (Adam)", LEARNING, POSITIVE)
    meta_lr_decay: float = option(1.0, "What that rate falls to, as a share", LEARNING, POSITIVE)
    average: float = option(0.0, "Share of the run, at its end, that φ is averaged over", LEARNING, BELOW_1)
    solver: str = option("identity", "identity, neumann, cg or nystrom", LEARNING)
    terms: int = option(1, "Neumann terms, CG steps, Nyström rank", LEARNING, AT_LEAST_0)
    preconditioner: str = option("", "Of identity and cg: adam (PT's moments); else none", LEARNING, PRECONDITIONERS)
    alpha: float | None = option(None, "Neumann step size; else estimated", LEARNING, POSITIVE_IF_GIVEN)
    damping: float = option(0.0, "Added to the PT Hessian's diagonal", LEARNING, AT_LEAST_0)
    hvp: str = option("exact", "Hessian products: exact or finite", LEARNING)
    hvp_step: float | None = option(None, "Norm of a finite step; else the dtype's", LEARNING, POSITIVE_IF_GIVEN)
    particles: str = option("1", "Copies of the run; 6:0.35,1: the best one after 35 %", LEARNING, PARTICLES)
    compare: int = option(3, "Seeds of the comparison; 0: none", MEASURING, AT_LEAST_0)
    sizes: str = option("", "FT-set sizes, as 30,100; else the domain's", MEASURING, SIZES)
    measure_scope: str = option("head", "What that FT moves: head or all", MEASURING, SCOPES)
    measure_lr: float | None = option(None, "Its rate; else 0.01 (head), 0.001 (all)", MEASURING, POSITIVE_IF_GIVEN)
    measure_steps: int = option(500, "Its steps, the best of 25 looks", MEASURING, AT_LEAST_1)
    measure_epochs: int = option(0, "Its epochs, in place of steps", MEASURING, AT_LEAST_0)
    measure_batch_size: int = option(64, "Its examples a step", MEASURING, AT_LEAST_1)

    def __init_subclass__(cls, **defaults):
        fields = cls.__base__.__dataclass_fields__  # a new default is the inherited field, declared again
        cls.__annotations__ = inspect.get_annotations(cls) | {name: fields[name].type for name in defaults}
        for name, value in defaults.items():
            setattr(cls, name, dataclasses.field(default=value, metadata=fields[name].metadata))
        dataclass(frozen=True)(cls)
        for name, kind in get_type_hints(cls).items():  # where annotations are text
            cls.__dataclass_fields__[name].type = kind

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value, kinds = getattr(self, f.name), get_args(f.type) or (f.type,)
            right = type(value) in kinds or (float in kinds and type(value) is int)
            self.require(right, f.name, " or ".join(kind.__name__ for kind in kinds))
            if float in kinds:  # float32 ends at 3e38, and Adam multiplies a rate by ten
                self.require(abs(value or 0) <= 1e30, f.name, "a finite number, at most 1e30 in size")
            predicate, expected = f.metadata.get("check", ANYTHING)
            self.require(predicate(value), f.name, expected)
        coarse = self.precision == "float32" or (self.hvp_step or BF16_STEP) >= BF16_STEP
        self.require(coarse, "hvp_step", f"{BF16_STEP} or more with --precision bf16")
        self.require(self.warmup <= self.steps, "warmup", f"at most the {self.steps} steps")
        self.require(self.solver != "nystrom" or self.damping > 0, "damping", "positive with --solver nystrom")
        fits = not self.preconditioner or self.solver in ("identity", "cg")
        self.require(fits, "preconditioner", f"nothing with --solver {self.solver}")
        try:
            _ = self.unroll, self.inverse  # which check their own fields
        except ValueError as error:
            raise BadInput(str(error)) from None
        stages = itertools.pairwise([*self.plan, (0, math.inf)])
        narrowing = all(many > fewer and 0 < share < later for (many, share), (fewer, later) in stages)
        self.require(narrowing and self.plan[-1] == (1, 1.0), "particles", PARTICLES[1])

    def require(self, condition, name: str, expected: str) -> None:
        if not condition:
            raise BadInput(f"{flag(name)} is {getattr(self, name)!r}, expected {expected}")

    @property
    def unroll(self) -> Unroll:
        return Unroll(self.unroll_steps, self.unroll_lr, optimizer="adam", scope=self.unroll_scope,
                      hvp=self.unroll_hvp or None)  # fmt: skip

    @property
    def inverse(self) -> Solver:
        step = self.hvp_step or (BF16_STEP if self.precision == "bf16" else None)
        return Solver(self.solver, self.terms, self.alpha, self.damping, seed=self.seed, hvp=self.hvp, step=step)

    @property
    def plan(self) -> list[tuple[int, float]]:  # how many particles there are until which share of the run
        pieces = [piece.partition(":") for piece in self.particles.split(",")]
        return [(int(count), float(share or 1)) for count, _, share in pieces]


# Raghu et al. 2021: Algorithm 1 as published; the Neumann step size is the learning rate of PT.
PUBLISHED = {f.name: f.default for f in dataclasses.fields(Settings)}
PUBLISHED |= {"meta_every": 10, "unroll_steps": 1, "solver": "neumann", "terms": 1, "lr": 1e-3, "alpha": 1e-3}


class Network(nn.Module):  # θ. With `features=True` it stops at what the encoder gives, for the FT head
    def __init__(self, encoder: nn.Module, head: nn.Module):
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, *inputs, features: bool = False):
        hidden = self.encoder(*inputs)
        return hidden if features else self.head(hidden)


@functools.cache
def compiled_call():
    """torch.func.functional_call, compiled: parameters are inputs, where a compiled module may hold on to its own."""
    torch._functorch.config.donated_buffer = False  # passes of one graph share what was saved for backward
    torch._dynamo.config.recompile_limit = 64  # a code for each set of what has a gradient, mode and kind of size
    run = lambda module, params, inputs, options: torch.func.functional_call(module, params, inputs, options)
    return torch.compile(run, options={"fallback_random": True})  # dropout as without


def call(module: nn.Module, params: Params, *inputs, train: bool = False, live: bool = False, **options):
    """`module(*inputs)` with other parameters. Buffers (BatchNorm's statistics) are copies, so that no pass changes
    what the next one sees, unless `live`. Where `module.precision` is "bf16" it runs under autocast; what comes out is
    float32 all the same, as are parameters and gradients."""
    module.train(train)
    buffers = {name: b if live else b.clone() for name, b in module.named_buffers()}
    lower = getattr(module, "precision", "float32") == "bf16"
    run = compiled_call() if getattr(module, "compiled", False) else torch.func.functional_call
    with torch.autocast(next(iter(params.values())).device.type, torch.bfloat16, enabled=lower):
        found = run(module, {**params, **buffers}, inputs, options)
    return found.float() if lower and isinstance(found, Tensor) else found


class Ranks:
    """The processes that torchrun started (one without it), which divide each batch: a rank's loss is its share of the
    whole batch's mean, so that what is linear in a loss, such as all its derivatives, is summed over the ranks."""

    def __init__(self):
        many = distributed.is_available() and distributed.is_initialized()
        self.rank, self.size = (distributed.get_rank(), distributed.get_world_size()) if many else (0, 1)
        self.draws = np.random.default_rng(self.rank)  # seeds of what each rank draws for itself

    @refusing("another rank has ended", RuntimeError, Failed, LOST)
    def sum(self, tensors: Params) -> Params:  # in one message
        if self.size == 1 or not tensors:
            return tensors
        distributed.all_reduce(total := _flat(tensors))
        return _unflat(total, tensors)

    @refusing("another rank has ended", RuntimeError, Failed, LOST)
    def objects(self, one) -> list:  # one of each rank, in their order; nobody goes on before all are here
        found = [one] * self.size
        if self.size > 1:
            distributed.all_gather_object(found, one)
        return found

    def first(self, make):  # what rank 0 makes, for all
        return self.objects(None if self.rank else make())[0]

    @contextlib.contextmanager
    def own(self):  # here each rank draws for itself; all else that torch draws is alike on all ranks
        beside = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
        with torch.random.fork_rng(beside, self.size > 1):
            if self.size > 1:
                torch.manual_seed(int(self.draws.integers(2**63)))
            yield


class Domain(abc.ABC):
    """One experiment: its data, networks, φ, losses and metric. A subclass sets `sizes`, defines what is abstract here
    and, where the default does not serve, the rest. Examples are known by their number within a part of the data:
    pretrain, finetune, validation, and what `tests` names, each in random order; `index` is such numbers, [n] int64 on
    `device`."""

    Settings: ClassVar[type[Settings]] = Settings
    presets: ClassVar[dict[str, dict]] = {}  # by name: settings that differ from the defaults
    tests: ClassVar[dict[str, str]] = {"test": "accuracy"}  # test parts, the headline first: what is measured on each
    captions: ClassVar[dict[str, str]] = {}  # what `measure` gives, in words for a figure's axis
    threads: ClassVar[int | None] = None  # of the CPU; None: torch's choice
    access: ClassVar[dict[str, int]] = {}  # parts of which nothing before FT may see more than so many examples
    divisible: ClassVar[bool] = True  # L_PT is a mean over examples, which `ranks` may divide
    sizes: dict[str, int] = {}  # examples in each part  # noqa: RUF012

    def __init__(self, settings: Settings, device: torch.device, data: Path):
        """`data`: the folder under which prepared data lie. What is drawn from torch after this is the seed's."""
        self.settings, self.device, self.ranks = settings, device, Ranks()
        torch.manual_seed(settings.seed)

    @abc.abstractmethod
    def network(self) -> Network: ...  # θ as it begins, freshly drawn
    @abc.abstractmethod
    def head(self) -> nn.Module: ...  # ψ, likewise
    @abc.abstractmethod
    def meta(self) -> nn.Module: ...  # φ, likewise
    @abc.abstractmethod
    def inputs(self, part: str, index: Tensor): ...  # what the encoder takes
    @abc.abstractmethod
    def targets(self, part: str, index: Tensor) -> Tensor: ...  # what FT should predict from it
    @abc.abstractmethod
    def pretrain_loss(self, network: Network, meta: nn.Module, index: Tensor, progress: float, live: bool) -> Loss:
        """L_PT(θ, φ), a function of two dicts, on the PT examples `index`, at a share `progress` of the run. `live`: once
        before each PT step; buffers may change then, as BatchNorm's statistics do (see `call`), and at no other time."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:  # of FT, averaged over examples
        return F.cross_entropy(outputs, targets)

    def score(self, outputs: Tensor, targets: Tensor) -> float:  # the metric, the higher the better; a share of 1
        return (outputs.argmax(1) == targets).double().mean().item()

    def finetune_loss(self, network: Network, head: nn.Module, part: str, index: Tensor) -> Loss:
        """L_FT(θ, ψ), or L_V on the validation part: everything in evaluation mode."""
        inputs, targets = self.inputs(part, index), self.targets(part, index)
        return lambda theta, psi: self.loss(call(head, psi, call(network, theta, inputs, features=True)), targets)

    @functools.cached_property
    def finetune_sizes(self) -> tuple[int, ...]:  # of the FT sets that reports show
        return tuple(sorted({max(1, self.sizes["finetune"] // 10), self.sizes["finetune"]}))

    def finetune_limits(self) -> tuple[int, int]:  # the smallest and the largest FT set that there can be
        return 1, self.sizes["finetune"]

    def divide(self, examples: int) -> tuple[int, int]:  # what an FT set of that size takes of finetune and validation
        return examples, self.sizes["validation"]

    def transfer(self, network: Network) -> Network:  # in the mode in which FT moves all of it
        return network.eval()

    def data_digest(self) -> str:  # another one for other data: a run is gone on with, or measured, on its own
        named = [getattr(self.settings, f.name) for f in dataclasses.fields(self.settings) if f.metadata.get("data")]
        return hashlib.sha256(json.dumps([self.sizes, named], sort_keys=True).encode()).hexdigest()

    def phi_rates(self, meta: nn.Module) -> dict[str, float]:  # the learning rate of each part of φ, by name
        return {name: self.settings.meta_lr for name, _ in meta.named_parameters()}

    def backward(self, value: Tensor, theta: Params) -> None:  # from the PT loss to the gradient of θ
        value.backward()

    def measure(self, meta: nn.Module) -> dict[str, float | None]:  # what φ is along the run, a figure of the first
        return {name if p.numel() == 1 else f"{name}_std": (p if p.numel() == 1 else p.std()).item()
                for name, p in detached(meta).items()}  # fmt: skip

    def facts(self, meta: nn.Module) -> dict | None: ...  # numbers that the summary has besides φ itself
    def figures(self, meta: nn.Module) -> dict | None: ...  # of φ: file name → function that draws on an empty Figure
    def table(self, meta: nn.Module) -> tuple[list[str], list[tuple]] | None: ...  # φ by name: columns, and rows
    def begin_episode(self, meta: nn.Module) -> None: ...  # called before the P PT steps of each round
    def explore(self, meta: nn.Module, progress: float) -> None: ...  # called after a meta step: noise on φ
    def decorate(self, axis) -> None: ...  # adds to the figure of φ along the run what only the domain knows


def on_cuda(domain: Domain) -> bool:  # else CUDA is not to be touched
    return domain.device.type == "cuda"


def on_host(index: Tensor) -> Tensor:  # `index` on the CPU; of a mini-batch without waiting for the device
    return index.on_host if hasattr(index, "on_host") else index.cpu()


def detached(module: nn.Module) -> Params:
    return {name: p.detach() for name, p in module.named_parameters()}


def whole(low: int = 0, high: int = 2**53):  # a predicate for `as_written`
    return lambda value: type(value) is int and low <= value <= high


def as_written(stored, expected, key: str = ""):
    """An object from a file, where it is as the program writes it; ValueError: the first key that is not. `expected`:
    a dict or a list (the same keys, and so on within), a tensor (its dtype and shape, all finite), a type, a predicate,
    or the value itself."""
    if isinstance(expected, dict | list) and isinstance(stored, dict if isinstance(expected, dict) else list | tuple):
        theirs, ours = (x if isinstance(x, dict) else dict(enumerate(x)) for x in (stored, expected))
        for name in [*ours, *theirs]:
            if name not in theirs or name not in ours:
                raise ValueError(f"{key}{name} is {'missing' if name in ours else 'unknown'}")
            as_written(theirs[name], ours[name], f"{key}{name}.")
        return stored
    tensor = isinstance(stored, Tensor)
    found = f"a tensor of {stored.dtype} {list(stored.shape)}" if tensor else reprlib.repr(stored)
    if tensor and stored.is_meta:
        right, found = False, "a tensor without numbers"
    elif tensor and isinstance(expected, Tensor):
        right = (stored.layout, stored.dtype, stored.shape) == (expected.layout, expected.dtype, expected.shape)
        if right and not stored.isfinite().all():
            right, found = False, "not finite"
    elif isinstance(expected, type | UnionType):
        right = type(stored) in (get_args(expected) or (expected,))
    else:
        right = expected(stored) if callable(expected) else type(stored) is type(expected) and stored == expected
    if not right:
        raise ValueError(f"{key.removesuffix('.') or 'it'} is {found}")
    return stored


def read_prepared(folder: Path, form: str, prepared_by: str, facts: dict, layout) -> tuple[dict, dict[str, Tensor]]:
    """A folder that data_scripts/ wrote: about.json, and its .npy arrays, memory-mapped and unread. `facts`: what else
    about.json holds, for `as_written`; `layout(about)`: of each array dtype and shape, likewise. BadInput where it
    is missing, or is not what the command `prepared_by` writes in the format `form`."""
    path, arrays, problem = folder / "about.json", {}, f"is not what '{prepared_by}' wrote"
    sha256 = lambda value: type(value) is str and re.fullmatch("[0-9a-f]{64}", value)
    if not path.exists():
        raise BadInput(f"{path} is missing: '{prepared_by}' prepares the data")
    with refusing(f"{path} {problem}"):
        known = {"format": form, "source": str, "licence": str, "arrays": dict, **facts}
        about = as_written(json.loads(path.read_text()), known)
        as_written(about["arrays"], {name: {"dtype": dtype, "shape": shape, "sha256": sha256}
                                     for name, (dtype, shape) in layout(about).items()}, "arrays.")  # fmt: skip
    for name, expected in about["arrays"].items():
        # numpy raises half a dozen types for a header that is torn, and warns.
        with refusing(f"{folder / name}.npy {problem}", Exception), warnings.catch_warnings(action="ignore"):
            values = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            if (values.dtype.str, list(values.shape)) != (expected["dtype"], expected["shape"]):
                raise ValueError(f"{values.dtype.str} {values.shape} does not fit about.json")
            arrays[name] = torch.from_numpy(values)  # of a read-only array, which torch would warn of
    return about, arrays


# ---------------------------------------------------------------------------------------------------------------------
# 4. Algorithm 1: mini-batches, the learner, the training loop

import copy
import time

from torch.utils._pytree import tree_leaves, tree_map_only

MANY_SKIPPED = 10  # meta steps in a row without a finite hypergradient: the run has failed
CHECKPOINT_EVERY = 20  # rounds of P PT steps
HELD_OUT, FOLDS = 1000, 5  # from so many FT examples a fifth of them is kept from learning φ


def held_out(domain: Domain) -> int:  # how many FT examples, the last, say whether the learned φ is worth it
    n = domain.sizes["finetune"]
    return n // FOLDS if n >= HELD_OUT else 0


class Stream:  # indices of mini-batches: a new permutation each epoch, without its incomplete end
    def __init__(self, n: int, batch: int, device: torch.device):
        self.n, self.batch, self.device = n, min(batch, n), device
        self.place(torch.randperm(n), 0)

    def place(self, order: Tensor, position: int) -> None:  # a whole epoch is sent at once, and none waits for it
        pinned = order.pin_memory() if self.device.type == "cuda" else order  # from other memory CUDA's copy waits
        self.order, self.position, self.there = order, position, pinned.to(self.device, non_blocking=True)

    def next(self) -> Tensor:
        if self.position + self.batch > self.n:
            self.place(torch.randperm(self.n), 0)
        self.position += self.batch
        index, ours = (o[self.position - self.batch : self.position] for o in (self.there, self.order))
        index.on_host = ours  # see `on_host`
        return index


def adam(parameters: Sequence[nn.Parameter], lr: float) -> torch.optim.Adam:
    """Adam; for large networks in one pass over memory, where torch's plain one makes nine."""
    return torch.optim.Adam(parameters, lr=lr, fused=sum(p.numel() for p in parameters) > 1_000_000 or None)


def with_moments(optimizer: torch.optim.Adam) -> torch.optim.Adam:  # from the start, as every checkpoint has them
    for group in optimizer.param_groups:
        for p in group["params"]:
            step = torch.zeros((), device=p.device if group["fused"] else "cpu")
            optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


class Learner:  # all that Algorithm 1 carries from step to step: θ, ψ, φ, their optimisers, the place in the data
    MODULES = ("network", "meta", "optimizer", "meta_optimizer")
    VALUES = ("psi", "ft_states", "average", "averaged", "recent", "skipped", "skipped_in_a_row", "meta_steps", "number",
              "losses")  # fmt: skip

    def __init__(self, domain: Domain):
        settings = self.settings = domain.settings
        self.domain, self.ranks, self.number = domain, domain.ranks, 0
        self.network, self.head, self.meta = domain.network(), domain.head(), domain.meta()
        # Of losses alone: what measures θ calls the network as it is.
        self.network.precision, self.network.compiled = settings.precision, settings.compile
        self.psi = {name: p.detach().clone() for name, p in self.head.named_parameters()}
        self.optimizer = with_moments(adam(list(self.network.parameters()), settings.lr))
        rates = domain.phi_rates(self.meta)  # at first: `meta_step` lowers them
        groups = [{"params": [p], "initial_lr": rates[name]} for name, p in self.meta.named_parameters()]
        self.meta_optimizer = with_moments(torch.optim.Adam(groups, betas=(0.9, 0.99)))
        self.average = {name: torch.zeros_like(p) for name, p in detached(self.meta).items()}
        self.averaged = 0  # so many φ of the run's end
        sizes = {**domain.sizes, "meta": domain.sizes["pretrain"], **domain.access}
        sizes["finetune"] = min(sizes["finetune"], domain.sizes["finetune"] - held_out(domain))
        batches = {"pretrain": settings.batch_size, "meta": settings.meta_batch_size,
                   "finetune": settings.unroll_batch_size, "validation": settings.validation_batch_size}  # fmt: skip
        self.streams = {name: Stream(sizes[name], batch, domain.device) for name, batch in batches.items()}
        # Of the FT optimiser, by what it moves: the head beside PT; the unroll in the meta step goes on from its own.
        moved = {"head": _point(psi=self.psi)}
        if settings.unroll_scope == "all":
            moved["all"] = _point(theta=detached(self.network), psi=self.psi)
        zeros = {scope: torch.zeros_like(_flat(params)) for scope, params in moved.items()}
        self.ft_states = {scope: {"step": 0, "exp_avg": z, "exp_avg_sq": z} for scope, z in zeros.items()}
        self.recent: list[float] = []  # validation losses of the last meta steps: particles are compared by them
        self.skipped = self.skipped_in_a_row = self.meta_steps = 0
        self.losses = dict.fromkeys(("pretrain_loss", "finetune_loss", "validation_loss", "residual"), math.nan)

    def next_loss(self, stream: str, progress: float = 0.0, live: bool = False) -> Loss:
        """On the next batch of a stream; with ranks on a part of it, so weighed that their sum is that."""
        batch, own = self.streams[stream].next(), lambda rows: rows.tensor_split(self.ranks.size)[self.ranks.rank]
        index, share = own(batch), len(own(batch)) / len(batch)
        index.on_host, index.share = own(batch.on_host), share  # for a domain whose L_PT is no mean over examples
        with self.ranks.own():
            if stream in ("pretrain", "meta"):
                loss = self.domain.pretrain_loss(self.network, self.meta, index, progress, live)
            else:
                loss = self.domain.finetune_loss(self.network, self.head, stream, index)
        return loss if share == 1 else lambda *params: share * loss(*params)

    def pretrain_step(self, progress: float) -> None:  # one step on θ with φ fixed, one on the FT head ψ
        theta, loss = dict(self.network.named_parameters()), self.next_loss("pretrain", progress, live=True)
        with self.ranks.own():
            value = loss(theta, detached(self.meta))
            self.optimizer.zero_grad()
            self.domain.backward(value, theta)
        value = value.detach().sum()
        if self.ranks.size > 1:  # BatchNorm's statistics are averaged, so that L_FT and L_V are the same on all
            means = [b.div_(self.ranks.size) for n, b in self.network.named_buffers() if ".running_" in n]
            tensors = [value, *means, *(p.grad for p in theta.values() if p.grad is not None)]
            for mine, total in zip(tensors, self.ranks.sum(dict(enumerate(tensors))).values(), strict=True):
                mine.copy_(total)
        self.optimizer.step()
        loss, psi = self.next_loss("finetune"), {name: p.detach().requires_grad_() for name, p in self.psi.items()}
        with self.ranks.own():
            head_value = loss(detached(self.network), psi)
        gradient = self.ranks.sum({"": head_value.detach(), **_grad(head_value, psi)})
        head_value = gradient.pop("")
        with torch.no_grad():
            self.psi, self.ft_states["head"] = finetune_step(
                psi, gradient, self.settings.unroll, self.ft_states["head"])  # fmt: skip
        self.losses |= {"pretrain_loss": value, "finetune_loss": head_value}

    def validation_loss(self) -> Loss:  # L_V: a mean over validation examples, or over these and FT's
        parts = ("validation",) if self.settings.validate_on == "validation" else ("finetune", "validation")
        losses = [self.next_loss(part) for part in parts]
        shares = [self.streams[part].n / sum(self.streams[each].n for each in parts) for part in parts]
        return lambda theta, psi: sum(share * loss(theta, psi) for share, loss in zip(shares, losses, strict=True))

    def adam_metric(self, r: Params) -> Params:  # M⁻¹r, M = √v̂ + ε of PT's Adam; ε alone before its first step
        (group,), found = self.optimizer.param_groups, {}
        for name, p in self.network.named_parameters():
            state = self.optimizer.state[p]
            unbias = 1 - group["betas"][1] ** state["step"].double().clamp(min=1)  # no wait
            found[name] = r[name] / ((state["exp_avg_sq"] / unbias).sqrt() + group["eps"])
        return found

    def meta_step(self, progress: float) -> None:  # one step on φ, which stays where no hypergradient is finite
        domain, settings, ranks = self.domain, self.settings, self.ranks
        finetune = [self.next_loss("finetune") for _ in range(settings.unroll_steps)]
        losses = self.next_loss("meta", progress), finetune, self.validation_loss()
        try:
            with ranks.own():
                result = hypergradient(
                    *losses, detached(self.network), self.psi, detached(self.meta), unroll=settings.unroll,
                    solver=settings.inverse, ft_state=self.ft_states[settings.unroll_scope],
                    preconditioner=self.adam_metric if settings.preconditioner else None,
                    reduce=ranks.sum if ranks.size > 1 else None)  # fmt: skip
            if result.residual >= 1 and not _finite(q=result.q)["q"]:
                raise FloatingPointError("q = 0, the PT Hessian curves down along v: --damping may help")
        except FloatingPointError as error:
            self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
            if self.skipped_in_a_row >= MANY_SKIPPED:
                raise Failed(f"{MANY_SKIPPED} meta steps in a row without a finite hypergradient: {error}") from None
            return
        self.psi, self.ft_states[settings.unroll_scope] = result.psi, result.ft_state
        for name, p in self.meta.named_parameters():
            p.grad = result.phi[name]
        for group in self.meta_optimizer.param_groups:
            group["lr"] = group["initial_lr"] * settings.meta_lr_decay**progress
        self.meta_optimizer.step()
        domain.explore(self.meta, progress)
        if progress >= 1 - settings.average:
            self.averaged += 1
            for name, p in detached(self.meta).items():
                self.average[name] = self.average[name] + (p - self.average[name]) / self.averaged
        self.skipped_in_a_row, self.meta_steps = 0, self.meta_steps + 1
        value = result.value.clone()  # which may be a view of much more
        self.losses |= {"validation_loss": value, "residual": result.residual}
        self.recent = [*self.recent[-9:], value]

    def learned(self) -> nn.Module:  # φ, or its average over the end of the run where that was asked for
        meta = copy.deepcopy(self.meta)
        meta.load_state_dict({**meta.state_dict(), **(self.average if self.averaged else {})})
        return meta

    def state_dict(self) -> dict:
        state = {name: getattr(self, name).state_dict() for name in self.MODULES}
        state |= {name: getattr(self, name) for name in self.VALUES}
        state["losses"] = {name: float(value) for name, value in self.losses.items()}
        state["recent"] = [float(value) for value in self.recent]
        return state | {"streams": {name: (stream.order, stream.position) for name, stream in self.streams.items()}}

    def load_state_dict(self, state: dict) -> None:
        for name in self.MODULES:
            getattr(self, name).load_state_dict(state[name])
        for name in self.VALUES:
            setattr(self, name, tree_map_only(Tensor, lambda t: t.to(self.domain.device), state[name]))
        for name, stream in self.streams.items():
            stream.place(*state["streams"][name])


class Training:
    """Algorithm 1, or PT alone with φ fixed (`learn` is False); BadInput where the domain cannot be trained.
    `phi` is what φ begins with, as a state dict; None: the domain's default."""

    def __init__(self, domain: Domain, learn: bool, phi: dict | None = None):
        self.domain, self.settings, self.learn = domain, domain.settings, learn
        if missing := {"pretrain", "finetune", "validation", *domain.tests} - set(domain.sizes):
            raise BadInput(f"{type(domain).__name__}.sizes lacks {', '.join(sorted(missing))}")
        twice = "exact" in (self.settings.hvp, self.settings.unroll_scope == "all" and self.settings.unroll_hvp)
        if self.settings.compile and learn and twice:
            raise BadInput("--compile needs --hvp finite, and with --unroll-scope all --unroll-hvp finite")
        if domain.ranks.size > 1 and not domain.divisible:
            raise BadInput(f"the PT loss of {type(domain).__name__} is no mean over examples: no ranks")
        torch.manual_seed(self.settings.seed)
        first = Learner(domain)
        if (fewest := min(stream.batch for stream in first.streams.values())) < domain.ranks.size:
            raise BadInput(f"a batch of {fewest} examples cannot be divided over {domain.ranks.size} ranks")
        if phi is not None:
            with refusing(f"φ does not fit {type(domain).__name__}", ValueError):
                first.meta.load_state_dict(as_written(phi, first.meta.state_dict()))
        check_losses(first, learn)
        self.learners = [first]
        for number in range(1, self.settings.plan[0][0] if learn else 1):  # they differ by what they draw from here on
            self.learners.append(copy.deepcopy(first, {id(domain): domain, id(domain.ranks): domain.ranks}))
            self.learners[-1].number = number
        self.step, self.seconds = 0, 0.0

    def run(self, each=lambda training: None, at_checkpoint=lambda training: None) -> "Training":
        """Goes on to the end. `each` is called after every round (P PT steps and the meta step that follows them, if
        any), `at_checkpoint` after every `CHECKPOINT_EVERY` rounds, and at the end."""
        settings, ranks, begun = self.settings, self.domain.ranks, time.perf_counter() - self.seconds
        steps, warmup, every = settings.steps, settings.warmup, settings.meta_every
        while self.step < steps:
            # P steps make a round, counted from the end of the warm-up; what does not fit comes first and last.
            until = min(self.step + every - (self.step - warmup) % every, steps if self.step >= warmup else warmup)
            for learner in self.learners:
                ranks.draws = np.random.default_rng([settings.seed, learner.number, self.step, ranks.rank])
                self.domain.begin_episode(learner.meta)
                for step in range(self.step, until):
                    share = step / steps if settings.cosine else 0.0  # Loshchilov and Hutter, ICLR 2017
                    learner.optimizer.param_groups[0]["lr"] = settings.lr * (1 + math.cos(math.pi * share)) / 2
                    learner.pretrain_step(self._progress(step))
                if self.learn and self.step >= warmup and until - self.step == every:
                    learner.meta_step(self._progress(until - 1))
            self.step, self.seconds = until, time.perf_counter() - begun
            if not all(math.isfinite(learner.losses["pretrain_loss"]) for learner in self.learners):
                raise Failed(f"the PT loss is not finite at PT step {self.step}: a lower --lr or --meta-lr may help")
            # Successive halving (Jamieson and Talwalkar, AISTATS 2016): as a stage ends the better particles stay.
            wanted = next(count for count, share in settings.plan if share >= self._progress(self.step))
            if len(self.learners) > wanted:
                self.learners.sort(key=lambda learner: np.mean(list(map(float, learner.recent or [math.inf]))))
                del self.learners[wanted:]
            each(self)
            if -(-self.step // every) % CHECKPOINT_EVERY == 0 or self.step == steps:
                if ranks.size > 1:
                    self.compare_ranks()
                at_checkpoint(self)
        return self

    def compare_ranks(self) -> None:  # Failed: what all ranks should have alike they have not
        symbols, state = {"network": "θ", "psi": "ψ", "meta": "φ"}, {"the random state": torch.get_rng_state()}
        if on_cuda(self.domain):
            state["the random state of CUDA"] = torch.cuda.get_rng_state()
        for learner in self.learners:
            named = learner.state_dict().items()
            state |= {f"{symbols.get(name, name)} ({learner.number})": value for name, value in named}
        numbers = lambda value: b"".join(torch.as_tensor(t).flatten().view(torch.uint8).cpu().numpy()
                                         for t in tree_leaves(value) if isinstance(t, Tensor | int | float))  # fmt: skip
        sums = self.domain.ranks.objects({name: hashlib.sha256(numbers(of)).digest() for name, of in state.items()})
        for rank, name in itertools.product(range(1, len(sums)), state):
            if sums[rank][name] != sums[0][name]:
                raise Failed(f"at PT step {self.step} {name} of rank {rank} is not that of rank 0")

    def _progress(self, step: int) -> float:  # how much of the run after the warm-up is over; 1 in PT alone
        steps, warmup = self.settings.steps, self.settings.warmup
        return max(0.0, (step - warmup) / max(1, steps - warmup)) if self.learn else 1.0

    best = property(lambda self: self.learners[0])

    def state_dict(self) -> dict:
        state = {"learners": [learner.state_dict() for learner in self.learners]}
        return state | {"step": self.step, "seconds": self.seconds, "random": torch.get_rng_state(),
                        "cuda_random": torch.cuda.get_rng_state_all() if on_cuda(self.domain) else []}  # fmt: skip

    def written(self) -> dict:  # what `state_dict` can give, for `as_written`
        finite = lambda value: type(value) is float and math.isfinite(value)
        count = lambda t: isinstance(t, Tensor) and t.dim() == 0 and bool(t >= 0)
        alike = lambda t, other: isinstance(t, Tensor) and (t.dtype, t.shape) == (other.dtype, other.shape)
        permutation = lambda n: lambda t: alike(t, torch.arange(n)) and torch.equal(t.sort()[0], torch.arange(n))
        known = self.state_dict() | {"step": whole(0, self.settings.steps), "seconds": finite, "cuda_random": list}
        for learner, ours in zip(self.learners, known["learners"], strict=True):
            for name in ("network", "meta"):  # a buffer may hold what is not finite, such as a mask
                masks = {key: b for key, b in getattr(learner, name).named_buffers() if not b.isfinite().all()}
                ours[name] |= {key: functools.partial(alike, b) for key, b in masks.items() if key in ours[name]}
            for name in ("optimizer", "meta_optimizer"):
                states, groups = ours[name]["state"], ours[name]["param_groups"]
                ours[name] = {"state": {i: state | {"step": count} for i, state in states.items()},
                              "param_groups": [group | {"lr": finite} for group in groups]}  # fmt: skip
            ours |= dict.fromkeys(("averaged", "skipped", "skipped_in_a_row", "meta_steps", "number"), whole())
            ours |= {"recent": lambda losses: type(losses) is list and all(map(finite, losses)) and len(losses) <= 10,
                     "losses": dict.fromkeys(learner.losses, float),
                     "ft_states": {scope: state | {"step": whole()} for scope, state in ours["ft_states"].items()},
                     "streams": {n: [permutation(stream.n), whole(0, stream.n)]
                                 for n, stream in learner.streams.items()}}  # fmt: skip
        return known

    def load_state_dict(self, state: dict) -> None:  # ValueError, which names the key: no state of such a training
        if isinstance(state["learners"], list):
            del self.learners[len(state["learners"]) or 1 :]
        as_written(state, self.written())
        for learner, saved in zip(self.learners, state["learners"], strict=True):
            learner.load_state_dict(saved)
        self.step, self.seconds = state["step"], state["seconds"]
        with refusing("random", RuntimeError, ValueError):
            torch.set_rng_state(state["random"].cpu())
        if on_cuda(self.domain):
            states, count = [random.cpu() for random in state["cuda_random"]], torch.cuda.device_count()
            torch.cuda.set_rng_state_all(states[:count] if self.domain.ranks.size == 1 else states[:1] * count)


def check_losses(learner: Learner, learn: bool) -> None:  # BadInput where a loss depends on none of θ, φ or ψ
    domain, network = learner.domain, copy.copy(learner.network)
    network.compiled = False  # two examples are not worth it
    few = torch.arange(min(2, *domain.sizes.values()), device=domain.device)
    theta, phi, psi = ({name: p.clone().requires_grad_() for name, p in params.items()}
                       for params in (detached(network), detached(learner.meta), learner.psi))  # fmt: skip
    with torch.random.fork_rng([domain.device] * on_cuda(domain)):  # so that a run's numbers are as without this
        domain.begin_episode(learner.meta)
        pretrain = domain.pretrain_loss(network, learner.meta, few, 0.0, live=False)(theta, phi)
        finetune = domain.finetune_loss(network, learner.head, "finetune", few)(theta, psi)
    for name, loss, symbol, params in (("pretrain_loss", pretrain, "θ", theta), ("pretrain_loss", pretrain, "φ", phi),
                                       ("finetune_loss", finetune, "θ", theta), ("finetune_loss", finetune, "ψ", psi)):  # fmt: skip
        where = f"{type(domain).__name__}.{name}"
        if loss.numel() != 1 and (learn or type(domain).backward is Domain.backward):
            raise BadInput(f"{where} gives a tensor of shape {list(loss.shape)}, not a scalar")
        options = {"allow_unused": True, "retain_graph": True}
        found = torch.autograd.grad(loss.sum(), list(params.values()), **options) if loss.requires_grad else []
        if all(gradient is None for gradient in found):
            raise BadInput(f"{where} does not depend on {symbol}: its modules need metapt.call(module, params, ...)")


def pretrain_afresh(domain: Domain, seed: int, phi: dict | None) -> Network:  # θ of PT with φ frozen
    plain = copy.copy(domain)
    plain.settings = dataclasses.replace(domain.settings, seed=seed, particles="1")
    return Training(plain, learn=False, phi=phi).run().best.network


# ---------------------------------------------------------------------------------------------------------------------
# 5. Fine-tuning that measures an encoder, comparisons


class Finetuned(NamedTuple):  # an encoder after FT, where its validation loss was lowest
    scores: dict[str, float]  # the metric on each test part
    validation_loss: float


def finetune(domain: Domain, network: Network, examples: int, seed: int, held: Tensor | None = None) -> Finetuned:
    """FT (Adam) of a fresh head, and in scope "all" a copy of the encoder, on so many examples; scored at the best
    look. `measure_*` of the settings say how. For a seed, every encoder gets the same examples, head and batches.
    `held` [n]: FT examples that FT does not get; the score is theirs, as "held", in place of the test parts'."""
    torch.manual_seed(seed)
    settings, device, (train, validate) = domain.settings, domain.device, domain.divide(examples)
    chosen = torch.randperm(domain.sizes["finetune"])  # the first of one order: sets by size are nested
    order = torch.randperm(domain.sizes["validation"], generator=torch.Generator().manual_seed(seed))
    head, network, frozen = domain.head(), copy.deepcopy(network).eval(), settings.measure_scope == "head"
    if held is None:
        scored = {part: (part, torch.arange(domain.sizes[part])) for part in domain.tests}
    else:
        scored, chosen = {"held": ("finetune", held)}, chosen[~torch.isin(chosen, held)]
    chosen = chosen[:train]
    sets = {"finetune": ("finetune", chosen), "validation": ("validation", order[:validate].sort()[0]), **scored}
    index, hidden = {name: (part, rows.to(device)) for name, (part, rows) in sets.items()}, {}
    if frozen:  # the encoder stands still, so each example passes it once
        with torch.no_grad():
            for name, (part, rows) in index.items():
                hidden[name] = torch.cat([network(domain.inputs(part, i), features=True) for i in rows.split(2048)])

    def outputs(name, rows):
        part, numbers = index[name]
        return head(hidden[name][rows] if frozen else network(domain.inputs(part, numbers[rows]), features=True))

    @torch.no_grad()
    def measured(name):
        network.eval()
        part, numbers = index[name]
        rows = torch.arange(len(numbers), device=device).split(2048)
        return torch.cat([outputs(name, i) for i in rows]), domain.targets(part, numbers)

    rate = settings.measure_lr or {"head": 1e-2, "all": 1e-3}[settings.measure_scope]
    optimizer = adam([*head.parameters(), *([] if frozen else network.parameters())], rate)
    best, kept = math.inf, dict.fromkeys(scored, math.nan)
    batches = Stream(len(chosen), settings.measure_batch_size, device)
    steps = settings.measure_epochs * -(-len(chosen) // settings.measure_batch_size) or settings.measure_steps
    number = settings.measure_epochs or 25
    looks = {round(look * steps / number) for look in range(1, number + 1)}
    for step in range(1, steps + 1):
        rows = batches.next()
        if not frozen:
            domain.transfer(network)
        loss = domain.loss(outputs("finetune", rows), domain.targets("finetune", index["finetune"][1][rows]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in looks and (value := domain.loss(*measured("validation")).item()) < best:
            best, kept = value, {name: domain.score(*measured(name)) for name in scored}
    return Finetuned(kept, best)


def compare(domain: Domain, methods: dict, examples: Sequence[int], seeds: int, advance, measure=finetune) -> dict:
    """Several encoders (name → function of a seed that gives θ) after the same FT: {(method, number of examples):
    [Finetuned, one for each of the seeds 0, 1, …]}; `advance` is called after each method and seed. Ranks take turns."""
    results = {(method, n): [] for method in methods for n in examples}
    for turn, (seed, (method, network_of)) in enumerate(itertools.product(range(seeds), methods.items())):
        torch.manual_seed(seed)
        network = network_of(seed)
        for n in examples if turn % domain.ranks.size == domain.ranks.rank else ():
            results[method, n].append((seed, measure(domain, network, n, seed)))
        advance()
    all_of = domain.ranks.objects(results)
    return {key: [found for _, found in sorted(itertools.chain(*(each[key] for each in all_of)))] for key in results}


def held_score(domain: Domain, network: Network, examples: int, seed: int) -> float:
    """The metric after FT on FT examples that FT did not get: those that learning φ did not get either, where there are
    enough for that, or else each fifth in turn."""
    n, kept = domain.sizes["finetune"], held_out(domain)
    folds = [torch.arange(n - kept, n)] if kept else torch.arange(n).tensor_split(min(FOLDS, n))
    return float(np.mean([finetune(domain, network, examples, seed, held).scores["held"] for held in folds]))


def finetune_sizes(domain: Domain) -> list[int]:  # those of --sizes, or the domain's
    text, (smallest, largest) = domain.settings.sizes, domain.finetune_limits()
    sizes = sorted({int(n) for n in text.split(",")}) if text else list(domain.finetune_sizes)
    if sizes[0] < smallest or sizes[-1] > largest:
        raise BadInput(f"--sizes is {text!r}, expected between {smallest} and the {largest} FT examples there are")
    return sizes


def comparison_rows(domain: Domain, results: dict) -> list[dict]:  # by test part: for `summary.json`
    return [{"method": method, "ft_examples": n, "metric": metric,
             **mean_and_error([outcome.scores[part] for outcome in outcomes]), "seeds": len(outcomes)}
            for part, metric in domain.tests.items() for (method, n), outcomes in results.items()]  # fmt: skip


def difference_rows(domain: Domain, results: dict, methods: list[str], examples: Sequence[int]) -> list[dict]:
    """Of each method to the first: mean and 95 % interval (Student's t), paired by seed, by test part."""
    from scipy.stats import t

    rows = []
    for (part, metric), n, method in itertools.product(domain.tests.items(), examples, methods[1:]):
        pairs = zip(results[method, n], results[methods[0], n], strict=True)
        gains = [ours.scores[part] - base.scores[part] for ours, base in pairs]
        mean, stderr = mean_and_error(gains).values()
        half = math.nan if mean is None or stderr is None else float(t.ppf(0.975, len(gains) - 1)) * stderr
        rows.append({"method": method, "versus": methods[0], "ft_examples": n, "metric": metric, "mean": mean,
                     "low": finite_or_none((mean or 0) - half), "high": finite_or_none((mean or 0) + half)})  # fmt: skip
    return rows


def mean_and_error(values) -> dict[str, float | None]:  # None where there is none
    values = np.asarray(values, dtype=float)
    stderr = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return {"mean": finite_or_none(values.mean()), "stderr": finite_or_none(stderr)}


def finite_or_none(value) -> float | None:
    return float(value) if math.isfinite(value) else None  # NaN is no JSON


# ---------------------------------------------------------------------------------------------------------------------
# 6. Images: φ, networks, reader, the rotation and noise domains on digits and MNIST, their figures


class RotationMean(nn.Module):
    """φ = the mean, in degrees, of the normal distribution that each image's rotation is drawn from (Raghu et al. 2021,
    section 4.1); the draw is reparameterised, so that dL/dφ goes through the resampling of the images."""

    def __init__(self, degrees: float):
        super().__init__()
        self.rotation_mean_deg = nn.Parameter(torch.tensor(float(degrees)))

    def forward(self, images: Tensor, spread: float) -> Tensor:
        return rotate(images, self.rotation_mean_deg + spread * torch.randn(len(images), device=images.device))


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Images [n, c, h, w] rotated counter-clockwise about their centre by degrees [n]; differentiable in both.
    Bilinear resampling blurs all but multiples of 90°; blurred images pre-train better, so φ would end beside them."""
    angles = degrees * (math.pi / 180)
    cos, sin, zero = angles.cos(), angles.sin(), torch.zeros_like(angles)
    inverse = torch.stack([torch.stack([cos, -sin, zero], -1), torch.stack([sin, cos, zero], -1)], 1)
    grid = F.affine_grid(inverse, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bicubic", align_corners=False)


class ExampleWeights(nn.Module):
    """φ = a network, of images to one score a label, that gives a PT example a weight (Raghu et al. 2021, section 4.1):
    the exponential of how far the score of its label is below the best. What speaks for one label of an image speaks
    against the others, and an image of which nothing is known keeps its weight of 1."""

    def __init__(self, scores: nn.Module):
        super().__init__()
        self.scores = scores

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        scores = self.scores(images)
        return (scores.gather(1, labels[:, None]).squeeze(1) - scores.max(1).values).exp()


class SmallCNN(nn.Sequential):  # for images of 8 x 8 to 28 x 28: [n, 1, h, w] to [n, features]
    def __init__(self, height: int, channels: int, features: int, dropout: float):
        super().__init__()
        reduced = math.ceil(height / 2) if height < 16 else math.ceil(math.ceil(height / 2) / 2)
        self.layers = nn.Sequential(
            # Missing pixels keep PT from learning its examples by heart; once it has, its loss says nothing about φ.
            nn.Dropout(dropout), nn.Conv2d(1, channels, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(channels, 2 * channels, 3, stride=1 if height < 16 else 2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(2 * channels * reduced**2, features), nn.ReLU())  # fmt: skip


class WithLogits(nn.Module):  # an encoder that ends in the logits of PT's classifier, for FT to take it over
    def __init__(self, encoder: nn.Module, features: int, classes: int):
        super().__init__()
        self.encoder, self.classifier = encoder, nn.Linear(features, classes)

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([hidden := self.encoder(images), self.classifier(hidden)], 1)


class Images(Domain):
    """Classification of small images; PT and FT have the same ten classes, parts are stratified and drawn by seed.
    Digits: 1,000 to pre-train, 300 to fine-tune, 250 to validate, the other 247 of scikit-learn's 1,797 scans (8 x 8)
    to test. MNIST: 50,000, 1,000 and 1,000 of the 60,000 training images, and the 10,000 test images (28 x 28)."""

    class Settings(Settings):
        dropout: float = option(0.5, "Share of an image's pixels that PT does not see", check=BELOW_1)

    mnist: ClassVar[bool] = False
    threads = 1  # networks of 8 x 8 images are over before a second thread has begun

    def __init__(self, settings, device, data):
        super().__init__(settings, device, data)
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        if self.mnist:
            layout = {f"{part}_{name}": ("|u1", [n, *size]) for part, n in (("train", 60_000), ("test", 10_000))
                      for name, size in (("images", [28, 28]), ("labels", []))}  # fmt: skip
            arrays = read_prepared(folder := data / "mnist" / "prepared", "metapt images 1",
                                   "python metapt.py download mnist", {"classes": 10}, lambda about: layout)[1]  # fmt: skip
            counts = [np.bincount(arrays[f"{part}_labels"], minlength=10) for part in ("train", "test")]
            if any(len(each) > 10 or each.min() < 100 for each in counts):
                raise BadInput(f"{folder}: the labels are not 100 or more of each digit")
            pixels, labels = arrays["train_images"].numpy(), arrays["train_labels"].numpy()
            test, sizes, self.scale = (arrays["test_images"], arrays["test_labels"]), (50_000, 1000, 1000), 255.0
        else:
            bundle, test = load_digits(), None
            pixels, labels, sizes, self.scale = bundle.images.astype(np.uint8), bundle.target, (1000, 300, 250), 16.0
        parts, rest = {}, np.arange(len(labels))
        for part, size in zip(("pretrain", "finetune", "validation"), sizes, strict=True):
            chosen, rest = train_test_split(rest, train_size=size, stratify=labels[rest], random_state=settings.seed)
            parts[part] = torch.from_numpy(pixels[chosen]), torch.from_numpy(labels[chosen])
        parts["test"] = test or (torch.from_numpy(pixels[rest]), torch.from_numpy(labels[rest]))
        self.pixels = {part: images[:, None].to(device) for part, (images, _) in parts.items()}
        self.labels = {part: labels.long().to(device) for part, (_, labels) in parts.items()}
        self.sizes = {part: len(labels) for part, labels in self.labels.items()}
        self.height, self.classes, self.features = pixels.shape[-1], 10, 64 if self.mnist else 32
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


class DigitsRotation(Images):
    """PT images are rotated by N(φ, 1°), FT images by N(90°, 1°): φ should arrive at 90°. The FT head learns slowly
    (1e-3) beside PT: once it fits the features there are, dL_V/dθ says what its few examples lack and no longer what
    the encoder does, and the hypergradient turns into noise."""

    class Settings(Images.Settings, steps=850, warmup=50, meta_every=4, lr=2e-3, unroll_lr=1e-3, unroll_batch_size=128,
                   meta_batch_size=192, meta_lr=3.0, meta_lr_decay=0.1, average=0.5, solver="cg", terms=3, damping=1.0,
                   measure_steps=300):  # fmt: skip
        init_deg: float = option(30.0, "φ at the start, in degrees")
        target_deg: float = option(90.0, "Mean rotation of the FT images, in degrees", data=True)
        spread_deg: float = option(60.0, "Spread of PT's rotations; it narrows to 1", check=AT_LEAST_1, learning=True)
        narrow: float = option(1.0, "Share of the run over which it does", check=SHARE, learning=True)
        kick_deg: float = option(0.0, "Noise on φ after a meta step at first", check=AT_LEAST_0, learning=True)

    captions: ClassVar = {"rotation_mean_deg": "mean rotation φ (degrees)"}
    presets: ClassVar = {
        # From anywhere on the circle: −90° is a local optimum, as digits look alike upside down.
        "anywhere": {"particles": "6:0.35,3:0.9,1", "kick_deg": 60.0, "init_deg": 0.0, "narrow": 0.5,
                     "meta_lr_decay": 1.0, "steps": 850, "dropout": 0.5},
        "paper": {**PUBLISHED, "meta_lr": 1.0, "dropout": 0.0, "init_deg": 0.0, "spread_deg": 1.0}}  # fmt: skip

    def __init__(self, settings, device, data):
        super().__init__(settings, device, data)
        for part in ("finetune", "validation", "test"):
            degrees = torch.from_numpy(self.random.normal(settings.target_deg, 1, self.sizes[part])).float().to(device)
            self.pixels[part] = rotate(self.pixels[part].float(), degrees)  # once and for all: FT data are data

    def meta(self):
        return RotationMean(self.settings.init_deg).to(self.device)

    def pretrain_loss(self, network, meta, index, progress, live):
        images, labels = self.inputs("pretrain", index), self.targets("pretrain", index)
        # A wide spread early averages the loss over angles, which flattens its lesser optima.
        spread = self.settings.spread_deg ** max(0.0, 1 - progress / self.settings.narrow)

        def loss(theta, phi):
            rotated = call(meta, phi, images, spread, train=True)
            return F.cross_entropy(call(network, theta, rotated, train=True, live=live), labels)

        return loss

    def explore(self, meta, progress):
        fading = max(0.0, 1 - progress / self.settings.plan[0][1])
        meta.rotation_mean_deg.data += self.settings.kick_deg * fading**2 * torch.randn(()).item()

    def measure(self, meta):
        return {"rotation_mean_deg": (meta.rotation_mean_deg.item() + 180) % 360 - 180}

    def decorate(self, axis):
        for line in axis.lines:  # no line, which would cross the circle's seam
            line.set(linestyle="", marker=".", markersize=3)
        axis.axhline(self.settings.target_deg, color="C3", lw=0.8, ls="--", label="rotation of the FT images")
        axis.set(ylim=(-180, 180), yticks=[-180, -90, 0, 90, 180])


class DigitsNoise(Images):
    """A share of the PT labels is wrong, none of FT's; φ weighs PT examples: L_PT is the mean of w_i(φ) CE_i, not
    divided by the sum of the weights. The FT head begins as PT's own classifier and hardly moves (1e-6). With a head of
    its own, which follows whatever the features do, FT is as well off when PT takes one class for another: the
    hypergradient then lets φ exchange classes and drop them."""

    class Settings(Images.Settings, steps=2600, warmup=200, meta_every=6, batch_size=128, unroll_lr=1e-6,
                   unroll_batch_size=300, validate_on="all", meta_batch_size=1000, meta_lr=1.5e-2, meta_lr_decay=0.1,
                   average=0.15, solver="cg", terms=5, damping=0.1):  # fmt: skip
        phi_dropout: float = option(0.3, "Share of pixels that learning φ does not see", check=BELOW_1, learning=True)
        noise: float = option(0.5, "Share of the PT examples with a wrong label", check=BELOW_1, data=True)

    captions: ClassVar = {"clean_to_noisy_weight_ratio": "weight of clean / of noisy examples"}
    presets: ClassVar = {"paper": {**PUBLISHED, "dropout": 0.0, "phi_dropout": 0.0}}

    def __init__(self, settings, device, data):
        super().__init__(settings, device, data)
        labels = self.labels["pretrain"].cpu().numpy()
        self.noisy = torch.zeros(len(labels), dtype=torch.bool)  # for reports alone: no loss reads it
        wrong = self.random.permutation(len(labels))[: round(settings.noise * len(labels))]
        self.noisy[wrong] = True
        labels[wrong] = (labels[wrong] + self.random.integers(1, self.classes, len(wrong))) % self.classes
        self.labels["pretrain"] = torch.from_numpy(labels).to(device)

    def network(self):
        return Network(WithLogits(self.encoder(), self.features, self.classes), nn.Identity()).to(self.device)

    def head(self):
        head = nn.Linear(self.features + self.classes, self.classes)
        nn.init.zeros_(head.bias)
        head.weight.data = torch.eye(*head.weight.shape).roll(self.features, 1)  # it passes PT's logits on
        return head.to(self.device)

    def meta(self):
        scores = nn.Sequential(SmallCNN(self.height, 16, 64, self.settings.phi_dropout), nn.Linear(64, self.classes))
        return ExampleWeights(scores).to(self.device)

    def pretrain_loss(self, network, meta, index, progress, live):
        images, labels = self.inputs("pretrain", index), self.targets("pretrain", index)

        def loss(theta, phi):
            weights = self.weigh(meta, phi, index, live)
            logits = call(network, theta, images, train=True, live=live)[:, self.features :]
            return (weights * F.cross_entropy(logits, labels, reduction="none")).mean()

        return loss

    def weigh(self, meta, phi, index, live):  # weights of PT examples; pixels are dropped only while φ is learned
        return call(meta, phi, self.inputs("pretrain", index), self.targets("pretrain", index), train=not live)

    @torch.no_grad()
    def weights(self, meta, most: int | None = None) -> Tensor:  # of the first `most` PT examples, on the CPU
        batches = torch.arange(self.sizes["pretrain"], device=self.device)[:most].split(4096)
        meta.eval()
        return torch.cat([meta(self.inputs("pretrain", i), self.targets("pretrain", i)) for i in batches]).cpu()

    def facts(self, meta, most=None):
        weights = self.weights(meta, most)
        noisy = self.noisy[: len(weights)]
        clean, wrong = (weights[of].mean().item() if of.any() else None for of in (~noisy, noisy))
        return {"mean_weight_clean": clean, "mean_weight_noisy": wrong,
                "clean_to_noisy_weight_ratio": clean / wrong if clean is not None and wrong else None}  # fmt: skip

    def measure(self, meta):
        return {name: self.facts(meta, 2000)[name] for name in self.captions}

    def table(self, meta):
        rows = zip(range(len(self.noisy)), self.labels["pretrain"].tolist(), self.weights(meta).tolist(), strict=True)
        return ["example", "label", "weight"], list(rows)

    def figures(self, meta):
        weights, noisy = self.weights(meta).numpy(), self.noisy.numpy()

        def draw(figure):
            axis = figure.subplots()
            bins = np.logspace(min(-3.0, math.floor(math.log10(max(weights.min(), 1e-12)))), 0, 40)
            axis.hist(weights[~noisy], bins, alpha=0.7, color="C0", label="right label")
            axis.hist(weights[noisy], bins, alpha=0.7, color="C3", label="wrong label")
            axis.set(xscale="log", xlabel="weight that φ gives", ylabel="PT examples")
            axis.legend()

        return {"weights.png": draw}

    def decorate(self, axis):
        axis.set_yscale("log")


class MNISTRotation(DigitsRotation):
    mnist, threads = True, None

    class Settings(DigitsRotation.Settings, steps=400, dropout=0.2, meta_lr_decay=1.0): ...


class MNISTNoise(DigitsNoise):
    mnist, threads = True, None

    class Settings(DigitsNoise.Settings, meta_lr=1e-3, meta_every=24): ...  # at 1e-2 the scores die on larger images


# ---------------------------------------------------------------------------------------------------------------------
# 7. Run folders and checkpoints

import io
import os
import pickle
import secrets
import shutil

try:
    import fcntl
except ImportError:  # on Windows nothing keeps two processes from one run
    fcntl = None

FORMAT = "metapt 4"
LOCK = ".metapt.lock"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def writing(path: Path, needed: int):  # Failed where the disk is full or a limit is reached; any error has the path
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise OSError(error.errno, error.strerror, str(path)) from None
        sizes = f"{needed:,} bytes are needed, {shutil.disk_usage(path.parent).free:,} are free"
        raise Failed(f"{path}: {error.strerror}: {sizes}") from None


def save_whole(path: Path, content: bytes, keep: Path | None = None) -> None:
    """Writes a file under a name that nobody else has, flushes it to the disk, and only then gives it its name; what
    had the name before is kept as `keep`, and has the name until then. Of several ranks the first alone writes. Failed:
    the disk is full."""
    if Ranks().rank:
        return
    new = path.with_name(f".metapt-{path.name}-{secrets.token_hex(8)}")
    before = Path(f"{new}-before")
    with writing(path, len(content)), new.open("xb") as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            if path.exists():
                shutil.copymode(path, new)
            if path.exists() and keep:
                try:
                    os.link(path, before)
                except OSError:  # a file system without links
                    shutil.copyfile(path, before)
            os.replace(new, path)
            if before.exists():
                os.replace(before, keep)
        except BaseException:
            new.unlink(missing_ok=True)
            before.unlink(missing_ok=True)
            raise
    with contextlib.suppress(OSError), contextlib.ExitStack() as opened:  # the names too; not every system can
        opened.callback(os.close, folder := os.open(path.parent, os.O_RDONLY))
        os.fsync(folder)


def save_json(path: Path, content) -> None:
    save_whole(path, (json.dumps(content, indent=2) + "\n").encode())


def run_around(path: Path) -> Path | None:  # the run that a path lies in, through links too
    for folder in path.resolve().parents:
        with contextlib.suppress(OSError):
            config = folder / "config.json"
            if config.is_file() and re.search(rb'"format":\s*"metapt ', config.read_bytes()):
                return folder
            if all((folder / name).exists() for name in ("checkpoint.pt", "metrics.jsonl")):  # its config.json is lost
                return folder
    return None


class Run:  # a folder: config.json, metrics.jsonl, checkpoint.pt, summary.json, figures, and phi.csv where φ has names
    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise BadInput(f"{folder} is no folder of a run")
        self.folder, self.metrics, self.started = folder, folder / "metrics.jsonl", folder / "config.json"
        self.saved, self.earlier = folder / "checkpoint.pt", folder / "checkpoint.previous.pt"
        # Of config.json as it is when the run is begun, or gone on with.
        self.digest = hashlib.sha256(self.started.read_bytes()).hexdigest() if self.started.is_file() else ""

    @classmethod
    def create(cls, folder: Path | None, config: dict, held: contextlib.ExitStack) -> "Run":
        """A new one, by default numbered, under runs/; `held` keeps it from other processes."""
        name = f"{config['command']}-{config['domain'].rpartition('/')[2].replace('.py:', '-')}"
        numbered = (Path("runs") / f"{name}{n}" for n in ("", *(f"-{n}" for n in range(2, 10_000))))
        for path in [folder] if folder else numbered:
            try:
                path.mkdir(parents=True, exist_ok=path == folder)
                break
            except OSError as error:
                if folder or not path.exists():  # else the number is taken, perhaps since a moment ago
                    raise BadInput(f"{path} cannot be made: {error.strerror}") from None
        run, folder = cls(path), path
        for locked in (False, True):  # nothing of the user's is touched; what another process began meanwhile is seen
            begun = list(folder.glob(".metapt-config.json-*"))  # of a run that was killed before it had one
            if any(path.name != LOCK and path not in begun for path in folder.iterdir()):
                raise BadInput(f"{folder} is not empty: name another --out, or go on with --resume {folder}")
            if not locked:
                run.lock(held)
        for path in begun:
            path.unlink()
        save_json(run.started, {"format": FORMAT, **config})
        return run

    def lock(self, held: contextlib.ExitStack) -> None:
        """Keeps other processes from the run until `held` is closed or the process is killed. BadInput: one has it."""
        path, flags = self.folder / LOCK, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        file = held.enter_context(os.fdopen(os.open(path, flags, 0o644), "rb", 0))
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.fstat(file.fileno()).st_nlink:  # removed since it was opened: it keeps nobody out
                raise BlockingIOError
        except BlockingIOError:
            holder = file.read(99).decode(errors="replace")
            raise BadInput(f"{self.folder} is in use by {holder or 'another process'}") from None
        except OSError:
            pass  # a file system without locks
        held.callback(path.unlink, missing_ok=True)
        with contextlib.suppress(OSError):  # on a full disk it is held all the same
            path.write_text(f"process {os.getpid()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")

    def config(self) -> dict:  # what the run was started with: command, domain, device, phi (a run or None), settings
        known = {"format": FORMAT, "command": lambda name: name in ("pretrain", "meta"), "settings": dict,
                 "domain": lambda name: type(name) is str and name.isprintable(), "domain_sha256": str | None,
                 "phi": str | None, "torch": str, "data": str,
                 "device": lambda name: type(name) is str and re.fullmatch(r"cpu|cuda(:\d+)?", name)}  # fmt: skip
        advice = "" if self.started.exists() else " (if it never was, the command that began the run does it anew)"
        with refusing(f"{self.started} is not what this metapt writes{advice}"):
            return as_written(json.loads(self.started.read_text()), known)

    def save(self, training: Training) -> None:  # a checkpoint, with the SHA-256 of all before at its end
        with refusing(f"no checkpoint at PT step {training.step}; a lower --lr may help", ValueError, Failed):
            state = as_written(training.state_dict(), training.written())
        with writing(self.metrics, 0), self.metrics.open("ab") as file:
            os.fsync(file.fileno())  # all the bytes of it that the checkpoint counts
            content = {"format": FORMAT, "config": self.digest, "ranks": training.domain.ranks.size, **state,
                       "phi": training.best.learned().state_dict(), "metrics_bytes": file.tell()}  # fmt: skip
        torch.save(content, buffer := io.BytesIO())  # of a disk that is full it would say 58 lines
        buffer.write(hashlib.sha256(buffer.getbuffer()).hexdigest().encode())
        save_whole(self.saved, buffer.getbuffer(), keep=self.earlier)

    def had_checkpoint(self) -> bool:  # else it was killed before the first, and there is nothing to go on from
        later = any(path not in (self.started, self.metrics, self.folder / LOCK) for path in self.folder.iterdir())
        return later or (self.metrics.exists() and len({row["step"] for row in self.history()}) > CHECKPOINT_EVERY)

    def checkpoint(self) -> dict:
        """The last one, on the CPU, without running any code that it may hold. BadInput: it is missing or damaged (then
        the one before is named, where that is whole), or config.json has changed since."""
        read = lambda path: path.read_bytes() if path.exists() else b""
        sealed = lambda it: it[-64:] == hashlib.sha256(memoryview(it)[:-64]).hexdigest().encode()
        if not sealed(content := read(self.saved)):
            advice = f"rename {self.earlier.name} to {self.saved.name}, and --resume {self.folder} goes on from there"
            if not sealed(read(self.earlier)):
                advice = f"so is {self.earlier.name}" if self.earlier.exists() else "there is none before it"
            raise BadInput(f"{self.saved} is missing or damaged, its SHA-256 is not the one at its end: {advice}")
        known = dict.fromkeys(("phi", "learners", "seconds", "random", "cuda_random"), lambda value: True)
        known |= {"format": FORMAT, "config": str, "metrics_bytes": whole(), "step": whole(), "ranks": whole(1)}
        with refusing(f"{self.saved} is not what this metapt writes", (ValueError, TypeError, pickle.UnpicklingError)):
            content = {"ranks": 1, **torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)}
            as_written(content, known)
        if content["config"] != self.digest:
            raise BadInput(f"{self.started} has changed since {self.saved} was made")
        return content

    def restore(self, training: Training, content: dict | None) -> bool:
        """To a checkpoint, later metrics being cut off; whether all metrics up to it are there."""
        until = content["metrics_bytes"] if content else 0
        kept = found = self.metrics.read_bytes()[:until] if self.metrics.exists() else b""
        kept = kept[: kept.rfind(b"\n") + 1]  # whole lines
        self.history(kept)
        if content:
            with refusing(f"{self.saved} does not fit its config.json", ValueError):
                training.load_state_dict({name: content[name] for name in training.written()})
        if self.metrics.exists() and not training.domain.ranks.rank:
            os.truncate(self.metrics, len(kept))
        return len(found) == until

    def history(self, content: bytes | None = None) -> list[dict]:  # the rows of metrics.jsonl, whole lines
        if content is None:
            content = self.metrics.read_bytes() if self.metrics.exists() else b""
        rows = []
        for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), 1):
            with refusing(f"{self.metrics}: line {number} is no row of metrics", (*UNREADABLE, TypeError)):
                rows.append(dict(json.loads(line)))
                known = dict.fromkeys(rows[-1], int | float | bool | None) | {"step": whole(), "particle": whole()}
                as_written(rows[-1], known)
        return rows


# ---------------------------------------------------------------------------------------------------------------------
# 8. Reports: tables, progress, figures

import csv

import rich.progress  # and with it rich.box, rich.console, rich.table

METHODS = {"no_pretraining": "no pre-training", "default_phi": "pre-training, default φ",
           "learned_phi": "pre-training, learned φ", "online": "θ of the meta run itself"}  # fmt: skip


def show_table(console, title: str, columns: list[str], rows: list[list[str]]) -> None:
    shown = [rich.table.Column(name, justify="right" if i else "left") for i, name in enumerate(columns)]
    table = rich.table.Table(*shown, title=title, title_justify="left", title_style="bold", box=rich.box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def show_comparison(console, rows: list[dict]) -> None:  # a table for each metric, a column for each FT-set size
    for metric in dict.fromkeys(row["metric"] for row in rows):
        cells, versus = {}, rows[0].get("versus")
        for row in (row for row in rows if row["metric"] == metric):
            half = row["stderr"] if not versus else None if row["high"] is None else row["high"] - row["mean"]
            both = " ± ".join("–" if value is None else f"{100 * value:.1f}" for value in (row["mean"], half))
            cells.setdefault(METHODS.get(row["method"], row["method"]), []).append(both)
        title = (f"Difference to {METHODS.get(versus, versus)}: {metric} (points, 95 % interval)" if versus
                 else f"Test {metric} after fine-tuning (%, ± s.e., seeds: {rows[0]['seeds']})")  # fmt: skip
        columns = ["FT examples:", *dict.fromkeys(str(row["ft_examples"]) for row in rows)]
        show_table(console, title, columns, [[name, *values] for name, values in cells.items()])


@contextlib.contextmanager
def progress_bar(console, label: str, total: int):
    """A bar with rate and time left. It yields a function of (steps done or None for one more, what to show beside)."""
    columns = (rich.progress.TextColumn("{task.description}"), rich.progress.BarColumn(bar_width=16),
               rich.progress.MofNCompleteColumn(), rich.progress.TextColumn("{task.fields[rate]}"),
               rich.progress.TimeRemainingColumn(), rich.progress.TextColumn("{task.fields[status]}"))  # fmt: skip
    with rich.progress.Progress(*columns, console=console) as bars:
        task = bars.add_task(label, total=total, status="", rate="")

        def advance(done: int | None = None, status: str = "") -> None:
            rate = f"{speed:.3g}/s" if (speed := bars.tasks[task].speed) else ""
            bars.update(task, completed=done, advance=1 if done is None else None, status=status, rate=rate)

        yield advance


def save_figure(path: Path, draw) -> None:  # what `draw` makes of an empty figure of half a page's width
    import matplotlib
    from matplotlib.figure import Figure

    style = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
             "lines.linewidth": 1.2, "savefig.dpi": 200}  # fmt: skip
    with matplotlib.rc_context(style), warnings.catch_warnings(action="ignore"):  # of numbers off every scale
        figure = Figure(figsize=(3.5, 2.5), layout="constrained")
        draw(figure)
        figure.savefig(buffer := io.BytesIO(), format=path.suffix[1:])
        save_whole(path, buffer.getvalue())


def run_figures(domain: Domain, learner: Learner, history: list[dict]) -> dict:  # file name → function that draws
    figures = {"losses.png": lambda figure: draw_losses(figure, history, learner.number)}
    followed = next(iter(domain.measure(learner.meta)), None)
    if learner.meta_steps and any(row.get(followed) is not None for row in history):
        figures["phi.png"] = lambda figure: draw_phi(figure, history, learner.number, domain, followed)
    return figures | (domain.figures(learner.learned()) or {})


def draw_phi(figure, history: list[dict], survivor: int, domain: Domain, name: str) -> None:  # others in grey
    axis = figure.subplots()
    others = sorted({row["particle"] for row in history} - {survivor})
    for particle in [*others, survivor]:
        rows = [row for row in history if row["particle"] == particle and row.get(name) is not None]
        color, label = ("C0", "learned φ") if particle == survivor else ("0.8", "other particles")
        label = label if particle in (survivor, *others[:1]) else None
        axis.plot([row["step"] for row in rows], [row[name] for row in rows], color=color, label=label)
    axis.set(xlabel="PT steps", ylabel=domain.captions.get(name, name))
    domain.decorate(axis)
    axis.legend(loc="best", fontsize=7)


def draw_losses(figure, history: list[dict], survivor: int) -> None:
    axis, rows = figure.subplots(), [row for row in history if row["particle"] == survivor]
    for name, label in (("pretrain_loss", "PT"), ("finetune_loss", "FT"), ("validation_loss", "validation")):
        if points := [(row["step"], row[name]) for row in rows if row.get(name) is not None]:
            axis.plot(*zip(*points, strict=True), label=label, alpha=0.9)
    axis.set(xlabel="PT steps", ylabel="loss (nats)", yscale="log")
    if axis.lines:
        axis.legend()


def draw_comparison(figure, rows: list[dict]) -> None:  # the headline metric by FT-set size
    metric = rows[0]["metric"]
    rows = [row for row in rows if row["metric"] == metric and row["mean"] is not None]
    sizes, methods = sorted({row["ft_examples"] for row in rows}), list(dict.fromkeys(row["method"] for row in rows))
    axis = figure.subplots()
    for i, method in enumerate(methods):
        points = sorted((r["ft_examples"], r["mean"], r["stderr"] or 0) for r in rows if r["method"] == method)
        x, mean, stderr = np.array(points).T
        x = x * (1 + 0.01 * i * (len(sizes) == 1))  # side by side where there is one size
        axis.errorbar(x, 100 * mean, 100 * stderr, fmt="o-", ms=3, capsize=2, label=METHODS.get(method, method))
    axis.set(xscale="log", xlabel="FT examples", ylabel=f"test {metric} (%), mean ± s.e.")
    axis.set_xticks(sizes, [str(n) for n in sizes])
    axis.minorticks_off()
    figure.legend(loc="outside upper center", ncols=2, fontsize=7)


# ---------------------------------------------------------------------------------------------------------------------
# 9. Commands, and how a domain is found

import atexit
import importlib.util
import signal
import subprocess
import sys
import threading
import traceback
from datetime import timedelta
from types import SimpleNamespace

import typer

HERE = Path(__file__).resolve().parent
sys.modules.setdefault("metapt", sys.modules[__name__])  # `import metapt` finds this module, also where it is a script

DOMAINS = {  # a class, or file:class in bench/domains; the first is what there is without a name
    "digits-rotation": DigitsRotation, "digits-noise": DigitsNoise, "mnist-rotation": MNISTRotation,
    "mnist-noise": MNISTNoise, "digits-affine": "affine.py:DigitsAffine", "ppi": "ppi.py:PPI",
    "ecg": "ecg.py:ECG"}  # fmt: skip
SCRIPTS = {"mnist": "mnist.py", "ecg": "ptbxl.py", "ppi": "hu_graphs.py",
           "ppi published": "hu_graphs.py", "ppi string-yeast": "string_graphs.py"}  # fmt: skip

Option, NEEDED = functools.partial(typer.Option, rich_help_panel=RUN), inspect.Parameter.empty
OPTIONS = {  # name: type, how --help shows it, default
    "domain": (str | None, typer.Argument(help=f"{', '.join(DOMAINS)}, or a file of yours: my_domain.py"), None),
    "run": (Path, typer.Argument(help="A run: its folder"), NEEDED),
    "runs": (list[Path], typer.Argument(help="Runs of one domain; the others are compared to the first"), NEEDED),
    "preset": (str, Option(help="Settings to begin with", show_default=False), "default"),
    "phi": (Path | None, Option(help="Use the φ that this run learned, frozen"), None),
    "use": (str, Option(help="Of --phi: learned; or chosen, the default φ where the run chose it"), "chosen"),
    "of": (str | None, Option("--domain", help="A run's own, where its file has changed"), None),
    "export": (Path | None, Option(help="Also write the encoder's state_dict to this new file"), None),
    "force": (bool, Option("--force", help="That file may be there already: replace it"), False),
    "resume": (Path | None, Option(help="Go on with this run, from its last checkpoint"), None),
    "device": (str, Option(help="auto, cpu, cuda or cuda:N", show_default=False), "auto"),
    "data": (Path, Option(help="Where prepared data lie", show_default=False), Path("data")),
    "out": (Path | None, Option(help="The run's new folder; else one under runs/"), None),
    "json": (bool, Option("--json", help="Print the summary as JSON and nothing else"), False)}  # fmt: skip
COMMANDS = {  # name: what --help says of it, the options that it has beside those of all and settings
    "pretrain": ("Pre-train with φ fixed: the baseline, or (--phi) at what a run learned.", "domain preset phi use resume"),
    "meta": ("Learn φ while pre-training (Algorithm 1), then compare what it is worth.", "domain preset resume"),
    "finetune": ("Fine-tune a run's encoder, by seed and FT-set size, beside one without PT.", "run of export force"),
    "eval": ("Test metrics of runs, paired by seed, with differences and 95 % intervals.", "runs of")}  # fmt: skip


def find_domain(name: str, sha256: str | None = None) -> type[Domain]:
    """A built-in domain, or the one that a file defines: `my_domain.py`, or `my_domain.py:Class` where it has several.
    BadInput: there is no such domain, it lacks what every domain needs, or its file does not hash to `sha256`."""
    if isinstance(DOMAINS.get(name), type):
        return DOMAINS[name]
    if not (match := re.fullmatch(r"(.+\.py)(?::(\w+))?", DOMAINS.get(name, name))):
        raise BadInput(f"{name!r} is no domain; there are {', '.join(DOMAINS)}, or a file of yours as my_domain.py")
    path = (HERE / "bench" / "domains" / match[1] if name in DOMAINS else Path(match[1])).resolve()
    if not path.is_file():
        shipped = f"; copy bench/domains/{path.name} of metapt's repository there" if name in DOMAINS else ""
        raise BadInput(f"{path}, which defines the domain {name}, is missing{shipped}")
    if run := run_around(path):
        raise BadInput(f"{path} lies in the run {run}: a run never supplies code, move it elsewhere")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if sha256 not in (None, found):
        raise BadInput(f"{path} has changed since the run was made: name it again to go on with it as it is now")
    module = load_module(path, found)
    kinds = {k: v for k, v in vars(module).items() if isinstance(v, type) and issubclass(v, Domain)}
    own = [k for k, v in kinds.items() if v.__module__ == module.__name__]
    wanted = match[2] or (own[0] if len(own) == 1 else None)
    if wanted not in kinds:
        choice = f"it defines {', '.join(own)}: name one, as {path.name}:{own[0]}" if own else "it defines none"
        raise BadInput(f"{path} has no domain {wanted or 'that is its only one'} (a metapt.Domain); {choice}")
    if missing := sorted(kinds[wanted].__abstractmethods__):
        raise BadInput(f"{path}: {wanted} lacks {', '.join(missing)}, which every domain needs")
    return kinds[wanted]


@functools.cache
def load_module(path: Path, sha256: str):  # once for each content of a file
    name = hashlib.sha256(f"{path} {sha256}".encode()).hexdigest()[:12]
    spec = importlib.util.spec_from_file_location(f"metapt_domain_{path.stem}_{name}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # noqa: BLE001 (whatever a user's file raises)
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise BadInput(f"{path}, line {lines[-1] if lines else getattr(error, 'lineno', '?')}: {reason}") from None
    return module


def identity(kind: type[Domain]) -> dict:  # its name or file:class, and the file's checksum, for config.json
    file = Path(inspect.getfile(kind)).resolve()
    shipped = f"{file.name}:{kind.__name__}" if file.parent == HERE / "bench" / "domains" else kind
    name = next((name for name, where in DOMAINS.items() if where == shipped), f"{file}:{kind.__name__}")
    sha256 = None if DOMAINS.get(name) is kind else hashlib.sha256(file.read_bytes()).hexdigest()
    return {"domain": name, "domain_sha256": sha256}


def domain_of(run: Run, named: str | None, console=None) -> type[Domain]:
    """The domain of a run. A file that has changed since is used only where it is named again, and that is said."""
    config = run.config()
    with refusing(f"{run.started}: domain", () if named else BadInput):
        kind = find_domain(named or config["domain"], None if named else config["domain_sha256"])
    if (ours := identity(kind))["domain"] != config["domain"]:
        raise BadInput(f"{run.folder} is of the domain {config['domain']}, not {named}")
    if console and ours != {name: config[name] for name in ours}:
        console.print(f"{config['domain']} has changed since {run.folder} was made; going on with it as it is now")
    return kind


def settings_of(kind: type[Domain], given: dict, preset: str = "default") -> Settings:
    """A domain's settings: defaults, its preset, and what was given. BadInput where they do not belong together."""
    presets = {"default": {}, **kind.presets}
    if preset not in presets:
        raise BadInput(f"--preset is {preset!r}; {kind.__name__} has {', '.join(presets)}")
    settings = kind.Settings(**presets[preset])
    if "steps" in given:  # the warm-up of a shorter run is the same share of it
        given = {"warmup": min(settings.warmup, settings.warmup * given["steps"] // settings.steps), **given}
    settings = dataclasses.replace(settings, **given)
    idle = {"terms": settings.solver == "identity" and "--solver identity",
            "alpha": settings.solver != "neumann" and f"--solver {settings.solver}",
            "hvp_step": "finite" not in (settings.hvp, settings.unroll_hvp) and "--hvp exact",
            "measure_steps": settings.measure_epochs > 0 and "--measure-epochs"}  # fmt: skip
    if wasted := [name for name in given if idle.get(name)]:
        raise BadInput(f"{flag(wasted[0])} has no effect with {idle[wasted[0]]}")
    return settings


def pick_device(name: str) -> torch.device:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise BadInput(f"--device is {name!r}, expected auto, cpu, cuda or cuda:N")
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BadInput(f"--device {name}: there is no such GPU here")
    crowded = device.index is not None or int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > torch.cuda.device_count()
    if device.type == "cuda" and Ranks().size > 1 and crowded:
        raise BadInput(f"--device {name}: each rank needs a GPU of its own, and takes it by itself")
    return device


def make_command(command: str, kind: type[Domain] | None = None):
    """A command with its options, and one for each setting that it takes: those of a domain (`pretrain` but those for
    learning φ), or those for measuring. `ask.given` has the settings that were given."""
    what, names = COMMANDS[command]
    options = {name: OPTIONS[name] for name in f"{names} device data out json".split()}
    if kind is None:
        fields = [f for f in dataclasses.fields(Settings) if f.metadata["panel"] == MEASURING]
    else:
        fields = [f for f in dataclasses.fields(kind.Settings) if command == "meta" or not f.metadata.get("learning")]
        fields.sort(key=lambda f: PANELS.index(f.metadata.get("panel", OWN)))
        what += (f" Options of {identity(kind)['domain']}, with their defaults; name another domain to see its own. "
                 f"Presets: {', '.join(['default', *kind.presets])}.")  # fmt: skip
    for f in fields:
        names = f"{flag(f.name)}/{flag(f'no_{f.name}')}" if f.default is True else flag(f.name)
        default = f.default if kind else {"compare": 5}.get(f.name, "the run's")
        words = f"{f.metadata.get('help', '')} \\[{'none' if default in (None, '') else default}]"
        shown = typer.Option(names, help=words, rich_help_panel=f.metadata.get("panel", OWN))
        options[f.name] = f.type | None, shown, None

    def run_command(**values):
        given = {f.name: value for f in fields if (value := values.pop(f.name)) is not None}
        ask = SimpleNamespace(**{"phi": None, "use": "chosen", "export": None} | values, given=given)
        ask.console, ask.begun = rich.console.Console(stderr=ask.json, quiet=Ranks().rank > 0), time.perf_counter()
        with contextlib.ExitStack() as ask.held:  # the lock on the run that the command makes or goes on with
            return train(command, kind, ask) if kind else measure_runs(command, ask)

    run_command.__doc__ = what
    run_command.__signature__ = inspect.Signature([
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[hint, info], default=default)
        for name, (hint, info, default) in options.items()])  # fmt: skip
    return run_command


def download(context: typer.Context, data_set: Annotated[str, typer.Argument(help=", ".join(SCRIPTS))],
             source: Annotated[str | None, typer.Option(help="Which, where there are several")] = None):  # fmt: skip
    """Fetch a data set and prepare it, by its script in data_scripts/ (its own options: `download DATA -- --help`)."""
    name = data_set if source is None else f"{data_set} {source}"
    if name not in SCRIPTS:
        raise BadInput(f"{name!r} cannot be downloaded; there is {', '.join(SCRIPTS)} (the second word by --source)")
    if not (script := HERE / "data_scripts" / SCRIPTS[name]).exists():
        raise BadInput(f"{script} is missing: copy the folder data_scripts of metapt's repository there")
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # the script answers, once it has let Ctrl-C through
    status = Ranks().first(lambda: subprocess.run([sys.executable, str(script), *context.args], check=False).returncode)
    with contextlib.suppress(KeyboardInterrupt):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    return status


def train(command: str, kind: type[Domain], ask) -> None:  # `pretrain` and `meta`
    if ask.domain and find_domain(ask.domain) is not kind:
        raise BadInput(f"name the domain first: metapt.py {command} {ask.domain} ...")
    (run, training), console, learn = begin(command, kind, ask), ask.console, command == "meta"
    domain, settings, sizes = training.domain, training.settings, finetune_sizes(training.domain)
    torch.set_num_threads(domain.threads or torch.get_num_threads())
    warnings.filterwarnings("ignore", "‖Hq − v‖")  # metrics.jsonl has each residual
    follow(training, run, console)

    learner, learned = training.best, training.best.learned()
    measured, facts, table = domain.measure(learned), domain.facts(learned) or {}, domain.table(learned)
    values = {name: p.item() if p.numel() == 1 else
              {"shape": list(p.shape), "mean": p.mean().item(), "min": p.min().item(), "max": p.max().item()}
              for name, p in detached(learned).items()}  # fmt: skip
    summary = {"training_seconds": training.seconds, "pt_steps": training.step, "meta_steps": learner.meta_steps,
               "skipped_meta_steps": learner.skipped, "validation_loss": validation_loss(domain, learner),
               "chosen": None, "phi": {name: measured.get(name, value) for name, value in values.items()},
               **facts}  # fmt: skip
    lines = [f"{name.replace('_', ' ')}: {v:.4g}" for name, v in (measured | facts).items() if v is not None]
    if table:
        summary["phi_table"] = "phi.csv"
        csv.writer(file := io.StringIO(newline="")).writerows([table[0], *table[1]])
        save_whole(run.folder / "phi.csv", file.getvalue().encode())
        lines.append(f"φ by name: {run.folder / 'phi.csv'} ({', '.join(table[0])})")
    if learner.skipped:
        lines.append(f"{learner.skipped} meta steps were skipped: their hypergradient was not finite")

    methods = {"no_pretraining": lambda _: domain.network()}
    if learn:
        methods["default_phi"] = lambda seed: pretrain_afresh(domain, seed, None)
        methods["learned_phi"] = lambda seed: pretrain_afresh(domain, seed, learned.state_dict())
        labels = domain.finetune_limits()[1] - held_out(domain)
        lines += [f"(φ was learned with {labels} examples' FT labels)"] * (settings.compare > 0)
    methods["online" if learn else "learned_phi" if run.config()["phi"] else "default_phi"] = lambda _: learner.network
    if settings.compare:
        methods = {name: functools.cache(network_of) for name, network_of in methods.items()}
        with progress_bar(console, "comparing", settings.compare * (len(methods) + learn * (len(methods) - 1))) as bar:
            results = compare(domain, methods, sizes, settings.compare, bar)
            found, line = choose(domain, methods, domain.finetune_limits()[1], bar) if learn else ({}, None)
        summary |= {"comparison": comparison_rows(domain, results), **found}
        lines += [line] if line else []
    conclude(command, domain, run, summary, ask, lines, run_figures(domain, learner, run.history()))


def choose(domain: Domain, methods: dict, examples: int, advance) -> tuple[dict, str]:
    """Default φ, learned φ or the meta run's θ, by `held_score`: for the summary, and in a sentence."""
    methods = {method: methods[method] for method in ("default_phi", "learned_phi", "online")}
    found = compare(domain, methods, [examples], domain.settings.compare, advance, held_score)
    held = {method: scores for (method, _), scores in found.items()}
    gains = {method: mean_and_error(np.subtract(scores, held["default_phi"])) for method, scores in held.items()}
    gain = lambda method: -math.inf if gains[method]["mean"] is None else gains[method]["mean"]
    chosen, best = max(gains, key=gain), max(("learned_phi", "online"), key=gain)  # of equals the first, the default
    mean, error = gains[best].values()
    points = "an unknown number of" if mean is None else f"{100 * mean:+.1f}"
    points += "" if error is None else f" ± {100 * error:.1f}"
    name = {"learned_phi": "the learned φ", "online": "the θ of this run"}[best]
    labels = "FT labels that neither φ nor FT had" if held_out(domain) else "FT labels that FT had not, though φ had"
    verdict = "not worth it here: keep the default φ" if chosen == "default_phi" else "keep it"
    line = f"{name} is worth {points} points on {labels}: {verdict}"
    return {"chosen": chosen, "held_score": {method: mean_and_error(scores) for method, scores in held.items()}}, line


def begin(command: str, kind: type[Domain], ask) -> tuple[Run, Training]:
    """A new run and its training; or, with --resume, those of an earlier one at its last checkpoint."""
    if ask.use not in ("chosen", "learned"):
        raise BadInput(f"--use is {ask.use!r}, expected chosen or learned")
    if ask.use != "chosen" and not (ask.phi or ask.resume):
        raise BadInput("--use says which φ of --phi: name a run")
    if not ask.resume:
        domain = kind(settings_of(kind, ask.given, ask.preset), pick_device(ask.device), ask.data)
        config = {"command": command, **identity(kind), "phi": str(ask.phi.resolve()) if ask.phi else None,
                  "device": str(domain.device), "torch": torch.__version__, "data": domain.data_digest(),
                  "settings": dataclasses.asdict(domain.settings)}  # fmt: skip
    else:
        if ask.out or ask.phi or ask.preset != "default" or ask.use != "chosen":
            raise BadInput("--resume goes on with a run as it was started: no --out, --phi, --use or --preset")
        config = (run := Run(ask.resume)).config()
        if config["command"] != command:
            raise BadInput(f"{ask.resume} is a run of {config['command']}: resume it with that command")
        # And what a process left that was killed goes.
        Ranks().first(lambda: (run.lock(ask.held), [left.unlink() for left in run.folder.glob(".metapt-*")]))
        content = run.checkpoint() if run.had_checkpoint() else None
        device = "cpu" if config["device"] == "cpu" and ask.device == "auto" else ask.device  # for the same numbers
        domain = reopened(run, ask.domain, {}, device, ask)
        for name, value in ask.given.items():
            if value != (before := getattr(domain.settings, name)):
                raise BadInput(f"{flag(name)} {value} is not what {ask.resume} was started with: {before}")
    phi = phi_of(Path(config["phi"]), config, domain, ask.console) if config["phi"] else None
    if phi and not ask.resume and ask.use == "chosen" and not worth_it(ask.phi):
        config["phi"] = phi = None
        ask.console.print(f"{ask.phi} found its φ not worth it: this is PT with the default φ (--use learned: its own)")
    training = Training(domain, command == "meta", phi)
    if not ask.resume:
        finetune_sizes(domain)  # what cannot be is said before anything is written
        return Run(domain.ranks.first(lambda: Run.create(ask.out, config, ask.held).folder)), training
    if not run.restore(training, content):
        ask.console.print(f"{run.metrics} lacks rows that it had: they will be missing in figures")
    if content and content["ranks"] != domain.ranks.size:
        ask.console.print(f"ranks: {content['ranks']} before, {domain.ranks.size} now: the run's numbers will differ")
    ask.console.print(f"going on at PT step {training.step} of {domain.settings.steps}")
    return run, training


def reopened(run: Run, named: str | None, given: dict, device: str, ask) -> Domain:
    """The domain of a run, with all the settings of its config.json but those given, on the data it was trained on."""
    kind, config = domain_of(run, named, ask.console), run.config()
    known = {f.name: lambda value: True for f in dataclasses.fields(kind.Settings)}  # they check themselves
    with refusing(f"{run.started}", (BadInput, ValueError)):
        settings = kind.Settings(**as_written(config["settings"], known, "settings."))
    domain = kind(dataclasses.replace(settings, **given), pick_device(device), ask.data)
    if config["data"] != domain.data_digest():
        raise BadInput(f"{run.folder} was trained on other data than {ask.data} holds now")
    return domain


def phi_of(folder: Path, config: dict, domain: Domain, console) -> dict:  # that a run learned
    theirs, content = Run(folder).config(), Run(folder).checkpoint()
    if theirs["domain"] != config["domain"]:
        raise BadInput(f"{folder} is of the domain {theirs['domain']}, not {config['domain']}")
    if theirs["data"] != config["data"]:
        raise BadInput(f"{folder}: its φ was learned on other data, or on other parts of them (--seed draws them)")
    if content["step"] < theirs["settings"]["steps"]:
        console.print(f"{folder} is unfinished: its φ is that of PT step {content['step']}", highlight=False)
    with refusing(f"{folder}: its φ does not fit", ValueError):
        return as_written(content["phi"], domain.meta().state_dict())


def worth_it(folder: Path) -> bool:  # whether a run of `meta` chose what it learned, or did not choose
    if not (path := folder / "summary.json").exists():
        return True
    with refusing(f"{path} cannot be read", (*UNREADABLE, TypeError)):
        chosen = as_written(json.loads(path.read_text()), dict).get("chosen")
        as_written(chosen, lambda it: it in (None, "default_phi", "learned_phi", "online"), "chosen.")
    return chosen != "default_phi"


def follow(training: Training, run: Run, console) -> None:  # with bar, metrics, checkpoints; Ctrl-C saves one
    settings, domain, ranks, stopped = training.settings, training.domain, training.domain.ranks, []
    if training.step >= settings.steps:
        return
    save = lambda training: ranks.first(lambda: run.save(training))  # nobody goes on, or ends, before it is saved
    label = "learning φ" if training.learn else "pre-training"
    with contextlib.ExitStack() as handlers, progress_bar(console, label, settings.steps) as bar:
        for number in (signal.SIGINT, signal.SIGTERM):
            handlers.callback(signal.signal, number, signal.signal(number, lambda *_: stopped.append(True)))

        def each(training):
            rows = ""
            for learner in training.learners:
                measured = domain.measure(learner.meta)
                row = {"step": training.step, "particle": learner.number, "skipped": learner.skipped}
                row |= {name: finite_or_none(value) for name, value in learner.losses.items()}
                rows += json.dumps(row | measured) + "\n"
            if not ranks.rank:
                with writing(run.metrics, len(rows)), run.metrics.open("a") as file:
                    file.write(rows)
            value = next(iter(measured.values()), None)
            bar(training.step, "" if value is None else f"φ {value:.4g}")
            if any(ranks.objects(bool(stopped))):
                save(training)
                python = "python" if ranks.size == 1 else f"torchrun --nproc-per-node {ranks.size}"
                again = f"{python} metapt.py {'meta' if training.learn else 'pretrain'} --resume {run.folder}"
                raise Failed(f"stopped at PT step {training.step}; go on with: {again}")

        training.run(each, save)


def validation_loss(domain: Domain, learner: Learner) -> float:  # over the whole part, with the θ and ψ of the end
    index = torch.arange(domain.sizes["validation"], device=domain.device)
    with torch.no_grad(), torch.random.fork_rng([domain.device] * on_cuda(domain)):
        torch.manual_seed(domain.settings.seed)
        domain.begin_episode(learner.meta)  # the same after a resume
        loss = domain.finetune_loss(learner.network, learner.head, "validation", index)
        return loss(detached(learner.network), learner.psi).item()


def conclude(command: str, domain: Domain, run: Run, found: dict, ask, lines: list[str], figures: dict) -> None:
    """The summary and the figures into the run's folder; tables, what else there is to say, and where everything is."""
    summary = {"command": command, "domain": identity(type(domain))["domain"], "seed": domain.settings.seed,
               "device": str(domain.device), "seconds": time.perf_counter() - ask.begun, **found}  # fmt: skip
    save_json(run.folder / "summary.json", summary)
    if rows := found.get("comparison", []):
        figures["comparison.png"] = lambda figure: draw_comparison(figure, rows)
    for name, draw in figures.items():
        save_figure(run.folder / name, draw)
    show_comparison(ask.console, rows)
    show_comparison(ask.console, found.get("differences", []))
    names = ", ".join(sorted(path.name for path in run.folder.iterdir() if path.name[0] != "."))
    for line in (*lines, f"{summary['seconds']:.0f} s; {run.folder}: {names}"):
        ask.console.print(line, highlight=False)
    if ask.json:
        print(json.dumps(summary))


def load_encoder(path: Path, ask) -> tuple[str, Domain, Network]:  # a run's; its FT as there, but for what is given
    run, given = Run(path), dict(ask.given)
    config, learners = run.config(), run.checkpoint()["learners"]
    if given.get("measure_scope") not in (None, config["settings"].get("measure_scope")):
        given.setdefault("measure_lr", None)  # the run's is for its own scope
    if "measure_steps" in given and given.setdefault("measure_epochs", 0):
        raise BadInput("--measure-steps has no effect with --measure-epochs")
    domain = reopened(run, ask.of, given, ask.device, ask)
    network = domain.network()
    with refusing(f"{run.saved} holds no encoder of {config['domain']}", (LookupError, TypeError, ValueError)):
        network.load_state_dict(as_written(learners[0]["network"], network.state_dict(), "network."))
    method = "online" if config["command"] == "meta" else "learned_phi" if config["phi"] else "default_phi"
    return method, domain, network


def measure_runs(command: str, ask) -> None:  # `finetune` and `eval`
    paths = [ask.run] if command == "finetune" else ask.runs
    own_methods, domains, networks = zip(*(load_encoder(path, ask) for path in paths), strict=True)
    for path, other in zip(paths, domains, strict=True):
        if type(other) is not type(domains[0]):
            raise BadInput(f"{path} is of the domain {identity(type(other))['domain']}, {paths[0]} is not")
        for f in dataclasses.fields(other.settings):
            measuring = f.metadata.get("panel") == MEASURING and f.name not in (*ask.given, "compare")
            same = getattr(other.settings, f.name) == getattr(domains[0].settings, f.name)
            if (measuring or f.metadata.get("data")) and not same:
                why = "name it, so that all have the same FT" if measuring else "they have other data"
                raise BadInput(f"{path} has another {flag(f.name)} than {paths[0]}: {why}")
        if [p.shape for p in other.head().parameters()] != [p.shape for p in domains[0].head().parameters()]:
            raise BadInput(f"{path} has features of another size than {paths[0]}: they have no FT head in common")
    domain, sizes, seeds = domains[0], finetune_sizes(domains[0]), ask.given.get("compare", 5)
    if seeds < 1:
        raise BadInput(f"--compare is {seeds}, expected 1 or more here")
    if export := ask.export and ask.export.resolve():
        home = run_around(export) or (ask.out and ask.out.resolve() in export.parents and ask.out)
        there = export.exists() and not (ask.force and export.is_file())
        if home or there or not export.parent.is_dir():
            reason = "it is there already (--force replaces a file)" if there else f"{export.parent} is no folder"
            raise BadInput(f"{ask.export} cannot be written: {f'it lies in the run {home}' if home else reason}")
    torch.set_num_threads(domain.threads or torch.get_num_threads())
    config = {"command": command, **identity(type(domain)), "runs": [str(path) for path in paths], "sizes": sizes,
              "seeds": seeds, "settings": dataclasses.asdict(domain.settings)}  # fmt: skip
    run, lines = Run(domain.ranks.first(lambda: Run.create(ask.out, config, ask.held).folder)), []
    if export:
        torch.save(networks[0].encoder.state_dict(), buffer := io.BytesIO())
        save_whole(export, buffer.getvalue())
        lines = [f"the encoder's state_dict is in {ask.export}"]

    names = [(method, path.name, str(path)) for method, path in zip(own_methods, paths, strict=True)]
    # A run goes by the first of the three that no other has.
    names = [next((n for i, n in enumerate(own) if [o[i] for o in names].count(n) == 1), own[2]) for own in names]
    methods = {name: lambda _, network=network: network for name, network in zip(names, networks, strict=True)}
    methods["no_pretraining"] = lambda _: domain.network()
    with progress_bar(ask.console, "fine-tuning", seeds * len(methods)) as bar:
        results = compare(domain, methods, sizes, seeds, bar)
    summary = {"scope": domain.settings.measure_scope, "comparison": comparison_rows(domain, results)}
    if command == "eval":
        summary["differences"] = difference_rows(domain, results, list(methods), sizes)
    conclude(command, domain, run, summary, ask, lines, {})


def command_line(words: list[str]):
    """All commands; `meta` and `pretrain` have the options of the domain that is named next, or of --resume's."""
    kind = next(iter(DOMAINS.values()))
    if words and words[0] in ("meta", "pretrain"):
        named = words[1] if len(words) > 1 and not words[1].startswith("-") else None
        pieces = [piece for word in words for piece in word.split("=", 1)]
        resumed = [Path(after) for before, after in itertools.pairwise(pieces) if before == "--resume"]
        kind = domain_of(Run(resumed[0]), None) if resumed and not named else find_domain(named) if named else kind
    app = typer.Typer(help=__doc__.split("\n\n")[0], add_completion=False, no_args_is_help=True,
                      pretty_exceptions_enable=False)  # fmt: skip
    app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(download)
    for command in COMMANDS:
        app.command(command)(make_command(command, kind if command in ("meta", "pretrain") else None))
    return typer.main.get_command(app)


def misplaced(option: str, words: list[str]) -> str:  # where an option that a command lacks belongs
    name, command = option.lstrip("-").replace("-", "_"), words[0]
    if field := Settings.__dataclass_fields__.get(name):
        return f"{option} belongs to {'meta' if field.metadata['learning'] else 'meta and pretrain'}, not to {command}"
    owners = [other for other, (_, names) in COMMANDS.items() if name in names.split()]
    for domain in DOMAINS:
        with contextlib.suppress(BadInput):  # its file may be missing
            owners += [domain] * (name in find_domain(domain).Settings.__dataclass_fields__)
    if command == "meta":
        command += f" {words[1] if len(words) > 1 and words[1][0] != '-' else next(iter(DOMAINS))}"
    return f"{option} belongs to {', '.join(owners)}, not to {command}" if owners else f"no such option: {option}"


def join_ranks() -> None:  # of torchrun, by gloo; between GPUs, of which each rank has its own, by NCCL
    if distributed.is_available() and distributed.is_torchelastic_launched():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        distributed.init_process_group(backend, timeout=timedelta(days=1))  # it is torchrun that sees who has died
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # and then ends the others
        told, tell = os.pipe()  # for a thread that ends the process where the main one waits for a rank that is gone
        os.set_blocking(tell, False)
        signal.set_wakeup_fd(tell)
        threading.Thread(target=end_in_time, args=[told], daemon=True).start()
        sys.stdout = io.StringIO() if Ranks().rank else sys.stdout


def leave_ranks(status: int = 0) -> None:  # at exit, before Python ends: gloo's threads, which hold its objects, abort
    if distributed.is_available() and distributed.is_initialized():
        if status:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        atexit.register(lambda: (status or distributed.destroy_process_group(), sys.stdout.flush(), os._exit(status)))


def first_to_end() -> bool:  # of the ranks: it says why, the others end because it did
    if Ranks().size == 1:
        return True
    where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    with contextlib.suppress(RuntimeError):
        store = distributed.TCPStore(*where, timeout=timedelta(seconds=5))
        return store.add(f"metapt ends {os.environ['TORCHELASTIC_RESTART_COUNT']}", 1) == 1
    return True  # with the rank that kept the store


def end_in_time(told: int) -> None:  # a thread: torchrun kills what has not ended 30 s after its signal
    while os.read(told, 1)[0] not in (signal.SIGINT, signal.SIGTERM):
        pass
    time.sleep(24)
    if first_to_end():
        print("metapt: stopped, without another checkpoint: it took too long", file=sys.stderr, flush=True)
    os._exit(1)


def main() -> None:
    """Runs a command; what the user can mend is one line and exit status 2, what they cannot is 1."""
    join_ranks()
    try:
        status, message = command_line(sys.argv[1:]).main(standalone_mode=False) or 0, ""
        if status == 130:  # typer's word for Ctrl-C
            raise KeyboardInterrupt
    except (BadInput, typer.BadParameter.__mro__[1]) as error:  # the latter: any error of usage
        status, message = 2, error.format_message() if hasattr(error, "format_message") else str(error)
        if message.startswith("No such option"):
            message = misplaced(error.option_name, sys.argv[1:])
    except OSError as error:  # a file in a folder's place, a disk that is full
        status, message = 1 if error.errno in (*FULL, errno.EPIPE, errno.EIO, errno.ENOMEM) else 2, str(error)
    except (Failed, KeyboardInterrupt, typer.Abort,  # and a compiler's error, without importing torch._dynamo
            getattr(sys.modules.get("torch._dynamo.exc"), "BackendCompilerFailed", Failed)) as error:  # fmt: skip
        status, message = 1, str(getattr(error, "inner_exception", error)).partition("\n")[0] or "stopped"
    except Exception as error:
        status, message = 1, ""
        if re.search("MemoryError|(not enough|allocate|out of) memory|bad_alloc", repr(error)):  # torch's words for it
            message = str(error) or "out of memory"
        else:
            leave_ranks(status)
            if first_to_end():
                raise
    leave_ranks(status)
    if message and first_to_end():
        print(f"metapt: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
