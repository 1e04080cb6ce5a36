"""Histories: who asked for what, when, and what came back.

Role: pure. `Operation` is one call of one client, `History` all of them, `Recorder` makes one while a program runs.

Rules
- Time is one clock for all, in milliseconds; only its order counts for a verdict. An operation came before another if
  it was completed *before* the other was invoked; at equal times they are taken as concurrent, since nobody knows.
- A `Recorder` never makes equal times: events are in the order in which it was told of them, and a time that would not
  be later than the last one is moved up by the least possible amount. So histories in virtual time, where much happens
  at the same instant, keep their order.
- An operation without an answer (the client gave up, or died) has an unknown outcome: it may take effect at any time
  after its invocation, even after later calls of the same client, or never. One that *failed* is known to have had no
  effect.
- Values are None, bool, int, finite float, str, and tuples of these, so that they can be compared, hashed and written
  as JSON without loss. A list becomes a tuple. As everywhere in Python, 1, 1.0 and True are the same value.

Rejected: an event log with a line for each end of an operation (every reader has to match them); leaving out failed
operations (reports want to show them).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

Value: TypeAlias = bool | int | float | str | tuple["Value", ...] | None
ProcessId: TypeAlias = int | str

_FIELDS = frozenset(("process", "invoked_ms", "completed_ms", "action", "arguments", "result", "failed"))
_NEEDED = ("process", "invoked_ms", "completed_ms", "action")


class HistoryError(ValueError):
    """A history that cannot be checked, because it says something impossible. Correct what records it."""


class UnsupportedValueError(HistoryError, TypeError):
    """An argument or result is of a type that histories do not hold. Record a name, a number or a hash of it."""


class MalformedOperationError(HistoryError):
    """An operation contradicts itself, as one that was completed before it was invoked."""


class OverlappingOperationsError(HistoryError):
    """A client had two operations at once. What works in parallel needs a process name for each of its threads."""


class MalformedLineError(HistoryError):
    """A line of a history file is not an operation."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(f"line {line} of the history: {reason}")
        self.line = line
        """Counted from 1."""
        self.reason = reason

    def __reduce__(self) -> tuple[type[MalformedLineError], tuple[int, str]]:
        return type(self), (self.line, self.reason)


class RecorderError(HistoryError):
    """The recorder was told of the end of an operation that is not open."""


def frozen(value: object) -> Value:
    """The value as histories keep it.

    Raises UnsupportedValueError for what cannot be kept.
    """
    kind = type(value)
    if value is None or kind is bool or kind is int or kind is str:
        return value  # type: ignore[return-value]
    if kind is float:
        if not math.isfinite(value):  # type: ignore[arg-type]
            raise UnsupportedValueError(f"{value!r} has no place in a history: it can't be compared or written as JSON")
        return value  # type: ignore[return-value]
    if isinstance(value, (tuple, list)):
        return tuple([frozen(each) for each in value])
    hint = "record value.hex()" if isinstance(value, (bytes, bytearray)) else "record a name, a number or a hash of it"
    raise UnsupportedValueError(f"histories hold no {kind.__name__} ({_shortened(repr(value))}): {hint}")


def _shortened(text: str, length_max: int = 60) -> str:
    return text if len(text) <= length_max else text[: length_max - 1] + "…"


def _time(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise MalformedOperationError(f"{name} is {_shortened(repr(value))}, and should be a number of milliseconds")
    return value


@dataclass(frozen=True, slots=True)
class Operation:
    """One call of one client. `action` and `arguments` are in the language of a model (`models`).

    Raises MalformedOperationError or UnsupportedValueError.
    """

    process: ProcessId
    """The client: one that does one thing at a time."""
    invoked_ms: float
    completed_ms: float | None
    """None: the outcome is unknown."""
    action: str
    arguments: tuple[Value, ...] = ()
    result: Value = None
    failed: bool = False
    """Known to have had no effect."""

    def __post_init__(self) -> None:
        if isinstance(self.process, bool) or not isinstance(self.process, (int, str)):
            raise MalformedOperationError(f"process is {_shortened(repr(self.process))}, and should be a str or an int")
        if not isinstance(self.action, str) or not self.action:
            raise MalformedOperationError(f"action is {_shortened(repr(self.action))}, and should be a name")
        if not isinstance(self.arguments, (tuple, list)):
            raise MalformedOperationError(f"arguments are {_shortened(repr(self.arguments))}, and should be a tuple")
        if not isinstance(self.failed, bool):
            raise MalformedOperationError(f"failed is {_shortened(repr(self.failed))}, and should be a bool")
        object.__setattr__(self, "arguments", frozen(self.arguments))
        object.__setattr__(self, "result", frozen(self.result))
        invoked = _time(self.invoked_ms, "invoked_ms")
        if self.completed_ms is None:
            if self.failed:
                raise MalformedOperationError(f"{self.call} by {self.process} has failed, but completed_ms is None")
            if self.result is not None:
                raise MalformedOperationError(f"{self.call} by {self.process} has a result, but completed_ms is None")
        elif _time(self.completed_ms, "completed_ms") < invoked:
            raise MalformedOperationError(
                f"{self.call} by {self.process} was completed at {self.completed_ms} ms, before it was invoked at "
                f"{self.invoked_ms} ms: do all times come from one clock that never goes back?"
            )

    @property
    def unknown(self) -> bool:
        """Whether nobody knows if it took effect."""
        return self.completed_ms is None

    @property
    def call(self) -> str:
        """As it would be written in a program."""
        return f"{self.action}({', '.join(_shortened(repr(each)) for each in self.arguments)})"

    def __str__(self) -> str:
        if self.completed_ms is None:
            return f"{self.process}: {self.call} → ? [{clock(self.invoked_ms)} ms, no answer]"
        end = "failed" if self.failed else _shortened(repr(self.result))
        return f"{self.process}: {self.call} → {end} [{clock(self.invoked_ms)} to {clock(self.completed_ms)} ms]"


def clock(time_ms: float) -> str:
    """A time for people: to the microsecond."""
    return f"{time_ms:.3f}".rstrip("0").rstrip(".")


def counted(number: int, noun: str) -> str:
    """A number of things for people: "1 key", "2 keys"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


class History:
    """Operations, in the order of their invocations. Immutable.

    Raises OverlappingOperationsError if a process invoked an operation before its last one was completed. (What has an
    unknown outcome holds up nobody: it is not known when its client gave up.)
    """

    __slots__ = ("operations",)

    operations: tuple[Operation, ...]

    def __init__(self, operations: Iterable[Operation] = ()) -> None:
        # Sorting is stable: at equal times the order given stays.
        self.operations = tuple(sorted(operations, key=lambda each: each.invoked_ms))
        last: dict[ProcessId, Operation] = {}
        for operation in self.operations:
            if operation.completed_ms is None:
                continue
            before = last.get(operation.process)
            if before is not None and before.completed_ms is not None and before.completed_ms > operation.invoked_ms:
                raise OverlappingOperationsError(
                    f"process {operation.process!r} invoked {operation.call} at {clock(operation.invoked_ms)} ms, when "
                    f"its {before.call} was open until {clock(before.completed_ms)} ms: "
                    "give each thread or task that works in parallel a process name of its own"
                )
            last[operation.process] = operation

    def __iter__(self) -> Iterator[Operation]:
        return iter(self.operations)

    def __len__(self) -> int:
        return len(self.operations)

    def __eq__(self, other: object) -> bool:
        return self.operations == other.operations if isinstance(other, History) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.operations)

    def __repr__(self) -> str:
        return f"<History of {counted(len(self), 'operation')} by {len({each.process for each in self})} processes>"

    def to_lines(self) -> Iterator[str]:
        """As JSON, one operation a line: `file.writelines(history.to_lines())`."""
        for each in self.operations:
            fields: dict[str, object] = {
                "process": each.process,
                "invoked_ms": each.invoked_ms,
                "completed_ms": each.completed_ms,
                "action": each.action,
                "arguments": each.arguments,
                "result": each.result,
            }
            if each.failed:
                fields["failed"] = True
            yield json.dumps(fields, separators=(",", ":")) + "\n"

    @classmethod
    def from_lines(cls, lines: Iterable[str]) -> History:
        """Reads what `to_lines` wrote: `History.from_lines(file)`. Empty lines are skipped.

        Raises MalformedLineError, with the number of the line, or OverlappingOperationsError.
        """
        return cls(_operation(line, number) for number, line in enumerate(lines, 1) if line.strip())


def merged(histories: Iterable[History]) -> History:
    """One history of several, whose recorders read the same clock. What has equal times in two of them overlaps."""
    return History(each for history in histories for each in history)


def _no_constant(text: str) -> object:
    raise ValueError(f"{text} is not JSON")


def _operation(line: str, number: int) -> Operation:
    try:
        fields = json.loads(line, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise MalformedLineError(number, f"not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise MalformedLineError(number, f"a JSON object is expected, not {_shortened(line.strip())}")
    unknown = sorted(fields.keys() - _FIELDS)
    if unknown:
        raise MalformedLineError(number, f"unknown field {unknown[0]!r}; there are {', '.join(sorted(_FIELDS))}")
    missing = [name for name in _NEEDED if name not in fields]
    if missing:
        raise MalformedLineError(number, f"the field {missing[0]!r} is missing")
    try:
        return Operation(**fields)
    except (HistoryError, RecursionError) as error:
        raise MalformedLineError(number, str(error)) from None


class Recorder:
    """Makes a history while a program runs. `now_ms` is given with each event.

    `invoke` is called before a request goes out, `complete` after its answer has come: in between the operation takes
    effect. It is not safe for threads: whoever uses several holds a lock of theirs around each call (not around
    the operation).
    """

    __slots__ = ("_busy", "_done", "_last_ms", "_next", "_open")

    def __init__(self) -> None:
        self._open: dict[int, Operation] = {}
        self._busy: dict[ProcessId, int] = {}
        self._done: list[Operation] = []
        self._next = 0
        self._last_ms = -math.inf

    def invoke(self, process: ProcessId, now_ms: float, action: str, *arguments: object) -> int:
        """A request is about to go out. Returns a ticket for its end.

        Raises MalformedOperationError, UnsupportedValueError, or OverlappingOperationsError if the process has an
        operation open (end it with `lose` when the client gives up).
        """
        values = frozen(arguments)
        assert isinstance(values, tuple)
        operation = Operation(process, self._at(now_ms), None, action, values)
        if process in self._busy:
            before = self._open[self._busy[process]]
            raise OverlappingOperationsError(
                f"process {process!r} invokes {operation.call} while its {before.call} is open: "
                "lose() that one if the client has given up, or give each thread a process name of its own"
            )
        self._last_ms = operation.invoked_ms
        self._next += 1
        self._open[self._next] = operation
        self._busy[process] = self._next
        return self._next

    def complete(self, ticket: int, now_ms: float, result: object = None) -> None:
        """The answer has come.

        Raises RecorderError, MalformedOperationError, UnsupportedValueError.
        """
        self._end(ticket, now_ms, frozen(result), False)

    def fail(self, ticket: int, now_ms: float) -> None:
        """It is certain that the operation had no effect, and will have none.

        Raises RecorderError, MalformedOperationError.
        """
        self._end(ticket, now_ms, None, True)

    def lose(self, ticket: int) -> None:
        """The client has given up, or has died: nobody knows whether the operation takes effect.

        Raises RecorderError.
        """
        self._done.append(self._taken(ticket))

    def history(self) -> History:
        """All so far. What is open counts as lost; the recorder can go on."""
        return History([*self._done, *self._open.values()])

    def _end(self, ticket: int, now_ms: float, result: Value, failed: bool) -> None:
        at_ms = self._at(now_ms)
        it = self._taken(ticket)
        self._last_ms = at_ms
        self._done.append(Operation(it.process, it.invoked_ms, at_ms, it.action, it.arguments, result, failed))

    def _taken(self, ticket: int) -> Operation:
        operation = self._open.pop(ticket, None)
        if operation is None:
            raise RecorderError(f"no operation with ticket {ticket!r} is open: each one ends once")
        del self._busy[operation.process]
        return operation

    def _at(self, now_ms: float) -> float:
        now = _time(now_ms, "now_ms")
        return now if now > self._last_ms else math.nextafter(self._last_ms, math.inf)
