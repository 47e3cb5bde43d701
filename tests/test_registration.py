"""The operators as torch sees them: schemas, shapes for tracing, FLOPs, compilation, hand-over, both registrations."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from functorch.compile import make_boxed_func
from limits import scaled
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import matmul_grad
from matmul_grad import ops
from matmul_grad.testing import assert_same_bits, integers, normal

MM, MM_BACKWARD = torch.ops.matmul_grad.mm, torch.ops.matmul_grad.mm_backward
DOUBLE = torch.float64
# The compilers script and trace with parts of torch that torch itself has deprecated.
compiles = pytest.mark.filterwarnings("ignore:.*torch.jit.*")
# Since torch 2.15 opcheck reads .grad of the views that it makes of its operands.
reads_grad = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


def pair(m: int = 3, n: int = 2, k: int = 4, needs: bool = False) -> tuple[Tensor, Tensor]:
    a, b = normal(m, k, DOUBLE, seed=1), normal(k, n, DOUBLE, seed=2)
    return a.requires_grad_(needs), b.requires_grad_(needs)


def assert_close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def assert_runs(code: str, *options: str, arguments: tuple[str, ...] = (), quiet: bool = True) -> str:
    """A fresh interpreter runs ``code`` and ends well, without a word on stderr if ``quiet``; what it printed."""
    command = [sys.executable, *options, "-c", textwrap.dedent(code), *arguments]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=scaled(240))
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr[-3000:]}"
    assert done.stderr == "" or not quiet
    return done.stdout


# --- registration -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ops.SCHEMAS, "mm_backward"])
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
}


@reads_grad
@compiles
@pytest.mark.parametrize("needs", [True, False], ids=["requires_grad", "constants"])
@pytest.mark.parametrize(("name", "scales"), [("bmm", {}), ("addmm", {}), ("baddbmm", {"beta": 0.5, "alpha": 2.0})])
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
    assert public == {"mm", "mm_backward", "scaled_mm", *OPERANDS}


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


# --- shapes for tracing -------------------------------------------------------------------------------------


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
def test_traced_shapes_and_errors_are_torchs(mode: str) -> None:
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


# --- compilation --------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@compiles
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
def test_compile_fullgraph(dynamic: bool | None) -> None:
    def loss(mm: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
        return torch.relu(mm(x * 2, y.t())).pow(2).sum()

    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(lambda x, y: loss(matmul_grad.mm, x, y), fullgraph=True, dynamic=dynamic, backend=counter)
    for size in (3, 5, 8):
        x, y = normal(size, 7, DOUBLE).requires_grad_(), normal(size + 1, 7, DOUBLE).requires_grad_()
        value, expected = compiled(x, y), loss(torch.mm, x, y)
        assert_close(value, expected)
        assert_close(torch.autograd.grad(value, (x, y)), torch.autograd.grad(expected, (x, y)))
        with torch.no_grad():
            assert_close(compiled(x, y), expected)
    assert counter.frame_count <= {None: 4, True: 2}[dynamic]  # with and without gradients, twice if automatic


@compiles
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_graph_holds_the_operators() -> None:
    graphs: dict[str, list[Any]] = {"forward": [], "backward": []}

    def keep(name: str):
        def compiler(graph, _):
            graphs[name] += [node.target for node in graph.graph.nodes if node.op == "call_function"]
            return make_boxed_func(graph.forward)

        return compiler

    backend = torch._dynamo.backends.common.aot_autograd(fw_compiler=keep("forward"), bw_compiler=keep("backward"))
    x, y = pair(needs=True)
    torch.compile(matmul_grad.mm, fullgraph=True, backend=backend)(x, y).sum().backward()
    assert graphs["forward"].count(MM.default) == 1
    assert graphs["backward"].count(MM.default) == 2
    assert not {torch.ops.aten.mm.default} & {*graphs["forward"], *graphs["backward"]}


@compiles
@pytest.mark.usefixtures("fresh_compiler")
def test_compile_mm_backward_and_transforms() -> None:
    (a, b), grad = pair(), normal(3, 2, DOUBLE, seed=3)
    compiled = torch.compile(matmul_grad.mm_backward, fullgraph=True)
    assert_close(compiled(grad, a, b), (grad @ b.t(), a.t() @ grad))

    def gradient(mm: Callable[[Tensor, Tensor], Tensor]):
        return torch.func.grad(lambda x, y: mm(x, y).sin().sum(), (0, 1))

    assert_close(torch.compile(gradient(matmul_grad.mm), fullgraph=True)(a, b), gradient(torch.mm)(a, b))


@compiles
def test_export_with_a_dynamic_dimension() -> None:
    class Product(torch.nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return matmul_grad.mm(x, y)

    a, b = pair(7)
    rows = torch.export.Dim("rows")
    program = torch.export.export(Product(), (a, b), dynamic_shapes={"x": {0: rows}, "y": None})
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert MM.default in targets
    for m in (2, 3, 7):
        assert_same_bits(program.module()(a[:m], b), matmul_grad.mm(a[:m], b))


# --- what goes to torch -------------------------------------------------------------------------------------

HANDED_OVER: dict[str, Callable[[Tensor], Tensor]] = {
    "int8": lambda x: x.to(torch.int8),
    "int64": lambda x: x.to(torch.int64),
    "uint8": lambda x: x.abs().to(torch.uint8),
    "int32": lambda x: x.to(torch.int32),
    "complex64": lambda x: torch.complex(x, x + 1).to(torch.complex64),
    "complex128": lambda x: torch.complex(x, x + 1),
    "conjugate": lambda x: torch.complex(x, x + 1).conj(),
    "sparse": lambda x: x.to_sparse(),
    "meta": lambda x: x.to("meta"),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state:UserWarning")  # once in a process
@pytest.mark.parametrize("kind", HANDED_OVER)
def test_handed_over_results_are_torchs(kind: str) -> None:
    a, b = (HANDED_OVER[kind](integers(5, 5, DOUBLE, seed=i)) for i in (1, 2))
    matmul_grad.mm(torch.ones(2, 2), torch.ones(2, 2))  # sparse products once came out empty, but only after this
    for mm in (matmul_grad.mm, MM):
        c, expected = mm(a, b), torch.mm(a, b)
        assert (c.shape, c.dtype, c.layout, c.device) == (
            expected.shape, expected.dtype, expected.layout, expected.device
        )  # fmt: skip
        if kind != "meta":
            assert torch.equal(c.to_dense(), expected.to_dense())


@pytest.mark.parametrize("kind", ["complex64", "complex128", "conjugate", "sparse", "meta"])
def test_handed_over_products_are_differentiable(kind: str) -> None:
    def gradients(mm: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        a, b = (HANDED_OVER[kind](integers(5, 5, DOUBLE, seed=i)).requires_grad_() for i in (1, 2))
        b = b.to_dense().detach().requires_grad_() if kind == "sparse" else b
        c = mm(a, b)
        c.backward(torch.ones_like(c))
        return [a.grad, b.grad]

    for ours, theirs in zip(gradients(matmul_grad.mm), gradients(torch.mm), strict=True):
        assert (ours.dtype, ours.device, ours.shape) == (theirs.dtype, theirs.device, theirs.shape)
        if kind != "meta":
            assert_close(ours.to_dense(), theirs.to_dense())


@pytest.mark.parametrize("kind", [*sorted(HANDED_OVER.keys() - {"meta"}), "bool"])
@pytest.mark.parametrize("mm", [matmul_grad.mm, MM], ids=["mm", "ops"])
def test_strict_refuses_to_hand_over(mm: Callable[[Tensor, Tensor], Tensor], kind: str) -> None:
    make = HANDED_OVER.get(kind, Tensor.bool)
    a, b = (make(integers(5, 5, DOUBLE, seed=i)) for i in (1, 2))
    supported = r"matmul_grad\.strict\(\).*two (dense )?matrices of one dtype.*float32.*float64"
    with matmul_grad.strict(), pytest.raises(RuntimeError, match=supported):
        mm(a, b)


def is_strict() -> bool:
    a = torch.ones(2, 2, dtype=torch.int64)
    try:
        return matmul_grad.mm(a, a).tolist() != [[2, 2], [2, 2]]
    except RuntimeError as error:
        assert "strict()" in str(error)
        return True


def test_strict_nests_decorates_and_restores() -> None:
    assert not is_strict()
    with matmul_grad.strict():
        assert is_strict()
        with pytest.raises(KeyError), matmul_grad.strict():
            raise KeyError
        assert is_strict()
        assert_close(matmul_grad.mm(*pair()), torch.mm(*pair()))
    assert not is_strict()
    decorated = matmul_grad.strict()(is_strict)
    assert (decorated(), decorated(), is_strict()) == (True, True, False)


# --- fresh processes ----------------------------------------------------------------------------------------


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


FALLBACK = """
import torch, matmul_grad
from matmul_grad import ops
from matmul_grad.kernels.cpu import driver
from matmul_grad.kernels.native import torch_layout
from matmul_grad.testing import assert_same_bits, assert_within_budget, cases, exact_product, integers, normal, operands

torch_layout.MANGLED["matmul_grad_check_fail"] = "no_such_function"
for case in cases(("f32", "f64"), products=("forward",), shapes=((0, 3, 2), (3, 2, 0), (7, 65, 9), (97, 101, 403))):
    a, b = operands(case, integers)
    with matmul_grad.strict():
        c = matmul_grad.mm(a.requires_grad_(), b.requires_grad_())
        assert_same_bits(c.detach(), exact_product(a.detach(), b.detach()), case.id)
        da, db = torch.autograd.grad(c.sum(), (a, b))
    ones = torch.ones_like(c)
    assert_same_bits(da, exact_product(ones, b.detach().t()), case.id)
    assert_same_bits(db, exact_product(a.detach().t(), ones), case.id)
assert "no matmul_grad_check_fail" in ops.native_status(), ops.native_status()
assert ops.native_status().startswith(f"torch {torch.__version__} has no ")
assert not torch._C._dispatch_has_kernel_for_dispatch_key("matmul_grad::mm", "CPU")

a, b = normal(30, 700, torch.float32, 1), normal(700, 70, torch.float32, 2)
whole = matmul_grad.mm(a, b)
assert_within_budget(whole, a, b)
for threads in (1, 2, 3):
    torch.set_num_threads(threads)
    assert_same_bits(matmul_grad.mm(a[:7], b), whole[:7])
    assert_same_bits(matmul_grad.mm(b.t(), a.t()).t(), whole)

def outcome(mm, *args):
    try:
        return mm(*args).tolist()
    except Exception as error:
        return type(error), str(error)

for args in ((torch.ones(3), torch.ones(3, 2)), (torch.ones(3, 2), torch.ones(2)), (torch.ones(3, 2), torch.ones(3, 2)),
             (torch.ones(3, 2), torch.ones(2, 2).double()), (torch.ones(2, 2).bool(), torch.ones(2, 2).bool()),
             (torch.ones(3, 2).int(), torch.ones(2, 2).int())):
    for mm in (matmul_grad.mm, torch.ops.matmul_grad.mm):
        assert outcome(mm, *args) == outcome(torch.mm, *args), args
with matmul_grad.strict():
    kind, text = outcome(matmul_grad.mm, torch.ones(2, 2).int(), torch.ones(2, 2).int())
    assert kind is RuntimeError and "strict()" in text and "two" in text and "matrices of one dtype" in text, text

x, y = normal(3, 4, torch.float64, 1).requires_grad_(), normal(4, 2, torch.float64, 2).requires_grad_()
assert torch.autograd.gradcheck(matmul_grad.mm, (x, y)) and torch.autograd.gradgradcheck(matmul_grad.mm, (x, y))
hessian = [torch.func.hessian(lambda x, y: mm(x, y).sin().sum(), (0, 1))(x, y) for mm in (matmul_grad.mm, torch.mm)]
torch.testing.assert_close(*hessian)
compiled = torch.compile(lambda x, y: torch.relu(matmul_grad.mm(x, y)).sum(), fullgraph=True, backend="aot_eager")
grads = [torch.autograd.grad(loss, (x, y)) for loss in (compiled(x, y), torch.relu(x @ y).sum())]
torch.testing.assert_close(*grads)

from dataclasses import replace
from matmul_grad.kernels.cpu import driver, host
from matmul_grad.kernels.native import torch_layout
without = replace(host.cpu(), has_fp16_convert=False)
host.cpu = lambda isa=None: without
for cached in (driver.config, driver.supports):
    cached.cache_clear()
for name in ("bmm", "addmm", "baddbmm"):
    assert not torch._C._dispatch_has_kernel_for_dispatch_key(f"matmul_grad::{name}", "CPU")
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        one, many = normal(3, 4, dtype, 1), normal(12, 4, dtype, 2).view(3, 4, 4)
        operands = (many, many.mT) if "bmm" in name else (one, one.t())
        scales = {"beta": 0.5, "alpha": 2.0} if "add" in name else {}
        operands = (normal(1, 1, dtype, 3), *operands) if scales else operands
        with matmul_grad.strict():
            ours = getattr(matmul_grad, name)(*operands, **scales)
        torch.testing.assert_close(ours, getattr(torch, name)(*operands, **scales))
    operands = tuple(x.double().requires_grad_() for x in operands)
    assert torch.autograd.gradcheck(getattr(matmul_grad, name), operands)
    assert torch.autograd.gradgradcheck(getattr(matmul_grad, name), operands)
for args in ((torch.ones(2), torch.ones(3, 2), torch.ones(3, 2)), (torch.ones(5), torch.ones(3, 2), torch.ones(2, 2)),
             (torch.ones(2), torch.ones(1, 3, 2), torch.ones(1, 2, 2)), [torch.ones(2, 2).int()] * 3):
    assert outcome(matmul_grad.addmm, *args) == outcome(torch.addmm, *args), args
torch.testing.assert_close(matmul_grad.bmm(torch.ones(2, 3, 0), torch.ones(2, 0, 4)), torch.zeros(2, 3, 4))

h = normal(3, 4, torch.float16, 1)
assert_same_bits(matmul_grad.mm(h, h.t()), torch.mm(h, h.t()))
with matmul_grad.strict():
    assert outcome(matmul_grad.mm, h, h.t())[0] is RuntimeError
"""


def test_python_registration_in_place_of_the_native_one() -> None:
    """Where a function of c10 is not to be had: values, gradients, errors, transforms and compilation all hold."""
    # torch.jit's deprecation, in the category of either version.
    assert_runs(FALLBACK, "-W", "ignore::DeprecationWarning", "-W", "ignore::FutureWarning")
