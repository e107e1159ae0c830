"""How far hypergradients under bfloat16 autocast are those of float32, by the step of finite
products.

    python -m bench.accuracy.precision      the cosine on rotated and noisy digits, ECG and PPI

θ is that of a short float32 PT with φ at its start; each draw has its own batches and random
numbers, the same for all that are compared. A cosine is of the hypergradients of all draws in one
vector: φ of the rotations is one number.
"""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Annotated

import rich.console
import torch
import torch.nn.functional as F
import typer

import metapt
from bench.stored import RESULTS, save_json

STORED = RESULTS / "precision" / "precision.json"
DATA = Annotated[Path, typer.Option(help="Where prepared data lie")]
DEVICE = Annotated[str, typer.Option(help="cpu or cuda")]
STEPS = (0.01, 0.03, 0.1, 0.3, 1.0)
# PT steps before, and settings.
CASES = {
    "digits-rotation": (200, {}),
    "digits-noise": (200, {}),
    "ecg": (40, {"augment": "both", "batch_size": 64, "meta_batch_size": 64}),
    "ppi": (200, {}),
}
app = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_enable=False)
console = rich.console.Console(width=140)


def make(name: str, data: Path, device: str = "cpu", **given) -> metapt.Domain:
    kind = metapt.find_domain(name)
    return kind(metapt.make_settings(kind, given, "default"), metapt.pick_device(device), data)


def phi_held(domain: metapt.Domain) -> metapt.Training:
    """A training that holds φ, but has an FT head beside PT, as `meta` does; every loss is one of
    the end of a run.
    """
    training = metapt.Training(domain, learn=True)
    training.meta_step = lambda: None
    training.progress = lambda step: 1.0
    return training


def hypergradients(
    training: metapt.Training, batches: list[dict], solver: metapt.Solver, precision: str
) -> torch.Tensor:
    """Those of all draws in one vector, in float64."""
    domain, network, head, found = training.domain, training.network, training.head, []
    network.precision, unroll = precision, domain.settings.unroll
    for draw, at in enumerate(batches):
        torch.manual_seed(draw)
        result = metapt.hypergradient(
            domain.pretrain_loss(network, training.meta, at["meta"], 1.0, live=False),
            *(
                domain.finetune_loss(network, head, part, at[part])
                for part in ("finetune", "validation")
            ),
            metapt.detached(network),
            training.psi,
            metapt.detached(training.meta),
            unroll=dataclasses.replace(unroll, hvp=None if solver.hvp == "exact" else unroll.hvp),
            solver=solver,
            ft_state=training.ft_states[training.settings.unroll_scope],
        )
        found += [g.flatten().double().cpu() for g in result.phi.values()]
    network.precision = "float32"
    return torch.cat(found)


def cosines(
    name: str, method: str, data: Path, device: str = "cpu", draws: int = 10, steps=STEPS
) -> list[dict]:
    """A row for each step (None: exact products). A solver other than the preset's has 3 terms and
    damping 1.
    """
    before, given = CASES[name]
    training = phi_held(make(name, data, device, steps=before, **given)).run()
    batches = [
        {part: batches.next() for part, batches in training.batches.items()} for _ in range(draws)
    ]
    solver, rows = training.domain.settings.inverse, []
    if method != solver.method:
        solver = dataclasses.replace(solver, method=method, terms=3, damping=1.0)
    exact = hypergradients(training, batches, dataclasses.replace(solver, hvp="exact"), "float32")
    for step in (None, *steps):
        way = dataclasses.replace(solver, hvp="finite" if step else "exact", step=step)
        plain = hypergradients(training, batches, way, "float32") if step else exact
        lower = hypergradients(training, batches, way, "bf16")
        rows.append(
            {
                "domain": name,
                "solver": method,
                "step": step,
                "draws": draws,
                "bf16_to_float32": cosine(lower, plain),
                "bf16_to_exact": cosine(lower, exact),
                "float32_to_exact": cosine(plain, exact),
                "size": (lower.norm() / plain.norm()).item(),
            }
        )
        of = {
            key: f"{value:.3f}"
            for key, value in rows[-1].items()
            if isinstance(value, float) and key != "step"
        }
        console.print(name, method, "exact" if step is None else f"step {step:g}", of)
    return rows


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return F.cosine_similarity(a, b, dim=0).item()


@app.command()
def run(
    domains: Annotated[str, typer.Option(help="With commas between")] = ",".join(CASES),
    solvers: Annotated[str, typer.Option(help="With commas between")] = "identity,cg",
    steps: Annotated[str, typer.Option(help="Of finite products, with commas between")] = ",".join(
        map(str, STEPS)
    ),
    draws: Annotated[int, typer.Option(help="Draws of batches and random numbers")] = 10,
    device: DEVICE = "cpu",
    data: DATA = Path("data"),
):
    rows = json.loads(STORED.read_text())["rows"] if STORED.exists() else []
    # Others keep their rows
    for name, method in itertools.product(domains.split(","), solvers.split(",")):
        rows = [row for row in rows if (row["domain"], row["solver"]) != (name, method)]
        rows += cosines(name, method, data, device, draws, tuple(map(float, steps.split(","))))
        save_json(STORED, {"torch": torch.__version__, "device": device, "rows": rows})


if __name__ == "__main__":
    app()
