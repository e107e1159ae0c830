"""Made-up data in the prepared formats, where a step is to be counted or timed and no real data are
at hand.
"""

from pathlib import Path

import numpy as np

from data_scripts.files import locked, prepared_folder
from data_scripts.graphs import prepare_graphs
from data_scripts.ud import TAGS

TREEBANKS = ("Galician-TreeGal", "Sindarin-Tower", "Quenya-Lamps", "Khuzdul-Mines")
LEADS = ["I", "II", "III", "AVR", "AVL", "AVF", "V1", "V2", "V3", "V4", "V5", "V6"]
CLASSES = ["NORM", "MI", "STTC", "CD", "HYP"]


def write(folder: Path, about: dict, arrays: dict[str, np.ndarray]) -> None:
    """A prepared folder."""
    about = {"source": "made up", "licence": "none", **about}
    with locked(folder, about["format"]) as free, prepared_folder(free, about) as append:
        for name, values in arrays.items():
            append(name, values)


def ecg(data: Path, records: int = 2000) -> None:
    """White noise of twelve leads, 10 s at 100 Hz; every record is a patient, folds 1 to 10 in
    turn.
    """
    random, n = np.random.default_rng(0), np.arange(records)
    samples = random.integers(-500, 500, (records, 1000, 12), dtype=np.int16)
    signals = samples.reshape(records, -1) / 1000  # mV
    about = {
        "format": "metapt ecgs 2",
        "records": records,
        "left_out": [],
        "leads": LEADS,
        "hertz": 100,
        "samples": 1000,
        "classes": CLASSES,
    }
    write(
        data / "ecg" / "prepared",
        about,
        {
            "samples": samples,
            "ecg_id": n,
            "patient": n,
            "fold": n % 10 + 1,
            "labels": random.integers(0, 2, (records, 5), dtype=np.uint8),
            "gain": np.full((records, 12), 1000, np.float32),
            "baseline": np.zeros((records, 12), np.float32),
            "sums": np.stack([signals.sum(1), np.square(signals).sum(1)], 1),
        },
    )


def mnist(data: Path) -> None:
    """Noise, in MNIST's sizes."""
    random, arrays = np.random.default_rng(0), {}
    for part, n in (("train", 60_000), ("test", 10_000)):
        arrays[f"{part}_images"] = random.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        arrays[f"{part}_labels"] = (np.arange(n) % 10).astype(np.uint8)
    write(data / "mnist" / "prepared", {"format": "metapt images 1", "classes": 10}, arrays)


def ppi(data: Path, graphs: int = 300, tasks: int = 100) -> None:
    """The graphs of `bench.studies.proteins.generate`; the last 40 tasks are FT's."""
    from bench.studies.proteins import generate

    terms = [f"task {i}" for i in range(tasks)]
    prepare_graphs(
        data / "ppi" / "published",
        generate(graphs, tasks),
        terms,
        40,
        source="made up",
        licence="none",
    )


def sources(data: Path, sentences: int = 400, words: int = 8) -> None:
    """Sentences of drawn words in four languages, one of which the domain's default target."""
    random = np.random.default_rng(0)
    number = len(TREEBANKS) * sentences
    ends = np.arange(number * words + 1, dtype=np.int64)
    about = {
        "format": "metapt tagged sentences 1",
        "tags": list(TAGS),
        "treebanks": [
            {
                "name": name,
                "language": name.partition("-")[0],
                "sentences": sentences,
                "words": sentences * words,
            }
            for name in TREEBANKS
        ],
        "left_out": [],
    }
    write(
        data / "ud" / "prepared",
        about,
        {
            # A word has four letters.
            "forms": random.integers(97, 123, 4 * number * words).astype(np.uint8),
            "form_offsets": 4 * ends,
            "tags": random.integers(0, len(TAGS), number * words).astype(np.uint8),
            "sentence_offsets": words * np.arange(number + 1, dtype=np.int64),
            "treebank": np.repeat(np.arange(len(TREEBANKS), dtype=np.int32), sentences),
        },
    )
