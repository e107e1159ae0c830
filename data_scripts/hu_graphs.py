"""The protein graphs of Hu et al., "Strategies for Pre-training Graph Neural Networks", ICLR 2020.

    python -m data_scripts.hu_graphs [--data data] [--from SOURCE | --url MIRROR | --check]

SOURCE is their zip, a folder that holds it or what was unpacked from it, or the .pt file itself.
Writes DATA/ppi/published in the layout of graphs.py. What was fetched stays in
DATA/ppi/bio_dataset.zip.
"""

import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from data_scripts import files
from data_scripts.files import BadInput, Check, Data, From, Url
from data_scripts.graphs import FORMAT, RawGraphs, prepare_graphs

URL = "http://snap.stanford.edu/gnn-pretrain/data/bio_dataset.zip"
SOURCE = "The biology data set of Hu et al., ICLR 2020, http://snap.stanford.edu/gnn-pretrain"
LICENCE = "not stated; the authors' code is under the MIT licence"
FILE = "supervised/processed/geometric_data_processed.pt"
# The archive's name; some servers and browsers let what stood behind a question mark follow.
ARCHIVE = re.compile(r"bio_dataset\.zip(\?.*)?", re.IGNORECASE)
ZIP = re.compile(r".*\.zip(\?.*)?", re.IGNORECASE)
PARTS = (
    "edge_index",
    "edge_attr",
    "center_node_idx",
    "species_id",
    "go_target_pretrain",
    "go_target_downstream",
)
AT_ONCE = 4096  # graphs in memory


class PygData:
    """What a PyG 1.0 `Data` object is restored to: its attributes, none of its code."""


def read_pyg(path: Path) -> tuple[dict, dict]:
    """Reads a pickle `(data, slices)` of torch.save, old container or zip; runs none of its code.

    Returns:
        The attributes of `data`, and the slices.

    Raises:
        BadInput: it cannot be read, or it asks for any class or function but PyG's `Data`, which
            is named.
    """
    # An imported PyG has put its own Data there, under the same name.
    others = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    allowed = [(PygData, "torch_geometric.data.data.Data")]
    mapped = zipfile.is_zipfile(path)
    try:
        with torch.serialization.safe_globals(allowed):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        data, slices = content
    except Exception as error:  # torch raises half a dozen types for files that are torn or hostile
        raise BadInput(f"{path} is not a data set of Hu et al.: {why_unreadable(error)}") from None
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(others)
    if not isinstance(data, PygData) or not isinstance(slices, dict):
        raise BadInput(
            f"{path} is not a data set of Hu et al.: it is no pair of a Data object and slices"
        )
    return vars(data), slices


def why_unreadable(error: Exception) -> str:
    """Says why torch refused a file, but not in its words, which tell how to load it unsafely."""
    asked = re.search(r"GLOBAL ([\w.]+)|(?:class|function) ([\w.]+\.\w+)", str(error))
    if asked:
        return f"it asks for {asked[1] or asked[2]}"
    return f"it is torn, or no such pickle ({type(error).__name__})"


def published_graphs(data: dict, slices: dict) -> Iterator[RawGraphs]:
    """The graphs of a collated PyG data set; the centre's number is within its own graph."""
    try:
        lengths = {name: len(slices[name]) for name in ("x", *PARTS)}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"slices of different lengths: {lengths}")
        graphs = lengths["x"] - 1
        for begin in range(0, graphs, AT_ONCE):
            yield cut(data, slices, begin, min(begin + AT_ONCE, graphs))
    except (KeyError, IndexError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        first_line = f"{type(error).__name__} {error}".splitlines()[0]  # torch's can be 47 lines
        raise BadInput(f"the data set is not laid out as Hu et al.'s: {first_line[:160]}") from None


def cut(data: dict, slices: dict, begin: int, end: int) -> RawGraphs:
    """The graphs from `begin` to before `end` of a collated data set."""

    def values(name, dim=0):
        low = slices[name][begin].item()
        high = slices[name][end].item()
        return data[name].narrow(dim, low, high - low).numpy()

    def lengths(name):
        return slices[name][begin : end + 1].diff().numpy()

    pretrain = values("go_target_pretrain").reshape(end - begin, -1)
    downstream = values("go_target_downstream").reshape(end - begin, -1)
    return RawGraphs(
        sizes=lengths("x"),
        degrees=lengths("edge_index"),
        edges=values("edge_index", 1),
        features=values("edge_attr"),
        centre=values("center_node_idx").reshape(-1),
        species=values("species_id").reshape(-1),
        labels=np.concatenate([pretrain, downstream], 1),
    )


def only_one(found: list, where: str):
    """The one of `found`; BadInput where there are several, of which two are named."""
    if len(found) > 1:
        raise BadInput(f"{where} holds both {found[0]} and {found[1]}: name one with --from")
    return found[0]


def unzip(archive: Path, path: Path) -> Path:
    """Takes the one file that is needed out of the zip, which checks its CRC.

    Raises:
        BadInput: it is no whole zip file, lacks the file, holds two of it, or names one outside
            of its folder.
    """
    try:
        with zipfile.ZipFile(archive) as content:
            names = content.namelist()
            for name in names:
                steps = name.replace("\\", "/").split("/")
                if name.startswith(("/", "\\")) or ".." in steps or ":" in name:
                    raise BadInput(f"{archive} holds {name!r}, which leaves the folder")
            # "unsupervised/processed" holds a file of the same name.
            found = [name for name in names if f"/{name}".endswith(f"/{FILE}")]
            if not found:
                raise BadInput(f"{archive} holds no {FILE}")
            name = only_one(found, str(archive))
            size = content.getinfo(name).file_size
            files.enough_space(path, 5 * size // 4)  # what is prepared from it is small
            with content.open(name) as member, path.open("xb", 0) as file:
                for piece in iter(lambda: member.read(files.PIECE), b""):
                    files.write(file, piece, path, size - file.tell())
    except (
        zipfile.BadZipFile,
        zlib.error,
        OSError,
        EOFError,
        RuntimeError,
        NotImplementedError,
    ) as error:
        reason = "is not a whole zip file that can be read, delete it to fetch it anew"
        raise BadInput(f"{archive} {reason}: {error}") from None
    return path


def is_archive(path: Path) -> bool:
    """Whether a file is an archive to be unpacked, by its name or by what it holds.

    What torch.save writes is a zip file, too: one with a member data.pkl.
    """
    if ZIP.fullmatch(path.name):
        return True
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as content:
            return not any(name.endswith("/data.pkl") for name in content.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, NotImplementedError):
        return False


def find_source(source: Path) -> Path:
    """The zip or the .pt file that a path names or a folder holds.

    Raises:
        BadInput: there is none, or there are two.
    """
    if not source.is_dir():
        if not source.is_file():
            raise BadInput(f"{source} is missing")
        return source
    archives = sorted(
        path for path in source.iterdir() if ARCHIVE.fullmatch(path.name) and path.is_file()
    )
    found = [*archives, *sorted(source.rglob(FILE))]
    if not found:
        raise BadInput(f"{source} holds neither bio_dataset.zip nor {FILE}")
    return only_one(found, str(source))


def prepare(source: Path, folder: Path) -> dict:
    """The benchmark from its zip, its unpacked folder or the file itself, in the prepared layout.

    Raises:
        BadInput: it is missing, or not the benchmark.
    """
    source = find_source(source)
    with files.scratch(folder) as work:
        path = unzip(source, work / "unpacked") if is_archive(source) else source
        data, slices = read_pyg(path)
        try:
            graphs = len(slices["x"]) - 1
            pretrain = len(data["go_target_pretrain"]) // graphs
            downstream = len(data["go_target_downstream"]) // graphs
        except (KeyError, TypeError, ZeroDivisionError) as error:
            reason = f"{type(error).__name__} {error}"
            raise BadInput(f"{source} is not laid out as Hu et al.'s: {reason}") from None
        terms = [f"PT task {i}" for i in range(pretrain)]
        terms += [f"FT task {i}" for i in range(downstream)]
        pieces = published_graphs(data, slices)
        return prepare_graphs(folder, pieces, terms, downstream, source=SOURCE, licence=LICENCE)


def hu_graphs(data: Data = Path("data"), url: Url = None, from_: From = None, check: Check = False):
    """Fetch the graphs of Hu et al., or take them from a zip, a folder or the .pt file.

    No code in them is run.
    """
    files.one_of(url=url, from_=from_, check=check)
    prepared = data / "ppi" / "published"
    if check:
        files.check(prepared, FORMAT)
        return
    source = from_ or data / "ppi" / "bio_dataset.zip"
    with files.locked(prepared, FORMAT) as folder:
        if from_ is None:
            with files.progress(source.name) as advance:
                files.fetch(url or URL, source, None, advance, files.session())
        prepare(source, folder)


if __name__ == "__main__":
    files.run(hu_graphs)
