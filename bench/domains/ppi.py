"""Protein interaction graphs: PT predicts many GO terms of a protein, FT 40 others; φ is a weight for each PT task.

    python metapt.py download ppi                                     the published graphs (Hu et al.), 2 GB
    python metapt.py download ppi --source string-yeast --from DIR    yeast, from files of STRING and GO in DIR
    python metapt.py meta ppi                                         φ learned: tasks.png, and by GO term phi.csv
    python metapt.py meta ppi --preset paper                          the published protocol
    python metapt.py meta bench/domains/ppi.py:BGRL                   PT without labels: φ makes the views of BGRL

Raghu et al., NeurIPS 2021, section 5.1. Graphs, parts and encoder: Hu et al., "Strategies for Pre-training Graph Neural
Networks", ICLR 2020. BGRL: Thakoor et al., ICLR 2022. What the weights are compared to is in ppi_baselines.py.
"""

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import metapt


class GraphBatch(NamedTuple):
    """Graphs as one: their nodes in a row, a node's incoming edges in a row."""

    sums: Tensor  # [nodes, 10]: Σ over incoming edges and the self-loop of the 9 edge features, and their number
    source: Tensor  # [edges]: the node that an edge comes from; edges are sorted by the node that they go to
    start: Tensor  # [nodes]: where a node's incoming edges begin
    graph: Tensor  # [nodes]: the graph of a node
    centre: Tensor  # [graphs]: the node that a graph is the neighbourhood of
    size: Tensor  # [graphs]: number of nodes
    kept: tuple[Tensor, Tensor] | None = None  # [edges]: how much of an edge is there, and where it goes to; None: all
    by_node: bool = False  # the encoder is asked about each node, and not about each graph


class Graphs:
    """Prepared graphs, memory-mapped (on an accelerator: copied there); nothing is done graph by graph."""

    def __init__(self, folder: Path, device: torch.device, prepared_by: str):
        def layout(about):
            graphs, tasks = about["graphs"], about["tasks"]
            kinds = dict.fromkeys(("sizes", "degrees", "centre", "species"), ("<i4", [graphs]))
            return kinds | {"source": ("<u2", [about["edges"]]), "labels": ("|u1", [graphs, -(-tasks // 8)]),
                            "sums": ("<f4", [about["nodes"], 10])}  # fmt: skip

        facts = dict.fromkeys(("graphs", "nodes", "edges", "tasks"), metapt.whole(1))
        facts |= {"finetune_terms": metapt.whole(), "terms": list}
        self.about, arrays = metapt.read_prepared(folder, "metapt graphs 2", prepared_by, facts, layout)
        nodes, edges, self.tasks = (self.about[name] for name in ("nodes", "edges", "tasks"))
        self.folder, terms = folder, len(self.about["terms"])
        sizes, degrees, centre = (arrays[name] for name in ("sizes", "degrees", "centre"))
        good = {"terms": terms == self.tasks, "finetune_terms": self.about["finetune_terms"] < self.tasks,
                "sizes": (sizes > 0).all() and sizes.sum() == nodes,
                "degrees": (degrees >= 0).all() and degrees.sum() == edges,
                "centre": ((centre >= 0) & (centre < sizes)).all()}  # fmt: skip
        if wrong := [name for name, right in good.items() if not right]:
            raise metapt.BadInput(f"{folder} is not what '{prepared_by}' wrote: {wrong[0]} does not fit the rest")
        sizes, degrees, centre, self.species, self.source, self.bits, self.sums = (
            # CUDA may lack indexing of unsigned numbers.
            (t.to(torch.int32) if t.dtype == torch.uint16 and device.type != "cpu" else t).to(device)
            for t in (arrays[name] for name in layout(self.about))
        )
        self.sizes, self.degrees, self.centre = sizes.long(), degrees.long(), centre.long()
        self.first_node, self.first_edge = (t.cumsum(0) - t for t in (self.sizes, self.degrees))
        self.counts = arrays["sizes"].numpy(), arrays["degrees"].numpy()  # on the host, whatever the device
        self.checked = False
        if device.type != "cpu":  # there they are whole in memory, and a check would wait for the device
            self.check()

    def check(self) -> None:
        """All graphs, beforehand: not where they are on disk, as there can be gigabytes of them."""
        for index in torch.arange(len(self.sizes), device=self.sizes.device).split(4096):
            self.batch(index)
        self.checked = True

    def batch(self, index: Tensor, host: Tensor | None = None) -> GraphBatch:
        """The graphs `index` [graphs] as one; `host`: the same on the CPU, where that is known."""
        size, degree = self.sizes[index], self.degrees[index]
        rows = (index.cpu() if host is None else host).numpy()
        nodes, edges = (int(count[rows].sum()) for count in self.counts)
        first = size.cumsum(0) - size
        sums = self.sums[spans(self.first_node[index], size, nodes)]
        source = self.source[spans(self.first_edge[index], degree, edges)].long()  # within its graph
        incoming = sums[:, 9].long() - 1  # without the self-loop
        if not self.checked:
            outside = source >= size.repeat_interleave(degree, output_size=edges)
            if (incoming < 0).any() or incoming.sum() != edges or outside.any():
                raise metapt.BadInput(
                    f"{self.folder}: source.npy and sums.npy do not fit each other: 'download ppi --check'"
                )
        source = source + first.repeat_interleave(degree, output_size=edges)
        graph = torch.arange(len(index), device=index.device).repeat_interleave(size, output_size=nodes)
        return GraphBatch(sums, source, incoming.cumsum(0) - incoming, graph, self.centre[index] + first, size)

    def labels(self, index: Tensor, tasks: Tensor) -> Tensor:
        """0 or 1: [graphs, tasks]."""
        return ((self.bits[index][:, tasks // 8] >> (tasks % 8).to(torch.uint8)) & 1).float()

    def positives(self, index: Tensor, tasks: Tensor) -> np.ndarray:
        """How many of the graphs `index` have label 1: [tasks]."""
        return sum(self.labels(i, tasks).sum(0) for i in index.split(4096)).cpu().numpy()


def spans(start: Tensor, length: Tensor, total: int) -> Tensor:
    """The numbers start_i … start_i + length_i − 1, for one i after the other; `total` of them."""
    shift = (start - (length.cumsum(0) - length)).repeat_interleave(length, output_size=total)
    return torch.arange(total, device=start.device) + shift


class NeighbourSum(torch.autograd.Function):
    """x [nodes, d] to Σ_j x_j over each node's neighbours. A is symmetric, so the adjoint of A is A: any order of
    derivative is this function again, and nothing but the indices is kept for it."""

    @staticmethod
    def forward(ctx, x, source, start):
        ctx.save_for_backward(source, start)
        return F.embedding_bag(source, x, start, mode="sum")

    @staticmethod
    def backward(ctx, gradient):
        return NeighbourSum.apply(gradient.contiguous(), *ctx.saved_tensors), None, None


class GINLayer(nn.Module):
    """x_i → MLP(Σ_j [x_j, W e_ij + b]), over the neighbours j and i itself; the MLP is d·2 → d·2 → d with BatchNorm.

    The edge layer is linear, so Σ_j (W e_ij + b) = [W, b] s_i where s_i = Σ_j [e_ij, 1] is known before training. The
    MLP's first layer is linear as well: of its product with [x, e] the second half is one 2d x 10 matrix on s_i.
    """

    def __init__(self, width: int):
        super().__init__()
        self.edge = nn.Linear(9, width)
        self.first, self.norm = nn.Linear(2 * width, 2 * width), nn.BatchNorm1d(2 * width)
        self.second = nn.Linear(2 * width, width)

    def forward(self, x: Tensor, batch: GraphBatch, sums: Tensor) -> Tensor:
        """x [nodes, d], or [d] where all nodes are alike, and sums [nodes, 10] to [nodes, d]."""
        of_x, of_edges = self.first.weight.chunk(2, dim=1)
        edge = of_edges @ torch.cat([self.edge.weight, self.edge.bias[:, None]], 1)
        if x.dim() == 1:  # Σ_j x_j is x times their number, column 9
            edge = edge + F.pad((of_x @ x)[:, None], (9, 0))
            hidden = F.linear(sums, edge, self.first.bias)
        else:
            hidden = F.linear(x + self.messages(x, batch), of_x, self.first.bias)
            hidden = hidden + F.linear(sums, edge)
        return self.second(self.norm(hidden).relu())

    @staticmethod
    def messages(x: Tensor, batch: GraphBatch) -> Tensor:
        if batch.kept is None:
            return NeighbourSum.apply(x, batch.source, batch.start)
        kept, to = batch.kept
        return torch.zeros_like(x).index_add(0, to, kept[:, None].to(x.dtype) * x.index_select(0, batch.source))


class GIN(nn.Module):
    """The graph isomorphism network of Hu et al., for graphs with edge features and no node features.

    A batch of graphs to [graphs, 2 width]: the mean over nodes, and the centre; `by_node` to [nodes, width].
    """

    def __init__(self, width: int, layers: int, dropout: float, last: nn.Module | None = None):
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(width) / math.sqrt(width))  # every node begins alike
        self.layers = nn.ModuleList(GINLayer(width) for _ in range(layers))
        self.dropout, self.last = dropout, last or nn.Identity()

    def forward(self, batch: GraphBatch) -> Tensor:
        x, sums = self.embedding, batch.sums.to(self.embedding.dtype)
        for i, layer in enumerate(self.layers):
            x = layer(x, batch, sums)
            x = F.dropout(x.relu() if i + 1 < len(self.layers) else x, self.dropout, self.training)
        x = self.last(x)
        if batch.by_node:
            return x
        total = x.new_zeros(len(batch.size), x.shape[1]).index_add(0, batch.graph, x)
        return torch.cat([total / batch.size[:, None], x[batch.centre]], 1)


class TaskWeights(nn.Module):
    """φ = one number a PT task; the task's weight is 2σ(φ_t), so that every weight begins at 1."""

    def __init__(self, tasks: int):
        super().__init__()
        self.task_logits = nn.Parameter(torch.zeros(tasks))

    def weights(self) -> Tensor:
        return 2 * self.task_logits.sigmoid()

    def forward(self, losses: Tensor) -> Tensor:
        """The weighted mean of losses [tasks]."""
        return (self.weights() * losses).mean()


class PPISettings(
    metapt.Settings, steps=1000, unroll_lr=1e-2, meta_lr=0.02, meta_batch_size=1024, validation_batch_size=1024, compare=2,
    # With q = v all that is left of PT's side are two forward passes, at θ ± εv: φ comes after the network.
    hvp="finite", unroll_hvp="exact",
):  # fmt: skip
    source: str = metapt.option("", "Folder in data/ppi; else what is there", data=True)
    width: int = metapt.option(64, "Width of the GIN", check=metapt.AT_LEAST_1, data=True)
    layers: int = metapt.option(3, "Layers of the GIN", check=metapt.AT_LEAST_1)
    dropout: float = metapt.option(0.2, "Of the GIN, in PT", check=metapt.BELOW_1)
    base_rates: bool = metapt.option(True, "Outputs begin at the terms' base rates")
    meta_train: bool = metapt.option(False, "φ sees L_PT with dropout and batch statistics", learning=True)
    ft_share: float = metapt.option(1.0, "Share of the FT data had before FT", check=metapt.SHARE)
    unseen_tasks: int = metapt.option(0, "FT tasks that FT alone has, and no other", check=metapt.AT_LEAST_0, data=True)
    permuted: float = metapt.option(0.0, "Share of PT tasks with permuted labels", check=metapt.BELOW_1, data=True)
    fold: int = metapt.option(0, "Which these are: the fold-th so many", check=metapt.AT_LEAST_0, data=True)


class PPI(metapt.Domain):
    """Parts, drawn by seed as Hu et al. do: test proteins are the human ones, or 30 % where there is one species,
    stratified by their rarest FT term. Half of them, "broad", join PT; the other half, "test", is seen by nothing before
    FT. All other proteins are PT's, and FT's as well: 85 % to train, 15 % to validate.
    """

    Settings, Weights = PPISettings, TaskWeights
    tests: ClassVar = {"test": "mean AUROC", "broad": "mean AUROC, proteins in PT"}
    captions: ClassVar = {"task_weight_spread": "standard deviation of the task weights"}
    presets: ClassVar = {
        # 100 epochs of the published PT set in batches of 32, about one of them as warm-up.
        "paper": {
            **metapt.PUBLISHED, "width": 300, "layers": 5, "steps": 250_000, "warmup": 2_500, "batch_size": 32,
            "meta_batch_size": 32, "unroll_batch_size": 32, "validation_batch_size": 32, "lr": 1e-4, "alpha": 1e-4,
            "unroll_lr": 1e-4, "meta_lr": 1.0, "measure_lr": 1e-4, "measure_epochs": 50, "measure_batch_size": 32,
            "base_rates": False, "meta_train": True,
        },
    }  # fmt: skip

    def __init__(self, settings, device, data):
        super().__init__(settings, device, data)
        more = {"published": "", "string-yeast": " --source string-yeast --from DIR"}
        there = [name for name in more if (data / "ppi" / name / "about.json").exists()]
        source = settings.source or (*there, "published")[0]
        self.settings = dataclasses.replace(settings, source=source)  # a run goes on with the same
        command = "python metapt.py download ppi" + more.get(source, f"{more['string-yeast']} --name {source}")
        self.graphs = graphs = Graphs(data / "ppi" / source, device, command)
        random, everything = np.random.default_rng(settings.seed), torch.arange(len(graphs.sizes), device=device)
        fixed, tasks = graphs.about["finetune_terms"], torch.arange(graphs.tasks, device=device)
        tasks = divide_tasks(len(tasks), fixed, None if fixed else graphs.positives(everything, tasks), random)
        self.pretrain_tasks, self.finetune_tasks = (torch.from_numpy(t).to(device) for t in tasks)
        self.permuted = np.zeros(len(self.pretrain_tasks), dtype=bool)  # for reports alone: no loss reads it
        labels = graphs.labels(everything, self.finetune_tasks).cpu().numpy() > 0
        rows = divide_graphs(labels, graphs.species.cpu().numpy(), random)
        self.rows_on_host = {part: torch.from_numpy(rows) for part, rows in rows.items()}
        self.rows = {part: rows.to(device) for part, rows in self.rows_on_host.items()}
        if settings.permuted:
            self.permute(settings.permuted, random)
        self.rates = self.term_rates(self.rows["pretrain"], self.pretrain_tasks)
        self.sizes = {part: len(rows) for part, rows in self.rows.items()}
        self.access = {p: max(1, round(settings.ft_share * self.sizes[p])) for p in ("finetune", "validation")}
        self.finetune_sizes = (max(1, self.sizes["finetune"] // 8), self.sizes["finetune"])
        columns, unseen = torch.arange(len(self.finetune_tasks), device=device), settings.unseen_tasks
        kept = columns // max(1, unseen) == (settings.fold if unseen else -1)
        settings.require(unseen < len(columns) and kept.sum() == unseen, "unseen_tasks",
                         f"less than the {len(columns)} FT tasks, and a --fold that there is")  # fmt: skip
        # Outputs of the FT head: those that FT is about, and those that L_FT and L_V are about before; and these tasks.
        self.scored, self.seen = columns[kept] if unseen else columns, columns[~kept]
        self.seen_tasks, self.outputs = self.finetune_tasks[self.seen], len(self.pretrain_tasks)

    def term_rates(self, rows, tasks):
        """Share of the graphs that have each term, each class counted half a graph more: [tasks]."""
        return torch.from_numpy((self.graphs.positives(rows, tasks) + 0.5) / (len(rows) + 1)).float().to(self.device)

    def permute(self, share, random):
        """Gives a share of the PT tasks labels that say nothing: each task's own, permuted over all proteins."""
        self.permuted[random.permutation(len(self.permuted))[: round(share * len(self.permuted))]] = True
        bits = self.graphs.bits.clone()  # what was read is a file
        for task in self.pretrain_tasks[torch.from_numpy(self.permuted).to(self.device)].tolist():
            byte, bit = task // 8, task % 8
            labels = (bits[:, byte] >> bit & 1)[torch.from_numpy(random.permutation(len(bits))).to(self.device)]
            bits[:, byte] = bits[:, byte] & ~torch.tensor(1 << bit, dtype=torch.uint8) | labels << bit
        self.graphs.bits = bits

    def data_digest(self):
        parts = [
            torch.from_numpy(self.permuted),
            self.pretrain_tasks,
            self.finetune_tasks,
            *map(self.rows.get, ("pretrain", "finetune", "validation")),
        ]
        return hashlib.sha256(json.dumps([self.graphs.about, *map(Tensor.tolist, parts)]).encode()).hexdigest()

    def network(self):
        encoder = GIN(self.settings.width, self.settings.layers, self.settings.dropout)
        network = metapt.Network(encoder, nn.Linear(2 * self.settings.width, self.outputs)).to(self.device)
        if self.settings.base_rates:
            network.head.bias.data = self.rates.logit()
        # BatchNorm's statistics from data at once: an encoder without PT is then a baseline, not an overflow.
        update_bn([(self.inputs("pretrain", torch.randperm(self.sizes["pretrain"])[:256].to(self.device)),)], network)
        return network

    def head(self):
        head = nn.Linear(2 * self.settings.width, len(self.finetune_tasks)).to(self.device)
        if self.settings.base_rates:  # those of the PT tasks: FT's own are labels that a small FT set has not
            nn.init.constant_(head.bias, self.rates[: len(self.pretrain_tasks)].mean().logit().item())
        return head

    def meta(self):
        return self.Weights(len(self.pretrain_tasks)).to(self.device)

    def pretrain_loss(self, network, meta, index, progress, live):
        """Σ_t 2σ(φ_t)·BCE_t / T. For φ (not `live`) in evaluation mode, as L_V is: with a batch's own statistics and
        dropout it changes along other directions than L_V does (bench/README.md has what that is worth)."""
        batch, targets = self.inputs("pretrain", index), self.labels("pretrain", index, self.pretrain_tasks)

        def loss(theta, phi):
            outputs = metapt.call(network, theta, batch, train=live or self.settings.meta_train, live=live)
            losses = F.binary_cross_entropy_with_logits(outputs, targets, reduction="none").mean(0)
            return metapt.call(meta, phi, losses)

        return loss

    def finetune_loss(self, network, head, part, index):
        """As before FT."""
        batch, targets, columns = self.inputs(part, index), self.labels(part, index, self.seen_tasks), self.seen

        def loss(theta, psi):
            outputs = metapt.call(head, psi, metapt.call(network, theta, batch, features=True))
            return F.binary_cross_entropy_with_logits(outputs[:, columns], targets)

        return loss

    def inputs(self, part, index):
        return self.graphs.batch(self.rows[part][index], self.rows_on_host[part][metapt.on_host(index)])

    def labels(self, part, index, tasks):
        return self.graphs.labels(self.rows[part][index], tasks)

    def targets(self, part, index):
        return self.labels(part, index, self.finetune_tasks)

    def loss(self, outputs, targets):
        return F.binary_cross_entropy_with_logits(outputs[:, self.scored], targets[:, self.scored])

    def score(self, outputs, targets):
        """Area under the ROC curve, averaged over the tasks that have both classes."""
        from scipy.stats import rankdata  # of all tasks at once: sklearn's roc_auc_score would be most of FT's time

        scores, labels = outputs[:, self.scored].cpu().numpy(), targets[:, self.scored].cpu().numpy() > 0.5
        scores, labels = (values[:, labels.any(0) & ~labels.all(0)] for values in (scores, labels))
        n = labels.sum(0)
        above = (rankdata(scores, axis=0) * labels).sum(0) - n * (n + 1) / 2  # ties count half
        return float((above / (n * (len(labels) - n))).mean()) if len(n) else math.nan

    def transfer(self, network):
        network.encoder.dropout = 0.5
        return network.train()

    def measure(self, meta):
        return {"task_weight_spread": meta.weights().detach().std().item()}

    def table(self, meta):
        terms = [self.graphs.about["terms"][task] for task in self.pretrain_tasks.tolist()]
        return ["GO term", "weight"], list(zip(terms, meta.weights().tolist(), strict=True))

    def figures(self, meta):
        positives = self.graphs.positives(self.rows["pretrain"], self.pretrain_tasks)
        return {"tasks.png": lambda figure: draw_tasks(figure, self.table(meta)[1], positives, self.permuted)}


# BGRL


class Drops(nn.Module):
    """φ = the shares of edges and of edge features that each of two views drops, as logits [2].

    How much is kept of a directed edge, or of a feature in a graph, is (σ⁻¹(1 − share) + σ⁻¹(u)) / 0.5 through σ, u uniform:
    below one half for that share of all draws (the concrete distribution: Maddison et al., ICLR 2017). What a node's edges
    sum up to shrinks as their number does: the features of single edges are not there to be left out. Self-loops stay."""

    def __init__(self, edges: tuple[float, float], features: tuple[float, float]):
        super().__init__()
        self.edges, self.features = (nn.Parameter(torch.tensor(shares).logit()) for shares in (edges, features))

    @staticmethod
    def keep(logit: Tensor, *shape: int) -> Tensor:
        u = torch.rand(shape, dtype=logit.dtype, device=logit.device)
        return ((u.logit(1e-6) - logit) / 0.5).sigmoid()

    def forward(self, batch: GraphBatch) -> list[GraphBatch]:
        loop = F.one_hot(torch.tensor([7, 9]), 10).sum(0).to(batch.sums)
        sums, views = batch.sums - loop, []
        to = torch.arange(len(sums), device=sums.device).repeat_interleave(sums[:, 9].long())
        for edge, feature in zip(self.edges, self.features, strict=True):
            kept = self.keep(edge, len(to))
            share = sums.new_zeros(len(sums), dtype=kept.dtype).index_add(0, to, kept) / sums[:, 9].clamp(min=1)
            features = F.pad(self.keep(feature, len(batch.size), 9), (0, 1), value=1.0)[batch.graph]
            views.append(batch._replace(sums=sums * share[:, None] * features + loop, kept=(kept, to), by_node=True))
        return views


class BGRLSettings(
    PPISettings, steps=300, warmup=60, dropout=0.0, meta_every=5, meta_batch_size=64, meta_lr=0.05, hvp="exact",
):  # fmt: skip
    momentum: float = metapt.option(0.999, "Of the target, a PT step", check=metapt.BELOW_1)

    def __post_init__(self):
        super().__post_init__()
        for name in ("permuted", "meta_train"):
            self.require(not getattr(self, name), name, "nothing: BGRL has no PT tasks")


class BGRL(PPI):
    """θ, the online network, predicts from a node of one view what the target makes of it in the other, without labels of PT.

    The target is a moving average of the encoder, in a buffer: in checkpoints, and no part of θ. It is a constant of L_PT and
    of its hypergradient, which so ignores that it will follow θ, but φ moves the views that both networks see."""

    Settings, divisible = BGRLSettings, False  # L_PT is a mean over nodes
    presets: ClassVar = {}
    captions: ClassVar = {"edges_1": "share of edges that a view drops"}
    table, figures = metapt.Domain.table, metapt.Domain.figures

    def network(self):
        width = self.settings.width
        encoder = GIN(width, self.settings.layers, self.settings.dropout, nn.BatchNorm1d(width))
        predictor = nn.Sequential(nn.Linear(width, 8 * width), nn.PReLU(), nn.Linear(8 * width, width))
        network = metapt.Network(encoder, predictor).to(self.device)
        network.target = nn.Buffer(nn.utils.parameters_to_vector(encoder.parameters()).detach())
        batch = self.inputs("pretrain", torch.randperm(self.sizes["pretrain"])[:256].to(self.device))
        update_bn([(batch._replace(by_node=True),)], network)
        return network

    def meta(self):
        return Drops(edges=(0.3, 0.25), features=(0.25, 0.1)).to(self.device)

    def pretrain_loss(self, network, meta, index, progress, live):
        batch, online = self.inputs("pretrain", index), dict(network.encoder.named_parameters(prefix="encoder"))
        if live:  # a PT step begins: the target follows the step before it
            network.target.lerp_(nn.utils.parameters_to_vector(online.values()).detach(), 1 - self.settings.momentum)
        parts = network.target.split([p.numel() for p in online.values()])
        target = {name: part.view_as(p) for part, (name, p) in zip(parts, online.items(), strict=True)}

        def loss(theta, phi):  # each view with its own BatchNorm statistics, in the target too
            views = metapt.call(meta, phi, batch)
            a, b = (metapt.call(network, theta, view, train=True, live=live) for view in views)
            x, y = (metapt.call(network, target, view, train=True, features=True) for view in views)
            return 2 - (F.cosine_similarity(a, y) + F.cosine_similarity(b, x)).mean()

        return loss

    def measure(self, meta):
        return {f"{name}_{i}": p[i - 1].sigmoid().item() for name, p in metapt.detached(meta).items() for i in (1, 2)}


def divide_tasks(tasks: int, fixed: int, positives, random, few=60, wanted=40) -> tuple[np.ndarray, np.ndarray]:
    """Columns of the PT and of the FT tasks: the last `fixed` are FT's, or 40 drawn of those with 60 positives."""
    if fixed:
        chosen = np.arange(tasks - fixed, tasks)
    else:
        often = np.flatnonzero(positives >= few)
        if len(often) <= wanted:
            raise metapt.BadInput(f"{len(often)} GO terms have {few} proteins, too few to draw {wanted} FT tasks from")
        chosen = random.permutation(often)[:wanted]
    return np.setdiff1d(np.arange(tasks), chosen), random.permutation(chosen)


def divide_graphs(labels: np.ndarray, species: np.ndarray, random, human=9606) -> dict[str, np.ndarray]:
    """Rows of the parts; `labels` are those of the FT tasks, `species` NCBI taxa. See `PPI`."""
    from sklearn.model_selection import train_test_split

    def stratified(rows, share):
        rarest = np.where(labels[rows], labels.sum(0), len(labels) + 1)
        group = np.where(labels[rows].any(1), rarest.argmin(1), -1)
        group[np.isin(group, [g for g in set(group) if (group == g).sum() < 10])] = -1
        return train_test_split(rows, test_size=share, stratify=group, random_state=int(random.integers(2**31)))

    everything = np.arange(len(labels))
    if len(set(species)) > 1:
        rest, test = everything[species != human], everything[species == human]
        if not len(test):
            raise metapt.BadInput(f"graphs of several species without human ({human}), which is the test species")
        test, rest = random.permutation(test), random.permutation(rest)
        broad, unseen = np.array_split(test, 2)
        train, validation = np.split(rest, [round(0.85 * len(rest))])
    else:
        rest, test = stratified(everything, 0.3)
        broad, unseen = stratified(test, 0.5)
        train, validation = stratified(rest, 0.15)
    return {"pretrain": np.concatenate([rest, broad]), "finetune": train, "validation": validation, "test": unseen,
            "broad": broad}  # fmt: skip


def draw_tasks(figure, rows: list[tuple[str, float]], positives: np.ndarray, permuted: np.ndarray, shown=12) -> None:
    """Left: the PT tasks with the highest and the lowest weights. Right: weight by number of positives; `permuted` [tasks]
    are in red on both sides."""
    terms, weights = zip(*rows, strict=True)
    order, shown = np.argsort(weights), min(shown, len(rows) // 2)
    extremes = [*order[:shown], *order[len(order) - shown :]]
    figure.set_size_inches(7, 0.14 * len(extremes) + 1)
    axis, other = figure.subplots(1, 2)
    colours = np.where(permuted, "C3", "C0")
    axis.barh(range(len(extremes)), [weights[i] - 1 for i in extremes], color=colours[extremes], left=1)
    axis.set_yticks(range(len(extremes)), [terms[i] for i in extremes], fontsize=6)
    axis.axvline(1, color="0.5", lw=0.6)
    axis.set(xlabel="weight of the PT task (it begins at 1)")
    for of, colour, label in ((~permuted, "C0", "labels as they are"), (permuted, "C3", "labels permuted")):
        other.plot(positives[of], np.array(weights)[of], ".", ms=2, color=colour, label=label)
    if permuted.any():
        other.legend(markerscale=4)
    other.set(xscale="log", xlabel="proteins with the term in the PT part", ylabel="weight")
