"""What test_device.py runs: the core, Algorithm 1 and FT on a pretend device, beside the CPU.

The device computes as the CPU does. So where it draws the CPU's random numbers results are equal,
up to rounding at most, and where a tensor was left on the CPU there is an error in their place.
"""

import copy
import io
from pathlib import Path

import pretend
import pytest
import torch
import torch.nn.functional as F
from pretend import is_here
from test_hypergradient import FIELDS, SOLVERS, UNROLLS, carried_state, errors, network, run
from tools import TINY, Toy, flat, main_in, options, strict_json

import metapt
from metapt import Solver, Unroll

DEVICE = pretend.make_device()
CPU = torch.device("cpu")

pytestmark = pytest.mark.filterwarnings("ignore:‖Hq − v‖", "ignore:the solver met")


@pytest.fixture
def draws_of_cpu(monkeypatch):
    """The device draws from the CPU's generator, so that a run there has the CPU's numbers."""
    module = torch.get_device_module(DEVICE)
    monkeypatch.setattr(module, "default_generators", [torch.default_generator])


# The device itself


def cases_of(x, y):
    """What CUDA refuses, where x [3, 3] lies on the device and y on the CPU."""
    number = torch.tensor(1.0)
    rows = torch.tensor([0, 1, 2])
    return {
        "add": lambda: x + y,
        "add to the CPU's": lambda: y.add_(x),
        "add to a number of the CPU's": lambda: number.add_(x[0, 0]),
        "matmul": lambda: x @ y,
        "cat": lambda: torch.cat([x, y]),
        "stack": lambda: torch.stack([x[0, 0], number]),
        "where": lambda: torch.where(y > 0, x, x),
        "conv2d": lambda: F.conv2d(x[None, None], y[None, None]),
        "cross_entropy": lambda: F.cross_entropy(x, rows),
        "embedding": lambda: F.embedding(rows, x),
        "index_add": lambda: x.index_add(0, rows, x),
        "index of the CPU's": lambda: y[rows.to(DEVICE)],
        "index_put": lambda: x.index_put((rows,), y),
        "generator": lambda: torch.randn(3, device=DEVICE, generator=torch.Generator()),
        "numpy": lambda: x.numpy(),
    }


@pytest.mark.parametrize("name", cases_of(torch.empty(3, 3), torch.empty(3, 3)))
def test_the_device_refuses_what_cuda_refuses(name):
    y = torch.eye(3)
    with pytest.raises((RuntimeError, TypeError), match=r"pretend|same device"):
        cases_of(y.to(DEVICE), y)[name]()
    cases_of(y.clone(), y)["add"]()  # the CPU's own are not in its way


def test_the_device_takes_what_cuda_takes():
    x = torch.randn(3, 3)
    on_device = x.to(DEVICE)
    rows = torch.tensor([0, 2])
    assert (on_device * torch.tensor(2.0)).cpu().equal(2 * x)
    assert on_device[rows].cpu().equal(x[rows])
    assert on_device[x > 0].cpu().equal(x[x > 0])
    assert (torch.arange(5, device=DEVICE) % 3).tolist() == [0, 1, 2, 0, 1]
    assert repr(on_device).endswith("device='pretend:0')")


def test_views_share_their_memory_and_gradients_go_through_them():
    slopes = []
    for device in (CPU, DEVICE):
        torch.manual_seed(0)
        x = torch.randn(4, 3).to(device)
        view = x.detach().t()[1:]
        view.mul_(3)
        assert x[0, 1].equal(view[0, 0])
        p = x.clone().requires_grad_()
        twice = p.exp() * p.unfold(0, 2, 1).sum()
        twice[1:].mul_(2)
        (slope,) = torch.autograd.grad(twice.sum(), p, create_graph=True)
        (again,) = torch.autograd.grad(slope.square().sum(), p)
        slopes.append((slope.detach().cpu(), again.cpu()))
    for here, there in zip(*slopes, strict=True):
        assert here.equal(there)
    assert copy.deepcopy(x).device == x.device


# The core


@pytest.mark.parametrize("unroll, carried", [p for p in UNROLLS if p.id == "adam-all-K3-carried"])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("hvp, tolerance", [("exact", 1e-9), ("finite", 1e-6)])
def test_hypergradients_are_those_of_the_cpu(draws_of_cpu, unroll, carried, solver, hvp, tolerance):
    found = {}
    for device in (CPU, DEVICE):
        problem = network(torch.float64, dropout=0.2, device=device)
        torch.manual_seed(1)
        ft_state = carried_state(problem, unroll, carried)
        of_solver = Solver(**solver, hvp=hvp)
        found[device] = run(problem, unroll=unroll, solver=of_solver, ft_state=ft_state)
    here = found[DEVICE]
    fields = {field: getattr(here, field) for field in FIELDS}
    assert all(is_here(t) for tensors in fields.values() for t in tensors.values())
    brought = {field: on_cpu(tensors) for field, tensors in fields.items()}
    here = here._replace(**brought, value=here.value.cpu())
    assert all(e < tolerance for e in errors(here, found[CPU]).values())


def on_cpu(tensors):
    return {name: t.cpu() for name, t in tensors.items()}


def replayed() -> tuple[float, bool]:
    """How far products by differences are from exact ones where dropout draws on the device.

    Returns:
        The largest relative difference, and whether both generators stand where one pass of each
        loss leaves them.
    """
    problem = network(torch.float64, dropout=0.5, device=DEVICE)
    unroll = Unroll(2, 0.1, scope="all")
    of_device = torch.get_device_module(DEVICE).default_generators[0]
    found = {}
    states = []
    for hvp in ("exact", "finite"):
        torch.manual_seed(91)
        found[hvp] = run(problem, unroll=unroll, solver=Solver("cg", 4, damping=0.5, hvp=hvp))
        states.append((torch.get_rng_state(), of_device.get_state()))
    torch.manual_seed(91)
    before = of_device.get_state()
    problem.finetune_loss(problem.theta, problem.psi)  # one loss for all steps: one pass
    problem.validation_loss(problem.theta, problem.psi)
    problem.pretrain_loss(problem.theta, problem.phi)
    assert not of_device.get_state().equal(before)
    on_cpu = torch.get_rng_state()
    on_device = of_device.get_state()
    left = all(cpu.equal(on_cpu) and own.equal(on_device) for cpu, own in states)
    return max(errors(found["finite"], found["exact"]).values()), left


def test_random_numbers_of_the_device_are_replayed(monkeypatch):
    difference, left = replayed()
    assert difference < 1e-6
    assert left
    monkeypatch.setattr(metapt, "_generators", lambda device: [torch.default_generator])
    difference, left = replayed()  # the device's are forgotten
    assert difference > 1e-3
    assert not left


def test_a_number_of_the_core_on_the_cpu_is_found(monkeypatch):
    problem = network(device=DEVICE)
    solver = Solver("nystrom", 5, damping=0.5)
    run(problem, solver=solver)
    monkeypatch.setattr(
        metapt, "_normal", lambda *shape, like, seed: torch.ones(shape, dtype=like.dtype)
    )
    with pytest.raises(RuntimeError, match="pretend|same device"):
        run(problem, solver=solver)


# Algorithm 1 and FT


def toy_training(device: torch.device, **given) -> metapt.Training:
    domain = Toy(Toy.Settings(**given), device, Path("data"))
    return metapt.Training(domain, learn=True)


def test_a_checkpoint_goes_on_to_the_same_end_on_any_device(draws_of_cpu, monkeypatch):
    monkeypatch.setattr(metapt, "CHECKPOINT_EVERY", 2)
    stored = []

    def store(training):
        stored.append(metapt.saved_bytes(training.state_dict()))

    ended = toy_training(DEVICE).run(on_checkpoint=store)
    for device in (DEVICE, CPU):
        state = torch.load(io.BytesIO(stored[0]), map_location="cpu", weights_only=True)
        training = toy_training(device)
        training.load_state_dict(state)
        assert 0 < training.step < ended.step
        training.run()
        for module, expected in ((training.network, ended.network), (training.meta, ended.meta)):
            assert flat(module).device.type == device.type
            assert flat(module).cpu().equal(flat(expected).cpu())


SHORT = {"steps": 12, "warmup": 4, "batch_size": 16, "meta_batch_size": 16, "sizes": "30"}
WAYS = {
    "as it is": {},
    "everything moves": {
        "solver": "identity",
        "preconditioner": "adam",
        "hvp": "finite",
        "unroll_steps": 2,
        "unroll_scope": "all",
        "measure_scope": "all",
        "rounds": 2,
        "validate_on": "all",
    },
}


@pytest.mark.parametrize("way", WAYS)
def test_commands_on_a_device_end_as_on_the_cpu(draws_of_cpu, monkeypatch, tmp_path, way):
    given = {**TINY["digits-rotation"], **SHORT, **WAYS[way]}
    knobs = metapt.knobs_of(metapt.DigitsRotationSettings)
    measuring = {name: x for name, x in given.items() if knobs[name].group == metapt.MEASURING}
    commands = {
        "meta": ["meta", "digits-rotation", *options(given)],
        "pretrain": ["pretrain", "digits-rotation", "--phi=meta", *options(measuring)],
        "finetune": ["finetune", "meta"],
        "eval": ["eval", "meta", "pretrain"],
    }
    commands["pretrain"].append("--steps=8")
    found = {}
    for device in (CPU, DEVICE):
        monkeypatch.setattr(metapt, "pick_device", lambda name, device=device: device)
        folder = tmp_path / device.type
        folder.mkdir()
        for name, words in commands.items():
            code, _, errors_said = main_in(folder, *words, "--out", name)
            assert code == 0, errors_said
        summaries = [folder / name / "summary.json" for name in commands]
        found[device] = [strict_json(path.read_text()) for path in summaries]
    assert without_device(found[DEVICE]) == without_device(found[CPU])


def without_device(found):
    """The same without the clocks and without the device's name."""
    if isinstance(found, dict):
        left_out = ("device", "seconds", "training_seconds")
        return {name: without_device(x) for name, x in found.items() if name not in left_out}
    if isinstance(found, list | tuple):
        return [without_device(x) for x in found]
    return found


class Careless(metapt.DigitsRotation):
    """Its labels are smoothed by a tensor that is made without `device=`."""

    def pretrain_loss(self, network, meta, index, progress, live):
        loss = super().pretrain_loss(network, meta, index, progress, live)
        return lambda theta, phi: loss(theta, phi) * torch.ones(1).add(0).mean(0, keepdim=True)


def test_a_tensor_without_a_device_is_found():
    settings = Careless.Settings(**TINY["digits-rotation"])
    metapt.Training(Careless(settings, CPU, Path("data")), learn=True)
    with pytest.raises(RuntimeError, match="pretend|same device"):
        metapt.Training(Careless(settings, DEVICE, Path("data")), learn=True)
