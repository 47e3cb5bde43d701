"""Converted attention: in_proj and out_proj on these kernels, in training and evaluation, with torch's results."""

import copy
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import matmul_grad
from matmul_grad.layers import MARK

pytestmark = pytest.mark.filterwarnings("ignore:.*prototype stage.*:UserWarning")  # torch's nested tensors

FUSED = ("_native_multi_head_attention", "_transformer_encoder_layer_fwd")


class Operators(TorchDispatchMode):
    """Calls of a block, by namespace and name, of products of matrices and fused layers."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operator.name().split(".")[0]
        if name.split("::")[1] in ("mm", "addmm", *FUSED):
            self.calls[name] += 1
        return operator(*args, **(kwargs or {}))


def transformer(**named: Any) -> nn.Sequential:
    """Two layers of four linear maps, and a head: nine."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0, **named)
    return nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, 3))


def inputs(*size: int, seed: int = 1) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def assert_close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def gradients(model: nn.Module, result: Tensor) -> list[Tensor | None]:
    model.zero_grad()
    result.sin().sum().backward()
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_nine_of_nine_linear_maps(train: bool, norm_first: bool) -> None:
    model, x = transformer(norm_first=norm_first).train(train), inputs(2, 5, 8)
    y = model(x)
    expected, expected_gradients = y.detach(), gradients(model, y)
    matmul_grad.convert(model)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), Operators() as ran, matmul_grad.strict():
            y = model(x)
        assert_close(y.detach(), expected)
        assert ran.calls == {"matmul_grad::addmm": 9}
        if grad:
            with matmul_grad.strict():
                assert_close(gradients(model, y), expected_gradients)
    matmul_grad.restore(model)
    with torch.no_grad(), Operators() as ran:
        assert_close(model(x), expected)
    assert not [name for name in ran.calls if "matmul_grad" in name]


def test_without_biases_and_without_grad() -> None:
    model, x = matmul_grad.convert(transformer(bias=False)).eval(), inputs(2, 5, 8)
    with torch.no_grad(), Operators() as ran:
        model(x)
    assert ran.calls == {"matmul_grad::mm": 8, "matmul_grad::addmm": 1}


def test_names_filter_and_restore() -> None:
    model = transformer()
    before = [type(module) for module in model.modules()]
    asked: list[str] = []
    matmul_grad.convert(model, lambda module, name: asked.append(name) or module.out_features > 3)  # type: ignore[func-returns-value]
    layers = [f"0.layers.{i}.{part}" for i in (0, 1) for part in ("self_attn", "linear1", "linear2")]
    assert asked == [name.replace("self_attn", "self_attn.out_proj") for name in layers] + ["1"]
    assert matmul_grad.converted(model) == layers
    assert [type(module) for module in model.modules()] == before
    matmul_grad.restore(model)
    assert not [module for module in model.modules() if MARK in vars(module)]
    asked.clear()
    matmul_grad.convert(nn.MultiheadAttention(8, 2), lambda module, name: bool(asked.append(name)))  # type: ignore[func-returns-value]
    assert asked == ["out_proj"]


ATTENTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "no bias": {"bias": False},
    "other sizes": {"kdim": 6, "vdim": 5},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
}
CALLS: dict[str, dict[str, Any]] = {
    "weights": {},
    "no weights": {"need_weights": False},
    "each head": {"average_attn_weights": False},
    "mask": {"attn_mask": torch.tensor([[False] * 4 + [True]] * 5), "need_weights": False},
    "causal": {"attn_mask": torch.ones(5, 5).triu(1).bool(), "is_causal": True, "need_weights": False},
    "padding": {"key_padding_mask": torch.tensor([[False] * 5, [False] * 3 + [True] * 2])},
}


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", ATTENTIONS)
def test_attention_matches_torch(kind: str, call: str, train: bool) -> None:
    named = ATTENTIONS[kind]
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, 2, **named).train(train)
    sizes = 8, named.get("kdim", 8), named.get("vdim", 8)
    shape = (2, 5) if named.get("batch_first") else (5, 2)
    query, key, value = (inputs(*shape, size, seed=seed) for seed, size in enumerate(sizes))
    if kind in ("plain", "batch_first"):
        key = value = query  # self-attention, for which torch has a fused kernel
    expected = module(query, key, value, **CALLS[call])
    expected_gradients = gradients(module, expected[0])
    matmul_grad.convert(module)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), Operators() as ran:
            found = module(query, key, value, **CALLS[call])
        assert_close(found, expected)
        assert set(ran.calls) <= {"matmul_grad::mm", "matmul_grad::addmm"}
        assert ran.calls.total() == (2 if key is query else 4)
        if grad:
            assert_close(gradients(module, found[0]), expected_gradients)


def test_an_input_without_a_batch_and_bad_input() -> None:
    module, x = nn.MultiheadAttention(8, 2).eval(), inputs(5, 8)
    expected = module(x, x, x)
    converted = matmul_grad.convert(copy.deepcopy(module))
    assert_close(converted(x, x, x), expected)
    for bad in (inputs(5, 7), inputs(2, 2, 5, 8), inputs(5, 8).double()):
        errors = []
        for each in (module, converted):
            with pytest.raises(Exception) as raised:  # whatever torch's is
                each(bad, bad, bad)
            errors.append((raised.type, str(raised.value)))
        assert errors[0] == errors[1]


def test_a_whole_transformer_with_its_decoder() -> None:
    torch.manual_seed(0)
    model = nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=True)
    source, target = inputs(2, 5, 8), inputs(2, 4, 8, seed=2)
    expected = model(source, target)
    expected_gradients = gradients(model, expected)
    with Operators() as ran:
        found = matmul_grad.convert(model)(source, target)
    assert_close(found, expected)
    assert_close(gradients(model, found), expected_gradients)
    assert ran.calls == {"matmul_grad::addmm": 4 + 7}, "cross-attention projects the query, and key and value together"


def test_nested_tensors_keep_torch_fused_layer() -> None:
    """As ``TransformerEncoder`` makes them of a padding mask in evaluation."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model, x = nn.TransformerEncoder(layer, 2).eval(), inputs(2, 5, 8)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=padding)
        matmul_grad.convert(model)
        with Operators() as ran:
            assert_close(model(x, src_key_padding_mask=padding), expected)
    assert "aten::_transformer_encoder_layer_fwd" in ran.calls


class Overriding(torch.Tensor):
    """A subclass that is offered each function of torch's."""

    seen: ClassVar[list[Any]] = []

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(function)
        return super().__torch_function__(function, types, args, kwargs or {})


def test_subclass_receives_torch_function() -> None:
    module = matmul_grad.convert(nn.MultiheadAttention(8, 2))
    x = inputs(5, 2, 8).as_subclass(Overriding)
    Overriding.seen.clear()
    found, plain = module(x, x, x)[0], torch.Tensor(x)
    assert_close(torch.Tensor(found), matmul_grad.restore(module)(plain, plain, plain)[0])
    assert nn.functional.multi_head_attention_forward in Overriding.seen


def test_a_default_device_is_no_reason_to_leave() -> None:
    module, x = matmul_grad.convert(nn.MultiheadAttention(8, 2)), inputs(5, 2, 8)
    with torch.device("cpu"), Operators() as ran:  # a mode of torch functions
        module(x, x, x)
    assert ran.calls == {"matmul_grad::addmm": 2}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_compiled(train: bool) -> None:
    torch._dynamo.reset()
    model, x = matmul_grad.convert(transformer()).train(train), inputs(2, 5, 8)
    expected = model(x)
    expected_gradients = [g.clone() for g in gradients(model, expected) if g is not None]
    graphs: list[str] = []

    def backend(graph: Any, example: Any) -> Callable[..., Any]:
        graphs.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    found = compiled(x)
    assert_close(found, expected)
    assert_close(gradients(model, found), expected_gradients)
    assert graphs.count("matmul_grad.addmm.default") == 9
    torch._dynamo.reset()


def test_copies_and_pickles() -> None:
    model, x = matmul_grad.convert(transformer()).eval(), inputs(2, 5, 8)
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert matmul_grad.converted(twin) == matmul_grad.converted(model)
        with torch.no_grad(), Operators() as ran:
            assert_close(twin(x), expected.detach())
        assert ran.calls == {"matmul_grad::addmm": 9}
        assert not [module for module in matmul_grad.restore(twin).modules() if MARK in vars(module)]
