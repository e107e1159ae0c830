"""The examples do what README.md says of them."""

import csv
import json
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from tools import main_in, metapt_in, outcome, refused

import metapt
from bench.stored import ROOT

EXAMPLES = ROOT / "bench" / "examples"
QUICK = ["--steps=60", "--warmup=20", "--compare=1", "--measure-steps=8", "--width=8"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the domain, and two runs of it."""
    home = tmp_path_factory.mktemp("home")
    shutil.copy(EXAMPLES / "my_domain.py", home)
    for run, more in (("run", []), ("default", ["--meta-lr=0.5"])):
        done = metapt_in(home, "meta", "my_domain.py", "--out", run, *QUICK, *more)
        assert done.returncode == 0, done.stderr
    return home


def weights_in(path) -> list[float]:
    (header, *rows) = csv.reader(path.open())
    assert header == ["task", "weight"]
    return [float(weight) for _, weight in rows]


def test_the_domain_learns_a_weight_a_task_which_is_written_by_name(home):
    config = json.loads((home / "run" / "config.json").read_text())
    summary = json.loads((home / "run" / "summary.json").read_text())
    assert config["domain"] == f"{home / 'my_domain.py'}:DigitTasks"
    assert config["settings"]["width"] == 8
    assert {row["method"] for row in summary["comparison"]} == set(metapt.METHODS)
    weights = weights_in(home / "run" / summary["phi_table"])
    assert sum(weights) == pytest.approx(5, abs=1e-4)
    assert max(weights) - min(weights) > 0.01
    figures = {path.name for path in (home / "run").glob("*.png")}
    assert figures == {"phi.png", "losses.png", "comparison.png"}


def test_weights_by_hand_are_taken_from_a_table(home, tmp_path):
    rows = (home / "run" / "phi.csv").read_text().splitlines()
    by_hand = tmp_path / "by_hand.csv"
    by_hand.write_text("\n".join([rows[0], *(row.partition(",")[0] + ",1.0" for row in rows[1:])]))
    line = ["pretrain", home / "my_domain.py", "--phi", by_hand, "--out", "run"]
    code, _, err = main_in(tmp_path, *line, "--steps=10", "--compare=0", "--width=8")
    assert code == 0, err
    assert weights_in(tmp_path / "run" / "phi.csv") == pytest.approx([1.0] * 5)
    by_hand.write_text("task,weight\neven,1\n")
    assert "my_domain.py" not in refused(tmp_path, *line[:-1], "other", "--width=8")


def test_the_domain_is_found_by_finetune_and_eval(home, tmp_path):
    for line in (["finetune", home / "run"], ["eval", home / "run", home / "default"]):
        code, _, err = main_in(tmp_path, *line, "--compare=2", "--measure-steps=8")
        assert code == 0, err
    help_text = main_in(home, "meta", "my_domain.py", "--help")[1]
    assert "--width" in help_text
    assert "--noise" not in help_text


def test_a_run_of_the_domain_that_is_killed_goes_on_to_the_same_end(home):
    line = ["meta", "my_domain.py", *QUICK, "--steps=600", "--out"]
    whole = metapt_in(home, *line, "whole")
    assert whole.returncode == 0, whole.stderr
    command = [sys.executable, metapt.__file__, *line, "killed"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, cwd=home, **quiet) as child:
        while child.poll() is None and not (home / "killed" / "checkpoint.pt").exists():
            pass
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    code, _, err = main_in(home, "meta", "--resume", "killed")
    assert code == 0, err
    assert outcome(home / "killed") == outcome(home / "whole")


def test_runs_of_the_domain_with_other_features_are_not_compared(home):
    wide = metapt_in(home, "meta", "my_domain.py", "--out", "wide", *QUICK[:-1], "--width=12")
    assert wide.returncode == 0, wide.stderr
    assert "wide" in refused(home, "eval", "run", "wide")


def test_the_loop_tells_right_labels_from_wrong_ones(tmp_path):
    code = (EXAMPLES / "own_loop.py").read_text()
    done = metapt_in(tmp_path, code=code, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    right, wrong = map(float, re.findall(r"\d\.\d+", done.stdout))
    assert right > wrong + 0.1
    if torch.__version__.startswith("2.13.0"):
        assert f"`{done.stdout.strip()}`" in (ROOT / "README.md").read_text()
