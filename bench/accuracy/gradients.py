"""How right each hypergradient is, and what it costs.

    python -m bench.accuracy.gradients
        the frozen problems, the early-stopped ones, penalty methods on both, digits,
        mini-batches, an online run
    python -m bench.accuracy.gradients kronecker
        Kronecker-factored curvature and digits alone; the rest stays as it is stored
    python -m bench.accuracy.gradients penalty
        first-order penalty methods alone, beside what they are compared to
    python -m bench.accuracy.gradients report
        tables and a figure of what is stored

It is stored in bench/results/gradients, with the figure.

Costs are counted, not timed. A product is one Hessian-vector or mixed-derivative product, or, of a
preconditioner, two passes' worth of examples; "PT steps" are the FLOPs of all passes, those of FT
included, in units of one forward and backward pass of L_PT over the same examples. FLOPs are those
of matrix products and convolutions, and with Kronecker factors of their eigendecompositions.
"""

import contextlib
import functools
import itertools
import json
import math
from collections.abc import Callable
from unittest import mock

import numpy as np
import rich.console
import torch
import typer
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import metapt
from bench.accuracy import peers, problems
from bench.accuracy.problems import Problem, flat, unflat
from bench.costs import counting
from bench.stored import RESULTS, save_figure, save_json
from metapt import Solver, Unroll

STORED = RESULTS / "gradients" / "gradients.json"
ROWS = 32  # examples of a mini-batch
DAMPING = 0.1  # of `digits`, as the domain digits-noise has it
app = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_enable=False)
console = rich.console.Console(width=150)


def ours(p: Problem, solver: Solver, rows=None, **options) -> Tensor:
    """metapt's hypergradient of a problem, flat; the PT loss over `rows` alone, where given."""
    over = {} if rows is None else {"rows": rows}
    return flat(
        metapt.hypergradient(
            lambda theta, phi: p.pretrain_loss(theta, phi, **over),
            p.finetune_loss,
            p.validation_loss,
            p.theta,
            p.psi,
            p.phi,
            unroll=Unroll(p.ft_steps, p.ft_lr),
            solver=solver,
            **options,
        ).phi
    )


def estimators(p: Problem) -> dict[str, Callable[[], Tensor]]:
    """Every estimator that this problem allows, by name."""
    found: dict[str, Callable[[], Tensor]] = {"identity": lambda: ours(p, Solver("identity"))}
    for terms in (1, 2, 5, 20, 100):
        found[f"neumann {terms}, α = PT's"] = lambda t=terms: ours(
            p, Solver("neumann", t, alpha=p.pt_lr)
        )
        found[f"neumann {terms}"] = lambda t=terms: ours(p, Solver("neumann", t))
    for terms in (1, 2, 5, 10, 20, 50):
        found[f"cg {terms}"] = lambda t=terms: ours(p, Solver("cg", t))
    for terms in (5, 20):
        found[f"cg {terms}, damping 0.1"] = lambda t=terms: ours(p, Solver("cg", t, damping=0.1))
        found[f"cg {terms}, finite"] = lambda t=terms: ours(p, Solver("cg", t, hvp="finite"))
    found["neumann 20, finite"] = lambda: ours(p, Solver("neumann", 20, hvp="finite"))
    for rank in (5, 10, 20, 50):
        found[f"nystrom {rank}"] = lambda r=rank: ours(p, Solver("nystrom", r, damping=1e-2))
    for examples in (50, 200):
        for terms in (5, 10, 19):
            found[f"cg {terms}, Fisher of {examples}"] = lambda t=terms, n=examples: ours(
                p, Solver("cg", t), preconditioner=peers.fisher(p, min(n, p.examples), 1e-3)
            )
    found |= preconditioned(p, 1e-3) | by_adam(p)
    found["EvoGrad"] = lambda: peers.evograd(p)
    found["EvoGrad, mean of 20"] = lambda: sum(peers.evograd(p, seed) for seed in range(20)) / 20
    if p.pt_steps is not None:
        found["reverse"] = lambda: peers.reverse(p)
        found["reverse, last 5"] = lambda: peers.reverse(p, 5)
        found["reverse, last 50"] = lambda: peers.reverse(p, 50)
        found["forward"] = lambda: peers.forward(p)
        found["reversible"] = lambda: peers.reversible(p)
    return found


def preconditioned(
    p: Problem, fisher: float, damping: float = 0.0
) -> dict[str, Callable[[], Tensor]]:
    """The inverse of approximate curvature alone; of Kronecker factors, a preconditioner too."""

    def ask(solver, make):
        return lambda: ours(p, solver, preconditioner=make())

    makes = {
        f"Fisher of {n}": lambda n=n: peers.fisher(p, min(n, p.examples), fisher) for n in (50, 200)
    }
    found = {f"identity, {name}": ask(Solver("identity"), make) for name, make in makes.items()}
    if p.modules is None:
        return found
    for name, options in {
        "KFAC": {"corrected": False},
        "EKFAC": {},
        "EKFAC, type 2": {"fisher": "type-2"},
    }.items():
        make = functools.partial(peers.kronecker, p.modules(p.theta), **options)
        found[f"identity, {name}"] = ask(Solver("identity"), make)
        for terms in (2, 5, 10, 19):
            found[f"cg {terms}, {name}"] = ask(Solver("cg", terms, damping=damping), make)
    return found


def by_adam(p: Problem, damping: float = 0.0) -> dict[str, Callable[[], Tensor]]:
    """In the metric of Adam's moments, which PT has anyway: what it takes to make them is not
    counted.
    """
    metric = peers.adam_metric(p)
    found = {"identity, Adam metric": lambda: ours(p, Solver("identity"), preconditioner=metric)}
    for terms in (2, 5, 10, 20, 50):
        found[f"cg {terms}, Adam metric"] = lambda t=terms: ours(
            p, Solver("cg", t, damping=damping), preconditioner=metric
        )
    return found


PENALTY_STEPS = (10, 50, 200)
STRENGTHS = (1, 10, 100)  # λ
BESIDE_PENALTY = (
    "identity",
    "identity, Adam metric",
    "cg 5",
    "cg 10",
    "cg 20",
    "cg 50",
    "cg 20, finite",
    "cg 20, Adam metric",
    "neumann 100",
)


def by_penalty(p: Problem, one_step: bool = False) -> dict[str, Callable[[], Tensor]]:
    """First-order penalty methods by steps and λ; "held": ψ stays as FT leaves it at θ.

    `one_step`: under the same names, with one step each: it keeps the bytes that many keep.
    """

    def ask(steps: int, strength: float, **options):
        return lambda: peers.penalty(p, 1 if one_step else steps, strength, **options)

    found = {}
    for steps in PENALTY_STEPS:
        for strength in STRENGTHS:
            found[f"penalty {steps}, λ = {strength}"] = ask(steps, strength)
        found[f"penalty {steps}, λ = 100, held"] = ask(steps, 100, through=False)
    if p.pt_steps is not None:
        for strength in STRENGTHS:
            name = f"penalty from PT's start, λ = {strength}"
            found[name] = ask(p.pt_steps, strength, from_start=True)
    return found


def on_penalty(p: Problem) -> list[dict]:
    """Rows of penalty methods and of what they are compared to, with the bytes of each."""
    theta = problems.leaves(p.theta)
    of_pt_step = counting.peak(lambda: p.pretrain_loss(theta, p.phi).backward())
    known = estimators(p)
    beside = {name: known[name] for name in BESIDE_PENALTY}
    short = beside | by_penalty(p, one_step=True)
    rows = []
    for name, estimator in (beside | by_penalty(p)).items():
        row = measure(p, name, estimator)
        rows.append({**row, "bytes": counting.peak(short[name]) / of_pt_step})
    return rows


def on_digits(p: Problem) -> dict[str, Callable[[], Tensor]]:
    """The estimators for `digits`: the same, with its damping."""
    found = {
        "identity": lambda: ours(p, Solver("identity")),
        "neumann 20": lambda: ours(p, Solver("neumann", 20, damping=DAMPING)),
    }
    for terms in (2, 5, 10, 20, 50):
        found[f"cg {terms}"] = lambda t=terms: ours(p, Solver("cg", t, damping=DAMPING))
    for rank in (5, 10, 20, 50):
        found[f"nystrom {rank}"] = lambda r=rank: ours(p, Solver("nystrom", r, damping=DAMPING))
    for n, terms in itertools.product((50, 200), (2, 5, 10, 19)):
        found[f"cg {terms}, Fisher of {n}"] = lambda n=n, t=terms: ours(
            p, Solver("cg", t, damping=DAMPING), preconditioner=peers.fisher(p, n, DAMPING)
        )
    return found | preconditioned(p, DAMPING, DAMPING) | by_adam(p, DAMPING)


PRODUCTS = ("hessian_product", "mixed_product", "both_products")  # methods of metapt.Products


@contextlib.contextmanager
def counted(also=None):
    """Yields a dict; afterwards it holds the FLOPs and metapt's products of what ran inside.

    `also`: formulas of more operations, as `FlopCounterMode` takes them.
    """
    found = {"products": 0}

    def noting(method):
        def product(products, d):
            found["products"] += 1
            return method(products, d)

        return product

    flops = FlopCounterMode(display=False, custom_mapping=also)
    flops.mod_tracker = counting._Everything()
    noted = {name: noting(getattr(metapt.Products, name)) for name in PRODUCTS}
    with mock.patch.multiple(metapt.Products, **noted), flops:
        yield found
    found["flops"] = flops.get_total_flops()


def pt_step_flops(p: Problem, rows=None) -> int:
    theta = problems.leaves(p.theta)
    return counting.flops(
        lambda: p.pretrain_loss(theta, p.phi, **({} if rows is None else {"rows": rows})).backward()
    )


def agreement(found: Tensor, exact: Tensor) -> dict[str, float]:
    return {
        "cosine": torch.nn.functional.cosine_similarity(found, exact, 0).item(),
        "norm_error": (found.norm() / exact.norm() - 1).item(),
        "signs": (found.sign() == exact.sign()).double().mean().item(),
    }


def measure(p: Problem, name: str, estimator: Callable[[], Tensor]) -> dict:
    """A row; that of a library which is not installed says so."""
    factors = "KFAC" in name
    try:
        with counted(counting.EIGENVECTORS if factors else None) as cost:
            found = estimator()
    except ImportError as error:
        return {"problem": p.name, "estimator": name, "error": str(error)}
    preconditioner = min(int(name.split()[-1]) / (2 * p.examples), 0.5) if "Fisher" in name else 0
    # Forward and backward over all examples; one backward pass per output; again for the
    # eigenvalues
    if factors:
        outputs = 10 if "type 2" in name else 1
        preconditioner = (1 + 2 * outputs) / 3 / 2 * (2 if "EKFAC" in name else 1)
    return {
        "problem": p.name,
        "estimator": name,
        "products": math.ceil(cost["products"] + preconditioner),
        "pt_steps": cost["flops"] / pt_step_flops(p),
        **agreement(found, p.exact),
    }


def facts(p: Problem) -> dict:
    """What makes a problem hard, and how far its two exact values are apart."""
    w = flat(p.theta)
    hessian = torch.func.hessian(lambda w: p.pretrain_loss(unflat(w, p.theta), p.phi))(w)
    values = torch.linalg.eigvalsh(hessian)
    gradient = torch.func.grad(lambda w: p.pretrain_loss(unflat(w, p.theta), p.phi))(w)
    apart = (problems.differences(p) - p.exact).norm() / p.exact.norm()
    return {
        "problem": p.name,
        "parameters": len(w),
        "meta_parameters": len(p.exact),
        "gradient": gradient.norm().item(),
        "lowest": values[0].item(),
        "highest": values[-1].item(),
        "apart": apart.item(),
    }


def minibatches(p: Problem, draws: int = 50) -> list[dict]:
    """(f): one mini-batch for Hessian and mixed derivative, L_V's gradient v over all FT data."""
    rows = []
    solvers = {"identity": Solver("identity"), "neumann 20": Solver("neumann", 20)}
    solvers |= {f"cg {t}": Solver("cg", t) for t in (5, 20)}
    solvers |= {
        f"cg {t}, damping {d}": Solver("cg", t, damping=d) for t in (5, 20) for d in (0.01, 0.1)
    }
    for name, solver in solvers.items():
        generator = torch.Generator().manual_seed(0)
        found = [
            agreement(
                ours(p, solver, torch.randperm(p.examples, generator=generator)[:ROWS]), p.exact
            )["cosine"]
            for _ in range(draws)
        ]
        rows.append(
            {
                "problem": p.name,
                "estimator": name,
                "batch": ROWS,
                "draws": draws,
                "cosine": float(np.mean(found)),
                "spread": float(np.std(found, ddof=1)),
            }
        )
    return rows


# What one meta step of an online run may use, and with how much momentum the next goes on from its
# q; None: afresh. "Adam metric": of the moments of the run's own PT.
ONLINE = {
    "published: neumann 1, α = PT's": ({"method": "neumann", "terms": 1, "alpha": 3e-3}, None),
    "identity": ({"method": "identity"}, None),
    "identity, finite": ({"method": "identity", "hvp": "finite"}, None),
    "identity, Adam metric": ({"method": "identity"}, None),
    "cg 3 afresh": ({"method": "cg", "terms": 3}, None),
    "cg 3 afresh, damping 1": ({"method": "cg", "terms": 3, "damping": 1.0}, None),
    "cg 5 afresh": ({"method": "cg", "terms": 5}, None),
    "cg 3 afresh, Adam metric": ({"method": "cg", "terms": 3}, None),
    "cg 5 afresh, Adam metric": ({"method": "cg", "terms": 5}, None),
    "carried: cg 1": ({"method": "cg", "terms": 1}, 0.0),
    "carried: cg 2": ({"method": "cg", "terms": 2}, 0.0),
    "carried: neumann 1": ({"method": "neumann", "terms": 1}, 0.0),
    "carried: neumann 1, momentum 0.9": ({"method": "neumann", "terms": 1}, 0.9),
    "carried: neumann 1, momentum 0.9, finite": (
        {"method": "neumann", "terms": 1, "hvp": "finite"},
        0.9,
    ),
}


def online(
    batch: int, damping: float, seed: int = 0, meta_steps: int = 100, names=tuple(ONLINE)
) -> list[dict]:
    """Cosines along a run of algorithm 1 on `mlp` from its start: P = 10, K = 1, Adam for θ, ψ and
    φ.

    The run itself follows the exact hypergradient, so that every estimator is asked about the same
    moments. Exact is −vᵀ(H + damping·I)⁻¹∇²_θφ L_PT by a dense solve over all PT examples at the θ,
    ψ and φ of the moment: without damping H is indefinite along such a run, and there is nothing to
    be exact about. v is the same for all.
    """
    p, generator = problems.mlp(), torch.Generator().manual_seed(seed)
    theta, psi = problems.leaves(p.start), p.psi
    phi = {"weights": torch.zeros(10, dtype=torch.float64, requires_grad=True)}
    optimizer, meta_optimizer = (
        torch.optim.Adam(theta.values(), 3e-3),
        torch.optim.Adam(phi.values(), 3e-2),
    )
    # One pass of L_FT, finite solvers too
    unroll, ft_state = (
        Unroll(1, 1e-2, optimizer="adam", hvp="exact"),
        {},
    )
    carried: dict[str, tuple] = {}  # q and the one before
    alphas: dict[
        str, float
    ] = {}  # of carried Neumann solves: estimated once, in the first meta step
    cosines: dict[str, list[float]] = {name: [] for name in names}
    costs: dict[str, list[float]] = {name: [] for name in names}

    def draw():
        return torch.randperm(p.examples, generator=generator)[:batch]

    def detached(params):
        return {name: t.detach().clone() for name, t in params.items()}

    for step in range(1000 + 10 * meta_steps):
        optimizer.zero_grad()
        p.pretrain_loss(theta, detached(phi), draw()).backward()
        optimizer.step()
        here, moving = detached(theta), problems.leaves(psi)
        gradient = problems.grad(p.finetune_loss(here, moving), moving)
        psi, ft_state = metapt.finetune_step(psi, gradient, unroll, ft_state)
        if step < 1000 or (step + 1) % 10:
            continue
        at, rows = {"theta": here, "psi": psi, "phi": detached(phi)}, draw()
        plain = pt_step_flops(p._replace(theta=here), rows)

        def ask(solver, q0=None, at=at, rows=rows, ft_state=ft_state, **options):
            return metapt.hypergradient(
                lambda theta, phi: p.pretrain_loss(theta, phi, rows),
                p.finetune_loss,
                p.validation_loss,
                **at,
                unroll=unroll,
                ft_state=ft_state,
                solver=solver,
                q0=q0,
                **options,
            )

        metric = {"preconditioner": peers.times(peers.adam_scale(optimizer, theta))}
        first = ask(Solver("identity"))
        exact = _dense(p, here, at["phi"], flat(first.q), damping)
        for name in names:
            fields, momentum = ONLINE[name]
            with counted() as cost:  # every pass, those that find α included
                q0 = None
                if name in carried:
                    q, before = carried[name]
                    q0 = unflat(q + momentum * (q - before), here)
                if momentum is not None and fields["method"] == "neumann" and name not in alphas:
                    alphas[name] = 1 / _curvature(p, here, at["phi"], rows, damping)
                solver = Solver(**{"alpha": alphas.get(name), "damping": damping, **fields})
                result = ask(solver, q0, **metric if "Adam" in name else {})
            if momentum is not None:
                q = flat(result.q)
                carried[name] = q, carried[name][0] if name in carried else q
            cosines[name].append(agreement(flat(result.phi), exact)["cosine"])
            costs[name].append(cost["flops"] / plain)
        psi, ft_state = first.psi, first.ft_state
        phi["weights"].grad = exact / exact.norm()
        meta_optimizer.step()
    late = meta_steps // 10  # the first tenth: q is still on its way
    return [
        {
            "batch": batch,
            "damping": damping,
            "estimator": name,
            "pt_steps": float(np.mean(costs[name])),
            "cosine": float(np.mean(cosines[name][late:])),
            "lowest": float(np.min(cosines[name][late:])),
            "above_0.95": float(np.mean(np.array(cosines[name][late:]) >= 0.95)),
            "along": cosines[name],
        }
        for name in names
    ]


def _curvature(p: Problem, theta, phi, rows, damping: float) -> float:
    """The largest |eigenvalue| of H + damping·I on these examples, by eight power iterations."""
    theta = problems.leaves(theta)
    gradient = flat(problems.grad(p.pretrain_loss(theta, phi, rows), theta, create_graph=True))
    d = torch.randn(len(gradient), generator=torch.Generator().manual_seed(0), dtype=gradient.dtype)
    for _ in range(8):
        d = d / d.norm()
        d = flat(problems.grad(gradient, theta, grad_outputs=d, retain_graph=True)) + damping * d
    return d.norm().item()


def _dense(p: Problem, theta, phi, v: Tensor, damping: float) -> Tensor:
    def gradient(w, f):
        return torch.func.grad(lambda w: p.pretrain_loss(unflat(w, theta), unflat(f, phi)))(w)

    hessian, mixed = torch.func.jacrev(gradient, (0, 1))(flat(theta), flat(phi))
    return -torch.linalg.solve(hessian + damping * torch.eye(len(v), dtype=v.dtype), v) @ mixed


@app.callback(invoke_without_command=True)
def run(context: typer.Context):
    if context.invoked_subcommand:
        return
    torch.set_num_threads(1)
    found = {
        "torch": torch.__version__,
        "problems": [],
        "frozen": [],
        "penalty": [],
        "digits": [],
        "minibatch": [],
        "online": [],
    }
    for make in {**problems.FROZEN, **problems.EARLY}.values():
        p = make()
        found["problems"].append(facts(p))
        for name, estimator in estimators(p).items():
            found["frozen"].append(measure(p, name, estimator))
        found["penalty"] += on_penalty(p)
        save_json(STORED, found)
        console.print(f"{p.name}: {len(estimators(p))} estimators")
    digits(found)
    found["minibatch"] = minibatches(problems.mlp())
    for batch in (300, 100):
        for damping in (0.01, 0.1):
            found["online"] += online(batch, damping)
            save_json(STORED, found)
    report()


def digits(found: dict) -> None:
    p, found["digits"] = problems.digits(DAMPING), []
    for name, estimator in on_digits(p).items():
        found["digits"].append(measure(p, name, estimator))
        save_json(STORED, found)


@app.command()
def kronecker():
    """Estimators that are not stored yet, those of Kronecker factors, and all of digits."""
    torch.set_num_threads(1)
    found = json.loads(STORED.read_text())
    if found["torch"] != torch.__version__:
        raise typer.BadParameter(f"{STORED} is of torch {found['torch']}: make all of it again")
    stored = {
        (row["estimator"], row["problem"]): row
        for row in found["frozen"]
        if "KFAC" not in row["estimator"]
    }
    found["frozen"] = []
    for make in {**problems.FROZEN, **problems.EARLY}.values():
        p = make()
        for name, estimator in estimators(p).items():
            found["frozen"].append(stored.get((name, p.name)) or measure(p, name, estimator))
    digits(found)
    report()


@app.command()
def penalty():
    """First-order penalty methods, and what they are compared to."""
    torch.set_num_threads(1)
    found = json.loads(STORED.read_text())
    found["penalty"] = []
    for make in {**problems.FROZEN, **problems.EARLY}.values():
        found["penalty"] += on_penalty(make())
        save_json(STORED, found)
    report()


@app.command()
def report():
    """Tables and the figure, from what was found."""
    found = json.loads(STORED.read_text())
    names = list(dict.fromkeys(row["problem"] for row in found["frozen"]))
    cell = {(row["estimator"], row["problem"]): row for row in found["frozen"]}
    rows = [
        [
            p["problem"],
            str(p["parameters"]),
            str(p["meta_parameters"]),
            f"{p['gradient']:.0e}",
            f"{p['lowest']:.1e}",
            f"{p['highest']:.1e}",
            f"{p['apart']:.0e}",
        ]
        for p in found["problems"]
    ]
    columns = [
        "",
        "size of θ",
        "of φ",
        "‖∇L_PT‖",
        "eigenvalues of H",
        "to",
        "two exact values differ by",
    ]
    metapt.show_table(console, "problems", columns, rows)
    rows = []
    for estimator in dict.fromkeys(row["estimator"] for row in found["frozen"]):
        here = [cell.get((estimator, name)) for name in names]
        rows.append(cells(estimator, here))
    metapt.show_table(
        console, "cosine to the exact hypergradient", ["", "products", "PT steps", *names], rows
    )
    report_penalty(found["penalty"], names)
    rows = [cells(row["estimator"], [row]) for row in found["digits"]]
    metapt.show_table(
        console, f"digits, damping {DAMPING}", ["", "products", "PT steps", "cosine"], rows
    )
    rows = [
        [row["estimator"], f"{row['cosine']:.2f} ± {row['spread']:.2f}"]
        for row in found["minibatch"]
    ]
    metapt.show_table(console, f"mlp, one mini-batch of {ROWS} of 300", ["", "cosine ± s.d."], rows)
    for batch in (300, 100):
        for damping in (0.01, 0.1):
            rows = [
                [
                    row["estimator"],
                    f"{row['pt_steps']:.2f}",
                    f"{row['cosine']:.3f}",
                    f"{row['lowest']:.3f}",
                    f"{100 * row['above_0.95']:.0f}",
                ]
                for row in found["online"]
                if (row["batch"], row["damping"]) == (batch, damping)
            ]
            columns = ["", "PT steps a meta step", "mean cosine", "lowest", "≥ 0.95 (%)"]
            metapt.show_table(
                console, f"online, batch {batch} of 300, damping {damping}", columns, rows
            )
    draw(found)


def report_penalty(found: list[dict], names: list[str]) -> None:
    """Costs are medians over problems."""
    cell = {(row["estimator"], row["problem"]): row for row in found}
    rows = []
    for estimator in dict.fromkeys(row["estimator"] for row in found):
        here = [cell.get((estimator, name)) for name in names]
        _, _, cost, *cosines = cells(estimator, here)
        kept = np.median([row["bytes"] for row in here if row])
        rows.append([estimator, cost, f"{kept:.2f}", *cosines])
    columns = ["", "PT steps", "bytes (PT steps)", *names]
    metapt.show_table(console, "penalty methods: cosine to the exact hypergradient", columns, rows)


def cells(estimator: str, rows: list[dict | None]) -> list[str]:
    """A line of the table: what it costs, and the cosine of each problem."""
    cost = [row for row in rows if row and "error" not in row]
    if not cost:
        return [estimator, "", "", *(row["error"] if row else "" for row in rows)]
    products = max(row["products"] for row in cost)
    return [
        estimator,
        f"{products or ''}",
        f"{np.median([row['pt_steps'] for row in cost]):.1f}",
        *(f"{row['cosine']:.3f}" if row and "error" not in row else "" for row in rows),
    ]


def draw(found: dict) -> None:
    families = {
        "CG": [f"cg {t}" for t in (1, 2, 5, 10, 20, 50)],
        "Neumann, α estimated": [f"neumann {t}" for t in (1, 2, 5, 20, 100)],
        "Neumann, α = PT's": [f"neumann {t}, α = PT's" for t in (1, 2, 5, 20, 100)],
        "CG, Fisher of 200": [f"cg {t}, Fisher of 200" for t in (5, 10, 19)],
        "Nyström": [f"nystrom {r}" for r in (5, 10, 20, 50)],
        "identity": ["identity"],
        "EvoGrad, mean of 20": ["EvoGrad, mean of 20"],
    }
    rows = {row["estimator"]: row for row in found["frozen"] if row["problem"] == "mlp"}

    def draw(figure):
        figure.set_size_inches(7, 2.5)
        left, right = figure.subplots(1, 2)
        for family, names in families.items():
            cost, cosine = zip(
                *((rows[name]["pt_steps"], rows[name]["cosine"]) for name in names), strict=True
            )
            left.plot(cost, cosine, "o-", ms=3, lw=1, label=family)
        left.axhline(0.95, color="0.7", lw=0.8, ls="--")
        left.set(
            xscale="log",
            xlabel="cost (PT steps)",
            ylabel="cosine to the exact hypergradient",
            ylim=(0, 1.02),
        )
        left.legend(fontsize=6, loc="lower left", ncols=2)
        for row in found["online"]:
            if (row["batch"], row["damping"]) == (300, 0.1) and row["estimator"] in (
                "published: neumann 1, α = PT's",
                "cg 3 afresh",
                "carried: neumann 1",
                "carried: neumann 1, momentum 0.9",
            ):
                label = f"{row['estimator']}: {row['pt_steps']:.1f} PT steps"
                right.plot(range(1, len(row["along"]) + 1), row["along"], lw=1, label=label)
        right.axhline(0.95, color="0.7", lw=0.8, ls="--")
        right.set(
            xlabel="meta step of an online run",
            ylabel="cosine to the exact of the moment",
            ylim=(0.2, 1.02),
        )
        right.legend(fontsize=6)

    save_figure(STORED.with_suffix(".png"), draw)


if __name__ == "__main__":
    app()
