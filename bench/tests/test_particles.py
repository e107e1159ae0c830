"""Particles: they begin alike, come apart, and the better ones stay; noise on φ fades."""

import json

import pytest
import torch
from tools import TINY, flat

import metapt
from bench.studies import particles
from bench.studies.particles import AIDS, STORED, Particle, Plan, make_particles, run_particles

pytestmark = pytest.mark.filterwarnings("ignore:‖Hq − v‖")
THREE = Plan(stages=((3, 0.4), (2, 0.8), (1, 1.0)), kick_deg=20.0, kicks_end=0.5)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    given = {**TINY["digits-rotation"], "steps": 52, "sizes": ""}
    monkeypatch.setattr(particles, "SETTINGS", given)


def make(plan: Plan = THREE, start: float = 0.0, seed: int = 0) -> list[Particle]:
    return make_particles(particles.make("digits-rotation", start, seed, plan), plan)


@pytest.mark.parametrize("losses", [[3.0, 1.0, 2.0], [1.0, 2.0, 3.0], [2.0, 3.0, 1.0]])
def test_the_particles_with_the_lowest_recent_validation_losses_stay(losses, monkeypatch):
    def meta_step(self):
        # The very last loss says something else: it is one of ten.
        self.recent = [losses[self.number]] * 9 + [10 - losses[self.number]]

    monkeypatch.setattr(Particle, "meta_step", meta_step)
    monkeypatch.setattr(Particle, "pretrain_step", lambda self: self.losses.update(pretrain_loss=0))
    seen = []

    def note(some):
        seen.append((some[0].step, [particle.number for particle in some]))

    left = run_particles(make(), note)
    order = sorted(range(3), key=lambda number: losses[number])
    for step, numbers in seen:
        share = (step - 12) / 40
        wanted = 3 if share <= 0.4 else 2 if share <= 0.8 else 1
        assert set(numbers) == set(order[:wanted])
    assert left.number == order[0]
    assert left.step == 52


def test_particles_start_alike_and_come_apart():
    some = make()
    first, *others = some
    assert [particle.number for particle in some] == [0, 1, 2]
    for other in others:
        assert torch.equal(flat(first.network), flat(other.network))
        assert torch.equal(flat(first.psi), flat(other.psi))
        parameters = other.optimizer.param_groups[0]["params"]
        assert parameters[0] is next(other.network.parameters())
        assert other.meta_optimizer.param_groups[0]["params"][0] is other.meta.rotation_mean_deg
        assert other.domain is first.domain

    losses = []
    validation_losses = []

    def note(some):
        losses.append({float(particle.losses["pretrain_loss"]) for particle in some})
        validation_losses.append(float(some[0].losses["validation_loss"]))

    left = run_particles(some, note)
    assert len(losses[0]) == 3
    assert len(losses[-1]) == 1
    assert some == [left]
    assert left.meta_steps == 10
    assert [float(loss) for loss in left.recent][-2:] == validation_losses[-2:]
    assert len(left.recent) == 10


def test_one_particle_without_noise_is_metapts_own_training():
    plan = Plan(stages=((1, 1.0),), kick_deg=0.0)
    (particle,) = make(plan)
    # A kick of 0 draws a number all the same; batches are reshuffled by the numbers after it.
    particle.kick = lambda: None
    left = run_particles([particle])
    domain = particles.make("digits-rotation", 0.0, 0, plan)
    expected = metapt.Training(domain, learn=True).run()
    assert torch.equal(flat(left.network), flat(expected.network))
    assert torch.equal(flat(left.learned()), flat(expected.learned()))


def test_kicks_fade_until_the_particles_are_chosen_among():
    (particle, *_) = make()
    kicks = []
    for progress in (0.0, 0.25, 0.5, 0.9):
        particle.progress = lambda step, progress=progress: progress
        particle.meta.rotation_mean_deg.data.zero_()
        torch.manual_seed(0)
        particle.kick()
        kicks.append(particle.meta.rotation_mean_deg.item())
    torch.manual_seed(0)
    assert kicks[0] == pytest.approx(20 * torch.randn(()).item())
    assert kicks == pytest.approx([kicks[0], kicks[0] / 4, 0, 0])


def test_a_meta_step_that_is_skipped_has_no_kick(monkeypatch):
    (particle, *_) = make()
    monkeypatch.setattr(particle, "kick", lambda: pytest.fail("a kick"))
    # Of no use: L_V is not finite.
    particle.domain.pixels["validation"] = particle.domain.pixels["validation"] * torch.nan
    particle.meta_step()
    assert particle.skipped == 1
    assert particle.recent == []


def test_a_row_says_where_phi_ended():
    row = particles.arrived("digits-rotation", 36.0, 6, THREE)
    assert (row["seed"], row["start"]) == (6, 36.0)
    assert row["error"] == pytest.approx(abs((row["degrees"] - 90 + 180) % 360 - 180))


@pytest.mark.parametrize("domain", ["digits-rotation", "mnist-rotation"])
def test_what_is_stored_is_shown(domain, tmp_path, monkeypatch, capsys):
    rows = json.loads((STORED / f"anywhere-{domain}.json").read_text())["rows"]
    assert {row["aids"] for row in rows} <= set(AIDS)
    monkeypatch.setattr(particles, "STORED", tmp_path)
    particles.report(domain, rows)
    said = capsys.readouterr().out
    assert "full" in said
    assert len([row for row in rows if row["aids"] == "full"]) >= 10
    assert (tmp_path / f"anywhere-{domain}.png").exists()
