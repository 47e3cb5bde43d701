"""Memory safety: products of views over storages of every kind, compared with torch.

Each input is plain data and runs in a child process (helpers/memory_case.py), so a crash is a failure of one input,
which Hypothesis makes minimal and prints. Where a storage does not hold what a tensor reaches, a RuntimeError is
required; torch itself would read past the end there, and is not called.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from case_process import CaseProcess, assert_no_complaint
from dtypes import ACCELERATED
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from limits import scaled

import matmul_grad

PROGRAM = Path(__file__).parents[2] / "helpers" / "memory_case.py"
# Shapes of operands, and the shape of the result, by the letters of the sizes.
SHAPES = {
    "mm": (("mk", "kn"), "mn"),
    "bmm": (("bmk", "bkn"), "bmn"),
    "addmm": (("mn", "mk", "kn"), "mn"),
    "baddbmm": (("bmn", "bmk", "bkn"), "bmn"),
    "mv": (("mk", "k"), "m"),
    "addmv": (("m", "mk", "k"), "m"),
    "dot": (("k", "k"), ""),
    "vdot": (("k", "k"), ""),
    "matmul": (("bmk", "kn"), "bmn"),
    "linear": (("bmk", "nk", "n"), ""),
    "mm_backward": (("mn", "mk", "kn"), ""),
}
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")
VECTORS = ("mv", "addmv", "dot", "vdot")
FUNCTIONS = [name for name in (*PRODUCTS, *VECTORS, "matmul", "linear") if hasattr(matmul_grad, name)]
ENTRIES = [
    *(("function", name) for name in FUNCTIONS),
    *(("operator", name) for name in (*PRODUCTS, "mm_backward")),
    *(("switch", name) for name in (*PRODUCTS, *VECTORS, "matmul", "linear")),
]
IN_PLACE = ("addmm", "baddbmm", "addmv")
SIZE = st.integers(0, 7)
KINDS = ("plain", "guarded", "plain", "guarded", "cow", "readonly", "mapped", "freed", "small")


@st.composite
def tensors(draw: st.DrawFn, shape: list[int], storage: int) -> dict[str, Any]:
    """A view: dense, transposed, or with any strides at all, of size 0 or 1 with huge ones."""
    order = draw(st.sampled_from(("dense", "transposed", "any")))
    if order == "any":
        huge = st.just(2**40)
        stride = [draw(st.integers(0, 9) if size > 1 else st.integers(0, 9) | huge) for size in shape]
    else:
        stride, step = [0] * len(shape), 1
        for i in range(len(shape))[:: 1 if order == "transposed" else -1]:
            stride[i], step = step, step * max(1, shape[i])
    return {"shape": shape, "stride": stride, "offset": draw(st.integers(0, 5)), "storage": storage}


@st.composite
def shapes_of_operands(draw: st.DrawFn, name: str, sizes: dict[str, int]) -> list[list[int]]:
    """Those that fit, but for what is added, which expands to the result, and now and then a size that does not fit."""
    shapes = [[sizes[letter] for letter in letters] for letters in SHAPES[name][0]]
    if name in IN_PLACE and draw(st.integers(0, 3)) == 3:
        shapes[0] = [1 if draw(st.booleans()) else size for size in shapes[0]][draw(st.integers(0, len(shapes[0]))) :]
    if draw(st.integers(0, 15)) == 15:
        shapes[-1] = [size + 1 for size in shapes[-1]]
    return shapes


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    route, name = draw(st.sampled_from(ENTRIES))
    sizes = {letter: draw(SIZE) for letter in "bmnk"}
    shapes = draw(shapes_of_operands(name, sizes))
    intos: list[Any] = ["new"]
    if route != "operator" and name not in ("linear", "vdot"):
        intos += ["out"] + ["self"] * (route == "switch" and name in IN_PLACE) + [0] * (name in PRODUCTS)
    into = draw(st.sampled_from(intos))
    if into == "out":
        right = [sizes[letter] for letter in SHAPES[name][1]]
        shapes.append([draw(SIZE) for _ in right] if draw(st.integers(0, 3)) == 3 else right)
    own = range(len(shapes))
    storage_of = [draw(st.sampled_from((i, *range(i)))) for i in own]
    gradients = ["", ""] + ["whole"] * (into == "new" and name != "mm_backward")
    if "whole" in gradients and name not in VECTORS:  # their gradients are torch's elementwise products
        gradients.append("freed")
    return {
        "route": route,
        "entry": name,
        "into": into,
        "dtype": draw(st.sampled_from([str(dtype).removeprefix("torch.") for dtype in ACCELERATED.values()])),
        "beta": draw(st.sampled_from((1, 0, 2, -1, 0.5))),
        "alpha": draw(st.sampled_from((1, 0, 2, -1, 0.5))),
        "gradient": draw(st.sampled_from(gradients)),
        "tensors": [draw(tensors(shape, storage_of[i])) for i, shape in enumerate(shapes)],
        "storages": [draw(storages(i, route, name, into, storage_of)) for i in own],
    }


@st.composite
def storages(draw: st.DrawFn, i: int, route: str, name: str, into: Any, storage_of: list[int]) -> dict[str, Any]:
    written = {"new": None, "out": storage_of[-1], "self": storage_of[0]}.get(into, storage_of[0])
    kinds = [kind for kind in KINDS if i != written or kind not in ("readonly", "mapped")]
    # torch's copies read what is not there, and its dot fills an out that is not there.
    if route == "switch" and (name in ("matmul", "linear") or (name == "dot" and i == written)):
        kinds = [kind for kind in kinds if kind not in ("freed", "small")]
    kind = draw(st.sampled_from(kinds))
    return {"kind": kind, "lacking": draw(st.integers(1, 9))} if kind == "small" else {"kind": kind}


@pytest.fixture(scope="module")
def child() -> Iterator[CaseProcess]:
    environment = os.environ | {"MALLOC_PERTURB_": "165", "OMP_NUM_THREADS": "1"}  # freed memory holds garbage
    process = CaseProcess([str(PROGRAM)], environment, limit=scaled(300))
    yield process
    process.close()


def dense(shape: list[int], storage: int, **more: Any) -> dict[str, Any]:
    stride = [1] * len(shape)
    for i in range(len(shape) - 1, 0, -1):
        stride[i - 1] = stride[i] * shape[i]
    return {"shape": shape, "stride": stride, "offset": 0, "storage": storage} | more


def one(route: str, name: str, into: Any, views: list[dict[str, Any]], *kinds: str) -> dict[str, Any]:
    scales = {"dtype": "float32", "beta": 1, "alpha": 1, "gradient": ""}
    held = [{"kind": kind, "lacking": 1} for kind in kinds]
    return {"route": route, "entry": name, "into": into, "tensors": views, "storages": held, **scales}


X, Y, Z = dense([2, 3], 0), dense([3, 2], 1), dense([2, 2], 2)
KNOWN = {
    f"{route}-{kind}-{what}": one(route, name, into, views, *(kind if i == bad else "plain" for i in range(3)))
    for route in ("function", "switch")
    for kind in ("freed", "small")
    for what, name, into, views, bad in (
        ("left", "mm", "new", [X, Y], 0),
        ("right", "mm", "new", [X, Y], 1),
        ("out", "mm", "out", [X, Y, Z], 2),
        ("input", "addmm", "new", [Z, X, Y], 2),
    )
} | {
    "cow-operands": one("switch", "mm", "new", [X, Y], "cow", "cow", "plain"),
    **{
        f"{route}-cow-out-grows-{behind}": one(
            route, "mm", "out", [dense([2, 1], 0), dense([1, 1], 1), dense([0, 0], behind)], "plain", "cow", "cow"
        )
        for route in ("function", "switch")
        for behind in (1, 2)
    },
    "cow-out": one("function", "mm", "out", [X, Y, Z], "cow", "cow", "cow"),
    **{
        f"{route}-grows-behind-an-operand": one(
            route, "mm", "out", [dense([8, 8], 0), dense([8, 8], 1), dense([4], 0, offset=64)], *["plain"] * 3
        )
        for route in ("function", "switch")
    },
    "grows-below-an-operand": one(
        "function", "mm", "out", [dense([8, 8], 0), dense([8, 8], 1), dense([4], 0, offset=4)], *["plain"] * 3
    ),
    "out-is-an-operand": one(
        "function", "bmm", 0, [dense([2, 1, 5], 0), dense([2, 5, 1], 0)], "plain", "plain", "plain"
    ),
    "out-overlaps-an-operand": one("function", "mm", "out", [dense([2, 2], 0)] * 3, "plain", "plain", "plain"),
    "empty-matrix-freed-input": one(
        "function", "addmv", "new", [dense([1], 0), dense([0, 0], 1), dense([0], 2)], "freed", "plain", "plain"
    ),
    "in-place-freed": one("switch", "addmm", "self", [Z, X, Y], "plain", "plain", "freed"),
    "in-place-without-an-operand": one("switch", "addmm", "self", [Z, X, Y], "freed", "plain", "plain"),
}


@pytest.mark.parametrize("case", KNOWN.values(), ids=KNOWN)
def test_known_input_behaves_as_torch(child: CaseProcess, case: dict[str, Any]) -> None:
    assert_no_complaint(child.complaint(case), case)


def fuzz(child: CaseProcess, examples: int, start: int | None = None) -> None:
    @settings(
        max_examples=examples, deadline=None, print_blob=True,
        suppress_health_check=list(HealthCheck), database=None if start is not None else settings.default.database,
    )  # fmt: skip
    @given(case=cases())
    def every_case(case: dict[str, Any]) -> None:
        assert_no_complaint(child.complaint(case), case)

    (seed(start)(every_case) if start is not None else every_case)()


def test_fuzz_for_a_moment(child: CaseProcess) -> None:
    """Always the same cases; others in the ten minutes of the slow test below."""
    fuzz(child, 400, 0)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_for_ten_minutes(child: CaseProcess) -> None:
    end, start = time.monotonic() + 600, int(time.time())
    while time.monotonic() < end:
        fuzz(child, 2000, start)
        start += 1


def test_a_crash_is_one_failure_and_the_rest_go_on(child: CaseProcess) -> None:
    """The child's own report of a crash, and that it serves what follows."""
    good = one("function", "mm", "new", [X, Y], "plain", "plain", "plain")
    assert child.complaint(good) == ""
    assert "KeyError" in child.complaint({"entry": "mm"})
    assert "SIGSEGV" in child.complaint("crash")
    assert child.complaint(good) == "" and child.starts == 1
