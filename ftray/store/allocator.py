"""Where objects lie in the arena: a best-fit allocator that keeps to memory already touched.

Role: pure. It hands out ranges of offsets; it never sees the memory.

Rules:
- Sizes are rounded up to whole pages, so that each object can be mapped by itself.
- **Warm first.** The first touch of a page of shared memory costs twenty times more than a copy into it. Everything
  below the high-water mark has been given out before and counts as warm. An allocation goes above the mark only if no
  free block below fits, and then takes a free block that ends at the mark along, to touch as little as possible.
- Of warm blocks the smallest that fits is taken; of equal ones the one freed last, whose bytes are the likeliest to be
  in the processor's cache.
- Neighbouring free blocks are one block, always: fragmentation never outlives what caused it.

Free blocks are found by their size through a bitmap in two levels (integers as bit sets), each about the square root of
the arena's pages wide: 2 KB for a terabyte. Each operation is a few dictionary steps and shifts, whatever the number of
blocks.

Rejected: a sorted list of blocks (moving its tail at each change is linear, and felt with 100,000 blocks); size classes
of powers of two (half of a large block lost, where objects are gigabytes); a buddy system (the same, and it can't merge
odd neighbours).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

PAGE_BYTES: Final = 4096


class AllocatorError(ValueError):
    """A size or an offset that makes no sense: freed twice, never given out, not positive. Nothing was changed."""


class Allocator:
    """Ranges of `capacity_bytes`, in multiples of `alignment` bytes.

    What does not fill a whole `alignment` at the end of the arena is not used. Raises AllocatorError for a capacity
    below one `alignment`, or an alignment that is not positive.
    """

    __slots__ = (
        "alignment", "capacity_bytes", "_ends", "_free", "_mark", "_pages", "_shift", "_sizes", "_top", "_used",
        "_used_pages", "_words",
    )  # fmt: skip

    def __init__(self, capacity_bytes: int, alignment: int = PAGE_BYTES) -> None:
        if alignment <= 0 or capacity_bytes < alignment:
            raise AllocatorError(f"an arena of {capacity_bytes} bytes has no room for one block of {alignment}")
        self.alignment = alignment
        self._pages = capacity_bytes // alignment
        self.capacity_bytes = self._pages * alignment
        self._used: dict[int, int] = {}
        """Pages of each block given out, by its first page."""
        self._used_pages = 0
        self._mark = 0
        """The first page never given out."""
        self._free: dict[int, int] = {}
        """Pages of each free block below the mark, by its first page."""
        self._ends: dict[int, int] = {}
        """The first page of each free block, by the page after its last."""
        self._sizes: dict[int, dict[int, None]] = {}
        """The first pages of free blocks of each size; the last was freed last."""
        self._shift = max(6, self._pages.bit_length() // 2)
        self._words: dict[int, int] = {}
        """Bit sets of the sizes in use, `1 << _shift` sizes to a word."""
        self._top = 0
        """Bit set of the words that are not empty."""

    # --- operations --------------------------------------------------------------------------------------------------

    def allocate(self, size: int) -> int | None:
        """The offset of `size` bytes, rounded up to pages, or None if no block is large enough.

        Raises AllocatorError for a size that is not positive.
        """
        if size <= 0:
            raise AllocatorError(f"can't allocate {size} bytes")
        pages = -(-size // self.alignment)
        found = self._smallest(pages)
        if found:
            start = next(reversed(self._sizes[found]))
            self._remove(start, found)
            if found > pages:
                self._insert(start + pages, found - pages)
        else:
            start = self._ends.get(self._mark, self._mark)
            if pages > self._pages - start:
                return None
            if start != self._mark:
                self._remove(start, self._mark - start)
            self._mark = start + pages
        self._used[start] = pages
        self._used_pages += pages
        return start * self.alignment

    def free(self, offset: int) -> None:
        """Gives back what `allocate` returned. Raises AllocatorError, and changes nothing, for any other offset."""
        start, rest = divmod(offset, self.alignment)
        pages = 0 if rest else self._used.pop(start, 0)
        if not pages:
            raise AllocatorError(f"offset {offset} is not allocated")
        self._used_pages -= pages
        before = self._ends.get(start)
        after = self._free.get(start + pages)
        if after is not None:
            self._remove(start + pages, after)
            pages += after
        if before is not None:
            self._remove(before, start - before)
            pages += start - before
            start = before
        self._insert(start, pages)

    # --- what there is -----------------------------------------------------------------------------------------------

    @property
    def used_bytes(self) -> int:
        """Bytes given out, in whole pages."""
        return self._used_pages * self.alignment

    @property
    def free_bytes(self) -> int:
        """Bytes not given out, in however many blocks."""
        return (self._pages - self._used_pages) * self.alignment

    @property
    def warm_bytes(self) -> int:
        """Bytes below the high-water mark: given out at least once."""
        return self._mark * self.alignment

    @property
    def biggest_free_bytes(self) -> int:
        """The largest size that `allocate` would not refuse."""
        biggest = self._pages - self._ends.get(self._mark, self._mark)
        if self._top:
            word = self._top.bit_length() - 1
            biggest = max(biggest, (word << self._shift) + self._words[word].bit_length() - 1)
        return biggest * self.alignment

    def rounded(self, size: int) -> int:
        """What `size` bytes take up."""
        return -(-size // self.alignment) * self.alignment

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Offset and size in bytes of each block given out, in no order."""
        for start, pages in self._used.items():
            yield start * self.alignment, pages * self.alignment

    def check(self) -> None:
        """Raises AssertionError if the books are not consistent. Linear; for tests and simulation."""
        page, free_before = 0, False
        for start, pages, free in sorted(
            [(start, pages, False) for start, pages in self._used.items()]
            + [(start, pages, True) for start, pages in self._free.items()]
        ):
            assert start == page, f"pages {page} to {start} belong to nobody or to two"
            assert pages > 0, f"an empty block at page {start}"
            assert not (free and free_before), f"free neighbours at page {start} are not one block"
            page, free_before = start + pages, free
        assert page == self._mark <= self._pages, f"blocks end at page {page}, the mark is {self._mark}"
        assert self._used_pages == sum(self._used.values())
        assert self._ends == {start + pages: start for start, pages in self._free.items()}
        by_size: dict[int, set[int]] = {}
        for start, pages in self._free.items():
            by_size.setdefault(pages, set()).add(start)
        assert {pages: set(starts) for pages, starts in self._sizes.items()} == by_size
        words: dict[int, int] = {}
        for pages in by_size:
            word = pages >> self._shift
            words[word] = words.get(word, 0) | 1 << (pages & (1 << self._shift) - 1)
        assert words == self._words
        assert self._top == sum(1 << word for word in words)

    # --- the index by size -------------------------------------------------------------------------------------------

    def _smallest(self, pages: int) -> int:
        """The smallest size of a free block of at least `pages`, or 0."""
        word, bit = pages >> self._shift, pages & (1 << self._shift) - 1
        bits = self._words.get(word, 0) >> bit
        if bits:
            return pages + (bits & -bits).bit_length() - 1
        words = self._top >> word + 1
        if not words:
            return 0
        word += (words & -words).bit_length()
        bits = self._words[word]
        return (word << self._shift) + (bits & -bits).bit_length() - 1

    def _insert(self, start: int, pages: int) -> None:
        self._free[start] = pages
        self._ends[start + pages] = start
        starts = self._sizes.get(pages)
        if starts is not None:
            starts[start] = None
            return
        self._sizes[pages] = {start: None}
        word = pages >> self._shift
        bits = self._words.get(word, 0)
        self._words[word] = bits | 1 << (pages & (1 << self._shift) - 1)
        if not bits:
            self._top |= 1 << word

    def _remove(self, start: int, pages: int) -> None:
        del self._free[start]
        del self._ends[start + pages]
        starts = self._sizes[pages]
        del starts[start]
        if starts:
            return
        del self._sizes[pages]
        word = pages >> self._shift
        bits = self._words[word] & ~(1 << (pages & (1 << self._shift) - 1))
        if bits:
            self._words[word] = bits
        else:
            del self._words[word]
            self._top &= ~(1 << word)
