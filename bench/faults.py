"""Every file that the program reads, spoilt at random: it is refused in one line, or it makes no
difference.

    python -m bench.faults --cases 1000 --seed 0
        a table by kind of file and outcome
    python -m bench.faults --only 17 --seed 0
        one case again: what was done, and what was said

Bytes flipped, put in, zeroed, cut off; in text also words and lines; in JSON also keys removed and
values of another type. With right sums: one value of what a file holds is altered, and the file
written as the program itself would; what its types and torch let pass is believed. A case is a
command in a forked process. The exit status is 1 where a traceback came up, anything but the one
line was said, or other numbers came out of a file whose content is promised to be checked (* in the
table).
"""

import collections
import contextlib
import hashlib
import importlib
import io
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import rich.console
import torch
import typer

import metapt
from bench.stored import ROOT, save_figure

sys.path.append(str(ROOT / "tests"))

import datasets
import tools

from data_scripts import files, hu_graphs, mnist, ptbxl, string_graphs, ud

PROGRAMS = {
    "metapt": metapt.main,
    "hu_graphs": lambda: files.run(hu_graphs.hu_graphs),
    "mnist": lambda: files.run(mnist.mnist),
    "ptbxl": lambda: files.run(ptbxl.ptbxl),
    "string_graphs": lambda: files.run(string_graphs.string_graphs),
    "ud": lambda: files.run(ud.ud),
}
SMALL = (
    "--warmup=0 --batch-size=8 --meta-batch-size=8 --unroll-batch-size=8 "
    "--validation-batch-size=8 --compare=0"
)
START = (
    "metapt meta digits-noise --steps=12 --warmup=4 --meta-every=2 "
    "--batch-size=32 --meta-batch-size=32 --compare=0 --out=run"
)
RESUME = "metapt meta --resume=run"
ECG = f"metapt meta ecg --test-folds=1 --steps=1 --out=run --width=1 {SMALL}"
PPI = f"metapt meta ppi --steps=2 --out=run --width=1 {SMALL}"
SOURCES = (
    "metapt meta sources --target=Alpha-One --target-sentences=20 --validation-sentences=10 "
    f"--buckets=64 --width=6 --steps=2 --meta-every=1 --out=run {SMALL}"
)
MEASURE = "--compare=1 --measure-steps=2 --out=run2"
MNIST = f"metapt meta mnist-noise --steps=2 --meta-every=1 --out=run {SMALL}"
OF_RUNS = (
    RESUME,
    f"metapt finetune run --sizes=30 {MEASURE}",
    f"metapt eval run --sizes=30 {MEASURE}",
    "metapt pretrain digits-noise --phi=run --steps=2 --compare=0 --out=run2",
)
PTBXL = ("ptbxl --from ptbxl --data out", "ptbxl --from ptbxl --data out --strict")


def with_bytes(folder: Path, path: Path, draw: random.Random) -> None:
    """Spoils the bytes of a file."""
    content = spoil(path.read_bytes(), path.name, draw)
    path.unlink()  # it may be a link: `copied`
    path.write_bytes(content)


def with_ptbxl_sums(folder: Path, path: Path, draw: random.Random) -> None:
    with_bytes(folder, path, draw)
    datasets.write_sums(folder / "ptbxl")


def with_right_sum(folder: Path, path: Path, draw: random.Random) -> None:
    """Alters one value of config.json, or of the checkpoint."""
    change = {"config": alter, "checkpoint": alter_checkpoint}[path.stem]
    try:
        tools.rewrite(path.parent, **{path.stem: lambda content: change(content, draw)})
    except RecursionError:  # nested too deeply to be written
        with_right_sum(folder, path, draw)


class Kind(NamedTuple):
    pattern: str  # of the files
    commands: tuple[str, ...]  # that read them
    promised: bool = False  # no change of the content may go unnoticed
    spoil: Callable[[Path, Path, random.Random], None] = with_bytes


KINDS = {
    "config.json": Kind("run/config.json", OF_RUNS),
    "config.json, one value": Kind("run/config.json", OF_RUNS, False, with_right_sum),
    "checkpoint": Kind("run/checkpoint.pt", OF_RUNS, True),
    "checkpoint, right sum": Kind("run/checkpoint.pt", OF_RUNS, False, with_right_sum),
    "metrics": Kind("run/metrics.jsonl", (RESUME,)),
    "summary.json": Kind("run/summary.json", (OF_RUNS[-1],)),
    "images": Kind("data/mnist/prepared/*", (MNIST,)),
    "graphs": Kind("data/ppi/published/*", (PPI,)),
    "ECGs": Kind("data/ecg/prepared/*", (ECG,)),
    "sentences": Kind("data/ud/prepared/*", (SOURCES,)),
    "images, --check": Kind("data/mnist/prepared/*.npy", ("mnist --check",), True),
    "graphs, --check": Kind("data/ppi/published/*.npy", ("hu_graphs --check",), True),
    "ECGs, --check": Kind("data/ecg/prepared/*.npy", ("ptbxl --check",), True),
    "sentences, --check": Kind("data/ud/prepared/*.npy", ("ud --check",), True),
    "STRING and GO": Kind("string/*.txt", ("string_graphs --from string --data out",)),
    "PTB-XL": Kind("ptbxl/**/*.*", PTBXL),
    "PTB-XL, right sums": Kind("ptbxl/**/[ps0]*.*", PTBXL, False, with_ptbxl_sums),
    "treebanks": Kind("treebanks/**/*.*", ("ud --from treebanks --data out",)),
    "published graphs": Kind(
        "source/published.pt", ("hu_graphs --from source/published.pt --data out",)
    ),
}
# What of a checkpoint with a right sum is looked at when it is loaded: by `Run`, and by torch,
# which knows names and shapes.
CHECKED = (
    ("format",),
    ("step",),
    ("phi",),
    ("training", "meta"),
    ("training", "network"),
)
OUTCOMES = REFUSED, SAME, OTHER, WRONG, WORDY, TRACEBACK, ENDLESS = (
    "refused in one line",
    "identical numbers",
    "other numbers",
    "unnoticed",
    "other words",
    "traceback",
    "no end",
)
BAD = (WRONG, WORDY, TRACEBACK, ENDLESS)
MOST = 8 << 30  # bytes of address space that a case may have
NAN, DEEP = float("nan"), json.loads("[" * 500 + "]" * 500)
ODD = [
    None,
    True,
    -1,
    0,
    3,
    10**6,
    2**63,
    10**400,
    0.5,
    -7.0,
    1e300,
    NAN,
    1e999,
    "",
    "x",
    "5",
    "\0",
    "\ud800",
    [],
    {},
    DEEP,
]
WORDS = ["", "nan", "inf", "-1", "0", "2", "1e300", "1e-30", "x", "None", "'", "[", "\0", "é"]
WORDS += ["3.5", "9" * 20, "9" * 5000]


TENSORS = [
    torch.zeros_like,
    torch.ones_like,
    torch.neg,
    lambda t: t + 1,
    lambda t: t * 1000,
    lambda t: t.roll(1),
    lambda t: t * NAN,
    lambda t: t / 0,
    torch.Tensor.double,
    torch.Tensor.half,
    torch.Tensor.bool,
    lambda t: t[None],
    lambda t: t.flatten()[1:],
    torch.Tensor.to_sparse,
    lambda t: t.to("meta"),
    lambda t: torch.zeros(()).expand(t.shape),
    lambda t: torch.nn.Parameter(t.float()),
    lambda t: t.tolist(),
    lambda t: None,
    lambda t: {"weight": t},
    lambda t: torch.zeros(0),
]


def spoil(content: bytes, name: str, draw: random.Random) -> bytes:
    """Something else in its place, in one of the ways that its kind of file allows."""
    ways = ["flip", "put", "zero", "cut", "drop", "twice", "rubbish"] + ["json"] * 7 * (
        "json" in name
    )
    ways += [b" ", b",", b"\n", b"\n"] * 2 * name.endswith((".txt", ".csv", ".hea", ".jsonl"))
    way, begin, length = (
        draw.choice(ways),
        draw.randrange(len(content)),
        draw.choice((1, 2, 8, 512, len(content))),
    )
    piece, rest = content[begin : begin + length], content[begin + length :]
    if way == "flip":
        return (
            content[:begin]
            + bytes([content[begin] ^ 1 << draw.randrange(8)])
            + content[begin + 1 :]
        )
    if way == "json":
        lines = content.splitlines() if name.endswith("l") else [content]
        number = draw.randrange(len(lines))
        lines[number] = json.dumps(alter(json.loads(lines[number]), draw)).encode()
        return b"".join(line + b"\n" for line in lines)
    if isinstance(way, bytes):  # what stands between two of it
        pieces = content.split(way)
        number = draw.randrange(len(pieces))
        pieces[number : number + 1] = draw.choice(
            ([], pieces[number : number + 1] * 2, [draw.choice(WORDS).encode()])
        )
        return way.join(pieces)
    if way in ("cut", "rubbish"):
        return content[:begin] if way == "cut" else draw.randbytes(draw.randrange(2000))
    ours = {
        "put": draw.randbytes(length),
        "zero": bytes(len(piece)),
        "drop": b"",
        "twice": piece * 2,
    }
    return content[:begin] + ours[way] + rest


def alter(content, draw: random.Random):
    """The same with one value of another type, one key away, or one more, at some depth."""
    if isinstance(content, torch.Tensor):
        return draw.choice(TENSORS)(content)
    if not isinstance(content, dict | list | tuple) or not content or draw.random() < 0.1:
        return draw.choice((*ODD, -content if isinstance(content, int | float) else "/"))
    changed = dict(content) if isinstance(content, dict) else list(content)
    key = draw.choice(list(content) if isinstance(content, dict) else range(len(content)))
    way = draw.random()
    if way < 0.15:
        del changed[key]
    elif way < 0.25 and isinstance(content, dict):
        changed[draw.choice(WORDS)] = content[key]
    else:
        changed[key] = alter(content[key], draw)
    return tuple(changed) if isinstance(content, tuple) else changed


def alter_checkpoint(content: dict, draw: random.Random) -> dict:
    """A checkpoint with one key away, or one of the values altered that are looked at."""
    if draw.random() < 0.2:
        holder = draw.choice((content, content["training"]))
        del holder[draw.choice(list(holder))]
        return content
    *parents, key = draw.choice(CHECKED)
    holder = content
    for name in parents:
        holder = holder[name]
    holder[key] = alter(holder[key], draw)
    return content


def ended(folder: Path, command: str) -> tuple[int, str]:
    """Exit status, or −signal, and standard error of a command in a process of its own."""
    with tempfile.TemporaryFile("w+") as said:
        if not (child := os.fork()):
            status = 70
            with contextlib.suppress(BaseException):
                os.chdir(folder)
                sys.stdout = io.StringIO()
                sys.stderr = said
                sys.argv = command.split()
                warnings.simplefilter("ignore")  # of a solver, not of a file
                # Of its own time, however busy the machine is
                signal.setitimer(signal.ITIMER_PROF, 100)
                # So that no other process pays for it
                resource.setrlimit(resource.RLIMIT_AS, (MOST, MOST))
                try:
                    PROGRAMS[sys.argv[0]]()
                except SystemExit as left:
                    status = left.code or 0 if isinstance(left.code, int | None) else 70
                except BaseException:
                    traceback.print_exc()
                said.flush()
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        return status, said.read()


def numbers(folder: Path, kind: Kind) -> str:
    """Of what a command left: summaries without their clocks, and prepared data."""
    found = sorted(set(folder.glob("**/run*/summary.json")) - set(folder.glob(kind.pattern)))
    summaries = [json.loads(path.read_text()) for path in found]
    found = [
        [
            (name, value)
            for name, value in summary.items()
            if "seconds" not in name and name != "domain"
        ]
        for summary in summaries
    ]
    found += [
        hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob("out/**/*.npy"))
    ]
    return json.dumps(found)


def prepare(home: Path) -> dict[str, str]:
    """All files that there are to spoil, in miniature, into a folder; the numbers that they lead
    to, by command.
    """
    datasets.write_graphs(home / "data" / "ppi" / "published", 40)
    ptbxl.prepare(datasets.write_ptbxl(home / "ptbxl", 10), home / "data" / "ecg" / "prepared")
    datasets.write_string(home / "string")
    (home / "source").mkdir()
    datasets.write_published(
        home / "source" / "published.pt", datasets.generated(graphs=30), new=True
    )
    ud.prepare(datasets.write_treebanks(home / "treebanks"), home / "data" / "ud" / "prepared")
    datasets.write_mnist(home / "data" / "mnist" / "prepared", np.arange(60_000) % 10)
    metapt.CHECKPOINT_EVERY = 2
    # What imports much is imported here, so that no fork needs to.
    for name in ("scipy.stats", "sklearn.datasets", "sklearn.model_selection"):
        importlib.import_module(name)
    save_figure(home / "figure.png", lambda figure: figure.subplots().plot([1, 2]))
    metapt.find_domain("ppi")
    metapt.find_domain("ecg")
    metapt.find_domain("sources")
    assert ended(home, START) == (0, ""), START
    take_back(home / "run", to=metapt.CHECKPOINT_EVERY)
    clean = {}
    for kind in KINDS.values():
        for command in set(kind.commands) - set(clean):
            with tempfile.TemporaryDirectory() as folder:
                copied(home, kind, Path(folder))
                assert ended(Path(folder), command) == (0, ""), command
                clean[command] = numbers(Path(folder), kind)
    return clean


def take_back(run: Path, to: int) -> None:
    """The checkpoint after so many rounds in place of the last, so that there are steps left."""

    class Enough(Exception):
        pass

    def keep(training):
        metapt.Run(run).save_checkpoint(training)
        raise Enough

    config = json.loads((run / "config.json").read_text())
    kind = metapt.find_domain(config["domain"])
    domain = kind(kind.Settings(**config["settings"]), torch.device("cpu"), Path("data"))
    metapt.CHECKPOINT_EVERY = to
    with contextlib.suppress(Enough):
        metapt.Training(domain, learn=True).run(on_checkpoint=keep)


def copied(home: Path, kind: Kind, folder: Path) -> None:
    part = (
        kind.pattern.rpartition("/*")[0]
        if kind.pattern.startswith("data")
        else kind.pattern.partition("/")[0]
    )
    # Prepared data are large, and nothing writes into them.
    shutil.copytree(
        home / part,
        folder / part,
        copy_function=os.link if part.startswith("data") else shutil.copy2,
    )
    for left in folder.glob("**/run/summary.json"):  # of the end, which there is none of yet
        if kind.pattern != "run/summary.json":
            left.unlink()


def outcome_of(home: Path, clean: dict, name: str, draw: random.Random) -> tuple[str, str]:
    """Of one case; and what was done and said."""
    kind, command = KINDS[name], draw.choice(KINDS[name].commands)
    path = draw.choice(
        sorted(path for path in home.glob(kind.pattern) if path.is_file())
    ).relative_to(home)
    with tempfile.TemporaryDirectory() as folder:
        copied(home, kind, folder := Path(folder))
        whole = (folder / path).read_bytes()
        kind.spoil(folder, folder / path, draw)
        content = (folder / path).read_bytes()
        status, said = ended(folder, command)
        done = f"{path}: {command}: {status}\n{said}"
        if status not in (0, 1, 2) or "Traceback" in said:
            return ENDLESS if status == -signal.SIGPROF else TRACEBACK, done
        if said.count("\n") != (status > 0) or not said.startswith(
            f"{command.split()[0]}: " * (status > 0)
        ):
            return WORDY, done
        same = content == whole if "--check" in command else numbers(folder, kind) == clean[command]
        if status:
            return REFUSED, done
        if same:
            return SAME, done
        return WRONG if kind.promised else OTHER, done


def main(cases: int = 1000, seed: int = 0, only: int | None = None, minutes: float = math.inf):
    """Spoils files at random, and prints a table of what came of it; after so many minutes, of what
    there is by then.
    """
    torch.set_num_threads(1)
    table, end = collections.Counter(), time.monotonic() + 60 * minutes
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # with the table
    try:
        with tempfile.TemporaryDirectory() as home, contextlib.redirect_stdout(sys.stderr):
            clean = prepare(home := Path(home))
            for number in range(cases) if only is None else [only]:
                if time.monotonic() > end:
                    break
                name = list(KINDS)[number % len(KINDS)]
                outcome, done = outcome_of(home, clean, name, random.Random(f"{seed} {number}"))
                table[name, outcome] += 1
                if outcome in BAD or only is not None:
                    print(f"case {number}: {outcome}: {done[-3000:]}\n", flush=True)
    finally:
        rows = [
            [name + " *" * kind.promised, *(str(table[name, o]) for o in OUTCOMES)]
            for name, kind in KINDS.items()
        ]
        rows.append(["all", *(str(sum(table[name, o] for name in KINDS)) for o in OUTCOMES)])
        title = f"{table.total()} cases, seed {seed}"
        metapt.show_table(rich.console.Console(width=150), title, ["", *OUTCOMES], rows)
    sys.exit(any(outcome in BAD for _, outcome in table))


if __name__ == "__main__":
    typer.run(main)
