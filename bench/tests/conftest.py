"""One thread, the repository on the path, and which tests run.

Timings run with `pytest bench --benchmark-only` alone, tests marked `slow` if `-m` names markers or
RUN_SLOW is set, those marked `cuda` where there is a GPU.
"""

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
# Last, so that PYTHONPATH can put another metapt in its place. Tests of both have the same tools.
sys.path += [str(ROOT), str(ROOT / "tests")]


def pytest_configure(config):
    torch.set_num_threads(1)
    config.addinivalue_line("markers", "slow: runs only if -m names markers or RUN_SLOW is set")
    config.addinivalue_line("markers", "cuda: skipped where there is no GPU")


def pytest_collection_modifyitems(config, items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))
    left_out = []
    if not config.getoption("--benchmark-only", default=False):
        left_out += [item for item in items if "benchmark" in getattr(item, "fixturenames", ())]
    if not config.option.markexpr and not os.environ.get("RUN_SLOW"):
        left_out += [item for item in items if item.get_closest_marker("slow")]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)
