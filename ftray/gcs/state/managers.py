"""The leader's managers: they look at the tables and say what has to be done next.

Role: pure. `on_changes` takes the change feed, `plan` returns effects. Each managing decision that others must hold to
is a command first (`ActorPlacing`), and an effect only when that is committed (`StartActor`), so a leader that dies at
any point leaves tables from which the next one goes on; its managers are made from the tables alone.

Rules: within one leadership an effect about a life of an actor is issued once, unless its node connects anew, when what
was under way may have been lost. A manager never waits for an answer: it looks at what the tables say by then.

Rejected: managers that keep a list of steps to do (the list dies with the leader); placing by command alone, with
raylets that watch the actors table (every raylet would read every actor).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ftray.gcs.state.commands import ActorDied, ActorPlacing, AnyCommand, DeathCauseRecord, FinishJob
from ftray.gcs.state.effects import Effect, ReportInfeasible, StartActor, StopActor, StopJob, Submit
from ftray.gcs.state.lifecycle import ON_NODE, WAITING
from ftray.gcs.state.placement import Placement, to_units
from ftray.gcs.state.state import GcsState
from ftray.gcs.state.tables import (
    ActorRecord,
    ActorState,
    Change,
    GroupRecord,
    GroupState,
    JobRecord,
    JobState,
    NodeRecord,
    NodeState,
    Result,
    Table,
)
from ftray.ids import group_of_resource

INFEASIBLE_AFTER_MS = 2_000
SHORT_LIFE_MS = 300
"""An actor that fails sooner than this after its start may be in a crash loop."""
SHORT_LIVES_FREE = 50
"""So many short lives in a row are followed by a restart at once (someone may be killing it on purpose, to see it come
back); then restarts are delayed, doubling."""
RESTART_DELAY_MS = 50
RESTART_DELAY_MAX_MS = 1_000


class _Watched:
    """What a manager remembers of one actor. Lost with the leader, at the cost of an effect issued twice."""

    __slots__ = (
        "alive_ms",
        "due_ms",
        "infeasible_ms",
        "proposed",
        "reason",
        "reported",
        "short_lives",
        "told",
        "waits",
    )

    def __init__(self) -> None:
        self.told: set[tuple[str, int, bool]] = set()
        self.proposed = -1
        """The incarnation for which a node has been proposed."""
        self.waits = -1
        """The incarnation that was found waiting last."""
        self.alive_ms: float | None = None
        self.due_ms = 0.0
        self.short_lives = 0
        self.infeasible_ms: float | None = None
        self.reported = False
        self.reason = ""


class ActorManager:
    """Places actors, has them started and stopped."""

    __slots__ = (
        "_dirty", "_infeasible_after_ms", "_placement", "_queued", "_room", "_seen", "_waiting", "_watched",
    )  # fmt: skip

    def __init__(self, state: GcsState, *, infeasible_after_ms: float = INFEASIBLE_AFTER_MS) -> None:
        self._infeasible_after_ms = infeasible_after_ms
        self._placement = Placement()
        self._watched: dict[bytes, _Watched] = {}
        self._dirty: dict[bytes, None] = {}
        self._waiting: dict[bytes, None] = {}
        """Actors for which there was no room, or whose restart is delayed."""
        self._room = False
        """There may be more room than when those in `_waiting` were looked at."""
        self._seen = 0
        """The `changes` of the placement by then: bundles share it."""
        self._queued: list[Effect] = []
        for node in state.store.nodes.values():
            self._see_node(node.node_id, node)
        for actor in state.store.actors.values():
            self._see_actor(actor.actor_id, actor)

    @property
    def placement(self) -> Placement:
        """What is held where; `GroupManager` shares it."""
        return self._placement

    # --- events ------------------------------------------------------------------------------------------------------

    def on_changes(self, changes: Iterable[Change]) -> None:
        """The tables have changed."""
        for change in changes:
            if change.table is Table.ACTORS:
                assert change.record is None or isinstance(change.record, ActorRecord)
                self._see_actor(change.key, change.record)
            elif change.table is Table.NODES:
                assert change.record is None or isinstance(change.record, NodeRecord)
                self._see_node(change.key, change.record)
            elif isinstance(change.record, GroupRecord) and change.record.state is GroupState.REMOVED:
                self._room = True  # who waits for it to be placed waits in vain

    def on_load(self, node_id: bytes, available: Mapping[str, float]) -> None:
        """A node's report of what is free there (heartbeat). Ranks nodes, and is forgotten with the leader."""
        self._placement.report(node_id, available)

    def on_result(self, command: AnyCommand, result: Result) -> None:
        """What became of a command that this manager submitted. A refused one is thought over in the next plan."""
        if isinstance(command, ActorPlacing) and not result.ok:
            watched = self._watched.get(command.actor_id)
            if watched is not None and watched.proposed == command.incarnation:
                watched.proposed = -1
                self._room |= self._placement.release(command.actor_id)
                self._dirty[command.actor_id] = None

    def on_node_report(self, state: GcsState, node_id: bytes, hosted: Sequence[tuple[bytes, int]]) -> None:
        """A raylet has connected (anew) and says which incarnations of which actors it has, starting ones included.

        What it was told over an earlier link is told again; what it has and should not is stopped; what it should have
        and lacks has died unseen.
        """
        here = set(hosted)
        store = state.store
        for actor in store.actors_on(node_id):
            if actor.state is ActorState.ALIVE and (actor.actor_id, actor.incarnation) not in here:
                cause = DeathCauseRecord(
                    node_id=node_id.hex(),
                    pid=actor.pid,
                    worker_id=actor.worker_id.hex(),
                    what=actor.class_name,
                    reason="its node does not have it any more",
                )
                self._queued.append(Submit(ActorDied(actor.actor_id, actor.incarnation, cause)))
            elif actor.state is ActorState.PLACING:
                self._tell_again(actor.actor_id)
        for actor in store.leftovers_on(node_id):
            self._tell_again(actor.actor_id)
        for actor_id, incarnation in hosted:
            known = store.actors.get(actor_id)
            if known is not None:
                if known.node_id == node_id and known.incarnation == incarnation and known.state in ON_NODE:
                    continue
                if known.leftover is not None and known.leftover.incarnation == incarnation:
                    continue
            reason = "this life of the actor has ended"
            self._queued.append(StopActor(node_id, actor_id, incarnation, b"", False, reason))

    def _tell_again(self, actor_id: bytes) -> None:
        watched = self._watched.get(actor_id)
        if watched is not None:
            watched.told.clear()
        self._dirty[actor_id] = None

    def _see_node(self, node_id: bytes, node: NodeRecord | None) -> None:
        if node is not None and node.state is NodeState.ALIVE:
            self._placement.set_node(node_id, node.resources)
        else:
            self._placement.drop_node(node_id)
        self._room = True  # A node that left may have made actors infeasible, which is to be noticed too.

    def _see_actor(self, actor_id: bytes, actor: ActorRecord | None) -> None:
        if actor is not None and actor.state in ON_NODE:
            self._placement.hold(actor_id, actor.node_id, to_units(actor.resources))
        elif actor is None or self._proposal_of(actor) is None:
            self._room |= self._placement.release(actor_id)
        last_life = actor_id + b"/last"
        if actor is not None and actor.leftover is not None:
            self._placement.hold(last_life, actor.leftover.node_id, to_units(actor.resources))
        else:
            self._room |= self._placement.release(last_life)
        if actor is None:
            self._forget(actor_id)
        else:
            self._dirty[actor_id] = None

    def _proposal_of(self, actor: ActorRecord) -> _Watched | None:
        """Set while a node has been proposed for the life that the actor waits for."""
        watched = self._watched.get(actor.actor_id)
        if watched is None or actor.state not in WAITING or watched.proposed != actor.incarnation:
            return None
        return watched

    def _forget(self, actor_id: bytes) -> None:
        self._watched.pop(actor_id, None)
        self._dirty.pop(actor_id, None)
        self._waiting.pop(actor_id, None)

    # --- plan --------------------------------------------------------------------------------------------------------

    def plan(self, state: GcsState, now_ms: float) -> list[Effect]:
        """What is to be done now. Call it after events, and by `next_wake_ms`."""
        effects, self._queued = self._queued, []
        no_room: set[tuple[tuple[str, int], ...]] = set()
        look_at: dict[bytes, None] = {}
        room = self._room or self._placement.changes != self._seen
        if self._waiting and (room or self._is_due(now_ms)):
            look_at.update(self._waiting)
        self._room, self._seen = False, self._placement.changes
        look_at.update(self._dirty)
        self._dirty.clear()
        for actor_id in look_at:
            actor = state.store.actors.get(actor_id)
            if actor is None:
                self._forget(actor_id)
                continue
            if actor.state is ActorState.DEAD and actor.leftover is None:
                self._forget(actor_id)
                continue
            watched = self._watched.get(actor_id)
            if watched is None:
                watched = self._watched[actor_id] = _Watched()
            self._look_at(state, actor, watched, now_ms, effects, no_room)
        return effects

    def next_wake_ms(self) -> float | None:
        """When `plan` has something to do though nothing happens, or None."""
        times = [
            time_ms for actor_id in self._waiting if (time_ms := self._wake_ms(self._watched[actor_id])) is not None
        ]
        return min(times) if times else None

    def pending_reason(self, actor_id: bytes) -> str:
        """Why the actor is not running yet, for people; empty if nothing stands in its way."""
        watched = self._watched.get(actor_id)
        return watched.reason if watched is not None else ""

    def _wake_ms(self, watched: _Watched) -> float | None:
        if watched.infeasible_ms is not None:
            return None if watched.reported else watched.infeasible_ms + self._infeasible_after_ms
        return watched.due_ms or None

    def _is_due(self, now_ms: float) -> bool:
        wake_ms = self.next_wake_ms()
        return wake_ms is not None and wake_ms <= now_ms

    def _look_at(
        self,
        state: GcsState,
        actor: ActorRecord,
        watched: _Watched,
        now_ms: float,
        effects: list[Effect],
        no_room: set[tuple[tuple[str, int], ...]],
    ) -> None:
        left = actor.leftover
        if left is not None:
            if _once(watched, "stop", left.incarnation, left.graceful):
                reason = actor.cause.reason if actor.cause is not None else str(actor.kind)
                effects.append(
                    StopActor(left.node_id, actor.actor_id, left.incarnation, left.worker_id, left.graceful, reason)
                )
            watched.reason = "waits until the process of its last life is gone" if actor.state in WAITING else ""
        elif actor.state in WAITING:
            if watched.proposed != actor.incarnation:
                self._place(state, actor, watched, now_ms, effects, no_room)
            return
        elif actor.state is ActorState.PLACING:
            watched.reason = "is being started"
            if _once(watched, "start", actor.incarnation, False):
                effects.append(
                    StartActor(
                        actor.node_id,
                        actor.actor_id,
                        actor.incarnation,
                        actor.job_id,
                        actor.owner_worker_id or b"",
                        actor.class_name,
                        actor.resources,
                        actor.creation,
                        actor.max_restarts < 0 or actor.restarts < actor.max_restarts,
                    )
                )
        else:
            watched.reason = ""
            watched.told.clear()
            if watched.alive_ms is None:
                watched.alive_ms = now_ms
        self._waiting.pop(actor.actor_id, None)

    def _place(
        self,
        state: GcsState,
        actor: ActorRecord,
        watched: _Watched,
        now_ms: float,
        effects: list[Effect],
        no_room: set[tuple[tuple[str, int], ...]],
    ) -> None:
        if watched.waits != actor.incarnation:
            watched.waits = actor.incarnation
            watched.told.clear()  # of earlier lives: an actor whose constructor fails has many
            watched.due_ms = self._due_ms(actor, watched, now_ms)
        if watched.due_ms > now_ms:
            watched.reason = f"failed {watched.short_lives} times right after its start: the next start is delayed"
            self._waiting[actor.actor_id] = None
            return
        watched.due_ms = 0.0
        asked = to_units(actor.resources)
        shape = tuple(sorted(asked.items()))
        node_id = None if shape in no_room else self._placement.choose(asked, actor.owner_node_id)
        if node_id is not None:
            watched.proposed = actor.incarnation
            watched.infeasible_ms, watched.reported, watched.reason = None, False, "is being placed"
            self._placement.hold(actor.actor_id, node_id, asked)
            self._waiting.pop(actor.actor_id, None)
            effects.append(Submit(ActorPlacing(actor.actor_id, actor.incarnation, node_id)))
            return
        no_room.add(shape)
        self._waiting[actor.actor_id] = None
        missing = self._placement.missing(asked)
        group_id = next((found for name in asked if (found := group_of_resource(name))), None) if missing else None
        if group_id is not None:
            group = state.group(group_id)
            if group is None or group.state is GroupState.REMOVED:
                missing = f"its placement group {group_id.hex()} has been removed"
            elif group.state is not GroupState.CREATED:
                watched.infeasible_ms, watched.reported = None, False
                watched.reason = f"waits until its placement group {group_id.hex()} is there" + (
                    f", which can't be placed: {group.missing}" if group.missing else ""
                )
                return
        if not missing:
            watched.infeasible_ms, watched.reported = None, False
            watched.reason = "waits until other actors or placement groups give back resources"
            return
        watched.reason = missing
        if watched.infeasible_ms is None:
            watched.infeasible_ms = now_ms
        if not watched.reported and now_ms - watched.infeasible_ms >= self._infeasible_after_ms:
            watched.reported = True
            effects.append(ReportInfeasible(actor.actor_id, actor.incarnation, missing))

    @staticmethod
    def _due_ms(actor: ActorRecord, watched: _Watched, now_ms: float) -> float:
        """When the next life may start: at once, unless the actor has failed right after its start many times."""
        if actor.state is not ActorState.RESTARTING:
            return 0.0
        lived_ms = now_ms - watched.alive_ms if watched.alive_ms is not None else 0.0
        watched.alive_ms = None
        watched.short_lives = watched.short_lives + 1 if lived_ms < SHORT_LIFE_MS else 0
        delays = watched.short_lives - SHORT_LIVES_FREE
        if delays <= 0:
            return 0.0
        return now_ms + min(RESTART_DELAY_MS << min(delays - 1, 20), RESTART_DELAY_MAX_MS)


def _once(watched: _Watched, what: str, incarnation: int, graceful: bool) -> bool:
    key = (what, incarnation, graceful)
    if key in watched.told:
        return False
    watched.told.add(key)
    return True


class JobManager:
    """Ends what is left of finished jobs on the nodes. Their actors have been ended by the state machine itself."""

    __slots__ = ("_finished", "_nodes", "_queued")

    def __init__(self, state: GcsState) -> None:
        self._queued: list[Effect] = []
        self._nodes = {node.node_id for node in state.store.nodes.values() if node.state is NodeState.ALIVE}
        self._finished = {job.job_id for job in state.store.jobs.values() if job.state is JobState.FINISHED}

    def on_changes(self, changes: Iterable[Change]) -> None:
        """The tables have changed."""
        for change in changes:
            record = change.record
            if change.table is Table.NODES:
                if isinstance(record, NodeRecord) and record.state is NodeState.ALIVE:
                    self._nodes.add(change.key)
                else:
                    self._nodes.discard(change.key)
            elif change.table is Table.JOBS:
                if not isinstance(record, JobRecord):
                    self._finished.discard(change.key)
                elif record.state is JobState.FINISHED and change.key not in self._finished:
                    self._finished.add(change.key)
                    self._queued += [StopJob(node_id, change.key) for node_id in sorted(self._nodes)]

    def on_driver_gone(self, job_id: bytes, cause: DeathCauseRecord | None) -> None:
        """The driver's link closed: with a cause if it died, with None if it said goodbye."""
        self._queued.append(Submit(FinishJob(job_id, cause)))

    def on_node_report(self, state: GcsState, node_id: bytes, job_ids: Iterable[bytes]) -> None:
        """A raylet has connected (anew) and says for which jobs it has processes."""
        for job_id in job_ids:
            job = state.store.jobs.get(job_id)
            if job is None or job.state is JobState.FINISHED:
                self._queued.append(StopJob(node_id, job_id))

    def plan(self) -> list[Effect]:
        """What is to be done now."""
        effects, self._queued = self._queued, []
        return effects
