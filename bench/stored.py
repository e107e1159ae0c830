"""Where results lie, and how they are written: whole or not at all, figures in the style of
metapt's own.
"""

import json
from collections.abc import Callable
from pathlib import Path

import metapt

ROOT = Path(__file__).resolve().parent.parent
DOMAINS = ROOT / "bench" / "domains"
RESULTS = ROOT / "bench" / "results"  # a folder for each study, with its figures


def save_json(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    metapt.write_whole(path, (json.dumps(content, indent=2) + "\n").encode())


def load_json(path: Path) -> dict:
    """What is stored; nothing where nothing is yet."""
    return json.loads(path.read_text()) if path.exists() else {}


def add_result(path: Path, key: str, name: str, result) -> None:
    """One more result of a cell. What another process stored meanwhile stays."""
    results = load_json(path)
    results.setdefault(key, {})[name] = result
    save_json(path, results)


def print_markdown(columns: list[str], rows: list[list[str]]) -> None:
    """A table as the pages in bench/docs have it."""
    for row in (columns, ["---"] * len(columns), *rows):
        print(f"| {' | '.join(row)} |")


def save_figure(path: Path, draw: Callable) -> None:
    """What `draw` makes of an empty matplotlib Figure, as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metapt.Run(path.parent).save_figure(path.name, draw)
