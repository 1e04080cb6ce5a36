"""Errors of tasks as other libraries' users expect them.

Role: shared by what puts ftray behind another library's interface.
"""

from __future__ import annotations

from ftray.exceptions import TaskError, UnserializableException


def as_raised(error: TaskError) -> BaseException:
    """The exception that a task raised, as it was, with the remote traceback (a TaskError) as its cause.

    What can't be raised as it was (its type is missing here, or it would end the caller, such as SystemExit) stays a
    TaskError.
    """
    cause = TaskError._fields(error).get("cause")
    if not isinstance(cause, Exception) or isinstance(cause, UnserializableException):
        return error
    remote = remote_traceback(error)
    remote.__cause__ = cause.__cause__
    BaseException.__setattr__(cause, "__cause__", remote)
    return cause


def remote_traceback(error: TaskError) -> TaskError:
    """The error without its cause: where it happened, and the traceback there."""
    fields = TaskError._fields(error)
    return TaskError(
        fields.get("function_name", ""), fields.get("traceback_str", ""), None, fields.get("pid", 0),
        fields.get("node_id", ""),
    )  # fmt: skip
