"""The operators as torch sees them: schemas, opcheck, shapes for tracing, FLOPs, and no warning at the first call."""

from collections.abc import Callable

import pytest
import torch
import torch._dynamo.testing
from pairs import DOUBLE, MM, MM_BACKWARD, assert_close, pair
from processes import assert_runs
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import matmul_grad
from matmul_grad import ops
from matmul_grad.testing import normal

compiles = pytest.mark.filterwarnings("ignore:.*torch.jit.*")
# Since torch 2.15 opcheck reads .grad of the views that it makes of its operands.
reads_grad = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


# --- registration --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ops.SCHEMAS, *ops.COMPOSED_SCHEMAS, "mm_backward"])
def test_compiled_kernels_are_registered(name: str) -> None:
    assert ops.native_status() == ""
    dump = torch._C._dispatch_dump(f"matmul_grad::{name}")
    for key in ("CPU", "AutogradCPU"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"matmul_grad::{name}", key)
        assert f"\n{key}: registered at matmul_grad:0" in dump, dump


def test_schemas() -> None:
    assert str(MM.default._schema) == "matmul_grad::mm(Tensor self, Tensor mat2) -> Tensor"
    for name in ("addmm", "baddbmm"):
        schema = str(getattr(torch.ops.matmul_grad, name).default._schema)
        assert schema.endswith(" *, float beta=1., float alpha=1.) -> Tensor")
    assert str(MM_BACKWARD.default._schema) == (
        "matmul_grad::mm_backward(Tensor grad, Tensor self, Tensor mat2, bool[2] output_mask) -> (Tensor?, Tensor?)"
    )
    for operator in (*(getattr(torch.ops.matmul_grad, name).default for name in ops.SCHEMAS), MM_BACKWARD.default):
        assert torch.Tag.pt2_compliant_tag in operator.tags
        assert torch.Tag.needs_fixed_stride_order in operator.tags


@reads_grad
@compiles
@pytest.mark.parametrize("needs", [True, False], ids=["requires_grad", "constants"])
@pytest.mark.parametrize("transposed", [True, False], ids=["TT", "NN"])
def test_opcheck_mm(transposed: bool, needs: bool) -> None:
    a, b = pair()
    operands = (b.t(), a.t()) if transposed else (a, b)
    checked = opcheck(MM, tuple(x.detach().requires_grad_(needs) for x in operands))
    assert set(checked.values()) == {"SUCCESS"}
    assert len(checked) == 4


def batches(*shape: int, seed: int) -> Tensor:
    return normal(1, torch.Size(shape).numel(), DOUBLE, seed).view(shape)


OPERANDS = {
    "bmm": lambda: (batches(2, 3, 4, seed=1), batches(2, 4, 2, seed=2).mT.contiguous().mT),
    "addmm": lambda: (batches(2, seed=3), *pair()),
    "baddbmm": lambda: (batches(3, 1, seed=3), batches(2, 3, 4, seed=1), batches(2, 4, 2, seed=2)),
    "matmul": lambda: (batches(2, 3, 4, seed=1), batches(4, 2, seed=2)),
    "linear": lambda: (batches(2, 3, 4, seed=1), batches(2, 4, seed=2), batches(2, seed=3)),
}


COMPOSED: list[tuple[str, dict[str, float]]] = [("matmul", {}), ("linear", {})]


@reads_grad
@compiles
@pytest.mark.parametrize("needs", [True, False], ids=["requires_grad", "constants"])
@pytest.mark.parametrize(
    ("name", "scales"), [("bmm", {}), ("addmm", {}), ("baddbmm", {"beta": 0.5, "alpha": 2.0}), *COMPOSED]
)
def test_opcheck(name: str, scales: dict[str, float], needs: bool) -> None:
    operands = tuple(x.detach().requires_grad_(needs) for x in OPERANDS[name]())
    checked = opcheck(getattr(torch.ops.matmul_grad, name), operands, scales)
    assert set(checked.values()) == {"SUCCESS"}
    assert len(checked) == 4


def test_opcheck_scaled_mm() -> None:
    a, one = torch.ones(16, 32).to(torch.float8_e4m3fn), torch.tensor(1.0)
    checks = "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"  # test_schema multiplies by 0
    checked = opcheck(torch.ops.matmul_grad.scaled_mm, (a, a.t(), one, one, torch.bfloat16), test_utils=checks)
    assert set(checked.values()) == {"SUCCESS"}


def test_every_operator_is_checked() -> None:
    """Those with a name of their own; the others are ways of theirs into Python."""
    public = {name for name in dir(torch.ops.matmul_grad) if not name.startswith("_")} - {"name"}
    known = torch._C._dispatch_get_all_op_names()
    public |= {name.split("::")[1] for name in known if name.startswith("matmul_grad::") and "::_" not in name}
    # in test_activations, test_gated, test_conv_compile, test_grouped, test_out_dtype
    elsewhere = {"addmm_activation", "addmm_gated", "convolution", "convolution_weight_gradient", "grouped_mm"}
    elsewhere |= {f"{name}_dtype" for name in ops.SCHEMAS}
    assert public == {"mm", "mm_backward", "scaled_mm", *elsewhere, *OPERANDS}


@compiles
@pytest.mark.parametrize("mask", [[True, True], [True, False], [False, True]], ids=["both", "a", "b"])
def test_opcheck_mm_backward(mask: list[bool]) -> None:
    checked = opcheck(MM_BACKWARD, (normal(3, 2, DOUBLE), *pair(), mask))
    assert set(checked.values()) == {"SUCCESS"}
    assert len(checked) == 4


def test_backward_mask() -> None:
    (a, b), grad = pair(), normal(3, 2, DOUBLE, seed=3)
    da, db = matmul_grad.mm_backward(grad, a, b)
    assert_close((da, db), (grad @ b.t(), a.t() @ grad))
    for mask in ((True, False), (False, True), (False, False)):
        for result in (matmul_grad.mm_backward(grad, a, b, mask), MM_BACKWARD(grad, a, b, list(mask))):
            for wanted, one, whole in zip(mask, result, (da, db), strict=True):
                assert (one is not None) == wanted
                assert one is None or torch.equal(one, whole)


# --- shapes for tracing --------------------------------------------------------------------------------------

TRACED = """
import sys, torch, matmul_grad
from torch._subclasses.fake_tensor import FakeTensorMode

matmul_grad.mm(torch.ones(1, 1), torch.ones(1, 1))

def outcome(mm, *shapes):
    try:
        result = mm(*(torch.empty(shape) for shape in shapes))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return f"{result.shape} {result.stride()} {result.dtype} {result.device}"

SHAPES = [((3, 4), (4, 2)), ((0, 4), (4, 2)), ((3, 0), (0, 2)), ((4,), (4, 2)), ((), (4, 2)), ((3, 4), (1, 4, 2)),
          ((3, 4), (5, 2))]
with FakeTensorMode() if sys.argv[1] == "fake" else torch.device("meta"):
    for shapes in SHAPES:
        expected = outcome(torch.mm, *shapes)
        for mm in (matmul_grad.mm, torch.ops.matmul_grad.mm):
            actual = outcome(mm, *shapes)
            if actual != expected:
                print(f"{mm} {shapes}: {actual!r}, torch {expected!r}", flush=True)
"""


@pytest.mark.parametrize("mode", ["fake", "meta"])
def test_traced_shapes_and_errors_match_torch(mode: str) -> None:
    """In a process of its own: an error raised in Python below the compiled kernel is where that may end."""
    assert assert_runs(TRACED, "-W", "error", arguments=(mode,), quiet=False) == ""


def test_fake_result_is_contiguous_for_every_layout() -> None:
    a, b = pair()
    with matmul_grad.strict(), FakeTensorMode() as mode:  # a shape is no product: strict() lets it pass
        fake = MM(mode.from_tensor(b).t(), mode.from_tensor(a).t())
    real = MM(b.t(), a.t())
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)
    assert real.is_contiguous()


@pytest.mark.parametrize("mm", [matmul_grad.mm, MM, MM.default], ids=["mm", "packet", "overload"])
def test_flops(mm: Callable[[Tensor, Tensor], Tensor]) -> None:
    a, b = pair(3, 2, 4, needs=True)
    with FlopCounterMode(display=False) as forward:
        c = mm(a, b)
    with FlopCounterMode(display=False) as backward:
        c.sum().backward()
    with FlopCounterMode(display=False) as both:
        matmul_grad.mm_backward(normal(3, 2, DOUBLE), *pair())
    assert forward.get_total_flops() == 2 * 3 * 2 * 4
    assert backward.get_total_flops() == both.get_total_flops() == 2 * 2 * 3 * 2 * 4


# --- fresh processes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("needs", [False, True], ids=["no-gradient", "gradient"])
def test_first_call_brings_no_warning(needs: bool) -> None:
    printed = assert_runs(
        f"""
        import torch, matmul_grad
        a, b = torch.ones(3, 4, requires_grad={needs}), torch.ones(4, 2, requires_grad={needs})
        for mm in (torch.ops.matmul_grad.mm, matmul_grad.mm):
            c = mm(a, b)
            if c.requires_grad:
                c.sum().backward(create_graph=False)
        print(c.tolist(), a.grad is not None)
        """,
        "-W", "error",
    )  # fmt: skip
    assert printed == f"{[[4.0, 4.0]] * 3} {needs}\n"
