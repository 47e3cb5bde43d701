"""The gradient of a bias: the product of a row of ones and dC, with the bits of any product, in every entry."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from dtypes import ACCELERATED, EVERY
from guards import with_guard
from torch import Tensor, nn

import matmul_grad
from matmul_grad.testing import assert_same_bits, integers, lay_out, normal

WIDE = torch.float32
M, N, K = 300, 130, 9
NARROW = [dtype for name, dtype in ACCELERATED.items() if name in ("bf16", "f16")]
needs_grad_dtype = pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="this torch has no grad_dtype")
every_dtype = pytest.mark.parametrize("dtype", EVERY)
Call = Callable[[Tensor, Tensor, Tensor], Tensor]


def accumulating(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    layer = matmul_grad.Linear(K, N, dtype=x.dtype, accumulate=True)
    layer.weight, layer.bias = weight, bias
    return layer(x)


def converted(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    layer = matmul_grad.convert(nn.Linear(K, N, dtype=x.dtype))
    layer.weight, layer.bias = weight, bias
    return layer(x)


def frozen(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """By a node in Python, of any dtype."""
    return matmul_grad.addmm(bias, x.detach(), weight.detach().t(), alpha=0.5)


# The gradient of an activation here is dC or 0; the factor of a gated layer is 1.
CALLS: dict[str, Call] = {
    "linear": matmul_grad.linear,
    "linear-3d": lambda x, w, b: matmul_grad.linear(x.view(3, -1, K), w, b).flatten(0, 1),
    "addmm": lambda x, w, b: matmul_grad.addmm(b, x, w.t(), alpha=0.5),
    "frozen": frozen,
    "relu": lambda x, w, b: matmul_grad.linear(x, w, b, "relu"),
    "gated": lambda x, w, b: matmul_grad.gated_linear(x, w * 0, w, b.new_ones(1), b, activation="relu"),
    "accumulate": accumulating,
    "converted": converted,
}
# Gradients that are kept in float32: of what compiled code would record too, and torch sum.
KEPT: dict[str, Call] = {
    **{name: call for name, call in CALLS.items() if name != "gated"},
    "addmm-recorded": lambda x, w, b: matmul_grad.addmm(b, x, w.t()),
}


def operands(dtype: torch.dtype, draw: Callable[..., Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and bias, and so large a bias that no activation is 0."""
    x, weight, bias = draw(M, K, dtype, 1), draw(N, K, dtype, 2), draw(1, N, dtype, 3)[0] + 1000
    return x.requires_grad_(), nn.Parameter(weight), nn.Parameter(bias.clone())


def gradient(name: str, dtype: torch.dtype, grad: Tensor, draw: Callable[..., Tensor] = integers) -> Tensor:
    given = operands(dtype, draw)
    CALLS[name](*given).backward(grad)
    assert given[2].grad is not None
    return given[2].grad


def product_of_ones(grad: Tensor) -> Tensor:
    return matmul_grad.mm(grad.new_ones(1, len(grad)), grad)[0]


@every_dtype
@pytest.mark.parametrize("name", CALLS)
def test_sums_are_exact(name: str, dtype: torch.dtype) -> None:
    grad = integers(M, N, dtype, 4)
    with matmul_grad.strict():
        found = gradient(name, dtype, grad)
    assert_same_bits(found, grad.double().sum(0).to(dtype))


@every_dtype
@pytest.mark.parametrize("name", CALLS)
def test_bits_are_those_of_a_product(name: str, dtype: torch.dtype) -> None:
    """Whatever the entry; torch adds in another order."""
    grad = normal(M, N, dtype, 4)
    assert_same_bits(gradient(name, dtype, grad, normal), product_of_ones(grad))
    if dtype.itemsize >= 4:
        assert not torch.equal(product_of_ones(grad), grad.sum(0)), "the case tells nothing"


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("striding", ["row", "column", "sliced", "narrow"])
@pytest.mark.parametrize("dtype", [WIDE, torch.bfloat16], ids=str)
def test_bits_depend_on_neither_layout_nor_threads(dtype: torch.dtype, striding: str, threads: int) -> None:
    grad, before = normal(M, 512, dtype, 4), torch.get_num_threads()
    x, weight = normal(M, K, dtype, 1).requires_grad_(), normal(512, K, dtype, 2).requires_grad_()
    bias = grad[0].clone().requires_grad_()
    try:
        torch.set_num_threads(threads)
        c = matmul_grad.linear(x, weight, bias)
        found = torch.autograd.grad(c, (x, weight, bias), lay_out(grad, striding))[2]
    finally:
        torch.set_num_threads(before)
    assert_same_bits(found, product_of_ones(grad))


@pytest.mark.parametrize("rows", [1, 2, 20_000])
def test_few_rows_and_chunks_that_threads_share(rows: int) -> None:
    grad, before = normal(rows, 3, WIDE, 4), torch.get_num_threads()
    given = [normal(*shape, WIDE, seed).requires_grad_() for seed, shape in enumerate(((rows, 2), (3, 2)))]
    bias = torch.zeros(3, requires_grad=True)
    try:
        torch.set_num_threads(2)
        _, dweight, dbias = torch.autograd.grad(matmul_grad.linear(*given, bias), (*given, bias), grad)
    finally:
        torch.set_num_threads(before)
    assert_same_bits(dbias, product_of_ones(grad))
    assert_same_bits(dweight, matmul_grad.mm(grad.t(), given[0].detach()))


@pytest.mark.parametrize("name", ["linear", "addmm"])
@pytest.mark.parametrize("striding", ["expanded_rows", "expanded_columns", "expanded"])
def test_expanded_gradients(striding: str, name: str) -> None:
    grad = lay_out(integers(M, N, WIDE, 4), striding)
    assert_same_bits(gradient(name, WIDE, grad), grad.contiguous().sum(0))


@every_dtype
@pytest.mark.parametrize("rows", [1, 7, M, 8200])
def test_error_is_at_most_twice_that_of_torch(rows: int, dtype: torch.dtype) -> None:
    grad = normal(rows, N, dtype, 4)
    exact = grad.double().sum(0) if dtype != torch.float64 else None
    found, theirs = product_of_ones(grad), grad.sum(0)
    if exact is None:
        exact = torch.from_numpy(grad.numpy().astype("longdouble").sum(0).astype("float64"))
    ours, torch_error = (float((x.double() - exact).abs().max()) for x in (found, theirs))
    rounding = torch.finfo(dtype).eps / 2 * float(exact.abs().max())
    assert ours <= 2 * (torch_error + rounding), f"{ours} > 2 * ({torch_error} + {rounding})"


@every_dtype
@pytest.mark.parametrize("n", [1, 15, 67])
def test_nothing_beyond_the_gradient_is_read(n: int, dtype: torch.dtype) -> None:
    for values in (integers(37, n, dtype, 4), integers(n, 37, dtype, 4).t()):
        grad, whole = with_guard(values)
        x, weight, bias = (integers(*s, dtype, 1).requires_grad_() for s in ((37, K), (n, K), (1, n)))
        c = matmul_grad.linear(x, weight, bias[0].detach().requires_grad_())
        row = c.grad_fn.next_functions[2][0].variable
        c.backward(grad)
        assert_same_bits(row.grad, values.double().sum(0).to(dtype))
        del grad, whole


@pytest.mark.parametrize("shape", [(1,), (N,), (1, N), (M, 1), (M, N), ()], ids=str)
def test_other_addends_have_the_gradients_of_torch(shape: tuple[int, ...]) -> None:
    """A bias of one element among them."""
    grad = integers(M, N, torch.float64, 4)
    x, weight = integers(M, K, torch.float64, 1).requires_grad_(), integers(N, K, torch.float64, 2).requires_grad_()
    added = integers(M, N, torch.float64, 3)[:1, :1].expand(M, N)[0, 0].expand(shape).clone().requires_grad_()
    calls: list[Callable[[], Tensor]] = [lambda: matmul_grad.addmm(added, x, weight.t(), beta=2)]
    calls += [lambda: matmul_grad.linear(x, weight, added)] if len(shape) == 1 else []
    for call, scale in zip(calls, (2, 1)):
        (found,) = torch.autograd.grad(call(), added, grad)
        assert_same_bits(found, (grad * scale).sum_to_size(shape))


def test_only_the_bias_may_be_asked_for() -> None:
    x, weight, bias = operands(WIDE, normal)
    grad = normal(M, N, WIDE, 4)
    (found,) = torch.autograd.grad(matmul_grad.linear(x, weight, bias), bias, grad)
    assert_same_bits(found, product_of_ones(grad))
    first, second, third = torch.autograd.grad(matmul_grad.linear(x, weight, bias), (x, weight, bias), grad)
    assert_same_bits(third, found)
    assert first.shape == x.shape and second.shape == weight.shape


def test_no_rows_give_zeros() -> None:
    layer = matmul_grad.Linear(K, N)
    layer(torch.ones(0, K)).sum().backward()
    assert_same_bits(layer.bias.grad, torch.zeros(N))


@needs_grad_dtype
@pytest.mark.parametrize("keeps_weight", [True, False], ids=["both", "bias"])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("name", KEPT)
def test_sums_that_are_kept_in_float32_are_not_rounded(name: str, dtype: torch.dtype, keeps_weight: bool) -> None:
    x, weight, bias = operands(dtype, integers)
    for leaf in (bias, *((weight,) if keeps_weight else ())):
        leaf.grad_dtype = WIDE
    grad = integers(M, N, dtype, 4) * 31
    KEPT[name](x, weight, bias).backward(grad)
    exact = grad.double().sum(0).to(WIDE)
    assert bias.grad is not None
    assert_same_bits(bias.grad + 0.0, exact + 0.0)
    assert not torch.equal(exact, exact.to(dtype).to(WIDE)), "the case is too easy"


@needs_grad_dtype
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_bits_of_sums_in_float32_are_those_of_a_product(dtype: torch.dtype) -> None:
    x, weight, bias = operands(dtype, normal)
    bias.grad_dtype = WIDE
    grad = normal(M, N, dtype, 4)
    matmul_grad.linear(x, weight, bias).backward(grad)
    assert bias.grad is not None
    assert_same_bits(bias.grad, matmul_grad.mm(grad.new_ones(1, M), grad, out_dtype=WIDE)[0])
    assert not torch.equal(bias.grad, grad.sum(0, dtype=WIDE)), "the case tells nothing"


def test_a_graph_of_the_gradient_is_recorded() -> None:
    x, weight, bias = (z.detach().requires_grad_() for z in operands(torch.float64, normal))
    for name in ("linear", "frozen"):
        (first,) = torch.autograd.grad(CALLS[name](x, weight, bias).square().sum(), bias, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), bias)
        torch.testing.assert_close(second, torch.full_like(bias, 2.0 * M))
