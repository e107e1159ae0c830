"""How time, FLOPs and memory of one meta step grow, against one plain PT step of the same batch.

    python -m bench.scaling [--device cuda]     every sweep: bench/results/scaling-DEVICE.json, table and figure
    python -m bench.scaling --only SWEEP        this one, such as "PT parameters, EKFAC"; the others as they are stored
    python -m bench.scaling report              table and bench/figures/scaling.png from what was found
    python -m bench.scaling ranks               data parallelism: bench/results/scaling-ranks.json, and a table

A sweep changes one thing and leaves the rest as in `CENTRE`. FLOPs and bytes saved for backward are counted, on CUDA the
peak of allocated bytes too; times are medians of five, the meta step and the PT step taking turns. EKFAC is q = M⁻¹v
with the Kronecker-factored Fisher of the batch, by curvlinops; what it keeps beside the graph is in no count of bytes.
"""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import rich.console
import torch
import torch.nn.functional as F
import typer
from scipy import stats
from torch import nn

import metapt
from bench import counting, peers
from bench.problems import Modules, holding
from metapt import Solver, Unroll

HERE = Path(__file__).parent
app = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_enable=False)
console = rich.console.Console(width=130)


class Size(NamedTuple):
    width: int = 256  # of two hidden layers: PT parameters are about width² + 96·width
    weights: int = 1000  # meta-parameters: weights of PT examples, of which a batch meets `batch`
    terms: int = 1  # of a Neumann series
    ft_steps: int = 1  # K
    pt_steps: int = 1  # before the meta step
    batch: int = 128  # PT, FT and validation examples alike
    hvp: str = "exact"
    scope: str = "head"
    factors: bool = False  # EKFAC in place of the Neumann series


CENTRE = Size()
WIDTHS = (64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072)
COUNTS = (1, 2, 5, 10, 14, 20, 28, 40, 56, 80, 100)
SWEEPS = {
    "PT parameters": [Size(width=w) for w in WIDTHS],
    "PT parameters, finite": [Size(width=w, hvp="finite") for w in WIDTHS],
    "PT parameters, EKFAC": [Size(width=w, factors=True) for w in WIDTHS if w <= 1024],
    "meta-parameters": [Size(weights=round(10 ** (n / 2))) for n in range(15)],
    "terms": [Size(terms=t) for t in (0, *COUNTS)],
    "terms, finite": [Size(terms=t, hvp="finite") for t in (0, *COUNTS)],
    "FT steps": [Size(ft_steps=k) for k in COUNTS],
    "FT steps, finite": [Size(ft_steps=k, hvp="finite") for k in COUNTS],
    "FT steps of everything": [Size(ft_steps=k, scope="all") for k in COUNTS],
    "FT steps of everything, finite": [Size(ft_steps=k, scope="all", hvp="finite") for k in COUNTS],
    "PT steps before": [Size(pt_steps=n) for n in (1, 3, 10, 30, 100, 300, 1000)],
    "batch": [Size(batch=b) for b in (16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)],
}
AXES = {"PT parameters": "parameters", "meta-parameters": "weights", "terms": "terms", "FT steps": "ft_steps",
        "PT steps before": "pt_steps", "batch": "batch"}  # fmt: skip
HUGE = {"PT parameters": [Size(width=w) for w in (4096, 8192, 10_000)]}  # up to 1e8, on CUDA


class Workload:
    """A multilayer perceptron with a PT head of 32 outputs and an FT head of ten classes; φ weighs PT examples."""

    def __init__(self, size: Size, device: str = "cpu"):
        torch.manual_seed(0)
        self.size = size

        def layer(n, m):
            return (torch.randn(n, m) / n**0.5).to(device).requires_grad_()

        w = size.width
        self.theta = {"a": layer(64, w), "b": layer(w, w), "head": layer(w, 32)}
        self.psi = {"w": layer(w, 10).detach()}
        self.phi = {"weights": torch.zeros(size.weights, device=device)}
        self.parameters = sum(t.numel() for t in self.theta.values())
        self.x, self.xf, self.xv = (torch.randn(size.batch, 64, device=device) for _ in range(3))
        self.y = torch.randn(size.batch, 32, device=device)
        self.yf, self.yv = (torch.randint(10, (size.batch,), device=device) for _ in range(2))
        self.rows = torch.randint(size.weights, (size.batch,), device=device)
        self.optimizer = torch.optim.Adam(self.theta.values(), 1e-4)
        self.unroll = Unroll(size.ft_steps, 1e-3, scope=size.scope)
        self.solver = Solver("neumann", size.terms, alpha=0.01, hvp=size.hvp)
        if size.factors:
            self.solver = Solver("identity", hvp=size.hvp)

    def hidden(self, theta, x):
        return torch.tanh(torch.tanh(x @ theta["a"]) @ theta["b"])

    def pretrain_loss(self, theta, phi):
        losses = (self.hidden(theta, self.x) @ theta["head"] - self.y).square().mean(1)
        return (2 * phi["weights"][self.rows].sigmoid() * losses).mean()

    def finetune_loss(self, theta, psi):
        return F.cross_entropy(self.hidden(theta, self.xf) @ psi["w"], self.yf)

    def validation_loss(self, theta, psi):
        return F.cross_entropy(self.hidden(theta, self.xv) @ psi["w"], self.yv)

    def pt_step(self) -> None:
        self.optimizer.zero_grad()
        self.pretrain_loss(self.theta, self.phi).backward()
        self.optimizer.step()

    def meta_step(self, q0=None) -> metapt.Hypergradient:
        theta = {name: t.detach() for name, t in self.theta.items()}
        return metapt.hypergradient(self.pretrain_loss, self.finetune_loss, self.validation_loss, theta, self.psi, self.phi,
                             unroll=self.unroll, solver=self.solver, q0=q0,
                             preconditioner=self.kronecker(theta) if self.size.factors else None)  # fmt: skip

    def kronecker(self, theta):
        w, device = self.size.width, self.x.device
        sizes = [(64, w), (w, w), (w, 32)]
        a, b, head = (nn.utils.skip_init(nn.Linear, *size, bias=False, device=device) for size in sizes)
        network = nn.Sequential(a, nn.Tanh(), b, nn.Tanh(), head)
        holding(network, theta, torch.t)
        weights = 2 * self.phi["weights"][self.rows].sigmoid()[:, None]
        return peers.kronecker(Modules(network, torch.t, nn.MSELoss(), self.x, self.y, weights, 0.1))


def measure(size: Size, device: str = "cpu", repeats: int = 5) -> dict:
    work = Workload(size, device)
    for _ in range(size.pt_steps):
        work.pt_step()
    times: dict[str, list[float]] = {"meta_step": [], "pt_step": []}
    for repeat in range(repeats + 1):
        for name, seconds in times.items():
            _wait(device)
            begun = time.perf_counter()
            getattr(work, name)()
            _wait(device)
            if repeat:  # the first warms up
                seconds.append(time.perf_counter() - begun)
    row = {**size._asdict(), "parameters": work.parameters, "device": device}
    for name, seconds in times.items():
        step = getattr(work, name)
        row[f"{name}_seconds"] = float(np.median(seconds)) if repeats else None
        row[f"{name}_flops"] = counting.flops(step)
        row[f"{name}_bytes"] = counting.peak(step)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step()
            row[f"{name}_allocated"] = torch.cuda.max_memory_allocated() - before
    return row


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def slope(x, y) -> tuple[float, float]:
    """Of log y over log x for x > 0, upper half of the range, with half the width of its 95 % interval."""
    x, y = np.array(x, float), np.array(y, float)
    kept = (x > 0) & (x >= np.sqrt(max(x.min(), 1) * x.max()))
    if kept.sum() < 3:
        kept = x > 0
    if np.ptp(np.log(y[kept])) == 0:
        return 0.0, 0.0
    fit = stats.linregress(np.log(x[kept]), np.log(y[kept]))
    return fit.slope, fit.stderr * stats.t.ppf(0.975, kept.sum() - 2)


@app.callback(invoke_without_command=True)
def run(context: typer.Context, device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
        only: Annotated[str, typer.Option(help="One sweep, the others stay as they are")] = ""):  # fmt: skip
    if context.invoked_subcommand:
        return
    torch.set_num_threads(1)
    path = HERE / "results" / f"scaling-{device}.json"
    found = {"torch": torch.__version__, "device": device, "sweeps": {}}
    if only:
        found = json.loads(path.read_text())
        if only not in SWEEPS or found["torch"] != torch.__version__:
            raise typer.BadParameter(f"{only!r} is no sweep, or {path} is of torch {found['torch']}, not this one")
    for name, sizes in SWEEPS.items():
        if only and name != only:
            continue
        if sizes[0].factors and not importlib.util.find_spec("curvlinops"):
            console.print(f"{name}: not run, curvlinops is not installed (bench/requirements.txt)")
            continue
        found["sweeps"][name] = []
        for size in sizes + (HUGE.get(name, []) if device == "cuda" else []):
            found["sweeps"][name].append(measure(size, device))
        metapt.save_json(path, found)
        console.print(f"{name}: {len(sizes)} sizes")
    report(device)


@app.command()
def report(device: str = "cpu"):
    """Table and figure of what was found."""
    found = json.loads((HERE / "results" / f"scaling-{device}.json").read_text())["sweeps"]
    rows = []
    for name, sweep in found.items():
        x = [row[AXES[name.split(",")[0].removesuffix(" of everything")]] for row in sweep]
        cells = [name, f"{x[0]:,} … {x[-1]:,}"]
        for quantity in ("seconds", "flops", "bytes"):
            fitted, half = slope(x, [row[f"meta_step_{quantity}"] for row in sweep])
            ratios = [row[f"meta_step_{quantity}"] / row[f"pt_step_{quantity}"] for row in sweep]
            cells += [f"{fitted:.2f} ± {half:.2f}", f"{ratios[0]:.2f} … {ratios[-1]:.2f}"]
        rows.append(cells)
    columns = ["", "from … to", "time ~ n^", "× PT step", "FLOPs ~ n^", "× PT step", "bytes ~ n^", "× PT step"]
    metapt.show_table(console, f"one meta step, {device}", columns, rows)

    def draw(figure):
        figure.set_size_inches(7, 2.5)
        left, right = figure.subplots(1, 2)
        for name, axis, key in (("terms", left, "terms"), ("FT steps", left, "ft_steps"),
                                ("FT steps of everything", left, "ft_steps"), ("PT steps before", left, "pt_steps"),
                                ("PT parameters", right, "parameters"), ("meta-parameters", right, "weights")):  # fmt: skip
            for kind, style in (("", "o-"), (", finite", "s--")):
                if name + kind in found:
                    points = [(max(row[key], 1), row["meta_step_bytes"] / row["pt_step_bytes"])
                              for row in found[name + kind]]  # fmt: skip
                    axis.plot(*zip(*points, strict=True), style, ms=3, lw=1, label=name + kind)
        left.set(xscale="log", yscale="log", xlabel="how many", ylabel="bytes saved for backward, in PT steps")
        left.set_ylim(0.5, 3000)
        right.set(
            xscale="log", xlabel="how many parameters", ylabel="bytes saved for backward, in PT steps", ylim=(0, 5)
        )
        left.legend(fontsize=5.5, loc="upper left", ncols=2)
        right.legend(fontsize=6, loc="upper left")

    metapt.save_figure(HERE / "figures" / f"scaling{'' if device == 'cpu' else '-' + device}.png", draw)


# Ranks: messages and bytes are counted; 8 and 64 GPUs are on paper

RANKS = 1, 2, 4
STEPS = {  # what one process does; the solver and its products, K = 1
    "q = v, exact": (Size(terms=0), "identity"), "1 Neumann term, exact": (Size(), "neumann"),
    "1 Neumann term, finite": (Size(hvp="finite"), "neumann"), "5 products of CG, exact": (Size(terms=5), "cg"),
    "5 products of CG, finite": (Size(terms=5, hvp="finite"), "cg")}  # fmt: skip
# An H100 at half of its dense 989 TFLOP/s in bfloat16; bytes a second of one GPU one way, and seconds a message and hop:
# NVLink 4 within a machine, one port of 400 Gbit/s InfiniBand between machines. A ring sends 2 (R - 1) / R of the bytes.
GPU, NETWORKS = 0.5 * 989e12, {8: ("NVLink", 450e9, 2e-6), 64: ("InfiniBand", 50e9, 5e-6)}
PAPER_PARAMETERS, PAPER_BATCH = 10**8, 64 * 128  # 128 examples a rank of 64


class Divided(Workload):
    """This rank's share of a workload."""

    def __init__(self, size: Size, method: str):
        super().__init__(size)
        self.ranks, n = metapt.Ranks(), size.batch
        alpha, damping = (0.01, 0.0) if method == "neumann" else (None, 1.0)
        self.solver = Solver(method, size.terms, alpha, damping, hvp=size.hvp)
        own = torch.arange(n).tensor_split(self.ranks.size)[self.ranks.rank]
        self.share, self.messages = len(own) / n, []
        for name in ("x", "xf", "xv", "y", "yf", "yv", "rows"):
            setattr(self, name, getattr(self, name)[own])

    def reduce(self, tensors):
        self.messages.append(sum(t.numel() * t.element_size() for t in tensors.values()))
        return self.ranks.sum(tensors)

    def meta_step(self, q0=None):
        theta = {name: t.detach() for name, t in self.theta.items()}
        losses = (self.pretrain_loss, self.finetune_loss, self.validation_loss)
        shared = [lambda *at, loss=loss: self.share * loss(*at) for loss in losses]
        return metapt.hypergradient(*shared, theta, self.psi, self.phi, unroll=self.unroll, solver=self.solver,
                                    reduce=self.reduce)  # fmt: skip


def measure_share(repeats: int = 5) -> list[dict]:
    """Rows of this rank; the slowest rank's seconds."""
    rows = []
    for name, (size, method) in STEPS.items():
        work, seconds = Divided(size._replace(batch=512), method), []
        for _ in range(repeats + 1):
            work.messages.clear()
            work.ranks.objects(None)
            begun = time.perf_counter()
            work.meta_step()
            seconds.append(max(work.ranks.objects(time.perf_counter() - begun)))
        rows.append({"step": name, "ranks": work.ranks.size, "parameters": work.parameters, "batch": 512,
                     "messages": len(work.messages), "bytes": sum(work.messages), "seconds": float(np.median(seconds[1:])),
                     "flops": sum(work.ranks.objects(counting.flops(work.meta_step)))})  # fmt: skip
    return rows


def on_paper(row: dict, ranks: int) -> dict:
    """The seconds of a meta step of PAPER_PARAMETERS: its FLOPs and bytes grow as the parameters and the batch do."""
    network, bandwidth, latency = NETWORKS[ranks]
    more = PAPER_PARAMETERS / row["parameters"]
    computing = row["flops"] * more * (PAPER_BATCH / row["batch"]) / ranks / GPU
    sending = 2 * (ranks - 1) * (row["bytes"] * more / ranks / bandwidth + row["messages"] * latency)
    return {"network": network, "computing": computing, "sending": sending,
            "faster": ranks * computing / (computing + sending)}  # fmt: skip


@app.command()
def ranks():
    """Every number of ranks in turn, by torchrun on this machine."""
    rows = []
    for size in RANKS:
        words = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={size}", "-m",
                 "bench.scaling", "share"]  # fmt: skip
        done = subprocess.run([sys.executable, *words], check=True, stdout=subprocess.PIPE, text=True, cwd=HERE.parent)
        rows += json.loads(done.stdout)
        metapt.save_json(
            HERE / "results" / "scaling-ranks.json", {"torch": torch.__version__, "cores": os.cpu_count(), "rows": rows}
        )
    ranks_report()


@app.command(hidden=True)
def share():
    torch.set_num_threads(1)
    metapt.join_ranks()
    rows = measure_share()
    if not metapt.Ranks().rank:
        print(json.dumps(rows))
    metapt.leave_ranks()


@app.command()
def ranks_report():
    """Its table."""
    rows, cells = json.loads((HERE / "results" / "scaling-ranks.json").read_text())["rows"], []
    for name in STEPS:
        of = {row["ranks"]: row for row in rows if row["step"] == name}
        cells.append([name, f"{of[2]['messages']}", f"{of[2]['bytes'] / 4 / of[2]['parameters']:.2f}"])
        cells[-1] += [f"{of[1]['seconds'] / of[size]['seconds']:.2f}" for size in RANKS[1:]]
        for size in NETWORKS:
            found = on_paper(of[2], size)
            cells[-1].append(
                f"{1e3 * found['computing']:.0f} + {1e3 * found['sending']:.0f} ms: {found['faster']:.1f} ×"
            )
    columns = ["one meta step", "messages", "parameters sent", *(f"{size} ranks here" for size in RANKS[1:]),
               *(f"{size} GPUs, {network[0]}" for size, network in NETWORKS.items())]  # fmt: skip
    metapt.show_table(console, "ranks", columns, cells)


if __name__ == "__main__":
    app()
