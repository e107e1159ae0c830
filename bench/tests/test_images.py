"""Digits with wrong labels, and MNIST in the place of the digits."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import write_mnist
from differences import check_hypergradient, in_float64
from matplotlib.figure import Figure
from tools import SHARED, domain_of, main_in, refused, training
from torch import nn

import metapt
from bench.domains import images as of_images

NOISE = "digits-noise"
MNIST = ("mnist-rotation", "mnist-noise")


# ------------------------------------------------------------------------------------------------
# Wrong labels


def test_an_example_weighs_less_the_further_its_label_is_from_the_best():
    torch.manual_seed(0)
    meta = of_images.ExampleWeights(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    images = torch.rand(5, 1, 8, 8)
    labels = torch.arange(5)
    # [labels, images]
    by_label = torch.stack([meta(images, torch.full((5,), label)) for label in range(10)])
    torch.testing.assert_close(meta(images, labels), by_label[:5].diag())
    scores = meta.scores(images)
    torch.testing.assert_close(by_label[0] / by_label[1], (scores[:, 0] - scores[:, 1]).exp())
    # The label that it would give weighs 1, as do all of them where nothing is known.
    assert torch.equal(by_label.max(0).values, torch.ones(5))
    nn.init.zeros_(meta.scores[1].weight)
    nn.init.zeros_(meta.scores[1].bias)
    assert torch.equal(meta(images, labels), torch.ones(5))


def test_noise_spoils_the_stated_share_of_pretraining_labels_alone():
    noisy = domain_of(NOISE, noise=0.3)
    clean = domain_of(NOISE, noise=0.0)
    assert (noisy.noisy.sum(), clean.noisy.sum()) == (300, 0)
    assert torch.equal(noisy.labels["pretrain"] != clean.labels["pretrain"], noisy.noisy)
    spoiled = noisy.labels["pretrain"][noisy.noisy]
    assert set(spoiled.tolist()) == set(range(10))
    for part in ("finetune", "validation", "test"):
        assert torch.equal(noisy.labels[part], clean.labels[part])
    assert torch.equal(noisy.pixels["pretrain"], clean.pixels["pretrain"])


def test_finetuning_of_the_noise_domains_begins_as_the_classifier_of_pretraining():
    domain = domain_of(NOISE)
    network = domain.network().eval()
    head = domain.head()
    images = domain.inputs("test", torch.arange(50))
    torch.testing.assert_close(head(network(images, features=True)), network(images)[:, -10:])
    assert network(images).std() > 0


def test_the_loss_of_the_noise_domains_is_the_mean_of_weight_times_cross_entropy():
    domain = domain_of(NOISE, dropout=0.0, phi_dropout=0.0)
    network = domain.network()
    meta = domain.meta()
    loss = domain.pretrain_loss(network, meta, torch.arange(7), 0.0, live=False)
    expected = 0.0
    for i in range(7):
        image = domain.pixels["pretrain"][i].float()[None] / 16
        label = domain.labels["pretrain"][i]
        scores = meta.scores(image)
        weight = (scores[0, label] - scores.max()).exp()
        expected -= weight * network(image)[:, -10:].log_softmax(1)[0, label] / 7
    value = loss(dict(network.named_parameters()), dict(meta.named_parameters()))
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize(("live", "alike"), [(True, True), (False, False)])
def test_phi_drops_pixels_in_meta_steps_alone(live, alike):
    domain = domain_of(NOISE, dropout=0.0, phi_dropout=0.5)
    network = domain.network()
    meta = domain.meta()
    loss = domain.pretrain_loss(network, meta, torch.arange(50), 0.0, live=live)
    theta = metapt.detached(network)
    phi = metapt.detached(meta)
    assert torch.equal(loss(theta, phi), loss(theta, phi)) == alike


def test_no_loss_reads_the_noise_flags():
    run = training(NOISE)
    run.domain.noisy = None
    run.pretrain_step()
    run.meta_step()
    assert run.meta_steps == 1


def test_hypergradients_of_example_weights_against_central_differences():
    with in_float64():
        # Dropped pixels are kinks by the thousand, at which differences are off.
        check_hypergradient(domain_of(NOISE, unroll_lr=0.05, seed=1, phi_dropout=0.0))


def test_reports_show_three_sizes_of_the_ft_set():
    assert metapt.compared_sizes(domain_of(NOISE, sizes="")) == [30, 100, 300]


# ------------------------------------------------------------------------------------------------
# What is told of the weights


def test_the_table_of_the_noise_domains_names_each_example():
    domain = domain_of(NOISE)
    meta = domain.meta()
    columns, rows = domain.table(meta)
    assert columns == ["example", "label", "weight"]
    assert [row[0] for row in rows] == list(range(1000))
    assert [row[1] for row in rows] == domain.labels["pretrain"].tolist()
    inputs = domain.inputs("pretrain", torch.arange(1000))
    weights = meta(inputs, domain.labels["pretrain"])
    assert [row[2] for row in rows] == pytest.approx(weights.tolist())

    clean = weights[~domain.noisy].mean().item()
    noisy = weights[domain.noisy].mean().item()
    facts = domain.facts(meta)
    assert facts["mean_weight_clean"] == pytest.approx(clean)
    assert facts["mean_weight_noisy"] == pytest.approx(noisy)
    assert facts["clean_to_noisy_weight_ratio"] == pytest.approx(clean / noisy)
    assert domain.measure(meta) == pytest.approx({"clean_to_noisy_weight_ratio": clean / noisy})


def test_no_network_is_made_from_a_table_of_weights(tmp_path):
    """The table has a weight an example, φ is a network: the command says so, in one line."""
    domain = domain_of(NOISE)
    columns, rows = domain.table(domain.meta())
    with (tmp_path / "phi.csv").open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    said = refused(tmp_path, "pretrain", NOISE, "--phi=phi.csv")
    assert "the φ of DigitsNoise cannot be made from a table; give a run or phi.pt" in said


@pytest.mark.parametrize("noise", [0.0, 0.9999])
def test_with_no_label_wrong_or_none_right_there_is_no_ratio(noise):
    domain = domain_of(NOISE, noise=noise)
    facts = domain.facts(domain.meta())
    there = "mean_weight_noisy" if noise else "mean_weight_clean"
    assert facts["clean_to_noisy_weight_ratio"] is None
    assert facts[there] == pytest.approx(0.85, abs=0.1)
    assert domain.measure(domain.meta()) == {"clean_to_noisy_weight_ratio": None}


@pytest.mark.parametrize("scale", [1.0, 1e4], ids=["spread", "nearly 0 and 1"])
def test_the_histogram_of_weights_holds_every_example(scale):
    domain = domain_of(NOISE)
    meta = domain.meta()
    figure = Figure()
    with torch.no_grad():
        meta.scores[1].weight.mul_(scale)
    domain.figures(meta)["weights.png"](figure)
    (axis,) = figure.axes
    # An outline: the heights of its bins, and 0 at both ends.
    counts = [0, 0]
    for outline, group in zip(axis.patches, (1, 0), strict=True):
        heights = outline.get_xy()[1:-1:2, 1]
        counts[group] = heights.sum()
    assert counts == [(~domain.noisy).sum(), domain.noisy.sum()]
    names = [text.get_text() for text in axis.get_legend().get_texts()]
    assert names == ["right label", "wrong label"]


def test_where_all_weights_are_alike_the_figure_says_so_in_a_sentence():
    domain = domain_of(NOISE)
    meta = domain.meta()
    figure = Figure()
    with torch.no_grad():
        meta.scores[1].weight.zero_()
        meta.scores[1].bias.zero_()
    domain.figures(meta)["weights.png"](figure)
    assert not figure.axes
    (text,) = figure.texts
    expected = "φ tells no PT example from another: all 1,000 have the weight 1"
    assert text.get_text() == expected


def test_the_figure_of_phi_has_a_logarithmic_axis():
    name = "clean_to_noisy_weight_ratio"
    history = [{"step": step, name: 1.0 + step} for step in (1, 2, 3)]
    figure = Figure()
    metapt.draw_phi(figure, history, domain_of(NOISE), [name])
    (axis,) = figure.axes
    (line,) = axis.lines
    assert line.get_xdata().tolist() == [1, 2, 3]
    assert axis.get_ylabel() == "weight of clean / of noisy examples"
    assert axis.get_yscale() == "log"


# ------------------------------------------------------------------------------------------------
# MNIST


def of_kind(name: str, data: Path) -> metapt.Domain:
    kind = metapt.find_domain(name)
    return kind(kind.Settings(), torch.device("cpu"), data)


@pytest.fixture(scope="module")
def made_up(tmp_path_factory) -> Path:
    """A folder `data` with images of noise, prepared as MNIST is."""
    data = tmp_path_factory.mktemp("made_up")
    write_mnist(data / "mnist" / "prepared", np.arange(60_000) % 10)
    return data


def test_mnist_takes_the_place_of_the_digits(made_up):
    """Its own parts, all different, with as many of each digit; the test set is as published."""
    folder = made_up / "mnist" / "prepared"
    images = np.load(folder / "train_images.npy")
    labels = np.load(folder / "train_labels.npy")
    label_of = {bytes(x): y for x, y in zip(images, labels, strict=True)}
    domain = of_kind("mnist-noise", made_up)
    right = ~domain.noisy
    shown = []
    for part in ("pretrain", "finetune", "validation"):
        pixels = [bytes(x) for x in domain.pixels[part].numpy()]
        expected = torch.tensor([label_of[x] for x in pixels])
        if part == "pretrain":
            assert torch.equal(domain.labels[part][right], expected[right])
        else:
            assert torch.equal(domain.labels[part], expected)
        assert expected.bincount().tolist() == [domain.sizes[part] // 10] * 10
        shown += pixels
    assert len(shown) == len(set(shown)) == 52_000
    test_images = torch.from_numpy(np.load(folder / "test_images.npy"))
    assert torch.equal(domain.pixels["test"][:, 0], test_images)
    test_labels = np.load(folder / "test_labels.npy")
    assert domain.labels["test"].tolist() == test_labels.tolist()


def test_mnist_has_its_own_scale_width_and_threads(made_up):
    domain = of_kind("mnist-noise", made_up)
    inputs = domain.inputs("pretrain", torch.arange(100))
    assert (inputs.min(), inputs.max()) == (0, 1)
    network = domain.network()
    assert network(inputs, features=True).shape == (100, 64 + 10)
    assert (domain.threads, domain_of(NOISE).threads) == (None, 1)


def changed(made_up: Path, data: Path, name: str, values: np.ndarray) -> Path:
    """The same prepared folder with another array under one of its names."""
    folder = data / "mnist" / "prepared"
    folder.mkdir(parents=True)
    for path in (made_up / "mnist" / "prepared").iterdir():
        if path.name != f"{name}.npy":
            (folder / path.name).symlink_to(path)
    np.save(folder / f"{name}.npy", values)
    return data


def test_fewer_than_a_hundred_of_a_digit_are_refused(made_up, tmp_path):
    labels = np.arange(60_000) % 10
    labels[np.flatnonzero(labels == 7)[99:]] = 8
    data = changed(made_up, tmp_path, "train_labels", labels.astype(np.uint8))
    with pytest.raises(metapt.BadInput, match="the labels are not 100 or more of each digit$"):
        of_kind("mnist-rotation", data)


@pytest.mark.parametrize("array", ["train_images", "test_labels"])
def test_an_array_of_mnist_of_another_shape_is_refused(made_up, tmp_path, array):
    data = changed(made_up, tmp_path, array, np.zeros(5, np.uint8))
    with pytest.raises(metapt.BadInput, match=f"{array}.npy"):
        of_kind("mnist-rotation", data)


def test_mnist_that_is_missing_or_of_another_format_is_refused(tmp_path):
    with pytest.raises(metapt.BadInput, match="'python metapt.py download mnist' prepares"):
        of_kind("mnist-rotation", tmp_path)
    folder = tmp_path / "mnist" / "prepared"
    folder.mkdir(parents=True)
    (folder / "about.json").write_text(json.dumps({"format": "metapt graphs 1", "arrays": {}}))
    with pytest.raises(metapt.BadInput, match="format"):
        of_kind("mnist-rotation", tmp_path)


@pytest.fixture(scope="module")
def mnist(tmp_path_factory) -> Path:
    """A folder `data` with the published MNIST, prepared."""
    if not (SHARED / "mnist").is_dir():
        pytest.skip("needs the MNIST files")
    folder = tmp_path_factory.mktemp("mnist")
    code, _, err = main_in(folder, "download", "mnist", "--from", SHARED / "mnist")
    assert code == 0, err
    return folder / "data"


@pytest.mark.parametrize("name", MNIST)
def test_the_published_mnist_is_split_and_read_as_the_digits_are(mnist, name):
    domain = of_kind(name, mnist)
    sizes = {"pretrain": 50_000, "finetune": 1000, "validation": 1000, "test": 10_000}
    assert domain.sizes == sizes
    assert metapt.compared_sizes(domain) == [30, 100, 1000]
    for part in domain.sizes:
        assert domain.labels[part].bincount(minlength=10).min() > 0.08 * domain.sizes[part]
        inputs = domain.inputs(part, torch.arange(2))
        assert inputs.shape == (2, 1, 28, 28)
        assert 0.9 < inputs.max() < 1.2  # Bicubic resampling overshoots.
    run = metapt.Training(domain, True)
    run.pretrain_step()
    run.meta_step()
    assert run.meta_steps == 1
