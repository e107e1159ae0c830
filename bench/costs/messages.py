"""What the ranks of a meta step send each other, and what that would cost on GPUs, on paper.

    python -m bench.costs.messages
        1, 2 and 4 ranks on this machine, stored in bench/results/messages
    python -m bench.costs.messages report
        the table of what is stored

Messages and bytes are counted, seconds are those of the slowest rank; 8 and 64 GPUs are on paper.
"""

import json
import os
import subprocess
import sys
import time

import numpy as np
import rich.console
import torch
import typer

import metapt
from bench import ranks
from bench.costs import counting
from bench.costs.scaling import Size, Workload
from bench.stored import RESULTS, ROOT, save_json
from metapt import Solver

STORED = RESULTS / "messages" / "messages.json"
app = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_enable=False)
console = rich.console.Console(width=130)

RANKS = 1, 2, 4
STEPS = {  # what one process does; the solver and its products, K = 1
    "q = v, exact": (Size(terms=0), "identity"),
    "1 Neumann term, exact": (Size(), "neumann"),
    "1 Neumann term, finite": (Size(hvp="finite"), "neumann"),
    "5 products of CG, exact": (Size(terms=5), "cg"),
    "5 products of CG, finite": (Size(terms=5, hvp="finite"), "cg"),
}
# An H100 at half of its dense 989 TFLOP/s in bfloat16; bytes a second of one GPU one way, and
# seconds a message and hop: NVLink 4 within a machine, one port of 400 Gbit/s InfiniBand between
# machines. A ring sends 2 (R - 1) / R of the bytes.
GPU, NETWORKS = 0.5 * 989e12, {8: ("NVLink", 450e9, 2e-6), 64: ("InfiniBand", 50e9, 5e-6)}
PAPER_PARAMETERS, PAPER_BATCH = 10**8, 64 * 128  # 128 examples a rank of 64


class Divided(Workload):
    """This rank's share of a workload."""

    def __init__(self, size: Size, method: str):
        super().__init__(size)
        n = size.batch
        alpha, damping = (0.01, 0.0) if method == "neumann" else (None, 1.0)
        self.solver = Solver(method, size.terms, alpha, damping, hvp=size.hvp)
        own = torch.arange(n).tensor_split(ranks.size())[ranks.rank()]
        self.share, self.messages = len(own) / n, []
        for name in ("x", "xf", "xv", "y", "yf", "yv", "rows"):
            setattr(self, name, getattr(self, name)[own])

    def reduce(self, tensors):
        self.messages.append(sum(t.numel() * t.element_size() for t in tensors.values()))
        return ranks.sum_over_ranks(tensors)

    def meta_step(self, q0=None):
        theta = {name: t.detach() for name, t in self.theta.items()}
        losses = (self.pretrain_loss, self.finetune_loss, self.validation_loss)
        shared = [lambda *at, loss=loss: self.share * loss(*at) for loss in losses]
        return metapt.hypergradient(
            *shared,
            theta,
            self.psi,
            self.phi,
            unroll=self.unroll,
            solver=self.solver,
            reduce=self.reduce,
        )


def measure_share(repeats: int = 5) -> list[dict]:
    """Rows of this rank; the slowest rank's seconds."""
    rows = []
    for name, (size, method) in STEPS.items():
        work, seconds = Divided(size._replace(batch=512), method), []
        for _ in range(repeats + 1):
            work.messages.clear()
            ranks.gather(None)
            begun = time.perf_counter()
            work.meta_step()
            seconds.append(max(ranks.gather(time.perf_counter() - begun)))
        rows.append(
            {
                "step": name,
                "ranks": ranks.size(),
                "parameters": work.parameters,
                "batch": 512,
                "messages": len(work.messages),
                "bytes": sum(work.messages),
                "seconds": float(np.median(seconds[1:])),
                "flops": sum(ranks.gather(counting.flops(work.meta_step))),
            }
        )
    return rows


def on_paper(row: dict, gpus: int) -> dict:
    """The seconds of a meta step of PAPER_PARAMETERS: its FLOPs and bytes grow as the parameters
    and the batch do.
    """
    network, bandwidth, latency = NETWORKS[gpus]
    more = PAPER_PARAMETERS / row["parameters"]
    computing = row["flops"] * more * (PAPER_BATCH / row["batch"]) / gpus / GPU
    sending = 2 * (gpus - 1) * (row["bytes"] * more / gpus / bandwidth + row["messages"] * latency)
    return {
        "network": network,
        "computing": computing,
        "sending": sending,
        "faster": gpus * computing / (computing + sending),
    }


@app.callback(invoke_without_command=True)
def run(context: typer.Context):
    """Every number of ranks in turn, by torchrun on this machine."""
    if context.invoked_subcommand:
        return
    rows = []
    for size in RANKS:
        words = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--local-addr=127.0.0.1",
            f"--nproc-per-node={size}",
            "-m",
            "bench.costs.messages",
            "share",
        ]
        done = subprocess.run(
            [sys.executable, *words], check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        rows += json.loads(done.stdout)
        save_json(STORED, {"torch": torch.__version__, "cores": os.cpu_count(), "rows": rows})
    report()


@app.command(hidden=True)
def share():
    torch.set_num_threads(1)
    ranks.join()
    rows = measure_share()
    if not ranks.rank():
        print(json.dumps(rows))
    ranks.leave(0)


@app.command()
def report():
    """Its table."""
    rows, cells = json.loads((STORED).read_text())["rows"], []
    for name in STEPS:
        of = {row["ranks"]: row for row in rows if row["step"] == name}
        cells.append(
            [name, f"{of[2]['messages']}", f"{of[2]['bytes'] / 4 / of[2]['parameters']:.2f}"]
        )
        cells[-1] += [f"{of[1]['seconds'] / of[size]['seconds']:.2f}" for size in RANKS[1:]]
        for size in NETWORKS:
            found = on_paper(of[2], size)
            cells[-1].append(
                f"{1e3 * found['computing']:.0f} + {1e3 * found['sending']:.0f} ms: "
                f"{found['faster']:.1f} ×"
            )
    columns = [
        "one meta step",
        "messages",
        "parameters sent",
        *(f"{size} ranks here" for size in RANKS[1:]),
        *(f"{size} GPUs, {network[0]}" for size, network in NETWORKS.items()),
    ]
    metapt.show_table(console, "ranks", columns, cells)


if __name__ == "__main__":
    app()
