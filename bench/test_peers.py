"""The same estimates by other libraries: where they are installed (bench/requirements.txt), they agree with ours."""

import warnings

import pytest

from bench import libraries

# Not betty's cg: its next direction is made from the residual before the step, so it is not conjugate gradients.
SAME = ["higher, published procedure", "betty neumann", "torchopt neumann", "torchopt cg", "metapt neumann, finite",
        "metapt cg, finite", "higher, published procedure, Adam", "torchopt neumann, Adam"]  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_libraries_agree(name):
    task = libraries.Task("small")
    library = name.split()[0].rstrip(",")
    if library != "metapt":
        pytest.importorskip(library)
    function, method = libraries.ENTRIES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = function(task).detach()
    truth = libraries.ours(task, method)
    # TorchOpt takes Adam's 1 − β₂ᵗ in the default dtype, float32: off by 1e-5, with float64 as default by 1e-15.
    assert ((found - truth).norm() / truth.norm()).item() < (1e-4 if name == "torchopt neumann, Adam" else 1e-5)


def test_a_library_that_fails_is_named_with_its_error(monkeypatch):
    def broken(task):
        raise RuntimeError("it does not run here")

    monkeypatch.setitem(libraries.ENTRIES, "betty cg", (broken, "cg"))
    row = next(row for row in libraries.compare("small", repeats=1) if row["name"] == "betty cg")
    assert row["error"] == "RuntimeError: it does not run here"


@pytest.mark.parametrize("name", list(libraries.ENTRIES))
def test_time(benchmark, name):
    library = name.split()[0].rstrip(",")
    if library != "metapt":
        pytest.importorskip(library)
    made, (function, _) = libraries.Task("small"), libraries.ENTRIES[name]
    benchmark.group = "libraries"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            function(made)
        except Exception as error:  # noqa: BLE001
            pytest.skip(f"{type(error).__name__}: {error}")
        benchmark(function, made)
