"""What the data scripts share: verified downloads, a folder that appears whole or not at all, one-line errors.

A prepared folder holds arrays as .npy files, to be opened with `np.load(path, mmap_mode="r", allow_pickle=False)`, and
about.json: the format, what the arrays hold, where they came from, the licence, and of each array `dtype` (numpy's
dtype.str), `shape` and the `sha256` of its file.
"""

import contextlib
import errno
import fcntl
import glob
import hashlib
import io
import json
import os
import shutil
import signal
import stat
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Annotated

import numpy as np
import requests
import rich.progress
import typer
import urllib3

TRIES = 5
PAUSE = 1.0  # seconds; between requests that get no answer: 0, 2, 4, 8 of it
SCRATCH = {"new", "old", "unpacked"}  # what a folder of `scratch` may hold
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Data = Annotated[Path, typer.Option(help="The folder of all data sets")]
Url = Annotated[str | None, typer.Option(help="A mirror to fetch it from, in place of its own address")]
From = Annotated[Path | None, typer.Option("--from", help="Files at hand, verified in the same way")]
Check = Annotated[bool, typer.Option("--check", help="Only compare what is prepared with its checksums")]


class BadInput(Exception):
    """What the user can mend: exit status 2."""


class NotThere(BadInput):
    """A server has no such file."""


class Failed(Exception):
    """What is wrong with the machine, as a full disk: exit status 1."""


class Stopped(BaseException):
    """Ctrl-C, or the end that another process asked for; no Exception, so that nothing takes it for a bad file."""


def run(command) -> None:
    """Runs a script's one command and exits: 0 done; 2 bad usage or bad input; 1 anything else.

    What is wrong is one line on stderr that begins with the script's name.
    """

    def stop(*_):
        raise Stopped

    app = typer.Typer(add_completion=False)
    app.command()(command)
    warnings.simplefilter("ignore")  # what numpy and others warn of is checked, and said in one line
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # which metapt holds back until it can be answered
        sys.exit(typer.main.get_command(app).main(standalone_mode=False) or 0)
    except typer.BadParameter.__base__ as error:  # all errors of usage
        status, message = 2, error.format_message()
    except (BadInput, Failed) as error:
        status, message = 1 if isinstance(error, Failed) else 2, error
    except OSError as error:  # a file in a folder's place, a folder that may not be written to
        status, message = 1 if error.errno in (*FULL, errno.EPIPE, errno.EIO, errno.ENOMEM) else 2, error
    except MemoryError as error:
        status, message = 1, str(error) or "out of memory"
    except Stopped:
        status, message = 1, "stopped: the same command again goes on where it stopped"
    print(f"{Path(sys.argv[0]).stem}: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    sys.exit(status)


def one_of(**options) -> None:
    """Refuses options of which each rules out the others."""
    if len(given := [f"--{name.strip('_')}" for name, value in options.items() if value]) > 1:
        raise BadInput(f"{' and '.join(given)} exclude each other: give one")


@contextlib.contextmanager
def progress(label: str, unit: str = ""):
    """A bar with the time left, of bytes or of `unit`; yields a function of how many are done, and of how many."""
    text = rich.progress.TextColumn
    count = text(f"{{task.completed}}/{{task.total}} {unit}") if unit else rich.progress.DownloadColumn()
    columns = (text("{task.description}"), rich.progress.BarColumn(20), count, rich.progress.TimeRemainingColumn())
    with rich.progress.Progress(*columns) as bars:
        task = bars.add_task(label, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verifies(path: Path, sha256: str | None) -> bool:
    return sha256 is None or digest(path) == sha256


# Writing.


def enough_space(path: Path, needed: int, reason: str = "") -> None:
    """Raises Failed where `needed` bytes for `path` are more than the disk has, or, given a reason, in any case."""
    free = shutil.disk_usage(next(folder for folder in path.absolute().parents if folder.is_dir())).free
    if reason or free < needed:
        sizes = f"{needed:,} bytes are needed, {free:,} are free"
        raise Failed(f"{path}: {reason or os.strerror(errno.ENOSPC)}: {sizes}")


@contextlib.contextmanager
def room(path: Path, needed: int):
    """Says of a disk that is full, or a limit that is reached, how much `path` needs."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            enough_space(path, needed, error.strerror)
        raise


def write(file, content, path: Path, needed: int = 0) -> None:
    """Writes all of `content` to an unbuffered file that is or will be `path`, and needs so many bytes or more."""
    left = memoryview(content)
    while left:
        with room(path, max(needed, len(left))):
            left = left[file.write(left) :]


class Array:
    """A .npy file that grows by rows, of which none is held in memory."""

    def __init__(self, file: Path, path: Path, like: np.ndarray):
        self.file, self.path, self.dtype, self.shape = file.open("x+b", 0), path, like.dtype, (0, *like.shape[1:])
        self.written = hashlib.sha256()  # of the values
        self.header()

    def header(self) -> None:
        """numpy leaves room in it for any number of rows, so that it can be written anew in the end."""
        facts = {"descr": self.dtype.str, "fortran_order": False, "shape": self.shape}
        np.lib.format.write_array_header_1_0(text := io.BytesIO(), facts)
        self.file.seek(0)
        write(self.file, text.getbuffer(), self.path)
        self.begin = len(text.getbuffer())

    def append(self, values: np.ndarray) -> None:
        values = np.ascontiguousarray(values, self.dtype)
        write(self.file, content := values.reshape(-1).view(np.uint8), self.path)
        self.written.update(content)
        self.shape = (self.shape[0] + len(values), *self.shape[1:])

    def finish(self) -> str:
        """The SHA-256 of the file, which is read back; Failed where its values are not those that were written."""
        self.header()
        with room(self.path, self.file.seek(0, os.SEEK_END)):
            os.fsync(self.file.fileno())
        self.file.seek(0)
        whole, values = hashlib.sha256(self.file.read(self.begin)), hashlib.sha256()
        while piece := self.file.read(1 << 20):
            whole.update(piece)
            values.update(piece)
        if values.digest() != self.written.digest():
            raise Failed(f"{self.path} does not read back as it was written: the disk is faulty")
        return whole.hexdigest()


@contextlib.contextmanager
def scratch(path: Path):
    """A folder beside `path` that is removed in the end; where it holds nothing but what is named in `SCRATCH`, `locked`
    removes what a process left that was killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-metapt-", dir=path.parent) as name:
        yield Path(name)


@contextlib.contextmanager
def locked(folder: Path, form: str):
    """Keeps other processes from a folder, and puts right what one left that was killed.

    Yields:
        The folder's path without links, for `prepared_folder`.

    Raises:
        BadInput: it holds something else than prepared data of the format `form`, which alone is ever replaced.
        Failed: another process prepares it.
    """
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    path, flags = folder.with_name(f".{folder.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    with open(os.open(path, flags, 0o666), "r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # One that was removed since it was opened keeps nobody from the next one of that name.
            if not os.fstat(file.fileno()).st_nlink:
                raise BlockingIOError
        except BlockingIOError:
            raise Failed(f"{folder} is being prepared by process {file.read(20)}: wait for it") from None
        file.truncate(0)
        print(os.getpid(), end="", file=file, flush=True)
        try:
            for left in folder.parent.glob(f".{glob.escape(folder.name)}-metapt-*"):
                if left.is_symlink() or not left.is_dir() or {path.name for path in left.iterdir()} - SCRATCH:
                    continue  # somebody else's
                if (left / "old").exists() and not folder.exists():  # killed between two renames
                    (left / "old").replace(folder)
                shutil.rmtree(left)
            require_ours(folder, form)
            yield folder
        finally:
            path.unlink(missing_ok=True)


# The prepared folder.


def read_about(folder: Path, form: str) -> dict:
    """What about.json says of prepared data of the format `form`; BadInput: it is missing, or of something else."""
    path = folder / "about.json"
    try:
        about = json.loads(path.read_text())
        sums = [array["sha256"] for array in about["arrays"].values()]
        if about["format"] == form and sums:
            return about
    except FileNotFoundError:
        raise BadInput(f"{path} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise BadInput(f"{path} is not of the format {form!r}")


def check(folder: Path, form: str) -> None:
    """Says that all arrays are as they were written; BadInput names the one that is not."""
    arrays = read_about(folder, form)["arrays"]
    for name, array in arrays.items():
        path = folder / f"{name}.npy"
        if not path.is_file() or digest(path) != array["sha256"]:
            raise BadInput(f"{path} is not as it was written: its SHA-256 is not the one in about.json")
    print(f"{folder}: all {len(arrays)} arrays are as they were written")


def require_ours(folder: Path, form: str) -> None:
    """Raises BadInput where `folder` holds anything but the files that its own about.json lists."""
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{folder} is a file, not a folder of prepared data")
    if not folder.exists() or not (entries := list(os.scandir(folder))):
        return
    try:
        ours = {"about.json", *(f"{name}.npy" for name in read_about(folder, form)["arrays"])}
    except BadInput as error:
        raise BadInput(f"{error}: remove {folder}, or name another folder") from None
    if others := sorted(e.name for e in entries if e.name not in ours or not e.is_file(follow_symlinks=False)):
        raise BadInput(f"{folder} holds {others[0]}, which is no prepared data: remove it, or name another folder")


@contextlib.contextmanager
def prepared_folder(folder: Path, about: dict):
    """A new folder of arrays, which takes the place of `folder` when the block ends without an error.

    Args:
        folder: where it goes, as `locked` gives it.
        about: what about.json will say: `format`, `source`, `licence`, and what the block adds; `arrays` is added here.

    Yields:
        A function (name, values [rows, ...]) that appends to an array, whose dtype and columns the first call settles.

    Raises:
        BadInput: meanwhile something else was put into `folder`.
        Failed: there is no room.
    """
    arrays = {}
    with scratch(folder) as work:
        new, old = work / "new", work / "old"
        new.mkdir()

        def append(name: str, values: np.ndarray) -> None:
            if name not in arrays:
                arrays[name] = Array(new / f"{name}.npy", folder / f"{name}.npy", values)
            arrays[name].append(values)

        try:
            yield append
            sums = {name: array.finish() for name, array in arrays.items()}
        finally:
            for array in arrays.values():
                array.file.close()
        about["arrays"] = {
            name: {"dtype": array.dtype.str, "shape": array.shape, "sha256": sums[name]}
            for name, array in arrays.items()
        }
        with (new / "about.json").open("xb", 0) as file:
            write(file, (json.dumps(about, indent=2) + "\n").encode(), folder / "about.json")
            os.fsync(file.fileno())
        require_ours(folder, about["format"])
        try:
            if folder.exists():
                folder.replace(old)
            new.replace(folder)
        finally:
            if old.exists() and not folder.exists():
                old.replace(folder)


# Downloads.


def session(connections: int = 1) -> requests.Session:
    """Connections that are used again; where no answer comes, or one of 5xx or 429, it asks again after longer pauses."""
    retry = urllib3.Retry(TRIES - 1, backoff_factor=PAUSE, status_forcelist=(429, 500, 502, 503, 504),
                          raise_on_status=False, respect_retry_after_header=False)  # fmt: skip
    made = requests.Session()
    for scheme in ("http://", "https://"):
        made.mount(scheme, requests.adapters.HTTPAdapter(pool_maxsize=connections, max_retries=retry))
    return made


def fetch(url: str, path: Path, sha256: str | None, advance, session: requests.Session) -> None:
    """Downloads one file: goes on where an earlier try stopped, verifies, and only then gives the file its name.

    Args:
        url: where it is.
        path: where it goes. What is there and verifies stays; what does not verify is replaced.
        sha256: what it must hash to; None where nobody has published it: the caller checks what came.
        advance: called with (bytes so far, bytes in all or None).
        session: what `session` made.

    Raises:
        BadInput: the address cannot be had, or gives something else; NotThere where the server has no such file.
        Failed: there is no room.
    """
    if path.exists() and verifies(path, sha256):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with open(os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+b", 0) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_nlink != 1:
            raise BadInput(f"{part} is no download that was begun here: remove it")
        try:
            for _ in range(TRIES):
                problem = fetch_rest(url, file, path, advance, session)
                if not problem and not verifies(part, sha256):
                    problem = f"its SHA-256 is not {sha256}; what came was discarded"
                    file.truncate(0)
                if not problem:
                    part.replace(path)
                    return
            raise BadInput(f"{url}: {problem} ({TRIES} tries)")
        finally:
            if not os.fstat(file.fileno()).st_size:
                part.unlink(missing_ok=True)


def fetch_rest(url: str, file, path: Path, advance, session: requests.Session) -> str:
    """Asks once for what `file` lacks, and keeps what comes; returns why that is not all of it, or nothing."""
    have = file.seek(0, os.SEEK_END)
    # "identity": a compressed answer could not be gone on with, nor its length be known.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        answer = session.get(url, headers=headers, stream=True, timeout=30)
    except (requests.RequestException, ValueError) as error:
        raise BadInput(f"{url}: {getattr(error.args[0], 'reason', error)}") from None
    with answer:
        code, span = answer.status_code, answer.headers.get("Content-Range", "")
        if code == 416 and span == f"bytes */{have}":
            return ""  # all of it is here
        resumed = code == 206 and span.startswith(f"bytes {have}-")
        if not resumed and (answer.ok or code == 416):
            have = file.seek(file.truncate(0))
        if code in (206, 416) and not resumed:
            return "it sent another part than was asked for"
        if not answer.ok:
            raise (NotThere if code in (404, 410) else BadInput)(f"{url}: {code} {answer.reason}")
        # A server may send less than was asked for: of a part, the length of the whole file counts.
        length = span.rpartition("/")[2] if resumed else answer.headers.get("Content-Length", "")
        total = int(length) if length.isdecimal() else None
        enough_space(path, (total or have) - have)
        answer.raw.enforce_content_length = False  # what came before a cut is kept; the length is compared here
        try:
            for chunk in answer.iter_content(1 << 16):
                write(file, chunk, path, (total or 0) - file.tell())
                advance(file.tell(), total)
        except requests.RequestException as error:
            return str(error)
        return "the connection ended early" if total and file.tell() < total else ""
