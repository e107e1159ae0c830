"""The PPI domain: prepared graphs, the GIN beside PyG's messages, parts, losses and their
hypergradient, what may be seen before FT, baselines, commands.

On generated graphs, and on the yeast graphs where there are any.
"""

import copy
import csv
import itertools
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import generated, write_graphs
from matplotlib.figure import Figure
from sklearn.metrics import roc_auc_score
from tools import (
    ROOT,
    SHARED,
    contents,
    flat,
    main_in,
    options,
    pipeline_of,
    refused,
    spy,
    summary_of,
)
from torch import nn

import metapt
from bench.costs.counting import peak
from bench.costs.plain_gin import PlainGIN, plain_batch
from bench.domains import ppi
from bench.domains import ppi_baselines as baselines
from data_scripts.graphs import RawGraphs, prepare_graphs

YEAST = SHARED / "ppi" / "string-yeast"
TINY = {
    "width": 8,
    "layers": 2,
    "steps": 24,
    "warmup": 4,
    "meta_every": 4,
    "compare": 1,
    "measure_steps": 20,
    "meta_lr": 0.1,
    "batch_size": 16,
    "meta_batch_size": 16,
}
OF_LEARNING = ("warmup", "meta_every", "meta_lr", "meta_batch_size")
PRETRAIN = options({name: value for name, value in TINY.items() if name not in OF_LEARNING})
SEVERAL = {"finetune_terms": 40, "species": (9606, 4932, 10090)}
BASELINES = ROOT / "bench" / "domains" / "ppi_baselines.py"
CPU = torch.device("cpu")
# What there is.
GRAPHS = torch.arange(300)
TASKS = torch.arange(60)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder in which `ppi` can run, on graphs of one species."""
    folder = tmp_path_factory.mktemp("home")
    write_graphs(folder / "data" / "ppi" / "string-yeast")
    return folder


def make(home: Path, kind=ppi.PPI, **given):
    return kind(kind.Settings(**{**TINY, **given}), CPU, home / "data")


def write(folder: Path, labels: np.ndarray, finetune_terms: int = 0) -> None:
    """Graphs with these labels."""
    raw = generated(graphs=len(labels), tasks=labels.shape[1])
    raw = raw._replace(labels=labels.astype(np.int64))
    terms = [str(i) for i in range(labels.shape[1])]
    prepare_graphs(folder, [raw], terms, finetune_terms, source="generated", licence="none")


def relabel(made, rows, tasks) -> None:
    """The opposite labels, of some proteins and tasks."""
    labels = made.graphs.labels(GRAPHS, TASKS)
    labels[rows[:, None], tasks] = 1 - labels[rows[:, None], tasks]
    bits = np.packbits(labels.bool().numpy(), axis=1, bitorder="little")
    made.graphs.bits = torch.from_numpy(bits)


def modules(made) -> tuple:
    """θ, ψ and φ, always the same."""
    torch.manual_seed(0)
    return made.network(), made.head(), made.meta()


def double_labels(monkeypatch, made) -> None:
    """The labels of a domain's graphs come as float64."""
    labels = made.graphs.labels
    monkeypatch.setattr(made.graphs, "labels", lambda *which: labels(*which).double())


# ------------------------------------------------------------------------------------------------
# Graphs


def test_labels_are_those_of_the_source(home):
    raw = generated()
    graphs = make(home).graphs
    index = torch.tensor([7, 250, 7, 0])
    tasks = torch.tensor([0, 7, 8, 59, 3])
    np.testing.assert_array_equal(graphs.labels(index, tasks), raw.labels[index][:, tasks])
    np.testing.assert_array_equal(graphs.positives(GRAPHS, TASKS), raw.labels.sum(0))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("graphs", 299),
        ("nodes", 5),
        ("edges", 5),
        ("tasks", 61),
        ("tasks", "60"),
        ("terms", ["GO:1"]),
        ("terms", 3),
        ("finetune_terms", 60),
        ("finetune_terms", -1),
        ("finetune_terms", None),
        ("arrays", {}),
    ],
)
def test_counts_that_do_not_fit_the_arrays_are_refused(home, tmp_path, name, value):
    folder = Path(shutil.copytree(home / "data" / "ppi" / "string-yeast", tmp_path / "g"))
    about = json.loads((folder / "about.json").read_text())
    ppi.Graphs(folder, CPU, "")
    (folder / "about.json").write_text(json.dumps({**about, name: value}))
    with pytest.raises(metapt.BadInput, match=r"^\S+/g\S* is not what 'a command' wrote: "):
        ppi.Graphs(folder, CPU, "a command")


@pytest.mark.parametrize("layers", [1, 3])
def test_gin_equals_edgewise_messages(home, layers):
    """Outputs, gradients of every parameter, BatchNorm's statistics and second derivatives: beside
    PyG's MessagePassing, on the source's own edges.
    """
    raw = generated()
    index = torch.tensor([3, 8, 120, 299, 41, 77, 8])
    assert raw.degrees[index].min() == 0  # a graph of one node
    torch.manual_seed(0)
    fast = ppi.GIN(6, layers, 0.0).double()
    plain = PlainGIN(fast)
    batch = make(home).graphs.batch(index)
    data = plain_batch(raw, index.numpy())
    for train in (True, True, False):
        a = fast.train(train)(batch)
        b = plain.train(train)(data)
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
        for x, y in zip(fast.buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)

    direction = torch.randn_like(a)

    def derivatives(module, inputs, parameters):
        """A gradient, and its product with the Hessian in a random direction."""
        value = (module.train()(inputs) * direction).pow(2).sum()
        gradient = torch.autograd.grad(value, parameters, create_graph=True)
        torch.manual_seed(1)
        product = sum((g * torch.randn_like(g)).sum() for g in gradient)
        return [*gradient, *torch.autograd.grad(product, parameters)]

    ours = derivatives(fast, batch, list(fast.parameters()))
    theirs = derivatives(plain, data, plain.in_order_of(fast))
    for x, y in zip(ours, theirs, strict=True):
        atol = 1e-10 * max(1.0, y.abs().max().item())
        torch.testing.assert_close(x, y, rtol=1e-9, atol=atol)


def test_gin_keeps_fewer_bytes_for_backward(tmp_path):
    """At the published averages: 40 nodes and 730 directed edges a graph."""
    random = np.random.default_rng(0)
    edges = []
    for _ in range(8):
        upper = np.triu(random.random((40, 40)) < 0.468, 1)
        edges.append(np.stack(np.nonzero(upper | upper.T)))
    degrees = np.array([e.shape[1] for e in edges])
    raw = RawGraphs(
        sizes=np.full(8, 40),
        degrees=degrees,
        edges=np.concatenate(edges, 1),
        features=(random.random((degrees.sum(), 9)) < 0.3).astype(np.float32),
        centre=np.zeros(8, int),
        species=np.full(8, 9606),
        labels=np.zeros((8, 8), int),
    )
    prepare_graphs(tmp_path / "g", [raw], list("abcdefgh"), 0, source="generated", licence="none")
    batch = ppi.Graphs(tmp_path / "g", CPU, "").batch(torch.arange(8))
    fast = ppi.GIN(60, 5, 0.0)
    plain = PlainGIN(fast)
    data = plain_batch(raw, np.arange(8), torch.float32)
    ours = peak(lambda: fast(batch).sum().backward(), data=True)
    theirs = peak(lambda: plain(data).sum().backward(), data=True)
    assert 1.6 * ours < theirs, (ours, theirs)


# ------------------------------------------------------------------------------------------------
# Parts and scores


@pytest.mark.parametrize("given", [{"finetune_terms": 40}, SEVERAL], ids=["one species", "several"])
def test_parts(tmp_path, given):
    write_graphs(tmp_path / "data" / "ppi" / "published", **given)
    a, b, c = [make(tmp_path, seed=seed) for seed in (0, 0, 1)]
    rows = {part: set(r.tolist()) for part, r in a.rows.items()}
    assert all((a.rows[part] == b.rows[part]).all() for part in rows)
    assert a.data_digest() == b.data_digest() != c.data_digest()
    assert set(c.rows["finetune"].tolist()) != rows["finetune"]
    assert a.sizes == {part: len(r) for part, r in rows.items()}
    assert rows["pretrain"] == rows["finetune"] | rows["validation"] | rows["broad"]
    assert sum(len(rows[part]) for part in ("finetune", "validation", "broad", "test")) == 300
    assert rows["pretrain"] | rows["test"] == set(range(300))
    assert not rows["pretrain"] & rows["test"]
    of_finetuning = len(rows["validation"]) + len(rows["finetune"])
    assert abs(len(rows["validation"]) / of_finetuning - 0.15) < 0.01
    assert abs(len(rows["test"]) - len(rows["broad"])) <= 1
    if given is SEVERAL:
        human = (a.graphs.species == 9606).nonzero()[:, 0]
        assert rows["test"] | rows["broad"] == set(human.tolist())
    else:
        assert len(rows["test"] | rows["broad"]) == 90
    assert sorted(a.finetune_tasks.tolist()) == list(range(20, 60))
    assert a.pretrain_tasks.tolist() == list(range(20))
    a.graphs.about["source"] = "other graphs"
    assert a.data_digest() != b.data_digest()


def test_rows_are_numbers_on_the_cpu(home):
    for rows in make(home).rows.values():
        assert (rows.dtype, rows.device.type) == (torch.int64, "cpu")


def test_finetuning_terms_are_drawn_among_those_with_sixty_positives(tmp_path):
    labels = np.random.default_rng(0).random((300, 90)) < 0.4
    labels[:, ::2] &= np.arange(300)[:, None] < 100  # fewer than 60
    write(tmp_path / "data" / "ppi" / "string-yeast", labels)
    enough = np.flatnonzero(labels.sum(0) >= 60)
    assert 40 < len(enough) <= 50
    drawn = set()
    for seed in range(3):
        made = make(tmp_path, seed=seed)
        finetune = made.finetune_tasks.tolist()
        assert len(set(finetune)) == 40
        assert set(finetune) <= set(enough.tolist())
        assert sorted([*made.pretrain_tasks.tolist(), *finetune]) == list(range(90))
        drawn.add(tuple(sorted(finetune)))
    assert len(drawn) == 3


def test_the_test_part_is_stratified_by_the_rarest_finetuning_term(tmp_path):
    random = np.random.default_rng(0)
    # Each protein has one of these, and the term of all.
    rarest = random.permutation(np.repeat(np.arange(39), 60))
    of_pretraining = random.random((2340, 20)) < 0.9
    labels = [of_pretraining, np.eye(39, dtype=bool)[rarest], np.ones((2340, 1))]
    write(tmp_path / "data" / "ppi" / "published", np.concatenate(labels, 1), 40)
    made = make(tmp_path)
    for part, share in {"test": 9, "broad": 9, "validation": 6.3}.items():  # of 60
        counts = made.graphs.positives(made.rows[part], torch.arange(20, 59))
        assert np.abs(counts - share).max() <= 1


def test_folds_of_unseen_tasks_are_disjoint_and_cover_all(home):
    folds = [make(home, unseen_tasks=10, fold=fold) for fold in range(4)]
    scored = [made.scored.tolist() for made in folds]
    assert sorted(itertools.chain(*scored)) == list(range(40))
    for made in folds:
        assert sorted([*made.scored.tolist(), *made.seen.tolist()]) == list(range(40))
    outputs = torch.randn(50, 40)
    targets = (torch.rand(50, 40) < 0.4).float()
    moved = outputs.clone()
    moved[:, made.seen] += torch.randn(50, 30)
    assert made.score(outputs, targets) == made.score(moved, targets)
    assert made.loss(outputs, targets) == made.loss(moved, targets)
    assert make(home).loss(outputs, targets) != make(home).loss(moved, targets)


def test_the_score_is_the_mean_auroc_of_the_tasks_with_both_classes(home):
    made = make(home)
    random = np.random.default_rng(0)
    labels = random.random((80, 40)) < 0.2
    labels[:, 3] = False
    labels[:, 5] = True
    scores = random.normal(size=(80, 40)).round(1) + labels  # with ties
    outputs = torch.tensor(scores)
    areas = [roc_auc_score(labels[:, t], scores[:, t]) for t in range(40) if t not in (3, 5)]
    score = made.score(outputs, torch.tensor(labels).float())
    assert score == pytest.approx(np.mean(areas), abs=1e-12)
    assert math.isnan(made.score(torch.zeros(4, 40), torch.ones(4, 40)))
    labels[:, 1:] = True  # One task is left.
    area = roc_auc_score(labels[:, 0], scores[:, 0])
    score = made.score(outputs, torch.tensor(labels).float())
    assert score == pytest.approx(area, abs=1e-12)


@pytest.mark.parametrize("part", ["test", "broad"])
def test_both_halves_of_the_test_proteins_are_scored(home, part):
    made = make(home)
    network, _, _ = modules(made)
    before = metapt.finetune(made, network, 100, 0).scores
    relabel(made, made.rows[part], made.finetune_tasks)  # An AUROC a becomes 1 − a.
    after = metapt.finetune(made, network, 100, 0).scores
    assert set(before) == {"test", "broad"}
    assert after == pytest.approx({**before, part: 1 - before[part]}, abs=1e-12)
    assert abs(before[part] - 0.5) > 0.01


# ------------------------------------------------------------------------------------------------
# Losses


def cross_entropy(logits, labels):
    p = logits.double().sigmoid()
    return -(labels * p.log() + (1 - labels) * (1 - p).log()).mean(0)


@pytest.mark.parametrize("live", [True, False], ids=["a PT step", "a meta step"])
@pytest.mark.parametrize("kind", [ppi.PPI, baselines.CoTrain, baselines.PCGrad])
def test_pretrain_loss_is_the_weighted_mean_over_tasks(home, kind, live):
    """CoTrain adds the mean over the FT labels that it may see; PCGrad keeps the two apart."""
    made = make(home, kind, dropout=0.0, ft_share=0.5, unseen_tasks=10, fold=1)
    network, _, meta = modules(made)
    assert (meta.weights() == 1).all()
    nn.init.normal_(meta.task_logits)
    index = torch.arange(40)
    rows = made.rows["pretrain"][index]
    outputs = network.train(live)(made.inputs("pretrain", index)).detach()
    loss = made.pretrain_loss(network, meta, index, 0.0, live=live)
    value = loss(metapt.detached(network), metapt.detached(meta))

    losses = cross_entropy(outputs[:, :20], made.graphs.labels(rows, made.pretrain_tasks))
    expected = [(2 * meta.task_logits.sigmoid() * losses).mean().item()]
    may_see = made.rows["finetune"][: round(0.5 * made.sizes["finetune"])]
    known = torch.isin(rows, may_see)
    assert 0 < known.sum() < 40
    if kind is not ppi.PPI:
        seen_tasks = made.finetune_tasks[torch.cat([TASKS[:10], TASKS[20:40]])]
        labels = made.graphs.labels(rows[known], seen_tasks)
        expected.append(cross_entropy(outputs[known, 20:], labels).mean().item())
    if kind is not baselines.PCGrad:
        expected = sum(expected)
    assert value.tolist() == pytest.approx(expected, rel=1e-5)


def test_weighted_cotrain_begins_as_cotrain(home):
    values = []
    for kind in (baselines.CoTrain, baselines.WeightedCoTrain):
        made = make(home, kind, dropout=0.0)
        network, _, meta = modules(made)
        loss = made.pretrain_loss(network, meta, torch.arange(40), 0.0, live=True)
        values.append(loss(metapt.detached(network), metapt.detached(meta)).item())
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    assert len(metapt.detached(meta)["task_logits"]) == 20 + 40


def test_losses_that_are_no_mean_over_examples_say_so():
    """Ranks, which divide a batch, refuse these."""
    kinds = (baselines.CoTrain, baselines.WeightedCoTrain, baselines.PCGrad, ppi.BGRL)
    assert not any(kind.mean_over_examples for kind in kinds)
    assert ppi.PPI.mean_over_examples
    assert baselines.Selection.mean_over_examples


def test_outputs_begin_at_the_base_rates(home):
    """The log-odds of each PT term's share; for FT's head, which may know few labels, those of the
    PT terms' mean.
    """

    def rates(made, part, tasks):
        labels = made.graphs.labels(made.rows[part], tasks)
        return (labels.sum(0) + 0.5) / (made.sizes[part] + 1)

    made = make(home)
    of_terms = rates(made, "pretrain", made.pretrain_tasks)
    torch.testing.assert_close(made.network().head.bias.detach(), of_terms.logit())
    torch.testing.assert_close(made.head().bias.detach(), of_terms.mean().logit().expand(40))
    plain = make(home, base_rates=False)
    assert plain.network().head.bias.abs().max() <= 0.25
    assert plain.head().bias.abs().max() <= 0.25
    both = make(home, baselines.CoTrain)
    of_terms = rates(both, "finetune", both.finetune_tasks)
    torch.testing.assert_close(both.network().head.bias.detach()[20:], of_terms.logit())


def test_permuted_tasks_keep_their_rates_and_nothing_else(home):
    plain = make(home)
    made = make(home, permuted=0.5)
    before = plain.graphs.labels(GRAPHS, plain.pretrain_tasks)
    after = made.graphs.labels(GRAPHS, made.pretrain_tasks)
    assert made.permuted.sum() == 10
    assert not plain.permuted.any()
    assert torch.equal(before.sum(0), after.sum(0))
    assert ((before == after).all(0).numpy() == ~made.permuted).all()
    for part in ("finetune", "validation", "test"):
        index = torch.arange(made.sizes[part])
        assert torch.equal(plain.targets(part, index), made.targets(part, index))
    assert plain.data_digest() != made.data_digest()


def differences(function, at: dict, direction: dict, step: float):
    """The derivative of a function of parameters along a direction, by central differences."""
    ahead = {name: p + step * direction[name] for name, p in at.items()}
    behind = {name: p - step * direction[name] for name, p in at.items()}
    return (function(ahead) - function(behind)) / (2 * step)


@pytest.mark.parametrize("kind", [ppi.PPI, baselines.CoTrain, baselines.WeightedCoTrain])
def test_hypergradient_is_that_of_central_differences(home, kind, monkeypatch):
    """−vᵀ∇²_θφ L_PT, where v is dL_V/dθ through Adam's second step on ψ, in random directions."""
    made = make(home, kind, dropout=0.0, unseen_tasks=10)
    double_labels(monkeypatch, made)
    network, head, meta = [module.double() for module in modules(made)]
    nn.init.normal_(meta.task_logits)
    index = torch.arange(60)
    pretrain = made.pretrain_loss(network, meta, index, 0.0, live=False)
    finetune = [
        made.finetune_loss(network, head, "finetune", index[:30]),
        made.finetune_loss(network, head, "finetune", index[30:]),
    ]
    validation = made.finetune_loss(network, head, "validation", index[:30])
    theta = metapt.detached(network)
    psi = metapt.detached(head)
    phi = metapt.detached(meta)

    def hypergradient(finetune_loss, psi, state, hvp="exact"):
        return metapt.hypergradient(
            pretrain,
            finetune_loss,
            validation,
            theta,
            psi,
            phi,
            unroll=metapt.Unroll(1, 0.1, optimizer="adam"),
            solver=metapt.Solver("identity", hvp=hvp),
            ft_state=state,
        )

    first = hypergradient(finetune[0], psi, None)
    exact = hypergradient(finetune[1], first.psi, first.ft_state)
    finite = hypergradient(finetune[1], first.psi, first.ft_state, "finite")
    assert torch.cosine_similarity(flat(exact.phi), flat(finite.phi), dim=0) > 0.9999
    assert not torch.equal(flat(exact.phi), flat(finite.phi))

    def after_finetuning(moved):
        leaves = {name: p.clone().requires_grad_() for name, p in psi.items()}
        adam = torch.optim.Adam(leaves.values(), lr=0.1)
        for loss, at in zip(finetune, (theta, moved), strict=True):
            adam.zero_grad()
            loss(at, leaves).backward()
            adam.step()
        return validation(moved, leaves).item()

    length = flat(exact.q).norm()
    along_v = {name: q / length for name, q in exact.q.items()}

    def change_of_pretraining(phi):
        return length * differences(lambda theta: pretrain(theta, phi), theta, along_v, 1e-6)

    for _ in range(3):
        direction = {name: torch.randn_like(p) for name, p in theta.items()}
        expected = differences(after_finetuning, theta, direction, 1e-7)
        assert (flat(exact.q) @ flat(direction)).item() == pytest.approx(expected, rel=1e-4)
        direction = {name: torch.randn_like(p) for name, p in phi.items()}
        expected = -differences(change_of_pretraining, phi, direction, 3e-3).item()
        assert (flat(exact.phi) @ flat(direction)).item() == pytest.approx(expected, rel=1e-4)


# ------------------------------------------------------------------------------------------------
# BGRL


def bgrl(home, **given):
    """In float64, the target held where the online network is not; and six graphs, one of them
    without edges.
    """
    made = make(home, ppi.BGRL, **{"width": 4, **given})
    network, _, meta = [module.double() for module in modules(made)]
    network.target.mul_(1.1).add_(0.1 * torch.randn_like(network.target))
    meta.edges.data = torch.randn(2, dtype=torch.float64)
    meta.features.data = torch.randn(2, dtype=torch.float64)
    degrees = made.graphs.degrees[made.rows["pretrain"]]
    index = torch.tensor([3, 120, 199, 41, 77, *(degrees == 0).nonzero()[0]])
    return made, network, meta, index


def looped_views(meta, batch) -> list:
    """Of both views the sums [nodes, 10] and how much is kept of each edge [to, from]."""
    nodes = len(batch.sums)
    ends = [*batch.start.tolist()[1:], len(batch.source)]

    def keep(u, p):
        return 1 / (1 + (p / (1 - p) * (1 - u) / u) ** 2)

    views = []
    for view in range(2):
        draws_of_edges = torch.rand(len(batch.source), dtype=torch.float64)
        draws_of_features = torch.rand(len(batch.size), 9, dtype=torch.float64)
        edges_dropped = meta.edges[view].sigmoid().item()
        features_dropped = meta.features[view].sigmoid().item()
        kept = torch.zeros(nodes, nodes, dtype=torch.float64)
        sums = torch.zeros(nodes, 10, dtype=torch.float64)
        for i in range(nodes):
            edges = range(batch.start[i], ends[i])
            for e in edges:
                kept[i, batch.source[e]] += keep(draws_of_edges[e].item(), edges_dropped)
            share = kept[i].sum() / len(edges) if edges else 0
            for f in range(9):
                loop = 1 if f == 7 else 0
                draw = draws_of_features[batch.graph[i], f].item()
                of_edges = batch.sums[i, f].item() - loop
                sums[i, f] = loop + of_edges * keep(draw, features_dropped) * share
            sums[i, 9] = 1 + kept[i].sum()
        views.append((sums, kept))
    return views


def plain_nodes(gin, sums, kept) -> torch.Tensor:
    """The GIN in training mode, its messages as a dense matrix; then every column standardised."""
    x = gin.embedding.expand(len(sums), -1)
    for i, layer in enumerate(gin.layers):
        edges = sums[:, :9] @ layer.edge.weight.T + sums[:, 9:] * layer.edge.bias
        hidden = torch.cat([x + kept @ x, edges], 1) @ layer.first.weight.T + layer.first.bias
        variance = hidden.var(0, unbiased=False)
        hidden = (hidden - hidden.mean(0)) / (variance + layer.norm.eps).sqrt()
        hidden = (hidden * layer.norm.weight + layer.norm.bias).clamp(min=0)
        x = hidden @ layer.second.weight.T + layer.second.bias
        if i + 1 < len(gin.layers):
            x = x.clamp(min=0)
    standard = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()
    return standard * gin.last.weight + gin.last.bias


def test_bgrl_is_the_cosine_of_each_node_in_both_orders(home):
    made, network, meta, index = bgrl(home)
    theta = metapt.detached(network)
    phi = metapt.detached(meta)
    batch = made.inputs("pretrain", index)
    assert (batch.sums[:, 9] == 1).any()  # a node without neighbours
    assert len(batch.sums) > 20
    torch.manual_seed(3)
    value = made.pretrain_loss(network, meta, index, 0.0, live=False)(theta, phi).item()
    target = copy.deepcopy(network.encoder)
    nn.utils.vector_to_parameters(network.target, target.parameters())
    torch.manual_seed(3)
    first, second = looped_views(meta, batch)
    into, prelu, out = network.head
    total = 2.0
    for mine, theirs in ((first, second), (second, first)):
        hidden = plain_nodes(network.encoder, *mine) @ into.weight.T + into.bias
        hidden = torch.where(hidden > 0, hidden, prelu.weight * hidden)
        predicted = hidden @ out.weight.T + out.bias
        aims = plain_nodes(target, *theirs)
        for a, b in zip(predicted, aims, strict=True):
            total -= (a @ b / a.norm() / b.norm()).item() / len(aims)
    assert value == pytest.approx(total, rel=1e-9)
    again = made.pretrain_loss(network, meta, index, 0.0, live=False)(theta, phi).item()
    assert again != pytest.approx(value)  # Views are drawn anew.


def test_a_view_drops_the_shares_that_it_should(home):
    share = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    kept = ppi.Drops.keep(share.logit(), 200_000)
    assert kept.min() >= 0
    assert kept.max() <= 1
    assert (kept < 0.5).double().mean().item() == pytest.approx(0.3, abs=0.005)
    assert torch.autograd.grad(kept.mean(), share)[0] < -0.5
    made = make(home, ppi.BGRL, layers=3, width=4)
    network, _, meta = modules(made)
    # Nothing is dropped from the first view.
    meta.edges.data[0] = -50.0
    meta.features.data[0] = -50.0
    batch = made.inputs("pretrain", GRAPHS[:20])._replace(by_node=True)
    whole, dropped = meta(batch)
    torch.testing.assert_close(network.eval()(whole), network(batch))
    assert not torch.allclose(network(dropped), network(batch), rtol=0.1)


def test_with_the_target_held_the_hypergradient_is_that_of_the_pipeline(home, monkeypatch):
    """PT to its end under φ, with a pull to where it began so that there is one; FT; L_V: against
    central differences.
    """
    step = 1e-6
    made, network, meta, index = bgrl(home)
    double_labels(monkeypatch, made)
    head = made.head().double()
    nn.init.normal_(network.head[2].weight)  # No prediction is near 0.
    begin = metapt.detached(network)
    psi = metapt.detached(head)
    phi = metapt.detached(meta)
    free = made.pretrain_loss(network, meta, index, 0.0, live=False)
    finetune = made.finetune_loss(network, head, "finetune", GRAPHS[:30])
    validation = made.finetune_loss(network, head, "validation", GRAPHS[:30])
    pretrain, pretrained, pipeline = pipeline_of(
        free, finetune, validation, begin, psi, pull=1000.0, steps=25
    )
    before = network.target.clone()
    theta = pretrained(phi)
    torch.manual_seed(4)
    result = metapt.hypergradient(
        pretrain,
        finetune,
        validation,
        theta,
        psi,
        phi,
        unroll=metapt.Unroll(1, 0.1),
        solver=metapt.Solver("cg", terms=50),
    )
    for name, p in phi.items():
        for view in torch.eye(2, dtype=torch.float64):
            ahead, behind = [pipeline({**phi, name: p + by * view}) for by in (step, -step)]
            expected = (ahead - behind) / (2 * step)
            assert (result.phi[name] @ view).item() == pytest.approx(expected, rel=1e-3), name
    assert torch.equal(network.target, before)


def test_the_target_follows_the_encoder_a_step_behind_and_is_no_part_of_theta(home):
    run = metapt.Training(make(home, ppi.BGRL, momentum=0.8, lr=1e-2), True)
    network = run.network
    assert "target" in network.state_dict()
    assert "target" not in dict(network.named_parameters())
    target = flat(network.encoder)
    norm = network.encoder.last
    batches = norm.num_batches_tracked.item()
    for _ in range(4):
        target = 0.8 * target + 0.2 * flat(network.encoder)
        run.pretrain_step()
        torch.testing.assert_close(network.target, target)
        assert not torch.allclose(network.target, flat(network.encoder), atol=1e-3)
    # Two views a step: the target's passes change no statistics.
    assert norm.num_batches_tracked == batches + 2 * 4
    before = {name: b.clone() for name, b in network.named_buffers()}
    run.meta_step()
    assert all(torch.equal(b, before[name]) for name, b in network.named_buffers())


def test_the_target_runs_in_the_precision_of_the_online_network(home):
    """Two views in both networks; then the head beside PT."""
    run = metapt.Training(make(home, ppi.BGRL, precision="bf16", hvp="finite"), True)
    dtypes = []
    layer = run.network.encoder.layers[0]
    layer.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    run.pretrain_step()
    assert dtypes == [torch.bfloat16] * 5


def test_bgrl_reads_no_labels_in_pretraining_and_has_no_options_of_labels(home, monkeypatch):
    made = make(home, ppi.BGRL)
    network, _, meta = modules(made)
    monkeypatch.setattr(made.graphs, "labels", None)
    loss = made.pretrain_loss(network, meta, GRAPHS[:9], 0.0, live=True)
    assert loss(metapt.detached(network), metapt.detached(meta)).isfinite()

    where = f"{ROOT / 'bench' / 'domains' / 'ppi.py'}:BGRL"
    for name, value in {"permuted": 0.5, "meta_train": True, "momentum": 1.0}.items():
        said = refused(home, "meta", where, *options({**TINY, name: value}))
        assert metapt.flag(name) in said
    summary = summary_of(home, "meta", where, "--out", "bgrl", *options(TINY))
    shapes = {name: phi["shape"] for name, phi in summary["phi"].items()}
    assert shapes == {"edges": [2], "features": [2]}
    lines = (home / "bgrl" / "metrics.jsonl").read_text().splitlines()
    phi = torch.load(home / "bgrl" / "checkpoint.pt")["phi"]
    assert json.loads(lines[-1])["edges_1"] == pytest.approx(phi["edges"][0].sigmoid().item())
    assert {"phi.png", "comparison.png"} <= set(contents(home / "bgrl"))
    assert "phi.csv" not in contents(home / "bgrl")


# ------------------------------------------------------------------------------------------------
# What may be seen before FT


def learned(made) -> torch.Tensor:
    return flat(metapt.Training(made, learn=True).run().meta)


HALF = {"ft_share": 0.5}
AGNOSTIC = {"select": 8, "agnostic": True}
# By name: the settings, and which proteins and tasks may not be seen.
HIDDEN = {
    "test proteins": ({}, lambda made: (made.rows["test"], made.finetune_tasks)),
    "broad proteins": ({}, lambda made: (made.rows["broad"], made.finetune_tasks)),
    "unseen tasks": (
        {"unseen_tasks": 10, "fold": 1},
        lambda made: (GRAPHS, made.finetune_tasks[made.scored]),
    ),
    "half of FT": (
        HALF,
        lambda made: (made.rows["finetune"][made.access["finetune"] :], made.finetune_tasks),
    ),
    "half of validation": (
        HALF,
        lambda made: (made.rows["validation"][made.access["validation"] :], made.finetune_tasks),
    ),
    "agnostic": (AGNOSTIC, lambda made: (GRAPHS, made.finetune_tasks)),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_phi_is_learned_without_what_it_may_not_see(home, name):
    given, hidden = HIDDEN[name]
    kind = baselines.Selection if given is AGNOSTIC else ppi.PPI
    same = make(home, kind, **given)
    relabel(same, *hidden(same))
    other = make(home, kind, **given)
    relabel(other, GRAPHS, other.pretrain_tasks if given is AGNOSTIC else other.seen_tasks)
    first = learned(make(home, kind, **given))
    assert first.abs().max() > 0.05
    assert torch.equal(first, learned(same))
    assert not torch.equal(first, learned(other))


@pytest.mark.parametrize("kind", [ppi.PPI, baselines.CoTrain])
def test_pretraining_reads_the_finetuning_labels_that_it_may_and_no_others(home, kind):
    made = make(home, kind, ft_share=0.5, unseen_tasks=10, dropout=0.0)
    network, _, meta = modules(made)
    allowed = made.rows["finetune"][: made.access["finetune"]]
    assert len(allowed) == round(0.5 * made.sizes["finetune"])
    everything = torch.arange(made.sizes["pretrain"])

    def value():
        loss = made.pretrain_loss(network, meta, everything, 0.0, live=False)
        return loss(metapt.detached(network), metapt.detached(meta)).item()

    before = value()
    relabel(made, GRAPHS[~torch.isin(GRAPHS, allowed)], made.finetune_tasks)
    relabel(made, allowed, made.finetune_tasks[made.scored])
    assert value() == before
    relabel(made, allowed[:1], made.finetune_tasks[made.seen[:1]])
    assert (value() != before) == (kind is baselines.CoTrain)


# ------------------------------------------------------------------------------------------------
# Baselines


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1.0, 0.0], [1.0, 1.0], [2.0, 1.0]),
        ([1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]),
        ([1.0, 0.0], [-1.0, 1.0], [0.5, 1.5]),
    ],
)
def test_pcgrad_takes_out_the_conflict(home, a, b, expected):
    """Two agreeing gradients, two opposed ones, and two of which each loses its part against the
    other.
    """
    w = nn.Parameter(torch.tensor([1.0, 0.0]))
    idle = nn.Parameter(torch.ones(2, 3))
    made = make(home, baselines.PCGrad)
    losses = torch.stack([w @ torch.tensor(a), w @ torch.tensor(b)])
    made.backward(losses, {"w": w, "idle": idle})
    assert w.grad.tolist() == pytest.approx(expected)
    assert not idle.grad.any()
    assert idle.grad.shape == (2, 3)


def test_selection_draws_k_tasks_in_proportion_and_lends_the_others_a_gradient():
    meta = baselines.TaskChoice(6)
    meta.task_logits.data = torch.tensor([0.0, 0.0, 0.0, 0.0, 2.0, -9.0])
    torch.manual_seed(0)
    counts = torch.zeros(6)
    for _ in range(4000):
        meta.choose(1)
        counts += meta.chosen
    shares = meta.task_logits.detach().softmax(0)
    torch.testing.assert_close(counts / 4000, shares, atol=0.02, rtol=0)
    meta.choose(2)
    assert meta.chosen.sum() == 2
    losses = torch.rand(6)
    value = meta(losses)
    torch.testing.assert_close(value, losses[meta.chosen].mean())
    value.backward()
    phi = meta.task_logits.detach()
    expected = torch.func.grad(lambda phi: (2 * phi.sigmoid() * losses).mean())(phi)
    torch.testing.assert_close(meta.task_logits.grad, expected)


@pytest.mark.parametrize(("given", "expected"), [({"select": 6}, 6), ({}, 5)])
def test_each_round_has_another_choice(home, given, expected):
    choices = []

    def note(run):
        choices.append(tuple(run.meta.chosen.nonzero()[:, 0].tolist()))

    metapt.Training(make(home, baselines.Selection, **given), learn=True).run(note)
    assert {len(tasks) for tasks in choices} == {expected}
    assert len(set(choices)) > 3


def test_agnostic_validates_on_the_tasks_that_the_round_left_out(home):
    made = make(home, baselines.Selection, select=8, agnostic=True)
    network, head, meta = modules(made)
    made.begin_episode(meta)
    index = torch.arange(12)
    loss = made.finetune_loss(network, head, "validation", index)
    left_out = (~meta.chosen).nonzero()[:, 0]
    assert len(left_out) == 12
    outputs = head(network.eval()(made.inputs("validation", index), features=True))
    labels = made.graphs.labels(made.rows["validation"][:12], made.pretrain_tasks[left_out])
    expected = cross_entropy(outputs[:, 40 + left_out], labels).mean().item()
    value = loss(metapt.detached(network), metapt.detached(head)).item()
    assert value == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        (ppi.PPI, {}),
        (ppi.BGRL, {"momentum": 0.9}),
        (baselines.Selection, {"select": 6}),
        (baselines.Selection, AGNOSTIC),
    ],
)
def test_a_run_that_goes_on_ends_as_if_it_had_not_stopped(home, tmp_path, kind, given):
    def keep(run):
        torch.save(run.state_dict(), tmp_path / f"{run.step}.pt")

    whole = metapt.Training(make(home, kind, **given), learn=True).run(keep)
    second = metapt.Training(make(home, kind, **given), learn=True)
    second.load_state_dict(torch.load(tmp_path / "12.pt", weights_only=True))
    assert second.step == 12
    second.run()
    for name in ("network", "meta"):
        expected = flat(getattr(whole, name).state_dict())
        assert torch.equal(flat(getattr(second, name).state_dict()), expected)


# ------------------------------------------------------------------------------------------------
# Settings


def test_the_paper_preset_is_the_published_protocol(home):
    settings = metapt.make_settings(ppi.PPI, {}, "paper")
    published = {
        "width": 300,
        "layers": 5,
        "dropout": 0.2,
        "base_rates": False,
        "meta_train": True,
        # 100 epochs and one, of about 80,000 graphs
        "steps": 250_000,
        "warmup_steps": 2_500,
        "batch_size": 32,
        "lr": 1e-4,
        "unroll_batch_size": 32,
        "unroll_lr": 1e-4,
        "unroll_steps": 1,
        "unroll_hvp": "",
        "validation_batch_size": 32,
        "meta_every": 10,
        "meta_batch_size": 32,
        "meta_lr": 1.0,
        "solver": "neumann",
        "terms": 1,
        "alpha": 1e-4,
        "hvp": "exact",
        "measure_scope": "head",
        "measure_lr": 1e-4,
        "measure_epochs": 50,
        "measure_batch_size": 32,
    }
    assert {name: getattr(settings, name) for name in published} == published
    network = ppi.PPI(settings, CPU, home / "data").network()
    assert sum(p.numel() for p in network.parameters()) > 2_000_000


def test_ft_of_everything_trains_in_training_mode_with_its_own_dropout(home, monkeypatch):
    made = make(home, measure_scope="all", measure_steps=10)
    network, _, _ = modules(made)
    before = {name: b.clone() for name, b in network.named_buffers()}
    moving = []
    measured = set()
    spy(monkeypatch, made, "finetune_mode", moving.append)
    spy(
        monkeypatch,
        made,
        "targets",
        lambda part, index: measured.add((part, moving[-1].training)),
    )
    metapt.finetune(made, network, 100, 0)
    assert measured == {
        ("finetune", True),
        ("validation", False),
        ("test", False),
        ("broad", False),
    }
    assert moving[0].encoder.dropout == 0.5
    assert network.encoder.dropout == 0.2
    # A copy moved.
    assert all((b == before[name]).all() for name, b in network.named_buffers())


# ------------------------------------------------------------------------------------------------
# φ by name


@pytest.mark.parametrize("kind", [ppi.PPI, baselines.WeightedCoTrain, baselines.Selection])
def test_phi_from_a_table_is_the_inverse_of_the_table(home, kind):
    made = make(home, kind)
    _, _, meta = modules(made)
    nn.init.normal_(meta.task_logits)
    _, rows = made.table(meta)
    phi = made.phi_from_table([row[-1] for row in rows])
    assert phi["task_logits"].dtype == torch.float32
    torch.testing.assert_close(phi["task_logits"], meta.task_logits.detach(), rtol=1e-4, atol=1e-5)
    other = made.meta()
    other.load_state_dict(phi)
    weights = [row[-1] for row in made.table(other)[1]]
    assert weights == pytest.approx([row[-1] for row in rows], rel=1e-5)


@pytest.mark.parametrize("weight", [0.0, 2.0, -0.5, math.inf, math.nan])
def test_a_weight_that_no_number_gives_is_refused(home, weight):
    made = make(home)
    with pytest.raises(metapt.BadInput, match="expected more than 0 and less than 2$"):
        made.phi_from_table([1.0] * 19 + [weight])


def test_without_task_weights_there_is_no_table(home):
    made = make(home, ppi.BGRL)
    meta = made.meta()
    assert made.table(meta) is None
    assert made.phi_from_table([0.3, 0.25]) is None
    assert made.figures(meta) == {}


def test_the_figure_shows_the_extremes_by_name(home):
    made = make(home)
    meta = ppi.TaskWeights(20)
    meta.task_logits.data = torch.linspace(-1, 1, 20)
    figure = Figure()
    made.figures(meta)["tasks.png"](figure)
    bars, points = figure.axes
    terms = [f"GO:{task}" for task in made.pretrain_tasks.tolist()]
    assert [text.get_text() for text in bars.get_yticklabels()] == terms
    widths = [bar.get_width() + 1 for bar in bars.patches]
    assert widths == pytest.approx(meta.weights().tolist())
    positives = made.graphs.labels(made.rows["pretrain"], made.pretrain_tasks).sum(0)
    assert points.lines[0].get_xdata().tolist() == positives.tolist()


def test_terms_that_matplotlib_cannot_draw_are_drawn_otherwise():
    rows = [("\ud800", 1.5), ("a$b", 0.5)]
    figure = Figure()
    ppi.draw_tasks(figure, rows, np.array([3, 4]), np.zeros(2, bool))
    figure.canvas.draw()
    names = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert names == [r"a\$b", "?"]


def test_where_all_weights_are_alike_the_figure_says_so_in_a_sentence(home):
    made = make(home)
    figure = Figure()
    made.figures(made.meta())["tasks.png"](figure)
    assert not figure.axes
    (text,) = figure.texts
    expected = "φ tells no PT task from another: all 20 have the weight 1"
    assert text.get_text() == expected


def test_permuted_tasks_are_red_on_both_sides(home):
    made = make(home, permuted=0.3)
    meta = ppi.TaskWeights(20)
    meta.task_logits.data = torch.linspace(-1, 1, 20)
    figure = Figure()
    made.figures(meta)["tasks.png"](figure)
    bars, points = figure.axes
    colours = {bar.get_facecolor() for bar, p in zip(bars.patches, made.permuted, strict=True) if p}
    others = {bar.get_facecolor() for bar, p in zip(bars.patches, ~made.permuted, strict=True) if p}
    assert len(colours) == len(others) == 1
    assert colours != others
    by_label = {line.get_label(): len(line.get_xdata()) for line in points.lines}
    assert by_label == {"labels as they are": 14, "labels permuted": 6}


# ------------------------------------------------------------------------------------------------
# Commands


@pytest.fixture(scope="module")
def run(home):
    """The folder, and the summary of a run in it."""
    return home, summary_of(home, "meta", "ppi", "--out", "run", *options(TINY))


def read_table(path: Path) -> tuple[list[str], list[list[str]]]:
    with path.open(newline="") as file:
        titles, *rows = csv.reader(file)
    return titles, rows


def test_meta_ends_in_a_summary_figures_and_weights_by_term(run):
    home, summary = run
    comparison = summary["comparison"]
    assert [row["method"] for row in comparison[:8:2]] == list(metapt.METHODS)
    metrics = 8 * ["mean AUROC"] + 8 * ["mean AUROC, proteins in PT"]
    assert [row["metric"] for row in comparison] == metrics
    assert all(0 <= row["mean"] <= 1 for row in comparison)
    assert summary["phi"]["task_logits"]["shape"] == [20]
    assert summary["meta_steps"] == 5
    expected = {"tasks.png", "phi.png", "losses.png", "comparison.png", "checkpoint.pt"}
    assert expected <= set(contents(home / "run"))
    titles, rows = read_table(home / "run" / "phi.csv")
    phi = torch.load(home / "run" / "checkpoint.pt")["phi"]["task_logits"]
    assert titles == ["GO term", "weight"]
    tasks = make(home).pretrain_tasks.tolist()
    assert [term for term, _ in rows] == [f"GO:{task}" for task in tasks]
    weights = [float(weight) for _, weight in rows]
    assert weights == pytest.approx((2 * phi.sigmoid()).tolist())


def test_weights_by_hand_are_taken_by_term(run, tmp_path):
    home, _ = run
    _, rows = read_table(home / "run" / "phi.csv")
    terms = [term for term, _ in rows]
    # In another order: the names say which is which.
    by_hand = {term: 0.1 * (i + 1) for i, term in enumerate(sorted(terms)[:19])}
    path = tmp_path / "hand.csv"

    def write(weights):
        lines = [f"{term},{weight}\n" for term, weight in weights.items()]
        path.write_text("GO term,weight\n" + "".join(lines))

    command = ["pretrain", "ppi", "--phi", path, *PRETRAIN, "--steps=4", "--compare=0"]
    write(by_hand)
    (lacking,) = set(terms) - set(by_hand)
    said = refused(home, *command)
    assert f"its names are not those of PPI: {lacking}" in said
    write({**by_hand, lacking: 2})
    assert "has the weight 2, expected more than 0 and less than 2" in refused(home, *command)
    write({**by_hand, lacking: 0.5})
    code, _, err = main_in(home, *command, "--out", tmp_path / "run")
    assert code == 0, err
    _, rows = read_table(tmp_path / "run" / "phi.csv")
    weights = {term: float(weight) for term, weight in rows}
    assert weights == pytest.approx({**by_hand, lacking: 0.5}, rel=1e-5)


def test_pretrain_finetune_and_eval(run, tmp_path):
    home, _ = run
    for name in ("CoTrain", "PCGrad", "Selection"):
        given = [f"{BASELINES}:{name}", "--out", tmp_path / name, *PRETRAIN]
        summary = summary_of(home, "pretrain", *given)
        assert summary["pt_steps"] == 24
        methods = {row["method"] for row in summary["comparison"]}
        assert methods == {"no_pretraining", "default_phi"}
    given = ["--phi", "run", "--use=learned", "--out", tmp_path / "phi", *PRETRAIN]
    summary = summary_of(home, "pretrain", "ppi", *given)
    methods = {row["method"] for row in summary["comparison"]}
    assert methods == {"no_pretraining", "learned_phi"}
    given = ["--compare", 1, "--measure-steps", 10, "--sizes", "30"]
    summary = summary_of(home, "finetune", "run", *given, "--out", tmp_path / "ft")
    assert len(summary["comparison"]) == 4
    summary = summary_of(home, "eval", "run", tmp_path / "phi", *given, "--out", tmp_path / "eval")
    assert len(summary["differences"]) == 4
    given = ["--out", tmp_path / "chosen", *options({**TINY, **AGNOSTIC})]
    chosen = summary_of(home, "meta", f"{BASELINES}:Selection", *given)
    assert chosen["phi"]["task_logits"]["max"] > 0.05


def test_a_run_stays_with_its_source(run, tmp_path):
    home = Path(shutil.copytree(run[0], tmp_path / "home"))
    given = ("eval", "run", "--compare", 1, "--measure-steps", 10, "--sizes", "30")
    before = summary_of(home, *given)["comparison"]
    # What a new run would take.
    write_graphs(home / "data" / "ppi" / "published", seed=1)
    assert make(home).settings.source == "published"
    assert summary_of(home, *given)["comparison"] == before
    said = refused(home, "meta", "--resume", "run", "--source", "published")
    assert "--source" in said


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--unseen-tasks=40"], "--unseen-tasks"),
        (["--unseen-tasks=10", "--fold=4"], "--unseen-tasks"),
        (["--fold=-1"], "--fold"),
        (["--ft-share=0"], "--ft-share"),
        (["--ft-share=nan"], "--ft-share"),
        (["--layers=0"], "--layers"),
        (["--width=0"], "--width"),
        (["--dropout=1"], "--dropout"),
        (["--select=3"], "--select"),
        ([f"{BASELINES}:Selection", "--select=20"], "--select"),
    ],
)
def test_bad_input_is_one_line(home, tmp_path, given, message):
    domain = [] if ".py" in given[0] else ["ppi"]
    assert message in refused(home, "meta", *domain, *given, "--out", tmp_path / "no")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("source", "command"),
    [
        ("", "download ppi"),
        ("published", "download ppi"),
        ("string-yeast", "download ppi string-yeast --from DIR"),
        ("fly", "download ppi string-yeast --from DIR --name fly"),
    ],
)
def test_missing_data_are_told_with_the_command_that_prepares_them(tmp_path, source, command):
    said = refused(tmp_path, "meta", "ppi", f"--source={source}")
    path = f"data/ppi/{source or 'published'}/about.json"
    assert f"{path} is missing: 'python metapt.py {command}'" in said


@pytest.mark.parametrize(
    ("given", "message"),
    [({"tasks": 30}, "too few"), ({"species": (4932, 10090)}, "without human")],
)
def test_graphs_that_cannot_be_divided_are_refused(tmp_path, given, message):
    write_graphs(tmp_path / "data" / "ppi" / "string-yeast", **given)
    assert message in refused(tmp_path, "meta", "ppi")


@pytest.mark.skipif(not YEAST.exists(), reason="needs the yeast graphs")
def test_yeast_from_download_to_summary(tmp_path, capfd):
    code, _, _ = main_in(tmp_path, "download", "ppi", "string-yeast", "--from", YEAST)
    assert code == 0, capfd.readouterr().err
    given = {**TINY, "width": 16, "steps": 40, "batch_size": 64, "sizes": "300"}
    summary = summary_of(tmp_path, "meta", "ppi", "--out", "run", *options(given))
    assert summary["phi"]["task_logits"]["shape"] == [940]
    assert all(row["mean"] > 0.52 for row in summary["comparison"])
    _, rows = read_table(tmp_path / "run" / "phi.csv")
    assert all(re.fullmatch(r"GO:\d{7}", term) for term, _ in rows)
