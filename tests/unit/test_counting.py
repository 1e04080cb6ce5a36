"""What the demo counts (ftray/demo/counting.py)."""

from __future__ import annotations

from collections import Counter

import pytest

from ftray.demo.counting import (
    Counts,
    chunks,
    differences,
    identifiers,
    merged,
    partition_of,
    top,
    words,
)

SOURCE = b'''# A comment of words
def Total(items):
    """Sum of items."""
    return sum(items)
'''


def counts_of(*sources: bytes) -> Counts:
    counts = Counts()
    for source in sources:
        counts.add_source(source)
    return counts


def test_words_are_runs_of_letters_in_lower_case_wherever_they_stand() -> None:
    assert words(b"x1 = 'Ab cd_ef'  # AB") == ["x", "ab", "cd", "ef", "ab"]


def test_words_are_decoded_as_the_source_says() -> None:
    assert words("# coding: latin-1\n# Grüße".encode("latin-1")) == ["coding", "latin", "grüße"]
    assert words(b"# coding: no-such-encoding\n") == ["coding", "no", "such", "encoding"]
    assert words(b"\xff ok") == ["ok"]


def test_identifiers_are_names_that_are_not_keywords_strings_or_comments() -> None:
    assert identifiers(SOURCE) == ["Total", "items", "sum", "items"]


@pytest.mark.parametrize("source", [b"a = (b\n", b"a = 'b\nc = d\n", b"if a:\n  b\n c\n", b"a\0b\n", b"\xff\xfe"])
def test_source_that_cannot_be_tokenised_counts_up_to_there_and_the_same_each_time(source: bytes) -> None:
    assert identifiers(source) == identifiers(source)


def test_merging_and_splitting_lose_nothing() -> None:
    whole = counts_of(SOURCE, b"other = words + words\n")
    assert merged([counts_of(SOURCE), counts_of(b"other = words + words\n")]).words == whole.words
    parts = whole.split(3)
    again = merged(parts)
    assert not differences(again, whole)
    for number, part in enumerate(parts):
        assert {partition_of(word, 3) for word in [*part.words, *part.identifiers]} <= {number}


def test_the_partition_of_a_word_is_the_same_in_every_process() -> None:
    assert [partition_of(word, 4) for word in ("self", "é", "\udc80")] == [3, 2, 3]


def test_the_most_frequent_come_first_and_equals_by_name() -> None:
    assert top(Counter(b=2, a=2, c=3, d=1), 3) == [("c", 3), ("a", 2), ("b", 2)]


def test_differences_name_what_differs() -> None:
    found, expected = counts_of(b"a = b\n"), counts_of(b"a = b\n")
    assert differences(found, expected) == []
    found.words["a"] += 1
    found.identifiers["new"] = 2
    expected.files = 5
    assert differences(found, expected) == [
        "word 'a': 2 times in the job, 1 times in the check",
        "identifier 'new': 2 times in the job, 0 times in the check",
        "files: 1 in the job, 5 in the check",
    ]


def test_many_differences_are_cut_short_with_how_many_there_are() -> None:
    found = Counts()
    found.words.update(f"w{number}" for number in range(100, 125))
    lines = differences(found, Counts(), most=10)
    assert len(lines) == 11
    assert lines[-1] == "and 15 more"


def test_an_entry_with_count_zero_is_no_difference() -> None:
    found = Counts()
    found.words["a"] = 0
    assert differences(found, Counts()) == []


def test_chunks_keep_order_and_all_files_and_are_of_about_the_size() -> None:
    files = [(f"f{number}", 10 + number) for number in range(20)]
    groups = chunks(files, 50)
    assert [path for group in groups for path in group] == [path for path, _ in files]
    assert all(groups)
    sizes = dict(files)
    assert all(50 <= sum(sizes[path] for path in group) < 50 + 30 for group in groups[:-1])
    assert chunks([], 50) == []
    assert chunks([("big", 500), ("small", 1)], 50) == [["big"], ["small"]]
