"""Exceptions to bytes and back, so that a failure always arrives as something that can be raised.

Role: packs what a task raised (`task_error_payload`) or what the runtime has to say of it (`error_payload`), and loads
either (`load_task_error`). A payload is a pickle of plain data: what is known for certain as text, beside separately
pickled exceptions, any of which may turn out to be unreadable without harm to the rest.

Rules:
- Nothing here raises, whatever the user's exception does: its `__str__`, `__reduce__` or class may fail, it may be no
  Exception at all, its module may be missing in the reader. What can't be carried is replaced by an
  `UnserializableException` with its type's name, its text and its traceback.
- The chain (`__cause__`, else `__context__`) is kept up to `CHAIN_MAX` links; pickle alone would drop it. Inside a
  `TaskError` it ends: its own traceback text has the rest.
- Frames of ftray are left out of the traceback, unless there are no others: then the fault is ours.
- References inside exceptions are pickled out of band, so their objects stay until their owner ends.

Rejected: pickling the exception as a whole (one unpicklable attribute in one link loses everything).
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from traceback import TracebackException
from typing import Any

from ftray.exceptions import TaskError, UnserializableException
from ftray.worker.serialization import deserialize, dump_inband, loading_refs

CHAIN_MAX = 16
PICKLED_BYTES_MAX = 16 << 20
"""An exception that drags more than this along is replaced by a stand-in: errors travel inline."""
TRACEBACK_CHARS_MAX = 100_000

_TASK, _OTHER = "task", "other"
_OWN_FILES = str(Path(__file__).resolve().parents[1]) + "/"

Link = tuple[str, bytes | None, str, str, str]
"""How the link before leads here ("cause" or "context"), pickled exception, type name, text, why it is not pickled."""


def task_error_payload(exc: BaseException, function_name: str, pid: int, node_id: bytes | str) -> bytes:
    """Pack what a task raised, with its traceback. `node_id` as bytes or hex. Never raises."""
    node = node_id if isinstance(node_id, str) else node_id.hex()
    return pickle.dumps((_TASK, function_name, remote_traceback(exc), pid, node, _chain(exc)), 5)


def error_payload(exc: BaseException) -> bytes:
    """Pack an error of the runtime's own (a death, a cancellation), to be raised as it is. Never raises."""
    return pickle.dumps((_OTHER, "", "", 0, "", _chain(exc)), 5)


def load_task_error(payload: bytes | bytearray | memoryview) -> BaseException:
    """What to raise for a payload of either kind. Never raises.

    For a task's error it is a `TaskError` that is an instance of the user's type too; a plain one, whose `cause` is an
    `UnserializableException`, when the user's exception can't be rebuilt here.
    """
    try:
        kind, function_name, text, pid, node, chain = pickle.loads(payload)
        cause = _load_chain(chain, text)
        if kind == _TASK:
            return TaskError(function_name, text, cause, pid, node).as_instance_of_cause()
        return cause
    except Exception as error:
        return UnserializableException(why=f"its {len(payload)} bytes are damaged: {_text_of(error)}")


def remote_traceback(exc: BaseException) -> str:
    """The traceback as text, without frames of ftray, the chain included. Never raises."""
    return _guarded(lambda: _format(exc)) or f"{_type_name(exc)}: {_text_of(exc)}\n"


# --- packing --------------------------------------------------------------------------------------------------------


def _chain(exc: BaseException) -> list[Link]:
    links: list[Link] = []
    seen: set[int] = set()
    relation = ""
    link: BaseException | None = exc
    while link is not None and id(link) not in seen and len(links) < CHAIN_MAX:
        seen.add(id(link))
        data, why = _pickled(link)
        links.append((relation, data, _type_name(link), _text_of(link), why))
        if isinstance(link, TaskError):
            break
        if link.__cause__ is not None:
            relation, link = "cause", link.__cause__
        else:
            relation, link = "context", None if link.__suppress_context__ else link.__context__
    return links


def _pickled(exc: BaseException) -> tuple[bytes | None, str]:
    try:
        data = dump_inband(exc)
    except BaseException as error:
        return None, f"pickling it failed with {_type_name(error)}: {_text_of(error)}"
    if len(data) > PICKLED_BYTES_MAX:
        return None, f"it has {len(data)} bytes, the limit is {PICKLED_BYTES_MAX}"
    return data, ""


def _format(exc: BaseException) -> str:
    captured = TracebackException(type(exc), exc, exc.__traceback__, compact=True)
    if any(not frame.filename.startswith(_OWN_FILES) for frame in captured.stack):
        _leave_out_own_frames(captured, exc, set())
    text = "".join(captured.format())
    if len(text) > TRACEBACK_CHARS_MAX:
        half = TRACEBACK_CHARS_MAX // 2
        text = f"{text[:half]}\n[{len(text) - 2 * half} characters left out]\n{text[-half:]}"
    return text


def _leave_out_own_frames(captured: TracebackException, exc: BaseException, seen: set[int]) -> None:
    if id(exc) in seen or len(seen) > 100:
        return
    seen.add(id(exc))
    captured.stack[:] = [frame for frame in captured.stack if not frame.filename.startswith(_OWN_FILES)]
    if isinstance(exc, TaskError):
        captured.__cause__ = captured.__context__ = None  # its text has the remote traceback, which says it all
        return
    for below, inner in ((captured.__cause__, exc.__cause__), (captured.__context__, exc.__context__)):
        if below is not None and inner is not None:
            _leave_out_own_frames(below, inner, seen)
    for below, inner in zip(captured.exceptions or (), getattr(exc, "exceptions", ())):
        _leave_out_own_frames(below, inner, seen)


# --- loading --------------------------------------------------------------------------------------------------------


def _load_chain(links: list[Link], text: str) -> BaseException:
    first = previous = _load_link(links[0], text)
    for link in links[1:]:
        loaded = _load_link(link, "")
        if link[0] == "cause":
            BaseException.__setattr__(previous, "__cause__", loaded)
        else:
            BaseException.__setattr__(previous, "__context__", loaded)
        previous = loaded
    return first


def _load_link(link: Link, text: str) -> BaseException:
    _, data, type_name, message, why = link
    if data is not None:
        try:
            with loading_refs(None):  # they were pickled out of band, whatever value is being loaded around us
                exc = deserialize(data)
            if isinstance(exc, BaseException):
                return exc
            why = f"its __reduce__ made a {type(exc).__name__}"
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # also SystemExit, from a module that is imported for it
            inner = error.__cause__ or error
            why = f"rebuilding it failed with {_type_name(inner)}: {_text_of(inner)}"
    return UnserializableException(type_name, message, text, why)


# --- what user code may break ---------------------------------------------------------------------------------------


def _guarded(make: Callable[[], Any]) -> str:
    try:
        made = make()
        return str.__str__(made) if isinstance(made, str) else ""
    except BaseException:  # a `__str__` may raise anything
        return ""


def _text_of(exc: BaseException) -> str:
    return _guarded(lambda: str(exc)) or ""


def _type_name(exc: BaseException) -> str:
    kind = type(exc)
    name = _guarded(lambda: kind.__qualname__) or "Exception"
    module = _guarded(lambda: kind.__module__)
    return name if module in ("builtins", "__main__", "") else f"{module}.{name}"
