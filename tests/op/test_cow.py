"""Copy-on-write inputs stay so: products and their gradients read an operand where it lies.

For PyTorch's own samples, as its operator tests check its own kernels (TestCompositeCompliance.test_cow_input).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import matmul_grad

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what torch's test suite imports is torch's affair
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.opinfo.core import OpInfo, SampleInput

FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    **{name: getattr(matmul_grad, name) for name in ("mm", "addmm", "bmm", "baddbmm", "matmul")},
    "nn.functional.linear": matmul_grad.linear,
}
OPERATORS = [pytest.param(op, id=op.formatted_name) for op in op_db if op.name in FUNCTIONS]

pytestmark = pytest.mark.filterwarnings("ignore")  # samples that are empty


class Lazy:
    """The strided tensors of ``values``, each replaced by a lazy clone, beside what it held."""

    def __init__(self, values: Any) -> None:
        flat, spec = pytree.tree_flatten(values)
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.values = pytree.tree_unflatten([self._lazy(x) for x in flat], spec)

    def _lazy(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            return value
        clone = torch._lazy_clone(value)
        self.pairs.append((clone, value.detach().clone()))
        return clone

    def leaves(self) -> list[Tensor]:
        return [clone for clone, _ in self.pairs if clone.requires_grad]

    def assert_untouched(self, what: str) -> None:
        for i, (clone, held) in enumerate(self.pairs):
            assert torch._C._is_cow_tensor(clone), f"{what}: tensor {i} was copied"
            assert torch.equal(clone, held), f"{what}: tensor {i} was written"


def assert_reads_in_place(product: Callable[..., Tensor], sample: SampleInput, backward: bool) -> None:
    operands = Lazy((sample.input, *sample.args, sample.kwargs))
    *positional, named = operands.values
    result = product(*positional, **named)
    operands.assert_untouched("forward")
    if not backward or not result.requires_grad:
        return
    grads = Lazy(torch.ones_like(result))
    torch.autograd.grad(result, operands.leaves(), grads.values, allow_unused=True, retain_graph=True)
    operands.assert_untouched("backward")
    grads.assert_untouched("backward, the gradient")


def assert_samples(op: OpInfo, product: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    samples = list(op.sample_inputs("cpu", torch.float32, requires_grad=True))
    assert samples
    for sample in samples:
        assert_reads_in_place(product, sample, op.supports_cow_input_no_materialize_backward)


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("switch", [False, True], ids=["torch", "switch"])
def test_cow_input(op: OpInfo, switch: bool) -> None:
    """Without the switch it shows that torch's kernels pass the same check."""
    with matmul_grad.enabled() if switch else contextlib.nullcontext():
        assert_samples(op, op.get_op())


@pytest.mark.parametrize("op", OPERATORS)
def test_cow_input_by_function(op: OpInfo) -> None:
    with matmul_grad.strict():
        assert_samples(op, FUNCTIONS[op.name])


def test_every_operator_is_there() -> None:
    assert {param.values[0].name for param in OPERATORS} == set(FUNCTIONS)
