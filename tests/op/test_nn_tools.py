"""Converted models under tools that look for torch's layers, replace them, or take the model apart."""

import copy
import functools
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao import quantization
from torch.ao.quantization import quantize_fx
from torch.nn.utils.fusion import fuse_linear_bn_eval
from torch.utils.checkpoint import checkpoint

import matmul_grad
from matmul_grad.testing import assert_same_bits

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.ao.quantization.*"),  # deprecated as a whole
    pytest.mark.filterwarnings("ignore:.*quantized tensor creation.*"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max"),
    pytest.mark.filterwarnings("ignore:.*reduce_range.*"),
    pytest.mark.filterwarnings("ignore:.*isinstance.*treespec.*"),
]


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def x() -> Tensor:
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


def on_both(tool: Callable[[nn.Module], Any]) -> tuple[Any, Any]:
    """What the tool makes of a model of torch's, and of a converted one."""
    return tool(mlp().eval()), tool(matmul_grad.convert(mlp()).eval())


def classes(model: nn.Module) -> list[tuple[str, str]]:
    return [(type(module).__module__, type(module).__name__) for module in model.modules()]


# --- tools that know torch.nn.Linear by its class ------------------------------------------------------------


def quantized(model: nn.Module) -> nn.Module:
    wrapped = quantization.QuantWrapper(model)
    wrapped.qconfig = quantization.get_default_qconfig("fbgemm")  # type: ignore[assignment]
    prepared = quantization.prepare(wrapped)
    prepared(x())
    return quantization.convert(prepared)


def prepared_for_training(model: nn.Module) -> nn.Module:
    wrapped = quantization.QuantWrapper(model.train())
    wrapped.qconfig = quantization.get_default_qat_qconfig("fbgemm")  # type: ignore[assignment]
    return quantization.prepare_qat(wrapped)


def quantized_dynamically(model: nn.Module) -> nn.Module:
    return quantization.quantize_dynamic(model, {nn.Linear})


def quantized_by_fx(model: nn.Module) -> nn.Module:
    prepared = quantize_fx.prepare_fx(model, quantization.get_default_qconfig_mapping("fbgemm"), (x(),))
    prepared(x())
    return quantize_fx.convert_fx(prepared)


def fused(model: nn.Module) -> nn.Module:
    return quantization.fuse_modules(model, [["0", "1"]])


def fused_by_fx(model: nn.Module) -> nn.Module:
    from torch.fx.experimental.optimization import fuse  # which warns of what it imports

    return fuse(model)


TOOLS = [quantized, prepared_for_training, quantized_dynamically, quantized_by_fx, fused, fused_by_fx]


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.__name__)
def test_tool_that_checks_the_class_treats_a_converted_layer_as_torchs(tool: Callable[[nn.Module], nn.Module]) -> None:
    theirs, ours = on_both(tool)
    assert classes(ours) == classes(theirs)
    if tool is not prepared_for_training:  # whose observers have seen nothing yet
        torch.testing.assert_close(ours(x()), theirs(x()))


def test_batch_norm_is_fused_into_a_converted_layer() -> None:
    torch.manual_seed(0)
    layer, norm = nn.Linear(8, 4).eval(), nn.BatchNorm1d(4).eval()
    expected = fuse_linear_bn_eval(layer, norm)(x())
    whole = fuse_linear_bn_eval(matmul_grad.convert(layer), norm)
    assert matmul_grad.converted(whole) == [""]
    torch.testing.assert_close(whole(x()), expected)


def test_symbolic_trace_takes_a_layer_for_a_leaf() -> None:
    theirs, ours = on_both(torch.fx.symbolic_trace)
    assert str(ours.graph) == str(theirs.graph)
    assert [node.op for node in ours.graph.nodes] == ["placeholder", *["call_module"] * 3, "output"]
    assert matmul_grad.converted(ours) == ["0", "2"]
    with matmul_grad.strict():
        torch.testing.assert_close(ours(x()), theirs(x()))


# --- TorchScript and ONNX ------------------------------------------------------------------------------------


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.head = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x.unsqueeze(0)))[0]


def test_script_compiles_torch_forward() -> None:
    """Of a converted model, and of one that is not after the first ``convert`` of the process."""
    model = Everything().eval()
    expected = model(x())
    for each in (copy.deepcopy(model), matmul_grad.convert(model)):
        scripted = torch.jit.script(each)
        torch.testing.assert_close(scripted(x()), expected)
        assert "matmul_grad::" not in str(scripted.inlined_graph)
        saved = io.BytesIO()
        torch.jit.save(scripted, saved)
        saved.seek(0)
        torch.testing.assert_close(torch.jit.load(saved)(x()), expected)


def test_a_trace_calls_the_operators() -> None:
    model = matmul_grad.convert(mlp())
    traced = torch.jit.trace(model, x())
    assert "matmul_grad::linear" in str(traced.inlined_graph)
    assert_same_bits(traced(x()).detach(), model(x()).detach())


def test_onnx_trace_holds_torch_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``torch.onnx.export(dynamo=False)`` does first, and needs no package of ONNX for."""
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    traced = torch.jit.trace(matmul_grad.convert(Everything()).eval(), x(), check_trace=False)
    assert "matmul_grad::" not in str(traced.inlined_graph)


@pytest.mark.parametrize("dynamo", [False, True])
def test_onnx_export(dynamo: bool) -> None:
    pytest.importorskip("onnxscript" if dynamo else "onnx", reason="torch.onnx.export needs it")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's code and of ONNX's
        target = io.BytesIO()
        torch.onnx.export(matmul_grad.convert(Everything()).eval(), (x(),), None if dynamo else target, dynamo=dynamo)


# --- export ---------------------------------------------------------------------------------------------------


class Products(nn.Module):
    """Each product, by the functions of this package."""

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        batch = a.unsqueeze(0)
        return (
            matmul_grad.mm(a, b),
            matmul_grad.addmm(a @ b, a, b, beta=2, alpha=3),
            matmul_grad.bmm(batch, b.unsqueeze(0)),
            matmul_grad.baddbmm(batch @ b, batch, b.unsqueeze(0), beta=0.5),
        )


def operators(program: torch.export.ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("make", [mlp, Everything], ids=["mlp", "transformer"])
def test_run_decompositions_of_a_converted_model_gives_atens_operators(
    make: Callable[[], nn.Module], strict: bool
) -> None:
    model = matmul_grad.convert(make()).eval()
    program = torch.export.export(model, (x(),), strict=strict)
    assert "matmul_grad.addmm.default" in operators(program)
    decomposed = program.run_decompositions()
    assert not [name for name in operators(decomposed) if "matmul_grad" in name]
    torch.testing.assert_close(decomposed.module()(x()), model(x()))
    table = torch.export.default_decompositions()
    del table[torch.ops.matmul_grad.addmm.default]
    assert "matmul_grad.addmm.default" in operators(program.run_decompositions(table)), "as torch's table allows"


def test_run_decompositions_of_each_operator() -> None:
    arguments = torch.randn(3, 4), torch.randn(4, 5)
    decomposed = torch.export.export(Products(), arguments).run_decompositions()
    assert not [name for name in operators(decomposed) if "matmul_grad" in name]
    torch.testing.assert_close(decomposed.module()(*arguments), Products()(*arguments))


def test_inductor_keeps_the_operators() -> None:
    from torch._inductor.decomposition import select_decomp_table

    names = {f"matmul_grad.{name}" for name in ("mm", "bmm", "addmm", "baddbmm", "scaled_mm")}
    assert not names & {str(operator).removesuffix(".default") for operator in select_decomp_table()}


# --- activation checkpointing ---------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


def step(model: nn.Module, call: Callable[[Tensor], Tensor]) -> list[Tensor]:
    model.zero_grad()
    call(x().requires_grad_()).sin().sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_of_a_converted_model(reentrant: bool) -> None:
    model = mlp()
    expected = step(model, model)
    matmul_grad.convert(model)
    with matmul_grad.strict():
        found = step(model, functools.partial(checkpoint, model, use_reentrant=reentrant))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("compiled", ["inside", "around"])
def test_checkpoint_and_compiled_code(compiled: str) -> None:
    torch._dynamo.reset()
    model: nn.Module = Checkpointed()
    expected = step(model, model)
    matmul_grad.convert(model)
    call: Callable[[Tensor], Tensor] = torch.compile(model, backend="aot_eager")
    if compiled == "inside":
        inner = torch.compile(model.inner, backend="eager")
        call = functools.partial(checkpoint, inner, use_reentrant=False)
    torch.testing.assert_close(step(model, call), expected)
    torch._dynamo.reset()


def test_export_of_a_model_that_checkpoints() -> None:
    model = matmul_grad.convert(Checkpointed())
    program = torch.export.export(model, (x(),))
    torch.testing.assert_close(program.module()(x()), model(x()))
    assert [module for module in matmul_grad.converted(model)] == ["inner.0", "inner.2"]
