"""The ECG domain: its records, the warp, the encoder and SimCLR's loss beside slow formulations,
its commands.
"""

import json
import math
import shutil
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import LABELS, LEADS, beat
from matplotlib.figure import Figure
from tools import (
    ROOT,
    SHARED,
    main_in,
    metapt_in,
    options,
    outcome,
    pipeline_of,
    refused,
    spy,
    strict_json,
    summary_of,
)
from torch import nn

import metapt
from bench.costs import counting
from bench.domains import ecg

MINI = SHARED / "ptbxl-mini"  # 500 real records
TINY = {
    "width": 1,
    "steps": 12,
    "warmup": 4,
    "meta_every": 4,
    "batch_size": 16,
    "meta_batch_size": 16,
    "compare": 1,
    "sizes": "10,40",
    "measure_steps": 3,
}


def millivolts(ecg_id: int) -> np.ndarray:
    """A record, [1000, 12]."""
    return beat(ecg_id) / 1000


def write(folder: Path, about: dict, arrays: dict) -> None:
    """A prepared folder with these arrays."""
    folder.mkdir(parents=True, exist_ok=True)
    described = {}
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", values)
        described[name] = {
            "dtype": values.dtype.str,
            "shape": list(values.shape),
            "sha256": "0" * 64,
        }
    (folder / "about.json").write_text(json.dumps({**about, "arrays": described}))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder in which `ecg` can run: 60 records of ten folds, the labels of `LABELS` in turn."""
    ids = np.arange(1, 61)
    signals = np.stack([millivolts(ecg_id) for ecg_id in ids.tolist()])
    # Another gain, per mV, and another baseline for each lead.
    gain = np.tile(np.float32([1000, 2000, 4000] * 4), (60, 1))
    baseline = np.tile(np.float32(range(-30, 90, 10)), (60, 1))
    about = {
        "format": "metapt ecgs 2",
        "source": "",
        "licence": "",
        "records": 60,
        "left_out": [],
        "leads": list(LEADS),
        "hertz": 100,
        "samples": 1000,
        "classes": ["NORM", "MI", "STTC", "CD", "HYP"],
    }
    arrays = {
        "samples": (signals * gain[:, None] + baseline[:, None]).round().astype(np.int16),
        "ecg_id": ids,
        "patient": 1000 + ids,
        "fold": ids // 5 % 10 + 1,
        "labels": np.uint8(LABELS)[ids % 5],
        "gain": gain,
        "baseline": baseline,
        "sums": np.stack([signals.sum((1, 2)), (signals**2).sum((1, 2))], 1),
    }
    folder = tmp_path_factory.mktemp("home")
    write(folder / "data" / "ecg" / "prepared", about, arrays)
    return folder


def make(home: Path, kind=ecg.ECG, **given) -> ecg.ECG:
    return kind(kind.Settings(**{**TINY, **given}), torch.device("cpu"), home / "data")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# ------------------------------------------------------------------------------------------------
# Records


def test_records_come_out_as_they_went_in(home):
    records = ecg.Records(home / "data" / "ecg" / "prepared", torch.device("cpu"))
    rows = torch.tensor([3, 59, 0])
    expected = np.stack([millivolts(ecg_id) for ecg_id in (4, 60, 1)])
    signals = records.millivolts(rows)
    np.testing.assert_allclose(signals, expected.transpose(0, 2, 1), rtol=0, atol=1e-6)
    mean, deviation = records.moments(rows)
    assert mean == pytest.approx(expected.mean(), abs=1e-9)
    assert deviation == pytest.approx(expected.std(), rel=1e-9)
    assert records.labels[:5].tolist() == [*LABELS[1:], LABELS[0]]
    assert (records.leads, records.hertz, records.length) == (list(LEADS), 100, 1000)
    assert records.samples.dtype == torch.int16  # not converted as a whole


def spoil(folder: Path, change) -> None:
    """Changes arrays, and about.json so that it says what the arrays then are.

    Only the content can tell.
    """
    about = json.loads((folder / "about.json").read_text())
    arrays = {name: np.load(folder / f"{name}.npy") for name in about["arrays"]}
    change(about, arrays)
    write(folder, about, arrays)


FAULTS = {
    "another format": lambda about, arrays: about.update(format="metapt ecgs 1"),
    "fewer leads": lambda about, arrays: about.update(leads=about["leads"][:11]),
    "leads without names": lambda about, arrays: about.update(leads=12),
    "fewer classes": lambda about, arrays: about.update(classes=["NORM"]),
    "fewer records": lambda about, arrays: about.update(records=59),
    "another length": lambda about, arrays: about.update(samples=999),
    "a rate of 0": lambda about, arrays: about.update(hertz=0),
    "no rate": lambda about, arrays: about.pop("hertz"),
    "no sums": lambda about, arrays: arrays.pop("sums"),
    "another shape": lambda about, arrays: arrays.update(patient=arrays["patient"][:, None]),
    "a gain of 0": lambda about, arrays: arrays.update(gain=0 * arrays["gain"]),
    "a label of 2": lambda about, arrays: arrays.update(labels=2 * arrays["labels"]),
    "a label below 0": lambda about, arrays: arrays.update(
        labels=-arrays["labels"].astype(np.int8)
    ),
    "a fold below 0": lambda about, arrays: arrays.update(fold=-arrays["fold"]),
    "an infinite baseline": lambda about, arrays: arrays.update(
        baseline=arrays["baseline"] + np.inf
    ),
    "no variance": lambda about, arrays: arrays.update(sums=arrays["sums"] * [1, 0]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_prepared_folder_that_cannot_be_is_refused(home, tmp_path, fault):
    shutil.copytree(home / "data", tmp_path / "data")
    spoil(tmp_path / "data" / "ecg" / "prepared", FAULTS[fault])
    assert "prepare" in refused(tmp_path, "pretrain", "ecg", "--width=1", "--steps=1")


def remove(path: Path) -> None:
    path.unlink()


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("tear", [remove, shorten])
@pytest.mark.parametrize("name", ["about.json", "samples.npy", "labels.npy"])
def test_a_prepared_folder_that_is_torn_is_refused(home, tmp_path, name, tear):
    shutil.copytree(home / "data", tmp_path / "data")
    tear(tmp_path / "data" / "ecg" / "prepared" / name)
    said = refused(tmp_path, "pretrain", "ecg", "--width=1", "--steps=1")
    assert f"ecg/prepared/{name}" in said


def test_without_data_the_command_that_fetches_them_is_named(tmp_path):
    assert "download ecg" in refused(tmp_path, "meta", "ecg")


@pytest.mark.skipif(not MINI.exists(), reason="the real records are not here")
def test_the_real_records_are_those_of_wfdb(tmp_path):
    wfdb = pytest.importorskip("wfdb")
    done = metapt_in(tmp_path, "download", "ecg", "--from", MINI)
    assert done.returncode == 0, done.stderr
    records = ecg.Records(tmp_path / "data" / "ecg" / "prepared", torch.device("cpu"))
    physical = wfdb.rdrecord(str(MINI / "records100" / "00000" / "00042_lr")).p_signal.T
    signal = records.millivolts(torch.tensor([41]))[0].double()
    torch.testing.assert_close(signal, torch.from_numpy(physical))
    signals = records.millivolts(torch.arange(500))
    moments = (signals.mean().item(), signals.std().item())
    assert records.moments(torch.arange(500)) == pytest.approx(moments, rel=1e-4)
    domain = make(tmp_path, test_folds="9,10")
    patients = {part: set(records.patient[rows].tolist()) for part, rows in domain.rows.items()}
    assert not patients["pretrain"] & patients["test"]


# ------------------------------------------------------------------------------------------------
# The loss, the metric, the encoder and the views beside slow formulations


def test_nt_xent_is_equation_1():
    a, b = torch.randn(2, 7, 5, dtype=torch.float64)
    z = torch.cat([a, b])

    def similarity(i, j):
        return math.exp(float(z[i] @ z[j] / z[i].norm() / z[j].norm()) / 0.3)

    total = 0.0
    for i in range(14):
        others = [similarity(i, k) for k in range(14) if k != i]
        total -= math.log(similarity(i, (i + 7) % 14) / sum(others)) / 14
    assert ecg.nt_xent(a, b, 0.3).item() == pytest.approx(total, rel=1e-12)


def test_mean_auroc_is_that_of_pairs():
    scores = torch.randint(0, 5, (30, 4)).float()
    labels = (torch.rand(30, 4) < 0.4).float()
    labels[:, 1] = 0  # a class without a positive
    labels[:, 3] = 1  # one without a negative
    areas = []
    for task in (0, 2):
        above = []
        for positive in scores[labels[:, task] > 0, task]:
            for negative in scores[labels[:, task] == 0, task]:
                above.append(float(positive > negative) + 0.5 * float(positive == negative))
        areas.append(np.mean(above))
    assert ecg.mean_auroc(scores, labels) == pytest.approx(np.mean(areas), rel=1e-12)
    assert math.isnan(ecg.mean_auroc(scores, torch.ones(30, 4)))


def plain_resnet(model: ecg.ResNet18, signals: torch.Tensor) -> torch.Tensor:
    """Of the same parameters, for [n, leads, t]; strides and shortcuts as published."""

    def convolved(x, convolution, stride, norm):
        weight = convolution.weight[:, :, 0]
        x = F.conv1d(x, weight, stride=stride, padding=weight.shape[2] // 2)
        statistics = (norm.running_mean.clone(), norm.running_var.clone())
        return F.batch_norm(x, *statistics, norm.weight, norm.bias, model.training)

    x = F.pad(signals, (0, -signals.shape[2] % 64))
    x = convolved(x, model.stem[0], 2, model.stem[1]).relu()
    x = F.max_pool1d(x, 3, 2, 1)
    for i, block in enumerate(model.blocks):
        stride = 2 if i in (2, 4, 6) else 1
        hidden = convolved(x, block.first, stride, block.norm1).relu()
        hidden = convolved(hidden, block.second, 1, block.norm2)
        if stride == 2:
            x = convolved(x, block.shortcut[0], 2, block.shortcut[1])
        x = (hidden + x).relu()
    return x.mean(2)


@pytest.mark.parametrize("training", [True, False])
def test_the_encoder_is_that_of_conv1d_in_value_and_gradient(training):
    model = ecg.ResNet18(3, 2).double()
    x = torch.randn(4, 3, 100, dtype=torch.float64)
    for p in model.parameters():
        nn.init.normal_(p, 0.3, 0.5)
    model.train()(2 * x)  # statistics that are not those of the start
    features = model.train(training)(x)
    expected = plain_resnet(model, x)
    torch.testing.assert_close(features, expected, rtol=1e-9, atol=1e-9)
    widths = [block.second.out_channels for block in model.blocks]
    assert widths == [2, 2, 4, 4, 8, 8, 16, 16]
    weights = torch.randn_like(features)
    gradients = [
        torch.autograd.grad((out * weights).sum(), list(model.parameters()))
        for out in (features, expected)
    ]
    largest = max(g.abs().max() for g in gradients[0]).item()
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9 * largest)


def slow_flow(velocity: np.ndarray, squarings: int) -> np.ndarray:
    grid = np.arange(len(velocity), dtype=float)
    place = grid + velocity / 2**squarings
    for _ in range(squarings):
        # Beyond the borders the displacement is that of the border.
        inside = np.clip(place, 0, len(velocity) - 1)
        place = place + np.interp(inside, grid, place - grid)
    return place - grid


def slow_quarter(noise: np.ndarray) -> np.ndarray:
    pairs = [(noise[4 * i + 1] + noise[4 * i + 2]) / 2 for i in range(len(noise) // 4)]
    return np.array(pairs) / 4


def slow_warp(noise: np.ndarray, speed: float, steepest: float) -> np.ndarray:
    """From white noise [t] to displacements [t]."""
    n = len(noise) // 4
    squarings = 5
    while steepest / 2**squarings > 0.5:
        squarings += 1
    moved = 4 * slow_flow(slow_quarter(noise) * speed, squarings)
    full = np.interp((np.arange(len(noise)) + 0.5) / 4 - 0.5, np.arange(n), moved)
    padded = np.pad(full, 12, mode="edge")
    taps = np.exp(-(np.arange(-12, 13) ** 2) / 288)
    return np.array([padded[i : i + 25] @ (taps / taps.sum()) for i in range(len(noise))])


@pytest.mark.parametrize("scale", [0.1, 0.5, 4.0])
def test_the_warp_is_that_of_loops(scale):
    warp = ecg.WarpAugmentation(3, scale).double()
    magnitudes = torch.tensor([0.3, 1.9], dtype=torch.float64)
    views = torch.randn(2, 3, 200, dtype=torch.float64)
    torch.manual_seed(5)
    warped = warp(views, magnitudes).detach()
    torch.manual_seed(5)
    noise = torch.randn(2, 1, 200, dtype=torch.float64).numpy()
    speeds = [100 * warp.scale.item() ** 2 * magnitude for magnitude in magnitudes.tolist()]
    steps = [np.diff(slow_quarter(noise[i, 0]) * speeds[i]) for i in range(2)]
    steepest = max(np.abs(step).max() for step in steps)
    for i in range(2):
        place = np.arange(200) + slow_warp(noise[i, 0], speeds[i], steepest)
        place = np.clip(place, 0, 199)
        for lead in range(3):
            expected = np.interp(place, np.arange(200), views[i, lead].numpy())
            np.testing.assert_allclose(warped[i, lead].numpy(), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e38])
def test_a_signal_that_is_no_number_warps_to_none_and_leaves_the_others(bad):
    """Without an error: whatever the loss becomes is for its caller to refuse."""
    warp = ecg.WarpAugmentation(3, 0.5)
    views = torch.randn(2, 3, 200)
    torch.manual_seed(5)
    expected = warp(views, torch.tensor([0.3, 1.0]))[0]
    torch.manual_seed(5)
    found = warp(views, torch.tensor([0.3, bad]))[0]
    if math.isfinite(bad):
        # It is so steep that the others get more squarings as well.
        assert found.isfinite().all()
    else:
        assert torch.equal(found, expected)


def steps_after(scale: float, magnitudes: torch.Tensor, kind=torch.float64) -> torch.Tensor:
    """How far neighbouring samples are apart after a warp, [n, 999]."""
    warp = ecg.WarpAugmentation(12, scale).to(kind)
    moved = warp.displacements(magnitudes.to(kind), 1000).detach()
    assert moved.isfinite().all()
    return (torch.arange(1000, dtype=kind) + moved).diff(dim=1)


@pytest.mark.parametrize("scale", [0.0, 0.1, 0.5, 1.0, 4.0, 30.0, 1000.0, -2.0])
def test_samples_keep_their_order_whatever_phi_is(scale):
    # Below 0 by rounding, where thousands of samples are pressed into one.
    assert steps_after(scale, torch.linspace(0, 2, 200)).min() >= -1e-9
    assert steps_after(scale, torch.linspace(0, 2, 50), torch.float32).min() >= -1e-3


def test_with_the_published_number_of_squarings_they_do_not(monkeypatch):
    # Five squarings, whatever the velocity is.
    monkeypatch.setattr(ecg.math, "ceil", lambda x: 4)
    share = (steps_after(4.0, torch.ones(200)) > 0).double().mean()
    assert 0.55 < share < 0.64  # bench/docs/electrocardiograms.md: 60 %
    assert (steps_after(0.5, torch.ones(200)) > 0).all()


def test_the_start_is_as_gentle_as_its_help_says(home):
    domain = make(home)
    assert 25 < domain.facts(domain.meta())["warp_rms_ms"] < 45
    assert "0.5: 34 ms rms" in metapt.knobs_of(ecg.ECGSettings)["init_scale"].help


def test_masks_and_noise_are_as_published():
    augment = ecg.SignalAugmentation(12, None, False)
    masked = augment.masked(torch.ones(400, 12, 1000))
    zeros = (masked == 0).sum(2)
    assert zeros.max() <= 500
    assert zeros.double().mean() == pytest.approx(250, abs=5)
    assert zeros.double().std() == pytest.approx(500 / math.sqrt(12), rel=0.05)
    assert (masked == 0).int().diff(dim=2).abs().sum(2).max() <= 2  # one stretch
    assert ((masked > 0) & (masked < 1)).sum(2).max() <= 2
    assert len({tuple(row) for row in zeros[:5].tolist()}) == 5
    assert (zeros[:, 0] != zeros[:, 1]).any()  # each lead its own

    signals = 3 * torch.randn(400, 12, 1000)
    augment.mask.fill_(-1e9)  # no masks
    a, b = augment(signals)
    noise = (a - signals).std(2) / signals.std(2)
    assert noise.max() <= 0.11
    assert noise.mean() == pytest.approx(0.05, rel=0.05)
    assert not torch.equal(a, b)


def test_the_two_views_are_warped_apart(home):
    domain = make(home, init_scale=2.0)
    meta = domain.meta()
    # Nothing but the warp.
    meta.mask.data.fill_(-50.0)
    meta.noise.data.fill_(-50.0)
    a, b = meta.train()(domain.inputs("pretrain", torch.arange(8)))
    assert ((a - b).abs().amax((1, 2)) > 0.1).all()


def test_each_view_has_its_own_statistics_and_ft_those_of_the_network(home):
    domain = make(home)
    network = domain.network()
    meta = domain.meta()
    head = domain.head()
    theta = dict(network.named_parameters())
    phi = dict(meta.named_parameters())
    psi = dict(head.named_parameters())
    index = torch.arange(16)
    torch.manual_seed(3)
    value = domain.pretrain_loss(network, meta, index, 1.0, live=False)(theta, phi)
    torch.manual_seed(3)
    views = metapt.call(meta, phi, domain.inputs("pretrain", index), train=True)
    network.train()
    expected = ecg.nt_xent(network(views[0]), network(views[1]), 0.5)
    torch.testing.assert_close(value, expected)
    together = ecg.nt_xent(*network(torch.cat(views)).chunk(2), 0.5)
    assert not torch.allclose(together, expected, rtol=1e-4)

    value = domain.finetune_loss(network, head, "finetune", index)(theta, psi)
    outputs = head(network.eval()(domain.inputs("finetune", index), features=True))
    targets = domain.targets("finetune", index)
    torch.testing.assert_close(value, F.binary_cross_entropy_with_logits(outputs, targets))


# ------------------------------------------------------------------------------------------------
# BYOL


def plain_perceptron(layers: nn.Sequential, rows: torch.Tensor) -> torch.Tensor:
    first, norm, _, last = layers
    hidden = torch.stack([first.weight @ row + first.bias for row in rows])
    centred = hidden - hidden.mean(0)
    standard = centred / (centred.square().mean(0) + norm.eps).sqrt()
    hidden = (standard * norm.weight + norm.bias).clamp(min=0)
    return torch.stack([last.weight @ row + last.bias for row in hidden])


def test_byol_is_equation_2_of_both_orders(home, monkeypatch):
    domain = make(home, ecg.BYOL)
    network = domain.network().double()
    meta = domain.meta().double()
    other = deepcopy(network)
    followed = (*other.encoder.parameters(), *other.head[0].parameters())
    for p in followed:
        nn.init.normal_(p, 0.1, 0.3)
    network.target.copy_(torch.cat([p.detach().flatten() for p in followed]))
    signals = domain.inputs("pretrain", torch.arange(6)).double()
    monkeypatch.setattr(domain, "inputs", lambda part, index: signals)
    theta = metapt.detached(network)
    phi = metapt.detached(meta)
    torch.manual_seed(3)
    value = domain.pretrain_loss(network, meta, None, 1.0, live=False)(theta, phi)
    torch.manual_seed(3)
    first, second = metapt.call(meta, phi, signals, train=True)
    total = 0.0
    for mine, theirs in ((first, second), (second, first)):
        projected = plain_perceptron(network.head[0], plain_resnet(network.encoder.train(), mine))
        predicted = plain_perceptron(network.head[1], projected)
        aims = plain_perceptron(other.head[0], plain_resnet(other.encoder.train(), theirs))
        for q, z in zip(predicted, aims, strict=True):
            total += (q / q.norm() - z / z.norm()).square().sum().item() / 6
    assert value.item() == pytest.approx(total, rel=1e-9)
    assert value.requires_grad is False


def test_the_target_follows_the_online_network_a_step_behind_and_is_no_part_of_theta(home):
    run = metapt.Training(make(home, ecg.BYOL, momentum=0.8, lr=1e-2), True)
    network = run.network

    def online():
        followed = (*network.encoder.parameters(), *network.head[0].parameters())
        return torch.cat([p.detach().flatten() for p in followed])

    assert "target" in network.state_dict()
    assert "target" not in dict(network.named_parameters())
    target = online()
    norm = network.encoder.stem[1]
    batches = norm.num_batches_tracked.item()
    for _ in range(4):
        target = 0.8 * target + 0.2 * online()
        run.pretrain_step()
        torch.testing.assert_close(network.target, target)
        assert not torch.allclose(network.target, online(), atol=1e-3)
    # Two views a step: the target's passes change no statistics.
    assert norm.num_batches_tracked == batches + 2 * 4
    before = {name: b.clone() for name, b in network.named_buffers()}
    run.meta_step()
    assert all(torch.equal(b, before[name]) for name, b in network.named_buffers())


def test_the_target_runs_in_the_precision_of_the_online_network(home):
    """Two views in both networks; then the head beside PT."""
    run = metapt.Training(make(home, ecg.BYOL, precision="bf16"), True)
    dtypes = []
    layer = run.network.encoder.stem[0]
    layer.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    run.pretrain_step()
    assert dtypes == [torch.bfloat16] * 5


# ------------------------------------------------------------------------------------------------
# Gradients, and what a meta step costs


def hold_data(monkeypatch, domain, examples: int) -> None:
    """The first examples of each part in float64, whichever ones the domain is asked for."""
    rows = torch.arange(examples)
    inputs = {}
    targets = {}
    for part in ("pretrain", "finetune", "validation"):
        inputs[part] = domain.inputs(part, rows).double()
        targets[part] = domain.targets(part, rows).double()
    monkeypatch.setattr(domain, "inputs", lambda part, index: inputs[part])
    monkeypatch.setattr(domain, "targets", lambda part, index: targets[part])


@pytest.mark.parametrize("hvp", ["exact", "finite"])
@pytest.mark.parametrize(
    ("kind", "augment"),
    [(ecg.ECG, "warp"), (ecg.ECG, "simclr"), (ecg.ECG, "both"), (ecg.BYOL, "both")],
)
def test_the_hypergradient_of_the_domain_is_that_of_differences(
    home, monkeypatch, kind, augment, hvp
):
    """v, and the mixed product, in float64, against central differences of L_V after FT and of
    L_PT's gradient.

    With tiny steps: at a longer one some ReLU of thousands changes sides, and the second derivative
    that autograd knows nothing of is in the difference.
    """
    step = 1e-8
    domain = make(home, kind, augment=augment)
    network = domain.network().double()
    head = domain.head().double()
    meta = domain.meta().double()
    if kind is ecg.BYOL:  # The target is held where the online network is not.
        network.target.mul_(1.1).add_(0.1 * torch.randn_like(network.target))
    theta = metapt.detached(network)
    psi = metapt.detached(head)
    phi = metapt.detached(meta)
    hold_data(monkeypatch, domain, 10)
    pretrain = domain.pretrain_loss(network, meta, None, 1.0, live=False)
    finetune = domain.finetune_loss(network, head, "finetune", None)
    validation = domain.finetune_loss(network, head, "validation", None)
    torch.manual_seed(4)
    result = metapt.hypergradient(
        pretrain,
        finetune,
        validation,
        theta,
        psi,
        phi,
        unroll=metapt.Unroll(1, 0.1),
        solver=metapt.Solver("identity", hvp=hvp, step=step),
    )

    def gradient(loss, at):
        torch.manual_seed(4)
        point = {name: p.clone().requires_grad_() for name, p in at.items()}
        return metapt.gradient(loss(point), point)

    def after_finetuning(theta):
        slope = gradient(lambda psi: finetune(theta, psi), psi)
        return validation(theta, {name: p - 0.1 * slope[name] for name, p in psi.items()}).item()

    direction = {name: torch.randn_like(p) for name, p in theta.items()}
    ends = [
        after_finetuning({name: p + sign * direction[name] for name, p in theta.items()})
        for sign in (step, -step)
    ]
    along = sum((result.q[name] * direction[name]).sum() for name in theta).item()
    assert along == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-3)

    names = {"warp.scale", "mask", "noise", "warp.last.weight", "warp.layers.1.0.weight"} & set(phi)
    assert len(names) == {"warp": 3, "simclr": 2, "both": 5}[augment]
    for name in names:
        along = torch.randn_like(phi[name])
        moved = [{**phi, name: phi[name] + sign * along} for sign in (step, -step)]
        ahead, behind = [gradient(lambda theta, p=p: pretrain(theta, p), theta) for p in moved]
        products = [(result.q[key] * (ahead[key] - behind[key])).sum() for key in theta]
        mixed = sum(products).item() / (2 * step)
        assert (result.phi[name] * along).sum().item() == pytest.approx(-mixed, rel=2e-3), name


def test_with_the_target_held_the_hypergradient_is_that_of_the_pipeline(home, monkeypatch):
    """PT to its end under φ, with a pull to where it began so that there is one; FT; L_V: against
    central differences.

    The networks are smooth here.
    """
    step = 1e-5
    domain = make(home, ecg.BYOL, augment="simclr")
    encoder = nn.Sequential(nn.AvgPool1d(50), nn.Flatten(), nn.Linear(240, 8), nn.Tanh())
    predictor = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))
    nn.init.normal_(predictor[2].weight)  # No prediction is near 0.
    network = ecg.Projecting(encoder, nn.Sequential(nn.Linear(8, 4), predictor)).double()
    ecg.add_target(network, network.followed())
    head = domain.head().double()
    meta = domain.meta().double()
    network.target.add_(0.1 * torch.randn_like(network.target))
    hold_data(monkeypatch, domain, 8)
    begin = metapt.detached(network)
    psi = metapt.detached(head)
    phi = metapt.detached(meta)
    free = domain.pretrain_loss(network, meta, None, 1.0, live=False)
    finetune = domain.finetune_loss(network, head, "finetune", None)
    validation = domain.finetune_loss(network, head, "validation", None)
    pretrain, pretrained, pipeline = pipeline_of(
        free, finetune, validation, begin, psi, pull=100.0, steps=60
    )
    before = network.target.clone()
    theta = pretrained(phi)
    torch.manual_seed(4)
    result = metapt.hypergradient(
        pretrain,
        finetune,
        validation,
        theta,
        psi,
        phi,
        unroll=metapt.Unroll(1, 0.1),
        solver=metapt.Solver("cg", terms=30),
    )
    for name in ("mask", "noise"):
        ahead, behind = [pipeline({**phi, name: phi[name] + by}) for by in (step, -step)]
        expected = (ahead - behind) / (2 * step)
        assert result.phi[name].item() == pytest.approx(expected, rel=1e-3), name
    assert torch.equal(network.target, before)


def test_at_the_published_width_the_fused_optimiser_reads_gradients_as_they_lie(home):
    """Weights of convolutions with channels last have gradients of odd strides, which fused Adam
    takes as they are.
    """
    run = metapt.Training(make(home, width=32, batch_size=4, unroll_batch_size=4), True)
    assert run.optimizer.defaults["fused"]
    plain = deepcopy(run.network)
    optimizer = torch.optim.Adam(plain.parameters(), lr=run.settings.lr, foreach=False)
    for _ in range(2):
        run.pretrain_step()
        for p, q in zip(run.network.parameters(), plain.parameters(), strict=True):
            q.grad = p.grad.clone(memory_format=torch.contiguous_format)
        optimizer.step()
    expected = metapt.detached(plain)
    torch.testing.assert_close(metapt.detached(run.network), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("kind", "most_flops", "most_bytes"), [(ecg.ECG, 2.1, 1.1), (ecg.BYOL, 2.5, 2.1)]
)
def test_a_meta_step_costs_what_the_page_says(home, kind, most_flops, most_bytes):
    """At the published width, all batches equal: FLOPs and bytes, in PT steps."""
    batch_sizes = ("batch_size", "meta_batch_size", "unroll_batch_size", "validation_batch_size")
    domain = make(home, kind, width=32, **dict.fromkeys(batch_sizes, 8))
    run = metapt.Training(domain, True)
    flops = counting.flops(run.meta_step) / counting.flops(run.pretrain_step)
    assert 0.9 * most_flops <= flops <= most_flops  # 2.04 and 2.47 there
    of_pretraining = counting.peak(run.pretrain_step)
    assert counting.peak(run.meta_step) <= most_bytes * of_pretraining

    def make_views():
        signals = domain.inputs("pretrain", torch.arange(8))
        sum(view.sum() for view in run.meta(signals)).backward()

    # What is made again in the backward pass, when the encoder's part is gone, is less.
    assert counting.peak(make_views) < of_pretraining


# ------------------------------------------------------------------------------------------------
# Parts, settings and what Algorithm 1 does with them


def test_parts_are_disjoint_and_sets_divided_four_to_one(home):
    domain = make(home, test_folds="2,3", ft_records=40)
    smaller = make(home, test_folds="2,3", ft_records=20)
    fold = domain.records.fold
    assert set(fold[domain.rows["test"]].tolist()) == {2, 3}
    assert not set(fold[domain.rows["pretrain"]].tolist()) & {2, 3}
    assert domain.sizes == {"pretrain": 44, "finetune": 32, "validation": 8, "test": 16}
    pool = domain.rows["finetune"].tolist() + domain.rows["validation"].tolist()
    assert len(set(pool)) == 40
    assert set(pool) <= set(domain.rows["pretrain"].tolist())
    assert set(smaller.rows["finetune"].tolist()) <= set(domain.rows["finetune"].tolist())
    assert [domain.finetune_split(n) for n in (5, 40, 100)] == [(4, 1), (32, 8), (80, 20)]
    assert (domain.finetune_limits(), domain.finetune_sizes) == ((5, 40), (40,))
    signals = domain.records.millivolts(domain.rows["pretrain"])
    moments = (signals.mean().item(), signals.std().item())
    assert (domain.mean, domain.deviation) == pytest.approx(moments, rel=1e-4)


def asked_of(monkeypatch, domain: ecg.ECG) -> dict[str, set]:
    """Which examples of which part a domain is asked for from now on."""
    asked = {}

    def note(part, index):
        asked.setdefault(part, set()).update(index.tolist())

    spy(monkeypatch, domain, "inputs", note)
    return asked


def test_ft_reads_no_more_than_its_share_of_both_parts(home, monkeypatch):
    domain = make(home)
    network = domain.network()
    asked = asked_of(monkeypatch, domain)
    metapt.finetune(domain, network, 20, 0)
    counts = {part: len(rows) for part, rows in asked.items()}
    assert counts == {"finetune": 16, "validation": 4, "test": 5}


def test_meta_with_half_of_the_ft_set_never_reads_the_other_half(home, monkeypatch):
    domain = make(home, ft_share=0.5, ft_records=40)
    assert domain.access == {"finetune": 16, "validation": 4}
    run = metapt.Training(domain, True)
    asked = asked_of(monkeypatch, domain)
    run.run()
    assert (asked["finetune"], asked["validation"]) == (set(range(16)), set(range(4)))
    assert "test" not in asked


def test_views_are_compared_over_the_whole_batch_which_ranks_are_told():
    """A mean over the halves of a batch would be another loss: no process may have one of them."""
    a, b = torch.randn(2, 8, 5, dtype=torch.float64)
    halves = [ecg.nt_xent(a[half], b[half], 0.5) for half in (slice(4), slice(4, 8))]
    assert abs(sum(halves) / 2 - ecg.nt_xent(a, b, 0.5)) > 0.1
    assert (ecg.ECG.mean_over_examples, ecg.BYOL.mean_over_examples) == (False, False)


def test_rows_are_numbers_on_the_cpu(home):
    for rows in make(home).rows.values():
        assert (rows.dtype, rows.device.type) == (torch.int64, "cpu")


def test_the_global_scale_has_a_rate_of_its_own(home):
    run = metapt.Training(make(home, scale_lr=0.25, meta_lr=1e-3, warmup=0, steps=4), True)
    before = deepcopy(metapt.detached(run.meta))
    run.run()
    after = metapt.detached(run.meta)
    moved = {name: (p - before[name]).abs().max().item() for name, p in after.items()}
    assert moved["warp.scale"] == pytest.approx(0.25, rel=1e-2)  # Adam's first step
    assert moved["warp.last.weight"] == pytest.approx(1e-3, rel=1e-2)


def test_the_paper_preset_is_the_published_protocol():
    settings = metapt.make_settings(ecg.ECG, {}, "paper")
    expected = {
        "augment": "warp",
        "width": 32,
        "temperature": 0.5,
        "init_scale": 4.0,
        "test_folds": "10",
        "steps": 3800,
        "warmup_steps": 76,
        "cosine": False,
        "batch_size": 256,
        "lr": 1e-4,
        "unroll_batch_size": 256,
        "unroll_lr": 1e-4,
        "unroll_steps": 1,
        "unroll_hvp": "",
        "validation_batch_size": 256,
        "meta_every": 10,
        "meta_batch_size": 256,
        "meta_lr": 1e-4,
        "scale_lr": 1.0,
        "average": 0.0,
        "solver": "neumann",
        "terms": 1,
        "alpha": 1e-4,
        "hvp": "exact",
        "measure_scope": "all",
        "measure_lr": None,
        "measure_epochs": 200,
        "measure_batch_size": 64,
    }
    assert {name: getattr(settings, name) for name in expected} == expected
    # The paper's baseline, too.
    assert metapt.make_settings(ecg.ECG, {"augment": "simclr"}, "paper").augment == "simclr"


# ------------------------------------------------------------------------------------------------
# Figures


def drawn(domain: ecg.ECG) -> dict[str, Figure]:
    """The figures of φ as it begins."""
    figures = {}
    for name, draw in domain.figures(domain.meta()).items():
        figures[name] = Figure()
        draw(figures[name])
        figures[name].canvas.draw()
    return figures


def test_the_figure_of_the_warp_has_a_panel_a_lead(home):
    figure = drawn(make(home, augment="both"))["warp.png"]
    (legend,) = figure.legends
    ecg_id = int(legend.get_title().get_text().split()[2].rstrip(";"))
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["as recorded", "after the warp"]
    panels = {panel.get_ylabel(): panel for panel in figure.axes}
    assert set(panels) == {name.replace("AV", "aV") for name in LEADS}
    assert all(panel.get_visible() for panel in figure.axes)
    for lead, name in enumerate(LEADS):
        panel = panels[name.replace("AV", "aV")]
        recorded, warped = panel.lines
        expected = millivolts(ecg_id)[250:750, lead]
        np.testing.assert_allclose(recorded.get_ydata(), expected, atol=1e-5)
        np.testing.assert_allclose(recorded.get_xdata(), np.arange(250, 750) / 100)
        assert not np.allclose(warped.get_ydata(), expected, atol=1e-2)
        # Down the left column, then down the right one.
        place = panel.get_subplotspec()
        assert (place.rowspan.start, place.colspan.start) == (lead % 6, lead // 6)


def test_an_odd_number_of_leads_leaves_a_panel_empty(home):
    records = deepcopy(make(home).records)
    records.leads = records.leads[:3]
    records.samples = records.samples[..., :3]
    records.baseline = records.baseline[:, :3]
    records.gain = records.gain[:, :3]
    figure = Figure()
    ecg.draw_warp(figure, records, torch.tensor(0), torch.zeros(1000))
    shown = [panel.get_ylabel() for panel in figure.axes if panel.get_visible()]
    assert (sorted(shown), len(figure.axes)) == (["I", "II", "III"], 4)


def test_the_figure_of_magnitudes_shows_every_class(home):
    domain = make(home, augment="both")
    (axis,) = drawn(domain)["magnitudes.png"].axes
    names = [tick.get_text() for tick in axis.get_yticklabels()]
    assert names == ["NORM (11)", "MI (11)", "STTC (11)", "CD (11)", "HYP (11)", "none (11)"]
    median = np.median(axis.lines[4].get_xdata())
    assert median == pytest.approx(domain.facts(domain.meta())["warp_rms_ms"], rel=0.3)


def test_names_that_matplotlib_cannot_draw_are_drawn_otherwise(home):
    domain = make(home, augment="both")
    domain.records.leads = ["$x", "\ud800", *domain.records.leads[2:]]
    domain.records.classes = ["\ud800", *domain.records.classes[1:]]
    figures = drawn(domain)
    assert {panel.get_ylabel() for panel in figures["warp.png"].axes} >= {r"\$x", "?"}
    names = figures["magnitudes.png"].axes[0].get_yticklabels()
    assert names[0].get_text() == "? (11)"


def test_without_a_warp_there_is_no_figure_of_it(home):
    domain = make(home, augment="simclr")
    assert domain.figures(domain.meta()) == {}
    assert domain.facts(domain.meta()) == {}


# ------------------------------------------------------------------------------------------------
# Commands


@pytest.fixture(scope="module")
def runs(home):
    """A folder with two runs, `one` and `two`."""
    summary_of(home, "meta", "ecg", "--out=one", *options(TINY))
    other = {**TINY, "augment": "both", "lr": 2e-3, "compare": 0}
    summary_of(home, "meta", "ecg", "--out=two", *options(other))
    return home


def summary(folder: Path) -> dict:
    return strict_json((folder / "summary.json").read_text())


METHODS = {"no_pretraining", "default_phi", "learned_phi", "online"}


def test_meta_leaves_what_the_design_lists(runs):
    one = summary(runs / "one")
    assert (one["domain"], one["pt_steps"], one["meta_steps"]) == ("ecg", 12, 2)
    assert one["phi"]["warp.scale"] != 0.5
    assert one["phi"]["warp.last.weight"]["shape"] == [1, 32]
    assert one["warp_rms_ms"] > 0
    assert {row["metric"] for row in one["comparison"]} == {"mean AUROC"}
    assert {row["method"] for row in one["comparison"]} == METHODS
    figures = {path.name for path in (runs / "one").glob("*.png")}
    assert figures == {"comparison.png", "losses.png", "phi.png", "warp.png", "magnitudes.png"}
    assert "mask" in summary(runs / "two")["phi"]


def test_the_same_command_gives_the_same_numbers_and_a_stopped_run_goes_on(runs, tmp_path):
    summary_of(runs, "meta", "ecg", "--out", tmp_path / "again", *options(TINY))
    assert outcome(tmp_path / "again") == outcome(runs / "one")
    states = {}

    def keep(run):
        states[run.step] = deepcopy(run.state_dict())

    domain = make(runs)
    metapt.Training(domain, True).run(keep)
    other = metapt.Training(domain, True)
    other.load_state_dict(states[8])
    other.run()
    assert other.meta.warp.scale.item() == summary(runs / "one")["phi"]["warp.scale"]


KILLED_AT_8 = """
import os, signal
import metapt

metapt.CHECKPOINT_EVERY = 1
save = metapt.Run.save_checkpoint

def save_and_die(run, training):
    save(run, training)
    if training.step == 8:
        os.kill(os.getpid(), signal.SIGKILL)

metapt.Run.save_checkpoint = save_and_die
metapt.main()
"""


def test_byol_goes_on_from_a_checkpoint_to_the_same_bits(home):
    """Its target, too, is in the checkpoint."""
    states = {}

    def keep(run):
        states[run.step] = deepcopy(run.state_dict())

    whole = metapt.Training(make(home, ecg.BYOL), True).run(keep)
    assert states[8]["network"]["target"].any()
    torch.manual_seed(99)
    second = metapt.Training(make(home, ecg.BYOL), True)
    second.load_state_dict(states[8])
    second.run()
    for name in ("network", "meta"):
        expected = getattr(whole, name).state_dict()
        for key, tensor in getattr(second, name).state_dict().items():
            assert torch.equal(tensor, expected[key]), key


@pytest.mark.slow
def test_byol_is_killed_and_goes_on_to_the_same_end(home, tmp_path, monkeypatch):
    """From the command line, by file and class."""
    monkeypatch.setattr(metapt, "CHECKPOINT_EVERY", 1)
    where = f"{ROOT / 'bench' / 'domains' / 'ecg.py'}:BYOL"
    given = options({**TINY, "sizes": "10"})
    whole = summary_of(home, "meta", where, "--out", tmp_path / "whole", *given)
    assert whole["phi"].keys() >= {"warp.scale", "mask", "noise"}
    assert {row["method"] for row in whole["comparison"]} == METHODS
    command = ["meta", where, "--out", tmp_path / "killed", *given]
    done = metapt_in(home, *command, code=KILLED_AT_8, PYTHONPATH=str(ROOT))
    assert done.returncode == -9, done.stderr
    content = torch.load(tmp_path / "killed" / "checkpoint.pt", weights_only=True)
    assert content["step"] == 8
    assert content["training"]["network"]["target"].any()
    summary_of(home, "meta", "--resume", tmp_path / "killed")
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
    assert "--temperature" in refused(home, "meta", where, *options({**TINY, "temperature": 0.1}))


def test_finetune_and_eval_take_sets_by_size(runs):
    given = ["--compare=2", "--measure-scope=all", "--measure-steps=3"]
    tuned = summary_of(runs, "finetune", "one", *given)
    assert {row["ft_examples"] for row in tuned["comparison"]} == {10, 40}
    compared = summary_of(runs, "eval", "one", "two", "--sizes=20", "--compare=2", *given[2:])
    assert {row["ft_examples"] for row in compared["differences"]} == {20}
    assert "expected between 5 and" in refused(runs, "finetune", "one", "--sizes=4")


def test_runs_on_other_test_folds_or_data_are_kept_apart(runs, tmp_path):
    """φ and θ of a run have seen labels and signals that another run's test records may be."""
    given = options({**TINY, "compare": 0})
    other = tmp_path / "other"
    assert main_in(runs, "meta", "ecg", "--test-folds=1,2", "--out", other, *given)[0] == 0
    assert "--test-folds" in refused(runs, "eval", "one", other)
    assert "other parts" in refused(runs, "pretrain", "ecg", "--phi", other, "--width=1")
    wide = tmp_path / "wide"
    given = options({"width": 2, "steps": 4, "compare": 0, "sizes": TINY["sizes"]})
    assert main_in(runs, "pretrain", "ecg", "--out", wide, *given)[0] == 0
    assert "--width" in refused(runs, "eval", "one", wide, "--measure-steps=10")

    def renumber(about, arrays):
        arrays["ecg_id"] = arrays["ecg_id"] + 1

    shutil.copytree(runs / "data", tmp_path / "data")
    spoil(tmp_path / "data" / "ecg" / "prepared", renumber)
    for command in (["meta", "--resume"], ["finetune"], ["eval"]):
        assert "other data" in refused(runs, *command, "one", "--data", tmp_path / "data")


def test_pretraining_with_masks_and_noise_alone_and_at_learned_phi(runs):
    given = options({name: TINY[name] for name in ("width", "steps", "batch_size")})
    given += ["--compare=0"]
    assert main_in(runs, "pretrain", "ecg", "--augment=simclr", "--out=plain", *given)[0] == 0
    assert summary(runs / "plain")["phi"].keys() == {"mask", "noise"}
    learned = ["--phi=one", "--use=learned"]
    assert main_in(runs, "pretrain", "ecg", *learned, "--out=frozen", *given)[0] == 0
    scale = summary(runs / "one")["phi"]["warp.scale"]
    assert summary(runs / "frozen")["phi"]["warp.scale"] == scale
    said = refused(runs, "pretrain", "ecg", *learned, "--augment=simclr", *given)
    assert "does not fit" in said


def test_a_network_that_warps_is_not_made_from_a_table(home):
    (home / "phi.csv").write_text("number,value\nscale,0.5\n")
    said = refused(home, "pretrain", "ecg", "--phi=phi.csv", *options({"width": 1}))
    assert "the φ of ECG cannot be made from a table; give a run or phi.pt" in said


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"test_folds": "11"}, "test-folds"),
        ({"test_folds": "1,2,3,4,5,6,7,8,9,10"}, "test-folds"),
        ({"test_folds": "a"}, "test-folds"),
        ({"test_folds": "1,11"}, "test-folds"),
        ({"test_folds": "1" * 5000}, "test-folds"),
        ({"batch_size": 1}, "--batch-size"),
        ({"meta_batch_size": 1}, "--meta-batch-size"),
        ({"ft_records": 3}, "ft-records"),
        ({"ft_records": -5}, "ft-records"),
        ({"ft_records": 5000}, "ft-records"),
        ({"augment": "all"}, "augment"),
        ({"temperature": 0}, "temperature"),
        ({"scale_lr": -1}, "scale-lr"),
        ({"init_scale": "nan"}, "init-scale"),
        ({"noise": 0.5}, "--noise"),
        ({"ft_share": 1.5}, "ft-share"),
        ({"augment": "simclr", "init_scale": 0.6}, "init-scale"),
        ({"augment": "simclr", "scale_lr": 0.1}, "scale-lr"),
    ],
)
def test_bad_options_are_refused(home, given, message):
    assert message in refused(home, "meta", "ecg", *options({**TINY, **given}))


def test_the_help_of_the_domain_fits_two_screens(monkeypatch, home):
    monkeypatch.setenv("COLUMNS", "100")
    code, out, _ = main_in(home, "meta", "ecg", "--help")
    assert code == 0
    assert len(out.splitlines()) <= 100
    for name in ("--width", "--ft-share", "--test-folds", "--augment", "--scale-lr"):
        assert len([line for line in out.splitlines() if name in line.split()]) == 1, name


@pytest.mark.cuda
def test_a_short_run_on_cuda(home, tmp_path):
    given = ["--device=cuda", "--out", tmp_path / "run", *options(TINY)]
    assert summary_of(home, "meta", "ecg", *given)["device"] == "cuda"
