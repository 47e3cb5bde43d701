"""Gated linear maps: values, gradients of every order, transforms, compilers, what is saved, errors, the module."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from dtypes import EVERY
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call, grad, jacfwd, jacrev, vmap
from torch.library import opcheck
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import matmul_grad
from matmul_grad.activation_formulas import BY_TORCH, NAMES
from matmul_grad.gated import gated_gradients_by_torch
from matmul_grad.testing import assert_same_bits, normal

DOUBLE = torch.float64
OPERATOR = torch.ops.matmul_grad.addmm_gated
SHAPES = ((4, 5), (3, 5), (3, 5), (3,), (3,))  # input, weight, gate_weight, bias, gate_bias
ALL = (0, 1, 2, 3, 4)
every_activation = pytest.mark.parametrize("name", NAMES)
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # PyTorch's, of torch
]
reads_grad = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


def operands(dtype: torch.dtype = DOUBLE, needs: bool = False) -> tuple[Tensor, ...]:
    shapes = ((1, *shape) if len(shape) == 1 else shape for shape in SHAPES)
    drawn = (normal(*shape, dtype, seed=seed) for seed, shape in enumerate(shapes))
    return tuple(x.reshape(shape).clone().requires_grad_(needs) for x, shape in zip(drawn, SHAPES, strict=True))


def ours(name: str) -> Callable[..., Tensor]:
    return lambda *given: matmul_grad.gated_linear(*given, activation=name)


def theirs(name: str) -> Callable[..., Tensor]:
    def gated(input: Tensor, weight: Tensor, gate: Tensor, bias: Any = None, gate_bias: Any = None) -> Tensor:
        return BY_TORCH[name](functional.linear(input, gate, gate_bias)) * functional.linear(input, weight, bias)

    return gated


def exact(name: str, dtype: torch.dtype, given: Any) -> Tensor:
    """In float64, but that what is activated is rounded to ``dtype``, in which it is kept; then rounded."""
    input, weight, gate, *biases = (None if x is None else x.double() for x in given)
    bias, gate_bias = [*biases, None, None][:2]
    pre = functional.linear(input, gate, gate_bias).to(dtype).double()
    return (BY_TORCH[name](pre) * functional.linear(input, weight, bias)).to(dtype)


def squared(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *arguments: function(*arguments).square().sum()


# --- values ----------------------------------------------------------------------------------------------------------


@every_activation
@pytest.mark.parametrize("dtype", EVERY)
def test_results_match_those_in_float64(name: str, dtype: torch.dtype) -> None:
    input, *others = operands(dtype)
    for shape in ((4, 5), (2, 2, 5), (5,)):
        x = input[0] if shape == (5,) else input.view(shape)
        for rest in (others, others[:2], [*others[:2], None, others[3]], [*others[:2], others[2][:1], None]):
            with matmul_grad.strict():
                result = matmul_grad.gated_linear(x, *rest, activation=name)
            torch.testing.assert_close(result, exact(name, dtype, (x, *rest)))


@every_activation
@pytest.mark.parametrize("dtype", EVERY)
def test_bits_do_not_depend_on_the_graph_or_the_rows(name: str, dtype: torch.dtype) -> None:
    """Without a graph the gate's memory becomes that of the result."""
    recorded = ours(name)(*operands(dtype, needs=True)).detach()
    assert_same_bits(ours(name)(*operands(dtype)), recorded)
    input, *rest = operands(dtype)
    assert_same_bits(ours(name)(input[1:2], *rest), recorded[1:2])


def test_halves_of_one_weight_are_two_views() -> None:
    input, weight, gate, *_ = operands(torch.float32)
    packed = torch.cat([gate, weight])
    first, second = packed.chunk(2)
    assert_same_bits(matmul_grad.gated_linear(input, second, first), matmul_grad.gated_linear(input, weight, gate))


@every_activation
def test_empty_sums_are_what_is_added(name: str) -> None:
    added, gate = torch.tensor([1.0, -1.0, 0.5]), torch.tensor([0.5, 2.0, -1.0])
    none = torch.ones(3, 0)
    result = matmul_grad.gated_linear(torch.ones(2, 0), none, none, added, gate, name)
    torch.testing.assert_close(result, (BY_TORCH[name](gate) * added).expand(2, 3))
    assert matmul_grad.gated_linear(torch.ones(0, 2), torch.ones(3, 2), torch.ones(3, 2)).shape == (0, 3)


def test_errors() -> None:
    input, weight, gate, *_ = operands()
    for call in (lambda: ours("elu")(input, weight, gate), lambda: matmul_grad.GatedLinear(3, 2, activation="elu")):
        with pytest.raises(ValueError, match="one of relu, gelu, gelu_tanh, silu, tanh, got 'elu'"):
            call()
    with pytest.raises(ValueError, match=r"must have the same shape, got \(3, 5\) and \(2, 5\)"):
        matmul_grad.gated_linear(input, weight, gate[:2])
    for wrong in ((input[:, :4], weight, gate), (input, weight.float(), gate), (input, weight, gate, gate)):
        with pytest.raises(RuntimeError) as expected:
            theirs("silu")(*wrong)
        with pytest.raises(RuntimeError) as raised:
            matmul_grad.gated_linear(*wrong)
        assert str(raised.value) == str(expected.value)
    with pytest.raises(TypeError, match="must be Tensor"):
        matmul_grad.gated_linear(input, 3, gate)  # type: ignore[arg-type]


def test_unsupported_dtypes_fall_back() -> None:
    whole = torch.ones(2, 3, dtype=torch.int64)
    assert matmul_grad.gated_linear(whole, whole, whole, activation="relu").tolist() == [[9, 9], [9, 9]]
    with matmul_grad.strict(), pytest.raises(RuntimeError, match="strict"):
        matmul_grad.gated_linear(whole, whole, whole, activation="relu")


# --- gradients -------------------------------------------------------------------------------------------------------


@every_activation
def test_gradcheck(name: str) -> None:
    given = operands(needs=True)
    assert gradcheck(ours(name), given, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(ours(name), given)
    assert gradcheck(ours(name), given[:3])
    for frozen in ALL:
        some = tuple(x.detach() if index == frozen else x for index, x in enumerate(given))
        only = tuple(x if index == frozen else x.detach() for index, x in enumerate(given))
        assert gradcheck(ours(name), some) and gradcheck(ours(name), only)


@every_activation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_match_those_in_float64(name: str, dtype: torch.dtype) -> None:
    given, wide = operands(dtype, needs=True), [x.double().requires_grad_() for x in operands(dtype)]
    incoming = normal(4, 3, dtype, seed=4)
    found = torch.autograd.grad(ours(name)(*given), given, incoming)
    expected = torch.autograd.grad(theirs(name)(*wide), wide, incoming.double())
    for one, other in zip(found, expected, strict=True):
        error = (one.double() - other).abs().max()
        assert error <= 4 * torch.finfo(dtype).eps * max(1.0, other.abs().max().item()), (name, error)


@every_activation
def test_expanded_gradients_and_transposed_operands(name: str) -> None:
    given = [x.t().contiguous().t() if x.dim() == 2 else x for x in operands(torch.float32)]
    given = [x.requires_grad_() for x in given]
    found = torch.autograd.grad(ours(name)(*given).sum(), given)
    expected = torch.autograd.grad(theirs(name)(*given).sum(), given)
    torch.testing.assert_close(found, expected)
    assert [x.stride() for x in found] == [x.stride() for x in expected]


@every_activation
def test_composed_gradients_are_those_of_the_kernel(name: str) -> None:
    for dtype in (torch.float32, DOUBLE, torch.bfloat16):
        three = [normal(9, 40, dtype, seed=seed) for seed in range(3)]
        found = torch.ops.matmul_grad._gated_gradients(*three, name)
        wide = gated_gradients_by_torch(*(x.double() for x in three), name)
        torch.testing.assert_close(found, [x.to(dtype) for x in wide])


def saved(name: str, given: tuple[Tensor, ...]) -> list[Tensor]:
    found: list[Tensor] = []
    with saved_tensors_hooks(lambda x: found.append(x) or x, lambda x: x):
        assert ours(name)(*given).requires_grad
    return list({(x.data_ptr(), x.shape): x for x in found}.values())  # the input is saved for both weights


@every_activation
def test_backward_keeps_two_matrices_beside_the_operands(name: str) -> None:
    given = operands(needs=True)
    for some, shapes in (
        (given, [(4, 5), (5, 3), (5, 3), (4, 3), (4, 3)]),
        ((given[0].detach(), *given[1:]), [(4, 5), (4, 3), (4, 3)]),
        ((given[0], *(x.detach() for x in given[1:])), [(5, 3), (5, 3), (4, 3), (4, 3)]),
        ((*(x.detach() for x in given[:3]), *given[3:]), [(4, 3), (4, 3)]),
    ):
        assert [x.shape for x in saved(name, some)] == shapes


def test_the_result_may_be_changed_in_place() -> None:
    given = operands(needs=True)
    found = torch.autograd.grad(ours("silu")(*given).mul_(2).sum(), given)
    torch.testing.assert_close(found, torch.autograd.grad(2 * theirs("silu")(*given).sum(), given))


# --- transforms and compilers ----------------------------------------------------------------------------------------

TRANSFORMS: dict[str, Callable[..., Any]] = {
    "grad": lambda f: grad(squared(f), ALL),
    "jacrev": lambda f: jacrev(f, ALL),
    "jacfwd": lambda f: jacfwd(f, ALL),
    "grad of grad": lambda f: grad(lambda *x: sum(g.square().sum() for g in grad(squared(f), ALL)(*x)), ALL),
}


@pytest.mark.parametrize("name", ["relu", "silu"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms(name: str, transform: str) -> None:
    found, expected = (TRANSFORMS[transform](f(name))(*operands()) for f in (ours, theirs))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["tanh", "gelu"])
@pytest.mark.parametrize("dims", [(0, *[None] * 4), (None, 0, None, None, None), (0, 1, 0, 0, None)], ids=str)
def test_vmap(name: str, dims: tuple[int | None, ...]) -> None:
    batched = [x if dim is None else torch.stack([x, 2 * x, -x], dim) for dim, x in zip(dims, operands(), strict=True)]
    for of in (lambda f: f, lambda f: grad(squared(f), ALL), lambda f: jacfwd(f, ALL)):
        torch.testing.assert_close(vmap(of(ours(name)), dims)(*batched), vmap(of(theirs(name)), dims)(*batched))


@reads_grad
@pytest.mark.parametrize("name", ["relu", "gelu"])
@pytest.mark.parametrize("needs", [True, False], ids=["requires_grad", "constants"])
def test_opcheck(name: str, needs: bool) -> None:
    input, weight, gate, bias, gate_bias = (x.detach().requires_grad_(needs) for x in operands())
    for added in ((bias, gate_bias), (None, None)):
        assert set(opcheck(OPERATOR, (*added, input, weight.t(), gate.t(), name)).values()) == {"SUCCESS"}


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_with_a_full_graph(dynamic: bool) -> None:
    compiled = torch.compile(ours("silu"), fullgraph=True, dynamic=dynamic)
    whole, *rest = operands(needs=True)
    for rows in (4, 3):
        given = (whole.detach()[:rows].requires_grad_(), *rest)
        both = [f(*given) for f in (compiled, theirs("silu"))]
        torch.testing.assert_close(*both)
        torch.testing.assert_close(*(torch.autograd.grad(result.square().sum(), given) for result in both))


def test_exported() -> None:
    layer = matmul_grad.GatedLinear(5, 3, dtype=DOUBLE)
    program = torch.export.export(layer, (operands()[0],))
    assert OPERATOR.default in [node.target for node in program.graph.nodes]
    torch.testing.assert_close(program.module()(operands()[0]), layer(operands()[0]))
    decomposed = program.run_decompositions()
    assert "matmul_grad" not in str(decomposed.graph)
    torch.testing.assert_close(decomposed.module()(operands()[0]), layer(operands()[0]))


def test_autocast_casts_as_for_linear() -> None:
    given = operands(torch.float32, needs=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = matmul_grad.gated_linear(*given)
    assert result.dtype == torch.bfloat16
    result.sum().backward()
    assert all(x.grad is not None and x.grad.dtype == torch.float32 for x in given)


def test_flops_are_those_of_the_products() -> None:
    with FlopCounterMode(display=False) as counter:
        matmul_grad.gated_linear(*operands(needs=True)).sum().backward()
    assert counter.get_total_flops() == 2 * 3 * 2 * 4 * 5 * 3


# --- the module ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_module(bias: bool) -> None:
    layer = matmul_grad.GatedLinear(5, 3, bias, dtype=DOUBLE, activation="gelu")
    names = ["weight", "gate_weight", "bias", "gate_bias"][: 4 if bias else 2]
    assert sorted(layer.state_dict()) == sorted(names)
    input, state = operands()[0], layer.state_dict()
    torch.testing.assert_close(layer(input), theirs("gelu")(input, *(state[name] for name in names)))
    assert repr(layer) == f"GatedLinear(in_features=5, out_features=3, bias={bias}, activation='gelu')"
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_same_bits(again(input).detach(), layer(input).detach())
    functional_call(layer, {key: value * 2 for key, value in state.items()}, (input,))


def test_parameters_begin_as_those_of_a_linear_layer() -> None:
    torch.manual_seed(0)
    layer = matmul_grad.GatedLinear(100, 200)
    for parameter in layer.parameters():
        values = parameter.detach()
        assert 0.09 < values.abs().max() <= 0.1 and abs(float(values.std()) - 0.1 / 3**0.5) < 0.01
    assert not torch.equal(layer.weight, layer.gate_weight)
