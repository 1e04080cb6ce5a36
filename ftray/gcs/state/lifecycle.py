"""The life of an actor: one table of legal transitions, and pure functions from record to record.

Role: pure. What a failure means for one actor is decided here; which actors a failure reaches is `failures.py`.

    PENDING ──PLACE──► PLACING ──START──► ALIVE
       ▲                 │  │              │
       └────UNPLACE──────┘  └──FAIL──┐     │ FAIL
                                     ▼     ▼
               PLACING ◄──PLACE── RESTARTING          any but DEAD ──END──► DEAD

Rules: the incarnation is raised whenever a life ends, so that whatever is still said of that life is recognised. A
restart is spent by FAIL alone: an actor whose node died, or refused it, before it ran is placed again for nothing.

Rejected: a state for "being killed" (an ended actor with a `Leftover` says the same, and also covers restarts).
"""

from __future__ import annotations

import enum

from msgspec.structs import replace

from ftray.gcs.state.commands import DeathCauseRecord
from ftray.gcs.state.tables import ActorRecord, ActorState, DeathKind, Leftover


class ActorEvent(enum.Enum):
    PLACE = "place"
    START = "start"
    UNPLACE = "unplace"
    FAIL = "fail"
    END = "end"


TRANSITIONS: dict[tuple[ActorState, ActorEvent], ActorState] = {
    (ActorState.PENDING, ActorEvent.PLACE): ActorState.PLACING,
    (ActorState.PENDING, ActorEvent.END): ActorState.DEAD,
    (ActorState.PLACING, ActorEvent.START): ActorState.ALIVE,
    (ActorState.PLACING, ActorEvent.UNPLACE): ActorState.PENDING,
    (ActorState.PLACING, ActorEvent.FAIL): ActorState.RESTARTING,
    (ActorState.PLACING, ActorEvent.END): ActorState.DEAD,
    (ActorState.ALIVE, ActorEvent.FAIL): ActorState.RESTARTING,
    (ActorState.ALIVE, ActorEvent.END): ActorState.DEAD,
    (ActorState.RESTARTING, ActorEvent.PLACE): ActorState.PLACING,
    (ActorState.RESTARTING, ActorEvent.END): ActorState.DEAD,
}
"""All there is. Anything else is refused (a late or foolish command) or a fault of ours."""

WAITING = (ActorState.PENDING, ActorState.RESTARTING)
"""States in which an actor waits to be placed."""

ON_NODE = (ActorState.PLACING, ActorState.ALIVE)
"""States in which an actor holds resources of a node."""


class IllegalTransition(Exception):
    """The event has no place in the actor's state; becomes a refused command."""


def step(actor: ActorRecord, event: ActorEvent) -> ActorState:
    """The state after `event`. Raises IllegalTransition."""
    after = TRANSITIONS.get((actor.state, event))
    if after is None:
        raise IllegalTransition(f"actor {actor.actor_id.hex()} is {actor.state.name}: {event.value} is not possible")
    return after


def placed(actor: ActorRecord, node_id: bytes) -> ActorRecord:
    """Waiting -> PLACING on a node."""
    return replace(actor, state=step(actor, ActorEvent.PLACE), node_id=node_id)


def started(actor: ActorRecord, worker_id: bytes, endpoint: str, pid: int) -> ActorRecord:
    """PLACING -> ALIVE."""
    return replace(actor, state=step(actor, ActorEvent.START), worker_id=worker_id, endpoint=endpoint, pid=pid)


def unplaced(actor: ActorRecord, cause: DeathCauseRecord | None) -> ActorRecord:
    """PLACING -> PENDING: it never ran there."""
    return _next_life(replace(actor, state=step(actor, ActorEvent.UNPLACE), cause=cause or actor.cause))


def restarts_left(actor: ActorRecord) -> bool:
    return actor.max_restarts < 0 or actor.restarts < actor.max_restarts


def failed(actor: ActorRecord, kind: DeathKind, cause: DeathCauseRecord, leftover: Leftover | None) -> ActorRecord:
    """A life failed: RESTARTING, or DEAD when its restarts are spent."""
    if not restarts_left(actor):
        spent = f"; its {actor.max_restarts} restarts are spent" if actor.max_restarts else ""
        return ended(actor, kind, replace(cause, reason=cause.reason + spent), leftover)
    return _next_life(
        replace(
            actor,
            state=step(actor, ActorEvent.FAIL),
            restarts=actor.restarts + 1,
            kind=kind,
            cause=cause,
            leftover=leftover,
        )
    )


def ended(actor: ActorRecord, kind: DeathKind, cause: DeathCauseRecord, leftover: Leftover | None) -> ActorRecord:
    """Any live state -> DEAD, for good."""
    return replace(
        actor,
        state=step(actor, ActorEvent.END),
        incarnation=actor.incarnation + 1,
        kind=kind,
        cause=cause,
        leftover=leftover,
        creation=b"",
    )


def leftover_of(actor: ActorRecord, graceful: bool) -> Leftover | None:
    """What may go on running of the actor when its present life is given up without its node having said so."""
    if actor.state in ON_NODE:
        return Leftover(actor.incarnation, actor.node_id, actor.worker_id, graceful)
    return actor.leftover


def _next_life(actor: ActorRecord) -> ActorRecord:
    return replace(actor, incarnation=actor.incarnation + 1, node_id=b"", worker_id=b"", endpoint="", pid=0)
