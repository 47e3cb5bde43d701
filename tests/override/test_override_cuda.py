"""The switch's kernels in Python, which stand under CUDA, here put under CPU: all but the launch is the same."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from dtypes import EVERY
from outcomes import outcome
from torch import Tensor

import matmul_grad
from matmul_grad import aten_override, aten_override_cuda
from matmul_grad.aten_override_cuda import CudaOverride
from matmul_grad.kernels.native import override_probe
from matmul_grad.kernels.native.op_table import OVERLOADS
from matmul_grad.kernels.native.register import Unavailable
from matmul_grad.testing import assert_same_bits, integers

DUMPS = tuple(f"aten::{name}" for name in (*OVERLOADS, "linear"))


def registered() -> list[str]:
    return [torch._C._dispatch_dump(name) for name in DUMPS]


@pytest.fixture
def switched() -> Iterator[CudaOverride]:
    matmul_grad.disable()  # what a block left in place for the next one is removed
    before = registered()
    switch = CudaOverride("CPU")
    switch.install()
    yield switch
    if switch.is_on():
        switch.uninstall()
    matmul_grad.disable()
    assert registered() == before


def counted(operator: str, outcome: str = "accelerated") -> int:
    return sum(aten_override_cuda.calls[operator, outcome].values())


def batch_of(count: int, m: int, n: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.stack([integers(m, n, dtype, seed * 10 + item) for item in range(count)])


def operands(operator: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    if "bmm" in operator:
        found = [batch_of(3, 5, 7, dtype, 1), batch_of(3, 7, 4, dtype, 2).mT.contiguous().mT]
        return [batch_of(3, 5, 4, dtype, 3), *found] if "add" in operator else found
    if operator in ("mv", "addmv"):
        vectors = [integers(1, 5, dtype, 3)[0], integers(5, 7, dtype, 1), integers(7, 1, dtype, 2)[:, 0]]
        return vectors if "add" in operator else vectors[1:]
    if "dot" in operator:
        return [integers(1, 7, dtype, 1)[0], integers(7, 2, dtype, 2)[:, 1]]
    found = [integers(5, 7, dtype, 1), integers(4, 7, dtype, 2).t()]
    return [integers(5, 4, dtype, 3), *found] if "add" in operator else found


def forms(operator: str) -> Iterator[Callable[..., Tensor]]:
    """Into new memory, into ``out`` by rows and by columns, and in place."""
    call = getattr(torch, operator)
    yield call
    if "dot" in operator:
        return  # its ``out`` form calls it
    yield lambda *x, **scales: call(*x, **scales, out=torch.full_like(call(*x, **scales), 7))
    if operator not in ("mv", "addmv"):
        yield lambda *x, **scales: call(*x, **scales, out=torch.full_like(call(*x, **scales), 7).mT.contiguous().mT)
    if "add" in operator:
        yield lambda source, *x, **scales: getattr(source.clone(), f"{operator}_")(*x, **scales)


@pytest.mark.parametrize("dtype", EVERY)
@pytest.mark.parametrize("operator", ["mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot", "vdot"])
def test_products(operator: str, dtype: torch.dtype) -> None:
    scales: list[dict[str, Any]] = [{}, {"beta": 2, "alpha": -1}, {"beta": 0, "alpha": 0.5}]
    found = operands(operator, dtype)
    cases = list(itertools.product(forms(operator), scales if "add" in operator else [{}]))
    expected = [form(*found, **named) for form, named in cases]
    switch = CudaOverride("CPU")
    switch.install()
    try:
        counts = "addmv" if operator == "mv" else operator
        before = counted(counts)
        with matmul_grad.strict():
            actual = [form(*found, **named) for form, named in cases]
        assert counted(counts) - before >= len(cases)
    finally:
        switch.uninstall()
    for got, want in zip(actual, expected, strict=True):
        assert_same_bits(got + 0.0, want + 0.0)
        assert got.stride() == want.stride()


@pytest.mark.usefixtures("switched")
def test_models_run_forward_and_backward() -> None:
    model, x = torch.nn.Linear(7, 4), torch.randn(5, 7)
    before = counted("addmm"), counted("mm")
    with matmul_grad.strict():
        model(x).sum().backward()
    assert (counted("addmm") - before[0], counted("mm") - before[1]) == (1, 1)
    expected = torch.ones(5, 4).t().double() @ x.double()
    torch.testing.assert_close(model.weight.grad.double(), expected, rtol=1e-5, atol=1e-5)


ones = torch.ones
LEFT: dict[str, Callable[[], tuple[Callable[..., Tensor], tuple[Any, ...], dict[str, Any]]]] = {
    "int": lambda: (torch.mm, (ones(2, 2).int(), ones(2, 2).int()), {}),
    "complex": lambda: (torch.bmm, (ones(1, 2, 2) + 1j, ones(1, 2, 2) + 1j), {}),
    "complex alpha": lambda: (torch.addmm, (ones(2), ones(2, 2), ones(2, 2)), {"alpha": 2j}),
    "bool alpha": lambda: (torch.addmm, (ones(2), ones(2, 2), ones(2, 2)), {"alpha": True}),
    "dtypes": lambda: (torch.mm, (ones(2, 2), ones(2, 2).double()), {}),
    "overlap": lambda: (lambda x: torch.mm(x, ones(2, 2), out=x), (ones(2, 2),), {}),
}
TORCHS: dict[str, Callable[[], tuple[Callable[..., Tensor], tuple[Any, ...], dict[str, Any]]]] = {
    "rank": lambda: (torch.mm, (ones(2), ones(2, 2)), {}),
    "shape": lambda: (torch.baddbmm, (ones(1), ones(2, 3, 4), ones(2, 5, 4)), {}),
    "input": lambda: (torch.addmm, (ones(5), ones(2, 3), ones(3, 4)), {}),
    "empty": lambda: (torch.mm, (ones(2, 0), ones(0, 3)), {}),
    "alpha 0": lambda: (torch.addmm, (ones(2), ones(2, 2) * float("nan"), ones(2, 2)), {"alpha": 0}),
    "too large": lambda: (torch.addmm, (ones(2), ones(2, 2), ones(2, 2)), {"alpha": 1e300}),
    "a matrix for a vector": lambda: (torch.mv, (ones(2, 2), ones(2, 1)), {}),
    "vectors": lambda: (torch.dot, (ones(2), ones(3)), {}),
    "a matrix added to a vector": lambda: (torch.addmv, (ones(2, 1), ones(2, 3), ones(3)), {}),
    "a scalar for a vector": lambda: (torch.vdot, (ones(()), ones(3)), {}),
    "wrong out": lambda: (torch.mm, (ones(2, 2), ones(2, 2)), {"out": ones(2, 2).double()}),
    "resized": lambda: (torch.mm, (ones(2, 2), ones(2, 2)), {"out": ones(0)}),
    "in place": lambda: (ones(3, 2).addmm_, (ones(2, 2), ones(2, 2)), {}),
}


@pytest.mark.parametrize("case", [*LEFT, *TORCHS])
def test_fallback_under_cuda_matches_torch(case: str) -> None:
    make = (LEFT | TORCHS)[case]
    call, arguments, named = make()
    expected = outcome(call, *arguments, **named)
    before = sum(counted(name, "handed_over") for name in ("mm", "bmm", "addmm", "baddbmm"))
    switch = CudaOverride("CPU")
    switch.install()
    try:
        call, arguments, named = make()
        actual = outcome(call, *arguments, **named)
        after = sum(counted(name, "handed_over") for name in ("mm", "bmm", "addmm", "baddbmm"))
        call, arguments, named = make()
        with matmul_grad.strict():
            refused = outcome(call, *arguments, **named)
    finally:
        switch.uninstall()
    if isinstance(expected, Tensor):
        assert torch.equal(actual, expected)
    else:
        assert actual == expected
    assert after - before == (case in LEFT)
    assert ("matmul_grad.strict()" in str(refused)) == (case in LEFT)


def test_off_is_exactly_as_before(switched: CudaOverride, recwarn: pytest.WarningsRecorder) -> None:
    during = registered()
    for _ in range(3):
        switched.uninstall()
        off = registered()
        assert all(one != other for one, other in zip(off, during, strict=True))
        switched.install()
        assert registered() == during
    assert not recwarn.list


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_failed_installation_is_undone(monkeypatch: pytest.MonkeyPatch, stop: type[BaseException]) -> None:
    before, asked = registered(), []

    def kernel(name: str, key: str) -> Any:
        asked.append(name)
        if len(asked) == 5:
            raise stop
        return torch._C._dispatch_get_computed_kernel_for_dispatch_key(name, getattr(torch._C.DispatchKey, key))

    monkeypatch.setattr(torch.library, "get_kernel", kernel)
    switch = CudaOverride("CPU")
    with pytest.raises(stop):
        switch.install()
    assert not switch.is_on()
    assert registered() == before


@pytest.fixture
def as_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch built for CPU has no kernels for CUDA: those of CPU stand for them, never to be called."""
    matmul_grad.disable()
    get_kernel = torch.library.get_kernel
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.library, "get_kernel", lambda name, key: get_kernel(name, key.replace("CUDA", "CPU")))


@pytest.mark.usefixtures("as_with_a_gpu")
def test_enable_takes_both_devices() -> None:
    before = registered()
    with matmul_grad.enabled():
        assert matmul_grad.info()["on"] == ["cpu", "cuda"]
        *products, linear = registered()
        assert all("\nCUDA: registered at" in dump for dump in products) and "\nAutogradCUDA: registered at" in linear
        with matmul_grad.enabled():
            assert matmul_grad.info()["on"] == ["cpu", "cuda"]
        assert matmul_grad.info()["on"] == ["cpu", "cuda"]
    assert matmul_grad.info()["on"] == []
    matmul_grad.disable()
    assert registered() == before


def refuse(*_: Any) -> None:
    raise Unavailable("not today")


@pytest.mark.usefixtures("as_with_a_gpu")
def test_devices_are_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one cannot be overridden the other is, and a warning names the first, once."""
    before = registered()
    for module, name, left in ((aten_override._cuda, "install", "cpu"), (override_probe, "require", "cuda")):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, refuse)
            patched.setattr(aten_override, "_notified", set())
            with pytest.warns(UserWarning, match="on one device torch's products stay: .*not today"):
                matmul_grad.enable()
            matmul_grad.enable()
            assert matmul_grad.info()["on"] == [left]
            matmul_grad.disable()
            assert registered() == before


@pytest.mark.usefixtures("as_with_a_gpu")
def test_enable_raises_where_no_device_can_be_overridden(monkeypatch: pytest.MonkeyPatch) -> None:
    before = registered()
    monkeypatch.setattr(aten_override._cuda, "install", refuse)
    monkeypatch.setattr(override_probe, "require", refuse)
    with pytest.raises(RuntimeError, match="not today"):
        matmul_grad.enable()
    assert matmul_grad.info()["on"] == []
    assert registered() == before


def test_calls_of_both_devices_are_counted_together(switched: CudaOverride) -> None:
    def now() -> int:
        return matmul_grad.info()["accelerated"].get("mm", {}).get("float64", 0)

    before, a = now(), torch.ones(2, 2, dtype=torch.float64)
    a @ a
    switched.uninstall()
    with matmul_grad.enabled():
        a @ a
    assert now() - before == 2


@pytest.mark.parametrize("dtype", EVERY)
@pytest.mark.parametrize("scale", [1e5, 1e39, float("inf")])
@pytest.mark.parametrize("name", ["beta", "alpha"])
def test_scales_of_a_vector_that_the_dtype_cannot_hold(
    switched: CudaOverride, dtype: torch.dtype, scale: float, name: str
) -> None:
    """torch refuses them; infinity it takes."""
    found = operands("addmv", dtype)
    actual = outcome(torch.addmv, *found, **{name: scale})
    switched.uninstall()
    expected = outcome(torch.addmv, *found, **{name: scale})
    assert isinstance(actual, Tensor) == isinstance(expected, Tensor)
    if not isinstance(actual, Tensor):
        assert actual == expected
