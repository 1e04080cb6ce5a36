"""Setup of all tests in this tree: the hypothesis profile, and Ctrl-C as programs know it.

A shell starts its background jobs with SIGINT ignored, which they hand on to what they start: tests of it would hang.
"""

from __future__ import annotations

import signal

import hypothesis_profiles

hypothesis_profiles.load()
signal.signal(signal.SIGINT, signal.default_int_handler)
