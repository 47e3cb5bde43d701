"""What the override keeps: nothing of a call, nothing of on and off, inside transforms too."""

import sys
import weakref

import pytest
import torch
from processes import assert_runs, linux

import matmul_grad

pytestmark = pytest.mark.usefixtures("off_before_and_after")

LEAK = """
def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) << 10
def new(*sizes, dtype=torch.float32):
    return torch.ones(sizes or (1, 1), dtype=dtype)
def fail():
    try:
        torch.mm(new(), new(2, 2))
    except RuntimeError:
        pass
calls = [
    lambda: torch.mm(new(), new()), lambda: torch.mm(new(), new(), out=new()),
    lambda: torch.mm(new(), new(), out=new(0)), lambda: torch.ops.aten.mm(new(), new()),
    lambda: torch.addmm(new(1), new(), new(), beta=2, alpha=0.5), lambda: torch.addmm(new(), new(), new(), out=new()),
    lambda: new().addmm_(new(), new(), beta=0), lambda: torch.bmm(new(1, 1, 1), new(1, 1, 1)),
    lambda: torch.baddbmm(new(), new(1, 1, 1), new(1, 1, 1), out=new(1, 1, 1)),
    lambda: torch.mm(new(dtype=torch.int64), new(dtype=torch.int64)), lambda: torch.mm(new(1, 0), new(0, 1)),
]
def repeat(count):
    for _ in range(count):
        for call in calls:
            call()
    for _ in range(count // 20):
        fail()
with matmul_grad.enabled():
    repeat(500)
    before = resident()
    repeat(10_000)
    print(resident() - before)
for _ in range(100):
    with matmul_grad.enabled():
        pass
before = resident()
for _ in range(2500):
    with matmul_grad.enabled():
        pass
print(resident() - before)
"""


@linux
def test_override_leaks_no_memory() -> None:
    """Tensors are taken off torch's stack by address: 10 000 calls would show the loss of one in each."""
    calls, flips = map(int, assert_runs(LEAK).split())
    assert calls < 1 << 20
    assert flips < 1 << 19


def test_results_and_operands_live_as_in_torch() -> None:
    with matmul_grad.enabled():
        a, b, out = torch.ones(3, 4), torch.ones(4, 2), torch.empty(3, 2)
        counts = sys.getrefcount(a), sys.getrefcount(out)
        storage = weakref.ref(torch.mm(a, b).untyped_storage())
        assert storage() is None
        assert torch.mm(a, b, out=out) is out
        assert out.addmm_(a, b) is out
        assert torch.ops.aten.addmm_(out, a, b) is out
        assert (sys.getrefcount(a), sys.getrefcount(out)) == counts
        assert (a.sum().item(), b.sum().item(), out.sum().item()) == (12.0, 8.0, 72.0)


@pytest.mark.parametrize("transform", ["grad", "vjp", "jvp", "jacrev", "hessian", "vmap", "functionalize", "compile"])
def test_on_and_off_inside_what_is_transformed(transform: str) -> None:
    """The first time in a process, too: what the registration needs is made outside of every transform."""
    assert_runs(
        f"""
        import warnings
        warnings.simplefilter("ignore")

        def first(x):
            matmul_grad.enable()
            y = (x @ x).sum()
            matmul_grad.disable()
            return y

        def second(x):
            with matmul_grad.enabled():
                return (x @ x).sum()

        def result(f):
            name, x = {transform!r}, torch.tensor([[1.0, 2.0], [3.0, 4.0]])
            if name == "vjp":
                return torch.func.vjp(f, x)[1](torch.tensor(1.0))[0]
            if name == "jvp":
                return torch.func.jvp(f, (x,), (x,))[1]
            if name == "compile":
                return torch.compile(f, backend="eager")(x)
            return getattr(torch.func, name)(f)(x[None] if name == "vmap" else x)

        expected = result(lambda x: (x @ x).sum())
        assert matmul_grad.info()["accelerated"] == {{}}
        for f in (first, second):
            assert torch.equal(result(f), expected)
            assert matmul_grad.info()["on"] == []
        assert sum(matmul_grad.info()["accelerated"]["bmm" if {transform!r} == "vmap" else "mm"].values()) >= 2
        """
    )
