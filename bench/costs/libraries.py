"""The same hypergradient by other libraries, on one problem and batch, beside metapt's.

    pip install -r bench/requirements.txt
    python -m bench.costs.libraries
        agreement, time and bytes: bench/results/libraries, and a table
    python -m bench.costs.libraries search
        DEHB: how many PT+FT runs it needs to match gradient descent on φ

Each function gives dL_V/dφ, flat. A library that is not installed, or fails, is named in the table
with its error.
"""

import contextlib
import functools
import inspect
import io
import tempfile
import time
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Annotated

import numpy as np
import rich.console
import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from torch.func import functional_call

import metapt
from bench.accuracy import peers
from bench.costs import counting
from bench.costs.plain_resnet import PlainResNet18
from bench.domains.ecg import ResNet18
from bench.stored import RESULTS, save_json
from metapt import Solver, Unroll

# K, FT's learning rate, Neumann's step, Neumann terms or CG iterations
STEPS, LR, ALPHA, TERMS = (
    5,
    0.1,
    0.05,
    10,
)
PT_LR = 1e-3  # of PT's Adam, whose moments SAMA uses
# Of Adam: higher adds it before the bias correction, torch after; so small that it does not matter
EPS = 1e-12
app = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_enable=False)
console = rich.console.Console(width=130)


def _part(theta: dict[str, Tensor], module: str) -> dict[str, Tensor]:
    """The parameters of one of theta's modules, by their names there."""
    return {
        name.removeprefix(f"{module}."): t
        for name, t in theta.items()
        if name.startswith(f"{module}.")
    }


class Task:
    """PT: 16 binary tasks weighted by φ; FT: a linear head of five classes. Float64."""

    def __init__(self, size: str):
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float64)
        if size == "small":
            shape, features, batch, self.decay = (32,), 64, 64, 0.1
            self.encoder = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
        # The ECG encoder as published: 12 leads, 1,000 samples, width 32; BatchNorm as FT has it
        else:
            shape, features, batch, self.decay = (12, 1000), 256, 8, 0.1
            resnet = ResNet18(12, 32)
            with torch.random.fork_rng():  # what the copy draws, it does not keep
                self.encoder = PlainResNet18(resnet).eval()
        self.pt_head, self.ft_head = nn.Linear(features, 16), nn.Linear(features, 5)
        self.x, self.xf, self.xv = (torch.randn(batch, *shape) for _ in range(3))
        self.y, self.phi = torch.randint(2, (batch, 16)).double(), torch.randn(16)
        self.yf, self.yv = (torch.randint(5, (batch,)) for _ in range(2))
        self.body = nn.ModuleDict({"encoder": self.encoder, "head": self.pt_head})
        torch.set_default_dtype(torch.float32)

    # As functions of parameters ...
    def pretrain_loss(self, theta, phi):
        head, encoder = _part(theta, "head"), _part(theta, "encoder")
        return self.weigh(
            functional_call(self.pt_head, head, functional_call(self.encoder, encoder, self.x)),
            phi,
            theta,
        )

    def finetune_loss(self, theta, psi):
        hidden = functional_call(self.encoder, _part(theta, "encoder"), self.xf)
        return F.cross_entropy(functional_call(self.ft_head, psi, hidden), self.yf)

    def validation_loss(self, theta, psi):
        hidden = functional_call(self.encoder, _part(theta, "encoder"), self.xv)
        return F.cross_entropy(functional_call(self.ft_head, psi, hidden), self.yv)

    # ... and as modules, for libraries that want those.
    def pretrain_loss_of_modules(self, phi: Tensor) -> Tensor:
        return self.weigh(self.pt_head(self.encoder(self.x)), {"weights": phi}, self.theta())

    def weigh(self, logits: Tensor, phi, theta) -> Tensor:
        losses = F.binary_cross_entropy_with_logits(logits, self.y, reduction="none").mean(0)
        # The Hessian is positive definite, as CG needs it
        decay = self.decay * sum(t.square().sum() for t in theta.values())
        return (2 * phi["weights"].sigmoid() * losses).mean() + decay

    def theta(self) -> dict[str, Tensor]:
        return dict(self.body.named_parameters())

    @functools.cached_property
    def moments(self) -> tuple[torch.optim.Adam, dict[str, Tensor]]:
        """Adam after ten steps of PT of a copy of θ, and that copy; θ itself stays."""
        theta = {name: t.detach().clone().requires_grad_() for name, t in self.theta().items()}
        optimizer = torch.optim.Adam(theta.values(), PT_LR, eps=EPS)
        for _ in range(10):
            optimizer.zero_grad()
            self.pretrain_loss(theta, {"weights": self.phi}).backward()
            optimizer.step()
        return optimizer, theta


def ours(task: Task, estimate: str, hvp: str = "exact", of_steps: str | None = None) -> Tensor:
    """`estimate`: a solver's method, and the optimiser of FT where it is not SGD, as "neumann,
    Adam"; "sama" is identity preconditioned by all of Adam's step, "Adam metric" by 1 / (√v̂ +
    ε). `of_steps`: how the adjoints of FT's steps are made, where it is not as `hvp` says.
    """
    method, _, optimizer = estimate.lower().partition(", ")
    if metric := method in ("sama", "adam metric"):
        scale, method = peers.adam_scale(*task.moments, whole=method == "sama"), "identity"
    result = metapt.hypergradient(
        task.pretrain_loss,
        task.finetune_loss,
        task.validation_loss,
        {name: t.detach() for name, t in task.theta().items()},
        {name: t.detach() for name, t in task.ft_head.named_parameters()},
        {"weights": task.phi},
        unroll=Unroll(STEPS, LR, optimizer=optimizer or "sgd", eps=EPS, hvp=of_steps),
        solver=Solver(method, TERMS, alpha=ALPHA, hvp=hvp),
        preconditioner=peers.times(scale) if metric else None,
    )
    return result.phi["weights"]


def published(task: Task, optimizer=torch.optim.SGD, **options) -> Tensor:
    """The published procedure, written anew for this comparison: `higher` for the head,
    double-backward Neumann.

    Raghu et al. 2021, algorithm 1: the FT head is unrolled with higher, the Hessian has a forward
    pass of its own.
    """
    import higher

    phi, parameters = task.phi.clone().requires_grad_(), list(task.theta().values())
    stepper = optimizer(task.ft_head.parameters(), lr=LR, **options)
    with higher.innerloop_ctx(task.ft_head, stepper, copy_initial_weights=False) as (head, steps):
        for _ in range(STEPS):
            steps.step(F.cross_entropy(head(task.encoder(task.xf)), task.yf))
        loss = F.cross_entropy(head(task.encoder(task.xv)), task.yv)
        v = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    gradient = torch.autograd.grad(
        task.pretrain_loss_of_modules(phi), parameters, create_graph=True
    )
    q = term = v
    for _ in range(TERMS):
        product = torch.autograd.grad(gradient, parameters, grad_outputs=term, retain_graph=True)
        term = [t - ALPHA * h for t, h in zip(term, product, strict=True)]
        q = [a + t for a, t in zip(q, term, strict=True)]
    gradient = torch.autograd.grad(
        task.pretrain_loss_of_modules(phi), parameters, create_graph=True
    )
    return -torch.autograd.grad(gradient, phi, grad_outputs=[ALPHA * a for a in q])[0]


def _v(task: Task) -> list[Tensor]:
    """dL_V/dθ through the FT steps, for libraries that solve for q alone: plain autograd, counted
    to them.
    """
    theta, psi = task.theta(), dict(task.ft_head.named_parameters())
    for _ in range(STEPS):
        gradient = torch.autograd.grad(
            task.finetune_loss(theta, psi), list(psi.values()), create_graph=True
        )
        psi = {name: p - LR * g for (name, p), g in zip(psi.items(), gradient, strict=True)}
    loss = task.validation_loss(theta, psi)
    return list(
        torch.autograd.grad(loss, list(theta.values()), allow_unused=True, materialize_grads=True)
    )


def betty(task: Task, method: str) -> Tensor:
    """betty-ml's functions, called as its engine calls them, with stand-ins for its two problems.

    0.1.1 is what its requirements let Python 3.11 have; 0.2.1, which has SAMA, runs there as well.
    """
    from betty import hypergradient

    phi, factor = task.phi.clone().requires_grad_(), 1.0
    config = SimpleNamespace(
        neumann_iterations=TERMS,
        neumann_alpha=ALPHA,
        cg_iterations=TERMS,
        cg_alpha=1.0,
        darts_alpha=1e-5,
        darts_multitask=False,
        sama_adam_alpha=1e-5,
        sama_multitask=False,
    )

    def parameters():
        return list(task.theta().values())

    lower = SimpleNamespace(
        paths=[],
        config=config,
        cur_batch=None,
        training_step_exec=lambda batch: task.pretrain_loss_of_modules(phi),
        trainable_parameters=parameters,
        meta_trainable_parameters=parameters,
        parameters=parameters,
        _strategy="default",
    )
    if method == "sama" and method in hypergradient.jvp_fn_mapping:
        optimizer, theta = task.moments
        states = {
            id(p): optimizer.state[t] | {"last_grad": t.grad}
            for p, t in zip(parameters(), theta.values(), strict=True)
        }
        (group,), step = (
            optimizer.param_groups,
            int(optimizer.state[next(iter(theta.values()))]["step"]),
        )
        lower.optimizer = optimizer
        lower.get_opt_param_group_for_param = lambda p: group
        lower.get_opt_state_for_param = lambda p: states[id(p)]
        # It has the rate in, and not the bias correction: a factor alike for all parameters.
        factor = PT_LR * (1 - group["betas"][0] ** step) / (1 - group["betas"][1] ** step) ** 0.5
    upper = SimpleNamespace(trainable_parameters=lambda: [phi])
    function = hypergradient.jvp_fn_mapping[method]
    sync = [False] if "sync" in inspect.signature(function).parameters else []
    (found,) = function(_v(task), lower, upper, *sync)
    return found / factor


def torchopt(task: Task, method: str, optimizer: str = "sgd", **options) -> Tensor:
    """TorchOpt: differentiable SGD or Adam for the unroll, implicit differentiation of ∇_θ L_PT = 0
    for the rest.
    """
    import torchopt
    from torchopt.diff.implicit import custom_root

    solve = {
        "cg": torchopt.linear_solve.solve_cg(maxiter=TERMS, rtol=0.0, atol=0.0),
        "neumann": torchopt.linear_solve.solve_inv(ns=True, maxiter=TERMS, alpha=ALPHA),
    }[method]
    theta = {name: t.detach() for name, t in task.theta().items()}
    names = list(theta)

    def stationary(values, phi):
        return torch.func.grad(
            lambda values: task.pretrain_loss(
                dict(zip(names, values, strict=True)), {"weights": phi}
            )
        )(values)

    @custom_root(stationary, argnums=1, solve=solve)
    def pretrained(values, phi):
        return values

    phi = task.phi.clone().requires_grad_()
    at = dict(zip(names, pretrained(tuple(theta.values()), phi), strict=True))
    psi = {name: p.detach().requires_grad_() for name, p in task.ft_head.named_parameters()}
    rule = getattr(torchopt, optimizer)(lr=LR, **options)
    state = rule.init(psi)
    for _ in range(STEPS):
        gradient = torch.autograd.grad(
            task.finetune_loss(at, psi), list(psi.values()), create_graph=True
        )
        updates, state = rule.update(dict(zip(psi, gradient, strict=True)), state, inplace=False)
        psi = torchopt.apply_updates(psi, updates, inplace=False)
    return torch.autograd.grad(task.validation_loss(at, psi), phi)[0]


# name: (function, which of ours estimates the same thing)
ENTRIES = {
    "metapt neumann": (lambda task: ours(task, "neumann"), "neumann"),
    "metapt neumann, finite": (lambda task: ours(task, "neumann", "finite"), "neumann"),
    "higher, published procedure": (published, "neumann"),
    "betty neumann": (lambda task: betty(task, "neumann"), "neumann"),
    "torchopt neumann": (lambda task: torchopt(task, "neumann"), "neumann"),
    "metapt cg": (lambda task: ours(task, "cg"), "cg"),
    "metapt cg, finite": (lambda task: ours(task, "cg", "finite"), "cg"),
    "betty cg": (lambda task: betty(task, "cg"), "cg"),
    "torchopt cg": (lambda task: torchopt(task, "cg"), "cg"),
    "metapt neumann, Adam": (lambda task: ours(task, "neumann, Adam"), "neumann, Adam"),
    "higher, published procedure, Adam": (
        lambda task: published(task, torch.optim.Adam, eps=EPS),
        "neumann, Adam",
    ),
    "torchopt neumann, Adam": (
        lambda task: torchopt(task, "neumann", "adam", eps=EPS),
        "neumann, Adam",
    ),
    "metapt identity, finite": (lambda task: ours(task, "identity", "finite"), "identity"),
    "metapt identity, finite, FT's steps exact": (
        lambda task: ours(task, "identity", "finite", "exact"),
        "identity",
    ),
    "betty darts": (lambda task: betty(task, "darts"), "identity"),
    "metapt sama, finite, FT's steps exact": (
        lambda task: ours(task, "sama", "finite", "exact"),
        "sama",
    ),
    "metapt Adam metric, finite, FT's steps exact": (
        lambda task: ours(task, "Adam metric", "finite", "exact"),
        "Adam metric",
    ),
    "betty sama": (lambda task: betty(task, "sama"), "sama"),
}


def compare(size: str, repeats: int = 7, make: Callable[[str], Task] = Task) -> list[dict]:
    """Agreement, bytes and paired times of every entry, one problem and batch."""
    task = make(size)
    kept = {name: t.detach().clone() for name, t in task.theta().items()}
    truth = {
        estimate: ours(task, estimate)
        for estimate in dict.fromkeys(which for _, which in ENTRIES.values())
    }
    rows, working = [], {}
    for name, (function, method) in ENTRIES.items():
        row = {"size": size, "name": name, "error": None}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = function(task).detach()
                # torch.func does not work under the hooks that count
                with contextlib.suppress(RuntimeError):
                    row["bytes"] = counting.peak(lambda function=function: function(task))
                row["flops"] = counting.flops(lambda function=function: function(task))
            row["relative_error"] = ((found - truth[method]).norm() / truth[method].norm()).item()
            working[name] = function
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error) else ""
            row["error"] = f"{type(error).__name__}: {reason}"[:100]
        moved = max((t.detach() - kept[n]).abs().max().item() for n, t in task.theta().items())
        row["moves_theta"] = moved
        with torch.no_grad():
            for n, t in task.theta().items():
                t.copy_(kept[n])
        rows.append(row)
    seconds: dict[str, list[float]] = {name: [] for name in working}
    for _ in range(repeats):  # taking turns, so that a busy moment of the machine meets all
        for name, function in working.items():
            begun = time.process_time()  # of one thread, whatever else the machine does
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                function(task)
            seconds[name].append(time.process_time() - begun)
    for row in rows:
        if row["name"] in working:
            method = ENTRIES[row["name"]][1]  # betty's darts too keeps the graphs of FT's steps
            by_differences = method in ("identity", "sama", "Adam metric")
            base = f"metapt {method}" + ", finite, FT's steps exact" * by_differences
            of_base = next(r for r in rows if r["name"] == base)
            ratios = np.array(seconds[row["name"]]) / np.array(seconds[base])
            row |= {
                "time_ratio": float(np.median(ratios)),
                "time_range": [float(ratios.min()), float(ratios.max())],
                "bytes_ratio": row["bytes"] / of_base["bytes"] if "bytes" in row else None,
                "flops_ratio": row["flops"] / of_base["flops"],
            }
    return rows


@app.callback(invoke_without_command=True)
def run(context: typer.Context, repeats: Annotated[int, typer.Option(help="Of the timings")] = 15):
    if context.invoked_subcommand:
        return
    torch.set_num_threads(1)
    found = [
        row
        for size, n in (("small", repeats), ("ResNet-18", max(1, repeats // 3)))
        for row in compare(size, n)
    ]
    save_json(RESULTS / "libraries" / "libraries.json", {"torch": torch.__version__, "rows": found})
    for size in ("small", "ResNet-18"):
        show(size, [row for row in found if row["size"] == size])


def show(size: str, rows: list[dict]) -> None:
    """The table of one problem."""
    cells = []
    for row in rows:
        if row["error"]:
            cells.append([row["name"], row["error"], "", "", "", "", ""])
            continue
        low, high = row["time_range"]
        cells.append(
            [
                row["name"],
                f"{row['relative_error']:.0e}",
                f"{row['time_ratio']:.2f}",
                f"{low:.2f} … {high:.2f}",
                f"{row['bytes_ratio']:.2f}" if row["bytes_ratio"] else "not counted",
                f"{row['flops_ratio']:.2f}",
                "moved" if row["moves_theta"] else "",
            ]
        )
    columns = ["", "off metapt's exact by", "time", "range", "bytes", "FLOPs", "θ afterwards"]
    metapt.show_table(console, f"{size}: against metapt's exact of the same method", columns, cells)


def two_stage(dimensions: int):
    """Ridge → ridge with `dimensions` log-weights of groups of PT examples, half of which have
    noise for labels.
    """
    torch.manual_seed(0)
    x, xf, xv = (torch.randn(n, 20, dtype=torch.float64) for n in (400, 15, 200))
    truth = torch.randn(20, 4, dtype=torch.float64)
    group = torch.arange(400) * dimensions // 400
    bad = torch.rand(max(dimensions, 2)) < 0.5
    y = x @ truth
    spoiled = bad[group] if dimensions > 1 else torch.rand(400) < 0.5
    y[spoiled] = 3 * torch.randn(int(spoiled.sum()), 4, dtype=torch.float64)
    mix = torch.randn(4, 1, dtype=torch.float64)

    def value(phi: Tensor) -> Tensor:
        """L_V of a whole PT+FT run, in closed form; of one dimension φ is the log of the ridge."""
        weights = phi[group].sigmoid() if dimensions > 1 else torch.ones(400, dtype=torch.float64)
        ridge = phi[0].exp() if dimensions == 1 else 1e-2
        d = weights[:, None] / 400
        eye = torch.eye(20, dtype=torch.float64)
        theta = torch.linalg.solve(x.T @ (d * x) + ridge * eye, x.T @ (d * y))
        hidden = xf @ theta
        psi = torch.linalg.solve(
            hidden.T @ hidden / 15 + 1e-2 * torch.eye(4, dtype=torch.float64),
            hidden.T @ (xf @ truth @ mix) / 15,
        )
        return (xv @ theta @ psi - xv @ truth @ mix).square().mean()

    return value


@app.command()
def search(
    steps: Annotated[int, typer.Option(help="Gradient steps on φ, one PT+FT run each")] = 50,
    most: Annotated[int, typer.Option(help="PT+FT runs that DEHB may have")] = 3000,
    seeds: int = 3,
):
    """Runs that DEHB needs to come as low as gradient descent on φ: φ in [−5, 5]^d, L_V after PT to
    a minimum and FT.

    The gradient here is autograd through the closed form, so it counts the worth of a gradient, not
    of its estimate.
    """
    from dehb import DEHB

    torch.set_num_threads(1)
    rows = []
    for dimensions in (1, 10, 100):
        value = two_stage(dimensions)
        phi = torch.zeros(dimensions, dtype=torch.float64, requires_grad=True)
        optimizer, trail = torch.optim.Adam([phi], 0.3), []
        for _ in range(steps):
            loss = value(phi)
            trail.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            phi.data.clamp_(-5, 5)
        for seed in range(seeds):
            best: list[float] = []

            def evaluate(config, fidelity=None, value=value, best=best, **_):
                with torch.no_grad():
                    loss = value(
                        torch.from_numpy(np.asarray(config, dtype=np.float64)) * 10 - 5
                    ).item()
                best.append(min(loss, best[-1] if best else loss))
                return {"fitness": loss, "cost": 1.0}

            with (
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(io.StringIO()),
                tempfile.TemporaryDirectory() as folder,
            ):
                DEHB(
                    f=evaluate,
                    dimensions=dimensions,
                    configspace=False,
                    min_fidelity=1,
                    max_fidelity=3,
                    n_workers=1,
                    seed=seed,
                    output_path=folder,
                    log_level="ERROR",
                ).run(fevals=most)
            # To 1 %
            needed = next((i + 1 for i, loss in enumerate(best) if loss <= 1.01 * min(trail)), None)
            rows.append(
                {
                    "dimensions": dimensions,
                    "seed": seed,
                    "gradient_runs": int(np.argmin(trail)) + 1,
                    "gradient_loss": min(trail),
                    "start": trail[0],
                    "dehb_runs": needed,
                    "dehb_best": best[-1],
                    "dehb_at_as_many": best[min(steps, len(best)) - 1],
                }
            )
            save_json(RESULTS / "libraries" / "dehb.json", {"most": most, "rows": rows})
    cells = [
        [
            str(row["dimensions"]),
            str(row["seed"]),
            f"{row['start']:.4g}",
            f"{row['gradient_loss']:.4g}",
            str(row["gradient_runs"]),
            f"{row['dehb_at_as_many']:.4g}",
            f"{row['dehb_best']:.4g}",
            str(row["dehb_runs"] or f"> {most}"),
        ]
        for row in rows
    ]
    columns = [
        "size of φ",
        "seed",
        "L_V at the start",
        "by gradient",
        "runs",
        f"DEHB at {steps}",
        "DEHB's best",
        "DEHB's runs to match",
    ]
    metapt.show_table(console, "PT+FT runs", columns, cells)


if __name__ == "__main__":
    app()
