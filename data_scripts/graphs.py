"""The layout of prepared graphs: what the scripts of protein interaction graphs write.

A graph is the neighbourhood of one protein. Its edges are directed, each is there in both directions, and they have 9
features: seven kinds of evidence (`CHANNELS`), self-loop, masked (Hu et al., ICLR 2020). All graphs lie one after the
other in flat arrays (`ARRAYS`), in which a node's edges are already summed up.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from files import BadInput, prepared_folder

FORMAT = "metapt graphs 2"
CHANNELS = ("neighborhood", "fusion", "cooccurence", "coexpression", "experimental", "database", "textmining")
ARRAYS = {
    "sizes": np.int32,  # [graphs]: nodes
    "degrees": np.int32,  # [graphs]: directed edges
    "centre": np.int32,  # [graphs]: number of the protein within its graph
    "species": np.int32,  # [graphs]: NCBI taxon
    "labels": np.uint8,  # [graphs, tasks / 8, rounded up]: one bit a task, the lowest first
    "sums": np.float32,  # [nodes, 10]: the features of the edges to the node and its self-loop, summed; their number
    "source": np.uint16,  # [edges]: node within the graph; edges are sorted by graph and by the node they go to
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


def prepare_graphs(folder: Path, pieces: Iterable[RawGraphs], terms: list[str], finetune_terms: int, **about) -> dict:
    """Writes graphs in the prepared layout; the folder gets its name when it is whole.

    Args:
        folder: where they go, as `files.locked` gives it; prepared graphs that are there are replaced.
        pieces: the graphs, in parts, so that a source need not be in memory at once.
        terms: names of the tasks.
        finetune_terms: the last so many of them are FT tasks; 0: they are drawn by seed.
        about: `source` and `licence`.

    Returns:
        What about.json says.

    Raises:
        BadInput: a graph that cannot be, or no graph at all.
    """
    counts = {"graphs": 0, "nodes": 0, "edges": 0}
    about = {"format": FORMAT, **about}
    with prepared_folder(folder, about) as append:
        for piece in pieces:
            for name, values in flatten(piece, counts["graphs"], len(terms)).items():
                append(name, values.astype(ARRAYS[name]))
            added = {"graphs": len(piece.sizes), "nodes": piece.sizes.sum(), "edges": piece.degrees.sum()}
            counts = {name: counts[name] + int(n) for name, n in added.items()}
        if not all(counts.values()):
            raise BadInput(f"there is no graph with an edge: {counts['graphs']} graphs, {counts['edges']} edges")
        about |= {**counts, "tasks": len(terms), "finetune_terms": finetune_terms, "terms": terms}
    print(f"{about['graphs']} graphs, {about['nodes']} nodes and {about['edges']} directed edges, {about['tasks']} "
          f"tasks in {folder}")  # fmt: skip
    return about


def flatten(raw: RawGraphs, before: int, tasks: int) -> dict[str, np.ndarray]:
    """The arrays of the prepared layout, after checks; `before`: graphs before these, to say which one is wrong."""
    for name, dimensions in {"sizes": 1, "degrees": 1, "edges": 2, "centre": 1, "species": 1}.items():
        values = getattr(raw, name)
        if values.ndim != dimensions or not np.issubdtype(values.dtype, np.integer):
            raise BadInput(f"{name} of the graphs: {values.dtype} {list(values.shape)}, expected whole numbers")
    for name, columns in {"features": 9, "labels": tasks}.items():
        if getattr(raw, name).shape[1:] != (columns,):
            raise BadInput(f"{name} of the graphs: {list(getattr(raw, name).shape)}, expected {columns} columns")
    rows = {len(raw.sizes), len(raw.degrees), len(raw.centre), len(raw.species), len(raw.labels)}
    edges = {raw.edges.shape[1], len(raw.features), int(raw.degrees.sum())}
    if len(rows) > 1 or len(edges) > 1 or len(raw.edges) != 2 or (raw.degrees < 0).any():
        raise BadInput(f"arrays of graphs that do not fit each other: {sorted(rows)} graphs, {sorted(edges)} edges")
    graph = np.repeat(np.arange(len(raw.sizes)), raw.degrees)
    source, target = raw.edges

    def require(right, what, graphs=None):
        if not right.all():
            wrong = np.flatnonzero(~right)[0]
            raise BadInput(f"graph {before + (wrong if graphs is None else graphs[wrong])}: {what}")

    require((raw.sizes > 0) & (raw.sizes < 2**16), "it has no nodes, or more than 65,535")
    require((raw.centre >= 0) & (raw.centre < raw.sizes), "its centre is none of its nodes")
    require((raw.species >= 0) & (raw.species < 2**31), "its species is no NCBI taxon")
    require((raw.edges.min(0) >= 0) & (raw.edges.max(0) < raw.sizes[graph]), "an edge leaves the graph", graph)
    require(((raw.labels == 0) | (raw.labels == 1)).all(1), "a label is neither 0 nor 1")
    require(np.isfinite(raw.features.astype(np.float32)).all(1), "an edge feature is not finite", graph)
    first = (raw.sizes.cumsum() - raw.sizes)[graph]
    order = np.lexsort((source, first + target))
    other = np.lexsort((target, first + source))
    there_and_back = ((first + target)[order] == (first + source)[other]) & (source[order] == target[other])
    require(there_and_back, "an edge has no counterpart in the other direction", graph[order])
    nodes = int(raw.sizes.sum())
    sums = np.stack([np.bincount(first + target, weights=column, minlength=nodes) for column in raw.features.T]
                    + [np.bincount(first + target, minlength=nodes)], 1)  # fmt: skip
    sums[:, [7, 9]] += 1  # the self-loop: feature 7
    return {"sizes": raw.sizes, "degrees": raw.degrees, "centre": raw.centre, "species": raw.species,
            "labels": np.packbits(raw.labels.astype(bool), axis=1, bitorder="little"), "sums": sums,
            "source": source[order]}  # fmt: skip
