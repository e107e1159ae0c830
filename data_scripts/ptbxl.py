# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "numpy>=2.0,<3", "pandas>=2.2", "requests>=2.32,<3", "rich>=13.9,<16", "typer>=0.16,<1", "wfdb>=4.1,<5",
# ]
# ///
"""PTB-XL (Wagner et al., Scientific Data 2020): fetches its 100 Hz ECGs, or takes them from a folder, as arrays.

    python data_scripts/ptbxl.py [--data data] [--from FOLDER | --url MIRROR | --check] [--strict]

Writes DATA/ecg/prepared, format "metapt ecgs 2": samples int16 [records, 1000, 12] as they are stored; gain (units a
mV) and baseline float32 [records, 12]; ecg_id, patient and fold int64 [records]; labels uint8 [records, 5], 0 or 1;
sums float64 [records, 2], of all samples in mV and of their squares. What was fetched stays in DATA/ecg/files.
"""

import ast
import contextlib
import functools
import multiprocessing.pool
import re
import signal
import warnings
from pathlib import Path
from typing import Annotated

import files
import numpy as np
import pandas
import typer
import wfdb
from files import BadInput, Check, Data, From, NotThere, Url

FORMAT = "metapt ecgs 2"
URL = "https://physionet.org/files/ptb-xl/1.0.3"
SOURCE = "PTB-XL, a large publicly available electrocardiography dataset, https://physionet.org/content/ptb-xl"
LICENCE = "CC BY 4.0"
FILES = ("ptbxl_database.csv", "scp_statements.csv", "LICENSE.txt")
LEADS = ("I", "II", "III", "AVR", "AVL", "AVF", "V1", "V2", "V3", "V4", "V5", "V6")
SUPERCLASSES = ("NORM", "MI", "STTC", "CD", "HYP")
HERTZ, SAMPLES = 100, 1000
BYTES = 2 * SAMPLES * len(LEADS)  # of a record
GAINS, BASELINES = (1, 1e6), (-(2**15), 2**15)  # what an electrocardiograph's can be
INVALID = -(2**15)  # what WFDB's format 16 writes for a sample that is not there
THREADS = 16  # that fetch
SEVERAL = 1000  # records from which on several processes read: they take seconds to begin


def read_record(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One 100 Hz record of PTB-XL: samples [1000, 12] as they are stored, gain (units a mV) and baseline [12].

    Raises:
        BadInput: a file is missing or torn, or the header says something else than PTB-XL's do.
    """
    try:
        header = wfdb.rdheader(str(path))
        leads, n = header.sig_name, len(LEADS)
        for what, found, expected in (
            ("leads", leads and [lead.upper() for lead in leads], list(LEADS)),
            ("samples", header.sig_len, SAMPLES),
            ("samples a second", header.fs, HERTZ),
            ("units", header.units, ["mV"] * n),
            ("format", header.fmt, ["16"] * n),
            ("signal files", header.file_name, [f"{path.name}.dat"] * n),
        ):
            if found != expected:
                raise BadInput(f"{path}.hea: {what}: {found}, expected {expected}")
        lines = [line.split() for line in path.with_name(f"{path.name}.hea").read_text().splitlines()[1 : n + 1]]
        if any(len(line) < 3 or re.fullmatch("[0.]*", re.split("[(/]", line[2])[0]) for line in lines):
            raise BadInput(f"{path}.hea: a gain of 0, or none")  # which wfdb takes for 200
        for what, values, (low, high) in (("gain", header.adc_gain, GAINS), ("baseline", header.baseline, BASELINES)):
            if wrong := [value for value in values if not low <= value <= high]:
                raise BadInput(f"{path}.hea: {what} {wrong[0]}, expected {low:g} to {high:g}")
        if (found := path.with_name(f"{path.name}.dat").stat().st_size) != BYTES:
            raise BadInput(f"{path}.dat holds {found} bytes, its header says {BYTES}")
        record = wfdb.rdrecord(str(path), physical=False)
        if record.calc_checksum() != record.checksum:
            raise BadInput(f"{path}.dat: the samples do not add up to the header's checksums")
    except BadInput:
        raise
    except Exception as error:  # noqa: BLE001 (wfdb raises half a dozen types for headers that are torn)
        raise BadInput(f"{path}.hea is no header of WFDB: {type(error).__name__}: {error}") from None
    if (missing := (record.d_signal == INVALID).any(0)).any():
        raise BadInput(f"{path}.dat: NaN in lead {LEADS[missing.argmax()]}")
    return (
        record.d_signal.astype(np.int16),
        np.array(record.adc_gain, np.float32),
        np.array(record.baseline, np.float32),
    )


def begin_reading() -> None:
    """In a process that reads: Ctrl-C reaches it too, but the one that started it ends it; nor does it warn."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")


def read_verified(source: Path, job: tuple[str, dict[str, str]]):
    """What `read_record` gives of a record (its name, and the sums of its files), or what is wrong with it."""
    name, sums = job
    try:
        for file in sums:
            verify(source, file, sums)
        return read_record(source / name)
    except BadInput as error:
        return str(error)


def verify(source: Path, name: str, sums: dict[str, str]) -> None:
    """Raises BadInput where a file is missing, or not what `sums` says."""
    if not (source / name).is_file():
        raise BadInput(f"{source / name} is missing")
    if sums.get(name) is None:
        raise BadInput(f"{source / name} is not listed in {source / 'SHA256SUMS.txt'}")
    if files.digest(source / name) != sums[name]:
        raise BadInput(f"{source / name}: its SHA-256 is not the one in {source / 'SHA256SUMS.txt'}")


def read_sums(path: Path) -> dict[str, str]:
    """What `sha256sum` writes: file → SHA-256. BadInput: it is missing, or something else."""
    try:
        lines = [line.split(maxsplit=1) for line in path.read_text().splitlines() if line.strip()]
        sums = {name.lstrip("*").removeprefix("./"): sha for sha, name in lines}
        if not all(re.fullmatch(r"[0-9a-f]{64}", sha) for sha in sums.values()):
            raise ValueError
        return sums
    except FileNotFoundError:
        raise BadInput(f"{path} is missing") from None
    except ValueError:
        raise BadInput(f"{path} is not a list of SHA-256 sums") from None


def read_tables(source: Path, sums: dict[str, str]) -> tuple[pandas.DataFrame, dict[str, str]]:
    """The rows of ptbxl_database.csv by ecg_id, and the superclass of each diagnostic SCP code.

    The list of records is its column `filename_lr`: in 1.0.3 the file RECORDS lacks a newline between two of them.

    Raises:
        BadInput: a table is missing, or is not PTB-XL's.
    """
    tables = []
    for file, columns in (("ptbxl_database.csv", ["patient_id", "scp_codes", "strat_fold", "filename_lr"]),
                          ("scp_statements.csv", ["diagnostic", "diagnostic_class"])):  # fmt: skip
        verify(source, file, sums)
        try:
            tables.append(pandas.read_csv(source / file, index_col=0)[columns])
        except (ValueError, KeyError) as error:
            raise BadInput(f"{source / file} is not PTB-XL's: {error}") from None
    (rows, statements), path = tables, source / "ptbxl_database.csv"
    if outside := [name for name in rows.filename_lr if not re.fullmatch(r"records100/\d+/\d+_lr", str(name))]:
        raise BadInput(f"{path} names {outside[0]!r} as a record")
    numbers = pandas.concat([rows.index.to_series(), rows.patient_id, rows.strat_fold], axis=1)
    numbers = numbers.apply(pandas.to_numeric, errors="coerce")
    whole = (numbers % 1 == 0) & numbers.abs().lt(2**53)
    if not len(rows) or not whole.all(axis=None) or not numbers.strat_fold.between(1, 10).all():
        raise BadInput(f"{path}: expected records with a whole ecg_id, patient_id and strat_fold")
    rows = rows.set_axis(numbers.iloc[:, 0].astype(np.int64)).assign(**numbers.iloc[:, 1:].astype(np.int64))
    if rows.index.has_duplicates or rows.filename_lr.duplicated().any():
        raise BadInput(f"{path}: an ecg_id or a record twice")
    classes = statements[statements.diagnostic == 1].diagnostic_class
    if missing := set(SUPERCLASSES) - set(classes):
        raise BadInput(f"{source / 'scp_statements.csv'} has no diagnostic code of {', '.join(sorted(missing))}")
    return rows, {code: name for code, name in classes.items() if name in SUPERCLASSES}


def superclasses(codes: str, classes: dict[str, str]) -> np.ndarray:
    """The five labels of a record, from its SCP codes whatever their likelihood; all 0 where none is diagnostic."""
    try:
        found = {classes.get(code) for code in ast.literal_eval(codes).keys()}  # noqa: SIM118 (a list has none)
    except (ValueError, SyntaxError, TypeError, AttributeError, MemoryError, RecursionError):
        raise BadInput(f"SCP codes {str(codes)[:60]!r} cannot be read") from None
    return np.array([name in found for name in SUPERCLASSES], np.uint8)


def prepare(source: Path, folder: Path, strict: bool = False) -> dict:
    """Reads PTB-XL's 100 Hz files into arrays; records that are wrong are left out.

    Args:
        source: holds SHA256SUMS.txt, ptbxl_database.csv, scp_statements.csv and records100.
        folder: where the arrays go, as `files.locked` gives it; those that are there are replaced.
        strict: stop at a record that is wrong.

    Returns:
        What about.json says: `records`, `left_out` (what is wrong with those that were), …

    Raises:
        BadInput: what all records need is missing or wrong, no record is right, or, if strict, one is wrong.
    """
    sums = read_sums(source / "SHA256SUMS.txt")
    rows, classes = read_tables(source, sums)
    labels, wrong, records = {}, [], 0
    for ecg_id, codes in rows.scp_codes.items():
        try:
            labels[ecg_id] = superclasses(codes, classes)
        except BadInput as error:
            wrong.append(f"{source / 'ptbxl_database.csv'}: ecg_id {ecg_id}: {error}")
    rows = rows.loc[list(labels)]
    files.enough_space(folder / "samples.npy", BYTES * len(rows))
    jobs = [(name, {file: sums.get(file) for file in (f"{name}.hea", f"{name}.dat")}) for name in rows.filename_lr]
    about = {"format": FORMAT, "source": SOURCE, "licence": LICENCE, "leads": LEADS, "classes": SUPERCLASSES,
             "hertz": HERTZ, "samples": SAMPLES}  # fmt: skip
    with contextlib.ExitStack() as stack:
        read = functools.partial(read_verified, source)
        if len(jobs) < SEVERAL:
            found = map(read, jobs)
        else:
            pool = multiprocessing.get_context("spawn").Pool(initializer=begin_reading)
            found = stack.enter_context(pool).imap(read, jobs, chunksize=50)
        advance = stack.enter_context(files.progress("reading", "records"))
        append = stack.enter_context(files.prepared_folder(folder, about))
        for done, (record, ecg_id, patient, fold) in enumerate(
            zip(found, rows.index, rows.patient_id, rows.strat_fold, strict=True), 1
        ):
            if isinstance(record, str):
                wrong.append(record)
            if strict and wrong:
                raise BadInput(wrong[0])
            if not isinstance(record, str):
                samples, gain, baseline = record
                millivolts = (samples - baseline.astype(np.float64)) / gain
                for name, value in {
                    "samples": samples, "ecg_id": ecg_id, "patient": patient,
                    "fold": fold, "labels": labels[ecg_id], "gain": gain, "baseline": baseline,
                    "sums": np.array([millivolts.sum(), (millivolts**2).sum()]),
                }.items():  # fmt: skip
                    append(name, np.expand_dims(value, 0))
                records += 1
            advance(done, len(jobs))
        if not records:
            raise BadInput(f"{source} holds no record that is right; the first: {(wrong or ['there is none'])[0]}")
        about |= {"records": records, "left_out": wrong}
    return about


def fetch_ptbxl(url: str, folder: Path, strict: bool) -> None:
    """PTB-XL's 100 Hz files from a web server, many at once; what is there and verifies stays.

    Raises:
        BadInput: a file that all records need, or (after all others were fetched) some file, cannot be had. A record
            that the server does not have (404) is no reason unless strict.
    """
    opened, listed = files.session(THREADS), folder / "SHA256SUMS.txt"

    def get(name: str, to: Path = folder) -> None:
        files.fetch(f"{url}/{name}", to / name, sums.get(name), lambda done, total: None, opened)

    def attempt(name: str) -> BadInput | None:
        try:
            get(name)
        except BadInput as error:
            return error

    with files.scratch(listed) as work:
        sums = {}
        try:  # nothing says what it must hash to, so it is asked for each time; without a server the last one serves
            get(listed.name, work)
            sums = read_sums(work / listed.name)
        except BadInput:
            if not listed.exists():
                raise
            sums = read_sums(listed)
        for name in FILES:
            if name not in sums and name.endswith(".csv"):
                raise BadInput(f"{url}/{listed.name} does not list {name}: it is not PTB-XL's, or came in part")
            get(name)
        rows, _ = read_tables(folder, sums)
        names = [f"{name}.{kind}" for name in rows.filename_lr for kind in ("hea", "dat")]
        # Only a list that names all files takes the place of the one that was there.
        if unlisted := [name for name in names if name not in sums]:
            few = f"{len(unlisted)} of {len(names)} files, as {unlisted[0]}"
            raise BadInput(f"{url}/{listed.name} does not list {few}: it came in part")
        if (work / listed.name).exists():
            (work / listed.name).replace(listed)
    missing = sum(not (folder / name).exists() for name in names)
    files.enough_space(folder / names[0], missing * (BYTES // 2 + 1000) + BYTES * len(rows))
    failed = []
    # Its threads are daemons: when the command is stopped, nothing waits for them.
    with multiprocessing.pool.ThreadPool(THREADS) as pool, files.progress("fetching", "files") as advance:
        for done, error in enumerate(pool.imap_unordered(attempt, names), 1):
            if error and (strict or not isinstance(error, NotThere)):
                failed.append(error)
            advance(done, len(names))
    if failed:
        raise BadInput(f"{len(failed)} of {len(names)} files are not there yet, run it again to go on: {failed[0]}")


def ptbxl(
    data: Data = Path("data"),
    url: Url = None,
    from_: From = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at a record that is wrong, leave none out")] = False,
    check: Check = False,
):
    """Fetch PTB-XL's 100 Hz ECGs, or take them from a folder; every file is verified, a download goes on."""
    files.one_of(url=url, from_=from_, check=check)
    if check:
        return files.check(data / "ecg" / "prepared", FORMAT)
    source = from_ or data / "ecg" / "files"
    with files.locked(data / "ecg" / "prepared", FORMAT) as folder:
        if from_ is None:
            fetch_ptbxl((url or URL).rstrip("/"), source, strict)
        about = prepare(source, folder, strict)
    for problem in about["left_out"][:10]:
        print(f"left out: {problem}")
    print(f"{about['records']} records in {folder}, {len(about['left_out'])} left out")


if __name__ == "__main__":
    files.run(ptbxl)
