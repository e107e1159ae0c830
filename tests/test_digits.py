"""Chapter 4 of metapt.py: rotations, how the digits are divided and turned, what is told of φ."""

import math

import numpy as np
import pytest
import torch
from differences import check_hypergradient, in_float64
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from tools import domain_of, spy

import metapt

ROTATION = "digits-rotation"
SIZES = {"pretrain": 1000, "finetune": 300, "validation": 250, "test": 247}


class Upright(metapt.Digits):
    """The digits as they are, for comparison: there is no φ."""

    def meta(self):
        raise NotImplementedError

    def pretrain_loss(self, network, meta, index, progress, live):
        raise NotImplementedError


# ------------------------------------------------------------------------------------------------
# Rotations


@pytest.mark.parametrize("quarters", [-1, 0, 1, 2, 5])
def test_rotation_by_quarter_turns_is_rot90(quarters):
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    turned = metapt.rotate(images, torch.full((2,), 90.0 * quarters, dtype=torch.float64))
    torch.testing.assert_close(turned, torch.rot90(images, quarters, (2, 3)))


def test_rotations_add_up_and_each_image_has_its_own():
    """Twice 45° is a quarter turn, up to what resampling a smooth image leaves; the other stays."""
    line = torch.linspace(-1, 1, 32, dtype=torch.float64)
    y, x = torch.meshgrid(line, line, indexing="ij")
    images = torch.exp(-8 * ((x - 0.2) ** 2 + (y + 0.3) ** 2)).expand(2, 1, 32, 32)
    degrees = torch.tensor([45.0, 0.0], dtype=torch.float64)
    twice = metapt.rotate(metapt.rotate(images, degrees), degrees)
    assert (twice[0] - torch.rot90(images[0], 1, (1, 2))).abs().max() < 0.05
    assert (twice[0] - images[0]).abs().max() > 0.05
    torch.testing.assert_close(twice[1], images[1])


def test_rotation_is_differentiable_in_degrees_and_in_the_image():
    images = torch.rand(2, 1, 6, 6, dtype=torch.float64, requires_grad=True)
    degrees = torch.tensor([12.3, -77.7], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(metapt.rotate, (images, degrees))
    assert torch.autograd.gradgradcheck(metapt.rotate, (images, degrees), check_batched_grad=False)


def test_phi_of_the_rotations_is_the_mean_of_their_normal_distribution(monkeypatch):
    asked = []
    spy(monkeypatch, metapt, "rotate", lambda images, degrees: asked.append(degrees))
    torch.manual_seed(0)
    metapt.RotationMean(40.0)(torch.zeros(20_000, 1, 1, 1), 5.0)
    assert asked[0].mean().item() == pytest.approx(40, abs=0.2)
    assert asked[0].std().item() == pytest.approx(5, abs=0.2)


# ------------------------------------------------------------------------------------------------
# The encoder, and the parts


@pytest.mark.parametrize("height", [8, 15, 16, 28])
def test_the_encoder_takes_images_of_any_size_and_drops_pixels_in_training_alone(height):
    encoder = metapt.SmallCNN(height, 4, 6, 0.5)
    images = torch.rand(3, 1, height, height)
    assert encoder(images).shape == (3, 6)
    assert not torch.equal(encoder(images), encoder(images))
    encoder.eval()
    assert torch.equal(encoder(images), encoder(images))


def test_digits_are_split_into_stratified_disjoint_parts():
    domain = domain_of(Upright, seed=3)
    bundle = load_digits()
    assert domain.sizes == {part: len(labels) for part, labels in domain.labels.items()} == SIZES
    together = sorted(bytes(x.numpy()) for pixels in domain.pixels.values() for x in pixels)
    originals = [bytes(image.astype(np.uint8)) for image in bundle.images]
    assert together == sorted(originals)

    shares = torch.from_numpy(bundle.target).bincount() / 1797
    label_of = dict(zip(originals, bundle.target, strict=True))
    for part, labels in domain.labels.items():
        assert (labels.bincount(minlength=10) - shares * len(labels)).abs().max() <= 2
        assert [label_of[bytes(x.numpy())] for x in domain.pixels[part]] == labels.tolist()

    again = domain_of(Upright, seed=3)
    other = domain_of(Upright, seed=4)
    assert torch.equal(again.pixels["test"], domain.pixels["test"])
    assert not torch.equal(other.pixels["test"], domain.pixels["test"])


def test_inputs_are_between_black_and_white():
    domain = domain_of(Upright)
    inputs = domain.inputs("pretrain", torch.arange(1000))
    assert (inputs.shape, inputs.dtype) == ((1000, 1, 8, 8), torch.float32)
    assert (inputs.min(), inputs.max()) == (0, 1)


def test_reports_show_three_sizes_of_the_ft_set():
    assert metapt.compared_sizes(domain_of(ROTATION, sizes="")) == [30, 100, 300]


# ------------------------------------------------------------------------------------------------
# The domain


@pytest.mark.parametrize(("target", "quarters"), [(90.0, 1), (180.0, 2)])
def test_finetuning_images_are_rotated_once_by_about_the_target(target, quarters):
    domain = domain_of(ROTATION, target_deg=target)
    upright = domain_of(Upright)
    for part in ("finetune", "validation", "test"):
        rotated = domain.pixels[part]
        expected = torch.rot90(upright.pixels[part].float(), quarters, (2, 3))
        error = (rotated - expected).abs().mean()
        assert 0 < error < 0.5  # of 16 grey levels: N(90°, 1°) is not quite 90°
        assert torch.equal(domain.inputs(part, torch.arange(3)), rotated[:3] / 16)
    assert torch.equal(domain.pixels["pretrain"], upright.pixels["pretrain"])


@pytest.mark.parametrize(
    ("progress", "spread"), [(0.0, 60.0), (0.25, math.sqrt(60)), (0.5, 1.0), (1.0, 1.0)]
)
def test_pretraining_images_are_rotated_by_phi_with_a_spread_that_narrows(
    monkeypatch, progress, spread
):
    domain = domain_of(ROTATION, spread_deg=60.0, narrow=0.5)
    network = domain.network()
    rows = torch.arange(1000)
    asked = []
    spy(monkeypatch, metapt, "rotate", lambda *arguments: asked.append(arguments))
    loss = domain.pretrain_loss(network, domain.meta(), rows, progress, live=False)
    torch.manual_seed(0)
    loss(dict(network.named_parameters()), {"rotation_mean_deg": torch.tensor(7.0)})
    ((images, degrees),) = asked
    assert torch.equal(images, domain.inputs("pretrain", rows))
    assert degrees.mean().item() == pytest.approx(7, abs=spread / 8)
    assert degrees.std().item() == pytest.approx(spread, rel=0.1)


def test_phi_of_the_rotations_is_told_between_minus_and_plus_180_degrees():
    domain = domain_of(ROTATION, init_deg=12.0)
    assert domain.measure(domain.meta()) == {"rotation_mean_deg": 12.0}
    told = []
    for degrees in (190, -190, 540, 90):
        told.append(domain.measure(metapt.RotationMean(degrees))["rotation_mean_deg"])
    assert told == pytest.approx([-170, 170, -180, 90])


def test_rotations_have_no_table_that_phi_could_be_made_from(tmp_path):
    domain = domain_of(ROTATION)
    assert domain.table(domain.meta()) is None
    with pytest.raises(metapt.BadInput, match="cannot be made from a table"):
        metapt.phi_from_table(tmp_path / "phi.csv", domain)


def test_hypergradients_of_the_rotations_against_central_differences():
    with in_float64():
        check_hypergradient(domain_of(ROTATION, unroll_lr=0.05, seed=1))


def test_the_figure_of_phi_shows_the_target_on_the_whole_circle():
    history = [{"step": step, "rotation_mean_deg": 10.0 * step} for step in (1, 2, 3)]
    figure = Figure()
    metapt.draw_phi(figure, history, domain_of(ROTATION), ["rotation_mean_deg"])
    (axis,) = figure.axes
    by_label = {line.get_label(): line for line in axis.lines}
    assert by_label["learned φ"].get_xdata().tolist() == [1, 2, 3]
    assert by_label["learned φ"].get_ydata().tolist() == [10, 20, 30]
    assert by_label["rotation of the FT images"].get_ydata() == [90.0, 90.0]
    assert axis.get_ylabel() == "mean rotation φ (degrees)"
    assert axis.get_ylim() == (-180, 180)
