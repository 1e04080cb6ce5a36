"""Profiles of hypothesis, for the conftest modules of both test trees.

`quick` (the default) finds something new each day; `ci` draws the same examples in every run, so that a red build is
the commit's doing; `thorough` is for an hour's search. HYPOTHESIS_PROFILE names one; with CI set, `ci` is chosen. No
profile has a deadline per example: on a busy machine it fails tests that are right.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings


def load() -> None:
    """Register the profiles and load the one that the environment asks for."""
    base = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.register_profile("quick", base, max_examples=50)
    settings.register_profile("ci", base, max_examples=100, derandomize=True, database=None, print_blob=True)
    settings.register_profile("thorough", base, max_examples=5_000, print_blob=True)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "quick"))
