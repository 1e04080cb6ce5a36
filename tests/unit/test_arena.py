"""The arena: shared memory, read-only views, and knowing when the last of them is gone."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest

from ftray.store.arena import Arena

P = 4096


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena.create(16 * P)
    yield arena
    arena.close()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_what_is_written_is_read(arena: Arena) -> None:
    released: deque[int] = deque()
    arena.write_view(2 * P, 5)[:] = b"hello"
    view = arena.read_view(2 * P, 5, partial(released.append, 1))
    assert bytes(view) == b"hello"
    assert len(view) == 5
    arena.write_view(2 * P, 5)[:1] = b"j"
    assert bytes(view) == b"jello", "the reader has a copy"
    assert not released


def test_readers_can_not_write(arena: Arena) -> None:
    view = arena.read_view(0, 80, lambda: None)
    assert view.readonly
    with pytest.raises(TypeError):
        view[0] = 1
    array = np.frombuffer(view, dtype=np.float64)
    assert not array.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1
    with pytest.raises(ValueError, match="WRITEABLE"):
        array.flags.writeable = True


def test_the_callback_comes_with_the_last_of_all_views(arena: Arena) -> None:
    released: deque[int] = deque()
    arena.write_view(P, 800)[:] = np.arange(100.0).tobytes()
    view = arena.read_view(P, 800, partial(released.append, 7))
    array = np.frombuffer(view, dtype=np.float64)
    del view
    part = array[10:20].reshape(2, 5)
    bytes_of_part = part.data[:1]
    del array
    assert part[1, 4] == 19.0
    assert arena.live_maps == 1
    del part
    assert not released
    del bytes_of_part
    assert list(released) == [7]
    assert arena.live_maps == 0


def test_a_view_in_a_cycle_tells_when_it_is_collected(arena: Arena) -> None:
    released: deque[int] = deque()
    cycle: list[object] = [arena.read_view(0, 10, partial(released.append, 1))]
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert list(released) == [1]


def test_many_views_of_one_object_tell_one_by_one(arena: Arena) -> None:
    released: deque[int] = deque()
    views = [arena.read_view(P, 10, partial(released.append, number)) for number in range(3)]
    del views[1]
    assert list(released) == [1]
    views.clear()
    assert sorted(released) == [0, 1, 2]


def test_empty_objects_have_nothing_to_release(arena: Arena) -> None:
    released: deque[int] = deque()
    view = arena.read_view(0, 0, partial(released.append, 1))
    assert len(view) == 0
    assert view.readonly
    assert list(released) == [1]
    assert len(arena.write_view(0, 0)) == 0


def test_offsets_need_not_be_aligned(arena: Arena) -> None:
    arena.write_view(P + 100, 3)[:] = b"abc"
    released: deque[int] = deque()
    view = arena.read_view(P + 100, 3, partial(released.append, 1))
    assert bytes(view) == b"abc"
    assert view.readonly
    del view
    assert list(released) == [1]


@pytest.mark.parametrize(("offset", "size"), [(-1, 1), (0, -1), (16 * P, 1), (0, 16 * P + 1), (1 << 60, 1)])
def test_nothing_outside_of_the_arena(arena: Arena, offset: int, size: int) -> None:
    with pytest.raises(ValueError, match="outside"):
        arena.write_view(offset, size)
    with pytest.raises(ValueError, match="outside"):
        arena.read_view(offset, size, lambda: None)


def test_past_the_number_of_maps_there_are_copies(arena: Arena) -> None:
    arena.maps_max = 2
    arena.write_view(0, 3)[:] = b"abc"
    released: deque[int] = deque()
    views = [arena.read_view(0, 3, partial(released.append, number)) for number in range(3)]
    assert list(released) == [2]
    assert [bytes(view) for view in views] == [b"abc"] * 3
    assert all(view.readonly for view in views)
    del views[0]
    views.append(arena.read_view(0, 3, partial(released.append, 3)))
    assert list(released) == [2, 0]


def test_when_the_system_refuses_a_map_there_is_a_copy(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    arena.write_view(0, 3)[:] = b"abc"

    def refuse(*_: object, **__: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("ftray.store.arena._ReadMap", refuse)
    released: deque[int] = deque()
    assert bytes(arena.read_view(0, 3, partial(released.append, 1))) == b"abc"
    assert list(released) == [1]


def test_the_size_is_whole_pages_and_sealed() -> None:
    arena = Arena.create(P + 1)
    assert arena.size_bytes == 2 * P
    with pytest.raises(OSError):
        os.ftruncate(arena.fd, P)
    with pytest.raises(OSError):
        os.ftruncate(arena.fd, 3 * P)
    arena.close()
    with pytest.raises(ValueError, match="can't have 0 bytes"):
        Arena.create(0)


def test_other_processes_see_the_same_memory(arena: Arena) -> None:
    opened = Arena.open(os.getpid(), arena.fd, arena.size_bytes)
    inherited = Arena.inherited(os.dup(arena.fd), arena.size_bytes)
    arena.write_view(0, 1)[:] = b"x"
    for other in (opened, inherited):
        assert bytes(other.read_view(0, 1, lambda: None)) == b"x"
    opened.write_view(P, 1)[:] = b"y"
    assert bytes(arena.read_view(P, 1, lambda: None)) == b"y"
    opened.close()
    inherited.close()


def test_what_is_not_the_arena_announced_is_refused(arena: Arena) -> None:
    before = descriptors()
    with pytest.raises(ValueError, match="was announced"):
        Arena.open(os.getpid(), arena.fd, arena.size_bytes + 1)
    with pytest.raises(OSError):
        Arena.open(os.getpid(), 9_999, P)
    with pytest.raises(OSError):
        Arena.inherited(9_999, P)
    assert descriptors() == before


def test_closing_leaves_views_alive_and_no_descriptors() -> None:
    before = descriptors()
    arena = Arena.create(4 * P)
    released: deque[int] = deque()
    writer = arena.write_view(0, 3)
    writer[:] = b"abc"
    reader = arena.read_view(0, 3, partial(released.append, 1))
    arena.close()
    arena.close()
    assert arena.fd == -1
    assert bytes(reader) == b"abc"
    writer[:1] = b"x"
    assert bytes(reader) == b"xbc"
    with pytest.raises(ValueError, match="closed"):
        arena.read_view(0, 1, lambda: None)
    with pytest.raises(ValueError, match="closed"):
        arena.write_view(0, 1)
    del reader, writer
    assert list(released) == [1]
    assert descriptors() == before


AT_EXIT = """
import sys
from collections import deque
import numpy as np
from ftray.store.arena import Arena

arena = Arena.create(1 << 20)
released = deque()
view = arena.read_view(0, 800, lambda: released.append(1))
array = np.frombuffer(arena.read_view(4096, 800, lambda: released.append(2)), dtype=np.float64)
cycle = [arena.read_view(8192, 8, lambda: released.append(3))]
cycle.append(cycle)
writer = arena.write_view(0, 8)
sys.modules["kept"] = array
print("alive", arena.live_maps)
"""


def test_no_complaints_at_exit_with_views_alive() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", AT_EXIT],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "alive 3\n", "")
