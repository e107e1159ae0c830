"""The loop with a second θ: the two are trained alike but for L_V; φ follows their difference."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import metapt
from bench.studies.penalty import PenaltyTraining


class Weights(nn.Module):
    """φ = a number for each PT example, its weight."""

    def __init__(self, examples: int):
        super().__init__()
        self.each = nn.Parameter(torch.ones(examples))


class WeighedDigits(metapt.Digits):
    """L_PT is the mean of the examples' losses, times their weights; θ meets dropout in PT."""

    def meta(self):
        return Weights(self.sizes["pretrain"])

    def pretrain_loss(self, network, meta, index, progress, live):
        images = self.inputs("pretrain", index)
        labels = self.targets("pretrain", index)

        def loss(theta, phi):
            outputs = metapt.call(network, theta, images, train=live, live=live)
            losses = F.cross_entropy(outputs, labels, reduction="none")
            return (phi["each"][index] * losses).mean()

        return loss


def training_of(strength: float, **given) -> PenaltyTraining:
    settings = metapt.DigitsSettings(seed=3, **given)
    domain = WeighedDigits(settings, torch.device("cpu"), Path("data"))
    training = PenaltyTraining(domain, strength)
    for _ in range(5):
        training.pretrain_step()
        training.step += 1
    return training


def flat(network: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def test_without_a_share_of_the_validation_loss_both_stay_one():
    """Batches, dropout and optimisers are then the same, so that φ has no slope."""
    training = training_of(1e30)
    assert torch.equal(flat(training.network), flat(training.other["network"]))
    training.meta_step()
    assert training.meta.each.grad.count_nonzero() == 0


def test_the_share_of_the_validation_loss_moves_the_second_alone():
    shared = training_of(1.0)
    alone = training_of(1e30)
    # One batch of FT and of validation examples is all of an epoch, so both draw as many numbers.
    assert not torch.equal(flat(shared.other["network"]), flat(alone.other["network"]))
    assert flat(shared.network).equal(flat(alone.network))


def test_phi_takes_its_step_along_the_difference_of_slopes():
    """The slope by an example's weight is its loss over the size of the batch: by hand."""
    training = training_of(2.0, meta_batch_size=40)
    batches = training.batches["meta"]
    index = batches.order[batches.position : batches.position + 40]
    losses = []
    for network in (training.network, training.other["network"]):
        network.eval()
        outputs = network(training.domain.inputs("pretrain", index))
        targets = training.domain.targets("pretrain", index)
        losses.append(F.cross_entropy(outputs, targets, reduction="none").detach())
    training.meta_step()
    slope = training.meta.each.grad
    torch.testing.assert_close(slope[index], 2.0 * (losses[1] - losses[0]) / 40)
    assert slope.count_nonzero() <= 40
    # Adam's first step, against the slope
    moved = training.meta.each.detach()[index] - 1
    assert (moved.sign() == -slope[index].sign()).all()


def test_the_second_follows_the_sum_of_both_losses():
    """Its first step is Adam's along the gradient of L_PT + L_V / λ, taken by hand."""
    settings = metapt.DigitsSettings(seed=3, dropout=0.0, unroll_batch_size=300)
    domain = WeighedDigits(settings, torch.device("cpu"), Path("data"))
    training = PenaltyTraining(domain, 0.5)
    # Copies, since steps change the network's own.
    before = {name: p.clone() for name, p in metapt.detached(training.network).items()}
    theta = {name: p.clone().requires_grad_() for name, p in before.items()}
    pretrain_batches = training.batches["pretrain"]
    validation_batches = training.batches["validation"]
    pretrain_index = pretrain_batches.order[: pretrain_batches.batch_size]
    validation_index = validation_batches.order[: validation_batches.batch_size]
    of_pretraining = domain.pretrain_loss(training.network, training.meta, pretrain_index, 0, True)
    of_validation = domain.finetune_loss(
        training.network, training.head, "validation", validation_index
    )
    phi = metapt.detached(training.meta)
    value = of_pretraining(theta, phi) + of_validation(theta, training.psi) / 0.5
    slopes = metapt.gradient(value, theta)
    training.pretrain_step()
    for name, p in training.other["network"].named_parameters():
        step = settings.lr * slopes[name] / (slopes[name].abs() + 1e-8)
        torch.testing.assert_close(p.detach(), before[name] - step, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("average", [0.0, 0.5])
def test_a_run_ends_with_a_phi_that_has_moved(average):
    settings = metapt.DigitsSettings(seed=0, steps=60, average=average)
    domain = WeighedDigits(settings, torch.device("cpu"), Path("data"))
    training = PenaltyTraining(domain, 10.0).run()
    assert training.meta_steps == (60 - settings.warmup_steps) // settings.meta_every
    learned = training.learned().each.detach()
    assert learned.isfinite().all() and not torch.equal(learned, torch.ones(1000))
