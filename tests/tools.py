"""Tools of the tests: metapt's commands in this process or in another, what runs leave behind, a domain in miniature."""

import contextlib
import hashlib
import inspect
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import metapt

ROOT = Path(metapt.__file__).resolve().parent
SHARED = ROOT.parent / "shared" / "data"  # real data, where there are any
TINY = {  # settings of runs that are over in a second
    "digits-rotation": {
        "steps": 60, "warmup": 12, "meta_every": 4, "compare": 1, "measure_steps": 8, "sizes": "30,60",
        "particles": "3:0.5,1", "meta_batch_size": 64, "kick_deg": 20.0,
    },
    "digits-noise": {
        "steps": 41, "warmup": 10, "meta_every": 4, "compare": 1, "measure_steps": 8, "sizes": "30,60", "terms": 2,
        "damping": 1.0, "meta_batch_size": 64, "average": 0.5,
    },
}  # fmt: skip


def options(given: dict) -> list[str]:
    """A dict of settings as command-line arguments."""
    return [f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}") for name, value in given.items()]


def metapt_in(folder: Path, *arguments, code: str | None = None, **environment) -> subprocess.CompletedProcess:
    """metapt.py in a process of its own; with `code`, that Python code in its place."""
    program = [metapt.__file__] if code is None else ["-c", code]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *program, *map(str, arguments)], check=False, cwd=folder,
                          capture_output=True, text=True, env=environment, timeout=300)  # fmt: skip


def main_in(folder: Path, *arguments) -> tuple[int, str, str]:
    """Like `metapt_in` in this process, which saves the imports: exit status, standard output, standard error."""
    out, err = io.StringIO(), io.StringIO()
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
    """Runs a command with --json that must succeed and print one JSON object and nothing else."""
    code, out, err = main_in(folder, *arguments, "--json")
    assert code == 0, err
    return strict_json(out)


def refused(folder: Path, *arguments) -> str:
    """Runs a command that must be refused: exit status 2, and one line on standard error, which is returned."""
    code, out, err = main_in(folder, *arguments)
    assert (code, out) == (2, ""), err
    assert err.startswith("metapt: ") and len(err) > len("metapt: \n"), err
    assert err.count("\n") == 1, err
    return err.strip()


def strict_json(text: str):
    """NaN and Infinity are no JSON."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def outcome(folder: Path) -> tuple[dict, str, bytes]:
    """What must be the same for the same run: the summary without its clocks, metrics, φ by name where there is one."""
    summary = strict_json((folder / "summary.json").read_text())
    clocks = {"seconds", "training_seconds"}
    table = folder / "phi.csv"
    return ({name: value for name, value in summary.items() if name not in clocks},
            (folder / "metrics.jsonl").read_text(), table.read_bytes() if table.exists() else b"")  # fmt: skip


def rewrite(run: Path, config=lambda content: None, checkpoint=lambda content: None) -> None:
    """Changes what a run's config.json and checkpoint hold, as if the program itself had written it so."""
    settings = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config(settings) or settings))
    content = torch.load(run / "checkpoint.pt", weights_only=True)
    content["config"] = hashlib.sha256((run / "config.json").read_bytes()).hexdigest()
    torch.save(checkpoint(content) or content, buffer := io.BytesIO())
    (run / "checkpoint.pt").write_bytes(buffer.getvalue() + hashlib.sha256(buffer.getvalue()).hexdigest().encode())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def flat(params) -> torch.Tensor:
    """All numbers of a module, of its parameters or of a dict of tensors in one vector."""
    params = dict(params.named_parameters()) if isinstance(params, nn.Module) else params
    return torch.cat([p.detach().reshape(-1) for p in params.values()])


def spy(patch: pytest.MonkeyPatch, owner, name: str, see) -> None:
    """Every call of `owner.name` is shown to `see` before it is made."""
    real = getattr(owner, name)
    patch.setattr(owner, name, lambda *args, **options: (see(*args, **options), real(*args, **options))[1])


def find_domain(name: str) -> type[metapt.Domain]:
    """A domain that ships with metapt; the test is skipped where its file is not there yet."""
    where = metapt.DOMAINS[name]
    if isinstance(where, str) and not (ROOT / "bench" / "domains" / where.partition(":")[0]).exists():
        pytest.skip(f"needs the file of the domain {name}")
    return metapt.find_domain(name)


def domain_of(kind: type[metapt.Domain] | str, **given) -> metapt.Domain:
    """A domain on the CPU, with tiny settings where it is a built-in one."""
    kind, given = (metapt.find_domain(kind), {**TINY[kind], **given}) if isinstance(kind, str) else (kind, given)
    return kind(kind.Settings(**given), torch.device("cpu"), Path("data"))


def training(kind: type[metapt.Domain] | str | None = None, learn: bool = True, phi: dict | None = None, **given):
    """A training of `Toy`, or of another domain."""
    return metapt.Training(domain_of(kind or Toy, **given), learn, phi)


class ToySettings(
    metapt.Settings, steps=24, warmup=4, meta_every=4, meta_lr=0.1, batch_size=8, meta_batch_size=16,
    unroll_batch_size=8, validation_batch_size=12, solver="cg", terms=2, damping=5.0, compare=1, measure_steps=10,
):  # fmt: skip
    jitter: float = metapt.option(0.1, "Noise on the points in PT", check=metapt.AT_LEAST_0)


class Toy(metapt.Domain):
    """Points of two classes; φ weighs the classes in PT."""

    Settings = ToySettings
    presets = {"calm": {"jitter": 0.0}}  # noqa: RUF012

    def __init__(self, settings, device, data):
        super().__init__(settings, device, data)
        self.sizes = {"pretrain": 43, "finetune": 20, "validation": 16, "test": 30}
        draw = torch.Generator().manual_seed(settings.seed)
        self.points = {part: torch.randn(n, 4, generator=draw) for part, n in self.sizes.items()}
        self.classes = {part: (points[:, 0] > points[:, 1]).long() for part, points in self.points.items()}

    def network(self):
        encoder = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh())
        return metapt.Network(encoder, nn.Linear(6, 2)).to(self.device)

    def head(self):
        return nn.Linear(6, 2).to(self.device)

    def meta(self):
        return nn.Embedding.from_pretrained(torch.zeros(2, 1), freeze=False).to(self.device)

    def pretrain_loss(self, network, meta, index, progress, live):
        points, classes = self.inputs("pretrain", index), self.targets("pretrain", index)

        def loss(theta, phi):
            jittered = points + self.settings.jitter * torch.randn_like(points)
            logits = metapt.call(network, theta, jittered, train=True, live=live)
            weights = metapt.call(meta, phi, classes).sigmoid().squeeze(1)
            return (weights * F.cross_entropy(logits, classes, reduction="none")).mean()

        return loss

    def inputs(self, part, index):
        return self.points[part][index]

    def targets(self, part, index):
        return self.classes[part][index]


def toy_file(path: Path, more: str = "") -> Path:
    """`Toy` as a file of the user's, with a content of its own."""
    imports = (
        f'"""{path}"""\n\nimport torch\nimport torch.nn.functional as F\nfrom torch import nn\n\nimport metapt\n\n\n'
    )
    path.write_text(imports + inspect.getsource(ToySettings) + "\n\n" + inspect.getsource(Toy) + more)
    return path


def pipeline_of(free, finetune, validation, begin: dict, psi: dict, pull: float, steps: int):
    """θ* of PT under φ, L_PT being `free` with a pull to `begin`, so that it has an end; and L_V(φ) after one FT step of 0.1.

    Returns:
        L_PT(θ, φ), θ*(φ) and L_V(φ) as functions; every pass draws the same random numbers, by seed 4.
    """

    def pretrain(theta, phi):
        return free(theta, phi) + pull / 2 * sum((p - begin[k]).square().sum() for k, p in theta.items())

    def gradient(loss, at):
        torch.manual_seed(4)
        point = {k: p.clone().requires_grad_() for k, p in at.items()}
        return dict(zip(at, torch.autograd.grad(loss(point), list(point.values())), strict=True))

    def pretrained(phi):
        theta = begin
        for _ in range(steps):  # θ ← θ_0 − ∇L / pull, a contraction
            slope = gradient(lambda theta: pretrain(theta, phi), theta)
            theta = {k: p - slope[k] / pull for k, p in theta.items()}
        assert max(g.abs().max() for g in slope.values()) < 1e-9
        return theta

    def pipeline(phi):
        theta = pretrained(phi)
        slope = gradient(lambda psi: finetune(theta, psi), psi)
        return validation(theta, {k: p - 0.1 * slope[k] for k, p in psi.items()}).item()

    return pretrain, pretrained, pipeline
