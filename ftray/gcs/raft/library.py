"""pysyncobj, and the only place that knows its private names.

Role: shell around one `SyncObj`. `Engine` is the Raft of one replica: it is given messages and ticks, and hands
messages, applied entries and nothing else to its owner. It has no thread, socket, file or clock of its own.

What is changed of the library, and how
- A private copy of its module is loaded, in which the clock, the journal's factory, the poller and pickle are ours.
  Other users of pysyncobj in the process notice nothing. (The clock is that of the engine whose method is running,
  so that many replicas with different clocks can live in one simulator.)
- `SyncObj` is subclassed; the subclass replaces a few private methods: applying (bytes for our state, nothing is
  unpickled), reading entries (bounded batches, no copies of the whole log), random timeouts (our generator), and its
  compaction (ours is in `log.py`).
- The fields named in `FIELDS` are read or set. `check_names` looks for all of them whenever an engine is made, and the
  tests do too: a version in which they moved is refused, and doesn't misbehave.

What the library leaves to its caller, where that is done, and which test fails without it: docs/raft.md.

Rejected: patching the library in place (all its users in the process would get our clock); its own queue of commands
(it forwards them to leaders, with outcomes that are then not known).
"""

from __future__ import annotations

import importlib.util
import random
import socket
from collections.abc import Callable, Iterable
from importlib.metadata import version
from types import ModuleType
from typing import Any, Protocol

from ftray.gcs.raft import messages as m
from ftray.gcs.raft.errors import LibraryMovedError
from ftray.gcs.raft.log import RaftLog
from ftray.gcs.raft.window import Window

VERSION_MIN = (0, 3, 16)
"""Before it, term and vote were lost by a restart."""
VERSION_TESTED = (0, 3, 17)

BATCH_BYTES = 256 << 10
"""Entries in one message: no more than this, or one entry."""

_P = "_SyncObj__"
METHODS = (
    "doApplyCommand", "getEntries", "deleteEntriesFrom", "tryLogCompaction", "generateRaftTimeout", "onMessageReceived",
    "onNodeConnected", "onNodeDisconnected", "setState", "setCurrentTerm", "getCurrentLogIndex", "getCurrentLogTerm",
    "applyLogEntries",
)  # fmt: skip
FIELDS = (
    "conf", "raftState", "raftCurrentTerm", "raftLeader", "raftElectionDeadline", "raftLog", "raftCommitIndex",
    "raftLastApplied", "raftNextIndex", "raftMatchIndex", "lastResponseTime", "newAppendEntriesTime", "noopIDx",
    "otherNodes", "readonlyNodes", "connectedNodes", "serializer", "transferInProgress", "onTickCallbacks",
)  # fmt: skip
MODULE_NAMES = (
    "monotonicTime", "createJournal", "createPoller", "PIPE_NOTIFIER_ENABLED", "pickle", "SyncObj", "SyncObjConf",
    "Node", "Transport", "_RAFT_STATE", "_COMMAND_TYPE",
)  # fmt: skip


class _NoPoller:
    """The library polls its sockets at the end of a tick; it has none."""

    def poll(self, timeout: float) -> None: ...


class _NoPickle:
    """Bytes from peers are never unpickled."""

    def __getattr__(self, name: str) -> Any:
        raise LibraryMovedError(f"pysyncobj tried to use pickle.{name}, which it must not do here: please report it")


_clock: Callable[[], float] = lambda: 0.0  # noqa: E731


def _load() -> ModuleType:
    inet_ntop = socket.inet_ntop
    try:
        spec = importlib.util.find_spec("pysyncobj.syncobj")
        if spec is None or spec.loader is None:
            raise LibraryMovedError("pysyncobj has no module syncobj: install the version that ftray asks for")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        socket.inet_ntop = inet_ntop  # where it has put its own, for Windows, which works nowhere else
    check_module(module, version("pysyncobj"))
    replaced: dict[str, Any] = {
        "monotonicTime": lambda: _clock(),
        "createJournal": lambda journal: journal,
        "createPoller": lambda kind: _NoPoller(),
        "PIPE_NOTIFIER_ENABLED": False,
        "pickle": _NoPickle(),
    }
    for name, value in replaced.items():
        setattr(module, name, value)
    return module


def check_module(module: ModuleType, installed: str) -> None:
    """Raises LibraryMovedError unless this is a version of the library that this code can drive."""
    numbers = tuple(int(part) for part in installed.split(".")[:3] if part.isdigit())
    missing = [name for name in MODULE_NAMES if not hasattr(module, name)]
    if not missing:
        missing = [f"SyncObj.__{name}" for name in METHODS if not hasattr(module.SyncObj, _P + name)]
    if missing or not VERSION_MIN <= numbers < (0, 4):
        what = f"lacks {', '.join(missing)}" if missing else "is out of the range that is supported"
        tested = ".".join(map(str, VERSION_TESTED))
        raise LibraryMovedError(
            f"pysyncobj {installed} {what}: install version {tested}, which this ftray was tested with"
        )


def check_names(instance: object) -> None:
    """Raises LibraryMovedError unless the fields that are used are there."""
    missing = [f"__{name}" for name in FIELDS if not hasattr(instance, _P + name)]
    if missing:
        raise LibraryMovedError(
            f"SyncObj of the installed pysyncobj has no {', '.join(missing)}: install version "
            f"{'.'.join(map(str, VERSION_TESTED))}, which this ftray was tested with"
        )


_lib: Any = _load()
_FOLLOWER, _LEADER = _lib._RAFT_STATE.FOLLOWER, _lib._RAFT_STATE.LEADER


class PeerNode(_lib.Node):  # type: ignore[misc]
    """A peer as the library knows it. Its hash does not depend on the process, so sets have the same order in each."""

    def __init__(self, replica_id: bytes) -> None:
        super().__init__(replica_id.hex())
        self.replica_id = replica_id
        self._hash = int.from_bytes(replica_id[:7], "big")

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PeerNode) and self.replica_id == other.replica_id


class Owner(Protocol):
    """What an engine asks of its replica."""

    @property
    def round(self) -> int:
        """What goes with the leader's messages."""
        ...

    @property
    def round_seen(self) -> int:
        """What goes with an answer to the leader."""
        ...

    def on_send(self, peer: bytes, message: m.PeerMessage) -> None:
        """A message for a peer."""
        ...

    def on_snapshot_needed(self, peer: bytes) -> None:
        """The peer needs entries that are not in the log any more."""
        ...

    def on_apply(self, index: int, term: int, command: bytes) -> None:
        """An entry is committed. An exception ends the tick, and must end the replica."""
        ...


class _Transport(_lib.Transport):  # type: ignore[misc]
    """Turns what the library sends into messages of ours, with the term on each."""

    def __init__(self, engine: Engine, owner: Owner, log: RaftLog) -> None:
        super().__init__(None, None, [])
        self._engine = engine
        self._owner = owner
        self._log = log

    def send(self, node: PeerNode, message: dict[str, Any]) -> bool:
        peer, owner, term = node.replica_id, self._owner, self._engine.term
        out: m.PeerMessage
        match message["type"]:
            case "append_entries" if "prevLogIdx" in message:
                entries = message["entries"]
                if entries and not self._engine.window.take(
                    peer, term, entries[-1][1], sum(len(entry[0]) for entry in entries)
                ):
                    self._engine.skip(peer, entries[0][1])
                    entries = ()  # that it is there the peer must hear all the same
                out = m.Append(
                    term, owner.round, message["commit_index"], message["prevLogIdx"], message["prevLogTerm"],
                    tuple(entries),
                )  # fmt: skip
            case "append_entries":
                self._engine.skip(peer)
                owner.on_snapshot_needed(peer)
                out = m.Ping(term, owner.round)
            case "next_node_idx":
                next_index, reset = message["next_node_idx"], message["reset"]
                if reset and self._log[0][1] <= next_index <= self._engine.last_index:
                    next_index = self._log.first_of_term(next_index)  # not one entry with each message
                out = m.Ack(term, owner.round_seen, next_index, reset, message["success"])
            case "request_vote":
                out = m.VoteRequest(term, message["last_log_index"], message["last_log_term"])
            case "response_vote":
                out = m.Vote(message["term"])
            case "timeout_now":
                out = m.TimeoutNow(term)
            case _:
                return False  # commands forwarded to a leader: that is not used here
        owner.on_send(peer, out)
        return True


class _NoSerializer:
    """Snapshots travel in messages of ours; `Owner.on_send` sees from the message that one is needed."""

    def getTransmissionData(self, node: object) -> None: ...
    def cancelTransmisstion(self, node: object) -> None: ...


class _Raft(_lib.SyncObj):  # type: ignore[misc]
    """The library's object with the methods that are ours."""

    def __init__(self, engine: Engine, owner: Owner, rng: random.Random, log: RaftLog, conf: Any) -> None:
        self._ftray_owner = owner
        self._ftray_rng = rng
        super().__init__(engine.me, [], conf, transport=_Transport(engine, owner, log))

    def _SyncObj__generateRaftTimeout(self) -> float:
        conf = self._SyncObj__conf
        return float(self._ftray_rng.uniform(conf.raftMinTimeout, conf.raftMaxTimeout))

    def _SyncObj__doApplyCommand(self, command: bytes) -> None:
        index = self._SyncObj__raftLastApplied + 1
        log = self._SyncObj__raftLog
        self._ftray_owner.on_apply(index, log[index - log[0][1]][2], command)

    def _SyncObj__getEntries(
        self, from_index: int | None, count: int | None = None, max_bytes: int | None = None
    ) -> list[tuple[bytes, int, int]]:
        log = self._SyncObj__raftLog
        first = log[0][1]
        if from_index is None or from_index < first:
            return []
        start = from_index - first
        if max_bytes is None:
            # Without a count it is the entry before those of a message: what follows it is `RaftLog.add`'s business.
            return log[start : start + (1 if count is None else count)]  # type: ignore[no-any-return]
        end, size = start, 0
        while end < len(log):
            size += len(log[end][0])
            if size > BATCH_BYTES and end > start:
                break
            end += 1
        return log[start:end]  # type: ignore[no-any-return]

    def _SyncObj__deleteEntriesFrom(self, index: int) -> None:
        raise LibraryMovedError("pysyncobj cuts the log, which is not its business here: please report it")

    def _SyncObj__tryLogCompaction(self) -> None:
        """Nothing: see `RaftLog.compact`."""


class Engine:
    """One replica's Raft. Times are milliseconds of the clock that it is given."""

    def __init__(
        self,
        owner: Owner,
        log: RaftLog,
        me: bytes,
        now_ms: Callable[[], float],
        rng: random.Random,
        *,
        election_min_ms: float,
        election_max_ms: float,
        append_ms: float,
        fallback_ms: float,
    ) -> None:
        self._clock: Callable[[], float] = lambda: now_ms() / 1000.0
        self._log = log
        self._nodes: dict[bytes, PeerNode] = {}
        self.window = Window()
        self._skipped: dict[PeerNode, int] = {}
        """What is known of peers that were skipped in this tick."""
        self.me = self.node(me)
        self._enter()
        conf = _lib.SyncObjConf(
            autoTick=False,
            raftMinTimeout=election_min_ms / 1000.0,
            raftMaxTimeout=election_max_ms / 1000.0,
            appendEntriesPeriod=append_ms / 1000.0,
            leaderFallbackTimeout=fallback_ms / 1000.0,
            connectionTimeout=1e9,  # that is for its own sockets
            appendEntriesUseBatch=False,  # followers learn at once what is committed
            appendEntriesBatchSizeBytes=1 << 62,  # so it never cuts an entry into pieces, which it does wrongly
            dynamicMembershipChange=False,
            useFork=False,
        )
        conf.journalFile = log
        self._raft: Any = _Raft(self, owner, rng, log, conf)
        check_names(self._raft)
        self._raft._SyncObj__serializer = _NoSerializer()
        if log.snapshot_index:
            self._raft._SyncObj__raftLastApplied = log.snapshot_index

    def _enter(self) -> None:
        """From here on the library's clock is this engine's."""
        global _clock
        _clock = self._clock

    def node(self, peer: bytes) -> PeerNode:
        node = self._nodes.get(peer)
        if node is None:
            node = self._nodes[peer] = PeerNode(peer)
        return node

    # --- what it knows ------------------------------------------------------------------------------------------------

    @property
    def leads(self) -> bool:
        return bool(self._raft._SyncObj__raftState == _LEADER)

    @property
    def term(self) -> int:
        return int(self._raft._SyncObj__raftCurrentTerm)

    @property
    def leader(self) -> bytes | None:
        """The leader of this term as far as is known."""
        leader = self._raft._SyncObj__raftLeader
        return None if leader is None else leader.replica_id

    @property
    def last_index(self) -> int:
        return self._log[-1][1]

    @property
    def last_term(self) -> int:
        return self._log[-1][2]

    @property
    def commit_index(self) -> int:
        return int(self._raft._SyncObj__raftCommitIndex)

    @property
    def last_applied(self) -> int:
        return int(self._raft._SyncObj__raftLastApplied)

    @property
    def own_term_applied(self) -> bool:
        """At the leader: the entry that it began its term with is applied, and so all that was committed before."""
        first = self._raft._SyncObj__noopIDx
        return first is not None and self.last_applied >= first

    @property
    def handing_over(self) -> bool:
        """The leader has asked for an election here."""
        return bool(self._raft._SyncObj__transferInProgress)

    def match_index(self, peer: bytes) -> int:
        """At the leader: up to which entry the peer is known to have the log."""
        return int(self._raft._SyncObj__raftMatchIndex.get(self.node(peer), 0))

    def is_linked(self, peer: bytes) -> bool:
        return self.node(peer) in self._raft._SyncObj__connectedNodes

    def heard_ms(self, peer: bytes) -> float:
        """At the leader: when the peer has answered last."""
        return float(self._raft._SyncObj__lastResponseTime.get(self.node(peer), 0.0)) * 1000.0

    def rests_under(self, leader: bytes) -> bool:
        """As a follower of that leader: nothing is to be applied, and no election was asked for."""
        raft = self._raft
        return bool(
            raft._SyncObj__raftLeader == self.node(leader)
            and raft._SyncObj__raftState == _FOLLOWER
            and raft._SyncObj__raftLastApplied == raft._SyncObj__raftCommitIndex
            and not raft._SyncObj__transferInProgress
        )

    def election_due(self) -> bool:
        return bool(self._raft._SyncObj__raftElectionDeadline < self._clock())

    def next_wake_ms(self) -> float:
        """When the next tick has something to do."""
        if self.leads:
            return float(self._raft._SyncObj__newAppendEntriesTime) * 1000.0 + 0.1
        return float(self._raft._SyncObj__raftElectionDeadline) * 1000.0 + 0.1

    # --- what it is told ----------------------------------------------------------------------------------------------

    def tick(self) -> None:
        self._enter()
        self._raft.doTick(0.0)
        self._put_back()

    def _receive(self, peer: bytes, message: dict[str, Any]) -> None:
        self._enter()
        self._raft._SyncObj__onMessageReceived(self.node(peer), message)
        self._put_back()

    def on_append(self, peer: bytes, event: m.Append) -> None:
        """A leader of this term or a later one sends entries."""
        # What is not known to agree with the leader's log is not committed, though it may be here.
        verified = event.previous_index + len(event.entries)
        self._receive(peer, {
            "type": "append_entries", "term": event.term, "commit_index": min(event.commit, verified),
            "entries": event.entries, "prevLogIdx": event.previous_index, "prevLogTerm": event.previous_term,
        })  # fmt: skip

    def on_leader(self, peer: bytes, term: int) -> None:
        """A leader of this term or a later one is there; nothing is known of the log here."""
        self._receive(peer, {"type": "append_entries", "term": term, "commit_index": 0, "serialized": None})

    def on_ack(self, peer: bytes, ack: m.Ack) -> None:
        """An acknowledgement of this term."""
        next_index = max(1, min(ack.next_index, self.last_index + 1))
        if ack.reset or not ack.success:
            self.window.forget(peer)
        elif self.window.acknowledged(peer, next_index - 1):
            self.hurry()
        if not ack.success:
            # Of several messages on their way that don't fit, the first says how far to go back. The later ones only
            # say that there is a gap: going forward again to it would bring the same messages, for ever.
            next_index = min(next_index, self._raft._SyncObj__raftNextIndex.get(self.node(peer), next_index))
        self._receive(peer, {
            "type": "next_node_idx", "reset": ack.reset, "success": ack.success, "next_node_idx": next_index,
        })  # fmt: skip

    def on_vote_request(self, peer: bytes, event: m.VoteRequest) -> None:
        self._receive(peer, {
            "type": "request_vote", "term": event.term, "last_log_index": event.last_index,
            "last_log_term": event.last_term,
        })  # fmt: skip

    def on_vote(self, peer: bytes, term: int) -> None:
        self._receive(peer, {"type": "response_vote", "term": term})

    def on_timeout_now(self, peer: bytes, term: int) -> None:
        self._receive(peer, {"type": "timeout_now", "term": term})

    def beat(self) -> list[bytes] | None:
        """At the leader: if a tick would only send empty messages now, notes that they are sent, and returns the peers
        that get one. None if there is more to do, or nothing."""
        raft, last_index = self._raft, self.last_index
        now, period = self._clock(), raft._SyncObj__conf.appendEntriesPeriod
        if (
            not self.leads or now <= raft._SyncObj__newAppendEntriesTime or raft._SyncObj__readonlyNodes
            or raft._SyncObj__raftLastApplied != last_index or raft._SyncObj__raftCommitIndex != last_index
        ):  # fmt: skip
            return None
        voters, times = raft._SyncObj__otherNodes, raft._SyncObj__lastResponseTime
        silent_since = now - raft._SyncObj__conf.leaderFallbackTimeout
        if 1 + sum(times[node] > silent_since for node in voters) <= (len(voters) + 1) / 2:
            return None  # it steps down
        linked = [node for node in voters if node in raft._SyncObj__connectedNodes]
        next_index, match_index = raft._SyncObj__raftNextIndex, raft._SyncObj__raftMatchIndex
        if any(next_index[node] != last_index + 1 or match_index[node] != last_index for node in linked):
            return None
        raft._SyncObj__newAppendEntriesTime = now + period
        return [node.replica_id for node in linked]

    def skip(self, peer: bytes, next_needed: int | None = None) -> None:
        """While the library sends: that peer gets nothing more now, because it needs a snapshot, or because enough is
        on its way to it (`next_needed` is what comes next). (The library goes on asking for its part of a snapshot,
        until 30 ms have passed, unless the peer seems to have all entries.)"""
        node, next_index = self.node(peer), self._raft._SyncObj__raftNextIndex
        self._skipped.setdefault(node, next_index[node] if next_needed is None else next_needed)
        next_index[node] = self.last_index + 1

    def _put_back(self) -> None:
        if self._skipped:
            self._raft._SyncObj__raftNextIndex.update(self._skipped)
            self._skipped.clear()

    def connected(self, peer: bytes) -> None:
        self.window.forget(peer)
        self._raft._SyncObj__onNodeConnected(self.node(peer))

    def disconnected(self, peer: bytes) -> None:
        self._raft._SyncObj__onNodeDisconnected(self.node(peer))

    def append(self, command: bytes) -> tuple[int, int]:
        """At the leader: adds an entry to the log, to be sent with the next tick. Returns its index and term."""
        index, term = self.last_index + 1, self.term
        self._log.add(command, index, term)
        self.hurry()
        return index, term

    def hurry(self) -> None:
        """At the leader: the next tick sends to all peers."""
        self._raft._SyncObj__newAppendEntriesTime = -1.0

    def heard_from(self, peer: bytes) -> None:
        """At the leader: the peer is there, though what it said is no acknowledgement."""
        node, times = self.node(peer), self._raft._SyncObj__lastResponseTime
        if node in times:
            times[node] = self._clock()

    def postpone(self) -> None:
        """No election before another timeout."""
        raft = self._raft
        raft._SyncObj__raftElectionDeadline = self._clock() + raft._SyncObj__generateRaftTimeout()

    def campaign(self) -> None:
        """The next tick begins an election."""
        self._raft._SyncObj__raftElectionDeadline = -1.0

    def observe(self, term: int) -> None:
        """A later term is known to have begun: no leader is known in it."""
        raft = self._raft
        if term > self.term:
            self._enter()
            raft._SyncObj__setCurrentTerm(term, None)
            raft._SyncObj__setState(_FOLLOWER)
            raft._SyncObj__raftLeader = None
            raft._SyncObj__transferInProgress = False
            self.postpone()

    def hand_over(self, peer: bytes) -> None:
        """At the leader: asks that follower, if it has the whole log, to hold an election now."""
        self._enter()
        self._raft.transferLeadership(self.node(peer))

    def successors(self) -> list[bytes]:
        """At the leader: linked voters that have the whole log."""
        voters = self._raft._SyncObj__otherNodes
        return sorted(
            (
                node.replica_id
                for node in voters
                if self.is_linked(node.replica_id) and self.match_index(node.replica_id) == self.last_index
            ),
            reverse=True,
        )

    def set_peers(self, voters: Iterable[bytes], learners: Iterable[bytes]) -> None:
        """The table of members is another one."""
        raft = self._raft
        now = self._clock()
        raft._SyncObj__otherNodes = {self.node(peer) for peer in voters}
        raft._SyncObj__readonlyNodes = {self.node(peer) for peer in learners}
        known = raft._SyncObj__otherNodes | raft._SyncObj__readonlyNodes
        next_index, match_index = raft._SyncObj__raftNextIndex, raft._SyncObj__raftMatchIndex
        times = raft._SyncObj__lastResponseTime
        for node in known:
            next_index.setdefault(node, self.last_index + 1)
            match_index.setdefault(node, 0)
            times.setdefault(node, now)
        for each in (next_index, match_index, times):
            for node in [node for node in each if node not in known]:
                del each[node]

    def installed(self, index: int) -> None:
        """State and log are those of a snapshot after this entry."""
        self._raft._SyncObj__raftLastApplied = index
        self._raft._SyncObj__raftCommitIndex = index


