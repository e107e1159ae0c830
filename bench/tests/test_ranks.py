"""Data parallelism: several processes, as torchrun starts them, against one with whole batches."""

import contextlib
import faulthandler
import io
import itertools
import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from tools import Toy, domain_of, flat, main_in, outcome, refused, toy_file
from torch import distributed, nn

import metapt
from bench import ranks
from metapt import Solver, Unroll, hypergradient

ROOT = Path(ranks.__file__).resolve().parents[1]
pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.filterwarnings("ignore:‖Hq − v‖", "ignore:.*fork.*:DeprecationWarning"),
]
LOOPBACK = "lo" if sys.platform == "linux" else "lo0"
# Seconds that processes may take, on a busy machine.
LIMIT = 120


# ------------------------------------------------------------------------------------------------
# Tools


def play(rank, size, port, pipe, work, arguments):
    """One rank: with the environment that torchrun gives it."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "GLOO_SOCKET_IFNAME": LOOPBACK,
    }
    # A fork cannot use CUDA.
    torch.cuda.is_available = lambda: False
    # Where a rank stands that has not ended in time.
    faulthandler.dump_traceback_later(LIMIT - 20)
    try:
        ranks.join()
        pipe.send_bytes(pickle.dumps((True, work(*arguments))))
    except BaseException:
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
    os._exit(0)


def in_ranks(size, work, *arguments) -> list:
    """What `work(*arguments)` returns in each of `size` processes, forked from this one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    players = []
    for rank in range(size):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=play, args=(rank, size, port, theirs, work, arguments))
        process.start()
        theirs.close()
        players.append((process, ours))
    # As torchrun does, this process keeps the store, which outlives the ranks. It has a thread, of
    # which a fork must not be made.
    store = distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    results = []
    until = time.monotonic() + LIMIT
    try:
        for rank, (_, pipe) in enumerate(players):
            assert pipe.poll(max(0, until - time.monotonic())), f"rank {rank} has not ended"
            good, result = pickle.loads(pipe.recv_bytes())
            assert good, f"rank {rank}: {result}"
            results.append(result)
    finally:
        for process, _ in players:
            process.kill()
            process.join()
        del store
    return results


def command(folder, *words) -> tuple[int, str, str]:
    """A rank's part in a command: exit status, standard output, standard error.

    Each checkpoint of `run` is copied beside it, as step-N.pt.
    """
    out = io.StringIO()
    err = io.StringIO()

    class KeepingRun(ranks.SharedRun):
        def save_checkpoint(self, training):
            super().save_checkpoint(training)
            if ranks.rank() == 0:
                copy = self.folder.parent / f"step-{training.step}.pt"
                shutil.copy(self.folder / "checkpoint.pt", copy)

    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch("sys.argv", ["metapt.py", *words]),
        mock.patch.object(ranks, "SharedRun", KeepingRun),
        pytest.raises(SystemExit) as ended,
    ):
        ranks.put_in_place()
        metapt.CHECKPOINT_EVERY = 2
        metapt.main()
    return ended.value.code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module", autouse=True)
def imported(tmp_path_factory):
    """What a run imports only once it is needed is imported before any process is forked."""
    folder = tmp_path_factory.mktemp("imported")
    toy_file(folder / "toy.py")
    words = ("meta", "toy.py", "--steps=8", "--warmup=0", "--compare=1", "--measure-steps=1")
    code, _, err = main_in(folder, *words)
    assert code == 0, err


def relative_error(found, truth) -> float:
    found = flat(found)
    truth = flat(truth)
    return ((found - truth).norm() / truth.norm()).item()


# ------------------------------------------------------------------------------------------------
# The hypergradient of shares

SOLVERS = {
    "identity": {"method": "identity"},
    "neumann": {"method": "neumann", "terms": 3, "alpha": 0.2},
    "neumann, own α": {"method": "neumann", "terms": 1, "damping": 0.1},
    "cg": {"method": "cg", "terms": 4, "damping": 0.5},
    "nystrom": {"method": "nystrom", "terms": 5, "damping": 0.5},
    "nystrom, full": {"method": "nystrom", "terms": 10**6, "damping": 0.5},
}
# Examples of PT, FT and validation: no number of ranks below divides any of them.
EXAMPLES = 13, 11, 9
TOLERANCE = {"exact": 1e-12, "finite": 1e-7}


class Problem:
    """A network without BatchNorm or dropout; φ weighs the classes and shifts the inputs of PT."""

    def __init__(self):
        draw = torch.Generator().manual_seed(0)

        def randn(*shape):
            return torch.randn(*shape, generator=draw, dtype=torch.float64)

        self.inputs = [randn(n, 4) for n in EXAMPLES]
        self.labels = [torch.randint(3, (n,), generator=draw) for n in EXAMPLES]
        self.theta = {"a": randn(4, 5) / 2, "b": randn(5, 3) / 2}
        self.psi = {"w": randn(5, 3) / 2}
        self.phi = {"weight": randn(3).exp(), "shift": randn(4) / 5}

    def losses(self, rank: int, size: int, moved: int):
        """L_PT, L_FT and L_V of a rank's shares."""
        rows = [((torch.arange(n) + moved) % n).tensor_split(size)[rank] for n in EXAMPLES]
        shares = [len(own) / n for own, n in zip(rows, EXAMPLES, strict=True)]
        inputs = [x[own] for x, own in zip(self.inputs, rows, strict=True)]
        labels = [y[own] for y, own in zip(self.labels, rows, strict=True)]

        def pretrain_loss(theta, phi):
            scores = torch.tanh((inputs[0] + phi["shift"]) @ theta["a"]) @ theta["b"]
            losses = F.cross_entropy(scores, labels[0], reduction="none")
            return shares[0] * (phi["weight"][labels[0]] * losses).mean()

        def head_loss(part):
            def loss(theta, psi):
                scores = torch.tanh(inputs[part] @ theta["a"]) @ psi["w"]
                return shares[part] * F.cross_entropy(scores, labels[part])

            return loss

        return pretrain_loss, head_loss(1), head_loss(2)

    def hypergradient(self, rank=0, size=1, moved=0, reduce=None, **options):
        """Of a rank's shares; `moved`: of other examples than are this rank's."""
        losses = self.losses(rank, size, moved)
        return hypergradient(*losses, self.theta, self.psi, self.phi, reduce=reduce, **options)


def compared(wrong: bool, **options) -> dict[str, float]:
    """The largest relative error of anything found; `wrong`: also where it is wrong on purpose."""
    truth = Problem().hypergradient(**options)
    divided = {"rank": ranks.rank(), "size": ranks.size(), "reduce": ranks.sum_over_ranks}

    def worst(**changes):
        found = Problem().hypergradient(**{**divided, **changes}, **options)
        if not changes:
            expected = pytest.approx(truth.residual, rel=1e-5, abs=1e-8, nan_ok=True)
            assert found.residual == expected
        errors = [
            relative_error(getattr(found, name), getattr(truth, name))
            for name in ("phi", "psi0", "psi", "q")
        ]
        return max(errors) + (abs(found.value - truth.value) / truth.value).item()

    errors = {"right": worst()}
    if wrong:
        errors["another batch"] = worst(moved=ranks.rank())
        errors["nothing summed"] = worst(reduce=None)
    return errors


def all_compared(optimizers) -> dict[tuple, dict]:
    cases = {}
    for name, hvp, optimizer in itertools.product(SOLVERS, TOLERANCE, optimizers):
        for scope in ("head", "all"):
            unroll = Unroll(2, 0.1, (0.8, 0.95), 1e-2, optimizer, scope)
            solver = Solver(**SOLVERS[name], hvp=hvp)
            wrong = ranks.size() == 2 and name != "nystrom, full"
            cases[name, scope, optimizer, hvp] = compared(wrong, unroll=unroll, solver=solver)
    for hvp in TOLERANCE:
        solver = Solver(**SOLVERS["cg"], hvp=hvp)
        begun = {"unroll": Unroll(1, 0.1), "solver": solver, "q0": Problem().theta}
        cases["cg", "warm", "sgd", hvp] = compared(False, **begun)
    return cases


SLOW = [pytest.param(size, ["sgd"], marks=pytest.mark.slow) for size in (2, 3, 4)]


@pytest.mark.parametrize(("size", "optimizers"), [(2, ["adam"]), (4, ["adam"]), *SLOW])
def test_shares_of_ranks_give_the_hypergradient_of_one_process(size, optimizers):
    found = in_ranks(size, all_compared, optimizers)
    assert len(found[0]) == 6 * 2 * 2 + 2
    for case, errors in [each for cases in found for each in cases.items()]:
        assert errors["right"] < TOLERANCE[case[-1]], (case, errors)
        wrong = [error for name, error in errors.items() if name != "right"]
        assert all(error > 1e-3 for error in wrong), (case, errors)
    table = os.environ.get("TABLE")
    if table:
        rows = [[*case, max(cases[case]["right"] for cases in found)] for case in found[0]]
        with open(table, "a") as file:
            file.write(json.dumps([size, rows]) + "\n")


# ------------------------------------------------------------------------------------------------
# Algorithm 1


class Plain(Toy):
    """Without BatchNorm, without random numbers, in float64."""

    def __init__(self, settings, device, data):
        super().__init__(settings, device, data)
        self.points = {part: points.double() for part, points in self.points.items()}

    def network(self):
        encoder = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
        return metapt.Network(encoder, nn.Linear(6, 2)).double()

    def head(self):
        return super().head().double()

    def meta(self):
        return super().meta().double()

    def pretrain_loss(self, network, meta, index, progress, live):
        points = self.inputs("pretrain", index)
        classes = self.targets("pretrain", index)

        def loss(theta, phi):
            logits = metapt.call(network, theta, points, train=True, live=live)
            weights = metapt.call(meta, phi, classes).sigmoid().squeeze(1)
            return (weights * F.cross_entropy(logits, classes, reduction="none")).mean()

        return loss


UNEVEN = {
    "batch_size": 7,
    "meta_batch_size": 15,
    "unroll_batch_size": 5,
    "validation_batch_size": 9,
}


def state_of(training) -> dict:
    losses = {name: float(value) for name, value in training.losses.items()}
    return {
        "θ": flat(training.network),
        "ψ": flat(training.psi) if training.learn else torch.zeros(1),
        "φ": flat(training.learned()),
        "losses": losses,
    }


def both_runs(learn: bool, given: dict) -> list[dict]:
    """θ, ψ, φ and losses after a run, of this rank and of one process."""
    return [
        state_of(kind(domain_of(Plain, **UNEVEN, **given), learn).run())
        for kind in (ranks.DividedTraining, metapt.Training)
    ]


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    ("learn", "given"),
    [
        (True, {}),
        (True, {"preconditioner": "adam", "average": 0.5}),
        (True, {"validate_on": "all", "unroll_scope": "all", "hvp": "finite"}),
        (False, {}),
    ],
)
def test_a_run_of_ranks_is_the_run_of_one_process(size, learn, given):
    results = in_ranks(size, both_runs, learn, given)
    tolerance = 1e-5 if {"hvp", "preconditioner"} & set(given) else 1e-10
    for found, truth in results:
        for name in ("θ", "ψ", "φ"):
            # Alike on all ranks, bit by bit.
            assert torch.equal(found[name], results[0][0][name])
            assert (found[name] - truth[name]).norm() <= tolerance * truth[name].norm()
        assert found["losses"] == results[0][0]["losses"] or not learn
        assert found["losses"] == pytest.approx(truth["losses"], rel=tolerance, nan_ok=True)


class Drawing(Toy):
    """It notes what its losses draw, and draws at the beginning of each round."""

    drawn = ()

    def begin_episode(self, meta):
        torch.rand(())

    def pretrain_loss(self, network, meta, index, progress, live):
        loss = super().pretrain_loss(network, meta, index, progress, live)

        def noted(theta, phi):
            with torch.random.fork_rng():
                self.drawn = (*self.drawn, torch.rand(()).item())
            return loss(theta, phi)

        return noted


def drawing_run():
    found = []
    for _ in range(2):
        done = ranks.DividedTraining(domain_of(Drawing), True).run()
        statistics = dict(done.network.named_buffers())
        order = done.batches["meta"].order
        found.append((state_of(done), done.domain.drawn, statistics, order, torch.get_rng_state()))
    return found


def test_what_ranks_draw_is_their_own_and_the_rest_is_alike():
    """On a domain with BatchNorm and jitter: θ, φ, batches, BatchNorm's statistics."""
    (first, again), (other, _) = in_ranks(2, drawing_run)
    # The first number is one of `check_losses`.
    mine = set(first[1][1:])
    others = set(other[1][1:])
    assert not mine & others
    assert len(mine) > 24
    assert first[1] == again[1]
    assert first[2]
    for one in (again, other):
        assert all(torch.equal(first[0][name], one[0][name]) for name in ("θ", "ψ", "φ"))
        assert all(torch.equal(buffer, one[2][name]) for name, buffer in first[2].items())
        assert torch.equal(first[3], one[3])
    assert torch.equal(first[4], other[4])


def products_are_repeatable() -> tuple[float, float]:
    """L_PT of the meta step, twice at one point: what it draws is drawn once for all passes."""
    training = ranks.DividedTraining(domain_of(Toy, jitter=1.0), True)
    loss = training.pretrain_loss("meta", 0, live=False)
    point = metapt.detached(training.network), metapt.detached(training.meta)
    return loss(*point).item(), loss(*point).item()


def test_all_passes_of_one_loss_draw_the_same():
    first, other = in_ranks(2, products_are_repeatable)
    assert first[0] == first[1] != other[0]


def parted(what: str) -> str:
    training = ranks.DividedTraining(domain_of(Toy, unroll_scope="all", steps=8, warmup=0), True)
    training.run()
    if ranks.rank() == 2:
        statistics = training.network.encoder[1].running_var
        moments = {
            name: [*getattr(training, name).state.values()][-1]["exp_avg"]
            for name in ("optimizer", "meta_optimizer")
        }
        tensors = {
            "network": training.network.head.bias.data,
            "network's buffers": statistics,
            "psi": training.psi["bias"],
            "meta": training.meta.weight.data,
            "ft_states' head": training.ft_states["head"]["exp_avg_sq"],
            "ft_states' all": training.ft_states["all"]["exp_avg_sq"],
            **moments,
        }
        if what == "random":
            torch.rand(())
        else:
            tensors[what].view(-1)[0].nextafter_(torch.tensor(9.0))
    try:
        ranks.require_alike(training)
    except metapt.Failed as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    "what",
    [
        "network",
        "random",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "network's buffers",
                "psi",
                "meta",
                "optimizer",
                "meta_optimizer",
                "ft_states' head",
                "ft_states' all",
            )
        ),
    ],
)
def test_a_rank_that_has_parted_is_named(what):
    name = what.partition("'")[0]
    line = f"at PT step 8 {name} of rank 2 is not that of rank 0"
    assert in_ranks(3, parted, what) == [line] * 3


class NoMean(Toy):
    mean_over_examples = False


def refusals() -> list[str]:
    said = []
    for kind, given in ((NoMean, {}), (Toy, {"unroll_batch_size": 1})):
        with pytest.raises(metapt.BadInput) as error:
            ranks.DividedTraining(domain_of(kind, **given), True)
        said.append(str(error.value))
    return said


def test_what_cannot_be_divided_is_refused():
    lines = [
        "the PT loss of NoMean is no mean over examples: ranks cannot share it",
        "a batch of 1 examples cannot be divided over 2 ranks",
    ]
    assert in_ranks(2, refusals) == [lines, lines]


def lost() -> str:
    """What two ranks say of a third that ends."""
    numbers = {"": torch.ones(1000)}
    try:
        ranks.sum_over_ranks(numbers)
        if ranks.rank() == 1:
            return ""
        for _ in range(1000):
            ranks.sum_over_ranks(numbers)
    except metapt.Failed as error:
        return str(error)
    return "nothing"


def test_a_rank_that_has_ended_is_noticed():
    first, second, third = in_ranks(3, lost)
    assert second == ""
    for said in (first, third):
        assert said.startswith("a message between ranks failed, as when one has ended: ")


def chosen(kind: str) -> tuple:
    """What ranks or one process choose, and how many times this rank fine-tuned for it."""
    domain = domain_of(Toy, compare=3)
    torch.manual_seed(0)
    names = ("no_pretraining", "default_phi", "learned_phi", "online")
    methods = {name: metapt.given_network(domain, domain.network()) for name in names}
    cells = metapt.cells_of(methods, [5], 3, with_held=True)
    if kind == "ranks":
        ranks.put_in_place()
    with mock.patch.object(metapt, "finetune", side_effect=metapt.finetune) as counted:
        measured = metapt.measure_cells(domain, cells, None, lambda: None)
    choice = metapt.choose(domain, metapt.collect(cells, measured).held_scores)
    return tuple(choice), counted.call_count


def test_ranks_refuse_processes_besides_them():
    with pytest.raises(metapt.BadInput, match="--jobs is for one process"):
        ranks.refuse_jobs(2)
    ranks.refuse_jobs(None)


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_take_turns_to_choose_and_choose_as_one_process(size):
    truth, expected_calls = chosen("one process")
    results = in_ranks(size, chosen, "ranks")
    assert len({each["mean"] for each in truth[1].values()}) > 1
    assert [said for said, _ in results] == [truth] * size
    assert sum(calls for _, calls in results) == expected_calls
    assert all(calls > 0 for _, calls in results)


# ------------------------------------------------------------------------------------------------
# Commands

LONG = ["--steps=100000", "--warmup=0", "--compare=0"]
SHORT = ["--steps=28", "--warmup=4", "--compare=1", "--measure-steps=5"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a run of two ranks, not to be changed; and what the ranks said."""
    folder = tmp_path_factory.mktemp("home")
    toy_file(folder / "toy.py")
    said = in_ranks(2, command, folder, "meta", "toy.py", "--out=run", "--json", *SHORT)
    assert [code for code, _, _ in said] == [0, 0], said
    return folder, said


def test_rank_0_alone_writes_and_speaks(home):
    folder, ((_, out, _), other) = home
    assert other == (0, "", "")
    assert json.loads(out)["meta_steps"] == 6
    assert len(json.loads(out)["comparison"]) == 2 * 4
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == sorted(set(steps))
    for name in ("summary.json", "phi.pt", "phi.png", "comparison.png"):
        assert (folder / "run" / name).exists()


def test_finetuning_by_ranks_is_that_of_one_process(home):
    folder, _ = home
    words = ["finetune", "run", "--compare=3", "--measure-steps=5", "--json"]
    (_, divided, _), other = in_ranks(2, command, folder, *words, "--out=two", "--export=two.pt")
    assert other == (0, "", "")
    code, out, err = main_in(folder, *words, "--out=one", "--export=one.pt")
    assert code == 0, err
    assert json.loads(out)["comparison"] == json.loads(divided)["comparison"]
    assert (folder / "one.pt").read_bytes() == (folder / "two.pt").read_bytes()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_run_goes_on(size, home, tmp_path):
    """With as many ranks to the same end, bit by bit; other ranks say that they are others."""
    folder, _ = home
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.json", "metrics.jsonl"):
        shutil.copy(folder / "run" / name, run)
    shutil.copy(folder / "step-16.pt", run / "checkpoint.pt")
    words = "meta", "--resume=run"
    if size == 1:
        code, out, err = main_in(tmp_path, *words)
    else:
        (code, out, err), *_ = in_ranks(size, command, tmp_path, *words)
    assert code == 0, err
    assert "going on at PT step 16" in out
    said = "ranks: 2 before, 3 now: the run's numbers will differ"
    assert (said in err) == (size == 3)
    assert (outcome(run) == outcome(folder / "run")) == (size == 2)


def test_usage_and_bad_input_are_said_once(tmp_path):
    (code, out, _), other = in_ranks(2, command, tmp_path, "meta", "--help")
    assert code == 0
    assert "Usage" in out
    assert other == (0, "", "")

    for words in (["meta", "nothing"], ["download", "mnist"]):
        found = in_ranks(2, command, tmp_path, *words)
        assert [(code, out) for code, out, _ in found] == [(2, "")] * 2
        lines = "".join(err for _, _, err in found)
        assert lines.startswith("metapt: ")
        assert lines.count("\n") == 1


def test_a_run_in_use_is_refused_in_one_line(home, tmp_path):
    folder, _ = home
    run = tmp_path / "run"
    shutil.copytree(folder / "run", run)
    with contextlib.closing(contextlib.ExitStack()) as stack:
        stack.callback(metapt.Run(run).acquire().release)
        found = in_ranks(2, command, tmp_path, "meta", "--resume=run")
    assert found[0][0] == 2
    assert found[0][2] == "metapt: run is in use by another process\n"


def test_without_torchrun_a_line_says_how_to_start(monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with pytest.raises(SystemExit) as ended:
        ranks.main()
    assert ended.value.code == 2
    line = "metapt: start it with: torchrun --nproc-per-node N -m bench.ranks COMMAND ...\n"
    assert capsys.readouterr().err == line

    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "-m bench.ranks" in refused(tmp_path, "meta")


@pytest.mark.parametrize(("name", "here"), [("cuda:1", 2), ("cuda", 3)])
def test_ranks_do_not_share_a_gpu(name, here, monkeypatch):
    monkeypatch.setattr(ranks, "pick_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
    with pytest.raises(metapt.BadInput, match="each rank takes a GPU of its own"):
        ranks.pick_own_device(name)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert ranks.pick_own_device("cuda") == torch.device("cuda")


# ------------------------------------------------------------------------------------------------
# Ends


def torchrun(folder, size, *words) -> subprocess.Popen:
    launcher = [
        *("-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"),
        f"--nproc-per-node={size}",
        *("-m", "bench.ranks"),
    ]
    environment = {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": LOOPBACK,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    return subprocess.Popen(
        [sys.executable, *launcher, *words],
        cwd=folder,
        env={**os.environ, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def workers(parent: int) -> list[int]:
    """Process ids of the ranks, in their order."""
    listing = subprocess.run(
        ["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True
    )
    pairs = [map(int, line.split()) for line in listing.stdout.splitlines()]
    return sorted(pid for pid, ppid in pairs if ppid == parent)


LACKING = """

from bench import ranks


class Lacking(Toy):
    rounds = 0

    def begin_episode(self, meta):
        self.rounds += 1
        if self.rounds == 25 and ranks.rank() == 1:
            raise metapt.BadInput("rank 1 lacks something")
"""
GO_ON = r"go on with: torchrun --nproc-per-node 2 -m bench.ranks meta --resume run"


@pytest.mark.parametrize(
    ("end", "line"),
    [
        ("ctrl-c", rf"metapt: stopped at PT step (\d+); {GO_ON}"),
        pytest.param("exception", r"metapt: rank 1 lacks something", marks=pytest.mark.slow),
        pytest.param("kill", r"metapt: a message between ranks .*", marks=pytest.mark.slow),
    ],
)
def test_torchrun_ends_all_at_once_with_one_line(end, line, tmp_path):
    """What torchrun adds on its own is its own; the last checkpoint is good."""
    toy_file(tmp_path / "toy.py", LACKING)
    kind = "Lacking" if end == "exception" else "Toy"
    process = torchrun(tmp_path, 2, "meta", f"toy.py:{kind}", "--out=run", *LONG)
    try:
        until = time.monotonic() + LIMIT
        while not (tmp_path / "run" / "checkpoint.pt").exists():
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < until
            time.sleep(0.1)
        players = workers(process.pid)
        begun = time.monotonic()
        if end == "ctrl-c":
            process.send_signal(signal.SIGINT)
        elif end == "kill":
            os.kill(players[1], signal.SIGKILL)
        said = process.communicate(timeout=LIMIT)[0]
        assert process.returncode != 0
        assert time.monotonic() - begun < 30
        assert not set(players) & set(workers(process.pid))
    finally:
        process.kill()
        process.wait()
    lines = [each for each in re.split(r"[\r\n]+", said) if each.startswith("metapt: ")]
    assert len(lines) == 1, said
    match = re.fullmatch(line, lines[0])
    assert match, said
    checkpoint = metapt.Run(tmp_path / "run").load_checkpoint()
    assert checkpoint["training"]["ranks"] == 2
    assert checkpoint["step"] >= 80
    if end == "ctrl-c":
        assert checkpoint["step"] == int(match[1])
