# /// script
# requires-python = ">=3.11"
# dependencies = ["numpy>=2.0,<3", "requests>=2.32,<3", "rich>=13.9,<16", "typer>=0.16,<1"]
# ///
"""Evidence networks of STRING and GO annotation, from a folder, to ego networks of radius 1.

    python data_scripts/string_graphs.py --from FOLDER [--data data] [--cap 64] [--species 4932] [--name string-yeast]

Writes DATA/ppi/NAME in the layout of graphs.py. FOLDER (or its `original`) holds, as published with BraneMF (Jagtap et
al., Bioinformatics 2022), *_<channel>_*.txt: "u v score", nodes numbered from 1; *_node_dict.txt: {protein: node − 1};
org_*.txt: tab-separated, a protein a row, a GO term a column, 0 or 1. Any of them may be gzip-compressed. A channel
without a file is zero throughout.
"""

import ast
import gzip
import re
import zlib
from pathlib import Path
from typing import Annotated

import files
import numpy as np
import typer
from files import BadInput, Check, Data, From
from graphs import CHANNELS, FORMAT, RawGraphs, prepare_graphs

SOURCE = "STRING 11.5 and GO annotation as published with BraneMF, https://github.com/Surabhivj/BraneMF"
LICENCE = "CC BY 4.0 (STRING, Gene Ontology)"


def read_string(source: Path) -> tuple[dict, list[str], np.ndarray]:
    """The files of a folder.

    Returns:
        scores: channel → (key u · proteins + v of each link [links], nodes numbered from 0; its score [links]);
        terms: names of the GO terms;
        labels: [proteins, terms], 0 or 1.

    Raises:
        BadInput: a file is missing or not what it should be.
    """
    source = source / "original" if (source / "original").is_dir() else source

    def find(pattern):
        return sorted([*source.glob(pattern + ".txt"), *source.glob(pattern + ".txt.gz")])

    def text(path):
        return (gzip.open if path.suffix == ".gz" else open)(path, "rt")

    networks = [(channel, path) for channel in CHANNELS for path in find(f"Org*_{channel}_*")]
    if not (dictionary := find("*node_dict")) or not (matrices := find("org_*")) or not networks:
        raise BadInput(f"{source} holds no *_node_dict.txt, no org_*.txt or no Org*_<channel>_*.txt")
    scores, terms, columns = {}, [], []
    try:
        path = dictionary[0]
        with text(path) as file:
            node_of = dict(ast.literal_eval(file.read()))
        proteins = int(max(node_of.values())) + 1
        if len(set(node_of.values())) < len(node_of) or not all(n in range(1_000_000) for n in node_of.values()):
            raise ValueError("two proteins on one node, or a node that is none of 0 to 999,999")
        for channel, path in networks:
            with text(path) as file:
                links = np.loadtxt(file, ndmin=2)
            if not len(links) or links.shape[1] != 3 or not np.isfinite(links).all():
                raise ValueError("expected links, each two nodes and a finite score")
            nodes = links[:, :2]
            if (nodes % 1).any() or (nodes < 1).any() or (nodes > proteins).any() or (nodes[:, 0] == nodes[:, 1]).any():
                raise ValueError("a node that is no whole number, a link to itself, or a node not in the dictionary")
            u, v = nodes.astype(np.int64).T - 1
            scores[channel] = u * proteins + v, links[:, 2]
        for path in matrices:
            with text(path) as file:
                names = file.readline().split()[1:]
                rows = [row for row in map(str.split, file) if row and row[0] in node_of]  # others have no links
            values = np.array([row[1:] for row in rows], np.int64)
            if not names or values.shape != (len(rows), len(names)) or not ((values == 0) | (values == 1)).all():
                raise ValueError("expected a 0 or 1 for each GO term of each protein")
            table = np.zeros((proteins, len(names)), np.uint8)
            table[[node_of[row[0]] for row in rows]] = values
            terms, columns = terms + names, [*columns, table]
    except (OSError, EOFError, zlib.error, ValueError, LookupError, TypeError, ArithmeticError, SyntaxError,
            MemoryError, RecursionError) as error:  # fmt: skip
        raise BadInput(f"{path} cannot be read: {type(error).__name__} {error}") from None
    return scores, terms, np.concatenate(columns, 1)


def ego_networks(scores: dict, labels: np.ndarray, cap: int, species: int) -> RawGraphs:
    """The neighbourhood of each protein that has links; of too many neighbours those of highest total score stay."""
    proteins = len(labels)
    keys = np.unique(np.concatenate([key for key, _ in scores.values()]))  # sorted by u, then v
    u, v = keys // proteins, keys % proteins
    features, strength = np.zeros((len(keys), 9), np.float32), np.zeros(len(keys))
    for channel, (key, score) in scores.items():
        place = np.searchsorted(keys, key)
        features[place, CHANNELS.index(channel)] = score > 0
        strength[place] += score
    first = np.searchsorted(u, np.arange(proteins + 1))
    centres = np.flatnonzero(np.diff(first))
    position, sizes, degrees, edges, kept = np.full(proteins, -1), [], [], [], []
    for centre in centres:
        own = np.arange(first[centre], first[centre + 1])
        own = np.sort(own[np.argsort(-strength[own], kind="stable")[: cap - 1]])
        nodes = np.concatenate([[centre], v[own]])
        position[nodes] = np.arange(len(nodes))
        inside = np.concatenate([np.arange(first[n], first[n + 1]) for n in nodes])
        inside = inside[position[v[inside]] >= 0]
        edges.append(position[np.stack([u[inside], v[inside]])])
        kept.append(inside)
        sizes.append(len(nodes))
        degrees.append(len(inside))
        position[nodes] = -1
    return RawGraphs(np.array(sizes), np.array(degrees), np.concatenate(edges, 1), features[np.concatenate(kept)],
                     np.zeros(len(centres), np.int64), np.full(len(centres), species), labels[centres])  # fmt: skip


def string_graphs(
    data: Data = Path("data"),
    from_: From = None,
    cap: Annotated[int, typer.Option(help="Nodes of a graph at most; the centre is always kept", min=2)] = 64,
    species: Annotated[int, typer.Option(help="NCBI taxon")] = 4932,
    name: Annotated[str, typer.Option(help="Of the folder under DATA/ppi")] = "string-yeast",
    check: Check = False,
):
    """Prepare ego networks from STRING's evidence networks and GO annotation in a folder."""
    files.one_of(from_=from_, check=check)
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise BadInput(f"--name is {name!r}, expected the name of a folder")
    if check:
        return files.check(data / "ppi" / name, FORMAT)
    if from_ is None:
        raise BadInput("STRING's and GO's files are taken from a folder: name it with --from")
    with files.locked(data / "ppi" / name, FORMAT) as folder:
        scores, terms, labels = read_string(from_)
        prepare_graphs(folder, [ego_networks(scores, labels, cap, species)], terms, 0, source=SOURCE, licence=LICENCE)


if __name__ == "__main__":
    files.run(string_graphs)
