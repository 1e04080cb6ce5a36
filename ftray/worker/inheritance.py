"""What a child process made by `os.fork` in user code inherits: nothing that works.

Role: shell. The child's copies of our sockets are closed, so that links of the parent still end when the parent does,
and the runtime in the child says "not initialised" instead of speaking in the parent's name.
"""

from __future__ import annotations

import os

from ftray.worker import core as core_module
from ftray.worker.core import core_or_none

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


def install() -> None:
    """Arranges it, once a process."""
    global _registered
    if not _registered:
        _registered = True
        os.register_at_fork(after_in_child=_in_child)
