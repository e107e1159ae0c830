"""`python -m bench.costs.cuda` runs to its end, as far as a CPU can show."""

import json
from pathlib import Path

import pytest
import torch

from bench.costs import cuda


def test_without_a_gpu_it_says_so(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match="no GPU here") as ended:
        cuda.main(
            part="", device="cuda", small=False, report=False, out=tmp_path / "out", data=tmp_path
        )
    assert "\n" not in str(ended.value) and not (tmp_path / "out").exists()


def test_every_part_runs_to_its_end_and_the_table_has_them_all(tmp_path, capsys):
    assert sum(cuda.SECONDS.values()) <= 24 * 60 and max(cuda.SECONDS.values()) <= 8 * 60
    assert list(cuda.SECONDS) == list(cuda.PARTS)
    for part in cuda.PARTS:
        cuda.main(part=part, device="cpu", small=True, report=False, out=tmp_path, data=tmp_path)
        found = json.loads((tmp_path / f"cuda-{part}.json").read_text())
        errors = [
            row
            for row in found["rows"]
            if "ModuleNotFoundError" not in row.get("error", "ModuleNotFoundError")
        ]
        assert found["rows"] and not errors  # the published procedures need bench/requirements.txt
    assert len(list(Path(tmp_path).glob("*.json"))) <= 8
    capsys.readouterr()
    cuda.main(part="", device="cpu", small=True, report=True, out=tmp_path, data=tmp_path)
    out = capsys.readouterr().out
    assert all(f"{part} (cpu, torch" in out for part in cuda.PARTS)


def test_a_row_that_fails_is_kept_and_the_next_goes_on(tmp_path):
    bench = cuda.Bench(torch.device("cpu"), True, tmp_path, tmp_path, "agree")
    bench.note("one", lambda: 1 / 0)
    bench.note("two", lambda: {"x": 2})
    rows = json.loads((tmp_path / "cuda-agree.json").read_text())["rows"]
    assert rows[0]["error"] == "ZeroDivisionError: division by zero" and rows[1]["x"] == 2
