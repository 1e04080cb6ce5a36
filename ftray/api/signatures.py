"""Whether arguments fit a function, found out where it is called, not where it runs.

Role: pure. Most calls have positional arguments only, as many as the function takes: that is two comparisons. The rest
is bound as Python would, for its error message.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


class Arity:
    """How many positional arguments are surely right, and how to find out about the rest."""

    __slots__ = ("_signature", "_what", "high", "low")

    def __init__(self, function: Callable[..., Any], what: str) -> None:
        """`function` may be a class: then its constructor counts."""
        self._what = what
        self._signature: inspect.Signature | None = None
        self.low, self.high = 1, 0  # nothing is surely right: bind each call
        try:
            # What is called decides, not what it wraps: a decorator may add arguments.
            signature = inspect.signature(function, follow_wrapped=False)
        except (ValueError, TypeError):
            self.low, self.high = 0, sys.maxsize  # some of those written in C do not say
            return
        parameters = signature.parameters.values()
        self._signature = signature
        low = high = 0
        for parameter in parameters:
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
                high += 1
                low += parameter.default is parameter.empty
            elif parameter.kind is parameter.VAR_POSITIONAL:
                high = sys.maxsize
            elif parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty:
                return
        self.low, self.high = low, high

    def check(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Raises TypeError naming the function and what is wrong."""
        if self._signature is None:
            return
        try:
            self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{self._what}{self._signature}: {error}") from None
