"""Digits under an affine map: what each number of φ does, how targets are drawn, hypergradients, its commands."""

import csv
import math

import numpy as np
import pytest
import torch
from test_images import check_hypergradient
from tools import domain_of, find_domain, main_in, refused, summary_of

import metapt

NAME = "digits-affine"
NUMBERS = ["rotation_deg", "shift_x_px", "shift_y_px", "log_scale_x", "log_scale_y", "shear_x"]
RANGES = [60, 1, 1, 0.3, 0.3, 0.3]
QUICK = ["--steps=12", "--meta-every=4", "--compare=1", "--measure-steps=8", "--sizes=30"]


@pytest.fixture(scope="module")
def affine():
    return __import__(find_domain(NAME).__module__)


def of(**given) -> torch.Tensor:
    """φ [6] with some numbers given and the others 0."""
    return torch.tensor([float(given.get(name, 0)) for name in NUMBERS], dtype=torch.float64)


def moved(affine, images: torch.Tensor, **given) -> torch.Tensor:
    return affine.transform(images, of(**given).expand(len(images), -1))


def blob(x: float = 0, y: float = 0, wide: float = 1, high: float = 1, lean: float = 0, size: int = 32) -> torch.Tensor:
    """A smooth blob around (x, y), in pixels from the centre of an image [1, 1, size, size]; y points down."""
    line = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    down, right = torch.meshgrid(line - y, line - x, indexing="ij")
    return torch.exp(-(((right - lean * down) / wide) ** 2 + (down / high) ** 2) / 32)[None, None]


def test_the_map_of_phi_zero_is_the_identity(affine):
    images = torch.rand(3, 2, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(moved(affine, images), images)
    assert affine.AffineMean().numbers().tolist() == [0] * 6
    assert list(affine.NUMBERS) == list(dict(affine.AffineMean().named_parameters())) == NUMBERS


@pytest.mark.parametrize("degrees", [-200.0, 17.0, 90.0])
def test_rotation_is_that_of_metapt(affine, degrees):
    images = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    expected = metapt.rotate(images, torch.full((2,), degrees, dtype=torch.float64))
    torch.testing.assert_close(moved(affine, images, rotation_deg=degrees), expected)


def test_shifts_of_whole_pixels_move_pixels_right_and_down(affine):
    images = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    right, down = moved(affine, images, shift_x_px=1), moved(affine, images, shift_y_px=2)
    torch.testing.assert_close(right[..., 1:], images[..., :-1])
    torch.testing.assert_close(down[..., 2:, :], images[..., :-2, :])
    assert right[..., 0].abs().max() < 1e-12 > down[..., :2, :].abs().max()


@pytest.mark.parametrize(("given", "expected"), [
    ({"log_scale_x": 0.3}, {"wide": math.exp(0.3)}), ({"log_scale_y": -0.3}, {"high": math.exp(-0.3)}),
    ({"shear_x": 0.4}, {"lean": 0.4}), ({"shift_x_px": 1.5, "shift_y_px": -0.5}, {"x": 1.5, "y": -0.5}),
])  # fmt: skip
def test_each_number_does_what_its_name_says(affine, given, expected):
    found, wanted = moved(affine, blob(), **given), blob(**expected)
    assert 10 * (found - wanted).abs().max() < 0.1 < (found - blob()).abs().max()


def test_scales_come_first_then_shear_then_rotation_then_shifts(affine):
    stages = [{"log_scale_x": 0.2, "log_scale_y": -0.1}, {"shear_x": 0.3}, {"rotation_deg": 40}, {"shift_x_px": 2}]
    matrix, shift = torch.eye(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for given in stages:
        turn, aside = affine.affine(of(**given))
        matrix, shift = turn @ matrix, turn @ shift + aside
    together = affine.affine(of(**{name: value for given in stages for name, value in given.items()}))
    torch.testing.assert_close(together, (matrix, shift))


def test_maps_are_differentiable_and_each_image_has_its_own(affine):
    images = torch.rand(2, 1, 5, 5, dtype=torch.float64, requires_grad=True)
    numbers = torch.stack([of(), of(rotation_deg=20, shift_x_px=0.3, log_scale_x=0.2, shear_x=-0.1)])
    torch.testing.assert_close(affine.transform(images, numbers)[0], images[0])
    assert torch.autograd.gradcheck(affine.transform, (images, numbers.requires_grad_()))


def test_phi_is_the_mean_of_the_maps_that_pretraining_images_get(affine, monkeypatch):
    seen = []
    monkeypatch.setattr(affine, "transform", lambda images, numbers: (seen.append(numbers), images)[1])
    torch.manual_seed(0)
    mean, spread = torch.tensor([10, 1, -1, 0.1, 0.2, 0.3]), torch.tensor([5, 0.5, 0.4, 0.3, 0.2, 0.1])
    affine.AffineMean(mean.tolist())(torch.zeros(20_000, 1, 1, 1), spread)
    assert ((seen[0].mean(0) - mean) / spread).abs().max() < 0.05
    torch.testing.assert_close(seen[0].std(0), spread, rtol=0.03, atol=0)


@pytest.mark.parametrize(("progress", "share"), [(0.0, 0.5), (0.25, 0.1), (0.5, 0.02), (1.0, 0.02)])
def test_the_spread_of_the_maps_narrows_in_units_of_the_ranges(progress, share, monkeypatch):
    domain, seen = domain_of(find_domain(NAME), narrow=0.5, spread=0.5), []
    network, meta = domain.network(), domain.meta()
    monkeypatch.setattr(
        metapt,
        "call",
        lambda module, params, *inputs, **options: (seen.append(inputs), module(inputs[0], *inputs[1:]))[1],
    )
    domain.pretrain_loss(network, meta, torch.arange(9), progress, live=False)({}, {})
    torch.testing.assert_close(seen[0][1], share * torch.tensor(RANGES))
    torch.testing.assert_close(
        torch.tensor(list(domain.phi_rates(meta).values())), domain.settings.meta_lr * torch.tensor(RANGES)
    )


def test_targets_are_drawn_by_the_seed_within_the_ranges_and_finetuning_images_lie_there(affine):
    kind = find_domain(NAME)
    domains = [domain_of(kind, seed=seed) for seed in range(5)]
    targets = torch.stack([domain.target for domain in domains]) / torch.tensor(RANGES)
    assert targets.abs().max() <= 1 and targets.std(0).min() > 0.1
    assert torch.equal(domain_of(kind, seed=3).target, domains[3].target)
    plain = domain_of("digits-noise", seed=3, noise=0.0)
    assert torch.equal(domains[3].pixels["pretrain"], plain.pixels["pretrain"])
    for part in ("finetune", "validation", "test"):
        images = plain.pixels[part].float()
        expected = affine.transform(images, domains[3].target.expand(len(images), -1))
        error = (domains[3].pixels[part] - expected).abs().mean()
        assert 0 < error < 0.5 < (images - expected).abs().mean()  # of 16 grey levels


def test_phi_that_is_drawn_is_a_state_dict_of_the_same_ranges_and_not_the_target():
    domain = domain_of(find_domain(NAME), seed=3)
    meta, random = domain.meta(), np.random.default_rng(3)
    draws = [domain.draw_phi(random) for _ in range(300)]
    meta.load_state_dict(draws[0])
    drawn = torch.tensor([list(phi.values()) for phi in draws]) / torch.tensor(RANGES)
    assert 0.95 < drawn.max() <= 1 and -0.95 > drawn.min() >= -1
    assert (drawn.std(0) - 1 / math.sqrt(3)).abs().max() < 0.06
    assert (drawn - domain.target / torch.tensor(RANGES)).abs().amax(1).min() > 0.01
    meta.load_state_dict(domain.oracle_phi())
    assert domain.measure(meta) == pytest.approx(
        {"map_error_px": 0, **dict(zip(NUMBERS, domain.target.tolist(), strict=True))}
    )


def test_the_distance_to_the_target_is_in_pixels(affine):
    domain = domain_of(find_domain(NAME))
    target = domain.target.clone()
    aside = affine.AffineMean((target + torch.tensor([0, 3.0, -4.0, 0, 0, 0])).tolist())
    assert next(iter(domain.measure(aside).items())) == ("map_error_px", pytest.approx(5, rel=1e-5))
    domain.target = torch.zeros(6)
    line = np.arange(8) - 3.5
    distances = np.hypot(*np.meshgrid(line, line)).mean()
    turned, wider = affine.AffineMean([180, 0, 0, 0, 0, 0]), affine.AffineMean([0, 0, 0, math.log(2), 0, 0])
    assert domain.map_error(turned) == pytest.approx(2 * distances, rel=1e-5)
    assert domain.map_error(wider) == pytest.approx(np.abs(line).mean(), rel=1e-5)


def test_no_loss_before_finetuning_reads_the_target():
    domain = domain_of(find_domain(NAME))
    domain.target = None
    learner = metapt.Training(domain, True).best
    learner.pretrain_step(0.0)
    learner.meta_step(0.0)
    assert learner.meta_steps == 1


def test_hypergradients_against_central_differences(monkeypatch):
    torch.set_default_dtype(torch.float64)
    monkeypatch.setattr(
        metapt.Images, "inputs", lambda self, part, index: self.pixels[part][index].double() / self.scale
    )
    try:
        check_hypergradient(domain_of(find_domain(NAME), unroll_lr=0.05, seed=0))
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_run_says_what_was_learned_and_what_the_target_is(tmp_path):
    summary = summary_of(tmp_path, "meta", NAME, *QUICK, "--out=run")
    assert summary["domain"] == NAME and summary["meta_steps"] > 0
    assert list(summary["phi"]) == NUMBERS
    assert {name: summary[name] for name in NUMBERS} == summary["phi"]
    rows = list(csv.reader((tmp_path / "run" / "phi.csv").open()))
    assert rows[0] == ["number", "learned", "target"]
    for (name, learned, target), range_ in zip(rows[1:], RANGES, strict=True):
        assert float(learned) == pytest.approx(summary["phi"][name]) and 0 < abs(float(learned)) < range_
        assert float(target) == pytest.approx(summary[f"target_{name}"]) and abs(float(target)) <= range_
    assert [row[0] for row in rows[1:]] == NUMBERS
    assert {path.name for path in (tmp_path / "run").glob("*.png")} == {
        "phi.png", "losses.png", "comparison.png", "digits.png"}  # fmt: skip
    assert main_in(tmp_path, "pretrain", NAME, *QUICK[:1], "--compare=0", "--phi=run", "--out=frozen")[0] == 0


@pytest.mark.parametrize(("given", "message"), [
    ("--range-deg=0", "--range-deg is 0.0, expected positive"), ("--spread=0.01", "--spread is 0.01, expected 0.02 or more"),
    ("--range-shear=nan", "--range-shear is nan, expected a finite number"), ("--narrow=2", "--narrow is 2.0, expected"),
    ("--spread-deg=3", "--spread-deg belongs to digits-rotation, mnist-rotation, not to meta digits-affine"),
])  # fmt: skip
def test_settings_that_cannot_be_are_refused_in_one_line(tmp_path, given, message):
    assert message in refused(tmp_path, "meta", NAME, given)
    assert list(tmp_path.iterdir()) == []
