"""Hypergradients of domains whose FT data are images, against central differences."""

import contextlib

import pytest
import torch
from tools import flat

import metapt


@contextlib.contextmanager
def in_float64():
    """Tensors are float64 by default, and so are the images of `metapt.Digits`."""

    def inputs(self, part, index):
        return self.pixels[part][index].double() / self.white

    torch.set_default_dtype(torch.float64)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(metapt.Digits, "inputs", inputs)
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def along(params: dict, direction: dict, step: float) -> dict:
    """The parameters, moved by `step` times a direction."""
    return {name: p + step * direction[name] for name, p in params.items()}


def slope(function, at: dict, direction: dict, step: float = 1e-6) -> float:
    """The derivative of a function of parameters along a direction, by central differences."""
    ahead = function(along(at, direction, step))
    behind = function(along(at, direction, -step))
    return (ahead - behind) / (2 * step)


def check_hypergradient(domain: metapt.Domain) -> None:
    """v through two unrolled steps of Adam, and −vᵀ∇²_θφ L_PT, along random directions."""
    torch.manual_seed(0)
    network = domain.network().double()
    head = domain.head().double()
    meta = domain.meta().double()
    rows = torch.arange(40)
    theta = metapt.detached(network)
    psi = metapt.detached(head)
    phi = metapt.detached(meta)
    pretrain_as_it_is = domain.pretrain_loss(network, meta, rows, 0.25, live=False)
    state = torch.get_rng_state()

    def pretrain(theta, phi):
        # Whoever calls it: the same dropout, and the same draws of φ.
        torch.set_rng_state(state)
        return pretrain_as_it_is(theta, phi)

    finetune = [domain.finetune_loss(network, head, "finetune", rows + 40 * k) for k in range(2)]
    validation = domain.finetune_loss(network, head, "validation", rows)
    result = metapt.hypergradient(
        pretrain,
        finetune,
        validation,
        theta,
        psi,
        phi,
        unroll=metapt.Unroll(2, 0.05, eps=1e-2, optimizer="adam", scope="all"),
        solver=metapt.Solver("identity"),
    )

    def after_finetuning(theta):
        """L_V after two steps of torch's own Adam."""
        leaves = []
        for params in (theta, psi):
            leaves.append({name: p.clone().requires_grad_() for name, p in params.items()})
        tensors = [p for params in leaves for p in params.values()]
        optimizer = torch.optim.Adam(tensors, lr=0.05, eps=1e-2)
        for loss in finetune:
            optimizer.zero_grad()
            loss(*leaves).backward()
            optimizer.step()
        return validation(*leaves).item()

    def gradient_along_v(phi):
        """vᵀ∇_θ L_PT(θ, φ)."""
        leaves = {name: p.clone().requires_grad_() for name, p in theta.items()}
        gradients = torch.autograd.grad(pretrain(leaves, phi), list(leaves.values()))
        products = zip(gradients, result.q.values(), strict=True)
        return sum((g * v).sum().item() for g, v in products)

    for _ in range(3):
        of_theta = {name: torch.randn_like(p) for name, p in theta.items()}
        of_phi = {name: torch.randn_like(p) for name, p in phi.items()}
        expected = slope(after_finetuning, theta, of_theta)
        assert (flat(result.q) @ flat(of_theta)).item() == pytest.approx(expected, rel=1e-4)
        expected = -slope(gradient_along_v, phi, of_phi)
        assert (flat(result.phi) @ flat(of_phi)).item() == pytest.approx(expected, rel=1e-4)
