"""The ECG domain: PTB-XL's files and their download, the warp, ResNet and SimCLR's loss beside slow ones, the commands."""

import hashlib
import http.server
import json
import math
import shutil
import threading
from copy import deepcopy
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
import torch.nn.functional as F
import wfdb
from test_metapt import main_in, options, refused, summary_of

import metapt
from bench import counting
from metapt import LEADS, SUPERCLASSES, BadInput

ROOT = Path(metapt.__file__).resolve().parent
MINI = ROOT.parent / "shared" / "data" / "ptbxl-mini"
BATCHES = ("batch_size", "meta_batch_size", "finetune_batch_size", "validation_batch_size")
TINY = {"width": 1, "steps": 12, "warmup": 4, "meta_every": 4, "batch_size": 16, "meta_batch_size": 16, "compare": 1,
        "finetune_steps": 10, "checkpoint_every": 1}  # fmt: skip
CODES = ("{'NORM': 100.0, 'SR': 0.0}", "{'IMI': 80.0, 'NDT': 0.0}", "{'LVH': 50.0}", "{'IRBBB': 100.0}", "{'SR': 0.0}")
LABELS = ([1, 0, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 0, 1], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0])


def write_record(folder: Path, name: str, samples: np.ndarray, leads=LEADS, fs=100, gain=1000.0, **options) -> None:
    n = samples.shape[1]
    wfdb.wrsamp(name, fs=fs, units=["mV"] * n, sig_name=list(leads), d_signal=samples, fmt=["16"] * n,
                adc_gain=[gain] * n, baseline=options.pop("baseline", [0] * n), write_dir=str(folder), **options)  # fmt: skip


def write_sums(folder: Path) -> None:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "SHA256SUMS.txt")
    lines = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.relative_to(folder).as_posix()}" for p in files]
    (folder / "SHA256SUMS.txt").write_text("\n".join(lines) + "\n")


def signal(ecg_id: int) -> np.ndarray:
    """Not real: a beat whose rate tells of the label, on all leads; [1000, 12]."""
    random, t = np.random.default_rng(ecg_id), np.arange(1000)[:, None] / 100
    beat = np.cos(math.pi * t * (1 + 0.3 * (ecg_id % 5)) + random.uniform(0, 6)) ** 40
    return (1000 * beat * random.uniform(0.2, 1, 12) + random.normal(0, 30, (1000, 12))).astype(np.int64)


def write_ptbxl(folder: Path, records: int = 60) -> Path:
    """Files in PTB-XL's layout, ten folds, the codes of `CODES` in turn."""
    (folder / "records100" / "00000").mkdir(parents=True)
    rows = []
    for ecg_id in range(1, records + 1):
        write_record(folder / "records100" / "00000", f"{ecg_id:05d}_lr", signal(ecg_id))
        rows.append({"ecg_id": ecg_id, "patient_id": 1000.0 + ecg_id, "scp_codes": CODES[ecg_id % 5],
                     "strat_fold": ecg_id // 5 % 10 + 1, "filename_lr": f"records100/00000/{ecg_id:05d}_lr"})  # fmt: skip
    pandas.DataFrame(rows).to_csv(folder / "ptbxl_database.csv", index=False)
    statements = [("NORM", 1, "NORM"), ("IMI", 1, "MI"), ("NDT", 1, "STTC"), ("IRBBB", 1, "CD"), ("LVH", 1, "HYP"),
                  ("SR", "", "")]  # fmt: skip
    table = pandas.DataFrame(statements, columns=["", "diagnostic", "diagnostic_class"])
    table.to_csv(folder / "scp_statements.csv", index=False)
    (folder / "LICENSE.txt").write_text("none")
    write_sums(folder)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_ptbxl(tmp_path_factory.mktemp("source"))


@pytest.fixture
def copy(source, tmp_path):
    """A copy of the files, to be spoilt."""
    return Path(shutil.copytree(source, tmp_path / "copy"))


@pytest.fixture(scope="module")
def home(source, tmp_path_factory):
    """A folder in which `ecg` can run."""
    folder = tmp_path_factory.mktemp("home")
    metapt.prepare_ecg(source, folder / "data" / "ecg" / "prepared")
    return folder


def refused_later(folder: Path, *arguments) -> str:
    """Like `refused`, where a progress bar was on show before."""
    code, _, err = main_in(folder, *arguments)
    assert code == 2, err
    assert len(err.strip().splitlines()) == 1, err
    return err


def make(home: Path, **given) -> metapt.ECG:
    settings = metapt.settings_of("ecg", {**TINY, **given})
    return metapt.make_domain("ecg", settings, torch.device("cpu"), home / "data")


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [250, 9])  # in this process; in several
def test_records_come_out_as_they_went_in(source, tmp_path, at_once):
    about = metapt.prepare_ecg(source, tmp_path / "prepared", at_once=at_once)
    assert about == {"format": metapt.ECG_FORMAT, "records": 60, "left_out": []}
    records = metapt.Records(tmp_path / "prepared", torch.device("cpu"))
    assert records.ecg_id.tolist() == list(range(1, 61))
    assert records.patient.tolist() == [1000 + i for i in range(1, 61)]
    assert records.fold.tolist() == [i // 5 % 10 + 1 for i in range(1, 61)]
    assert records.labels.tolist() == [LABELS[i % 5] for i in range(1, 61)]
    index = torch.tensor([3, 59, 0])
    expected = np.stack([signal(i) / 1000 for i in (4, 60, 1)]).transpose(0, 2, 1)
    torch.testing.assert_close(records.millivolts(index).double(), torch.from_numpy(expected), rtol=0, atol=1e-6)
    mean, deviation = records.moments(index)
    assert mean == pytest.approx(expected.mean(), abs=1e-9)
    assert deviation == pytest.approx(expected.std(), rel=1e-9)
    assert [p.name for p in tmp_path.iterdir()] == ["prepared"]


def test_gain_and_baseline_are_the_headers(tmp_path):
    samples = signal(1)
    gain, baseline = [100.0 + i for i in range(12)], list(range(12))
    wfdb.wrsamp("00001_lr", fs=100, units=["mV"] * 12, sig_name=list(LEADS), d_signal=samples, fmt=["16"] * 12,
                adc_gain=gain, baseline=baseline, write_dir=str(tmp_path))  # fmt: skip
    found = metapt.read_record(tmp_path / "00001_lr")
    assert (found[0] == samples).all()
    assert found[1].tolist() == gain
    assert found[2].tolist() == baseline


def test_millivolts_are_those_of_wfdb_whatever_the_gain(copy, tmp_path):
    write_record(copy / "records100" / "00000", "00007_lr", signal(7), gain=250.0, baseline=list(range(0, 120, 10)))
    write_sums(copy)
    metapt.prepare_ecg(copy, tmp_path / "prepared")
    found = metapt.Records(tmp_path / "prepared", torch.device("cpu")).millivolts(torch.tensor([6]))[0]
    physical = wfdb.rdrecord(str(copy / "records100" / "00000" / "00007_lr")).p_signal.T
    torch.testing.assert_close(found.double(), torch.from_numpy(physical), rtol=0, atol=1e-5)


def spoil_header(record: Path, old: str, new: str) -> None:
    path = record.with_suffix(".hea")
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def with_nan(record: Path) -> None:
    samples = signal(7)
    samples[500, 3] = -(2**15)
    write_record(record.parent, record.name, samples)


FAULTS = {
    "truncated": (lambda r: r.with_suffix(".dat").write_bytes(r.with_suffix(".dat").read_bytes()[:-2]), "23998 bytes"),
    "longer": (lambda r: r.with_suffix(".dat").write_bytes(r.with_suffix(".dat").read_bytes() + b"12"), "24002 bytes"),
    "no .dat": (lambda r: r.with_suffix(".dat").unlink(), "00007_lr.dat is missing"),
    "no .hea": (lambda r: r.with_suffix(".hea").unlink(), "00007_lr.hea is missing"),
    "NaN": (with_nan, "NaN in lead AVR"),
    "rate": (lambda r: spoil_header(r, " 12 100 1000", " 12 500 1000"), "samples a second: 500"),
    "length": (lambda r: spoil_header(r, " 12 100 1000", " 12 100 999"), "samples: 999"),
    "order": (lambda r: write_record(r.parent, r.name, signal(7), (*LEADS[1::-1], *LEADS[2:])), "leads: ['II', 'I',"),
    "eleven leads": (lambda r: write_record(r.parent, r.name, signal(7)[:, :11], LEADS[:11]), "leads: ['I', 'II',"),
    "unit": (lambda r: spoil_header(r, "/mV", "/uV"), "units"),
    "another file": (lambda r: spoil_header(r, "00007_lr.dat", "00008_lr.dat"), "signal files"),
    "empty header": (lambda r: r.with_suffix(".hea").write_text(""), "no header of WFDB"),
    "text": (lambda r: r.with_suffix(".hea").write_text("what is this\n" * 3), "00007_lr.hea"),
    "gain": (lambda r: spoil_header(r, "1000.0(0)/mV", "-5.0(0)/mV"), "gain"),
    "gain of 0": (lambda r: spoil_header(r, "1000.0(0)/mV", "0(0)/mV"), "gain"),
    "gain of 0.0": (lambda r: spoil_header(r, "1000.0(0)/mV", "0.0(0)/mV"), "gain"),
    "other samples": (lambda r: r.with_suffix(".dat").write_bytes(bytes(24000)), "checksums"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_record_is_named_and_left_out_or_stops(copy, tmp_path, fault):
    spoil, message = FAULTS[fault]
    spoil(copy / "records100" / "00000" / "00007_lr")
    write_sums(copy)  # wrong as published, not on the way here
    about = metapt.prepare_ecg(copy, tmp_path / "prepared")
    assert about["records"] == 59
    (problem,) = about["left_out"]
    assert message in problem
    assert "00007_lr" in problem
    assert 7 not in metapt.Records(tmp_path / "prepared", torch.device("cpu")).ecg_id
    before = (tmp_path / "prepared" / "index.npz").read_bytes()
    err = refused_later(tmp_path, "download", "ecg", "--strict", "--from", copy, "--data", tmp_path)
    assert message in err
    with pytest.raises(BadInput, match="00007_lr"):
        metapt.prepare_ecg(copy, tmp_path / "prepared", strict=True)
    assert (tmp_path / "prepared" / "index.npz").read_bytes() == before  # nothing lost


def edit_table(copy: Path, column: str, ecg_id: int, value) -> None:
    table = pandas.read_csv(copy / "ptbxl_database.csv", index_col=0).astype({column: object})
    table.loc[ecg_id, column] = value
    table.to_csv(copy / "ptbxl_database.csv")
    write_sums(copy)


@pytest.mark.parametrize("codes", ["{'NORM'", "[1, 2]", "", "print('x')", "{" * 500])
def test_unreadable_codes_are_named(copy, tmp_path, codes):
    edit_table(copy, "scp_codes", 8, codes)
    about = metapt.prepare_ecg(copy, tmp_path / "prepared")
    assert about["records"] == 59
    assert "ecg_id 8: SCP codes" in about["left_out"][0]


@pytest.mark.parametrize("name", ["/etc/passwd", "records100/../../x_lr", "records500/00000/00001_hr", None])
def test_a_row_that_points_elsewhere_is_refused(copy, tmp_path, name):
    edit_table(copy, "filename_lr", 8, name)
    with pytest.raises(BadInput, match="as a record"):
        metapt.prepare_ecg(copy, tmp_path / "prepared")


def test_what_all_records_need_must_be_there_and_verify(copy, tmp_path):
    def wrong(message):
        err = refused_later(tmp_path, "download", "ecg", "--from", copy, "--data", tmp_path / "data")
        assert message in err
        assert not (tmp_path / "data" / "ecg" / "prepared").exists()

    with (copy / "records100" / "00000" / "00003_lr.dat").open("r+b") as file:
        file.write(b"xx")
    about = metapt.prepare_ecg(copy, tmp_path / "other")
    assert about["records"] == 59
    assert "SHA-256" in about["left_out"][0]
    with (copy / "ptbxl_database.csv").open("a") as file:
        file.write("\n")
    wrong("ptbxl_database.csv: its SHA-256")
    (copy / "scp_statements.csv").write_text("a,b\n1,2\n")
    write_sums(copy)
    wrong("scp_statements.csv is not PTB-XL's")
    (copy / "scp_statements.csv").unlink()
    wrong("scp_statements.csv is missing")
    (copy / "SHA256SUMS.txt").write_text("nothing\n")
    wrong("is not a list of SHA-256 sums")
    (copy / "SHA256SUMS.txt").unlink()
    wrong("SHA256SUMS.txt is missing")


def spoil_index(folder, name, change):
    with np.load(folder / "index.npz") as file:
        index = dict(file)
    np.savez(folder / "index.npz", **{**index, name: change(index[name])})


def test_torn_prepared_files_are_refused(home, tmp_path):
    for spoil in (
        lambda f: (f / "samples.bin").write_bytes((f / "samples.bin").read_bytes()[:-24000]),
        lambda f: (f / "samples.bin").write_bytes((f / "samples.bin").read_bytes()[:-1]),
        lambda f: (f / "index.npz").write_bytes(b"PK"),
        lambda f: (f / "index.npz").unlink(),
        lambda f: (f / "about.json").write_text("{}"),
        *(
            lambda f, name=name, change=change: spoil_index(f, name, change)
            for name, change in (
                ("labels", lambda v: v[:, :4]),
                ("gain", lambda v: v[:, 0]),
                ("gain", lambda v: 0 * v),
                ("sums", lambda v: v * np.nan),
                ("fold", lambda v: v[:, None]),
            )
        ),
        lambda f: (f / "about.json").unlink(),
    ):
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        shutil.copytree(home / "data", tmp_path / "data")
        spoil(tmp_path / "data" / "ecg" / "prepared")
        assert "prepare" in refused(tmp_path, "pretrain", "ecg", *options(TINY))


@pytest.mark.skipif(not MINI.exists(), reason="the real records are not here")
def test_the_real_records_have_the_stated_classes_by_fold(tmp_path):
    about = metapt.prepare_ecg(MINI, tmp_path)
    assert (about["records"], about["left_out"]) == (500, [])
    records = metapt.Records(tmp_path, torch.device("cpu"))
    assert records.labels.sum(0).tolist() == [297, 73, 96, 78, 40]
    assert records.labels[records.fold == 9].sum(0).tolist() == [36, 16, 21, 10, 8]
    assert [(records.fold == f).sum().item() for f in (1, 9, 10)] == [58, 81, 66]
    assert int((records.labels.sum(1) == 0).sum()) == 12
    physical = wfdb.rdrecord(str(MINI / "records100" / "00000" / "00042_lr")).p_signal.T
    torch.testing.assert_close(records.millivolts(torch.tensor([41]))[0].double(), torch.from_numpy(physical))


class FileServer(http.server.SimpleHTTPRequestHandler):
    """Serves `folder`; `faults`: path → what goes wrong in turn."""

    protocol_version = "HTTP/1.1"
    folder: Path
    faults: dict[str, list] = {}  # noqa: RUF012
    asked: list[str] = []  # noqa: RUF012
    connections: set = set()  # noqa: RUF012

    def do_GET(self):
        path = self.path.lstrip("/")
        self.asked.append(path)
        self.connections.add(self.client_address)
        fault = self.faults[path].pop(0) if self.faults.get(path) else None
        if isinstance(fault, int) or not (self.folder / path).is_file():
            return self.send_error(fault or 404)
        content = (self.folder / path).read_bytes()
        if fault == "wrong byte":
            content = b"?" + content[1:]
        elif fault == "short":
            content = content[:-10]
        begin = int(self.headers.get("Range", "bytes=0-")[6:-1])
        self.send_response(206 if begin else 200)
        self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - begin))
        self.end_headers()
        self.wfile.write(content[begin : begin + 100] if fault == "cut" else content[begin:])
        self.close_connection = fault == "cut"

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch, source):
    monkeypatch.setattr(metapt.time, "sleep", lambda seconds: None)
    FileServer.folder, FileServer.faults, FileServer.asked, FileServer.connections = source, {}, [], set()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), FileServer) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_download_over_a_bad_line(server, tmp_path):
    record = "records100/00000/00009_lr"
    FileServer.faults = {
        "SHA256SUMS.txt": [503],
        "ptbxl_database.csv": ["cut", 503],
        f"{record}.dat": [503, "cut", "cut"],
    }
    code, out, err = main_in(tmp_path, "download", "ecg", "--url", server)
    assert code == 0, err
    assert "60 records" in out
    files = tmp_path / "data" / "ecg" / "files"
    assert (files / f"{record}.dat").read_bytes() == (FileServer.folder / f"{record}.dat").read_bytes()
    assert not list(files.rglob("*.part"))
    assert len(FileServer.connections) < len(FileServer.asked) / 2  # connections are used again

    FileServer.asked.clear()
    (files / f"{record}.dat").unlink()
    (files / "records100" / "00000" / "00010_lr.dat").write_bytes(b"something else")
    assert main_in(tmp_path, "download", "ecg", "--url", server)[0] == 0
    wanted = ["SHA256SUMS.txt", f"{record}.dat", "records100/00000/00010_lr.dat"]
    assert sorted(FileServer.asked) == wanted  # what verifies is skipped


@pytest.mark.parametrize("spoil", [
    lambda text: "<html>sign in first</html>\n", lambda text: "", lambda text: text[: len(text) // 2],
    lambda text: "?" + text[1:], lambda text: "\n".join(line for line in text.splitlines() if "00009_lr" not in line),
])  # fmt: skip
def test_a_list_of_sums_that_came_wrong_is_asked_for_again(server, copy, tmp_path, spoil):
    good = (copy / "SHA256SUMS.txt").read_text()
    (copy / "SHA256SUMS.txt").write_text(spoil(good))
    FileServer.folder = copy
    assert "SHA256SUMS.txt" in refused_later(tmp_path, "download", "ecg", "--url", server)
    (copy / "SHA256SUMS.txt").write_text("\n" + good.replace("  ", "  ./") + "\n")
    assert main_in(tmp_path, "download", "ecg", "--url", server)[0] == 0
    FileServer.faults = {"SHA256SUMS.txt": [503] * 9}  # what is there goes on serving
    assert main_in(tmp_path, "download", "ecg", "--url", server)[0] == 0
    assert (tmp_path / "data" / "ecg" / "files" / "SHA256SUMS.txt").exists()


def table_with(copy, file, change):
    table = pandas.read_csv(copy / file, dtype=str, keep_default_na=False)
    change(table).to_csv(copy / file, index=False)
    write_sums(copy)


def cell(column, value):
    def change(table):
        table.loc[3, column] = value
        return table

    return change


@pytest.mark.parametrize("change", [
    cell("strat_fold", "abc"), cell("strat_fold", "inf"), cell("strat_fold", "2.7"), cell("strat_fold", "99"),
    cell("patient_id", "x"), cell("patient_id", ""), cell("ecg_id", ""), cell("ecg_id", "x3"), cell("ecg_id", "3.5"),
    cell("ecg_id", "1"), cell("filename_lr", "records100/00000/00001_lr"), cell("filename_lr", "../00001_lr"),
    lambda table: table.iloc[:0],
])  # fmt: skip
def test_an_odd_table_is_refused_and_what_was_prepared_stays(copy, home, tmp_path, change):
    shutil.copytree(home / "data", tmp_path / "data")
    before = (tmp_path / "data" / "ecg" / "prepared" / "index.npz").read_bytes()
    table_with(copy, "ptbxl_database.csv", change)
    assert "ptbxl_database.csv" in refused_later(tmp_path, "download", "ecg", "--from", copy)
    assert (tmp_path / "data" / "ecg" / "prepared" / "index.npz").read_bytes() == before


def test_other_odd_sources_are_refused(source, copy, tmp_path):
    table_with(copy, "scp_statements.csv", lambda table: table.assign(diagnostic=""))
    assert "no diagnostic code of CD, HYP" in refused_later(tmp_path, "download", "ecg", "--from", copy)
    assert metapt.superclasses("{'ab': 0}", {"ab": "MI"}).tolist() == [0, 1, 0, 0, 0]
    with pytest.raises(metapt.BadInput, match="cannot be read"):
        metapt.superclasses("['ab']", {"ab": "MI"})
    (tmp_path / "file").write_text("x")
    assert "file" in refused_later(tmp_path, "download", "ecg", "--from", tmp_path / "file")
    assert "file" in refused_later(tmp_path, "download", "ecg", "--from", source, "--data", tmp_path / "file")
    (copy / "SHA256SUMS.txt").unlink()
    (copy / "SHA256SUMS.txt").mkdir()
    assert "SHA256SUMS.txt" in refused_later(tmp_path, "download", "ecg", "--from", copy)


@pytest.mark.parametrize("fault", ["wrong byte", "short", 403])
def test_a_file_that_cannot_be_had_is_named_and_the_others_are_kept(server, tmp_path, fault):
    record = "records100/00000/00009_lr.dat"
    FileServer.faults = {record: [fault] * 9}
    err = refused_later(tmp_path, "download", "ecg", "--url", server)
    assert "1 of 120 files" in err
    assert "00009_lr.dat" in err
    files = tmp_path / "data" / "ecg" / "files"
    assert len(list(files.rglob("*_lr.*"))) == 119  # all others, and nothing wrong under that name
    assert not (tmp_path / "data" / "ecg" / "prepared").exists()
    FileServer.faults = {}
    assert main_in(tmp_path, "download", "ecg", "--url", server)[0] == 0


def test_a_record_that_the_server_does_not_have_is_left_out_unless_strict(server, tmp_path):
    FileServer.faults = {"records100/00000/00009_lr.dat": [404] * 2}
    assert "404" in refused_later(tmp_path, "download", "ecg", "--url", server, "--strict")
    code, out, _ = main_in(tmp_path, "download", "ecg", "--url", server)
    assert code == 0
    assert "00009_lr.dat is missing" in out.replace("\n", "")
    assert "59 records" in out


def test_without_room_nothing_is_fetched(server, tmp_path, monkeypatch):
    monkeypatch.setattr(metapt.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    assert "are free" in refused_later(tmp_path, "download", "ecg", "--url", server)
    assert not any("records100" in path for path in FileServer.asked)


# ---------------------------------------------------------------------------------------------------------------------
# Model, augmentation and losses beside slow formulations
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_nt_xent_is_equation_1():
    a, b = torch.randn(2, 7, 5, dtype=torch.float64)
    z, total = torch.cat([a, b]), 0.0
    cosine = lambda i, j: float(z[i] @ z[j] / z[i].norm() / z[j].norm()) / 0.3
    for i in range(14):
        others = [math.exp(cosine(i, k)) for k in range(14) if k != i]
        total -= math.log(math.exp(cosine(i, (i + 7) % 14)) / sum(others)) / 14
    assert metapt.nt_xent(a, b, 0.3).item() == pytest.approx(total, rel=1e-12)


def slow_convolution(x, weight, stride, padding):
    """[n, c, t] and [d, c, 1, k], one output sample at a time."""
    x, weight = F.pad(x, (padding, padding)), weight[:, :, 0]
    steps = range(0, x.shape[2] - weight.shape[2] + 1, stride)
    return torch.stack([torch.einsum("nck,dck->nd", x[:, :, s : s + weight.shape[2]], weight) for s in steps], 2)


def slow_norm(x, norm):
    mean = x.mean((0, 2), keepdim=True)
    variance = ((x - mean) ** 2).mean((0, 2), keepdim=True)
    return (x - mean) / (variance + norm.eps).sqrt() * norm.weight[:, None] + norm.bias[:, None]


def test_resnet_is_that_of_loops():
    model = metapt.ResNet18(3, 2).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, 0.3, 0.5)
    x = torch.randn(4, 3, 100, dtype=torch.float64)
    hidden = torch.cat([x, torch.zeros(4, 3, 28, dtype=torch.float64)], 2)
    hidden = slow_norm(slow_convolution(hidden, model.stem[0].weight, 2, 7), model.stem[1]).clamp_min(0)
    padded = torch.cat([torch.full((4, 2, 1), -math.inf), hidden, torch.full((4, 2, 1), -math.inf)], 2)
    hidden = torch.stack([padded[:, :, s : s + 3].amax(2) for s in range(0, padded.shape[2] - 2, 2)], 2)
    for i, block in enumerate(model.blocks):
        stride = 2 if i in (2, 4, 6) else 1
        inner = slow_norm(slow_convolution(hidden, block.first.weight, stride, 7), block.norm1).clamp_min(0)
        inner = slow_norm(slow_convolution(inner, block.second.weight, 1, 7), block.norm2)
        if stride == 2:
            hidden = slow_norm(slow_convolution(hidden, block.shortcut[0].weight, 2, 0), block.shortcut[1])
        hidden = (inner + hidden).clamp_min(0)
    torch.testing.assert_close(model(x), hidden.mean(2), rtol=1e-9, atol=1e-9)


def test_the_network_has_the_published_shape():
    model = metapt.ResNet18(12, 32)
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len([c for c in convolutions if c.kernel_size == (1, 15)]) == 17  # and the head makes 18
    assert sorted({c.out_channels for c in convolutions}) == [32, 64, 128, 256]
    assert model.eval()(torch.zeros(2, 12, 1000)).shape == (2, 256)


def slow_flow(velocity: np.ndarray, squarings: int) -> np.ndarray:
    grid = np.arange(len(velocity), dtype=float)
    place = grid + velocity / 2**squarings
    for _ in range(squarings):  # beyond the borders the displacement is that of the border
        inside = np.clip(place, 0, len(velocity) - 1)
        place = place + np.interp(inside, grid, place - grid)
    return place - grid


def slow_quarter(noise: np.ndarray) -> np.ndarray:
    return np.array([(noise[4 * i + 1] + noise[4 * i + 2]) / 2 for i in range(len(noise) // 4)]) / 4


def slow_warp(noise: np.ndarray, speed: float, steepest: float) -> np.ndarray:
    """From white noise [t] to displacements [t]."""
    n = len(noise) // 4
    quarter = slow_quarter(noise) * speed
    squarings = 5
    while steepest / 2**squarings > 0.5:
        squarings += 1
    moved = 4 * slow_flow(quarter, squarings)
    full = np.interp((np.arange(len(noise)) + 0.5) / 4 - 0.5, np.arange(n), moved)
    padded, taps = np.pad(full, 12, mode="edge"), np.exp(-(np.arange(-12, 13) ** 2) / 288)
    return np.array([padded[i : i + 25] @ (taps / taps.sum()) for i in range(len(noise))])


@pytest.mark.parametrize("scale", [0.1, 0.5, 4.0])
def test_the_warp_is_that_of_loops(scale):
    warp = metapt.WarpAugmentation(3, scale).double()
    magnitudes, views = torch.tensor([0.3, 1.9], dtype=torch.float64), torch.randn(2, 3, 200, dtype=torch.float64)
    torch.manual_seed(5)
    found = warp(views, magnitudes)
    torch.manual_seed(5)
    noise = torch.randn(2, 1, 200, dtype=torch.float64).numpy()
    speeds = [100 * warp.scale.item() ** 2 * magnitudes[i].item() for i in range(2)]
    steepest = max(np.abs(np.diff(slow_quarter(noise[i, 0]) * speeds[i])).max() for i in range(2))
    for i in range(2):
        moved = slow_warp(noise[i, 0], speeds[i], steepest)
        place = np.clip(np.arange(200) + moved, 0, 199)
        for lead in range(3):
            expected = np.interp(place, np.arange(200), views[i, lead].numpy())
            np.testing.assert_allclose(found[i, lead].detach().numpy(), expected, rtol=0, atol=1e-9)


def increasing(scale: float, magnitudes: torch.Tensor, kind=torch.float64) -> torch.Tensor:
    warp = metapt.WarpAugmentation(12, scale).to(kind)
    moved = warp.displacements(magnitudes.to(kind), 1000).detach()
    assert moved.isfinite().all()
    return (torch.arange(1000, dtype=kind) + moved).diff(dim=1)


@pytest.mark.parametrize("scale", [0.0, 0.1, 0.5, 1.0, 4.0, 30.0, 1000.0, -2.0])
def test_samples_keep_their_order_whatever_phi_is(scale):
    steps = increasing(scale, torch.linspace(0, 2, 200))
    assert steps.min() >= -1e-9  # rounding, where thousands of samples are pressed into one
    steps = increasing(scale, torch.linspace(0, 2, 50), torch.float32)
    assert steps.min() >= -1e-3


def test_with_the_published_number_of_squarings_they_do_not(monkeypatch):
    monkeypatch.setattr(metapt.math, "ceil", lambda x: 4)  # five squarings whatever the velocity
    share = (increasing(4.0, torch.ones(200)) > 0).double().mean()
    assert 0.55 < share < 0.64  # the 59 %
    assert (increasing(0.5, torch.ones(200)) > 0).all()


def test_the_start_is_as_gentle_as_stated(home):
    domain = make(home)
    found = domain.facts(domain.meta())["warp_rms_ms"]
    assert 25 < found < 45  # --init-scale's help says 34
    assert "moves samples by 34 ms" in metapt.Settings.__dataclass_fields__["init_scale"].metadata["help"]


def test_masks_and_noise_are_as_published():
    augment = metapt.SignalAugmentation(12, None, False)
    signals = torch.ones(400, 12, 1000)
    masked = augment.masked(signals)
    zeros = (masked == 0).sum(2)
    assert zeros.max() <= 500
    assert zeros.double().mean() == pytest.approx(250, abs=5)
    assert zeros.double().std() == pytest.approx(500 / math.sqrt(12), rel=0.05)
    edges = (masked == 0).int().diff(dim=2).abs().sum(2)
    assert edges.max() <= 2  # one stretch
    assert ((masked > 0) & (masked < 1)).sum(2).max() <= 2
    assert len({tuple(row) for row in zeros[:5].tolist()}) == 5
    assert (zeros[:, 0] != zeros[:, 1]).any()  # each lead its own

    signals = 3 * torch.randn(400, 12, 1000)
    augment.mask.fill_(-1e9)  # no masks
    noise = (augment(signals)[0] - signals).std(2) / signals.std(2)
    assert noise.max() <= 0.11
    assert noise.mean() == pytest.approx(0.05, rel=0.05)
    a, b = augment(signals)
    assert not torch.equal(a, b)


def test_each_view_has_its_own_statistics_and_ft_those_of_the_network(home):
    domain = make(home)
    network, meta = domain.network(), domain.meta()
    theta, phi = (dict(m.named_parameters()) for m in (network, meta))
    index = torch.arange(16)
    torch.manual_seed(3)
    value = domain.pretrain_loss(network, meta, index, 1.0)(theta, phi)
    torch.manual_seed(3)
    views = metapt.call(meta, phi, domain.inputs("pretrain", index), train=True)
    network.train()
    expected = metapt.nt_xent(network(views[0]), network(views[1]), 0.5)
    torch.testing.assert_close(value, expected)
    assert not torch.allclose(metapt.nt_xent(*network(torch.cat(views)).chunk(2), 0.5), expected, rtol=1e-4)
    head = domain.head()
    loss = domain.finetune_loss(network, head, "finetune", index)(theta, dict(head.named_parameters()))
    network.eval()
    outputs = head(network(domain.inputs("finetune", index), features=True))
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(outputs, domain.targets("finetune", index)))


@pytest.mark.parametrize("augment", ["warp", "simclr", "both"])
def test_the_gradient_of_the_pretraining_loss_in_phi_is_that_of_differences(home, augment):
    domain = make(home, augment=augment, init_scale=0.6)
    network, meta = domain.network().double(), domain.meta().double()
    theta = {name: p.detach() for name, p in network.named_parameters()}
    phi = {name: p.detach().requires_grad_() for name, p in meta.named_parameters()}
    signals = domain.inputs("pretrain", torch.arange(12)).double()
    domain.inputs = lambda part, index: signals
    loss = domain.pretrain_loss(network, meta, None, 1.0)

    def value(phi):
        torch.manual_seed(1)
        return loss(theta, phi)

    gradient = dict(zip(phi, torch.autograd.grad(value(phi), list(phi.values())), strict=True))
    for name, g in gradient.items():
        if g.norm() < 1e-9:  # a bias in front of BatchNorm
            continue
        direction = g / g.norm()
        ends = [
            {k: p.detach() + sign * 1e-8 * (direction if k == name else 0) for k, p in phi.items()} for sign in (1, -1)
        ]
        slope = (value(ends[0]) - value(ends[1])).item() / 2e-8
        assert slope == pytest.approx(g.norm().item(), rel=1e-2), name
    expected = {"warp": {"warp.scale"}, "simclr": {"mask", "noise"}, "both": {"warp.scale", "mask", "noise"}}[augment]
    assert expected <= {name for name, g in gradient.items() if g.norm() > 0}


@pytest.mark.parametrize("hvp", ["exact", "finite"])
def test_the_hypergradient_of_the_domain_is_the_dense_one(home, hvp):
    """v and the mixed product in float64, against differences of L_V and of L_PT's gradient.

    Tiny steps: at a longer one some ReLU of thousands changes sides, and the second derivative that autograd knows
    nothing of is in the difference.
    """
    domain = make(home, augment="both", unroll_steps=1)
    network, meta, head = domain.network().double(), domain.meta().double(), domain.head().double()
    theta, phi, psi = ({k: p.detach() for k, p in m.named_parameters()} for m in (network, meta, head))
    signals = {p: domain.inputs(p, torch.arange(10)).double() for p in ("pretrain", "finetune", "validation")}
    domain.inputs = lambda part, index: signals[part]
    labels = {part: domain.targets(part, torch.arange(10)).double() for part in ("finetune", "validation")}
    domain.targets = lambda part, index: labels[part]
    pretrain = domain.pretrain_loss(network, meta, None, 1.0)
    finetune, validation = (domain.finetune_loss(network, head, part, None) for part in ("finetune", "validation"))
    torch.manual_seed(4)
    found = metapt.hypergradient(pretrain, finetune, validation, theta, psi, phi, unroll=metapt.Unroll(1, 0.1),
                                 solver=metapt.Solver("identity", hvp=hvp, step=1e-8))  # fmt: skip

    def gradient(phi):
        torch.manual_seed(4)
        point = {k: p.clone().requires_grad_() for k, p in theta.items()}
        grads = torch.autograd.grad(pretrain(point, phi), list(point.values()), allow_unused=True)
        return dict(zip(theta, grads, strict=True))

    def after_finetuning(theta):
        point = {k: p.clone().requires_grad_() for k, p in psi.items()}
        grads = torch.autograd.grad(finetune(theta, point), list(point.values()))
        moved = {k: p - 0.1 * g for (k, p), g in zip(psi.items(), grads, strict=True)}
        return validation(theta, moved).item()

    direction = {k: torch.randn_like(p) for k, p in theta.items()}
    ends = [after_finetuning({k: p + sign * 1e-8 * direction[k] for k, p in theta.items()}) for sign in (1, -1)]
    along = sum((found.q[k] * direction[k]).sum() for k in theta).item()
    assert along == pytest.approx((ends[0] - ends[1]) / 2e-8, rel=1e-3)
    for name in ("warp.scale", "mask", "noise", "warp.last.weight"):
        step = torch.randn_like(phi[name])
        ends = [gradient({**phi, name: phi[name] + sign * 1e-8 * step}) for sign in (1, -1)]
        mixed = sum((found.q[k] * (ends[0][k] - ends[1][k])).sum() for k in theta if ends[0][k] is not None) / 2e-8
        assert (found.phi[name] * step).sum().item() == pytest.approx(-mixed.item(), rel=2e-3), name


# ---------------------------------------------------------------------------------------------------------------------
# The domain and its commands
# ---------------------------------------------------------------------------------------------------------------------


def test_parts_are_disjoint_and_sets_divided_four_to_one(home):
    domain = make(home, test_folds="2,3", ft_records=40)
    fold = domain.records.fold
    assert sorted(set(fold[domain.rows["test"]].tolist())) == [2, 3]
    assert not set(fold[domain.rows["pretrain"]].tolist()) & {2, 3}
    pool = domain.rows["finetune"].tolist() + domain.rows["validation"].tolist()
    assert len(set(pool)) == 40
    assert set(pool) <= set(domain.rows["pretrain"].tolist())
    assert (domain.sizes["finetune"], domain.sizes["validation"]) == (32, 8)
    assert [domain.divide(n) for n in (5, 40, 100)] == [(4, 1), (32, 8), (80, 20)]
    assert domain.finetune_limits == (5, 40)
    half = make(home, ft_share=0.5, ft_records=40)
    assert half.access == {"finetune": 16, "validation": 4}
    other = make(home, test_folds="2,3", ft_records=20)  # a smaller set is part of the larger
    assert set(other.rows["finetune"].tolist()) <= set(domain.rows["finetune"].tolist())
    expected = domain.records.millivolts(domain.rows["pretrain"])
    assert domain.mean == pytest.approx(expected.mean().item(), abs=1e-6)
    assert domain.deviation == pytest.approx(expected.std().item(), rel=1e-4)


def test_ft_reads_no_more_than_its_share_of_both_parts(home, monkeypatch):
    domain, seen = make(home), {}
    inputs = domain.inputs
    monkeypatch.setattr(domain, "inputs", lambda p, i: seen.setdefault(p, []).extend(i.tolist()) or inputs(p, i))
    metapt.finetune(domain, domain.network(), 20, 0, "head", 1e-2, 5)
    assert len(set(seen["finetune"])) == 16
    assert len(set(seen["validation"])) == 4
    assert len(set(seen["test"])) == domain.sizes["test"]


def test_meta_with_half_of_the_ft_set_never_reads_the_other_half(home, monkeypatch):
    domain, seen = make(home, ft_share=0.5), {}
    inputs = domain.inputs
    monkeypatch.setattr(domain, "inputs", lambda p, i: seen.setdefault(p, set()).update(i.tolist()) or inputs(p, i))
    metapt.Training(domain, domain.settings, True).run()
    assert max(seen["finetune"]) < domain.access["finetune"] <= domain.sizes["finetune"] / 2 + 1
    assert max(seen["validation"]) < domain.access["validation"]
    assert "test" not in seen


def test_the_global_scale_has_a_rate_of_its_own(home):
    domain = make(home, scale_lr=0.25, meta_lr=1e-3, warmup=0, steps=4)
    training = metapt.Training(domain, domain.settings, True)
    before = {k: p.detach().clone() for k, p in training.best.meta.named_parameters()}
    training.run()
    moved = {k: (p - before[k]).abs().max().item() for k, p in training.best.meta.named_parameters()}
    assert moved["warp.scale"] == pytest.approx(0.25, rel=1e-2)  # Adam's first step
    assert moved["warp.last.weight"] == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("learn", [False, True])  # with φ learned, every second PT step is the meta step's
def test_the_cosine_is_stepped(home, learn):
    domain, rates = make(home, cosine=True, steps=10, warmup=0, meta_every=2, share_pass=True), []
    training = metapt.Training(domain, domain.settings, learn)
    step = training.best.optimizer.step
    training.best.optimizer.step = lambda: (rates.append(training.best.optimizer.param_groups[0]["lr"]), step())
    training.run()
    expected = [domain.settings.lr * (1 + math.cos(math.pi * t / 10)) / 2 for t in range(10)]
    assert rates == pytest.approx(expected)


def test_the_paper_preset_is_the_published_protocol():
    s = metapt.settings_of("ecg", {}, "paper")
    expected = {"batch_size": 256, "meta_batch_size": 256, "lr": 1e-4, "meta_every": 10, "unroll_steps": 1,
                "finetune_lr": 1e-4, "meta_lr": 1e-4, "scale_lr": 1.0, "init_scale": 4.0, "width": 32, "temperature": 0.5,
                "finetune_epochs": 200, "compare_lr": 1e-3, "compare_scope": "all", "solver": "neumann", "terms": 1,
                "alpha": 1e-4, "hvp": "exact", "carry_q": False, "share_pass": False, "test_folds": "10",
                "cosine": False, "steps": 3800, "warmup": 76, "finetune_batch_size": 256, "validation_batch_size": 256,
                "compare_batch_size": 64, "particles": "1", "augment": "warp", "average": 0.0}  # fmt: skip
    assert {name: getattr(s, name) for name in expected} == expected


def test_epochs_of_ft_are_counted_in_batches_of_64(home, monkeypatch):
    domain, looks = make(home, finetune_epochs=30), []
    monkeypatch.setattr(metapt.Stream, "next", lambda self: looks.append(1) or torch.arange(4))
    metapt.finetune(domain, domain.network(), 50, 0, "head", 1e-2)
    assert len(looks) == 30  # 40 records, one batch an epoch


@pytest.fixture(scope="module")
def runs(home):
    for name, given in (("one", {}), ("two", {"augment": "both", "lr": 2e-3})):
        summary = summary_of(home, "meta", "ecg", "--out", name, *options({**TINY, **given}))
        (home / f"{name}.json").write_text(json.dumps(summary))
    return home


def test_meta_prints_and_leaves_what_the_design_lists(runs):
    summary = json.loads((runs / "one.json").read_text())
    assert (summary["domain"], summary["pt_steps"], summary["meta_steps"]) == ("ecg", 12, 2)
    assert summary["phi"]["warp.scale"] != 0.5
    assert summary["phi"]["warp.last.weight"]["shape"] == [1, 32]
    assert summary["warp_rms_ms"] > 0
    assert {row["metric"] for row in summary["comparison"]} == {"mean AUROC"}
    assert {row["method"] for row in summary["comparison"]} == {
        "no_pretraining", "default_phi", "learned_phi", "online"
    }  # fmt: skip
    figures = {p.name for p in (runs / "one").glob("*.png")}
    assert figures == {"comparison.png", "losses.png", "phi.png", "warp.png", "magnitudes.png"}
    assert "mask" in json.loads((runs / "two.json").read_text())["phi"]


def test_the_same_command_gives_the_same_numbers_and_a_stopped_run_goes_on(runs, tmp_path):
    again = summary_of(runs, "meta", "ecg", "--out", tmp_path / "again", *options(TINY))
    first = json.loads((runs / "one.json").read_text())
    assert {k: v for k, v in again.items() if "seconds" not in k} == {
        k: v for k, v in first.items() if "seconds" not in k
    }
    kept = {}

    def stop(training):
        if training.step == 8:
            raise KeyboardInterrupt

    domain = make(runs)
    training = metapt.Training(domain, domain.settings, True)
    with pytest.raises(KeyboardInterrupt):
        training.run(stop, lambda t: kept.update(deepcopy(t.state_dict())))
    other = metapt.Training(domain, domain.settings, True)
    other.load_state_dict(kept)
    other.run()
    assert other.best.meta.warp.scale.item() == first["phi"]["warp.scale"]


def test_finetune_and_eval_take_sets_by_size(runs):
    summary = summary_of(runs, "finetune", "one", "--sizes=10,50", "--seeds=2", "--scope=all", "--steps=3")
    assert sorted({row["ft_examples"] for row in summary["comparison"]}) == [10, 50]
    summary = summary_of(runs, "eval", "one", "two", "--sizes=20", "--seeds=2", "--random-phi=1")
    assert {row["ft_examples"] for row in summary["differences"]} == {20}
    assert "expected between 5 and" in refused(runs, "finetune", "one", "--sizes=4")


def test_runs_on_other_test_folds_or_data_are_kept_apart(runs, tmp_path):
    """φ and θ of a run have seen the labels and signals of what another run's test records may be."""
    given = options({**TINY, "compare": 0})
    other = ["--test-folds=1,2", "--out", tmp_path / "other"]
    assert main_in(runs, "meta", "ecg", *other, *given)[0] == 0
    assert "--test-folds" in refused(runs, "eval", "one", tmp_path / "other")
    assert "other parts" in refused(runs, "pretrain", "ecg", "--phi", tmp_path / "other", "--out=no", *given)
    wide = options({**TINY, "compare": 0, "width": 2 * TINY["width"]})
    assert main_in(runs, "pretrain", "ecg", "--out", tmp_path / "wide", *wide)[0] == 0
    assert "--width" in refused(runs, "eval", "one", tmp_path / "wide")

    shutil.copytree(runs / "data", tmp_path / "data")
    folder = tmp_path / "data" / "ecg" / "prepared"
    spoil_index(folder, "ecg_id", lambda v: v + 1)
    for command in (["meta", "--resume"], ["finetune"], ["eval"]):
        assert "other data" in refused(runs, *command, "one", "--data", tmp_path / "data")


def test_ft_of_the_whole_network_keeps_batchnorm_in_evaluation_mode(home):
    domain = make(home)
    kept, transfer = [], domain.transfer
    domain.transfer = lambda network: kept.append(network) or transfer(network)
    metapt.finetune(domain, domain.network(), 50, 0, "all", 1e-3, 3)
    assert kept
    assert not any(m.training for m in kept[-1].modules() if isinstance(m, torch.nn.BatchNorm1d))


def test_the_two_views_are_warped_apart(home):
    domain = make(home, init_scale=2.0)
    meta = domain.meta()
    meta.mask.data.fill_(-50.0), meta.noise.data.fill_(-50.0)  # nothing but the warp
    a, b = meta.train()(domain.inputs("pretrain", torch.arange(8)))
    assert ((a - b).abs().amax((1, 2)) > 0.1).all()


def test_pretraining_with_masks_and_noise_alone_and_at_learned_phi(runs):
    given = options({**TINY, "compare": 0})
    assert main_in(runs, "pretrain", "ecg", "--augment=simclr", "--out=plain", *given)[0] == 0
    assert main_in(runs, "pretrain", "ecg", "--phi=one", "--out=frozen", *given)[0] == 0
    summary, first = (metapt.load_json(runs / name / "summary.json") for name in ("frozen", "one"))
    assert summary["phi"]["warp.scale"] == first["phi"]["warp.scale"]
    assert "does not fit" in refused(runs, "pretrain", "ecg", "--phi=one", "--augment=simclr", *given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"test_folds": "11"}, "test-folds"), ({"test_folds": "1,2,3,4,5,6,7,8,9,10"}, "test-folds"),
        ({"test_folds": "a"}, "test-folds"), ({"test_folds": "1,11"}, "test-folds"), ({"batch_size": 1}, "batch-size"),
        ({"ft_records": 3}, "ft-records"), ({"ft_records": 5000}, "ft-records"),
        ({"augment": "all"}, "augment"), ({"temperature": 0}, "temperature"), ({"scale_lr": -1}, "scale-lr"),
        ({"init_scale": "nan"}, "init-scale"), ({"compare_scope": "body"}, "compare-scope"), ({"noise": 0.5}, "noise"),
        ({"finetune_hvp": "complex"}, "finetune-hvp"), ({"share_pass": True, "meta_every": 1}, "meta-every"),
    ],
)  # fmt: skip
def test_bad_options_are_refused(home, given, message):
    assert message in refused(home, "meta", "ecg", *options({**TINY, **given}))


def test_without_data_the_command_that_fetches_them_is_named(tmp_path):
    assert "download ecg" in refused(tmp_path, "meta", "ecg", *options(TINY))
    assert "belongs to ecg" in refused(tmp_path, "download", "mnist", "--strict")


@pytest.mark.cuda
def test_a_short_run_on_cuda(home, tmp_path):
    summary = summary_of(home, "meta", "ecg", "--device=cuda", "--out", tmp_path / "run", *options(TINY))
    assert summary["device"] == "cuda"
    assert make(home).records.samples.dtype == torch.int16


def test_superclasses_are_those_of_the_paper():
    assert SUPERCLASSES == ("NORM", "MI", "STTC", "CD", "HYP")


@pytest.mark.parametrize("share_pass", [True, False])
def test_a_meta_step_costs_what_the_readme_says(home, share_pass):
    """At the published width, all batches equal: FLOPs and bytes; with `share_pass` a PT step is among the FLOPs."""
    given = {"width": 32, **dict.fromkeys(BATCHES, 8), "warmup": 0, "share_pass": share_pass}
    domain = metapt.make_domain("ecg", metapt.settings_of("ecg", given), torch.device("cpu"), home / "data")
    learner = metapt.Learner(domain, domain.settings)
    learner.pretrain_step(1.0)
    plain = [count(lambda: learner.pretrain_step(1.0)) for count in (counting.flops, counting.peak)]
    meta = [count(lambda: learner.meta_step(1.0)) for count in (counting.flops, counting.peak)]
    assert meta[0] / plain[0] <= (2.7 if share_pass else 2.1)  # README: 2.04; 2.61 with a gradient by θ as well
    assert meta[1] / plain[1] <= 1.1
    assert all(
        p.grad.is_contiguous() for p in learner.network.parameters() if p.grad is not None
    )  # as fused Adam reads it
    views = counting.peak(
        lambda: sum(v.sum() for v in learner.meta(domain.inputs("pretrain", torch.arange(8)))).backward()
    )
    assert views < plain[1]  # what is made again in the backward pass, when the encoder's part is gone, is less
