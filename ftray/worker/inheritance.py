"""What a child process made by `os.fork` in user code inherits: nothing that works.

Role: shell. The child's copies of our sockets are closed, so that links of the parent still end when the parent does,
and the runtime in the child says "not initialised" instead of speaking in the parent's name.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from ftray.worker import core as core_module
from ftray.worker.core import core_or_none
from ftray.worker.failures import remote_traceback

_registered = False


def _in_child() -> None:
    core = core_or_none()
    if core is None:
        return
    core_module.set_core(None)
    core.closed = True
    reactors = [core.reactor]
    if core.executor is not None:
        core.executor.forked = True
        reactors.append(core.executor.reactor)
    for reactor in reactors:
        reactor.abandon()


def end_child(error: BaseException | None = None) -> NoReturn:
    """Ends a child process that comes back from the user's code, as the interpreter would: it has nothing to reply."""
    code = 0
    if isinstance(error, SystemExit) and (error.code is None or isinstance(error.code, int)):
        code = error.code or 0
    elif isinstance(error, SystemExit):
        print(error.code, file=sys.stderr)
        code = 1
    elif error is not None:
        print(remote_traceback(error), end="", file=sys.stderr)
        code = 1
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (AttributeError, OSError, ValueError):
            pass
    os._exit(code)


def install() -> None:
    """Arranges it, once a process."""
    global _registered
    if not _registered:
        _registered = True
        os.register_at_fork(after_in_child=_in_child)
