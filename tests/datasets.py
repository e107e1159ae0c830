"""Small data sets for the tests, none of them real, and a server of files.

There are files as they are published, and graphs as they are prepared.
"""

import contextlib
import hashlib
import http.server
import json
import math
import re
import sys
import threading
import types
import zlib
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch

from data_scripts import ud
from data_scripts.files import digest, prepared_folder
from data_scripts.graphs import RawGraphs, prepare_graphs
from data_scripts.ptbxl import LEADS

ROOT = Path(__file__).resolve().parents[1]
CODES = (
    "{'NORM': 100.0, 'SR': 0.0}",
    "{'IMI': 80.0, 'NDT': 0.0}",
    "{'LVH': 50.0}",
    "{'IRBBB': 100.0}",
    "{'SR': 0.0}",
)
LABELS = ([1, 0, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 0, 1], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0])


def beat(ecg_id: int) -> np.ndarray:
    """Beats whose rate tells of the label, on all leads; [1000, 12]."""
    random = np.random.default_rng(ecg_id)
    seconds = np.arange(1000)[:, None] / 100
    rate = 1 + 0.3 * (ecg_id % 5)
    waves = np.cos(math.pi * seconds * rate + random.uniform(0, 6)) ** 40
    samples = 1000 * waves * random.uniform(0.2, 1, 12) + random.normal(0, 30, (1000, 12))
    return samples.astype(np.int64)


def write_record(
    folder: Path, name: str, samples: np.ndarray, leads=LEADS, gain=1000.0, baseline=None
) -> None:
    import wfdb  # here, as other tests of a machine without it need none

    n = samples.shape[1]
    wfdb.wrsamp(
        name,
        fs=100,
        units=["mV"] * n,
        sig_name=list(leads),
        d_signal=samples,
        fmt=["16"] * n,
        adc_gain=[gain] * n,
        baseline=baseline or [0] * n,
        write_dir=str(folder),
    )


def write_sums(folder: Path) -> None:
    lines = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "SHA256SUMS.txt":
            sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
            lines.append(f"{sha256}  {path.relative_to(folder).as_posix()}\n")
    (folder / "SHA256SUMS.txt").write_text("".join(lines))


def write_ptbxl(folder: Path, records: int = 60) -> Path:
    """Files in PTB-XL's layout, ten folds, the codes of `CODES` in turn."""
    (folder / "records100" / "00000").mkdir(parents=True)
    rows = []
    for ecg_id in range(1, records + 1):
        write_record(folder / "records100" / "00000", f"{ecg_id:05d}_lr", beat(ecg_id))
        rows.append(
            {
                "ecg_id": ecg_id,
                "patient_id": 1000.0 + ecg_id,
                "scp_codes": CODES[ecg_id % 5],
                "strat_fold": ecg_id // 5 % 10 + 1,
                "filename_lr": f"records100/00000/{ecg_id:05d}_lr",
            }
        )
    pandas.DataFrame(rows).to_csv(folder / "ptbxl_database.csv", index=False)
    statements = [
        ("NORM", 1, "NORM"),
        ("IMI", 1, "MI"),
        ("NDT", 1, "STTC"),
        ("IRBBB", 1, "CD"),
        ("LVH", 1, "HYP"),
        ("SR", "", ""),
    ]
    table = pandas.DataFrame(statements, columns=["", "diagnostic", "diagnostic_class"])
    table.to_csv(folder / "scp_statements.csv", index=False)
    (folder / "LICENSE.txt").write_text("none")
    write_sums(folder)
    return folder


def write_mnist(folder: Path, labels: np.ndarray) -> None:
    """Images of noise, prepared as MNIST is, with these training labels [60000]."""
    random = np.random.default_rng(0)
    about = {"format": "metapt images 1", "source": "", "licence": "", "classes": 10}
    with prepared_folder(folder, about) as append:
        append("train_images", random.integers(0, 256, (60_000, 28, 28), np.uint8))
        append("train_labels", labels.astype(np.uint8))
        append("test_images", random.integers(0, 256, (10_000, 28, 28), np.uint8))
        append("test_labels", np.arange(10_000, dtype=np.uint8) % 10)


def generated(graphs=300, tasks=60, species=(4932,), seed=0) -> RawGraphs:
    """Random ego networks; a protein's number of neighbours tells of its labels."""
    random = np.random.default_rng(seed)
    sizes = random.integers(1, 12, graphs)
    edges = []
    for n in sizes:
        upper = np.triu(random.random((n, n)) < 0.45, 1)
        edges.append(np.stack(np.nonzero(upper | upper.T)))
    degrees = np.array([e.shape[1] for e in edges])
    shuffled = [e[:, random.permutation(e.shape[1])] for e in edges]
    features = (random.random((degrees.sum(), 9)) < 0.3).astype(np.float32)
    features[:, 7] = 0
    labels = (random.random((graphs, tasks)) < 0.15 + 0.5 * (sizes > 6)[:, None]).astype(np.int64)
    of_species = np.array(species)[random.integers(0, len(species), graphs)]
    return RawGraphs(
        sizes,
        degrees,
        np.concatenate(shuffled, 1),
        features,
        random.integers(0, sizes),
        of_species,
        labels,
    )


def write_graphs(folder: Path, finetune_terms: int = 0, **options) -> RawGraphs:
    """`generated(**options)` as prepared graphs in `folder`."""
    raw = generated(**options)
    terms = [f"GO:{i}" for i in range(raw.labels.shape[1])]
    prepare_graphs(folder, [raw], terms, finetune_terms, source="generated", licence="none")
    return raw


class FakeData:
    """Pickles as PyG 1.0's Data does."""


FakeData.__module__ = "torch_geometric.data.data"
FakeData.__qualname__ = "Data"


def write_published(
    path: Path, raw: RawGraphs, new=False, finetune=40, slices=None, **more
) -> None:
    """A file as Hu et al.'s, collated by PyG 1.0.

    It is saved by torch of that time, or (`new`) in today's container.
    """
    count = len(raw.sizes)
    data = FakeData()
    data.x = torch.ones(raw.sizes.sum(), 1)
    data.y = None
    data.pos = None
    data.edge_index = torch.from_numpy(raw.edges)
    data.edge_attr = torch.from_numpy(raw.features)
    data.center_node_idx = torch.from_numpy(raw.centre)
    data.species_id = torch.from_numpy(raw.species)
    pretrain, downstream = np.split(raw.labels, [raw.labels.shape[1] - finetune], axis=1)
    data.go_target_pretrain = torch.from_numpy(pretrain.reshape(-1).copy())
    data.go_target_downstream = torch.from_numpy(downstream.reshape(-1).copy())
    lengths = {
        "x": raw.sizes,
        "edge_index": raw.degrees,
        "edge_attr": raw.degrees,
        "center_node_idx": np.ones(count, int),
        "species_id": np.ones(count, int),
        "go_target_pretrain": np.full(count, pretrain.shape[1]),
        "go_target_downstream": np.full(count, finetune),
    }
    vars(data).update(more)
    ends = {name: torch.from_numpy(np.append(0, n.cumsum())) for name, n in lengths.items()}
    ends |= slices or {}
    fake = types.ModuleType("torch_geometric.data.data")
    fake.Data = FakeData
    # The path of PyG 1.0 leads to FakeData while the file is written.
    with pytest.MonkeyPatch.context() as patch:
        for name in ("torch_geometric", "torch_geometric.data"):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        patch.setitem(sys.modules, "torch_geometric.data.data", fake)
        torch.save((data, ends), path, _use_new_zipfile_serialization=new)


def write_string(folder: Path) -> Path:
    """STRING's and GO's files.

    Three proteins all interact, a fourth does with the first alone, a fifth has no links.
    """
    folder.mkdir()
    links = {(1, 2): (0.9, 0.0), (1, 3): (0.5, 0.2), (2, 3): (0.0, 0.0), (1, 4): (0.1, 0.0)}
    for i, channel in enumerate(("coexpression", "database")):
        lines = []
        for (u, v), scores in links.items():
            lines.append(f"{u}\t{v}\t{scores[i]}\n")
            lines.append(f"{v}\t{u}\t{scores[i]}\n")
        (folder / f"Org1_{channel}_x.txt").write_text("".join(lines))
    (folder / "B_node_dict.txt").write_text(str({f"p{i}": i for i in range(4)}))
    rows = ["#id\tGO:1\tGO:2", "p0\t1\t0", "p1\t0\t1", "p2\t1\t1", "p3\t0\t0", "p4\t1\t1"]
    (folder / "org_1_BP.txt").write_text("\n".join(rows) + "\n")
    return folder


def conllu(sentences) -> str:
    """Sentences, each a list of (form, tag), as CoNLL-U."""
    lines = []
    for number, sentence in enumerate(sentences, 1):
        lines.append(f"# sent_id = {number}\n")
        for place, (form, tag) in enumerate(sentence, 1):
            lines.append(f"{place}\t{form}\t_\t{tag}\t_\t_\t{place - 1}\tdep\t_\t_\n")
        lines.append("\n")
    return "".join(lines)


def write_treebank(folder: Path, code: str, sentences, licence: str | None = "CC BY 4.0") -> Path:
    """A treebank as Universal Dependencies has them, with a training part; `folder` is UD_NAME."""
    folder.mkdir(parents=True)
    (folder / f"{code}-ud-train.conllu").write_text(conllu(sentences), encoding="utf-8")
    if licence:
        (folder / "README.md").write_text(f"# Summary\n\nLicense: {licence}\nGenre: news\n")
    return folder


# Treebanks by name: how many sentences, and how many words each has at least and at most.
TREEBANKS = {
    "Alpha-One": (60, 2, 7),
    "Alpha-Two": (20, 2, 7),
    "Beta-One": (40, 1, 3),
    "Delta-Long": (3, 31, 31),
    "Gamma-One": (25, 6, 9),
    "Omega-One": (12, 3, 4),
}
ENDINGS = {"NOUN": "a", "VERB": "et", "ADJ": "ik", "PUNCT": "."}


def made_up(name: str) -> list[list[tuple[str, str]]]:
    """Sentences whose words end as their part of speech does, in letters of the language's own."""
    count, shortest, longest = TREEBANKS[name]
    random = np.random.default_rng(zlib.crc32(name.encode()))
    letters = list(name.partition("-")[0] + "éß")
    made = []
    for _ in range(count):
        sentence = []
        for _ in range(random.integers(shortest, longest + 1)):
            tag = str(random.choice(list(ENDINGS)))
            stem = "".join(random.choice(letters, random.integers(1, 5)))
            sentence.append((stem + ENDINGS[tag], tag))
        made.append(sentence)
    if name == "Beta-One":
        made[7] = 31 * [("longa", "NOUN")]
    return made


def write_treebanks(folder: Path) -> Path:
    """All of TREEBANKS, as a release has them."""
    for number, name in enumerate(TREEBANKS):
        write_treebank(folder / f"UD_{name}", f"x{number}", made_up(name))
    return folder


def prepare_treebanks(home: Path) -> Path:
    """A folder in which `sources` can run: all of TREEBANKS, prepared.

    Returns:
        Where its prepared data lie, `--data` of the commands.
    """
    write_treebanks(home / "treebanks")
    data = home / "data"
    (data / "ud").mkdir(parents=True)
    ud.prepare(home / "treebanks", data / "ud" / "prepared")
    return data


def load_prepared(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of a prepared folder, as its about.json describes them."""
    arrays = {}
    for name, facts in json.loads((folder / "about.json").read_text())["arrays"].items():
        array = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        assert array.dtype.str == facts["dtype"]
        assert list(array.shape) == facts["shape"]
        assert digest(folder / f"{name}.npy") == facts["sha256"]
        arrays[name] = array
    expected = {"about.json", *(f"{name}.npy" for name in arrays)}
    assert {path.name for path in folder.iterdir()} == expected
    return arrays


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `content` by path.

    `faults` says of a path what goes wrong in turn: a status, "cut", "wrong byte", … or None.
    """

    protocol_version = "HTTP/1.1"
    content = {}
    faults = {}
    asked = []
    connections = set()
    begun = threading.Event()

    def do_GET(self):
        asked = self.headers.get("Range")
        self.asked.append((self.path, asked))
        self.connections.add(self.client_address)
        fault = self.faults[self.path].pop(0) if self.faults.get(self.path) else None
        if isinstance(fault, int) or self.path not in self.content:
            self.send_error(fault or 404)
            return
        content = self.content[self.path]
        if fault == "wrong byte":
            content = b"?" + content[1:]
        if fault == "short":
            content = content[:-10]
        begin = 0
        if asked and fault != "no ranges":
            begin = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
            if begin >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
        if fault == "other range":
            begin = 0
        whole = len(content)
        if fault == "less":
            content = content[: begin + 50]
        length = "many" if fault == "odd length" else str(len(content) - begin)
        self.send_response(206 if asked and fault != "no ranges" else 200)
        self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{whole}")
        self.send_header("Content-Length", length)
        self.end_headers()
        end = begin + len(content) // 3 if fault in ("cut", "hang") else len(content)
        self.wfile.write(content[begin:end])
        self.close_connection = fault in ("cut", "odd length")
        if fault == "hang":
            self.begun.set()
            with contextlib.suppress(OSError):
                self.rfile.read(1)  # until the other end is gone

    def log_message(self, *_):
        pass
