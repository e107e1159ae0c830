"""From which languages to pre-train: learned shares beside what people do without them.

    python -m bench.studies.languages run --data data --seeds 20,21 --targets Faroese-OFT
    python -m bench.studies.languages large --data data
    python -m bench.studies.languages report [--setting large] [--by-target] [--versus hand]
    python -m bench.studies.languages figure
    python -m bench.studies.languages products

Cells are (target, seed); each method pre-trains afresh on the cell's seed and is fine-tuned three
times: a head on 10 sentences, a head on 100, and everything on 100. `run` stores each cell's
results as it goes in bench/results/languages/SETTING.json and skips what is there.

The rivals:

    even           all sources alike, the default φ
    long           the same for four times as many steps
    alone          no sources: PT is on FT's sentences alone
    hand           the languages that a linguist would name as related (RELATED), alike
    overlap        the five sources with the most character trigrams in common with FT's sentences
    tagger         the five sources that a tagger of FT's sentences alone tags best
    search         the best of SEARCHED draws of five sources, by the validation loss after FT
    cotrain        even shares, and a fifth of each batch FT's own sentences
    cotrain-X      the same with the shares of X

Beside them `report` has `chosen`: what `meta` would choose among even shares, learned ones and the
θ of the meta run, by FT sentences that FT did not get.
"""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import rich.console
import torch
import typer

import metapt
from bench.stored import RESULTS as ALL_RESULTS
from bench.stored import add_result, load_json, print_markdown, save_figure

RESULTS = ALL_RESULTS / "languages"
COLUMNS = ("head 10", "head 100", "all 100")
TARGETS = (
    "Afrikaans-AfriBooms",
    "Belarusian-HSE",
    "Faroese-OFT",
    "Galician-TreeGal",
    "Scottish_Gaelic-ARCOSG",
    "Upper_Sorbian-UFAL",
)
COTRAIN_SHARE = 0.2
FEW = 5  # sources that `overlap`, `tagger` and each draw of `search` take
REPORTED = "20,21"  # seeds that no setting was chosen on
# As many draws as take the time of a meta run and PT afresh (78 s; a draw's PT and FT take 4 s).
SEARCHED = 20
CHOSEN_AMONG = ("even", "learned", "online")

# Languages that are near to the target, by family and contact, written down before any run.
RELATED = {
    "Afrikaans": "Dutch German",
    "Belarusian": "Russian Ukrainian Polish",
    "Faroese": "Icelandic Norwegian Danish Swedish",
    "Galician": "Portuguese Spanish",
    "Scottish_Gaelic": "Irish Welsh",
    "Upper_Sorbian": "Czech Slovak Polish",
    "Danish": "Norwegian Swedish",
    "Slovak": "Czech Polish",
    "Ukrainian": "Russian Belarusian Polish",
    "Portuguese": "Galician Spanish",
    "Welsh": "Irish Scottish_Gaelic",
    "Maltese": "Arabic Italian Hebrew",
    "Wolof": "French Arabic",
    "Romanian": "Italian French Spanish",
}

# How φ is learned, by the name of the setting: what differs from the domain's defaults.
SETTINGS = {
    "default": {},
    "identity": {"solver": "identity", "terms": 1, "damping": 0.0, "average": 0.0},
    "cg10": {"average": 0.0},
    "plain": {"solver": "identity", "terms": 1, "damping": 0.0, "preconditioner": ""},
    # The default with fewer and with more products.
    "cg0": {"solver": "identity", "terms": 1, "damping": 0.0},
    "cg2": {"terms": 2},
    "cg5": {"terms": 5},
    "cg20": {"terms": 20},
    "cg10-slow": {"average": 0.0, "meta_lr": 0.1},
    "cg10-large": {"average": 0.0, "meta_batch_size": 1024},
}

app = typer.Typer(add_completion=False, rich_markup_mode=None)


def make_domain(data: Path, target: str, seed: int, **given):
    kind = metapt.find_domain("sources")
    settings = kind.Settings(target=target, seed=seed, **given)
    return kind(settings, torch.device("cpu"), data)


def with_settings(domain, **given):
    """The same domain, on the same data, with other settings."""
    other = domain.__class__.__new__(domain.__class__)
    other.__dict__ = dict(domain.__dict__)
    other.settings = dataclasses.replace(domain.settings, **given)
    return other


def alike(domain, chosen: list[int]) -> dict[str, torch.Tensor]:
    """φ that gives these sources the same share, and others none."""
    shares = [float(i in chosen) for i in range(len(domain.sources))]
    return domain.phi_from_table(shares)


def related(domain) -> dict[str, torch.Tensor]:
    """φ by hand."""
    target = domain.settings.target.partition("-")[0]
    wanted = RELATED[target].split()
    chosen = [i for i, name in enumerate(domain.sources) if name.partition("-")[0] in wanted]
    return alike(domain, chosen)


def trigrams(domain, rows: torch.Tensor) -> set[str]:
    """All groups of three characters in the words of these sentences."""
    words = domain.treebanks.words
    found = set()
    for number in domain.treebanks.word_numbers[rows].flatten().tolist():
        if number:
            word = f"<{words[number - 1].decode().lower()}>"
            found.update(word[i : i + 3] for i in range(len(word) - 2))
    return found


def rows_of_source(domain, source: int) -> torch.Tensor:
    first = domain.first[source]
    return domain.rows["pretrain"][first : first + domain.count[source]]


def overlapping(domain) -> dict[str, torch.Tensor]:
    """φ for the sources whose trigrams cover most of those of FT's sentences."""
    wanted = trigrams(domain, domain.rows["finetune"])
    common = [
        len(wanted & trigrams(domain, rows_of_source(domain, source)))
        for source in range(len(domain.sources))
    ]
    return alike(domain, np.argsort(common)[-FEW:].tolist())


def tagger_of_finetuning(domain):
    """Encoder and FT head from scratch on FT's sentences alone, for as many steps as PT."""
    torch.manual_seed(domain.settings.seed)
    network = domain.network()
    head = domain.head()
    optimizer = torch.optim.Adam([*network.parameters(), *head.parameters()], 3e-3)
    batches = metapt.Batches(domain.sizes["finetune"], 32)
    for _ in range(domain.settings.steps):
        index = batches.next()
        outputs = head(network(domain.inputs("finetune", index), features=True))
        loss = domain.loss(outputs, domain.targets("finetune", index))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network, head


def best_tagged(domain) -> dict[str, torch.Tensor]:
    """φ for the sources that a tagger of FT's sentences alone tags best."""
    network, head = tagger_of_finetuning(domain)
    scores = []
    with torch.no_grad():
        for source in range(len(domain.sources)):
            grams, tags = domain.sentences(rows_of_source(domain, source))
            scores.append(domain.score(head(network(grams, features=True)), tags))
    return alike(domain, np.argsort(scores)[-FEW:].tolist())


def scores_of(domain, network) -> list[float]:
    """Test accuracy after FT, one number a column."""
    seed = domain.settings.seed
    few, all_sentences = domain.finetune_sizes
    of_head = with_settings(domain, measure_scope="head")
    of_all = with_settings(domain, measure_scope="all", measure_lr=1e-3, measure_steps=150)
    return [
        metapt.finetune(of_head, network, few, seed).scores["test"],
        metapt.finetune(of_head, network, all_sentences, seed).scores["test"],
        metapt.finetune(of_all, network, all_sentences, seed).scores["test"],
    ]


class Cell:
    """One target and seed: its networks are made as they are asked for."""

    def __init__(self, data: Path, target: str, seed: int):
        self.domain = make_domain(data, target, seed)
        self.seed = seed
        # One run serves `learned` and `online`.
        self.learned = functools.cache(self.learn)

    def pretrained(self, phi, **given):
        return metapt.pretrain_afresh(with_settings(self.domain, **given), self.seed, phi)

    def learn(self, setting: str, cotrain: float) -> metapt.Training:
        """Algorithm 1 to its end."""
        given = {**SETTINGS[setting], "cotrain": cotrain}
        return metapt.Training(with_settings(self.domain, **given), learn=True).run()

    def network(self, method: str, setting: str):
        """θ of a method."""
        domain = self.domain
        cotrain = 0.0
        if method.startswith("cotrain"):
            cotrain = COTRAIN_SHARE
            method = method.removeprefix("cotrain").removeprefix("-") or "even"
        if method == "none":
            torch.manual_seed(self.seed)
            return domain.network()
        if method == "long":
            return self.pretrained(None, steps=4 * domain.settings.steps)
        if method == "online":
            return self.learned(setting, cotrain).network
        if method == "search":
            return self.search()
        if method == "alone":
            network, _ = tagger_of_finetuning(domain)
            return network
        return self.pretrained(self.phi(method, setting, cotrain), cotrain=cotrain)

    def search(self):
        """θ of the best draw of sources."""
        random = np.random.default_rng(self.seed)
        most = self.domain.finetune_sizes[-1]
        best = None
        lowest_loss = np.inf
        for _ in range(SEARCHED):
            drawn = random.choice(len(self.domain.sources), FEW, replace=False)
            network = self.pretrained(alike(self.domain, drawn.tolist()))
            loss = metapt.finetune(self.domain, network, most, self.seed).lowest_loss
            if loss < lowest_loss:
                best = network
                lowest_loss = loss
        return best

    def held_score(self, network) -> float:
        """What `meta` chooses by: the accuracy on FT sentences that FT did not get."""
        most = self.domain.finetune_sizes[-1]
        return metapt.held_score(self.domain, network, most, self.seed)

    def phi(self, method: str, setting: str, cotrain: float) -> dict | None:
        """φ of a method that is known by its shares; None: even ones."""
        if method == "even":
            return None
        if method == "learned":
            return self.learned(setting, cotrain).learned().state_dict()
        by_rule = {"hand": related, "overlap": overlapping, "tagger": best_tagged}
        return by_rule[method](self.domain)


def stored(setting: str) -> dict:
    return load_json(RESULTS / f"{setting}.json")


def stored_of(setting: str, seeds: str, targets: str = "") -> dict:
    """The same of these seeds and targets alone, with commas between; empty: of all. With what
    `meta` chooses, where its held-out scores are stored.
    """
    found = {}
    held = stored(held_scores(setting))
    for key, scores in stored(setting).items():
        target, seed = key.split()
        of_seed = not seeds or seed in seeds.split(",")
        of_target = not targets or target in targets.split(",")
        if of_seed and of_target:
            found[key] = scores | choice(scores, held.get(key, {}))
    return found


def held_scores(setting: str) -> str:
    """The name under which held-out scores are stored."""
    return f"{setting}-held"


def choice(scores: dict, held: dict) -> dict:
    """The scores of what `meta` chooses, as a method: the best by held-out scores."""
    if any(method not in held for method in CHOSEN_AMONG):
        return {}
    best = max(CHOSEN_AMONG, key=held.get)  # of equal ones the first: even shares
    return {"chosen": scores[best]}


def store(setting: str, key: str, method: str, scores: list[float]) -> None:
    """One more result, which is printed, too."""
    add_result(RESULTS / f"{setting}.json", key, method, scores)
    print(key, method, *(f"{100 * score:.1f}" for score in scores), flush=True)


def store_held(setting: str, key: str, method: str, score: float) -> None:
    add_result(RESULTS / f"{held_scores(setting)}.json", key, method, score)


def missing_cells(
    setting: str, seeds: str, targets: str, methods: str, data: Path, again: bool = False
) -> Iterator[tuple[str, Cell, str]]:
    """What is not stored yet: its key, the cell, and a method. A cell is made once.

    Args:
        again: what is stored as well.
    """
    for seed in map(int, seeds.split(",")):
        for target in targets.split(","):
            key = f"{target} {seed}"
            scores = stored(setting).get(key, {})
            missing = [method for method in methods.split() if again or method not in scores]
            if not missing:
                continue
            cell = Cell(data, target, seed)
            for method in missing:
                yield key, cell, method


METHODS = (
    "none even alone long hand overlap tagger search learned online cotrain cotrain-hand "
    "cotrain-overlap cotrain-tagger cotrain-learned"
)


@app.command()
def run(
    seeds: Annotated[str, typer.Option(help="With commas")] = REPORTED,
    targets: Annotated[str, typer.Option(help="With commas")] = ",".join(TARGETS),
    methods: Annotated[str, typer.Option(help="With spaces")] = METHODS,
    setting: Annotated[str, typer.Option(help=f"Of learning φ: {', '.join(SETTINGS)}")] = "default",
    again: Annotated[bool, typer.Option(help="Those that are stored as well")] = False,
    data: Annotated[Path, typer.Option(help="Where prepared data lie")] = Path("data"),
):
    """Runs the cells that are not stored yet."""
    torch.set_num_threads(1)
    for key, cell, method in missing_cells(setting, seeds, targets, methods, data, again):
        network = cell.network(method, setting)
        # First: a method is asked for again as long as its scores are not stored.
        if method in CHOSEN_AMONG:
            store_held(setting, key, method, cell.held_score(network))
        store(setting, key, method, scores_of(cell.domain, network))


LARGE = {"width": 256, "steps": 3000}
LARGE_METHODS = "even tagger overlap hand learned"


@app.command()
def large(
    seeds: Annotated[str, typer.Option(help="With commas")] = "20",
    targets: Annotated[str, typer.Option(help="With commas")] = ",".join(TARGETS),
    methods: Annotated[str, typer.Option(help="With spaces")] = LARGE_METHODS,
    data: Annotated[Path, typer.Option(help="Where prepared data lie")] = Path("data"),
):
    """From small to large: φ of the small problem, used in PT ten times as long and four times as
    wide. Stored as the setting "large".
    """
    torch.set_num_threads(1)
    for key, cell, method in missing_cells("large", seeds, targets, methods, data):
        network = cell.pretrained(cell.phi(method, "default", 0.0), **LARGE)
        wide = with_settings(cell.domain, **LARGE)
        store("large", key, method, scores_of(wide, network))


def gains_of(results: dict, method: str, versus: str, column: int | slice) -> np.ndarray:
    """A method minus another, cell by cell, in one column or in the mean over all."""
    return np.array(
        [
            np.mean(scores[method][column]) - np.mean(scores[versus][column])
            for scores in results.values()
            if method in scores and versus in scores
        ]
    )


def in_points(gains: np.ndarray) -> str:
    if len(gains) == 0:
        return "–"
    found = metapt.mean_and_interval(gains)
    mean = f"{100 * found['mean']:+.1f}"
    if found["high"] is None:  # of one cell
        return mean
    return f"{mean} ± {100 * (found['high'] - found['mean']):.1f}"


def half_of_interval(gains: np.ndarray) -> float:
    """For a bar; 0 where there is one cell."""
    found = metapt.mean_and_interval(gains)
    return 0.0 if found["high"] is None else found["high"] - found["mean"]


@app.command()
def report(
    setting: Annotated[str, typer.Option(help="Of learning φ")] = "default",
    versus: Annotated[str, typer.Option(help="What gains are measured on")] = "even",
    seeds: Annotated[str, typer.Option(help="With commas; else all")] = "",
    targets: Annotated[str, typer.Option(help="With commas; else all")] = "",
    by_target: Annotated[bool, typer.Option(help="A row a target, and their mean")] = False,
    markdown: Annotated[bool, typer.Option(help="A table for a page")] = False,
):
    """Gains in points: the mean over cells, and half of the 95 % interval."""
    results = stored_of(setting, seeds, targets)
    results = {key: scores for key, scores in results.items() if versus in scores}
    if not results:
        raise SystemExit(f"no such cell of {setting} has {versus}")
    methods = list(dict.fromkeys(method for scores in results.values() for method in scores))
    methods.remove(versus)
    if by_target:
        names, *rows = table_by_target(results, methods, versus)
    else:
        names, *rows = table_by_method(results, methods, versus)
    title = f"Gain on {versus} (points, mean over cells ± half of the 95 % interval)"
    if markdown:
        print_markdown(names, rows)
    else:
        metapt.show_table(rich.console.Console(width=200), title, names, rows)


def table_by_method(results: dict, methods: list[str], versus: str) -> list[list[str]]:
    """As text, its names first: a row a method, its gain in each column and in their mean."""
    columns = (*range(len(COLUMNS)), slice(None))
    rows = [["method", "cells", *COLUMNS, "mean"]]
    for method in methods:
        number = len(gains_of(results, method, versus, 0))
        gains = [in_points(gains_of(results, method, versus, column)) for column in columns]
        rows.append([method, f"{number}", *gains])
    return rows


def table_by_target(results: dict, methods: list[str], versus: str) -> list[list[str]]:
    """As text, its names first: a row a target, each method's gain in the mean of the columns."""
    rows = [["target", "cells", versus, *methods]]
    means = {method: [] for method in methods}
    for target in sorted({key.split()[0] for key in results}):
        cells = {key: scores for key, scores in results.items() if key.split()[0] == target}
        score = np.mean([scores[versus] for scores in cells.values()])
        row = [target, f"{len(cells)}", metapt.percent(score)]
        for method in methods:
            gains = gains_of(cells, method, versus, slice(None))
            if len(gains) == 0:
                row.append("–")
                continue
            means[method].append(gains.mean())
            row.append(f"{100 * gains.mean():+.1f}")
        rows.append(row)
    of_targets = [in_points(np.array(means[method])) for method in methods]
    rows.append(["mean of targets", "", "", *of_targets])
    return rows


# All methods but "none" and "even", with "chosen" before those that cotrain.
BEFORE_COTRAIN = METHODS.split().index("cotrain")
IN_FIGURE = (
    *METHODS.split()[2:BEFORE_COTRAIN],
    "chosen",
    *METHODS.split()[BEFORE_COTRAIN:],
)
WITH_LEARNED_SHARES = ("learned", "online", "chosen", "cotrain-learned")


@app.command()
def figure(
    setting: Annotated[str, typer.Option(help="Of learning φ")] = "default",
    seeds: Annotated[str, typer.Option(help="With commas; else all")] = "",
):
    """Draws bench/results/languages/gains.png: each method's gain on even shares."""
    results = stored_of(setting, seeds)

    def draw(figure) -> None:
        figure.set_size_inches(5, 2.5)
        axis = figure.subplots()
        there = {method for scores in results.values() for method in scores}
        methods = [m for m in reversed(IN_FIGURE) if m in there]
        for position, method in enumerate(methods):
            gains = 100 * gains_of(results, method, "even", slice(None))
            colour = "C3" if method in WITH_LEARNED_SHARES else "0.45"
            axis.plot(gains, [position] * len(gains), ".", ms=3, color=colour, alpha=0.35)
            axis.errorbar(
                gains.mean(),
                position,
                xerr=half_of_interval(gains),
                fmt="o",
                ms=4,
                capsize=2,
                color=colour,
            )
        axis.axvline(0, color="0.7", lw=0.8)
        axis.set_yticks(range(len(methods)), methods)
        axis.set(xlabel="gain on even shares (points of accuracy)")

    save_figure(RESULTS / "gains.png", draw)
    print(RESULTS / "gains.png")


# The settings that differ in how many products of PT's Hessian a meta step has.
BY_PRODUCTS = {"cg0": 0, "cg2": 2, "cg5": 5, "default": 10}


@app.command()
def products(seeds: Annotated[str, typer.Option(help="With commas")] = "0"):
    """Draws bench/results/languages/products.png: what learned φ gains by the products of CG."""
    by_setting = {setting: stored_of(setting, seeds) for setting in BY_PRODUCTS}

    def draw(figure) -> None:
        figure.set_size_inches(4, 2.5)
        axis = figure.subplots()
        for setting, number in BY_PRODUCTS.items():
            gains = 100 * gains_of(by_setting[setting], "learned", "even", slice(None))
            half = half_of_interval(gains)
            axis.plot([number] * len(gains), gains, ".", ms=3, color="C3", alpha=0.35)
            axis.errorbar(number, gains.mean(), yerr=half, fmt="o", ms=4, capsize=2, color="C3")
            print(setting, len(gains), in_points(gains / 100))
        for rival, style in (("tagger", "-"), ("overlap", "--"), ("hand", ":")):
            mean = 100 * gains_of(by_setting["default"], rival, "even", slice(None)).mean()
            axis.axhline(mean, color="0.5", lw=0.8, ls=style, label=rival)
        axis.legend(title="rivals, mean", fontsize=7, title_fontsize=7)
        axis.set_xticks(list(BY_PRODUCTS.values()))
        axis.set_xlabel("products of CG in a meta step (0: q = M⁻¹v)")
        axis.set_ylabel("gain on even (points)")

    save_figure(RESULTS / "products.png", draw)
    print(RESULTS / "products.png")


if __name__ == "__main__":
    app()
