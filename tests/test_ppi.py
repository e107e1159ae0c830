"""The PPI domain: prepared graphs, the GIN beside PyG's messages, parts, losses and their hypergradient, what may be seen
before FT, baselines, commands. Generated graphs, and the yeast graphs where there are any."""

import copy
import csv
import itertools
import json
import math
import re
import shutil
from pathlib import Path

import matplotlib.figure
import numpy as np
import pytest
import torch
from datasets import generated, write_graphs
from graphs import RawGraphs, prepare_graphs
from sklearn.metrics import roc_auc_score
from tools import ROOT, SHARED, contents, flat, main_in, options, pipeline_of, refused, summary_of
from torch import nn

import metapt
from bench.counting import peak
from bench.domains import ppi
from bench.domains import ppi_baselines as baselines
from bench.plain_gin import PlainGIN, plain_batch

YEAST = SHARED / "ppi" / "string-yeast"
TINY = {"width": 8, "layers": 2, "steps": 24, "warmup": 4, "meta_every": 4, "compare": 1, "measure_steps": 20,
        "meta_lr": 0.1, "batch_size": 16, "meta_batch_size": 16}  # fmt: skip
PRETRAIN = [o for o in options(TINY) if "meta" not in o and "warmup" not in o]
SEVERAL = {"finetune_terms": 40, "species": (9606, 4932, 10090)}
BASELINES = ROOT / "bench" / "domains" / "ppi_baselines.py"
CPU, GRAPHS, TASKS = torch.device("cpu"), torch.arange(300), torch.arange(60)  # what there are


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
    raw = generated(graphs=len(labels), tasks=labels.shape[1])._replace(labels=labels.astype(np.int64))
    terms = [str(i) for i in range(labels.shape[1])]
    prepare_graphs(folder, [raw], terms, finetune_terms, source="generated", licence="none")


def relabel(made, rows, tasks) -> None:
    """The opposite labels, of some proteins and tasks."""
    labels = made.graphs.labels(GRAPHS, TASKS)
    labels[rows[:, None], tasks] = 1 - labels[rows[:, None], tasks]
    made.graphs.bits = torch.from_numpy(np.packbits(labels.bool().numpy(), axis=1, bitorder="little"))


def modules(made) -> tuple:
    torch.manual_seed(0)
    return made.network(), made.head(), made.meta()


# Graphs


def test_labels_are_those_of_the_source(home):
    raw, graphs = generated(), make(home).graphs
    index, tasks = torch.tensor([7, 250, 7, 0]), torch.tensor([0, 7, 8, 59, 3])
    np.testing.assert_array_equal(graphs.labels(index, tasks).numpy(), raw.labels[index][:, tasks])
    np.testing.assert_array_equal(graphs.positives(GRAPHS, TASKS), raw.labels.sum(0))


@pytest.mark.parametrize(("name", "value"), [
    ("graphs", 299), ("nodes", 5), ("edges", 5), ("tasks", 61), ("tasks", "60"), ("terms", ["GO:1"]), ("terms", 3),
    ("finetune_terms", 60), ("finetune_terms", -1), ("finetune_terms", None), ("arrays", {}),
])  # fmt: skip
def test_counts_that_do_not_fit_the_arrays_are_refused(home, tmp_path, name, value):
    folder = Path(shutil.copytree(home / "data" / "ppi" / "string-yeast", tmp_path / "g"))
    about = json.loads((folder / "about.json").read_text())
    ppi.Graphs(folder, CPU, "")
    (folder / "about.json").write_text(json.dumps({**about, name: value}))
    with pytest.raises(metapt.BadInput, match=r"^\S+/g\S* is not what 'a command' wrote: "):
        ppi.Graphs(folder, CPU, "a command")


@pytest.mark.parametrize("layers", [1, 3])
def test_gin_equals_edgewise_messages(home, layers):
    """Outputs, gradients of every parameter, BatchNorm's statistics, second derivatives: beside PyG's MessagePassing,
    on the source's own edges."""
    raw, index = generated(), torch.tensor([3, 8, 120, 299, 41, 77, 8])
    assert raw.degrees[index].min() == 0  # a graph of one node
    torch.manual_seed(0)
    fast, curvature = ppi.GIN(6, layers, 0.0).double(), []
    plain, batch, data = PlainGIN(fast), make(home).graphs.batch(index), plain_batch(raw, index.numpy())
    for train in (True, True, False):
        fast.train(train), plain.train(train)
        a, b = fast(batch), plain(data)
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
        for x, y in zip(fast.buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)
    direction = torch.randn_like(a)
    for module, inputs in ((fast, batch), (plain, data)):
        parameters = plain.in_order_of(fast) if module is plain else list(fast.parameters())
        value = (module.train()(inputs) * direction).pow(2).sum()
        gradient = torch.autograd.grad(value, parameters, create_graph=True)
        torch.manual_seed(1)
        product = sum((g * torch.randn_like(g)).sum() for g in gradient)
        curvature.append((*gradient, *torch.autograd.grad(product, parameters)))
    for x, y in zip(*curvature, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-10 * max(1.0, y.abs().max().item()))


def test_gin_keeps_fewer_bytes_for_backward(tmp_path):
    """At the published averages: 40 nodes and 730 directed edges a graph."""
    random = np.random.default_rng(0)
    upper = [np.triu(random.random((40, 40)) < 0.468, 1) for _ in range(8)]
    edges = [np.stack(np.nonzero(u | u.T)) for u in upper]
    degrees = np.array([e.shape[1] for e in edges])
    features = (random.random((degrees.sum(), 9)) < 0.3).astype(np.float32)
    raw = RawGraphs(np.full(8, 40), degrees, np.concatenate(edges, 1), features, np.zeros(8, int), np.full(8, 9606),
                    np.zeros((8, 8), int))  # fmt: skip
    prepare_graphs(tmp_path / "g", [raw], list("abcdefgh"), 0, source="generated", licence="none")
    batch, fast = ppi.Graphs(tmp_path / "g", CPU, "").batch(torch.arange(8)), ppi.GIN(60, 5, 0.0)
    plain, data = PlainGIN(fast), plain_batch(raw, np.arange(8), torch.float32)
    both = ((fast, batch), (plain, data))
    ours, theirs = (peak(lambda f=f, x=x: f(x).sum().backward(), data=True) for f, x in both)
    assert 1.6 * ours < theirs, (ours, theirs)


@pytest.mark.parametrize("given", [{"finetune_terms": 40}, SEVERAL], ids=["one species", "several"])
def test_parts(tmp_path, given):
    write_graphs(tmp_path / "data" / "ppi" / "published", **given)
    a, b, c = (make(tmp_path, seed=seed) for seed in (0, 0, 1))
    rows = {part: set(r.tolist()) for part, r in a.rows.items()}
    assert all((a.rows[part] == b.rows[part]).all() for part in rows)
    assert a.data_digest() == b.data_digest() != c.data_digest()
    assert set(c.rows["finetune"].tolist()) != rows["finetune"]
    assert a.sizes == {part: len(r) for part, r in rows.items()}
    assert rows["pretrain"] == rows["finetune"] | rows["validation"] | rows["broad"]
    assert sum(len(rows[p]) for p in ("finetune", "validation", "broad", "test")) == 300
    assert rows["pretrain"] | rows["test"] == set(range(300))
    assert not rows["pretrain"] & rows["test"]
    assert abs(len(rows["validation"]) / (len(rows["validation"]) + len(rows["finetune"])) - 0.15) < 0.01
    assert abs(len(rows["test"]) - len(rows["broad"])) <= 1
    if given is SEVERAL:
        assert rows["test"] | rows["broad"] == set((a.graphs.species == 9606).nonzero()[:, 0].tolist())
    else:
        assert len(rows["test"] | rows["broad"]) == 90
    assert sorted(a.finetune_tasks.tolist()) == list(range(20, 60))
    assert a.pretrain_tasks.tolist() == list(range(20))
    a.graphs.about["source"] = "other graphs"
    assert a.data_digest() != b.data_digest()


def test_finetuning_terms_are_drawn_among_those_with_sixty_positives(tmp_path):
    labels = np.random.default_rng(0).random((300, 90)) < 0.4
    labels[:, ::2] &= np.arange(300)[:, None] < 100  # fewer than 60
    write(tmp_path / "data" / "ppi" / "string-yeast", labels)
    enough = np.flatnonzero(labels.sum(0) >= 60)
    assert 40 < len(enough) <= 50
    drawn = [make(tmp_path, seed=seed) for seed in range(3)]
    for made in drawn:
        assert len(set(made.finetune_tasks.tolist())) == 40
        assert set(made.finetune_tasks.tolist()) <= set(enough.tolist())
        assert sorted([*made.pretrain_tasks.tolist(), *made.finetune_tasks.tolist()]) == list(range(90))
    assert len({tuple(sorted(made.finetune_tasks.tolist())) for made in drawn}) == 3


def test_the_test_part_is_stratified_by_the_rarest_finetuning_term(tmp_path):
    random = np.random.default_rng(0)
    rarest = random.permutation(np.repeat(np.arange(39), 60))  # each protein has one of these, and the term of all
    labels = np.concatenate([random.random((2340, 20)) < 0.9, np.eye(39, dtype=bool)[rarest], np.ones((2340, 1))], 1)
    write(tmp_path / "data" / "ppi" / "published", labels, 40)
    made = make(tmp_path)
    for part, share in {"test": 9, "broad": 9, "validation": 6.3}.items():  # of 60
        counts = made.graphs.positives(made.rows[part], torch.arange(20, 59))
        assert np.abs(counts - share).max() <= 1


def test_folds_of_unseen_tasks_are_disjoint_and_cover_all(home):
    folds = [make(home, unseen_tasks=10, fold=fold) for fold in range(4)]
    assert sorted(itertools.chain(*(made.scored.tolist() for made in folds))) == list(range(40))
    for made in folds:
        assert sorted([*made.scored.tolist(), *made.seen.tolist()]) == list(range(40))
    outputs, targets = torch.randn(50, 40), (torch.rand(50, 40) < 0.4).float()
    moved = outputs.clone()
    moved[:, made.seen] += torch.randn(50, 30)
    assert made.score(outputs, targets) == made.score(moved, targets)
    assert made.loss(outputs, targets) == made.loss(moved, targets)
    assert make(home).loss(outputs, targets) != make(home).loss(moved, targets)


def test_the_score_is_the_mean_auroc_of_the_tasks_with_both_classes(home):
    random, made = np.random.default_rng(0), make(home)
    labels = random.random((80, 40)) < 0.2
    labels[:, 3], labels[:, 5] = False, True
    scores = random.normal(size=(80, 40)).round(1) + labels  # with ties
    wanted = np.mean([roc_auc_score(labels[:, t], scores[:, t]) for t in range(40) if t not in (3, 5)])
    assert made.score(torch.tensor(scores), torch.tensor(labels).float()) == pytest.approx(wanted, abs=1e-12)
    assert math.isnan(made.score(torch.zeros(4, 40), torch.ones(4, 40)))
    labels[:, 1:] = True  # one task is left
    one = roc_auc_score(labels[:, 0], scores[:, 0])
    assert made.score(torch.tensor(scores), torch.tensor(labels).float()) == pytest.approx(one, abs=1e-12)


@pytest.mark.parametrize("part", ["test", "broad"])
def test_both_halves_of_the_test_proteins_are_scored(home, part):
    made = make(home)
    network = modules(made)[0]
    before = metapt.finetune(made, network, 100, 0)
    relabel(made, made.rows[part], made.finetune_tasks)  # an AUROC a becomes 1 − a
    after = metapt.finetune(made, network, 100, 0)
    assert set(before.scores) == {"test", "broad"}
    wanted = {**before.scores, part: 1 - before.scores[part]}
    assert after.scores == pytest.approx(wanted, abs=1e-12)
    assert abs(before.scores[part] - 0.5) > 0.01


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
    value = made.pretrain_loss(network, meta, index, 0.0, live=live)(metapt.detached(network), metapt.detached(meta))
    losses = cross_entropy(outputs[:, :20], made.graphs.labels(rows, made.pretrain_tasks))
    wanted = [(2 * meta.task_logits.sigmoid() * losses).mean().item()]
    known = torch.isin(rows, made.rows["finetune"][: round(0.5 * made.sizes["finetune"])])
    assert 0 < known.sum() < 40
    if kind is not ppi.PPI:
        labels = made.graphs.labels(rows[known], made.finetune_tasks[torch.cat([TASKS[:10], TASKS[20:40]])])
        wanted.append(cross_entropy(outputs[known, 20:], labels).mean().item())
    assert value.tolist() == pytest.approx(wanted if kind is baselines.PCGrad else sum(wanted), rel=1e-5)


def test_weighted_cotrain_begins_as_cotrain(home):
    made = {kind: make(home, kind, dropout=0.0) for kind in (baselines.CoTrain, baselines.WeightedCoTrain)}
    index, values = torch.arange(40), []
    for domain in made.values():
        torch.manual_seed(0)
        network, _, meta = modules(domain)
        loss = domain.pretrain_loss(network, meta, index, 0.0, live=True)
        values.append(loss(metapt.detached(network), metapt.detached(meta)).item())
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    assert len(metapt.detached(meta)["task_logits"]) == 20 + 40


def test_outputs_begin_at_the_base_rates(home):
    """The log-odds of each PT term's share; for FT's head, which may know few labels, those of the PT terms' mean."""
    made = make(home)
    rates = made.graphs.labels(made.rows["pretrain"], made.pretrain_tasks).sum(0).add(0.5) / (
        made.sizes["pretrain"] + 1
    )
    torch.testing.assert_close(made.network().head.bias.detach(), (rates / (1 - rates)).log())
    torch.testing.assert_close(made.head().bias.detach(), rates.mean().logit().expand(40))
    plain = make(home, base_rates=False)
    assert plain.network().head.bias.abs().max() <= 0.25 and plain.head().bias.abs().max() <= 0.25
    both = make(home, baselines.CoTrain)
    labels = both.graphs.labels(both.rows["finetune"], both.finetune_tasks).sum(0).add(0.5) / (
        both.sizes["finetune"] + 1
    )
    torch.testing.assert_close(both.network().head.bias.detach()[20:], labels.logit())


def test_permuted_tasks_keep_their_rates_and_nothing_else(home):
    plain, made = make(home), make(home, permuted=0.5)
    everything = torch.arange(len(made.graphs.sizes))
    of = {domain: domain.graphs.labels(everything, domain.pretrain_tasks) for domain in (plain, made)}
    assert made.permuted.sum() == 10 and not plain.permuted.any()
    assert torch.equal(of[plain].sum(0), of[made].sum(0))
    same = (of[plain] == of[made]).all(0).numpy()
    assert (same == ~made.permuted).all()
    for part in ("finetune", "validation", "test"):
        index = torch.arange(made.sizes[part])
        assert torch.equal(plain.targets(part, index), made.targets(part, index))
    assert plain.data_digest() != made.data_digest()


@pytest.mark.parametrize("kind", [ppi.PPI, baselines.CoTrain, baselines.WeightedCoTrain])
def test_hypergradient_is_that_of_central_differences(home, kind, monkeypatch):
    """−vᵀ∇²_θφ L_PT, where v is dL_V/dθ through Adam's second step on ψ, in random directions."""
    made = make(home, kind, dropout=0.0, unseen_tasks=10)
    labels = made.graphs.labels
    monkeypatch.setattr(made.graphs, "labels", lambda *which: labels(*which).double())
    network, head, meta = (module.double() for module in modules(made))
    nn.init.normal_(meta.task_logits)
    index = torch.arange(60)
    pretrain = made.pretrain_loss(network, meta, index, 0.0, live=False)
    *steps, validate = (made.finetune_loss(network, head, part, i) for part, i in (
        ("finetune", index[:30]), ("finetune", index[30:]), ("validation", index[:30])))  # fmt: skip
    theta, psi, phi = (metapt.detached(module) for module in (network, head, meta))

    def hypergradient(step, psi, state, hvp="exact"):
        unroll, solver = metapt.Unroll(1, 0.1, optimizer="adam"), metapt.Solver("identity", hvp=hvp)
        return metapt.hypergradient(
            pretrain, step, validate, theta, psi, phi, unroll=unroll, solver=solver, ft_state=state
        )

    first = hypergradient(steps[0], psi, None)
    found, finite = (hypergradient(steps[1], first.psi, first.ft_state, hvp) for hvp in ("exact", "finite"))
    assert torch.cosine_similarity(flat(found.phi), flat(finite.phi), dim=0) > 0.9999
    assert not torch.equal(flat(found.phi), flat(finite.phi))

    def after_finetuning(moved):
        leaves = {name: p.clone().requires_grad_() for name, p in psi.items()}
        adam = torch.optim.Adam(leaves.values(), lr=0.1)
        for loss, at in zip(steps, (theta, moved), strict=True):
            adam.zero_grad()
            loss(at, leaves).backward()
            adam.step()
        return validate(moved, leaves).item()

    def difference(f, at, direction, by):
        ahead, behind = ({name: p + e * direction[name] for name, p in at.items()} for e in (by, -by))
        return (f(ahead) - f(behind)) / (2 * by)

    length, along = flat(found.q).norm(), {name: q / flat(found.q).norm() for name, q in found.q.items()}

    def change_of_pretraining(phi):
        return length * difference(lambda theta: pretrain(theta, phi), theta, along, 1e-6)

    for _ in range(3):
        direction = {name: torch.randn_like(p) for name, p in theta.items()}
        wanted = difference(after_finetuning, theta, direction, 1e-7)
        assert (flat(found.q) @ flat(direction)).item() == pytest.approx(wanted, rel=1e-4)
        direction = {name: torch.randn_like(p) for name, p in phi.items()}
        wanted = -difference(change_of_pretraining, phi, direction, 3e-3).item()
        assert (flat(found.phi) @ flat(direction)).item() == pytest.approx(wanted, rel=1e-4)


# BGRL


def bgrl(home, **given):
    """In float64, the target held where the online network is not; and six graphs, one of them without edges."""
    made = make(home, ppi.BGRL, **{"width": 4, **given})
    network, _, meta = (module.double() for module in modules(made))
    network.target.mul_(1.1).add_(0.1 * torch.randn_like(network.target))
    meta.edges.data, meta.features.data = torch.randn(2, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    index = torch.tensor([3, 120, 199, 41, 77, *(made.graphs.degrees[made.rows["pretrain"]] == 0).nonzero()[0]])
    return made, network, meta, index


def looped_views(meta, batch) -> list:
    """Of both views the sums [nodes, 10] and how much is kept of each edge [to, from]."""
    nodes, views = len(batch.sums), []
    ends = [*batch.start.tolist()[1:], len(batch.source)]
    for view in range(2):
        draws = torch.rand(len(batch.source), dtype=torch.float64), torch.rand(len(batch.size), 9, dtype=torch.float64)
        dropped = [p[view].sigmoid().item() for p in (meta.edges, meta.features)]

        def keep(u, p):
            return 1 / (1 + (p / (1 - p) * (1 - u) / u) ** 2)

        kept, sums = torch.zeros(nodes, nodes, dtype=torch.float64), torch.zeros(nodes, 10, dtype=torch.float64)
        for i in range(nodes):
            edges = range(batch.start[i], ends[i])
            for e in edges:
                kept[i, batch.source[e]] += keep(draws[0][e].item(), dropped[0])
            for f in range(9):
                of_edges = batch.sums[i, f].item() - (f == 7)
                mask = keep(draws[1][batch.graph[i], f].item(), dropped[1])
                sums[i, f] = (f == 7) + of_edges * mask * (kept[i].sum() / len(edges) if edges else 0)
            sums[i, 9] = 1 + kept[i].sum()
        views.append((sums, kept))
    return views


def plain_nodes(gin, sums, kept) -> torch.Tensor:
    """The GIN in training mode, its messages as a dense matrix; then every column standardised."""
    x = gin.embedding.expand(len(sums), -1)
    for i, layer in enumerate(gin.layers):
        edges = sums[:, :9] @ layer.edge.weight.T + sums[:, 9:] * layer.edge.bias
        hidden = torch.cat([x + kept @ x, edges], 1) @ layer.first.weight.T + layer.first.bias
        hidden = (hidden - hidden.mean(0)) / (hidden.var(0, unbiased=False) + layer.norm.eps).sqrt()
        hidden = (hidden * layer.norm.weight + layer.norm.bias).clamp(min=0)
        x = hidden @ layer.second.weight.T + layer.second.bias
        x = x.clamp(min=0) if i + 1 < len(gin.layers) else x
    return (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt() * gin.last.weight + gin.last.bias


def test_bgrl_is_the_cosine_of_each_node_in_both_orders(home):
    made, network, meta, index = bgrl(home)
    theta, phi, batch = metapt.detached(network), metapt.detached(meta), made.inputs("pretrain", index)
    assert (batch.sums[:, 9] == 1).any() and len(batch.sums) > 20  # a node without neighbours
    torch.manual_seed(3)
    value = made.pretrain_loss(network, meta, index, 0.0, live=False)(theta, phi).item()
    target = copy.deepcopy(network.encoder)
    nn.utils.vector_to_parameters(network.target, target.parameters())
    torch.manual_seed(3)
    first, second = looped_views(meta, batch)
    total, (into, prelu, out) = 2.0, network.head
    for mine, theirs in ((first, second), (second, first)):
        h, z = plain_nodes(network.encoder, *mine) @ into.weight.T + into.bias, plain_nodes(target, *theirs)
        h = torch.where(h > 0, h, prelu.weight * h) @ out.weight.T + out.bias
        for a, b in zip(h, z, strict=True):
            total -= (a @ b / a.norm() / b.norm()).item() / len(h)
    assert value == pytest.approx(total, rel=1e-9)
    again = made.pretrain_loss(network, meta, index, 0.0, live=False)(theta, phi).item()
    assert again != pytest.approx(value)  # views are drawn anew


def test_a_view_drops_the_shares_that_it_should(home):
    share = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    kept = ppi.Drops.keep(share.logit(), 200_000)
    assert 0 <= kept.min() and kept.max() <= 1
    assert (kept < 0.5).double().mean().item() == pytest.approx(0.3, abs=0.005)
    assert torch.autograd.grad(kept.mean(), share)[0] < -0.5
    made = make(home, ppi.BGRL, layers=3, width=4)
    network, _, meta = modules(made)
    meta.edges.data[0], meta.features.data[0] = -50.0, -50.0  # nothing is dropped
    batch = made.inputs("pretrain", GRAPHS[:20])._replace(by_node=True)
    whole, dropped = meta(batch)
    torch.testing.assert_close(network.eval()(whole), network(batch))
    assert not torch.allclose(network(dropped), network(batch), rtol=0.1)


def test_with_the_target_held_the_hypergradient_is_that_of_the_pipeline(home):
    """PT to its end under φ (with a pull to where it began, so that there is one), FT, L_V: against central differences."""
    made, network, meta, index = bgrl(home)
    labels, pull, step = made.graphs.labels, 1000.0, 1e-6
    made.graphs.labels = lambda *which: labels(*which).double()
    head = made.head().double()
    nn.init.normal_(network.head[2].weight)  # no prediction is near 0
    begin, psi, phi = (metapt.detached(module) for module in (network, head, meta))
    free = made.pretrain_loss(network, meta, index, 0.0, live=False)
    finetune, validation = (made.finetune_loss(network, head, part, GRAPHS[:30]) for part in ("finetune", "validation"))
    pretrain, pretrained, pipeline = pipeline_of(free, finetune, validation, begin, psi, pull, 25)
    before, theta = network.target.clone(), pretrained(phi)
    torch.manual_seed(4)
    found = metapt.hypergradient(pretrain, finetune, validation, theta, psi, phi, unroll=metapt.Unroll(1, 0.1),
                                 solver=metapt.Solver("cg", terms=50))  # fmt: skip
    for name, p in phi.items():
        for view in torch.eye(2, dtype=torch.float64):
            ends = [pipeline({**phi, name: p + by * view}) for by in (step, -step)]
            wanted = (ends[0] - ends[1]) / (2 * step)
            assert (found.phi[name] @ view).item() == pytest.approx(wanted, rel=1e-3), name
    assert torch.equal(network.target, before)


def test_the_target_follows_the_encoder_a_step_behind_and_is_no_part_of_theta(home):
    learner = metapt.Learner(make(home, ppi.BGRL, momentum=0.8, lr=1e-2))
    network, target = learner.network, flat(learner.network.encoder)
    assert "target" in network.state_dict() and "target" not in dict(network.named_parameters())
    norm = network.encoder.last
    seen = norm.num_batches_tracked.item()
    for _ in range(4):
        target = 0.8 * target + 0.2 * flat(network.encoder)
        learner.pretrain_step(1.0)
        torch.testing.assert_close(network.target, target)
        assert not torch.allclose(network.target, flat(network.encoder), atol=1e-3)
    assert norm.num_batches_tracked == seen + 2 * 4  # two views a step: the target's passes change no statistics
    before = {name: b.clone() for name, b in network.named_buffers()}
    learner.meta_step(1.0)
    assert all(torch.equal(b, before[name]) for name, b in network.named_buffers())


def test_the_target_runs_as_the_online_network_does(home, monkeypatch):
    """In lower precision, and compiled: two views in both networks; then the head beside PT."""
    learner = metapt.Learner(make(home, ppi.BGRL, precision="bf16", compile=True, hvp="finite"))
    dtypes, compiled = [], []
    learner.network.encoder.layers[0].register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    run = lambda *call: compiled.append(call[0]) or torch.func.functional_call(*call)
    monkeypatch.setattr(metapt, "compiled_call", lambda: run)
    learner.pretrain_step(1.0)
    assert dtypes == [torch.bfloat16] * 5 and compiled == [learner.network] * 5


def test_bgrl_reads_no_labels_in_pretraining_and_has_no_options_of_labels(home, monkeypatch):
    made = make(home, ppi.BGRL)
    network, _, meta = modules(made)
    monkeypatch.setattr(made.graphs, "labels", None)
    assert made.pretrain_loss(network, meta, GRAPHS[:9], 0.0, live=True)(
        metapt.detached(network), metapt.detached(meta)
    ).isfinite()
    where = f"{ROOT / 'bench' / 'domains' / 'ppi.py'}:BGRL"
    for given in ({"permuted": 0.5}, {"meta_train": True}, {"momentum": 1.0}):
        assert f"--{next(iter(given)).replace('_', '-')}" in refused(home, "meta", where, *options({**TINY, **given}))
    found = summary_of(home, "meta", where, "--out", "bgrl", *options(TINY))
    assert {name: phi["shape"] for name, phi in found["phi"].items()} == {"edges": [2], "features": [2]}
    last = [json.loads(line) for line in (home / "bgrl" / "metrics.jsonl").read_text().splitlines()][-1]
    phi = torch.load(home / "bgrl" / "checkpoint.pt")["phi"]
    assert last["edges_1"] == pytest.approx(phi["edges"][0].sigmoid().item())
    assert {"phi.png", "comparison.png"} <= set(contents(home / "bgrl"))
    assert "phi.csv" not in contents(home / "bgrl")


# What may be seen before FT


def learned(made) -> torch.Tensor:
    return flat(metapt.Training(made, learn=True).run().best.meta)


UNSEEN, HALF, AGNOSTIC = {"unseen_tasks": 10, "fold": 1}, {"ft_share": 0.5}, {"select": 8, "agnostic": True}
HIDDEN = {
    "test proteins": ({}, lambda d: (d.rows["test"], d.finetune_tasks)),
    "broad proteins": ({}, lambda d: (d.rows["broad"], d.finetune_tasks)),
    "unseen tasks": (UNSEEN, lambda d: (GRAPHS, d.finetune_tasks[d.scored])),
    "half of FT": (HALF, lambda d: (d.rows["finetune"][d.access["finetune"] :], d.finetune_tasks)),
    "half of validation": (HALF, lambda d: (d.rows["validation"][d.access["validation"] :], d.finetune_tasks)),
    "agnostic": (AGNOSTIC, lambda d: (GRAPHS, d.finetune_tasks)),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_phi_is_learned_without_what_it_may_not_see(home, name):
    given, what = HIDDEN[name]
    kind = baselines.Selection if "select" in given else ppi.PPI
    same, other = make(home, kind, **given), make(home, kind, **given)
    relabel(same, *what(same))
    relabel(other, GRAPHS, other.seen_tasks if given is not AGNOSTIC else other.pretrain_tasks)
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

    def value():
        loss = made.pretrain_loss(network, meta, torch.arange(made.sizes["pretrain"]), 0.0, live=False)
        return loss(metapt.detached(network), metapt.detached(meta)).item()

    before = value()
    relabel(made, GRAPHS[~torch.isin(GRAPHS, allowed)], made.finetune_tasks)
    relabel(made, allowed, made.finetune_tasks[made.scored])
    assert value() == before
    relabel(made, allowed[:1], made.finetune_tasks[made.seen[:1]])
    assert (value() != before) == (kind is baselines.CoTrain)


# Baselines


@pytest.mark.parametrize(("a", "b", "sum_of_both"), [
    ([1.0, 0.0], [1.0, 1.0], [2.0, 1.0]), ([1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]), ([1.0, 0.0], [-1.0, 1.0], [0.5, 1.5]),
])  # fmt: skip
def test_pcgrad_takes_out_the_conflict(home, a, b, sum_of_both):
    """Two agreeing gradients, two opposed ones, and two of which each loses its part against the other."""
    theta = {"w": nn.Parameter(torch.tensor([1.0, 0.0])), "idle": nn.Parameter(torch.ones(2, 3))}
    made = make(home, baselines.PCGrad)
    made.backward(torch.stack([theta["w"] @ torch.tensor(a), theta["w"] @ torch.tensor(b)]), theta)
    assert theta["w"].grad.tolist() == pytest.approx(sum_of_both)
    assert not theta["idle"].grad.any()
    assert theta["idle"].grad.shape == (2, 3)


def test_selection_draws_k_tasks_in_proportion_and_lends_the_others_a_gradient(home):
    meta = baselines.TaskChoice(6)
    meta.task_logits.data = torch.tensor([0.0, 0.0, 0.0, 0.0, 2.0, -9.0])
    torch.manual_seed(0)

    def chosen(k):
        meta.choose(k)
        return meta.chosen

    draws = torch.stack([chosen(1) for _ in range(4000)]).float().mean(0)
    torch.testing.assert_close(draws, meta.task_logits.detach().softmax(0), atol=0.02, rtol=0)
    assert chosen(2).sum() == 2
    losses = torch.rand(6)
    value = meta(losses)
    torch.testing.assert_close(value, losses[meta.chosen].mean())
    value.backward()
    wanted = torch.func.grad(lambda phi: (2 * phi.sigmoid() * losses).mean())(meta.task_logits.detach())
    torch.testing.assert_close(meta.task_logits.grad, wanted)


@pytest.mark.parametrize(("given", "wanted"), [({"select": 6}, 6), ({}, 5)])
def test_each_episode_has_another_choice(home, given, wanted):
    seen = []
    training = metapt.Training(make(home, baselines.Selection, **given), learn=True)
    training.run(lambda t: seen.append(tuple(t.best.meta.chosen.nonzero()[:, 0].tolist())))
    assert {len(tasks) for tasks in seen} == {wanted}
    assert len(set(seen)) > 3


def test_agnostic_validates_on_the_tasks_that_the_episode_left_out(home):
    made = make(home, baselines.Selection, select=8, agnostic=True)
    network, head, meta = modules(made)
    made.begin_episode(meta)
    loss = made.finetune_loss(network, head, "validation", torch.arange(12))
    left_out = (~meta.chosen).nonzero()[:, 0]
    assert len(left_out) == 12
    outputs = head(network.eval()(made.inputs("validation", torch.arange(12)), features=True))
    labels = made.graphs.labels(made.rows["validation"][:12], made.pretrain_tasks[left_out])
    value = loss(metapt.detached(network), metapt.detached(head)).item()
    assert value == pytest.approx(cross_entropy(outputs[:, 40 + left_out], labels).mean().item(), rel=1e-5)


@pytest.mark.parametrize(("kind", "given"), [
    (ppi.PPI, {}), (ppi.BGRL, {"momentum": 0.9}), (baselines.Selection, {"select": 6}),
    (baselines.Selection, {**AGNOSTIC, "particles": "2:0.5,1"}),
])  # fmt: skip
def test_a_run_that_goes_on_ends_as_if_it_had_not_stopped(home, tmp_path, kind, given):
    def training():
        return metapt.Training(make(home, kind, **given), learn=True)

    states, whole = {}, training()
    whole.run(lambda t: states.setdefault(t.step, torch.save(t.state_dict(), tmp_path / f"{t.step}.pt")))
    assert 12 in states
    second = training()
    second.load_state_dict(torch.load(tmp_path / "12.pt", weights_only=True))
    assert second.step == 12
    second.run()
    for name in ("network", "meta"):
        assert torch.equal(*(flat(getattr(training.best, name).state_dict()) for training in (whole, second)))


def test_the_paper_preset_is_the_published_protocol(home):
    settings = metapt.settings_of(ppi.PPI, {}, "paper")
    published = {
        "width": 300, "layers": 5, "dropout": 0.2, "batch_size": 32, "lr": 1e-4, "meta_batch_size": 32,
        "unroll_batch_size": 32, "validation_batch_size": 32, "unroll_lr": 1e-4, "unroll_steps": 1, "meta_every": 10,
        "meta_lr": 1.0, "solver": "neumann", "terms": 1, "alpha": 1e-4, "hvp": "exact", "unroll_hvp": "", "base_rates": False, "meta_train": True,
        "steps": 250_000, "warmup": 2_500,  # 100 epochs and one, of about 80,000 graphs
        "measure_scope": "head", "measure_lr": 1e-4, "measure_epochs": 50, "measure_batch_size": 32,
    }  # fmt: skip
    assert {name: getattr(settings, name) for name in published} == published
    network = ppi.PPI(settings, CPU, home / "data").network()
    assert sum(p.numel() for p in network.parameters()) > 2_000_000


def test_full_transfer_trains_in_training_mode_with_its_own_dropout(home):
    made = make(home, measure_scope="all", measure_steps=10)
    network = modules(made)[0]
    before = {name: b.clone() for name, b in network.named_buffers()}
    moving, measured, transfer, targets = [], [], made.transfer, made.targets
    made.transfer = lambda network: moving.append(transfer(network)) or moving[-1]
    made.targets = lambda part, index: measured.append((part, moving[-1].training)) or targets(part, index)
    metapt.finetune(made, network, 100, 0)
    assert {("finetune", True), ("validation", False), ("test", False), ("broad", False)} == set(measured)
    assert moving[0].encoder.dropout == 0.5
    assert network.encoder.dropout == 0.2
    assert all((b == before[name]).all() for name, b in network.named_buffers())  # a copy moved


# Commands


@pytest.fixture(scope="module")
def run(home):
    return home, summary_of(home, "meta", "ppi", "--out", "run", *options(TINY))


def test_meta_ends_in_a_summary_figures_and_weights_by_term(run):
    home, summary = run
    assert [row["method"] for row in summary["comparison"][:8:2]] == list(metapt.METHODS)
    assert [row["metric"] for row in summary["comparison"]] == 8 * ["mean AUROC"] + 8 * ["mean AUROC, proteins in PT"]
    assert all(0 <= row["mean"] <= 1 for row in summary["comparison"])
    assert summary["phi"]["task_logits"]["shape"] == [20]
    assert summary["meta_steps"] == 5
    assert {"tasks.png", "phi.png", "losses.png", "comparison.png", "checkpoint.pt"} <= set(contents(home / "run"))
    with (home / "run" / "phi.csv").open() as file:
        titles, *rows = csv.reader(file)
    phi, made = torch.load(home / "run" / "checkpoint.pt")["phi"]["task_logits"], make(home)
    assert titles == ["GO term", "weight"]
    assert [term for term, _ in rows] == [f"GO:{task}" for task in made.pretrain_tasks.tolist()]
    assert [float(weight) for _, weight in rows] == pytest.approx((2 * phi.sigmoid()).tolist())


def test_the_figure_shows_the_extremes_by_name(home):
    made, meta = make(home), ppi.TaskWeights(20)
    meta.task_logits.data = torch.linspace(-1, 1, 20)
    figure = matplotlib.figure.Figure()
    made.figures(meta)["tasks.png"](figure)
    bars, points = figure.axes
    terms = [f"GO:{task}" for task in made.pretrain_tasks.tolist()]
    assert [text.get_text() for text in bars.get_yticklabels()] == terms
    assert [bar.get_width() + 1 for bar in bars.patches] == pytest.approx(meta.weights().tolist())
    positives = made.graphs.labels(made.rows["pretrain"], made.pretrain_tasks).sum(0)
    assert points.lines[0].get_xdata().tolist() == positives.tolist()


def test_pretrain_finetune_and_eval(run, tmp_path):
    home, _ = run
    for name in ("CoTrain", "PCGrad", "Selection"):
        summary = summary_of(home, "pretrain", f"{BASELINES}:{name}", "--out", tmp_path / name, *PRETRAIN)
        assert summary["pt_steps"] == 24
        assert {row["method"] for row in summary["comparison"]} == {"no_pretraining", "default_phi"}
    summary = summary_of(home, "pretrain", "ppi", "--phi", "run", "--use=learned", "--out", tmp_path / "phi", *PRETRAIN)
    assert {row["method"] for row in summary["comparison"]} == {"no_pretraining", "learned_phi"}
    given = ("--compare", 1, "--measure-steps", 10, "--sizes", "30")
    summary = summary_of(home, "finetune", "run", *given, "--out", tmp_path / "ft")
    assert len(summary["comparison"]) == 4
    summary = summary_of(home, "eval", "run", tmp_path / "phi", *given, "--out", tmp_path / "eval")
    assert len(summary["differences"]) == 4
    given = ("--out", tmp_path / "chosen", *options({**TINY, **AGNOSTIC}))
    chosen = summary_of(home, "meta", f"{BASELINES}:Selection", *given)
    assert chosen["phi"]["task_logits"]["max"] > 0.05


def test_a_run_stays_with_its_source(run, tmp_path):
    home = Path(shutil.copytree(run[0], tmp_path / "home"))
    given = ("eval", "run", "--compare", 1, "--measure-steps", 10, "--sizes", "30")
    before = summary_of(home, *given)["comparison"]
    write_graphs(home / "data" / "ppi" / "published", seed=1)  # what a new run would take
    assert make(home).settings.source == "published"
    assert summary_of(home, *given)["comparison"] == before
    assert "--source" in refused(home, "meta", "--resume", "run", "--source", "published")


@pytest.mark.parametrize(("given", "says"), [
    (["--unseen-tasks=40"], "--unseen-tasks"), (["--unseen-tasks=10", "--fold=4"], "--unseen-tasks"), (["--fold=-1"], "--fold"),
    (["--ft-share=0"], "--ft-share"), (["--ft-share=nan"], "--ft-share"), (["--layers=0"], "--layers"),
    (["--width=0"], "--width"), (["--dropout=1"], "--dropout"), (["--select=3"], "--select"), ([f"{BASELINES}:Selection", "--select=20"], "--select"),
])  # fmt: skip
def test_bad_input_is_one_line(home, tmp_path, given, says):
    domain = [] if ".py" in given[0] else ["ppi"]
    assert says in refused(home, "meta", *domain, *given, "--out", tmp_path / "no")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(("source", "command"), [
    ("", "download ppi'"), ("published", "download ppi'"), ("string-yeast", "download ppi --source string-yeast --from DIR'"),
    ("fly", "download ppi --source string-yeast --from DIR --name fly'"),
])  # fmt: skip
def test_missing_data_are_told_with_the_command_that_prepares_them(tmp_path, source, command):
    said = refused(tmp_path, "meta", "ppi", f"--source={source}")
    assert f"data/ppi/{source or 'published'}/about.json is missing: 'python metapt.py {command}" in said


@pytest.mark.parametrize(("given", "says"), [({"tasks": 30}, "too few"), ({"species": (4932, 10090)}, "without human")])
def test_graphs_that_cannot_be_divided_are_refused(tmp_path, given, says):
    write_graphs(tmp_path / "data" / "ppi" / "string-yeast", **given)
    assert says in refused(tmp_path, "meta", "ppi")


@pytest.mark.skipif(not YEAST.exists(), reason="needs the yeast graphs")
def test_yeast_from_download_to_summary(tmp_path, capfd):
    code, _, _ = main_in(tmp_path, "download", "ppi", "--source", "string-yeast", "--from", YEAST)
    assert code == 0, capfd.readouterr().err
    given = {**TINY, "width": 16, "steps": 40, "batch_size": 64, "sizes": "300"}
    summary = summary_of(tmp_path, "meta", "ppi", "--out", "run", *options(given))
    assert summary["phi"]["task_logits"]["shape"] == [940]
    assert all(row["mean"] > 0.52 for row in summary["comparison"])
    with (tmp_path / "run" / "phi.csv").open() as file:
        assert all(re.fullmatch(r"GO:\d{7}", term) for term, _ in list(csv.reader(file))[1:])
