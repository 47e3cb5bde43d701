"""Bad operands: torch.mm's own error, of its type and to the letter, and nothing left behind."""

from collections.abc import Callable
from typing import Any

import processes
import pytest
import torch
from torch import Tensor

import matmul_grad
from matmul_grad.testing import assert_same_bits

OPERATOR = torch.ops.matmul_grad.mm
WAYS = [pytest.param(matmul_grad.mm, id="mm"), pytest.param(OPERATOR, id="ops")]


def ones(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.ones(shape, dtype=dtype, device=device)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


RANKS = {0: (), 1: (4,), 2: (4, 4), 3: (1, 4, 4)}
MIXED = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8,
         torch.bool, torch.complex64, torch.complex128]  # fmt: skip
UNSUPPORTED = [torch.bool, torch.uint16, torch.uint32, torch.float8_e4m3fn]

Operands = Callable[[], tuple[Any, ...]]
TENSORS: dict[str, Operands] = {
    **{
        f"rank-{x}-{y}": lambda x=x, y=y: (ones(*RANKS[x]), ones(*RANKS[y]))
        for x in RANKS
        for y in RANKS
        if (x, y) != (2, 2)
    },
    "shape": lambda: (ones(3, 4), ones(5, 2)),
    "shape-empty": lambda: (ones(3, 0), ones(5, 0)),
    "shape-of-a-transpose": lambda: (ones(3, 4).t(), ones(4, 2)),
    "shape-expanded": lambda: (ones(1, 1).expand(3, 2**40), ones(5, 2)),
    "shape-and-dtype": lambda: (ones(3, 4), ones(5, 2, dtype=torch.float64)),
    "rank-and-dtype": lambda: (ones(4), ones(4, 2, dtype=torch.float64)),
    "rank-and-shape": lambda: (ones(4, 2), ones(3)),
    **{
        f"{short(x)}-{short(y)}": lambda x=x, y=y: (ones(3, 4, dtype=x), ones(4, 2, dtype=y))
        for x in MIXED
        for y in MIXED
        if x != y
    },
    **{short(x): lambda x=x: (ones(3, 4).to(x), ones(4, 2).to(x)) for x in UNSUPPORTED},
    "shape-half": lambda: (ones(3, 4).half(), ones(5, 2).half()),
    "rank-int": lambda: (ones(3).int(), ones(3, 2).int()),
    "meta-cpu": lambda: (ones(3, 4, device="meta"), ones(4, 2)),
    "cpu-meta": lambda: (ones(3, 4), ones(4, 2, device="meta")),
    "meta-shape": lambda: (ones(3, 4, device="meta"), ones(5, 2, device="meta")),
    "meta-rank-1": lambda: (ones(4, device="meta"), ones(4, 2, device="meta")),
    "meta-rank-3": lambda: (ones(3, 4, device="meta"), ones(1, 4, 2, device="meta")),
    "meta-dtype": lambda: (ones(3, 4, device="meta"), ones(4, 2, device="meta").double()),
    "meta-int": lambda: (ones(3, 4, device="meta").int(), ones(4, 2, device="meta")),
    "sparse-shape": lambda: (ones(3, 4).to_sparse(), ones(5, 2)),
    "sparse-rank": lambda: (ones(3, 4).to_sparse(), ones(4)),
    "sparse-dtype": lambda: (ones(3, 4).to_sparse(), ones(4, 2).double()),
    "dense-sparse": lambda: (ones(2, 3), ones(5, 4).to_sparse()),
    "sparse-sparse": lambda: (ones(3, 4).to_sparse(), ones(3, 4).to_sparse()),
    "sparse-meta": lambda: (ones(3, 4).to_sparse(), ones(4, 2, device="meta")),
    "mkldnn-dense": lambda: (ones(3, 4).to_mkldnn(), ones(4, 2)),
    "mkldnn-shape": lambda: (ones(3, 4).to_mkldnn(), ones(5, 2).to_mkldnn()),
}
OTHERS: dict[str, Operands] = {
    "number": lambda: (ones(3, 4), 3),
    "float": lambda: (2.0, ones(3, 4)),
    "none-first": lambda: (None, ones(3, 4)),
    "none-second": lambda: (ones(3, 4), None),
    "list": lambda: (ones(3, 2), [[1.0, 2.0], [3.0, 4.0]]),
    "array": lambda: (ones(3, 4).numpy(), ones(4, 2)),
    "text": lambda: ("a", "b"),
    "type": lambda: (torch.Tensor, ones(4, 2)),
    "no-arguments": lambda: (),
    "one-argument": lambda: (ones(3, 4),),
    "three-arguments": lambda: (ones(3, 4), ones(4, 2), ones(3, 2)),
}
KEYS = [key for name, key in vars(torch._C.DispatchKey).items() if isinstance(key, torch._C.DispatchKey)]


def outcome(call: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[str, str]:
    """(type, message) of the error, or what came back."""
    try:
        result = call(*arguments)
    except Exception as error:
        return type(error).__name__, str(error)
    return "no error", f"{result.dtype} {tuple(result.shape)} {result.layout} {result.device}"


def differentiable(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same with requires_grad on every tensor that can have it."""
    return tuple(
        x.requires_grad_() if isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex()) else x
        for x in arguments
    )


def dispatch_state() -> tuple[Any, ...]:
    return (
        [torch._C._dispatch_tls_is_dispatch_key_excluded(key) for key in KEYS],
        [torch._C._dispatch_tls_is_dispatch_key_included(key) for key in KEYS],
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.autograd.forward_ad._is_fwd_grad_enabled(),
    )


def assert_untouched(arguments: tuple[Any, ...], before: list[Any]) -> None:
    """Each tensor has the version, values, graph and gradient that it had."""
    for x, (version, values, needs) in zip(arguments, before, strict=True):
        if isinstance(x, Tensor):
            assert (x._version, x.requires_grad) == (version, needs)
            assert x.grad is None
            assert x.grad_fn is None
            if values is not None:
                assert torch.equal(x.detach(), values)


def snapshot(arguments: tuple[Any, ...]) -> list[Any]:
    def one(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return None, None, None
        comparable = x.device.type == "cpu" and x.layout == torch.strided and x.numel() < 1000
        comparable &= x.dtype != torch.float8_e4m3fn
        return x._version, x.detach().clone() if comparable else None, x.requires_grad

    return [one(x) for x in arguments]


def assert_good_call_works() -> None:
    a, b = ones(3, 4).requires_grad_(), ones(4, 2).requires_grad_()
    for mm in (matmul_grad.mm, OPERATOR):
        da, db = torch.autograd.grad(mm(a, b).sum(), (a, b))
        assert_same_bits(da, torch.full((3, 4), 2.0))
        assert_same_bits(db, torch.full((4, 2), 3.0))
        assert not mm(a.detach(), b.detach()).requires_grad


@pytest.mark.parametrize("mm", WAYS)
@pytest.mark.parametrize("grad", [False, True], ids=["constants", "requires_grad"])
@pytest.mark.parametrize("name", TENSORS)
def test_bad_operands(name: str, grad: bool, mm: Callable[..., Tensor]) -> None:
    expected = outcome(torch.mm, differentiable(TENSORS[name]()) if grad else TENSORS[name]())
    arguments = differentiable(TENSORS[name]()) if grad else TENSORS[name]()
    before, state = snapshot(arguments), dispatch_state()
    assert outcome(mm, arguments) == expected
    assert_untouched(arguments, before)
    assert dispatch_state() == state
    assert_good_call_works()


@pytest.mark.parametrize("name", OTHERS)
def test_non_tensor_raises_typeerror(name: str) -> None:
    state = dispatch_state()
    actual, expected = outcome(matmul_grad.mm, OTHERS[name]()), outcome(torch.mm, OTHERS[name]())
    if name.endswith(("arguments", "argument")):  # Python counts them itself, in words of its own
        actual, expected = actual[:1], expected[:1]
    assert actual == expected
    assert dispatch_state() == state
    assert_good_call_works()


@pytest.mark.parametrize("name", OTHERS)
def test_operator_raises_the_error_of_torch_operators_for_other_objects(name: str) -> None:
    """torch.ops checks arguments against the schema, in words of its own."""
    kind, text = outcome(torch.ops.aten.mm.default, OTHERS[name]())
    state = dispatch_state()
    assert outcome(OPERATOR.default, OTHERS[name]()) == (kind, text.replace("aten::mm", "matmul_grad::mm"))
    assert dispatch_state() == state
    assert_good_call_works()


def test_a_wrong_keyword_is_an_error() -> None:
    with pytest.raises(TypeError):
        matmul_grad.mm(ones(3, 4), other=ones(4, 2))
    assert_same_bits(matmul_grad.mm(input=ones(3, 4), mat2=ones(4, 2)), torch.full((3, 2), 4.0))
    assert_same_bits(OPERATOR(self=ones(3, 4), mat2=ones(4, 2)), torch.full((3, 2), 4.0))


@pytest.mark.parametrize("mask", [(True, True), (True, False), (False, True)], ids=["both", "a", "b"])
@pytest.mark.parametrize("sizes", [((3, 3), (3, 4), (4, 2)), ((2, 2), (3, 4), (4, 2)), ((3, 2), (3, 4), (4,))])
def test_backward_of_shapes_that_do_not_fit(sizes: Any, mask: tuple[bool, bool]) -> None:
    grad, a, b = (ones(*size) for size in sizes)
    theirs = [lambda: torch.mm(grad, b.t())] * mask[0] + [lambda: torch.mm(a.t(), grad)] * mask[1]
    expected = next((said for said in (outcome(one, ()) for one in theirs) if said[0] != "no error"), None)

    def backward() -> Tensor:
        return next(x for x in matmul_grad.mm_backward(grad, a, b, mask) if x is not None)

    actual = outcome(backward, ())
    assert actual == expected if expected else actual[0] == "no error"
    assert_good_call_works()


def test_error_in_backward_leaves_no_gradient() -> None:
    a, b = ones(3, 4).requires_grad_(), ones(4, 2).requires_grad_()
    c = matmul_grad.mm(a, b)
    with pytest.raises(RuntimeError, match="Mismatch in shape"):
        c.backward(ones(2, 3))
    assert a.grad is None
    assert b.grad is None
    assert_good_call_works()


MODE = """
import sys, torch, matmul_grad
from torch.utils._python_dispatch import TorchDispatchMode

class Stop(Exception):
    pass

def stop(*_):
    raise Stop("as raised")

class Mode(TorchDispatchMode):
    __torch_dispatch__ = stop

def hooked(mm, a, b):
    with torch.autograd.graph.saved_tensors_hooks(stop, stop):
        mm(a, b)

def moded(mm, a, b):
    with Mode():
        mm(a, b)

class Subclass(torch.Tensor):
    __torch_dispatch__ = classmethod(stop)

def subclassed(mm, a, b):
    mm(a.detach().as_subclass(Subclass).requires_grad_(needs), b)

place, needs = sys.argv[1], sys.argv[2] == "grad"
for mm in (matmul_grad.mm, torch.ops.matmul_grad.mm):
    a, b = torch.ones(3, 4, requires_grad=needs), torch.ones(4, 2, requires_grad=needs)
    assert mm(a, b).tolist() == [[4.0, 4.0]] * 3
    try:
        {"hook": hooked, "mode": moded, "subclass": subclassed}[place](mm, a, b)
        sys.exit("nothing raised")
    except Stop as error:
        assert str(error) == "as raised", error
    assert mm(a, b).tolist() == [[4.0, 4.0]] * 3
    assert mm(a, b).requires_grad == needs
"""


PLACES = [("hook", "grad"), ("mode", "grad"), ("mode", "no-grad"), ("subclass", "grad"), ("subclass", "no-grad")]


@pytest.mark.parametrize("place,needs", PLACES)
def test_exception_of_a_user_hook_passes_through(place: str, needs: str) -> None:
    """Raised by a hook or a mode below the operator; in a process of its own, since it may end there."""
    done = processes.run(MODE, arguments=(place, needs))
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr[-2000:]}"
