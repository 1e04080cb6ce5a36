"""What the tests of `ftray.cancel` share: tasks that stay until they are interrupted and say by files where they are.

Imported in workers too, so it imports little.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from integration.harness import wait_until

import ftray
from ftray import exceptions

GET_S = 15.0


def check_cancelled(ref: Any, name: str) -> None:
    """The reference stands for a cancelled task of that name, again and again."""
    import pytest

    for _ in range(2):
        with pytest.raises(exceptions.TaskCancelledError, match=name) as caught:
            ftray.get(ref, timeout=GET_S)
        assert caught.value.task_id == ref.task_id()


def hold() -> None:
    time.sleep(60)


@ftray.remote
def pid_of_worker() -> int:
    return os.getpid()


@ftray.remote(num_cpus=0)
def holding(directory: str, number: int = 0) -> None:
    """Writes its worker's pid, and stays; says whether it was interrupted."""
    try:
        Path(directory, f"begun-{number}").write_text(str(os.getpid()))
        hold()
    except KeyboardInterrupt:
        Path(directory, f"interrupted-{number}").touch()
        raise


def begun(directory: Path, number: int = 0) -> int:
    """Waits until that task runs; returns its pid."""
    path = directory / f"begun-{number}"
    wait_until(lambda: path.exists() and path.read_text(), what=f"{path} exists")
    return int(path.read_text())


class Plain:
    def __init__(self) -> None:
        self.log: list[int] = []

    def stay(self, directory: str) -> str:
        Path(directory, "begun-0").write_text(str(os.getpid()))
        context = ftray.get_runtime_context()
        wait_until(context.is_canceled, 30)
        Path(directory, "seen").touch()
        return "ignored"

    def note(self, number: int) -> int:
        self.log.append(number)
        return number

    def read(self) -> list[int]:
        return self.log

    def wait_for(self, directory: str) -> None:
        ftray.get(holding.remote(directory))
