"""Operands that the functions refuse, errors that pass through, and calls that keep nothing afterwards."""

import contextlib
import gc
import itertools
from collections.abc import Iterator
from typing import Any

import processes
import pytest
import torch
from outcomes import outcome
from products import PRODUCTS, assert_exact, operands, pair_of
from torch import Tensor

import matmul_grad


def bad_operands() -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """(name, arguments, named) that torch refuses, most of them."""
    one = torch.ones
    wrong: list[Any] = [
        one(4), one(2, 3), one(3, 4, 5), one(1), one(()), one(2, 3, 4, 5), 3, None, "a", one(4, 4).double(),
        one(4, 4).int(), one(4, 4, device="meta"), one(4, 4).to_sparse(), [1.0],
    ]  # fmt: skip
    for x, y in itertools.product(wrong, wrong):
        for name in ("mm", "bmm", "matmul", "linear"):
            yield name, (x, y), {}
    right = {"addmm": (one(2, 5), one(2, 3), one(3, 5)), "baddbmm": (one(4, 2, 5), one(4, 2, 3), one(4, 3, 5)),
             "linear": (one(2, 3), one(5, 3), one(5))}  # fmt: skip
    for name, accepted in right.items():
        for place, x in itertools.product(range(3), wrong):
            yield name, (*accepted[:place], x, *accepted[place + 1 :]), {}
    for name, scales in itertools.product(
        ("addmm", "baddbmm"), ({"alpha": "a"}, {"beta": None}, {"alpha": 1e300}, {"beta": one(2)})
    ):
        yield name, right[name], scales


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state:UserWarning")  # once in a process
def test_bad_operands() -> None:
    """torch's error, of its type and to the letter; or its result."""
    compared = 0
    for name, arguments, named in bad_operands():
        ours, theirs = pair_of(name)
        actual, expected = (outcome(call, *arguments, **named) for call in (ours, theirs))
        if isinstance(expected, tuple):
            compared += 1
            assert actual == expected, (name, arguments, named)
        else:
            assert isinstance(actual, Tensor), (name, arguments, actual)
            assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    assert compared > 500
    with matmul_grad.strict():
        for name in PRODUCTS:
            ours, theirs = pair_of(name)
            assert_exact(ours(*operands(name)), theirs(*operands(name)))


def test_an_error_of_a_hook_passes_through() -> None:
    def stop(_: Any) -> Any:
        raise KeyError("as raised")

    for name in PRODUCTS:
        ours, _ = pair_of(name)
        found = [x.requires_grad_() for x in operands(name)]
        with pytest.raises(KeyError, match="as raised"), torch.autograd.graph.saved_tensors_hooks(stop, stop):
            ours(*found)


def test_no_call_keeps_its_operands() -> None:
    """Done here or by torch, refused or failed, with a graph or without: afterwards each tensor is held once."""
    one, i, a, b = torch.ones, torch.ones(4, 5), torch.ones(4, 3), torch.ones(3, 5)
    calls: list[tuple[str, tuple[Tensor, ...], dict[str, Any]]] = [
        ("addmm", (i, a, b), {}), ("addmm", (i, a, b), {"beta": 0}), ("addmm", (i, a, b), {"alpha": 0}),
        ("addmm", (i, a, a), {}), ("addmm", (one(7), a, b), {}), ("addmm", (i.double(), a, b), {}),
        ("addmm", (i.int(), a.int(), b.int()), {}), ("addmm", (i, a[:, :0], b[:0]), {}),
        ("addmm", (i, a.clone().requires_grad_(), b), {}), ("addmm", (i, a.clone().requires_grad_(), a), {}),
        ("bmm", (a[None], b[None]), {}), ("bmm", (a[None], a[None]), {}), ("bmm", (a[None].int(), b[None].int()), {}),
        ("baddbmm", (i, a[None], b[None]), {}), ("baddbmm", (i, a[None], a[None]), {}),
        ("baddbmm", (i[None].int(), a[None].int(), b[None].int()), {}),
    ]  # fmt: skip
    for strictly, (name, given, scales) in itertools.product((False, True), calls):
        before = [x._use_count() for x in given]
        for call in (getattr(matmul_grad, name), getattr(torch.ops.matmul_grad, name)):
            with matmul_grad.strict() if strictly else contextlib.nullcontext(), contextlib.suppress(RuntimeError):
                assert call(*given, **scales)._use_count() == 1
        if [x._use_count() for x in given] != before:
            gc.collect()  # exceptions and their frames hold each other
        assert [x._use_count() for x in given] == before, (name, given, scales, strictly)


FIRST_CALLS = """
import sys, torch, matmul_grad
for name in sys.argv[1:]:
    shapes = {"bmm": [(2, 3, 4), (2, 4, 2)], "addmm": [(2,), (3, 4), (4, 2)], "baddbmm": [(2,), (2, 3, 4), (2, 4, 2)],
              "matmul": [(2, 3, 4), (4, 2)], "linear": [(2, 3, 4), (2, 4), (2,)]}[name]
    operands = [torch.ones(shape, requires_grad=True) for shape in shapes]
    with matmul_grad.strict():
        for _ in range(2):
            getattr(matmul_grad, name)(*operands).sum().backward()
            with torch.no_grad():
                getattr(matmul_grad, name)(*operands)
    assert all(x.grad is not None for x in operands)
model = matmul_grad.convert(torch.nn.Sequential(torch.nn.Linear(4, 2)))
model(torch.ones(3, 4)).sum().backward()
print("done")
"""


@pytest.mark.parametrize("first", ["addmm", "linear"])
def test_first_calls_of_a_process_bring_no_warning(first: str) -> None:
    others = [name for name in ("bmm", "addmm", "baddbmm", "matmul", "linear") if name != first]
    done = processes.run(FIRST_CALLS, "-W", "error", arguments=(first, *others))
    assert (done.stdout, done.stderr) == ("done\n", "")
