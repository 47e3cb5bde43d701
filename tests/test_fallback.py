"""Calls that belong to torch's function: other classes, tracers, modes, layouts; and what stays on the kernels."""

import contextlib
import functools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import matmul_grad

OPERATORS = torch.ops.matmul_grad
LINEAR = nn.functional.linear


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


# name: (operands, torch's function)
CALLS: dict[str, tuple[tuple[Tensor, ...], Callable[..., Tensor]]] = {
    "mm": ((ones(3, 4), ones(4, 2)), torch.mm),
    "bmm": ((ones(5, 3, 4), ones(5, 4, 2)), torch.bmm),
    "addmm": ((ones(2), ones(3, 4), ones(4, 2)), torch.addmm),
    "baddbmm": ((ones(2), ones(5, 3, 4), ones(5, 4, 2)), torch.baddbmm),
    "matmul": ((ones(5, 3, 4), ones(4, 2)), torch.matmul),
    "linear": ((ones(5, 3, 4), ones(2, 4), ones(2)), LINEAR),
    "mv": ((ones(3, 4), ones(4)), torch.mv),
    "addmv": ((ones(3), ones(3, 4), ones(4)), torch.addmv),
    "dot": ((ones(4), ones(4)), torch.dot),
    "vdot": ((ones(4), ones(4)), torch.vdot),
}


class Seen(TorchDispatchMode):
    """The operators of matmul_grad that were called, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.ours: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "matmul_grad":
            self.ours.append(op.overloadpacket.__name__)
        return op(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    """The functions that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


class Overriding(Tensor):
    """Answers every function by its name."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function


class Tagged(Tensor):
    """A subclass that changes nothing."""


class AtenOnly(Tensor):
    """A wrapper that knows aten's operators, by their unwrapped operands, and no other."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> "AtenOnly":
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace != "aten":
            raise NotImplementedError(op)
        unwrapped = [x.inner if isinstance(x, AtenOnly) else x for x in args]
        return op(*unwrapped, **(kwargs or {}))


@pytest.mark.parametrize("name", CALLS)
def test_overriding_subclass_gets_torchs_function(name: str) -> None:
    operands, theirs = CALLS[name]
    for place in range(len(operands)):
        given = [x.as_subclass(Overriding) if i == place else x for i, x in enumerate(operands)]
        with matmul_grad.strict():  # the call is the subclass's, and no fallback
            assert getattr(matmul_grad, name)(*given) is theirs, place


@pytest.mark.parametrize("name", CALLS)
def test_out_of_a_subclass_gets_torchs_function(name: str) -> None:
    operands, theirs = CALLS[name]
    if name != "linear":
        assert getattr(matmul_grad, name)(*operands, out=ones(1).as_subclass(Overriding)) is theirs


@pytest.mark.parametrize("name", CALLS)
def test_wrapper_that_knows_aten_alone(name: str) -> None:
    operands, theirs = CALLS[name]
    for place in range(len(operands)):
        given = [AtenOnly(x) if i == place else x for i, x in enumerate(operands)]
        with matmul_grad.strict():
            torch.testing.assert_close(getattr(matmul_grad, name)(*given), theirs(*operands))


@pytest.mark.parametrize("name", CALLS)
def test_subclass_that_changes_nothing_runs_here(name: str) -> None:
    operands, theirs = CALLS[name]
    with matmul_grad.strict(), Seen() as seen:
        result = getattr(matmul_grad, name)(*(x.as_subclass(Tagged) for x in operands))
    assert type(result) is Tagged
    assert seen.ours
    torch.testing.assert_close(result.as_subclass(Tensor), theirs(*operands))


@pytest.mark.parametrize("name", CALLS)
def test_mode_sees_torchs_function_alone(name: str) -> None:
    operands, theirs = CALLS[name]
    with Functions() as mode:
        getattr(matmul_grad, name)(*operands)
    assert mode.seen == [theirs]


@pytest.mark.parametrize("name", CALLS)
def test_default_device_does_not_cost_the_kernels(name: str) -> None:
    operands, _ = CALLS[name]
    with torch.device("cpu"), matmul_grad.strict(), Seen() as seen:
        getattr(matmul_grad, name)(*operands)
    assert len(seen.ours) == 1


@pytest.mark.parametrize("name", CALLS)
def test_symbolic_trace_is_one_node(name: str) -> None:
    operands, theirs = CALLS[name]
    names = "xyz"[: len(operands)]
    function = eval(f"lambda {', '.join(names)}: ours({', '.join(names)})", {"ours": getattr(matmul_grad, name)})
    graph = torch.fx.symbolic_trace(function)
    assert [node.target for node in graph.graph.nodes if node.op == "call_function"] == [theirs]
    torch.testing.assert_close(graph(*operands), theirs(*operands))


def test_symbolic_trace_of_mm_backward() -> None:
    graph = torch.fx.symbolic_trace(lambda g, a, b: matmul_grad.mm_backward(g, a, b))
    operands = ones(3, 2), ones(3, 4), ones(4, 2)
    torch.testing.assert_close(graph(*operands), matmul_grad.mm_backward(*operands))
    with pytest.raises(TypeError):
        matmul_grad.mm_backward(operands[0], 3, operands[2])  # type: ignore[arg-type]


def test_weight_that_knows_linear_alone() -> None:
    """As torchao's: a wrapper around integers which overrides linear, and nothing else."""

    class Packed(Tensor):
        codes: Tensor

        @staticmethod
        def __new__(cls, codes: Tensor) -> "Packed":
            made = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)
            made.codes = codes
            return made

        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is LINEAR:
                return LINEAR(args[0], args[1].codes.float() / 16, *args[2:], **(kwargs or {}))
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **(kwargs or {}))

        @classmethod
        def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if op is torch.ops.aten.detach.default:
                return args[0]
            raise NotImplementedError(op)

    layer = nn.Linear(8, 5)
    layer.weight = nn.Parameter(Packed(torch.randint(-9, 9, (5, 8), dtype=torch.int8)), requires_grad=False)
    x = torch.randn(3, 8)
    expected = layer(x)
    torch.testing.assert_close(matmul_grad.convert(layer)(x), expected)


# --- layouts ------------------------------------------------------------------------------------------------


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
def test_other_layouts_are_torchs(name: str, layout: str) -> None:
    operands, theirs = CALLS[name]
    for place in range(len(operands)):
        if layout == "csr" and operands[place].dim() < 2:
            continue
        given = [LAYOUTS[layout](x) if i == place else x for i, x in enumerate(operands)]
        actual, expected = (outcome(call, *given) for call in (getattr(matmul_grad, name), theirs))
        if isinstance(expected, Tensor):
            torch.testing.assert_close(actual, expected)
        else:
            assert actual == expected


@pytest.mark.parametrize("name", ["matmul", "linear", "mv", "addmv", "dot"])
def test_strict_refuses_other_layouts(name: str) -> None:
    operands, _ = CALLS[name]
    with matmul_grad.strict(), pytest.raises(RuntimeError, match=r"matmul_grad\.strict\(\)"):
        getattr(matmul_grad, name)(operands[0], operands[1].to_mkldnn(), *operands[2:])


# --- exceptions ---------------------------------------------------------------------------------------------


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


# --- numbers, batches, views --------------------------------------------------------------------------------


NUMBERS = [
    0.5, 2, np.float64(0.5), np.float32(0.5), np.float16(0.5), np.int64(2), np.int8(2), torch.tensor(0.5),
    torch.tensor(2), True, np.bool_(True), 1j, np.complex64(1j), torch.tensor(True), torch.tensor(1j), 2**60,
]  # fmt: skip


@pytest.mark.parametrize("number", NUMBERS, ids=lambda x: f"{type(x).__module__}.{type(x).__name__}-{x}")
@pytest.mark.parametrize("name", ["addmm", "baddbmm", "addmv"])
def test_scale_is_taken_here_as_under_the_switch(name: str, number: Any) -> None:
    operands, theirs = CALLS[name]
    for scale in ("beta", "alpha"):
        actual, expected = (
            outcome(call, *operands, **{scale: number}) for call in (getattr(matmul_grad, name), theirs)
        )
        if isinstance(expected, Tensor):
            torch.testing.assert_close(actual, expected)
        else:
            assert actual == expected
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
