"""A pretend device: what otherwise a GPU alone would show of tensors on the wrong device.

Its tensors lie in the CPU's memory, and the CPU's kernels compute its numbers. To torch it is a
device of its own, of the kind that is kept for makers of hardware: as CUDA does it refuses to work
on tensors of the CPU, has random numbers of its own, runs backward passes in a thread of its own,
and gives numpy nothing.

    device = make_device()               # before the first backward pass of the process
    torch.zeros(3, device=device)

Autograd counts the devices once in a process, and a process that has several cannot be forked. So
tests on it run in a process of their own, by `run_in_own_process`.

It does not show what an operation lacks or rounds on a GPU, nor memory, time, waits and autocast. A
hook of saved tensors that raises in a backward pass ends the process here.
"""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.utils import backend_registration

NAME = "pretend"
# Operations that read no number: the CPU's kernels make tensors of whatever device the memory has.
OF_MEMORY = ("aten::as_strided", "aten::set_")
# Operations that torch would divide, on a device it does not know, into parts that nobody has.
WHOLE = ("convolution", "convolution_backward", "copy_")
# CUDA, too, takes their indices from the CPU.
INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")

cpu_kernels = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
clone_elsewhere = torch.UntypedStorage.clone
libraries = []  # what they register is there as long as they live


class DeviceModule(backend_registration._DummyBackendModule):
    """What torch.cuda is to CUDA."""

    def __init__(self):
        # A test that wants the CPU's random numbers puts torch.default_generator in its place.
        self.default_generators = [torch.Generator()]

    def manual_seed_all(self, seed: int) -> None:
        self.default_generators[0].manual_seed(seed)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def make_device() -> torch.device:
    """Makes the device known to torch: once in a process."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, DeviceModule())
    of_all = torch.library.Library("_", "IMPL")
    of_all.fallback(run, "PrivateUse1")
    of_aten = torch.library.Library("aten", "IMPL")
    for name in WHOLE:
        operation = getattr(torch.ops.aten, name).default
        of_aten.impl(name, kernel_of(operation), "PrivateUse1")
    libraries.extend([of_all, of_aten])
    torch.UntypedStorage.clone = clone
    return torch.device(NAME)


def kernel_of(operation):
    def kernel(*args, **options):
        return run(operation, *args, **options)

    return kernel


def run(operation, *args, **options):
    """Runs an operation on tensors of the device: on the CPU, on the same memory."""
    schema = operation._schema
    if schema.name in OF_MEMORY:
        return operation.redispatch(cpu_kernels, *args, **options)
    if schema.name != "aten::copy_":
        refuse_others(schema, args, options)
    own = {}  # a tensor on the CPU and the one of the device that it stands for, by the first's id
    memories = {}  # of the device, by the address of what they are to the CPU

    def there(x):
        if isinstance(x, list | tuple):
            return [there(part) for part in x]
        if isinstance(x, torch.device):
            return torch.device("cpu")
        if not is_here(x):
            return x
        t = on_cpu(x)
        own[id(t)] = (t, x)
        memories[t.untyped_storage()._cdata] = x.untyped_storage()
        return t

    def back(t):
        if isinstance(t, list | tuple):
            return type(t)(back(part) for part in t)
        if id(t) in own:
            return own[id(t)][1]
        if not isinstance(t, Tensor) or any(t is x for x in args):
            return t
        memory = memories.get(t.untyped_storage()._cdata)
        return laid_over(memory or memory_here(t.untyped_storage()), t)

    draws = torch.Tag.nondeterministic_seeded in operation.tags
    pairs = zip(schema.arguments, args, strict=False)
    if any(str(a.type) == "Tensor" and not isinstance(x, Tensor) for a, x in pairs):
        # Torch hands the 8 of `x % 8` over as a number: there is another overload for that.
        operation = operation.overloadpacket
    with own_random_numbers(draws):
        result = operation(*there(args), **{name: there(x) for name, x in options.items()})
    for t, x in own.values():
        if t.shape != x.shape:  # as that of an empty `out`
            laid_over(memory_here(t.untyped_storage()), t, x)
    return back(result)


def refuse_others(schema, args: tuple, options: dict) -> None:
    """RuntimeError where CUDA would not work on such tensors of the CPU, or with such a generator.

    Of the CPU it reads tensors without dimensions, which are one number, and indices.
    """
    problem = f"{schema.name} on the device {NAME}"
    if schema.is_mutable and isinstance(args[0], Tensor) and not is_here(args[0]):
        raise RuntimeError(f"{problem}: the result is to be on the {args[0].device}")
    if schema.name in INDEXING and is_here(args[0]):
        args = args[2:]
    for value in [*args, *options.values()]:
        for x in value if isinstance(value, list | tuple) else [value]:
            of_cpu = isinstance(x, Tensor) and x.dim() > 0 and not is_here(x)
            if of_cpu or isinstance(x, torch.Generator):
                raise RuntimeError(f"{problem}: a {type(x).__name__} of the {x.device}")


def is_here(x) -> bool:
    return isinstance(x, Tensor) and x.device.type == NAME


def on_cpu(x: Tensor) -> Tensor:
    """A tensor of the CPU with the memory of one of the device."""
    memory = x.untyped_storage().on_cpu
    empty = torch.empty(0, dtype=x.dtype)
    return empty.set_(memory, x.storage_offset(), x.size(), x.stride())


def memory_here(on_cpu: torch.UntypedStorage) -> torch.UntypedStorage:
    """Memory of the CPU as memory of the device."""
    place = on_cpu.data_ptr()
    device = torch.device(NAME, 0)
    memory = torch._C._construct_storage_from_data_pointer(place, device, on_cpu.nbytes())
    memory.on_cpu = on_cpu  # which has to live as long
    return memory


def clone(memory: torch.UntypedStorage) -> torch.UntypedStorage:
    """In place of UntypedStorage.clone: torch would allocate, which this device cannot."""
    if memory.device.type != NAME:
        return clone_elsewhere(memory)
    return memory_here(clone_elsewhere(memory.on_cpu))


def laid_over(memory: torch.UntypedStorage, t: Tensor, x: Tensor | None = None) -> Tensor:
    """A tensor of the device, x or a new one, with this memory and the sizes of t."""
    if x is None:
        x = torch._C._acc.create_empty_tensor((), t.dtype)
    lay = torch.ops.aten.set_.source_Storage_storage_offset
    return lay.redispatch(cpu_kernels, x, memory, t.storage_offset(), t.size(), t.stride())


@contextlib.contextmanager
def own_random_numbers(draws: bool):
    """Within this the CPU's generator stands where the device's does, if an operation draws."""
    generator = torch.get_device_module(NAME).default_generators[0]
    if not draws or generator is torch.default_generator:
        yield
        return
    state_of_cpu = torch.get_rng_state()
    torch.set_rng_state(generator.get_state())
    try:
        yield
    finally:
        generator.set_state(torch.get_rng_state())
        torch.set_rng_state(state_of_cpu)


def run_in_own_process(path: Path) -> None:
    """Runs the tests of a file in a process of their own. All of them have to pass."""
    environment = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr
