"""CPython's own tests of `multiprocessing.Pool`, run against ours.

They come with the interpreter (`test._test_multiprocessing`), in its own version; without them this module is skipped.
What is left out is in `EXCLUDED`, each with the reason.
"""

from __future__ import annotations

import unittest
import warnings
from typing import Any

import pytest

from ftray.util.multiprocessing import Pool

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from test import _test_multiprocessing as theirs  # type: ignore[import-not-found,unused-ignore]
except (ImportError, unittest.SkipTest) as error:
    pytest.skip(f"this interpreter comes without CPython's tests: {error}", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("session")

EXCLUDED = {
    "test_unpickleable_result": "the function returns a lambda, which can be pickled here",
    "test_pool_worker_lifetime": "looks at the standard library's process objects (`_pool[i].pid`, `is_alive()`)",
    "test_worker_finalization_via_atexit_handler_of_multiprocessing": "names the original in a program of its own",
}
"""Name of a test -> why it is not run."""


class _Ours:
    """Stands in for the module `multiprocessing` where a test names it."""

    Pool = staticmethod(Pool)

    def __getattr__(self, name: str) -> Any:
        return getattr(theirs_multiprocessing, name)


theirs_multiprocessing = theirs.multiprocessing


def _adopt(base: Any) -> type[unittest.TestCase]:
    members: dict[str, Any] = {"TYPE": "processes", "Pool": staticmethod(Pool), "__module__": __name__}
    members |= {name: None for name in EXCLUDED if hasattr(base, name)}  # None hides an inherited test
    return type(base.__name__.strip("_"), (base, unittest.TestCase), members)


@pytest.fixture(autouse=True)
def ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(theirs, "multiprocessing", _Ours())


TestPool = _adopt(theirs._TestPool)
TestPoolWorkerErrors = _adopt(theirs._TestPoolWorkerErrors)
TestPoolWorkerLifetime = _adopt(theirs._TestPoolWorkerLifetime)


def test_what_is_excluded_exists() -> None:
    bases = (theirs._TestPool, theirs._TestPoolWorkerErrors, theirs._TestPoolWorkerLifetime)
    assert set(EXCLUDED) <= {name for base in bases for name in dir(base)}
