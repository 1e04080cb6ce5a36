"""Values, arguments and functions: round trips, what goes out of band, references inside, and errors that say where."""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import logging
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ftray.exceptions import ForeignRefError, NotInitializedError, SerializationError
from ftray.worker import values
from ftray.worker.serialization import (
    EMPTY_ARGS,
    LARGE_BYTES,
    Serialized,
    deserialize,
    deserialize_args,
    load_ref,
    loading_refs,
    note_ref,
    serialize,
    serialize_args,
    serialize_function,
    set_default_ref_loader,
)

ROOT = Path(__file__).resolve().parents[2]


class Ref:
    """Stands for ObjectRef, whose pickling has the same form."""

    noted: list[bool] = []

    def __init__(self, key: int) -> None:
        self.key = key

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ref) and other.key == self.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __reduce__(self) -> Any:
        Ref.noted.append(note_ref(self))
        return load_ref, (self.key,)


class Holder:
    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)


@dataclasses.dataclass
class Point:
    x: int
    y: Any


def through(value: Any) -> Any:
    serialized = serialize(value)
    data = serialized.to_bytes()
    assert len(data) == serialized.size
    target = bytearray(b"\xee" * (serialized.size + 8))
    serialized.write_into(memoryview(target))
    assert bytes(target) == data + b"\xee" * 8
    return deserialize(memoryview(target)[: serialized.size])


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        None, True, 0, -(1 << 100), 1.5, "", "x" * 300, "\ud800", b"", b"abc", bytes(LARGE_BYTES), bytearray(b"ab"),
        bytearray(LARGE_BYTES), (), [], {}, set(), (1, "a", None), {"a": 1, 2: [3.0, (4,)]}, [[[[1]]]],
        list(range(1000)),
        {i: str(i) for i in range(50)}, frozenset((1, 2)), 1 + 2j, ..., Point(1, [2]), collections.OrderedDict(a=1),
        range(5), (b"x" * 100_000, 1),
    ],
    ids=lambda value: f"{type(value).__name__}",
)  # fmt: skip
def test_values_come_back_equal(value: Any) -> None:
    again = through(value)
    assert again == value
    assert type(again) is type(value)


def test_plain_values_are_plain_pickles() -> None:
    for value in (1, "a", [1, 2], Point(1, 2)):
        data = serialize(value).to_bytes()
        assert data[0] == 0x80
        assert pickle.loads(data) == value


@pytest.mark.parametrize("size", [0, 1, 10, 100_000])
@pytest.mark.parametrize("wrap", [lambda array: array, lambda array: {"a": [array, 1], "b": Holder(array=array)}])
def test_arrays_are_zero_copy_and_read_only(size: int, wrap: Any) -> None:
    array = np.arange(size, dtype="f8")
    serialized = serialize(wrap(array))
    assert len(serialized.buffers) == 1
    assert len(serialized.inband) < 1000
    data = serialized.to_bytes()
    again = deserialize(data)
    if isinstance(again, dict):
        assert again["b"].array is again["a"][0]
        again = again["a"][0]
    assert (again == array).all()
    assert not again.flags.writeable
    if size:
        start = again.__array_interface__["data"][0] - np.frombuffer(data, "u1").__array_interface__["data"][0]
        assert start % 64 == 0
        assert start < len(data)


def test_buffers_are_views_of_the_users_memory_until_written() -> None:
    array = np.zeros(1000)
    serialized = serialize(array)
    array[3] = 7
    assert deserialize(serialized.to_bytes())[3] == 7


@pytest.mark.parametrize(
    "array",
    [
        np.ones((30, 40))[:, 3], np.asfortranarray(np.ones((3, 4))), np.array(["a", "bc"]), np.array(2.0),
        np.array([1, "x", None], "O"), np.zeros(3, [("a", "i4"), ("b", "f8")]), np.zeros(3, "M8[s]"),
        np.ones((2, 3, 4))[::2, ::-1],
    ],
    ids=lambda array: str(array.dtype),
)  # fmt: skip
def test_all_kinds_of_arrays(array: Any) -> None:
    again = through(array)
    assert (again == array).all()
    assert again.dtype == array.dtype
    assert again.shape == array.shape
    if array.dtype.kind == "f":
        assert not again.flags.writeable


def test_numpy_scalars() -> None:
    for value in (np.float64(1.5), np.int32(3), np.bool_(True)):
        again = through(value)
        assert again == value
        assert type(again) is type(value)


def test_large_bytes_go_to_the_buffers() -> None:
    value = os.urandom(LARGE_BYTES)
    for kind in (bytes, bytearray):
        serialized = serialize(kind(value))
        assert len(serialized.inband) < 100
        assert serialized.buffers[0].nbytes == LARGE_BYTES
    deps = serialize_args((value,), {"k": value}, Ref)
    assert len(deps.payload.buffers) == 2
    assert deserialize_args(deps.payload.to_bytes()) == ([value], {"k": value})


def test_memoryviews_come_back_as_read_only_views() -> None:
    for value in (
        memoryview(b"abc"), memoryview(bytearray(100)), memoryview(b""), memoryview(np.ones((2, 3))),
        memoryview(np.ones((0, 3))), memoryview(b"abcdef")[::2],
    ):  # fmt: skip
        again = through({"v": [value]})["v"][0]
        assert type(again) is memoryview
        assert again.readonly
        assert again.format == value.format
        assert again.tobytes() == value.tobytes()
    assert through(memoryview(np.ones((2, 3)))).shape == (2, 3)
    data = serialize(memoryview(b"abc")).to_bytes()
    assert deserialize(data).obj is data  # not a copy
    assert bytes(through(memoryview(np.ones(2, ">f8")))) == np.ones(2, ">f8").tobytes()


def test_by_value_where_there_is_nothing_to_import() -> None:
    y = 3
    assert through(lambda x: x + y)(4) == 7

    class Local:
        def get(self) -> int:
            return y

    assert through(Local()).get() == 3
    assert through([Local])[0]().get() == 3


def test_numpy_is_not_imported_by_us() -> None:
    code = """
    import sys
    from ftray.worker.serialization import serialize, deserialize
    class C: pass
    assert deserialize(serialize({"a": [1, C()], "b": b"x" * 100000}).to_bytes())["a"][0] == 1
    assert "numpy" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, cwd=ROOT, timeout=30)


# --- payloads that are damaged or can't be read here ------------------------------------------------------------------


@pytest.mark.parametrize(
    "payload", [b"", b"\x01", b"\x00abc", b"\x80\x05", b"\x80\x05K", b"\x02" + bytes(40), b"\x01" + b"\xff" * 64]
)
def test_damaged_payloads_are_typed_errors(payload: bytes) -> None:
    for data in (payload, memoryview(payload)):
        with pytest.raises(SerializationError):
            deserialize(data)


def test_truncated_payloads_are_typed_errors() -> None:
    data = serialize({"a": np.arange(50), "b": np.arange(3)}).to_bytes()
    for end in range(0, len(data), 7):
        with pytest.raises(SerializationError):
            deserialize(data[:end])


class BadState:
    def __setstate__(self, state: Any) -> None:
        raise ValueError("bad state")

    def __getstate__(self) -> Any:
        return {"a": 1}


def test_a_setstate_that_raises_is_chained() -> None:
    with pytest.raises(SerializationError, match="ValueError: bad state") as caught:
        through(BadState())
    assert isinstance(caught.value.__cause__, ValueError)


# --- references -------------------------------------------------------------------------------------------------------


def test_references_inside_are_captured_once_in_order() -> None:
    first, second = Ref(1), Ref(2)
    serialized = serialize({"a": [second, first], "b": Holder(r=Ref(2)), "c": lambda: first})
    assert list(serialized.refs) == [second, first]
    assert serialize([1, 2]).refs == ()
    loaded = deserialize(serialized.to_bytes(), lambda key: ("loaded", key))
    assert loaded["a"] == [("loaded", 2), ("loaded", 1)]
    assert loaded["c"]() == ("loaded", 1)


def test_out_of_band_pickling_is_told_apart() -> None:
    Ref.noted.clear()
    pickle.dumps(Ref(1))
    assert Ref.noted == [False]
    serialize_function(functools.partial(print, Ref(1)))
    serialize(Ref(1))
    assert Ref.noted == [False, False, True]


class Nested:
    """Serialises another value while it is being serialised, as a `put` inside `__reduce__` does."""

    def __init__(self) -> None:
        self.inner: Serialized | None = None

    def __reduce__(self) -> Any:
        self.inner = serialize([Ref(5)])
        return Nested, ()


def test_nested_serialisation_keeps_references_apart() -> None:
    nested = Nested()
    serialized = serialize([Ref(1), nested, Ref(2)])
    assert list(serialized.refs) == [Ref(1), Ref(2)]
    assert nested.inner is not None
    assert list(nested.inner.refs) == [Ref(5)]


def test_context_is_left_after_errors_and_other_threads_have_their_own() -> None:
    with pytest.raises(SerializationError):
        serialize([Ref(1), threading.Lock()])
    assert note_ref(Ref(1)) is False

    class FromThread:
        def __reduce__(self) -> Any:
            thread = threading.Thread(target=lambda: Ref.noted.append(note_ref(Ref(9))))
            thread.start()
            thread.join()
            return int, ()

    Ref.noted.clear()
    assert serialize(FromThread()).refs == ()
    assert Ref.noted == [False]


def test_loaders_nest_and_fall_back_to_the_default() -> None:
    data = serialize(Ref(3)).to_bytes()
    with pytest.raises(NotInitializedError):
        deserialize(data)
    set_default_ref_loader(lambda key: ("default", key))
    try:
        assert deserialize(data) == ("default", 3)
        with loading_refs(lambda key: ("outer", key)):
            assert deserialize(data, lambda key: ("inner", key)) == ("inner", 3)
            assert deserialize(data) == ("outer", 3)
            with loading_refs(None):
                assert deserialize(data) == ("default", 3)
        assert pickle.loads(data) == ("default", 3)
    finally:
        set_default_ref_loader(None)


def test_errors_of_a_loader_come_through() -> None:
    def refuse(key: int) -> Any:
        raise ForeignRefError

    with pytest.raises(ForeignRefError):
        deserialize(serialize(Ref(1)).to_bytes(), refuse)


# --- arguments --------------------------------------------------------------------------------------------------------


def test_no_arguments_cost_nothing() -> None:
    assert serialize_args((), {}, Ref) is EMPTY_ARGS
    assert EMPTY_ARGS.payload.to_bytes() == b""
    assert deserialize_args(b"") == ([], {})
    assert deserialize_args(memoryview(b"")) == ([], {})


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((1,), {}),
        ((), {"a": 1}),
        ((1, [2], {"x": b"y"}), {"a": Point(1, 2)}),
        (([1], {}), {}),
        (((1, 2),), {}),
        (tuple(range(99)), {}),
    ],
)
def test_arguments_come_back(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    packed = serialize_args(args, kwargs, Ref)
    assert packed.deps == () or packed.deps == []
    assert deserialize_args(packed.payload.to_bytes()) == (list(args), kwargs)


def test_top_level_references_become_dependencies_and_nested_ones_do_not() -> None:
    class SubRef(Ref):
        pass

    args = (1, Ref(1), [Ref(2)], SubRef(3))
    packed = serialize_args(args, {"a": Ref(1), "b": 2}, Ref)
    assert packed.deps == [(1, Ref(1)), (3, SubRef(3)), ("a", Ref(1))]
    assert list(packed.payload.refs) == [Ref(2)]
    loaded = deserialize_args(packed.payload.to_bytes(), lambda key: ("loaded", key))
    assert loaded == ([1, None, [("loaded", 2)], None], {"a": None, "b": 2})
    assert isinstance(args[1], Ref)  # the caller's tuple and dict are left alone


def test_ten_thousand_dependencies() -> None:
    packed = serialize_args(tuple(Ref(i) for i in range(10_000)), {}, Ref)
    assert len(packed.deps) == 10_000
    assert len(deserialize_args(packed.payload.to_bytes())[0]) == 10_000


# --- errors name the part ---------------------------------------------------------------------------------------------

LOCK = threading.Lock()


def failing(value: Any) -> SerializationError:
    with pytest.raises(SerializationError) as caught:
        serialize(value)
    return caught.value


def test_the_path_leads_to_the_innermost_part() -> None:
    with pytest.raises(SerializationError) as caught:
        serialize_args((1, {"model": Holder(a=1, lock=threading.Lock())}), {}, Ref)
    assert caught.value.path == "argument 2['model'].lock"
    assert str(caught.value).startswith("argument 2['model'].lock: cannot pickle '_thread.lock' object. Leave it out")
    assert isinstance(caught.value.__cause__, TypeError)
    with pytest.raises(SerializationError) as caught:
        serialize_args((), {"k": [LOCK]}, Ref)
    assert caught.value.path == "argument 'k'[0]"


@pytest.mark.parametrize(
    ("value", "path"),
    [
        (LOCK, "value"),
        ([1] * 500 + [LOCK] + [2] * 500, "value[500]"),
        ((1, (2, (3, LOCK))), "value[1][1][1]"),
        ({"a": {3: LOCK}}, "value['a'][3]"),
        (Point(1, LOCK), "value.y"),
        (collections.OrderedDict(a=LOCK), "value['a']"),
        (collections.deque([1, LOCK]), "value[1]"),
        (collections.namedtuple("Pair", "a b")(1, LOCK), "value.b"),
        (functools.partial(print, 1, end=LOCK), "value.keywords['end']"),
        (Holder(a=Holder(b=[Holder(c=LOCK)])).__init__, "value.__self__.a.b[0].c"),
        (ValueError("x", LOCK), "value: constructor argument 2"),
        (types.SimpleNamespace(s=LOCK), "value.s"),
        ({"f": lambda: LOCK}, "value['f']: global 'LOCK'"),
        (lambda x=LOCK: x, "value: default of 'x'"),
    ],
)  # fmt: skip
def test_paths(value: Any, path: str) -> None:
    assert failing(value).path == path


def test_a_back_link_is_not_blamed() -> None:
    parent = Holder(children=[], lock=threading.Lock())
    parent.children.append(Holder(parent=parent))
    assert failing(parent).path == "value.lock"


def test_closures_globals_and_classes() -> None:
    conn = Holder(sock=threading.Lock())

    def f() -> Any:
        return conn

    with pytest.raises(SerializationError, match=r"^function .*f: closure variable 'conn'.sock: cannot pickle"):
        serialize_function(f)

    def g() -> Any:
        return [LOCK for _ in range(2)]

    # (This module can't be imported by its name, so its functions are pickled by value, globals and all.)
    with pytest.raises(SerializationError, match=r"global 'LOCK': cannot pickle"):
        serialize_function(g)

    class C:
        shared = threading.Lock()

    with pytest.raises(SerializationError, match=r"^class .*C: attribute 'shared': cannot pickle"):
        serialize_function(C)


class BadReduce:
    def __reduce__(self) -> Any:
        raise LookupError("no way")


class BadGetstate:
    def __getstate__(self) -> Any:
        raise LookupError("no state")


@pytest.mark.parametrize("bad", [BadReduce, BadGetstate])
def test_a_users_exception_is_chained(bad: type) -> None:
    error = failing({"a": [bad()]})
    assert error.path == "value['a'][0]"
    assert "LookupError: no " in str(error)
    assert isinstance(error.__cause__, LookupError)


class Endless:
    def __reduce__(self) -> Any:
        return Endless, (Endless(),)


def test_too_deep_is_said_so() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    for value in (deep, Endless(), Holder(d=deep)):
        assert "nests too deeply" in str(failing(value))
    with pytest.raises(SerializationError, match="argument 2: nests too deeply"):
        serialize_args((1, deep), {}, Ref)
    while deep:  # taken apart by hand: the deallocation of such a nest is deep too
        deep = deep.pop()


def test_a_search_that_is_too_long_gives_the_path_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "TRIES_MAX", 6)
    error = failing({"a": [1, [2, [3, [LOCK]]]]})
    assert error.path.startswith("value['a']")
    assert "cannot pickle" in str(error)
    monkeypatch.setattr(values, "DEPTH_MAX", 1)
    monkeypatch.setattr(values, "TRIES_MAX", 1000)
    assert failing([[[[LOCK]]]]).path == "value[0]"


class Flaky:
    left = 1

    def __reduce__(self) -> Any:
        Flaky.left -= 1
        if Flaky.left >= 0:
            raise OSError("now and then")
        return Flaky, ()


def test_a_failure_that_does_not_come_again_is_still_an_error() -> None:
    Flaky.left = 1
    assert "now and then" in str(failing([Flaky()]))


def test_interrupts_and_memory_errors_pass() -> None:
    for kind in (KeyboardInterrupt, MemoryError):

        class Raises:
            def __reduce__(self, kind: type[BaseException] = kind) -> Any:
                raise kind

        with pytest.raises(kind):
            serialize(Raises())


# --- functions --------------------------------------------------------------------------------------------------------


def test_functions_by_reference_or_by_value() -> None:
    data, digest = serialize_function(hashlib.sha256)
    assert len(digest) == 16
    assert len(data) < 100
    data, digest = serialize_function(logging.getLogger)
    assert len(data) < 100
    data, digest = serialize_function(lambda: 5)
    assert deserialize(data)() == 5
    assert digest == hashlib.blake2b(data, digest_size=16).digest()


def test_main_is_pickled_by_value() -> None:
    code = """
    import sys
    from ftray.worker.serialization import serialize, serialize_function
    K = 20
    def f(): return K + 1
    class C:
        def get(self): return f()
    sys.stdout.buffer.write(serialize((f, C())).to_bytes())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], check=True, cwd=ROOT, timeout=30, capture_output=True
    )
    function, instance = deserialize(done.stdout)
    assert (function(), instance.get()) == (21, 21)
