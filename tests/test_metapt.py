"""Sections 3 to 9 of metapt.py: data, the online loop, resuming, bad input, the commands, the project around them."""

import contextlib
import dataclasses
import gzip
import hashlib
import http.server
import io
import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

import metapt

ROOT = Path(metapt.__file__).resolve().parent
MNIST = ROOT.parent / "shared" / "data" / "mnist"
TINY = {
    "digits-rotation": {
        "steps": 60, "warmup": 12, "meta_every": 4, "compare": 1, "finetune_steps": 20, "particles": "3,1",
        "rounds": "0.5,1", "checkpoint_every": 3, "meta_batch_size": 64, "kick_deg": 20.0,
    },
    "digits-noise": {
        "steps": 41, "warmup": 10, "meta_every": 4, "compare": 1, "finetune_steps": 20, "solver": "cg", "terms": 2,
        "damping": 1.0, "carry_q": True, "checkpoint_every": 2, "meta_batch_size": 64, "average": 0.5,
    },
}  # fmt: skip


def options(given: dict) -> list[str]:
    """A dict of settings as command-line arguments."""
    out = []
    for name, value in given.items():
        flag = name.replace("_", "-")
        out += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}={value}"]
    return out


def metapt_in(folder: Path, *arguments: str, **more) -> subprocess.CompletedProcess:
    command = [sys.executable, metapt.__file__, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, check=False, cwd=folder, capture_output=True, text=True, env=environment, timeout=500, **more
    )


def main_in(folder: Path, *arguments: str) -> tuple[int, str, str]:
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


def summary_of(folder: Path, *arguments: str) -> dict:
    """Runs a command with --json that must succeed; NaN and Infinity are no JSON."""
    code, out, err = main_in(folder, *arguments, "--json")
    assert code == 0, err
    return strict_json(out)


def strict_json(text: str):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def refused(folder: Path, *arguments: str) -> str:
    """Runs a command that must be refused: exit status 2, one line on standard error, which is returned."""
    code, out, err = main_in(folder, *arguments)
    assert code == 2, err
    assert len(err.strip().splitlines()) == 1, err
    assert len(err.strip()) > len("metapt: "), err
    assert out.strip() == ""
    return err


def training(domain: str, learn: bool = True, **given) -> metapt.Training:
    settings = metapt.settings_of(domain, {**TINY[domain], **given})
    return metapt.Training(metapt.make_domain(domain, settings, torch.device("cpu"), Path("data")), settings, learn)


def flat(params: dict) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in params.values()])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a small meta run of each domain; their standard output is kept beside."""
    folder = tmp_path_factory.mktemp("runs")
    for domain, given in TINY.items():
        done = metapt_in(folder, "meta", domain, "--json", "--out", domain, *options(given))
        assert done.returncode == 0, done.stderr
        (folder / f"{domain}.out").write_text(done.stdout)
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Meta-parameters and data
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quarters", [-1, 0, 1, 2, 5])
def test_rotation_by_quarter_turns_is_rot90(quarters):
    images = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    turned = metapt.rotate(images, torch.full((2,), 90.0 * quarters, dtype=torch.float64))
    torch.testing.assert_close(turned, torch.rot90(images, quarters, (2, 3)))


def test_rotation_is_differentiable_in_degrees():
    images = torch.rand(3, 1, 8, 8, dtype=torch.float64)
    weight = torch.rand(3, 1, 8, 8, dtype=torch.float64)
    degrees = torch.tensor([12.3, -77.7, 141.1], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad((weight * metapt.rotate(images, degrees)).sum(), degrees)
    for i in range(3):
        step = torch.zeros(3, dtype=torch.float64)
        step[i] = 1e-5
        ahead, behind = ((weight * metapt.rotate(images, degrees.detach() + s * step)).sum() for s in (1, -1))
        assert gradient[i].item() == pytest.approx((ahead - behind).item() / 2e-5, rel=1e-5)


def test_example_weights_depend_on_image_and_label():
    torch.manual_seed(0)
    meta = metapt.ExampleWeights(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)))
    images, labels = torch.rand(5, 1, 8, 8), torch.arange(5)
    weights = meta(images, labels)
    assert weights.shape == (5,)
    assert ((weights > 0) & (weights < 1)).all()
    assert (meta(images, (labels + 1) % 10) != weights).all()
    assert (meta(images.flip(0), labels) != weights)[torch.tensor([0, 1, 3, 4])].all()


def test_call_keeps_buffers_unless_they_are_live():
    module = nn.BatchNorm1d(3)
    before = module.running_mean.clone()
    params = dict(module.named_parameters())
    metapt.call(module, params, torch.randn(8, 3) + 5, train=True)
    assert torch.equal(module.running_mean, before)
    metapt.call(module, params, torch.randn(8, 3) + 5, train=True, live=True)
    assert not torch.equal(module.running_mean, before)


def test_digits_are_split_into_stratified_disjoint_parts():
    from sklearn.datasets import load_digits

    images = metapt.load_images("digits", Path(), seed=3)
    assert {part: len(labels) for part, labels in images.labels.items()} == {
        "pretrain": 1000, "finetune": 300, "validation": 250, "test": 247}  # fmt: skip
    together = sorted(bytes(x.numpy()) for pixels in images.pixels.values() for x in pixels)
    assert together == sorted(bytes(x.astype(np.uint8)) for x in load_digits().images)
    shares = torch.from_numpy(load_digits().target).bincount() / 1797
    for labels in images.labels.values():
        assert (labels.bincount(minlength=10) - shares * len(labels)).abs().max() <= 2
    upright = {bytes(x.astype(np.uint8)): y for x, y in zip(load_digits().images, load_digits().target, strict=True)}
    for part, labels in images.labels.items():
        assert [upright[bytes(x.numpy())] for x in images.pixels[part]] == labels.tolist()
    again, other = (metapt.load_images("digits", Path(), seed) for seed in (3, 4))
    assert torch.equal(again.pixels["test"], images.pixels["test"])
    assert not torch.equal(other.pixels["test"], images.pixels["test"])


def test_noise_spoils_the_stated_share_of_pretraining_labels_alone():
    made = training("digits-noise", noise=0.3).domain
    clean = metapt.load_images("digits", Path(), 0).labels
    assert made.noisy.sum() == 300
    assert torch.equal(made.labels["pretrain"] != clean["pretrain"], made.noisy)
    for part in ("finetune", "validation", "test"):
        assert torch.equal(made.labels[part], clean[part])


def test_finetuning_of_the_noise_domains_begins_as_the_classifier_of_pretraining():
    domain = training("digits-noise").domain
    network, head, rows = domain.network().eval(), domain.head(), torch.arange(50)
    images = domain.inputs("test", rows)
    torch.testing.assert_close(head(network(images, features=True)), network(images))
    assert network(images).std() > 0


def test_the_loss_of_the_noise_domains_is_the_mean_of_weight_times_cross_entropy():
    domain = training("digits-noise", dropout=0.0).domain
    network, meta, rows = domain.network(), domain.meta(), torch.arange(7)
    loss = domain.pretrain_loss(network, meta, rows, 0.0)(
        dict(network.named_parameters()), dict(meta.named_parameters())
    )
    expected = 0.0
    for i in range(7):
        image, label = domain.pixels["pretrain"][i].float()[None] / 16, domain.labels["pretrain"][i]
        weight = meta.scores(image).softmax(1)[0, label]
        expected -= weight * network(image).log_softmax(1)[0, label] / 7
    torch.testing.assert_close(loss, expected)


def test_no_loss_reads_the_noise_flags():
    run = training("digits-noise")
    run.domain.noisy = None
    run.best.pretrain_step(0.0)
    run.best.meta_step(0.0)
    assert run.best.meta_steps == 1


def test_finetuning_images_are_rotated_by_about_ninety_degrees():
    made = training("digits-rotation").domain
    upright = metapt.load_images("digits", Path(), 0).pixels
    for part in ("finetune", "validation", "test"):
        error = (made.pixels[part] - torch.rot90(upright[part].float(), 1, (2, 3))).abs().mean()
        assert 0 < error < 0.5  # of 16 grey levels: N(90°, 1°) is not quite 90°
    assert torch.equal(made.pixels["pretrain"], upright["pretrain"])


def test_pretraining_images_are_rotated_by_phi():
    """What the encoder is given at φ = 0 and at φ = 90°, give or take the 1° of spread."""
    run, seen = training("digits-rotation", spread_deg=1.0), []
    run.best.network.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    rows = torch.arange(50)
    for degrees in (0.0, 90.0):
        run.best.meta.rotation_mean_deg.data.fill_(degrees)
        loss = run.domain.pretrain_loss(run.best.network, run.best.meta, rows, 1.0)
        loss(metapt._detached(run.best.network), metapt._detached(run.best.meta))
    upright = run.domain.inputs("pretrain", rows)
    for images, quarters in zip(seen, (0, 1), strict=True):
        assert 0 < (images - torch.rot90(upright, quarters, (2, 3))).abs().mean() < 0.03


@pytest.mark.parametrize(("images", "labels"), [((20, 28, 28), (19,)), ((20, 784), (20,)), ((20, 28, 28), (20,))])
def test_mnist_of_another_size_is_refused(tmp_path, images, labels):
    (tmp_path / "mnist").mkdir()
    for name in metapt.MNIST_SHA256:
        (tmp_path / "mnist" / name).write_bytes(idx(images if "images" in name else labels))
    with pytest.raises(metapt.BadInput, match="mnist"):
        metapt.load_images("mnist", tmp_path, 0)


@pytest.mark.skipif(not MNIST.is_dir(), reason="needs the MNIST files")
def test_mnist_is_taken_from_a_folder_and_split(tmp_path):
    assert main_in(tmp_path, "download", "mnist", "--from", MNIST)[0] == 0
    images = metapt.load_images("mnist", tmp_path / "data", 0)
    assert [len(images.labels[part]) for part in ("pretrain", "finetune", "validation", "test")] == [
        50_000, 1000, 1000, 10_000]  # fmt: skip


def idx(shape, values=None, magic=b"\0\0\x08") -> bytes:
    content = bytes(math.prod(shape)) if values is None else values
    return gzip.compress(magic + bytes([len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "missing"),
        (b"plain text", "gzip"),
        (idx((3, 2, 2))[:-12], "gzip"),
        (idx((3, 2, 2), magic=b"\0\0\x0d"), "header"),
        (idx((3, 2, 2), values=bytes(11)), "header says"),
        (gzip.compress(b"\0\0\x08\x03\0"), "header"),
    ],
)
def test_bad_idx_files_are_named(tmp_path, content, message):
    path = tmp_path / "file.gz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(metapt.BadInput, match=message) as caught:
        metapt.read_idx(path)
    assert str(path) in str(caught.value)


class Server(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT with ranges; `faults` is consumed request by request: a status, "cut", "no ranges", … or None."""

    CONTENT = np.random.default_rng(0).bytes(300_000)
    faults: list = []  # noqa: RUF012
    ranges: list = []  # noqa: RUF012
    sent: list = []  # noqa: RUF012

    def do_GET(self):
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, int):
            return self.send_error(fault)
        content, begin = self.CONTENT, 0
        if fault == "wrong byte":
            content = b"?" + content[1:]
        elif fault == "short":
            content = content[:-10]
        asked = self.headers.get("Range")
        self.ranges.append(asked)
        if asked and fault != "no ranges":
            begin = int(re.fullmatch(r"bytes=(\d+)-", asked).group(1))
            if begin >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
            if fault == "other range":
                begin = 0
        self.send_response(206 if asked and fault != "no ranges" else 200)
        whole = len(content)
        content = content[: begin + 50] if fault == "less" else content
        self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{whole}")
        self.send_header("Content-Length", "many" if fault == "odd length" else str(len(content) - begin))
        self.end_headers()
        sent = content[begin : begin + 100_000] if fault == "cut" else content[begin:]
        self.sent.append(len(sent))
        self.wfile.write(sent)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(metapt.time, "sleep", lambda seconds: None)
    Server.faults, Server.ranges, Server.sent = [], [], []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/file"
        running.shutdown()


def fetch(url, path, content=Server.CONTENT):
    metapt.fetch(url, path, hashlib.sha256(content).hexdigest(), lambda done, total: None)


def test_fetch_goes_on_after_cuts_and_refusals(server, tmp_path):
    Server.faults = [503, "cut", "cut"]
    fetch(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == Server.CONTENT
    assert Server.ranges == [None, "bytes=100000-", "bytes=200000-"]
    assert sum(Server.sent) == len(Server.CONTENT)  # no byte twice
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    fetch(server, tmp_path / "file")  # it is there and right: nothing is asked
    assert len(Server.ranges) == 3


@pytest.mark.parametrize(("fault", "message"), [("wrong byte", "SHA-256"), ("short", "SHA-256"), (404, "404")])
def test_fetch_gives_no_name_to_what_is_wrong(server, tmp_path, fault, message):
    Server.faults = [fault] * 5
    with pytest.raises(metapt.BadInput, match=message):
        fetch(server, tmp_path / "file")
    assert list(tmp_path.iterdir()) == []
    assert len(Server.sent) in (0, 5)  # 404 is final, a wrong byte may have come on the way
    Server.faults = [fault] if isinstance(fault, str) else []
    fetch(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == Server.CONTENT


def test_fetch_waits_longer_from_try_to_try(server, tmp_path, monkeypatch):
    pauses = []
    monkeypatch.setattr(metapt.time, "sleep", pauses.append)
    Server.faults = [503, "cut", "odd length"]
    fetch(server, tmp_path / "file")
    assert pauses == [1, 2, 4]
    assert (tmp_path / "file").read_bytes() == Server.CONTENT


def test_fetch_begins_again_where_it_cannot_go_on(server, tmp_path):
    Server.faults = ["cut", "no ranges"]
    fetch(server, tmp_path / "file")
    (tmp_path / "other.part").write_bytes(bytes(400_000))  # more than there is: 416
    fetch(server, tmp_path / "other")
    assert (tmp_path / "file").read_bytes() == (tmp_path / "other").read_bytes() == Server.CONTENT
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "other"]
    Server.faults = ["cut", "other range"]  # what is sent is not what was asked for: it must not be appended
    fetch(server, tmp_path / "third")
    assert (tmp_path / "third").read_bytes() == Server.CONTENT
    Server.faults = ["cut", "less"]  # a part of what was asked for
    fetch(server, tmp_path / "fourth")
    assert (tmp_path / "fourth").read_bytes() == Server.CONTENT
    Server.faults = [416]  # without having been asked for a range
    metapt.fetch(server, tmp_path / "fifth", None, lambda done, total: None)
    assert (tmp_path / "fifth").read_bytes() == Server.CONTENT
    Server.ranges.clear()
    (tmp_path / "whole.part").write_bytes(Server.CONTENT)  # the last try was cut off after its last byte
    fetch(server, tmp_path / "whole")
    assert Server.ranges == ["bytes=300000-"]


def test_fetch_replaces_a_wrong_file_only_by_a_right_one(server, tmp_path):
    (tmp_path / "file").write_bytes(b"wrong")
    Server.faults = ["wrong byte"] * 5
    with pytest.raises(metapt.BadInput, match="SHA-256"):
        fetch(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"wrong"
    fetch(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == Server.CONTENT


def test_a_prepared_folder_takes_the_place_of_prepared_data_alone(tmp_path, monkeypatch):
    def prepare(folder, content):
        with metapt.prepared_folder(folder, "form") as part:
            (part / "a.bin").write_bytes(content)
            metapt.save_json(part / "about.json", {"format": "form"})

    for name, content in {"thesis.txt": "years", "labels.bin": "mine", "about.json": '{"of": "me"}'}.items():
        (folder := tmp_path / f"kept-{name}").mkdir()
        (folder / name).write_text(content)
        with pytest.raises(metapt.BadInput, match="prepared data"):
            prepare(folder, b"1")
        assert (folder / name).read_text() == content
        with pytest.raises(metapt.BadInput, match="is a file"):
            prepare(folder / name, b"1")
    (tmp_path / "kept-folder" / "a.bin").mkdir(parents=True)
    with pytest.raises(metapt.BadInput, match="prepared data"):
        prepare(tmp_path / "kept-folder", b"1")

    folder = tmp_path / "ours"
    for content in (b"1", b"2"):
        prepare(folder, content)
        assert (folder / "a.bin").read_bytes() == content
    with pytest.raises(ZeroDivisionError), metapt.prepared_folder(folder, "form") as part:
        (part / "a.bin").write_bytes(b"3")
        1 / 0  # noqa: B018
    assert (folder / "a.bin").read_bytes() == b"2"
    real = Path.replace

    def failing(self, target):
        if self.name.endswith("part"):
            raise OSError("the disk went away")
        return real(self, target)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="went away"):
        patch.setattr(Path, "replace", failing)
        prepare(folder, b"4")
    assert (folder / "a.bin").read_bytes() == b"2"
    folder.replace(tmp_path / ".ours.metapt-old")  # killed between two renames
    with pytest.raises(ZeroDivisionError), metapt.prepared_folder(folder, "form"):
        1 / 0  # noqa: B018
    assert (folder / "a.bin").read_bytes() == b"2"
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("command", ["meta", "pretrain", "finetune", "eval"])
def test_help_names_defaults(command, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "300")
    out = metapt_in(tmp_path, command, "--help").stdout
    assert out.count("[default: ") >= (60 if command in ("meta", "pretrain") else 5)
    if command == "meta":
        assert "PT steps. [default: 1000; rotation: 850;" in out


def test_the_best_look_counts_and_networks_are_measured_in_evaluation_mode(monkeypatch):
    """FT at a learning rate that ruins the head: the score is that of the lowest validation loss, not of the last."""
    made = metapt.make_domain("digits-noise", metapt.settings_of("digits-noise", {}), torch.device("cpu"), Path("data"))
    losses, real = [], made.loss
    torch.manual_seed(0)

    def loss(outputs, targets):
        value = real(outputs, targets)
        if not outputs.requires_grad:
            losses.append(value.item())
        return value

    monkeypatch.setattr(made, "loss", loss)
    monkeypatch.setattr(made, "score", lambda outputs, targets: float(len(losses)))
    found = metapt.finetune(made, made.network(), 100, 0, "head", 3.0, 50)
    assert len(losses) == 25
    assert found.validation_loss == min(losses) < losses[-1]
    assert found.score == losses.index(min(losses)) + 1


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/a b", "nowhere"])
def test_fetch_refuses_what_is_no_address(url, tmp_path):
    with pytest.raises(metapt.BadInput, match=url):
        fetch(url, tmp_path / "file")


def test_fetch_gives_up_in_the_end(server, tmp_path):
    Server.faults = [503] * 9
    with pytest.raises(metapt.BadInput, match="5 tries"):
        fetch(server, tmp_path / "file")


def test_adopt_keeps_what_is_there_when_the_source_is_wrong(tmp_path):
    (tmp_path / "there").write_bytes(b"good")
    (tmp_path / "source").write_bytes(b"bad")
    for source in ("source", "nothing"):
        with pytest.raises(metapt.BadInput, match=source):
            metapt.adopt(tmp_path / source, tmp_path / "there", hashlib.sha256(b"good").hexdigest())
    assert (tmp_path / "there").read_bytes() == b"good"


# ---------------------------------------------------------------------------------------------------------------------
# The online loop
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "warmup", "every"), [(40, 10, 10), (41, 10, 4), (7, 7, 3), (12, 0, 5)])
def test_steps_are_counted_as_asked(monkeypatch, steps, warmup, every):
    calls = {"pretrain": [], "meta": []}
    monkeypatch.setattr(metapt.Learner, "pretrain_step", lambda self, progress: calls["pretrain"].append(progress))
    monkeypatch.setattr(metapt.Learner, "meta_step", lambda self, progress: calls["meta"].append(progress))
    run = training("digits-noise", steps=steps, warmup=warmup, meta_every=every)
    run.best.losses["pretrain_loss"] = 1.0
    marks = []
    run.run(each=lambda training: marks.append(training.step))
    assert len(calls["pretrain"]) == steps == marks[-1]
    assert len(calls["meta"]) == (steps - warmup) // every
    assert all(0 <= progress <= 1 for progress in calls["pretrain"] + calls["meta"])


def test_pretraining_is_the_same_loop_with_phi_fixed():
    theta, phi = [], []
    for learn in (False, True):
        run = training("digits-noise", learn, steps=23, warmup=20, meta_every=3)
        run.run(each=lambda run: (theta.append(flat(dict(run.best.network.named_parameters()))),
                                  phi.append(flat(dict(run.best.meta.named_parameters())))))  # fmt: skip
    half = len(theta) // 2
    assert all(torch.equal(a, b) for a, b in zip(theta[:half], theta[half:], strict=True))  # same steps on θ
    assert torch.equal(phi[0], phi[half - 1])
    assert torch.equal(phi[half], phi[-2])
    assert not torch.equal(phi[-1], phi[-2])


def test_meta_step_follows_the_gradient_of_the_validation_loss_after_one_pretraining_step():
    """With q = v, −qᵀ∇²_θφ L_PT is the derivative of L_V after θ − ε ∇_θ L_PT(θ, φ), divided by ε."""
    run = training("digits-noise", solver="identity", dropout=0.0, unroll_steps=0, carry_q=False)
    made, learner = run.domain, run.best
    for module in (learner.network, learner.head, learner.meta):
        module.double()
        for part in list(module.modules()):  # smooth, so that differences of any size mean something
            for name, child in part.named_children():
                if isinstance(child, nn.ReLU):
                    setattr(part, name, nn.Softplus())
    made.inputs = lambda part, index: made.pixels[part][index].double() / made.scale
    learner.psi = {name: p.double() for name, p in learner.psi.items()}
    rows = torch.arange(64)
    for stream in learner.streams.values():
        stream.order, stream.position, stream.batch = torch.arange(64), 0, 64
    theta, phi = metapt._detached(learner.network), metapt._detached(learner.meta)
    validation = made.finetune_loss(learner.network, learner.head, "validation", rows)
    torch.manual_seed(0)
    direction = {name: torch.randn_like(p) for name, p in phi.items()}

    leaves = {name: p.clone().requires_grad_() for name, p in theta.items()}
    v = torch.autograd.grad(
        validation(leaves, learner.psi), list(leaves.values()), allow_unused=True, materialize_grads=True
    )

    def slope(h):
        """d/dε of L_V(θ − ε ∇_θ L_PT(θ, φ + h·direction)) at ε = 0."""
        moved = {name: p + h * direction[name] for name, p in phi.items()}
        loss = made.pretrain_loss(learner.network, learner.meta, rows, 0.0)(leaves, moved)
        gradient = torch.autograd.grad(loss, list(leaves.values()))
        return -sum((a * b).sum().item() for a, b in zip(v, gradient, strict=True))

    truth = (slope(1e-6) - slope(-1e-6)) / 2e-6
    seen = {}
    learner.meta_optimizer.step = lambda: seen.update({name: p.grad for name, p in learner.meta.named_parameters()})
    learner.meta_step(0.0)
    found = sum((seen[name] * direction[name]).sum().item() for name in seen)
    assert found == pytest.approx(truth, rel=1e-5)


def test_gradients_of_any_layout_move_a_large_network_alike():
    moved = []
    for turn in (lambda g: g, lambda g: g.T.contiguous().T):
        torch.manual_seed(0)
        module = torch.nn.Linear(1100, 1000)  # large enough for torch's fused Adam, which looks at no strides
        optimizer = metapt.adam(list(module.parameters()), 0.1)
        assert optimizer.defaults["fused"]
        for _ in range(2):
            metapt.set_gradients(module, {"weight": turn(torch.randn(1000, 1100)), "bias": torch.zeros(1000)})
            optimizer.step()
        moved.append(module.weight.detach())
    assert torch.equal(*moved)


def test_a_non_finite_hypergradient_skips_the_meta_step(monkeypatch):
    real, calls = metapt.hypergradient, []

    def sometimes(*arguments, **keywords):
        calls.append(1)
        if len(calls) in (2, 3):
            raise FloatingPointError("phi is not finite")
        return real(*arguments, **keywords)

    monkeypatch.setattr(metapt, "hypergradient", sometimes)
    phi = {}
    run = training("digits-noise")
    run.run(each=lambda run: phi.update({len(calls): flat(dict(run.best.meta.named_parameters()))}))
    assert run.best.skipped == 2
    assert run.best.meta_steps == len(calls) - 2
    assert [not torch.equal(phi[i], phi[i + 1]) for i in range(4)] == [True, False, False, True]


def test_many_skipped_in_a_row_end_the_run(monkeypatch):
    def never(*arguments, **keywords):
        raise FloatingPointError("v is not finite")

    monkeypatch.setattr(metapt, "hypergradient", never)
    with pytest.raises(metapt.Failed, match="10 meta steps in a row.*v is not finite"):
        training("digits-noise", steps=200).run()


def test_a_pretraining_loss_that_is_not_finite_ends_the_run():
    with pytest.raises(metapt.Failed, match="PT loss is not finite"):
        training("digits-noise", lr=1e30).run()


def test_everything_is_carried_on_and_nothing_reset():
    run = training("digits-noise", unroll_steps=2)
    learner = run.best
    real, before, after = learner.meta_step, [], []

    def watched(progress):
        before.append(flat(dict(learner.network.named_parameters())))
        real(progress)
        after.append((flat(dict(learner.network.named_parameters())), learner.ft_state["step"], learner.q))

    learner.meta_step = watched
    run.run()
    steps, metas = run.settings.steps, learner.meta_steps
    assert all(torch.equal(one, other) for one, (other, _, _) in zip(before, after, strict=True))  # θ is PT's alone
    assert {int(state["step"]) for state in learner.optimizer.state.values()} == {steps}
    assert {int(state["step"]) for state in learner.meta_optimizer.state.values()} == {metas}
    assert learner.ft_state["step"] == steps + 2 * metas
    assert [step for _, step, _ in after] == [10 + 4 * i + 2 * i for i in range(1, metas + 1)]
    assert all(q is not None for _, _, q in after)


def test_the_last_q_starts_the_next_solve_if_asked(monkeypatch):
    real, starts = metapt.hypergradient, []
    monkeypatch.setattr(metapt, "hypergradient", lambda *a, **k: (starts.append(k["q0"]), real(*a, **k))[1])
    training("digits-noise", carry_q=True).run()
    carried = len(starts)
    training("digits-noise", carry_q=False).run()
    assert [q is None for q in starts[:carried]] == [True] + [False] * (carried - 1)
    assert all(q is None for q in starts[carried:])


def test_a_carried_neumann_solve_keeps_its_step_and_goes_on_the_way_that_q_went(monkeypatch):
    real, calls, curvatures = metapt.hypergradient, [], []
    power = metapt.largest_curvature
    monkeypatch.setattr(metapt, "largest_curvature", lambda *a: (curvatures.append(power(*a)), curvatures[-1])[1])
    monkeypatch.setattr(metapt, "ALPHA_LASTS", 4)

    def spied(*arguments, **options):
        calls.append((options["q0"], options["solver"].alpha, real(*arguments, **options)))
        return calls[-1][2]

    monkeypatch.setattr(metapt, "hypergradient", spied)
    training("digits-noise", carry_q=True, solver="neumann", terms=1, q_momentum=0.8, damping=5.0, steps=52).run()
    assert [alpha is None for _, alpha, _ in calls[:9]] == [True, False, False, False, True, False, False, False, True]
    assert len(curvatures) == sum(alpha is None for _, alpha, _ in calls)
    assert calls[1][1] == calls[0][2].alpha == 1 / curvatures[0]
    q = [flat(result.q) for *_, result in calls]
    torch.testing.assert_close(flat(calls[1][0]), q[0])
    torch.testing.assert_close(flat(calls[3][0]), q[2] + 0.8 * (q[2] - q[1]))


@pytest.mark.parametrize(
    "solver", [{"solver": "neumann", "terms": 0, "alpha": 0.1}, {"solver": "identity", "carry_q": False}]
)
@pytest.mark.parametrize("hvp", ["exact", "finite"])
def test_a_shared_pass_is_the_step_that_pretraining_would_have_taken(solver, hvp):
    """With one batch for everything, the shared pass must move θ as a PT step of its own does."""
    given = {**solver, "hvp": hvp, "batch_size": 1000, "meta_batch_size": 1000,
             "dropout": 0.0, "steps": 14, "warmup": 12, "meta_every": 2, "meta_lr": 1e-12, "particles": "1",
             "rounds": "1"}  # fmt: skip
    ends = [
        flat(dict(training("digits-noise", share_pass=share, **given).run().best.network.named_parameters()))
        for share in (False, True)
    ]
    before = flat(dict(training("digits-noise", **{**given, "steps": 13}).run().best.network.named_parameters()))
    assert (ends[0] - before).norm() > 0.05
    assert (ends[1] - ends[0]).norm() < 0.02 * (ends[0] - before).norm()


def test_a_carried_solve_that_runs_away_begins_again(monkeypatch):
    real, starts = metapt.hypergradient, []

    def wild(*arguments, **options):
        starts.append(options["q0"])
        return real(*arguments, **options)._replace(residual=3.0)

    monkeypatch.setattr(metapt, "hypergradient", wild)
    training("digits-noise", carry_q=True, solver="neumann", terms=1, damping=0.1).run()
    assert len(starts) > 2 and all(q is None for q in starts)


def test_a_solve_that_ends_at_zero_is_skipped_and_not_a_step():
    run = training("digits-noise", steps=40)

    def concave(*arguments, **options):
        return lambda theta, phi: -sum(p.square().sum() for p in theta.values()) * sum(p.sum() for p in phi.values())

    learner = run.run().best
    learner.domain.pretrain_loss, before = concave, flat(dict(learner.meta.named_parameters())).clone()
    learner.settings = dataclasses.replace(learner.settings, solver="cg", damping=0.0, carry_q=False, share_pass=False)
    learner.meta.load_state_dict({name: p.abs() + 1 for name, p in learner.meta.state_dict().items()})
    before, skipped = flat(dict(learner.meta.named_parameters())).clone(), learner.skipped
    learner.q = None
    learner.meta_step(1.0)
    assert learner.skipped == skipped + 1
    assert torch.equal(flat(dict(learner.meta.named_parameters())), before)


def test_the_head_keeps_its_moments_whatever_the_unrolled_steps_move():
    for scope in ("head", "all"):
        learner = training("digits-noise", scope=scope, unroll_steps=1).best
        for _ in range(3):
            learner.pretrain_step(0.0)
        state = learner.ft_state if scope == "head" else learner.head_state
        assert state["step"] == 3


@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")
def test_a_checkpoint_goes_to_the_device_of_the_network():
    """The meta device stands for a GPU: what was saved on the CPU must not stay there."""
    run = training("digits-noise", steps=40, carry_q=True, solver="cg", average=0.5).run()
    state, learner = run.best.state_dict(), run.best
    learner.network.to("meta")
    learner.load_state_dict(state)
    for name in ("psi", "ft_state", "q", "average"):
        tensors = [t for t in flatten(getattr(learner, name)) if isinstance(t, torch.Tensor)]
        assert tensors and all(t.device.type == "meta" for t in tensors), name


def flatten(value) -> list:
    return [t for each in value.values() for t in flatten(each)] if isinstance(value, dict) else [value]


def test_learned_phi_is_the_average_over_the_end():
    run, phi = training("digits-noise", average=0.5), []
    real = run.best.meta_step
    run.best.meta_step = lambda progress: (
        real(progress),
        phi.append((progress, flat(dict(run.best.meta.named_parameters())))),
    )
    run.run()
    late = [p for progress, p in phi if progress >= 0.5]
    assert 1 < len(late) < len(phi)
    torch.testing.assert_close(flat(dict(run.best.learned().named_parameters())), torch.stack(late).mean(0))
    assert not torch.equal(flat(dict(run.best.learned().named_parameters())), phi[-1][1])


@pytest.mark.parametrize("losses", [[3.0, 1.0, 2.0], [1.0, 2.0, 3.0], [2.0, 3.0, 1.0]])
def test_the_particle_with_the_lowest_recent_validation_loss_stays(monkeypatch, losses):
    def meta_step(self, progress):  # the very last loss says something else: it is one of ten
        self.recent = [losses[self.number]] * 9 + [10 - losses[self.number]]
        self.losses["pretrain_loss"] = 1.0

    monkeypatch.setattr(metapt.Learner, "pretrain_step", lambda self, progress: None)
    monkeypatch.setattr(metapt.Learner, "meta_step", meta_step)
    run, seen = training("digits-rotation", particles="3,2,1", rounds="0.4,0.8,1", steps=52, warmup=12), []
    for learner in run.learners:
        learner.losses["pretrain_loss"] = 1.0
    run.run(each=lambda run: seen.append((run.step, [learner.number for learner in run.learners])))
    order = sorted(range(3), key=lambda number: losses[number])
    for step, numbers in seen:
        share = (step - 12) / 40
        assert set(numbers) == set(order[: 3 if share <= 0.4 else 2 if share <= 0.8 else 1])
    assert run.best.number == order[0]


def test_particles_start_alike_and_the_better_ones_stay():
    run = training("digits-rotation")
    first, *others = run.learners
    assert len(others) == 2
    for other in others:
        assert torch.equal(flat(dict(first.network.named_parameters())), flat(dict(other.network.named_parameters())))
        assert first.meta.rotation_mean_deg.item() == other.meta.rotation_mean_deg.item()
        assert other.optimizer.param_groups[0]["params"][0] is next(other.network.parameters())
    numbers, means = [], []

    def each(run):
        numbers.append(len(run.learners))
        means.append({learner.number: np.mean(learner.recent) for learner in run.learners if learner.recent})

    run.run(each)
    assert (numbers[0], numbers[-1]) == (3, 1)
    last = means[numbers.index(1) - 1]  # before the meta step that ended the round
    assert set(last) == {0, 1, 2}
    assert len({round(value, 9) for value in last.values()}) == 3  # they have come apart


# ---------------------------------------------------------------------------------------------------------------------
# Resuming
# ---------------------------------------------------------------------------------------------------------------------


def outcome(folder: Path) -> tuple:
    summary = json.loads((folder / "summary.json").read_text())
    for name in ("seconds", "training_seconds"):
        del summary[name]
    return summary, (folder / "metrics.jsonl").read_text()


@pytest.mark.parametrize("domain", TINY)
def test_a_stopped_run_goes_on_to_the_same_end(domain, tmp_path):
    """Stopped after every checkpoint there is, in turn, with metrics that run on past it."""
    settings = metapt.settings_of(domain, TINY[domain])
    made = metapt.make_domain(domain, settings, torch.device("cpu"), Path("data"))
    whole = metapt.Training(made, settings, True).run()

    class Stop(Exception):
        pass

    def save_and_stop(run):
        (tmp_path / "metrics.jsonl").write_text("kept\n")
        metapt.Run(tmp_path).save(run, domain)
        (tmp_path / "metrics.jsonl").write_text("kept\nmore")
        raise Stop

    run, stops = metapt.Training(made, settings, True), 0
    while True:
        try:
            run.run(at_checkpoint=save_and_stop)
            break
        except Stop:
            stops += 1
            torch.manual_seed(12345)
            run = metapt.Training(made, settings, True)
            metapt.Run(tmp_path).restore(run, domain)
            assert (tmp_path / "metrics.jsonl").read_text() == "kept\n"
    assert stops >= 3
    for name in ("network", "meta"):
        one, other = (flat(dict(getattr(r.best, name).named_parameters())) for r in (whole, run))
        assert torch.equal(one, other)
    assert torch.equal(flat(whole.best.psi), flat(run.best.psi))
    assert torch.equal(
        flat(dict(whole.best.learned().named_parameters())), flat(dict(run.best.learned().named_parameters()))
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(number, tmp_path):
    given = {**TINY["digits-noise"], "checkpoint_every": 1000, "steps": 301, "compare": 0}
    command = [sys.executable, metapt.__file__, "meta", "digits-noise", "--out", "run", *options(given)]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "run" / "metrics.jsonl")
    process.send_signal(number)
    message = process.communicate(timeout=60)[1]
    assert process.returncode == 1, message
    assert len(message.strip().splitlines()) == 1
    assert "--resume run" in message
    assert (tmp_path / "run" / "checkpoint.pt").exists()
    resumed = summary_of(tmp_path, "meta", "--resume", "run")
    summary_of(tmp_path, "meta", "digits-noise", "--out", "whole", *options(given))
    assert resumed["pt_steps"] == 301
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def copied(run: Path, folder: Path) -> Path:
    folder.mkdir(parents=True)
    for path in run.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_a_finished_run_can_be_resumed_and_stays_the_same(runs, tmp_path):
    folder = copied(runs / "digits-rotation", tmp_path / "run")
    (folder / "summary.json").unlink()  # killed after the last checkpoint
    summary_of(tmp_path, "meta", "--resume", "run")
    assert outcome(folder) == outcome(runs / "digits-rotation")


@pytest.mark.parametrize("kept", [100, 0])
def test_metrics_shorter_than_the_checkpoint_says_leave_no_rubbish(kept, runs, tmp_path):
    """After a power cut: the checkpoint is flushed to the disk, the metrics are not."""
    folder = copied(runs / "digits-noise", tmp_path / "run")
    os.truncate(folder / "metrics.jsonl", kept)
    code, _, err = main_in(tmp_path, "meta", "--resume", "run")
    assert b"\0" not in (folder / "metrics.jsonl").read_bytes()
    assert code in (0, 2), err


def wait_for(path: Path, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not (path.exists() and path.stat().st_size):
        assert time.monotonic() < end, f"{path} did not come"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("domain", TINY)
def test_killed_at_random_moments_it_still_ends_the_same(domain, tmp_path):
    given = {**TINY[domain], "steps": 400, "checkpoint_every": 1}
    assert metapt_in(tmp_path, "meta", domain, "--out", "whole", *options(given)).returncode == 0
    random, kills = np.random.default_rng(0), 0
    arguments = ["--out", "killed", *options(given)]
    while kills < 10:
        command = [sys.executable, metapt.__file__, "meta", domain, *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
        )
        wait_for(tmp_path / "killed" / "config.json")
        time.sleep(random.uniform(0.5, 6.0) if kills else 5.0)
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills, arguments = kills + 1, ["--resume", "killed"]
    done = metapt_in(tmp_path, "meta", domain, "--resume", "killed")
    assert done.returncode == 0, done.stderr
    assert kills == 10
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------

BAD_OPTIONS = {
    "an unknown domain": ["meta", "digits-colour"],
    "an unknown option": ["meta", "--colour=1"],
    "an option of another domain": ["meta", "digits-rotation", "--noise=0.1"],
    "an angle for the noise domain": ["meta", "digits-noise", "--init-deg=3"],
    "no steps": ["meta", "--steps=0"],
    "steps that are no number": ["meta", "--steps=many"],
    "more warm-up than steps": ["meta", "--steps=10", "--warmup=20"],
    "no such solver": ["meta", "--solver=magic"],
    "no such device": ["meta", "--device=abacus"],
    "particles that grow": ["meta", "--particles=1,3", "--rounds=0.5,1"],
    "more particles than rounds": ["meta", "--particles=3,2,1", "--rounds=1"],
    "an infinite angle": ["meta", "--init-deg=inf"],
    "steps and epochs": ["meta", "--steps=10", "--epochs=1"],
    "mnist that is not there": ["meta", "mnist-rotation"],
    "a data set that is not there": ["download", "imagenet"],
    "a folder without the files": ["download", "mnist", "--from=nowhere"],
    "a run that is not there": ["meta", "--resume=nowhere"],
    "an encoder that is not there": ["finetune", "nowhere.pt", "--domain=digits-noise"],
    "phi that is not there": ["pretrain", "--phi=nowhere"],
    "nothing to evaluate": ["eval"],
    "an unknown command": ["train"],
    "negative steps": ["meta", "--steps=-5"],
    "a negative warm-up": ["meta", "--warmup=-1"],
    "a negative seed": ["meta", "--seed=-1"],
    "a seed beyond 32 bits": ["meta", "--seed=5000000000"],
    "a learning rate that is not a number": ["meta", "--lr=nan"],
    "noise of one": ["meta", "digits-noise", "--noise=1"],
    "particles that are no numbers": ["meta", "--particles=x", "--rounds=1"],
    "rounds that are no numbers": ["meta", "--particles=1", "--rounds=x"],
    "no particles": ["meta", "--particles=0", "--rounds=1"],
    "nystrom without damping": ["meta", "--solver=nystrom", "--terms=2", "--damping=0"],
    "a q carried to a solver that takes none": ["meta", "--solver=identity", "--carry-q"],
    "a device without numbers": ["meta", "--device=meta"],
    "a GPU that is not there": ["meta", "--device=cuda:99"],
    "another kind of device": ["meta", "--device=xpu"],
    "an infinite learning rate": ["meta", "--lr=inf"],
    "no such preset": ["meta", "--preset=magic"],
    "an infinite damping": ["meta", "--damping=inf"],
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_options_give_one_line_and_status_two(name, tmp_path):
    refused(tmp_path, *BAD_OPTIONS[name])
    assert not (tmp_path / "runs").exists()


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hostile-was-here",)


@pytest.mark.parametrize(
    "kind", ["torn", "nearly whole", "empty", "hostile", "foreign", "another domain", "other networks"]
)
def test_bad_checkpoints_are_refused_and_kept(kind, runs, tmp_path):
    folder = copied(runs / "digits-noise", tmp_path / "run")
    path = folder / "checkpoint.pt"
    whole = path.read_bytes()
    if kind in ("torn", "nearly whole", "empty"):
        path.write_bytes(whole[: {"torn": len(whole) // 2, "nearly whole": len(whole) - 50, "empty": 0}[kind]])
    elif kind == "another domain":
        path.write_bytes((runs / "digits-rotation" / "checkpoint.pt").read_bytes())
    elif kind == "other networks":
        content = torch.load(path, weights_only=True)
        content["learners"][0]["network"]["encoder.classifier.weight"] = torch.zeros(3, 3)
        torch.save(content, path)
    else:
        torch.save(
            {"hostile": Hostile(), "foreign": {"weight": torch.ones(3)}}[kind] if kind == "foreign" else Hostile(), path
        )
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    for arguments in (
        ["meta", "--resume", "run"],
        ["finetune", "run"],
        ["eval", "run"],
        ["pretrain", "digits-noise", "--phi", "run"],
    ):
        if kind == "other networks" and arguments[0] == "pretrain":
            continue  # its φ is whole
        assert "run" in refused(tmp_path, *arguments)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert not (tmp_path / "hostile-was-here").exists()


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"format": "metapt 1", "command": "meta", "domain": "x"}'])
def test_bad_configs_are_refused(content, runs, tmp_path):
    (tmp_path / "run").mkdir()
    if content is not None:
        (tmp_path / "run" / "config.json").write_text(content)
    assert "config.json" in refused(tmp_path, "meta", "--resume", "run")


@pytest.mark.parametrize("name", ["phi", "settings", "domain", "command", "format"])
def test_a_config_without_one_entry_is_refused(name, runs, tmp_path):
    folder = copied(runs / "digits-noise", tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    del config[name]
    (folder / "config.json").write_text(json.dumps(config))
    assert "config.json" in refused(tmp_path, "meta", "--resume", "run")


@pytest.mark.parametrize("name", ["learners", "random", "step", "metrics_bytes", "domain"])
def test_a_checkpoint_without_one_entry_is_refused(name, runs, tmp_path):
    folder = copied(runs / "digits-noise", tmp_path / "run")
    content = torch.load(folder / "checkpoint.pt", weights_only=True)
    torch.save({key: value for key, value in content.items() if key != name}, folder / "checkpoint.pt")
    metrics = (folder / "metrics.jsonl").read_bytes()
    assert "checkpoint.pt" in refused(tmp_path, "meta", "--resume", "run")
    assert (folder / "metrics.jsonl").read_bytes() == metrics


def test_a_checkpoint_without_any_learner_is_refused(runs, tmp_path):
    folder = copied(runs / "digits-noise", tmp_path / "run")
    content = torch.load(folder / "checkpoint.pt", weights_only=True)
    torch.save({**content, "learners": []}, folder / "checkpoint.pt")
    assert "holds no learner" in refused(tmp_path, "meta", "--resume", "run")
    assert "holds no encoder" in refused(tmp_path, "finetune", "run")


def test_phi_of_a_checkpoint_without_phi_is_refused(runs, tmp_path):
    folder = copied(runs / "digits-noise", tmp_path / "run")
    content = torch.load(folder / "checkpoint.pt", weights_only=True)
    del content["phi"]
    torch.save(content, folder / "checkpoint.pt")
    assert "checkpoint.pt" in refused(tmp_path, "pretrain", "digits-noise", "--phi", "run")


def test_the_paper_preset_is_algorithm_1_as_published():
    for domain in metapt.DOMAINS:
        settings = metapt.settings_of(domain, {}, "paper")
        assert (settings.meta_every, settings.unroll_steps) == (10, 1)
        assert settings.inverse == metapt.Solver("neumann", terms=1, alpha=settings.lr, seed=0)
        assert settings.plan == [(1, 1.0)]


def test_resume_refuses_another_domain(runs, tmp_path):
    copied(runs / "digits-noise", tmp_path / "run")
    assert "digits-noise" in refused(tmp_path, "meta", "mnist-noise", "--resume", "run")


def test_no_command_shows_the_help(tmp_path):
    code, out, err = main_in(tmp_path)
    assert code in (0, 2)
    assert "Usage" in out + err
    assert err.strip() != "metapt:"


def test_an_out_that_is_not_empty_is_kept(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for out in ("full", "file", "file/below"):
        assert out in refused(tmp_path, "meta", "--steps=5", "--warmup=0", "--out", out)
    assert (tmp_path / "full" / "mine").read_text() == (tmp_path / "file").read_text() == "precious"
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine"]


def test_export_and_out_are_checked_before_anything_is_written(runs, tmp_path):
    common = ["finetune", runs / "digits-noise", "--seeds=1", "--steps=3", "--sizes=30"]
    assert "nowhere" in refused(tmp_path, *common, "--export=nowhere/encoder.pt")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("precious")
    assert "not empty" in refused(tmp_path, *common, "--out=full", "--export=encoder.pt")
    assert not (tmp_path / "encoder.pt").exists()


@pytest.mark.parametrize("content", [Hostile(), [1], None, {1: 2}, {"layers.1.weight": "text"}])
def test_bad_encoder_files_are_refused(content, tmp_path):
    torch.save(content, tmp_path / "encoder.pt")
    assert "encoder.pt" in refused(tmp_path, "finetune", "encoder.pt", "--domain=digits-noise")
    assert not (tmp_path / "hostile-was-here").exists()


def test_other_refusals(runs, tmp_path):
    assert "--lr" in refused(runs, "meta", "--resume", "digits-noise", "--lr=0.5")
    assert "run of meta" in refused(runs, "pretrain", "--resume", "digits-noise")
    assert "not empty" in refused(runs, "meta", "--out", "digits-noise", "--steps=5", "--warmup=0")
    assert "domain" in refused(runs, "eval", "digits-noise", "digits-rotation")
    assert "domain" in refused(runs, "pretrain", "digits-rotation", "--phi", "digits-noise")
    assert "--sizes" in refused(runs, "finetune", "digits-noise", "--sizes=301")
    assert "--sizes" in refused(runs, "finetune", "digits-noise", "--sizes=ten")
    assert "--scope" in refused(runs, "finetune", "digits-noise", "--scope=tail")
    torch.save({"weight": torch.ones(3)}, tmp_path / "encoder.pt")
    assert "--domain" in refused(tmp_path, "finetune", "encoder.pt")
    assert "no encoder" in refused(tmp_path, "finetune", "encoder.pt", "--domain=digits-noise")
    assert "--lr" in refused(runs, "finetune", "digits-noise", "--lr=inf")
    torch.save(training("digits-noise").best.network.encoder.state_dict(), tmp_path / "encoder.pt")
    message = refused(tmp_path, "eval", "encoder.pt", "--domain=digits-noise", "--random-phi=1")
    assert "--random-phi" in message and not (tmp_path / "runs").exists()


# ---------------------------------------------------------------------------------------------------------------------
# The commands, end to end
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("domain", TINY)
def test_meta_prints_and_leaves_what_the_design_lists(domain, runs):
    summary = strict_json((runs / f"{domain}.out").read_text())  # one JSON object and nothing else
    folder = runs / domain
    assert summary == json.loads((folder / "summary.json").read_text())
    wanted = {"command", "domain", "seed", "device", "seconds", "pt_steps", "meta_steps", "skipped_meta_steps",
              "validation_loss", "phi", "comparison"}  # fmt: skip
    assert wanted <= set(summary)
    assert summary["pt_steps"] == TINY[domain]["steps"]
    assert {row["method"] for row in summary["comparison"]} == {
        "no_pretraining",
        "default_phi",
        "learned_phi",
        "online",
    }
    assert all(0 <= row["mean"] <= 1 and row["seeds"] == 1 for row in summary["comparison"])
    if domain == "digits-rotation":
        assert -180 <= summary["phi"]["rotation_mean_deg"] < 180
    else:
        assert summary["clean_to_noisy_weight_ratio"] > 0
        assert set(summary["phi"]["scores.1.weight"]) == {"shape", "mean", "min", "max"}
    figures = {"phi.png", "losses.png", "comparison.png"} | ({"weights.png"} if domain == "digits-noise" else set())
    assert {p.name for p in folder.iterdir()} == figures | {
        "config.json",
        "metrics.jsonl",
        "checkpoint.pt",
        "summary.json",
    }
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == TINY[domain]["steps"]


def test_same_command_same_numbers_and_learned_phi_frozen(runs, tmp_path):
    given = TINY["digits-rotation"]
    assert main_in(tmp_path, "meta", "--out", "again", *options(given))[0] == 0
    assert outcome(tmp_path / "again") == outcome(runs / "digits-rotation")
    learned = outcome(runs / "digits-rotation")[0]["phi"]["rotation_mean_deg"]
    summary = summary_of(tmp_path, "pretrain", "--phi", "again", "--out", "frozen", *options(given))
    assert summary["phi"]["rotation_mean_deg"] == learned
    assert summary["meta_steps"] == 0
    assert [row["method"] for row in summary["comparison"][::3]] == ["no_pretraining", "learned_phi"]


def test_finetune_exports_an_encoder_that_it_takes_back(runs, tmp_path):
    common = ["--seeds=2", "--steps=20", "--sizes=30,60"]
    rows = summary_of(tmp_path, "finetune", runs / "digits-noise", "--export", "encoder.pt", *common)["comparison"]
    again = summary_of(tmp_path, "finetune", "encoder.pt", "--domain=digits-noise", *common)["comparison"]
    assert all(isinstance(t, torch.Tensor) for t in torch.load(tmp_path / "encoder.pt", weights_only=True).values())
    assert [row["mean"] for row in rows] == [row["mean"] for row in again]
    assert [(row["method"], row["ft_examples"]) for row in rows] == [
        ("online", 30), ("online", 60), ("no_pretraining", 30), ("no_pretraining", 60)]  # fmt: skip
    every = summary_of(tmp_path, "finetune", runs / "digits-noise", "--scope=all", "--lr=0.01", *common)["comparison"]
    assert every != rows


def test_eval_pairs_runs_by_seed(runs):
    given = {k: v for k, v in TINY["digits-noise"].items() if k != "carry_q"}
    assert main_in(runs, "pretrain", "digits-noise", "--out", "baseline", *options(given))[0] == 0
    common = ["--seeds=4", "--steps=20", "--sizes=60"]
    summary = summary_of(runs, "eval", "baseline", "digits-noise", "--random-phi=2", *common)
    assert [row["method"] for row in summary["comparison"]] == ["default_phi", "online", "no_pretraining", "random_phi"]
    settings = metapt.settings_of("digits-noise", TINY["digits-noise"])
    made = metapt.make_domain("digits-noise", settings, torch.device("cpu"), Path("data"))
    scores = {}
    for name in ("baseline", "digits-noise"):
        network = metapt.load_subject(runs / name, None, torch.device("cpu"), Path("data")).network
        scores[name] = np.array([metapt.finetune(made, network, 60, seed, "head", 1e-2, 20).score for seed in range(4)])
    d = scores["digits-noise"] - scores["baseline"]
    half = 3.182446305284263 * d.std(ddof=1) / 2  # Student's t, 0.975, 3 degrees of freedom; √4
    row = next(row for row in summary["differences"] if row["method"] == "online")
    assert row["versus"] == "default_phi"
    assert [row["mean"], row["low"], row["high"]] == pytest.approx([d.mean(), d.mean() - half, d.mean() + half])


def test_finetune_leaves_the_encoder_as_it_was_and_keeps_to_its_examples():
    made = training("digits-noise").domain
    torch.manual_seed(0)
    network = made.network()
    before = flat(network.state_dict())
    asked = []
    real = made.inputs
    made.inputs = lambda part, index: (asked.append((part, index)), real(part, index))[1]
    metapt.finetune(made, network, 10, 0, "all", 1e-3, 5)
    assert torch.equal(flat(network.state_dict()), before)
    assert len(torch.cat([index for part, index in asked if part == "finetune"]).unique()) == 10


def test_eval_of_runs_with_one_folder_name_shows_both(runs, tmp_path):
    common = ["--seeds=2", "--steps=3", "--sizes=30"]
    for name in ("one", "other"):
        copied(runs / "digits-noise", tmp_path / name / "run")
    summary = summary_of(tmp_path, "eval", "one/run", "other/run", *common)
    assert len(summary["comparison"]) == 3
    assert summary["differences"][0]["mean"] == 0


@pytest.mark.parametrize("noise", [0, 0.9999])
def test_with_no_label_wrong_or_none_right_the_summary_is_still_json(noise, tmp_path):
    given = {**TINY["digits-noise"], "steps": 20, "compare": 0, "noise": noise}
    summary = summary_of(tmp_path, "meta", "digits-noise", "--out=run", *options(given))
    assert summary["clean_to_noisy_weight_ratio"] is None
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        strict_json(line)


def test_rotations_without_spread_are_allowed_or_refused(tmp_path):
    given = {**TINY["digits-rotation"], "steps": 40, "compare": 0, "spread_deg": 0}
    code, _, err = main_in(tmp_path, "meta", "--out=run", *options(given))
    assert code in (0, 2), err


@pytest.mark.parametrize("command", ["download", "pretrain", "meta", "finetune", "eval"])
def test_help_tells_defaults(command, tmp_path):
    with mock.patch.dict(os.environ, {"COLUMNS": "400"}):
        code, out, _ = main_in(tmp_path, command, "--help")
    assert code == 0
    for line in out.splitlines():
        if re.search(r"--(?!help)[a-z-]+ +(INTEGER|FLOAT|TEXT|PATH|DIRECTORY)", line):
            optional = re.search(r"--(phi|resume|from|export|epochs|domain) ", line)  # nothing unless given
            assert "default" in line or optional, line


@pytest.mark.cuda
def test_a_short_meta_run_on_cuda(tmp_path):
    done = metapt_in(tmp_path, "meta", "--device=cuda", "--json", *options(TINY["digits-rotation"]))
    assert json.loads(done.stdout)["device"] == "cuda"


# ---------------------------------------------------------------------------------------------------------------------
# The project around it
# ---------------------------------------------------------------------------------------------------------------------


def test_script_metadata_agrees_with_the_requirements():
    text = (ROOT / "metapt.py").read_text()
    block = re.search(r"^# /// script\n((?:#.*\n)+?)# ///$", text, re.MULTILINE).group(1)
    metadata = tomllib.loads("".join(line[2:] for line in block.splitlines(keepends=True)))
    requirements = (ROOT / "requirements.txt").read_text().split()
    assert set(metadata["dependencies"]) < set(requirements)
    assert "torch==2.13.0" in requirements
    assert all(re.search("[<=]", line) for line in requirements)


def test_readme_commands_and_example():
    if not (ROOT / "README.md").exists():
        pytest.skip("no README.md yet")
    readme = (ROOT / "README.md").read_text()
    for command in (
        "pip install -r requirements.txt && python metapt.py meta",
        "pip install -r requirements.txt && pytest",
    ):
        assert command in readme.splitlines()
    for link in re.findall(r"\((bench/figures/[^)]+)\)", readme):
        assert (ROOT / link).exists(), link
    (example,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len(example.splitlines()) <= 27
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", example], check=False, capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
