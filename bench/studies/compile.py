"""What torch.compile gains: PT and meta steps with and without it, and whether numbers stay equal.

    python -m bench.studies.compile --domain ppi      stored in bench/results/compile

What is compiled are the passes of θ's networks in losses. They are compiled as a function of their
parameters: a compiled module could hold on to its own. Second derivatives of compiled code there
are none, so products are finite.
"""

import contextlib
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated
from unittest import mock

import rich.console
import torch
import typer
from torch import Tensor, nn

import metapt
from bench.accuracy.precision import DATA, DEVICE, make
from bench.costs import counting
from bench.stored import RESULTS, save_json

STORED = RESULTS / "compile"
SETTINGS = {"hvp": "finite", "solver": "identity", "damping": 0.0, "warmup": 0}
console = rich.console.Console(width=140)

# As it is: `compiling` replaces it in torch.func.
functional_call = torch.func.functional_call


@functools.cache
def compiled_call() -> Callable:
    """torch.func.functional_call, compiled."""
    # Several passes of one graph share what was saved for backward.
    torch._functorch.config.donated_buffer = False
    # There is a code for each set of what has a gradient, each mode and kind of size.
    torch._dynamo.config.recompile_limit = 64

    def run(module: nn.Module, tensors: metapt.Params, inputs: tuple, options: dict | None):
        return functional_call(module, tensors, inputs, options, tie_weights=False)

    # Dropout draws as it does without compiling.
    return torch.compile(run, options={"fallback_random": True})


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Within this, passes of networks whose attribute `compiled` is true are compiled."""

    def call(module, tensors, inputs=(), options=None, **others):
        if getattr(module, "compiled", False):
            return compiled_call()(module, tensors, inputs, options)
        return functional_call(module, tensors, inputs, options, **others)

    with mock.patch.object(torch.func, "functional_call", call):
        yield


def hypergradient(training: metapt.Training) -> metapt.Hypergradient:
    """Where a training stands, with finite products, on its first examples."""
    domain = training.domain
    settings = training.settings

    def first(part: str, count: int) -> Tensor:
        return torch.arange(min(count, domain.sizes[part]))

    pretrain_index = first("pretrain", settings.meta_batch_size)
    finetune_index = first("finetune", settings.unroll_batch_size)
    validation_index = first("validation", settings.validation_batch_size)
    network = training.network
    torch.manual_seed(0)
    domain.begin_episode(training.meta)
    return metapt.hypergradient(
        domain.pretrain_loss(network, training.meta, pretrain_index, 1.0, live=False),
        domain.finetune_loss(network, training.head, "finetune", finetune_index),
        domain.finetune_loss(network, training.head, "validation", validation_index),
        training.theta(),
        training.psi,
        metapt.detached(training.meta),
        unroll=settings.unroll,
        solver=settings.inverse,
    )


def pretrain_gradient(training: metapt.Training) -> tuple[Tensor, metapt.Params]:
    """L_PT and its gradient by θ, on the first examples."""
    domain = training.domain
    index = torch.arange(min(training.settings.batch_size, domain.sizes["pretrain"]))
    theta = {name: p.detach().clone().requires_grad_() for name, p in training.theta().items()}
    torch.manual_seed(0)
    domain.begin_episode(training.meta)
    loss = domain.pretrain_loss(training.network, training.meta, index, 1.0, live=False)
    value = loss(theta, metapt.detached(training.meta)).sum()
    return value.detach(), metapt.gradient(value, theta)


def relative_difference(found: metapt.Params, truth: metapt.Params) -> float:
    """Of all numbers in one vector, in float64."""
    difference = torch.cat([(found[name] - truth[name]).flatten().double() for name in truth])
    size = torch.cat([t.flatten().double() for t in truth.values()])
    return (difference.norm() / size.norm()).item()


def differences(training: metapt.Training) -> dict[str, float]:
    """How far compiling changes L_PT, its gradient and the hypergradient, at one θ."""
    found = {}
    for compiled in (False, True):
        training.network.compiled = compiled
        with compiling():
            found[compiled] = (*pretrain_gradient(training), hypergradient(training).phi)
    plain_loss, plain_gradient, plain_phi = found[False]
    loss, gradient, phi = found[True]
    return {
        "loss_difference": relative_difference({"": loss}, {"": plain_loss}),
        "gradient_difference": relative_difference(gradient, plain_gradient),
        "hypergradient_difference": relative_difference(phi, plain_phi),
    }


def seconds_of_steps(
    domain: metapt.Domain, repeats: int
) -> tuple[dict[tuple[str, bool], float], float]:
    """The median of a PT and a meta step, plain and compiled, in turn in one run.

    Returns:
        Seconds by step and whether it was compiled, and those of the first two, which compile.
    """
    from torch._inductor.utils import fresh_cache  # which takes seconds to import

    works = {}
    for compiled in (False, True):
        training = metapt.Training(domain, learn=True)
        training.network.compiled = compiled
        domain.begin_episode(training.meta)
        works["pt_step", compiled] = training.pretrain_step
        works["meta_step", compiled] = training.meta_step
    with compiling():
        began = time.perf_counter()
        # As if nothing had been compiled here before.
        with fresh_cache():
            works["pt_step", True]()
            works["meta_step", True]()
        first = time.perf_counter() - began
        taken = counting.in_turn(works, repeats, domain.device)
    return {key: statistics.median(seconds) for key, seconds in taken.items()}, first


def measured(domain: metapt.Domain, repeats: int) -> dict[str, float]:
    """Seconds plain and compiled, what compiling gains, and how far it changes numbers."""
    taken, first = seconds_of_steps(domain, repeats)
    row = {"first_steps_compiled_seconds": first}
    for step in ("pt_step", "meta_step"):
        plain = taken[step, False]
        compiled = taken[step, True]
        row[f"{step}_seconds"] = plain
        row[f"{step}_compiled_seconds"] = compiled
        row[f"{step}_gain"] = plain / compiled
    return row | differences(metapt.Training(domain, learn=True))


def main(
    domain: Annotated[str, typer.Option(help="Its name")] = "digits-rotation",
    repeats: Annotated[int, typer.Option(help="Steps of each kind that are timed, in turn")] = 20,
    device: DEVICE = "cpu",
    data: DATA = Path("data"),
):
    """Seconds of a PT and a meta step (q = v, finite products), with torch.compile and without."""
    from torch._dynamo.exc import BackendCompilerFailed

    made = make(domain, data, device, **SETTINGS)
    try:
        found = measured(made, repeats)
    except BackendCompilerFailed as error:
        reason = str(error.inner_exception).partition("\n")[0]
        console.print(f"torch.compile: {reason}")
        raise typer.Exit(1) from None
    row = {
        "domain": domain,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": device,
        "repeats": repeats,
        "settings": dataclasses.asdict(made.settings),
        **found,
    }
    save_json(STORED / f"compile-{domain}-{device}.json", row)
    console.print(row)


if __name__ == "__main__":
    typer.run(main)
