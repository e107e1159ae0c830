"""Chapter 9 of metapt.py, comparisons by several processes: the same numbers, and a clean end."""

import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import joblib
import pytest
import torch
from tools import (
    TINY,
    Toy,
    domain_of,
    main_in,
    metapt_in,
    options,
    outcome,
    refused,
    strict_json,
    summary_of,
    toy_file,
)

import metapt

QUICK = ["--steps=16", "--compare=2", "--measure-steps=4", "--sizes=5,9"]
# A toy whose encoder has a width of its own, and whose comparisons can be told what to do.
WIDER = """

@dataclass(frozen=True)
class WideSettings(ToySettings):
    width: int = metapt.setting(6, "Units of the encoder")
    trouble: str = metapt.setting("", "What a process of a comparison does")


class Wide(Toy):
    Settings = WideSettings

    def network(self):
        hidden = nn.Linear(4, self.settings.width)
        encoder = nn.Sequential(hidden, nn.Tanh(), nn.Linear(self.settings.width, 6))
        return metapt.Network(encoder, nn.Linear(6, 2)).to(self.device)

    def score(self, outputs, targets):
        trouble = self.settings.trouble
        if trouble == "end":
            os._exit(9)
        if trouble == "wait":
            Path(f"waiting-{os.getpid()}").touch()
            time.sleep(100)
        if trouble == "refuse":
            raise metapt.BadInput("no score today")
        if trouble == "memory":
            torch.empty(10**15)
        return super().score(outputs, targets)
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the toy and its wider form; not to be changed."""
    folder = tmp_path_factory.mktemp("home")
    path = toy_file(folder / "toy.py", WIDER)
    path.write_text(path.read_text().replace("import torch\n", IMPORTS, 1))
    return folder


IMPORTS = "import os\nimport time\nfrom pathlib import Path\n\nimport torch\n"


def cells_of_toy(domain) -> list[metapt.Cell]:
    """A comparison with each way to come by a network, and with held-out scores."""
    torch.manual_seed(3)
    methods = {
        "no_pretraining": metapt.Method("untrained"),
        "default_phi": metapt.Method("pretrained"),
        "learned_phi": metapt.Method("pretrained", phi={"weight": torch.tensor([[1.0], [-1.0]])}),
        "online": metapt.given_network(domain, domain.network()),
    }
    return metapt.cells_of(methods, [5, 9], 2, with_held=True)


# ------------------------------------------------------------------------------------------------
# The same numbers


def test_any_number_of_processes_gives_the_same_to_the_bit(home, tmp_path):
    """A whole run of an own domain: its comparison, its choice, its figures."""
    for jobs in (1, 2):
        words = ["meta", home / "toy.py:Toy", *QUICK, f"--jobs={jobs}", f"--out={jobs}"]
        assert main_in(tmp_path, *words)[0] == 0
    one = outcome(tmp_path / "1")
    assert one == outcome(tmp_path / "2")
    assert {row["seeds"] for row in one[0]["comparison"]} == {2}
    assert len({row["mean"] for row in one[0]["comparison"]}) > 2


def test_workers_of_a_script_give_what_one_process_gives_that_imports_it(tmp_path):
    words = ["meta", "digits-rotation", *options(TINY["digits-rotation"]), "--json"]
    here = summary_of(tmp_path, *words[:-1], "--out=here")
    done = metapt_in(tmp_path, *words, "--jobs=2", "--out=there")
    assert done.returncode == 0, done.stderr
    assert strict_json(done.stdout)["comparison"] == here["comparison"]


def test_eval_measures_networks_of_other_shapes_in_other_processes(home, tmp_path):
    for name, width in (("narrow", 6), ("wide", 11)):
        words = ["pretrain", home / "toy.py:Wide", *QUICK, f"--width={width}", f"--out={name}"]
        assert main_in(tmp_path, *words)[0] == 0
    summaries = []
    for jobs in (1, 2):
        words = ["eval", "narrow", "wide", "--compare=2", f"--jobs={jobs}", f"--out=eval-{jobs}"]
        summaries.append(summary_of(tmp_path, *words))
    for key in ("comparison", "differences"):
        assert summaries[0][key] == summaries[1][key]
    means = {row["method"]: row["mean"] for row in summaries[0]["comparison"]}
    assert means["narrow"] != means["wide"]


def test_the_order_of_cells_does_not_matter():
    domain = domain_of(Toy)
    cells = cells_of_toy(domain)
    forward = metapt.measure_cells(domain, cells, 1, lambda: None)
    backward = metapt.measure_cells(domain, cells[::-1], 1, lambda: None)
    assert forward == backward[::-1]
    assert len({result.held_score for result in forward}) > 3


@pytest.mark.parametrize("name", ["digits-rotation", "digits-noise"])
def test_a_domain_keeps_nothing_from_one_cell_to_the_next(name):
    domain = domain_of(name, steps=20)
    phi = domain.meta().state_dict()
    methods = {
        "default_phi": metapt.Method("pretrained"),
        "learned_phi": metapt.Method("pretrained", phi=phi),
        "online": metapt.given_network(domain, domain.network()),
    }
    cells = metapt.cells_of(methods, [30], 2, with_held=False)
    forward = metapt.measure_cells(domain, cells, 1, lambda: None)
    again = [metapt.measure_cell(domain_of(name, steps=20), cell) for cell in cells[::-1]]
    assert forward == again[::-1]


def test_what_a_cell_is_called_has_no_say_in_its_numbers():
    """The same method under two names, with other cells between."""
    domain = domain_of(Toy)
    methods = {"a": metapt.Method("pretrained"), "b": metapt.Method("untrained")}
    methods["c"] = methods["a"]
    cells = metapt.cells_of(methods, [5], 2, with_held=True)
    comparison = metapt.collect(cells, metapt.measure_cells(domain, cells, 1, lambda: None))
    assert comparison.finetuned["a", 5] == comparison.finetuned["c", 5]
    assert comparison.finetuned["a", 5] != comparison.finetuned["b", 5]
    assert comparison.held_scores["a"] == comparison.held_scores["c"]


def test_a_cell_has_the_same_threads_whatever_there_are(monkeypatch):
    counted = []
    monkeypatch.setattr(metapt, "measure_cell", lambda *_: counted.append(torch.get_num_threads()))
    domain = domain_of(Toy)
    cells = cells_of_toy(domain)
    monkeypatch.setattr(Toy, "threads", 2)
    metapt.measure_cells(domain, cells, 1, lambda: None)
    assert set(counted) == {2}
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("pays", [True, False])
def test_by_default_others_begin_where_that_is_sooner_than_to_go_on(pays, monkeypatch):
    domain = domain_of(Toy)
    cells = cells_of_toy(domain)
    expected = metapt.measure_cells(domain, cells, 1, lambda: None)
    begun = []

    def measure_in_workers(domain, cells, jobs, advance):
        begun.append((len(cells), jobs))
        return metapt.measure_here(domain, cells, advance)

    monkeypatch.setattr(metapt, "default_jobs", lambda domain: 3)
    monkeypatch.setattr(metapt, "measure_in_workers", measure_in_workers)
    monkeypatch.setattr(metapt, "SECONDS_TO_BEGIN", 0 if pays else 1000)
    advanced = []
    found = metapt.measure_cells(domain, cells, None, lambda: advanced.append(1))
    assert found == expected
    assert len(advanced) == len(cells)
    # The first cell is measured here in both cases.
    assert begun == ([(len(cells) - 1, 3)] if pays else [])


def test_the_default_is_one_process_for_each_core_that_cells_leave(monkeypatch):
    domain = domain_of(Toy)
    monkeypatch.setattr(joblib, "cpu_count", lambda: 12)
    # This file is imported here, and a program that imports it may not be able to begin anew.
    assert metapt.default_jobs(domain) == 1
    monkeypatch.setattr(metapt, "__name__", "__main__")
    assert metapt.default_jobs(domain) == 12
    monkeypatch.setattr(Toy, "threads", 5)
    assert metapt.default_jobs(domain) == 2
    domain.device = torch.device("cuda")
    assert metapt.default_jobs(domain) == 1


def test_a_worker_makes_its_domain_with_as_many_threads_as_it_was_made_here(home):
    """Products of matrices that `__init__` takes are rounded by their number."""
    torch.set_num_threads(3)
    domain = domain_of(metapt.find_domain(str(home / "toy.py:Toy")))
    torch.set_num_threads(1)
    made = metapt.domain_by_recipe(metapt.pickle.dumps(metapt.recipe_of(domain)))
    assert made.threads_here == 3
    assert torch.get_num_threads() == 1


def test_a_network_may_keep_what_is_no_tensor(monkeypatch):
    monkeypatch.setattr(torch.nn.Tanh, "get_extra_state", lambda _: {"seen": 3}, raising=False)
    put = []
    monkeypatch.setattr(torch.nn.Tanh, "set_extra_state", lambda _, x: put.append(x), raising=False)
    domain = domain_of(Toy)
    metapt.make_network(domain, metapt.given_network(domain, domain.network()), seed=0)
    assert put == [{"seen": 3}]


# ------------------------------------------------------------------------------------------------
# Ends


def test_a_script_that_its_workers_run_once_more_is_refused_there(home, tmp_path, monkeypatch):
    process = multiprocessing.current_process()
    monkeypatch.setattr(process, "_inheriting", True, raising=False)
    message = refused(tmp_path, "meta", home / "toy.py:Toy", *QUICK)
    assert "under if __name__ == '__main__', or say --jobs 1" in message
    assert not (tmp_path / "runs").exists()


def test_a_domain_begins_as_every_domain_does(tmp_path):
    more = """

class Careless(Toy):
    def __init__(self, settings, device, data):
        self.settings = settings
        self.device = device
        self.sizes = {"pretrain": 43, "finetune": 20, "validation": 16, "test": 30}
"""
    path = toy_file(tmp_path / "toy.py", more)
    message = refused(tmp_path, "meta", f"{path}:Careless", *QUICK)
    expected = "Careless.__init__ does not call super().__init__(settings, device, data)"
    assert message == f"metapt: {expected}"


@pytest.mark.parametrize("command", ["meta", "pretrain"])
def test_jobs_must_be_positive(command, home, tmp_path):
    words = [command, home / "toy.py:Toy", *QUICK, "--jobs=0", "--out=run"]
    assert refused(tmp_path, *words) == "metapt: --jobs is 0, expected 1 or more"
    assert not (tmp_path / "run").exists()


def test_a_worker_that_ends_is_one_line_and_the_run_goes_on(home, tmp_path):
    words = ["pretrain", home / "toy.py:Wide", *QUICK]
    assert main_in(tmp_path, *words, "--out=whole")[0] == 0
    code, out, err = main_in(tmp_path, *words, "--trouble=end", "--jobs=2", "--json", "--out=run")
    assert (code, out) == (1, "")
    message = err.strip().splitlines()[-1]
    expected = (
        "metapt: one of 2 processes that compared has ended, as where memory runs out; "
        "with a smaller --jobs less is needed; "
        "go on with: python metapt.py pretrain --resume run"
    )
    assert message == expected
    config = tmp_path / "run" / "config.json"
    config.write_text(config.read_text().replace('"trouble": "end"', '"trouble": ""'))
    assert main_in(tmp_path, "pretrain", "--resume=run", "--jobs=2")[0] == 0
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_where_no_process_can_begin_it_is_said(monkeypatch):
    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(metapt.concurrent.futures, "ProcessPoolExecutor", refuse)
    domain = domain_of(Toy)
    with pytest.raises(metapt.WorkerEnded, match="cannot begin: .*No space left on device"):
        metapt.measure_cells(domain, cells_of_toy(domain), 2, lambda: None)


@pytest.mark.parametrize(
    ("trouble", "code", "message"), [("refuse", 2, "no score today"), ("memory", 1, "alloc")]
)
def test_what_goes_wrong_in_a_worker_is_said_as_if_it_went_wrong_here(
    trouble, code, message, home, tmp_path
):
    words = ["pretrain", home / "toy.py:Wide", *QUICK, f"--trouble={trouble}"]
    status, _, err = main_in(tmp_path, *words, "--jobs=2", "--out=run")
    assert status == code
    assert re.search(message, err.strip().splitlines()[-1], re.IGNORECASE)


def test_a_domain_that_changes_meanwhile_is_refused(home, tmp_path):
    path = toy_file(tmp_path / "toy.py")
    kind = metapt.find_domain(str(path))
    domain = domain_of(kind)
    cells = cells_of_toy(domain)
    recipe = metapt.recipe_of(domain)
    assert type(metapt.domain_by_recipe(metapt.pickle.dumps(recipe))) is kind
    path.write_text(path.read_text() + "\n# Another content\n")
    assert metapt.recipe_of(domain) == recipe
    recipe = recipe._replace(settings={"seed": 1})
    with pytest.raises(metapt.Failed, match="was changed while it was in use"):
        metapt.work(metapt.pickle.dumps(recipe), metapt.pickle.dumps(cells[0]))


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    # A zombie has ended; whoever began it has not asked yet.
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_for(condition, seconds: float = 100) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_workers_end_where_a_signal_comes_while_they_begin(number, monkeypatch):
    """Between the beginning of the first and that of the second."""
    begun = []
    start = multiprocessing.context.SpawnProcess.start

    def start_and_strike(process):
        start(process)
        begun.append(process)
        signal.raise_signal(number)

    monkeypatch.setattr(multiprocessing.context.SpawnProcess, "start", start_and_strike)
    domain = domain_of(Toy)
    cells = cells_of_toy(domain)
    with (
        pytest.raises(metapt.Failed, match=r"^stopped; begin anew$"),
        metapt.advice_on_end("stopped", "begin anew"),
    ):
        metapt.measure_cells(domain, cells, 2, lambda: None)
    assert len(begun) == 2
    assert not any(process.is_alive() for process in begun)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_the_program(number, home, tmp_path):
    """Ctrl-C reaches all of a terminal's processes, the other signals this one alone."""
    words = ["pretrain", home / "toy.py:Wide", *QUICK, "--trouble=wait", "--jobs=2", "--out=run"]
    running = subprocess.Popen(
        [sys.executable, metapt.__file__, *map(str, words)],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        process_group=0,
    )
    try:
        wait_for(lambda: len(list(tmp_path.glob("waiting-*"))) == 2)
        workers = [int(path.name.partition("-")[2]) for path in tmp_path.glob("waiting-*")]
        if number == signal.SIGINT:
            os.killpg(running.pid, number)
        else:
            running.send_signal(number)
        _, err = running.communicate(timeout=60)
    finally:
        running.kill()
    wait_for(lambda: not any(alive(pid) for pid in workers), seconds=30)
    if number == signal.SIGKILL:
        assert running.returncode == -signal.SIGKILL
        return
    assert running.returncode == 1
    (line,) = err.splitlines()
    said, _, words = line.partition("go on with: python metapt.py ")
    assert said == "metapt: stopped while comparing; "
    assert shlex.split(words) == ["pretrain", "--resume", "run"]
