"""Chapter 6 of metapt.py: rotations, example weights, how images are split, spoiled and turned, figures."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from tools import ROOT, SHARED, domain_of, flat, main_in, spy
from torch import nn

import metapt

ROTATION, NOISE = "digits-rotation", "digits-noise"
SIZES = {"pretrain": 1000, "finetune": 300, "validation": 250, "test": 247}


@pytest.mark.parametrize("quarters", [-1, 0, 1, 2, 5])
def test_rotation_by_quarter_turns_is_rot90(quarters):
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    turned = metapt.rotate(images, torch.full((2,), 90.0 * quarters, dtype=torch.float64))
    torch.testing.assert_close(turned, torch.rot90(images, quarters, (2, 3)))


def test_rotations_add_up_and_each_image_has_its_own():
    """Twice 45° is a quarter turn, up to what resampling a smooth image leaves; the other image stays."""
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, 32, dtype=torch.float64)] * 2, indexing="ij")
    images = torch.exp(-8 * ((x - 0.2) ** 2 + (y + 0.3) ** 2)).expand(2, 1, 32, 32)
    degrees = torch.tensor([45.0, 0.0], dtype=torch.float64)
    twice = metapt.rotate(metapt.rotate(images, degrees), degrees)
    assert (twice[0] - torch.rot90(images[0], 1, (1, 2))).abs().max() < 0.05 < (twice[0] - images[0]).abs().max()
    torch.testing.assert_close(twice[1], images[1])


def test_rotation_is_differentiable_in_degrees_and_in_the_image():
    images = torch.rand(2, 1, 6, 6, dtype=torch.float64, requires_grad=True)
    degrees = torch.tensor([12.3, -77.7], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(metapt.rotate, (images, degrees))
    assert torch.autograd.gradgradcheck(metapt.rotate, (images, degrees), check_batched_grad=False)


def test_phi_of_the_rotations_is_the_mean_of_their_normal_distribution(monkeypatch):
    seen = []
    monkeypatch.setattr(metapt, "rotate", lambda images, degrees: (seen.append(degrees), images)[1])
    torch.manual_seed(0)
    metapt.RotationMean(40.0)(torch.zeros(20_000, 1, 1, 1), 5.0)
    assert seen[0].mean().item() == pytest.approx(40, abs=0.2)
    assert seen[0].std().item() == pytest.approx(5, abs=0.2)


def test_an_example_weighs_less_the_further_its_label_is_from_the_best():
    torch.manual_seed(0)
    meta = metapt.ExampleWeights(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    images, labels = torch.rand(5, 1, 8, 8), torch.arange(5)
    by_label = torch.stack([meta(images, torch.full((5,), label)) for label in range(10)])
    torch.testing.assert_close(meta(images, labels), by_label[:5].diag())
    torch.testing.assert_close(by_label[0] / by_label[1], (meta.scores(images)[:, 0] - meta.scores(images)[:, 1]).exp())
    assert torch.equal(by_label.max(0).values, torch.ones(5))  # the label that it would give weighs 1
    nn.init.zeros_(meta.scores[1].weight)
    nn.init.zeros_(meta.scores[1].bias)
    assert torch.equal(meta(images, labels), torch.ones(5))  # as do all of them where nothing is known


@pytest.mark.parametrize("height", [8, 15, 16, 28])
def test_the_encoder_takes_images_of_any_size_and_drops_pixels_in_training_alone(height):
    encoder, images = metapt.SmallCNN(height, 4, 6, 0.5), torch.rand(3, 1, height, height)
    assert encoder(images).shape == (3, 6)
    assert not torch.equal(encoder(images), encoder(images))
    assert torch.equal(encoder.eval()(images), encoder(images))


def test_digits_are_split_into_stratified_disjoint_parts():
    domain, bundle = domain_of(NOISE, seed=3, noise=0.0), load_digits()
    assert domain.sizes == {part: len(labels) for part, labels in domain.labels.items()} == SIZES
    together = sorted(bytes(x.numpy()) for pixels in domain.pixels.values() for x in pixels)
    assert together == sorted(bytes(x.astype(np.uint8)) for x in bundle.images)
    shares = torch.from_numpy(bundle.target).bincount() / 1797
    label_of = {bytes(x.astype(np.uint8)): y for x, y in zip(bundle.images, bundle.target, strict=True)}
    for part, labels in domain.labels.items():
        assert (labels.bincount(minlength=10) - shares * len(labels)).abs().max() <= 2
        assert [label_of[bytes(x.numpy())] for x in domain.pixels[part]] == labels.tolist()
    again, other = (domain_of(NOISE, seed=seed, noise=0.0).pixels["test"] for seed in (3, 4))
    assert torch.equal(again, domain.pixels["test"])
    assert not torch.equal(other, domain.pixels["test"])
    inputs = domain.inputs("pretrain", torch.arange(1000))
    assert (inputs.shape, inputs.dtype) == ((1000, 1, 8, 8), torch.float32)
    assert (inputs.min(), inputs.max()) == (0, 1)


def test_reports_show_three_sizes_of_the_ft_set():
    assert metapt.finetune_sizes(domain_of(ROTATION, sizes="")) == [30, 100, 300]
    assert metapt.finetune_sizes(domain_of(NOISE, sizes="")) == [30, 100, 300]


def test_noise_spoils_the_stated_share_of_pretraining_labels_alone():
    noisy, clean = domain_of(NOISE, noise=0.3), domain_of(NOISE, noise=0.0)
    assert (noisy.noisy.sum(), clean.noisy.sum()) == (300, 0)
    assert torch.equal(noisy.labels["pretrain"] != clean.labels["pretrain"], noisy.noisy)
    spoiled = noisy.labels["pretrain"][noisy.noisy]
    assert set(spoiled.tolist()) == set(range(10))
    assert all(torch.equal(noisy.labels[part], clean.labels[part]) for part in ("finetune", "validation", "test"))
    assert torch.equal(noisy.pixels["pretrain"], clean.pixels["pretrain"])


def test_finetuning_of_the_noise_domains_begins_as_the_classifier_of_pretraining():
    domain = domain_of(NOISE)
    network, head, rows = domain.network().eval(), domain.head(), torch.arange(50)
    images = domain.inputs("test", rows)
    torch.testing.assert_close(head(network(images, features=True)), network(images)[:, -10:])
    assert network(images).std() > 0


def test_the_loss_of_the_noise_domains_is_the_mean_of_weight_times_cross_entropy():
    domain = domain_of(NOISE, dropout=0.0, phi_dropout=0.0)
    network, meta, rows = domain.network(), domain.meta(), torch.arange(7)
    loss = domain.pretrain_loss(network, meta, rows, 0.0, live=False)
    expected = 0.0
    for i in range(7):
        image, label = domain.pixels["pretrain"][i].float()[None] / 16, domain.labels["pretrain"][i]
        weight = (meta.scores(image)[0, label] - meta.scores(image).max()).exp()
        expected -= weight * network(image)[:, -10:].log_softmax(1)[0, label] / 7
    found = loss(dict(network.named_parameters()), dict(meta.named_parameters()))
    torch.testing.assert_close(found, expected)


def test_no_loss_reads_the_noise_flags():
    domain = domain_of(NOISE)
    domain.noisy = None
    learner = metapt.Training(domain, True).best
    learner.pretrain_step(0.0)
    learner.meta_step(0.0)
    assert learner.meta_steps == 1


@pytest.mark.parametrize(("target", "quarters"), [(90.0, 1), (180.0, 2)])
def test_finetuning_images_are_rotated_once_by_about_the_target(target, quarters):
    domain, upright = domain_of(ROTATION, target_deg=target), domain_of(NOISE, noise=0.0)
    for part in ("finetune", "validation", "test"):
        rotated, expected = domain.pixels[part], torch.rot90(upright.pixels[part].float(), quarters, (2, 3))
        error = (rotated - expected).abs().mean()
        assert 0 < error < 0.5  # of 16 grey levels: N(90°, 1°) is not quite 90°
        assert torch.equal(domain.inputs(part, torch.arange(3)), rotated[:3] / 16)
    assert torch.equal(domain.pixels["pretrain"], upright.pixels["pretrain"])


@pytest.mark.parametrize(("progress", "spread"), [(0.0, 60.0), (0.25, math.sqrt(60)), (0.5, 1.0), (1.0, 1.0)])
def test_pretraining_images_are_rotated_by_phi_with_a_spread_that_narrows(monkeypatch, progress, spread):
    domain, seen = domain_of(ROTATION, spread_deg=60.0, narrow=0.5), []
    network, meta, rows = domain.network(), domain.meta(), torch.arange(1000)
    spy(monkeypatch, metapt, "rotate", lambda *args: seen.append(args))
    loss = domain.pretrain_loss(network, meta, rows, progress, live=False)
    torch.manual_seed(0)
    loss(dict(network.named_parameters()), {"rotation_mean_deg": torch.tensor(7.0)})
    ((images, degrees),) = seen
    assert torch.equal(images, domain.inputs("pretrain", rows))
    assert degrees.mean().item() == pytest.approx(7, abs=spread / 8)
    assert degrees.std().item() == pytest.approx(spread, rel=0.1)


def test_phi_of_the_rotations_is_told_between_minus_and_plus_180_degrees():
    domain = domain_of(ROTATION, init_deg=12.0)
    assert domain.measure(domain.meta()) == {"rotation_mean_deg": 12.0}
    found = [domain.measure(metapt.RotationMean(degrees))["rotation_mean_deg"] for degrees in (190, -190, 540, 90)]
    assert found == pytest.approx([-170, 170, -180, 90])


def test_kicks_fade_until_the_particles_are_chosen_among():
    domain, spreads = domain_of(ROTATION, kick_deg=20.0, particles="3:0.5,1"), []
    for progress in (0.0, 0.25, 0.5, 0.9):
        torch.manual_seed(0)
        meta = metapt.RotationMean(0.0)
        domain.explore(meta, progress)
        spreads.append(meta.rotation_mean_deg.item())
    assert spreads == pytest.approx([spreads[0], spreads[0] / 4, 0, 0])
    torch.manual_seed(0)
    assert spreads[0] == pytest.approx(20 * torch.randn(()).item())


@pytest.mark.parametrize("name", [ROTATION, NOISE])
def test_hypergradients_of_the_domains_against_central_differences(name, monkeypatch):
    """v through the unrolled FT steps, and −vᵀ∇²_θφ L_PT, in float64, along random directions."""
    torch.set_default_dtype(torch.float64)
    monkeypatch.setattr(
        metapt.Images, "inputs", lambda self, part, index: self.pixels[part][index].double() / self.scale
    )
    try:
        # Dropped pixels are kinks by the thousand, at which differences are off.
        check_hypergradient(domain_of(name, unroll_lr=0.05, seed=1, **({"phi_dropout": 0.0} if name == NOISE else {})))
    finally:
        torch.set_default_dtype(torch.float32)


def check_hypergradient(domain):
    torch.manual_seed(0)
    network, head, meta, rows = (
        domain.network().double(),
        domain.head().double(),
        domain.meta().double(),
        torch.arange(40),
    )
    theta, psi, phi = (metapt.detached(module) for module in (network, head, meta))
    state = torch.get_rng_state()

    def seeded(loss):  # whoever calls it: the same dropout and the same rotations
        return lambda *params: (torch.set_rng_state(state), loss(*params))[1]

    pretrain = seeded(domain.pretrain_loss(network, meta, rows, 0.25, live=False))
    finetune = [domain.finetune_loss(network, head, "finetune", rows + 40 * k) for k in range(2)]
    validation = domain.finetune_loss(network, head, "validation", rows)
    unroll = metapt.Unroll(2, 0.05, eps=1e-2, optimizer="adam", scope="all")
    result = metapt.hypergradient(pretrain, finetune, validation, theta, psi, phi, unroll=unroll,
                                  solver=metapt.Solver("identity"))  # fmt: skip

    def along(params, direction, h):
        return {key: p + h * direction[key] for key, p in params.items()}

    def tuned(theta):
        """L_V after two steps of torch's own Adam."""
        leaves = [{key: p.clone().requires_grad_() for key, p in params.items()} for params in (theta, psi)]
        optimizer = torch.optim.Adam([p for params in leaves for p in params.values()], lr=0.05, eps=1e-2)
        for loss in finetune:
            optimizer.zero_grad()
            loss(*leaves).backward()
            optimizer.step()
        return validation(*leaves).item()

    def pull(phi):
        """vᵀ∇_θ L_PT(θ, φ)."""
        leaves = {key: p.clone().requires_grad_() for key, p in theta.items()}
        gradients = torch.autograd.grad(pretrain(leaves, phi), list(leaves.values()))
        return sum((g * v).sum().item() for g, v in zip(gradients, result.q.values(), strict=True))

    for _ in range(3):
        of_theta, of_phi = ({key: torch.randn_like(p) for key, p in params.items()} for params in (theta, phi))
        slope = (tuned(along(theta, of_theta, 1e-6)) - tuned(along(theta, of_theta, -1e-6))) / 2e-6
        assert flat(result.q) @ flat(of_theta) == pytest.approx(slope, rel=1e-4)
        slope = (pull(along(phi, of_phi, 1e-6)) - pull(along(phi, of_phi, -1e-6))) / 2e-6
        assert flat(result.phi) @ flat(of_phi) == pytest.approx(-slope, rel=1e-4)


def test_the_table_of_the_noise_domains_names_each_example():
    domain = domain_of(NOISE)
    meta = domain.meta()
    columns, rows = domain.table(meta)
    assert columns == ["example", "label", "weight"]
    assert [row[0] for row in rows] == list(range(1000))
    assert [row[1] for row in rows] == domain.labels["pretrain"].tolist()
    weights = meta(domain.inputs("pretrain", torch.arange(1000)), domain.labels["pretrain"])
    assert [row[2] for row in rows] == pytest.approx(weights.tolist())
    clean, noisy = weights[~domain.noisy].mean().item(), weights[domain.noisy].mean().item()
    facts = domain.facts(meta)
    assert [facts["mean_weight_clean"], facts["mean_weight_noisy"]] == pytest.approx([clean, noisy])
    ratio = pytest.approx(clean / noisy)
    assert facts["clean_to_noisy_weight_ratio"] == ratio == domain.measure(meta)["clean_to_noisy_weight_ratio"]
    assert domain_of(ROTATION).table(metapt.RotationMean(0.0)) is None


@pytest.mark.parametrize("noise", [0.0, 0.9999])
def test_with_no_label_wrong_or_none_right_there_is_no_ratio(noise):
    domain = domain_of(NOISE, noise=noise)
    facts = domain.facts(domain.meta())
    assert facts["clean_to_noisy_weight_ratio"] is None
    assert facts["mean_weight_noisy" if noise else "mean_weight_clean"] == pytest.approx(0.85, abs=0.1)
    assert domain.measure(domain.meta()) == {"clean_to_noisy_weight_ratio": None}


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4], ids=["alike", "spread", "nearly 0 and 1"])
def test_the_histogram_of_weights_holds_every_example(scale):
    from matplotlib.figure import Figure

    domain = domain_of(NOISE)
    meta, figure = domain.meta(), Figure()
    with torch.no_grad():
        meta.scores[1].weight.mul_(scale)
    domain.figures(meta)["weights.png"](figure)
    (axis,) = figure.axes
    bars = [sum(bar.get_height() for bar in container) for container in axis.containers]
    positive = domain.weights(meta) > 1e-12
    assert bars == [positive[~domain.noisy].sum(), positive[domain.noisy].sum()]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["right label", "wrong label"]


HISTORY = [{"step": step, "particle": p, "rotation_mean_deg": 10.0 * step, "clean_to_noisy_weight_ratio": 1.0 + step}
           for step in (1, 2, 3) for p in (0, 1) if p == 0 or step < 3]  # fmt: skip


@pytest.mark.parametrize(("name", "followed", "words"), [
    (ROTATION, "rotation_mean_deg", "mean rotation φ (degrees)"),
    (NOISE, "clean_to_noisy_weight_ratio", "weight of clean / of noisy examples"),
])  # fmt: skip
def test_the_figure_of_phi_says_what_the_domain_knows(name, followed, words):
    from matplotlib.figure import Figure

    figure = Figure()
    metapt.draw_phi(figure, HISTORY, 0, domain_of(name), followed)
    (axis,) = figure.axes
    by_label = {line.get_label(): line for line in axis.lines}
    assert by_label["learned φ"].get_xdata().tolist() == [1, 2, 3]
    assert by_label["other particles"].get_xdata().tolist() == [1, 2]
    assert axis.get_ylabel() == words
    if name == ROTATION:
        assert by_label["rotation of the FT images"].get_ydata() == [90.0, 90.0]
        assert axis.get_ylim() == (-180, 180)
    else:
        assert axis.get_yscale() == "log"


# MNIST


@pytest.fixture(scope="module")
def mnist(tmp_path_factory) -> Path:
    """A folder `data` with the published MNIST, prepared."""
    if not (SHARED / "mnist").is_dir() or not (ROOT / "data_scripts" / "mnist.py").exists():
        pytest.skip("needs the MNIST files and data_scripts/mnist.py")
    folder = tmp_path_factory.mktemp("mnist")
    code, _, err = main_in(folder, "download", "mnist", "--from", SHARED / "mnist")
    assert code == 0, err
    return folder / "data"


@pytest.mark.parametrize("name", ["mnist-rotation", "mnist-noise"])
def test_mnist_is_split_and_read_as_the_digits_are(mnist, name):
    kind = metapt.find_domain(name)
    domain = kind(kind.Settings(), torch.device("cpu"), mnist)
    assert domain.sizes == {"pretrain": 50_000, "finetune": 1000, "validation": 1000, "test": 10_000}
    assert metapt.finetune_sizes(domain) == [30, 100, 1000]
    for part in domain.sizes:
        assert domain.labels[part].bincount(minlength=10).min() > 0.08 * domain.sizes[part]
        inputs = domain.inputs(part, torch.arange(2))
        assert inputs.shape == (2, 1, 28, 28) and 0.9 < inputs.max() < 1.2  # bicubic resampling overshoots
    learner = metapt.Training(domain, True).best
    learner.pretrain_step(0.0)
    learner.meta_step(0.0)
    assert learner.meta_steps == 1


def test_mnist_that_is_missing_or_of_another_format_is_refused(tmp_path):
    kind = metapt.find_domain("mnist-rotation")
    with pytest.raises(metapt.BadInput, match="'python metapt.py download mnist' prepares"):
        kind(kind.Settings(), torch.device("cpu"), tmp_path)
    folder = tmp_path / "mnist" / "prepared"
    folder.mkdir(parents=True)
    (folder / "about.json").write_text(json.dumps({"format": "metapt graphs 1", "arrays": {}}))
    with pytest.raises(metapt.BadInput, match="format"):
        kind(kind.Settings(), torch.device("cpu"), tmp_path)
