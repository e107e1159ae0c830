"""The GIN of Hu et al. as published, on PyG: messages edge by edge. Slow; `GIN` in
bench/domains/ppi.py is tested to equal it.
"""

import copy
from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch_geometric.data import Batch, Data
from torch_geometric.nn import MessagePassing, global_mean_pool

import metapt


class PlainLayer(MessagePassing):
    """A layer with the parameters of a `GINLayer`."""

    def __init__(self, layer: nn.Module):
        super().__init__(aggr="add")
        layer = copy.deepcopy(layer)
        self.edge, self.mlp = (
            layer.edge,
            nn.Sequential(layer.first, layer.norm, nn.ReLU(), layer.second),
        )

    def forward(self, x, edge_index, edge_attr):
        loops = torch.arange(len(x), device=x.device)
        loop_attr = edge_attr.new_zeros(len(x), 9)
        loop_attr[:, 7] = 1
        edge_index = torch.cat([edge_index, torch.stack([loops, loops])], 1)
        return self.mlp(
            self.propagate(edge_index, x=x, edge_attr=self.edge(torch.cat([edge_attr, loop_attr])))
        )

    def message(self, x_j, edge_attr):
        return torch.cat([x_j, edge_attr], 1)


class PlainGIN(nn.Module):
    """The same function as the `GIN` whose parameters it copies."""

    def __init__(self, gin: nn.Module):
        super().__init__()
        self.embedding = nn.Parameter(gin.embedding.detach().clone())
        self.layers, self.dropout = (
            nn.ModuleList(PlainLayer(layer) for layer in gin.layers),
            gin.dropout,
        )

    def forward(self, data: Batch):
        x = self.embedding.expand(data.num_nodes, -1)
        for i, layer in enumerate(self.layers):
            x = layer(x, data.edge_index, data.edge_attr)
            x = F.dropout(x.relu() if i + 1 < len(self.layers) else x, self.dropout, self.training)
        first = data.ptr[:-1]
        return torch.cat([global_mean_pool(x, data.batch), x[first + data.centre]], 1)

    def in_order_of(self, gin: nn.Module) -> list[nn.Parameter]:
        """Its parameters in the order of `gin.parameters()`."""
        own = {"embedding": self.embedding}
        for i, layer in enumerate(self.layers):
            for name, module in zip(
                ("first", "norm", "second"), (layer.mlp[0], layer.mlp[1], layer.mlp[3]), strict=True
            ):
                own |= {f"layers.{i}.{name}.{k}": p for k, p in module.named_parameters()}
            own |= {f"layers.{i}.edge.{k}": p for k, p in layer.edge.named_parameters()}
        return [own[name] for name, _ in gin.named_parameters()]


class PlainGraphs:
    """Graphs as PyG's InMemoryDataset keeps them: flat tensors of all, labels int64, a `Data`
    object cut out when asked for.

    `raw`: a `RawGraphs` of data_scripts/graphs.py.
    """

    def __init__(self, raw, dtype=torch.float32):
        self.sizes, self.centre = raw.sizes, torch.as_tensor(raw.centre)
        self.ends = np.concatenate([[0], np.cumsum(raw.degrees)])
        self.edges = torch.from_numpy(raw.edges.astype(np.int64))
        self.features, self.y = (
            torch.from_numpy(raw.features).to(dtype),
            torch.from_numpy(raw.labels.astype(np.int64)),
        )

    def __getitem__(self, i: int) -> Data:
        e = slice(self.ends[i], self.ends[i + 1])
        return Data(
            num_nodes=int(self.sizes[i]),
            edge_index=self.edges[:, e],
            edge_attr=self.features[e],
            centre=self.centre[i : i + 1],
            y=self.y[i : i + 1],
        )


def plain_batch(raw, index: np.ndarray, dtype=torch.float64) -> Batch:
    graphs = PlainGraphs(raw, dtype)
    return Batch.from_data_list([graphs[i] for i in index])


class PlainPPI:
    """The PPI domain with graphs as PyG Data objects, messages by edge and a float64 loss, as the
    published code has it.

    All graphs are in memory, `blocks` of equal numbers of them.
    """

    def __init__(self, domain: metapt.Domain, blocks: Iterable, encoder):
        self.domain, self.encoder, self.blocks = (
            domain,
            encoder,
            [PlainGraphs(raw) for raw in blocks],
        )

    backward = metapt.Domain.backward

    def __getattr__(self, name):
        return getattr(self.domain, name)

    def network(self):
        network = self.domain.network()
        network.encoder = self.encoder(network.encoder)
        return network

    def collated(self, index):
        places = [divmod(i, len(self.blocks[0].sizes)) for i in index.tolist()]
        return Batch.from_data_list([self.blocks[block][i] for block, i in places]).to(self.device)

    def pretrain_loss(self, network, meta, index, progress, live):
        batch, tasks = self.collated(index), len(self.pretrain_tasks)

        def loss(theta, phi):
            outputs = metapt.call(network, theta, batch, train=True, live=live).double()
            losses = F.binary_cross_entropy_with_logits(
                outputs, batch.y[:, :tasks].double(), reduction="none"
            )
            return metapt.call(meta, phi, losses.mean(0))

        return loss

    def finetune_loss(self, network, head, part, index):
        batch, tasks = self.collated(index), len(self.pretrain_tasks)

        def loss(theta, psi):
            outputs = metapt.call(
                head, psi, metapt.call(network, theta, batch, features=True)
            ).double()
            return F.binary_cross_entropy_with_logits(outputs, batch.y[:, tasks:].double())

        return loss
