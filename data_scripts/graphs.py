"""The layout of prepared graphs: what the scripts of protein interaction graphs write.

A graph is the neighbourhood of one protein. Its edges are directed, each is there in both
directions, and they have 9 features: seven kinds of evidence (`CHANNELS`), self-loop, masked
(Hu et al., ICLR 2020). All graphs lie one after the other in flat arrays (`ARRAYS`), in which a
node's edges are already summed up.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_scripts.files import BadInput, prepared_folder

FORMAT = "metapt graphs 2"
CHANNELS = (
    "neighborhood",
    "fusion",
    "cooccurence",
    "coexpression",
    "experimental",
    "database",
    "textmining",
)
FEATURES = len(CHANNELS) + 2
SELF_LOOP = len(CHANNELS)  # its place among the features
ARRAYS = {
    "sizes": np.int32,  # [graphs]: nodes
    "degrees": np.int32,  # [graphs]: directed edges
    "centre": np.int32,  # [graphs]: number of the protein within its graph
    "species": np.int32,  # [graphs]: NCBI taxon
    "labels": np.uint8,  # [graphs, tasks / 8, rounded up]: one bit a task, the lowest first
    # [nodes, 10]: the features of the edges to the node and its self-loop, summed; their number
    "sums": np.float32,
    # [edges]: node within the graph; edges are sorted by graph and by the node they go to
    "source": np.uint16,
}


class RawGraphs(NamedTuple):
    """Some graphs as a source gives them: numpy arrays, one graph after the other."""

    sizes: np.ndarray  # [graphs]: nodes
    degrees: np.ndarray  # [graphs]: directed edges
    edges: np.ndarray  # [2, edges]: from, to; numbers within the graph
    features: np.ndarray  # [edges, 9]
    centre: np.ndarray  # [graphs]: number within the graph
    species: np.ndarray  # [graphs]: NCBI taxon
    labels: np.ndarray  # [graphs, tasks]: 0 or 1


def prepare_graphs(
    folder: Path, pieces: Iterable[RawGraphs], terms: list[str], finetune_terms: int, **about
) -> dict:
    """Writes graphs in the prepared layout; the folder gets its name when it is whole.

    Args:
        folder: where they go, as `files.locked` gives it; prepared graphs there are replaced.
        pieces: the graphs, in parts, so that a source need not be in memory at once.
        terms: names of the tasks.
        finetune_terms: the last so many of them are FT tasks; 0: they are drawn by seed.
        about: `source` and `licence`.

    Returns:
        What about.json says.

    Raises:
        BadInput: a graph that cannot be, or no graph at all.
    """
    graphs = 0
    nodes = 0
    edges = 0
    about = {"format": FORMAT, **about}
    with prepared_folder(folder, about) as append:
        for piece in pieces:
            for name, values in flatten(piece, graphs, len(terms)).items():
                append(name, values.astype(ARRAYS[name]))
            graphs += len(piece.sizes)
            nodes += int(piece.sizes.sum())
            edges += int(piece.degrees.sum())
        if not edges:
            raise BadInput(f"there is no graph with an edge: {graphs} graphs, {edges} edges")
        about["graphs"] = graphs
        about["nodes"] = nodes
        about["edges"] = edges
        about["tasks"] = len(terms)
        about["finetune_terms"] = finetune_terms
        about["terms"] = terms
    counts = f"{graphs} graphs, {nodes} nodes and {edges} directed edges, {len(terms)} tasks"
    print(f"{counts} in {folder}")
    return about


def flatten(raw: RawGraphs, before: int, tasks: int) -> dict[str, np.ndarray]:
    """The arrays of the prepared layout, after checks.

    `before` is how many graphs come before these, to say which one is wrong.
    """
    require_shapes(raw, tasks)
    graph = np.repeat(np.arange(len(raw.sizes)), raw.degrees)  # of each edge
    source, target = raw.edges

    def require(right, what, graphs=None):
        if not right.all():
            wrong = np.flatnonzero(~right)[0]
            number = wrong if graphs is None else graphs[wrong]
            raise BadInput(f"graph {before + number}: {what}")

    inside = (raw.edges.min(0) >= 0) & (raw.edges.max(0) < raw.sizes[graph])
    known = ((raw.labels == 0) | (raw.labels == 1)).all(1)
    finite = np.isfinite(raw.features.astype(np.float32)).all(1)
    require((raw.sizes > 0) & (raw.sizes < 2**16), "it has no nodes, or more than 65,535")
    require((raw.centre >= 0) & (raw.centre < raw.sizes), "its centre is none of its nodes")
    require((raw.species >= 0) & (raw.species < 2**31), "its species is no NCBI taxon")
    require(inside, "an edge leaves the graph", graph)
    require(known, "a label is neither 0 nor 1")
    require(finite, "an edge feature is not finite", graph)

    first = (raw.sizes.cumsum() - raw.sizes)[graph]  # node of the edge's graph
    forward = np.lexsort((source, first + target))
    backward = np.lexsort((target, first + source))
    same_target = (first + target)[forward] == (first + source)[backward]
    same_source = source[forward] == target[backward]
    require(
        same_target & same_source,
        "an edge has no counterpart in the other direction",
        graph[forward],
    )

    nodes = int(raw.sizes.sum())
    columns = [
        np.bincount(first + target, weights=column, minlength=nodes) for column in raw.features.T
    ]
    columns.append(np.bincount(first + target, minlength=nodes))
    sums = np.stack(columns, 1)
    sums[:, SELF_LOOP] += 1
    sums[:, FEATURES] += 1
    return {
        "sizes": raw.sizes,
        "degrees": raw.degrees,
        "centre": raw.centre,
        "species": raw.species,
        "labels": np.packbits(raw.labels.astype(bool), axis=1, bitorder="little"),
        "sums": sums,
        "source": source[forward],
    }


def require_shapes(raw: RawGraphs, tasks: int) -> None:
    """Raises BadInput where the arrays are not what `RawGraphs` says, or do not fit each other."""
    dimensions = {"sizes": 1, "degrees": 1, "edges": 2, "centre": 1, "species": 1}
    for name, expected in dimensions.items():
        values = getattr(raw, name)
        if values.ndim != expected or not np.issubdtype(values.dtype, np.integer):
            found = f"{values.dtype} {list(values.shape)}"
            raise BadInput(f"{name} of the graphs: {found}, expected whole numbers")
    for name, columns in {"features": FEATURES, "labels": tasks}.items():
        shape = getattr(raw, name).shape
        if shape[1:] != (columns,):
            raise BadInput(f"{name} of the graphs: {list(shape)}, expected {columns} columns")
    rows = {len(raw.sizes), len(raw.degrees), len(raw.centre), len(raw.species), len(raw.labels)}
    edges = {raw.edges.shape[1], len(raw.features), int(raw.degrees.sum())}
    same = len(rows) == 1 and len(edges) == 1 and len(raw.edges) == 2
    if not same or (raw.degrees < 0).any():
        counts = f"{sorted(rows)} graphs, {sorted(edges)} edges"
        raise BadInput(f"arrays of graphs that do not fit each other: {counts}")
