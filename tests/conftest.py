"""One thread, the repository on the path, and which tests run.

Tests marked `cuda` need a GPU; those marked `slow` run if `-m` names markers or RUN_SLOW is set.
"""

import os
import sys
from pathlib import Path

import pytest
import torch

# Last, so that PYTHONPATH can put another metapt in its place.
sys.path.append(str(Path(__file__).resolve().parent.parent))


def pytest_configure(config):
    torch.set_num_threads(1)
    config.addinivalue_line("markers", "slow: runs only if -m names markers or RUN_SLOW is set")
    config.addinivalue_line("markers", "cuda: skipped where there is no GPU")


def pytest_collection_modifyitems(config, items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))
    if config.option.markexpr or os.environ.get("RUN_SLOW"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    items[:] = [item for item in items if item not in slow]
    config.hook.pytest_deselected(items=slow)
