"""BYOL on electrocardiograms and BGRL on graphs: costs of a meta step, the rank of encoders along
PT, where φ is sent.

    python -m bench.studies.bootstrap run
        all of it, stored in bench/results/bootstrap (data/ecg and data/ppi must be there)
    python -m bench.studies.bootstrap report
        tables of what was found

Costs are counted: FLOPs and bytes kept for backward of a meta step, in PT steps. The effective rank
of features [n, d] is the exponential of the entropy of their normalised singular values (Roy and
Vetterli, EUSIPCO 2007), here of 500 PT examples, centred, in evaluation mode. Seed 0 throughout.
"""

import json
from pathlib import Path
from typing import Annotated

import rich.console
import torch
import typer
from torch import Tensor

import metapt
from bench.accuracy import precision
from bench.costs import counting
from bench.stored import DOMAINS, RESULTS, save_json

STORED = RESULTS / "bootstrap" / "bootstrap.json"
ECG, BYOL, BGRL = (f"{DOMAINS / name}" for name in ("ecg.py:ECG", "ecg.py:BYOL", "ppi.py:BGRL"))
BATCHES = ("batch_size", "meta_batch_size", "unroll_batch_size", "validation_batch_size")
OF_16, OF_64 = (dict.fromkeys(BATCHES, n) for n in (16, 64))
COSTS = {
    "SimCLR, width 32": (ECG, {**OF_16, "width": 32}),
    "SimCLR, width 8": (ECG, OF_16),
    "BYOL, width 32": (BYOL, {**OF_16, "width": 32}),
    "BYOL, width 8": (BYOL, OF_16),
    "BGRL, exact": (BGRL, OF_64),
    "BGRL, finite": (BGRL, {**OF_64, "hvp": "finite"}),
    "BGRL, as preset": (BGRL, {}),
}
# PT steps
RANKS = {
    "BYOL": (BYOL, (0, 5, 10, 20, 50, 100)),
    "BGRL": (BGRL, (0, 5, 10, 20, 60, 100, 300)),
}
DRAWS, AFTER = 24, 60  # hypergradients of BGRL, and after so many PT steps
app = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_enable=False)
console = rich.console.Console()


def costs(training: metapt.Training, steps: int) -> dict[str, float]:
    """FLOPs and bytes of a meta step in those of a PT step, with the step of the head beside it;
    means of so many.
    """
    training.domain.begin_episode(training.meta)
    return {
        kind: sum(count(lambda: training.meta_step()) for _ in range(steps))
        / sum(count(lambda: training.pretrain_step()) for _ in range(steps))
        for kind, count in (("flops", counting.flops), ("bytes", counting.peak))
    }


def effective_rank(features: Tensor) -> float:
    shares = torch.linalg.svdvals(features - features.mean(0))
    return torch.distributions.Categorical(shares / shares.sum()).entropy().exp().item()


def ranks(training: metapt.Training, steps: tuple[int, ...]) -> list[float]:
    """Effective ranks after so many PT steps with φ as it begins."""
    found, index = [], torch.arange(min(500, training.domain.sizes["pretrain"]))
    for step in range(steps[-1] + 1):
        if step in steps:
            with torch.no_grad():
                found.append(
                    effective_rank(
                        training.network.eval()(
                            training.domain.inputs("pretrain", index), features=True
                        )
                    )
                )
        training.domain.begin_episode(training.meta)
        training.pretrain_step()
    return found


def direction(training: metapt.Training) -> dict[str, list[float]]:
    """dL_V/dφ at one θ, from draw to draw of batches and views: the mean over its standard error,
    by number of φ.
    """
    for _ in range(AFTER):
        training.pretrain_step()
    drawn, settings = [], training.settings
    for _ in range(DRAWS):
        losses = (
            training.pretrain_loss("meta", 0, live=False),
            [training.finetune_loss("finetune")],
            training.validation_loss(),
        )
        drawn.append(
            metapt.hypergradient(
                *losses,
                metapt.detached(training.network),
                training.psi,
                metapt.detached(training.meta),
                unroll=settings.unroll,
                solver=settings.inverse,
                ft_state=training.ft_states[settings.unroll_scope],
            ).phi
        )
    each = {name: torch.stack([phi[name] for phi in drawn]) for name in drawn[0]}
    return {name: (t.mean(0) / t.std(0) * DRAWS**0.5).tolist() for name, t in each.items()}


@app.command()
def run(data: Annotated[Path, typer.Option(help="Where prepared data lie")] = Path("data")):
    torch.set_num_threads(1)
    found = {"torch": torch.__version__, "costs": {}, "ranks": {}}
    for name, (where, given) in COSTS.items():
        found["costs"][name] = costs(
            metapt.Training(precision.make(where, data, seed=0, **given), learn=True),
            20 if where == BGRL else 1,  # graphs differ in size
        )
    for name, (where, steps) in RANKS.items():
        found["ranks"][name] = {
            "steps": steps,
            "ranks": ranks(precision.phi_held(precision.make(where, data, seed=0)), steps),
        }
    found["direction"] = direction(precision.phi_held(precision.make(BGRL, data, seed=0)))
    save_json(STORED, found)
    report()


@app.command()
def report():
    found = json.loads(STORED.read_text())
    rows = [
        [name, f"{of['flops']:.2f}", f"{of['bytes']:.2f}"] for name, of in found["costs"].items()
    ]
    metapt.show_table(console, "a meta step, in PT steps", ["", "FLOPs", "bytes kept"], rows)
    for name, of in found["ranks"].items():
        cells = [f"{rank:.1f}" for rank in of["ranks"]]
        metapt.show_table(
            console, f"{name}: effective rank by PT step", list(map(str, of["steps"])), [cells]
        )
    rows = [
        [name, *(f"{value:+.1f}" for value in values)]
        for name, values in found["direction"].items()
    ]
    title = f"BGRL: dL_V/dφ over its standard error, {DRAWS} draws after {AFTER} PT steps"
    metapt.show_table(console, title, ["", "view 1", "view 2"], rows)


if __name__ == "__main__":
    app()
