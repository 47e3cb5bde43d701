"""What a call brings back, to be compared with what torch's brings."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def outcome(call: Callable[..., Tensor], *arguments: Any, **named: Any) -> Any:
    """The result, or type and message of the error."""
    try:
        return call(*arguments, **named)
    except Exception as error:
        return type(error), str(error)


def assert_same_outcome(actual: Any, expected: Any) -> None:
    """Results that are close, or the same error."""
    if isinstance(expected, Tensor):
        torch.testing.assert_close(actual, expected)
    else:
        assert actual == expected
