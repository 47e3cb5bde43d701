"""An exception raised below an operator arrives as it was raised, the object itself, and nothing is kept of it."""

import contextlib
import gc
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import matmul_grad

own = torch.ops.matmul_grad


class Late(BaseException):
    """No subclass of Exception."""


class Refuse(TorchDispatchMode):
    """Raises where a product comes by."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        if "mm" in str(operator):
            raise self.error
        return operator(*arguments, **(named or {}))


def square(requires_grad: bool = False, batch: tuple[int, ...] = ()) -> Tensor:
    return torch.ones(*batch, 2, 2, requires_grad=requires_grad)


CALLS: dict[str, Callable[[bool], Any]] = {
    "mm": lambda grad: own.mm(square(grad), square()),
    "bmm": lambda grad: own.bmm(square(grad, (1,)), square(False, (1,))),
    "addmm": lambda grad: own.addmm(square(), square(grad), square()),
    "baddbmm": lambda grad: own.baddbmm(square(False, (1,)), square(grad, (1,)), square(False, (1,))),
    "mm_backward": lambda grad: own.mm_backward(square(grad), square(), square(), [True, True]),
    "vmap": lambda grad: torch.vmap(own.mm, (0, None))(square(grad, (3,)), square()),
    "func": lambda grad: torch.func.grad(lambda x: own.mm(x, x).sum())(square()),
}


@pytest.mark.parametrize("error", [KeyError("mine"), MemoryError("no more"), Late("time is up")], ids=repr)
@pytest.mark.parametrize("grad", [False, True], ids=["plain", "recorded"])
@pytest.mark.parametrize("name", CALLS)
def test_exception_of_a_mode_is_not_changed(name: str, grad: bool, error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, Refuse(error):
        CALLS[name](grad)
    assert caught.value is error


def test_exception_in_backward_is_not_changed() -> None:
    error = Late("in backward")
    x = square(True)
    loss = own.mm(x, x).sum()
    with pytest.raises(Late) as caught, Refuse(error):
        loss.backward()
    assert caught.value is error


def test_a_hook_that_raises_while_an_operand_is_saved() -> None:
    error = LookupError("while packing")

    def pack(_: Tensor) -> Tensor:
        raise error

    for call in (own.mm, matmul_grad.mm, matmul_grad.matmul):
        with pytest.raises(LookupError) as caught, torch.autograd.graph.saved_tensors_hooks(pack, pack):
            call(square(True), square(True))
        assert caught.value is error


@pytest.mark.parametrize(
    ("ours", "theirs", "operands"),
    [
        ("mm", torch.mm, (torch.ones(3), torch.ones(3, 2))),
        ("mm", torch.mm, (torch.ones(3, 4), torch.ones(5, 2))),
        ("mm", torch.mm, (torch.ones(3, 4), torch.ones(4, 2).double())),
        ("bmm", torch.bmm, (torch.ones(3, 4), torch.ones(4, 2))),
        ("bmm", torch.bmm, (torch.ones(2, 3, 4), torch.ones(3, 4, 2))),
        ("addmm", torch.addmm, (torch.ones(7), torch.ones(3, 4), torch.ones(4, 2))),
        ("baddbmm", torch.baddbmm, (torch.ones(7), torch.ones(1, 3, 4), torch.ones(1, 4, 2))),
    ],
)
def test_operator_raises_torch_error(
    ours: str, theirs: Callable[..., Tensor], operands: tuple[Tensor, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Exception) as expected:
        theirs(*operands)
    for grad in (False, True):
        with pytest.raises(type(expected.value)) as caught:
            getattr(own, ours)(*(x.requires_grad_(grad) for x in operands))
        assert str(caught.value) == str(expected.value)
    assert capfd.readouterr().err == ""  # torch 2.11 and 2.12 would print a C++ trace of what its C ABI catches


def test_a_compiled_graph_under_checkpoint() -> None:
    """Its recomputation ends by an exception, raised by a hook below the operator."""
    layers = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    model = torch.compile(matmul_grad.convert(layers), backend="eager")
    checkpoint(model, torch.randn(3, 8), use_reentrant=False).sum().backward()
    assert all(p.grad is not None for p in layers.parameters())


def test_a_failed_step_keeps_nothing() -> None:
    def step() -> None:
        activations = torch.zeros(1000)
        seen.append(weakref.ref(activations))
        loss = own.mm(square(True), square(True)).sum()
        with Refuse(MemoryError("no more")):
            loss.backward()

    seen: list[Any] = []
    with contextlib.suppress(MemoryError):
        step()
    gc.collect()
    assert seen[0]() is None


def test_operands_of_a_failed_call_are_released() -> None:
    operand = torch.ones(2, 3)
    before = sys.getrefcount(operand)
    for _ in range(100):
        with pytest.raises(RuntimeError):
            own.mm(operand, operand)
    storage = weakref.ref(operand.untyped_storage())
    gc.collect()
    assert sys.getrefcount(operand) == before
    assert storage is not None


def test_each_thread_has_its_own_exception() -> None:
    caught: dict[int, BaseException] = {}

    def fail(index: int) -> None:
        for _ in range(50):
            try:
                with Refuse(KeyError(index)):
                    own.mm(square(), square())
            except KeyError as error:
                caught[index] = error

    threads = [threading.Thread(target=fail, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {index: error.args for index, error in caught.items()} == {index: (index,) for index in range(4)}
