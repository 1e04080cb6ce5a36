"""CPython's own tests of executors, run against `ftray.util.FtrayExecutor`.

They come with the interpreter, where it was installed with its tests; else this module is skipped. Their test classes
are mixins without an executor: here they get ours, on one session that all share. `NOT_HERE` names those left out,
each with the reason and where ours tests the same.
"""

from __future__ import annotations

import importlib
import unittest
from typing import Any

import pytest

from ftray.util import FtrayExecutor

SESSION = {"num_cpus": 12}
pytestmark = pytest.mark.usefixtures("session")

PACKAGE = "test.test_concurrent_futures"
MIXINS = {
    "ExecutorTest": "executor",
    "WaitTests": "test_wait",
    "AsCompletedTests": "test_as_completed",
    "ExecutorShutdownTest": "test_shutdown",
    "InitializerMixin": "test_init",
    "FailingInitializerMixin": "test_init",
}
"""Class -> the module of the package that has it (up to Python 3.11 the package is one module)."""

STANDARD_ONLY = "its program imports the executor from concurrent.futures, and workers print without their origin; "
NOT_HERE = {
    "test_interpreter_shutdown": STANDARD_ONLY + "ours: test_a_program_ends_when_all_is_done",
    "test_submit_after_interpreter_shutdown": STANDARD_ONLY + "ours: test_a_program_ends_when_all_is_done",
    "test_hang_gh83386": STANDARD_ONLY + "ours: test_a_program_ends_when_all_is_done",
    "test_map_timeout": "it sleeps for 6 s; ours: test_map_gives_up_after_its_timeout",
    "test_duplicate_futures": "it sleeps for 2 s, and tests as_completed alone; ours: test_wait_and_as_completed",
    "test_free_reference_yielded_future": "it tests as_completed alone, and collects garbage for 2 s",
    "test_first_exception_one_already_failed": "it sleeps for 2 s; ours: test_wait_and_as_completed",
}


def find(name: str, module: str) -> Any:
    """The mixin of that name. Raises ImportError when this interpreter has no such tests."""
    package = importlib.import_module(PACKAGE)
    try:
        found = importlib.import_module(f"{PACKAGE}.{module}")
    except ModuleNotFoundError:
        found = package
    return getattr(found, name)


class OnFtray:
    """Goes before CPython's `ExecutorMixin`, which makes the executor; what a test left sleeping is not waited for."""

    executor_type = FtrayExecutor
    executor: FtrayExecutor

    def tearDown(self) -> None:
        self.executor.shutdown(wait=False, cancel_futures=True)
        del self.executor


def build(name: str, module: str) -> type[unittest.TestCase]:
    """A test case of a mixin, without what is not for us."""
    mixin = find(name, module)
    left_out = {test: None for test in NOT_HERE if hasattr(mixin, test)}
    bases = (OnFtray, mixin, find("ExecutorMixin", "util"), unittest.TestCase)
    return type(f"Test{name}", bases, {**left_out, "__module__": __name__})


try:
    CASES = {f"Test{name}": build(name, module) for name, module in MIXINS.items()}
except ImportError as error:
    pytest.skip(f"this Python was installed without the tests of concurrent.futures: {error}", allow_module_level=True)

globals().update(CASES)


def test_what_is_left_out_exists() -> None:
    known = {name for name, module in MIXINS.items() for name in dir(find(name, module))}
    assert set(NOT_HERE) <= known
    ran = {name for case in CASES.values() for name in dir(case) if name.startswith("test_") and getattr(case, name)}
    assert len(ran) >= 18
    assert not ran & set(NOT_HERE)
