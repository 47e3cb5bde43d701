"""Memory of a process: the peak of a step, the workspace, and nothing kept by a call."""

import ctypes

import pytest
from processes import assert_computes, linux

from matmul_grad.kernels.cpu import config, host

STEP = """
def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) << 10
torch.set_num_threads({threads})
mm = {mm}
small = torch.ones(8, 8, dtype={dtype}).requires_grad_()
mm(small, small).sum().backward()
a, b = torch.ones({n}, {n}, dtype={dtype}).requires_grad_(), torch.ones({n}, {n}, dtype={dtype}).requires_grad_()
grad = torch.ones({n}, {n}, dtype={dtype})
with open("/proc/self/clear_refs", "w") as peak:
    peak.write("5")  # the peak so far is what is resident now
before = status("VmRSS")
mm(a, b).backward(grad)
print(status("VmHWM") - before)
"""


def bound(threads: int) -> int:
    """What a step may take beyond torch: 6 MiB a thread and half of its part of the last cache, by contract."""
    return threads * ((6 << 20) + host.cpu().l3 // 2)


@linux
@pytest.mark.parametrize("threads,dtype", [(1, "float32"), (2, "float32"), (2, "float64")])
def test_peak_memory_of_a_step(threads: int, dtype: str) -> None:
    grown = {
        mm: int(assert_computes(STEP.format(threads=threads, mm=mm, n=1500, dtype=f"torch.{dtype}")))
        for mm in ("torch.mm", "matmul_grad.mm")
    }
    extra = grown["matmul_grad.mm"] - grown["torch.mm"]
    assert extra <= bound(threads), f"{extra / 2**20:.1f} MiB more than torch's {grown['torch.mm'] / 2**20:.1f}"


ACCUMULATED = """
def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) << 10
torch.set_num_threads(1)
layers = [matmul_grad.Linear(*size, bias=False, dtype={dtype}, accumulate=True) for size in ((8, 8), (1600, 3000))]
for layer in layers:
    if hasattr(layer.weight, "grad_dtype"):
        layer.weight.grad_dtype = torch.float32
    layer.weight.grad = torch.ones(layer.weight.shape)
layers[0](torch.ones(4, 8, dtype={dtype})).backward(torch.ones(4, 8, dtype={dtype}))
a, grad = torch.ones(32, 1600, dtype={dtype}), torch.ones(32, 3000, dtype={dtype})
with open("/proc/self/clear_refs", "w") as peak:
    peak.write("5")
before = status("VmRSS")
layer(a).backward(grad)
print(status("VmHWM") - before)
"""


@linux
@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16"])
def test_an_accumulated_weight_gradient_has_no_temporary(dtype: str) -> None:
    """A step of torch takes a gradient of the weight besides, 18.3 MiB; here it is the workspace."""
    grown = int(assert_computes(ACCUMULATED.format(dtype=dtype)))
    assert grown <= min(bound(1), 12 << 20), f"{grown / 2**20:.2f} MiB"


BROADCAST = """
def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) << 10
torch.set_num_threads({threads})
{setup}
call = lambda: {call}
call()  # loads the kernels, and allocates the workspace
with open("/proc/self/clear_refs", "w") as peak:
    peak.write("5")
before = status("VmRSS")
c = call()
print(status("VmHWM") - before, c.nbytes)
"""
CASES = {
    "one-row": ("a, b = torch.ones(512, 64, 1, 50), torch.ones(64, 50, 50)", "matmul_grad.matmul(a, b)"),
    "rows": ("a, b = torch.ones(512, 64, 4, 50), torch.ones(64, 50, 50)", "matmul_grad.matmul(a, b)"),
    "outer": ("a, b = torch.ones(60, 1, 3, 300), torch.ones(60, 300, 3)", "matmul_grad.matmul(a, b)"),
    "matrix-batch": ("a, b = torch.ones(300, 300), torch.ones(64, 300, 8)", "matmul_grad.matmul(a, b)"),
    "vector": (
        "a, b = torch.ones(900), torch.ones(1, 40, 900, 100).expand(9, 40, 900, 100)",
        "matmul_grad.matmul(a, b)",
    ),
    "heads": ("a, b = (torch.ones(8, 128, 12, 64).transpose(1, 2) for _ in range(2))", "matmul_grad.matmul(a, b.mT)"),
    "sliced-layer": (
        "a, w = torch.ones(64, 128, 700)[:, ::2], torch.ones(9, 700)",
        "matmul_grad.linear(a, w, w[:, 0])",
    ),
    "transposed-layer": ("a, w = torch.ones(128, 64, 700).mT, torch.ones(9, 64)", "matmul_grad.linear(a, w)"),
}


@linux
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_nothing_but_the_result_grows(case: str, threads: int) -> None:
    """Operands that are broadcast or no matrix in memory are read in place. The rest is a page here and there."""
    setup, call = CASES[case]
    grown, result = map(int, assert_computes(BROADCAST.format(threads=threads, setup=setup, call=call)).split())
    assert grown <= result + (512 << 10), f"{grown / 2**20:.2f} MiB for a result of {result / 2**20:.2f}"


@pytest.mark.parametrize("threads", [1, 2])
def test_workspace_does_not_grow_with_the_operands(threads: int) -> None:
    blocks = [config.choose(dtype, host.cpu()) for dtype in ("float32", "float64")]
    for block in blocks:
        assert block.a_bytes <= 6 << 20
        assert block.b_bytes <= host.cpu().l3 // 2
    printed = assert_computes(
        f"""
        from matmul_grad.kernels.cpu import driver
        from matmul_grad.kernels.native import torch_layout
        torch.set_num_threads({threads})
        for m, n, k in ((900, 900, 900), (2200, 2200, 900), (3000, 1500, 2000), (2, 20000, 3000), (20000, 2, 3000)):
            for dtype in (torch.float32, torch.float64):
                matmul_grad.mm(torch.ones(m, k, dtype=dtype), torch.ones(k, n, dtype=dtype))
            print(sum(driver.workspace[3::3]))
        """
    )
    first, *later = map(int, printed.split())
    assert 0 < first <= bound(threads)
    assert set(later) == {first}


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="this C library does not tell what is in use")
def test_backward_leaks_no_memory() -> None:
    """Handles, lists and optional results cross torch's C ABI by address: one kept in each call would show."""
    grown = assert_computes(
        """
        import ctypes
        class Info(ctypes.Structure):
            names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
            _fields_ = [(name, ctypes.c_size_t) for name in names.split()]
        look = ctypes.CDLL(None).mallinfo2
        look.restype = Info
        grad, a, b = torch.ones(1, 1), torch.ones(1, 1), torch.ones(1, 1)
        masks = [[True, True], [True, False], [False, True], [False, False]]
        def calls(count):
            for _ in range(count):
                for mask in masks:
                    torch.ops.matmul_grad.mm_backward.default(grad, a, b, mask)
        calls(1000)
        before = look().uordblks
        calls(5000)
        print(look().uordblks - before)
        """
    )
    assert int(grown) < 5000 * 8
