"""Setup of all tests in this tree: the hypothesis profile, and Ctrl-C as programs know it.

A shell starts its background jobs with SIGINT ignored, which they hand on to what they start: tests of it would hang.
"""

from __future__ import annotations

import gc
import signal

import hypothesis_profiles
import pytest

hypothesis_profiles.load()
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Thousands of tests and their modules live as long as the run: a full pass of the collector need not look at them.
    Without this, simulations take several times as long in a run of all tests as alone."""
    gc.collect()
    gc.freeze()
