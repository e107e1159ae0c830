"""Inputs to commands and figures as people have them, from public reports."""

import os
import sys

import pytest
import tools
from matplotlib.figure import Figure

import metapt

QUICK = ("--steps=4", "--warmup=2", "--meta-every=2", "--batch-size=8", "--meta-batch-size=8")


@pytest.fixture
def toy(tmp_path):
    return tools.toy_file(tmp_path / "toy.py")


def test_a_matplotlib_that_is_set_to_latex_draws_as_ever(toy, tmp_path):
    """Without LaTeX a run once ended in a traceback after all its training."""
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfigure.facecolor: black\n")
    for name, place in (("with", tmp_path / "matplotlibrc"), ("without", "")):
        arguments = ("meta", toy, *QUICK, "--compare=0", "--out", name)
        run = tools.metapt_in(tmp_path, *arguments, MATPLOTLIBRC=str(place))
        assert run.returncode == 0, run.stderr
    for path in (tmp_path / "with").glob("*.png"):
        assert path.read_bytes() == (tmp_path / "without" / path.name).read_bytes()
    assert (tmp_path / "with" / "losses.png").exists()


@pytest.mark.parametrize("backend", ["module://no_such_module.backend", "nonsense", "tkagg"])
def test_a_backend_that_is_not_there_is_no_matter(toy, tmp_path, backend):
    """A notebook hands its own backend on to the programs that it starts."""
    arguments = ("meta", toy, *QUICK, "--compare=0", "--out=run")
    run = tools.metapt_in(tmp_path, *arguments, MPLBACKEND=backend)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "run" / "losses.png").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="needs names that are any bytes")
def test_a_folder_whose_name_is_no_utf8_is_trained_and_measured(toy, tmp_path):
    name = os.fsdecode(b"a\xff")
    tools.summary_of(tmp_path, "meta", toy, *QUICK, "--compare=0", "--out", name)
    arguments = (name, "--sizes=5", "--compare=1", "--measure-steps=2", "--out=measured")
    tools.summary_of(tmp_path, "eval", *arguments)
    assert (tmp_path / "measured" / "comparison.png").exists()


def test_a_label_of_any_characters_can_be_drawn(tmp_path):
    label = metapt.as_label("a\udcff$b")
    assert label == r"a?\$b"
    figure = Figure()
    figure.suptitle(label)
    figure.savefig(tmp_path / "label.png")


@pytest.mark.parametrize("name", ["a\nb", "b\\[x]\\", "tab\there", " "])
def test_a_folder_of_an_odd_name_is_trained_and_measured(toy, tmp_path, name):
    tools.summary_of(tmp_path, "meta", toy, *QUICK, "--compare=0", "--out", name)
    arguments = (name, "--sizes=5", "--compare=1", "--measure-steps=2", "--out=measured")
    code, out, err = tools.main_in(tmp_path, "eval", *arguments)
    assert (code, err) == (0, ""), err
    assert "measured" in out


@pytest.mark.parametrize("length", [256, 5000])
def test_a_name_that_is_too_long_is_one_line(toy, tmp_path, length):
    arguments = ("meta", toy, *QUICK, "--compare=0", "--out", "x" * length)
    assert "File name too long" in tools.refused(tmp_path, *arguments)
