"""Digits under an affine map: what each number of φ does, how targets are drawn, hypergradients,
its commands.
"""

import csv
import math

import numpy as np
import pytest
import torch
from differences import check_hypergradient, in_float64
from tools import domain_of, main_in, refused, spy, summary_of, training

import metapt
from bench.domains import affine

NUMBERS = ["rotation_deg", "shift_x_px", "shift_y_px", "log_scale_x", "log_scale_y", "shear_x"]
RANGES = [60, 1, 1, 0.3, 0.3, 0.3]
QUICK = ["--steps=12", "--meta-every=4", "--compare=1", "--measure-steps=8", "--sizes=30"]


def numbers_of(**given) -> torch.Tensor:
    """φ [6] with some numbers given and the others 0."""
    return torch.tensor([float(given.get(name, 0)) for name in NUMBERS], dtype=torch.float64)


def moved(images: torch.Tensor, **given) -> torch.Tensor:
    """The images, all under the map with these numbers."""
    return affine.transform(images, numbers_of(**given).expand(len(images), -1))


def blob(x: float = 0, y: float = 0, wide: float = 1, high: float = 1, lean: float = 0):
    """An image [1, 1, 32, 32] of a smooth blob around (x, y), in pixels from the centre.

    y points down.
    """
    line = torch.arange(32, dtype=torch.float64) - 31 / 2
    down, right = torch.meshgrid(line - y, line - x, indexing="ij")
    distance = ((right - lean * down) / wide) ** 2 + (down / high) ** 2
    return torch.exp(-distance / 32)[None, None]


# ------------------------------------------------------------------------------------------------
# Maps


def test_the_map_of_phi_zero_is_the_identity():
    images = torch.rand(3, 2, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(moved(images), images)
    mean = affine.AffineMean()
    assert mean.numbers().tolist() == [0] * 6
    assert list(affine.NUMBERS) == list(dict(mean.named_parameters())) == NUMBERS


@pytest.mark.parametrize("degrees", [-200.0, 17.0, 90.0])
def test_rotation_is_that_of_metapt(degrees):
    images = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    expected = metapt.rotate(images, torch.full((2,), degrees, dtype=torch.float64))
    torch.testing.assert_close(moved(images, rotation_deg=degrees), expected)


def test_shifts_of_whole_pixels_move_pixels_right_and_down():
    images = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    right = moved(images, shift_x_px=1)
    down = moved(images, shift_y_px=2)
    torch.testing.assert_close(right[..., 1:], images[..., :-1])
    torch.testing.assert_close(down[..., 2:, :], images[..., :-2, :])
    assert right[..., 0].abs().max() < 1e-12
    assert down[..., :2, :].abs().max() < 1e-12


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"log_scale_x": 0.3}, {"wide": math.exp(0.3)}),
        ({"log_scale_y": -0.3}, {"high": math.exp(-0.3)}),
        ({"shear_x": 0.4}, {"lean": 0.4}),
        ({"shift_x_px": 1.5, "shift_y_px": -0.5}, {"x": 1.5, "y": -0.5}),
    ],
)
def test_each_number_does_what_its_name_says(given, expected):
    image = moved(blob(), **given)
    assert (image - blob(**expected)).abs().max() < 0.01
    assert (image - blob()).abs().max() > 0.1


def test_scales_come_first_then_shear_then_rotation_then_shifts():
    stages = [
        {"log_scale_x": 0.2, "log_scale_y": -0.1},
        {"shear_x": 0.3},
        {"rotation_deg": 40},
        {"shift_x_px": 2},
    ]
    together = {}
    matrix = torch.eye(2, dtype=torch.float64)
    shift = torch.zeros(2, dtype=torch.float64)
    for given in stages:
        turn, aside = affine.affine(numbers_of(**given))
        matrix = turn @ matrix
        shift = turn @ shift + aside
        together |= given
    torch.testing.assert_close(affine.affine(numbers_of(**together)), (matrix, shift))


def test_maps_are_differentiable_and_each_image_has_its_own():
    images = torch.rand(2, 1, 5, 5, dtype=torch.float64, requires_grad=True)
    second = numbers_of(rotation_deg=20, shift_x_px=0.3, log_scale_x=0.2, shear_x=-0.1)
    numbers = torch.stack([numbers_of(), second])
    torch.testing.assert_close(affine.transform(images, numbers)[0], images[0])
    assert torch.autograd.gradcheck(affine.transform, (images, numbers.requires_grad_()))


def test_phi_is_the_mean_of_the_maps_that_pretraining_images_get(monkeypatch):
    asked = []
    spy(monkeypatch, affine, "transform", lambda images, numbers: asked.append(numbers))
    torch.manual_seed(0)
    mean = torch.tensor([10, 1, -1, 0.1, 0.2, 0.3])
    spread = torch.tensor([5, 0.5, 0.4, 0.3, 0.2, 0.1])
    affine.AffineMean(mean.tolist())(torch.zeros(20_000, 1, 1, 1), spread)
    assert ((asked[0].mean(0) - mean) / spread).abs().max() < 0.05
    torch.testing.assert_close(asked[0].std(0), spread, rtol=0.03, atol=0)


# ------------------------------------------------------------------------------------------------
# The domain


@pytest.mark.parametrize(("progress", "share"), [(0.0, 0.5), (0.25, 0.1), (0.5, 0.02), (1.0, 0.02)])
def test_the_spread_of_the_maps_narrows_in_units_of_the_ranges(progress, share, monkeypatch):
    domain = domain_of(affine.DigitsAffine, narrow=0.5, spread=0.5)
    network = domain.network()
    meta = domain.meta()
    spreads = []
    spy(monkeypatch, affine.AffineMean, "forward", lambda self, _, spread: spreads.append(spread))
    loss = domain.pretrain_loss(network, meta, torch.arange(9), progress, live=False)
    loss(metapt.detached(network), metapt.detached(meta))
    ranges = torch.tensor(RANGES)
    torch.testing.assert_close(spreads, [share * ranges])
    rates = torch.tensor(list(domain.phi_rates(meta).values()))
    torch.testing.assert_close(rates, domain.settings.meta_lr * ranges)


def test_targets_are_drawn_by_the_seed_within_the_ranges_and_finetuning_images_lie_there():
    domains = [domain_of(affine.DigitsAffine, seed=seed) for seed in range(5)]
    targets = torch.stack([domain.target for domain in domains]) / torch.tensor(RANGES)
    assert targets.abs().max() <= 1
    assert targets.std(0).min() > 0.1
    domain = domains[3]
    assert torch.equal(domain_of(affine.DigitsAffine, seed=3).target, domain.target)

    plain = domain_of("digits-noise", seed=3, noise=0.0)
    assert torch.equal(domain.pixels["pretrain"], plain.pixels["pretrain"])
    for part in ("finetune", "validation", "test"):
        images = plain.pixels[part].float()
        expected = affine.transform(images, domain.target.expand(len(images), -1))
        error = (domain.pixels[part] - expected).abs().mean()
        # Of 16 grey levels.
        assert 0 < error < 0.5 < (images - expected).abs().mean()


def test_phi_that_is_drawn_is_a_state_dict_of_the_same_ranges_and_not_the_target():
    domain = domain_of(affine.DigitsAffine, seed=3)
    meta = domain.meta()
    random = np.random.default_rng(3)
    draws = [domain.draw_phi(random) for _ in range(300)]
    meta.load_state_dict(draws[0])
    ranges = torch.tensor(RANGES)
    drawn = torch.tensor([list(phi.values()) for phi in draws]) / ranges
    assert 0.95 < drawn.max() <= 1
    assert -1 <= drawn.min() < -0.95
    assert (drawn.std(0) - 1 / math.sqrt(3)).abs().max() < 0.06
    assert (drawn - domain.target / ranges).abs().amax(1).min() > 0.01
    meta.load_state_dict(domain.oracle_phi())
    expected = {"map_error_px": 0, **dict(zip(NUMBERS, domain.target.tolist(), strict=True))}
    assert domain.measure(meta) == pytest.approx(expected)


def test_the_distance_to_the_target_is_in_pixels():
    domain = domain_of(affine.DigitsAffine)
    beside = domain.target + torch.tensor([0, 3.0, -4.0, 0, 0, 0])
    measured = domain.measure(affine.AffineMean(beside.tolist()))
    assert next(iter(measured.items())) == ("map_error_px", pytest.approx(5, rel=1e-5))

    domain.target = torch.zeros(6)
    line = np.arange(8) - 3.5
    distances = np.hypot(*np.meshgrid(line, line)).mean()
    turned = affine.AffineMean([180, 0, 0, 0, 0, 0])
    assert domain.map_error(turned) == pytest.approx(2 * distances, rel=1e-5)
    wider = affine.AffineMean([0, 0, 0, math.log(2), 0, 0])
    assert domain.map_error(wider) == pytest.approx(np.abs(line).mean(), rel=1e-5)


def test_no_loss_before_finetuning_reads_the_target():
    run = training(affine.DigitsAffine)
    run.domain.target = None
    run.pretrain_step()
    run.meta_step()
    assert run.meta_steps == 1


@pytest.mark.parametrize("log_loss", [False, True])
def test_the_meta_step_has_the_logarithm_of_the_loss_that_pretraining_lowers(log_loss):
    domain = domain_of(affine.DigitsAffine, dropout=0.0, log_loss=log_loss)
    network = domain.network()
    meta = domain.meta()
    values = []
    for live in (True, False):
        loss = domain.pretrain_loss(network, meta, torch.arange(50), 0.5, live=live)
        torch.manual_seed(0)  # The same maps.
        values.append(loss(metapt.detached(network), metapt.detached(meta)))
    of_pretraining, of_meta_step = values
    assert of_pretraining > 1
    expected = of_pretraining.log() if log_loss else of_pretraining
    torch.testing.assert_close(of_meta_step, expected)


def test_ranks_may_share_the_plain_loss_alone():
    """The logarithm of a mean is not the mean of the parts' logarithms."""
    assert not domain_of(affine.DigitsAffine).mean_over_examples
    assert domain_of(affine.DigitsAffine, log_loss=False).mean_over_examples


def test_the_published_procedure_has_the_plain_loss():
    assert affine.DigitsAffine.presets["paper"]["log_loss"] is False


def test_hypergradients_against_central_differences():
    with in_float64():
        check_hypergradient(domain_of(affine.DigitsAffine, unroll_lr=0.05, seed=0))


def test_phi_from_a_table_is_the_inverse_of_the_table():
    domain = domain_of(affine.DigitsAffine)
    meta = affine.AffineMean([11, 0.2, -0.3, 0.04, -0.05, 0.06])
    _, rows = domain.table(meta)
    phi = domain.phi_from_table([row[-1] for row in rows])
    assert list(phi) == NUMBERS
    other = domain.meta()
    other.load_state_dict(phi)
    assert other.numbers().tolist() == meta.numbers().tolist()


# ------------------------------------------------------------------------------------------------
# Commands


def read_table(path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_a_run_says_what_was_learned_and_what_the_target_is(tmp_path):
    summary = summary_of(tmp_path, "meta", "digits-affine", *QUICK, "--out=run")
    assert summary["domain"] == "digits-affine"
    assert summary["meta_steps"] > 0
    assert list(summary["phi"]) == NUMBERS
    assert {name: summary[name] for name in NUMBERS} == summary["phi"]
    columns, *rows = read_table(tmp_path / "run" / "phi.csv")
    assert columns == ["number", "target", "learned"]
    assert [row[0] for row in rows] == NUMBERS
    for (name, target, learned), range_ in zip(rows, RANGES, strict=True):
        assert float(learned) == pytest.approx(summary["phi"][name])
        assert 0 < abs(float(learned)) < range_
        assert float(target) == pytest.approx(summary[f"target_{name}"])
        assert abs(float(target)) <= range_
    figures = {path.name for path in (tmp_path / "run").glob("*.png")}
    assert figures == {"phi.png", "losses.png", "comparison.png", "digits.png"}
    frozen = ["--steps=12", "--compare=0", "--phi=run", "--out=frozen"]
    assert main_in(tmp_path, "pretrain", "digits-affine", *frozen)[0] == 0

    # φ by hand: the table with its last column altered.
    by_hand = [[row[0], 0.125] for row in rows]
    with (tmp_path / "by_hand.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["number", "mine"], *by_hand])
    frozen = ["--steps=12", "--compare=0", "--phi=by_hand.csv", "--out=mine"]
    assert main_in(tmp_path, "pretrain", "digits-affine", *frozen)[0] == 0
    _, *rows = read_table(tmp_path / "mine" / "phi.csv")
    assert [float(row[-1]) for row in rows] == [0.125] * 6


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--range-deg=0", "--range-deg is 0.0, expected positive"),
        ("--spread=0.01", "--spread is 0.01, expected 0.02 or more"),
        ("--range-shear=nan", "--range-shear is nan, expected a finite number"),
        ("--narrow=2", "--narrow is 2.0, expected"),
        ("--spread-deg=3", "no such option: --spread-deg"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_one_line(tmp_path, given, message):
    assert message in refused(tmp_path, "meta", "digits-affine", given)
    assert list(tmp_path.iterdir()) == []
