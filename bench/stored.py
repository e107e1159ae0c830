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


def save_figure(path: Path, draw: Callable) -> None:
    """What `draw` makes of an empty matplotlib Figure, as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metapt.Run(path.parent).save_figure(path.name, draw)
