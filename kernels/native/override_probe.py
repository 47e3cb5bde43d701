"""Try the layouts of ``torch_layout.py`` that only the override needs, in a child process, before they are trusted.

A layout that is wrong mostly ends the process, so no list of versions and no look at a few words is enough. The child
registers the compiled entries as the override does, but on operators of its own with aten's schemas, passes tensors and
numbers through them, falls back through them, and removes them. It is run once for each build of torch: a pass is kept
in the cache folder.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..cpu import build
from . import state
from .op_table import OVERLOADS
from .register import Unavailable

NAMESPACE = "matmul_grad_probe"
SCHEMAS = {
    "mm": "(Tensor self, Tensor mat2) -> Tensor",
    "addmm": "(Tensor self, Tensor mat1, Tensor mat2, *, Scalar beta=1, Scalar alpha=1) -> Tensor",
    "addmm.out": "(Tensor self, Tensor mat1, Tensor mat2, *, Scalar beta=1, Scalar alpha=1, Tensor(a!) out) "
    "-> Tensor(a!)",
    "addmm_": "(Tensor(a!) self, Tensor mat1, Tensor mat2, *, Scalar beta=1, Scalar alpha=1) -> Tensor(a!)",
}
ABOVE = ("linear", "linear_kept")  # of ABOVE_AUTOGRAD, and what is called for gradients that are kept otherwise
LINEAR = "(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor"
SECONDS = 600  # a child that compiles the entries on a slow and busy machine is done long before


def require() -> None:
    """Raise Unavailable, with what failed, on a torch that does not pass."""
    reason = _verdict()
    if reason:
        raise Unavailable(f"torch {torch.__version__} does not pass the test of the override: {reason}")


@functools.cache
def _verdict() -> str:
    """ "" for a pass, else what failed."""
    kept = _path()
    with contextlib.suppress(OSError):
        if kept is not None and kept.is_file():
            return ""
    reason = _run()
    if not reason and kept is not None:
        with contextlib.suppress(OSError):
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.touch()
    return reason


def _path() -> Path | None:
    """Where a pass is kept for this build of torch and these sources; None where nothing can be kept."""
    folder = build.cache_folder()
    if folder is None:
        return None
    key = (
        torch.__version__, torch.version.git_version, torch.__file__, sys.version, build.sources_digest(__package__),
    )  # fmt: skip
    return folder / f"override-{hashlib.sha256(repr(key).encode()).hexdigest()[:24]}.passed"


def _run() -> str:
    if not sys.executable:
        return "there is no Python to run it in a process of its own"
    package = __name__.split(".")[0]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    environment.pop("TORCH_LOGS", None)
    command = [sys.executable, "-c", f"import {package}; from {__name__} import main; main()"]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode == 0 and done.stdout.endswith("passed\n"):
        return ""
    last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
    return f"exit code {done.returncode}, {last}"


def main() -> None:
    """Run in the child: raises, or ends the process, where a layout is not as expected."""
    calls: list[str] = []
    library = _define(calls)
    uninstall, _ = _install()
    try:
        _try_all(calls)
    finally:
        uninstall()
    before = len(calls)
    _op("mm")(torch.ones(2, 2), torch.ones(2, 2))
    _same(len(calls), before + 1, "the kernel that was replaced is not there again")
    library._destroy()
    print("passed")


def _op(name: str) -> Callable[..., Any]:
    packet, _, overload = name.partition(".")
    return getattr(getattr(getattr(torch.ops, NAMESPACE), packet), overload or "default")


def _define(calls: list[str]) -> Any:
    """Operators of the probe, whose kernels call aten's and record the call."""
    library = torch.library.Library(NAMESPACE, "DEF")
    for name, schema in SCHEMAS.items():

        def kernel(*operands: Tensor, _name: str = name, **named: Any) -> Tensor:
            calls.append(_name)
            return getattr(torch, _name.split(".")[0].rstrip("_"))(*operands, **named)

        library.define(f"{name}{schema}")
        library.impl(name, kernel, "CPU")
    for name in ABOVE:

        def above(*operands: Tensor, _name: str = name) -> Tensor:
            calls.append(_name)
            return operands[1] + 1

        library.define(f"{name}{LINEAR}")
        library.impl(name, above, "AutogradCPU")
    return library


def _install() -> tuple[Callable[[], object], dict[str, int]]:
    """Override the probe's operators as aten's are; returns what undoes it, and the entries by name."""
    from . import override_cpu

    for name in SCHEMAS:
        kernel = override_cpu.kernel_of(f"{NAMESPACE}::{name}")
        index = OVERLOADS.index(name)
        state.words[state.FALLBACKS + 2 * index] = kernel.boxed
        state.words[state.FALLBACKS + 2 * index + 1] = kernel.functor
    above = ABOVE[:1] if override_cpu.find_grad_dtype() else ()
    for name in above:
        override_cpu.set_above(name, *(f"{NAMESPACE}::{each}" for each in ABOVE))
    entries = override_cpu.install_entries(NAMESPACE, tuple(SCHEMAS), above)
    for name, entry in entries.items():
        found = override_cpu.kernel_of(f"{NAMESPACE}::{name}", is_code=entry.__eq__)
        _same((found.functor, found.boxed, found.unboxed), (0, entry, 0), f"{name} does not read back")
    return override_cpu.uninstall, entries


def _try_all(calls: list[str]) -> None:
    a = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    b = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    c = torch.arange(8, dtype=torch.float32).reshape(2, 4)
    expected = torch.tensor([[20.0, 23.0, 26.0, 29.0], [56.0, 68.0, 80.0, 92.0]])
    addmm = _op("addmm")
    _equal(_op("mm")(a, b), expected, "mm")
    _equal(addmm(c, a, b), expected + c, "addmm")
    _equal(addmm(c, a, b, beta=2, alpha=0.5), 2 * c + expected / 2, "addmm with an int and a float")
    _equal(addmm(c * float("nan"), a, b, beta=0, alpha=3), 3 * expected, "addmm with beta = 0")
    out = torch.zeros(2, 4)
    _same(_op("addmm.out")(c, a, b, beta=-1, out=out) is out, True, "addmm.out returns another tensor")
    _equal(out, expected - c, "addmm.out")
    place = c.clone()
    _same(_op("addmm_")(place, a, b, alpha=2) is place, True, "addmm_ returns another tensor")
    _equal(place, 2 * expected + c, "addmm_")
    counted = {name: state.calls(name, state.ACCELERATED).get("float32", 0) for name in ("mm", "addmm")}
    _same((counted, calls), ({"mm": 1, "addmm": 5}, []), "not all calls reached the compiled entries")
    _fall_back(calls, a, b, c)
    if state.words[state.ABOVE_LIBRARY] != 0:
        _try_above(calls)
    _try_release()


def _fall_back(calls: list[str], a: Tensor, b: Tensor, c: Tensor) -> None:
    """Fallbacks to the replaced kernel, its errors included."""
    whole = _op("addmm")(c.long(), a.long(), b.long(), beta=2, alpha=3)
    _equal(whole, torch.addmm(c.long(), a.long(), b.long(), beta=2, alpha=3), "addmm of whole numbers")
    _same(calls, ["addmm"], "whole numbers did not reach the kernel that was replaced")
    try:
        _op("mm")(a, a)
    except RuntimeError as error:
        _same("shapes cannot be multiplied" in str(error), True, f"another error: {error}")
    else:
        raise AssertionError("shapes that do not fit are multiplied")


def _try_above(calls: list[str]) -> None:
    """Which kernel is called, by the dtype in which a gradient is kept; with a bias, and without one."""
    x = torch.ones(2, 3, dtype=torch.bfloat16)
    for dtype, expected in ((torch.bfloat16, ABOVE[0]), (torch.float32, ABOVE[1])):
        weight = torch.ones(2, 3, dtype=torch.bfloat16, requires_grad=True)
        weight.grad_dtype = dtype
        for more in ((), (None,), (x[:, 0],)):
            calls.clear()
            result = _op("linear")(x, weight, *more)
            _same((calls, result.tolist()), ([expected], [[2.0] * 3] * 2), f"linear of a gradient in {dtype}")
        with torch.no_grad():
            calls.clear()
            _op("linear")(x, weight)
            _same(calls, [ABOVE[0]], "linear without a graph")


def _try_release() -> None:
    """No reference to an operand or a result is left after a call."""
    gone: list[weakref.ref[Any]] = []
    for name in ("mm", "addmm", "addmm_", *(("linear",) if state.words[state.ABOVE_LIBRARY] != 0 else ())):
        operands = [torch.ones(2, 2).numpy() for _ in range(3)]
        gone += [weakref.ref(x) for x in operands]
        tensors = [torch.from_numpy(x) for x in operands]
        if name == "linear":
            tensors[1] = tensors[1].bfloat16().requires_grad_()
            tensors[1].grad_dtype = torch.float32
            gone.append(weakref.ref(tensors[1].untyped_storage()))
        _op(name)(*tensors[: 2 if name == "mm" else 3])
        del operands, tensors
    gc.collect()
    _same([x() for x in gone], [None] * len(gone), "a call keeps its operands")


def _equal(actual: Tensor, expected: Tensor, what: str) -> None:
    _same(torch.equal(actual, expected), True, f"{what} is wrong: {actual.tolist()}")


def _same(actual: object, expected: object, what: str) -> None:
    if actual != expected:
        raise AssertionError(f"{what}: {actual} instead of {expected}")
