"""Histories for tests: clients of a simulated object that is correct, and ways to make them wrong.

The simulated object carries out one operation at a time, at a random moment between invocation and answer. Answers get
lost, before or after the operation took effect, or long before it does. Time often stands still between events.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from chaos.checkers.history import History, Operation, Value
from chaos.checkers.models import (
    CasRegister,
    ExactlyOnceCounter,
    FifoQueue,
    KeyValue,
    Model,
    NamedActors,
    Register,
    SetOfValues,
)  # fmt: skip

Call = tuple[str, tuple[Any, ...]]
Chooser = Callable[[Random, str], Call]


def _choosers() -> dict[type[Model], Callable[[], Chooser]]:
    def register(rng: Random, _: str) -> Call:
        return rng.choice([("read", ()), ("write", (rng.randrange(3),))])

    def cas(rng: Random, _: str) -> Call:
        return rng.choice(
            [("read", ()), ("write", (rng.randrange(3),)), ("cas", (rng.randrange(3), rng.randrange(3)))]
        )

    def table(rng: Random, _: str) -> Call:
        key, value = rng.choice("xy"), rng.randrange(2)
        return rng.choice([("get", (key,)), ("put", (key, value)), ("put_new", (key, value)), ("delete", (key,))])

    def actors(rng: Random, _: str) -> Call:
        name, actor = rng.choice("nnm"), rng.choice(("a1", "a2"))
        return rng.choice([("create", (name, actor)), ("get", (name,)), ("kill", (name, actor))])

    def queue(rng: Random, _: str) -> Call:
        return rng.choice([("put", (rng.randrange(3),)), ("get", ())])

    def values(rng: Random, _: str) -> Call:
        if rng.random() < 0.1:
            return "members", ()
        return rng.choice(("add", "discard", "has")), (rng.randrange(2),)

    def counter() -> Chooser:
        made: dict[str, list[int]] = {}

        def choose(rng: Random, client: str) -> Call:
            amounts = made.setdefault(client, [])
            if rng.random() < 0.3:
                return "read", ()
            if not amounts or rng.random() < 0.5:
                amounts.append(rng.choice((1, 2)))
            back = 1 if rng.random() < 0.9 else rng.randint(1, len(amounts))
            return "increment", (client, len(amounts) - back, amounts[-back])

        return choose

    return {
        Register: lambda: register,
        CasRegister: lambda: cas,
        KeyValue: lambda: table,
        NamedActors: lambda: actors,
        ExactlyOnceCounter: counter,
        FifoQueue: lambda: queue,
        SetOfValues: lambda: values,
    }


CHOOSERS = _choosers()


@dataclass
class _Request:
    client: str
    invoked_ms: float
    call: Call
    done: bool = False
    result: Value = None


def simulate(
    rng: Random,
    model: Model,
    count: int,
    clients: int = 3,
    lose: float = 0.15,
    eager: float = 1.0,
    choose: Chooser | None = None,
) -> History:
    """A history that is linearizable. With a small `eager`, clients seldom have operations open at once."""
    choose = choose or CHOOSERS[type(model)]()
    state = model.initial()
    now_ms = 0.0
    idle = [f"c{number}" for number in range(clients)]
    requests: list[_Request] = []
    ghosts: list[_Request] = []
    operations: list[Operation] = []

    def end(request: _Request, completed_ms: float | None, failed: bool = False) -> None:
        requests.remove(request)
        idle.append(request.client)
        result = request.result if completed_ms is not None and not failed else None
        operations.append(
            Operation(request.client, request.invoked_ms, completed_ms, *request.call, result=result, failed=failed)
        )

    while count or requests:
        now_ms += rng.choice((0, 1, 1))
        if count and idle and (not requests or rng.random() < eager / 2):
            count -= 1
            client = idle.pop(rng.randrange(len(idle)))
            requests.append(_Request(client, now_ms, choose(rng, client)))
            continue
        if ghosts and rng.random() < 0.2:
            state, _ = model.apply(state, *ghosts.pop(rng.randrange(len(ghosts))).call)
            continue
        if not requests:
            continue
        request = rng.choice(requests)
        if rng.random() < lose:
            if not request.done and rng.random() < 0.3:
                end(request, now_ms, failed=True)
                continue
            end(request, None)
            if not request.done and rng.random() < 0.5:
                ghosts.append(request)
        elif request.done:
            end(request, now_ms)
        else:
            state, request.result = model.apply(state, *request.call)
            request.done = True
    return History(operations)


def mutate(rng: Random, history: History) -> History:
    """The same history with one thing changed. It need not be wrong now."""
    operations = list(history)
    answered = [place for place, each in enumerate(operations) if each.completed_ms is not None and not each.failed]
    if not answered:
        return history
    place = rng.choice(answered)
    each = operations[place]
    assert each.completed_ms is not None
    kind = rng.choice(("result", "result", "swap", "earlier", "later", "drop", "answer"))
    if kind == "result":
        operations[place] = replace(each, result=_other(rng, each.result))
    elif kind == "swap":
        other = rng.choice(answered)
        operations[place] = replace(each, result=operations[other].result)
        operations[other] = replace(operations[other], result=each.result)
    elif kind == "earlier":
        operations[place] = replace(each, completed_ms=each.invoked_ms)
    elif kind == "later":
        operations[place] = replace(each, invoked_ms=each.completed_ms)
    elif kind == "drop":
        del operations[place]
    else:
        lost = [at for at, one in enumerate(operations) if one.completed_ms is None]
        if lost:
            at = rng.choice(lost)
            operations[at] = replace(
                operations[at], process="late", completed_ms=operations[at].invoked_ms, result=each.result
            )
    return History(operations)


def _other(rng: Random, value: Value) -> Value:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + rng.choice((-1, 1))
    if isinstance(value, str):
        return rng.choice([None, "a1", "a2"])
    if isinstance(value, tuple):
        return value[1:] if value else (0,)
    return rng.choice([0, 1, None])
