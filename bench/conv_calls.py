"""A convolution as the bench calls it: operands, the call of a backend, and whether its result is correct."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .. import convolution, testing
from ..kernels.cpu import host
from .conv_layers import Layer
from .correctness import IncorrectResult
from .workloads import OURS, TORCH

FORWARD, DGRAD, WGRAD = DIRECTIONS = testing.PRODUCTS  # dgrad is the gradient of the input, wgrad of the weight
BACKENDS = (OURS, TORCH)
INTEGERS = 2  # operands are -2 … 2: sums of 4 million products are exact in float32
# Operations a second of torch on one thread, about, its 16-bit loops at their worst (Zen 3): to weigh what is left.
PACE = {"f32": 40e9, "f64": 10e9, "bf16": 1e9, "f16": 1e9}
WITH_INSTRUCTIONS = {"bf16": "avx512bf16", "f16": "avx512fp16"}  # LLVM's names

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Comparison:
    """One direction of a layer, with a dtype, a batch and a number of threads."""

    layer: Layer
    direction: str
    dtype: str
    batch: int = 1
    threads: int = 1

    @property
    def name(self) -> str:
        count = f"{self.threads} thread{'s' * (self.threads > 1)}"
        return f"{self.layer.name}, {self.direction}, {self.dtype}, batch {self.batch}, {count}"

    @property
    def flops(self) -> int:
        return self.batch * self.layer.flops

    @property
    def torch_seconds(self) -> float:
        """About what one call of torch takes."""
        pace = PACE["f32"] if instructions(self.dtype) else PACE[self.dtype]
        return self.flops / pace / self.threads

    @property
    def row(self) -> dict[str, Any]:
        """Its fields in a row of the results."""
        layer = asdict(self.layer) | {"kind": self.layer.kind}
        own = {name: getattr(self, name) for name in ("direction", "dtype", "batch", "threads", "name", "flops")}
        return layer | own


def of_fields(fields: dict[str, Any]) -> Comparison:
    """The comparison of a row, or of a message: JSON has no tuples.

    >>> one = Comparison(Layer("VGG-16", 3, 64, (224, 224), (3, 3), 1, 1), FORWARD, "f32")
    >>> of_fields(one.row | {"rounds": 5}) == one
    True
    """
    layer = {name: fields[name] for name in Layer.__dataclass_fields__}
    sizes = {name: tuple(layer[name]) for name in ("size", "kernel")}
    own = {name: fields[name] for name in ("direction", "dtype", "batch", "threads")}
    return Comparison(Layer(**layer | sizes), **own)


def instructions(dtype: str) -> bool:
    """Whether this CPU multiplies the dtype: any CPU float32 and float64, few of them 16 bits."""
    return dtype not in WITH_INSTRUCTIONS or bool(host.host_features().get(WITH_INSTRUCTIONS[dtype]))


class Operands(NamedTuple):
    """Image, weight, and the gradient of the result."""

    x: Tensor
    w: Tensor
    g: Tensor

    @property
    def held(self) -> int:
        return sum(operand.nbytes for operand in self)

    def clones(self) -> Operands:
        return Operands(*(operand.clone() for operand in self))


def draw(one: Comparison, integers: bool = False, seed: int = 0) -> Operands:
    """Normal values, or integers of which every sum is exact."""
    layer, dtype = one.layer, testing.DTYPES[one.dtype]
    generator = torch.Generator().manual_seed(seed)
    sizes = (one.batch, layer.ci, *layer.size), layer.weight, (one.batch, layer.co, *layer.output)

    def values(size: tuple[int, ...]) -> Tensor:
        if integers:
            return torch.randint(-INTEGERS, INTEGERS + 1, size, generator=generator).to(dtype)
        return torch.empty(size, dtype=dtype).normal_(generator=generator)

    return Operands(*map(values, sizes))


def function(name: str, layer: Layer) -> Callable[..., Tensor]:
    """The public function of a backend."""
    called = f"conv{'_transpose' * layer.transposed}{len(layer.size)}d"
    found: Callable[..., Tensor] = getattr(convolution if name == OURS else functional, called)
    return found


def call_of(name: str, one: Comparison, operands: Operands) -> Call:
    """What is timed: the function, or autograd's gradient through a result that is there already."""
    convolve, how = function(name, one.layer), {"stride": one.layer.stride, "padding": one.layer.padding}
    x, w, g = operands
    if one.direction == FORWARD:
        return lambda: convolve(x, w, None, **how)
    x, w = x.detach(), w.detach()
    leaf = x if one.direction == DGRAD else w
    leaf.requires_grad_()
    y = convolve(x, w, None, **how)
    return lambda: torch.autograd.grad(y, leaf, g, retain_graph=True)[0]


def expected(one: Comparison, operands: Operands) -> Tensor:
    """torch's result in float64, rounded once."""
    wide = Operands(*(operand.double() for operand in operands))
    return call_of(TORCH, replace(one, dtype="f64"), wide)().to(operands.x.dtype)


def assert_correct(name: str, one: Comparison, operands: Operands, right: Tensor) -> None:
    """Every element, on integers."""
    found = call_of(name, one, operands)().detach()
    if found.shape != right.shape:
        raise IncorrectResult(f"{name}, {one.name}: shape {tuple(found.shape)}, should be {tuple(right.shape)}")
    wrong = int((found != right).sum())
    if wrong:
        raise IncorrectResult(f"{name}, {one.name}: on integers {wrong} of {right.numel()} elements differ")
