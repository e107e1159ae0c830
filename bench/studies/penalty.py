"""First-order penalty methods in the loop: does a second θ find a better φ than a solver does?

    python -m bench.studies.penalty cost                      what a run costs, beside the presets'
    python -m bench.studies.penalty sources --seeds 0         shares of sources, by λ and variant
    python -m bench.studies.penalty proteins --seeds 1        weights of PT tasks, most permuted
    python -m bench.studies.penalty report

θ is trained along L_PT, and a second θ_λ on the same batches along L_PT + L_V / λ; the gradient by
φ is λ (∇_φ L_PT(θ_λ, φ) − ∇_φ L_PT(θ, φ)), on one batch for both. Kwon, Kwon, Wright and Nowak, "A
fully first-order method for stochastic bilevel optimization", ICML 2023; Pan et al., "ScaleBiO",
ACL 2025. L_V is that of θ_λ and of an FT head that takes one FT step on θ_λ beside each PT step;
it is not differentiated through these. All else is as Algorithm 1 and the preset have it.

What is stored in bench/results/penalty is not made again.
"""

import copy
import dataclasses
import time
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer

import metapt
from bench.costs import counting
from bench.stored import RESULTS as ALL_RESULTS
from bench.stored import add_result, load_json, save_json
from bench.studies import languages, worth

RESULTS = ALL_RESULTS / "penalty"
PRESET = "preset: CG 10"
# One round at a gentle rate of φ.
PROTEINS = dataclasses.replace(
    worth.EXPERIMENTS["ppi-permuted-zero-biases"],
    given={**worth.SHORT, "permuted": 0.8, "base_rates": False},
)

app = typer.Typer(add_completion=False, rich_markup_mode=None)


class PenaltyTraining(metapt.Training):
    """Algorithm 1 with the difference of two θ in place of the hypergradient.

    Args:
        strength: λ, by which a difference of L_PT counts more than L_V.
    """

    # What each of the two has of its own.
    OF_EACH = ("network", "optimizer", "psi", "ft_states")

    def __init__(self, domain: metapt.Domain, strength: float):
        self.strength = strength
        super().__init__(domain, learn=True)

    def begin_theta(self) -> None:
        super().begin_theta()
        # Both begin alike.
        network = copy.deepcopy(self.network)
        self.other = {
            "network": network,
            "optimizer": metapt.adam(network.parameters(), self.settings.lr),
            "psi": copy.deepcopy(self.psi),
            "ft_states": copy.deepcopy(self.ft_states),
        }

    def exchange(self) -> None:
        """The two θ, with their optimisers and heads, change places."""
        for name in self.OF_EACH:
            mine = getattr(self, name)
            setattr(self, name, self.other[name])
            self.other[name] = mine

    def pretrain_step(self) -> None:
        """A step of both on the same batch, under the same random numbers."""
        index = self.batches["pretrain"].next()
        random_state = torch.get_rng_state()
        self.descend(index, penalised=False)
        torch.set_rng_state(random_state)
        self.exchange()
        self.descend(index, penalised=True)
        self.finetune_head()
        self.exchange()

    def descend(self, index: torch.Tensor, penalised: bool) -> None:
        """A step of PT's optimiser along L_PT or, penalised, along L_PT + L_V / λ."""
        self.optimizer.param_groups[0]["lr"] = self.pretrain_rate()
        theta = dict(self.network.named_parameters())
        progress = self.progress(self.step)
        pretrain_loss = self.domain.pretrain_loss(
            self.network, self.meta, index, progress, live=True
        )
        value = pretrain_loss(theta, metapt.detached(self.meta))
        if penalised:
            validation_value = self.validation_loss()(theta, self.psi)
            self.losses["validation_loss"] = validation_value.detach()
            value = value + validation_value / self.strength
        else:
            self.losses["pretrain_loss"] = value.detach()
        self.optimizer.zero_grad()
        self.domain.backward(value, theta)
        self.optimizer.step()

    def meta_step(self) -> None:
        """One step on φ along λ times the difference of the two slopes of L_PT."""
        index = self.batches["meta"].next()
        random_state = torch.get_rng_state()
        of_plain = self.slope(index)
        torch.set_rng_state(random_state)
        self.exchange()
        of_penalised = self.slope(index)
        self.exchange()
        for name, p in self.meta.named_parameters():
            p.grad = self.strength * (of_penalised[name] - of_plain[name])
        self.meta_optimizer.step()
        if self.progress(self.step - 1) >= 1 - self.settings.average:
            self.add_to_average()
        self.meta_steps += 1

    def slope(self, index: torch.Tensor) -> metapt.Params:
        """∇_φ L_PT on these examples; θ is a constant, so that no graph of it is kept."""
        progress = self.progress(self.step - 1)
        pretrain_loss = self.domain.pretrain_loss(
            self.network, self.meta, index, progress, live=False
        )
        phi = {name: p.requires_grad_() for name, p in metapt.detached(self.meta).items()}
        value = pretrain_loss(metapt.detached(self.network), phi)
        return metapt.gradient(value, phi)


class Variant(NamedTuple):
    """How φ is learned: λ, and what differs from the preset's settings."""

    strength: float | None  # None: not by the penalty method
    given: dict


# A meta step costs so little here that φ can take one after each PT step, on four times as many
# examples, for what the preset's CG takes; its rate is lower in return.
OFTEN = {"meta_every": 1, "meta_batch_size": 2048, "meta_lr": 0.04}
OF_SOURCES = {
    "λ = 1": Variant(1.0, {}),
    "λ = 10": Variant(10.0, {}),
    "λ = 100": Variant(100.0, {}),
    "λ = 1000": Variant(1000.0, {}),
    "λ = 100, often": Variant(100.0, OFTEN),
    # What a hypergradient does for as little: the preset without its products.
    "q = v": Variant(None, {"solver": "identity", "terms": 1, "damping": 0.0}),
}
# L_V is differentiated in each PT step here, and not in one of ten: on as many graphs as L_PT.
FEW = {"validation_batch_size": 64}
OF_PROTEINS = {
    "λ = 1": Variant(1.0, FEW),
    "λ = 10": Variant(10.0, FEW),
    "λ = 100": Variant(100.0, FEW),
}


def stored(name: str) -> dict:
    return load_json(RESULTS / f"penalty-{name}.json")


def store(name: str, key: str, variant: str, result: dict) -> None:
    add_result(RESULTS / f"penalty-{name}.json", key, variant, result)


def training_of(variant: Variant, domain: metapt.Domain) -> metapt.Training:
    with_settings = languages.with_settings(domain, **variant.given)
    if variant.strength is None:
        return metapt.Training(with_settings, learn=True)
    return PenaltyTraining(with_settings, variant.strength)


def learned_by(variant: Variant, domain: metapt.Domain) -> tuple[metapt.Training, float]:
    """The run to its end, and its CPU seconds."""
    begun = time.process_time()
    training = training_of(variant, domain).run()
    return training, time.process_time() - begun


@app.command()
def sources(
    seeds: Annotated[str, typer.Option(help="With commas")] = "0",
    targets: Annotated[str, typer.Option(help="With commas")] = "Faroese-OFT,Galician-TreeGal",
    variants: Annotated[str, typer.Option(help="With semicolons")] = ";".join(OF_SOURCES),
    data: Annotated[Path, typer.Option(help="Where prepared data lie")] = Path("data"),
):
    """Shares of sources learned so; other methods' accuracies are stored by languages.py."""
    torch.set_num_threads(1)
    for seed in map(int, seeds.split(",")):
        for target in targets.split(","):
            key = f"{target} {seed}"
            for name in variants.split(";"):
                if name in stored("sources").get(key, {}):
                    continue
                cell = languages.Cell(data, target, seed)
                training, seconds = learned_by(OF_SOURCES[name], cell.domain)
                learned = training.learned()
                network = cell.pretrained(learned.state_dict())
                result = {
                    "scores": languages.scores_of(cell.domain, network),
                    "seconds": seconds,
                    "shares": cell.domain.measure(learned),
                }
                store("sources", key, name, result)
                shown = " ".join(f"{100 * score:.1f}" for score in result["scores"])
                print(f"{key}, {name}: {shown}, {seconds:.0f} s", flush=True)


@app.command()
def proteins(
    seeds: Annotated[str, typer.Option(help="With commas")] = "1",
    variants: Annotated[str, typer.Option(help="With semicolons")] = ";".join(OF_PROTEINS),
    beside: Annotated[str, typer.Option(help="Methods of worth.py, with commas")] = (
        "default,learned,oracle"
    ),
    data: Annotated[Path, typer.Option(help="Where prepared data lie")] = Path("data"),
):
    """Weights of PT tasks, 80 % of which have permuted labels, learned so."""
    for seed in map(int, seeds.split(",")):
        key = f"{seed}"
        trial = worth.Trial(PROTEINS, seed, {}, data)
        missing = [
            name
            for name in [*filter(None, beside.split(",")), *filter(None, variants.split(";"))]
            if name not in stored("proteins").get(key, {})
        ]
        for name in missing:
            result = {}
            if name in OF_PROTEINS:
                training, result["seconds"] = learned_by(OF_PROTEINS[name], trial.domain)
                learned = training.learned()
                network = trial.afresh(learned.state_dict())
                result["told"] = told(trial.domain, learned)
            else:
                begun = time.process_time()
                network = getattr(trial, name)()
                result["seconds"] = time.process_time() - begun
                if name == "learned":
                    result["told"] = told(trial.domain, trial.meta_run.training.learned())
            rows = worth.measured(trial, network)
            result["scores"] = [row["score"] for row in rows]
            store("proteins", key, name, result)
            shown = " ".join(f"{100 * score:.1f}" for score in result["scores"])
            print(f"{key}, {name}: {shown}, {result['seconds']:.0f} s", flush=True)


def told(domain: metapt.Domain, meta: torch.nn.Module) -> float:
    """The share of the pairs of a true and a permuted PT task in which the true one weighs more."""
    weights = meta.weights().detach()
    permuted = torch.from_numpy(domain.permuted)
    of_true = weights[~permuted]
    of_permuted = weights[permuted]
    return (of_true[:, None] > of_permuted).double().mean().item()


def seconds_of(training: metapt.Training, meta_steps: int = 3) -> float:
    """CPU seconds of a whole run, from those of a few of its steps."""
    settings = training.settings
    spent = {"pretrain": 0.0, "meta": 0.0}
    pt_steps = 5 * meta_steps
    training.domain.begin_episode(training.meta)
    training.pretrain_step()  # what the first one builds is left out
    for number in range(pt_steps):
        begun = time.process_time()
        training.pretrain_step()
        spent["pretrain"] += time.process_time() - begun
        training.step += 1
        if number % 5 == 4:
            begun = time.process_time()
            training.meta_step()
            spent["meta"] += time.process_time() - begun
    in_a_run = (settings.steps - settings.warmup_steps) // settings.meta_every
    of_pretraining = settings.steps * spent["pretrain"] / pt_steps
    return of_pretraining + in_a_run * spent["meta"] / meta_steps


def cost_of(training: metapt.Training) -> dict[str, float]:
    """CPU seconds of a run; the most bytes saved for backward, in those of a plain PT step."""
    seconds = seconds_of(training)
    alone = metapt.Training(training.domain, learn=False)
    of_pt_step = counting.peak(alone.pretrain_step)
    most = max(counting.peak(training.pretrain_step), counting.peak(training.meta_step))
    return {"seconds": seconds, "bytes": most / of_pt_step}


@app.command()
def cost(data: Annotated[Path, typer.Option(help="Where prepared data lie")] = Path("data")):
    """What a run that learns φ takes, in turn: the preset's, and each variant's."""
    torch.set_num_threads(1)
    domains = {
        "sources": (languages.make_domain(data, "Faroese-OFT", 0), OF_SOURCES),
        "proteins": (worth.Trial(PROTEINS, 1, {}, data).domain, OF_PROTEINS),
    }
    found = {}
    for name, (domain, variants) in domains.items():
        found[name] = {"preset": cost_of(metapt.Training(domain, learn=True))}
        for label, variant in variants.items():
            found[name][label] = cost_of(training_of(variant, domain))
            print(f"{name}, {label}: {found[name][label]}", flush=True)
    save_json(RESULTS / "penalty-cost.json", found)


def beside_languages(key: str) -> dict[str, list[float]]:
    """Accuracies of a cell by method: those of languages.py, and those stored here."""
    of_preset = languages.stored("default").get(key, {})
    found = {}
    for method, scores, name in (
        ("even", of_preset, "even"),
        ("overlap", of_preset, "overlap"),
        (PRESET, of_preset, "learned"),
    ):
        if name in scores:
            found[method] = scores[name]
    results = stored("sources")[key]
    return found | {name: results[name]["scores"] for name in OF_SOURCES if name in results}


def report_sources(keys: list[str], title: str) -> None:
    """Gains in points over cells, on even shares and on the preset, by method."""
    results = {key: beside_languages(key) for key in keys}
    rows = []
    for method in dict.fromkeys(method for scores in results.values() for method in scores):
        count = sum(method in scores for scores in results.values())
        columns = (*range(len(languages.COLUMNS)), slice(None))
        gains = [languages.gains_of(results, method, "even", column) for column in columns]
        more = languages.gains_of(results, method, PRESET, slice(None))
        cells = [languages.in_points(of_column) for of_column in (*gains, more)]
        rows.append([method, f"{count}", *cells])
    columns = ["", "cells", *languages.COLUMNS, "mean", "mean, on the preset"]
    metapt.show_table(metapt.make_console(as_json=False), title, columns, rows)


@app.command()
def report():
    """Tables of all that is stored here, beside what languages.py stored."""
    keys = list(stored("sources"))
    chosen_on = [key for key in keys if key.split()[1] == "0"]
    fresh = [key for key in keys if key not in chosen_on]
    report_sources(chosen_on, "seed 0, on which λ was chosen: gain on even shares, points")
    if fresh:
        report_sources(fresh, "fresh cells: gain on even shares, points")
    rows = []
    for seed, methods in stored("proteins").items():
        for method, result in methods.items():
            scores = [f"{100 * score:.1f}" for score in result["scores"]]
            share = f"{result['told']:.2f}" if "told" in result else ""
            rows.append([seed, method, *scores, share])
    columns = ["seed", "", "364", "2,915", "true above permuted"]
    console = metapt.make_console(as_json=False)
    metapt.show_table(console, "proteins: test AUROC (%)", columns, rows)
    rows = []
    for domain, by_variant in stored("cost").items():
        for label, found in by_variant.items():
            seconds = found["seconds"] / by_variant["preset"]["seconds"]
            rows.append([domain, label, f"{seconds:.2f}", f"{found['bytes']:.1f}"])
    columns = ["", "", "CPU seconds of a run, the preset's being 1", "bytes in those of a PT step"]
    metapt.show_table(console, "cost", columns, rows)


if __name__ == "__main__":
    app()
