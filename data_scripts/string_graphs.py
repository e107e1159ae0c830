"""Evidence networks of STRING and GO annotation, from a folder, to ego networks of radius 1.

    python -m data_scripts.string_graphs --from FOLDER [--data data] [--cap 64] [--species 4932]
                                         [--name string-yeast] | --check

Writes DATA/ppi/NAME in the layout of graphs.py. FOLDER (or its `original`) holds, as published
with BraneMF (Jagtap et al., Bioinformatics 2022),

- Org<taxon>_<channel>_*.txt: "u v score", nodes numbered from 1, each link in both directions;
- *_node_dict.txt, once: {protein: node - 1};
- org_<taxon>_*.txt: tab-separated, a protein a row, a GO term a column, 0 or 1.

Any of them may be gzip-compressed. A channel without a file is zero throughout. What is in doubt
is refused: two files in one role, a term or a protein twice, a link with two scores. What is left
out is counted and said.
"""

import ast
import io
import re
import zlib
from pathlib import Path
from typing import Annotated, NamedTuple, TextIO

import numpy as np
import typer

from data_scripts import files
from data_scripts.files import BadInput, Check, Data, From
from data_scripts.graphs import CHANNELS, FEATURES, FORMAT, RawGraphs, prepare_graphs

SOURCE = (
    "STRING 11.5 and GO annotation as published with BraneMF, https://github.com/Surabhivj/BraneMF"
)
LICENCE = "CC BY 4.0 (STRING, Gene Ontology)"
TEXT = r"\.(?i:txt(\.gz)?)"
NETWORK = re.compile(rf"Org.*{TEXT}")
DICTIONARY = re.compile(rf".*node_dict{TEXT}")
MATRIX = re.compile(rf"org_.*{TEXT}")
CHANNEL = re.compile(rf"_(?P<channel>{'|'.join(CHANNELS)})[_.]")
TRANSFERRED = "transferred"  # marks evidence from other species, which is not the channel itself
TAXON = re.compile(r"[Oo]rg_?(?P<taxon>\d+)_")
MOST_PROTEINS = 1_000_000
# What readers raise for content that is torn or something else.
UNREADABLE = (
    OSError,
    EOFError,
    zlib.error,
    ValueError,
    LookupError,
    TypeError,
    ArithmeticError,
    SyntaxError,
    MemoryError,
    RecursionError,
)


class Sources(NamedTuple):
    """Which file has which role."""

    dictionary: Path
    networks: dict[str, Path]  # channel: its file
    matrices: list[Path]


class Network(NamedTuple):
    """The links of a channel, sorted, each once for each direction."""

    key: np.ndarray  # u · proteins + v of each link [links], nodes numbered from 0
    score: np.ndarray  # [links]
    repeated: int  # lines that were left out, as they say what another says


class Matrix(NamedTuple):
    """A table of GO annotation."""

    terms: list[str]
    labels: np.ndarray  # [proteins of the dictionary, terms], 0 or 1
    rows: int
    unknown: int  # rows of proteins that the dictionary lacks
    missing: int  # proteins of the dictionary that have no row


def two_in_one_role(first: Path, second: Path, role: str) -> BadInput:
    """The error that names two files where one is wanted."""
    return BadInput(f"two files of {role}: {first} and {second}: remove one of them")


def find_sources(folder: Path) -> Sources:
    """Gives each file of a folder, and of its folder `original`, its role.

    Raises:
        BadInput: a role has two files or none, or the files are of two species.
    """
    dictionaries = []
    networks = []
    matrices = []
    for place in (folder, folder / "original"):
        for path in sorted(place.iterdir()) if place.is_dir() else []:
            if DICTIONARY.fullmatch(path.name):
                dictionaries.append(path)
            elif NETWORK.fullmatch(path.name):
                networks.append(path)
            elif MATRIX.fullmatch(path.name):
                matrices.append(path)
    network_of = find_networks(networks)
    missing = []
    if not dictionaries:
        missing.append("*_node_dict.txt")
    if not matrices:
        missing.append("org_<taxon>_*.txt")
    if not network_of:
        missing.append("Org<taxon>_<channel>_*.txt")
    if missing:
        raise BadInput(f"{folder} holds no {' and no '.join(missing)}")
    if len(dictionaries) > 1:
        raise two_in_one_role(*dictionaries[:2], "the numbers of proteins")
    matrix_of = {}
    for path in matrices:
        name = re.sub(rf"{TEXT}$", "", path.name)
        if name in matrix_of:
            raise two_in_one_role(matrix_of[name], path, f"the annotation {name}")
        matrix_of[name] = path
    require_one_species([*network_of.values(), *matrices])
    return Sources(dictionaries[0], network_of, matrices)


def find_networks(paths: list[Path]) -> dict[str, Path]:
    """The file of each channel, in the order of `CHANNELS`; says which files are of no channel.

    Raises:
        BadInput: a channel has two files, or one of links transferred from other species.
    """
    networks = {}
    transferred = {}
    for path in paths:
        found = CHANNEL.search(path.name)
        if found is None:
            print(f"left out: {path} is of none of the channels {', '.join(CHANNELS)}")
            continue
        channel = found["channel"]
        kind = transferred if TRANSFERRED in path.name else networks
        if channel in kind:
            raise two_in_one_role(kind[channel], path, f"the channel {channel}")
        kind[channel] = path
    for channel, path in transferred.items():
        if channel in networks:
            raise two_in_one_role(networks[channel], path, f"the channel {channel}")
        other = f"evidence {TRANSFERRED} from other species, which is not the channel {channel}"
        raise BadInput(f"{path} has {other}: remove it")
    return {channel: networks[channel] for channel in CHANNELS if channel in networks}


def require_one_species(paths: list[Path]) -> None:
    """Refuses files whose names tell of two taxa."""
    first = {}
    for path in paths:
        found = TAXON.match(path.name)
        if found:
            first.setdefault(found["taxon"], path)
    if len(first) > 1:
        one, other = list(first.values())[:2]
        raise BadInput(f"files of two species: {one} and {other}: remove those of one")


def read(reader, path: Path, *arguments):
    """What `reader` makes of a text file, compressed or not; BadInput names one that is wrong."""
    try:
        with io.TextIOWrapper(files.open_plain(path), encoding="utf-8-sig") as file:
            return reader(file, *arguments)
    except UNREADABLE as error:
        raise BadInput(f"{path} cannot be read: {type(error).__name__} {error}") from None


def read_dictionary(file: TextIO) -> dict[str, int]:
    """{protein: node}, nodes numbered from 0."""
    node_of = dict(ast.literal_eval(file.read()))
    nodes = list(node_of.values())
    if len(set(nodes)) < len(nodes):
        raise ValueError("two proteins on one node")
    if not nodes or not all(node in range(MOST_PROTEINS) for node in nodes):
        raise ValueError(f"expected proteins, each with a node from 0 to {MOST_PROTEINS - 1:,}")
    return {name: int(node) for name, node in node_of.items()}


def read_network(file: TextIO, proteins: int) -> Network:
    """The links of a channel, which must be there in both directions with the same score."""
    links = np.loadtxt(file, ndmin=2)
    if len(links) == 0 or links.shape[1] != 3 or not np.isfinite(links).all():
        raise ValueError("expected links, each two nodes and a finite score")
    nodes = links[:, :2]
    if (nodes % 1).any():
        raise ValueError("a node that is no whole number")
    if (nodes < 1).any() or (nodes > proteins).any():
        raise ValueError("a node that is not in the dictionary")
    if (nodes[:, 0] == nodes[:, 1]).any():
        raise ValueError("a link to itself")
    u, v = nodes.astype(np.int64).T - 1
    key, first, place = np.unique(u * proteins + v, return_index=True, return_inverse=True)
    score = links[first, 2]
    require_one_score(key[place], score[place], links[:, 2], proteins)

    # The same links in the other direction, in the order of `key`.
    reverse = key % proteins * proteins + key // proteins
    back = np.searchsorted(key, reverse).clip(max=len(key) - 1)
    alone = np.flatnonzero(key[back] != reverse)
    if len(alone):
        u, v = divmod(int(key[alone[0]]), proteins)
        raise ValueError(f"the link from node {u + 1} to node {v + 1} lacks its other direction")
    require_one_score(key, score, score[back], proteins)
    return Network(key, score, len(links) - len(key))


def require_one_score(key: np.ndarray, one: np.ndarray, other: np.ndarray, proteins: int) -> None:
    """Raises ValueError where two scores of a link differ, and names it."""
    differs = np.flatnonzero(one != other)
    if len(differs):
        link = differs[0]
        u, v = divmod(int(key[link]), proteins)
        scores = f"{one[link]:g} and {other[link]:g}"
        raise ValueError(f"the link of nodes {u + 1} and {v + 1} has two scores, {scores}")


def read_matrix(file: TextIO, node_of: dict[str, int], proteins: int) -> Matrix:
    """A table of GO annotation; names may have spaces where tabs separate the columns."""
    lines = [line.rstrip() for line in file]
    lines = [line for line in lines if line]
    if len(lines) < 2:
        raise ValueError("expected a row of terms, and a row for each protein")
    separator = "\t" if "\t" in lines[0] else None
    header, *rows = [[cell.strip() for cell in line.split(separator)] for line in lines]
    terms = header[1:]
    require_distinct(terms, "the term")
    require_distinct([row[0] for row in rows], "the protein")
    known = [row for row in rows if row[0] in node_of]
    if not known:
        raise ValueError("no row is of a protein in the dictionary")
    values = np.array([row[1:] for row in known], np.int64)
    shape = (len(known), len(terms))
    if not terms or values.shape != shape or not ((values == 0) | (values == 1)).all():
        raise ValueError("expected a 0 or 1 for each GO term of each protein")
    labels = np.zeros((proteins, len(terms)), np.uint8)
    labels[[node_of[row[0]] for row in known]] = values
    return Matrix(terms, labels, len(rows), len(rows) - len(known), len(node_of) - len(known))


def require_distinct(names: list[str], what: str) -> None:
    """Raises ValueError where a name is there twice."""
    seen = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{what} {name} is there twice")
        seen.add(name)


def read_string(source: Path) -> tuple[dict[str, Network], list[str], np.ndarray]:
    """The files of a folder; says what of them is left out.

    Returns:
        networks: by channel;
        terms: names of the GO terms;
        labels: [proteins, terms], 0 or 1.

    Raises:
        BadInput: a file is missing, not what it should be, or beside another in its role.
    """
    sources = find_sources(source)
    node_of = read(read_dictionary, sources.dictionary)
    proteins = max(node_of.values()) + 1
    networks = {
        channel: read(read_network, path, proteins) for channel, path in sources.networks.items()
    }
    matrices = {path: read(read_matrix, path, node_of, proteins) for path in sources.matrices}
    terms = require_terms(matrices)
    without = [channel for channel in CHANNELS if channel not in networks]
    if without:
        print(f"zero throughout, as there is no file of them: {', '.join(without)}")
    for channel, network in networks.items():
        if network.repeated:
            path = sources.networks[channel]
            print(f"{path}: {network.repeated} lines repeat a link with the same score")
    for path, matrix in matrices.items():
        if matrix.unknown:
            which = "of proteins that the dictionary lacks"
            print(f"{path}: left out {matrix.unknown} of {matrix.rows} rows, {which}")
        if matrix.missing:
            print(f"{path}: {matrix.missing} of {len(node_of)} proteins have no row: all labels 0")
    return networks, terms, np.concatenate([matrix.labels for matrix in matrices.values()], 1)


def require_terms(matrices: dict[Path, Matrix]) -> list[str]:
    """All terms; BadInput names one that two files have, which could be in PT and in FT, too."""
    place = {}
    for path, matrix in matrices.items():
        for term in matrix.terms:
            if term in place:
                raise BadInput(f"the term {term} is in two files: {place[term]} and {path}")
            place[term] = path
    return list(place)


def ego_networks(
    networks: dict[str, Network], labels: np.ndarray, cap: int, species: int
) -> RawGraphs:
    """The neighbourhood of each protein that has links.

    Of more than `cap` - 1 neighbours those of highest total score stay.
    """
    proteins = len(labels)
    # Sorted by u, then by v.
    keys = np.unique(np.concatenate([network.key for network in networks.values()]))
    u = keys // proteins
    v = keys % proteins
    features = np.zeros((len(keys), FEATURES), np.float32)
    strength = np.zeros(len(keys))
    for channel, network in networks.items():
        place = np.searchsorted(keys, network.key)
        features[place, CHANNELS.index(channel)] = network.score > 0
        strength[place] += network.score

    first = np.searchsorted(u, np.arange(proteins + 1))  # link of each protein
    centres = np.flatnonzero(np.diff(first))
    position = np.full(proteins, -1)  # within the graph that is being made
    sizes = []
    degrees = []
    edges = []
    kept = []
    for centre in centres:
        links = np.arange(first[centre], first[centre + 1])
        strongest = np.argsort(-strength[links], kind="stable")[: cap - 1]
        nodes = np.concatenate([[centre], v[np.sort(links[strongest])]])
        position[nodes] = np.arange(len(nodes))
        inside = np.concatenate([np.arange(first[node], first[node + 1]) for node in nodes])
        inside = inside[position[v[inside]] >= 0]
        edges.append(position[np.stack([u[inside], v[inside]])])
        kept.append(inside)
        sizes.append(len(nodes))
        degrees.append(len(inside))
        position[nodes] = -1
    return RawGraphs(
        sizes=np.array(sizes),
        degrees=np.array(degrees),
        edges=np.concatenate(edges, 1),
        features=features[np.concatenate(kept)],
        centre=np.zeros(len(centres), np.int64),
        species=np.full(len(centres), species),
        labels=labels[centres],
    )


Cap = Annotated[
    int, typer.Option(help="Nodes of a graph at most; the centre is always kept", min=2)
]
Species = Annotated[int, typer.Option(help="NCBI taxon")]
Name = Annotated[str, typer.Option(help="Of the folder under DATA/ppi")]


def string_graphs(
    data: Data = Path("data"),
    from_: From = None,
    cap: Cap = 64,
    species: Species = 4932,
    name: Name = "string-yeast",
    check: Check = False,
):
    """Prepare ego networks from STRING's evidence networks and GO annotation in a folder."""
    files.one_of(from_=from_, check=check)
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise BadInput(f"--name is {name!r}, expected the name of a folder")
    prepared = data / "ppi" / name
    if check:
        files.check(prepared, FORMAT)
        return
    if from_ is None:
        raise BadInput("STRING's and GO's files are taken from a folder: name it with --from")
    with files.locked(prepared, FORMAT) as folder:
        networks, terms, labels = read_string(from_)
        raw = ego_networks(networks, labels, cap, species)
        prepare_graphs(folder, [raw], terms, 0, source=SOURCE, licence=LICENCE)


if __name__ == "__main__":
    files.run(string_graphs)
