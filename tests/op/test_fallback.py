"""Layouts, numbers and sizes that belong to torch's function, and exceptions that arrive once."""

import contextlib
import functools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from calls import CALLS, LINEAR
from outcomes import assert_same_outcome
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import matmul_grad

# --- layouts -------------------------------------------------------------------------------------------------


def outcome(call: Callable[..., Tensor], *operands: Any, **named: Any) -> Any:
    try:
        result = call(*operands, **named)
    except Exception as error:
        return type(error), str(error)
    return result.to_dense() if result.layout in (torch._mkldnn, torch.sparse_coo, torch.sparse_csr) else result


def nested(layout: torch.layout) -> Tensor:
    return torch.nested.nested_tensor([torch.ones(3, 4), torch.ones(5, 4)], layout=layout)


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
def test_nested_tensors(layout: torch.layout, mode: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
    with mode():
        x, w, bias = nested(layout), torch.randn(2, 4), torch.randn(2)
        layer = matmul_grad.Linear(4, 2)
        calls: list[tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...]]] = [
            (matmul_grad.linear, LINEAR, (x, w, bias)), (matmul_grad.linear, LINEAR, (x, w)),
            (matmul_grad.matmul, torch.matmul, (x, w.t())), (matmul_grad.matmul, torch.matmul, (x, x.transpose(1, 2))),
            (matmul_grad.bmm, torch.bmm, (x, x.transpose(1, 2))), (matmul_grad.mv, torch.mv, (x, w[0])),
            (lambda x, *_: layer(x), LINEAR, (x, layer.weight, layer.bias)),
        ]  # fmt: skip
        worked = 0
        for ours, theirs, operands in calls:
            actual, expected = outcome(ours, *operands), outcome(theirs, *operands)
            if isinstance(expected, tuple):
                assert actual == expected
                continue
            worked += 1
            for one, other in zip(actual.unbind(), expected.unbind(), strict=True):
                torch.testing.assert_close(one, other)
        assert worked >= 3


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "mkldnn": Tensor.to_mkldnn,
    "coo": Tensor.to_sparse,
    "csr": Tensor.to_sparse_csr,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore:.*Sparse CSR")
def test_other_layouts_match_torch(name: str, layout: str) -> None:
    operands, theirs = CALLS[name]
    for place in range(len(operands)):
        if layout == "csr" and operands[place].dim() < 2:
            continue
        given = [LAYOUTS[layout](x) if i == place else x for i, x in enumerate(operands)]
        actual, expected = (outcome(call, *given) for call in (getattr(matmul_grad, name), theirs))
        assert_same_outcome(actual, expected)


@pytest.mark.parametrize("name", ["matmul", "linear", "mv", "addmv", "dot"])
def test_strict_refuses_other_layouts(name: str) -> None:
    operands, _ = CALLS[name]
    with matmul_grad.strict(), pytest.raises(RuntimeError, match=r"matmul_grad\.strict\(\)"):
        getattr(matmul_grad, name)(operands[0], operands[1].to_mkldnn(), *operands[2:])


# --- exceptions ----------------------------------------------------------------------------------------------


class Late(Exception):
    pass


@pytest.mark.parametrize("error", [Late, IndexError, MemoryError, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("name", CALLS)
def test_exception_of_a_hook_arrives_once(name: str, error: type[BaseException]) -> None:
    """The very exception, and the function is not called a second time."""
    raised = error("as raised")
    calls = []

    def pack(x: Tensor) -> Tensor:
        calls.append(x)
        raise raised

    operands = [x.clone().requires_grad_() for x in CALLS[name][0]]
    with pytest.raises(error) as caught, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        getattr(matmul_grad, name)(*operands)
    assert caught.value is raised
    assert len(calls) == 1


def test_selective_checkpoint() -> None:
    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if "mm" in str(operator) else CheckpointPolicy.PREFER_RECOMPUTE

    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    x = torch.randn(3, 8, requires_grad=True)
    (expected,) = torch.autograd.grad(model(x).sum(), x)
    matmul_grad.convert(model)
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    value = checkpoint(model, x, use_reentrant=False, context_fn=contexts)
    torch.testing.assert_close(torch.autograd.grad(value.sum(), x), (expected,))


# --- numbers, batches, views ---------------------------------------------------------------------------------

NUMBERS = [
    0.5, 2, np.float64(0.5), np.float32(0.5), np.float16(0.5), np.int64(2), np.int8(2), torch.tensor(0.5),
    torch.tensor(2), True, np.bool_(True), 1j, np.complex64(1j), torch.tensor(True), torch.tensor(1j), 2**60,
]  # fmt: skip


@pytest.mark.parametrize("number", NUMBERS, ids=lambda x: f"{type(x).__module__}.{type(x).__name__}-{x}")
@pytest.mark.parametrize("name", ["addmm", "baddbmm", "addmv"])
def test_functions_accept_the_scales_that_the_override_accepts(name: str, number: Any) -> None:
    operands, theirs = CALLS[name]
    for scale in ("beta", "alpha"):
        actual, expected = (
            outcome(call, *operands, **{scale: number}) for call in (getattr(matmul_grad, name), theirs)
        )
        assert_same_outcome(actual, expected)
        if name != "addmv":
            with matmul_grad.strict():
                here = outcome(getattr(matmul_grad, name), *operands, **{scale: number})
                with matmul_grad.enabled():
                    switch = outcome(theirs, *operands, **{scale: number})
            assert isinstance(here, Tensor) == isinstance(switch, Tensor)


@pytest.mark.parametrize("name", ["mm", "bmm", "addmm", "baddbmm", "matmul", "mv", "addmv", "dot"])
@pytest.mark.parametrize("zero", ["batch", "m", "k", "n", "none"])
def test_vmap_over_sizes_of_zero(name: str, zero: str) -> None:
    size = {"batch": 5, "m": 3, "k": 4, "n": 2} | {zero: 0}
    letters = {
        "mm": ("mk", "kn"), "bmm": ("bmk", "bkn"), "addmm": ("mn", "mk", "kn"), "baddbmm": ("bmn", "bmk", "bkn"),
        "matmul": ("bmk", "kn"), "mv": ("mk", "k"), "addmv": ("m", "mk", "k"), "dot": ("k", "k"),
    }[name]  # fmt: skip
    shapes = [tuple(size["batch" if letter == "b" else letter] for letter in word) for word in letters]
    for mask in range(1, 2 ** len(shapes)):
        batched = [bool(mask >> i & 1) for i in range(len(shapes))]
        operands = [torch.randn((6, *shape) if many else shape) for many, shape in zip(batched, shapes, strict=True)]
        dims = tuple(0 if many else None for many in batched)
        actual, expected = (torch.vmap(f, dims)(*operands) for f in (getattr(matmul_grad, name), CALLS[name][1]))
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("needs", [False, True])
def test_result_is_no_view(name: str, needs: bool) -> None:
    given = [x.clone().requires_grad_(needs) for x in CALLS[name][0]]
    for shapes in (
        [None]
        if name != "matmul"
        else [
            None,
            ((4,), (4,)),
            ((3, 4), (4,)),
            ((4,), (4, 2)),
            ((5, 3, 4), (5, 4, 2)),
            ((3, 4), (5, 4, 2)),
            ((4,), (5, 4, 2)),
            ((5, 1, 3, 4), (6, 4, 2)),
        ]
    ):
        found = given if shapes is None else [torch.randn(shape).requires_grad_(needs) for shape in shapes]
        result = getattr(matmul_grad, name)(*found)
        assert not result._is_view(), shapes
        assert result._base is None
        result.add_(1)
        if needs:
            result.sum().backward()
        result.detach_()


def test_strict_refuses_compiled_code_of_another_dtype() -> None:
    whole = torch.ones(2, 2, dtype=torch.int64)
    torch._dynamo.reset()
    for name in ("mm", "matmul", "linear"):
        compiled = torch.compile(getattr(matmul_grad, name), backend="eager")
        assert torch.equal(compiled(whole, whole), torch.full((2, 2), 2))
        with matmul_grad.strict(), pytest.raises(RuntimeError, match=r"matmul_grad\.strict\(\)"):
            compiled(whole, whole)
        assert torch.equal(compiled(whole, whole), torch.full((2, 2), 2))


@pytest.mark.parametrize("name", CALLS)
def test_compiled_and_exported(name: str) -> None:
    """One graph, of this package's operators, also with a default device and with a mode of the user's."""
    operands, theirs = CALLS[name]
    call = getattr(matmul_grad, name)

    class Model(nn.Module):
        def forward(self, *x: Tensor) -> Tensor:
            return call(*x)

    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(call, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(*operands), theirs(*operands))
        with torch.device("cpu"):
            torch.testing.assert_close(compiled(*operands), theirs(*operands))
        for strictly in (False, True):
            program = torch.export.export(Model(), operands, strict=strictly)
            targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
            assert any(target.startswith("matmul_grad.") for target in targets), targets
