"""The compiled CUDA entry on a driver that is none: it takes note of what it is asked, multiplies, may refuse."""

from __future__ import annotations

import ctypes
import functools
import gc
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import processes
import pytest
import torch
from torch import Tensor

import matmul_grad
from matmul_grad import cuda, ops
from matmul_grad.kernels.gpu import launch
from matmul_grad.kernels.gpu.launch_record import Constant, Descriptor, LaunchRecord, Pointer
from matmul_grad.kernels.native import launch_table as table
from matmul_grad.kernels.native import register, state, torch_layout
from matmul_grad.testing import assert_same_bits, integers

CPU = 0
NOWHERE = -1  # the index of a CPU tensor's device
STREAM = 0x5EED
NAMESPACE = "matmul_grad_without_gpu"
DOUBLE = torch.float64


class Driver:
    """A launch multiplies: its parameters begin with a, b, c, m, n, k, or with a workspace, c and its size."""

    def __init__(self) -> None:
        int32, int64, uint32, pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_uint32, ctypes.c_void_p
        kinds = {
            "stream": (self.stream, int32, pointer),
            "device": (self.device, pointer),
            "encode": (self.encode, pointer, int32, uint32, *[pointer] * 5, *[int32] * 4),
            "launch": (self.launch, int64, *[uint32] * 7, int64, pointer, pointer),
        }
        self._functions = {n: ctypes.CFUNCTYPE(int32, *kinds)(call) for n, (call, *kinds) in kinds.items()}
        self.linked = {
            f"matmul_grad_cuda_{name}": ctypes.cast(function, ctypes.c_void_p).value or 0
            for name, function in self._functions.items()
        }
        self.reset()

    def reset(self) -> None:
        self.current, self.refuses, self.wrong = NOWHERE, "", False
        self.launches: list[SimpleNamespace] = []
        self.encoded: list[SimpleNamespace] = []

    def stream(self, device: int, at: int) -> int:
        assert device == NOWHERE
        ctypes.c_int64.from_address(at).value = STREAM
        return int(self.refuses == "stream")

    def device(self, at: int) -> int:
        ctypes.c_int32.from_address(at).value = self.current
        return int(self.refuses == "device")

    def encode(self, at, element, rank, address, sizes, strides, box, steps, interleave, swizzle, promotion, fill):
        ctypes.c_int64.from_address(at).value = address  # so a launch finds it where a pointer would be
        words = {"sizes": (sizes, rank), "strides": (strides, rank - 1)}
        halves = {"box": (box, rank), "steps": (steps, rank)}
        self.encoded.append(
            SimpleNamespace(
                aligned=at % 64 == 0,
                fixed=(element, interleave, swizzle, promotion, fill),
                **{name: (ctypes.c_uint64 * count).from_address(place)[:] for name, (place, count) in words.items()},
                **{name: (ctypes.c_uint32 * count).from_address(place)[:] for name, (place, count) in halves.items()},
            )
        )
        return int(self.refuses == "encode")

    def launch(self, function, x, y, z, threads, ty, tz, shared, stream, parameters, extra):
        asked = SimpleNamespace(grid=(x, y, z), threads=(threads, ty, tz), shared=shared, stream=stream, extra=extra)
        self.launches.append(asked)
        if self.refuses == f"launch {function}":
            return 1
        at = (ctypes.c_void_p * 6).from_address(parameters)
        if function == 2:  # the second half of a product whose k was cut
            parts, c, size = (ctypes.c_int64.from_address(at[i]).value for i in range(3))
            doubles(c, size).copy_(doubles(parts, size))
            return 0
        a, b, c = (ctypes.c_int64.from_address(at[i]).value for i in range(3))
        m, n, k = (ctypes.c_int32.from_address(at[i]).value for i in range(3, 6))
        product = doubles(a, m * k).view(m, k) @ doubles(b, k * n).view(k, n)
        doubles(c, m * n).copy_(product.flatten() + self.wrong)
        return 0


def doubles(address: int, count: int) -> Tensor:
    return torch.frombuffer((ctypes.c_char * (8 * count)).from_address(address), dtype=DOUBLE)


@pytest.fixture(scope="module")
def entries() -> Iterator[tuple[Driver, Any]]:
    """The driver, and the entry as an operator of another namespace: its CUDA key stands under CPU."""
    ops.native_status()
    driver = Driver()
    loaded = register.load_cuda({**driver.linked})
    library = torch.library.Library(NAMESPACE, "DEF")
    library.define("mm(Tensor self, Tensor mat2) -> Tensor")
    functions, handle = torch_layout.libtorch(), ctypes.c_void_p()
    strings = [ctypes.create_string_buffer(text) for text in (NAMESPACE.encode(), b"CPU", b"here", b"mm")]
    version = ctypes.c_uint64(state.words[state.ABI_VERSION])
    entry = ctypes.c_void_p(loaded.address("matmul_grad_mm_cuda"))
    assert functions.aoti_torch_library_init_impl(*strings[:3], 0, ctypes.byref(handle)) == 0
    assert functions.torch_library_impl(handle, strings[3], entry, version) == 0
    yield driver, getattr(torch.ops, NAMESPACE).mm.default
    functions.aoti_torch_delete_library_object(handle)
    library._destroy()


@pytest.fixture
def driver(entries: tuple[Driver, Any]) -> Iterator[Driver]:
    made, _ = entries
    made.reset()
    table.forget()
    table.words[table.DEVICE_TYPE] = CPU
    yield made
    table.forget()
    table.words[table.DEVICE_TYPE] = table.CUDA


@pytest.fixture
def mm(entries: tuple[Driver, Any]) -> Any:
    return entries[1]


def operands(m: int = 5, n: int = 3, k: int = 7) -> tuple[Tensor, Tensor]:
    return integers(m, k, DOUBLE, seed=1), integers(k, n, DOUBLE, seed=2)


def whole(m: int = 5, n: int = 3, k: int = 7) -> LaunchRecord:
    sizes = (Constant(m), Constant(n), Constant(k))
    return LaunchRecord(1, 132, 128, 4096, (Pointer("a"), Pointer("b"), Pointer("c"), *sizes, Constant(0), Constant(0)))


def teach(a: Tensor, b: Tensor, *records: LaunchRecord, work: int = 0) -> None:
    words = cuda.encoded(cuda.key_of(a, b), records, work, DOUBLE)
    assert words is not None and table.put(words)


def test_without_a_record_it_is_python(driver: Driver, mm: Any) -> None:
    a, b = operands()
    assert_same_bits(mm(a, b), a @ b)
    assert driver.launches == []


def test_a_record_is_launched_on_the_tensors_of_the_call(driver: Driver, mm: Any) -> None:
    a, b = operands()
    teach(a, b, whole())
    for other in (a, a + 1, a - 3):
        assert_same_bits(mm(other, b), other @ b)
    assert len(driver.launches) == 3
    first = driver.launches[0]
    assert (first.grid, first.threads, first.shared) == ((132, 1, 1), (128, 1, 1), 4096)
    assert (first.stream, first.extra) == (STREAM, None)


@pytest.mark.parametrize("change", ["size", "stride", "alignment", "dtype", "mode", "device"])
def test_a_record_holds_for_its_key_alone(change: str, driver: Driver, mm: Any) -> None:
    a, b = operands()
    teach(a, b, whole())
    if change == "size":
        a = integers(6, 7, DOUBLE, seed=1)
    elif change == "stride":
        a = a.t().contiguous().t()
    elif change == "alignment":
        a = torch.cat([torch.zeros(1, dtype=DOUBLE), a.flatten()])[1:].view(5, 7)
        assert a.data_ptr() % table.ALIGNMENT == 8
    elif change == "dtype":
        a, b = a.float(), b.float()
    elif change == "device":
        driver.current = 3
    with matmul_grad.deterministic(batch_invariant=change == "mode"):
        assert_same_bits(mm(a, b), a @ b)
    assert driver.launches == []


def test_keys_that_fall_on_one_place_are_told_apart(driver: Driver, mm: Any) -> None:
    a, seen = operands()[0], dict[int, int]()
    for first in range(1, 4000):
        key = cuda.key_of(a, torch.empty(7, first, dtype=DOUBLE))
        second = seen.setdefault(functools.reduce(table.mixed, key, 0) % table.SLOTS, first)
        if second != first:
            break
    _, b = operands(n=first)
    teach(a, b, whole(n=first))
    _, other = operands(n=second)
    assert_same_bits(mm(a, other), a @ other)
    assert driver.launches == []
    teach(a, other, whole(n=second))
    for right in (b, other):
        assert_same_bits(mm(a, right), a @ right)
    assert len(driver.launches) == 2


@pytest.mark.parametrize("refuses", ["stream", "device", "launch 1"])
def test_what_the_driver_refuses_is_pythons(refuses: str, driver: Driver, mm: Any) -> None:
    a, b = operands()
    teach(a, b, whole())
    driver.refuses = refuses
    assert_same_bits(mm(a, b), a @ b)


def test_parts_of_k_go_through_a_workspace(driver: Driver, mm: Any) -> None:
    a, b = operands()
    first = LaunchRecord(1, 2, 64, 0, (Pointer("a"), Pointer("b"), Pointer("work"), *whole().parameters[3:]))
    second = LaunchRecord(2, 1, 32, 0, (Pointer("work"), Pointer("c"), Constant(15), *[Constant(0)] * 3))
    teach(a, b, first, second, work=15)
    assert_same_bits(mm(a, b), a @ b)
    assert [x.threads[0] for x in driver.launches] == [64, 32]
    driver.refuses = "launch 2"
    assert_same_bits(mm(a, b), a @ b)


def test_descriptors_are_encoded_for_the_tensors_of_the_call(driver: Driver, mm: Any) -> None:
    a, b = operands()
    described = Descriptor("a", 8, 3, (7, 5, 2), (56, 280), (4, 8, 1))
    teach(a, b, LaunchRecord(1, 1, 32, 0, (described, *whole().parameters[1:])))
    for other in (a, a + 1):
        assert_same_bits(mm(other, b), other @ b)
    seen = driver.encoded[0]
    assert len(driver.encoded) == 2 and seen.aligned
    assert (seen.sizes, seen.strides, seen.box, seen.steps) == ([7, 5, 2], [56, 280], [4, 8, 1], [1, 1, 1])
    assert seen.fixed == (8, 0, 3, 2, 0)  # of the driver's enumerations: swizzle of 128 bytes, promotion to 128
    driver.refuses = "encode"
    assert_same_bits(mm(a, b), a @ b)


def test_errors_match_torch(driver: Driver, mm: Any) -> None:
    a, b = operands()
    with pytest.raises(RuntimeError, match=r"mat1 and mat2 shapes cannot be multiplied \(3x7 and 5x3\)"):
        mm(b.t().contiguous(), a[:, :3].contiguous())


def test_a_record_that_is_wrong_is_never_followed_again(
    driver: Driver, mm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = operands()
    monkeypatch.setattr(torch.ops.matmul_grad, "mm", SimpleNamespace(default=mm))
    refused = table.counts()[1]
    for wrong, launched in ((True, 1), (False, 2)):
        driver.reset()
        table.forget()
        driver.wrong = wrong
        teach(a, b, whole())
        cuda.prove(cuda.key_of(a, b), a, b, a @ b)
        assert_same_bits(mm(a, b), a @ b)
        assert len(driver.launches) == launched
        assert table.counts()[1] - refused == wrong
        refused = table.counts()[1]


def test_what_python_has_launched_is_written_down(driver: Driver, mm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = operands()
    runner: Any = type("Runner", (), {"record": staticmethod(whole)})()  # it has nothing but its record
    launches = [launch.Launch((runner,), (5, 3), 0, DOUBLE)]
    alive = weakref.ref(runner)
    del runner
    monkeypatch.setattr(launch, "launch_of", lambda *_: launches[0])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.ops.matmul_grad, "mm", SimpleNamespace(default=mm))
    cuda.offer(a, b, a @ b)
    assert table.find(cuda.key_of(a, b)) == 0
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    cuda.offer(a, b, a @ b)
    assert table.find(cuda.key_of(a, b)) != 0 and len(driver.launches) == 1
    launches.clear()
    gc.collect()
    assert alive() is not None  # from Triton 3.8 on a kernel that nothing holds is unloaded, and its handle dangles


def test_more_parameters_than_fit_stay_with_python() -> None:
    a, b = operands()
    many = LaunchRecord(1, 1, 32, 0, (Constant(0),) * (table.MOST_PARAMETERS + 1))
    assert cuda.encoded(cuda.key_of(a, b), [many], 0, DOUBLE) is None


def test_the_table_fills_up_and_finds_everything(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "_records", [])
    records = [[13, 0, 0, m, 4096, 4096, 4096, 1, 4096, 1, 0, 0, 0, 6, 0] for m in range(table.MOST + 1)]
    assert [table.put(record) for record in records] == [True] * table.MOST + [False]
    places = [table.find(record[: table.KEYS]) for record in records]
    assert len(set(places[:-1])) == table.MOST and places[-1] == 0


def test_it_is_off_unless_asked_for_and_needs_a_gpu() -> None:
    for value, reason in (("0", "is not 1"), ("1", "there is no NVIDIA GPU")):
        code = (
            "import torch; torch.cuda.is_available = lambda: False; from matmul_grad import cuda; print(cuda.status())"
        )
        done = processes.run(code, **{cuda.VARIABLE: value})
        assert done.returncode == 0 and reason in done.stdout, done.stderr
