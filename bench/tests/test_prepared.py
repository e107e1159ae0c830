"""Prepared data that were damaged or altered: each command refuses them in one line."""

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import write_graphs, write_mnist, write_ptbxl
from tools import main_in, refused

import metapt
from data_scripts import files, ptbxl

FOLDERS = {"ppi": "ppi/published", "ecg": "ecg/prepared"}
TINY = ["--width=1", "--steps=1", "--warmup=0", "--compare=0"]
# In place of a value: the key is removed.
NONE = object()
NAN = float("nan")
# What about.json must not say, by domain.
ABOUT = {
    "ppi": [
        *((name, -1) for name in ("graphs", "nodes", "edges", "tasks")),
        *((name, "60") for name in ("graphs", "nodes", "edges", "tasks")),
        *((name, 59) for name in ("graphs", "nodes", "edges", "tasks")),
        *((name, None) for name in ("graphs", "nodes", "edges", "tasks")),
        *((name, NONE) for name in ("graphs", "nodes", "edges", "tasks")),
        ("tasks", True),
        ("graphs", 300.0),
        *(("finetune_terms", value) for value in (True, 60, -1, None, NONE)),
        ("terms", NONE),
        ("terms", 3),
        ("terms", ["GO:1"]),
        ("arrays", {}),
        ("arrays", []),
        ("arrays", NONE),
        ("arrays/sizes", 3),
        ("arrays/sizes", NONE),
        ("arrays/more", {}),
        ("arrays/sizes/dtype", "<f4"),
        ("arrays/sums/shape", [10]),
        ("arrays/sums/shape", "x"),
        ("format", "x"),
        ("format", NONE),
    ],
    "ecg": [
        ("hertz", 0),
        ("hertz", "100"),
        ("hertz", NONE),
        ("leads", 12),
        ("leads", []),
        ("leads", list(range(12))),
        ("leads", ["I"] * 12),
        ("classes", 5),
        ("records", 19),
        ("samples", 999),
        ("arrays/gain/shape", [20, 11]),
    ],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Prepared data of `ppi` and `ecg`, by the scripts themselves; not to be changed."""
    folder = tmp_path_factory.mktemp("data")
    write_graphs(folder / "data" / "ppi" / "published", 40)
    source = write_ptbxl(folder / "ptbxl", 20)
    ptbxl.prepare(source, folder / "data" / "ecg" / "prepared")
    return folder / "data"


@pytest.fixture
def prepared(data, tmp_path):
    """Copies the prepared data of a domain, and gives their folder."""
    return lambda name: Path(
        shutil.copytree(data / FOLDERS[name], tmp_path / "data" / FOLDERS[name])
    )


def named(part) -> str:
    return "none" if part is NONE else repr(part)[:20]


def altered(content, path: str, value) -> None:
    *parents, last = path.split("/")
    for key in parents:
        content = content[key]
    if value is NONE:
        del content[last]
    else:
        content[last] = value


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [(name, *each) for name in ABOUT for each in ABOUT[name]],
    ids=named,
)
def test_an_altered_about_is_refused(name, path, value, prepared, tmp_path):
    folder = prepared(name)
    about = json.loads((folder / "about.json").read_text())
    altered(about, path, value)
    (folder / "about.json").write_text(json.dumps(about))
    message = refused(tmp_path, "meta", name, *TINY, "--out=run")
    assert FOLDERS[name] in message
    assert f"metapt.py download {name}" in message
    assert not (tmp_path / "run").exists()


JSON = [b"", b"{", b"[]", b"3", b"null", b'"x"', b"[" * 200_000, b"\xff\xfe", b"\0" * 99]


@pytest.mark.parametrize("content", JSON, ids=lambda content: repr(content)[:12])
def test_an_about_that_is_something_else_is_refused(content, prepared, tmp_path):
    (prepared("ppi") / "about.json").write_bytes(content)
    assert "about.json is not what" in refused(tmp_path, "meta", "ppi")


@pytest.mark.parametrize(
    ("name", "array", "value"),
    [
        ("ecg", "labels", 2),
        ("ecg", "gain", 1e-30),
        ("ecg", "gain", NAN),
        ("ecg", "baseline", 1e20),
        ("ecg", "fold", -1),
        ("ecg", "sums", NAN),
        ("ppi", "centre", 99),
        ("ppi", "centre", -1),
        ("ppi", "sizes", 0),
        ("ppi", "degrees", -1),
        ("ppi", "source", 65_535),
        ("ppi", "sums", 77),
    ],
)
def test_arrays_with_a_value_that_cannot_be_are_refused(name, array, value, prepared, tmp_path):
    values = np.load(prepared(name) / f"{array}.npy", mmap_mode="r+")
    values[:] = value
    assert array in refused(tmp_path, "meta", name, *TINY)


def test_an_edge_from_another_graph_is_refused_when_it_is_read(prepared, tmp_path):
    folder = prepared("ppi")
    sizes = np.load(folder / "sizes.npy")
    degrees = np.load(folder / "degrees.npy")
    graph = np.flatnonzero(degrees)[0]
    source = np.load(folder / "source.npy", mmap_mode="r+")
    source[degrees[:graph].sum()] = sizes[graph]
    kind = metapt.find_domain("ppi")
    domain = kind(kind.Settings(), torch.device("cpu"), tmp_path / "data")
    with pytest.raises(metapt.BadInput, match="source.npy and sums.npy do not fit"):
        domain.graphs.batch(torch.tensor([graph, graph + 1]))


def test_a_run_goes_on_only_with_leads_classes_and_rate_as_they_were(prepared, tmp_path):
    about = prepared("ecg") / "about.json"
    given = [*TINY, "--test-folds=1", "--out=run", "--batch-size=4", "--meta-batch-size=4"]
    assert main_in(tmp_path, "meta", "ecg", *given)[0] == 0
    content = json.loads(about.read_text())
    turned = [*content["classes"][1:], content["classes"][0]]
    for change in ({"leads": content["leads"][::-1]}, {"classes": turned}, {"hertz": 50}):
        about.write_text(json.dumps(content | change))
        for command in (["meta", "--resume=run"], ["finetune", "run", "--compare=1"]):
            assert "run was trained on other data" in refused(tmp_path, *command)
    about.write_text(json.dumps(content))
    assert main_in(tmp_path, "meta", "--resume=run")[0] == 0


@pytest.mark.parametrize("kind", ["alike", "no 0", "one 0", "a 10"])
def test_labels_of_mnist_that_cannot_be_are_refused(kind, tmp_path):
    labels = np.arange(60_000) % 10
    if kind == "alike":
        labels = 0 * labels
    elif kind == "a 10":
        labels = labels + 1
    else:
        labels = np.maximum(labels, 1)
        labels[0] = 0 if kind == "one 0" else 1
    write_mnist(tmp_path / "data" / "mnist" / "prepared", labels)
    message = refused(tmp_path, "meta", "mnist-rotation", "--steps=16", "--compare=0")
    assert "the labels are not 100 or more of each digit" in message


def test_out_of_memory_is_not_called_bad_data(prepared, tmp_path, monkeypatch):
    def exhausted(*_, **options):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    prepared("ppi")
    monkeypatch.setattr(np, "load", exhausted)
    code, _, err = main_in(tmp_path, "meta", "ppi", "--width=1")
    assert (code, err) == (1, "metapt: [Errno 12] Cannot allocate memory\n")


def test_a_folder_beside_prepared_data_is_removed_only_where_a_script_left_it(tmp_path):
    for name in ("x1/new", "x2/old", "notes/new", "empty"):
        (tmp_path / f".prepared-metapt-{name}").mkdir(parents=True)
    notes = tmp_path / ".prepared-metapt-notes" / "mine.txt"
    notes.write_text("precious")
    (tmp_path / ".prepared-metapt-mine").write_text("precious")
    (tmp_path / "elsewhere" / "new").mkdir(parents=True)
    (tmp_path / ".prepared-metapt-link").symlink_to("elsewhere")
    with files.locked(tmp_path / "prepared", "x"):
        names = set(os.listdir(tmp_path)) - {".prepared.lock"}
    left = {name.removeprefix(".prepared-metapt-") for name in names}
    assert left == {"notes", "mine", "link", "elsewhere", "prepared"}
    assert notes.read_text() == "precious"
