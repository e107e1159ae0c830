"""Does φ arrive from anywhere? Several particles, noise on φ, and a spread that narrows.

    python -m bench.studies.particles --only full,"one particle"     these rows, six minutes each
    python -m bench.studies.particles                                the table and figure as stored

−90° from the target there is a true local optimum, as many digits look alike upside down. Several
trainings, the particles, begin alike. Noise on φ drives them apart; then successive halving
(Jamieson and Talwalkar, AISTATS 2016) keeps the better ones. Each row of the table has ten starts
around the circle. They are stored in bench/results/particles, with the figure.
"""

import contextlib
import copy
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import rich.console
import torch
import typer

import metapt
from bench.stored import RESULTS, save_figure, save_json

STORED = RESULTS / "particles"
console = rich.console.Console()

# Settings of the runs. φ's rate does not fall, and PT's spread has narrowed to 1° by half-way.
SETTINGS = {"steps": 850, "warmup": 50, "dropout": 0.5, "narrow": 0.5, "meta_lr_decay": 1.0}


class Plan(NamedTuple):
    """What helps φ to arrive."""

    # So many particles until that share of the run after the warm-up.
    stages: tuple[tuple[int, float], ...] = ((6, 0.35), (3, 0.9), (1, 1.0))
    # Noise on φ after a meta step, in degrees: its deviation at first. It fades.
    kick_deg: float = 60.0
    # The share of the run at whose end the noise has faded away.
    kicks_end: float = 0.35
    # Settings that differ from SETTINGS.
    settings: dict | None = None


ONE = ((1, 1.0),)
# All aids, and each of them taken away.
AIDS = {
    "full": Plan(),
    "one particle": Plan(stages=ONE, kicks_end=1.0),
    "no noise on φ": Plan(kick_deg=0.0),
    "spread of 1° throughout": Plan(settings={"spread_deg": 1.0}),
    "no aid at all": Plan(stages=ONE, kick_deg=0.0, settings={"spread_deg": 1.0}),
    "aids without hypergradient": Plan(settings={"meta_lr": 1e-12}),
}


# ------------------------------------------------------------------------------------------------
# Particles


class RoundOver(Exception):
    """Leaves metapt.Training.run, which goes on from wherever a training stands."""


class Particle(metapt.Training):
    """A training that learns φ, with noise on φ after each meta step."""

    def __init__(self, domain: metapt.Domain, plan: Plan):
        super().__init__(domain, learn=True)
        self.plan = plan
        self.number = 0
        # The validation losses of the last ten meta steps: particles are compared by their mean.
        self.recent = []

    def meta_step(self) -> None:
        taken = self.meta_steps
        super().meta_step()
        if self.meta_steps > taken:
            self.recent = [*self.recent[-9:], self.losses["validation_loss"]]
            self.kick()

    def kick(self) -> None:
        progress = self.progress(self.step - 1)
        fading = max(0.0, 1 - progress / self.plan.kicks_end) ** 2
        with torch.no_grad():
            self.meta.rotation_mean_deg += self.plan.kick_deg * fading * torch.randn(()).item()

    def one_round(self) -> None:
        """P PT steps, and the meta step that follows them."""

        def stop(training: metapt.Training) -> None:
            raise RoundOver

        with contextlib.suppress(RoundOver):
            self.run(on_episode=stop)

    def recent_loss(self) -> float:
        return np.mean([float(loss) for loss in self.recent]) if self.recent else math.inf


def make_particles(domain: metapt.Domain, plan: Plan) -> list[Particle]:
    """As many as the first stage has. They differ by what they draw from here on."""
    first = Particle(domain, plan)
    count, _ = plan.stages[0]
    particles = [first]
    for number in range(1, count):
        particle = copy.deepcopy(first, {id(domain): domain})
        particle.number = number
        particles.append(particle)
    return particles


def run_particles(
    particles: list[Particle], on_episode: Callable[[list[Particle]], None] | None = None
) -> Particle:
    """Trains all of them, round by round; as a stage ends, the better ones stay.

    Returns:
        The one that is left. `particles` holds it alone.
    """
    first = particles[0]
    while particles[0].step < first.settings.steps:
        for particle in particles:
            particle.one_round()
        progress = first.progress(particles[0].step)
        wanted = next(count for count, share in first.plan.stages if share >= progress)
        if wanted < len(particles):
            particles.sort(key=Particle.recent_loss)
            del particles[wanted:]
        if on_episode:
            on_episode(particles)
    return particles[0]


# ------------------------------------------------------------------------------------------------
# The study


def make(name: str, start: float, seed: int, plan: Plan) -> metapt.Domain:
    kind = metapt.find_domain(name)
    torch.set_num_threads(kind.threads or torch.get_num_threads())
    given = {**SETTINGS, **(plan.settings or {}), "init_deg": start, "seed": seed}
    settings = metapt.make_settings(kind, given, "default")
    return kind(settings, metapt.pick_device("auto"), Path("data"))


def arrived(name: str, start: float, seed: int, plan: Plan) -> dict:
    """Where φ ends."""
    began = time.perf_counter()
    domain = make(name, start, seed, plan)
    left = run_particles(make_particles(domain, plan))
    degrees = domain.measure(left.learned())["rotation_mean_deg"]
    error = abs((degrees - domain.settings.target_deg + 180) % 360 - 180)
    console.print(f"seed {seed}: {start:6.1f}° → {degrees:6.1f}°, error {error:5.1f}°")
    return {
        "seed": seed,
        "start": start,
        "degrees": degrees,
        "error": error,
        "seconds": time.perf_counter() - began,
    }


def main(
    domain: Annotated[
        str, typer.Option(help="digits-rotation or mnist-rotation")
    ] = "digits-rotation",
    only: Annotated[
        str, typer.Option(help="Which rows, by name, with commas between; nothing: those stored")
    ] = "",
    seeds: Annotated[int, typer.Option(help="How often; seed s serves start i as 10·s + i")] = 1,
):
    """φ from ten starts around the circle, with all aids and without each of them."""
    path = STORED / f"anywhere-{domain}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    names = [name for name in only.split(",") if name]
    unknown = set(names) - set(AIDS)
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)}: the rows are {', '.join(AIDS)}")
    for name in names:
        for seed in range(10 * seeds):
            start = -180.0 + 36 * (seed % 10)
            row = {"aids": name, **arrived(domain, start, seed, AIDS[name])}
            rows = [other for other in rows if (other["aids"], other["seed"]) != (name, seed)]
            rows.append(row)
            save_json(path, {"torch": torch.__version__, "rows": rows})
    report(domain, rows)


def report(domain: str, rows: list[dict]) -> None:
    """The table, and the figure."""
    by_name = {}
    for row in rows:
        # The settings were chosen on seeds 0 to 9.
        block = row["seed"] // 10 * 10
        fresh = f", seeds {block} to {block + 9}" if block else ""
        by_name.setdefault(row["aids"] + fresh, []).append(row)
    cells = []
    for name, some in by_name.items():
        errors = np.array([row["error"] for row in some])
        mean, stderr = metapt.mean_and_error(errors).values()
        cells.append(
            [
                name,
                str(len(errors)),
                f"{mean:.1f} ± {math.nan if stderr is None else stderr:.1f}",
                f"{np.median(errors):.1f}",
                f"{errors.max():.1f}",
                str((errors > 45).sum()),
            ]
        )
    columns = ["", "runs", "mean error ± s.e. (°)", "median", "largest", "over 45°"]
    metapt.show_table(console, domain, columns, cells)
    path = STORED / f"anywhere-{domain}.png"
    save_figure(path, lambda figure: draw(figure, by_name))


def draw(figure, by_name: dict[str, list[dict]]) -> None:
    axis = figure.subplots()
    styles = {
        "no aid at all": ("without the aids", "x", "0.5"),
        "full": ("as it is", "o", "C0"),
    }
    for name, (label, marker, color) in styles.items():
        rows = by_name.get(name, [])
        starts = [row["start"] for row in rows]
        degrees = [row["degrees"] for row in rows]
        axis.plot(starts, degrees, marker, ms=4, color=color, label=label)
    axis.axhline(90, color="C3", lw=0.8, ls="--", label="rotation of the FT images")
    ticks = [-180, -90, 0, 90, 180]
    axis.set(
        xlabel="φ at the start (degrees)",
        ylabel="φ at the end (degrees)",
        ylim=(-190, 190),
        xticks=ticks,
        yticks=ticks,
    )
    axis.legend(fontsize=7, loc="lower right")


if __name__ == "__main__":
    typer.run(main)
