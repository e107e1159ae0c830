"""How much sooner a comparison is over by several processes, and that its numbers are the same.

    python -m bench.costs.jobs --data data
        the comparisons of `meta` by 1 and by 2 processes, in turn
    python -m bench.costs.jobs --domains digits-rotation --jobs 8

A comparison is that of `meta` with the domain's settings: no PT, PT with φ as it begins twice (in
place of the default and the learned φ) and a network that is given, each for `compare` seeds, with
the held-out scores of the choice. Times are those of a clock on the wall, with the processes'
start. A domain whose data are not there is left out.
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
from bench.stored import RESULTS, save_json

DOMAINS = "digits-rotation,sources,ppi,ecg"
app = typer.Typer(add_completion=False, rich_markup_mode=None)


def make_domain(name: str, data: Path) -> metapt.Domain:
    kind = metapt.find_domain(name)
    return kind(kind.Settings(), torch.device("cpu"), data)


def cells_of_meta(domain: metapt.Domain) -> list[metapt.Cell]:
    """The cells that `meta` measures at its end; φ and θ are those of the start."""
    torch.manual_seed(0)
    methods = {
        "no_pretraining": metapt.Method("untrained"),
        "default_phi": metapt.Method("pretrained"),
        "learned_phi": metapt.Method("pretrained", phi=domain.meta().state_dict()),
        "online": metapt.given_network(domain, domain.network()),
    }
    sizes = metapt.compared_sizes(domain)
    return metapt.cells_of(methods, sizes, domain.settings.compare, with_held=True)


def timed(domain: metapt.Domain, cells: list[metapt.Cell], jobs: int) -> tuple[float, list]:
    """Seconds, and the results."""
    begun = time.perf_counter()
    results = metapt.measure_cells(domain, cells, jobs, lambda: None)
    return time.perf_counter() - begun, results


@app.command()
def main(
    domains: Annotated[str, typer.Option(help="With commas")] = DOMAINS,
    jobs: Annotated[int, typer.Option(help="Processes beside one", min=2)] = 2,
    repeats: Annotated[int, typer.Option(help="Pairs", min=1)] = 3,
    data: Annotated[Path, typer.Option(help="Where prepared data lie")] = Path("data"),
):
    """Times comparisons by one and by several processes, in turn; stored rows are replaced."""
    path = RESULTS / "jobs" / f"jobs-{jobs}.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    for name in domains.split(","):
        try:
            domain = make_domain(name, data)
        except metapt.BadInput as error:
            print(f"{name} is left out: {error}")
            continue
        cells = cells_of_meta(domain)
        alone = []
        together = []
        for _ in range(repeats):
            seconds, expected = timed(domain, cells, 1)
            alone.append(seconds)
            seconds, found = timed(domain, cells, jobs)
            together.append(seconds)
            if found != expected:
                raise SystemExit(f"{name}: other numbers by {jobs} processes")
        ratios = np.divide(together, alone)
        rows = [row for row in rows if row["domain"] != name]
        rows.append(
            {
                "domain": name,
                "cells": len(cells),
                "jobs": jobs,
                "seconds_alone": alone,
                "seconds_together": together,
            }
        )
        save_json(path, rows)
        print(f"{name}: {spread(ratios)}", flush=True)
    show(rows)


def spread(ratios: np.ndarray) -> str:
    return f"{np.median(ratios):.2f} ({min(ratios):.2f} … {max(ratios):.2f})"


def show(rows: list[dict]) -> None:
    table = []
    for row in rows:
        ratios = np.divide(row["seconds_together"], row["seconds_alone"])
        alone = f"{np.median(row['seconds_alone']):.0f}"
        together = f"{np.median(row['seconds_together']):.0f}"
        table.append([row["domain"], f"{row['cells']}", alone, together, spread(ratios)])
    jobs = rows[0]["jobs"] if rows else 0
    columns = ["domain", "cells", "s, 1 process", f"s, {jobs}", "ratio of pairs"]
    console = rich.console.Console(width=100)
    metapt.show_table(console, "Comparisons by several processes", columns, table)


if __name__ == "__main__":
    app()
