"""Linear maps with an activation: gradients of every order, transforms, compilers, what is saved, errors, modules."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from dtypes import EVERY
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, vmap
from torch.library import opcheck
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import matmul_grad
from matmul_grad.activation_formulas import BY_TORCH, GRADIENTS, NAMES
from matmul_grad.kernels.cpu.gemm_args import BY_RESULT
from matmul_grad.testing import assert_same_bits, normal

DOUBLE = torch.float64
OPERATOR = torch.ops.matmul_grad.addmm_activation
every_activation = pytest.mark.parametrize("name", NAMES)
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # PyTorch's, of torch
]
reads_grad = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


def operands(dtype: torch.dtype = DOUBLE, needs: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Input (4, 5), weight (3, 5), bias (3)."""
    drawn = normal(4, 5, dtype, seed=1), normal(3, 5, dtype, seed=2), normal(1, 3, dtype, seed=3)[0].clone()
    return tuple(x.requires_grad_(needs) for x in drawn)  # type: ignore[return-value]


def ours(name: str) -> Callable[..., Tensor]:
    return lambda input, weight, bias=None: matmul_grad.linear(input, weight, bias, name)


def theirs(name: str) -> Callable[..., Tensor]:
    return lambda input, weight, bias=None: BY_TORCH[name](functional.linear(input, weight, bias))


def squared(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *arguments: function(*arguments).square().sum()


# --- values ----------------------------------------------------------------------------------------------------------


@every_activation
@pytest.mark.parametrize("dtype", EVERY)
def test_results_match_torch(name: str, dtype: torch.dtype) -> None:
    input, weight, bias = operands(dtype)
    for shape in ((4, 5), (2, 2, 5), (5,)):
        x = input[0] if shape == (5,) else input.view(shape)
        for added in (bias, None, bias[:1]):
            with matmul_grad.strict():
                result = matmul_grad.linear(x, weight, added, name)
            wide = (None if t is None else t.double() for t in (x, weight, added))
            expected = theirs(name)(*wide)
            torch.testing.assert_close(result, expected.to(dtype))


@every_activation
def test_an_empty_sum_is_activated_too(name: str) -> None:
    bias = torch.tensor([1.0, -1.0, 0.5])
    result = matmul_grad.linear(torch.ones(2, 0), torch.ones(3, 0), bias, name)
    torch.testing.assert_close(result, BY_TORCH[name](bias).expand(2, 3))
    assert matmul_grad.linear(torch.ones(0, 2), torch.ones(3, 2), bias, name).shape == (0, 3)


def test_an_unknown_activation_is_named() -> None:
    for call in (lambda: matmul_grad.linear(*operands(), "elu"), lambda: matmul_grad.Linear(3, 2, activation="elu")):
        with pytest.raises(ValueError, match="one of relu, gelu, gelu_tanh, silu, tanh, got 'elu'"):
            call()


def test_errors_are_those_of_torch() -> None:
    for wrong in ((torch.ones(2, 3), torch.ones(4, 5)), (torch.ones(2, 3), torch.ones(4, 3).double())):
        with pytest.raises(RuntimeError) as expected:
            functional.linear(*wrong)
        with pytest.raises(RuntimeError) as raised:
            matmul_grad.linear(*wrong, activation="gelu")
        assert str(raised.value) == str(expected.value)


def test_unsupported_dtypes_fall_back() -> None:
    whole = torch.ones(2, 3, dtype=torch.int64)
    assert matmul_grad.linear(whole, whole, activation="relu").tolist() == [[3, 3], [3, 3]]
    with matmul_grad.strict(), pytest.raises(RuntimeError, match="strict"):
        matmul_grad.linear(whole, whole, activation="relu")


# --- gradients -------------------------------------------------------------------------------------------------------


@every_activation
def test_gradcheck(name: str) -> None:
    input, weight, bias = operands(needs=True)
    assert gradcheck(ours(name), (input, weight, bias), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(ours(name), (input, weight, bias))
    assert gradcheck(ours(name), (input, weight))
    for frozen in range(3):
        some = tuple(x.detach() if index == frozen else x for index, x in enumerate((input, weight, bias)))
        assert gradcheck(ours(name), some) and gradgradcheck(ours(name), some)


@every_activation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_match_those_in_float64(name: str, dtype: torch.dtype) -> None:
    ours_, exact = operands(dtype, needs=True), [x.double().requires_grad_() for x in operands(dtype)]
    incoming = normal(4, 3, dtype, seed=4)
    ours(name)(*ours_).backward(incoming)
    theirs(name)(*exact).backward(incoming.double())
    for one, other in zip(ours_, exact):
        assert one.grad is not None and other.grad is not None
        error = (one.grad.double() - other.grad).abs().max()
        assert error <= 4 * torch.finfo(dtype).eps * max(1.0, other.grad.abs().max().item()), (name, error)


@every_activation
def test_expanded_gradients(name: str) -> None:
    input, weight, bias = operands(torch.float32, needs=True)
    found = torch.autograd.grad(ours(name)(input, weight, bias).sum(), (input, weight, bias))
    expected = torch.autograd.grad(theirs(name)(input, weight, bias).sum(), (input, weight, bias))
    torch.testing.assert_close(found, expected)
    assert found[1].stride() == expected[1].stride()


@every_activation
def test_composed_gradient_is_that_of_the_kernel(name: str) -> None:
    for dtype in (torch.float32, DOUBLE, torch.bfloat16):
        grad_, kept = normal(9, 40, dtype, seed=1), normal(9, 40, dtype, seed=2)
        found = torch.ops.matmul_grad._activation_gradient(grad_, kept, name)
        wide = GRADIENTS[name](grad_.double(), kept.double())
        torch.testing.assert_close(found, wide.to(dtype))


def saved(name: str, input: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
    found: list[Tensor] = []
    with saved_tensors_hooks(lambda x: found.append(x) or x, lambda x: x):
        result = matmul_grad.linear(input, weight, bias, name)
    assert result.requires_grad
    return [x for x in found if x is not None]


@every_activation
def test_backward_keeps_one_matrix_beside_the_operands(name: str) -> None:
    input, weight, bias = operands(needs=True)
    result = matmul_grad.linear(input, weight, bias, name).detach()
    kept = result if name in BY_RESULT else functional.linear(input, weight, bias).detach()
    for some, shapes in (
        ((input, weight, bias), [(4, 5), (5, 3), (4, 3)]),
        ((input.detach(), weight, bias), [(4, 5), (4, 3)]),
        ((input, weight.detach(), bias.detach()), [(5, 3), (4, 3)]),
        ((input.detach(), weight.detach(), bias), [(4, 3)]),
    ):
        found = saved(name, *some)
        assert [x.shape for x in found] == shapes
        torch.testing.assert_close(found[-1].detach(), kept)


@every_activation
def test_the_node_of_the_product_is_apart(name: str) -> None:
    """So that dC and what f' needs are released before both gradients of the product are allocated."""
    assert type(matmul_grad.linear(*operands(needs=True), name).grad_fn).__name__ == "ActivatedBackward"


@every_activation
def test_the_saved_matrix_may_not_be_changed(name: str) -> None:
    input, weight, bias = operands(needs=True)
    result = matmul_grad.linear(input, weight, bias, name)
    if name in BY_RESULT:
        result.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            result.sum().backward()
    else:
        result.mul_(2).sum().backward()


# --- transforms and compilers ----------------------------------------------------------------------------------------

TRANSFORMS: dict[str, Callable[..., Any]] = {
    "grad": lambda f: grad(squared(f), (0, 1, 2)),
    "jacrev": lambda f: jacrev(f, (0, 1, 2)),
    "jacfwd": lambda f: jacfwd(f, (0, 1, 2)),
    "hessian": lambda f: hessian(squared(f), (0, 1, 2)),
    "grad of grad": lambda f: grad(
        lambda *x: sum(g.square().sum() for g in grad(squared(f), (0, 1, 2))(*x)), (0, 1, 2)
    ),
}


@every_activation
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms(name: str, transform: str) -> None:
    found, expected = (TRANSFORMS[transform](f(name))(*operands()) for f in (ours, theirs))
    torch.testing.assert_close(found, expected)


@every_activation
@pytest.mark.parametrize("dims", [(0, None, None), (None, 0, None), (None, None, 0), (0, 0, 0), (1, None, 0)], ids=str)
def test_vmap(name: str, dims: tuple[int | None, ...]) -> None:
    batched = [x if dim is None else torch.stack([x, 2 * x, -x], dim) for dim, x in zip(dims, operands(), strict=True)]
    for of in (lambda f: f, lambda f: grad(squared(f), (0, 1, 2)), lambda f: jacfwd(f, (0, 1, 2))):
        torch.testing.assert_close(vmap(of(ours(name)), dims)(*batched), vmap(of(theirs(name)), dims)(*batched))


@reads_grad
@every_activation
@pytest.mark.parametrize("needs", [True, False], ids=["requires_grad", "constants"])
def test_opcheck(name: str, needs: bool) -> None:
    input, weight, bias = operands()
    for added in (bias, None):
        arguments = (added, input, weight.t())
        arguments = tuple(None if x is None else x.detach().requires_grad_(needs) for x in arguments)
        assert set(opcheck(OPERATOR, (*arguments, name)).values()) == {"SUCCESS"}


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", ["relu", "gelu"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_with_a_full_graph(name: str, dynamic: bool) -> None:
    compiled = torch.compile(ours(name), fullgraph=True, dynamic=dynamic)
    whole, weight, bias = operands(needs=True)
    for rows in (4, 3):
        input = whole.detach()[:rows].requires_grad_()
        both = [f(input, weight, bias) for f in (compiled, theirs(name))]
        torch.testing.assert_close(*both)
        gradients = [torch.autograd.grad(result.square().sum(), (input, weight, bias)) for result in both]
        torch.testing.assert_close(*gradients)


@every_activation
def test_exported(name: str) -> None:
    layer = matmul_grad.Linear(5, 3, activation=name, dtype=DOUBLE)
    program = torch.export.export(layer, (operands()[0],))
    assert OPERATOR.default in [node.target for node in program.graph.nodes]
    torch.testing.assert_close(program.module()(operands()[0]), layer(operands()[0]))
    decomposed = program.run_decompositions()
    assert "matmul_grad" not in str(decomposed.graph)
    torch.testing.assert_close(decomposed.module()(operands()[0]), layer(operands()[0]))


def test_autocast_casts_as_for_linear() -> None:
    input, weight, bias = operands(torch.float32, needs=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = matmul_grad.linear(input, weight, bias, "gelu")
        inside = matmul_grad.linear(input, weight, bias)
    assert result.dtype == inside.dtype == torch.bfloat16
    result.sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32


def test_flops_are_those_of_the_product() -> None:
    input, weight, bias = operands(needs=True)
    with FlopCounterMode(display=False) as counter:
        matmul_grad.linear(input, weight, bias, "gelu").sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 4 * 5 * 3


# --- modules ---------------------------------------------------------------------------------------------------------


@every_activation
def test_module(name: str) -> None:
    layer, plain = matmul_grad.Linear(5, 3, activation=name, dtype=DOUBLE), nn.Linear(5, 3, dtype=DOUBLE)
    plain.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(operands()[0]), BY_TORCH[name](plain(operands()[0])))
    assert repr(layer) == f"Linear(in_features=5, out_features=3, bias=True, activation='{name}')"
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_same_bits(again(operands()[0]).detach(), layer(operands()[0]).detach())
    parameters = {key: value * 2 for key, value in layer.state_dict().items()}
    functional_call(layer, parameters, (operands()[0],))


def test_a_module_without_an_activation_is_as_before() -> None:
    layer = matmul_grad.Linear(5, 3)
    assert "activation" not in vars(layer) and repr(layer) == repr(nn.Linear(5, 3))
    assert not matmul_grad.linear(torch.ones(1, 5), layer.weight, layer.bias, None).isnan().any()
