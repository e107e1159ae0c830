"""How time, FLOPs and memory of one meta step grow, against one plain PT step of the same batch.

    python -m bench.costs.scaling [--device cuda]
        every sweep, a table and a figure
    python -m bench.costs.scaling --only SWEEP
        this one, such as "PT parameters, EKFAC"; the others as they are stored
    python -m bench.costs.scaling report
        table and figure of what is stored, in bench/results/scaling

A sweep changes one thing and leaves the rest as in `CENTRE`. FLOPs and bytes saved for backward are
counted, on CUDA the peak of allocated bytes too; times are medians of five, the meta step and the
PT step taking turns. EKFAC is q = M⁻¹v with the Kronecker-factored Fisher of the batch, by
curvlinops; what it keeps beside the graph is in no count of bytes.
"""

import importlib.util
import json
import time
from typing import Annotated, NamedTuple

import numpy as np
import rich.console
import torch
import torch.nn.functional as F
import typer
from scipy import stats
from torch import nn

import metapt
from bench.accuracy import peers
from bench.accuracy.problems import Modules, holding
from bench.costs import counting
from bench.stored import RESULTS, save_figure, save_json
from metapt import Solver, Unroll

STORED = RESULTS / "scaling"
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
AXES = {
    "PT parameters": "parameters",
    "meta-parameters": "weights",
    "terms": "terms",
    "FT steps": "ft_steps",
    "PT steps before": "pt_steps",
    "batch": "batch",
}
HUGE = {"PT parameters": [Size(width=w) for w in (4096, 8192, 10_000)]}  # up to 1e8, on CUDA


class Workload:
    """A multilayer perceptron with a PT head of 32 outputs and an FT head of ten classes; φ weighs
    PT examples.
    """

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
        return metapt.hypergradient(
            self.pretrain_loss,
            self.finetune_loss,
            self.validation_loss,
            theta,
            self.psi,
            self.phi,
            unroll=self.unroll,
            solver=self.solver,
            q0=q0,
            preconditioner=self.kronecker(theta) if self.size.factors else None,
        )

    def kronecker(self, theta):
        w, device = self.size.width, self.x.device
        sizes = [(64, w), (w, w), (w, 32)]
        a, b, head = (
            nn.utils.skip_init(nn.Linear, *size, bias=False, device=device) for size in sizes
        )
        network = nn.Sequential(a, nn.Tanh(), b, nn.Tanh(), head)
        holding(network, theta, torch.t)
        weights = 2 * self.phi["weights"][self.rows].sigmoid()[:, None]
        return peers.kronecker(
            Modules(network, torch.t, nn.MSELoss(), self.x, self.y, weights, 0.1)
        )


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
    """Of log y over log x for x > 0, upper half of the range, with half the width of its 95 %
    interval.
    """
    x, y = np.array(x, float), np.array(y, float)
    kept = (x > 0) & (x >= np.sqrt(max(x.min(), 1) * x.max()))
    if kept.sum() < 3:
        kept = x > 0
    if np.ptp(np.log(y[kept])) == 0:
        return 0.0, 0.0
    fit = stats.linregress(np.log(x[kept]), np.log(y[kept]))
    return fit.slope, fit.stderr * stats.t.ppf(0.975, kept.sum() - 2)


@app.callback(invoke_without_command=True)
def run(
    context: typer.Context,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    only: Annotated[str, typer.Option(help="One sweep, the others stay as they are")] = "",
):
    if context.invoked_subcommand:
        return
    torch.set_num_threads(1)
    path = STORED / f"scaling-{device}.json"
    found = {"torch": torch.__version__, "device": device, "sweeps": {}}
    if only:
        found = json.loads(path.read_text())
        if only not in SWEEPS or found["torch"] != torch.__version__:
            raise typer.BadParameter(
                f"{only!r} is no sweep, or {path} is of torch {found['torch']}, not this one"
            )
    for name, sizes in SWEEPS.items():
        if only and name != only:
            continue
        if sizes[0].factors and not importlib.util.find_spec("curvlinops"):
            console.print(f"{name}: not run, curvlinops is not installed (bench/requirements.txt)")
            continue
        found["sweeps"][name] = []
        for size in sizes + (HUGE.get(name, []) if device == "cuda" else []):
            found["sweeps"][name].append(measure(size, device))
        save_json(path, found)
        console.print(f"{name}: {len(sizes)} sizes")
    report(device)


@app.command()
def report(device: str = "cpu"):
    """Table and figure of what was found."""
    found = json.loads((STORED / f"scaling-{device}.json").read_text())["sweeps"]
    rows = []
    for name, sweep in found.items():
        x = [row[AXES[name.split(",")[0].removesuffix(" of everything")]] for row in sweep]
        cells = [name, f"{x[0]:,} … {x[-1]:,}"]
        for quantity in ("seconds", "flops", "bytes"):
            fitted, half = slope(x, [row[f"meta_step_{quantity}"] for row in sweep])
            ratios = [row[f"meta_step_{quantity}"] / row[f"pt_step_{quantity}"] for row in sweep]
            cells += [f"{fitted:.2f} ± {half:.2f}", f"{ratios[0]:.2f} … {ratios[-1]:.2f}"]
        rows.append(cells)
    columns = [
        "",
        "from … to",
        "time ~ n^",
        "× PT step",
        "FLOPs ~ n^",
        "× PT step",
        "bytes ~ n^",
        "× PT step",
    ]
    metapt.show_table(console, f"one meta step, {device}", columns, rows)

    def draw(figure):
        figure.set_size_inches(7, 2.5)
        left, right = figure.subplots(1, 2)
        for name, axis, key in (
            ("terms", left, "terms"),
            ("FT steps", left, "ft_steps"),
            ("FT steps of everything", left, "ft_steps"),
            ("PT steps before", left, "pt_steps"),
            ("PT parameters", right, "parameters"),
            ("meta-parameters", right, "weights"),
        ):
            for kind, style in (("", "o-"), (", finite", "s--")):
                if name + kind in found:
                    points = [
                        (max(row[key], 1), row["meta_step_bytes"] / row["pt_step_bytes"])
                        for row in found[name + kind]
                    ]
                    axis.plot(*zip(*points, strict=True), style, ms=3, lw=1, label=name + kind)
        left.set(
            xscale="log",
            yscale="log",
            xlabel="how many",
            ylabel="bytes saved for backward, in PT steps",
        )
        left.set_ylim(0.5, 3000)
        right.set(
            xscale="log",
            xlabel="how many parameters",
            ylabel="bytes saved for backward, in PT steps",
            ylim=(0, 5),
        )
        left.legend(fontsize=5.5, loc="upper left", ncols=2)
        right.legend(fontsize=6, loc="upper left")

    save_figure(STORED / f"scaling{'' if device == 'cpu' else '-' + device}.png", draw)


if __name__ == "__main__":
    app()
