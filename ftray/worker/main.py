"""A worker process, from the fork to its end.

Role: shell. Called by the template in the forked child. Registers with the raylet, then the main thread runs what is
pushed.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from typing import Any

from ftray.config import Config
from ftray.store.arena import Arena
from ftray.wire.handshake import ROLE_PEER, ROLE_TASK
from ftray.wire.messages import RegisterClient
from ftray.wire.reactor import Handler, Link
from ftray.worker import core as core_module
from ftray.worker import inheritance
from ftray.worker.assembly import assemble
from ftray.worker.core import Core, current_task
from ftray.worker.execution import Executor
from ftray.worker.introspection import install_stack_signal
from ftray.worker.start import WorkerStart
from ftray.worker.waiting import block

MARKER = "\x01ftray-task:"
"""A line that begins so names the task that what follows in the stream belongs to; the raylet takes it out."""

OOM_SCORE = "500"
"""Added to the kernel's points for a worker, of 1,000 for all of the memory."""


class TaskStream(io.TextIOWrapper):
    """stdout or stderr of a worker: says whose output it is whenever that changes."""

    _name = ""
    partial = False
    """The last line has no end yet, so it is still in the buffer."""

    def write(self, text: str) -> int:
        context = current_task.get()
        name = context.function_name if context is not None else ""
        if name != self._name:
            self._name = name
            super().write(f"{MARKER}{name}\n")
        self.partial = not text.endswith("\n")
        return super().write(text)


def _wrap_streams() -> list[TaskStream]:
    streams = []
    for number, attribute in ((1, "stdout"), (2, "stderr")):
        raw: Any = open(number, "wb", buffering=0, closefd=False)
        stream = TaskStream(io.BufferedWriter(raw), encoding="utf-8", errors="backslashreplace", line_buffering=True)
        setattr(sys, attribute, stream)
        streams.append(stream)
    return streams


def _first_to_go() -> None:
    """Should the kernel run out of memory before the memory monitor acts, it ends a worker, not the node or driver."""
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write(OOM_SCORE)
    except OSError:
        pass  # not allowed here: then the kernel chooses as it does


def worker_main(start: WorkerStart) -> None:
    """Runs a worker; never returns."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    streams = _wrap_streams()
    _first_to_go()
    config: Config = start.config
    endpoint = f"unix:{start.session_dir}/sockets/w-{start.worker_id.hex()[:12]}.sock"
    core = Core(config, start.token, start.cluster_id, start.worker_id, endpoint, is_driver=False)
    core.node_id = start.node_id
    core.raylet_endpoint = start.raylet_endpoint
    executor = Executor(core)
    executor.streams = streams
    executor.interrupts.install()
    core.executor = executor
    assemble(core, start.session_dir)
    core.objects.arena = Arena.inherited(start.arena_fd, start.arena_bytes)

    def accept(link: Link) -> Handler | None:
        if link.role == ROLE_TASK:
            return executor.greeting
        return core.peers if link.role == ROLE_PEER else None

    core.reactor.listen(endpoint, accept)
    core_module.set_core(core)
    inheritance.install()
    install_stack_signal()
    core.raylet.connect(start.raylet_endpoint, RegisterClient(start.worker_id, os.getpid(), endpoint, driver=False))
    core.start_loop()
    block(core.reactor, core.raylet.registered.waiter, None)
    registered = core.raylet.registered.message
    if registered is None:
        os._exit(1)
    core.gcs.set_endpoints(list(registered.gcs_endpoints))
    try:
        executor.run()
    except BaseException:
        logging.getLogger("ftray.worker").exception("the worker's main loop failed")
        sys.stderr.flush()
        os._exit(70)
    executor.exit_now()
