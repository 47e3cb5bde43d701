"""PyTorch's own operator data, computed twice: results, gradients of both orders and tangents of a sample."""

import functools
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what torch's test suite imports is torch's affair
    from torch.testing._internal.opinfo.core import OpInfo, SampleInput

Product = Callable[..., Any]
# Both sides sum in float32 (float64 for float64), in orders of their own.
TOLERANCE = {torch.float64: (1e-10, 1e-10), torch.float32: (1e-4, 1e-4), torch.float16: (5e-3, 5e-3),
             torch.bfloat16: (4e-2, 4e-2), torch.complex64: (1e-4, 1e-4), torch.complex128: (1e-10, 1e-10)}  # fmt: skip
ran: Counter[str] = Counter()


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


def results(op: Product, sample: SampleInput) -> list[Tensor]:
    tensors, rebuild = leaves(sample)
    input, args, kwargs = rebuild(fresh(tensors))
    return as_list(seeded(lambda: op(input, *args, **kwargs)))


def gradients(op: Product, sample: SampleInput, second: bool) -> list[Tensor]:
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


def tangents(op: Product, sample: SampleInput) -> list[Tensor]:
    tensors, rebuild = leaves(sample)
    with forward_ad.dual_level():
        duals = [
            forward_ad.make_dual(x, torch.full_like(x, 0.25)) if is_differentiable(x) else x for x in fresh(tensors)
        ]
        input, args, kwargs = rebuild(duals)
        found = [forward_ad.unpack_dual(x).tangent for x in as_list(seeded(lambda: op(input, *args, **kwargs)))]
    return [x for x in found if x is not None]


Way = Callable[[Any, Callable[[Product], list[Tensor]]], Any]


def outcome(call: Callable[[], list[Tensor]]) -> Any:
    """What comes back, or the error."""
    try:
        return call()
    except Exception as error:
        return type(error), re.sub(r"\nCPU: registered at .*", "", str(error))


def assert_agrees(kind: str, op: Product, call: Callable[[Product], list[Tensor]], way: Way) -> None:
    actual, expected = way(op, call), outcome(lambda: call(op))
    ran[kind] += 1
    if not isinstance(expected, list) or not isinstance(actual, list):
        assert actual == expected, kind
        return
    assert len(actual) == len(expected), kind
    for ours, theirs in zip(actual, expected, strict=True):
        rtol, atol = TOLERANCE.get(theirs.dtype, (0, 0))
        scale = float(theirs.abs().nan_to_num(posinf=0).max()) if is_differentiable(theirs) and theirs.numel() else 1.0
        torch.testing.assert_close(
            ours, theirs, rtol=rtol, atol=atol * max(1.0, scale), equal_nan=True, check_stride=kind == "results"
        )


def assert_samples_agree(op: OpInfo, dtype: torch.dtype, way: Way, theirs: Product | None = None) -> None:
    """theirs: what is called on torch's side, if not the operator itself."""
    differentiable = dtype in op.supported_backward_dtypes("cpu")
    torch.manual_seed(0)
    samples = list(op.sample_inputs("cpu", dtype, requires_grad=False))
    assert samples
    for sample in samples:
        assert_agrees("results", theirs or op, functools.partial(results, sample=sample), way)
        if differentiable and op.supports_autograd:
            second = dtype == torch.float64 and op.supports_gradgrad
            kind = "gradients of both orders" if second else "gradients"
            assert_agrees(kind, theirs or op, functools.partial(gradients, sample=sample, second=second), way)
        if differentiable and op.supports_forward_ad:
            assert_agrees("tangents", theirs or op, functools.partial(tangents, sample=sample), way)
