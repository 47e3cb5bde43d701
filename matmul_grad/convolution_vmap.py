"""The rules of vmap for convolutions: a batch of them is one, of more samples, more filters or more groups.

filters without a batch      the batch joins the samples
one image for all            it joins the filters of each group
both                         it joins the groups
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .convolution_ops import convolve, weight_gradient
from .convolution_shapes import Geometry, Sizes, untransposed
from .ops import NAMESPACE, library
from .vmap import Dims


def _among_groups(tensor: Tensor, groups: int, dim: int) -> Tensor:
    """(batch, …, groups · c, …) → (…, groups · batch · c, …), the channels being ``dim`` of the result."""
    parts = tensor.unflatten(dim + 1, (groups, -1)).movedim(0, dim + 1)
    return parts.flatten(dim, dim + 2)


def _from_groups(tensor: Tensor, batch: int, groups: int, dim: int) -> Tensor:
    """The inverse of ``_among_groups``."""
    parts = tensor.unflatten(dim, (groups, batch, -1)).movedim(dim + 1, 0)
    return parts.flatten(dim + 1, dim + 2)


def _side_by_side(tensor: Tensor) -> Tensor:
    """(batch, n, c, …) → (n, batch · c, …)"""
    return tensor.movedim(0, 1).flatten(1, 2)


def rule(info: Any, in_dims: Dims, input: Tensor, weight: Tensor, bias: Any, *arguments: Any) -> tuple[Tensor, int]:
    input_dim, weight_dim, bias_dim = in_dims[:3]
    geometry, batch = Geometry(*arguments), info.batch_size
    within = bias if bias_dim is None and weight_dim is None else None
    if weight_dim is None:
        images = input if input_dim is None else input.movedim(input_dim, 0)
        if input_dim is None:  # the bias alone
            result = convolve(images, weight, within, geometry).expand(batch, *[-1] * input.dim())
        else:
            result = convolve(images.flatten(0, 1), weight, within, geometry).unflatten(0, images.shape[:2])
    elif input_dim is None:
        filters = weight.movedim(weight_dim, 0)
        if geometry.transposed:
            filters = filters.movedim(0, 1).flatten(1, 2)
        else:
            filters = _among_groups(filters, geometry.groups, 0)
        result = _from_groups(convolve(input, filters, None, geometry), batch, geometry.groups, 1)
    else:
        images, filters = input.movedim(input_dim, 0), weight.movedim(weight_dim, 0)
        more = geometry.with_groups(geometry.groups * batch)
        result = convolve(_side_by_side(images), filters.flatten(0, 1), None, more)
        result = result.unflatten(1, (batch, -1)).movedim(1, 0)
    if bias is None or within is not None:
        return result, 0
    added = bias if bias_dim is None else bias.movedim(bias_dim, 0).unsqueeze(1)
    return result + added.view(*added.shape, *[1] * (result.dim() - 3)), 0


def gradient_rule(
    info: Any, in_dims: Dims, grad: Tensor, input: Tensor, size: Sizes, *arguments: Any
) -> tuple[Tensor, int]:
    grad_dim, input_dim = in_dims[:2]
    geometry, batch = untransposed(*arguments[:4]), info.batch_size
    groups, out_dtype = geometry.groups, arguments[4] if len(arguments) > 4 else None
    rows, columns, *taps = size
    if input_dim is None and grad_dim is not None:
        pixels = _among_groups(grad.movedim(grad_dim, 0), groups, 1)
        result = weight_gradient(pixels, input, [batch * rows, columns, *taps], geometry, out_dtype)
        return _from_groups(result, batch, groups, 0), 0
    if grad_dim is None and input_dim is not None:
        images = _among_groups(input.movedim(input_dim, 0), groups, 1)
        result = weight_gradient(grad, images, [rows, batch * columns, *taps], geometry, out_dtype)
        return result.unflatten(1, (batch, columns)).movedim(1, 0), 0
    pixels, images = (_side_by_side(x.movedim(dim or 0, 0)) for x, dim in ((grad, grad_dim), (input, input_dim)))
    more = geometry.with_groups(groups * batch)
    result = weight_gradient(pixels, images, [batch * rows, columns, *taps], more, out_dtype)
    return result.unflatten(0, (batch, rows)), 0


torch.library.register_vmap(f"{NAMESPACE}::convolution", rule, lib=library)
torch.library.register_vmap(f"{NAMESPACE}::convolution_weight_gradient", gradient_rule, lib=library)
