"""Sequential models: what one object does when it is used by one client at a time.

Role: pure. A model is deterministic: `apply` takes a state and an action, and returns the next state and the result
that the client must see. States are immutable and hashable, and equal states have equal futures; the search relies on
both.

Rules
- `key` names the part of the object that an operation touches. Parts are checked apart (a history is linearizable if
  its parts are), which turns one hard search into many easy ones. An operation that touches all of it has the key
  WHOLE; if a history has one, it is checked undivided.
- `check` refuses what the model does not know, before the search, so that a misspelt action is not taken for a bug of
  the system under test.

A program's own object becomes checkable with a subclass of `Model`: `actions`, `initial` and `apply` are enough.

Rejected: models that only accept or refuse a recorded result (a report could not say what should have come).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping
from enum import Enum
from typing import ClassVar, Final, TypeAlias

from chaos.checkers.history import HistoryError, Operation, Value, frozen

State: TypeAlias = Hashable


class _Whole(Enum):
    WHOLE = "the whole object"


WHOLE: Final = _Whole.WHOLE
"""The key of operations that touch every part."""



class _AnyState(Enum):
    ANY = "any state"


ANY: Final = _AnyState.ANY
"""The hint that says nothing."""

STALE: Final = "stale"
"""What an exactly-once counter answers to a request older than the last one of that client."""


class UnknownActionError(HistoryError):
    """The history has an action that the model does not know, or with the wrong arguments."""


class ModelError(HistoryError):
    """A model contradicts itself, so that no verdict can be trusted. Correct the model."""


class Model(ABC):
    """Base of all models."""

    name: ClassVar[str] = "object"
    actions: ClassVar[Mapping[str, int]] = {}
    """How many arguments each action takes."""

    @abstractmethod
    def initial(self) -> State:
        """The state of a new object."""

    @abstractmethod
    def apply(self, state: State, action: str, arguments: tuple[Value, ...]) -> tuple[State, Value]:
        """The state after the action, and its result."""

    def key(self, operation: Operation) -> Hashable:
        """The part of the object that the operation touches."""
        return WHOLE

    def only_looks(self, operation: Operation) -> bool:
        """Whether the operation leaves every state as it is in which it can have the result that it has.

        Without an answer it can have any. False where it is not known costs time, and no more.
        """
        return False

    def leaves(self, operation: Operation) -> State:
        """A hint: the state of the part of the object after it, if that does not depend on the one before; else ANY."""
        return ANY

    def needs(self, operation: Operation) -> State:
        """A hint: the only state of the part of the object in which the operation has its result, or ANY."""
        return ANY

    def agrees(self, operation: Operation, result: Value) -> bool:
        """Whether what the client saw is that result."""
        return operation.result == result

    def show(self, state: State) -> str:
        """The state in words: "the register holds 3"."""
        return f"the state of the {self.name} is {state!r}"

    def check(self, operation: Operation) -> None:
        """Raises UnknownActionError if the model does not know such an operation."""
        count = self.actions.get(operation.action)
        if count is None:
            raise UnknownActionError(
                f"{operation}: a {self.name} does not know {operation.action!r}; it knows {', '.join(self.actions)}"
            )
        if count != len(operation.arguments):
            raise UnknownActionError(
                f"{operation}: {operation.action} of a {self.name} takes {count} argument{'s' * (count != 1)}, "
                f"not {len(operation.arguments)}"
            )


class Register(Model):
    """`read()` → value; `write(value)` → None."""

    name = "register"
    actions = {"read": 0, "write": 1}

    def __init__(self, value: object = None) -> None:
        self.value = frozen(value)

    def initial(self) -> State:
        return self.value

    def apply(self, state: State, action: str, arguments: tuple[Value, ...]) -> tuple[State, Value]:
        if action == "read":
            return state, state  # type: ignore[return-value]
        return arguments[0], None

    def only_looks(self, operation: Operation) -> bool:
        return operation.action == "read"

    def leaves(self, operation: Operation) -> State:
        return operation.arguments[0] if operation.action == "write" else ANY

    def needs(self, operation: Operation) -> State:
        return operation.result if operation.action == "read" else ANY

    def show(self, state: State) -> str:
        return f"the register holds {state!r}"


class CasRegister(Register):
    """A register that also knows `cas(expected, new)` → whether it held what was expected, and holds `new` now."""

    name = "CAS register"
    actions = {"read": 0, "write": 1, "cas": 2}

    def apply(self, state: State, action: str, arguments: tuple[Value, ...]) -> tuple[State, Value]:
        if action == "cas":
            return (arguments[1], True) if state == arguments[0] else (state, False)
        return super().apply(state, action, arguments)

    def only_looks(self, operation: Operation) -> bool:
        return operation.action == "read" or (operation.action == "cas" and operation.result == False)  # noqa: E712

    def needs(self, operation: Operation) -> State:
        if operation.action == "cas" and operation.result == True:  # noqa: E712
            return operation.arguments[0]
        return super().needs(operation)


class KeyValue(Model):
    """A table: `get(key)` → value or None; `put(key, value)`, `put_new(key, value)` and `delete(key)` → bool.

    `put` and `delete` say whether the key was there; `put_new` puts only if it was not, and says whether it did.
    """

    name = "key–value table"
    actions = {"get": 1, "put": 2, "put_new": 2, "delete": 1}

    def initial(self) -> State:
        return frozenset()

    def apply(self, state: State, action: str, arguments: tuple[Value, ...]) -> tuple[State, Value]:
        assert isinstance(state, frozenset)
        key = arguments[0]
        # Checked apart, a table has one entry at most.
        entry = next((each for each in state if each[0] == key), None)
        if action == "get":
            return state, None if entry is None else entry[1]
        if action == "put_new" and entry is not None:
            return state, False
        rest = state if entry is None else state - {entry}
        if action == "delete":
            return rest, entry is not None
        return rest | {(key, arguments[1])}, action == "put_new" or entry is not None

    def only_looks(self, operation: Operation) -> bool:
        return operation.action == "get" or (operation.action != "put" and operation.result == False)  # noqa: E712

    def leaves(self, operation: Operation) -> State:
        if operation.action == "put":
            return frozenset([operation.arguments])
        return frozenset() if operation.action == "delete" else ANY

    def needs(self, operation: Operation) -> State:
        if operation.action != "get":
            return ANY
        return frozenset() if operation.result is None else frozenset([(operation.arguments[0], operation.result)])

    def key(self, operation: Operation) -> Hashable:
        return operation.arguments[0]

    def show(self, state: State) -> str:
        assert isinstance(state, frozenset)
        held = ", ".join(sorted(f"{key!r}: {value!r}" for key, value in state))
        return f"the table holds {held}" if held else "the table is empty"


class NamedActors(Model):
    """Names of live actors, each of at most one.

    `create(name, actor)` → True, or False because a live actor has the name; `get(name)` → the live actor or None;
    `kill(name, actor)` → whether that actor lived and had the name. A death that nobody asked for is recorded as
    a `kill` with an unknown outcome, by a process of its own, invoked before the fault was injected.
    """

    name = "table of named actors"
    actions = {"create": 2, "get": 1, "kill": 2}

    def initial(self) -> State:
        return frozenset()

    def apply(self, state: State, action: str, arguments: tuple[Value, ...]) -> tuple[State, Value]:
        assert isinstance(state, frozenset)
        name = arguments[0]
        live = next((each for each in state if each[0] == name), None)
        if action == "get":
            return state, None if live is None else live[1]
        if action == "create":
            return (state | {arguments}, True) if live is None else (state, False)
        return (state - {live}, True) if live == arguments else (state, False)

    def only_looks(self, operation: Operation) -> bool:
        return operation.action == "get" or operation.result == False  # noqa: E712

    def key(self, operation: Operation) -> Hashable:
        return operation.arguments[0]

    def show(self, state: State) -> str:
        assert isinstance(state, frozenset)
        held = ", ".join(sorted(f"{actor!r} lives as {name!r}" for name, actor in state))
        return held or "no actor has the name"

    def check(self, operation: Operation) -> None:
        super().check(operation)
        if operation.action != "get" and operation.arguments[1] is None:
            raise UnknownActionError(f"{operation}: the actor can't be None, which stands for there being none")


class ExactlyOnceCounter(Model):
    """`increment(client, sequence, amount)` → the total after it; `read()` → the total.

    Each client numbers its requests upwards. One that comes again is answered as the first time and changes nothing;
    one with a lower number than the client's last is answered STALE and changes nothing. Each attempt is an
    operation of its own.
    """

    name = "exactly-once counter"
    actions = {"increment": 3, "read": 0}

    def initial(self) -> State:
        return 0, frozenset()

    def apply(self, state: State, action: str, arguments: tuple[Value, ...]) -> tuple[State, Value]:
        assert isinstance(state, tuple)
        total, sessions = state
        if action == "read":
            return state, total
        client, sequence, amount = arguments
        last = next((each for each in sessions if each[0] == client), None)
        if last is not None:
            if sequence == last[1]:
                return state, last[2]
            if sequence < last[1]:
                return state, STALE
            sessions -= {last}
        total += amount
        return (total, sessions | {(client, sequence, total)}), total

    def only_looks(self, operation: Operation) -> bool:
        return operation.action == "read" or operation.result == STALE

    def show(self, state: State) -> str:
        assert isinstance(state, tuple)
        total, sessions = state
        last = ", ".join(sorted(f"{client!r} at request {sequence}" for client, sequence, _ in sessions))
        return f"the total is {total}" + (f" ({last})" if last else "")

    def check(self, operation: Operation) -> None:
        super().check(operation)
        if operation.action == "increment":
            check_increment(operation)


def check_increment(operation: Operation) -> tuple[Value, int, int | float]:
    """Client, sequence number and amount of an `increment`.

    Raises UnknownActionError if these are not what they should be.
    """
    client, sequence, amount = operation.arguments
    if isinstance(sequence, bool) or not isinstance(sequence, int):
        raise UnknownActionError(f"{operation}: the sequence number is {sequence!r}, and should be an int")
    if isinstance(amount, bool) or not isinstance(amount, (int, float)):
        raise UnknownActionError(f"{operation}: the amount is {amount!r}, and should be a number")
    return client, sequence, amount


class FifoQueue(Model):
    """`put(value)` → None; `get()` → the oldest value, or None if the queue is empty."""

    name = "queue"
    actions = {"put": 1, "get": 0}

    def initial(self) -> State:
        return ()

    def apply(self, state: State, action: str, arguments: tuple[Value, ...]) -> tuple[State, Value]:
        assert isinstance(state, tuple)
        if action == "put":
            return (*state, arguments[0]), None
        return (state[1:], state[0]) if state else (state, None)

    def only_looks(self, operation: Operation) -> bool:
        return operation.action == "get" and operation.result is None and not operation.unknown

    def show(self, state: State) -> str:
        assert isinstance(state, tuple)
        shown = ", ".join(map(repr, state[:8])) + ", …" * (len(state) > 8)
        return f"the queue holds {shown}" if state else "the queue is empty"

    def check(self, operation: Operation) -> None:
        super().check(operation)
        if operation.action == "put" and operation.arguments[0] is None:
            raise UnknownActionError(f"{operation}: None can't be put, it stands for an empty queue")


class SetOfValues(Model):
    """`add(value)` and `discard(value)` → whether that changed the set; `has(value)` → bool; `members()` → all of them.

    `members` may list them in any order. A history without it is checked value by value, which is much faster.
    """

    name = "set"
    actions = {"add": 1, "discard": 1, "has": 1, "members": 0}

    def initial(self) -> State:
        return frozenset()

    def apply(self, state: State, action: str, arguments: tuple[Value, ...]) -> tuple[State, Value]:
        assert isinstance(state, frozenset)
        if action == "members":
            return state, tuple(sorted(state, key=repr))
        value = arguments[0]
        if action == "has":
            return state, value in state
        if (value in state) == (action == "add"):
            return state, False
        return (state | {value} if action == "add" else state - {value}), True

    def only_looks(self, operation: Operation) -> bool:
        return operation.action in ("has", "members") or operation.result == False  # noqa: E712

    def key(self, operation: Operation) -> Hashable:
        return WHOLE if operation.action == "members" else operation.arguments[0]

    def agrees(self, operation: Operation, result: Value) -> bool:
        if operation.action != "members":
            return operation.result == result
        seen = operation.result
        return isinstance(seen, tuple) and isinstance(result, tuple) and (
            len(seen) == len(result) and frozenset(seen) == frozenset(result)
        )

    def show(self, state: State) -> str:
        assert isinstance(state, frozenset)
        return f"the set holds {', '.join(sorted(map(repr, state)))}" if state else "the set is empty"


MODELS: Final[tuple[type[Model], ...]] = (
    Register, CasRegister, KeyValue, NamedActors, ExactlyOnceCounter, FifoQueue, SetOfValues,
)  # fmt: skip
"""All models that come with the package."""
