"""What a piece of work costs, counted: FLOPs of matrix products and convolutions, and bytes saved for backward."""

import contextlib
from typing import ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

# Of a symmetric eigendecomposition with its vectors (Golub and Van Loan, "Matrix Computations", section 8.3).
EIGENVECTORS = {torch.ops.aten._linalg_eigh: lambda shape, *_, **__: 9 * shape[-1] ** 3}


def flops(work) -> int:
    """Floating-point operations of `work()`: two a multiplication and addition, elementwise work not counted."""
    counter = FlopCounterMode(display=False, custom_mapping=EIGENVECTORS)
    counter.mod_tracker = _Everything()  # the tracker of modules hooks tensors, which fails on a module fed a parameter
    with counter:
        work()
    return counter.get_total_flops()


class _Everything(contextlib.nullcontext):
    parents: ClassVar = {"Global"}


class _Operations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.count += 1
        return function(*arguments, **(options or {}))


def operations(work) -> int:
    """Calls of ATen operations by `work()`, elementwise ones and copies included: what FLOPs do not see."""
    with _Operations() as counter:
        work()
    return counter.count


class _Saved:
    """One tensor saved for backward; it is taken off the books when the graph lets go of it."""

    def __init__(self, tensor, books):
        # Detached: an operation that saves its own output would otherwise be held by it for ever. Autograd puts the
        # history back when it unpacks.
        self.tensor, self.key, self.books = tensor.detach(), tensor.untyped_storage().data_ptr(), books
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

    Leaves are not counted: parameters, and data. With `data` those without a gradient are: an input of the network is
    saved for the gradient of its first weights, and would be counted if it had a gradient itself; but so are the
    moved copies of parameters in passes that do not differentiate by them.
    """
    books, most = {}, 0

    def pack(tensor):
        nonlocal most
        base = tensor if tensor._base is None else tensor._base
        if base.is_leaf and (base.requires_grad or not data):  # there whether or not anything is saved
            return tensor
        saved = _Saved(tensor, books)
        most = max(most, sum(size for _, size in books.values()))
        return saved

    with torch.autograd.graph.saved_tensors_hooks(
        pack, lambda saved: saved.tensor if isinstance(saved, _Saved) else saved
    ):
        work()
    return most
