"""One product of tensors over storages of every kind, compared with torch: the child program of test_memory_fuzz.py.

A case is plain data, so that whoever reads a failure can rebuild it:

    entry, route      "addmm" as a "function" of matmul_grad, as an "operator", or torch's under the "switch"
    into              "new", "out", "self" (in place), or the index of the operand that is out itself
    tensors           shape, stride, offset and storage of each, in the order of the call, then of out
    storages          kind, and of a "small" one how many elements it lacks
    gradient          "" or "whole"; "freed": the operands' storages are freed before the backward
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import signal
import tempfile
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from case_process import serve
from torch import Tensor

import matmul_grad

PAGE, PAGES = mmap.PAGESIZE, 8
ADDS = ("addmm", "baddbmm", "addmv")  # take an input first, beta and alpha
OVERRIDDEN = ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv")  # with a form that writes to out
TORCHS = {"linear": torch.nn.functional.linear}
Case = dict[str, Any]


class Storage:
    """Memory for ``count`` elements, small integers in those that ``used`` marks and NaN in the rest."""

    def __init__(self, kind: str, used: Tensor, dtype: torch.dtype, seed: int) -> None:
        count = used.numel()
        values = ((torch.arange(count) * 7 + 3 * seed) % 5 - 2).to(dtype)
        self.kind, self.before = kind, torch.where(used, values, float("nan"))
        self.source: Tensor | None = None
        make = getattr(self, f"_{kind}", self._plain) if count else self._plain
        self.base: Tensor = make(self.before)

    def _plain(self, values: Tensor) -> Tensor:
        return values.clone()

    def _cow(self, values: Tensor) -> Tensor:
        self.source = values.clone()
        return torch._lazy_clone(self.source)

    def _guarded(self, values: Tensor) -> Tensor:
        """The last element ends where a page begins that cannot be read."""
        memory = mmap.mmap(-1, (PAGES + 1) * PAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        size = values.numel() * values.element_size()
        assert size <= PAGES * PAGE
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + PAGES * PAGE), ctypes.c_size_t(PAGE), 0) == 0
        base = torch.frombuffer(memory, dtype=values.dtype, count=values.numel(), offset=PAGES * PAGE - size)
        return base.copy_(values)

    def _readonly(self, values: Tensor) -> Tensor:
        array = values.view(torch.uint8).numpy().copy()
        array.flags.writeable = False
        return torch.from_numpy(array).view(values.dtype)

    def _mapped(self, values: Tensor) -> Tensor:
        with tempfile.NamedTemporaryFile() as file:
            file.write(values.view(torch.uint8).numpy().tobytes())
            file.flush()
            return torch.from_numpy(np.memmap(file.name, np.uint8, "r")).view(values.dtype)

    def shrink(self, lacking: int) -> None:
        """Once the views exist: free it, or take the last elements away."""
        if self.kind in ("freed", "small"):
            kept = 0 if self.kind == "freed" else max(0, self.base.numel() - lacking)
            self.base.untyped_storage().resize_(kept * self.base.element_size())

    def now(self) -> Tensor:
        """All elements that it holds, read without a copy-on-write."""
        memory = self.base.untyped_storage()
        return torch.empty(0, dtype=self.base.dtype).set_(memory, 0, (memory.nbytes() // self.base.element_size(),))


def reach(tensor: dict[str, Any]) -> int:
    """How many elements its storage has to hold."""
    if 0 in tensor["shape"]:
        return 0
    return tensor["offset"] + sum((n - 1) * step for n, step in zip(tensor["shape"], tensor["stride"])) + 1


class Built:
    """A case's tensors, and what they lie in."""

    def __init__(self, case: Case) -> None:
        dtype, into, self.described = getattr(torch, case["dtype"]), case["into"], case["tensors"]
        self.storages = [
            Storage(storage["kind"], self._used(case, i), dtype, i) for i, storage in enumerate(case["storages"])
        ]
        self.tensors = [
            self.storages[x["storage"]].base.as_strided(x["shape"], x["stride"], x["offset"]) for x in self.described
        ]
        for storage, asked in zip(self.storages, case["storages"], strict=True):
            storage.shrink(asked.get("lacking", 0))
        self.held = held = [x.base.untyped_storage().nbytes() // x.base.element_size() for x in self.storages]
        self.usable = [reach(x) <= held[x["storage"]] for x in self.described]
        self.of_out = {"new": None, "out": len(self.tensors) - 1, "self": 0}.get(into, into)
        self.out = None if self.of_out is None else self.tensors[self.of_out]
        self.operands = self.tensors[:-1] if into == "out" else self.tensors

    def _used(self, case: Case, storage: int) -> Tensor:
        """Which elements of a storage the operands reach."""
        mine = [x for x in self.described if x["storage"] == storage]
        used = torch.zeros(max(map(reach, mine), default=0), dtype=torch.bool)
        for x in mine:
            if reach(x) and not (case["into"] == "out" and x is self.described[-1]):
                used.as_strided(x["shape"], x["stride"], x["offset"]).fill_(True)
        return used

    def values(self) -> list[Tensor]:
        """The operands in float64, each in memory of its own; of one that cannot be read zeros."""
        return [
            x.to(torch.float64, copy=True) if usable else torch.zeros(x.shape, dtype=torch.float64)
            for x, usable in zip(self.operands, self.usable)
        ]

    def assert_only_out_written(self, written: bool, is_resized: bool = False) -> None:
        """Every storage holds what it held but for out's elements, and what is copy-on-write is so still.

        Not that of an out which torch resizes before it looks at the other sizes, as its matmul does.
        """
        for i, storage in enumerate(self.storages):
            is_outs = written and self.of_out is not None and self.described[self.of_out]["storage"] == i
            now = storage.now()
            held = min(now.numel(), storage.before.numel(), self.held[i])  # what grows begins as anything
            differs = ~same(now[:held], storage.before[:held])
            if is_outs:
                assert self.out is not None
                lies = {"shape": self.out.shape, "stride": self.out.stride(), "offset": self.out.storage_offset()}
                mine = torch.zeros(max(now.numel(), reach(lies)), dtype=torch.bool)
                if self.out.numel():
                    mine.as_strided(lies["shape"], lies["stride"], lies["offset"]).fill_(True)
                differs &= ~mine[:held]
            assert not differs.any(), f"storage {i} was written at {differs.nonzero().flatten().tolist()}"
            if storage.source is not None:
                assert bool(same(storage.source, storage.before).all()), f"the origin of storage {i} was written"
                resized = is_resized and self.of_out is not None and self.described[self.of_out]["storage"] == i
                if not is_outs and not resized:
                    assert torch._C._is_cow_tensor(storage.base), f"storage {i} is no longer copy-on-write"


def same(x: Tensor, y: Tensor) -> Tensor:
    return (x == y) | (x.isnan() & y.isnan())


def call(case: Case, built: Built, theirs: bool) -> Any:
    """The case's call, by torch or by this package."""
    name, operands, out = case["entry"], built.operands, built.out
    scales = {"beta": case["beta"], "alpha": case["alpha"]} if name in ADDS else {}
    if case["into"] == "self":
        return getattr(operands[0], name + "_")(*operands[1:], **scales)
    into = {} if out is None else {"out": out}
    if theirs or case["route"] == "switch":
        return TORCHS.get(name, getattr(torch, name, None))(*operands, **scales, **into)
    if case["route"] == "operator":
        more = ([True, True],) if name == "mm_backward" else ()
        return getattr(torch.ops.matmul_grad, name).default(*operands, *more, **scales)
    return getattr(matmul_grad, name)(*operands, **scales, **into)


def mm_backward(grad: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return grad @ b.mT, a.mT @ grad


TORCHS["mm_backward"] = mm_backward


def outcome(case: Case, built: Built, theirs: bool) -> Any:
    """What comes back, its gradients with it where asked for, or the RuntimeError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an out that is resized
        try:
            if not case["gradient"]:
                return call(case, built, theirs)
            return differentiated(case, built, theirs)
        except (RuntimeError, IndexError) as error:
            return RuntimeError(error)


def differentiated(case: Case, built: Built, theirs: bool) -> tuple[Tensor, ...]:
    for x in built.operands:
        x.requires_grad_()
    result = call(case, built, theirs)
    if case["gradient"] == "freed" and not theirs:
        for storage in built.storages:
            if storage.kind in ("plain", "cow"):
                storage.base.untyped_storage().resize_(0)
    return (result.detach(), *torch.autograd.grad(result, built.operands, torch.ones_like(result)))


def exact(case: Case, values: Sequence[Tensor]) -> list[Tensor]:
    """In float64, where no sum of these integers is rounded."""
    plain = case | {"into": "new", "route": "switch"}
    copies = Built.__new__(Built)
    copies.operands, copies.out = list(values), None
    found = differentiated(plain, copies, True) if case["gradient"] else call(plain, copies, True)
    return list(found) if isinstance(found, tuple) else [found]


def must_raise(case: Case, built: Built, shape: Sequence[int] | None) -> bool:
    """Whether memory that is not there would have to be read or written."""
    adds = case["entry"] in ADDS
    has_work = all(x.numel() for x in built.operands[adds:])
    for i, (x, usable) in enumerate(zip(built.tensors, built.usable, strict=True)):
        if usable or not x.numel():
            continue
        if i == built.of_out and tuple(x.shape) == shape and case["into"] in ("out", "self"):
            return True
        if built.of_out is not None and grows_below(built, i, shape):
            continue
        if case["beta"] != 0 and 0 not in (shape or ()) if adds and i == 0 else case["alpha"] != 0 and has_work:
            return i < len(built.operands)
    return False


def grows_below(built: Built, i: int, shape: Sequence[int] | None) -> bool:
    """Whether out, of the same storage, is resized first: what is there afterwards is torch's affair."""
    assert built.of_out is not None and built.out is not None
    shared = built.described[built.of_out]["storage"] == built.described[i]["storage"]
    return shared and tuple(built.out.shape) != shape


def repeats(x: Tensor) -> bool:
    """Whether two elements of it share a place."""
    if not x.numel():
        return False
    reached = torch.zeros(sum((n - 1) * step for n, step in zip(x.shape, x.stride())) + 1, dtype=torch.int32)
    places = torch.arange(reached.numel()).as_strided(x.shape, x.stride()).flatten()
    return bool(torch.bincount(places).max() > 1)


def torch_writes(case: Case, built: Built) -> bool:
    """Whether torch's kernel writes to an out that shares memory, and overwrites what it still has to read.

    Under the override these kernels write to an out that overlaps a matrix, by a temporary.
    """
    assert built.of_out is not None and built.out is not None
    if case["route"] != "switch":
        return False
    adds = case["entry"] in ADDS
    resized = tuple(built.described[built.of_out]["shape"]) != tuple(built.out.shape)
    if (
        case["entry"] not in OVERRIDDEN
        or (adds and case["alpha"] == 0)
        or not all(all(x.shape) for x in built.operands)
    ):
        return overlaps(built) or (isinstance(case["into"], int) and resized)
    return adds and case["beta"] != 0 and not resized and overlaps(built, only=0)


def overlaps(built: Built, only: int | None = None) -> bool:
    """Whether out, now, and an operand other than itself lie in one storage and their extents meet."""
    assert built.of_out is not None and built.out is not None
    end = reach({"shape": built.out.shape, "stride": built.out.stride(), "offset": built.out.storage_offset()})
    storage, start = built.described[built.of_out]["storage"], built.out.storage_offset()
    return any(
        x["storage"] == storage and x["offset"] < end and start < reach(x)
        for i, x in enumerate(built.described)
        if i != built.of_out and only in (None, i)
    )


def run(case: Any) -> None:
    if case == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    ours, theirs = Built(case), Built(case)
    if case["entry"] == "addmv" and ours.operands[0].dim() == 0 and ours.operands[1].shape[:1] == (0,):
        return  # torch gives a scalar, whose gradient it cannot compute
    if case["route"] == "switch" and isinstance(case["into"], int) and not all(all(x.shape) for x in ours.operands):
        return  # nothing to multiply, so torch's kernel takes the call, and dies of an operand that it resizes
    try:
        wanted: list[Tensor] | RuntimeError = exact(case, ours.values())
    except (RuntimeError, IndexError) as error:  # torch looks for sizes that a scalar input of addmv does not have
        wanted = RuntimeError(error)
    shape = None if isinstance(wanted, RuntimeError) else tuple(wanted[0].shape)
    must = isinstance(wanted, RuntimeError) or must_raise(case, ours, shape)
    may = must or not all(ours.usable) or isinstance(case["into"], int) or case["gradient"] == "freed"
    may |= ours.out is not None and repeats(ours.out)  # no result fits in it: torch raises, or leaves anything there
    expected = None if may else outcome(case, theirs, True)
    with matmul_grad.enabled() if case["route"] == "switch" else contextlib.nullcontext():
        found = outcome(case, ours, False)
    if case["gradient"] == "freed":
        return  # no crash
    if isinstance(found, RuntimeError):
        assert may or isinstance(expected, RuntimeError), f"torch gives a result, here: {found}"
        by_torch = case["route"] == "switch" and case["entry"] == "matmul"
        ours.assert_only_out_written(written=not must, is_resized=by_torch)
        return
    assert not isinstance(wanted, RuntimeError), f"no error, but torch raises: {wanted}"
    assert not must, "memory that is not there was read"
    if isinstance(expected, RuntimeError) and case["into"] == "out":
        # The result, which is compared below, is right. torch's matmul of batches fails on an out of some strides, and
        # its sums refuse an out that holds their input, where nothing is multiplied or out is resized first.
        accepted = case["entry"] == "matmul" or (case["entry"] in ADDS and "a single memory location" in str(expected))
        expected = None if accepted else expected
    assert not isinstance(expected, RuntimeError), f"no error, but torch raises: {expected}"
    ours.assert_only_out_written(written=True)
    assert_results(case, ours, found, expected, wanted)


def assert_results(case: Case, built: Built, found: Any, expected: Any, wanted: Sequence[Tensor]) -> None:
    results = found if isinstance(found, tuple) else (found,)
    assert len(results) == len(wanted)
    if built.out is not None:
        assert found is built.out
        if expected is not None:
            assert found.shape == expected.shape
            assert found.stride() == expected.stride() or found.numel() == 0
        if repeats(found) or torch_writes(case, built):
            return  # no result fits in it, or torch's kernel reads what it has written
    for i, (result, want) in enumerate(zip(results, wanted, strict=True)):
        assert result.shape == want.shape
        right = result.to(torch.float64) == want.to(result.dtype)
        assert bool(right.all()), f"result {i} is {result.tolist()}, should be {want.tolist()}"


def warm_up() -> None:
    """Load every kernel once, so that forks have them."""
    torch.set_num_threads(1)
    with matmul_grad.enabled():
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            x = torch.ones(2, 2, 2, dtype=dtype)
            for operands in (x[0], x[0], x[0]), (x, x, x):
                (torch.addmm if operands[0].dim() == 2 else torch.baddbmm)(*operands)
                torch.matmul(*operands[1:])


if __name__ == "__main__":
    warm_up()
    serve(run, forked=True)
