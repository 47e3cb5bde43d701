"""A GPU machine on which Triton can build nothing, as a slim container without a C compiler: products are torch's."""

from __future__ import annotations

import subprocess
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from matmul_grad import convolution_by_torch, convolution_ops, gated, grouped, ops, strict
from matmul_grad.kernels.gpu import convolution, launch, run
from matmul_grad.kernels.gpu import gated as gated_kernels
from matmul_grad.kernels.gpu import grouped as grouped_kernels
from matmul_grad.kernels.gpu.arguments import PointerArg
from matmul_grad.kernels.gpu.plan import Plan

FAILURES = [
    RuntimeError(
        "Failed to find C compiler. Please specify via CC environment variable or set triton.knobs.build.impl."
    ),
    FileNotFoundError(2, "No such file or directory", "cc"),
    subprocess.CalledProcessError(1, ["gcc", "main.c"]),
]


class OnGpu(torch.Tensor):
    """A tensor that passes for one on a GPU."""

    is_cuda = True


class Broken:
    """Stands for Triton's JIT function where the launcher cannot be built."""

    arg_names = ("a_ptr",)

    def __init__(self, failure: Exception) -> None:
        self.failure, self.calls = failure, 0

    def __getitem__(self, grid: Any) -> Any:
        def launch(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            raise self.failure

        return launch


@pytest.fixture
def fresh() -> Iterator[None]:
    run.build_failures.clear()
    yield
    run.build_failures.clear()


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
def test_products_fall_back_with_one_warning(failure: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Broken(failure)
    runner = run.Runner(Plan(kernel, 1, (PointerArg("a"),), {}, {}))

    def product(a: torch.Tensor, *more: Any, **named: Any) -> torch.Tensor:
        runner({"a": a})
        raise AssertionError

    for name in ("mm", "addmm"):
        monkeypatch.setattr(launch, name, product)
    a, b, c = (torch.randn(4, 4).as_subclass(OnGpu) for _ in range(3))
    with pytest.warns(RuntimeWarning, match="Triton cannot build .* go to torch: ") as seen:
        assert torch.equal(ops.compute(a, b), torch.mm(a, b))
    assert len(seen) == 1 and "\n" not in str(seen[0].message)
    assert not launch.supports(a)  # so that what follows is torch's before anything is tried
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = torch.zeros(4, 4).as_subclass(OnGpu)
        assert ops.compute(a, b, out=out) is out and torch.equal(out, torch.mm(a, b))
        assert torch.equal(ops.compute(a, b, c, 2.0, 3.0), torch.addmm(c, a, b, beta=2.0, alpha=3.0))
        batches = a.expand(2, 4, 4), b.expand(2, 4, 4)
        assert torch.equal(ops.compute(*batches), torch.bmm(*batches))
    with strict(), pytest.raises(RuntimeError, match=r"strict\(\)"):
        ops.compute(a, b)


@pytest.mark.usefixtures("fresh")
def test_both_gradients_are_left_to_two_products(monkeypatch: pytest.MonkeyPatch) -> None:
    def mm_backward(*_: Any) -> Any:
        raise run.CannotBuild("no compiler")

    monkeypatch.setattr(launch, "mm_backward", mm_backward)
    monkeypatch.setattr(ops, "accelerated", lambda *_: True)
    a, b, grad = (torch.randn(4, 4).as_subclass(OnGpu) for _ in range(3))
    assert ops.both_gradients(grad, a, b) is None


@pytest.mark.usefixtures("fresh")
def test_other_errors_of_a_launch_are_raised() -> None:
    runner = run.Runner(Plan(Broken(RuntimeError("out of memory")), 1, (PointerArg("a"),), {}, {}))
    with pytest.raises(RuntimeError, match=r"^out of memory$"):
        runner({"a": torch.zeros(1)})
    assert not run.build_failures


@pytest.mark.usefixtures("fresh")
def test_convolutions_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tensors that pass for a GPU's, in both operators."""
    tried = []

    def product(*_: Any) -> Any:
        tried.append(1)
        raise run.CannotBuild("no compiler")

    monkeypatch.setattr(convolution, "supports", lambda *_: True)
    monkeypatch.setattr(convolution, "_run", product)
    x, w, grad = (torch.randn(2, 2, 4, 4).as_subclass(OnGpu) for _ in range(3))
    window: Any = ((1, 1), (0, 0), (1, 1))
    for transposed, others in ((False, (0, 0)), (True, (0, 0))):
        arguments = *window, transposed, others, 1
        wanted = torch.ops.aten.convolution(x, w, None, *arguments)
        assert torch.equal(convolution_ops._forward(x, w, None, *arguments), wanted)
    image = torch.randn(2, 2, 7, 7).as_subclass(OnGpu)
    found = convolution_ops._gradient(grad, image, w.shape, *window, 1)
    assert torch.equal(found, convolution_by_torch.weight_gradient(grad, image, w.shape, *window, 1))
    assert len(tried) == 3
    with strict(), pytest.raises(RuntimeError, match=r"strict\(\)"):
        convolution_ops._gradient(grad, image, w.shape, *window, 1)


def test_grouped_products_fall_back_to_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the kernel does not count them: then it is not tried."""

    def product(*_: Any) -> Any:
        tried.append(True)
        raise run.CannotBuild("no compiler")

    tried: list[bool] = []
    monkeypatch.setattr(grouped_kernels, "product", product)
    monkeypatch.setattr(grouped, "is_on_gpu", lambda _: True)
    monkeypatch.setattr(grouped, "is_computed", lambda _: False)
    a, b, offs = torch.randn(5, 4), torch.randn(2, 4, 3), torch.tensor([2, 4], dtype=torch.int32)
    expected = torch.cat([a[:2] @ b[0], a[2:4] @ b[1], torch.zeros(1, 3)])
    for supported in (True, False):
        monkeypatch.setattr(grouped_kernels, "supports", lambda *_, answer=supported: answer)
        assert torch.equal(grouped.grouped_mm(a, b, offs=offs), expected)
        with strict(), pytest.raises(RuntimeError, match=r"strict\(\)"):
            grouped.grouped_mm(a, b, offs=offs)
    assert len(tried) == 2


def test_gated_products_fall_back_to_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those are torch's then; here they are computed on the CPU."""

    def product(*_: Any) -> Any:
        tried.append(True)
        raise run.CannotBuild("no compiler")

    tried: list[bool] = []
    monkeypatch.setattr(gated_kernels, "product", product)
    monkeypatch.setattr(gated, "is_on_gpu", lambda _: True)
    x, weight, gate = (torch.randn(*shape) for shape in ((5, 4), (3, 4), (3, 4)))
    expected = torch.nn.functional.silu(x @ gate.t()) * (x @ weight.t())
    torch.testing.assert_close(gated.gated_linear(x, weight, gate), expected)
    torch.testing.assert_close(gated.gated_linear(x, weight.requires_grad_(), gate), expected)
    with strict(), pytest.raises(RuntimeError, match=r"strict\(\)"):
        gated.gated_linear(x, weight, gate)
    assert len(tried) == 3
