"""What the demo counts: words and identifiers of source files.

Role: pure. The distributed job and the plain computation that checks it use these same functions; what differs is
everything between them.

Rules: results depend on the bytes alone, not on the process: words go to partitions by CRC, since `hash` of a string
is another in each interpreter. A file that cannot be tokenised to its end counts up to the place where that shows.

Rejected: identifiers by regular expression (finds them in strings and comments too).
"""

from __future__ import annotations

import io
import keyword
import re
import tokenize
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence

_WORD = re.compile(r"[^\W\d_]+")


class Counts:
    """Words (lower case) and identifiers with how often they occur, and the size of what was counted."""

    __slots__ = ("files", "identifiers", "size_bytes", "words")

    def __init__(self) -> None:
        self.words: Counter[str] = Counter()
        self.identifiers: Counter[str] = Counter()
        self.files = 0
        self.size_bytes = 0

    def add_source(self, source: bytes) -> None:
        """Counts one source file."""
        self.words.update(words(source))
        self.identifiers.update(identifiers(source))
        self.files += 1
        self.size_bytes += len(source)

    def merge(self, other: Counts) -> None:
        """Adds what another one has counted."""
        self.words.update(other.words)
        self.identifiers.update(other.identifiers)
        self.files += other.files
        self.size_bytes += other.size_bytes

    def split(self, partitions: int) -> list[Counts]:
        """The same in parts, each word in the part that is its own; the sizes stay with the first part."""
        parts = [Counts() for _ in range(partitions)]
        for word, count in self.words.items():
            parts[partition_of(word, partitions)].words[word] = count
        for name, count in self.identifiers.items():
            parts[partition_of(name, partitions)].identifiers[name] = count
        parts[0].files = self.files
        parts[0].size_bytes = self.size_bytes
        return parts


def merged(parts: Iterable[Counts]) -> Counts:
    """The sum of all parts."""
    total = Counts()
    for part in parts:
        total.merge(part)
    return total


def words(source: bytes) -> list[str]:
    """Runs of letters, in lower case, in the order of the text."""
    return _WORD.findall(source.decode(_encoding(source), "replace").lower())


def identifiers(source: bytes) -> list[str]:
    """The names in Python source that are not keywords, in the order of the text."""
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer tokenisers warn of what they read
        try:
            for token in tokenize.tokenize(io.BytesIO(source).readline):
                if token.type == tokenize.NAME and not keyword.iskeyword(token.string):
                    found.append(token.string)
        except (tokenize.TokenError, SyntaxError, UnicodeError):
            pass  # the library has files that are wrong on purpose
    return found


def _encoding(source: bytes) -> str:
    try:
        return tokenize.detect_encoding(io.BytesIO(source).readline)[0]
    except SyntaxError:
        return "utf-8"


def partition_of(word: str, partitions: int) -> int:
    """The partition of a word, the same in every process."""
    return zlib.crc32(word.encode("utf-8", "surrogatepass")) % partitions


def top(counter: Counter[str], count: int) -> list[tuple[str, int]]:
    """The most frequent entries; those that occur equally often by name."""
    return sorted(counter.items(), key=lambda item: (-item[1], item[0]))[:count]


def differences(found: Counts, expected: Counts, most: int = 10) -> list[str]:
    """What of `found` is not as in `expected`, one line each, `most` at the most and a line with how many more."""
    lines = []
    for what, ours, plain in (
        ("word", found.words, expected.words),
        ("identifier", found.identifiers, expected.identifiers),
    ):
        for name in sorted(ours.keys() | plain.keys()):
            if ours[name] != plain[name]:
                lines.append(f"{what} {name!r}: {ours[name]} times in the job, {plain[name]} times in the check")
    for what, left, right in (
        ("files", found.files, expected.files),
        ("bytes", found.size_bytes, expected.size_bytes),
    ):
        if left != right:
            lines.append(f"{what}: {left} in the job, {right} in the check")
    if len(lines) > most:
        lines[most:] = [f"and {len(lines) - most} more"]
    return lines


def chunks(files: Sequence[tuple[str, int]], size_bytes: int) -> list[list[str]]:
    """Paths of (path, size) in groups of about `size_bytes`, in order; no group is empty."""
    groups: list[list[str]] = []
    filled = size_bytes
    for path, size in files:
        if filled >= size_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(path)
        filled += size
    return groups
