"""Models and transforms while the switch is on: torch's autograd, compilers and modules, on these kernels."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from dtypes import EVERY
from switch import accelerated
from torch import Tensor, nn
from torch.autograd import forward_ad

import matmul_grad
from matmul_grad.testing import integers, normal

DOUBLE = torch.float64
# Forward mode and the compilers script with parts of torch that torch itself has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*")


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    """Nothing here may fall back to torch."""
    with matmul_grad.strict():
        yield
    assert matmul_grad.info()["on"] == []


def on_and_off(call: Callable[[], Any], *operators: str) -> tuple[Any, Any]:
    """What ``call`` gives with the switch on and off; with it on, each of ``operators`` ran on these kernels."""
    off = call()
    before = accelerated()
    with matmul_grad.enabled():
        on = call()
    after = accelerated()
    for operator in operators:
        assert after[operator] > before[operator], f"{operator} never ran on these kernels"
    return on, off


def assert_close(pair: tuple[Any, Any], tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(*pair, rtol=tolerance, atol=tolerance)


def operands(*sizes: tuple[int, ...], dtype: torch.dtype = DOUBLE) -> list[Tensor]:
    return [
        normal(torch.Size(size).numel(), 1, dtype, seed=seed).view(size).requires_grad_()
        for seed, size in enumerate(sizes)
    ]


PRODUCTS: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]], str]] = {
    "mm": (torch.mm, [(3, 4), (4, 2)], "mm"),
    "addmm": (lambda c, a, b: torch.addmm(c, a, b, beta=0.5, alpha=2), [(2,), (3, 4), (4, 2)], "addmm"),
    "bmm": (torch.bmm, [(2, 3, 4), (2, 4, 2)], "bmm"),
    "baddbmm": (lambda c, a, b: torch.baddbmm(c, a, b, alpha=-1), [(2, 3, 2), (2, 3, 4), (2, 4, 2)], "baddbmm"),
    "matmul": (torch.matmul, [(5, 1, 3, 4), (2, 4, 2)], "bmm"),
    "linear": (nn.functional.linear, [(2, 3, 4), (5, 4), (5,)], "addmm"),
    "einsum": (lambda a, b: torch.einsum("bij,bjk->bik", a, b), [(2, 3, 4), (2, 4, 5)], "bmm"),
    "tensordot": (lambda a, b: torch.tensordot(a, b, 2), [(3, 4, 5), (4, 5, 2)], "mm"),
}
each_product = pytest.mark.parametrize("name", PRODUCTS)


@each_product
def test_derivatives_of_every_order(name: str) -> None:
    function, sizes, _ = PRODUCTS[name]
    with matmul_grad.enabled():
        inputs = operands(*sizes)
        assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(function, inputs, check_fwd_over_rev=True)


@each_product
def test_gradients_match_torch(name: str) -> None:
    function, sizes, operator = PRODUCTS[name]

    def gradients() -> Any:
        inputs = operands(*sizes)
        value = function(*inputs).sin().sum()  # its gradient is no constant; .sum() alone hands an expanded one
        first = torch.autograd.grad(value, inputs, create_graph=True)
        plain = torch.autograd.grad(function(*inputs).sum(), inputs)
        return value, first, torch.autograd.grad(sum(x.pow(2).sum() for x in first), inputs), plain

    assert_close(on_and_off(gradients, operator))


@each_product
def test_transforms_match_torch(name: str) -> None:
    function, sizes, operator = PRODUCTS[name]
    inputs = [x.detach() for x in operands(*sizes)]
    every = tuple(range(len(inputs)))

    def loss(*xs: Tensor) -> Tensor:
        return function(*xs).sin().sum()

    def transforms() -> Any:
        batched = [torch.stack([x, 2 * x, -x]) for x in inputs]
        return (
            torch.func.grad(loss, every)(*inputs),
            torch.func.jvp(loss, tuple(inputs), tuple(x.cos() for x in inputs)),
            torch.func.vjp(function, *inputs)[1](torch.ones_like(function(*inputs))),
            torch.func.jacrev(function)(*inputs),
            torch.func.hessian(loss)(*inputs),
            torch.func.vmap(function)(*batched),
            torch.func.vmap(function, in_dims=(0, *[None] * (len(inputs) - 1)))(batched[0], *inputs[1:]),
            torch.func.vmap(torch.func.grad(loss, every))(*batched),
        )

    assert_close(on_and_off(transforms, operator))


def test_forward_mode_alone() -> None:
    def tangent() -> Tensor:
        a, b = (x.detach() for x in operands((3, 4), (4, 2)))
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(forward_ad.make_dual(a, a.cos()) @ forward_ad.make_dual(b, b.sin())).tangent

    assert_close(on_and_off(tangent, "mm"))


@pytest.mark.parametrize("dtype", [case for case in EVERY if case.values[0].itemsize == 2])
def test_autocast_follows_aten(dtype: torch.dtype) -> None:
    def step() -> Any:
        torch.manual_seed(0)
        layer, x = nn.Linear(8, 5), integers(4, 8, torch.float32).requires_grad_()
        with torch.autocast("cpu", dtype):
            y = layer(x)
            z = torch.bmm(y[None], y[None].mT)
        assert y.dtype == z.dtype == dtype
        z.float().sum().backward()
        assert layer.weight.grad is not None
        return y, z, layer.weight.grad, layer.bias.grad, x.grad

    before = accelerated(dtype)["addmm"]
    assert_close(on_and_off(step, "addmm", "bmm"), 0.05)
    assert accelerated(dtype)["addmm"] > before


# --- modules ------------------------------------------------------------------------------------------------


def train_step(model: nn.Module, x: Tensor, *others: Tensor, **kwargs: Any) -> dict[str, Tensor]:
    """Output, and the gradient of every parameter and of the input."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    result = model(x, *(x for _ in others), **kwargs)
    y = result[0] if isinstance(result, tuple) else result
    y.float().square().mean().backward()
    assert x.grad is not None
    return {"output": y.detach(), "input": x.grad} | {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }


def assert_within_budget(make: Callable[[], nn.Module], step: Callable[[nn.Module, torch.dtype], dict[str, Tensor]],
                         dtype: torch.dtype, *operators: str) -> None:  # fmt: skip
    """As matmul_grad.testing: each error against float64 at most 2 × (torch's + one rounding of the largest)."""
    truth = step(make().double(), DOUBLE)
    ours, theirs = on_and_off(lambda: step(make().to(dtype), dtype), *operators)
    assert ours.keys() == theirs.keys() == truth.keys()
    for name, exact in truth.items():
        error, torch_error = (float((x[name].double() - exact).abs().max()) for x in (ours, theirs))
        rounding = torch.finfo(dtype).eps / 2 * float(exact.abs().max())
        assert error <= 2 * (torch_error + rounding), f"{name}: {error:.2e}, torch's {torch_error:.2e}"


each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])


@each_dtype
@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_encoder_layer(dtype: torch.dtype, norm_first: bool) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=norm_first)

    def step(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        return train_step(model, normal(2 * 10, 32, torch.float32).view(2, 10, 32).to(dtype))

    assert_within_budget(make, step, dtype, "addmm", "mm")


@each_dtype
@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention(dtype: torch.dtype, need_weights: bool) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.MultiheadAttention(32, 4, batch_first=True)

    def step(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        x = normal(2 * 10, 32, torch.float32).view(2, 10, 32).to(dtype)
        return train_step(model, x, x, x, need_weights=need_weights)

    assert_within_budget(make, step, dtype, "addmm", "mm", *["bmm"] * need_weights)


def test_evaluation_uses_torch_fast_path() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    x = normal(2 * 10, 32, torch.float32).view(2, 10, 32)
    with torch.inference_mode():
        assert_close(on_and_off(lambda: layer(x), "addmm"), 1e-5)


def test_inference_tensors() -> None:
    a, batch = normal(3, 3, DOUBLE), normal(6, 3, DOUBLE).view(2, 3, 3)
    with torch.inference_mode(), matmul_grad.enabled():
        for x in (torch.mm(a, a), torch.addmm(a, a, a), torch.bmm(batch, batch), torch.baddbmm(a, batch, batch)):
            assert x.is_inference()
            assert not x.requires_grad


def test_lstm_and_bilinear() -> None:
    torch.manual_seed(0)
    lstm, bilinear, x = nn.LSTM(6, 8).double(), nn.Bilinear(6, 6, 3).double(), normal(5 * 2, 6, DOUBLE).view(5, 2, 6)
    assert_close(on_and_off(lambda: train_step(lstm, x), "addmm"))
    assert_close(on_and_off(lambda: train_step(bilinear, x, x)))


# --- compilers ----------------------------------------------------------------------------------------------


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(40, 70), nn.GELU(), nn.Linear(70, 30, bias=False), nn.ReLU(), nn.Linear(30, 5)
    ).double()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("when", ["compiled-off", "compiled-on"])
def test_code_of_inductor_calls_these_kernels(when: str) -> None:
    """Its extern kernels are aten's out overloads, so code compiled before is switched too."""
    model, x = mlp(), normal(33, 40, DOUBLE)
    compiled = torch.compile(model, fullgraph=True)
    expected = train_step(model, x)
    if when == "compiled-off":
        assert_close((train_step(compiled, x), {f"_orig_mod.{name}" if name not in ("output", "input") else name: value
                                                for name, value in expected.items()}))  # fmt: skip
    before = accelerated()
    with matmul_grad.enabled():
        found = train_step(compiled, x)
    after = accelerated()
    assert_close((list(found.values()), list(expected.values())))
    assert after["addmm"] - before["addmm"] >= 2
    assert after["mm"] - before["mm"] >= 1 + 5, "the layer without a bias, and gradients"


@pytest.mark.usefixtures("fresh_compiler")
def test_dynamic_shapes() -> None:
    compiled = torch.compile(lambda a, b, c: torch.baddbmm(c, a, b).relu() @ b.mT, fullgraph=True, dynamic=True)
    for batch, m, n, k in ((3, 20, 17, 30), (5, 21, 18, 31)):
        a, b, c = (x.detach() for x in operands((batch, m, k), (batch, k, n), (n,)))
        assert_close(on_and_off(lambda a=a, b=b, c=c: compiled(a, b, c)))  # type: ignore[misc]


def test_export() -> None:
    model, x = mlp(), normal(33, 40, DOUBLE)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("rows", min=2)},))
    assert_close(on_and_off(lambda: program.module()(x), "addmm", "mm"))


def test_checkpointing_and_hooks() -> None:
    from torch.utils.checkpoint import checkpoint

    def step() -> Any:
        model, x = mlp(), normal(33, 40, DOUBLE).requires_grad_()
        seen: list[Tensor] = []
        model[0].register_full_backward_hook(lambda module, into, out: seen.append(out[0]))
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
            y = checkpoint(model, x, use_reentrant=False)
            y.sum().backward()
        return y, x.grad, seen

    assert_close(on_and_off(step, "addmm", "mm"))
