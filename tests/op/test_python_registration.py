"""The registration in Python, which stands in where torch's C ABI lacks a function."""

from processes import assert_runs

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
