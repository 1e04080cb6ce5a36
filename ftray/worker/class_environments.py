"""The owner's side of runtime environments: saying them ahead, and what becomes of tasks when one can't be set up.

Role: shell, under the core's lock unless a function says otherwise.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ftray.exceptions import RuntimeEnvSetupError
from ftray.wire.messages import LeaseEnvironmentFailed

if TYPE_CHECKING:
    from ftray.worker.core import Core

log = logging.getLogger("ftray.worker")


def environment_failed(core: Core, message: LeaseEnvironmentFailed) -> None:
    """The node can't set up the environment of a class: the tasks that wait for it fail, later ones try again."""
    submitter = core.submitter
    cls = submitter.dispatcher.by_id.get(message.class_id)
    if cls is None:
        return
    tasks = submitter.dispatcher.withdraw(message.class_id)
    if not tasks:
        log.warning("the runtime environment of %s could not be set up: %s", cls.name, message.error)
    for task in tasks:
        text = f"the runtime environment of {task.function.name} could not be set up: {message.error}"
        submitter.fail(task, RuntimeEnvSetupError(text))
    submitter.after()


def prepare(core: Core, environment: str) -> None:
    """Lets the node fetch what an environment needs before a task asks for it. Not under the lock."""
    with core.lock:
        submitter = core.submitter
        cls = submitter.dispatcher.class_for(("prepare", environment), {"CPU": 1.0}, "the job")
        cls.environment = environment
        submitter.dispatcher.demands[cls.class_id] = cls
        submitter.say_demands()
        core.settle()
