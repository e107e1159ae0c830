"""What the ECG domain is worth on 500 records, what its meta step costs, and how noisy its
hypergradients are.

    python -m bench.studies.electrocardiograms study --group 0
        all methods on one of three groups of folds (data/ecg/prepared must be there)
    python -m bench.studies.electrocardiograms study --scale 1.5
        the same of the warp at a fixed s alone
    python -m bench.studies.electrocardiograms report
        table and figure of all groups that there are
    python -m bench.studies.electrocardiograms draws
        how far hypergradients at one θ agree from draw to draw, and what one costs
    python -m bench.studies.electrocardiograms speed
        a PT step, a meta step and their bytes beside the published procedure's

Each writes what it found in bench/results/electrocardiograms as it goes. Test predictions of the
groups are pooled: one test fold of the 500 records at hand decides nothing. Patients never cross
folds.
"""

import copy
import dataclasses
import json
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import rich.console
import torch
import torch.nn.functional as F
import typer
from scipy.stats import rankdata

import metapt
from bench.accuracy.precision import phi_held
from bench.costs import baseline, counting
from bench.costs.plain_resnet import PlainResNet18, PlainWarp
from bench.domains import ecg
from bench.stored import RESULTS, save_figure, save_json

STORED = RESULTS / "electrocardiograms"
DATA = Annotated[Path, typer.Option(help="Where prepared records lie")]
GROUPS = ("1,4,7,10", "2,5,8", "3,6,9")
SETS = (50, 100, 200, 0)  # records of the FT set; 0: all that are not test's
NAMES = {
    "none": "no pre-training",
    "simclr": "SimCLR, masks and noise",
    "initial": "SimCLR and the warp at its initial φ",
    "learned": "φ learned along",
    "half": "φ learned from half of the FT set",
}
FIXED = {"simclr": {"augment": "simclr"}, "initial": {}}
LEARNED = {"learned": {}, "half": {"ft_share": 0.5}}
SCOPES = ("all", "head")
KINDS = ("seconds", "flops", "bytes", "bytes_and_data")  # what is measured of a step
FT_SEEDS, FT_STEPS, DRAWS = 1, 200, 1000
app = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_enable=False)
console = rich.console.Console()


def make(data: Path, group: int, seed: int, **given) -> ecg.ECG:
    given = {"seed": seed, "test_folds": GROUPS[group], "measure_steps": FT_STEPS, **given}
    return ecg.ECG(
        metapt.make_settings(ecg.ECG, given, "default"), metapt.pick_device("auto"), data
    )


def predictions(domain: ecg.ECG, network, scope: str, seed: int) -> np.ndarray:
    """Test logits after FT on the whole FT set, of the look that counts: [records, 5]."""
    kept, measured = [], copy.copy(domain)
    measured.settings = dataclasses.replace(domain.settings, measure_scope=scope)
    measured.score = lambda outputs, targets: kept.append(outputs) or 0.0
    metapt.finetune(measured, network, domain.finetune_limits()[1], seed)
    return kept[-1].cpu().numpy()


@app.command()
def study(
    group: Annotated[int, typer.Option(help="Which folds are the test set: 0, 1 or 2")] = 0,
    seed: Annotated[int, typer.Option(help="Of everything")] = 0,
    steps: Annotated[int, typer.Option(help="PT steps of each run")] = 150,
    scale: Annotated[
        float | None, typer.Option(help="Instead of all these methods: the warp fixed at this s")
    ] = None,
    data: DATA = Path("data"),
):
    """No PT, SimCLR, SimCLR with a warp, φ learned, φ learned from half: by FT-set size, whole
    network and head alone.
    """
    STORED.mkdir(parents=True, exist_ok=True)
    path = f"{STORED}/group{group}-seed{seed}{'' if scale is None else f'-s{scale:g}'}"
    made = make(data, group, seed, steps=steps)
    found, facts = (
        {},
        {
            "torch": torch.__version__,
            "steps": steps,
            "seed": seed,
            "group": GROUPS[group],
            "phi": {},
        },
    )
    facts["settings"] = {**dataclasses.asdict(made.settings), "ft_seeds": FT_SEEDS}

    def trained(learn, **given):
        made, begun = make(data, group, seed, steps=steps, **given), time.perf_counter()
        training = metapt.Training(made, learn).run()
        console.print(
            f"group {group}: {given} {time.perf_counter() - begun:.0f} s "
            f"{made.measure(training.meta)}"
        )
        return made, training

    def note(made, network, name, n):
        for scope in SCOPES:
            each = [predictions(made, network, scope, s) for s in range(FT_SEEDS)]
            found[f"{name} {n} {scope}"] = np.stack(each).astype(np.float32)
            scores = [ecg.mean_auroc(torch.from_numpy(x), targets) for x in each]
            console.print(
                f"group {group}: {name} {n or 'all'} {scope}: {100 * np.mean(scores):.1f}"
            )
        np.savez_compressed(f"{path}.npz", **found, labels=targets.numpy(), patients=patients)
        save_json(Path(f"{path}.json"), facts)

    targets = made.targets("test", torch.arange(made.sizes["test"])).cpu()
    patients = made.records.patient[made.rows["test"]].cpu().numpy()
    torch.manual_seed(seed)
    networks, runs = {"none": made.network()} if scale is None else {}, {}
    fixed, learned = (
        (FIXED, LEARNED) if scale is None else ({f"s = {scale:g}": {"init_scale": scale}}, {})
    )
    networks |= {name: trained(False, **given)[1].network for name, given in fixed.items()}
    for n in SETS:
        made = make(data, group, seed, ft_records=n)
        for name, network in networks.items():
            note(made, network, name, n)
        for name, given in learned.items():
            # Sets are nested: half of the one of 100 is the one of 50, and the run is the same.
            same = name == "half" and n > SETS[0]
            of, training = runs[n // 2] if same else trained(True, ft_records=n, **given)
            if name == "learned":
                runs[n] = of, training
            phi = training.learned()
            facts["phi"][f"{name} {n}"] = {
                **of.measure(phi),
                **of.facts(phi),
                "skipped": training.skipped,
            }
            note(made, training.network, name, n)


@app.command()
def report():
    """Mean AUROC of pooled predictions by FT-set size, and paired differences, with bootstrap
    intervals over patients.

    Seeds of PT that all groups have are averaged, within each draw of patients too: the interval
    leaves out what another seed would have given, which is shown beside it, seed by seed.
    """
    files, facts = {}, []
    for seed in range(10):
        stems = [f"group{g}-seed{seed}" for g in range(len(GROUPS))]
        # Those of --scale
        paths = [[*STORED.glob(f"{stem}.npz"), *STORED.glob(f"{stem}-s*.npz")] for stem in stems]
        of = [
            {key: array for path in group for key, array in np.load(path).items()}
            for group in paths
        ]
        if all(f"half {SETS[-1]} head" in found for found in of):  # others are not done yet
            files[seed] = of
            facts += [
                json.loads(path.with_suffix(".json").read_text())
                for group in paths
                for path in group
            ]
    settings = [{**fact.get("settings", {}), "seed": None, "test_folds": None} for fact in facts]
    if not files or any(given != settings[0] for given in settings):
        raise SystemExit(
            f"{STORED} holds no seed of all groups, "
            "or runs of different settings, which no mean is of"
        )
    first = files[min(files)]
    extra = {key.rsplit(" ", 2)[0] for key in first[0] if key.startswith("s = ")}
    extra = sorted(
        name
        for name in extra
        if all(f"{name} {SETS[-1]} head" in f for of in files.values() for f in of)
    )
    names = NAMES | {name: f"SimCLR and the warp at {name}" for name in extra}
    labels = np.concatenate([f["labels"] for f in first])
    patients = np.concatenate([f["patients"] for f in first])
    random, each = (
        np.random.default_rng(0),
        [np.flatnonzero(patients == p) for p in np.unique(patients)],
    )
    draws = [
        np.concatenate([each[i] for i in random.integers(0, len(each), len(each))])
        for _ in range(DRAWS)
    ]

    def scored(key):
        """The score by seed of PT, and by draw of patients, averaged over the seeds."""
        # [seeds of FT, records, 5] each
        pooled = [np.concatenate([f[key] for f in of], 1) for of in files.values()]

        def score(rows):
            return np.array(
                [np.mean([by_ranks(x[rows], labels[rows]) for x in of]) for of in pooled]
            )

        return score(slice(None)), np.array([score(rows).mean() for rows in draws])

    rows = []
    for scope in SCOPES:
        for n in SETS:
            base, by_draw = scored(f"initial {n} {scope}")
            plain, plain_by_draw = scored(f"simclr {n} {scope}")
            for name in names:
                score, drawn = scored(f"{name} {n} {scope}")
                row = {
                    "scope": scope,
                    "n": n,
                    "method": name,
                    "mean": score.mean(),
                    "by_seed": score.tolist(),
                    "interval": interval(drawn),
                }
                row |= {
                    "to_initial": (score - base).mean(),
                    "to_initial_by_seed": (score - base).tolist(),
                }
                row |= {"to_initial_interval": interval(drawn - by_draw)}
                row |= {
                    "to_simclr": (score - plain).mean(),
                    "to_simclr_interval": interval(drawn - plain_by_draw),
                }
                rows.append(row)
    save_json(
        STORED / "ecg-study.json",
        {"patients": len(each), "records": len(labels), "rows": rows, "runs": facts},
    )
    for scope, what in (("all", "the whole network moves"), ("head", "a linear head")):
        cells = []
        for name, label in names.items():
            of = [row for row in rows if row["scope"] == scope and row["method"] == name]
            cells.append(
                [
                    label,
                    *(
                        f"{100 * row['mean']:.1f} ("
                        f"{text(row['to_initial'], row['to_initial_interval'])}; "
                        + ", ".join(f"{100 * x:+.1f}" for x in row["to_initial_by_seed"])
                        + ")"
                        for row in of
                    ),
                ]
            )
        title = (
            "Mean AUROC (%) of pooled out-of-fold predictions "
            "(to the warp at its initial φ, 95 % interval; by seed of "
            f"PT: {', '.join(map(str, files))}); FT: {what}"
        )
        metapt.show_table(console, title, ["", *(str(n or "all") for n in SETS)], cells)
    draw(rows, names, len(labels))


def by_ranks(scores: np.ndarray, labels: np.ndarray) -> float:
    """`ecg.mean_auroc` without its checks, which take 20 times as long: for thousands of draws."""
    both = (labels > 0).any(0) & (labels == 0).any(0)
    scores, labels = scores[:, both], labels[:, both]
    positive, ranks = labels.sum(0), rankdata(scores, axis=0)
    above = (ranks * labels).sum(0) - positive * (positive + 1) / 2
    return (above / (positive * (len(labels) - positive))).mean()


def interval(drawn: np.ndarray) -> list[float]:
    return np.percentile(drawn, [2.5, 97.5]).tolist()


def text(mean: float, between: list[float]) -> str:
    return f"{100 * mean:+.1f}, {100 * between[0]:+.1f} … {100 * between[1]:+.1f}"


def draw(rows: list[dict], names: dict[str, str], records: int) -> None:
    def panels(figure):
        figure.set_size_inches(7, 3.2)
        for axis, scope, what in zip(
            figure.subplots(1, 2), SCOPES, ("FT of the whole network", "FT of a head"), strict=True
        ):
            for i, (name, label) in enumerate(names.items()):
                of = [row for row in rows if row["scope"] == scope and row["method"] == name]
                x = np.array([row["n"] or 2 * records / 3 for row in of]) * 1.03 ** (i - 2)
                y, (low, high) = (
                    np.array([row["mean"] for row in of]),
                    np.array([row["interval"] for row in of]).T,
                )
                error = 100 * np.array([y - low, high - y])
                axis.errorbar(x, 100 * y, error, fmt="o-", ms=3, capsize=2, lw=0.9, label=label)
            axis.set_xscale("log")
            axis.set_xticks([50, 100, 200, 2 * records / 3], ["50", "100", "200", "all"])
            axis.minorticks_off()
            axis.set(title=what, xlabel="records of the FT set", ylabel="mean AUROC (%)")
        figure.legend(
            *axis.get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=7
        )

    save_figure(STORED / "ecg-auroc.png", panels)


# The published procedure, written anew for this comparison: convolutions are nn.Conv1d's, views are
# made sample by sample in numpy in the loader (no workers), the warp has a pass of its network a
# view, `higher` unrolls the head, Neumann and the mixed product share one double-backward graph.
# Three passes of the published code are multiplied by 0: L_FT and L_V run the encoder a second
# time, and so does L_PT in the meta step with one view. `lean` leaves them out; it still goes
# backward into what is then thrown away, the encoder in steps of the head and φ in PT steps.


class PlainViews(torch.utils.data.Dataset):
    def __init__(self, signals: np.ndarray):
        self.signals = signals

    def __len__(self):
        return len(self.signals)

    def __getitem__(self, i):
        return tuple(torch.from_numpy(self.view(self.signals[i])) for _ in range(2))

    @staticmethod
    def view(signal):
        out = signal.copy()
        for lead in out:
            length = int(np.random.rand() * len(lead) / 2)
            start = np.random.randint(0, len(lead) - length)
            scale = np.random.rand() * 0.1 * lead.std()
            lead[start : start + length] = 0
            lead += np.random.randn(len(lead)).astype(np.float32) * scale
        return out


class Published:
    def __init__(self, domain: ecg.ECG, lean: bool):
        import higher

        self.higher, self.domain, self.settings, self.lean = higher, domain, domain.settings, lean
        torch.manual_seed(0)
        self.network, self.head, self.warp = (
            domain.network(),
            domain.head(),
            PlainWarp(domain.meta().warp),
        )
        self.network.encoder = PlainResNet18(self.network.encoder)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=self.settings.lr)
        self.head_optimizer = torch.optim.Adam(self.head.parameters(), lr=self.settings.unroll_lr)
        self.phi_optimizer = torch.optim.Adam(self.warp.parameters(), lr=self.settings.meta_lr)
        signals = domain.inputs("pretrain", torch.arange(domain.sizes["pretrain"])).cpu().numpy()
        sampler = torch.utils.data.RandomSampler(signals, replacement=True, num_samples=10**6)
        self.loader = torch.utils.data.DataLoader(
            PlainViews(signals), self.settings.batch_size, sampler=sampler
        )
        self.batches = iter(self.loader)
        self.streams = {
            part: metapt.Batches(domain.sizes[part], self.settings.unroll_batch_size)
            for part in ("finetune", "validation")
        }

    def views(self):
        views = [view.to(self.domain.device) for view in next(self.batches)]
        return [self.warp(view, self.warp.magnitudes(view)) for view in views]

    def pretrain_loss(self, views):
        a, b = (self.network.train()(view) for view in views)
        return ecg.nt_xent(a, b, self.settings.temperature)

    def finetune_loss(self, head, part):
        index = self.streams[part].next()
        inputs = self.domain.inputs(part, index)
        outputs = head(self.network.eval()(inputs, features=True))
        loss = F.binary_cross_entropy_with_logits(outputs, self.domain.targets(part, index))
        return loss if self.lean else loss + 0 * self.network(inputs).sum()

    def pretrain_step(self):
        self.optimizer.zero_grad()
        self.pretrain_loss(self.views()).backward()
        self.optimizer.step()
        self.head_step()

    def head_step(self):
        self.head_optimizer.zero_grad()
        self.finetune_loss(self.head, "finetune").backward()
        self.head_optimizer.step()

    def meta_step(self):
        parameters, alpha = list(self.network.parameters()), self.settings.lr
        with self.higher.innerloop_ctx(
            self.head, self.head_optimizer, copy_initial_weights=False
        ) as (head, steps):
            steps.step(self.finetune_loss(head, "finetune"))
            loss = self.finetune_loss(head, "validation")
            v = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        views = self.views()
        loss = self.pretrain_loss(views)
        if not self.lean:
            loss = loss + 0 * loss * self.head(self.network(views[0], features=True)).sum()
        gradient = torch.autograd.grad(loss, parameters, create_graph=True)
        product = torch.autograd.grad(gradient, parameters, grad_outputs=v, retain_graph=True)
        q = [alpha * (2 * a - alpha * h) for a, h in zip(v, product, strict=True)]
        phi = list(self.warp.parameters())
        found = torch.autograd.grad(gradient, phi, grad_outputs=[-a for a in q])
        for p, g in zip(phi, found, strict=True):
            p.grad = g
        self.phi_optimizer.step()


@app.command()
def draws(
    number: Annotated[int, typer.Option(help="Draws of batches and augmentation")] = 20,
    steps: Annotated[int, typer.Option(help="PT steps before")] = 80,
    augment: Annotated[str, typer.Option(help="What φ is: warp (the preset), or both")] = "both",
    data: DATA = Path("data"),
):
    """How far hypergradients at one θ agree from draw to draw, and what one costs: exact products,
    and differences by the length of their step.
    """
    made = make(data, 0, 0, steps=steps, augment=augment)
    training = phi_held(made).run()
    theta, phi = metapt.detached(training.network), metapt.detached(training.meta)
    ways = {"exact": metapt.Solver("identity")}
    ways |= {
        f"step {s:g}": metapt.Solver("identity", hvp="finite", step=s)
        for s in (0.005, 0.1, 0.3, 1.0)
    }

    def hypergradient(solver, at, draw):
        torch.manual_seed(draw)  # the same views for all
        return metapt.hypergradient(
            made.pretrain_loss(training.network, training.meta, at["meta"], 1.0, live=False),
            *(
                made.finetune_loss(training.network, training.head, part, at[part])
                for part in ("finetune", "validation")
            ),
            theta,
            training.psi,
            phi,
            unroll=made.settings.unroll,
            solver=solver,
            ft_state=training.ft_states[made.settings.unroll_scope],
        ).phi

    found, of_s, seconds = ({name: [] for name in ways} for _ in range(3))
    for draw in range(number):
        at = {name: training.batches[name].next() for name in ("meta", "finetune", "validation")}
        for name, solver in ways.items():
            begun = time.process_time()
            of_phi = hypergradient(solver, at, draw)
            seconds[name].append(time.process_time() - begun)
            found[name].append(torch.cat([g.flatten() for g in of_phi.values()]))
            of_s[name].append(of_phi["warp.scale"].item())
    of_exact, half, rows = torch.stack(found["exact"]), number // 2, []
    counted = {
        name: baseline.counted(lambda solver=solver: hypergradient(solver, at, 0))
        for name, solver in ways.items()
    }
    for name, each in found.items():
        each = torch.stack(each)
        first, second, mean = each[:half].mean(0), each[half:].mean(0), each.mean(0)
        in_exact = np.array(seconds[name]) / np.array(seconds["exact"])
        rows.append(
            {
                "products": name,
                "halves": F.cosine_similarity(first, second, dim=0).item(),
                "to_exact": F.cosine_similarity(mean, of_exact.mean(0), dim=0).item(),
                "to_exact_by_draw": F.cosine_similarity(each, of_exact, dim=1).tolist(),
                "s_mean": np.mean(of_s[name]),
                "s_deviation": np.std(of_s[name], ddof=1),
                "time_in_exact": np.percentile(in_exact, [50, 25, 75]).tolist(),
                **counted[name],
            }
        )
    path = STORED / f"ecg-draws{'' if augment == 'both' else '-' + augment}.json"
    save_json(path, {"draws": number, "steps": steps, "augment": augment, "rows": rows})
    cells = [
        [
            row["products"],
            f"{row['halves']:.2f}",
            f"{row['to_exact']:.2f}",
            f"{np.median(row['to_exact_by_draw']):.2f}",
            f"{row['s_mean']:.3f}, {row['s_deviation']:.3f}",
            *(f"{row[kind] / rows[0][kind]:.2f}" for kind in ("flops", "bytes")),
            "{:.2f} ({:.2f} … {:.2f})".format(*row["time_in_exact"]),
        ]
        for row in rows
    ]
    title = (
        f"Cosine of mean hypergradients over {number} draws: "
        "one half to the other, all to exact's; the median draw's to exact's; "
        "dL_V/ds; FLOPs, bytes and time in those of exact"
    )
    head = ["", "halves", "to exact", "a draw", "dL_V/ds: mean, s.d. of a draw"]
    head += ["FLOPs", "bytes", "time (quartiles)"]
    metapt.show_table(console, title, head, cells)


@app.command()
def speed(
    width: Annotated[int, typer.Option(help="Of the encoder; 32 as published")] = 8,
    batch: Annotated[
        int, typer.Option(help="Of PT, of FT and of the meta step; 256 as published")
    ] = 64,
    repeats: Annotated[int, typer.Option(help="Steps of each kind that are timed, in turn")] = 7,
    device: Annotated[
        str,
        typer.Option(
            help="cpu or cuda; both sides run there, the published one's loader on the CPU"
        ),
    ] = "cpu",
    data: DATA = Path("data"),
):
    """A PT step and a meta step, ours and as published, in turn in one run: seconds (median),
    FLOPs, bytes saved.
    """
    sizes = {
        "width": width,
        "batch_size": batch,
        "meta_batch_size": batch,
        "unroll_batch_size": batch,
        "validation_batch_size": batch,
        "warmup": 0,
    }
    domain = ecg.ECG(
        metapt.make_settings(ecg.ECG, sizes, "default"), metapt.pick_device(device), data
    )
    trainings = {
        "ours": metapt.Training(domain, learn=True),
        "published": Published(domain, False),
        "published, lean": Published(domain, True),
    }
    works = {
        (who, what): getattr(of, what)
        for who, of in trainings.items()
        for what in ("pretrain_step", "meta_step", "head_step")
        if hasattr(of, what)
    }
    taken = counting.in_turn(
        {key: lambda work=work: work() for key, work in works.items()}, repeats, domain.device
    )
    plain = np.array(taken["ours", "pretrain_step"])
    rows = []
    for key, work in works.items():
        rows.append(
            {
                "who": key[0],
                "what": key[1],
                "seconds": float(np.median(taken[key])),
                "pt_steps": [
                    float(q) for q in np.percentile(np.array(taken[key]) / plain, [50, 0, 100])
                ],
                "flops": counting.flops(lambda work=work: work()),
                "bytes": counting.peak(lambda work=work: work()),
                "bytes_and_data": counting.peak(lambda work=work: work(), data=True),
            }
        )
    of = {(row["who"], row["what"]): row for row in rows}
    for row in rows:
        first = of[row["who"], "pretrain_step"]
        row |= {f"{name}_in_own_pt_steps": row[name] / first[name] for name in KINDS}
    # A round of P = 10. Each PT step has a step of the head beside it, but for the published one
    # before the meta step.
    rounds = {
        who: 10 * of[who, "pretrain_step"]["seconds"]
        + of[who, "meta_step"]["seconds"]
        - (of[who, "head_step"]["seconds"] if who != "ours" else 0)
        for who in trainings
    }
    name = torch.cuda.get_device_name(domain.device) if domain.device.type == "cuda" else "cpu"
    result = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": name,
        **sizes,
        "rows": rows,
        "round_seconds": rounds,
        "round_ratios": {who: t / rounds["ours"] for who, t in rounds.items()},
    }
    save_json(STORED / f"ecg-speed-{width}{'' if device == 'cpu' else '-' + device}.json", result)
    cells = [
        [
            f"{row['who']}, {row['what'].replace('_', ' ')}",
            f"{row['seconds']:.3f}",
            *(f"{row[f'{name}_in_own_pt_steps']:.2f}" for name in KINDS),
        ]
        for row in rows
    ]
    head = ["", "seconds", "time / own PT step", "FLOPs / …", "bytes / …", "with data / …"]
    metapt.show_table(console, "One step", head, cells)
    ratios = ", ".join(f"{who} {ratio:.2f}" for who, ratio in result["round_ratios"].items())
    console.print(f"a round of 10 PT steps and a meta step, relative to ours: {ratios}")


if __name__ == "__main__":
    app()
