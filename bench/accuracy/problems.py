"""Small two-stage problems in float64 whose exact hypergradient is known.

    ridge       ridge regression → ridge regression; φ = logarithms of 40 example weights; θ*(φ) in
                closed form
    logistic    logistic regression on eight tasks, condition number about 10⁴; φ = task weights
    mlp         an MLP on digits, ten binary tasks, at a minimum (Newton steps until ‖∇L_PT‖ ≤
                1e-12); φ = task weights
    augment     the same MLP on digits that φ = (rotation, two shifts, scale) has moved
    early(T)    `mlp` after T momentum steps from its start: exact then means the derivative of that
                very procedure
    digits(λ)   metapt's network for digits along PT; φ = logarithms of 300 example weights, at 0:
                plain cross-entropy

Every exact value but that of `digits` is computed twice, in ways that share no code: by a dense
solve (or by autograd through all that happened), and by central differences of the whole pipeline,
PT to a minimum included. For `digits` exact is −vᵀ(H + λI)⁻¹∇²_θφ L_PT, solved to 1e-10 by scipy.
None of it uses metapt.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import linalg
from sklearn.datasets import load_digits
from torch import Tensor, nn

Params = dict[str, Tensor]
MOMENTUM = 0.9


class Modules(NamedTuple):
    """L_PT as libraries want it that read modules: the mean of `loss` over examples and outputs,
    times `weights`, and a penalty whose Hessian is `damping`·I.
    """

    network: nn.Module  # its parameters are θ's, in the same order
    turn: Callable[[Tensor], Tensor]  # a tensor of θ as the module has it, and back
    loss: nn.Module
    x: Tensor
    y: Tensor
    weights: Tensor | None  # of outputs [c] or of examples [n, 1]
    damping: float


class Problem(NamedTuple):
    name: str
    pretrain_loss: Callable  # (theta, phi, rows=all PT examples)
    finetune_loss: Callable
    validation_loss: Callable
    start: Params  # θ before PT
    theta: Params  # θ after PT
    psi: Params
    phi: Params
    ft_lr: float  # of the K SGD steps of FT
    ft_steps: int  # K
    pt_lr: float  # of PT by momentum SGD: α as published
    pt_steps: int | None  # None: PT runs to its minimum
    examples: int  # PT examples
    exact: Tensor  # dL_V/dφ, flat
    modules: Callable | None = None  # theta → Modules, where the PT network is made of layers


def flat(params: Params) -> Tensor:
    return torch.cat([t.reshape(-1) for t in params.values()])


def unflat(vector: Tensor, like: Params) -> Params:
    pieces = vector.split([t.numel() for t in like.values()])
    return {
        name: piece.view(t.shape) for piece, (name, t) in zip(pieces, like.items(), strict=True)
    }


def grad(value: Tensor, params: Params, **options) -> Params:
    options = {"allow_unused": True, "materialize_grads": True, **options}
    return dict(
        zip(params, torch.autograd.grad(value, list(params.values()), **options), strict=True)
    )


def leaves(params: Params) -> Params:
    return {name: t.detach().clone().requires_grad_() for name, t in params.items()}


def after_finetuning(p, theta: Params) -> Tensor:
    """L_V(θ, ψ_K), differentiable in θ: K plain SGD steps on the head."""
    psi = leaves(p.psi)
    for _ in range(p.ft_steps):
        gradient = grad(p.finetune_loss(theta, psi), psi, create_graph=True)
        psi = {name: psi[name] - p.ft_lr * gradient[name] for name in psi}
    return p.validation_loss(theta, psi)


def minimise(p, phi: Params, theta: Params) -> Params:
    """Newton's method with a shift where the Hessian is not positive definite; raises if it does
    not arrive.
    """
    like, w = theta, flat(theta).detach()

    def loss(w):
        return p.pretrain_loss(unflat(w, like), phi)

    for _ in range(200):
        gradient, hessian = torch.func.grad(loss)(w), torch.func.hessian(loss)(w)
        if gradient.norm() <= 1e-12:
            return unflat(w, like)
        values, vectors = torch.linalg.eigh(hessian)
        step = vectors @ ((vectors.T @ gradient) / values.abs().clamp_min(1e-6))
        share = 1.0
        while loss(w - share * step) > loss(w) and share > 1e-6 and gradient.norm() > 1e-9:
            share /= 2
        w = w - share * step
    raise RuntimeError(f"{p.name}: no minimum, ‖gradient‖ = {gradient.norm():.1e}")


def descend(p, phi: Params, steps: int, create_graph: bool = False) -> Params:
    """`steps` steps of momentum SGD from the start, on all PT examples."""
    theta = leaves(p.start)
    velocity = {name: torch.zeros_like(t) for name, t in theta.items()}
    for _ in range(steps):
        theta = theta if create_graph else leaves(theta)
        gradient = grad(p.pretrain_loss(theta, phi), theta, create_graph=create_graph)
        velocity = {name: MOMENTUM * velocity[name] - p.pt_lr * gradient[name] for name in theta}
        theta = {name: theta[name] + velocity[name] for name in theta}
    return theta


def pretrained(p, phi: Params) -> Params:
    """θ as PT leaves it for this φ."""
    return minimise(p, phi, p.theta) if p.pt_steps is None else descend(p, phi, p.pt_steps)


def exact(p) -> Tensor:
    """dL_V/dφ: by a dense solve at a minimum, by autograd through all PT steps where PT stopped
    early.
    """
    phi = leaves(p.phi)
    if p.pt_steps is not None:
        return flat(grad(after_finetuning(p, descend(p, phi, p.pt_steps, create_graph=True)), phi))
    theta = leaves(p.theta)
    v = flat(grad(after_finetuning(p, theta), theta))

    def gradient(w, f):
        return torch.func.grad(lambda w: p.pretrain_loss(unflat(w, p.theta), unflat(f, p.phi)))(w)

    w, f = flat(p.theta).detach(), flat(p.phi).detach()
    hessian, mixed = torch.func.jacrev(gradient, (0, 1))(w, f)
    return -torch.linalg.solve(hessian, v) @ mixed


def differences(p, step: float = 1e-4) -> Tensor:
    """dL_V/dφ by central differences of the whole pipeline, extrapolated once (Richardson)."""

    def value(f):
        theta = pretrained(p, unflat(f, p.phi))
        return after_finetuning(p, leaves(theta)).item()

    f = flat(p.phi).detach()
    found = []
    for direction in torch.eye(len(f), dtype=f.dtype):
        one, two = (
            (value(f + h * direction) - value(f - h * direction)) / (2 * h)
            for h in (step, 2 * step)
        )
        found.append((4 * one - two) / 3)
    return torch.tensor(found, dtype=f.dtype)


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _digits(n: int) -> tuple[Tensor, Tensor]:
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))[:n]
    return torch.from_numpy(data.images[order]) / 16, torch.from_numpy(data.target[order])


def holding(network: nn.Module, theta: Params, turn=lambda t: t) -> None:
    """The module's parameters become those of θ."""
    for parameter, t in zip(network.parameters(), theta.values(), strict=True):
        parameter.data = turn(t.detach()).clone(memory_format=torch.contiguous_format)


def _finished(p: Problem) -> Problem:
    theta = pretrained(p, p.phi)
    p = p._replace(theta={name: t.detach() for name, t in theta.items()})
    return p._replace(exact=exact(p).detach())


@cache
def ridge() -> Problem:
    x, y, xf, xv = (
        _random(n, d, seed=s) for s, (n, d) in enumerate([(40, 12), (40, 4), (20, 12), (20, 12)])
    )
    x = x * torch.logspace(0, -1, 12, dtype=torch.float64)
    target = _random(12, 1, seed=9)

    def pretrain_loss(theta, phi, rows=slice(None)):
        errors = (x[rows] @ theta["w"] - y[rows]).square().mean(1)
        return (phi["log_weights"][rows].exp() * errors).mean() + 1e-3 * theta["w"].square().sum()

    def finetune_loss(theta, psi, x=xf):
        return (x @ theta["w"] @ psi["head"] - x @ target).square().mean() + 1e-2 * psi[
            "head"
        ].square().sum()

    theta = {"w": torch.zeros(12, 4, dtype=torch.float64)}
    return _finished(
        Problem(
            "ridge",
            pretrain_loss,
            finetune_loss,
            lambda t, p: finetune_loss(t, p, xv),
            theta,
            theta,
            {"head": _random(4, 1, seed=5)},
            {"log_weights": 0.3 * _random(40, seed=6)},
            0.05,
            10,
            0.05,
            None,
            40,
            None,
        )
    )


def ridge_closed_form() -> Tensor:
    """dL_V/dφ of `ridge`, by autograd through θ*(φ) = (XᵀDX/n + 2λ'I)⁻¹XᵀDY/n written out."""
    p, phi = ridge(), leaves(ridge().phi)
    x, y = (
        _random(40, 12, seed=0) * torch.logspace(0, -1, 12, dtype=torch.float64),
        _random(40, 4, seed=1),
    )
    d = phi["log_weights"].exp()[:, None] / (40 * 4)
    identity = torch.eye(12, dtype=torch.float64)
    theta = {"w": torch.linalg.solve(x.T @ (d * x) + 1e-3 * identity, x.T @ (d * y))}
    return flat(grad(after_finetuning(p, theta), phi))


@cache
def logistic() -> Problem:
    scales = torch.logspace(0, -2, 50, dtype=torch.float64)
    x, xf, xv = (_random(n, 50, seed=s) * scales for s, n in enumerate([300, 40, 100]))
    directions = _random(50, 8, seed=3) / scales.sqrt()[:, None]
    labels = (x @ directions + 0.5 * _random(300, 8, seed=4) > 0).double()
    truth = directions[:, :3].mean(1)

    def pretrain_loss(theta, phi, rows=slice(None)):
        logits = (x[rows] @ theta["w"]).expand(-1, 8)
        losses = F.binary_cross_entropy_with_logits(logits, labels[rows], reduction="none").mean(0)
        return (2 * phi["weights"].sigmoid() * losses).mean() + 0.5e-5 * theta["w"].square().sum()

    def finetune_loss(theta, psi, x=xf):
        logits = psi["scale"] * (x @ theta["w"]).squeeze(1) + psi["bias"]
        return F.binary_cross_entropy_with_logits(logits, (x @ truth > 0).double())

    theta = {"w": torch.zeros(50, 1, dtype=torch.float64)}
    psi = {"scale": torch.ones(1, dtype=torch.float64), "bias": torch.zeros(1, dtype=torch.float64)}
    return _finished(
        Problem(
            "logistic",
            pretrain_loss,
            finetune_loss,
            lambda t, p: finetune_loss(t, p, xv),
            theta,
            theta,
            psi,
            {"weights": 0.5 * _random(8, seed=7)},
            0.1,
            10,
            0.5,
            None,
            300,
            None,
        )
    )


def _mlp(name: str, augmented: bool, pt_steps: int | None, decay: float = 1e-3) -> Problem:
    images, labels = _digits(460)
    x, xf, xv = images.split([300, 60, 100])
    y, yf, yv = labels.split([300, 60, 100])
    targets = F.one_hot(y, 10).double()

    def pixels(images, moved=None):
        if moved is not None:
            angle, scale = moved[0] / 10, (moved[3] / 10).exp()
            rows = [
                [scale * angle.cos(), -scale * angle.sin(), moved[1] / 10],
                [scale * angle.sin(), scale * angle.cos(), moved[2] / 10],
            ]
            matrix = torch.stack([torch.stack(row) for row in rows]).expand(len(images), 2, 3)
            grid = F.affine_grid(matrix, [len(images), 1, 8, 8], align_corners=False)
            images = F.grid_sample(
                images[:, None], grid, mode="bicubic", align_corners=False
            ).squeeze(1)
        return F.avg_pool2d(images[:, None], 2).flatten(1)

    def hidden(theta, x):
        return torch.tanh(x @ theta["w1"] + theta["b1"])

    def pretrain_loss(theta, phi, rows=slice(None)):
        inputs = pixels(x[rows], phi["moved"] if augmented else None)
        logits = hidden(theta, inputs) @ theta["w2"] + theta["b2"]
        penalty = decay * sum(t.square().sum() for t in theta.values())
        if augmented:
            return F.cross_entropy(logits, y[rows]) + penalty
        losses = F.binary_cross_entropy_with_logits(logits, targets[rows], reduction="none").mean(0)
        return (2 * phi["weights"].sigmoid() * losses).sum() + penalty

    def finetune_loss(theta, psi, x=xf, y=yf):
        return F.cross_entropy(hidden(theta, pixels(x)) @ psi["w"] + psi["b"], y)

    def modules(theta):
        network = nn.Sequential(nn.Linear(16, 10), nn.Tanh(), nn.Linear(10, 10)).double()
        holding(network, theta, torch.t)
        if augmented:
            inputs = pixels(x, phi["moved"]).detach()
            return Modules(network, torch.t, nn.CrossEntropyLoss(), inputs, y, None, 2 * decay)
        weights = 10 * 2 * phi["weights"].sigmoid()  # L_PT sums over the ten tasks
        return Modules(
            network, torch.t, nn.BCEWithLogitsLoss(), pixels(x), targets, weights, 2 * decay
        )

    phi = (
        {"moved": torch.tensor([3.0, 0.5, -0.5, 1.0], dtype=torch.float64)}
        if augmented
        else {"weights": _random(10, seed=7)}
    )
    start = {
        "w1": 0.5 * _random(16, 10, seed=1),
        "b1": torch.zeros(10, dtype=torch.float64),
        "w2": 0.5 * _random(10, 10, seed=2),
        "b2": torch.zeros(10, dtype=torch.float64),
    }
    psi = {"w": 0.1 * _random(10, 10, seed=3), "b": torch.zeros(10, dtype=torch.float64)}
    p = Problem(
        name,
        pretrain_loss,
        finetune_loss,
        lambda t, s: finetune_loss(t, s, xv, yv),
        start,
        start,
        psi,
        phi,
        0.3,
        10,
        0.05,
        pt_steps,
        300,
        None,
        modules,
    )
    if pt_steps is None:  # close to a minimum first: Newton's method alone would go to any saddle
        p = p._replace(theta={name: t.detach() for name, t in descend(p, phi, 3000).items()})
    return _finished(p)


@cache
def mlp() -> Problem:
    return _mlp("mlp", False, None)


@cache
def augment() -> Problem:
    return _mlp("augment", True, None)


@cache
def early(steps: int) -> Problem:
    return _mlp(f"early({steps})", False, steps)


def _digits_network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    ).double()


@cache
def _digits_theta(steps: int = 300, decay: float = 1e-2) -> Params:
    images, labels = _digits(460)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = _digits_network().float()  # convolutions are slow in float64
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        penalty = decay / 2 * sum(p.square().sum() for p in network.parameters())
        (F.cross_entropy(network(images[:300, None].float()), labels[:300]) + penalty).backward()
        optimizer.step()
    return {name: p.detach().double() for name, p in network.named_parameters()}


@cache
def digits(damping: float) -> Problem:
    """The network of metapt's digits domains after 300 steps of Adam: at no minimum, so that H
    without λ is indefinite.

    λ is for the solver to add. Too small a λ is an AssertionError.
    """
    images, labels = _digits(460)
    x, xf, xv = images[:, None].split([300, 60, 100])
    y, yf, yv = labels.split([300, 60, 100])
    theta, network = _digits_theta(), _digits_network()

    def pretrain_loss(t, phi, rows=slice(None)):
        losses = F.cross_entropy(
            torch.func.functional_call(network, t, (x[rows],)), y[rows], reduction="none"
        )
        return (phi["log_weights"][rows].exp() * losses).mean()

    encoder = network[:-1]

    def finetune_loss(t, psi, x=xf, y=yf):
        inner = {name: t[name] for name, _ in encoder.named_parameters()}
        return F.cross_entropy(
            torch.func.functional_call(encoder, inner, (x,)) @ psi["w"] + psi["b"], y
        )

    def modules(t):
        layers = _digits_network()
        holding(layers, t)
        return Modules(layers, lambda t: t, nn.CrossEntropyLoss(), x, y, None, damping)

    psi = {"w": 0.1 * _random(32, 10, seed=3), "b": torch.zeros(10, dtype=torch.float64)}
    p = Problem(
        f"digits({damping:g})",
        pretrain_loss,
        finetune_loss,
        lambda t, s: finetune_loss(t, s, xv, yv),
        theta,
        theta,
        psi,
        {"log_weights": torch.zeros(300, dtype=torch.float64)},
        0.3,
        10,
        0.05,
        None,
        300,
        None,
        modules,
    )

    here, phi = leaves(theta), leaves(p.phi)
    v = flat(grad(after_finetuning(p, here), here)).numpy()
    gradient = flat(grad(pretrain_loss(here, phi), here, create_graph=True))

    def product(d):
        d = torch.from_numpy(d.reshape(-1))
        hessian_d = flat(grad(gradient, here, grad_outputs=d, retain_graph=True)) + damping * d
        assert d @ hessian_d >= 0, "H + λI is indefinite"
        return hessian_d.numpy()

    operator = linalg.LinearOperator((len(v), len(v)), product, dtype=np.float64)
    q, failed = linalg.cg(operator, v, rtol=1e-10, maxiter=2000)
    assert not failed and np.linalg.norm(product(q) - v) <= 1e-9 * np.linalg.norm(v)
    return p._replace(exact=-flat(grad(gradient, phi, grad_outputs=torch.from_numpy(q))))


FROZEN = {"ridge": ridge, "logistic": logistic, "mlp": mlp, "augment": augment}
EARLY = {f"early({steps})": (lambda steps=steps: early(steps)) for steps in (10, 100, 1000)}
