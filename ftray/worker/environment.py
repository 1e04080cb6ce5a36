"""A worker enters its job: paths, directory, thread counts, and the runtime environment, before any of the user's code.

Role: shell, in workers. What takes no time is done where `WorkerAssigned` arrives, in the loop; an environment is
applied in the main thread, since its hook is the user's code, and answered by `EnvironmentReady`. The raylet sends no
task and no actor before that.

Rules: nothing of the user's has been imported when the variables are set, so libraries that read them at import see
them. A step that fails ends the set-up, and is named in the error; the worker is of no use then, and waits for its end.

Rejected: applying in the loop's thread (a hook that blocks would block the worker's links; signal handlers can be set
in the main thread only).
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
import time
from typing import TYPE_CHECKING, Any

from ftray.ids import driver_prefix
from ftray.runtime_env import HOOK_URI, THREAD_VARIABLES, decode, expand
from ftray.wire.messages import EnvironmentReady, WorkerAssigned
from ftray.worker.core import TaskContext
from ftray.worker.failures import remote_traceback

if TYPE_CHECKING:
    from ftray.worker.execution import Executor

log = logging.getLogger("ftray.worker")


def enter_job(executor: Executor, message: WorkerAssigned) -> None:
    """From the loop, under the core's lock: the worker belongs to this job from now on."""
    core = executor.core
    core.job_id = message.job_id
    core.namespace = message.namespace
    # What is made outside of tasks (by a hook, or a thread of the user's) has ids that no other process makes.
    core.root_context = TaskContext(driver_prefix(message.job_id, core.worker_id), b"")
    threads = str(max(1, int(message.num_cpus)))
    for name in THREAD_VARIABLES:
        os.environ.setdefault(name, threads)
    _prepend(list(message.sys_path))
    if message.cwd:
        try:
            os.chdir(message.cwd)
        except OSError as error:
            log.warning("cannot enter the driver's directory %s: %s", message.cwd, error)
    if message.environment:
        executor.pending.append((None, message, b""))
        executor.wake()
    elif executor.assigned.message is None:
        executor.assigned.give(message)


def apply_environment(executor: Executor, message: WorkerAssigned) -> None:
    """In the main thread: does what the environment says, and reports."""
    core = executor.core
    step = ""
    error = ""
    try:
        meaning = json.loads(message.environment)
        env = decode(meaning["environment"])
        core.environment = meaning["environment"]
        step = "env_vars"
        _set_variables(env.get("env_vars", {}))
        step = "py_modules and working_dir"
        _enter(meaning["paths"], meaning["working_dir"])
        step = "worker_process_setup_hook"
        hook = env.get("worker_process_setup_hook")
        if hook:
            _run_hook(executor, hook)
    except BaseException as problem:  # also SystemExit, from the hook or a module that is imported for it
        error = f"{step}: {remote_traceback(problem).rstrip()}"
        problem.__traceback__ = None
    executor.flush_prints()
    with core.lock:
        core.drain()
        core.raylet.send(EnvironmentReady(error))
        if not error and executor.assigned.message is None:
            executor.assigned.give(message)
        core.settle()


def _set_variables(variables: dict[str, str]) -> None:
    expanded = expand(variables, dict(os.environ))
    os.environ.update(expanded)
    # This process has started already: what the interpreter reads at its start is done here.
    if "PYTHONPATH" in expanded:
        _prepend([path for path in expanded["PYTHONPATH"].split(os.pathsep) if path])
    if "TZ" in expanded:
        time.tzset()


def _enter(paths: list[str], working_dir: str) -> None:
    if working_dir:
        os.chdir(working_dir)
        paths = [*paths, working_dir]
    if not paths:
        return
    for path in paths:
        if path in sys.path:
            sys.path.remove(path)
    sys.path[:0] = paths
    importlib.invalidate_caches()
    # For the processes that the user's code starts.
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *([before] if before else [])])


def _run_hook(executor: Executor, hook: str) -> None:
    match = HOOK_URI.fullmatch(hook)
    if match is not None:
        function: Any = executor.function(bytes.fromhex(match[1]))
    else:
        module, _, name = hook.rpartition(".")
        function = getattr(importlib.import_module(module), name)
        if not callable(function):
            raise TypeError(f"{hook} is {function!r}, which can't be called")
    function()


def _prepend(paths: list[str]) -> None:
    """Puts those that are not there yet before the others, in their order."""
    for path in reversed(paths):
        if path not in sys.path:
            sys.path.insert(0, path)
