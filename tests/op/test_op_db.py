"""PyTorch's own operator data: every sample and error input of each product, on every CPU dtype, against torch: by the
switch, and by this package's functions.

Results, gradients, second gradients (in float64) and forward AD agree within tolerance, and errors in every letter.
"""

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
from torch import Tensor

import matmul_grad
from matmul_grad.activation_formulas import BY_TORCH

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what torch's test suite imports is torch's affair
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.opinfo.core import OpInfo

NAMES = (
    "mm", "addmm", "bmm", "baddbmm", "matmul", "mv", "einsum", "tensordot", "inner", "linalg.multi_dot",
    "nn.functional.linear", "nn.functional.bilinear", "nn.functional.scaled_dot_product_attention",
)  # fmt: skip
OURS = ("mm", "addmm", "bmm", "baddbmm"), tuple(ACCELERATED.values())
OPERATORS = [op for op in op_db if op.name in NAMES]
FUNCTIONS = {
    **{name: getattr(matmul_grad, name) for name in ("mm", "addmm", "bmm", "baddbmm", "matmul")},
    "nn.functional.linear": matmul_grad.linear,
}
CASES = [
    pytest.param(op, dtype, id=f"{op.formatted_name}-{str(dtype).removeprefix('torch.')}")
    for op in OPERATORS
    for dtype in sorted(op.supported_dtypes("cpu"), key=str)
]

pytestmark = pytest.mark.filterwarnings("ignore")  # samples that resize, that are empty, that are complex


@pytest.fixture(scope="module", autouse=True)
def tell_how_many(counts: Counter[str]) -> Iterator[None]:
    yield
    counts.update(ran)


def by_switch(op: OpInfo, call: Callable[[Product], list[Tensor]]) -> Any:
    with matmul_grad.enabled():
        return outcome(lambda: call(op))


def by_function(op: OpInfo, call: Callable[[Product], list[Tensor]]) -> Any:
    return outcome(lambda: call(FUNCTIONS[op.name]))


@pytest.mark.parametrize(("op", "dtype"), CASES)
def test_samples(op: OpInfo, dtype: torch.dtype) -> None:
    before = matmul_grad.info()["accelerated"]
    assert_samples_agree(op, dtype, by_switch)
    if op.name in OURS[0] and dtype in OURS[1]:
        assert matmul_grad.info()["accelerated"] != before, "none of it ran on these kernels"


@pytest.mark.parametrize(("op", "dtype"), [case for case in CASES if case.values[0].name in FUNCTIONS])
def test_samples_by_function(op: OpInfo, dtype: torch.dtype) -> None:
    """Strict for the dtypes that have kernels: so each ran on them."""
    with matmul_grad.strict() if dtype in OURS[1] else contextlib.nullcontext():
        assert_samples_agree(op, dtype, by_function)


@pytest.mark.parametrize(("name", "dtype"), [("relu", torch.float32), ("gelu", torch.bfloat16)], ids=str)
def test_samples_of_linear_with_an_activation(name: str, dtype: torch.dtype) -> None:
    """Second gradients, where torch has zeros for relu and this package none, are in test_activations.py."""
    (op,) = (op for op in OPERATORS if op.name == "nn.functional.linear")

    def theirs(*given: Any, **named: Any) -> Tensor:
        return BY_TORCH[name](op(*given, **named))

    def by_ours(_: Any, call: Callable[[Product], list[Tensor]]) -> Any:
        return outcome(lambda: call(functools.partial(matmul_grad.linear, activation=name)))

    with matmul_grad.strict():
        assert_samples_agree(op, dtype, by_ours, theirs)


def test_error_inputs() -> None:
    """Those that torch has; of these operators most have none, and test_override_errors.py has a table of its own."""
    for op in OPERATORS:
        for error in op.error_inputs("cpu") if op.error_inputs_func is not None else ():
            call = functools.partial(results, sample=error.sample_input)
            expected = outcome(functools.partial(call, op))
            assert isinstance(expected, tuple)
            for way in (by_switch, by_function) if op.name in FUNCTIONS else (by_switch,):
                assert way(op, call) == expected
                ran["errors"] += 1


def test_every_operator_is_there() -> None:
    assert {op.name for op in OPERATORS} == set(NAMES)
