"""metapt's commands by several processes, the ranks, which divide every batch between them.

    torchrun --nproc-per-node 4 -m bench.ranks meta digits-rotation
    torchrun --nproc-per-node 4 -m bench.ranks meta --resume runs/meta-digits-rotation

Each rank has the whole data and a copy of θ, ψ and φ. Of a batch it takes a part, and weighs its
loss there with the part's share of the batch: the sum over ranks is then the whole batch's mean,
and so is the sum of whatever is linear in the loss, such as gradients and all products of the
hypergradient. The sums are the same on all ranks, which take the same steps.

What the losses draw, such as dropout and augmentation, each rank draws for itself; all else is
drawn alike. Statistics of BatchNorm are averaged at each PT step. Rank 0 alone writes and prints.

metapt.py knows nothing of this but the keyword `reduce`. `put_in_place` puts what stands here in
place of what it is called there.

Ranks talk by gloo, between GPUs by NCCL, where each rank takes a GPU of its own. They need a file
system that all can read. A program of one's own uses `join`, `rank`, `size`, `sum_over_ranks`,
`gather` and `leave`.
"""

import contextlib
import hashlib
import io
import itertools
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import rich.console
import torch
from torch import Tensor, distributed
from torch.utils._pytree import tree_leaves

import metapt

# As they are for one process: these names of metapt's are replaced below.
from metapt import BadInput, Failed, Loss, Params, noting_signals, pick_device, run_command

# ------------------------------------------------------------------------------------------------
# The ranks, and what they tell each other

# What torchrun's processes share besides; `first_to_end` counts there.
store: distributed.Store | None = None


def join() -> None:
    """Waits for the other processes that torchrun started, and becomes one of the ranks."""
    global store
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    store, rank, size = next(distributed.rendezvous("env://"))
    # A rank may wait as long as another one works: it is torchrun that sees when one has died.
    patience = timedelta(days=1)
    distributed.init_process_group(
        backend, store=store, rank=rank, world_size=size, timeout=patience
    )
    # This is how torchrun ends ranks. They take it for Ctrl-C, which ends in a line of advice.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def rank() -> int:
    return distributed.get_rank()


def size() -> int:
    return distributed.get_world_size()


def leave(status: int) -> None:
    """Ends this process.

    Not as Python does it: the threads of gloo would abort in an interpreter that is being ended.
    """
    if status == 0:
        distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def first_to_end() -> bool:
    """Whether no other rank has asked this before: the first to end has the reason, and says it."""
    # torchrun ends the others as soon as one has ended, perhaps before this one has spoken.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        return store.add("ended", 1) == 1
    except RuntimeError:
        # The process that keeps the store has died.
        return True


def sending():
    """Within this, a message that cannot be sent or does not arrive raises Failed."""
    problem = "a message between ranks failed, as when one has ended"
    return metapt.refusing(problem, (RuntimeError,), Failed)


def sum_over_ranks(tensors: Params) -> Params:
    """The sums of all ranks' tensors, by one message."""
    if not tensors:
        return tensors
    numbers = torch.cat([t.reshape(-1) for t in tensors.values()])
    with sending():
        distributed.all_reduce(numbers)
    pieces = numbers.split([t.numel() for t in tensors.values()])
    return {
        name: piece.view(t.shape).to(t.dtype)
        for (name, t), piece in zip(tensors.items(), pieces, strict=True)
    }


def gather(value) -> list:
    """What each rank calls this with, in their order. No rank goes on before all have called."""
    values = [None] * size()
    with sending():
        distributed.all_gather_object(values, value)
    return values


# ------------------------------------------------------------------------------------------------
# Algorithm 1, divided


class DividedTraining(metapt.Training):
    """Algorithm 1 on this rank's part of each batch.

    Raises:
        BadInput: L_PT is no mean over examples, or a batch has fewer examples than there are ranks.
    """

    reduce = staticmethod(sum_over_ranks)

    def __init__(self, domain: metapt.Domain, learn: bool, phi: dict | None = None):
        if not domain.mean_over_examples:
            kind = type(domain).__name__
            raise BadInput(f"the PT loss of {kind} is no mean over examples: ranks cannot share it")
        super().__init__(domain, learn, phi)
        smallest = min(batches.batch_size for batches in self.batches.values())
        if smallest < size():
            raise BadInput(f"a batch of {smallest} examples cannot be divided over {size()} ranks")
        self.losses_made = 0
        self.optimizer.register_step_pre_hook(self.before_step_of_theta)

    def pretrain_loss(self, batches: str, step: int, live: bool) -> Loss:
        progress = self.progress(step)

        def make(index: Tensor) -> Loss:
            return self.domain.pretrain_loss(self.network, self.meta, index, progress, live)

        return self.share_of_next(batches, make)

    def finetune_loss(self, part: str) -> Loss:
        def make(index: Tensor) -> Loss:
            return self.domain.finetune_loss(self.network, self.head, part, index)

        return self.share_of_next(part, make)

    def share_of_next(self, batches: str, make: Callable[[Tensor], Loss]) -> Loss:
        """What this rank adds to the loss of the next batch: that of its part, times its share."""
        whole = self.batches[batches].next()
        part = whole.tensor_split(size())[rank()]
        share = len(part) / len(whole)

        self.losses_made += 1
        source = np.random.SeedSequence([self.settings.seed, self.losses_made, rank()])
        seed_of_making, seed = (int(number) for number in source.generate_state(2))
        with self.own_random_numbers(seed_of_making):
            loss = make(part)

        def share_of_loss(*params: Params) -> Tensor:
            with self.own_random_numbers(seed):
                return share * loss(*params)

        return share_of_loss

    @contextlib.contextmanager
    def own_random_numbers(self, seed: int) -> Iterator[None]:
        """Within this torch draws by a seed of this rank, and it leaves no trace outside."""
        with torch.random.fork_rng(metapt.random_devices(self.domain)):
            torch.manual_seed(seed)
            yield

    def before_step_of_theta(self, *_) -> None:
        """Sums θ's gradients over the ranks, and averages BatchNorm's running statistics."""
        tensors = {
            f"gradient {name}": p.grad
            for name, p in self.network.named_parameters()
            if p.grad is not None
        }
        for name, buffer in self.network.named_buffers():
            if ".running_" in name:
                tensors[f"statistic {name}"] = buffer.div_(size())
        for name, total in sum_over_ranks(tensors).items():
            tensors[name].copy_(total)

    def pretrain_step(self) -> None:
        super().pretrain_step()
        names = ["pretrain_loss"]
        if self.learn:
            names.append("finetune_loss")
        self.losses |= sum_over_ranks({name: self.losses[name] for name in names})

    def state_dict(self) -> dict:
        own = {"ranks": size(), "losses_made": self.losses_made}
        return super().state_dict() | own

    def load_state_dict(self, state: dict) -> None:
        before = state.get("ranks", 1)
        if before != size() and rank() == 0:
            line = f"ranks: {before} before, {size()} now: the run's numbers will differ"
            print(line, file=sys.stderr)
        self.losses_made = state.get("losses_made", 0)
        # Each rank draws on its own GPU what rank 0 draws on the first.
        on_all = state["cuda_random"][:1] * torch.cuda.device_count()
        super().load_state_dict(state | {"cuda_random": on_all})


def require_alike(training: DividedTraining) -> None:
    """Failed where a rank has another θ, ψ or φ, or another place in the data, than rank 0."""
    state = training.state_dict()
    for name in ("seconds", "cuda_random"):
        del state[name]
    digests = gather({name: digest(value) for name, value in state.items()})
    for other, (name, expected) in itertools.product(range(1, size()), digests[0].items()):
        if digests[other][name] != expected:
            place = f"at PT step {training.step}"
            raise Failed(f"{place} {name} of rank {other} is not that of rank 0")


def digest(value) -> bytes:
    """SHA-256 of the tensors and numbers within dicts, lists and tuples."""
    total = hashlib.sha256()
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor | int | float):
            numbers = torch.as_tensor(leaf).detach().cpu().flatten()
            total.update(numbers.view(torch.uint8).numpy())
    return total.digest()


# ------------------------------------------------------------------------------------------------
# Commands: one folder, one voice, one end


class SharedRun(metapt.Run):
    """The folder of a run of several ranks, where rank 0 alone writes."""

    @classmethod
    def create(cls, folder: Path | None, config: dict) -> "SharedRun":
        """Rank 0 makes the folder; the others learn which it is."""
        if rank() == 0:
            run = super().create(folder, config)
            gather(run.folder)
            return run
        return cls(gather(None)[0])

    def acquire(self) -> "SharedRun":
        return super().acquire() if rank() == 0 else self

    def log(self, row: dict) -> None:
        if rank() == 0:
            super().log(row)

    def save_figure(self, name: str, draw: Callable) -> None:
        if rank() == 0:
            super().save_figure(name, draw)

    def save_checkpoint(self, training: DividedTraining) -> None:
        """No rank goes on, or ends, before the checkpoint is written."""
        require_alike(training)
        super().save_checkpoint(training)
        gather(None)


def write_nothing(path: Path, content: bytes) -> None:
    """In place of metapt.write_whole, on all ranks but rank 0."""


def silent_console(as_json: bool) -> rich.console.Console:
    """In place of metapt.make_console, on all ranks but rank 0."""
    return rich.console.Console(quiet=True)


def refuse_jobs(jobs: int | None) -> None:
    """In place of metapt.require_jobs, which is asked before anything is done."""
    if jobs is not None:
        raise BadInput("--jobs is for one process; ranks divide the comparison by themselves")


def measure_in_turn(
    domain: metapt.Domain,
    cells: list[metapt.Cell],
    jobs: int | None,
    advance: Callable[[], None],
) -> list[metapt.Measured]:
    """metapt.measure_cells, where each rank measures when it is its turn.

    The networks are made by all ranks together, since it may be PT that makes them.
    """
    own = []
    for number, cell in enumerate(cells):
        network = metapt.make_network(domain, cell.method, cell.seed)
        its_turn = number % size() == rank()
        own.append(metapt.measure_network(domain, network, cell) if its_turn else None)
        advance()
    everyone = gather(own)
    return [everyone[number % size()][number] for number in range(len(cells))]


class AskedOfAny:
    """An event that is set for all ranks as soon as it is set for one."""

    def __init__(self, event: threading.Event):
        self.event = event

    def is_set(self) -> bool:
        here = torch.tensor(float(self.event.is_set()))
        return bool(sum_over_ranks({"": here})[""])


@contextlib.contextmanager
def noting_signals_of_all() -> Iterator[AskedOfAny]:
    """metapt.noting_signals for ranks, which a signal reaches at different steps, or one alone."""
    with noting_signals() as asked_to_stop:
        yield AskedOfAny(asked_to_stop)


def pick_own_device(name: str) -> torch.device:
    device = pick_device(name)
    if device.type == "cuda":
        crowded = int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count()
        if crowded or device.index is not None:
            raise BadInput(f"--device {name}: each rank takes a GPU of its own, by itself")
    return device


def run_command_as_one(words: list[str]) -> tuple[int, str]:
    """metapt.run_command, of whose message one rank alone speaks: the first to end."""
    try:
        if words[:1] == ["download"]:
            status = 2
            message = f"download needs no ranks: python metapt.py {' '.join(words)}"
        else:
            status, message = run_command(words)
    except Exception:
        if first_to_end():
            raise
        return 1, ""
    if status != 0 and not first_to_end():
        message = ""
    return status, message


def put_in_place() -> None:
    """From here on metapt's commands are those of several ranks."""
    metapt.Training = DividedTraining
    metapt.Run = SharedRun
    metapt.require_jobs = refuse_jobs
    metapt.measure_cells = measure_in_turn
    metapt.noting_signals = noting_signals_of_all
    metapt.pick_device = pick_own_device
    metapt.run_command = run_command_as_one
    here = os.environ.get("LOCAL_WORLD_SIZE", size())
    metapt.PROGRAM = f"torchrun --nproc-per-node {here} -m bench.ranks"
    if rank() > 0:
        metapt.write_whole = write_nothing
        metapt.make_console = silent_console
        warnings.simplefilter("ignore")
        sys.stdout = io.StringIO()


def main() -> None:
    if not distributed.is_torchelastic_launched():
        line = "start it with: torchrun --nproc-per-node N -m bench.ranks COMMAND ..."
        print(f"metapt: {line}", file=sys.stderr)
        sys.exit(2)
    join()
    if size() > 1:
        put_in_place()
    try:
        metapt.main()
    except SystemExit as ended:
        status = ended.code
    except Exception:
        traceback.print_exc()
        status = 1
    leave(status)


if __name__ == "__main__":
    main()
