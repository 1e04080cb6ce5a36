"""The allocator of the arena: best fit, warm first, neighbours merged."""

from __future__ import annotations

import sys

import pytest

from ftray.store.allocator import PAGE_BYTES, Allocator, AllocatorError

P = PAGE_BYTES


def taken(allocator: Allocator, size: int) -> int:
    offset = allocator.allocate(size)
    assert offset is not None
    return offset


def test_sizes_are_rounded_up_to_pages() -> None:
    allocator = Allocator(10 * P + 17)
    assert allocator.capacity_bytes == 10 * P
    assert taken(allocator, 1) == 0
    assert taken(allocator, P + 1) == P
    assert allocator.used_bytes == 3 * P
    assert allocator.free_bytes == 7 * P
    assert allocator.rounded(P + 1) == 2 * P
    assert allocator.allocate(7 * P + 1) is None
    assert taken(allocator, 7 * P) == 3 * P
    assert allocator.allocate(1) is None
    assert allocator.biggest_free_bytes == 0
    assert sorted(allocator.blocks()) == [(0, P), (P, 2 * P), (3 * P, 7 * P)]
    allocator.check()


def test_the_smallest_block_that_fits_is_taken() -> None:
    allocator = Allocator(100 * P)
    large, _, small, _ = (taken(allocator, pages * P) for pages in (8, 1, 3, 1))
    allocator.free(large)
    allocator.free(small)
    assert taken(allocator, 2 * P) == small
    assert taken(allocator, 4 * P) == large
    assert allocator.warm_bytes == 13 * P
    allocator.check()


def test_of_equal_blocks_the_one_freed_last_is_taken() -> None:
    allocator = Allocator(100 * P)
    offsets = [taken(allocator, P) for _ in range(6)]
    for index in (4, 0, 2):
        allocator.free(offsets[index])
    assert [taken(allocator, P) for _ in range(3)] == [offsets[2], offsets[0], offsets[4]]


def test_untouched_space_comes_last() -> None:
    allocator = Allocator(100 * P)
    first = taken(allocator, 10 * P)
    taken(allocator, P)
    allocator.free(first)
    assert taken(allocator, P) == first
    assert allocator.warm_bytes == 11 * P
    # Nothing warm fits: the block goes above the mark.
    assert taken(allocator, 10 * P) == 11 * P
    assert allocator.warm_bytes == 21 * P


def test_a_free_block_at_the_mark_is_extended() -> None:
    allocator = Allocator(100 * P)
    taken(allocator, P)
    last = taken(allocator, 4 * P)
    allocator.free(last)
    assert taken(allocator, 6 * P) == last
    assert allocator.warm_bytes == 7 * P
    allocator.free(last)
    assert allocator.biggest_free_bytes == 99 * P
    assert taken(allocator, 99 * P) == last
    allocator.check()


def test_neighbours_become_one_block() -> None:
    allocator = Allocator(8 * P)
    offsets = [taken(allocator, 2 * P) for _ in range(4)]
    for index in (0, 2, 1, 3):
        allocator.free(offsets[index])
        allocator.check()
    assert allocator.used_bytes == 0
    assert taken(allocator, 8 * P) == 0


@pytest.mark.parametrize("size", [0, -1])
def test_sizes_that_are_not_positive_are_refused(size: int) -> None:
    with pytest.raises(AllocatorError):
        Allocator(P).allocate(size)


@pytest.mark.parametrize("offset", [0, 1, P, 2 * P, -P, 100 * P])
def test_offsets_that_were_not_given_out_are_refused(offset: int) -> None:
    allocator = Allocator(8 * P)
    freed = taken(allocator, P)
    taken(allocator, 2 * P)
    allocator.free(freed)
    if offset != P:
        with pytest.raises(AllocatorError, match="is not allocated"):
            allocator.free(offset)
    with pytest.raises(AllocatorError):
        Allocator(P - 1)
    assert allocator.used_bytes == 2 * P
    allocator.check()


def test_sizes_are_found_across_the_words_of_the_index() -> None:
    allocator = Allocator((1 << 40) + 5)
    sizes = [1, 63, 64, 16383, 16384, 16385, 1 << 20, (1 << 24) + 1]
    offsets = {}
    for pages in sizes:
        offsets[pages] = taken(allocator, pages * P)
        taken(allocator, P)
    for pages in sizes:
        allocator.free(offsets[pages])
    for pages in reversed(sizes):
        assert taken(allocator, pages * P) == offsets[pages]
        allocator.free(offsets[pages])
    assert taken(allocator, 16386 * P) == offsets[1 << 20]
    assert taken(allocator, 2 * P) == offsets[63]
    allocator.check()


def test_the_work_does_not_grow_with_the_number_of_blocks() -> None:
    def calls(blocks: int) -> int:
        allocator = Allocator(1 << 40)
        offsets = [taken(allocator, (number % 97 + 1) * P) for number in range(blocks)]
        for offset in offsets[::2]:
            allocator.free(offset)
        counter = 0

        def count(*_: object) -> None:
            nonlocal counter
            counter += 1

        sys.setprofile(count)
        try:
            for number in range(50):
                allocator.free(taken(allocator, (number + 1) * P))
        finally:
            sys.setprofile(None)
        return counter

    assert calls(20_000) <= calls(200) * 1.5
