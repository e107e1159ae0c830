"""The figures of the digits and MNIST domains, made anew.

    python -m bench.studies.digits rotation
        where φ ends from 60° below the target, or from starts on both sides
    python -m bench.studies.digits search
        random search for the compute of a meta run
    python -m bench.studies.digits bytes
        bytes saved for backward by one hypergradient, against one PT step

Each stores what it found in bench/results/digits as it goes; the first also draws a figure there.
"""

import json
import time
import warnings
from pathlib import Path
from typing import Annotated

import numpy as np
import rich.console
import torch
import typer

import metapt
from bench.costs.counting import peak
from bench.stored import RESULTS, save_figure, save_json

STORED = RESULTS / "digits"
warnings.filterwarnings("ignore", "‖Hq − v‖")
app = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_enable=False)
console = rich.console.Console()
First = Annotated[int, typer.Option(help="The first seed; settings were chosen on 0 to 29")]
Domain = Annotated[str, typer.Option(help="digits-… or mnist-…")]


def make(name: str, given: dict, preset: str = "default") -> metapt.Domain:
    kind = metapt.find_domain(name)
    torch.set_num_threads(kind.threads or torch.get_num_threads())
    return kind(metapt.make_settings(kind, given, preset), metapt.pick_device("auto"), Path("data"))


def keep(name: str, rows: list[dict]) -> None:
    save_json(STORED / f"{name}.json", {"torch": torch.__version__, "rows": rows})


@app.command()
def rotation(
    domain: Domain = "digits-rotation",
    first: First = 30,
    seeds: Annotated[int, typer.Option(help="How many")] = 10,
    target: Annotated[float, typer.Option(help="--target-deg of the runs")] = 90.0,
    starts: Annotated[
        str, typer.Option(help="From the target, in degrees; two: the runs are spread between")
    ] = "-60",
):
    """φ after a run from each start; the error is the way to the target on the circle, its sign
    says the side.
    """
    low, *high = [float(start) for start in starts.split(",")]
    name, rows = f"{domain}-{target:g}-{starts}-from-{first}", []
    for seed in range(first, first + seeds):
        start = (
            target + low + ((high[0] - low) * (seed - first) / max(1, seeds - 1) if high else 0.0)
        )
        rows.append(arrived(domain, {"init_deg": start, "target_deg": target, "seed": seed}))
        keep(name, rows)
    report(name, target)


def arrived(domain: str, given: dict, preset: str = "default") -> dict:
    """Where φ ends, and how it came there."""
    begun, made, curve = time.perf_counter(), make(domain, given, preset), []
    run = metapt.Training(made, learn=True).run(
        lambda run: curve.append((run.step, *made.measure(run.meta).values()))
    )
    degrees = made.measure(run.learned())["rotation_mean_deg"]
    error = (degrees - made.settings.target_deg + 180) % 360 - 180
    console.print(
        f"seed {given['seed']}: {given['init_deg']:6.1f}° → {degrees:6.1f}°, error {error:+5.1f}°"
    )
    return {
        "seed": given["seed"],
        "start": given["init_deg"],
        "degrees": degrees,
        "error": error,
        "seconds": time.perf_counter() - begun,
        "curve": curve,
    }


@app.command()
def report(name: str, target: float = 90.0):
    """Table and figure of what `rotation` found."""
    rows = json.loads((STORED / f"{name}.json").read_text())["rows"]
    errors = np.array([row["error"] for row in rows])
    stderr = abs(errors).std(ddof=1) / np.sqrt(len(errors)) if len(errors) > 1 else np.nan
    cells = [
        str(len(errors)),
        f"{abs(errors).mean():.1f} ± {stderr:.1f}",
        f"{abs(errors).max():.1f}",
        f"{errors.mean():+.1f}",
        str((abs(errors) > 45).sum()),
    ]
    columns = ["runs", "mean error ± s.e. (°)", "largest", "with its sign", "over 45°"]
    metapt.show_table(console, name, columns, [cells])

    def draw(figure):
        axis = figure.subplots()
        for row in rows:
            steps, degrees = np.array(row["curve"]).T
            axis.plot(steps, degrees, color="C0", lw=0.7, alpha=0.7)
        axis.axhline(target, color="C3", lw=0.8, ls="--")
        axis.set(
            xlabel="PT steps",
            ylabel="mean rotation φ (degrees)",
            title=f"{len(rows)} runs; target dashed",
        )

    save_figure(STORED / f"{name}.png", draw)


@app.command()
def search(
    domain: Domain = "digits-rotation",
    seeds: Annotated[int, typer.Option(help="Of FT")] = 3,
    share: Annotated[float, typer.Option(help="Compute of the search, in meta runs")] = 1.0,
):
    """Random search: PT with angles drawn at random for the compute of a meta run; each FT takes
    what its validation labels prefer.
    """
    made = make(domain, {})
    allowed = share * metapt.Training(made, learn=True).run().seconds
    spent, networks, random = 0.0, [], np.random.default_rng(made.settings.seed)
    while spent < allowed:
        begun, phi = (
            time.perf_counter(),
            {"rotation_mean_deg": torch.tensor(random.uniform(-180, 180))},
        )
        networks.append(metapt.pretrain_afresh(made, made.settings.seed, phi))
        spent += time.perf_counter() - begun
    rows = []
    for n in made.finetune_sizes:
        scores = []
        for seed in range(seeds):
            outcomes = [metapt.finetune(made, network, n, seed) for network in networks]
            best = min(outcomes, key=lambda outcome: outcome.lowest_loss)
            scores.append(best.scores["test"])
        rows.append({"ft_examples": n, "draws": len(networks), "scores": scores})
        mean, stderr = 100 * np.mean(scores), 100 * np.std(scores, ddof=1) / np.sqrt(seeds)
        console.print(f"{len(networks)} draws, {n} FT examples: {mean:.1f} ± {stderr:.1f} %")
    keep(f"{domain}-search-{share:g}", rows)


@app.command(name="bytes")
def saved_bytes():
    """Peak of the bytes saved for backward, each storage once, parameters and data not counted,
    against a PT step's.
    """
    rows = []
    for hvp in ("exact", "finite"):
        for solver in (
            {"solver": "identity"},
            {"solver": "neumann", "alpha": 1e-3},
            {"solver": "cg"},
        ):
            given = {
                "hvp": hvp,
                "steps": 20,
                "warmup": 20,
                "batch_size": 256,
                "meta_batch_size": 256,
                "dropout": 0.0,
            }
            made = make("digits-rotation", {**given, **solver})
            training = metapt.Training(made, learn=True).run()
            training.meta_step()  # the first has no moments yet
            plain = peak(lambda training=training: training.pretrain_step())
            found = peak(lambda training=training: training.meta_step())
            rows.append({"hvp": hvp, **solver, "bytes": found, "pt_step": plain})
            console.print(
                f"{hvp} {solver['solver']}: {found:,} = {found / plain:.2f} × a PT step's {plain:,}"
            )
    keep("bytes", rows)


if __name__ == "__main__":
    app()
