"""Digits under an affine map: PT images are transformed by a map drawn around φ, six numbers, FT images by a target.

    python metapt.py meta digits-affine          φ = rotation, two shifts, two scales and a shear, from the identity

A made-up problem, after the rotations of Raghu et al., NeurIPS 2021, section 4.1, with more numbers than a search by
trial covers: each seed draws a target, which PT never sees; FT data alone say where it is.
"""

from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metapt

# The numbers of φ, and what they do to an image; x points to the right, y down, the origin is the image's centre.
NUMBERS = {
    "rotation_deg": "counter-clockwise, last",
    "shift_x_px": "to the right, after all else",
    "shift_y_px": "down, after all else",
    "log_scale_x": "widens by its exponential, first",
    "log_scale_y": "heightens by its exponential, first",
    "shear_x": "x grows by so much of y, after the scales",
}


def affine(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Maps [n, 6], in the order of NUMBERS, to their matrices [n, 2, 2] and shifts [n, 2]: a point p goes to A p + b."""
    degrees, right, down, wide, high, shear = numbers.unbind(-1)
    angle, zero, one = degrees * (torch.pi / 180), torch.zeros_like(degrees), torch.ones_like(degrees)
    turn, lean, stretch = (torch.stack([a, b, c, d], -1).unflatten(-1, (2, 2)) for a, b, c, d in (
        (angle.cos(), angle.sin(), -angle.sin(), angle.cos()), (one, shear, zero, one),
        (wide.exp(), zero, zero, high.exp())))  # fmt: skip
    return turn @ lean @ stretch, torch.stack([right, down], -1)


def transform(images: Tensor, numbers: Tensor) -> Tensor:
    """Square images [n, c, h, h], each transformed by its own map [n, 6]; differentiable in both. Bicubic, as `rotate`."""
    matrix, shift = affine(numbers)
    # Where a pixel's value comes from, in units of half the image; a check of it would wait for the device.
    inverse = torch.linalg.inv_ex(matrix)[0]
    grid = F.affine_grid(torch.cat([inverse, -inverse @ shift[..., None] * (2 / images.shape[-1])], -1),
                         list(images.shape), align_corners=False)  # fmt: skip
    return F.grid_sample(images, grid, mode="bicubic", align_corners=False)


class AffineMean(nn.Module):
    """φ = the mean of the normal distribution that each image's map is drawn from; reparameterised, as `RotationMean`."""

    def __init__(self, numbers=(0.0,) * 6):
        super().__init__()
        for name, number in zip(NUMBERS, numbers, strict=True):
            self.register_parameter(name, nn.Parameter(torch.tensor(float(number))))

    def numbers(self) -> Tensor:
        """[6], in the order of NUMBERS."""
        return torch.stack([getattr(self, name) for name in NUMBERS])

    def forward(self, images: Tensor, spread: Tensor) -> Tensor:
        noise = torch.randn(len(images), len(NUMBERS), dtype=images.dtype, device=images.device)
        return transform(images, self.numbers() + spread * noise)


JITTER = 0.02  # spread of FT's maps, and of PT's at the end, as a share of the ranges that targets are drawn from
RANGE, WIDE = "Targets are drawn up to ± this", (lambda x: x >= JITTER, f"{JITTER} or more")


class AffineSettings(
    metapt.Images.Settings, steps=850, warmup=50, meta_every=4, lr=2e-3, unroll_lr=1e-3, unroll_batch_size=128,
    meta_batch_size=192, meta_lr=0.05, meta_lr_decay=0.1, average=0.5, solver="cg", terms=10, damping=0.3,
    measure_steps=300,
):  # fmt: skip
    range_deg: float = metapt.option(60.0, f"{RANGE}: rotation", check=metapt.POSITIVE, data=True)
    range_px: float = metapt.option(1.0, f"{RANGE}: both shifts", check=metapt.POSITIVE, data=True)
    range_log_scale: float = metapt.option(0.3, f"{RANGE}: both log scales", check=metapt.POSITIVE, data=True)
    range_shear: float = metapt.option(0.3, f"{RANGE}: shear", check=metapt.POSITIVE, data=True)
    spread: float = metapt.option(0.5, "Spread of PT's maps, in ranges; it narrows to 0.02", check=WIDE, learning=True)
    narrow: float = metapt.option(1.0, "Share of the run over which it does", check=metapt.SHARE, learning=True)


class DigitsAffine(metapt.Images):
    """PT images are transformed by maps around φ, FT images by maps around a target, which is uniform in the ranges. φ
    begins at the identity. Rates and spreads of the six numbers are in units of their ranges."""

    Settings = AffineSettings
    captions: ClassVar = {"map_error_px": "φ's map to the target's (pixels)"}
    presets: ClassVar = {"paper": {**metapt.PUBLISHED, "meta_lr": 1 / 60, "dropout": 0.0, "spread": JITTER}}

    def __init__(self, settings, device, data):
        super().__init__(settings, device, data)
        of = {"rotation": settings.range_deg, "shift": settings.range_px, "log": settings.range_log_scale,
              "shear": settings.range_shear}  # fmt: skip
        self.ranges = torch.tensor([of[name.split("_")[0]] for name in NUMBERS], device=device)
        # Of a generator of its own: whoever draws φ by the seed does not come upon the target.
        self.target = torch.tensor(list(self.draw_phi(self.random.spawn(1)[0]).values()), device=device)
        for part in ("finetune", "validation", "test"):
            noise = torch.from_numpy(self.random.standard_normal((self.sizes[part], len(NUMBERS)))).float().to(device)
            numbers = (self.target + JITTER * self.ranges * noise).float()
            self.pixels[part] = transform(self.pixels[part].float(), numbers)  # once and for all: FT data are data

    def draw_phi(self, random: np.random.Generator) -> dict[str, Tensor]:
        """φ as a state dict, drawn as the target was."""
        drawn = self.ranges.cpu() * torch.from_numpy(random.uniform(-1, 1, len(NUMBERS))).float()
        return dict(zip(NUMBERS, drawn, strict=True))

    def oracle_phi(self) -> dict[str, Tensor]:
        """The target as a state dict."""
        return dict(zip(NUMBERS, self.target.cpu(), strict=True))

    def meta(self):
        return AffineMean().to(self.device)

    def phi_rates(self, meta):
        return {name: self.settings.meta_lr * r for name, r in zip(NUMBERS, self.ranges.tolist(), strict=True)}

    def pretrain_loss(self, network, meta, index, progress, live):
        images, labels = self.inputs("pretrain", index), self.targets("pretrain", index)
        # As in DigitsRotation: a wide spread early averages the loss over maps, which flattens its lesser optima.
        wide, share = self.settings.spread / JITTER, max(0.0, 1 - progress / self.settings.narrow)
        spread = self.ranges * (JITTER * wide**share)

        def loss(theta, phi):
            transformed = metapt.call(meta, phi, images, spread, train=True)
            return F.cross_entropy(metapt.call(network, theta, transformed, train=True, live=live), labels)

        return loss

    @torch.no_grad()
    def map_error(self, meta: AffineMean) -> float:
        """How far φ's map and the target's take a pixel apart, in pixels, averaged over the image."""
        line = torch.arange(self.height, device=self.device) - (self.height - 1) / 2
        matrix, shift = (of_phi - of_target for of_phi, of_target in zip(affine(meta.numbers()), affine(self.target)))
        return (torch.cartesian_prod(line, line) @ matrix.T + shift).norm(dim=1).mean().item()

    def measure(self, meta):
        return {"map_error_px": self.map_error(meta), **{name: getattr(meta, name).item() for name in NUMBERS}}

    def facts(self, meta):
        return self.measure(meta) | {f"target_{name}": number.item() for name, number in self.oracle_phi().items()}

    def table(self, meta):
        learned = meta.numbers().tolist()
        return ["number", "learned", "target"], list(zip(NUMBERS, learned, self.target.tolist(), strict=True))

    def figures(self, meta):
        return {"digits.png": lambda figure: self.draw(figure, meta)}

    @torch.no_grad()
    def draw(self, figure, meta: AffineMean) -> None:
        """The first ten digits of PT: as they are, under the target and under φ."""
        figure.set_size_inches(3.5, 1.4)
        images = self.inputs("pretrain", torch.arange(10, device=self.device))
        maps = {"as is": AffineMean().to(self.device).numbers(), "target": self.target, "learned": meta.numbers()}
        for axis, (name, numbers) in zip(figure.subplots(len(maps)), maps.items(), strict=True):
            row = transform(images, numbers.expand(len(images), -1))
            axis.imshow(torch.cat(list(row[:, 0]), 1).cpu().numpy(), cmap="gray_r", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[], ylabel=name)
            axis.spines[:].set_visible(False)

    def decorate(self, axis):
        axis.set_ylim(0)
