"""Products recorded by C++ nodes of torch: no Python in forward or backward.

    MatmulBackward0         both operands need a gradient      aten::matmul(A, B)
    LinearBackward0         likewise, of a linear layer        aten::linear(x, W, bias)
    LinearBackward0         one operand needs one              aten::linear(the other operand, a tag, this operand)
    MkldnnLinearBackward0   both, and something is added       aten::mkldnn_linear(A, B, added)

``record`` calls one of these operators with the dispatch keys of a device that nobody has. torch's autograd kernel
takes the call as from any device that has a kernel for it: it makes the node, saves operands and calls the kernel of
that device, which is the product for CPU tensors. In backward the node calls the operator of ``backward_entries.py``.
What is passed as a bias is not saved: so of one gradient only the operand is saved that it uses, as in torch.

A small product with one gradient to which something is added is that node and torch's addition, which rounds as the
epilogue does. An operand of 16 bits whose gradient is kept in another dtype is left to the operator in Python.
"""

from __future__ import annotations

from collections.abc import Callable

from numba.core import types

from ..cpu.gemm_args import ALPHA, BETA, GEMM_ARGS, ONE
from ..cpu.memory import call_address, get, jit, put, stack_words, text
from .broadcast import linked_matmul
from .call import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    HANDLE,
    RUN,
    item_size,
    linked_compute,
    set_tensors,
    tensor_words,
)
from .gradients import is_column_major, is_column_weight
from .op_table import BATCHES, COMPOSED, OWN, Op
from .op_table import LINEAR as LAYER
from .own_entries import (
    ENTRY_SIGNATURE,
    OWN_SIGNATURE,
    bias_of,
    delete_all,
    delete_operands,
    is_without_modes,
)
from .state import (
    ADD,
    ADDMM,
    GRAD_DTYPE,
    HOOKS,
    KEYS_AT,
    LINEAR,
    MATMUL,
    PLAIN_KEYS,
    RECORD_KEYS,
    SCALE,
    TAG_OF_B,
    TAG_OF_BATCHES,
    TAG_OF_VECTOR,
    TAG_RANK,
    TAGS,
)
from .torch_c_api import (
    DIM,
    INFO,
    delete_tensor,
    describe,
    dtype_of,
    forward_to,
    grad_mode,
    has_driver,
    has_tangent,
    is_tensor,
    is_within_storage,
    new,
    out_param,
    rank_of,
    read_dtype,
    requires_grad,
    size,
    state,
    tensor_info,
    undefined,
)
from .torch_layout import FIRST_HOOK, HAS_DTYPE, NEXT_HOOK

linked_record = types.ExternalFunction("matmul_grad_record", OWN_SIGNATURE)
linked_record_any = types.ExternalFunction("matmul_grad_record_any", OWN_SIGNATURE)
call_hooks, call_grad_dtype = call_address(1), call_address(1)
call_redispatch, call_with_bias, call_add = call_address(4), call_address(5), call_address(4)
args_words = stack_words(GEMM_ARGS)
two_infos, optional_words = stack_words(2 * INFO), stack_words(2)
# Elements of a result: at 128 × 128 a second pass over it costs a tenth of what Python costs.
SMALL = 1 << 15


@jit
def has_hooks():
    """Whether tensors that are saved for backward are passed to a hook: it is Python, and may raise."""
    hooks = call_hooks(get(state(), HOOKS), 0)
    return get(hooks, FIRST_HOOK) != get(hooks, NEXT_HOOK)


@jit
def is_ordinary(tensor):
    """Whether a tensor has the dispatch keys of ``torch.empty(1)``, and no tangent."""
    return get(get(tensor, 0), get(state(), KEYS_AT)) == get(state(), PLAIN_KEYS) and not has_tangent(tensor)


@jit
def is_needed(tensor):
    return requires_grad(get(tensor, 0)) != 0


@jit
def is_kept_otherwise(tensor):
    """Whether the gradient of a tensor of 16 bits is kept in another dtype."""
    dtype = read_dtype(tensor)
    if (dtype != FLOAT16 and dtype != BFLOAT16) or not is_needed(tensor):
        return False
    return (call_grad_dtype(get(state(), GRAD_DTYPE), tensor) & 0xFFFF) != (dtype | HAS_DTYPE)


@jit
def is_recordable(a, b):
    """Whether compiled code may record a product of two operands."""
    if grad_mode() == 0 or not is_ordinary(a) or not is_ordinary(b) or not has_driver(read_dtype(a)):
        return False
    return is_without_modes() and not has_hooks() and not is_kept_otherwise(a) and not is_kept_otherwise(b)


@jit
def is_addend(tensor):
    """Whether compiled code may record what is added to a product: its gradient is a sum in its own dtype."""
    return is_ordinary(tensor) and not is_kept_otherwise(tensor)


@jit
def checked(handle):
    """A handle, or 0 of an undefined tensor, which is what the kernels here return for what they do not compute."""
    if is_tensor(handle):
        return handle
    delete_tensor(handle)
    return 0


@jit
def record_with_bias(operator, a, b, bias):
    """The result of aten::linear or aten::mkldnn_linear for the keys of ``record``, or 0. ``bias`` may be 0."""
    handle, optional = new(8), optional_words()
    put(optional, 0, get(bias, 0) if bias != 0 else 0)
    put(optional, 1, 1 if bias != 0 else 0)
    call_with_bias(get(state(), operator), handle, get(state(), RECORD_KEYS), a, b, optional)
    return checked(handle)


@jit
def tag_of(tensor, is_b, is_linear):
    """Which operand it is whose gradient is recorded, and its memory order."""
    info = tensor_info()
    describe(tensor, info)
    if is_b and get(info, DIM) != 2:
        return TAG_OF_VECTOR if get(info, DIM) == 1 else TAG_OF_BATCHES
    is_column = is_column_weight(info) if is_b and is_linear != 0 else is_column_major(info)
    return (TAG_OF_B if is_b else 0) + 2 * is_linear + is_column


@jit
def record_product(a, b, is_linear):
    """A · B, or A · Bᵀ, with its node; 0 where neither needs a gradient or these kernels do not compute it."""
    needs_a, needs_b = is_needed(a), is_needed(b)
    if not needs_a and not needs_b:
        return 0
    if needs_a and needs_b and is_linear != 0:
        return record_with_bias(LINEAR, a, b, 0)
    if needs_a and needs_b:
        handle = new(8)
        call_redispatch(get(state(), MATMUL), handle, get(state(), RECORD_KEYS), a, b)
        return checked(handle)
    saved, other = (b, a) if needs_a else (a, b)
    return record_with_bias(LINEAR, saved, state() + 8 * (TAGS + tag_of(other, needs_b, is_linear)), other)


@jit
def are_alike(a, b, kind):
    """Whether ranks, and the sizes of a batch, are those of one product of a kind."""
    infos = two_infos()
    info_a, info_b = infos, infos + 8 * INFO
    if not describe(a, info_a) or not describe(b, info_b):
        return False
    rank_a, rank_b = get(info_a, DIM), get(info_b, DIM)
    if kind <= BATCHES and (rank_a != kind or rank_b != kind):
        return False
    if kind == LAYER:
        return rank_a >= 2 and rank_b == 2
    if rank_a < 2 or rank_b == 0:
        return False
    if rank_b <= 2:
        return True
    for index in range(rank_a - 2):
        if rank_a != rank_b or size(info_a, index) != size(info_b, index):
            return False
    return rank_a == rank_b


@jit
def is_addable(added, a, b, is_linear):
    """Whether torch may add to a product with the bits of the epilogue: it is small, and its sums are rounded once."""
    infos, count = two_infos(), 1
    info, info_b = infos, infos + 8 * INFO
    if not describe(a, info) or not describe(b, info_b):
        return False
    for index in range(get(info, DIM) - 1):
        count *= size(info, index)
    n = size(info_b, get(info_b, DIM) - (2 if is_linear != 0 else 1))
    dtype = dtype_of(info)
    if not describe(added, info) or dtype_of(info) != dtype or (dtype != FLOAT32 and dtype != FLOAT64):
        return False
    return count * n <= SMALL and is_within_storage(info, item_size(dtype))


@jit
def expands(info, whole):
    """Whether a tensor can be expanded to the sizes of another."""
    rank, more = get(info, DIM), get(whole, DIM) - get(info, DIM)
    for index in range(rank):
        if more < 0 or (size(info, index) != 1 and size(info, index) != size(whole, more + index)):
            return False
    return more >= 0


@jit
def add(product, added):
    """The sum with its node, in the place of a product; 0 where torch would not add these sizes."""
    infos, handle = two_infos(), 0
    if describe(added, infos) and describe(product, infos + 8 * INFO) and expands(infos, infos + 8 * INFO):
        handle = new(8)
        call_add(get(state(), ADD), handle, product, added, get(state(), SCALE))
    delete_tensor(product)
    return handle


@jit
def record_sum(a, b, added, is_linear):
    """``record_product`` of one gradient and torch's addition, or 0."""
    if not is_addable(added, a, b, is_linear):
        return 0
    handle = record_product(a, b, is_linear)
    return add(handle, added) if handle != 0 else 0


def record(stack, kind, has_addend):
    """mm, bmm, addmm or baddbmm with its graph: 1; 0 where the operator in Python has to.

    The operands belong to the caller until the result is there, so that an error from below would keep them: there is
    none but where no memory is left for the node itself.
    """
    a, b = get(stack, has_addend), get(stack, has_addend + 1)
    if not is_recordable(a, b) or not are_alike(a, b, kind):
        return 0
    if has_addend == 0:
        handle = record_product(a, b, 0)
    elif get(stack, 3) != ONE or get(stack, 4) != ONE or not is_addend(get(stack, 0)):
        return 0
    elif is_needed(a) and is_needed(b):
        handle = record_with_bias(ADDMM, a, b, get(stack, 0))
    else:
        handle = record_sum(a, b, get(stack, 0), 0)
    if handle == 0:
        return 0
    delete_all(stack, 2 + has_addend)
    put(stack, 0, handle)
    return 1


def record_any(stack, inputs, is_linear):
    """As ``record``, of matmul or linear."""
    a, b, bias = get(stack, 0), get(stack, 1), bias_of(stack, inputs)
    if not is_recordable(a, b) or not are_alike(a, b, BATCHES + 1 + is_linear):
        return 0
    if bias == 0:
        handle = record_product(a, b, is_linear)
    elif rank_of(bias) != 1 or not is_addend(bias):
        return 0
    elif is_needed(a) and is_needed(b):
        handle = record_with_bias(LINEAR, a, b, bias)
    else:
        handle = record_sum(a, b, bias, is_linear)
    if handle == 0:
        return 0
    delete_operands(stack, inputs)
    put(stack, 0, handle)
    return 1


def make_tried_entry(op: Op) -> Callable:
    """The Autograd key of ``_mm_recorded`` and the others: as recorded here, to be tried before it is used."""
    kind, has_addend, in_python = op.kind, int(op.has_addend), text(f"matmul_grad::_{op.name}_in_python")

    def entry(stack, inputs, outputs):
        if linked_record(stack, kind, has_addend) == 0:
            forward_to(stack, in_python())

    return entry


def make_tried_composed_entry(op: Op) -> Callable:
    is_linear, in_python = int(op.kind == LAYER), text(f"matmul_grad::_{op.name}_in_python")

    def entry(stack, inputs, outputs):
        if linked_record_any(stack, inputs, is_linear) == 0:
            forward_to(stack, in_python())

    return entry


@jit
def multiply(a, b, bias, is_linear):
    """A product, or an undefined tensor where these kernels do not compute it."""
    returned = out_param()
    if linked_matmul(a, b, bias, is_linear, returned) == RUN:
        return get(returned, HANDLE)
    return undefined()


def matmul(stack, inputs, outputs):
    """``aten::matmul`` for the keys of ``record``."""
    result = multiply(get(stack, 0), get(stack, 1), 0, 0)
    delete_all(stack, 2)
    put(stack, 0, result)


def linear(stack, inputs, outputs):
    """``aten::linear`` for the keys of ``record``: of a layer, or of one operand, a tag, and the other operand."""
    tag, saved, bias = rank_of(get(stack, 1)) - TAG_RANK, get(stack, 0), bias_of(stack, inputs)
    if tag < 0:
        result = multiply(saved, get(stack, 1), bias, 1)
    else:
        is_b = tag >= TAG_OF_B
        is_linear = 1 if tag < TAG_OF_VECTOR and tag & 2 != 0 else 0
        result = multiply(saved if is_b else bias, bias if is_b else saved, 0, is_linear)
    delete_operands(stack, inputs)
    put(stack, 0, result)


def addmm(stack, inputs, outputs):
    """``aten::mkldnn_linear`` for the keys of ``record``: addmm or baddbmm."""
    args, tensors, returned = args_words(), tensor_words(), out_param()
    put(args, BETA, ONE)
    put(args, ALPHA, ONE)
    set_tensors(tensors, get(stack, 0), get(stack, 1), bias_of(stack, inputs), 0)
    done = linked_compute(tensors, args, rank_of(get(stack, 0)), 1, returned) == RUN
    result = get(returned, HANDLE) if done else undefined()
    delete_operands(stack, inputs)
    put(stack, 0, result)


KERNELS: dict[str, tuple[Callable, object]] = {
    "matmul_grad_record": (record, OWN_SIGNATURE),
    "matmul_grad_record_any": (record_any, OWN_SIGNATURE),
    **{f"matmul_grad_{op.name}_recorded_autograd": (make_tried_entry(op), ENTRY_SIGNATURE) for op in OWN},
    **{f"matmul_grad_{op.name}_recorded_autograd": (make_tried_composed_entry(op), ENTRY_SIGNATURE) for op in COMPOSED},
    "matmul_grad_record_matmul": (matmul, ENTRY_SIGNATURE),
    "matmul_grad_record_linear": (linear, ENTRY_SIGNATURE),
    "matmul_grad_record_addmm": (addmm, ENTRY_SIGNATURE),
}
