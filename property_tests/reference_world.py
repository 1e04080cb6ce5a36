"""Simulated processes with reference tables, joined by first-in first-out links, and a naive twin that sees everything.

Whoever drives the world says what user code does (`put`, `drop`, `submit`, `finish`, `fetch`), who crashes (what it had
sent arrives up to some message, then the link's end), and which link delivers next.

*Safety* (`check`): the twin computes from scratch which objects are reachable: from user code of live processes, from
arguments of unfinished tasks, from messages on their way, and through values that contain references. None of these may
have been freed. `probe` tries the worst that could come next, in a copy of the world. *Liveness* (`drain`): when all
references are dropped and messages have drained, all tables have to be empty. (Tasks do not return values that make a
cycle with their own result: counting references cannot free those.)

A crash excuses only those who relied on it. Whoever holds a reference is registered, or relies on others ("sources");
if one of these dies before the registration, the hold is *exposed*: it may turn out to be lost, and the twin does not
count it.
"""

from __future__ import annotations

import pickle
from collections import Counter, deque
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ftray.ownership.references import (
    REGISTERED,
    AckReturns,
    AddBorrower,
    BorrowLost,
    Forgot,
    Freed,
    ReferenceTable,
    RemoveBorrower,
    TaskMayReply,
)

Hold = tuple[int, bytes]  # process, object


class Violation(AssertionError):
    """The protocol broke one of its promises."""


class Message(NamedTuple):
    kind: str
    ids: tuple[bytes, ...] = ()
    token: int = 0
    outer: bytes = b""
    missing: tuple[bytes, ...] = ()
    exposed: frozenset[bytes] = frozenset()


@dataclass
class Frame:
    """A task running in a process."""

    submitter: int | None  # None: it died
    refs: list[bytes] = field(default_factory=list)


@dataclass
class Process:
    """One process: its table, and what its user code holds."""

    table: ReferenceTable
    alive: bool = True
    refs: list[bytes] = field(default_factory=list)
    running: dict[int, Frame] = field(default_factory=dict)
    ended: dict[int, tuple[int, Message]] = field(default_factory=dict)  # replies held back
    submitted: dict[int, tuple[int, list[bytes], bytes]] = field(default_factory=dict)  # executor, arguments, result
    fetching: dict[int, tuple[int, bytes, bool]] = field(default_factory=dict)  # owner, object, whether to cache
    buried: set[int] = field(default_factory=set)  # processes whose death it knows

    def pool(self) -> list[bytes]:
        return self.refs + [ref for frame in self.running.values() for ref in frame.refs]

    def held(self) -> list[bytes]:
        """What user code holds, one item for each ObjectRef."""
        return self.pool() + [outer for _, outer, _ in self.fetching.values()]


class World:
    """All processes, the links between them, and the twin."""

    def __init__(self, table: type[ReferenceTable], processes: int, audit: bool) -> None:
        self.processes = [Process(table(b"p%d" % index)) for index in range(processes)]
        self.links: dict[tuple[int, int], deque[Message]] = {}
        self.owners: dict[bytes, int] = {}
        self.contents: dict[bytes, tuple[bytes, ...]] = {}
        self.freed: set[bytes] = set()
        self.sources: dict[Hold, set[Hold]] = {}
        self.exposed: set[Hold] = set()
        self.executors: dict[int, int] = {}
        self.results: dict[int, bytes] = {}
        self.planned: dict[bytes, Sequence[bytes]] = {}  # contents, already while they are on their way
        self.tokens = 0
        self.audit = audit
        self.broken = False

    # Plumbing

    def fail(self, problem: str) -> None:
        self.broken = True
        raise Violation(problem)

    def token(self) -> int:
        self.tokens += 1
        return self.tokens

    def send(self, source: int, target: int, message: Message) -> None:
        if self.processes[target].alive:
            exposed = frozenset(ref for ref in message.ids if (source, ref) in self.exposed)
            self.links.setdefault((source, target), deque()).append(message._replace(exposed=exposed))

    def run_effects(self, at: int) -> None:
        process = self.processes[at]
        dead: set[int] = set()
        for effect in process.table.take_effects():
            match effect:
                case AddBorrower() | RemoveBorrower():
                    owner = int(effect.owner[1:])
                    kind = "add" if isinstance(effect, AddBorrower) else "remove"
                    self.send(at, owner, Message(kind, tuple(effect.object_ids)))
                    if owner in process.buried:
                        dead.add(owner)
                case Freed(object_id=ref):
                    if self.owners[ref] != at:
                        self.fail(f"{ref!r} was freed by a process that does not own it")
                    self.freed.add(ref)
                case Forgot(object_id=ref):
                    if ref in process.held():
                        self.fail(f"{ref!r} was forgotten in process {at}, where user code holds it")
                case BorrowLost(object_id=ref):
                    if self.processes[self.owners[ref]].alive and (at, ref) not in self.exposed:
                        self.fail(f"{ref!r} was lost to process {at}, which had done nothing wrong")
                case AckReturns(token=token):
                    assert isinstance(token, int)
                    self.send(at, self.executors[token], Message("ack", token=token))
                case TaskMayReply(token=token):
                    assert isinstance(token, int)
                    if token in process.ended:
                        self.send(at, *process.ended.pop(token))
        for owner in sorted(dead):  # A message could not be sent: the link is closed.
            process.table.owner_died(b"p%d" % owner)
        if dead:
            self.run_effects(at)

    def arrive(self, at: int, message: Message, sources: Iterable[tuple[int, bytes | None]]) -> None:
        """The references in a message come to a process, which relies on `sources` for them until it is registered."""
        for ref in message.ids:
            hold = (at, ref)
            relied = {(process, ref if other is None else other) for process, other in sources}
            self.sources.setdefault(hold, set()).update(relied)
            lost = any(not self.processes[source[0]].alive or source in self.exposed for source in relied)
            if (lost or ref in message.exposed) and not self.protected(hold):
                self.exposed.add(hold)

    def protected(self, hold: Hold) -> bool:
        """Whether the owner knows of the hold, and will not be told otherwise by what is on its way."""
        at, ref = hold
        owner = self.owners[ref]
        entry = self.processes[owner].table.entries.get(ref)
        if entry is None or entry.owner is not None:
            return False
        if owner == at:
            return True
        on_way = self.links.get((at, owner), ())
        return b"p%d" % at in (entry.borrowers or ()) and not any(m.kind == "remove" and ref in m.ids for m in on_way)

    def spread_exposure(self) -> None:
        for hold in list(self.sources):
            process = self.processes[hold[0]]
            if not process.alive or hold[1] not in process.table.entries or self.protected(hold):
                del self.sources[hold]
                self.exposed.discard(hold)
        growing = True
        while growing:
            growing = False
            for hold, sources in self.sources.items():
                if hold not in self.exposed and any(
                    not self.processes[source[0]].alive or source in self.exposed for source in sources
                ):
                    self.exposed.add(hold)
                    growing = True

    # The twin

    def reachable(self) -> set[bytes]:
        roots: set[bytes] = set()
        for at, process in enumerate(self.processes):
            if process.alive:
                arguments = [ref for _, refs, _ in process.submitted.values() for ref in refs]
                returned = [ref for _, message in process.ended.values() for ref in message.ids]
                roots.update(
                    ref for ref in (*process.held(), *arguments, *returned) if (at, ref) not in self.exposed
                )
        for (source, target), messages in self.links.items():
            for message in messages:
                if message.kind in ("task", "reply", "value") and self.processes[source].alive:
                    if (target, message.outer) not in self.exposed:
                        roots.update(
                            ref
                            for ref in message.ids
                            if ref not in message.exposed and (source, ref) not in self.exposed
                        )
        seen: set[bytes] = set()
        while roots:
            ref = roots.pop()
            if ref not in seen:
                seen.add(ref)
                owner = self.owners[ref]
                if self.processes[owner].alive:
                    inner = self.contents.get(ref, ())
                    roots.update(item for item in inner if (owner, item) not in self.exposed)
        return seen

    def check(self) -> None:
        if not all(process.alive for process in self.processes):
            self.spread_exposure()
        if self.freed:
            wrong = self.reachable() & self.freed
            if wrong:
                self.fail(f"freed, though reachable: {sorted(wrong)}")
        for at, process in enumerate(self.processes):
            if not process.alive:
                continue
            if self.audit:
                process.table.check()
            for ref, count in Counter(process.held()).items():
                entry = process.table.entries.get(ref)
                if entry is None or entry.local != count:
                    self.fail(f"process {at} holds {ref!r} {count} times, which its table does not know")

    # What user code does

    def put(self, at: int, inner: Sequence[bytes]) -> bytes:
        ref = b"o%d" % self.token()
        self.owners[ref] = at
        self.contents[ref] = self.planned[ref] = tuple(inner)
        process = self.processes[at]
        process.table.add_owned(ref)
        process.table.set_contains(ref, inner)
        process.refs.append(ref)
        return ref

    def drop(self, at: int, index: int) -> None:
        process = self.processes[at]
        process.table.remove_local(process.refs.pop(index))
        self.run_effects(at)

    def submit(self, at: int, to: int, arguments: list[bytes]) -> int:
        process = self.processes[at]
        token = self.token()
        result = self.put(at, ())
        process.table.add_submitted(arguments)
        process.submitted[token] = (to, arguments, result)
        self.executors[token], self.results[token] = to, result
        self.send(at, to, Message("task", tuple(arguments), token))
        return token

    def lend(self, at: int, to: int, ref: bytes) -> None:
        """A whole task, whose executor stores its argument."""
        token = self.submit(at, to, [ref])
        self.drop(at, -1)
        self.rush(None)
        self.finish(to, token, 1, ())
        self.rush(None)

    def finish(self, at: int, token: int, keep: int, returned: Sequence[bytes]) -> None:
        """A task ends. `keep` is the mask of its references that it stores in the process."""
        process = self.processes[at]
        frame = process.running[token]
        returned = [ref for ref in returned if not self.leads_to(ref, self.results[token])]
        self.planned[self.results[token]] = returned
        if returned and frame.submitter is not None:
            process.table.hand_off(token, returned, b"p%d" % frame.submitter)
        del process.running[token]
        dropped = []
        for index, ref in enumerate(frame.refs):
            if keep >> index & 1:
                process.refs.append(ref)
            else:
                dropped.append(ref)
        for ref in dropped:
            process.table.remove_local(ref)
        may_reply = process.table.end_task(token)
        if frame.submitter is not None:
            reply = Message("reply", tuple(returned), token)
            if may_reply:
                self.send(at, frame.submitter, reply)
            else:
                process.ended[token] = (frame.submitter, reply)
        self.run_effects(at)

    def leads_to(self, ref: bytes, target: bytes) -> bool:
        seen: set[bytes] = set()
        ahead = [ref]
        while ahead and target not in seen:
            at = ahead.pop()
            if at not in seen:
                seen.add(at)
                ahead.extend(self.planned.get(at, ()))
        return target in seen

    def fetch(self, at: int, outer: bytes, cache: bool) -> None:
        process = self.processes[at]
        owner = self.owners[outer]
        if owner == at:
            self.unpack(at, Message("value", self.contents.get(outer, ()), outer=outer), cache=False)
        elif owner not in process.buried:
            token = self.token()
            process.table.add_local(outer)
            process.fetching[token] = (owner, outer, cache)
            self.send(at, owner, Message("fetch", token=token, outer=outer))

    def unpack(self, at: int, message: Message, cache: bool) -> None:
        """The value of an object is deserialised: the references in it come to life."""
        process = self.processes[at]
        self.arrive(at, message, [(self.owners[message.outer], None), (at, message.outer)])
        if cache:
            process.table.receive_contained(message.outer, self.described(message.ids), None)
        for ref in message.ids:
            owner, endpoint = self.owner_of(ref)
            process.table.note_from_outer(message.outer, ref, owner, endpoint)
            process.table.add_local(ref)
            process.refs.append(ref)
        self.run_effects(at)

    def owner_of(self, ref: bytes) -> tuple[bytes, str]:
        return b"p%d" % self.owners[ref], f"unix:/p{self.owners[ref]}"

    def described(self, refs: Iterable[bytes]) -> list[tuple[bytes, bytes, str]]:
        return [(ref, *self.owner_of(ref)) for ref in refs]

    def crash(self, at: int, delivered: int) -> None:
        self.processes[at].alive = False
        for other, process in enumerate(self.processes):
            if process.alive:
                self.links.pop((other, at), None)
                messages = self.links.setdefault((at, other), deque())
                kept = list(messages)[: delivered % (len(messages) + 1)]
                self.links[at, other] = deque((*kept, Message("closed")))
            else:
                self.links.pop((at, other), None)

    # What messages do

    def deliver(self, source: int, at: int) -> None:
        message = self.links[source, at].popleft()
        process = self.processes[at]
        table = process.table
        match message.kind:
            case "task":
                frame = Frame(None if source in process.buried else source)
                process.running[message.token] = frame
                self.arrive(at, message, [(source, None)])
                table.begin_task(message.token)
                for ref in message.ids:
                    table.note_task_ref(message.token, ref, *self.owner_of(ref))
                    table.add_local(ref)
                    frame.refs.append(ref)
            case "reply":
                _, arguments, result = process.submitted.pop(message.token)
                if result in table.entries:
                    self.contents[result] = message.ids
                    self.arrive(at, message, [(source, None)])
                table.receive_contained(
                    result, self.described(message.ids), message.token if message.ids else None
                )
                table.remove_submitted(arguments)
            case "ack":
                table.handed_off(message.token)
            case "add":
                missing = [ref for ref in message.ids if not table.borrower_added(ref, b"p%d" % source)]
                self.send(at, source, Message("added", message.ids, missing=tuple(missing)))
            case "added":
                table.registered(b"p%d" % source, message.ids, message.missing)
            case "remove":
                for ref in message.ids:
                    table.borrower_removed(ref, b"p%d" % source)
            case "fetch":
                ids = () if message.outer in self.freed else self.contents.get(message.outer, ())
                self.send(at, source, Message("value", ids, message.token, message.outer))
            case "value":
                _, outer, cache = process.fetching.pop(message.token)
                self.unpack(at, message, cache)
                table.remove_local(outer)
            case "closed":
                self.bury(at, source)
        self.run_effects(at)

    def bury(self, at: int, dead: int) -> None:
        process = self.processes[at]
        process.buried.add(dead)
        process.table.process_died(b"p%d" % dead)
        process.table.owner_died(b"p%d" % dead)
        for token, frame in process.running.items():
            if frame.submitter == dead:
                frame.submitter = None
                process.table.end_task(token)
        for token in [token for token, (target, _) in process.ended.items() if target == dead]:
            del process.ended[token]
        for token in [token for token, (executor, _, _) in process.submitted.items() if executor == dead]:
            process.table.remove_submitted(process.submitted.pop(token)[1])
        for token in [token for token, (owner, _, _) in process.fetching.items() if owner == dead]:
            process.table.remove_local(process.fetching.pop(token)[1])

    def rush(self, slow: tuple[int, int] | None) -> bool:
        """Deliver everything but what is on the slow link; returns whether there was anything."""
        busy = False
        moving = True
        while moving:
            moving = False
            for link, messages in list(self.links.items()):
                while link != slow and messages and self.processes[link[1]].alive:
                    busy = moving = True
                    self.deliver(*link)
                    self.check()
        return busy

    def let_go(self, keeper: int | None, spared: Container[bytes], slow: tuple[int, int] | None) -> None:
        """User code ends everywhere and drops all references, but for the spared ones in the process `keeper`."""
        busy = True
        while busy:
            busy = False
            for at, process in enumerate(self.processes):
                while process.alive and process.running:
                    busy = True
                    self.finish(at, next(iter(process.running)), -1 if at == keeper else 0, ())
                for ref in list(process.refs) if process.alive else ():
                    if at != keeper or ref not in spared:
                        busy = True
                        self.drop(at, process.refs.index(ref))
            busy = self.rush(slow) or busy

    def probe(self) -> None:
        """Try the worst with each hold that the owner does not know of: all others let go, and it hears of us last."""
        image = pickle.dumps(self)
        for at, process in enumerate(self.processes):
            for ref, entry in process.table.entries.items() if process.alive else ():
                owner = self.owners[ref]
                if entry.owner is None or entry.registration >= REGISTERED or not self.processes[owner].alive:
                    continue
                pool = process.pool()
                try:
                    world: World = pickle.loads(image)
                    world.let_go(at, {ref} if ref in pool else pool, (at, owner))
                except Violation:
                    self.broken = True
                    raise

    def drain(self) -> None:
        """Drop everything, deliver everything; then nothing may be left."""
        self.let_go(None, (), None)
        for at, process in enumerate(self.processes):
            if process.alive:
                table = process.table
                if process.submitted or process.fetching or process.ended:
                    self.fail(f"process {at} waits for ever")
                if table.entries or table._tasks or table._handoffs or table._handoffs_to:
                    rows = [(row.object_id, *row.reasons) for row in table.snapshot()]
                    self.fail(f"process {at} keeps {rows}, {table._tasks}, {table._handoffs}")
                if table._borrowed_by or table._borrowed_from:
                    self.fail(f"process {at} keeps an index entry")


def empty(world: World) -> None:
    """Nothing has happened yet."""


def chain(world: World) -> None:
    """Process 1 borrows the object of 0, and owns one that contains it; 2 alone holds that, and has a task with 1."""
    ref = world.put(0, ())
    world.lend(0, 1, ref)
    world.drop(0, 0)
    outer = world.put(1, (ref,))
    world.lend(1, 2, outer)
    world.drop(1, -1)
    world.submit(2, 1, [])
    world.rush(None)


def circle(world: World) -> None:
    """Tasks pass on an object of process 1, from 1 to 0 to 2 and back to 0."""
    ref = world.put(1, ())
    for at, to in ((1, 0), (0, 2), (2, 0)):
        world.submit(at, to, [ref])
        world.rush(None)
