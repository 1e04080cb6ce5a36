"""The object table: creation, pins, freeing, eviction, generations, deaths, waiters."""

from __future__ import annotations

from typing import Any

import pytest

from ftray.store.table import (
    UNSEALED,
    Created,
    Dropped,
    Exists,
    Full,
    ObjectRow,
    ObjectTable,
    Place,
    StoreError,
    StoreStats,
)

P = 4096
A, B, OWNER = b"a", b"b", b"owner"
X, Y, Z = b"x" * 20, b"y" * 20, b"z" * 20


def sealed(table: ObjectTable, object_id: bytes, size: int = P, client: bytes = A, primary: bool = True) -> int:
    """Creates, seals, and releases the creator's pin."""
    created = table.create(object_id, size, client, OWNER, primary)
    assert isinstance(created, Created)
    table.seal(object_id, client)
    table.release(object_id, client)
    table.check()
    return created.offset


def used(table: ObjectTable) -> int:
    return table.stats().used_bytes


def test_an_object_is_created_sealed_pinned_released_and_freed() -> None:
    table = ObjectTable(10 * P)
    assert table.create(X, 5000, A, OWNER) == Created(0)
    assert table.pin(X, B) is UNSEALED
    assert X not in table
    assert table.seal(X, A) == []
    assert X in table
    assert table.pin(X, B) == Place(0, 5000)
    assert not table.release(X, A)
    assert table.free(X) == []
    assert table.pin(X, B) is None
    assert used(table) == 2 * P
    assert table.release(X, B)
    assert used(table) == 0
    table.check()


def test_the_creator_holds_a_pin_until_it_releases_it() -> None:
    table = ObjectTable(10 * P)
    table.create(X, 1, A, OWNER)
    table.seal(X, A)
    table.free(X)
    assert used(table) == P
    assert table.release(X, A)
    assert used(table) == 0


def test_pins_are_counted() -> None:
    table = ObjectTable(10 * P)
    sealed(table, X)
    for _ in range(3):
        table.pin(X, B)
    table.free(X)
    assert not table.release(X, B, 2)
    with pytest.raises(StoreError, match="released 2 pins, this client has 1"):
        table.release(X, B, 2)
    assert table.release(X, B)
    assert used(table) == 0
    table.check()


def test_one_client_can_not_drop_the_pins_of_another() -> None:
    table = ObjectTable(10 * P)
    sealed(table, X)
    table.pin(X, A)
    for attempt in (1, 7):
        with pytest.raises(StoreError, match="this client has 0"):
            table.release(X, B, attempt)
    with pytest.raises(StoreError):
        table.release(Y, B)
    with pytest.raises(StoreError, match="can't release 0"):
        table.release(X, A, 0)
    table.free(X)
    assert used(table) == P
    table.check()


def test_misuse_is_told_and_changes_nothing() -> None:
    table = ObjectTable(10 * P)
    table.create(X, P, A, OWNER)
    for operation in (table.seal, table.abort):
        with pytest.raises(StoreError, match="not writing"):
            operation(X, B)
        with pytest.raises(StoreError, match="not writing"):
            operation(Y, A)
    with pytest.raises(StoreError, match="seal or abort"):
        table.release(X, A)
    table.seal(X, A)
    for operation in (table.seal, table.abort):
        with pytest.raises(StoreError, match="not writing"):
            operation(X, A)
    with pytest.raises(StoreError, match="by its owner"):
        table.free(X, b"somebody")
    assert table.free(Y) == []
    table.check()
    assert table.free(X, OWNER) == []
    assert table.free(X, OWNER) == []


@pytest.mark.parametrize("size", [-1, 1.5, True, None])
def test_sizes_that_make_no_sense_are_refused(size: Any) -> None:
    with pytest.raises(StoreError, match="can't have a size"):
        ObjectTable(10 * P).create(X, size, A, OWNER)


def test_objects_without_bytes_take_no_room() -> None:
    table = ObjectTable(P)
    sealed(table, Y)
    assert table.create(X, 0, A, OWNER) == Created(0)
    table.seal(X, A)
    assert table.pin(X, B) == Place(0, 0)
    table.release(X, A)
    table.free(X)
    table.check()
    assert table.release(X, B)
    assert table.stats().objects == 1
    sealed(table, Z, 0, primary=False)
    table.check()


def test_a_full_store_says_why() -> None:
    table = ObjectTable(4 * P)
    sealed(table, X, 3 * P)
    assert table.create(Y, 2 * P, A, OWNER) == Full(2 * P, P, P, 0, 4 * P)
    assert table.create(Y, 5 * P, A, OWNER) == Full(5 * P, P, P, 0, 4 * P)
    assert table.create(Y, P, A, OWNER) == Created(3 * P)
    table.check()


def test_cached_copies_go_least_recently_used_first() -> None:
    table = ObjectTable(4 * P)
    for object_id in (X, Y, Z):
        sealed(table, object_id, primary=False)
    table.pin(X, B)
    table.release(X, B)
    # Z goes as well: only with its neighbour is Y large enough.
    assert table.create(b"1", 2 * P, A, OWNER) == Created(P, (Y, Z))
    assert Y not in table
    assert X in table
    assert table.pin(Y, B) is None
    table.check()


def test_eviction_spares_what_is_pinned_primary_or_not_needed() -> None:
    table = ObjectTable(4 * P)
    sealed(table, X, primary=False)
    sealed(table, Y, primary=True)
    sealed(table, Z, primary=False)
    table.pin(Z, B)
    # Too large even without the cached copies: none of them goes.
    assert table.create(b"1", 3 * P, A, OWNER) == Full(3 * P, P, P, P, 4 * P)
    assert X in table
    # X goes, and what is free is in two pieces.
    assert table.create(b"1", 2 * P, A, OWNER) == Full(2 * P, 2 * P, P, 0, 4 * P, (X,))
    assert table.stats().evicted_total == 1
    table.check()


def test_a_cached_copy_asked_for_as_primary_becomes_one() -> None:
    table = ObjectTable(2 * P)
    offset = sealed(table, X, primary=False)
    assert table.create(X, P, B, OWNER, primary=False) == Exists(offset, P)
    assert table.stats().evictable_bytes == P
    assert table.create(X, P, B, OWNER) == Exists(offset, P)
    assert table.stats().evictable_bytes == 0
    assert isinstance(table.create(Y, 2 * P, A, OWNER), Full)
    table.check()


def test_an_aborted_creation_leaves_nothing() -> None:
    table = ObjectTable(P)
    assert table.wait_for(X, 1)
    table.create(X, P, A, OWNER)
    table.abort(X, A)
    assert used(table) == 0
    assert table.pin(X, B) is None
    table.create(X, P, B, OWNER)
    assert table.seal(X, B) == [1]
    table.check()


def test_creating_again_undoes_the_same_clients_attempt() -> None:
    table = ObjectTable(2 * P)
    table.create(X, 2 * P, A, OWNER)
    assert table.create(X, P, A, OWNER) == Created(0)
    assert used(table) == P
    table.seal(X, A)
    assert table.create(X, P, A, OWNER) == Exists(0, P)
    table.check()


def test_a_newer_attempt_supersedes_an_older_one_that_still_writes() -> None:
    table = ObjectTable(10 * P)
    table.wait_for(X, "t")
    table.create(X, P, A, OWNER)
    assert table.create(X, P, B, OWNER) == Created(P)
    assert table.seal(X, A) == []
    assert table.pin(X, b"c") is UNSEALED
    assert table.seal(X, B) == ["t"]
    assert table.pin(X, b"c") == Place(P, P)
    table.check()
    assert table.release(X, A)
    assert used(table) == P
    table.check()
    # And the older attempt may be aborted or die as well.
    table.create(Y, P, A, OWNER)
    table.create(Y, P, B, OWNER)
    table.abort(Y, A)
    table.create(Y, P, A, OWNER)
    assert table.drop_client(B) == Dropped([Y], [X])
    table.seal(Y, A)
    table.check()


def test_an_object_freed_while_it_is_written() -> None:
    table = ObjectTable(10 * P)
    table.create(X, P, A, OWNER)
    table.wait_for(X, "t")
    assert table.free(X) == ["t"]
    assert table.pin(X, B) is None
    assert table.seal(X, A) == []
    assert used(table) == P
    assert table.release(X, A)
    assert used(table) == 0
    table.check()


def test_bytes_of_a_freed_generation_stay_until_all_of_a_clients_pins_are_released() -> None:
    table = ObjectTable(10 * P)
    old = sealed(table, X)
    table.pin(X, B)
    table.pin(X, B)
    table.free(X)
    new = sealed(table, X)
    assert new != old
    assert table.pin(X, B) == Place(new, P)
    # Which of the three goes is not known: all stay until all are released.
    assert not table.release(X, B, 2)
    table.check()
    with pytest.raises(StoreError, match="released 2 pins, this client has 1"):
        table.release(X, B, 2)
    assert used(table) == 2 * P
    assert table.release(X, B)
    assert used(table) == P
    table.check()
    table.free(X)
    assert used(table) == 0


def test_a_pin_on_an_old_generation_alone_is_released_by_itself() -> None:
    table = ObjectTable(10 * P)
    sealed(table, X)
    table.pin(X, B)
    table.pin(X, B)
    table.free(X)
    sealed(table, X)
    table.pin(X, A)
    assert not table.release(X, B)
    assert table.release(X, B)
    assert used(table) == P
    with pytest.raises(StoreError):
        table.release(X, B)
    table.check()
    # The creator of a third one, still writing, can release its old pin, and no more.
    table.free(X)
    table.create(X, P, A, OWNER)
    assert table.release(X, A)
    with pytest.raises(StoreError, match="seal or abort"):
        table.release(X, A)
    table.check()


def test_a_dead_client_leaves_nothing_behind() -> None:
    table = ObjectTable(10 * P)
    sealed(table, X)
    table.pin(X, A)
    table.pin(X, B)
    sealed(table, Y, primary=False)
    table.pin(Y, A)
    table.create(Z, P, A, OWNER)
    table.free(X)
    table.wait_for(Z, "t")
    dropped = table.drop_client(A)
    assert dropped == Dropped([Z], [X, Y])
    assert table.drop_client(A) == Dropped([], [])
    assert table.stats().evictable_bytes == P
    assert used(table) == 2 * P
    table.release(X, B)
    assert used(table) == P
    table.check()
    # Somebody else makes it after all.
    table.create(Z, P, B, OWNER)
    assert table.seal(Z, B) == ["t"]


def test_waiters() -> None:
    table = ObjectTable(10 * P)
    assert table.wait_for(X, 1)
    table.create(X, P, A, OWNER)
    assert table.wait_for(X, 2)
    assert table.wait_for(X, 2)
    assert table.wait_for(X, 3)
    table.cancel_wait(X, 3)
    table.cancel_wait(X, 4)
    table.cancel_wait(Y, 1)
    table.check()
    assert table.seal(X, A) == [1, 2]
    assert not table.wait_for(X, 5)
    assert table.wait_for(Y, 6)
    assert table.free(Y) == [6]
    table.wait_for(Z, 7)
    table.cancel_wait(Z, 7)
    assert table.free(Z) == []


def test_what_a_dead_owner_left_can_be_listed_and_freed() -> None:
    table = ObjectTable(10 * P)
    sealed(table, X)
    sealed(table, Y)
    table.create(Z, P, A, b"other")
    assert table.owned_by(OWNER) == [X, Y]
    for object_id in table.owned_by(OWNER):
        table.free(object_id, OWNER)
    assert table.owned_by(OWNER) == []
    assert used(table) == P


def test_rows_and_stats_show_every_reason() -> None:
    table = ObjectTable(10 * P + 1)
    sealed(table, X, 10)
    table.pin(X, B)
    table.free(X)
    table.create(Y, P + 1, A, OWNER)
    sealed(table, Z, primary=False)
    assert list(table.rows()) == [
        ObjectRow(Y, P, P + 1, "creating", OWNER, A, True, {A: 1}),
        ObjectRow(Z, 3 * P, P, "sealed", OWNER, A, False, {}),
        ObjectRow(X, 0, 10, "freed", OWNER, A, False, {B: 1}),
    ]
    assert table.stats() == StoreStats(10 * P, 4 * P, 3 * P, P, 6 * P, 2, 1, 0)
