"""The object table against a naive twin: a list of generations, each with a plain count of pins.

Safety: no two live generations overlap, what is pinned stays in its place, a freed object is not found, no client
touches the pins of another. Liveness: with all clients gone and all objects freed, nothing is left.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftray.store.table import UNSEALED, Created, Exists, Full, ObjectTable, Place, StoreError

P = 4096
CAPACITY = 5

ids = st.sampled_from([b"x", b"y", b"z"])
clients = st.sampled_from([b"a", b"b", b"c"])
owners = st.sampled_from([b"o", b"p"])
events = st.one_of(
    st.tuples(st.just("create"), ids, st.integers(0, 4 * P), clients, owners, st.booleans()),
    st.tuples(st.sampled_from(["seal", "seal", "abort", "pin", "pin"]), ids, clients),
    st.tuples(st.just("release"), ids, clients, st.integers(1, 3)),
    st.tuples(st.just("free"), ids),
    st.tuples(st.just("drop"), clients),
    st.tuples(st.just("wait"), ids, st.integers(0, 2)),
    # Several steps that lead where single ones seldom do: cached copies, and readers of an older generation.
    st.tuples(st.just("make"), ids, st.integers(0, 3 * P), clients, st.booleans()),
    st.tuples(st.just("renew"), ids, clients),
)


class Generation:
    def __init__(self, object_id: bytes, offset: int, size: int, creator: bytes, primary: bool) -> None:
        self.object_id, self.offset, self.size = object_id, offset, size
        self.creator, self.primary = creator, primary
        self.sealed = False
        self.current = True
        self.pins = Counter[bytes]({creator: 1})
        self.cached_at = 0.0

    @property
    def pages(self) -> range:
        return range(self.offset // P, (self.offset + self.size + P - 1) // P)

    @property
    def cached(self) -> bool:
        return self.sealed and self.current and not self.primary and not self.pins.total()


class Twin:
    def __init__(self) -> None:
        self.table = ObjectTable(CAPACITY * P)
        self.live: list[Generation] = []
        self.releases = Counter[tuple[bytes, bytes]]()
        self.waiting: dict[bytes, list[int]] = {}
        self.step = 0

    def current(self, object_id: bytes) -> Generation | None:
        return next((one for one in self.live if one.object_id == object_id and one.current), None)

    def writing(self, object_id: bytes, client: bytes) -> Generation | None:
        return next(
            (one for one in self.live if one.object_id == object_id and one.creator == client and not one.sealed), None
        )

    def sweep(self) -> None:
        self.live = [one for one in self.live if one.current or one.pins.total()]

    def woken(self, object_id: bytes) -> list[int]:
        return self.waiting.pop(object_id, [])

    def longest_gap(self) -> int:
        pages = bytearray(CAPACITY)
        for one in self.live:
            for page in one.pages:
                pages[page] = 1
        return max(len(gap) for gap in bytes(pages).split(b"\x01"))

    def unpin(self, one: Generation, client: bytes) -> None:
        del one.pins[client]
        one.cached_at = self.step

    def create(self, object_id: bytes, size: int, client: bytes, owner: bytes, primary: bool) -> None:
        found = self.current(object_id)
        result = self.table.create(object_id, size, client, owner, primary)
        if found is not None and found.sealed:
            assert result == Exists(found.offset, found.size)
            found.primary |= primary
            return
        mine = self.writing(object_id, client)
        if mine is not None:
            self.live.remove(mine)
        assert isinstance(result, Created | Full)
        cached = sorted((one for one in self.live if one.cached), key=lambda one: one.cached_at)
        assert list(result.evicted) == [one.object_id for one in cached[: len(result.evicted)]], "not the least recent"
        pages = (size + P - 1) // P
        for one in cached[: len(result.evicted)]:
            assert self.longest_gap() < pages, "evicted though there was room"
            self.live.remove(one)
        if isinstance(result, Full):
            assert self.longest_gap() < pages
            free = CAPACITY - sum(len(one.pages) for one in self.live)
            left = cached[len(result.evicted) :]
            assert not left or free + sum(len(one.pages) for one in left) < pages, "refused though room can be made"
            return
        if (older := self.current(object_id)) is not None:
            older.current = False
        new = Generation(object_id, result.offset, size, client, primary)
        assert all(set(new.pages).isdisjoint(one.pages) for one in self.live), "two objects in one place"
        assert not new.pages or new.pages[-1] < CAPACITY
        self.live.append(new)

    def release(self, object_id: bytes, client: bytes, n: int) -> None:
        pinned = [one for one in self.live if one.object_id == object_id and one.sealed and one.pins[client]]
        released = self.releases[object_id, client] + n
        held = sum(one.pins[client] for one in pinned)
        if released > held:
            with pytest.raises(StoreError):
                self.table.release(object_id, client, n)
            return
        self.table.release(object_id, client, n)
        if released == held:
            for one in pinned:
                self.unpin(one, client)
            released = 0
        elif len(pinned) == 1:
            pinned[0].pins[client] -= n
            released = 0
        self.releases[object_id, client] = released

    def apply(self, event: tuple[Any, ...]) -> None:
        self.step += 1
        match event:
            case ("create", object_id, size, client, owner, primary):
                self.create(object_id, size, client, owner, primary)
            case ("seal", object_id, client):
                one = self.writing(object_id, client)
                if one is None:
                    with pytest.raises(StoreError):
                        self.table.seal(object_id, client)
                    return
                one.sealed = True
                assert self.table.seal(object_id, client) == (self.woken(object_id) if one.current else [])
            case ("abort", object_id, client):
                one = self.writing(object_id, client)
                if one is None:
                    with pytest.raises(StoreError):
                        self.table.abort(object_id, client)
                    return
                self.table.abort(object_id, client)
                self.live.remove(one)
            case ("pin", object_id, client):
                one = self.current(object_id)
                result = self.table.pin(object_id, client)
                if one is None:
                    assert result is None
                elif not one.sealed:
                    assert result is UNSEALED
                else:
                    assert result == Place(one.offset, one.size)
                    one.pins[client] += 1
            case ("release", object_id, client, n):
                self.release(object_id, client, n)
            case ("free", object_id):
                assert self.table.free(object_id) == self.woken(object_id)
                if (one := self.current(object_id)) is not None:
                    one.current = False
            case ("drop", client):
                dropped = self.table.drop_client(client)
                pinned = [one for one in self.live if one.pins[client]]
                assert Counter(dropped.aborted) == Counter(one.object_id for one in pinned if not one.sealed)
                assert Counter(dropped.released) == Counter(one.object_id for one in pinned if one.sealed)
                order = {object_id: index for index, object_id in enumerate(dropped.released)}
                for one in pinned:
                    self.unpin(one, client)
                    one.cached_at = self.step + order.get(one.object_id, 0) / 100
                    one.current &= one.sealed
                for object_id in (b"x", b"y", b"z"):
                    self.releases.pop((object_id, client), None)
            case ("make", object_id, size, client, primary):
                self.apply(("create", object_id, size, client, b"o", primary))
                self.apply(("seal", object_id, client))
                self.apply(("release", object_id, client, 1))
            case ("renew", object_id, client):
                self.apply(("pin", object_id, client))
                self.apply(("free", object_id))
                self.apply(("make", object_id, P, b"a", True))
                self.apply(("pin", object_id, client))
            case ("wait", object_id, token):
                one = self.current(object_id)
                waits = one is None or not one.sealed
                assert self.table.wait_for(object_id, token) == waits
                if waits and token not in self.waiting.setdefault(object_id, []):
                    self.waiting[object_id].append(token)
        self.sweep()

    def check(self) -> None:
        self.table.check()
        rows = sorted((row.object_id, row.size, row.state, sorted(row.pins.items())) for row in self.table.rows())
        twin = sorted(
            (
                one.object_id,
                one.size,
                "freed" if not one.current else "sealed" if one.sealed else "creating",
                sorted((+one.pins).items()),
            )
            for one in self.live
        )
        assert rows == twin
        stats = self.table.stats()
        assert stats.used_bytes == sum(len(one.pages) for one in self.live) * P
        assert stats.evictable_bytes == sum(len(one.pages) for one in self.live if one.cached) * P


@settings(max_examples=4 * settings().max_examples)
@given(st.lists(events, min_size=20, max_size=80))
def test_like_a_list_of_generations(sequence: list[tuple[Any, ...]]) -> None:
    twin = Twin()
    for event in sequence:
        twin.apply(event)
        twin.check()
    for client in (b"a", b"b", b"c"):
        twin.apply(("drop", client))
    for object_id in (b"x", b"y", b"z"):
        twin.apply(("free", object_id))
    twin.check()
    stats = twin.table.stats()
    assert stats.used_bytes == stats.objects == stats.freed_objects == 0
    assert stats.biggest_free_bytes == stats.capacity_bytes
