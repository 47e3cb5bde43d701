"""Products called from Python past the dispatcher: exact for every shape, and only where nothing follows the call."""

import itertools
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from dtypes import EVERY
from products import assert_exact, exact
from python_function_cases import LAYOUTS, drawn, laid_out, load, pair
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch_warnings import PROFILER

import matmul_grad
from matmul_grad.kernels.native import python_functions, torch_layout
from matmul_grad.kernels.native.python_functions import NAMES, OUT_NAMES, functions
from matmul_grad.testing import assert_same_bits

F32 = torch.float32
DEPRECATED = pytest.mark.filterwarnings(
    *(f"ignore:`torch.jit.:{kind}" for kind in ("DeprecationWarning", "FutureWarning"))
)
SIZES = [
    ((3,), (3,)), ((2, 3), (3,)), ((3,), (3, 4)), ((2, 3), (3, 4)), ((2, 3), (5, 3, 4)), ((5, 2, 3), (3, 4)),
    ((5, 2, 3), (3,)), ((3,), (5, 3, 4)), ((5, 1, 2, 3), (6, 3, 4)), ((5, 6, 2, 3), (5, 6, 3, 4)),
    ((5, 6, 2, 3), (6, 3, 4)), ((6, 2, 3), (5, 6, 3, 4)), ((5, 1, 2, 3), (1, 7, 3, 1)), ((5, 1, 1, 3), (1, 7, 3, 4)),
    ((5, 1, 1, 3), (1, 7, 3, 1)), ((7, 5, 1, 3), (5, 3, 4)), ((5, 1, 3), (5, 3, 1)), ((1, 1, 2, 3), (1, 3, 4)),
    ((2, 1, 3, 1, 2, 9), (1, 4, 1, 5, 9, 3)), ((2, 4, 1, 5, 9, 33), (1, 4, 3, 1, 33, 17)), ((2, 3, 65, 70), (70, 70)),
    ((2, 1, 3, 1, 1, 9), (4, 1, 5, 9, 1)),
]  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def loaded() -> None:
    load()


@pytest.mark.parametrize("dtype", EVERY)
def test_matmul_is_exact_and_has_the_strides_of_torch(dtype: torch.dtype) -> None:
    for one, other in SIZES:
        for first, second in itertools.product(LAYOUTS, LAYOUTS):
            a, b = laid_out(drawn(one, dtype, 1), first), laid_out(drawn(other, dtype, 2), second)
            c, expected = functions.matmul(a, b), torch.matmul(a, b)
            what = f"{one} {first} @ {other} {second}"
            assert c is not None, what
            assert_exact(c, expected, what)
            assert c.stride() == expected.stride(), what


@pytest.mark.parametrize("dtype", EVERY)
def test_linear_is_exact(dtype: torch.dtype) -> None:
    for rows in ((3,), (2, 3), (5, 2, 3), (5, 1, 3), (4, 5, 6, 3), (1, 1, 3)):
        for first, second, wide in itertools.product(LAYOUTS, ("plain", "reversed", "sliced"), (None, 1, 9)):
            a, w = laid_out(drawn(rows, dtype, 1), first), laid_out(drawn((9, 3), dtype, 2), second)
            bias = None if wide is None else laid_out(drawn((wide,), dtype, 3), second)
            c = functions.linear(a, w, bias)
            expected = exact(a.reshape(-1, 3), w.t(), None if bias is None else bias.expand(9))
            what = f"{rows} {first} {second} {wide}"
            assert c is not None, what
            assert_exact(c, expected.reshape(*rows[:-1], 9), what)
            assert c.is_contiguous()
    expanded = torch.ones(3, dtype=dtype).expand(4, 5, 3)
    assert_exact(functions.linear(expanded, torch.ones(2, 3, dtype=dtype), None), expanded[..., :2] * 3)
    assert_exact(
        functions.linear(expanded, torch.ones(1, 3, dtype=dtype), torch.ones(1, dtype=dtype)), expanded[..., :1] * 4
    )


@pytest.mark.parametrize("dtype", EVERY)
def test_vectors_are_exact(dtype: torch.dtype) -> None:
    for (m, k), first, second in itertools.product(((1, 1), (3, 5), (70, 65)), LAYOUTS, ("plain", "sliced")):
        a, v = laid_out(drawn((m, k), dtype, 1), first), laid_out(drawn((k,), dtype, 2), second)
        added = laid_out(drawn((m,), dtype, 3), second)
        column, source, what = v.unsqueeze(1), added.unsqueeze(1), f"{m} {k} {first} {second}"
        assert_exact(functions.mv(a, v), exact(a, column)[:, 0], what)
        assert_exact(functions.addmv(added, a, v, 2, -1), exact(a, column, source, 2, -1)[:, 0], what)
        assert_exact(functions.addmv(added[:1], a, v, 1, 1), exact(a, column, source[:1])[:, 0], what)
        assert_exact(functions.dot(a[0], v), exact(a[:1], column)[0, 0], what)


def test_an_item_has_the_bits_of_mm() -> None:
    a, b = torch.randn(3, 1, 37, 129), torch.randn(4, 129, 53)
    c = functions.matmul(a, b)
    for i, j in itertools.product(range(3), range(4)):
        assert_same_bits(c[i, j], torch.ops.matmul_grad.mm.default(a[i, 0], b[j]))
    column = b[2, :, 7]
    assert_same_bits(functions.matmul(a, column), functions.matmul(a, b)[:, 2:3, :, 7].contiguous())
    assert_same_bits(functions.matmul(a[0, 0, 5], b), functions.matmul(a, b)[0, :, 5].contiguous())


@pytest.mark.parametrize("name", ["mm", "bmm", "addmm", "baddbmm"])
def test_operators_and_functions_give_the_same_bits(name: str) -> None:
    batch = (3,) if "bmm" in name else ()
    a, b, source = torch.randn(*batch, 9, 33), torch.randn(*batch, 33, 17), torch.randn(17)
    operator = getattr(torch.ops.matmul_grad, name).default
    if "add" not in name:
        assert_same_bits(getattr(functions, name)(a, b), operator(a, b))
        return
    for beta, alpha in ((1, 1), (0, 1), (0.5, -2), (2**53 - 1, 1e-300)):
        c = getattr(functions, name)(source, a, b, beta, alpha)
        assert_same_bits(c, operator(source, a, b, beta=beta, alpha=alpha))


# --- what goes through the dispatcher ------------------------------------------------------------------------


def calls(a: Tensor, b: Tensor) -> dict[str, Tensor | None]:
    """Every function of two matrices, or of their rows and columns."""
    bias, row, column = torch.ones(b.shape[-1], dtype=b.dtype), a[0], b[:, 0]
    out = torch.zeros(a.shape[0], b.shape[-1])
    return {
        "mm_out": functions.mm_out(a, b, out),
        "bmm_out": functions.bmm_out(a.unsqueeze(0), b.unsqueeze(0), out.unsqueeze(0)),
        "addmm_out": functions.addmm_out(bias, a, b, 1, 1, out),
        "baddbmm_out": functions.baddbmm_out(bias, a.unsqueeze(0), b.unsqueeze(0), 1, 1, out.unsqueeze(0)),
        "mv_out": functions.mv_out(a, column, out[0]),
        "addmv_out": functions.addmv_out(bias[:1], a, column, 1, 1, out[0]),
        "dot_out": functions.dot_out(row, column, out[0, 0]),
        "mm": functions.mm(a, b),
        "addmm": functions.addmm(bias, a, b, 1, 1),
        "matmul": functions.matmul(a, b),
        "linear": functions.linear(a, b, None),
        "linear with bias": functions.linear(a, b, bias),
        "bmm": functions.bmm(a.unsqueeze(0), b.unsqueeze(0)),
        "baddbmm": functions.baddbmm(bias, a.unsqueeze(0), b.unsqueeze(0), 1, 1),
        "mv": functions.mv(a, column),
        "addmv": functions.addmv(bias[:1], a, column, 1, 1),
        "dot": functions.dot(row, column),
    }


def taken(a: Tensor, b: Tensor) -> set[str]:
    return {name for name, result in calls(a, b).items() if result is not None}


ALL = {*NAMES, *OUT_NAMES, "linear with bias"}


class Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_ordinary_tensors_are_taken() -> None:
    a, b = pair()
    assert taken(a, b) == ALL
    assert taken(a, torch.nn.Parameter(b, requires_grad=False)) == ALL
    with torch.no_grad():
        assert taken(a.clone().requires_grad_(), torch.nn.Parameter(b)) == ALL
    with torch.inference_mode():
        assert taken(a, b) == ALL
        c = functions.mm(a.clone(), b)
        assert c.is_inference()
        assert functions.mm_out(a, b, c) is c
    assert functions.mm_out(a, b, c) is None, "written where nothing would tell autograd"
    assert taken(c, b) == ALL
    assert not functions.mm(a, b).is_inference()


@pytest.mark.parametrize(
    "mode",
    [
        Operators,
        Functions,
        lambda: torch.device("meta"),
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
    ],
    ids=["dispatch", "function", "device", "autocast", "profiler"],
)
@PROFILER
def test_a_mode_sees_the_call(mode: Callable[[], Any]) -> None:
    a, b = pair()
    with mode():
        assert taken(a, b) == set()
    assert taken(a, b) == ALL


@PROFILER
def test_the_profiler_names_the_operators() -> None:
    a, b = pair()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        matmul_grad.mm(a, b)
        matmul_grad.linear(a, b, torch.ones(4))
    names = {event.key for event in profile.key_averages()}
    assert {"matmul_grad::mm", "matmul_grad::linear"} <= names


@DEPRECATED  # which the first forward-mode derivative of a process imports
def test_a_tensor_that_is_followed_is_not_taken() -> None:
    a, b = pair()
    assert taken(a.clone().requires_grad_(), b) == taken(a, b.clone().requires_grad_()) == set()
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(a, torch.ones_like(a))
        assert taken(dual, b) == taken(a, dual) == set()
    assert functions.addmm(torch.ones(4, requires_grad=True), a, b, 1, 1) is None
    assert functions.linear(a, b, torch.ones(4, requires_grad=True)) is None


@DEPRECATED
def test_transforms_and_tracers_see_the_call() -> None:
    a, b = pair()
    seen: list[set[str]] = []

    def call(x: Tensor) -> Tensor:
        seen.append(taken(x, b) | taken(a, b))
        return matmul_grad.mm(x, b)

    assert_same_bits(torch.func.vmap(call)(a.expand(2, 4, 4))[1], matmul_grad.mm(a, b))
    torch.func.grad(lambda x: call(x).sum())(a)
    torch.func.functionalize(call)(a)
    torch.fx.experimental.proxy_tensor.make_fx(call)(a)
    graph = torch.jit.trace(lambda x: call(x), a, check_trace=False)
    assert_same_bits(graph(2 * a), matmul_grad.mm(2 * a, b))
    assert len(seen) >= 5 and set().union(*seen) == set()


class Sub(Tensor):
    pass


@pytest.mark.parametrize(
    "other",
    [
        lambda b: b.as_subclass(Sub),
        lambda b: b.to(torch.int64),
        lambda b: b.to(torch.complex64),
        lambda b: torch.complex(b, b).mT.conj(),
        lambda b: torch._neg_view(b),
        lambda b: b.to_sparse(),
        lambda b: b.to("meta"),
        lambda b: b.double(),
        lambda b: b[:, :0],
        lambda b: b[:3, :3],
        lambda b: torch._efficientzerotensor(b.shape),
        lambda b: None,
        lambda b: 1.0,
    ],
    ids=[
        "subclass", "int", "complex", "conj", "neg", "sparse", "meta", "double", "empty", "mismatch", "zero", "none",
        "number",
    ],
)  # fmt: skip
def test_other_operands_are_not_taken(other: Callable[[Tensor], Any]) -> None:
    a, b = pair()
    for name in ("mm", "matmul"):
        assert getattr(functions, name)(a, other(b)) is None
        assert getattr(functions, name)(other(b), a if other(b) is None or b.shape == () else a[:0]) is None
    assert functions.linear(a, other(b), None) is functions.linear(a, b, "bias") is None
    assert functions.addmm(other(b), a, b[:, :3], 1, 1) is None
    assert functions.mv(a, other(b)) is functions.dot(other(b), a[0]) is None
    assert functions.addmv(other(b), a, a[0], 1, 1) is None


def test_a_freed_storage_is_not_taken() -> None:
    a, b = pair()
    column = b[:, 0]
    b.untyped_storage().resize_(0)
    for name in ("mm", "matmul"):
        assert getattr(functions, name)(a, b) is None
        with pytest.raises(RuntimeError, match="not allocated"):
            getattr(matmul_grad, name)(a, b)
    assert functions.linear(a, b, None) is functions.linear(a, a, column) is None
    a = a.expand(2, 4, 4).contiguous()
    for weight, bias in ((b, torch.ones(())), (column, torch.ones(())), (b, torch.ones(4))):
        with pytest.raises(RuntimeError, match="not allocated"):
            matmul_grad.linear(a, weight, bias)
    four, freed = a.unsqueeze(0).requires_grad_(), torch.ones(1, 2, 4, 4)
    freed.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="not allocated"):
        matmul_grad.matmul(four, freed)


@pytest.mark.parametrize("number", [True, 1j, None, "1", 2**53 + 1, 10**400, -(10**400), torch.ones(())], ids=str)
def test_numbers_that_float64_does_not_hold_are_not_taken(number: Any) -> None:
    a, b = pair()
    assert functions.addmm(a, a, b, number, 1) is functions.addmm(a, a, b, 1, number) is None
    assert functions.addmm(a, a, b, -1, -1.0) is not None


def test_calls_with_other_arguments_are_not_taken() -> None:
    a, b = pair()
    for name in (*NAMES, *OUT_NAMES):
        for count in (0, 1, 4, 6):  # of two-dimensional tensors
            assert getattr(functions, name)(*[a] * count) is None
    assert functions.matmul(torch.ones([1] * 17), b) is functions.matmul(torch.ones(()), b) is None


# --- CPython -------------------------------------------------------------------------------------------------


def test_references_are_kept_and_released() -> None:
    a, b = pair()
    c = functions.mm(a, b)
    assert sys.getrefcount(c) == 2
    counts = [sys.getrefcount(x) for x in (a, b)]
    before = sys.getrefcount(None)
    for _ in range(1000):
        functions.mm(a, b)
        functions.mm(a, None)
        functions.matmul(a, b)
    assert [sys.getrefcount(x) for x in (a, b)] == counts
    assert abs(sys.getrefcount(None) - before) < 100
    assert c._use_count() == 1  # of the tensor in it


def test_other_threads_run_during_a_long_product() -> None:
    """Python switches threads by itself only after a while, here never: another one runs where a call lets it."""
    a, gate, ran = torch.ones(300, 300), threading.Lock(), []

    def wait() -> None:
        with gate:
            ran.append(True)

    interval = sys.getswitchinterval()
    gate.acquire()
    thread = threading.Thread(target=wait)
    sys.setswitchinterval(1e6)
    try:
        thread.start()
        gate.release()
        assert not ran
        for _ in range(20000):
            if ran:
                break
            functions.matmul(a, a)
        assert ran
    finally:
        sys.setswitchinterval(interval)
        thread.join()


def test_without_what_it_needs_nothing_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    before = dict(vars(functions))
    monkeypatch.setattr(torch_layout, "tensor_offset", lambda: 0)
    python_functions.uninstall()
    try:
        assert not python_functions.install(lambda name: 1, NAMES)
        a, b = pair()
        assert taken(a, b) == set()
        assert_exact(matmul_grad.mm(a, b), exact(a, b))
        assert_exact(matmul_grad.matmul(a, b.expand(2, 4, 4)), exact(a, b).expand(2, 4, 4))
        assert_exact(matmul_grad.linear(a.expand(2, 4, 4), b, b[0]), exact(a, b.t(), b[0]).expand(2, 4, 4))
    finally:
        for name, function in before.items():
            setattr(functions, name, function)
    assert taken(a, b) == ALL
