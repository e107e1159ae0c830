"""The PPI domain: graphs in flat arrays, the published format, the GIN beside a plain one, the domain and its commands."""

import contextlib
import gzip
import http.server
import itertools
import os
import pickle
import shutil
import subprocess
import sys
import threading
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from test_metapt import Server, main_in, options, refused, summary_of
from torch import nn

import metapt
from bench.plain_gin import PlainGIN, plain_batch

ROOT = Path(metapt.__file__).resolve().parent
YEAST = ROOT.parent / "shared" / "data" / "ppi" / "string-yeast"
TINY = {"width": 8, "layers": 2, "steps": 24, "warmup": 4, "meta_every": 4, "compare": 1, "finetune_steps": 20,
        "checkpoint_every": 2, "meta_lr": 0.1, "batch_size": 16, "meta_batch_size": 16}  # fmt: skip


def generated(graphs=300, tasks=60, species=(4932,), seed=0) -> metapt.RawGraphs:
    """Random ego networks, not real; a protein's number of neighbours tells of its labels."""
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
    return metapt.RawGraphs(
        sizes, degrees, np.concatenate(shuffled, 1), features, random.integers(0, sizes), of_species, labels
    )


def prepared(folder: Path, finetune_terms=0, **options) -> metapt.RawGraphs:
    raw = generated(**options)
    terms = [f"GO:{i}" for i in range(raw.labels.shape[1])]
    metapt.prepare_graphs(folder, [raw], terms, finetune_terms)
    return raw


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder in which `ppi` can run, on generated graphs of one species."""
    folder = tmp_path_factory.mktemp("home")
    prepared(folder / "data" / "ppi" / "string-yeast")
    return folder


def domain(home: Path, **given) -> metapt.PPI:
    settings = metapt.settings_of("ppi", {**TINY, **given})
    return metapt.make_domain("ppi", settings, torch.device("cpu"), home / "data")


def edges_of(raw: metapt.RawGraphs, graph: int):
    low, high = raw.degrees[:graph].sum(), raw.degrees[: graph + 1].sum()
    return raw.edges[:, low:high], raw.features[low:high]


# Flat arrays.


def test_a_batch_is_the_same_graphs_as_the_source(tmp_path):
    raw = prepared(tmp_path / "g")
    graphs = metapt.Graphs(tmp_path / "g", torch.device("cpu"))
    index = torch.tensor([7, 250, 7, 0, 31])
    batch = graphs.batch(index)
    before = 0
    ends = [*batch.start.tolist()[1:], len(batch.source)]
    for i, graph in enumerate(index.tolist()):
        edges, features = edges_of(raw, graph)
        assert batch.size[i] == raw.sizes[graph]
        assert batch.centre[i] == before + raw.centre[graph]
        for node in range(raw.sizes[graph]):
            into = edges[1] == node
            n = before + node
            assert batch.graph[n] == i
            found = batch.source[batch.start[n] : ends[n]] - before
            assert sorted(found.tolist()) == sorted(edges[0, into].tolist())
            wanted = features[into].sum(0) + np.eye(9)[7]
            np.testing.assert_allclose(batch.sums[n, :9], wanted)
            assert batch.sums[n, 9] == into.sum() + 1
        before += raw.sizes[graph]
    assert len(batch.graph) == before
    np.testing.assert_array_equal(graphs.labels(index).numpy(), raw.labels[index.numpy()])


def test_preparing_in_pieces_gives_the_same_bytes(tmp_path):
    raw = prepared(tmp_path / "whole")
    cuts = [0, 1, 100, 300]
    pieces = []
    for low, high in itertools.pairwise(cuts):
        e = slice(raw.degrees[:low].sum(), raw.degrees[:high].sum())
        pieces.append(
            metapt.RawGraphs(
                *(a[low:high] for a in raw[:2]), raw.edges[:, e], raw.features[e], *(a[low:high] for a in raw[4:])
            )
        )
    metapt.prepare_graphs(tmp_path / "pieces", pieces, [f"GO:{i}" for i in range(60)], 0)
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert len(names) == 8
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "pieces" / name).read_bytes()


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda raw: raw.centre.__setitem__(5, 99), "graph 5: its centre"),
        (lambda raw: raw.labels.__setitem__((9, 3), 2), "graph 9: a label"),
        (lambda raw: raw.edges.__setitem__((0, 0), 77), "an edge leaves the graph"),
        (lambda raw: raw.features.__setitem__((0, 0), np.nan), "an edge feature is not finite"),
        (lambda raw: raw.sizes.__setitem__(4, 0), "graph 4: it has no nodes"),
    ],
)
def test_a_graph_that_cannot_be_is_refused_by_number(tmp_path, spoil, says):
    raw = generated()
    spoil(raw)
    with pytest.raises(metapt.BadInput, match=says):
        metapt.prepare_graphs(tmp_path / "g", [raw], [f"GO:{i}" for i in range(60)], 0)
    assert not (tmp_path / "g").exists()


def test_an_edge_without_its_counterpart_is_refused(tmp_path):
    raw = generated()
    last = np.flatnonzero(raw.degrees)[-1]
    degrees = raw.degrees.copy()
    degrees[last] -= 1
    end = raw.degrees[: last + 1].sum() - 1
    raw = raw._replace(degrees=degrees, edges=raw.edges[:, :end], features=raw.features[:end])
    with pytest.raises(metapt.BadInput, match=f"graph {last}: an edge has no counterpart"):
        metapt.prepare_graphs(tmp_path / "g", [raw], [f"GO:{i}" for i in range(60)], 0)


# The encoder.


@pytest.mark.parametrize("layers", [1, 3])
def test_gin_equals_edgewise_messages(tmp_path, layers):
    """Outputs, gradients of every parameter, BatchNorm's statistics, second derivatives: beside PyG's MessagePassing."""
    raw = prepared(tmp_path / "g")
    index = torch.tensor([3, 8, 120, 299, 41, 77])
    batch = metapt.Graphs(tmp_path / "g", torch.device("cpu")).batch(index)
    torch.manual_seed(0)
    fast = metapt.GIN(6, layers, 0.0).double()
    plain = PlainGIN(fast)
    data = plain_batch(raw, index.numpy())
    for train in (True, True, False):
        fast.train(train), plain.train(train)
        a, b = fast(batch), plain(data)
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
        for x, y in zip(fast.buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)
    direction = torch.randn_like(a)
    curvature = []
    for module, inputs in ((fast, batch), (plain, data)):
        module.train()
        parameters = plain.in_order_of(fast) if module is plain else list(fast.parameters())
        value = (module(inputs) * direction).pow(2).sum()
        gradient = torch.autograd.grad(value, parameters, create_graph=True)
        torch.manual_seed(1)
        product = sum((g * torch.randn_like(g)).sum() for g in gradient)
        curvature.append((gradient, torch.autograd.grad(product, parameters)))
    for first, second in zip(*curvature, strict=True):
        for x, y in zip(first, second, strict=True):
            scale = y.abs().max().item()
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-10 * max(1.0, scale))


def saved_bytes(work) -> int:
    """Bytes of all tensors kept for backward, each storage once."""
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        value = work()
    total = sum(storage.nbytes() for storage in kept.values())
    value.backward()
    return total


def test_gin_keeps_fewer_bytes_for_backward(tmp_path):
    """At the published averages: 40 nodes and 730 directed edges a graph."""
    random = np.random.default_rng(0)
    upper = [np.triu(random.random((40, 40)) < 0.468, 1) for _ in range(8)]
    edges = [np.stack(np.nonzero(u | u.T)) for u in upper]
    degrees = np.array([e.shape[1] for e in edges])
    raw = metapt.RawGraphs(
        np.full(8, 40), degrees, np.concatenate(edges, 1),
        (random.random((degrees.sum(), 9)) < 0.3).astype(np.float32), np.zeros(8, int), np.full(8, 9606),
        np.zeros((8, 8), int),
    )  # fmt: skip
    metapt.prepare_graphs(tmp_path / "g", [raw], list("abcdefgh"), 0)
    batch = metapt.Graphs(tmp_path / "g", torch.device("cpu")).batch(torch.arange(8))
    fast = metapt.GIN(60, 5, 0.0)
    plain, data = PlainGIN(fast), plain_batch(raw, np.arange(8), torch.float32)
    ours, theirs = saved_bytes(lambda: fast(batch).sum()), saved_bytes(lambda: plain(data).sum())
    assert 1.6 * ours < theirs, (ours, theirs)


# The published format.


class FakeData:
    """Pickles as PyG 1.0's Data does."""


FakeData.__module__, FakeData.__qualname__ = "torch_geometric.data.data", "Data"


@contextlib.contextmanager
def pyg_1():
    """The module path of PyG 1.0 leads to FakeData while a file is written."""
    fake = types.ModuleType("torch_geometric.data.data")
    fake.Data = FakeData
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "torch_geometric"}
    for name in before:
        del sys.modules[name]
    packages = {"torch_geometric": types.ModuleType("torch_geometric")}
    packages["torch_geometric.data"] = types.ModuleType("torch_geometric.data")
    sys.modules.update({**packages, "torch_geometric.data.data": fake})
    try:
        yield
    finally:
        for name in [n for n in sys.modules if n.split(".")[0] == "torch_geometric"]:
            del sys.modules[name]
        sys.modules.update(before)


def published(path: Path, raw: metapt.RawGraphs, new: bool, finetune=40, slices=None, **more) -> None:
    """A file as Hu et al.'s: collated by PyG 1.0 and saved by torch of that time, or in today's container."""
    spoiled = slices or {}
    graphs = len(raw.sizes)
    data = FakeData()
    data.x, data.y, data.pos = torch.ones(raw.sizes.sum(), 1), None, None
    data.edge_index, data.edge_attr = torch.from_numpy(raw.edges), torch.from_numpy(raw.features)
    data.center_node_idx, data.species_id = torch.from_numpy(raw.centre), torch.from_numpy(raw.species)
    pretrain, downstream = np.split(raw.labels, [raw.labels.shape[1] - finetune], axis=1)
    data.go_target_pretrain = torch.from_numpy(pretrain.reshape(-1).copy())
    data.go_target_downstream = torch.from_numpy(downstream.reshape(-1).copy())
    ends = {"x": raw.sizes, "edge_index": raw.degrees, "edge_attr": raw.degrees,
            "center_node_idx": np.ones(graphs, int), "species_id": np.ones(graphs, int),
            "go_target_pretrain": np.full(graphs, pretrain.shape[1]),
            "go_target_downstream": np.full(graphs, finetune)}  # fmt: skip
    slices = {name: torch.from_numpy(np.concatenate([[0], n.cumsum()])) for name, n in ends.items()}
    vars(data).update(more)
    slices.update(spoiled)
    with pyg_1():
        torch.save((data, slices), path, _use_new_zipfile_serialization=new)


SEVERAL = {"species": (9606, 4932, 10090), "tasks": 60}


@pytest.mark.parametrize("new", [False, True])
def test_the_published_file_is_read_in_both_containers(tmp_path, new):
    raw = generated(**SEVERAL)
    published(tmp_path / "file.pt", raw, new)
    assert zipfile.is_zipfile(tmp_path / "file.pt") == new
    import torch_geometric  # noqa: F401 (it allows torch its own class of that name, which must not come first)

    allowed = torch.serialization.get_safe_globals()
    about = metapt.prepare_published(tmp_path / "file.pt", tmp_path / "g")
    assert set(torch.serialization.get_safe_globals()) == set(allowed)
    prepared(tmp_path / "direct", 40, **SEVERAL)
    assert (about["graphs"], about["tasks"], about["finetune_terms"]) == (300, 60, 40)
    for name in metapt.PPI_ARRAYS:
        assert (tmp_path / "g" / f"{name}.bin").read_bytes() == (tmp_path / "direct" / f"{name}.bin").read_bytes()


class Hostile:
    def __reduce__(self):
        return os.system, ("echo harm",)


@pytest.mark.parametrize("new", [False, True])
def test_a_pickle_that_asks_for_anything_else_is_refused_by_name(tmp_path, new):
    published(tmp_path / "file.pt", generated(), new, extra=Hostile())
    with pytest.raises(metapt.BadInput, match=r"file.pt .*it asks for (posix|os|nt).system"):
        metapt.read_pyg(tmp_path / "file.pt")
    for builtin in (eval, getattr):
        published(tmp_path / "file.pt", generated(), new, extra=builtin)
        with pytest.raises(metapt.BadInput, match=f"it asks for {builtin.__name__}$"):
            metapt.read_pyg(tmp_path / "file.pt")
    published(tmp_path / "file.pt", generated(), new, extra=Path("x"))
    with pytest.raises(metapt.BadInput, match=r"it asks for pathlib\S*Path"):
        metapt.read_pyg(tmp_path / "file.pt")


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "file.pt"
    for content in (b"", b"no pickle", pickle.dumps([1])):
        path.write_bytes(content)
        with pytest.raises(metapt.BadInput, match=r"file.pt"):
            metapt.read_pyg(path)
    torch.save([1, 2], path)
    with pytest.raises(metapt.BadInput, match="no pair"):
        metapt.read_pyg(path)
    published(path, generated(), True)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(metapt.BadInput, match=r"file.pt"):
        metapt.read_pyg(path)


@pytest.mark.parametrize(
    ("more", "slices"),
    [
        ({"edge_attr": torch.zeros(3, 9)}, {}),
        ({"edge_attr": torch.zeros(5788)}, {}),
        ({"edge_index": torch.zeros(2, 5788)}, {}),
        ({"edge_index": torch.zeros(3, 5788, dtype=torch.long)}, {}),
        ({"center_node_idx": torch.full((300,), 0.5)}, {}),
        ({"species_id": torch.full((300,), 2**40)}, {}),
        ({"species_id": torch.full((300,), torch.nan)}, {}),
        ({"edge_attr": torch.full((5788, 9), torch.nan)}, {}),
        ({}, {"x": torch.arange(10)}),
        ({}, {"x": torch.arange(301).float()}),
        ({}, {"x": torch.zeros(301, 2, dtype=torch.long)}),
        ({}, {"edge_index": torch.arange(300)}),
        ({}, {"edge_index": torch.arange(301).flip(0)}),
        ({}, {name: torch.zeros(1, dtype=torch.long) for name in ("x", *metapt.PYG_PARTS)}),
        ({}, {"species_id": None}),
    ],
)
def test_a_published_file_of_wrong_shapes_is_refused_and_the_good_one_stays(tmp_path, more, slices):
    good = prepared(tmp_path / "g")
    assert good.degrees.sum() == 5788
    before = (tmp_path / "g" / "sums.bin").read_bytes()
    published(tmp_path / "file.pt", good, True, slices=slices, **more)
    with pytest.raises(metapt.BadInput):
        metapt.prepare_published(tmp_path / "file.pt", tmp_path / "g")
    assert (tmp_path / "g" / "sums.bin").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.pt", "g"]


def archive(path: Path, members: dict) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name, content)


@pytest.fixture(scope="module")
def benchmark_zip(tmp_path_factory):
    """bio_dataset.zip in small, and its bytes."""
    folder = tmp_path_factory.mktemp("zip")
    published(folder / "file.pt", generated(**SEVERAL), False)
    member = f"dataset/{metapt.PPI_FILE}"
    archive(folder / "bio_dataset.zip", {"dataset/un" + metapt.PPI_FILE: b"0" * 999, member: (folder / "file.pt").read_bytes()})  # fmt: skip
    return folder / "bio_dataset.zip"


def test_download_from_the_network_goes_on_and_ends_in_a_domain(benchmark_zip, tmp_path, monkeypatch):
    monkeypatch.setattr(Server, "CONTENT", benchmark_zip.read_bytes())
    monkeypatch.setattr(metapt.time, "sleep", lambda seconds: None)
    Server.faults, Server.ranges, Server.sent = ["cut"], [], []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        code, _, err = main_in(
            tmp_path, "download", "ppi", "--url", f"http://127.0.0.1:{running.server_port}/bio_dataset.zip"
        )
        running.shutdown()
    assert code == 0, err
    assert sorted(p.name for p in (tmp_path / "data" / "ppi").iterdir()) == ["bio_dataset.zip", "published"]
    settings = metapt.settings_of("ppi", TINY)
    made = metapt.make_domain("ppi", settings, torch.device("cpu"), tmp_path / "data")
    assert len(made.pretrain_tasks) == 20
    assert made.finetune_tasks.min() == 20


def test_an_interrupted_download_asks_for_the_rest_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(metapt.time, "sleep", lambda seconds: None)
    Server.faults, Server.ranges, Server.sent = ["cut"], [], []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        metapt.fetch(f"http://127.0.0.1:{running.server_port}/x", tmp_path / "x", None, lambda done, total: None)
        running.shutdown()
    assert Server.ranges == [None, "bytes=100000-"]
    assert (tmp_path / "x").read_bytes() == Server.CONTENT


def test_bad_archives_are_refused(benchmark_zip, tmp_path, monkeypatch):
    path, content = tmp_path / "bio_dataset.zip", benchmark_zip.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    for bad, says in (
        (bytes(flipped), "not a whole zip"),
        (content[:-30], "not a whole zip"),
        (b"", "not a whole zip"),
    ):
        path.write_bytes(bad)
        assert says in refused(tmp_path, "download", "ppi", "--from", path)
    for name in ("../evil", "/etc/evil", "a/../../evil", "..\\evil", "C:\\evil"):
        archive(path, {metapt.PPI_FILE: b"x", name: b"x"})
        assert "leaves the folder" in refused(tmp_path, "download", "ppi", "--from", path)
    locked = bytearray(content)
    for signature, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # the flags of each member: encrypted
        at = -1
        while (at := locked.find(signature, at + 1)) >= 0:
            locked[at + place] |= 1
    path.write_bytes(bytes(locked))
    assert "encrypted" in refused(tmp_path, "download", "ppi", "--from", path)
    archive(path, {"other": b"x"})
    assert "holds no supervised" in refused(tmp_path, "download", "ppi", "--from", path)
    path.write_bytes(content)
    monkeypatch.setattr(metapt.shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=1000))
    assert "GB are free" in refused(tmp_path, "download", "ppi", "--from", path)
    assert "missing" in refused(tmp_path, "download", "ppi", "--from", tmp_path / "none")
    assert not (tmp_path / "data" / "ppi" / "published").exists()
    assert not list((tmp_path / "data" / "ppi").iterdir())
    assert "two places" in refused(tmp_path, "download", "ppi", "--from", path, "--url", "http://127.0.0.1:1")


def test_a_file_of_the_users_own_stays(benchmark_zip, tmp_path):
    own = tmp_path / "data" / "ppi" / "geometric_data_processed.pt"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"mine")
    code, _, err = main_in(tmp_path, "download", "ppi", "--from", benchmark_zip)
    assert code == 0, err
    assert own.read_bytes() == b"mine"
    assert sorted(path.name for path in own.parent.iterdir()) == [own.name, "published"]


# STRING and GO.


def string_files(folder: Path) -> None:
    """Three proteins that all interact, a fourth with the first alone, a fifth without links."""
    folder.mkdir()
    links = {(1, 2): (0.9, 0.0), (1, 3): (0.5, 0.2), (2, 3): (0.0, 0.0), (1, 4): (0.1, 0.0)}
    for i, channel in enumerate(("coexpression", "database")):
        lines = [f"{a}\t{b}\t{s[i]}\n" for (u, v), s in links.items() for a, b in ((u, v), (v, u))]
        (folder / f"Org1_{channel}_x.txt").write_text("".join(lines))
    (folder / "B_node_dict.txt").write_text(str({f"p{i}": i for i in range(4)}))
    rows = ["#id\tGO:1\tGO:2", "p0\t1\t0", "p1\t0\t1", "p2\t1\t1", "p3\t0\t0", "p4\t1\t1"]
    (folder / "org_1_BP.txt").write_text("\n".join(rows) + "\n")


def test_ego_networks_by_hand(tmp_path):
    string_files(tmp_path / "s")
    about = metapt.prepare_string(tmp_path / "s", tmp_path / "g", cap=3)
    assert (about["graphs"], about["terms"]) == (4, ["GO:1", "GO:2"])
    graphs = metapt.Graphs(tmp_path / "g", torch.device("cpu"))
    assert graphs.sizes.tolist() == [3, 3, 3, 2]  # the first has 3 neighbours, of which the weakest gives way
    assert graphs.degrees.tolist() == [6, 6, 6, 2]
    assert graphs.labels(torch.arange(4)).tolist() == [[1, 0], [0, 1], [1, 1], [0, 0]]
    batch = graphs.batch(torch.tensor([0]))
    coexpression, database = 3, 5
    assert batch.centre.tolist() == [0]
    assert batch.sums[:, coexpression].tolist() == [2, 1, 1]
    assert batch.sums[:, database].tolist() == [1, 0, 1]
    assert batch.sums[:, 7].tolist() == [1, 1, 1]
    assert batch.sums[:, 9].tolist() == [3, 3, 3]
    assert batch.sums[:, 6].sum() == 0  # no text mining


def test_bad_string_files_are_named(tmp_path):
    assert "holds no" in refused(tmp_path, "download", "ppi", "--source", "string-yeast", "--from", tmp_path)
    string_files(tmp_path / "s")
    for name, content in (("Org1_database_x.txt", "1 9 0.5\n9 1 0.5\n"), ("B_node_dict.txt", "{'p0': "),
                          ("B_node_dict.txt", "[1, 2]"), ("B_node_dict.txt", "{'p0': 0, 'p1': 0}"),
                          ("B_node_dict.txt", "{'p0': 10**12}"), ("B_node_dict.txt", "{'p0': 10000000000000}"),
                          ("Org1_database_x.txt", "1 2 nan\n2 1 nan\n"), ("Org1_database_x.txt", "1 1.5 1\n"),
                          ("org_1_BP.txt", "#id\tGO:1\np0\tmany\n"), ("org_1_BP.txt", "#id\tGO:1\np0\t256\n"),
                          ("org_1_BP.txt", "#id\tGO:1\np0\t-1\n")):  # fmt: skip
        before = (tmp_path / "s" / name).read_text()
        (tmp_path / "s" / name).write_text(content)
        assert name in refused(tmp_path, "download", "ppi", "--source", "string-yeast", "--from", tmp_path / "s")
        (tmp_path / "s" / name).write_text(before)
    (tmp_path / "s" / "org_1_MF.txt.gz").write_bytes(gzip.compress(b"#id\tGO:1\n" * 99)[:-20] + b"torn" * 9)
    assert "org_1_MF" in refused(tmp_path, "download", "ppi", "--source", "string-yeast", "--from", tmp_path / "s")
    with pytest.raises(metapt.BadInput, match="--cap is 1"):
        metapt.prepare_string(tmp_path / "s", tmp_path / "g", cap=1)
    assert "--from" in refused(tmp_path, "download", "ppi", "--source", "string-yeast")
    assert "belongs to ppi" in refused(tmp_path, "download", "mnist", "--source", "string-yeast")
    assert "belongs to ppi" in refused(tmp_path, "download", "ppi", "--source", "fly")


@pytest.mark.skipif(not YEAST.exists(), reason="needs ../shared/data/ppi/string-yeast")
def test_yeast_counts_are_those_of_its_readme(tmp_path):
    about = metapt.prepare_string(YEAST, tmp_path / "g", cap=10_000)
    assert (about["graphs"], about["tasks"]) == (4900, 980)
    graphs = metapt.Graphs(tmp_path / "g", torch.device("cpu"))
    assert (graphs.sizes - 1).sum() == 2 * 63_309
    original = np.load(YEAST / "yeast_string_go.npz", allow_pickle=False)
    inside = original["in_network"]
    labels = {t: c for n in original.files if n.startswith("go_") and not n.endswith("terms")
              for t, c in zip(original[f"{n}_terms"], original[n][inside].T, strict=True)}  # fmt: skip
    ours = graphs.labels(torch.arange(4900)).numpy()
    for i, term in enumerate(about["terms"]):
        assert (ours[:, i] == labels[term]).all()
    u, v = original["edge_index"]
    order = np.flatnonzero(inside)
    for channel in range(6):
        linked = original["edge_score"][:, channel] > 0
        degree = np.bincount(np.concatenate([u[linked], v[linked]]), minlength=len(inside))[order]
        centre = graphs.sums[graphs.first_node + graphs.centre][:, channel]
        np.testing.assert_array_equal(centre.numpy(), degree)


# The domain.


@pytest.mark.parametrize("species", [(4932,), (9606, 4932, 10090)])
def test_splits(tmp_path, species):
    prepared(tmp_path / "data" / "ppi" / "published", 40, species=species)
    a, b, c = (domain(tmp_path, seed=seed) for seed in (0, 0, 1))
    rows = {part: set(r.tolist()) for part, r in a.rows.items()}
    assert all((a.rows[part] == b.rows[part]).all() for part in rows)
    assert set(c.rows["finetune"].tolist()) != rows["finetune"]
    assert rows["pretrain"] == rows["finetune"] | rows["validation"] | rows["broad"]
    assert sum(len(rows[p]) for p in ("finetune", "validation", "broad", "test")) == 300
    assert rows["pretrain"] | rows["test"] == set(range(300))
    assert not rows["pretrain"] & rows["test"]
    assert abs(len(rows["validation"]) / (len(rows["validation"]) + len(rows["finetune"])) - 0.15) < 0.01
    if len(species) > 1:
        human = set((a.graphs.species == 9606).nonzero()[:, 0].tolist())
        assert rows["test"] | rows["broad"] == human
        assert abs(len(rows["test"]) - len(rows["broad"])) <= 1
        assert a.finetune_tasks.min() == 20


def test_finetuning_terms_are_drawn_among_those_with_sixty_positives(tmp_path):
    labels = np.random.default_rng(0).random((300, 90)) < 0.4
    rare = np.arange(0, 90, 2)
    labels[:, rare] &= np.arange(300)[:, None] < 100  # fewer than 60
    raw = generated(tasks=90)._replace(labels=labels.astype(np.int64))
    metapt.prepare_graphs(tmp_path / "data" / "ppi" / "string-yeast", [raw], [str(i) for i in range(90)], 0)
    enough = np.flatnonzero(labels.sum(0) >= 60)
    assert 40 <= len(enough) <= 50
    for seed in range(3):
        made = domain(tmp_path, seed=seed)
        assert set(made.finetune_tasks.tolist()) <= set(enough.tolist())
        assert set(made.pretrain_tasks.tolist()) | set(made.finetune_tasks.tolist()) == set(range(90))


def test_the_test_part_is_stratified_by_the_rarest_finetuning_term(tmp_path):
    random = np.random.default_rng(0)
    rarest = random.permutation(np.repeat(np.arange(40), 60))  # each protein has one FT term
    labels = np.concatenate([random.random((2400, 20)) < 0.9, np.eye(40, dtype=bool)[rarest]], 1)
    raw = generated(graphs=2400)._replace(labels=labels.astype(np.int64))
    metapt.prepare_graphs(tmp_path / "data" / "ppi" / "published", [raw], [str(i) for i in range(60)], 40)
    made = domain(tmp_path)
    counts = made.graphs.labels(made.rows["test"], made.finetune_tasks).sum(0)
    assert (counts - 9).abs().max() <= 1  # 60 of each, 30 % for test, half of these unseen


def test_cotrain_adds_the_mean_over_known_labels(home):
    made = domain(home, method="cotrain", dropout=0.0)
    torch.manual_seed(0)
    network, meta = made.network(), made.meta()
    index = torch.arange(40)
    value = both_gradients(made, network, meta, index)[0]
    rows = made.rows["pretrain"][index]
    known = torch.isin(rows, made.rows["finetune"])
    assert 0 < known.sum() < 40
    outputs = network.train()(made.inputs("pretrain", index))
    tasks = len(made.pretrain_tasks)
    entropy = nn.functional.binary_cross_entropy_with_logits
    wanted = entropy(outputs[:, :tasks], made.graphs.labels(rows, made.pretrain_tasks))
    wanted = wanted + entropy(outputs[known, tasks:], made.graphs.labels(rows[known], made.finetune_tasks))
    torch.testing.assert_close(value, wanted)


def test_agnostic_validates_on_the_tasks_that_the_episode_left_out(home):
    made = domain(home, select=8, agnostic=True)
    torch.manual_seed(0)
    network, head, meta = made.network(), made.head(), made.meta()
    made.begin_episode(meta)
    index = torch.arange(12)
    loss = made.finetune_loss(network, head, "validation", index)
    theta, psi = metapt._detached(network), {n: p.detach() for n, p in head.named_parameters()}

    def moved(columns):
        bias = psi["bias"].clone()
        bias[len(made.finetune_tasks) + columns] += 1
        return loss(theta, {**psi, "bias": bias})

    left_out = (~made.chosen).nonzero()[:, 0]
    assert len(left_out) == 12
    assert moved(made.chosen.nonzero()[:, 0]) == loss(theta, psi)
    for column in left_out:
        assert moved(column[None]) != loss(theta, psi)


def test_pretrain_loss_is_the_weighted_mean_over_tasks(home):
    made = domain(home, dropout=0.0)
    torch.manual_seed(0)
    network, meta = made.network(), made.meta()
    assert (meta.weights() == 1).all()
    nn.init.normal_(meta.task_logits)
    index = torch.arange(9)
    value = made.pretrain_loss(network, meta, index, 0.0)(
        dict(network.named_parameters()), dict(meta.named_parameters())
    )
    outputs, targets = network.train()(made.inputs("pretrain", index)), made.graphs.labels(made.rows["pretrain"][:9])
    wanted = 0.0
    for t, column in enumerate(made.pretrain_tasks):
        p = outputs[:, t].sigmoid()
        y = targets[:, column]
        wanted += 2 * meta.task_logits[t].sigmoid() * -(y * p.log() + (1 - y) * (1 - p).log()).mean()
    torch.testing.assert_close(value, wanted / len(made.pretrain_tasks))


def test_auroc_is_sklearns():
    from sklearn.metrics import roc_auc_score

    random = np.random.default_rng(0)
    labels = random.random((80, 12)) < 0.2
    labels[:, 3], labels[:, 5] = False, True  # not both classes: left out
    scores = random.normal(size=(80, 12)).round(1) + labels  # with ties
    wanted = np.mean([roc_auc_score(labels[:, t], scores[:, t]) for t in range(12) if t not in (3, 5)])
    assert metapt.mean_auroc(torch.tensor(scores), torch.tensor(labels).float()) == pytest.approx(wanted, abs=1e-12)
    assert np.isnan(metapt.mean_auroc(torch.zeros(4, 2), torch.ones(4, 2)))


def both_gradients(made, network, meta, index):
    loss = made.pretrain_loss(network, meta, index, 0.0, live=False)
    theta = dict(network.named_parameters())
    value = loss(theta, {n: p.detach() for n, p in meta.named_parameters()})
    return value, theta


def test_pcgrad_takes_out_the_conflict(home):
    """Against the formula; then, of two opposed losses, nothing is left; of two agreeing ones, the sum."""
    made = domain(home, method="pcgrad", dropout=0.0)
    torch.manual_seed(0)
    w = {"w": nn.Parameter(torch.tensor([1.0, 0.0]))}

    def gradient(a, b):
        made.backward(torch.stack([w["w"] @ torch.tensor(a), w["w"] @ torch.tensor(b)]), w)
        return w["w"].grad.tolist()

    assert gradient([1.0, 0.0], [1.0, 1.0]) == [2.0, 1.0]
    assert gradient([1.0, 0.0], [-1.0, 0.0]) == [0.0, 0.0]
    assert gradient([1.0, 0.0], [-1.0, 1.0]) == pytest.approx([0.5, 1.5])
    network, meta = made.network(), made.meta()
    value, theta = both_gradients(made, network, meta, torch.arange(40))
    assert value.shape == (2,)
    made.backward(value, theta)
    assert all(p.grad is not None for p in theta.values())


def test_cotrain_reads_the_labels_that_it_may_and_no_others(home):
    """FT labels of validation, test and (with --ft-share) the other FT proteins change nothing."""
    for method in ("supervised", "cotrain"):
        made = domain(home, method=method, ft_share=0.5, unseen_tasks=10, dropout=0.0)
        torch.manual_seed(0)
        network, meta = made.network(), made.meta()
        index = torch.arange(made.sizes["pretrain"])
        before = both_gradients(made, network, meta, index)[0].item()
        allowed = set(made.rows["finetune"][: made.access["finetune"]].tolist())
        assert len(allowed) == round(0.5 * made.sizes["finetune"])
        bits = made.graphs.bits
        labels = made.graphs.labels(torch.arange(300))
        hidden = labels.clone()
        others = torch.tensor([i not in allowed for i in range(300)])
        for task in made.finetune_tasks:
            hidden[others, task] = 1 - hidden[others, task]
        hidden[:, made.finetune_tasks[made.scored]] = 1 - labels[:, made.finetune_tasks[made.scored]]
        made.graphs.bits = torch.from_numpy(np.packbits(hidden.bool().numpy(), axis=1, bitorder="little"))
        assert both_gradients(made, network, meta, index)[0].item() == before
        seen = labels.clone()
        seen[~others, made.finetune_tasks[made.seen[0]]] = 1 - labels[~others, made.finetune_tasks[made.seen[0]]]
        made.graphs.bits = torch.from_numpy(np.packbits(seen.bool().numpy(), axis=1, bitorder="little"))
        assert (both_gradients(made, network, meta, index)[0].item() != before) == (method == "cotrain")
        made.graphs.bits = bits


def learned_phi(made):
    training = metapt.Training(made, made.settings, learn=True).run()
    return training.best.meta.task_logits.detach().clone()


def relabelled(home, columns_of, rows_of=None, **given):
    """φ of a run, and of the same run with other labels in some columns (and rows)."""
    first = learned_phi(domain(home, **given))
    made = domain(home, **given)
    labels = made.graphs.labels(torch.arange(300))
    rows = torch.arange(300) if rows_of is None else rows_of(made)
    columns = torch.as_tensor(columns_of(made))
    labels[rows[:, None], columns] = 1 - labels[rows[:, None], columns]
    made.graphs.bits = torch.from_numpy(np.packbits(labels.bool().numpy(), axis=1, bitorder="little"))
    return first, learned_phi(made)


def test_phi_is_learned_without_what_it_may_not_see(home):
    assert learned_phi(domain(home)).abs().max() > 0.05
    same = [
        relabelled(home, lambda d: d.finetune_tasks, lambda d: d.rows["test"]),
        relabelled(home, lambda d: d.finetune_tasks[d.scored], unseen_tasks=10, fold=1),
        relabelled(home, lambda d: d.finetune_tasks, lambda d: d.rows["finetune"][d.access["finetune"] :], ft_share=0.5),
        relabelled(home, lambda d: d.finetune_tasks, lambda d: d.rows["validation"][round(0.5 * d.sizes["validation"]) :], ft_share=0.5),
        relabelled(home, lambda d: d.finetune_tasks, select=8, agnostic=True),
    ]  # fmt: skip
    for first, second in same:
        assert (first == second).all()
        assert first.abs().max() > 0.01
    for given in ({"unseen_tasks": 10, "fold": 1}, {"ft_share": 0.5}, {"select": 8}):
        first, second = relabelled(home, lambda d: d.finetune_tasks[d.seen], **given)
        assert (first != second).any()


def test_folds_of_unseen_tasks_are_disjoint_and_cover_all(home):
    scored = [domain(home, unseen_tasks=10, fold=fold).scored for fold in range(4)]
    assert sorted(np.concatenate(scored).tolist()) == list(range(40))
    made = domain(home, unseen_tasks=10)
    outputs, targets = torch.randn(50, 40), (torch.rand(50, 40) < 0.4).float()
    moved = outputs.clone()
    moved[:, made.seen] += 1
    assert made.score(outputs, targets) == made.score(moved, targets)
    assert made.loss(outputs, targets) == made.loss(moved, targets)


def test_selection_draws_k_tasks_in_proportion_and_lends_the_others_a_gradient(home):
    meta = metapt.TaskWeights(6)
    meta.task_logits.data = torch.tensor([0.0, 0.0, 0.0, 0.0, 2.0, -9.0])
    torch.manual_seed(0)
    draws = torch.stack([meta.draw(1) for _ in range(4000)]).float().mean(0)
    torch.testing.assert_close(draws, meta.task_logits.detach().softmax(0), atol=0.02, rtol=0)
    chosen = meta.draw(2)
    assert chosen.sum() == 2
    losses = torch.rand(6)
    value = meta(losses, chosen)
    torch.testing.assert_close(value, losses[chosen].mean())
    value.backward()
    wanted = torch.func.grad(lambda phi: (2 * phi.sigmoid() * losses).mean())(meta.task_logits.detach())
    torch.testing.assert_close(meta.task_logits.grad, wanted)
    made = domain(home, select=5)
    training = metapt.Training(made, made.settings, learn=True)
    seen = set()
    training.run(lambda _: seen.add(tuple(made.chosen.nonzero()[:, 0].tolist())))
    assert all(len(s) == 5 for s in seen)
    assert len(seen) > 3  # another choice each episode


def test_the_paper_preset_is_the_published_protocol():
    s = metapt.settings_of("ppi", {}, "paper")
    assert (s.width, s.layers, s.batch_size, s.lr, s.dropout, s.meta_every, s.unroll_steps) == (300, 5, 32, 1e-4, 0.2, 10, 1)  # fmt: skip
    assert (s.solver, s.terms, s.alpha, s.meta_lr, s.finetune_lr) == ("neumann", 1, 1e-4, 1.0, 1e-4)
    assert (s.steps, s.warmup) == (250_000, 2_500)  # 100 epochs and one, of about 80,000 graphs
    assert (s.compare_scope, s.compare_lr, s.finetune_epochs, s.compare_batch_size) == ("head", 1e-4, 50, 32)
    assert (s.meta_batch_size, s.finetune_batch_size, s.validation_batch_size, s.half) == (32, 32, 32, "unseen")


def test_finetuning_by_epochs_looks_once_an_epoch(home, monkeypatch):
    made = domain(home, finetune_epochs=3, compare_batch_size=32)
    looks, real = [], made.targets
    monkeypatch.setattr(made, "targets", lambda part, index: looks.append((part, len(index))) or real(part, index))
    metapt.finetune(made, made.network(), 100, 0, "head", 1e-2)
    assert [n for part, n in looks if part == "finetune"] == [32] * 12
    assert len([part for part, _ in looks if part == "validation"]) == 3


def test_full_transfer_trains_in_training_mode_with_its_own_dropout(home):
    made = domain(home)
    network = made.transfer(made.network().eval())
    assert network.training
    assert network.encoder.dropout == 0.5
    torch.manual_seed(0)
    network = made.network()
    before = {name: b.clone() for name, b in network.named_buffers()}
    metapt.finetune(made, network, 100, 0, "all", 1e-3, 10)
    assert all((b == before[name]).all() for name, b in network.named_buffers())  # a copy moved
    assert network.encoder.dropout != 0.5
    moving, measured, transfer, targets = [], [], made.transfer, made.targets
    made.transfer = lambda network: moving.append(network) or transfer(network)
    made.targets = lambda part, index: measured.append((part, moving[-1].training)) or targets(part, index)
    metapt.finetune(made, network, 100, 0, "all", 1e-3, 10)
    assert {("finetune", True), ("validation", False), ("test", False)} == set(measured)


# The commands.


@pytest.fixture(scope="module")
def run(home):
    return home, summary_of(home, "meta", "ppi", "--out", "run", *options(TINY))


def test_meta_ends_in_summary_and_figures(run):
    home, summary = run
    assert {row["method"] for row in summary["comparison"]} == {
        "no_pretraining",
        "default_phi",
        "learned_phi",
        "online",
    }
    assert all(row["metric"] == "mean AUROC" and 0 <= row["mean"] <= 1 for row in summary["comparison"])
    assert summary["phi"]["task_logits"]["shape"] == [20]
    assert summary["meta_steps"] == 5
    names = {path.name for path in (home / "run").iterdir()}
    assert {"tasks.png", "phi.png", "losses.png", "comparison.png", "checkpoint.pt", "metrics.jsonl"} <= names


def test_meta_on_several_species_and_either_half(tmp_path):
    prepared(tmp_path / "data" / "ppi" / "published", 40, **SEVERAL)
    both = {}
    for half in ("unseen", "broad"):
        summary = summary_of(tmp_path, "meta", "ppi", "--out", half, *options({**TINY, "half": half}))
        assert len(summary["comparison"]) == 8
        both[half] = summary
    assert both["unseen"]["phi"] == both["broad"]["phi"]
    assert both["unseen"]["comparison"] != both["broad"]["comparison"]
    given = ("--seeds", 1, "--steps", 10, "--sizes", "30")
    scored = [summary_of(tmp_path, "eval", *a, *given)["comparison"][0]["mean"] for a in (
        ("unseen",), ("broad",), ("unseen", "--half", "broad"), ("broad", "--half", "unseen"))]  # fmt: skip
    assert scored[0] == scored[3] != scored[1] == scored[2]
    assert "--half" in refused(tmp_path, "eval", "unseen", "broad", "--out", "no")


def test_a_run_stays_with_its_source(run, tmp_path):
    shutil.copytree(run[0], tmp_path / "home")
    given = ("eval", "run", "--seeds", 1, "--steps", 10, "--sizes", "30")
    before = summary_of(tmp_path / "home", *given)["comparison"]
    prepared(tmp_path / "home" / "data" / "ppi" / "published", seed=1)  # what a new run would take
    assert summary_of(tmp_path / "home", *given)["comparison"] == before


@pytest.mark.parametrize(
    "more", [{}, {"select": 6}, {"select": 6, "agnostic": True, "particles": "2,1", "rounds": "0.5,1"}]
)
def test_a_run_that_goes_on_ends_as_if_it_had_not_stopped(home, tmp_path, more):
    def training():
        made = domain(home, **more)
        return metapt.Training(made, made.settings, learn=True)

    whole = training().run()
    states = []

    def stop(t):
        states.append(t.state_dict())
        if t.step >= 12:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        training().run(stop)
    torch.save(states[-1], tmp_path / "state.pt")
    second = training()
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert second.step == 12
    second.run()
    for name in ("network", "meta"):
        a, b = (getattr(t.best, name).state_dict() for t in (whole, second))
        assert all((a[key] == b[key]).all() for key in a)


def test_pretrain_finetune_and_eval(run, tmp_path):
    home, _ = run
    for method in ("supervised", "cotrain", "pcgrad"):
        summary = summary_of(home, "pretrain", "ppi", "--out", tmp_path / method, *options({**TINY, "method": method}))
        assert summary["pt_steps"] == 24
    summary = summary_of(home, "pretrain", "ppi", "--phi", "run", "--out", tmp_path / "phi", *options(TINY))
    assert {row["method"] for row in summary["comparison"]} == {"no_pretraining", "learned_phi"}
    summary = summary_of(
        home, "finetune", "run", "--seeds", 1, "--steps", 10, "--sizes", "30", "--out", tmp_path / "ft"
    )
    assert len(summary["comparison"]) == 2
    runs = ["run", tmp_path / "supervised", tmp_path / "cotrain", tmp_path / "pcgrad"]
    summary = summary_of(home, "eval", *runs, "--seeds", 2, "--steps", 10, "--sizes", "30", "--out", tmp_path / "eval")
    assert len(summary["differences"]) == 4
    other = options({**TINY, "compare": 0, "compare_lr": 0.3})
    assert main_in(home, "pretrain", "ppi", "--out", tmp_path / "other", *other)[0] == 0
    given = ("--seeds", 1, "--sizes", "30", "--out", tmp_path / "no")
    assert "--compare-lr" in refused(home, "eval", "run", tmp_path / "other", *given)
    summary = summary_of(home, "eval", "run", tmp_path / "other", "--lr", 0.1, *given)
    assert (summary["lr"], summary["scope"], summary["half"]) == (0.1, "head", "unseen")


def test_bad_input_is_one_line(home, tmp_path):
    def says(*arguments):
        return refused(home, *arguments, "--out", tmp_path / "no")

    assert "--unseen-tasks" in says("meta", "ppi", "--unseen-tasks", 40)
    assert "--compare-batch-size" in says("meta", "ppi", "--compare-batch-size", 0)
    assert "--unseen-tasks" in says("meta", "ppi", "--unseen-tasks", 10, "--fold", 4)
    assert "--select" in says("meta", "ppi", "--select", 20)
    assert "--agnostic" in says("meta", "ppi", "--agnostic")
    assert "--ft-share" in says("meta", "ppi", "--ft-share", 0)
    assert "--ft-share" in says("meta", "ppi", "--ft-share", "nan")
    assert "--method" in says("pretrain", "ppi", "--method", "magic")
    assert "belongs to pretrain" in says("meta", "ppi", "--method", "pcgrad")
    assert "--half" in says("meta", "ppi", "--half", "all")
    assert "--layers" in says("meta", "ppi", "--layers", 0)
    assert "belongs to the ppi" in says("meta", "digits-noise", "--select", 3)
    assert "download ppi" in says("meta", "ppi", "--source", "published")
    assert "download ppi" in refused(tmp_path, "meta", "ppi")
    assert not (tmp_path / "no").exists()


def test_spoiled_arrays_are_refused(tmp_path):
    prepared(tmp_path / "data" / "ppi" / "string-yeast")
    folder = tmp_path / "data" / "ppi" / "string-yeast"
    content = (folder / "source.bin").read_bytes()
    (folder / "source.bin").write_bytes(content[:-2])
    assert "source.bin" in refused(tmp_path, "meta", "ppi")
    (folder / "source.bin").write_bytes(content)
    (folder / "about.json").write_text("{}")
    assert "about.json" in refused(tmp_path, "meta", "ppi")


def test_settings_without_enough_terms_are_refused(tmp_path):
    prepared(tmp_path / "data" / "ppi" / "string-yeast", tasks=30)
    assert "too few" in refused(tmp_path, "meta", "ppi")


@pytest.mark.skipif(not YEAST.exists(), reason="needs ../shared/data/ppi/string-yeast")
def test_yeast_from_download_to_summary(tmp_path):
    code, _, err = main_in(tmp_path, "download", "ppi", "--source", "string-yeast", "--from", YEAST)
    assert code == 0, err
    given = {**TINY, "width": 16, "steps": 40, "meta_every": 10}
    summary = summary_of(tmp_path, "meta", "ppi", *options(given))
    assert all(row["mean"] > 0.5 for row in summary["comparison"])


def test_the_script_replaces_nothing_but_prepared_graphs(tmp_path):
    string_files(tmp_path / "s")
    script, before = ROOT / "data_scripts" / "string_graphs.py", sorted(p.name for p in (tmp_path / "s").iterdir())
    for target in (tmp_path / "s", "."):
        done = subprocess.run(
            [sys.executable, script, tmp_path / "s", target], check=False, capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == 2
        assert "no prepared data" in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == before


def test_the_script_writes_what_the_command_writes(tmp_path):
    string_files(tmp_path / "s")
    metapt.prepare_string(tmp_path / "s", tmp_path / "g")
    script = ROOT / "data_scripts" / "string_graphs.py"
    done = subprocess.run(
        [sys.executable, script, tmp_path / "s", tmp_path / "h"], check=True, capture_output=True, text=True
    )
    assert "4 graphs" in done.stdout
    for path in (tmp_path / "g").iterdir():
        assert path.read_bytes() == (tmp_path / "h" / path.name).read_bytes()
