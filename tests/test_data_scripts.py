"""The data scripts: downloads over bad lines, folders that appear whole or not at all, and what each data set becomes."""

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
from datasets import ROOT, Server, beat, generated, write_graphs, write_published, write_record, write_sums
from datasets import load_prepared as load

sys.path.append(str(ROOT / "data_scripts"))

import files
import graphs
import hu_graphs
import mnist
import ptbxl
import string_graphs
from files import BadInput

REAL = ROOT.parent / "shared" / "data"
CONTENT = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(autouse=True)
def script(monkeypatch, capsys):
    """Runs a script's command in this process, without pauses: (exit status, stdout, stderr)."""
    monkeypatch.setattr(files, "PAUSE", 0)
    monkeypatch.setattr(files.signal, "signal", lambda *_: None)

    def call(module, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            files.run(getattr(module, module.__name__))
        return (left.value.code, *capsys.readouterr())

    return call


@pytest.fixture
def refused(script):
    """The one line with which a script says no."""

    def call(module, *arguments, status=2):
        code, _, err = script(module, *arguments)
        assert (code, err.count("\n")) == (status, 1), err
        assert err.startswith(f"{module.__name__}: ")
        return err

    return call


@pytest.fixture
def server():
    Server.content, Server.faults, Server.asked, Server.connections = {"/file": CONTENT}, {}, [], set()
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
    [(b"", [503, "cut", "cut"], [None, None, "bytes=100000-", "bytes=200000-"]),
     (b"", ["cut", "no ranges"], [None, "bytes=100000-"]),
     (bytes(400_000), [], ["bytes=400000-", None]),  # more than there is
     (b"", ["cut", "other range"], [None, "bytes=100000-", None]),  # what came must not be appended
     (b"", ["cut", "less"], [None, "bytes=100000-", "bytes=100050-"]),
     (b"", [416], [None, None]), (b"", ["odd length"], [None]),
     (CONTENT, [], ["bytes=300000-"]),  # cut off after the last byte
     (b"?" * 1000, [], ["bytes=1000-", None])],  # of another file
)  # fmt: skip
def test_fetch_goes_on_where_it_can_and_else_begins_again(server, tmp_path, part, faults, asked):
    if part:
        (tmp_path / "file.part").write_bytes(part)
    Server.faults = {"/file": faults}
    assert fetch(server, tmp_path / "file")
    assert ranges() == asked
    assert fetch(server, tmp_path / "file")  # it is there and right: nothing is asked
    assert ranges() == asked


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/a b", "nowhere", "http://[", "ftp://127.0.0.1"])
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
    with files.locked(folder, form) as path, files.prepared_folder(path, {"format": form}) as append:
        append("a", np.array(values)[:1])
        append("a", np.array(values)[1:])


@pytest.mark.parametrize(
    ("put", "says"),
    [(lambda f: (f / "thesis.txt").write_text("years"), "holds thesis.txt"), (lambda f: (f / "sub").mkdir(), "holds sub"),
     (lambda f: (f / "b.npy").write_text("mine"), "holds b.npy"), (lambda f: (f / "b").symlink_to("/etc"), "holds b,"),
     (lambda f: ((f / "a.npy").unlink(), (f / "a.npy").mkdir()), "holds a.npy"),
     (lambda f: (f / "about.json").unlink(), "about.json is missing"),
     (lambda f: (f / "about.json").write_text('{"of": "me"}'), "not of the format 'form'"),
     (lambda f: (f / "about.json").write_text("[" * 9999), "not of the format 'form'"),
     (lambda f: (f / "about.json").write_text('{"format": "form", "arrays": {"a": 1}}'), "not of the format"),
     (lambda f: (f / "about.json").write_text('{"format": "form", "arrays": {}}'), "not of the format"),
     (lambda f: (shutil.rmtree(f), f.write_text("mine")), "is a file")],
)  # fmt: skip
def test_only_prepared_data_are_ever_replaced(tmp_path, put, says):
    prepare(folder := tmp_path / "ours", [1, 2])
    prepare(folder, [3, 4, 5])
    assert load(folder)["a"].tolist() == [3, 4, 5]
    put(folder)
    before = [(p, p.is_file() and p.read_bytes()) for p in sorted(tmp_path.rglob("*"))]
    with pytest.raises(BadInput, match=says):
        prepare(folder, [6])
    assert [(p, p.is_file() and p.read_bytes()) for p in sorted(tmp_path.rglob("*"))] == before


def test_the_old_folder_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    folder, real = tmp_path / "ours", Path.replace
    prepare(folder, [1, 2])
    with pytest.raises(ZeroDivisionError), files.prepared_folder(folder, {"format": "form"}) as append:
        append("a", np.zeros(3))
        1 / 0  # noqa: B018
    with pytest.raises(BadInput, match="holds late"), files.prepared_folder(folder, {"format": "form"}):
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
    (left := tmp_path / ".ours-metapt-x").mkdir()
    folder.replace(left / "old")  # killed between two renames
    with pytest.raises(ZeroDivisionError), files.locked(folder, "form"):
        1 / 0  # noqa: B018
    assert (load(folder)["a"].tolist(), names(tmp_path)) == ([1, 2], ["ours"])
    (elsewhere := tmp_path / "disk").mkdir()
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


def run_alone(name: str, *arguments, cwd: Path, **options):
    """A script in a process of its own, where metapt cannot be imported."""
    (cwd / "metapt.py").write_text("raise ImportError('a data script needs no metapt')")
    command = [sys.executable, ROOT / "data_scripts" / f"{name}.py", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(cwd), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=cwd, env=environment, text=True, stdout=-1, stderr=-1, **options)


def test_each_script_runs_alone(source, string_files, benchmark_zip, tmp_path):
    for name, given, says in (
        ("mnist", ("--from", tmp_path), "train-images-idx3-ubyte.gz is missing"),
        ("ptbxl", ("--from", source), "20 records in"),
        ("hu_graphs", ("--from", benchmark_zip), "300 graphs"),
        ("string_graphs", ("--from", string_files), "4 graphs"),
    ):
        assert (ROOT / "data_scripts" / f"{name}.py").read_text().startswith("# /// script\n")
        out, err = (running := run_alone(name, *given, cwd=tmp_path)).communicate()
        assert says in out + err
        assert running.returncode == (2 if name == "mnist" else 0), err
    assert names(tmp_path / "data" / "ppi") == ["published", "string-yeast"]
    assert len(load(tmp_path / "data" / "ecg" / "prepared")) == 8


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_download_that_was_stopped_goes_on(server, benchmark_zip, tmp_path, script, number):
    content = Server.content["/file"] = CONTENT + benchmark_zip.read_bytes()  # a zip may stand behind something else
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
    assert re.search(r"string-yeast/\w+.npy: File too large: [1-9][\d,]* bytes are needed, [\d,]+ are free", err)
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
        assert ".npy: No space left" in refused(string_graphs, "--from", string_files, "--data", tmp_path, status=1)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    with pytest.raises(files.Failed, match=r"file: No space left .*[1-9]\d\d,\d\d\d bytes are needed, 1,000 are free"):
        fetch(server, tmp_path / "file")
    assert not (tmp_path / "file.part").exists()


@pytest.mark.parametrize("module", [mnist, ptbxl, hu_graphs, string_graphs])
def test_usage(module, tmp_path, refused):
    assert "exclude each other" in refused(module, "--from", tmp_path, "--check")
    assert "No such option" in refused(module, "--frm", tmp_path)
    assert "about.json is missing" in refused(module, "--check", "--data", tmp_path)
    if module is string_graphs:
        assert "name it with --from" in refused(module, "--data", tmp_path)
    else:
        assert "--url and --from exclude each other" in refused(module, "--from", tmp_path, "--url", "http://x")
    (tmp_path / "file").write_text("x")
    assert "file" in refused(module, "--from", tmp_path, "--data", tmp_path / "file")


def test_check_names_what_is_damaged(string_files, tmp_path, script, refused):
    given = (string_graphs, "--data", tmp_path, "--name", "own")
    assert script(*given, "--from", string_files)[0] == 0
    code, out, _ = script(*given, "--check")
    assert (code, out) == (0, f"{tmp_path / 'ppi' / 'own'}: all 7 arrays are as they were written\n")
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
    arrays = {n: np.random.default_rng(0).integers(0, 9, s, np.uint8) for n, s in
              zip(mnist.FILES, ((20, 28, 28), 20, (9, 28, 28), 9), strict=True)}  # fmt: skip
    Server.content = {f"/{mnist.FILES[n][0]}": idx(v) for n, v in arrays.items()}
    sums = {n: (name, hashlib.sha256(Server.content[f"/{name}"]).hexdigest()) for n, (name, _) in mnist.FILES.items()}
    assert "SHA-256" in refused(mnist, "--url", server, "--data", tmp_path)
    monkeypatch.setattr(mnist, "FILES", sums)
    Server.faults = {"/train-images-idx3-ubyte.gz": ["cut"]}
    assert script(mnist, "--url", f"{server}/", "--data", tmp_path)[0] == 0
    assert names(tmp_path / "mnist") == ["files", "prepared"]
    for name, values in load(tmp_path / "mnist" / "prepared").items():
        np.testing.assert_array_equal(values, arrays[name])
    given = (mnist, "--from", tmp_path / "mnist" / "files", "--data", tmp_path / "other")
    (tmp_path / "mnist" / "files" / "t10k-labels-idx1-ubyte.gz").write_bytes(idx(np.zeros(9, np.uint8)))
    assert "t10k-labels-idx1-ubyte.gz: its SHA-256 is not" in refused(*given)
    (tmp_path / "mnist" / "files" / "t10k-labels-idx1-ubyte.gz").unlink()
    assert "t10k-labels-idx1-ubyte.gz is missing" in refused(*given)


@pytest.mark.skipif(not (REAL / "mnist").is_dir(), reason="needs ../shared/data/mnist")
def test_the_real_mnist(tmp_path, script):
    assert script(mnist, "--from", REAL / "mnist", "--data", tmp_path)[0] == 0
    arrays = load(tmp_path / "mnist" / "prepared")
    assert (arrays["train_images"].shape, arrays["test_images"].shape) == ((60_000, 28, 28), (10_000, 28, 28))
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
    gain, baseline = 250.0, list(range(0, 120, 10))
    write_record(copy / "records100" / "00000", "00007_lr", beat(7), gain=gain, baseline=baseline)
    write_sums(copy)
    code, out, err = script(ptbxl, "--from", copy, "--data", tmp_path)
    assert (code, err) == (0, "")
    assert "20 records in" in out
    arrays, about = load(folder := tmp_path / "ecg" / "prepared"), json.loads((folder / "about.json").read_text())
    assert (about["format"], about["records"], about["left_out"]) == ("metapt ecgs 2", 20, [])
    assert (about["leads"], about["classes"]) == (list(ptbxl.LEADS), list(ptbxl.SUPERCLASSES))
    assert {name: (a.dtype.str, a.shape) for name, a in arrays.items()} == {
        "samples": ("<i2", (20, 1000, 12)), "ecg_id": ("<i8", (20,)), "patient": ("<i8", (20,)), "fold": ("<i8", (20,)),
        "labels": ("|u1", (20, 5)), "gain": ("<f4", (20, 12)), "baseline": ("<f4", (20, 12)), "sums": ("<f8", (20, 2)),
    }  # fmt: skip
    for i in range(20):
        assert (arrays["ecg_id"][i], arrays["patient"][i]) == (i + 1, i + 1001)
        assert arrays["fold"][i] == (i + 1) // 5 % 10 + 1
        assert arrays["labels"][i].tolist() == datasets.LABELS[(i + 1) % 5]
        np.testing.assert_array_equal(arrays["samples"][i], beat(i + 1))
    assert (arrays["gain"][6].tolist(), arrays["baseline"][6].tolist()) == ([gain] * 12, baseline)
    millivolts = wfdb.rdrecord(str(copy / "records100" / "00000" / "00007_lr")).p_signal
    np.testing.assert_allclose(arrays["sums"][6], [millivolts.sum(), (millivolts**2).sum()], rtol=1e-12)
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
    return lambda record: record.with_suffix(kind).write_bytes(change(record.with_suffix(kind).read_bytes()))


def gain(text: str):
    return header("1000.0(0)/mV", f"{text}/mV")


FAULTS = {
    "truncated": (content(lambda c: c[:-2]), "23998 bytes"), "longer": (content(lambda c: c + b"12"), "24002 bytes"),
    "no .dat": (lambda r: r.with_suffix(".dat").unlink(), "00007_lr.dat is missing"),
    "no .hea": (lambda r: r.with_suffix(".hea").unlink(), "00007_lr.hea is missing"),
    "NaN": (signals(lambda s: np.where(s == s[500, 3], -(2**15), s)), "NaN in lead"),
    "rate": (header(" 12 100 1000", " 12 500 1000"), "samples a second: 500"),
    "length": (header(" 12 100 1000", " 12 100 999"), "samples: 999"),
    "order": (signals(lambda s: s, (*ptbxl.LEADS[1::-1], *ptbxl.LEADS[2:])), "leads: ['II', 'I',"),
    "eleven leads": (signals(lambda s: s[:, :11], ptbxl.LEADS[:11]), "leads: ['I', 'II',"),
    "unit": (header("/mV", "/uV"), "units"), "another file": (header("00007_lr.dat", "00008_lr.dat"), "signal files"),
    "empty header": (content(lambda c: b"", ".hea"), "no header of WFDB"),
    "text": (content(lambda c: b"what is this\n" * 3, ".hea"), "00007_lr.hea"), "gain": (gain("-5.0(0)"), "gain"),
    "gain of 0": (gain("0(0)"), "gain"), "gain of 0.0": (gain("0.0(0)"), "gain"), "small": (gain("1e-30(0)"), "gain"),
    "baseline": (gain(f"1000.0({10**20})"), "baseline"), "other samples": (content(lambda c: bytes(24000)), "checksums"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_record_is_named_and_left_out_or_stops(source, tmp_path, script, refused, fault):
    copy, (spoil, says) = Path(shutil.copytree(source, tmp_path / "copy")), FAULTS[fault]
    pandas.read_csv(copy / "ptbxl_database.csv")[:8].to_csv(copy / "ptbxl_database.csv", index=False)
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


def edit_table(copy, column, value, row=3, file="ptbxl_database.csv"):
    table = pandas.read_csv(copy / file, dtype=str, keep_default_na=False)
    table.loc[row, column] = value
    table.to_csv(copy / file, index=False)
    write_sums(copy)


@pytest.mark.parametrize(
    ("column", "value"),
    [*itertools.product(["strat_fold"], ["abc", "inf", "2.7", "99"]),
     *itertools.product(["patient_id"], ["x", "", "1e300"]), *itertools.product(["ecg_id"], ["", "x3", "3.5", "1"]),
     *itertools.product(["filename_lr"], ["records100/00000/00001_lr", "../00001_lr", "/etc/passwd", "",
                                          "records100/../../x_lr", "records500/00000/00001_hr"])],
)  # fmt: skip
def test_an_odd_table_is_refused_and_what_was_prepared_stays(copy, tmp_path, refused, column, value):
    prepare(tmp_path / "ecg" / "prepared", [1], ptbxl.FORMAT)
    edit_table(copy, column, value)
    assert "ptbxl_database.csv" in refused(ptbxl, "--from", copy, "--data", tmp_path)
    assert load(tmp_path / "ecg" / "prepared")["a"].tolist() == [1]


def test_unreadable_codes_are_named(copy, tmp_path, script):
    for row, codes in enumerate(bad := ["{'NORM'", "[1, 2]", "", "print('x')", "{" * 500, "['NORM']"]):
        edit_table(copy, "scp_codes", codes, row)
    assert f"{20 - len(bad)} records in" in script(ptbxl, "--from", copy, "--data", tmp_path)[1]
    left = json.loads((tmp_path / "ecg" / "prepared" / "about.json").read_text())["left_out"]
    assert all(f"ecg_id {i + 1}: SCP codes" in problem for i, problem in enumerate(left))
    assert len(left) == len(bad)


def test_what_all_records_need_must_be_there_and_verify(copy, tmp_path, script, refused):
    given, sums, statements = (
        (ptbxl, "--from", copy, "--data", tmp_path),
        copy / "SHA256SUMS.txt",
        copy / "scp_statements.csv",
    )
    content(lambda c: b"xx" + c[2:])(copy / "records100" / "00000" / "00003_lr")
    assert "00003_lr.dat: its SHA-256" in script(*given)[1]
    content(lambda c: c + b"\n", ".csv")(copy / "ptbxl_database")
    for spoil, says in (
        (lambda: None, "ptbxl_database.csv: its SHA-256"),
        (lambda: edit_table(copy, "diagnostic", "", slice(None), statements.name), "no diagnostic code of CD, HYP"),
        (lambda: (statements.write_text("a,b\n1,2\n"), write_sums(copy)), "scp_statements.csv is not PTB-XL's"),
        (statements.unlink, "scp_statements.csv is missing"),
        (lambda: sums.write_text("nothing\n"), "is not a list of SHA-256 sums"),
        (sums.unlink, "SHA256SUMS.txt is missing"),
        (sums.mkdir, "SHA256SUMS.txt"),
    ):
        spoil()
        assert says in refused(*given)


def serve(folder: Path) -> None:
    Server.content = {f"/{p.relative_to(folder)}": p.read_bytes() for p in folder.rglob("*") if p.is_file()}


RECORD = "/records100/00000/00009_lr.dat"


def test_download_over_a_bad_line(server, source, tmp_path, script, refused, monkeypatch):
    serve(source)
    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=200_000))
        assert "are free" in refused(ptbxl, "--url", server, "--data", tmp_path, status=1)
    assert not any("records100" in path for path, _ in Server.asked)
    Server.faults = {"/SHA256SUMS.txt": [503], "/ptbxl_database.csv": ["cut", 503], RECORD: [503, "cut", "cut"]}
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


@pytest.mark.parametrize("spoil", [
    lambda text: "<html>sign in first</html>\n", lambda text: "", lambda text: text[: len(text) // 2],
    lambda text: "?" + text[1:], lambda text: "\n".join(line for line in text.splitlines() if "00009_lr" not in line),
])  # fmt: skip
def test_a_list_of_sums_that_came_wrong_is_asked_for_again(server, source, tmp_path, script, refused, spoil):
    serve(source)
    given, good = (ptbxl, "--url", server, "--data", tmp_path), Server.content["/SHA256SUMS.txt"].decode()
    Server.content["/SHA256SUMS.txt"] = spoil(good).encode()
    assert "SHA256SUMS.txt" in refused(*given)
    Server.content["/SHA256SUMS.txt"] = ("\n" + good.replace("  ", "  ./") + "\n").encode()
    assert script(*given)[0] == 0
    Server.faults = {"/SHA256SUMS.txt": [503] * 9}  # what is there goes on serving
    assert script(*given)[0] == 0
    assert "SHA256SUMS.txt" in names(tmp_path / "ecg" / "files")
    assert not [name for name in names(tmp_path / "ecg" / "files") if name.startswith(".")]


@pytest.mark.parametrize("fault", ["wrong byte", "short", 403, 404])
def test_a_file_that_cannot_be_had_is_named_and_the_others_are_kept(server, source, tmp_path, script, refused, fault):
    serve(source)
    Server.faults = {RECORD: [fault] * {403: 1, 404: 2}.get(fault, 5)}
    err = refused(ptbxl, "--url", server, "--data", tmp_path, *(["--strict"] if fault == 404 else []))
    assert "1 of 40 files" in err
    assert "00009_lr.dat" in err
    assert len(list((tmp_path / "ecg" / "files").rglob("*_lr.*"))) == 39  # and nothing wrong under that name
    assert names(tmp_path / "ecg") == ["files"]
    out = script(ptbxl, "--url", server, "--data", tmp_path)[1]
    assert f"{19 if fault == 404 else 20} records" in out  # a record that the server does not have is left out
    assert ("00009_lr.dat is missing" in out) == (fault == 404)


@pytest.mark.skipif(not (REAL / "ptbxl-mini").is_dir(), reason="needs ../shared/data/ptbxl-mini")
def test_the_real_records_have_the_stated_classes_by_fold(tmp_path, script):
    assert "500 records in" in script(ptbxl, "--from", REAL / "ptbxl-mini", "--data", tmp_path)[1]
    arrays = load(tmp_path / "ecg" / "prepared")
    labels, fold = arrays["labels"], arrays["fold"]
    assert labels.sum(0).tolist() == [297, 73, 96, 78, 40]
    assert labels[fold == 9].sum(0).tolist() == [36, 16, 21, 10, 8]
    assert [(fold == f).sum() for f in (1, 9, 10)] == [58, 81, 66]
    assert (labels.sum(1) == 0).sum() == 12
    physical = wfdb.rdrecord(str(REAL / "ptbxl-mini" / "records100" / "00000" / "00042_lr")).p_signal
    np.testing.assert_allclose((arrays["samples"][41] - arrays["baseline"][41]) / arrays["gain"][41], physical)


# Graphs.


def test_the_layout_is_the_source_summed_up_by_loops(tmp_path):
    raw = write_graphs(tmp_path / "g", 40)
    arrays, about = load(tmp_path / "g"), json.loads((tmp_path / "g" / "about.json").read_text())
    assert [(name, a.dtype) for name, a in arrays.items()] == [*graphs.ARRAYS.items()]
    assert about["format"] == "metapt graphs 2"
    counts = {"graphs": 300, "nodes": raw.sizes.sum(), "edges": 5788, "tasks": 60, "finetune_terms": 40}
    assert {name: about[name] for name in counts} == counts
    labels = np.unpackbits(arrays["labels"], axis=1, bitorder="little")[:, :60]
    np.testing.assert_array_equal(labels, raw.labels)
    node = edge = before = 0
    for graph, (size, degree) in enumerate(zip(raw.sizes, raw.degrees, strict=True)):
        edges, features = raw.edges[:, before : before + degree], raw.features[before : before + degree]
        assert (arrays["sizes"][graph], arrays["degrees"][graph]) == (size, degree)
        assert (arrays["centre"][graph], arrays["species"][graph]) == (raw.centre[graph], raw.species[graph])
        for number in range(size):
            into = edges[1] == number
            found = arrays["source"][edge : edge + into.sum()]
            assert found.tolist() == sorted(edges[0, into])
            np.testing.assert_array_equal(arrays["sums"][node, :9], features[into].sum(0) + np.eye(9)[7])
            assert arrays["sums"][node, 9] == into.sum() + 1
            node, edge = node + 1, edge + into.sum()
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
)  # fmt: skip
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
    archive(folder / "bio_dataset.zip", {f"x/un{hu_graphs.FILE}": b"0" * 999, f"x/{hu_graphs.FILE}": member})
    return folder / "bio_dataset.zip"


@pytest.mark.parametrize("new", [False, True])
def test_the_published_file_is_read_in_both_containers(tmp_path, script, monkeypatch, new):
    (tmp_path / "supervised" / "processed").mkdir(parents=True)
    write_published(tmp_path / hu_graphs.FILE, generated(species=(9606, 4932)), new)
    assert zipfile.is_zipfile(tmp_path / hu_graphs.FILE) == new
    monkeypatch.setattr(hu_graphs, "AT_ONCE", 100)  # in three pieces
    with torch.serialization.safe_globals(
        [(datasets.FakeData, "torch_geometric.data.data.Data")]
    ):  # as an imported PyG does
        allowed = set(torch.serialization.get_safe_globals())
        assert "300 graphs" in script(hu_graphs, "--from", tmp_path, "--data", tmp_path)[1]
        assert set(torch.serialization.get_safe_globals()) == allowed
    write_graphs(tmp_path / "direct", 40, species=(9606, 4932))
    for name in graphs.ARRAYS:
        there = tmp_path / "ppi" / "published" / f"{name}.npy"
        assert there.read_bytes() == (tmp_path / "direct" / f"{name}.npy").read_bytes()
    about = json.loads((tmp_path / "ppi" / "published" / "about.json").read_text())
    assert (about["tasks"], about["finetune_terms"], about["terms"][20]) == (60, 40, "FT task 0")


class Hostile:
    def __reduce__(self):
        return os.system, ("echo harm",)


@pytest.mark.parametrize("new", [False, True])
def test_a_pickle_that_asks_for_anything_else_is_refused_by_name(tmp_path, new):
    for extra, asked in ((Hostile(), r"(posix|os|nt)\.system"), (eval, "eval$"), (getattr, "getattr$"),
                         (Path("x"), r"pathlib\S*Path")):  # fmt: skip
        write_published(tmp_path / "file.pt", generated(graphs=9), new, extra=extra)
        with pytest.raises(BadInput, match=rf"file.pt .*it asks for {asked}"):
            hu_graphs.read_pyg(tmp_path / "file.pt")


def test_other_files_are_refused(tmp_path, refused):
    path = tmp_path / "file.pt"
    torch.save([1, 2], path)
    pair = path.read_bytes()
    write_published(path, generated(), True)
    contents = {b"": "torn", b"no pickle": "file.pt", pickle.dumps([1]): "file.pt", pair: "no pair",
                path.read_bytes()[:99_999]: "torn"}  # fmt: skip
    for content, says in contents.items():
        path.write_bytes(content)
        assert says in refused(hu_graphs, "--from", path, "--data", tmp_path)
    assert "is missing" in refused(hu_graphs, "--from", tmp_path / "none", "--data", tmp_path)
    assert "holds neither" in refused(hu_graphs, "--from", tmp_path / "ppi", "--data", tmp_path)
    assert not names(tmp_path / "ppi")


@pytest.mark.parametrize(
    ("more", "slices"),
    [
        *(({name: value}, {}) for name, value in [
            ("edge_attr", torch.zeros(3, 9)), ("edge_attr", torch.zeros(5788)), ("edge_index", torch.zeros(2, 5788)),
            ("edge_index", torch.zeros(3, 5788, dtype=torch.long)), ("center_node_idx", torch.full((300,), 0.5)),
            ("species_id", torch.full((300,), 2**40)), ("species_id", torch.full((300,), torch.nan)),
            ("edge_attr", torch.full((5788, 9), torch.nan))]),
        *(({}, {name: value}) for name, value in [
            ("x", torch.arange(10)), ("x", torch.arange(301).float()), ("x", torch.zeros(301, 2, dtype=torch.long)),
            ("edge_index", torch.arange(300)), ("edge_index", torch.arange(301).flip(0)), ("species_id", None)]),
        ({}, {name: torch.zeros(1, dtype=torch.long) for name in ("x", *hu_graphs.PARTS)}),
    ],
)  # fmt: skip
def test_a_published_file_of_wrong_shapes_is_refused_and_the_good_one_stays(tmp_path, refused, more, slices):
    good = write_graphs(tmp_path / "ppi" / "published")
    write_published(tmp_path / "file.pt", good, True, slices=slices, **more)
    refused(hu_graphs, "--from", tmp_path / "file.pt", "--data", tmp_path)
    assert load(tmp_path / "ppi" / "published")["sizes"].tolist() == good.sizes.tolist()
    assert names(tmp_path / "ppi") == ["published"]


def test_bad_archives_are_refused(benchmark_zip, tmp_path, monkeypatch, refused, script):
    path, content = tmp_path / "bio_dataset.zip", benchmark_zip.read_bytes()
    given = (hu_graphs, "--from", path, "--data", tmp_path)
    flipped, locked = bytearray(content), bytearray(content)
    flipped[len(content) // 2] ^= 1
    for header, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # the flags of each member: encrypted
        for at in re.finditer(re.escape(header), content):
            locked[at.start() + place] |= 1
    for bad, says in ((bytes(flipped), "not a whole zip"), (content[:-30], "not a whole zip"), (b"", "not a whole zip"),
                      (bytes(locked), "encrypted")):  # fmt: skip
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


# STRING and GO.


@pytest.fixture
def string_files(tmp_path):
    return datasets.write_string(tmp_path / "string")


def test_ego_networks_by_hand(string_files, tmp_path, script):
    assert script(string_graphs, "--from", string_files, "--data", tmp_path, "--cap", 3, "--species", 1)[0] == 0
    arrays = load(tmp_path / "ppi" / "string-yeast")
    assert json.loads((tmp_path / "ppi" / "string-yeast" / "about.json").read_text())["terms"] == ["GO:1", "GO:2"]
    assert arrays["sizes"].tolist() == [3, 3, 3, 2]  # the first has 3 neighbours, of which the weakest gives way
    assert arrays["degrees"].tolist() == [6, 6, 6, 2]
    assert arrays["labels"].tolist() == [[1], [2], [3], [0]]
    assert (arrays["species"].tolist(), arrays["centre"].tolist()) == ([1] * 4, [0] * 4)
    coexpression, database, self_loop, number = 3, 5, 7, 9
    sums = arrays["sums"][:3, [coexpression, database, self_loop, number]]
    assert sums.T.tolist() == [[2, 1, 1], [1, 0, 1], [1, 1, 1], [3, 3, 3]]
    assert arrays["sums"][:3].sum() == sums.sum()


@pytest.mark.parametrize(
    ("name", "content"),
    [*itertools.product(["Org1_database_x.txt"], ["1 9 0.5\n9 1 0.5\n", "1 2 nan\n2 1 nan\n", "", "1 1.5 1\n", "1 2\n2 1\n",
                                                  "1 1e300 1\n", "1 1 1\n"]),
     *itertools.product(["B_node_dict.txt"], ["{'p0': ", "[1, 2]", "{'p0': 0, 'p1': 0}", "{'p0': 10**12}", "{'p0': 0.5}",
                                              "{'p0': 10000000000000}", "{}", "{'p0': 1e300}", "{'p0': None}"]),
     *itertools.product(["org_1_BP.txt"], ["#id\tGO:1\np0\tmany\n", "#id\tGO:1\np0\t256\n", "", "#id\tGO:1\n", "#id\np0\n",
                                           "#id\tGO:1\np0\t-1\n"]),
     ("org_1_MF.txt.gz", gzip.compress(b"#id\tGO:1\n" * 99)[:-20] + b"torn" * 9)],
)  # fmt: skip
def test_bad_string_files_are_named(string_files, tmp_path, refused, name, content):
    (string_files / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert name in refused(string_graphs, "--from", string_files, "--data", tmp_path)
    assert not names(tmp_path / "ppi")


@pytest.mark.parametrize(
    ("given", "says"),
    [(["--cap", 1], "--cap"), (["--species", 2**40], "species"), (["--from", "."], "holds no"),
     *((["--name", name], "--name") for name in ("..", "", "a/b", ".hidden"))],
)  # fmt: skip
def test_string_options(string_files, tmp_path, refused, given, says):
    assert says in refused(string_graphs, "--from", string_files, "--data", tmp_path, *given)


@pytest.fixture(scope="session")
def yeast(tmp_path_factory):
    """The real yeast networks, in the size that the script gives them."""
    with files.locked(tmp_path_factory.mktemp("ppi") / "yeast", graphs.FORMAT) as folder:
        scores, terms, labels = string_graphs.read_string(REAL / "ppi" / "string-yeast")
        raw = string_graphs.ego_networks(scores, labels, 64, 4932)
        graphs.prepare_graphs(folder, [raw], terms, 0, source="", licence="")
    return folder


@pytest.mark.skipif(not (REAL / "ppi" / "string-yeast").is_dir(), reason="needs ../shared/data/ppi/string-yeast")
def test_yeast_is_what_its_readme_says(yeast):
    arrays, about = load(yeast), json.loads((yeast / "about.json").read_text())
    assert [about[name] for name in ("graphs", "nodes", "edges", "tasks")] == [4900, 96_057, 2_515_916, 980]
    original = np.load(REAL / "ppi" / "string-yeast" / "yeast_string_go.npz", allow_pickle=False)
    inside, (u, v) = original["in_network"], original["edge_index"]
    labels = {t: c for n in original.files if n.startswith("go_") and not n.endswith("terms")
              for t, c in zip(original[f"{n}_terms"], original[n][inside].T, strict=True)}  # fmt: skip
    ours = np.unpackbits(arrays["labels"], axis=1, bitorder="little")
    for i, term in enumerate(about["terms"]):
        assert (ours[:, i] == labels[term]).all()
    degrees = [np.bincount(np.concatenate([u[linked], v[linked]]), minlength=len(inside))[inside]
               for linked in (np.ones(len(u), bool), *(original["edge_score"].T > 0))]  # fmt: skip
    assert degrees[0].sum() == 2 * 63_309
    np.testing.assert_array_equal(arrays["sizes"], np.minimum(degrees[0] + 1, 64))
    centre, whole = arrays["sums"][arrays["sizes"].cumsum() - arrays["sizes"] + arrays["centre"]], degrees[0] < 64
    np.testing.assert_array_equal(centre[whole, :6], np.stack(degrees[1:], 1)[whole])
