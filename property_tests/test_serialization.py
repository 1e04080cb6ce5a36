"""Any plain value, with arrays and references anywhere inside, comes back as it was; bad bytes are typed errors."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ftray.exceptions import SerializationError
from ftray.worker.serialization import (
    deserialize,
    deserialize_args,
    load_ref,
    note_ref,
    serialize,
    serialize_args,
)


class Ref:
    """Stands for ObjectRef."""

    def __init__(self, key: int) -> None:
        self.key = key

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ref) and other.key == self.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __repr__(self) -> str:
        return f"Ref({self.key})"

    def __reduce__(self) -> Any:
        note_ref(self)
        return load_ref, (self.key,)


class Box:
    def __init__(self, inside: Any) -> None:
        self.inside = inside


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(max_size=100)
refs = st.integers(0, 5).map(Ref)
arrays = st.lists(st.integers(-100, 100), max_size=40).map(lambda items: np.array(items, dtype="i4"))
large = st.integers(65_530, 65_540).map(bytes)
leaves = scalars | refs | arrays | st.binary(max_size=50).map(bytearray) | large


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return (
        st.lists(inner, max_size=20)
        | st.lists(inner, max_size=5).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=5)
        | inner.map(Box)
    )


trees = st.recursive(leaves, containers, max_leaves=15)


def same(left: Any, right: Any) -> bool:
    if type(left) is not type(right):
        return False
    if isinstance(left, np.ndarray):
        return left.dtype == right.dtype and left.shape == right.shape and bool((left == right).all())
    if isinstance(left, Box):
        return same(left.inside, right.inside)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    return bool(left == right)


def refs_in(value: Any) -> list[Ref]:
    """The naive twin of the capture: every reference in the order of pickling."""
    if isinstance(value, Ref):
        return [value]
    if isinstance(value, Box):
        return refs_in(value.inside)
    if isinstance(value, list | tuple):
        return [ref for item in value for ref in refs_in(item)]
    if isinstance(value, dict):
        return [ref for item in value.values() for ref in refs_in(item)]
    return []


@given(trees)
def test_values_come_back_with_their_references(value: Any) -> None:
    serialized = serialize(value)
    assert list(serialized.refs) == list(dict.fromkeys(refs_in(value)))
    data = serialized.to_bytes()
    assert len(data) == serialized.size
    target = memoryview(bytearray(serialized.size))
    serialized.write_into(target)
    assert target == data
    assert same(deserialize(target, Ref), value)


@given(st.lists(trees, max_size=6), st.dictionaries(st.text(max_size=5), trees, max_size=4))
def test_arguments_come_back_with_their_dependencies(args: list[Any], kwargs: dict[str, Any]) -> None:
    packed = serialize_args(tuple(args), kwargs, Ref)
    nested = [value for value in [*args, *kwargs.values()] if not isinstance(value, Ref)]
    assert list(packed.payload.refs) == list(dict.fromkeys(refs_in(nested)))
    positional, named = deserialize_args(packed.payload.to_bytes(), Ref)
    for where, ref in packed.deps:
        if isinstance(where, int):
            assert positional[where] is None
            positional[where] = ref
        else:
            assert named[where] is None
            named[where] = ref
    assert same(positional, args)
    assert same(named, kwargs)


@given(trees, st.data())
def test_damaged_bytes_are_a_value_or_a_typed_error(value: Any, data: st.DataObject) -> None:
    payload = serialize(value).to_bytes()
    end = data.draw(st.integers(0, max(0, len(payload) - 1)))
    try:
        deserialize(payload[:end], Ref)
    except SerializationError:
        pass
