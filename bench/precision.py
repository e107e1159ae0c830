"""How far hypergradients under bfloat16 autocast, or of compiled encoders, are those of float32, and what compiling gains.

    python -m bench.precision               cosine by step of finite products, on ECG, PPI and rotated images
    python -m bench.precision compiled      PT and meta steps with and without torch.compile, in turn

θ is that of a short float32 PT with φ at its start; each draw has its own batches and random numbers, the same for all that
are compared. A cosine is of the hypergradients of all draws in one vector: φ of the rotations is one number.
"""

import dataclasses
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Annotated

import rich.console
import torch
import torch.nn.functional as F
import typer

import metapt
from bench import counting

RESULTS = Path(__file__).parent / "results"
DATA = Annotated[Path, typer.Option(help="Where prepared data lie")]
DEVICE = Annotated[str, typer.Option(help="cpu or cuda")]
STEPS = (0.01, 0.03, 0.1, 0.3, 1.0)
# PT steps before, and settings.
CASES = {
    "digits-rotation": (200, {}), "digits-noise": (200, {}), "ecg": (40, {"augment": "both", "batch_size": 64, "meta_batch_size": 64}), "ppi": (200, {}),
}  # fmt: skip
app = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_enable=False)
console = rich.console.Console(width=140)


def make(name: str, data: Path, device: str = "cpu", **given) -> metapt.Domain:
    kind = metapt.find_domain(name)
    return kind(metapt.settings_of(kind, given), metapt.pick_device(device), data)


def hypergradients(learner: metapt.Learner, batches: list[dict], solver: metapt.Solver, precision: str) -> torch.Tensor:
    """Those of all draws in one vector, in float64."""
    domain, network, head, found = learner.domain, learner.network, learner.head, []
    network.precision, unroll = precision, domain.settings.unroll
    for draw, at in enumerate(batches):
        torch.manual_seed(draw)
        result = metapt.hypergradient(
            domain.pretrain_loss(network, learner.meta, at["meta"], 1.0, live=False),
            *(domain.finetune_loss(network, head, part, at[part]) for part in ("finetune", "validation")),
            metapt.detached(network), learner.psi, metapt.detached(learner.meta),
            unroll=dataclasses.replace(unroll, hvp=None if solver.hvp == "exact" else unroll.hvp), solver=solver,
            ft_state=learner.ft_states[learner.settings.unroll_scope],
        )  # fmt: skip
        found += [g.flatten().double().cpu() for g in result.phi.values()]
    network.precision = "float32"
    return torch.cat(found)


def cosines(name: str, method: str, data: Path, device: str = "cpu", draws: int = 10, steps=STEPS) -> list[dict]:
    """A row for each step (None: exact products). A solver other than the preset's has 3 terms and damping 1."""
    before, given = CASES[name]
    learner = metapt.Training(make(name, data, device, steps=before, **given), learn=False).run().best
    batches = [{part: stream.next() for part, stream in learner.streams.items()} for _ in range(draws)]
    solver, rows = learner.domain.settings.inverse, []
    if method != solver.method:
        solver = dataclasses.replace(solver, method=method, terms=3, damping=1.0)
    exact = hypergradients(learner, batches, dataclasses.replace(solver, hvp="exact"), "float32")
    for step in (None, *steps):
        way = dataclasses.replace(solver, hvp="finite" if step else "exact", step=step)
        plain = hypergradients(learner, batches, way, "float32") if step else exact
        lower = hypergradients(learner, batches, way, "bf16")
        rows.append({"domain": name, "solver": method, "step": step, "draws": draws,
                     "bf16_to_float32": cosine(lower, plain), "bf16_to_exact": cosine(lower, exact),
                     "float32_to_exact": cosine(plain, exact), "size": (lower.norm() / plain.norm()).item()})  # fmt: skip
        of = {key: f"{value:.3f}" for key, value in rows[-1].items() if isinstance(value, float) and key != "step"}
        console.print(name, method, "exact" if step is None else f"step {step:g}", of)
    return rows


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return F.cosine_similarity(a, b, dim=0).item()


@app.callback(invoke_without_command=True)
def run(
    context: typer.Context,
    domains: Annotated[str, typer.Option(help="With commas between")] = ",".join(CASES),
    solvers: Annotated[str, typer.Option(help="With commas between")] = "identity,cg",
    steps: Annotated[str, typer.Option(help="Of finite products, with commas between")] = ",".join(map(str, STEPS)),
    draws: Annotated[int, typer.Option(help="Draws of batches and random numbers")] = 10,
    device: DEVICE = "cpu",
    data: DATA = Path("data"),
):
    if context.invoked_subcommand:
        return
    path = RESULTS / "precision.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    for name, method in itertools.product(domains.split(","), solvers.split(",")):  # others keep their rows
        rows = [row for row in rows if (row["domain"], row["solver"]) != (name, method)]
        rows += cosines(name, method, data, device, draws, tuple(map(float, steps.split(","))))
        metapt.save_json(path, {"torch": torch.__version__, "device": device, "rows": rows})


@app.command()
def compiled(
    domain: Annotated[str, typer.Option(help="Its name")] = "digits-rotation",
    repeats: Annotated[int, typer.Option(help="Steps of each kind that are timed, in turn")] = 20,
    device: DEVICE = "cpu",
    data: DATA = Path("data"),
):
    """Seconds (median) of a PT and a meta step (q = v, finite), with torch.compile and without, in turn in one run; and of the
    first PT and meta step, which compile."""
    from torch._inductor.utils import fresh_cache  # which takes seconds to import

    given, works = {"hvp": "finite", "solver": "identity", "damping": 0.0, "warmup": 0}, {}
    for way in (False, True):
        made = make(domain, data, device, compile=way, **given)
        learner = metapt.Learner(made)
        made.begin_episode(learner.meta)
        works["pt_step", way] = lambda learner=learner: learner.pretrain_step(0.5)
        works["meta_step", way] = lambda learner=learner: learner.meta_step(0.5)
    begun = time.perf_counter()
    with fresh_cache():  # as if nothing had been compiled here before
        for step in ("pt_step", "meta_step"):
            works[step, True]()
    first = time.perf_counter() - begun
    taken = {key: statistics.median(each) for key, each in counting.in_turn(works, repeats, made.device).items()}
    row = {"domain": domain, "torch": torch.__version__, "threads": torch.get_num_threads(), "device": device,
           "repeats": repeats, "settings": dataclasses.asdict(made.settings) | {"compile": None},
           "first_steps_compiled_seconds": first}  # fmt: skip
    for step in ("pt_step", "meta_step"):
        plain, fast = taken[step, False], taken[step, True]
        row |= {f"{step}_seconds": plain, f"{step}_compiled_seconds": fast, f"{step}_gain": plain / fast}
    metapt.save_json(RESULTS / f"precision-compiled-{domain}-{device}.json", row)
    console.print(row)


if __name__ == "__main__":
    app()
