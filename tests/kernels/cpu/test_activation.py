"""Activations in the epilogue and their gradients: values, bits, the argument kept for backward, what is written."""

from __future__ import annotations

import blocks
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from matmul_grad import testing
from matmul_grad.kernels.cpu import driver
from matmul_grad.kernels.cpu.config import BlockConfig
from matmul_grad.kernels.cpu.gemm_args import ACTIVATIONS, BY_RESULT, Epilogue
from matmul_grad.kernels.native import direct

TORCH = {
    "relu": torch.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
    "tanh": torch.tanh,
}
# In float64 without the cancellation that torch's formulas have for negative arguments.
EXACT = {
    **TORCH,
    "gelu": lambda x: x * torch.erfc(x * -(0.5**0.5)) / 2,
    "gelu_tanh": lambda x: x * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)),
}
NAMES = list(TORCH)
SHAPES = ((13, 70, 31), (1, 33, 50), (40, 1, 7), (7, 5, 1700))  # the last: chunks of k in small blocks
SHARED = (64, 200, 50)  # by threads
every_block = pytest.mark.parametrize("block", blocks.parameters())
every_activation = pytest.mark.parametrize("name", NAMES)


def test_every_activation_is_tested() -> None:
    assert ["", *NAMES] == list(ACTIVATIONS)


def small_integers(m: int, n: int, block: BlockConfig, seed: int) -> Tensor:
    return testing.integers(m, n, getattr(torch, block.dtype), seed=seed).clamp(-1, 1)


def multiply(
    block: BlockConfig, a: Tensor, b: Tensor, source: Tensor, name: str, threads: int = 1, column_major: bool = False
) -> tuple[Tensor, Tensor]:
    """The result and the argument of the activation, between which and around which nothing is written."""
    shape = (b.shape[1], a.shape[0]) if column_major else (a.shape[0], b.shape[1])
    whole = a.new_full((2, shape[0] + 2, shape[1] + 5), float("nan"))
    out, pre = whole[0, 1:-1, 2:-3], whole[1, 1:-1, 2:-3]
    if column_major:
        out, pre = out.t(), pre.t()
    epilogue = Epilogue(alpha=0.25, source=source, activation=name, pre=pre)
    direct.multiply(block, a, b, out, threads, epilogue)
    result = out.clone(), pre.clone()
    out.fill_(float("nan"))
    pre.fill_(float("nan"))
    assert whole.isnan().all(), "written outside of C"
    return result


@every_block
@every_activation
def test_results_and_kept_arguments(block: BlockConfig, name: str) -> None:
    for m, n, k in SHAPES:
        a, b, source = (small_integers(*shape, block, i) for i, shape in enumerate(((m, k), (k, n), (1, n))))
        exact = testing.exact_product(a, b).double() * 0.25 + source.double()
        truth = EXACT[name](exact)
        out, pre = multiply(block, a, b, source, name)
        testing.assert_same_bits(pre + 0.0, exact.to(a.dtype) + 0.0)
        exponent = exact**2 + exact.abs() ** 3 / 4  # what is rounded in it is a factor of the result
        allowed = (4 + exponent) * torch.finfo(a.dtype).eps * truth.abs() + torch.finfo(a.dtype).tiny
        assert (out.double() - truth).abs().le(allowed).all(), f"{name} {m}x{n}x{k}"


@every_block
@every_activation
def test_bits_do_not_depend_on_the_path(block: BlockConfig, name: str) -> None:
    dtype = getattr(torch, block.dtype)
    for m, n, k in (*SHAPES, SHARED):
        a, b, source = (testing.normal(*shape, dtype) for shape in ((m, k), (k, n), (1, n)))
        first = multiply(block, a, b, source, name)
        others = [
            multiply(block, a, b, source, name, threads=3),
            multiply(block, a, b, source, name, column_major=True),
            multiply(block, a.t().contiguous().t(), b.t().contiguous().t(), source, name, threads=2),
        ]
        for result in others:
            for got, expected in zip(result, first, strict=True):
                testing.assert_same_bits(got, expected, f"{name} {m}x{n}x{k}")
        row = multiply(block, a[:1], b, source, name)
        testing.assert_same_bits(row[0], first[0][:1])
        out = direct.multiply(block, a, b, a.new_empty(m, n), 1, Epilogue(0.25, 1.0, source, name))
        testing.assert_same_bits(out, first[0], "without the argument")


@every_activation
def test_a_batch_keeps_the_arguments_of_each_item(name: str) -> None:
    block = driver.config("float32")
    a, b = torch.randn(3, 5, 20), torch.randn(3, 20, 33)
    out, pre = torch.empty(2, 3, 5, 33).unbind()
    direct.multiply(block, a, b, out, 2, Epilogue(activation=name, pre=pre))
    for item in range(3):
        alone = torch.empty(2, 5, 33).unbind()
        direct.multiply(block, a[item], b[item], alone[0], 1, Epilogue(activation=name, pre=alone[1]))
        testing.assert_same_bits(out[item], alone[0])
        testing.assert_same_bits(pre[item], alone[1])


def kept_for(name: str, x: Tensor) -> Tensor:
    return TORCH[name](x.double()).to(x.dtype) if name in BY_RESULT else x


def exact_gradient(name: str, grad: Tensor, x: Tensor) -> Tensor:
    """In float64, from what the kernel is given."""
    if name == "tanh":
        return grad.double() * (1 - kept_for(name, x).double() ** 2)
    leaf = x.double().requires_grad_()
    TORCH[name](leaf).backward(grad.double())
    assert leaf.grad is not None
    return leaf.grad


@every_block
@every_activation
def test_gradients(block: BlockConfig, name: str) -> None:
    dtype = getattr(torch, block.dtype)
    x = torch.cat([testing.normal(9, 37, dtype) * scale for scale in (0.1, 1, 5)])
    grad, kept = testing.normal(*x.shape, dtype), kept_for(name, x)
    expected = exact_gradient(name, grad, x)
    result = direct.activation_gradient(block, name, grad, kept)
    eps = torch.finfo(dtype).eps if block.dtype in ("float32", "float64") else torch.finfo(dtype).eps / 2
    allowed = 16 * eps * grad.double().abs() if eps < 1e-5 else eps * expected.abs() + 1e-6
    assert (result.double() - expected).abs().le(allowed).all(), (result.double() - expected).abs().max()
    for threads in (2, 3, 64):
        testing.assert_same_bits(direct.activation_gradient(block, name, grad, kept, threads), result)


@every_activation
@pytest.mark.parametrize("striding", testing.STRIDINGS)
def test_gradients_of_any_strides(name: str, striding: str) -> None:
    block = driver.config("bfloat16")
    for m, n in ((6, 70), (300, 3), (150, 60), (1, 9000)):  # threads share the last two
        x, grad = (testing.normal(m, n, torch.bfloat16) for _ in range(2))
        grad = testing.lay_out(grad, striding)
        kept = testing.lay_out(kept_for(name, x), striding)
        result = direct.activation_gradient(block, name, grad, kept, threads=2)
        dense = direct.activation_gradient(block, name, grad.contiguous(), kept.contiguous())
        testing.assert_same_bits(result, dense, f"{name} {striding} {m}x{n}")


@every_block
@every_activation
def test_special_values_are_those_of_torch(block: BlockConfig, name: str) -> None:
    dtype = getattr(torch, block.dtype)
    large = torch.finfo(dtype).max
    x = torch.tensor([[float("nan"), float("inf"), -float("inf"), 0.0, large, -large, 1e4, -1e4]], dtype=dtype)
    out, pre = torch.empty_like(x), torch.empty_like(x)
    direct.multiply(block, torch.zeros(1, 1, dtype=dtype), torch.zeros(1, 8, dtype=dtype), out, 1,
                    Epilogue(source=x, activation=name, pre=pre))  # fmt: skip
    testing.assert_same_bits(pre, x)
    torch.testing.assert_close(out, TORCH[name](x.double()).to(dtype), rtol=0, atol=0, equal_nan=True)
    ones = torch.ones_like(x)
    gradient = direct.activation_gradient(block, name, ones, out if name in BY_RESULT else pre)
    leaf = x.double().clamp(-1e6, 1e6).requires_grad_()  # of the largest numbers torch's formulas are NaN
    TORCH[name](leaf).sum().backward()
    expected = leaf.grad.to(dtype)
    if name in ("gelu", "gelu_tanh", "silu"):
        expected[0, 1:3] = float("nan")  # ∞ · 0, as in torch
    torch.testing.assert_close(gradient, expected, rtol=0, atol=0, equal_nan=True)


# --- multiplied with the activation of a gate ----------------------------------------------------------------------


def multiply_gated(
    block: BlockConfig, a: Tensor, b: Tensor, gate: Tensor, name: str, threads: int = 1, column_major: bool = False
) -> tuple[Tensor, Tensor]:
    """The result and the sum, between which and around which nothing is written; the gate is not changed."""
    shape = (gate.shape[1], gate.shape[0]) if column_major else gate.shape
    whole = a.new_full((3, shape[0] + 2, shape[1] + 5), float("nan"))
    out, pre, kept = (x.t() if column_major else x for x in (whole[i, 1:-1, 2:-3] for i in range(3)))
    kept.copy_(gate)
    direct.multiply(block, a, b, out, threads, Epilogue(alpha=0.25, activation=name, pre=pre, gate=kept))
    result = out.clone(), pre.clone()
    testing.assert_same_bits(kept.contiguous(), gate)
    for x in (out, pre, kept):
        x.fill_(float("nan"))
    assert whole.isnan().all(), "written outside of C"
    return result


@every_block
def test_results_multiplied_with_a_gate(block: BlockConfig) -> None:
    for name in NAMES:
        dtype = getattr(torch, block.dtype)
        for m, n, k in SHAPES:
            a, b = (small_integers(*shape, block, i) for i, shape in enumerate(((m, k), (k, n))))
            gate = testing.normal(m, n, dtype)
            exact = testing.exact_product(a, b).double() * 0.25
            truth = EXACT[name](gate.double()) * exact
            out, pre = multiply_gated(block, a, b, gate, name)
            testing.assert_same_bits(pre + 0.0, exact.to(dtype) + 0.0)
            allowed = (5 + gate.double() ** 2) * torch.finfo(dtype).eps * truth.abs() + torch.finfo(dtype).tiny
            assert (out.double() - truth).abs().le(allowed).all(), f"{name} {m}x{n}x{k}"


@every_block
def test_bits_with_a_gate_do_not_depend_on_the_path(block: BlockConfig) -> None:
    for name in NAMES:
        dtype = getattr(torch, block.dtype)
        for m, n, k in (*SHAPES, SHARED):
            a, b, gate = (testing.normal(*shape, dtype) for shape in ((m, k), (k, n), (m, n)))
            first = multiply_gated(block, a, b, gate, name)
            for result in (
                multiply_gated(block, a, b, gate, name, threads=3),
                multiply_gated(block, a, b, gate, name, column_major=True),
                multiply_gated(block, a.t().contiguous().t(), b.t().contiguous().t(), gate, name, threads=2),
            ):
                for got, expected in zip(result, first, strict=True):
                    testing.assert_same_bits(got, expected, f"{name} {m}x{n}x{k}")
            testing.assert_same_bits(multiply_gated(block, a[:1], b, gate[:1], name)[0], first[0][:1])
            own = gate.clone()
            direct.multiply(block, a, b, own, 2, Epilogue(alpha=0.25, activation=name, gate=own))
            testing.assert_same_bits(own, first[0], "into the gate's own memory")


def test_a_batch_has_gates_of_each_item() -> None:
    for name in NAMES:
        block = driver.config("float32")
        a, b, gate = torch.randn(3, 5, 20), torch.randn(3, 20, 33), torch.randn(3, 5, 33)
        out = direct.multiply(block, a, b, torch.empty(3, 5, 33), 2, Epilogue(activation=name, gate=gate))
        for item in range(3):
            epilogue = Epilogue(activation=name, gate=gate[item])
            testing.assert_same_bits(
                out[item], direct.multiply(block, a[item], b[item], torch.empty(5, 33), 1, epilogue)
            )


@every_block
def test_gated_gradients(block: BlockConfig) -> None:
    for name in NAMES:
        dtype = getattr(torch, block.dtype)
        gate = torch.cat([testing.normal(9, 37, dtype) * scale for scale in (0.1, 1, 5)])
        grad, value = (testing.normal(*gate.shape, dtype, seed=seed) for seed in (1, 2))
        leaves = [x.double().requires_grad_() for x in (gate, value)]
        expected = torch.autograd.grad(TORCH[name](leaves[0]) * leaves[1], leaves, grad.double())
        found = direct.gated_gradients(block, name, grad, gate, value)
        sizes = (grad.double() * value.double()).abs(), (grad.double() * (gate.double().abs() + 1)).abs()
        eps = torch.finfo(dtype).eps * (1 if torch.finfo(dtype).eps > 1e-5 else 16)
        for got, right, size in zip(found, expected, sizes, strict=True):
            error = (got.double() - right).abs()
            assert error.le(eps * size + 1e-6 * (eps > 1e-5)).all(), error.max()
        for threads in (2, 3, 64):
            for got, right in zip(direct.gated_gradients(block, name, grad, gate, value, threads), found, strict=True):
                testing.assert_same_bits(got, right)


@pytest.mark.parametrize("striding", testing.STRIDINGS)
def test_gated_gradients_of_any_strides(striding: str) -> None:
    for name in ("relu", "gelu"):
        block = driver.config("bfloat16")
        for m, n in ((6, 70), (300, 3), (150, 60), (1, 9000)):  # threads share the last two
            three = [testing.normal(m, n, torch.bfloat16, seed=seed) for seed in range(3)]
            three = [testing.lay_out(x, striding) for x in three]
            dense = direct.gated_gradients(block, name, *(x.contiguous() for x in three))
            for chosen in range(3):
                some = [x if i == chosen else x.contiguous() for i, x in enumerate(three)]
                for laid in (three, some):
                    for got, right in zip(direct.gated_gradients(block, name, *laid, threads=2), dense, strict=True):
                        testing.assert_same_bits(got, right, f"{name} {striding} {m}x{n}")


def test_special_values_of_a_gate_are_those_of_torch() -> None:
    for name in NAMES:
        block, large = driver.config("float32"), torch.finfo(torch.float32).max
        gate = torch.tensor([[float("nan"), float("inf"), -float("inf"), 0.0, large, -large, 1e4, -1e4]])
        out = direct.multiply(block, torch.ones(1, 1), torch.full((1, 8), 2.0), torch.empty(1, 8), 1,
                              Epilogue(activation=name, gate=gate))  # fmt: skip
        expected = (TORCH[name](gate.double()) * 2).float()
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
