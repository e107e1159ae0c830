"""Electrocardiograms: PT is SimCLR on 12-lead ECGs without labels, φ makes its views, FT is five diagnostic superclasses.

    python metapt.py download ecg                        PTB-XL at 100 Hz, about 0.55 GB, into data/ecg/prepared
    python metapt.py meta ecg                            φ = a warp in time
    python metapt.py meta ecg --augment simclr           φ = the strengths of mask and noise; `both`: these and the warp
    python metapt.py pretrain ecg --augment simclr       the baseline without a warp
    python metapt.py meta bench/domains/ecg.py:BYOL      BYOL in place of SimCLR: φ = warp, mask and noise

Raghu et al., NeurIPS 2021, section 5.2. Records: Wagner et al., "PTB-XL", Scientific Data 2020 (CC BY 4.0). SimCLR: Chen et
al., ICML 2020. BYOL: Grill et al., NeurIPS 2020. Encoder: ResNet-18 of He et al., CVPR 2016, along time.
"""

import hashlib
import itertools
import json
import math
import re
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.checkpoint import checkpoint

import metapt


class Records:
    """Prepared ECGs: samples stay on disk (on an accelerator they are copied there), the rest is small.

    Raises:
        BadInput: the folder is missing, or not what its script writes.
    """

    def __init__(self, folder: Path, device: torch.device):
        def lines(value):
            return type(value) is list and all(type(line) is str for line in value)

        def names(value):
            return lines(value) and 0 < len(value) == len(set(value))

        def layout(about):
            n, leads, classes = about["records"], len(about["leads"]), len(about["classes"])
            return {"ecg_id": ("<i8", [n]), "patient": ("<i8", [n]), "fold": ("<i8", [n]), "labels": ("|u1", [n, classes]),
                    "gain": ("<f4", [n, leads]), "baseline": ("<f4", [n, leads]), "sums": ("<f8", [n, 2]),
                    "samples": ("<i2", [n, about["samples"], leads])}  # fmt: skip

        one, prepared_by = metapt.whole(1), "python metapt.py download ecg"
        facts = {"records": one, "leads": names, "classes": names, "hertz": one, "samples": one, "left_out": lines}
        about, arrays = metapt.read_prepared(folder, "metapt ecgs 2", prepared_by, facts, layout)
        good = {"gain": (arrays["gain"] >= 1) & (arrays["gain"] <= 1e6), "baseline": arrays["baseline"].abs() <= 2**15,
                "fold": arrays["fold"] >= 0, "labels": arrays["labels"] <= 1, "sums": arrays["sums"].isfinite()}  # fmt: skip
        if wrong := [name for name, right in good.items() if not right.all()]:
            raise metapt.BadInput(f"{folder}/{wrong[0]}.npy is not what '{prepared_by}' wrote: a value that cannot be")
        self.leads, self.classes, self.hertz, self.length = (about[k] for k in ("leads", "classes", "hertz", "samples"))
        self.ecg_id, self.patient, self.fold, self.labels, self.gain, self.baseline, self.sums, self.samples = (
            arrays[name].to(device) for name in layout(about)
        )

    def millivolts(self, index: Tensor) -> Tensor:
        """Signals [n, leads, t] in mV."""
        signals = (self.samples[index].float() - self.baseline[index][:, None]) / self.gain[index][:, None]
        return signals.transpose(1, 2).contiguous()  # noise of its shape is drawn 8 x faster than in the other order

    def moments(self, index: Tensor) -> tuple[float, float]:
        """Mean and standard deviation, in mV, over all samples of all leads of these records."""
        total, squares = self.sums[index].sum(0).tolist()
        n = len(index) * self.length * len(self.leads)
        variance = squares / n - (total / n) * (total / n)
        if not 0 < variance < math.inf:
            raise metapt.BadInput("the records' sums leave no variance: they are flat, or prepared wrongly")
        return total / n, math.sqrt(variance)


# φ: how views are made


class WarpAugmentation(nn.Module):
    """φ = a network that says of each signal how far to warp it in time, and a global scale s of the warp.

    The warp is a random diffeomorphism: white noise is the velocity, scaling and squaring integrates it (Arsigny et al.,
    MICCAI 2006), a Gaussian smooths what comes out. Order is preserved whatever φ is: the number of squarings is such that
    the first small step swaps no samples; composition, interpolation and smoothing of increasing maps, with borders
    replicated, are increasing again. The velocity is 100 s² times the signal's magnitude, which is between 0 and 2.
    """

    def __init__(self, leads: int, scale: float, width: int = 32):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(float(scale)))
        self.most_squarings = None  # of `integrate`, where it was told
        self.layers = nn.Sequential(*(
            nn.Sequential(along_time(a, b, 15, 2, bias=True), nn.BatchNorm2d(b, track_running_stats=False), nn.ReLU())
            for a, b in itertools.pairwise([leads, *[width] * 4])
        ))  # fmt: skip
        self.last = nn.Linear(width, 1)

    def magnitudes(self, signals: Tensor) -> Tensor:
        """Signals [n, leads, t] to how far each is to be warped, [n] in (0, 2)."""
        return 2 * self.last(self.layers(as_images(signals)).mean((2, 3))).squeeze(1).sigmoid()

    def displacements(self, magnitudes: Tensor, samples: int) -> Tensor:
        """A random warp a signal: by how many samples each sample is taken from another place, [n, samples]."""
        noise = torch.randn(len(magnitudes), 1, samples, dtype=magnitudes.dtype, device=magnitudes.device)
        # At a quarter of the resolution a displacement is a quarter of the number, so values shrink along (as published).
        noise = F.interpolate(noise, scale_factor=0.25, mode="linear") / 4
        velocity = 100 * self.scale**2 * magnitudes[:, None] * noise.squeeze(1)
        moved = 4 * integrate(velocity, most=self.most_squarings)
        moved = F.interpolate(moved[:, None], size=samples, mode="linear")
        taps = torch.arange(-12, 13, dtype=moved.dtype, device=moved.device)
        kernel = torch.exp(-(taps**2) / (2 * 12**2))
        return F.conv1d(F.pad(moved, (12, 12), mode="replicate"), (kernel / kernel.sum())[None, None]).squeeze(1)

    def expect(self) -> None:
        """Finds out, from s as it is now, how many squarings `integrate` can need at most."""
        # Magnitudes are below 2; |noise| is below 9, and a quarter of that once it is interpolated.
        steepest = 100 * self.scale.item() ** 2 * 2 * (2 * 9 / 4)
        self.most_squarings = squarings_for(steepest) if steepest < 2**30 else None

    def forward(self, views: Tensor, magnitudes: Tensor) -> Tensor:
        """Views [n, leads, t], each resampled along its own warp; all leads of a view alike."""
        return resample(views, self.displacements(magnitudes, views.shape[2]))


def resample(signals: Tensor, moved: Tensor) -> Tensor:
    """Signals [n, leads, t], each sample taken `moved` [n, t] samples later; linear, beyond the borders as at them."""
    place = torch.arange(moved.shape[1], dtype=moved.dtype, device=moved.device) + moved
    grid = torch.stack([place * (2 / (moved.shape[1] - 1)) - 1, torch.zeros_like(place)], -1)[:, None]
    return F.grid_sample(signals[:, :, None], grid, padding_mode="border", align_corners=True).squeeze(2)


SQUARINGS = 5  # at least


def squarings_for(steepest: float) -> int:
    """So many that no neighbours change places in the first step: |Δv| / 2^squarings < 1."""
    return math.ceil(math.log2(steepest)) + 1 if 2**SQUARINGS <= 2 * steepest < math.inf else SQUARINGS


def integrate(velocity: Tensor, most: int | None = None) -> Tensor:
    """Displacements [n, t] of the flow of a velocity field [n, t] for one unit of time, by scaling and squaring.

    Which number of squarings `squarings_for` gives is on the device; with `most`, which is no less, it stays there: the
    first of so many are then doublings, and nothing waits for the device.
    """
    steepest, last = velocity.detach().diff(dim=1).abs().max(), velocity.shape[1] - 1
    if most is None:
        most = squarings = squarings_for(steepest.item())
    else:
        more = (2 * steepest >= 2**SQUARINGS) & steepest.isfinite()
        squarings = torch.where(more, steepest.double().log2().ceil() + 1, SQUARINGS)
    moved = velocity / 2**most
    grid = torch.arange(last + 1, dtype=moved.dtype, device=moved.device)
    for i in range(most):  # u ← u + u(x + u), beyond the borders as at the borders
        place = (grid + moved).clamp(0, last)
        left = place.detach().floor().clamp(max=last - 1)
        share, left = place - left, left.long()
        there = torch.lerp(moved.gather(1, left), moved.gather(1, left + 1), share)
        moved = moved + (there if squarings is most else torch.where(i < most - squarings, moved, there))
    return moved


class SignalAugmentation(nn.Module):
    """Two views of each signal: leads masked and noise added (the default of SimCLR on ECGs), then warped in time.

    Per lead, a random stretch of up to half its length is set to zero and noise of up to 10 % of its standard deviation
    is added: U(0, 1)·σ(mask)·length and U(0, 1)·0.1·exp(noise). With `strengths`, `mask` and `noise` are φ as well.
    """

    def __init__(self, leads: int, scale: float | None, strengths: bool):
        super().__init__()
        kind = nn.Parameter if strengths else nn.Buffer
        self.mask, self.noise = kind(torch.zeros(())), kind(torch.zeros(()))
        self.warp = None if scale is None else WarpAugmentation(leads, scale)

    def masked(self, signals: Tensor) -> Tensor:
        n, leads, samples = signals.shape
        length, start = torch.rand(2, n, leads, 1, dtype=signals.dtype, device=signals.device)
        length = length * self.mask.sigmoid() * samples
        start = start * (samples - length)
        # The samples at the two ends of a stretch are masked in part, which makes the length differentiable.
        place = torch.arange(samples, dtype=signals.dtype, device=signals.device)
        return signals * (1 - (place + 1 - start).clamp(0, 1) * (start + length - place).clamp(0, 1))

    def forward(self, signals: Tensor) -> list[Tensor]:
        """Signals [n, leads, t] to two views of that shape."""
        deviation = 0.1 * self.noise.exp() * signals.std(2, keepdim=True)
        views = []
        for _ in range(2):
            noise = torch.rand_like(deviation) * deviation * torch.randn_like(signals)
            views.append(self.masked(signals) + noise)
        if self.warp is None:
            return views
        magnitudes = self.warp.magnitudes(signals)  # the signal's, so that both views share one pass
        return [self.warp(view, magnitudes) for view in views]


# θ: the encoder; SimCLR's loss; the metric


def along_time(inputs: int, outputs: int, taps: int, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    """A convolution along time: [n, inputs, 1, t] to [n, outputs, 1, ⌈t / stride⌉], with an odd number of taps."""
    return nn.Conv2d(inputs, outputs, (1, taps), (1, stride), (0, taps // 2), bias=bias)


def as_images(signals: Tensor) -> Tensor:
    """[n, channels, t] to [n, channels, 1, t], channels last in memory: a layout that nn.Conv1d lacks, faster on a CPU."""
    return signals[:, :, None].contiguous(memory_format=torch.channels_last)


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut, along time."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        stride = 2 if outputs > inputs else 1
        self.first, self.norm1 = along_time(inputs, outputs, 15, stride), nn.BatchNorm2d(outputs)
        self.second, self.norm2 = along_time(outputs, outputs, 15), nn.BatchNorm2d(outputs)
        shortcut = [along_time(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)] if stride > 1 else []
        self.shortcut = nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm2(self.second(self.norm1(self.first(x)).relu()))
        return (hidden + self.shortcut(x)).relu()


class ResNet18(nn.Module):
    """ResNet-18 along time with kernels of 15: signals [n, leads, t] to features [n, 8 width]; published: width 32.

    Signals of 1,000 samples are padded to 1,024 with zeros, their mean.
    """

    def __init__(self, leads: int, width: int):
        super().__init__()
        pool = nn.MaxPool2d((1, 3), (1, 2), (0, 1))
        self.stem = nn.Sequential(along_time(leads, width, 15, 2), nn.BatchNorm2d(width), nn.ReLU(), pool)
        widths = [times * width for times in (1, 1, 1, 2, 2, 4, 4, 8, 8)]
        self.blocks = nn.Sequential(*(ResidualBlock(*between) for between in itertools.pairwise(widths)))

    def forward(self, signals: Tensor) -> Tensor:
        return self.blocks(self.stem(as_images(F.pad(signals, (0, -signals.shape[2] % 64))))).mean((2, 3))


def gather(rows: Tensor, n: int, ranks: metapt.Ranks) -> tuple[Tensor, int]:
    """The rows of all ranks [2n, d], of two views of n examples, and where this one's begin. Differentiable any number
    of times, as a rank's part of what the sum of all ranks' losses depends on."""
    if ranks.size == 1:
        return rows, 0
    from torch.distributed.nn.functional import all_reduce

    begin = 2 * torch.arange(n).tensor_split(ranks.size)[ranks.rank][0].item()
    return all_reduce(F.pad(rows, (0, 0, begin, 2 * n - begin - len(rows)))), begin


def nt_xent(a: Tensor, b: Tensor, temperature: float, share: float = 1.0, ranks: metapt.Ranks | None = None) -> Tensor:
    """SimCLR's loss (equation 1) of two views [n, d]: each should find its other among all 2n, those of all ranks, of
    whose examples these are a `share`."""
    z = F.normalize(torch.cat([a, b]), dim=1)
    everyones, begin = gather(z, round(len(a) / share), ranks or metapt.Ranks())
    similarity = z @ everyones.T / temperature
    similarity[:, begin : begin + len(z)].fill_diagonal_(-math.inf)
    return F.cross_entropy(similarity, begin + torch.arange(len(z), device=z.device).roll(len(a)))


def mean_auroc(scores: Tensor, labels: Tensor) -> float:
    """Area under the ROC curve, averaged over the classes [n, classes] that some have and some lack; NaN without any."""
    from sklearn.metrics import roc_auc_score

    pairs = zip(labels.T.cpu().numpy(), scores.detach().T.cpu().numpy(), strict=True)
    return float(np.mean([roc_auc_score(y, x) for y, x in pairs if 0 < y.sum() < len(y)] or [math.nan]))


# The domain

SETS = (100, 250, 500, 1000, 2500)  # sizes of the FT set, as published

# 50 epochs of folds 1 to 9 in batches of 256, one of them as warm-up; FT is 200 epochs of the whole network.
PAPER = {
    **metapt.PUBLISHED, "width": 32, "steps": 3800, "warmup": 76, "batch_size": 256, "meta_batch_size": 256,
    "unroll_batch_size": 256, "validation_batch_size": 256, "lr": 1e-4, "alpha": 1e-4, "unroll_lr": 1e-4, "meta_lr": 1e-4,
    "scale_lr": 1.0, "init_scale": 4.0, "measure_scope": "all", "measure_epochs": 200,
}  # fmt: skip

FOLDS = re.compile(r"\d{1,3}(,\d{1,3})*").fullmatch, "numbers such as 1,2,3"
AUGMENT = metapt.one_of("warp", "simclr", "both")


class ECGSettings(
    metapt.Settings, steps=150, warmup=40, batch_size=128, lr=3e-3, unroll_batch_size=128, validation_batch_size=128,
    # Hypergradients of s scatter by many times their mean (bench/ecg.py draws): many meta steps, and small ones.
    meta_every=2, meta_batch_size=128, meta_lr=3e-3,
    # Differences step over thousands of ReLUs' kinks here: a long step averages over them. See bench/ecg.py draws.
    hvp="finite", hvp_step=0.3, unroll_hvp="exact", compare=2,
):  # fmt: skip
    width: int = metapt.option(8, "Channels of the ResNet's first quarter", check=metapt.AT_LEAST_1, data=True)
    ft_share: float = metapt.option(1.0, "Share of the FT set that is seen before FT", check=metapt.SHARE)
    test_folds: str = metapt.option("10", "Folds of the test set, as 1,2,3", check=FOLDS, data=True)
    ft_records: int = metapt.option(0, "Records of the FT set; 0: all, at most 2500", check=metapt.AT_LEAST_0)
    augment: str = metapt.option("warp", "φ: warp; simclr (mask, noise); both", check=AUGMENT)
    init_scale: float = metapt.option(0.5, "s of the warp at the start (0.5: 34 ms rms)")
    scale_lr: float = metapt.option(3e-2, "Learning rate of s (Adam)", check=metapt.POSITIVE, learning=True)
    temperature: float = metapt.option(0.5, "Of SimCLR's loss", check=metapt.POSITIVE)

    def __post_init__(self):
        super().__post_init__()
        for name in ("batch_size", "meta_batch_size"):
            self.require(getattr(self, name) > 1, name, "2 or more: views are told apart")
        for name in ("init_scale", "scale_lr"):
            as_preset = getattr(self, name) in (getattr(type(self), name), PAPER[name])
            self.require(as_preset or self.augment != "simclr", name, "nothing: --augment simclr has no warp")


class ECG(metapt.Domain):
    """Parts: the records of --test-folds are the test set, all others are PT's. N of these, drawn by seed, are the FT set,
    80 % to train and 20 % to validate; an FT-set size counts both. PTB-XL's patients never cross folds.

    Each view passes the encoder by itself, with its own BatchNorm statistics. Signals are scaled by one mean and one
    standard deviation, of all of PT's samples and leads.
    """

    Settings = ECGSettings
    loss, score = staticmethod(F.binary_cross_entropy_with_logits), staticmethod(mean_auroc)
    presets: ClassVar = {"paper": PAPER}
    tests: ClassVar = {"test": "mean AUROC"}
    captions: ClassVar = {
        "warp_scale": "global scale s of the warp",
        "mask_share": "longest mask (share of the signal)",
    }

    def __init__(self, settings, device, data):
        super().__init__(settings, device, data)
        self.records = Records(data / "ecg" / "prepared", device)
        fold, folds = self.records.fold.cpu().numpy(), [int(f) for f in settings.test_folds.split(",")]
        of_test = np.isin(fold, folds)
        rest, test = np.flatnonzero(~of_test), np.flatnonzero(of_test)
        there = len(rest) >= 5 and np.isin(folds, fold).all()
        settings.require(there, "test_folds", f"some, but not all, of {sorted(set(fold.tolist()))}")
        wanted = settings.ft_records or min(len(rest), SETS[-1])
        settings.require(5 <= wanted <= len(rest), "ft_records", f"0, or 5 to the {len(rest)} that are not test's")
        pool = np.random.default_rng(settings.seed).permutation(rest)[:wanted]
        fifth = np.arange(wanted) % 5 == 4
        rows = {"pretrain": rest, "finetune": pool[~fifth], "validation": pool[fifth], "test": test}
        self.rows = {part: torch.from_numpy(rows).to(device) for part, rows in rows.items()}
        self.sizes = {part: len(rows) for part, rows in self.rows.items()}
        self.access = {p: max(1, round(settings.ft_share * self.sizes[p])) for p in ("finetune", "validation")}
        self.finetune_sizes = (*(n for n in SETS if n < wanted), wanted)
        self.mean, self.deviation = self.records.moments(self.rows["pretrain"])

    def data_digest(self):
        parts = [self.records.ecg_id[self.rows[part]].tolist() for part in ("pretrain", "test")]
        named = [self.records.leads, self.records.classes, self.records.hertz, self.records.length]
        return hashlib.sha256(json.dumps([*parts, named]).encode()).hexdigest()

    def finetune_limits(self):
        return 5, self.finetune_sizes[-1]

    def divide(self, examples):
        return examples - examples // 5, examples // 5

    def network(self):
        features = 8 * self.settings.width
        head = nn.Sequential(nn.Linear(features, features), nn.ReLU(), nn.Linear(features, features // 2))
        network = metapt.Network(ResNet18(len(self.records.leads), self.settings.width), head).to(self.device)
        # BatchNorm's statistics from data at once: an encoder without PT is then a baseline, not an overflow.
        update_bn([(self.inputs("pretrain", torch.randperm(self.sizes["pretrain"])[:256].to(self.device)),)], network)
        return network

    def head(self):
        return nn.Linear(8 * self.settings.width, len(self.records.classes)).to(self.device)

    def meta(self):
        scale = None if self.settings.augment == "simclr" else self.settings.init_scale
        strengths = self.settings.augment != "warp"
        return SignalAugmentation(len(self.records.leads), scale, strengths).to(self.device)

    def phi_rates(self, meta):
        rates = super().phi_rates(meta)
        return rates if meta.warp is None else rates | {"warp.scale": self.settings.scale_lr}

    def begin_episode(self, meta):
        if meta.warp is not None:
            meta.warp.expect()

    def pretrain_loss(self, network, meta, index, progress, live):
        signals, share = self.inputs("pretrain", index), getattr(index, "share", 1 / self.ranks.size)

        def loss(theta, phi):
            views = self.views(meta, phi, signals)
            a, b = (metapt.call(network, theta, view, train=True, live=live) for view in views)
            return nt_xent(a, b, self.settings.temperature, share, self.ranks)

        return loss

    def views(self, meta, phi, signals):
        if any(p.requires_grad for p in phi.values()):
            # Made again when the gradient arrives there: their graph would outweigh what the encoder keeps.
            return checkpoint(metapt.call, meta, phi, signals, train=True, use_reentrant=False)
        return metapt.call(meta, phi, signals, train=True)

    def inputs(self, part, index):
        return (self.records.millivolts(self.rows[part][index]) - self.mean) / self.deviation

    def targets(self, part, index):
        return self.records.labels[self.rows[part][index]].float()

    def measure(self, meta):
        found = {} if meta.warp is None else {"warp_scale": meta.warp.scale.item()}
        return found | {"mask_share": meta.mask.sigmoid().item(), "noise_share": 0.1 * meta.noise.exp().item()}

    def facts(self, meta):
        return {} if meta.warp is None else {"warp_rms_ms": self.warped(meta)[1].square().mean().sqrt().item()}

    @torch.no_grad()
    def warped(self, meta, draws: int = 16) -> tuple[Tensor, Tensor]:
        """Rows of up to 2,048 PT records [n], and warps of each in ms [draws, n, t]; drawn anew by the same seed."""
        index = torch.arange(self.sizes["pretrain"], device=self.device)[:2048]
        meta.warp.expect()
        with torch.random.fork_rng([self.device] * metapt.on_cuda(self)):
            torch.manual_seed(self.settings.seed)
            magnitudes = meta.train().warp.magnitudes(self.inputs("pretrain", index))
            warps = [meta.warp.displacements(magnitudes, self.records.length) for _ in range(draws)]
            return self.rows["pretrain"][index], torch.stack(warps) * (1000 / self.records.hertz)

    def figures(self, meta):
        if meta.warp is None:
            return {}
        rows, moved = self.warped(meta)
        strength = moved[0].square().mean(1).sqrt()
        one = (strength - strength.mean()).abs().argmin()  # its warp is nearest to the mean: not the most striking one
        each = moved.square().mean((0, 2)).sqrt().cpu().numpy()
        return {
            "warp.png": lambda figure: draw_warp(figure, self.records, rows[one], moved[0, one]),
            "magnitudes.png": lambda figure: draw_magnitudes(figure, self.records, rows, each),
        }


# BYOL


class Projecting(metapt.Network):
    """Encoder, and a head of projector and predictor; `projected`: without the predictor, as the target is."""

    def forward(self, signals: Tensor, features: bool = False, projected: bool = False) -> Tensor:
        return self.head[0](self.encoder(signals)) if projected else super().forward(signals, features=features)

    def followed(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.named_parameters() if not name.startswith("head.1.")}


def perceptron(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """BYOL's projector, and its predictor."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, outputs))


class BYOLSettings(ECGSettings, steps=100, warmup=30, lr=1e-3, augment="both"):
    momentum: float = metapt.option(0.996, "Of the target, a PT step", check=metapt.BELOW_1)

    def __post_init__(self):
        super().__post_init__()
        self.require(self.temperature == type(self).temperature, "temperature", "nothing: BYOL has none")


class BYOL(ECG):
    """The online network θ predicts from one view what the target makes of the other (Grill et al., equation 2).

    The target is a moving average of encoder and projector, in a buffer: so it is in checkpoints, and no part of θ. The
    stop-gradient is θ's alone: the target is a constant of L_PT and of its hypergradient, which so ignores that it will
    follow θ, but φ moves the views that both networks see.
    """

    divisible = False  # BatchNorm in the head needs two rows, and its statistics are the batch's
    Settings = BYOLSettings
    presets: ClassVar = {}

    def network(self):
        encoder, features = super().network().encoder, 8 * self.settings.width
        projector = perceptron(features, 2 * features, features // 2)
        predictor = perceptron(features // 2, 2 * features, features // 2)
        network = Projecting(encoder, nn.Sequential(projector, predictor)).to(self.device)
        network.target = nn.Buffer(nn.utils.parameters_to_vector(network.followed().values()).detach())
        return network

    def pretrain_loss(self, network, meta, index, progress, live):
        signals, online = self.inputs("pretrain", index), network.followed()
        if live:  # a PT step begins: the target follows the step before it
            network.target.lerp_(nn.utils.parameters_to_vector(online.values()).detach(), 1 - self.settings.momentum)
        parts = network.target.split([p.numel() for p in online.values()])
        target = {name: part.view_as(p) for part, (name, p) in zip(parts, online.items(), strict=True)}

        def loss(theta, phi):  # each view with its own BatchNorm statistics, in the target too
            views = self.views(meta, phi, signals)
            a, b = (metapt.call(network, theta, view, train=True, live=live) for view in views)
            x, y = (metapt.call(network, target, view, train=True, projected=True) for view in views)
            return 4 - 2 * (F.cosine_similarity(a, y) + F.cosine_similarity(b, x)).mean()

        return loss


def draw_warp(figure, records: Records, row: Tensor, moved: Tensor) -> None:
    """The middle half of a record before and after a warp `moved` [t] in ms, on the paper of an electrocardiograph."""
    from matplotlib.ticker import MultipleLocator

    before = records.millivolts(row[None])
    both = torch.cat([before, resample(before, moved[None] * (records.hertz / 1000))]).cpu().numpy()
    middle, half = slice(records.length // 4, -(records.length // 4)), -(-len(records.leads) // 2)
    seconds, both = np.arange(records.length)[middle] / records.hertz, both[:, :, middle]
    overlap = (both.max((0, 2))[1:] - both.min((0, 2))[:-1]).max()
    apart = max(2.5, math.ceil(2 * overlap) / 2)  # mV, so that no lead runs into the next
    figure.set_size_inches(11, 7)
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    for lead, name in enumerate(records.leads):
        axis, height = axes[lead // half], -apart * (lead % half)
        for values, colour, label in zip(both, ("0.25", "C3"), ("as recorded", "after the warp"), strict=True):
            axis.plot(seconds, values[lead] + height, color=colour, lw=0.9, label=label)
        axis.text(seconds[0] + 0.02, height + 0.55, name.replace("AV", "aV"), fontsize=9, weight="bold")
    for axis in axes:
        axis.set(xlabel="time (s)")
        axis.margins(x=0, y=0.02)
        axis.xaxis.set_major_locator(MultipleLocator(1))
        axis.xaxis.set_minor_locator(MultipleLocator(0.2))
        axis.yaxis.set_minor_locator(MultipleLocator(0.5))
        axis.set_yticks([-apart * i for i in range(half)], ["0"] * half)
        axis.grid(which="both", color="#f2c6c6", lw=0.4)
    axes[0].set_ylabel("mV; fine lines: 0.2 s by 0.5 mV")
    rms, (handles, labels) = moved.square().mean().sqrt(), axes[0].get_legend_handles_labels()
    title = f"PTB-XL record {records.ecg_id[row]}; this warp moves samples by {rms:.0f} ms (rms)"
    figure.legend(handles[:2], labels[:2], loc="outside upper center", ncols=2, fontsize=8, title=title)


def draw_magnitudes(figure, records: Records, rows: Tensor, each: np.ndarray) -> None:
    """How far φ warps each record (ms, rms over draws and time), by class: boxes are quartiles, whiskers 5 % and 95 %."""
    labels = records.labels[rows].cpu().numpy() > 0
    groups = dict(zip([*records.classes, "none"], [*labels.T, ~labels.any(1)], strict=True))
    groups = {f"{name} ({chosen.sum()})": each[chosen] for name, chosen in groups.items() if chosen.any()}
    axis = figure.subplots()
    axis.boxplot(groups.values(), orientation="horizontal", whis=(5, 95), flierprops={"ms": 2, "mec": "0.6"})
    axis.set_yticks(range(1, len(groups) + 1), list(groups))
    axis.set(xlabel="displacement by the warp (ms, rms)", xlim=(0, None))
