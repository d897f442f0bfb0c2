"""The errors that skillfast raises on purpose: one line each, `<what>: expected <x>, got <y>; <remedy>`."""

from __future__ import annotations

import re

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class SkillfastError(Exception):
    """A failed run: what was expected, what came, what to do. The command line prints it and exits with 1."""

    def __init__(self, message: str) -> None:
        super().__init__(_CONTROL.sub(lambda found: repr(found[0])[1:-1], message))  # names in files hold anything


class ArgumentError(SkillfastError, ValueError):
    """An argument that cannot be used. The command line exits with 2."""


class ModelError(SkillfastError):
    """A model that cannot be made, loaded, traced or ablated."""


class DataError(SkillfastError):
    """Data that is missing, unreadable or too little."""


class NotComparableError(SkillfastError):
    """A run to be repeated whose model, data or settings are others now. The command line exits with 4."""


class BackendError(SkillfastError, RuntimeError):
    """An explicitly chosen backend that cannot run an op."""
