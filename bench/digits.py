"""The figures that README.md states of the digits domains, made anew.

    python -m bench.digits rotation     φ from ten starts around the circle, and the same without each aid
    python -m bench.digits noise        the weight of clean over the weight of noisy examples, by seed
    python -m bench.digits bytes        bytes saved for backward by one hypergradient, against one PT step

Each writes what it found to bench/results/NAME.json as it goes; `rotation` also draws bench/figures/digits-rotation.png.
"""

import json
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import rich.console
import torch
import typer

import metapt
from bench.counting import peak

HERE = Path(__file__).parent
STARTS = [-180 + 36 * i for i in range(10)]
# What each aid of the rotation preset is worth: the preset with that aid alone taken away.
ABLATIONS = {
    "full": {},
    "one particle": {"particles": "1", "rounds": "1"},
    "no noise on φ": {"kick_deg": 0.0},
    "spread of 1° throughout": {"spread_deg": 1.0},
    "no aid at all": {"particles": "1", "rounds": "1", "kick_deg": 0.0, "spread_deg": 1.0},
    "aids without hypergradient": {"meta_lr": 1e-12},
}
app = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_enable=False)
console = rich.console.Console()


def learn(domain: str, given: dict) -> tuple[metapt.Domain, metapt.Training]:
    metapt.one_thread(domain)
    settings = metapt.settings_of(domain, given)
    made = metapt.make_domain(domain, settings, metapt.pick_device("auto"), Path("data"))
    return made, metapt.Training(made, settings, learn=True).run()


def keep(name: str, rows: list[dict]) -> None:
    (HERE / "results").mkdir(exist_ok=True)
    metapt.save_json(HERE / "results" / f"{name}.json", {"torch": torch.__version__, "rows": rows})


@app.command()
def rotation(
    domain: Annotated[str, typer.Option(help="digits-rotation or mnist-rotation")] = "digits-rotation",
    only: Annotated[str, typer.Option(help="Which ablations, by name, with commas between")] = ",".join(ABLATIONS),
    seeds: Annotated[int, typer.Option(help="How often; seed s serves start i as 10·s + i")] = 1,
):
    """φ after a run from each of ten starts; the error is the distance to 90° on the circle."""
    path, rows = HERE / "results" / f"{domain}.json", []
    again = {(name, 10 * seed + i) for name in only.split(",") for seed in range(seeds) for i in range(len(STARTS))}
    if path.exists():  # the rows of other ablations and seeds stay
        rows = [row for row in json.loads(path.read_text())["rows"] if (row["aids"], row["seed"]) not in again]
    for name in only.split(","):
        for seed in range(seeds):
            for i, start in enumerate(STARTS):
                begun = time.perf_counter()
                made, training = learn(domain, {**ABLATIONS[name], "init_deg": float(start), "seed": 10 * seed + i})
                degrees = made.measure(training.best.learned())["rotation_mean_deg"]
                error, seconds = abs(metapt.wrap(degrees - 90)), time.perf_counter() - begun
                rows.append({"aids": name, "start": start, "seed": 10 * seed + i, "degrees": degrees, "error": error,
                             "seconds": seconds})  # fmt: skip
                console.print(f"{name}: {start:5d}° → {degrees:6.1f}°, error {error:5.1f}°  ({seconds:.0f} s)")
                keep(f"{domain}", rows)
    report(domain)


@app.command()
def report(domain: Annotated[str, typer.Argument()] = "digits-rotation"):
    """Table and figure of what `rotation` found."""
    rows = json.loads((HERE / "results" / f"{domain}.json").read_text())["rows"]
    by_name = {}
    for row in rows:  # seeds 0 to 9 are those that the settings were chosen on
        block = row["seed"] // 10 * 10
        by_name.setdefault(row["aids"] + (f", seeds {block} to {block + 9}" if block else ""), []).append(row)
    cells = []
    for name, chosen in by_name.items():
        errors = np.array([row["error"] for row in chosen])
        stderr = errors.std(ddof=1) / np.sqrt(len(errors))
        cells.append([name, str(len(errors)), f"{errors.mean():.1f} ± {stderr:.1f}", f"{np.median(errors):.1f}",
                      f"{errors.max():.1f}", str((errors > 45).sum())])  # fmt: skip
    columns = ["", "runs", "mean error ± s.e. (°)", "median", "largest", "over 45°"]
    metapt.show_table(console, domain, columns, cells)
    with metapt.figure(HERE / "figures" / f"{domain}.png") as (axis,):
        for k, name in enumerate(name for name in ("no aid at all", "full") if name in by_name):
            label = {"full": "as it is", "no aid at all": "without the aids"}[name]
            x, y = zip(*((row["start"], row["degrees"]) for row in by_name[name]), strict=True)
            axis.plot(
                x,
                y,
                "o" if name == "full" else "x",
                ms=4,
                color="C0" if name == "full" else "0.5",
                label=label,
                zorder=k,
            )
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


@app.command()
def noise(
    domain: str = "digits-noise",
    seeds: Annotated[int, typer.Option(help="How many seeds")] = 5,
    first: Annotated[int, typer.Option(help="The first of them; the settings were chosen on 0 to 4")] = 0,
):
    """The ratio of mean weights, by seed."""
    rows = []
    for seed in range(first, first + seeds):
        begun = time.perf_counter()
        made, training = learn(domain, {"seed": seed})
        rows.append({"seed": seed, **made.facts(training.best.learned()), "seconds": time.perf_counter() - begun})
        console.print(rows[-1])
        keep(f"{domain}-from-{first}" if first else domain, rows)


@app.command(name="bytes")
def saved_bytes():
    """Peak of the bytes saved for backward, each storage once, parameters and data not counted, against a PT step's."""
    rows = []
    for hvp in ("exact", "finite"):
        for solver in ({"solver": "identity"}, {"solver": "neumann", "alpha": 1e-3}, {"solver": "cg", "terms": 3}):
            given = {"hvp": hvp, "steps": 20, "warmup": 20, "batch_size": 256, "meta_batch_size": 256, "dropout": 0.0}
            settings = metapt.settings_of("digits-rotation", {**given, **solver, "particles": "1", "rounds": "1"})
            made = metapt.make_domain("digits-rotation", settings, torch.device("cpu"), Path("data"))
            learner = metapt.Training(made, settings, learn=True).run().best
            learner.meta_step(1.0)  # the first has no moments yet
            plain = peak(lambda learner=learner: learner.pretrain_step(1.0))
            rows.append(
                {"hvp": hvp, **solver, "bytes": peak(lambda learner=learner: learner.meta_step(1.0)), "pt_step": plain}
            )
            console.print(
                f"{hvp} {solver['solver']}: {rows[-1]['bytes']:,} = {rows[-1]['bytes'] / plain:.2f} × a PT step's {plain:,}"
            )
    keep("bytes", rows)


if __name__ == "__main__":
    app()
