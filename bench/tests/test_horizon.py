"""bench/accuracy/horizon.py: differentiation through steps of PT beside torch.optim.Adam and
central differences.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import metapt
from bench.accuracy import horizon

LR, BEFORE, AFTER = 3e-3, 7, 6


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Tiny(nn.Module):
    """With BatchNorm, dropout by both ways to have it, and a unit that no gradient has ever
    reached.
    """

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(4, 5, bias=False),
            nn.BatchNorm1d(5),
            nn.Tanh(),
            nn.Dropout(0.5),
            nn.Linear(5, 3),
        )
        self.dead, self.dropout = nn.Parameter(torch.zeros(2)), 0.5

    def forward(self, x):
        return self.layers(F.dropout(x, self.dropout, self.training)) + self.dead.clamp(min=1).sum()


def problem():
    torch.manual_seed(0)
    batches = [(torch.randn(16, 4), torch.randn(16, 3)) for _ in range(BEFORE + AFTER)]
    network, x, y = Tiny(), torch.randn(9, 4), torch.randn(9, 3)

    def loss(network, theta, phi, batch):
        # φ shifts inputs, and with them BatchNorm's statistics, and weighs outputs
        errors = (
            metapt.call(network, theta, batch[0] + phi["shift"], train=True, live=True) - batch[1]
        )
        return (phi["weights"].exp() * errors.square().mean(0)).sum()

    def validation(network, theta):
        return (metapt.call(network, theta, x) - y).square().mean()

    phi = {"shift": 0.3 * torch.randn(4), "weights": 0.3 * torch.randn(3)}
    optimizer = torch.optim.Adam(network.parameters(), LR)
    for batch in batches[:BEFORE]:
        step(network, optimizer, loss, phi, batch)
    return network, optimizer, loss, validation, phi, batches[BEFORE:]


def step(network, optimizer, loss, phi, batch):
    optimizer.zero_grad()
    loss(network, dict(network.named_parameters()), phi, batch).backward()
    optimizer.step()


def by_torch(network, optimizer, loss, phi, batches):
    """The network after the same steps by torch.optim.Adam and nn.BatchNorm1d."""
    network, state = copy.deepcopy(network), copy.deepcopy(optimizer.state_dict())
    network.dropout = network.layers[3].p = 0.0
    optimizer = torch.optim.Adam(network.parameters(), LR)
    optimizer.load_state_dict(state)
    for batch in batches:
        step(network, optimizer, loss, phi, batch)
    return network


def test_reverse_is_the_derivative_of_steps_of_torchs_adam():
    network, optimizer, loss, validation, phi, batches = problem()
    copied, norms = horizon.smooth(network)
    ends = {}

    def outcome(theta):
        number = AFTER - len(ends)
        ends[number] = theta, {name: norm.running.detach() for name, norm in norms.items()}
        return {"L_V": validation(copied, theta), "twice": 2 * validation(copied, theta)}

    losses = [lambda theta, phi, batch=batch: loss(copied, theta, phi, batch) for batch in batches]
    state = horizon.adam_state(optimizer, network.parameters())
    trail = horizon.forward(losses, norms, metapt.detached(copied), phi, state, LR)
    found = horizon.reverse(trail, outcome, range(1, AFTER + 1), norms, phi, LR)
    assert state["step"] == BEFORE and (state["exp_avg_sq"] == 0).any()
    assert set(found) == {(t, name) for t in range(1, AFTER + 1) for name in ("L_V", "twice")}

    for t in range(1, AFTER + 1):
        after = by_torch(network, optimizer, loss, phi, batches[:t])
        theta, running = ends[t]
        for name, p in after.named_parameters():
            torch.testing.assert_close(theta[name], p, rtol=1e-11, atol=1e-13)
        norm = after.layers[1]
        torch.testing.assert_close(
            running["layers.1"], torch.stack([norm.running_mean, norm.running_var])
        )

        differences = []
        for name, p in phi.items():
            for i in range(len(p)):
                values = []
                for h in (1e-4, -1e-4):
                    moved = {**phi, name: p + h * F.one_hot(torch.tensor(i), len(p))}
                    end = by_torch(network, optimizer, loss, moved, batches[:t])
                    values.append(validation(end, metapt.detached(end)).item())
                differences.append((values[0] - values[1]) / 2e-4)
        truth = torch.tensor(differences)
        assert (found[t, "L_V"] - truth).norm() <= 1e-6 * truth.norm()
        torch.testing.assert_close(found[t, "twice"], 2 * found[t, "L_V"])


def test_a_fitted_head_counts_as_constant():
    """The envelope theorem: dL/dθ with the head refitted is the direct derivative."""
    kind = metapt.find_domain("digits-rotation")
    domain = kind(metapt.make_settings(kind, {}, "default"), torch.device("cpu"), None)
    inputs = domain.inputs
    domain.inputs = lambda *which: inputs(*which).double()
    training = metapt.Training(domain, learn=True)
    heads = horizon.Heads(domain, training.network, training)
    theta = metapt.detached(training.network)
    name = next(reversed([name for name in theta if "encoder" in name]))  # the bias of the features

    direct = horizon.grad(heads.fitted(at := horizon.leaves(theta), heads.fit(theta)), at)[name]
    direction = torch.sign(direct)
    ahead, behind = ({**theta, name: theta[name] + h * direction} for h in (1e-4, -1e-4))
    ahead, behind = (heads.fitted(end, heads.fit(end)) for end in (ahead, behind))
    assert ((ahead - behind) / 2e-4).item() == pytest.approx((direct @ direction).item(), rel=1e-3)
