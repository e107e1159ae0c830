"""`python -m bench.costs.cuda` runs to its end, as far as a CPU can show."""

import json
from pathlib import Path

import pytest
import torch
from pretend import run_in_own_process

from bench.costs import cuda

CASES = Path(__file__).resolve().parent / "device_cases.py"
# `agree` compares the CPU with itself here; compiling takes long.
FAST = [part for part in cuda.PARTS if part not in ("agree", "compile")]


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
    rows = {}
    for part in FAST:
        rows[part] = rows_of(part, tmp_path)
        assert rows[part]
    (of_tests,) = rows["tests"]
    assert of_tests["status"] == 0
    one, two = rows["ranks"]
    assert two["what"].endswith("2 ranks")
    assert 0 < two["relative_difference"] < 1e-4
    assert one["phi_norm"] > 0
    assert len(list(Path(tmp_path).glob("*.json"))) <= 8
    capsys.readouterr()
    cuda.main(part="", device="cpu", small=True, report=True, out=tmp_path, data=tmp_path)
    out = capsys.readouterr().out
    assert all(f"{part} (cpu, torch" in out for part in FAST)


def rows_of(part: str, folder: Path) -> list[dict]:
    """What a part finds, which must not fail but for packages of bench/requirements.txt."""
    cuda.main(part=part, device="cpu", small=True, report=False, out=folder, data=folder)
    rows = json.loads((folder / f"cuda-{part}.json").read_text())["rows"]
    failures = [row["error"] for row in rows if "error" in row]
    assert all("ModuleNotFoundError" in failure for failure in failures), failures
    return rows


@pytest.mark.slow
def test_what_compiling_gains(tmp_path):
    (row,) = rows_of("compile", tmp_path)
    assert row["gradient_difference"] < 1e-5


def test_every_domain_agrees_with_the_cpu_on_a_device():
    run_in_own_process(CASES)


def test_a_row_that_fails_is_kept_and_the_next_goes_on(tmp_path):
    bench = cuda.Bench(torch.device("cpu"), True, tmp_path, tmp_path, "agree")
    bench.note("one", lambda: 1 / 0)
    bench.note("two", lambda: {"x": 2})
    rows = json.loads((tmp_path / "cuda-agree.json").read_text())["rows"]
    assert rows[0]["error"] == "ZeroDivisionError: division by zero" and rows[1]["x"] == 2
