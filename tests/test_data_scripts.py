"""The data scripts: downloads over bad lines, folders that appear whole, what each set becomes."""

import gzip
import hashlib
import http.server
import itertools
import json
import os
import pickle
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import types
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pandas
import pytest
import torch
import wfdb
from datasets import (
    ROOT,
    Server,
    beat,
    conllu,
    generated,
    write_graphs,
    write_published,
    write_record,
    write_sums,
    write_treebank,
)
from datasets import load_prepared as load

from data_scripts import files, graphs, hu_graphs, mnist, ptbxl, string_graphs, ud
from data_scripts.files import BadInput

REAL = ROOT.parent / "shared" / "data"
CONTENT = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def name_of(module) -> str:
    """Of a script's module and of its command."""
    return module.__name__.rpartition(".")[2]


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


@pytest.fixture(autouse=True)
def script(monkeypatch, capsys):
    """Runs a script's command in this process, without pauses: (exit status, stdout, stderr)."""
    monkeypatch.setattr(files, "PAUSE", 0)
    monkeypatch.setattr(files.signal, "signal", lambda *_: None)

    def call(module, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{name_of(module)}.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            files.run(getattr(module, name_of(module)))
        return (left.value.code, *capsys.readouterr())

    return call


@pytest.fixture
def refused(script):
    """The one line with which a script says no."""

    def call(module, *arguments, status=2):
        code, _, err = script(module, *arguments)
        assert (code, err.count("\n")) == (status, 1), err
        assert err.startswith(f"{name_of(module)}: ")
        return err

    return call


@pytest.fixture
def server():
    Server.content = {"/file": CONTENT}
    Server.faults = {}
    Server.asked = []
    Server.connections = set()
    Server.begun.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        running.daemon_threads = True
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


# Downloads.


def fetch(url, path, sha256=SHA256):
    files.fetch(f"{url}/file", path, sha256, lambda done, total: None, files.session())
    return path.read_bytes() == CONTENT and not path.with_name(path.name + ".part").exists()


def ranges():
    return [asked for _, asked in Server.asked]


@pytest.mark.parametrize(
    ("fault", "says"), [("wrong byte", "SHA-256"), ("short", "SHA-256"), (404, "404"), (503, "503")]
)
def test_fetch_gives_no_name_to_what_is_wrong(server, tmp_path, fault, says):
    (tmp_path / "file").write_bytes(b"before")
    Server.faults = {"/file": [fault] * 5}
    with pytest.raises(BadInput, match=says):
        fetch(server, tmp_path / "file")
    assert (names(tmp_path), (tmp_path / "file").read_bytes()) == (["file"], b"before")
    assert len(Server.asked) == (1 if fault == 404 else 5)  # a wrong byte may have come on the way
    Server.faults = {}
    assert fetch(server, tmp_path / "file")


@pytest.mark.parametrize(
    ("part", "faults", "asked"),
    [
        (b"", [503, "cut", "cut"], [None, None, "bytes=100000-", "bytes=200000-"]),
        (b"", ["cut", "no ranges"], [None, "bytes=100000-"]),
        (bytes(400_000), [], ["bytes=400000-", None]),  # more than there is
        # What came must not be appended.
        (b"", ["cut", "other range"], [None, "bytes=100000-", None]),
        (b"", ["cut", "less"], [None, "bytes=100000-", "bytes=100050-"]),
        (b"", [416], [None, None]),
        (b"", ["odd length"], [None]),
        (CONTENT, [], ["bytes=300000-"]),  # cut off after the last byte
        (b"?" * 1000, [], ["bytes=1000-", None]),  # of another file
    ],
)
def test_fetch_goes_on_where_it_can_and_else_begins_again(server, tmp_path, part, faults, asked):
    if part:
        (tmp_path / "file.part").write_bytes(part)
    Server.faults = {"/file": faults}
    assert fetch(server, tmp_path / "file")
    assert ranges() == asked
    assert fetch(server, tmp_path / "file")  # it is there and right: nothing is asked
    assert ranges() == asked


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1/a b", "nowhere", "http://[", "ftp://127.0.0.1"]
)
def test_fetch_refuses_what_is_no_address(url, tmp_path):
    with pytest.raises(BadInput, match=re.escape(url)):
        files.fetch(url, tmp_path / "file", None, lambda done, total: None, files.session())
    assert not names(tmp_path)


def test_a_part_that_is_not_ours_stays(server, tmp_path):
    (tmp_path / "mine").write_bytes(b"mine")
    part = tmp_path / "file.part"
    for make in (part.symlink_to, part.hardlink_to):
        make(tmp_path / "mine")
        with pytest.raises((OSError, BadInput), match=r"file.part"):
            fetch(server, tmp_path / "file")
        assert (tmp_path / "mine").read_bytes() == b"mine"
        part.unlink()
    os.mkfifo(part)
    with pytest.raises(BadInput, match="no download that was begun here"):
        fetch(server, tmp_path / "file")


# The prepared folder.


def prepare(folder: Path, values, form="form") -> None:
    with (
        files.locked(folder, form) as path,
        files.prepared_folder(path, {"format": form}) as append,
    ):
        append("a", np.array(values)[:1])
        append("a", np.array(values)[1:])


NO_SUMS = '{"format": "form", "arrays": {"a": 1}}'
NO_ARRAYS = '{"format": "form", "arrays": {}}'


@pytest.mark.parametrize(
    ("put", "says"),
    [
        (lambda f: (f / "thesis.txt").write_text("years"), "holds thesis.txt"),
        (lambda f: (f / "sub").mkdir(), "holds sub"),
        (lambda f: (f / "b.npy").write_text("mine"), "holds b.npy"),
        (lambda f: (f / "b").symlink_to("/etc"), "holds b,"),
        (lambda f: ((f / "a.npy").unlink(), (f / "a.npy").mkdir()), "holds a.npy"),
        (lambda f: (f / "about.json").unlink(), "about.json is missing"),
        (lambda f: (f / "about.json").write_text('{"of": "me"}'), "not of the format 'form'"),
        (lambda f: (f / "about.json").write_text("[" * 9999), "not of the format 'form'"),
        (lambda f: (f / "about.json").write_text(NO_SUMS), "not of the format"),
        (lambda f: (f / "about.json").write_text(NO_ARRAYS), "not of the format"),
        (lambda f: (shutil.rmtree(f), f.write_text("mine")), "is a file"),
    ],
)
def test_only_prepared_data_are_ever_replaced(tmp_path, put, says):
    folder = tmp_path / "ours"
    prepare(folder, [1, 2])
    prepare(folder, [3, 4, 5])
    assert load(folder)["a"].tolist() == [3, 4, 5]
    put(folder)
    before = [(p, p.is_file() and p.read_bytes()) for p in sorted(tmp_path.rglob("*"))]
    with pytest.raises(BadInput, match=says):
        prepare(folder, [6])
    assert [(p, p.is_file() and p.read_bytes()) for p in sorted(tmp_path.rglob("*"))] == before


def test_the_old_folder_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    folder = tmp_path / "ours"
    real = Path.replace
    prepare(folder, [1, 2])
    with (
        pytest.raises(ZeroDivisionError),
        files.prepared_folder(folder, {"format": "form"}) as append,
    ):
        append("a", np.zeros(3))
        1 / 0
    with (
        pytest.raises(BadInput, match="holds late"),
        files.prepared_folder(folder, {"format": "form"}),
    ):
        (folder / "late").write_text("put there meanwhile")
    (folder / "late").unlink()

    def failing(self, target):
        if self.name == "new":
            raise OSError("the disk went away")
        return real(self, target)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="went away"):
        patch.setattr(Path, "replace", failing)
        prepare(folder, [3])
    assert (load(folder)["a"].tolist(), names(tmp_path)) == ([1, 2], ["ours"])
    left = tmp_path / ".ours-metapt-x"
    left.mkdir()
    folder.replace(left / "old")  # killed between two renames
    with pytest.raises(ZeroDivisionError), files.locked(folder, "form"):
        1 / 0
    assert (load(folder)["a"].tolist(), names(tmp_path)) == ([1, 2], ["ours"])
    elsewhere = tmp_path / "disk"
    elsewhere.mkdir()
    folder.replace(elsewhere / "ours")
    folder.symlink_to(elsewhere / "ours")
    prepare(folder, [7])
    assert folder.is_symlink()
    assert load(elsewhere / "ours")["a"].tolist() == [7]


def test_a_second_process_waits_for_the_first(string_files, tmp_path, refused, script):
    arguments = (string_graphs, "--from", string_files, "--data", tmp_path)
    with files.locked(tmp_path / "ppi" / "string-yeast", graphs.FORMAT):
        assert f"by process {os.getpid()}:" in refused(*arguments, status=1)
    assert script(*arguments)[0] == 0
    (tmp_path / "ppi" / ".string-yeast.lock").symlink_to(tmp_path / "elsewhere")
    assert ".lock" in refused(*arguments)
    assert not (tmp_path / "elsewhere").exists()


def run_alone(name: str, *arguments, cwd: Path, more: dict | None = None, **options):
    """A script in a process of its own, where metapt cannot be imported."""
    (cwd / "metapt.py").write_text("raise ImportError('a data script needs no metapt')")
    command = [sys.executable, "-m", f"data_scripts.{name}", *arguments]
    path = os.pathsep.join([str(cwd), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **(more or {})}
    return subprocess.Popen(
        command, cwd=cwd, env=environment, text=True, stdout=-1, stderr=-1, **options
    )


def test_each_script_runs_alone(source, string_files, benchmark_zip, treebanks, tmp_path):
    for name, given, says in (
        ("mnist", ("--from", tmp_path), "train-images-idx3-ubyte.gz is missing"),
        ("ptbxl", ("--from", source), "20 records in"),
        ("hu_graphs", ("--from", benchmark_zip), "300 graphs"),
        ("string_graphs", ("--from", string_files), "4 graphs"),
        ("ud", ("--from", treebanks), "2 treebanks, 4 sentences, 7 words"),
    ):
        running = run_alone(name, *given, cwd=tmp_path)
        out, err = running.communicate()
        assert says in out + err
        assert running.returncode == (2 if name == "mnist" else 0), err
    assert names(tmp_path / "data" / "ppi") == ["published", "string-yeast"]
    assert len(load(tmp_path / "data" / "ecg" / "prepared")) == 8


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_terminal_that_lacks_characters_breaks_nothing(string_files, tmp_path, encoding):
    options = {"more": {"PYTHONIOENCODING": encoding}, "encoding": encoding}
    data = tmp_path / "φ±ö"
    given = ("--from", string_files, "--data", data)
    running = run_alone("string_graphs", *given, cwd=tmp_path, **options)
    out, err = running.communicate()
    assert running.returncode == 0, err
    assert "4 graphs" in out
    assert len(load(data / "ppi" / "string-yeast")) == 7
    given = ("--from", tmp_path / "φ±ö-none", "--data", data)
    running = run_alone("string_graphs", *given, cwd=tmp_path, **options)
    _, err = running.communicate()
    assert (running.returncode, err.count("\n")) == (2, 1)
    running = run_alone("string_graphs", "--help", cwd=tmp_path, **options)
    out, err = running.communicate()
    assert running.returncode == 0, err
    assert "--species" in out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_download_that_was_stopped_goes_on(server, benchmark_zip, tmp_path, script, number):
    content = CONTENT + benchmark_zip.read_bytes()  # a zip may stand behind something else
    Server.content["/file"] = content
    Server.faults = {"/file": ["hang"]}
    given = ("--url", f"{server}/file", "--data", tmp_path / "data")
    running = run_alone("hu_graphs", *given, cwd=tmp_path)
    assert Server.begun.wait(60)
    part = tmp_path / "data" / "ppi" / "bio_dataset.zip.part"
    while not part.exists() or not part.stat().st_size:
        assert running.poll() is None
    running.send_signal(number)
    _, err = running.communicate()
    if number != signal.SIGKILL:
        assert (running.returncode, err.count("\n")) == (1, 1)
        assert err.startswith("hu_graphs: stopped: the same command again goes on")
    have = part.stat().st_size
    assert 0 < have <= len(content) // 3
    assert script(hu_graphs, *given)[0] == 0
    assert ranges() == [None, f"bytes={have}-"]
    assert names(tmp_path / "data" / "ppi") == ["bio_dataset.zip", "published"]


def test_a_full_disk_is_one_line(string_files, server, tmp_path, refused, monkeypatch):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (150, 150))

    running = run_alone("string_graphs", "--from", string_files, cwd=tmp_path, preexec_fn=limit)
    _, err = running.communicate()
    assert (running.returncode, err.count("\n")) == (1, 1), err
    sizes = r"[1-9][\d,]* bytes are needed, [\d,]+ are free"
    assert re.search(rf"string-yeast/\w+.npy: File too large: {sizes}", err)
    assert not names(tmp_path / "data" / "ppi")
    with (
        Path("/dev/full").open("wb", 0) as file,
        pytest.raises(files.Failed, match=r"x.npy: No space left .* 500,000 by"),
    ):
        files.write(file, bytes(500_000), tmp_path / "x.npy")

    def full(descriptor):
        raise OSError(files.errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        given = (string_graphs, "--from", string_files, "--data", tmp_path)
        assert ".npy: No space left" in refused(*given, status=1)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    sizes = r"[1-9]\d\d,\d\d\d bytes are needed, 1,000 are free"
    with pytest.raises(files.Failed, match=rf"file: No space left .*{sizes}"):
        fetch(server, tmp_path / "file")
    assert not (tmp_path / "file.part").exists()


@pytest.mark.parametrize("module", [mnist, ptbxl, hu_graphs, string_graphs, ud])
def test_usage(module, tmp_path, refused, script):
    assert "--data" in script(module, "-h")[1]
    assert "exclude each other" in refused(module, "--from", tmp_path, "--check")
    assert "No such option" in refused(module, "--frm", tmp_path)
    assert "about.json is missing" in refused(module, "--check", "--data", tmp_path)
    if module is string_graphs:
        assert "name it with --from" in refused(module, "--data", tmp_path)
    else:
        given = (module, "--from", tmp_path, "--url", "http://x")
        assert "--url and --from exclude each other" in refused(*given)
    (tmp_path / "file").write_text("x")
    assert "file" in refused(module, "--from", tmp_path, "--data", tmp_path / "file")


def test_check_names_what_is_damaged(string_files, tmp_path, script, refused):
    given = (string_graphs, "--data", tmp_path, "--name", "own")
    assert script(*given, "--from", string_files)[0] == 0
    code, out, _ = script(*given, "--check")
    says = f"{tmp_path / 'ppi' / 'own'}: all 7 arrays are as they were written\n"
    assert (code, out) == (0, says)
    with (tmp_path / "ppi" / "own" / "sums.npy").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\1")
    assert "own/sums.npy is not as it was written" in refused(*given, "--check")
    (tmp_path / "ppi" / "own" / "sums.npy").unlink()
    assert "own/sums.npy is not as it was written" in refused(*given, "--check")


# MNIST.


def idx(values: np.ndarray) -> bytes:
    header = struct.pack(f">4B{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    return gzip.compress(header + values.tobytes())


def test_mnist_over_a_bad_line(server, tmp_path, monkeypatch, script, refused):
    shapes = zip(mnist.FILES, ((20, 28, 28), 20, (9, 28, 28), 9), strict=True)
    arrays = {
        array: np.random.default_rng(0).integers(0, 9, shape, np.uint8) for array, shape in shapes
    }
    Server.content = {f"/{mnist.FILES[array][0]}": idx(v) for array, v in arrays.items()}
    sums = {
        array: (name, hashlib.sha256(Server.content[f"/{name}"]).hexdigest())
        for array, (name, _) in mnist.FILES.items()
    }
    assert "SHA-256" in refused(mnist, "--url", server, "--data", tmp_path)
    monkeypatch.setattr(mnist, "FILES", sums)
    Server.faults = {"/train-images-idx3-ubyte.gz": ["cut"]}
    assert script(mnist, "--url", f"{server}/", "--data", tmp_path)[0] == 0
    assert names(tmp_path / "mnist") == ["files", "prepared"]
    for name, values in load(tmp_path / "mnist" / "prepared").items():
        np.testing.assert_array_equal(values, arrays[name])
    given = (mnist, "--from", tmp_path / "mnist" / "files", "--data", tmp_path / "other")
    path = tmp_path / "mnist" / "files" / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(idx(np.zeros(9, np.uint8)))
    assert "t10k-labels-idx1-ubyte.gz: its SHA-256 is not" in refused(*given)
    path.unlink()
    assert "t10k-labels-idx1-ubyte.gz is missing" in refused(*given)
    (tmp_path / "mnist" / "files" / "t10k-images-idx3-ubyte.gz").unlink()
    both = "t10k-images-idx3-ubyte.gz is missing, and so is t10k-labels-idx1-ubyte.gz"
    assert both in refused(*given)


@pytest.mark.skipif(not (REAL / "mnist").is_dir(), reason="needs ../shared/data/mnist")
def test_the_real_mnist(tmp_path, script):
    assert script(mnist, "--from", REAL / "mnist", "--data", tmp_path)[0] == 0
    arrays = load(tmp_path / "mnist" / "prepared")
    assert arrays["train_images"].shape == (60_000, 28, 28)
    assert arrays["test_images"].shape == (10_000, 28, 28)
    assert np.bincount(arrays["train_labels"])[:3].tolist() == [5923, 6742, 5958]
    assert arrays["test_labels"][:5].tolist() == [7, 2, 1, 0, 4]


# PTB-XL.


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return datasets.write_ptbxl(tmp_path_factory.mktemp("source") / "ptbxl", 20)


@pytest.fixture
def copy(source, tmp_path):
    """A copy of the files, to be spoilt."""
    return Path(shutil.copytree(source, tmp_path / "copy"))


@pytest.mark.parametrize("several", [1000, 5])  # in this process; in several
def test_records_come_out_as_they_went_in(copy, tmp_path, script, monkeypatch, several):
    monkeypatch.setattr(ptbxl, "SEVERAL", several)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    gain = 250.0
    baseline = list(range(0, 120, 10))
    write_record(copy / "records100" / "00000", "00007_lr", beat(7), gain=gain, baseline=baseline)
    write_sums(copy)
    code, out, err = script(ptbxl, "--from", copy, "--data", tmp_path)
    assert (code, err) == (0, "")
    assert "20 records in" in out
    arrays = load(tmp_path / "ecg" / "prepared")
    about = read_json(tmp_path / "ecg" / "prepared" / "about.json")
    assert (about["format"], about["records"], about["left_out"]) == ("metapt ecgs 2", 20, [])
    assert (about["leads"], about["classes"]) == (list(ptbxl.LEADS), list(ptbxl.SUPERCLASSES))
    assert {name: (a.dtype.str, a.shape) for name, a in arrays.items()} == {
        "samples": ("<i2", (20, 1000, 12)),
        "ecg_id": ("<i8", (20,)),
        "patient": ("<i8", (20,)),
        "fold": ("<i8", (20,)),
        "labels": ("|u1", (20, 5)),
        "gain": ("<f4", (20, 12)),
        "baseline": ("<f4", (20, 12)),
        "sums": ("<f8", (20, 2)),
    }
    for i in range(20):
        assert (arrays["ecg_id"][i], arrays["patient"][i]) == (i + 1, i + 1001)
        assert arrays["fold"][i] == (i + 1) // 5 % 10 + 1
        assert arrays["labels"][i].tolist() == datasets.LABELS[(i + 1) % 5]
        np.testing.assert_array_equal(arrays["samples"][i], beat(i + 1))
    assert (arrays["gain"][6].tolist(), arrays["baseline"][6].tolist()) == ([gain] * 12, baseline)
    millivolts = wfdb.rdrecord(str(copy / "records100" / "00000" / "00007_lr")).p_signal
    expected = [millivolts.sum(), (millivolts**2).sum()]
    np.testing.assert_allclose(arrays["sums"][6], expected, rtol=1e-12)
    assert names(tmp_path) == ["copy", "ecg"]
    assert names(tmp_path / "ecg") == ["prepared"]


def header(old: str, new: str):
    def spoil(record: Path) -> None:
        path = record.with_suffix(".hea")
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    return spoil


def signals(change, leads=ptbxl.LEADS):
    return lambda record: write_record(record.parent, record.name, change(beat(7)), leads)


def content(change, kind=".dat"):
    def spoil(record: Path) -> None:
        path = record.with_suffix(kind)
        path.write_bytes(change(path.read_bytes()))

    return spoil


def gain(text: str):
    return header("1000.0(0)/mV", f"{text}/mV")


def gain_of_0_below(line: str, lead: str):
    """The line at the top of the header, and a gain of 0 in one lead."""

    def spoil(record: Path) -> None:
        path = record.with_suffix(".hea")
        lines = path.read_text().splitlines(keepends=True)
        wrong = [
            text.replace("1000.0(0)", "0(0)") if text.endswith(f" {lead}\n") else text
            for text in lines
        ]
        assert wrong != lines
        path.write_text(line + "".join(wrong))

    return spoil


def with_checksums(change):
    """Checksums written anew: the seventh field of a line; its block size, the eighth, goes too."""

    def spoil(record: Path) -> None:
        path = record.with_suffix(".hea")
        first, *lines = path.read_text().splitlines()
        lines = [line.split() for line in lines if not line.startswith("#")]
        for fields in lines:
            fields[6:8] = change(int(fields[6]), fields[7])
        path.write_text("\n".join([first, *(" ".join(fields) for fields in lines)]) + "\n")

    return spoil


def with_lines(first: bytes, among: bytes, last: bytes):
    """Lines at a header's top, below its first two lines, and at its end."""

    def change(text: bytes) -> bytes:
        lines = text.splitlines(keepends=True)
        return b"".join([first, *lines[:2], among, *lines[2:], last])

    return content(change, ".hea")


FAULTS = {
    "truncated": (content(lambda c: c[:-2]), "23998 bytes"),
    "longer": (content(lambda c: c + b"12"), "24002 bytes"),
    "no .dat": (lambda r: r.with_suffix(".dat").unlink(), "00007_lr.dat is missing"),
    "no .hea": (lambda r: r.with_suffix(".hea").unlink(), "00007_lr.hea is missing"),
    "NaN": (signals(lambda s: np.where(s == s[500, 3], -(2**15), s)), "NaN in lead"),
    "rate": (header(" 12 100 1000", " 12 500 1000"), "samples a second: 500"),
    "length": (header(" 12 100 1000", " 12 100 999"), "samples: 999"),
    "order": (signals(lambda s: s, (*ptbxl.LEADS[1::-1], *ptbxl.LEADS[2:])), "leads: ['II', 'I',"),
    "eleven leads": (signals(lambda s: s[:, :11], ptbxl.LEADS[:11]), "leads: ['I', 'II',"),
    "unit": (header("/mV", "/uV"), "units"),
    "another file": (header("00007_lr.dat", "00008_lr.dat"), "signal files"),
    "empty header": (content(lambda c: b"", ".hea"), "no header of WFDB"),
    "text": (content(lambda c: b"what is this\n" * 3, ".hea"), "00007_lr.hea"),
    "gain": (gain("-5.0(0)"), "gain"),
    "gain of 0": (gain("0(0)"), "gain"),
    "gain of 0.0": (gain("0.0(0)"), "gain"),
    "small": (gain("1e-30(0)"), "gain"),
    "gain of 0e0": (gain("0e0(0)"), "a gain of 0"),
    "gain of -0.0": (gain("-0.0(0)"), "a gain of 0"),
    "gain of .0": (gain(".0(0)"), "a gain of 0"),
    "gain of +0": (gain("+0(0)"), "a gain of 0"),
    "no gain": (gain(""), "a gain of 0"),
    "no space before a gain of 0": (header(" 1000.0(0)", ".0(0)"), "a gain of 0"),
    "gain of 0 below a comment": (gain_of_0_below("# a comment\n", "V6"), "a gain of 0"),
    "gain of 0 below a blank line": (gain_of_0_below("\n", "V6"), "a gain of 0"),
    "a sum that is 1 off": (
        with_checksums(lambda total, size: [str(total - 2**16 + 1), size]),
        "checksums",
    ),
    "baseline": (gain(f"1000.0({10**20})"), "baseline"),
    "other samples": (content(lambda c: bytes(24000)), "checksums"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_record_is_named_and_left_out_or_stops(source, tmp_path, script, refused, fault):
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    spoil, says = FAULTS[fault]
    rows = pandas.read_csv(copy / "ptbxl_database.csv")[:8]
    rows.to_csv(copy / "ptbxl_database.csv", index=False)
    spoil(copy / "records100" / "00000" / "00007_lr")
    write_sums(copy)  # wrong as published, not on the way here
    given = (ptbxl, "--from", copy, "--data", tmp_path)
    assert "7 records in" in script(*given)[1]
    about = (tmp_path / "ecg" / "prepared" / "about.json").read_text()
    (problem,) = json.loads(about)["left_out"]
    assert says in problem and "00007_lr" in problem
    assert 7 not in load(tmp_path / "ecg" / "prepared")["ecg_id"]
    assert "00007_lr" in refused(*given, "--strict")
    assert (tmp_path / "ecg" / "prepared" / "about.json").read_text() == about  # nothing lost


AS_WFDB_READS_THEM = {
    "signed checksums": with_checksums(lambda total, size: [str(total - 2**16), size]),
    "no checksums": with_checksums(lambda total, size: []),
    "a comment among the signals": with_lines(b"", b"# of lead I\n", b""),
    "a blank line among the signals": with_lines(b"", b"  \n\n", b""),
    "a comment at the top": with_lines(b"#comment\n", b"", b"\n"),
    "a comment in Latin-1": with_lines("# Größe\n".encode("latin-1"), b"", b""),
    "a comment in UTF-8": with_lines(b"", "# Größe φ\n".encode(), "# ±\n".encode()),
    "carriage returns": content(lambda text: text.replace(b"\n", b"\r\n"), ".hea"),
    "a gain with an exponent": gain("1e3(0)"),
}


@pytest.mark.parametrize("kind", AS_WFDB_READS_THEM)
def test_headers_are_read_as_wfdb_reads_them(source, tmp_path, kind):
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    record = copy / "records100" / "00000" / "00007_lr"
    AS_WFDB_READS_THEM[kind](record)
    expected = wfdb.rdrecord(str(record), physical=False)
    found = ptbxl.read_record(record)
    np.testing.assert_array_equal(found.samples, expected.d_signal)
    assert found.gain.tolist() == expected.adc_gain == [1000] * 12
    # Whatever the locale is.
    code = "import sys, pathlib, data_scripts.ptbxl as p; p.read_record(pathlib.Path(sys.argv[1]))"
    if "comment in" in kind:
        for utf8 in "01":
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUTF8": utf8, "LC_ALL": "C"}
            environment["PYTHONCOERCECLOCALE"] = "0"
            command = [sys.executable, "-c", code, record]
            subprocess.run(command, env=environment, check=True)


def test_codes_that_no_statement_explains_are_counted(copy, tmp_path, script, refused):
    given = (ptbxl, "--from", copy, "--data", tmp_path)
    assert "lacks" not in script(*given)[1]
    edit_table(copy, "scp_codes", "{'XYZ': 100.0, 'NORM': 0.0}", 3)
    edit_table(copy, "scp_codes", "{'XYZ': 50.0, 'ABC': 0.0}", 4)
    out = script(*given)[1]
    assert "SCP codes that scp_statements.csv lacks" in out
    assert "XYZ in 2 records, ABC in 1 records" in out
    assert "20 records in" in out
    labels = load(tmp_path / "ecg" / "prepared")["labels"]
    assert labels[3:5].tolist() == [[1, 0, 0, 0, 0], [0] * 5]
    statements = (copy / "scp_statements.csv").read_text()
    for wrong, says in (
        ("NORM,1,NORM\n", "the SCP code NORM twice"),
        ("XYZ,1,OTHER\n", "the class of XYZ is OTHER"),
        ("XYZ,1,\n", "the class of XYZ is nan"),
    ):
        (copy / "scp_statements.csv").write_text(statements + wrong)
        write_sums(copy)
        assert says in refused(*given)


def test_two_sums_of_a_file_are_refused(copy, tmp_path, refused, script):
    given = (ptbxl, "--from", copy, "--data", tmp_path)
    sums = (copy / "SHA256SUMS.txt").read_text()
    (copy / "SHA256SUMS.txt").write_text(sums + f"{'0' * 64}  LICENSE.txt\n")
    assert "two sums of LICENSE.txt" in refused(*given)
    lines = sums.splitlines()
    upper = [f"{line[:64].upper()} *{line[66:]}" for line in lines]  # as other tools write them
    (copy / "SHA256SUMS.txt").write_text("\r\n".join([*upper, *lines]))
    assert "20 records in" in script(*given)[1]


def edit_table(copy, column, value, row=3, file="ptbxl_database.csv"):
    table = pandas.read_csv(copy / file, dtype=str, keep_default_na=False)
    table.loc[row, column] = value
    table.to_csv(copy / file, index=False)
    write_sums(copy)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        *itertools.product(["strat_fold"], ["abc", "inf", "2.7", "99"]),
        *itertools.product(["patient_id"], ["x", "", "1e300"]),
        *itertools.product(["ecg_id"], ["", "x3", "3.5", "1"]),
        ("filename_lr", "records100/00000/00001_lr"),
        ("filename_lr", "../00001_lr"),
        ("filename_lr", "/etc/passwd"),
        ("filename_lr", ""),
        ("filename_lr", "records100/../../x_lr"),
        ("filename_lr", "records500/00000/00001_hr"),
    ],
)
def test_an_odd_table_is_refused_and_what_was_prepared_stays(
    copy, tmp_path, refused, column, value
):
    prepare(tmp_path / "ecg" / "prepared", [1], ptbxl.FORMAT)
    edit_table(copy, column, value)
    assert "ptbxl_database.csv" in refused(ptbxl, "--from", copy, "--data", tmp_path)
    assert load(tmp_path / "ecg" / "prepared")["a"].tolist() == [1]


def test_unreadable_codes_are_named(copy, tmp_path, script):
    bad = ["{'NORM'", "[1, 2]", "", "print('x')", "{" * 500, "['NORM']"]
    for row, codes in enumerate(bad):
        edit_table(copy, "scp_codes", codes, row)
    assert f"{20 - len(bad)} records in" in script(ptbxl, "--from", copy, "--data", tmp_path)[1]
    left = read_json(tmp_path / "ecg" / "prepared" / "about.json")["left_out"]
    assert all(f"ecg_id {i + 1}: SCP codes" in problem for i, problem in enumerate(left))
    assert len(left) == len(bad)


def test_what_all_records_need_must_be_there_and_verify(copy, tmp_path, script, refused):
    given = (ptbxl, "--from", copy, "--data", tmp_path)
    sums = copy / "SHA256SUMS.txt"
    statements = copy / "scp_statements.csv"
    content(lambda c: b"xx" + c[2:])(copy / "records100" / "00000" / "00003_lr")
    assert "00003_lr.dat: its SHA-256" in script(*given)[1]
    content(lambda c: c + b"\n", ".csv")(copy / "ptbxl_database")
    for spoil, says in (
        (lambda: None, "ptbxl_database.csv: its SHA-256"),
        (
            lambda: edit_table(copy, "diagnostic", "", slice(None), statements.name),
            "no diagnostic code of CD, HYP",
        ),
        (
            lambda: (statements.write_text("a,b\n1,2\n"), write_sums(copy)),
            "scp_statements.csv is not PTB-XL's",
        ),
        (statements.unlink, "scp_statements.csv is missing"),
        (lambda: sums.write_text("nothing\n"), "is not a list of SHA-256 sums"),
        (sums.unlink, "SHA256SUMS.txt is missing"),
        (sums.mkdir, "SHA256SUMS.txt"),
    ):
        spoil()
        assert says in refused(*given)


def serve(folder: Path) -> None:
    Server.content = {
        f"/{p.relative_to(folder)}": p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


RECORD = "/records100/00000/00009_lr.dat"


def test_download_over_a_bad_line(server, source, tmp_path, script, refused, monkeypatch):
    serve(source)
    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=200_000))
        assert "are free" in refused(ptbxl, "--url", server, "--data", tmp_path, status=1)
    assert not any("records100" in path for path, _ in Server.asked)
    Server.faults = {
        "/SHA256SUMS.txt": [503],
        "/ptbxl_database.csv": ["cut", 503],
        RECORD: [503, "cut", "cut"],
    }
    given = (ptbxl, "--url", server, "--data", tmp_path)
    assert "20 records" in script(*given)[1]
    fetched = tmp_path / "ecg" / "files"
    assert (fetched / RECORD[1:]).read_bytes() == Server.content[RECORD]
    assert not list(fetched.rglob("*.part"))
    assert len(Server.connections) < len(Server.asked) / 2  # connections are used again
    Server.asked.clear()
    (fetched / RECORD[1:]).unlink()
    (fetched / "records100" / "00000" / "00010_lr.dat").write_bytes(b"something else")
    assert script(*given)[0] == 0
    wanted = ["/SHA256SUMS.txt", RECORD, "/records100/00000/00010_lr.dat"]
    assert sorted(path for path, _ in Server.asked) == wanted  # what verifies is skipped


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: "<html>sign in first</html>\n",
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "?" + text[1:],
        lambda text: "\n".join(line for line in text.splitlines() if "00009_lr" not in line),
    ],
)
def test_a_list_of_sums_that_came_wrong_is_asked_for_again(
    server, source, tmp_path, script, refused, spoil
):
    serve(source)
    given = (ptbxl, "--url", server, "--data", tmp_path)
    good = Server.content["/SHA256SUMS.txt"].decode()
    Server.content["/SHA256SUMS.txt"] = spoil(good).encode()
    assert "SHA256SUMS.txt" in refused(*given)
    Server.content["/SHA256SUMS.txt"] = ("\n" + good.replace("  ", "  ./") + "\n").encode()
    assert script(*given)[0] == 0
    Server.faults = {"/SHA256SUMS.txt": [503] * 9}  # what is there goes on serving
    assert script(*given)[0] == 0
    assert "SHA256SUMS.txt" in names(tmp_path / "ecg" / "files")
    assert not [name for name in names(tmp_path / "ecg" / "files") if name.startswith(".")]


@pytest.mark.parametrize("fault", ["wrong byte", "short", 403, 404])
def test_a_file_that_cannot_be_had_is_named_and_the_others_are_kept(
    server, source, tmp_path, script, refused, fault
):
    serve(source)
    Server.faults = {RECORD: [fault] * {403: 1, 404: 2}.get(fault, 5)}
    strict = ["--strict"] if fault == 404 else []
    err = refused(ptbxl, "--url", server, "--data", tmp_path, *strict)
    assert "1 of 40 files" in err
    assert "00009_lr.dat" in err
    kept = list((tmp_path / "ecg" / "files").rglob("*_lr.*"))
    assert len(kept) == 39  # and nothing wrong under that name
    assert names(tmp_path / "ecg") == ["files"]
    out = script(ptbxl, "--url", server, "--data", tmp_path)[1]
    records = 19 if fault == 404 else 20  # a record that the server does not have is left out
    assert f"{records} records" in out
    assert ("00009_lr.dat is missing" in out) == (fault == 404)


@pytest.mark.skipif(not (REAL / "ptbxl-mini").is_dir(), reason="needs ../shared/data/ptbxl-mini")
def test_the_real_records_have_the_stated_classes_by_fold(tmp_path, script):
    assert "500 records in" in script(ptbxl, "--from", REAL / "ptbxl-mini", "--data", tmp_path)[1]
    arrays = load(tmp_path / "ecg" / "prepared")
    labels = arrays["labels"]
    fold = arrays["fold"]
    assert labels.sum(0).tolist() == [297, 73, 96, 78, 40]
    assert labels[fold == 9].sum(0).tolist() == [36, 16, 21, 10, 8]
    assert [(fold == f).sum() for f in (1, 9, 10)] == [58, 81, 66]
    assert (labels.sum(1) == 0).sum() == 12
    record = REAL / "ptbxl-mini" / "records100" / "00000" / "00042_lr"
    ours = (arrays["samples"][41] - arrays["baseline"][41]) / arrays["gain"][41]
    np.testing.assert_allclose(ours, wfdb.rdrecord(str(record)).p_signal)


# Graphs.


def test_the_layout_is_the_source_summed_up_by_loops(tmp_path):
    raw = write_graphs(tmp_path / "g", 40)
    arrays = load(tmp_path / "g")
    about = read_json(tmp_path / "g" / "about.json")
    assert [(name, a.dtype) for name, a in arrays.items()] == [*graphs.ARRAYS.items()]
    assert about["format"] == "metapt graphs 2"
    counts = {
        "graphs": 300,
        "nodes": raw.sizes.sum(),
        "edges": 5788,
        "tasks": 60,
        "finetune_terms": 40,
    }
    assert {name: about[name] for name in counts} == counts
    labels = np.unpackbits(arrays["labels"], axis=1, bitorder="little")[:, :60]
    np.testing.assert_array_equal(labels, raw.labels)
    node = 0
    edge = 0
    before = 0
    for graph, (size, degree) in enumerate(zip(raw.sizes, raw.degrees, strict=True)):
        edges = raw.edges[:, before : before + degree]
        features = raw.features[before : before + degree]
        assert (arrays["sizes"][graph], arrays["degrees"][graph]) == (size, degree)
        assert arrays["centre"][graph] == raw.centre[graph]
        assert arrays["species"][graph] == raw.species[graph]
        for number in range(size):
            into = edges[1] == number
            found = arrays["source"][edge : edge + into.sum()]
            assert found.tolist() == sorted(edges[0, into])
            expected = features[into].sum(0) + np.eye(9)[7]
            np.testing.assert_array_equal(arrays["sums"][node, :9], expected)
            assert arrays["sums"][node, 9] == into.sum() + 1
            node += 1
            edge += into.sum()
        before += degree


def without_last_edge(raw):
    last = np.flatnonzero(raw.degrees)[-1]
    raw.degrees[last] -= 1
    return raw._replace(edges=raw.edges[:, :-1], features=raw.features[:-1])


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda raw: raw.centre.__setitem__(5, 99), "graph 5: its centre"),
        (lambda raw: raw.labels.__setitem__((9, 3), 2), "graph 9: a label"),
        (lambda raw: raw.edges.__setitem__((0, 0), 77), "an edge leaves the graph"),
        (lambda raw: raw.features.__setitem__((0, 0), np.nan), "an edge feature is not finite"),
        (lambda raw: raw.sizes.__setitem__(4, 0), "graph 4: it has no nodes"),
        (lambda raw: raw._replace(labels=raw.labels[:, 1:]), "labels of the graphs"),
        (without_last_edge, "an edge has no counterpart"),
    ],
)
def test_a_graph_that_cannot_be_is_refused_by_number(tmp_path, spoil, says):
    raw = generated()
    raw = spoil(raw) or raw
    with pytest.raises(BadInput, match=says):
        graphs.prepare_graphs(tmp_path / "g", [raw], [f"GO:{i}" for i in range(60)], 0)
    assert not names(tmp_path)


# The graphs of Hu et al.


def archive(path: Path, members: dict) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name, content)


@pytest.fixture(scope="module")
def benchmark_zip(tmp_path_factory):
    """bio_dataset.zip in small."""
    folder = tmp_path_factory.mktemp("zip")
    write_published(folder / "file.pt", generated(species=(9606, 4932)))
    member = (folder / "file.pt").read_bytes()
    members = {f"x/un{hu_graphs.FILE}": b"0" * 999, f"x/{hu_graphs.FILE}": member}
    archive(folder / "bio_dataset.zip", members)
    return folder / "bio_dataset.zip"


@pytest.mark.parametrize("new", [False, True])
def test_the_published_file_is_read_in_both_containers(tmp_path, script, monkeypatch, new):
    (tmp_path / "supervised" / "processed").mkdir(parents=True)
    write_published(tmp_path / hu_graphs.FILE, generated(species=(9606, 4932)), new)
    assert zipfile.is_zipfile(tmp_path / hu_graphs.FILE) == new
    monkeypatch.setattr(hu_graphs, "AT_ONCE", 100)  # in three pieces
    as_pyg_does = [(datasets.FakeData, "torch_geometric.data.data.Data")]
    with torch.serialization.safe_globals(as_pyg_does):
        allowed = set(torch.serialization.get_safe_globals())
        assert "300 graphs" in script(hu_graphs, "--from", tmp_path, "--data", tmp_path)[1]
        assert set(torch.serialization.get_safe_globals()) == allowed
    write_graphs(tmp_path / "direct", 40, species=(9606, 4932))
    for name in graphs.ARRAYS:
        there = tmp_path / "ppi" / "published" / f"{name}.npy"
        assert there.read_bytes() == (tmp_path / "direct" / f"{name}.npy").read_bytes()
    about = read_json(tmp_path / "ppi" / "published" / "about.json")
    assert (about["tasks"], about["finetune_terms"], about["terms"][20]) == (60, 40, "FT task 0")


class Hostile:
    def __reduce__(self):
        return os.system, ("echo harm",)


@pytest.mark.parametrize("new", [False, True])
def test_a_pickle_that_asks_for_anything_else_is_refused_by_name(tmp_path, new):
    for extra, asked in (
        (Hostile(), r"(posix|os|nt)\.system"),
        (eval, "eval$"),
        (getattr, "getattr$"),
        (Path("x"), r"pathlib\S*Path"),
    ):
        write_published(tmp_path / "file.pt", generated(graphs=9), new, extra=extra)
        with pytest.raises(BadInput, match=rf"file.pt .*it asks for {asked}"):
            hu_graphs.read_pyg(tmp_path / "file.pt")


def test_other_files_are_refused(tmp_path, refused):
    path = tmp_path / "file.pt"
    torch.save([1, 2], path)
    pair = path.read_bytes()
    write_published(path, generated(), True)
    contents = {
        b"": "torn",
        b"no pickle": "file.pt",
        pickle.dumps([1]): "file.pt",
        pair: "no pair",
        path.read_bytes()[:99_999]: "torn",
    }
    for content, says in contents.items():
        path.write_bytes(content)
        assert says in refused(hu_graphs, "--from", path, "--data", tmp_path)
    assert "is missing" in refused(hu_graphs, "--from", tmp_path / "none", "--data", tmp_path)
    assert "holds neither" in refused(hu_graphs, "--from", tmp_path / "ppi", "--data", tmp_path)
    assert not names(tmp_path / "ppi")


WRONG_ARRAYS = [
    ("edge_attr", torch.zeros(3, 9)),
    ("edge_attr", torch.zeros(5788)),
    ("edge_index", torch.zeros(2, 5788)),
    ("edge_index", torch.zeros(3, 5788, dtype=torch.long)),
    ("center_node_idx", torch.full((300,), 0.5)),
    ("species_id", torch.full((300,), 2**40)),
    ("species_id", torch.full((300,), torch.nan)),
    ("edge_attr", torch.full((5788, 9), torch.nan)),
]
WRONG_SLICES = [
    ("x", torch.arange(10)),
    ("x", torch.arange(301).float()),
    ("x", torch.zeros(301, 2, dtype=torch.long)),
    ("edge_index", torch.arange(300)),
    ("edge_index", torch.arange(301).flip(0)),
    ("species_id", None),
]
NO_GRAPHS = {name: torch.zeros(1, dtype=torch.long) for name in ("x", *hu_graphs.PARTS)}


@pytest.mark.parametrize(
    ("more", "slices"),
    [
        *(({name: value}, {}) for name, value in WRONG_ARRAYS),
        *(({}, {name: value}) for name, value in WRONG_SLICES),
        ({}, NO_GRAPHS),
    ],
)
def test_a_published_file_of_wrong_shapes_is_refused_and_the_good_one_stays(
    tmp_path, refused, more, slices
):
    good = write_graphs(tmp_path / "ppi" / "published")
    write_published(tmp_path / "file.pt", good, True, slices=slices, **more)
    refused(hu_graphs, "--from", tmp_path / "file.pt", "--data", tmp_path)
    assert load(tmp_path / "ppi" / "published")["sizes"].tolist() == good.sizes.tolist()
    assert names(tmp_path / "ppi") == ["published"]


def test_bad_archives_are_refused(benchmark_zip, tmp_path, monkeypatch, refused, script):
    path = tmp_path / "bio_dataset.zip"
    content = benchmark_zip.read_bytes()
    given = (hu_graphs, "--from", path, "--data", tmp_path)
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    locked = bytearray(content)
    # The flags of each member: encrypted.
    for header, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        for at in re.finditer(re.escape(header), content):
            locked[at.start() + place] |= 1
    for bad, says in (
        (bytes(flipped), "not a whole zip"),
        (content[:-30], "not a whole zip"),
        (b"", "not a whole zip"),
        (bytes(locked), "encrypted"),
    ):
        path.write_bytes(bad)
        assert says in refused(*given)
    for name in ("../evil", "/etc/evil", "a/../../evil", "..\\evil", "C:\\evil"):
        archive(path, {hu_graphs.FILE: b"x", name: b"x"})
        assert "leaves the folder" in refused(*given)
    archive(path, {"other": b"x"})
    assert "holds no supervised" in refused(*given)
    path.write_bytes(content)
    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=1000))
        assert "are free" in refused(*given, status=1)
    assert not names(tmp_path / "ppi")
    (tmp_path / "ppi" / "geometric_data_processed.pt").write_bytes(b"the user's own")
    assert script(*given)[0] == 0
    assert names(tmp_path / "ppi") == ["geometric_data_processed.pt", "published"]


@pytest.mark.parametrize("name", ["X.ZIP", "bio_dataset.zip?download=1", "bio_dataset", "a.zip.1"])
def test_an_archive_is_one_whatever_its_name(benchmark_zip, tmp_path, script, name):
    (tmp_path / "in").mkdir()
    path = Path(shutil.copy(benchmark_zip, tmp_path / "in" / name))
    assert "300 graphs" in script(hu_graphs, "--from", path, "--data", tmp_path / "data")[1]


@pytest.mark.parametrize("name", ["BIO_DATASET.ZIP", "bio_dataset.zip?download=1"])
def test_an_archive_is_found_in_a_folder(benchmark_zip, tmp_path, script, name):
    (tmp_path / "in").mkdir()
    shutil.copy(benchmark_zip, tmp_path / "in" / name)
    assert "300 graphs" in script(hu_graphs, "--from", tmp_path / "in", "--data", tmp_path)[1]


def test_of_two_published_files_both_are_named(benchmark_zip, tmp_path, refused):
    folder = tmp_path / "in"
    for place in ("a", "b"):
        path = folder / place / hu_graphs.FILE
        path.parent.mkdir(parents=True)
        path.write_bytes(b"")
    err = refused(hu_graphs, "--from", folder, "--data", tmp_path)
    assert f"{folder / 'a' / hu_graphs.FILE} and {folder / 'b' / hu_graphs.FILE}" in err
    shutil.rmtree(folder / "b")
    shutil.copy(benchmark_zip, folder)
    err = refused(hu_graphs, "--from", folder, "--data", tmp_path)
    assert f"{folder / 'bio_dataset.zip'} and {folder / 'a' / hu_graphs.FILE}" in err
    archive(folder / "x.zip", {f"a/{hu_graphs.FILE}": b"", f"b/{hu_graphs.FILE}": b""})
    err = refused(hu_graphs, "--from", folder / "x.zip", "--data", tmp_path)
    assert f"a/{hu_graphs.FILE} and b/{hu_graphs.FILE}" in err


def test_a_mirror_may_have_a_query(server, source, tmp_path, script):
    Server.content = {
        f"/p/{path.relative_to(source)}?download=1": path.read_bytes()
        for path in source.rglob("*")
        if path.is_file()
    }
    url = f"{server}/p/?download=1"
    assert "20 records" in script(ptbxl, "--url", url, "--data", tmp_path)[1]


# STRING and GO.


@pytest.fixture
def string_files(tmp_path):
    return datasets.write_string(tmp_path / "string")


def test_ego_networks_by_hand(string_files, tmp_path, script):
    given = (string_graphs, "--from", string_files, "--data", tmp_path)
    assert script(*given, "--cap", 3, "--species", 1)[0] == 0
    arrays = load(tmp_path / "ppi" / "string-yeast")
    about = read_json(tmp_path / "ppi" / "string-yeast" / "about.json")
    assert about["terms"] == ["GO:1", "GO:2"]
    # The first has 3 neighbours, of which the weakest gives way.
    assert arrays["sizes"].tolist() == [3, 3, 3, 2]
    assert arrays["degrees"].tolist() == [6, 6, 6, 2]
    assert arrays["labels"].tolist() == [[1], [2], [3], [0]]
    assert (arrays["species"].tolist(), arrays["centre"].tolist()) == ([1] * 4, [0] * 4)
    columns = {"coexpression": 3, "database": 5, "self-loop": 7, "number": 9}
    sums = arrays["sums"][:3, list(columns.values())]
    assert sums.T.tolist() == [[2, 1, 1], [1, 0, 1], [1, 1, 1], [3, 3, 3]]
    assert arrays["sums"][:3].sum() == sums.sum()


BAD_LINKS = [
    "1 9 0.5\n9 1 0.5\n",
    "1 2 nan\n2 1 nan\n",
    "",
    "1 1.5 1\n",
    "1 2\n2 1\n",
    "1 1e300 1\n",
    "1 1 1\n",
]
BAD_DICTIONARIES = [
    "{'p0': ",
    "[1, 2]",
    "{'p0': 0, 'p1': 0}",
    "{'p0': 10**12}",
    "{'p0': 0.5}",
    "{'p0': 10000000000000}",
    "{}",
    "{'p0': 1e300}",
    "{'p0': None}",
]
BAD_MATRICES = [
    "#id\tGO:1\np0\tmany\n",
    "#id\tGO:1\np0\t256\n",
    "",
    "#id\tGO:1\n",
    "#id\np0\n",
    "#id\tGO:1\np0\t-1\n",
]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *itertools.product(["Org1_database_x.txt"], BAD_LINKS),
        *itertools.product(["B_node_dict.txt"], BAD_DICTIONARIES),
        *itertools.product(["org_1_BP.txt"], BAD_MATRICES),
        ("org_1_MF.txt.gz", gzip.compress(b"#id\tGO:1\n" * 99)[:-20] + b"torn" * 9),
    ],
)
def test_bad_string_files_are_named(string_files, tmp_path, refused, name, content):
    (string_files / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert name in refused(string_graphs, "--from", string_files, "--data", tmp_path)
    assert not names(tmp_path / "ppi")


def links(*rows) -> str:
    """Lines of a network, each link in both directions."""
    lines = []
    for u, v, score in rows:
        lines.append(f"{u}\t{v}\t{score}\n")
        lines.append(f"{v}\t{u}\t{score}\n")
    return "".join(lines)


TWINS = {
    "unpacked beside": ("org_1_BP.txt", "org_1_BP.txt.gz"),
    "a second dictionary": ("B_node_dict.txt", "C_node_dict.txt"),
    "a dictionary unpacked beside": ("B_node_dict.txt", "B_node_dict.txt.gz"),
    "a second date": ("Org1_database_x.txt", "Org1_database_27May2022.txt"),
    "a channel unpacked beside": ("Org1_database_x.txt", "Org1_database_x.txt.gz"),
    "transferred": ("Org1_database_x.txt", "Org1_database_transferred_x.txt"),
    "a second species of a channel": ("Org1_database_x.txt", "Org2_database_x.txt"),
    "one in original": ("org_1_BP.txt", "original/org_1_BP.txt"),
}


@pytest.mark.parametrize("kind", TWINS)
def test_of_two_files_in_one_role_both_are_named(string_files, tmp_path, refused, kind):
    first, second = TWINS[kind]
    content = (string_files / first).read_bytes()
    (string_files / "original").mkdir()
    twin = gzip.compress(content) if second.endswith(".gz") else content
    (string_files / second).write_bytes(twin)
    err = refused(string_graphs, "--from", string_files, "--data", tmp_path)
    assert f"{string_files / first} " in err.replace(":", " ")
    assert f"{string_files / second}" in err
    assert not names(tmp_path / "ppi")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("Org2_fusion_x.txt", links((1, 2, 0.5))),
        ("org_2_MF.txt", "#id\tGO:9\np0\t1\n"),
    ],
)
def test_files_of_two_species_are_refused(string_files, tmp_path, refused, name, content):
    (string_files / name).write_text(content)
    err = refused(string_graphs, "--from", string_files, "--data", tmp_path)
    assert "two species" in err
    assert name in err
    assert "Org1_coexpression_x.txt" in err


@pytest.mark.parametrize("name", ["textmining_transferred", "transferred_textmining"])
def test_a_transferred_channel_is_not_its_channel(string_files, tmp_path, refused, name):
    path = string_files / f"Org1_{name}_x.txt"
    path.write_text(links((1, 2, 0.5)))
    err = refused(string_graphs, "--from", string_files, "--data", tmp_path)
    assert f"{path} has evidence transferred from other species" in err


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("org_1_MF.txt", "#id\tGO:1\np0\t1\n", "the term GO:1 is in two files"),
        ("org_1_MF.txt", "#id\tGO:3\tGO:3\np0\t1\t0\n", "the term GO:3 is there twice"),
        ("org_1_MF.txt", "#id\tGO:3\np0\t1\np0\t0\n", "the protein p0 is there twice"),
        ("org_1_MF.txt", "#id\tGO:3\nq0\t1\n", "no row is of a protein in the dictionary"),
        (
            "Org1_fusion_x.txt",
            links((1, 2, 0.5), (1, 2, 0.6)),
            "the link of nodes 1 and 2 has two scores, 0.5 and 0.6",
        ),
        ("Org1_fusion_x.txt", "1 2 0.5\n2 1 0.6\n", "nodes 1 and 2 has two scores, 0.5 and 0.6"),
        (
            "Org1_fusion_x.txt",
            links((1, 2, 0.5)) + "3 1 0.2\n",
            "the link from node 3 to node 1 lacks its other direction",
        ),
    ],
)
def test_what_is_there_twice_is_refused(string_files, tmp_path, refused, name, content, says):
    (string_files / name).write_text(content)
    err = refused(string_graphs, "--from", string_files, "--data", tmp_path)
    assert says in err
    assert name in err


def test_what_is_left_out_is_counted(string_files, tmp_path, script):
    given = (string_graphs, "--from", string_files, "--data", tmp_path)
    matrix = "#id\tGO:3\np0\t1\nq1\t1\nq2\t1\n"
    (string_files / "org_1_MF.txt").write_text(matrix)
    (string_files / "Org1_fusion_x.txt").write_text(links((1, 2, 0.5), (1, 2, 0.5), (2, 3, 0.1)))
    (string_files / "Org1_homology_x.txt").write_text("")
    out = script(*given)[1]
    assert "org_1_BP.txt: left out 1 of 5 rows, of proteins that the dictionary lacks" in out
    assert "org_1_MF.txt: left out 2 of 3 rows, of proteins that the dictionary lacks" in out
    assert "org_1_MF.txt: 3 of 4 proteins have no row: all labels 0" in out
    assert "org_1_BP.txt: 0" not in out
    assert "Org1_fusion_x.txt: 2 lines repeat a link with the same score" in out
    assert f"left out: {string_files / 'Org1_homology_x.txt'} is of none of the channels" in out
    missing = "neighborhood, cooccurence, experimental, textmining"
    assert f"zero throughout, as there is no file of them: {missing}\n" in out
    assert "4 graphs" in out


def test_names_may_have_spaces_between_tabs(string_files, tmp_path, script):
    numbers = {"protein 0": 0, "p1": 1, "p2": 2, "p3": 3}
    (string_files / "B_node_dict.txt").write_text(str(numbers))
    rows = ["#id\tGO:1 a term\tGO:2", "protein 0\t1\t0", "p1\t0\t 1", "p2\t1\t1\t", "p3\t0\t0"]
    (string_files / "org_1_BP.txt").write_text("\r\n".join(rows))
    out = script(string_graphs, "--from", string_files, "--data", tmp_path)[1]
    assert "left out" not in out
    folder = tmp_path / "ppi" / "string-yeast"
    assert read_json(folder / "about.json")["terms"] == ["GO:1 a term", "GO:2"]
    assert load(folder)["labels"].tolist() == [[1], [2], [3], [0]]


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("B_node*", "holds no *_node_dict.txt\n"),
        ("org_*", "holds no org_<taxon>_*.txt\n"),
        ("Org*", "holds no Org<taxon>_<channel>_*.txt\n"),
        ("[Oo]rg*", "holds no org_<taxon>_*.txt and no Org<taxon>_<channel>_*.txt\n"),
    ],
)
def test_what_is_missing_is_said(string_files, tmp_path, refused, pattern, says):
    for path in string_files.glob(pattern):
        path.unlink()
    assert says in refused(string_graphs, "--from", string_files, "--data", tmp_path)


def test_a_file_is_compressed_or_not_whatever_its_name(string_files, tmp_path, script):
    path = string_files / "org_1_BP.txt"
    path.rename(string_files / "org_1_BP.TXT.GZ")
    path = string_files / "Org1_database_x.txt"
    path.write_bytes(gzip.compress(path.read_bytes()))
    assert "4 graphs" in script(string_graphs, "--from", string_files, "--data", tmp_path)[1]
    assert load(tmp_path / "ppi" / "string-yeast")["labels"].tolist() == [[1], [2], [3], [0]]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--cap", 1], "--cap"),
        (["--species", 2**40], "species"),
        (["--from", "."], "holds no"),
        *((["--name", name], "--name") for name in ("..", "", "a/b", ".hidden")),
    ],
)
def test_string_options(string_files, tmp_path, refused, given, says):
    assert says in refused(string_graphs, "--from", string_files, "--data", tmp_path, *given)


@pytest.fixture(scope="session")
def yeast(tmp_path_factory):
    """The real yeast networks, in the size that the script gives them."""
    with files.locked(tmp_path_factory.mktemp("ppi") / "yeast", graphs.FORMAT) as folder:
        networks, terms, labels = string_graphs.read_string(REAL / "ppi" / "string-yeast")
        raw = string_graphs.ego_networks(networks, labels, 64, 4932)
        graphs.prepare_graphs(folder, [raw], terms, 0, source="", licence="")
    return folder


@pytest.mark.skipif(
    not (REAL / "ppi" / "string-yeast").is_dir(), reason="needs ../shared/data/ppi/string-yeast"
)
def test_yeast_is_what_its_readme_says(yeast):
    arrays = load(yeast)
    about = read_json(yeast / "about.json")
    counts = {"graphs": 4900, "nodes": 96_057, "edges": 2_515_916, "tasks": 980}
    assert {name: about[name] for name in counts} == counts
    original = np.load(REAL / "ppi" / "string-yeast" / "yeast_string_go.npz", allow_pickle=False)
    inside = original["in_network"]
    u, v = original["edge_index"]
    labels = {}
    for name in original.files:
        if name.startswith("go_") and not name.endswith("terms"):
            columns = original[name][inside].T
            labels.update(zip(original[f"{name}_terms"], columns, strict=True))
    ours = np.unpackbits(arrays["labels"], axis=1, bitorder="little")
    for i, term in enumerate(about["terms"]):
        assert (ours[:, i] == labels[term]).all()
    degrees = [
        np.bincount(np.concatenate([u[linked], v[linked]]), minlength=len(inside))[inside]
        for linked in (np.ones(len(u), bool), *(original["edge_score"].T > 0))
    ]
    assert degrees[0].sum() == 2 * 63_309
    np.testing.assert_array_equal(arrays["sizes"], np.minimum(degrees[0] + 1, 64))
    first = arrays["sizes"].cumsum() - arrays["sizes"]
    centre = arrays["sums"][first + arrays["centre"]]
    whole = degrees[0] < 64
    np.testing.assert_array_equal(centre[whole, :6], np.stack(degrees[1:], 1)[whole])


# Universal Dependencies.

UPPER_SORBIAN = [[("Město", "NOUN"), ("rěka", "VERB")], [("Haj", "INTJ")]]
IRISH = [[("Tá", "VERB"), ("sé", "PRON"), ("...", "PUNCT")], [("φ", "SYM")]]


@pytest.fixture
def treebanks(tmp_path):
    """Two treebanks."""
    folder = tmp_path / "treebanks"
    write_treebank(folder / "UD_Upper_Sorbian-Made", "hsb_made", UPPER_SORBIAN, "LGPL-LR")
    write_treebank(folder / "UD_Irish-Up", "ga_up", IRISH, "CC BY-SA 4.0")
    return folder


def read_treebanks(folder: Path) -> dict[str, list]:
    """The prepared sentences of each treebank, each a list of (form, tag)."""
    arrays = load(folder)
    about = read_json(folder / "about.json")
    ends = arrays["form_offsets"]
    text = arrays["forms"].tobytes()
    forms = [text[ends[i] : ends[i + 1]].decode() for i in range(len(ends) - 1)]
    assert ends[-1] == len(text)
    assert arrays["sentence_offsets"][-1] == len(forms) == len(arrays["tags"])
    words = [(form, about["tags"][tag]) for form, tag in zip(forms, arrays["tags"], strict=True)]
    sentences = {treebank["name"]: [] for treebank in about["treebanks"]}
    for number, place in enumerate(arrays["treebank"]):
        first, last = arrays["sentence_offsets"][number : number + 2]
        sentences[about["treebanks"][place]["name"]].append(words[first:last])
    for treebank in about["treebanks"]:
        found = sentences[treebank["name"]]
        assert treebank["sentences"] == len(found)
        assert treebank["words"] == sum(len(sentence) for sentence in found)
    return sentences


def test_treebanks_come_out_as_they_went_in(treebanks, tmp_path, script):
    out = script(ud, "--from", treebanks, "--data", tmp_path)[1]
    prepared = tmp_path / "ud" / "prepared"
    assert f"2 treebanks, 4 sentences, 7 words in {prepared}, 0 treebanks left out" in out
    assert read_treebanks(prepared) == {"Irish-Up": IRISH, "Upper_Sorbian-Made": UPPER_SORBIAN}
    assert {name: array.dtype.str for name, array in load(prepared).items()} == {
        "form_offsets": "<i8",
        "sentence_offsets": "<i8",
        "forms": "|u1",
        "tags": "|u1",
        "treebank": "<i4",
    }
    about = read_json(prepared / "about.json")
    assert (about["format"], about["archive"], about["left_out"]) == (ud.FORMAT, None, [])
    irish, sorbian = about["treebanks"]
    path = treebanks / "UD_Irish-Up" / "ga_up-ud-train.conllu"
    assert irish["files"] == {path.name: files.digest(path)}
    assert (irish["language"], irish["code"]) == ("Irish", "ga_up")
    assert (sorbian["language"], sorbian["licence"]) == ("Upper_Sorbian", "LGPL-LR")
    assert script(ud, "--check", "--data", tmp_path)[0] == 0


PUBLISHED = """\
# sent_id = 1
# text = Vámonos al mar.
1-2\tVámonos\t_\t_\t_\t_\t_\t_\t_\t_
1\tVamos\tir\tVERB\t_\tMood=Imp\t0\troot\t_\t_
2\tnos\tnosotros\tPRON\t_\t_\t1\tobj\t_\t_
# a comment within
3-4\tal\t_\t_\t_\t_\t_\t_\t_\t_
3\ta\ta\tADP\t_\t_\t5\tcase\t_\t_
4\tel\tel\tDET\t_\t_\t5\tdet\t_\t_
5\tmar\tmar\tNOUN\t_\t_\t1\tobl\t_\t_
5.1\tnada\tnada\tNOUN\t_\t_\t_\t_\t1:obj\tCopyOf=5


# sent_id = 2
1\tmil euros\tmil\tNUM\t_\t_\t0\troot\t_\t_
"""
READ = [
    [("Vamos", "VERB"), ("nos", "PRON"), ("a", "ADP"), ("el", "DET"), ("mar", "NOUN")],
    [("mil euros", "NUM")],
]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", ["", "\n", "\n\n", "missing"])
@pytest.mark.parametrize("packed", [False, True])
def test_conllu_is_read_as_it_is_published(tmp_path, script, end, last, packed):
    text = PUBLISHED.rstrip("\n") if last == "missing" else PUBLISHED + last
    content = text.replace("\n", end).encode()
    folder = write_treebank(tmp_path / "in" / "UD_Spanish-Made", "es_made", [])
    (folder / "es_made-ud-train.conllu").unlink()
    path = folder / ("es_made-ud-test.conllu.gz" if packed else "es_made-ud-test.conllu")
    path.write_bytes(gzip.compress(content) if packed else content)
    assert script(ud, "--from", tmp_path / "in", "--data", tmp_path)[0] == 0
    assert read_treebanks(tmp_path / "ud" / "prepared") == {"Spanish-Made": READ}


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("\tobj\t_\t_", "\tobj\t_", "line 5: 9 columns, expected 10"),
        ("\tobj\t_\t_", "\tobj\t_\t_\t_", "line 5: 11 columns, expected 10"),
        ("1\tVamos", "1 Vamos", "line 4: 9 columns, expected 10"),
        ("\tADP\t", "\tPREP\t", "line 8: the part of speech 'PREP' is none of ADJ, ADP"),
        ("\tADP\t", "\t_\t", "line 8: the part of speech '_' is none of"),
        ("5\tmar", "6\tmar", "line 10: the word is numbered '6', expected 5"),
        ("5\tmar", "x\tmar", "line 10: the word is numbered 'x', expected 5"),
        ("\n\n\n", "\n", "line 13: the word is numbered '1', expected 6"),
        ("\tmil euros\t", "\t\t", "line 15: the word is empty"),
        ("á", "\udce1", "line 2: it is not UTF-8"),
    ],
)
def test_a_line_that_is_no_conllu_is_named(treebanks, tmp_path, refused, old, new, says):
    path = treebanks / "UD_Irish-Up" / "ga_up-ud-dev.conllu"
    assert old in PUBLISHED
    path.write_bytes(PUBLISHED.replace(old, new).encode("utf-8", "surrogateescape"))
    assert f"{path}, {says}" in refused(ud, "--from", treebanks, "--data", tmp_path)
    assert names(tmp_path / "ud") == []


def test_a_torn_treebank_is_named(treebanks, tmp_path, refused):
    path = treebanks / "UD_Irish-Up" / "ga_up-ud-dev.conllu.gz"
    path.write_bytes(gzip.compress(PUBLISHED.encode())[:-20])
    err = refused(ud, "--from", treebanks, "--data", tmp_path)
    assert f"{path} cannot be read" in err


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("README.md", "License: CC BY-SA 4.0\n", "CC BY-SA 4.0"),
        ("README.txt", "x\nlicence:  GNU GPL 3.0\r\nz\n", "GPL"),
        ("README.md", "License: CC0 1.0\n", "CC0"),
        ("README.md", "License: LGPL-LR\n", "LGPL-LR"),
        ("README.md", "License: CC BY-NC-SA 3.0\n", None),
        ("README.md", "License: CC-BY-NC 4.0\n", None),
        ("README.md", "License: for research only\n", None),
        ("README.md", "License: public domain, non-commercial\n", None),
        ("LICENSE.txt", "Attribution-ShareAlike 4.0 International\n", "CC BY-SA 4.0"),
        ("LICENSE.txt", "http://creativecommons.org/licenses/by/3.0/\n", "CC BY 3.0"),
        ("LICENSE.txt", "Attribution-NonCommercial-ShareAlike 3.0 Unported\n", None),
        ("LICENSE.txt", "https://creativecommons.org/licenses/by-nc-sa/4.0/\n", None),
        ("LICENSE.txt", "Tags: CC BY 4.0. Texts: CC BY-NC 4.0.\n", None),
        ("LICENSE.txt", "GNU GENERAL PUBLIC LICENSE\n... only noncommercially ...\n", "GPL"),
        ("LICENSE", "All rights reserved.\n", None),
    ],
)
def test_the_licence_is_what_the_folder_says(treebanks, tmp_path, script, name, text, found):
    folder = write_treebank(treebanks / "UD_Old-One", "xx_one", IRISH, licence=None)
    (folder / name).write_text(text)
    out = script(ud, "--from", treebanks, "--data", tmp_path)[1]
    about = read_json(tmp_path / "ud" / "prepared" / "about.json")
    licences = {treebank["name"]: treebank["licence"] for treebank in about["treebanks"]}
    assert licences.get("Old-One") == found
    assert [text.partition(":")[0] for text in about["left_out"]] == ["UD_Old-One"] * (not found)
    assert ("left out: UD_Old-One: its licence" in out) == (not found)
    # What is left out need not be right.
    if not found:
        (folder / "xx_one-ud-train.conllu").write_text("1\n")
        assert script(ud, "--from", treebanks, "--data", tmp_path)[0] == 0


def test_a_licence_that_no_file_says_is_the_known_one(treebanks, tmp_path, script):
    write_treebank(treebanks / "UD_Galician-TreeGal", "gl_treegal", IRISH, licence=None)
    write_treebank(treebanks / "UD_Galician-Other", "gl_other", IRISH, licence=None)
    folder = write_treebank(treebanks / "UD_Faroese-OFT", "fo_oft", IRISH, licence="CC BY-NC 4.0")
    out = script(ud, "--from", treebanks, "--data", tmp_path)[1]
    about = read_json(tmp_path / "ud" / "prepared" / "about.json")
    licences = {treebank["name"]: treebank["licence"] for treebank in about["treebanks"]}
    assert licences["Galician-TreeGal"] == "LGPL-LR"
    assert "left out: UD_Galician-Other: its licence is unknown" in out
    assert f"left out: {folder.name}: its licence excludes commercial use: CC BY-NC 4.0" in out
    assert len(about["left_out"]) == 2
    known = [name for names in ud.KNOWN_LICENCES.values() for name in names.split()]
    assert len(known) == len(set(known)) == 50
    assert all(ud.recognise(licence).commercial for licence in ud.KNOWN_LICENCES)


def test_what_has_no_words_is_left_out(treebanks, tmp_path, script):
    write_treebank(treebanks / "UD_A-Withheld", "a_withheld", [[("_", "NOUN"), ("_", "X")]])
    write_treebank(treebanks / "UD_B-Empty", "b_empty", [])
    folder = write_treebank(treebanks / "UD_C-None", "c_none", IRISH)
    (folder / "c_none-ud-train.conllu").rename(folder / "none.conllu")
    out = script(ud, "--from", treebanks, "--data", tmp_path)[1]
    assert "left out: UD_A-Withheld: its words are withheld: each is _" in out
    assert "left out: UD_B-Empty: it has no sentences" in out
    assert "left out: UD_C-None: it has no file CODE-ud-PART.conllu" in out
    assert "left out: UD_C-None/none.conllu is not named CODE-ud-PART.conllu" in out
    assert "2 treebanks, 4 sentences" in out


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("UD_Irish-Up/ga_up-ud-train.conllu", "UD_Irish-Up/ga_up-ud-train.conllu.gz"),
        ("UD_Irish-Up/ga_up-ud-train.conllu", "UD_Irish-Up/ga_xx-ud-test.conllu"),
        ("UD_Irish-Up/ga_up-ud-excerpt.conllu", "UD_Irish-Up/ga_up-ud-train.conllu"),
        ("UD_Irish-Up", "UD_Irish-Up-copy/ga_up-ud-train.conllu"),
    ],
)
def test_of_two_treebanks_in_one_role_both_are_named(treebanks, tmp_path, refused, first, second):
    shutil.copytree(treebanks / "UD_Irish-Up", treebanks / "UD_Irish-Up-copy")
    if "copy" not in second:
        shutil.rmtree(treebanks / "UD_Irish-Up-copy")
    for name in (first, second):
        if not (treebanks / name).exists():
            (treebanks / name).write_text(conllu(IRISH))
    err = refused(ud, "--from", treebanks, "--data", tmp_path)
    assert f"{treebanks / first} and " in err
    assert str(treebanks / second.removesuffix("-copy/ga_up-ud-train.conllu")) in err


def test_where_treebanks_are_sought(treebanks, tmp_path, script, refused):
    given = ("--data", tmp_path)
    release = tmp_path / "in" / "ud-treebanks-v2.16"
    shutil.copytree(treebanks, release)
    assert "2 treebanks" in script(ud, "--from", tmp_path / "in", *given)[1]
    shutil.copytree(treebanks, tmp_path / "in" / "ud-treebanks-v2.15")
    err = refused(ud, "--from", tmp_path / "in", *given)
    assert f"{release.with_name('ud-treebanks-v2.15')} and {release}" in err
    assert "holds no folder UD_" in refused(ud, "--from", tmp_path / "ud", *given)
    assert "is missing" in refused(ud, "--from", tmp_path / "none", *given)
    for folder in treebanks.iterdir():
        (folder / "README.md").unlink()
    assert "no treebank that can be used; the first: UD_Irish-Up" in refused(
        ud, "--from", treebanks, *given
    )
    err = refused(ud, "--from", treebanks, "--release", "2.16", *given)
    assert "--release and --from exclude each other" in err


def release_of(folder: Path, path: Path) -> bytes:
    """The content of a release's .tgz with what `folder` holds, and some more."""
    with tarfile.open(path, "w:gz") as file:
        file.add(folder, "ud-treebanks-v2.16")
        for name in ("../evil.conllu", "/UD_A-B/../../x-ud-dev.conllu", "UD_A-B/code.py", "README"):
            member = tarfile.TarInfo(name)
            file.addfile(member)
        link = tarfile.TarInfo("ud-treebanks-v2.16/UD_Irish-Up/ga_up-ud-dev.conllu")
        link.type = tarfile.SYMTYPE
        link.linkname = "/etc/passwd"
        file.addfile(link)
    return path.read_bytes()


def test_a_release_over_a_bad_line(treebanks, tmp_path, server, script, refused):
    name = "ud-treebanks-v2.16.tgz"
    content = release_of(treebanks, tmp_path / "made.tgz")
    Server.content = {f"/{name}": content}
    Server.faults = {f"/{name}": [503, "cut", "cut"]}
    given = (ud, "--url", server, "--data", tmp_path)
    assert "2 treebanks, 4 sentences" in script(*given, "--release", "2.16")[1]
    third = len(content) // 3
    assert ranges() == [None, None, f"bytes={third}-", f"bytes={2 * third}-"]
    prepared = tmp_path / "ud" / "prepared"
    assert read_treebanks(prepared) == {"Irish-Up": IRISH, "Upper_Sorbian-Made": UPPER_SORBIAN}
    sha256 = hashlib.sha256(content).hexdigest()
    archive = {"file": name, "url": f"{server}/{name}", "sha256": sha256}
    assert read_json(prepared / "about.json")["archive"] == archive
    assert names(tmp_path / "ud") == ["prepared", name]
    Server.asked.clear()
    assert script(*given)[0] == 0  # it is there: nothing is asked
    assert ranges() == []
    assert "404" in refused(*given, "--release", "2.99")
    assert "--release is '../2'" in refused(*given, "--release", "../2")
    err = refused(ud, "--release", "2.99", "--data", tmp_path)
    assert "the address of release 2.99 is not known, but that of 2.14, 2.15, 2.16: --url" in err
    (tmp_path / "ud" / name).write_bytes(content[:-100])
    assert f"{name} is not a whole archive" in refused(*given)
    assert len(read_treebanks(prepared)) == 2


def test_an_archive_at_hand(treebanks, tmp_path, script, refused):
    path = treebanks / "UD_Irish-Up" / "ga_up-ud-train.conllu"
    release_of(treebanks, tmp_path / "made.tgz")
    given = (ud, "--from", tmp_path / "made.tgz", "--data", tmp_path)
    assert "2 treebanks, 4 sentences" in script(*given)[1]
    assert names(tmp_path) == ["made.tgz", "treebanks", "ud"]
    assert names(tmp_path / "ud") == ["prepared"]
    path.write_text("1\tword\n")
    release_of(treebanks, tmp_path / "made.tgz")
    err = refused(*given)
    assert f"{tmp_path / 'made.tgz'}/UD_Irish-Up/{path.name}, line 1: 2 columns" in err


@pytest.mark.skipif(not (REAL / "ud").is_dir(), reason="needs ../shared/data/ud")
def test_the_real_treebanks(tmp_path, script):
    out = script(ud, "--from", REAL / "ud", "--data", tmp_path)[1]
    assert "50 treebanks, 32120 sentences, 497891 words" in out
    assert "0 treebanks left out" in out
    found = read_treebanks(tmp_path / "ud" / "prepared")
    counts = {name: len(sentences) for name, sentences in found.items()}
    assert counts["Galician-TreeGal"] == 669
    assert counts["Faroese-OFT"] == 1183
    assert found["Latin-LLCT"][0][:3] == [("et", "CCONJ"), ("duas", "NUM"), ("inter", "ADP")]
    about = read_json(tmp_path / "ud" / "prepared" / "about.json")
    assert len({treebank["language"] for treebank in about["treebanks"]}) == 48
