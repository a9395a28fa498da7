"""What adapters of library functions share: calling a function again with some arguments changed, and refusing a call."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from torch import Tensor


def call(function: Callable[..., Any], arguments: Mapping[str, Any], **changes: Any) -> Any:
    """``function`` with bound ``arguments`` (as ``Kernel.bind`` gives them) and ``changes`` to those that it has."""
    changed = {name: changes.get(name, value) for name, value in arguments.items()}
    bound = inspect.BoundArguments(_signature(function), changed)
    return function(*bound.args, **bound.kwargs)


@functools.cache
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)


def first(output: Any) -> Tensor:
    """The attention output of a function that may return (output, logsumexp, ...)."""
    return output[0] if isinstance(output, (tuple, list)) else output


def like(output: Any, tensor: Tensor) -> Any:
    """``output`` with its attention output replaced: a tuple stays a tuple."""
    if isinstance(output, (tuple, list)):
        return type(output)((tensor, *output[1:]))
    return tensor


def refuse(kernel: str, what: str, remedy: str) -> NoReturn:
    """Say by name that a call cannot be captured: asking it again would be wrong or would move the model."""
    raise NotImplementedError(f"{kernel}: {what} cannot be captured. {remedy}")
