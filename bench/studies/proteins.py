"""What weights of tasks and their rivals are worth on protein graphs, and what a step costs there.

    python -m bench.studies.proteins study --seed 1
        all methods on the yeast graphs, one seed (data/ppi must be there)
    python -m bench.studies.proteins report
        tables and figures of all seeds that there are
    python -m bench.studies.proteins tell
        how well hypergradients tell true PT tasks from permuted ones
    python -m bench.studies.proteins twins
        how many FT terms have all but the same proteins as a PT term
    python -m bench.studies.proteins scale
        generated graphs at the published averages: this against the published way

Each writes what it found in bench/results/proteins as it goes. A seed draws everything: FT tasks,
split, weights, batches.
"""

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import rich.console
import torch
import typer
from scipy import stats

import metapt
from bench.accuracy.precision import phi_held
from bench.domains.ppi import PPI
from bench.domains.ppi_baselines import CoTrain, PCGrad, Selection
from bench.stored import RESULTS, ROOT, save_figure, save_json
from data_scripts.graphs import RawGraphs, prepare_graphs

STORED = RESULTS / "proteins"
DATA = Annotated[Path, typer.Option(help="Where downloaded data lie")]
# Before FT: which FT data may be seen. FT itself has all labels of the tasks that it is scored on.
ACCESS = {"full": {}, "half": {"ft_share": 0.5}, "unseen": {"unseen_tasks": 10}}
SELECT = {"select": 235}  # a quarter of the PT tasks
# Of `study`: heads that begin at 0, and φ learned as before base rates and evaluation mode were
# found to matter.
PLAIN = {
    "base_rates": False,
    "meta_train": True,
    "unroll_lr": 1e-3,
    "meta_lr": 1.0,
    "meta_batch_size": 128,
    "validation_batch_size": 250,
}
PUBLISHED = {"solver": "neumann", "terms": 1, "alpha": 1e-3, "hvp": "exact", "unroll_hvp": ""}
PRESET = {name: getattr(PPI.Settings(), name) for name in PUBLISHED}
PRETRAINED = {"supervised": PPI, "cotrain": CoTrain, "pcgrad": PCGrad}
LEARNED = {
    "meta": (PPI, PUBLISHED),
    "cheap": (PPI, PRESET),
    "aware": (Selection, PUBLISHED | SELECT),
    "agnostic": (Selection, PUBLISHED | SELECT | {"agnostic": True}),
}
NAMES = {
    "none": "no PT",
    "supervised": "supervised PT",
    "cotrain": "CoTrain",
    "pcgrad": "CoTrain + PCGrad",
    "meta": "learned φ, θ of that run",
    "learned": "learned φ, PT afresh",
    "cheap": "learned φ with q = v (the preset)",
    "aware": "selection, downstream-aware",
    "agnostic": "selection, downstream-agnostic",
}
DRAWS = 200  # of the bootstrap
app = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_enable=False)
console = rich.console.Console()


def make(data: Path, seed: int, kind=PPI, steps: int = 1000, **given) -> metapt.Domain:
    settings = kind.Settings(
        **{
            "seed": seed,
            "source": "string-yeast",
            "steps": steps,
            "warmup": min(100, steps // 6),
            **PLAIN,
            **given,
        }
    )
    return kind(settings, metapt.pick_device("auto"), data)


def measured(domain: metapt.Domain, network, examples: int, seed: int) -> tuple[float, list[float]]:
    """Test mean AUROC after FT of a head, and the same on `DRAWS` bootstrap samples of the test
    proteins.
    """
    kept, score = [], domain.score
    domain.tests = {"test": domain.tests["test"]}
    domain.score = lambda *pair: kept.append(pair) or score(*pair)
    result = metapt.finetune(domain, network, examples, seed)
    del domain.score
    outputs, targets = kept[-1]  # of the best look, which is what counts
    random, n = np.random.default_rng(seed), len(outputs)  # the same proteins for every method
    draws = [random.integers(0, n, n) for _ in range(DRAWS)]
    return result.scores["test"], [round(domain.score(outputs[i], targets[i]), 5) for i in draws]


@app.command()
def study(
    seed: Annotated[int, typer.Option(help="Of everything")] = 1,
    steps: Annotated[int, typer.Option(help="PT steps")] = 1000,
    only: Annotated[
        str, typer.Option(help="These methods alone, with commas between; others keep their rows")
    ] = "",
    data: DATA = Path("data"),
):
    """All methods, with full access to the FT data before FT, with half of them, and on FT tasks
    that were not seen.
    """
    path, rows, weights = STORED / f"seed{seed}.json", [], {}
    path.parent.mkdir(parents=True, exist_ok=True)
    networks, wanted = {}, set(only.split(",")) if only else set(NAMES)
    if only and path.exists():
        before = json.loads(path.read_text())
        rows, weights = (
            [row for row in before["rows"] if row["method"] not in wanted],
            before["weights"],
        )

    def trained(name, kind=PPI, learn=False, phi=None, **given):
        made, begun = make(data, seed, kind, steps, **given), time.perf_counter()
        training = metapt.Training(made, learn, phi).run()
        console.print(f"seed {seed}, {name}: {time.perf_counter() - begun:.0f} s")
        return made, training

    def note(access, method, made, network):
        for n in made.finetune_sizes:
            score, draws = measured(made, network, n, seed)
            rows.append(
                {
                    "access": access,
                    "method": method,
                    "ft_examples": n,
                    "seed": seed,
                    "auroc": score,
                    "draws": draws,
                }
            )
            console.print(f"  {access:6s} {method:10s} {n:5d} FT examples: {100 * score:.2f}")
        save_json(
            path,
            {
                "torch": torch.__version__,
                "steps": steps,
                "seed": seed,
                "weights": weights,
                "rows": rows,
            },
        )

    for access, options in ACCESS.items():
        options = {**options, **({"fold": seed % 4} if access == "unseen" else {})}
        made = make(data, seed, **options)
        if access == "full":
            torch.manual_seed(seed)
            networks["none"] = made.network()
            if "supervised" in wanted:
                networks["supervised"] = trained("supervised")[1].network
            if "agnostic" in wanted:
                kind, given = LEARNED["agnostic"]
                networks["agnostic"] = trained("agnostic", kind, True, **given)[1].network
        for method in ("none", "supervised", "agnostic"):  # these see no FT data before FT
            if access != "half" and method in wanted:
                note(access, method, made, networks[method])
        for method in sorted(wanted & {"cotrain", "pcgrad"}):
            note(access, method, made, trained(method, PRETRAINED[method], **options)[1].network)
        for method in [m for m in ("meta", "cheap", "aware") if m in wanted]:
            kind, given = LEARNED[method]
            of, training = trained(method, kind, True, **options, **given)
            note(access, method, made, training.network)
            if method == "meta":
                phi = training.learned()
                afresh = trained("learned", phi=phi.state_dict(), **options)[1]
                if access == "full":
                    terms = [of.graphs.about["terms"][i] for i in of.pretrain_tasks.tolist()]
                    weights.update(
                        zip(terms, phi.weights().detach().numpy().round(4).tolist(), strict=True)
                    )
                note(access, "learned", made, afresh.network)


def found() -> tuple[list[dict], list[dict]]:
    files = [json.loads(path.read_text()) for path in sorted(STORED.glob("seed*.json"))]
    rows = [row for file in files for row in file["rows"]]
    # What sees no FT data before FT is the same with half of them.
    rows += [
        {**row, "access": "half"}
        for row in rows
        if row["access"] == "full" and row["method"] in ("none", "supervised", "agnostic")
    ]
    return files, rows


@app.command()
def report():
    """Mean AUROC by method and access, paired differences to supervised PT with 95 % intervals."""
    files, rows = found()
    # The last one of an access
    whole = {(row["access"], row["seed"]) for row in rows if row["method"] == "aware"}
    rows = [row for row in rows if (row["access"], row["seed"]) in whole]
    summary = []
    for small in (True, False):
        for access in ACCESS:
            cells = []
            for method, label in NAMES.items():
                chosen = {}
                for row in rows:
                    if row["access"] == access and row["method"] == method:
                        smaller = row["ft_examples"] == min(
                            r["ft_examples"] for r in rows if r["seed"] == row["seed"]
                        )
                        if smaller == small:
                            chosen[row["seed"]] = row
                base = {
                    r["seed"]: r
                    for r in rows
                    if r["access"] == access
                    and r["method"] == "supervised"
                    and r["ft_examples"] in {c["ft_examples"] for c in chosen.values()}
                }
                seeds = sorted(chosen)
                if not seeds:
                    continue
                scores = np.array([chosen[s]["auroc"] for s in seeds])
                d = scores - np.array([base[s]["auroc"] for s in seeds])
                # Proteins are resampled in each seed's test part, then the seeds averaged.
                draws = np.mean(
                    [np.array(chosen[s]["draws"]) - np.array(base[s]["draws"]) for s in seeds],
                    axis=0,
                )
                low, high = np.percentile(draws, [2.5, 97.5])
                stderr = scores.std(ddof=1) / len(seeds) ** 0.5 if len(seeds) > 1 else float("nan")
                # Half of the 95 % interval over seeds, which differ in FT tasks, split, weights and
                # batches.
                spread = d.std(ddof=1) / len(seeds) ** 0.5 if len(seeds) > 1 else float("nan")
                spread *= stats.t.ppf(0.975, max(1, len(seeds) - 1))
                row = {
                    "access": access,
                    "method": method,
                    "ft_examples": chosen[seeds[0]]["ft_examples"],
                    "seeds": len(seeds),
                    "mean": scores.mean(),
                    "stderr": metapt.finite_or_none(stderr),
                    "difference": d.mean(),
                    "low": low,
                    "high": high,
                    "difference_half_interval": metapt.finite_or_none(spread),
                }
                summary.append(
                    {k: float(v) if isinstance(v, np.floating) else v for k, v in row.items()}
                )
                cells.append(
                    [
                        label,
                        f"{100 * scores.mean():.1f} ± {100 * stderr:.1f}",
                        f"{100 * d.mean():+.2f}",
                        f"{100 * low:+.2f} … {100 * high:+.2f}",
                        f"± {100 * spread:.2f}",
                        str(len(seeds)),
                    ]
                )
            if cells:
                title = f"Access: {access}; {'an eighth of' if small else 'all'} FT examples"
                metapt.show_table(
                    console,
                    title,
                    [
                        "",
                        "mean AUROC (%)",
                        "− supervised",
                        "95 % interval over proteins",
                        "over seeds",
                        "seeds",
                    ],
                    cells,
                )
    save_json(STORED / "ppi-study.json", {"torch": torch.__version__, "rows": summary})
    of_term = {}
    for file in files:
        for term, weight in file["weights"].items():
            of_term.setdefault(term, []).append(weight)
    known = {t: w for t, w in of_term.items() if len(w) > len(files) / 2}
    if known:
        draw_terms(known)
    pairs = []
    for a, b in itertools.combinations(files, 2):
        shared = sorted(set(a["weights"]) & set(b["weights"]))
        pairs.append(np.corrcoef(*([f["weights"][t] for t in shared] for f in (a, b)))[0, 1])
    console.print(
        f"correlation of the weights between two seeds: {np.mean(pairs):.2f}, "
        f"{min(pairs):.2f} to {max(pairs):.2f}"
    )


@app.command()
def tell(
    data: DATA = Path("data"),
    seeds: Annotated[int, typer.Option(help="How many, from 1")] = 2,
    often: Annotated[int, typer.Option(help="Tasks with so many positives or more")] = 50,
):
    """80 % of the PT tasks permuted, φ held at 1: the share of pairs of a true and a permuted task
    (AUC) in which the true one has the better mean hypergradient so far (q = v, all PT graphs,
    all FT labels, each scaled to the same size).
    """
    places, rows = (30, 100, 200, 400, 600), []
    for base_rates, meta_train, seed in itertools.product(
        (False, True), (True, False), range(1, seeds + 1)
    ):
        made = make(
            data,
            seed,
            steps=places[-1],
            permuted=0.8,
            base_rates=base_rates,
            meta_train=meta_train,
            unroll_lr=1e-2,
            validate_on="all",
            unroll_batch_size=10**6,
            validation_batch_size=10**6,
        )
        torch.set_num_threads(1)
        training, gradients = phi_held(made), []
        batches = metapt.Batches(made.sizes["finetune"], 64)
        training.batches["finetune"].next, whole = batches.next, training.batches["finetune"].next
        everything, common = torch.arange(made.sizes["pretrain"]), None
        common = made.graphs.positives(made.rows["pretrain"], made.pretrain_tasks) >= often
        for step in range(1, places[-1] + 1):
            training.pretrain_step()
            if step not in places:
                continue
            training.batches["finetune"].next = whole
            found = (
                metapt.hypergradient(
                    made.pretrain_loss(
                        training.network, training.meta, everything, 1.0, live=False
                    ),
                    [],
                    training.validation_loss(),
                    metapt.detached(training.network),
                    training.psi,
                    metapt.detached(training.meta),
                    unroll=metapt.Unroll(0),
                    solver=metapt.Solver("identity", hvp="finite"),
                )
                .phi["task_logits"]
                .numpy()
            )
            training.batches["finetune"].next = batches.next
            gradients.append(found / abs(found).mean())
            ranks = stats.rankdata(-np.mean(gradients, 0)[common])
            true = ~made.permuted[common]
            auc = (ranks[true].sum() - true.sum() * (true.sum() + 1) / 2) / (
                true.sum() * (~true).sum()
            )
            rows.append(
                {
                    "seed": seed,
                    "base_rates": base_rates,
                    "meta_train": meta_train,
                    "step": step,
                    "auc": auc,
                }
            )
        save_json(
            STORED / "ppi-tell.json", {"torch": torch.__version__, "often": often, "rows": rows}
        )
    cells = []
    for base_rates, meta_train in itertools.product((False, True), (True, False)):
        of = [
            row
            for row in rows
            if (row["base_rates"], row["meta_train"]) == (base_rates, meta_train)
        ]
        begin = "base rates" if base_rates else "0"
        mode = "training" if meta_train else "evaluation"
        name = f"outputs begin at {begin}, {mode} mode"
        means = [np.mean([row["auc"] for row in of if row["step"] == step]) for step in places]
        cells.append([name, *(f"{mean:.2f}" for mean in means)])
    metapt.show_table(
        console, "AUC, true against permuted tasks", ["PT steps", *map(str, places)], cells
    )


@app.command()
def twins(data: DATA = Path("data"), seeds: int = 5):
    """FT terms whose proteins are those of a PT term, by seed: GO terms nest, so PT sees much of FT
    under another name.
    """
    for seed in range(1, seeds + 1):
        made = make(data, seed)
        everything = torch.arange(len(made.graphs.sizes))
        pt, ft = (
            made.graphs.labels(everything, tasks)
            for tasks in (made.pretrain_tasks, made.finetune_tasks)
        )
        both = ft.T @ pt
        overlap = (both / (ft.sum(0)[:, None] + pt.sum(0) - both)).max(1).values
        counts = {level: int((overlap >= level).sum()) for level in (1.0, 0.9, 0.8)}
        console.print(
            f"seed {seed}: of {len(overlap)} FT terms, by the overlap (Jaccard) "
            f"with the nearest PT term: {counts}"
        )


def draw_terms(known: dict[str, list[float]], shown: int = 15) -> None:
    names = json.loads(Path(__file__).with_name("go_names.json").read_text())
    mean = {term: float(np.mean(w)) for term, w in known.items()}
    order = sorted(mean, key=mean.get)
    rows = [*order[:shown], *order[-shown:]]

    def draw(figure):
        figure.set_size_inches(5.5, 5)
        axis = figure.subplots()
        for i, term in enumerate(rows):
            axis.plot(known[term], [i] * len(known[term]), ".", ms=3, color="0.6")
            axis.plot(mean[term], i, "o", ms=4, color="C0" if i < shown else "C3")
        axis.set_yticks(
            range(len(rows)), [f"{names.get(t, '')} {t}".strip() for t in rows], fontsize=6
        )
        axis.axvline(1, color="0.5", lw=0.6)
        axis.set(xlabel="weight of the PT task; grey: each seed")

    save_figure(STORED / "ppi-terms.png", draw)


def generate(graphs: int, tasks: int, at_once: int = 4096):
    """Not real: ego networks with the published averages (40 nodes, 730 directed edges, 8 species),
    random labels.
    """
    random = np.random.default_rng(0)
    for begin in range(0, graphs, at_once):
        n = min(at_once, graphs - begin)
        sizes = random.integers(26, 55, n)
        keep = np.triu(random.random((n, 54, 54), dtype=np.float32) < 0.449, 1)
        # The upper triangle: the column is the larger number
        keep &= np.arange(54)[None, None] < sizes[:, None, None]
        graph, u, v = np.nonzero(keep | keep.transpose(0, 2, 1))
        features = (random.random((len(graph), 9), dtype=np.float32) < 0.3).astype(np.float32)
        features[:, 7:] = 0
        yield RawGraphs(
            sizes,
            np.bincount(graph, minlength=n),
            np.stack([u, v]),
            features,
            np.zeros(n, int),
            random.choice([9606, 3702, 6239, 511145, 7227, 10090, 4932, 7955], n),
            (random.random((n, tasks), dtype=np.float32) < 0.03).astype(np.uint8),
        )


@app.command()
def scale(
    graphs: Annotated[int, typer.Option(help="88000 as published")] = 88_000,
    steps: Annotated[int, typer.Option(help="PT steps that are timed")] = 5,
    folder: Annotated[Path, typer.Option(help="Where the generated graphs go")] = Path(
        "data/generated"
    ),
):
    """Generated graphs: preparation, start-up, memory and steps per second, against the published
    procedure.
    """
    # Each part in a process of its own: its peak memory is not the others'.
    options = ["--folder", str(folder), "--steps", str(steps)]

    def part(*command):
        command = [sys.executable, "-m", "bench.studies.proteins", *command]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        return json.loads(done.stdout.splitlines()[-1])

    result = part("prepare", str(graphs), "--folder", str(folder))
    for way in ("ours", "published"):
        result[way] = part("one", way, *options)
        save_json(STORED / "ppi-scale.json", result)
    console.print(result)


@app.command()
def prepare(graphs: int, folder: Path = Path("data/generated")):
    """Generates graphs and prepares them."""
    begun, target = time.perf_counter(), folder / "ppi" / "published"
    about = prepare_graphs(
        target,
        generate(graphs, 5040),
        [f"task {i}" for i in range(5040)],
        40,
        source="generated",
        licence="none",
    )
    counts = {name: about[name] for name in ("graphs", "nodes", "edges", "tasks")}
    size = sum(path.stat().st_size for path in target.iterdir())
    print(
        json.dumps(
            {
                "generated": True,
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
                **counts,
                "generate_and_prepare_seconds": time.perf_counter() - begun,
                "bytes_on_disk": size,
            }
        )
    )


@app.command()
def one(way: str, steps: int = 5, folder: Path = Path("data/generated")):
    """One side of `scale`, in a process of its own, so that its peak memory is its own.

    Steps are timed in CPU seconds of one thread: what else the machine does counts less.
    """
    torch.set_num_threads(1)

    def peak():  # ru_maxrss would begin with the parent's
        status = Path("/proc/self/status").read_text()
        return 1024 * int(
            next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
        )

    imported, begun = peak(), time.perf_counter()
    given = {"source": "published", "steps": 100, "warmup": 0, **(PRESET if way == "ours" else {})}
    made = PPI(PPI.Settings(**{**PPI.presets["paper"], **given}), torch.device("cpu"), folder)
    startup = time.perf_counter() - begun
    # Its graphs come as Data objects, collated batch by batch; the loss is in float64
    if way == "published":
        from bench.costs.plain_gin import PlainGIN, PlainPPI

        made = PlainPPI(made, generate(len(made.graphs.sizes), 5040), PlainGIN)
    training = metapt.Training(made, learn=True)
    training.pretrain_step()
    times = {}
    for name, step in (
        ("pt_step_seconds", training.pretrain_step),
        ("meta_step_seconds", training.meta_step),
    ):
        taken = []
        for _ in range(steps):
            begun = time.process_time()
            step()
            taken.append(time.process_time() - begun)
        times[name] = float(np.median(taken))
        times[name.replace("seconds", "peak_bytes")] = peak()
    print(json.dumps({"startup_seconds": startup, "imported_bytes": imported, **times}))


if __name__ == "__main__":
    app()
