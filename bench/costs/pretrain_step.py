"""What a PT step of `Training` costs beside a plain loop that does the same.

    python -m bench.costs.pretrain_step                  every domain below, on made-up data
    python -m bench.costs.pretrain_step --data data      on prepared data, as far as they are there

The plain loop is written as one would write it without metapt: modules are called as they are,
torch.optim.Adam moves them, and nothing is a function of θ, ψ or φ. Network, losses, random numbers
and the order of the data are the same. θ after some steps is equal bit by bit, ψ up to the rounding
of another formula for Adam (bench/tests/test_pretrain_step.py). Operations and FLOPs are counted;
for seconds of the processor, on one thread, the two loops take turns.
"""

import copy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import rich.console
import torch
import torch.nn.functional as F
import typer
from torch import Tensor

import metapt
from bench.costs import counting, made_up
from bench.domains.ecg import nt_xent
from bench.domains.sources import PADDING
from bench.stored import RESULTS, save_json

STORED = RESULTS / "pretrain-step" / "pretrain-step-costs.json"
# How many pairs of steps are timed.
PAIRS = {"digits-rotation": 400, "sources": 100, "ppi": 100, "ecg": 15}
app = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_enable=False)
console = rich.console.Console(width=130)


class PlainLoop:
    """PT with φ fixed, and an FT head trained beside it, without metapt's manner of calling.

    It begins with copies of what a `training` has: network, head, φ, order of the data.
    """

    def __init__(self, name: str, training: metapt.Training):
        self.domain = training.domain
        settings = self.domain.settings
        self.pretrain_loss = PRETRAIN_LOSSES[name]
        self.finetune_loss = FINETUNE_LOSSES[name]
        self.network = copy.deepcopy(training.network)
        self.head = copy.deepcopy(training.head)
        self.meta = copy.deepcopy(training.meta).requires_grad_(False)
        self.batches = copy.deepcopy(training.batches)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=settings.lr)
        self.head_optimizer = torch.optim.Adam(self.head.parameters(), lr=settings.unroll_lr)

    def step(self) -> None:
        """One step on θ, and one on ψ beside it."""
        index = self.batches["pretrain"].next()
        self.network.train()
        value = self.pretrain_loss(self.domain, self.network, self.meta, index)
        self.optimizer.zero_grad()
        value.backward()
        self.optimizer.step()
        self.pretrain_value = value.detach()

        index = self.batches["finetune"].next()
        inputs = self.domain.inputs("finetune", index)
        targets = self.domain.targets("finetune", index)
        self.network.eval()
        with torch.no_grad():
            features = self.network(inputs, features=True)
        value = self.finetune_loss(self.head(features), targets)
        self.head_optimizer.zero_grad()
        value.backward()
        self.head_optimizer.step()
        self.finetune_value = value.detach()


def rotated_digits(domain, network, meta, index: Tensor) -> Tensor:
    images = domain.inputs("pretrain", index)
    labels = domain.targets("pretrain", index)
    rotated = meta(images, domain.settings.spread_deg)
    return F.cross_entropy(network(rotated), labels)


def tagged_sentences(domain, network, meta, index: Tensor) -> Tensor:
    """The sentences are drawn by the shares, so that their losses need no weights."""
    shares = meta.logits.softmax(0)
    source = torch.multinomial(shares, len(index), replacement=True)
    rows = domain.rows["pretrain"][domain.draw_of(source)]
    grams, tags = domain.sentences(rows)
    logits = network(grams)[..., -domain.classes :]
    losses = F.cross_entropy(
        logits.flatten(0, 1), tags.flatten(), ignore_index=PADDING, reduction="none"
    )
    return (losses.view(tags.shape) / domain.mean_words).sum(1).mean()


def protein_terms(domain, network, meta, index: Tensor) -> Tensor:
    batch = domain.inputs("pretrain", index)
    targets = domain.labels("pretrain", index, domain.pretrain_tasks)
    losses = F.binary_cross_entropy_with_logits(network(batch), targets, reduction="none")
    return meta(losses.mean(0))


def views_of_signals(domain, network, meta, index: Tensor) -> Tensor:
    first, second = meta(domain.inputs("pretrain", index))
    return nt_xent(network(first), network(second), domain.settings.temperature)


def words(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten(), ignore_index=PADDING)


PRETRAIN_LOSSES: dict[str, Callable] = {
    "digits-rotation": rotated_digits,
    "sources": tagged_sentences,
    "ppi": protein_terms,
    "ecg": views_of_signals,
}
FINETUNE_LOSSES: dict[str, Callable] = {
    "digits-rotation": F.cross_entropy,
    "sources": words,
    "ppi": F.binary_cross_entropy_with_logits,
    "ecg": F.binary_cross_entropy_with_logits,
}


def make_up(data: Path) -> Path:
    """A folder with data for all these domains; digits need none."""
    made_up.ecg(data, 500)
    made_up.ppi(data)
    made_up.sources(data)
    return data


def both_loops(name: str, data: Path, **given) -> tuple[metapt.Training, PlainLoop]:
    """A training at its start, and the plain loop that begins as it does."""
    kind = metapt.find_domain(name)
    settings = metapt.make_settings(kind, {"warmup": 0, **given}, "default")
    domain = kind(settings, torch.device("cpu"), data)
    training = metapt.Training(domain, learn=True)
    domain.begin_episode(training.meta)
    return training, PlainLoop(name, training)


def counts(name: str, data: Path, **given) -> dict:
    """Operations and FLOPs of one step of each loop, and by which operations they differ."""
    training, plain = both_loops(name, data, **given)
    works = {"training": training.pretrain_step, "plain": plain.step}
    # The first steps make the moments of Adam.
    for work in works.values():
        work()
    flops = {who: counting.flops(work) for who, work in works.items()}
    by_name = {who: counting.operations_by_name(work) for who, work in works.items()}
    more = by_name["training"].copy()
    more.subtract(by_name["plain"])
    return {
        "domain": name,
        "operations": {who: found.total() for who, found in by_name.items()},
        "flops": flops,
        "more_operations": {kind: number for kind, number in sorted(more.items()) if number},
    }


def times(name: str, data: Path, pairs: int) -> dict:
    """How long a step of `Training` takes in steps of the plain loop, pair by pair.

    Seconds are the process's own: waiting while other processes run would count for both alike, and
    hide what there is between them.
    """
    training, plain = both_loops(name, data)
    works = {"training": training.pretrain_step, "plain": plain.step}
    # The first pair, which it leaves out, makes the moments of Adam.
    seconds = counting.in_turn(works, pairs, training.domain.device, time.process_time)
    ratios = np.divide(seconds["training"], seconds["plain"])
    resampled = np.random.default_rng(0).choice(ratios, (2000, pairs))
    return {
        "pairs": pairs,
        "time_ratio": float(np.median(ratios)),
        "time_ratio_interval": np.percentile(np.median(resampled, 1), [2.5, 97.5]).tolist(),
        "plain_seconds": float(np.median(seconds["plain"])),
    }


def show(rows: list[dict]) -> None:
    cells = []
    for row in rows:
        ours, plain = row["operations"].values()
        more = row["more_operations"]
        detached = more.get("aten::detach", 0)
        cloned = more.get("aten::clone", 0)
        low, high = row["time_ratio_interval"]
        cells.append(
            [
                row["domain"],
                f"{ours:,} / {plain:,} = {ours / plain:.3f}",
                f"{detached}, {cloned}, {ours - plain - detached - cloned}",
                f"{row['flops']['training'] / row['flops']['plain']:.3f}",
                f"{row['time_ratio']:.2f} ({low:.2f} … {high:.2f})",
                f"{1000 * row['plain_seconds']:.1f} ms",
            ]
        )
    head = [
        "",
        "operations",
        "more: detach, clone, others",
        "FLOPs",
        "time (95 %)",
        "plain step",
    ]
    metapt.show_table(console, "A PT step of Training by one of the plain loop", head, cells)


@app.command()
def run(
    domains: Annotated[str, typer.Option(help="With commas between")] = ",".join(PAIRS),
    data: Annotated[
        Path | None, typer.Option(help="Where prepared data lie; else they are made up")
    ] = None,
):
    """Counts and times of both loops, and their ratios."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        place = data or make_up(Path(folder))
        rows = [
            {**counts(name, place), **times(name, place, PAIRS[name])}
            for name in domains.split(",")
        ]
    show(rows)
    save_json(STORED, {"torch": torch.__version__, "made_up": data is None, "rows": rows})


if __name__ == "__main__":
    app()
