"""What the tests share: commands run from a test, what runs leave behind, a domain in miniature."""

import contextlib
import functools
import hashlib
import inspect
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import metapt

ROOT = Path(metapt.__file__).resolve().parent
# Real data, where there are any.
SHARED = ROOT.parent / "shared" / "data"
# Settings of runs that are over in a second.
TINY = {
    "digits-rotation": {
        "steps": 60,
        "warmup": 12,
        "meta_every": 4,
        "compare": 1,
        "measure_steps": 8,
        "sizes": "30,60",
        "meta_batch_size": 64,
    },
    "digits-noise": {
        "steps": 41,
        "warmup": 10,
        "meta_every": 4,
        "compare": 1,
        "measure_steps": 8,
        "sizes": "30,60",
        "terms": 2,
        "damping": 1.0,
        "meta_batch_size": 64,
        "average": 0.5,
    },
}


# ------------------------------------------------------------------------------------------------
# Commands


def options(given: dict) -> list[str]:
    """A dict of settings as command-line arguments."""
    words = []
    for name, value in given.items():
        if value is True:
            words.append(metapt.flag(name))
        elif value is False:
            words.append(metapt.flag(f"no_{name}"))
        else:
            words.append(f"{metapt.flag(name)}={value}")
    return words


def metapt_in(
    folder: Path, *arguments, code: str | None = None, **environment
) -> subprocess.CompletedProcess:
    """metapt.py in a process of its own; with `code`, that Python code in its place."""
    program = [metapt.__file__] if code is None else ["-c", code]
    return subprocess.run(
        [sys.executable, *program, *map(str, arguments)],
        check=False,
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        timeout=300,
    )


# metapt in a process that kills itself before or after it replaces a file for the n-th time: its
# first two arguments are n and "before" or "after". A checkpoint follows every episode.
KILLED = """
import os, signal, sys
import metapt

metapt.CHECKPOINT_EVERY = 1
real = os.replace
count = 0
last = int(sys.argv.pop(1))
after = sys.argv.pop(1) == "after"

def replace(*names):
    global count
    count += 1
    if count == last and not after:
        os.kill(os.getpid(), signal.SIGKILL)
    real(*names)
    if count == last and after:
        os.kill(os.getpid(), signal.SIGKILL)

os.replace = replace
metapt.main()
"""


def main_in(folder: Path, *arguments) -> tuple[int, str, str]:
    """Like `metapt_in`, in this process, which saves the imports.

    Returns:
        The exit status, standard output and standard error.
    """
    out = io.StringIO()
    err = io.StringIO()
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch("sys.argv", ["metapt.py", *map(str, arguments)]),
        pytest.raises(SystemExit) as ended,
    ):
        metapt.main()
    return ended.value.code, out.getvalue(), err.getvalue()


def summary_of(folder: Path, *arguments) -> dict:
    """Runs a command with --json, which must succeed and print one JSON object and no more."""
    code, out, err = main_in(folder, *arguments, "--json")
    assert code == 0, err
    return strict_json(out)


def refused(folder: Path, *arguments) -> str:
    """Runs a command that must end with status 2 and one line on standard error: that line."""
    code, out, err = main_in(folder, *arguments)
    assert (code, out) == (2, ""), err
    assert err.startswith("metapt: ")
    assert len(err) > len("metapt: \n")
    assert err.count("\n") == 1, err
    return err.strip()


def strict_json(text: str):
    """What a text of JSON holds. NaN and Infinity are no JSON."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


# ------------------------------------------------------------------------------------------------
# What runs leave behind


def outcome(folder: Path) -> tuple[dict, str, bytes]:
    """What must be the same for the same run.

    Returns:
        The summary without its clocks, the metrics, and φ by name where there is such a table.
    """
    summary = strict_json((folder / "summary.json").read_text())
    for clock in ("seconds", "training_seconds"):
        summary.pop(clock, None)
    table = folder / "phi.csv"
    by_name = table.read_bytes() if table.exists() else b""
    return summary, (folder / "metrics.jsonl").read_text(), by_name


def unchanged(content):
    """In place of a change, for `rewrite`."""
    return content


def rewrite(run: Path, config=unchanged, checkpoint=unchanged) -> None:
    """Changes what a run's config.json and checkpoint.pt hold, as if the program had written it.

    Each change takes the content; it returns another one, or changes it in place.
    """
    path = run / "config.json"
    before = json.loads(path.read_text())
    path.write_text(json.dumps(config(before) or before))

    path = run / "checkpoint.pt"
    stored = path.read_bytes()[: -metapt.SHA256_LENGTH]
    before = torch.load(io.BytesIO(stored), weights_only=True)
    buffer = io.BytesIO()
    torch.save(checkpoint(before) or before, buffer)
    checksum = hashlib.sha256(buffer.getvalue()).hexdigest()
    path.write_bytes(buffer.getvalue() + checksum.encode())


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder by name. The file of a run's lock is no content."""
    paths = [path for path in folder.iterdir() if path.name != ".lock"]
    return {path.name: path.read_bytes() for path in paths}


# ------------------------------------------------------------------------------------------------
# Tensors and calls


def flat(params) -> torch.Tensor:
    """All numbers of a module's parameters, or of a dict of tensors, in one vector."""
    if isinstance(params, nn.Module):
        params = dict(params.named_parameters())
    return torch.cat([p.detach().reshape(-1) for p in params.values()])


def spy(patch: pytest.MonkeyPatch, owner, name: str, see) -> None:
    """Every call of `owner.name` is shown to `see` before it is made."""
    real = getattr(owner, name)

    @functools.wraps(real)
    def seen(*args, **options):
        see(*args, **options)
        return real(*args, **options)

    patch.setattr(owner, name, seen)


# ------------------------------------------------------------------------------------------------
# Domains


def find_domain(name: str) -> type[metapt.Domain]:
    """A domain that ships with metapt; the test is skipped where its file is not there yet."""
    where = metapt.DOMAINS[name]
    if isinstance(where, str):
        file = where.partition(":")[0]
        if not (ROOT / "bench" / "domains" / file).exists():
            pytest.skip(f"needs the file of the domain {name}")
    return metapt.find_domain(name)


def domain_of(kind: type[metapt.Domain] | str, **given) -> metapt.Domain:
    """A domain on the CPU, with tiny settings where it is a built-in one, by name."""
    if isinstance(kind, str):
        given = {**TINY[kind], **given}
        kind = metapt.find_domain(kind)
    return kind(kind.Settings(**given), torch.device("cpu"), Path("data"))


def training(
    kind: type[metapt.Domain] | str | None = None,
    learn: bool = True,
    phi: dict | None = None,
    **given,
) -> metapt.Training:
    """A training of `Toy`, or of another domain."""
    return metapt.Training(domain_of(kind or Toy, **given), learn=learn, phi=phi)


@dataclass(frozen=True)
class ToySettings(metapt.Settings):
    steps: int = 24
    warmup_share: float = 1 / 6
    meta_every: int = 4
    meta_lr: float = 0.1
    batch_size: int = 8
    meta_batch_size: int = 16
    unroll_batch_size: int = 8
    validation_batch_size: int = 12
    solver: str = "cg"
    terms: int = 2
    damping: float = 5.0
    compare: int = 1
    measure_steps: int = 10

    jitter: float = metapt.setting(0.1, "Noise on the points in PT", check=metapt.AT_LEAST_0)


class Toy(metapt.Domain):
    """Points of two classes; φ weighs the classes in PT."""

    Settings = ToySettings
    presets: ClassVar = {"calm": {"jitter": 0.0}}

    def __init__(self, settings, device, data):
        super().__init__(settings, device, data)
        self.sizes = {"pretrain": 43, "finetune": 20, "validation": 16, "test": 30}
        draw = torch.Generator().manual_seed(settings.seed)
        self.points = {}
        self.classes = {}
        for part, size in self.sizes.items():
            points = torch.randn(size, 4, generator=draw)
            self.points[part] = points.to(device)
            self.classes[part] = (points[:, 0] > points[:, 1]).long().to(device)

    def network(self):
        encoder = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh())
        return metapt.Network(encoder, nn.Linear(6, 2)).to(self.device)

    def head(self):
        return nn.Linear(6, 2).to(self.device)

    def meta(self):
        return nn.Embedding.from_pretrained(torch.zeros(2, 1), freeze=False).to(self.device)

    def inputs(self, part, index):
        return self.points[part][metapt.to_device(index, self.device)]

    def targets(self, part, index):
        return self.classes[part][metapt.to_device(index, self.device)]

    def pretrain_loss(self, network, meta, index, progress, live):
        points = self.inputs("pretrain", index)
        classes = self.targets("pretrain", index)

        def loss(theta, phi):
            jittered = points + self.settings.jitter * torch.randn_like(points)
            logits = metapt.call(network, theta, jittered, train=True, live=live)
            weights = metapt.call(meta, phi, classes).sigmoid().squeeze(1)
            return (weights * F.cross_entropy(logits, classes, reduction="none")).mean()

        return loss


def toy_file(path: Path, more: str = "") -> Path:
    """`Toy` as a file of the user's, with a content of its own."""
    imports = (
        f'"""{path}"""\n\n'
        "from dataclasses import dataclass\n"
        "from typing import ClassVar\n\n"
        "import torch\n"
        "import torch.nn.functional as F\n"
        "from torch import nn\n\n"
        "import metapt\n\n\n"
    )
    path.write_text(
        imports + inspect.getsource(ToySettings) + "\n\n" + inspect.getsource(Toy) + more
    )
    return path


# ------------------------------------------------------------------------------------------------
# The truth of a hypergradient: pre-training to its end, under other φ


def pipeline_of(free, finetune, validation, begin: dict, psi: dict, pull: float, steps: int):
    """Pre-training to its end and one FT step of 0.1, as functions of φ.

    L_PT is `free` with a pull to `begin`, so that it has one end. Every pass draws the same random
    numbers, by seed 4.

    Returns:
        L_PT(θ, φ), θ*(φ) and L_V(φ), as three functions.
    """

    def pretrain(theta, phi):
        distance = sum((p - begin[name]).square().sum() for name, p in theta.items())
        return free(theta, phi) + pull / 2 * distance

    def gradient(loss, at):
        torch.manual_seed(4)
        point = {name: p.clone().requires_grad_() for name, p in at.items()}
        slopes = torch.autograd.grad(loss(point), list(point.values()))
        return dict(zip(at, slopes, strict=True))

    def pretrained(phi):
        theta = begin
        for _ in range(steps):
            # θ ← θ_0 − ∇L / pull, which is a contraction.
            slope = gradient(lambda theta: pretrain(theta, phi), theta)
            theta = {name: p - slope[name] / pull for name, p in theta.items()}
        assert max(g.abs().max() for g in slope.values()) < 1e-9
        return theta

    def pipeline(phi):
        theta = pretrained(phi)
        slope = gradient(lambda psi: finetune(theta, psi), psi)
        return validation(theta, {name: p - 0.1 * slope[name] for name, p in psi.items()}).item()

    return pretrain, pretrained, pipeline
