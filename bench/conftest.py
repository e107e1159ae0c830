"""Timings run only where they are asked for: `pytest bench --benchmark-only`. Plain `pytest` runs what counts exactly."""

import torch


def pytest_configure(config):
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--benchmark-only", default=False):
        timed = [item for item in items if "benchmark" in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=timed)
        items[:] = [item for item in items if item not in timed]
