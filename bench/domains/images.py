"""Digits with wrong labels, and both image problems on MNIST.

    python metapt.py meta digits-noise        a share of the PT labels is wrong, φ weighs examples
    python metapt.py download mnist           the published images, into data/mnist/prepared
    python metapt.py meta mnist-noise         the same on MNIST
    python metapt.py meta mnist-rotation      as digits-rotation, on MNIST

Raghu et al., NeurIPS 2021, section 4. The digits themselves, their parts and their network are
those of `metapt.Digits`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metapt

# ------------------------------------------------------------------------------------------------
# Wrong labels: φ is a network that weighs examples


class ExampleWeights(nn.Module):
    """φ = a network that gives each PT example a weight (Raghu et al., section 4.2).

    `scores` maps images to one score for each label. An example's weight is the exponential of how
    far the score of its label is below the best score. What speaks for one label of an image so
    speaks against all others, and an image of which nothing is known keeps its weight of 1.
    """

    def __init__(self, scores: nn.Module):
        super().__init__()
        self.scores = scores

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        scores = self.scores(images)
        of_label = scores.gather(1, labels[:, None]).squeeze(1)
        best = scores.max(1).values
        return (of_label - best).exp()


@dataclass(frozen=True)
class DigitsNoiseSettings(metapt.DigitsSettings):
    steps: int = 2600
    warmup_share: float = 1 / 13
    batch_size: int = 128
    unroll_lr: float = 1e-6
    unroll_batch_size: int = 300
    validate_on: str = "all"
    meta_every: int = 6
    meta_batch_size: int = 1000
    meta_lr: float = 1.5e-2
    meta_lr_decay: float = 0.1
    average: float = 0.15
    solver: str = "cg"
    terms: int = 5
    damping: float = 0.1
    phi_dropout: float = metapt.setting(
        0.3,
        "Share of pixels that learning φ does not see",
        check=metapt.BELOW_1,
        learning=True,
    )
    noise: float = metapt.setting(
        0.5, "Share of the PT examples with a wrong label", check=metapt.BELOW_1, data=True
    )


class DigitsNoise(metapt.Digits):
    """A share of the PT labels is wrong, none of FT's; φ weighs PT examples.

    L_PT is the mean of w_i(φ) CE_i, not divided by the sum of the weights.

    The FT head begins as PT's own classifier and hardly moves (at a rate of 1e-6). A head of its
    own would follow whatever the features do, and FT would be as well off when PT takes one class
    for another: the hypergradient would then let φ exchange classes and drop them.
    """

    Settings = DigitsNoiseSettings
    captions: ClassVar = {"clean_to_noisy_weight_ratio": "weight of clean / of noisy examples"}
    presets: ClassVar = {"paper": {**metapt.PUBLISHED, "dropout": 0.0, "phi_dropout": 0.0}}

    def __init__(self, settings, device, data):
        super().__init__(settings, device, data)
        labels = self.labels["pretrain"].cpu().numpy()
        count = len(labels)
        wrong = self.random.permutation(count)[: round(settings.noise * count)]
        shift = self.random.integers(1, self.classes, len(wrong))
        labels[wrong] = (labels[wrong] + shift) % self.classes
        self.labels["pretrain"] = torch.from_numpy(labels).to(device)
        # Which labels are wrong is known to reports alone: no loss reads it.
        self.noisy = torch.zeros(count, dtype=torch.bool)
        self.noisy[wrong] = True

    def network(self):
        encoder = metapt.EncoderWithLogits(self.encoder(), self.features, self.classes)
        return metapt.Network(encoder, nn.Identity()).to(self.device)

    def head(self):
        return metapt.head_on_logits(self.features, self.classes).to(self.device)

    def meta(self):
        encoder = metapt.SmallCNN(self.height, 16, 64, self.settings.phi_dropout)
        scores = nn.Sequential(encoder, nn.Linear(64, self.classes))
        return ExampleWeights(scores).to(self.device)

    def pretrain_loss(self, network, meta, index, progress, live):
        images = self.inputs("pretrain", index)
        labels = self.targets("pretrain", index)

        def loss(theta, phi):
            weights = self.weigh(meta, phi, index, live)
            outputs = metapt.call(network, theta, images, train=True, live=live)
            logits = outputs[:, self.features :]
            losses = F.cross_entropy(logits, labels, reduction="none")
            return (weights * losses).mean()

        return loss

    def weigh(self, meta, phi, index, live) -> Tensor:
        """The weights of PT examples; φ's network drops pixels only while φ is learned."""
        images = self.inputs("pretrain", index)
        labels = self.targets("pretrain", index)
        return metapt.call(meta, phi, images, labels, train=not live)

    @torch.no_grad()
    def weights(self, meta, most: int | None = None) -> Tensor:
        """The weights of all PT examples, or of the first `most` of them, on the CPU."""
        meta.eval()
        weights = []
        for index in torch.arange(self.sizes["pretrain"])[:most].split(4096):
            images = self.inputs("pretrain", index)
            labels = self.targets("pretrain", index)
            weights.append(meta(images, labels))
        return torch.cat(weights).cpu()

    def facts(self, meta, most: int | None = None):
        weights = self.weights(meta, most)
        noisy = self.noisy[: len(weights)]
        clean_mean = mean_or_none(weights[~noisy])
        noisy_mean = mean_or_none(weights[noisy])
        ratio = None
        if clean_mean is not None and noisy_mean:
            ratio = clean_mean / noisy_mean
        return {
            "mean_weight_clean": clean_mean,
            "mean_weight_noisy": noisy_mean,
            "clean_to_noisy_weight_ratio": ratio,
        }

    def measure(self, meta):
        ratio = self.facts(meta, most=2000)["clean_to_noisy_weight_ratio"]
        return {"clean_to_noisy_weight_ratio": ratio}

    def table(self, meta):
        labels = self.labels["pretrain"].tolist()
        weights = self.weights(meta).tolist()
        rows = list(zip(range(len(labels)), labels, weights, strict=True))
        return ["example", "label", "weight"], rows

    def figures(self, meta):
        weights = self.weights(meta).numpy()
        noisy = self.noisy.numpy()
        return {"weights.png": lambda figure: draw_weights(figure, weights, noisy)}

    def decorate(self, axis):
        axis.set_yscale("log")


def mean_or_none(values: Tensor) -> float | None:
    """The mean, or None where there are no values."""
    if len(values) == 0:
        return None
    return values.mean().item()


def draw_weights(figure, weights: np.ndarray, noisy: np.ndarray) -> None:
    """How many PT examples φ gives which weight, those with right and with wrong labels apart."""
    floor = 1e-6  # Less is as good as nothing, and would stretch a logarithmic axis.
    label = "weight that φ gives"
    if weights.min() < floor:
        label += " (leftmost: 10⁻⁶ or less)"
    weights = weights.clip(floor)
    lowest = weights.min()
    highest = weights.max()
    if highest - lowest < 1e-6:
        figure.set_size_inches(4.5, 0.6)
        said = (
            f"φ tells no PT example from another: all {len(weights):,} have the weight {lowest:.3g}"
        )
        figure.text(0.5, 0.5, said, ha="center", va="center")
        return

    axis = figure.subplots()
    # Weights of nearly one size are told apart on a linear axis, others on a logarithmic one.
    if lowest > highest / 10:
        bins = np.linspace(lowest, highest, 41)
    else:
        bins = np.geomspace(lowest, highest, 41)
        axis.set_xscale("log")
    # Rounding must not leave the outermost weights outside.
    bins[0] = lowest
    bins[-1] = highest
    # Outlines: filled histograms would mix their colours where they overlap.
    groups = [(~noisy, "C0", "right label"), (noisy, "C3", "wrong label")]
    for chosen, colour, name in groups:
        if chosen.any():
            axis.hist(weights[chosen], bins, histtype="step", lw=1.2, color=colour, label=name)
    axis.set(xlabel=label, ylabel="PT examples", ylim=(0, None))
    axis.legend()


# ------------------------------------------------------------------------------------------------
# MNIST


class MNIST:
    """Puts MNIST in the place of scikit-learn's digits: a mixin, which stands before the domain.

    Of the 60,000 training images 50,000 are to pre-train, 1,000 to fine-tune and 1,000 to validate;
    the 10,000 test images are to test.
    """

    threads = None  # Unlike those of 8 x 8, images of 28 x 28 are work for several.
    features = 64

    def read(self, data: Path) -> metapt.LabelledImages:
        folder = data / "mnist" / "prepared"
        prepared_by = "python metapt.py download mnist"
        _, arrays = metapt.read_prepared(folder, "metapt images 1", prepared_by, mnist_layout)
        for part in ("train", "test"):
            counts = np.bincount(arrays[f"{part}_labels"], minlength=10)
            if len(counts) > 10 or counts.min() < 100:
                raise metapt.BadInput(f"{folder}: the labels are not 100 or more of each digit")
        return metapt.LabelledImages(
            pixels=arrays["train_images"].numpy(),
            labels=arrays["train_labels"].numpy(),
            white=255.0,
            sizes=(50_000, 1000, 1000),
            test=(arrays["test_images"].numpy(), arrays["test_labels"].numpy()),
        )


def mnist_layout(about: dict) -> dict:
    """Data type and shape of each array of the prepared folder."""
    return {
        "train_images": ("|u1", [60_000, 28, 28]),
        "train_labels": ("|u1", [60_000]),
        "test_images": ("|u1", [10_000, 28, 28]),
        "test_labels": ("|u1", [10_000]),
    }


@dataclass(frozen=True)
class MNISTRotationSettings(metapt.DigitsRotationSettings):
    steps: int = 400
    warmup_share: float = 1 / 8
    dropout: float = 0.2
    meta_lr_decay: float = 1.0


class MNISTRotation(MNIST, metapt.DigitsRotation):
    """MNIST under a rotation: see `metapt.DigitsRotation`."""

    Settings = MNISTRotationSettings


@dataclass(frozen=True)
class MNISTNoiseSettings(DigitsNoiseSettings):
    meta_lr: float = 1e-3  # At 1e-2 all scores die on larger images.
    meta_every: int = 24


class MNISTNoise(MNIST, DigitsNoise):
    """MNIST with wrong labels: see `DigitsNoise`."""

    Settings = MNISTNoiseSettings
