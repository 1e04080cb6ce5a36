"""The allocator against a naive twin: an array with one entry for each page."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from ftray.store.allocator import Allocator

PAGES = 48
ALIGNMENT = 64


def longest_gap(pages: bytearray) -> int:
    return max(len(gap) for gap in bytes(pages).split(b"\x01"))


def gap_around(pages: bytearray, start: int) -> int:
    """Length of the run of free pages that begins at or before `start`."""
    first = start
    while first and not pages[first - 1]:
        first -= 1
    last = start
    while last < len(pages) and not pages[last]:
        last += 1
    return last - first


@settings(max_examples=2 * settings().max_examples)
@given(st.lists(st.one_of(st.integers(1, 20 * ALIGNMENT), st.integers(-60, 0)), min_size=20, max_size=120))
def test_like_an_array_of_pages(steps: list[int]) -> None:
    """A positive step allocates that many bytes; another frees one of the live blocks."""
    allocator = Allocator(PAGES * ALIGNMENT, ALIGNMENT)
    pages = bytearray(PAGES)
    touched = 0
    live: list[tuple[int, int]] = []
    for step in steps:
        if step > 0:
            count = -(-step // ALIGNMENT)
            warm_gap = longest_gap(pages[:touched])
            offset = allocator.allocate(step)
            if offset is None:
                assert longest_gap(pages) < count, "refused although a block fits"
                continue
            start, rest = divmod(offset, ALIGNMENT)
            assert rest == 0
            assert not any(pages[start : start + count]), "given out twice"
            assert start + count <= PAGES
            if warm_gap >= count:
                assert start + count <= touched, "untouched pages used although warm ones fit"
            if start + count <= touched:
                gaps = [len(gap) for gap in bytes(pages[:touched]).split(b"\x01")]
                best = min(gap for gap in gaps if gap >= count)
                assert gap_around(pages[:touched], start) == best, "not the best fit"
            pages[start : start + count] = b"\x01" * count
            touched = max(touched, start + count)
            live.append((start, count))
        elif live:
            start, count = live.pop(-step % len(live))
            allocator.free(start * ALIGNMENT)
            pages[start : start + count] = bytes(count)
        allocator.check()
        assert allocator.used_bytes == sum(pages) * ALIGNMENT
        assert allocator.free_bytes == (PAGES - sum(pages)) * ALIGNMENT
        assert allocator.biggest_free_bytes == longest_gap(pages) * ALIGNMENT
        assert allocator.warm_bytes == touched * ALIGNMENT
    for start, _ in live:
        allocator.free(start * ALIGNMENT)
    assert allocator.used_bytes == 0
    assert allocator.biggest_free_bytes == allocator.capacity_bytes
