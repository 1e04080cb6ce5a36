"""The actor that the tests of actors use, and patience with one that restarts."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

from integration.harness import wait_for_file, wait_until

import ftray
from ftray import exceptions


def counter_class(**options: Any) -> Any:
    class Counter:
        def __init__(self, start: int = 0) -> None:
            self.value = start

        def add(self, n: int = 1) -> int:
            self.value += n
            return self.value

        def pid(self) -> int:
            return os.getpid()

        def wait_for(self, path: str) -> int:
            wait_for_file(path)
            return self.add()

        def die(self) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        def again(self) -> bool:
            return ftray.get_runtime_context().was_current_actor_reconstructed

    return ftray.remote(**options)(Counter) if options else ftray.remote(Counter)


def patiently(call: Callable[[], Any]) -> Any:
    """Repeats a call while its actor restarts."""

    def attempt() -> Any:
        try:
            return [ftray.get(call(), timeout=10)]
        except exceptions.ActorUnavailableError:
            return None

    return wait_until(attempt)[0]
