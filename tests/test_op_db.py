"""PyTorch's own operator data: every sample and error input of each product, on every CPU dtype, switch on against off.

Results, gradients, second gradients (in float64) and forward AD agree within tolerance, and errors in every letter.
"""

import functools
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import matmul_grad

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what torch's own test suite imports is torch's affair
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.opinfo.core import OpInfo, SampleInput

NAMES = (
    "mm", "addmm", "bmm", "baddbmm", "matmul", "mv", "einsum", "tensordot", "inner", "linalg.multi_dot",
    "nn.functional.linear", "nn.functional.bilinear", "nn.functional.scaled_dot_product_attention",
)  # fmt: skip
OURS = ("mm", "addmm", "bmm", "baddbmm"), (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OPERATORS = [op for op in op_db if op.name in NAMES]
CASES = [
    pytest.param(op, dtype, id=f"{op.formatted_name}-{str(dtype).removeprefix('torch.')}")
    for op in OPERATORS
    for dtype in sorted(op.supported_dtypes("cpu"), key=str)
]
# Both sides sum in float32 (float64 for float64), in orders of their own.
TOLERANCE = {torch.float64: (1e-10, 1e-10), torch.float32: (1e-4, 1e-4), torch.float16: (5e-3, 5e-3),
             torch.bfloat16: (4e-2, 4e-2), torch.complex64: (1e-4, 1e-4), torch.complex128: (1e-10, 1e-10)}  # fmt: skip
ran: Counter[str] = Counter()

pytestmark = pytest.mark.filterwarnings("ignore")  # samples that resize, that are empty, that are complex


@pytest.fixture(scope="module", autouse=True)
def tell_how_many(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(f"\nop_db: {', '.join(f'{count} {kind}' for kind, count in sorted(ran.items()))}")


def leaves(sample: SampleInput) -> tuple[list[Tensor], Callable[[list[Tensor]], tuple[Any, tuple[Any, ...], Any]]]:
    """The tensors of a sample, and how to put others in their places."""
    parts = (sample.input, sample.args, sample.kwargs)
    flat, spec = torch.utils._pytree.tree_flatten(parts)
    tensors = [x for x in flat if isinstance(x, Tensor)]

    def rebuild(others: list[Tensor]) -> tuple[Any, tuple[Any, ...], Any]:
        rest = iter(others)
        return torch.utils._pytree.tree_unflatten([next(rest) if isinstance(x, Tensor) else x for x in flat], spec)

    return tensors, rebuild


def fresh(tensors: Sequence[Tensor], needs: bool = False) -> list[Tensor]:
    """Copies that lie in memory as the originals do."""
    return [
        x.detach().clone(memory_format=torch.preserve_format).requires_grad_(needs and is_differentiable(x))
        for x in tensors
    ]


def is_differentiable(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def seeded(call: Callable[[], Any]) -> Any:
    torch.manual_seed(0)  # dropout of attention
    return call()


def as_list(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [x for x in result if isinstance(x, Tensor)]


def results(op: OpInfo, sample: SampleInput) -> list[Tensor]:
    tensors, rebuild = leaves(sample)
    input, args, kwargs = rebuild(fresh(tensors))
    return as_list(seeded(lambda: op(input, *args, **kwargs)))


def gradients(op: OpInfo, sample: SampleInput, second: bool) -> list[Tensor]:
    tensors, rebuild = leaves(sample)
    copies = fresh(tensors, needs=True)
    wanted = [x for x in copies if x.requires_grad]
    input, args, kwargs = rebuild(copies)
    outputs = [x for x in as_list(seeded(lambda: op(input, *args, **kwargs))) if x.requires_grad]
    if not outputs:
        return []
    first = torch.autograd.grad(
        outputs, wanted, [torch.full_like(x, 0.5) for x in outputs], create_graph=second, allow_unused=True
    )
    found = [x for x in first if x is not None]
    again = [x for x in found if second and x.requires_grad]
    if not again:
        return found
    twice = torch.autograd.grad(again, wanted, [torch.full_like(x, 0.5) for x in again], allow_unused=True)
    return [x.detach() for x in found] + [x for x in twice if x is not None]


def tangents(op: OpInfo, sample: SampleInput) -> list[Tensor]:
    tensors, rebuild = leaves(sample)
    with forward_ad.dual_level():
        duals = [
            forward_ad.make_dual(x, torch.full_like(x, 0.25)) if is_differentiable(x) else x for x in fresh(tensors)
        ]
        input, args, kwargs = rebuild(duals)
        found = [forward_ad.unpack_dual(x).tangent for x in as_list(seeded(lambda: op(input, *args, **kwargs)))]
    return [x for x in found if x is not None]


def both(call: Callable[[], list[Tensor]]) -> tuple[Any, Any]:
    """What comes back, or the error, with the switch off and on."""

    def outcome() -> Any:
        try:
            return call()
        except Exception as error:
            return type(error), re.sub(r"\nCPU: registered at .*", "", str(error))

    expected = outcome()
    with matmul_grad.enabled():
        return outcome(), expected


def assert_agrees(kind: str, call: Callable[[], list[Tensor]]) -> None:
    actual, expected = both(call)
    ran[kind] += 1
    if not isinstance(expected, list) or not isinstance(actual, list):
        assert actual == expected, kind
        return
    assert len(actual) == len(expected), kind
    for ours, torchs in zip(actual, expected, strict=True):
        rtol, atol = TOLERANCE.get(torchs.dtype, (0, 0))
        scale = float(torchs.abs().nan_to_num(posinf=0).max()) if is_differentiable(torchs) and torchs.numel() else 1.0
        torch.testing.assert_close(
            ours, torchs, rtol=rtol, atol=atol * max(1.0, scale), equal_nan=True, check_stride=kind == "results"
        )


@pytest.mark.parametrize(("op", "dtype"), CASES)
def test_samples(op: OpInfo, dtype: torch.dtype) -> None:
    differentiable = dtype in op.supported_backward_dtypes("cpu")
    torch.manual_seed(0)
    samples = list(op.sample_inputs("cpu", dtype, requires_grad=False))
    before = matmul_grad.info()["accelerated"]
    assert samples
    for sample in samples:
        assert_agrees("results", functools.partial(results, op, sample))
        if differentiable and op.supports_autograd:
            second = dtype == torch.float64 and op.supports_gradgrad
            kind = "gradients of both orders" if second else "gradients"
            assert_agrees(kind, functools.partial(gradients, op, sample, second))
        if differentiable and op.supports_forward_ad:
            assert_agrees("tangents", functools.partial(tangents, op, sample))
    if op.name in OURS[0] and dtype in OURS[1]:
        assert matmul_grad.info()["accelerated"] != before, "none of it ran on these kernels"


def test_error_inputs() -> None:
    """Those that torch has; of these operators most have none, and test_override_errors.py has a table of its own."""
    for op in OPERATORS:
        for error in op.error_inputs("cpu") if op.error_inputs_func is not None else ():
            actual, expected = both(functools.partial(results, op, error.sample_input))
            assert isinstance(expected, tuple)
            assert actual == expected
            ran["errors"] += 1


def test_every_operator_is_there() -> None:
    assert {op.name for op in OPERATORS} == set(NAMES)
