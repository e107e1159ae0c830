"""PTB-XL (Wagner et al., Scientific Data 2020): its 100 Hz electrocardiograms as arrays.

    python -m data_scripts.ptbxl [--data data] [--from FOLDER | --url MIRROR | --check] [--strict]

Fetches them, or takes them from a folder. Writes DATA/ecg/prepared, format "metapt ecgs 2":
samples int16 [records, 1000, 12] as they are stored; gain (units a mV) and baseline float32
[records, 12]; ecg_id, patient and fold int64 [records]; labels uint8 [records, 5], 0 or 1; sums
float64 [records, 2], of all samples in mV and of their squares. What was fetched stays in
DATA/ecg/files.
"""

import ast
import collections
import contextlib
import functools
import multiprocessing.pool
import re
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import pandas
import typer
import wfdb
from wfdb.io.header import parse_header_content, rx_signal

from data_scripts import files
from data_scripts.files import BadInput, Check, Data, From, NotThere, Url

FORMAT = "metapt ecgs 2"
URL = "https://physionet.org/files/ptb-xl/1.0.3"
SOURCE = (
    "PTB-XL, a large publicly available electrocardiography dataset, "
    "https://physionet.org/content/ptb-xl"
)
LICENCE = "CC BY 4.0"
SUMS = "SHA256SUMS.txt"
RECORDS = "ptbxl_database.csv"
STATEMENTS = "scp_statements.csv"
FILES = (RECORDS, STATEMENTS, "LICENSE.txt")
RECORD_COLUMNS = ["patient_id", "scp_codes", "strat_fold", "filename_lr"]
STATEMENT_COLUMNS = ["diagnostic", "diagnostic_class"]
LEADS = ("I", "II", "III", "AVR", "AVL", "AVF", "V1", "V2", "V3", "V4", "V5", "V6")
SUPERCLASSES = ("NORM", "MI", "STTC", "CD", "HYP")
HERTZ = 100
SAMPLES = 1000
BYTES = 2 * SAMPLES * len(LEADS)  # of a record
GAINS = (1, 1e6)  # what an electrocardiograph's can be
BASELINES = (-(2**15), 2**15)
INVALID = -(2**15)  # what WFDB's format 16 writes for a sample that is not there
CHECKSUMS = 2**16  # WFDB's are sums modulo this, written with or without a sign
THREADS = 16  # that fetch
SEVERAL = 1000  # records from which on several processes read: they take seconds to begin


class Record(NamedTuple):
    """One electrocardiogram."""

    samples: np.ndarray  # int16 [1000, 12], as they are stored
    gain: np.ndarray  # float32 [12], units a mV
    baseline: np.ndarray  # float32 [12]


class Tables(NamedTuple):
    """What PTB-XL's two tables say."""

    rows: pandas.DataFrame  # by ecg_id: patient_id, scp_codes, strat_fold, filename_lr
    superclass: dict[str, str | None]  # of each SCP code; None: it is not diagnostic


# Records.


def read_record(path: Path) -> Record:
    """One 100 Hz record of PTB-XL, by the rules of the package wfdb.

    Raises:
        BadInput: a file is missing or torn, or the header says something else than PTB-XL's do.
    """
    data = path.with_name(f"{path.name}.dat")
    try:
        header = wfdb.rdheader(str(path))
        require_header(header, path)
        size = data.stat().st_size
        if size != BYTES:
            raise BadInput(f"{data} holds {size} bytes, its header says {BYTES}")
        record = wfdb.rdrecord(str(path), physical=False)
        for found, stated in zip(record.calc_checksum(), header.checksum, strict=True):
            if stated is not None and (found - stated) % CHECKSUMS != 0:
                raise BadInput(f"{data}: the samples do not add up to the header's checksums")
    except BadInput:
        raise
    except Exception as error:  # wfdb raises half a dozen types for headers that are torn
        reason = f"{type(error).__name__}: {error}"
        raise BadInput(f"{path}.hea is no header of WFDB: {reason}") from None
    missing = (record.d_signal == INVALID).any(0)
    if missing.any():
        raise BadInput(f"{data}: NaN in lead {LEADS[missing.argmax()]}")
    return Record(
        samples=record.d_signal.astype(np.int16),
        gain=np.array(record.adc_gain, np.float32),
        baseline=np.array(record.baseline, np.float32),
    )


def require_header(header: wfdb.Record, path: Path) -> None:
    """Raises BadInput where a header is not like PTB-XL's."""
    leads = header.sig_name
    if leads:
        leads = [lead.upper() for lead in leads]
    n = len(LEADS)
    for what, found, expected in (
        ("leads", leads, list(LEADS)),
        ("samples", header.sig_len, SAMPLES),
        ("samples a second", header.fs, HERTZ),
        ("units", header.units, ["mV"] * n),
        ("format", header.fmt, ["16"] * n),
        ("signal files", header.file_name, [f"{path.name}.dat"] * n),
    ):
        if found != expected:
            raise BadInput(f"{path}.hea: {what}: {found}, expected {expected}")
    # wfdb takes a gain of 0, or none, for 200.
    for text in read_gains(path.with_name(f"{path.name}.hea")):
        if text == "" or float(text) == 0:
            raise BadInput(f"{path}.hea: a gain of 0, or none")
    for what, values, (low, high) in (
        ("gain", header.adc_gain, GAINS),
        ("baseline", header.baseline, BASELINES),
    ):
        for value in values:
            if not low <= value <= high:
                raise BadInput(f"{path}.hea: {what} {value}, expected {low:g} to {high:g}")


def read_gains(path: Path) -> list[str]:
    """The text of each signal's gain, found as wfdb finds it.

    Blank lines and comments may stand anywhere, and comments may be in any encoding.
    """
    content = path.read_text(encoding="ascii", errors="ignore")
    lines, _ = parse_header_content(content)
    return [rx_signal.match(line)["adc_gain"] for line in lines[1:]]


def begin_reading() -> None:
    """Called in a process that reads, which shall not warn.

    Ctrl-C reaches it too, but the one that started it ends it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")


def read_verified(source: Path, job: tuple[str, dict[str, str]]) -> Record | str:
    """Reads a record, or says what is wrong with it.

    `job` is the record's name, and the SHA-256 of its files by name.
    """
    name, sums = job
    try:
        for file in sums:
            verify(source, file, sums)
        return read_record(source / name)
    except BadInput as error:
        return str(error)


# Checksums and tables.


def verify(source: Path, name: str, sums: dict[str, str]) -> None:
    """Raises BadInput where a file is missing, or not what `sums` says."""
    path = source / name
    if not path.is_file():
        raise BadInput(f"{path} is missing")
    if sums.get(name) is None:
        raise BadInput(f"{path} is not listed in {source / SUMS}")
    if files.digest(path) != sums[name]:
        raise BadInput(f"{path}: its SHA-256 is not the one in {source / SUMS}")


def read_sums(path: Path) -> dict[str, str]:
    """What `sha256sum` writes: the SHA-256 of each file by name.

    Raises:
        BadInput: it is missing, says two things of a file, or is something else.
    """
    sums = {}
    try:
        for line in path.read_text(encoding="utf-8-sig").splitlines():
            if not line.strip():
                continue
            sha256, name = line.split(maxsplit=1)
            if not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
                raise ValueError
            name = name.lstrip("*").removeprefix("./")
            if sums.setdefault(name, sha256.lower()) != sha256.lower():
                raise BadInput(f"{path} has two sums of {name}")
    except FileNotFoundError:
        raise BadInput(f"{path} is missing") from None
    except ValueError:
        raise BadInput(f"{path} is not a list of SHA-256 sums") from None
    return sums


def read_table(source: Path, name: str, columns: list[str], sums: dict[str, str]):
    """The columns of one of PTB-XL's tables, by what its first column says."""
    verify(source, name, sums)
    try:
        return pandas.read_csv(source / name, index_col=0)[columns]
    except (ValueError, KeyError) as error:
        raise BadInput(f"{source / name} is not PTB-XL's: {error}") from None


def read_tables(source: Path, sums: dict[str, str]) -> Tables:
    """The records, and what their SCP codes mean.

    The list of records is the column `filename_lr`: in 1.0.3 the file RECORDS lacks a newline
    between two of them.

    Raises:
        BadInput: a table is missing, or is not PTB-XL's.
    """
    rows = read_table(source, RECORDS, RECORD_COLUMNS, sums)
    statements = read_table(source, STATEMENTS, STATEMENT_COLUMNS, sums)
    return Tables(whole_rows(rows, source / RECORDS), superclass_of(statements, source))


def whole_rows(rows: pandas.DataFrame, path: Path) -> pandas.DataFrame:
    """The table of records with whole numbers, after checks."""
    for name in rows.filename_lr:
        if not re.fullmatch(r"records100/\d+/\d+_lr", str(name)):
            raise BadInput(f"{path} names {name!r} as a record")
    numbers = pandas.concat([rows.index.to_series(), rows.patient_id, rows.strat_fold], axis=1)
    numbers = numbers.apply(pandas.to_numeric, errors="coerce")
    whole = (numbers % 1 == 0) & numbers.abs().lt(2**53)
    folds = numbers.strat_fold.between(1, 10)
    if not len(rows) or not whole.all(axis=None) or not folds.all():
        raise BadInput(f"{path}: expected records with a whole ecg_id, patient_id and strat_fold")
    numbers = numbers.astype(np.int64)
    rows = rows.set_axis(numbers.iloc[:, 0]).assign(
        patient_id=numbers.patient_id.to_numpy(), strat_fold=numbers.strat_fold.to_numpy()
    )
    if rows.index.has_duplicates or rows.filename_lr.duplicated().any():
        raise BadInput(f"{path}: an ecg_id or a record twice")
    return rows


def superclass_of(statements: pandas.DataFrame, source: Path) -> dict[str, str | None]:
    """The superclass of each SCP code; None where it is not diagnostic."""
    path = source / STATEMENTS
    twice = statements.index[statements.index.duplicated()]
    if len(twice):
        raise BadInput(f"{path} has the SCP code {twice[0]} twice")
    diagnostic = statements.diagnostic_class[statements.diagnostic == 1]
    missing = set(SUPERCLASSES) - set(diagnostic)
    if missing:
        raise BadInput(f"{path} has no diagnostic code of {', '.join(sorted(missing))}")
    for code, name in diagnostic.items():
        if name not in SUPERCLASSES:
            expected = ", ".join(SUPERCLASSES)
            raise BadInput(f"{path}: the class of {code} is {name}, expected one of {expected}")
    return {code: diagnostic.get(code) for code in statements.index}


def read_codes(text: str) -> list[str]:
    """The SCP codes of a record, whatever their likelihood."""
    try:
        return list(ast.literal_eval(text).keys())
    except (ValueError, SyntaxError, TypeError, AttributeError, MemoryError, RecursionError):
        raise BadInput(f"SCP codes {str(text)[:60]!r} cannot be read") from None


def read_labels(tables: Tables, path: Path) -> tuple[dict[int, np.ndarray], list[str]]:
    """The five labels of each record by ecg_id, all 0 where none of its codes is diagnostic.

    Codes that no statement explains give no label; they are counted and said.

    Returns:
        The labels, and what is wrong with the records that have none.
    """
    labels = {}
    wrong = []
    unknown = collections.Counter()
    for ecg_id, text in tables.rows.scp_codes.items():
        try:
            codes = read_codes(text)
        except BadInput as error:
            wrong.append(f"{path}: ecg_id {ecg_id}: {error}")
            continue
        found = {tables.superclass.get(code) for code in codes}
        labels[ecg_id] = np.array([name in found for name in SUPERCLASSES], np.uint8)
        unknown.update(str(code) for code in codes if code not in tables.superclass)
    if unknown:
        counts = ", ".join(f"{code} in {count} records" for code, count in unknown.most_common())
        print(f"SCP codes that {STATEMENTS} lacks, which give no label: {counts}")
    return labels, wrong


# Preparing.


def read_all(source: Path, jobs: list, stack: contextlib.ExitStack) -> Iterator[Record | str]:
    """What `read_verified` gives of each job, in order; many are read by several processes."""
    read = functools.partial(read_verified, source)
    if len(jobs) < SEVERAL:
        return map(read, jobs)
    pool = multiprocessing.get_context("spawn").Pool(initializer=begin_reading)
    return stack.enter_context(pool).imap(read, jobs, chunksize=50)


def prepare(source: Path, folder: Path, strict: bool = False) -> dict:
    """Reads PTB-XL's 100 Hz files into arrays; records that are wrong are left out.

    Args:
        source: holds SHA256SUMS.txt, ptbxl_database.csv, scp_statements.csv and records100.
        folder: where the arrays go, as `files.locked` gives it; those that are there are replaced.
        strict: stop at a record that is wrong.

    Returns:
        What about.json says: `records`, `left_out` (what is wrong with those that were), …

    Raises:
        BadInput: what all records need is missing or wrong, no record is right, or, if strict,
            one is wrong.
    """
    sums = read_sums(source / SUMS)
    tables = read_tables(source, sums)
    labels, wrong = read_labels(tables, source / RECORDS)
    rows = tables.rows.loc[list(labels)]
    files.enough_space(folder / "samples.npy", BYTES * len(rows))
    jobs = []
    for name in rows.filename_lr:
        names = (f"{name}.hea", f"{name}.dat")
        jobs.append((name, {file: sums.get(file) for file in names}))
    about = {
        "format": FORMAT,
        "source": SOURCE,
        "licence": LICENCE,
        "leads": LEADS,
        "classes": SUPERCLASSES,
        "hertz": HERTZ,
        "samples": SAMPLES,
    }
    records = 0
    with contextlib.ExitStack() as stack:
        found = read_all(source, jobs, stack)
        advance = stack.enter_context(files.progress("reading", "records"))
        append = stack.enter_context(files.prepared_folder(folder, about))
        for done, (record, row) in enumerate(zip(found, rows.itertuples(), strict=True), 1):
            if isinstance(record, str):
                wrong.append(record)
            if strict and wrong:
                raise BadInput(wrong[0])
            if isinstance(record, Record):
                for name, value in arrays_of(record, row, labels[row.Index]).items():
                    append(name, np.expand_dims(value, 0))
                records += 1
            advance(done, len(jobs))
        if records == 0:
            first = wrong[0] if wrong else "there is none"
            raise BadInput(f"{source} holds no record that is right; the first: {first}")
        about["records"] = records
        about["left_out"] = wrong
    return about


def arrays_of(record: Record, row, labels: np.ndarray) -> dict[str, np.ndarray]:
    """What the prepared arrays hold of one record, whose row in the table is `row`."""
    millivolts = (record.samples - record.baseline.astype(np.float64)) / record.gain
    return {
        "samples": record.samples,
        "ecg_id": np.int64(row.Index),
        "patient": np.int64(row.patient_id),
        "fold": np.int64(row.strat_fold),
        "labels": labels,
        "gain": record.gain,
        "baseline": record.baseline,
        "sums": np.array([millivolts.sum(), (millivolts**2).sum()]),
    }


# Fetching.


def fetch_sums(get, folder: Path, work: Path) -> dict[str, str]:
    """The list of checksums: that of the server, or without an answer the one of an earlier time.

    Nothing says what it must hash to, so it is asked for each time. It comes to `work`, as only a
    list that proves to be whole takes the place of the one in `folder`.
    """
    try:
        get(SUMS, work)
        return read_sums(work / SUMS)
    except BadInput:
        if not (folder / SUMS).exists():
            raise
        return read_sums(folder / SUMS)


def fetch_ptbxl(url: str, folder: Path, strict: bool) -> None:
    """PTB-XL's 100 Hz files from a web server, many at once; what is there and verifies stays.

    Raises:
        BadInput: a file that all records need, or (after all others were fetched) some file,
            cannot be had. A record that the server does not have (404) is no reason unless strict.
    """
    opened = files.session(THREADS)
    sums = {}

    def get(name: str, to: Path = folder) -> None:
        location = files.address(url, name)
        files.fetch(location, to / name, sums.get(name), lambda done, total: None, opened)

    def attempt(name: str) -> BadInput | None:
        try:
            get(name)
        except BadInput as error:
            return error
        return None

    with files.scratch(folder / SUMS) as work:
        sums = fetch_sums(get, folder, work)
        for name in FILES:
            if name not in sums and name.endswith(".csv"):
                reason = "it is not PTB-XL's, or came in part"
                raise BadInput(f"{files.address(url, SUMS)} does not list {name}: {reason}")
            get(name)
        rows = read_tables(folder, sums).rows
        names = [f"{name}.{kind}" for name in rows.filename_lr for kind in ("hea", "dat")]
        unlisted = [name for name in names if name not in sums]
        if unlisted:
            few = f"{len(unlisted)} of {len(names)} files, as {unlisted[0]}"
            raise BadInput(f"{files.address(url, SUMS)} does not list {few}: it came in part")
        if (work / SUMS).exists():
            (work / SUMS).replace(folder / SUMS)
    missing = sum(not (folder / name).exists() for name in names)
    files.enough_space(folder / names[0], missing * (BYTES // 2 + 1000) + BYTES * len(rows))
    failed = []
    # The threads are daemons: when the command is stopped, nothing waits for them.
    with (
        multiprocessing.pool.ThreadPool(THREADS) as pool,
        files.progress("fetching", "files") as advance,
    ):
        for done, error in enumerate(pool.imap_unordered(attempt, names), 1):
            tolerated = isinstance(error, NotThere) and not strict
            if error is not None and not tolerated:
                failed.append(error)
            advance(done, len(names))
    if failed:
        few = f"{len(failed)} of {len(names)} files"
        raise BadInput(f"{few} are not there yet, run it again to go on: {failed[0]}")


Strict = Annotated[
    bool, typer.Option("--strict", help="Stop at a record that is wrong, leave none out")
]


def ptbxl(
    data: Data = Path("data"),
    url: Url = None,
    from_: From = None,
    strict: Strict = False,
    check: Check = False,
):
    """Fetch PTB-XL's 100 Hz electrocardiograms, or take them from a folder.

    Every file is verified, and an interrupted download goes on.
    """
    files.one_of(url=url, from_=from_, check=check)
    prepared = data / "ecg" / "prepared"
    if check:
        files.check(prepared, FORMAT)
        return
    source = from_ or data / "ecg" / "files"
    with files.locked(prepared, FORMAT) as folder:
        if from_ is None:
            fetch_ptbxl(url or URL, source, strict)
        about = prepare(source, folder, strict)
    for problem in about["left_out"][:10]:
        print(f"left out: {problem}")
    print(f"{about['records']} records in {folder}, {len(about['left_out'])} left out")


if __name__ == "__main__":
    files.run(ptbxl)
