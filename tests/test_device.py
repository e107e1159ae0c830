"""On a device other than the CPU, in a process of its own: see pretend.py."""

from pathlib import Path

from pretend import run_in_own_process

CASES = Path(__file__).resolve().parent / "device_cases.py"


def test_core_training_and_finetuning_run_on_a_device():
    run_in_own_process(CASES)
