"""The ECG domain: its records, the warp, the encoder and SimCLR's loss beside slow formulations, its commands."""

import json
import math
import shutil
from copy import deepcopy
from pathlib import Path

import matplotlib.figure
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import LABELS, LEADS, beat
from tools import ROOT, SHARED, main_in, metapt_in, options, outcome, pipeline_of, refused, strict_json, summary_of

import metapt
from bench import counting
from bench.domains import ecg

MINI = SHARED / "ptbxl-mini"  # 500 real records
TINY = {"width": 1, "steps": 12, "warmup": 4, "meta_every": 4, "batch_size": 16, "meta_batch_size": 16, "compare": 1,
        "sizes": "10,40", "measure_steps": 10}  # fmt: skip


def millivolts(ecg_id: int) -> np.ndarray:
    return beat(ecg_id) / 1000  # [1000, 12]


def write(folder: Path, about: dict, arrays: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", values)
    facts = {name: {"dtype": v.dtype.str, "shape": list(v.shape), "sha256": "0" * 64} for name, v in arrays.items()}
    (folder / "about.json").write_text(json.dumps({**about, "arrays": facts}))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder in which `ecg` can run: 60 records of ten folds, the labels of `LABELS` in turn."""
    ids, signals = np.arange(1, 61), np.stack([millivolts(i) for i in range(1, 61)])
    gain = np.tile(np.float32([1000, 2000, 4000] * 4), (60, 1))  # per mV, another one for each lead
    baseline = np.tile(np.float32(range(-30, 90, 10)), (60, 1))
    samples = (signals * gain[:, None] + baseline[:, None]).round().astype(np.int16)
    about = {"format": "metapt ecgs 2", "source": "", "licence": "", "records": 60, "left_out": [], "leads": list(LEADS), "hertz": 100, "samples": 1000,
             "classes": ["NORM", "MI", "STTC", "CD", "HYP"]}  # fmt: skip
    folder = tmp_path_factory.mktemp("home")
    write(folder / "data" / "ecg" / "prepared", about, {
        "samples": samples, "ecg_id": ids, "patient": 1000 + ids, "fold": ids // 5 % 10 + 1, "labels": np.uint8(LABELS)[ids % 5],
        "gain": gain, "baseline": baseline, "sums": np.stack([signals.sum((1, 2)), (signals**2).sum((1, 2))], 1),
    })  # fmt: skip
    return folder


def make(home: Path, kind=ecg.ECG, **given) -> ecg.ECG:
    return kind(kind.Settings(**{**TINY, **given}), torch.device("cpu"), home / "data")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# Records


def test_records_come_out_as_they_went_in(home):
    records = ecg.Records(home / "data" / "ecg" / "prepared", torch.device("cpu"))
    expected = np.stack([millivolts(i) for i in (4, 60, 1)])
    found = records.millivolts(torch.tensor([3, 59, 0]))
    np.testing.assert_allclose(found, expected.transpose(0, 2, 1), rtol=0, atol=1e-6)
    mean, deviation = records.moments(torch.tensor([3, 59, 0]))
    assert mean == pytest.approx(expected.mean(), abs=1e-9)
    assert deviation == pytest.approx(expected.std(), rel=1e-9)
    assert records.labels[:5].tolist() == [*LABELS[1:], LABELS[0]]
    assert (records.leads, records.hertz, records.length) == (list(LEADS), 100, 1000)
    assert records.samples.dtype == torch.int16  # not converted as a whole


def spoil(folder: Path, change) -> None:
    """Changes arrays and what about.json says, which says what the arrays then are: only the content can tell."""
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
    "a label below 0": lambda about, arrays: arrays.update(labels=-arrays["labels"].astype(np.int8)),
    "a fold below 0": lambda about, arrays: arrays.update(fold=-arrays["fold"]),
    "an infinite baseline": lambda about, arrays: arrays.update(baseline=arrays["baseline"] + np.inf),
    "no variance": lambda about, arrays: arrays.update(sums=arrays["sums"] * [1, 0]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_prepared_folder_that_cannot_be_is_refused(home, tmp_path, fault):
    shutil.copytree(home / "data", tmp_path / "data")
    spoil(tmp_path / "data" / "ecg" / "prepared", FAULTS[fault])
    assert "prepare" in refused(tmp_path, "pretrain", "ecg", *options({"width": 1, "steps": 1}))


@pytest.mark.parametrize("tear", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-1])])
@pytest.mark.parametrize("name", ["about.json", "samples.npy", "labels.npy"])
def test_a_prepared_folder_that_is_torn_is_refused(home, tmp_path, name, tear):
    shutil.copytree(home / "data", tmp_path / "data")
    tear(tmp_path / "data" / "ecg" / "prepared" / name)
    assert f"ecg/prepared/{name}" in refused(tmp_path, "pretrain", "ecg", *options({"width": 1, "steps": 1}))


def test_without_data_the_command_that_fetches_them_is_named(tmp_path):
    assert "download ecg" in refused(tmp_path, "meta", "ecg")


@pytest.mark.skipif(not MINI.exists(), reason="the real records are not here")
def test_the_real_records_are_those_of_wfdb(tmp_path):
    wfdb = pytest.importorskip("wfdb")
    done = metapt_in(tmp_path, "download", "ecg", "--from", MINI)
    assert done.returncode == 0, done.stderr
    records = ecg.Records(tmp_path / "data" / "ecg" / "prepared", torch.device("cpu"))
    physical = wfdb.rdrecord(str(MINI / "records100" / "00000" / "00042_lr")).p_signal.T
    torch.testing.assert_close(records.millivolts(torch.tensor([41]))[0].double(), torch.from_numpy(physical))
    signals = records.millivolts(torch.arange(500))
    assert records.moments(torch.arange(500)) == pytest.approx((signals.mean().item(), signals.std().item()), rel=1e-4)
    domain = make(tmp_path, test_folds="9,10")
    patients = {part: set(records.patient[rows].tolist()) for part, rows in domain.rows.items()}
    assert not patients["pretrain"] & patients["test"]


# The loss, the metric, the encoder and the views beside slow formulations


def test_nt_xent_is_equation_1():
    a, b = torch.randn(2, 7, 5, dtype=torch.float64)
    z, total = torch.cat([a, b]), 0.0
    cosine = lambda i, j: float(z[i] @ z[j] / z[i].norm() / z[j].norm()) / 0.3
    for i in range(14):
        others = [math.exp(cosine(i, k)) for k in range(14) if k != i]
        total -= math.log(math.exp(cosine(i, (i + 7) % 14)) / sum(others)) / 14
    assert ecg.nt_xent(a, b, 0.3).item() == pytest.approx(total, rel=1e-12)


def test_mean_auroc_is_that_of_pairs():
    scores, labels = torch.randint(0, 5, (30, 4)).float(), (torch.rand(30, 4) < 0.4).float()
    labels[:, 1], labels[:, 3] = 0, 1  # classes without a positive, without a negative
    each = []
    for task in (0, 2):
        pairs = [(p, n) for p in scores[labels[:, task] > 0, task] for n in scores[labels[:, task] == 0, task]]
        each.append(np.mean([float(p > n) + 0.5 * float(p == n) for p, n in pairs]))
    assert ecg.mean_auroc(scores, labels) == pytest.approx(np.mean(each), rel=1e-12)
    assert math.isnan(ecg.mean_auroc(scores, torch.ones(30, 4)))


def plain_resnet(model: ecg.ResNet18, signals: torch.Tensor) -> torch.Tensor:
    """Of the same parameters, for [n, leads, t]; strides and shortcuts as published."""
    training = model.training

    def convolved(x, convolution, stride, norm):
        x = F.conv1d(x, convolution.weight[:, :, 0], stride=stride, padding=convolution.weight.shape[3] // 2)
        return F.batch_norm(x, norm.running_mean.clone(), norm.running_var.clone(), norm.weight, norm.bias, training)

    x = F.pad(signals, (0, -signals.shape[2] % 64))
    x = F.max_pool1d(convolved(x, model.stem[0], 2, model.stem[1]).relu(), 3, 2, 1)
    for i, block in enumerate(model.blocks):
        stride = 2 if i in (2, 4, 6) else 1
        hidden = convolved(convolved(x, block.first, stride, block.norm1).relu(), block.second, 1, block.norm2)
        x = (hidden + (convolved(x, *block.shortcut[:1], 2, block.shortcut[1]) if stride == 2 else x)).relu()
    return x.mean(2)


@pytest.mark.parametrize("training", [True, False])
def test_the_encoder_is_that_of_conv1d_in_value_and_gradient(training):
    model, x = ecg.ResNet18(3, 2).double(), torch.randn(4, 3, 100, dtype=torch.float64)
    for p in model.parameters():
        torch.nn.init.normal_(p, 0.3, 0.5)
    model.train()(2 * x)  # statistics that are not those of the start
    found, expected = model.train(training)(x), plain_resnet(model, x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert [block.second.out_channels for block in model.blocks] == [2, 2, 4, 4, 8, 8, 16, 16]
    weights = torch.randn_like(found)
    gradients = [torch.autograd.grad((out * weights).sum(), list(model.parameters())) for out in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9 * max(g.abs().max() for g in gradients[0]).item())


def slow_flow(velocity: np.ndarray, squarings: int) -> np.ndarray:
    grid = np.arange(len(velocity), dtype=float)
    place = grid + velocity / 2**squarings
    for _ in range(squarings):  # beyond the borders the displacement is that of the border
        inside = np.clip(place, 0, len(velocity) - 1)
        place = place + np.interp(inside, grid, place - grid)
    return place - grid


def slow_quarter(noise: np.ndarray) -> np.ndarray:
    return np.array([(noise[4 * i + 1] + noise[4 * i + 2]) / 2 for i in range(len(noise) // 4)]) / 4


def slow_warp(noise: np.ndarray, speed: float, steepest: float) -> np.ndarray:
    """From white noise [t] to displacements [t]."""
    n = len(noise) // 4
    squarings = 5
    while steepest / 2**squarings > 0.5:
        squarings += 1
    moved = 4 * slow_flow(slow_quarter(noise) * speed, squarings)
    full = np.interp((np.arange(len(noise)) + 0.5) / 4 - 0.5, np.arange(n), moved)
    padded, taps = np.pad(full, 12, mode="edge"), np.exp(-(np.arange(-12, 13) ** 2) / 288)
    return np.array([padded[i : i + 25] @ (taps / taps.sum()) for i in range(len(noise))])


@pytest.mark.parametrize("scale", [0.1, 0.5, 4.0])
def test_the_warp_is_that_of_loops(scale):
    warp = ecg.WarpAugmentation(3, scale).double()
    magnitudes, views = torch.tensor([0.3, 1.9], dtype=torch.float64), torch.randn(2, 3, 200, dtype=torch.float64)
    torch.manual_seed(5)
    found = warp(views, magnitudes)
    torch.manual_seed(5)
    noise = torch.randn(2, 1, 200, dtype=torch.float64).numpy()
    speeds = [100 * warp.scale.item() ** 2 * magnitudes[i].item() for i in range(2)]
    steepest = max(np.abs(np.diff(slow_quarter(noise[i, 0]) * speeds[i])).max() for i in range(2))
    for i in range(2):
        place = np.clip(np.arange(200) + slow_warp(noise[i, 0], speeds[i], steepest), 0, 199)
        for lead in range(3):
            expected = np.interp(place, np.arange(200), views[i, lead].numpy())
            np.testing.assert_allclose(found[i, lead].detach().numpy(), expected, rtol=0, atol=1e-9)


def increasing(scale: float, magnitudes: torch.Tensor, kind=torch.float64) -> torch.Tensor:
    warp = ecg.WarpAugmentation(12, scale).to(kind)
    moved = warp.displacements(magnitudes.to(kind), 1000).detach()
    assert moved.isfinite().all()
    return (torch.arange(1000, dtype=kind) + moved).diff(dim=1)


@pytest.mark.parametrize("scale", [0.0, 0.1, 0.5, 1.0, 4.0, 30.0, 1000.0, -2.0])
def test_samples_keep_their_order_whatever_phi_is(scale):
    steps = increasing(scale, torch.linspace(0, 2, 200))
    assert steps.min() >= -1e-9  # rounding, where thousands of samples are pressed into one
    steps = increasing(scale, torch.linspace(0, 2, 50), torch.float32)
    assert steps.min() >= -1e-3


def test_with_the_published_number_of_squarings_they_do_not(monkeypatch):
    monkeypatch.setattr(ecg.math, "ceil", lambda x: 4)  # five squarings whatever the velocity
    share = (increasing(4.0, torch.ones(200)) > 0).double().mean()
    assert 0.55 < share < 0.64  # bench/README.md: 60 %
    assert (increasing(0.5, torch.ones(200)) > 0).all()


def test_the_start_is_as_gentle_as_its_help_says(home):
    domain = make(home)
    assert 25 < domain.facts(domain.meta())["warp_rms_ms"] < 45
    assert "0.5: 34 ms rms" in ecg.ECGSettings.__dataclass_fields__["init_scale"].metadata["help"]


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
    meta.mask.data.fill_(-50.0), meta.noise.data.fill_(-50.0)  # nothing but the warp
    a, b = meta.train()(domain.inputs("pretrain", torch.arange(8)))
    assert ((a - b).abs().amax((1, 2)) > 0.1).all()


def test_each_view_has_its_own_statistics_and_ft_those_of_the_network(home):
    domain = make(home)
    network, meta, head = domain.network(), domain.meta(), domain.head()
    theta, phi, psi = (dict(m.named_parameters()) for m in (network, meta, head))
    index = torch.arange(16)
    torch.manual_seed(3)
    value = domain.pretrain_loss(network, meta, index, 1.0, live=False)(theta, phi)
    torch.manual_seed(3)
    views = metapt.call(meta, phi, domain.inputs("pretrain", index), train=True)
    network.train()
    expected = ecg.nt_xent(network(views[0]), network(views[1]), 0.5)
    torch.testing.assert_close(value, expected)
    assert not torch.allclose(ecg.nt_xent(*network(torch.cat(views)).chunk(2), 0.5), expected, rtol=1e-4)
    loss = domain.finetune_loss(network, head, "finetune", index)(theta, psi)
    outputs = head(network.eval()(domain.inputs("finetune", index), features=True))
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(outputs, domain.targets("finetune", index)))


# BYOL


def plain_perceptron(layers: torch.nn.Sequential, rows: torch.Tensor) -> torch.Tensor:
    first, norm, _, last = layers
    hidden = torch.stack([first.weight @ row + first.bias for row in rows])
    centred = hidden - hidden.mean(0)
    hidden = (centred / (centred.square().mean(0) + norm.eps).sqrt() * norm.weight + norm.bias).clamp(min=0)
    return torch.stack([last.weight @ row + last.bias for row in hidden])


def test_byol_is_equation_2_of_both_orders(home):
    domain = make(home, ecg.BYOL)
    network, meta = domain.network().double(), domain.meta().double()
    other = deepcopy(network)
    theirs = (*other.encoder.parameters(), *other.head[0].parameters())
    for p in theirs:
        torch.nn.init.normal_(p, 0.1, 0.3)
    network.target.copy_(torch.cat([p.detach().flatten() for p in theirs]))
    signals = domain.inputs("pretrain", torch.arange(6)).double()
    domain.inputs = lambda part, index: signals
    torch.manual_seed(3)
    value = domain.pretrain_loss(network, meta, None, 1.0, live=False)(metapt.detached(network), metapt.detached(meta))
    torch.manual_seed(3)
    views, total = metapt.call(meta, metapt.detached(meta), signals, train=True), 0.0
    for mine, theirs in (views, views[::-1]):
        projected = plain_perceptron(network.head[0], plain_resnet(network.encoder.train(), mine))
        predicted = plain_perceptron(network.head[1], projected)
        aims = plain_perceptron(other.head[0], plain_resnet(other.encoder.train(), theirs))
        for q, z in zip(predicted, aims, strict=True):
            total += (q / q.norm() - z / z.norm()).square().sum().item() / 6
    assert value.item() == pytest.approx(total, rel=1e-9)
    assert value.requires_grad is False


def test_the_target_follows_the_online_network_a_step_behind_and_is_no_part_of_theta(home):
    learner = metapt.Learner(make(home, ecg.BYOL, momentum=0.8, lr=1e-2))
    network, expected = learner.network, []

    def online():
        return torch.cat([p.detach().flatten() for p in (*network.encoder.parameters(), *network.head[0].parameters())])

    assert "target" in network.state_dict() and "target" not in dict(network.named_parameters())
    target = online()
    norm = network.encoder.stem[1]
    seen = norm.num_batches_tracked.item()
    for _ in range(4):
        target = 0.8 * target + 0.2 * online()
        expected.append(target)
        learner.pretrain_step(1.0)
        torch.testing.assert_close(network.target, expected[-1])
        assert not torch.allclose(network.target, online(), atol=1e-3)
    assert norm.num_batches_tracked == seen + 2 * 4  # two views a step: the target's passes change no statistics
    before = {name: b.clone() for name, b in network.named_buffers()}
    learner.meta_step(1.0)
    assert all(torch.equal(b, before[name]) for name, b in network.named_buffers())


def test_the_target_runs_as_the_online_network_does(home, monkeypatch):
    """In lower precision, and compiled: two views in both networks; then the head beside PT."""
    learner, dtypes, compiled = metapt.Learner(make(home, ecg.BYOL, precision="bf16", compile=True)), [], []
    learner.network.encoder.stem[0].register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    run = lambda *call: compiled.append(call[0]) or torch.func.functional_call(*call)
    monkeypatch.setattr(metapt, "compiled_call", lambda: run)
    learner.pretrain_step(1.0)
    assert dtypes == [torch.bfloat16] * 5 and compiled == [learner.network] * 5


# Gradients, and what a meta step costs


@pytest.mark.parametrize("hvp", ["exact", "finite"])
@pytest.mark.parametrize(("kind", "augment"), [
    (ecg.ECG, "warp"), (ecg.ECG, "simclr"), (ecg.ECG, "both"), (ecg.BYOL, "both"),
])  # fmt: skip
def test_the_hypergradient_of_the_domain_is_that_of_differences(home, kind, augment, hvp):
    """v, and the mixed product, in float64, against central differences of L_V after FT and of L_PT's gradient.

    With tiny steps: at a longer one some ReLU of thousands changes sides, and the second derivative that autograd knows
    nothing of is in the difference.
    """
    domain, step = make(home, kind, augment=augment), 1e-8
    network, head, meta = domain.network().double(), domain.head().double(), domain.meta().double()
    if kind is ecg.BYOL:  # held where the online network is not
        network.target.mul_(1.1).add_(0.1 * torch.randn_like(network.target))
    theta, psi, phi = (metapt.detached(module) for module in (network, head, meta))
    data = {part: (domain.inputs(part, torch.arange(10)).double(), domain.targets(part, torch.arange(10)).double())
            for part in ("pretrain", "finetune", "validation")}  # fmt: skip
    domain.inputs, domain.targets = lambda part, _: data[part][0], lambda part, _: data[part][1]
    pretrain = domain.pretrain_loss(network, meta, None, 1.0, live=False)
    finetune, validation = (domain.finetune_loss(network, head, part, None) for part in ("finetune", "validation"))
    torch.manual_seed(4)
    found = metapt.hypergradient(pretrain, finetune, validation, theta, psi, phi, unroll=metapt.Unroll(1, 0.1),
                                 solver=metapt.Solver("identity", hvp=hvp, step=step))  # fmt: skip

    def gradient(loss, at):
        torch.manual_seed(4)
        point = {k: p.clone().requires_grad_() for k, p in at.items()}
        found = torch.autograd.grad(loss(point), list(point.values()), allow_unused=True, materialize_grads=True)
        return dict(zip(at, found, strict=True))

    def after_finetuning(theta):
        slope = gradient(lambda psi: finetune(theta, psi), psi)
        return validation(theta, {k: p - 0.1 * slope[k] for k, p in psi.items()}).item()

    direction = {k: torch.randn_like(p) for k, p in theta.items()}
    ends = [after_finetuning({k: p + sign * direction[k] for k, p in theta.items()}) for sign in (step, -step)]
    along = sum((found.q[k] * direction[k]).sum() for k in theta).item()
    assert along == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-3)
    names = {"warp.scale", "mask", "noise", "warp.last.weight", "warp.layers.1.0.weight"} & set(phi)
    assert len(names) == {"warp": 3, "simclr": 2, "both": 5}[augment]
    for name in names:
        along = torch.randn_like(phi[name])
        moved = [{**phi, name: phi[name] + sign * along} for sign in (step, -step)]
        ends = [gradient(lambda theta, phi=phi: pretrain(theta, phi), theta) for phi in moved]
        mixed = sum((found.q[k] * (ends[0][k] - ends[1][k])).sum() for k in theta) / (2 * step)
        assert (found.phi[name] * along).sum().item() == pytest.approx(-mixed.item(), rel=2e-3), name


def test_with_the_target_held_the_hypergradient_is_that_of_the_pipeline(home):
    """PT to its end under φ (with a pull to where it began, so that there is one), FT, L_V: against central differences.
    The networks are smooth here."""
    domain, pull, step = make(home, ecg.BYOL, augment="simclr"), 100.0, 1e-5
    encoder = torch.nn.Sequential(torch.nn.AvgPool1d(50), torch.nn.Flatten(), torch.nn.Linear(240, 8), torch.nn.Tanh())
    predictor = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 4))
    torch.nn.init.normal_(predictor[2].weight)  # no prediction is near 0
    network = ecg.Projecting(encoder, torch.nn.Sequential(torch.nn.Linear(8, 4), predictor)).double()
    network.target = torch.nn.Buffer(torch.nn.utils.parameters_to_vector(network.followed().values()).detach())
    head, meta = domain.head().double(), domain.meta().double()
    network.target.add_(0.1 * torch.randn_like(network.target))
    data = {part: (domain.inputs(part, torch.arange(8)).double(), domain.targets(part, torch.arange(8)).double())
            for part in ("pretrain", "finetune", "validation")}  # fmt: skip
    domain.inputs, domain.targets = lambda part, _: data[part][0], lambda part, _: data[part][1]
    begin, psi, phi = (metapt.detached(module) for module in (network, head, meta))
    free = domain.pretrain_loss(network, meta, None, 1.0, live=False)
    finetune, validation = (domain.finetune_loss(network, head, part, None) for part in ("finetune", "validation"))
    pretrain, pretrained, pipeline = pipeline_of(free, finetune, validation, begin, psi, pull, 60)
    before, theta = network.target.clone(), pretrained(phi)
    torch.manual_seed(4)
    found = metapt.hypergradient(pretrain, finetune, validation, theta, psi, phi, unroll=metapt.Unroll(1, 0.1),
                                 solver=metapt.Solver("cg", terms=30))  # fmt: skip
    for name in ("mask", "noise"):
        ends = [pipeline({**phi, name: phi[name] + step}) for step in (step, -step)]
        assert found.phi[name].item() == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-3), name
    assert torch.equal(network.target, before)


def test_at_the_published_width_the_fused_optimiser_reads_gradients_as_they_lie(home):
    """Weights of convolutions with channels last have gradients of odd strides, which fused Adam takes as they are."""
    learner = metapt.Learner(make(home, width=32, batch_size=4, unroll_batch_size=4))
    assert learner.optimizer.defaults["fused"]
    plain = deepcopy(learner.network)
    optimizer = torch.optim.Adam(plain.parameters(), lr=learner.settings.lr, foreach=False)
    for _ in range(2):
        learner.pretrain_step(1.0)
        for p, q in zip(learner.network.parameters(), plain.parameters(), strict=True):
            q.grad = p.grad.clone(memory_format=torch.contiguous_format)
        optimizer.step()
    torch.testing.assert_close(metapt.detached(learner.network), metapt.detached(plain), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("kind", "most"), [(ecg.ECG, (2.1, 1.1)), (ecg.BYOL, (2.5, 2.1))])
def test_a_meta_step_costs_what_bench_readme_says(home, kind, most):
    """At the published width, all batches equal: FLOPs and bytes, in PT steps."""
    sizes = dict.fromkeys(("batch_size", "meta_batch_size", "unroll_batch_size", "validation_batch_size"), 8)
    domain = make(home, kind, width=32, **sizes)
    learner = metapt.Learner(domain)
    plain, meta = ([count(lambda step=step: step(1.0)) for count in (counting.flops, counting.peak)]
                   for step in (learner.pretrain_step, learner.meta_step))  # fmt: skip
    assert 0.9 * most[0] <= meta[0] / plain[0] <= most[0]  # 2.04 and 2.47 there
    assert meta[1] / plain[1] <= most[1]
    views = counting.peak(
        lambda: sum(v.sum() for v in learner.meta(domain.inputs("pretrain", torch.arange(8)))).backward()
    )
    assert views < plain[1]  # what is made again in the backward pass, when the encoder's part is gone, is less


# Parts, settings and what Algorithm 1 does with them


def test_parts_are_disjoint_and_sets_divided_four_to_one(home):
    domain, smaller = (make(home, test_folds="2,3", ft_records=n) for n in (40, 20))
    fold = domain.records.fold
    assert sorted(set(fold[domain.rows["test"]].tolist())) == [2, 3]
    assert not set(fold[domain.rows["pretrain"]].tolist()) & {2, 3}
    assert domain.sizes == {"pretrain": 44, "finetune": 32, "validation": 8, "test": 16}
    pool = domain.rows["finetune"].tolist() + domain.rows["validation"].tolist()
    assert len(set(pool)) == 40
    assert set(pool) <= set(domain.rows["pretrain"].tolist())
    assert set(smaller.rows["finetune"].tolist()) <= set(domain.rows["finetune"].tolist())
    assert [domain.divide(n) for n in (5, 40, 100)] == [(4, 1), (32, 8), (80, 20)]
    assert (domain.finetune_limits(), domain.finetune_sizes) == ((5, 40), (40,))
    expected = domain.records.millivolts(domain.rows["pretrain"])
    assert (domain.mean, domain.deviation) == pytest.approx((expected.mean().item(), expected.std().item()), rel=1e-4)


def spied(domain: ecg.ECG) -> dict[str, set]:
    """Which examples of which part a domain is asked for from now on."""
    seen, inputs = {}, domain.inputs
    domain.inputs = lambda part, index: seen.setdefault(part, set()).update(index.tolist()) or inputs(part, index)
    return seen


def test_ft_reads_no_more_than_its_share_of_both_parts(home):
    domain = make(home)
    network, seen = domain.network(), spied(domain)
    metapt.finetune(domain, network, 20, 0)
    assert {part: len(rows) for part, rows in seen.items()} == {"finetune": 16, "validation": 4, "test": 5}


def test_meta_with_half_of_the_ft_set_never_reads_the_other_half(home):
    domain = make(home, ft_share=0.5, ft_records=40)
    assert domain.access == {"finetune": 16, "validation": 4}
    training = metapt.Training(domain, True)
    seen = spied(domain)
    training.run()
    assert (seen["finetune"], seen["validation"]) == (set(range(16)), set(range(4)))
    assert "test" not in seen


def test_the_global_scale_has_a_rate_of_its_own(home):
    training = metapt.Training(make(home, scale_lr=0.25, meta_lr=1e-3, warmup=0, steps=4), True)
    before = deepcopy(metapt.detached(training.best.meta))
    training.run()
    moved = {k: (p - before[k]).abs().max().item() for k, p in metapt.detached(training.best.meta).items()}
    assert moved["warp.scale"] == pytest.approx(0.25, rel=1e-2)  # Adam's first step
    assert moved["warp.last.weight"] == pytest.approx(1e-3, rel=1e-2)


def test_the_paper_preset_is_the_published_protocol():
    s = metapt.settings_of(ecg.ECG, {}, "paper")
    expected = {"batch_size": 256, "meta_batch_size": 256, "unroll_batch_size": 256, "validation_batch_size": 256,
                "lr": 1e-4, "unroll_lr": 1e-4, "meta_lr": 1e-4, "scale_lr": 1.0, "init_scale": 4.0, "width": 32,
                "temperature": 0.5, "solver": "neumann", "terms": 1, "alpha": 1e-4, "hvp": "exact", "unroll_hvp": "",
                "meta_every": 10, "unroll_steps": 1, "steps": 3800, "warmup": 76, "cosine": False, "test_folds": "10",
                "measure_epochs": 200, "measure_scope": "all", "measure_lr": None, "measure_batch_size": 64,
                "particles": "1", "augment": "warp", "average": 0.0}  # fmt: skip
    assert {name: getattr(s, name) for name in expected} == expected
    assert metapt.settings_of(ecg.ECG, {"augment": "simclr"}, "paper").augment == "simclr"  # the paper's baseline


def test_figures_show_a_record_and_every_class(home):
    domain = make(home, augment="both")
    figures = {}
    for name, draw in domain.figures(domain.meta()).items():
        figures[name] = matplotlib.figure.Figure()
        draw(figures[name])
        figures[name].canvas.draw()
    columns, magnitudes = figures["warp.png"].axes, figures["magnitudes.png"].axes[0]
    (legend,) = figures["warp.png"].legends
    ecg_id = int(legend.get_title().get_text().split()[2].rstrip(";"))
    assert [text.get_text() for text in legend.get_texts()] == ["as recorded", "after the warp"]
    assert [text.get_text() for axis in columns for text in axis.texts] == [n.replace("AV", "aV") for n in LEADS]
    for lead, axis in enumerate(columns[i // 6] for i in range(12)):
        recorded, warped = axis.lines[2 * (lead % 6) : 2 * (lead % 6) + 2]
        expected = millivolts(ecg_id)[250:750, lead] + axis.get_yticks()[lead % 6]
        np.testing.assert_allclose(recorded.get_ydata(), expected, atol=1e-5)
        np.testing.assert_allclose(recorded.get_xdata(), np.arange(250, 750) / 100)
        assert not np.allclose(warped.get_ydata(), expected, atol=1e-2)
    assert [tick.get_text() for tick in magnitudes.get_yticklabels()] == [
        "NORM (11)", "MI (11)", "STTC (11)", "CD (11)", "HYP (11)", "none (11)"]  # fmt: skip
    median = np.median(magnitudes.lines[4].get_xdata())
    assert median == pytest.approx(domain.facts(domain.meta())["warp_rms_ms"], rel=0.3)
    assert make(home, augment="simclr").figures(make(home, augment="simclr").meta()) == {}


# Commands


@pytest.fixture(scope="module")
def runs(home):
    for name, given in (("one", {}), ("two", {"augment": "both", "lr": 2e-3})):
        summary_of(home, "meta", "ecg", "--out", name, *options({**TINY, **given}))
    return home


def summary(folder: Path) -> dict:
    return strict_json((folder / "summary.json").read_text())


def test_meta_leaves_what_the_design_lists(runs):
    found = summary(runs / "one")
    assert (found["domain"], found["pt_steps"], found["meta_steps"]) == ("ecg", 12, 2)
    assert found["phi"]["warp.scale"] != 0.5
    assert found["phi"]["warp.last.weight"]["shape"] == [1, 32]
    assert found["warp_rms_ms"] > 0
    assert {row["metric"] for row in found["comparison"]} == {"mean AUROC"}
    methods = {"no_pretraining", "default_phi", "learned_phi", "online"}
    assert {row["method"] for row in found["comparison"]} == methods
    figures = {p.name for p in (runs / "one").glob("*.png")}
    assert figures == {"comparison.png", "losses.png", "phi.png", "warp.png", "magnitudes.png"}
    assert "mask" in summary(runs / "two")["phi"]


def test_the_same_command_gives_the_same_numbers_and_a_stopped_run_goes_on(runs, tmp_path):
    summary_of(runs, "meta", "ecg", "--out", tmp_path / "again", *options(TINY))
    assert outcome(tmp_path / "again") == outcome(runs / "one")
    kept, domain = {}, make(runs)
    metapt.Training(domain, True).run(lambda t: kept.setdefault(t.step, deepcopy(t.state_dict())))
    other = metapt.Training(domain, True)
    other.load_state_dict(kept[8])
    assert other.run().best.meta.warp.scale.item() == summary(runs / "one")["phi"]["warp.scale"]


def test_byol_is_killed_and_goes_on_to_the_same_end(home, tmp_path, monkeypatch):
    """From the command line, by file and class."""
    monkeypatch.setattr(metapt, "CHECKPOINT_EVERY", 1)
    where, given = f"{ROOT / 'bench' / 'domains' / 'ecg.py'}:BYOL", options({**TINY, "sizes": "10"})
    found = summary_of(home, "meta", where, "--out", tmp_path / "whole", *given)
    assert found["phi"].keys() >= {"warp.scale", "mask", "noise"}
    assert {row["method"] for row in found["comparison"]} == {"no_pretraining", "default_phi", "learned_phi", "online"}
    code = ("import metapt, os, signal\nmetapt.CHECKPOINT_EVERY, save = 1, metapt.Run.save\n"
            "def killed(run, training):\n    save(run, training)\n"
            "    training.step == 8 and os.kill(os.getpid(), signal.SIGKILL)\n"
            "metapt.Run.save = killed\nmetapt.main()")  # fmt: skip
    done = metapt_in(home, "meta", where, "--out", tmp_path / "killed", *given, code=code, PYTHONPATH=str(ROOT))
    assert done.returncode == -9, done.stderr
    content = torch.load(tmp_path / "killed" / "checkpoint.pt", weights_only=True)
    assert content["learners"][0]["network"]["target"].any()
    summary_of(home, "meta", "--resume", tmp_path / "killed")
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
    assert "--temperature" in refused(home, "meta", where, *options({**TINY, "temperature": 0.1}))


def test_finetune_and_eval_take_sets_by_size(runs):
    found = summary_of(runs, "finetune", "one", "--compare=2", "--measure-scope=all", "--measure-steps=3")
    assert sorted({row["ft_examples"] for row in found["comparison"]}) == [10, 40]
    found = summary_of(runs, "eval", "one", "two", "--sizes=20", "--compare=2")
    assert {row["ft_examples"] for row in found["differences"]} == {20}
    assert "expected between 5 and" in refused(runs, "finetune", "one", "--sizes=4")


def test_runs_on_other_test_folds_or_data_are_kept_apart(runs, tmp_path):
    """φ and θ of a run have seen the labels and signals of what another run's test records may be."""
    given = options({**TINY, "compare": 0})
    assert main_in(runs, "meta", "ecg", "--test-folds=1,2", "--out", tmp_path / "other", *given)[0] == 0
    assert "--test-folds" in refused(runs, "eval", "one", tmp_path / "other")
    assert "other parts" in refused(runs, "pretrain", "ecg", "--phi", tmp_path / "other", *options({"width": 1}))
    wide = options({"width": 2, "steps": 4, "compare": 0, "sizes": TINY["sizes"]})
    assert main_in(runs, "pretrain", "ecg", "--out", tmp_path / "wide", *wide)[0] == 0
    assert "--width" in refused(runs, "eval", "one", tmp_path / "wide", "--measure-steps=10")

    shutil.copytree(runs / "data", tmp_path / "data")
    spoil(tmp_path / "data" / "ecg" / "prepared", lambda about, arrays: arrays.update(ecg_id=arrays["ecg_id"] + 1))
    for command in (["meta", "--resume"], ["finetune"], ["eval"]):
        assert "other data" in refused(runs, *command, "one", "--data", tmp_path / "data")


def test_pretraining_with_masks_and_noise_alone_and_at_learned_phi(runs):
    given = {name: TINY[name] for name in ("width", "steps", "batch_size")} | {"compare": 0}
    assert main_in(runs, "pretrain", "ecg", "--augment=simclr", "--out=plain", *options(given))[0] == 0
    assert summary(runs / "plain")["phi"].keys() == {"mask", "noise"}
    assert main_in(runs, "pretrain", "ecg", "--phi=one", "--use=learned", "--out=frozen", *options(given))[0] == 0
    assert summary(runs / "frozen")["phi"]["warp.scale"] == summary(runs / "one")["phi"]["warp.scale"]
    assert "does not fit" in refused(runs, "pretrain", "ecg", "--phi=one", "--augment=simclr", *options(given))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"test_folds": "11"}, "test-folds"), ({"test_folds": "1,2,3,4,5,6,7,8,9,10"}, "test-folds"),
        ({"test_folds": "a"}, "test-folds"), ({"test_folds": "1,11"}, "test-folds"), ({"test_folds": "1" * 5000}, "test-folds"),
        ({"batch_size": 1}, "--batch-size"), ({"meta_batch_size": 1}, "--meta-batch-size"),
        ({"ft_records": 3}, "ft-records"), ({"ft_records": -5}, "ft-records"), ({"ft_records": 5000}, "ft-records"),
        ({"augment": "all"}, "augment"), ({"temperature": 0}, "temperature"), ({"scale_lr": -1}, "scale-lr"),
        ({"init_scale": "nan"}, "init-scale"), ({"noise": 0.5}, "--noise"), ({"ft_share": 1.5}, "ft-share"),
        ({"augment": "simclr", "init_scale": 0.6}, "init-scale"), ({"augment": "simclr", "scale_lr": 0.1}, "scale-lr"),
    ],
)  # fmt: skip
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
    found = summary_of(home, "meta", "ecg", "--device=cuda", "--out", tmp_path / "run", *options(TINY))
    assert found["device"] == "cuda"
