"""Option types and options that several commands share.

Role: pure, but for looking up this user's session root.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

if TYPE_CHECKING:
    _ParamType = click.ParamType[Any]
else:  # older versions of click are not generic
    _ParamType = click.ParamType

_SUFFIXES = {
    "": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40,
}  # fmt: skip
_SIZE = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*([kmgt]i?)?b?", re.IGNORECASE)


class ByteSize(_ParamType):
    """`1048576`, `512MB`, `2GiB`, `1.5g`: decimal suffixes count in thousands, those with an i in 1024."""

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = _SIZE.fullmatch(str(value).strip())
        if match is None:
            self.fail(f"{value!r} is not a size: write a number of bytes, or 512MB, 2GiB, 1.5GB", param, ctx)
        size = int(float(match[1]) * _SUFFIXES[(match[2] or "").lower()])
        if size <= 0:
            self.fail("a size must be positive", param, ctx)
        return size


class Amount(_ParamType):
    """A resource amount: a number of at least 0, shown without a needless fraction."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            amount = float(value)
        except (TypeError, ValueError):
            self.fail(f"{value!r} is not a number", param, ctx)
        if not (math.isfinite(amount) and amount >= 0):
            self.fail(f"{value} is not a number of at least 0", param, ctx)
        return int(amount) if amount == int(amount) else amount


class JsonObject(_ParamType):
    """A JSON object with string keys whose values are all numbers (`numbers`), or all strings."""

    name = "json"

    def __init__(self, numbers: bool) -> None:
        self.numbers = numbers

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        example = '\'{"disk": 2}\'' if self.numbers else '\'{"zone": "b"}\''
        if not isinstance(value, dict):
            try:
                value = json.loads(value)
            except ValueError as error:
                self.fail(f"not valid JSON ({error}): write an object, for instance {example}", param, ctx)
        if not isinstance(value, dict):
            self.fail(f"not a JSON object: write for instance {example}", param, ctx)
        wanted = "a number of at least 0" if self.numbers else "a string"
        for key, each in value.items():
            if not (_is_amount(each) if self.numbers else isinstance(each, str)):
                self.fail(f"the value of {key!r} is not {wanted}: write for instance {example}", param, ctx)
        return value


def _is_amount(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def json_option(function: F) -> F:
    """`--json`, passed as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")(function)


def session_root_option(function: F) -> F:
    """`--session-root`, passed as `session_root` (None for the default)."""
    return click.option(
        "--session-root",
        type=click.Path(file_okay=False),
        envvar="FTRAY_SESSION_ROOT",
        help="Folder of the sessions; FTRAY_SESSION_ROOT sets it for programs too.  [default: /tmp/ftray-UID]",
    )(function)


def addresses(text: str) -> list[str]:
    """`HOST:PORT[,HOST:PORT..]` as endpoints. Raises ValueError with what is wrong."""
    endpoints = []
    for part in text.split(","):
        host, _, port = part.strip().removeprefix("tcp:").rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ValueError(f"{part.strip()!r} is not HOST:PORT (for instance 10.0.0.5:6380)")
        endpoints.append(f"tcp:{host}:{port}")
    return endpoints
