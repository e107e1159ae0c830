"""What test_cuda.py runs: `agree` of every domain, with a pretend device in place of the GPU.

The device has random numbers of its own: `agree` has to take all of them from the CPU.
"""

import json

import pretend
import pytest

import metapt
from bench.costs import cuda

DEVICE = pretend.make_device()


@pytest.mark.parametrize("name", metapt.DOMAINS)
def test_hypergradients_of_every_domain_are_those_of_the_cpu(monkeypatch, tmp_path, name):
    monkeypatch.setattr(metapt, "DOMAINS", {name: metapt.DOMAINS[name]})
    bench = cuda.Bench(DEVICE, True, tmp_path, tmp_path, "agree")
    cuda.agree(bench)
    rows = json.loads((tmp_path / "cuda-agree.json").read_text())["rows"]
    assert len(rows) == 2
    for row in rows:
        assert row.get("error") is None
        assert row["relative_error"] < (1e-4 if row["what"].endswith("exact") else 1e-2)
