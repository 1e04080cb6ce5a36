"""The GCS state machine: exactly once, faults inside it, the change feed, and snapshots."""

from __future__ import annotations

import base64
import zlib
from typing import Any

import pytest
from gcs_states import CAUSE, CLUSTER, DRIVER, JOB, N1, N2, N3, A, B, Gcs, ident

from ftray.gcs.state import commands as c
from ftray.gcs.state import sessions, snapshot, state, store
from ftray.gcs.state.errors import ClusterMismatchError, SnapshotCorruptError, SnapshotVersionError
from ftray.gcs.state.state import COMPACTED, GcsState
from ftray.gcs.state.tables import Code, Table

# --- exactly once -----------------------------------------------------------------------------------------------------


def test_a_retry_takes_effect_once() -> None:
    gcs = Gcs(0)
    first = gcs.do(c.KvPut("ns", b"k", b"1"), b"me", 1)
    gcs.do(c.KvPut("ns", b"k", b"2"), b"you", 1)
    assert gcs.do(c.KvPut("ns", b"k", b"1"), b"me", 1) == first
    assert gcs.state.kv_get("ns", b"k") == b"2"
    refused = gcs.do(c.KvPut("ns", b"k", b"3", overwrite=False), b"me", 2)
    gcs.do(c.KvDelete("ns", b"k"), b"you", 2)
    assert gcs.do(c.KvPut("ns", b"k", b"3", overwrite=False), b"me", 2) == refused
    assert gcs.state.kv_get("ns", b"k") is None
    assert gcs.do(c.KvPut("ns", b"k", b"1"), b"me", 1).code is Code.STALE
    assert gcs.do(c.KvPut("ns", b"k", b"1"), b"x" * 65, 1).code is Code.INVALID
    assert gcs.do(c.KvPut("ns", b"k", b"1"), b"me", -1).code is Code.INVALID


def test_forgotten_clients_stay_barred() -> None:
    gcs = Gcs()
    worker = ident("worker")
    gcs.do(c.KvPut("ns", b"k", b"1"), worker, 1)
    gcs.do(c.WorkerDied(worker, N1, CAUSE))
    gcs.do(c.KvDelete("ns", b"k"))
    assert gcs.do(c.KvPut("ns", b"k", b"1"), worker, 1).code is Code.SESSION_EXPIRED
    assert gcs.state.kv_get("ns", b"k") is None
    gcs.do(c.KvPut("ns", b"k", b"1"), b"x", 1)
    # A client can't forget itself: its own retry must find the result.
    assert gcs.do(c.ForgetClients([b"x", b"y", b"z"]), b"y", 1).value == 1
    assert gcs.do(c.ForgetClients([b"x", b"y", b"z"]), b"y", 1).value == 1
    assert gcs.do(c.KvPut("ns", b"k", b"1"), b"z", 1).code is Code.SESSION_EXPIRED
    # A driver that says goodbye gets the same answer again.
    assert gcs.do(c.FinishJob(JOB), DRIVER, 1) == gcs.do(c.FinishJob(JOB), DRIVER, 1)


def test_sessions_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "CLIENTS_MAX", 3)
    monkeypatch.setattr(sessions, "FORGOTTEN_MAX", 2)
    gcs = Gcs(0)
    for i in range(3):
        gcs.do(c.KvPut("ns", b"k", b"1"), b"c%d" % i, 1)
    gcs.do(c.KvPut("ns", b"k", b"2"), b"c0", 2)
    for i in range(3, 6):
        gcs.do(c.KvPut("ns", b"k", b"1"), b"c%d" % i, 1)
    assert set(gcs.state.sessions.last) == {b"c3", b"c4", b"c5"}
    assert list(gcs.state.sessions.forgotten) == [b"c2", b"c0"]


# --- faults -----------------------------------------------------------------------------------------------------------


def test_apply_never_raises_and_a_fault_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    gcs = Gcs()
    before = gcs.state.snapshot()

    def broken(tables: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(state, "settle", broken)
    result = gcs.state.apply(b"", 0, c.MarkNodeDead(N1, 1, CAUSE))
    assert result.code is Code.INTERNAL and "a bug" in result.message
    monkeypatch.undo()
    assert gcs.state.snapshot() == before and gcs.state.check() == []
    wrong: Any = [
        c.KvPut(["?"], b"k", b"v"),  # type: ignore[arg-type]
        c.RegisterActor(A, JOB, DRIVER, N1, "X", name=["?"]),  # type: ignore[arg-type]
        c.RegisterNode(None, "", {}, {}, 1, "", 1),  # type: ignore[arg-type]
        "not a command",
    ]
    for each in wrong:
        assert gcs.do(each).code is Code.INTERNAL
    assert gcs.state.snapshot() == before


def test_out_of_memory_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(tables: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(state, "settle", broken)
    with pytest.raises(MemoryError):
        Gcs(0).state.apply(b"", 0, c.KvPut("ns", b"k", b"v"))


# --- the change feed --------------------------------------------------------------------------------------------------


def test_one_command_one_revision_and_the_net_changes() -> None:
    gcs = Gcs()
    gcs.register(A, name="x")
    gcs.register(B)
    gcs.state.take_changes()
    revision = gcs.state.revision
    gcs.do(c.FinishJob(JOB))
    changes = gcs.state.take_changes()
    assert {each.revision for each in changes} == {revision + 1}
    assert [(each.table, each.key) for each in changes] == [(Table.JOBS, JOB), (Table.ACTORS, A), (Table.ACTORS, B)]
    assert changes[1].record == gcs.actor(A)
    gcs.do(c.KvPut("ns", b"k", b"v"))
    gcs.do(c.KvDelete("ns", b"k"))
    assert gcs.state.take_changes()[-1].record is None
    assert gcs.state.take_changes() == []


def test_a_watch_resumes_from_its_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "RING_CHANGES_MAX", 3)
    gcs = Gcs(0)
    for i in range(5):
        gcs.do(c.KvPut("ns", b"%d" % i, b"v"))
    assert [each.revision for each in gcs.state.changes_since(3) or []] == [4, 5]
    assert [each.revision for each in gcs.state.changes_since(2) or []] == [3, 4, 5]
    assert gcs.state.changes_since(1) is COMPACTED
    assert gcs.state.changes_since(5) == [] and gcs.state.changes_since(99) == []
    assert gcs.state.changes_since(2, [Table.NODES]) == []
    assert len(gcs.state.rows_as_changes([Table.KV])) == 5
    monkeypatch.setattr(state, "RING_BYTES_MAX", 10_000)
    gcs.do(c.KvPut("ns", b"big", bytes(20_000)))
    assert gcs.state.changes_since(5) is COMPACTED
    assert gcs.state.changes_since(6) == []


def test_ended_records_are_bounded_oldest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(store.ENDED_MAX, Table.ACTORS, 2)
    monkeypatch.setitem(store.ENDED_MAX, Table.WORKER_FAILURES, 2)
    gcs = Gcs()
    ids = [ident(f"x{i}") for i in range(4)]
    for actor_id in ids:
        gcs.register(actor_id)
    for actor_id in (ids[2], ids[0], ids[1]):
        gcs.do(c.KillActor(actor_id, True, ""))
    assert set(gcs.state.store.actors) == {ids[0], ids[1], ids[3]}
    assert gcs.state.take_changes()[-1].record is None
    for i in range(4):
        gcs.do(c.WorkerDied(ident(f"w{i}"), N2, CAUSE))
    assert list(gcs.state.store.worker_failures) == [ident("w2"), ident("w3")]


# --- snapshots --------------------------------------------------------------------------------------------------------


def busy() -> Gcs:
    gcs = Gcs(3)
    gcs.register(A, max_restarts=3, name="x", resources={"CPU": 1.0})
    gcs.do(c.WorkerDied(gcs.alive(), N2, CAUSE), b"raylet", 5)
    gcs.register(B, owner=None)
    gcs.alive(B)
    gcs.do(c.KillActor(B, True, "enough"))
    gcs.do(c.KvPut("fn", b"k", b"v" * 100), DRIVER, 1)
    gcs.do(c.MarkNodeDead(N3, 1, CAUSE))
    gcs.do(c.ForgetClients([b"gone"]))
    return gcs


def test_a_snapshot_gives_the_same_state_back() -> None:
    gcs = busy()
    data = gcs.state.snapshot()
    again = GcsState.restore(data, CLUSTER)
    assert again.snapshot() == data
    assert again.revision == gcs.state.revision and again.check() == []
    assert again.changes_since(again.revision - 1) is COMPACTED
    retry = c.KvPut("fn", b"k", b"other")
    assert again.apply(DRIVER, 1, retry) == gcs.state.apply(DRIVER, 1, retry)
    assert again.apply(b"gone", 1, retry).code is Code.SESSION_EXPIRED
    for each in (again, gcs.state):
        each.apply(b"", 0, c.MarkNodeDead(N1, 1, CAUSE))
    assert again.snapshot() == gcs.state.snapshot()


def test_a_damaged_or_foreign_snapshot_is_refused() -> None:
    data = busy().state.snapshot()
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 0x10
        with pytest.raises(SnapshotCorruptError):
            GcsState.restore(bytes(damaged), CLUSTER)
    for size in range(0, len(data), 7):
        with pytest.raises(SnapshotCorruptError):
            GcsState.restore(data[:size], CLUSTER)
    with pytest.raises(SnapshotCorruptError):
        GcsState.restore(data + b"\0", CLUSTER)
    with pytest.raises(ClusterMismatchError, match=CLUSTER.hex()):
        GcsState.restore(data, b"other cluster id")


VERSION_1 = (
    b'c-nQ4zfQw25Qpuw1(7Ke@4y0LWdRff5)!E5&%lJz#HgXET{#IYOjP0llF|V>xe(fsSFqqVUV)XJN5IrfPWimp(%tXA^X|#f+413a'
    b'9V3JeR=$?@Ei_{Uj%#4&BMc5Tn5H!BZLHD$vs*v?*wWpoU)(TC#tmFFS)5=j^G6G+m#nc4&W^$2oY1xx($&uO6OAo7_(aPUa6AJY'
    b'C+9S~ETswI1@+oQCE$1Mw)w5ypc;3GUs0D*D>z+)zxBE`A*J?c82q<ZIlb6Ze<G9-db<Tw!wA$7XwnL!hy)J;sTs4HY|Ldotg1@D'
    b'Ex=d#um(=gpq#H0L^k!g7dJ_8_d;1f;;c}Dajrclo}VzTUZp)=yNtI8Kfmz8DCOk0#2lI5!-5}$geLY-2wM*3S(*Rv12$dmNd'
)
"""As 0.1 wrote it: a node, a finished job with a detached actor that lives and one that is dead, an entry."""


def test_a_snapshot_of_version_1_is_read() -> None:
    data = zlib.decompress(base64.b85decode(VERSION_1))
    old = GcsState.restore(data, b"C" * 16)
    assert old.check() == []
    assert [(actor.class_name, actor.state.name) for actor in old.store.actors.values()] == [
        ("Counter", "ALIVE"),
        ("Gone", "DEAD"),
    ]
    assert old.named_actor("ns", "name") is not None and old.kv_get("ns", b"k") == b"v"
    assert old.store.placement_groups == {} and list(old.store.ended[Table.JOBS]) == []
    again = GcsState.restore(old.snapshot(), b"C" * 16)
    assert again.snapshot() == old.snapshot()


def test_a_newer_snapshot_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    newer = snapshot.SNAPSHOT_VERSION + 1
    monkeypatch.setattr(snapshot, "SNAPSHOT_VERSION", newer)
    data = busy().state.snapshot()
    monkeypatch.undo()
    with pytest.raises(SnapshotVersionError, match=f"version {newer}"):
        GcsState.restore(data, CLUSTER)
