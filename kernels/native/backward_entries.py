"""The compiled backward of products: what torch's C++ nodes call for CPU tensors, and ``matmul_grad::mm_backward``.

    matmul_grad::mm_backward       grad, A, B, mask        gradients of mm and bmm
    aten::matmul_backward          grad, A, B, mask        of two operands, any ranks that are recorded
    aten::linear_backward          A, grad, W, mask        of a linear layer; with a tag for W, of one operand
    aten::mkldnn_linear_backward   A, grad, B, mask        of addmm and baddbmm

torch has the last three for nested tensors and tensors of oneDNN, so nothing is overridden for the CPU. Each entry
computes by ``gradients.py`` where nothing follows the backward, and calls the operator in Python anywhere else. The
gradient of a linear layer's bias is one more product of the same call. That of what is added elsewhere is ``grad``
itself: what was expanded is not known here, and autograd's engine sums to its sizes.
"""

from __future__ import annotations

from collections.abc import Callable

from numba.core import types

from ..cpu.memory import get, jit, put, text
from .gradients import BATCHED, COLUMN, DONE, LINEAR, NEEDS_A, NEEDS_B, NEEDS_SUMS, RAISED, VECTOR, linked_gradients
from .own_entries import ENTRY_SIGNATURE, delete_all, is_autocast, is_direct
from .state import PLAIN_KEYS, TAG_OF_B, TAG_OF_VECTOR, TAG_RANK
from .torch_c_api import (
    delete,
    delete_list,
    delete_tensor,
    forward_results_to,
    is_tensor,
    list_item,
    new,
    out_param,
    raise_pending,
    rank_of,
    state,
    undefined,
)

mm_in_python = text("matmul_grad::_mm_backward_in_python")
matmul_in_python = text("matmul_grad::_matmul_backward_in_python")
linear_in_python = text("matmul_grad::_linear_backward_in_python")
addmm_in_python = text("matmul_grad::_addmm_backward_in_python")


@jit
def is_in_mask(mask, index):
    at = out_param()
    list_item(mask, index, at)
    return (get(at, 0) & 0xFF) != 0


@jit
def optional(tensor):
    """A ``Tensor?`` of the C ABI: 0, or the address of a handle that torch frees."""
    if tensor == 0:
        return 0
    at = new(8)
    put(at, 0, tensor)
    return at


@jit
def required(tensor):
    return tensor if tensor != 0 else undefined()


@jit
def needs_of(mask):
    return (NEEDS_A if is_in_mask(mask, 0) else 0) | (NEEDS_B if is_in_mask(mask, 1) else 0)


@jit
def free(stack):
    delete_all(stack, 3)
    delete_list(get(stack, 3))


@jit
def return_undefined(stack, count):
    free(stack)
    for index in range(count):
        put(stack, index, undefined())


def mm_backward(stack, inputs, outputs):
    returned = out_param()
    form = needs_of(get(stack, 3))
    outcome = linked_gradients(get(stack, 0), get(stack, 1), get(stack, 2), form, returned)
    if outcome == DONE:
        free(stack)
        put(stack, 0, optional(get(returned, 0)))
        put(stack, 1, optional(get(returned, 1)))
    elif outcome == RAISED:
        free(stack)
        raise_pending()
    else:
        forward_results_to(stack, mm_in_python(), 2)


@jit
def require_results(stack, name, count):
    """``forward_results_to``, and ``Tensor`` results, undefined where there is none."""
    forward_results_to(stack, name, count)
    for index in range(count):
        given = get(stack, index)
        if given == 0:
            put(stack, index, undefined())
        else:
            put(stack, index, get(given, 0))
            delete(given)


@jit
def finish(stack, outcome, name, count):
    """What is left to do for an outcome other than DONE."""
    if outcome == RAISED:
        free(stack)
        raise_pending()
    elif outcome != DONE:
        require_results(stack, name, count)


def matmul_backward(stack, inputs, outputs):
    if not is_tensor(get(stack, 0)):
        return_undefined(stack, 2)
        return
    returned = out_param()
    form = needs_of(get(stack, 3))
    outcome = linked_gradients(get(stack, 0), get(stack, 1), get(stack, 2), form, returned)
    if outcome == DONE:
        free(stack)
        put(stack, 0, required(get(returned, 0)))
        put(stack, 1, required(get(returned, 1)))
    finish(stack, outcome, matmul_in_python(), 2)


@jit
def form_of_tag(tag):
    """What is asked for, by the rank of a tag; see ``state.py``."""
    if tag >= TAG_OF_VECTOR:
        return NEEDS_B | (VECTOR if tag == TAG_OF_VECTOR else BATCHED)
    form = NEEDS_B if tag >= TAG_OF_B else NEEDS_A
    return form | (COLUMN if tag & 1 != 0 else 0) | (LINEAR if tag & 2 != 0 else 0)


@jit
def one_gradient(stack, tag):
    """The gradient of the operand that is recorded as a bias, beside its tag; the outcome."""
    returned, form = out_param(), form_of_tag(tag)
    a, b = (get(stack, 0), 0) if form & NEEDS_B != 0 else (0, get(stack, 0))
    outcome = linked_gradients(get(stack, 1), a, b, form, returned)
    if outcome == DONE:
        free(stack)
        put(stack, 0, undefined())
        put(stack, 1, undefined())
        put(stack, 2, get(returned, 1 if form & NEEDS_B != 0 else 0))
    return outcome


@jit
def three_gradients(stack, form):
    """Gradients of A and B, and of what is added: the sums of a bias, or ``grad``; the outcome."""
    returned, grad, mask = out_param(), get(stack, 1), get(stack, 3)
    outcome, is_added = DONE, is_in_mask(mask, 2)
    form |= needs_of(mask)
    if is_added and form & LINEAR != 0:
        form |= NEEDS_SUMS
    for index in range(3):
        put(returned, index, 0)
    if form & (NEEDS_A | NEEDS_B | NEEDS_SUMS) != 0:
        outcome = linked_gradients(grad, get(stack, 0), get(stack, 2), form, returned)
    if outcome == DONE:
        delete_tensor(get(stack, 0))
        delete_tensor(get(stack, 2))
        delete_list(mask)
        sums = get(returned, 2)
        if sums != 0 or not is_added:
            delete_tensor(grad)
        put(stack, 0, required(get(returned, 0)))
        put(stack, 1, required(get(returned, 1)))
        put(stack, 2, sums if sums != 0 else grad if is_added else undefined())
    return outcome


def linear_backward(stack, inputs, outputs):
    if not is_tensor(get(stack, 1)):
        return_undefined(stack, 3)
        return
    tag = rank_of(get(stack, 2)) - TAG_RANK
    outcome = one_gradient(stack, tag) if tag >= 0 else three_gradients(stack, LINEAR)
    finish(stack, outcome, linear_in_python(), 3)


def addmm_backward(stack, inputs, outputs):
    if not is_tensor(get(stack, 1)):
        return_undefined(stack, 3)
        return
    finish(stack, three_gradients(stack, 0), addmm_in_python(), 3)


def mm_backward_autograd(stack, inputs, outputs):
    if is_direct(stack, 3, get(state(), PLAIN_KEYS)):
        linked_mm(stack, inputs, outputs)
    else:
        forward_results_to(stack, mm_in_python(), 2)


def make_autograd_entry(name: str, grad: int, count: int, in_python: Callable) -> Callable:
    """The Autograd key of an operator of aten's: straight on, or the differentiable operator in Python.

    grad   which argument is the gradient: where it is undefined, so are the results
    """
    linked = types.ExternalFunction(name, ENTRY_SIGNATURE)

    def entry(stack, inputs, outputs):
        if not is_tensor(get(stack, grad)):
            return_undefined(stack, count)
        elif is_direct(stack, 3, get(state(), PLAIN_KEYS)) and not is_autocast():
            linked(stack, inputs, outputs)
        else:
            require_results(stack, in_python(), count)

    return entry


linked_mm = types.ExternalFunction("matmul_grad_mm_backward", ENTRY_SIGNATURE)
OF_ATEN: dict[str, tuple[Callable, int, int, Callable]] = {
    "matmul_grad_matmul_backward": (matmul_backward, 0, 2, matmul_in_python),
    "matmul_grad_linear_backward": (linear_backward, 1, 3, linear_in_python),
    "matmul_grad_addmm_backward": (addmm_backward, 1, 3, addmm_in_python),
}
KERNELS: dict[str, tuple[Callable, object]] = {
    "matmul_grad_mm_backward": (mm_backward, ENTRY_SIGNATURE),
    "matmul_grad_mm_backward_autograd": (mm_backward_autograd, ENTRY_SIGNATURE),
    **{name: (entry[0], ENTRY_SIGNATURE) for name, entry in OF_ATEN.items()},
    **{f"{name}_autograd": (make_autograd_entry(name, *entry[1:]), ENTRY_SIGNATURE) for name, entry in OF_ATEN.items()},
}
