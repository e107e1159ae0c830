"""Digits under an affine map: φ is six numbers, FT images are transformed by a target map.

    python metapt.py meta digits-affine     φ = rotation, two shifts, two scales and a shear

A made-up problem, after the rotations of Raghu et al., NeurIPS 2021, section 4.1, with more numbers
than a search by trial covers. PT images are transformed by maps drawn around φ, which begins at the
identity. Each seed draws a target, which PT never sees; FT data alone say where it is.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metapt

# The numbers of φ, and what they do to an image. x points to the right, y points down, and the
# origin is the image's centre.
NUMBERS = {
    "rotation_deg": "counter-clockwise, last",
    "shift_x_px": "to the right, after all else",
    "shift_y_px": "down, after all else",
    "log_scale_x": "widens by its exponential, first",
    "log_scale_y": "heightens by its exponential, first",
    "shear_x": "x grows by so much of y, after the scales",
}

# The spread of FT's maps, and of PT's at the end, as a share of the ranges that targets come from.
JITTER = 0.02


# ------------------------------------------------------------------------------------------------
# Maps of images, and φ


def affine(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Maps [..., 6], in the order of NUMBERS, as matrices A [..., 2, 2] and shifts b [..., 2].

    A map takes the point p to A p + b.
    """
    degrees, right, down, log_wide, log_high, shear = numbers.unbind(-1)
    angle = degrees * (torch.pi / 180)
    zero = torch.zeros_like(degrees)
    one = torch.ones_like(degrees)
    rotation = matrices(angle.cos(), angle.sin(), -angle.sin(), angle.cos())
    lean = matrices(one, shear, zero, one)
    stretch = matrices(log_wide.exp(), zero, zero, log_high.exp())
    shift = torch.stack([right, down], -1)
    return rotation @ lean @ stretch, shift


def matrices(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Matrices with the rows (a, b) and (c, d), from four tensors of one shape."""
    return torch.stack([a, b, c, d], -1).unflatten(-1, (2, 2))


def transform(images: Tensor, numbers: Tensor) -> Tensor:
    """Square images [n, c, h, h], each transformed by its own map [n, 6]; differentiable in both.

    Resampling is bicubic, as in `metapt.rotate`.
    """
    matrix, shift = affine(numbers)
    # Where the value of a pixel comes from. `inv_ex` does not check what it inverts: a check would
    # wait for the device.
    inverse = torch.linalg.inv_ex(matrix)[0]
    pixels_to_grid = 2 / images.shape[-1]  # `affine_grid` counts in halves of the image.
    origin = -inverse @ shift[..., None] * pixels_to_grid
    grid = F.affine_grid(torch.cat([inverse, origin], -1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bicubic", align_corners=False)


class AffineMean(nn.Module):
    """φ = the mean of the normal distribution that each image's map is drawn from.

    The draw is reparameterised, as in `metapt.RotationMean`: the gradient of φ goes through the
    resampling of the images.
    """

    def __init__(self, numbers=(0.0,) * 6):
        super().__init__()
        for name, number in zip(NUMBERS, numbers, strict=True):
            self.register_parameter(name, nn.Parameter(torch.tensor(float(number))))

    def numbers(self) -> Tensor:
        """The six numbers [6], in the order of NUMBERS."""
        return torch.stack([getattr(self, name) for name in NUMBERS])

    def forward(self, images: Tensor, spread: Tensor) -> Tensor:
        noise = torch.randn(len(images), len(NUMBERS), dtype=images.dtype, device=images.device)
        return transform(images, self.numbers() + spread * noise)


# ------------------------------------------------------------------------------------------------
# The domain


@dataclass(frozen=True)
class AffineSettings(metapt.DigitsSettings):
    steps: int = 850
    # φ that moves before θ knows digits under all maps goes astray where the target is far.
    warmup_share: float = 6 / 17
    lr: float = 2e-3
    unroll_lr: float = 1e-3
    unroll_batch_size: int = 128
    meta_every: int = 3
    meta_batch_size: int = 192
    meta_lr: float = 0.05
    meta_lr_decay: float = 0.1
    average: float = 0.5
    solver: str = "cg"
    terms: int = 5
    damping: float = 3.0
    measure_steps: int = 300
    range_deg: float = metapt.setting(
        60.0, "Targets are drawn up to ± this: rotation", check=metapt.POSITIVE, data=True
    )
    range_px: float = metapt.setting(
        1.0, "Targets are drawn up to ± this: both shifts", check=metapt.POSITIVE, data=True
    )
    range_log_scale: float = metapt.setting(
        0.3, "Targets are drawn up to ± this: both log scales", check=metapt.POSITIVE, data=True
    )
    range_shear: float = metapt.setting(
        0.3, "Targets are drawn up to ± this: shear", check=metapt.POSITIVE, data=True
    )
    spread: float = metapt.setting(
        1.0,
        "Spread of PT's maps, in ranges; it narrows to 0.02",
        check=metapt.Check(lambda value: value >= JITTER, f"{JITTER} or more"),
        learning=True,
    )
    narrow: float = metapt.setting(
        1.0, "Share of the run over which it does", check=metapt.SHARE, learning=True
    )
    log_loss: bool = metapt.setting(
        True, "The hypergradient is of log L_PT in place of L_PT", learning=True
    )


class DigitsAffine(metapt.Digits):
    """PT images are transformed by maps around φ, FT images by maps around a target.

    The target is uniform in the ranges, φ begins at the identity. Learning rates and spreads of the
    six numbers are in units of their ranges. A PT step lowers L_PT; a meta step is about log L_PT
    (`log_loss`), which is lowest at the same θ: see `pretrain_loss`.
    """

    Settings = AffineSettings
    captions: ClassVar = {"map_error_px": "φ's map to the target's (pixels)"}
    presets: ClassVar = {
        "paper": {
            **metapt.PUBLISHED,
            "meta_lr": 1 / 60,
            "dropout": 0.0,
            "spread": JITTER,
            "log_loss": False,
        }
    }

    def __init__(self, settings, device, data):
        super().__init__(settings, device, data)
        # The logarithm of a mean is no mean over examples, which ranks could divide.
        self.mean_over_examples = not settings.log_loss
        ranges = {
            "rotation_deg": settings.range_deg,
            "shift_x_px": settings.range_px,
            "shift_y_px": settings.range_px,
            "log_scale_x": settings.range_log_scale,
            "log_scale_y": settings.range_log_scale,
            "shear_x": settings.range_shear,
        }
        self.ranges = torch.tensor([ranges[name] for name in NUMBERS], device=device)
        # From a generator of its own: whoever draws φ by the seed does not come upon the target.
        (own_random,) = self.random.spawn(1)
        target = self.draw_phi(own_random)
        self.target = torch.stack(list(target.values())).to(device)
        # FT images are transformed once and for all: they are data.
        for part in ("finetune", "validation", "test"):
            noise = self.random.standard_normal((self.sizes[part], len(NUMBERS)))
            noise = torch.from_numpy(noise).float().to(device)
            numbers = (self.target + JITTER * self.ranges * noise).float()
            self.pixels[part] = transform(self.pixels[part].float(), numbers)

    def draw_phi(self, random: np.random.Generator) -> dict[str, Tensor]:
        """φ as a state dict, drawn as the target was."""
        shares = torch.from_numpy(random.uniform(-1, 1, len(NUMBERS))).float()
        drawn = self.ranges.cpu() * shares
        return dict(zip(NUMBERS, drawn, strict=True))

    def oracle_phi(self) -> dict[str, Tensor]:
        """The target as a state dict."""
        return dict(zip(NUMBERS, self.target.cpu(), strict=True))

    def meta(self):
        return AffineMean().to(self.device)

    def phi_rates(self, meta):
        ranges = zip(NUMBERS, self.ranges.tolist(), strict=True)
        return {name: self.settings.meta_lr * range_ for name, range_ in ranges}

    def pretrain_loss(self, network, meta, index, progress, live):
        images = self.inputs("pretrain", index)
        labels = self.targets("pretrain", index)
        spread = self.spread_at(progress)

        def loss(theta, phi):
            transformed = metapt.call(meta, phi, images, spread, train=True)
            logits = metapt.call(network, theta, transformed, train=True, live=live)
            value = F.cross_entropy(logits, labels)
            # Away from PT's minimum a hypergradient of L_PT favours maps that make the gradient of
            # θ longer, which are those that shrink the digits; PT's Adam takes steps that do not
            # depend on its length. log L_PT has the same minimum; its gradient is divided by L_PT.
            if self.settings.log_loss and not live:
                return value.log()
            return value

        return loss

    def spread_at(self, progress: float) -> Tensor:
        """The spread of PT's maps [6]: wide at first, it narrows to that of FT's.

        A wide spread early averages the loss over maps, which flattens its lesser optima.
        """
        times_jitter = self.settings.spread / JITTER
        remaining = max(0.0, 1 - progress / self.settings.narrow)
        return self.ranges * (JITTER * times_jitter**remaining)

    @torch.no_grad()
    def map_error(self, meta: AffineMean) -> float:
        """How far φ's map and the target's take a pixel apart, in pixels, over the whole image."""
        matrix, shift = affine(meta.numbers())
        target_matrix, target_shift = affine(self.target)
        line = torch.arange(self.height, device=self.device) - (self.height - 1) / 2
        places = torch.cartesian_prod(line, line)
        apart = places @ (matrix - target_matrix).T + (shift - target_shift)
        return apart.norm(dim=1).mean().item()

    def measure(self, meta):
        numbers = {name: getattr(meta, name).item() for name in NUMBERS}
        return {"map_error_px": self.map_error(meta), **numbers}

    def facts(self, meta):
        target = {f"target_{name}": number.item() for name, number in self.oracle_phi().items()}
        return {**self.measure(meta), **target}

    def table(self, meta):
        target = self.target.tolist()
        learned = meta.numbers().tolist()
        return ["number", "target", "learned"], list(zip(NUMBERS, target, learned, strict=True))

    def phi_from_table(self, values):
        return dict(zip(NUMBERS, torch.tensor(values), strict=True))

    def figures(self, meta):
        return {"digits.png": lambda figure: self.draw(figure, meta)}

    @torch.no_grad()
    def draw(self, figure, meta: AffineMean) -> None:
        """The first ten digits of PT: as they are, under the target and under φ."""
        figure.set_size_inches(3.5, 1.4)
        images = self.inputs("pretrain", torch.arange(10))
        maps = {
            "as is": torch.zeros(len(NUMBERS), device=self.device),
            "target": self.target,
            "learned": meta.numbers(),
        }
        axes = figure.subplots(len(maps))
        for axis, (name, numbers) in zip(axes, maps.items(), strict=True):
            transformed = transform(images, numbers.expand(len(images), -1))
            row = torch.cat(list(transformed[:, 0]), 1)
            axis.imshow(row.cpu().numpy(), cmap="gray_r", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[], ylabel=name)
            axis.spines[:].set_visible(False)

    def decorate(self, axis):
        axis.set_ylim(0)
