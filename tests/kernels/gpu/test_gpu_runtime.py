"""The launcher on a real GPU: gradients, autograd's threads, streams, graphs, offsets past 32 bits, native entry."""

from __future__ import annotations

import threading
from typing import Any

import processes
import pytest
import torch
from gpu_cases import DENSE, assert_same_bits, embed, integers
from torch import Tensor

import matmul_grad
from matmul_grad.kernels.gpu import launch
from matmul_grad.kernels.gpu.choose import TMA_TILES, is_valid_backward

pytestmark = pytest.mark.gpu


def test_linear_under_autocast_is_bfloat16(device: torch.device) -> None:
    a, w = torch.ones(3, 4, device=device), torch.ones(2, 4, device=device, requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16):
        c = matmul_grad.linear(a, w)
    c.sum().backward()
    assert (c.dtype, w.grad.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("layouts", ["NNN", "NNT", "NTN", "NTT", "TNN", "TTT"])
@pytest.mark.parametrize("size", [(256, 512, 384), (264, 136, 520), (255, 136, 520)], ids=str)
def test_both_gradients_from_one_launch_are_exact(
    size: tuple[int, int, int], layouts: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One launch in every tile that it may have, and the two that stand in for it, give the exact gradients."""
    m, n, k = size
    grad, a, b = (integers(*shape, torch.bfloat16, seed, device) for seed, shape in enumerate(((m, n), (m, k), (k, n))))
    wants = [(x.double() @ y.double()).bfloat16() for x, y in ((grad, b.t()), (a.t(), grad))]
    grad, a, b = (
        x.t().contiguous().t() if letter == "T" else x for x, letter in zip((grad, a, b), layouts, strict=True)
    )
    for got, want in zip(launch.mm_backward(grad, a, b), wants, strict=True):
        assert_same_bits(got, want)
    problem, target = launch.describe(a, b, grad, "ieee"), launch.target_of(a)
    for tile in TMA_TILES:
        if launch.fits_tma(grad) and is_valid_backward(tile, problem, layouts[0], target):
            monkeypatch.setattr(launch, "choose_backward", lambda *asked, tile=tile: tile)
            launch.clear_cache()
            both = launch.backward_in_one(grad, a, b)
            assert both is not None
            for got, want in zip(both, wants, strict=True):
                assert_same_bits(got, want)
    launch.clear_cache()


def test_autograd_computes_both_gradients_in_one_launch(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    a = integers(256, 512, torch.bfloat16, 1, device).requires_grad_()
    b = integers(512, 256, torch.bfloat16, 2, device).requires_grad_()
    calls: list[int] = []
    real = launch.backward_in_one
    monkeypatch.setattr(launch, "backward_in_one", lambda *args: calls.append(1) or real(*args))
    grad = integers(256, 256, torch.bfloat16, 3, device)
    matmul_grad.mm(a, b).backward(grad)
    assert calls == [1] and a.grad is not None and b.grad is not None
    assert_same_bits(a.grad, (grad.double() @ b.detach().double().t()).bfloat16())
    assert_same_bits(b.grad, (a.detach().double().t() @ grad.double()).bfloat16())


def test_a_captured_graph_replays_with_new_values(device: torch.device) -> None:
    a, b = integers(256, 8192, torch.bfloat16, 1, device), integers(8192, 64, torch.bfloat16, 2, device)
    grad = integers(256, 64, torch.bfloat16, 3, device)
    work = [lambda: launch.mm(a, b), lambda: launch.mm(a[:1], b), lambda: launch.mm_backward(grad, a, b)]
    for call in work:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = [call() for call in work]
    a.copy_(integers(256, 8192, torch.bfloat16, 4, device) * (torch.rand(8192, device=device) < 0.02))
    graph.replay()
    torch.cuda.synchronize()
    want = (a.double() @ b.double()).bfloat16()
    assert_same_bits(got[0], want)
    assert_same_bits(got[1], want[:1])
    assert_same_bits(got[2][1], (a.t().double() @ grad.double()).bfloat16())


def test_memory_that_is_used_again_in_another_shape(device: torch.device) -> None:
    """Descriptors are kept by address: the same one holds operands of one shape after the other."""
    left, right = (torch.empty(512 * 512, dtype=torch.bfloat16, device=device) for _ in range(2))
    for m, n, k in ((256, 512, 512), (512, 256, 256), (128, 64, 1024)) * 2:
        a, b = left[: m * k].view(m, k), right[: k * n].view(k, n)
        a.copy_(integers(m, k, torch.bfloat16, m, device) * (torch.arange(k, device=device) % 8 == 0))
        b.copy_(integers(k, n, torch.bfloat16, k, device))
        for _ in range(2):
            assert_same_bits(launch.mm(a, b), (a.double() @ b.double()).bfloat16())


def assert_enough_memory(gib: int) -> None:
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < gib << 30:
        pytest.skip(f"needs {gib} GiB of free GPU memory")


@pytest.mark.parametrize("layouts", DENSE)
def test_strides_may_exceed_32_bits(layouts: str, device: torch.device) -> None:
    """Rows 2**30 elements apart: the third one of a tile lies beyond 2**31."""
    assert_enough_memory(6)
    buffer = torch.empty(2**31 + 4096, dtype=torch.float16, device=device)
    far = buffer.as_strided((3, 40), (2**30, 1))
    a = far if layouts[0] == "N" else far.t()
    a.copy_(integers(a.shape[0], a.shape[1], torch.float16, 9, device))
    b = embed(integers(a.shape[1], 33, torch.float16, 10, device), layouts[1])
    assert_same_bits(launch.mm(a, b), (a.double() @ b.double()).half())
    left = integers(17, a.shape[0], torch.float16, 11, device)
    assert_same_bits(launch.mm(left, a), (left.double() @ a.double()).half())


def test_results_may_have_more_than_2_to_the_32_elements(device: torch.device) -> None:
    assert_enough_memory(10)
    m, n = 2**20 + 3, 2049
    a, b = integers(m, 2, torch.float16, 12, device), integers(2, n, torch.float16, 13, device)
    got = launch.mm(a, b)
    for rows in (slice(0, 300), slice(2**19, 2**19 + 300), slice(m - 300, m)):
        assert_same_bits(got[rows], (a[rows].double() @ b.double()).half())


class Product(torch.autograd.Function):
    """mm with both gradients as mm of views: what autograd's own threads run."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return launch.mm(a, b)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        ctx.thread = threading.get_ident()
        return launch.mm(grad, b.t()), launch.mm(a.t(), grad)


def test_backward_in_a_thread_of_autograd_uses_the_device_of_the_operands(device: torch.device) -> None:
    last = torch.device("cuda", torch.cuda.device_count() - 1)
    a = integers(67, 65, torch.float32, 14, last).requires_grad_()
    b = integers(65, 33, torch.float32, 15, last).requires_grad_()
    product = Product.apply(a, b)
    # sum() sends back an expanded gradient, stride 0 both ways.
    product.sum().backward()
    ones = torch.ones(67, 33, device=last)
    assert torch.cuda.current_device() == device.index
    assert a.grad is not None and b.grad is not None and a.grad.device == last
    assert_same_bits(a.grad, ones @ b.detach().t())
    assert_same_bits(b.grad, a.detach().t() @ ones)


def test_four_threads_get_the_same_bits(device: torch.device) -> None:
    a, b = integers(300, 200, torch.bfloat16, 16, device), integers(200, 100, torch.bfloat16, 17, device)
    want, got = (a.double() @ b.double()).bfloat16(), [torch.empty(0)] * 4

    def work(index: int) -> None:
        for _ in range(20):
            got[index] = launch.mm(a, b)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    for result in got:
        assert_same_bits(result, want)


def test_products_run_on_the_current_stream(device: torch.device) -> None:
    """A product queued behind a slow stream sees what that stream wrote before it."""
    stream = torch.cuda.Stream(device)
    a, b = torch.zeros(64, 64, device=device), torch.eye(64, device=device)
    launch.mm(a, b, "ieee")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        a.fill_(3.0)
        got = launch.mm(a, b, "ieee")
    stream.synchronize()
    assert_same_bits(got, torch.full_like(got, 3.0))


NATIVE = """
import threading
import torch, matmul_grad
from matmul_grad import cuda
from matmul_grad.kernels.native import launch_table as table
from matmul_grad.kernels.gpu import launch

def draw(rows, cols, dtype, letter):
    x = torch.randint(-1, 2, (rows, cols), device="cuda").to(dtype)
    return x.t().contiguous().t() if letter == "T" else x

def check(a, b):
    want = launch.mm(a, b)
    for _ in range(3):
        assert torch.equal(matmul_grad.mm(a, b), want), (a.shape, b.shape, a.dtype)

sizes = (1, 512, 256), (512, 1, 256), (8, 128, 4096), (256, 384, 512), (257, 129, 513), (64, 64, 65536)
for dtype in (torch.bfloat16, torch.float16, torch.float64):
    for m, n, k in sizes:
        for letters in ("NN", "NT", "TN", "TT"):
            check(draw(m, k, dtype, letters[0]), draw(k, n, dtype, letters[1]))
assert cuda.status() == "", cuda.status()
made, refused = table.counts()
assert made >= 60 and refused == 0, (made, refused)
a, b = draw(256, 512, torch.bfloat16, "N"), draw(512, 384, torch.bfloat16, "N")
check(a, b)
side = torch.cuda.Stream()
with torch.cuda.stream(side):
    check(a, b)
side.synchronize()
thread = threading.Thread(target=check, args=(a, b))
thread.start()
thread.join()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    got = matmul_grad.mm(a, b)
a.copy_(draw(256, 512, torch.bfloat16, "N"))
graph.replay()
torch.cuda.synchronize()
assert torch.equal(got, launch.mm(a, b))
x, y = a.clone().requires_grad_(), b.clone().requires_grad_()
matmul_grad.mm(x, y).sum().backward()
assert torch.equal(x.grad, launch.mm(torch.ones_like(got), b.t()))
assert table.counts()[1] == 0
"""


@pytest.mark.slow
def test_native_entry_gives_the_bits_of_the_launcher(device: torch.device) -> None:
    """Every path and layout through the compiled entry, on side streams, other threads, in a graph, under autograd."""
    done = processes.run(NATIVE, MATMUL_GRAD_NATIVE_CUDA="1")
    assert done.returncode == 0, done.stderr[-3000:]
