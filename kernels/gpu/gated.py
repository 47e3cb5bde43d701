"""Gated products of CUDA tensors: two products of one A, the activation of one times the other, in one launch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import settings
from .config import Problem, TileConfig
from .gated_plan import choose_gated, gated_plan, is_valid_gated
from .launch import Launch, cached_launch, precision_of, run_kernels, target_of
from .operands import INTERPRETED, checked_shape, describe, fits_tma, strides_of, strides_of_source
from .run import Runner


class Gated(NamedTuple):
    """activation(A . G + gate_source) * (A . B + source).

    a (m, k), b and gate (k, n); source and gate_source expand to (m, n), or are None. keep: whether both sums are
    results too.
    """

    a: Tensor
    b: Tensor
    gate: Tensor
    source: Tensor | None
    gate_source: Tensor | None
    activation: str
    keep: bool = False


def product(
    gated: Gated, precision: str | None = None, *, config: TileConfig | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
    """C, and with `keep` P and S; None where two products are predicted to be faster, or there is nothing to multiply.

    C = activation(P) * S, P = A . G + gate_source, S = A . B + source

    Shapes: of `Gated`; results (m, n).
    Strides: any, read as they are; the results are contiguous.
    Dtypes: one for all: float16, bfloat16, float32, float64. precision: as `mm`.
    Aliasing: the results are new memory.
    Rounding: P once, before the activation; S and C once, at the store, from sums in float32 (float64 for float64).
    Errors: ValueError for operands that it cannot multiply. config fixes the tile, for tests.
    Determinism: k is not split and BLOCK_K is one number a dtype, so no tile changes a bit.
    Source: kernels/gpu/gates.py.
    """
    precision = precision_of(gated.a, precision)
    tensors: dict[str, Any] = {name: x for name, x in gated._asdict().items() if isinstance(x, Tensor)}
    layouts = [(name, x.shape, x.stride(), x.dtype, x.data_ptr() % 16) for name, x in tensors.items()]
    key = ("gated", *layouts, gated.a.get_device(), precision, gated.activation, gated.keep, settings.invariant, config)
    launch = cached_launch(key, lambda: _make_launch(gated, precision, config))
    if not launch.runners:
        return None
    c = gated.a.new_empty(launch.shape)
    if not gated.keep:
        return run_kernels(launch, tensors, c), None, None
    tensors["pre"], tensors["value"] = torch.empty_like(c), torch.empty_like(c)
    kept = tensors["pre"], tensors["value"]
    return run_kernels(launch, tensors, c), *kept


def _make_launch(gated: Gated, precision: str, config: TileConfig | None) -> Launch:
    """The launch, without a runner where there is none."""
    a, b, gate = gated.a, gated.b, gated.gate
    shape = checked_shape(a, b, None)
    if gate.shape != b.shape or gate.dtype != b.dtype or gate.device != b.device or a.dim() != 2:
        raise ValueError(f"cannot gate the product of {tuple(a.shape)} and {tuple(b.shape)} by {tuple(gate.shape)}")
    if 0 in shape or a.shape[1] == 0:
        return Launch((), shape)
    c = torch.empty(shape, dtype=a.dtype, device="meta")
    problem, target = _describe(gated, c, precision), target_of(a)
    if config is None:
        config = choose_gated(problem, target, (not fits_tma(a), not (fits_tma(b) and fits_tma(gate))))
    elif not is_valid_gated(config, problem, target):
        raise ValueError(f"{config} is not valid for {problem} on {target}")
    if config is None:
        return Launch((), shape)
    strides = {name: strides_of(x) for name, x in (("a", a), ("b", b), ("gate", gate), ("c", c))}
    for name, x in (("source", gated.source), ("gate_source", gated.gate_source)):
        if x is not None:
            strides[name] = strides_of_source(x, a.dtype, a.device, shape)
    upcast = INTERPRETED and a.dtype == torch.bfloat16
    plan = gated_plan(problem, config, target, strides, gated.activation, keep=gated.keep, upcast=upcast)
    return Launch((Runner(plan),), shape)


def _describe(gated: Gated, c: Tensor, precision: str) -> Problem:
    """One of the products; 16-byte loads and TMA where all operands allow them."""
    one, other = (describe(gated.a, x, c, precision) for x in (gated.b, gated.gate))
    return replace(one, aligned=one.aligned and other.aligned, tma=one.tma and other.tma)
