"""Defects to plant into the production code, each of a kind that a replicated service has had somewhere.

Each is a function that patches, with what is needed to see it: heads, kinds of faults, how many seeds may be tried.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import pytest

from ftray.gcs.compaction import Compaction
from ftray.gcs.journal import FRAME_HEAD_BYTES, Journal, decode_frame_head, place_crc
from ftray.gcs.journal_format import META, decode_records, encode_record
from ftray.gcs.raft import messages as m
from ftray.gcs.raft.elections import Elections
from ftray.gcs.raft.leading import Leading
from ftray.gcs.raft.library import Engine
from ftray.gcs.raft.log import RaftLog
from ftray.gcs.raft.replica import RaftReplica
from ftray.gcs.raft.window import Window
from ftray.gcs.serving import Serving
from ftray.gcs.state import groups
from ftray.gcs.state import state as state_module
from ftray.gcs.state.group_manager import GroupManager
from ftray.gcs.state.managers import ActorManager
from ftray.gcs.state.sessions import Sessions
from ftray.gcs.state.state import GcsState
from ftray.gcs.state.tables import Change
from ftray.gcs.watchers import WatchHub
from ftray.scheduling.bundles import NodeBundles
from ftray.sim.faults import Fault
from ftray.sim.heads import Head, Hooks
from ftray.sim.world import Options

Patch = pytest.MonkeyPatch


@dataclass(frozen=True)
class Planted:
    """One defect."""

    plant: Callable[[Patch], None]
    options: Options
    seeds_max: int
    hooks: type[Hooks] = Hooks
    slow: bool = False
    first: int = 0
    """The seed to begin with: one near which it is seen, so that the tests are quick."""

    @property
    def name(self) -> str:
        return self.plant.__name__


def reply_before_sync(patch: Patch) -> None:
    """What is written is made durable by the kernel, some time."""
    patch.setattr(Journal, "_make_durable", lambda journal, fd: None)


def stale_acknowledgement_accepted(patch: Patch) -> None:
    """An acknowledgement from an earlier term counts."""
    real = Leading.on_ack

    def on_ack(leading: Leading, peer: bytes, ack: Any, now_ms: float) -> None:
        term = leading._engine.term
        real(leading, peer, msgspec.structs.replace(ack, term=max(ack.term, term)) if ack.term < term else ack, now_ms)

    patch.setattr(Leading, "on_ack", on_ack)


def double_vote_counted(patch: Patch) -> None:
    """One voter's vote counts twice."""
    real = Engine.on_vote

    def on_vote(engine: Engine, peer: bytes, term: int) -> None:
        real(engine, peer, term)
        if engine.term == term and not engine.leads:
            real(engine, peer, term)

    patch.setattr(Engine, "on_vote", on_vote)


def snapshot_without_its_sessions(patch: Patch) -> None:
    real = state_module.Picture
    patch.setattr(
        state_module, "Picture", lambda cluster, revision, store, sessions: real(cluster, revision, store, Sessions())
    )


def watch_resume_off_by_one(patch: Patch) -> None:
    real = WatchHub.add
    patch.setattr(
        WatchHub, "add", lambda hub, state, watcher, tables, keys, since: real(
            hub, state, watcher, tables, keys, since + 1 if since >= 0 else since
        )
    )  # fmt: skip


def watch_resume_off_by_one_at_a_follower(patch: Patch) -> None:
    real = WatchHub.add
    patch.setattr(
        WatchHub, "add", lambda hub, state, watcher, tables, keys, since: real(
            hub, state, watcher, tables, keys, since + 1 if since >= 0 and hub.follows else since
        )
    )  # fmt: skip


def follower_answers_before_it_is_there(patch: Patch) -> None:
    """A head that is behind what a client has seen shows it the past."""
    patch.setattr(Serving, "is_as_far", lambda serving, seen: True)


def follower_says_what_is_not_there(patch: Patch) -> None:
    """What has not come to a follower yet is not there, it says."""
    patch.setattr(Serving, "_wait_for", lambda serving, link, client, item, request: serving._send_rows(
        link, request, [Change(serving._replica.state.revision, *item, None)]
    ))  # fmt: skip


def watchers_forgotten_when_a_snapshot_comes(patch: Patch) -> None:
    """A follower's state is replaced, and who watches there is not told what is different."""
    patch.setattr(WatchHub, "reset", lambda hub, state: None)


def stale_leader_serves_a_fresh_read(patch: Patch) -> None:
    """Who believes to lead answers without asking anybody."""
    real = RaftReplica.confirm

    def confirm(replica: RaftReplica, confirmed: Callable[[bool], None]) -> None:
        if replica.is_leader:
            confirmed(True)
        else:
            real(replica, confirmed)

    patch.setattr(RaftReplica, "confirm", confirm)


def _after_replay(patch: Patch, change: Callable[[RaftLog], None]) -> None:
    real = RaftLog.replay

    def replay(log: RaftLog) -> bytes | None:
        state = real(log)
        change(log)
        return state

    patch.setattr(RaftLog, "replay", replay)


def vote_lost_on_restart(patch: Patch) -> None:
    _after_replay(patch, lambda log: setattr(log, "vote", None))


def term_forgotten(patch: Patch) -> None:
    """A restarted head knows the term of its last entry only."""

    def forget(log: RaftLog) -> None:
        log.term, log.vote = (log[-1][2] if len(log) else 0), None

    _after_replay(patch, forget)


def torn_tail_accepted(patch: Patch) -> None:
    """The checksum of a frame's body is not looked at."""

    def read(journal: Journal, file: Any, offset: int, end: int) -> Any:
        place = place_crc(file.salt_crc, offset)
        head = decode_frame_head(journal._files.pread(file.fd, FRAME_HEAD_BYTES, offset), place)
        if head is None:
            return None
        return head, journal._files.pread(file.fd, head.length, offset + FRAME_HEAD_BYTES)

    patch.setattr(Journal, "_read_frame", read)


def emptied_disk_votes_under_its_old_identity(patch: Patch) -> None:
    """See `NamedByEndpoint`."""


class NamedByEndpoint(Hooks):
    """A head's identity is its address, not its disk."""

    def identity(self, head: Head) -> bytes | None:
        return zlib.crc32(head.name.encode()).to_bytes(16, "big")


def unverified_entry_committed(patch: Patch) -> None:
    """A follower commits what the leader has committed, whether it has the same entries or not."""
    real = Engine._receive

    def on_append(engine: Engine, peer: bytes, event: m.Append) -> None:
        real(engine, peer, {
            "type": "append_entries", "term": event.term, "commit_index": event.commit, "entries": event.entries,
            "prevLogIdx": event.previous_index, "prevLogTerm": event.previous_term,
        })  # fmt: skip

    patch.setattr(Engine, "on_append", on_append)


def sessions_ignored(patch: Patch) -> None:
    """A repeated command takes effect again."""
    patch.setattr(GcsState, "recall", lambda state, client, sequence, checksum=0: None)
    real = GcsState.apply
    patch.setattr(GcsState, "apply", lambda state, client, sequence, command, *rest: real(state, b"", 0, command))


def votes_for_any_log(patch: Patch) -> None:
    """Votes for candidates that lack entries."""
    real = Engine.on_vote_request
    patch.setattr(
        Engine, "on_vote_request",
        lambda engine, peer, event: real(engine, peer, m.VoteRequest(event.term, 1 << 60, 1 << 60)),
    )  # fmt: skip
    ask = Elections.on_request
    patch.setattr(
        Elections, "on_request",
        lambda elections, peer, event, now_ms: ask(
            elections, peer, m.PreVoteRequest(event.term, 1 << 60, 1 << 60, event.attempt), now_ms
        ),
    )  # fmt: skip


def new_journals_name_not_synced(patch: Patch) -> None:
    """After a compaction the directory is not synced, so that the old journal may be back after a loss of power."""
    from ftray.sim.disk import SimFiles

    patch.setattr(SimFiles, "sync_directory", lambda files, path: None)


def flipped_bit_accepted(patch: Patch) -> None:
    """A damaged journal is cut off where the damage begins, as if a crash had done it."""
    patch.setattr(Journal, "_find_frame", lambda journal, file, start, end: None)


def replayed_is_not_synced(patch: Patch) -> None:
    """What a restarted head reads may not be durable: the process before it was stopped between write and sync."""
    real, replay = Journal._make_durable, Journal.replay
    replaying: list[bool] = []

    def replay_unsynced(journal: Journal) -> Any:
        replaying.append(True)
        try:
            yield from replay(journal)
        finally:
            replaying.pop()

    patch.setattr(Journal, "replay", replay_unsynced)
    patch.setattr(Journal, "_make_durable", lambda journal, fd: None if replaying else real(journal, fd))


def gaps_move_a_follower_forward(patch: Patch) -> None:
    """Of several messages that don't fit, the last one's answer says where to go on: for ever, some time."""

    def on_ack(engine: Engine, peer: bytes, ack: m.Ack) -> None:
        engine._receive(peer, {
            "type": "next_node_idx", "reset": ack.reset, "success": ack.success,
            "next_node_idx": max(1, min(ack.next_index, engine.last_index + 1)),
        })  # fmt: skip

    patch.setattr(Engine, "on_ack", on_ack)


def half_done_work_forgotten(patch: Patch) -> None:
    """A raylet that comes to a new leader is not told anew what it is to start."""
    patch.setattr(ActorManager, "on_node_report", lambda manager, state, node_id, hosted: None)


def new_journal_renamed_before_it_is_synced(patch: Patch) -> None:
    """The kernel makes it durable, some time."""

    def begin_sync(running: Compaction) -> None:
        running._unsynced_bytes = 0

    patch.setattr(Compaction, "_begin_sync", begin_sync)
    patch.setattr(Compaction, "_make_durable", lambda running: None)


def _carries_without(patch: Patch, kept: Callable[[int], bool]) -> None:
    """A compaction takes over only some kinds of the records that were synced while it was under way."""

    def copy(running: Compaction, at_least_bytes: int) -> int:
        file, start = running._journal._file, running._carried
        bodies: list[bytes] = []
        size = 0
        while running._carried - start < at_least_bytes:
            _, body = running._journal._read_frame(file, running._carried, file.size_bytes)  # type: ignore
            running._carried += FRAME_HEAD_BYTES + len(body)
            size += sum(encode_record(record, bodies) for record in decode_records(body) if kept(record.kind))
        if size:
            running._write_frame(bodies, size)
        return running._carried - start

    patch.setattr(Compaction, "_copy", copy)


def entries_during_a_compaction_lost(patch: Patch) -> None:
    _carries_without(patch, lambda kind: kind == META)


def votes_during_a_compaction_lost(patch: Patch) -> None:
    _carries_without(patch, lambda kind: kind != META)


def bundles_committed_before_all_are_prepared(patch: Patch) -> None:
    """The first node that is prepared decides for all."""
    patch.setattr(groups, "all_prepared", lambda group: True)


def bundles_placed_again_before_they_are_given_back(patch: Patch) -> None:
    """An attempt that is given up is forgotten: what nodes hold of it, too."""
    patch.setattr(groups, "_with_leftovers", lambda group, which, alive: group)


def nodes_not_asked_again_for_bundles(patch: Patch) -> None:
    """A node that comes to a new leader is not told what it has not answered."""
    patch.setattr(GroupManager, "on_node_connected", lambda manager, state, node_id: None)


def bundles_freed_under_their_tasks(patch: Patch) -> None:
    """What is given back is free at once, and what runs in it goes on."""
    patch.setattr(NodeBundles, "_ends", lambda bundles, reservation: ())


def what_was_dropped_is_under_way_for_ever(patch: Patch) -> None:
    """A leader waits for answers to what its follower has not taken."""
    patch.setattr(Window, "forget", lambda window, peer: None)


def former_tables_count(patch: Patch) -> None:
    """A head that joins takes a table of the past, in which it is not, for the valid one."""
    patch.setattr(RaftLog, "_knows_later", property(lambda raft_log: bool(raft_log._tables)))


def _options(
    *kinds: str, heads: int = 3, pause_ms: float = 180.0, small: bool = False, nodes: int = 1
) -> Options:
    return Options(heads=heads, faults=kinds, pause_ms=pause_ms, small=small, nodes=nodes)


FLIPS = tuple(Fault(number, 1000.0 + 600.0 * number, "flip", number % 3, 0, 300.0, 0.5, number % 2 > 0)
              for number in range(6))  # fmt: skip
"""A bit of an old record, of one head after the other. In schedules that are drawn it is too rare; and what comes of it
is mostly that the others know better, and refuse the head."""


LOSSES = tuple(Fault(number, 500.0 + 1200.0 * number, "lose_disk", number % 3, 0, 100.0, 0.5, False)
               for number in range(6))  # fmt: skip
"""Each head loses its disk, twice, one after the other."""


PLANTED = (
    Planted(former_tables_count, replace(_options("disk"), clients=4, seconds=8.0, schedule=LOSSES), 20, first=1),
    Planted(reply_before_sync, _options("crash"), 20),
    Planted(double_vote_counted, _options("crash", heads=5), 40, first=1),
    Planted(snapshot_without_its_sessions, _options("crash", pause_ms=60.0, small=True), 30),
    Planted(watch_resume_off_by_one, _options("crash", "cut"), 20),
    Planted(watch_resume_off_by_one_at_a_follower, _options("crash", "cut"), 30, first=8),
    Planted(follower_answers_before_it_is_there, _options("crash", "cut", "freeze"), 30),
    Planted(follower_says_what_is_not_there, _options("crash", "cut", "freeze"), 30),
    Planted(stale_leader_serves_a_fresh_read, _options("cut", "clock", pause_ms=40.0), 40, first=2),
    Planted(vote_lost_on_restart, _options("crash", "cut"), 30),
    Planted(term_forgotten, _options("crash", "cut"), 30),
    Planted(torn_tail_accepted, _options("crash", "disk"), 30),
    Planted(emptied_disk_votes_under_its_old_identity, _options("crash", "cut", "disk"), 30, NamedByEndpoint),
    Planted(sessions_ignored, _options("crash", "cut"), 20),
    Planted(votes_for_any_log, _options("crash", "cut"), 20),
    Planted(new_journals_name_not_synced, _options("crash", "disk"), 30),
    Planted(new_journal_renamed_before_it_is_synced, _options("crash", "disk", small=True), 30),
    Planted(entries_during_a_compaction_lost, _options("crash", "disk", small=True), 30),
    Planted(what_was_dropped_is_under_way_for_ever, _options("cut", "disk", small=True), 30, first=6),
    Planted(flipped_bit_accepted, replace(_options("disk"), clients=4, schedule=FLIPS), 40),
    Planted(half_done_work_forgotten, _options("crash", "cut"), 40),
    Planted(bundles_committed_before_all_are_prepared, _options("crash", "cut", nodes=3), 10),
    Planted(bundles_placed_again_before_they_are_given_back, _options("crash", "cut", nodes=3), 10),
    Planted(nodes_not_asked_again_for_bundles, _options("crash", "cut", nodes=3), 40),
    Planted(bundles_freed_under_their_tasks, _options("crash", "cut", nodes=3), 20),
)
