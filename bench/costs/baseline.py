"""What one meta step costs, as it was when bench/costs/baseline.json was written: FLOPs,
operations, bytes saved for backward.

python -m bench.costs.baseline     writes the file anew; look at its diff before committing it
"""

import dataclasses
from pathlib import Path

import torch

from bench.costs import counting
from bench.costs.scaling import Size, Workload
from bench.stored import save_json
from metapt import Solver, Unroll

PATH = Path(__file__).parent / "baseline.json"
SOLVERS = {
    "identity": Solver("identity"),
    "neumann 1": Solver("neumann", 1, alpha=0.01),
    "neumann 1, own α": Solver("neumann", 1),
    "cg 3": Solver("cg", 3, damping=0.1),
    "nystrom 4": Solver("nystrom", 4, damping=0.1),
}


def counted(work) -> dict[str, int]:
    kinds = {"flops": counting.flops, "operations": counting.operations, "bytes": counting.peak}
    return {kind: count(work) for kind, count in kinds.items()}


def costs() -> dict[str, dict[str, int]]:
    """Counted, so the same on every machine."""
    work = Workload(Size(width=64, weights=100, batch=32))
    found = {"PT step": counted(work.pt_step)}
    for hvp in ("exact", "finite"):
        for name, solver in SOLVERS.items():
            for unroll in (Unroll(1), Unroll(5, optimizer="adam"), Unroll(5, scope="all")):
                work.unroll, work.solver = unroll, dataclasses.replace(solver, hvp=hvp)
                found[f"{name}, {hvp}, K = {unroll.steps} ({unroll.optimizer}, {unroll.scope})"] = (
                    counted(work.meta_step)
                )
        work.unroll, work.solver = Unroll(1), Solver("neumann", 1, alpha=0.01, hvp=hvp)
        q = {name: torch.ones_like(t) for name, t in work.theta.items()}
        found[f"neumann carried, {hvp}"] = counted(lambda q=q: work.meta_step(q0=q))
    return found


if __name__ == "__main__":
    save_json(PATH, {"torch": torch.__version__.split("+")[0], "costs": costs()})
