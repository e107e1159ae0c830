"""What a piece of work costs, counted: FLOPs of matrix products and convolutions, bytes saved for
backward, and how often an accelerator would have to be waited for.
"""

import contextlib
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

# Of a symmetric eigendecomposition with its vectors (Golub and Van Loan, "Matrix Computations",
# section 8.3).
EIGENVECTORS = {torch.ops.aten._linalg_eigh: lambda shape, *_, **__: 9 * shape[-1] ** 3}


def _attention(query, key, value, *_, **__) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(gradient, query, key, value, *_, **__) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


# torch's counter knows the fused kernels of CUDA alone. A causal mask saves nothing in either.
ATTENTION_ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def flops(work) -> int:
    """Floating-point operations of `work()`: two a multiplication and addition, elementwise work
    not counted.
    """
    counter = FlopCounterMode(display=False, custom_mapping=EIGENVECTORS | ATTENTION_ON_CPU)
    # The tracker of modules hooks tensors, which fails on a module fed a parameter
    counter.mod_tracker = _Everything()
    with counter:
        work()
    return counter.get_total_flops()


class _Everything(contextlib.nullcontext):
    parents: ClassVar = {"Global"}


class _Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.found[function._schema.name] += 1
        return function(*arguments, **(options or {}))


def operations(work) -> int:
    """Calls of ATen operations by `work()`, elementwise ones and copies included: what FLOPs do not
    see.
    """
    return operations_by_name(work).total()


def operations_by_name(work) -> Counter:
    """The same by the operation's name, such as "aten::detach"."""
    with _Operations() as counter:
        work()
    return counter.found


# What brings a number or a shape from the device to the host, by ATen operation: bool(t), int(t)
# and t.item() are the first.
WAITING = {
    "aten::_local_scalar_dense",
    "aten::equal",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::bincount",
    "aten::_linalg_check_errors",
}
COPYING = {"cpu", "tolist", "cuda"}  # methods of a tensor
TORCH = str(Path(torch.__file__).parent)


class _OfATen(TorchDispatchMode):
    def __init__(self, found: Counter):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options, name = options or {}, function._schema.name
        masks = (
            [i for i in arguments[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            if (name in ("aten::index", "aten::index_put", "aten::index_put_"))
            else []
        )
        counted = name == "aten::repeat_interleave" and options.get("output_size") is None
        on_host = name == "aten::_local_scalar_dense" and getattr(
            arguments[0], "made_on_host", False
        )
        if (name in WAITING or masks or counted) and not on_host:
            _note(self.found, name)
        return function(*arguments, **options)


class _OfPython(TorchFunctionMode):
    """What ATen does not see on a CPU: copies between it and itself."""

    def __init__(self, found: Counter):
        super().__init__()
        self.found = found

    def __torch_function__(self, function, types, arguments=(), options=None):
        options, name = options or {}, getattr(function, "__name__", "")
        of_tensor = bool(arguments) and isinstance(arguments[0], torch.Tensor)
        devices = [
            a for a in (*arguments[1:], options.get("device")) if isinstance(a, torch.device | str)
        ]
        sent = name == "to" and devices and not options.get("non_blocking")
        made = name in ("tensor", "as_tensor") and options.get("device") is not None
        if (name in COPYING and of_tensor) or sent or made:
            _note(self.found, name)
            with (
                torch._C.DisableTorchFunction(),
                torch.utils._python_dispatch._disable_current_modes(),
            ):
                return function(*arguments, **options)
        result = function(*arguments, **options)
        if name.startswith("rand") and "device" not in options and not of_tensor:
            result.made_on_host = (
                True  # no device was named: it would be there beside an accelerator as well
            )
        return result


def _note(found: Counter, name: str) -> None:
    """Counts a wait under its place, the innermost line that is not torch's. Optimisers' own counts
    of steps are on the host.
    """
    frame, files = sys._getframe(2), []
    while frame is not None and (not files or files[-1].startswith(TORCH) or files[-1] == __file__):
        files.append(frame.f_code.co_filename)
        place = f"{Path(files[-1]).name}:{frame.f_lineno} {name}"
        frame = frame.f_back
    if not any(file.startswith(f"{TORCH}/optim/") and "swa_utils" not in file for file in files):
        found[place] += 1


def waits(work) -> Counter:
    """How often `work()` would make the host wait for an accelerator, by place: counted on a CPU,
    where nothing waits.

    A wait is a number or a shape that is read from the device (masks as indices, `nonzero` and the
    like among them), or a copy to or from it that is not told to be `non_blocking`.
    """
    found = Counter()
    with _OfPython(found), _OfATen(found):
        work()
    return found


def in_turn(
    works: dict,
    repeats: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[object, list[float]]:
    """Seconds that each of `works` takes, in turn, by its key; the first time, which builds what
    later ones reuse, is left out. On a busy CPU `time.process_time` is the better clock.
    """
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    taken = {key: [] for key in works}
    for _ in range(repeats + 1):
        for key, work in works.items():
            wait()
            begun = clock()
            work()
            wait()
            taken[key].append(clock() - begun)
    return {key: seconds[1:] for key, seconds in taken.items()}


class _Saved:
    """One tensor saved for backward; it is taken off the books when the graph lets go of it."""

    def __init__(self, tensor, books):
        # Detached: an operation that saves its own output would otherwise be held by it for ever.
        # Autograd puts the history back when it unpacks.
        self.tensor, self.key, self.books = (
            tensor.detach(),
            tensor.untyped_storage().data_ptr(),
            books,
        )
        count, size = books.get(self.key, (0, tensor.untyped_storage().nbytes()))
        books[self.key] = (count + 1, size)

    def __del__(self):
        count, size = self.books[self.key]
        if count == 1:
            del self.books[self.key]
        else:
            self.books[self.key] = (count - 1, size)


def peak(work, data: bool = False) -> int:
    """The most bytes that are saved for backward at one time while `work()` runs.

    Leaves are not counted: parameters, and data. With `data` those without a gradient are: an input
    of the network is saved for the gradient of its first weights, and would be counted if it had a
    gradient itself; but so are the moved copies of parameters in passes that do not differentiate
    by them.
    """
    books, most = {}, 0

    def pack(tensor):
        nonlocal most
        base = tensor if tensor._base is None else tensor._base
        # There whether or not anything is saved
        if base.is_leaf and (base.requires_grad or not data):
            return tensor
        saved = _Saved(tensor, books)
        most = max(most, sum(size for _, size in books.values()))
        return saved

    with torch.autograd.graph.saved_tensors_hooks(
        pack, lambda saved: saved.tensor if isinstance(saved, _Saved) else saved
    ):
        work()
    return most
