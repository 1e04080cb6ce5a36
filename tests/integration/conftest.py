"""The session that the tests of a module share, and the check that it leaves nothing behind.

A module may say what its session offers with `SESSION = {...}` (arguments of `init`).
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from integration.harness import MARK, check_drained, marked, session_leftovers, shm_files, wait_for_none

import ftray


@pytest.fixture(scope="module")
def session(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A node with two CPUs; afterwards nothing of it may be left, neither held nor running nor on disk."""
    mark = uuid.uuid4().hex
    before = shm_files()
    os.environ[MARK] = mark
    try:
        started = ftray.init(**getattr(request.module, "SESSION", {"num_cpus": 2}))
    finally:
        del os.environ[MARK]
    failed_before = request.session.testsfailed
    try:
        yield started
        # A failed test's traceback keeps its variables.
        if request.session.testsfailed == failed_before:
            check_drained()
    finally:
        ftray.shutdown()
        try:
            wait_for_none(lambda: marked(mark), 2.0, "processes of the session")
            wait_for_none(lambda: session_leftovers(started.session_dir), 2.0, "in the session folder")
            assert not {name for name in shm_files() - before if "ftray" in name}
        finally:
            for pid in marked(mark):
                os.kill(pid, 9)
