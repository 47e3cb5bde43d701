"""exp, tanh, erf and the normal distribution: their error in the whole range, special values, bits of all vectors."""

from __future__ import annotations

import ctypes
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch

from matmul_grad.kernels.cpu import build, elementary, host
from matmul_grad.kernels.cpu.elementary import Lanes
from matmul_grad.kernels.cpu.polynomials import POLYNOMIALS
from matmul_grad.kernels.cpu.simd import Vector, each, function_ir

ROOT = Path(__file__).parents[3]
FUNCTIONS = {"exp": elementary.exp, "tanh": elementary.tanh, "erf": elementary.erf}
TRUTH = {"exp": np.exp, "tanh": np.tanh, "erf": lambda x: torch.erf(torch.from_numpy(x)).numpy()}  # in float64
PARTS: dict[str, Callable[[Lanes], Lanes]] = {
    **FUNCTIONS,
    "normal distribution": lambda x: elementary.normal(x)[0],
    "normal density": lambda x: elementary.normal(x)[1],
    "sigmoid": lambda x: elementary.sigmoids(x)[0],
}
DTYPES = ("float32", "float64")
ULPS = 2.0
every_isa = pytest.mark.parametrize("isa", host.host_isas())
LANES = 32  # a whole number of vectors of every width

Compiled = Callable[[np.ndarray], np.ndarray]


def compiled(function: Callable[[Lanes], Lanes], dtype: str, isa: str, lanes: int) -> Compiled:
    """``function`` of arrays, by vectors of so many lanes."""
    vector = Vector(dtype, lanes, host.cpu(isa).fused)

    def emit(builder, source, target, count):
        def one_vector(index):
            value = vector.load(builder, vector.at(builder, source, index))
            result = function(Lanes(builder, vector, value)).value
            vector.store(builder, result, vector.at(builder, target, index))

        each(builder, count, lanes, one_vector)

    machine = host.machine(isa)
    module = build.to_module({"apply": function_ir("apply", 3, emit)}, machine, ())
    loaded = build.Loaded(machine.llvm().emit_object(module), machine, {})
    call = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 3)(loaded.address("apply"))

    def apply(x: np.ndarray) -> np.ndarray:
        padded = np.resize(x, -(-len(x) // LANES) * LANES).astype(dtype)
        result = np.empty_like(padded)
        call(padded.ctypes.data, result.ctypes.data, len(padded))
        assert loaded is not None  # it holds the code
        return result[: len(x)]

    return apply


def best(name: str, dtype: str, isa: str = host.host_isas()[0]) -> Compiled:
    return compiled(FUNCTIONS[name], dtype, isa, lanes=8)


def ulps(result: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Errors in units in the last place of the truth, which has more digits; ∞ where one alone is finite."""
    rounded = truth.astype(result.dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        error = np.abs(result.astype(truth.dtype) - truth) / np.spacing(np.abs(rounded)).astype(truth.dtype)
    same = (result == rounded) | (np.isnan(result) & np.isnan(rounded))
    return np.where(same, np.where(np.isfinite(rounded), error, 0), np.where(np.isfinite(error), error, np.inf))


def float32_numbers(step: int) -> Iterator[np.ndarray]:
    """Of all float32, ∞ and NaN among them, every ``step``-th, in pieces; and all around where a formula ends."""
    piece = step << 20
    for begin in range(0, 1 << 32, piece):
        yield np.arange(begin, min(begin + piece, 1 << 32), step, dtype=np.uint32).view(np.float32)
    for limit in (0.0, 0.625, 1.0, 87.3365, 88.7228, 103.9, 104.0, 89.0, 9.01, 3.9192, np.inf):
        around = np.array([limit, -limit], np.float32).view(np.uint32).astype(np.int64)[:, None] + np.arange(-999, 999)
        yield (around.ravel() & 0xFFFFFFFF).astype(np.uint32).view(np.float32)


def assert_float32_is_accurate(name: str, isa: str, step: int) -> None:
    function = best(name, "float32", isa)
    for x in float32_numbers(step):
        with np.errstate(all="ignore"):
            error = ulps(function(x), TRUTH[name](x.astype(np.float64)))
        worst = int(np.argmax(error))
        assert error[worst] <= ULPS, f"{name}({x[worst]!r}): {error[worst]:.3f} units in the last place"


@every_isa
@pytest.mark.parametrize("name", FUNCTIONS)
def test_float32_is_accurate(name: str, isa: str) -> None:
    assert_float32_is_accurate(name, isa, step=4093)


@pytest.mark.slow
@every_isa
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_float32_is_accurate(name: str, isa: str) -> None:
    assert_float32_is_accurate(name, isa, step=1)


def float64_numbers(name: str) -> np.ndarray:
    random = np.random.default_rng(0)
    widest = {"exp": 746.0, "tanh": 20.0, "erf": 6.0}[name]
    limits = np.array([5e-324, 1e-310, 1e-8, 0.3466, 0.625, 1.0, 708.4, 709.78, 745.2, 710.0, 746.0, 5.9, 19.1])
    near = (limits[:, None] * (1 + np.arange(-4, 5) * 2.0**-52)).ravel()
    x = [random.uniform(0, widest, 1500), random.uniform(0, 1.5, 1500), 2.0 ** random.uniform(-1074, 1, 400), near]
    return np.concatenate([*x, *(-part for part in x)])


@every_isa
@pytest.mark.parametrize("name", FUNCTIONS)
def test_float64_is_accurate(name: str, isa: str) -> None:
    x = float64_numbers(name)
    result = best(name, "float64", isa)(x)
    with mpmath.workdps(40):
        for value, got in zip(x.tolist(), result.tolist(), strict=True):
            truth = getattr(mpmath, name)(mpmath.mpf(value))
            rounded = float(truth) if truth < mpmath.mpf(2) ** 1024 * (1 - mpmath.mpf(2) ** -54) else np.inf
            if got == rounded:
                continue
            assert np.isfinite(rounded) and np.isfinite(got), f"{name}({value!r}) = {got!r}, not {rounded!r}"
            error = abs(mpmath.mpf(got) - truth) / mpmath.mpf(float(np.spacing(abs(rounded))))
            assert error <= ULPS, f"{name}({value!r}): {float(error):.3f} units in the last place"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_special_values(name: str, dtype: str) -> None:
    x = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0], dtype)
    result = best(name, dtype)(x)
    expected = {"exp": [np.nan, np.inf, 0, 1, 1]}.get(name, [np.nan, 1, -1, 0.0, -0.0])
    np.testing.assert_array_equal(result, np.array(expected, dtype))
    np.testing.assert_array_equal(np.signbit(result[1:]), np.signbit(np.array(expected[1:])))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PARTS)
def test_bits_do_not_depend_on_width_or_instruction_set(name: str, dtype: str) -> None:
    """On those with a fused multiply-add, and likewise on those without."""
    function = PARTS[name]
    random = np.random.default_rng(1)
    x = np.concatenate([random.normal(0, scale, 4000) for scale in (0.5, 3, 30)]).astype(dtype)
    for fused in (True, False):
        isas = [isa for isa in host.host_isas() if host.cpu(isa).fused == fused]
        results = [compiled(function, dtype, isa, lanes)(x) for isa in isas for lanes in (2, 4, 8, 16)]
        for other in results[1:]:
            np.testing.assert_array_equal(other.view(np.uint8), results[0].view(np.uint8))


@every_isa
@pytest.mark.parametrize("dtype", DTYPES)
def test_exp_of_negative_numbers_has_the_bits_of_exp(dtype: str, isa: str) -> None:
    x = -np.concatenate([np.linspace(0, 800, 20_001), np.logspace(-300, 1, 999), [np.inf, np.nan, 0.0]])
    with np.errstate(under="ignore"):
        x = x.astype(dtype)
    both = [compiled(function, dtype, isa, 8)(x) for function in (elementary.exp, elementary.exp_of_negative)]
    np.testing.assert_array_equal(both[0], both[1])
    assert ((both[1] > 0) & (both[1] < np.finfo(dtype).tiny)).any() and both[1][-3] == 0 and np.isnan(both[1][-2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_normal_distribution_is_accurate_where_it_is_small(dtype: str) -> None:
    """(1 + erf) / 2 would cancel: of -6, float32 has nothing left."""
    x = np.linspace(-9, 9, 2000).astype(dtype)
    truth = torch.erfc(torch.from_numpy(x.astype(np.float64)) * -(0.5**0.5)).numpy() / 2
    error = np.abs(compiled(PARTS["normal distribution"], dtype, host.host_isas()[0], 8)(x) - truth) / truth
    assert error.max() <= 128 * np.finfo(dtype).eps  # the rounding of x²/2 ≤ 40 is that of an exponent
    assert error[np.abs(x) < 2].max() <= 8 * np.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
def test_coefficients_are_those_of_the_fit(dtype: str) -> None:
    fit = runpy.run_path(str(ROOT / "docs" / "tools" / "polynomials.py"))
    assert {name: fit["coefficients"](dtype, name) for name in POLYNOMIALS[dtype]} == POLYNOMIALS[dtype]


def test_coefficients_on_a_gpu_are_the_same() -> None:
    gpu = pytest.importorskip("matmul_grad.kernels.gpu.activation")
    assert (gpu.TAIL.value, gpu.TANH.value) == (POLYNOMIALS["float32"]["erfc"], POLYNOMIALS["float32"]["tanh"])
