"""Data parallelism: several processes, as torchrun starts them, against one that has the whole batch."""

import atexit
import contextlib
import io
import itertools
import json
import multiprocessing
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import time
import traceback
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from tools import Toy, domain_of, find_domain, flat, main_in, outcome, toy_file, training
from torch import nn

import metapt
from metapt import Solver, Unroll, hypergradient

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.filterwarnings("ignore:‖Hq − v‖", "ignore:.*fork.*:DeprecationWarning"),
]
LOOPBACK = "lo" if sys.platform == "linux" else "lo0"
LIMIT = 120  # seconds that processes may take, on a busy machine


# Tools


def play(rank, size, port, found, work, arguments):
    """One rank: with the environment that torchrun gives it."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_RESTART_COUNT": "0",
                   "GLOO_SOCKET_IFNAME": LOOPBACK}  # fmt: skip
    torch.cuda.is_available = lambda: False  # which a fork cannot use
    try:
        found.send_bytes(pickle.dumps((True, work(*arguments))))
    except BaseException:  # noqa: BLE001 (the test shows it)
        found.send_bytes(pickle.dumps((False, traceback.format_exc())))
    os._exit(0)


def in_ranks(size, work, *arguments) -> list:
    """What `work(*arguments)` returns in each of `size` processes, forked from this one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context, ends = multiprocessing.get_context("fork"), []
    for rank in range(size):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=play, args=(rank, size, port, theirs, work, arguments))
        process.start()
        theirs.close()
        ends.append((process, ours))
    results, until = [], time.monotonic() + LIMIT
    try:
        for rank, (_, end) in enumerate(ends):
            assert end.poll(max(0, until - time.monotonic())), f"rank {rank} has not ended"
            good, result = pickle.loads(end.recv_bytes())
            assert good, f"rank {rank}: {result}"
            results.append(result)
    finally:
        for process, _ in ends:
            process.kill()
            process.join()
    return results


def command(folder, *words) -> tuple[int, str, str]:
    """A rank's part in a command: exit status, standard output, standard error."""
    out, err = io.StringIO(), io.StringIO()
    with (contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err),
          mock.patch("sys.argv", ["metapt.py", *words]), pytest.raises(SystemExit) as ended):  # fmt: skip
        metapt.main()
    return ended.value.code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module", autouse=True)
def imported(tmp_path_factory):
    """What a run imports only once it is needed is imported before any process is forked."""
    toy_file((folder := tmp_path_factory.mktemp("imported")) / "toy.py")
    assert main_in(folder, "meta", "toy.py", "--steps=8", "--warmup=0", "--compare=1", "--measure-steps=1")[0] == 0


def alone() -> metapt.Ranks:
    """What one process is, within several."""
    ranks = metapt.Ranks()
    ranks.rank, ranks.size = 0, 1
    return ranks


def error(found, truth) -> float:
    found, truth = flat(found), flat(truth)
    return ((found - truth).norm() / truth.norm()).item()


# The hypergradient of shares

SOLVERS = {
    "identity": {"method": "identity"},
    "neumann": {"method": "neumann", "terms": 3, "alpha": 0.2},
    "neumann, own α": {"method": "neumann", "terms": 1, "damping": 0.1},
    "cg": {"method": "cg", "terms": 4, "damping": 0.5},
    "nystrom": {"method": "nystrom", "terms": 5, "damping": 0.5},
    "nystrom, full": {"method": "nystrom", "terms": 10**6, "damping": 0.5},
}
EXAMPLES = 13, 11, 9  # of PT, FT and validation: no number of ranks below divides any of them
TOLERANCE = {"exact": 1e-12, "finite": 1e-7}


class Problem:
    """A network without BatchNorm or dropout; φ weighs the classes and shifts the inputs of PT. `of_views`: L_PT is
    SimCLR's loss of two views, the second moved by φ."""

    def __init__(self, of_views: bool = False):
        self.of_views, draw = of_views, torch.Generator().manual_seed(0)

        def randn(*shape):
            return torch.randn(*shape, generator=draw, dtype=torch.float64)

        self.inputs = [randn(n, 4) for n in EXAMPLES]
        self.labels = [torch.randint(3, (n,), generator=draw) for n in EXAMPLES]
        self.theta = {"a": randn(4, 5) / 2, "b": randn(5, 3) / 2}
        self.psi, self.phi = {"w": randn(5, 3) / 2}, {"weight": randn(3).exp(), "shift": randn(4) / 5}

    def losses(self, ranks, moved: int = 0):
        """L_PT, L_FT and L_V of this rank's shares; `moved`: of other examples than are this rank's."""
        rows = [((torch.arange(n) + moved) % n).tensor_split(ranks.size)[ranks.rank] for n in EXAMPLES]
        shares = [len(own) / n for own, n in zip(rows, EXAMPLES, strict=True)]
        inputs, labels = ([of[own] for of, own in zip(each, rows, strict=True)] for each in (self.inputs, self.labels))

        def pretrain_loss(theta, phi):
            if self.of_views:
                views = inputs[0], torch.tanh(inputs[0] + phi["shift"])
                outputs = [torch.tanh(view @ theta["a"]) @ theta["b"] for view in views]
                return shares[0] * nt_xent(*outputs, 0.5, shares[0], ranks)
            scores = torch.tanh((inputs[0] + phi["shift"]) @ theta["a"]) @ theta["b"]
            return shares[0] * (phi["weight"][labels[0]] * F.cross_entropy(scores, labels[0], reduction="none")).mean()

        def head_loss(i):
            return lambda theta, psi: (
                shares[i] * F.cross_entropy(torch.tanh(inputs[i] @ theta["a"]) @ psi["w"], labels[i])
            )

        return pretrain_loss, head_loss(1), head_loss(2)

    def hypergradient(self, ranks, moved: int = 0, reduced: bool = True, **options):
        reduce = ranks.sum if reduced and ranks.size > 1 else None
        return hypergradient(*self.losses(ranks, moved), self.theta, self.psi, self.phi, reduce=reduce, **options)


def nt_xent(*arguments):
    return sys.modules[find_domain("ecg").__module__].nt_xent(*arguments)


def compared(problem, wrong: bool, **options) -> dict[str, float]:
    """The largest relative error of anything found; `wrong`: also where it is made wrong on purpose."""
    truth, ranks = problem.hypergradient(alone(), **options), metapt.Ranks()

    def worst(**changes):
        found = problem.hypergradient(ranks, **changes, **options)
        assert changes or found.residual == pytest.approx(truth.residual, rel=1e-5, abs=1e-8, nan_ok=True)
        return (
            max(error(getattr(found, name), getattr(truth, name)) for name in ("phi", "psi0", "psi", "q"))
            + (abs(found.value - truth.value) / truth.value).item()
        )

    errors = {"right": worst()}
    return (
        errors | {"another batch": worst(moved=ranks.rank), "nothing summed": worst(reduced=False)} if wrong else errors
    )


def all_compared(optimizers) -> dict[tuple, dict]:
    metapt.join_ranks()
    cases = {}
    for (name, solver), hvp, optimizer in itertools.product(SOLVERS.items(), TOLERANCE, optimizers):
        for scope in ("head", "all"):
            unroll = Unroll(2, 0.1, (0.8, 0.95), 1e-2, optimizer, scope)
            options = {"unroll": unroll, "solver": Solver(**solver, hvp=hvp)}
            cases[name, scope, optimizer, hvp] = compared(
                Problem(), metapt.Ranks().size == 2 and name != "nystrom, full", **options
            )
    for name, hvp in itertools.product(("cg", "neumann"), TOLERANCE):
        options = {"unroll": Unroll(1, 0.1), "solver": Solver(**SOLVERS[name], hvp=hvp)}
        cases[name, "warm", "sgd", hvp] = compared(Problem(), False, q0=Problem().theta, **options)
        cases[name, "views", "sgd", hvp] = compared(Problem(of_views=True), False, **options)
    return cases


@pytest.mark.parametrize(("size", "optimizers"), [
    (2, ["adam"]), (4, ["adam"]), *(pytest.param(size, ["sgd"], marks=pytest.mark.slow) for size in (2, 3, 4))])  # fmt: skip
def test_shares_of_ranks_give_the_hypergradient_of_one_process(size, optimizers):
    found = in_ranks(size, all_compared, optimizers)
    assert len(found[0]) == 6 * 2 * 2 + 2 * 2 * 2
    for case, errors in [each for cases in found for each in cases.items()]:
        assert errors["right"] < TOLERANCE[case[-1]], (case, errors)
        assert all(wrong > 1e-3 for name, wrong in errors.items() if name != "right"), (case, errors)
    if table := os.environ.get("TABLE"):
        with open(table, "a") as file:
            file.write(
                json.dumps([size, [[*case, max(cases[case]["right"] for cases in found)] for case in found[0]]]) + "\n"
            )


# Algorithm 1


class Plain(Toy):
    """Without BatchNorm, without random numbers, in float64."""

    def __init__(self, settings, device, data):
        super().__init__(settings, device, data)
        self.points = {part: points.double() for part, points in self.points.items()}

    def network(self):
        return metapt.Network(nn.Sequential(nn.Linear(4, 6), nn.Tanh()), nn.Linear(6, 2)).double()

    def head(self):
        return super().head().double()

    def meta(self):
        return super().meta().double()

    def pretrain_loss(self, network, meta, index, progress, live):
        points, classes = self.inputs("pretrain", index), self.targets("pretrain", index)

        def loss(theta, phi):
            logits = metapt.call(network, theta, points, train=True, live=live)
            weights = metapt.call(meta, phi, classes).sigmoid().squeeze(1)
            return (weights * F.cross_entropy(logits, classes, reduction="none")).mean()

        return loss


UNEVEN = {"batch_size": 7, "meta_batch_size": 15, "unroll_batch_size": 5, "validation_batch_size": 9}


def state_of(done) -> dict:
    learner = done.best
    recent = [float(value) for value in learner.recent]
    return {"θ": flat(learner.network), "ψ": flat(learner.psi), "φ": flat(learner.meta), "recent": recent}


class Views(Plain):
    """SimCLR by the ECG domain's loss, which is no mean over examples; φ moves the second view."""

    class Settings(Plain.Settings):
        temperature = 0.5

    def views(self, meta, phi, points):
        return points, torch.tanh(points + phi["weight"].sum())

    def pretrain_loss(self, *given, **options):
        return find_domain("ecg").pretrain_loss(self, *given, **options)


def whole_run(kind=Plain, **given):
    """θ, ψ, φ and validation losses after a run, of this rank and of one process."""
    metapt.join_ranks()
    found = []
    for ranks in (metapt.Ranks(), alone()):
        (domain := domain_of(kind, **UNEVEN, **given)).ranks = ranks
        found.append(state_of(metapt.Training(domain, True).run()))
    return found


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("given", [{}, {"kind": Views, "damping": 20.0}, {"preconditioner": "adam"},
    {"particles": "3:0.5,1", "validate_on": "all", "unroll_scope": "all", "hvp": "finite"}])  # fmt: skip
def test_a_run_of_ranks_is_the_run_of_one_process(size, given):
    results = in_ranks(size, lambda: whole_run(**given))
    tolerance = 1e-5 if {"hvp", "preconditioner"} & set(given) else 1e-10
    for found, truth in results:
        for name in ("θ", "ψ", "φ"):
            assert torch.equal(found[name], results[0][0][name])  # alike on all ranks, bit by bit
            assert error({"": found[name]}, {"": truth[name]}) < tolerance
        assert found["recent"] == pytest.approx(truth["recent"], rel=tolerance)
        assert len(found["recent"]) == 5


class Drawing(Toy):
    """It notes what its losses draw."""

    drawn = ()

    def pretrain_loss(self, network, meta, index, progress, live):
        loss = super().pretrain_loss(network, meta, index, progress, live)

        def noted(theta, phi):
            with torch.random.fork_rng():
                self.drawn = (*self.drawn, torch.rand(()).item())
            return loss(theta, phi)

        return noted

    def explore(self, meta, progress):
        meta.weight.data += 0.01 * torch.randn(())


def drawing_run():
    metapt.join_ranks()
    done = [training(Drawing).run() for _ in range(2)]
    buffers = [dict(each.best.network.named_buffers()) for each in done]
    return [(state_of(each), each.domain.drawn, own, each.best.streams["meta"].order, torch.get_rng_state())
            for each, own in zip(done, buffers, strict=True)]  # fmt: skip


def test_what_ranks_draw_is_their_own_and_the_rest_is_alike():
    """On a domain with BatchNorm and jitter: θ, φ with its noise, batches, BatchNorm's statistics."""
    (first, again), (other, _) = in_ranks(2, drawing_run)
    mine, others = set(first[1][1:]), set(other[1][1:])  # the first is of `check_losses`
    assert not mine & others and len(mine) > 24
    assert first[1] == again[1]
    for one in (again, other):
        assert all(torch.equal(first[0][name], one[0][name]) for name in ("θ", "ψ", "φ"))
        assert all(torch.equal(b, one[2][name]) for name, b in first[2].items()) and first[2]
        assert torch.equal(first[3], one[3])
    assert torch.equal(first[4], other[4])


def parted(what: str) -> str:
    metapt.join_ranks()
    one = training(unroll_scope="all", steps=8, warmup=0).run()
    if metapt.Ranks().rank == 2:
        tensors = {"θ": one.best.network.head.bias.data, "ψ": one.best.psi["bias"], "φ": one.best.meta.weight.data}
        tensors["θ's buffers"] = one.best.network.encoder[1].running_var
        tensors |= {f"ft_states' {scope}": state["exp_avg_sq"] for scope, state in one.best.ft_states.items()}
        for name in ("optimizer", "meta_optimizer"):
            tensors[name] = [*getattr(one.best, name).state.values()][-1]["exp_avg"]
        if what in tensors:
            tensors[what].reshape(-1)[0].nextafter_(torch.tensor(9.0))
        else:
            torch.rand(())
    try:
        one.compare_ranks()
    except metapt.Failed as error:
        return str(error)
    return ""


@pytest.mark.parametrize("what", ["θ", "θ's buffers", "ψ", "φ", "the random state", "optimizer",
                                  "meta_optimizer", "ft_states' head", "ft_states' all"])  # fmt: skip
def test_a_rank_that_has_parted_is_named(what):
    name = what.partition("'")[0] + (" (0)" if what != "the random state" else "")
    assert in_ranks(3, parted, what) == [f"at PT step 8 {name} of rank 2 is not that of rank 0"] * 3


class Indivisible(Toy):
    divisible = False


def refusals() -> list[str]:
    metapt.join_ranks()
    said = []
    for kind, given in ((Indivisible, {}), (Toy, {"unroll_batch_size": 1})):
        with pytest.raises(metapt.BadInput) as refused:
            training(kind, **given)
        said.append(str(refused.value))
    return said


def test_what_cannot_be_divided_is_refused():
    assert in_ranks(2, refusals) == 2 * [[
        "the PT loss of Indivisible is no mean over examples: no ranks",
        "a batch of 1 examples cannot be divided over 2 ranks"]]  # fmt: skip


def lost() -> str:
    """What two ranks say of a third that ends."""
    metapt.join_ranks()
    ranks = metapt.Ranks()
    try:
        ranks.sum({"": torch.ones(1000)})
        for _ in range(1000) if ranks.rank != 1 else ():
            ranks.sum({"": torch.ones(1000)})
    except metapt.Failed as error:
        return str(error)
    return ""


def test_a_rank_that_has_ended_is_said_to_have():
    first, second, third = in_ranks(3, lost)
    assert second == "" and all(said.startswith("another rank has ended: ") for said in (first, third)), (first, third)


@pytest.mark.parametrize(("error", "ended"), [
    (RuntimeError("pair.cc:553] Connection closed by peer [10.0.0.1]:1766. Check the logs"), True),
    (RuntimeError("pair.cc:537] Read error [10.0.0.1]:1766: Connection reset by peer"), True),
    (RuntimeError("NCCL error: remote process exited or there was a network error, NCCL version 2.21.5"), True),
    (RuntimeError("Invalid function argument. Expects parameter tensor to be dense"), False),
    (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."), False),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."), False)])  # fmt: skip
def test_what_is_wrong_here_is_not_said_to_be_another_ranks_end(error, ended, monkeypatch):
    (ranks := alone()).size = 2
    for name in ("all_reduce", "all_gather_object"):
        monkeypatch.setattr(torch.distributed, name, mock.Mock(side_effect=error))
    for work in (lambda: ranks.sum({"": torch.ones(2)}), lambda: ranks.objects(1)):
        with pytest.raises(metapt.Failed if ended else type(error)) as raised:
            work()
        assert ended or raised.value is error


def leaving(status: int) -> tuple:
    """How a rank leaves, whether its group stands then, and what waits to be written."""
    atexit._clear()  # those of this process's parent
    metapt.join_ranks()
    metapt.Ranks().objects(0)
    with mock.patch("os._exit") as left, mock.patch("sys.stdout") as out:
        metapt.leave_ranks(status)
        assert not left.called
        atexit._run_exitfuncs()
    return [call.args for call in left.call_args_list], torch.distributed.is_initialized(), out.flush.called


@pytest.mark.parametrize("status", [0, 2])
def test_a_rank_leaves_before_python_ends_and_what_failed_waits_for_none(status):
    """Threads of gloo hold objects of Python's, and would abort the process in an interpreter that ends."""
    assert in_ranks(2, leaving, status) == [([(status,)], status != 0, True)] * 2


def chosen() -> list:
    """What is chosen by these ranks, and by one process; and how many times this rank fine-tuned for it."""
    metapt.join_ranks()
    found, real = [], metapt.finetune
    for ranks in (metapt.Ranks(), alone()):
        (domain := domain_of(Toy, compare=3)).ranks = ranks
        networks = [domain.network() for _ in range(3)]
        methods = {name: lambda seed, of=of: of for name, of in zip(("default_phi", "learned_phi", "online"), networks)}
        with mock.patch.object(metapt, "finetune", side_effect=real) as counted:
            found.append((metapt.choose(domain, methods, 10, lambda: None), counted.call_count))
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_take_turns_to_choose_and_choose_as_one_process(size):
    results = in_ranks(size, chosen)
    for (said, _), (truth, _) in results:
        assert said == truth
        assert len({each["mean"] for each in truth[0]["held_score"].values()}) > 1
    assert sum(here for (_, here), _ in results) == results[0][1][1]
    assert all(here > 0 for (_, here), _ in results)


# Commands

LONG = ["--steps=100000", "--warmup=0", "--compare=0"]
SHORT = ["--steps=28", "--compare=1", "--measure-steps=5"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a run of two ranks; not to be changed."""
    folder = tmp_path_factory.mktemp("home")
    toy_file(folder / "toy.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metapt, "CHECKPOINT_EVERY", 2)
        found = in_ranks(2, command, folder, "meta", "toy.py", "--out=run", "--json", *SHORT)
    assert [code for code, _, _ in found] == [0, 0], found
    return SimpleNamespace(folder=folder, said=found)


def test_rank_0_alone_writes_and_speaks(home):
    (_, out, _), other = home.said
    assert other == (0, "", "")
    assert json.loads(out)["meta_steps"] == 6
    rows = [json.loads(line) for line in (home.folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == sorted({row["step"] for row in rows})
    assert not [path for path in (home.folder / "run").iterdir() if path.name.startswith(".")]


def test_finetuning_by_ranks_is_that_of_one_process(home):
    words = ["finetune", "run", "--compare=3", "--measure-steps=5", "--json"]
    found = in_ranks(2, command, home.folder, *words, "--out=two")
    assert found[1] == (0, "", "")
    code, out, _ = main_in(home.folder, *words, "--out=one")
    assert code == 0 and json.loads(out)["comparison"] == json.loads(found[0][1])["comparison"]


@pytest.mark.parametrize("size", [1, 2])
def test_a_run_goes_on(size, home, tmp_path):
    """With as many ranks to the same end, bit by bit; with another number it says so."""
    code, content = 0, torch.load(io.BytesIO((home.folder / "run" / "checkpoint.pt").read_bytes()[:-64]))
    (run := tmp_path / "run").mkdir()
    for name in ("config.json", "metrics.jsonl", "checkpoint.previous.pt"):
        (run / name.replace(".previous", "")).write_bytes((home.folder / "run" / name).read_bytes())
    words = "meta", "--resume=run"
    code, out, err = main_in(tmp_path, *words) if size == 1 else in_ranks(2, command, tmp_path, *words)[0]
    assert code == 0 and content["ranks"] == 2 and content["step"] == 28, err
    assert ("ranks: 2 before, 1 now" in out) == (size == 1)
    assert "going on at PT step " in out and "going on at PT step 28" not in out
    assert (outcome(run) == outcome(home.folder / "run")) == (size == 2)


def torchrun(folder, size, script, *words) -> subprocess.Popen:
    words = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={size}",
             str(script), *words]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": LOOPBACK}
    return subprocess.Popen([sys.executable, *words], cwd=folder, env=environment, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)  # fmt: skip


def workers(parent: int) -> list[int]:
    """Process ids of the ranks, in their order."""
    found = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    return sorted(int(pid) for pid, ppid in map(str.split, found.splitlines()) if int(ppid) == parent)


@pytest.mark.parametrize(("end", "line"), [
    ("ctrl-c", r"metapt: stopped at PT step (\d+); go on with: torchrun --nproc-per-node 2 metapt.py meta --resume run"),
    ("kill", r"metapt: (another rank has ended: .*|stopped)"),
    ("exception", r"metapt: rank 1 lacks something")])  # fmt: skip
def test_torchrun_ends_all_at_once_with_one_line(end, line, home, tmp_path):
    """What torchrun adds on its own is its own; the last checkpoint is good."""
    toy_file(tmp_path / "toy.py", """

class Lacking(Toy):
    def begin_episode(self, meta):
        self.rounds = getattr(self, "rounds", 0) + 1
        if self.rounds == 25 and self.ranks.rank == 1:
            raise metapt.BadInput("rank 1 lacks something")
""")  # fmt: skip
    process = torchrun(
        tmp_path, 2, metapt.__file__, "meta", f"toy.py:{'Lacking' if end == 'exception' else 'Toy'}", "--out=run", *LONG
    )
    try:
        until = time.monotonic() + LIMIT
        while not (tmp_path / "run" / "checkpoint.pt").exists():
            assert process.poll() is None and time.monotonic() < until, process.stdout.read()
            time.sleep(0.1)
        ranks, begun = workers(process.pid), time.monotonic()
        assert len(ranks) == 2
        if end == "ctrl-c":
            process.send_signal(signal.SIGINT)
        elif end == "kill":
            os.kill(ranks[1], signal.SIGKILL)
        said = process.communicate(timeout=LIMIT)[0]
        assert process.returncode != 0 and time.monotonic() - begun < 30
        assert not set(ranks) & set(workers(process.pid))
    finally:
        process.kill()
        process.wait()
    lines = [each for each in re.split(r"[\r\n]+", said) if each.startswith("metapt: ")]
    assert len(lines) == 1 and re.fullmatch(line, lines[0]), said
    content = metapt.Run(tmp_path / "run").checkpoint()
    assert content["ranks"] == 2 and content["step"] >= 80
    if end == "ctrl-c":
        assert content["step"] == int(re.fullmatch(line, lines[0])[1])


@pytest.mark.slow
def test_ranks_end_that_wait_in_vain_where_python_answers_no_signal(tmp_path):
    """Without Python's lock and for ever, as in a collective of NCCL, which the end of a rank does not end."""
    toy_file(tmp_path / "toy.py", """

class Stuck(Toy):
    def begin_episode(self, meta):
        self.ranks.objects(None)
        if self.ranks.rank == 1:
            metapt.time.sleep(2)  # until the other waits
            raise metapt.BadInput("rank 1 lacks something")
        torch.futures.Future().wait()
""")  # fmt: skip
    process = torchrun(tmp_path, 2, metapt.__file__, "meta", "toy.py:Stuck", "--out=run", *LONG)
    try:
        lines, raised = [], None
        for line in process.stdout:
            lines.append(line)
            raised = time.monotonic() if line.startswith("metapt: rank 1") else raised
        assert process.wait(LIMIT) == 1 and raised, lines
        assert 20 < time.monotonic() - raised < 30, lines
    finally:
        process.kill()
        process.wait()
    assert sum(line.startswith("metapt: ") for line in lines) == 1 and "SIGKILL" not in "".join(lines), lines


def test_help_and_downloads_are_of_one_rank(tmp_path):
    (script := tmp_path / "script.py").write_text("import pathlib; pathlib.Path('log').open('a').write('once\\n')")
    with mock.patch.dict(metapt.SCRIPTS, {"script": script}):
        found = in_ranks(2, command, tmp_path, "download", "script")
    assert found == [(0, "", "")] * 2 and (tmp_path / "log").read_text() == "once\n"
    (code, out, _), other = in_ranks(2, command, tmp_path, "meta", "--help")
    assert code == 0 and "Usage" in out and other == (0, "", "")
