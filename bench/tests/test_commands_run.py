"""Commands of bench/docs that are short, run as a reader would, on a copy of what is stored."""

import os
import shutil
import subprocess
import sys

import pytest

from bench.stored import ROOT

COMMANDS = (
    "bench.studies.worth report",
    "bench.studies.languages report --seeds 20",
    "bench.studies.languages report --seeds 20 --by-target --versus hand",
    "bench.studies.languages figure --seeds 20",
    "bench.studies.languages products",
    "bench.studies.penalty report",
    "bench.costs.transformer report",
    pytest.param("bench.studies.electrocardiograms report", marks=pytest.mark.slow),
    "bench.studies.bootstrap report",
    "bench.studies.digits bytes",
    "bench.accuracy.horizon report",
    pytest.param("bench.costs.messages", marks=pytest.mark.slow),
)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The repository as far as bench needs it: commands write their results there."""
    folder = tmp_path_factory.mktemp("copy")
    shutil.copy(ROOT / "metapt.py", folder)
    shutil.copytree(ROOT / "bench", folder / "bench", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_runs_to_its_end(command, copy):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    ended = subprocess.run(
        [sys.executable, "-m", *command.split()],
        cwd=copy,
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout or ended.stderr
