"""Faults: files that were damaged or altered, disks that are full, two processes in one run, kills at any moment."""

import contextlib
import errno
import io
import json
import mmap
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import write_graphs, write_mnist, write_ptbxl
from tools import ROOT, contents, main_in, outcome, refused, rewrite, summary_of, toy_file

import metapt

sys.path.append(str(ROOT / "data_scripts"))

import files

QUICK = ["--steps=16", "--compare=0"]
MEASURE = ["--compare=1", "--measure-steps=2", "--sizes=5"]
NONE = object()  # in place of a value: the key is removed
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a run of a toy domain that has two checkpoints; not to be changed."""
    folder = tmp_path_factory.mktemp("home")
    toy_file(folder / "toy.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metapt, "CHECKPOINT_EVERY", 2)
        code, _, err = main_in(folder, "meta", "toy.py", "--out=run", *QUICK)
    assert code == 0, err
    return folder


@pytest.fixture
def run(home, tmp_path):
    """A copy of the run, and nothing beside it."""
    return Path(shutil.copytree(home / "run", tmp_path / "run"))


def altered(content, path: str, value) -> None:
    """Sets, at a path such as learners/0/psi/bias, a value, or what a function makes of the one there."""
    *parents, last = (int(key) if key.isdecimal() else key for key in path.split("/"))
    for key in parents:
        content = content[key]
    if value is NONE:
        del content[last]
    else:
        content[last] = value(content[last]) if callable(value) else value


# Altered, with checksums that are right: only a look at each value can tell

CONFIG = [
    *(("format", value) for value in ("metapt 2", 3, None, NONE)), *(("command", value) for value in ("finetune", [], NONE)),
    *(("domain", value) for value in (3, "nothing", "a\0b.py", "\ud800.py", "x" * 5000 + ".py", ["toy.py"], NONE)),
    ("domain_sha256", 3), ("domain_sha256", "0" * 64), ("phi", 3), ("phi", NONE), ("device", None), ("device", "abacus"),
    ("torch", 2.13), ("torch", NONE), ("data", 3), ("data", "0" * 64), ("colour", 1), ("settings", []), ("settings", NONE),
    *((f"settings/{name}", value) for name, value in [
        ("particles", 3), ("particles", "1" * 5000), ("particles", "2"), ("sizes", "30,,60"), ("sizes", "9" * 5000), ("sizes", 30),
        ("seed", 1.5), ("seed", -1), ("seed", True), ("batch_size", 64.0), ("batch_size", 0), ("batch_size", "64"), ("steps", -7),
        ("steps", None), ("warmup", 10**9), ("lr", NAN), ("lr", INF), ("lr", 1e38), ("lr", 10**400), ("lr", "fast"), ("cosine", 1),
        ("meta_lr", 1e38), ("solver", "magic"), ("solver", 3), ("terms", -1), ("terms", NONE), ("alpha", "x"), ("hvp", None),
        ("hvp_step", -1.0), ("average", 1.0), ("unroll_scope", "tail"), ("jitter", -1.0), ("jitter", [0.1]), ("colour", 1)])]  # fmt: skip


@pytest.mark.parametrize(("path", "value"), CONFIG, ids=lambda part: "none" if part is NONE else repr(part)[:20])
def test_an_altered_config_is_refused_by_its_key(path, value, run, tmp_path):
    rewrite(run, lambda config: altered(config, path, value))
    before = contents(run)
    message = refused(tmp_path, "meta", "--resume=run")
    key = path.rpartition("/")[2]
    if value == "0" * 64 and path == "domain_sha256":
        assert "toy.py has changed since" in message
    elif len(str(value)) < 5000 or "/" in path:
        assert key in message or metapt.flag(key) in message or (key == "solver" and "Solver.method" in message)
        assert "config.json" in message or path == "data"
    assert contents(run) == before and set(os.listdir(tmp_path)) == {"run"}


OTHER = torch.zeros(3, 3)
CHECKPOINT = [
    *(("step", value) for value in ("5", -7, NAN, 10**6, 5.0, True, None, NONE)), ("seconds", "x"), ("seconds", NONE),
    *(("metrics_bytes", value) for value in (-1, "3", 1.5, NONE)), *(("format", value) for value in ("metapt 2", 3, NONE)),
    *(("learners", value) for value in ([], {}, None, [3], NONE, lambda it: [*it, *it])), ("colour", 1), ("config", "0" * 64),
    *(("random", value) for value in (OTHER, "x", NONE)), ("cuda_random", None), ("phi", NONE),
    *((f"learners/0/{name}", value) for name, value in [
        ("psi", {}), ("psi/weight", OTHER), ("psi/weight", NONE), ("psi/weight", lambda it: it.double()), ("psi/bias", "x"),
        ("psi/weight", lambda it: it * NAN), ("psi/weight", lambda it: it.to_sparse()), ("psi/more", OTHER), ("psi", [OTHER]),
        *((name, lambda it: it.to("meta")) for name in ("psi/weight", "streams/meta/0", "optimizer/state/0/step")),
        ("network", {}), ("network/head.bias", OTHER), ("network/head.bias", NONE), ("network/head.bias", lambda it: it / 0),
        ("network/encoder.1.num_batches_tracked", 3), ("network/more", OTHER), ("meta/weight", OTHER), ("meta/weight", NONE),
        ("optimizer", []), ("optimizer", NONE), ("ft_states", None), ("average", [1]), ("average/n_averaged", torch.tensor(-1)), ("average/module.weight", OTHER),
        ("recent", None), ("skipped", "0"), ("meta_steps", -1), ("number", None), ("losses", {}), ("losses/residual", "x"),
        ("losses/more", 1.0), ("streams", {}), ("streams/meta/1", 99_999), ("streams/meta/1", -1), ("streams/meta/1", "0"),
        ("streams/pretrain/0", OTHER), ("streams/pretrain/0", lambda it: it.float()), ("streams/pretrain", lambda it: it[:1]),
        ("colour", 1)]),
    *((f"learners/0/optimizer/{name}", value) for name, value in [
        ("param_groups/0/betas", NONE), ("param_groups/0/lr", NAN), ("param_groups/0/lr", "x"), ("state/0/exp_avg", torch.ones(3, 3)),
        ("state/0/step", torch.tensor(-5.0)), ("state/0/exp_avg_sq", lambda t: t * NAN), ("state/0/exp_avg", NONE)]),
    ("learners/0/optimizer", {}), ("learners/0/meta_optimizer/param_groups/0/initial_lr", "x"), ("learners/0/ft_states/head", {"a": 1}), ("learners/0/ft_states/head/step", -1),
    ("learners/0/average", {"a": torch.ones(1)}), ("learners/0/recent", ["x"]), ("random", lambda t: t * 0 + 255),
    ("learners/0/streams/pretrain/0", lambda t: t * 0 + 1), ("learners/0/streams/pretrain/0", lambda t: t + 10**9),
]  # fmt: skip


def in_lists(content):
    return [in_lists(each) for each in content] if isinstance(content, tuple) else (
        {name: in_lists(each) for name, each in content.items()} if isinstance(content, dict) else content)  # fmt: skip


@pytest.mark.parametrize(("path", "value"), CHECKPOINT, ids=lambda part: "none" if part is NONE else repr(part)[:20])
def test_an_altered_checkpoint_is_refused_by_its_key(path, value, run, tmp_path):
    def change(content):
        for learner in content["learners"]:
            learner["streams"] = in_lists(learner["streams"])
        altered(content, path, value)

    rewrite(run, checkpoint=change)
    before = contents(run)
    message = refused(tmp_path, "meta", "--resume=run")
    assert path.replace("/", ".") in message or (path == "config" and "config.json has changed" in message)
    assert "checkpoint.pt" in message
    if "network" in path:
        assert "checkpoint.pt holds no encoder" in refused(tmp_path, "finetune", "run", *MEASURE)
    assert contents(run) == before and set(os.listdir(tmp_path)) == {"run"}


def test_a_folder_of_the_users_is_not_touched(tmp_path):
    (mine := tmp_path / "mine").mkdir()
    files = {".metapt-notes.txt": b"mine", "checkpoint.previous.pt": b"too"}
    for name, content in files.items():
        (mine / name).write_bytes(content)
    toy_file(tmp_path / "toy.py")
    assert "is not empty" in refused(tmp_path, "meta", "toy.py", "--out=mine", *QUICK)
    assert contents(mine) == files


def test_what_a_domain_may_measure_and_keep_is_no_fault(tmp_path):
    """A figure that comes later and is a bool, and a buffer that is not finite."""
    toy_file(
        tmp_path / "toy.py",
        """

class Masked(Toy):
    def network(self):
        network = super().network()
        network.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))
        return network

    def measure(self, meta):
        self.calls = getattr(self, "calls", 0) + 1
        return {"weight": 1.0} | ({"converged": False} if self.calls > 2 else {})
""",
    )
    code, _, err = main_in(tmp_path, "meta", "toy.py:Masked", "--out=run", *QUICK)
    assert code == 0, err
    assert main_in(tmp_path, "meta", "--resume=run")[0] == 0


@pytest.mark.parametrize("content", ["{}", "[]", "3", '{"chosen": 3}', "{"])
def test_a_damaged_summary_is_refused_or_without_a_choice(content, run, tmp_path):
    (run / "summary.json").write_text(content)
    toy_file(tmp_path / "toy.py")
    rewrite(run, lambda config: config.update(domain=f"{tmp_path / 'toy.py'}:Toy"))
    arguments = ("pretrain", "toy.py", "--phi=run", "--compare=0", "--out=afresh")
    if content == "{}":  # as without a comparison
        assert main_in(tmp_path, *arguments)[0] == 0
    else:
        assert "summary.json cannot be read" in refused(tmp_path, *arguments)


@pytest.mark.parametrize("lost", ["minified", "removed"])
def test_a_file_of_a_run_is_kept_also_where_its_config_is_not_as_written(lost, home, run, tmp_path):
    config = run / "config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()), separators=(",", ":"))
    ) if lost == "minified" else config.unlink()
    before = contents(run)
    shutil.copytree(home / "run", tmp_path / "other")
    assert refused(tmp_path, "finetune", "other", "--export=run/checkpoint.pt", "--force", *MEASURE)
    assert contents(run) == before


ABOUT = {
    "ppi": [*((name, value) for name in ("graphs", "nodes", "edges", "tasks") for value in (-1, "60", 59, 300.0, True, None, NONE)),
            *(("finetune_terms", value) for value in (True, 60, -1, None, NONE)), ("terms", NONE), ("terms", 3), ("terms", ["GO:1"]),
            ("arrays", {}), ("arrays", []), ("arrays/sizes", 3), ("arrays/sizes", NONE), ("arrays/more", {}), ("arrays/sizes/dtype", "<f4"),
            ("arrays/sums/shape", [10]), ("arrays/sums/shape", "x"), ("arrays/sums/sha256", NONE), ("arrays/sums/sha256", "x"), ("format", "x"), ("source", 3),
            ("licence", NONE), ("colour", 1)],
    "ecg": [("hertz", 0), ("hertz", "100"), ("hertz", NONE), ("leads", 12), ("leads", []), ("leads", list(range(12))), ("leads", ["I"] * 12), ("classes", 5),
            ("records", 19), ("records", 20.0), ("samples", 999), ("left_out", 3), ("left_out", [3]), ("arrays/gain/shape", [20, 11]), ("colour", 1)],
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Prepared data of `ppi` and `ecg`, by the scripts themselves; not to be changed."""
    folder = tmp_path_factory.mktemp("data")
    write_graphs(folder / "data" / "ppi" / "published", 40)
    source = write_ptbxl(folder / "ptbxl", 20)
    assert main_in(folder, "download", "ecg", "--from", source)[0] == 0
    return folder / "data"


@pytest.mark.parametrize(("name", "path", "value"), [(name, *each) for name in ABOUT for each in ABOUT[name]],
                         ids=lambda part: "none" if part is NONE else repr(part)[:20])  # fmt: skip
def test_an_altered_about_is_refused_by_its_key(name, path, value, data, tmp_path):
    folder = {"ppi": "ppi/published", "ecg": "ecg/prepared"}[name]
    shutil.copytree(data / folder, tmp_path / "data" / folder)
    about = tmp_path / "data" / folder / "about.json"
    altered(content := json.loads(about.read_text()), path, value)
    about.write_text(json.dumps(content))
    message = refused(tmp_path, "meta", name, "--width=1", "--steps=1", "--warmup=0", "--compare=0", "--out=run")
    assert folder in message and f"metapt.py download {name}" in message
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_only_with_leads_classes_and_rate_as_they_were(data, tmp_path):
    about = Path(shutil.copytree(data / "ecg", tmp_path / "data" / "ecg")) / "prepared" / "about.json"
    given = ["--width=1", "--steps=1", "--warmup=0", "--compare=0", "--test-folds=1", "--out=run"]
    assert main_in(tmp_path, "meta", "ecg", *given, "--batch-size=4", "--meta-batch-size=4")[0] == 0
    content = json.loads(about.read_text())
    for change in (
        {"leads": content["leads"][::-1]},
        {"classes": [*content["classes"][1:], content["classes"][0]]},
        {"hertz": 50},
    ):
        about.write_text(json.dumps(content | change))
        for command in (["meta", "--resume=run"], ["finetune", "run", "--compare=1", "--measure-steps=2"]):
            assert "run was trained on other data" in refused(tmp_path, *command)
    about.write_text(json.dumps(content))
    assert main_in(tmp_path, "meta", "--resume=run")[0] == 0


DEEP = ["", "{", "[]", "3", "null", '"text"', "[" * 200_000, '{"a":' * 200_000, b"\xff\xfe", b"\0" * 99, "9" * 5000]


@pytest.mark.parametrize("content", DEEP, ids=lambda content: repr(content)[:12])
def test_files_of_json_that_hold_something_else_are_refused(content, run, data, tmp_path):
    content = content if isinstance(content, bytes) else content.encode()
    first = (run / "metrics.jsonl").read_bytes().partition(b"\n")[0]
    if 0 < len(content) <= len(first) and b"\n" not in content:
        (run / "metrics.jsonl").write_bytes(
            content.ljust(len(first)) + (run / "metrics.jsonl").read_bytes()[len(first) :]
        )
        assert "metrics.jsonl: line 1 is no row" in refused(tmp_path, "meta", "--resume=run")
    (run / "config.json").write_bytes(content)
    assert "config.json is not what this metapt writes" in refused(tmp_path, "meta", "--resume=run")
    folder = Path(shutil.copytree(data / "ppi", tmp_path / "data" / "ppi")) / "published"
    (folder / "about.json").write_bytes(content)
    assert "about.json is not what" in refused(tmp_path, "meta", "ppi")


# Damaged


def flip(content: bytearray, place: int) -> None:
    content[place] ^= 1


def zeros(content: bytearray, place: int) -> None:
    content[place : place + 512] = bytes(len(content[place : place + 512]))


@pytest.mark.parametrize("damage", [flip, zeros, lambda content, place: content.__delitem__(slice(place, None))])
@pytest.mark.parametrize("share", [0, 0.3, 0.6, 0.9, 1])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_goes_on_to_the_same_end(damage, share, home, run, tmp_path):
    content = bytearray((run / "checkpoint.pt").read_bytes())
    damage(content, round(share * (len(content) - 2)))
    (run / "checkpoint.pt").write_bytes(content)
    phi = ["pretrain", home / "toy.py", "--phi=run", *QUICK]
    for command in (["meta", "--resume=run"], ["finetune", "run", *MEASURE], ["eval", "run", *MEASURE], phi):
        message = refused(tmp_path, *command)
        assert "run/checkpoint.pt is missing or damaged" in message
        assert "rename checkpoint.previous.pt to checkpoint.pt, and --resume " in message
    (run / "checkpoint.previous.pt").replace(run / "checkpoint.pt")
    (run / "summary.json").unlink()
    assert main_in(tmp_path, "meta", "--resume=run")[0] == 0
    assert outcome(run) == outcome(home / "run")
    (run / "checkpoint.pt").write_bytes(content)
    (run / "checkpoint.previous.pt").write_bytes(content)
    assert "its end: so is checkpoint.previous.pt" in refused(tmp_path, "meta", "--resume=run")
    (run / "checkpoint.previous.pt").unlink()
    assert "there is none before it" in refused(tmp_path, "meta", "--resume=run")


def test_a_run_whose_checkpoint_is_lost_is_not_begun_again(home, run, tmp_path, monkeypatch):
    """But one that was killed before its first checkpoint is, though it has metrics."""
    (run / "checkpoint.pt").unlink()
    for name, says in (
        ("checkpoint.previous.pt", "rename checkpoint.previous.pt"),
        ("summary.json", "there is none before it"),
    ):
        before = contents(run)
        message = refused(tmp_path, "meta", "--resume=run")
        assert "checkpoint.pt is missing or damaged" in message and says in message
        assert contents(run) == before
        (run / name).unlink()
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"torn')
    with monkeypatch.context() as patch:
        patch.setattr(metapt, "CHECKPOINT_EVERY", 2)
        assert "there is none before it" in refused(tmp_path, "meta", "--resume=run")
    lines = (run / "metrics.jsonl").read_bytes().splitlines(True)
    (run / "metrics.jsonl").write_bytes(b"".join(lines[:2]))
    monkeypatch.setattr(metapt, "CHECKPOINT_EVERY", 2)
    for path in {*run.iterdir()} - {run / "config.json", run / "metrics.jsonl"}:
        path.unlink()
    assert main_in(tmp_path, "meta", "--resume=run")[0] == 0
    assert outcome(run) == outcome(home / "run")


def test_a_config_that_was_changed_is_refused_though_it_could_be(run, tmp_path):
    config = json.loads((run / "config.json").read_text())
    altered(config, "settings/jitter", 0.2)
    (run / "config.json").write_text(json.dumps(config))
    for command in (["meta", "--resume=run"], ["finetune", "run", *MEASURE], ["eval", "run", *MEASURE]):
        assert "config.json has changed since run/checkpoint.pt was made" in refused(tmp_path, *command)


ROWS = [
    "rubbish",
    "[]",
    "3",
    "{}",
    '{"step": 3}',
    '{"step": "3", "particle": 0}',
    '{"step": -3, "particle": 0}',
    b"\xff",
]


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("line", [0, -1])
def test_metrics_of_another_kind_are_refused_before_anything_is_changed(line, row, run, tmp_path):
    lines = (run / "metrics.jsonl").read_bytes().splitlines()
    lines[line] = (row if isinstance(row, bytes) else row.encode()).ljust(len(lines[line]))
    (run / "metrics.jsonl").write_bytes(b"".join(each + b"\n" for each in lines))
    before = contents(run)
    assert f"metrics.jsonl: line {1 if line == 0 else len(lines)} is no row" in refused(
        tmp_path, "meta", "--resume=run"
    )
    assert contents(run) == before


# Numbers that cannot be


@pytest.mark.parametrize("option", ["lr", "meta-lr", "unroll-lr", "measure-lr", "meta-lr-decay", "damping", "jitter"])
def test_numbers_beyond_float32_are_refused(option, home, tmp_path):
    for value in ("1e38", "1e300", "inf", "nan"):
        message = refused(tmp_path, "meta", home / "toy.py", f"--{option}={value}", *QUICK)
        assert f"--{option} is " in message and "expected a finite number, at most 1e30 in size" in message


@pytest.mark.parametrize("given", [["--lr=1e30"], ["--meta-lr=1e30"], ["--unroll-lr=1e30"]])
def test_a_run_that_leaves_all_numbers_ends_in_one_line_or_goes_on(given, home, tmp_path):
    code, out, err = main_in(tmp_path, "meta", home / "toy.py", "--out=run", "--json", *given, *QUICK)
    if code:
        last = err.strip().splitlines()[-1]
        assert code == 1 and last.startswith("metapt: ") and "finite" in last and "may help" in last
    else:
        json.loads(out, parse_constant=pytest.fail)


def test_a_state_that_is_not_finite_is_not_saved(home, tmp_path, monkeypatch):
    """Also after the very last step, which no loss is measured after."""
    real = metapt.Learner.pretrain_step

    def pretrain_step(self, progress):
        real(self, progress)
        if progress >= 11 / 12:
            next(self.network.parameters()).data.fill_(NAN)

    monkeypatch.setattr(metapt.Learner, "pretrain_step", pretrain_step)
    code, _, err = main_in(tmp_path, "meta", home / "toy.py", "--out=run", "--json", *QUICK)
    assert (
        code == 1
        and "no checkpoint at PT step 16" in err
        and "learners.0.network.encoder.0.weight is not finite" in err
    )
    assert not (tmp_path / "run" / "checkpoint.pt").exists() and not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize("labels", [
    lambda all_of_them: 0 * all_of_them, lambda all_of_them: np.maximum(all_of_them, 1),
    lambda all_of_them: np.where(np.arange(60_000) > 0, np.maximum(all_of_them, 1), 0), lambda all_of_them: all_of_them + 1,
], ids=["alike", "no 0", "one 0", "a 10"])  # fmt: skip
def test_labels_of_mnist_that_cannot_be_are_refused(labels, tmp_path):
    write_mnist(tmp_path / "data" / "mnist" / "prepared", labels(np.arange(60_000) % 10))
    assert "the labels are not 100 or more of each digit" in refused(tmp_path, "meta", "mnist-rotation", *QUICK)


@pytest.mark.parametrize(("name", "array", "value"), [
    ("ecg", "labels", 2), ("ecg", "gain", 1e-30), ("ecg", "gain", NAN), ("ecg", "baseline", 1e20), ("ecg", "fold", -1), ("ecg", "sums", NAN),
    ("ppi", "centre", 99), ("ppi", "centre", -1), ("ppi", "sizes", 0), ("ppi", "degrees", -1), ("ppi", "source", 65_535), ("ppi", "sums", 77),
])  # fmt: skip
def test_arrays_with_a_value_that_cannot_be_are_refused(name, array, value, data, tmp_path):
    folder = {"ppi": "ppi/published", "ecg": "ecg/prepared"}[name]
    shutil.copytree(data / folder, tmp_path / "data" / folder)
    values = np.load(tmp_path / "data" / folder / f"{array}.npy", mmap_mode="r+")
    values[:] = value
    assert array in refused(tmp_path, "meta", name, "--width=1", "--steps=1", "--warmup=0", "--compare=0")


def test_an_edge_from_another_graph_is_refused_when_it_is_read(data, tmp_path):
    folder = Path(shutil.copytree(data / "ppi", tmp_path / "data" / "ppi")) / "published"
    sizes, degrees = (np.load(folder / f"{name}.npy") for name in ("sizes", "degrees"))
    graph = np.flatnonzero(degrees)[0]
    np.load(folder / "source.npy", mmap_mode="r+")[degrees[:graph].sum()] = sizes[graph]
    kind = metapt.find_domain("ppi")
    domain = kind(kind.Settings(), torch.device("cpu"), tmp_path / "data")
    with pytest.raises(metapt.BadInput, match="source.npy and sums.npy do not fit"):
        domain.graphs.batch(torch.tensor([graph, graph + 1]))


# An error of the program, or of the machine, is not called bad input


@pytest.mark.parametrize("where", ["meta", "network", "head", "inputs"])
def test_an_error_while_a_training_is_made_is_not_said_to_be_of_the_input(where, home, run, tmp_path, monkeypatch):
    kind = metapt.find_domain(str(home / "toy.py"))
    commands = (
        ["meta", home / "toy.py", *QUICK],
        ["pretrain", home / "toy.py", "--phi=run", *QUICK],
        ["meta", "--resume=run"],
    )

    def throw(error):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(kind, where, lambda *_: throw(RuntimeError("an illegal memory access was encountered")))
        for command in commands:
            with (
                monkeypatch.context() as words,
                contextlib.chdir(tmp_path),
                pytest.raises(RuntimeError, match="illegal"),
            ):
                words.setattr("sys.argv", ["metapt.py", *map(str, command)])
                metapt.main()
    for says, exhaust in {
        "CUDA out of memory": lambda: throw(torch.OutOfMemoryError("CUDA out of memory")),
        "you tried to allocate": lambda: torch.empty(10**15), "Unable to allocate": lambda: np.empty(10**15),
        "out of memory": lambda: bytearray(10**17), "Cannot allocate memory": lambda: mmap.mmap(-1, 10**17),
    }.items():  # fmt: skip
        monkeypatch.setattr(kind, where, lambda *_, exhaust=exhaust: exhaust())
        for command in commands:
            code, _, err = main_in(tmp_path, *command)
            assert (code, err.count("\n")) == (1, 1) and err.startswith("metapt: ") and says in err


def test_out_of_memory_is_not_called_bad_data(data, tmp_path, monkeypatch):
    def exhausted(*_, **options):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    shutil.copytree(data, tmp_path / "data")
    monkeypatch.setattr(np, "load", exhausted)
    code, _, err = main_in(tmp_path, "meta", "ppi", "--width=1")
    assert (code, err) == (1, "metapt: [Errno 12] Cannot allocate memory\n")
    status, err = forked(lambda: (setattr(sys, "argv", ["script"]), files.run(lambda: bytearray(10**17))))
    assert (status, err.count("\n")) == (1, 1) and err.endswith(": out of memory\n")


# Files of the user's


def test_an_export_replaces_a_file_only_with_force_and_never_one_of_a_run(run, tmp_path):
    for name in ("mine.pt", "mine.pt.part", ".mine.pt.x"):
        (tmp_path / name).write_text("precious")
    (tmp_path / "link.pt").symlink_to(run / "checkpoint.pt")
    (tmp_path / "door").symlink_to(run)
    (tmp_path / "folder").mkdir()
    (tmp_path / "new").mkdir()
    before = contents(run)
    for export, given, says in [
        ("mine.pt", [], "it is there already (--force replaces a file)"), ("folder", ["--force"], "it is there already"),
        ("/dev/null", ["--force"], "it is there already"), ("nowhere/mine.pt", ["--force"], "nowhere is no folder"),
        *((inside, given, "it lies in the run") for given in ([], ["--force"]) for inside in (
            "run/checkpoint.pt", "run/config.json", "run/new.pt", "link.pt", "door/checkpoint.pt", "door/new.pt")),
        ("new/config.json", ["--out=new"], "it lies in the run new"),
    ]:  # fmt: skip
        assert says in refused(tmp_path, "finetune", "run", f"--export={export}", *given, *MEASURE), export
    assert contents(run) == before and not (tmp_path / "runs").exists() and not list((tmp_path / "new").iterdir())
    assert {(tmp_path / name).read_text() for name in ("mine.pt", "mine.pt.part", ".mine.pt.x")} == {"precious"}
    summary_of(tmp_path, "finetune", "run", "--export=mine.pt", "--force", *MEASURE)
    assert torch.load(tmp_path / "mine.pt", weights_only=True).keys() == {
        name.removeprefix("encoder.") for name in torch.load(run / "checkpoint.pt", weights_only=True)["learners"][0]["network"]
        if name.startswith("encoder.")}  # fmt: skip
    assert {(tmp_path / name).read_text() for name in ("mine.pt.part", ".mine.pt.x")} == {"precious"}


def modes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}


@pytest.mark.parametrize("mask", [0o077, 0o027, 0o002])
def test_files_have_the_modes_that_are_asked_for(mask, home, tmp_path):
    before = os.umask(mask)
    try:
        assert main_in(tmp_path, "meta", home / "toy.py", "--out=run", *QUICK)[0] == 0
        assert set(modes(tmp_path / "run").values()) == {0o666 & ~mask}
        (tmp_path / "mine.pt").touch(0o640)
        (tmp_path / "mine.pt").chmod(0o640)
        assert main_in(tmp_path, "finetune", "run", "--export=mine.pt", "--force", "--out=new", *MEASURE)[0] == 0
        assert modes(tmp_path)["mine.pt"] == 0o640
    finally:
        os.umask(before)


def test_a_folder_beside_prepared_data_is_removed_only_where_a_script_left_it(tmp_path):
    for name in ("x1/new", "x2/old", "notes/new", "empty"):
        (tmp_path / f".prepared-metapt-{name}").mkdir(parents=True)
    (tmp_path / ".prepared-metapt-notes" / "mine.txt").write_text("precious")
    (tmp_path / ".prepared-metapt-mine").write_text("precious")
    (tmp_path / "elsewhere" / "new").mkdir(parents=True)
    (tmp_path / ".prepared-metapt-link").symlink_to("elsewhere")
    with files.locked(tmp_path / "prepared", "x"):
        left = {path.name.removeprefix(".prepared-metapt-") for path in tmp_path.iterdir()} - {".prepared.lock"}
    assert left == {"notes", "mine", "link", "elsewhere", "prepared"}
    assert (tmp_path / ".prepared-metapt-notes" / "mine.txt").read_text() == "precious"


# Two processes


def forked(work) -> tuple[int, str]:
    """What `work` (which may call `metapt.main`) ends with in a child: exit status or −signal, and standard error."""
    reading, writing = os.pipe()
    if not (child := os.fork()):
        status = 70
        with contextlib.suppress(BaseException), os.fdopen(writing, "w") as sys.stderr:
            sys.stdout = io.StringIO()
            try:
                work()
                status = 0
            except SystemExit as ended:
                status = ended.code or 0
            except BaseException:  # noqa: BLE001 (a traceback is what a test looks for)
                traceback.print_exc()
        os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as err:
        said = err.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


def command(folder: Path, *arguments) -> None:
    os.chdir(folder)
    sys.argv = ["metapt.py", *map(str, arguments)]
    metapt.main()


def test_a_run_is_of_one_process_until_that_ends_or_is_killed(home, run, tmp_path):
    began = time.strftime("%Y-%m-%d")
    ready, go = os.pipe()
    if not (child := os.fork()):
        with contextlib.suppress(BaseException), contextlib.ExitStack() as held:
            metapt.Run(run).lock(held)
            os.write(go, b"1")
            signal.pause()
        os._exit(1)
    os.read(ready, 1)
    lines = (run / "metrics.jsonl").read_text()
    message = refused(tmp_path, "meta", "--resume=run")
    assert f"run is in use by process {child} since {began}" in message
    assert summary_of(tmp_path, "finetune", "run", *MEASURE)["command"] == "finetune"  # reading disturbs nobody
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert main_in(tmp_path, "meta", "--resume=run")[0] == 0
    assert (run / "metrics.jsonl").read_text() == lines
    assert not [name for name in contents(run) if name.startswith(".")]
    (tmp_path / "new").mkdir()
    with contextlib.ExitStack() as held:
        metapt.Run(tmp_path / "new").lock(held)
        assert "new is in use by process" in refused(tmp_path, "meta", home / "toy.py", "--out=new", *QUICK)
        (tmp_path / "new" / metapt.LOCK).write_text("")
        assert "new is in use by another process" in refused(tmp_path, "meta", home / "toy.py", "--out=new", *QUICK)
    (run / metapt.LOCK).symlink_to(tmp_path / "elsewhere")
    assert metapt.LOCK in refused(tmp_path, "meta", "--resume=run")
    assert not (tmp_path / "elsewhere").exists()


def test_of_two_starts_at_once_each_has_a_folder_of_its_own(home, tmp_path, monkeypatch):
    made = []

    def mkdir(path, *given, **options):
        if not made and path.parent.name == "runs":  # the other one was faster
            made.append(path)
            path.mkdir(parents=True)
            shutil.copy(home / "run" / "config.json", path)
        return real(path, *given, **options)

    real = Path.mkdir
    monkeypatch.setattr(Path, "mkdir", mkdir)
    assert main_in(tmp_path, "meta", home / "toy.py", *QUICK)[0] == 0
    assert sorted(os.listdir(tmp_path / "runs")) == ["meta-toy-Toy", "meta-toy-Toy-2"]
    assert os.listdir(tmp_path / "runs" / "meta-toy-Toy") == ["config.json"]
    (tmp_path / "runs").rename(tmp_path / "other")
    (tmp_path / "runs").symlink_to("nowhere")
    assert "runs/meta-toy-Toy cannot be made: File exists" in refused(tmp_path, "meta", home / "toy.py", *QUICK)


def test_ctrl_c_while_a_script_is_imported_is_one_line(tmp_path):
    """A module that the script imports, and metapt does not, waits in the import until Ctrl-C was pressed."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "requests.py").write_text(f"""
import pathlib, sys, time
folder = pathlib.Path({str(tmp_path)!r})
(folder / "importing").touch()
while not (folder / "pressed").exists():
    time.sleep(0.01)
sys.path.remove(str(folder / "modules"))
del sys.modules["requests"]
import requests
""")
    command = [sys.executable, metapt.__file__, "download", "mnist", "--from", tmp_path]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, stdout=-1, stderr=-1, process_group=0)
    while not (tmp_path / "importing").exists():
        assert running.poll() is None
        time.sleep(0.01)
    os.killpg(running.pid, signal.SIGINT)
    (tmp_path / "pressed").touch()
    _, err = running.communicate()
    assert (running.returncode, err) == (1, "mnist: stopped: the same command again goes on where it stopped\n")
    assert not (tmp_path / "data").exists()
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


# Kills and full disks

PLAIN = {"save_figure": lambda path, draw: metapt.save_whole(path, b"drawn"), "CHECKPOINT_EVERY": 2}


def dying(at: int) -> list:
    """From now on every write (half of it is done), rename, flush, truncation and removal counts; the at-th kills."""
    calls = []

    def count(half=lambda: None):
        calls.append(1)
        if len(calls) == at:
            half()
            os.kill(os.getpid(), signal.SIGKILL)

    def before(owner, name):
        real = getattr(owner, name)
        setattr(owner, name, lambda *given, **options: (count(), real(*given, **options))[1])

    def of_files(owner, name):
        real = getattr(owner, name)

        def opened(*given, **options):
            file = real(*given, **options)
            if file.writable():
                write = file.write
                file.write = lambda content: (
                    count(lambda: (write(content[: len(content) // 2]), file.flush())),
                    write(content),
                )[1]
            return file

        setattr(owner, name, opened)

    for name in ("fsync", "link", "replace", "chmod", "truncate", "unlink"):
        before(os, name)
    of_files(Path, "open")
    return calls


def test_a_kill_at_every_write_rename_and_flush_leads_to_the_same_end(home, tmp_path):
    start = ["meta", home / "toy.py", "--out=run", *QUICK]

    def killed(folder, at, *arguments):
        vars(metapt).update(PLAIN)
        calls = dying(at)
        try:
            command(folder, *arguments)
        finally:
            (folder / "calls").write_text(str(len(calls)))

    (tmp_path / "whole").mkdir()
    assert forked(lambda: killed(tmp_path / "whole", 0, *start)) == (0, "")
    expected, moments = outcome(tmp_path / "whole" / "run"), int((tmp_path / "whole" / "calls").read_text()) - 1
    assert moments > 35
    for at in range(1, moments):
        (folder := tmp_path / str(at)).mkdir()
        assert forked(lambda: killed(folder, at, *start))[0] == -signal.SIGKILL, at  # noqa: B023
        left = set(os.listdir(folder / "run"))
        assert "checkpoint.previous.pt" not in left or "checkpoint.pt" in left, at
        again = ["meta", "--resume=run"] if (folder / "run" / "config.json").exists() else start
        if at % 2:  # and the second time at another place
            forked(lambda: killed(folder, at % 13 + 1, *again))  # noqa: B023
            again = ["meta", "--resume=run"] if (folder / "run" / "config.json").exists() else start
        assert forked(lambda: (vars(metapt).update(PLAIN), command(folder, *again))) == (0, ""), at  # noqa: B023
        assert outcome(folder / "run") == expected, at
        assert {*os.listdir(folder / "run")} == {*os.listdir(tmp_path / "whole" / "run")}, at


def test_the_checkpoint_before_is_kept_also_without_links_and_when_writing_fails(tmp_path, monkeypatch):
    path, keep = tmp_path / "new", tmp_path / "old"

    def fail(*_):
        raise OSError(errno.EIO, "the disk is faulty")

    metapt.save_whole(path, b"1", keep)
    metapt.save_whole(path, b"2", keep)
    assert contents(tmp_path) == {"new": b"2", "old": b"1"}
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", fail)
        metapt.save_whole(path, b"3", keep)
    assert contents(tmp_path) == {"new": b"3", "old": b"2"}
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="faulty"):
            patch.setattr(os, name, fail)
            metapt.save_whole(path, b"4", keep)
        assert contents(tmp_path) == {"new": b"3", "old": b"2"}


@pytest.mark.parametrize("limit", [100, 1500, 4000, 20_000])
def test_a_full_disk_is_one_line_and_what_was_saved_goes_on(limit, home, run, tmp_path):
    """RLIMIT_FSIZE stands for the disk: below config.json, metrics, a checkpoint, a figure."""

    def limited(*arguments):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        command(tmp_path, *arguments)

    status, err = forked(lambda: limited("meta", home / "toy.py", "--out=new", "--json", *QUICK))
    assert status == 1 and "Traceback" not in err
    last = err.strip().splitlines()[-1]
    assert (
        last.startswith("metapt: new/")
        and "File too large" in last
        and "bytes are needed" in last
        and "are free" in last
    )
    assert not [name for name in os.listdir(tmp_path / "new") if name.startswith(".")]
    if (tmp_path / "new" / "config.json").exists():
        assert main_in(tmp_path, "meta", "--resume=new")[0] == 0
        assert outcome(tmp_path / "new") == outcome(home / "run")
    (run / "checkpoint.previous.pt").replace(run / "checkpoint.pt")  # go on from the middle
    (run / "summary.json").unlink()
    before = (run / "checkpoint.pt").read_bytes()
    status, err = forked(lambda: limited("meta", "--resume=run", "--json"))
    assert status == 1 and "File too large" in err.strip().splitlines()[-1]
    assert before in [
        (run / name).read_bytes() for name in ("checkpoint.pt", "checkpoint.previous.pt") if (run / name).exists()
    ]
    assert main_in(tmp_path, "meta", "--resume=run")[0] == 0
    assert outcome(run) == outcome(home / "run")


def test_a_config_altered_before_the_first_checkpoint_is_refused(home, tmp_path, monkeypatch):
    """What the checkpoint vouches for is what the run was begun with, not what lies there when it is made."""
    real = metapt.Run.save

    def save(run, training):
        rewritten = json.loads(run.started.read_text())
        rewritten["settings"]["measure_lr"] = 9.0
        run.started.write_text(json.dumps(rewritten))
        return real(run, training)

    monkeypatch.setattr(metapt.Run, "save", save)
    assert main_in(tmp_path, "meta", home / "toy.py", "--out=run", *QUICK)[0] == 0
    assert "config.json has changed since" in refused(tmp_path, "finetune", "run", *MEASURE)


@pytest.mark.parametrize("lost", ["metrics.jsonl", "checkpoint"])
def test_what_a_finished_run_lost_is_said(lost, run, tmp_path):
    if lost == "metrics.jsonl":
        (run / lost).unlink()
        code, out, _ = main_in(tmp_path, "meta", "--resume=run")
        assert code == 0 and "metrics.jsonl lacks rows that it had" in out.replace("\n", " ")
    else:  # figures show that it had got that far
        for name in ("checkpoint.pt", "checkpoint.previous.pt", "summary.json"):
            (run / name).unlink(missing_ok=True)
        assert "checkpoint.pt is missing" in refused(tmp_path, "meta", "--resume=run")


def test_a_run_without_its_config_says_how_to_begin_it(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".metapt-config.json-0").write_text("{")
    assert "the command that began the run does it anew" in refused(tmp_path, "meta", "--resume=run")
