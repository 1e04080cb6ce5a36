"""Lines of workers' output do not depend on how the stream was cut into reads."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ftray.raylet.logs import MARKER, LineSplitter


@given(
    st.lists(
        st.one_of(
            st.binary(max_size=20).map(lambda data: data.replace(b"\x01", b"") + b"\n"),
            st.sampled_from([MARKER + b"one\n", MARKER + b"two\n"]),
        ),
        max_size=20,
    ),
    st.lists(st.integers(0, 400), max_size=10),
)
def test_it_does_not_matter_how_the_stream_is_cut(parts: list[bytes], cuts: list[int]) -> None:
    data = b"".join(parts)
    whole = LineSplitter()
    expected = whole.feed(data) + whole.finish()
    splitter = LineSplitter()
    found = []
    start = 0
    for cut in [*sorted(cuts), len(data)]:
        if cut > start:
            found += splitter.feed(data[start:cut])
            start = cut
    assert found + splitter.finish() == expected
