"""Protein interaction graphs: PT predicts many GO terms of a protein, FT 40 others.

    python metapt.py download ppi                      the published graphs (Hu et al.), 2 GB
    python metapt.py download ppi string-yeast --from DIR
                                                       yeast, from files of STRING and GO in DIR
    python metapt.py meta ppi                          φ learned: a weight for each PT task
    python metapt.py meta ppi --preset paper           the published protocol
    python metapt.py meta bench/domains/ppi.py:BGRL    PT without labels: φ makes the views

What φ is worth by GO term is drawn in tasks.png, and listed in phi.csv.

Raghu et al., NeurIPS 2021, section 5.1. Graphs, parts and encoder: Hu et al., "Strategies for
Pre-training Graph Neural Networks", ICLR 2020. BGRL: Thakoor et al., ICLR 2022. What the weights
are compared to is in ppi_baselines.py.
"""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import metapt

try:
    from bench.domains.target import add_target, move_target, target_params
except ImportError:
    raise metapt.BadInput(
        "bench/domains/target.py is missing beside metapt.py: copy it from metapt's repository"
    ) from None

HUMAN = 9606  # in NCBI's numbering of species


# ------------------------------------------------------------------------------------------------
# Graphs


class GraphBatch(NamedTuple):
    """Graphs as one: their nodes in a row, a node's incoming edges in a row."""

    # [nodes, 10]: sums over a node's incoming edges and its self-loop, of the 9 edge features and
    # of 1, which is their number
    sums: Tensor
    # [edges]: the node that an edge comes from; edges are sorted by the node that they go to
    source: Tensor
    # [nodes]: where a node's incoming edges begin
    start: Tensor
    # [nodes]: the graph of a node
    graph: Tensor
    # [graphs]: the node that a graph is the neighbourhood of
    centre: Tensor
    # [graphs]: the number of nodes
    size: Tensor
    # Twice [edges]: how much of an edge is there, and the node that it goes to. None: all is there
    kept: tuple[Tensor, Tensor] | None = None
    # Whether the encoder is asked about each node, and not about each graph
    by_node: bool = False


class Graphs:
    """Prepared graphs, memory-mapped (for an accelerator they are copied there).

    Graphs are known by their row in the prepared arrays, tasks by their column in the labels. Rows
    are given as tensors on the CPU, tasks on the device. Nothing is done graph by graph.
    BadInput: the folder is missing, or not what its script writes.
    """

    def __init__(self, folder: Path, device: torch.device, prepared_by: str):
        self.folder = folder
        self.device = device
        self.about, arrays = metapt.read_prepared(folder, "metapt graphs 2", prepared_by, layout)
        check_graphs(folder, self.about, arrays, prepared_by)
        self.tasks: int = self.about["tasks"]
        self.sizes = arrays["sizes"].to(device).long()
        self.degrees = arrays["degrees"].to(device).long()
        self.centre = arrays["centre"].to(device).long()
        self.species = arrays["species"].to(device)
        self.bits = arrays["labels"].to(device)
        self.sums = arrays["sums"].to(device)
        source = arrays["source"]
        if device.type != "cpu":
            source = source.to(torch.int32)  # CUDA may lack indexing of unsigned numbers.
        self.source = source.to(device)
        self.first_node = self.sizes.cumsum(0) - self.sizes
        self.first_edge = self.degrees.cumsum(0) - self.degrees
        # How many nodes and edges each graph has, for sums that must not wait for the device
        self.nodes_of = arrays["sizes"].numpy()
        self.edges_of = arrays["degrees"].numpy()
        # On disk there can be gigabytes of edges, which are checked batch by batch as they are
        # read. On a device they are whole in memory, and a check in a PT step would wait.
        self.checked = False
        if device.type != "cpu":
            self.check()

    def check(self) -> None:
        """BadInput where the edges of any graph do not fit its nodes."""
        for rows in torch.arange(len(self.sizes)).split(4096):
            self.batch(rows)
        self.checked = True

    def batch(self, rows: Tensor) -> GraphBatch:
        """These graphs as one."""
        nodes = int(self.nodes_of[rows.numpy()].sum())
        edges = int(self.edges_of[rows.numpy()].sum())
        rows = metapt.to_device(rows, self.device)
        size = self.sizes[rows]
        degree = self.degrees[rows]
        sums = self.sums[spans(self.first_node[rows], size, nodes)]
        incoming = sums[:, 9].long() - 1  # without the self-loop
        # The node that an edge comes from is stored as its number within its own graph.
        source = self.source[spans(self.first_edge[rows], degree, edges)].long()
        if not self.checked:
            nodes_of_edge = size.repeat_interleave(degree, output_size=edges)
            outside = source >= nodes_of_edge
            if (incoming < 0).any() or incoming.sum() != edges or outside.any():
                raise metapt.BadInput(
                    f"{self.folder}: source.npy and sums.npy do not fit each other: "
                    "'download ppi --check'"
                )
        first = size.cumsum(0) - size
        source = source + first.repeat_interleave(degree, output_size=edges)
        graph = torch.arange(len(rows), device=self.device)
        return GraphBatch(
            sums=sums,
            source=source,
            start=incoming.cumsum(0) - incoming,
            graph=graph.repeat_interleave(size, output_size=nodes),
            centre=self.centre[rows] + first,
            size=size,
        )

    def labels(self, rows: Tensor, tasks: Tensor) -> Tensor:
        """0 or 1: [graphs, tasks]."""
        bytes_of_tasks = self.bits[metapt.to_device(rows, self.device)][:, tasks // 8]
        place = (tasks % 8).to(torch.uint8)
        return ((bytes_of_tasks >> place) & 1).float()

    def positives(self, rows: Tensor, tasks: Tensor) -> np.ndarray:
        """How many of these graphs have label 1: [tasks]."""
        counts = sum(self.labels(some, tasks).sum(0) for some in rows.split(4096))
        return counts.cpu().numpy()


def layout(about: dict) -> dict:
    """Data type and shape of each array of the prepared folder."""
    graphs = about["graphs"]
    bytes_of_labels = math.ceil(about["tasks"] / 8)
    return {
        "sizes": ("<i4", [graphs]),
        "degrees": ("<i4", [graphs]),
        "centre": ("<i4", [graphs]),
        "species": ("<i4", [graphs]),
        "source": ("<u2", [about["edges"]]),
        "labels": ("|u1", [graphs, bytes_of_labels]),
        "sums": ("<f4", [about["nodes"], 10]),
    }


def check_graphs(folder: Path, about: dict, arrays: dict[str, Tensor], prepared_by: str) -> None:
    """BadInput where counts, terms and arrays of a prepared folder do not fit each other."""
    problem = f"{folder} is not what '{prepared_by}' wrote"
    for name in ("graphs", "nodes", "edges", "tasks"):
        if type(about[name]) is not int or about[name] < 1:
            raise metapt.BadInput(f"{problem}: {name} is {about[name]!r}, which is no count")
    tasks = about["tasks"]
    terms = about.get("terms")
    finetune_terms = about.get("finetune_terms")
    sizes = arrays["sizes"]
    degrees = arrays["degrees"]
    centre = arrays["centre"]
    facts = {
        "terms": isinstance(terms, list) and len(terms) == tasks,
        "finetune_terms": type(finetune_terms) is int and 0 <= finetune_terms < tasks,
        "sizes": (sizes > 0).all() and sizes.sum() == about["nodes"],
        "degrees": (degrees >= 0).all() and degrees.sum() == about["edges"],
        "centre": ((centre >= 0) & (centre < sizes)).all(),
    }
    for name, right in facts.items():
        if not right:
            raise metapt.BadInput(f"{problem}: {name} does not fit the rest")


def spans(start: Tensor, length: Tensor, total: int) -> Tensor:
    """The numbers start_i … start_i + length_i − 1, for one i after the other; `total` of them."""
    shift = start - (length.cumsum(0) - length)
    shift = shift.repeat_interleave(length, output_size=total)
    return torch.arange(total, device=start.device) + shift


# ------------------------------------------------------------------------------------------------
# θ: the encoder


class NeighbourSum(torch.autograd.Function):
    """x [nodes, d] to Σ_j x_j over each node's neighbours.

    The adjacency matrix is symmetric, so it is its own adjoint: a derivative of any order is this
    function again, and nothing but the indices is kept for it.
    """

    @staticmethod
    def forward(ctx, x, source, start):
        ctx.save_for_backward(source, start)
        return F.embedding_bag(source, x, start, mode="sum")

    @staticmethod
    def backward(ctx, gradient):
        source, start = ctx.saved_tensors
        return NeighbourSum.apply(gradient.contiguous(), source, start), None, None


class GINLayer(nn.Module):
    """x_i → MLP(Σ_j [x_j, W e_ij + b]), over the neighbours j and i itself.

    The MLP is 2d → 2d → d with BatchNorm. The edge layer is linear, so Σ_j (W e_ij + b) is
    [W, b] s_i, where s_i = Σ_j [e_ij, 1] is known before training. The first layer of the MLP is
    linear as well: the half of it that meets the edges becomes one 2d x 10 matrix on s_i.
    """

    def __init__(self, width: int):
        super().__init__()
        self.edge = nn.Linear(9, width)
        self.first = nn.Linear(2 * width, 2 * width)
        self.norm = nn.BatchNorm1d(2 * width)
        self.second = nn.Linear(2 * width, width)

    def forward(self, x: Tensor, batch: GraphBatch, sums: Tensor) -> Tensor:
        """x [nodes, d], or [d] where all nodes are alike, and sums [nodes, 10] to [nodes, d]."""
        of_nodes, of_edges = self.first.weight.chunk(2, dim=1)
        on_sums = of_edges @ torch.cat([self.edge.weight, self.edge.bias[:, None]], 1)
        if x.dim() == 1:
            # Σ_j x_j is x times their number, which is column 9 of the sums.
            on_sums = on_sums + F.pad((of_nodes @ x)[:, None], (9, 0))
            hidden = F.linear(sums, on_sums, self.first.bias)
        else:
            hidden = F.linear(x + self.messages(x, batch), of_nodes, self.first.bias)
            hidden = hidden + F.linear(sums, on_sums)
        return self.second(self.norm(hidden).relu())

    @staticmethod
    def messages(x: Tensor, batch: GraphBatch) -> Tensor:
        """Σ_j x_j over each node's neighbours, as far as edges are there."""
        if batch.kept is None:
            return NeighbourSum.apply(x, batch.source, batch.start)
        kept, goes_to = batch.kept
        sent = kept[:, None].to(x.dtype) * x.index_select(0, batch.source)
        return torch.zeros_like(x).index_add(0, goes_to, sent)


class GIN(nn.Module):
    """The graph isomorphism network of Hu et al., for edge features and no node features.

    A batch of graphs to [graphs, 2 width], the mean over nodes and the centre; where the batch is
    `by_node`, to [nodes, width]. `last` is a module after the last layer.
    """

    def __init__(self, width: int, layers: int, dropout: float, last: nn.Module | None = None):
        super().__init__()
        # Every node begins alike.
        self.embedding = nn.Parameter(torch.randn(width) / math.sqrt(width))
        self.layers = nn.ModuleList(GINLayer(width) for _ in range(layers))
        self.dropout = dropout
        self.last = last or nn.Identity()

    def forward(self, batch: GraphBatch) -> Tensor:
        x = self.embedding
        sums = batch.sums.to(x.dtype)
        for i, layer in enumerate(self.layers):
            x = layer(x, batch, sums)
            if i + 1 < len(self.layers):
                x = x.relu()
            x = F.dropout(x, self.dropout, self.training)
        x = self.last(x)
        if batch.by_node:
            return x
        total = x.new_zeros(len(batch.size), x.shape[1]).index_add(0, batch.graph, x)
        mean = total / batch.size[:, None]
        return torch.cat([mean, x[batch.centre]], 1)


# ------------------------------------------------------------------------------------------------
# φ weighs PT tasks


class TaskWeights(nn.Module):
    """φ = one number a PT task; the task's weight is 2σ(φ_t), so that every weight begins at 1."""

    def __init__(self, tasks: int):
        super().__init__()
        self.task_logits = nn.Parameter(torch.zeros(tasks))

    def weights(self) -> Tensor:
        """The weights [tasks], each in (0, 2)."""
        return 2 * self.task_logits.sigmoid()

    def forward(self, losses: Tensor) -> Tensor:
        """The weighted mean of losses [tasks]."""
        return (self.weights() * losses).mean()


@dataclass(frozen=True)
class PPISettings(metapt.Settings):
    unroll_lr: float = 1e-2
    meta_lr: float = 0.02
    meta_batch_size: int = 1024
    validation_batch_size: int = 1024
    compare: int = 2
    # With q = v all that is left of PT's side are two forward passes, at θ ± εv: φ comes after the
    # network.
    hvp: str = "finite"
    unroll_hvp: str = "exact"
    source: str = metapt.setting("", "Folder in data/ppi; else what is there", data=True)
    width: int = metapt.setting(64, "Width of the GIN", check=metapt.AT_LEAST_1, data=True)
    layers: int = metapt.setting(3, "Layers of the GIN", check=metapt.AT_LEAST_1)
    dropout: float = metapt.setting(0.2, "Of the GIN, in PT", check=metapt.BELOW_1)
    base_rates: bool = metapt.setting(True, "Outputs begin at the terms' base rates")
    meta_train: bool = metapt.setting(
        False, "φ sees L_PT with dropout and batch statistics", learning=True
    )
    ft_share: float = metapt.setting(1.0, "Share of the FT data had before FT", check=metapt.SHARE)
    unseen_tasks: int = metapt.setting(
        0, "FT tasks that FT alone has, and no other", check=metapt.AT_LEAST_0, data=True
    )
    permuted: float = metapt.setting(
        0.0, "Share of PT tasks with permuted labels", check=metapt.BELOW_1, data=True
    )
    fold: int = metapt.setting(
        0, "Which tasks are unseen: the fold-th so many", check=metapt.AT_LEAST_0, data=True
    )


# 100 epochs of the published PT set in batches of 32, about one of them as warm-up
PAPER = {
    **metapt.PUBLISHED,
    "width": 300,
    "layers": 5,
    "steps": 250_000,
    "warmup_share": 1 / 100,
    "batch_size": 32,
    "meta_batch_size": 32,
    "unroll_batch_size": 32,
    "validation_batch_size": 32,
    "lr": 1e-4,
    "alpha": 1e-4,
    "unroll_lr": 1e-4,
    "meta_lr": 1.0,
    "measure_lr": 1e-4,
    "measure_epochs": 50,
    "measure_batch_size": 32,
    "base_rates": False,
    "meta_train": True,
}

# What prepares the graphs of each folder in data/ppi; other folders are of string-yeast's script.
PREPARED_BY = {
    "published": "python metapt.py download ppi",
    "string-yeast": "python metapt.py download ppi string-yeast --from DIR",
}


class PPI(metapt.Domain):
    """PT predicts many GO terms of a protein's neighbourhood, FT 40 others; φ weighs PT's terms.

    Parts, drawn by seed as Hu et al. do: test proteins are the human ones, or 30 % where there is
    one species, stratified by their rarest FT term. Half of them, "broad", join PT; the other half,
    "test", is seen by nothing before FT. All other proteins are PT's, and FT's as well: 85 % to
    train, 15 % to validate.
    """

    Settings = PPISettings
    Weights = TaskWeights
    tests: ClassVar = {"test": "mean AUROC", "broad": "mean AUROC, proteins in PT"}
    captions: ClassVar = {"task_weight_spread": "standard deviation of the task weights"}
    presets: ClassVar = {"paper": PAPER}

    def __init__(self, settings, device, data):
        super().__init__(settings, device, data)
        source = settings.source or what_is_there(data / "ppi")
        # A run that goes on takes the same source, whatever there is by then.
        self.settings = dataclasses.replace(settings, source=source)
        others = f"{PREPARED_BY['string-yeast']} --name {source}"
        command = PREPARED_BY.get(source, others)
        self.graphs = Graphs(data / "ppi" / source, device, command)

        random = np.random.default_rng(settings.seed)
        self.divide_terms(random)
        self.divide_proteins(random)
        if settings.permuted:
            self.permute(settings.permuted, random)
        self.hide_terms()
        # PT's outputs, and the share of the proteins that have each of these terms
        self.outputs = len(self.pretrain_tasks)
        self.rates = self.term_rates(self.rows["pretrain"], self.pretrain_tasks)

    def divide_terms(self, random: np.random.Generator) -> None:
        """Says which terms are PT's tasks, and which FT's."""
        graphs = self.graphs
        fixed = graphs.about["finetune_terms"]
        positives = None
        if not fixed:
            all_tasks = torch.arange(graphs.tasks, device=self.device)
            positives = graphs.positives(torch.arange(len(graphs.sizes)), all_tasks)
        pretrain, finetune = divide_tasks(graphs.tasks, fixed, positives, random)
        self.pretrain_tasks = torch.from_numpy(pretrain).to(self.device)
        self.finetune_tasks = torch.from_numpy(finetune).to(self.device)
        # Which PT tasks have permuted labels is for reports alone: no loss reads it.
        self.permuted = np.zeros(len(pretrain), dtype=bool)

    def divide_proteins(self, random: np.random.Generator) -> None:
        """Says which proteins, as rows of the graphs on the CPU, make each part."""
        graphs = self.graphs
        labels = graphs.labels(torch.arange(len(graphs.sizes)), self.finetune_tasks)
        rows = divide_graphs(labels.cpu().numpy() > 0, graphs.species.cpu().numpy(), random)
        self.rows = {part: torch.from_numpy(rows_of_part) for part, rows_of_part in rows.items()}
        self.sizes = {part: len(rows_of_part) for part, rows_of_part in rows.items()}
        self.access = {
            part: max(1, round(self.settings.ft_share * self.sizes[part]))
            for part in ("finetune", "validation")
        }
        self.finetune_sizes = (max(1, self.sizes["finetune"] // 8), self.sizes["finetune"])

    def permute(self, share: float, random: np.random.Generator) -> None:
        """Gives a share of the PT tasks labels that say nothing.

        Each task has its own labels, permuted over all proteins.
        """
        tasks = len(self.permuted)
        self.permuted[random.permutation(tasks)[: round(share * tasks)]] = True
        bits = self.graphs.bits.clone()  # What was read is a file.
        chosen = torch.from_numpy(self.permuted).to(self.device)
        for task in self.pretrain_tasks[chosen].tolist():
            column = task // 8
            place = task % 8
            order = torch.from_numpy(random.permutation(len(bits))).to(self.device)
            labels = ((bits[:, column] >> place) & 1)[order]
            mask = torch.tensor(1 << place, dtype=torch.uint8)
            bits[:, column] = (bits[:, column] & ~mask) | (labels << place)
        self.graphs.bits = bits

    def hide_terms(self) -> None:
        """Says which FT terms are seen before FT, and which FT is about.

        Both are columns of FT's outputs. All are both, unless --unseen-tasks hides some: FT is then
        about these alone.
        """
        columns = torch.arange(len(self.finetune_tasks), device=self.device)
        unseen = self.settings.unseen_tasks
        self.scored = columns
        self.seen = columns
        if unseen:
            hidden = columns // unseen == self.settings.fold
            there = unseen < len(columns) and hidden.sum() == unseen
            expected = f"less than the {len(columns)} FT tasks, and a --fold that there is"
            self.settings.require(there, "unseen_tasks", expected)
            self.scored = columns[hidden]
            self.seen = columns[~hidden]
        self.seen_tasks = self.finetune_tasks[self.seen]

    def term_rates(self, rows: Tensor, tasks: Tensor) -> Tensor:
        """Share of the graphs with each term [tasks]; each class counts half a graph more."""
        rates = (self.graphs.positives(rows, tasks) + 0.5) / (len(rows) + 1)
        return torch.from_numpy(rates).float().to(self.device)

    def data_digest(self):
        parts = [
            self.permuted,
            self.pretrain_tasks,
            self.finetune_tasks,
            self.rows["pretrain"],
            self.rows["finetune"],
            self.rows["validation"],
        ]
        described = json.dumps([self.graphs.about, *(part.tolist() for part in parts)])
        return hashlib.sha256(described.encode()).hexdigest()

    def network(self):
        settings = self.settings
        encoder = GIN(settings.width, settings.layers, settings.dropout)
        head = nn.Linear(2 * settings.width, self.outputs)
        network = metapt.Network(encoder, head).to(self.device)
        if settings.base_rates:
            network.head.bias.data = self.rates.logit()
        # BatchNorm has its statistics from data at once: an encoder without PT is then a baseline,
        # and not an overflow.
        some = torch.randperm(self.sizes["pretrain"])[:256]
        update_bn([(self.inputs("pretrain", some),)], network)
        return network

    def head(self):
        head = nn.Linear(2 * self.settings.width, len(self.finetune_tasks)).to(self.device)
        if self.settings.base_rates:
            # The rates of the PT tasks: FT's own are labels that a small FT set has not.
            rate = self.rates[: len(self.pretrain_tasks)].mean()
            nn.init.constant_(head.bias, rate.logit().item())
        return head

    def meta(self):
        return self.Weights(len(self.pretrain_tasks)).to(self.device)

    def pretrain_loss(self, network, meta, index, progress, live):
        """Σ_t 2σ(φ_t)·BCE_t / T.

        For φ (not `live`) everything is in evaluation mode, as in L_V: with dropout and a batch's
        own statistics L_PT changes along other directions than L_V does.
        """
        batch = self.inputs("pretrain", index)
        targets = self.labels("pretrain", index, self.pretrain_tasks)
        train = live or self.settings.meta_train

        def loss(theta, phi):
            outputs = metapt.call(network, theta, batch, train=train, live=live)
            losses = F.binary_cross_entropy_with_logits(outputs, targets, reduction="none")
            return metapt.call(meta, phi, losses.mean(0))

        return loss

    def finetune_loss(self, network, head, part, index):
        """The loss of the FT tasks that are seen before FT."""
        batch = self.inputs(part, index)
        targets = self.labels(part, index, self.seen_tasks)
        columns = self.seen

        def loss(theta, psi):
            features = metapt.call(network, theta, batch, features=True)
            outputs = metapt.call(head, psi, features)
            return F.binary_cross_entropy_with_logits(outputs[:, columns], targets)

        return loss

    def inputs(self, part, index):
        return self.graphs.batch(self.rows[part][index])

    def labels(self, part: str, index: Tensor, tasks: Tensor) -> Tensor:
        """0 or 1: [examples, tasks]."""
        return self.graphs.labels(self.rows[part][index], tasks)

    def targets(self, part, index):
        return self.labels(part, index, self.finetune_tasks)

    def loss(self, outputs, targets):
        """The loss of the tasks that FT is about."""
        return F.binary_cross_entropy_with_logits(outputs[:, self.scored], targets[:, self.scored])

    def score(self, outputs, targets):
        """Area under the ROC curve, averaged over the tasks that have both classes.

        Of all tasks at once: by scikit-learn, task by task, it would be most of FT's time.
        """
        from scipy.stats import rankdata

        scores = outputs[:, self.scored].cpu().numpy()
        labels = targets[:, self.scored].cpu().numpy() > 0.5
        both_classes = labels.any(0) & ~labels.all(0)
        if not both_classes.any():
            return math.nan
        scores = scores[:, both_classes]
        labels = labels[:, both_classes]
        positives = labels.sum(0)
        negatives = len(labels) - positives
        # The area is the share of pairs in which the positive ranks above the negative; ties count
        # half.
        rank_sum = (rankdata(scores, axis=0) * labels).sum(0)
        above = rank_sum - positives * (positives + 1) / 2
        return float((above / (positives * negatives)).mean())

    def finetune_mode(self, network):
        network.encoder.dropout = 0.5
        network.train()

    def measure(self, meta):
        return {"task_weight_spread": meta.weights().detach().std().item()}

    def weighted_tasks(self) -> Tensor:
        """The tasks that φ weighs, in its order."""
        return self.pretrain_tasks

    def table(self, meta):
        terms = [self.graphs.about["terms"][task] for task in self.weighted_tasks().tolist()]
        weights = meta.weights().tolist()
        return ["GO term", "weight"], list(zip(terms, weights, strict=True))

    def phi_from_table(self, values):
        for weight in values:
            if not 0 < weight < 2:
                raise metapt.BadInput(
                    f"a task has the weight {weight:g}, expected more than 0 and less than 2"
                )
        weights = torch.tensor(values, dtype=torch.float64)
        return {"task_logits": (weights / 2).logit().float()}

    def figures(self, meta):
        _, rows = self.table(meta)
        positives = self.graphs.positives(self.rows["pretrain"], self.pretrain_tasks)
        return {"tasks.png": lambda figure: draw_tasks(figure, rows, positives, self.permuted)}


def what_is_there(folder: Path) -> str:
    """Which prepared graphs to take: the published ones, or else those of yeast."""
    for name in PREPARED_BY:
        if (folder / name / "about.json").exists():
            return name
    return "published"


def divide_tasks(
    tasks: int, fixed: int, positives: np.ndarray | None, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Columns of the PT and of the FT tasks.

    The last `fixed` tasks are FT's. Where that is 0, 40 are drawn of those with 60 `positives`.
    """
    if fixed:
        finetune = np.arange(tasks - fixed, tasks)
    else:
        wanted = 40
        fewest = 60
        often = np.flatnonzero(positives >= fewest)
        if len(often) <= wanted:
            raise metapt.BadInput(
                f"{len(often)} GO terms have {fewest} proteins, "
                f"too few to draw {wanted} FT tasks from"
            )
        finetune = random.permutation(often)[:wanted]
    pretrain = np.setdiff1d(np.arange(tasks), finetune)
    return pretrain, random.permutation(finetune)


def divide_graphs(
    labels: np.ndarray, species: np.ndarray, random: np.random.Generator
) -> dict[str, np.ndarray]:
    """Rows of the parts; `labels` are those of the FT tasks, `species` NCBI taxa. See `PPI`."""
    everything = np.arange(len(labels))
    if len(set(species)) > 1:
        test = everything[species == HUMAN]
        if not len(test):
            raise metapt.BadInput(
                f"graphs of several species without human ({HUMAN}), which is the test species"
            )
        test = random.permutation(test)
        rest = random.permutation(everything[species != HUMAN])
        broad, unseen = np.array_split(test, 2)
        train, validation = np.split(rest, [round(0.85 * len(rest))])
    else:
        rest, test = stratified_split(everything, 0.3, labels, random)
        broad, unseen = stratified_split(test, 0.5, labels, random)
        train, validation = stratified_split(rest, 0.15, labels, random)
    return {
        "pretrain": np.concatenate([rest, broad]),
        "finetune": train,
        "validation": validation,
        "test": unseen,
        "broad": broad,
    }


def stratified_split(
    rows: np.ndarray, share: float, labels: np.ndarray, random: np.random.Generator
) -> list[np.ndarray]:
    """Rows in two, the second with a `share` of them, so that both have rare terms alike.

    Proteins are grouped by the rarest term that they have; those of groups of less than ten are
    grouped together, with those that have no term.
    """
    from sklearn.model_selection import train_test_split

    no_term = -1
    frequency = labels.sum(0)
    more_than_any = len(labels) + 1
    rarest = np.where(labels[rows], frequency, more_than_any).argmin(1)
    group = np.where(labels[rows].any(1), rarest, no_term)
    small_groups = [number for number in set(group) if (group == number).sum() < 10]
    group[np.isin(group, small_groups)] = no_term
    seed = int(random.integers(2**31))
    return train_test_split(rows, test_size=share, stratify=group, random_state=seed)


def draw_tasks(
    figure, rows: list[tuple[str, float]], positives: np.ndarray, permuted: np.ndarray
) -> None:
    """Left: the PT tasks with the highest and lowest weights. Right: weight by how frequent.

    Args:
        rows: terms and their weights.
        positives: [tasks], how many proteins of the PT part have the term.
        permuted: [tasks], tasks with permuted labels, which are red on both sides.
    """
    terms = [metapt.as_label(term) for term, _ in rows]
    weights = np.array([weight for _, weight in rows])
    if np.ptp(weights) < 1e-6:
        figure.set_size_inches(4.5, 0.6)
        common = f"all {len(weights):,} have the weight {weights[0]:.3g}"
        said = f"φ tells no PT task from another: {common}"
        figure.text(0.5, 0.5, said, ha="center", va="center")
        return

    order = np.argsort(weights)
    at_each_end = min(12, len(rows) // 2)
    extremes = np.concatenate([order[:at_each_end], order[len(order) - at_each_end :]])
    figure.set_size_inches(7, 0.14 * len(extremes) + 1)
    bars, points = figure.subplots(1, 2)
    places = range(len(extremes))
    colours = np.where(permuted[extremes], "C3", "C0")
    bars.barh(places, weights[extremes] - 1, color=colours, left=1)
    bars.set_yticks(places, [terms[i] for i in extremes], fontsize=6)
    bars.axvline(1, color="0.5", lw=0.6)
    bars.set(xlabel="weight of the PT task (it begins at 1)")

    groups = [(~permuted, "C0", "labels as they are"), (permuted, "C3", "labels permuted")]
    for chosen, colour, label in groups:
        points.plot(positives[chosen], weights[chosen], ".", ms=2, color=colour, label=label)
    if permuted.any():
        figure.legend(loc="outside upper right", ncols=2, markerscale=4)
    points.set(xscale="log", xlabel="proteins with the term in the PT part", ylabel="weight")


# ------------------------------------------------------------------------------------------------
# BGRL: PT without labels


class Drops(nn.Module):
    """φ = the shares of edges and of edge features that each of two views drops, as logits [2].

    How much is kept of a directed edge, or of a feature in a graph, is a draw of the concrete
    distribution (Maddison et al., ICLR 2017): (σ⁻¹(1 − share) + σ⁻¹(u)) / 0.5 through σ, u uniform.
    It is below one half for that share of all draws.

    What a node's edges sum up to shrinks as their number does: the features of single edges are not
    there to be left out. Self-loops stay.
    """

    def __init__(self, edges: tuple[float, float], features: tuple[float, float]):
        super().__init__()
        self.edges = nn.Parameter(torch.tensor(edges).logit())
        self.features = nn.Parameter(torch.tensor(features).logit())

    @staticmethod
    def keep(logit: Tensor, *shape: int) -> Tensor:
        """How much is kept, each entry drawn by itself."""
        u = torch.rand(shape, dtype=logit.dtype, device=logit.device)
        return ((u.logit(1e-6) - logit) / 0.5).sigmoid()

    def forward(self, batch: GraphBatch) -> list[GraphBatch]:
        """Two views of a batch, which ask about nodes."""
        # A self-loop adds 1 to feature 7 and to the number of edges, which is column 9.
        loop = batch.sums.new_zeros(10)
        loop[7] = 1
        loop[9] = 1
        sums = batch.sums - loop
        neighbours = sums[:, 9]
        nodes = torch.arange(len(sums), device=sums.device)
        goes_to = nodes.repeat_interleave(neighbours.long(), output_size=len(batch.source))
        views = []
        for edge, feature in zip(self.edges, self.features, strict=True):
            kept = self.keep(edge, len(goes_to))
            number = sums.new_zeros(len(sums), dtype=kept.dtype).index_add(0, goes_to, kept)
            share = number / neighbours.clamp(min=1)
            # Their number is no feature: nothing but edges takes from it.
            of_graph = F.pad(self.keep(feature, len(batch.size), 9), (0, 1), value=1.0)
            left = sums * share[:, None] * of_graph[batch.graph] + loop
            views.append(batch._replace(sums=left, kept=(kept, goes_to), by_node=True))
        return views


@dataclass(frozen=True)
class BGRLSettings(PPISettings):
    steps: int = 300
    warmup_share: float = 1 / 5
    dropout: float = 0.0
    meta_every: int = 5
    meta_batch_size: int = 64
    meta_lr: float = 0.05
    hvp: str = "exact"
    momentum: float = metapt.setting(0.999, "Of the target, a PT step", check=metapt.BELOW_1)

    def __post_init__(self):
        super().__post_init__()
        for name in ("permuted", "meta_train"):
            self.require(not getattr(self, name), name, "nothing: BGRL has no PT tasks")


class BGRL(PPI):
    """θ predicts from a node of one view what the target makes of it in the other.

    PT reads no labels. The target follows the encoder: see target.py.
    """

    Settings = BGRLSettings
    presets: ClassVar = {}
    captions: ClassVar = {"edges_1": "share of edges that a view drops"}
    mean_over_examples = False  # L_PT is a mean over nodes.
    # φ weighs no tasks here.
    table = metapt.Domain.table
    phi_from_table = metapt.Domain.phi_from_table
    figures = metapt.Domain.figures

    def network(self):
        width = self.settings.width
        norm = nn.BatchNorm1d(width)
        encoder = GIN(width, self.settings.layers, self.settings.dropout, last=norm)
        predictor = nn.Sequential(
            nn.Linear(width, 8 * width), nn.PReLU(), nn.Linear(8 * width, width)
        )
        network = metapt.Network(encoder, predictor).to(self.device)
        add_target(network, followed(network))
        some = torch.randperm(self.sizes["pretrain"])[:256]
        batch = self.inputs("pretrain", some)._replace(by_node=True)
        update_bn([(batch,)], network)
        return network

    def meta(self):
        return Drops(edges=(0.3, 0.25), features=(0.25, 0.1)).to(self.device)

    def pretrain_loss(self, network, meta, index, progress, live):
        batch = self.inputs("pretrain", index)
        online = followed(network)
        if live:
            move_target(network, online, self.settings.momentum)
        target = target_params(network, online)

        def loss(theta, phi):
            # Each view passes with its own BatchNorm statistics, in the target too.
            first, second = metapt.call(meta, phi, batch)
            a = metapt.call(network, theta, first, train=True, live=live)
            b = metapt.call(network, theta, second, train=True, live=live)
            aim_of_b = metapt.call(network, target, first, train=True, features=True)
            aim_of_a = metapt.call(network, target, second, train=True, features=True)
            agreement = F.cosine_similarity(a, aim_of_a) + F.cosine_similarity(b, aim_of_b)
            return 2 - agreement.mean()

        return loss

    def measure(self, meta):
        shares = {}
        for name, logits in metapt.detached(meta).items():
            for view, share in enumerate(logits.sigmoid().tolist(), 1):
                shares[f"{name}_{view}"] = share
        return shares


def followed(network: metapt.Network) -> dict[str, Tensor]:
    """The parameters that the target of BGRL follows: the encoder's."""
    return dict(network.encoder.named_parameters(prefix="encoder"))
