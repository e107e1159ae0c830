"""How near cheap hypergradients come to reverse differentiation through PT itself, on the real
domains.

    python -m bench.accuracy.horizon run DOMAIN --data DIR
        digits-rotation, digits-noise, ppi (yeast) or ecg
    python -m bench.accuracy.horizon report
        tables of what was found, bench/results/horizon/horizon.json

PT runs with φ at its default. At a few places of the run a copy takes T more PT steps, on fixed
larger batches and without dropout; Adam's moments and BatchNorm's statistics go on from PT's own.
The truth is the derivative, through these steps, of L_V with an FT head that is "fitted" at their
end (L-BFGS on FT and validation labels, with a ridge; L_V is the same function, so that by the
envelope theorem the head counts as constant) or the run's own, "trailing", held, on validation
labels. Estimates are of where the steps begin, by exact products. Both are means over so many draws
of batches.
"""

import copy
import json
import time
import warnings
from collections import defaultdict
from itertools import combinations, product
from pathlib import Path
from typing import Annotated

import numpy as np
import rich.console
import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import metapt
from bench.accuracy.problems import flat, grad, leaves, unflat
from bench.stored import RESULTS, save_json
from metapt import Params, Solver, Unroll

STORED = RESULTS / "horizon" / "horizon.json"
LABELS, RIDGE = 300, 1e-3  # at most so many examples of FT, and of validation; of fitted heads
USUAL = {
    "draws": 2,
    "places": (0.3, 1),
    "modes": ("training", "evaluation"),
    "dtype": "float64",
    "given": {},
}
# Places as shares of the run; horizons T, `batch` PT examples a step; damping of cg; length of a
# move of φ
PLANS = {
    "digits-rotation": {**USUAL, "horizons": (5, 50), "batch": 256, "damping": 1.0, "move": 1.0},
    "digits-noise": {
        **USUAL,
        "horizons": (5, 50),
        "batch": 256,
        "damping": 0.1,
        "move": 0.1,
        "given": {"steps": 1300},
    },
    "ppi": {
        **USUAL,
        "horizons": (5, 20),
        "batch": 128,
        "damping": 0.1,
        "move": 3.0,
        "given": {"steps": 400, "meta_batch_size": 256},
    },
    "ecg": {
        **USUAL,
        "places": (1,),
        "horizons": (2, 5),
        "batch": 64,
        "damping": 0.1,
        "move": 0.03,
        "modes": ("training",),
        "dtype": "float32",
        "given": {"steps": 60, "batch_size": 64, "meta_batch_size": 64},
    },
}
warnings.filterwarnings("ignore", "‖Hq − v‖")
app = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_enable=False)
console = rich.console.Console(width=180)


class Norm(_BatchNorm):
    """BatchNorm whose statistics, `running` [2, channels], are differentiable in all that they came
    from.
    """

    def forward(self, x):
        if self.training:
            over = [0, *range(2, x.dim())]
            self.running = torch.lerp(
                self.running, torch.stack([x.mean(over), x.var(over)]), self.momentum
            )
            return F.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)
        shape = (-1, *[1] * (x.dim() - 2))
        scale = self.weight / (self.running[1] + self.eps).sqrt()
        return (x - self.running[0].view(shape)) * scale.view(shape) + self.bias.view(shape)


def smooth(network: nn.Module) -> tuple[nn.Module, dict[str, Norm]]:
    """A copy without dropout, and its BatchNorms."""
    network, norms = copy.deepcopy(network).to(torch.get_default_dtype()), {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
        elif isinstance(module, _BatchNorm):
            module.running, module.__class__ = (
                torch.stack([module.running_mean, module.running_var]),
                Norm,
            )
            norms[name] = module
    return network, norms


def adam_state(optimizer, parameters) -> dict:
    """torch's Adam as a state of metapt.finetune_step."""
    states = [optimizer.state[p] for p in parameters]
    moments = {
        name: flat({i: s[name] for i, s in enumerate(states)}) for name in ("exp_avg", "exp_avg_sq")
    }
    return {
        "step": int(states[0]["step"]),
        **{n: t.to(torch.get_default_dtype()) for n, t in moments.items()},
    }


def forward(
    losses, norms: dict[str, Norm], theta: Params, phi: Params, state: dict, lr: float
) -> list[tuple]:
    """Adam steps on `losses`, one a step, from θ and statistics to those after it, of which the
    last are left in `norms`.
    """
    trail = []
    for loss in losses:
        theta, before = leaves(theta), taking(norms, statistics(norms))
        gradient = grad(loss(theta, phi), theta)
        after, state = metapt.finetune_step(theta, gradient, Unroll(lr=lr, optimizer="adam"), state)
        trail.append((loss, theta, before, state, after, taking(norms, statistics(norms))))
        theta = after
    return trail


def reverse(
    trail, outcome, horizons, norms: dict[str, Norm], phi: Params, lr: float
) -> dict[tuple, Tensor]:
    """Derivative by φ (flat) of each value of `outcome(theta)` after so many of the steps: by
    horizon and name.

    Losses must draw the same numbers again. A step's graph is there only while its adjoint is
    taken, so that memory does not grow with the steps.
    """
    adjoints, unroll = {}, Unroll(lr=lr, optimizer="adam")
    for step, (loss, theta, before, state, after, then) in reversed([*enumerate(trail, 1)]):
        if step in horizons:
            end = leaves(after), taking(norms, then)
            for name, value in outcome(end[0]).items():
                by = grad(value, joined(*end), retain_graph=True)
                adjoints[step, name] = flat(group(by, 0)), group(by, 1), (0.0, 0.0), 0.0
        phi, running = leaves(phi), taking(norms, before)
        gradient = grad(loss(theta, phi), theta, create_graph=True)
        outputs = {name: t for name, t in (gradient | statistics(norms)).items() if t.requires_grad}
        for key, (by_theta, by_running, moments, by_phi) in adjoints.items():
            direction, moments = metapt.finetune_step_adjoint(
                by_theta, moments, flat(gradient).detach(), state, unroll
            )
            weights = unflat(direction, gradient) | by_running
            change = grad(
                [*outputs.values()],
                joined(theta, running, phi),
                retain_graph=True,
                grad_outputs=[weights[name] for name in outputs],
            )
            by_theta, by_phi = by_theta + flat(group(change, 0)), by_phi + flat(group(change, 2))
            adjoints[key] = by_theta, group(change, 1), moments, by_phi
    return {key: by_phi for key, (*_, by_phi) in adjoints.items()}


def statistics(norms: dict[str, Norm]) -> Params:
    return {name: norm.running for name, norm in norms.items()}


def taking(norms: dict[str, Norm], running: Params) -> Params:
    """Leaves of statistics, which what follows goes on from."""
    running = leaves(running)
    for name, norm in norms.items():
        norm.running = running[name]
    return running


def joined(*groups: Params) -> dict[tuple, Tensor]:
    return {(i, name): t for i, params in enumerate(groups) for name, t in params.items()}


def group(joint: dict[tuple, Tensor], i: int) -> Params:
    return {name: t for (j, name), t in joint.items() if j == i}


class Heads:
    """L_V with a fitted and with the trailing head."""

    def __init__(self, domain, network, training):
        self.domain, self.network, self.head = domain, network, training.head
        self.rows = {
            part: torch.arange(domain.sizes[part])[:LABELS] for part in ("finetune", "validation")
        }

    def hidden(self, theta, parts) -> tuple[Tensor, Tensor]:
        """Features and labels."""
        inputs = [self.domain.inputs(part, self.rows[part]) for part in parts]
        targets = [self.domain.targets(part, self.rows[part]) for part in parts]
        return torch.cat(
            [metapt.call(self.network, theta, x, features=True) for x in inputs]
        ), torch.cat(targets)

    def trailing(self, theta: Params, psi: Params, parts=("validation",)) -> Tensor:
        hidden, targets = self.hidden(theta, parts)
        return self.domain.loss(metapt.call(self.head, psi, hidden), targets)

    def fitted(self, theta: Params, psi: Params) -> Tensor:
        """With the ridge."""
        return self.trailing(theta, psi, tuple(self.rows)) + RIDGE / 2 * sum(
            p.square().sum() for p in psi.values()
        )

    @torch.enable_grad()
    def fit(self, theta: Params) -> Params:
        """ψ where that is least."""
        hidden, targets = (
            t.detach().double() if t.is_floating_point() else t
            for t in self.hidden(theta, self.rows)
        )
        head = copy.deepcopy(self.head).double()
        optimizer = torch.optim.LBFGS(
            head.parameters(), 1, 200, tolerance_grad=1e-7, line_search_fn="strong_wolfe"
        )

        def closure():
            optimizer.zero_grad()
            value = self.domain.loss(head(hidden), targets)
            value = value + RIDGE / 2 * sum(p.square().sum() for p in head.parameters())
            value.backward()
            return value

        optimizer.step(closure)
        return {
            name: p.to(next(iter(theta.values())).dtype)
            for name, p in metapt.detached(head).items()
        }


def truth(
    training, progress: float, plan: dict, draw: int
) -> tuple[dict[tuple, Tensor], float | None]:
    """dL_V/dφ by horizon and head, in torch's default dtype: Adam enlarges rounding where the
    gradient is nil. For draw 0 also the change of L_V when φ moves along the truth, by what the
    truth says that it is.
    """
    domain, last = copy.copy(training.domain), max(plan["horizons"])
    dtype, (network, norms) = torch.get_default_dtype(), smooth(training.network)
    domain.inputs = lambda *which: (
        x.to(dtype) if isinstance(x := training.domain.inputs(*which), Tensor) else x
    )
    phi, psi = (
        {n: p.to(dtype) for n, p in ps.items()}
        for ps in (metapt.detached(training.meta), training.psi)
    )
    heads = Heads(domain, network, training)
    torch.manual_seed(draw)
    stream = metapt.Batches(domain.sizes["pretrain"], plan["batch"])

    def step(number: int, index: Tensor):
        def loss(theta, phi):
            torch.manual_seed(1000 * draw + number)
            return domain.pretrain_loss(network, training.meta, index, progress, live=True)(
                theta, phi
            )

        return loss

    def outcome(theta):
        return {
            "fitted": heads.fitted(theta, heads.fit(theta)),
            "trailing": heads.trailing(theta, psi),
        }

    losses = [step(number, stream.next()) for number in range(last)]
    theta, start, lr = metapt.detached(network), statistics(norms), training.settings.lr
    state = adam_state(training.optimizer, training.network.parameters())
    found = reverse(
        forward(losses, norms, theta, phi, state, lr), outcome, plan["horizons"], norms, phi, lr
    )

    direction, ends = unflat(F.normalize(found[last, "fitted"], dim=0), phi), []
    for length in (plan["move"], -plan["move"]) if draw == 0 else ():
        taking(norms, start)
        moved = {name: p + length * direction[name] for name, p in phi.items()}
        ends.append(
            outcome(forward(losses, norms, theta, moved, state, lr)[-1][4])["fitted"].item()
        )
    slope = (
        (ends[0] - ends[1]) / (2 * plan["move"] * found[last, "fitted"].norm().item())
        if ends
        else None
    )
    return found, slope


def estimates(training, progress: float, plan: dict, draw: int) -> dict[tuple, Tensor]:
    """dL_V/dφ by estimator, mode of the PT loss and head."""
    domain, settings, heads = (
        training.domain,
        training.settings,
        Heads(training.domain, training.network, training),
    )
    theta, phi = metapt.detached(training.network), metapt.detached(training.meta)
    torch.manual_seed(draw)
    index = metapt.Batches(domain.sizes["pretrain"], settings.meta_batch_size).next()
    of_head = metapt.Batches(domain.sizes["finetune"], settings.unroll_batch_size).next()
    finetune = domain.finetune_loss(training.network, training.head, "finetune", of_head)
    stages = {
        "fitted": ([], heads.fitted, heads.fit(theta), {"unroll": Unroll(0)}),
        "trailing": (
            finetune,
            heads.trailing,
            training.psi,
            {"unroll": settings.unroll, "ft_state": training.ft_states[settings.unroll_scope]},
        ),
    }
    moments = {n: training.optimizer.state[p] for n, p in training.network.named_parameters()}
    roots = {
        n: (s["exp_avg_sq"] / (1 - 0.999 ** int(s["step"]))).sqrt() for n, s in moments.items()
    }
    solvers = {
        "identity": Solver("identity"),
        "identity, Adam": Solver("identity"),
        "neumann 1, α = PT's": Solver("neumann", 1, settings.lr),
        f"cg 5, damping {plan['damping']:g}": Solver("cg", 5, damping=plan["damping"]),
    }

    def ask(loss, solver, head, preconditioner=None):
        torch.manual_seed(draw)
        finetune, validation, psi, options = stages[head]
        return flat(
            metapt.hypergradient(
                loss,
                finetune,
                validation,
                theta,
                psi,
                phi,
                solver=solver,
                preconditioner=preconditioner,
                **options,
            ).phi
        )

    as_it_is = domain.pretrain_loss(training.network, training.meta, index, progress, live=False)
    found = {("as configured", "", "trailing"): ask(as_it_is, settings.inverse, "trailing")}
    for mode in plan["modes"]:
        network = copy.deepcopy(training.network)  # its statistics may change
        if mode == "evaluation":
            network.train = lambda mode=True, network=network: nn.Module.train(network, False)
        loss = domain.pretrain_loss(
            network, training.meta, index, progress, live=mode == "training"
        )
        for name, solver in solvers.items():
            scale = (lambda r: {n: r[n] / (roots[n] + 1e-8) for n in r}) if "Adam" in name else None
            found |= {(name, mode, head): ask(loss, solver, head, scale) for head in stages}
    return found


def measure(training, progress: float, plan: dict) -> dict:
    """Truths and estimates: norm, mean cosine between two draws; of their means, cosine and ratio
    to those of the truths.
    """
    with torch.random.fork_rng():
        torch.set_default_dtype(getattr(torch, plan["dtype"]))  # of random numbers too
        truths, slopes = zip(
            *(truth(training, progress, plan, draw) for draw in range(plan["draws"])), strict=True
        )
        torch.set_default_dtype(torch.float32)
        cheap = [estimates(training, progress, plan, draw) for draw in range(plan["draws"])]

    def mean(draws, key):
        return sum(found[key].double() for found in draws) / len(draws)

    def cosine(a, b):
        return F.cosine_similarity(a.double(), b.double(), 0).item()

    row, references = (
        {"slope": slopes[0]},
        {f"{t} {head}": mean(truths, (t, head)) for t, head in truths[0]},
    )
    for name, draws in {"truths": truths, "estimates": cheap}.items():
        row[name] = [
            {
                "of": key,
                "norm": (ours := mean(draws, key)).norm().item(),
                "between_draws": float(
                    np.mean([cosine(a[key], b[key]) for a, b in combinations(draws, 2)])
                ),
                "cosine": {name: cosine(ours, t) for name, t in references.items()},
                "ratio": {name: (ours @ t / (t @ t)).item() for name, t in references.items()},
            }
            for key in draws[0]
        ]
    return row


@app.command()
def run(
    domain: Annotated[str, typer.Argument(help=", ".join(PLANS))],
    seeds: Annotated[int, typer.Option(help="So many")] = 3,
    first: Annotated[
        int, typer.Option(help="The first of them; what was found of others is kept")
    ] = 0,
    data: Annotated[Path, typer.Option(help="Where prepared data lie")] = Path("data"),
):
    """PT of each seed; truths and estimates at each place of it."""
    torch.set_num_threads(1)
    plan, kind, wanted = (
        json.loads(json.dumps(PLANS[domain])),
        metapt.find_domain(domain),
        range(first, first + seeds),
    )
    found = json.loads(STORED.read_text()) if STORED.exists() else {}
    before = found[domain]["rows"] if found.get(domain, {}).get("plan") == plan else []
    rows = [row for row in before if row["seed"] not in wanted]
    found[domain] = {"torch": torch.__version__, "plan": plan, "rows": rows}

    def look(training):
        steps, warmup = training.settings.steps, training.settings.warmup_steps
        while left and training.step >= left[0] * steps:
            begun, progress = (
                time.perf_counter(),
                max(0.0, (training.step - 1 - warmup) / (steps - warmup)),
            )
            place = {"seed": training.settings.seed, "place": left.pop(0), "pt_step": training.step}
            rows.append(place | measure(training, progress, plan))
            save_json(STORED, found)
            console.print(f"{domain} {place}: {time.perf_counter() - begun:.0f} s")

    for seed in wanted:
        settings, left = (
            metapt.make_settings(kind, {**plan["given"], "seed": seed}, "default"),
            list(plan["places"]),
        )
        training = metapt.Training(kind(settings, torch.device("cpu"), data), learn=True)
        training.meta_step = lambda: None  # φ stays
        training.run(look)


@app.command()
def report():
    """Cosines to the truth, ± s.e. over seeds (for φ of one number: agreeing less disagreeing
    signs).
    """
    for domain, found in json.loads(STORED.read_text()).items():
        columns = list(
            product(sorted({row["place"] for row in found["rows"]}), found["plan"]["horizons"])
        )
        for head in ("fitted", "trailing"):
            cells = defaultdict(lambda: defaultdict(list))
            for row, t in product(found["rows"], found["plan"]["horizons"]):
                at = row["place"], t
                for each in row["truths"]:
                    cells[f"truth, T = {each['of'][0]}", "", each["of"][1]][at].append(
                        each["cosine"][f"{t} {head}"]
                    )
                    if each["of"] == [t, head]:
                        cells["of two draws of the truth", "", ""][at].append(each["between_draws"])
                    if each["of"] == [t, "fitted"] and t == columns[-1][1]:
                        cells["L_V's change along it, by what it says", "", ""][at].append(
                            row["slope"]
                        )
                for each in row["estimates"]:
                    cells[tuple(each["of"])][at].append(each["cosine"][f"{t} {head}"])
            rows = [[*name, *(error(values[c]) for c in columns)] for name, values in cells.items()]
            titles = [f"{100 * place:.0f} %, T = {t}" for place, t in columns]
            metapt.show_table(
                console, f"{domain}, truth with head {head}", ["", "L_PT", "head", *titles], rows
            )


def error(values) -> str:
    mean, stderr = metapt.mean_and_error(values).values() if values else (None, None)
    return "" if mean is None else f"{mean:.2f}" + ("" if stderr is None else f" ± {stderr:.2f}")


if __name__ == "__main__":
    app()
