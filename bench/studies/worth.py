"""What learning φ is worth: the test metric after fine-tuning of learned φ, beside default φ,
oracle φ and simple rivals.

    python -m bench.studies.worth run digits-noise
        an experiment, stored in bench/results/worth as it goes
    python -m bench.studies.worth report
        tables and a figure of all that is stored, with `sources` of bench.studies.languages

A seed is that of everything: the parts of the data, θ, batches, FT. Settings were chosen on seeds 0
to 4 (`--seeds 0-4 --variant NAME --set name=value`); what is reported is of seeds 20 to 29 (of
digits-rotation 40 to 49 and of digits-affine 30 to 39, whose presets were chosen on lower ones
too). Every method has the same PT data, the same FT and validation labels and the same FT. What is
stored is not made again, but with `--again`. "What `meta` chooses" is chosen here by one seed of
PT, in `meta` by --compare.
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
from typing import Annotated, NamedTuple

import filelock
import numpy as np
import rich.console
import torch
import typer
from scipy import stats

import metapt
from bench.stored import DOMAINS, RESULTS, load_json, print_markdown, save_figure, save_json
from bench.studies import languages

STORED = RESULTS / "worth"
BASELINES = DOMAINS / "ppi_baselines.py"
DigitsNoise = metapt.find_domain("digits-noise")
console = rich.console.Console(width=140)
app = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_enable=False)
warnings.filterwarnings("ignore", "‖Hq − v‖")


@dataclasses.dataclass
class Experiment:
    """What is run: a domain with settings, the scopes of FT, and methods of `Trial`."""

    domain: str
    given: dict = dataclasses.field(default_factory=dict)
    scopes: tuple = ("head",)
    rivals: tuple = ()  # methods beside those of all experiments
    repeats: int = 2  # FTs of each size, with other examples, heads and batches
    first: int = 20  # of the seeds that are reported

    @property
    def methods(self) -> tuple:
        return ("none", "default", "learned", "online", "longer", "finetune_alone", *self.rivals)


SEARCHED = ("oracle", "wide", "search", "search3")
SHORT = {"steps": 600, "meta_lr": 0.03}
# Chosen on seeds 1 and 2 of the permuted tasks whose outputs begin at 0.
ROUNDS = {"steps": 600, "meta_lr": 0.3, "meta_every": 5, "rounds": 3}
COTRAINED = ("cotrain", "pcgrad", "cotrain_phi", "cotrain_phi_online")
EXPERIMENTS = {
    "digits-noise": Experiment("digits-noise", scopes=("head", "all"), rivals=("oracle",)),
    "mnist-noise": Experiment("mnist-noise", scopes=("head", "all"), rivals=("oracle",), repeats=1),
    "digits-rotation": Experiment("digits-rotation", rivals=SEARCHED, first=40),
    "digits-affine": Experiment("digits-affine", rivals=SEARCHED, first=30),
    "ppi": Experiment("ppi", SHORT, rivals=COTRAINED, repeats=1),
    "ppi-permuted": Experiment(
        "ppi", {**SHORT, "permuted": 0.8}, rivals=("oracle", *COTRAINED), repeats=1
    ),
    "ppi-permuted-zero-biases": Experiment(
        "ppi",
        {**ROUNDS, "permuted": 0.8, "base_rates": False},
        rivals=("oracle", "cotrain", "cotrain_phi", "cotrain_phi_online"),
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
    # Of `sources`.
    "long": "default φ, PT four times as long",
    "hand": "related languages by hand",
    "overlap": "greatest overlap in trigrams",
    "tagger": "best tagged by FT's tagger",
    "cotrain-hand": "CoTrain, related languages",
    "cotrain-overlap": "CoTrain, greatest overlap",
    "cotrain-tagger": "CoTrain, best tagged",
    "cotrain-learned": "CoTrain with φ, PT afresh",
}

# Methods of bench.studies.languages that have another name here.
OF_SOURCES = {"even": "default", "alone": "finetune_alone"}
# What `meta` chooses among.
CHOSEN_AMONG = ("default", "learned", "online")

# The order in the figure: real data as they are, then those of which a part was spoilt or made up.
IN_FIGURE = (
    "sources",
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
LEARNED = (
    "learned",
    "online",
    "chosen",
    "cotrain_phi",
    "cotrain_phi_online",
    "cotrain-learned",
)
COLOURS = {"learned φ": "C0", "oracle φ": "C2", "rivals": "C1"}


class MetaRun(NamedTuple):
    """A run that learned φ, what it is compared with, and what both took."""

    training: metapt.Training
    afresh: metapt.Network  # PT from scratch with the learned φ
    seconds: float  # of this process, for both


class Trial:
    """One seed of an experiment. A method is a function that gives an encoder; some share what
    others made.
    """

    def __init__(self, experiment: Experiment, seed: int, given: dict, data: Path, kind=None):
        self.experiment = experiment
        self.seed = seed
        self.given = given
        self.data = data
        if kind is None:
            kind = metapt.find_domain(experiment.domain)
        all_given = {**experiment.given, **given, "seed": seed}
        settings = metapt.make_settings(kind, all_given, "default")
        torch.set_num_threads(1)
        self.domain = kind(settings, metapt.pick_device("auto"), data)

    def afresh(self, phi: dict | None, domain=None, **other) -> metapt.Network:
        """PT from scratch with this φ, and with other settings where they are given."""
        plain = copy.copy(domain or self.domain)
        plain.settings = dataclasses.replace(plain.settings, **other)
        return metapt.pretrain_afresh(plain, self.seed, phi)

    @functools.cached_property
    def meta_run(self) -> MetaRun:
        begun = time.process_time()
        training = metapt.Training(self.domain, learn=True).run()
        afresh = self.afresh(training.learned().state_dict())
        return MetaRun(training, afresh, time.process_time() - begun)

    def none(self):
        torch.manual_seed(self.seed)
        return self.domain.network()

    def default(self):
        return self.afresh(None)

    def learned(self):
        return self.meta_run.afresh

    def online(self):
        return self.meta_run.training.network

    def longer(self):
        return self.afresh(None, steps=2 * self.domain.settings.steps)

    def finetune_alone(self):
        """Encoder and FT head from scratch on the whole FT set, for as many steps as PT."""
        domain = self.domain
        settings = domain.settings
        torch.manual_seed(self.seed)
        network = domain.network()
        head = domain.head()
        optimizer = metapt.adam([*network.parameters(), *head.parameters()], settings.lr)
        batches = metapt.Batches(domain.sizes["finetune"], settings.batch_size)
        for _ in range(settings.steps):
            loss = domain.finetune_loss(network, head, "finetune", batches.next())
            value = loss(dict(network.named_parameters()), dict(head.named_parameters()))
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        return network

    def oracle(self):
        """φ as it would be with what reports alone may know."""
        domain = self.domain
        if isinstance(domain, DigitsNoise):
            return self.afresh(None, KnownNoise.of(domain))
        if hasattr(domain, "permuted"):
            permuted = torch.from_numpy(domain.permuted)
            return self.afresh({"task_logits": torch.where(permuted, -30.0, 0.0)})
        if hasattr(domain, "oracle_phi"):
            return self.afresh(domain.oracle_phi())
        return self.afresh({"rotation_mean_deg": torch.tensor(domain.settings.target_deg)})

    def wide(self):
        """Without φ: as wide a spread as φ is drawn from in the search, from the first step to the
        last.
        """
        domain = copy.copy(self.domain)
        kind = type(self.domain)
        # A uniform distribution from -r to r has the standard deviation r / √3.
        if hasattr(domain, "draw_phi"):
            spread = {"spread": 1 / math.sqrt(3)}  # in units of the ranges
            phi = None
        else:
            spread = {"spread_deg": 180 / math.sqrt(3)}
            phi = {"rotation_mean_deg": torch.tensor(0.0)}
        wide = copy.copy(domain)
        wide.settings = dataclasses.replace(domain.settings, **spread)

        def loss_at_the_start(network, meta, index, progress, live):
            # At progress 0 the spread has not narrowed yet.
            return kind.pretrain_loss(wide, network, meta, index, 0.0, live)

        domain.pretrain_loss = loss_at_the_start
        return self.afresh(phi, domain)

    def fixed(self):
        """The warp at s = 1.5, which was chosen by looking at these records."""
        phi = self.domain.meta().state_dict()
        return self.afresh({**phi, "warp.scale": torch.tensor(1.5)})

    def search(self, share: float = 1.0):
        """The best by validation of as many φ, drawn at random, as there is time for in a meta run
        and PT afresh.
        """
        random = np.random.default_rng(self.seed)
        spent = 0.0
        self.draws = 0
        best = None
        lowest_loss = math.inf
        while spent < share * self.meta_run.seconds:
            begun = time.process_time()
            network = self.afresh(self.draw_phi(random))
            most = self.domain.finetune_sizes[-1]
            loss = metapt.finetune(self.domain, network, most, self.seed).lowest_loss
            if loss < lowest_loss:
                best = network
                lowest_loss = loss
            self.draws += 1
            spent += time.process_time() - begun
        return best

    def draw_phi(self, random: np.random.Generator) -> dict:
        if hasattr(self.domain, "draw_phi"):
            return self.domain.draw_phi(random)
        return {"rotation_mean_deg": torch.tensor(random.uniform(-180, 180))}

    def search3(self):
        return self.search(3.0)

    @functools.cache
    def beside(self, name: str) -> "Trial":
        """The same seed of another domain, a baseline on proteins."""
        kind = metapt.find_domain(f"{BASELINES}:{name}")
        return Trial(self.experiment, self.seed, self.given, self.data, kind)

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
        right = ~self.noisy.to(index.device)[index]
        # φ must stay what the loss depends on.
        return 0 * super().weigh(meta, phi, index, live) + right


def measured(trial: Trial, network) -> list[dict]:
    """A row for each scope and size of the FT set."""
    rows = []
    repeats = trial.experiment.repeats
    for scope in trial.experiment.scopes:
        domain = copy.copy(trial.domain)
        domain.settings = dataclasses.replace(domain.settings, measure_scope=scope, measure_lr=None)
        part = next(iter(domain.tests))
        for size in domain.finetune_sizes:
            scores = []
            for repeat in range(repeats):
                outcome = metapt.finetune(domain, network, size, 1000 * trial.seed + repeat)
                scores.append(outcome.scores[part])
            score = float(np.mean(scores))
            rows.append({"scope": scope, "ft_examples": size, "score": score})
    return rows


# ------------------------------------------------------------------------------------------------
# Runs, and what is stored of them


def number_or_text(text: str):
    try:
        return json.loads(text)
    except ValueError:
        return text


def seeds_of(text: str) -> range:
    """From "3-5" or "3"."""
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


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
    file_name = f"{name}-{variant}.json" if variant else f"{name}.json"
    path = out / file_name
    out.mkdir(parents=True, exist_ok=True)
    given = {}
    for pair in set_ or []:
        setting, _, value = pair.partition("=")
        given[setting] = number_or_text(value)
    wanted = tuple(methods.split(",")) if methods else experiment.methods
    all_seeds = seeds_of(seeds or f"{experiment.first}-{experiment.first + 9}")
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
        if not again and is_stored(path, seed, method):
            continue
        if trial is None:
            trial = Trial(EXPERIMENTS[name], seed, given, data)
            settings = settings_to_store(trial.domain.settings)
            require_same_settings(path, settings)
        begun = time.perf_counter()
        network = getattr(trial, method)()
        seconds = round(time.perf_counter() - begun, 1)
        about = {"seed": seed, "method": method, "seconds": seconds}
        about |= more_about(trial, method, network)
        rows = measured(trial, network)
        keep(path, settings, [{**about, **row} for row in rows])
        scores = [f"{row['scope']} {row['ft_examples']}: {100 * row['score']:.1f}" for row in rows]
        line = f"{name} seed {seed} {method}, {seconds} s: {', '.join(scores)}"
        console.print(line, highlight=False)


def more_about(trial: Trial, method: str, network) -> dict:
    """What is stored of some methods alone: φ, the draws of a search, what `meta` chooses by."""
    more = {}
    if method == "learned":
        more["phi"] = trial.domain.measure(trial.meta_run.training.learned())
    if method in ("search", "search3"):
        more["draws"] = trial.draws
    if method in CHOSEN_AMONG:
        most = trial.domain.finetune_sizes[-1]
        more["held"] = metapt.held_score(trial.domain, network, most, trial.seed)
    return more


def settings_to_store(settings: metapt.Settings) -> dict:
    """The settings without the seed, as a file holds several, and with the warm-up in steps."""
    stored_settings = dataclasses.asdict(settings)
    return stored_settings | {"seed": None, "warmup": settings.warmup_steps}


def is_stored(path: Path, seed: int, method: str) -> bool:
    return any((row["seed"], row["method"]) == (seed, method) for row in stored(path)["rows"])


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
    key = (new[0]["seed"], new[0]["method"])
    with filelock.FileLock(path.with_suffix(".lock")):
        require_same_settings(path, settings)
        rows = [row for row in stored(path)["rows"] if (row["seed"], row["method"]) != key]
        save_json(path, {"torch": torch.__version__, "settings": settings, "rows": rows + new})


def stored(path: Path) -> dict:
    """What is in a file, read anew each time: others may write to it meanwhile."""
    return load_json(path) or {"settings": {}, "rows": []}


# ------------------------------------------------------------------------------------------------
# Tables and a figure


def interval(values) -> tuple[float, float]:
    """The mean, and half of its 95 % interval (Student's t); NaN where there is one value."""
    values = np.asarray(values)
    count = len(values)
    if count < 2:
        return float(values.mean()), math.nan
    stderr = values.std(ddof=1) / np.sqrt(count)
    return float(values.mean()), float(stats.t.ppf(0.975, count - 1) * stderr)


def gain(mean_and_half: tuple[float, float]) -> str:
    mean, half = mean_and_half
    if math.isnan(half):
        return f"{mean:+.1f}"
    return f"{mean:+.1f} ± {half:.1f}"


def by_method(rows: list[dict]) -> dict[str, dict[int, dict]]:
    """Scores in %: method → seed → {(scope, FT examples): score}; with what `meta` chooses, by what
    it chooses by.
    """
    found = {}
    held = {}
    for row in rows:
        of_method = found.setdefault(row["method"], {})
        cell = (row["scope"], row["ft_examples"])
        of_method.setdefault(row["seed"], {})[cell] = 100 * row["score"]
        if "held" in row:
            held.setdefault(row["seed"], {})[row["method"]] = row["held"]
    chosen = {}
    for seed, scores in held.items():
        if len(scores) == len(CHOSEN_AMONG):
            best = max(CHOSEN_AMONG, key=scores.get)  # of equal ones the first: default φ
            chosen[seed] = found[best][seed]
    if chosen:
        found["chosen"] = chosen
    return found


def summary(rows: list[dict]) -> list[dict]:
    """By method: the mean of each cell, the gain on default φ (all cells together, paired by seed),
    and its share of the oracle's where that is more than nothing beyond its interval. Nothing
    where the default φ was not measured.
    """
    found = by_method(rows)
    if "default" not in found:
        return []
    default = found["default"]
    gaps = {
        seed: mean_of(cells) - mean_of(default[seed])
        for seed, cells in found.get("oracle", {}).items()
        if seed in default
    }
    lines = []
    for method in NAMES:
        if method not in found:
            continue
        of_method = found[method]
        seeds = sorted(set(of_method) & set(default))
        if not seeds:
            continue
        cell_means = {}
        cell_gains = {}
        for cell in of_method[seeds[0]]:
            scores = np.array([of_method[seed][cell] for seed in seeds])
            cell_means[cell] = scores.mean()
            cell_gains[cell] = interval(scores - [default[seed][cell] for seed in seeds])
        gains = [mean_of(of_method[seed]) - mean_of(default[seed]) for seed in seeds]
        seconds = [row["seconds"] for row in rows if row["method"] == method and "seconds" in row]
        lines.append(
            {
                "method": method,
                "seeds": len(seeds),
                "cells": cell_means,
                "gains": cell_gains,
                "mean": np.mean([mean_of(of_method[seed]) for seed in seeds]),
                "gain": interval(gains),
                "worst": min(gains),
                "share": share_of_gap(gains, [gaps[seed] for seed in seeds if seed in gaps]),
                "seconds": np.mean(seconds) if seconds else None,
            }
        )
    return lines


def mean_of(cells: dict) -> float:
    return float(np.mean(list(cells.values())))


def share_of_gap(gains: list[float], gaps: list[float]) -> float | None:
    """Summed gains over summed gains of the oracle; None where there may be no gap."""
    if len(gaps) < len(gains):
        return None
    mean, half = interval(gaps)
    # Written so that the NaN of a single seed gives None, too.
    if not mean - half > 0:
        return None
    return sum(gains) / sum(gaps)


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
    rows = {}
    if out.resolve() == STORED:
        rows["sources"] = rows_of_sources()
    for path in sorted(out.glob("*.json")):
        if path.stem in EXPERIMENTS:
            first = EXPERIMENTS[path.stem].first
            rows[path.stem] = [row for row in stored(path)["rows"] if row["seed"] >= first]
        elif variants:
            rows[path.stem] = stored(path)["rows"]

    figures = {}
    for name, of_name in rows.items():
        lines = summary(of_name)
        if not lines:
            console.print(f"{name}: without default φ there is nothing to compare with")
            continue
        if name in IN_FIGURE:
            figures[name] = lines
        columns, *table = table_of(lines, cells)
        if markdown:
            print(f"\n**{name}**\n")
            print_markdown(columns, table)
        else:
            title = f"{name} (test, %; gains with 95 % intervals)"
            metapt.show_table(console, title, columns, table)

    if figures:
        save_figure(out / "worth.png", lambda figure: draw_gains(figure, figures))


def rows_of_sources() -> list[dict]:
    """What bench.studies.languages has stored of the cells that it reports, as rows. What is a
    seed elsewhere is a target and a seed here.
    """
    held = languages.stored(languages.held_scores("default"))
    rows = []
    for key, of_cell in languages.stored("default").items():
        _, seed = key.split()
        if seed not in languages.REPORTED.split(","):
            continue
        for name, scores in of_cell.items():
            method = OF_SOURCES.get(name, name)
            about = {"seed": key, "method": method}
            if name in held.get(key, {}):
                about["held"] = held[key][name]
            for column, score in zip(languages.COLUMNS, scores, strict=True):
                scope, size = column.split()
                rows.append({**about, "scope": scope, "ft_examples": int(size), "score": score})
    return rows


def table_of(lines: list[dict], with_gains: bool) -> list[list[str]]:
    """A summary as text, its columns first.

    Args:
        with_gains: in each cell the gain with its interval, not the mean.
    """
    shown = list(lines[0]["cells"])
    of_cells = [f"{scope}, {size}" for scope, size in shown]
    rows = [["", *of_cells, "mean", "to default φ", "worst", "of the gap", "s", "seeds or cells"]]
    for line in lines:
        means = [f"{line['cells'][cell]:.1f}" for cell in shown]
        versus = [gain(line["gain"]), f"{line['worst']:+.1f}"]
        share = "" if line["share"] is None else f"{100 * line['share']:.0f} %"
        if line["method"] == "default":
            versus = ["", ""]
            share = ""
        elif with_gains:
            means = [gain(line["gains"][cell]) for cell in shown]
        name = NAMES[line["method"]]
        seconds = "" if line["seconds"] is None else f"{line['seconds']:.0f}"
        rows.append(
            [name, *means, f"{line['mean']:.1f}", *versus, share, seconds, f"{line['seeds']}"]
        )
    return rows


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
        unit = "cells" if name == "sources" else "seeds"
        axis.set_title(f"{name}, {lines[0]['seeds']} {unit}", fontsize=7, loc="left")
    kinds = [kind for kind in COLOURS if kind in handles]
    of_kinds = [handles[kind] for kind in kinds]
    figure.legend(of_kinds, kinds, loc="outside upper center", ncols=3, fontsize=7)
    figure.supxlabel("points gained on default φ (95 % intervals)", fontsize=7)


if __name__ == "__main__":
    app()
