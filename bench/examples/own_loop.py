"""metapt's core in a loop of your own: weights of PT examples, many of which have a wrong label.

python -m bench.examples.own_loop     from the repository; 20 seconds on one core

It prints the mean weight of right and of wrong labels. Of metapt it needs chapter 2 alone, which
needs torch alone: import it, or paste that chapter here.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call, grad

from metapt import Solver, Unroll, finetune_step, hypergradient

torch.manual_seed(0)

# The data: 1,000 images for PT, four in ten with a drawn label; 300 with right labels for FT, and
# 250 that validate, which is what the weights are learned for.
images, labels = load_digits(return_X_y=True)
x = torch.from_numpy(images).float() / 16
y = torch.from_numpy(labels)
wrong = torch.rand(1000) < 0.4
pt_labels = torch.where(wrong, torch.randint(10, (1000,)), y[:1000])
validation_rows = torch.arange(1300, 1550)


class Net(nn.Module):
    """θ: an encoder and PT's classifier."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(64, 64),
            nn.BatchNorm1d(64),
            nn.ReLU(),
            nn.Dropout(0.5),
        )
        self.classifier = nn.Linear(64, 10)

    def forward(self, x, features=False):
        hidden = self.encoder(x)
        return hidden if features else self.classifier(hidden)


net = Net()
head = nn.Linear(64, 10)  # ψ
weight_logits = nn.Parameter(torch.zeros(1000))  # φ: a weight for each PT example


def call(module, params, *inputs, train=False, **options):
    """The module with these parameters, on copies of its buffers.

    A hypergradient runs a loss several times: each pass must see the same BatchNorm statistics.
    """
    module.train(train)
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    return functional_call(module, {**params, **buffers}, inputs, options)


def parameters_of(module):
    """By name, in the same memory: what an optimiser does to them is seen here."""
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


# The three losses. Each is made for one batch, and is then a function of parameters alone.


def weighted_loss(outputs, rows, weight_logits):
    weights = 2 * weight_logits[rows].sigmoid()
    losses = F.cross_entropy(outputs, pt_labels[rows], reduction="none")
    return (weights * losses).mean()


def pretrain_loss_on(rows):
    def pretrain_loss(theta, phi):
        return weighted_loss(call(net, theta, x[rows], train=True), rows, phi["weight_logits"])

    return pretrain_loss


def finetune_loss_on(rows):
    def finetune_loss(theta, psi):
        features = call(net, theta, x[rows], features=True)
        return F.cross_entropy(call(head, psi, features), y[rows])

    return finetune_loss


unroll = Unroll(steps=1, lr=1e-3, optimizer="adam")
solver = Solver("cg", terms=3, damping=1.0)
optimizer = torch.optim.Adam(net.parameters())
phi_optimizer = torch.optim.Adam([weight_logits], lr=0.1)

theta = parameters_of(net)
psi = parameters_of(head)
ft_state = {}  # Adam's moments of ψ

for step in range(1, 2001):
    rows = torch.randint(1000, (64,))
    ft_rows = torch.randint(1000, 1300, (64,))

    # A PT step on θ with φ fixed.
    loss = weighted_loss(net.train()(x[rows]), rows, weight_logits.detach())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

    # Beside it an FT step on ψ with θ fixed.
    finetune_loss = finetune_loss_on(ft_rows)
    psi_gradient = grad(finetune_loss, argnums=1)(theta, psi)
    psi, ft_state = finetune_step(psi, psi_gradient, unroll, ft_state)

    # After a warm-up, every fifth step: one FT step more, and one step on φ along dL_V/dφ.
    if step > 300 and step % 5 == 0:
        result = hypergradient(
            pretrain_loss_on(torch.randint(1000, (500,))),
            finetune_loss,
            finetune_loss_on(validation_rows),
            theta,
            psi,
            {"weight_logits": weight_logits},
            unroll=unroll,
            solver=solver,
            ft_state=ft_state,
        )
        psi = result.psi
        ft_state = result.ft_state
        weight_logits.grad = result.phi["weight_logits"]
        phi_optimizer.step()

weights = 2 * weight_logits.detach().sigmoid()
right_mean = weights[~wrong].mean()
wrong_mean = weights[wrong].mean()
print(f"mean weight of right labels {right_mean:.2f}, of wrong labels {wrong_mean:.2f}")
