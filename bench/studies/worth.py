"""What learning φ is worth: the test metric after fine-tuning of learned φ, beside default φ,
oracle φ and simple rivals.

    python -m bench.studies.worth run digits-noise
        an experiment, stored in bench/results/worth as it goes
    python -m bench.studies.worth report
        table and figure of all that is stored

A seed is that of everything: the parts of the data, θ, batches, FT. Settings were chosen on seeds 0
to 4 (`--seeds 0-4 --variant NAME --set name=value`); what is reported is of seeds 20 to 29 (40 to
49 of digits-rotation, whose preset was chosen on 0 to 29). Every method has the same PT data, the
same FT and validation labels and the same FT. What is stored is not made again, but with `--again`.
"What `meta` chooses" is chosen here by one seed of PT, in `meta` by --compare.
"""

import concurrent.futures
import copy
import dataclasses
import functools
import json
import math
import multiprocessing
import time
import warnings
from pathlib import Path
from typing import Annotated

import filelock
import numpy as np
import rich.console
import torch
import typer
from scipy import stats

import metapt
from bench.stored import DOMAINS, RESULTS, save_figure, save_json

STORED = RESULTS / "worth"
BASELINES = DOMAINS / "ppi_baselines.py"
DigitsNoise = metapt.find_domain("digits-noise")
console = rich.console.Console(width=140)
app = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_enable=False)
warnings.filterwarnings("ignore", "‖Hq − v‖")


@dataclasses.dataclass
class Experiment:
    """What is run: a domain with settings; FT scopes; methods of `Trial` beside those of all."""

    domain: str
    given: dict = dataclasses.field(default_factory=dict)
    scopes: tuple = ("head",)
    rivals: tuple = ()
    repeats: int = 2  # FTs of each size, with other examples, heads and batches
    first: int = 20  # of the seeds that are reported

    @property
    def methods(self) -> tuple:
        return ("none", "default", "learned", "online", "longer", "finetune_alone", *self.rivals)


SEARCHED = ("oracle", "wide", "search", "search3")
SHORT = {"steps": 600, "meta_lr": 0.03}
COTRAINED = ("cotrain", "pcgrad", "cotrain_phi", "cotrain_phi_online")
EXPERIMENTS = {
    "digits-noise": Experiment("digits-noise", scopes=("head", "all"), rivals=("oracle",)),
    "mnist-noise": Experiment("mnist-noise", scopes=("head", "all"), rivals=("oracle",), repeats=1),
    "digits-rotation": Experiment("digits-rotation", rivals=SEARCHED, first=40),
    "digits-affine": Experiment("digits-affine", rivals=SEARCHED),
    "ppi": Experiment("ppi", SHORT, rivals=COTRAINED, repeats=1),
    "ppi-permuted": Experiment(
        "ppi", {**SHORT, "permuted": 0.8}, rivals=("oracle", *COTRAINED), repeats=1
    ),
    "ppi-permuted-zero-biases": Experiment(
        "ppi",
        {**SHORT, "permuted": 0.8, "base_rates": False},
        rivals=("oracle", "cotrain"),
        repeats=1,
    ),
    "ecg-from-0.5": Experiment("ecg", {"init_scale": 0.5}, rivals=("fixed",)),
    "ecg-from-3": Experiment("ecg", {"init_scale": 3.0}, rivals=("fixed",)),
    "ecg-byol": Experiment(f"{DOMAINS / 'ecg.py'}:BYOL"),
    "ppi-bgrl": Experiment(f"{DOMAINS / 'ppi.py'}:BGRL", repeats=1),
}
NAMES = {
    "none": "no PT",
    "default": "default φ",
    "learned": "learned φ, PT afresh",
    "online": "θ of the meta run",
    "chosen": "what `meta` chooses",
    "longer": "default φ, PT twice as long",
    "finetune_alone": "PT on FT data alone",
    "oracle": "oracle φ",
    "wide": "PT under maps drawn from all of their range",
    "fixed": "s = 1.5, chosen on these records",
    "search": "random search, equal compute",
    "search3": "random search, three times that",
    "cotrain": "CoTrain",
    "pcgrad": "CoTrain with PCGrad",
    "cotrain_phi": "CoTrain with φ, PT afresh",
    "cotrain_phi_online": "CoTrain with φ, θ of that run",
}

# The order in the figure: real data as they are, then those of which a part was spoilt or made up.
IN_FIGURE = (
    "ppi",
    "ppi-bgrl",
    "ecg-from-0.5",
    "ecg-from-3",
    "ecg-byol",
    "ppi-permuted",
    "ppi-permuted-zero-biases",
    "mnist-noise",
    "digits-noise",
    "digits-rotation",
    "digits-affine",
)
# What colours tell apart there; all other methods are rivals.
LEARNED = ("learned", "online", "chosen", "cotrain_phi", "cotrain_phi_online")
COLOURS = {"learned φ": "C0", "oracle φ": "C2", "rivals": "C1"}


class Trial:
    """One seed of an experiment. A method is a function that gives an encoder; some share what
    others made.
    """

    def __init__(self, experiment: Experiment, seed: int, given: dict, data: Path, kind=None):
        self.experiment, self.seed, self.given, self.data = experiment, seed, given, data
        kind = kind or metapt.find_domain(experiment.domain)
        settings = metapt.make_settings(
            kind, {**experiment.given, **given, "seed": seed}, "default"
        )
        torch.set_num_threads(1)
        self.domain = kind(settings, metapt.pick_device("auto"), data)

    def afresh(self, phi: dict | None, domain=None, **other) -> metapt.Network:
        plain = copy.copy(domain or self.domain)
        plain.settings = dataclasses.replace(plain.settings, **other)
        return metapt.pretrain_afresh(plain, self.seed, phi)

    @functools.cached_property
    def timed(self):
        """The meta run, PT afresh with its φ, and this process's seconds (one thread) for both."""
        begun = time.process_time()
        training = metapt.Training(self.domain, learn=True).run()
        return training, self.afresh(training.learned().state_dict()), time.process_time() - begun

    def none(self):
        torch.manual_seed(self.seed)
        return self.domain.network()

    def default(self):
        return self.afresh(None)

    def learned(self):
        return self.timed[1]

    def online(self):
        return self.timed[0].network

    def longer(self):
        return self.afresh(None, steps=2 * self.domain.settings.steps)

    def finetune_alone(self):
        """Encoder and FT head from scratch on the whole FT set, for as many steps as PT."""
        domain, settings = self.domain, self.domain.settings
        torch.manual_seed(self.seed)
        network, head = domain.network(), domain.head()
        optimizer = metapt.adam([*network.parameters(), *head.parameters()], settings.lr)
        batches = metapt.Batches(domain.sizes["finetune"], settings.batch_size)
        for _ in range(settings.steps):
            loss = domain.finetune_loss(network, head, "finetune", batches.next())
            optimizer.zero_grad()
            loss(dict(network.named_parameters()), dict(head.named_parameters())).backward()
            optimizer.step()
        return network

    def oracle(self):
        """φ as it would be with what reports alone may know."""
        domain = self.domain
        if isinstance(domain, DigitsNoise):
            return self.afresh(None, KnownNoise.of(domain))
        if hasattr(domain, "permuted"):
            return self.afresh(
                {"task_logits": torch.where(torch.from_numpy(domain.permuted), -30.0, 0.0)}
            )
        if isinstance(domain, metapt.DigitsRotation) and not hasattr(domain, "oracle_phi"):
            return self.afresh({"rotation_mean_deg": torch.tensor(domain.settings.target_deg)})
        return self.afresh(domain.oracle_phi())

    def wide(self):
        """Without φ: as wide a spread as φ is drawn from in the search, from the first step to the
        last.
        """
        domain, kind = copy.copy(self.domain), type(self.domain)
        spread, phi = (
            ({"spread": 3**-0.5}, None)
            if hasattr(domain, "draw_phi")
            else ({"spread_deg": 180 / 3**0.5}, {"rotation_mean_deg": torch.tensor(0.0)})
        )
        wide = copy.copy(domain)
        wide.settings = dataclasses.replace(domain.settings, **spread)
        domain.pretrain_loss = lambda network, meta, index, _, live: kind.pretrain_loss(
            wide, network, meta, index, 0.0, live
        )
        return self.afresh(phi, domain)

    def fixed(self):
        """The warp at s = 1.5, which was chosen by looking at these records."""
        return self.afresh({**self.domain.meta().state_dict(), "warp.scale": torch.tensor(1.5)})

    def search(self, share: float = 1.0):
        """The best by validation of as many φ, drawn at random, as there is time for in a meta run
        and PT afresh.
        """
        domain, random, spent, found = self.domain, np.random.default_rng(self.seed), 0.0, []
        while spent < share * self.timed[2]:
            begun = time.process_time()
            angle = {"rotation_mean_deg": torch.tensor(random.uniform(-180, 180))}
            network = self.afresh(domain.draw_phi(random) if hasattr(domain, "draw_phi") else angle)
            outcome = metapt.finetune(domain, network, domain.finetune_sizes[-1], self.seed)
            found.append((outcome.lowest_loss, len(found), network))
            spent += time.process_time() - begun
        self.draws = len(found)
        return min(found)[2]

    def search3(self):
        return self.search(3.0)

    @functools.cache
    def beside(self, name: str) -> "Trial":  # the same seed of another domain
        return Trial(
            self.experiment,
            self.seed,
            self.given,
            self.data,
            metapt.find_domain(f"{BASELINES}:{name}"),
        )

    def cotrain(self):
        return self.beside("CoTrain").default()

    def pcgrad(self):
        return self.beside("PCGrad").default()

    def cotrain_phi(self):
        return self.beside("WeightedCoTrain").learned()

    def cotrain_phi_online(self):
        return self.beside("WeightedCoTrain").online()


class KnownNoise(DigitsNoise):
    """Weight 1 for PT examples with the right label, 0 for those with a wrong one."""

    @classmethod
    def of(cls, domain):
        known = copy.copy(domain)
        known.__class__ = type("KnownNoise", (cls, type(domain)), {})
        return known

    def weigh(self, meta, phi, index, live):
        return 0 * super().weigh(meta, phi, index, live) + (~self.noisy).to(index.device)[index]


def measured(trial: Trial, network) -> list[dict]:
    """A row for each scope and size of the FT set."""
    rows, experiment = [], trial.experiment
    for scope in experiment.scopes:
        domain = copy.copy(trial.domain)
        domain.settings = dataclasses.replace(domain.settings, measure_scope=scope, measure_lr=None)
        for n in domain.finetune_sizes:
            outcomes = [
                metapt.finetune(domain, network, n, 1000 * trial.seed + r)
                for r in range(experiment.repeats)
            ]
            part = next(iter(domain.tests))
            rows.append(
                {
                    "scope": scope,
                    "ft_examples": n,
                    "score": float(np.mean([o.scores[part] for o in outcomes])),
                }
            )
    return rows


def number_or_text(text: str):
    try:
        return json.loads(text)
    except ValueError:
        return text


@app.command()
def run(
    name: Annotated[str, typer.Argument(help=", ".join(EXPERIMENTS))],
    seeds: Annotated[str, typer.Option(help="From-to; else the ten that are reported")] = "",
    methods: Annotated[
        str, typer.Option(help="These, with commas between; nothing: all of the experiment")
    ] = "",
    variant: Annotated[str, typer.Option(help="A name for other settings")] = "",
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="name=value: such a setting")
    ] = None,
    again: Annotated[bool, typer.Option(help="Make what is stored anew")] = False,
    jobs: Annotated[int, typer.Option(help="Seeds that are run at the same time", min=1)] = 1,
    data: Annotated[Path, typer.Option(help="Where prepared data lie")] = Path("data"),
    out: Annotated[Path, typer.Option(help="Where results are kept")] = STORED,
):
    """The methods of one experiment, by seed."""
    experiment = EXPERIMENTS[name]
    path = out / f"{name}{'-' + variant if variant else ''}.json"
    out.mkdir(parents=True, exist_ok=True)
    given = {k: number_or_text(v) for k, _, v in (pair.partition("=") for pair in set_ or [])}
    wanted = tuple(methods.split(",")) if methods else experiment.methods
    first, _, last = (seeds or f"{experiment.first}-{experiment.first + 9}").partition("-")
    all_seeds = range(int(first), int(last or first) + 1)
    if jobs == 1:
        for seed in all_seeds:
            run_seed(name, seed, wanted, given, path, again, data)
        return
    # Seeds share nothing but the file of results.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        runs_of_seeds = [
            pool.submit(run_seed, name, seed, wanted, given, path, again, data)
            for seed in all_seeds
        ]
        try:
            for run_of_seed in runs_of_seeds:
                run_of_seed.result()
        except BaseException:
            # Otherwise seeds that wait would be run before this ends.
            metapt.end_processes_but(set())
            raise


def run_seed(
    name: str, seed: int, methods: tuple, given: dict, path: Path, again: bool, data: Path
) -> None:
    """One seed of an experiment, all methods of which are kept in a file as they come."""
    trial = None
    for method in methods:
        rows = stored(path)["rows"]
        if not again and any((row["seed"], row["method"]) == (seed, method) for row in rows):
            continue
        trial = trial or Trial(EXPERIMENTS[name], seed, given, data)
        settings = dataclasses.asdict(trial.domain.settings)
        settings |= {"seed": None, "warmup": trial.domain.settings.warmup_steps}
        require_same_settings(path, settings)
        begun = time.perf_counter()
        network = getattr(trial, method)()
        about = {
            "seed": seed,
            "method": method,
            "seconds": round(time.perf_counter() - begun, 1),
        }
        if method == "learned":
            about["phi"] = trial.domain.measure(trial.timed[0].learned())
        if method in ("search", "search3"):
            about["draws"] = trial.draws
        if method in ("default", "learned", "online"):  # what `meta` chooses by
            about["held"] = metapt.held_score(
                trial.domain, network, trial.domain.finetune_sizes[-1], seed
            )
        new = [{**about, **row} for row in measured(trial, network)]
        keep(path, settings, new)
        scores = ", ".join(
            f"{row['scope']} {row['ft_examples']}: {100 * row['score']:.1f}" for row in new
        )
        console.print(
            f"{name} seed {seed} {method}, {about['seconds']} s: {scores}", highlight=False
        )


def require_same_settings(path: Path, settings: dict) -> None:
    """Ends the program where what is stored was made with other settings."""
    before = stored(path)["settings"]
    # What was stored at 1562f71 has settings that there are no more.
    changed = {
        name for name, value in before.items() if name in settings and settings[name] != value
    }
    if changed:
        raise SystemExit(
            f"{path} was made with another {', '.join(sorted(changed))}: name a --variant"
        )


def keep(path: Path, settings: dict, new: list[dict]) -> None:
    """Stores the rows of one method and seed in place of those that are there. Others may write to
    the file at the same time.
    """
    key = new[0]["seed"], new[0]["method"]
    with filelock.FileLock(path.with_suffix(".lock")):
        rows = [row for row in stored(path)["rows"] if (row["seed"], row["method"]) != key]
        save_json(path, {"torch": torch.__version__, "settings": settings, "rows": rows + new})


def stored(path: Path) -> dict:  # read anew each time: others may write to it meanwhile
    return json.loads(path.read_text()) if path.exists() else {"settings": {}, "rows": []}


def interval(
    values,
) -> tuple[float, float]:  # the mean, and half of its 95 % interval (Student's t)
    values = np.asarray(values)
    if len(values) < 2:
        return float(values.mean()), math.nan
    return float(values.mean()), float(
        stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    )


def gain(of: tuple[float, float]) -> str:
    return f"{of[0]:+.1f}" + ("" if math.isnan(of[1]) else f" ± {of[1]:.1f}")


def by_method(rows: list[dict]) -> dict[str, dict[int, dict]]:
    """Scores in %: method → seed → {(scope, FT examples): score}; with what `meta` chooses, by what
    it chooses by.
    """
    found, held = {}, {}
    for row in rows:
        cell = row["scope"], row["ft_examples"]
        found.setdefault(row["method"], {}).setdefault(row["seed"], {})[cell] = 100 * row["score"]
        if "held" in row:
            held.setdefault(row["seed"], {})[row["method"]] = row["held"]
    choices = {
        seed: max(scores, key=scores.get) for seed, scores in held.items() if len(scores) == 3
    }
    if choices:
        found["chosen"] = {seed: found[method][seed] for seed, method in choices.items()}
    return found


def summary(rows: list[dict]) -> list[dict]:
    """By method: the mean of each cell, the gain on default φ (all cells together, paired by seed),
    and its share of the oracle's where that is more than nothing beyond its interval.
    """
    found, lines = by_method(rows), []
    mean = {
        method: {seed: np.mean(list(cells.values())) for seed, cells in of.items()}
        for method, of in found.items()
    }
    for method in [m for m in NAMES if m in found]:
        seeds = sorted(set(mean[method]) & set(mean["default"]))
        gains = [mean[method][seed] - mean["default"][seed] for seed in seeds]
        gap = [
            mean["oracle"][seed] - mean["default"][seed]
            for seed in seeds
            if seed in mean.get("oracle", {})
        ]
        cells = next(iter(found[method].values()))
        seconds = [row["seconds"] for row in rows if row["method"] == method]
        lines.append(
            {
                "method": method,
                "seeds": len(seeds),
                "cells": {
                    cell: np.mean([found[method][seed][cell] for seed in seeds]) for cell in cells
                },
                "gains": {
                    c: interval([found[method][s][c] - found["default"][s][c] for s in seeds])
                    for c in cells
                },
                "mean": np.mean([mean[method][seed] for seed in seeds]),
                "gain": interval(gains),
                "worst": min(gains),
                "share": sum(gains) / sum(gap)
                if len(gap) == len(gains) and np.subtract(*interval(gap)) > 0
                else None,
                "seconds": np.mean(seconds) if seconds else 0.0,
            }
        )
    return lines


@app.command()
def report(
    out: Annotated[Path, typer.Option(help="Where results are kept")] = STORED,
    variants: Annotated[bool, typer.Option(help="Also what was tried in choosing")] = False,
    cells: Annotated[
        bool, typer.Option(help="In each cell the gain with its interval, not the mean")
    ] = False,
    markdown: Annotated[bool, typer.Option(help="As bench/docs has them")] = False,
):
    """Tables by experiment, and a figure."""
    figures = {}
    for path in sorted(out.glob("*.json")):
        if path.stem not in EXPERIMENTS and not variants:
            continue
        first = EXPERIMENTS[path.stem].first if path.stem in EXPERIMENTS else 0
        lines = summary([row for row in stored(path)["rows"] if row["seed"] >= first])
        if path.stem in EXPERIMENTS:
            figures[path.stem] = lines
        shown = list(lines[0]["cells"])
        columns = [
            "",
            *(f"{scope}, {n}" for scope, n in shown),
            "mean",
            "to default φ",
            "worst",
            "of the gap",
            "s",
            "seeds",
        ]
        table = []
        for line in lines:
            default = line["method"] == "default"
            each = [
                f"{line['cells'][c]:.1f}" if default or not cells else gain(line["gains"][c])
                for c in shown
            ]
            share = "" if default or line["share"] is None else f"{100 * line['share']:.0f} %"
            versus = ["", ""] if default else [gain(line["gain"]), f"{line['worst']:+.1f}"]
            table.append(
                [
                    NAMES[line["method"]],
                    *each,
                    f"{line['mean']:.1f}",
                    *versus,
                    share,
                    f"{line['seconds']:.0f}",
                    str(line["seeds"]),
                ]
            )
        if markdown:
            for row in ([f"\n**{path.stem}**\n"], columns, ["---"] * len(columns), *table):
                print(row[0] if len(row) == 1 else f"| {' | '.join(row)} |")
        else:
            metapt.show_table(
                console, f"{path.stem} (test, %; gains with 95 % intervals)", columns, table
            )

    if figures:
        save_figure(out / "worth.png", lambda figure: draw_gains(figure, figures))


def kind_of(method: str) -> str:
    """Which of COLOURS a method has."""
    if method in LEARNED:
        return "learned φ"
    return "oracle φ" if method == "oracle" else "rivals"


def draw_gains(figure, figures: dict[str, list[dict]]) -> None:
    """Gains on default φ: a panel an experiment, a row a method, a colour a kind of method."""
    shown = {}
    for name in sorted(figures, key=IN_FIGURE.index):
        lines = [line for line in figures[name] if line["method"] not in ("none", "default")]
        if lines:
            shown[name] = lines
    heights = [len(lines) + 1 for lines in shown.values()]
    figure.set_size_inches(6, 0.16 * sum(heights) + 0.35 * len(heights) + 0.3)
    axes = np.atleast_1d(figure.subplots(len(shown), 1, height_ratios=heights))
    handles = {}
    for axis, (name, lines) in zip(axes, shown.items(), strict=True):
        for place, line in enumerate(lines):
            mean, half = line["gain"]
            kind = kind_of(line["method"])
            handles[kind] = axis.errorbar(
                mean, place, xerr=np.nan_to_num(half), fmt="o", ms=3, capsize=2, color=COLOURS[kind]
            )
        axis.axvline(0, color="0.6", lw=0.6)
        names = [NAMES[line["method"]] for line in lines]
        axis.set_yticks(range(len(lines)), names, fontsize=6)
        axis.set_ylim(len(lines) - 0.3, -0.7)  # downwards, and no row on the axis itself
        axis.set_title(f"{name}, {lines[0]['seeds']} seeds", fontsize=7, loc="left")
    kinds = [kind for kind in COLOURS if kind in handles]
    of_kinds = [handles[kind] for kind in kinds]
    figure.legend(of_kinds, kinds, loc="outside upper center", ncols=3, fontsize=7)
    figure.supxlabel("points gained on default φ (95 % intervals)", fontsize=7)


if __name__ == "__main__":
    app()
