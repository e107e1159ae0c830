"""README.md is run as it is printed: its commands and options, its domain of one's own, its loop of one's own."""

import csv
import json
import re
import signal
import subprocess
import sys

import pytest
from tools import ROOT, main_in, metapt_in, outcome, refused

import metapt

README = (ROOT / "README.md").read_text()
DOMAIN, LOOP = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
QUICK = ["--steps=60", "--warmup=20", "--compare=1", "--measure-steps=8", "--width=8"]


def test_it_is_short():
    assert len(README.splitlines()) <= 200
    assert [line for line in README.splitlines() if len(line) > 110] == []
    assert len(DOMAIN.splitlines()) <= 40
    assert len(LOOP.splitlines()) <= 45


def test_its_commands_and_links_exist(tmp_path):
    for command in ("python metapt.py meta", "pytest"):
        assert f"pip install -r requirements.txt && {command}" in README.splitlines()
    for link, anchor in re.findall(r"\]\(((?!http)[^)#]+)(?:#([^)]+))?\)", README):
        assert (ROOT / link).exists(), link
        titles = re.findall(r"^#+ (.*)$", (ROOT / link).read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor in [re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles], anchor
    (tmp_path / "my_domain.py").write_text(DOMAIN)
    lines = re.findall(r"python metapt\.py ((?:meta|pretrain|finetune|eval) [^#`\n]+)", README)
    assert len(lines) >= 7
    for line in lines:
        command, *arguments = line.split()
        named = arguments[:1] if arguments and arguments[0] in (*metapt.DOMAINS, "my_domain.py") else []
        known = main_in(tmp_path, command, *named, "--help")[1]
        assert [option for option in re.findall(r"--[a-z-]+", line) if option not in known] == [], line


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the domain of the README, and two runs of it."""
    home = tmp_path_factory.mktemp("home")
    (home / "my_domain.py").write_text(DOMAIN)
    for run, more in (("run", []), ("default", ["--meta-lr=0.5"])):
        done = metapt_in(home, "meta", "my_domain.py", "--out", run, *QUICK, *more)
        assert done.returncode == 0, done.stderr
    return home


def test_its_domain_learns_a_weight_a_task_which_is_written_by_name(home):
    config, summary = (json.loads((home / "run" / f"{name}.json").read_text()) for name in ("config", "summary"))
    assert config["domain"] == f"{home / 'my_domain.py'}:DigitTasks"
    assert config["settings"]["width"] == 8
    assert {row["method"] for row in summary["comparison"]} == {
        "no_pretraining",
        "default_phi",
        "learned_phi",
        "online",
    }
    rows = list(csv.reader((home / "run" / summary["phi_table"]).open()))
    assert rows[0] == ["task", "weight"]
    weights = [float(weight) for _, weight in rows[1:]]
    assert sum(weights) == pytest.approx(5, abs=1e-4)
    assert max(weights) - min(weights) > 0.01
    assert {path.name for path in (home / "run").glob("*.png")} == {"phi.png", "losses.png", "comparison.png"}


def test_its_domain_is_found_by_finetune_and_eval(home, tmp_path):
    for line in (["finetune", home / "run"], ["eval", home / "run", home / "default"]):
        code, _, err = main_in(tmp_path, *line, "--compare=2", "--measure-steps=8")
        assert code == 0, err
    help_text = main_in(home, "meta", "my_domain.py", "--help")[1]
    assert "--width" in help_text
    assert "--noise" not in help_text
    assert "--noise belongs to digits-noise" in refused(home, "meta", "my_domain.py", "--noise=0.1")


def test_its_domain_is_killed_and_goes_on_to_the_same_end(home):
    whole = metapt_in(home, "meta", "my_domain.py", "--out", "whole", *QUICK, "--steps=600")
    assert whole.returncode == 0, whole.stderr
    line = [sys.executable, metapt.__file__, "meta", "my_domain.py", "--out", "killed", *QUICK, "--steps=600"]
    with subprocess.Popen(line, cwd=home, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        while child.poll() is None and not (home / "killed" / "checkpoint.pt").exists():
            pass
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    code, _, err = main_in(home, "meta", "--resume", "killed")
    assert code == 0, err
    assert outcome(home / "killed") == outcome(home / "whole")


def test_its_loop_tells_right_labels_from_wrong_ones(tmp_path):
    done = metapt_in(tmp_path, code=LOOP, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    right, wrong = map(float, re.findall(r"\d\.\d+", done.stdout))
    assert right > wrong + 0.1


def test_runs_of_its_domain_with_other_features_are_not_compared(home):
    assert metapt_in(home, "meta", "my_domain.py", "--out", "wide", *QUICK[:-1], "--width=12").returncode == 0
    assert "wide has features of another size than run" in refused(home, "eval", "run", "wide")
