"""Other ways to a hypergradient, each one pure function of a problem (bench/problems.py) that gives
dL_V/dφ, flat.

They are here to be compared with; what belongs to the PT/FT method itself is in metapt.py.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from bench.accuracy.problems import (
    MOMENTUM,
    Modules,
    Params,
    Problem,
    after_finetuning,
    flat,
    grad,
    leaves,
    unflat,
)


def _v(p: Problem, theta: Params) -> Tensor:
    """dL_V(θ, ψ_K)/dθ, flat."""
    theta = leaves(theta)
    return flat(grad(after_finetuning(p, theta), theta))


def reverse(p: Problem, last: int | None = None) -> Tensor:
    """Backpropagation through the last PT steps; None: through all of them, which is exact.

    Domke, "Generic methods for optimization-based modeling", AISTATS 2012; truncated: Shaban et
    al., "Truncated back-propagation for bilevel optimization", AISTATS 2019, section 3. The
    velocity is a constant where it begins.
    """
    last = p.pt_steps if last is None else min(last, p.pt_steps)
    theta, velocity = leaves(p.start), {name: torch.zeros_like(t) for name, t in p.start.items()}
    phi = leaves(p.phi)
    for step in range(p.pt_steps):
        traced = step >= p.pt_steps - last
        theta = theta if traced else leaves(theta)
        gradient = grad(p.pretrain_loss(theta, phi), theta, create_graph=traced)
        velocity = {name: MOMENTUM * velocity[name] - p.pt_lr * gradient[name] for name in theta}
        theta = {name: theta[name] + velocity[name] for name in theta}
    return flat(grad(after_finetuning(p, theta), phi))


def forward(p: Problem) -> Tensor:
    """dθ_t/dφ is carried along with θ_t; memory does not grow with the steps, time does with the
    size of φ.

    Franceschi et al., "Forward and reverse gradient-based hyperparameter optimization", ICML 2017,
    equation 14; Micaelli and Storkey, "Gradient-based hyperparameter optimization over long
    horizons", NeurIPS 2021 (arXiv 2020), without the sharing of hyperparameters over time, of which
    there is none here.
    """
    w, f = flat(p.start), flat(p.phi)
    velocity, tangent, velocity_tangent = (
        torch.zeros_like(w),
        torch.zeros(len(f), len(w), dtype=w.dtype),
        0.0,
    )

    def gradient(w, f):
        return torch.func.grad(lambda w: p.pretrain_loss(unflat(w, p.start), unflat(f, p.phi)))(w)

    basis = torch.eye(len(f), dtype=f.dtype)
    for _ in range(p.pt_steps):
        change = torch.func.vmap(lambda z, e, w=w: torch.func.jvp(gradient, (w, f), (z, e))[1])(
            tangent, basis
        )
        velocity_tangent = MOMENTUM * velocity_tangent - p.pt_lr * change
        velocity = MOMENTUM * velocity - p.pt_lr * gradient(w, f)
        w, tangent = w + velocity, tangent + velocity_tangent
    return tangent @ _v(p, unflat(w, p.start))


def reversible(p: Problem, bits: int = 44) -> Tensor:
    """Momentum SGD run backwards, step by step, beside the adjoint: nothing of the trajectory is
    stored but lost digits.

    Maclaurin, Duvenaud and Adams, "Gradient-based hyperparameter optimization through reversible
    learning", ICML 2015, algorithms 2 and 3: θ and the velocity are whole multiples of 2^−bits, and
    what dividing by 10/9 would lose goes into a growing integer.
    """
    nine, ten = 9, 10  # MOMENTUM as a ratio of whole numbers
    assert nine / ten == MOMENTUM

    def whole(t: Tensor) -> np.ndarray:
        return np.array([int(x) for x in torch.round(t * 2.0**bits).tolist()], dtype=object)

    def real(integers: np.ndarray) -> Tensor:
        return torch.tensor([x / 2**bits for x in integers], dtype=torch.float64)

    def products(w: np.ndarray, d: Tensor | None = None):
        theta, phi = leaves(unflat(real(w), p.start)), leaves(p.phi)
        gradient = flat(grad(p.pretrain_loss(theta, phi), theta, create_graph=d is not None))
        return gradient if d is None else (gradient.detach(), grad(gradient @ d, {**theta, **phi}))

    w = whole(flat(p.start))
    velocity, lost = whole(torch.zeros(len(w))), whole(torch.zeros(len(w)))
    for _ in range(p.pt_steps):
        lost, velocity = lost * ten + velocity % ten, velocity // ten
        velocity, lost = velocity * nine + lost % nine, lost // nine
        velocity = velocity - whole(p.pt_lr * products(w))
        w = w + velocity

    d_theta = _v(p, unflat(real(w), p.start))
    d_velocity, d_phi = torch.zeros_like(d_theta), torch.zeros_like(flat(p.phi))
    for _ in range(p.pt_steps):
        w = w - velocity
        d_velocity = d_velocity + d_theta
        gradient, change = products(w, d_velocity)
        velocity = velocity + whole(p.pt_lr * gradient)
        lost, velocity = lost * nine + velocity % nine, velocity // nine
        velocity, lost = velocity * ten + lost % ten, lost // ten
        d_phi = d_phi - p.pt_lr * flat({name: change[name] for name in p.phi})
        d_theta = d_theta - p.pt_lr * flat({name: change[name] for name in p.start})
        d_velocity = MOMENTUM * d_velocity
    # It is back where it began, to the last bit
    assert not velocity.any() and (w == whole(flat(p.start))).all()
    return d_phi


def evograd(p: Problem, seed: int = 0, copies: int = 2, sigma: float = 0.01) -> Tensor:
    """θ* = Σ_k softmax_k(−L_PT(θ + σε_k, φ)) (θ + σε_k): no second derivatives.

    Bohdal, Yang and Hospedales, "EvoGrad: efficient gradient-based meta-learning and hyperparameter
    optimization", NeurIPS 2021, equations 2 to 4, with K = 2 copies.
    """
    w, phi = flat(p.theta), leaves(p.phi)
    noise = torch.randn(
        copies, len(w), generator=torch.Generator().manual_seed(seed), dtype=w.dtype
    )
    moved = w + sigma * noise
    losses = torch.stack([p.pretrain_loss(unflat(one, p.theta), phi) for one in moved])
    mixture = torch.softmax(-losses, 0) @ moved
    return flat(grad(after_finetuning(p, unflat(mixture, p.theta)), phi))


def penalty(
    p: Problem,
    steps: int,
    strength: float,
    momentum: float = MOMENTUM,
    lr: float | None = None,
    through: bool = True,
    from_start: bool = False,
) -> Tensor:
    """λ (∇_φ L_PT(θ_λ, φ) − ∇_φ L_PT(θ, φ)): no derivative is of second order but those of FT.

    θ goes on along L_PT, and a second copy θ_λ along L_PT + L_V / λ, for `steps` steps each, where
    λ is the `strength` of the penalty. Kwon, Kwon, Wright and Nowak, "A fully first-order method
    for stochastic bilevel optimization", ICML 2023: with f = L_V and g = L_PT the gradient by φ of
    min_y max_z f(y) + λ (g(y, φ) − g(z, φ)), y being θ_λ and z θ; f has no φ of its own here. Pan,
    Zhang, Zhang et al., "ScaleBiO: scalable bilevel optimization for LLM data reweighting", ACL
    2025, have the same gradient, with α for λ. There λ grows along a run, and the copies are
    carried from one φ to the next; here both are fixed.

    To first order in 1/λ the two copies are apart by H⁻¹v / λ once the steps are many; after few
    plain steps of size `lr` from a minimum, by the Neumann series of that size / λ.

    Args:
        momentum: of the steps; PT's own where none is given. 0: plain steps.
        lr: of the steps; None: PT's.
        through: whether L_V is differentiated through the steps of FT, taken anew from each θ_λ.
            If not, ψ_K is that of FT from θ, and is held: then all passes are first-order.
        from_start: whether the copies begin where PT began. If not, where it ended.
    """
    lr = p.pt_lr if lr is None else lr
    begin = p.start if from_start else p.theta
    psi = None if through else _finetuned(p, p.theta)

    def validation_loss(theta: Params) -> Tensor:
        return after_finetuning(p, theta) if through else p.validation_loss(theta, psi)

    def trained(share: float) -> Params:
        """The copy after `steps` steps along L_PT + share · L_V."""
        theta = leaves(begin)
        velocity = {name: torch.zeros_like(t) for name, t in theta.items()}
        for _ in range(steps):
            value = p.pretrain_loss(theta, p.phi)
            if share:
                value = value + share * validation_loss(theta)
            gradient = grad(value, theta)
            velocity = {name: momentum * velocity[name] - lr * gradient[name] for name in theta}
            theta = leaves({name: theta[name] + velocity[name] for name in theta})
        return theta

    def slope(theta: Params) -> Tensor:
        """∇_φ L_PT, flat; θ is a constant."""
        phi = leaves(p.phi)
        constant = {name: t.detach() for name, t in theta.items()}
        return flat(grad(p.pretrain_loss(constant, phi), phi))

    at_minimum = p.pt_steps is None and not from_start
    plain = p.theta if at_minimum else trained(0.0)
    return strength * (slope(trained(1 / strength)) - slope(plain))


def _finetuned(p: Problem, theta: Params) -> Params:
    """ψ_K of FT from θ, which is a constant."""
    theta = {name: t.detach() for name, t in theta.items()}
    psi = leaves(p.psi)
    for _ in range(p.ft_steps):
        gradient = grad(p.finetune_loss(theta, psi), psi)
        psi = leaves({name: psi[name] - p.ft_lr * gradient[name] for name in psi})
    return {name: t.detach() for name, t in psi.items()}


def fisher(p: Problem, examples: int, damping: float, seed: int = 0) -> Callable[[Params], Params]:
    """r → (GᵀG/n + damping·I)⁻¹r, where G holds the gradients of n examples: a preconditioner for
    conjugate gradients.

    The empirical Fisher in place of the Hessian, inverted by Woodbury's identity, n × n.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(p.examples, generator=generator)[:examples]
    like = p.theta

    def gradient(row):
        return torch.func.grad(lambda w: p.pretrain_loss(unflat(w, like), p.phi, row[None]))(
            flat(like)
        )

    g = torch.func.vmap(gradient)(rows) / len(rows) ** 0.5
    inner = torch.linalg.cholesky(g @ g.T + damping * torch.eye(len(rows), dtype=g.dtype))

    def apply(r: Params) -> Params:
        r = flat(r)
        return unflat(
            (r - g.T @ torch.cholesky_solve((g @ r)[:, None], inner).squeeze(1)) / damping, like
        )

    return apply


def adam_scale(optimizer: torch.optim.Adam, theta: Params, whole: bool = False) -> Tensor:
    """1 / (√v̂ + ε), flat, by the moments that torch's Adam has of θ: what its step makes of a
    change of the first moment, but for the rate.

    `whole`: the derivative of the step by its last gradient, both moments included: so the code of
    SAMA's authors has it (Choe et al., NeurIPS 2023; betty 0.2.1, which leaves out the bias
    correction). It may be negative.
    """
    (beta1, beta2), eps = (optimizer.param_groups[0][name] for name in ("betas", "eps"))
    m, s = (
        flat({n: optimizer.state[t][which] for n, t in theta.items()})
        for which in ("exp_avg", "exp_avg_sq")
    )
    step = int(optimizer.state[next(iter(theta.values()))]["step"])
    scale = 1 / ((s / (1 - beta2**step)).sqrt() + eps)
    if not whole:
        return scale
    second = (
        m * flat({n: t.grad for n, t in theta.items()}) * (1 - beta2) / (1 - beta2**step) * scale**2
    )
    return (1 - beta1 - second) * scale / (1 - beta1**step)


def adam_metric(p: Problem, batch: int = 32, draws: int = 200) -> Callable[[Params], Params]:
    """r → r / (√v̂ + ε), of Adam on mini-batches with θ held by a rate of 0: at a minimum the
    gradient of all examples is nil, that of a mini-batch is not.
    """
    theta, generator = leaves(p.theta), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(theta.values(), 0.0)
    for _ in range(draws):
        rows = torch.randperm(p.examples, generator=generator)[:batch]
        for t, g in zip(
            theta.values(), grad(p.pretrain_loss(theta, p.phi, rows), theta).values(), strict=True
        ):
            t.grad = g
        optimizer.step()
    return times(adam_scale(optimizer, theta))


def times(scale: Tensor) -> Callable[[Params], Params]:
    """r → scale · r, elementwise; `scale` is flat."""
    return lambda r: unflat(flat(r) * scale, r)


def kronecker(
    pt: Modules, corrected: bool = True, fisher: str = "mc"
) -> Callable[[Params], Params]:
    """r → (K + damping·I)⁻¹r, where K is the Kronecker-factored Fisher of PT, by curvlinops; a
    penalty is the damping.

    KFAC: Martens and Grosse, "Optimizing neural networks with Kronecker-factored approximate
    curvature", ICML 2015; corrected, EKFAC: George et al., "Fast approximate natural gradient
    descent in a Kronecker-factored eigenbasis", NeurIPS 2018. `fisher`: labels drawn from the model
    ("mc", one an example), or "type-2", which takes as many backward passes as outputs. ImportError
    where curvlinops is not installed.
    """
    from curvlinops import EKFACLinearOperator, KFACInverseLinearOperator, KFACLinearOperator

    network, turn, loss, x, y, weights, damping = pt
    model = network if weights is None else _Weighted(network, weights.sqrt())
    curvature = (EKFACLinearOperator if corrected else KFACLinearOperator)(
        model,
        loss,
        list(network.parameters()),
        [(x, y)],
        check_deterministic=False,
        fisher_type=fisher,
        separate_weight_and_bias=False,
    )
    # Exact damping: the default damps each factor, which is another matrix than K + damping·I.
    inverse = KFACInverseLinearOperator(curvature, damping=damping, use_exact_damping=True)

    def apply(r: Params) -> Params:
        solved = inverse @ [turn(t).contiguous() for t in r.values()]
        return {name: turn(t) for name, t in zip(r, solved, strict=True)}

    return apply


class _Weighted(nn.Module):
    """A network whose outputs are as they were, their gradients times √weight: so the Fisher of a
    weighted loss, with weights of examples or of outputs, is that of the plain loss, which is
    all that curvlinops knows.
    """

    def __init__(self, network: nn.Module, roots: Tensor):
        super().__init__()
        self.network, self.roots = network, roots

    def forward(self, x: Tensor) -> Tensor:
        z = self.network(x)
        return self.roots * z + (z - self.roots * z).detach()
