# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0",
#     "numpy>=2.0,<3",
#     "scikit-learn>=1.5,<2",
#     "matplotlib>=3.9,<4",
#     "typer>=0.29,<1",
#     "rich>=13.9,<16",
# ]
# ///
"""metapt learns hyperparameters of pre-training by gradient, from how well a model does afterwards.

A model is pre-trained (PT) on one task and fine-tuned (FT) on another. Pre-training has
hyperparameters φ: how augmentation is done, how much each example or each task counts. What is a
good φ shows only after fine-tuning, in the loss L_V on validation data:

    min over φ of  L_V(θ_K, ψ_K)
    where θ*(φ) = argmin over θ of L_PT(θ, φ), and (θ_K, ψ_K) = K steps of FT from (θ*, ψ_0)

θ is what PT trains, an encoder and a head for PT's own task; ψ is the head that FT adds to the
encoder. The gradient of L_V with respect to φ has three parts:

    v       = dL_V(θ_K, ψ_K) / dθ*        backpropagation through the K unrolled FT steps
    q       ≈ (∇²_θθ L_PT)⁻¹ v            an inverse-Hessian-vector product: the solver
    dL_V/dφ = −qᵀ ∇²_θφ L_PT              the implicit function theorem

Algorithm 1 learns φ while θ is trained:

    warm up: PT steps on θ with φ fixed, and one FT step on ψ beside each
    repeat until the PT steps are used up:
        P times:
            θ ← Adam step along ∇_θ L_PT(θ, φ)
            ψ ← Adam step along ∇_ψ L_FT(θ, ψ)
        once:
            (θ_K, ψ_K) = K steps of FT from (θ, ψ);  v, q and dL_V/dφ as above
            φ ← Adam step along dL_V/dφ
            ψ ← ψ_K;  θ goes on from where PT left it

    python metapt.py download DATA         fetch and prepare mnist, ecg, ppi or ud
    python metapt.py pretrain DOMAIN       PT with φ fixed: the baseline, or a φ that was learned
    python metapt.py meta DOMAIN           Algorithm 1: learn φ, then compare what it is worth
    python metapt.py finetune RUN          FT from a run's encoder, over seeds and FT-set sizes
    python metapt.py eval RUN...           test metrics of runs side by side

Source: Raghu, Lorraine, Kornblith, McDermott and Duvenaud, "Meta-Learning to Improve
Pre-Training", NeurIPS 2021, arXiv:2111.01754.

The chapters of this file, each of which uses only chapters above it:

    2. The hypergradient           `hypergradient`; needs torch alone, to be copied as it stands
    3. What an experiment is       `Settings`, `Network`, `call`, `Domain`
    4. The first domain            `DigitsRotation`: digits, φ is the rotation that augments them
    5. Algorithm 1                 `Batches`, `Training`
    6. Fine-tuning that measures   `finetune`, `compare`, `choose`
    7. Run folders                 `Run`
    8. Tables and figures
    9. Commands
"""

# ------------------------------------------------------------------------------------------------
# 2. The hypergradient. This chapter needs torch alone: to use it elsewhere, copy it as it stands.
#
# The validation loss after fine-tuning depends on the hyperparameters φ of pre-training only by
# way of the pre-trained parameters θ*(φ). Its derivative by φ is found in three steps:
#
#     v       = dL_V(θ_K, ψ_K)/dθ*     backpropagation through the K steps of fine-tuning (FT)
#     q       ≈ H⁻¹ v                  a linear system in the Hessian of pre-training (PT),
#                                      H = ∇²_θθ L_PT + damping·I
#     dL_V/dφ = −qᵀ ∇²_θφ L_PT         the implicit function theorem, at a minimum θ* of L_PT
#
# H is never formed. What can be had of it are products Hd with a vector d, each at the cost of
# one derivative of the PT gradient along d. The solvers of the second line differ in how many
# products they take. The third line is a product of the same kind, dᵀ ∇²_θφ L_PT with d = q,
# here called the mixed product.
#
#     solver      what q is                            products          when to take it
#     identity    v, or M⁻¹v with a preconditioner M   1                 the cheapest; while PT is
#                                                                        far from a minimum; with
#                                                                        Adam's moments as M
#     neumann     α Σ_{j≤terms} (I − αH)ʲ v            terms + 1, and    a few terms with α = PT's
#                                                      8 to find α       learning rate, as published
#     neumann,    one step q ← q + α(v − Hq) a term    terms             a solve spread over the
#       from q0                                                          calls of an online loop
#     cg          the best in a space of dimension     at most terms,    H is positive definite: at
#                 `terms` (conjugate gradients)        1 more with q0    a minimum, or damped
#     nystrom     (sketch of H of rank `terms`)⁻¹ v    terms + 1         few directions curve much;
#                                                                        damping does for the rest
#
# What a product costs, where a pass is a loss and its gradient, as in one step of training:
#
#     hvp         a product                  memory                      take it
#     exact       less than two passes, and  that of a gradient's        where it fits and torch has
#                 one longer at the start    graph: about three passes   the second derivatives
#     finite      two passes                 that of one pass            else: large models, mixed
#                                                                        precision, compiled models

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

Params = dict[str, Tensor]
Loss = Callable[[Params, Params], Tensor]


def _require(condition, name: str, value, expected) -> None:
    if not condition:
        raise ValueError(f"{name} is {value!r}, expected {expected}")


def _require_one_of(choices: tuple, name: str, value) -> None:
    _require(value in choices, name, value, f"one of {', '.join(map(repr, choices))}")


@dataclass(frozen=True)
class Unroll:
    """The fine-tuning (FT) stage: K differentiable steps of an optimiser from where PT ended.

    With `scope` "head" FT moves ψ alone; with "all" it moves θ too.

    `hvp` says how the derivatives of FT's gradients are found, as it does in `Solver`; None means
    as the solver says. Beside a "finite" solver "exact" can pay in scope "head": a step then
    costs one pass of L_FT instead of three, but the graphs of all K steps are kept, not of one.

    Raises:
        ValueError: a field has a value that is not listed here.
    """

    steps: int = 1  # K; with 0, L_V is read off at (θ*, ψ_0)
    lr: float = 1e-3
    betas: tuple = (0.9, 0.999)  # of Adam: how slowly its two moments forget
    eps: float = 1e-8  # of Adam: added to the root of the second moment
    optimizer: str = "sgd"  # or "adam"
    scope: str = "head"  # or "all"
    hvp: str | None = None  # or "exact", "finite"

    def __post_init__(self):
        _require(self.steps >= 0, "Unroll.steps", self.steps, "0 or more")
        _require_one_of(("sgd", "adam"), "Unroll.optimizer", self.optimizer)
        _require_one_of(("head", "all"), "Unroll.scope", self.scope)
        _require_one_of((None, "exact", "finite"), "Unroll.hvp", self.hvp)


@dataclass(frozen=True)
class Solver:
    """How q ≈ H⁻¹v is found, where H = ∇²_θθ L_PT + damping·I.

    The comment that opens the chapter compares the methods.

    The methods come from: "identity" Luketina et al., ICML 2016 (T1-T2), and with PT's Adam
    moments as the preconditioner SAMA, Choe et al., NeurIPS 2023; "neumann" Lorraine et al.,
    AISTATS 2020, algorithm 3; "cg" Pedregosa, ICML 2016; "nystrom" Hataya and Yamada, AISTATS
    2023.

    With `hvp` "exact" products are second derivatives by double backward; with "finite" they are
    central differences of first-order gradients. A kink of a ReLU between the two points counts
    in full there, so that at the default `step` products are noisy. A longer one (0.1, say)
    averages over more kinks, and over gradients that are noisier than their dtype says, as under
    autocast. The default is ∛ε of the coarsest dtype that takes part, times the size of the
    numbers that are moved, where that is above 1.

    The two are a check on each other: torch's second derivatives are wrong or missing for a few
    operations (weight_norm, spectral_norm in training, fused attention, a Function of one's own
    under @once_differentiable), its first derivatives are not.

    Raises:
        ValueError: a field has a value that is not listed here.
    """

    method: str = "cg"  # or "neumann", "identity", "nystrom"
    terms: int = 10  # of neumann beyond the zeroth; iterations of cg at most; rank of nystrom
    alpha: float | None = None  # neumann's step size; None: 1 / the largest |eigenvalue| of H
    damping: float = 0.0  # nystrom needs it where its rank is below the number of parameters
    tol: float = 1e-10  # cg stops when ‖Hq − v‖ ≤ tol·‖v‖
    seed: int = 0  # of nystrom's random directions, and of those by which alpha is found
    hvp: str = "exact"  # or "finite"
    step: float | None = None  # of finite: the perturbation's norm; None: fits dtypes and sizes

    def __post_init__(self):
        methods = ("identity", "neumann", "cg", "nystrom")
        _require_one_of(methods, "Solver.method", self.method)
        fewest_terms = 1 if self.method == "nystrom" else 0
        _require(self.terms >= fewest_terms, "Solver.terms", self.terms, f"{fewest_terms} or more")
        _require(self.damping >= 0, "Solver.damping", self.damping, "0 or more")
        alpha_fits = self.alpha is None or self.alpha > 0
        _require(alpha_fits, "Solver.alpha", self.alpha, "positive, or None")
        _require_one_of(("exact", "finite"), "Solver.hvp", self.hvp)
        step_fits = self.step is None or self.step > 0
        _require(step_fits, "Solver.step", self.step, "positive, or None")


class Hypergradient(NamedTuple):
    """What `hypergradient` returns. Nothing in it is attached to a graph of autograd.

    Each tensor has the shape, dtype and device of the parameter it belongs to.

    Attributes:
        phi: dL_V/dφ, by the names of phi.
        psi0: dL_V/dψ_0, by the names of psi.
        value: L_V(θ_K, ψ_K), a scalar.
        psi: ψ_K, the FT head after the K steps.
        q: the solver's q, by the names of theta; the next call may start from it (`q0`).
        ft_state: the state of FT's optimiser after the K steps, for the next call.
        residual: ‖Hq − v‖ / ‖v‖, or nan where the solver did not come by it.
    """

    phi: Params
    psi0: Params
    value: Tensor
    psi: Params
    q: Params
    ft_state: dict
    residual: float


@torch.enable_grad()  # also where the caller has turned gradients off
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
    """How the validation loss after fine-tuning changes with the hyperparameters of pre-training.

    This is dL_V(θ_K, ψ_K)/dφ of Raghu et al., "Meta-Learning to Improve Pre-Training", NeurIPS
    2021, section 3. A loss takes two dicts of tensors and returns a scalar. It is called several
    times, and must be the same function each time: its batch is fixed, and what it draws from
    torch's default generators (the CPU's, and that of theta's device) is drawn alike in each call;
    in the end they stand where one call of each FT loss, of L_V and of L_PT would have left them.
    Numbers from other sources (a generator of one's own, numpy, `random`) it must not draw anew in
    each call: nothing replays them, and the results would be noise. A loss may read buffers, but
    not change them: hand `functional_call` copies of BatchNorm's statistics.

    Args:
        pretrain_loss: L_PT(theta, phi).
        finetune_loss: L_FT(theta, psi): one callable for all K steps, or a sequence of K.
        validation_loss: L_V(theta, psi).
        theta: θ*, the parameters as PT left them, by name. Where some of the tensors require a
            gradient, the others are constants, which PT does not move (frozen layers): q is zero
            there, and the preconditioner and FT in scope "all" do not meet them. Where none
            does, all are variables. The three dicts and their tensors are never changed.
        psi: ψ_0, the parameters of the FT head, by name; it may be empty.
        phi: φ, the hyperparameters of PT, by name.
        unroll: the FT stage.
        solver: how the linear system is solved.
        q0: an earlier q to start from, by the names of theta. With "cg" it costs one product, to
            learn where it stands. "neumann" goes on from it for `terms` steps, at least one; the
            hypergradient and the residual are then those of the q before the last step, and the
            q returned is that after it, so that one product a call does (SOBA, Dagréou et al.,
            NeurIPS 2022).
        ft_state: the state of FT's optimiser, as an earlier call returned it; None or {} is a
            fresh one. From fresh moments Adam's first step is lr·g/(|g| + ε), whose derivative is
            almost nil.
        preconditioner: r → M⁻¹r on dicts by the names of theta, linear, with M symmetric and
            positive definite; for "cg" and "identity".
        reduce: sums a dict of tensors over processes, where the losses of each process are its
            share of the whole. It is applied to L_V, to each gradient and to each product.
        allow_unused: whether L_PT may ignore all of theta or all of phi, and L_V all of theta and
            psi. Parts of them a loss may always ignore; of parts of theta and phi that L_PT
            ignores a warning tells, which this turns off.

    Raises:
        TypeError: theta, psi, phi or q0 is no dict of tensors by string, or a loss returns no
            tensor.
        ValueError: an argument does not fit the others; autograd finds no path from L_PT to
            theta, from L_PT to phi, or from L_V to theta and psi, and `allow_unused` is False;
            parameters are complex, integer or sparse, lie on several devices, are one tensor
            under two names, or are too coarse for finite differences or for the given step; a
            loss changes its parameters in place, has sparse gradients, takes its own backward
            pass, or computes activations anew in its backward pass from other parameters than it
            was given.
        NotImplementedError: torch lacks a second derivative that `hvp` "exact" needs.
        FloatingPointError: a loss or a result is not finite; the message says which.

    Warns:
        UserWarning: L_PT does not reach parts of theta or phi; the solver met negative
            curvature or a singular H, or diverges; q is no better than 0.
    """
    _check_arguments(theta, psi, phi, solver, q0, preconditioner)
    moving = _moving(theta)
    pretrain, finetune, validation = _repeatable_losses(
        pretrain_loss, finetune_loss, validation_loss, theta, psi, phi, unroll.steps, reduce
    )
    doubts = _Doubts()

    # The losses run under the caller's autocast, and nothing else does.
    with _autocast(pretrain.autocast, enabled=False):
        # v = dL_V(θ_K, ψ_K)/dθ*
        tuned = gradient_through_finetuning(
            finetune, validation, validation.start, unroll, solver, ft_state, doubts
        )
        v = _part(tuned.gradient, "theta")
        psi0_gradient = _part(tuned.gradient, "psi")
        psi_k = _part(tuned.end, "psi")
        sizes = _largest_entries(
            L_V={"": tuned.value}, v=v, psi0=psi0_gradient, L_FT=_first_values(finetune)
        )
        _raise_if_not_finite(sizes)
        if _all_zero(sizes["v"]) and _all_zero(sizes["psi0"]):
            validation.require_paths(tuned.end, ["theta or psi"], allow_unused)

        # q ≈ (∇²_θθ L_PT + damping·I)⁻¹ v
        products = Products(pretrain, pretrain.start, solver, doubts)
        if _all_zero(sizes["v"]):
            solution = Solution(q=_flat(v), mixed=products.zero_mixed, residual=0.0)
        else:
            largest = max(sizes["v"].values())
            solution = solve(products, _flat(v), largest, q0, solver, moving, preconditioner)
        q = _unflat(solution.q, moving)

        # dL_V/dφ = −qᵀ ∇²_θφ L_PT
        # Subtracted from zeros, no zero gets a minus sign.
        phi_gradient = _unflat(products.zero_mixed - solution.mixed, phi)
    sizes = _largest_entries(
        doubts=doubts.flags, q=q, phi=phi_gradient, psi_K=psi_k, L_PT=_first_values([pretrain])
    )
    flags = sizes.pop("doubts")
    doubts.settle(flags)
    _raise_if_not_finite(sizes)
    if _all_zero(sizes["phi"]):
        # L_PT has to be called once even where v = 0: by this call the generators move on.
        pretrain.require_paths(pretrain.start, ["theta", "phi"], allow_unused)

    unreached = [name for name in moving if f"theta.{name}" not in pretrain.reached]
    if unreached and not allow_unused:
        doubts.add(f"{_Doubts.THETA_NOT_REACHED}: {', '.join(unreached)}")
    unreached = [name for name in phi if f"phi.{name}" not in pretrain.reached]
    if unreached and not allow_unused:
        doubts.add(f"{_Doubts.PHI_NOT_REACHED}: {', '.join(unreached)}")
    if solution.residual >= 1:
        doubts.add(_Doubts.NO_BETTER_THAN_ZERO)
    for text in doubts.texts:
        warnings.warn(text, stacklevel=3)  # past the decorator, to the caller
    return Hypergradient(
        phi=phi_gradient,
        psi0=psi0_gradient,
        value=tuned.value,
        psi={name: t.clone() for name, t in psi_k.items()},  # with K = 0 these are the caller's
        q=_with_zeros(q, theta),
        ft_state=tuned.state,
        residual=solution.residual,
    )


# The first equation: K steps of fine-tuning, and the way back through them


class ThroughFinetuning(NamedTuple):
    """What is known after K steps of FT and the way back through them."""

    value: Tensor  # L_V(θ_K, ψ_K)
    gradient: Params  # dL_V/dθ_0 and dL_V/dψ_0, in one dict: "theta.…", "psi.…"
    end: Params  # θ_K and ψ_K, in one dict
    state: dict  # of FT's optimiser


def gradient_through_finetuning(
    losses: list["_RepeatableLoss"],
    validation: "_RepeatableLoss",
    start: Params,
    unroll: Unroll,
    solver: Solver,
    state: dict | None,
    doubts: "_Doubts",
) -> ThroughFinetuning:
    """Takes K steps of FT from `start` = (θ_0, ψ_0), and differentiates L_V at their end by it.

    An FT step is an elementwise rule (`finetune_step`) applied to a gradient. The adjoint of the
    rule is a formula (`finetune_step_adjoint`), and the adjoint of the gradient is the derivative
    of ∇L_FT along a direction λ: λᵀ∇²_ψψ L_FT and λᵀ∇²_θψ L_FT. So the way back needs nothing
    but such derivatives, and with finite ones no second-order graph is ever built.
    """
    everything = list(start)
    if unroll.scope == "all":
        moving = everything
    else:
        moving = [name for name in everything if name.startswith("psi.")]
    hvp = unroll.hvp or solver.hvp

    point = start
    steps_taken = []
    for loss in losses:
        derivatives = _derivatives(loss, point, moving, hvp, solver.step, doubts)
        gradients = derivatives.gradient()
        point, state = finetune_step(point, gradients, unroll, state)
        steps_taken.append((derivatives, gradients, state))
    end = point

    value, adjoint = validation.value_and_gradient(end, everything)
    moments_adjoint = (0.0, 0.0)
    while steps_taken:  # each step is taken off the list, so that its graph is freed after use
        derivatives, gradients, state_after = steps_taken.pop()
        gradient_adjoint, moments_adjoint = finetune_step_adjoint(
            _flat(adjoint, moving), moments_adjoint, _flat(gradients), state_after, unroll
        )
        change = derivatives.along(gradient_adjoint, everything)
        adjoint = {name: adjoint[name] + change[name] for name in everything}
    return ThroughFinetuning(value, adjoint, end, state or {})


def finetune_step(
    params: Params, gradients: Params, unroll: Unroll, state: dict | None
) -> tuple[Params, dict]:
    """One step of SGD or of Adam (Kingma and Ba, ICLR 2015, algorithm 1), without side effects.

    Args:
        params: the parameters before the step, by name.
        gradients: the gradients of those that move, by the same names.
        unroll: the optimiser and its constants.
        state: Adam's is {"step": int, "exp_avg": vector, "exp_avg_sq": vector}, with the entries
            of the moments in the order of `gradients` (in `hypergradient` ψ; in scope "all" θ,
            then ψ). SGD's is {}. None or {} is a fresh one.

    Returns:
        The parameters and the state after the step.

    Raises:
        ValueError: the state belongs to another number of parameters.
    """
    g = _flat(gradients)
    if unroll.optimizer == "sgd":
        change = unroll.lr * g
        state_after = {}
    else:
        if not state:
            state = {"step": 0, "exp_avg": torch.zeros_like(g), "exp_avg_sq": torch.zeros_like(g)}
        size = len(state["exp_avg"])
        if size != len(g):
            raise ValueError(f"ft_state is of {size} parameters, expected {len(g)}")
        beta1, beta2 = unroll.betas
        step = state["step"] + 1
        m = beta1 * state["exp_avg"] + (1 - beta1) * g
        s = beta2 * state["exp_avg_sq"] + (1 - beta2) * g * g
        rate = unroll.lr / (1 - beta1**step)
        unbiased_s = s / (1 - beta2**step)
        change = rate * m / (unbiased_s.sqrt() + unroll.eps)
        state_after = {"step": step, "exp_avg": m, "exp_avg_sq": s}
    moved = {name: params[name] - d for name, d in _unflat(change, gradients).items()}
    return {**params, **moved}, state_after


def finetune_step_adjoint(
    adjoint: Tensor, moments_adjoint: tuple, g: Tensor, state_after: dict, unroll: Unroll
) -> tuple[Tensor, tuple]:
    """The transpose of the derivative of `finetune_step`, on vectors: one step of the way back.

    Args:
        adjoint: dL_V/d(parameters after the step). They pass on to the parameters before it with
            derivative one, which needs no formula.
        moments_adjoint: dL_V/d(m and s after the step), by way of later steps; zeros at the end.
        g: the step's gradient.
        state_after: the state that the step returned.
        unroll: the optimiser and its constants.

    Returns:
        dL_V/dg and, as a pair, dL_V/d(m and s before the step).
    """
    if unroll.optimizer == "sgd":
        return -unroll.lr * adjoint, moments_adjoint
    beta1, beta2 = unroll.betas
    step = state_after["step"]
    m = state_after["exp_avg"]
    s = state_after["exp_avg_sq"]
    rate = unroll.lr / (1 - beta1**step)
    unbias = 1 - beta2**step
    root = (s / unbias).sqrt()
    # No gradient has ever reached an entry with s = 0, as those of a dead unit, whose Hessian is
    # zero too. What would come through it, by m and by the infinite slope of the root, is left
    # out: for dead units that is exact, for other entries an omission.
    alive = s > 0
    by_m = -rate * adjoint / (root + unroll.eps)
    by_s = (
        rate * m * adjoint / ((root + unroll.eps) ** 2 * 2 * unbias * torch.where(alive, root, 1))
    )
    m_adjoint = moments_adjoint[0] + torch.where(alive, by_m, 0)
    s_adjoint = moments_adjoint[1] + torch.where(alive, by_s, 0)
    g_adjoint = (1 - beta1) * m_adjoint + 2 * (1 - beta2) * g * s_adjoint
    return g_adjoint, (beta1 * m_adjoint, beta2 * s_adjoint)


# The second equation: solvers of Hq = v. Each takes vectors, and `products` for H.


class Solution(NamedTuple):
    """What a solver found."""

    q: Tensor
    mixed: Tensor  # qᵀ∇²_θφ L_PT
    residual: float  # ‖Hq − v‖ / ‖v‖, or nan where to know it would cost a product of its own


class Products:
    """Products of a vector d (the entries of theta, in order) with the second derivatives of L_PT.

    The Hessian product is Hd with H = ∇²_θθ L_PT + damping·I, the mixed product dᵀ∇²_θφ L_PT,
    a vector of the entries of phi. Both together cost as much as one.
    """

    def __init__(
        self,
        pretrain: "_RepeatableLoss",
        point: Params,
        solver: Solver,
        doubts: "_Doubts",
    ):
        self.theta_names = [name for name in point if name.startswith("theta.")]
        self.phi_names = [name for name in point if name.startswith("phi.")]
        self.damping = solver.damping
        self.exact = solver.hvp == "exact"
        self.doubts = doubts
        self.zero_mixed = torch.zeros_like(_flat(point, self.phi_names))
        self.derivatives = _derivatives(
            pretrain, point, self.theta_names, solver.hvp, solver.step, doubts
        )

    def least_curvature(self, dtype: torch.dtype) -> float:
        """What of the largest curvature stands out from the rounding errors of a product."""
        eps = torch.finfo(dtype).eps
        if self.exact:
            return 10 * eps
        return 10 * eps ** (2 / 3)

    def hessian_product(self, d: Tensor) -> Tensor:
        change = self.derivatives.along(d, self.theta_names)
        return self._damped(_flat(change, self.theta_names), d)

    def mixed_product(self, d: Tensor) -> Tensor:
        change = self.derivatives.along(d, self.phi_names)
        return _flat(change, self.phi_names)

    def both_products(self, d: Tensor) -> tuple[Tensor, Tensor]:
        change = self.derivatives.along(d, self.theta_names + self.phi_names)
        hessian_d = self._damped(_flat(change, self.theta_names), d)
        return hessian_d, _flat(change, self.phi_names)

    def _damped(self, hessian_d: Tensor, d: Tensor) -> Tensor:
        if self.damping:
            return hessian_d + self.damping * d
        return hessian_d


def solve(
    products: Products,
    v: Tensor,
    largest: float,
    q0: Params | None,
    solver: Solver,
    theta: Params,
    preconditioner: Callable[[Params], Params] | None,
) -> Solution:
    """Solves Hq = v, where v is a vector of the entries of theta and `largest` the size of one.

    The system is linear. Where squares of such a size may leave the dtype, it is solved for a
    smaller or larger v; dividing by a power of two is exact.
    """
    start = None
    if q0 is not None:
        start = _flat(q0, theta).detach()
    if 1e-10 < largest < 1e10:
        return _solve(products, v, start, solver, theta, preconditioner)
    scale = 2.0 ** math.floor(math.log2(largest))
    if start is not None:
        start = start / scale
    scaled = _solve(products, v / scale, start, solver, theta, preconditioner)
    return Solution(scaled.q * scale, scaled.mixed * scale, scaled.residual)


def _solve(
    products: Products,
    v: Tensor,
    start: Tensor | None,
    solver: Solver,
    theta: Params,
    preconditioner: Callable[[Params], Params] | None,
) -> Solution:
    """Hands v to the solver's method."""

    def precondition(r: Tensor) -> Tensor:
        if preconditioner is None:
            return r
        return _flat(preconditioner(_unflat(r, theta)), theta).detach()

    if solver.method == "identity":
        return identity_solver(products, v, precondition)
    if solver.method == "cg":
        return conjugate_gradients(products, v, start, solver.terms, solver.tol, precondition)
    if solver.method == "nystrom":
        return nystrom(products, v, solver.terms, solver.damping, solver.seed)
    alpha = solver.alpha
    if alpha is None:
        alpha = 1 / largest_curvature(products, v, solver.seed)
    if start is None:
        return neumann(products, v, solver.terms, alpha)
    return neumann_continued(products, v, start, solver.terms, alpha)


def identity_solver(
    products: Products, v: Tensor, precondition: Callable[[Tensor], Tensor]
) -> Solution:
    """q = M⁻¹v, as if H were M (without a preconditioner the identity)."""
    q = precondition(v)
    return Solution(q, products.mixed_product(q), torch.nan)


def neumann(products: Products, v: Tensor, terms: int, alpha: float) -> Solution:
    """q = α Σ_{j≤terms} (I − αH)ʲ v, which tends to H⁻¹v if 0 < α < 2 / H's largest eigenvalue.

    The sum is what `terms` steps q ← q + α(v − Hq) from q = αv lead to.
    """
    q = alpha * v
    r = torch.zeros_like(v)
    for _ in range(terms):
        r = v - products.hessian_product(q)
        q = q + alpha * r
    # Where H is positive definite and α small enough, r is shorter than v in every step.
    products.doubts.add_if(r.norm() >= v.norm(), _Doubts.NEUMANN_GROWS)
    return Solution(q, products.mixed_product(q), torch.nan)


def neumann_continued(
    products: Products, v: Tensor, q0: Tensor, terms: int, alpha: float
) -> Solution:
    """Steps q ← q + α(v − Hq) from q0, `terms` of them and at least one.

    The last step's product gives the mixed product and the residual as well, but those of the q
    before that step; the q returned is that after it.
    """
    q = q0
    for _ in range(terms - 1):
        r = v - products.hessian_product(q)
        q = q + alpha * r
    hessian_q, mixed = products.both_products(q)
    r = v - hessian_q
    residual = (r.norm() / v.norm()).item()
    return Solution(q + alpha * r, mixed, residual)


def largest_curvature(products: Products, v: Tensor, seed: int, iterations: int = 8) -> float:
    """The largest |eigenvalue| of H, from below, by power iterations on a random vector like v.

    Where H has no curvature at all it is 1: any step of neumann will do then.
    """
    d = _normal(len(v), like=v, seed=seed)
    # Stands in for a norm of 0: to ask whether it is 0 would wait for the device.
    tiny = torch.finfo(v.dtype).tiny
    norms = [d.norm()]
    for _ in range(iterations):
        d = products.hessian_product(d / norms[-1].clamp(min=tiny))
        norms.append(d.norm())
    curvatures = torch.stack(norms[1:]).tolist()  # the one wait for the device
    if not all(math.isfinite(curvature) for curvature in curvatures):
        raise FloatingPointError(f"q is not finite: the curvature of L_PT leaves {v.dtype}")
    return curvatures[-1] or 1.0


def conjugate_gradients(
    products: Products,
    v: Tensor,
    q0: Tensor | None,
    terms: int,
    tol: float,
    precondition: Callable[[Tensor], Tensor],
) -> Solution:
    """Preconditioned conjugate gradients (Golub and Van Loan, "Matrix Computations", 11.5).

    qᵀ∇²_θφ L_PT is linear in q and is carried along with it. What decides on going on is brought
    to the host once an iteration: it has to wait for the device each time.
    """
    if q0 is None:
        q = torch.zeros_like(v)
        mixed = products.zero_mixed
        r = v
    else:
        q = q0
        hessian_q, mixed = products.both_products(q0)
        r = v - hessian_q
    norm_v = v.norm()
    residual = (r.norm() / norm_v).item()

    p = None
    rz = None
    least = products.least_curvature(v.dtype)
    steepest = 0.0  # the largest curvature per length so far
    for _ in range(terms):
        if residual <= tol:
            break
        z = precondition(r)
        rz_before = rz
        rz = r @ z
        if p is None:
            p = z
        else:
            p = z + (rz / rz_before) * p
        hessian_p, mixed_p = products.both_products(p)
        curvature_p = p @ hessian_p
        a = rz / curvature_p
        r = r - a * hessian_p
        curvature, p_squared, residual_after = torch.stack(
            [curvature_p, p @ p, r.norm() / norm_v]
        ).tolist()
        steepest = max(steepest, curvature / p_squared)
        if curvature <= least * steepest * p_squared:
            # ½qᵀHq − vᵀq has no minimum this way, and so this method no use. (Where H is singular,
            # it is rounding alone that makes the curvature differ from zero.)
            products.doubts.add(_Doubts.NO_CURVATURE)
            break
        q = q + a * p
        mixed = mixed + a * mixed_p
        residual = residual_after
    return Solution(q, mixed, residual)


def nystrom(products: Products, v: Tensor, rank: int, damping: float, seed: int) -> Solution:
    """(UΛUᵀ + damping·I)⁻¹ v, where UΛUᵀ ≈ ∇²_θθ L_PT comes from products with random directions.

    At full rank the system is solved as it is, in the basis of the directions; a singular Hessian
    needs damping. Below full rank UΛUᵀ is made positive semi-definite: what is not positive in
    the sketched Hessian is left to the damping.

    Raises:
        ValueError: the rank is below the number of parameters, and there is no damping.
    """
    n = len(v)
    rank = min(rank, n)
    if rank < n and damping == 0:
        raise ValueError(f"Solver.damping is 0, expected more for nystrom of rank {rank} < {n}")

    basis = torch.linalg.qr(_normal(n, rank, like=v, seed=seed)).Q
    sketch = torch.stack([products.hessian_product(d) for d in basis.T], dim=1)
    sizes = _largest_entries(q={"": sketch})
    _raise_if_not_finite(sizes)
    if _all_zero(sizes["q"]):  # there is no curvature at all, and nothing to invert
        return Solution(torch.zeros_like(v), products.zero_mixed, 1.0)

    core = basis.T @ sketch
    core = (core + core.T) / 2
    if rank == n:
        try:
            q = basis @ torch.linalg.solve(core, basis.T @ v)
        except torch.linalg.LinAlgError:
            raise FloatingPointError("q is not finite: H is singular, damping helps") from None
    else:
        # The sketch S = H·basis minus its damping and the core C give UΛUᵀ = S C⁻¹ Sᵀ = FFᵀ.
        # Its inverse with damping follows from the singular values of F (Woodbury's identity).
        undamped = core - damping * torch.eye(rank, dtype=v.dtype, device=v.device)
        values, vectors = torch.linalg.eigh(undamped)
        products.doubts.add_if(values.min() <= -damping, _Doubts.NO_CURVATURE)
        kept = values > values.abs().max() * rank * torch.finfo(v.dtype).eps
        factor = (sketch - damping * basis) @ (vectors[:, kept] / values[kept].sqrt())
        u, root, _ = torch.linalg.svd(factor, full_matrices=False)
        coefficients = u.T @ v
        within = u @ (coefficients / (root**2 + damping))
        outside = (v - u @ coefficients) / damping
        q = within + outside
    hessian_q, mixed = products.both_products(q)
    residual = ((hessian_q - v).norm() / v.norm()).item()
    if rank == n and residual > 0.1:
        # What solves a system directly leaves no residual, unless rounding is all there is of it.
        products.doubts.add(_Doubts.SINGULAR)
    return Solution(q, mixed, residual)


# The machinery: a loss as a function of one point, and derivatives of its gradient along a
# direction. A point is one dict of detached tensors, "theta.NAME", "psi.NAME" or "phi.NAME".


def _repeatable_losses(
    pretrain_loss: Loss,
    finetune_loss: Loss | Sequence[Loss],
    validation_loss: Loss,
    theta: Params,
    psi: Params,
    phi: Params,
    steps: int,
    reduce: Callable[[Params], Params] | None,
) -> tuple["_RepeatableLoss", list["_RepeatableLoss"], "_RepeatableLoss"]:
    """L_PT, L_FT of each of the K steps, and L_V, each as a function of one point."""
    with_phi = _join(theta=theta, phi=phi)
    with_head = _join(theta=theta, psi=psi)
    moving = list(_named("theta", _moving(theta)))
    constants = set(_named("theta", theta)).difference(moving)
    watched = [*moving, *_named("phi", phi)]

    pretrain = _RepeatableLoss("pretrain_loss", pretrain_loss, with_phi, constants, reduce, watched)
    validation = _RepeatableLoss("validation_loss", validation_loss, with_head, constants, reduce)
    if callable(finetune_loss):  # the K steps then share their random numbers with their batch
        same = _RepeatableLoss("finetune_loss", finetune_loss, with_head, constants, reduce)
        return pretrain, [same] * steps, validation
    finetune = [
        _RepeatableLoss("finetune_loss", loss, with_head, constants, reduce)
        for loss in finetune_loss
    ]
    if len(finetune) != steps:
        raise ValueError(f"finetune_loss has {len(finetune)} losses, expected {steps}")
    return pretrain, finetune, validation


class _RepeatableLoss:
    """A loss of two dicts as a function of a point, with the same random numbers at each pass.

    `origin` is the point that the caller gave. A point may leave out the constants in it, which
    are taken from there.
    """

    ARGUMENTS = {
        "pretrain_loss": ("theta", "phi"),
        "finetune_loss": ("theta", "psi"),
        "validation_loss": ("theta", "psi"),
    }

    def __init__(
        self,
        label: str,
        loss: Loss,
        origin: Params,
        constants: set[str],
        reduce: Callable[[Params], Params] | None,
        watched: Sequence[str] = (),
    ):
        self.label = label
        self.loss = loss
        self.origin = origin
        self.start = {name: t for name, t in origin.items() if name not in constants}
        self.groups = self.ARGUMENTS[label]
        self.reduce = reduce
        self.watched = watched  # names of which the first pass tells whether the loss has a path
        self.reached = None  # those that have one, as soon as that is known
        self.tracks_everything = False
        self.guarded = set()  # of "origin" and "elsewhere": where a backward pass was guarded
        self.value = None  # that of the first pass
        first = next(iter(origin.values()))
        self.autocast = _autocast_of_caller(first.device.type)
        self.generators = _generators(first.device)
        self.random_states = None  # of the generators, before the first pass

    def evaluate(self, point: Params, tracked: Sequence[str]) -> tuple[Tensor, Params]:
        """One pass: the loss at the point, and the leaves of its graph, by name.

        Only those that `tracked` names require a gradient, since a pass should cost no more than
        it must. In the first pass of a loss whose paths are looked for, what is watched does too.
        """
        look = bool(self.watched) and self.reached is None
        if look:
            tracked = [*tracked, *self.watched]
        if self.tracks_everything:
            tracked = list(point)
        first_pass = self.random_states is None
        try:
            value, leaves = self._pass(point, set(tracked))
        except RuntimeError as error:
            if "does not require grad" not in str(error):
                raise
            # The loss itself takes a gradient, by what is not tracked: now everything is.
            self.tracks_everything = True
            if first_pass:
                _set_states(self.generators, self.random_states)
                self.random_states = None
            value, leaves = self._pass(point, set(point))
        if look:
            self.reached = _reached(value, leaves)
        if self.value is None:
            self.value = value.detach()
        return value, leaves

    def _pass(self, point: Params, tracked: set[str]) -> tuple[Tensor, Params]:
        leaves = {name: t.detach().requires_grad_(name in tracked) for name, t in point.items()}
        params = {**self.origin, **leaves}
        # Tensors count their changes, but for those of inference mode, which constants may be.
        versions = {name: t._version for name, t in params.items() if not t.is_inference()}
        with self._same_random_numbers(), _autocast(self.autocast, enabled=True):
            value = self._call(params)
        changed = [name for name, version in versions.items() if params[name]._version != version]
        if changed:
            names = ", ".join(changed)
            raise ValueError(
                f"{self.label} changed {names} in place, as nn.Embedding(max_norm=…) does: let it "
                "work on a copy"
            )
        return value, leaves

    def _call(self, params: Params) -> Tensor:
        value = self.loss(_part(params, self.groups[0]), _part(params, self.groups[1]))
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{self.label} returned {type(value).__name__}, expected a scalar tensor"
            )
        if value.numel() != 1:
            raise ValueError(f"{self.label} returned {tuple(value.shape)}, expected a scalar")
        return value.reshape(())

    @contextlib.contextmanager
    def _same_random_numbers(self) -> Iterator[None]:
        """The first pass moves the generators on; later ones see its numbers and leave no trace."""
        states = [generator.get_state() for generator in self.generators]
        if self.random_states is None:
            self.random_states = states
            yield
            return
        _set_states(self.generators, self.random_states)
        try:
            yield
        finally:
            _set_states(self.generators, states)

    def differentiate(
        self, output: Tensor, leaves: Params, wrt: Sequence[str], **options
    ) -> Params:
        """The gradient of `output`, which came of `evaluate`, by the leaves that `wrt` names."""
        inputs = {name: leaves[name] for name in wrt}
        try:
            with self._refusing_old_parameters(output, leaves):
                return gradient(output, inputs, **options)
        except RuntimeError as error:
            reason, _, _ = str(error).partition("\n")
            if "through the graph a second time" in reason:
                raise ValueError(
                    f"{self.label}: the graph of its value is used up. Either it calls backward() "
                    "itself, or it keeps a part of the graph from an earlier call"
                ) from None
            lacking = ("not implemented", "differentiate twice", "double backward")
            if not any(words in reason for words in lacking):
                raise
            advice = "hvp='finite' needs first derivatives alone"
            raise NotImplementedError(f"{self.label}: {reason} ({advice})") from None

    def _refusing_old_parameters(
        self, output: Tensor, leaves: Params
    ) -> contextlib.AbstractContextManager:
        """A guard for the first backward pass at the origin, and for the first away from it.

        Later ones do the same.
        """
        if len(self.guarded) == 2 or not output.requires_grad:
            return contextlib.nullcontext()
        replaced = []
        for name, t in leaves.items():
            if t.data_ptr() != self.origin[name].data_ptr():
                replaced.append(self.origin[name])
        place = "elsewhere" if replaced else "origin"
        if place in self.guarded:
            return contextlib.nullcontext()
        self.guarded.add(place)
        current = {**self.origin, **leaves}.values()
        return _NoOldParameters(self.label, output, current, replaced)

    def value_and_gradient(self, point: Params, wrt: Sequence[str]) -> tuple[Tensor, Params]:
        """The loss and its first-order gradient by the tensors that `wrt` names."""
        value, leaves = self.evaluate(point, wrt)
        gradients = self.differentiate(value, leaves, wrt)
        total = self.sum_over_processes({"value": value.detach(), **gradients})
        value = total.pop("value")
        return value, total

    def sum_over_processes(self, tensors: Params) -> Params:
        if self.reduce is None:
            return tensors
        return self.reduce({name: t.clone() for name, t in tensors.items()})  # it may work in place

    def require_paths(self, point: Params, groups: list[str], allow_unused: bool) -> None:
        """ValueError if autograd finds no path from the loss to a group (unless allowed).

        A group is the first part of names of the point, or several such: "phi", "theta or psi".
        """
        value, leaves = self.evaluate(point, list(point))
        reached = {name.partition(".")[0] for name in _reached(value, leaves)}
        for group in groups:
            if reached.isdisjoint(group.split(" or ")) and not allow_unused:
                raise ValueError(
                    f"no path from {self.label} to {group}: functional_call, not encoder(x)? "
                    "See allow_unused"
                )


class _NoOldParameters(TorchFunctionMode):
    """Refuses a backward pass that reads parameters which the point of the pass has replaced.

    Checkpointing within a module computes its activations anew in the backward pass, when
    functional_call has put the module's own parameters back: at another point these are wrong.
    Such are those that the caller gave as theta, psi or phi, and those that the forward pass has
    not met, where the caller gave copies.
    """

    def __init__(
        self,
        label: str,
        output: Tensor,
        current: Iterable[Tensor],
        replaced: list[Tensor],
    ):
        super().__init__()
        self.label = label
        self.output = output
        self.replaced = {t.data_ptr() for t in replaced if t.numel()}
        self.current = {t.data_ptr() for t in current}.difference(self.replaced)
        self.met_forward = None  # ids of the leaves of the graph, as soon as they are asked for

    def is_old(self, t) -> bool:
        """Whether this is a module's own Parameter, where the loss was given another tensor."""
        if type(t) is not torch.nn.Parameter:
            return False
        place = t.data_ptr()
        if place in self.replaced:
            return True
        if place in self.current:
            return False
        if not t.requires_grad or not torch.is_grad_enabled():
            # The graph has no constants: of these it cannot say whether the forward pass met them.
            return False
        if self.met_forward is None:
            self.met_forward = _leaf_ids(self.output)
        return id(t) not in self.met_forward

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.autograd.grad:
            # torch takes a mode away while this function runs, unless it is given no tensors but
            # edges of the graph.
            outputs, inputs = args
            with self:
                return function(_edges(outputs), _edges(inputs), **kwargs)
        for t in [*args, *(kwargs or {}).values()]:
            if self.is_old(t):
                raise ValueError(
                    f"{self.label} recomputes activations in its backward pass with a module's own "
                    "parameters: checkpoint(lambda theta: functional_call(net, theta, x), theta)"
                )
        return function(*args, **(kwargs or {}))


def _edges(tensors: Sequence[Tensor]) -> list:
    return [get_gradient_edge(t) for t in tensors]


def _reached(value: Tensor, leaves: Params) -> set[str]:
    """The names of the leaves to which the graph of `value` leads."""
    leaf_ids = _leaf_ids(value)
    return {name for name, t in leaves.items() if id(t) in leaf_ids}


def _leaf_ids(value: Tensor) -> set[int]:
    """The ids of all leaves to which the graph of `value` leads."""
    if not value.requires_grad:
        return set()
    first = get_gradient_edge(value).node
    seen = {first}
    to_visit = [first]
    leaf_ids = set()
    while to_visit:
        node = to_visit.pop()
        if hasattr(node, "variable"):  # the node of a leaf
            leaf_ids.add(id(node.variable))
        for before, _ in node.next_functions:
            if before is not None and before not in seen:
                seen.add(before)
                to_visit.append(before)
    return leaf_ids


def _autocast_of_caller(device_type: str) -> dict | None:
    """The options of torch.autocast as it is now; None where it is off.

    Without its cache, which would keep copies of the parameters of all passes until the end.
    """
    available = torch.amp.is_autocast_available(device_type)
    if not available or not torch.is_autocast_enabled(device_type):
        return None
    dtype = torch.get_autocast_dtype(device_type)
    return {"device_type": device_type, "dtype": dtype, "cache_enabled": False}


def _autocast(options: dict | None, enabled: bool) -> contextlib.AbstractContextManager:
    """The caller's autocast turned on or off, or nothing where the caller has none."""
    if options is None:
        return contextlib.nullcontext()
    return torch.autocast(**options, enabled=enabled)


def _generators(device: torch.device) -> list:
    """The random generators that a loss on this device draws from: the CPU's and the device's."""
    generators = [torch.default_generator]
    if device.type == "cpu":
        return generators
    module = torch.get_device_module(device)
    if hasattr(module, "default_generators"):
        generators.append(module.default_generators[device.index])
    elif hasattr(module, "get_rng_state"):  # torch.mps has one, by way of two functions
        generators.append(
            SimpleNamespace(get_state=module.get_rng_state, set_state=module.set_rng_state)
        )
    return generators


def _set_states(generators: list, states: list[Tensor]) -> None:
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)


def _derivatives(
    loss: _RepeatableLoss,
    point: Params,
    moving: list[str],
    hvp: str,
    step: float | None,
    doubts: "_Doubts",
) -> "_ExactDerivatives | _FiniteDerivatives":
    """The gradient of a loss at a point by what moves, and its derivatives along directions."""
    if hvp == "exact":
        return _ExactDerivatives(loss, point, moving)
    return _FiniteDerivatives(loss, point, moving, step, doubts)


class _ExactDerivatives:
    """By double backward: one graph of the gradient, as a vector, serves every direction."""

    def __init__(self, loss: _RepeatableLoss, point: Params, moving: list[str]):
        self.loss = loss
        value, self.leaves = loss.evaluate(point, list(point))
        self.moving = {name: self.leaves[name] for name in moving}
        self.graph = _flat(loss.differentiate(value, self.leaves, moving, create_graph=True))

    def gradient(self) -> Params:
        gradients = _unflat(self.graph.detach(), self.moving)
        return self.loss.sum_over_processes(gradients)

    def along(self, direction: Tensor, wrt: list[str]) -> Params:
        """d/dε ∇_wrt loss(point + ε·direction) at ε = 0, as ∇_wrt ⟨direction, ∇loss⟩."""
        change = self.loss.differentiate(
            self.graph, self.leaves, wrt, grad_outputs=direction, retain_graph=True
        )
        return self.loss.sum_over_processes(change)


class _FiniteDerivatives:
    """By central differences: a first-order gradient at each of two points on the direction."""

    FEWEST_UNITS = 8  # a step has to move numbers by so many units in their last place

    def __init__(
        self,
        loss: _RepeatableLoss,
        point: Params,
        moving: list[str],
        step: float | None,
        doubts: "_Doubts",
    ):
        self.loss = loss
        self.point = point
        self.moving = {name: point[name] for name in moving}
        self.step = step
        self.doubts = doubts

    def gradient(self) -> Params:
        _, gradients = self.loss.value_and_gradient(self.point, list(self.moving))
        return gradients

    def along(self, direction: Tensor, wrt: list[str]) -> Params:
        """d/dε ∇_wrt loss(point + ε·direction) at ε = 0, up to O(ε²)."""
        # Norms are taken of the direction over its largest entry, so that no square overflows.
        # Nothing here waits for the device: where the direction is zero, so is the result.
        if not self.moving:
            return {name: torch.zeros_like(self.point[name]) for name in wrt}
        tiny = torch.finfo(direction.dtype).tiny
        largest = direction.abs().max().clamp(min=tiny)
        scaled = direction / largest
        length = scaled.norm().clamp(min=tiny)
        unit = scaled / length
        origin = _flat(self.moving)
        step = self._step(origin, unit, wrt)
        ahead = self._gradient_at(origin + step * unit, wrt)
        behind = self._gradient_at(origin - step * unit, wrt)
        scale = largest * length / (2 * step)
        return {name: (ahead[name] - behind[name]) * scale for name in wrt}

    def _step(self, origin: Tensor, unit: Tensor, wrt: list[str]) -> Tensor | float:
        """The length of the step along a direction of length 1, to each side.

        Its error is about (step / size)² from the third derivative, and machine epsilon · size /
        step from rounding, the size being that of the numbers which the direction moves: the sum
        is least at the cube root of epsilon, times the size. Epsilon is that of the coarsest
        dtype among what moves and what is differentiated.
        """
        tensors = [*self.moving.values(), *(self.point[name] for name in wrt)]
        eps = max(torch.finfo(t.dtype).eps for t in tensors)
        size = (origin.abs() @ unit.abs()).clamp(min=1)
        if self.step is None:
            return eps ** (1 / 3) * size
        self.doubts.refuse_if(self.step < self.FEWEST_UNITS * eps * size, _Doubts.STEP_TOO_SHORT)
        return self.step

    def _gradient_at(self, displaced: Tensor, wrt: list[str]) -> Params:
        point = {**self.point, **_unflat(displaced, self.moving)}
        _, gradients = self.loss.value_and_gradient(point, wrt)
        return gradients


def gradient(
    output: Tensor,
    inputs: Params,
    *,
    grad_outputs: Tensor | None = None,
    create_graph: bool = False,
    retain_graph: bool | None = None,
) -> Params:
    """torch.autograd.grad for a dict: the gradient of `output` by each of `inputs`, by name.

    Inputs that the output does not depend on get zeros. The keywords are torch.autograd.grad's.
    """
    if not output.requires_grad or not inputs:
        return {name: torch.zeros_like(t) for name, t in inputs.items()}
    if grad_outputs is None:
        grad_outputs = torch.ones_like(output)
    slopes = torch.autograd.grad(
        output,
        list(inputs.values()),
        grad_outputs=grad_outputs,
        create_graph=create_graph,
        retain_graph=retain_graph,
        allow_unused=True,
    )
    gradients = {}
    for (name, t), g in zip(inputs.items(), slopes, strict=True):
        if g is None:
            g = torch.zeros_like(t)
        if g.layout != torch.strided:
            raise ValueError(f"the gradient of {name} is sparse: nn.Embedding(sparse=False)")
        gradients[name] = g
    return gradients


def _join(**groups: Params) -> Params:
    """Several dicts as one point, detached: _join(theta={"w": t}) is {"theta.w": t}."""
    point = {}
    for group, params in groups.items():
        for name, t in _named(group, params).items():
            point[name] = t.detach()
    return point


def _named(group: str, params: Params) -> Params:
    return {f"{group}.{name}": t for name, t in params.items()}


def _part(point: Params, group: str) -> Params:
    """One of the dicts that `_join` made a point of."""
    prefix = group + "."
    return {name.removeprefix(prefix): t for name, t in point.items() if name.startswith(prefix)}


def _flat(params: Params, names: Sequence[str] | None = None) -> Tensor:
    """The tensors as one vector, in the order of the dict or of `names`.

    It has their dtype, but not that of a half precision, in which sums of many numbers are lost.
    """
    if names is None:
        names = list(params)
    pieces = [params[name].flatten() for name in names]
    if not pieces:
        return torch.empty(0)
    vector = torch.cat(pieces)
    if vector.dtype.itemsize < 4:
        return vector.float()
    return vector


def _unflat(vector: Tensor, like: Params) -> Params:
    """A vector in pieces, with names, shapes and dtypes of `like`."""
    pieces = vector.split_with_sizes([t.numel() for t in like.values()])
    return {
        name: piece.view_as(t).to(t.dtype)
        for piece, (name, t) in zip(pieces, like.items(), strict=True)
    }


def _normal(*shape: int, like: Tensor, seed: int) -> Tensor:
    """Standard normal numbers that depend on the seed alone, not on the device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    numbers = torch.randn(*shape, generator=generator, dtype=like.dtype, device="cpu")
    return numbers.to(like.device)


def _first_values(losses: Sequence[_RepeatableLoss]) -> Params:
    """The value of each loss in its first pass, by its place among them, if it was called."""
    values = {}
    for number, loss in enumerate(losses, 1):
        if loss.value is not None:
            name = f"step {number}" if len(losses) > 1 else ""
            values[name] = loss.value
    return values


def _largest_entries(**results: Params) -> dict[str, dict[str, float]]:
    """The largest |number| of each tensor of each result. The host waits for the device, once."""
    keys = []
    maxima = []
    for label, tensors in results.items():
        for name, t in tensors.items():
            if t.numel():
                keys.append((label, name))
                maxima.append(t.abs().max())
    sizes = {label: {} for label in results}
    for (label, name), size in zip(keys, torch.stack(maxima).tolist(), strict=True):
        sizes[label][name] = size
    return sizes


def _raise_if_not_finite(sizes: dict[str, dict[str, float]]) -> None:
    """FloatingPointError that names the first result with a size that is infinite or no number."""
    for label, by_name in sizes.items():
        bad = [name for name, size in by_name.items() if not size < torch.inf]
        if bad:
            names = f": {', '.join(bad)}" if bad != [""] else ""
            raise FloatingPointError(f"{label} is not finite{names}")


def _all_zero(sizes: dict[str, float]) -> bool:
    return not any(sizes.values())


class _Doubts:
    """What the caller is to be told in the end, or what is refused then.

    Some of it only the device knows when it comes up. It is kept as a flag there, so that nothing
    has to wait for it before the results themselves are looked at.
    """

    THETA_NOT_REACHED = (
        "pretrain_loss does not depend on all of theta. A module that is called directly, not by "
        "functional_call, and a reentrant checkpoint hide parameters; allow_unused=True, if it is "
        "meant. Without a path"
    )
    PHI_NOT_REACHED = (
        "pretrain_loss does not depend on all of phi, and the gradient of the rest is 0. item(), "
        "float() and what is computed outside of the loss hide a parameter; allow_unused=True, if "
        "it is meant. Without a path"
    )
    NO_BETTER_THAN_ZERO = (
        "‖Hq − v‖ ≥ ‖v‖: q is no better than 0; where H is indefinite, damping helps; or a loss "
        "draws random numbers from elsewhere than torch's default generators"
    )
    NO_CURVATURE = (
        "the solver met a direction along which H has no positive curvature, and left it out: "
        "damping helps"
    )
    SINGULAR = "the solver met a singular H (up to rounding), and q is noise: damping helps"
    NEUMANN_GROWS = (
        "neumann moves away from H⁻¹v: H has negative curvature (damping helps), or alpha is too "
        "large; or a loss draws random numbers from elsewhere than torch's default generators"
    )
    STEP_TOO_SHORT = (
        "Solver.step is too short for the dtypes of theta, psi and phi: a longer one, or None"
    )

    def __init__(self):
        self.texts = []
        self.flags = {}  # by text
        self.refusals = set()  # those of the flags' texts that are errors

    def add(self, text: str) -> None:
        if text not in self.texts:
            self.texts.append(text)

    def add_if(self, flag: Tensor, text: str) -> None:
        flag = flag.float()
        if text in self.flags:
            flag = torch.maximum(flag, self.flags[text])
        self.flags[text] = flag

    def refuse_if(self, flag: Tensor, text: str) -> None:
        self.refusals.add(text)
        self.add_if(flag, text)

    def settle(self, sizes: dict[str, float]) -> None:
        """Takes the flags as the host has them now."""
        for text, size in sizes.items():
            if size and text in self.refusals:
                raise ValueError(text)
            if size:
                self.add(text)


def _with_zeros(params: Params, like: Params) -> Params:
    """`params`, and zeros for what of `like` is not among them, in the order of `like`."""
    return {
        name: params[name] if name in params else torch.zeros_like(t) for name, t in like.items()
    }


def _moving(theta: Params) -> Params:
    """What of theta PT moves: the tensors that require a gradient or, where none does, all."""
    tracked = {name: t for name, t in theta.items() if t.requires_grad}
    return tracked or theta


def _check_arguments(
    theta: Params,
    psi: Params,
    phi: Params,
    solver: Solver,
    q0: Params | None,
    preconditioner: Callable[[Params], Params] | None,
) -> None:
    """TypeError or ValueError for what can be told before anything is computed."""
    for name, params in {"theta": theta, "psi": psi, "phi": phi, "q0": q0 or {}}.items():
        if not isinstance(params, dict):
            kind = type(params).__name__
            raise TypeError(f"{name} is {kind}, expected dict(module.named_parameters()) or such")
        for key, t in params.items():
            if not isinstance(key, str):
                raise TypeError(f"{name} has a tensor of the name {key!r}, expected a string")
            if not isinstance(t, Tensor):
                raise TypeError(f"{name}.{key} is {type(t).__name__}, expected a tensor")
    for name, params in {"theta": theta, "phi": phi}.items():
        if not params:
            raise ValueError(f"{name} is empty, expected parameters")
    if torch.is_inference_mode_enabled():
        raise ValueError("autograd records nothing in torch.inference_mode(); no_grad() will do")
    if getattr(torch.nn.utils.parametrize, "_cache_enabled", 0):
        raise ValueError("parametrize.cached() keeps weights of earlier passes: call it outside")
    variables = {**_named("theta", _moving(theta)), **_named("psi", psi), **_named("phi", phi)}
    for name, t in variables.items():
        if torch.nn.parameter.is_lazy(t):
            raise ValueError(f"{name} has no shape yet: call its module once")
        if t.is_inference():
            raise ValueError(f"{name} was made in torch.inference_mode(): clone it outside")
        _require(t.is_floating_point(), name, t.dtype, "real floating-point numbers")
        _require(t.layout == torch.strided, name, t.layout, "torch.strided (to_dense())")
    first_name, first = next(iter(variables.items()))
    name_at = {}
    for name, t in variables.items():
        if t.device != first.device:
            raise ValueError(f"{name} is on {t.device}, but {first_name} on {first.device}")
        # Two variables at one place in memory would count as two where there is one. As starting
        # points of two groups, such as of θ and ψ, they are two.
        group, _, _ = name.partition(".")
        place = (group, t.data_ptr(), t.shape, t.stride())
        other = name_at.setdefault(place, name)
        if other != name and t.numel() and t.data_ptr():
            raise ValueError(f"{other} and {name} are one tensor: give it once, or clone it")
    if solver.hvp == "finite":
        # Gradients in half precision have two or three digits, their small differences none. Of
        # phi they are the result, of theta what every solver but "identity" goes on from.
        differenced = [name for name in variables if name.startswith("phi.")]
        if solver.method != "identity":
            differenced += [name for name in variables if name.startswith("theta.")]
        for name in differenced:
            dtype = variables[name].dtype
            fits = dtype.itemsize >= 4
            _require(fits, name, dtype, f"float32 or float64 with {solver.method} and hvp='finite'")
    method = solver.method
    if q0 is not None:
        if method not in ("cg", "neumann"):
            raise ValueError(f"q0 is of use to 'cg' and 'neumann', not to {method!r}")
        missing = [name for name in _moving(theta) if name not in q0]
        if missing:
            raise ValueError(f"q0 has no {', '.join(missing)}, which theta has")
    if preconditioner is not None and method not in ("cg", "identity"):
        raise ValueError(f"preconditioner is of use to 'cg' and 'identity', not to {method!r}")


# ------------------------------------------------------------------------------------------------
# 3. What an experiment is: its settings, its networks, its domain

import abc
import concurrent.futures
import concurrent.futures.process
import contextlib
import copy
import csv
import dataclasses
import difflib
import errno
import functools
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import multiprocessing
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import typing
from pathlib import Path
from typing import Annotated, Any, ClassVar

import filelock
import numpy as np
import rich.box
import rich.console
import rich.progress
import rich.table
import rich.text
import torch.nn.functional as F
import typer
from torch import nn


class BadInput(Exception):
    """Something that the user gave cannot be used. The text is one line: what, and where."""


class Failed(Exception):
    """The run cannot go on, although nothing was wrong with what the user gave. One line, too."""


class Check(NamedTuple):
    """What the value of a setting must be: a test, and the same in words for a message."""

    holds: Callable[[Any], bool]
    expected: str


def one_of(*values: str) -> Check:
    words = ", ".join(value or "nothing" for value in values)
    return Check(lambda value: value in values, f"one of {words}")


ANYTHING = Check(lambda value: True, "anything")
AT_LEAST_0 = Check(lambda value: value >= 0, "0 or more")
AT_LEAST_1 = Check(lambda value: value >= 1, "1 or more")
POSITIVE = Check(lambda value: value > 0, "positive")
POSITIVE_IF_GIVEN = Check(lambda value: value is None or value > 0, "positive")
AT_LEAST_0_IF_GIVEN = Check(lambda value: value is None or value >= 0, "0 or more")
BELOW_1 = Check(lambda value: 0 <= value < 1, "at least 0 and less than 1")
SHARE = Check(lambda value: 0 < value <= 1, "more than 0 and at most 1")
SEED = Check(lambda value: 0 <= value < 2**32, "0 to 2**32 - 1")
SCOPE = one_of("head", "all")
SIZES = Check(re.compile(r"(\d{1,9}(,\d{1,9})*)?").fullmatch, "numbers such as 30,100,300")

# The groups under which `--help` lists settings.
RUN = "Run"
PRETRAINING = "Pre-training"
UNROLLING = "Fine-tuning in the meta step"
LEARNING = "Learning φ"
MEASURING = "Measuring"
OWN = "Of this domain"
GROUPS = (RUN, PRETRAINING, UNROLLING, LEARNING, MEASURING, OWN)


def setting(
    default,
    help: str,
    group: str = OWN,
    check: Check = ANYTHING,
    learning: bool | None = None,
    data: bool = False,
):
    """A field of `Settings`: an attribute in Python, an option on the command line.

    Args:
        help: what `--help` says of it.
        group: under which heading `--help` lists it.
        check: what its value must be.
        learning: whether it matters to `meta` alone, so that `pretrain` has no such option. None:
            if it is of the groups UNROLLING and LEARNING.
        data: whether it decides what the data are. Runs that are compared must agree on it.
    """
    if learning is None:
        learning = group in (UNROLLING, LEARNING)
    description = {
        "help": help,
        "group": group,
        "check": check,
        "learning": learning,
        "data": data,
    }
    return dataclasses.field(default=default, metadata=description)


@dataclass(frozen=True)
class Settings:
    """Every knob of an experiment. A domain extends this class where it wants other ones.

        @dataclass(frozen=True)
        class MySettings(metapt.Settings):
            steps: int = 500                                         # another default
            width: int = metapt.setting(64, "Features of the encoder")     # a knob of its own

    A field that is declared again for another default keeps its help and its check.

    Raises:
        BadInput: a value that cannot be, or values that do not fit each other.
    """

    seed: int = setting(0, "Of everything random", RUN, SEED, data=True)

    steps: int = setting(1000, "PT steps", PRETRAINING, AT_LEAST_1)
    batch_size: int = setting(64, "PT examples a step", PRETRAINING, AT_LEAST_1)
    lr: float = setting(1e-3, "Learning rate of PT (Adam)", PRETRAINING, POSITIVE)
    cosine: bool = setting(
        default=False, help="That rate falls to 0 along a cosine", group=PRETRAINING
    )
    precision: str = setting(
        "float32",
        "Of the networks' passes in losses: float32, or bf16 (autocast)",
        PRETRAINING,
        one_of("float32", "bf16"),
    )

    unroll_steps: int = setting(1, "K: FT steps", UNROLLING, AT_LEAST_0)
    unroll_scope: str = setting("head", "What they move: head or all", UNROLLING, SCOPE)
    unroll_lr: float = setting(
        1e-2, "Learning rate of FT, in these steps and beside PT", UNROLLING, POSITIVE
    )
    unroll_batch_size: int = setting(64, "FT examples a step", UNROLLING, AT_LEAST_1)
    unroll_hvp: str = setting(
        "",
        "Derivatives of these steps: exact or finite; else as --hvp",
        UNROLLING,
        one_of("", "exact", "finite"),
    )
    validation_batch_size: int = setting(250, "Validation examples in L_V", UNROLLING, AT_LEAST_1)
    validate_on: str = setting(
        "validation",
        "Labels that L_V is over: validation, or all (FT's too)",
        UNROLLING,
        one_of("validation", "all"),
    )

    warmup: int | None = setting(
        None,
        "PT steps of a round before its first meta step; else as --warmup-share",
        LEARNING,
        AT_LEAST_0_IF_GIVEN,
    )
    warmup_share: float = setting(0.1, "The same as a share of the PT steps", LEARNING, BELOW_1)
    meta_every: int = setting(10, "P: PT steps between two meta steps", LEARNING, AT_LEAST_1)
    meta_batch_size: int = setting(256, "PT examples a meta step", LEARNING, AT_LEAST_1)
    meta_lr: float = setting(1e-3, "Learning rate of φ (Adam)", LEARNING, POSITIVE)
    meta_lr_decay: float = setting(
        1.0, "What that rate falls to, as a share of it", LEARNING, POSITIVE
    )
    average: float = setting(
        0.0, "Share of a round, at its end, over which φ is averaged", LEARNING, BELOW_1
    )
    rounds: int = setting(
        1, "Times that PT begins anew while φ goes on; --steps are of one", LEARNING, AT_LEAST_1
    )
    solver: str = setting(
        "identity",
        "How q is found: identity, neumann, cg or nystrom",
        LEARNING,
        one_of("identity", "neumann", "cg", "nystrom"),
    )
    terms: int = setting(1, "Neumann terms, CG iterations or Nyström rank", LEARNING, AT_LEAST_0)
    preconditioner: str = setting(
        "auto",
        "adam: the metric of PT's Adam, for identity and cg; auto: for identity; else none",
        LEARNING,
        one_of("auto", "adam", ""),
    )
    metric_eps: float = setting(
        1e-8, "ε of that metric, added to the root of Adam's second moment", LEARNING, POSITIVE
    )
    alpha: float | None = setting(
        None, "Step size of neumann; else estimated", LEARNING, POSITIVE_IF_GIVEN
    )
    damping: float = setting(0.0, "Added to the diagonal of PT's Hessian", LEARNING, AT_LEAST_0)
    hvp: str = setting(
        "exact", "Hessian-vector products: exact or finite", LEARNING, one_of("exact", "finite")
    )
    hvp_step: float | None = setting(
        None, "Norm of a finite step; else the dtype's", LEARNING, POSITIVE_IF_GIVEN
    )

    compare: int = setting(3, "Seeds of the comparison; 0: none", MEASURING, AT_LEAST_0)
    sizes: str = setting("", "FT-set sizes, as 30,100; else the domain's", MEASURING, SIZES)
    measure_scope: str = setting("head", "What this FT moves: head or all", MEASURING, SCOPE)
    measure_lr: float | None = setting(
        None, "Its learning rate; else 0.01 (head), 0.001 (all)", MEASURING, POSITIVE_IF_GIVEN
    )
    measure_steps: int = setting(500, "Its steps, the best of 25 looks", MEASURING, AT_LEAST_1)
    measure_epochs: int = setting(0, "Its epochs, in place of steps", MEASURING, AT_LEAST_0)
    measure_batch_size: int = setting(64, "Its examples a step", MEASURING, AT_LEAST_1)

    def __post_init__(self):
        for knob in knobs_of(type(self)).values():
            self.check_alone(knob)
        self.check_together()

    def check_alone(self, knob: "Knob") -> None:
        """BadInput where the value of one setting cannot be."""
        value = getattr(self, knob.name)
        an_integer_will_do = float in knob.kinds and type(value) is int
        words = " or ".join(kind.__name__ for kind in knob.kinds)
        self.require(type(value) in knob.kinds or an_integer_will_do, knob.name, words)
        if float in knob.kinds and value is not None:
            # float32 ends at 3e38, and Adam multiplies a rate by ten.
            self.require(abs(value) <= 1e30, knob.name, "a finite number, at most 1e30 in size")
        self.require(knob.check.holds(value), knob.name, knob.check.expected)

    def check_together(self) -> None:
        """BadInput where settings do not fit each other."""
        if self.warmup is not None:
            self.require(self.warmup <= self.steps, "warmup", f"at most the {self.steps} steps")
        if self.precision == "bf16" and self.hvp_step is not None:
            words = f"{BF16_STEP} or more with --precision bf16"
            self.require(self.hvp_step >= BF16_STEP, "hvp_step", words)
        if self.solver == "nystrom":
            self.require(self.damping > 0, "damping", "positive with --solver nystrom")
        if self.preconditioner == "adam":
            fits = self.solver in ("identity", "cg")
            self.require(fits, "preconditioner", f"nothing with --solver {self.solver}")
        try:
            # They check their own fields.
            _ = self.unroll
            _ = self.inverse
        except ValueError as error:
            raise BadInput(str(error)) from None

    def require(self, condition, name: str, expected: str) -> None:
        """BadInput, which names the setting and what was expected of it, unless `condition`."""
        if not condition:
            raise BadInput(f"{flag(name)} is {getattr(self, name)!r}, expected {expected}")

    @property
    def warmup_steps(self) -> int:
        """PT steps before the first meta step."""
        if self.warmup is not None:
            return self.warmup
        return round(self.warmup_share * self.steps)

    @property
    def unroll(self) -> Unroll:
        """The FT steps of a meta step; the FT step beside each PT step is one of them."""
        return Unroll(
            steps=self.unroll_steps,
            lr=self.unroll_lr,
            optimizer="adam",
            scope=self.unroll_scope,
            hvp=self.unroll_hvp or None,
        )

    @property
    def has_adam_metric(self) -> bool:
        """Whether the metric of PT's Adam stands in for PT's Hessian, or helps to invert it.

        With q = v alone, what PT has to move far counts as little as what it moves at once.
        """
        by_itself = self.preconditioner == "auto" and self.solver == "identity"
        return by_itself or self.preconditioner == "adam"

    @property
    def inverse(self) -> Solver:
        """How q ≈ (∇²_θθ L_PT)⁻¹ v is found."""
        step = self.hvp_step
        if step is None and self.precision == "bf16":
            step = BF16_STEP
        return Solver(
            method=self.solver,
            terms=self.terms,
            alpha=self.alpha,
            damping=self.damping,
            seed=self.seed,
            hvp=self.hvp,
            step=step,
        )


# The shortest step of finite products under autocast: below it the rounding of gradients tells.
BF16_STEP = 0.1

# Algorithm 1 as Raghu et al. published it; the Neumann step size is the learning rate of PT. It
# names all settings, so that a preset made of it also undoes what a domain has other defaults for.
PUBLISHED = {field.name: field.default for field in dataclasses.fields(Settings)} | {
    "meta_every": 10,
    "unroll_steps": 1,
    "solver": "neumann",
    "terms": 1,
    "preconditioner": "",
    "lr": 1e-3,
    "alpha": 1e-3,
}


class Knob(NamedTuple):
    """One setting, that is, one field of a class of settings, with all that is known of it."""

    name: str
    kinds: tuple[type, ...]  # the types of its values
    default: Any
    help: str
    group: str
    check: Check
    learning: bool
    data: bool


# What a setting cannot be called.
OPTIONS_OF_COMMANDS = (
    "data",
    "device",
    "help",
    "jobs",
    "json",
    "out",
    "phi",
    "preset",
    "resume",
    "use",
)


@functools.cache
def knobs_of(settings_class: type[Settings]) -> dict[str, Knob]:
    """The fields of a class of settings by name, in their order.

    Raises:
        BadInput: the class, or one that it extends, is no dataclass.
    """
    for base in settings_class.__mro__:
        if issubclass(base, Settings) and "__dataclass_fields__" not in vars(base):
            raise BadInput(f"{base.__qualname__} needs @dataclass(frozen=True) above it")
    hints = typing.get_type_hints(settings_class)
    knobs = {}
    for field in dataclasses.fields(settings_class):
        hint = hints[field.name]
        kinds = typing.get_args(hint) or (hint,)
        if field.name in OPTIONS_OF_COMMANDS:
            where = f"{settings_class.__qualname__}.{field.name}"
            raise BadInput(f"{where}: the commands have an option of that name already")
        if not set(kinds) <= {bool, int, float, str, type(None)}:
            where = f"{settings_class.__qualname__}.{field.name}"
            raise BadInput(f"{where} is {hint}, expected bool, int, float or str, or None as well")
        description = description_of(settings_class, field.name)
        knobs[field.name] = Knob(field.name, kinds, field.default, **description)
    return knobs


def description_of(settings_class: type[Settings], name: str) -> dict:
    """What `setting` said of a field, in this class or in the nearest one that it extends."""
    for base in settings_class.__mro__:
        field = vars(base).get("__dataclass_fields__", {}).get(name)
        if field is not None and field.metadata:
            return dict(field.metadata)
    # It was declared without `setting`.
    return dict(setting(None, "").metadata)


def flag(setting_name: str) -> str:
    """A setting as it is written on the command line."""
    return "--" + setting_name.replace("_", "-")


class Network(nn.Module):
    """θ: an encoder, and the head of PT's own task.

    With `features=True` the head is left out: that is what FT puts a head of its own, ψ, on.
    """

    def __init__(self, encoder: nn.Module, head: nn.Module):
        super().__init__()
        self.encoder = encoder
        self.head = head

    def forward(self, *inputs, features: bool = False):
        hidden = self.encoder(*inputs)
        if features:
            return hidden
        return self.head(hidden)


class EncoderWithLogits(nn.Module):
    """An encoder whose features end in the logits of PT's classifier, for FT to take over.

    Use it, with `head_on_logits`, where PT and FT have the same labels. FT with a head of its own
    forgives PT if it takes one class for another, since a new head maps them back: its loss then
    says nothing about such mistakes, and a φ that is learned from it may exchange or drop classes.
    A head that begins as PT's own classifier does not forgive them.
    """

    def __init__(self, encoder: nn.Module, features: int, classes: int):
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(features, classes)

    def forward(self, *inputs) -> Tensor:
        """What the encoder gives, [n, ..., features], with logits behind: features + classes."""
        hidden = self.encoder(*inputs)
        logits = self.classifier(hidden)
        return torch.cat([hidden, logits], dim=-1)


def head_on_logits(features: int, classes: int) -> nn.Linear:
    """The FT head for `EncoderWithLogits`: at first it passes PT's logits on as they are."""
    head = nn.Linear(features + classes, classes)
    nn.init.zeros_(head.bias)
    identity = torch.eye(classes, features + classes)
    head.weight.data = identity.roll(features, dims=1)
    return head


def call(
    module: nn.Module, params: Params, *inputs, train: bool = False, live: bool = False, **options
):
    """`module(*inputs, **options)` with other parameters than its own.

    Losses call networks in this way, so that they are functions of θ, ψ and φ and no pass changes
    what the next one sees.

    Args:
        params: by the names of `module.named_parameters()`.
        train: the module's mode: training, or evaluation.
        live: whether the module's own buffers, such as BatchNorm's running statistics, are used
            and may change. Otherwise the pass works on copies of them.

    Returns:
        What the module gives. Where `module.precision` is "bf16" the pass runs under autocast;
        a tensor that comes out is float32 all the same, as are parameters and gradients.

    Raises:
        KeyError: a name that the module does not have.
    """
    module.train(train)
    buffers = dict(module.named_buffers())
    if not live:
        buffers = {name: buffer.clone() for name, buffer in buffers.items()}
    tensors = under_every_name(module, {**params, **buffers})
    lower_precision = getattr(module, "precision", "float32") == "bf16"
    device_type = next((t.device.type for t in params.values()), "cpu")
    with torch.autocast(device_type, torch.bfloat16, enabled=lower_precision):
        output = torch.func.functional_call(module, tensors, inputs, options, tie_weights=False)
    if lower_precision and isinstance(output, Tensor):
        return output.float()
    return output


def under_every_name(module: nn.Module, tensors: Params) -> Params:
    """The same tensors under each place where the module holds what they replace.

    Weights that two modules share have one name in `named_parameters` and two places. A module
    that stands under two names is one place: functional_call, left to itself, would replace its
    tensors twice and then put the replacement back in place of the Parameter.
    """
    name_by_id = {}
    places = {}
    for path, part in module.named_modules():
        prefix = f"{path}." if path else ""
        tensors_here = itertools.chain(
            part.named_parameters(recurse=False, remove_duplicate=False),
            part.named_buffers(recurse=False, remove_duplicate=False),
        )
        for name, original in tensors_here:
            # Where a tensor is met first has the name that `named_parameters` gives it.
            first_name = name_by_id.setdefault(id(original), prefix + name)
            if first_name in tensors:
                places[prefix + name] = tensors[first_name]
    unknown = set(tensors) - set(name_by_id.values())
    if unknown:
        raise KeyError(f"{type(module).__name__} has no {', '.join(sorted(unknown))}")
    return places


def detached(module: nn.Module) -> Params:
    """A module's parameters by name, as constants that share its memory."""
    return {name: p.detach() for name, p in module.named_parameters()}


def to_device(index: Tensor, device: torch.device) -> Tensor:
    """Example numbers moved to where the data lie, without waiting for that device."""
    if device.type == "cuda":
        # From memory that is not pinned, CUDA's copy would wait.
        index = index.pin_memory()
    return index.to(device, non_blocking=True)


class Domain(abc.ABC):
    """One experiment: its data, its networks θ, ψ and φ, its losses and its metric.

    A subclass sets `sizes`, defines the abstract methods, and redefines others where the default
    does not serve. Data come in parts: "pretrain", "finetune", "validation", and those that `tests`
    names. Examples are known by their number within a part. An `index` is such numbers, int64 of
    shape [n], always on the CPU; data on a GPU are looked up by `to_device(index, self.device)`.

    An example may be anything that `inputs` can put into one batch. For sequences, dimension 0 is
    the example, and all batches of a part must have one length: FT joins the outputs of several
    batches. `loss` and `score` may leave out what is padding.
    """

    Settings: ClassVar[type[Settings]] = Settings
    # Settings that differ from the defaults, by the name of the preset.
    presets: ClassVar[dict[str, dict]] = {}
    # The test parts, and what to call `score` on each; the first is the headline.
    tests: ClassVar[dict[str, str]] = {"test": "accuracy"}
    # What `measure` gives, in words for the axis of a figure.
    captions: ClassVar[dict[str, str]] = {}
    # How many threads of the CPU serve best; None: torch's choice. A comparison, which several
    # processes may share, has one thread for each of them then.
    threads: ClassVar[int | None] = None
    # Whether L_PT is a mean over examples, so that several processes may divide a batch.
    mean_over_examples: ClassVar[bool] = True
    # Parts of which learning φ sees only so many examples, the first ones.
    access: ClassVar[dict[str, int]] = {}
    # How many examples each part has.
    sizes: dict[str, int] = {}
    # The sizes of FT sets that comparisons show; None: all FT examples, and a tenth of them.
    finetune_sizes: tuple[int, ...] | None = None

    def __init__(self, settings: Settings, device: torch.device, data: Path):
        """`data` is the folder under which prepared data lie. Here torch is seeded."""
        self.settings = settings
        self.device = device
        self.data_folder = data
        # For a process that makes it once more: their number has a say in how sums are rounded.
        self.threads_here = torch.get_num_threads()
        torch.manual_seed(settings.seed)

    @abc.abstractmethod
    def network(self) -> Network:
        """θ as it begins, freshly drawn, on `device`. What requires no gradient stays frozen."""

    @abc.abstractmethod
    def head(self) -> nn.Module:
        """ψ as it begins: the FT head, from the encoder's features to FT's outputs."""

    @abc.abstractmethod
    def meta(self) -> nn.Module:
        """φ as it begins: a module whose parameters are what is learned."""

    @abc.abstractmethod
    def inputs(self, part: str, index: Tensor):
        """What the encoder takes, for these examples of a part."""

    @abc.abstractmethod
    def targets(self, part: str, index: Tensor) -> Tensor:
        """What FT should predict for them."""

    @abc.abstractmethod
    def pretrain_loss(
        self, network: Network, meta: nn.Module, index: Tensor, progress: float, live: bool
    ) -> Loss:
        """L_PT(θ, φ) as a function of two dicts, on the PT examples `index`.

        That function is called several times and must be the same each time. What it draws from
        torch's default random generators is drawn alike in each call; other random numbers must
        be drawn here, before it is returned.

        Args:
            progress: how much of the run after the warm-up is over, 0 to 1.
            live: True once before each PT step, when buffers may change (see `call`); False when
                the loss is one of a meta step, which repeats it at several points.

        Where φ is the shares in which several sources are drawn, the draw itself has no
        derivative. Ignore `index` then: for a PT step (`live`) draw examples by φ; for a meta step
        draw them evenly, and weigh each by its source's share, whose mean is the same loss.
        """

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """FT's loss, averaged over examples."""
        return F.cross_entropy(outputs, targets)

    def score(self, outputs: Tensor, targets: Tensor) -> float:
        """FT's metric: the higher the better, 1 at most."""
        return (outputs.argmax(1) == targets).double().mean().item()

    def finetune_loss(self, network: Network, head: nn.Module, part: str, index: Tensor) -> Loss:
        """L_FT(θ, ψ) as a function of two dicts; on the validation part it is L_V.

        Everything is in evaluation mode.
        """
        inputs = self.inputs(part, index)
        targets = self.targets(part, index)

        def loss(theta: Params, psi: Params) -> Tensor:
            features = call(network, theta, inputs, features=True)
            return self.loss(call(head, psi, features), targets)

        return loss

    def finetune_limits(self) -> tuple[int, int]:
        """The smallest and the largest FT set that there can be."""
        return 1, self.sizes["finetune"]

    def finetune_split(self, examples: int) -> tuple[int, int]:
        """How many FT and how many validation examples make an FT set of this size."""
        return examples, self.sizes["validation"]

    def finetune_mode(self, network: Network) -> None:
        """Puts a network into the mode in which FT of everything trains it."""
        network.eval()

    def data_digest(self) -> str:
        """A text that differs for other data: a run is continued and measured on its own data.

        By default it is of `sizes` and of the settings that are marked as data. A domain that reads
        files has it say what was in them.
        """
        knobs = knobs_of(type(self.settings)).values()
        values = [getattr(self.settings, knob.name) for knob in knobs if knob.data]
        described = json.dumps([self.sizes, values], sort_keys=True)
        return hashlib.sha256(described.encode()).hexdigest()

    def phi_rates(self, meta: nn.Module) -> dict[str, float]:
        """The learning rate of each parameter of φ, by name."""
        return {name: self.settings.meta_lr for name, _ in meta.named_parameters()}

    def backward(self, value: Tensor, theta: Params) -> None:
        """From the PT loss of a step to the gradients of θ, which are left in `grad`.

        A domain that redefines it may have a loss of several numbers, one for each of its tasks;
        φ is not learned by such a loss.
        """
        value.backward()

    def begin_episode(self, meta: nn.Module) -> None:
        """Called before the P PT steps of an episode, and before a loss is looked at otherwise."""

    def measure(self, meta: nn.Module) -> dict[str, float | None]:
        """φ along the run, as numbers: they are logged each episode, and phi.png draws them.

        By default each parameter that is one number, and of larger ones the ten largest entries;
        where `table` gives φ names, its ten largest rows.
        """
        table = self.table(meta)
        if table is not None:
            _, rows = table
            return ten_largest({str(row[0]): float(row[-1]) for row in rows})
        values = {}
        for name, p in detached(meta).items():
            if p.numel() == 1:
                values[name] = p.item()
            else:
                entries = enumerate(p.flatten().tolist())
                values |= ten_largest({f"{name}[{i}]": entry for i, entry in entries})
        return values

    def facts(self, meta: nn.Module) -> dict:
        """Numbers that the summary has besides φ itself."""
        return {}

    def table(self, meta: nn.Module) -> tuple[list[str], list[tuple]] | None:
        """φ by name, written to phi.csv: the names of the columns, and rows. None: no names.

        The first column has the names, the last column φ.
        """
        return None

    def phi_from_table(self, values: list[float]) -> dict[str, Tensor] | None:
        """The inverse of `table`: φ's state dict, from the last column. None: there is none."""
        return None

    def figures(self, meta: nn.Module) -> dict[str, Callable]:
        """Figures of φ: file name to a function that draws on an empty matplotlib Figure."""
        return {}

    def decorate(self, axis) -> None:
        """Adds to the axis of phi.png what only the domain knows."""


def ten_largest(values: dict[str, float]) -> dict[str, float]:
    """The entries of greatest value, in their order."""
    largest = sorted(values, key=values.get, reverse=True)[:10]
    return {name: value for name, value in values.items() if name in largest}


def random_devices(domain: Domain) -> list[torch.device]:
    """For torch.random.fork_rng: where random numbers are drawn besides the CPU."""
    return [domain.device] if domain.device.type == "cuda" else []


@contextlib.contextmanager
def refusing(problem: str, errors: tuple = (OSError, ValueError), becomes: type = BadInput):
    """What fails within becomes one line: the problem, and the last line of the reason."""
    try:
        yield
    except errors as error:
        if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
            raise
        # torch begins with what it did and ends with what was wrong.
        lines = str(error).strip().splitlines()
        reason = lines[-1].strip()[:300] if lines else type(error).__name__
        if isinstance(error, FileNotFoundError):
            reason = "it is missing"
        raise becomes(f"{problem}: {reason}") from None


def read_prepared(
    folder: Path, form: str, prepared_by: str, layout: Callable[[dict], dict]
) -> tuple[dict, dict[str, Tensor]]:
    """Opens a folder that data_scripts/ wrote: about.json, and .npy arrays, which are not read yet.

    Args:
        form: the format that about.json must name.
        prepared_by: the command that writes such a folder, for messages.
        layout: from about.json's content to {array: (dtype such as "<i8", shape as a list)}.

    Returns:
        about.json's content, and the arrays as memory-mapped tensors by name.

    Raises:
        BadInput: the folder is missing, or is not what that command writes.
    """
    path = folder / "about.json"
    if not path.exists():
        raise BadInput(f"{path} is missing: '{prepared_by}' prepares the data")
    problem = f"is not what '{prepared_by}' wrote"
    # The last three: JSON that has another kind of value where an object is expected.
    errors = (OSError, ValueError, RecursionError, TypeError, LookupError, AttributeError)
    with refusing(f"{path} {problem}", errors):
        about = json.loads(path.read_text(encoding="utf-8"))
        if about["format"] != form:
            raise ValueError(f"its format is {about['format']!r}, expected {form!r}")
        expected = {name: (dtype, list(shape)) for name, (dtype, shape) in layout(about).items()}
        described = {name: (a["dtype"], a["shape"]) for name, a in about["arrays"].items()}
        if described != expected:
            raise ValueError("its arrays do not fit its numbers")
    arrays = {}
    for name, (dtype, shape) in expected.items():
        # numpy raises many types for a header that is torn; torch warns of read-only memory.
        with refusing(f"{folder / name}.npy {problem}", Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            values = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            if (values.dtype.str, list(values.shape)) != (dtype, shape):
                raise ValueError(f"{values.dtype.str} {values.shape} does not fit about.json")
            arrays[name] = torch.from_numpy(values)
    return about, arrays


# ------------------------------------------------------------------------------------------------
# 4. The first domain: handwritten digits, PT on images that are rotated by about φ degrees


class RotationMean(nn.Module):
    """φ = the mean, in degrees, of the normal distribution that rotations are drawn from.

    Raghu et al. 2021, section 4.1. A draw is the mean plus noise, so that dL/dφ goes through the
    resampling of the images.
    """

    def __init__(self, degrees: float):
        super().__init__()
        self.rotation_mean_deg = nn.Parameter(torch.tensor(float(degrees)))

    def forward(self, images: Tensor, spread: float) -> Tensor:
        """Images [n, c, h, w], each rotated by a draw from N(φ, spread²) degrees."""
        noise = torch.randn(len(images), device=images.device)
        return rotate(images, self.rotation_mean_deg + spread * noise)


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Images [n, c, h, w] rotated counter-clockwise about their centre by degrees [n].

    Differentiable in both. Bicubic: bilinear resampling blurs all but multiples of 90°, blurred
    images pre-train better, and φ would end beside those multiples.
    """
    angles = degrees * (math.pi / 180)
    cos = angles.cos()
    sin = angles.sin()
    zero = torch.zeros_like(angles)
    row_x = torch.stack([cos, -sin, zero], dim=-1)
    row_y = torch.stack([sin, cos, zero], dim=-1)
    output_to_input = torch.stack([row_x, row_y], dim=1)
    grid = F.affine_grid(output_to_input, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bicubic", align_corners=False)


class SmallCNN(nn.Sequential):
    """An encoder for images [n, 1, h, h], h from 8 to 28, to features [n, features]."""

    def __init__(self, height: int, channels: int, features: int, dropout: float):
        super().__init__()
        second_stride = 1 if height < 16 else 2
        reduced = math.ceil(height / 2)
        if second_stride == 2:
            reduced = math.ceil(reduced / 2)
        self.layers = nn.Sequential(
            # Missing pixels keep PT from learning its examples by heart. Once it has, its loss
            # says nothing about φ any more.
            nn.Dropout(dropout),
            nn.Conv2d(1, channels, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, 2 * channels, 3, stride=second_stride, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * channels * reduced**2, features),
            nn.ReLU(),
        )


class LabelledImages(NamedTuple):
    """What a data set of images has before it is divided into parts."""

    pixels: np.ndarray  # uint8 [n, h, h]
    labels: np.ndarray  # [n]
    white: float  # the value of a white pixel
    sizes: tuple[int, int, int]  # how many of them are for PT, for FT and for validation
    test: tuple[np.ndarray, np.ndarray] | None  # pixels and labels; None: all that remain


@dataclass(frozen=True)
class DigitsSettings(Settings):
    dropout: float = setting(0.5, "Share of an image's pixels that PT does not see", check=BELOW_1)


class Digits(Domain):
    """Classification of scikit-learn's 1,797 scanned digits (8 x 8 pixels), for PT and for FT.

    The parts are drawn by seed, with equal shares of the ten classes: 1,000 images to pre-train,
    300 to fine-tune, 250 to validate, the other 247 to test. A subclass says what φ does to PT.
    """

    Settings = DigitsSettings
    # Networks for 8 x 8 images are over before a second thread has begun.
    threads = 1
    classes: ClassVar[int] = 10
    features: ClassVar[int] = 32

    def __init__(self, settings, device, data):
        super().__init__(settings, device, data)
        from sklearn.model_selection import train_test_split

        images = self.read(data)
        parts = {}
        rest = np.arange(len(images.labels))
        for part, size in zip(("pretrain", "finetune", "validation"), images.sizes, strict=True):
            chosen, rest = train_test_split(
                rest, train_size=size, stratify=images.labels[rest], random_state=settings.seed
            )
            parts[part] = (images.pixels[chosen], images.labels[chosen])
        parts["test"] = images.test or (images.pixels[rest], images.labels[rest])

        self.white = images.white
        self.height = images.pixels.shape[-1]
        self.pixels = {}
        self.labels = {}
        for part, (pixels, labels) in parts.items():
            self.pixels[part] = torch.from_numpy(pixels)[:, None].to(device)
            self.labels[part] = torch.from_numpy(labels).long().to(device)
        self.sizes = {part: len(labels) for part, labels in self.labels.items()}
        self.finetune_sizes = (30, 100, self.sizes["finetune"])
        self.random = np.random.default_rng(settings.seed)

    def read(self, data: Path) -> LabelledImages:
        """All images: here those that scikit-learn brings."""
        from sklearn.datasets import load_digits

        bundle = load_digits()
        pixels = bundle.images.astype(np.uint8)
        return LabelledImages(pixels, bundle.target, 16.0, (1000, 300, 250), test=None)

    def encoder(self) -> nn.Module:
        return SmallCNN(self.height, 16, self.features, self.settings.dropout)

    def network(self):
        return Network(self.encoder(), nn.Linear(self.features, self.classes)).to(self.device)

    def head(self):
        return nn.Linear(self.features, self.classes).to(self.device)

    def inputs(self, part, index):
        return self.pixels[part][to_device(index, self.device)].float() / self.white

    def targets(self, part, index):
        return self.labels[part][to_device(index, self.device)]


@dataclass(frozen=True)
class DigitsRotationSettings(DigitsSettings):
    steps: int = 850
    lr: float = 2e-3
    warmup_share: float = 1 / 17
    # The FT head learns slowly beside PT. Once it fits the features that there are, dL_V/dθ says
    # what its few examples lack and no longer what the encoder does: φ would follow noise.
    unroll_lr: float = 1e-3
    unroll_batch_size: int = 128
    meta_every: int = 4
    meta_batch_size: int = 192
    meta_lr: float = 3.0
    meta_lr_decay: float = 0.1
    average: float = 0.5
    solver: str = "cg"
    terms: int = 3
    damping: float = 1.0
    measure_steps: int = 300

    init_deg: float = setting(30.0, "φ at the start, in degrees")
    target_deg: float = setting(90.0, "Mean rotation of the FT images, in degrees", data=True)
    spread_deg: float = setting(
        60.0, "Spread of PT's rotations; it narrows to 1", check=AT_LEAST_1, learning=True
    )
    narrow: float = setting(1.0, "Share of the run over which it does", check=SHARE, learning=True)


class DigitsRotation(Digits):
    """PT images are rotated by N(φ, 1°), FT images by N(90°, 1°): φ should arrive at 90°."""

    Settings = DigitsRotationSettings
    captions: ClassVar = {"rotation_mean_deg": "mean rotation φ (degrees)"}
    presets: ClassVar = {
        "paper": {**PUBLISHED, "meta_lr": 1.0, "dropout": 0.0, "init_deg": 0.0, "spread_deg": 1.0}
    }

    def __init__(self, settings, device, data):
        super().__init__(settings, device, data)
        for part in ("finetune", "validation", "test"):
            # Once and for all: FT data are data.
            drawn = self.random.normal(settings.target_deg, 1, self.sizes[part])
            degrees = torch.from_numpy(drawn).float().to(device)
            self.pixels[part] = rotate(self.pixels[part].float(), degrees)

    def meta(self):
        return RotationMean(self.settings.init_deg).to(self.device)

    def pretrain_loss(self, network, meta, index, progress, live):
        images = self.inputs("pretrain", index)
        labels = self.targets("pretrain", index)
        # A wide spread early averages the loss over angles, which flattens its lesser optima.
        remaining = max(0.0, 1 - progress / self.settings.narrow)
        spread = self.settings.spread_deg**remaining

        def loss(theta: Params, phi: Params) -> Tensor:
            rotated = call(meta, phi, images, spread, train=True)
            logits = call(network, theta, rotated, train=True, live=live)
            return F.cross_entropy(logits, labels)

        return loss

    def measure(self, meta):
        on_the_circle = (meta.rotation_mean_deg.item() + 180) % 360 - 180
        return {"rotation_mean_deg": on_the_circle}

    def decorate(self, axis):
        for line in axis.lines:
            # Points, since a line would cross the circle's seam.
            line.set(linestyle="", marker=".", markersize=3)
        label = "rotation of the FT images"
        axis.axhline(self.settings.target_deg, color="C3", lw=0.8, ls="--", label=label)
        axis.set(ylim=(-180, 180), yticks=[-180, -90, 0, 90, 180])


# ------------------------------------------------------------------------------------------------
# 5. Algorithm 1: pre-train θ, and every P steps take one step on φ

# So many meta steps in a row without a usable hypergradient end the run.
MANY_SKIPPED = 10
# Episodes of P PT steps between two checkpoints.
CHECKPOINT_EVERY = 20
# From so many FT examples on, the last of FOLDS parts of them is kept from learning φ.
ENOUGH_TO_HOLD_OUT = 1000
FOLDS = 5


def held_out_count(domain: Domain) -> int:
    """How many FT examples, the last ones, learning φ does not see: they judge φ in the end."""
    examples = domain.sizes["finetune"]
    if examples < ENOUGH_TO_HOLD_OUT:
        return 0
    return examples // FOLDS


class Batches:
    """Endless shuffled mini-batches of example numbers, without an epoch's incomplete end."""

    def __init__(self, examples: int, batch_size: int):
        self.examples = examples
        self.batch_size = min(batch_size, examples)
        self.order = torch.randperm(examples, device="cpu")
        self.position = 0

    def next(self) -> Tensor:
        """int64 [batch_size], on the CPU."""
        if self.position + self.batch_size > self.examples:
            self.order = torch.randperm(self.examples, device="cpu")
            self.position = 0
        index = self.order[self.position : self.position + self.batch_size]
        self.position += self.batch_size
        return index


def adam(parameters: typing.Iterable[nn.Parameter], lr: float) -> torch.optim.Adam:
    """Adam on what requires a gradient; for large networks in one pass over memory."""
    moving = [p for p in parameters if p.requires_grad]
    large = sum(p.numel() for p in moving) > 1_000_000
    return torch.optim.Adam(moving, lr=lr, fused=True if large else None)


class Training:
    """Algorithm 1 of the paper, or (learn=False) pre-training alone with φ fixed.

    An episode is P pre-training steps and, where φ is learned and it is whole, a meta step:

        pretrain_step    θ ← Adam, ∇_θ L_PT(θ, φ);    ψ ← Adam, ∇_ψ L_FT(θ, ψ)
        meta_step        φ ← Adam, dL_V(θ_K, ψ_K)/dφ;    ψ ← ψ_K

    θ are the parameters of `network`, ψ is the dict `psi`, and φ are the parameters of `meta`.
    Pre-training alone has no ψ. With several rounds, θ, ψ and their optimisers begin anew in each,
    while φ and its optimiser go on: a φ that was learned at a round's end has not seen its start.

    Args:
        phi: φ at the start, a state dict; None: as the domain begins it.

    Raises:
        BadInput: the domain cannot be trained, or `phi` is of another shape.
    """

    # What a checkpoint holds besides, where φ is learned.
    LEARNING_STATE = (
        "psi",
        "ft_states",
        "phi_sum",
        "phi_count",
        "meta_steps",
        "skipped",
        "skipped_in_a_row",
    )
    # Sums a dict of tensors over processes: set by a subclass that divides batches over them.
    reduce: Callable[[Params], Params] | None = None

    def __init__(self, domain: Domain, learn: bool, phi: dict | None = None):
        self.domain = domain
        self.settings = settings = domain.settings
        self.learn = learn
        missing = {"pretrain", "finetune", "validation", *domain.tests} - set(domain.sizes)
        if missing:
            raise BadInput(f"{type(domain).__name__}.sizes lacks {', '.join(sorted(missing))}")
        if len(set(domain.tests.values())) < len(domain.tests):
            raise BadInput(f"{type(domain).__name__}.tests has two parts under one name")

        torch.manual_seed(settings.seed)
        self.begin_theta()
        self.meta = domain.meta()
        if phi is not None:
            with refusing(f"φ does not fit {type(domain).__name__}", (RuntimeError, TypeError)):
                self.meta.load_state_dict(phi)
        if learn:
            self.meta_optimizer = self.optimizer_of_phi()
        self.batches = self.all_batches()

        self.rounds = settings.rounds if learn else 1
        self.round = 0  # rounds that are over
        self.step = 0  # PT steps so far in this round
        self.seconds = 0.0
        self.meta_steps = 0
        self.skipped = 0  # meta steps without a usable hypergradient
        self.skipped_in_a_row = 0
        self.phi_sum = None  # φ is averaged over the last `average` of the run
        self.phi_count = 0
        self.losses = {
            "pretrain_loss": math.nan,
            "finetune_loss": math.nan,
            "validation_loss": math.nan,
            "residual": math.nan,
        }
        check_losses(self)

    def begin_theta(self) -> None:
        """θ and ψ freshly drawn, and their optimisers."""
        self.network = self.domain.network()
        self.network.precision = self.settings.precision
        if not any(p.requires_grad for p in self.network.parameters()):
            kind = type(self.domain).__name__
            raise BadInput(f"{kind}.network() has nothing that can be trained")
        self.optimizer = adam(self.network.parameters(), self.settings.lr)
        self.head = self.domain.head() if self.learn else None
        self.psi = detached(copy.deepcopy(self.head)) if self.learn else {}
        # FT's Adam moments. "head": of ψ alone, beside PT and in an unroll of that scope; "all":
        # of θ and ψ in an unroll of that scope.
        self.ft_states = {"head": {}, "all": {}}

    def begin_next_round(self) -> None:
        """θ, ψ and the order of the data begin anew, from another seed; φ goes on."""
        self.round += 1
        seed = np.random.default_rng([self.settings.seed, self.round]).integers(2**32)
        torch.manual_seed(int(seed))
        self.begin_theta()
        self.batches = self.all_batches()
        self.step = 0
        self.phi_sum = None
        self.phi_count = 0

    @property
    def steps_done(self) -> int:
        """PT steps so far, in all rounds."""
        return self.round * self.settings.steps + self.step

    def optimizer_of_phi(self) -> torch.optim.Adam:
        """Adam, with a learning rate for each parameter of φ. `meta_step` lowers the rates."""
        rates = self.domain.phi_rates(self.meta)
        groups = [
            {"params": [p], "lr": rates[name], "initial_lr": rates[name]}
            for name, p in self.meta.named_parameters()
        ]
        if not groups:
            kind = type(self.domain).__name__
            raise BadInput(f"{kind}.meta() has no parameters: there is nothing to learn")
        return torch.optim.Adam(groups, betas=(0.9, 0.99))

    def all_batches(self) -> dict[str, Batches]:
        """Mini-batches of the parts; "meta" are those of PT that meta steps use."""
        settings = self.settings
        domain = self.domain
        sizes = {**domain.sizes, **domain.access}
        batches = {"pretrain": Batches(sizes["pretrain"], settings.batch_size)}
        if self.learn:
            finetune_size = domain.sizes["finetune"] - held_out_count(domain)
            finetune_size = min(sizes["finetune"], finetune_size)
            batches["meta"] = Batches(sizes["pretrain"], settings.meta_batch_size)
            batches["finetune"] = Batches(finetune_size, settings.unroll_batch_size)
            batches["validation"] = Batches(sizes["validation"], settings.validation_batch_size)
        return batches

    def run(
        self,
        on_episode: Callable[["Training"], None] | None = None,
        on_checkpoint: Callable[["Training"], None] | None = None,
    ) -> "Training":
        """Trains to the end, from wherever the training stands.

        Raises:
            Failed: the PT loss, or too many hypergradients in a row, were not finite.
        """
        settings = self.settings
        started = time.perf_counter() - self.seconds
        while self.step < settings.steps or self.round + 1 < self.rounds:
            if self.step == settings.steps:
                self.begin_next_round()
            end = self.end_of_episode()
            learn_now = self.learn and self.step >= settings.warmup_steps
            full_episode = end - self.step == settings.meta_every

            self.domain.begin_episode(self.meta)
            while self.step < end:
                self.pretrain_step()
                self.step += 1
            self.losses["residual"] = math.nan
            if learn_now and full_episode:
                self.meta_step()
            self.seconds = time.perf_counter() - started

            if not math.isfinite(self.losses["pretrain_loss"]):
                raise Failed(
                    f"the PT loss is not finite at PT step {self.steps_done}: "
                    "a lower --lr or --meta-lr may help"
                )
            if on_episode:
                on_episode(self)
            episodes = math.ceil(self.step / settings.meta_every)
            round_is_over = self.step == settings.steps
            if on_checkpoint and (episodes % CHECKPOINT_EVERY == 0 or round_is_over):
                on_checkpoint(self)
        return self

    def end_of_episode(self) -> int:
        """The PT step at which the episode that begins now ends.

        Episodes of P steps are counted from the end of the warm-up, to both sides: the first one
        of the warm-up and the last one of all are shorter where P does not divide.
        """
        warmup = self.settings.warmup_steps
        every = self.settings.meta_every
        # In Python a remainder is never negative, not even before the end of the warm-up.
        steps_into_episode = (self.step - warmup) % every
        end = self.step + every - steps_into_episode
        return min(end, self.settings.steps)

    def progress(self, step: int) -> float:
        """The share of the round after its warm-up that is over; 1 where φ is fixed."""
        if not self.learn:
            return 1.0
        steps = self.settings.steps
        warmup = self.settings.warmup_steps
        return max(0.0, (step - warmup) / max(1, steps - warmup))

    def pretrain_step(self) -> None:
        """One step on θ with φ fixed; where φ is learned, one on the FT head ψ beside it."""
        self.optimizer.param_groups[0]["lr"] = self.pretrain_rate()
        theta = dict(self.network.named_parameters())
        pretrain_loss = self.pretrain_loss("pretrain", self.step, live=True)
        value = pretrain_loss(theta, detached(self.meta))
        self.optimizer.zero_grad()
        self.domain.backward(value, theta)
        self.optimizer.step()
        self.losses["pretrain_loss"] = value.detach().sum()
        if self.learn:
            self.finetune_head()

    def pretrain_rate(self) -> float:
        """PT's learning rate at this step (cosine: Loshchilov and Hutter, ICLR 2017)."""
        if not self.settings.cosine:
            return self.settings.lr
        share = self.step / self.settings.steps
        return self.settings.lr * (1 + math.cos(math.pi * share)) / 2

    def finetune_head(self) -> None:
        """One FT step on ψ alone, beside a PT step."""
        finetune_loss = self.finetune_loss("finetune")
        psi = {name: p.detach().requires_grad_() for name, p in self.psi.items()}
        value = finetune_loss(detached(self.network), psi)
        slopes = gradient(value, psi)
        if self.reduce:
            slopes = self.reduce(slopes)
        with torch.no_grad():
            self.psi, self.ft_states["head"] = finetune_step(
                psi, slopes, self.settings.unroll, self.ft_states["head"]
            )
        self.losses["finetune_loss"] = value.detach()

    def meta_step(self) -> None:
        """One step on φ along the hypergradient; φ stays where there is no usable one."""
        settings = self.settings
        scope = settings.unroll_scope
        finetune_losses = [self.finetune_loss("finetune") for _ in range(settings.unroll_steps)]
        last_step = self.step - 1  # the PT step just taken
        pretrain_loss = self.pretrain_loss("meta", last_step, live=False)
        validation_loss = self.validation_loss()
        try:
            result = hypergradient(
                pretrain_loss,
                finetune_losses,
                validation_loss,
                theta=self.theta(),
                psi=self.psi,
                phi=detached(self.meta),
                unroll=settings.unroll,
                solver=settings.inverse,
                ft_state=self.ft_states[scope],
                preconditioner=self.adam_metric if settings.has_adam_metric else None,
                reduce=self.reduce,
            )
            check_solution(result, settings.solver)
        except FloatingPointError as error:
            self.skip(error)
            return

        self.psi = result.psi
        self.ft_states[scope] = result.ft_state
        for name, p in self.meta.named_parameters():
            p.grad = result.phi[name]
        progress = self.progress(last_step)
        for group in self.meta_optimizer.param_groups:
            of_all_rounds = (self.round + progress) / self.rounds
            group["lr"] = group["initial_lr"] * settings.meta_lr_decay**of_all_rounds
        self.meta_optimizer.step()

        if progress >= 1 - settings.average:
            self.add_to_average()
        self.meta_steps += 1
        self.skipped_in_a_row = 0
        # A copy, since it may be a view of something much larger.
        self.losses["validation_loss"] = result.value.clone()
        self.losses["residual"] = result.residual

    def skip(self, error: FloatingPointError) -> None:
        """Counts a meta step without a usable hypergradient; Failed after many in a row."""
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= MANY_SKIPPED:
            raise Failed(f"{MANY_SKIPPED} meta steps in a row without a usable gradient: {error}")

    def theta(self) -> Params:
        """θ for the hypergradient: what PT keeps frozen requires no gradient there either."""
        return {
            name: p.detach().requires_grad_(p.requires_grad)
            for name, p in self.network.named_parameters()
        }

    def pretrain_loss(self, batches: str, step: int, live: bool) -> Loss:
        """L_PT(θ, φ) on the next batch."""
        index = self.batches[batches].next()
        progress = self.progress(step)
        return self.domain.pretrain_loss(self.network, self.meta, index, progress, live)

    def finetune_loss(self, part: str) -> Loss:
        """L_FT(θ, ψ) on the next batch of a part; on the validation part it is L_V."""
        index = self.batches[part].next()
        return self.domain.finetune_loss(self.network, self.head, part, index)

    def validation_loss(self) -> Loss:
        """L_V(θ, ψ): over validation examples, or (--validate-on all) over FT's as well."""
        if self.settings.validate_on == "validation":
            return self.finetune_loss("validation")
        of_finetune = self.finetune_loss("finetune")
        of_validation = self.finetune_loss("validation")
        finetune_size = self.batches["finetune"].examples
        validation_size = self.batches["validation"].examples
        finetune_share = finetune_size / (finetune_size + validation_size)
        validation_share = validation_size / (finetune_size + validation_size)

        def loss(theta: Params, psi: Params) -> Tensor:
            finetune_part = finetune_share * of_finetune(theta, psi)
            return finetune_part + validation_share * of_validation(theta, psi)

        return loss

    def adam_metric(self, r: Params) -> Params:
        """M⁻¹r, where M = √v̂ + ε is the metric of PT's Adam: a preconditioner (SAMA).

        Where v̂ = 0 no gradient of PT has ever arrived, as at a row of an embedding that it has not
        met. PT does not move what is there, and r / ε would drown all else: it is 0.
        """
        (group,) = self.optimizer.param_groups
        _, beta2 = group["betas"]
        parameters = dict(self.network.named_parameters())
        scaled = {}
        for name, values in r.items():
            state = self.optimizer.state.get(parameters[name])
            if not state:
                scaled[name] = torch.zeros_like(values)
                continue
            v_hat = state["exp_avg_sq"] / (1 - beta2 ** state["step"].double())
            divided = values / (v_hat.sqrt() + self.settings.metric_eps)
            scaled[name] = torch.where(v_hat > 0, divided, 0)
        return scaled

    def add_to_average(self) -> None:
        """One more φ into the average over the end of the run."""
        phi = detached(self.meta)
        if self.phi_sum is None:
            self.phi_sum = {name: torch.zeros_like(p) for name, p in phi.items()}
        self.phi_sum = {name: total + phi[name] for name, total in self.phi_sum.items()}
        self.phi_count += 1

    def learned(self) -> nn.Module:
        """φ, or its average over the end of the run where --average asks for that."""
        meta = copy.deepcopy(self.meta)
        if self.phi_count:
            mean = {name: total / self.phi_count for name, total in self.phi_sum.items()}
            meta.load_state_dict({**meta.state_dict(), **mean})
        return meta

    def state_dict(self) -> dict:
        """All that a checkpoint needs to go on to the same end.

        What a domain keeps by itself is not in it: `begin_episode` makes that anew.
        """
        on_cuda = self.domain.device.type == "cuda"
        state = {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "meta": self.meta.state_dict(),
            "batches": {name: (b.order, b.position) for name, b in self.batches.items()},
            "round": self.round,
            "step": self.step,
            "seconds": self.seconds,
            "losses": {name: float(value) for name, value in self.losses.items()},
            "random": torch.get_rng_state(),
            "cuda_random": torch.cuda.get_rng_state_all() if on_cuda else [],
        }
        if self.learn:
            state["meta_optimizer"] = self.meta_optimizer.state_dict()
            state |= {name: getattr(self, name) for name in self.LEARNING_STATE}
        return state

    def load_state_dict(self, state: dict) -> None:
        """Continues from what `state_dict` gave. Tensors may be on the CPU, whatever the device.

        Raises:
            KeyError, RuntimeError, TypeError, ValueError: it is the state of another training.
        """
        device = self.domain.device
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.meta.load_state_dict(state["meta"])
        for name, batches in self.batches.items():
            batches.order, batches.position = state["batches"][name]
        self.round = state["round"]
        self.step = state["step"]
        self.seconds = state["seconds"]
        self.losses = dict(state["losses"])
        if self.learn:
            self.meta_optimizer.load_state_dict(state["meta_optimizer"])
            for name in self.LEARNING_STATE:
                setattr(self, name, moved(state[name], device))
        torch.set_rng_state(state["random"])
        if device.type == "cuda" and state["cuda_random"]:
            there = torch.cuda.device_count()
            torch.cuda.set_rng_state_all(state["cuda_random"][:there])


def moved(value, device: torch.device):
    """A tensor, or all tensors within dicts, on another device; anything else as it is."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: moved(entry, device) for name, entry in value.items()}
    return value


def check_solution(result: Hypergradient, solver: str) -> None:
    """FloatingPointError where a solve came to nothing.

    A residual of 1 and more alone is no such case: the first iterations of CG may have one and
    still point the right way. Skipping those steps too made φ no better where it was tried, and
    left some runs without any.
    """
    if solver in ("cg", "nystrom") and not math.isfinite(result.residual):
        raise FloatingPointError("the residual of the solve is not finite: --damping may help")
    if result.residual >= 1 and not any(t.any() for t in result.q.values()):
        raise FloatingPointError("q = 0, PT's Hessian curves down along v: --damping may help")


def check_losses(training: Training) -> None:
    """BadInput where a loss is no scalar, or depends on none of θ, φ or ψ.

    The likeliest mistake in a domain of one's own is `network(x)` in place of
    `metapt.call(network, theta, x)`. Two examples show it before a run begins.
    """
    domain = training.domain
    few = torch.arange(min(2, *domain.sizes.values()))
    theta = {name: p.clone().requires_grad_() for name, p in detached(training.network).items()}
    phi = {name: p.clone().requires_grad_() for name, p in detached(training.meta).items()}
    psi = {name: p.clone().requires_grad_() for name, p in training.psi.items()}
    # The random state is put back, so that a run's numbers are as they would be without this.
    with torch.random.fork_rng(random_devices(domain)):
        domain.begin_episode(training.meta)
        loss = domain.pretrain_loss(training.network, training.meta, few, 0.0, live=False)
        value = loss(theta, phi)
        has_own_backward = type(domain).backward is not Domain.backward
        if training.learn or not has_own_backward:
            require_scalar(domain, "pretrain_loss", value)
        require_dependence(domain, "pretrain_loss", value, {"θ": theta, "φ": phi})
        if training.learn:
            loss = domain.finetune_loss(training.network, training.head, "finetune", few)
            value = loss(theta, psi)
            require_scalar(domain, "finetune_loss", value)
            require_dependence(domain, "finetune_loss", value, {"θ": theta, "ψ": psi})


def require_scalar(domain: Domain, name: str, value: Tensor) -> None:
    where = f"{type(domain).__name__}.{name}"
    if not isinstance(value, Tensor):
        raise BadInput(f"{where} gives {type(value).__name__}, not a tensor")
    if value.numel() != 1:
        raise BadInput(f"{where} gives a tensor of shape {list(value.shape)}, not a scalar")


def require_dependence(domain: Domain, name: str, value: Tensor, on: dict[str, Params]) -> None:
    """BadInput where autograd finds no path from the loss to any of a group of parameters."""
    for symbol, params in on.items():
        slopes = []
        if value.requires_grad:
            tensors = list(params.values())
            slopes = torch.autograd.grad(value.sum(), tensors, retain_graph=True, allow_unused=True)
        if all(slope is None for slope in slopes):
            where = f"{type(domain).__name__}.{name}"
            advice = "its modules need metapt.call(module, params, ...)"
            raise BadInput(f"{where} does not depend on {symbol}: {advice}")


def pretrain_afresh(domain: Domain, seed: int, phi: dict | None) -> Network:
    """θ of pre-training from scratch with φ frozen; None: φ as the domain begins it."""
    # The data stay those of the run's own seed.
    reseeded = copy.copy(domain)
    reseeded.settings = dataclasses.replace(domain.settings, seed=seed)
    return Training(reseeded, learn=False, phi=phi).run().network


# ------------------------------------------------------------------------------------------------
# 6. Fine-tuning that measures an encoder, comparisons, and which φ to keep

METHODS = {
    "no_pretraining": "no pre-training",
    "default_phi": "pre-training, default φ",
    "learned_phi": "pre-training, learned φ",
    "online": "θ of the meta run itself",
}


class Finetuned(NamedTuple):
    """An encoder after FT, at the look where its validation loss was lowest."""

    scores: dict[str, float]  # the metric on each test part
    lowest_loss: float


class Examples(NamedTuple):
    """Some examples of a part, by their numbers within it."""

    part: str
    rows: Tensor  # int64, on the CPU


def finetune(
    domain: Domain, network: Network, examples: int, seed: int, judges: Tensor | None = None
) -> Finetuned:
    """Fine-tunes a fresh head on an encoder, and scores it on the test parts.

    The settings `measure_*` say how. In scope "head" the encoder stands still; in scope "all" a
    copy of it moves too. A seed gives every encoder the same examples, head and batches, and
    smaller FT sets are parts of larger ones.

    Args:
        examples: the size of the FT set.
        judges: FT examples, by number, that FT does not get, so that the FT set may be smaller,
            and that are scored in place of the test parts, under the name "held".
    """
    settings = domain.settings
    torch.manual_seed(seed)
    train_size, validation_size = domain.finetune_split(examples)
    order = torch.randperm(domain.sizes["finetune"], device="cpu")
    draw = torch.Generator("cpu").manual_seed(seed)
    available = domain.sizes["validation"]
    validation_order = torch.randperm(available, generator=draw, device="cpu")
    # In evaluation mode, as in `Domain.finetune_loss`.
    head = domain.head().eval()
    encoder = copy.deepcopy(network).eval()

    scored = {part: Examples(part, torch.arange(domain.sizes[part])) for part in domain.tests}
    if judges is not None:
        order = order[~torch.isin(order, judges)]
        scored = {"held": Examples("finetune", judges)}
    train = Examples("finetune", order[:train_size])
    validation = Examples("validation", validation_order[:validation_size].sort().values)

    if settings.measure_scope == "head":
        # The encoder stands still, so each example passes it once.
        features = {
            name: frozen_features(domain, encoder, some)
            for name, some in {"train": train, "validation": validation, **scored}.items()
        }
        optimizer = adam(head.parameters(), settings.measure_lr or 1e-2)
    else:
        features = {}
        optimizer = adam([*head.parameters(), *encoder.parameters()], settings.measure_lr or 1e-3)

    def outputs(name: str, some: Examples, positions: Tensor) -> Tensor:
        """What encoder and head give for the examples at these positions among `some`."""
        if name in features:
            return head(features[name][to_device(positions, domain.device)])
        inputs = domain.inputs(some.part, some.rows[positions])
        return head(encoder(inputs, features=True))

    @torch.no_grad()
    def evaluate(name: str, some: Examples) -> tuple[Tensor, Tensor]:
        """Outputs and targets of all of `some`."""
        encoder.eval()
        chunks = torch.arange(len(some.rows)).split(2048)
        all_outputs = torch.cat([outputs(name, some, positions) for positions in chunks])
        return all_outputs, domain.targets(some.part, some.rows)

    batches = Batches(len(train.rows), settings.measure_batch_size)
    steps, looks = finetune_schedule(settings, len(train.rows))
    best = Finetuned(dict.fromkeys(scored, math.nan), math.inf)
    for step in range(1, steps + 1):
        positions = batches.next()
        if settings.measure_scope == "all":
            domain.finetune_mode(encoder)
        targets = domain.targets(train.part, train.rows[positions])
        loss = domain.loss(outputs("train", train, positions), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        if step in looks:
            loss_here = domain.loss(*evaluate("validation", validation)).item()
            if loss_here < best.lowest_loss:
                scores = {
                    name: domain.score(*evaluate(name, some)) for name, some in scored.items()
                }
                best = Finetuned(scores, loss_here)
    return best


@torch.no_grad()
def frozen_features(domain: Domain, encoder: Network, some: Examples) -> Tensor:
    """What an encoder gives for examples: [n, features]."""
    chunks = some.rows.split(2048)
    return torch.cat([encoder(domain.inputs(some.part, rows), features=True) for rows in chunks])


def finetune_schedule(settings: Settings, train_size: int) -> tuple[int, set[int]]:
    """How many FT steps, and after which of them the validation loss is looked at."""
    if settings.measure_epochs:
        steps_per_epoch = math.ceil(train_size / settings.measure_batch_size)
        steps = settings.measure_epochs * steps_per_epoch
        looks = settings.measure_epochs
    else:
        steps = settings.measure_steps
        looks = 25
    return steps, {round(look * steps / looks) for look in range(1, looks + 1)}


def compared_sizes(domain: Domain) -> list[int]:
    """The FT-set sizes of comparisons: those of --sizes, or the domain's."""
    text = domain.settings.sizes
    smallest, largest = domain.finetune_limits()
    if text:
        sizes = sorted({int(size) for size in text.split(",")})
    elif domain.finetune_sizes:
        sizes = list(domain.finetune_sizes)
    else:
        everything = domain.sizes["finetune"]
        sizes = sorted({max(1, everything // 10), everything})
    if sizes[0] < smallest or sizes[-1] > largest:
        expected = f"between {smallest} and the {largest} FT examples there are"
        raise BadInput(f"--sizes is {text!r}, expected {expected}")
    return sizes


class Method(NamedTuple):
    """How a network that is compared comes about: plain data, which other processes can be sent."""

    way: str  # "untrained", "pretrained" (afresh, by the cell's seed) or "given"
    phi: dict | None = None  # of "pretrained": φ's state dict; None: φ as the domain begins it
    theta: dict | None = None  # of "given": the network's state dict
    settings: Settings | None = None  # of "given": what the network was made with


def given_network(domain: Domain, network: Network) -> Method:
    """The method that every seed has this network of the domain for."""
    return Method("given", theta=on_cpu(network), settings=domain.settings)


def on_cpu(module: nn.Module) -> dict:
    """Its state dict, in which a module may also keep what is no tensor."""
    state = module.state_dict()
    return {name: x.cpu() if isinstance(x, Tensor) else x for name, x in state.items()}


def make_network(domain: Domain, method: Method, seed: int) -> Network:
    torch.manual_seed(seed)
    if method.way == "untrained":
        return domain.network()
    if method.way == "pretrained":
        return pretrain_afresh(domain, seed, method.phi)
    if method.settings != domain.settings:
        domain = type(domain)(method.settings, domain.device, domain.data_folder)
    network = domain.network()
    network.load_state_dict(method.theta)
    return network


class Cell(NamedTuple):
    """What is measured by itself: one method with one seed."""

    name: str  # of the method
    method: Method
    seed: int
    sizes: list[int]  # of FT sets
    with_held: bool  # whether `held_score` is wanted as well


class Measured(NamedTuple):
    """What became of a cell."""

    finetuned: list[Finetuned]  # one for each size
    held_score: float | None


def cells_of(
    methods: dict[str, Method], sizes: list[int], seeds: int, with_held: bool
) -> list[Cell]:
    """The cells of a comparison. No cell needs another, nor any order."""
    return [
        Cell(name, method, seed, sizes, with_held)
        for seed in range(seeds)
        for name, method in methods.items()
    ]


def measure_cell(domain: Domain, cell: Cell) -> Measured:
    return measure_network(domain, make_network(domain, cell.method, cell.seed), cell)


def measure_network(domain: Domain, network: Network, cell: Cell) -> Measured:
    """What a cell's network gives after FT with each size, and on labels that FT did not get."""
    finetuned = [finetune(domain, network, size, cell.seed) for size in cell.sizes]
    held = None
    if cell.with_held:
        _, most = domain.finetune_limits()
        held = held_score(domain, network, most, cell.seed)
    return Measured(finetuned, held)


class Comparison(NamedTuple):
    """What several methods give after the same FT: lists over seeds."""

    finetuned: dict[tuple[str, int], list[Finetuned]]  # by method and FT-set size
    held_scores: dict[str, list[float]]  # by method; empty where they were not asked for


def collect(cells: list[Cell], measured: list[Measured]) -> Comparison:
    """The cells' results, which are in the cells' order, as one comparison."""
    comparison = Comparison({}, {})
    for cell, result in zip(cells, measured, strict=True):
        for size, finetuned in zip(cell.sizes, result.finetuned, strict=True):
            comparison.finetuned.setdefault((cell.name, size), []).append(finetuned)
        if cell.with_held:
            comparison.held_scores.setdefault(cell.name, []).append(result.held_score)
    return comparison


def comparison_rows(domain: Domain, results: dict) -> list[dict]:
    """A comparison as summary.json has it: a row a test part, method and FT-set size."""
    rows = []
    for part, metric in domain.tests.items():
        for (method, size), outcomes in results.items():
            scores = [outcome.scores[part] for outcome in outcomes]
            rows.append(
                {
                    "method": method,
                    "ft_examples": size,
                    "metric": metric,
                    **mean_and_error(scores),
                    "seeds": len(scores),
                }
            )
    return rows


def difference_rows(
    domain: Domain, results: dict, methods: list[str], sizes: list[int]
) -> list[dict]:
    """Each method minus the first, paired by seed: the mean and its 95 % interval."""
    first, *others = methods
    rows = []
    for part, metric in domain.tests.items():
        for size in sizes:
            base = [outcome.scores[part] for outcome in results[first, size]]
            for method in others:
                scores = [outcome.scores[part] for outcome in results[method, size]]
                rows.append(
                    {
                        "method": method,
                        "versus": first,
                        "ft_examples": size,
                        "metric": metric,
                        **mean_and_interval(np.subtract(scores, base)),
                    }
                )
    return rows


def mean_and_error(values) -> dict[str, float | None]:
    """Mean and standard error; None where there is none."""
    values = np.asarray(values, dtype=float)
    stderr = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return {"mean": finite_or_none(values.mean()), "stderr": finite_or_none(stderr)}


def mean_and_interval(values) -> dict[str, float | None]:
    """Mean and 95 % interval (Student's t); None where there is none."""
    from scipy.stats import t

    mean, stderr = mean_and_error(values).values()
    if mean is None or stderr is None:
        return {"mean": mean, "low": None, "high": None}
    half = float(t.ppf(0.975, len(values) - 1)) * stderr
    return {"mean": mean, "low": mean - half, "high": mean + half}


def finite_or_none(value) -> float | None:
    """A number for JSON, which has no NaN."""
    return float(value) if math.isfinite(value) else None


def held_score(domain: Domain, network: Network, examples: int, seed: int) -> float:
    """The metric after FT on FT examples that FT did not get.

    They are those that learning φ did not get either, where there are enough FT examples for that;
    otherwise each fifth of them in turn.
    """
    available = domain.sizes["finetune"]
    held_out = held_out_count(domain)
    if held_out:
        folds = [torch.arange(available - held_out, available)]
    else:
        folds = torch.arange(available).tensor_split(min(FOLDS, available))
    scores = [finetune(domain, network, examples, seed, fold).scores["held"] for fold in folds]
    return float(np.mean(scores))


class Choice(NamedTuple):
    """Which φ to keep: the method's name, each method's held-out score, and a sentence."""

    chosen: str
    held_scores: dict[str, dict]
    sentence: str


def choose(domain: Domain, scores: dict[str, list[float]]) -> Choice:
    """Default φ, learned φ or the meta run's own θ, by FT labels that FT did not get.

    The default is kept unless the gain on it exceeds its standard error: learning φ adds noise.

    Args:
        scores: the held-out scores of each method, over seeds.
    """
    gains = {
        method: np.subtract(scores[method], scores["default_phi"])
        for method in ("learned_phi", "online")
    }
    best = max(gains, key=lambda method: np.nan_to_num(gains[method].mean(), nan=-math.inf))
    mean, stderr = mean_and_error(gains[best]).values()
    worth_it = mean is not None and mean > (stderr or 0.0)
    chosen = best if worth_it else "default_phi"
    sentence = sentence_of_choice(domain, best, gains[best], chosen)

    no_pretraining = np.mean(scores["no_pretraining"])
    if no_pretraining > np.mean(scores[chosen]):
        points = 100 * (no_pretraining - np.mean(scores[chosen]))
        sentence += f"; but no pre-training at all does better still, by {points:.1f} points"
    held_scores = {method: mean_and_error(outcomes) for method, outcomes in scores.items()}
    return Choice(chosen, held_scores, sentence)


def sentence_of_choice(domain: Domain, best: str, gains: np.ndarray, chosen: str) -> str:
    """What the best of learned φ and the run's θ is worth, how sure that is, and the advice."""
    name = "the learned φ" if best == "learned_phi" else "the θ of this run"
    interval = mean_and_interval(gains)
    if interval["mean"] is None:
        worth = "an unknown number of points"
    elif interval["low"] is None:
        worth = f"{100 * interval['mean']:+.1f} points (one seed: no interval)"
    else:
        low = f"{100 * interval['low']:+.1f}"
        high = f"{100 * interval['high']:+.1f}"
        worth = f"{100 * interval['mean']:+.1f} points (95 % interval {low} to {high}"
        includes_zero = interval["low"] <= 0 <= interval["high"]
        worth += ", which includes 0)" if includes_zero else ")"
    labels = "FT labels that FT had not, though φ had"
    if held_out_count(domain):
        labels = "FT labels that neither φ nor FT had"
    advice = "not worth it here: keep the default φ" if chosen == "default_phi" else "keep it"
    return f"{name} is worth {worth} on {labels}: {advice}"


# ------------------------------------------------------------------------------------------------
# 7. Run folders: config.json, metrics.jsonl, checkpoint.pt, summary.json and figures

# What config.json and checkpoints say of the program that wrote them.
FORMAT = "metapt 5"
# The commands whose runs have checkpoints: they can go on, and have an encoder.
TRAINING_COMMANDS = ("pretrain", "meta")
# Errors of the machine, not of what the user gave: the disk is full, a quota or limit is reached.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SHA256_LENGTH = 64  # hexadecimal digits


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file so that under its name there is the old content or the new, never a part.

    The content goes into a hidden file beside it, to the disk, and only then gets the name.

    Raises:
        Failed: the disk is full.
    """
    new = path.with_name(f".{path.name}.new")
    try:
        with new.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, new)
        os.replace(new, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            new.unlink()
        if error.errno in DISK_FULL:
            raise Failed(f"{path}: {error.strerror} ({len(content):,} bytes are needed)") from None
        raise OSError(error.errno, error.strerror, str(path)) from None


class Run:
    """The folder of a run. Its methods are the only ones that write there.

    Raises:
        BadInput: from any method, where a file is missing or not what this program writes.
    """

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise BadInput(f"{folder} is no folder of a run")
        self.folder = folder
        self.lock = filelock.FileLock(folder / ".lock", timeout=0)

    @classmethod
    def create(cls, folder: Path | None, config: dict) -> "Run":
        """A new run, locked; by default runs/COMMAND-DOMAIN, runs/COMMAND-DOMAIN-2 and so on."""
        if folder is None:
            folder = cls.next_folder(f"{config['command']}-{Path(config['domain']).stem}")
        else:
            folder.mkdir(parents=True, exist_ok=True)
        run = cls(folder)
        run.require_empty(config["command"])
        run.acquire()
        # Once more: before it was locked another process may have begun a run here.
        run.require_empty(config["command"])
        run.write_json("config.json", {"format": FORMAT, **config})
        return run

    @staticmethod
    def next_folder(name: str) -> Path:
        """Makes the first of runs/name, runs/name-2 and so on that is not there yet."""
        for number in itertools.count(1):
            folder = Path("runs") / (name if number == 1 else f"{name}-{number}")
            try:
                folder.mkdir(parents=True)
            except FileExistsError:
                if not folder.exists():  # it is `runs` that is no folder
                    raise
            else:
                return folder

    def require_empty(self, command: str) -> None:
        """BadInput where the folder has content already.

        The lock's file is none, nor is what is left where a process was killed at the very start.
        """
        no_content = (".lock", ".config.json.new")
        content = [path.name for path in self.folder.iterdir() if path.name not in no_content]
        if not content:
            return
        advice = "name another --out"
        if command in TRAINING_COMMANDS and "metrics.jsonl" in content:
            advice += f", or go on with --resume {shlex.quote(str(self.folder))}"
        raise BadInput(f"{self.folder} is not empty: {advice}")

    def acquire(self) -> "Run":
        """Keeps other processes from the run until `release`, or until this process ends."""
        try:
            self.lock.acquire()
        except filelock.Timeout:
            raise BadInput(f"{self.folder} is in use by another process") from None
        except (OSError, NotImplementedError):
            # A file system without locks: the run goes on without one.
            pass
        return self

    def release(self) -> None:
        self.lock.release()

    @contextlib.contextmanager
    def reading(self, name: str):
        """The one place where what JSON, torch and types raise of a damaged file becomes a line."""
        path = self.folder / name
        if not path.exists():
            raise BadInput(f"{self.folder} is not a run that can be used: it has no {name}")
        try:
            yield path
        except (MemoryError, OSError):
            raise
        except Exception as error:  # damage may raise anything
            lines = str(error).strip().splitlines()
            reason = lines[-1].strip()[:200] if lines else ""
            kind = type(error).__name__
            raise BadInput(f"{path} is not what this metapt writes: {kind} {reason}") from None

    def read_json(self, name: str) -> dict:
        with self.reading(name) as path:
            content = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(content, dict):
                raise TypeError(f"it holds {type(content).__name__}, expected an object")
            return content

    def write(self, name: str, content: bytes) -> None:
        write_whole(self.folder / name, content)

    def write_json(self, name: str, content: dict) -> None:
        self.write(name, (json.dumps(content, indent=2) + "\n").encode())

    def config(self) -> dict:
        """What the run was started with: command, domain, settings, device, data and φ."""
        config = self.read_json("config.json")
        with self.reading("config.json"):
            self.require_format(config)
            if config["command"] not in TRAINING_COMMANDS:
                raise ValueError(f"a run of {config['command']!r} has no encoder")
            kinds = {
                "domain": str,
                "domain_sha256": str | None,
                "settings": dict,
                "phi": str | None,
                "device": str,
                "data": str,
            }
            for name, kind in kinds.items():
                if not isinstance(config[name], kind):
                    raise TypeError(f"{name} is {config[name]!r}")
        return config

    def require_format(self, content: dict) -> None:
        """ValueError where another version of this program wrote the run."""
        written_as = content.get("format")
        if written_as != FORMAT:
            raise ValueError(f"its format is {written_as!r}, this metapt reads {FORMAT!r}")

    def log(self, row: dict) -> None:
        """One more row of metrics."""
        try:
            with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            if error.errno in DISK_FULL:
                raise Failed(f"{self.folder / 'metrics.jsonl'}: {error.strerror}") from None
            raise

    def history(self) -> list[dict]:
        """The rows of metrics. A last line without its end is of a process that was killed."""
        if not (self.folder / "metrics.jsonl").exists():
            return []
        with self.reading("metrics.jsonl") as path:
            *lines, _ = path.read_text(encoding="utf-8").split("\n")
            rows = [json.loads(line) for line in lines]
            for row in rows:
                if not isinstance(row["step"], int):
                    raise TypeError("a row's step is no integer")
                for value in row.values():
                    if value is not None and not isinstance(value, int | float):
                        raise TypeError(f"the row of step {row['step']} has what is no number")
                    if isinstance(value, int) and abs(value) > sys.float_info.max:
                        raise ValueError(f"the row of step {row['step']} has an integer too large")
            return rows

    def save_checkpoint(self, training: Training) -> None:
        """All that is needed to go on, with the SHA-256 of its bytes at the end.

        torch reads a damaged file as other numbers more often than it notices.
        """
        content = {
            "format": FORMAT,
            "step": training.steps_done,
            "training": training.state_dict(),
            "phi": training.learned().state_dict(),
        }
        self.write("checkpoint.pt", with_checksum(saved_bytes(content)))

    def load_checkpoint(self) -> dict:
        """The last checkpoint, on the CPU. No code that a file may hold is run."""
        with self.reading("checkpoint.pt") as path:
            stored = path.read_bytes()
            content = stored[:-SHA256_LENGTH]
            if with_checksum(content) != stored:
                raise ValueError("it is damaged: its SHA-256 is not the one at its end")
            checkpoint = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            self.require_format(checkpoint)
            if not isinstance(checkpoint["step"], int):
                raise TypeError(f"its step is {checkpoint['step']!r}")
            return checkpoint

    def resume(self, training: Training) -> None:
        """Takes a training to the last checkpoint, and drops rows of metrics that came after it.

        A run that was killed before its first checkpoint begins anew; one that was finished and
        has lost its checkpoint does not.
        """
        if any((self.folder / name).exists() for name in ("checkpoint.pt", "summary.json")):
            checkpoint = self.load_checkpoint()
            with self.reading("checkpoint.pt"):
                training.load_state_dict(checkpoint["training"])
                if training.steps_done != checkpoint["step"]:
                    steps = training.steps_done
                    raise ValueError(f"its steps are {steps!r} and {checkpoint['step']}")
        rows = [row for row in self.history() if row["step"] <= training.steps_done]
        self.write("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())

    def load_encoder(self, domain: Domain) -> Network:
        """θ of the last checkpoint."""
        network = domain.network()
        checkpoint = self.load_checkpoint()
        with self.reading("checkpoint.pt"):
            network.load_state_dict(checkpoint["training"]["network"])
        return network

    def save_table(self, name: str, columns: list[str], rows: list[tuple]) -> None:
        """A CSV file."""
        text = io.StringIO(newline="")
        csv.writer(text).writerows([columns, *rows])
        self.write(name, text.getvalue().encode())

    def save_figure(self, name: str, draw: Callable) -> None:
        """What `draw` makes of an empty matplotlib Figure of half a page's width, as PNG."""
        import matplotlib.style
        from matplotlib.figure import Figure

        style = {
            "font.size": 8,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
            "lines.linewidth": 1.2,
            "savefig.dpi": 200,
        }
        buffer = io.BytesIO()
        # The user's own settings, which may ask for LaTeX, have no part in it.
        with matplotlib.style.context(["default", style]), warnings.catch_warnings():
            # matplotlib warns of numbers beyond every scale, and of letters that a font lacks.
            warnings.simplefilter("ignore")
            figure = Figure(figsize=(3.5, 2.5), layout="constrained")
            draw(figure)
            figure.savefig(buffer, format="png")
        self.write(name, buffer.getvalue())


def saved_bytes(content) -> bytes:
    """What torch.save writes. Into memory: of a full disk it would say 58 lines."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def with_checksum(content: bytes) -> bytes:
    return content + hashlib.sha256(content).hexdigest().encode()


# ------------------------------------------------------------------------------------------------
# 8. Tables and figures


def make_console(as_json: bool) -> rich.console.Console:
    """Where tables and progress go: standard error where standard output is for JSON.

    Names of runs and domains are text, whatever brackets and colons they contain.
    """
    return rich.console.Console(stderr=as_json, markup=False, emoji=False, highlight=False)


def show_table(
    console: rich.console.Console,
    title: str,
    columns: list[str],
    rows: list[list[str]],
    justify: str = "right",
) -> None:
    """A table whose first column stands on the left, the others, mostly numbers, on the right."""
    table = rich.table.Table(
        title=rich.text.Text(title),
        title_justify="left",
        title_style="bold",
        box=rich.box.SIMPLE_HEAD,
    )
    for position, name in enumerate(columns):
        side = "left" if position == 0 else justify
        table.add_column(rich.text.Text(name), justify=side)
    for row in rows:
        table.add_row(*(rich.text.Text(cell) for cell in row))
    console.print(table)


def show_comparison(console: rich.console.Console, rows: list[dict]) -> None:
    """A table for each metric: a row a method, a column a FT-set size."""
    for metric in dict.fromkeys(row["metric"] for row in rows):
        of_metric = [row for row in rows if row["metric"] == metric]
        seeds = of_metric[0]["seeds"]
        title = f"Test {metric} after fine-tuning (%, ± standard error, seeds: {seeds})"
        cells = {}
        for row in of_metric:
            cell = f"{percent(row['mean'])} ± {percent(row['stderr'])}"
            cells.setdefault(row["method"], []).append(cell)
        show_by_size(console, title, of_metric, cells)


def show_differences(console: rich.console.Console, rows: list[dict]) -> None:
    """The same for differences to one method."""
    for metric in dict.fromkeys(row["metric"] for row in rows):
        of_metric = [row for row in rows if row["metric"] == metric]
        versus = method_name(of_metric[0]["versus"])
        title = f"Difference to {versus}: {metric} (points, 95 % interval)"
        cells = {}
        for row in of_metric:
            half = None if row["high"] is None else row["high"] - row["mean"]
            cell = f"{percent(row['mean'])} ± {percent(half)}"
            cells.setdefault(row["method"], []).append(cell)
        show_by_size(console, title, of_metric, cells)


def show_by_size(
    console: rich.console.Console, title: str, rows: list[dict], cells: dict[str, list[str]]
) -> None:
    sizes = dict.fromkeys(str(row["ft_examples"]) for row in rows)
    columns = ["FT examples:", *sizes]
    show_table(console, title, columns, [[method_name(m), *texts] for m, texts in cells.items()])


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


def method_name(method: str) -> str:
    """A method in words; a run goes by its path."""
    return METHODS.get(method, method)


@contextlib.contextmanager
def progress_bar(console: rich.console.Console, label: str, total: int):
    """A bar with rate and time left.

    It yields a function that moves the bar: to `completed` steps, or by one without a number;
    `status` is shown beside it.
    """
    columns = (
        rich.progress.TextColumn("{task.description}", markup=False),
        rich.progress.BarColumn(bar_width=16),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn("{task.fields[rate]}", markup=False),
        rich.progress.TimeRemainingColumn(),
        rich.progress.TextColumn("{task.fields[status]}", markup=False),
    )
    with rich.progress.Progress(*columns, console=console) as bars:
        task = bars.add_task(label, total=total, status="", rate="")

        def advance(completed: int | None = None, status: str = "") -> None:
            speed = bars.tasks[task].speed
            rate = f"{speed:.3g}/s" if speed else ""
            by = 1 if completed is None else None
            bars.update(task, completed=completed, advance=by, status=status, rate=rate)

        yield advance


def as_label(name: str) -> str:
    """A name as matplotlib shows it: `$` begins a formula there, and `_` hides a legend's entry.

    Bytes of a file's name that are no UTF-8, which it cannot draw, become question marks.
    """
    drawable = name.encode(errors="replace").decode()
    escaped = drawable.replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped


def draw_losses(figure, history: list[dict]) -> None:
    """The losses of PT, FT and validation along a run."""
    from matplotlib.ticker import MaxNLocator

    axis = figure.subplots()
    drawn = []
    named = {"pretrain_loss": "PT", "finetune_loss": "FT", "validation_loss": "validation"}
    for name, label in named.items():
        rows = [row for row in history if row.get(name) is not None]
        if rows:
            values = [row[name] for row in rows]
            axis.plot([row["step"] for row in rows], values, label=label, alpha=0.9)
            drawn += values
    axis.set(xlabel="PT steps", ylabel="loss (nats)")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if drawn and min(drawn) > 0 and max(drawn) > 10 * min(drawn):
        axis.set_yscale("log")
    if drawn:
        axis.legend()


def draw_phi(figure, history: list[dict], domain: Domain, names: list[str]) -> None:
    """What `Domain.measure` gives, along a run: one line a name."""
    from matplotlib.ticker import MaxNLocator

    axis = figure.subplots()
    for name in names:
        rows = [row for row in history if row.get(name) is not None]
        label = "learned φ" if len(names) == 1 else as_label(name)
        axis.plot([row["step"] for row in rows], [row[name] for row in rows], label=label)
    ylabel = domain.captions.get(names[0], names[0]) if len(names) == 1 else "φ"
    axis.set(xlabel="PT steps", ylabel=as_label(ylabel))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    domain.decorate(axis)
    if len(names) > 1:
        figure.legend(loc="outside right center", fontsize=6)
    else:
        axis.legend(loc="best", fontsize=7)


def draw_comparison(figure, rows: list[dict]) -> None:
    """The headline metric by FT-set size, a line a method; side by side, so that none is hidden."""
    metric = rows[0]["metric"]
    rows = [row for row in rows if row["metric"] == metric and row["mean"] is not None]
    sizes = sorted({row["ft_examples"] for row in rows})
    methods = list(dict.fromkeys(row["method"] for row in rows))
    axis = figure.subplots()
    for position, method in enumerate(methods):
        of_method = [row for row in rows if row["method"] == method]
        beside = 1 + 0.03 * (position - (len(methods) - 1) / 2)
        axis.errorbar(
            [row["ft_examples"] * beside for row in of_method],
            [100 * row["mean"] for row in of_method],
            [100 * (row["stderr"] or 0) for row in of_method],
            fmt="o-",
            ms=3,
            capsize=2,
            label=as_label(method_name(method)),
        )
    axis.set(xscale="log", xlabel="FT examples", ylabel=f"test {metric} (%), mean ± s.e.")
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.minorticks_off()
    figure.legend(loc="outside upper center", ncols=2, fontsize=7)


# ------------------------------------------------------------------------------------------------
# 9. Commands, how a domain is found, and how an error becomes one line

HERE = Path(__file__).resolve().parent
# A domain's file says `import metapt`: it means this module, also where it runs as a script.
sys.modules.setdefault("metapt", sys.modules[__name__])

# A class, or file:class in bench/domains. The first is the default.
DOMAINS = {
    "digits-rotation": DigitsRotation,
    "digits-affine": "affine.py:DigitsAffine",
    "digits-noise": "images.py:DigitsNoise",
    "mnist-rotation": "images.py:MNISTRotation",
    "mnist-noise": "images.py:MNISTNoise",
    "ppi": "ppi.py:PPI",
    "ecg": "ecg.py:ECG",
    "sources": "sources.py:Sources",
}
# Data that `download` knows: the module in data_scripts that prepares them.
SCRIPTS = {
    "mnist": "mnist",
    "ecg": "ptbxl",
    "ppi": "hu_graphs",
    "ppi string-yeast": "string_graphs",
    "ud": "ud",
}
# How a file and, after a colon, a class in it name a domain.
OWN_DOMAIN = re.compile(r"(.+\.py)(?::(\w+))?", re.DOTALL)


def find_domain(name: str) -> type[Domain]:
    """A built-in domain, or the one that a file defines: `my_domain.py`, `my_domain.py:Class`.

    Raises:
        BadInput: there is no such domain, or it lacks what every domain needs.
    """
    where = DOMAINS.get(name, name)
    if isinstance(where, type):
        return where
    match = OWN_DOMAIN.fullmatch(where)
    if not match:
        close = difflib.get_close_matches(name, DOMAINS, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        there = f"there are {', '.join(DOMAINS)}, or a file of yours as my_domain.py"
        raise BadInput(f"{name!r} is no domain; {hint}{there}")
    file, class_name = match.groups()
    path = HERE / "bench" / "domains" / file if name in DOMAINS else Path(file)
    path = path.resolve()
    if not path.is_file():
        advice = ""
        if name in DOMAINS:
            advice = f"; copy bench/domains/{path.name} of metapt's repository there"
        raise BadInput(f"{path}, which defines the domain {name}, is missing{advice}")
    return domain_in(load_module(path, checksum_of(path)), path, class_name)


def domain_in(module, path: Path, class_name: str | None) -> type[Domain]:
    """The domain of that name which a module has; without a name, the only one it defines."""
    there = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, Domain)
    }
    defined = [name for name, kind in there.items() if kind.__module__ == module.__name__]
    if class_name is None:
        if not defined:
            raise BadInput(f"{path} defines no domain, that is, no subclass of metapt.Domain")
        if len(defined) > 1:
            example = f"{path.name}:{defined[0]}"
            raise BadInput(f"{path} defines {', '.join(defined)}: name one, as {example}")
        class_name = defined[0]
    if class_name not in there:
        defines = f"it defines {', '.join(defined)}" if defined else "it defines none"
        raise BadInput(f"{path} has no domain {class_name} (a metapt.Domain); {defines}")
    kind = there[class_name]
    missing = sorted(kind.__abstractmethods__)
    if missing:
        raise BadInput(f"{path}: {class_name} lacks {', '.join(missing)}, which a domain needs")
    return kind


checksums_of_modules = {}  # of the content that was run, by the module's name


@functools.cache
def load_module(path: Path, checksum: str):
    """Runs a Python file as a module, once for each content of it."""
    name = hashlib.sha256(f"{path} {checksum}".encode()).hexdigest()[:12]
    spec = importlib.util.spec_from_file_location(f"metapt_domain_{path.stem}_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    checksums_of_modules[spec.name] = checksum
    try:
        spec.loader.exec_module(module)
    except BadInput:
        raise
    except Exception as error:  # a user's file may raise anything
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        line = lines[-1] if lines else getattr(error, "lineno", "?")
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise BadInput(f"{path}, line {line}: {reason}") from None
    return module


def checksum_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def name_of(kind: type[Domain]) -> str:
    """What `find_domain` finds this domain by: its name, or FILE:CLASS."""
    path = Path(inspect.getfile(kind)).resolve()
    shipped = path.parent == HERE / "bench" / "domains"
    where = f"{path.name}:{kind.__name__}" if shipped else kind
    for name, place in DOMAINS.items():
        if place == where:
            return name
    return f"{path}:{kind.__name__}"


def identity(kind: type[Domain]) -> dict:
    """For config.json: the domain's name and its file's checksum; None for one in this file."""
    path = Path(inspect.getfile(kind)).resolve()
    checksum = None
    if path != Path(__file__).resolve():
        # Not of the file as it may have become since.
        checksum = checksums_of_modules.get(kind.__module__) or checksum_of(path)
    return {"domain": name_of(kind), "domain_sha256": checksum}


def make_domain(kind: type[Domain], settings: Settings, device: torch.device, data: Path) -> Domain:
    """BadInput where the class does not begin as every domain does."""
    domain = kind(settings, device, data)
    if not hasattr(domain, "data_folder"):
        call = "super().__init__(settings, device, data)"
        raise BadInput(f"{kind.__name__}.__init__ does not call {call}")
    return domain


def domain_of_run(run: Run, console: rich.console.Console) -> type[Domain]:
    """The domain that a run's config.json names. Where its file has changed since, a line says so.

    Raises:
        BadInput: the file lies in the run's folder. A run never supplies code: whoever opens a
            folder from elsewhere would execute what it brings.
    """
    config = run.config()
    name = config["domain"]
    match = OWN_DOMAIN.fullmatch(name)
    if name not in DOMAINS and match:
        with run.reading("config.json"):
            path = Path(match[1]).resolve()
        if run.folder.resolve() in path.parents:
            raise BadInput(f"{path} lies in the run {run.folder}: a run never supplies code")
    kind = find_domain(name)
    if identity(kind)["domain_sha256"] != config["domain_sha256"]:
        console.print(f"{name} has changed since {run.folder} was made; it is used as it is now")
    return kind


def domain_as_in(
    run: Run, given: dict, device: str, data: Path, console: rich.console.Console
) -> Domain:
    """The domain of a run, with its settings but those `given`, on the data it was trained on."""
    kind = domain_of_run(run, console)
    config = run.config()
    with run.reading("config.json"):
        settings = kind.Settings(**config["settings"])
    settings = dataclasses.replace(settings, **given)
    domain = make_domain(kind, settings, pick_device(device), data)
    if domain.data_digest() != config["data"]:
        raise BadInput(f"{run.folder} was trained on other data than {data} holds now")
    return domain


def make_settings(kind: type[Domain], given: dict, preset: str) -> Settings:
    """A domain's settings: its defaults, then a preset's, then those given."""
    presets = {"default": {}, **kind.presets}
    if preset not in presets:
        raise BadInput(f"--preset is {preset!r}; {kind.__name__} has {', '.join(presets)}")
    settings = kind.Settings(**{**presets[preset], **given})
    for name in given:
        reason = why_idle(name, settings)
        if reason:
            raise BadInput(f"{flag(name)} has no effect with {reason}")
    return settings


def why_idle(name: str, settings: Settings) -> str:
    """The option with which a setting has no effect, or an empty text."""
    if name == "terms" and settings.solver == "identity":
        return "--solver identity"
    if name == "alpha" and settings.solver != "neumann":
        return f"--solver {settings.solver}"
    if name == "hvp_step" and "finite" not in (settings.hvp, settings.unroll_hvp):
        return "--hvp exact"
    if name == "measure_steps" and settings.measure_epochs:
        return "--measure-epochs"
    return ""


def knobs_for(settings_class: type[Settings], command: str) -> list[Knob]:
    """The settings that `meta` or `pretrain` takes."""
    knobs = knobs_of(settings_class).values()
    return [knob for knob in knobs if command == "meta" or not knob.learning]


def parse_settings(settings_class: type[Settings], command: str, words: list[str]) -> dict:
    """`--name=value` or `--name value`, `--flag` or `--no-flag`, as {setting: value}."""
    knobs = {flag(knob.name): knob for knob in knobs_for(settings_class, command)}
    given = {}
    words = list(words)
    while words:
        first = words.pop(0)
        word, equals, text = first.partition("=")
        knob = knobs.get(word)
        negated = knob is None and word.startswith("--no-")
        if negated:
            knob = knobs.get("--" + word.removeprefix("--no-"))
        if knob is None or (negated and knob.kinds != (bool,)):
            raise BadInput(unknown_option(word, knobs, settings_class, command))
        if knob.kinds == (bool,):
            if equals:
                raise BadInput(f"{word} takes no value: it is {word} or {flag('no_' + knob.name)}")
            given[knob.name] = not negated
            continue
        if not equals:
            if not words:
                raise BadInput(f"{word} needs a value")
            text = words.pop(0)
        kind = next(kind for kind in knob.kinds if kind is not type(None))
        try:
            given[knob.name] = kind(text)
        except ValueError:
            raise BadInput(f"{word} is {text!r}, expected {kind.__name__}") from None
    return given


def unknown_option(word: str, knobs: dict, settings_class: type[Settings], command: str) -> str:
    """What there is to say of a word that is no option of a command."""
    if not word.startswith("-"):
        return f"{word!r} is no option; a domain stands first: metapt.py {command} DOMAIN ..."
    of_meta = {flag(name) for name in knobs_of(settings_class)}
    if word in of_meta:
        return f"{word} belongs to meta, not to {command}"
    close = difflib.get_close_matches(word, knobs, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"no such option: {word}{hint}"


def pick_device(name: str) -> torch.device:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise BadInput(f"--device is {name!r}, expected auto, cpu, cuda or cuda:N")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BadInput(f"--device {name}: there is no such GPU here")
    return device


# The signatures of the commands. A domain's settings are further words, which `train` parses.

app = typer.Typer(
    help=(__doc__ or "").partition("\n")[0],
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# Words that are no option of the command itself are settings of the domain.
TAKES_SETTINGS = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "help_option_names": [],
}
TAKES_WORDS = {"allow_extra_args": True, "ignore_unknown_options": True}

DomainName = Annotated[
    str, typer.Argument(help=f"{', '.join(DOMAINS)}, or a file of yours: my_domain.py")
]
Preset = Annotated[str, typer.Option(help="Settings to begin with")]
Out = Annotated[Path | None, typer.Option(help="The run's new folder; else one under runs/")]
Resume = Annotated[Path | None, typer.Option(help="Go on with this run from its last checkpoint")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")]
Data = Annotated[Path, typer.Option(help="Where prepared data lie")]
Jobs = Annotated[
    int | None, typer.Option(help="Processes that compare [default: as many as are of use]")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the summary as JSON and nothing else")]
Help = Annotated[bool, typer.Option("--help", "-h", help="Show this, and the settings of DOMAIN")]


def measuring(name: str):
    """An option of `finetune` and `eval` for a setting that their FT has in a run already."""
    return typer.Option(help=f"{knobs_of(Settings)[name].help} [default: the run's]")


Sizes = Annotated[str | None, measuring("sizes")]
MeasureScope = Annotated[str | None, measuring("measure_scope")]
MeasureRate = Annotated[float | None, measuring("measure_lr")]
MeasureSteps = Annotated[int | None, measuring("measure_steps")]
MeasureEpochs = Annotated[int | None, measuring("measure_epochs")]
MeasureBatch = Annotated[int | None, measuring("measure_batch_size")]
Seeds = Annotated[int, typer.Option("--compare", help="Seeds of FT")]


@app.callback(invoke_without_command=True)
def top(
    version: Annotated[bool, typer.Option("--version", help="Show the version and stop")] = False,
):
    if version:
        print(f"{FORMAT}, torch {torch.__version__}")
        raise typer.Exit


@app.command(context_settings=TAKES_WORDS)
def download(
    context: typer.Context,
    data_set: Annotated[str, typer.Argument(help=", ".join(SCRIPTS))],
):
    """Fetch a data set and prepare it. `download DATA -- --help` lists what its script takes."""
    words = list(context.args)
    name = data_set
    if words and f"{data_set} {words[0]}" in SCRIPTS:
        variant = words.pop(0)
        name = f"{data_set} {variant}"
    if name not in SCRIPTS:
        raise BadInput(f"{name!r} cannot be downloaded; there are {', '.join(SCRIPTS)}")
    script = HERE / "data_scripts" / f"{SCRIPTS[name]}.py"
    if not script.exists():
        raise BadInput(f"{script} is missing: copy data_scripts of metapt's repository there")
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    # -P: a file random.py in the user's folder is not taken for Python's own.
    command = [sys.executable, "-P", "-m", f"data_scripts.{SCRIPTS[name]}", *words]
    with noting_signals():
        # Ctrl-C reaches the script as well. It inherits this block, so that the signal waits until
        # the script has been imported and unblocks it to answer.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        status = subprocess.run(command, check=False, env={**os.environ, "PYTHONPATH": path})
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    raise typer.Exit(status.returncode)


@app.command(context_settings=TAKES_SETTINGS)
def pretrain(
    context: typer.Context,
    domain: DomainName = "digits-rotation",
    phi: Annotated[
        Path | None,
        typer.Option(help="Use this φ, frozen: of a run, or from a file phi.pt or phi.csv"),
    ] = None,
    use: Annotated[
        str, typer.Option(help="Of a run: its learned φ; or chosen, the φ that it recommends")
    ] = "chosen",
    preset: Preset = "default",
    out: Out = None,
    resume: Resume = None,
    device: Device = "auto",
    data: Data = Path("data"),
    jobs: Jobs = None,
    as_json: AsJson = False,
    show_help: Help = False,
):
    """Pre-train with φ fixed: the baseline, or (--phi) with a φ that was learned."""
    request = TrainingRequest(
        command="pretrain",
        domain=domain,
        words=context.args,
        preset=preset,
        phi=phi,
        use=use,
        out=out,
        resume=resume,
        device=device,
        data=data,
        jobs=jobs,
    )
    if show_help:
        print_help(context, request)
    else:
        train(request, as_json)


@app.command(context_settings=TAKES_SETTINGS)
def meta(
    context: typer.Context,
    domain: DomainName = "digits-rotation",
    preset: Preset = "default",
    out: Out = None,
    resume: Resume = None,
    device: Device = "auto",
    data: Data = Path("data"),
    jobs: Jobs = None,
    as_json: AsJson = False,
    show_help: Help = False,
):
    """Learn φ while pre-training (Algorithm 1), then compare what it is worth."""
    request = TrainingRequest(
        command="meta",
        domain=domain,
        words=context.args,
        preset=preset,
        phi=None,
        use="chosen",
        out=out,
        resume=resume,
        device=device,
        data=data,
        jobs=jobs,
    )
    if show_help:
        print_help(context, request)
    else:
        train(request, as_json)


@app.command(name="finetune")
def finetune_run(
    run: Annotated[Path, typer.Argument(help="A run: its folder")],
    sizes: Sizes = None,
    measure_scope: MeasureScope = None,
    measure_lr: MeasureRate = None,
    measure_steps: MeasureSteps = None,
    measure_epochs: MeasureEpochs = None,
    measure_batch_size: MeasureBatch = None,
    seeds: Seeds = 5,
    export: Annotated[
        Path | None, typer.Option(help="Also write the encoder's state_dict to this new file")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace that file")] = False,
    out: Out = None,
    device: Device = "auto",
    data: Data = Path("data"),
    jobs: Jobs = None,
    as_json: AsJson = False,
):
    """Fine-tune a run's encoder, by seed and FT-set size, beside one without PT."""
    given = {
        "sizes": sizes,
        "measure_scope": measure_scope,
        "measure_lr": measure_lr,
        "measure_steps": measure_steps,
        "measure_epochs": measure_epochs,
        "measure_batch_size": measure_batch_size,
    }
    check_export(export, force, run, out)
    measure_runs("finetune", [run], given, seeds, out, device, data, jobs, as_json, export)


@app.command(name="eval")
def evaluate_runs(
    runs: Annotated[
        list[Path], typer.Argument(help="Runs of one domain; the others are compared to the first")
    ],
    sizes: Sizes = None,
    measure_scope: MeasureScope = None,
    measure_lr: MeasureRate = None,
    measure_steps: MeasureSteps = None,
    measure_epochs: MeasureEpochs = None,
    measure_batch_size: MeasureBatch = None,
    seeds: Seeds = 5,
    out: Out = None,
    device: Device = "auto",
    data: Data = Path("data"),
    jobs: Jobs = None,
    as_json: AsJson = False,
):
    """Test metrics of runs, paired by seed, with differences and 95 % intervals."""
    given = {
        "sizes": sizes,
        "measure_scope": measure_scope,
        "measure_lr": measure_lr,
        "measure_steps": measure_steps,
        "measure_epochs": measure_epochs,
        "measure_batch_size": measure_batch_size,
    }
    measure_runs("eval", runs, given, seeds, out, device, data, jobs, as_json, None)


# Comparisons by several processes

# What metapt.py does not repeat: metrics.jsonl has the residual of each solve, and `report` counts
# those that are useless.
DOUBTS_OF_SOLVES = "‖Hq − v‖|the solver met"
# How many seconds a process takes until it measures: it imports torch and reads the data.
SECONDS_TO_BEGIN = 5


def require_jobs(jobs: int | None) -> None:
    if jobs is not None and jobs < 1:
        raise BadInput(f"--jobs is {jobs}, expected 1 or more")


def default_jobs(domain: Domain) -> int:
    """As many processes as there are cores for them; one on a GPU, which they would crowd.

    One, too, where another program uses this file: a process begins by running the main program
    once more, and not every program is written for that.
    """
    if domain.device.type != "cpu" or __name__ != "__main__":
        return 1
    import joblib

    # Unlike os.cpu_count it knows what a container, or taskset, leaves to this process.
    return max(1, joblib.cpu_count() // threads_of_cell(domain))


def threads_of_cell(domain: Domain) -> int:
    """Fixed, because the number of threads has a say in how sums are rounded."""
    return domain.threads or 1


def measure_cells(
    domain: Domain, cells: list[Cell], jobs: int | None, advance: Callable[[], None]
) -> list[Measured]:
    """The results of cells, in their order, from so many processes; None: as many as are of use.

    They are the same for any number of processes. `advance` is called after each cell.
    """
    first = []
    if jobs is None:
        # The first cell says whether it pays to begin others.
        begun = time.perf_counter()
        first = measure_here(domain, cells[:1], advance)
        seconds_left = (time.perf_counter() - begun) * (len(cells) - 1)
        jobs = default_jobs(domain) if seconds_left > SECONDS_TO_BEGIN else 1
    rest = cells[len(first) :]
    jobs = min(jobs, len(rest))
    if jobs > 1:
        return first + measure_in_workers(domain, rest, jobs, advance)
    return first + measure_here(domain, rest, advance)


def measure_here(domain: Domain, cells: list[Cell], advance: Callable[[], None]) -> list[Measured]:
    measured = []
    with threads_of_torch(threads_of_cell(domain)):
        for cell in cells:
            measured.append(measure_cell(domain, cell))
            advance()
    return measured


@contextlib.contextmanager
def threads_of_torch(count: int):
    """Within this torch has so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class DomainRecipe(NamedTuple):
    """What a worker makes a domain of. It looks at prepared data where they lie."""

    identity: dict  # what config.json has of a domain: its name and its file's checksum
    settings: dict
    device: str
    data_folder: Path
    threads: int  # that made it here


def recipe_of(domain: Domain) -> DomainRecipe:
    return DomainRecipe(
        identity=identity(type(domain)),
        settings=dataclasses.asdict(domain.settings),
        device=str(domain.device),
        data_folder=domain.data_folder,
        threads=domain.threads_here,
    )


class WorkerEnded(Failed):
    """A process that compares has ended by itself, or could not begin."""


def measure_in_workers(
    domain: Domain, cells: list[Cell], jobs: int, advance: Callable[[], None]
) -> list[Measured]:
    """The results of cells, in their order, from workers, which end with this process.

    Workers of the standard library: joblib's would be sent a copy of whatever stands in a program's
    own file, classes of errors included, in place of its name.
    """
    try:
        pool = concurrent.futures.ProcessPoolExecutor(
            jobs,
            # A forked process would have torch's threads in the middle of whatever they were doing.
            mp_context=multiprocessing.get_context("spawn"),
            initializer=begin_worker,
            initargs=(threads_of_cell(domain),),
        )
    except OSError as error:
        # Locks between processes need a little of the memory that they share.
        raise WorkerEnded(f"processes that compare cannot begin: {error}") from None
    others = set(multiprocessing.active_children())
    try:
        sent = send_cells(pool, recipe_of(domain), cells)
        for done in concurrent.futures.as_completed(sent):
            done.result()
            advance()
    except concurrent.futures.process.BrokenProcessPool:
        end_processes_but(others)
        reason = f"one of {jobs} processes that compared has ended, as where memory runs out"
        raise WorkerEnded(reason) from None
    except BaseException:
        end_processes_but(others)
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    return [done.result() for done in sent]


def end_processes_but(others: set) -> None:
    """Ends what this process has begun: nobody waits for what they are in the middle of."""
    for process in set(multiprocessing.active_children()) - others:
        process.terminate()


def send_cells(
    pool: concurrent.futures.Executor, recipe: DomainRecipe, cells: list[Cell]
) -> list[concurrent.futures.Future]:
    """Hands cells to workers, which begin with the first cell.

    Ctrl-C and SIGTERM wait until all have begun: one that is half begun could not be ended.
    """
    # As bytes, since tensors would go through shared memory, of which there may be little.
    pickled_recipe = pickle.dumps(recipe)
    pickled_cells = [pickle.dumps(cell) for cell in cells]
    with noting_signals() as asked_to_stop:
        # Workers inherit this block: Ctrl-C, which reaches them too, is answered here alone.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            sent = [pool.submit(work, pickled_recipe, cell) for cell in pickled_cells]
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    if asked_to_stop.is_set():
        raise KeyboardInterrupt
    return sent


def begin_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", DOUBTS_OF_SOLVES)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """Ends a worker whose parent was killed and could not end it."""
    multiprocessing.parent_process().join()
    os._exit(1)


def work(pickled_recipe: bytes, pickled_cell: bytes) -> Measured:
    """What a worker does with a cell."""
    domain = domain_by_recipe(pickled_recipe)
    # Only now, since it may name classes of the domain's file.
    cell = pickle.loads(pickled_cell)
    return measure_cell(domain, cell)


@functools.cache
def domain_by_recipe(pickled_recipe: bytes) -> Domain:
    """A worker's domain, which is made once."""
    recipe = pickle.loads(pickled_recipe)
    kind = find_domain(recipe.identity["domain"])
    if identity(kind) != recipe.identity:
        raise Failed(f"{recipe.identity['domain']} was changed while it was in use")
    settings = kind.Settings(**recipe.settings)
    with threads_of_torch(recipe.threads):
        return make_domain(kind, settings, torch.device(recipe.device), recipe.data_folder)


# What `pretrain` and `meta` do


class TrainingRequest(NamedTuple):
    """What was asked of `pretrain` or `meta`."""

    command: str
    domain: str  # empty: none was named
    words: list[str]  # settings, as written
    preset: str
    phi: Path | None
    use: str
    out: Path | None
    resume: Path | None
    device: str
    data: Path
    jobs: int | None

    def kind(self) -> type[Domain]:
        return find_domain(self.domain or next(iter(DOMAINS)))


def print_help(context: typer.Context, request: TrainingRequest) -> None:
    """The command's own options, and below them the settings of the domain that was named."""
    console = make_console(as_json=False)
    if request.resume and not request.domain:
        kind = domain_of_run(Run(request.resume), console)
    else:
        kind = request.kind()
    console.print(context.get_help())
    console.print(f"\nSettings of {name_of(kind)}, as --name=value or --name value:")
    knobs = knobs_for(kind.Settings, request.command)
    for group in dict.fromkeys([*GROUPS, *(knob.group for knob in knobs)]):
        rows = [describe_knob(knob) for knob in knobs if knob.group == group]
        if rows:
            show_table(console, group, ["setting", "default", "meaning"], rows, justify="left")
    console.print(f"Presets (--preset): {', '.join(['default', *kind.presets])}")


def describe_knob(knob: Knob) -> list[str]:
    option = flag(knob.name)
    if knob.kinds == (bool,):
        option = f"{option}/{flag('no_' + knob.name)}"
    default = "none" if knob.default in (None, "") else f"{knob.default}"
    if isinstance(knob.default, float):
        default = f"{knob.default:.4g}"
    return [option, default, knob.help]


def train(request: TrainingRequest, as_json: bool) -> None:
    """`pretrain` and `meta`: trains, follows it with a bar, compares, and writes the results."""
    console = make_console(as_json)
    started = time.perf_counter()
    warnings.filterwarnings("ignore", DOUBTS_OF_SOLVES)
    require_jobs(request.jobs)
    if request.resume:
        run, training = continue_run(request, console)
    else:
        run, training = begin_run(request, console)
    try:
        threads = training.domain.threads
        if threads:
            torch.set_num_threads(threads)
        follow(training, run, request.command, console)
        with advice_on_end("stopped while comparing", how_to_go_on(request.command, run)):
            summary = report(training, run, request.command, request.jobs, started, console)
    finally:
        run.release()
    if as_json:
        print(json.dumps(summary))


def begin_run(request: TrainingRequest, console: rich.console.Console) -> tuple[Run, Training]:
    """A new run and its training. What cannot be is said before anything is written."""
    kind = request.kind()
    given = parse_settings(kind.Settings, request.command, request.words)
    settings = make_settings(kind, given, request.preset)
    domain = make_domain(kind, settings, pick_device(request.device), request.data)
    compared_sizes(domain)
    if request.use not in ("chosen", "learned"):
        raise BadInput(f"--use is {request.use!r}, expected chosen or learned")
    if request.use != "chosen" and request.phi is None:
        raise BadInput("--use says which φ of --phi, which is not given")
    phi = phi_from(request.phi, request.use, domain, console) if request.phi else None
    training = Training(domain, learn=request.command == "meta", phi=phi)
    config = {
        "command": request.command,
        **identity(kind),
        "settings": dataclasses.asdict(domain.settings),
        "phi": str(request.phi.resolve()) if phi is not None else None,
        "device": str(domain.device),
        "data": domain.data_digest(),
        "torch": torch.__version__,
    }
    return Run.create(request.out, config), training


def continue_run(request: TrainingRequest, console: rich.console.Console) -> tuple[Run, Training]:
    """An earlier run and its training at the last checkpoint."""
    if request.out or request.phi or request.preset != "default" or request.use != "chosen":
        raise BadInput("--resume goes on with a run as it began: no --out, --phi, --use, --preset")
    run = Run(request.resume).acquire()
    config = run.config()
    if config["command"] != request.command:
        advice = f"resume it with {config['command']}"
        raise BadInput(f"{run.folder} is a run of {config['command']}: {advice}")
    if request.domain and name_of(request.kind()) != config["domain"]:
        raise BadInput(f"{run.folder} is of {config['domain']}, not of {request.domain}")
    # On the same kind of device, for the same numbers.
    began_on_cpu = config["device"] == "cpu" and request.device == "auto"
    device = "cpu" if began_on_cpu else request.device
    domain = domain_as_in(run, {}, device, request.data, console)
    given = parse_settings(type(domain).Settings, request.command, request.words)
    for name, value in given.items():
        before = getattr(domain.settings, name)
        if value != before:
            raise BadInput(f"{run.folder} began with {flag(name)} {before}, not {value}")
    phi = None
    if config["phi"] and not (run.folder / "checkpoint.pt").exists():
        phi = phi_from(Path(config["phi"]), "learned", domain, console)
    training = Training(domain, learn=request.command == "meta", phi=phi)
    run.resume(training)
    steps = training.rounds * domain.settings.steps
    console.print(f"going on at PT step {training.steps_done} of {steps}")
    return run, training


def phi_from(path: Path, use: str, domain: Domain, console: rich.console.Console) -> dict | None:
    """φ as a state dict, from a run's folder, a file phi.pt, or a table phi.csv.

    None: the run recommends the domain's default φ, and `use` is "chosen".
    """
    meta = domain.meta()
    is_run = path.is_dir()
    if not is_run and path.suffix == ".csv":
        return phi_from_table(path, domain)
    if not is_run and path.suffix == ".pt":
        with refusing(f"{path} holds no φ of {type(domain).__name__}", Exception):
            phi = torch.load(path, map_location=domain.device, weights_only=True)
            return fitting_phi(phi, meta)
    run = Run(path)
    config = run.config()
    if config["domain"] != name_of(type(domain)):
        raise BadInput(f"{path} is of {config['domain']}, not of {name_of(type(domain))}")
    if config["data"] != domain.data_digest():
        raise BadInput(f"{path} learned its φ on other data, or on other parts (--seed draws them)")
    checkpoint = run.load_checkpoint()
    if checkpoint["step"] < planned_steps(config):
        console.print(f"{path} is unfinished: its φ is that of PT step {checkpoint['step']}")
    if use == "chosen" and chosen_by(run) == "default_phi":
        advice = "this is PT with the default φ (--use learned: with its own)"
        console.print(f"{path} found its φ not worth it: {advice}")
        return None
    with refusing(f"{path}: its φ does not fit {type(domain).__name__}", Exception):
        return fitting_phi(checkpoint["phi"], meta)


def chosen_by(run: Run) -> str | None:
    """What a run of `meta` recommends; None: it has not compared."""
    if not (run.folder / "summary.json").exists():
        return None
    chosen = run.read_json("summary.json").get("chosen")
    if chosen not in (None, "default_phi", "learned_phi", "online"):
        raise BadInput(f"{run.folder / 'summary.json'}: chosen is {chosen!r}")
    return chosen


def planned_steps(config: dict) -> float:
    """How many PT steps a run has in all."""
    settings = config["settings"]
    rounds = settings.get("rounds") if config["command"] == "meta" else 1
    steps = settings.get("steps")
    both_are_numbers = isinstance(steps, int) and isinstance(rounds, int)
    return steps * rounds if both_are_numbers else math.inf


def fitting_phi(phi: dict, meta: nn.Module) -> dict:
    """The same state dict; an error where it is not one of this module's, or not finite."""
    meta.load_state_dict(phi)
    for name, tensor in phi.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} is not finite")
    return phi


def phi_from_table(path: Path, domain: Domain) -> dict:
    """φ from a table by name such as a run's phi.csv: its first and its last column."""
    kind = type(domain).__name__
    meta = domain.meta()
    table = domain.table(meta)
    if table is None or domain.phi_from_table([float(row[-1]) for row in table[1]]) is None:
        raise BadInput(f"{path}: the φ of {kind} cannot be made from a table; give a run or phi.pt")
    names = [str(row[0]) for row in table[1]]
    with refusing(f"{path} is no table of φ", (OSError, ValueError, LookupError, csv.Error)):
        with path.open(newline="", encoding="utf-8") as file:
            _, *rows = [row for row in csv.reader(file) if row]  # without blank lines
        given = {row[0]: float(row[-1]) for row in rows}
        if len(given) != len(rows):
            raise ValueError("a name stands there twice")
        if set(given) != set(names):
            odd = sorted(set(given) ^ set(names))
            raise ValueError(f"its names are not those of {kind}: {', '.join(odd[:5])}")
        return fitting_phi(domain.phi_from_table([given[name] for name in names]), meta)


@contextlib.contextmanager
def noting_signals():
    """While this lasts, Ctrl-C and SIGTERM set the event that it yields, and do nothing else."""
    asked_to_stop = threading.Event()

    def note(number, frame) -> None:
        asked_to_stop.set()

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked_to_stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def advice_on_end(stopped: str, advice: str):
    """Ctrl-C, SIGTERM and the end of a worker end the program with what to do then."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        raise Failed(f"{stopped}; {advice}") from None
    except WorkerEnded as error:
        raise Failed(f"{error}; with a smaller --jobs less is needed; {advice}") from None
    finally:
        signal.signal(signal.SIGTERM, before)


def how_to_go_on(command: str, run: Run) -> str:
    return f"go on with: {PROGRAM} {command} --resume {shlex.quote(str(run.folder))}"


# How a user starts this program, for advice. bench/ranks.py, which starts it too, has its own.
PROGRAM = "python metapt.py"


def follow(training: Training, run: Run, command: str, console: rich.console.Console) -> None:
    """Trains to the end, with a bar, metrics and checkpoints. Ctrl-C and SIGTERM save one first."""
    domain = training.domain
    steps = training.rounds * domain.settings.steps
    if training.steps_done >= steps:
        return
    label = "learning φ" if training.learn else "pre-training"
    with noting_signals() as asked_to_stop, progress_bar(console, label, steps) as advance:

        def on_episode(training: Training) -> None:
            measured = for_json(domain.measure(training.meta))
            losses = for_json(training.losses)
            run.log(
                {"step": training.steps_done, "skipped": training.skipped, **losses, **measured}
            )
            # One number is worth following by eye; of many, none in particular.
            names = names_to_follow(domain, measured)
            status = ""
            if len(names) == 1 and measured[names[0]] is not None:
                status = f"φ {measured[names[0]]:.4g}"
            advance(training.steps_done, status)
            if asked_to_stop.is_set():
                run.save_checkpoint(training)
                where = f"stopped at PT step {training.steps_done}"
                raise Failed(f"{where}; {how_to_go_on(command, run)}")

        training.run(on_episode, run.save_checkpoint)


def names_to_follow(domain: Domain, measured: dict[str, float | None]) -> list[str]:
    """What of φ a run is followed by: what has a caption, or else the ten largest numbers."""
    captioned = [name for name in domain.captions if name in measured]
    return captioned or list(ten_largest(without_none(measured)))


def without_none(numbers: dict[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in numbers.items() if value is not None}


def report(
    training: Training,
    run: Run,
    command: str,
    jobs: int | None,
    started: float,
    console: rich.console.Console,
) -> dict:
    """Compares after FT; writes summary, φ and figures; says what was found."""
    domain = training.domain
    learned = training.learned()
    measured = for_json(domain.measure(learned))
    facts = for_json(domain.facts(learned))
    summary = {
        **summary_head(command, domain),
        "training_seconds": training.seconds,
        "pt_steps": training.steps_done,
        "meta_steps": training.meta_steps,
        "skipped_meta_steps": training.skipped,
        "validation_loss": final_validation_loss(training),
        "chosen": None,
        "phi": phi_in_numbers(learned, measured),
        **facts,
    }
    shown = ten_largest(without_none(measured))
    lines = [
        f"{name.replace('_', ' ')}: {value:.4g}"
        for name, value in {**shown, **without_none(facts)}.items()
    ]
    table = domain.table(learned)
    if table:
        columns, rows = table
        run.save_table("phi.csv", columns, rows)
        summary["phi_table"] = "phi.csv"
        lines.append(f"φ by name: {run.folder / 'phi.csv'} ({', '.join(columns)})")
    if training.learn:
        run.write("phi.pt", saved_bytes(learned.state_dict()))
    if training.skipped:
        lines.append(f"{training.skipped} meta steps were skipped: they had no usable gradient")
    history = run.history()
    residuals = [row.get("residual") for row in history]
    useless = sum(residual is not None and residual >= 1 for residual in residuals)
    if useless:
        lines.append(
            f"in {useless} of {training.meta_steps} meta steps the solve came to nothing better "
            "than q = 0 (‖Hq − v‖ ≥ ‖v‖), and φ was moved by it all the same: more --damping or "
            "--terms may help"
        )
    if domain.settings.compare:
        methods = methods_of(training, learned, run)
        entries, sentences = compare_methods(training, methods, jobs, console)
        summary |= entries
        lines += sentences
    figures = {"losses.png": lambda figure: draw_losses(figure, history)}
    names = names_to_follow(domain, measured)
    if training.meta_steps and names:
        figures["phi.png"] = lambda figure: draw_phi(figure, history, domain, names)
    figures |= domain.figures(learned)
    return conclude(run, summary, figures, lines, started, console)


def summary_head(command: str, domain: Domain) -> dict:
    """What the summaries of all commands begin with."""
    return {
        "command": command,
        "domain": name_of(type(domain)),
        "seed": domain.settings.seed,
        "device": str(domain.device),
    }


def for_json(numbers: dict) -> dict:
    """The same by name, with None in place of what is not finite: JSON has no NaN."""
    finite = {}
    for name, value in numbers.items():
        finite[name] = None if value is None else finite_or_none(value)
    return finite


def phi_in_numbers(meta: nn.Module, measured: dict) -> dict:
    """φ for the summary: scalars as `measure` gives them, larger ones by shape and extremes."""
    numbers = {}
    for name, p in detached(meta).items():
        if p.numel() == 1:
            numbers[name] = measured.get(name, finite_or_none(p.item()))
        else:
            extremes = {"mean": p.mean(), "min": p.min(), "max": p.max()}
            numbers[name] = {"shape": list(p.shape), **for_json(extremes)}
    return numbers


def final_validation_loss(training: Training) -> float | None:
    """L_V over the whole validation part with the θ and ψ of the end; None without ψ."""
    if not training.learn:
        return None
    domain = training.domain
    index = torch.arange(domain.sizes["validation"])
    with torch.no_grad(), torch.random.fork_rng(random_devices(domain)):
        torch.manual_seed(domain.settings.seed)
        domain.begin_episode(training.meta)
        loss = domain.finetune_loss(training.network, training.head, "validation", index)
        return loss(detached(training.network), training.psi).item()


def methods_of(training: Training, learned: nn.Module, run: Run) -> dict[str, Method]:
    """What the comparison at the end of a run compares."""
    of_this_run = given_network(training.domain, training.network)
    methods = {"no_pretraining": Method("untrained")}
    if training.learn:
        phi = on_cpu(learned)
        methods["default_phi"] = Method("pretrained")
        methods["learned_phi"] = Method("pretrained", phi=phi)
        methods["online"] = of_this_run
    elif run.config()["phi"]:
        methods["learned_phi"] = of_this_run
    else:
        methods["default_phi"] = of_this_run
    return methods


def compare_methods(
    training: Training, methods: dict[str, Method], jobs: int | None, console: rich.console.Console
) -> tuple[dict, list[str]]:
    """The comparison and, where φ was learned, the choice: for the summary, and in sentences."""
    domain = training.domain
    seeds = domain.settings.compare
    cells = cells_of(methods, compared_sizes(domain), seeds, with_held=training.learn)
    with progress_bar(console, "comparing", len(cells)) as advance:
        comparison = collect(cells, measure_cells(domain, cells, jobs, advance))
    entries = {"comparison": comparison_rows(domain, comparison.finetuned)}
    if not training.learn:
        return entries, []
    choice = choose(domain, comparison.held_scores)
    entries["chosen"] = choice.chosen
    entries["held_score"] = choice.held_scores
    labels = training.batches["finetune"].examples
    return entries, [f"(φ was learned with {labels} examples' FT labels)", choice.sentence]


def conclude(
    run: Run,
    summary: dict,
    figures: dict[str, Callable],
    lines: list[str],
    started: float,
    console: rich.console.Console,
) -> dict:
    """Writes the summary and the figures; shows tables, what else there is to say, and where."""
    rows = summary.get("comparison", [])
    differences = summary.get("differences", [])
    if rows:
        figures["comparison.png"] = lambda figure: draw_comparison(figure, rows)
    for name, draw in figures.items():
        run.save_figure(name, draw)
    seconds = time.perf_counter() - started
    summary["seconds"] = seconds
    run.write_json("summary.json", summary)
    show_comparison(console, rows)
    show_differences(console, differences)
    for line in lines:
        console.print(line)
    names = sorted(path.name for path in run.folder.iterdir() if not path.name.startswith("."))
    console.print(f"{seconds:.0f} s; {run.folder}: {', '.join(names)}")
    return summary


# What `finetune` and `eval` do


def measure_runs(
    command: str,
    paths: list[Path],
    given: dict,
    seeds: int,
    out: Path | None,
    device: str,
    data: Path,
    jobs: int | None,
    as_json: bool,
    export: Path | None,
) -> None:
    """Fine-tunes the encoders of runs alike, beside one without PT, and compares them."""
    console = make_console(as_json)
    started = time.perf_counter()
    if seeds < 1:
        raise BadInput(f"--compare is {seeds}, expected 1 or more here")
    if len({path.resolve() for path in paths}) < len(paths):
        raise BadInput("a run is named twice")
    require_jobs(jobs)
    given = {name: value for name, value in given.items() if value is not None}
    domains = [measuring_domain(Run(path), given, device, data, console) for path in paths]
    for path, domain in zip(paths, domains, strict=True):
        require_comparable(path, domain, paths[0], domains[0], given)
    networks = [Run(path).load_encoder(d) for path, d in zip(paths, domains, strict=True)]
    domain = domains[0]
    sizes = compared_sizes(domain)

    config = {
        "command": command,
        **identity(type(domain)),
        "runs": [str(path) for path in paths],
        "sizes": sizes,
        "seeds": seeds,
        "settings": dataclasses.asdict(domain.settings),
    }
    run = Run.create(out, config)
    lines = []
    if export:
        write_whole(export, saved_bytes(networks[0].encoder.state_dict()))
        lines.append(f"the encoder's state_dict is in {export}")
    try:
        methods = methods_of_runs(paths, domains, networks)
        methods["no_pretraining"] = Method("untrained")
        cells = cells_of(methods, sizes, seeds, with_held=False)
        begin_again = f"begin {command} anew with another --out"
        with (
            advice_on_end("stopped", begin_again),
            progress_bar(console, "fine-tuning", len(cells)) as advance,
        ):
            comparison = collect(cells, measure_cells(domain, cells, jobs, advance))
        results = comparison.finetuned
        summary = {
            **summary_head(command, domain),
            "scope": domain.settings.measure_scope,
            "comparison": comparison_rows(domain, results),
        }
        if command == "eval":
            summary["differences"] = difference_rows(domain, results, list(methods), sizes)
        summary = conclude(run, summary, {}, lines, started, console)
    finally:
        run.release()
    if as_json:
        print(json.dumps(summary))


def methods_of_runs(
    paths: list[Path], domains: list[Domain], networks: list[Network]
) -> dict[str, Method]:
    """The encoders of runs by the paths of the runs, none of which is taken for a method."""
    methods = {}
    for path, domain, network in zip(paths, domains, networks, strict=True):
        name = str(path)
        if name in METHODS:
            name = os.path.join(".", name)
        methods[name] = given_network(domain, network)
    return methods


def measuring_domain(
    run: Run, given: dict, device: str, data: Path, console: rich.console.Console
) -> Domain:
    """A run's domain, with its FT as there but for what is given."""
    config = run.config()
    given = dict(given)
    own_scope = config["settings"].get("measure_scope")
    if given.get("measure_scope", own_scope) != own_scope:
        # The run's rate is for its own scope.
        given.setdefault("measure_lr", None)
    if "measure_steps" in given:
        if given.get("measure_epochs"):
            raise BadInput("--measure-steps has no effect with --measure-epochs")
        given["measure_epochs"] = 0
    domain = domain_as_in(run, given, device, data, console)
    step = run.load_checkpoint()["step"]
    if step < planned_steps(config):
        console.print(f"{run.folder} is unfinished: its encoder is that of PT step {step}")
    return domain


def require_comparable(
    path: Path, domain: Domain, first_path: Path, first: Domain, given: dict
) -> None:
    """BadInput where two runs have not the same domain, data, FT and FT head."""
    if type(domain) is not type(first):
        other = name_of(type(domain))
        raise BadInput(f"{path} is of {other}, {first_path} of {name_of(type(first))}")
    for knob in knobs_of(type(domain.settings)).values():
        same = getattr(domain.settings, knob.name) == getattr(first.settings, knob.name)
        if knob.data and not same:
            why = "they have other data"
            raise BadInput(f"{path} has another {flag(knob.name)} than {first_path}: {why}")
        of_measuring = knob.group == MEASURING and knob.name not in (*given, "compare")
        if of_measuring and not same:
            why = "name it, so that all have the same FT"
            raise BadInput(f"{path} has another {flag(knob.name)} than {first_path}: {why}")
    shapes = [p.shape for p in domain.head().parameters()]
    if shapes != [p.shape for p in first.head().parameters()]:
        raise BadInput(f"{path} has features of another size than {first_path}: no common head")


def check_export(export: Path | None, force: bool, run: Path, out: Path | None) -> None:
    """BadInput where the encoder cannot be written to that file, or should not be."""
    if export is None:
        return
    target = export.resolve()
    runs = [folder.resolve() for folder in (run, out) if folder]
    beside_metrics = (target.parent / "metrics.jsonl").exists()
    if beside_metrics or any(folder in target.parents for folder in runs):
        raise BadInput(f"{export} lies in a run's folder: name a file elsewhere")
    if not target.parent.is_dir():
        raise BadInput(f"{export} cannot be written: {target.parent} is no folder")
    if target.exists() and not (force and target.is_file()):
        raise BadInput(f"{export} is there already (--force replaces a file)")


# How the program starts and ends


def command_words(words: list[str]) -> list[str]:
    """`meta --steps 60` names no domain: an empty one is put in its place.

    Otherwise the first setting would be taken for it.
    """
    takes_domain = words[:1] in (["meta"], ["pretrain"])
    if takes_domain and (len(words) == 1 or words[1].startswith("-")):
        return [words[0], "", *words[1:]]
    return words


def refuse_ranks() -> None:
    """BadInput under torchrun, unless bench/ranks.py replaced `Training` by one that sums."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and Training.reduce is None:
        command = "torchrun --nproc-per-node N -m bench.ranks COMMAND ..."
        raise BadInput(f"this is one process's program; for several: {command}")


def refuse_workers() -> None:
    """BadInput where a process of a comparison, as it begins, runs a script that calls `main`."""
    # What multiprocessing marks a process with while it runs the main program once more.
    if hasattr(multiprocessing.current_process(), "_inheriting"):
        where = "put metapt.main(...) under if __name__ == '__main__', or say --jobs 1"
        raise BadInput(f"each process that compares runs this script once more: {where}")


def main(words: list[str] | None = None) -> None:
    """Runs a command. What the user can mend is one line and exit status 2, other ends are 1."""
    # Figures go into files. A notebook names a backend here that this Python may lack.
    os.environ["MPLBACKEND"] = "agg"
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A terminal that cannot say φ shows a question mark, and not a traceback.
            stream.reconfigure(errors="replace")
    if os.environ.get("COLUMNS") == "0":
        # Some schedulers set it so; rich would print nothing.
        del os.environ["COLUMNS"]
    if words is None:
        words = sys.argv[1:]
    status, message = run_command(words or ["--help"])
    if message:
        print(f"metapt: {' '.join(message.splitlines())}", file=sys.stderr)
    sys.exit(status)


def run_command(words: list[str]) -> tuple[int, str]:
    """The exit status of a command, and what is to be said of its end: nothing if it was good."""
    try:
        refuse_ranks()
        refuse_workers()
        command = typer.main.get_command(app)
        status = command.main(command_words(words), prog_name="metapt.py", standalone_mode=False)
        # typer gives the number that ends a shell's command after Ctrl-C.
        return (1, "stopped") if status == 130 else (status or 0, "")
    except BadInput as error:
        return 2, str(error)
    except typer.TyperException as error:
        return 2, error.format_message()
    except OSError as error:
        of_the_machine = (*DISK_FULL, errno.EPIPE, errno.EIO, errno.ENOMEM)
        return (1 if error.errno in of_the_machine else 2), str(error)
    except Failed as error:
        return 1, str(error)
    except (KeyboardInterrupt, typer.Abort):
        return 1, "stopped"
    except (MemoryError, RuntimeError) as error:
        if re.search("MemoryError|(not enough|out of) memory|alloc", repr(error)):
            return 1, str(error).partition("\n")[0] or "out of memory"
        raise


if __name__ == "__main__":
    main()
