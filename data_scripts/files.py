"""What the data scripts share: verified downloads, whole folders, errors of one line.

A prepared folder appears whole or not at all. It holds arrays as .npy files, to be opened with
`np.load(path, mmap_mode="r", allow_pickle=False)`, and about.json: the format, what the arrays
hold, where they came from, the licence, and of each array its `dtype` (numpy's dtype.str), its
`shape` and the `sha256` of its file.
"""

import contextlib
import errno
import fcntl
import glob
import gzip
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
from typing import Annotated, BinaryIO

import numpy as np
import requests
import rich.progress
import typer
import urllib3

TRIES = 5
PAUSE = 1.0  # seconds; between requests that get no answer: 0, 2, 4, 8 of it
PIECE = 1 << 20  # bytes that are read at once
SCRATCH = {"new", "old", "unpacked"}  # what a folder of `scratch` may hold
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MACHINE = (*DISK_FULL, errno.EPIPE, errno.EIO, errno.ENOMEM)  # not for the user to mend
GZIP = b"\x1f\x8b"  # what a gzip-compressed file begins with

Data = Annotated[Path, typer.Option(help="The folder of all data sets")]
Url = Annotated[
    str | None, typer.Option(help="A mirror to fetch it from, in place of its own address")
]
From = Annotated[
    Path | None, typer.Option("--from", help="Files at hand, verified in the same way")
]
Check = Annotated[
    bool, typer.Option("--check", help="Only compare what is prepared with its checksums")
]


class BadInput(Exception):
    """What the user can mend: exit status 2."""


class NotThere(BadInput):
    """A server has no such file."""


class Failed(Exception):
    """What is wrong with the machine, such as a full disk: exit status 1."""


class Stopped(BaseException):
    """Ctrl-C, or the end that another process asked for.

    It is no Exception, so that nothing takes it for a bad file.
    """


# Commands.


def run(command) -> None:
    """Runs a script's one command and exits: 0 done; 2 bad usage or bad input; 1 anything else.

    What is wrong is one line on standard error that begins with the script's name.
    """

    def stop(*_):
        raise Stopped

    app = typer.Typer(
        add_completion=False, context_settings={"help_option_names": ["-h", "--help"]}
    )
    app.command()(command)
    script = typer.main.get_command(app)
    say_anything()
    warnings.simplefilter(
        "ignore"
    )  # what numpy and others warn of is checked, and said in one line
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        # metapt holds Ctrl-C back until a script can answer it.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        status = script.main(standalone_mode=False) or 0
    except (Exception, Stopped) as error:
        status, message = explain(error)
        line = f"{Path(sys.argv[0]).stem}: {' '.join(message.split())}"
        print(line, file=sys.stderr, flush=True)
    sys.exit(status)


def say_anything() -> None:
    """Lets terminals that lack a character show a question mark in its place."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def explain(error: BaseException) -> tuple[int, str]:
    """Exit status and message of an error that has a reason; any other error is raised again."""
    if hasattr(error, "format_message"):  # typer's errors of usage, whatever their class is called
        return 2, error.format_message()
    if isinstance(error, BadInput):
        return 2, str(error)
    if isinstance(error, Failed):
        return 1, str(error)
    if isinstance(error, Stopped):
        return 1, "stopped: the same command again goes on where it stopped"
    if isinstance(error, MemoryError):
        return 1, str(error) or "out of memory"
    if isinstance(error, OSError):  # a file in a folder's place, a folder that is write-protected
        return 1 if error.errno in MACHINE else 2, str(error)
    raise error


def one_of(**options) -> None:
    """Refuses options of which each rules out the others."""
    given = [f"--{name.strip('_')}" for name, value in options.items() if value]
    if len(given) > 1:
        raise BadInput(f"{' and '.join(given)} exclude each other: give one")


@contextlib.contextmanager
def progress(label: str, unit: str = ""):
    """A bar with the time left, of bytes or of `unit`.

    Yields:
        A function of how many are done, and of how many.
    """
    if unit:
        count = rich.progress.TextColumn(f"{{task.completed}}/{{task.total}} {unit}")
    else:
        count = rich.progress.DownloadColumn()
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(20),
        count,
        rich.progress.TimeRemainingColumn(),
    )
    with rich.progress.Progress(*columns) as bars:
        task = bars.add_task(label, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


# Reading.


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verifies(path: Path, sha256: str | None) -> bool:
    """Whether a file is what its checksum says, where there is one."""
    return sha256 is None or digest(path) == sha256


def open_plain(path: Path) -> BinaryIO:
    """Opens a file that may be gzip-compressed, whatever its name says."""
    with path.open("rb") as file:
        compressed = file.read(len(GZIP)) == GZIP
    return gzip.open(path) if compressed else path.open("rb")


# Writing.


def free_space(path: Path) -> int:
    """Bytes that are free where `path` is or will be."""
    folder = next(folder for folder in path.absolute().parents if folder.is_dir())
    return shutil.disk_usage(folder).free


def too_little_space(path: Path, needed: int, reason: str) -> Failed:
    """The error that says how much `path` needs, and how much there is."""
    return Failed(f"{path}: {reason}: {needed:,} bytes are needed, {free_space(path):,} are free")


def enough_space(path: Path, needed: int) -> None:
    """Raises Failed where `needed` bytes for `path` are more than the disk has."""
    if free_space(path) < needed:
        raise too_little_space(path, needed, os.strerror(errno.ENOSPC))


@contextlib.contextmanager
def room(path: Path, needed: int):
    """Says of a disk that is full, or a limit that is reached, how much `path` needs."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise too_little_space(path, needed, error.strerror) from None
        raise


def write(file, content, path: Path, needed: int = 0) -> None:
    """Writes all of `content` to an unbuffered file that is or will be `path`.

    `needed` is how many bytes are still to come, where that is more than `content`.
    """
    left = memoryview(content)
    while left:
        with room(path, max(needed, len(left))):
            written = file.write(left)
        left = left[written:]


class Array:
    """A .npy file that grows by rows, of which none is held in memory."""

    def __init__(self, file: Path, path: Path, like: np.ndarray):
        """Begins `file`, which will be `path`; `like` has the dtype and the columns."""
        self.file = file.open("x+b", 0)
        self.path = path
        self.dtype = like.dtype
        self.shape = (0, *like.shape[1:])
        self.written = hashlib.sha256()  # of the values
        self.write_header()

    def write_header(self) -> None:
        """Writes the header, in which numpy leaves room for any number of rows.

        So it can be written anew in the end, when their number is known.
        """
        text = io.BytesIO()
        facts = {"descr": self.dtype.str, "fortran_order": False, "shape": self.shape}
        np.lib.format.write_array_header_1_0(text, facts)
        self.header_length = len(text.getvalue())
        self.file.seek(0)
        write(self.file, text.getvalue(), self.path)

    def append(self, values: np.ndarray) -> None:
        content = np.ascontiguousarray(values, self.dtype).reshape(-1).view(np.uint8)
        write(self.file, content, self.path)
        self.written.update(content)
        self.shape = (self.shape[0] + len(values), *self.shape[1:])

    def finish(self) -> str:
        """The SHA-256 of the file, which is read back.

        Raises:
            Failed: its values are not those that were written.
        """
        self.write_header()
        size = self.file.seek(0, os.SEEK_END)
        with room(self.path, size):
            os.fsync(self.file.fileno())
        self.file.seek(0)
        whole = hashlib.sha256(self.file.read(self.header_length))
        values = hashlib.sha256()
        for piece in iter(lambda: self.file.read(PIECE), b""):
            whole.update(piece)
            values.update(piece)
        if values.digest() != self.written.digest():
            raise Failed(f"{self.path} does not read back as it was written: the disk is faulty")
        return whole.hexdigest()


@contextlib.contextmanager
def scratch(path: Path):
    """A folder beside `path` that is removed in the end.

    Where a process was killed, `locked` removes what it left, if that holds nothing but what is
    named in `SCRATCH`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-metapt-", dir=path.parent) as name:
        yield Path(name)


@contextlib.contextmanager
def locked(folder: Path, form: str):
    """Keeps other processes from a folder, and puts right what one left that was killed.

    Yields:
        The folder's path without links, for `prepared_folder`.

    Raises:
        BadInput: it holds something else than prepared data of the format `form`, which alone is
            ever replaced.
        Failed: another process prepares it.
    """
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f".{folder.name}.lock")
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    with open(os.open(path, flags, 0o666), "r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A lock whose file was removed since it was opened keeps nobody away.
            if os.fstat(file.fileno()).st_nlink == 0:
                raise BlockingIOError
        except BlockingIOError:
            owner = file.read(20)
            raise Failed(f"{folder} is being prepared by process {owner}: wait for it") from None
        file.truncate(0)
        print(os.getpid(), end="", file=file, flush=True)
        try:
            recover(folder)
            require_ours(folder, form)
            yield folder
        finally:
            path.unlink(missing_ok=True)


def recover(folder: Path) -> None:
    """Removes what `scratch` left beside a folder where a process was killed."""
    for left in folder.parent.glob(f".{glob.escape(folder.name)}-metapt-*"):
        if left.is_symlink() or not left.is_dir():
            continue
        if {path.name for path in left.iterdir()} - SCRATCH:  # somebody else's
            continue
        old = left / "old"
        if old.exists() and not folder.exists():  # killed between two renames
            old.replace(folder)
        shutil.rmtree(left)


# The prepared folder.


def read_about(folder: Path, form: str) -> dict:
    """What about.json says of prepared data of the format `form`.

    Raises:
        BadInput: it is missing, or of something else.
    """
    path = folder / "about.json"
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        sums = [array["sha256"] for array in about["arrays"].values()]
        right = about["format"] == form and len(sums) > 0
    except FileNotFoundError:
        raise BadInput(f"{path} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        right = False
    if not right:
        raise BadInput(f"{path} is not of the format {form!r}")
    return about


def check(folder: Path, form: str) -> None:
    """Says that all arrays are as they were written; BadInput names the one that is not."""
    arrays = read_about(folder, form)["arrays"]
    for name, array in arrays.items():
        path = folder / f"{name}.npy"
        if not path.is_file() or digest(path) != array["sha256"]:
            raise BadInput(
                f"{path} is not as it was written: its SHA-256 is not the one in about.json"
            )
    print(f"{folder}: all {len(arrays)} arrays are as they were written")


def require_ours(folder: Path, form: str) -> None:
    """Raises BadInput where `folder` holds anything but the files that its about.json lists."""
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{folder} is a file, not a folder of prepared data")
    if not folder.exists():
        return
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    if not entries:
        return
    try:
        arrays = read_about(folder, form)["arrays"]
    except BadInput as error:
        raise BadInput(f"{error}: remove {folder}, or name another folder") from None
    ours = {"about.json", *(f"{name}.npy" for name in arrays)}
    for entry in entries:
        if entry.name not in ours or not entry.is_file(follow_symlinks=False):
            raise BadInput(
                f"{folder} holds {entry.name}, which is no prepared data: remove it, or name "
                "another folder"
            )


@contextlib.contextmanager
def prepared_folder(folder: Path, about: dict):
    """A new folder of arrays, which takes the place of `folder` if the block ends without an error.

    Args:
        folder: where it goes, as `locked` gives it.
        about: what about.json will say: `format`, `source`, `licence`, and what the block adds.
            `arrays` is added here.

    Yields:
        A function (name, values [rows, ...]) that appends to an array, whose dtype and columns
        the first call settles.

    Raises:
        BadInput: meanwhile something else was put into `folder`.
        Failed: there is no room.
    """
    arrays = {}
    with scratch(folder) as work:
        new = work / "new"
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
        text = json.dumps(about, indent=2) + "\n"
        with (new / "about.json").open("xb", 0) as file:
            write(file, text.encode(), folder / "about.json")
            os.fsync(file.fileno())
        require_ours(folder, about["format"])
        exchange(new, folder, work / "old")


def exchange(new: Path, folder: Path, old: Path) -> None:
    """Gives `new` the name `folder`; what had that name becomes `old`, or stays if this fails."""
    try:
        if folder.exists():
            folder.replace(old)
        new.replace(folder)
    finally:
        if old.exists() and not folder.exists():
            old.replace(folder)


# Downloads.


def session(connections: int = 1) -> requests.Session:
    """Connections that are used again.

    Where no answer comes, or one of 5xx or 429, it is asked again after longer and longer pauses.
    """
    retry = urllib3.Retry(
        TRIES - 1,
        backoff_factor=PAUSE,
        status_forcelist=(429, 500, 502, 503, 504),
        raise_on_status=False,
        respect_retry_after_header=False,
    )
    made = requests.Session()
    for scheme in ("http://", "https://"):
        adapter = requests.adapters.HTTPAdapter(pool_maxsize=connections, max_retries=retry)
        made.mount(scheme, adapter)
    return made


def address(base: str, name: str) -> str:
    """Where a mirror has a file; what follows a question mark, as ?download=1, stays at the end."""
    path, mark, query = base.partition("?")
    return f"{path.rstrip('/')}/{name}{mark}{query}"


def fetch(url: str, path: Path, sha256: str | None, advance, session: requests.Session) -> None:
    """Downloads one file: goes on where an earlier try stopped, verifies, and only then names it.

    Args:
        url: where it is.
        path: where it goes. What is there and verifies stays; what does not verify is replaced.
        sha256: what it must hash to; None where nobody has published it: the caller checks what
            came.
        advance: called with (bytes so far, bytes in all or None).
        session: what `session` made.

    Raises:
        BadInput: the address cannot be had, or gives something else; NotThere where the server
            has no such file.
        Failed: there is no room.
    """
    if path.exists() and verifies(path, sha256):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    with open(os.open(part, flags, 0o666), "r+b", 0) as file:
        found = os.fstat(file.fileno())
        ours = found.st_uid == os.geteuid() and found.st_nlink == 1
        if not stat.S_ISREG(found.st_mode) or not ours:
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
            if os.fstat(file.fileno()).st_size == 0:
                part.unlink(missing_ok=True)


def fetch_rest(url: str, file, path: Path, advance, session: requests.Session) -> str:
    """Asks once for what `file` lacks, and keeps what comes.

    Returns:
        Why that is not all of it, or nothing.
    """
    have = file.seek(0, os.SEEK_END)
    # A compressed answer could not be gone on with, nor its length be known.
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        answer = session.get(url, headers=headers, stream=True, timeout=30)
    except (requests.RequestException, ValueError) as error:
        reason = getattr(error.args[0], "reason", error)
        raise BadInput(f"{url}: {reason}") from None
    with answer:
        code = answer.status_code
        span = answer.headers.get("Content-Range", "")
        if code == 416 and span == f"bytes */{have}":
            return ""  # all of it is here
        resumed = code == 206 and span.startswith(f"bytes {have}-")
        if not resumed and (answer.ok or code == 416):
            file.truncate(0)
            file.seek(0)
            have = 0
        if code in (206, 416) and not resumed:
            return "it sent another part than was asked for"
        if code in (404, 410):
            raise NotThere(f"{url}: {code} {answer.reason}")
        if not answer.ok:
            raise BadInput(f"{url}: {code} {answer.reason}")
        # A server may send less than was asked for: of a part, the length of the whole file counts.
        length = span.rpartition("/")[2] if resumed else answer.headers.get("Content-Length", "")
        total = int(length) if length.isdecimal() else None
        if total is not None:
            enough_space(path, total - have)
        answer.raw.enforce_content_length = False  # what came before a cut is kept
        try:
            for chunk in answer.iter_content(1 << 16):
                left = 0 if total is None else total - file.tell()
                write(file, chunk, path, left)
                advance(file.tell(), total)
        except requests.RequestException as error:
            return str(error)
        if total is not None and file.tell() < total:
            return "the connection ended early"
        return ""
