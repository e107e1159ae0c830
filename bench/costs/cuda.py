"""All that a GPU is wanted for, in parts of at most eight minutes and 24 in all.

    python -m bench.costs.cuda
        every part, each in a process of its own: bench/results/cuda/cuda-PART.json
    python -m bench.costs.cuda --part ecg
        one of them: tests, agree, ecg, ppi, profile, scaling, ranks, compile
    python -m bench.costs.cuda --report
        what was found, as a table

A part writes what it has after each row, and what went wrong in a row; another part goes on all the
same. Real records and graphs are taken where --data has them, made-up ones of the published sizes
elsewhere.
"""

import contextlib
import functools
import hashlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Annotated
from unittest import mock

import rich.console
import torch
import torch.nn.functional as F
import typer

import metapt
from bench.costs import counting, made_up, scaling
from bench.stored import RESULTS, ROOT, save_json

# 24 minutes together
SECONDS = {
    "tests": 240,
    "agree": 180,
    "ecg": 360,
    "ppi": 180,
    "profile": 120,
    "scaling": 120,
    "ranks": 60,
    "compile": 180,
}
WAYS = {"float32": {}, "bf16": {"precision": "bf16"}}
PUBLISHED_ECG = {
    "width": 32,
    **dict.fromkeys(
        ("batch_size", "meta_batch_size", "unroll_batch_size", "validation_batch_size"), 256
    ),
}
TINY = {
    "ecg": {
        "width": 2,
        **dict.fromkeys(
            ("batch_size", "meta_batch_size", "unroll_batch_size", "validation_batch_size"), 8
        ),
    },
    "ppi": {
        "width": 8,
        "layers": 2,
        "batch_size": 8,
        "meta_batch_size": 8,
        "unroll_batch_size": 8,
        "validation_batch_size": 8,
    },
}
console = rich.console.Console()


class Bench:
    """Where a part runs and writes; `small`: sizes of a second's work, to see that it runs to its
    end.
    """

    def __init__(self, device: torch.device, small: bool, data: Path, out: Path, part: str):
        self.device, self.small, self.data, self.path, self.rows = (
            device,
            small,
            data,
            out / f"cuda-{part}.json",
            [],
        )
        self.cuda = device.type == "cuda"
        name = torch.cuda.get_device_name(device) if self.cuda else "cpu"
        self.facts = {"device": name, "small": small, "torch": torch.__version__, "part": part}

    def note(self, what: str, work) -> None:
        """A row of what `work()` gives, or of how it failed."""
        begun = time.perf_counter()
        try:
            row = work()
        except Exception as error:
            traceback.print_exc()
            row = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        self.rows.append({"what": what, **row, "took": time.perf_counter() - begun})
        console.print(self.rows[-1])
        save_json(self.path, {**self.facts, "rows": self.rows})

    def domain(self, name: str, device: torch.device | None = None, **given) -> metapt.Domain:
        kind = metapt.find_domain(name)
        given = {"warmup": 0, **given, **(TINY.get(name, {}) if self.small else {})}
        return kind(kind.Settings(**given), device or self.device, self.folder(name))

    def folder(self, name: str) -> Path:
        """Where the data of a domain lie; they are made up where there are none."""
        kind = name.partition("-")[0]
        place = "ud" if kind == "sources" else kind
        if kind == "digits" or list((self.data / place).glob("*/about.json")):
            return self.data
        # None that was made otherwise
        how = hashlib.sha256(Path(made_up.__file__).read_bytes()).hexdigest()[:8]
        folder = (
            Path(tempfile.gettempdir()) / f"metapt-made-up-{how}{'-small' if self.small else ''}"
        )
        if not list((folder / place).glob("*/about.json")):
            sizes = {
                "ecg": {"records": 60 if self.small else 4000},
                "ppi": {} if self.small else {"graphs": 8000, "tasks": 5040},
            }
            getattr(made_up, kind)(folder, **sizes.get(kind, {}))
        return folder


def training_of(domain: metapt.Domain) -> metapt.Training:
    torch.manual_seed(0)
    training = metapt.Training(domain, learn=True)
    domain.begin_episode(training.meta)
    return training


# The parts


def tests(bench: Bench) -> None:
    def work():
        where = ["bench/tests/test_ecg.py"] if bench.small else ["tests", "bench/tests"]
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            "cuda",
            "--continue-on-collection-errors",
            *where,
        ]
        done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
        return {
            "status": done.returncode,
            "summary": done.stdout.splitlines()[-1:],
            "failed": [
                line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))
            ],
        }

    bench.note("pytest -m cuda", work)


@contextlib.contextmanager
def same_draws():
    """Random numbers come from the CPU's generator whatever the device, so that both see the same.
    Patched, as a mode of torch's is off where `checkpoint` runs a forward pass again within a
    backward one.
    """
    real = {"rand": torch.rand, "randn": torch.randn}

    def drawn(name, *size, device=None, **options):
        if options.get("generator") is not None:
            return real[name](*size, device=device, **options)
        return real[name](*size, **options).to(device or "cpu")

    def drawn_like(make, x, **options):
        return make(*x.shape, dtype=x.dtype).to(x.device)

    def dropout(x, p=0.5, training=True, inplace=False):
        return x * (real["rand"](*x.shape) >= p).to(x.device) / (1 - p) if training else x

    with contextlib.ExitStack() as patched:
        for name, make in real.items():
            like = functools.partial(drawn_like, make)
            patched.enter_context(mock.patch.object(torch, name, functools.partial(drawn, name)))
            patched.enter_context(mock.patch.object(torch, f"{name}_like", like))
        patched.enter_context(mock.patch.object(F, "dropout", dropout))
        yield


def agree(bench: Bench) -> None:
    """Hypergradients of every domain, CPU against the device: cosine, and relative error of the
    whole vector.
    """
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    for name in metapt.DOMAINS:
        for hvp in ("exact", "finite"):
            given = {
                "hvp": hvp,
                "hvp_step": 0.1 if hvp == "finite" else None,
                "solver": "identity",
                "damping": 0.0,
            }

            def work(name=name, given=given):
                trainings = [
                    training_of(bench.domain(name, device, **given))
                    for device in (torch.device("cpu"), bench.device)
                ]
                first, found, value = trainings[0], [], []
                at = {part: batches.next() for part, batches in first.batches.items()}
                for training in trainings:
                    training.network.load_state_dict(first.network.state_dict())
                    training.meta.load_state_dict(first.meta.state_dict())
                    domain, to = training.domain, training.domain.device
                    with same_draws():
                        torch.manual_seed(1)
                        result = metapt.hypergradient(
                            domain.pretrain_loss(
                                training.network, training.meta, at["meta"], 1.0, live=False
                            ),
                            *(
                                domain.finetune_loss(
                                    training.network, training.head, part, at[part]
                                )
                                for part in ("finetune", "validation")
                            ),
                            metapt.detached(training.network),
                            {k: t.to(to) for k, t in first.psi.items()},
                            metapt.detached(training.meta),
                            unroll=domain.settings.unroll,
                            solver=domain.settings.inverse,
                        )
                    found.append(
                        torch.cat([g.flatten().double().cpu() for g in result.phi.values()])
                    )
                    value.append(result.value.item())
                return {
                    "cosine": F.cosine_similarity(*found, dim=0).item(),
                    "values": value,
                    "relative_error": ((found[1] - found[0]).norm() / found[0].norm()).item(),
                }

            bench.note(f"{name}, {hvp}", work)


def rounds(bench: Bench, name: str, given: dict, published: dict, repeats: int) -> None:
    """PT step, meta step and round of P = 10, by way and as published, in seconds and in ours in
    float32.
    """
    plain = {}

    def measured(what, make):
        def work():
            training = make()
            steps = {
                "pt_step": lambda: training.pretrain_step(),
                "meta_step": lambda: training.meta_step(),
            }
            steps["round"] = lambda: ([steps["pt_step"]() for _ in range(10)], steps["meta_step"]())
            begun = time.perf_counter()
            steps["round"]()  # warms up
            first, bytes_of = time.perf_counter() - begun, {}
            taken = counting.in_turn(steps, repeats, bench.device)
            for step in ("pt_step", "meta_step") if bench.cuda else ():
                torch.cuda.reset_peak_memory_stats()
                steps[step]()
                bytes_of[f"{step}_peak_bytes"] = torch.cuda.max_memory_allocated()
            seconds = {f"{step}_seconds": statistics.median(each) for step, each in taken.items()}
            plain.setdefault("round", seconds["round_seconds"])
            return {
                **seconds,
                "round_to_first": seconds["round_seconds"] / plain["round"],
                "first_round_seconds": first,
                **bytes_of,
            }

        bench.note(f"{name}, {what}", work)

    for way, options in WAYS.items():
        measured(
            f"here, {way}",
            lambda options=options: training_of(bench.domain(name, **{**given, **options})),
        )
    for what, make in published.items():
        measured(what, make)


def ecg(bench: Bench) -> None:
    def published(lean):
        from bench.studies.electrocardiograms import Published

        return Published(bench.domain("ecg", **PUBLISHED_ECG), lean)

    others = {"published": lambda: published(False), "published, lean": lambda: published(True)}
    rounds(bench, "ecg", PUBLISHED_ECG, others, 1 if bench.small else 3)


def ppi(bench: Bench) -> None:
    from bench.domains.ppi import PPI
    from bench.studies.proteins import PRESET, generate

    paper = {**PPI.presets["paper"], "steps": 100, "warmup": 0}

    def published():
        from bench.costs.plain_gin import PlainGIN, PlainPPI

        made = bench.domain("ppi", **paper)
        graphs, tasks = len(made.graphs.sizes), made.graphs.tasks
        return training_of(PlainPPI(made, generate(graphs, tasks, graphs), PlainGIN))

    rounds(bench, "ppi", {**paper, **PRESET}, {"published": published}, 1 if bench.small else 5)


def profile(bench: Bench) -> None:
    """Of each domain's PT and meta step: waits and synchronous copies, kernels and their time,
    seconds, peak memory.
    """
    kinds = [torch.profiler.ProfilerActivity.CPU] + [
        torch.profiler.ProfilerActivity.CUDA
    ] * bench.cuda
    waiting = {
        "cudaStreamSynchronize",
        "cudaDeviceSynchronize",
        "cudaEventSynchronize",
        "aten::_local_scalar_dense",
    }
    for name in metapt.DOMAINS:
        training = None
        for step in ("pretrain_step", "meta_step"):

            def work(name=name, step=step):
                nonlocal training
                given = {} if name not in ("ecg",) else PUBLISHED_ECG
                training = training or training_of(bench.domain(name, **given))
                getattr(training, step)()
                getattr(training, step)()
                seconds = counting.in_turn(
                    {step: lambda: getattr(training, step)()}, 3, bench.device
                )[step]
                if bench.cuda:
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                with torch.profiler.profile(activities=kinds) as profiled:
                    getattr(training, step)()
                # The profiler waits itself when it ends, once or twice: not the step's.
                events = profiled.events()
                # Annotations, such as an optimiser's step, span kernels that are there themselves.
                kernels = [
                    event
                    for event in events
                    if event.device_type == torch.autograd.DeviceType.CUDA
                    and not getattr(event, "is_user_annotation", False)
                ]
                counts = {
                    key: sum(event.name == key for event in events) for key in sorted(waiting)
                }
                return {
                    "seconds": statistics.median(seconds),
                    **counts,
                    "kernels": len(kernels),
                    "kernel_seconds": sum(event.device_time for event in kernels) / 1e6,
                    "peak_bytes": torch.cuda.max_memory_allocated() if bench.cuda else None,
                }

            bench.note(f"{name}, {step.replace('_', ' ')}", work)


def scale(bench: Bench) -> None:
    """One meta step beside one PT step, up to 10^8 parameters: the sweep of `bench.costs.scaling`,
    the largest last.
    """
    sizes = (
        [scaling.Size(width=w) for w in (64,)]
        if bench.small
        else [*scaling.SWEEPS["PT parameters"][::3], *scaling.HUGE["PT parameters"]]
    )
    for size in sizes:
        for hvp in ("exact", "finite"):
            bench.note(
                f"width {size.width}, {hvp}",
                lambda size=size, hvp=hvp: scaling.measure(
                    size._replace(hvp=hvp), bench.device.type
                ),
            )


def ranks(bench: Bench) -> None:
    """Numbers and seconds of `meta` by as many ranks as there are GPUs, beside one process.

    Nothing is drawn within the losses, so that the numbers should be the same up to rounding. One
    GPU has one rank, which sums over itself: NCCL is then known to be there, and no more.
    """
    steps = 20 if bench.small else 400
    count = torch.cuda.device_count() if bench.cuda else 2
    settings = {"steps": steps, "warmup": 0, "compare": 0, "dropout": 0.0, "phi_dropout": 0.0}
    words = ["meta", "digits-noise", "--device", bench.device.type]
    words += [f"{metapt.flag(name)}={value}" for name, value in settings.items()]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    programs = {"one process": ["metapt.py"], f"{count} ranks": [*torchrun, "-m", "bench.ranks"]}
    first_phi = None

    def work(program):
        nonlocal first_phi
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            command = [sys.executable, *program, *words, "--out", str(out)]
            done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(done.stderr.strip().splitlines()[-1])
            summary = json.loads((out / "summary.json").read_text())
            learned = torch.load(out / "phi.pt", map_location="cpu", weights_only=True)
        phi = torch.cat([t.flatten().double() for t in learned.values()])
        if first_phi is None:
            first_phi = phi
        return {
            "seconds": summary["training_seconds"],
            "phi_norm": phi.norm().item(),
            "relative_difference": ((phi - first_phi).norm() / first_phi.norm()).item(),
        }

    for what, program in programs.items():
        bench.note(f"digits-noise, {what}", lambda program=program: work(program))


def compiled(bench: Bench) -> None:
    """PT and meta steps with torch.compile and without: `bench.studies.compile`."""
    from bench.studies import compile as study

    sizes = {"digits-rotation": {}, "ppi": {}, "ecg": PUBLISHED_ECG}
    repeats = 1 if bench.small else 20
    # On a CPU compiling alone takes minutes.
    names = ["digits-rotation"] if bench.small else sizes
    for name in names:
        given = {**sizes[name], **study.SETTINGS}
        bench.note(
            name,
            lambda name=name, given=given: study.measured(bench.domain(name, **given), repeats),
        )


PARTS = {
    "tests": tests,
    "agree": agree,
    "ecg": ecg,
    "ppi": ppi,
    "profile": profile,
    "scaling": scale,
    "ranks": ranks,
    "compile": compiled,
}


def table(out: Path) -> str:
    """What was found, in Markdown."""
    lines = []
    for part in PARTS:
        path = out / f"cuda-{part}.json"
        if not path.exists():
            continue
        found = json.loads(path.read_text())
        columns = [
            c
            for c in dict.fromkeys(key for row in found["rows"] for key in row)
            if c not in ("what", "took")
        ]
        lines += [
            "",
            f"{part} ({found['device']}, torch {found['torch']})",
            "",
            "| " + " | ".join(["", *columns]) + " |",
            "| --- " * (len(columns) + 1) + "|",
        ]
        for row in found["rows"]:
            cells = [
                f"{v:.4g}" if isinstance(v := row.get(c, ""), float) else str(v) for c in columns
            ]
            lines.append("| " + " | ".join([row["what"], *cells]) + " |")
    return "\n".join(lines)


def main(
    part: Annotated[str, typer.Option(help=f"{', '.join(PARTS)}; else all of them")] = "",
    device: Annotated[str, typer.Option(help="cuda, or cpu to see that it runs")] = "cuda",
    small: Annotated[bool, typer.Option("--small", help="Sizes of a second's work")] = False,
    report: Annotated[
        bool, typer.Option("--report", help="The table of what was found, and nothing else")
    ] = False,
    out: Annotated[Path, typer.Option(help="Where results go")] = RESULTS / "cuda",
    data: Annotated[Path, typer.Option(help="Where prepared data lie")] = Path("data"),
):
    if report:
        return print(table(out))
    if part and part not in PARTS:
        raise SystemExit(
            f"bench.costs.cuda: --part is {part!r}, expected one of {', '.join(PARTS)}"
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "bench.costs.cuda: there is no GPU here (--device cpu --small shows that it runs)"
        )
    out.mkdir(parents=True, exist_ok=True)
    if part:
        return PARTS[part](Bench(metapt.pick_device(device), small, data, out, part))
    options = [
        "--device",
        device,
        "--out",
        str(out.resolve()),
        "--data",
        str(data.resolve()),
        *["--small"] * small,
    ]
    for name, seconds in SECONDS.items():
        command = [sys.executable, "-m", "bench.costs.cuda", "--part", name, *options]
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        try:
            status = process.wait(seconds)
            console.print(f"{name}: {'done' if status == 0 else f'status {status}'}")
        except subprocess.TimeoutExpired:
            # With what it has started, which would slow the next down
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            console.print(f"{name}: stopped after {seconds} s; the rows until then are kept")
    print(table(out))


if __name__ == "__main__":
    typer.run(main)
