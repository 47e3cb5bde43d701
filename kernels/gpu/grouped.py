"""Grouped products of CUDA tensors: rows, columns or steps of k cut into groups at ends that stay on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import TileConfig, is_valid, layout
from .grouped_plan import GroupedProduct, choose_grouped, fits, grouped_plan
from .launch import Launch, cached_launch, precision_of, run_kernels, target_of
from .launch import supports as supports_tensor
from .operands import INTERPRETED, NAMES, fits_tma, is_aligned, strides_of
from .run import Runner


def supports(a: Tensor, b: Tensor, offs: Tensor, out: Tensor) -> bool:
    """Whether `product` computes these: on a GPU that mm supports, sizes and groups that the kernel counts."""
    one_dtype = a.dtype == b.dtype and a.dtype in NAMES and offs.dtype == torch.int32
    one_device = a.device == b.device == offs.device
    return one_dtype and one_device and supports_tensor(a) and fits(describe(a, b, offs, out, "ieee"))


def product(
    a: Tensor,
    b: Tensor,
    offs: Tensor,
    out: Tensor,
    precision: str | None = None,
    *,
    config: TileConfig | None = None,
) -> Tensor:
    """out = A . B group by group, group g being the range from offs[g - 1], or 0, up to offs[g].

    Shapes: a (m, k), b (groups, k, n), out (m, n): rows are cut, and those behind the last group are 0. a (groups, m,
    k), b (k, n), out (m, n): columns, likewise. a (m, k), b (k, n), out (groups, m, n): steps of k, and an empty sum is
    0. offs (groups,); sizes may be 0.
    Strides: any, read as they are; out has its elements apart.
    Dtypes: a, b and out alike: float16, bfloat16, float32, float64; offs int32. precision: as `mm`.
    Aliasing: out overlaps no operand.
    Rounding: once, at the store, from a sum in float32 (float64 for float64).
    Errors: none for offs, which the host does not read. Where they descend or exceed the size that they cut, nothing
    outside of the tensors is read or written, and what the result holds is not defined.
    Determinism: the tile depends on the shapes and the number of groups alone, k is not split: no group changes the
    bits of another. Memory: the result.
    Source: kernels/gpu/groups.py. config fixes the tile, for tests.
    """
    if a.dim() == 3:  # its transpose, whose rows are cut
        product(b.mT, a.mT, offs, out.mT, precision, config=config)
        return out
    if out.numel() == 0:
        return out
    if a.numel() == 0 or b.numel() == 0 or offs.numel() == 0:
        return out.zero_()
    offs, precision = offs.contiguous(), precision_of(a, precision)
    layouts = [(x.shape, x.stride(), x.data_ptr() % 16) for x in (a, b, out, offs)]
    key = ("grouped", *layouts, a.dtype, a.get_device(), precision, config)
    launch = cached_launch(key, lambda: _make_launch((a, b, out), offs, precision, config))
    return run_kernels(launch, {"a": a, "b": b, "offs": offs}, out)


def describe(a: Tensor, b: Tensor, offs: Tensor, out: Tensor, precision: str) -> GroupedProduct:
    """What `choose_grouped` decides on. Loads of 16 bytes and blocks of TMA begin nowhere along a cut one."""
    if a.dim() == 3:
        return describe(b.mT, a.mT, offs, out.mT, precision)
    letters = layout(*a.stride()), layout(*b.stride()[-2:])
    whole = letters == ("T", "N") if b.dim() == 2 else letters[0] == "N"
    return GroupedProduct(
        m=a.shape[0],
        n=b.shape[-1],
        k=a.shape[1],
        groups=offs.shape[0],
        by_steps=b.dim() == 2,
        dtype=NAMES[a.dtype],
        a=letters[0],
        b=letters[1],
        precision=precision,
        aligned=whole and is_aligned(a) and is_aligned(b),
        tma=whole and fits_tma(a) and fits_tma(b) and out.stride(-1) == 1,
    )


def _make_launch(
    tensors: tuple[Tensor, Tensor, Tensor], offs: Tensor, precision: str, config: TileConfig | None
) -> Launch:
    a, b, out = tensors
    made, target = describe(a, b, offs, out, precision), target_of(a)
    if config is None:
        config = choose_grouped(made, target)
    elif not is_valid(config, made.problem, target):
        raise ValueError(f"{config} is not valid for {made} on {target}")
    strides, upcast = (strides_of(a), strides_of(b), strides_of(out)), INTERPRETED and a.dtype == torch.bfloat16
    plan = grouped_plan(made, config, target, strides, upcast=upcast)
    return Launch((Runner(plan),), tuple(out.shape))
