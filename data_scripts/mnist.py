"""MNIST: fetches the four files of its publishers, or takes them from a folder, as arrays.

    python -m data_scripts.mnist [--data data] [--from FOLDER | --url MIRROR | --check]

Writes DATA/mnist/prepared, format "metapt images 1": train_images [60000, 28, 28] and test_images
[10000, 28, 28], uint8, 0 to 255; train_labels and test_labels, uint8, 0 to 9. What was fetched
stays in DATA/mnist/files.
"""

import gzip
import struct
from pathlib import Path

import numpy as np

from data_scripts import files
from data_scripts.files import BadInput, Check, Data, From, Url

FORMAT = "metapt images 1"
URL = "https://ossci-datasets.s3.amazonaws.com/mnist"
SOURCE = (
    "The MNIST database of handwritten digits (LeCun, Cortes and Burges), "
    "http://yann.lecun.com/exdb/mnist"
)
LICENCE = "CC BY-SA 3.0"
FILES = {  # array: file, its SHA-256
    "train_images": (
        "train-images-idx3-ubyte.gz",
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    ),
    "train_labels": (
        "train-labels-idx1-ubyte.gz",
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    ),
    "test_images": (
        "t10k-images-idx3-ubyte.gz",
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    ),
    "test_labels": (
        "t10k-labels-idx1-ubyte.gz",
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    ),
}


def read_idx(path: Path) -> np.ndarray:
    """A gzip-compressed idx file of unsigned bytes, whose checksum is known to be right."""
    content = gzip.decompress(path.read_bytes())
    dimensions = content[3]
    shape = struct.unpack_from(f">{dimensions}I", content, 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def fetch_mnist(url: str, folder: Path) -> None:
    """The four files from a web server; what is there and verifies stays."""
    for name, sha256 in FILES.values():
        with files.progress(name) as advance:
            location = files.address(url, name)
            files.fetch(location, folder / name, sha256, advance, files.session())


def verify(folder: Path) -> None:
    """Raises BadInput where one of the four files is missing, or not what was published."""
    missing = [name for name, _ in FILES.values() if not (folder / name).is_file()]
    if missing:
        others = "".join(f", and so is {name}" for name in missing[1:])
        raise BadInput(f"{folder / missing[0]} is missing{others}")
    for name, sha256 in FILES.values():
        if files.digest(folder / name) != sha256:
            raise BadInput(f"{folder / name}: its SHA-256 is not {sha256}")


def mnist(data: Data = Path("data"), url: Url = None, from_: From = None, check: Check = False):
    """Fetch MNIST, or take it from a folder.

    Every file is verified, and an interrupted download goes on.
    """
    files.one_of(url=url, from_=from_, check=check)
    prepared = data / "mnist" / "prepared"
    if check:
        files.check(prepared, FORMAT)
        return
    source = from_ or data / "mnist" / "files"
    with files.locked(prepared, FORMAT) as folder:
        if from_ is None:
            fetch_mnist(url or URL, source)
        else:
            verify(source)
        about = {"format": FORMAT, "source": SOURCE, "licence": LICENCE, "classes": 10}
        with files.prepared_folder(folder, about) as append:
            for array, (name, _) in FILES.items():
                append(array, read_idx(source / name))
    print(f"{len(FILES)} files verified, their arrays are in {folder}")


if __name__ == "__main__":
    files.run(mnist)
