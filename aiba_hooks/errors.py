"""The errors that a capture raises. ``docs/errors/`` has one page for each."""

from __future__ import annotations


class AibaError(Exception):
    """Base class of AIBA's own errors."""


class NothingCaptured(AibaError):
    """The body ran, but no attention call matched what was asked for. The message lists what was seen."""


class CaptureBudgetExceeded(AibaError, MemoryError):
    """What is to be kept would exceed ``budget``. Raised before the memory is allocated."""


class DegeneratePooling(AibaError, ValueError):
    """The pooling asked for is the same for every query, whatever the model: 1/Tk, or 1."""


class CheckColumnError(AibaError, RuntimeError):
    """A kernel, asked again, did not return the model's own output: its adapter misreads the call."""


class UnknownWord(AibaError, KeyError):
    """A word asked for is in no prompt. The message lists the words that are."""

    def __str__(self) -> str:  # KeyError would show the repr
        return str(self.args[0]) if self.args else ""


class UnknownBackbone(AibaError, TypeError):
    """No backbone plugin recognises the target."""


class LatticeMismatch(AibaError, ValueError):
    """The number of tokens at a site does not fit the lattice that the backbone declares."""


class BackboneMismatch(AibaError, RuntimeError):
    """What a backbone says of the running call does not fit what the denoiser or a kernel was given."""
