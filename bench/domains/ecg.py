"""Electrocardiograms: PT is SimCLR on 12-lead ECGs without labels, φ makes its views.

    python metapt.py download ecg                      PTB-XL at 100 Hz, about 0.55 GB
    python metapt.py meta ecg                          φ = a warp in time
    python metapt.py meta ecg --augment simclr         φ = the strengths of masks and noise
    python metapt.py meta ecg --augment both           φ = all of these
    python metapt.py pretrain ecg --augment simclr     the baseline without a warp
    python metapt.py meta bench/domains/ecg.py:BYOL    BYOL in place of SimCLR

FT is five diagnostic superclasses. Prepared records lie in data/ecg/prepared.

Raghu et al., NeurIPS 2021, section 5.2. Records: Wagner et al., "PTB-XL", Scientific Data 2020
(CC BY 4.0). SimCLR: Chen et al., ICML 2020. BYOL: Grill et al., NeurIPS 2020. Encoder: ResNet-18
of He et al., CVPR 2016, along time.
"""

import hashlib
import itertools
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.checkpoint import checkpoint

import metapt

try:
    from bench.domains.target import add_target, move_target, target_params
except ImportError:
    raise metapt.BadInput(
        "bench/domains/target.py is missing beside metapt.py: copy it from metapt's repository"
    ) from None

PREPARED_BY = "python metapt.py download ecg"


# ------------------------------------------------------------------------------------------------
# Records


class Records:
    """Prepared ECGs: samples stay on disk (for an accelerator they are copied there).

    Records are known by their row in the prepared arrays; rows are given as tensors on the CPU.
    BadInput: the folder is missing, or not what its script writes.
    """

    def __init__(self, folder: Path, device: torch.device):
        about, arrays = metapt.read_prepared(folder, "metapt ecgs 2", PREPARED_BY, layout)
        check_records(folder, about, arrays)
        self.leads: list[str] = about["leads"]
        self.classes: list[str] = about["classes"]
        self.hertz: int = about["hertz"]
        self.length = arrays["samples"].shape[1]
        self.device = device
        self.ecg_id = arrays["ecg_id"].to(device)
        self.patient = arrays["patient"].to(device)
        self.fold = arrays["fold"].to(device)
        self.labels = arrays["labels"].to(device)
        self.gain = arrays["gain"].to(device)
        self.baseline = arrays["baseline"].to(device)
        self.sums = arrays["sums"].to(device)
        self.samples = arrays["samples"].to(device)

    def millivolts(self, rows: Tensor) -> Tensor:
        """Signals [n, leads, t] in mV."""
        rows = metapt.to_device(rows, self.device)
        samples = self.samples[rows].float()
        signals = (samples - self.baseline[rows][:, None]) / self.gain[rows][:, None]
        # With time last in memory, noise of this shape is drawn eight times as fast.
        return signals.transpose(1, 2).contiguous()

    def moments(self, rows: Tensor) -> tuple[float, float]:
        """Mean and standard deviation, in mV, over all samples of all leads of these records."""
        total, squares = self.sums[rows].sum(0).tolist()
        count = len(rows) * self.length * len(self.leads)
        mean = total / count
        variance = squares / count - mean * mean
        if not 0 < variance < math.inf:
            raise metapt.BadInput(
                "the records' sums leave no variance: they are flat, or prepared wrongly"
            )
        return mean, math.sqrt(variance)


def layout(about: dict) -> dict:
    """Data type and shape of each array of the prepared folder."""
    records = about["records"]
    leads = len(about["leads"])
    classes = len(about["classes"])
    return {
        "ecg_id": ("<i8", [records]),
        "patient": ("<i8", [records]),
        "fold": ("<i8", [records]),
        "labels": ("|u1", [records, classes]),
        "gain": ("<f4", [records, leads]),
        "baseline": ("<f4", [records, leads]),
        "sums": ("<f8", [records, 2]),
        "samples": ("<i2", [records, about["samples"], leads]),
    }


def check_records(folder: Path, about: dict, arrays: dict[str, Tensor]) -> None:
    """BadInput where the prepared folder holds what no script writes; samples are not read."""
    hertz = about.get("hertz")
    facts = {
        "leads": are_names(about["leads"]),
        "classes": are_names(about["classes"]),
        "hertz": type(hertz) is int and hertz >= 1,
        "samples": arrays["samples"].numel() > 0,
    }
    for name, right in facts.items():
        if not right:
            raise metapt.BadInput(
                f"{folder}/about.json is not what '{PREPARED_BY}' wrote: {name} cannot be"
            )
    gain = arrays["gain"]
    values = {
        "gain": (gain >= 1) & (gain <= 1e6),
        "baseline": arrays["baseline"].abs() <= 2**15,
        "fold": arrays["fold"] >= 0,
        "labels": arrays["labels"] <= 1,
        "sums": arrays["sums"].isfinite(),
    }
    for name, right in values.items():
        if not right.all():
            raise metapt.BadInput(
                f"{folder}/{name}.npy is not what '{PREPARED_BY}' wrote: a value that cannot be"
            )


def are_names(values) -> bool:
    """Whether this is a list of texts, at least one, all different."""
    if not isinstance(values, list) or not values:
        return False
    return all(isinstance(value, str) for value in values) and len(set(values)) == len(values)


# ------------------------------------------------------------------------------------------------
# φ: how views are made


class WarpAugmentation(nn.Module):
    """φ = a network that says of each signal how far to warp it in time, and a global scale s.

    A warp is a random diffeomorphism: white noise is its velocity, which scaling and squaring
    integrates (Arsigny et al., MICCAI 2006), and a Gaussian smooths what comes out. The velocity is
    100 s² times the signal's magnitude, which is between 0 and 2.

    Samples keep their order whatever φ is. The number of squarings is such that the first small
    step swaps no samples; composition, interpolation and smoothing of increasing maps, with borders
    replicated, are increasing again.
    """

    def __init__(self, leads: int, scale: float, width: int = 32):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(float(scale)))
        # How many squarings `integrate` needs at most, once `expect` has found it out.
        self.most_squarings: int | None = None
        layers = []
        for inputs, outputs in itertools.pairwise([leads, width, width, width, width]):
            convolution = along_time(inputs, outputs, taps=15, stride=2, bias=True)
            norm = nn.BatchNorm2d(outputs, track_running_stats=False)
            layers.append(nn.Sequential(convolution, norm, nn.ReLU()))
        self.layers = nn.Sequential(*layers)
        self.last = nn.Linear(width, 1)

    def magnitudes(self, signals: Tensor) -> Tensor:
        """Signals [n, leads, t] to how far each is to be warped, [n] in (0, 2)."""
        features = self.layers(as_images(signals)).mean((2, 3))
        return 2 * self.last(features).squeeze(1).sigmoid()

    def displacements(self, magnitudes: Tensor, samples: int) -> Tensor:
        """A random warp a signal: from how many samples later each sample is taken, [n, samples].

        Noise and velocity are at a quarter of the resolution. There a displacement is a quarter of
        the number, so that values shrink along (as published).
        """
        shape = (len(magnitudes), 1, samples)
        noise = torch.randn(shape, dtype=magnitudes.dtype, device=magnitudes.device)
        noise = F.interpolate(noise, scale_factor=0.25, mode="linear") / 4
        velocity = 100 * self.scale**2 * magnitudes[:, None] * noise.squeeze(1)
        moved = 4 * integrate(velocity, most=self.most_squarings)
        moved = F.interpolate(moved[:, None], size=samples, mode="linear")

        taps = torch.arange(-12, 13, dtype=moved.dtype, device=moved.device)
        kernel = torch.exp(-(taps**2) / (2 * 12**2))
        kernel = kernel / kernel.sum()
        padded = F.pad(moved, (12, 12), mode="replicate")
        return F.conv1d(padded, kernel[None, None]).squeeze(1)

    def expect(self) -> None:
        """Finds out, from s as it is now, how many squarings `integrate` can need at most."""
        largest_magnitude = 2
        steepest_noise = 2 * 9 / 4  # |noise| is below 9, and a quarter of that once interpolated
        steepest = 100 * self.scale.item() ** 2 * largest_magnitude * steepest_noise
        self.most_squarings = None
        if steepest < 2**30:
            self.most_squarings = squarings_for(steepest)

    def forward(self, views: Tensor, magnitudes: Tensor) -> Tensor:
        """Views [n, leads, t], each resampled along its own warp; all leads of a view alike."""
        return resample(views, self.displacements(magnitudes, views.shape[2]))


def resample(signals: Tensor, moved: Tensor) -> Tensor:
    """Signals [n, leads, t], each sample taken `moved` [n, t] samples later.

    Between samples it is linear, beyond the borders as at them.
    """
    last = moved.shape[1] - 1
    place = torch.arange(moved.shape[1], dtype=moved.dtype, device=moved.device) + moved
    across = place * (2 / last) - 1  # `grid_sample` counts from -1 to 1.
    # At a place that is no number `grid_sample` may read beyond its memory. It gets another one,
    # and the sample becomes no number by itself.
    grid = torch.stack([across.nan_to_num(), torch.zeros_like(place)], -1)[:, None]
    images = signals[:, :, None]
    sampled = F.grid_sample(images, grid, padding_mode="border", align_corners=True).squeeze(2)
    return sampled + 0 * moved[:, None]


SQUARINGS = 5  # at least


def squarings_for(steepest: float) -> int:
    """How many squarings keep neighbours in their order in the first step.

    `steepest` is the largest difference of the velocity between neighbours. After so many halvings
    it is below one sample.
    """
    if 2 * steepest < 2**SQUARINGS or not math.isfinite(steepest):
        return SQUARINGS
    return math.ceil(math.log2(steepest)) + 1


def integrate(velocity: Tensor, most: int | None = None) -> Tensor:
    """Displacements [n, t] of the flow of a velocity field [n, t] for one unit of time.

    By scaling and squaring: a step so small that it is taken as it is, then u ← u + u(x + u), which
    doubles the time. Which number of squarings is needed is known on the device alone, and reading
    it would wait. With `most`, which is no less, nothing waits: `most` steps are made, and those
    that were not needed, the first ones, only double u.
    """
    last = velocity.shape[1] - 1
    grid = torch.arange(last + 1, dtype=velocity.dtype, device=velocity.device)
    steepest = velocity.detach().diff(dim=1).abs().max()
    doublings = None
    if most is None:
        most = squarings_for(steepest.item())
    else:
        more = (2 * steepest >= 2**SQUARINGS) & steepest.isfinite()
        needed = torch.where(more, steepest.double().log2().ceil() + 1, SQUARINGS)
        doublings = most - needed

    moved = velocity / 2**most
    for i in range(most):
        # u(x + u), between samples linear, beyond the borders as at the borders
        place = (grid + moved).clamp(0, last)
        # Clamped as whole numbers: where the signal is not a number neither is the share, and so
        # neither is the result, but a place there is.
        left = place.detach().floor().long().clamp(0, last - 1)
        share = place - left
        step = torch.lerp(moved.gather(1, left), moved.gather(1, left + 1), share)
        if doublings is not None:
            step = torch.where(i < doublings, moved, step)
        moved = moved + step
    return moved


class SignalAugmentation(nn.Module):
    """Two views of each signal: leads are masked, noise is added, then time is warped.

    Masks and noise are those of SimCLR on ECGs. In each lead a random stretch of up to half its
    length is set to zero, and noise of up to 10 % of its standard deviation is added:
    U(0, 1)·σ(mask)·length and U(0, 1)·0.1·exp(noise). With `strengths`, `mask` and `noise` are φ
    as well. Without a `scale` there is no warp.
    """

    def __init__(self, leads: int, scale: float | None, strengths: bool):
        super().__init__()
        kind = nn.Parameter if strengths else nn.Buffer
        self.mask = kind(torch.zeros(()))
        self.noise = kind(torch.zeros(()))
        self.warp = None
        if scale is not None:
            self.warp = WarpAugmentation(leads, scale)

    def masked(self, signals: Tensor) -> Tensor:
        """Signals with a stretch of each lead set to zero.

        The samples at the two ends of a stretch are masked in part, which makes its length
        differentiable.
        """
        n, leads, samples = signals.shape
        length, start = torch.rand(2, n, leads, 1, dtype=signals.dtype, device=signals.device)
        length = length * self.mask.sigmoid() * samples
        start = start * (samples - length)
        place = torch.arange(samples, dtype=signals.dtype, device=signals.device)
        begun = (place + 1 - start).clamp(0, 1)
        not_over = (start + length - place).clamp(0, 1)
        return signals * (1 - begun * not_over)

    def forward(self, signals: Tensor) -> list[Tensor]:
        """Signals [n, leads, t] to two views of that shape."""
        deviation = 0.1 * self.noise.exp() * signals.std(2, keepdim=True)
        views = []
        for _ in range(2):
            noise = torch.rand_like(deviation) * deviation * torch.randn_like(signals)
            views.append(self.masked(signals) + noise)
        if self.warp is None:
            return views
        # A magnitude is the signal's, so that both views share one pass of the network.
        magnitudes = self.warp.magnitudes(signals)
        return [self.warp(view, magnitudes) for view in views]


# ------------------------------------------------------------------------------------------------
# θ: the encoder. SimCLR's loss. The metric


def along_time(inputs: int, outputs: int, taps: int, stride: int = 1, bias: bool = False):
    """A convolution along time: [n, inputs, 1, t] to [n, outputs, 1, ⌈t / stride⌉]; odd taps."""
    return nn.Conv2d(inputs, outputs, (1, taps), (1, stride), (0, taps // 2), bias=bias)


def as_images(signals: Tensor) -> Tensor:
    """[n, channels, t] to [n, channels, 1, t] with channels last in memory.

    nn.Conv1d has no such layout, which is faster on a CPU.
    """
    return signals[:, :, None].contiguous(memory_format=torch.channels_last)


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut, along time; where there are more outputs, t is halved."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        stride = 2 if outputs > inputs else 1
        self.first = along_time(inputs, outputs, 15, stride)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.second = along_time(outputs, outputs, 15)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut.append(along_time(inputs, outputs, 1, stride))
            self.shortcut.append(nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm1(self.first(x)).relu()
        hidden = self.norm2(self.second(hidden))
        return (hidden + self.shortcut(x)).relu()


class ResNet18(nn.Module):
    """ResNet-18 along time with kernels of 15: signals [n, leads, t] to features [n, 8 width].

    The published width is 32. Signals of 1,000 samples are padded to 1,024 with zeros, their mean.
    """

    def __init__(self, leads: int, width: int):
        super().__init__()
        self.stem = nn.Sequential(
            along_time(leads, width, 15, 2),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d((1, 3), (1, 2), (0, 1)),
        )
        widths = [times * width for times in (1, 1, 1, 2, 2, 4, 4, 8, 8)]
        blocks = [ResidualBlock(inputs, outputs) for inputs, outputs in itertools.pairwise(widths)]
        self.blocks = nn.Sequential(*blocks)

    def forward(self, signals: Tensor) -> Tensor:
        padded = F.pad(signals, (0, -signals.shape[2] % 64))
        return self.blocks(self.stem(as_images(padded))).mean((2, 3))


def nt_xent(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """SimCLR's loss (equation 1) of two views [n, d]: each finds its other among all 2n."""
    z = F.normalize(torch.cat([a, b]), dim=1)
    similarity = z @ z.T / temperature
    similarity.fill_diagonal_(-math.inf)  # nobody is compared to itself
    other = torch.arange(len(z), device=z.device).roll(len(a))
    return F.cross_entropy(similarity, other)


def mean_auroc(scores: Tensor, labels: Tensor) -> float:
    """Area under the ROC curve, averaged over classes; both arguments are [n, classes].

    Classes that all have, or none, are left out; NaN where none is left.
    """
    from sklearn.metrics import roc_auc_score

    areas = []
    columns = zip(labels.T.cpu().numpy(), scores.detach().T.cpu().numpy(), strict=True)
    for labels_of_class, scores_of_class in columns:
        if 0 < labels_of_class.sum() < len(labels_of_class):
            areas.append(roc_auc_score(labels_of_class, scores_of_class))
    if not areas:
        return math.nan
    return float(np.mean(areas))


# ------------------------------------------------------------------------------------------------
# The domain

SETS = (100, 250, 500, 1000, 2500)  # sizes of the FT set, as published

# 50 epochs of folds 1 to 9 in batches of 256, one of them as warm-up. FT is 200 epochs of the whole
# network.
PAPER = {
    **metapt.PUBLISHED,
    "width": 32,
    "steps": 3800,
    "warmup_share": 1 / 50,
    "batch_size": 256,
    "meta_batch_size": 256,
    "unroll_batch_size": 256,
    "validation_batch_size": 256,
    "lr": 1e-4,
    "alpha": 1e-4,
    "unroll_lr": 1e-4,
    "meta_lr": 1e-4,
    "scale_lr": 1.0,
    "init_scale": 4.0,
    "measure_scope": "all",
    "measure_epochs": 200,
}


@dataclass(frozen=True)
class ECGSettings(metapt.Settings):
    steps: int = 150
    warmup_share: float = 4 / 15
    batch_size: int = 128
    lr: float = 3e-3
    unroll_batch_size: int = 128
    validation_batch_size: int = 128
    # Hypergradients of s scatter by many times their mean: many meta steps, and small ones.
    meta_every: int = 2
    meta_batch_size: int = 128
    meta_lr: float = 3e-3
    # Differences step over the kinks of thousands of ReLUs here: a long step averages over them.
    hvp: str = "finite"
    hvp_step: float | None = 0.3
    # The step's direction is q: in Adam's metric it would go along the parameters with the smallest
    # gradients, such as biases before BatchNorm.
    preconditioner: str = ""
    unroll_hvp: str = "exact"
    compare: int = 2
    width: int = metapt.setting(
        8, "Channels of the ResNet's first quarter", check=metapt.AT_LEAST_1, data=True
    )
    ft_share: float = metapt.setting(
        1.0, "Share of the FT set that is seen before FT", check=metapt.SHARE
    )
    test_folds: str = metapt.setting(
        "10",
        "Folds of the test set, as 1,2,3",
        check=metapt.Check(re.compile(r"\d{1,3}(,\d{1,3})*").fullmatch, "numbers such as 1,2,3"),
        data=True,
    )
    ft_records: int = metapt.setting(
        0, "Records of the FT set; 0: all, at most 2500", check=metapt.AT_LEAST_0
    )
    augment: str = metapt.setting(
        "warp",
        "φ: warp; simclr (mask, noise); both",
        check=metapt.one_of("warp", "simclr", "both"),
    )
    init_scale: float = metapt.setting(0.5, "s of the warp at the start (0.5: 34 ms rms)")
    scale_lr: float = metapt.setting(
        3e-2, "Learning rate of s (Adam)", check=metapt.POSITIVE, learning=True
    )
    temperature: float = metapt.setting(0.5, "Of SimCLR's loss", check=metapt.POSITIVE)

    def __post_init__(self):
        super().__post_init__()
        for name in ("batch_size", "meta_batch_size"):
            self.require(getattr(self, name) > 1, name, "2 or more: views are told apart")
        if self.augment == "simclr":
            for name in ("init_scale", "scale_lr"):
                # Who gives neither has what the class, or the preset, says.
                not_given = (getattr(type(self), name), PAPER[name])
                expected = "nothing: --augment simclr has no warp"
                self.require(getattr(self, name) in not_given, name, expected)


class ECG(metapt.Domain):
    """PT tells the views of a record from those of others, FT finds diagnostic superclasses.

    Parts: the records of --test-folds are the test set, all others are PT's. N of these, drawn by
    seed, are the FT set, 80 % to train and 20 % to validate; an FT-set size counts both. PTB-XL's
    patients never cross folds.

    Each view passes the encoder by itself, with its own BatchNorm statistics. Signals are scaled by
    one mean and one standard deviation, of all of PT's samples and leads.
    """

    Settings = ECGSettings
    presets: ClassVar = {"paper": PAPER}
    tests: ClassVar = {"test": "mean AUROC"}
    captions: ClassVar = {
        "warp_scale": "global scale s of the warp",
        "mask_share": "longest mask (share of the signal)",
    }
    mean_over_examples = False  # NT-Xent compares each example to all others of the batch.

    def __init__(self, settings, device, data):
        super().__init__(settings, device, data)
        self.records = Records(data / "ecg" / "prepared", device)
        fold = self.records.fold.cpu().numpy()
        test_folds = [int(number) for number in settings.test_folds.split(",")]
        in_test = np.isin(fold, test_folds)
        rest = np.flatnonzero(~in_test)
        enough = len(rest) >= 5 and np.isin(test_folds, fold).all()
        folds = sorted(set(fold.tolist()))
        settings.require(enough, "test_folds", f"some, but not all, of {folds}")

        wanted = settings.ft_records or min(len(rest), SETS[-1])
        expected = f"0, or 5 to the {len(rest)} that are not test's"
        settings.require(5 <= wanted <= len(rest), "ft_records", expected)
        pool = np.random.default_rng(settings.seed).permutation(rest)[:wanted]
        is_fifth = np.arange(wanted) % 5 == 4
        # Rows of the records, on the CPU.
        self.rows = {
            "pretrain": torch.from_numpy(rest),
            "finetune": torch.from_numpy(pool[~is_fifth]),
            "validation": torch.from_numpy(pool[is_fifth]),
            "test": torch.from_numpy(np.flatnonzero(in_test)),
        }
        self.sizes = {part: len(rows) for part, rows in self.rows.items()}
        self.access = {
            part: max(1, round(settings.ft_share * self.sizes[part]))
            for part in ("finetune", "validation")
        }
        self.finetune_sizes = (*(size for size in SETS if size < wanted), wanted)
        self.mean, self.deviation = self.records.moments(self.rows["pretrain"])

    def data_digest(self):
        ids = [self.records.ecg_id[self.rows[part]].tolist() for part in ("pretrain", "test")]
        records = self.records
        named = [records.leads, records.classes, records.hertz, records.length]
        return hashlib.sha256(json.dumps([*ids, named]).encode()).hexdigest()

    def finetune_limits(self):
        return 5, self.finetune_sizes[-1]

    def finetune_split(self, examples):
        to_validate = examples // 5
        return examples - to_validate, to_validate

    def network(self):
        features = 8 * self.settings.width
        head = nn.Sequential(
            nn.Linear(features, features), nn.ReLU(), nn.Linear(features, features // 2)
        )
        encoder = ResNet18(len(self.records.leads), self.settings.width)
        network = metapt.Network(encoder, head).to(self.device)
        # BatchNorm has its statistics from data at once: an encoder without PT is then a baseline,
        # and not an overflow.
        some = torch.randperm(self.sizes["pretrain"])[:256]
        update_bn([(self.inputs("pretrain", some),)], network)
        return network

    def head(self):
        return nn.Linear(8 * self.settings.width, len(self.records.classes)).to(self.device)

    def meta(self):
        scale = self.settings.init_scale
        if self.settings.augment == "simclr":
            scale = None
        strengths = self.settings.augment != "warp"
        return SignalAugmentation(len(self.records.leads), scale, strengths).to(self.device)

    def phi_rates(self, meta):
        rates = super().phi_rates(meta)
        if meta.warp is not None:
            rates["warp.scale"] = self.settings.scale_lr
        return rates

    def begin_episode(self, meta):
        if meta.warp is not None:
            meta.warp.expect()

    def pretrain_loss(self, network, meta, index, progress, live):
        signals = self.inputs("pretrain", index)

        def loss(theta, phi):
            first, second = self.views(meta, phi, signals)
            a = metapt.call(network, theta, first, train=True, live=live)
            b = metapt.call(network, theta, second, train=True, live=live)
            return nt_xent(a, b, self.settings.temperature)

        return loss

    def views(self, meta, phi, signals):
        """Two views of each signal, with the parameters `phi`.

        Where φ has a gradient they are made again when it arrives there: their graph would outweigh
        what the encoder keeps.
        """
        if any(p.requires_grad for p in phi.values()):
            return checkpoint(metapt.call, meta, phi, signals, train=True, use_reentrant=False)
        return metapt.call(meta, phi, signals, train=True)

    def inputs(self, part, index):
        millivolts = self.records.millivolts(self.rows[part][index])
        return (millivolts - self.mean) / self.deviation

    def targets(self, part, index):
        rows = metapt.to_device(self.rows[part][index], self.device)
        return self.records.labels[rows].float()

    def loss(self, outputs, targets):
        return F.binary_cross_entropy_with_logits(outputs, targets)

    def score(self, outputs, targets):
        return mean_auroc(outputs, targets)

    def measure(self, meta):
        found = {}
        if meta.warp is not None:
            found["warp_scale"] = meta.warp.scale.item()
        found["mask_share"] = meta.mask.sigmoid().item()
        found["noise_share"] = 0.1 * meta.noise.exp().item()
        return found

    def facts(self, meta):
        if meta.warp is None:
            return {}
        _, moved = self.warped(meta)
        return {"warp_rms_ms": moved.square().mean().sqrt().item()}

    @torch.no_grad()
    def warped(self, meta, draws: int = 16) -> tuple[Tensor, Tensor]:
        """Rows of up to 2,048 PT records [n], and warps of each in ms [draws, n, t].

        They are drawn anew, by the same seed each time.
        """
        index = torch.arange(self.sizes["pretrain"])[:2048]
        meta.warp.expect()
        with torch.random.fork_rng(metapt.random_devices(self)):
            torch.manual_seed(self.settings.seed)
            magnitudes = meta.train().warp.magnitudes(self.inputs("pretrain", index))
            warps = [meta.warp.displacements(magnitudes, self.records.length) for _ in range(draws)]
        milliseconds = 1000 / self.records.hertz
        return self.rows["pretrain"][index], torch.stack(warps) * milliseconds

    def figures(self, meta):
        if meta.warp is None:
            return {}
        rows, moved = self.warped(meta)
        moved = moved.cpu()
        # The record shown is the one whose warp is nearest to the mean, not the most striking one.
        strength = moved[0].square().mean(1).sqrt()
        shown = (strength - strength.mean()).abs().argmin()
        each = moved.square().mean((0, 2)).sqrt().numpy()
        return {
            "warp.png": lambda figure: draw_warp(
                figure, self.records, rows[shown], moved[0, shown]
            ),
            "magnitudes.png": lambda figure: draw_magnitudes(figure, self.records, rows, each),
        }


# ------------------------------------------------------------------------------------------------
# BYOL


class Projecting(metapt.Network):
    """Encoder, and a head of projector and predictor.

    `projected` leaves the predictor away, as the target does.
    """

    def forward(self, signals: Tensor, features: bool = False, projected: bool = False) -> Tensor:
        if projected:
            projector = self.head[0]
            return projector(self.encoder(signals))
        return super().forward(signals, features=features)

    def followed(self) -> dict[str, Tensor]:
        """The parameters that the target follows: all but the predictor's."""
        return {name: p for name, p in self.named_parameters() if not name.startswith("head.1.")}


def perceptron(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """BYOL's projector, and its predictor."""
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, outputs)
    )


@dataclass(frozen=True)
class BYOLSettings(ECGSettings):
    steps: int = 100
    warmup_share: float = 3 / 10
    lr: float = 1e-3
    augment: str = "both"
    momentum: float = metapt.setting(0.996, "Of the target, a PT step", check=metapt.BELOW_1)

    def __post_init__(self):
        super().__post_init__()
        not_given = self.temperature == type(self).temperature
        self.require(not_given, "temperature", "nothing: BYOL has none")


class BYOL(ECG):
    """The online network θ predicts from one view what the target makes of the other.

    Equation 2 of Grill et al. The target follows encoder and projector: see target.py.
    """

    Settings = BYOLSettings
    presets: ClassVar = {}

    def network(self):
        encoder = super().network().encoder
        features = 8 * self.settings.width
        projector = perceptron(features, 2 * features, features // 2)
        predictor = perceptron(features // 2, 2 * features, features // 2)
        network = Projecting(encoder, nn.Sequential(projector, predictor)).to(self.device)
        add_target(network, network.followed())
        return network

    def pretrain_loss(self, network, meta, index, progress, live):
        signals = self.inputs("pretrain", index)
        online = network.followed()
        if live:
            move_target(network, online, self.settings.momentum)
        target = target_params(network, online)

        def loss(theta, phi):
            # Each view passes with its own BatchNorm statistics, in the target too.
            first, second = self.views(meta, phi, signals)
            a = metapt.call(network, theta, first, train=True, live=live)
            b = metapt.call(network, theta, second, train=True, live=live)
            aim_of_b = metapt.call(network, target, first, train=True, projected=True)
            aim_of_a = metapt.call(network, target, second, train=True, projected=True)
            agreement = F.cosine_similarity(a, aim_of_a) + F.cosine_similarity(b, aim_of_b)
            return 4 - 2 * agreement.mean()

        return loss


# ------------------------------------------------------------------------------------------------
# Figures


def draw_warp(figure, records: Records, row: Tensor, moved: Tensor) -> None:
    """The middle half of a record before and after a warp `moved` [t] in ms.

    A small panel a lead, on the paper of an electrocardiograph: a fine square is 0.2 s by 0.5 mV.
    """
    from matplotlib.ticker import MultipleLocator

    before = records.millivolts(row[None]).cpu()
    after = resample(before, moved[None] * (records.hertz / 1000))
    quarter = records.length // 4
    middle = slice(quarter, -quarter)
    seconds = np.arange(records.length)[middle] / records.hertz

    panel_rows = math.ceil(len(records.leads) / 2)
    figure.set_size_inches(11, 0.5 + 1.1 * panel_rows)
    panels = figure.subplots(panel_rows, 2, sharex=True, sharey=True, squeeze=False)
    # Leads run down the left column, then down the right one.
    panels = panels.T.flatten()
    for lead, name in enumerate(records.leads):
        panel = panels[lead]
        recorded = before[0, lead, middle]
        warped = after[0, lead, middle]
        panel.plot(seconds, recorded, color="0.25", lw=0.9, label="as recorded")
        panel.plot(seconds, warped, color="C3", lw=0.9, label="after the warp")
        label = metapt.as_label(name.replace("AV", "aV"))
        panel.set_ylabel(label, rotation=0, ha="right", va="center")
        panel.margins(x=0, y=0.05)
        panel.xaxis.set_major_locator(MultipleLocator(1))
        panel.xaxis.set_minor_locator(MultipleLocator(0.2))
        panel.yaxis.set_major_locator(MultipleLocator(1))
        panel.yaxis.set_minor_locator(MultipleLocator(0.5))
        panel.grid(which="both", color="#f2c6c6", lw=0.4)
    for panel in panels[len(records.leads) :]:
        panel.set_visible(False)

    figure.supxlabel("time (s)", fontsize="medium")
    figure.supylabel("mV", fontsize="medium")
    rms = moved.square().mean().sqrt()
    handles, labels = panels[0].get_legend_handles_labels()
    title = f"PTB-XL record {records.ecg_id[row]}; this warp moves samples by {rms:.0f} ms (rms)"
    figure.legend(handles, labels, loc="outside upper center", ncols=2, fontsize=8, title=title)


def draw_magnitudes(figure, records: Records, rows: Tensor, each: np.ndarray) -> None:
    """How far φ warps each record (ms, rms over draws and time), by class.

    Boxes are quartiles, whiskers 5 % and 95 %.
    """
    has = records.labels[rows].cpu().numpy() > 0
    members = dict(zip(records.classes, has.T, strict=True))
    members["none"] = ~has.any(1)
    groups = {
        f"{name} ({chosen.sum()})": each[chosen] for name, chosen in members.items() if chosen.any()
    }
    axis = figure.subplots()
    dots = {"ms": 2, "mec": "0.6"}
    axis.boxplot(groups.values(), orientation="horizontal", whis=(5, 95), flierprops=dots)
    labels = [metapt.as_label(name) for name in groups]
    axis.set_yticks(range(1, len(groups) + 1), labels)
    axis.set(xlabel="displacement by the warp (ms, rms)", xlim=(0, None))
