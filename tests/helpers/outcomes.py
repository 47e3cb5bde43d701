"""What a call brings back, to be compared with what torch's brings."""

from collections.abc import Callable
from typing import Any

from torch import Tensor


def outcome(call: Callable[..., Tensor], *arguments: Any, **named: Any) -> Any:
    """The result, or type and message of the error."""
    try:
        return call(*arguments, **named)
    except Exception as error:
        return type(error), str(error)
