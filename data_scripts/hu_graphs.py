# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy>=2.0,<3", "requests>=2.32,<3", "rich>=13.9,<16", "typer>=0.16,<1"]
# ///
"""The protein graphs of Hu et al., "Strategies for Pre-training Graph Neural Networks", ICLR 2020.

    python data_scripts/hu_graphs.py [--data data] [--from ZIP, FOLDER OR .pt | --url MIRROR | --check]

Writes DATA/ppi/published in the layout of graphs.py. What was fetched stays in DATA/ppi/bio_dataset.zip.
"""

import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import files
import numpy as np
import torch
from files import BadInput, Check, Data, From, Url
from graphs import FORMAT, RawGraphs, prepare_graphs

URL = "http://snap.stanford.edu/gnn-pretrain/data/bio_dataset.zip"
SOURCE = "The biology data set of Hu et al., ICLR 2020, http://snap.stanford.edu/gnn-pretrain"
LICENCE = "not stated; the authors' code is under the MIT licence"
FILE = "supervised/processed/geometric_data_processed.pt"
PARTS = ("edge_index", "edge_attr", "center_node_idx", "species_id", "go_target_pretrain", "go_target_downstream")
AT_ONCE = 4096  # graphs in memory


class PygData:
    """What a PyG 1.0 `Data` object is restored to: its attributes, none of its code."""


def read_pyg(path: Path) -> tuple[dict, dict]:
    """(attributes, slices) of a pickle `(data, slices)` of torch.save, old container or zip, without running its code.

    Raises:
        BadInput: it cannot be read, or it asks for any class or function but PyG's `Data`, which is named.
    """
    others = torch.serialization.get_safe_globals()  # an imported PyG has put its own Data there, under the same name
    torch.serialization.clear_safe_globals()
    try:
        with torch.serialization.safe_globals([(PygData, "torch_geometric.data.data.Data")]):
            data, slices = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # noqa: BLE001 (torch raises half a dozen types for files that are torn or hostile)
        asked = re.search(r"GLOBAL ([\w.]+)|(?:class|function) ([\w.]+\.\w+)", str(error))
        torn = f"it is torn, or no such pickle ({type(error).__name__})"
        # Never torch's own words: they tell how to load it unsafely.
        reason = f"it asks for {asked[1] or asked[2]}" if asked else torn
        raise BadInput(f"{path} is not a data set of Hu et al.: {reason}") from None
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(others)
    if not isinstance(data, PygData) or not isinstance(slices, dict):
        raise BadInput(f"{path} is not a data set of Hu et al.: it is no pair of a Data object and slices")
    return vars(data), slices


def published_graphs(data: dict, slices: dict) -> Iterator[RawGraphs]:
    """The graphs of a collated PyG data set; the centre's number is within its own graph."""
    try:
        lengths = {name: len(slices[name]) for name in ("x", *PARTS)}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"slices of different lengths: {lengths}")
        graphs = lengths["x"] - 1
        for begin in range(0, graphs, AT_ONCE):
            end = min(begin + AT_ONCE, graphs)

            def cut(name, dim=0, begin=begin, end=end):
                low, high = slices[name][begin].item(), slices[name][end].item()
                return data[name].narrow(dim, low, high - low).numpy()

            sizes, degrees = (slices[n][begin : end + 1].diff().numpy() for n in ("x", "edge_index"))
            labels = [cut(f"go_target_{name}").reshape(end - begin, -1) for name in ("pretrain", "downstream")]
            yield RawGraphs(sizes, degrees, cut("edge_index", 1), cut("edge_attr"), cut("center_node_idx").reshape(-1),
                            cut("species_id").reshape(-1), np.concatenate(labels, 1))  # fmt: skip
    except (KeyError, IndexError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        reason = f"{type(error).__name__} {error}".splitlines()[0][:160]  # torch's can be 47 lines
        raise BadInput(f"the data set is not laid out as Hu et al.'s: {reason}") from None


def unzip(archive: Path, path: Path) -> Path:
    """Takes the one file that is needed out of the zip, which checks its CRC.

    Raises:
        BadInput: it is no whole zip file, lacks the file, or names one outside of its folder.
    """
    try:
        with zipfile.ZipFile(archive) as content:
            for name in content.namelist():
                if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/") or ":" in name:
                    raise BadInput(f"{archive} holds {name!r}, which leaves the folder")
            # "unsupervised/processed" holds a file of the same name
            if not (found := [name for name in content.namelist() if f"/{name}".endswith(f"/{FILE}")]):
                raise BadInput(f"{archive} holds no {FILE}")
            size = content.getinfo(found[0]).file_size
            files.enough_space(path, 5 * size // 4)  # what is prepared from it is small
            with content.open(found[0]) as member, path.open("xb", 0) as file:
                while piece := member.read(1 << 20):
                    files.write(file, piece, path, size - file.tell())
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, NotImplementedError) as error:
        reason = f"is not a whole zip file that can be read, delete it to fetch it anew: {error}"
        raise BadInput(f"{archive} {reason}") from None
    return path


def prepare(source: Path, folder: Path) -> dict:
    """The benchmark from its zip, its unpacked folder or the file itself, into the prepared layout.

    Raises:
        BadInput: it is missing, or not the benchmark.
    """
    if source.is_dir():
        found = [*source.glob("bio_dataset.zip"), *sorted(source.rglob(FILE))]
        if not found:
            raise BadInput(f"{source} holds neither bio_dataset.zip nor {FILE}")
        source = found[-1]
    if not source.is_file():
        raise BadInput(f"{source} is missing")
    with files.scratch(folder) as work:
        path = unzip(source, work / "unpacked") if source.suffix == ".zip" else source
        data, slices = read_pyg(path)
        try:
            counts = [len(data[f"go_target_{n}"]) // (len(slices["x"]) - 1) for n in ("pretrain", "downstream")]
        except (KeyError, TypeError, ZeroDivisionError) as error:
            raise BadInput(f"{source} is not laid out as Hu et al.'s: {type(error).__name__} {error}") from None
        terms = [f"{kind} task {i}" for kind, count in zip(("PT", "FT"), counts, strict=True) for i in range(count)]
        graphs = published_graphs(data, slices)
        return prepare_graphs(folder, graphs, terms, counts[1], source=SOURCE, licence=LICENCE)


def hu_graphs(data: Data = Path("data"), url: Url = None, from_: From = None, check: Check = False):
    """Fetch the graphs of Hu et al., or take them from a zip, a folder or the .pt file; no code in them is run."""
    files.one_of(url=url, from_=from_, check=check)
    if check:
        return files.check(data / "ppi" / "published", FORMAT)
    source = from_ or data / "ppi" / "bio_dataset.zip"
    with files.locked(data / "ppi" / "published", FORMAT) as folder:
        if from_ is None:
            with files.progress(source.name) as advance:
                files.fetch(url or URL, source, None, advance, files.session())
        prepare(source, folder)


if __name__ == "__main__":
    files.run(hu_graphs)
