"""PyTorch's own operator data: samples and error inputs of the convolutions, by function and by converted module."""

import contextlib
import functools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from dtypes import ACCELERATED
from operator_samples import Product, assert_samples_agree, outcome, ran, results
from torch import Tensor, nn

import matmul_grad

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what torch's test suite imports is torch's affair
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.opinfo.core import OpInfo, SampleInput

NAMES = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
OPERATORS = [op for op in op_db if op.name.removeprefix("nn.functional.") in NAMES]
CASES = [
    pytest.param(op, dtype, id=f"{op.name.removeprefix('nn.functional.')}-{str(dtype).removeprefix('torch.')}")
    for op in OPERATORS
    for dtype in sorted(op.supported_dtypes("cpu"), key=str)
]
OURS = tuple(ACCELERATED.values())
MODULE_DTYPES = (torch.float32, torch.bfloat16)  # the modules call the functions, which every dtype has gone through

pytestmark = pytest.mark.filterwarnings("ignore")  # "same" with even kernels, complex gradients


@pytest.fixture(scope="module", autouse=True)
def tell_how_many(counts: Counter[str]) -> Iterator[None]:
    yield
    counts.update(ran)


def name_of(op: OpInfo) -> str:
    return op.name.removeprefix("nn.functional.")


def strictly(sample: SampleInput, dtype: torch.dtype) -> Any:
    """Every sample of a dtype with kernels runs on them, but for one channel a group."""
    depthwise = sample.kwargs.get("groups", 1) > 1 and sample.args[0].shape[1] == 1
    return matmul_grad.strict() if dtype in OURS and not depthwise else contextlib.nullcontext()


def by_function(op: OpInfo, call: Callable[[Product], list[Tensor]]) -> Any:
    with strictly(call.keywords["sample"], call.keywords["sample"].input.dtype):  # type: ignore[attr-defined]  # a partial
        return outcome(lambda: call(getattr(matmul_grad, name_of(op))))


def layer_of(name: str) -> Product:
    """torch's function by a converted module that has the weight and the bias."""
    kind: Any = getattr(nn, name.replace("conv", "Conv").replace("_transpose", "Transpose"))

    def convolve(input: Tensor, weight: Tensor, bias: Tensor | None = None, **named: Any) -> Any:
        ends = weight.shape[0], weight.shape[1] * named.get("groups", 1)
        ends = ends if "transpose" in name else ends[::-1]
        layer = kind(*ends, weight.shape[2:], bias=bias is not None, dtype=torch.float32, **named)
        matmul_grad.convert(layer, kinds=(kind,))
        parameters = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        return torch.func.functional_call(layer, parameters, (input,))

    return convolve


def by_module(op: OpInfo, call: Callable[[Product], list[Tensor]]) -> Any:
    with strictly(call.keywords["sample"], call.keywords["sample"].input.dtype):  # type: ignore[attr-defined]  # likewise
        return outcome(lambda: call(layer_of(name_of(op))))


@pytest.mark.parametrize(("op", "dtype"), CASES)
def test_samples_by_function(op: OpInfo, dtype: torch.dtype) -> None:
    assert_samples_agree(op, dtype, by_function)


@pytest.mark.parametrize(("op", "dtype"), [case for case in CASES if case.values[1] in MODULE_DTYPES])
def test_samples_by_module(op: OpInfo, dtype: torch.dtype) -> None:
    before = sum(matmul_grad.nn.calls().get(name_of(op), {}).values())
    assert_samples_agree(op, dtype, by_module)
    assert sum(matmul_grad.nn.calls()[name_of(op)].values()) > before


@pytest.mark.parametrize("op", OPERATORS, ids=name_of)
def test_error_inputs(op: OpInfo) -> None:
    for error in op.error_inputs("cpu") if op.error_inputs_func is not None else ():
        call = functools.partial(results, sample=error.sample_input)
        expected = outcome(functools.partial(call, op))
        assert isinstance(expected, tuple)
        assert outcome(lambda: call(getattr(matmul_grad, name_of(op)))) == expected  # noqa: B023  # called at once
        ran["errors"] += 1


def test_every_operator_is_there() -> None:
    assert sorted(map(name_of, OPERATORS)) == sorted(NAMES)
